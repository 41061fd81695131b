"""lib/protocol.py without a service: what applications get of a connection, and what it holds."""

import asyncio
import gc
import json
import weakref
from collections.abc import Callable
from unittest.mock import Mock

import pytest
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.config import Config
from uvicorn.server import ServerState

from lib import protocol as module
from lib import readers
from lib.middleware import RequestLog
from lib.protocol import Protocol, State
from lib.state import state_of

GET = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"
CHUNKED = b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n"
UPGRADE = b"Connection: HTTP2-Settings, Upgrade\r\nUPGRADE: h2c\r\nHTTP2-Settings: AA\r\n"


def connected(app: ASGIApp) -> Protocol:
    """The protocol of a connection whose client is the test."""
    config, transport = Config(app, http=Protocol, ws="none", log_config=None), Mock()
    config.load()
    transport.get_extra_info("socket").getsockname.return_value = ("127.0.0.1", 8000)
    transport.get_extra_info("socket").getpeername.return_value = ("192.0.2.1", 50_000)
    transport.is_closing.return_value = False
    transport.get_write_buffer_size.return_value = 1
    protocol = Protocol(config, ServerState(), {})
    protocol.connection_made(transport)
    return protocol


async def answered(protocol: Protocol) -> None:
    """Waits until all requests of the connection are answered."""
    async with asyncio.timeout(5):
        while tasks := protocol.tasks:
            await asyncio.wait(tasks)
            await asyncio.sleep(0)


def test_an_upgrade_is_ignored_wherever_its_head_is_cut() -> None:
    async def story(head: bytes, cut: int) -> None:
        requests = []

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            requests.append((scope["method"], await Request(scope, receive).body()))
            await PlainTextResponse("answer")(scope, receive, send)

        protocol, sent = connected(app), (head + b"body") * 2 + GET
        protocol.data_received(sent[:cut])
        protocol.data_received(sent[cut:])
        await answered(protocol)
        assert requests == [("POST", b"body"), ("POST", b"body"), ("GET", b"")], cut

    head = b"POST / HTTP/1.1\r\n" + UPGRADE + b"Content-Length: 4\r\n\r\n"
    for cut in range(len(head + b"body") * 2):
        asyncio.run(story(head, cut))


def test_a_trailer_is_no_header() -> None:
    async def story() -> None:
        names = list[bytes]()

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            await Request(scope, receive).body()
            names.extend(name for name, _ in scope["headers"])
            await PlainTextResponse("answer")(scope, receive, send)

        protocol = connected(app)
        protocol.data_received(CHUNKED)
        protocol.data_received(b"4\r\nbody\r\n0\r\nAuthorization: Bearer x\r\n")
        protocol.data_received(b"X: %b\r\n\r\n" % (b"x" * 40_000))
        await answered(protocol)
        assert names == [b"transfer-encoding"]
        protocol.data_received(b"GET / HTTP/1.1\r\nY: %b\r\n\r\n" % (b"y" * 30_000))
        await answered(protocol)
        assert names == [b"transfer-encoding", b"y"]  # 64 KB are for it alone

    asyncio.run(story())


def test_a_body_behind_other_requests_waits_unread() -> None:
    async def story() -> None:
        protocol, sizes = connected(PlainTextResponse("answer")), []
        protocol.data_received(GET * 8 + b"POST / HTTP/1.1\r\nContent-Length: 5000000\r\n\r\n")
        while protocol.running is not protocol.cycle:
            if not protocol.flow.read_paused:
                protocol.data_received(b"x" * 60_000)
            sizes.append(len(protocol.cycle.body))
            await asyncio.sleep(0)
        assert len(sizes) >= 8 and max(sizes) <= 60_000

    asyncio.run(story())


def test_an_idle_connection_holds_no_request_and_middleware_outside_has_it_whole() -> None:
    async def story() -> None:
        requests, paths = weakref.WeakSet[Request](), []

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            scope["state"]["seen"] = request = Request(scope)
            requests.add(request)
            await PlainTextResponse("answer")(scope, receive, send)

        async def outside(scope: Scope, receive: Receive, send: Send) -> None:
            await RequestLog(app)(scope, receive, send)
            paths.append(scope["path"])

        protocol = connected(outside)
        for _ in range(2):
            protocol.data_received(GET)
            await answered(protocol)
            gc.collect()
            assert not requests
            assert protocol.pipeline == ()  # a deque takes 1 KB
        assert paths == ["/", "/"]

    asyncio.run(story())


