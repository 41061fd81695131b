"""What the service does at its start, beside what the specification says of it."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psycopg
import pytest
from psycopg.conninfo import make_conninfo

from conftest import HERE, client, serving, start, wait_until

ROLE = "todo_dml_test"  # may read and write rows, and nothing else


@pytest.fixture
def by_hand(empty: str) -> Iterator[str]:
    """The string by which that role connects to a database whose schema was applied by hand."""
    with psycopg.connect(empty, autocommit=True) as owner:
        owner.execute((HERE / "schema.sql").read_bytes())
        owner.execute(f"DROP ROLE IF EXISTS {ROLE}")
        owner.execute(f"CREATE ROLE {ROLE} LOGIN PASSWORD 'x'")
        rights = "SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA todo"
        owner.execute(f"GRANT {rights} TO {ROLE}")
        owner.execute(f"GRANT USAGE ON SCHEMA todo TO {ROLE}")
        yield make_conninfo(empty, user=ROLE, password="x")
        owner.execute(f"DROP OWNED BY {ROLE}")
        owner.execute(f"DROP ROLE {ROLE}")


def test_a_role_that_may_only_change_rows_starts_on_a_schema_applied_by_hand(
    by_hand: str, tmp_path: Path
) -> None:
    with serving(by_hand, tmp_path / "log") as server, client(server) as api:
        task = api.post("/tasks", json={"title": "x"}).raise_for_status().json()
        path = f"/tasks/{task['id']}"
        assert api.patch(path, json={"completed": True}).json()["completed"] is True
        assert api.get("/tasks").json() == [api.get(path).json()]
        assert api.delete(path).status_code == 200
        messages = [line["message"] for line in server.log() if line.get("logger") == "postgres"]
        assert messages == ["the schema was not applied: this role may not change tables"]


def test_without_the_schema_that_role_is_told_in_one_line(empty: str, by_hand: str) -> None:
    with psycopg.connect(empty, autocommit=True) as owner:
        owner.execute("DROP TABLE todo.tasks")
    ended = start(by_hand)
    assert ended.returncode == 1
    assert "the schema does not fit this release" in ended.stdout
    assert "Traceback" not in ended.stdout + ended.stderr


def test_prismas_parameters_are_tolerated(empty: str, tmp_path: Path) -> None:
    url = "postgresql://{user}@/{dbname}?host={host}&pgbouncer=true&connection_limit=1"
    parts = psycopg.conninfo.conninfo_to_dict(empty)
    given = url.format(user=parts["user"], dbname=parts["dbname"], host=parts["host"])
    if parts.get("password") or not str(parts["host"]).startswith("/"):
        pytest.skip("this is for the PostgreSQL that the tests bring along")
    with serving(given, tmp_path / "log") as server, client(server) as api:
        assert api.get("/tasks").json() == []


def test_a_lock_on_a_table_is_waited_for_and_logged(empty: str, tmp_path: Path) -> None:
    def boot() -> bool:
        with serving(empty, log):
            return True

    log = tmp_path / "log"
    with psycopg.connect(empty) as owner, ThreadPoolExecutor(1) as thread:
        owner.execute((HERE / "schema.sql").read_bytes())
        owner.commit()
        owner.execute("LOCK TABLE todo.tasks")
        booted = thread.submit(boot)
        wait_until(lambda: log.exists() and "waits for a lock" in log.read_text(), 20)
        owner.rollback()
        assert booted.result()
    assert "schema applied" in log.read_text()
