"""Prepares a database before the service serves: applies the schema, and checks what it needs.

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
import re
from pathlib import Path
from time import monotonic
from typing import Any

import psycopg
from psycopg import AsyncConnection, AsyncRawCursor, IsolationLevel, errors, sql

from lib.connect_errors import NotReady, explain
from pgpipeline import Statement

STARTUP_TIMEOUT = 30.0  # seconds that a start may wait
QUIET = 3.0  # seconds after which it logs what it waits for

WAITING = "the start waits for a lock, or for a pooler without a free connection"
APPLYING = "the schema is being applied"  # without a limit of time

# An ALTER that waits for a lock stops every session behind it, so it waits for 2 s at a time. One
# that runs may take longer than a timeout of a role or a database. PostgreSQL 17 has two.
LOCK = """
SELECT set_config('lock_timeout', '2s', true), set_config('statement_timeout', '0', true),
    CASE WHEN current_setting('transaction_timeout', true) IS NOT NULL
        THEN set_config('transaction_timeout', '0', true) END,
    set_config('search_path', 'pg_catalog', true), pg_advisory_xact_lock(hashtext(%s))
"""
COMMENT = "SELECT coalesce(obj_description(to_regclass(%s), 'pg_class'), '')"
SESSION = """
SELECT pg_backend_pid(), current_setting('server_encoding'), current_setting('TimeZone'),
    current_setting('DateStyle')
"""
MISSING = """
SELECT 'USAGE on schema ' || nspname
FROM pg_namespace
WHERE nspname = %(schema)s AND NOT has_schema_privilege(oid, 'USAGE')
UNION ALL
SELECT 'EXECUTE on function ' || proname
FROM pg_proc JOIN pg_namespace ON pg_namespace.oid = pronamespace
WHERE nspname = %(schema)s AND NOT has_function_privilege(pg_proc.oid, 'EXECUTE')
UNION ALL
SELECT privilege || ' on ' || nspname || '.' || relname
    || CASE WHEN row_security_active(pg_class.oid) THEN ' by a policy' ELSE '' END
FROM pg_class JOIN pg_namespace ON pg_namespace.oid = relnamespace,
    unnest('{SELECT,INSERT,UPDATE,DELETE}'::text[]) AS privilege
WHERE nspname || '.' || relname = ANY (%(tables)s)
    AND (privilege = 'SELECT' OR NOT current_setting('transaction_read_only')::boolean)
    AND (NOT has_table_privilege(pg_class.oid, privilege)
        OR row_security_active(pg_class.oid) AND NOT EXISTS (
            SELECT FROM pg_policies, unnest(roles) AS role
            WHERE schemaname = nspname AND tablename = relname AND cmd IN ('ALL', privilege)
                AND permissive = 'PERMISSIVE'
                AND CASE role WHEN 'public' THEN true ELSE pg_has_role(role, 'USAGE') END
        ))
