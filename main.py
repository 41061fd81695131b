"""The HTTP of the service: its routes, their schemas, and the middleware.

    POST   /auth/register             make an account, get its token (public)
    POST   /auth/login                get a token (public)
    POST   /auth/token                get a token by OAuth2 password form (public)
    POST   /auth/logout               no effect: a token ends by itself (public)
    PUT    /auth/password             change a password
    GET    /auth/me                   the token's user
    DELETE /auth/me                   delete an account and its tasks
    POST   /tasks                     store a task
    GET    /tasks                     a page of tasks, newest first
    GET    /tasks/{task_id}           one task
    PUT    /tasks/{task_id}           change the fields sent
    PATCH  /tasks/{task_id}           like PUT
    DELETE /tasks/{task_id}           delete a task
    PATCH  /tasks/{task_id}/complete  flip `completed`, or set it
    POST   /tasks/{task_id}/complete  like PATCH
    PATCH  /tasks/{task_id}/toggle    like complete
    POST   /tasks/{task_id}/toggle    like complete
    GET    /health                    the process runs (public)
    GET    /health/ready              the database answers (public)
    GET    /                          name and version (public)

The task routes are under /api/{user_id}/tasks too, where {user_id} is the token's own user or
`me`. Errors are problems (RFC 9457).
"""

import hashlib
import json
from collections.abc import Awaitable, Callable
from datetime import datetime
from functools import partial
from typing import Annotated, Any, Literal
from uuid import UUID

from fastapi import Depends, Form, Path, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import Field, model_validator
from sqlmodel import SQLModel
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware

import auth
import db
import pgpipeline
from lib import cors, develop, logs, middleware, openapi, pages, problems, schemas, startup
from lib.headers import Conditions, IdempotencyKey, IfConditions, next_link, precondition_failed
from lib.paths import CanonicalRequest, client_path
from lib.problems import RETRY, HTTPProblem, Unauthorized
from lib.routing import PreparedRoutes
from lib.schemas import NOT_SENT, WHITESPACE, After, Limit, Offset, PageNumber
from lib.settings import BaseSettings
from lib.telemetry import telemetry

VERSION = "2.0.0"


class Settings(BaseSettings):
    cors_origins: str = ""
    fastapi_otel_auto_configure: bool = False  # traces, as OTEL_* say where


settings = Settings.load()

# Schemas. SQLModel serves as BaseModel, without tables: the SQL is in db.py. An error quotes the
# title and the description of the field whose value it refuses. WHITESPACE has \x00 too.

Title = Annotated[str, Field(
    title="Title", min_length=1, max_length=500, pattern=rf"^[^\x00]*[^{WHITESPACE}][^\x00]*$",
    description="1 to 500 characters, at least one of them visible", examples=["Buy milk"],
)]  # fmt: skip
Description = Annotated[str | None, Field(
    title="Description", max_length=5000, pattern=r"^[^\x00]*$",
    description="up to 5,000 characters", examples=["two litres"],
)]  # fmt: skip
Completed = Annotated[bool, Field(title="Completed", description="true or false")]
NAMES_DIFFER = "completed and is_completed differ: send one"


class TaskBody(schemas.Body):
    """A body about a task. Unknown fields are ignored, so nobody can set an owner or an id."""

    @model_validator(mode="before")
    @classmethod
    def read_either_name(cls, sent: Any) -> Any:
        """Takes `is_completed` for `completed`. Refuses values that differ: a client that sends a
        whole task back may have changed only one of the two."""
        if isinstance(sent, dict) and "is_completed" in sent:
            sent = {"completed": sent["is_completed"], **sent}
            if sent["completed"] != sent["is_completed"]:
                raise ValueError(NAMES_DIFFER)
        return sent


class Toggle(TaskBody):
    """A value to set `completed` to. Without one it is flipped."""

    completed: Completed = NOT_SENT


class TaskUpdate(TaskBody):
    """The fields to change."""

    title: Title = NOT_SENT
    description: Description = NOT_SENT
    completed: Completed = NOT_SENT


class TaskCreate(TaskBody):
    """A new task."""

    title: Title
    description: Description = None
    completed: Completed = Field(default_factory=bool)  # False, hidden from OpenAPI


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


# Errors. A problem has `detail` and `code` in its body.

