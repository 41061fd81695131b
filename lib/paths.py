"""Middleware that gives each path one form before it is routed."""

import re
from urllib.parse import quote

from fastapi import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from lib.problems import HTTPProblem
from lib.state import state_of


class CanonicalPath:
    """Never redirects, because a client may drop the Authorization header then. HEAD becomes GET.

    `aliases` are patterns at the start of a path and what they become, each applied to the result
    of the one before. `by_type` has, for a path and the media type of a body, the path that takes
    it. A path of the form `unless` has no alias. Raises HTTPProblem(404).
    """

    def __init__(
        self,
        app: ASGIApp,
        aliases: list[tuple[str, str]],
        by_type: dict[tuple[str, bytes], str],
        unless: str,
    ) -> None:
        self.app, self.by_type, self.unless = app, by_type, re.compile(unless)
        self.aliases = [(re.compile("^" + pattern), form) for pattern, form in aliases]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
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
            for pattern, form in self.aliases:
                path = pattern.sub(form, path)
            kind = state.headers.get(b"content-type", b"").partition(b";")[0].strip().lower()
            path = self.by_type.get((path, kind), path)
        scope["path"] = root + path
        if scope["query_string"]:  # a parameter without a value is as good as none
            parts = scope["query_string"].split(b"&")
            scope["query_string"] = b"&".join(part for part in parts if part.partition(b"=")[2])
        if scope["method"] != "HEAD":
            return await self.app(scope, receive, send)
        routed = {**scope, "method": "GET"}  # uvicorn looks at the original and sends no body
        try:
            await self.app(routed, receive, send)
        finally:
            scope["route"] = routed.get("route")  # for the log


def client_path(request: Request) -> str:
    """The path by which the client came, with the root path, quoted for Location and Link."""
    return quote(state_of(request.scope).path)


def aliases_of(name: str, *others: str) -> list[tuple[str, str]]:
    """Other paths by which clients call a collection `/name`, and a user's `/api/{user}/name`.

    It may be below /api or /api/v1 or /users/{user}, and be called by one of the `others`.
    """
    names = "|".join([name, *others])
    return [
        (r"/api/v1/", "/api/"),
        (rf"/api/(?=(?:{names}|auth|users|health)(?:/|$))", "/"),
        (rf"/users/([^/]+)/(?:{names})(?=/|$)", rf"/api/\1/{name}"),
        (rf"/(api/[^/]+/)?(?:{names})(?=/|$)", rf"/\1{name}"),
        (rf"/((?:api/[^/]+/)?{name})/create$", r"/\1"),
        (rf"/((?:api/[^/]+/)?{name}/[^/]+)/(?:edit|update|delete)$", r"/\1"),
        (rf"/((?:api/[^/]+/)?{name}/)(?:edit|update|delete)/(?=[^/]+$)", r"/\1"),
    ]


# Other paths of accounts. A login is JSON at /auth/login and a form at /auth/token: a client that
# mixes them up gets what it meant.
ACCOUNT_ALIASES = [
    (r"(?:/api)?(?:/users?)?/(login|logout|me|register|signin|signup|token)$", r"/auth/\1"),
    (r"/auth/current_user$", "/auth/me"),
    (r"/auth/(?:signup|create)$", "/auth/register"),
    (r"/auth/signin$", "/auth/login"),
]
LOGIN_BY_TYPE = {
    ("/auth/token", b"application/json"): "/auth/login",
    ("/auth/login", b"application/x-www-form-urlencoded"): "/auth/token",
    ("/auth/login", b"multipart/form-data"): "/auth/token",
}
