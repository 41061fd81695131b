"""What the service promises, one sentence a test, on a real PostgreSQL and a real server.

python -m pytest                                  this specification
python -m pytest tests                            the rest: clients, faults, the pipeline
TEST_POSTGRES=16 python -m pytest                 the same on the PostgreSQL 16 that pip installed
TEST_DATABASE_URL=… python -m pytest              the same on any other, see conftest.py
"""

import hashlib
import json
import re
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import jwt
import psycopg
import pytest
from cryptography.hazmat.primitives.asymmetric import ed25519
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from httpx import Client, Response

import db
from conftest import (
    HERE,
    NOBODYS_ID,
    SECRET,
    Account,
    Issuer,
    Server,
    Task,
    bearer,
    client,
    documented_routes,
    execute,
    get,
    jwt_by_hand,
    new_email,
    post,
    raw,
    refusal,
    serving,
    start,
    status,
    token,
    wait_until,
)

parametrize = pytest.mark.parametrize
JSON = {"Content-Type": "application/json"}
ORIGIN = {"Origin": "https://app.example"}
PUBLIC = {"GET /", "GET /health", "GET /health/ready"}
PUBLIC |= {f"POST /auth/{name}" for name in ("register", "login", "token", "logout")}
Tasks = list[Task]


# A task.

TITLES = ["x", "x" * 500, "\U0001f9c0" * 500, " padded ", "line\nbreak", "'; DROP TABLE tasks;--"]
BAD_TITLES = [None, "", " \t\n", "x" * 501, "a\0b", 7]
BAD_FIELDS: list[Any] = [("description", text) for text in ("x" * 5001, "\0", ["x"])]
BAD_FIELDS += [("completed", "yes"), ("completed", None), ("is_completed", 1)]
BAD_BODIES: list[Any] = [{}, {"title": "x" * 501}]
BAD_BODIES += [{"title": "ok", name: value} for name, value in BAD_FIELDS]
NOT_JSON = [
    b"{",
    b'{"title": NaN}',
    b'{"title": "x", "y": [-Infinity]}',
    b"\xff\xfe",
    b'{"title": "\xff"}',
    b"[" * 60_000,
]
KINDS = ["text/plain", "application/x-www-form-urlencoded", "application/jsonp", "nonsense"]
COMPRESSED = [*JSON.items(), ("Content-Encoding", "identity"), ("Content-Encoding", "gzip")]


def test_a_task_has_the_fields_of_the_contract_and_of_the_document(api: Client, task: Task) -> None:
    texts = {"id", "user_id", "title", "description", "created_at", "updated_at"}
    assert set(task) == texts | {"completed", "is_completed"}
    assert task["created_at"].endswith("+00:00")
    schema = api.get("/openapi.json").json()["components"]["schemas"]["Task"]
    assert set(schema["properties"]) == set(schema["required"]) == set(task)


def test_a_task_is_the_same_object_in_every_answer(api: Client) -> None:
    created = api.post("/tasks", json={"title": "Buy milk", "description": "two litres"}).json()
    path = "/tasks/" + created["id"]
    assert created == api.get(path).json() == api.get("/tasks").json()[0]
    assert created == api.patch(path, json={}).json()


@parametrize("title", TITLES)
@parametrize("description", [None, "", "x" * 5000, "%(title)s $1 {}"])
def test_texts_come_back_as_they_were_sent(api: Client, title: str, description: Any) -> None:
    task = api.post("/tasks", json={"title": title, "description": description}).json()
    assert (task["title"], task["description"]) == (title, description)


@parametrize("body", BAD_BODIES)
def test_a_body_against_the_schema_is_422_and_is_not_repeated(api: Client, body: Any) -> None:
    response = api.post("/tasks", content=json.dumps(body), headers=JSON)
    problem = refusal(response, 422, "unprocessable_content")
    assert problem["errors"]
    assert all(set(error) == {"loc", "msg", "type"} for error in problem["errors"])
    assert "xxx" not in json.dumps(problem)
    assert api.get("/tasks").json() == []


@parametrize("title", BAD_TITLES)
def test_a_refused_title_says_what_a_title_takes(api: Client, title: Any) -> None:
    detail = "Title: 1 to 500 characters, at least one of them visible"
    response = api.post("/tasks", json={"title": title})
    refusal(response, 422, "unprocessable_content", detail)


@parametrize("text", [r'{"title": "\ud800"}', r'{"title": "ok", "x": "\udfff"}', r'{"\udead": 1}'])
def test_json_that_utf8_cannot_hold_is_400_and_the_place_is_told(api: Client, text: str) -> None:
    problem = refusal(api.post("/tasks", content=text, headers=JSON), 400, "bad_request")
    assert re.search(r"(surrogate|escape) .*at line 1 column \d+$", problem["detail"])


@parametrize("text", [*NOT_JSON, b'{"title": ' + b"9" * 5000 + b"}"])
def test_what_is_not_json_is_400(api: Client, text: bytes) -> None:
    refusal(api.post("/tasks", content=text, headers=JSON), 400, "bad_request")


@parametrize("headers", [{}, *[{"Content-Type": kind} for kind in KINDS], COMPRESSED])
def test_a_body_that_does_not_say_it_is_json_or_is_compressed_is_415(
    api: Client, headers: Any
) -> None:
    response = api.post("/tasks", content=b'{"title": "x"}', headers=headers)
    refusal(response, 415, "unsupported_media_type")


def test_unknown_fields_never_change_owner_id_or_times(api: Client, task: Task) -> None:
    forged = {"id": NOBODYS_ID, "user_id": "someone", "created_at": "2000-01-01T00:00:00Z"}
    body = {"title": "new", "version": 9, "nonsense": 1} | forged
    changed = api.put("/tasks/" + task["id"], json=body).json()
    assert [changed[name] for name in forged] == [task[name] for name in forged]
    assert api.post("/tasks", json=body).json()["user_id"] == task["user_id"]


# Changing tasks.

BOTH_NAMES = [{"completed": value, "is_completed": not value} for value in (True, False)]
TOGGLES: list[Any] = [{}]
TOGGLES += [{"content": text, "headers": JSON} for text in ("", "{}", "null", '{"other": 1}')]
CHANGES = [{"title": "new"}, {"description": "new"}, {"description": None}, {"completed": True}]


@parametrize("method", ["PUT", "PATCH"])
@parametrize("change", CHANGES)
def test_only_the_fields_sent_change(api: Client, method: str, change: dict[str, Any]) -> None:
    before = api.post("/tasks", json={"title": "Buy milk", "description": "two litres"}).json()
    after = api.request(method, "/tasks/" + before["id"], json=change).json()
    follow = {name: after[name] for name in ("is_completed", "updated_at")}
    assert after == before | change | follow
    assert after["is_completed"] is after["completed"]
    assert after["updated_at"] > before["updated_at"]


@parametrize("names", [["completed"], ["is_completed"], ["completed", "is_completed"]])
def test_completed_has_two_names(api: Client, names: list[str]) -> None:
    sent = dict.fromkeys(names, True)
    created = api.post("/tasks", json={"title": "x", **sent}).json()
    updated = api.put("/tasks/" + created["id"], json=sent).json()
    toggled = api.patch(f"/tasks/{created['id']}/toggle", json=sent).json()
    for task in (created, updated, toggled):
        assert task["completed"] is task["is_completed"] is True


@parametrize("sent", BOTH_NAMES)
@parametrize("method", ["POST", "PUT", "PATCH", "toggle"])
def test_two_names_that_differ_are_422(
    api: Client, task: Task, method: str, sent: dict[str, bool]
) -> None:
    path = {"POST": "/tasks", "toggle": f"/tasks/{task['id']}/toggle"}
    method, url = method.replace("toggle", "PATCH"), path.get(method, "/tasks/" + task["id"])
    response = api.request(method, url, json=task | sent)
    text = "completed and is_completed differ: send one"
    refusal(response, 422, "unprocessable_content", text)
    assert api.get("/tasks").json() == [task]


