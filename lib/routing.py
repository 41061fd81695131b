"""Middleware that works out once what FastAPI works out for each request.

    app = FastAPI(middleware=[Middleware(RequestLog), …, Middleware(PreparedRoutes)])  # the last

A GET takes 64 us in process, 207 by FastAPI, with which tests/test_routing.py compares it.
"""

import dataclasses
import re
from collections.abc import Hashable, Iterator
from inspect import signature
from typing import Any

from fastapi import Request, Response, params
from fastapi._compat import ModelField, Undefined, field_annotation_is_sequence
from fastapi.dependencies.models import Dependant, _is_coroutine_callable
from fastapi.dependencies.utils import _get_param_aliases, _get_param_model
from fastapi.dependencies.utils import _validate_value_with_model_field as validate
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from pydantic_core import from_json
from starlette.convertors import StringConvertor
from starlette.exceptions import HTTPException
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from lib.state import state_of

SOURCES = ("path", "query", "header")
JSON_TYPE = re.compile(r"application/([\w.-]+\+)?json *(;|$)", re.IGNORECASE)
HANDLED = {  # by the code below; a function that needs more is left to FastAPI
    "path_params", "query_params", "header_params", "body_params", "dependencies", "call", "name",
    "request_param_name", "path", "parent_oauth_scopes", "use_cache", "scope",
}  # fmt: skip
BEYOND = {field.name for field in dataclasses.fields(Dependant)} - HANDLED
Fields = list[tuple[ModelField, Any, str, list[tuple[Any, Any]]]]
Values = dict[Any, Any]


class PreparedRoutes:
    """Finds a route and calls its function, if is_prepared() allows.

    Other routes, 404 and 405 are left to FastAPI, and all are where OpenTelemetry is set up or
    `app.dependency_overrides` has entries.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app
        self.routes: list[tuple[Route, ASGIApp | None]] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        prepared = self.find(scope) if scope["type"] == "http" else None
        await (prepared or self.app)(scope, receive, send)

    def find(self, scope: Scope) -> ASGIApp | None:
        app, path, method = scope["app"], scope["path"], scope["method"]
        if app.dependency_overrides or scope["root_path"] or "fastapi.telemetry" in scope:
            return None
        if not self.routes:
            plain = [route for route in app.routes if isinstance(route, Route)]
            self.routes = [(r, prepare(r) if is_prepared(r) else None) for r in plain]
        for route, prepared in self.routes:
            if method in (route.methods or ()) and (found := route.path_regex.match(path)):
                scope["route"], scope["path_params"] = route, found.groupdict()
                return prepared
        return None


def prepare(route: Any) -> ASGIApp:
    """A route without what FastAPI adds to close dependencies: these have nothing to close."""
    steps = [(needed, fields_of(needed)) for needed in walk(route.dependant)]

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive, send)
        sent: Values = {"path": scope["path_params"], "header": state_of(scope).headers}
        sent["query"] = request.query_params if scope["query_string"] else {}
        results: Values = {}
        errors: list[Any] = []
        for needed, fields in steps:
            if needed.call not in results:
                await run(needed, fields, request, sent, results, errors)
        if errors:
            raise RequestValidationError(errors)
        await results[route.endpoint](scope, receive, send)

    return app


def is_prepared(route: Route) -> bool:
    """Whether a route is an async function that returns a Response and takes no more than a
    Request, single values from path, query and headers, async dependencies, and one JSON body."""
    if not isinstance(route, APIRoute):
        return False
    *inner, own = walk(route.dependant)
    return (
        signature(route.endpoint).return_annotation is Response
        and not route._embed_body_fields
        and all(isinstance(each, StringConvertor) for each in route.param_convertors.values())
        and all(type(field.field_info) is params.Body for field in own.body_params)
        and not any(needed.body_params or needed.scope for needed in inner)
        and all(map(is_plain, [*inner, own]))
    )


def is_plain(needed: Dependant) -> bool:
    infos = [field.field_info for field, *_ in fields_of(needed)]
    return not (
        not _is_coroutine_callable(needed.call)
        or not needed.use_cache
        or any(getattr(needed, name) for name in BEYOND)
        or any(field_annotation_is_sequence(info.annotation) for info in infos)
        or any(_get_param_model(field) for field, *_ in fields_of(needed))
        or any(info.default_factory or info.validate_default for info in infos)
        or not all(isinstance(info.default, Hashable) for info in infos)
    )


def walk(needed: Dependant) -> Iterator[Dependant]:
    """What a function depends on, each after its own dependencies, and then the function."""
    for inner in needed.dependencies:
        yield from walk(inner)
    yield needed


def fields_of(needed: Dependant) -> Fields:
    """The fields, their defaults, where each comes from, and its keys there, with its place."""
    fields: Fields = []
    for source in SOURCES:
        for field in getattr(needed, f"{source}_params"):
            keys = [
                (name.lower().encode() if source == "header" else name, (source, name))
                for _, name in _get_param_aliases(field)
            ]
            fields.append((field, field.default, source, keys))
    return fields


async def run(
    needed: Any, fields: Fields, request: Request, sent: Values, results: Values, errors: list[Any]
) -> None:
    """Calls a function if its arguments are good: adds to the results, or else to the errors."""
    arguments: dict[str, Any] = {}
    count, is_complete = len(errors), True
    for inner in needed.dependencies:
        if inner.call not in results:
            is_complete = False
        elif inner.name:
            arguments[inner.name] = results[inner.call]
    if needed.request_param_name:
        arguments[needed.request_param_name] = request
    for field, default, source, keys in fields:
        values, value, loc = sent[source], default, keys[0][1]
        for key, place in keys:
            if key in values:
                value, loc = values[key], place
                break
        if value is default and default is not Undefined:
            arguments[field.name] = default
            continue
        if isinstance(value, bytes):  # of a header
            value = value.decode("latin-1")
        arguments[field.name], wrong = validate(field=field, value=value, values={}, loc=loc)
        errors += wrong
    for body in needed.body_params:
        arguments[body.name] = await read_json(body, request, errors)
    if is_complete and len(errors) == count:
        results[needed.call] = await needed.call(**arguments)


async def read_json(field: ModelField, request: Request, errors: list[Any]) -> Any:
    """The request's body for a field that takes JSON.

    Raises HTTPException(415), and RequestValidationError where it is not JSON as in RFC 8259.
    """
    content = state_of(request.scope).body  # BodyLimit's: a stream takes 8 us
    if content is None:
        content = await request.body()
    if content and not JSON_TYPE.match(request.headers.get("content-type", "")):
        raise HTTPException(415, "The body has to come as Content-Type: application/json")
    try:
        sent = from_json(content, allow_inf_nan=False) if content else Undefined
    except ValueError as error:
        invalid = {"type": "json_invalid", "loc": ("body",), "msg": str(error)}
        raise RequestValidationError([invalid]) from None
    value, wrong = validate(field=field, value=sent, values={}, loc=("body",))
    errors += wrong
    return value
