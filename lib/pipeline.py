"""Queries of many requests share a few connections, by libpq's pipeline mode over psycopg's pool.

    ADD = Statement("ADD", "SELECT %(a)s::integer + %(b)s::integer")
    reads = PipelinePool(ConnectionPool(conninfo, max_size=8), size=2, max_pipeline=16)
    [(total,)] = await reads.execute(ADD, {"a": 1, "b": 2})  # total == b"3"

No query waits for the answer to the one before it. A Sync follows each query and makes it a
transaction of its own, so an error never touches a neighbour
(https://www.postgresql.org/docs/current/libpq-pipeline-mode.html).
"""

import asyncio
import hashlib
import logging
import re
from collections import deque
from collections.abc import Mapping
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from time import monotonic, time
from typing import Any
from uuid import UUID

import psycopg
from opentelemetry import trace
from psycopg.generators import fetch
from psycopg.pq import DiagnosticField, ExecStatus
from psycopg.pq.abc import PGresult
from psycopg_pool import AsyncConnectionPool, PoolTimeout

from lib.rows import Column, columns_of

QUERY_TIMEOUT = 5.0  # seconds until a query has failed, wherever it has spent them
STATEMENT_TIMEOUT = 1.0  # seconds until a statement is cancelled, if other queries wait behind it
BATCHING = 0.002  # seconds that queries wait for the next answer of a busy connection: near a
# database that comes sooner, and one packet takes them all; far from it they go after this
SLOW = 0.1  # seconds without an answer after which a connection gets no more queries
SLOW_MEMORY = 2.0  # seconds for which the queries of a user with a slow one go one at a time
MAX_HOLD = 60.0  # seconds until a busy connection goes back, so that the pool can replace it
MAX_IDLE = 15.0  # seconds after which an idle connection is tested before it is used
MAX_ATTEMPTS = 3  # of a query that has not run yet
MAX_QUEUE = 2000  # queries that may wait for a connection; a request weighs some 20 KB

# SQLSTATEs that mean: the statement has not run, and may be sent again.
RETRYABLE = {
    "0A000",  # a table's columns changed under a prepared statement
    "25006",  # read-only transaction
    "26000",  # the prepared statement does not exist: DEALLOCATE ALL, or it was refused before
    "40001",  # serialization failure
    "40P01",  # deadlock
    "42P05",  # the prepared statement exists already
    "57014",  # cancelled: our cancellation of the statement before it came late
}
# Prepared, or done without rows; not run, after the error of the Parse before it.
NO_ANSWER = {ExecStatus.COMMAND_OK, ExecStatus.PIPELINE_ABORTED}

log = logging.getLogger("pipeline")
tracer = trace.get_tracer("pipeline")

Value = str | bool | int | UUID | list[int] | None
Rows = list[tuple[Any, ...]]  # each column as bytes in PostgreSQL's text format, or None


class Unavailable(Exception):
    """The database did not answer in time, or cannot now. A write may have been made or not."""


class InvalidValue(Exception):
    """PostgreSQL refused a value: SQLSTATE class 22, or a check constraint. Nothing was stored."""


class UniqueViolation(Exception):
    """A row like this is there already. The argument is the constraint. Nothing was stored."""


class ForeignKeyViolation(Exception):
    """The row referred to is missing. The argument is the constraint. Nothing was stored."""


class UnexpectedError(Exception):
    """No request should be able to cause it. The argument says what may be logged."""


class Statement:
    """SQL with %(name)s parameters, numbered as the protocol wants them.

    The name on the server ends in a digest of the text, as behind a pooler another release may
    have prepared its own.
    """

    def __init__(self, name: str, text: str) -> None:
        self.name = name
        names = self.parameters = list(dict.fromkeys(re.findall(r"%\((\w+)\)s", text)))
        numbered = re.sub(r"%\((\w+)\)s", lambda found: f"${names.index(found[1]) + 1}", text)
        self.text = numbered.encode()
        self.reads_only = text.lstrip().startswith("SELECT")
        self.generation = 0
        self.renew()

    def renew(self) -> None:
        """Lets each connection prepare it anew: the columns of its tables have changed."""
        self.generation += 1
        digest = hashlib.sha256(self.text).hexdigest()[:16]
        self.prepared_name = f"{self.name}_{digest}_{self.generation}".encode()
        self.columns: list[Column] = []  # known once there was an answer


@dataclass(slots=True, eq=False)
class Query:
    """A statement with its values, and the future that gets its rows."""

    statement: Statement
    values: list[bytes | None]
    user_id: str
    result: asyncio.Future[Rows]
    attempts: int = 1
    cancelled: bool = False


