"""What holds with other people's tools: linters, generators, Better Auth, hosts, Redis and others.

The packages from npm are pinned below and kept in .data/npm. A test is skipped only where its
program is not installed, and says so. Most need Node and npm, some chromium or redis-server.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import threading
import tomllib
import uuid
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from ipaddress import ip_network
from pathlib import Path
from typing import Any
from urllib.parse import quote

import psycopg
import pytest
import yaml
from httpx import Client
from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceRequest
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from conftest import (
    HERE,
    NOBODYS_ID,
    PATH,
    SECRET,
    SETTINGS,
    Server,
    Task,
    bearer,
    client,
    copy_service,
    free_port,
    get,
    outside,
    post,
    service_files,
    serving,
    status,
    token,
    wait_for_start,
)
from lib import middleware, serve

parametrize = pytest.mark.parametrize
ERROR = "pgpipeline.errors.UnexpectedError"  # the exception that a missing table causes
ORIGIN = {"Origin": "https://app.example"}
JSON = {"Content-Type": "application/json"}


# Better Auth.

BETTER_AUTH = """
import { createServer } from "node:http";
import { betterAuth } from "better-auth";
import { memoryAdapter } from "better-auth/adapters/memory";
import { toNodeHandler } from "better-auth/node";
import { jwt } from "better-auth/plugins";

const [url, secret] = process.argv.slice(2);
const auth = betterAuth({
  baseURL: url,
  secret,
  database: memoryAdapter({ user: [], session: [], account: [], verification: [], jwks: [] }),
  emailAndPassword: { enabled: true },
  plugins: [jwt()],
});
createServer(toNodeHandler(auth)).listen(new URL(url).port, "127.0.0.1");
"""


@pytest.fixture
def better_auth(workshop: Path) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """Better Auth as its manual sets it up, at an address of its own."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    (workshop / "issuer.mjs").write_text(BETTER_AUTH)
    quiet = os.environ | {"BETTER_AUTH_TELEMETRY": "0"}
    with subprocess.Popen(["node", "issuer.mjs", url, SECRET], cwd=workshop, env=quiet) as process:
        wait_for_start(process, port)
        yield url, process
        process.kill()


def test_a_user_of_better_auth_is_a_user_here_also_while_better_auth_is_down(
    better_auth: tuple[str, subprocess.Popen[bytes]], database: str, tmp_path: Path
) -> None:
    url, process = better_auth
    with Client(base_url=url + "/api/auth", headers={"Origin": url}, verify=False) as browser:
        ann = {"name": "Ann", "email": "ann@example.com", "password": "correct horse"}
        user = browser.post("/sign-up/email", json=ann).raise_for_status().json()["user"]
        first, second = (bearer(browser.get("/token").json()["token"]) for _ in range(2))
    settings = {"JWT_JWKS_URL": url + "/api/auth/jwks", "JWT_ISSUER": url, "JWT_AUDIENCE": url}
    with serving(database, tmp_path / "log", JWT_SECRET="", **settings) as server:
        made = post(f"{server.url}/api/{user['id']}/tasks", json={"title": "x"}, headers=first)
        assert (made.status_code, made.json()["user_id"]) == (201, user["id"])
        assert get(server.url + "/auth/me", headers=first).json()["id"] == user["id"]
        process.kill()
        process.wait()
        for known in (first, second):  # the service has not seen the second before
            assert get(server.url + "/tasks", headers=known).json() == [made.json()]


def test_better_auths_secret_verifies_the_frontends_tokens(database: str, tmp_path: Path) -> None:
    with serving(database, tmp_path / "log", JWT_SECRET="", BETTER_AUTH_SECRET=SECRET) as server:
        assert status(server, token("a user of Better Auth")) == 200


# What real frontends send.


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
    body = task | {"completed": True, "priority": "high", "tags": []}
    changed = api.put("/tasks/" + task["id"], json=body).json()
    assert changed["completed"] is changed["is_completed"] is True


@parametrize("headers", [{}, JSON])
def test_a_delete_may_say_that_its_missing_body_is_json(
    api: Client, task: Task, headers: dict[str, str]
) -> None:
    assert api.delete("/tasks/" + task["id"], headers=headers).status_code == 200


