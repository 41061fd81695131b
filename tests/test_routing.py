"""lib/routing.py against stock FastAPI: the same endpoints and requests, the same answers.

Not compared is where the two differ on purpose: a prepared route refuses a body of another type
(415) and NaN (400), reads a body last, if all else is right, and shows an error of a dependency
once, however many need it.
"""

import asyncio
import json
import sys
from collections.abc import AsyncIterator
from datetime import date
from inspect import Parameter, Signature
from typing import Annotated, Any, Literal
from unittest.mock import AsyncMock
from uuid import UUID

import httpx
import pytest
from fastapi import Depends, FastAPI, Header, HTTPException, Query, Request, Response, params
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from pydantic import AfterValidator, AliasChoices, BaseModel, Field
from starlette.middleware import Middleware

from conftest import SECRET
from lib.middleware import BodyLimit, ErrorResponses, RequestLog
from lib.routing import PreparedRoutes, prepare

parametrize = pytest.mark.parametrize
calls: list[str] = []  # of dependencies, in their order


class Inner(BaseModel):
    size: int


class Item(BaseModel):
    title: str = Field(min_length=1)
    inner: Inner | None = None
    done: bool = Field(False, validation_alias=AliasChoices("done", "is_done"))


def takes(**parameters: Any) -> Any:
    """An endpoint that shows what it was given. A parameter is a hint, or a hint and a default."""

    pairs = {n: p if isinstance(p, tuple) else (p, Parameter.empty) for n, p in parameters.items()}

    async def endpoint(**given: Any) -> Response:
        shown = {name: repr(given.get(name, default)) for name, (_, default) in pairs.items()}
        return JSONResponse(shown | {"request": ""})

    vars(endpoint)["__signature__"] = Signature([
        Parameter(name, Parameter.KEYWORD_ONLY, annotation=hint, default=default)
        for name, (hint, default) in pairs.items()
    ], return_annotation=Response)  # fmt: skip
    return endpoint


async def counted(request: Request) -> str:
    calls.append("counted")
    return f"{request.url.path} {request.scope['endpoint'].__name__}"


async def nested(outer: Annotated[str, Depends(counted)], size: int = 3) -> str:
    calls.append("nested")
    return f"{outer} {size}"


async def refusing(x_pass: Annotated[str | None, Header(alias="X-Pass")] = None) -> None:
    calls.append("refusing")
    if x_pass is None:
        raise HTTPException(401)


async def raising() -> None:
    raise KeyError("quota")


async def signed(request: Request, item: Item) -> Response:
    sent = [await request.body(), *[chunk async for chunk in request.stream()]]
    return JSONResponse([item.title, *map(bytes.decode, sent)])


async def no_response() -> Response:
    return {"day": date(2027, 1, 31)}  # type: ignore[return-value]


class Pager:
    async def __call__(self) -> None:
        pass


async def body_of(item: Item) -> Item:
    return item


def header(**options: Any) -> Any:
    return Annotated[str | None, Header(**options)]


