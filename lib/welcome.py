"""What `GET /` answers: JSON to programs, and a page that leads on to people with a browser."""

import json
from html import escape

from fastapi import Request, Response

PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>NAME</title>
<style>
body { font: 1rem/1.5 system-ui, sans-serif; max-width: 42rem; margin: 3rem auto; padding: 0 1rem }
pre { background: #8881; border-radius: .4rem; padding: 1rem; white-space: pre-wrap }
:root { color-scheme: light dark; overflow-wrap: anywhere }
</style>
<h1>NAME</h1>
<p>It runs, in version VERSION. <a href="DOCS">Its documentation</a> has every request, and a form
to try each: make an account there, then press Authorize.</p>
<p>Or from a terminal:</p>
<pre>curl ADDRESSauth/register -H 'Content-Type: application/json' \\
  -d '{"email": "me@example.com", "password": "correct horse"}'</pre>
<p>It answers with an <code>access_token</code>. Send that along:</p>
<pre>curl ADDRESStasks -H 'Authorization: Bearer …' \\
  -H 'Content-Type: application/json' -d '{"title": "Buy milk"}'</pre>
</html>
"""


def respond(request: Request, members: dict[str, str]) -> Response:
    """The members as JSON, or as a page where the request accepts text/html."""
    headers = {"Vary": "Accept"}
    if "text/html" not in request.headers.get("accept", ""):
        return Response(json.dumps(members), 200, headers, "application/json")
    page = PAGE.replace("ADDRESS", escape(str(request.base_url)))
    for name, value in members.items():
        page = page.replace(name.upper(), escape(value))
    return Response(page, 200, headers, "text/html")
