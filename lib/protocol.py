"""uvicorn's HTTP protocol, with bounds on what a client can make a connection hold, and how long.

uvicorn reads heads of any size, and waits for ever for their end and for clients that do not read.
"""

import re
import resource
import socket
from asyncio import TimerHandle
from http import HTTPStatus
from typing import Any, ClassVar

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from lib.ratelimit import networks
from lib.readers import Readers

# Open connections, of 7 KB each. 64 file descriptors listen (lib/serve.py), 64 are for the rest.
MAX_CONNECTIONS = min(5_000, resource.getrlimit(resource.RLIMIT_NOFILE)[0] - 128)
MAX_HEAD = 65_536  # bytes of a request's target, header and trailer together
MAX_PIPELINED = 32  # requests of a connection that wait for the one before
HEAD_TIMEOUT = 10  # seconds for a head, from its first byte or from the connection's start
LINGER = 2  # seconds that a refused client has to read the refusal
UNREAD = 65_536  # bytes of a response that the kernel holds unsent; above, the client is watched
READ_TIMEOUT = 60  # seconds to take a response

UPGRADE = re.compile(rb"\A((?:[^\r\n]+\r\n)+?)upgrade:", re.I)  # in the first head of some bytes


class Protocol(HttpToolsProtocol):
    """A connection. The transport, the parser and uvicorn call the methods that override."""

    # With more than 30 attributes in its dictionary, a connection takes 1 KB more.
    __slots__ = ("refused", "size", "timers", "unparsed")
    readers: ClassVar[Readers] = Readers()
    url = b""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.timers: dict[str, TimerHandle] = {}
        self.size = 0  # bytes of the request's target, header and trailer that were parsed
        self.unparsed = 0  # bytes of a line that has not ended yet
        self.refused = False

    def start(self, timer: str, seconds: float, end: Any) -> None:
        if timer not in self.timers:
            self.timers[timer] = self.loop.call_later(seconds, end)

    def stop(self, timer: str) -> None:
        if timer in self.timers:
            self.timers.pop(timer).cancel()

    # Called by the transport.

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        transport.set_write_buffer_limits(UNREAD)
        peer = transport.get_extra_info("socket")
        peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, UNREAD)
        self.start("head", HEAD_TIMEOUT, self.end)
        if len(self.connections) > MAX_CONNECTIONS:
            connections: Any = self.connections  # those that are idle give way
            idle = (each for each in connections if each.timeout_keep_alive_task)
            next((each for each in idle if not each.transport.is_closing()), self).end()

    def end(self) -> None:
        """Closes the connection when its client has taken what was sent, or after READ_TIMEOUT."""
        self.transport.close()
        self.start("read", READ_TIMEOUT, self.transport.abort)

    def timeout_keep_alive_handler(self) -> None:
        if not self.transport.is_closing():
            self.end()

    def data_received(self, data: bytes) -> None:
        if self.refused:
            return
        if (self.cycle is None or self.cycle.response_complete) and b"pgrade:" in data:
            # httptools takes the body after an Upgrade (Java asks for h2c) for another protocol.
            data = UPGRADE.sub(rb"\1x-upgrade:", data)
        self.unparsed += len(data)
        super().data_received(data)
        if self.unparsed > MAX_HEAD and not self.refused:
            self.refuse(431)
        elif self.cycle is None or self.cycle.response_complete:
            self.start("head", HEAD_TIMEOUT, self.end)

    def pause_writing(self) -> None:
        super().pause_writing()
        state = self.scope["state"].get("request")
        self.start("read", READ_TIMEOUT, self.transport.abort)
        client = state.user_id or networks(state.client)[0] if state else ""
        self.readers.add(self.transport, client)

    def resume_writing(self) -> None:
        super().resume_writing()
        if not self.transport.is_closing():  # otherwise the rest has to be taken in time as well
            self.stop("read")
        self.readers.discard(self.transport)

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._unset_keepalive_if_required()  # uvicorn leaves it to run after a reset
        self.readers.discard(self.transport)
        for timer in self.timers.values():
            timer.cancel()

    # Called by the parser. After an exception it stops, and uvicorn calls send_400_response().

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self.size = 0

    def on_url(self, url: bytes) -> None:
        super().on_url(url)
        self.count(len(url))

    def on_header(self, name: bytes, value: bytes) -> None:  # and of a trailer
        super().on_header(name, value)
        self.unparsed = 0
        self.count(len(name) + len(value) + 4)

    def count(self, size: int) -> None:
        """Adds to the size of a head. Raises ValueError when it is too large."""
        self.size += size
        if self.size > MAX_HEAD:
            raise ValueError

    def on_headers_complete(self) -> None:
        if len(self.pipeline) >= MAX_PIPELINED:
            raise ValueError
        self.unparsed = 0
        self.stop("head")
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self.unparsed = 0
        super().on_body(body)

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.transport.is_closing():  # it closes when the client has taken the response
            self.start("read", READ_TIMEOUT, self.transport.abort)
        elif self.scope is not self.cycle.scope:  # the next head has begun
            self.start("head", HEAD_TIMEOUT, self.end)

    # Refusals.

    def send_400_response(self, msg: str) -> None:
        self.refuse(431 if self.size > MAX_HEAD else 400)

    def refuse(self, status: int) -> None:
        """Closes the connection after a refusal, or after the answers to the requests before."""
        self.refused, cycle = True, self.cycle
        answered = cycle is None or cycle.response_complete
        if not answered and (self.pipeline or not cycle.more_body):
            cycle.keep_alive = False
            return
        if not answered:  # it is this request's trailer that is too large
            cycle.disconnected = True
            cycle.message_event.set()
        if answered or not cycle.response_started:
            self.transport.write(refusal(414 if len(self.url) > MAX_HEAD else status))
        # To close at once would reset the connection of a client that still sends.
        self.transport.write_eof()
        self.start("linger", LINGER, self.transport.abort)


def refusal(status: int) -> bytes:
    """A response in plain text, because the application does not see the request."""
    text = HTTPStatus(status).phrase.encode()
    headers = b"content-type: text/plain\r\ncontent-length: %d\r\nconnection: close\r\n\r\n"
    return STATUS_LINE[status] + headers % len(text) + text
