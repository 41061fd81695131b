"""A new field takes at most seven places: this adds `due_date` in a copy, as README tells it."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from httpx import Client

from conftest import (
    bearer,
    copy_service,
    environment,
    free_port,
    get,
    post,
    serving,
    token,
    wait_for_start,
)

DATE = "date | None"
PLACES = [
    ("schema.sql", "    description text,\n", "    due_date    date,\n"),
    ("schema.sql", None, "ALTER TABLE todo.tasks ADD COLUMN IF NOT EXISTS due_date date;\n"),
    ("db.py", '"description", "completed"]', '"description", "completed", "due_date"]'),
    ("main.py", "from datetime import datetime", "from datetime import date, datetime"),
    ("main.py", "    description: Description = NOT_SENT\n", f"    due_date: {DATE} = NOT_SENT\n"),
    ("main.py", "    description: Description = None\n", f"    due_date: {DATE} = None\n"),
    ("main.py", "    description: Description\n", f"    due_date: {DATE}\n"),
]


def add_due_date(folder: Path) -> None:
    """Replaces the text of each place, or adds a line below it in a schema."""
    for name, found, text in PLACES:
        source = (folder / name).read_text()
        if found is None:
            source += text
        else:
            assert source.count(found) == 1, (name, found)
            source = source.replace(found, found + text if text.startswith("    due") else text)
        (folder / name).write_text(source)


@pytest.fixture
def changed(empty: str, tmp_path: Path) -> Iterator[str]:
    """The address of the changed service, on a database that the version before has filled."""
    with serving(empty, tmp_path / "before") as server:
        made = post(server.url + "/tasks", json={"title": "old"}, headers=bearer(token("u")))
        assert made.status_code == 201
    folder = tmp_path / "changed"
    copy_service(folder)
    add_due_date(folder)
    port, log = free_port(), tmp_path / "log"
    command = [sys.executable, "-m", "uvicorn", "main:app", "--port", str(port)]
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, cwd=folder, env=environment(empty), stdout=output, stderr=output
        )
    wait_for_start(process, port, log)
    yield f"http://127.0.0.1:{port}"
    process.terminate()
    process.wait(30)


def test_a_field_takes_at_most_seven_places() -> None:
    assert len(PLACES) <= 7


def test_a_new_field_is_created_read_changed_and_kept(changed: str) -> None:
    with Client(base_url=changed, headers=bearer(token("u")), verify=False) as api:
        [old] = api.get("/tasks").json()
        assert (old["title"], old["due_date"]) == ("old", None)
        made = api.post("/tasks", json={"title": "new", "due_date": "2027-01-31"}).json()
        path = "/tasks/" + made["id"]
        assert api.get(path).json()["due_date"] == "2027-01-31"
        assert api.put(path, json={"title": "newer"}).json()["due_date"] == "2027-01-31"
        assert api.patch(path, json={"due_date": "2028-02-29"}).json()["due_date"] == "2028-02-29"
        assert api.put(path, json={"due_date": None}).json()["due_date"] is None
        assert [task["due_date"] for task in api.get("/tasks").json()] == [None, None]
        wrong = api.post("/tasks", json={"title": "x", "due_date": "soon"})
        assert wrong.status_code == 422
        assert wrong.json()["detail"].startswith("due_date: Input should be a valid date")


def test_a_new_field_is_documented(changed: str) -> None:
    schemas = get(changed + "/openapi.json").json()["components"]
    for name in ("Task", "TaskCreate", "TaskUpdate"):
        assert "due_date" in schemas["schemas"][name]["properties"]
