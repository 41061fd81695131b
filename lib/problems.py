"""Errors as RFC 9457 writes them: application/problem+json, with a stable `code` for programs.

email_taken = partial(HTTPProblem, 409, "E-mail already registered", "email_taken")
raise email_taken()  # a new one each time: an exception keeps the traceback of where it was
"""

import json
from collections.abc import Callable, Coroutine, Mapping, Sequence
from http.client import responses
from typing import Any, get_args

from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from sqlmodel import Field, SQLModel
from starlette.exceptions import HTTPException
from starlette.routing import Match
from starlette.types import Scope

from lib.state import state_of

MakeProblem = Callable[[], "HTTPProblem"]
Respond = Callable[[Request, Any], Coroutine[Any, Any, Response]]
RETRY = {"Retry-After": "2"}
NO_THREAD = "can't start new thread"  # as Python says, for a hash or a file
PHRASES = {413: "Content Too Large", 422: "Unprocessable Content"}  # newer than Python 3.11's


class FieldError(SQLModel):
    """What is wrong with one value, and where the value came; never the value itself."""

    loc: list[str | int]
    msg: str
    type: str


class Problem(SQLModel):
    """An error (RFC 9457). `detail` may be shown to people."""

    type: str
    title: str
    status: int
    detail: str
    message: str  # `detail` again, for clients that look here
    code: str
    request_id: str
    errors: list[FieldError] = Field(default_factory=list)


class HTTPProblem(HTTPException):
    """An HTTPException with a code, by default made of the title (RFC 9110 section 15). `errors`
    are as FieldError; `reason` is for the log alone."""

    def __init__(
        self,
        status: int,
        detail: str = "",
        code: str = "",
        headers: Mapping[str, str] | None = None,
        errors: Sequence[Mapping[str, Any]] = (),
        reason: str = "",
    ) -> None:
        self.title = PHRASES.get(status) or responses.get(status, "Error")
        super().__init__(status, detail or self.title, headers)
        self.code = code or self.title.lower().replace(" ", "_")
        self.errors, self.reason = list(errors), reason

    def members(self, request_id: str) -> dict[str, Any]:
        """The JSON object that a client gets."""
        body = {"type": "about:blank", "title": self.title, "status": self.status_code}
        body |= {"detail": self.detail, "message": self.detail, "code": self.code}
        return body | {"request_id": request_id} | ({"errors": self.errors} if self.errors else {})


class Unauthorized(HTTPProblem):
    """401 with a challenge. `description` says what is wrong with the token."""

    def __init__(
        self,
        *,
        code: str = "invalid_token",
        description: str = "",
        detail: str = "",
        reason: str = "",
    ) -> None:
        detail, reason = detail or "Could not validate credentials", reason or description or code
        error = {"loc": ["header", "authorization"], "msg": description, "type": code}
        super().__init__(401, detail, code, errors=[error] if description else [], reason=reason)
        self.description = description

    def challenge(self, realm: str) -> str:
        """WWW-Authenticate (RFC 6750 section 3): without an error where no token came."""
        text = f'Bearer realm="{realm}"'
        if "token" in self.code:  # invalid_token, token_expired, token_not_jwt
            text += ', error="invalid_token"'
        return text + (f', error_description="{self.description}"' if self.description else "")


def responder(
    realm: str, malformed_path: MakeProblem, exceptions: Mapping[type[Exception], MakeProblem]
) -> Respond:
    """An exception handler for all exceptions. `realm` is for the challenge of a 401.

    `malformed_path` answers a path with a value that cannot be, like an id that is no UUID.
    `exceptions` are those of the host. Their text goes to the log, so it may hold no input.
    """

    async def respond(request: Request, error: Exception) -> Response:
        scope, state = request.scope, state_of(request.scope)
        make = exceptions.get(type(error))
        problem = make() if make else to_problem(error, scope, malformed_path)
        state.reason = problem.reason or (str(error) if make else "")
        headers = dict(problem.headers or {})
        if isinstance(problem, Unauthorized):
            headers["WWW-Authenticate"] = problem.challenge(realm)
        if problem.status_code == 405:  # Starlette names the methods of one route
            headers["Allow"] = ", ".join(allowed_methods(scope))
        has_body = problem.status_code not in (204, 304)  # RFC 9110 section 6.4.1
        body = json.dumps(problem.members(state.request_id)) if has_body else None
        return Response(body, problem.status_code, headers, "application/problem+json")

    return respond


