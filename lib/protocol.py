"""uvicorn's HTTP protocol, with bounds on what a client makes a connection hold, and how long.

    HEAD <-> RUNNING -> IDLE -> HEAD    From any of these to UNREAD and back, or to ENDING.

uvicorn 0.54 sets no bounds, loses the body behind an Upgrade, takes trailers for headers, and
resets a client that still sends when it closes. What it calls a cycle is a request with its
response: `running` is answered, those in `pipeline` wait for it, and `cycle` is the newest.
"""

import resource
import socket
from asyncio import TimerHandle
from collections import deque
from enum import Enum
from types import SimpleNamespace
from typing import Any, ClassVar

from httptools import HttpParserError, HttpParserUpgrade, HttpRequestParser
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from lib import logs
from lib.ratelimit import owner_of
from lib.readers import Readers

# Open connections, of 7 KB each. 64 file descriptors listen (lib/serve.py), 64 are for the rest.
descriptors, _ = resource.getrlimit(resource.RLIMIT_NOFILE)  # RLIM_INFINITY is below 0
MAX_CONNECTIONS = min(5_000, descriptors - 128) if descriptors >= 0 else 5_000
if MAX_CONNECTIONS < 1:
    raise SystemExit("The service needs more than 128 file descriptors (ulimit -n)")
MAX_HEAD = 65_536  # bytes of target and headers, or of a trailer. Of a head behind another twice
MAX_LINES = 256  # of a head or a trailer: short lines take twenty times their bytes in memory
MAX_PIPELINED = 32  # requests of a connection that wait for the one before
UNSENT = 65_536  # bytes that wait in the kernel for a client, and as many in uvloop's transport
REFUSAL = b"content-length: 0\r\nconnection: close\r\n\r\n"
# The transport of a request that has ended. A background task that fails then closes nothing.
ENDED: Any = SimpleNamespace(close=lambda: None, is_closing=lambda: True)


class State(Enum):
    """What a connection waits for, and the seconds after which it is dropped."""

    HEAD = "the first head, or the rest of one", 10
    RUNNING = "the application, which has bounds of its own, also for bodies", None
    IDLE = "the next request", 100  # more than the 90 of Heroku's router
    UNREAD = "the client to take responses, until a quarter of UNSENT bytes is left", 60
    ENDING = "the client to take what was sent. What it sends is thrown away", 60

    def __init__(self, waits_for: str, seconds: float | None) -> None:
        self.waits_for, self.seconds = waits_for, seconds


HEAD, RUNNING, IDLE, UNREAD, ENDING = State  # Python 3.11 takes three times as long for State.HEAD


