"""Prepares a database before the service serves: applies the schema, and has it checked.

    await prepare_database(conninfo, Path("schema.sql"), "todo.tasks", STATEMENTS)

An attempt is one transaction, so that one that fails leaves the database as it was. It is repeated
while waiting may help, until STARTUP_TIMEOUT is over. A migration that has begun has no limit of
time: one that was ended would begin again with the next start. A table's comment lists the SHA-256
of each schema that was applied, because a role that owns its tables may not make another one.
"""

import asyncio
import hashlib
import logging
import os
from contextlib import suppress
from pathlib import Path

import psycopg
from psycopg import AsyncConnection, IsolationLevel, errors, sql

from lib.checks import check_session, check_statements
from lib.connect_errors import NotReady, explain
from pgpipeline import Statement

STARTUP_TIMEOUT = 30.0  # seconds that a start may wait
QUIET = 3.0  # seconds after which it logs what it waits for
WAITING = "the start waits for a lock, another instance, or a pooler without a free connection"
APPLYING = "the schema is being applied"

# An ALTER that waits for a lock stops every session behind it, so it waits for 2 s at a time. One
# that runs may take longer than a timeout of a role or a database. PostgreSQL 17 has two.
BEGIN_ATTEMPT = """
SELECT set_config('lock_timeout', '2s', true), set_config('statement_timeout', '0', true),
    CASE WHEN current_setting('transaction_timeout', true) IS NOT NULL
        THEN set_config('transaction_timeout', '0', true) END,
    set_config('search_path', 'pg_catalog', true), pg_advisory_xact_lock(hashtext(%s))
"""
# Ends a migration soon after its process. Its lock would stop the next start.
FOLLOW_CLIENT = "SELECT set_config('client_connection_check_interval', '2s', true)"
COMMENT = "SELECT coalesce(obj_description(to_regclass(%s), 'pg_class'), '')"

log = logging.getLogger("postgres")


async def prepare_database(
    conninfo: str, schema: Path, table: str, statements: list[Statement]
) -> None:
    """Applies `schema`, which makes `table` (schema.name); checks statements. Raises NotReady."""
    # libpq asks for these as it connects, and has no parameter for them. Poolers refuse `options`,
    # and what SET has set would stay for their next client.
    os.environ["PGTZ"], os.environ["PGDATESTYLE"] = "UTC", "ISO"
    start = Start(conninfo, schema, table, statements)
    attempts = asyncio.create_task(start.repeat())
    quiet = asyncio.get_running_loop().call_later(QUIET, start.report)
    try:
        async with start.limit:
            # Cancelled, but not awaited: psycopg would wait for an answer to its cancellation.
            await asyncio.shield(attempts)
    except TimeoutError:
        raise NotReady(f"not ready after {STARTUP_TIMEOUT:.0f} seconds: {start.state}") from None
    finally:
        attempts.cancel()
        quiet.cancel()


class Start:
    """The attempts of a start. `state` is what it does or waits for, or why the last one failed."""

    def __init__(self, conninfo: str, schema: Path, table: str, statements: list[Statement]):
        self.conninfo, self.table, self.statements = conninfo, table, statements
        self.schema, self.reported = schema.read_bytes(), set[str]()
        self.state = "the start waits for a connection"
        self.limit = asyncio.timeout(STARTUP_TIMEOUT)  # a migration lifts it
        self.deadline = self.limit.when()

    def report(self, level: int = logging.WARNING) -> None:
        """Logs the state, and one that comes again and again once."""
        if self.state not in self.reported:
            log.log(level, "%s", self.state)
        self.reported.add(self.state)

    async def repeat(self) -> None:
        """Returns when an attempt has succeeded. Raises NotReady when no other will either."""
        while True:
            try:
                return await self.attempt()
            except errors.LockNotAvailable:
                self.state = WAITING
            except psycopg.OperationalError as error:  # a deadlock, a full disk, or no connection
                self.state = error.diag.message_primary or await explain(error, self.conninfo)
            except psycopg.Error as error:
                raise NotReady(f"{self.state}: {error.diag.message_primary or error}") from None
            self.limit.reschedule(self.deadline)
            self.report()
            await asyncio.sleep(0.5)

    async def attempt(self) -> None:
        async with await AsyncConnection.connect(self.conninfo, autocommit=True) as connection:
            self.state = WAITING
            await check_session(connection, self.conninfo)
            # A stricter level would not see what another instance has applied under the lock.
            await connection.set_isolation_level(IsolationLevel.READ_COMMITTED)
            async with connection.transaction():
                await connection.execute(BEGIN_ATTEMPT, [self.table])
                suffix = await self.apply(connection)
                await check_statements(connection, self.statements, suffix)
            if self.state == APPLYING:
                log.info("schema applied")

    async def apply(self, connection: AsyncConnection) -> str:
        """Applies the schema, unless it was applied. Returns why it could not be, or ""."""
        digest = hashlib.sha256(self.schema).hexdigest()
        try:
            async with connection.transaction():
                [(comment,)] = await (await connection.execute(COMMENT, [self.table])).fetchall()
                if digest in comment:  # behind it may be those of newer releases
                    return ""
                self.state = APPLYING
                self.report(logging.INFO)
                self.limit.reschedule(None)
                with suppress(psycopg.Error):  # before PostgreSQL 14, or a system without it
                    async with connection.transaction():
                        await connection.execute(FOLLOW_CLIENT)
                await connection.execute(self.schema)
                # The schema may have moved the table here.
                [(comment,)] = await (await connection.execute(COMMENT, [self.table])).fetchall()
                table, text = sql.Identifier(*self.table.split(".")), f"{comment} {digest}".strip()
                await connection.execute(sql.SQL("COMMENT ON TABLE {} IS {}").format(table, text))
        except (errors.InsufficientPrivilege, errors.ReadOnlySqlTransaction) as error:
            self.limit.reschedule(self.deadline)
            self.state = f"the schema was not applied: {error.diag.message_primary}"
            self.report()
            return f"; {self.state}"
        return ""