def to_problem(error: Exception, scope: Scope, malformed_path: MakeProblem) -> HTTPProblem:
    """The problem of an exception: 400 for a body that is not JSON, 422 for a value against its
    schema, 503 where no thread starts, 500 for what nobody foresaw. None repeats the input."""
    if isinstance(error, HTTPProblem):
        return error
    if isinstance(error, HTTPException):
        return HTTPProblem(error.status_code, str(error.detail), headers=error.headers)
    if isinstance(error, RuntimeError) and str(error) == NO_THREAD:
        return HTTPProblem(503, "No thread can be started", headers=RETRY, reason=NO_THREAD)
    if not isinstance(error, RequestValidationError):
        return HTTPProblem(500, "Internal server error")
    wrong = error.errors()
    if wrong[0]["type"] == "json_invalid":
        return HTTPProblem(400, f"The body is not JSON: {wrong[0]['msg']}")
    if any("path" in each["loc"][:1] for each in wrong):  # whatever else is wrong
        return malformed_path()
    dependant = getattr(scope.get("route"), "dependant", None)  # only FastAPI's routes have one
    known = sentences(dependant) if dependant else {}
    errors = [{"loc": e["loc"], "msg": sentence(e, known), "type": e["type"]} for e in wrong]
    missing = [str(each["loc"][-1]) for each in wrong if each["type"] == "missing"]
    several = f"{' and '.join(missing)} have to be sent" if len(missing) > 1 else ""
    return HTTPProblem(422, several or errors[0]["msg"], errors=errors)


def sentence(error: Mapping[str, Any], known: Mapping[tuple[str, ...], str]) -> str:
    """What is wrong with a value: the sentence of its field, or else pydantic's words."""
    kind, words = error["type"], error["msg"].removeprefix("Value error, ")
    if len(error["loc"]) == 1 and kind in ("missing", "model_attributes_type", "dict_type"):
        return "The body has to be a JSON object"
    words = "has to be sent" if kind == "missing" else words
    place = tuple(part for part in error["loc"] if isinstance(part, str))  # an int is an index
    name = ".".join(place[1:])
    return known.get(place, f"{name}: {words}" if name else words)


def sentences(dependant: Any) -> dict[tuple[str, ...], str]:
    """The title and description of each value that a route takes, by ("query", "limit")."""
    found: dict[tuple[str, ...], str] = {}
    for each in dependant.dependencies:
        found |= sentences(each)
    for place in ("query", "header", "cookie", "body"):
        fields: dict[str, Any] = {}
        for param in getattr(dependant, f"{place}_params"):
            fields[param.name], kind = param.field_info, param.field_info.annotation
            for model in (dependant.call, kind, *get_args(kind)):
                fields |= getattr(model, "model_fields", {})
        for name, info in fields.items():
            if info.description:
                names = getattr(info.validation_alias, "choices", [info.alias or name])
                text = f"{info.title or name}: {info.description}"
                found |= {(place, each): text for each in names if isinstance(each, str)}
    return found


def allowed_methods(scope: Scope) -> list[str]:
    """Every method that a path answers to (RFC 9110 section 15.5.6), whichever route has it."""
    matching = [route for route in scope["app"].routes if route.matches(scope)[0] != Match.NONE]
    methods = {method for route in matching for method in getattr(route, "methods", None) or ()}
    return sorted(methods | {"HEAD"} if "GET" in methods else methods)