PREPARED: dict[str, Any] = {
    "/single": takes(
        number=int, flag=(bool | None, None), kind=(Literal["a", "b"], "a"),
        limit=(Annotated[int, Query(ge=1, le=9)], 5), day=(date | None, None),
        made=Annotated[int, Query(default_factory=int)], named=(str, Query("x", alias="a-name")),
        skip=(Annotated[int, Query(validation_alias=AliasChoices("offset", "skip"))], 0),
    ),
    "/headers": takes(
        if_match=header(alias="If-Match", max_length=5), kept=(header(alias="under_score"), None),
        x_any=(header(), None),
    ),
    "/places/{id}/{x}": takes(
        x_y=header(alias="X-Y"), size=int, x=Annotated[str, AfterValidator(str.upper)], id=UUID
    ),
    "/item": takes(item=Item),
    "/item_or_none": takes(item=(Item | None, None)),
    "/signed": signed,
    "/no_response": no_response,
    "/item/{id}": takes(id=UUID, item=Item, limit=(int, 1)),
    "/depends": takes(
        request=Request, first=Annotated[str, Depends(nested)], size=int,
        second=(str, Depends(counted)),
    ),
    "/raises": takes(x=Annotated[str, Depends(raising)]),
    "/guarded": takes(first=Annotated[str, Depends(nested)]),
    "/refuses": takes(
        first=Annotated[str, Depends(nested)], x=Annotated[None, Depends(refusing)], size=int
    ),
}  # fmt: skip
ID = "019aa6b5-9d02-7a31-b0c4-5e8f7a6b1c2d"
PASS: Any = {"headers": {"x-pass": "1"}}
ITEMS: list[Any] = [
    {}, {"json": {"title": "x"}}, {"json": {}}, {"json": None}, {"json": []},
    {"json": {"title": ""}}, {"json": {"title": 1, "done": "maybe"}},
    {"json": {"title": "x", "is_done": True, "more": 1}},
    {"content": b"{}", "headers": {"Content-Type": "application/problem+json"}},
    {"content": b'{"title": "x"}', "headers": {"Content-Type": "APPLICATION/JSON\t; x=y"}},
    {"json": {"title": "x", "inner": {}}},
]  # fmt: skip
PROBES: list[tuple[str, dict[str, Any]]] = [
    *[("/single?" + query, {}) for query in (
        "", "number=1&number=2", "number=&flag=&kind=&day=", "NUMBER=1", "number=1.0",
        "number=x&flag=y&kind=c&limit=0&day=x&made=y", "number=%D9%A1", "number=%00&limit=10",
        "number=1&kind=b&limit=9&flag=yes&day=2027-01-31&more=2", "number=1&a-name=a&named=b",
        "number=1&offset=1&skip=2", "number=1&skip=2", "skip=x", "offset=x&skip=1",
    )],
    *[("/headers", {"headers": sent}) for sent in (
        {}, {"if-match": "a"}, {"If-Match": "too long"}, [("If-Match", "a"), ("If-Match", "b")],
        {"If-Match": "a", "under_score": "1", "X-Any": "2"}, {b"If-Match": b"\xe9"},
        {"if_match": "a"},
    )],
    (f"/places/{ID}/a%20b?size=1", {"headers": {"x-y": "1"}}), ("/places/no-id/x?size=x", {}),
    *[("/item" + rest, sent) for rest in ("", "_or_none") for sent in ITEMS],
    (f"/item/{ID}?limit=x", {"json": {"title": "x"}}),
    *[(path, {}) for path in ("/depends?size=1", "/depends?size=x", "/depends", "/refuses?size=x")],
    *[(path, PASS) for path in ("/refuses?size=x", "/refuses?size=1", "/guarded")],
    ("/guarded?size=x", {}), ("/raises", {}), ("/no_response", {}),
    ("/signed", {"json": {"title": "x"}}),
]  # fmt: skip
BEYOND: list[Any] = [
    Response, Any, Annotated[list[int], Query()], Annotated[Item, Query()],
    Annotated[str, params.Cookie()], Annotated[Item, params.Body(embed=True)],
    Annotated[Item, params.Form()], Annotated[str, Depends(takes)],
    Annotated[Item, Depends(body_of)], Annotated[Any, Depends(Pager)],
    Annotated[str, Depends(counted, use_cache=False)],
]  # fmt: skip


async def returns_dict(x: str = "") -> dict[str, str]:
    return {"x": x}


def not_async(x: str) -> Response:
    return Response(x)


async def respond(request: Request, error: Any) -> Response:
    if isinstance(error, RequestValidationError):
        wrong = [[e["loc"], e["type"], e["msg"], repr(e["input"])] for e in error.errors()]
        return JSONResponse(wrong, 422)
    return JSONResponse({"detail": error.detail}, error.status_code)


def too_early(request: Request, error: LookupError) -> Response:
    return JSONResponse(str(error), 425)


