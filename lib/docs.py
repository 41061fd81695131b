"""Swagger UI at /docs and ReDoc at /redoc, from files that the service has itself.

FastAPI's own pages take scripts of a CDN, which see what is typed into Authorize, and are blank
without a network. They have a script within the page too, which a strict CSP forbids.
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
    "docs.js": HERE / "docs.js",
    "favicon.png": PACKAGE / "fastapi" / "favicon.png",
    "swagger-ui.css": PACKAGE / "swagger" / "swagger-ui.css",
    "swagger-ui-bundle.js": PACKAGE / "swagger" / "swagger-ui-bundle.js",
    "redoc.standalone.js": PACKAGE / "redoc" / "redoc.standalone.js",
}


def add_pages(app: FastAPI) -> None:
    """Adds the pages to an app, which has to be made with docs_url=None and redoc_url=None."""

    def add_page(path: str, template: Template) -> None:
        async def page(request: Request) -> Response:
            root = escape(request.scope["root_path"])
            return HTMLResponse(template.substitute(title=escape(app.title), root=root))

        app.add_route(path, page, include_in_schema=False)

    def add_file(path: str, file: Path) -> None:
        async def content(request: Request) -> Response:
            return FileResponse(file)

        app.add_route(path, content, include_in_schema=False)

    for path, file in PAGES.items():
        add_page(path, Template(file.read_text()))
    for name, file in FILES.items():
        add_file("/docs/" + name, file)
