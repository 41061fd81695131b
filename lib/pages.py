"""What a browser shows: Swagger UI at /docs, ReDoc at /redoc, and a page at / that leads on.

FastAPI's own pages take scripts of a CDN, which see what is typed into Authorize, and are blank
without a network. They have a script within the page too, which a strict CSP forbids.
"""

import json
from html import escape
from pathlib import Path
from string import Template

import fastapi_standalone_docs
from fastapi import FastAPI, Request, Response
from fastapi.responses import FileResponse, HTMLResponse

HERE, PACKAGE = Path(__file__).parent, Path(fastapi_standalone_docs.__file__).parent / "static"
PAGES = {"/docs": HERE / "docs.html", "/redoc": HERE / "redoc.html"}
FILES = {
    "/docs/docs.js": HERE / "docs.js",
    "/docs/favicon.png": PACKAGE / "fastapi/favicon.png",
    "/docs/swagger-ui.css": PACKAGE / "swagger/swagger-ui.css",
    "/docs/swagger-ui-bundle.js": PACKAGE / "swagger/swagger-ui-bundle.js",
    "/docs/redoc.standalone.js": PACKAGE / "redoc/redoc.standalone.js",
}


def add_pages(app: FastAPI) -> None:
    """Adds /docs and /redoc to an app, which has to be made with docs_url=None, redoc_url=None."""

    async def respond(request: Request) -> Response:
        root = request.scope["root_path"]
        path = request.scope["path"].removeprefix(root)
        if path in FILES:
            return FileResponse(FILES[path])
        return page(PAGES[path], title=app.title, root=root)

    for path in PAGES | FILES:
        app.add_route(path, respond, include_in_schema=False)


def welcome(request: Request, members: dict[str, str]) -> Response:
    """`name`, `version` and `docs` as JSON, or as a page where the request accepts text/html."""
    response = Response(json.dumps(members), media_type="application/json")
    if "text/html" in request.headers.get("accept", ""):
        response = page(HERE / "welcome.html", **members, address=str(request.base_url))
    response.headers["Vary"] = "Accept"
    return response


def page(file: Path, **values: str) -> Response:
    """A file of HTML with values, escaped: a client can write any Host."""
    escaped = {name: escape(value) for name, value in values.items()}
    return HTMLResponse(Template(file.read_text()).substitute(escaped))
