"""What schema.sql promises: each constraint refuses, whoever writes.

Nothing here goes through the service, whose own checks come first.
"""

import asyncio
import tempfile
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path
from typing import Any

import psycopg
import pytest
from httpx import Client
from psycopg import Connection, sql
from psycopg.conninfo import make_conninfo

from conftest import HERE, Task
from lib.prepare import prepare_database

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
    query = statement.format(sql.Identifier("todo", table), columns, values)
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
    connection.execute("DELETE FROM todo.users WHERE id = 'u'")
    assert connection.execute("SELECT count(*) FROM todo.tasks").fetchone() == (0,)


def test_pages_keep_room_so_that_updates_touch_no_index(connection: Connection) -> None:
    found = connection.execute("SELECT reloptions FROM pg_class WHERE relname = 'tasks'").fetchone()
    assert found == (["fillfactor=90"],)


def test_tasks_have_no_index_but_the_two_that_are_needed(connection: Connection) -> None:
    found = connection.execute("SELECT indexname FROM pg_indexes WHERE tablename = 'tasks'")
    assert {name for (name,) in found} == {"tasks_pkey", "tasks_idempotency_key"}


ACCOUNTS_OF_1_0 = [
    "Ann@Example.com", "\u0130x@example.com", "\xc9lan@example.com", "\xc9\xc8@x", "\xe9\xe8@x"
]  # fmt: skip


def test_e_mails_of_an_earlier_release_get_their_one_spelling_in_any_locale(postgres: str) -> None:
    with psycopg.connect(postgres, autocommit=True) as connection:
        connection.execute("DROP DATABASE IF EXISTS todo_locale_test")
        connection.execute("CREATE DATABASE todo_locale_test TEMPLATE template0 LOCALE 'C'")
    with psycopg.connect(make_conninfo(postgres, dbname="todo_locale_test")) as connection:
        connection.execute((HERE / "tests/schema_1_0.sql").read_bytes())
        query = "INSERT INTO users (email, password_hash) SELECT unnest(%s::text[]), ''"
        connection.execute(query, [ACCOUNTS_OF_1_0])
        connection.execute(SCHEMA)
        found = connection.execute("SELECT email FROM todo.users").fetchall()
    spellings = {email.lower() for email in ACCOUNTS_OF_1_0}
    assert {email for (email,) in found} == spellings | {"\xc9\xc8@x"}  # whose spelling is taken


# How it is applied.


def applied(url: str, schema: bytes = SCHEMA) -> None:
    with tempfile.NamedTemporaryFile() as file:
        Path(file.name).write_bytes(schema)
        asyncio.run(prepare_database(url, Path(file.name), "todo.tasks", []))


def test_of_many_that_start_together_one_applies_it_and_none_fails(
    empty: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    for n in range(3):
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda _, n=n: applied(empty, SCHEMA + b"-- %d" % n), range(8)))
        assert caplog.messages.count("schema applied") == n + 1


TABLES = "('todo.users'::regclass, 'todo.tasks'::regclass)"
SHAPE = [
    f"""
    SELECT attrelid::regclass::text, attname, format_type(atttypid, atttypmod), attnotnull,
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


def test_tables_of_an_earlier_release_move_and_get_the_shape_of_fresh_ones(empty: str) -> None:
    with psycopg.connect(empty) as connection:
        connection.execute((HERE / "tests/schema_1_0.sql").read_bytes())
        connection.execute("COMMENT ON TABLE public.tasks IS 'of 1.0'")
        connection.execute("INSERT INTO public.users (id) VALUES ('u')")
        connection.execute("INSERT INTO public.tasks (user_id, title) VALUES ('u', 'Buy milk')")
    applied(empty)
    moved = shape(empty)
    with psycopg.connect(empty) as connection:
        assert connection.execute("SELECT title FROM todo.tasks").fetchone() == ("Buy milk",)
        assert connection.execute("SELECT to_regclass('public.users')").fetchone() == (None,)
        connection.execute("DROP SCHEMA todo CASCADE")
    applied(empty)
    assert moved == shape(empty)
    assert len(moved) > 20


def test_updated_at_never_goes_back_while_the_version_advances(
    database: str, api: Client, task: Task
) -> None:
    later = "UPDATE todo.tasks SET updated_at = clock_timestamp() WHERE id = %s "
    later += "RETURNING updated_at"
    with psycopg.connect(database) as other, ThreadPoolExecutor(2) as pool:
        other.execute("SELECT 1 FROM todo.tasks WHERE id = %s FOR UPDATE", [task["id"]])
        waiting = [
            pool.submit(api.patch, f"/tasks/{task['id']}/toggle"),
            pool.submit(api.patch, f"/tasks/{task['id']}", json={"title": "x"}),
        ]
        time.sleep(0.5)  # their transactions have begun, and with them now()
        [(written,)] = other.execute(later, [task["id"]]).fetchall()
        other.commit()
        times = [call.result().json()["updated_at"] for call in waiting]
    assert min(datetime.fromisoformat(each) for each in times) >= written
