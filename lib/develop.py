"""`python main.py`: the service on this machine, with a PostgreSQL and a secret kept in .data.

    develop.run("main:app", database=True, secret=True, origins=True)

The service runs in a second process, because the modules of the first one have read their settings.
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

from lib import embedded
from lib import serve as server

FOLDER = Path(__file__).resolve().parent.parent  # of the service
DATA = FOLDER / ".data"
PORTS = (3000, 5173)  # of Next.js and Vite
ORIGINS = [f"http://{host}:{port}" for host in ("localhost", "127.0.0.1") for port in PORTS]


def run(app: str, *, database: bool, secret: bool, origins: bool) -> None:
    """Serves `app`, an import string, until a signal comes, and exits.

    `database`, `secret` and `origins` say whether to make DATABASE_URL, JWT_SECRET, CORS_ORIGINS.
    """
    parser = argparse.ArgumentParser(description="Serves on 127.0.0.1, with a PostgreSQL in .data")
    parser.add_argument("--reload", action="store_true", help="restart when .py or .sql changes")
    reload = ["--reload"] if parser.parse_args().reload else []
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: sys.exit(0))
    with ExitStack() as stack:  # undone in reverse: the service ends before its database
        listener = stack.enter_context(listen(server.Settings.load().port))
        try:
            if database:
                os.environ["DATABASE_URL"] = stack.enter_context(embedded.postgres(DATA))
            if secret:
                os.environ["JWT_SECRET"] = keep_secret(DATA / "secret")
        except OSError as error:
            sys.exit(f"{error}. Make it writable, or set DATABASE_URL and JWT_SECRET")
        print(f"\nDocs:  http://127.0.0.1:{listener.getsockname()[1]}/docs")
        if origins:
            os.environ["CORS_ORIGINS"] = ",".join(ORIGINS)
            print(f"CORS:  pages of {', '.join(ORIGINS)} may call it")
        print("Stop:  Ctrl-C\n", flush=True)
        fd = listener.fileno()
        command = [sys.executable, "-m", "lib.develop", app, str(fd), str(os.getpid()), *reload]
        service = stack.enter_context(Popen(command, cwd=FOLDER, pass_fds=[fd]))
        stack.callback(service.terminate)
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
    file.touch(0o600)
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


if __name__ == "__main__":
    serve(*sys.argv[1:])
