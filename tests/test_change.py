"""A new field takes at most seven places, a route three, an envelope three lines.

This changes a copy of the service as README tells it, and uses what came of it.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest
from httpx import Client

from conftest import bearer, copy_service, get, post, serving, token, uvicorn

Places = list[tuple[str, str, str]]  # a file, a text in it, and what is added below or replaces it
DATE = "date | None"
FIELD: Places = [
    ("schema.sql", "    description text,\n", "    due_date    date,\n"),
    ("schema.sql", "", "ALTER TABLE todo.tasks ADD COLUMN IF NOT EXISTS due_date date;\n"),
    ("db.py", '"description", "completed"]', '"description", "completed", "due_date"]'),
    ("main.py", "from datetime import datetime", "from datetime import date, datetime"),
    ("main.py", "    description: Description = NOT_SENT\n", f"    due_date: {DATE} = NOT_SENT\n"),
    ("main.py", "    description: Description = None\n", f"    due_date: {DATE} = None\n"),
    ("main.py", "    description: Description\n", f"    due_date: {DATE}\n"),
]
COUNT = """COUNT_TASKS = Statement("COUNT_TASKS", \"""
SELECT count(*)
FROM todo.tasks
WHERE user_id = %(user_id)s
\""")


async def count_tasks(user_id: str) -> int:
    [(count,)] = await fetch(COUNT_TASKS, user_id=user_id)
    return int(count)


class Page(NamedTuple):
"""
GET_COUNT = """@route("GET", "/tasks/count", response_model=dict[str, int])
async def count_tasks(user_id: CurrentUser) -> Response:
    return JSONResponse({"count": await db.count_tasks(user_id)})


@route("GET", "/tasks/{task_id}", response_model=Task)
"""
ROUTE: Places = [
    ("db.py", "class Page(NamedTuple):\n", COUNT),
    ("main.py", '@route("GET", "/tasks/{task_id}", response_model=Task)\n', GET_COUNT),
    (
        "main.py",
        "    GET    /tasks/{task_id}",
        "    GET    /tasks/count\n    GET    /tasks/{task_id}",
    ),
]
ERRORS = "# Errors: `detail` and `code`"
TASKS = "class Tasks(SQLModel):\n    tasks: list[Task]\n\n\n"
ENVELOPE: Places = [
    ("main.py", ERRORS, TASKS + ERRORS),
    ("main.py", "response_model=list[Task]", "response_model=Tasks"),
    ("main.py", "respond(found.json,", "respond(b'{\"tasks\":' + found.json + b'}',"),
]


def change(folder: Path, places: Places) -> None:
    """Replaces the text of each place, or adds a line below it or at the end."""
    for name, found, text in places:
        source = (folder / name).read_text()
        assert source.count(found) == 1 or not found, (name, found)
        below = text.startswith("    due")
        made = source.replace(found, found + text if below else text) if found else source + text
        (folder / name).write_text(made)


@pytest.fixture
def changed(empty: str, tmp_path: Path) -> Iterator[str]:
    """The address of the changed service, on a database that the version before has filled."""
    with serving(empty, tmp_path / "before") as server:
        made = post(server.url + "/tasks", json={"title": "old"}, headers=bearer(token("u")))
        assert made.status_code == 201
    folder = tmp_path / "changed"
    copy_service(folder)
    change(folder, FIELD + ROUTE + ENVELOPE)
    with serving(empty, tmp_path / "log", uvicorn, folder) as server:
        yield server.url


def test_a_field_takes_at_most_seven_places_and_a_route_three() -> None:
    assert (len(FIELD) <= 7, len(ROUTE) <= 3, len(ENVELOPE) <= 3) == (True, True, True)


def test_a_new_route_counts_the_users_tasks(changed: str) -> None:
    for root in ("/tasks", "/todos", "/api/me/tasks"):
        assert get(f"{changed}{root}/count", headers=bearer(token("u"))).json() == {"count": 1}
        assert get(f"{changed}{root}/count", headers=bearer(token("v"))).json() == {"count": 0}


def test_a_list_can_stand_in_an_envelope(changed: str) -> None:
    answer = get(changed + "/tasks", headers=bearer(token("u")))
    assert [task["title"] for task in answer.json()["tasks"]] == ["old"]
    schemas = get(changed + "/openapi.json").json()["components"]["schemas"]
    assert schemas["Tasks"]["properties"]["tasks"]["items"] == {"$ref": "#/components/schemas/Task"}


def test_a_new_field_is_created_read_changed_and_kept(changed: str) -> None:
    with Client(base_url=changed, headers=bearer(token("u")), verify=False) as api:
        [old] = api.get("/tasks").json()["tasks"]
        assert (old["title"], old["due_date"]) == ("old", None)
        made = api.post("/tasks", json={"title": "new", "due_date": "2027-01-31"}).json()
        path = "/tasks/" + made["id"]
        assert api.get(path).json()["due_date"] == "2027-01-31"
        assert api.put(path, json={"title": "newer"}).json()["due_date"] == "2027-01-31"
        assert api.patch(path, json={"due_date": "2028-02-29"}).json()["due_date"] == "2028-02-29"
        assert api.put(path, json={"due_date": None}).json()["due_date"] is None
        assert [task["due_date"] for task in api.get("/tasks").json()["tasks"]] == [None, None]
        wrong = api.post("/tasks", json={"title": "x", "due_date": "soon"})
        assert wrong.status_code == 422
        assert wrong.json()["detail"].startswith("due_date: Input should be a valid date")


def test_a_new_field_is_documented(changed: str) -> None:
    schemas = get(changed + "/openapi.json").json()["components"]
    for name in ("Task", "TaskCreate", "TaskUpdate"):
        assert "due_date" in schemas["schemas"][name]["properties"]
