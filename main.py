"""Speaks HTTP: the routes of the todo service, their schemas, and what a request passes.

    POST   /auth/register             make an account, get its token (public)
    POST   /auth/login                get a token (public)
    POST   /auth/token                the same by OAuth2 password form (public)
    POST   /auth/logout               nothing: a token ends by itself (public)
    GET    /auth/me                   the token's user
    POST   /tasks                     store a task
    GET    /tasks                     a page of tasks, newest first
    GET    /tasks/{task_id}           one task
    PUT    /tasks/{task_id}           change the fields sent
    PATCH  /tasks/{task_id}           the same
    DELETE /tasks/{task_id}           delete a task
    PATCH  /tasks/{task_id}/complete  flip `completed`, or set it
    PATCH  /tasks/{task_id}/toggle    the same
    GET    /health                    the process lives (public)
    GET    /health/ready              the database answers (public)
    GET    /                          name and version (public)

The task routes stand under /api/{user_id}/tasks too, where {user_id} is the token's own user or
`me`. Every error is a problem (RFC 9457).
"""

import hashlib
import json
from collections.abc import Awaitable, Callable
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import quote
from uuid import UUID

from fastapi import Depends, Form, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import AfterValidator, AliasChoices, Field, StrictBool, StringConstraints
from sqlmodel import SQLModel
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware

import auth
import db
from lib import (
    cors,
    develop,
    logs,
    middleware,
    openapi,
    pipeline,
    postgres,
    problems,
    startup,
    welcome,
)
from lib.headers import PRECONDITION_FAILED, Conditions, IdempotencyKey, IfConditions, next_link
from lib.paths import CanonicalPath
from lib.problems import RETRY, HTTPProblem, Problem, Unauthorized
from lib.routing import PreparedRoutes
from lib.settings import BaseSettings

VERSION = "1.1.0"


class Settings(BaseSettings):
    cors_origins: str = ""
    fastapi_otel_auto_configure: bool = False  # FastAPI reads it too


settings = Settings.load()

# Schemas (no tables). A field's title and description are its error message.

# Written out, as \s differs between dialects. \x00 is excluded: PostgreSQL cannot store it.
WHITESPACE = r"\x00-\x20\x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
NOT_SENT: Any = Field(default_factory=str)  # never read; a plain default would be in OpenAPI

Title = Annotated[str, Field(
    min_length=1, max_length=500, pattern=rf"^[^\x00]*[^{WHITESPACE}][^\x00]*$",
    description="1 to 500 characters, at least one of them visible", examples=["Buy milk"],
)]  # fmt: skip
Description = Annotated[str | None, Field(
    max_length=5000, pattern=r"^[^\x00]*$",
    description="up to 5,000 characters", examples=["two litres"],
)]  # fmt: skip
Completed = Annotated[StrictBool, Field(  # where both names came, completed wins
    validation_alias=AliasChoices("completed", "is_completed"), description="true or false",
)]  # fmt: skip
Email = Annotated[str, StringConstraints(strip_whitespace=True), Field(
    min_length=3, max_length=254, pattern=rf"^[^@{WHITESPACE}]+@[^@{WHITESPACE}]+$", title="E-mail",
    description="needs an @ between two parts without spaces", examples=["ann@example.com"],
), AfterValidator(auth.normal_email)]  # fmt: skip
Password = Annotated[str, Field(
    min_length=8, max_length=128, description="8 to 128 characters", examples=["correct horse"],
)]  # fmt: skip


class Toggle(SQLModel):
    """A value to set `completed` to. Without one it is flipped."""

    completed: Completed = NOT_SENT


class TaskUpdate(Toggle):
    """The fields to change. Unknown ones are ignored: nobody can set an owner, an id or a time."""

    title: Title = NOT_SENT
    description: Description = NOT_SENT


class TaskCreate(SQLModel):
    """A new task."""

    title: Title
    description: Description = None
    completed: Completed = Field(default_factory=bool)  # False


class Task(SQLModel):
    """A task, the same object in every answer."""

    id: UUID
    user_id: str
    title: Title
    description: Description
    completed: bool
    is_completed: bool = Field(deprecated=True)  # mirrors completed, for older clients
    created_at: datetime
    updated_at: datetime


class User(SQLModel):
    """A user. One of an outside issuer has no e-mail here, and no date before the first task."""

    id: str
    email: Email | None
    created_at: datetime | None


