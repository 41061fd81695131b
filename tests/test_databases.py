"""Databases as people have them: shared, restricted, read-only, behind poolers, oddly set."""

import asyncio
import re
import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from time import monotonic
from typing import Any
from urllib.parse import quote

import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict, make_conninfo

import db
from conftest import HERE, client, execute, serving
from lib import checks, prepare
from lib.connect_errors import NotReady, explain
from lib.database_url import connection_string
from lib.prepare import prepare_database
from pgpipeline import Statement
from tests.pgbouncer import needs_pgbouncer, pgbouncer

parametrize = pytest.mark.parametrize
SCHEMA = HERE / "schema.sql"
ROLE = "todo_dml_test"
DML = "SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA todo"


def prepared(url: str, *statements: Statement, schema: Path = SCHEMA) -> None:
    """Does what a start does, with the service's statements if there are no others."""
    given = list(statements) or db.STATEMENTS
    asyncio.run(prepare_database(connection_string(url, "todo"), schema, "todo.tasks", given))


def refusal(url: str, *statements: Statement, schema: Path = SCHEMA) -> str:
    """The line with which a start on this database ends."""
    with pytest.raises(NotReady) as raised:
        prepared(url, *statements, schema=schema)
    [line] = str(raised.value).splitlines()
    return line


def query(url: str, text: str) -> list[tuple[Any, ...]]:
    with psycopg.connect(url) as connection:
        return connection.execute(text.encode()).fetchall()


@contextmanager
def role(url: str, *grants: str) -> Iterator[str]:
    """The string by which a role connects that has the grants ("… TO" is added), and no others."""
    execute(url, f"DROP ROLE IF EXISTS {ROLE}", f"CREATE ROLE {ROLE} LOGIN PASSWORD 'x'")
    try:
        execute(url, *(f"{grant} {ROLE}" for grant in grants))
        yield make_conninfo(url, user=ROLE, password="x")
    finally:
        execute(url, f"DROP OWNED BY {ROLE}", f"DROP ROLE {ROLE}")


# Tables of others.

FOREIGN = [
    "CREATE TABLE public.users (id text PRIMARY KEY, email text, password_hash text, "
    "created_at timestamptz DEFAULT now())",
    "CREATE UNIQUE INDEX users_email_key ON public.users (email)",
    "INSERT INTO public.users VALUES ('u', 'Ann@Example.com', 'x')",
    "CREATE TABLE public.tasks (id serial, title text, user_id text REFERENCES public.users, "
    "idempotency_digest text)",
]


def in_public(url: str) -> list[list[tuple[Any, ...]]]:
    """The relations, functions and users there."""
    parts = [
        "SELECT oid, relname FROM pg_class WHERE relnamespace = 'public'::regnamespace ORDER BY 1",
        "SELECT oid, proname FROM pg_proc WHERE pronamespace = 'public'::regnamespace ORDER BY 1",
        "SELECT * FROM public.users",
    ]
    return [query(url, part) for part in parts]


@parametrize("search_path", ["public", "public, pg_catalog", "todo, public"])
def test_tables_of_another_application_stay_as_they_are(
    empty: str, tmp_path: Path, search_path: str
) -> None:
    execute(empty, *FOREIGN, "ALTER TABLE public.tasks DROP COLUMN idempotency_digest")
    execute(empty, f"ALTER DATABASE todo_many_test SET search_path = {search_path}")
    before = in_public(empty)
    with serving(empty, tmp_path / "log") as server, client(server, "u") as api:
        task = api.post("/tasks", json={"title": "x"}).raise_for_status().json()
        assert api.get("/tasks").json() == [task]
        assert api.get("/auth/me").json()["email"] is None
    assert in_public(empty) == before


def test_a_foreign_key_to_other_users_makes_no_tables_ours(empty: str) -> None:
    elsewhere = [each.replace("public.users", "auth.users") for each in FOREIGN]
    execute(empty, "CREATE SCHEMA auth", *elsewhere)
    execute(empty, FOREIGN[0])
    before = in_public(empty)
    prepared(empty)
    assert in_public(empty) == before