task_not_found = partial(HTTPProblem, 404, "Task not found", "task_not_found")  # or another user's
malformed_id = partial(HTTPProblem, 404, "Task not found: ids are UUIDs", "task_not_found")
identity_mismatch = partial(HTTPProblem, 403, "User identity mismatch", reason="another's path")
account_gone = partial(Unauthorized, description="the account of this token has been deleted")
EXCEPTIONS: dict[type[Exception], Callable[[], HTTPProblem]] = {
    pgpipeline.Unavailable: partial(HTTPProblem, 503, "The database is not available",
        "unavailable", RETRY),
    pgpipeline.InvalidValue: partial(HTTPProblem, 422, "The database cannot store this",
        "invalid_value"),
    pgpipeline.UniqueViolation: partial(HTTPProblem, 409, "This exists already"),  # for new fields
    pgpipeline.ForeignKeyViolation: account_gone,
    pgpipeline.UnexpectedError: partial(HTTPProblem, 500, "Internal server error"),
}  # fmt: skip

NAMES = dict.fromkeys(["tasks", "todos", "task", "todo"], "tasks")  # lib/paths.py has more
CANONICAL = r"/tasks(?:/[0-9a-f-]{36}(?:/toggle|/complete)?)?"  # no aliases: not looked up

respond = problems.responder("todo", malformed_path=malformed_id, exceptions=EXCEPTIONS)
app = openapi.DocumentedAPI(
    title="Todo",
    version=VERSION,
    license_info={"name": "MIT", "identifier": "MIT"},
    description="Todos of many users. An error's `detail` is for people, `code` for programs.",
    tags={"accounts": "Users and tokens.", "tasks": "A user's tasks.", "service": "The service."},
    generate_unique_id_function=lambda r: r.name + ("_of_user" if "{user_id}" in r.path else ""),
    lifespan=startup.lifespan(db.start, db.stop),
    telemetry=telemetry(automatic=settings.fastapi_otel_auto_configure),
    middleware=[  # outermost first
        Middleware(middleware.RequestLog),  # an id, and a line in the log
        cors.cors(settings.cors_origins, "CORS_ORIGINS", respond),
        Middleware(middleware.ErrorResponses, respond=respond),  # an exception as JSON
        Middleware(CanonicalRequest, names=NAMES, canonical=CANONICAL),  # as its route
        Middleware(middleware.BodyLimit),  # 128 KiB in 10 seconds
        Middleware(PreparedRoutes),  # routing like FastAPI's, but faster
    ],
    exception_handlers=dict.fromkeys([HTTPException, RequestValidationError], respond),
)


# Tasks.

CurrentUser = Annotated[str, Depends(auth.current_user)]
Owner = Annotated[str, Path(alias="user_id")]  # the user that a path names
Flag = Annotated[bool | None, Query(description="true or false")]
Status = Annotated[Literal["all", "completed", "done", "pending", "active", "incomplete", "todo"],
    Query(description="all, completed, done, pending, active, incomplete or todo")]  # fmt: skip
STATUSES = {"all": None, "completed": True, "done": True}  # the others mean False
Endpoint = Callable[..., Awaitable[Response]]
Decorator = Callable[[Endpoint], Endpoint]


async def own_path(owner: Owner, user_id: CurrentUser) -> None:
    """Raises HTTPProblem(403) unless the path names the token's user, or `me`."""
    if owner not in (user_id, "me"):
        raise identity_mismatch()


async def completed_filter(
    completed: Flag = None, is_completed: Flag = None, status: Status = "all"
) -> bool | None:
    """The `completed` of the tasks to list, or None for any. A flag wins over `status`."""
    values = {completed, is_completed} - {None}
    if len(values) > 1:
        raise HTTPProblem(422, NAMES_DIFFER)
    return values.pop() if values else STATUSES.get(status, False)


def route(method: str, path: str, **options: Any) -> Decorator:
    """Registers a route at `path` and under /api/{user_id}. Both act for the token's user."""
    options |= {"methods": [method], "tags": ["tasks"]}
    errors = openapi.errors(task_not_found()) if "{task_id}" in path else {}
    of_user: Any = {"responses": errors | openapi.errors(identity_mismatch())}
    of_user["dependencies"] = [Depends(own_path)]

    def register(endpoint: Endpoint) -> Endpoint:
        app.add_api_route(path, endpoint, responses=errors, **options)
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
    stored = await db.insert_task(user_id, body.model_dump(), key, sent, outside=outside)
    if stored is None:
        raise HTTPProblem(422, "This Idempotency-Key came with another body before", "key_reused")
    task, is_replay = stored
    location = f"{client_path(request).removesuffix('/create')}/{task.id}"
    headers = {"ETag": task.etag, "Location": location}
    headers |= {"Idempotent-Replayed": "true"} if is_replay else {}
    return Response(task.json, 201, headers, "application/json")


