"""Errors as RFC 9457 writes them: application/problem+json, with a stable `code` for programs.

app = FastAPI(exception_handlers={HTTPException: responder(messages, HTTPProblem(404, "None"))})
raise HTTPProblem(409, "E-mail already registered", "email_taken")
"""

import json
from collections.abc import Awaitable, Callable, Mapping, Sequence
from http import HTTPStatus
from typing import Any

from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from sqlmodel import Field, SQLModel
from starlette.exceptions import HTTPException
from starlette.routing import Match
from starlette.types import Scope

from lib.state import state_of

Respond = Callable[[Request, Exception], Awaitable[Response]]
PHRASES = {413: "Content Too Large", 422: "Unprocessable Content"}  # newer than Python 3.11's


class FieldError(SQLModel):
    """What is wrong with one value, and where the value came; never the value itself."""

    loc: list[str | int] = Field(schema_extra={"examples": [["body", "title"]]})
    msg: str = Field(schema_extra={"examples": ["Title: 1 to 500 characters"]})
    type: str = Field(schema_extra={"examples": ["missing"]})


class Problem(SQLModel):
    """An error (RFC 9457). `detail` may be shown to people; `code` is for programs and stays."""

    type: str = Field(schema_extra={"examples": ["about:blank"]})
    title: str
    status: int
    detail: str
    code: str
    request_id: str
    errors: list[FieldError] = Field(default_factory=list)


class HTTPProblem(HTTPException):
    """An HTTPException with a code, by default made of the title (RFC 9110 section 15).

    `errors` are FieldErrors, `reason` is for the log alone.
    """

    def __init__(
        self,
        status: int,
        detail: str = "",
        code: str = "",
        headers: Mapping[str, str] | None = None,
        errors: Sequence[Mapping[str, Any]] = (),
        reason: str = "",
    ) -> None:
        self.title = PHRASES.get(status) or HTTPStatus(status).phrase
        super().__init__(status, detail or self.title, headers)
        self.code = code or self.title.lower().replace(" ", "_")
        self.errors, self.reason = errors, reason

    def members(self, request_id: str) -> dict[str, Any]:
        """The JSON object that a client gets."""
        body = {"type": "about:blank", "title": self.title, "status": self.status_code}
        body |= {"detail": self.detail, "code": self.code, "request_id": request_id}
        return body | ({"errors": list(self.errors)} if self.errors else {})


RETRY = {"Retry-After": "2"}


class Unauthorized(HTTPProblem):
    """401 with a challenge (RFC 6750 section 3). `description` never holds a value of the token."""

    def __init__(
        self,
        *,
        code: str = "invalid_token",
        description: str = "",
        detail: str = "Could not validate credentials",
        reason: str = "",
    ) -> None:
        challenge, errors = 'Bearer realm="todo"', []
        if code not in ("not_authenticated", "wrong_credentials", "wrong_password"):
            challenge += ', error="invalid_token"'
        if description:
            challenge += f', error_description="{description}"'
            errors = [{"loc": ["header", "authorization"], "msg": description, "type": code}]
        headers = {"WWW-Authenticate": challenge}
        super().__init__(401, detail, code, headers, errors, reason=reason or description or code)


def messages_of(*schemas: type[SQLModel]) -> dict[str, str]:
    """A sentence for each field that is described, as "Title: 1 to 500 characters"."""
    return {
        name: f"{field.title or name.capitalize()}: {field.description}"
        for schema in schemas
        for name, field in schema.model_fields.items()
        if field.description
    }


def responder(
    messages: Mapping[str, str],
    bad_path: HTTPProblem,
    exceptions: Mapping[type[Exception], HTTPProblem],
) -> Respond:
    """An exception handler for all exceptions.

    `messages` has a sentence for each field. `bad_path` answers a path with a value that cannot
    be. `exceptions` are those of the host: what they say goes to the log, so it may hold no input.
    """

    async def respond(request: Request, error: Exception) -> Response:
        scope, state = request.scope, state_of(request.scope)
        known = exceptions.get(type(error))
        problem = known or to_problem(error, messages, bad_path)
        problem.__traceback__ = problem.__context__ = None  # a constant would gather them
        state.reason = problem.reason or (str(error) if known else "")
        headers = dict(problem.headers or {})
        if problem.status_code == 405:  # Starlette names the methods of one route
            headers["Allow"] = ", ".join(allowed_methods(scope))
        body = json.dumps(problem.members(state.request_id))
        return Response(body, problem.status_code, headers, "application/problem+json")

    return respond


def to_problem(error: Exception, messages: Mapping[str, str], bad_path: HTTPProblem) -> HTTPProblem:
    """The problem that an exception stands for: 500 for those that nobody has foreseen.

    What is against a schema is 422, what is no JSON 400. Neither repeats the input.
    """
    if isinstance(error, HTTPProblem):
        return error
    if isinstance(error, HTTPException):
        return HTTPProblem(error.status_code, str(error.detail), headers=error.headers)
    if not isinstance(error, RequestValidationError):
        return HTTPProblem(500, "Internal server error")
    errors = []
    for each in error.errors():
        name = str(each["loc"][-1])
        message = messages.get(name) or f"{name}: {each['msg']}"
        errors.append({"loc": each["loc"], "msg": message, "type": each["type"]})
    if errors[0]["type"] == "json_invalid":
        return HTTPProblem(400, f"The body is not JSON: {error.errors()[0]['msg']}")
    if any(each["loc"][0] == "path" for each in errors):
        return bad_path
    return HTTPProblem(422, errors[0]["msg"], errors=errors)


def allowed_methods(scope: Scope) -> list[str]:
    """Every method that a path answers to (RFC 9110 section 15.5.6), whichever route has it."""
    matching = [route for route in scope["app"].routes if route.matches(scope)[0] != Match.NONE]
    methods = {method for route in matching for method in getattr(route, "methods", None) or ()}
    return sorted(methods | {"HEAD"} if "GET" in methods else methods)
