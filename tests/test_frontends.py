"""What real frontends send."""

import uuid
from urllib.parse import quote

import pytest
from httpx import Client

from conftest import NOBODYS_ID, Server, Task, client

parametrize = pytest.mark.parametrize
ORIGIN = {"Origin": "https://app.example"}
JSON = {"Content-Type": "application/json"}


@parametrize("word", ["complete", "toggle"])
@parametrize("content", [None, b"", b"{}", b"null", b'{"completed": true}'])
def test_a_toggle_takes_each_body_that_comes_as_json(
    api: Client, task: Task, word: str, content: bytes | None
) -> None:
    path = f"/api/{task['user_id']}/tasks/{task['id']}/{word}"
    assert api.patch(path, content=content, headers=JSON).json()["completed"] is True


@parametrize(
    "kind",
    ["application/json; charset=utf-8", "application/json;charset=UTF-8", "Application/JSON"],
)
def test_json_may_name_its_charset(api: Client, kind: str) -> None:
    response = api.post("/tasks", content=b'{"title": "x"}', headers={"Content-Type": kind})
    assert response.status_code == 201


@parametrize("description", ["", None])
def test_a_form_left_empty_can_be_sent_and_sent_again(api: Client, description: str | None) -> None:
    form = {"title": "x", "description": description}
    task = api.post("/tasks", json=form).json()
    assert api.put("/tasks/" + task["id"], json=form).json()["description"] == description


def test_a_whole_task_can_be_sent_back(api: Client, task: Task) -> None:
    body = task | {"completed": True, "is_completed": True, "priority": "high", "tags": []}
    changed = api.put("/tasks/" + task["id"], json=body).json()
    assert changed["completed"] is changed["is_completed"] is True


@parametrize("headers", [{}, JSON])
def test_a_delete_may_say_that_its_missing_body_is_json(
    api: Client, task: Task, headers: dict[str, str]
) -> None:
    assert api.delete("/tasks/" + task["id"], headers=headers).status_code == 200


@parametrize(
    "user",
    ["auth0|1", "用户", "ü", "a b", "a?b#c", "a%2Fb", "google-oauth2|1", "did:x:1", '"<>"'],
)
def test_location_and_link_lead_on_whatever_the_issuer_calls_its_users(
    server: Server, user: str
) -> None:
    path = "/api/" + quote(user, safe="") + "/tasks"
    with client(server, user + uuid.uuid4().hex) as api:
        assert api.get(path).status_code == 403
    with client(server, user) as api:
        created = [api.post(path, json={"title": "x"}) for _ in range(2)]
        page = api.get(path, params={"limit": 1, "unknown": "x" * 9000})
        assert api.get(created[0].headers["location"]).json() == created[0].json()
        assert api.get(page.links["next"]["url"]).json() == [created[0].json()]
        assert len(page.headers["link"]) < 300
        for task in created:
            assert api.delete(task.headers["location"]).status_code == 200


def test_a_page_may_send_credentials(api: Client) -> None:
    answer = api.get("/tasks", headers=ORIGIN | {"Cookie": "better-auth.session_token=x"})
    asked = {"Access-Control-Request-Method": "PATCH"}
    asked |= {"Access-Control-Request-Headers": "authorization,content-type"}
    preflight = api.options("/api/me/tasks/" + NOBODYS_ID, headers=ORIGIN | asked)
    for response in (answer, preflight):
        assert response.status_code == 200
        assert response.headers["access-control-allow-origin"] == ORIGIN["Origin"]
        assert response.headers["access-control-allow-credentials"] == "true"


def test_the_first_page_escapes_the_host(public: Client) -> None:
    page = public.get("/", headers={"Accept": "text/html", "Host": "a&b"})
    assert "http://a&amp;b/" in page.text
