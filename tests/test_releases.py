"""From one release to the next: schema changes while the service is used."""

import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from threading import Event

import psycopg
import pytest
from httpx import Client

from conftest import (
    Server,
    client,
    copy_service,
    environment,
    free_port,
    serving,
    started,
    uvicorn,
    wait_for_start,
    wait_until,
)

TITLE = {"title": "x"}


COLUMN = "    description text,\n"


def next_release(folder: Path, *changes: str) -> None:
    """Copies the service with one more column, made by CREATE TABLE, and these changes."""
    copy_service(folder)
    schema, code = folder / "schema.sql", folder / "db.py"
    text = schema.read_text()
    assert COLUMN in text
    schema.write_text("\n".join([text.replace(COLUMN, COLUMN + "    due date,\n"), *changes]))
    shown = '"completed AS is_completed"'
    assert shown in code.read_text()
    code.write_text(code.read_text().replace(shown, f'"due", {shown}'))


def test_a_column_that_existing_tables_lack_stops_the_start_with_one_line(
    empty: str, tmp_path: Path
) -> None:
    with serving(empty, tmp_path / "old"):
        pass
    next_release(tmp_path / "next")
    log = tmp_path / "log"
    with started(uvicorn(free_port()), log, environment(empty), tmp_path / "next") as process:
        assert process.wait(60) == 1
    last = json.loads(log.read_text().splitlines()[-1])
    assert last["message"].startswith("the schema does not fit this release: ")
    assert 'column "due" ' in last["message"]
    assert "Traceback" not in log.read_text()


ADD_COLUMN = "ALTER TABLE todo.tasks ADD COLUMN IF NOT EXISTS due date;"
ADD_INDEX = "CREATE INDEX IF NOT EXISTS tasks_due ON todo.tasks (user_id, due);"


def use_for(seconds: float, api: Client, task: str) -> bool:
    """Reads and writes, and accepts no failure. Gives False."""
    stop = time.monotonic() + seconds
    while time.monotonic() < stop:
        assert api.post("/tasks", json=TITLE).status_code == 201
        assert api.patch(task, json=TITLE).status_code == 200
        assert api.get(task).status_code == 200
    return False


@pytest.mark.slow
def test_the_release_before_writes_on_while_the_next_waits_for_a_lock_and_after_it(
    empty: str, tmp_path: Path
) -> None:
    next_release(tmp_path / "next", ADD_COLUMN, ADD_INDEX)
    log = tmp_path / "log"
    with (
        serving(empty, tmp_path / "old") as old,
        client(old) as api,
        psycopg.connect(empty) as other,
    ):
        task = "/tasks/" + api.post("/tasks", json=TITLE).json()["id"]
        other.execute("LOCK TABLE todo.tasks IN ROW EXCLUSIVE MODE")  # as a long transaction does
        port = free_port()
        with started(uvicorn(port), log, environment(empty), tmp_path / "next") as process:
            wait_until(lambda: use_for(0.2, api, task) or "waits for a lock" in log.read_text())
            use_for(4, api, task)
            other.rollback()
            wait_for_start(process, port, log)
            use_for(1, api, task)


@contextmanager
def in_use(server: Server) -> Iterator[None]:
    """Four users read and write until the block ends, and no request of theirs may fail."""
    ended = Event()

    def use() -> None:
        with client(server) as api:
            task = "/tasks/" + api.post("/tasks", json=TITLE).raise_for_status().json()["id"]
            while not ended.is_set():
                use_for(0.1, api, task)
                assert api.get("/tasks?limit=2").status_code == 200

    with ThreadPoolExecutor(4) as pool:
        users = [pool.submit(use) for _ in range(4)]
        try:
            yield
        finally:
            ended.set()
    for user in users:
        user.result()


@pytest.mark.slow
def test_a_release_with_a_new_column_and_the_way_back_fail_no_request(
    empty: str, tmp_path: Path
) -> None:
    next_release(tmp_path / "next", ADD_COLUMN, ADD_INDEX)
    with ExitStack() as first, ExitStack() as second:
        old = first.enter_context(serving(empty, tmp_path / "old"))
        first.enter_context(in_use(old))
        new = second.enter_context(serving(empty, tmp_path / "log", uvicorn, tmp_path / "next"))
        second.enter_context(in_use(new))
        time.sleep(1)  # both serve
        first.close()
        with serving(empty, tmp_path / "again") as again, in_use(again):
            time.sleep(1)
            second.close()
            time.sleep(1)
        assert "schema applied" not in [line["message"] for line in again.log()]
        assert old.failures() == new.failures() == again.failures() == []
