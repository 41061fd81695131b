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

from lib.pipeline import (
    ForeignKeyViolation,
    InvalidValue,
    Unavailable,
    UnexpectedError,
    UniqueViolation,
)
from lib.routing import allowed_methods

Respond = Callable[[Request, Exception], Awaitable[Response]]
REALM = "todo"  # of the challenges
PHRASES = {413: "Content Too Large", 422: "Unprocessable Content"}  # RFC 9110; Python 3.11 is older


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
    """An HTTPException with a code. `errors` are FieldErrors, `reason` is for the log alone."""

    def __init__(
        self,
        status: int,
        detail: str,
        code: str = "",
        headers: Mapping[str, str] | None = None,
        errors: Sequence[Mapping[str, Any]] = (),
        reason: str = "",
    ) -> None:
        super().__init__(status, detail, headers)
        self.code, self.errors, self.reason = code, errors, reason


RETRY = {"Retry-After": "2"}
TRANSLATIONS = {
    Unavailable: HTTPProblem(503, "The database is not available", "unavailable", RETRY),
    InvalidValue: HTTPProblem(422, "The database cannot store this value", "invalid_value"),
    UniqueViolation: HTTPProblem(409, "There is one like this already"),
    UnexpectedError: HTTPProblem(500, "Internal server error"),
}


class Unauthorized(HTTPProblem):
    """401 with a challenge (RFC 6750 section 3). `description` never holds a value of the token."""

    def __init__(
        self, code: str = "invalid_token", description: str = "", detail: str = ""
    ) -> None:
        challenge = f'Bearer realm="{REALM}"'
        if code not in ("not_authenticated", "wrong_credentials"):
            challenge += ', error="invalid_token"'
        if description:
            challenge += f', error_description="{description}"'
        detail = detail or "Could not validate credentials"
        super().__init__(401, detail, code, {"WWW-Authenticate": challenge})
        self.reason = description or code
        if description:
            where = ["header", "authorization"]
            self.errors = [{"loc": where, "msg": description, "type": code}]


def phrase(status: int) -> str:
    """The words for a status (RFC 9110 section 15)."""
    return PHRASES.get(status) or HTTPStatus(status).phrase


def messages_of(*schemas: type[SQLModel]) -> dict[str, str]:
    """A sentence for each field: "Title: 1 to 500 characters", of its title and description."""
    return {
        name: f"{field.title or name.capitalize()}: {field.description}"
        for schema in schemas
        for name, field in schema.model_fields.items()
    }


def responder(
    messages: Mapping[str, str], bad_path: HTTPProblem, bad_reference: HTTPProblem
) -> Respond:
    """An exception handler for all exceptions.

    `messages` has a sentence for each field by its name. `bad_path` answers a path with a value
    that cannot be, and `bad_reference` a ForeignKeyViolation. The log gets the reason: what the
    pipeline's exceptions say holds no input.
    """

    async def respond(request: Request, error: Exception) -> Response:
        scope, state = request.scope, request.scope["state"]
        missing = isinstance(error, ForeignKeyViolation)
        problem = bad_reference if missing else to_problem(error, messages, bad_path)
        problem.__traceback__ = problem.__context__ = None  # a constant would gather them
        state["reason"] = problem.reason or (str(error) if type(error) in TRANSLATIONS else "")
        headers = dict(problem.headers or {})
        if problem.status_code == 405:  # Starlette names the methods of one route
            headers["Allow"] = ", ".join(allowed_methods(scope["app"], scope))
        body = json.dumps(body_of(problem, state["request_id"]))
        return Response(body, problem.status_code, headers, "application/problem+json")

    return respond


def to_problem(error: Exception, messages: Mapping[str, str], bad_path: HTTPProblem) -> HTTPProblem:
    """The problem that an exception stands for: 500 for those that nobody has foreseen.

    What is against a schema is 422, and what is no JSON is 400. Neither repeats the input, which
    may not even be encodable.
    """
    if isinstance(error, HTTPProblem):
        return error
    if isinstance(error, HTTPException):
        return HTTPProblem(error.status_code, str(error.detail), headers=error.headers)
    if not isinstance(error, RequestValidationError):
        return TRANSLATIONS.get(type(error), TRANSLATIONS[UnexpectedError])
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


def body_of(problem: HTTPProblem, request_id: str) -> dict[str, Any]:
    """The members of a problem. A code that nobody has given is made of the title."""
    status, title = problem.status_code, phrase(problem.status_code)
    code = problem.code or title.lower().replace(" ", "_")
    body = {"type": "about:blank", "title": title, "status": status, "detail": problem.detail}
    body |= {"code": code, "request_id": request_id}
    return body | ({"errors": list(problem.errors)} if problem.errors else {})