ROOTS = ["/api/me/tasks/", "/api/v1/tasks", "/api/v1/todos/", "/api/tasks/", "/todos"]


@parametrize("root", ROOTS)
def test_a_day_of_a_frontend_at_its_own_address(api: Client, root: str) -> None:
    created = api.post(root, json={"title": "x", "description": ""})
    path = root.rstrip("/") + "/" + created.json()["id"]
    assert [task["id"] for task in api.get(root).json()] == [created.json()["id"]]
    assert api.put(path, json={"title": "y"}).json()["title"] == "y"
    assert api.patch(path + "/complete/", json={}).json()["completed"] is True
    assert (created.status_code, api.delete(path + "/").status_code) == (201, 200)


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


# Observability.


class Collector:
    """An OTLP/HTTP endpoint on loopback, with what arrived at it."""

    def __init__(self) -> None:
        self.received: dict[str, list[bytes]] = {
            "/v1/traces": [],
            "/v1/metrics": [],
            "/v1/logs": [],
        }
        received = self.received

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                received[self.path].append(self.rfile.read(int(self.headers["Content-Length"])))
                self.send_response(200)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def spans(self) -> list[Any]:
        bodies = self.received["/v1/traces"]
        groups = [g for b in bodies for g in ExportTraceServiceRequest.FromString(b).resource_spans]
        return [span for group in groups for scope in group.scope_spans for span in scope.spans]

    def points(self, name: str) -> list[dict[str, Any]]:
        bodies = self.received["/v1/metrics"]
        requests = [ExportMetricsServiceRequest.FromString(body) for body in bodies]
        scopes = [s for r in requests for group in r.resource_metrics for s in group.scope_metrics]
        metrics = [metric for scope in scopes for metric in scope.metrics if metric.name == name]
        return [plain(point) for metric in metrics for point in metric.histogram.data_points]

    def logs(self) -> list[dict[str, Any]]:
        bodies = self.received["/v1/logs"]
        groups = [g for b in bodies for g in ExportLogsServiceRequest.FromString(b).resource_logs]
        scopes = [scope for group in groups for scope in group.scope_logs]
        return [plain(record) for scope in scopes for record in scope.log_records]


def plain(part: Any) -> dict[str, Any]:
    """The attributes of a span, point or log record."""
    return {each.key: each.value.string_value or each.value.int_value for each in part.attributes}


SECRET_TITLE = "a title that nobody may read in a trace"


@pytest.fixture(scope="module")
def collector(database: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Collector]:
    """A collector with all that one service sent, which served a task, failed once and ended."""
    collector = Collector()
    settings = {"FASTAPI_OTEL_AUTO_CONFIGURE": "true"}
    settings |= {"OTEL_EXPORTER_OTLP_ENDPOINT": collector.url}
    log = tmp_path_factory.mktemp("log") / "log"
    with serving(database, log, **settings) as server, client(server) as api:
        made = api.post("/tasks", json={"title": SECRET_TITLE})
        assert api.get("/api/me/tasks/" + made.json()["id"]).status_code == 200
        with psycopg.connect(database, autocommit=True) as connection:
            connection.execute("ALTER TABLE todo.tasks RENAME TO tasks_away")
            try:
                assert api.get("/tasks").status_code == 500
            finally:
                connection.execute("ALTER TABLE todo.tasks_away RENAME TO tasks")
    yield collector
    collector.server.shutdown()
    collector.server.server_close()


def test_requests_are_metered_by_route_and_status(collector: Collector) -> None:
    points = collector.points("http.server.request.duration")
    names = ("http.request.method", "http.route", "http.response.status_code")
    seen = {tuple(point[name] for name in names) for point in points}
    assert seen >= {("POST", "/tasks", 201), ("GET", "/tasks", 500)}
    assert ("GET", "/api/{user_id}/tasks/{task_id}", 200) in seen


