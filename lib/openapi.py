"""Completes FastAPI's OpenAPI document by errors and headers, when it is first asked for."""

from typing import Any

from fastapi import FastAPI

from lib.problems import HTTPProblem, Problem

PROBLEM, SCHEMA = "application/problem+json", {"schema": {"$ref": "#/components/schemas/Problem"}}
# What an operation may answer, by a fact about it: what it has, and the parameters that it takes.
STATUSES = {
    "has requestBody": [400, 408, 413, 415, 422, 503],
    "has security": [401, 429, 503],
    "has query": [422],
    "takes If-Match": [412],
    "get takes If-None-Match": [304],
}
# A header of its answers, the fact ("" is one of all), the statuses (none: all), what it says. No
# bounds, because some generators of clients fail on them.
HEADERS: list[tuple[str, str, set[str], str]] = [
    ("ETag", "takes If-None-Match", {"200", "304"}, "The version, for If-Match."),
    ("ETag", "takes Idempotency-Key", {"201"}, "The version, for If-Match."),
    ("Link", "takes limit", {"200"}, 'While more follow, `</path?query>; rel="next"`.'),
    ("Location", "takes Idempotency-Key", {"201"}, "The path of what was stored."),
    ("WWW-Authenticate", "", {"401"}, "What was wrong with the token (RFC 6750)."),
    ("Retry-After", "", {"429", "503"}, "Seconds to wait."),
    ("X-Request-ID", "", set(), "The request in the log."),
]


class DocumentedAPI(FastAPI):
    """FastAPI with a completed document. `tags` have a description each. No pages: see pages.py."""

    def __init__(self, tags: dict[str, str], **options: Any) -> None:
        super().__init__(
            openapi_tags=[{"name": name, "description": text} for name, text in tags.items()],
            responses={"4XX": {"model": Problem}},  # puts it among the schemas
            servers=[{"url": "/"}],  # linters want one
            docs_url=None,
            redoc_url=None,
            **options,
        )

    def openapi(self) -> dict[str, Any]:
        """Adds what FastAPI cannot know, once: FastAPI keeps the document."""
        if not self.openapi_schema:
            for item in super().openapi()["paths"].values():
                for method, operation in item.items():
                    complete(method, operation)
        return super().openapi()


def errors(*problems: HTTPProblem) -> dict[int | str, dict[str, Any]]:
    """What FastAPI's `responses` takes, with an example of each problem."""
    return {
        problem.status_code: {
            "description": problem.title,
            "content": {PROBLEM: {**SCHEMA, "example": problem.members("7f1d0c5e9b")}},
        }
        for problem in problems
    }


def complete(method: str, operation: dict[str, Any]) -> None:
    """Adds the statuses and headers that STATUSES and HEADERS have for the operation's facts."""
    facts = {"", *(f"has {key}" for key in operation)}
    for each in operation.get("parameters", ()):
        name = each["name"]
        facts |= {f"has {each['in']}", f"takes {name}", f"{method} takes {name}"}
    for content in operation.get("requestBody", {}).get("content", {}).values():
        # A body that may be left out: generators of clients fail on "or null" here.
        kinds = [each for each in content["schema"].get("anyOf", ()) if each != {"type": "null"}]
        content["schema"] = kinds[0] if len(kinds) == 1 else content["schema"]
    operation.setdefault("security", [{}])  # linters want it
    answers = operation["responses"]
    for status in sorted({each for fact in facts for each in STATUSES.get(fact, ())}):
        answers.setdefault(str(status), errors(HTTPProblem(status))[status])
    answers.get("304", {}).pop("content", None)  # RFC 9110 section 15.4.5
    for others in ("4XX", "5XX"):
        answers[others] = {"description": f"Any other {others}", "content": {PROBLEM: SCHEMA}}
    for status, answer in answers.items():
        answer["headers"] = {
            name: {"description": text, "schema": {"type": "string"}}
            for name, fact, statuses, text in HEADERS
            if fact in facts and (not statuses or status in statuses)
        }
