"""What the start refuses in a database. Each check raises NotReady for what its docstring names."""

import asyncio
import re
from contextlib import suppress

import psycopg
from psycopg import AsyncConnection, AsyncRawCursor, errors

from lib.connect_errors import NotReady
from pgpipeline import Statement

SESSION = """
SELECT pg_backend_pid(), current_setting('server_encoding'), current_setting('TimeZone'),
    current_setting('DateStyle')
"""
# EXPLAIN does not see that no policy of row level security lets a row pass.
WITHOUT_POLICY = """
SELECT command || ' on ' || name
FROM unnest(%s::text[]) AS name, unnest(%s::text[]) AS command
WHERE row_security_active(to_regclass(name)) AND NOT EXISTS (
    SELECT FROM pg_policies, unnest(roles) AS role
    WHERE schemaname || '.' || tablename = name AND cmd IN ('ALL', command)
        AND permissive = 'PERMISSIVE'
        AND CASE role WHEN 'public' THEN true ELSE pg_has_role(role, 'USAGE') END
)
"""


async def check_session(connection: AsyncConnection, conninfo: str) -> None:
    """An encoding or a pooler that falsifies answers."""
    [(pid, encoding, zone, style)] = await (await connection.execute(SESSION)).fetchall()
    if encoding != "UTF8":
        text = f"the database has the encoding {encoding}, it has to be UTF8"
        raise NotReady(f"{text}: CREATE DATABASE app ENCODING 'UTF8' TEMPLATE template0")
    if not re.fullmatch("(Etc/)?(UTC|UCT|GMT)", zone) or not style.startswith("ISO"):
        alter = f"ALTER ROLE {connection.info.user} SET"
        text = f"a pooler keeps the time zone {zone} and the DateStyle {style}"
        raise NotReady(f"{text}: {alter} timezone = 'UTC'; {alter} datestyle = 'ISO'")
    if pid != connection.info.backend_pid:  # which is one that a pooler made up
        await check_pooler(connection, conninfo)


async def check_pooler(connection: AsyncConnection, conninfo: str) -> None:
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
        # A pooler that does not track it keeps it for the next start. One that does renames it.
        with suppress(errors.InvalidSqlStatementName):
            await connection.execute("DEALLOCATE _pg3_0")  # psycopg's first name
    except (errors.InvalidSqlStatementName, errors.DuplicatePreparedStatement):
        text = "a pooler that mixes up prepared statements: PgBouncer needs to be 1.21 or newer"
        raise NotReady(f"DATABASE_URL leads to {text}, with max_prepared_statements") from None
    except psycopg.OperationalError:  # the pooler lets one client in: it has nothing to mix up
        return


async def check_statements(
    connection: AsyncConnection, statements: list[Statement], suffix: str
) -> None:
    """What check_statement() names. In a read-only database it looks at reads only."""
    [(read_only,)] = await (await connection.execute("SHOW transaction_read_only")).fetchall()
    for each in statements:
        if each.reads_only or read_only == "off":
            await check_statement(connection, each, suffix)


async def check_statement(connection: AsyncConnection, statement: Statement, suffix: str) -> None:
    """A table, column, function, unique index or privilege that it lacks.

    EXPLAIN looks for these and does not run it. PREPARE looks for no index and no privilege.
    `suffix` ends its line, and says why the schema was not applied.
    """
    text = statement.text.decode()
    tables = re.findall(r"\b\w+\.\w+", text)
    commands = list(dict.fromkeys(re.findall(r"\b(?:SELECT|INSERT|UPDATE|DELETE)\b", text)))
    denied = f"the role {connection.info.user} may not run {statement.name} ({', '.join(commands)})"
    try:
        async with connection.transaction():
            nulls = [None] * len(statement.parameters)
            await AsyncRawCursor(connection).execute(b"EXPLAIN " + statement.text, nulls)
    except errors.NullValueNotAllowed:
        pass  # by Citus, which finds nothing else amiss: it wants a value for a shard's column
    except errors.InsufficientPrivilege as error:
        raise NotReady(f"{denied}: {error.diag.message_primary}: see docs/DATABASES.md") from None
    except (psycopg.ProgrammingError, psycopg.DataError) as error:
        unfit = f"the schema does not fit this release: {statement.name}"
        raise NotReady(f"{unfit}: {error.diag.message_primary}{suffix}") from None
    cursor = await connection.execute(WITHOUT_POLICY, [tables, commands], prepare=False)
    if without := sorted(each for (each,) in await cursor.fetchall()):
        raise NotReady(f"{denied}: no policy for {', '.join(without)}: see docs/DATABASES.md")