def test_a_trace_shows_the_time_of_each_statement_by_its_name(collector: Collector) -> None:
    spans = {span.name: span for span in collector.spans()}
    for name, route in {"INSERT_TASK": "POST /tasks", "SELECT_TASKS": "GET /tasks"}.items():
        span = spans[name]
        assert span.trace_id == spans[route].trace_id
        assert 0 < span.end_time_unix_nano - span.start_time_unix_nano < 10**10
        assert plain(span) == {"db.system.name": "postgresql", "db.query.summary": name}


def test_an_error_arrives_as_one(collector: Collector) -> None:
    [error] = [span for span in collector.spans() if span.name == "GET /tasks"]
    assert (plain(error)["error.type"], error.status.code) == ("500", 2)
    assert ERROR in {record.get("exception.type") for record in collector.logs()}


def test_nothing_that_a_user_wrote_reaches_the_collector(collector: Collector) -> None:
    everything = b"".join(body for bodies in collector.received.values() for body in bodies)
    assert b"INSERT_TASK" in everything
    for secret in (SECRET_TITLE.encode(), b"Bearer", b"INSERT INTO"):
        assert secret not in everything


# Hosts.

COMMAND = (HERE / "Procfile").read_text().removeprefix("web: ").strip()
DOCKERFILE = (HERE / "Dockerfile").read_text()
FLY = tomllib.loads((HERE / "fly.toml").read_text())
[RENDER] = yaml.safe_load((HERE / "render.yaml").read_text())["services"]


def test_every_host_starts_the_procfiles_command() -> None:
    assert re.findall("^CMD (.*)", DOCKERFILE, re.M) == ["exec " + COMMAND]
    assert RENDER["startCommand"] == COMMAND
    assert FLY["build"] == {"dockerfile": "Dockerfile"} and "processes" not in FLY


def test_the_server_has_the_flags_that_hosts_need() -> None:
    assert serve.KEEP_ALIVE >= 95  # Heroku's router keeps connections for 90 s
    assert serve.SHUTDOWN < 10
    assert FLY["kill_timeout"] == "10s"
    # With "*" the first hop would count, which a client writes.
    trusted = middleware.PROXIES.split(",")
    assert all(ip_network(each).is_private or each == "100.64.0.0/10" for each in trusted)


def test_every_host_probes_health_and_not_the_database() -> None:
    [check] = FLY["http_service"]["checks"]
    [probe] = re.findall("^HEALTHCHECK .*?CMD (.*)", DOCKERFILE, re.M)
    assert check["path"] == RENDER["healthCheckPath"] == "/health"
    assert "/health'" in json.loads(probe)[2]
    assert (
        int(check["grace_period"].removesuffix("s")) > 30
    )  # seconds that a start waits for the database


def test_secrets_are_named_and_not_given() -> None:
    given = {variable.pop("key"): variable for variable in RENDER["envVars"]}
    assert set(given) <= set(SETTINGS) and {"DATABASE_URL", "JWT_SECRET"} <= set(given)
    header = given.pop("CLIENT_IP_HEADER")
    assert header == {"value": "CF-Connecting-IP"}
    assert all(each in ({"sync": False}, {"generateValue": True}) for each in given.values())
    assert FLY["env"] == {"CLIENT_IP_HEADER": "Fly-Client-IP"}
    assert "postgresql://" not in DOCKERFILE


def test_the_image_has_no_root_and_no_build_tools() -> None:
    stages = DOCKERFILE.split("\nFROM ")
    assert len(stages) == 3 and all(stage.startswith("python:3.11-slim") for stage in stages[1:])
    assert re.search("^USER todo$", stages[-1], re.M)
    assert "pip" not in stages[-1] and "apt" not in DOCKERFILE
    assert (HERE / ".python-version").read_text().strip() == "3.11"


def test_the_image_has_each_file_of_the_service_and_no_other() -> None:
    [*_, stage] = DOCKERFILE.split("\nFROM ")
    lines = re.findall("^COPY ([^-].*)", stage, re.M)
    copied = {word.strip("/") for line in lines for word in line.split()[:-1]}
    assert copied == {path.parts[0] for path in service_files()}


