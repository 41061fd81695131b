"""Connections in libpq's pipeline mode, and psycopg's pool that opens and replaces them."""

import asyncio
from collections.abc import Callable
from time import monotonic, time
from typing import Any

import psycopg
from psycopg import waiting
from psycopg.generators import fetch
from psycopg.pq import ExecStatus
from psycopg_pool import AsyncConnectionPool, PoolTimeout

MAX_IDLE = 15.0  # seconds after which an idle connection is pinged before it is used
PING_TIMEOUT = 1.0  # seconds for the answer
MAX_ROUND_TRIP = 0.4  # seconds: whatever took longer was not the distance


class Connection(psycopg.AsyncConnection[Any]):
    """A connection in pipeline mode that knows which statements it has prepared."""

    prepared: set[bytes]
    round_trip: float  # seconds to the server and back, when the connection was made
    last_used: float  # by time.time(): time.monotonic() stands still in a suspended machine

    async def configure(self) -> None:
        """Makes a new connection ready. The pool calls it once for each."""
        self.prepared, self.last_used = set(), time()
        self.pgconn.enter_pipeline_mode()
        started = monotonic()
        await self.ping(10 * PING_TIMEOUT)  # a database that wakes up takes some
        self.round_trip = min(monotonic() - started, MAX_ROUND_TRIP)

    async def check(self) -> None:
        """Raises psycopg.Error when the server has gone.

        A server that ended the connection has said so, and reading that takes 1 us. One that
        vanished has said nothing, so a connection that was idle for MAX_IDLE is pinged too.
        """
        self.pgconn.consume_input()  # finds PostgreSQL's last message
        self.pgconn.consume_input()  # finds the end of the stream behind it
        if not 0 <= time() - self.last_used <= MAX_IDLE:  # a clock may be set back
            await self.ping(PING_TIMEOUT)

    async def ping(self, seconds: float) -> None:
        """Sends a Sync, which is a round trip without a query. Raises psycopg.Error if it fails."""
        self.pgconn.pipeline_sync()  # which libpq writes at once
        # Connection.wait(), if cancelled, would wait for up to 10 s for a server that has vanished.
        answer = await waiting.wait_async(fetch(self.pgconn), self.pgconn.socket, timeout=seconds)
        if not answer or answer.status != ExecStatus.PIPELINE_SYNC:  # such as the session's end
            raise psycopg.OperationalError("another answer than a Sync's")


class ConnectionPool(AsyncConnectionPool[Connection]):
    """psycopg's pool, which connects, limits and replaces. acquire() gives live connections."""

    def __init__(self, conninfo: Any, max_size: int) -> None:
        """`conninfo` is a connection string, or a function that gives one. Call open() first."""
        super().__init__(
            conninfo,
            connection_class=Connection,
            configure=Connection.configure,
            min_size=1,
            max_size=max_size,
            max_idle=90,  # seconds: Neon suspends after 5 idle minutes, so these go well before
            max_lifetime=1800,  # seconds
            reconnect_timeout=2,  # seconds: a pool that tries for longer waits ever longer between
            open=False,
        )
        self.drained_at = float("-inf")  # on the clock of time.monotonic()
        self.waiters: list[Callable[[], bool]] = []

    async def acquire(self, needs: Callable[[], bool] = lambda: True) -> Connection:
        """Waits for a connection that works. Raises PoolClosed, also before open().

        `needs` tells, while it waits, whether others should release a connection for it.
        """
        self.waiters.append(needs)
        try:
            while True:
                try:
                    connection = await self.getconn(timeout=1)
                except PoolTimeout:  # ask again, because that is what makes the pool connect
                    continue
                try:
                    await connection.check()
                    return connection
                except BaseException as error:
                    await connection.close()
                    await self.release(connection)
                    if not isinstance(error, psycopg.Error):  # this task was cancelled
                        raise
                await self.drain()  # the server may have gone for the other idle ones as well
        finally:
            self.waiters.remove(needs)

    def count_needed(self) -> int:
        """How many callers of acquire() need a connection of others."""
        return sum(needs() for needs in self.waiters)

    async def drain(self) -> None:
        """Closes idle connections now, and others on release. Not twice in a second, because a
        database may refuse each write for minutes."""
        if monotonic() - self.drained_at > 1:
            self.drained_at = monotonic()
            await super().drain()

    async def release(self, connection: Connection) -> None:
        """Gives a connection back, for whoever acquires next. The pool replaces a closed one."""
        connection.last_used = time()
        # Whoever waits here may be cancelled: then the pool would count the connection for ever.
        await asyncio.shield(self.putconn(connection))
