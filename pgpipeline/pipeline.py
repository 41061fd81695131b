"""A pipeline: a connection that carries the queries of many callers, one behind the other.

No query waits for the answer to the one before it. A Sync follows each query, so each is a
transaction of its own, and an error never touches a neighbour
(https://www.postgresql.org/docs/current/libpq-pipeline-mode.html).
"""

import asyncio
import logging
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from enum import Enum
from time import monotonic
from typing import TYPE_CHECKING

import psycopg
from psycopg.pq import ExecStatus
from psycopg.pq.abc import PGresult

from pgpipeline.connection import Connection
from pgpipeline.errors import RETRYABLE, Unavailable, error_of, sqlstate_of
from pgpipeline.queue import Query
from pgpipeline.result import Result

if TYPE_CHECKING:
    from pgpipeline.pool import PipelinePool

CANCEL_TIMEOUT = 2.0  # seconds for the answer to a cancelled query, before its connection is lost
STATEMENT_TIMEOUT = 1.0  # seconds until a statement is cancelled, if other queries wait
SLOW = 0.1  # seconds without an answer, beyond the round trip, after which a query is slow
MAX_HOLD = 60.0  # seconds until a busy connection is released, so that the pool can replace it

# Prepared, or done without rows; or not executed, after the error of the Parse before it.
NO_ANSWER = {ExecStatus.COMMAND_OK, ExecStatus.PIPELINE_ABORTED}

log = logging.getLogger("pgpipeline")


class State(Enum):
    """What a pipeline does with its connection. README.md has the diagram."""

    ACQUIRING = "waits for a connection"
    ACTIVE = "takes queries"
    DRAINING = "takes no more queries, and then releases its connection"
    BROKEN = "takes no more queries, and then closes its connection"
    CLOSED = "has no connection"


