"""The pool: takes statements of many callers, and sends them by a few pipelines."""

import asyncio
import random
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from itertools import chain
from time import monotonic

from pgpipeline.connection import ConnectionPool
from pgpipeline.errors import CONFLICTS, Unavailable
from pgpipeline.pipeline import SLOW, Pipeline
from pgpipeline.queue import Query, Queue
from pgpipeline.result import Result
from pgpipeline.statement import Statement, Value, encode

QUERY_TIMEOUT = 5.0  # seconds until a query has failed, wherever it has spent them
MAX_ATTEMPTS = 3  # to execute a query
MAX_CONFLICTS = 10  # attempts, where they end in a conflict with another transaction
PAUSE = 0.005  # seconds: a pause after a conflict is up to twice that, and doubles each time
RECONNECT = 0.1  # seconds until a pipeline that got no connection is replaced


class PipelinePool:
    """A fair queue, and up to `size` pipelines with at most `depth` queries under way on each."""

    def __init__(
        self,
        connections: ConnectionPool,
        size: int,
        depth: int,
        span: Callable[[Statement], AbstractContextManager[object]] = nullcontext,
    ) -> None:
        """`span` gives a context for the time that a statement takes, as a tracer does."""
        self.connections, self.size, self.depth, self.span = connections, size, depth, span
        self.queue = Queue(size)
        self.pipelines: dict[Pipeline, asyncio.Task[None]] = {}
        self.cancelling: set[asyncio.Task[None]] = set()
        self.last_answer = float("-inf")  # on the clock of time.monotonic()
        self.scheduled = self.is_closed = False

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
        return monotonic() - self.last_answer

    async def close(self) -> None:
        """Ends all pipelines. Queries that wait or are under way fail, and so do later ones."""
        self.is_closed = True
        lines = [tenant.line for tenant in self.queue.tenants.values()]
        for query in chain(*lines, *[pipeline.sent for pipeline in self.pipelines]):
            expire(query)
        tasks = [*self.pipelines.values(), *self.cancelling]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    # Dispatching queries to pipelines...

    def put(self, query: Query) -> None:
        """Queues a query. It is sent with all others that come in this turn of the loop."""
        if self.is_closed:
            return expire(query)
        self.queue.append(query)
        if not self.scheduled:
            self.scheduled = True
            asyncio.get_running_loop().call_soon(self.dispatch)

    def dispatch(self) -> None:
        """Sends what is queued, each query where the fewest are under way, and flushes once."""
        self.scheduled = False
        if self.is_closed or not self.queue:
            return
        now = monotonic()
        active = [pipeline for pipeline in self.pipelines if pipeline.is_active]
        self.keep_slow_apart(active)
        usable = [pipeline for pipeline in active if not pipeline.is_silent(now)]
        self.fill([p for p in usable if p.serves_slow])
        self.fill([p for p in usable if not p.serves_slow])
        for pipeline in usable:
            pipeline.flush()
        if len(self.pipelines) < self.size and self.is_busy(usable):
            pipeline = Pipeline(self)
            self.pipelines[pipeline] = asyncio.create_task(pipeline.run())

    def fill(self, pipelines: list[Pipeline]) -> None:
        """Sends queries to pipelines of one kind until they are full, or nobody may send more."""
        while pipelines:
            pipeline = min(pipelines, key=lambda pipeline: len(pipeline.sent))
            if len(pipeline.sent) >= self.depth:
                return
            query = self.queue.take(pipeline, pipeline.serves_slow)
            if query and query.result.done():  # its caller has left in this turn of the loop
                self.queue.ended(query, pipeline, quickly=False)
            elif query:
                pipeline.send(query)
            else:  # another one may have a tenant's queries under way, and so may get more of them
                pipelines.remove(pipeline)

    def keep_slow_apart(self, active: list[Pipeline]) -> None:
        """Lets the pipeline that has most of the slow tenants' queries serve them alone, if another
        one is left for quick tenants."""
        self.queue.forget_slow()
        slow = self.queue.slow
        if not slow or len(active) < 2:
            for pipeline in active:
                pipeline.serves_slow = False
        elif self.queue.count_slow() and not any(pipeline.serves_slow for pipeline in active):
            of_slow = {p: sum(query.tenant.name in slow for query in p.sent) for p in active}
            max(active, key=of_slow.__getitem__).serves_slow = True
        self.queue.apart = any(pipeline.serves_slow for pipeline in active)

    def is_busy(self, usable: list[Pipeline]) -> bool:
        """Whether another pipeline would help: each that serves quick tenants has several queries
        under way, or there is none and quick tenants wait."""
        quick = [pipeline for pipeline in usable if not pipeline.serves_slow]
        if quick or not self.pipelines:
            return all(len(pipeline.sent) > 1 for pipeline in quick)
        return len(self.queue) > self.queue.count_slow()

    # What pipelines report...

    def retry(self, query: Query, error: Exception, sqlstate: str = "") -> None:
        """Queues a query for another attempt, or gives it its error after too many."""
        conflict = sqlstate in CONFLICTS
        if query.result.done():
            return
        if query.attempts >= (MAX_CONFLICTS if conflict else MAX_ATTEMPTS):
            query.result.set_exception(error)
            return
        query.attempts, query.cancelled_at = query.attempts + 1, 0.0
        if conflict:  # at once it would meet the same transaction again
            pause = PAUSE * 2 ** (query.attempts - 1) * random.random()  # noqa: S311  # no secret
            asyncio.get_running_loop().call_later(pause, self.put_again, query)
        else:
            self.put(query)

    def put_again(self, query: Query) -> None:
        if not query.result.done():  # its caller may have left during the pause
            self.put(query)

    def closed(self, pipeline: Pipeline) -> None:
        """Forgets a pipeline. Another one is made if queries wait: at once, unless this one got no
        connection, as the next one would not get any either."""
        del self.pipelines[pipeline]
        pause = 0.0 if pipeline.active_since else RECONNECT
        asyncio.get_running_loop().call_later(pause, self.dispatch)


def expire(query: Query) -> None:
    if not query.result.done():
        query.result.set_exception(Unavailable("no answer in time"))
