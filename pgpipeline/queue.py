"""The queue: each tenant has a line of its own, and the lines are served in turn.

A tenant is whoever shares the pool with others, for instance a user of a web service. What one
tenant sends must not decide how long another one waits. Four rules see to that:

1. The lines are served in turn, one query each.
2. A tenant may have FEW queries under way. One who is alone may have one more with each quick
   answer, so that a pool at rest is filled in a few round trips.
3. A tenant whose query was slow may have one under way, until one is quick or SLOW_MEMORY seconds
   are over. Slow tenants share one pipeline, which takes no queries of others.
4. No tenant has queries on every pipeline.
"""

import asyncio
from collections import OrderedDict, deque
from collections.abc import Hashable
from dataclasses import dataclass, field
from time import monotonic

from pgpipeline.errors import Unavailable
from pgpipeline.result import Result
from pgpipeline.statement import Statement

FEW = 4  # queries of a tenant under way, while the pool serves others as well
SLOW_MEMORY = 2.0  # seconds for which a tenant counts as slow after a slow query
MAX_QUEUE = 2000  # queries that may wait; a request weighs some 20 KB


@dataclass(slots=True, eq=False)
class Tenant:
    """A line of queries that wait, and what is under way for whoever they belong to."""

    name: str
    line: "deque[Query]" = field(default_factory=deque)
    window: int = FEW  # queries that may be under way when it is alone; grows with quick answers
    under_way: dict[Hashable, int] = field(default_factory=dict)  # queries, by pipeline


@dataclass(slots=True, eq=False)
class Query:
    """A statement with its encoded values, and the future that gets its Result."""

    statement: Statement
    values: list[bytes | None]
    tenant: Tenant
    result: asyncio.Future[Result]
    in_line: bool = False
    attempts: int = 1
    cancelled_at: float = 0.0  # on the clock of time.monotonic()


class Queue:
    """The lines of all tenants. `size` is how many pipelines serve them."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.tenants: OrderedDict[str, Tenant] = OrderedDict()  # the next in turn comes first
        self.slow: dict[str, float] = {}  # until when, on the clock of time.monotonic()
        self.apart = False  # whether one of the pipelines serves slow tenants alone
        self.waiting = 0

    def __len__(self) -> int:
        return self.waiting

    def tenant(self, name: str) -> Tenant:
        """The tenant of this name, made if it is unknown. It is known while it has queries, or is
        slow."""
        return self.tenants.get(name) or self.tenants.setdefault(name, Tenant(name))

    def append(self, query: Query) -> None:
        """Adds a query to its tenant's line. When the queue is full, the longest line gives way."""
        # One that comes again is first in its line, and its tenant may have been forgotten.
        query.tenant = self.tenant(query.tenant.name)
        line = query.tenant.line
        line.appendleft(query) if query.attempts > 1 else line.append(query)
        query.in_line = True
        self.waiting += 1
        if self.waiting > MAX_QUEUE:
            last = max(self.tenants.values(), key=lambda tenant: len(tenant.line)).line[-1]
            self.remove(last)
            if not last.result.done():
                last.result.set_exception(Unavailable("the queue is full"))

    def remove(self, query: Query) -> None:
        """Takes a query out of its line, because it is sent or its caller has left."""
        if query.in_line:
            query.in_line = False
            query.tenant.line.remove(query)
            self.waiting -= 1
            self.forget(query.tenant)

    def take(self, pipeline: Hashable, serves_slow: bool) -> Query | None:
        """The next query that may go to a pipeline, which serves slow tenants or quick ones."""
        for tenant in self.tenants.values():
            if tenant.line and self.may_send(tenant, pipeline, serves_slow):
                tenant.under_way[pipeline] = tenant.under_way.get(pipeline, 0) + 1
                self.tenants.move_to_end(tenant.name)
                query = tenant.line[0]
                self.remove(query)
                return query
        return None

    def may_send(self, tenant: Tenant, pipeline: Hashable, serves_slow: bool) -> bool:
        """Whether rules 2 to 4 let a tenant's next query go to a pipeline."""
        is_slow = tenant.name in self.slow
        if self.apart and is_slow != serves_slow:
            return False
        most = max(1, self.size - 1 - self.apart)  # pipelines for one tenant
        if self.size > 1 and pipeline not in tenant.under_way and len(tenant.under_way) >= most:
            return False
        window = 1 if is_slow else FEW if len(self.tenants) > 1 else tenant.window
        return sum(tenant.under_way.values()) < window

    def ended(self, query: Query, pipeline: Hashable, quickly: bool) -> None:
        """Notes that a query is no longer under way."""
        tenant = query.tenant
        tenant.under_way[pipeline] -= 1
        if not tenant.under_way[pipeline]:
            del tenant.under_way[pipeline]
        if quickly:
            tenant.window += 1
            self.slow.pop(tenant.name, None)  # all may have been slow for a moment
        self.forget(tenant)

    def forget(self, tenant: Tenant) -> None:
        """Forgets a tenant without queries, unless it is slow."""
        if not (tenant.line or tenant.under_way or tenant.name in self.slow):
            self.tenants.pop(tenant.name, None)

    def found_slow(self, tenant: Tenant) -> None:
        """Notes that a query of a tenant is slow."""
        tenant.window = FEW
        self.slow[tenant.name] = monotonic() + SLOW_MEMORY

    def forget_slow(self) -> None:
        """Lets tenants whose SLOW_MEMORY is over count as quick again."""
        for name in [name for name, until in self.slow.items() if until <= monotonic()]:
            del self.slow[name]
            self.forget(self.tenants[name])

    def count_slow(self) -> int:
        """How many of the queries that wait are those of slow tenants."""
        return sum(len(self.tenants[name].line) for name in self.slow)
