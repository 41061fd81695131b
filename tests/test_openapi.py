"""The OpenAPI document: what linters say of it, clients made of it, and that it tells the truth."""

import json
import re
import uuid
from datetime import date, datetime
from pathlib import Path
from typing import Any

import pytest
from httpx import Client
from pydantic import ValidationError, create_model

from conftest import Server, Task, get, token
from lib.schemas import Body
from tests.node import Run

parametrize = pytest.mark.parametrize


@pytest.fixture(params=["server", "federated"])
def document(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The file with the document, once with accounts and once with tokens of an issuer only."""
    served = get(request.getfixturevalue(request.param).url + "/openapi.json")
    (tmp_path / "openapi.json").write_bytes(served.content)
    return "openapi.json"


@pytest.mark.slow
def test_redocly_has_nothing_to_say(run: Run, document: str) -> None:
    options = ["--extends", "recommended-strict", "--format", "json"]
    assert json.loads(run("redocly", "lint", *options, document))["problems"] == []


LEFT_OUT = {
    "info-contact": "a service does not know who runs it",
    "owasp:api2:2023-short-lived-access-tokens": "it wants refresh tokens, which there are not",
    "owasp:api4:2023-array-limit": "a bound that nothing holds breaks generated clients",
    "owasp:api4:2023-integer-format": "the bounds say it",
    "owasp:api4:2023-integer-limit": "a bound that nothing holds breaks generated clients",
    "owasp:api4:2023-rate-limit": "these headers come with a 429 and nothing else",
    "owasp:api4:2023-string-limit": "a bound that nothing holds breaks generated clients",
    "owasp:api9:2023-inventory-access": "it wants x-internal at the one server, the service itself",
    "owasp:api8:2023-define-cors-origin": "the header comes where a page of an origin asks",
}


@pytest.mark.slow
@parametrize(
    ("ruleset", "severity"),
    [("spectral:oas", "hint"), ("@stoplight/spectral-owasp-ruleset", "error")],
)
def test_spectral_has_nothing_to_say(
    run: Run, workshop: Path, document: str, ruleset: str, severity: str
) -> None:
    left = [rule for rule in LEFT_OUT if rule.startswith("owasp") == ("owasp" in ruleset)]
    rules = {"extends": [ruleset], "rules": dict.fromkeys(left, "off")}
    (workshop / "rules.yaml").write_text(json.dumps(rules))
    run("spectral", "lint", "--ruleset", "rules.yaml", "--fail-severity", severity, document)


ORVAL = """
export default {
  todo: { input: "openapi.json", output: { client: "zod", mode: "single", target: "zod.ts" } },
};
"""
VALIDATE = """
const client = await import("./zod.js");
const task = JSON.parse(process.argv[2]);
client.GetTaskResponse.parse(task);
console.log(client.GetTaskResponse.safeParse({ ...task, title: "" }).success);
"""


@pytest.mark.slow
def test_orval_makes_a_zod_client_that_takes_our_tasks(
    run: Run, workshop: Path, server: Server, task: Task
) -> None:
    (workshop / "openapi.json").write_bytes(get(server.url + "/openapi.json").content)
    (workshop / "package.json").write_text('{"type": "module"}')
    (workshop / "orval.config.mjs").write_text(ORVAL)
    (workshop / "validate.mjs").write_text(VALIDATE)
    run("orval", "--config", "orval.config.mjs")
    run("tsc", "--target", "es2022", "--module", "nodenext", "zod.ts")
    assert run("node", "validate.mjs", json.dumps(task)).strip() == "false"


TYPED_CLIENT = """
import createClient from "openapi-fetch";
import type { components, paths } from "./api.js";

declare const process: { argv: string[] };
const [baseUrl, token] = process.argv.slice(2);
const client = createClient<paths>({ baseUrl, headers: { Authorization: `Bearer ${token}` } });

const created = await client.POST("/tasks", { body: { title: "typed" } });
const task: components["schemas"]["Task"] = created.data!;
const path = { task_id: task.id };
const mine = { params: { path: { ...path, user_id: "me" } } };
const toggled = await client.PATCH("/api/{user_id}/tasks/{task_id}/toggle", mine);
const page = await client.GET("/tasks", { params: { query: { completed: true, limit: 5 } } });
const removed = await client.DELETE("/tasks/{task_id}", { params: { path } });
const missing = await client.GET("/tasks/{task_id}", { params: { path } });
const code: string = missing.error!.code;
const { status } = removed.response;
console.log(JSON.stringify([task.title, toggled.data!.completed, page.data!.length, status, code]));
"""


@pytest.mark.slow
def test_openapi_typescript_makes_a_client_that_compiles_and_works(
    run: Run, workshop: Path, server: Server
) -> None:
    run("openapi-typescript", server.url + "/openapi.json", "--output", "api.d.ts")
    (workshop / "package.json").write_text('{"type": "module"}')
    (workshop / "client.ts").write_text(TYPED_CLIENT)
    options = {"strict": True, "target": "es2022", "module": "nodenext", "types": []}
    (workshop / "tsconfig.json").write_text(
        json.dumps({"compilerOptions": options, "files": ["client.ts"]})
    )
    run("tsc")
    assert json.loads(run("node", "client.js", server.url, token(uuid.uuid4().hex))) == [
        "typed", True, 1, 200, "task_not_found"
    ]  # fmt: skip


def test_operation_ids_can_be_read_and_stay_what_they_are(server: Server) -> None:
    paths = get(server.url + "/openapi.json").json()["paths"]
    ids = {operation["operationId"] for item in paths.values() for operation in item.values()}
    words = ["create", "get", "update", "patch", "delete", "complete", "toggle"]
    of_tasks = {"list_tasks", *[word + "_task" for word in words]}
    of_tasks |= {"complete_task_by_post", "toggle_task_by_post"}
    of_users = {name + "_of_user" for name in of_tasks}
    others = {"register", "login", "login_by_form", "logout", "me", "health", "ready", "root"}
    others |= {"change_password", "delete_account"}
    assert ids >= of_tasks | of_users | others
    assert all(re.fullmatch(r"[a-z]\w+", each) for each in ids)  # of routes that a fork adds, too


def test_the_document_says_what_a_token_is_and_that_a_body_may_be_400(public: Client) -> None:
    document = public.get("/openapi.json").json()
    [scheme] = document["components"]["securitySchemes"].values()
    assert scheme["flows"]["password"]["tokenUrl"] == "auth/token"
    operations = [operation for item in document["paths"].values() for operation in item.values()]
    bodies = [operation for operation in operations if "requestBody" in operation]
    assert len(bodies) > 10
    assert all("400" in operation["responses"] for operation in bodies)


def test_nothing_is_bounded_that_the_service_does_not_bound(server: Server) -> None:
    components = get(server.url + "/openapi.json").json()["components"]
    assert "maxLength" not in components["schemas"]["Problem"]["properties"]["detail"]


@parametrize(
    ("kind", "taken", "refused"),
    [
        (int, 1, ["1", True]),
        (float | None, None, ["1", True]),
        (bool, False, [0, "no"]),
        (list[str], ["1"], [[1], "1"]),
        (date, "2027-01-31", [0, "0", 1.5, True]),
        (datetime | None, "2027-01-31T12:00:00Z", [0, 1e-5, "-1", "1.5"]),
    ],
)
def test_a_body_takes_only_values_of_the_types_that_openapi_says(
    kind: Any, taken: Any, refused: list[Any]
) -> None:
    model = create_model("Made", __base__=Body, value=kind)
    assert model.model_validate({"value": taken}).model_dump(mode="json") == {"value": taken}
    for each in refused:
        with pytest.raises(ValidationError):
            model.model_validate({"value": each})


@parametrize(
    ("status", "among"),
    [("422", "get /tasks"), ("503", "get /health/ready"), ("304", "get /tasks")],
)
def test_a_status_is_documented_where_it_can_come(server: Server, status: str, among: str) -> None:
    paths = get(server.url + "/openapi.json").json()["paths"]
    operations = {f"{m} {path}": each for path, item in paths.items() for m, each in item.items()}
    found = {name for name, each in operations.items() if status in each["responses"]}
    assert among in found
    assert status != "304" or all(name.startswith("get ") for name in found)


JSON = {"Content-Type": "application/json"}
STALE = {"If-Match": '"0"'}
REQUESTS: list[tuple[str, str, dict[str, Any], int]] = [
    ("GET", "/tasks", {}, 200),
    ("GET", "/tasks", {"params": {"limit": 1}}, 200),
    ("GET", "/tasks", {"headers": {"If-None-Match": "*"}}, 304),
    ("GET", "/tasks", {"params": {"limit": 0}}, 422),
    ("GET", "/tasks", {"headers": {"Authorization": ""}}, 401),
    ("POST", "/tasks", {"json": {"title": "x"}}, 201),
    ("POST", "/tasks", {"json": {"title": ""}}, 422),
    ("POST", "/tasks", {"content": "{", "headers": JSON}, 400),
    ("POST", "/tasks", {"content": "x"}, 415),
    ("POST", "/tasks", {"content": b"x" * 200_000}, 413),
    ("POST", "/tasks", {"json": {"title": "x"}, "headers": {"Idempotency-Key": "a b"}}, 400),
    ("GET", "/tasks/{task_id}", {}, 200),
    ("GET", "/tasks/{task_id}", {"headers": {"If-None-Match": "*"}}, 304),
    ("GET", "/api/{user_id}/tasks/{task_id}", {}, 403),
    ("PUT", "/tasks/{task_id}", {"json": {"title": "y"}, "headers": STALE}, 412),
    ("PATCH", "/tasks/{task_id}/complete", {}, 200),
    ("DELETE", "/tasks/{task_id}", {"headers": STALE}, 412),
    ("DELETE", "/tasks/{task_id}", {}, 200),
    ("GET", "/auth/me", {}, 200),
    ("POST", "/auth/login", {"json": {"email": "a@example.com", "password": "wrong"}}, 401),
    ("GET", "/health", {"content": b"x" * 200_000}, 413),
    ("GET", "/health/ready", {}, 200),
    ("GET", "/", {}, 200),
]


@parametrize(("method", "path", "request_", "status"), REQUESTS)
def test_every_answer_is_documented_with_its_type_and_headers(
    api: Client, task: Task, method: str, path: str, request_: Any, status: int
) -> None:
    api.post("/tasks", json={"title": "another, so that there is a next page"})
    concrete = path.format(task_id=task["id"], user_id="somebody")
    response = api.request(method, concrete, **request_)
    documented = api.get("/openapi.json").json()["paths"][path][method.lower()]["responses"]
    answer = documented.get(str(status)) or documented[f"{status // 100}XX"]
    kind = response.headers.get("content-type")
    unspoken = {"content-length", "content-type", "date", "vary", "connection", "cache-control"}
    assert response.status_code == status
    assert ([kind] if kind else []) == list(answer.get("content", {}))
    assert set(response.headers) - unspoken <= {name.lower() for name in answer["headers"]}