def test_defaults_that_open_public_to_everybody_do_not_open_the_service(empty: str) -> None:
    everything = "GRANT ALL ON TABLES TO"
    grants = [f"ALTER DEFAULT PRIVILEGES IN SCHEMA public {everything}"]
    grants += [f"ALTER DEFAULT PRIVILEGES {everything}", "GRANT USAGE ON SCHEMA public TO"]
    with role(empty, *grants) as anon:
        prepared(empty)
        for table in ("todo.users", "todo.tasks"):
            with pytest.raises(psycopg.errors.InsufficientPrivilege, match="schema todo"):
                query(anon, f"SELECT * FROM {table}")
    granted = "SELECT FROM pg_namespace, aclexplode(nspacl) WHERE nspname = 'todo' AND grantee = 0"
    assert query(empty, granted) == []


# Roles, and databases that are read-only.


@pytest.fixture
def by_hand(empty: str) -> str:
    """The string of a database whose schema was applied by hand."""
    execute(empty, SCHEMA.read_text())
    return empty


GRANTS = [USAGE := "GRANT USAGE ON SCHEMA todo TO", f"GRANT {DML} TO"]
RLS = [f"ALTER TABLE todo.{table} ENABLE ROW LEVEL SECURITY --" for table in ("users", "tasks")]


def lines_to_type(heading: str) -> list[str]:
    """The SQL that docs/DATABASES.md has below a heading, for the role of these tests."""
    text = (HERE / "docs/DATABASES.md").read_text().split(f"\n## {heading}\n")[1].split("\n## ")[0]
    lines = "".join(re.findall(r"```sql\n(.*?)```", text, re.DOTALL)).splitlines()
    typed = [re.sub("todo_(app|owner)", ROLE, line) for line in lines if "CREATE ROLE" not in line]
    assert typed
    return [f"{line} --" for line in typed]


def test_a_role_that_may_only_change_rows_starts_on_a_schema_applied_by_hand(
    by_hand: str, tmp_path: Path
) -> None:
    with (
        role(by_hand, *RLS, *lines_to_type("A role that may only change rows")) as url,
        serving(url, tmp_path / "log") as server,
        client(server) as api,
    ):
        task = api.post("/tasks", json={"title": "x"}).raise_for_status().json()
        assert api.get("/tasks").json() == [task]
        [message] = [line["message"] for line in server.log() if line["level"] == "WARNING"]
        assert message == "the schema was not applied: permission denied for schema todo"


def test_a_schema_that_may_not_be_applied_and_is_missing_is_one_line(empty: str) -> None:
    with role(empty) as url:
        line = refusal(url)
    assert '"todo.tasks" does not exist; the schema was not applied: permission denied' in line


def test_a_role_that_owns_the_schema_and_nothing_else_applies_it(empty: str) -> None:
    with role(empty, *lines_to_type("A database shared with others")) as url:
        prepared(url)
        assert query(url, "SELECT count(*) FROM todo.tasks") == [(0,)]


@parametrize(
    ("grants", "named"),
    [
        ([f"GRANT {DML} TO"], "SELECT_TASK (SELECT): permission denied for schema todo:"),
        ([USAGE], "SELECT_TASK (SELECT): permission denied for table tasks:"),
        ([*GRANTS, "REVOKE UPDATE ON todo.tasks FROM"], "(INSERT, UPDATE): permission denied for"),
        ([*GRANTS, "REVOKE DELETE ON todo.users FROM"], "DELETE_USER (DELETE): permission denied"),
        (
            [*GRANTS, "REVOKE EXECUTE ON FUNCTION todo.uuidv7() FROM public,"],
            "INSERT_TASK (INSERT, UPDATE): permission denied for function uuidv7:",
        ),
        ([*GRANTS, *RLS], "SELECT_TASK (SELECT): no policy for SELECT on todo.tasks:"),
        (
            [*GRANTS, *RLS, "CREATE POLICY reads ON todo.tasks FOR SELECT USING (true) --"],
            "INSERT_TASK (INSERT, UPDATE): no policy for INSERT on todo.tasks, UPDATE on todo",
        ),
    ],
)
def test_a_privilege_that_is_missing_stops_the_start_in_a_line_that_names_it(
    by_hand: str, grants: list[str], named: str
) -> None:
    with role(by_hand, *grants) as url:
        assert named in refusal(url)


