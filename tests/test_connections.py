"""What clients do on a connection: heads, bodies, readers, keep-alive, proxies, SIGTERM.

The tests that are marked slow take 6 to 20 seconds each.
"""

import asyncio
import os
import re
import shutil
import socket
import subprocess
import threading
import time
from contextlib import ExitStack
from pathlib import Path
from unittest.mock import Mock

import psycopg
import pytest
import uvloop
from httpx import Client

from conftest import (
    HERE,
    Server,
    connect,
    environment,
    free_port,
    get,
    memory,
    new_email,
    post,
    raw,
    request_bytes,
    serving,
    timed,
    token,
    uvicorn,
    wait_for_start,
    wait_until,
)
from lib import serve
from lib.readers import Readers

parametrize = pytest.mark.parametrize
HEALTH = b"GET /health HTTP/1.1\r\nHost: x\r\n"
LAST = HEALTH + b"Connection: close\r\n\r\n"


# Heads.


def create(headers: bytes) -> bytes:
    """The head of a request that creates a task."""
    usual = b"POST /tasks HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    return usual + f"Authorization: Bearer {token('u')}\r\n".encode() + headers + b"\r\n\r\n"


CHUNK = b"e\r\n" + b'{"title": "x"}' + b"\r\n"
TRAILER = create(b"Transfer-Encoding: chunked") + CHUNK + b"0\r\n"
HEADS = {
    "many-headers": (431, HEALTH, b"A: b\r\n"),
    "a-long-header": (431, HEALTH + b"A: ", b"x"),
    "a-long-target": (414, b"GET /", b"x"),
    "many-trailers": (431, TRAILER, b"A: b\r\n"),
    "a-long-trailer": (431, TRAILER + b"A: ", b"x"),
    "a-chunk-extension": (431, TRAILER.removesuffix(b"\r\n") + b";", b"x"),
}


