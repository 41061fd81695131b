"""The queue: which of the queries that wait is sent next. README.md has the four rules.

A tenant is whoever shares the pool with others, for instance a user of a web service. What one
tenant sends must not decide how long another one waits.
"""

import asyncio
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Hashable
from dataclasses import dataclass, field
from time import monotonic
from typing import Literal

from pgpipeline.errors import Unavailable
from pgpipeline.result import Result
from pgpipeline.statement import Statement

STEP = 4  # places between two queries of a tenant, at least
FEW = 4  # queries of a tenant under way, while the pool serves others as well
SLOW_MEMORY = 2.0  # seconds for which a tenant counts as slow after a slow query
MAX_QUEUE = 2000  # queries that may wait; a request weighs some 20 KB

Serves = Literal["all", "slow", "quick"]  # the tenants whose queries a pipeline takes


@dataclass(slots=True, eq=False)
class Tenant:
    """Somebody with queries: those that wait in line, and those that are under way."""

    name: str
    line: "deque[Query]" = field(default_factory=deque)
    last_place: int = -STEP  # of the query that came last
    under_way: list[Hashable] = field(default_factory=list)  # the pipeline of each such query


@dataclass(slots=True, eq=False)
class Query:
    """A statement with its encoded values, and the future that gets its Result."""

    statement: Statement
    values: list[bytes | None]
    tenant_name: str
    result: asyncio.Future[Result]
    tenant: Tenant = field(init=False)  # set when it is queued
    place: int = 0  # among all queries, those with the lowest first
    attempts: int = 1
    sent_by_name: bytes = b""  # of the prepared statement
    cancelled_at: float = 0.0  # on the clock of time.monotonic()

    def fail(self, error: Exception) -> None:
        """Gives it its error, unless it has failed before or its caller has left."""
        if not self.result.done():
            self.result.set_exception(error)


def first_place(tenant: Tenant) -> int:
    """The place of the query that is sent next."""
    return tenant.line[0].place


class Queue:
    """The lines of all tenants. `size` is how many pipelines serve them."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.tenants: dict[str, Tenant] = {}  # that have queries, or are slow
        self.waiting: set[Query] = set()
        self.turns: list[Tenant] = []  # whose line is not empty, sorted by its first_place()
        self.slow: dict[Tenant, float] = {}  # until when, on the clock of time.monotonic()
        self.next_place = 0  # of a tenant without queries; never before one that was sent

    # Queries that come, and queries that leave without having been sent...

    def append(self, query: Query) -> None:
        """Adds a query to its tenant's line. When the queue is full, the longest line gives way."""
        name = query.tenant_name
        if name not in self.tenants:  # it may also have been forgotten between two attempts
            self.tenants[name] = Tenant(name)
        tenant = query.tenant = self.tenants[name]
        self.waiting.add(query)
        if query.attempts > 1:  # it keeps its place, which is before those of the others
            if tenant.line:
                self.leave_turns(tenant)
            tenant.line.appendleft(query)
        else:
            query.place = tenant.last_place = max(self.next_place, tenant.last_place + STEP)
            if query.place == self.next_place:  # a burst takes no places away from others
                self.next_place += 1
            tenant.line.append(query)
        if query is tenant.line[0]:
            insort(self.turns, tenant, key=first_place)
        if len(self.waiting) > MAX_QUEUE:
            self.shed()

    def shed(self) -> None:
        """Refuses the last query of the longest line."""
        query = max(self.tenants.values(), key=lambda tenant: len(tenant.line)).line[-1]
        self.remove(query)
        query.fail(Unavailable("the queue is full"))

    def remove(self, query: Query) -> None:
        """Takes a query that waits out of its line."""
        tenant = query.tenant
        self.waiting.remove(query)
        self.leave_turns(tenant)
        tenant.line.remove(query)
        if tenant.line:
            insort(self.turns, tenant, key=first_place)
        self.forget(tenant)

    def leave_turns(self, tenant: Tenant) -> None:
        """Takes a tenant out of `turns`, where it is found by its line as it is now."""
        start = bisect_left(self.turns, first_place(tenant), key=first_place)
        del self.turns[self.turns.index(tenant, start)]

    def forget(self, tenant: Tenant) -> None:
        """Forgets a tenant without queries, unless it is slow."""
        if not (tenant.under_way or tenant.line or tenant in self.slow):
            self.tenants.pop(tenant.name, None)

    # Queries that are sent...

    def take(self, pipeline: Hashable, serves: Serves) -> Query | None:
        """Takes the next query that may go to a pipeline. None if there is none."""
        for index, tenant in enumerate(self.turns):
            if self.may_send(tenant, pipeline, serves):
                del self.turns[index]
                query = tenant.line.popleft()
                if tenant.line:
                    insort(self.turns, tenant, key=first_place)
                self.waiting.remove(query)
                self.next_place = max(self.next_place, query.place)
                tenant.under_way.append(pipeline)
                return query
        return None

    def may_send(self, tenant: Tenant, pipeline: Hashable, serves: Serves) -> bool:
        """Whether a tenant's next query may go to a pipeline."""
        is_slow = tenant in self.slow
        if serves == ("quick" if is_slow else "slow"):
            return False
        if not tenant.under_way:
            return True
        has_many = len(tenant.under_way) >= FEW and len(self.tenants) > 1
        if is_slow or has_many:  # rules 3 and 2
            return False
        most = self.size - 1 if serves == "all" else self.size - 2  # pipelines, by rule 4
        return pipeline in tenant.under_way or len(set(tenant.under_way)) < most

    def ended(self, query: Query, pipeline: Hashable, quickly: bool) -> None:
        """Notes that a query is no longer under way."""
        tenant = query.tenant
        tenant.under_way.remove(pipeline)
        if quickly:
            self.slow.pop(tenant, None)  # all may have been slow for a moment
        self.forget(tenant)

    # Slow tenants...

    def found_slow(self, tenant: Tenant) -> None:
        """Notes that a query of a tenant is slow."""
        self.slow[tenant] = monotonic() + SLOW_MEMORY

    def forget_slow(self) -> None:
        """Lets tenants whose SLOW_MEMORY is over count as quick again."""
        for tenant in [tenant for tenant, until in self.slow.items() if until <= monotonic()]:
            del self.slow[tenant]
            self.forget(tenant)
