"""What a service does with PostgreSQL before it serves: settings, schema, and a look at its SQL."""

import asyncio
import hashlib
import logging
import os
import re
from collections.abc import Iterable
from pathlib import Path
from time import monotonic
from typing import Any

import psycopg
from psycopg import AsyncConnection, conninfo, errors

from pgpipeline import Statement

STARTUP_TIMEOUT = 30.0  # seconds that start-up waits for an absent database, or for a lock
LOCK_TIMEOUT = "2s"  # for each lock of the schema: an ALTER that waits stops all other sessions

# What waiting does not cure. libpq gives no SQLSTATE for these, only PostgreSQL's text.
HOPELESS = re.compile(
    r"password authentication failed|does not exist|no pg_hba\.conf entry|could not translate host"
    r"|[Nn]ame or service not known|invalid .*(port|sslmode)|does not support SSL|not permitted"
    r"|no such database"  # PgBouncer's
)
OF_PRISMA = re.compile(r"(?<=[?&])(pgbouncer|connection_limit|pool_timeout|schema)=[^&]*&?")

# libpq asks for these as it connects. Poolers refuse `options`, and would keep what SET has set.
os.environ["PGTZ"], os.environ["PGDATESTYLE"] = "UTC", "ISO"

log = logging.getLogger("postgres")


class NotReady(Exception):
    """The service cannot start. The argument is one line for its operator."""


def connection_string(database_url: str) -> str:
    """DATABASE_URL over our defaults, without the parameters that only Prisma knows.

    Raises SystemExit with one line, and without the value: that may hold a password.
    """
    url = OF_PRISMA.sub("", database_url).rstrip("?&")
    if not url:
        raise SystemExit("DATABASE_URL is not set: the service needs a PostgreSQL database")
    ours: dict[str, Any] = {"application_name": "todo", "client_encoding": "utf8"}
    ours |= {"connect_timeout": 3, "keepalives_idle": 30}
    try:
        return conninfo.make_conninfo("", **ours | conninfo.conninfo_to_dict(url))
    except psycopg.ProgrammingError:
        form = "postgresql://user:password@host/database"
        raise SystemExit(f"DATABASE_URL is not of the form {form}") from None


async def prepare_database(
    conninfo: str, schema: Path, table: str, statements: Iterable[Statement]
) -> None:
    """Applies the schema and prepares every statement.

    Waits up to STARTUP_TIMEOUT for the database and for locks. Raises NotReady.
    """
    give_up, text = monotonic() + STARTUP_TIMEOUT, schema.read_bytes()  # noqa: ASYNC240
    logged = ""
    while True:
        try:
            await apply_schema(conninfo, text, table)
            return await check_statements(conninfo, statements)
        except errors.LockNotAvailable:
            error = "the schema waits for a lock on a table"
        except psycopg.OperationalError as failure:
            lines = [line for line in str(failure).splitlines() if line[:1].strip()]  # no hints
            error = f"DATABASE_URL does not work: {lines[-1]}"
            if HOPELESS.search(error):
                raise NotReady(error) from None
        except psycopg.Error as failure:
            raise NotReady(f"the schema is not valid: {failure.diag.message_primary}") from None
        if monotonic() > give_up:
            raise NotReady(f"no database after {STARTUP_TIMEOUT:.0f} seconds: {error}")
        if error != logged:
            log.warning("%s; trying again", logged := error)
        await asyncio.sleep(0.5)


async def apply_schema(conninfo: str, schema: bytes, table: str) -> None:
    """Applies a schema unless its SHA-256 stands in the comment on `table`.

    The advisory lock lets one of many instances do it, and ends with the transaction. A role that
    may not change tables goes on: check_statements() tells whether the schema there is enough.
    """
    digest = hashlib.sha256(schema).hexdigest()
    async with await AsyncConnection.connect(conninfo, prepare_threshold=None) as connection:
        await connection.execute(f"SET LOCAL lock_timeout = '{LOCK_TIMEOUT}'")
        await connection.execute("SELECT pg_advisory_xact_lock(hashtext('todo schema'))")
        applied = "SELECT obj_description(to_regclass(%s), 'pg_class')"
        if await (await connection.execute(applied, [table])).fetchone() == (digest,):
            return
        try:
            await connection.execute(schema)
            await connection.execute(f"COMMENT ON TABLE {table} IS '{digest}'".encode())
            log.info("schema applied")
        except errors.InsufficientPrivilege:
            await connection.rollback()
            log.warning("the schema was not applied: this role may not change tables")


async def check_statements(conninfo: str, statements: Iterable[Statement]) -> None:
    """Prepares each statement once. Raises NotReady with PostgreSQL's words about one that fails.

    Then it looks for a pooler that mixes up prepared statements (PgBouncer before 1.21): while a
    second session is in a transaction, the first gets another server, which knows none of its own.
    """
    connect = AsyncConnection.connect
    async with await connect(conninfo, autocommit=True) as one, await connect(conninfo) as other:
        try:
            for statement in statements:
                name = b"check_" + statement.prepared_name
                await one.execute(b"PREPARE %b AS %b; DEALLOCATE %b" % (name, statement.text, name))
            await one.execute("SELECT 1", prepare=True)
            await other.execute("SELECT 1", prepare=False)
            await one.execute("SELECT 1", prepare=True)
        except errors.InvalidSqlStatementName:
            text = "a pooler that mixes up prepared statements: PgBouncer needs to be 1.21 or newer"
            raise NotReady(f"DATABASE_URL leads to {text}, with max_prepared_statements") from None
        except psycopg.ProgrammingError as error:
            text = f"{statement.name}: {error.diag.message_primary}"
            raise NotReady(f"the schema does not fit this release: {text}") from None
