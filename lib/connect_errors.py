"""Tells whether waiting cures an error of connecting.

What is not listed here is waited for: DNS may know a name only when the database has started.
PostgreSQL's errors are in many languages, so they are known by SQLSTATE. libpq shows the one of a
refused connection in its trace only, and psycopg does not trace, so explain() connects once more.
"""

import asyncio
import os
import re
import select

import psycopg
from psycopg.pq import PGconn, PollingStatus

# SQLSTATEs: features (0A, 55000), values (22), logins (28), databases (3D), privileges (42).
HOPELESS_STATES = ("0A", "22", "28", "3D", "42", "55000")
# libpq has no codes, and poolers send 08P01 or XX000 for everything. Their words are English.
HOPELESS_WORDS = re.compile(
    r"certificate|private key"  # root certificate file "/ca" does not exist
    r"|not support SSL"  # server does not support SSL
    r"|invalid |weak sslmode"  # invalid sslmode value: "on"
    r"|could not match"  # could not match 2 port numbers to 1 hosts
    r"|channel binding"  # channel binding required
    r"|no password|authentication (failed|method)"  # SASL authentication failed (PgBouncer)
    r"|no such (database|user)"  # no such database: todo (PgBouncer)
    r"|not (be )?found|disabled"  # Tenant or user not found (Supabase)
)
NAMES = re.compile(r"\"[^\"]*\"|'[^']*'")  # of hosts, files and the like


class NotReady(Exception):
    """The service cannot start. The argument is one line for its operator."""


async def explain(error: psycopg.Error, conninfo: str) -> str:
    """One line about a failure to connect. Raises NotReady with it where waiting does not help."""
    text, sqlstate = await asyncio.to_thread(connect_traced, conninfo)
    lines = (text or str(error)).split("\n")
    # Of several addresses the last has the SQLSTATE. DETAIL and HINT follow its line.
    line = [lines[0], *(each for each in lines if "connection to server" in each)][-1]
    if sqlstate.startswith(HOPELESS_STATES) or HOPELESS_WORDS.search(NAMES.sub("", line)):
        raise NotReady(f"DATABASE_URL does not work, correct it: {line}") from None
    return f"DATABASE_URL does not work: {line}"


def connect_traced(conninfo: str) -> tuple[str, str]:
    """What libpq says of one more attempt, and PostgreSQL's SQLSTATE; "" without one. Blocks."""
    if not hasattr(os, "memfd_create"):  # psycopg traces on Linux only
        return "", ""
    with os.fdopen(os.memfd_create("trace"), "rb") as trace:
        connection = PGconn.connect_start(conninfo.encode())
        connection.trace(trace.fileno())
        while (status := connection.connect_poll()) not in (PollingStatus.OK, PollingStatus.FAILED):
            waiting = [connection.socket]
            reads, writes = (waiting, []) if status == PollingStatus.READING else ([], waiting)
            if not any(select.select(reads, writes, [], 3)):  # seconds for this step
                break
        connection.untrace()
        trace.seek(0)
        states = re.findall(rb'\tErrorResponse\t.* C "(\w{5})"', trace.read())
    return connection.error_message.decode(errors="replace"), states[-1].decode() if states else ""