@parametrize("method", ["PATCH", "POST"])
@parametrize("word", ["complete", "toggle"])
@parametrize("body", TOGGLES)
def test_a_toggle_without_a_value_flips(
    api: Client, task: Task, method: str, word: str, body: Any
) -> None:
    path = f"/api/me/tasks/{task['id']}/{word}"
    answers = [api.request(method, path, **body) for _ in range(3)]
    assert [each.json()["completed"] for each in answers] == [True, False, True]


@parametrize("word", ["complete", "toggle"])
@parametrize("value", [True, False])
def test_a_toggle_with_a_value_sets_it(api: Client, task: Task, word: str, value: bool) -> None:
    path, body = f"/tasks/{task['id']}/{word}", {"completed": value}
    assert [api.patch(path, json=body).json()["completed"] for _ in range(2)] == [value, value]


def test_of_301_toggles_at_once_every_one_counts(api: Client, task: Task) -> None:
    path = f"/tasks/{task['id']}/toggle"
    with ThreadPoolExecutor(16) as pool:
        values = list(pool.map(lambda _: api.patch(path).json()["completed"], range(301)))
    assert (values.count(True), values.count(False)) == (151, 150)
    assert api.get("/tasks/" + task["id"]).json()["completed"] is True


def test_delete_says_so_and_the_task_is_gone(api: Client, task: Task) -> None:
    response = api.delete("/tasks/" + task["id"])
    assert (response.status_code, response.json()) == (200, {"message": "Task deleted"})
    refusal(api.delete("/tasks/" + task["id"]), 404, "task_not_found", "Task not found")


# Lists.

LINKED = [(f"limit={limit}", 0) for limit in (1, 3, 5, 9, 10, 11, 1000)]
LINKED += [("limit=2&offset=4", 4), ("limit=2&skip=4", 4), ("limit=3&page=2", 3)]
LINKED += [("limit=2&completed=false", 0)]
BAD_LIMITS = [f"limit={limit}" for limit in (0, -1, 1001, 10**9, 2**63, "x", "1e2")]


@pytest.fixture
def ten(api: Client) -> Tasks:
    """Ten tasks, newest first. Half are completed. Their titles look like tasks in JSON."""
    bodies = [{"title": f'{{"id":{n}', "completed": n % 2 == 0} for n in range(10)]
    return [api.post("/tasks", json=body).json() for body in bodies][::-1]


def test_a_list_is_an_array_newest_first(api: Client, ten: Tasks) -> None:
    response = api.get("/tasks")
    assert response.json() == ten
    assert "link" not in response.headers


@parametrize("root", ["/tasks", "/api/me/tasks"])
@parametrize(("query", "start"), LINKED)
def test_the_links_lead_to_every_task_once_from_any_page_and_keep_the_filter(
    api: Client, ten: Tasks, root: str, query: str, start: int
) -> None:
    wanted = [task for task in ten if "false" not in query or not task["completed"]]
    limit, seen, url = int(query.partition("&")[0][6:]), [], f"{root}?{query}"
    while url:
        response = api.get(url)
        assert 1 <= len(response.json()) <= limit
        seen += response.json()
        url = response.links.get("next", {}).get("url", "")
    assert seen == wanted[start:]


def test_pages_neither_repeat_nor_skip_when_tasks_come_and_go(api: Client, ten: Tasks) -> None:
    first = api.get("/tasks", params={"limit": 5})
    api.post("/tasks", json={"title": "newer"})
    api.delete("/tasks/" + first.json()[-1]["id"])
    assert api.get(first.links["next"]["url"]).json() == ten[5:]


def test_a_page_by_number_that_would_be_cut_is_422(api: Client) -> None:
    for _ in range(40):  # more than a page holds: 30 KB each as JSON
        api.post("/tasks", json={"title": "x", "description": "\x01" * 5000}).raise_for_status()
    for query in ("page=1", "offset=0", "skip=1", "page=1&limit=40"):
        problem = refusal(api.get("/tasks?" + query), 422, "page_too_large")
        assert "ask for a smaller limit, or page by after" in problem["detail"]
    assert len(api.get("/tasks?page=2&limit=20").json()) == 20


DONE = ["completed", "done"]
OPEN = ["pending", "active", "incomplete", "todo"]
FILTERS = [("status=" + word, [True]) for word in DONE]
FILTERS += [("status=" + word, [False]) for word in OPEN]
FILTERS += [("is_completed=true", [True]), ("completed=true&is_completed=1", [True])]
FILTERS += [("completed=false&status=completed", [False]), ("completed=true&status=all", [True])]
FILTERS += [("status=all", [True, False]), ("status=&limit=&completed=&page=", [True, False])]


@parametrize(("query", "values"), FILTERS)
def test_a_filter_has_many_names_and_completed_wins_over_status(
    api: Client, ten: Tasks, query: str, values: list[bool]
) -> None:
    shown = api.get("/tasks?" + query).json()
    assert shown == [task for task in ten if task["completed"] in values]


SENTENCES = [
    *[(query, "limit: a whole number from 1 to 1000") for query in BAD_LIMITS],
    ("page=0", "page: a whole number from 1"),
    ("page=x", "page: a whole number from 1"),
    ("offset=-1", "offset: a whole number to skip"),
    ("skip=x", "offset: a whole number to skip"),
    *[("after=" + text, "after: the id of the last one seen") for text in ("x", "9" * 40, "%00")],
    ("completed=maybe", "completed: true or false"),
    ("status=x", "status: all, completed, done, pending, active, incomplete or todo"),
    ("completed=true&is_completed=false", "completed and is_completed differ: send one"),
]


@parametrize(("query", "sentence"), SENTENCES)
def test_a_query_that_is_refused_says_what_it_takes(api: Client, query: str, sentence: str) -> None:
    refusal(api.get("/tasks?" + query), 422, "unprocessable_content", sentence)


@parametrize("content", [b"", b"[]", b"7", b"null", b'"text"'])
def test_a_body_that_is_no_object_is_told_so(api: Client, content: bytes) -> None:
    response = api.post("/tasks", content=content, headers=JSON)
    refusal(response, 422, "unprocessable_content", "The body has to be a JSON object")


# Isolation.

Call = tuple[str, str, Any]
CALLS: list[Call] = [
    ("GET", "/tasks/{}", None),
    ("PUT", "/tasks/{}", {"title": "stolen"}),
    ("PUT", "/tasks/{}", {}),
    ("PATCH", "/tasks/{}", {"title": "stolen"}),
    ("PATCH", "/tasks/{}/complete", None),
    ("PATCH", "/tasks/{}/toggle", {"completed": True}),
    ("DELETE", "/tasks/{}", None),
]
LIST_CALLS: list[Call] = [("GET", "/tasks", None), ("POST", "/tasks", {"title": "x"})]
MALFORMED_IDS = ["x", "1", NOBODYS_ID[:-1], NOBODYS_ID + "0", "%00", "%F0%9F%A7%80"]
TAGS = ["*", '"1"']
CONDITIONS = [{}, *[{"If-Match": tag} for tag in TAGS], *[{"If-None-Match": tag} for tag in TAGS]]


def send(api: Client, call: Call, id: str, root: str = "", **headers: str) -> Response:
    method, path, body = call
    return api.request(method, root + path.format(id), json=body, headers=headers)


@parametrize("condition", CONDITIONS)
@parametrize("call", CALLS)
def test_another_users_task_answers_byte_for_byte_as_a_missing_one(
    server: Server, task: Task, call: Call, condition: dict[str, str]
) -> None:
    with client(server, **{"X-Request-ID": "same"}) as other:
        theirs = send(other, call, task["id"], **condition)
        missing = send(other, call, NOBODYS_ID, **condition)
    refusal(theirs, 404, "task_not_found", "Task not found")
    assert theirs.content == missing.content
    del theirs.headers["date"], missing.headers["date"]
    assert theirs.headers == missing.headers


def test_another_users_task_is_not_in_my_list(server: Server, task: Task) -> None:
    with client(server) as other:
        assert other.get("/tasks").json() == []
        assert other.get("/tasks", params={"after": "f" * 32}).json() == []


@parametrize("id", MALFORMED_IDS)
@parametrize("call", CALLS)
def test_a_malformed_id_is_404_whatever_else_is_wrong(api: Client, call: Call, id: str) -> None:
    wrong = (*call[:2], {"title": ""})
    response = send(api, wrong, id, **{"If-Match": "x" * 5000})
    refusal(response, 404, "task_not_found", "Task not found: ids are UUIDs")


