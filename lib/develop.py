"""`python main.py`: the service on this machine, with a PostgreSQL and a secret kept in .data.

    develop.run("main:app", folder, database=True, secret=True, origins=True)

run() starts what the service needs, and the service in a second process: the modules that the first
one has imported have read their settings already.
"""

import argparse
import os
import secrets
import signal
import socket
import sys
import threading
import time
from contextlib import ExitStack
from pathlib import Path
from subprocess import Popen

import uvicorn
from pydantic import Field

from lib import embedded
from lib import serve as server
from lib.settings import BaseSettings

PORTS = (3000, 5173)  # of Next.js and Vite
ORIGINS = [f"http://{host}:{port}" for host in ("localhost", "127.0.0.1") for port in PORTS]


class Settings(BaseSettings):
    port: int = Field(8000, ge=0, le=65535)  # of 127.0.0.1; 0 takes a free one


def run(app: str, folder: Path, *, database: bool, secret: bool, origins: bool) -> None:
    """Serves `app`, an import string, from `folder` until a signal comes, and exits.

    `database`, `secret` and `origins` say whether to make DATABASE_URL, JWT_SECRET, CORS_ORIGINS.
    What keeps the service from starting is told in one line.
    """
    parser = argparse.ArgumentParser(description="Serves on 127.0.0.1, with a PostgreSQL in .data")
    parser.add_argument("--reload", action="store_true", help="restart when .py or .sql changes")
    mode, home = ["reload"] * parser.parse_args().reload, folder / ".data"
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: sys.exit(0))
    with ExitStack() as stack:  # undone in reverse: the service ends before its database
        listener = stack.enter_context(listen(Settings.load().port))
        try:
            if database:
                os.environ["DATABASE_URL"] = stack.enter_context(embedded.postgres(home))
            if secret:
                os.environ["JWT_SECRET"] = keep_secret(home / "secret")
        except OSError as error:
            sys.exit(f"{error}. Make it writable, or set DATABASE_URL and JWT_SECRET")
        if origins:
            os.environ["CORS_ORIGINS"] = ",".join(ORIGINS)
        fd = listener.fileno()
        command = [sys.executable, "-m", "lib.develop", app, str(fd), str(os.getpid()), *mode]
        service = stack.enter_context(Popen(command, cwd=folder, pass_fds=[fd]))
        stack.callback(service.terminate)
        print(f"\nDocs:  http://127.0.0.1:{listener.getsockname()[1]}/docs")
        print(f"CORS:  pages of {', '.join(ORIGINS)}\n" * origins + "Stop:  Ctrl-C\n", flush=True)
        sys.exit(service.wait())


def listen(port: int) -> socket.socket:
    """Takes the port before anything starts. Early requests wait in its queue."""
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


def serve(app: str, fd: str, parent: str, *mode: str) -> None:
    """Serves `app` on the listening socket `fd` until a signal comes, or the process `parent` ends.

    That may be a kill -9, which it could not pass on.
    """

    def watch() -> None:
        while os.getppid() == int(parent):
            time.sleep(0.2)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()
    if mode:
        uvicorn.run(app, fd=int(fd), reload=True, reload_includes=["*.sql"], **server.FLAGS)
    else:
        server.run(app, fd=int(fd))


if __name__ == "__main__":
    serve(*sys.argv[1:])
