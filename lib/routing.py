"""Middleware, the last of an app, that works out once what FastAPI works out for each request.

FastAPI has a tree of what a route takes: `route.dependant`, a Dependant for its endpoint and for
each dependency. Here it is a row of Calls, the endpoint's the last. One validator makes all the
arguments of a Call, by a TypedDict whose aliases are places in the request:

    async def get(id: UUID, limit: Annotated[int, Query(ge=1)] = 9) -> Response: …
    {"path": {"id": "0199…"}, "query": {"limit": "5"}, …}  ->  {"id": UUID(…), "limit": 5}

FastAPI serves the routes that take anything else: no less right, but in twice the time.
"""

import logging
import re
from collections.abc import Awaitable, Callable
from datetime import date, datetime
from inspect import iscoroutinefunction, signature
from itertools import takewhile
from typing import Annotated, Any, Literal, NamedTuple, NotRequired, get_origin
from urllib.parse import parse_qsl
from uuid import UUID

from fastapi import Request, Response
from fastapi.encoders import jsonable_encoder
from fastapi.exceptions import RequestValidationError
from fastapi.params import Body
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from pydantic import AliasChoices, AliasPath, Field, TypeAdapter, ValidationError
from pydantic_core import from_json
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send
from typing_extensions import TypedDict  # pydantic takes typing's from Python 3.12 on

from lib import telemetry
from lib.problems import HTTPProblem
from lib.state import state_of

log = logging.getLogger(__name__)
JSON_TYPE = re.compile(rb"application/([\w.-]+\+)?json[ \t]*(;|$)", re.IGNORECASE)
# Types of parameters that come once, as a Literal does. A list would need all values of a name.
SINGLE = {kind | None for kind in (bool, int, float, str, UUID, date, datetime)}
HEADERS: dict[str, bytes] = {}  # that some Call takes: the name as declared, and as sent


class Call(NamedTuple):
    """A function, and what makes its arguments. The id() of a function stands for its result, and
    that of Request for the request, because an alias cannot be a function."""

    function: Callable[..., Awaitable[Any]]
    needs: set[int]  # the results of other functions
    head: Any  # the validator of what comes before the body
    body: Any  # the validator of the body, or {} if the function takes no body


