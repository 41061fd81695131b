"""What CONTRIBUTING shows: a field, a route, and lists in an envelope.

The changes are made in a copy of the service, on a database that the version before has filled.
"""

import re
import shutil
from collections.abc import Iterator
from os.path import commonprefix
from pathlib import Path

import pytest
from httpx import Client

from conftest import HERE, bearer, copy_service, get, post, serving, token, uvicorn

FIELD, ROUTE, ENVELOPE = re.findall(
    r"^```diff\n(.*?)^```", (HERE / "CONTRIBUTING.md").read_text(), re.M | re.S
)


def places(shown: str) -> Iterator[tuple[str, str, str, str]]:
    """Of each place that is shown: the file, its lines before and after, and the new ones."""
    for place in re.split(r"^--- ", shown, flags=re.M)[1:]:
        name, *lines = place.splitlines(keepends=True)
        before, after, new = (
            "".join(line[1:] for line in lines if line[0] in signs) for signs in (" -", " +", "+")
        )
        yield name.strip().partition(":")[0], before, after, new


def changed_text(source: str, before: str, after: str, new: str) -> str:
    """The source with a change that it has not yet. Raises AssertionError if it does not fit."""
    # The new text stands between what the lines before and after share at their beginning and end.
    shared = commonprefix([before, after])  # noqa: RUF071 (by characters)
    added = after.removeprefix(shared).removesuffix(before.removeprefix(shared))
    if new in source or shared + added in source:  # somebody has followed CONTRIBUTING
        return source
    if not before:
        return source + after
    if source.count(before) == 1:
        return source.replace(before, after)
    # A list of fields may have become longer since.
    assert source.count(shared) == 1, f"change CONTRIBUTING, which shows this line:\n{before}"
    return source.replace(shared, shared + added)


@pytest.fixture
def changed(empty: str, tmp_path: Path) -> Iterator[str]:
    """The address of the changed service, on a database that the version before has filled."""
    with serving(empty, tmp_path / "before") as server:
        made = post(server.url + "/tasks", json={"title": "old"}, headers=bearer(token("u")))
        assert made.status_code == 201
    folder = tmp_path / "changed"
    copy_service(folder)
    for name in ("README.md", "test_main.py"):
        shutil.copy(HERE / name, folder)
    for name, *change in places(FIELD + ROUTE + ENVELOPE):
        source = (folder / name).read_text()
        (folder / name).write_text(changed_text(source, *change))
    with serving(empty, tmp_path / "log", uvicorn, folder) as server:
        yield server.url


def test_a_new_route_counts_the_users_tasks(changed: str) -> None:
    for root in ("/tasks", "/todos", "/api/me/tasks"):
        assert get(f"{changed}{root}/count", headers=bearer(token("u"))).json() == {"count": 1}
        assert get(f"{changed}{root}/count", headers=bearer(token("v"))).json() == {"count": 0}
        done = get(f"{changed}{root}/count?completed=true", headers=bearer(token("u")))
        assert done.json() == {"count": 0}


def test_a_list_can_stand_in_an_envelope(changed: str) -> None:
    answer = get(changed + "/tasks", headers=bearer(token("u")))
    assert [task["title"] for task in answer.json()["tasks"]] == ["old"]
    schemas = get(changed + "/openapi.json").json()["components"]["schemas"]
    assert schemas["Tasks"]["properties"]["tasks"]["items"] == {"$ref": "#/components/schemas/Task"}


def test_a_new_field_is_created_read_changed_kept_and_documented(changed: str) -> None:
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
        wrong = [
            api.post("/tasks", json={"title": "x", "due_date": due}) for due in ("soon", 0, "0")
        ]
        assert [each.status_code for each in wrong] == [422] * 3
        assert wrong[0].json()["detail"].startswith("due_date: Input should be a valid date")
        schemas = api.get("/openapi.json").json()["components"]["schemas"]
    for name in ("Task", "TaskCreate", "TaskUpdate"):
        assert "due_date" in schemas[name]["properties"]
