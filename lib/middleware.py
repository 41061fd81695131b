"""ASGI middleware, one duty each. A host lists the classes from the outside in.

RequestLog comes first. Its state has the headers, and the body once that is there.
"""

import asyncio
import random
import re
from collections import deque
from collections.abc import Awaitable, Callable
from time import perf_counter
from typing import Any

from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lib import logs
from lib.problems import RETRY, HTTPProblem, Respond

MAX_BODY = 131_072  # bytes of a request's body
MAX_BODIES = 32_000_000  # bytes of all bodies
BODY_TIMEOUT = 10  # seconds for a body to arrive
MAX_CONCURRENT = 64  # requests in the framework: at 1,000 connections 5 MB less than all
MAX_WAITING = 2000  # requests that wait for that; one more is refused at once
STALLED = 0.25  # seconds without a response after which the limit is off

PLAIN_ID = re.compile(rb"[\w.:-]{1,64}")
METHODS = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE"]
EXPOSED = ["ETag", "Idempotent-Replayed", "Link", "Location", "Retry-After", "X-Request-ID"]


class RequestLog:
    """Gives each request an id and, when it has ended, a line in the log.

    A response that comes before the request's body closes the connection.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        started, method, state = perf_counter(), scope["method"], scope["state"]
        headers = state["headers"] = dict(scope["headers"][::-1])
        request_id = headers.get(b"x-request-id", b"")
        if not PLAIN_ID.fullmatch(request_id):
            request_id = b"%032x" % random.getrandbits(128)
        state["request_id"], state["user_id"], state["reason"] = request_id.decode(), None, ""
        if b"content-length" not in headers and b"transfer-encoding" not in headers:
            state["body"] = b""

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                state["status"] = message["status"]
                message["headers"].append((b"x-request-id", request_id))
                if "body" not in state:
                    message["headers"].append((b"connection", b"close"))
            await send(message)

        try:
            await self.app(scope, receive, send_with_id)
        finally:
            self.log(method, scope, perf_counter() - started)
        scope.clear()  # uvicorn keeps it until the connection's next request

    def log(self, method: str, scope: Scope, seconds: float) -> None:
        state, route = scope["state"], scope.get("route")
        fields = {
            "message": "request",
            "request_id": state["request_id"],
            "method": method,
            "route": route.path if route else None,
            "status": state.get("status", 499),  # 499: the client left before there was one
            "duration_ms": round(seconds * 1000, 2),
            "user_id": state["user_id"],
        }
        if state["reason"]:
            fields["reason"] = state["reason"]
        logs.write("INFO", fields)


def cors(origins: str, setting: str) -> list[Middleware]:
    """CORS for origins separated by commas. Without any it is left out: it takes 20 us a request.

    Raises SystemExit for an origin that no browser sends: with a path, or without a scheme.
    """
    allowed = [origin.strip() for origin in origins.split(",") if origin.strip()]
    if not all(re.fullmatch(r"\*|https?://[\w.:\[\]-]+", origin) for origin in allowed):
        raise SystemExit(f"{setting} takes origins like https://app.example.com, no / at the end")
    options: Any = {"allow_origins": allowed, "allow_methods": METHODS, "allow_headers": ["*"]}
    options |= {"allow_credentials": True, "expose_headers": EXPOSED}
    return [Middleware(CORSMiddleware, **options)] if allowed else []


class ErrorResponses:
    """Answers every exception by `respond`: inside CORS, so that a browser may read a 500 too.

    What became a 500 is raised again, for logs and telemetry.
    """

    def __init__(self, app: ASGIApp, respond: Respond) -> None:
        self.app, self.respond = app, respond

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await self.app(scope, receive, send)
        except ClientDisconnect:
            pass
        except Exception as error:
            if scope["type"] != "http" or "status" in scope["state"]:  # the response has started
                raise
            response = await self.respond(Request(scope), error)
            await response(scope, receive, send)
            if response.status_code == 500:
                raise


class CanonicalPath:
    """Gives each path one form before it is routed, and routes HEAD as GET.

    A redirect can lose the Authorization. An alias is a pattern, what it becomes, and the type of
    the body where only that is meant.
    """

    def __init__(self, app: ASGIApp, aliases: list[tuple[str, str, bytes]], unless: str) -> None:
        self.app, self.unless = app, re.compile(unless)
        self.aliases = [(re.compile("^" + path), form, kind) for path, form, kind in aliases]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        path = scope["path"].rstrip("/") or "/"
        if not self.unless.fullmatch(path):
            sent = scope["state"]["headers"].get(b"content-type", b"")
            for pattern, form, kind in self.aliases:
                path = pattern.sub(form, path) if sent.startswith(kind) else path
        scope["path"] = path
        if scope["method"] != "HEAD":
            return await self.app(scope, receive, send)
        routed = {**scope, "method": "GET"}  # uvicorn looks at the original and sends no body
        await self.app(routed, receive, send)
        scope["route"] = routed.get("route")


class BodyLimit:
    """Bounds the bytes and the time of a body, and the bytes of all until their requests end.

    A route that asks for the body gets it whole, or HTTPProblem is raised: 401 and 404 come first.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app, self.pending = app, 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or "body" in scope["state"]:
            return await self.app(scope, receive, send)
        state, headers = scope["state"], scope["state"]["headers"]
        if headers.get(b"content-encoding", b"identity").lower() != b"identity":
            raise HTTPProblem(415, "The body must not be compressed")
        self.check_size(int(headers.get(b"content-length", 0)))

        async def receive_whole() -> Message:
            if "body" in state:
                return await receive()
            state["body"] = await self.read(receive)
            return {"type": "http.request", "body": state["body"], "more_body": False}

        try:
            await self.app(scope, receive_whole, send)
        finally:
            self.pending -= len(state.get("body", b""))

    async def read(self, receive: Receive) -> bytes:
        body, more = bytearray(), True
        try:
            async with asyncio.timeout(BODY_TIMEOUT):
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise ClientDisconnect
                    body += message["body"]
                    self.pending += len(message["body"])
                    self.check_size(len(body))
                    if self.pending > MAX_BODIES:
                        raise HTTPProblem(503, "Too many uploads", headers=RETRY)
                    more = message["more_body"]
        except BaseException as error:
            self.pending -= len(body)
            if not isinstance(error, TimeoutError):
                raise
            text = f"The body did not arrive within {BODY_TIMEOUT} seconds"
            raise HTTPProblem(408, text) from None
        return bytes(body)

    def check_size(self, size: int) -> None:
        if size > MAX_BODY:
            raise HTTPProblem(413, f"The body is larger than {MAX_BODY} bytes")