def test_a_client_that_does_not_read_is_known_whatever_is_behind_its_request() -> None:
    async def story() -> None:
        known = list[str]()

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            state_of(scope).user_id = scope["path"]
            protocol.pause_writing()
            known.append(protocol.readers.clients[protocol.transport])
            protocol.resume_writing()
            await PlainTextResponse("answer")(scope, receive, send)

        protocol = connected(RequestLog(app))
        protocol.data_received(GET + GET.replace(b"/", b"/2", 1) + b"GET /3")
        await answered(protocol)
        assert known == ["/", "/2"]

    asyncio.run(story())


@pytest.mark.parametrize("under_way", [b"", GET * 2])
def test_nothing_holds_a_connection_that_its_client_reset(under_way: bytes) -> None:
    async def story() -> None:
        protocol = connected(PlainTextResponse("answer"))
        protocol.data_received(GET)
        await answered(protocol)
        timer = protocol.timer
        assert timer and not timer.cancelled()
        protocol.data_received(under_way)
        protocol.connection_lost(ConnectionResetError())
        await answered(protocol)
        assert timer.cancelled() and not protocol.connections
        assert not protocol.cycle and not protocol.pipeline  # each request has the connection

    asyncio.run(story())


def test_who_takes_nothing_of_a_response_that_was_broken_off_is_dropped(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(State.ENDING, "seconds", 0.2)
    monkeypatch.setattr(Protocol, "warned", 0)

    async def app(_: Scope, __: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200})
        raise ZeroDivisionError

    async def story() -> None:
        protocol = connected(app)
        transport: Mock = protocol.transport  # type: ignore[assignment]
        protocol.data_received(GET)
        await answered(protocol)
        assert transport.close.called and not transport.abort.called
        await asyncio.sleep(0.5)
        assert transport.abort.called and "0.2 seconds for the client" in capfd.readouterr().out

    asyncio.run(story())


def test_what_fails_after_its_response_does_not_end_the_request_behind_it() -> None:
    async def story() -> None:
        second = asyncio.Event()

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            second.set() if scope["path"] == "/2" else None
            await asyncio.sleep(0.1 if second.is_set() else 0)
            await PlainTextResponse("answer")(scope, receive, send)
            await second.wait()
            raise ZeroDivisionError

        protocol = connected(app)
        transport: Mock = protocol.transport  # type: ignore[assignment]
        protocol.data_received(GET + GET.replace(b"/", b"/2", 1))
        await answered(protocol)
        answers = b"".join(call.args[0] for call in transport.write.call_args_list)
        assert answers.count(b"HTTP/1.1 200 ") == 2 and not transport.close.called

    asyncio.run(story())


BROKEN = CHUNKED + b"no size\r\n"


@pytest.mark.parametrize(
    ("sent", "sigterm", "closes"),
    [(GET * 2, False, False), (GET, True, True), (BROKEN, True, True), (CHUNKED, True, False)],
)
def test_a_close_waits_for_a_client_that_may_send_on(
    sent: bytes, sigterm: bool, closes: bool
) -> None:
    async def story() -> None:
        protocol = connected(PlainTextResponse("answer", headers={"Connection": "close"}))
        transport: Mock = protocol.transport  # type: ignore[assignment]
        protocol.data_received(sent)
        assert not transport.close.called
        if sigterm:
            protocol.shutdown()
        await answered(protocol)
        assert (transport.close.called, transport.write_eof.called) == (closes, sent != GET)

    asyncio.run(story())


answer = PlainTextResponse("answer")
ENDS: dict[str, Callable[[], object]] = {
    "400 Bad Request": lambda: connected(answer).data_received(b"\x16\x03\x01"),  # TLS
    "10 seconds for the first head, or the rest of one": lambda: connected(answer).drop(),
    "MAX_UNREAD": lambda: connected(answer).pause_writing(),
    "MAX_CONNECTIONS": lambda: connected(answer),
}


@pytest.mark.parametrize(("reason", "end"), ENDS.items(), ids=ENDS)
def test_why_a_connection_ends_is_logged_once_a_second(
    reason: str,
    end: Callable[[], object],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    async def story() -> None:
        end(), end()

    monkeypatch.setattr(Protocol, "warned", 0)
    monkeypatch.setattr(readers, "MAX_UNREAD", 0)
    monkeypatch.setattr(module, "MAX_CONNECTIONS", 0 if reason == "MAX_CONNECTIONS" else 9)
    asyncio.run(story())
    [line] = capfd.readouterr().out.splitlines()
    fields = json.loads(line)
    assert (fields["level"], fields["reason"]) == ("WARNING", reason)
    assert "192.0.2.1" in fields["client"]
