"""A pipeline: a connection that carries the queries of many callers, one behind the other.

No query waits for the answer to the one before it. A Sync follows each query, so each is a
transaction of its own, and an error never touches a neighbour
(https://www.postgresql.org/docs/current/libpq-pipeline-mode.html).
"""

import asyncio
import logging
from collections import deque
from contextlib import suppress
from enum import IntEnum
from time import monotonic
from typing import TYPE_CHECKING

import psycopg.errors as postgres
from psycopg.pq import ExecStatus
from psycopg.pq.abc import PGresult

from pgpipeline import errors
from pgpipeline.connection import Connection
from pgpipeline.queue import Query
from pgpipeline.result import Result

if TYPE_CHECKING:
    from pgpipeline.pool import PipelinePool

SLOW = 0.1  # seconds without an answer, beyond the round trip, after which a query is slow
STATEMENT_TIMEOUT = 1.0  # seconds until a statement is cancelled, if other queries wait
CANCEL_TIMEOUT = 2.0  # seconds for the answer to a cancelled query, before its connection is lost
MAX_HOLD = 60.0  # seconds until a busy connection is released, so that the pool can replace it
SUCCESS = {ExecStatus.TUPLES_OK, ExecStatus.COMMAND_OK}

log = logging.getLogger("pgpipeline")


class State(IntEnum):
    """What a pipeline does with its connection. README.md has the diagram."""

    ACQUIRING = 1  # waits for a connection
    ACTIVE = 2  # takes queries
    DRAINING = 3  # takes no more queries, and then releases its connection
    BROKEN = 4  # takes no more queries, and then closes its connection


