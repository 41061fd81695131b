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
        if b"%2f" in scope.get("raw_path", b"").lower():  # it is no slash (RFC 3986 section 2.2)
            raise HTTPProblem(404)
        state.path = root + path
        if not self.unless.fullmatch(path):
            path = re.sub("/+", "/", path).rstrip("/") or "/"
            if path.endswith("\n"):  # a route's $ would match before it
                raise HTTPProblem(404)
            state.path = root + path
            path = "/" + "/".join(canonical(path[1:].split("/"), self.names))
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


def canonical(parts: list[str], names: Mapping[str, str]) -> list[str]:
    """What stands between the slashes of a path, in the form that a route has."""
    if parts[:2] == ["api", "v1"]:
        parts = ["api", *parts[2:]]
    if parts[0] == "api" and parts[1:2] and parts[1] in {*names, "auth", "health", "users"}:
        parts = parts[1:]
    match parts:
        case ["api" | "users", user, called, *rest] if called in names:
            return ["api", user, names[called], *without_verb(rest)]
        case [called, *rest] if called in names:
            return [names[called], *without_verb(rest)]
        case ["auth", called]:
            return ["auth", ACCOUNTS.get(called, called)]
        case [called] | ["api" | "user" | "users", called] | ["api", "user", called]:
            return ["auth", ACCOUNTS[called]] if called in ACCOUNTS else parts
    return parts


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
