"""What the start refuses in a database. Each check raises NotReady for what its docstring names."""

import asyncio
import re

import psycopg
from psycopg import AsyncConnection, AsyncRawCursor, errors

from lib.connect_errors import NotReady
from pgpipeline import Statement

SESSION = """
SELECT pg_backend_pid(), current_setting('server_encoding'), current_setting('TimeZone'),
    current_setting('DateStyle')
"""
READ_ONLY = "SELECT current_setting('transaction_read_only')::boolean"
# What the role may do with no column of a table, or, under row level security, by no policy.
MISSING = """
SELECT privilege || ' on ' || nspname || '.' || relname
    || CASE WHEN row_security_active(pg_class.oid) THEN ' by a policy' ELSE '' END
FROM pg_class JOIN pg_namespace ON pg_namespace.oid = relnamespace,
    unnest(%(privileges)s::text[]) AS privilege
WHERE nspname || '.' || relname = ANY (%(tables)s)
    AND (NOT CASE privilege WHEN 'DELETE' THEN has_table_privilege(pg_class.oid, privilege)
            ELSE has_any_column_privilege(pg_class.oid, privilege) END
        OR row_security_active(pg_class.oid) AND NOT EXISTS (
            SELECT FROM pg_policies, unnest(roles) AS role
            WHERE schemaname = nspname AND tablename = relname AND cmd IN ('ALL', privilege)
                AND permissive = 'PERMISSIVE'
                AND CASE role WHEN 'public' THEN true ELSE pg_has_role(role, 'USAGE') END
        ))
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
    except (errors.InvalidSqlStatementName, errors.DuplicatePreparedStatement):
        text = "a pooler that mixes up prepared statements: PgBouncer needs to be 1.21 or newer"
        raise NotReady(f"DATABASE_URL leads to {text}, with max_prepared_statements") from None
    except psycopg.OperationalError:  # the pooler lets one client in: it has nothing to mix up
        return


async def check_statements(
    connection: AsyncConnection, statements: list[Statement], refusal: str
) -> None:
    """What statements lack: privileges, tables, columns, functions, unique indexes.

    In a read-only database only reads are checked. `refusal` goes behind what the schema lacks.
    """
    [(read_only,)] = await (await connection.execute(READ_ONLY)).fetchall()
    served = [each for each in statements if each.reads_only or not read_only]
    text = b" ".join(each.text for each in served).decode()
    privileges = list(set(re.findall(r"\b(?:SELECT|INSERT|UPDATE|DELETE)\b", text)))
    needed = {"tables": re.findall(r"\b\w+\.\w+", text), "privileges": privileges}
    found = await (await connection.execute(MISSING, needed)).fetchall()
    if missing := sorted(each for (each,) in found):
        role = f"the role {connection.info.user} lacks"
        raise NotReady(f"{role} {', '.join(missing)}: see docs/DATABASES.md")
    for each in served:
        await check_statement(connection, each, refusal)


async def check_statement(connection: AsyncConnection, statement: Statement, refusal: str) -> None:
    """EXPLAIN plans it and does not run it. PREPARE would not look for privileges and indexes."""
    try:
        async with connection.transaction():
            nulls = [None] * len(statement.parameters)
            await AsyncRawCursor(connection).execute(b"EXPLAIN " + statement.text, nulls)
    except errors.NullValueNotAllowed:
        pass  # by Citus, which finds nothing else amiss: it wants a value for a shard's column
    except errors.InsufficientPrivilege as error:
        text = f"the role {connection.info.user} may not run {statement.name}"
        raise NotReady(f"{text}: {error.diag.message_primary}: see docs/DATABASES.md") from None
    except (psycopg.ProgrammingError, psycopg.DataError) as error:
        text = f"the schema does not fit this release: {statement.name}"
        raise NotReady(f"{text}: {error.diag.message_primary}{refusal}") from None