class Protocol(HttpToolsProtocol):
    """A connection. The transport, the parser and uvicorn call its methods. Its cycles have it as
    their transport too, and call write(), close() and is_closing()."""

    # With more than 30 attributes in its dictionary, a connection takes 1 KB more.
    __slots__ = ("refusal", "running", "shuts_down", "size", "state", "timer", "write")
    readers: ClassVar[Readers] = Readers()
    warned: ClassVar[float] = 0  # when the log had its last line about any connection
    cycle: Any  # None when all requests are answered
    scope: Any  # of the newest head, which uvicorn makes with its first byte. None when IDLE

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.state: State | None = None
        self.timer: TimerHandle | None = None
        self.size = 0  # bytes since the last head, part of a body, or response ended
        self.refusal = b""  # the answer to what is not served. Nothing behind that is read
        self.running: Any = None
        self.shuts_down = False
        self.pipeline: Any = ()  # uvicorn's deque, of 1 KB, is made for who needs it
        self.url = b""

    # States.

    def enter(self, state: State) -> None:
        """Starts the timer of a state. In the same state, the timer runs on. ENDING is the last."""
        if self.state not in (state, ENDING):
            self.state = state
            if self.timer:
                self.timer.cancel()
            seconds = state.seconds
            self.timer = self.loop.call_later(seconds, self.drop) if seconds else None

    def update(self) -> None:
        """Enters the state that an event has led to."""
        if self.flow.write_paused:
            self.enter(UNREAD)
        elif self.running:
            self.enter(RUNNING)
        else:  # line breaks are no head, and make no scope
            self.enter(HEAD if self.scope or self.state is HEAD else IDLE)

    def drop(self) -> None:
        """Ends the connection when the time of its state is over."""
        if self.state and self.state is not IDLE:
            self.warn(f"{self.state.seconds} seconds for {self.state.waits_for}")
        self.transport.abort()

    # Opening and closing.

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self.write = transport.write
        set_option = transport.get_extra_info("socket").setsockopt
        set_option(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, UNSENT)
        self.enter(HEAD)
        if len(self.connections) > MAX_CONNECTIONS:
            connections: Any = self.connections
            ending = (each for each in connections if each.state is ENDING)
            staying = (each for each in ending if not each.transport.is_closing())
            idle = (each for each in connections if each.state is IDLE)
            loser = next(staying, None) or next(idle, self)
            loser.warn("MAX_CONNECTIONS")
            (loser.transport.abort if loser.state is ENDING else loser.close)()

    def close(self) -> None:
        """Ends the connection when the client has taken what was sent. The first call waits for a
        client that may still send, and a second one does not."""
        cycle, may_send = self.running or self.cycle, bool(self.refusal)
        if cycle:  # without keep-alive, nothing behind it is read
            may_send |= cycle.more_body or not (cycle.keep_alive or self.shuts_down)
        is_first = self.state is not ENDING
        self.enter(ENDING)
        if may_send and is_first:
            # To close, or to leave bytes unread, resets the connection: the client would lose the
            # answer (RFC 9112 section 9.6).
            self.transport.write_eof()
            self.flow.resume_reading()
        else:
            self.transport.close()

    def shutdown(self) -> None:
        """At SIGTERM. uvicorn's method would wait for a client that stays after its answer."""
        self.shuts_down = True
        if self.state is ENDING:
            self.close()
        else:
            super().shutdown()

    def is_closing(self) -> bool:
        return self.state is ENDING

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self.state = ENDING
        if self.timer:
            self.timer.cancel()
        self.give_up(499)
        self.cycle, self.pipeline = None, ()  # their transport is this one: each keeps the other
        self.readers.discard(self.transport)

    # Reading. feed_data() calls the on_ methods. What they raise becomes HttpParserError.

    def data_received(self, data: bytes) -> None:
        while data and not self.refusal and self.state is not ENDING:
            piece, data = data[: MAX_HEAD - self.size], data[MAX_HEAD - self.size :]
            self.size += len(piece)
            try:
                self.parser.feed_data(piece)
            except HttpParserUpgrade as upgrade:
                data = self.head_without_upgrade() + piece[upgrade.args[0] :] + data
            except HttpParserError:
                self.refuse(431 if len(self.headers or ()) > MAX_LINES else 400)
            is_large = self.size == MAX_HEAD or len(self.headers or ()) > MAX_LINES
            if is_large and not self.refusal:
                self.refuse(414 if len(self.url) > MAX_HEAD // 2 else 431)
            if self.refusal and self.headers:
                self.headers.clear()  # the client may keep the connection for a minute
        self.update()

    def on_headers_complete(self) -> None:
        if len(self.pipeline) >= MAX_PIPELINED or len(self.headers) > MAX_LINES:
            raise ValueError  # data_received() refuses
        if self.running and not self.pipeline:
            self.pipeline = deque()
        if self.expect_100_continue and self.parser.get_http_version() == "1.0":
            self.expect_100_continue = False  # RFC 9110 section 10.1.1
        super().on_headers_complete()
        self.size, self.headers = 0, []  # a trailer is no header (RFC 9110 section 6.5.1)
        if self.cycle:  # with an Upgrade, which uvicorn ignores, the one before, or None
            self.cycle.transport = self
            if not self.pipeline:
                self.running = self.cycle

    def on_body(self, body: bytes) -> None:
        self.size = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        super().on_message_complete()
        if self.headers and not self.parser.should_keep_alive():
            self.cycle.keep_alive = False  # a trailer said so, and the parser reads no further

    def _should_upgrade(self) -> bool:
        """Lets uvicorn ignore the head of an Upgrade (RFC 9110 section 7.8), which is fed again."""
        if self.scope["method"] == "CONNECT":  # an Upgrade, for the parser
            raise ValueError
        return True

    def head_without_upgrade(self) -> bytes:
        """The last head, for a new parser, because this one skips the body of an Upgrade."""
        version = self.parser.get_http_version().encode()
        lines = [b"%b %b HTTP/%b" % (self.parser.get_method(), self.url, version)]
        lines += [b"%b:%b" % each for each in self.scope["headers"] if each[0] != b"upgrade"]
        self.parser = HttpRequestParser(self)
        self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn does
        return b"\r\n".join([*lines, b"\r\n"])

    # Refusing.

    def refuse(self, status: int) -> None:
        """Answers what is not served, after the requests before it, and ends the connection."""
        self.warn(STATUS_LINE[status][9:-2].decode())
        headers = (b"%b: %b\r\n" % each for each in self.server_state.default_headers)  # the date
        self.refusal = b"".join([STATUS_LINE[status], *headers, REFUSAL])
        if self.pipeline and self.cycle.more_body:  # it would wait for the body that is no HTTP
            self.pipeline.popleft()
        if self.running and not self.running.more_body:
            return  # on_response_complete() sends the refusal
        if not (self.running and self.running.response_started):
            self.write(self.refusal)
        self.give_up(status)
        self.close()

    def give_up(self, status: int) -> None:
        """Ends the request that is answered. RequestLog gets `status` if no response began."""
        request, self.running = self.running, None
        if request:
            request.transport, request.disconnected = ENDED, True
            request.message_event.set()
            if not request.response_started:
                request.scope["state"]["ended"] = status

    def warn(self, reason: str, client: str = "") -> None:
        """Logs why a connection ends, once a second at most, so that nobody can flood the log."""
        if self.loop.time() - self.warned >= 1:
            Protocol.warned = self.loop.time()
            client = client or str(self.client and self.client[0])
            fields = {"message": "connection ended", "reason": reason, "client": client}
            logs.write("WARNING", fields)

    # Writing.

    def pause_writing(self) -> None:
        super().pause_writing()
        self.update()
        state = self.running.scope["state"].get("request") if self.running else None
        owner = owner_of(state) if state else str(self.client)
        for each in self.readers.add(self.transport, owner):
            self.warn("MAX_UNREAD", each)

    def resume_writing(self) -> None:
        super().resume_writing()
        self.update()
        self.readers.discard(self.transport)

    def on_response_complete(self) -> None:
        """Goes on to the next request. uvicorn's method would start a timer of its own."""
        self.running.transport, self.running = ENDED, None
        if self.state is ENDING:
            return
        if self.pipeline:  # its body, which nobody counts yet, waits until it is asked for
            self.running, app = self.pipeline.pop()
            self._start_asgi_task(self.running, app)  # private in uvicorn
        elif self.refusal or self.cycle.more_body:  # the application has not read the body
            self.write(self.refusal)
            self.close()
        else:
            self.flow.resume_reading()
            if self.scope is self.cycle.scope:  # no head has begun behind it
                self.scope, self.url, self.size = None, b"", 0
            self.cycle = None  # uvicorn would keep the request, with its body, until the next
        self.update()