class PreparedRoutes:
    """Serves the routes that are prepared. Others, 404 and 405 are FastAPI's."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app
        self.routes: dict[str, list[tuple[Route, list[Call]]]] = {}  # by method

    def __call__(self, scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:
        if scope["type"] == "lifespan":  # the start, when the app has all its routes
            self.routes.clear()  # of an earlier start
            # A mount or a router may answer for the routes after it: they are FastAPI's too.
            for route in takewhile(lambda each: isinstance(each, Route), scope["app"].routes):
                calls = prepare(route)
                for method in route.methods or ():
                    self.routes.setdefault(method, []).append((route, calls))
        elif not scope["app"].dependency_overrides:
            path = scope["path"].removeprefix(scope["root_path"])
            for route, calls in self.routes.get(scope.get("method", ""), ()):  # WebSocket: ""
                if found := route.path_regex.match(path):
                    scope["route"], scope["endpoint"] = route, route.endpoint
                    scope["path_params"] = found.groupdict()
                    if calls:
                        if record := scope.get("fastapi.telemetry"):
                            telemetry.set_route(record, scope["root_path"] + route.path)
                        return run(calls, scope, receive, send)
                    break  # FastAPI's
        return self.app(scope, receive, send)


async def run(calls: list[Call], scope: Scope, receive: Receive, send: Send) -> None:
    """Sends what the last Call returns, or raises RequestValidationError."""
    request, came = Request(scope, receive, send), state_of(scope).headers
    query = scope["query_string"].decode("latin-1")
    results: dict[int, Any] = {id(Request): request}
    sent = {
        "result": results,
        "path": scope["path_params"],
        "query": dict(parse_qsl(query, keep_blank_values=True)) if query else {},  # a name's last
        "header": {n: came[key].decode("latin-1") for n, key in HEADERS.items() if key in came},
    }
    errors: list[Any] = []
    for function, needs, head, body in calls:
        try:
            arguments = head.validate_python(sent)
            # The body comes last: where a path is wrong, the answer does not wait for it.
            if body and not errors:
                sent |= await read_json(request)
                arguments |= body.validate_python(sent, from_attributes=True)  # as FastAPI
        except ValidationError as error:
            for each in error.errors(include_url=False):  # FastAPI shows None for what is missing
                errors.append({**each, "input": None} if each["input"] is sent else each)
            continue
        if needs <= results.keys():  # not so after an error of one of them
            result = results[id(function)] = await function(**arguments)
    if errors:
        raise RequestValidationError(errors)
    if not isinstance(result, Response):  # whatever its annotation says
        result = JSONResponse(jsonable_encoder(result), scope["route"].status_code or 200)
    await result(scope, receive, send)


async def read_json(request: Request) -> dict[str, Any]:
    """{"body": …}, or {} without one. Raises HTTPProblem: 400 for what RFC 8259 forbids, or 415."""
    state = state_of(request.scope)
    # BodyLimit gives a body whole. Request.body() would put it together by a stream.
    content = (await request.receive())["body"] if state.body is None else state.body
    request._body = content  # for the endpoint's Request.body(), as FastAPI's manual sets it
    if content and not JSON_TYPE.match(state.headers.get(b"content-type", b"")):
        raise HTTPProblem(415, "The body has to come as Content-Type: application/json")
    try:
        return {"body": from_json(content, allow_inf_nan=False)} if content else {}
    except ValueError as error:
        raise HTTPProblem(400, f"The body is not JSON: {error}") from None


def prepare(route: Any) -> list[Call]:
    """The Calls of a route that is annotated to return a Response, or [] if FastAPI serves it."""
    calls: dict[Any, Call] = {}  # by function
    try:
        if type(route) is not APIRoute or ":" in route.path or route.max_body_size:  # ":" converts
            return []
        body = route.body_field  # of several bodies, and of one to embed, FastAPI makes another
        if body and (type(body.field_info) is not Body or body not in route.dependant.body_params):
            return []
        if signature(route.endpoint, eval_str=True).return_annotation is Response:
            add(calls, route.dependant)
    except Exception as error:  # neither another form nor another FastAPI may stop the start
        log.info("FastAPI serves %s, which takes twice the time: %r", route, error)
        return []
    return list(calls.values())


def add(calls: dict[Any, Call], dependant: Any) -> None:
    """Adds the Call of a function after those that it needs. Raises TypeError for another form."""
    for each in dependant.dependencies:
        add(calls, each)
    function, given = dependant.call, {each.name: each.call for each in dependant.dependencies}
    given |= {dependant.request_param_name: Request}
    hints = {
        name: NotRequired[Annotated[Any, Field(validation_alias=AliasPath("result", id(each)))]]
        for name, each in given.items()
        if name
    }
    for place in ("path", "query", "header"):
        for param in getattr(dependant, f"{place}_params"):
            hints[param.name] = hint(param.field_info, place)
    body = {each.name: hint(each.field_info, "body") for each in dependant.body_params}
    # The __call__ of its type: a class has one for its objects, and is not async itself.
    is_async = iscoroutinefunction(function) or iscoroutinefunction(type(function).__call__)
    has_all = signature(function).parameters.keys() == hints.keys() | body.keys()
    if not (is_async and has_all and dependant.use_cache) or dependant.concurrency:
        raise TypeError(f"{function} is not async, or takes more than its Call can give")
    needs = {id(each.call) for each in dependant.dependencies}
    calls[function] = Call(function, needs, validator(hints), body and validator(body))


def hint(info: Any, place: str) -> Any:
    """The type of an argument, with its bounds, its default and its places in a request."""
    kind, alias = info.annotation, info.validation_alias or info.alias
    paths = [AliasPath(place, name) for name in getattr(alias, "choices", [alias])]
    if place == "body":
        paths = [AliasPath(place)]  # all that came, whatever its name
    elif kind | None not in SINGLE and get_origin(kind) is not Literal:
        raise TypeError(f"{alias} is no single value, but {kind}")
    elif place == "header":
        HEADERS[alias] = alias.lower().encode()
    kind = Annotated[kind, info, Field(validation_alias=AliasChoices(*paths))]
    return kind if info.is_required() else NotRequired[kind]


def validator(hints: dict[str, Any]) -> Any:
    """Makes arguments of what was sent."""
    arguments: Any = TypedDict("Arguments", hints)  # type: ignore[misc]  # mypy wants the keys
    return TypeAdapter(arguments).validator
