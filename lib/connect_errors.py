"""Tells whether waiting cures an error of a connection, as it does while a database starts."""

import asyncio
import os
import re
import select

import psycopg
from psycopg.pq import PGconn, PollingStatus

# What waiting does not cure: SQLSTATEs of PostgreSQL, words of libpq and psycopg, which have no
# codes, and of poolers, whose codes tell little. Those words are English everywhere.
HOPELESS_STATES = ("0A", "22", "28", "3D", "42", "55000")
HOPELESS = re.compile(
    r"certificate|private key|not support SSL|sslmode|channel binding|invalid |no password"
    r"|authentication (failed|method|request)|not known|No address"
    r"|no such (database|user)|unsupported startup|not (be )?found|not specified|is disabled"
)
PATIENCE = 3.0  # seconds that each step of connecting may take


class NotReady(Exception):
    """The service cannot start. The argument is one line for its operator."""


async def explain(error: psycopg.OperationalError, conninfo: str) -> str:
    """One line about an error. Raises NotReady with it where waiting does not help."""
    lines = str(error).splitlines() or [type(error).__name__]
    # DETAIL and HINT follow the line that counts. Of several addresses one may have a server.
    line = next((line for line in lines if re.search("FATAL|ERROR", line)), lines[0])
    text = f"DATABASE_URL does not work: {line}"
    if HOPELESS.search(line):
        raise NotReady(text) from None
    sqlstate = error.sqlstate
    if not sqlstate:  # there was no connection
        sqlstate = await asyncio.to_thread(sqlstate_of_connecting, conninfo)
    if sqlstate.startswith(HOPELESS_STATES):
        raise NotReady(text) from None
    return text


def sqlstate_of_connecting(conninfo: str) -> str:
    """The SQLSTATE with which a server refuses a connection, or "". Blocks.

    The server's words may be in any language, and libpq tells the code to its trace only.
    """
    if not hasattr(os, "memfd_create"):  # psycopg traces on Linux only
        return ""
    with os.fdopen(os.memfd_create("trace"), "rb") as trace:
        connection = PGconn.connect_start(conninfo.encode())
        connection.trace(trace.fileno())
        while (status := connection.connect_poll()) not in (PollingStatus.OK, PollingStatus.FAILED):
            waiting = [connection.socket]
            reads, writes = (waiting, []) if status == PollingStatus.READING else ([], waiting)
            if not any(select.select(reads, writes, [], PATIENCE)):
                break
        connection.untrace()
        trace.seek(0)
        states = re.findall(rb'\tErrorResponse\t.* C "(\w{5})"', trace.read())
    return states[-1].decode() if states else ""
