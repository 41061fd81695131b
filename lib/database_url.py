"""DATABASE_URL as people have it: pasted from a console, or written for another driver."""

import re
from typing import Any
from urllib.parse import unquote

import psycopg
from psycopg import conninfo, pq

PASTED = re.compile(
    r"(?:export\s+)?(?:DATABASE_URL\s*=\s*)?(?:psql\s+(?:-d\s+)?)?(['\"]?)(.*?)\1\s*;?", re.DOTALL
)
SCHEME = re.compile(r"(jdbc:)?(postgres|postgresql|psql|pgsql|postgis)(\+\w+)?://", re.IGNORECASE)
# The password ends at the last @, so that one with an @, / or ? in it can be told of.
PARTS = re.compile(r"((?:[^:/@]*(?::(.*))?@)?[^@/?]*(?:/[^@/?]*)?)(?:\?(.*))?", re.DOTALL)
LIBPQ = {option.keyword.decode() for option in pq.Conninfo.get_defaults()}
# Of Prisma, asyncpg, SQLAlchemy, node-postgres, pgx, JDBC, Django and Rails: pools, caches,
# timeouts and the like, which this service has its own of.
HARMLESS = re.compile(
    r"pgbouncer|supa|workaround|uselibpqcompat|application_?name|charset|encoding|time_?zone"
    r"|engine|min(_?size)?|max(_?size)?|fetch_types|stringtype|rewrite.*inserts|atomic_requests"
    r"|.*(pool|cache|timeout|limit|lifetime|idle|_age|health|prepare|alive|echo|overflow|cursor"
    r"|protocol|exec_mode|binary|async).*",
    re.IGNORECASE,
)
SSLMODES = {"true": "require", "1": "require", "false": "disable", "0": "disable"}
SSLMODES |= {"no-verify": "require"}  # as libpq's require
PLACEHOLDER = re.compile(r"\[.*\]|<.*>|\*+|\$\{.*\}|your[-_ ]?password", re.IGNORECASE)

FORM = "postgresql://user:password@host/database"
ENCODING = "write @ in a name or a password as %40, / as %2F, : as %3A, # as %23 and % as %25"


def connection_string(database_url: str, schema: str) -> str:
    """DATABASE_URL as a conninfo, over our defaults. `schema` is where the tables stand.

    Parameters that only other drivers know are dropped. Raises SystemExit with one line about one
    that means something and cannot be heeded, or another mistake. The line never has a password.
    """
    pasted = PASTED.fullmatch(database_url.strip("\ufeff\u200b \t\r\n"))
    text = pasted[2].strip() if pasted else ""
    if not text:
        raise SystemExit("DATABASE_URL is not set: the service needs a PostgreSQL database")
    if "://" in text:
        text = uri_for_libpq(text, schema)
    ours: dict[str, Any] = {"application_name": "todo", "connect_timeout": 3, "keepalives_idle": 30}
    try:
        given = conninfo.conninfo_to_dict(text)
    except psycopg.ProgrammingError:
        raise SystemExit(f"DATABASE_URL is not of the form {FORM}: {ENCODING}") from None
    if not re.fullmatch(r"[\d,]*", str(given.get("port", ""))):
        raise SystemExit(f"DATABASE_URL has a port that is not a number: {ENCODING}")
    if PLACEHOLDER.fullmatch(str(given.get("password", ""))):
        raise SystemExit("DATABASE_URL has a placeholder in place of the password")
    refuse_search_path(str(given.get("options", "")), "options", schema)
    return conninfo.make_conninfo("", **ours | given | {"client_encoding": "utf8"})


def uri_for_libpq(text: str, schema: str) -> str:
    """A URI that has libpq's scheme and parameters only. Raises SystemExit."""
    scheme, parts = SCHEME.match(text), None
    if not scheme:
        raise SystemExit(f"DATABASE_URL is not of a PostgreSQL database: it takes {FORM}")
    parts = PARTS.fullmatch(text[scheme.end() :])
    if not parts or re.search(r"[@/\s]|%(?![0-9a-fA-F]{2})", parts[2] or ""):
        raise SystemExit(f"DATABASE_URL is not of the form {FORM}: {ENCODING}")
    kept = []
    for name, _, value in (each.partition("=") for each in (parts[3] or "").split("&") if each):
        if name in ("schema", "currentSchema", "search_path"):
            refuse_search_path(f"search_path={unquote(value)}", name, schema)
        elif name in ("ssl", "sslmode"):
            kept.append(f"sslmode={SSLMODES.get(value, value)}")
        elif name in LIBPQ:
            kept.append(f"{name}={value}")
        elif not HARMLESS.fullmatch(name) and (name, value) != (
            "sslaccept",
            "accept_invalid_certs",
        ):
            raise SystemExit(
                f"DATABASE_URL has a parameter unknown to PostgreSQL, remove it: {name}"
            )
    return f"postgresql://{parts[1]}?{'&'.join(kept)}"


def refuse_search_path(options: str, parameter: str, schema: str) -> None:
    """Raises SystemExit where a search_path asks for tables in another schema."""
    for path in re.findall(r"search_path\s*=\s*(\S+)", options):
        if {name.strip("\"'\\ ") for name in path.split(",")} - {"public", "$user", schema}:
            text = f"the tables are in the schema {schema}, always. Remove {parameter}"
            raise SystemExit(f"DATABASE_URL asks for the schema {path} by {parameter}: {text}")