class Login(SQLModel):
    """An e-mail, in upper or lower case, and a password."""

    email: Email = Field(validation_alias=AliasChoices("email", "username"))
    password: str = Field(min_length=1, max_length=1024, examples=["correct horse"])


class Registration(Login):
    """A new account."""

    password: Password


class AccessToken(SQLModel):
    """A token (RFC 6749 section 5.1), good for `expires_in` seconds, and its user."""

    access_token: str
    token_type: Literal["bearer"]
    expires_in: int = Field(examples=[auth.TOKEN_LIFETIME])
    user: User


# Errors, and what a request passes on its way to a route.

MESSAGES = problems.messages_of(TaskCreate, Registration)
MESSAGES["username"] = MESSAGES["email"]

TASK_NOT_FOUND = HTTPProblem(404, "Task not found", "task_not_found")  # or is another user's
IDENTITY_MISMATCH = HTTPProblem(403, "User identity mismatch", reason="the path of another user")
ACCOUNT_GONE = Unauthorized(description="the account of this token has been deleted")

# Pattern at the start, replacement, body type (b"": any); each on the result of the last.
ALIASES = [
    (r"/(?:api/(?:v1/)?)?(?:tasks|todos)(?=/|$)", "/tasks", b""),
    (r"/tasks/create$", "/tasks", b""),
    (r"/tasks/([^/]+)/edit$", r"/tasks/\1", b""),
    (r"/api/([^/]+)/todos(?=/|$)", r"/api/\1/tasks", b""),
    (r"/api/(?:v1/)?(?=auth/|users/me$)", "/", b""),
    (r"/(?:users/me|auth/current_user)$", "/auth/me", b""),
    (r"/auth/signup$", "/auth/register", b""),
    (r"/auth/signin$", "/auth/login", b""),
    (r"/auth/token$", "/auth/login", b"application/json"),
    (r"/auth/login$", "/auth/token", b"application/x-www-form-urlencoded"),
    (r"/auth/login$", "/auth/token", b"multipart/form-data"),
]
CANONICAL = r"/tasks(?:/[0-9a-f-]{36}(?:/toggle|/complete)?)?"  # no alias changes these


EXCEPTIONS: dict[type[Exception], HTTPProblem] = {
    pipeline.Unavailable: HTTPProblem(503, "The database is not available", "unavailable", RETRY),
    pipeline.InvalidValue: HTTPProblem(422, "The database cannot store this", "invalid_value"),
    pipeline.UniqueViolation: HTTPProblem(409, "There is one like this already"),
    pipeline.ForeignKeyViolation: ACCOUNT_GONE,
    pipeline.UnexpectedError: HTTPProblem(500, "Internal server error"),
}

respond = problems.responder(MESSAGES, TASK_NOT_FOUND, EXCEPTIONS)
app = openapi.DocumentedAPI(
    {"accounts": "Users and tokens.", "tasks": "A user's tasks.", "service": "The service itself."},
    title="Todo",
    version=VERSION,
    description="Todos of many users. An error's `detail` is for people, `code` for programs.",
    responses={"4XX": {"model": Problem}},
    generate_unique_id_function=lambda r: r.name + "_of_user" * r.path.startswith("/api/"),
    lifespan=startup.lifespan(db.start, db.stop),
    telemetry=startup.telemetry(settings.fastapi_otel_auto_configure),
    middleware=[  # outermost first
        Middleware(middleware.RequestLog),  # an id, and a line in the log
        *cors.cors(settings.cors_origins, "CORS_ORIGINS"),
        Middleware(middleware.ErrorResponses, respond=respond),  # a problem for each exception
        Middleware(CanonicalPath, aliases=ALIASES, unless=CANONICAL),
        Middleware(middleware.BodyLimit),  # 128 KiB in 10 seconds
        Middleware(PreparedRoutes),  # FastAPI's routing, in a third of the time
    ],
    exception_handlers=dict.fromkeys([HTTPException, RequestValidationError], respond),
)


# Tasks.


CurrentUser = Annotated[str, Depends(auth.current_user)]
Offset = Annotated[int, Query(ge=0, le=10**9, validation_alias=AliasChoices("offset", "skip"))]
Endpoint = Callable[..., Awaitable[Response]]
Decorator = Callable[[Endpoint], Endpoint]


async def own_path(user_id: str, me: CurrentUser) -> None:
    if user_id not in (me, "me"):
        raise IDENTITY_MISMATCH


