"""ASGI middleware, one duty each. A host lists the classes from the outside in.

RequestLog comes first, because it makes the RequestState that the others use.
Where nothing is done after the app, __call__ returns its coroutine: 1,000 more would take 2 MB.
"""

import asyncio
import random
import re
from collections import Counter
from collections.abc import Awaitable
from contextlib import suppress
from functools import lru_cache
from inspect import isawaitable
from ipaddress import ip_address
from time import perf_counter
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, IPvAnyNetwork
from pydantic_settings import NoDecode
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lib import logs
from lib.problems import RETRY, HTTPProblem, Respond
from lib.ratelimit import owner_of
from lib.settings import BaseSettings
from lib.state import RequestState, state_of

MAX_BODY = 131_072  # bytes of a request's body
MAX_BODIES = 32_000_000  # bytes of all bodies
MAX_SHARE = 4_000_000  # bytes of the bodies of a user, or of an address without one
SMALL = 8_192  # bytes of a body that always find room
BODY_TIMEOUT = 10  # seconds for a body to arrive
PLAIN_ID = re.compile(rb"[\w.:-]{1,64}")  # an X-Request-ID that is taken over

# Private networks, where the proxies of platforms stand (RFC 1918, 4193, 6598).
PROXIES: Any = "127.0.0.0/8,::1,10.0.0.0/8,172.16.0.0/12,192.168.0.0/16,100.64.0.0/10,fc00::/7"
PORT = re.compile(r"\A([\d.]+|\[.*\]):\d+\Z")  # 192.0.2.1:4711 or [2001:db8::1]:4711
MAX_ADDRESS = 45  # characters of an IP address at most
# A list with commas. NoDecode: pydantic-settings would read JSON.
Networks = Annotated[list[IPvAnyNetwork], NoDecode, BeforeValidator(re.compile(r"\s*,\s*").split)]


class Settings(BaseSettings):
    client_ip_header: str = Field("X-Forwarded-For", pattern=r"^[\w!#$%&'*+.^`|~-]+$")
    forwarded_allow_ips: Networks = Field(PROXIES)


settings = Settings.load()
CLIENT_HEADER = settings.client_ip_header.lower().encode()


def client_address(peer: str, sent: str) -> str:
    """The address of the client: `sent` by a proxy in its header, or else the connection's peer.

    What comes from elsewhere is ignored, because a client can write any header. Of several
    addresses the last counts that is no proxy.
    """
    address, hops = peer, sent.split(",")
    while hops and is_proxy(address):
        address = PORT.sub(r"\1", hops.pop().strip()).strip("[]")[:MAX_ADDRESS] or address
    return address


@lru_cache(4096)
def is_proxy(address: str) -> bool:
    with suppress(ValueError):  # no address
        ip = ip_address(address)
        ip = getattr(ip, "ipv4_mapped", None) or ip  # ::ffff:10.0.0.1 at a socket for both
        return any(ip in network for network in settings.forwarded_allow_ips)
    return False


