"""DATABASE_URL as people have it: pasted from a console, or written for another driver."""

import re
from urllib.parse import unquote

import psycopg
from psycopg import conninfo, pq

PASTED = re.compile(
    r"(?:export\s+)?(?:DATABASE_URL\s*=\s*)?(?:psql\s+(?:-d\s+)?)?(['\"]?)(.*?)\1\s*;?", re.DOTALL
)
SCHEME = re.compile(r"(jdbc:)?(postgres|postgresql|psql|pgsql|postgis)(\+\w+)?", re.IGNORECASE)
PLACEHOLDER = re.compile(r"\[.*\]|<.*>|\*+|\$\{.*\}|your[-_ ]?password", re.IGNORECASE)
LIBPQ = {option.keyword.decode() for option in pq.Conninfo.get_defaults()}
# Of Prisma, asyncpg, SQLAlchemy, node-postgres, pgx, JDBC, Django and Rails: pools, caches,
# timeouts and the like, which this service has its own of.
HARMLESS = re.compile(
    r"((current)?schema|search_path|pgbouncer|supa|workaround|uselibpqcompat|application_?name"
    r"|charset|encoding|time_?zone|engine|min(_?size)?|max(_?size)?|fetch_types|stringtype"
    r"|rewrite.*inserts|atomic_requests|.*(pool|cache|timeout|limit|lifetime|idle|_age|health"
    r"|prepare|alive|echo|overflow|cursor|protocol|exec_mode|binary|async).*)=.*"
    r"|sslaccept=accept_invalid_certs",
    re.IGNORECASE,
)
SEARCH_PATH = re.compile(
    r"(?:[?&\s]|-c|--)(?:currentSchema|schema|search_path)\s*=\s*([^\s&]+)", re.IGNORECASE
)
SSLMODES = {"true": "require", "1": "require", "false": "disable", "0": "disable"}
SSLMODES |= {"no-verify": "require"}  # as libpq's require
DEFAULTS = {"connect_timeout": "3", "keepalives_idle": "30"}
MALFORMED = (
    "DATABASE_URL is not of the form postgresql://user:password@host/database: write @ in a name"
    " or a password as %40, / as %2F, : as %3A, # as %23 and % as %25"
)


def connection_string(database_url: str, schema: str) -> str:
    """DATABASE_URL as a conninfo, over DEFAULTS. `schema`, of the tables, is application_name too.

    Parameters that only other drivers know are dropped. Raises SystemExit with one line about one
    that means something and cannot be heeded, or another mistake. The line never has a password.
    """
    pasted = PASTED.fullmatch(database_url.strip("\ufeff\u200b \t\r\n"))
    text = pasted[2].strip() if pasted else ""
    if not text:
        raise SystemExit("DATABASE_URL is not set: the service needs a PostgreSQL database")
    for path in SEARCH_PATH.findall(unquote(text)):
        if {name.strip("\"'\\ ") for name in path.split(",")} - {"public", "$user", schema}:
            raise SystemExit(f"DATABASE_URL asks for the schema {path}: the tables are in {schema}")
    try:
        given = conninfo.conninfo_to_dict(uri_for_libpq(text) if "://" in text else text)
    except psycopg.ProgrammingError:
        raise SystemExit(MALFORMED) from None
    if not re.fullmatch(r"[\d,]*", str(given.get("port", ""))):
        raise SystemExit(f"{MALFORMED}. Its port is not a number")
    if PLACEHOLDER.fullmatch(str(given.get("password", ""))):
        raise SystemExit("DATABASE_URL has a placeholder in place of the password")
    defaults = DEFAULTS | {"application_name": schema}
    return conninfo.make_conninfo("", **defaults | given | {"client_encoding": "utf8"})


def uri_for_libpq(text: str) -> str:
    """A URI that has libpq's scheme and parameters only. Raises SystemExit."""
    scheme, _, rest = text.partition("://")
    if not SCHEME.fullmatch(scheme):
        raise SystemExit("DATABASE_URL is not of PostgreSQL: it begins with postgresql://")
    user, at, rest = rest.rpartition("@")  # the last @, because a password may have one
    if re.search("[@/]", user):
        raise SystemExit(MALFORMED)
    host, _, query = rest.partition("?")
    kept = []
    for each in query.split("&"):
        name, _, value = each.partition("=")
        if name == "sslmode" or (name == "ssl" and "sslmode=" not in query):
            kept.append(f"sslmode={SSLMODES.get(value, value)}")
        elif name == "ssl":
            continue  # the other driver's word, beside libpq's
        elif name in LIBPQ:
            kept.append(each)
        elif each and not HARMLESS.fullmatch(each):
            if "=" not in each:  # a part of a password with & in it
                raise SystemExit(f"{MALFORMED}, and & as %26")
            text = "DATABASE_URL has a parameter unknown to PostgreSQL, remove it"
            raise SystemExit(f"{text}: {name}")
    return f"postgresql://{user}{at}{host}?{'&'.join(kept)}"
