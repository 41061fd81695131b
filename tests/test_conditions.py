"""If-Match and If-None-Match in the forms that the specification leaves out."""

import hashlib

import pytest
from httpx import Client

import db
from conftest import (
    Task,
)

parametrize = pytest.mark.parametrize
TITLE = {"title": "x"}


def ask(api: Client, method: str, path: str, *headers: tuple[str, str]) -> int:
    body = None if method == "GET" else TITLE
    sent = [("Authorization", api.headers["Authorization"]), *headers]
    return api.request(method, path, headers=sent, json=body).status_code


def test_a_read_of_another_version_is_412(api: Client, task: Task) -> None:
    path = "/tasks/" + task["id"]
    etag = api.get(path).headers["etag"]
    assert ask(api, "GET", path, ("If-Match", etag)) == 200
    assert ask(api, "GET", path, ("If-Match", '"0-00000000"')) == 412


@parametrize("method", ["PUT", "PATCH", "DELETE"])
def test_only_the_whole_entity_tag_matches(api: Client, task: Task, method: str) -> None:
    path = "/tasks/" + task["id"]
    etag = api.get(path).headers["etag"]
    version = etag.strip('"').partition("-")[0]
    for wrong in (f'"{version}"', version, "W/" + etag, etag.strip('"'), f'"0{etag[1:]}'):
        assert ask(api, method, path, ("If-Match", wrong)) == 412, wrong


def test_several_lines_of_a_condition_are_one_list(api: Client, task: Task) -> None:
    path = "/tasks/" + task["id"]
    etag = api.get(path).headers["etag"]
    lines = [(name, tag) for name in ("If-None-Match", "If-Match") for tag in ('"x"', etag)]
    assert ask(api, "GET", path, *lines[:2]) == ask(api, "GET", path, *lines[1::-1]) == 304
    assert ask(api, "PATCH", path, *lines[2:]) == 200


def test_a_tasks_etag_names_the_form_of_the_answer(api: Client, task: Task) -> None:
    etag = api.get("/tasks/" + task["id"]).headers["etag"]
    assert etag == f'"1-{db.SHAPE}"'
    assert hashlib.sha256(db.COLUMNS.encode()).hexdigest().startswith(db.SHAPE)


def test_two_tasks_that_swap_their_titles_change_the_lists_etag(api: Client) -> None:
    one, other = (api.post("/tasks", json={"title": title}).json()["id"] for title in "ab")
    etag = api.get("/tasks").headers["etag"]
    api.patch("/tasks/" + one, json={"title": "b"})
    api.patch("/tasks/" + other, json={"title": "a"})
    assert ask(api, "GET", "/tasks", ("If-None-Match", etag)) == 200