"""

Connection = AsyncConnection[Any]
log = logging.getLogger("postgres")


async def prepare_database(
    conninfo: str, schema: Path, table: str, statements: list[Statement]
) -> None:
    """Applies a schema that was not applied before, and checks every statement. Raises NotReady.

    `table` (schema.name), which it makes, has the comment.
    """
    # libpq asks for these as it connects, and has no parameter for them. Poolers refuse `options`,
    # and what SET has set would stay for their next client.
    os.environ["PGTZ"], os.environ["PGDATESTYLE"] = "UTC", "ISO"
    start, deadline = Start(conninfo, schema, table, statements), monotonic() + STARTUP_TIMEOUT
    while monotonic() < deadline:
        if await start.attempt(deadline):
            return
        start.report()
        await asyncio.sleep(0.5)
    raise NotReady(f"not ready after {STARTUP_TIMEOUT:.0f} seconds: {start.state}")


class Start:
    """A start: `state` is what it does or waits for, or why the last attempt failed."""

    def __init__(self, conninfo: str, schema: Path, table: str, statements: list[Statement]):
        self.conninfo, self.table, self.statements = conninfo, table, statements
        self.schema, self.reported = schema.read_bytes(), set[str]()
        self.state, self.refusal = "the start waits for a connection", ""

    def report(self, level: int = logging.WARNING) -> None:
        """Logs the state, and one that comes again and again once."""
        if self.state not in self.reported:
            log.log(level, "%s", self.state)
        self.reported.add(self.state)

    async def attempt(self, deadline: float) -> bool:
        """Whether one succeeded by the deadline of monotonic(). NotReady: no other will either."""
        task = asyncio.create_task(self.prepare())
        await asyncio.wait([task], timeout=min(QUIET, deadline - monotonic()))
        if not task.done():
            self.report()
            await asyncio.wait([task], timeout=deadline - monotonic())
        if not task.done() and self.state != APPLYING:
            task.cancel()  # and not awaited: psycopg would wait for an answer to its cancellation
            return False
        try:
            await task
            return True
        except errors.LockNotAvailable:
            self.state = "the start waits for a lock on a table, or for another instance"
        except psycopg.OperationalError as error:  # a deadlock, a full disk, or no connection
            self.state = error.diag.message_primary or await explain(error, self.conninfo)
        except psycopg.Error as error:
            raise NotReady(f"{self.state}: {error.diag.message_primary or error}") from None
        return False

    async def prepare(self) -> None:
        async with await AsyncConnection.connect(self.conninfo, autocommit=True) as connection:
            self.state = WAITING
            await check_session(connection, self.conninfo)
            # A stricter level would not see what another instance has applied under the lock.
            await connection.set_isolation_level(IsolationLevel.READ_COMMITTED)
            async with connection.transaction():
                await connection.execute(LOCK, [self.table])
                await self.apply(connection)
                await check_privileges(connection, self.table, self.statements)
                for each in self.statements:
                    await check_statement(connection, each, self.refusal)
            if self.state == APPLYING:
                log.info("schema applied")

    async def apply(self, connection: Connection) -> None:
        """Applies the schema unless it was applied or may not be. The state tells."""
        digest = hashlib.sha256(self.schema).hexdigest()
        try:
            async with connection.transaction():
                [(comment,)] = await fetch(connection, COMMENT, [self.table])
                if digest in comment:  # if it is not the last one, a newer release has followed
                    return
                self.state = APPLYING
                self.report(logging.INFO)
                await connection.execute(self.schema)
                [(comment,)] = await fetch(connection, COMMENT, [self.table])  # it may have moved
                table, text = sql.Identifier(*self.table.split(".")), f"{comment} {digest}".strip()
                await connection.execute(sql.SQL("COMMENT ON TABLE {} IS {}").format(table, text))
        except (errors.InsufficientPrivilege, errors.ReadOnlySqlTransaction) as error:
            reason = f"the schema was not applied: {error.diag.message_primary}"
            log.warning("%s", reason)
            self.refusal, self.state = f"; {reason}", WAITING


# Checks. Each raises NotReady for what its docstring names.


async def fetch(connection: Connection, query: str, values: Any = None) -> list[Any]:
    return await (await connection.execute(query.encode(), values)).fetchall()


async def check_session(connection: Connection, conninfo: str) -> None:
    """An encoding or a pooler that falsifies answers."""
    [(pid, encoding, zone, style)] = await fetch(connection, SESSION)
    if encoding != "UTF8":
        text = f"the database has the encoding {encoding}, it has to be UTF8"
        raise NotReady(f"{text}: CREATE DATABASE app ENCODING 'UTF8' TEMPLATE template0")
    if not re.fullmatch("(Etc/)?(UTC|UCT|GMT)", zone) or not style.startswith("ISO"):
        alter = f"ALTER ROLE {connection.info.user} SET"
        text = f"a pooler keeps the time zone {zone} and the DateStyle {style}"
        raise NotReady(f"{text}: {alter} timezone = 'UTC'; {alter} datestyle = 'ISO'")
    if pid != connection.info.backend_pid:  # which is one that a pooler made up
        await check_pooler(connection, conninfo)


async def check_pooler(connection: Connection, conninfo: str) -> None:
    """A pooler that mixes up prepared statements, as PgBouncer before 1.21.

    While a second session is in a transaction, the first one gets another server connection, if
    there is one. It knows none of the first one's statements.
    """
    try:
        async with await AsyncConnection.connect(conninfo) as other:
            await connection.execute("SELECT 1", prepare=True)
            await other.execute("SELECT 1")
            again = asyncio.create_task(connection.execute("SELECT 1", prepare=True))
            await asyncio.wait({again}, timeout=2)
            await other.rollback()  # so that the pooler's only server connection is free
            await again
    except (errors.InvalidSqlStatementName, errors.DuplicatePreparedStatement):
        text = "a pooler that mixes up prepared statements: PgBouncer needs to be 1.21 or newer"
        raise NotReady(f"DATABASE_URL leads to {text}, with max_prepared_statements") from None
    except psycopg.OperationalError:  # the pooler lets one client in: it has nothing to mix up
        return


async def check_privileges(connection: Connection, table: str, statements: list[Statement]) -> None:
    """Privileges that the role lacks in the schema of `table`."""
    text = b" ".join(each.text for each in statements).decode()
    needed = {"schema": table.partition(".")[0], "tables": re.findall(r"\b\w+\.\w+", text)}
    if missing := sorted(each for (each,) in await fetch(connection, MISSING, needed)):
        role = f"the role {connection.info.user} lacks"
        raise NotReady(f"{role} {', '.join(missing)}: see docs/DATABASES.md")


async def check_statement(connection: Connection, statement: Statement, refusal: str) -> None:
    """A table, a column or a unique index that it needs and the schema lacks.

    EXPLAIN plans a statement and does not run it. PREPARE would not look for the index.
    """
    try:
        async with connection.transaction():
            nulls = [None] * len(statement.parameters)
            await AsyncRawCursor(connection).execute(b"EXPLAIN " + statement.text, nulls)
    except (errors.InsufficientPrivilege, psycopg.DataError):
        pass  # planned: a role may only read, and Citus wants a value for a shard's column
    except psycopg.ProgrammingError as error:
        text = f"the schema does not fit this release: {statement.name}"
        raise NotReady(f"{text}: {error.diag.message_primary}{refusal}") from None
