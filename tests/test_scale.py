"""What a statement on tasks reads, however many tasks there are: few pages, on Citus of one shard.

`python tests/citus.py --bin DIR` starts a Citus for TEST_DATABASE_URL.
"""

import re
from collections.abc import Iterator

import psycopg
import pytest

import db
from conftest import HERE, NOBODYS_ID, has_citus
from pgpipeline import Statement

parametrize = pytest.mark.parametrize
OF_TASKS = [
    db.SELECT_TASK, db.SELECT_TASKS, db.INSERT_TASK, db.UPDATE_TASK, db.TOGGLE_TASK, db.DELETE_TASK
]  # fmt: skip
VALUES = dict.fromkeys([name for each in OF_TASKS for name in each.parameters])
VALUES |= {"user_id": "many", "task_id": NOBODYS_ID, "title": "x", "limit": 100, "offset": 0}
VALUES |= {name: True for name in VALUES if name.startswith("sets_")} | {"completed": False}
INSERT_USERS = "INSERT INTO todo.users (id) SELECT 'many' || n FROM generate_series(0, 100) AS n"
# One user has 10,000 tasks, a hundred have as many together, and many0 has none. They lie mixed.
INSERT_TASKS = """
INSERT INTO todo.tasks (user_id, title)
SELECT 'many' || CASE n % 2 WHEN 1 THEN '' ELSE (n / 2 % 100 + 1)::text END, 'Buy milk'
FROM generate_series(1, 20000) AS n
"""
LAST_PAGE = "SELECT id FROM todo.tasks WHERE user_id = 'many' ORDER BY id LIMIT 1 OFFSET 100"


@pytest.fixture(scope="module")
def connection(database: str) -> Iterator[psycopg.Connection]:
    """A connection to a database with 20,000 tasks."""
    with psycopg.connect(database, autocommit=True) as connection:
        connection.execute((HERE / "schema.sql").read_bytes())
        connection.execute("INSERT INTO todo.users (id) VALUES ('many')")
        connection.execute(INSERT_USERS)
        connection.execute(INSERT_TASKS)
        connection.execute("VACUUM ANALYZE todo.tasks")
        yield connection
        connection.execute("DELETE FROM todo.users WHERE id LIKE 'many%'")


def literals(statement: Statement, **given: object) -> list[str]:
    values = [(VALUES | given)[name] for name in statement.parameters]
    return ["NULL" if value is None else f"'{value}'" for value in values]


def pages_read(connection: psycopg.Connection, statement: Statement, values: list[str]) -> int:
    """How many pages the prepared statement reads. It is executed, and undone."""
    run = f"EXPLAIN (ANALYZE, BUFFERS) EXECUTE it ({', '.join(values)})"
    with connection.transaction(force_rollback=True):
        connection.execute(b"PREPARE it AS " + statement.text)
        plan = "\n".join(line for (line,) in connection.execute(run.encode()))
        connection.execute("DEALLOCATE it")
    read = re.findall("Buffers: shared (.*)", plan)[0]  # by the whole of it
    return sum(map(int, re.findall(r"(?:hit|read)=(\d+)", read)))


@parametrize("mode", ["force_generic_plan", "force_custom_plan"])
@parametrize("statement", OF_TASKS, ids=lambda statement: statement.name)
def test_a_statement_on_tasks_reads_few_pages_of_many(
    connection: psycopg.Connection, statement: Statement, mode: str
) -> None:
    if has_citus(connection):
        pytest.skip("shards have the pages")
    connection.execute(f"SET plan_cache_mode = {mode}".encode())
    [(last,)] = connection.execute(LAST_PAGE).fetchall()
    for given in ({}, {"after": last}, {"user_id": "many0"}):  # pages 1 and 100, and none
        assert pages_read(connection, statement, literals(statement, **given)) < 20


@parametrize("statement", OF_TASKS, ids=lambda statement: statement.name)
def test_a_statement_on_tasks_runs_on_one_shard(
    connection: psycopg.Connection, statement: Statement
) -> None:
    if not has_citus(connection):
        pytest.skip("the database has no Citus")
    values = literals(statement)
    text = re.sub(r"\$(\d+)", lambda n: values[int(n[1]) - 1], statement.text.decode())
    plan = connection.execute(f"EXPLAIN {text}".encode()).fetchall()
    assert "Task Count: 1" in "\n".join(line for (line,) in plan)