def test_a_role_needs_no_privilege_that_no_statement_uses(by_hand: str) -> None:
    execute(by_hand, "CREATE FUNCTION todo.unused() RETURNS integer LANGUAGE sql RETURN 1")
    unused = ["REVOKE EXECUTE ON FUNCTION todo.unused() FROM public,"]
    unused += ["REVOKE UPDATE ON todo.users FROM", "GRANT UPDATE (password_hash) ON todo.users TO"]
    with role(by_hand, *GRANTS, *unused) as url:
        prepared(url)


def test_a_read_only_database_serves_reads(empty: str, tmp_path: Path) -> None:
    with serving(empty, tmp_path / "before") as server, client(server, "u") as api:
        task = api.post("/tasks", json={"title": "x"}).raise_for_status().json()
    execute(empty, "COMMENT ON TABLE todo.tasks IS 'of an older schema.sql'")
    execute(empty, "ALTER DATABASE todo_many_test SET default_transaction_read_only = on")
    with (
        role(make_conninfo(empty, options="-c default_transaction_read_only=off"), USAGE,
             "GRANT SELECT ON ALL TABLES IN SCHEMA todo TO") as url,
        serving(make_conninfo(url, options=""), tmp_path / "log") as server,
        client(server, "u") as api,
    ):  # fmt: skip
        assert api.get("/tasks").json() == [task]
        assert api.post("/tasks", json={"title": "y"}).status_code == 503


# What a start leaves behind.


def test_words_of_others_in_the_comment_that_lists_schemas_stay(empty: str) -> None:
    prepared(empty)
    execute(empty, r"COMMENT ON TABLE todo.tasks IS 'Ann''s, \ not to be dropped'")
    prepared(empty)
    words = query(empty, "SELECT obj_description('todo.tasks'::regclass)")[0][0]
    assert re.fullmatch(r"Ann's, \\ not to be dropped [0-9a-f]{64}", words)


@parametrize(
    "text", ["SELECT nothing FROM todo.tasks", "SELECT id FROM tasks", "SELECT 'x'::integer"]
)
def test_a_start_that_fails_leaves_the_database_as_it_was(empty: str, text: str) -> None:
    execute(empty, (HERE / "tests/schema_1_0.sql").read_text())
    before = in_public(empty)
    assert "release: WRONG: " in refusal(empty, Statement("WRONG", text))
    assert in_public(empty) == before
    assert query(empty, "SELECT to_regnamespace('todo')") == [(None,)]


@parametrize(
    ("index", "named"),
    [("users_email_unique", "INSERT_ACCOUNT"), ("tasks_idempotency_key", "INSERT_TASK")],
)
def test_an_index_that_somebody_dropped_stops_the_start_and_can_be_made_again(
    empty: str, index: str, named: str
) -> None:
    prepared(empty)
    execute(empty, f"DROP INDEX todo.{index}")
    assert f"release: {named}: " in refusal(empty)
    execute(empty, *(line.removesuffix("--") for line in lines_to_type("An index that is missing")))
    prepared(empty)


# Settings of a database.


@parametrize("encoding", ["SQL_ASCII", "LATIN1"])
def test_a_database_that_is_not_utf8_stops_the_start_with_a_line(empty: str, encoding: str) -> None:
    create = f"CREATE DATABASE todo_many_test ENCODING '{encoding}' TEMPLATE template0 LOCALE 'C'"
    execute(make_conninfo(empty, dbname="todo_test"), "DROP DATABASE todo_many_test", create)
    assert f"encoding {encoding}, it has to be UTF8" in refusal(empty)


HOSTILE = {
    "standard_conforming_strings": "off", "timezone": "'Asia/Kolkata'", "datestyle": "'German'",
    "intervalstyle": "'sql_standard'", "bytea_output": "'escape'", "extra_float_digits": "0",
    "default_transaction_isolation": "'serializable'", "search_path": "evil, pg_catalog",
    "check_function_bodies": "off", "quote_all_identifiers": "on", "xmlbinary": "hex",
}  # fmt: skip
EVIL = "CREATE FUNCTION evil.{}(text) RETURNS {} LANGUAGE sql RETURN {}"


