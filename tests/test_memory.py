"""What the service holds, whatever clients do. python -m pytest tests/test_memory.py -rP tells."""

import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import psycopg
import pytest
from httpx import Client

from conftest import (
    HERE,
    Server,
    client,
    connect,
    get,
    memory,
    request_bytes,
    serving,
    token,
    upload,
    wait_until,
)

pytestmark = pytest.mark.slow


def test_clients_that_leave_in_the_middle_leave_nothing_behind(server: Server, api: Client) -> None:
    process = psutil.Process(server.process.pid)
    whole, half = upload("u", 14) + b'{"title": "x"}', upload("u", 100) + b"{"
    requests = [upload("u", 100), whole, half, b"GET /tasks HT", b""]

    def leave(n: int) -> None:
        with connect(server) as connection:
            connection.sendall(requests[n % len(requests)])

    with ThreadPoolExecutor(32) as pool:
        list(pool.map(leave, range(10_000)))  # the heap grows to what 32 at once take
        wait_until(lambda: len(process.net_connections()) < 50)
        before = memory(server)
        list(pool.map(leave, range(10_000)))
    wait_until(lambda: len(process.net_connections()) < 50)
    print(f"10,000 clients left: {memory(server) - before:+.1f} MB")
    assert memory(server) - before < 3
    assert api.get("/tasks").status_code == 200


def test_a_thousand_connections_take_101_mb_and_13_more_while_requests_wait(
    database: str, tmp_path: Path
) -> None:
    # uvicorn imports watchfiles, which only requirements-dev.txt installs.
    (tmp_path / "watchfiles.py").write_text("raise ImportError")
    with serving(database, tmp_path / "log", PYTHONPATH=str(tmp_path)) as server:
        tokens = [token(f"u{n}").encode() for n in range(100)]
        connections = [connect(server) for _ in range(1000)]
        assert get(server.url + "/health").status_code == 200
        idle = memory(server)
        with psycopg.connect(database) as other:
            other.execute("LOCK TABLE todo.tasks")
            for n, connection in enumerate(connections):
                connection.sendall(request_bytes(b"GET /tasks", b"Bearer " + tokens[n % 100], b""))
            assert connections[0].recv(9) == b"HTTP/1.1 "  # a 503, when all others wait
        print(f"1,000 idle connections: {idle:.1f} MB, busy: {memory(server) - idle:+.1f} MB")
        assert idle < 101
        assert memory(server) - idle < 13
        for connection in connections:
            connection.close()


@pytest.mark.skipif(shutil.which("wrk") is None, reason="wrk is not installed")
def test_memory_stays_where_it_is_over_200_000_requests(database: str, tmp_path: Path) -> None:
    mixed, sent = tmp_path / "mixed", token("soak")
    with serving(database, tmp_path / "log") as server, client(server, "soak") as api:
        id = api.post("/tasks", json={"title": "x"}).json()["id"]
        lines = [f"PATCH /tasks/{id}/toggle {sent}", f"GET /tasks/{id} {sent}"] * 10
        lines += [f"GET /tasks?limit=20 {sent}"] * 18
        lines += [f"POST /tasks {sent} {body}" for body in ('{"title": "x"}', "{")]
        mixed.write_text("\n".join(lines))
        served, after_a_tenth = 0, 0.0
        while served < 200_000:
            options = ["-t1", "-c64", "-d5s", "-s", "bench/wrk.lua", server.url, "--", str(mixed)]
            output = subprocess.check_output(["wrk", *options], cwd=HERE, text=True)
            served += int(re.findall(r"(\d+) requests in", output)[0])
            if not after_a_tenth and served >= 20_000:
                after_a_tenth = memory(server)
        print(f"{served} requests: {after_a_tenth:.1f} MB -> {memory(server):.1f} MB")
        assert memory(server) - after_a_tenth < 3
        assert not any(line.get("status", 0) >= 500 for line in server.log())