def test_every_statement_on_tasks_names_the_owner() -> None:
    named = {name: value for name, value in vars(db).items() if name.isupper()}
    texts = {name: value.text.decode() for name, value in named.items() if hasattr(value, "text")}
    on_tasks = r"\b(FROM|UPDATE|INTO) todo\.tasks\b"
    owned = r"WHERE\s+(tasks\.)?user_id = \$\d|VALUES\s+\(\s*\$1, "
    found = {name: text for name, text in texts.items() if re.search(on_tasks, text)}
    assert set(found) >= {"SELECT_TASK", "SELECT_TASKS", "INSERT_TASK", "UPDATE_TASK"}
    assert [name for name, text in found.items() if not re.search(owned, text)] == []


# Two roots, aliases, methods.

TODOS = ["/tasks", "/api/tasks", "/api/v1/tasks", "/todos", "/api/todos", "/api/v1/todos"]
USERS = [f"{root}/users/me/{name}" for root in ("", "/api") for name in ("tasks", "todos")]
USERS += ["/api/me/tasks", "/api/v1/me/todos", "/api///tasks", "/todo", "/api/v1/task"]
READABLE = ["/", "/health", "/health/ready", "/tasks", "/auth/me", "/docs", "/openapi.json"]
UNKNOWN_PATHS = ["/nothing", "/api", "/api/v2/x", "/tasks/a/b/c", "/api/auth", "/todosx"]
UNKNOWN_PATHS += ["/tasks%0a", "/tasks%0A/", "/tasks%2f" + NOBODYS_ID, "/api/users", "/users/me/x"]


@parametrize("call", [*CALLS, *LIST_CALLS])
def test_anybody_elses_path_is_403(api: Client, task: Task, call: Call) -> None:
    for root in ("/api/someone", "/api/user", "/api/users", "/users/me2"):
        response = send(api, call, task["id"], root=root)
        refusal(response, 403, "forbidden", "User identity mismatch")


@parametrize("alias", [*TODOS, *USERS])
@parametrize("slash", ["", "/"])
def test_every_alias_serves_every_task_route(api: Client, alias: str, slash: str) -> None:
    created = api.post(alias + slash, json={"title": "x"})
    assert created.status_code == 201
    path = f"{alias}/{created.json()['id']}"
    assert api.get(alias + slash).json() == [created.json()]
    assert api.patch(path + "/toggle" + slash).json()["completed"] is True
    assert api.put(path + slash, json={"title": "y"}).json()["title"] == "y"
    assert api.delete(path + slash).status_code == 200


AUTH = ["/auth", "/api/auth", "/api/v1/auth", "", "/api", "/api/v1", "/user", "/users"]
AUTH += ["/api/users", "/api/v1/users"]
REGISTER = ["/auth/create", *[f"{root}/{name}" for root in AUTH for name in ("register", "signup")]]
LOGIN = [f"{root}/{name}" for root in AUTH for name in ("login", "signin", "token", "token/")]
ME = ["/auth/current_user", *[root + "/me" for root in AUTH]]


def test_each_name_of_a_route_of_accounts_leads_to_it(api: Client) -> None:
    sent = {"email": "ann@example.com", "password": ""}
    told = {path: api.post(path, json=sent).json()["detail"] for path in REGISTER + LOGIN}
    assert [path for path in REGISTER if told[path] != "Password: 8 to 128 characters"] == []
    assert [path for path in LOGIN if not told[path].startswith("password: has to be sent")] == []
    me = api.get("/auth/me").json()
    assert [path for path in ME if api.get(path).json() != me] == []


LOGINS = [("login", "json", "email"), ("login", "data", "username"), ("login", "json", "username")]
LOGINS += [("token", "json", "email"), ("token", "data", "username")]


def test_a_login_takes_json_with_either_field_and_the_form(
    public: Client, account: Account
) -> None:
    def log_in(name: str, kind: str, field: str) -> Response:
        sent: Any = {field: account["email"], "password": account["password"], "name": "Ann"}
        return public.post(f"/auth/{name}", **{kind: sent})

    with ThreadPoolExecutor(2) as pool:  # as many as are hashed at once
        answers = [answer.json() for answer in pool.map(log_in, *zip(*LOGINS, strict=True))]
    for answer in answers:
        assert set(answer) == {"access_token", "token_type", "expires_in", "user"}
        me = public.get("/auth/me", headers=bearer(answer["access_token"]))
        assert me.json() == answer["user"]


@parametrize("root", ["/todos", "/tasks", "/api/v1/todos"])
@parametrize("form", ["{id}/{verb}", "{verb}/{id}/"])
def test_verbs_may_stand_in_the_path(api: Client, root: str, form: str) -> None:
    made = api.post(f"{root}/create", json={"title": "x"})
    assert made.status_code == 201
    for verb, method in [("edit", "PATCH"), ("update", "PUT"), ("delete", "DELETE")]:
        path = f"{root}/{form.format(verb=verb, id=made.json()['id'])}"
        assert api.request(method, path, json={"title": "y"}).status_code == 200
    assert api.get(root).json() == []


@parametrize("headers", [{}, {"Authorization": "Bearer x"}])
def test_logout_says_so_whatever_the_token(public: Client, headers: dict[str, str]) -> None:
    for body in (None, {"all": True}):
        response = public.post("/auth/logout", json=body, headers=headers)
        assert (response.status_code, response.json()) == (200, {"message": "Logged out"})


ROOTS = ["/tasks", "/api/tasks", "/api/v1/todos", "/api/me/tasks", "/api/users/me/todos"]


@parametrize("root", ROOTS)
@parametrize("more", ["", "/", "/create"])
def test_location_and_link_keep_the_path_of_the_client(api: Client, root: str, more: str) -> None:
    made = [api.post(root + more, json={"title": "x"}) for _ in range(2)]
    assert made[0].headers["location"] == f"{root}/{made[0].json()['id']}"
    assert api.get(made[0].headers["location"]).json() == made[0].json()
    shown = api.get(root + "//", params={"limit": 1})
    assert shown.links["next"]["url"] == f"{root}?limit=1&after={shown.json()[0]['id']}"


CALLED = ["auth0|1", "用户", "a b", "a?b#c", "a%2Fb", "did:x:1", '"<>"', "task", "todos"]


@parametrize("user", CALLED)  # the last two are names of /tasks
def test_the_path_user_is_the_tokens_own_whatever_the_issuer_calls_it(
    server: Server, user: str
) -> None:
    path = "/api/" + quote(user, safe="") + "/tasks"
    with client(server, user) as api:
        created = [api.post(path, json={"title": "x"}) for _ in range(2)]
        unknown: Any = {"x": "x" * 9000, "x" * 9000: 1} | {f"y{n}": 1 for n in range(999)}
        page = api.get(path, params={"limit": 1} | unknown)
        for path in (created[0].headers["location"], "/tasks/" + created[0].json()["id"]):
            assert api.get(path).json() == created[0].json()
        assert api.get(page.links["next"]["url"]).json() == [created[0].json()]
        assert len(page.headers["link"]) < 300
        for task in created:
            assert api.delete(task.headers["location"]).status_code == 200


def test_a_root_path_is_kept_and_aliases_are_found_below_it(database: str, tmp_path: Path) -> None:
    def below(port: int) -> list[str]:
        command = [sys.executable, "-m", "uvicorn", "main:app", "--root-path", "/svc", "--port"]
        return [*command, str(port)]

    with serving(database, tmp_path / "log", below) as server, client(server) as api:
        made = [api.post("/todos", json={"title": "x"}) for _ in range(2)]
        shown, docs = api.get("/api/me/todos?limit=1"), api.get("/").json()["docs"]
        assert api.post("/todos", data={"title": "x"}).status_code == 415
    assert made[0].headers["location"] == f"/svc/todos/{made[0].json()['id']}"
    assert (shown.json(), docs) == ([made[1].json()], "/svc/docs")
    assert shown.links["next"]["url"].startswith("/svc/api/me/todos?limit=1&after=")


