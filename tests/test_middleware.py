"""Each middleware of lib/middleware.py by itself, around an application of a few lines."""

import asyncio
import json
import tracemalloc
from collections.abc import Awaitable, Callable
from contextlib import nullcontext
from typing import Annotated, Any

import pytest
from fastapi import FastAPI, Form, Response
from starlette.exceptions import HTTPException
from starlette.types import Message, Receive, Scope, Send

from lib import middleware
from lib.middleware import BodyLimit, ErrorResponses, RequestLog
from lib.paths import CanonicalRequest
from lib.problems import HTTPProblem, responder
from lib.routing import PreparedRoutes
from lib.state import RequestState, state_of

parametrize = pytest.mark.parametrize


def scope(**headers: str) -> Scope:
    sent = {name.replace("_", "-").encode(): value.encode() for name, value in headers.items()}
    state = RequestState(sent, "id", "192.0.2.1", None if sent else b"")
    http: dict[str, Any] = {"type": "http", "method": "POST", "headers": [], "client": None}
    return http | {"state": {"request": state}}


async def nothing(*_: Any) -> Any:
    """A send() that takes everything; a receive() that never is called."""


async def never() -> Any:
    await asyncio.sleep(60)


def run(story: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(story(), 20))


# BodyLimit.


async def read(limit: BodyLimit, receive: Receive, **headers: str) -> bytes:
    """The body as the application gets it."""
    got = b""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        nonlocal got
        got = (await receive())["body"]

    limit.app = app
    await limit(scope(**(headers or {"transfer_encoding": "chunked"})), receive, nothing)
    return got


def chunks(size: int, times: int = 1) -> Receive:
    messages = [{"body": b"x" * size, "more_body": n > 0} for n in range(times)]

    async def receive() -> Message:
        return {"type": "http.request", **messages.pop()}

    return receive


@parametrize(("size", "status"), [(131_072, 0), (131_073, 413)])
def test_a_body_has_128_kib_at_most_however_it_comes(size: int, status: int) -> None:
    async def story() -> None:
        for headers in ({"content_length": f"{size}"}, {"transfer_encoding": "chunked"}):
            with pytest.raises(HTTPProblem) if status else nullcontext() as raised:
                assert len(await read(BodyLimit(nothing), chunks(size), **headers)) == size
            assert raised is None or raised.value.status_code == status

    run(story)


def test_a_body_that_does_not_come_is_408(monkeypatch: pytest.MonkeyPatch) -> None:
    async def story() -> None:
        with pytest.raises(HTTPProblem) as raised:
            await read(BodyLimit(nothing), never)
        assert raised.value.status_code == 408

    monkeypatch.setattr(middleware, "BODY_TIMEOUT", middleware.BODY_TIMEOUT / 100)
    run(lambda: asyncio.wait_for(story(), 1))


def test_all_bodies_have_one_bound_and_8_kib_always_find_room() -> None:
    async def story() -> None:
        limit = BodyLimit(nothing)
        for _ in range(300):  # one after the other is no matter
            await read(limit, chunks(131_072))
        limit.held["others"] = middleware.MAX_BODIES
        assert len(await read(limit, chunks(8192))) == 8192
        with pytest.raises(HTTPProblem) as raised:
            await read(limit, chunks(3000, 3))
        assert raised.value.status_code == 503
        assert limit.held == {"others": middleware.MAX_BODIES}

    run(story)


def test_a_body_is_held_once() -> None:
    held = 0

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        nonlocal held
        await receive()
        held = tracemalloc.get_traced_memory()[0]

    chunk = chunks(131_072)
    tracemalloc.start()
    run(lambda: BodyLimit(app)(scope(transfer_encoding="chunked"), chunk, nothing))
    tracemalloc.stop()
    assert 131_072 <= held < 200_000


def test_a_body_counts_for_its_user_until_the_request_has_ended() -> None:
    async def story() -> None:
        gate = asyncio.Event()

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            await receive()
            await gate.wait()

        limit = BodyLimit(app)

        def send(user: str | None, network: str = "192.0.2.1") -> asyncio.Task[None]:
            sent = scope(x="1")
            sent["state"]["request"].user_id, sent["state"]["request"].client = user, network
            return asyncio.ensure_future(limit(sent, chunks(131_072), nothing))

        waiting = [send("u") for _ in range(30)] + [send(None) for _ in range(30)]
        await asyncio.sleep(0.1)
        for user in "u", None:
            with pytest.raises(HTTPProblem, match="uploads"):
                await send(user)
        others = [send("v"), send(None, "198.51.100.1")]
        gate.set()
        await asyncio.gather(*waiting, *others)
        assert list(limit.held) == []

    run(story)


# The others.


HOPS = "9.9.9.9, 203.0.113.7:4711, 10.0.0.1"  # the client writes the first


@parametrize(("peer", "sent", "client"), [
    ("10.0.0.1", HOPS, "203.0.113.7"), ("8.8.8.8", HOPS, "8.8.8.8"), ("::1", "", "::1"),
    ("::ffff:10.0.0.1", HOPS, "203.0.113.7"), ("10.0.0.1", "9.9.9.9,::FFFF:a00:1", "9.9.9.9"),
    ("10.0.0.1", "[2001:db8::1]:4711", "2001:db8::1"), ("10.0.0.1", "10.0.0.2,::1", "10.0.0.2"),
])  # fmt: skip
def test_a_header_that_names_the_client_is_believed_of_proxies_alone(
    peer: str, sent: str, client: str
) -> None:
    seen: list[Any] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        seen.extend([state_of(scope).client, scope["client"][0]])

    headers = [(b"x-forwarded-for", sent.encode())]
    given = {**scope(), "client": (peer, 1), "headers": headers}
    run(lambda: RequestLog(app)(given, nothing, nothing))
    assert seen == [client, client]


