"""A Better Auth as its manual sets it up, as the issuer of tokens."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from httpx import Client

from conftest import SECRET, bearer, free_port, get, post, serving, wait_for_start

pytestmark = pytest.mark.slow


BETTER_AUTH = """
import { createServer } from "node:http";
import { betterAuth } from "better-auth";
import { memoryAdapter } from "better-auth/adapters/memory";
import { toNodeHandler } from "better-auth/node";
import { jwt } from "better-auth/plugins";

const [url, secret] = process.argv.slice(2);
const auth = betterAuth({
  baseURL: url,
  secret,
  database: memoryAdapter({ user: [], session: [], account: [], verification: [], jwks: [] }),
  emailAndPassword: { enabled: true },
  plugins: [jwt()],
});
createServer(toNodeHandler(auth)).listen(new URL(url).port, "127.0.0.1");
"""


@pytest.fixture
def better_auth(workshop: Path) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """Better Auth as its manual sets it up, at an address of its own."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    (workshop / "issuer.mjs").write_text(BETTER_AUTH)
    quiet = os.environ | {"BETTER_AUTH_TELEMETRY": "0"}
    with subprocess.Popen(["node", "issuer.mjs", url, SECRET], cwd=workshop, env=quiet) as process:
        wait_for_start(process, port)
        yield url, process
        process.kill()


def test_a_user_of_better_auth_is_a_user_here_also_while_better_auth_is_down(
    better_auth: tuple[str, subprocess.Popen[bytes]], database: str, tmp_path: Path
) -> None:
    url, process = better_auth
    with Client(base_url=url + "/api/auth", headers={"Origin": url}, verify=False) as browser:
        ann = {"name": "Ann", "email": "ann@example.com", "password": "correct horse"}
        user = browser.post("/sign-up/email", json=ann).raise_for_status().json()["user"]
        first, second = (bearer(browser.get("/token").json()["token"]) for _ in range(2))
    settings = {"JWT_JWKS_URL": url + "/api/auth/jwks", "JWT_ISSUER": url, "JWT_AUDIENCE": url}
    with serving(database, tmp_path / "log", JWT_SECRET="", **settings) as server:
        made = post(f"{server.url}/api/{user['id']}/tasks", json={"title": "x"}, headers=first)
        assert (made.status_code, made.json()["user_id"]) == (201, user["id"])
        assert get(server.url + "/auth/me", headers=first).json()["id"] == user["id"]
        process.kill()
        process.wait()
        for known in (first, second):  # the service has not seen the second before
            assert get(server.url + "/tasks", headers=known).json() == [made.json()]