def test_no_setting_of_the_database_changes_what_is_stored_or_answered(
    empty: str, tmp_path: Path
) -> None:
    evil = [("length", "integer", "0"), ("lower", "text", "'x'")]
    execute(empty, "CREATE SCHEMA evil", *(EVIL.format(*each) for each in evil))
    for name, value in HOSTILE.items():
        execute(empty, f"ALTER DATABASE todo_many_test SET {name} = {value}")
    with serving(empty, tmp_path / "log") as server, client(server) as api:
        task = api.post("/tasks", json={"title": r"a\n'b"}).raise_for_status().json()
        assert (task["title"], task["created_at"][-6:]) == (r"a\n'b", "+00:00")
        assert api.get("/tasks").json() == [api.get(f"/tasks/{task['id']}").json()] == [task]
    with pytest.raises(psycopg.errors.CheckViolation):
        execute(empty, "INSERT INTO todo.tasks (user_id, title) VALUES ('u', '  ')")


# DATABASE_URL.

WORKS = "postgresql://u:p%40@h:1/d"


@parametrize(
    "given",
    [
        f" {WORKS}\r\n", f"psql '{WORKS}'", f'psql "{WORKS}"', f"DATABASE_URL={WORKS}",
        f"export DATABASE_URL='{WORKS}';", f"\ufeff{WORKS}", f"DATABASE_URL={WORKS} ;",
        WORKS.replace("postgresql", "postgres"), WORKS.replace("postgresql", "postgresql+asyncpg"),
        WORKS.replace("postgresql", "postgresql+psycopg"),
        "jdbc:postgresql://h:1/d?user=u&password=p%40",
        f"{WORKS}?schema=public&pgbouncer=true&connection_limit=1&pool_timeout=0&socket_timeout=9",
        f"{WORKS}?prepared_statement_cache_size=0&command_timeout=5", f"{WORKS}?conn_max_age=600",
        f"{WORKS}?uselibpqcompat=true&max=20&idleTimeoutMillis=1&statement_timeout=1", f"{WORKS}?",
        f"{WORKS}?supa=base-pooler.x&pool_size=5&max_overflow=2", f"{WORKS}?client_encoding=latin1",
        "host=h port=1 dbname=d user=u password='p@'", "jdbc:postgresql://h:1/d?password=p@&user=u",
        f"{WORKS}?ssl=True", f"{WORKS}?schema=&sslmod=", f"{WORKS}?connect_timeout=-1",
        rf"{WORKS}?options=-c search_path=todo,\ public&search_path=todo,%20public",
    ],
)  # fmt: skip
def test_a_database_url_is_taken_as_people_have_it(given: str) -> None:
    found = conninfo_to_dict(connection_string(given, "todo"))
    wanted = {"host": "h", "port": "1", "dbname": "d", "user": "u", "password": "p@"}
    assert {name: found.get(name) for name in wanted} == wanted
    assert found["client_encoding"] == "utf8"


def test_a_name_in_a_database_url_may_have_what_is_written_as_a_number() -> None:
    given = conninfo_to_dict(connection_string("postgresql://a%26b:p@h/c%3Bd", "todo"))
    assert (given["user"], given["dbname"]) == ("a&b", "c;d")


@parametrize("password", ["p&schema=x", "[k3]", "<>", "a;", "a://b", "';"])
def test_a_password_that_reads_like_something_else_is_a_password(password: str) -> None:
    uri = f"postgresql://u:{quote(password, '')}@your-password.example/d"
    for given in (uri, make_conninfo(host="your-password.example", password=password)):
        assert conninfo_to_dict(connection_string(given, "todo"))["password"] == password


@parametrize(
    ("other", "libpqs", "wanted"),
    [
        ("ssl=true", "sslmode=verify-full", "verify-full"),
        ("ssl=0", "sslmode=verify-full", "verify-full"), ("ssl=0", "sslmode=", "disable"),
        ("ssl=true", "sslmode=", "require"),
    ],
)  # fmt: skip
def test_another_drivers_word_for_tls_does_not_weaken_sslmode(
    other: str, libpqs: str, wanted: str
) -> None:
    for query in (f"{libpqs}&{other}", f"{other}&{libpqs}"):
        found = conninfo_to_dict(connection_string(f"{WORKS}?{query}", "todo"))
        assert found["sslmode"] == wanted


OTHER_FORMS = [
    "host=h;port=1;password=hunter2", "sslmode=require;password=hunter2", "user=u;password=hunter2",
    "jdbc:postgresql://h/d;user=u;password=hunter2", "postgresql://h/d&user=u&password=hunter2",
]  # fmt: skip