@parametrize("path", READABLE)
def test_head_answers_like_get_without_the_body(api: Client, path: str) -> None:
    get, head = api.get(path), api.head(path)
    assert (head.status_code, head.content) == (get.status_code, b"")
    assert head.headers["content-length"] == get.headers["content-length"]


@parametrize(
    ("path", "allow"),
    [
        ("/tasks", "GET, HEAD, POST"),
        (f"/tasks/{NOBODYS_ID}", "DELETE, GET, HEAD, PATCH, PUT"),
        (f"/api/me/tasks/{NOBODYS_ID}/toggle", "PATCH, POST"),
        ("/auth/login", "POST"),
        ("/docs", "GET, HEAD"),
    ],
)
def test_405_names_every_method_of_the_path(api: Client, path: str, allow: str) -> None:
    response = api.request("TRACE", path)
    refusal(response, 405, "method_not_allowed")
    assert response.headers["allow"] == allow


@parametrize("path", [*UNKNOWN_PATHS, "/%00", "/../etc"])
def test_an_unknown_path_is_404(public: Client, path: str) -> None:
    refusal(public.get(path), 404, "not_found")


def test_the_first_page_says_where_the_documentation_is(public: Client) -> None:
    answer = public.get("/", headers={"Accept": "text/html"}).json()
    assert (list(answer), answer["docs"]) == (["name", "version", "docs"], "/docs")


# Every response.

ANNOUNCED = b"Content-Length: 200000000\r\n\r\n" + b"x" * 1000
CHUNKED = b"Transfer-Encoding: chunked\r\n\r\n" + (b"8000\r\n" + b"x" * 0x8000 + b"\r\n") * 5
PADDED = b"Idempotency-Key: k\r\nX-Request-ID: i\r\nOrigin: https://app.example\r\n"
PADDED += b"Content-Type: application/json\r\nContent-Encoding: identity\r\nContent-Length: 14\r\n"


@parametrize("space", [b" ", b"\t", b" \t  "])
def test_white_space_around_a_header_is_no_part_of_it(server: Server, space: bytes) -> None:
    head = b"Host: x\r\nConnection: close\r\nAuthorization: Bearer " + token("u").encode()
    head += b"\r\n" + PADDED.replace(b": ", b":" + space).replace(b"\r\n", space + b"\r\n")
    answer = raw(server, b"POST /tasks HTTP/1.1\r\n" + head + b'\r\n{"title": "x"}')
    assert answer.startswith(b"HTTP/1.1 201 ")
    assert b"x-request-id: i\r\n" in answer
    assert b"access-control-allow-origin: https://app.example\r\n" in answer


@parametrize("id", ["a-b_c.1:2", "", "x" * 65, "a b", '"', "é".encode(), "<script>"])
def test_a_plain_request_id_is_taken_over_and_any_other_replaced(api: Client, id: Any) -> None:
    headers: Any = {b"X-Request-ID": id}
    answered = api.get("/health", headers=headers).headers["x-request-id"]
    assert re.fullmatch(r"a-b_c\.1:2" if id == "a-b_c.1:2" else r"[0-9a-f]{32}", answered)


@parametrize(
    ("method", "path", "options", "status"),
    [
        ("GET", "/tasks", {}, 200),
        ("GET", "/tasks", {"headers": {"Authorization": "Bearer x"}}, 401),
        ("POST", "/tasks", {"content": b"x" * 200_000}, 413),
    ],
)
def test_an_allowed_origin_may_read_every_answer(
    api: Client, method: str, path: str, options: Any, status: int
) -> None:
    api.headers.update(ORIGIN)
    response = api.request(method, path, **options)
    assert response.status_code == status
    assert response.headers["access-control-allow-origin"] == "https://app.example"
    assert response.headers["access-control-allow-credentials"] == "true"


def test_an_allowed_origin_may_read_a_500_too(empty: str, tmp_path: Path) -> None:
    settings = {"CORS_ORIGINS": "https://app.example"}
    with serving(empty, tmp_path / "log", **settings) as server, client(server) as api:
        execute(empty, "DROP TABLE todo.tasks")
        response = api.get("/tasks", headers=ORIGIN)
    refusal(response, 500, "internal_server_error", "Internal server error")
    assert response.headers["access-control-allow-origin"] == "https://app.example"


def test_a_page_of_an_allowed_origin_may_read_every_header_of_ours(api: Client) -> None:
    exposed = api.get("/health", headers=ORIGIN).headers["access-control-expose-headers"]
    ours = "Allow ETag Idempotent-Replayed Link Location RateLimit RateLimit-Policy Retry-After "
    assert set(exposed.split(", ")) == set((ours + "WWW-Authenticate X-Request-ID").split())


# What conftest.ORIGINS lets through, and what it does not.
ALLOWED = ["tauri://localhost", "https://app.example", "https://xn--bcher-kva.example"]
ALLOWED += ["https://a-b1.vercel.app", "https://todo-x.netlify.app", "http://[::1]:3000"]
ALLOWED += ["app://x.y:443"]
FOREIGN = ["https://evil.example", "http://app.example", "https://app.example:444", "null"]
FOREIGN += ["https://a.b.vercel.app", "https://.vercel.app", "https://a.vercel.app.evil.example"]
FOREIGN += ["https://evil.example/.vercel.app", "https://x.netlify.app", "https://xvercel.app"]


@parametrize("origin", [*ALLOWED, *FOREIGN])
def test_an_origin_is_allowed_by_its_setting_and_no_other(public: Client, origin: str) -> None:
    answer = public.get("/health", headers={"Origin": origin})
    allowed = answer.headers.get("access-control-allow-origin")
    assert allowed == (origin if origin in ALLOWED else None)


@parametrize("name", ["server", "federated"])  # some origins, and none
def test_a_refused_preflight_names_the_setting(request: pytest.FixtureRequest, name: str) -> None:
    asked = {"Origin": "https://evil.example", "Access-Control-Request-Method": "GET"}
    server: Server = request.getfixturevalue(name)
    response = httpx.options(server.url + "/tasks", headers=asked, verify=False)
    assert "CORS_ORIGINS" in line_of(server, response)["reason"]
    problem = refusal(response, 400, "origin_not_allowed")
    assert "CORS_ORIGINS" in problem["detail"]
    assert "Origin" in response.headers["vary"]


@parametrize("header", [{"Method": "BREW"}, {"Method": "GET", "Private-Network": "true"}])
def test_a_preflight_of_what_no_page_may_ask_is_a_problem(
    public: Client, header: dict[str, str]
) -> None:
    asked = {f"Access-Control-Request-{name}": value for name, value in header.items()}
    refusal(public.options("/tasks", headers=ORIGIN | asked), 400, "preflight_refused")


def test_a_preflight_is_answered_without_a_token(public: Client) -> None:
    asked = {
        "Access-Control-Request-Method": "PATCH",
        "Access-Control-Request-Headers": "authorization,content-type,idempotency-key",
    }
    response = public.options("/tasks/x/toggle", headers=ORIGIN | asked)
    assert response.status_code == 200
    assert "PATCH" in response.headers["access-control-allow-methods"]
    assert response.headers["access-control-allow-credentials"] == "true"


@parametrize(
    ("body", "authorized", "status"),
    [(ANNOUNCED, True, 413), (CHUNKED, True, 413), (ANNOUNCED, False, 413), (CHUNKED, False, 401)],
)
def test_a_large_body_is_refused_unread(
    server: Server, body: bytes, authorized: bool, status: int
) -> None:
    head = b"POST /tasks HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    if authorized:
        head += b"Authorization: Bearer " + token("u").encode() + b"\r\n"
    answer = raw(server, head + body)
    assert answer.startswith(b"HTTP/1.1 %d " % status)
    assert b"application/problem+json" in answer
    assert b"connection: close" in answer


# Identity.

