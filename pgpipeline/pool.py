"""The pool: takes statements of many callers, and sends them by a few pipelines."""

import asyncio
import logging
import random
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from time import monotonic

from pgpipeline.connection import ConnectionPool
from pgpipeline.errors import CONFLICTS, Unavailable
from pgpipeline.pipeline import BATCHING, QUERY_TIMEOUT, SLOW, Pipeline
from pgpipeline.queue import Query, Queue
from pgpipeline.result import Result
from pgpipeline.statement import Statement, Value, encode

MAX_ATTEMPTS = 3  # to execute a query
MAX_CONFLICTS = 10  # attempts that may end in a conflict with another transaction
PAUSE = 0.005  # seconds before the second attempt after a conflict, doubled for each further one
RECONNECT = 0.1  # seconds until a pipeline that got no connection is replaced

log = logging.getLogger("pgpipeline")


def no_span(statement: Statement) -> AbstractContextManager[object]:
    """The default of `span`: traces nothing."""
    return nullcontext()


class PipelinePool:
    """A fair queue, and up to `size` pipelines with at most `depth` queries under way on each."""

    def __init__(
        self,
        connections: ConnectionPool,
        size: int,
        depth: int,
        span: Callable[[Statement], AbstractContextManager[object]] = no_span,
    ) -> None:
        """`span` gives a context for the time that a statement takes, as for OpenTelemetry."""
        self.connections, self.size, self.depth, self.span = connections, size, depth, span
        self.queue = Queue(size)
        self.pipelines: dict[Pipeline, asyncio.Task[None]] = {}
        self.last_answer = float("-inf")  # on the clock of time.monotonic()
        self.scheduled = False
        self.timer: asyncio.TimerHandle | None = None

    async def execute(
        self, statement: Statement, values: Mapping[str, Value], tenant: str = ""
    ) -> Result:
        """Executes a statement in a transaction of its own.

        `tenant` is whose turn it takes (see queue.py). Raises the exceptions of errors.py;
        Unavailable after QUERY_TIMEOUT at the latest, wherever the time was spent.
        """
        loop = asyncio.get_running_loop()
        encoded = [encode(values[name]) for name in statement.parameters]
        query = Query(statement, encoded, self.queue.tenant(tenant), loop.create_future())
        # In two steps, since the loop may have stood still until now: then the second one lets it
        # read the answer that lies in the socket.
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
        """Ends all pipelines. Queries that are under way fail."""
        tasks = list(self.pipelines.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    # Dispatching queries to pipelines...

    def put(self, query: Query) -> None:
        """Queues a query. It is sent with all others that come in this turn of the loop."""
        if query.result.done():  # its caller has left during a pause
            return
        self.queue.append(query)
        if not self.scheduled:
            self.scheduled = True
            asyncio.get_running_loop().call_soon(self.dispatch)

    def dispatch(self, answered: Pipeline | None = None) -> None:
        """Sends what is queued, each query where the fewest are under way, and flushes once.

        A pipeline that has just been sent something gets more with its next answer, or after
        BATCHING: so that queries travel in batches. `answered` is one that had an answer now.
        """
        self.scheduled = False
        if not self.queue:
            return
        now = monotonic()
        usable = [p for p in self.pipelines if p.is_active and not p.is_silent(now)]
        self.keep_slow_apart(usable)
        ready = [p for p in usable if p is answered or not p.sent or now > p.last_flush + BATCHING]
        for pipeline in (p for p in ready if p.serves_slow):
            self.fill([pipeline])
        self.fill([p for p in ready if not p.serves_slow])
        for pipeline in ready:
            pipeline.flush()
        if self.queue and len(ready) < len(usable) and not self.timer:
            self.timer = asyncio.get_running_loop().call_later(BATCHING, self.dispatch_later)
        if len(self.pipelines) < self.size and self.needs_another(usable):
            pipeline = Pipeline(self)
            self.pipelines[pipeline] = asyncio.create_task(pipeline.run())

    def needs_another(self, usable: list[Pipeline]) -> bool:
        """Whether another pipeline would be of use: each of one kind has several under way."""
        quick = [pipeline for pipeline in usable if not pipeline.serves_slow]
        if quick:
            return all(len(pipeline.sent) > 1 for pipeline in quick)
        return self.queue.may_send_any(slow=False) or not self.pipelines

    def fill(self, pipelines: list[Pipeline]) -> None:
        """Sends queries to pipelines of one kind until they are full, or nobody may send more."""
        while pipelines:
            pipeline = min(pipelines, key=lambda pipeline: len(pipeline.sent))
            if len(pipeline.sent) >= self.depth:
                return
            query = self.queue.take(pipeline, pipeline.serves_slow)
            if query:
                pipeline.send(query)
            else:  # another pipeline may have queries of a tenant who has to keep to those
                pipelines.remove(pipeline)

    def keep_slow_apart(self, usable: list[Pipeline]) -> None:
        """Lets one pipeline serve slow tenants while there are any, and quick ones otherwise."""
        self.queue.forget_slow()
        if not self.queue.slow:
            for pipeline in self.pipelines:
                pipeline.serves_slow = False
        elif (
            usable
            and not any(pipeline.serves_slow for pipeline in self.pipelines)
            and self.queue.may_send_any(slow=True)
        ):
            min(usable, key=lambda pipeline: len(pipeline.sent)).serves_slow = True

    def dispatch_later(self) -> None:
        self.timer = None
        self.dispatch()

    # What pipelines report...

    def retry(self, query: Query, error: Exception, sqlstate: str = "") -> None:
        """Queues a query for another attempt, or gives it its error after too many."""
        conflict = sqlstate in CONFLICTS
        if query.result.done():
            return
        if query.attempts >= (MAX_CONFLICTS if conflict else MAX_ATTEMPTS):
            query.result.set_exception(error)
            return
        query.attempts += 1
        if conflict:  # at once it would meet the same transaction again
            pause = PAUSE * 2**query.attempts * random.random()  # noqa: S311
            asyncio.get_running_loop().call_later(pause, self.put, query)
        else:
            self.put(query)

    def closed(self, pipeline: Pipeline) -> None:
        """Forgets a pipeline. What waits is sent by others, or by a new one."""
        del self.pipelines[pipeline]
        pause = 0.0 if pipeline.active_since else RECONNECT
        asyncio.get_running_loop().call_later(pause, self.dispatch)


def expire(query: Query) -> None:
    if not query.result.done():
        query.result.set_exception(Unavailable("no answer in time"))
