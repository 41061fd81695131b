"""uvicorn's HTTP protocol, with bounds on what a client makes a connection hold, and how long.

uvicorn 0.54 sets no bounds, loses the body behind an Upgrade, and takes trailers for headers.

    state                    what happens                 timer
    timers["head"]           a head is awaited or read    HEAD_TIMEOUT, close()
    running                  a request is answered        none: the application's own
    timeout_keep_alive_task  all requests are answered    KEEP_ALIVE, close()
    refused                  what comes is thrown away    "last": READ_TIMEOUT, abort()
    transport.is_closing()   the client reads the rest    "last", or the kernel's
    flow.write_paused        more than UNREAD bytes wait  "last", until it is a quarter

`running` is the request that is answered, `pipeline` has those that wait, `cycle` is the newest.
"""

import resource
import socket
from asyncio import TimerHandle
from collections import deque
from typing import Any, ClassVar

from httptools import HttpParserError, HttpParserUpgrade, HttpRequestParser
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from lib.ratelimit import networks
from lib.readers import Readers

# Open connections, of 7 KB each. 64 file descriptors listen (lib/serve.py), 64 are for the rest.
MAX_CONNECTIONS = min(5_000, resource.getrlimit(resource.RLIMIT_NOFILE)[0] - 128)
if MAX_CONNECTIONS < 1:
    raise SystemExit("The service needs more than 128 file descriptors (ulimit -n)")
MAX_HEAD = 65_536  # bytes of target and headers, or of a trailer. Behind others, twice as many
MAX_PIPELINED = 32  # requests of a connection that wait for the one before
HEAD_TIMEOUT = 10  # seconds for a head, from its first byte or the connection's start
UNREAD = 65_536  # bytes that wait unsent in the kernel, and then in the transport
READ_TIMEOUT = 60  # seconds to take a response or a refusal
LAST_SECONDS = 7  # to take a response after SIGTERM, one less than lib.serve.SHUTDOWN
REFUSAL = b"content-length: 0\r\nconnection: close\r\n\r\n"
NOTHING: Any = deque(maxlen=0)  # a list that drops what is appended


