"""Speaks OpenAPI: completes the document that FastAPI makes. Nothing here runs while a request is served.

FastAPI documents what a route takes and gives. It cannot know the problems that the edge, the token and the database
add, nor headers that are set on a Response: those follow here from what an operation takes.
"""

import re
from http import HTTPStatus
from typing import Any

MAX_TEXT = 4096  # characters, where nothing else is said

# What each word of an operation (a parameter, a tag, its id) makes it answer; a range stands for the rest.
CAUSES = {
    "requestBody": "400 408 413 415 422", "security": "401 429 503", "user_id": "403", "task_id": "404", "limit": "422",
    "If-None-Match": "304 422", "If-Match": "412 422", "Idempotency-Key": "400", "register": "409 429 503",
    "login": "401 429 503", "login_by_form": "401 429 503", "ready": "503", "responses": "4XX 5XX",
}  # fmt: skip
HEADERS = {  # the operations and answers that have each, and what it says
    "ETag": ("tasks", "200|201|304", "The version, for If-Match and If-None-Match."),
    "Link": ("limit", "200", '`<…>; rel="next"` while more tasks follow.'),
    "Location": ("create_task", "201", "The path of the task."),
    "Idempotent-Replayed": ("create_task", "201", "`true` when this key has stored the task before."),
    "WWW-Authenticate": ("responses", "401", "What was wrong with the token (RFC 6750)."),
    "Retry-After": ("responses", "429|503", "Seconds to wait."),
    "RateLimit-Policy": ("responses", "429", 'The limit: `"user";q=600;w=60`.'),
    "RateLimit": ("responses", "[24]", 'Only with a 429, seconds until the limit starts anew: `"user";r=0;t=30`.'),
    "Access-Control-Allow-Origin": ("responses", ".", "Where a page of an allowed origin asks: that origin."),
    "X-Request-ID": ("responses", ".", "The request in the log: the id that came with it, or one of ours."),
}
PROBLEM = {"application/problem+json": {"schema": {"$ref": "#/components/schemas/Problem"}}}
PHRASES = {  # as in RFC 9110, where Python 3.11 has older ones; and of a range
    "413": "Content Too Large",
    "422": "Unprocessable Content",
    "4XX": "Any other fault of the request",
    "5XX": "Any other fault of the service",
}
SAMPLES: dict[str, Any] = {  # of each field, for the examples
    "id": "019aa6b5-9d02-7a31-b0c4-5e8f7a6b1c2d", "user_id": "019aa6b5-5b1c-7cc8-8a53-3c1a6a4e9f10",
    "title": "Buy milk", "description": None, "completed": False, "is_completed": False,
    "created_at": "2026-11-21T13:15:00.123456+00:00", "updated_at": "2026-11-21T13:15:00.123456+00:00",
    "email": "ann@example.com", "username": "ann@example.com", "password": "correct horse",
    "access_token": "eyJhbGciOi…", "token_type": "bearer", "expires_in": 86400,
    "loc": ["body", "title"], "msg": "Field required", "type": "missing",
}  # fmt: skip
SAMPLES["user"] = {name: SAMPLES[name] for name in ("id", "email", "created_at")}
PROBLEM_SAMPLE = {"type": "about:blank", "title": "Not Found", "status": 404, "detail": "Task not found",
                  "code": "task_not_found", "request_id": "7f1d0c5e9b"}  # fmt: skip


def complete(document: dict[str, Any]) -> dict[str, Any]:
    """Adds to FastAPI's document the problems, headers, examples and sizes that it cannot know."""
    components = document["components"]
    for name, schema in components["schemas"].items():
        wanted = {field for field, form in schema["properties"].items() if "deprecated" not in form}
        wanted |= set(schema.get("required", ()))
        sample = {field: value for field, value in SAMPLES.items() if field in wanted}
        schema["examples"] = [PROBLEM_SAMPLE if name == "Problem" else sample]
    components["headers"] = {
        name: {"description": text, "schema": {"type": "string"}} for name, (_, _, text) in HEADERS.items()
    }
    for operation in [operation for item in document["paths"].values() for operation in item.values()]:
        operation["summary"] = operation.get("description", operation["summary"]).split(". ")[0].rstrip(".")
        words = {*operation, *operation["tags"], operation["operationId"].removesuffix("_of_user")}
        words |= {parameter["name"] for parameter in operation.get("parameters", [])}
        answers = operation["responses"]
        for status in sorted({status for word in CAUSES.keys() & words for status in CAUSES[word].split()}):
            phrase = PHRASES.get(status) or HTTPStatus(int(status)).phrase
            answers[status] = {"description": phrase, "content": PROBLEM} if status > "4" else {"description": phrase}
        for status, answer in answers.items():
            named = [name for name, (word, form, _) in HEADERS.items() if word in words and re.match(form, status)]
            answer["headers"] = {name: {"$ref": "#/components/headers/" + name} for name in named}
        operation |= {"responses": dict(sorted(answers.items())), "security": operation.get("security", [{}])}
    bound(document)
    return document


def bound(part: Any) -> None:
    """Says how large each string, number and array can become where the schema does not."""
    if isinstance(part, dict) and isinstance(part.get("type"), str):
        length = {"uuid": 36, "date-time": 32}.get(part.get("format", ""), MAX_TEXT)
        number = {"format": "int32", "minimum": 0, "maximum": 2**31 - 1}
        sizes: dict[str, Any] = {"string": {"maxLength": length}, "integer": number, "array": {"maxItems": 1000}}
        part |= sizes.get(part["type"], {}) | part
    for inner in part.values() if isinstance(part, dict) else part if isinstance(part, list) else ():
        bound(inner)
