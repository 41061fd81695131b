"""A PgBouncer in front of the database, where the program is installed."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from psycopg.conninfo import conninfo_to_dict

from conftest import free_port, wait_for_start


@contextmanager
def pgbouncer(database: str, folder: Path, tracks: int, size: int = 3) -> Iterator[str]:
    """A PgBouncer that shares `size` connections to the database by transaction.

    It tracks so many prepared statements of each connection.
    """
    port, target = free_port(), conninfo_to_dict(database)
    user, host = target.get("user", "postgres"), str(target.get("host") or "/var/run/postgresql")
    address = f"host={host} port={target.get('port', 5432)} dbname={target['dbname']}"
    (folder / "users").write_text(f'"{user}" "{target.get("password", "")}"\n')
    (folder / "ini").write_text(
        f"[databases]\ntodo_test = {address}\n"
        f"[pgbouncer]\nlisten_addr = 127.0.0.1\nlisten_port = {port}\nunix_socket_dir =\n"
        f"auth_type = trust\nauth_file = {folder}/users\n"
        f"pool_mode = transaction\ndefault_pool_size = {size}\n"
        + (f"max_prepared_statements = {tracks}\n" if PGBOUNCER >= (1, 21) else "")
    )
    command = ["pgbouncer", str(folder / "ini")]
    if os.geteuid() == 0:  # it refuses to run as root
        for path in (folder, *folder.parents[:2], folder / "ini", folder / "users"):
            path.chmod(0o755)
        command[1:1] = ["-u", Path(host).owner() if host.startswith("/") else "nobody"]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    try:
        wait_for_start(process, port)
        yield f"postgresql://{user}@127.0.0.1:{port}/todo_test"
    finally:
        process.terminate()
        process.wait(30)


def version_of_pgbouncer() -> tuple[int, ...]:
    """(0,) where it is not installed."""
    if not shutil.which("pgbouncer"):
        return (0,)
    shown = subprocess.run(["pgbouncer", "--version"], capture_output=True, text=True).stdout
    return tuple(int(part) for part in shown.split()[1].split("."))


PGBOUNCER = version_of_pgbouncer()
needs_pgbouncer = pytest.mark.skipif(PGBOUNCER == (0,), reason="pgbouncer is not installed")
