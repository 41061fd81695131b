"""What `GET /` answers: JSON to programs, and a page that leads on to people with a browser."""

import json
from html import escape
from pathlib import Path
from string import Template

from fastapi import Request, Response

PAGE = Template(Path(__file__).with_suffix(".html").read_text())


def respond(request: Request, members: dict[str, str]) -> Response:
    """`name`, `version` and `docs` as JSON, or as a page where the request accepts text/html."""
    headers = {"Vary": "Accept"}
    if "text/html" not in request.headers.get("accept", ""):
        return Response(json.dumps(members), 200, headers, "application/json")
    shown = members | {"address": str(request.base_url)}  # of the client's Host: to be escaped
    page = PAGE.substitute({name: escape(value) for name, value in shown.items()})
    return Response(page, 200, headers, "text/html")