class Connection(psycopg.AsyncConnection[Any]):
    """A connection in pipeline mode that knows which statements it has prepared."""

    prepared: set[bytes]
    last_used: float  # by the wall clock: CLOCK_MONOTONIC stands still in a suspended machine

    async def configure(self) -> None:
        self.prepared, self.last_used = set(), time()
        self.pgconn.enter_pipeline_mode()

    async def check(self) -> None:
        """Raises psycopg.Error when the server has gone.

        Only a connection that rested is asked: that takes a round trip, and reading 1 us.
        """
        self.pgconn.consume_input()  # finds PostgreSQL's last message
        self.pgconn.consume_input()  # finds the end of the stream behind it
        if time() - self.last_used > MAX_IDLE:
            self.pgconn.pipeline_sync()
            self.pgconn.flush()
            await self.wait(fetch(self.pgconn), timeout=1)


class ConnectionPool(AsyncConnectionPool[Connection]):
    """psycopg's pool, which connects, limits and replaces. borrow() gives live connections."""

    def __init__(self, conninfo: Any, max_size: int) -> None:
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

    async def borrow(self) -> Connection:
        while True:
            try:  # again after half a second: being asked is what makes the pool connect
                connection = await self.getconn(timeout=0.5)
            except PoolTimeout:
                continue
            try:
                await connection.check()
                return connection
            except psycopg.Error:  # for the other idle ones the server may have gone as well
                await connection.close()
                await self.putconn(connection)
                await self.drain()