class Pipeline:
    """Acquires a connection, keeps queries under way on it, and releases it when it is idle."""

    connection: Connection
    socket = -1  # of the connection

    def __init__(self, pool: "PipelinePool") -> None:
        self.pool, self.state = pool, State.ACQUIRING
        self.sent: deque[Query] = deque()  # queries under way, in the order of their answers
        self.answer: PGresult | None = None  # to the first of them, until its Sync comes
        self.refused: list[tuple[Query, Exception]] = []  # since the server is a standby
        self.is_cancelling = False  # a cancellation was sent, and has cancelled nothing yet
        # Done when nothing more will come: with an error if the connection is lost.
        self.end: asyncio.Future[Exception | None] = asyncio.get_running_loop().create_future()
        # On the clock of time.monotonic():
        self.active_since = 0.0
        self.waiting_since = 0.0  # for the next answer, or for a query if none is under way

    def advance(self, state: State) -> None:
        """Enters a state, unless a later one was entered before. Nothing else sets `state`."""
        self.state = max(self.state, state)

    # Acquiring and releasing a connection...

    async def run(self) -> None:
        """The life of a pipeline: it acquires a connection, serves queries, and releases it."""
        self.connection = await self.pool.connections.acquire()
        try:
            await self.serve()
        finally:
            await self.release()

    async def serve(self) -> None:
        """Takes queries until the pipeline drains or breaks, and looks at the time in between.

        psycopg's wait() would do, but registers the socket for each step: that takes 10 us, and
        PostgreSQL sends a page of 30 KB in four.
        """
        self.socket = self.connection.pgconn.socket
        asyncio.get_running_loop().add_reader(self.socket, self.step)
        self.advance(State.ACTIVE)
        self.active_since = self.waiting_since = monotonic()
        self.pool.dispatch()
        while not self.end.done():
            await asyncio.wait([self.end], timeout=SLOW)
            self.step()  # if the process stood still, an answer may lie in the socket
            await self.watch()

    def finish(self, error: Exception | None = None) -> None:
        """Ends serve(), because nothing is under way or the connection is lost."""
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
                if self.end.result() or self.refused:
                    await self.pool.connections.drain()  # the others may be lost as well
        finally:  # this task may be cancelled once more
            self.give_back()
            await self.pool.connections.release(self.connection)

    def give_back(self) -> None:
        """Has the queries without an answer sent again by other pipelines, or fails them."""
        error = self.end.result()
        for query in self.sent:
            self.pool.queue.ended(query, self, quickly=False)
            lost = errors.Unavailable("connection lost")
            if query.statement.reads_only or isinstance(error, postgres.AdminShutdown):
                self.pool.retry(query, lost)
            else:  # a write that may have been executed already
                query.fail(lost)
        for query, refusal in self.refused:
            self.pool.retry(query, refusal)

    # Sending queries...

    def send(self, query: Query) -> None:
        """Puts a query under way. What the kernel does not take now is left to flush()."""
        if not self.sent:
            self.waiting_since = monotonic()
        self.sent.append(query)
        name, pgconn = query.statement.prepared_name, self.connection.pgconn
        query.sent_by_name = name
        try:
            if name not in self.connection.prepared:
                self.connection.prepared.add(name)
                pgconn.send_prepare(name, query.statement.text)
            pgconn.send_query_prepared(name, query.values)
            # Without a Sync, all that is under way were one transaction. libpq writes with each.
            pgconn.pipeline_sync()
            if pgconn.flush():
                asyncio.get_running_loop().add_writer(self.socket, self.flush)
        except Exception as error:  # after any, nobody knows what was sent
            self.finish(error)

    def flush(self) -> None:
        """Gives the kernel what it did not take before, whenever it takes more."""
        try:
            if not self.connection.pgconn.flush():
                asyncio.get_running_loop().remove_writer(self.socket)
        except postgres.OperationalError as error:
            self.finish(error)

    # Receiving results...

    def step(self) -> None:
        """Handles what has come, which may make room for queries that wait."""
        if self.end.done():
            return
        try:
            self.connection.pgconn.consume_input()
            self.receive()
        except Exception as error:  # after any, nobody knows whose the next answer is
            self.finish(error)
        if self.state is not State.ACTIVE and not self.sent:
            self.finish()
        self.pool.dispatch()

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
                raise postgres.OperationalError("an answer is missing")
            separated = not result

    def handle(self, result: PGresult) -> None:
        """Keeps an answer until its Sync comes, because rows leave PostgreSQL before the commit."""
        status = result.status
        if status == ExecStatus.PIPELINE_SYNC:
            if not self.answer:
                raise postgres.OperationalError("an answer is missing")
            now = monotonic()
            quickly = not self.is_silent(now)
            query, answer, self.answer = self.sent.popleft(), self.answer, None
            self.waiting_since = self.pool.last_answer = now
            self.pool.queue.ended(query, self, quickly)
            try:
                self.settle(query, answer)
            except Exception as error:  # no other query has to do with it
                query.fail(error)
        elif status == ExecStatus.PIPELINE_ABORTED:
            pass  # the query was skipped: the answer is the error of its Parse, which came before
        elif status == ExecStatus.COMMAND_OK and not result.command_status:
            pass  # the statement is prepared, and the query not yet executed
        elif status in SUCCESS:
            self.answer = result
        elif status != ExecStatus.FATAL_ERROR:  # a COPY, whose results would never end
            raise postgres.NotSupportedError(ExecStatus(status).name)
        elif not self.answer and errors.ends_session(postgres.error_from_result(result)):
            # Nothing was executed, because even a write without rows sends an answer before.
            raise postgres.AdminShutdown
        else:
            self.answer = result  # instead of rows, if their commit fails

    def settle(self, query: Query, answer: PGresult) -> None:
        """Gives a query its result. An error gives it another attempt, if it was not executed."""
        if answer.status in SUCCESS:
            if not query.result.done():
                query.result.set_result(Result(answer))
            return
        reason, statement = postgres.error_from_result(answer), query.statement
        error, may_retry = errors.error_of(statement.name, reason), errors.may_retry(reason)
        if isinstance(reason, postgres.InvalidSqlStatementName):
            self.connection.prepared.discard(query.sent_by_name)
        if errors.is_outdated(reason) and query.sent_by_name == statement.prepared_name:
            statement.renew()  # once, though many queries under way were sent by the old name
        if isinstance(reason, postgres.QueryCanceled):
            # By a cancellation that came too late for another query, if one is on its way. If not,
            # it was meant for this query, or PostgreSQL's statement_timeout is over.
            may_retry = self.is_cancelling and not query.cancelled_at
            self.is_cancelling = False
        if isinstance(reason, postgres.ReadOnlySqlTransaction):
            self.refused.append((query, error))  # sent again when this pipeline has gone
            self.advance(State.BROKEN)
            self.pool.drain()
        elif may_retry:
            self.pool.retry(query, error, conflict=isinstance(reason, errors.CONFLICTS))
        else:
            query.fail(error)

    # Watching the time...

    def is_silent(self, now: float) -> bool:
        """Whether the first query under way is slow. Nothing is sent behind it."""
        return bool(self.sent) and now - self.waiting_since > SLOW + self.connection.round_trip

    async def watch(self) -> None:
        """Drains the pipeline when that is due, and cancels a query that should not go on."""
        now = monotonic()
        is_idle = not self.sent and now - self.waiting_since > SLOW
        is_old = now - self.active_since > MAX_HOLD
        if is_idle or is_old or self.pool.is_connection_wanted():
            self.advance(State.DRAINING)
            self.step()  # at once, if nothing is under way
        if self.end.done() or not self.is_silent(now):
            return
        query, queue = self.sent[0], self.pool.queue
        queue.found_slow(query.tenant)
        if query.cancelled_at:
            if now - query.cancelled_at > CANCEL_TIMEOUT:
                self.finish(TimeoutError())  # the server or the way to it has gone
            return
        # Some wait behind it, or for it by rule 3, or could be sent here.
        wait = any(tenant.line for tenant in queue.slow) or queue.find(self)
        others = len(self.sent) > 1 or self.refused or wait
        holds_up = others and now - self.waiting_since > STATEMENT_TIMEOUT
        if holds_up or query.result.done():
            query.cancelled_at, self.is_cancelling = now, True
            # What comes of it is seen in the answer to the query, which may have ended meanwhile.
            with suppress(postgres.Error, OSError):
                await self.connection.cancel_safe(timeout=CANCEL_TIMEOUT)
