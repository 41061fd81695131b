"""lib/routing.py against stock FastAPI: the same endpoints and requests, the same answers.

Not compared is what the two do on purpose: a prepared route answers 415 to a body of another type,
refuses NaN, places json_invalid at ("body",), and reads the body after the dependencies.
"""

import asyncio
import sys
from collections.abc import AsyncIterator, Iterator
from datetime import datetime
from enum import Enum
from typing import Annotated, Any, Literal
from uuid import UUID

import httpx
import pytest
from fastapi import (
    APIRouter,
    BackgroundTasks,
    Body,
    Cookie,
    Depends,
    FastAPI,
    Form,
    Header,
    HTTPException,
    Query,
    Request,
    Response,
    Security,
)
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from fastapi.security import OAuth2PasswordBearer, SecurityScopes
from pydantic import AfterValidator, AliasChoices, BaseModel, Field, Json
from starlette.middleware import Middleware

from lib.middleware import ErrorResponses, RequestLog
from lib.routing import PreparedRoutes, is_prepared

ID = "019aa6b5-9d02-7a31-b0c4-5e8f7a6b1c2d"
calls: list[str] = []  # of dependencies, in their order


def show(**values: Any) -> Response:
    """What an endpoint was given, as JSON."""
    return JSONResponse({name: repr(value) for name, value in values.items()} | {"calls": calls})


class Color(Enum):
    red = "red"
    blue = "blue"


class Filter(BaseModel):
    size: int = 1
    names: list[str] = []


class Item(BaseModel):
    title: str = Field(min_length=1)
    done: bool = Field(False, validation_alias=AliasChoices("done", "is_done"))


def sync() -> str:
    calls.append("sync")
    return "sync"


async def yielding() -> AsyncIterator[str]:
    calls.append("enter")
    yield "yielded"
    calls.append("leave")


def yielding_sync() -> Iterator[str]:
    yield "yielded"


async def counted(request: Request) -> str:
    calls.append("counted")
    return request.url.path


async def nested(outer: Annotated[str, Depends(counted)], size: int = 3) -> str:
    calls.append("nested")
    return f"{outer} {size}"


async def refusing(x_pass: Annotated[str | None, Header()] = None) -> None:
    calls.append("refusing")
    if x_pass is None:
        raise HTTPException(401)


async def scoped(scopes: SecurityScopes) -> str:
    return scopes.scope_str


async def body_of(item: Item) -> Item:
    return item


class ByMethod:
    async def __call__(self, request: Request) -> str:
        return request.method


# The endpoints. Those of the first half are prepared.


async def plain() -> Response:
    return show()


async def single(
    number: int,
    day: datetime | None = None,
    color: Color = Color.red,
    kind: Literal["a", "b"] = "a",
    limit: Annotated[int, Query(ge=1, le=9)] = 5,
    flag: bool | None = None,
    ratio: float = 0.5,
) -> Response:
    return show(
        number=number, day=day, color=color, kind=kind, limit=limit, flag=flag, ratio=ratio
    )  # fmt: skip


async def path(id: UUID, x: Annotated[str, AfterValidator(str.upper)]) -> Response:
    return show(id=id, x=x)


async def aliased(
    skip: Annotated[int, Query(validation_alias=AliasChoices("offset", "skip"))] = 0,
    named: Annotated[str, Query(alias="other-name")] = "",
    both: Annotated[str, Query(alias="shown", validation_alias="taken")] = "",
) -> Response:
    return show(skip=skip, named=named, both=both)


async def headers(
    if_match: Annotated[str, Header(alias="If-Match", max_length=5)],
    user_agent: Annotated[str, Header()],
    kept: Annotated[str | None, Header(alias="under_score")] = None,
    raw_name: Annotated[str | None, Header(convert_underscores=False)] = None,
) -> Response:
    return show(if_match=if_match, user_agent=user_agent, kept=kept, raw_name=raw_name)


async def takes_item(item: Item, limit: int = 1) -> Response:
    return show(item=item, limit=limit)


async def takes_item_or_none(item: Item | None = None) -> Response:
    return show(item=item)


async def takes_default_item(
    item: Annotated[Item, Body()] = Item(title="default", done=False),  # noqa: B008
) -> Response:
    return show(item=item)


async def takes_any(value: Annotated[Any, Body()]) -> Response:
    return show(value=value)


async def depends(
    request: Request,
    first: Annotated[str, Depends(nested)],
    second: Annotated[str, Depends(counted)],
    third: Annotated[str, Depends(ByMethod())],
    size: int,
) -> Response:
    return show(first=first, second=second, third=third, size=size, path=request.url.path)