@route("GET", "/tasks", response_model=list[Task])
async def list_tasks(
    request: Request,
    user_id: CurrentUser,
    conditions: IfConditions,
    completed: Annotated[bool | None, Depends(completed_filter)],
    limit: Limit = 1000,
    after: After = None,
    offset: Offset = None,
    page: PageNumber = None,
) -> Response:
    """List tasks, newest first. While more follow, `Link` leads to the next page.

    By `after`, each page costs the same.
    """
    skipped = (offset or 0) + ((page or 1) - 1) * limit
    found = await db.select_tasks(user_id, completed, after, skipped, limit)
    if found.is_cut and (offset, page) != (None, None):  # the next one would skip tasks
        text = "Over 1 MB: ask for a smaller limit, or page by after"
        raise HTTPProblem(422, text, "page_too_large")
    headers = {"Link": next_link(request, found.last_id)} if found.last_id else {}
    etag = f'"{hashlib.sha256(found.json).hexdigest()[:32]}"'
    return conditions.respond(found.json, etag, headers)


@route("GET", "/tasks/{task_id}", response_model=Task)
async def get_task(user_id: CurrentUser, task_id: UUID, conditions: IfConditions) -> Response:
    """Read a task."""
    task = await db.select_task(user_id, task_id)
    if task is None:
        raise task_not_found()
    return conditions.respond(task.json, task.etag, {})  # 200, 304 or 412


@route("PUT", "/tasks/{task_id}", response_model=Task)
@route("PATCH", "/tasks/{task_id}", response_model=Task, name="patch_task")
async def update_task(
    user_id: CurrentUser, task_id: UUID, body: TaskUpdate, conditions: IfConditions
) -> Response:
    """Change the fields sent, and no others."""
    changes = body.model_dump(exclude_unset=True)
    task = await db.update_task(user_id, task_id, changes, conditions.versions(db.SHAPE))
    if task is None:
        raise await refusal(user_id, task_id, conditions)
    return written(task)


@route("PATCH", "/tasks/{task_id}/complete", response_model=Task, name="complete_task")
@route("POST", "/tasks/{task_id}/complete", response_model=Task, name="complete_task_by_post")
@route("PATCH", "/tasks/{task_id}/toggle", response_model=Task)
@route("POST", "/tasks/{task_id}/toggle", response_model=Task, name="toggle_task_by_post")
async def toggle_task(
    user_id: CurrentUser, task_id: UUID, conditions: IfConditions, body: Toggle | None = None
) -> Response:
    """Flip `completed`, or set it to the value sent."""
    value = body.completed if body and body.model_fields_set else None
    task = await db.toggle_task(user_id, task_id, value, conditions.versions(db.SHAPE))
    if task is None:
        raise await refusal(user_id, task_id, conditions)
    return written(task)


@route("DELETE", "/tasks/{task_id}", response_model=dict[str, str])
async def delete_task(user_id: CurrentUser, task_id: UUID, conditions: IfConditions) -> Response:
    """Delete a task."""
    if not await db.delete_task(user_id, task_id, conditions.versions(db.SHAPE)):
        raise await refusal(user_id, task_id, conditions)
    return JSONResponse({"message": "Task deleted"})


def written(task: db.TaskJSON) -> Response:
    return Response(task.json, 200, {"ETag": task.etag}, "application/json")


async def refusal(user_id: str, task_id: UUID, conditions: Conditions) -> HTTPProblem:
    """Why a write found no row: 412 if If-Match or If-None-Match refused it, or else 404."""
    if conditions.versions(db.SHAPE) is not None and await db.select_task(user_id, task_id):
        return precondition_failed()
    return task_not_found()


# Accounts.

email_taken = partial(HTTPProblem, 409, "E-mail already registered", "email_taken")
wrong_login = partial(Unauthorized, code="wrong_credentials", detail="Wrong e-mail or password")
wrong_password = partial(Unauthorized, code="wrong_password", detail="Wrong current password")
no_account = partial(HTTPProblem, 404, "This user has no account here", "account_not_found")
too_many = HTTPProblem(429, "Too many attempts: try again in 9 seconds")  # for OpenAPI


def account_route(path: str, error: HTTPProblem, status: int = 200) -> Decorator:
    """Registers a route that gives a token, if ACCOUNTS is on."""
    options: Any = {"response_model": schemas.AccessToken, "tags": ["accounts"]}
    options |= {"status_code": status, "responses": openapi.errors(error, too_many)}
    return app.post(path, **options) if auth.ACCOUNTS else lambda endpoint: endpoint


