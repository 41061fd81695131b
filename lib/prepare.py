"""Prepares a database before the service serves: applies the schema, and checks what it needs.

    await prepare_database(conninfo, Path("schema.sql"), "todo.tasks", STATEMENTS)

All changes are one transaction, so a start that fails leaves the database as it was.
"""

import asyncio
import hashlib
import logging
import os
import re
import select
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import psycopg
from psycopg import AsyncConnection, IsolationLevel, errors
from psycopg.pq import PGconn, PollingStatus

from pgpipeline import Statement

STARTUP_TIMEOUT = 30.0  # seconds that the start may take, whatever it waits for
QUIET = 3.0  # seconds until it logs what it waits for
POOLER_TIMEOUT = 2.0  # seconds after which a pooler is taken to have one server connection only

# What waiting does not cure: by SQLSTATE, or by the English of libpq and of poolers.
HOPELESS_STATES = ("0A", "22", "28", "3D", "42", "55000")
HOPELESS = re.compile(
    r"certificate|private key|not support SSL|channel binding|weak sslmode|invalid .*(value|port)"
    r"|no password supplied|authentication (failed|method)|could not translate|not known|No address"
    r"|received invalid|expected authentication|unsupported startup|no such (database|user)"
    r"|does not exist|not (be )?found|is not specified|is disabled|not permitted|no pg_hba"
)

# An ALTER that waits for a lock stops every session behind it, so it waits for 2 s at a time.
LOCK = """
SELECT set_config('lock_timeout', '2s', true), set_config('search_path', 'pg_catalog', true),
    pg_advisory_xact_lock(hashtext(%s))
"""
APPLIED = """
SELECT obj_description(pg_class.oid, 'pg_class')
FROM pg_class JOIN pg_namespace ON pg_namespace.oid = relnamespace
WHERE nspname || '.' || relname = %s
"""
SESSION = """
SELECT pg_backend_pid(), current_setting('server_encoding'), current_setting('TimeZone'),
    current_setting('DateStyle'), current_setting('default_transaction_isolation')
"""
# How a statement uses a table. Any use takes SELECT too, for WHERE, RETURNING or ON CONFLICT.
USES = re.compile(r"\b(INSERT|UPDATE|DELETE|)(?: INTO| FROM|FROM|JOIN|) (\w+\.\w+)")
MISSING = """
SELECT 'USAGE on schema ' || nspname
FROM pg_namespace
WHERE nspname = %(schema)s AND NOT has_schema_privilege(oid, 'USAGE')
UNION ALL
SELECT 'EXECUTE on function ' || proname
FROM pg_proc JOIN pg_namespace ON pg_namespace.oid = pronamespace
WHERE nspname = %(schema)s AND NOT has_function_privilege(pg_proc.oid, 'EXECUTE')
UNION ALL
SELECT privilege || ' on ' || name
    || CASE WHEN row_security_active(pg_class.oid) THEN ' by a policy' ELSE '' END
FROM unnest(%(names)s::text[], %(privileges)s::text[]) AS needed (name, privilege)
JOIN pg_namespace ON nspname = %(schema)s
JOIN pg_class ON relnamespace = pg_namespace.oid AND nspname || '.' || relname = name
WHERE NOT has_table_privilege(pg_class.oid, privilege)
    OR row_security_active(pg_class.oid) AND NOT EXISTS (
        SELECT
        FROM pg_policies LEFT JOIN pg_roles ON rolname = ANY (roles)
        WHERE schemaname = nspname AND tablename = relname AND permissive = 'PERMISSIVE'
            AND cmd IN ('ALL', privilege)
            AND (roles = '{public}' OR pg_has_role(pg_roles.oid, 'USAGE'))
    )
"""

log = logging.getLogger("postgres")


class NotReady(Exception):
    """The service cannot start. The argument is one line for its operator."""


