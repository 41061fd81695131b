"""Middleware that works out once what FastAPI works out for each request.

    app = FastAPI(middleware=[Middleware(RequestLog), …, Middleware(PreparedRoutes)])  # the last

FastAPI validates the parameters of a route and of its dependencies one by one. Here each function
has one pydantic validator, of a TypedDict in which a parameter's alias is the place of its value:

    async def get(id: UUID, limit: Annotated[int, Query(ge=1)] = 9) -> Response: …
    {"path": {"id": "…"}, "query": {"limit": "5"}}  ->  {"id": UUID("…"), "limit": 5}

So errors have FastAPI's `loc`. Where a value was not sent, the function's own default applies.
"""

import inspect
import re
from collections.abc import Sequence
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, NotRequired, Union, get_args, get_origin
from uuid import UUID

from fastapi import Request, Response, params
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from pydantic import AliasChoices, AliasPath, BaseModel, Field, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import from_json
from starlette.exceptions import HTTPException
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send
from typing_extensions import TypedDict  # pydantic takes typing's from Python 3.12 on

from lib.state import state_of

JSON_TYPE = re.compile(rb"application/([\w.-]+\+)?json *(;|$)", re.IGNORECASE)
PLACES: Any = {params.Path: "path", params.Query: "query", params.Header: "header"}
SINGLE = (str, int, float, bool, UUID, NoneType)  # the types of values beside the body