def route(method: str, path: str, **options: Any) -> Decorator:
    """Registers both roots. user_id is the token's, and only in own_path() the path's."""
    options |= {"methods": [method], "tags": ["tasks"]}
    refusals = openapi.errors(TASK_NOT_FOUND) if "{task_id}" in path else {}
    of_user: Any = {
        "dependencies": [Depends(own_path)],
        "responses": refusals | openapi.errors(IDENTITY_MISMATCH),
    }

    def register(endpoint: Endpoint) -> Endpoint:
        app.add_api_route(path, endpoint, responses=refusals, **options)
        app.add_api_route("/api/{user_id}" + path, endpoint, **options, **of_user)
        return endpoint

    return register


@route("POST", "/tasks", response_model=Task, status_code=201)
async def create_task(
    request: Request, user_id: CurrentUser, body: TaskCreate, key: IdempotencyKey = None
) -> Response:
    """Store a task. A retry with its Idempotency-Key gives the task first stored, as it is now."""
    sent = body.model_dump_json(exclude_unset=True) if key else ""
    outside = not auth.is_account_id(user_id)
    stored = await db.insert_task(user_id, body.model_dump(), key, sent, outside)
    if stored is None:
        raise HTTPProblem(422, "This Idempotency-Key came with another body before", "key_reused")
    location = f"{quote(request.scope['path'])}/{stored.id}"
    replayed = {"Idempotent-Replayed": "true"} if stored.replayed else {}
    headers = {"ETag": stored.task.etag, "Location": location, **replayed}
    return Response(stored.task.json, 201, headers, "application/json")


@route("GET", "/tasks", response_model=list[Task])
async def list_tasks(
    request: Request,
    user_id: CurrentUser,
    conditions: IfConditions,
    completed: bool | None = None,
    status: Literal["completed", "pending", "all"] = "all",
    limit: Annotated[int, Query(ge=1, le=1000)] = 1000,
    after: UUID | None = None,
    offset: Offset = 0,
    page: Annotated[int, Query(ge=1, le=10**6)] = 1,
) -> Response:
    """List tasks, newest first. While more follow, `Link` has the address of the next page.

    It goes on by `after`, the id of the last task seen: without a filter, such a page costs the
    same however far it is. Pages by `offset` (or `skip`) or `page` (from 1) cost more and more.
    """
    if completed is None and status != "all":
        completed = status == "completed"
    offset += (page - 1) * limit
    tasks, last_id = await db.select_tasks(user_id, completed, after, offset, limit)
    headers = {"Link": next_link(request, last_id)} if last_id else {}
    etag = f'"{hashlib.sha256(tasks).hexdigest()[:32]}"'
    return conditions.respond(tasks, etag, headers)


@route("GET", "/tasks/{task_id}", response_model=Task)
async def get_task(user_id: CurrentUser, task_id: UUID, conditions: IfConditions) -> Response:
    """Read a task."""
    task = await db.select_task(user_id, task_id)
    if task is None:
        raise TASK_NOT_FOUND
    return conditions.respond(task.json, task.etag, {})


@route("PUT", "/tasks/{task_id}", response_model=Task)
@route("PATCH", "/tasks/{task_id}", response_model=Task, name="patch_task")
async def update_task(
    user_id: CurrentUser, task_id: UUID, body: TaskUpdate, conditions: IfConditions
) -> Response:
    """Change the fields sent, and no others."""
    changes = body.model_dump(exclude_unset=True)
    task = await db.update_task(user_id, task_id, changes, conditions.versions(db.SHAPE))
    return await respond_written(task, user_id, task_id, conditions)


@route("PATCH", "/tasks/{task_id}/complete", response_model=Task, name="complete_task")
@route("PATCH", "/tasks/{task_id}/toggle", response_model=Task)
async def toggle_task(
    user_id: CurrentUser, task_id: UUID, conditions: IfConditions, body: Toggle | None = None
) -> Response:
    """Flip `completed`, or set it to the value sent."""
    value = body.completed if body and body.model_fields_set else None
    task = await db.toggle_task(user_id, task_id, value, conditions.versions(db.SHAPE))
    return await respond_written(task, user_id, task_id, conditions)


