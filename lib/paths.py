"""Middleware that gives each path one form before it is routed."""

import re

from starlette.types import ASGIApp, Receive, Scope, Send

from lib.state import state_of


class CanonicalPath:
    """Gives each path one form before it is routed, and routes HEAD as GET.

    A redirect can lose the Authorization. An alias is a pattern, what it becomes, and the type of
    the body where only that is meant.
    """

    def __init__(self, app: ASGIApp, aliases: list[tuple[str, str, bytes]], unless: str) -> None:
        self.app, self.unless = app, re.compile(unless)
        self.aliases = [(re.compile("^" + path), form, kind) for path, form, kind in aliases]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        path = scope["path"].rstrip("/") or "/"
        if not self.unless.fullmatch(path):
            sent = state_of(scope).headers.get(b"content-type", b"")
            for pattern, form, kind in self.aliases:
                path = pattern.sub(form, path) if sent.startswith(kind) else path
        scope["path"] = path
        if scope["method"] != "HEAD":
            return await self.app(scope, receive, send)
        routed = {**scope, "method": "GET"}  # uvicorn looks at the original and sends no body
        await self.app(routed, receive, send)
        scope["route"] = routed.get("route")