class ConcurrencyLimit:
    """Lets MAX_CONCURRENT of the requests that `applies_to` picks into the framework at a time.

    A request counts from when its body is there until its response starts, so slow clients hold up
    nobody. When nothing is answered for STALLED seconds, the limit is off until something is: what
    does not need a frozen database gets through.
    """

    def __init__(self, app: ASGIApp, applies_to: Callable[[Scope], Awaitable[bool]]) -> None:
        self.app, self.applies_to = app, applies_to
        self.free, self.waiting = MAX_CONCURRENT, deque[asyncio.Future[None]]()
        self.stalled = self.answered = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not await self.applies_to(scope):
            return await self.app(scope, receive, send)
        messages = [] if "body" in scope["state"] else [await receive()]
        await self.enter()
        inside = True

        async def receive_again() -> Message:
            return messages.pop() if messages else await receive()

        async def leave_and_send(message: Message) -> None:
            nonlocal inside
            if inside:
                inside = False
                self.leave()
            await send(message)

        try:
            await self.app(scope, receive_again, leave_and_send)
        finally:
            if inside:
                self.leave()

    async def enter(self) -> None:
        if self.stalled or (self.free > 0 and not self.waiting):
            self.free -= 1
            return
        if len(self.waiting) >= MAX_WAITING:
            raise HTTPProblem(503, "Too many requests wait", "unavailable", RETRY)
        loop = asyncio.get_running_loop()
        if not self.waiting:
            self.answered = False
            loop.call_later(STALLED, self.watch)
        self.waiting.append(loop.create_future())
        await self.waiting[-1]

    def leave(self) -> None:
        self.free += 1
        self.stalled, self.answered = False, True
        self.let_in()

    def let_in(self) -> None:
        while self.waiting and (self.stalled or self.free > 0):
            waiter = self.waiting.popleft()
            if not waiter.done():
                self.free -= 1
                waiter.set_result(None)

    def watch(self) -> None:
        """Looks every STALLED seconds, while requests wait, whether any was answered."""
        if self.waiting:
            self.stalled, self.answered = not self.answered, False
            self.let_in()
        if self.waiting:
            asyncio.get_running_loop().call_later(STALLED, self.watch)
