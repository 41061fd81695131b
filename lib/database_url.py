"""DATABASE_URL as people have it: pasted from a console, or written for another driver.

What is pasted around it goes, and so do parameters that mean nothing here. libpq reads the rest.
"""

import re
from urllib.parse import quote, unquote, urlencode

import psycopg
from psycopg import conninfo, pq

PASTED = re.compile(r"(export\s+)?(DATABASE_URL\s*=\s*)?(psql\s+(-d\s+)?)?")  # before it
QUOTED = re.compile(r"^(['\"])(.*)\1\s*;?$", re.DOTALL)
SCHEME = re.compile(r"(jdbc:)?(postgres|postgresql|psql|pgsql|postgis)(\+\w+)?://", re.IGNORECASE)
# Parts as libpq finds them: user and password end at the first @, if no slash stands before it.
PARTS = re.compile(r"((?:[^@/]*@)?[^@?]*)(?:\?(.*))?", re.DOTALL)
LIBPQ = {option.keyword.decode() for option in pq.Conninfo.get_defaults()}
# Parameters of other drivers, in lower case and without _ and -. The service has its own pools,
# caches and timeouts. SCHEMAS may name its schema.
HARMLESS = """
applicationname charset commandtimeout connectionlimit connectiontimeoutmillis connecttimeout
connhealthchecks connmaxage encoding idletimeout idletimeoutmillis keepalive locktimeout max
maxcachedstatementlifetime maxlifetime maxoverflow min pgbouncer pool poolpreping poolrecycle
poolsize pooltimeout prepare preparedstatementcachesize preparethreshold querytimeout
sockettimeout statementcachesize statementtimeout supa timeout timezone uselibpqcompat workaround
""".split()  # noqa: SIM905
SCHEMAS = {"schema", "currentschema", "searchpath"}
SSLMODES = {"true": "require", "1": "require", "no-verify": "require"}  # of `ssl`
SSLMODES |= {"false": "disable", "0": "disable"}
FREE = {"password", "sslpassword", "options", "application_name"}  # may have ; or & in them
MALFORMED = (
    "DATABASE_URL is not of the form postgresql://user:password@host/database: write @ in a name"
    " or a password as %40, / as %2F, : as %3A, & as %26 and % as %25"
)


def connection_string(database_url: str, schema: str) -> str:
    """DATABASE_URL as a conninfo. `schema`, of the tables, is application_name too.

    Raises SystemExit with one line that repeats no part of a password.
    """
    text = PASTED.sub("", database_url.strip("\ufeff\u200b \t\r\n"), count=1)
    text = QUOTED.sub(r"\2", text).strip()
    if not text:
        raise SystemExit("DATABASE_URL is not set: the service needs a PostgreSQL database")
    is_uri = re.match("[^=]*://", text)  # else host=…, which may end in a value's semicolon
    if is_uri:
        text = uri_for_libpq(text.rstrip("; "), schema)
    try:
        given = conninfo.conninfo_to_dict(text)
    except (psycopg.ProgrammingError, UnicodeError):  # %ff is not UTF-8
        raise SystemExit(MALFORMED) from None
    # libpq would repeat these, and a password of another driver's form within. In a URI's names
    # they are written as %3B and %26.
    free = FREE if re.search("[;&]", text.partition("?")[0]) else FREE | {"user", "dbname"}
    if any(re.search("[;&]", str(value)) for name, value in given.items() if name not in free):
        raise SystemExit(f"{MALFORMED}. Its parameters follow a ?")
    if not re.fullmatch(r"[\d,]*", str(given.get("port", ""))):
        raise SystemExit(f"{MALFORMED}. Its port is not a number")
    defaults = {"connect_timeout": "3", "keepalives_idle": "30", "application_name": schema}
    return conninfo.make_conninfo("", **defaults | given | {"client_encoding": "utf8"})


def uri_for_libpq(uri: str, schema: str) -> str:
    """The URI with libpq's scheme and parameters only. Raises SystemExit."""
    scheme = SCHEME.match(uri)
    if not scheme:
        raise SystemExit("DATABASE_URL is not of PostgreSQL: it begins with postgresql://")
    parts = PARTS.fullmatch(uri, scheme.end())
    if not parts:  # an @ or a slash in a name or a password
        raise SystemExit(MALFORMED)
    place, query = parts.groups("")
    parameters = [each.partition("=") for each in query.split("&") if each]
    given = {name: unquote(value) for name, _, value in parameters if value}
    # A password with & or ? in it.
    if not all(equals for _, equals, _ in parameters) or ("@" in query and "password" not in given):
        raise SystemExit(MALFORMED)
    ssl = given.pop("ssl", "")  # which does not weaken libpq's word
    if mode := given.get("sslmode", ssl):
        given["sslmode"] = SSLMODES.get(mode.lower(), mode)
    for name in sorted(given.keys() - LIBPQ):
        value, normalized = given.pop(name), re.sub("[_-]", "", name.lower())
        others = set(re.split(r"[\s,\"']+", value)) - {"", "public", "$user", schema}
        if normalized in SCHEMAS and others:
            raise SystemExit(f"DATABASE_URL asks for the schema {value}: ours is {schema}")
        if normalized not in HARMLESS and normalized not in SCHEMAS:
            # It may be what follows an & in a password.
            shown = "one beside password=, where & is %26" if "password" in given else name
            raise SystemExit(f"DATABASE_URL has an unknown parameter, remove it: {shown}")
    return f"postgresql://{place}?" + urlencode(given, quote_via=quote)
