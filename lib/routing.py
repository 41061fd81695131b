"""Middleware, the last of an app, that works out once what FastAPI works out for each request.

FastAPI has a tree of what a route takes: `route.dependant`, a Dependant for its function and for
each dependency. Here it is a row of Calls, the endpoint's the last, with one validator each:

    async def get(id: UUID, limit: Annotated[int, Query(ge=1)] = 9) -> Response: …
    {"path": {"id": "0199…"}, "query": {}}  ->  {"id": UUID(…), "limit": 9}
"""

import logging
import re
from collections.abc import Awaitable, Iterator
from dataclasses import fields
from inspect import iscoroutinefunction, signature
from itertools import takewhile
from typing import Annotated, Any, NotRequired
from urllib.parse import parse_qsl

from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.params import Body
from fastapi.routing import APIRoute
from pydantic import AliasChoices, AliasPath, Field, TypeAdapter, ValidationError
from pydantic_core import from_json
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send
from typing_extensions import TypedDict  # pydantic takes typing's from Python 3.12 on

from lib.problems import HTTPProblem
from lib.state import state_of

log = logging.getLogger(__name__)
Calls = dict[Any, "Call"]  # by function
JSON_TYPE = re.compile(rb"application/([\w.-]+\+)?json *(;|$)", re.IGNORECASE)
SEVERAL = re.compile(r"'type': '(array|object)'|{}")  # in a JSON Schema; {} is anything
# What a Call heeds of a Dependant, read in FastAPI 0.165, or need not heed. No other may be set.
KNOWN = {"path_params", "query_params", "header_params", "body_params", "dependencies", "call",
    "name", "request_param_name", "path", "scope", "use_cache"}  # fmt: skip
PLACES = [("path", "query", "header"), ("body",)]
SHARED: dict[Any, list[Any]] = {}  # by function: most have several routes


