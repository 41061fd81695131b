"""The files by which hosts start the service."""

import asyncio
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tomllib
from concurrent.futures import ThreadPoolExecutor
from ipaddress import ip_network
from pathlib import Path
from unittest.mock import AsyncMock

import pytest
import yaml
from fastapi import FastAPI

from conftest import (
    HERE,
    PATH,
    SECRET,
    SETTINGS,
    bearer,
    copy_service,
    free_port,
    get,
    outside,
    service_files,
    token,
    wait_for_start,
)
from lib import middleware, serve, startup
from lib.connect_errors import NotReady
from lib.protocol import State

COMMAND = (HERE / "Procfile").read_text().removeprefix("web: ").strip()
DOCKERFILE = (HERE / "Dockerfile").read_text()
FLY = tomllib.loads((HERE / "fly.toml").read_text())
[RENDER] = yaml.safe_load((HERE / "render.yaml").read_text())["services"]


def test_every_host_starts_the_procfiles_command() -> None:
    assert re.findall("^CMD (.*)", DOCKERFILE, re.M) == ["exec " + COMMAND]
    assert RENDER["startCommand"] == COMMAND
    assert FLY["build"] == {"dockerfile": "Dockerfile"} and "processes" not in FLY


def test_the_server_has_the_flags_that_hosts_need() -> None:
    assert (State.IDLE.seconds or 0) >= 95  # Heroku's router keeps connections for 90 s
    assert serve.SHUTDOWN < 10
    assert FLY["kill_timeout"] == "10s"
    # With "*" the first hop would count, which a client writes.
    trusted = middleware.PROXIES.split(",")
    assert all(ip_network(each).is_private or each == "100.64.0.0/10" for each in trusted)


def test_every_host_probes_health_and_not_the_database() -> None:
    [check] = FLY["http_service"]["checks"]
    [probe] = re.findall("^HEALTHCHECK .*?CMD (.*)", DOCKERFILE, re.M)
    assert check["path"] == RENDER["healthCheckPath"] == "/health"
    assert "/health'" in json.loads(probe)[2]
    assert (
        int(check["grace_period"].removesuffix("s")) > 30
    )  # seconds that a start waits for the database


def test_secrets_are_named_and_not_given() -> None:
    given = {variable.pop("key"): variable for variable in RENDER["envVars"]}
    assert set(given) <= set(SETTINGS) and {"DATABASE_URL", "JWT_SECRET"} <= set(given)
    header = given.pop("CLIENT_IP_HEADER")
    assert header == {"value": "CF-Connecting-IP"}
    assert all(each in ({"sync": False}, {"generateValue": True}) for each in given.values())
    assert FLY["env"] == {"CLIENT_IP_HEADER": "Fly-Client-IP"}
    assert "postgresql://" not in DOCKERFILE


def test_the_image_has_no_root_and_no_build_tools() -> None:
    stages = DOCKERFILE.split("\nFROM ")
    assert len(stages) == 3 and all(stage.startswith("python:3.11-slim") for stage in stages[1:])
    assert re.search("^USER todo$", stages[-1], re.M)
    assert not re.search(r"\bpip\b", stages[-1]) and "apt" not in DOCKERFILE
    assert (HERE / ".python-version").read_text().strip() == "3.11"


def test_the_image_has_each_file_of_the_service_and_no_other() -> None:
    [*_, stage] = DOCKERFILE.split("\nFROM ")
    lines = re.findall("^COPY ([^-].*)", stage, re.M)
    copied = {word.partition("/")[0] for line in lines for word in line.split()[:-1]}
    assert copied == {path.parts[0] for path in service_files()}


@pytest.mark.slow
def test_honcho_runs_the_procfile_with_a_dotenv(database: str, tmp_path: Path) -> None:
    copy_service(tmp_path)
    port, log = free_port(), tmp_path / "log"
    (tmp_path / "Procfile").write_text(
        f"web: {COMMAND.replace('--host 0.0.0.0', '--host 127.0.0.1')}"
    )
    settings = f"DATABASE_URL={database}\nJWT_SECRET='{SECRET}'\nPORT={port}\n"
    (tmp_path / ".env").write_text(settings)
    command = [str(Path(sys.executable).parent / "honcho"), "start", "web"]
    with log.open("wb") as output:
        process = subprocess.Popen(command, cwd=tmp_path, env=outside(PATH=PATH), stdout=output)
    with process:
        wait_for_start(process, port)
        response = get(f"http://127.0.0.1:{port}/tasks", headers=bearer(token("u")))
        process.terminate()
    assert response.status_code == 200
    assert "server" not in response.headers
    assert '"route":"/tasks","status":200' in log.read_text()


@pytest.mark.slow
def test_the_dockerfiles_steps_work_in_a_clean_environment(database: str, tmp_path: Path) -> None:
    copy_service(tmp_path)
    for name in ("requirements.txt", "constraints.txt"):
        shutil.copy(HERE / name, tmp_path)
    port, venv = free_port(), str(tmp_path / "venv")
    environ = {name: value for name, value in os.environ.items() if name.startswith("PIP_")}
    environ |= {"PATH": f"{venv}/bin:{os.environ['PATH']}", "HOME": os.environ.get("HOME", "/")}
    environ |= {"DATABASE_URL": database, "JWT_SECRET": SECRET, "PORT": str(port)}
    for step in re.findall("^RUN ((?!useradd).*)", DOCKERFILE, re.M):
        here = step.replace("/venv", venv).replace("python -m", f"{sys.executable} -m")
        shell = ["sh", "-c", here]
        subprocess.run(
            shell, cwd=tmp_path, env=environ, check=True, timeout=600, capture_output=True
        )
    command = re.findall("^CMD (.*)", DOCKERFILE, re.M)[0].replace(
        "--host 0.0.0.0", "--host 127.0.0.1"
    )
    probe = json.loads(re.findall("^HEALTHCHECK .*?CMD (.*)", DOCKERFILE, re.M)[0])
    with subprocess.Popen(["sh", "-c", command], cwd=tmp_path, env=environ) as process:
        wait_for_start(process, port)
        assert subprocess.run(probe, env=environ).returncode == 0
        process.terminate()
    assert subprocess.run(probe, env=environ, stderr=subprocess.DEVNULL).returncode != 0


def test_a_service_in_a_thread_of_another_program_stops_though_its_use_fails() -> None:
    calls = []

    async def call(name: str) -> None:
        calls.append(name)

    async def use() -> None:
        async with startup.lifespan(lambda: call("start"), lambda: call("stop"))(FastAPI()):
            raise LookupError

    with ThreadPoolExecutor(1) as pool, pytest.raises(LookupError):
        pool.submit(asyncio.run, use()).result()
    assert calls == ["start", "stop"]


@pytest.mark.parametrize(
    ("failure", "ends"), [(NotReady("why"), SystemExit), (OSError("why"), OSError)]
)
def test_a_start_that_fails_stops_what_it_had_begun_and_gives_the_signals_back(
    monkeypatch: pytest.MonkeyPatch, failure: Exception, ends: type[BaseException]
) -> None:
    monkeypatch.setattr(startup, "end", sys.exit)
    start, stop, before = AsyncMock(side_effect=failure), AsyncMock(), signal.getsignal(15)
    with pytest.raises(ends):
        asyncio.run(startup.lifespan(start, stop)(FastAPI()).__aenter__())
    assert stop.await_count == 1
    assert signal.getsignal(15) == before