LATER = 9999999999
CLAIMS = {"sub": "u", "exp": LATER}
BAD_TOKENS: dict[str, Callable[[], str]] = {
    "expired": lambda: token("u", exp=int(time.time()) - 1),
    "sub a lone surrogate": lambda: token("\ud800"),
    "another secret": lambda: jwt.encode(CLAIMS, "another secret of 32 bytes or more", "HS256"),
    "HS512": lambda: jwt.encode(CLAIMS, SECRET * 2, "HS512"),
    "unsigned": lambda: jwt.encode(CLAIMS, "", "none"),
    "alg None": lambda: jwt_by_hand({"alg": None}, CLAIMS),
    "alg a list": lambda: jwt_by_hand({"alg": ["HS256"]}, CLAIMS),
    "kid a list": lambda: jwt_by_hand({"alg": "HS256", "kid": [1]}, CLAIMS),
    "crit": lambda: jwt.encode(CLAIMS, SECRET, "HS256", headers={"crit": ["x"], "x": 1}),
    "EdDSA without keys": lambda: jwt.encode(CLAIMS, ed25519.Ed25519PrivateKey.generate(), "EdDSA"),
    "payload not JSON": lambda: "e30.e30.e30",
    "payload an array": lambda: jwt_by_hand({"alg": "HS256"}, []),
    "truncated": lambda: token("u")[:-1],
    "signature left out": lambda: token("u").rpartition(".")[0] + ".",
    "padded": lambda: token("u") + "=",
    "nested deep": lambda: jwt_by_hand({"alg": "HS256"}, json.loads("[" * 500 + "]" * 500)),
    "not base64": lambda: "a.b.c",
    "not ASCII": lambda: "\xe9.\xe9.\xe9",
}


@parametrize("kind", BAD_TOKENS)
def test_a_bad_token_is_401_with_a_challenge(public: Client, kind: str) -> None:
    headers: Any = {"Authorization": ("Bearer " + BAD_TOKENS[kind]()).encode("latin-1")}
    response = public.get("/tasks", headers=headers)
    assert response.status_code == 401
    assert response.json()["detail"] == "Could not validate credentials"
    challenge = response.headers["www-authenticate"]
    assert challenge.startswith('Bearer realm="todo", error="invalid_token"')


@parametrize("form", ["Bearer {} ", "Bearer  {}", "  Bearer   {}\t ", "bEARER {}"])
def test_white_space_around_a_token_and_the_case_of_bearer_do_not_matter(
    server: Server, form: str
) -> None:
    head = b"GET /tasks HTTP/1.1\r\nHost: x\r\nConnection: close\r\nAuthorization: "
    sent = head + form.format(token("u")).encode() + b"\r\n\r\n"
    assert raw(server, sent).startswith(b"HTTP/1.1 200 ")


@parametrize("sent", [[], [""], ["Basic dTpw"], ["Bearer"], ["Token {}"], ["Bearer {}"] * 2])
def test_none_or_two_tokens_are_401(public: Client, sent: list[str]) -> None:
    headers = [("Authorization", each.format(token("u"))) for each in sent]
    response = public.get("/tasks", headers=headers)
    assert response.status_code == 401
    assert ("error=" in response.headers["www-authenticate"]) is bool(sent)


def test_an_opaque_session_token_is_told_that_it_is_no_jwt(public: Client) -> None:
    response = public.get("/tasks", headers=bearer("Jq2mXw0dT5kN8aZr"))
    problem = refusal(response, 401, "token_not_jwt", "Could not validate credentials")
    assert "opaque session token" in problem["errors"][0]["msg"]
    assert "opaque session token" in response.headers["www-authenticate"]


def test_every_route_not_on_the_public_list_answers_401(public: Client) -> None:
    routes = documented_routes(public)
    assert routes >= PUBLIC
    for route in routes - PUBLIC:
        method, path = re.sub(r"{\w+}", "x", route).split()
        assert public.request(method, path, json={}).status_code == 401, route


# Accounts.

PASSWORD = "correct horse"
BAD_PASSWORDS = ["short77", "x" * 129, "п" * 7, None]
NO_EMAILS = ["", "a", "a@", "@b", "a b@c.de", "a@b\0c", "x" * 250 + "@b.de", "a@b@c", None, 7]
NO_EMAILS += ["İ" * 252 + "@b"]  # in lower case, each is two characters
EMAIL = "E-mail: needs an @ between two parts without spaces"
REFUSED: list[Any] = [("email", email, EMAIL) for email in NO_EMAILS]
REFUSED += [("password", each, "Password: 8 to 128 characters") for each in BAD_PASSWORDS]


def test_an_account_is_made_and_its_token_works(public: Client) -> None:
    email = new_email()
    sent = {"email": f" {email} ", "username": "ann", "password": PASSWORD}
    response = public.post("/auth/register", json=sent)
    answer = response.json()
    assert (response.status_code, response.headers["cache-control"]) == (201, "no-store")
    assert set(answer) == {"access_token", "token_type", "expires_in", "user"}
    assert (answer["token_type"], answer["user"]["email"]) == ("bearer", email)
    me = public.get("/auth/me", headers=bearer(answer["access_token"])).json()
    assert me == answer["user"]
    assert set(me) == {"id", "email", "created_at"}


@parametrize(("field", "value", "detail"), REFUSED)
def test_a_refused_account_says_what_the_field_takes(
    public: Client, field: str, value: Any, detail: str
) -> None:
    sent = {"email": new_email(), "password": PASSWORD} | {field: value}
    refusal(public.post("/auth/register", json=sent), 422, "unprocessable_content", detail)


@parametrize("password", ["", "x" * 1025, None])
def test_a_password_that_cannot_be_is_told_so_at_login(public: Client, password: Any) -> None:
    sent = {"email": new_email(), "password": password}
    detail = "password: has to be sent, in up to 1024 characters"
    refusal(public.post("/auth/login", json=sent), 422, "unprocessable_content", detail)


@parametrize(("method", "path", "names"), [
    ("POST", "/auth/login", "email and password"), ("POST", "/auth/register", "email and password"),
    ("PUT", "/auth/password", "current_password and new_password"),
])  # fmt: skip
def test_an_empty_body_is_told_what_has_to_be_sent(
    api: Client, method: str, path: str, names: str
) -> None:
    detail = f"{names} have to be sent"
    refusal(api.request(method, path, json={}), 422, "unprocessable_content", detail)


def test_of_two_registrations_at_once_one_is_409(public: Client) -> None:
    account = {"email": new_email(), "password": PASSWORD}
    with ThreadPoolExecutor(2) as pool:
        answers = list(pool.map(lambda _: public.post("/auth/register", json=account), range(2)))
    made, taken = sorted(answers, key=lambda answer: answer.status_code)
    assert made.status_code == 201
    refusal(taken, 409, "email_taken")


@parametrize(("path", "kind"), [("/auth/login", "json"), ("/auth/token", "data")])
def test_a_wrong_password_and_an_unknown_email_answer_alike(
    public: Client, account: Account, path: str, kind: str
) -> None:
    public.headers["X-Request-ID"] = "same"
    answers = []
    for email in (account["email"], new_email()):
        wrong: Any = {"email": email, "username": email, "password": "wrong"}
        answers.append(public.request("POST", path, **{kind: wrong}))
    refusal(answers[0], 401, "wrong_credentials", "Wrong e-mail or password")
    assert answers[0].content == answers[1].content


def test_a_password_of_8_to_128_characters_logs_in_and_one_that_differs_at_its_end_does_not(
    public: Client,
) -> None:
    def use(password: str) -> list[int]:
        account = {"email": new_email(), "password": password}
        wrong = account | {"password": password[:-1] + "y"}
        sent = [("register", account), ("login", account), ("login", wrong)]
        return [public.post("/auth/" + name, json=body).status_code for name, body in sent]

    passwords = ["п" * 40, "\U0001f9c0" * 128, "nul\0in 8"]
    with ThreadPoolExecutor(2) as pool:  # as many as are hashed at once
        assert list(pool.map(use, passwords)) == [[201, 200, 401]] * 3


def test_the_document_says_which_passwords_are_taken(public: Client) -> None:
    schemas = public.get("/openapi.json").json()["components"]["schemas"]
    password = schemas["Registration"]["properties"]["password"]
    assert (password["minLength"], password["maxLength"]) == (8, 128)


