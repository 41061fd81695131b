"""The queue: which of the queries that wait is sent next.

A tenant is whoever shares the pool with others, for instance a user of a web service. What one
tenant sends must not decide how long another one waits. Four rules see to that:

1. Queries are sent in the order in which they came, but a tenant's next query counts as coming
   STEP places behind its last one. So tenants who send a fair share wait equally long, and a burst
   waits for the others' queries, not they for the burst.
2. A tenant may have FEW queries under way while the pool serves others as well.
3. A tenant whose query was slow may have one under way, until one is quick or SLOW_MEMORY seconds
   are over. Slow tenants share one pipeline, which takes no queries of others.
4. No tenant has queries on every pipeline.
"""

import asyncio
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Hashable
from dataclasses import dataclass, field
from itertools import count
from time import monotonic

from pgpipeline.errors import Unavailable
from pgpipeline.result import Result
from pgpipeline.statement import Statement

STEP = 4  # places between two queries of a tenant, at least
FEW = 4  # queries of a tenant under way, while the pool serves others as well
SLOW_MEMORY = 2.0  # seconds for which a tenant counts as slow after a slow query
MAX_QUEUE = 2000  # queries that may wait; a request weighs some 20 KB


@dataclass(slots=True, eq=False)
class Tenant:
    """A line of queries that wait, and what is under way for whoever they belong to."""

    name: str
    line: "deque[Query]" = field(default_factory=deque)
    last_place: int = -STEP  # of the query that came last
    turn: "tuple[int, int, Tenant] | None" = None  # in Queue.turns
    under_way: dict[Hashable, int] = field(default_factory=dict)  # queries, by pipeline


@dataclass(slots=True, eq=False)
class Query:
    """A statement with its encoded values, and the future that gets its Result."""

    statement: Statement
    values: list[bytes | None]
    tenant: Tenant
    result: asyncio.Future[Result]
    place: int = 0  # among all queries, those with the lowest first
    in_line: bool = False
    attempts: int = 1
    sent_by_name: bytes = b""  # of the prepared statement
    cancelled_at: float = 0.0  # on the clock of time.monotonic()


class Queue:
    """The lines of all tenants. `size` is how many pipelines serve them."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.tenants: dict[str, Tenant] = {}
        # Tenants by the place of their first query, sorted. The second number decides between equal
        # places. A tenant that has no query, or may have no more under way, is not in it.
        self.turns: list[tuple[int, int, Tenant]] = []
        self.numbers = count()
        self.next_place = 0
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
        # One that comes again keeps its place, and its tenant may have been forgotten.
        tenant = query.tenant = self.tenant(query.tenant.name)
        if query.attempts > 1:
            tenant.line.appendleft(query)
        else:
            query.place = max(self.next_place, tenant.last_place + STEP)
            tenant.last_place = query.place
            tenant.line.append(query)
            if query.place == self.next_place:  # a burst takes no places away from others
                self.next_place += 1
        query.in_line = True
        self.waiting += 1
        if query is tenant.line[0]:
            self.place(tenant)
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
            self.place(query.tenant)
            self.forget(query.tenant)

    def place(self, tenant: Tenant) -> None:
        """Puts a tenant into `turns`, where the first query of its line belongs."""
        if tenant.turn:
            del self.turns[bisect_left(self.turns, tenant.turn)]
            tenant.turn = None
        if tenant.line and sum(tenant.under_way.values()) < self.window(tenant):
            tenant.turn = (tenant.line[0].place, next(self.numbers), tenant)
            insort(self.turns, tenant.turn)

    def take(self, pipeline: Hashable, serves_slow: bool) -> Query | None:
        """The next query that may go to a pipeline, which serves slow tenants or quick ones."""
        for place, _, tenant in self.turns:
            if self.may_send(tenant, pipeline, serves_slow):
                self.next_place = max(self.next_place, place)
                tenant.under_way[pipeline] = tenant.under_way.get(pipeline, 0) + 1
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
        if pipeline not in tenant.under_way and len(tenant.under_way) >= most:
            return False
        return sum(tenant.under_way.values()) < self.window(tenant)

    def window(self, tenant: Tenant) -> int:
        """How many queries of a tenant may be under way."""
        if tenant.name in self.slow:
            return 1
        return FEW if len(self.tenants) > 1 else MAX_QUEUE

    def ended(self, query: Query, pipeline: Hashable, quickly: bool) -> None:
        """Notes that a query is no longer under way."""
        tenant = query.tenant
        tenant.under_way[pipeline] -= 1
        if not tenant.under_way[pipeline]:
            del tenant.under_way[pipeline]
        if quickly:
            self.slow.pop(tenant.name, None)  # all may have been slow for a moment
        if tenant.line and not tenant.turn:
            self.place(tenant)
        self.forget(tenant)

    def forget(self, tenant: Tenant) -> None:
        """Forgets a tenant without queries, unless it is slow."""
        if not (tenant.line or tenant.under_way or tenant.name in self.slow):
            self.tenants.pop(tenant.name, None)

    def found_slow(self, tenant: Tenant) -> None:
        """Notes that a query of a tenant is slow."""
        self.slow[tenant.name] = monotonic() + SLOW_MEMORY

    def forget_slow(self) -> None:
        """Lets tenants whose SLOW_MEMORY is over count as quick again."""
        for name in [name for name, until in self.slow.items() if until <= monotonic()]:
            del self.slow[name]
            self.place(self.tenants[name])
            self.forget(self.tenants[name])

    def count_slow(self) -> int:
        """How many of the queries that wait are those of slow tenants."""
        return sum(len(self.tenants[name].line) for name in self.slow)
