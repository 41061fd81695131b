"""What holds on Citus: `python tests/citus.py --bin DIR` starts one for TEST_DATABASE_URL."""

import re

import psycopg
import pytest

import db
from conftest import NOBODYS_ID, has_citus
from pgpipeline import Statement

OF_TASKS = [
    db.SELECT_TASK, db.SELECT_TASKS, db.INSERT_TASK, db.UPDATE_TASK, db.TOGGLE_TASK, db.DELETE_TASK
]  # fmt: skip
VALUES = dict.fromkeys([name for each in OF_TASKS for name in each.parameters])
VALUES |= {"user_id": "u", "task_id": NOBODYS_ID, "title": "x", "limit": 10, "offset": 0}
VALUES |= {name: True for name in VALUES if name.startswith("sets_")} | {"completed": True}


@pytest.mark.parametrize("statement", OF_TASKS, ids=lambda statement: statement.name)
def test_a_statement_on_tasks_runs_on_one_shard(database: str, statement: Statement) -> None:
    names = statement.parameters
    text = re.sub(r"\$(\d+)", lambda n: f"%({names[int(n[1]) - 1]})s", statement.text.decode())
    with psycopg.connect(database, cursor_factory=psycopg.ClientCursor) as connection:
        if not has_citus(connection):
            pytest.skip("the database has no Citus")
        plan = connection.execute(f"EXPLAIN {text}".encode(), VALUES).fetchall()
    assert "Task Count: 1" in "\n".join(line for (line,) in plan)
