"""Middleware that works out once what FastAPI works out for each request.

    app = FastAPI(middleware=[Middleware(RequestLog), …, Middleware(PreparedRoutes)])  # the last

FastAPI has a tree of what a route takes: `route.dependant`, a Dependant for its function and for
each dependency. For each request it goes through that tree value by value. Here each Dependant
becomes a Function once, which has one pydantic validator for all values beside the body:

    async def get(id: UUID, limit: Annotated[int, Query(ge=1)] = 9) -> Response: …
    {"path": {"id": "0199…"}, "query": {}}  ->  {"path": {"id": UUID(…)}, "query": {"limit": 9}}
"""

import re
from dataclasses import fields
from inspect import iscoroutinefunction, signature
from itertools import takewhile
from typing import Annotated, Any, NotRequired

from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.params import Body
from fastapi.routing import APIRoute
from pydantic import TypeAdapter, ValidationError
from pydantic_core import from_json
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send
from typing_extensions import TypedDict  # pydantic takes typing's from Python 3.12 on

from lib.problems import HTTPProblem
from lib.state import state_of

JSON_TYPE = re.compile(rb"application/([\w.-]+\+)?json *(;|$)", re.IGNORECASE)
PLACES = ("path", "query", "header")
SINGLE = {"string", "integer", "number", "boolean", "null"}  # JSON Schema's types of one value
# What a Function does with a Dependant, or need not do. No other attribute may be set.
KNOWN = {"path_params", "query_params", "header_params", "body_params", "dependencies", "call",
    "name", "request_param_name", "path", "scope", "use_cache"}  # fmt: skip