@parametrize(
    ("given", "named"),
    [
        ("postgresql://u:hun@ter2@h/d", "%40"), ("postgresql://u:hun/ter2@h/d", "%2F"),
        ("postgresql://u:a/b?hunter2=c@h/d", "%2F"),
        ("postgresql://u:100%hunter2@h/d", "%25"), ("postgresql://u:hun ter2@h/d", "form"),
        ("postgresql://u:%ffhunter2@h/d", "%25"),
        ("u:hunter2@h/d", "form"), ("hunter2", "form"), ("mysql://u:hunter2@h/d", "PostgreSQL"),
        ("https://hunter2.supabase.co", "PostgreSQL"),
        ("postgresql://u:p@h:hunter2/d", "port"),
        (f"{WORKS}?Schema=other", "schema other"), (f"{WORKS}?search_path=other", "schema other"),
        (f"{WORKS}?sslmod=x", "sslmod"), (f"{WORKS}?ssl_min_version=x", "ssl_min_version"),
        (f"{WORKS}?password=ab&hunter2", "%26"), (f"{WORKS}?password=ab&hunter2=c", "%26"),
        *((each, "follow a ?") for each in OTHER_FORMS),
        ("  ", "not set"), ("''", "not set"),
    ],
)  # fmt: skip
def test_a_database_url_that_cannot_be_heeded_stops_the_start(given: str, named: str) -> None:
    with pytest.raises(SystemExit) as raised:
        connection_string(given, "todo")
    [line] = str(raised.value).splitlines()
    assert named in line
    assert "ter2" not in line


# What waiting does not cure.


def fake_server(sqlstate: str, message: str, tls: bytes = b"N") -> str:
    """Refuses each connection with an error as PostgreSQL writes it. Gives its address.

    `tls` is its answer to a request for TLS: N refuses it, S agrees.
    """
    fields = ["S" + "ВАЖНО", "VFATAL", f"C{sqlstate}", f"M{message}", "Da", "Hb", "", ""]
    error = "\0".join(fields).encode()
    listener = socket.create_server(("127.0.0.1", 0))

    def refuse() -> None:
        while True:
            connection, _ = listener.accept()
            with connection:
                while (size := connection.recv(4)) == struct.pack("!i", 8):
                    connection.recv(4)
                    connection.sendall(tls)
                if size:
                    connection.recv(struct.unpack("!i", size)[0] - 4)
                    connection.sendall(b"E" + struct.pack("!i", len(error) + 4) + error)

    threading.Thread(target=refuse, daemon=True).start()
    return f"postgresql://u:hunter2@127.0.0.1:{listener.getsockname()[1]}/d"


@parametrize("sqlstate", ["28P01", "28000", "3D000", "42501", "55000"])
def test_an_error_that_waiting_does_not_cure_ends_the_start_in_any_language(sqlstate: str) -> None:
    line = refusal(fake_server(sqlstate, "доступ запрещён"))
    assert line.startswith("DATABASE_URL does not work, correct it: ")  # at once
    assert line.endswith("ВАЖНО:  доступ запрещён")


def test_the_line_that_ends_the_start_is_of_the_attempt_that_cannot_be_cured() -> None:
    earlier = psycopg.OperationalError("connection refused")
    with pytest.raises(NotReady, match=r"wrong password$"):
        asyncio.run(explain(earlier, fake_server("28P01", "wrong password")))


@parametrize("host", ["", "certificate-not-known.invalid"])
def test_an_error_that_waiting_cures_is_waited_for(
    monkeypatch: pytest.MonkeyPatch, host: str
) -> None:
    monkeypatch.setattr(prepare, "STARTUP_TIMEOUT", 2.0)
    url = fake_server("57P03", "система баз данных запускается")
    line = refusal(f"postgresql://u@{host}/d" if host else url)
    assert line.startswith("not ready after 2 seconds: DATABASE_URL does not work: ")
    assert host in line


def test_the_line_of_a_database_is_its_error_and_not_a_detail(empty: str) -> None:
    execute(empty, "REVOKE CONNECT ON DATABASE todo_many_test FROM public")
    with role(empty) as url:
        assert refusal(url).endswith('permission denied for database "todo_many_test"')