class PipelinePool:
    """A queue, and up to `size` pipelines that send at most `max_pipeline` queries at a time."""

    def __init__(self, connections: ConnectionPool, size: int, max_pipeline: int) -> None:
        self.connections, self.size, self.max_pipeline = connections, size, max_pipeline
        self.queue: deque[Query] = deque()
        self.pipelines: dict[Pipeline, asyncio.Task[None]] = {}
        self.scheduled, self.last_answer = False, float("-inf")
        self.timer: asyncio.TimerHandle | None = None
        self.slow_until: dict[str, float] = {}  # by user

    async def execute(
        self, statement: Statement, values: Mapping[str, Value], user_id: str = ""
    ) -> Rows:
        """Gives the rows of a statement. Raises the exceptions above.

        One user's slow statements run one at a time.
        """
        encoded = [encode(values[name]) for name in statement.parameters]
        if len(self.queue) >= MAX_QUEUE:
            raise Unavailable("the queue is full")
        loop = asyncio.get_running_loop()
        query = Query(statement, encoded, user_id, loop.create_future())
        # In two steps: if the loop stood still, an answer may wait.
        timeout = loop.call_later(QUERY_TIMEOUT, loop.call_later, SLOW, expire, query)
        self.put(query)
        try:
            with span_of(statement):
                return await query.result
        finally:
            timeout.cancel()

    def put(self, *queries: Query) -> None:
        """Queues queries. They are sent with all others that come in this turn of the loop."""
        self.queue += queries
        if not self.scheduled:
            self.scheduled = True
            asyncio.get_running_loop().call_soon(self.dispatch)

    def dispatch(self, answered: "Pipeline | None" = None) -> None:
        """Sends what is queued where the fewest queries are under way, and flushes once.

        Of a user with a slow query, one is under way at a time: the others stay in the queue.
        """
        self.scheduled, now, held = False, monotonic(), []
        slow = self.slow_until = {user: t for user, t in self.slow_until.items() if t > now}
        busy = {query.user_id for p in self.pipelines for query in p.sent} if slow else set()
        usable = [p for p in self.pipelines if p.usable and p.silence(now) < SLOW]
        ready = [p for p in usable if p is answered or not p.sent or now > p.last_sent + BATCHING]
        while self.queue and ready:
            pipeline = min(ready, key=lambda pipeline: len(pipeline.sent))
            if len(pipeline.sent) >= self.max_pipeline:
                break
            query = self.queue.popleft()
            if query.user_id in slow and query.user_id in busy:
                held.append(query)
            elif not query.result.done():
                pipeline.send(query)
                busy.add(query.user_id)
        if self.queue and len(ready) < len(usable) and not self.timer:
            self.timer = asyncio.get_running_loop().call_later(BATCHING, self.dispatch_later)
        full = all(len(pipeline.sent) > 1 for pipeline in usable) if usable else bool(self.queue)
        self.queue.extendleft(reversed(held))
        for pipeline in ready:
            pipeline.flush()
        if full and len(self.pipelines) < self.size:
            pipeline = Pipeline(self)
            self.pipelines[pipeline] = asyncio.create_task(pipeline.run())

    def dispatch_later(self) -> None:
        self.timer = None
        self.dispatch()

    def reject(self, query: Query, error: Exception, retry: bool) -> None:
        """Queues a query again where that is safe, or gives it its error."""
        if query.result.done():
            return
        if retry and query.attempts < MAX_ATTEMPTS:
            query.attempts += 1
            self.put(query)
        else:
            query.result.set_exception(error)

    def seconds_since_answer(self) -> float:
        return monotonic() - self.last_answer

    async def close(self) -> None:
        tasks = list(self.pipelines.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class Pipeline:
    """Borrows a connection, keeps queries under way on it, and gives it back when none is left."""

    connection: Connection

    def __init__(self, pool: PipelinePool) -> None:
        self.pool = pool
        self.sent: deque[Query] = deque()
        self.answer: PGresult | None = None  # to the first query sent, until its Sync comes
        self.usable = False  # there is a connection, and it does not have to go back
        self.spoiled = self.unflushed = False
        self.since = self.last_sent = self.last_received = 0.0

    async def run(self) -> None:
        connections = self.pool.connections
        try:
            self.connection = await connections.borrow()
            try:
                await self.drive()
            except Exception as error:
                await self.abandon(error)
            finally:
                self.connection.last_used = time()
                if self.spoiled or self.sent:
                    await self.connection.close()
                await connections.putconn(self.connection)
        finally:
            del self.pool.pipelines[self]
            self.pool.put()

    async def abandon(self, error: Exception) -> None:
        """Settles the queries of a lost connection. What has not run, or only reads, runs again."""
        log.warning("connection lost: %s", type(error).__name__)
        self.spoiled = True
        not_run = isinstance(error, psycopg.errors.AdminShutdown)
        for query in self.sent:
            retry = not_run or query.statement.reads_only
            self.pool.reject(query, Unavailable("connection lost"), retry)
        if not not_run:  # what happened to this connection may have happened to all
            await self.pool.connections.drain()

    async def drive(self) -> None:
        """Takes a step when the socket is ready, and after each SLOW seconds, until the end.

        psycopg's wait() would do, but registers the socket anew for each step: that takes 10 us,
        and PostgreSQL sends a page of 30 KB in four.
        """
        loop, self.socket = asyncio.get_running_loop(), self.connection.pgconn.socket
        self.end: asyncio.Future[None] = loop.create_future()
        self.usable, self.since = True, monotonic()
        loop.add_reader(self.socket, self.step)
        try:
            self.pool.dispatch()
            while not self.end.done():
                await asyncio.wait([self.end], timeout=SLOW)
                self.step(ready=False)
            self.end.result()
        finally:
            self.finish(None)  # when drive() is cancelled

    def step(self, ready: bool = True) -> None:
        """Handles what has come, and sends what waits.

        The end comes after SLOW seconds without a query, or when the connection has to go back.
        """
        if self.end.done():
            return
        try:
            self.connection.pgconn.consume_input()
            now = monotonic()
            self.receive(now)
            if not ready:
                self.enforce_timeouts(now)
            if not self.sent and not (self.usable and ready):
                self.finish(None)
        except Exception as error:
            self.finish(error)
        self.flush()
        if self.pool.queue:
            self.pool.dispatch(answered=self if ready else None)

    def finish(self, error: Exception | None) -> None:
        """Ends drive(). libpq may have closed the socket: the next one to open has its number."""
        if self.end.done():
            return
        self.usable, loop = False, asyncio.get_running_loop()
        for remove in (loop.remove_writer, loop.remove_reader):
            with suppress(OSError):  # asyncio tells the kernel about a socket that is closed
                remove(self.socket)
        self.end.set_exception(error) if error else self.end.set_result(None)

    def send(self, query: Query) -> None:
        if not self.sent:
            self.last_received = monotonic()
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
        self.last_sent, loop = monotonic(), asyncio.get_running_loop()
        try:
            self.unflushed = bool(self.connection.pgconn.flush())
            if self.unflushed:
                loop.add_writer(self.socket, self.step)
            else:
                loop.remove_writer(self.socket)
        except psycopg.OperationalError as error:
            self.finish(error)

    def receive(self, now: float) -> None:
        """Handles the results that have come. Raises psycopg.Error on a broken connection."""
        pgconn, separated = self.connection.pgconn, False
        while self.sent and not pgconn.is_busy():
            result = pgconn.get_result()
            if result:
                self.last_received = now
                self.handle(result)
            elif separated:  # one None stands between two results; behind two nothing comes
                raise psycopg.OperationalError
            separated = not result

    def handle(self, result: PGresult) -> None:
        """Settles a query when its Sync comes: only then it is committed.

        Raises AdminShutdown when the server ended the session before it sent rows: they leave
        PostgreSQL before the commit.
        """
        if result.status == ExecStatus.PIPELINE_SYNC:
            query, answer, self.answer = self.sent.popleft(), self.answer, None
            self.settle(query, answer)
        elif result.status not in NO_ANSWER:
            if not self.answer and field_of(result, DiagnosticField.SQLSTATE) == "57P01":
                raise psycopg.errors.AdminShutdown
            self.answer = result

    def settle(self, query: Query, answer: PGresult | None) -> None:
        """Gives a query its rows, its error, or another attempt."""
        statement = query.statement
        if answer is None or answer.status == ExecStatus.TUPLES_OK:
            self.pool.last_answer = self.last_received
            if answer and not statement.columns:
                statement.columns = columns_of(answer)
            if not query.result.done():
                query.result.set_result(rows_of(answer) if answer else [])
            return
        sqlstate = field_of(answer, DiagnosticField.SQLSTATE)
        if sqlstate == "26000":
            self.connection.prepared.discard(statement.prepared_name)
        if sqlstate == "0A000":
            statement.renew()
        if sqlstate == "25006":  # since a failover the connection may lead to a standby
            self.usable, self.spoiled = False, True
        retry = sqlstate in RETRYABLE and not query.cancelled
        self.pool.reject(query, error_of(statement, sqlstate, answer), retry)

    def silence(self, now: float) -> float:
        """Seconds that the first query sent has waited for its answer."""
        return now - self.last_received if self.sent else 0.0

    def enforce_timeouts(self, now: float) -> None:
        """Remembers whose query is slow, and cancels one that nobody waits for, or others behind.

        A connection that others wait for is given back, and after MAX_HOLD in any case. Raises
        TimeoutError for one that stays silent.
        """
        silence, connections = self.silence(now), self.pool.connections
        if now - self.since > MAX_HOLD or connections.get_stats()["requests_waiting"]:
            self.usable = False
        if silence < SLOW:
            return
        if silence > QUERY_TIMEOUT + 3 * SLOW:
            raise TimeoutError
        query = self.sent[0]
        if query.user_id:
            self.pool.slow_until[query.user_id] = now + SLOW_MEMORY
        holds_up = silence > STATEMENT_TIMEOUT and (len(self.sent) > 1 or self.pool.queue)
        if (holds_up or query.result.done()) and not query.cancelled:
            query.cancelled = True
            task = asyncio.create_task(self.connection.cancel_safe(timeout=QUERY_TIMEOUT))
            task.add_done_callback(asyncio.Task.exception)


def span_of(statement: Statement) -> Any:
    """A span for a statement, where a request is traced. An unwanted one would take 6 us."""
    if not trace.get_current_span().is_recording():
        return nullcontext()
    attributes = {"db.system.name": "postgresql", "db.query.summary": statement.name}
    kind = trace.SpanKind.CLIENT
    return tracer.start_as_current_span(statement.name, kind=kind, attributes=attributes)


def expire(query: Query) -> None:
    if not query.result.done():
        query.result.set_exception(Unavailable("no answer in time"))


def encode(value: Value) -> bytes | None:
    """A value in PostgreSQL's text format. Raises InvalidValue for what it cannot hold."""
    if value is None:
        return None
    text = "{" + ",".join(map(str, value)) + "}" if isinstance(value, list) else str(value)
    encoded = text.encode(errors="surrogatepass")  # PostgreSQL refuses a lone surrogate
    if b"\0" in encoded:  # libpq would send the text up to here
        raise InvalidValue("22021")
    return encoded


def rows_of(result: PGresult) -> Rows:
    columns, value = range(result.nfields), result.get_value
    return [tuple([value(row, column) for column in columns]) for row in range(result.ntuples)]


def field_of(result: PGresult, field: DiagnosticField) -> str:
    return (result.error_field(field) or b"").decode(errors="replace")


def error_of(statement: Statement, sqlstate: str, result: PGresult) -> Exception:
    """The exception for an SQLSTATE. Only class 42, a fault of our SQL, keeps PostgreSQL's text:
    any other may repeat the user's input."""
    if sqlstate in {"23505", "23503"}:
        kind = UniqueViolation if sqlstate == "23505" else ForeignKeyViolation
        return kind(field_of(result, DiagnosticField.CONSTRAINT_NAME))
    if sqlstate[:2] == "22" or sqlstate in {"23514", "23502"}:
        return InvalidValue(sqlstate)
    if sqlstate[:2] in {"08", "40", "53", "57"} or sqlstate in {"25006", "55P03"}:
        return Unavailable(f"{statement.name}: {sqlstate}")
    text = field_of(result, DiagnosticField.MESSAGE_PRIMARY) if sqlstate[:2] == "42" else ""
    return UnexpectedError(f"{statement.name}: {sqlstate} {text}".strip())
