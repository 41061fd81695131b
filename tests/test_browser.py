"""Swagger UI and ReDoc in a browser without a network, under the strictest CSP that they bear."""

import shutil
from pathlib import Path

import pytest
from httpx import Client

from conftest import Account, Server
from tests.node import Run

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome") or ""
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not CHROMIUM, reason="chromium is not installed"),
]
OPEN = """
import { chromium } from "playwright-core";

const [path, csp, executablePath, url, email, password] = process.argv.slice(2);
const args = ["--no-sandbox", "--disable-background-networking"];
const browser = await chromium.launch({ executablePath, args });
const page = await browser.newPage({ viewport: { width: 1200, height: 1000 } });
const elsewhere = [];
page.on("pageerror", (error) => elsewhere.push(String(error)));
await page.route("**", async (route) => {
  if (!route.request().url().startsWith(url)) {
    elsewhere.push(route.request().url());
    return route.abort();
  }
  const response = await route.fetch();
  const headers = { ...response.headers(), "content-security-policy": csp };
  await route.fulfill({ response, headers });
});
await page.goto(url + path);
"""
AUTHORIZE = """
await page.click("button.authorize");
await page.fill("#oauth_username, input[name=username]", email);
await page.fill("#oauth_password, input[name=password]", password);
await page.click(".auth-container button.authorize");
await page.waitForSelector(".auth-container button:has-text('Logout')");
await page.click("button.btn-done");
await page.click("#operations-accounts-me .opblock-summary-control");
await page.click("#operations-accounts-me .try-out__btn");
await page.click("#operations-accounts-me .execute");
const answer = page.locator("#operations-accounts-me .live-responses-table .response");
await answer.waitFor();
console.log(await answer.innerText());
"""
READ = """
await page.getByText("Store a task").first().waitFor();
"""
CLOSE = """
console.log("elsewhere:", JSON.stringify(elsewhere));
await browser.close();
"""


def play(run: Run, folder: Path, script: str, *arguments: str) -> str:
    (folder / "page.mjs").write_text(OPEN + script + CLOSE)
    return run("node", "page.mjs", *arguments)


def test_swagger_uis_authorize_button_logs_in(
    run: Run, workshop: Path, server: Server, account: Account
) -> None:
    csp = "default-src 'self'; img-src 'self' data:"
    person = (account["email"], account["password"])
    answer = play(run, workshop, AUTHORIZE, "/docs", csp, CHROMIUM, server.url, *person)
    assert "200" in answer and account["email"].lower() in answer
    assert "elsewhere: []" in answer


def test_redoc_shows_the_requests(run: Run, workshop: Path, server: Server) -> None:
    csp = "default-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:"
    answer = play(run, workshop, READ, "/redoc", csp, CHROMIUM, server.url)
    assert "elsewhere: []" in answer


def test_the_pages_name_their_files_below_the_root_path(public: Client) -> None:
    assert 'src="/docs/swagger-ui-bundle.js"' in public.get("/docs").text
    assert "<script>" not in public.get("/docs").text + public.get("/redoc").text
