"""CORS: which web pages may call the service from a browser."""

import re
from typing import Any

from fastapi import Request
from pydantic_core import Url
from starlette.datastructures import Headers
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Receive, Scope, Send

from lib.problems import HTTPProblem, Respond

EXPOSED = [
    "Allow", "ETag", "Idempotent-Replayed", "Link", "Location", "RateLimit", "RateLimit-Policy",
    "Retry-After", "WWW-Authenticate", "X-Request-ID",
]  # fmt: skip
# A host, an IPv6 address, or a host with one * in its first label and more than a top-level domain.
HOST = r"[\w.-]+|\[[\da-f:.]+\]|[\w-]*\*[\w-]*\.(?:localhost|[\w-]+\.[\w.-]+)"
ORIGIN = re.compile(rf"[a-z][a-z\d+.-]*://(?:{HOST})(?::\d+)?", re.ASCII)


class CORS(CORSMiddleware):
    """Starlette's CORSMiddleware. A refused preflight gets a problem that says why."""

    def __init__(self, app: ASGIApp, allowed: list[str], setting: str, respond: Respond) -> None:
        wild = [re.escape(each) for each in allowed if "*" in each and each != "*"]
        super().__init__(
            app,
            allow_origins=allowed,
            allow_origin_regex="|".join(wild).replace(r"\*", "[a-z0-9-]+") or None,
            allow_credentials="*" not in allowed,
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=EXPOSED,
        )
        self.setting, self.respond = setting, respond

    def __call__(self, scope: Scope, receive: Receive, send: Send) -> Any:
        adds_nothing = not self.allow_origins and scope.get("method") != "OPTIONS"  # saves 20 us
        return (self.app if adds_nothing else self.with_cors)(scope, receive, send)

    async def with_cors(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers: Any = Headers(scope=scope) if scope.get("method") == "OPTIONS" else {}
        if not ("origin" in headers and "access-control-request-method" in headers):
            return await super().__call__(scope, receive, send)
        response = self.preflight_response(headers)
        if response.status_code == 400:
            text, code = bytes(response.body).decode(), "preflight_refused"
            if not self.is_allowed_origin(headers["origin"]):
                text = f"{self.setting} does not have the origin of this page"
                code = "origin_not_allowed"
            vary = {"Vary": response.headers["Vary"]}
            problem = HTTPProblem(400, text, code, headers=vary, reason=text)
            response = await self.respond(Request(scope), problem)
        await response(scope, receive, send)


def cors(origins: str, setting: str, respond: Respond) -> Middleware:
    """CORS for origins separated by commas, like https://app.example.com or tauri://localhost.

    A * stands for one label or a part of it, as in https://*.example.com, or alone for any origin.
    Not checked: whether others may take names there, as in *.vercel.app.
    Raises SystemExit for what no browser sends as an origin.
    """
    try:
        allowed = [as_sent(each.strip()) for each in origins.split(",") if each.strip()]
    except ValueError:
        example = "https://app.example.com or https://*.example.com"
        raise SystemExit(f"{setting} takes origins like {example}, no / at the end") from None
    return Middleware(CORS, allowed, setting, respond)


def as_sent(origin: str) -> str:
    """The origin as browsers send it: lower case, ASCII, no default port. Raises ValueError."""
    if origin == "*":
        return origin
    url = str(Url(origin)).removesuffix("/")  # by the URL standard of browsers; it adds the /
    if origin.endswith("/") or not ORIGIN.fullmatch(url):
        raise ValueError(origin)
    return url
