"""A route class that works out at start what FastAPI works out for each request.

    app.router.route_class = PreparedRoute

It saves 35 of a GET's 100 us. Routes beyond is_prepared() are left to FastAPI, and all are while
`app.dependency_overrides` has entries. tests/test_routing.py compares the two.
"""

import dataclasses
import re
from collections.abc import Hashable, Iterator
from inspect import signature
from typing import Any

from fastapi import FastAPI, Request, Response, params
from fastapi._compat import ModelField, Undefined, field_annotation_is_sequence
from fastapi.dependencies.models import Dependant, _is_coroutine_callable
from fastapi.dependencies.utils import _get_param_aliases, _get_param_model
from fastapi.dependencies.utils import _validate_value_with_model_field as validate
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from pydantic_core import from_json
from starlette.exceptions import HTTPException
from starlette.routing import Match
from starlette.types import ASGIApp, Receive, Scope, Send

SOURCES = {"path": "path_params", "query": "query_params", "header": "headers"}
JSON_TYPE = re.compile(r"application/([\w.-]+\+)?json *(;|$)", re.IGNORECASE)
HANDLED = {  # what the code below takes account of; a function that needs more is FastAPI's
    "path_params", "query_params", "header_params", "body_params", "dependencies", "call", "name",
    "request_param_name", "path", "parent_oauth_scopes", "use_cache", "scope",
}  # fmt: skip
BEYOND = {field.name for field in dataclasses.fields(Dependant)} - HANDLED
Fields = list[tuple[ModelField, Any, str, list[str]]]


class PreparedRoute(APIRoute):
    """An APIRoute whose parameters are prepared at start, if is_prepared()."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        if is_prepared(self):
            self.app = prepare(self, by_fastapi=self.app)


def prepare(route: APIRoute, by_fastapi: ASGIApp) -> ASGIApp:
    """Exceptions go to Starlette's ExceptionMiddleware, and no dependency has anything to close:
    FastAPI's own wrapper, which cares for both here, takes 9 us."""
    overrides = getattr(route.dependency_overrides_provider, "dependency_overrides", {})
    steps = [(needed, fields_of(needed)) for needed in walk(route.dependant)]

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if overrides:
            return await by_fastapi(scope, receive, send)
        request = Request(scope, receive, send)
        results: dict[Any, Any] = {}
        errors: list[Any] = []
        for needed, fields in steps:
            if needed.call not in results:
                await run(needed, fields, request, results, errors)
        if errors:
            raise RequestValidationError(errors)
        await results[route.endpoint](scope, receive, send)

    return app


def is_prepared(route: APIRoute) -> bool:
    """Whether a route is an async function that returns a Response and takes no more than a
    Request, single values from path, query and headers, async dependencies, and one JSON body."""
    *inner, own = walk(route.dependant)
    return (
        signature(route.endpoint).return_annotation is Response
        and not route._embed_body_fields
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
    """The fields, their defaults, where each comes from, and the names it may come by."""
    return [
        (field, field.default, source, [name for _, name in _get_param_aliases(field)])
        for source in SOURCES
        for field in getattr(needed, f"{source}_params")
    ]


async def run(
    needed: Dependant, fields: Fields, request: Request, results: dict[Any, Any], errors: list[Any]
) -> None:
    """Calls a function if its arguments are good: adds to `results`, or else to `errors`."""
    arguments: dict[str, Any] = {}
    count, is_complete = len(errors), True
    for inner in needed.dependencies:
        if inner.call not in results:
            is_complete = False
        elif inner.name:
            arguments[inner.name] = results[inner.call]
    if needed.request_param_name:
        arguments[needed.request_param_name] = request
    for field, default, source, names in fields:
        values, value, name = getattr(request, SOURCES[source]), default, names[0]
        for each in names:
            if each in values:
                value, name = values[each], each
                break
        if value is default and default is not Undefined:
            arguments[field.name] = default
        else:
            arguments[field.name] = check(field, value, (source, name), errors)
    for body in needed.body_params:
        arguments[body.name] = check(body, await read_json(request), ("body",), errors)
    if is_complete and len(errors) == count:
        call: Any = needed.call
        results[call] = await call(**arguments)


def check(field: ModelField, value: Any, loc: tuple[str, ...], errors: list[Any]) -> Any:
    checked, wrong = validate(field=field, value=value, values={}, loc=loc)
    errors += wrong
    return checked


async def read_json(request: Request) -> Any:
    """The request's JSON, or Undefined without a body.

    Raises HTTPException(415), and RequestValidationError where it is not JSON as in RFC 8259.
    """
    content = request.scope.get("state", {}).get("body")  # BodyLimit's: a stream takes 8 us
    if content is None:
        content = await request.body()
    if content and not JSON_TYPE.match(request.headers.get("content-type", "")):
        raise HTTPException(415, "The body has to come as Content-Type: application/json")
    try:
        return from_json(content, allow_inf_nan=False) if content else Undefined
    except ValueError as error:
        invalid = {"type": "json_invalid", "loc": ("body",), "msg": str(error)}
        raise RequestValidationError([invalid]) from None


def allowed_methods(app: FastAPI, scope: Scope) -> list[str]:
    """Every method that a path answers to (RFC 9110 section 15.5.6), whichever route has it."""
    matching = [route for route in app.routes if route.matches(scope)[0] != Match.NONE]
    methods = {method for route in matching for method in getattr(route, "methods", None) or ()}
    return sorted(methods | {"HEAD"} if "GET" in methods else methods)