async def prepare_database(
    conninfo: str, schema: Path, table: str, statements: Iterable[Statement]
) -> None:
    """Applies a schema that is not the one applied last, and checks every statement.

    `table` (schema.name) is one that the schema makes; its comment becomes the schema's SHA-256.
    Waits up to STARTUP_TIMEOUT for the database, a pooler or locks, and logs it. Raises NotReady.
    """
    # libpq asks for these as it connects, and has no parameter for them. Poolers refuse `options`,
    # and what SET has set would stay for their next client.
    os.environ["PGTZ"], os.environ["PGDATESTYLE"] = "UTC", "ISO"
    start = Start(conninfo, schema.read_bytes(), table, list(statements))  # noqa: ASYNC240
    task = asyncio.create_task(start.run())
    done, _ = await asyncio.wait({task}, timeout=QUIET)
    if not done and not start.failure:
        log.warning("the start waits for %s", start.waits_for)
    done, _ = await asyncio.wait({task}, timeout=STARTUP_TIMEOUT - QUIET)
    if done:
        return task.result()
    task.cancel()  # and not awaited: psycopg would wait for an answer to its own cancellation
    reason = start.failure or f"the start waits for {start.waits_for}"
    raise NotReady(f"no database after {STARTUP_TIMEOUT:.0f} seconds: {reason}")


class Start:
    """What a start waits for now, and why its last attempt failed."""

    waits_for = failure = ""
    connection: AsyncConnection[Any]

    def __init__(self, conninfo: str, schema: bytes, table: str, statements: list[Statement]):
        self.conninfo, self.schema, self.table = conninfo, schema, table
        self.statements = statements

    async def run(self) -> None:
        while True:
            try:
                return await self.attempt()
            except errors.LockNotAvailable:
                failure = "the schema waits for a lock on a table, or for another instance's start"
            except psycopg.OperationalError as error:
                failure = await explain(error, self.conninfo)
            except psycopg.Error as error:
                raise NotReady(f"the schema is not valid: {error.diag.message_primary}") from None
            if failure != self.failure:
                log.warning("%s; trying again", failure)
            self.failure = failure
            await asyncio.sleep(0.5)

    async def attempt(self) -> None:
        self.waits_for = "a connection"
        connection = await AsyncConnection.connect(self.conninfo, autocommit=True)
        async with connection as self.connection:
            self.waits_for = "an answer: a pooler may have no server connection free"
            await self.check_session()
            # A stricter level would read from before the lock what another instance has applied.
            await connection.set_isolation_level(IsolationLevel.READ_COMMITTED)
            async with connection.transaction():
                self.waits_for = "a lock, or an answer"
                applied = await self.apply_schema()
                await self.check_privileges()
                await self.check_statements()
            if applied:
                log.info("schema applied")

    async def rows(self, query: str, values: Any = None) -> list[Any]:
        return await (await self.connection.execute(query.encode(), values)).fetchall()

    async def check_session(self) -> None:
        """Raises NotReady for an encoding, a time zone or a pooler that would falsify answers."""
        [(pid, encoding, zone, style, isolation)] = await self.rows(SESSION)
        alter = f"ALTER ROLE {self.connection.info.user} SET"
        if encoding != "UTF8":
            create = "CREATE DATABASE todo ENCODING 'UTF8' TEMPLATE template0"
            raise NotReady(f"the database has the encoding {encoding}, it has to be UTF8: {create}")
        if not re.fullmatch("(Etc/)?(UTC|UCT|GMT)", zone) or not style.startswith("ISO"):
            text = f"{alter} timezone = 'UTC'; {alter} datestyle = 'ISO'"
            raise NotReady(f"a pooler keeps the time zone {zone} and the DateStyle {style}: {text}")
        if isolation != "read committed":
            text = f"{alter} default_transaction_isolation = 'read committed'"
            log.warning("transactions are %s: some of two at once will fail; %s", isolation, text)
        if pid != self.connection.info.backend_pid:  # which is one that a pooler made up
            self.waits_for = "a second connection, to check the pooler"
            await check_pooler(self.conninfo, self.connection)

    async def apply_schema(self) -> bool:
        """Applies the schema unless its SHA-256 is the comment on the table. Returns if it did.

        The lock lets one of many instances do it. A role that may not change tables goes on, and
        so does a database that is read-only: the checks tell whether the schema there is enough.
        """
        digest = hashlib.sha256(self.schema).hexdigest()
        await self.rows(LOCK, [self.table])
        if await self.rows(APPLIED, [self.table]) == [(digest,)]:
            return False
        try:
            async with self.connection.transaction():
                await self.connection.execute(self.schema)
                comment = f"COMMENT ON TABLE {self.table} IS '{digest}'"
                await self.connection.execute(comment.encode())
        except (errors.InsufficientPrivilege, errors.ReadOnlySqlTransaction) as error:
            log.warning("the schema was not applied: %s", error.diag.message_primary)
            return False
        return True

    async def check_privileges(self) -> None:
        """Raises NotReady with the privileges that the statements need and this role lacks."""
        read_only = await self.rows("SHOW transaction_read_only") == [("on",)]
        needed = set()
        for text in (statement.text.decode() for statement in self.statements):
            if read_only and not text.lstrip().startswith("SELECT"):
                continue
            for privilege, name in USES.findall(text):
                needed |= {(name, privilege or "SELECT"), (name, "SELECT")}
                needed |= {(name, "UPDATE")} if "DO UPDATE" in text else set()
        names, privileges = [name for name, _ in needed], [privilege for _, privilege in needed]
        values = {"schema": self.table.split(".")[0], "names": names, "privileges": privileges}
        if missing := sorted(each for (each,) in await self.rows(MISSING, values)):
            user = self.connection.info.user
            raise NotReady(f"the role {user} lacks {', '.join(missing)}: see docs/DATABASES.md")

    async def check_statements(self) -> None:
        """Prepares each statement. Raises NotReady with PostgreSQL's words about one that fails."""
        for each in self.statements:
            name = b"check_" + each.prepared_name
            try:
                query = b"PREPARE %b AS %b; DEALLOCATE %b" % (name, each.text, name)
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


