"""What `python main.py` promises a developer, whatever state the last run left behind."""

import json
import os
import pwd
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

HERE = Path(__file__).resolve().parent.parent
README = (HERE / "README.md").read_text()
SETTINGS = re.findall(r"^(\w+)=", (HERE / ".env.example").read_text(), re.M)


class Run:
    """A `python main.py` in a folder: its process, its port, and what it has printed.

    An empty setting is one that the environment does not have.
    """

    def __init__(
        self, folder: Path, user: int | None = None, port: int | None = None, **given: str
    ) -> None:
        self.port = port or free_port()
        without = {*SETTINGS, "XDG_RUNTIME_DIR"}
        inherited = {name: value for name, value in os.environ.items() if name not in without}
        environ = inherited | {"PORT": str(self.port)} | given
        self.output = Path(tempfile.mkstemp(prefix="develop-output-")[1])
        with self.output.open("wb") as output:
            self.process = subprocess.Popen(
                [environ.pop("python", sys.executable), "main.py"],
                cwd=folder,
                env={name: value for name, value in environ.items() if value},
                stdout=output,
                stderr=output,
                user=user,
                group=user,
                extra_groups=[] if user else None,
                start_new_session=True,
            )

    def get(self, path: str) -> httpx.Response | None:
        try:
            return httpx.get(f"http://127.0.0.1:{self.port}{path}", trust_env=False)
        except httpx.TransportError:
            return None

    def ready(self) -> "Run":
        wait_until(lambda: self.process.poll() is not None or self.get("/health/ready"))
        assert self.process.poll() is None, self.printed
        return self

    def stop(self, number: int = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        return self.process.wait(20)

    def line(self) -> str:
        """The one line that a start that failed has printed."""
        assert self.process.wait(20) == 1, self.printed
        (line,) = self.printed.splitlines()
        return line

    @property
    def printed(self) -> str:
        return self.output.read_text()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


def wait_until(condition: Callable[[], Any], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def copied(folder: Path) -> Path:
    """A copy of the service, without .data and .env."""
    folder.mkdir(parents=True, exist_ok=True)
    for source in [*HERE.glob("[a-z]*.py"), HERE / "schema.sql"]:
        shutil.copy(source, folder)
    shutil.copytree(HERE / "lib", folder / "lib", ignore=shutil.ignore_patterns("__pycache__"))
    return folder


def children(folder: Path, name: str = "postgres") -> list[psutil.Process]:
    """The processes that work in `folder` or below."""
    found = psutil.process_iter(["cwd", "name"])
    inside = [p for p in found if str(p.info["cwd"] or "").startswith(str(folder))]
    return [p for p in inside if p.info["name"].startswith(name)]


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    yield copied(tmp_path / "todo")
    for process in children(tmp_path, ""):
        process.kill()


@pytest.fixture
def user() -> int | None:
    """The user of a run that has no more rights than most: nobody if the tests run as root."""
    if os.geteuid() != 0:
        return None
    nobody = pwd.getpwnam("nobody").pw_uid
    try:
        subprocess.run([sys.executable, "-c", ""], user=nobody, group=nobody, check=True)
    except (PermissionError, subprocess.CalledProcessError):
        pytest.skip(f"the tests run as root, and nobody else can run {sys.executable}")
    return nobody


@pytest.fixture
def users(user: int | None) -> Iterator[Path]:
    """A copy that belongs to that user, in a folder that all users can enter."""
    folder = copied(Path(tempfile.mkdtemp(prefix="develop-")))
    folder.chmod(0o755)
    os.chown(folder, -1 if user is None else user, -1)
    yield folder
    for process in children(folder, ""):
        process.kill()
    folder.chmod(0o755)
    shutil.rmtree(folder)


@contextmanager
def running(folder: Path, **options: Any) -> Iterator[Run]:
    run = Run(folder, **options)
    try:
        yield run.ready()
    finally:
        assert run.stop() == 0, run.printed


def killed(run: Run) -> None:
    run.process.kill()
    run.process.wait()


def register(run: Run, path: str = "/auth/register") -> int:
    account = {"email": "a@example.com", "password": "correct horse"}
    url = f"http://127.0.0.1:{run.port}{path}"
    return httpx.post(url, json=account, trust_env=False, timeout=20).status_code


# It starts and stops.


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_each_signal_stops_the_service_and_its_postgresql(folder: Path, number: int) -> None:
    run = Run(folder).ready()
    assert children(folder)
    assert run.stop(number) == 0
    assert "Finished server process" in run.printed.splitlines()[-1]
    assert "Traceback" not in run.printed
    assert not children(folder, "")
    assert run.get("/health") is None


def test_the_requests_that_readme_shows_work_one_after_the_other(folder: Path) -> None:
    shown, placeholder = re.findall(r"^\$ (curl .*\n .*)$", README, re.M), "eyJhbGciOi…"
    token, answer = "", {}
    with running(folder) as run:
        for command in shown:
            given = command.replace("8000", str(run.port)).replace(placeholder, token)
            answer = json.loads(subprocess.check_output(["/bin/sh", "-c", given]))
            token = answer.get("access_token", token)
    assert (len(shown), answer["title"]) == (2, "Buy milk")


def test_data_and_tokens_outlive_a_restart(folder: Path) -> None:
    with running(folder) as run:
        assert register(run) == 201
        secret = (folder / ".data/secret").read_text()
    with running(folder) as run:
        assert register(run, "/auth/login") == 200
        assert (folder / ".data/secret").read_text() == secret


def test_it_stops_when_the_service_ends_by_itself(folder: Path) -> None:
    run = Run(folder, JWT_SECRET="short")
    assert run.process.wait(20) == 1
    assert "JWT_SECRET is shorter" in run.printed.splitlines()[-1]
    assert not children(folder)


def test_it_starts_from_any_working_directory(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "main.py").symlink_to(folder / "main.py")
    with running(tmp_path) as run:
        assert register(run) == 201


def test_it_starts_in_a_folder_with_a_space_in_its_path() -> None:
    short = tempfile.TemporaryDirectory(prefix="a b's ")  # a longer one had no socket in it
    with short, running(copied(Path(short.name))) as run:
        assert register(run) == 201


def test_a_lock_of_another_user_in_the_temporary_folder_stops_nobody(
    users: Path, user: int | None
) -> None:
    shared = users / "tmp"
    shared.mkdir()
    shared.chmod(0o1777)
    (shared / ".lockfile").touch(0o000)
    with running(users, user=user, TMPDIR=str(shared)) as run:
        assert register(run) == 201


def test_the_first_line_is_no_warning(folder: Path) -> None:
    with running(folder) as run:
        assert run.printed.strip().startswith("Docs:")
        assert "Warning" not in run.printed


# The port.


def test_a_port_in_use_is_named_in_one_line_before_anything_starts(folder: Path) -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as other:
        port = other.getsockname()[1]
        line = Run(folder, port=port).line()
    assert f"PORT {port}: " in line
    assert not (folder / ".data").exists()


@pytest.mark.parametrize("port", ["http", "65536", "-1"])
def test_a_port_that_is_none_is_named_in_one_line(folder: Path, port: str) -> None:
    line = Run(folder, PORT=port).line()
    assert line.startswith(f"PORT {port}: ")
    assert ".. " not in line
    assert not (folder / ".data").exists()


@pytest.mark.parametrize("place", ["environment", ".env"])
def test_the_port_comes_from_the_environment_or_env(folder: Path, place: str) -> None:
    port = free_port()
    (folder / ".env").write_text(f"PORT={port if place == '.env' else free_port()}\n")
    with running(folder, port=port, PORT=str(port) if place == "environment" else "") as run:
        assert f"http://127.0.0.1:{port}/docs" in run.printed


def test_the_port_is_8000_when_none_is_set(folder: Path) -> None:
    try:
        socket.create_server(("127.0.0.1", 8000)).close()
    except OSError:
        pytest.skip("port 8000 is in use here")
    with running(folder, port=8000, PORT="") as run:
        assert "http://127.0.0.1:8000/docs" in run.printed


def test_a_request_sent_after_the_welcome_waits_for_the_service(folder: Path) -> None:
    run = Run(folder)
    wait_until(lambda: "Docs:" in run.printed)
    assert httpx.get(f"http://127.0.0.1:{run.port}/health", trust_env=False, timeout=20).is_success
    assert run.stop() == 0


# What a killed run leaves behind.


def test_a_killed_run_takes_its_service_along(folder: Path) -> None:
    run = Run(folder).ready()
    killed(run)
    wait_until(lambda: not children(folder, "python"), 5)
    socket.create_server(("127.0.0.1", run.port)).close()


def test_the_next_run_stops_the_postgresql_of_a_killed_one(folder: Path) -> None:
    run = Run(folder).ready()
    assert register(run) == 201
    killed(run)
    wait_until(lambda: not children(folder, "python"))  # its service ends a little later
    with running(folder, port=run.port) as after:
        assert register(after, "/auth/login") == 200
    assert not children(folder)


def test_a_pid_file_that_names_another_program_harms_neither(folder: Path) -> None:
    with running(folder):
        pid_file = (folder / ".data/postgres/postmaster.pid").read_text()
    owner = (folder / ".data/postgres").stat().st_uid
    with subprocess.Popen(["sleep", "60"], user=owner, cwd=folder / ".data/postgres") as other:
        lines = [str(other.pid), *pid_file.splitlines()[1:]]
        (folder / ".data/postgres/postmaster.pid").write_text("\n".join(lines))
        with running(folder) as run:
            assert register(run) == 201
        assert other.poll() is None
        other.kill()


@pytest.mark.parametrize("content", ["", "not a pid\n"])
def test_a_pid_file_cut_short_is_no_hindrance(folder: Path, content: str) -> None:
    with running(folder):
        pass
    (folder / ".data/postgres/postmaster.pid").write_text(content)
    with running(folder) as run:
        assert register(run) == 201


def test_a_kill_during_initdb_leaves_nothing_to_clear_away(folder: Path) -> None:
    run = Run(folder)
    wait_until(lambda: list(folder.glob(".data/*/base/*")))
    assert not (folder / ".data/postgres").exists()
    killed(run)
    with running(folder) as after:
        assert register(after) == 201
    assert {path.name for path in (folder / ".data").iterdir()} == {
        "postgres",
        "postgres.log",
        "secret",
    }


def test_a_second_run_in_the_same_folder_says_so_and_harms_nothing(folder: Path) -> None:
    with running(folder) as run:
        assert ".data is in use" in Run(folder).line()
        assert register(run) == 201


# What a developer can mend is one line.


def test_a_data_folder_that_is_not_writable_is_named_in_one_line(
    users: Path, user: int | None
) -> None:
    (users / ".data").mkdir(mode=0o555)
    line = Run(users, user=user).line()
    assert "/.data" in line
    assert "make it writable, or set DATABASE_URL and JWT_SECRET" in line


def test_a_read_only_checkout_is_named_in_one_line(users: Path, user: int | None) -> None:
    users.chmod(0o555)
    line = Run(users, user=user).line()
    assert "/.data" in line
    assert "make it writable, or set DATABASE_URL and JWT_SECRET" in line


def test_a_read_only_checkout_runs_on_what_the_environment_sets(
    users: Path, user: int | None
) -> None:
    users.chmod(0o555)
    given: dict[str, Any] = {"DATABASE_URL": "postgresql://127.0.0.1:1/x", "JWT_SECRET": "x" * 32}
    run = Run(users, user=user, **given)
    wait_until(lambda: "Waiting for application startup" in run.printed)
    assert run.stop() == 0


@pytest.mark.parametrize("until", [".data", ".data/*/base", ".data/postgres/postmaster.pid"])
def test_a_signal_while_postgresql_starts_stops_all(folder: Path, until: str) -> None:
    run = Run(folder)
    wait_until(lambda: list(folder.glob(until)))
    assert run.stop(signal.SIGINT) == 0
    assert run.printed == ""
    wait_until(lambda: not children(folder, ""), 3)


def test_a_postgresql_that_cannot_start_is_one_line(folder: Path) -> None:
    with running(folder):
        pass
    (folder / ".data/postgres/PG_VERSION").write_text("17\n")
    assert "postgres.log says why" in Run(folder).line()


def test_requirements_that_are_missing_are_named_with_the_command(
    folder: Path, tmp_path: Path
) -> None:
    venv.create(tmp_path / "venv", symlinks=True)
    (packages,) = tmp_path.glob("venv/lib/*/site-packages")
    for path in Path(httpx.__file__).parent.parent.iterdir():
        if not re.match("(python_)?dotenv|pixeltable|psutil", path.name):
            (packages / path.name).symlink_to(path)
    line = Run(folder, python=str(tmp_path / "venv/bin/python"), PYTHONPATH="").line()
    assert "venv/bin/python -m pip install -r requirements-dev.txt" in line


# What the environment or .env sets wins.


@pytest.mark.parametrize("place", ["environment", ".env"])
def test_a_database_that_is_given_is_used(folder: Path, place: str) -> None:
    url = "postgresql://somebody@127.0.0.1:1/nowhere"
    (folder / ".env").write_text(f"DATABASE_URL={url}\n" if place == ".env" else "")
    run = Run(folder, DATABASE_URL="" if place == ".env" else url)
    wait_until(lambda: "Waiting for application startup" in run.printed)
    assert psutil.Process(children(folder, "python")[-1].pid).environ()["DATABASE_URL"] == url
    assert not (folder / ".data/postgres").exists()
    assert run.stop() == 0


@pytest.mark.parametrize("place", ["environment", ".env"])
@pytest.mark.parametrize("name", ["JWT_SECRET", "BETTER_AUTH_SECRET", "JWT_JWKS_URL"])
def test_a_token_setting_that_is_given_is_used(folder: Path, name: str, place: str) -> None:
    given: dict[str, Any] = {name: "https://issuer.example/a/jwks/of/some/length"}
    (folder / ".env").write_text(f"{name}={given[name]}\n" if place == ".env" else "")
    with running(folder, **(given if place == "environment" else {})):
        (child,) = [p for p in children(folder, "python") if p.ppid() != os.getpid()]
        passed = child.environ()
    assert passed[name] == given[name]
    assert name == "JWT_SECRET" or "JWT_SECRET" not in passed
    assert not (folder / ".data/secret").exists()
