"""Pages: their bound, and clients that do not read them."""

import socket
import statistics
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

import psutil
import pytest
from httpx import Client

from conftest import Server, client, execute, memory, serving, timed, wait_until

pytestmark = pytest.mark.slow
TITLE = {"title": "x"}


def use_all_connections(api: Client) -> None:
    """Makes the service open as many connections as it may."""
    with ThreadPoolExecutor(32) as pool:
        calls = [pool.submit(api.get, "/tasks") for _ in range(64)]
        calls += [pool.submit(api.post, "/tasks", json=TITLE) for _ in range(64)]
        assert all(call.result().is_success for call in calls)


@pytest.fixture
def large(database: str, tmp_path: Path) -> Iterator[tuple[Server, Client]]:
    """A service, and a client of a user with 2,000 tasks of 5 KB each."""
    user = uuid.uuid4().hex
    with serving(database, tmp_path / "log") as server, client(server, user) as api:
        execute(
            database,
            f"INSERT INTO todo.users (id) VALUES ('{user}')",
            "INSERT INTO todo.tasks (user_id, title, description) "
            f"SELECT '{user}', n::text, repeat('x', 5000) FROM generate_series(1, 2000) AS n",
        )
        yield server, api


def test_a_page_is_bounded_by_bytes_and_its_links_lead_to_every_task_once(
    large: tuple[Server, Client],
) -> None:
    page, titles = large[1].get("/tasks"), list[str]()
    while True:
        assert len(page.content) <= 1_000_100
        titles += [task["title"] for task in page.json()]
        if "next" not in page.links:
            break
        page = large[1].get(page.links["next"]["url"])
    assert sorted(map(int, titles)) == list(range(1, 2001))


@contextmanager
def deaf_clients(server: Server, api: Client) -> Iterator[set[int]]:
    """30 clients that ask for more pages than the kernel's buffers take, and read none.

    They hold 30 MB. Beyond 32 MB the service would drop some at once.
    """
    asked = b"GET /tasks?limit=190 HTTP/1.1\r\nHost: x\r\nAuthorization: %b\r\n\r\n"
    with ExitStack() as stack:
        deaf = [stack.enter_context(socket.socket()) for _ in range(30)]
        for connection in deaf:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.connect(("127.0.0.1", server.port))
            connection.sendall(asked % api.headers["Authorization"].encode() * 9)
        time.sleep(8)  # so that each has got as much as it takes
        yield {connection.getsockname()[1] for connection in deaf}


def test_clients_that_do_not_read_hold_up_nobody_and_are_dropped(
    large: tuple[Server, Client],
) -> None:
    server, api = large
    use_all_connections(api)
    before, process = memory(server), psutil.Process(server.process.pid)
    with deaf_clients(server, api) as ports, client(server) as other:
        assert statistics.median(timed(lambda: other.get("/tasks"))[1] for _ in range(20)) < 0.2
        assert memory(server) - before < 200  # each asks for two pages of a megabyte

        def connected() -> set[int]:
            connections = process.net_connections("tcp")
            return ports & {each.raddr.port for each in connections if each.raddr}

        assert connected()  # the bound of what all have not read ends some before
        wait_until(lambda: not connected(), 75)