async def refuses(
    first: Annotated[str, Depends(nested)], other: Annotated[None, Depends(refusing)], size: int
) -> Response:
    return show(first=first, size=size)


async def json_field(value: Annotated[Json[int], Query()] = 7) -> Response:
    return show(value=value)


PREPARED: list[Any] = [
    plain, single, path, aliased, headers, takes_item, takes_item_or_none, takes_default_item,
    takes_any, depends, refuses, json_field,
]  # fmt: skip


async def lists(
    q: Annotated[list[int], Query()] = [],  # noqa: B006
    x_many: Annotated[list[str] | None, Header()] = None,
) -> Response:
    return show(q=q, x_many=x_many)


async def json_list(value: Annotated[Json[list[int]], Query()]) -> Response:
    return show(value=value)


async def model(filter: Annotated[Filter, Query()]) -> Response:
    return show(filter=filter)


async def made(value: Annotated[int, Query(default_factory=lambda: 4)]) -> Response:
    return show(value=value)


async def checked(value: Annotated[int, Query(validate_default=True, ge=3)] = 1) -> Response:
    return show(value=value)


async def sync_dependency(value: Annotated[str, Depends(sync)]) -> Response:
    return show(value=value)


async def yielding_dependency(
    value: Annotated[str, Depends(yielding)], other: Annotated[str, Depends(yielding_sync)]
) -> Response:
    return show(value=value, other=other)


async def uncached(
    first: Annotated[str, Depends(counted)],
    second: Annotated[str, Depends(counted, use_cache=False)],
) -> Response:
    return show(first=first, second=second)


async def sets_header(response: Response) -> dict[str, str]:
    response.headers["x-set"] = "yes"
    response.status_code = 202
    return {"a": "b"}


async def takes_response(response: Response) -> Response:
    return show(headers=dict(response.headers))


async def cookie(session: Annotated[str, Cookie()] = "none") -> Response:
    return show(session=session)


async def embedded(item: Annotated[Item, Body(embed=True)]) -> Response:
    return show(item=item)


async def two_bodies(item: Item, other: Item) -> Response:
    return show(item=item, other=other)


async def body_in_dependency(item: Annotated[Item, Depends(body_of)]) -> Response:
    return show(item=item)


async def body_twice(item: Item, other: Annotated[Item, Depends(body_of)]) -> Response:
    return show(item=item, other=other)


async def form(name: Annotated[str, Form()]) -> Response:
    return show(name=name)


async def security(
    value: Annotated[str, Security(scoped, scopes=["read"])],
    token: Annotated[str, Security(OAuth2PasswordBearer(tokenUrl="t", auto_error=False))],
) -> Response:
    return show(value=value, token=token)


async def background(tasks: BackgroundTasks) -> Response:
    tasks.add_task(calls.append, "background")
    return show()


async def returns_dict(number: int) -> dict[str, int]:
    return {"number": number}


async def unannotated(number: int):  # type: ignore[no-untyped-def]
    return {"number": number}


def not_async(number: int) -> Response:
    return show(number=number)


LEFT: list[Any] = [
    lists, json_list, model, made, checked, sync_dependency, yielding_dependency, uncached,
    sets_header, takes_response, cookie, embedded, two_bodies, body_in_dependency, body_twice,
    form, security, background, returns_dict, unannotated, not_async,
]  # fmt: skip

