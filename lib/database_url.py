"""DATABASE_URL as people have it: pasted from a console, or written for another driver."""

import re
from urllib.parse import unquote

import psycopg
from psycopg import conninfo, pq

PASTED = re.compile(r"(export\s+)?(DATABASE_URL\s*=\s*)?(psql\s+(-d\s+)?)?")  # before it
QUOTED = re.compile(r"^(['\"])(.*)\1\s*;?$", re.DOTALL)
SCHEME = re.compile(r"(jdbc:)?(postgres|postgresql|psql|pgsql|postgis)(\+\w+)?://", re.IGNORECASE)
# Parts as libpq finds them: user and password end at the first @, if no slash stands before it.
PARTS = re.compile(r"((?:[^@/]*@)?[^@?]*)(?:\?(.*))?", re.DOTALL)
LIBPQ = {option.keyword.decode() for option in pq.Conninfo.get_defaults()}
# In the names of other drivers' parameters: the service has its own.
HARMLESS = re.compile(
    r"(?i)schema|search_path|bouncer|supa|workaround|libpqcompat|application|charset|encoding|zone"
    r"|engine|^min|^max|fetch_types|stringtype|inserts|atomic|pool|cache|timeout|limit|lifetime"
    r"|_age|health|prepare|alive|echo|cursor|protocol|exec_mode|binary|async"
)
SCHEMAS = {"schema", "currentschema", "search_path"}  # harmless where they name ours
SEARCH_PATH = re.compile(r"search_path\s*=\s*(\S+)", re.IGNORECASE)  # in libpq's `options`
SSLMODES = dict.fromkeys(("true", "1", "no-verify"), "require")
SSLMODES |= dict.fromkeys(("false", "0"), "disable")
# [YOUR-PASSWORD], <password>, ${PASSWORD}, YOUR_PASSWORD, ****
PLACEHOLDER = re.compile(r"(?i)[\[<][\w -]*password[\]>]|\$\{\w+\}|your[-_ ]?password|\*{3,}")
MALFORMED = (
    "DATABASE_URL is not of the form postgresql://user:password@host/database: write @ in a name"
    " or a password as %40, / as %2F, : as %3A and % as %25"
)


def connection_string(database_url: str, schema: str) -> str:
    """DATABASE_URL as a conninfo. `schema`, of the tables, is application_name too.

    Drops harmless parameters of other drivers. Raises SystemExit with one line without a password.
    """
    text = PASTED.sub("", database_url.strip("\ufeff\u200b \t\r\n"), count=1)
    text = QUOTED.sub(r"\2", text).strip()
    if not text:
        raise SystemExit("DATABASE_URL is not set: the service needs a PostgreSQL database")
    is_uri = re.match("[^=]*://", text)  # else host=…, which may end in a value's semicolon
    uri, dropped = uri_for_libpq(text.rstrip("; ")) if is_uri else (text, {})
    try:
        given = conninfo.conninfo_to_dict(uri)
    except (psycopg.ProgrammingError, UnicodeError):  # %ff is not UTF-8
        raise SystemExit(MALFORMED) from None
    paths = [unquote(value) for name, value in dropped.items() if name.lower() in SCHEMAS]
    for path in paths + SEARCH_PATH.findall(str(given.get("options"))):
        if {name.strip("\"'\\ ") for name in path.split(",")} - {"", "public", "$user", schema}:
            raise SystemExit(f"DATABASE_URL asks for the schema {path}: the tables are in {schema}")
    for name in ("port", "connect_timeout"):
        if not re.fullmatch(r"[\d,]*", str(given.get(name, ""))):
            raise SystemExit(f"{MALFORMED}. Its {name} is not a number")
    if PLACEHOLDER.fullmatch(str(given.get("password", ""))):
        raise SystemExit("DATABASE_URL has a placeholder in place of the password")
    defaults = {"connect_timeout": "3", "keepalives_idle": "30", "application_name": schema}
    return conninfo.make_conninfo("", **defaults | given | {"client_encoding": "utf8"})


def uri_for_libpq(uri: str) -> tuple[str, dict[str, str]]:
    """A URI that has libpq's scheme and parameters only, and those dropped. Raises SystemExit."""
    scheme = SCHEME.match(uri)
    if not scheme:
        raise SystemExit("DATABASE_URL is not of PostgreSQL: it begins with postgresql://")
    parts = PARTS.fullmatch(uri, scheme.end())
    if not parts:  # an @ or a slash in a name or a password
        raise SystemExit(MALFORMED)
    place, query = parts.groups("")
    parameters = [each.partition("=") for each in query.split("&") if each]
    if not all(equals for _, equals, _ in parameters):  # a part of a password with & in it
        raise SystemExit(f"{MALFORMED}, and & as %26")
    given = {name: value for name, _, value in parameters}
    if "@" in query and "password" not in given:  # of a password with / and ? in it
        raise SystemExit(MALFORMED)
    ssl = given.pop("ssl", "")  # which does not weaken libpq's word
    if mode := given.get("sslmode") or ssl:
        given["sslmode"] = SSLMODES.get(mode.lower(), mode)
    dropped = {name: given.pop(name) for name in given.keys() - LIBPQ}
    if unknown := {name for name in dropped if not HARMLESS.search(name)}:
        raise SystemExit(f"DATABASE_URL has an unknown parameter, remove it: {min(unknown)}")
    return f"postgresql://{place}?" + "&".join(map("=".join, given.items())), dropped