class PreparedRoutes:
    """Answers for the routes that prepare() allows. Other routes, 404 and 405 are FastAPI's.

    So are all below a root path, with dependency_overrides, and with OpenTelemetry's spans.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app
        self.routes: dict[str, list[tuple[Route, Function | None]]] = {}  # by method

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        endpoint = self.find(scope) if scope["type"] == "http" else None
        if endpoint is None:
            return await self.app(scope, receive, send)
        request = Request(scope, receive, send)
        query = dict(request.query_params) if scope["query_string"] else {}  # the last of a name
        sent: dict[str, Any] = {"path": scope["path_params"], "query": query}
        results: dict[Any, Any] = {}
        errors: list[Any] = []
        await endpoint.run(request, sent, results, errors)
        if errors:
            raise RequestValidationError(errors)
        await results[endpoint.call](scope, receive, send)

    def find(self, scope: Scope) -> "Function | None":
        app = scope["app"]
        if app.dependency_overrides or scope["root_path"] or "fastapi.telemetry" in scope:
            return None
        if not self.routes:
            # A mount or a router may answer for the routes after it: they are FastAPI's too.
            for route in takewhile(lambda each: isinstance(each, Route), app.routes):
                prepared = prepare(route)
                for method in route.methods or ():
                    self.routes.setdefault(method, []).append((route, prepared))
        for route, prepared in self.routes.get(scope["method"], ()):
            if found := route.path_regex.match(scope["path"]):
                scope["route"], scope["path_params"] = route, found.groupdict()
                return prepared
        return None


def prepare(route: Any) -> "Function | None":
    """The function of a route, or None for one that is left to FastAPI.

    A prepared one is async and returns a Response. It takes no more than a Request, single values
    of path, query and headers, async dependencies without a body, and one JSON body.
    """
    try:
        returned = signature(route.endpoint, eval_str=True).return_annotation
        is_simple = type(route) is APIRoute and ":" not in route.path  # it has no convertor
        return Function(route.dependant) if is_simple and issubclass(returned, Response) else None
    except Exception:  # of any kind, so that no upgrade of FastAPI can stop the start
        return None


class Function:
    """An endpoint or a dependency. Raises an exception for one that prepare() does not name."""

    def __init__(self, dependant: Any) -> None:
        if not is_plain(dependant):
            raise TypeError
        self.call, self.request_name = dependant.call, dependant.request_param_name
        self.needs = [(each.name, Function(each)) for each in dependant.dependencies]
        params_of = {place: getattr(dependant, f"{place}_params") for place in PLACES}
        places = {place: typed_dict(hints(found)) for place, found in params_of.items() if found}
        self.values = TypeAdapter(typed_dict(places)).validator if places else None
        bodies = hints(dependant.body_params).items()
        self.bodies = [(name, TypeAdapter(typed_dict({"body": kind}))) for name, kind in bodies]
        # This raises for a header without an alias: FastAPI turns a _ in its name into a -.
        aliases = [each.field_info.validation_alias for each in dependant.header_params]
        self.headers = [(each.lower().encode(), each) for each in aliases]  # as sent, as declared

    async def run(self, request: Request, sent: Any, results: Any, errors: list[Any]) -> None:
        """Calls the function and adds to the results, or else adds to the errors."""
        count = len(errors)
        arguments: dict[str, Any] = {}
        for name, needed in self.needs:
            if needed.call not in results:
                await needed.run(request, sent, results, errors)
            if name:
                arguments[name] = results.get(needed.call)
        if self.request_name:
            arguments[self.request_name] = request
        if self.headers:
            here = state_of(request.scope).headers
            sent["header"] = {n: here[k].decode("latin-1") for k, n in self.headers if k in here}
        try:
            if self.values:
                for found in self.values.validate_python(sent).values():
                    arguments |= found
            # The body comes last: where a path is wrong, the answer does not wait for it.
            for name, body in () if errors else self.bodies:
                content = await read_json(request)
                arguments[name] = body.validate_python(content, from_attributes=True)["body"]
        except ValidationError as error:
            errors += error.errors(include_url=False)
        if len(errors) == count:
            results[self.call] = await self.call(**arguments)


def is_plain(dependant: Any) -> bool:
    """Whether a Function does all that FastAPI does with a Dependant."""
    used = {each.name for each in fields(dependant) if getattr(dependant, each.name)}
    infos = [each.field_info for place in PLACES for each in getattr(dependant, f"{place}_params")]
    schemas = [TypeAdapter(info.annotation).json_schema() for info in infos]
    bodies = [each.field_info for each in dependant.body_params]
    return (
        used <= KNOWN
        and dependant.use_cache
        and any(map(iscoroutinefunction, (dependant.call, type(dependant.call).__call__)))
        and {kind.get("type") for each in schemas for kind in each.get("anyOf", [each])} <= SINGLE
        and not any(info.validate_default for info in infos)
        and all(type(each) is Body and not each.embed for each in bodies)
        and len(bodies) < 2
        and not any(each.body_params for each in dependant.dependencies)
    )


def hints(params: Any) -> dict[str, Any]:
    """The keys of a TypedDict. A FieldInfo has the aliases, the bounds and the default of one."""
    infos = {each.name: each.field_info for each in params}
    kinds = {name: Annotated[info.annotation, info] for name, info in infos.items()}
    return {n: kind if infos[n].is_required() else NotRequired[kind] for n, kind in kinds.items()}


def typed_dict(keys: dict[str, Any]) -> Any:
    make: Any = TypedDict  # mypy wants to see the keys
    return make("Sent", keys)


async def read_json(request: Request) -> dict[str, Any]:
    """{"body": …}, or {} without one. Raises HTTPProblem: 400 for what RFC 8259 forbids, or 415."""
    state = state_of(request.scope)
    content = await request.body() if state.body is None else state.body  # a stream takes 8 us
    if content and not JSON_TYPE.match(state.headers.get(b"content-type", b"")):
        raise HTTPProblem(415, "The body has to come as Content-Type: application/json")
    try:
        return {"body": from_json(content, allow_inf_nan=False)} if content else {}
    except ValueError as error:
        raise HTTPProblem(400, f"The body is not JSON: {error}") from None