def app_of(*middleware: Middleware) -> FastAPI:
    outer = [Middleware(RequestLog), Middleware(ErrorResponses, respond=respond)]
    outer.append(Middleware(BodyLimit))
    handlers: Any = {RequestValidationError: respond, LookupError: too_early}
    app = FastAPI(exception_handlers=handlers, middleware=[*outer, *middleware])
    for path, endpoint in PREPARED.items():
        app.post(path, dependencies=[Depends(refusing)] * (path == "/guarded"))(endpoint)
    app.get("/name/special")(returns_dict)
    app.api_route("/name/{x}", methods=["GET", "PUT"])(takes(x=str))
    app.get("/number/{x:int}")(takes(x=str))
    app.mount("/mount", FastAPI())
    app.get("/mount/{x}")(takes(x=str))
    events = [{"type": "lifespan.startup"}, {"type": "lifespan.shutdown"}]
    asyncio.run(app({"type": "lifespan"}, AsyncMock(side_effect=events), AsyncMock()))
    return app


STOCK, OURS = app_of(), app_of(Middleware(PreparedRoutes))


def ask(app: FastAPI, method: str, url: str, root: str = "", **sent: Any) -> tuple[Any, ...]:
    """The status and the text of an answer, and the calls of dependencies."""

    async def story() -> httpx.Response:
        transport = httpx.ASGITransport(app, root_path=root)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.request(method, url, **sent)

    calls.clear()
    response = asyncio.run(asyncio.wait_for(story(), 10))
    return response.status_code, response.text, calls.copy()


@parametrize(("url", "sent"), PROBES)
def test_it_answers_as_fastapi_does(url: str, sent: dict[str, Any]) -> None:
    assert ask(OURS, "POST", url, **sent) == ask(STOCK, "POST", url, **sent)


@parametrize("url", ["/depends?size=1", "/refuses?size=x"])
def test_an_overridden_dependency_is_overridden(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async def other(x_other: Annotated[str, Header()] = "none") -> str:
        return x_other

    for app in (OURS, STOCK):
        monkeypatch.setitem(app.dependency_overrides, counted, other)
    assert ask(OURS, "POST", url) == ask(STOCK, "POST", url)


@parametrize("method", ["GET", "HEAD", "PUT", "DELETE"])
@parametrize("root", ["", "/name"])
@parametrize(
    "path", ["/name/special", "/name/x", "/name/x/", "/name/a%2Fb", "/number/7", "/mount/x"]
)
def test_it_finds_the_route_that_fastapi_finds(method: str, root: str, path: str) -> None:
    assert ask(OURS, method, path, root) == ask(STOCK, method, path, root)


@parametrize(
    "endpoint",
    [*[takes(x=each) for each in BEYOND], takes(a=Item, b=Item), not_async, returns_dict],
)
def test_what_is_beyond_it_is_left_to_fastapi(endpoint: Any) -> None:
    app = FastAPI()
    app.post("/")(endpoint)
    assert prepare(app.routes[-1]) == []


def test_everything_else_is_prepared() -> None:
    assert all(map(prepare, OURS.routes[4 : 4 + len(PREPARED)]))


@parametrize("changed", ["dependant", "body_field"])
def test_what_fastapi_may_change_stops_nothing_and_is_logged(
    changed: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    app = FastAPI()
    app.post("/renamed")(takes(x=str))
    monkeypatch.delattr(app.routes[-1], changed)
    caplog.set_level("INFO")
    assert prepare(app.routes[-1]) == []
    assert "APIRoute(path='/renamed'" in caplog.text


def test_every_route_of_the_service_that_returns_a_response_is_prepared(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("DATABASE_URL", "postgresql://nobody@127.0.0.1/nothing")
    monkeypatch.setenv("JWT_SECRET", SECRET)
    for module in ("auth", "db", "main"):  # another test may have imported them without these
        monkeypatch.delitem(sys.modules, module, raising=False)
    import main

    routes = [route for route in main.app.routes if isinstance(route, APIRoute)]
    left = {route.path for route in routes if not prepare(route)}
    assert left == {"/auth/token", "/auth/logout", "/health", "/health/ready", "/"}


def test_a_path_that_cannot_be_right_is_refused_before_the_body_is_read() -> None:
    async def body() -> AsyncIterator[bytes]:
        pytest.fail("it was read")
        yield b""

    headers = {"Content-Type": "application/json"}
    status, text, _ = ask(OURS, "POST", "/item/no-id", content=body(), headers=headers)
    assert (status, json.loads(text)[0][0]) == (422, ["path", "id"])