@parametrize(("status", "start", "more"), HEADS.values(), ids=HEADS)
def test_a_head_beyond_64_kb_is_refused_in_2_mb(
    status: int, start: bytes, more: bytes, server: Server
) -> None:
    get(server.url + "/health")
    before = memory(server)
    with connect(server) as connection:
        connection.sendall(start)
        for _ in range(300):  # 20 MB
            connection.sendall(more * (65_536 // len(more)))
        answer = connection.makefile("rb").read()
    assert answer.startswith(b"HTTP/1.1 %d " % status)
    assert b"connection: close" in answer
    assert memory(server) - before < 2


@parametrize("end", [b"", b"\r\n"])
def test_a_head_of_more_than_256_lines_is_refused(server: Server, end: bytes) -> None:
    assert raw(server, HEALTH + b"A: b\r\n" * 255 + b"\r\n", 1).startswith(b"HTTP/1.1 200 ")
    assert raw(server, HEALTH + b"A: b\r\n" * 257 + end, 5).startswith(b"HTTP/1.1 431 ")


@pytest.mark.slow
def test_a_head_that_has_not_ended_after_10_seconds_is_closed(server: Server) -> None:
    starts = [b"", b"\r\n", HEALTH, HEALTH + b"\r\n" + HEALTH]
    with ExitStack() as stack:
        connections = [stack.enter_context(connect(server)) for _ in starts]
        for connection, start in zip(connections, starts, strict=True):
            connection.sendall(start)
        for n in range(8):
            time.sleep(1)
            for connection in connections[2:]:
                connection.sendall(b"A: %d\r\n" % n)
        started = time.monotonic()
        for connection in connections:
            while connection.recv(65_536):
                pass
        assert 1 < time.monotonic() - started < 5


def test_what_a_client_pipelines_is_answered_up_to_32_requests(server: Server) -> None:
    answers = raw(server, (HEALTH + b"\r\n") * 200)
    assert answers.count(b"HTTP/1.1 200 ") == 33  # one is served, 32 wait
    assert answers.count(b"connection: close") == 1


@parametrize("broken", [b"\0", create(b"Transfer-Encoding: chunked") + b"no size\r\n"])
def test_what_is_no_http_is_refused_after_the_answer_before_it(
    broken: bytes, server: Server
) -> None:
    answers = raw(server, HEALTH + b"\r\n" + broken)
    assert re.findall(rb"HTTP/1.1 (\d+)", answers) == [b"200", b"400"]


# Readers.


def test_the_kernel_holds_little_of_a_page_that_is_not_read(server: Server, api: Client) -> None:
    for _ in range(200):  # a megabyte
        api.post("/tasks", json={"title": "x", "description": "x" * 5000})
    with connect(server) as deaf:
        deaf.sendall(request_bytes(b"GET /tasks", api.headers["Authorization"].encode(), b""))
        time.sleep(1)
        ports = f":{server.port:04X} 0100007F:{deaf.getsockname()[1]:04X} "
        [line] = [each for each in Path("/proc/net/tcp").read_text().splitlines() if ports in each]
        assert 0 < int(line.split()[4].split(":")[0], 16) < 300_000  # tx_queue; 900,000 without


def test_beyond_32_mb_unread_the_client_that_holds_most_loses_its_oldest_connection() -> None:
    readers, victim, greedy = Readers(), Mock(), [Mock() for _ in range(40)]
    for each in (victim, *greedy):
        each.get_write_buffer_size.return_value = 900_000 if each is victim else 1_000_000
        readers.add(each, "victim" if each is victim else "greedy")
    assert [each.abort.called for each in greedy] == [True] * 9 + [False] * 31
    assert not victim.abort.called


# Bodies.


def test_unfinished_uploads_of_a_stranger_do_not_stop_a_users(server: Server, api: Client) -> None:
    login = b"POST /auth/login HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    with ExitStack() as stack:
        for size in [120_000] * 275 + [9_000] * 40:  # 33 MB, and all bodies may have 32
            stranger = stack.enter_context(connect(server))
            stranger.sendall(login + b"Content-Length: 131072\r\n\r\n" + b" " * size)
        big = {"title": "x", "description": "x" * 4000, "ignored": "x" * 20_000}
        codes = {api.post("/tasks", json=big).status_code for _ in range(20)}
        small = {"email": new_email(), "password": "correct horse"}
        codes.add(post(server.url + "/auth/register", json=small).status_code)
    assert codes == {201}


@parametrize(("status", "head"), [(413, create(b"Content-Length: 20000000")), (200, LAST)])
def test_a_client_that_sends_on_gets_the_answer_before_a_close(
    server: Server, status: int, head: bytes
) -> None:
    answer = raw(server, head + b" " * 20_000_000)
    assert answer.startswith(b"HTTP/1.1 %d " % status) and b"\r\nconnection: close\r\n" in answer


# Connections.


def test_connections_without_a_request_give_way_when_descriptors_run_out(
    database: str, tmp_path: Path
) -> None:
    def few(port: int) -> list[str]:
        return ["prlimit", "--nofile=192", *uvicorn(port)]

    with serving(database, tmp_path / "log", few) as service, ExitStack() as stack:
        for n in range(200):  # idle ones, and then refused ones whose client stays
            idle = stack.enter_context(connect(service))
            idle.sendall(HEALTH + b"\r\n" if n < 100 else b"\0")
            assert idle.recv(12) == (b"HTTP/1.1 200" if n < 100 else b"HTTP/1.1 400")
        assert get(service.url + "/health").status_code == 200


def test_too_few_descriptors_end_the_start_with_one_line(database: str) -> None:
    command = ["prlimit", "--nofile=128", *uvicorn(free_port())]
    environ, stderr = environment(database), subprocess.PIPE
    ended = subprocess.run(command, cwd=HERE, env=environ, stderr=stderr, timeout=20, check=False)
    assert ended.returncode == 1
    assert b"ulimit -n" in ended.stderr and ended.stderr.count(b"\n") == 1


# The log.


def test_a_log_that_nobody_reads_stops_no_request_and_its_lost_lines_are_counted(
    database: str,
) -> None:
    port = free_port()
    environ = environment(database)
    with subprocess.Popen(uvicorn(port), cwd=HERE, env=environ, stdout=subprocess.PIPE) as process:
        wait_for_start(process, port)
        end = threading.Timer(60, process.kill)
        end.start()
        service, answered = Server(port, process, Path()), 0
        for _ in range(250):
            answered += raw(service, (HEALTH + b"\r\n") * 24 + LAST, 10).count(b"HTTP/1.1 200 ")
        assert answered == 250 * 25 and process.stdout
        lines, logged = b"", 0
        while logged < answered:  # what waits goes with a later line
            answered += raw(service, LAST).count(b"HTTP/1.1 200 ")
            lines += os.read(process.stdout.fileno(), 1_000_000)
            dropped = sum(map(int, re.findall(rb'log lines dropped","lines":(\d+)', lines)))
            logged = lines.count(b'"message":"request"') + dropped
        assert dropped and logged == answered
        started = time.monotonic()
        process.terminate()
        process.wait(10)
        assert time.monotonic() - started < 3
        end.cancel()


# Closing.


@parametrize(
    ("status", "request_"),
    [
        (401, b"POST /tasks HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\n"),
        (400, b"GET\r\n\r\n"),
        (400, create(b"Expect: 100-continue\r\nTransfer-Encoding: chunked") + b"no size\r\n"),
        (400, b"CONNECT /health HTTP/1.1\r\nHost: x\r\n\r\n"),
        (200, LAST),
        (200, b"GET /health HTTP/1.0\r\n\r\n"),
        (201, create(b"Transfer-Encoding: chunked") + CHUNK + b"0\r\nConnection: close\r\n\r\n"),
        # HTTP/1.0 has no 100 Continue (RFC 9110 section 10.1.1).
        (
            422,
            create(b"Expect: 100-continue\r\nContent-Length: 2").replace(b"/1.1", b"/1.0") + b"{}",
        ),
    ],
)
def test_a_response_before_a_close_says_so(status: int, request_: bytes, server: Server) -> None:
    answer = raw(server, request_)  # until it is closed
    assert answer.startswith(b"HTTP/1.1 %d " % status)
    assert b"\r\nconnection: close\r\n" in answer and b"\r\ndate: " in answer
    assert server.failures() == []


def test_a_write_whose_client_leaves_is_made_once_and_logged_as_499_without_a_trace(
    server: Server, database: str, api: Client
) -> None:
    authorization = api.headers["Authorization"].encode()
    with psycopg.connect(database) as other:
        other.execute("LOCK TABLE todo.tasks")
        with connect(server) as connection:
            create = request_bytes(b"POST /tasks", authorization, b'{"title": "x"}')
            connection.sendall(create + LAST)
            time.sleep(0.2)
        time.sleep(0.2)
    wait_until(lambda: server.log()[-1].get("status") == 499, 5)
    assert len(api.get("/tasks").json()) == 1
    assert server.failures() == []


# Proxies.


def test_the_log_knows_the_client_that_the_header_of_the_setting_names(
    database: str, tmp_path: Path
) -> None:
    fly = {"X-Forwarded-For": "192.0.2.1, 66.241.125.7", "Fly-Client-IP": "192.0.2.1"}
    with serving(database, tmp_path / "log", CLIENT_IP_HEADER="Fly-Client-IP") as server:
        get(server.url + "/health", headers=fly)
        wait_until(lambda: "192.0.2.1" in [each.get("client") for each in server.log()])


# Accepting.


class Accepted(asyncio.Protocol):
    number = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        Accepted.number += 1
        transport.close()


def test_a_burst_of_200_connections_is_accepted_in_6_turns_of_the_loop() -> None:
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

    assert uvloop.run(story()) <= 6  # 5, and 201 with one socket


@pytest.mark.skipif(shutil.which("wrk") is None, reason="wrk is not installed")
@pytest.mark.slow
def test_a_newcomer_is_answered_within_a_second_while_1000_clients_load_the_service(
    database: str, tmp_path: Path
) -> None:
    with serving(database, tmp_path / "log") as server:
        command = ["wrk", "-c1000", "-d6", "-t1", "--latency", server.url + "/health"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as load:
            time.sleep(0.5)
            newcomers = [timed(lambda: get(server.url + "/health")) for _ in range(10)]
            output = load.communicate()[0]
    print(output)
    assert {status for status, _ in newcomers} == {200}
    assert max(seconds for _, seconds in newcomers) < 1 and "Socket errors" not in output
    assert milliseconds(output, "99%") < 3 * milliseconds(output, "50%")  # 1.5 on a quiet machine


def milliseconds(output: str, percentile: str) -> float:
    """A latency that wrk printed."""
    [(number, unit)] = re.findall(rf"{percentile} +([\d.]+)(us|ms|s)", output)
    return float(number) * {"us": 0.001, "ms": 1, "s": 1000}[unit]


# Starting.


def test_a_port_that_another_process_takes_during_the_start_ends_it_with_a_line(
    database: str,
) -> None:
    with socket.socket() as other, psycopg.connect(database) as holder:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        other.bind(("127.0.0.1", 0))  # as the service does, which listens when it has started
        port = other.getsockname()[1]
        holder.execute("SELECT pg_advisory_xact_lock(hashtext('todo.tasks'))")  # so it waits
        command, environ = uvicorn(port), environment(database)
        with subprocess.Popen(command, cwd=HERE, env=environ, stderr=subprocess.PIPE) as process:
            time.sleep(2)
            other.listen()
            holder.rollback()
            assert process.wait(10) == 1
            assert f"PORT {port} is taken by another process".encode() in process.communicate()[1]