JSON_VALUES: list[Any] = [None, 0, "", [], {"a": [1.5, None]}]
VALID = {"title": "x"}
# An endpoint, what follows its name in the URL, and what else is sent.
PROBES: list[tuple[Any, str, dict[str, Any]]] = [
    (plain, "", {}),
    *[(single, "?" + query, {}) for query in (
        "", "number=1", "number=1&number=2", "number=", "number=x&day=y&color=z&kind=c&limit=0",
        "number=1&day=2026-01-02T03:04:05Z&color=blue&kind=b&limit=9&flag=yes&ratio=1e3",
        "number=1&flag=&day=", "number=9999999999999999999999&ratio=nan", "number=1&unknown=2",
        "number=%00", "number=1&limit=10&limit=2", "NUMBER=1", "number=1.0", "number=%D9%A1",
    )],
    (path, f"/{ID}/a%20b", {}),
    (path, "/not-an-id/x", {}),
    *[(aliased, "?" + query, {}) for query in (
        "", "offset=1&skip=2", "skip=2", "skip=x", "offset=x&skip=1", "other-name=a&named=b",
        "shown=a", "taken=b", "both=c",
    )],
    *[(headers, "", {"headers": sent}) for sent in (
        {}, {"if-match": "a"}, {"If-Match": "too long"}, [("If-Match", "a"), ("If-Match", "b")],
        {"If-Match": "a", "under_score": "1", "raw_name": "2"},
        {"If-Match": "a", "under-score": "1", "raw-name": "2"}, {"if_match": "a"},
    )],
    *[(takes, query, sent)  # type: ignore[var-annotated]  # the options of httpx
      for takes in (takes_item, takes_item_or_none, takes_default_item)
      for query in ("", "?limit=x") for sent in (
        {}, {"json": VALID}, {"json": {}}, {"json": None}, {"json": []}, {"json": "x"},
        {"json": {"title": ""}}, {"json": {"title": "x", "is_done": True, "more": 1}},
        {"json": {"title": 1, "done": "maybe"}}, {"json": {"title": "x", "done": "yes"}},
        {"content": b"null", "headers": {"Content-Type": "application/problem+json"}},
        {"content": b'{"title": "x"}', "headers": {"Content-Type": "APPLICATION/JSON; x=y"}},
    )],
    *[(takes_any, "", {"json": value}) for value in JSON_VALUES],
    (takes_any, "", {}),
    (depends, "?size=1", {}),
    (depends, "?size=x", {}),
    (depends, "", {}),
    (refuses, "?size=x", {}),
    (refuses, "?size=x", {"headers": {"x-pass": "1"}}),
    (refuses, "?size=1", {"headers": {"x-pass": "1"}}),
    *[(json_field, "?" + query, {}) for query in ("", "value=1", "value=x", "value=[1]")],
    *[(lists, "?" + query, {}) for query in ("", "q=1", "q=1&q=2", "q=1&q=x")],
    (lists, "", {"headers": [("x-many", "a"), ("x-many", "b")]}),
    *[(json_list, "?" + query, {}) for query in ("", "value=[1,2]", "value=1")],
    *[(model, "?" + query, {}) for query in ("", "size=2&names=a&names=b", "size=x")],
    (made, "", {}),
    (made, "?value=5", {}),
    (checked, "", {}),
    (sync_dependency, "", {}),
    (yielding_dependency, "", {}),
    (uncached, "", {}),
    (sets_header, "", {}),
    (takes_response, "", {}),
    (cookie, "", {}),
    (cookie, "", {"headers": {"Cookie": "session=1"}}),
    (embedded, "", {"json": {"item": VALID}}),
    (two_bodies, "", {"json": {"item": VALID, "other": VALID}}),
    (body_in_dependency, "", {"json": VALID}),
    (body_twice, "", {"json": VALID}),
    (form, "", {"data": {"name": "x"}}),
    (security, "", {"headers": {"Authorization": "Bearer x"}}),
    (background, "", {}),
    (returns_dict, "?number=1", {}),
    (unannotated, "?number=x", {}),
    (not_async, "?number=1", {}),
]  # fmt: skip


async def respond_to_error(request: Request, error: Any) -> Response:
    if not isinstance(error, RequestValidationError):
        return JSONResponse({"detail": error.detail}, error.status_code)
    return JSONResponse([[each["loc"], each["type"]] for each in error.errors()], 422)


def app_of(*middleware: Middleware) -> FastAPI:
    errors = Middleware(ErrorResponses, respond=respond_to_error)
    handlers: Any = {RequestValidationError: respond_to_error}
    layers = [Middleware(RequestLog), errors, *middleware]
    app = FastAPI(exception_handlers=handlers, middleware=layers)
    for endpoint in PREPARED + LEFT:
        parameters = "/{id}/{x}" if endpoint is path else ""
        app.post(f"/{endpoint.__name__}{parameters}", response_model=None)(endpoint)
    return app


STOCK, OURS = app_of(), app_of(Middleware(PreparedRoutes))


def ask(app: FastAPI, method: str, url: str, root_path: str = "", **sent: Any) -> httpx.Response:
    async def served(scope: Any, receive: Any, send: Any) -> None:
        await app(scope | {"state": {}}, receive, send)  # as uvicorn does

    async def story() -> httpx.Response:
        transport = httpx.ASGITransport(served, root_path=root_path)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.request(method, url, **sent)

    return asyncio.run(story())


