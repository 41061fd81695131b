"""The OpenAPI document for people: Swagger UI at /docs, and ReDoc at /redoc.

FastAPI's own need a CDN, which sees what is typed into Authorize, and a lax CSP.
"""

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
        page = Template(PAGES[path].read_text())
        return HTMLResponse(page.substitute(title=escape(app.title), root=escape(root)))

    for path in PAGES | FILES:
        app.add_route(path, respond, include_in_schema=False)
