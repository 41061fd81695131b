"""Each middleware of lib/middleware.py by itself, around an application of a few lines."""

import asyncio
import json
import logging
import os
from collections.abc import Awaitable, Callable
from contextlib import nullcontext
from typing import Any

import pytest
from starlette.requests import ClientDisconnect
from starlette.types import Message, Receive, Scope, Send

from lib import logs, middleware
from lib.middleware import BodyLimit, ConcurrencyLimit, ErrorResponses, RequestLog
from lib.problems import HTTPProblem

parametrize = pytest.mark.parametrize
START: Message = {"type": "http.response.start", "status": 200, "headers": []}
END: Message = {"type": "http.response.body", "body": b""}


def scope(**headers: str) -> Scope:
    sent = {name.replace("_", "-").encode(): value.encode() for name, value in headers.items()}
    return {"type": "http", "method": "POST", "state": {"headers": sent}, "headers": []}


async def nothing(*_: Any) -> Any:
    """A send() that takes everything; a receive() that never is called."""


async def never() -> Any:
    await asyncio.sleep(60)


async def for_all(_: Scope) -> bool:
    return True


class App:
    """An application that reads, answers as soon as it may, and counts the requests in it."""

    def __init__(self) -> None:
        self.inside = self.most = self.answered = 0
        self.gate = asyncio.Event()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.inside += 1
        self.most = max(self.most, self.inside)
        if scope["state"]["headers"]:
            await receive()
        await self.gate.wait()
        self.inside -= 1
        await send(START)
        self.answered += 1
        await send(END)


def run(story: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(story(), 20))


# ConcurrencyLimit.


def test_64_requests_at_a_time_are_in_the_framework_and_all_are_answered(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(middleware, "STALLED", 5)  # seconds: a busy machine stands still for some

    async def story() -> None:
        app = App()
        limit = ConcurrencyLimit(app, for_all)
        calls = [asyncio.create_task(limit(scope(), nothing, nothing)) for _ in range(300)]
        await asyncio.sleep(0.05)
        assert app.inside == 64
        app.gate.set()
        await asyncio.gather(*calls)
        assert (app.most, app.answered) == (64, 300)

    run(story)


@parametrize("fails", [False, True])
def test_a_request_that_has_ended_leaves_its_place_to_the_next(fails: bool) -> None:
    async def story() -> None:
        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            if fails:
                raise RuntimeError
            await send(START)

        limit = ConcurrencyLimit(app, for_all)
        async with asyncio.timeout(0.2):  # so nobody waits until the limit is off
            for _ in range(200):
                await asyncio.gather(limit(scope(), nothing, nothing), return_exceptions=True)

    run(story)


def test_requests_get_through_when_none_is_answered() -> None:
    async def story() -> None:
        app = App()
        limit = ConcurrencyLimit(app, for_all)
        calls = [asyncio.create_task(limit(scope(), nothing, nothing)) for _ in range(100)]
        await asyncio.sleep(0.4)
        assert app.inside == 100
        app.gate.set()
        await asyncio.gather(*calls)

    run(story)


def test_a_client_that_does_not_read_or_write_takes_no_place() -> None:
    async def story() -> None:
        async def stuck(message: Message) -> None:
            await asyncio.sleep(60)

        app = App()
        app.gate.set()
        limit, upload = ConcurrencyLimit(app, for_all), scope(content_length="9")
        slow = [asyncio.create_task(limit(scope(), nothing, stuck)) for _ in range(64)]
        slow += [asyncio.create_task(limit(upload, never, nothing)) for _ in range(64)]
        await asyncio.sleep(0.05)
        async with asyncio.timeout(0.2):
            await limit(scope(), nothing, nothing)
        for call in slow:
            call.cancel()

    run(story)


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


def test_all_bodies_under_way_have_one_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    async def story() -> None:
        limit = BodyLimit(nothing)
        for _ in range(10):  # one after the other is no matter
            await read(limit, chunks(1000, 3))
        limit.pending = 8000
        with pytest.raises(HTTPProblem) as raised:
            await read(limit, chunks(1000, 3))
        assert (raised.value.status_code, limit.pending) == (503, 8000)

    monkeypatch.setattr(middleware, "MAX_BODIES", 10_000)
    run(story)


def test_a_body_counts_until_its_request_has_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    async def story() -> None:
        app = App()  # it has read the body, and waits
        limit = BodyLimit(app)
        waiting = [asyncio.create_task(limit(scope(x="1"), chunks(3000), nothing)) for _ in "123"]
        await asyncio.sleep(0.05)
        with pytest.raises(HTTPProblem, match="uploads"):
            await limit(scope(x="1"), chunks(3000), nothing)
        app.gate.set()
        await asyncio.gather(*waiting)
        assert limit.pending == 0

    monkeypatch.setattr(middleware, "MAX_BODIES", 10_000)
    run(story)


# The others.


def test_one_more_than_may_wait_is_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    async def story() -> None:
        async def applies(scope: Scope) -> bool:
            return True

        limit = ConcurrencyLimit(nobody, applies)
        limit.free = 0
        waiting = [asyncio.create_task(limit.enter()) for _ in range(3)]
        await asyncio.sleep(0)
        with pytest.raises(HTTPProblem) as refused:
            await limit.enter()
        assert refused.value.status_code == 503
        for task in waiting:
            task.cancel()

    async def nobody(scope: Scope, receive: Receive, send: Send) -> None:
        pass

    monkeypatch.setattr(middleware, "MAX_WAITING", 3)
    run(story)


@parametrize(("error", "calls"), [(ClientDisconnect(), 0), (ValueError(), 1)])
def test_an_error_is_answered_if_somebody_is_there(error: Exception, calls: int) -> None:
    async def story() -> None:
        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            raise error

        async def respond(request: Any, error: Exception) -> Any:
            answered.append(error)
            return type("Answer", (), {"status_code": 422, "__call__": nothing})()

        answered: list[Exception] = []
        await ErrorResponses(app, respond)(scope(), nothing, nothing)
        assert len(answered) == calls

    run(story)


def test_a_request_without_a_response_is_logged_as_499(capfd: pytest.CaptureFixture[str]) -> None:
    run(lambda: RequestLog(nothing)(scope(), nothing, nothing))
    assert json.loads(capfd.readouterr().out)["status"] == 499


def test_a_log_that_cannot_be_written_is_no_requests_fault(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def write(*_: Any) -> int:
        raise BrokenPipeError

    monkeypatch.setattr(os, "write", write)
    logs.write("INFO", {"message": "x"})
    monkeypatch.undo()
    logs.write("INFO", {"message": "\ud800"})


def test_an_exceptions_text_is_not_logged(capfd: pytest.CaptureFixture[str]) -> None:
    try:
        raise ValueError("a secret")
    except ValueError as error:
        info: Any = (ValueError, error, error.__traceback__)
    record = logging.LogRecord("test", logging.ERROR, "", 0, "failed", (), info)
    logs.JsonHandler().emit(record)
    line = capfd.readouterr().out
    assert json.loads(line)["exception"] == "ValueError"
    assert "a secret" not in line
