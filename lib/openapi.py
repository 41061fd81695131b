"""Completes FastAPI's OpenAPI document by errors, when it is first asked for."""

from typing import Any

from fastapi import FastAPI

from lib.problems import HTTPProblem, Problem

PROBLEM, SCHEMA = "application/problem+json", {"schema": {"$ref": "#/components/schemas/Problem"}}
# What an operation may answer that has all of these facts: its method, a key, a parameter.
STATUSES: list[tuple[set[str], set[int]]] = [
    ({"key:requestBody"}, {400, 422}),
    ({"key:security"}, {401, 429}),
    ({"method:get", "param:If-None-Match"}, {304}),
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
    """Adds what FastAPI cannot know."""
    for item in document["paths"].values():
        for method, operation in item.items():
            facts = {f"method:{method}"} | {f"key:{key}" for key in operation}
            facts |= {f"param:{each['name']}" for each in operation.get("parameters", ())}
            complete_operation(operation, facts)
    return document


def complete_operation(operation: dict[str, Any], facts: set[str]) -> None:
    for content in operation.get("requestBody", {}).get("content", {}).values():
        # A body that may be left out: generators of clients fail on "or null" here.
        kinds = [each for each in content["schema"].get("anyOf", ()) if each != {"type": "null"}]
        content["schema"] = kinds[0] if len(kinds) == 1 else content["schema"]
    operation.setdefault("security", [{}])  # linters want it
    answers = operation["responses"]
    for status in sorted({each for needed, more in STATUSES if needed <= facts for each in more}):
        answers.setdefault(str(status), errors(HTTPProblem(status))[status])
    answers.get("304", {}).pop("content", None)  # RFC 9110 section 15.4.5
    for others in ("4XX", "5XX"):
        answers[others] = {"description": f"Any other {others}", "content": {PROBLEM: SCHEMA}}
    if "429" in answers:  # linters want it
        answers["429"]["headers"] = {"Retry-After": {"schema": {"type": "string"}}}