class PreparedRoutes:
    """Serves the routes that are plain. Others, 404, 405, root paths and traces are FastAPI's."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app
        self.routes: dict[str, list[tuple[Route, Calls | None]]] = {}  # by method

    def __call__(self, scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:
        if scope["type"] == "lifespan":  # the start, when the app has all its routes
            self.routes.clear()  # of an earlier start
            # A mount or a router may answer for the routes after it: they are FastAPI's too.
            for route in takewhile(lambda each: isinstance(each, Route), scope["app"].routes):
                calls = prepare(route)
                for method in route.methods or ():
                    self.routes.setdefault(method, []).append((route, calls))
        calls = self.find(scope) if scope["type"] == "http" else None
        if calls is None:
            return self.app(scope, receive, send)
        return run(calls, scope, receive, send)

    def find(self, scope: Scope) -> Calls | None:
        app, path = scope["app"], scope["path"]
        if scope["root_path"] or app.dependency_overrides or "fastapi.telemetry" in scope:
            return None
        for route, calls in self.routes.get(scope["method"], ()):
            if found := route.path_regex.match(path):
                scope["route"], scope["path_params"] = route, found.groupdict()
                return calls
        return None


def prepare(route: Any) -> Calls | None:
    """The Calls of a route. None for a route that is left to FastAPI."""
    try:
        tree = walk(route.dependant) if is_plain(route) else ()
        return {each.call: Call(each) for each in tree} or None
    except Exception:  # an unknown annotation or FastAPI may not stop the start
        log.warning("Left to FastAPI, which is slower: %s", route, exc_info=True)
        return None


def is_plain(route: Any) -> bool:
    """Whether a route is annotated to return a Response, and takes no more than Calls do."""
    if type(route) is not APIRoute or ":" in route.path or route.max_body_size:  # ":" converts
        return False
    returned = signature(route.endpoint, eval_str=True).return_annotation
    returns_response = isinstance(returned, type) and issubclass(returned, Response)
    body = route.body_field  # of several bodies, and of one to embed, FastAPI makes another
    is_one = not body or (type(body.field_info) is Body and body in route.dependant.body_params)
    return returns_response and is_one and all(map(is_known, walk(route.dependant)))


def is_known(dependant: Any) -> bool:
    """Whether a function is async, and takes a Request, single values and dependencies only."""
    used = {each.name for each in fields(dependant) if getattr(dependant, each.name)}
    params = [*dependant.path_params, *dependant.query_params, *dependant.header_params]
    kinds = [TypeAdapter(each.field_info.annotation).json_schema() for each in params]
    return (
        used <= KNOWN
        and dependant.use_cache
        and any(map(iscoroutinefunction, (dependant.call, type(dependant.call).__call__)))
        and not SEVERAL.search(str(kinds))
        and all(p.field_info.validation_alias for p in dependant.header_params)  # else a _ is a -
    )


def walk(dependant: Any) -> Iterator[Any]:
    """A tree of Dependants, each after those that it needs."""
    for each in dependant.dependencies:
        yield from walk(each)
    yield dependant


def validator(dependant: Any, *places: str) -> Any:
    """Takes a dict of what came, by place, and gives arguments. None where nothing is taken."""
    hints: dict[str, Any] = {}
    for place in places:
        for param in getattr(dependant, f"{place}_params"):
            info: Any = param.field_info  # has the bounds and the default
            alias = info.validation_alias or param.name
            names = getattr(alias, "choices", [alias])
            # A body is all that came in its place, whatever its name.
            paths = [AliasPath(place)] if place == "body" else [AliasPath(place, n) for n in names]
            kind = Annotated[info.annotation, info, Field(validation_alias=AliasChoices(*paths))]
            hints[param.name] = kind if info.is_required() else NotRequired[kind]
    arguments: Any = TypedDict("Arguments", hints)  # type: ignore[misc]  # mypy wants the keys
    return TypeAdapter(arguments).validator if hints else None


class Call:
    """A function of a route, and what it takes."""

    def __init__(self, dependant: Any) -> None:
        self.needs = {each.call for each in dependant.dependencies}
        # The function that gives an argument, by its name. Request stands for the request itself.
        given = {each.name: each.call for each in dependant.dependencies}
        given |= {dependant.request_param_name: Request}
        self.given = [(name, giver) for name, giver in given.items() if name]
        key = dependant.call, *(each.name for each in dependant.path_params)
        known = SHARED.get(key) or [validator(dependant, *places) for places in PLACES]
        self.values, self.body = SHARED[key] = known
        aliases = [each.field_info.validation_alias for each in dependant.header_params]
        self.headers = [(each.lower().encode(), each) for each in aliases]  # as sent, as declared


async def run(calls: Calls, scope: Scope, receive: Receive, send: Send) -> None:
    """Sends what the last Call returns, or raises RequestValidationError with what all refuse."""
    request, here = Request(scope, receive, send), state_of(scope).headers
    query = scope["query_string"].decode("latin-1")
    found = dict(parse_qsl(query, keep_blank_values=True)) if query else {}  # the last of a name
    sent = {"path": scope["path_params"], "query": found}
    results: dict[Any, Any] = {Request: request}  # by function
    errors: list[Any] = []
    for function, call in calls.items():
        if call.headers:
            sent["header"] = {n: here[k].decode("latin-1") for k, n in call.headers if k in here}
        try:
            arguments = call.values.validate_python(sent) if call.values else {}
            # The body comes last: where a path is wrong, the answer does not wait for it.
            if call.body and not errors:
                body = await read_json(request)
                arguments |= call.body.validate_python(body, from_attributes=True)  # as FastAPI
        except ValidationError as error:
            errors += error.errors(include_url=False)
            continue
        if not errors or call.needs <= results.keys():
            arguments |= {name: results[giver] for name, giver in call.given}
            results[function] = await function(**arguments)
    if errors:
        raise RequestValidationError(errors)
    await results[function](scope, receive, send)


async def read_json(request: Request) -> dict[str, Any]:
    """{"body": …}, or {} without one. Raises HTTPProblem: 400 for what RFC 8259 forbids, or 415."""
    state = state_of(request.scope)
    # BodyLimit gives a body whole. Request.body() would put it together by a stream.
    content = (await request.receive())["body"] if state.body is None else state.body
    if content and not JSON_TYPE.match(state.headers.get(b"content-type", b"")):
        raise HTTPProblem(415, "The body has to come as Content-Type: application/json")
    try:
        return {"body": from_json(content, allow_inf_nan=False)} if content else {}
    except ValueError as error:
        raise HTTPProblem(400, f"The body is not JSON: {error}") from None
