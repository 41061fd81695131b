"""What the tests of pgpipeline share: a database, pools, and a proxy in front of the database.

The fixture `postgres` of the project around it gives the connection string of a database.
"""

import asyncio
import random
import socket
import struct
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from typing import Any, LiteralString

import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from pgpipeline import ConnectionPool, PipelinePool, Result, Statement, Value

# "a secret" stands for what a user has sent.
TABLES = """
    CREATE TABLE stored (n integer UNIQUE);
    CREATE SEQUENCE calls;
    CREATE FUNCTION fails(code text, times integer) RETURNS bigint LANGUAGE plpgsql AS $$
    DECLARE call bigint := nextval('calls');
    BEGIN
        IF call <= times THEN RAISE EXCEPTION 'a secret' USING ERRCODE = code; END IF;
        RETURN call;
    END $$
"""
OTHERS = "FROM pg_stat_activity WHERE query LIKE '%pg_sleep%' AND pid <> pg_backend_pid()"


@pytest.fixture(scope="session")
def anyio_backend() -> Any:
    """Coroutines run in uvloop: its timers come before its sockets, which is the harder order."""
    return "asyncio", {"use_uvloop": True}


@pytest.fixture(scope="session")
def database(postgres: str) -> str:
    """The connection string of a database, with a session in UTC."""
    return make_conninfo(postgres, application_name="pgpipeline", options="-c TimeZone=UTC")


@pytest.fixture
def table(database: str) -> Iterator[str]:
    """The database with a table, and a function that fails at first and counts its calls."""
    value(database, TABLES)
    yield database
    value(database, "DROP TABLE stored CASCADE; DROP SEQUENCE calls; DROP FUNCTION fails")


@asynccontextmanager
async def pool_of(
    conninfo: str, size: int = 3, depth: int = 16, max_size: int = 8
) -> AsyncIterator[PipelinePool]:
    """A pool with connections of its own."""
    async with ConnectionPool(conninfo, max_size=max_size) as connections:
        pool = PipelinePool(connections, size, depth)
        try:
            yield pool
        finally:
            await pool.close()


@pytest.fixture
async def pool(database: str) -> AsyncIterator[PipelinePool]:
    """A pool of three pipelines, each with up to 16 queries under way."""
    async with pool_of(database) as pool:
        yield pool


async def ask(pool: PipelinePool, sql: str, tenant: str = "ann", **values: Value) -> Result:
    """Executes SQL as the statement TEST."""
    return await pool.execute(Statement("TEST", sql), values, tenant=tenant)


async def start(pool: PipelinePool, sql: str, tenant: str = "ann") -> asyncio.Task[Result]:
    """A query that PostgreSQL is working on."""
    query = asyncio.create_task(ask(pool, sql, tenant))
    await asyncio.sleep(0.2)
    return query


async def seconds(pool: PipelinePool, sql: str, tenant: str) -> float:
    """How long a query takes."""
    started = time.monotonic()
    await ask(pool, sql, tenant)
    return time.monotonic() - started


def value(database: str, sql: LiteralString) -> Any:
    """Executes SQL on a connection of its own. Gives the first value, if there is one."""
    options = "-c lock_timeout=5s"  # for what a test that failed has left
    with psycopg.connect(database, autocommit=True, options=options) as connection:
        done = connection.execute(sql)
        return (done.fetchone() or [None])[0] if done.description else None


class Proxy:
    """Stands between a pool and PostgreSQL, delays what it passes on, and ends connections."""

    def __init__(self, target: str) -> None:
        self.target, self.delay = conninfo_to_dict(target), 0.0  # seconds, each way
        self.links: dict[asyncio.StreamWriter, float] = {}  # to the pool, and since when
        self.left: dict[asyncio.StreamWriter, int] = {}  # bytes until a link is cut
        self.tasks: list[asyncio.Task[None] | None] = []

    @asynccontextmanager
    async def serve(self) -> AsyncIterator[str]:
        """The connection string of the way through the proxy."""
        async with await asyncio.start_server(self.accept, "127.0.0.1", 0) as server:
            port = server.sockets[0].getsockname()[1]
            way = {"host": "127.0.0.1", "port": port, "sslmode": "disable"}
            yield make_conninfo(**(self.target | way))
        await asyncio.gather(*filter(None, self.tasks))

    async def accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.tasks.append(asyncio.current_task())
        host, port = str(self.target.get("host") or "127.0.0.1"), self.target.get("port") or 5432
        if host.startswith("/"):
            answers, server = await asyncio.open_unix_connection(f"{host}/.s.PGSQL.{port}")
        else:
            answers, server = await asyncio.open_connection(host, int(port))
        self.links[writer] = time.monotonic()
        ways = [(reader, server), (answers, writer)]
        pumps = [asyncio.create_task(self.pump(*way, writer)) for way in ways]
        await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
        del self.links[writer]
        for each in (writer, server):
            each.close()
            try:
                await asyncio.wait_for(each.wait_closed(), 0.1)
            except TimeoutError:  # what does not take its last bytes
                each.transport.abort()
            except OSError:
                pass
        await asyncio.wait(pumps)

    async def pump(
        self, source: asyncio.StreamReader, to: asyncio.StreamWriter, link: asyncio.StreamWriter
    ) -> None:
        with suppress(OSError, RuntimeError):  # the latter is uvloop's, for what is closed
            while data := await source.read(65536):
                await asyncio.sleep(self.delay)
                left = self.left.get(link, 1 << 40)
                to.write(data[:left])
                if link in self.left:
                    self.left[link] = left - len(data)
                if len(data) >= left:
                    return
                await to.drain()

    def end(self, how: str) -> None:
        """Ends a link that is beyond its handshake: the pool waits a second after a failed one."""
        live = [link for link, since in self.links.items() if time.monotonic() - since > 0.1]
        writer = random.choice(live or [None])
        if writer and how == "cut":  # FIN to both sides, in the middle of what comes
            self.left[writer] = random.choice([0, 1, 100, 1000, 20_000])
        elif writer:  # RST: that is what close() then sends
            peer, linger = writer.get_extra_info("socket"), struct.pack("ii", 1, 0)
            peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            writer.transport.abort()
