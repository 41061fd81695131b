"""Completes FastAPI's OpenAPI document by errors and headers, when it is first asked for."""

from typing import Any

from fastapi import FastAPI

from lib import pages
from lib.problems import HTTPProblem, Problem

PROBLEM, SCHEMA = "application/problem+json", {"schema": {"$ref": "#/components/schemas/Problem"}}
# The errors of an operation that has all of these: a method, a key, the name of a parameter.
STATUSES: list[tuple[set[str], set[int]]] = [
    ({"requestBody"}, {400, 408, 413, 415, 422, 503}),
    ({"security"}, {401, 429, 503}),
    ({"limit"}, {422}),
    ({"If-Match"}, {412, 422}),
    ({"get", "If-None-Match"}, {304}),
    ({"Idempotency-Key"}, {400}),
]
# A header of an answer: what its operation has, the statuses (none: all), and what it says.
HEADERS: list[tuple[str, set[str], set[str], str]] = [
    ("ETag", {"If-None-Match"}, {"200", "304"}, "The version, for If-Match and If-None-Match."),
    ("ETag", {"Idempotency-Key"}, {"201"}, "The version, for If-Match and If-None-Match."),
    ("Link", {"limit"}, {"200"}, 'While more follow, `</path?query>; rel="next"`.'),
    ("Location", {"Idempotency-Key"}, {"201"}, "The path of what was stored."),
    ("WWW-Authenticate", set(), {"401"}, "What was wrong with the token (RFC 6750)."),
    ("Retry-After", set(), {"429", "503"}, "Seconds to wait."),
    ("X-Request-ID", set(), set(), "The request in the log: the id that came with it, or ours."),
]


class DocumentedAPI(FastAPI):
    """FastAPI with a completed document, and pages for it at /docs and /redoc."""

    def __init__(self, tags: dict[str, str], **options: Any) -> None:
        """`tags` have a description each. `options` are FastAPI's."""
        defaults: dict[str, Any] = {
            "openapi_tags": [{"name": name, "description": tags[name]} for name in tags],
            "responses": {"4XX": {"model": Problem}},  # puts it among the schemas
            "servers": [{"url": "/"}],
            "license_info": {"name": "MIT", "identifier": "MIT"},
            "docs_url": None,
            "redoc_url": None,
        }
        super().__init__(**defaults | options)
        pages.add_pages(self)

    def openapi(self) -> dict[str, Any]:
        return self.openapi_schema or complete(super().openapi())


def errors(*problems: HTTPProblem) -> dict[int | str, dict[str, Any]]:
    """What FastAPI's `responses` takes, with an example of each problem."""
    return {
        problem.status_code: {
            "description": problem.title,
            "content": {PROBLEM: {**SCHEMA, "example": problem.members("7f1d0c5e9b")}},
        }
        for problem in problems
    }


def complete(document: dict[str, Any]) -> dict[str, Any]:
    """Adds what FastAPI cannot know. No header gets a bound: some generators fail on it."""
    document["components"]["headers"] = {
        name: {"description": text, "schema": {"type": "string"}} for name, _, _, text in HEADERS
    }
    for item in document["paths"].values():
        for method, operation in item.items():
            names = {parameter["name"] for parameter in operation.get("parameters", ())}
            complete_operation(operation, {method} | operation.keys() | names)
    return document


def complete_operation(operation: dict[str, Any], has: set[str]) -> None:
    for content in operation.get("requestBody", {}).get("content", {}).values():
        # A body that may be left out: generators of clients fail on "or null" here.
        content["schema"] = content["schema"].get("anyOf", [content["schema"]])[0]
    operation.setdefault("security", [{}])  # says that anybody may call it
    answers = operation["responses"]
    for status in sorted({each for needed, more in STATUSES if needed <= has for each in more}):
        answers.setdefault(str(status), errors(HTTPProblem(status))[status])
    answers.get("304", {}).pop("content", None)  # RFC 9110 section 15.4.5
    for others in ("4XX", "5XX"):
        answers[others] = {"description": f"Any other {others}", "content": {PROBLEM: SCHEMA}}
    for status, answer in answers.items():
        names = [n for n, needed, on, _ in HEADERS if needed <= has and (not on or status in on)]
        answer["headers"] = {name: {"$ref": f"#/components/headers/{name}"} for name in names}