def answer(app: FastAPI, endpoint: Any, rest: str, sent: dict[str, Any]) -> tuple[Any, ...]:
    """The status, the JSON and a header of an answer, and the calls after it."""
    calls.clear()
    response = ask(app, "POST", f"/{endpoint.__name__}{rest}", **sent)
    return response.status_code, response.json(), response.headers.get("x-set"), calls.copy()


@pytest.mark.parametrize(("endpoint", "rest", "sent"), PROBES)
def test_it_answers_as_fastapi_does(endpoint: Any, rest: str, sent: dict[str, Any]) -> None:
    assert answer(OURS, endpoint, rest, sent) == answer(STOCK, endpoint, rest, sent)


@pytest.mark.parametrize(("endpoint", "rest", "sent"), PROBES)
def test_it_answers_as_fastapi_does_while_a_dependency_is_overridden(
    endpoint: Any, rest: str, sent: dict[str, Any]
) -> None:
    async def other(x_other: Annotated[str, Header()] = "none") -> str:
        return x_other

    for app in (OURS, STOCK):
        app.dependency_overrides[counted] = other
    try:
        assert answer(OURS, endpoint, rest, sent) == answer(STOCK, endpoint, rest, sent)
    finally:
        for app in (OURS, STOCK):
            app.dependency_overrides.clear()


@pytest.mark.parametrize("endpoint", PREPARED + LEFT)
def test_only_what_it_covers_is_prepared(endpoint: Any) -> None:
    [route] = [
        route
        for route in OURS.routes
        if isinstance(route, APIRoute) and route.endpoint is endpoint
    ]  # fmt: skip
    assert is_prepared(route) == (endpoint in PREPARED)
    assert any(probe[0] is endpoint for probe in PROBES)


def test_every_route_of_the_service_that_returns_a_response_is_prepared(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("DATABASE_URL", "postgresql://nobody@127.0.0.1/nothing")
    monkeypatch.setenv("JWT_SECRET", "x" * 32)
    for module in ("auth", "db", "main"):  # another test may have imported them without these
        monkeypatch.delitem(sys.modules, module, raising=False)
    import main

    routes = [route for route in main.app.routes if isinstance(route, APIRoute)]
    left = {route.path for route in routes if not is_prepared(route)}
    assert left == {"/auth/token", "/health", "/health/ready"}


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        ({"content": b"{"}, 422),
        ({"content": b'{"title": NaN}'}, 422),
        ({"content": b"\xff"}, 422),
        ({"content": b"{}", "headers": {"Content-Type": "text/plain"}}, 415),
        ({"content": b"{}", "headers": {"Content-Type": "application/jsonp"}}, 415),
    ],
)
def test_a_body_that_is_no_json_is_refused(sent: dict[str, Any], status: int) -> None:
    sent = {"headers": {"Content-Type": "application/json"}} | sent
    given, errors, *_ = answer(OURS, takes_item, "", sent)
    assert given == status
    assert status == 415 or errors == [[["body"], "json_invalid"]]


def app_with_neighbours(*middleware: Middleware) -> FastAPI:
    """Prepared routes beside others that match the same paths."""
    app, inner = FastAPI(middleware=[Middleware(RequestLog), *middleware]), APIRouter()

    @app.get("/first/special")
    async def special() -> dict[str, str]:
        return {"by": "itself"}

    @app.get("/first/{name}")
    @inner.get("/{name}")
    async def by_name(name: str) -> Response:
        return JSONResponse({"by": name})

    @app.put("/first/{name}")
    async def put(name: str) -> Response:
        return JSONResponse({"put": name})

    @app.get("/number/{n:int}")
    async def number(n: Any) -> Response:
        return JSONResponse({"n": repr(n)})

    app.include_router(inner, prefix="/included")
    return app


@pytest.mark.parametrize("method", ["GET", "HEAD", "PUT", "DELETE"])
@pytest.mark.parametrize("root_path", ["", "/first"])
@pytest.mark.parametrize(
    "path",
    [
        "/first/special", "/first/x", "/first/x/", "/first/a%2Fb", "/first", "/number/7",
        "/number/x", "/included/x", "/other", "/first/first/x",
    ],
)  # fmt: skip
def test_it_finds_the_route_that_fastapi_finds(method: str, root_path: str, path: str) -> None:
    stock = ask(app_with_neighbours(), method, path, root_path)
    ours = ask(app_with_neighbours(Middleware(PreparedRoutes)), method, path, root_path)
    assert (ours.status_code, ours.text) == (stock.status_code, stock.text)
