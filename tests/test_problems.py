"""lib/problems.py in an application of FastAPI's own, whatever form its routes have."""

import asyncio
import threading
from collections.abc import AsyncIterator
from typing import Annotated, Any
from unittest.mock import Mock

import httpx
import pytest
from fastapi import Body, Cookie, Depends, FastAPI, Form, HTTPException, Query, Security
from fastapi.exceptions import RequestValidationError
from pydantic import AliasChoices, AliasPath, BaseModel, Field, ValidationError
from starlette.middleware import Middleware

from lib.middleware import ErrorResponses, RequestLog
from lib.problems import HTTPProblem, responder

parametrize = pytest.mark.parametrize


class Inner(BaseModel):
    size: int = Field(description="of the inner one")


class Item(BaseModel):
    size: int = Field(0, description="of the item", validation_alias=AliasChoices(
        "size", "length", AliasPath("sizes", 0)))  # fmt: skip
    tags: list[str] = Field([], title="Tags", description="texts")
    inner: Inner | None = None


class Page:
    def __init__(self, limit: Annotated[int, Query(description="of a page")] = 1) -> None:
        self.limit = limit


class Filter(BaseModel):
    limit: int = Field(1, description="of a filter")


async def number(limit: Annotated[int, Query(description="of a number")] = 1) -> AsyncIterator[int]:
    yield limit


def raising(value: Any) -> Any:
    async def endpoint() -> None:
        try:
            Item.model_validate(value)
        except ValidationError as error:
            raise RequestValidationError(error.errors()) from None

    return endpoint


def taking(hint: Any, *default: Any) -> Any:
    """An endpoint with a parameter."""

    async def endpoint(x: Any) -> None:
        pass

    endpoint.__annotations__["x"], endpoint.__defaults__ = hint, default or None
    return endpoint


OBJECT = "The body has to be a JSON object"
A_LIMIT, A_SIZE = {"params": {"limit": "x"}}, {"json": {"size": "x"}}
REFUSED: list[tuple[Any, Any, str]] = [
    (taking(Annotated[Page, Depends()]), A_LIMIT, "limit: of a page"),
    (taking(Page, Depends()), A_LIMIT, "limit: of a page"),
    (taking(Annotated[Filter, Depends()]), A_LIMIT, "limit: of a filter"),
    (taking(Annotated[Filter, Query()]), A_LIMIT, "limit: of a filter"),
    (taking(Annotated[int, Security(number, scopes=["a"])]), A_LIMIT, "limit: of a number"),
    (taking(int, Query(alias="limit", description="old")), A_LIMIT, "x: old"),
    (taking(Annotated[int, Cookie(description="of a cookie")]), {}, "x: of a cookie"),
    (taking(Item), A_SIZE, "size: of the item"),
    (taking(Item), {"json": {"length": "x"}}, "size: of the item"),
    (taking(Item), {"json": {"sizes": ["x"]}}, "sizes: Input should be a valid integer"),
    (taking(Item), {"json": {"tags": ["a", 1]}}, "Tags: texts"),
    (taking(Item), {"json": {"inner": {"size": "x"}}}, "inner.size: Input should be"),
    (taking(Item), {"json": []}, OBJECT), (taking(Item), {}, OBJECT),
    (taking(list[Item]), {"json": [{"size": "x"}]}, "size: of the item"),
    (taking(list[Item]), {"json": {}}, "Input should be a valid list"),
    (taking(Annotated[Item, Body(embed=True)]), {"json": {"x": {"size": ""}}}, "x.size: Input"),
    (taking(Item | Inner), A_SIZE, "Item.size: Input should be"),
    (taking(Annotated[Filter, Form()]), {"data": {"limit": "x"}}, "limit: of a filter"),
    (raising([]), {}, "Input should be a valid dictionary"),
]  # fmt: skip


def ask(endpoint: Any, **sent: Any) -> httpx.Response:
    respond = responder("test", lambda: HTTPProblem(404), {})
    outer = [Middleware(RequestLog), Middleware(ErrorResponses, respond=respond)]
    handlers: Any = dict.fromkeys([HTTPException, RequestValidationError], respond)
    app = FastAPI(middleware=outer, exception_handlers=handlers)
    app.post("/", response_model=None)(endpoint)

    async def story() -> httpx.Response:
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.post("/", **sent)

    return asyncio.run(story())


@parametrize(("endpoint", "sent", "detail"), REFUSED)
def test_a_422_quotes_the_field_however_a_route_declares_it(
    endpoint: Any, sent: dict[str, Any], detail: str
) -> None:
    response = ask(endpoint, **sent)
    assert response.status_code == 422
    assert response.json()["detail"].startswith(detail)


def test_a_request_that_gets_no_thread_is_503(monkeypatch: pytest.MonkeyPatch) -> None:
    def endpoint() -> None:
        pass

    error = RuntimeError("can't start new thread")
    monkeypatch.setattr(threading.Thread, "start", Mock(side_effect=error))
    assert ask(endpoint).status_code == 503


@parametrize(("status", "title"), [(520, "Error"), (418, "I'm a Teapot"), (304, "")])
def test_an_exception_of_any_status_is_answered_with_it(status: int, title: str) -> None:
    async def endpoint() -> None:
        raise HTTPException(status)

    response = ask(endpoint)
    assert response.status_code == status
    assert response.json()["title"] == title if title else response.content == b""