class RequestLog:
    """Gives each request an id, a RequestState and, when it has ended, a line in the log."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        started, headers = perf_counter(), values_of(scope["headers"])
        scope["headers"] = list(headers.items())  # from here on each name comes once
        request_id = headers.get(b"x-request-id", b"")
        if not PLAIN_ID.fullmatch(request_id):
            request_id = b"%032x" % random.getrandbits(128)
        has_body = headers.get(b"content-length", b"0") != b"0" or b"transfer-encoding" in headers
        peer = (scope.get("client") or [""])[0]
        client = client_address(peer, headers.get(CLIENT_HEADER, b"").decode("latin-1"))
        if client != peer:
            scope["client"] = client, 0  # for telemetry
        state = RequestState(headers, request_id.decode(), client, None if has_body else b"")
        scope.setdefault("state", {})["request"] = state  # optional in ASGI

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                state.status = message["status"]
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", request_id)]
                if state.body is None:  # what is left of the request is not read
                    message["headers"].append((b"connection", b"close"))
            await send(message)

        try:
            await self.app(scope, receive, send_with_id)
        finally:
            self.log(scope, state, perf_counter() - started)

    def log(self, scope: Scope, state: RequestState, seconds: float) -> None:
        route = scope.get("route")
        fields = {
            "message": "request",
            "request_id": state.request_id,
            "method": scope["method"],
            "route": route.path if route else None,
            "status": scope["state"].get("ended") or state.status or 499,  # see lib/protocol.py
            "duration_ms": round(seconds * 1000, 2),
            "user_id": state.user_id,
            "client": state.client,
        }
        if state.reason:
            fields["reason"] = state.reason
        logs.write("INFO", fields)


def values_of(lines: list[tuple[bytes, bytes]]) -> dict[bytes, bytes]:
    """The value of each header: the lines of a name are one list (RFC 9110 section 5.3).
    White space around a value is no part of it (section 5.5)."""
    values: dict[bytes, bytes] = {}
    for name, value in lines:
        value = value.strip(b" \t")
        values[name] = values[name] + b", " + value if name in values else value
    return values


class ErrorResponses:
    """Answers an exception by a handler of the app, or by `respond`: inside CORS, so that a browser
    may read a 500 too. A 500, and what breaks a response off, is raised again: uvicorn then closes
    the connection."""

    def __init__(self, app: ASGIApp, respond: Respond) -> None:
        self.app, self.respond = app, respond

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await self.app(scope, receive, send)
        except (Exception, asyncio.CancelledError) as error:
            if scope["type"] != "http":
                raise
            if state_of(scope).status:  # the response has started
                state_of(scope).reason = f"broken off: {type(error).__name__}"
                if isinstance(error, Exception):
                    raise
                return  # uvicorn cancelled it after SIGTERM, because its client does not read
            if not isinstance(error, Exception):
                error = HTTPProblem(503, "The service is shutting down", headers=RETRY)
            # The app's own handlers, which FastAPI's routes heed and prepared ones do not.
            handlers = getattr(scope.get("app"), "exception_handlers", {})
            kinds = getattr(error, "status_code", None), *type(error).__mro__
            handler = next((handlers[kind] for kind in kinds if kind in handlers), self.respond)
            answer = handler(Request(scope), error)
            response = await answer if isawaitable(answer) else answer
            if response.status_code == 500:
                response.headers["Connection"] = "close"  # RFC 9112 section 9.6
            await response(scope, receive, send)
            if response.status_code == 500:
                raise


class BodyLimit:
    """Bounds the bytes and the time of a body, and the bytes of all until their requests end.

    Raises HTTPProblem: 413 and 415 by the headers at once, the others when a route asks for the
    body, so that a 401 or 404 comes first. A user, or an address without one, has a share.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app
        self.held = Counter[str]()  # bytes of bodies, by user or address

    def __call__(self, scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:
        has_none = scope["type"] != "http" or state_of(scope).body is not None
        return (self.app if has_none else self.limit)(scope, receive, send)

    async def limit(self, scope: Scope, receive: Receive, send: Send) -> None:
        state, body, owner = state_of(scope), bytearray(), ""
        if state.headers.get(b"content-encoding", b"identity").lower() != b"identity":
            raise HTTPProblem(415, "The body must not be compressed")
        self.check_size(int(state.headers.get(b"content-length", 0)))

        async def receive_whole() -> Message:
            nonlocal owner
            if state.body is not None:
                return await receive()
            owner = owner_of(state)
            try:
                async with asyncio.timeout(BODY_TIMEOUT):
                    await self.read(receive, owner, body)
            except TimeoutError:
                raise HTTPProblem(408, f"The body took over {BODY_TIMEOUT} seconds") from None
            state.body = bytes(body)
            body.clear()  # a copy less
            return {"type": "http.request", "body": state.body, "more_body": False}

        try:
            await self.app(scope, receive_whole, send)
        finally:
            self.held[owner] -= len(state.body or body)
            if not self.held[owner]:
                del self.held[owner]

    async def read(self, receive: Receive, owner: str, body: bytearray) -> None:
        """Adds to the body, and to what its owner holds."""
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":  # FastAPI would make 400 of others
                raise HTTPProblem(499, "The client left")
            chunk = message.get("body", b"")
            body += chunk
            self.held[owner] += len(chunk)
            self.check_size(len(body))
            is_large = len(body) > SMALL
            if is_large and (self.held[owner] > MAX_SHARE or self.held.total() > MAX_BODIES):
                raise HTTPProblem(503, "Too many uploads", headers=RETRY)
            if not message.get("more_body", False):
                return

    def check_size(self, size: int) -> None:
        if size > MAX_BODY:
            raise HTTPProblem(413, f"The body is larger than {MAX_BODY} bytes")