@parametrize(
    ("tls", "parameters", "words"),
    [
        (b"S", "sslmode=verify-full&sslrootcert=/nowhere", 'file "/nowhere" does not exist'),
        (b"N", "sslmode=require", "server does not support SSL"),
        (b"N", "sslmode=wrong", "invalid sslmode value"),
        (b"N", "port=1,2", "could not match 2 port numbers to 1 hosts"),
    ],
)
def test_parameters_that_cannot_work_end_the_start_at_once(
    tls: bytes, parameters: str, words: str
) -> None:
    line = refusal(f"{fake_server('57P03', 'x', tls)}?{parameters}")
    assert line.startswith("DATABASE_URL does not work, correct it: ")  # at once
    assert words in line


# The start has one bound.


def test_a_role_with_one_connection_can_start(by_hand: str, tmp_path: Path) -> None:
    limit = f"ALTER ROLE {ROLE} CONNECTION LIMIT 1 --"
    with (
        role(by_hand, *GRANTS, limit) as url,
        serving(url, tmp_path / "log") as server,
        client(server) as api,
    ):
        assert api.post("/tasks", json={"title": "x"}).status_code == 201
        assert len(api.get("/tasks").json()) == 1


@needs_pgbouncer
def test_a_pooler_with_one_server_connection_can_start(database: str, tmp_path: Path) -> None:
    with pgbouncer(database, tmp_path, tracks=0, size=1) as url:
        for n in range(2):  # the first start leaves nothing behind that stops the second
            with serving(url, tmp_path / f"{n}") as server, client(server) as api:
                assert api.post("/tasks", json={"title": "x"}).status_code == 201


@pytest.mark.slow
@needs_pgbouncer
def test_a_pooler_without_a_free_connection_is_named_and_not_waited_for_longer(
    database: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    monkeypatch.setattr(prepare, "STARTUP_TIMEOUT", 5.0)
    with pgbouncer(database, tmp_path, tracks=0, size=1) as url, psycopg.connect(url) as other:
        other.execute("SELECT 1")
        begun = monotonic()
        assert "a pooler without a free connection" in refusal(url)
        assert monotonic() - begun < 20
    [message] = [record.message for record in caplog.records if record.name == "postgres"]
    assert "a pooler without a free connection" in message


def test_a_lock_that_nobody_releases_ends_the_start(
    by_hand: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepare, "STARTUP_TIMEOUT", 1.0)
    with psycopg.connect(by_hand) as other:
        other.execute("LOCK TABLE todo.tasks")
        line = refusal(by_hand)
    assert line.startswith("not ready after 1 seconds: the start waits for a lock")


@parametrize(
    ("sqlstate", "said"),
    [
        ("40P01", "not ready after 1 seconds: it happened"),
        ("23514", "the schema is being applied: it happened"),
    ],
)
def test_a_migration_that_fails_is_told_as_what_happened(
    empty: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sqlstate: str, said: str
) -> None:
    monkeypatch.setattr(prepare, "STARTUP_TIMEOUT", 1.0)
    schema = tmp_path / "schema.sql"
    error = f"RAISE 'it happened' USING ERRCODE = '{sqlstate}', DETAIL = 'in detail'"
    schema.write_text(f"{SCHEMA.read_text()}DO $$ BEGIN {error}; END $$;")
    assert refusal(empty, schema=schema) == said


@pytest.mark.slow
def test_a_migration_takes_the_time_that_it_takes(
    empty: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    monkeypatch.setattr(prepare, "STARTUP_TIMEOUT", 3.0)
    execute(empty, "ALTER DATABASE todo_many_test SET statement_timeout = '2s'")
    schema = tmp_path / "schema.sql"
    interval = "current_setting('client_connection_check_interval')"  # it ends with its process
    more = f"SELECT pg_sleep(4), 1 / ({interval} = '2s')::integer;"
    schema.write_text(SCHEMA.read_text() + more)
    prepared(empty, schema=schema)
    assert caplog.messages == ["the schema is being applied", "schema applied"]


@parametrize(
    ("options", "words"),
    [("-c timezone=Asia/Tokyo", "the time zone Asia/Tokyo"), ("-c datestyle=German", "German")],
)
def test_a_session_that_would_write_times_in_another_way_ends_the_start(
    database: str, options: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("PGTZ", "PGDATESTYLE"):  # libpq prefers them, and a pooler does not know them
        monkeypatch.delenv(name, raising=False)

    async def check() -> None:
        async with await psycopg.AsyncConnection.connect(database, options=options) as connection:
            await checks.check_session(connection, database)

    with pytest.raises(NotReady, match=words):
        asyncio.run(check())
