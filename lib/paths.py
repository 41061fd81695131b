"""Middleware that gives each path its route's form. Clients write, for example:

/api/v1/…                                     for /api/…
/api/tasks, /api/auth/…, /api/health          for /tasks, /auth/…, /health
/users/{user}/tasks, /api/users/{user}/tasks  for /api/{user}/tasks
/todos, or another name of the collection     for /tasks
/tasks/create                                 for /tasks
/tasks/{id}/edit, /tasks/edit/{id}            for /tasks/{id}; update and delete like edit
/auth/signup, /auth/create                    for /auth/register
/auth/signin, /auth/current_user              for /auth/login, /auth/me
/login, /user/login, /users/login             for /auth/login; the other accounts' paths too
"""

import re
from collections.abc import Awaitable, Mapping
from urllib.parse import quote

from fastapi import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from lib.problems import HTTPProblem
from lib.state import state_of

# The last part of an account's path, and its name in the routes.
ACCOUNTS = {"create": "register", "current_user": "me", "login": "login", "logout": "logout",
    "me": "me", "register": "register", "signin": "login", "signup": "register", "token": "token",
}  # fmt: skip
PREFIX = re.compile(r"\A/(?:api/(?:v1/)?)?")
# A / that is data (RFC 3986 section 2.2), or a line break, before which a route's $ would match.
NOWHERE = re.compile(rb"%2f|%0a", re.IGNORECASE)
FORMS = (b"application/x-www-form-urlencoded", b"multipart/form-data")


class CanonicalPath:
    """Never redirects, because a client may drop the Authorization header then. HEAD becomes GET.

    `names` are what clients call a collection, and its name in the routes. A path of the form
    `unless` has no other. Raises HTTPProblem(404).
    """

    def __init__(self, app: ASGIApp, names: Mapping[str, str], unless: str) -> None:
        self.app, self.names, self.unless = app, names, re.compile(unless)

    def __call__(self, scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:
        if scope["type"] != "http":
            return self.app(scope, receive, send)
        root = scope["root_path"] = scope["root_path"].rstrip("/")
        path, state = scope["path"], state_of(scope)
        if root and path.startswith(root + "/"):  # a proxy may have removed it
            path = path[len(root) :]
        if NOWHERE.search(scope.get("raw_path", b"")):
            raise HTTPProblem(404)
        state.path = root + path
        if not self.unless.fullmatch(path):
            path = re.sub("/+", "/", path).rstrip("/") or "/"
            state.path = root + path
            path = canonical(path, self.names)
            if path in ("/auth/login", "/auth/token"):  # by the body: clients mix up the two
                is_form = state.headers.get(b"content-type", b"").lower().startswith(FORMS)
                path = "/auth/token" if is_form else "/auth/login"
        scope["path"] = root + path
        if scope["query_string"]:  # a parameter without a value is as good as none
            parts = scope["query_string"].split(b"&")
            scope["query_string"] = b"&".join(part for part in parts if part.partition(b"=")[2])
        return (self.get if scope["method"] == "HEAD" else self.app)(scope, receive, send)

    async def get(self, scope: Scope, receive: Receive, send: Send) -> None:
        routed = {**scope, "method": "GET"}  # uvicorn looks at the original and sends no body
        try:
            await self.app(routed, receive, send)
        finally:
            scope["route"] = routed.get("route")  # for the log


def canonical(path: str, names: Mapping[str, str]) -> str:
    """The path in the form that a route has."""
    has_user = path.startswith(("/api/", "/users/"))
    match PREFIX.sub("", path).split("/"):
        case [called, *rest] if called in names:
            parts = [names[called], *without_verb(rest)]
        case ["users", user, called, *rest] | [user, called, *rest] if has_user and called in names:
            parts = ["api", user, names[called], *without_verb(rest)]
        case ["auth", called]:
            parts = ["auth", ACCOUNTS.get(called, called)]
        case [called] | ["user" | "users", called] if called in ACCOUNTS:
            parts = ["auth", ACCOUNTS[called]]
        case ["health", *rest]:
            parts = ["health", *rest]
        case _:
            return path
    return "/" + "/".join(parts)


def without_verb(parts: list[str]) -> list[str]:
    """What follows a collection: `create` and verbs beside an id go."""
    match parts:
        case ["create"]:
            return []
        case [one, "edit" | "update" | "delete"] | ["edit" | "update" | "delete", one]:
            return [one]
    return parts


def client_path(request: Request) -> str:
    """The path by which the client came, with the root path, quoted for Location and Link."""
    return quote(state_of(request.scope).path)
