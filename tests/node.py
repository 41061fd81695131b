"""Programs of Node for tests: the packages below from npm, kept in .data/npm.

from tests.node import node_modules, run, workshop  # fixtures
"""

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from conftest import HERE

NPM = {
    "@redocly/cli": "2.77.0",
    "@stoplight/spectral-cli": "6.16.3",
    "@stoplight/spectral-owasp-ruleset": "2.0.1",
    "better-auth": "1.7.25",
    "openapi-fetch": "0.17.0",
    "openapi-typescript": "7.13.0",
    "orval": "8.38.0",
    "playwright-core": "1.65.1",
    "typescript": "5.9.3",
    "zod": "4.6.7",
}
QUIET = {"REDOCLY_TELEMETRY": "off", "REDOCLY_SUPPRESS_UPDATE_NOTICE": "true"}
Run = Callable[..., str]


@pytest.fixture(scope="session")
def node_modules() -> Path:
    """The packages, installed once. Tests are skipped where npm is not installed."""
    if not shutil.which("npm"):
        pytest.skip("Node and npm are not installed")
    cache = HERE / ".data" / "npm"
    wanted, done = json.dumps({"private": True, "dependencies": NPM}), cache / "installed.json"
    if not done.exists() or done.read_text() != wanted:
        cache.mkdir(parents=True, exist_ok=True)
        (cache / "package.json").write_text(wanted)
        options = ["--ignore-scripts", "--no-audit", "--no-fund", "--loglevel=error"]
        subprocess.run(["npm", "install", *options], cwd=cache, check=True, timeout=300)
        done.write_text(wanted)
    return cache / "node_modules"


@pytest.fixture
def workshop(node_modules: Path, tmp_path: Path) -> Path:
    """A directory in which the packages can be imported."""
    (tmp_path / "node_modules").symlink_to(node_modules)
    return tmp_path


@pytest.fixture
def run(workshop: Path) -> Run:
    """Runs a program of the packages, or node, and gives its output; its failure is the test's."""

    def run(program: str, *arguments: str) -> str:
        installed = workshop / "node_modules" / ".bin" / program
        done = subprocess.run(
            [str(installed) if installed.exists() else program, *arguments],
            cwd=workshop, env=os.environ | QUIET, capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return run
