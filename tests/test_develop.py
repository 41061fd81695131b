"""What `python main.py` promises a developer, whatever state the last run left behind."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import venv
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from psycopg.pq import PGconn

from conftest import HERE, copy_service, free_port, listens, outside, wait_until
from lib import develop, serve

UNREACHABLE = "postgresql://somebody@127.0.0.1:1/nowhere"
KEYS = "https://issuer.example/jwks/of/more/than/thirty-two/bytes"
ACCOUNT = {"email": "a@example.com", "password": "correct horse"}


class Run:
    """A `python main.py` in a folder. Its output goes to a file there, beside the last run's."""

    def __init__(self, folder: Path, *options: str, python: str = sys.executable, **given: str):
        self.port = int(given.setdefault("PORT", str(free_port())))
        self.output = folder / f"{len(list(folder.glob('*.output')))}.output"
        command = [python, str(folder / "main.py"), *options]
        with self.output.open("w") as log:
            self.process = subprocess.Popen(
                command, env=outside(**given), stdout=log, stderr=log, process_group=0
            )

    @property
    def printed(self) -> str:
        return self.output.read_text()

    def ask(self, path: str, account: dict[str, str] | None = None) -> httpx.Response:
        """Asks the service. A request that comes while it starts waits for it."""
        wait_until(lambda: listens(self.port) or self.process.poll() is not None)
        method, url = "POST" if account else "GET", f"http://127.0.0.1:{self.port}{path}"
        options: Any = {"headers": {"Origin": "http://localhost:3000"}, "trust_env": False}
        return httpx.request(method, url, json=account, timeout=20, **options)

    def end(self, number: int = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        return self.process.wait(40)

    def line(self) -> str:
        """The one line that a start that failed has printed."""
        assert self.process.wait(60) == 1, self.printed
        (line,) = self.printed.splitlines()
        return line


@contextmanager
def running(folder: Path, *options: str, **given: str) -> Iterator[Run]:
    run = Run(folder, *options, **given)
    try:
        yield run
    finally:
        assert run.end() == 0, run.printed


def inside(folder: Path, name: str = "") -> list[psutil.Process]:
    """The processes that work in a folder or below."""
    processes = psutil.process_iter(["cwd", "name"])
    here = [p for p in processes if str(p.info["cwd"] or "").startswith(str(folder))]
    return [p for p in here if p.info["name"].startswith(name)]


@contextmanager
def copied(path: Path) -> Iterator[Path]:
    copy_service(path)
    yield path
    for process in inside(path):
        with suppress(psutil.NoSuchProcess):
            process.kill()


@pytest.fixture(scope="module")
def used(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder that had a run. Its path has spaces, and is too long for that of a socket."""
    with copied(tmp_path_factory.mktemp("a user's folder " + "with a long name " * 5)) as folder:
        with running(folder) as run:
            assert run.ask("/auth/register", ACCOUNT).status_code == 201
        yield folder


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    with copied(tmp_path / "todo") as folder:
        yield folder


# It starts, serves and stops.


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_each_signal_stops_the_service_and_its_postgresql(used: Path, number: int) -> None:
    run = Run(used)
    assert run.ask("/health/ready").is_success
    for _ in range(100):
        run.process.send_signal(number)
        time.sleep(0.02)
    assert run.end(number) == 0
    assert "Finished server process" in run.printed.splitlines()[-1]
    assert "Traceback" not in run.printed
    assert inside(used) == []


def test_ctrl_c_while_the_service_starts_prints_no_traceback(used: Path) -> None:
    run = Run(used)
    wait_until(lambda: [p for p in inside(used, "python") if p.ppid() == run.process.pid])
    time.sleep(0.3)  # it imports
    os.killpg(run.process.pid, signal.SIGINT)  # as a terminal sends it
    assert run.process.wait(40) == 0
    assert "Traceback" not in run.printed


def test_it_accepts_by_as_many_sockets_as_the_procfiles_server(used: Path) -> None:
    with running(used) as run:
        assert run.ask("/health").is_success
        open_files = [Path(f"/proc/{process.pid}/fd").iterdir() for process in inside(used)]
        links = [Counter(os.readlink(each) for each in files) for files in open_files]
    assert max(count for each in links for count in each.values()) >= serve.LISTENERS


@pytest.mark.parametrize("until", [".data", ".data/*/base", ".data/postgres/postmaster.pid"])
def test_a_signal_while_postgresql_starts_stops_all(folder: Path, until: str) -> None:
    run = Run(folder)
    wait_until(lambda: list(folder.glob(until)))
    assert run.end(signal.SIGINT) == 0
    assert run.printed == ""
    wait_until(lambda: not inside(folder), 20)


@pytest.mark.slow
def test_the_requests_that_readme_shows_work_one_after_the_other(folder: Path) -> None:
    text, placeholder = (HERE / "README.md").read_text(), "eyJhbGciOi…"
    shown, token, answer = re.findall(r"^\$ (curl .*\n .*)$", text, re.M), "", {}
    with running(folder, PGSERVICE="other", PGHOSTADDR="192.0.2.1", PGPORT="1") as run:
        assert run.ask("/health/ready").is_success
        for command in shown:
            given = command.replace("8000", str(run.port)).replace(placeholder, token)
            answer = json.loads(subprocess.check_output(["/bin/sh", "-c", given]))
            token = answer.get("access_token", token)
    assert (len(shown), answer["title"]) == (2, "Buy milk")


@pytest.mark.slow
def test_changed_code_is_served_and_postgresql_stays(folder: Path) -> None:
    with running(folder, "--reload") as run:
        assert run.ask("/").json()["version"] != "changed"
        (postgres,) = (p for p in inside(folder, "postgres") if p.ppid() == run.process.pid)
        code = (folder / "main.py").read_text()
        (folder / "main.py").write_text(re.sub("VERSION = .*", 'VERSION = "changed"', code))
        wait_until(lambda: run.ask("/").json()["version"] == "changed")
        assert postgres.is_running()


def test_pages_of_this_machine_may_call_it_and_the_start_says_so(used: Path) -> None:
    with running(used) as run:
        allowed = run.ask("/health").headers["access-control-allow-origin"]
        assert allowed == "http://localhost:3000"
        assert allowed in run.printed


# What the environment or .env sets is not made.


@pytest.mark.parametrize("place", ["environment", ".env"])
@pytest.mark.parametrize("name", ["JWT_SECRET", "BETTER_AUTH_SECRET", "JWT_JWKS_URL"])
def test_what_is_set_is_not_made(folder: Path, name: str, place: str) -> None:
    given: Any = {"DATABASE_URL": UNREACHABLE, name: KEYS}
    text = "".join(f"{name}={value}\n" for name, value in given.items())
    (folder / ".env").write_text(text if place == ".env" else "")
    with running(folder, **(given if place == "environment" else {})) as run:
        wait_until(lambda: "DATABASE_URL does not work" in run.printed)
    assert not (folder / ".data").exists()


def test_the_kept_secret_can_be_read_by_its_owner_alone(tmp_path: Path) -> None:
    file = tmp_path / ".data" / "secret"
    secret = develop.keep_secret(file)
    assert len(secret) >= 32
    assert file.stat().st_mode & 0o777 == 0o600
    assert develop.keep_secret(file) == secret


# What a killed run leaves behind.


@pytest.mark.slow
def test_the_run_after_a_killed_one_finds_its_data_and_stops_its_postgresql(used: Path) -> None:
    killed = Run(used)
    assert killed.ask("/auth/login", ACCOUNT).is_success
    killed.end(signal.SIGKILL)
    wait_until(lambda: not listens(killed.port), 20)
    with running(used, PORT=str(killed.port)) as run:
        assert run.ask("/auth/login", ACCOUNT).is_success
    assert inside(used) == []


@pytest.mark.slow
def test_a_postgresql_that_was_killed_while_it_worked_is_no_hindrance(used: Path) -> None:
    killed = Run(used)
    assert killed.ask("/health/ready").is_success
    (postmaster,) = (p for p in inside(used, "postgres") if p.ppid() == killed.process.pid)
    host = postmaster.cmdline()[postmaster.cmdline().index("-k") + 1]
    connection = PGconn.connect(f"user=postgres host='{host}'".encode())
    connection.send_query(b"DO $$ BEGIN LOOP END LOOP; END $$")
    postmaster.kill()
    killed.end(signal.SIGKILL)
    with running(used) as run:
        assert run.ask("/health/ready").is_success
    assert inside(used) == []


@pytest.mark.slow
def test_a_kill_during_initdb_leaves_nothing_to_clear_away(folder: Path) -> None:
    killed = Run(folder)
    wait_until(lambda: list(folder.glob(".data/*/base/*")))
    killed.end(signal.SIGKILL)
    with running(folder) as run:
        assert run.ask("/health/ready").is_success
    assert not (folder / ".data/new").exists()


@pytest.mark.parametrize("content", ["{pid}\n{folder}\n", "", "not a pid\n"])
def test_a_stale_pid_file_is_no_hindrance_and_harms_no_other_program(
    used: Path, content: str
) -> None:
    owner = (used / ".data/postgres").stat().st_uid
    with subprocess.Popen(["sleep", "60"], user=owner, cwd="/") as other:
        text = content.format(pid=other.pid, folder=used)
        (used / ".data/postgres/postmaster.pid").write_text(text)
        with running(used) as run:
            assert run.ask("/health/ready").is_success
        assert other.poll() is None
        other.kill()


# What a developer can mend is one line.


def test_a_second_run_in_the_same_folder_says_so_and_harms_nothing(used: Path) -> None:
    with running(used) as run:
        assert run.ask("/health/ready").is_success
        assert ".data is in use" in Run(used).line()
        assert run.ask("/auth/login", ACCOUNT).is_success


def test_a_port_in_use_is_named_before_anything_starts(folder: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        line = Run(folder, PORT=str(port)).line()
    assert line == f"PORT {port}: Address already in use. Set another, or stop what uses it"
    assert not (folder / ".data").exists()


def test_a_folder_that_cannot_be_written_is_named(folder: Path) -> None:
    (folder / ".data").touch()  # no folder; root may write to a read-only one
    line = Run(folder).line()
    assert "/.data" in line
    assert "Make it writable, or set DATABASE_URL and JWT_SECRET" in line


def test_a_postgresql_that_does_not_start_says_where_to_look(used: Path) -> None:
    settings = used / ".data/postgres/postgresql.auto.conf"
    settings.write_text("shared_buffers = none\n")
    try:
        assert "postgres.log says why" in Run(used).line()
    finally:
        settings.write_text("")


def test_a_service_that_ends_by_itself_ends_the_run(used: Path) -> None:
    run = Run(used, JWT_SECRET="short")
    assert run.process.wait(60) == 1
    assert "JWT_SECRET is shorter" in run.printed.splitlines()[-1]
    assert inside(used) == []


def test_missing_requirements_are_named_with_the_command(folder: Path, tmp_path: Path) -> None:
    venv.create(tmp_path / "venv", symlinks=True)
    (packages,) = tmp_path.glob("venv/lib/*/site-packages")
    for path in Path(httpx.__file__).parent.parent.iterdir():
        if not re.match("pixeltable|psutil|watchfiles", path.name):
            (packages / path.name).symlink_to(path)
    line = Run(folder, python=str(tmp_path / "venv/bin/python"), PYTHONPATH="").line()
    assert "venv/bin/python -m pip install -r requirements-dev.txt" in line