class PreparedRoutes:
    """Calls a route's function if prepare() allows. Other routes, 404 and 405 are left to FastAPI.

    So are all below a root path, with `app.dependency_overrides`, and with OpenTelemetry, whose
    spans FastAPI's own code makes.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app
        self.routes: dict[str, list[tuple[Route, ASGIApp | None]]] = {}  # by method

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        prepared = self.find(scope) if scope["type"] == "http" else None
        await (prepared or self.app)(scope, receive, send)

    def find(self, scope: Scope) -> ASGIApp | None:
        app = scope["app"]
        if app.dependency_overrides or scope["root_path"] or "fastapi.telemetry" in scope:
            return None
        for route in () if self.routes else app.routes:
            if not isinstance(route, Route):  # a mount, which may answer for what follows it
                break
            prepared = prepare(route)
            for method in route.methods or ():
                self.routes.setdefault(method, []).append((route, prepared))
        for route, prepared in self.routes.get(scope["method"], ()):
            if found := route.path_regex.match(scope["path"]):
                scope["route"], scope["path_params"] = route, found.groupdict()
                return prepared
        return None


def prepare(route: Any) -> ASGIApp | None:
    """The route as an application, or None for one that is left to FastAPI.

    A prepared one is an async function that returns a Response. It takes no more than a Request,
    single values of path, query and headers, async dependencies without a body, and one JSON body.
    """
    try:
        require(type(route) is APIRoute and ":" not in route.path)  # without convertors
        endpoint = Function(route.endpoint, route)
        endpoint.needs[:0] = [("", dependency(each, route)) for each in route.dependencies]
        require(endpoint.returned is Response)
    except Exception:  # of any kind, so that no upgrade of FastAPI can stop the start
        return None

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive, send)
        sent: dict[str, Any] = {"path": scope["path_params"]}
        sent["query"] = request.query_params if scope["query_string"] else {}
        results: dict[Any, Any] = {}
        errors: list[Any] = []
        await endpoint.run(request, sent, results, errors)
        if errors:
            raise RequestValidationError(errors)
        await results[endpoint.call](scope, receive, send)

    return app


class Function:
    """An endpoint or a dependency. Raises an exception for one that prepare() does not name."""

    def __init__(self, call: Any, route: Any) -> None:
        function = call if inspect.isroutine(call) else type(call).__call__
        require(inspect.iscoroutinefunction(function))
        signature = inspect.signature(call, eval_str=True)
        self.call, self.returned = call, signature.return_annotation
        self.needs: list[tuple[str, Function]] = []
        self.requests: list[str] = []  # the parameters that take the Request
        self.headers: list[tuple[bytes, str]] = []  # names as they come, and as declared
        values: dict[str, Any] = {}
        body: dict[str, Any] = {}
        for name, parameter in signature.parameters.items():
            hint, default = parameter.annotation, parameter.default
            kind, mark = parse(hint, name in route.param_convertors)
            if isinstance(mark, params.Depends):
                self.needs.append((name, dependency(mark, route)))
            elif kind is Request:
                self.requests.append(name)
            elif mark:
                require(is_one_of(kind, SINGLE))
                require(mark.is_required() and not mark.validate_default)
                place, alias = PLACES[type(mark)], mark.validation_alias or name
                names = getattr(alias, "choices", [alias])  # the first that was sent counts
                values[name] = field(hint, default, [AliasPath(place, each) for each in names])
                if place == "header":
                    require(alias == mark.alias)  # without one, FastAPI turns _ into -
                    self.headers.append((alias.lower().encode(), alias))
            else:
                require(is_one_of(kind, (BaseModel, NoneType)) and not body)
                body[name] = field(hint, default, ["body"])
        self.values, self.body = validator(values), validator(body)

    async def run(self, request: Request, sent: Any, results: Any, errors: list[Any]) -> None:
        """Calls the function and adds to the results, or else adds to the errors."""
        count, arguments = len(errors), dict.fromkeys(self.requests, request)
        for name, needed in self.needs:
            if needed.call not in results:
                await needed.run(request, sent, results, errors)
            if name:
                arguments[name] = results.get(needed.call)
        if self.headers:
            here = state_of(request.scope).headers
            sent["header"] = {n: here[k].decode("latin-1") for k, n in self.headers if k in here}
        if self.values:
            arguments |= validate(self.values, sent, errors)
        # A path that cannot be right is a 404, which does not wait for the body.
        if self.body and not any(each["loc"][0] == "path" for each in errors):
            arguments |= validate(self.body, await read_json(request), errors)
        if len(errors) == count:
            results[self.call] = await self.call(**arguments)


def require(condition: object) -> None:
    if not condition:
        raise TypeError


def parse(hint: Any, is_in_path: bool) -> tuple[Any, Any]:
    """The type of a parameter, and its mark: Query(), Depends() and so on. None for a body."""
    kind, *extras = get_args(hint) if get_origin(hint) is Annotated else [hint]
    marks = [each for each in extras if isinstance(each, (FieldInfo, params.Depends))]
    require(len(marks) <= 1)
    if not marks and is_one_of(kind, SINGLE):
        return kind, params.Path() if is_in_path else params.Query()
    return kind, marks[0] if marks else None


def dependency(mark: params.Depends, route: Any) -> Function:
    needed = Function(mark.dependency, route)
    # What has an option, such as use_cache or scopes, is not equal to one without.
    require(mark == params.Depends(needed.call) and not needed.body)
    return needed


def is_one_of(kind: Any, types: tuple[type, ...]) -> bool:
    """Whether a type is one of these, a Literal, or a union of such."""
    kinds = get_args(kind) if get_origin(kind) in (Union, UnionType) else [kind]
    return all(get_origin(each) is Literal or issubclass(each, types) for each in kinds)


def field(hint: Any, default: Any, aliases: Sequence[str | AliasPath]) -> Any:
    """A field of a TypedDict. To set the alias of the hint's own FieldInfo would do nothing."""
    aliased = Annotated[hint, Field(validation_alias=AliasChoices(*aliases))]
    if default is inspect.Parameter.empty:
        return aliased
    require(isinstance(default, SINGLE))  # FastAPI copies others for each request
    return NotRequired[aliased]


def validator(fields: dict[str, Any]) -> Any:
    make: Any = TypedDict  # mypy wants to see the fields
    return TypeAdapter(make("Sent", fields)).validator if fields else None


def validate(by: Any, sent: Any, errors: list[Any]) -> Any:
    """Arguments by name, or none and more errors."""
    try:
        return by.validate_python(sent, from_attributes=True)  # as FastAPI does
    except ValidationError as error:
        errors += error.errors(include_url=False)
        return {}


async def read_json(request: Request) -> dict[str, Any]:
    """{"body": …}, or {} without one.

    Raises HTTPException(415), and RequestValidationError where it is not JSON as in RFC 8259.
    """
    state = state_of(request.scope)
    content = await request.body() if state.body is None else state.body  # a stream takes 8 us
    if not content:
        return {}
    if not JSON_TYPE.match(state.headers.get(b"content-type", b"")):
        raise HTTPException(415, "The body has to come as Content-Type: application/json")
    try:
        return {"body": from_json(content, allow_inf_nan=False)}
    except ValueError as error:
        invalid = {"type": "json_invalid", "loc": ("body",), "msg": str(error)}
        raise RequestValidationError([invalid]) from None
