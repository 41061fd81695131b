"""A pipeline: one connection at work. It takes queries, looks at the time, and ends."""

import asyncio
import logging
from contextlib import suppress
from enum import IntEnum
from time import monotonic
from typing import TYPE_CHECKING, Any

import psycopg.errors as postgres

from pgpipeline.connection import Connection
from pgpipeline.protocol import Protocol
from pgpipeline.queue import Query

if TYPE_CHECKING:
    from pgpipeline.pool import PipelinePool

SLOW = 0.1  # seconds without an answer, beyond the round trip, after which a query is slow
STATEMENT_TIMEOUT = 1.0  # seconds until a statement is cancelled, if other queries wait
CANCEL_TIMEOUT = 2.0  # seconds for the answer to a cancelled query, before its connection is lost
MAX_HOLD = 60.0  # seconds until a busy connection is released, so that the pool can replace it

log = logging.getLogger("pgpipeline")


class State(IntEnum):
    """What a pipeline does with its connection. README.md has the diagram."""

    ACTIVE = 1  # takes queries
    DRAINING = 2  # takes no more queries, and releases its connection when none is under way
    BROKEN = 3  # as DRAINING, but closes it


class Pipeline:
    """Keeps queries under way on a connection, and releases it when it is idle.

    What comes of a query, and where another one comes from, is the pool's to say.
    """

    def __init__(self, pool: "PipelinePool", connection: Connection) -> None:
        self.pool, self.connection, self.state = pool, connection, State.ACTIVE
        self.protocol = Protocol(connection.pgconn, connection.prepared)
        self.socket = connection.pgconn.socket
        self.sent = self.protocol.sent
        self.patience = SLOW + connection.round_trip  # seconds until the first of them is slow
        self.is_standby = False  # the server is read-only
        self.cancelled: Query | None = None  # until any answer is 57014
        # Done when nothing more will come: with an error if the connection is lost.
        self.end: asyncio.Future[Exception | None] = asyncio.get_running_loop().create_future()
        # On the clock of time.monotonic():
        self.active_since = monotonic()
        self.waiting_since = self.active_since  # for the next answer or, if nothing is sent, query
        self.cancelled_at = 0.0

    def advance(self, state: State) -> None:
        """Enters a state, unless a later one was entered before. Nothing else sets `state`."""
        self.state = max(self.state, state)

    # Its life, from a connection acquired to one released...

    async def run(self) -> None:
        """Takes queries until it drains or breaks, and then releases the connection.

        psycopg's wait() would do, but registers the socket for each step: that takes 10 us, and
        PostgreSQL sends a page of 30 KB in four.
        """
        try:
            asyncio.get_running_loop().add_reader(self.socket, self.step)
            self.pool.dispatch()
            while not self.end.done():
                await asyncio.wait([self.end], timeout=SLOW)
                self.step()  # if the process stood still, an answer may lie in the socket
                await self.watch()
        finally:
            await self.release()

    def finish(self, error: Exception | None = None) -> None:
        """Ends the work, because nothing is under way or the connection is lost."""
        if self.end.done():
            return
        if error:
            is_ours = not isinstance(error, (postgres.Error, OSError))  # a mistake in our code
            log.warning("connection lost: %s", type(error).__name__, exc_info=is_ours and error)
        # Without an error, the pool may have been closed with queries under way.
        self.advance(State.BROKEN if error or self.sent else State.DRAINING)
        loop = asyncio.get_running_loop()
        # At once: libpq may have closed the socket, and the next one to open gets its number.
        for remove in (loop.remove_writer, loop.remove_reader):
            with suppress(OSError, ValueError):  # it may be closed, or was never known
                remove(self.socket)
        self.end.set_result(error)

    async def release(self) -> None:
        """Releases the connection. One that is BROKEN is closed."""
        self.finish()  # it has not been called if this task was cancelled
        try:
            if self.state is State.BROKEN:
                await self.connection.close()
                if self.end.result() or self.is_standby:  # others may be no better
                    await self.pool.connections.drain()
        finally:  # this task may be cancelled once more
            self.pool.give_back(self, self.end.result())
            await self.pool.connections.release(self.connection)

    # Queries and their answers...

    def send(self, query: Query) -> None:
        """Puts a query under way."""
        if not self.sent:
            self.waiting_since = monotonic()
        try:
            if self.protocol.send(query):
                asyncio.get_running_loop().add_writer(self.socket, self.flush)
        except Exception as error:
            self.finish(error)

    def flush(self) -> None:
        """Gives the kernel what it did not take before, whenever it takes more."""
        try:
            if not self.protocol.pgconn.flush():
                asyncio.get_running_loop().remove_writer(self.socket)
        except postgres.OperationalError as error:
            self.finish(error)

    def step(self) -> None:
        """Handles what has come, which may make room for queries that wait."""
        if self.end.done():
            return
        try:
            for query, outcome in self.protocol.receive():
                now = monotonic()
                quickly = now - self.waiting_since <= self.patience
                self.waiting_since = self.pool.last_answer = now
                self.pool.queue.ended(query, self, quickly)
                self.pool.settle(query, outcome, self.cancelled)
                if isinstance(outcome, postgres.ReadOnlySqlTransaction):
                    self.is_standby = True
                    self.advance(State.BROKEN)
                    self.pool.drain()
                if isinstance(outcome, postgres.QueryCanceled):
                    self.cancelled = None
        except Exception as error:
            self.finish(error)
        if self.state is not State.ACTIVE and not self.sent:
            self.finish()
        self.pool.dispatch()

    # Watching the time...

    def is_silent(self, now: float) -> bool:
        """Whether the first query under way is slow."""
        return bool(self.sent) and now - self.waiting_since > self.patience

    def is_usable(self, now: float) -> bool:
        """Whether queries may be sent. Nothing is sent behind a slow one."""
        return self.state is State.ACTIVE and not self.is_silent(now)

    async def watch(self) -> None:
        """Drains the pipeline when that is due, and cancels a query that should not go on."""
        now = monotonic()
        is_idle = not self.sent and now - self.waiting_since > SLOW
        is_old = now - self.active_since > MAX_HOLD
        if is_idle or is_old or self.pool.is_connection_wanted():
            self.advance(State.DRAINING)
            self.step()  # which ends it if nothing is under way
        if self.end.done() or not self.is_silent(now):
            return
        query, queue = self.sent[0], self.pool.queue
        queue.found_slow(query.tenant)
        if query is self.cancelled:
            if now - self.cancelled_at > CANCEL_TIMEOUT:
                self.finish(TimeoutError())  # the server or the way to it has gone
            return
        is_over = now - self.waiting_since > STATEMENT_TIMEOUT
        others_wait = len(self.sent) > 1 or query.tenant.line or queue.is_held_up(self)
        if query.result.done() or (is_over and others_wait):
            self.cancelled, self.cancelled_at = query, now
            await self.cancel()

    async def cancel(self) -> None:
        """Cancels what PostgreSQL executes on the connection. Waits, but not beyond the end."""
        task = asyncio.create_task(self.connection.cancel_safe(timeout=CANCEL_TIMEOUT))
        ends: list[asyncio.Future[Any]] = [task, self.end]
        try:
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        finally:
            if not task.done() or task.exception():
                # It may still be on its way to a query of whoever acquires the connection next.
                self.advance(State.BROKEN)
                task.cancel()