@route("DELETE", "/tasks/{task_id}", status_code=204)
async def delete_task(user_id: CurrentUser, task_id: UUID, conditions: IfConditions) -> Response:
    """Delete a task."""
    if not await db.delete_task(user_id, task_id, conditions.versions(db.SHAPE)):
        await respond_written(None, user_id, task_id, conditions)
    return Response(status_code=204)


async def respond_written(
    task: db.Task | None, user_id: str, task_id: UUID, conditions: Conditions
) -> Response:
    """The written task. For None raises 412 if If-Match refused one, or else 404."""
    if task:
        return Response(task.json, 200, {"ETag": task.etag}, "application/json")
    if conditions.versions(db.SHAPE) is not None and await db.select_task(user_id, task_id):
        raise PRECONDITION_FAILED
    raise TASK_NOT_FOUND


# Accounts.

EMAIL_TAKEN = HTTPProblem(409, "E-mail already registered", "email_taken")
WRONG_CREDENTIALS = Unauthorized(code="wrong_credentials", detail="Wrong e-mail or password")


def account_route(path: str, refusal: HTTPProblem, status: int = 200) -> Decorator:
    """Registers a route that gives a token, if ACCOUNTS is on."""
    refusals = openapi.errors(refusal, HTTPProblem(429, "Too many requests"))
    options: Any = {"responses": refusals, "response_model": AccessToken, "tags": ["accounts"]}
    register: Any = app.post(path, status_code=status, **options)
    return register if auth.ACCOUNTS else lambda endpoint: endpoint


def token_response(account: db.Account, status: int = 200) -> Response:
    token = {"access_token": auth.issue_token(account.id), "token_type": "bearer"}
    answer = token | {"expires_in": auth.TOKEN_LIFETIME, "user": json.loads(account.json)}
    return Response(json.dumps(answer), status, {"Cache-Control": "no-store"}, "application/json")


async def log_in(request: Request, email: str, password: str) -> Response:
    await auth.throttle(request, email)
    account = await db.select_account(email)
    # Without an account it takes as long.
    matches = await auth.passwords.check(password, account and account.password_hash)
    if account is None or not matches:
        raise WRONG_CREDENTIALS
    return token_response(account)


@account_route("/auth/register", EMAIL_TAKEN, status=201)
async def register(request: Request, body: Registration) -> Response:
    """Make an account and get its token."""
    await auth.throttle(request, body.email)
    account = await db.insert_account(body.email, await auth.passwords.hash(body.password))
    if account is None:
        raise EMAIL_TAKEN
    return token_response(account, 201)


@account_route("/auth/login", WRONG_CREDENTIALS)
async def login(request: Request, body: Login) -> Response:
    """Get a token for an account."""
    return await log_in(request, body.email, body.password)


@account_route("/auth/token", WRONG_CREDENTIALS)
async def login_by_form(
    request: Request,
    username: Annotated[Email, Form()],
    password: Annotated[str, Form(min_length=1, max_length=1024)],
) -> Response:
    """Get a token by the form of OAuth2's password grant, as Swagger UI's Authorize does."""
    return await log_in(request, username, password)


@app.post("/auth/logout", status_code=204, tags=["accounts"])
async def logout() -> Response:
    """End a session: the client forgets its token, which ends by itself."""
    return Response(status_code=204)


@app.get("/auth/me", response_model=User, tags=["accounts"])
async def me(user_id: CurrentUser) -> Response:
    """Read the user whose token this is."""
    return Response(await db.select_user(user_id), media_type="application/json")


# Health.


@app.get("/health", tags=["service"])
async def health() -> dict[str, str]:
    """See that the process lives. It asks no database: that would keep Neon awake."""
    return {"status": "ok"}


@app.get("/health/ready", tags=["service"])
async def ready() -> dict[str, str]:
    """See that the database answers, or did in the last 5 seconds."""
    await db.ping()
    return {"status": "ready"}


@app.get("/", response_model=dict[str, str], tags=["service"])
async def root(request: Request) -> Response:
    """See where to go from here."""
    return welcome.respond(request, {"name": "todo", "version": VERSION, "docs": "/docs"})


if __name__ == "__main__":
    develop.run(
        "main:app",
        Path(__file__).resolve().parent,
        database=not db.settings.database_url,
        secret=not (auth.SECRET or auth.JWKS_URL),
        origins=not settings.cors_origins,
    )
else:  # a server imports us
    logs.configure()
    auth.check_settings()
    postgres.connection_string(db.settings.database_url)  # stops the start if wrong
