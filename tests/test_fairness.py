"""One user's load, however heavy, is not everybody's: each user has a line of its own."""

import statistics
import subprocess
import sys
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psycopg
import pytest
from httpx import Client

from conftest import Server, client, execute, serving, token, wait_until

LOADS = {
    "a page of 1,000 tasks of 5 KB": ("repeat('x', 5000)", 1000, "/tasks"),
    "a filter that finds nothing in 700,000 tasks": ("NULL", 700_000, "/tasks?completed=true"),
}


# Sends a request on 600 connections at once, and reads the answers. It is a process of its own, so
# that it does not slow down whoever measures.
LOAD = """
import asyncio, sys
port, path, token = sys.argv[1:]
async def ask():
    reader, writer = await asyncio.open_connection("127.0.0.1", int(port))
    head = f"GET {path} HTTP/1.1\\r\\nHost: x\\r\\nAuthorization: Bearer {token}\\r\\n"
    writer.write(head.encode() + b"Connection: close\\r\\n\\r\\n")
    while await reader.read(1 << 20):
        pass
async def main():
    await asyncio.gather(*[ask() for _ in range(600)])
asyncio.run(main())
"""


def measure(server: Server, heavy: str, path: str) -> dict[str, list[float]]:
    """How long another user's requests take while 600 of a heavy user's are under way."""
    times: dict[str, list[float]] = {"GET": [], "POST": []}
    command = [sys.executable, "-c", LOAD, str(server.port), path, token(heavy)]
    with subprocess.Popen(command) as load, client(server) as other:
        until = time.monotonic() + 10
        time.sleep(0.3)
        while time.monotonic() < until and load.poll() is None and len(times["POST"]) < 290:
            for method in times:
                body = {"title": "x"} if method == "POST" else None
                started = time.monotonic()
                response = other.request(method, "/tasks", json=body)
                times[method].append(time.monotonic() - started)
                assert response.is_success
        load.kill()
    return times


@pytest.mark.slow
@pytest.mark.parametrize("load", LOADS)
def test_a_users_600_heavy_requests_at_once_leave_others_quick(
    database: str, tmp_path: Path, load: str
) -> None:
    description, count, path = LOADS[load]
    heavy = uuid.uuid4().hex
    with serving(database, tmp_path / "log", RATE_LIMIT="600/minute") as server:
        execute(
            database,
            f"INSERT INTO todo.users (id) VALUES ('{heavy}')",
            "INSERT INTO todo.tasks (user_id, title, description) SELECT"
            f" '{heavy}', n::text, {description} FROM generate_series(1, {count}) AS n",
            "VACUUM ANALYZE todo.tasks",
        )
        times = measure(server, heavy, path)
        execute(database, f"DELETE FROM todo.tasks WHERE user_id = '{heavy}'")
    for method, seconds in times.items():
        print(
            f"\n{load}: {method} x{len(seconds)} p50 {statistics.median(seconds):.3f}",
            f"p99 {statistics.quantiles(seconds, n=100)[98]:.3f} max {max(seconds):.3f}",
        )
        assert statistics.median(seconds) < 0.15
        assert max(seconds) < 1.5


@pytest.mark.slow
def test_a_write_that_waits_for_a_lock_holds_up_no_read(database: str, api: Client) -> None:
    tasks = [api.post("/tasks", json={"title": "x"}).json()["id"] for _ in range(8)]
    toggle = f"/tasks/{tasks[0]}/toggle"
    with psycopg.connect(database) as other, ThreadPoolExecutor(16) as pool:
        other.execute("SELECT 1 FROM todo.tasks WHERE id = %s FOR UPDATE", [tasks[0]])
        stuck = [pool.submit(api.patch, toggle) for _ in range(3)]
        time.sleep(0.1)
        assert {api.get("/tasks/" + id).status_code for id in tasks} == {200}
        assert not any(call.done() for call in stuck)  # each write waits a second for the lock
        assert {call.result().status_code for call in stuck} == {503}
        waiting = "SELECT 1 FROM pg_locks WHERE NOT granted"
        wait_until(lambda: not other.execute(waiting).fetchall())  # the last one is cancelled late
        other.rollback()
    assert api.patch(toggle).json()["completed"] is True
