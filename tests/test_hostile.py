"""Any request whatsoever: never a 5xx, never an unhandled exception, nothing stored half."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from httpx import Client

from conftest import Server, raw, token

parametrize = pytest.mark.parametrize


GET = b"GET /tasks HTTP/1.1\r\nHost: x\r\n"
POST = b"POST /tasks HTTP/1.1\r\nHost: x\r\n"
FORM = b"POST /auth/token HTTP/1.1\r\nHost: x\r\nContent-Type: "
HOSTILE = [
    b"\x00\xff" * 500,
    b"GET\r\n\r\n",
    b"GET / HTTP/9.9\r\n\r\n",
    b"GET /tasks HTTP/1.1\r\n\r\n",
    b"GET /tasks HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
    b"GET /" + b"a" * 60_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
    b"GET /tasks/\xff\xfe HTTP/1.1\r\nHost: x\r\n\r\n",
    b"GET /tasks/%ff%fe%00 HTTP/1.1\r\nHost: x\r\n\r\n",
    b"GET /tasks?limit=%ff&completed=%00 HTTP/1.1\r\nHost: x\r\n\r\n",
    b"GET http://other/tasks HTTP/1.1\r\nHost: x\r\n\r\n",
    b"GET * HTTP/1.1\r\nHost: x\r\n\r\n",
    b"OPTIONS * HTTP/1.1\r\nHost: x\r\n\r\n",
    GET + b"X: " + b"y" * 60_000 + b"\r\n\r\n",
    GET + b"Authorization: Bearer " + b"y" * 60_000 + b"\r\n\r\n",
    GET + b"Authorization: \xff\xfe\r\n\r\n",
    GET + b"Authorization: Bearer \xe9.\xe9.\xe9\r\n\r\n",
    GET + b"X-Request-ID: a\xffb\r\nOrigin: \xff\r\n\r\n",
    POST + b"Content-Length: -1\r\n\r\n",
    POST + b"Content-Length: 1e3\r\n\r\n",
    POST + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\nhello",
    POST + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    POST + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n",
    POST + b"Transfer-Encoding: gzip\r\n\r\n",
    POST + b"Expect: 100-continue\r\nContent-Length: 200000000\r\n\r\n",
    FORM + b"multipart/form-data\r\nContent-Length: 1\r\n\r\nx",
    FORM + b"multipart/form-data; boundary=a\r\nContent-Length: 9\r\n\r\n--a\r\n\xff\xfe\r\n",
    FORM + b"application/x-www-form-urlencoded\r\nContent-Length: 40\r\n\r\n"
    + b"username=%ff%00&password=%ed%a0%80&&&&==",
]  # fmt: skip


@parametrize("request_", HOSTILE)
def test_hostile_bytes_are_a_4xx_or_a_closed_connection(server: Server, request_: bytes) -> None:
    answer = raw(server, request_, seconds=1)
    assert re.match(rb"HTTP/1.1 (4\d\d|200|307) ", answer) or answer == b"", answer[:200]


BODIES = [
    b'{"title": "a", "\\ud800": 1}',
    b'{"title": "\\ud83e\\uddc0"}',
    b'{"title": "x", "title": "y"}',
    b'{"title": "x", "completed": 1e400}',
    b'{"title": "x", "priority": NaN}',
    '{"title": "x"}'.encode("utf-16"),
    '{"title": "x"}'.encode("utf-8-sig"),
    b'{"title": "x"}\x00',
    b'{"title": ' * 10_000,
    b'{"a":' * 20_000 + b"1" + b"}" * 20_000,
    b"[" * 100_000,
    b"\xed\xa0\x80",
    b'{"title": "\\u0000"}',
    b'{"__proto__": {"title": "x"}}',
    b'{"title": {"$ne": null}}',
    b"null",
    b"",
]


ROUTES = ["POST /tasks", "PUT /tasks/{id}", "PATCH /tasks/{id}/toggle", "POST /auth/login"]


@parametrize("body", BODIES)
@parametrize("route", ROUTES)
def test_no_body_is_a_5xx_and_what_is_refused_is_not_stored(
    api: Client, body: bytes, route: str
) -> None:
    task = api.post("/tasks", json={"title": "x"}).json()
    method, path = route.format(id=task["id"]).split()
    headers = {"Content-Type": "application/json", "X-Forwarded-For": f"10.3.{len(body) % 250}.1"}
    response = api.request(method, path, content=body, headers=headers)
    assert response.status_code < 500
    if response.is_error:
        assert api.get("/tasks").json() == [task]


@pytest.mark.slow
def test_schemathesis_finds_no_fault_and_reaches_no_other_users_task(
    server: Server, api: Client, tmp_path: Path
) -> None:
    task = api.post("/tasks", json={"title": "theirs"}).json()
    # A stale If-Match is looked at before a body of null, which stands for none.
    refused = [400, 401, 403, 404, 405, 412, 413, 415, 422, 429]
    # Good data may meet what is stored (409), a precondition (412) or no account (404).
    good = ["2xx", 304, 401, 403, 404, 409, 412, 429]
    negative = "checks.negative_data_rejection.expected-statuses"
    positive = "checks.positive_data_acceptance.expected-statuses"
    config = f"{negative} = {refused}\n{positive} = {good}\n"
    # A 422 may be an Idempotency-Key that came with another body, or two names that differ. A
    # parameter of a list may be sent without a value, as an object without members is.
    for method, also in (("POST", []), ("GET", [200])):
        names = [f"{method} {path}" for path in ("/tasks", "/api/{user_id}/tasks")]
        config += f"[[operations]]\ninclude-name = {names}\n"
        config += f"{positive} = {[*good, 422]}\n{negative} = {[*refused, *also]}\n"
    # A body of null stands for none.
    toggles = '"/(toggle|complete)$"'
    config += f"[[operations]]\ninclude-path-regex = {toggles}\n{negative} = {[*refused, 200]}\n"
    (tmp_path / "toml").write_text(config)
    options = ["--checks", "all", "--max-examples", "30"]
    options += ["--suppress-health-check", "all", "-H", "Authorization: Bearer " + token("schema")]
    program = str(Path(sys.executable).parent / "schemathesis")
    command = [program, "--config-file", str(tmp_path / "toml"), "run", *options]
    command += [server.url + "/openapi.json"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert ended.returncode == 0, ended.stdout[-5000:]
    assert api.get("/tasks").json() == [task]
