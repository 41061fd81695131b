"""Completes FastAPI's OpenAPI document. Nothing here runs while a request is served."""

from typing import Any

from fastapi import FastAPI

from lib.problems import HTTPProblem

PROBLEM, SCHEMA = "application/problem+json", {"schema": {"$ref": "#/components/schemas/Problem"}}
# What each part of an operation (its body, its security, a parameter) makes it answer.
CAUSES = {
    "requestBody": (400, 408, 413, 415, 422, 503),
    "security": (401, 429, 503),
    "limit": (422,),
    "If-Match": (412, 422),
    "If-None-Match": (304, 412, 422),
    "Idempotency-Key": (400,),
}
# A header, the part of an operation that causes it ("responses" is in each), and the statuses.
HEADERS = [
    ("ETag", "If-Match", "200 304", "The version, for If-Match and If-None-Match."),
    ("ETag", "Idempotency-Key", "201", "The version, for If-Match and If-None-Match."),
    ("Link", "limit", "200", '`<…>; rel="next"` while more follow.'),
    ("Location", "Idempotency-Key", "201", "The path of what was stored."),
    ("Idempotent-Replayed", "Idempotency-Key", "201", "`true` when the key had stored it before."),
    ("WWW-Authenticate", "responses", "401", "What was wrong with the token (RFC 6750)."),
    ("Retry-After", "responses", "429 503", "Seconds to wait."),
    ("RateLimit-Policy", "responses", "429", 'The limit: `"user";q=600;w=60`.'),
    ("RateLimit", "responses", "429", 'Seconds until the limit starts anew: `"user";r=0;t=30`.'),
    ("Access-Control-Allow-Origin", "responses", "", "An allowed origin, when its page asks."),
    ("X-Request-ID", "responses", "", "The request in the log: the id that came with it, or ours."),
]
# By format or type: a sample, and the bounds of a value where its schema gives none.
KINDS: dict[str, tuple[Any, dict[str, Any]]] = {
    "uuid": ("019aa6b5-9d02-7a31-b0c4-5e8f7a6b1c2d", {"maxLength": 36}),
    "date-time": ("2026-11-21T13:15:00.123456+00:00", {"maxLength": 32}),
    "boolean": (False, {}),
    "integer": (0, {"format": "int32", "minimum": 0, "maximum": 2**31 - 1}),
    "array": ([], {"maxItems": 1000}),
    "string": ("string", {"maxLength": 4096}),
}


class DocumentedAPI(FastAPI):
    """FastAPI with a completed document. `tags` have their order in it, and a description."""

    def __init__(self, tags: dict[str, str], **options: Any) -> None:
        self.tags = list(tags)
        options["openapi_tags"] = [{"name": each, "description": tags[each]} for each in tags]
        options["contact"] = {"name": "Whoever runs this service"}
        options["license_info"] = {"name": "MIT", "identifier": "MIT"}
        super().__init__(servers=[{"url": "/", "x-internal": False}], **options)

    def openapi(self) -> dict[str, Any]:
        return self.openapi_schema or complete(super().openapi(), self.tags)


def errors(*problems: HTTPProblem) -> dict[int | str, dict[str, Any]]:
    """What FastAPI's `responses` takes, with an example of each problem."""
    return {
        problem.status_code: {
            "description": problem.title,
            "content": {PROBLEM: {**SCHEMA, "example": problem.members("7f1d0c5e9b")}},
        }
        for problem in problems
    }


def complete(document: dict[str, Any], tags: list[str]) -> dict[str, Any]:
    """Adds errors, headers, examples and bounds, and orders the paths by `tags` and name."""
    schemas = document["components"]["schemas"]
    for schema in schemas.values():
        schema["examples"] = [example_of(schema, schemas)]
    document["components"]["headers"] = {
        name: {"description": text, "schema": {"type": "string"}} for name, _, _, text in HEADERS
    }
    paths, places = document["paths"], {}
    for path, item in paths.items():
        for operation in item.values():
            complete_operation(operation)
            places[path] = (tags.index(operation["tags"][0]), path)
    document["paths"] = {path: paths[path] for _, path in sorted(places.values())}
    bound(document)
    return document


def complete_operation(operation: dict[str, Any]) -> None:
    for content in operation.get("requestBody", {}).get("content", {}).values():
        content["schema"] = content["schema"].get("anyOf", [content["schema"]])[0]
    parts = {*operation, *[parameter["name"] for parameter in operation.get("parameters", [])]}
    answers = operation["responses"]
    for status in sorted({status for part in CAUSES.keys() & parts for status in CAUSES[part]}):
        answer = errors(HTTPProblem(status))[status]
        if status < 400:
            del answer["content"]
        answers.setdefault(str(status), answer)
    for other in ("4XX", "5XX"):
        answers[other] = {"description": f"Any other {other}", "content": {PROBLEM: SCHEMA}}
    for status, answer in answers.items():
        answer["headers"] = {
            name: {"$ref": f"#/components/headers/{name}"}
            for name, part, statuses, _ in HEADERS
            if part in parts and (status in statuses.split() or not statuses)
        }
    operation.setdefault("security", [{}])


def example_of(schema: dict[str, Any], schemas: dict[str, Any]) -> Any:
    """The first example of a schema, or an object of what is required or has an example."""
    schema = schema if "examples" in schema else schema.get("anyOf", [schema])[0]
    if "$ref" in schema:
        schema = schemas[schema["$ref"].rpartition("/")[2]]
    if "properties" in schema:
        return {
            name: example_of(part, schemas)
            for name, part in schema["properties"].items()
            if name in schema.get("required", ()) or "examples" in part
        }
    kind = schema.get("format") or schema.get("type", "")
    return schema.get("const") or schema.get("examples", KINDS.get(kind, [None]))[0]


def bound(part: Any) -> None:
    """Says how large each string, number and array can become where the schema does not."""
    if isinstance(part, dict):
        kind = part.get("format", part.get("type"))
        part |= KINDS.get(kind, (None, {}))[1] | part if isinstance(kind, str) else {}
        part = list(part.values())
    for each in part if isinstance(part, list) else ():
        bound(each)
