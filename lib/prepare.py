"""Prepares a database before the service serves: applies the schema, and checks what it needs.

    await prepare_database(conninfo, Path("schema.sql"), "todo.tasks", STATEMENTS)

All changes are one transaction, so a start that fails leaves the database as it was.
"""

import asyncio
import hashlib
import logging
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import psycopg
from psycopg import AsyncConnection, IsolationLevel, errors

from lib.connect_errors import NotReady, explain
from pgpipeline import Statement

STARTUP_TIMEOUT = 30.0  # seconds that the start may take, whatever it waits for
QUIET = 3.0  # seconds until it logs what it waits for
POOLER_TIMEOUT = 2.0  # seconds after which a pooler is taken to have one server connection only

# An ALTER that waits for a lock stops every session behind it, so it waits for 2 s at a time.
LOCK = """
SELECT set_config('lock_timeout', '2s', true), set_config('search_path', 'pg_catalog', true),
    pg_advisory_xact_lock(hashtext(%s))
"""
APPLIED = "SELECT obj_description(to_regclass(%s), 'pg_class')"
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
    unnest(%(privileges)s::text[]) AS privilege
WHERE nspname = %(schema)s AND nspname || '.' || relname = ANY (%(tables)s)
    AND (NOT has_table_privilege(pg_class.oid, privilege)
        OR row_security_active(pg_class.oid) AND NOT EXISTS (
            SELECT
            FROM pg_policies LEFT JOIN pg_roles ON rolname = ANY (roles)
            WHERE schemaname = nspname AND tablename = relname AND permissive = 'PERMISSIVE'
                AND cmd IN ('ALL', privilege)
                AND (roles = '{public}' OR pg_has_role(pg_roles.oid, 'USAGE'))
        ))
