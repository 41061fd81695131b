"""The pool: takes statements of many callers, sends them by a few pipelines, and settles them."""

import asyncio
import random
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from time import monotonic

import psycopg.errors as postgres

from pgpipeline import errors
from pgpipeline.connection import ConnectionPool
from pgpipeline.errors import Unavailable
from pgpipeline.pipeline import SLOW, Pipeline, State, log
from pgpipeline.queue import FEW, Query, Queue
from pgpipeline.result import Result
from pgpipeline.statement import Statement, Value, encode

QUERY_TIMEOUT = 5.0  # seconds until a query has failed, wherever it has spent them
MAX_ATTEMPTS = 3  # to execute a query
MAX_CONFLICTS = 10  # attempts, where they end in a conflict with another transaction
OPENING = 0.3  # seconds that others wait for a pipeline that opens
PAUSE = 0.005  # seconds: a pause after a conflict is up to twice that, and doubles each time

# A context for the time that a statement takes, as tracers have it.
Span = Callable[[Statement], AbstractContextManager[object]]


class PipelinePool:
    """A fair queue, and up to `size` pipelines with at most `depth` queries under way on each."""

    def __init__(
        self, connections: ConnectionPool, size: int, depth: int, span: Span = nullcontext
    ) -> None:
        if size < 1 or depth < 1:
            raise ValueError("size and depth must be 1 or more")
        self.connections, self.size, self.depth, self.span = connections, size, depth, span
        self.queue = Queue(size)
        self.pipelines: list[Pipeline] = []
        self.tasks: set[asyncio.Task[None]] = set()  # of pipelines, and one to come
        self.last_answer = self.opened_at = float("-inf")  # on the clock of time.monotonic()
        self.is_scheduled = self.is_closed = False

    async def execute(
        self, statement: Statement, values: Mapping[str, Value], tenant: str
    ) -> Result:
        """Executes a statement in a transaction of its own, when it is the tenant's turn.

        Raises the exceptions of errors.py, Unavailable SLOW seconds after QUERY_TIMEOUT at the
        latest. Mistakes of the caller are KeyError for a value that is missing, TypeError for one
        that is no Value, and UnicodeDecodeError for a column whose name is no UTF-8.
        """
        loop = asyncio.get_running_loop()
        encoded = [encode(values[name]) for name in statement.parameters]
        query = Query(statement, encoded, tenant, loop.create_future())
        # In two steps: the loop may have stood still until the first one. Then it reads an answer
        # that lies in the socket before the second.
        late = Unavailable("no answer in time")
        timeout = loop.call_later(QUERY_TIMEOUT, loop.call_later, SLOW, query.settle, late)
        self.put(query)
        try:
            with self.span(statement):
                return await query.result
        finally:
            timeout.cancel()
            if query in self.queue.waiting:  # it has failed, or its caller has left
                self.queue.remove(query)
            del query, late  # their traceback has this frame, and would wait for the collector

    def seconds_since_answer(self) -> float:
        """Since the database has answered anything. Infinite if it never has."""
        return monotonic() - self.last_answer

    async def close(self) -> None:
        """Ends all pipelines. Queries that wait or are under way fail, and so do later ones."""
        self.is_closed = True
        for query in self.queue.waiting:
            query.settle(Unavailable("the pool is closed"))
        tasks = list(self.tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    # Sending queries...

    def put(self, query: Query) -> None:
        """Queues a query. It is sent with all others that come in this turn of the loop."""
        if self.is_closed:
            query.settle(Unavailable("the pool is closed"))
        if query.result.done():  # its caller may have left while it paused
            return
        self.queue.append(query)
        if not self.is_scheduled:
            self.is_scheduled = True
            asyncio.get_running_loop().call_soon(self.dispatch)

    def dispatch(self) -> None:
        """Sends what may be sent, and opens another pipeline if need be, by README.md's steps."""
        self.is_scheduled = False
        if self.is_closed or not self.queue.waiting:
            return
        now = monotonic()
        self.queue.forget_slow(now)
        usable = [each for each in self.pipelines if each.is_usable(now)]
        self.fill(usable.copy())
        # Another one is opened if each has so many queries under way, or if there is none.
        busy, slow = min(2, self.depth), self.queue.slow_pipelines()
        if all(len(each.sent) >= busy for each in usable if each not in slow):
            self.open_pipeline()

    def fill(self, pipelines: list[Pipeline]) -> None:
        """Sends queries where the fewest are under way, until no more may be sent."""
        # Who waits for another pipeline is not sent behind a burst.
        depth = min(self.depth, FEW) if self.opens_soon() else self.depth
        while pipelines and self.queue.waiting:
            pipeline = min(pipelines, key=lambda pipeline: len(pipeline.sent))
            if len(pipeline.sent) >= depth:
                return
            # It is not active any more when send() has found that its connection is lost.
            query = self.queue.take(pipeline) if pipeline.state is State.ACTIVE else None
            if query:
                pipeline.send(query)
            else:  # by rule 4 another pipeline may still take one
                pipelines.remove(pipeline)

    # Opening pipelines...

    def is_opening(self) -> bool:
        """Whether a pipeline waits for its connection."""
        return len(self.tasks) > len(self.pipelines)

    def opens_soon(self) -> bool:
        """Whether one has waited less than OPENING."""
        return self.is_opening() and monotonic() - self.opened_at < OPENING

    def open_pipeline(self) -> None:
        """Opens a pipeline, unless there are enough or one waits for its connection already."""
        # A tenant alone may not use the last one (rule 4).
        size = self.size if len(self.queue.tenants) > 1 else max(self.size - 1, 1)
        if len(self.tasks) < size and not self.is_opening():
            self.opened_at = monotonic()
            task = asyncio.create_task(self.run_pipeline())
            self.tasks.add(task)
            task.add_done_callback(self.tasks.discard)
            task.add_done_callback(lambda _: self.dispatch())

    async def run_pipeline(self) -> None:
        """The life of a pipeline. After one that has failed, the next one is opened later."""
        try:
            pipeline = Pipeline(self, await self.connections.acquire(self.needs_connection))
            self.pipelines.append(pipeline)
            try:
                await pipeline.run()
            finally:
                self.pipelines.remove(pipeline)
        except Exception:
            log.exception("a pipeline has failed")
            await asyncio.sleep(1)

    def needs_connection(self) -> bool:
        """Whether others should release one: none is here or soon will be."""
        return not (self.pipelines or self.opens_soon())

    def is_connection_wanted(self) -> bool:
        """Whether more callers need a connection than pipelines will release one."""
        now = monotonic()
        ending = [each for each in self.pipelines if each.state is not State.ACTIVE]
        return self.connections.count_needed() > sum(not each.is_silent(now) for each in ending)

    def drain(self) -> None:
        """Ends all pipelines, because since a failover each may lead to a standby."""
        for pipeline in self.pipelines:
            pipeline.advance(State.DRAINING)

    # Settling queries...

    def settle(self, query: Query, outcome: Result | Exception, cancelled: Query | None) -> None:
        """Settles a query, or gives it another attempt if PostgreSQL has not executed it.

        `cancelled` is the query of its pipeline that was last cancelled.
        """
        if not isinstance(outcome, postgres.Error):
            return query.settle(outcome)
        statement, may_retry = query.statement, errors.may_retry(outcome)
        if errors.is_outdated(outcome) and query.sent_by_name == statement.prepared_name:
            statement.renew()  # once, though many queries under way were sent by the old name
        if isinstance(outcome, postgres.QueryCanceled):
            # The cancellation of another query may have come too late for that one. Without any,
            # PostgreSQL's statement_timeout was over.
            may_retry = cancelled not in (None, query)
        error = errors.error_of(statement.name, outcome)
        if may_retry:
            self.retry(query, error, conflict=isinstance(outcome, errors.CONFLICTS))
        else:
            query.settle(error)

    def give_back(self, pipeline: Pipeline, error: Exception | None) -> None:
        """Sends again what has had no answer, by other pipelines, or fails it."""
        for query in pipeline.sent:
            self.queue.ended(query, pipeline, quickly=False)
            lost = Unavailable("connection lost")
            if not (query.statement.reads_only or isinstance(error, errors.SHUTDOWN)):
                query.settle(lost)  # a write that may have been executed already
            elif query is pipeline.sent[0]:
                self.retry(query, lost)
            else:  # the first one may have caused the loss: this one has had no attempt
                self.put(query)

    def retry(self, query: Query, error: Exception, conflict: bool = False) -> None:
        """Queues a query for another attempt, or gives it its error after too many."""
        if query.attempts >= (MAX_CONFLICTS if conflict else MAX_ATTEMPTS):
            return query.settle(error)
        query.attempts += 1
        if conflict:  # at once it would meet the same transaction again
            pause = PAUSE * 2 ** (query.attempts - 1) * random.random()  # noqa: S311  # no secret
            asyncio.get_running_loop().call_later(pause, self.put, query)
        else:
            self.put(query)
