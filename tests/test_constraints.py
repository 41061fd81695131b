"""What schema.sql promises: each constraint refuses, whoever writes.

Nothing here goes through the service, whose own checks come first.
"""

import asyncio
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any

import psycopg
import pytest
from psycopg import Connection, sql
from psycopg.conninfo import make_conninfo

from conftest import HERE
from lib.pipeline import Statement
from lib.postgres import NotReady, apply_schema, prepare_database

parametrize = pytest.mark.parametrize
SCHEMA = (HERE / "schema.sql").read_bytes()
TASK = {"user_id": "u", "title": "Buy milk"}
ACCOUNT = {"email": "ann@example.com", "password_hash": "$2b$12$"}

# The table, what is wrong with a row of it, and the constraint that says so.
WRONG: list[tuple[str, dict[str, Any], str]] = [
    ("users", {"id": "u"}, "users_pkey"),
    ("users", {"id": ""}, "users_id_length"),
    ("users", {"id": "x" * 256}, "users_id_length"),
    ("users", ACCOUNT | {"email": "ab"}, "users_email_length"),
    ("users", ACCOUNT | {"email": "x" * 255}, "users_email_length"),
    ("users", ACCOUNT | {"password_hash": None}, "users_account_is_whole"),
    ("users", ACCOUNT | {"email": None}, "users_account_is_whole"),
    ("users", ACCOUNT | {"email": "one@example.com"}, "users_email_unique"),
    ("tasks", TASK | {"id": uuid.UUID(int=1)}, "tasks_pkey"),
    ("tasks", TASK | {"user_id": "nobody"}, "tasks_user_id_fkey"),
    ("tasks", TASK | {"title": ""}, "tasks_title_length"),
    ("tasks", TASK | {"title": "x" * 501}, "tasks_title_length"),
    ("tasks", TASK | {"title": " \t\n"}, "tasks_title_not_blank"),
    ("tasks", TASK | {"description": "x" * 5001}, "tasks_description_length"),
    ("tasks", TASK | {"idempotency_key": "k"}, "tasks_idempotency_key"),
]
RIGHT: list[tuple[str, dict[str, Any]]] = [
    ("users", {"id": "x" * 255}),
    ("users", ACCOUNT | {"email": "x" * 254}),
    ("tasks", TASK | {"title": "\U0001f9c0" * 500, "description": "\U0001f9c0" * 5000}),
    ("tasks", TASK | {"user_id": "other", "id": uuid.UUID(int=1), "idempotency_key": "k"}),
]


@pytest.fixture
def connection(empty: str) -> Iterator[Connection]:
    """A database to which the schema is applied, with two users and a task, in a transaction."""
    with psycopg.connect(empty) as connection:
        connection.execute(SCHEMA)
        insert(connection, "users", {"id": "u"})
        insert(connection, "users", {"id": "other"} | ACCOUNT | {"email": "one@example.com"})
        insert(connection, "tasks", TASK | {"id": uuid.UUID(int=1), "idempotency_key": "k"})
        yield connection
        connection.rollback()


def insert(connection: Connection, table: str, row: dict[str, Any]) -> tuple[Any, ...]:
    columns = sql.SQL(", ").join(map(sql.Identifier, row))
    values = sql.SQL(", ").join(map(sql.Placeholder, row))
    statement = sql.SQL("INSERT INTO {} ({}) VALUES ({}) RETURNING *")
    query = statement.format(sql.Identifier(table), columns, values)
    return connection.execute(query, row).fetchone() or ()


@parametrize(("table", "row", "constraint"), WRONG)
def test_a_row_against_a_constraint_is_refused_by_its_name(
    connection: Connection, table: str, row: dict[str, Any], constraint: str
) -> None:
    with pytest.raises(psycopg.errors.IntegrityError) as raised:
        insert(connection, table, row)
    assert raised.value.diag.constraint_name == constraint


@parametrize(("table", "row"), RIGHT)
def test_the_largest_row_is_stored(connection: Connection, table: str, row: dict[str, Any]) -> None:
    assert insert(connection, table, row)


@parametrize(
    ("table", "column"),
    [("tasks", name) for name in ("title", "completed", "version", "created_at", "updated_at")],
)
def test_a_column_that_every_answer_shows_is_never_null(
    connection: Connection, table: str, column: str
) -> None:
    with pytest.raises(psycopg.errors.NotNullViolation):
        insert(connection, table, TASK | {column: None})


def test_a_users_tasks_go_with_the_user(connection: Connection) -> None:
    connection.execute("DELETE FROM users WHERE id = 'u'")
    assert connection.execute("SELECT count(*) FROM tasks").fetchone() == (0,)


def test_pages_keep_room_so_that_updates_touch_no_index(connection: Connection) -> None:
    found = connection.execute("SELECT reloptions FROM pg_class WHERE relname = 'tasks'").fetchone()
    assert found == (["fillfactor=90"],)