"""

log = logging.getLogger("postgres")


async def prepare_database(
    conninfo: str, schema: Path, table: str, statements: Iterable[Statement]
) -> None:
    """Applies a schema that is not the one applied last, and checks every statement.

    `table` (schema.name) is one that the schema makes. Its comment becomes the schema's SHA-256.
    Raises NotReady, after STARTUP_TIMEOUT where waiting may help.
    """
    # libpq asks for these as it connects, and has no parameter for them. Poolers refuse `options`,
    # and what SET has set would stay for their next client.
    os.environ["PGTZ"], os.environ["PGDATESTYLE"] = "UTC", "ISO"
    start = Start(conninfo, schema.read_bytes(), table, list(statements))  # noqa: ASYNC240
    task = asyncio.create_task(start.run())
    done, _ = await asyncio.wait({task}, timeout=QUIET)
    if not done:
        start.warn()
        done, _ = await asyncio.wait({task}, timeout=STARTUP_TIMEOUT - QUIET)
    if not done:
        task.cancel()  # and not awaited: psycopg would wait for an answer to its own cancellation
        raise NotReady(f"no database after {STARTUP_TIMEOUT:.0f} seconds: {start.state}")
    task.result()


class Start:
    """A start that is under way: `state` is what it waits for, or why the last attempt failed."""

    state = "the start waits for a connection"
    connection: AsyncConnection[Any]

    def __init__(self, conninfo: str, schema: bytes, table: str, statements: list[Statement]):
        self.conninfo, self.schema, self.table = conninfo, schema, table
        self.statements, self.warned = statements, set[str]()

    def warn(self) -> None:
        """Logs the state, and one that comes again and again once."""
        if self.state not in self.warned:
            log.warning("%s", self.state)
        self.warned.add(self.state)

    async def run(self) -> None:
        while True:
            try:
                return await self.attempt()
            except errors.LockNotAvailable:
                self.state = "the start waits for a lock on a table, or for another instance's"
            except psycopg.OperationalError as error:
                self.state = await explain(error, self.conninfo)
            except psycopg.Error as error:
                raise NotReady(f"the schema is not valid: {error.diag.message_primary}") from None
            self.warn()
            await asyncio.sleep(0.5)

    async def attempt(self) -> None:
        connection = await AsyncConnection.connect(self.conninfo, autocommit=True)
        async with connection as self.connection:
            self.state = (
                "the start waits for an answer: a pooler may have no server connection free"
            )
            await self.check_session()
            # A stricter level would read from before the lock what another instance has applied.
            await connection.set_isolation_level(IsolationLevel.READ_COMMITTED)
            async with connection.transaction():
                self.state = "the start waits for a lock, or for an answer"
                applied = await self.apply_schema()
                await self.check_privileges()
                await self.check_statements()
            if applied:
                log.info("schema applied")

    async def rows(self, query: str, values: Any = None) -> list[Any]:
        return await (await self.connection.execute(query.encode(), values)).fetchall()

    async def check_session(self) -> None:
        """Raises NotReady for an encoding, a time zone or a pooler that would falsify answers."""
        [(pid, encoding, zone, style)] = await self.rows(SESSION)
        if encoding != "UTF8":
            create = "CREATE DATABASE todo ENCODING 'UTF8' TEMPLATE template0"
            raise NotReady(f"the database has the encoding {encoding}, it has to be UTF8: {create}")
        if not re.fullmatch("(Etc/)?(UTC|UCT|GMT)", zone) or not style.startswith("ISO"):
            alter = f"ALTER ROLE {self.connection.info.user} SET"
            text = f"{alter} timezone = 'UTC'; {alter} datestyle = 'ISO'"
            raise NotReady(f"a pooler keeps the time zone {zone} and the DateStyle {style}: {text}")
        if pid != self.connection.info.backend_pid:  # which is one that a pooler made up
            await check_pooler(self.conninfo, self.connection)

    async def apply_schema(self) -> bool:
        """Applies the schema unless its SHA-256 is the comment on the table. Returns if it did.

        The lock lets one of many instances do it. A role that may not change tables goes on, and
        so does a database that is read-only: the checks tell whether the schema there is enough.
        """
        digest = hashlib.sha256(self.schema).hexdigest()
        await self.rows(LOCK, [self.table])
        try:
            async with self.connection.transaction():
                if await self.rows(APPLIED, [self.table]) == [(digest,)]:
                    return False
                await self.connection.execute(self.schema)
                comment = f"COMMENT ON TABLE {self.table} IS '{digest}'"
                await self.connection.execute(comment.encode())
        except (errors.InsufficientPrivilege, errors.ReadOnlySqlTransaction) as error:
            log.warning("the schema was not applied: %s", error.diag.message_primary)
            return False
        return True

    async def check_privileges(self) -> None:
        """Raises NotReady with what this role lacks on the tables that the statements name."""
        read_only = await self.rows("SHOW transaction_read_only") == [("on",)]
        text = b" ".join(each.text for each in self.statements).decode()
        needed = {
            "schema": self.table.partition(".")[0],
            "tables": re.findall(r"\b\w+\.\w+", text),
            "privileges": ["SELECT"] if read_only else ["SELECT", "INSERT", "UPDATE", "DELETE"],
        }
        if missing := sorted(each for (each,) in await self.rows(MISSING, needed)):
            role = f"the role {self.connection.info.user} lacks"
            raise NotReady(f"{role} {', '.join(missing)}: see docs/DATABASES.md")

    async def check_statements(self) -> None:
        """Prepares each statement. Raises NotReady with PostgreSQL's words about one that fails."""
        for each in self.statements:
            name = b"check_" + each.prepared_name
            query = b"PREPARE %b AS %b; DEALLOCATE %b" % (name, each.text, name)
            try:
                await self.connection.execute(query)
            except psycopg.ProgrammingError as error:
                text = f"{each.name}: {error.diag.message_primary}"
                raise NotReady(f"the schema does not fit this release: {text}") from None


async def check_pooler(conninfo: str, connection: AsyncConnection[Any]) -> None:
    """Raises NotReady for a pooler that mixes up prepared statements, as PgBouncer before 1.21.

    While a second session is in a transaction, the first one gets another server connection, which
    knows none of its statements. A pooler that has one server connection mixes up nothing.
    """
    try:
        other = await AsyncConnection.connect(conninfo)
    except psycopg.OperationalError:
        return
    async with other:
        try:
            await connection.execute("SELECT 1", prepare=True)
            await other.execute("SELECT 1")
            again = asyncio.create_task(connection.execute("SELECT 1", prepare=True))
            await asyncio.wait({again}, timeout=POOLER_TIMEOUT)
            await other.rollback()  # so that its server connection is free for the first one
            await again
        except (errors.InvalidSqlStatementName, errors.DuplicatePreparedStatement):
            text = "a pooler that mixes up prepared statements: PgBouncer needs to be 1.21 or newer"
            raise NotReady(f"DATABASE_URL leads to {text}, with max_prepared_statements") from None
