"""The pool: takes statements of many callers, and sends them by a few pipelines."""

import asyncio
import random
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from time import monotonic

from pgpipeline.connection import ConnectionPool
from pgpipeline.errors import Unavailable
from pgpipeline.pipeline import SLOW, Pipeline, State, fail
from pgpipeline.queue import Query, Queue
from pgpipeline.result import Result
from pgpipeline.statement import Statement, Value, encode

QUERY_TIMEOUT = 5.0  # seconds until a query has failed, wherever it has spent them
MAX_ATTEMPTS = 3  # to execute a query
MAX_CONFLICTS = 10  # attempts, where they end in a conflict with another transaction
PAUSE = 0.005  # seconds: a pause after a conflict is up to twice that, and doubles each time

# A context for the time that a statement takes, as tracers have it.
Span = Callable[[Statement], AbstractContextManager[object]]


class PipelinePool:
    """A fair queue, and up to `size` pipelines with at most `depth` queries under way on each."""

    def __init__(
        self, connections: ConnectionPool, size: int, depth: int, span: Span = nullcontext
    ) -> None:
        self.connections, self.size, self.depth, self.span = connections, size, depth, span
        self.queue = Queue(size)
        self.pipelines: dict[Pipeline, asyncio.Task[None]] = {}
        self.last_answer = float("-inf")  # on the clock of time.monotonic()
        self.is_scheduled = self.is_closed = False

    async def execute(
        self, statement: Statement, values: Mapping[str, Value], tenant: str = ""
    ) -> Result:
        """Executes a statement in a transaction of its own, when it is the tenant's turn.

        Raises the exceptions of errors.py: Unavailable after QUERY_TIMEOUT at the latest, wherever
        the time was spent.
        """
        loop = asyncio.get_running_loop()
        encoded = [encode(values[name]) for name in statement.parameters]
        query = Query(statement, encoded, self.queue.tenant(tenant), loop.create_future())
        # In two steps: the loop may have stood still until the first one. Then it reads an answer
        # that lies in the socket before the second.
        timeout = loop.call_later(QUERY_TIMEOUT, loop.call_later, SLOW, expire, query)
        self.put(query)
        try:
            with self.span(statement):
                return await query.result
        finally:
            timeout.cancel()
            self.queue.remove(query)

    def seconds_since_answer(self) -> float:
        """Since the database has answered anything. Infinite if it never has."""
        return monotonic() - self.last_answer

    async def close(self) -> None:
        """Ends all pipelines. Queries that wait or are under way fail, and so do later ones."""
        self.is_closed = True
        for query in [query for each in self.queue.tenants.values() for query in each.line]:
            expire(query)
        tasks = list(self.pipelines.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    # Dispatching queries to pipelines...

    def put(self, query: Query) -> None:
        """Queues a query. It is sent with all others that come in this turn of the loop."""
        if self.is_closed:
            expire(query)
        if query.result.done():  # its caller may have left while it paused
            return
        self.queue.append(query)
        if not self.is_scheduled:
            self.is_scheduled = True
            asyncio.get_running_loop().call_soon(self.dispatch)

    def dispatch(self) -> None:
        """Sends what is queued, each query where the fewest are under way, and flushes once.

        One pipeline serves slow tenants, and the others quick ones. Another pipeline is opened if
        each of those for quick tenants has several queries under way, or if there is none.
        """
        self.is_scheduled = False
        if self.is_closed or not self.queue:
            return
        now = monotonic()
        active = [pipeline for pipeline in self.pipelines if pipeline.state is State.ACTIVE]
        for_slow = self.choose_for_slow(active) if self.queue.slow else None
        self.queue.apart = bool(for_slow) and len(active) > 1  # one alone serves all
        usable = [pipeline for pipeline in active if not pipeline.is_silent(now)]
        quick = [pipeline for pipeline in usable if pipeline is not for_slow]
        if for_slow in usable:
            self.fill([for_slow], serves_slow=True)
        self.fill(quick.copy(), serves_slow=False)
        for pipeline in usable:
            pipeline.flush()
        is_busy = all(len(pipeline.sent) > 1 for pipeline in quick)
        if is_busy and len(self.pipelines) < self.size:
            pipeline = Pipeline(self)
            self.pipelines[pipeline] = asyncio.create_task(pipeline.run())

    def choose_for_slow(self, active: list[Pipeline]) -> Pipeline | None:
        """The pipeline that has most of the slow tenants' queries. None if they send nothing."""
        self.queue.forget_slow()
        slow = self.queue.slow
        under_way = {p: sum(query.tenant.name in slow for query in p.sent) for p in active}
        if not (any(under_way.values()) or self.queue.count_slow()):
            return None
        return max(active, key=under_way.__getitem__, default=None)

    def fill(self, pipelines: list[Pipeline], serves_slow: bool) -> None:
        """Sends queries to pipelines of one kind until they are full, or nobody may send more."""
        while pipelines:
            pipeline = min(pipelines, key=lambda pipeline: len(pipeline.sent))
            if len(pipeline.sent) >= self.depth:
                return
            if pipeline.state is not State.ACTIVE:  # its connection was lost in this loop
                pipelines.remove(pipeline)
            elif query := self.queue.take(pipeline, serves_slow):
                pipeline.send(query)
            else:  # another one may have a tenant's queries under way, and so may get more of them
                pipelines.remove(pipeline)

    def retry(self, query: Query, error: Exception, conflict: bool = False) -> None:
        """Queues a query for another attempt, or gives it its error after too many."""
        if query.attempts >= (MAX_CONFLICTS if conflict else MAX_ATTEMPTS):
            return fail(query, error)
        query.attempts, query.cancelled_at = query.attempts + 1, 0.0
        if conflict:  # at once it would meet the same transaction again
            pause = PAUSE * 2 ** (query.attempts - 1) * random.random()  # noqa: S311  # no secret
            asyncio.get_running_loop().call_later(pause, self.put, query)
        else:
            self.put(query)


def expire(query: Query) -> None:
    fail(query, Unavailable("no answer in time"))