def test_tasks_have_no_index_but_the_two_that_are_needed(connection: Connection) -> None:
    found = connection.execute("SELECT indexname FROM pg_indexes WHERE tablename = 'tasks'")
    assert {name for (name,) in found} == {"tasks_pkey", "tasks_idempotency_key"}


def test_ids_rise_within_a_millisecond_also_where_postgresql_has_no_uuidv7(
    connection: Connection,
) -> None:
    text = SCHEMA.decode().replace("uuidv7", "our_uuidv7")
    connection.execute((text.split("$block$;")[0] + "$block$;").encode())
    rows = connection.execute("SELECT our_uuidv7() FROM generate_series(1, 1000)").fetchall()
    times = [row[0].bytes[:8] for row in rows]
    assert times == sorted(times)
    assert len(set(times)) > 100  # and not only one or two in each millisecond


def test_e_mails_of_an_earlier_release_get_their_one_spelling(connection: Connection) -> None:
    connection.execute("CREATE UNIQUE INDEX users_email_key ON users (lower(email))")
    insert(connection, "users", ACCOUNT | {"email": "Ann@Example.com"})
    connection.execute(SCHEMA)
    found = connection.execute("SELECT email FROM users WHERE email LIKE 'ann@%'").fetchone()
    assert found == ("ann@example.com",)


# How it is applied.


def applied(url: str, schema: bytes = SCHEMA) -> None:
    asyncio.run(apply_schema(url, schema, "tasks"))


def test_of_many_that_start_together_one_applies_it_and_none_fails(
    empty: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    for n in range(3):
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda _, n=n: applied(empty, SCHEMA + b"-- %d" % n), range(8)))
        assert caplog.messages.count("schema applied") == n + 1


TABLES = "('users'::regclass, 'tasks'::regclass)"
SHAPE = [
    f"""
    SELECT
        attrelid::regclass::text,
        attname,
        format_type(atttypid, atttypmod),
        attnotnull,
        pg_get_expr(adbin, adrelid)
    FROM pg_attribute
    LEFT JOIN pg_attrdef ON adrelid = attrelid AND adnum = attnum
    WHERE attrelid IN {TABLES} AND attnum > 0 AND NOT attisdropped
    """,
    f"""
    SELECT conrelid::regclass::text, conname, pg_get_constraintdef(oid), convalidated
    FROM pg_constraint
    WHERE conrelid IN {TABLES}
    """,
    f"SELECT pg_get_indexdef(indexrelid), indisvalid FROM pg_index WHERE indrelid IN {TABLES}",
    f"SELECT relname, reloptions::text FROM pg_class WHERE oid IN {TABLES}",
]


def shape(url: str) -> set[tuple[Any, ...]]:
    """The columns, constraints, indexes and settings of both tables. Columns have no order."""
    with psycopg.connect(url) as connection:
        return {row for text in SHAPE for row in connection.execute(text.encode())}


def test_a_database_of_an_earlier_release_gets_the_shape_of_a_fresh_one(empty: str) -> None:
    applied(empty, (HERE / "tests/schema_1_0.sql").read_bytes())
    earlier = shape(empty)
    with psycopg.connect(empty) as connection:
        insert(connection, "users", ACCOUNT | {"id": "u"})
        insert(connection, "tasks", TASK)
    applied(empty)
    changed = shape(empty)
    with psycopg.connect(empty) as connection:
        assert connection.execute("SELECT title FROM tasks").fetchone() == ("Buy milk",)
        connection.execute("DROP TABLE tasks, users")
    applied(empty)
    assert changed == shape(empty)
    assert changed != earlier  # or this has compared nothing
    assert len(changed) > 20


def test_a_schema_that_waits_for_a_lock_gives_others_their_turn(empty: str) -> None:
    applied(empty)
    with psycopg.connect(empty) as other:
        other.execute("SELECT 1 FROM tasks, users")
        change = SCHEMA + b"ALTER TABLE tasks ADD due_date date;"
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(applied, empty, change)
            wait([waiting], timeout=4)
            other.rollback()
            error = waiting.exception()
    assert isinstance(error, psycopg.errors.LockNotAvailable)


def test_a_role_without_the_right_to_change_tables_can_start(empty: str) -> None:
    applied(empty)
    with psycopg.connect(empty) as connection:
        connection.execute("DROP ROLE IF EXISTS clerk; CREATE ROLE clerk LOGIN")
        connection.execute("GRANT SELECT, INSERT, UPDATE, DELETE ON users, tasks TO clerk")
    try:
        applied(make_conninfo(empty, user="clerk"), SCHEMA + b"-- later")
    finally:
        with psycopg.connect(empty) as connection:
            connection.execute("DROP OWNED BY clerk; DROP ROLE clerk")


def test_a_statement_that_does_not_fit_the_schema_stops_the_start_in_one_line(empty: str) -> None:
    wrong = Statement("WRONG", "SELECT nothing FROM tasks")
    with pytest.raises(NotReady, match="WRONG: column"):
        asyncio.run(prepare_database(empty, HERE / "schema.sql", "tasks", [wrong]))