class Protocol(HttpToolsProtocol):
    """A connection. The transport, the parser and uvicorn call its methods."""

    # With more than 30 attributes in its dictionary, a connection takes 1 KB more.
    __slots__ = ("refused", "running", "size", "timers")
    readers: ClassVar[Readers] = Readers()
    url = b""  # before the first request

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.timers: dict[str, TimerHandle] = {}
        self.size = 0  # bytes of the head or trailer that is being read
        self.refused = False
        self.running: Any = None

    def start(self, timer: str, seconds: float, end: Any) -> None:
        if timer not in self.timers:
            self.timers[timer] = self.loop.call_later(seconds, end)

    def stop(self, timer: str) -> None:
        if timer in self.timers:
            self.timers.pop(timer).cancel()

    # Opening and closing.

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        transport.set_write_buffer_limits(UNREAD)
        set_option = transport.get_extra_info("socket").setsockopt
        set_option(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, UNREAD)
        if hasattr(socket, "TCP_USER_TIMEOUT"):  # Linux. uvicorn closes without "last"
            set_option(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, READ_TIMEOUT * 1000)
        self.start("head", HEAD_TIMEOUT, self.close)
        if len(self.connections) > MAX_CONNECTIONS:
            connections: Any = self.connections  # those that are idle give way
            idle = (each for each in connections if each.timeout_keep_alive_task)
            next((each for each in idle if not each.transport.is_closing()), self).close()

    def close(self) -> None:
        """Ends the connection when its client has taken what was sent, or after READ_TIMEOUT."""
        self.transport.close()
        self.start("last", READ_TIMEOUT, self.transport.abort)

    timeout_keep_alive_handler = close

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(None)  # after a reset, uvicorn would leave a timer to run
        self.give_up(499)
        self.readers.discard(self.transport)
        for timer in self.timers.values():
            timer.cancel()

    def shutdown(self) -> None:
        """SIGTERM came. Who has not read all is dropped before uvicorn cancels it."""
        super().shutdown()
        unread, abort = self.transport.get_write_buffer_size, self.transport.abort
        self.start("stop", LAST_SECONDS, lambda: abort() if unread() else None)

    def give_up(self, status: int) -> None:
        """Ends the request that is answered. RequestLog gets `status` if no response began."""
        request, self.running = self.running, None
        if request:
            request.disconnected, request.waiting_for_100_continue = True, False
            request.message_event.set()
            if not request.response_started:
                request.scope["state"]["ended"] = status

    # Reading. feed_data() calls the on_ methods. What they raise becomes HttpParserError.

    def data_received(self, data: bytes) -> None:
        self._unset_keepalive_if_required()
        while data and not self.refused:
            piece, data = data[: MAX_HEAD - self.size], data[MAX_HEAD - self.size :]
            self.size += len(piece)
            try:
                self.parser.feed_data(piece)
            except HttpParserUpgrade as upgrade:
                data = self.head_without_upgrade() + piece[upgrade.args[0] :] + data
            except HttpParserError:
                self.refuse(400)
            if self.size == MAX_HEAD and not self.refused:
                self.refuse(414 if len(self.url) > MAX_HEAD // 2 else 431)
        if not self.refused and not self.running:
            self.start("head", HEAD_TIMEOUT, self.close)

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

    def on_headers_complete(self) -> None:
        if len(self.pipeline) >= MAX_PIPELINED:
            raise ValueError  # data_received() refuses
        if self.timers:
            self.stop("head")
        self.pipeline = (self.pipeline or deque()) if self.running else NOTHING  # saves 1 KB
        super().on_headers_complete()
        if not self.pipeline:
            self.running = self.cycle
        self.size, self.headers = 0, NOTHING  # a trailer is no header (RFC 9110 section 6.5.1)

    def on_body(self, body: bytes) -> None:
        self.size = 0
        super().on_body(body)

    def refuse(self, status: int) -> None:
        """Ends the connection after the answers before, or a refusal if none has begun."""
        self.refused = True
        self.stop("head")
        if self.running and (self.pipeline or not self.running.more_body):
            self.cycle.keep_alive = False  # uvicorn closes after it
            return
        if not (self.running and self.running.response_started):
            self.transport.write(STATUS_LINE[status] + REFUSAL)
        self.give_up(status)
        # To close, or to leave bytes unread, would reset a client that still sends.
        self.transport.write_eof()
        self.flow.resume_reading()
        self.start("last", READ_TIMEOUT, self.transport.abort)

    # Writing.

    def pause_writing(self) -> None:
        super().pause_writing()
        self.start("last", READ_TIMEOUT, self.transport.abort)
        state = self.running.scope["state"].get("request") if self.running else None
        client = (state.user_id or networks(state.client)[0]) if state else str(self.client)
        self.readers.add(self.transport, client)

    def resume_writing(self) -> None:
        super().resume_writing()
        if not (self.refused or self.transport.is_closing()):
            self.stop("last")
        self.readers.discard(self.transport)

    def on_response_complete(self) -> None:
        self.running = self.pipeline[-1][0] if self.pipeline else None  # what uvicorn starts next
        super().on_response_complete()
        if self.transport.is_closing():  # uvicorn waits for ever for the client to read
            self.close()
        elif self.running:  # its body, which nobody counts yet, waits until it is asked for
            self.flow.pause_reading()
        elif self.scope is not self.cycle.scope or self.cycle.more_body:  # something has begun
            self.start("head", HEAD_TIMEOUT, self.close)
        else:  # uvicorn would keep the request, with its body, until the next one
            self.cycle, self.scope, self.url = None, None, b""  # type: ignore[assignment]
            self.size = 0
