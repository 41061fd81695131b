"""The queue: which of the queries that wait is sent next. README.md has the four rules.

A tenant is whoever shares the pool with others, for instance a user of a web service. What one
tenant sends must not decide how long another one waits. Rule 1 is start-time fair queueing: each
query gets a place as it comes, those of one tenant STEP apart, and the lowest place is next.
"""

import asyncio
from bisect import insort
from collections import deque
from collections.abc import Hashable
from dataclasses import dataclass, field
from operator import attrgetter
from time import monotonic

from pgpipeline.errors import Unavailable
from pgpipeline.result import Result
from pgpipeline.statement import Statement

STEP = 4  # places between two queries of a tenant, at least
FEW = 4  # queries of a tenant under way, while others wait
SLOW_MEMORY = 3.0  # seconds for which a tenant counts as slow: beyond a cancellation that fails
MAX_QUEUE = 2000  # queries that may wait; a request weighs some 20 KB


@dataclass(slots=True, eq=False)
class Tenant:
    """Somebody with queries: those that wait in line, and those that are under way."""

    name: str
    line: "deque[Query]" = field(default_factory=deque)
    last_place: int = -STEP  # of its queries that were sent
    under_way: list[Hashable] = field(default_factory=list)  # the pipeline of each such query


@dataclass(slots=True, eq=False)
class Query:
    """A statement with its encoded values, and the future that gets its Result."""

    statement: Statement
    values: list[bytes | None]
    tenant_name: str
    result: asyncio.Future[Result]
    tenant: Tenant = field(init=False)  # set when it is queued
    place: int = -1  # among all queries, those with the lowest first. Below 0: not queued yet
    attempts: int = 1
    sent_by_name: bytes = b""  # of the prepared statement

    def settle(self, outcome: Result | Exception) -> None:
        """Gives the caller its result or its error, unless it has failed before or has left."""
        if self.result.done():
            return
        if isinstance(outcome, Exception):
            self.result.set_exception(outcome)
        else:
            self.result.set_result(outcome)


place_of = attrgetter("place")


class Queue:
    """The lines of all tenants. `size` is how many pipelines serve them."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.tenants: dict[str, Tenant] = {}  # that have queries, or are slow
        self.waiting: set[Query] = set()
        self.heads: list[Query] = []  # the first query of each line, sorted by place
        self.slow: dict[Tenant, float] = {}  # until when, on the clock of time.monotonic()
        self.next_place = 0  # of a tenant without queries; never before one that was sent

    # Queries that come, and queries that leave without having been sent...

    def append(self, query: Query) -> None:
        """Adds a query to its tenant's line. When the queue is full, the longest line gives way."""
        name = query.tenant_name
        tenant = self.tenants.get(name) or self.tenants.setdefault(name, Tenant(name))
        query.tenant, line = tenant, tenant.line
        if query.place < 0:  # one that is sent again keeps its place
            # Places of queries never sent do not count: their callers have left.
            last = max(tenant.last_place, line[-1].place if line else -STEP)
            query.place = max(self.next_place, last + STEP)
            if query.place == self.next_place:  # a burst takes no places away from others
                self.next_place += 1
        self.waiting.add(query)
        if line:
            self.heads.remove(line[0])
        insort(line, query, key=place_of)
        insort(self.heads, line[0], key=place_of)
        if len(self.waiting) > MAX_QUEUE:
            self.shed()

    def shed(self) -> None:
        """Refuses the last query of the longest line. Of equal ones, that of the last to come."""
        lines = (tenant.line for tenant in self.tenants.values() if tenant.line)
        query = max(lines, key=lambda line: (len(line), line[-1].place))[-1]
        self.remove(query)
        query.settle(Unavailable("the queue is full"))

    def remove(self, query: Query) -> None:
        """Takes a query that waits out of its line."""
        line = query.tenant.line
        self.waiting.remove(query)
        self.heads.remove(line[0])
        line.remove(query)
        if line:
            insort(self.heads, line[0], key=place_of)
        self.forget(query.tenant)

    def forget(self, tenant: Tenant) -> None:
        """Forgets a tenant without queries, unless it is slow."""
        if not (tenant.under_way or tenant.line or tenant in self.slow):
            self.tenants.pop(tenant.name, None)

    # Queries that are sent...

    def take(self, pipeline: Hashable) -> Query | None:
        """Takes the next query that may go to a pipeline, or None."""
        used = self.slow_pipelines()
        for query in self.heads:
            tenant = query.tenant
            if self.may_send(tenant, pipeline, used):
                tenant.under_way.append(pipeline)
                tenant.last_place = max(tenant.last_place, query.place)
                self.remove(query)
                self.next_place = max(self.next_place, query.place)
                return query
        return None

    def may_send(self, tenant: Tenant, pipeline: Hashable, used: set[Hashable]) -> bool:
        """Whether a tenant's next query may go to a pipeline. Slow tenants use some of them."""
        if tenant in self.slow:  # rule 3
            are_all_slow = len(self.slow) == len(self.tenants)
            most = max(self.size - 1, 1) if are_all_slow else 1
            return not tenant.under_way and pipeline not in used and len(used) < most
        if pipeline in used:
            return False
        if not tenant.under_way:
            return True
        tenants = (query.tenant for query in self.heads)
        rivals = (each for each in tenants if each is not tenant and each not in self.slow)
        if len(tenant.under_way) >= FEW and any(rivals):  # rule 2
            return False
        most = self.size - 2 if used else self.size - 1  # pipelines, by rule 4
        mine = set(tenant.under_way)
        return pipeline in mine or len(mine - used) < most  # not those that wait behind a slow one

    def ended(self, query: Query, pipeline: Hashable, quickly: bool) -> None:
        """Notes that a query is no longer under way."""
        tenant = query.tenant
        tenant.under_way.remove(pipeline)
        if quickly and not tenant.under_way:  # nothing else of it may be slow now
            self.slow.pop(tenant, None)  # all may have been slow for a moment
        self.forget(tenant)

    # Slow tenants...

    def slow_pipelines(self) -> set[Hashable]:
        """The pipelines on which a slow tenant has a query under way."""
        return {pipeline for tenant in self.slow for pipeline in tenant.under_way}

    def found_slow(self, tenant: Tenant) -> None:
        """Notes that a query of a tenant is slow."""
        self.slow[tenant] = monotonic() + SLOW_MEMORY

    def forget_slow(self, now: float) -> None:
        """Lets tenants whose SLOW_MEMORY is over count as quick again."""
        for tenant in [tenant for tenant, until in self.slow.items() if until <= now]:
            del self.slow[tenant]
            self.forget(tenant)

    def is_held_up(self, pipeline: Hashable) -> bool:
        """Whether a slow query keeps tenants waiting who have nothing under way."""
        others = self.slow_pipelines() - {pipeline}
        idle = (query.tenant for query in self.heads if not query.tenant.under_way)
        return any(self.may_send(tenant, pipeline, others) for tenant in idle)
