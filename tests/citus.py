"""Starts a Citus cluster for tests, from a PostgreSQL that has Citus installed.

    python tests/citus.py --bin DIR                a coordinator and two workers
    python tests/citus.py --bin DIR --workers 0    one node, which holds the tasks itself

DIR has the programs of that PostgreSQL, pg_ctl among them. The nodes listen on 127.0.0.1 and keep
their data in a temporary directory. The command creates the database todo_test, applies schema.sql,
distributes the tables, prints TEST_DATABASE_URL and waits. Ctrl-C stops the nodes and removes their
data. PostgreSQL refuses to run as root, so root runs it as the user nobody.
"""

import argparse
import os
import shutil
import signal
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import psycopg

SCHEMA = Path(__file__).resolve().parent.parent / "schema.sql"
HOST = "127.0.0.1"
HOLD_TASKS = "SELECT citus_set_node_property(%s, %s, 'shouldhaveshards', %s)"
ACCOUNT = "nobody" if os.geteuid() == 0 else None  # who runs PostgreSQL; None: who runs this


@contextmanager
def cluster(programs: str, workers: int) -> Iterator[str]:
    """A running cluster with the tables distributed. Gives the URL of todo_test."""
    with ExitStack() as stack:
        home = stack.enter_context(tempfile.TemporaryDirectory(prefix="citus-"))
        shutil.chown(home, ACCOUNT or os.geteuid())
        nodes = (node(programs, f"{home}/{number}") for number in range(1 + workers))
        first, *others = map(stack.enter_context, nodes)
        with psycopg.connect(url(first), autocommit=True) as connection:
            connection.execute("SELECT citus_set_coordinator_host(%s, %s)", (HOST, first))
            connection.execute(HOLD_TASKS, (HOST, first, not others))
            for port in others:
                connection.execute("SELECT citus_add_node(%s, %s)", (HOST, port))
            connection.execute(SCHEMA.read_bytes())
            distribute(connection)
        yield url(first)


def distribute(connection: psycopg.Connection) -> None:
    """Puts a copy of users on every node and divides tasks by user_id. The schema is applied."""
    connection.execute("SELECT create_reference_table('todo.users')")
    connection.execute("SELECT create_distributed_table('todo.tasks', 'user_id')")


@contextmanager
def node(programs: str, data: str) -> Iterator[int]:
    """A running PostgreSQL with the extension in an empty todo_test. Gives its port."""
    with socket.create_server((HOST, 0)) as probe:
        port: int = probe.getsockname()[1]
    settings = f"-p {port} -h {HOST} -k '' -c shared_preload_libraries=citus"
    pg_ctl(programs, data, "init", "-o", "-U postgres -A trust -E UTF8 --no-locale --no-sync")
    pg_ctl(programs, data, "start", "-o", f"{settings} -c log_min_messages=fatal")
    try:
        with psycopg.connect(url(port, "postgres"), autocommit=True) as connection:
            connection.execute("CREATE DATABASE todo_test")
        with psycopg.connect(url(port), autocommit=True) as connection:
            connection.execute("CREATE EXTENSION citus")
        yield port
    finally:
        pg_ctl(programs, data, "stop", "-m", "fast")


def pg_ctl(programs: str, data: str, *action: str) -> None:
    command = [f"{programs}/pg_ctl", "-D", data, *action]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, user=ACCOUNT)


def url(port: int, database: str = "todo_test") -> str:
    return f"postgresql://postgres@{HOST}:{port}/{database}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--bin", required=True, help="the programs of a PostgreSQL with Citus")
    parser.add_argument("--workers", type=int, default=2, help="nodes beside the coordinator")
    given = parser.parse_args()
    with cluster(given.bin, given.workers) as address:
        print(f"TEST_DATABASE_URL={address}", flush=True)
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
        signal.sigwait({signal.SIGINT, signal.SIGTERM})
