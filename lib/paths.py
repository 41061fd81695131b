"""Middleware that gives each request the form of its route. What clients write instead of it:

/tasks             /todos or another name of the collection, /tasks/create, //tasks/
/tasks/{id}        /tasks/{id}/edit, /tasks/edit/{id}; update and delete like edit
/api/{user}/tasks  /users/{user}/tasks, /api/users/{user}/tasks
/auth/register     /auth/signup, /auth/create
/auth/login        /auth/signin, and /auth/token with JSON
/auth/token        /auth/login with a form
/auth/me           /auth/current_user, /me, /user/me, /users/me; the others in ALONE like me
GET, no query      HEAD, ?status=&limit=

Each with /api or /api/v1 before it too, such as /api/v1/todos, /api/auth/login and /api/health.
"""

import re
from collections.abc import Awaitable, Mapping
from urllib.parse import quote

from fastapi import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from lib.problems import HTTPProblem
from lib.state import state_of

# What clients call the routes of accounts, and which may stand without /auth.
ACCOUNTS = {"create": "register", "current_user": "me", "signin": "login", "signup": "register"}
ALONE = {"login", "logout", "me", "register", "signin", "signup", "token"}
PREFIX = re.compile(r"\A/(?:api/(?:v1/)?)?")
# A / that is data (RFC 3986 section 2.2), or a line break, before which a route's $ would match.
NOWHERE = re.compile(rb"%2f|%0a", re.IGNORECASE)
FORMS = (b"application/x-www-form-urlencoded", b"multipart/form-data")


class CanonicalRequest:
    """Never redirects, because a client may drop Authorization then. Raises HTTPProblem(404).

    `names`: what clients call a collection, and its name in routes. `canonical`: a pattern of paths
    that are like their routes already.
    """

    def __init__(self, app: ASGIApp, names: Mapping[str, str], canonical: str) -> None:
        self.app, self.names, self.canonical = app, names, re.compile(canonical)

    def __call__(self, scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:
        if scope["type"] != "http":
            return self.app(scope, receive, send)
        if NOWHERE.search(scope.get("raw_path") or b""):
            raise HTTPProblem(404)
        root = scope["root_path"] = scope.get("root_path", "").rstrip("/")
        path, state = scope["path"], state_of(scope)
        if root:
            path = below_root(path, root)
        state.path = root + path
        if not self.canonical.fullmatch(path):
            path = re.sub("/+", "/", path).rstrip("/") or "/"
            state.path = root + path
            path = routed_path(path, self.names)
            if path in ("/auth/login", "/auth/token"):  # by the body: clients mix up the two
                is_form = state.headers.get(b"content-type", b"").lower().startswith(FORMS)
                path = "/auth/token" if is_form else "/auth/login"
        scope["path"] = root + path
        if scope["query_string"]:  # a parameter without a value is as good as none
            parts = scope["query_string"].split(b"&")
            scope["query_string"] = b"&".join(part for part in parts if part.partition(b"=")[2])
        return (self.get if scope["method"] == "HEAD" else self.app)(scope, receive, send)

    async def get(self, scope: Scope, receive: Receive, send: Send) -> None:
        routed = {**scope, "method": "GET"}  # the server's own says HEAD, so it sends no body
        try:
            await self.app(routed, receive, send)
        finally:
            scope["route"] = routed.get("route")  # for the log


def below_root(path: str, root: str) -> str:
    """The path without the root path, which a proxy may have removed already."""
    return path[len(root) :] or "/" if f"{path}/".startswith(root + "/") else path


def routed_path(path: str, names: Mapping[str, str]) -> str:
    """The path in the form that a route has."""
    has_user = path.startswith(("/api/", "/users/"))
    match PREFIX.sub("", path).split("/"):
        # First, because a user may be called like the collection.
        case ["users", user, called, *rest] | [user, called, *rest] if has_user and called in names:
            parts = ["api", user, names[called], *without_verb(rest)]
        case [called, *rest] if called in names:
            parts = [names[called], *without_verb(rest)]
        case ["auth", called]:
            parts = ["auth", ACCOUNTS.get(called, called)]
        case [called] | ["user" | "users", called] if called in ALONE:
            parts = ["auth", ACCOUNTS.get(called, called)]
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
