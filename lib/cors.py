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

METHODS = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE"]
EXPOSED = [
    "Allow", "ETag", "Idempotent-Replayed", "Link", "Location", "RateLimit", "RateLimit-Policy",
    "Retry-After", "WWW-Authenticate", "X-Request-ID",
]  # fmt: skip
# A host, an IPv6 address, or a host with one * in its first label and more than a top-level domain.
HOST = r"[\w.-]+|\[[\da-f:.]+\]|[\w-]*\*[\w-]*\.(?:localhost|[\w-]+\.[\w.-]+)"
ORIGIN = re.compile(rf"[a-z][a-z\d+.-]*://(?:{HOST})(?::\d+)?", re.ASCII)


class CORS(CORSMiddleware):
    """Starlette's CORSMiddleware. A preflight that is refused gets a problem that says why."""

    def __init__(self, app: ASGIApp, setting: str, respond: Respond, options: Any) -> None:
        super().__init__(app, **options)
        self.setting, self.respond = setting, respond
        self.is_on = bool(options["allow_origins"] or options["allow_origin_regex"])

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers: Any = Headers(scope=scope) if scope.get("method") == "OPTIONS" else ()
        if "origin" in headers and "access-control-request-method" in headers:
            response = self.preflight_response(headers)
            if response.status_code != 200:
                problem = HTTPProblem(400, bytes(response.body).decode())
                if not self.is_allowed_origin(headers["origin"]):
                    text = f"{self.setting} does not have the origin of this page"
                    problem = HTTPProblem(400, text, "origin_not_allowed", reason=text)
                response = await self.respond(Request(scope), problem)
            return await response(scope, receive, send)
        if not self.is_on:  # it would take 20 us a request
            return await self.app(scope, receive, send)
        await super().__call__(scope, receive, send)


def cors(origins: str, setting: str, respond: Respond) -> Middleware:
    """CORS for origins separated by commas, like https://app.example.com or tauri://localhost.

    A * stands for one label or a part of it, as in https://*.example.com, or alone for any origin.
    Quotes and brackets, as in a list of JSON, are no part of an origin.
    Raises SystemExit for what no browser sends as an origin.
    """
    if origins.startswith("["):
        origins = origins[1:].removesuffix("]")
    listed = [each.strip(" \t\r\n\"'") for each in origins.split(",")]
    try:
        allowed = [normalize(each) for each in listed if each]
    except ValueError:
        example = "https://app.example.com or https://*.example.com"
        raise SystemExit(f"{setting} takes origins like {example}, no / at the end") from None
    wild = [re.escape(each) for each in allowed if "*" in each and each != "*"]
    options: dict[str, Any] = {"allow_origins": allowed, "allow_credentials": "*" not in allowed}
    options |= {"allow_methods": METHODS, "allow_headers": ["*"], "expose_headers": EXPOSED}
    options["allow_origin_regex"] = "|".join(wild).replace(r"\*", "[a-z0-9-]+") or None
    return Middleware(CORS, setting=setting, respond=respond, options=options)


def normalize(origin: str) -> str:
    """The origin as browsers send it: lower case, ASCII, no default port. Raises ValueError."""
    if origin == "*":
        return origin
    url = str(Url(origin)).removesuffix("/")  # by the URL standard of browsers; it adds the /
    if origin.endswith("/") or not ORIGIN.fullmatch(url):
        raise ValueError(origin)
    return url
