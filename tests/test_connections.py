"""What clients do on a connection: heads, bodies, readers, keep-alive, proxies, SIGTERM.

The tests that are marked slow take 6 to 20 seconds each.
"""

import asyncio
import re
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import uvloop
from httpx import Client

from conftest import Server, get, serving
from lib import serve

parametrize = pytest.mark.parametrize
needs_wrk = pytest.mark.skipif(
    subprocess.run(["which", "wrk"], stdout=subprocess.DEVNULL).returncode != 0,
    reason="wrk is not installed",
)


# Proxies.


@pytest.fixture(scope="module")
def on_fly(database: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    log = tmp_path_factory.mktemp("log") / "log"
    with serving(database, log, CLIENT_IP_HEADER="Fly-Client-IP") as server:
        yield server


def test_the_log_and_the_limit_know_the_client_that_flys_proxy_names(on_fly: Server) -> None:
    account, policies = {"email": "a@example.com", "password": "wrong"}, set()
    with Client(base_url=on_fly.url, timeout=20) as public:
        for n in range(101):  # X-Forwarded-For ends in the application's own address there
            fly = {"X-Forwarded-For": f"192.0.2.{n}, 66.241.125.7", "Fly-Client-IP": f"192.0.2.{n}"}
            answer = public.post("/auth/login", json=account, headers=fly)
            policies.add(answer.headers.get("RateLimit-Policy", "")[:9])
    assert '"address"' not in policies
    assert [line["client"] for line in on_fly.log() if "client" in line][-1] == "192.0.2.100"


# Accepting.


class Accepted(asyncio.Protocol):
    number = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        Accepted.number += 1
        transport.close()


def test_a_burst_of_200_connections_is_accepted_in_30_turns_of_the_loop() -> None:
    async def story() -> int:
        loop, listener = asyncio.get_running_loop(), socket.create_server(("127.0.0.1", 0))
        sockets = serve.duplicates(listener)
        servers = [await loop.create_server(Accepted, sock=s, backlog=2048) for s in sockets]
        clients = [socket.create_connection(listener.getsockname(), 5) for _ in range(200)]
        turns = 0
        while Accepted.number < len(clients) and turns < 1000:
            turns += 1
            await asyncio.sleep(0)
        for server in servers:
            server.close()
        for client in clients:
            client.close()
        await asyncio.sleep(0.1)
        return turns

    assert uvloop.run(story()) < 30  # 26, and 201 with one socket


@needs_wrk
@pytest.mark.slow
def test_a_newcomer_is_answered_within_a_second_while_1000_clients_load_the_service(
    database: str, tmp_path: Path
) -> None:
    with serving(database, tmp_path / "log") as server:
        command = ["wrk", "-c1000", "-d6", "-t1", "--latency", server.url + "/health"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as load:
            time.sleep(0.5)
            waits = [seconds_to_answer(server) for _ in range(10)]
            output = load.communicate()[0]
    print(output)
    assert max(waits) < 1 and "Socket errors" not in output
    assert milliseconds(output, "99%") < 3 * milliseconds(output, "50%")  # 1.5 on a quiet machine


def seconds_to_answer(server: Server) -> float:
    """The time of a request on a connection of its own."""
    started = time.monotonic()
    assert get(server.url + "/health").status_code == 200
    return time.monotonic() - started


def milliseconds(output: str, percentile: str) -> float:
    """A latency that wrk printed."""
    [(number, unit)] = re.findall(rf"{percentile} +([\d.]+)(us|ms|s)", output)
    return float(number) * {"us": 0.001, "ms": 1, "s": 1000}[unit]