async def explain(error: psycopg.OperationalError, conninfo: str) -> str:
    """One line about an error. Raises NotReady with it where waiting does not help."""
    lines = str(error).splitlines() or [type(error).__name__]
    # DETAIL and HINT follow the line that counts. Of several addresses one may have a server.
    line = next((line for line in lines if re.search("FATAL|ERROR", line)), lines[0])
    hopeless, sqlstate = HOPELESS.search(line), error.sqlstate
    if sqlstate is None and not hopeless:  # there was no connection
        sqlstate = await asyncio.to_thread(sqlstate_of_connecting, conninfo)
    if hopeless or (sqlstate or "").startswith(HOPELESS_STATES):
        raise NotReady(f"DATABASE_URL does not work: {line}") from None
    return f"DATABASE_URL does not work: {line}"


def sqlstate_of_connecting(conninfo: str) -> str:
    """The SQLSTATE with which a server refuses a connection, or "". Blocks for up to some seconds.

    The text may be in any language, and libpq tells the SQLSTATE to nothing but its trace.
    """
    if not hasattr(os, "memfd_create"):  # psycopg traces on Linux only
        return ""
    with os.fdopen(os.memfd_create("trace"), "rb") as trace:
        connection = PGconn.connect_start(conninfo.encode())
        connection.trace(os.dup(trace.fileno()))
        while (status := connection.connect_poll()) not in (PollingStatus.OK, PollingStatus.FAILED):
            sockets = [connection.socket]
            reads = status == PollingStatus.READING
            if not any(select.select(sockets * reads, sockets * (not reads), [], QUIET)):
                break
        connection.untrace()
        connection.finish()
        trace.seek(0)
        states = re.findall(rb'\tErrorResponse\t.* C "(\w{5})"', trace.read())
    return states[-1].decode() if states else ""