def token_response(account: db.Account, status: int = 200) -> Response:
    token = {"access_token": auth.issue_token(account.id), "token_type": "bearer"}
    answer = token | {"expires_in": auth.TOKEN_LIFETIME, "user": json.loads(account.json)}
    return Response(json.dumps(answer), status, {"Cache-Control": "no-store"}, "application/json")


async def log_in(request: Request, email: str, password: str) -> Response:
    await auth.throttle(request, email)
    account = await db.select_account(email)
    # check() hashes without an account too, so the time does not tell whether there is one.
    matches = await auth.passwords.check(password, account and account.password_hash)
    if account is None or not matches:
        raise wrong_login()
    return token_response(account)


async def find_user(user_id: str) -> db.Account | None:
    """The user, or None for one of an outside issuer before the first task."""
    user = await db.select_user(user_id)
    if user is None and auth.is_account_id(user_id):
        raise account_gone()
    return user


async def confirm(request: Request, user_id: str, password: str) -> db.Account:
    """The account. Raises HTTPProblem unless the password is its own. Counts as a login."""
    user = await find_user(user_id)
    if user is None or user.email is None:
        raise no_account()
    await auth.throttle(request, user.email)
    if not await auth.passwords.check(password, user.password_hash):
        raise wrong_password()
    return user


@account_route("/auth/register", email_taken(), status=201)
async def register(request: Request, body: schemas.Registration) -> Response:
    """Make an account and get its token."""
    await auth.throttle(request, body.email)
    account = await db.insert_account(body.email, await auth.passwords.hash(body.password))
    if account is None:
        raise email_taken()
    return token_response(account, 201)


@account_route("/auth/login", wrong_login())
async def login(request: Request, body: schemas.Login) -> Response:
    """Get a token for an account."""
    return await log_in(request, body.email, body.password)


@account_route("/auth/token", wrong_login())
async def login_by_form(
    request: Request,
    username: Annotated[schemas.Email, Form()],
    password: Annotated[schemas.AnyPassword, Form()],
) -> Response:
    """Get a token by the form of OAuth2's password grant, as Swagger UI's Authorize does."""
    return await log_in(request, username, password)


@app.post("/auth/logout", tags=["accounts"])
async def logout() -> dict[str, str]:
    """End a session: the client forgets its token, which ends by itself."""
    return {"message": "Logged out"}


BY_PASSWORD: Any = {"status_code": 204, "tags": ["accounts"]}
BY_PASSWORD |= {"responses": openapi.errors(wrong_password(), no_account(), too_many)}


@app.put("/auth/password", **BY_PASSWORD)
async def change_password(
    request: Request, user_id: CurrentUser, body: schemas.PasswordChange
) -> Response:
    """Change the password. Tokens that were issued before stay good until they end."""
    account = await confirm(request, user_id, body.current_password)
    if not await db.update_password(account, await auth.passwords.hash(body.new_password)):
        raise wrong_password()  # changed or deleted meanwhile
    return Response(status_code=204)


@app.delete("/auth/me", **BY_PASSWORD)
async def delete_account(
    request: Request, user_id: CurrentUser, body: schemas.Confirmation
) -> Response:
    """Delete the account and all its tasks."""
    await confirm(request, user_id, body.password)
    await db.delete_user(user_id)
    return Response(status_code=204)


@app.get("/auth/me", response_model=schemas.User, tags=["accounts"])
async def me(user_id: CurrentUser) -> Response:
    """Read the user of this token."""
    user = await find_user(user_id)
    unknown = {"id": user_id, "email": None, "created_at": None}
    return Response(user.json if user else json.dumps(unknown), media_type="application/json")


# Health.


@app.get("/health", tags=["service"])
async def health() -> dict[str, str]:
    """Check that the process runs. Asking the database would keep Neon awake."""
    return {"status": "ok"}


@app.get("/health/ready", tags=["service"], responses=openapi.errors(HTTPProblem(503)))
async def ready() -> dict[str, str]:
    """Check that the database answers, or did in the last 5 seconds."""
    await db.ping()
    return {"status": "ready"}


@app.get("/", tags=["service"])
async def root(request: Request) -> dict[str, str]:
    """Name, version and documentation."""
    return {"name": "todo", "version": VERSION, "docs": request.scope["root_path"] + "/docs"}


pages.add_pages(app)  # last, as they are asked for least

if __name__ == "__main__":
    develop.run(  # makes what is not set
        "main:app",
        database=not db.settings.database_url,
        secret=not (auth.SECRET or auth.JWKS_URL),
        origins=not settings.cors_origins,
    )
else:  # A server imports this. A wrong setting ends the start before it serves anything.
    logs.configure()
    auth.check_settings()
    db.conninfo()