def test_a_proxy_outside_of_private_networks_is_believed_where_a_setting_names_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for never in ("*", "203.0.113.7/24", "proxy.example"):
        monkeypatch.setenv("FORWARDED_ALLOW_IPS", never)
        with pytest.raises(SystemExit, match="FORWARDED_ALLOW_IPS"):
            middleware.Settings.load()
    monkeypatch.setenv("FORWARDED_ALLOW_IPS", "10.0.0.0/8, 203.0.113.0/24")
    monkeypatch.setattr(middleware, "settings", middleware.Settings.load())
    middleware.is_proxy.cache_clear()
    assert middleware.client_address("10.0.0.1", HOPS) == "9.9.9.9"
    middleware.is_proxy.cache_clear()


@parametrize(
    ("error", "status", "headers"),
    [
        (ValueError, 500, (b"connection", b"close")),
        (asyncio.CancelledError, 503, (b"x", b"y")),  # by uvicorn, after SIGTERM
    ],
)
def test_an_error_is_answered_and_one_that_ends_the_connection_says_so(
    error: type[BaseException], status: int, headers: tuple[bytes, bytes]
) -> None:
    sent: list[Message] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        raise error

    async def respond(request: Any, error: Exception) -> Response:
        return Response(status_code=getattr(error, "status_code", 500), headers={"x": "y"})

    async def send(message: Message) -> None:
        sent.append(message)

    async def story() -> None:
        with pytest.raises(ValueError) if status == 500 else nullcontext():
            await ErrorResponses(app, respond)(scope(), nothing, send)

    run(story)
    assert sent[0]["status"] == status
    assert headers in sent[0]["headers"]


async def breaks_off(scope: Scope, receive: Receive, send: Send) -> None:
    await send({"type": "http.response.start", "status": 200})
    raise ValueError


respond = responder("test", lambda: HTTPProblem(404), {})
stock, prepared = FastAPI(exception_handlers={HTTPException: respond}), PreparedRoutes(nothing)


@stock.post("/json")
async def read_json(item: dict[str, str]) -> Response:
    return Response()


@stock.post("/form")
async def read_form(title: Annotated[str, Form()]) -> Response:
    return Response()


@parametrize(("app", "path", "status", "reason"), [
    (nothing, "/", 499, None), (breaks_off, "/", 200, "broken off: ValueError"),
    (stock, "/json", 499, None), (stock, "/form", 499, None), (prepared, "/json", 499, None),
])  # fmt: skip
def test_the_log_says_that_a_client_left_or_that_a_response_broke_off(
    app: Any, path: str, status: int, reason: str | None, capfd: pytest.CaptureFixture[str]
) -> None:
    part = {"type": "http.request", "body": b"x" * 9000, "more_body": True}
    messages: list[Message] = [{"type": "http.disconnect"}, part]

    async def receive() -> Message:
        return messages.pop()

    async def story() -> None:
        await prepared({"type": "lifespan", "app": stock}, nothing, nothing)
        form = b"application/x-www-form-urlencoded"
        headers = [(b"transfer-encoding", b"chunked"), (b"content-type", form)]
        sent = {**scope(), "headers": headers, "path": path, "query_string": b"", "root_path": ""}
        served = RequestLog(ErrorResponses(BodyLimit(app), respond))
        with pytest.raises(ValueError) if reason else nullcontext():
            await served(sent | {"app": stock}, receive, nothing)

    run(story)
    line = json.loads(capfd.readouterr().out)
    assert (line["status"], line.get("reason")) == (status, reason)


def test_a_server_may_leave_out_what_is_optional_in_asgi() -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        assert (await receive()).get("body", b"") == b""
        await send({"type": "http.response.start", "status": 204})

    async def receive() -> Message:
        return {"type": "http.request"}

    async def send(message: Message) -> None:
        assert [name for name, _ in message["headers"]] == [b"x-request-id"]

    least = {"type": "http", "method": "POST", "path": "/", "query_string": b""}
    served = RequestLog(CanonicalRequest(BodyLimit(app), {}, "/tasks"))
    run(lambda: served({**least, "headers": [(b"content-length", b"1")]}, receive, send))
    run(lambda: served({**least, "headers": [], "raw_path": None}, receive, send))


@parametrize(("path", "routed"), [
    ("/svc", "/svc/"), ("/svc/", "/svc/"), ("/svc/todo", "/svc/tasks"), ("/todo", "/svc/tasks"),
    ("/svcs", "/svc/svcs"),
])  # fmt: skip
def test_a_path_is_found_below_the_root_path(path: str, routed: str) -> None:
    given = {**scope(), "path": path, "root_path": "/svc/", "query_string": b""}
    run(lambda: CanonicalRequest(nothing, {"todo": "tasks"}, "-")(given, nothing, nothing))
    assert (given["root_path"], given["path"]) == ("/svc", routed)