def test_honcho_runs_the_procfile_with_a_dotenv(database: str, tmp_path: Path) -> None:
    copy_service(tmp_path)
    port, log = free_port(), tmp_path / "log"
    (tmp_path / "Procfile").write_text(
        f"web: {COMMAND.replace('--host 0.0.0.0', '--host 127.0.0.1')}"
    )
    settings = f"DATABASE_URL={database}\nJWT_SECRET='{SECRET}'\nPORT={port}\n"
    (tmp_path / ".env").write_text(settings)
    command = [str(Path(sys.executable).parent / "honcho"), "start", "web"]
    with log.open("wb") as output:
        process = subprocess.Popen(command, cwd=tmp_path, env=outside(PATH=PATH), stdout=output)
    with process:
        wait_for_start(process, port)
        response = get(f"http://127.0.0.1:{port}/tasks", headers=bearer(token("u")))
        process.terminate()
    assert response.status_code == 200
    assert "server" not in response.headers
    assert '"route":"/tasks","status":200' in log.read_text()


def test_the_dockerfiles_steps_work_in_a_clean_environment(database: str, tmp_path: Path) -> None:
    copy_service(tmp_path)
    shutil.copy(HERE / "requirements.txt", tmp_path)
    port, venv = free_port(), str(tmp_path / "venv")
    environ = {name: value for name, value in os.environ.items() if name.startswith("PIP_")}
    environ |= {"PATH": f"{venv}/bin:{os.environ['PATH']}", "HOME": os.environ.get("HOME", "/")}
    environ |= {"DATABASE_URL": database, "JWT_SECRET": SECRET, "PORT": str(port)}
    for step in re.findall("^RUN ((?!useradd).*)", DOCKERFILE, re.M):
        here = step.replace("/venv", venv).replace("python -m", f"{sys.executable} -m")
        shell = ["sh", "-c", here]
        subprocess.run(
            shell, cwd=tmp_path, env=environ, check=True, timeout=600, capture_output=True
        )
    command = re.findall("^CMD (.*)", DOCKERFILE, re.M)[0].replace(
        "--host 0.0.0.0", "--host 127.0.0.1"
    )
    probe = json.loads(re.findall("^HEALTHCHECK .*?CMD (.*)", DOCKERFILE, re.M)[0])
    with subprocess.Popen(["sh", "-c", command], cwd=tmp_path, env=environ) as process:
        wait_for_start(process, port)
        assert subprocess.run(probe, env=environ).returncode == 0
        process.terminate()
    assert subprocess.run(probe, env=environ, stderr=subprocess.DEVNULL).returncode != 0


# Several instances.


@pytest.fixture
def two_instances(
    database: str, redis: tuple[str, subprocess.Popen[bytes]], tmp_path: Path
) -> Iterator[tuple[Server, Server]]:
    """Two instances of the service on one database, which count in one Redis."""
    settings = {"RATE_LIMIT": "10/hour", "RATE_LIMIT_STORAGE_URI": redis[0]}
    first = serving(database, tmp_path / "1", **settings)
    with first as one, serving(database, tmp_path / "2", **settings) as other:
        yield one, other


def test_two_instances_share_one_limit_by_redis(two_instances: tuple[Server, Server]) -> None:
    one, other = two_instances
    mine, somebodys = token("u" + uuid.uuid4().hex), token("u" + uuid.uuid4().hex)
    codes = [status(instance, mine) for _ in range(8) for instance in (one, other)]
    assert codes == [200] * 10 + [429] * 6
    assert status(other, somebodys) == 200


def test_while_redis_is_down_each_instance_counts_by_itself_and_nobody_fails(
    two_instances: tuple[Server, Server], redis: tuple[str, subprocess.Popen[bytes]]
) -> None:
    user = token(uuid.uuid4().hex)
    assert status(two_instances[0], user) == 200
    redis[1].kill()
    redis[1].wait()
    codes = [status(instance, user) for _ in range(12) for instance in two_instances]
    assert codes == [200] * 20 + [429] * 4


def test_what_one_instance_stores_the_other_shows(two_instances: tuple[Server, Server]) -> None:
    user = uuid.uuid4().hex
    with client(two_instances[0], user) as one, client(two_instances[1], user) as other:
        made = one.post("/tasks", json={"title": "x"})
        assert other.get(made.headers["location"]).headers["etag"] == made.headers["etag"]