class Pipeline:
    """Acquires a connection, keeps queries under way on it, and releases it when it is idle."""

    connection: Connection

    def __init__(self, pool: "PipelinePool") -> None:
        self.pool, self.state = pool, State.ACQUIRING
        self.serves_slow = False  # the pool sends slow tenants' queries here, and no others
        self.sent: deque[Query] = deque()  # queries under way, in the order of their answers
        self.answer: PGresult | None = None  # to the first of them, until its Sync comes
        self.unflushed = False
        # On the clock of time.monotonic():
        self.active_since = 0.0
        self.waiting_since = 0.0  # for the answer to the first query sent

    def __repr__(self) -> str:
        return f"<Pipeline {self.state.name} {len(self.sent)} under way>"

    # Acquiring and releasing a connection...

    async def run(self) -> None:
        """The life of a pipeline, from its connection to its end."""
        connections = self.pool.connections
        try:
            self.connection = await connections.acquire()
            try:
                await self.serve()
            except Exception as error:
                await self.lose(error)
            finally:
                if self.state is State.BROKEN or self.sent:
                    await connections.discard(self.connection)
                else:
                    await connections.release(self.connection)
        finally:
            self.state = State.CLOSED
            self.pool.closed(self)

    async def serve(self) -> None:
        """Steps when the socket is ready, and looks at the time after each SLOW seconds.

        psycopg's wait() would do, but registers the socket for each step: that takes 10 us, and
        PostgreSQL sends a page of 30 KB in four.
        """
        loop, self.socket = asyncio.get_running_loop(), self.connection.pgconn.socket
        self.end: asyncio.Future[None] = loop.create_future()
        self.state, self.active_since = State.ACTIVE, monotonic()
        loop.add_reader(self.socket, self.step)
        try:
            self.pool.dispatch()
            while not self.end.done():
                await asyncio.wait([self.end], timeout=SLOW)
                self.step(self.watch)
            self.end.result()
        finally:
            self.finish()  # when this task is cancelled

    def step(self, watch: Callable[[], None] | None = None) -> None:
        """Handles what has come and sends what waits. `watch` looks at the time in between."""
        if self.end.done():
            return
        try:
            self.connection.pgconn.consume_input()
            self.receive()
            if watch:
                watch()
            if self.state is not State.ACTIVE and not self.sent:
                self.finish()
        except Exception as error:
            self.finish(error)
        self.flush()
        self.pool.dispatch()

    def finish(self, error: Exception | None = None) -> None:
        """Ends serve(), with an error for a connection that is lost."""
        if self.end.done():
            return
        self.state = State.BROKEN if error else State.DRAINING if self.is_active else self.state
        loop = asyncio.get_running_loop()
        # At once: libpq may have closed the socket, and the next one to open gets its number.
        for remove in (loop.remove_writer, loop.remove_reader):
            with suppress(OSError):  # asyncio tells the kernel about a socket that is closed
                remove(self.socket)
        self.end.set_exception(error) if error else self.end.set_result(None)

    async def lose(self, error: Exception) -> None:
        """Settles what was under way on a lost connection.

        A write may have been executed, so it is not sent again. After AdminShutdown it was not.
        """
        log.warning("connection lost: %s", type(error).__name__)
        not_executed = isinstance(error, psycopg.errors.AdminShutdown)
        for query in self.sent:
            self.pool.queue.ended(query, self, quickly=False)
            lost = Unavailable("connection lost")
            if not_executed or query.statement.reads_only:
                self.pool.retry(query, lost)
            elif not query.result.done():
                query.result.set_exception(lost)
        if not not_executed:  # what happened to this connection may have happened to all
            await self.pool.connections.drain()

    # Sending queries...

    @property
    def is_active(self) -> bool:
        return self.state is State.ACTIVE

    def is_silent(self, now: float) -> bool:
        """Whether the first query sent is slow. Nothing is sent behind it."""
        return bool(self.sent) and now - self.waiting_since > SLOW + self.connection.round_trip

    def send(self, query: Query) -> None:
        """Puts a query under way. flush() gives it to the kernel."""
        if not self.sent:
            self.waiting_since = monotonic()
        self.sent.append(query)
        self.unflushed = True
        name, pgconn = query.statement.prepared_name, self.connection.pgconn
        try:
            if name not in self.connection.prepared:
                self.connection.prepared.add(name)
                pgconn.send_prepare(name, query.statement.text)
            pgconn.send_query_prepared(name, query.values)
            pgconn.pipeline_sync()  # without it, all that is under way were one transaction
        except psycopg.OperationalError as error:
            self.finish(error)

    def flush(self) -> None:
        """Gives the kernel what was sent. What does not fit is left to step()."""
        if not self.unflushed or self.end.done():
            return
        loop = asyncio.get_running_loop()
        try:
            self.unflushed = bool(self.connection.pgconn.flush())
            if self.unflushed:
                loop.add_writer(self.socket, self.step)
            else:
                loop.remove_writer(self.socket)
        except psycopg.OperationalError as error:
            self.finish(error)

    # Receiving results...

    def receive(self) -> None:
        """Handles the results that have come. Raises psycopg.Error on a broken connection."""
        pgconn, separated = self.connection.pgconn, False
        while self.sent and not pgconn.is_busy():
            result = pgconn.get_result()
            if result:
                self.handle(result)
            elif separated:
                # libpq separates two results by one None. After two of them nothing will come,
                # so an answer is missing and all that follow would go to the wrong callers.
                raise psycopg.OperationalError("an answer is missing")
            separated = not result

    def handle(self, result: PGresult) -> None:
        """Keeps a query's answer, and settles the query when its Sync comes.

        Rows leave PostgreSQL before the commit, so only the Sync says that a write is stored.
        Raises AdminShutdown when the server has ended the session (57P01) and no rows came: then
        nothing was committed. After rows it may have been, and libpq will report the connection.
        """
        if result.status == ExecStatus.PIPELINE_SYNC:
            now = monotonic()
            quickly = not self.is_silent(now)
            query, answer, self.answer = self.sent.popleft(), self.answer, None
            self.waiting_since = self.pool.last_answer = now
            self.pool.queue.ended(query, self, quickly)
            self.settle(query, answer)
        elif result.status not in NO_ANSWER:
            if not self.answer and sqlstate_of(result) == "57P01":
                raise psycopg.errors.AdminShutdown
            self.answer = result

    def settle(self, query: Query, answer: PGresult | None) -> None:
        """Gives a query its result, its error, or another attempt."""
        if answer is None or answer.status == ExecStatus.TUPLES_OK:
            if not query.result.done():
                query.result.set_result(Result(answer))
            return
        statement, sqlstate = query.statement, sqlstate_of(answer)
        if sqlstate == "26000":
            self.connection.prepared.discard(statement.prepared_name)
        if sqlstate == "0A000":
            statement.renew()
        if sqlstate == "25006":  # the connection leads to a standby, so it is not for reuse
            self.state = State.BROKEN
        error = error_of(statement.name, answer)
        if sqlstate in RETRYABLE and not query.cancelled_at:
            self.pool.retry(query, error, sqlstate)
        elif not query.result.done():
            query.result.set_exception(error)

    # Watching the time...

    def watch(self) -> None:
        """Looks at the time, about every SLOW seconds. Raises TimeoutError for a dead connection.

        A query that is slow is noted. It is cancelled when its caller has left, or when others
        have waited for STATEMENT_TIMEOUT.
        """
        now, connections = monotonic(), self.pool.connections
        is_wanted = connections.get_stats()["requests_waiting"]
        is_idle = not self.sent and now - max(self.waiting_since, self.active_since) > SLOW
        if self.is_active and (is_idle or is_wanted or now - self.active_since > MAX_HOLD):
            self.state = State.DRAINING
        if not self.is_silent(now):
            return
        query, silence = self.sent[0], now - self.waiting_since
        if query.cancelled_at and now - query.cancelled_at > CANCEL_TIMEOUT:
            raise TimeoutError  # neither an answer nor an error: nobody is there
        self.pool.queue.found_slow(query.tenant)
        holds_up = silence > STATEMENT_TIMEOUT and (len(self.sent) > 1 or self.pool.queue)
        if (holds_up or query.result.done()) and not query.cancelled_at:
            query.cancelled_at = now
            task = asyncio.create_task(self.cancel())
            self.pool.cancelling.add(task)
            task.add_done_callback(self.pool.cancelling.discard)

    async def cancel(self) -> None:
        """Asks PostgreSQL to cancel what it executes. The answer to that query tells whether it
        did."""
        with suppress(psycopg.Error, OSError):
            await self.connection.cancel_safe(timeout=CANCEL_TIMEOUT)