@pytest.fixture(scope="module")
def unlimited(database: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A service without a limit on requests, in the first minute of its limits on logins."""
    with serving(database, tmp_path_factory.mktemp("log") / "log", RATE_LIMIT="off") as server:
        yield server


def test_the_eleventh_login_in_a_minute_is_not_hashed(unlimited: Server) -> None:
    account = {"email": new_email(), "password": PASSWORD}
    with client(unlimited) as api, ThreadPoolExecutor(4) as pool:
        assert api.post("/auth/register", json=account).status_code == 201
        sent = [pool.submit(api.post, "/auth/login", json=account) for _ in range(14)]
    answers = sorted([each.result() for each in sent], key=lambda answer: answer.status_code)
    assert [answer.status_code for answer in answers] == [200] * 9 + [429] * 5  # register was one
    response = answers[9]
    refusal(response, 429, "too_many_requests")
    assert 1 <= int(response.headers["retry-after"]) <= 60
    assert response.headers["ratelimit-policy"] == '"account";q=10;w=60'
    hashed, refused = answers[:9], answers[9:]
    assert min(each.elapsed for each in refused) < min(each.elapsed for each in hashed) / 2


def test_a_current_password_counts_as_a_login(unlimited: Server) -> None:
    account = {"email": new_email(), "password": PASSWORD}
    with client(unlimited) as api, ThreadPoolExecutor(4) as pool:
        made = api.post("/auth/register", json=account).json()
        api.headers.update(bearer(made["access_token"]))
        wrong = {"current_password": "wrong", "password": "wrong", "new_password": PASSWORD}
        calls = [CONFIRMED[n % 2][:2] for n in range(10)]
        codes = pool.map(lambda call: api.request(*call, json=wrong).status_code, calls)
        assert sorted(codes) == [401] * 9 + [429]
        response = api.post("/auth/login", json=account)
    detail = refusal(response, 429, "too_many_requests")["detail"]
    wait = response.headers["retry-after"]
    assert re.fullmatch(rf"Too many attempts: try again in {wait} seconds?", detail)


def test_a_user_of_an_outside_issuer_has_no_row_before_the_first_task(api: Client) -> None:
    before = api.get("/auth/me").json()
    assert (before["email"], before["created_at"]) == (None, None)
    api.post("/tasks", json={"title": "x"})
    assert api.get("/auth/me").json()["created_at"] is not None


CONFIRMED: list[Any] = [
    ("PUT", "/auth/password", {"current_password": PASSWORD, "new_password": "battery staple"}),
    ("DELETE", "/auth/me", {"password": PASSWORD}),
]


@pytest.fixture
def ann(public: Client, account: Account) -> Client:
    """A client with a token of the account."""
    answer = public.post("/auth/login", json=account).json()
    public.headers.update(bearer(answer["access_token"]))
    return public


def test_a_changed_password_logs_in_and_the_old_one_does_not(ann: Client, account: Account) -> None:
    method, path, body = CONFIRMED[0]
    response = ann.request(method, path, json=body)
    assert (response.status_code, response.content) == (204, b"")
    changed = account | {"password": "battery staple"}
    assert ann.post("/auth/login", json=changed).status_code == 200
    assert ann.post("/auth/login", json=account).status_code == 401
    assert ann.get("/auth/me").status_code == 200  # a token is good until it ends


def test_of_two_changes_of_a_password_at_once_one_is_401(ann: Client, account: Account) -> None:
    bodies = [{"current_password": PASSWORD, "new_password": letter * 8} for letter in "ab"]
    with ThreadPoolExecutor(2) as pool:
        answers = list(pool.map(lambda body: ann.put("/auth/password", json=body), bodies))
    codes = [ann.post("/auth/login", json=account | {"password": n * 8}).status_code for n in "ab"]
    changed, refused = sorted(answers, key=lambda answer: answer.status_code)
    assert changed.status_code == 204
    refusal(refused, 401, "wrong_password")
    assert codes[answers.index(changed)] == 200


def test_a_deleted_account_is_gone_with_its_tasks(
    ann: Client, account: Account, database: str
) -> None:
    task = ann.post("/tasks", json={"title": "x"}).json()
    method, path, body = CONFIRMED[1]
    assert ann.request(method, path, json=body).status_code == 204
    with psycopg.connect(database) as connection:
        left = connection.execute("SELECT FROM todo.tasks WHERE id = %s", [task["id"]])
        assert left.rowcount == 0
    codes = [ann.get("/auth/me"), ann.post("/tasks", json={"title": "x"})]
    codes += [ann.request(*call[:2], json=call[2]) for call in CONFIRMED]
    assert {response.status_code for response in codes} == {401}
    assert ann.post("/auth/login", json=account).json()["code"] == "wrong_credentials"


@parametrize(("method", "path", "body"), CONFIRMED)
def test_a_wrong_current_password_is_401_and_changes_nothing(
    ann: Client, account: Account, method: str, path: str, body: dict[str, str]
) -> None:
    wrong = {name: value.replace(PASSWORD, "wrong") for name, value in body.items()}
    response = ann.request(method, path, json=wrong)
    refusal(response, 401, "wrong_password", "Wrong current password")
    assert "error=" not in response.headers["www-authenticate"]  # the token is good
    assert ann.post("/auth/login", json=account).status_code == 200


@parametrize(("method", "path", "body"), CONFIRMED)
@parametrize("tasks", [[], ["x"]])
def test_a_user_of_an_outside_issuer_has_no_password(
    api: Client, method: str, path: str, body: dict[str, str], tasks: list[str]
) -> None:
    for title in tasks:
        api.post("/tasks", json={"title": title})
    refusal(api.request(method, path, json=body), 404, "account_not_found")
    assert len(api.get("/tasks").json()) == len(tasks)


# Safe to retry, safe to share.

KEY = {"Idempotency-Key": "k1"}


def test_a_retry_with_the_same_key_gives_the_task_first_stored_as_it_is_now(api: Client) -> None:
    first = api.post("/tasks", json={"title": "x"}, headers={"Idempotency-Key": '"k1"'})
    changed = api.put(first.headers["location"], json={"title": "y"}).json()
    again = api.post("/tasks", json={"title": "x"}, headers=KEY)
    assert (first.status_code, again.status_code) == (201, 201)
    assert "idempotent-replayed" not in first.headers
    assert again.headers["idempotent-replayed"] == "true"
    assert [changed] == [again.json()] == api.get("/tasks").json()


def test_the_same_key_with_another_body_is_422(api: Client) -> None:
    api.post("/tasks", json={"title": "x"}, headers=KEY)
    for other in ({"title": "y"}, {"description": "y"}, {"completed": True}):
        again = api.post("/tasks", json={"title": "x"} | other, headers=KEY)
        refusal(again, 422, "key_reused")
    assert len(api.get("/tasks").json()) == 1


def test_keys_are_private_to_their_user(server: Server) -> None:
    with client(server, **KEY) as one, client(server, **KEY) as other:
        ids = {api.post("/tasks", json={"title": "x"}).json()["id"] for api in (one, other)}
    assert len(ids) == 2


def test_deleting_the_task_frees_its_key(api: Client) -> None:
    task = api.post("/tasks", json={"title": "x"}, headers=KEY).json()
    api.delete("/tasks/" + task["id"])
    assert api.post("/tasks", json={"title": "y"}, headers=KEY).status_code == 201


@parametrize("key", ["", '""', '"', "a b", "x" * 256, '"' + "x" * 256 + '"', "\xe9"])
def test_any_other_key_is_400(api: Client, key: str) -> None:
    headers: Any = {"Idempotency-Key": key.encode("latin-1")}
    refusal(api.post("/tasks", json={"title": "x"}, headers=headers), 400, "bad_request")


def test_a_thousand_creates_with_a_hundred_keys_leave_a_hundred_tasks(api: Client) -> None:
    def create(n: int) -> int:
        body, key = {"title": f"task {n % 100}"}, {"Idempotency-Key": f"k{n % 100}"}
        return api.post("/tasks", json=body, headers=key).status_code

    with ThreadPoolExecutor(16) as pool:
        assert set(pool.map(create, range(1000))) == {201}
    assert len(api.get("/tasks").json()) == 100


def test_every_write_advances_the_etag(api: Client) -> None:
    created = api.post("/tasks", json={"title": "x"})
    path = created.headers["location"]
    changed = api.patch(path, json={"title": "y"})
    toggled = api.patch(path + "/toggle")
    replaced = api.put(path, json={"title": "y"})
    tags = [answer.headers["etag"] for answer in (created, changed, toggled, replaced)]
    assert len(set(tags)) == 4
    assert all(re.fullmatch(r'"[^"]+"', tag) for tag in tags)
    assert api.get(path).headers["etag"] == tags[-1]


CURRENT = [["{}"], ["W/{}"], ['"other", {}'], ["*"], ['"a,b",W/{} ,"c"']]
CURRENT += [['"x"', "{}"], ["{}", '"x"'], ['"\xe9", {}']]  # in two lines; not ASCII


@parametrize("tags", CURRENT)
def test_if_none_match_with_the_current_etag_is_304(
    api: Client, task: Task, tags: list[str]
) -> None:
    path = "/tasks/" + task["id"]
    etag = api.get(path).headers["etag"]
    sent = [tag.format(etag).encode("latin-1") for tag in tags]
    response = api.get(path, headers=[(b"If-None-Match", each) for each in sent])
    assert (response.status_code, response.content) == (304, b"")
    assert response.headers["etag"] == etag
    assert api.get(path, headers={"If-None-Match": '"other"'}).status_code == 200


def test_a_polling_client_gets_304_until_something_changes(api: Client, task: Task) -> None:
    headers = {"If-None-Match": api.get("/tasks").headers["etag"]}
    assert api.get("/tasks", headers=headers).status_code == 304
    api.patch(f"/tasks/{task['id']}/toggle")
    assert api.get("/tasks", headers=headers).status_code == 200


@parametrize("call", CALLS)
def test_if_match_lets_only_that_version_change(api: Client, task: Task, call: Call) -> None:
    current = api.get("/tasks/" + task["id"]).headers["etag"]
    parts = [current.partition("-")[0] + '"', current.strip('"'), f'"0{current[1:]}', current + "x"]
    for stale in ('"99"', "W/" + current, '"x"', '""', "", *parts):
        response = send(api, call, task["id"], **{"If-Match": stale})
        refusal(response, 412, "precondition_failed")
    assert api.get("/tasks/" + task["id"]).json() == task
    assert send(api, call, task["id"], **{"If-Match": f'"7", {current}'}).is_success


@parametrize("call", CALLS[1:])
def test_if_none_match_lets_any_other_version_change(api: Client, task: Task, call: Call) -> None:
    current = api.get("/tasks/" + task["id"]).headers["etag"]
    for same in (current, "W/" + current, f'"x", {current}', "*"):
        response = send(api, call, task["id"], **{"If-None-Match": same})
        refusal(response, 412, "precondition_failed")
    both = {"If-Match": current, "If-None-Match": current}
    refusal(send(api, call, task["id"], **both), 412, "precondition_failed")
    assert api.get("/tasks/" + task["id"]).json() == task
    others = f'"x", {current.replace("1-", "7-", 1)}, {current.replace("1-", "3-", 1)}'
    assert send(api, call, task["id"], **{"If-None-Match": others}).is_success


def test_an_etag_has_the_version_of_a_task_and_the_form_of_the_answer(
    api: Client, task: Task
) -> None:
    assert api.get("/tasks/" + task["id"]).headers["etag"] == f'"1-{db.SHAPE}"'
    assert hashlib.sha256(db.COLUMNS.encode()).hexdigest().startswith(db.SHAPE)


@parametrize(("method", "name"), [("GET", "If-None-Match"), ("PUT", "If-Match")])
def test_a_longer_condition_is_422(api: Client, task: Task, method: str, name: str) -> None:
    path, headers = "/tasks/" + task["id"], {name: '"1"' + " " * 4096 + "x"}
    response = api.request(method, path, json={"title": "y"}, headers=headers)
    refusal(response, 422, "unprocessable_content")
    assert api.get(path).json() == task


def test_of_a_hundred_writers_with_one_etag_exactly_one_wins(api: Client, task: Task) -> None:
    etag = api.get("/tasks/" + task["id"]).headers["etag"]

    def write(n: int) -> int:
        body, version = {"title": f"t{n}"}, {"If-Match": etag}
        return api.put("/tasks/" + task["id"], json=body, headers=version).status_code

    with ThreadPoolExecutor(16) as pool:
        codes = list(pool.map(write, range(100)))
    assert (codes.count(200), codes.count(412)) == (1, 99)


# Issuers.

ALGORITHMS = ["EdDSA", "ES256", "RS256"]
OTHER = "https://other.example"
MINE = {"user_id": "u", "iss": "https://issuer.example", "aud": "todo", "exp": LATER}


@parametrize("alg", ALGORITHMS)
def test_a_token_of_the_issuer_is_good(federated: Server, issuer: Issuer, alg: str) -> None:
    assert status(federated, issuer.token(alg, user_id="u")) == 200


@parametrize("form", [Encoding.PEM, Encoding.DER])
@parametrize("alg", ALGORITHMS)
def test_a_public_key_is_no_secret(federated: Server, issuer: Issuer, alg: str, form: Any) -> None:
    kid, key = issuer.keys[alg]
    secret = key.public_key().public_bytes(form, PublicFormat.SubjectPublicKeyInfo)
    forged = jwt_by_hand({"alg": "HS256", "kid": kid}, MINE, secret)
    assert status(federated, forged) == 401


@parametrize(("alg", "key"), [("RS512", "RS256"), ("PS256", "RS256"), ("ES256", "ES256")])
def test_a_key_verifies_only_its_own_algorithm(
    federated: Server, issuer: Issuer, alg: str, key: str
) -> None:
    kid = issuer.keys["RS256"][0]
    assert status(federated, jwt.encode(MINE, issuer.keys[key][1], alg, {"kid": kid})) == 401


@parametrize("name", ["jwk", "jku", "x5u"])
def test_a_key_in_the_token_is_never_used(federated: Server, issuer: Issuer, name: str) -> None:
    assert status(federated, issuer.token(user_id="u")) == 200
    key = ed25519.Ed25519PrivateKey.generate()
    jwk = jwt.algorithms.OKPAlgorithm.to_jwk(key.public_key(), as_dict=True)
    header = {name: jwk if name == "jwk" else issuer.url + "/evil"}
    forged = jwt.encode(MINE, key, "EdDSA", {"kid": issuer.keys["EdDSA"][0], **header})
    assert status(federated, forged) == 401
    assert issuer.paths == {"/jwks"}


@pytest.fixture
def without_cryptography(tmp_path: Path) -> dict[str, str]:
    """Settings of a service that finds no package cryptography."""
    (tmp_path / "sitecustomize.py").write_text("import sys; sys.modules['cryptography'] = None")
    return {"PYTHONPATH": str(tmp_path)}


def test_the_secret_alone_needs_no_cryptography(
    database: str, tmp_path: Path, without_cryptography: dict[str, str]
) -> None:
    account = {"email": new_email(), "password": PASSWORD}
    with serving(database, tmp_path / "log", **without_cryptography) as server:
        made = post(server.url + "/auth/register", json=account).json()
        assert status(server, made["access_token"]) == status(server, token("u")) == 200
        forged = jwt.encode(MINE, ed25519.Ed25519PrivateKey.generate(), "EdDSA")
        assert status(server, forged) == 401


def test_a_jwks_without_cryptography_stops_the_start(
    database: str, without_cryptography: dict[str, str]
) -> None:
    ended = start(database, JWT_JWKS_URL="https://issuer.example/jwks", **without_cryptography)
    [line] = ended.stderr.splitlines()
    assert ended.returncode == 1
    assert "JWT_JWKS_URL" in line and "pip install 'PyJWT[crypto]'" in line


def test_better_auths_secret_works_and_accounts_can_be_off(database: str, tmp_path: Path) -> None:
    secret = {"JWT_SECRET": "", "BETTER_AUTH_SECRET": SECRET, "JWT_USER_CLAIM": "user_id"}
    with serving(database, tmp_path / "log", ACCOUNTS="off", **secret) as server:
        assert status(server, token("u", user_id="u1")) == 200
        assert status(server, token("u")) == 401
        assert post(server.url + "/auth/register", json={}).status_code == 404


# Limits and logs.


def test_a_user_above_the_rate_limit_is_429_alone(database: str, tmp_path: Path) -> None:
    with serving(database, tmp_path / "log", RATE_LIMIT="5/hour") as server:
        with client(server) as api:
            assert [api.get("/tasks").status_code for _ in range(5)] == [200] * 5
            response = api.get("/auth/me")
            assert {api.get("/health").status_code for _ in range(10)} == {200}
        assert status(server, token("another")) == 200
    refusal(response, 429, "too_many_requests")
    wait = int(response.headers["retry-after"])
    assert 1 <= wait <= 3600
    assert response.headers["ratelimit-policy"] == '"user";q=5;w=3600'
    assert response.headers["ratelimit"] == f'"user";r=0;t={wait}'


def test_the_rate_limit_can_be_off(unlimited: Server) -> None:
    with client(unlimited) as api:
        assert {api.get("/tasks/x").status_code for _ in range(700)} == {404}


def test_however_many_ask_whether_it_is_ready_the_database_is_asked_once_in_5_seconds(
    server: Server, database: str
) -> None:
    asked = "SELECT FROM pg_stat_activity WHERE datname = current_database() "
    asked += "AND query = %s AND query_start > %s"
    with client(server) as api, psycopg.connect(database, autocommit=True) as connection:
        api.get("/tasks")  # an answer of the database, with which the 5 seconds begin
        [(begun,)] = connection.execute("SELECT clock_timestamp()")
        assert {api.get("/health/ready").status_code for _ in range(50)} == {200}
        assert connection.execute(asked, [db.PING.text.decode(), begun]).rowcount == 0


def line_of(server: Server, response: Response) -> dict[str, Any]:
    """The only log line of the request that the response answers."""
    id = response.headers["x-request-id"]
    wait_until(lambda: id in server.output.read_text())
    [line] = [line for line in server.log() if line.get("request_id") == id]
    return line


def test_a_request_is_one_line_of_json(server: Server) -> None:
    with client(server, 'quo"ted') as api:
        response = api.get("/api/me/tasks/" + NOBODYS_ID)
    line = line_of(server, response)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z", line.pop("time"))
    assert line.pop("duration_ms") > 0
    assert line == {
        "level": "INFO", "message": "request", "method": "GET", "status": 404,
        "request_id": response.headers["x-request-id"],
        "route": "/api/{user_id}/tasks/{task_id}", "user_id": 'quo"ted',
        "client": "127.0.0.1",
    }  # fmt: skip


def test_nothing_secret_is_logged(server: Server, database: str, account: Account) -> None:
    with client(server, **bearer(good := token("u"))) as api:
        api.post("/tasks", json={"title": "a secret title"})
        api.post("/tasks", json={"title": ["a secret title"]})
        api.get("/tasks", params={"after": "a secret query"})
        api.get("/a secret path")
        wrong = {"username": account["email"], "password": "a secret password"}
        api.post("/auth/token", data=wrong)
    log = server.output.read_text()
    secrets = ["a secret", "a%20secret", good, SECRET, database, *account.values()]
    assert [secret for secret in secrets if secret in log] == []


# Start and stop.

WRONG_SETTINGS: list[tuple[dict[str, str], str]] = [
    ({"DATABASE_URL": "nonsense hunter2"}, "DATABASE_URL"),
    ({"JWT_SECRET": ""}, "JWT_SECRET"),
    ({"ACCOUNTS": "on", "JWT_SECRET": "", "BETTER_AUTH_SECRET": SECRET}, "ACCOUNTS"),
]


def test_one_line_names_a_wrong_setting(database: str) -> None:
    with ThreadPoolExecutor(4) as pool:
        ends = pool.map(lambda wrong: start(database, **wrong[0]), WRONG_SETTINGS)
        for ended, (settings, named) in zip(ends, WRONG_SETTINGS, strict=True):
            [line] = ended.stderr.splitlines()
            assert ended.returncode == 1, settings
            assert named in line, settings
            assert "hunter2" not in line


def test_the_schema_can_be_applied_by_hand_any_number_of_times(database: str) -> None:
    with psycopg.connect(database) as connection:
        for _ in range(2):
            connection.execute((HERE / "schema.sql").read_bytes())


def test_ids_rise_with_time_to_the_microsecond(database: str) -> None:
    with psycopg.connect(database) as connection:
        rows = connection.execute("SELECT todo.uuidv7() FROM generate_series(1, 1000)")
        ids, now = [row[0] for row in rows], time.time()
    times = [int.from_bytes(id.bytes[:6]) / 1000 for id in ids]
    assert times == sorted(times)
    assert abs(times[0] - now) < 30
    assert len(set(ids)) == 1000
    assert {(id.version, id.variant) for id in ids} == {(7, uuid.RFC_4122)}


TOLD = [
    ({"user_id": None}, "has no claim user_id"),
    ({"exp": None}, "has no claim exp"),
    ({"iss": None}, "has no claim iss"),
    ({"aud": None}, "has no claim aud"),
    *[({"user_id": value}, "claim user_id is not a text") for value in (7, "", "a\nb")],
    ({"exp": "tomorrow"}, "claim exp is not a number"),
    ({"exp": []}, "claim exp is not a number"),
    ({"nbf": ""}, "claim nbf is not a number"),
    ({"exp": LATER * 1000}, "claim exp is not a number of seconds"),
    ({"iat": "9"}, "claim iat is not a number"),
    ({"nbf": True}, "claim nbf is not a number"),
    ({"nbf": LATER}, "claim nbf is in the future"),
    ({"iat": LATER}, "claim iat is in the future"),
    ({"iss": "https://other.example"}, "another issuer"),
    ({"aud": ["other todo", "todo2"]}, "another audience"),
]


@parametrize(("claims", "words"), TOLD)
def test_a_token_that_is_well_signed_is_told_which_claim_is_wrong(
    federated: Server, issuer: Issuer, claims: dict[str, Any], words: str
) -> None:
    mine = {name: value for name, value in (MINE | claims).items() if value is not None}
    kid, key = issuer.keys["EdDSA"]
    sent = jwt.PyJWS().encode(json.dumps(mine).encode(), key, "EdDSA", {"kid": kid})
    response = get(federated.url + "/tasks", headers=bearer(sent))
    assert response.status_code == 401
    assert words in response.headers["www-authenticate"]
    assert words in response.json()["errors"][0]["msg"]
    assert words in line_of(federated, response)["reason"]
    assert "other" not in response.headers["www-authenticate"].replace("another", "")


@parametrize("change", [{}, {"exp": 1}, {"iss": OTHER}])
def test_a_token_that_is_not_well_signed_is_told_nothing(
    federated: Server, issuer: Issuer, change: dict[str, Any]
) -> None:
    forged = jwt.encode(MINE | change, ed25519.Ed25519PrivateKey.generate(), "EdDSA")
    response = get(federated.url + "/tasks", headers=bearer(forged))
    assert response.headers["www-authenticate"] == 'Bearer realm="todo", error="invalid_token"'
    assert "errors" not in response.json()
    assert line_of(federated, response)["reason"] == "Signature verification failed"


def test_every_401_and_403_is_logged_with_a_reason(server: Server, api: Client) -> None:
    refused = [get(server.url + "/tasks"), get(server.url + "/auth/me", headers=bearer("x"))]
    refused += [api.get("/api/someone/tasks")]
    bad = [
        {"Authorization": "Basic x"},
        *[bearer(make()) for make in list(BAD_TOKENS.values())[:9]],
    ]
    refused += [get(server.url + "/tasks", headers=headers) for headers in bad]
    assert {response.status_code for response in refused} == {401, 403}
    reasons = [line_of(server, response)["reason"] for response in refused]
    assert all(reason not in ("", "invalid_token") for reason in reasons)


def test_start_and_stop_are_logged_and_every_line_is_json(database: str, tmp_path: Path) -> None:
    with serving(database, tmp_path / "log") as server:
        pass
    lines = server.log()
    assert len(lines) == len(server.output.read_text().splitlines())
    messages = {line["message"] for line in lines}
    assert {"Application startup complete.", "Application shutdown complete."} <= messages
