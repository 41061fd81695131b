"""The queue's four rules, and its bound. It needs no database."""

import asyncio
import time
from collections.abc import Iterable

import pytest

from pgpipeline import Statement, Unavailable
from pgpipeline.queue import FEW, SLOW_MEMORY, Query, Queue

pytestmark = pytest.mark.anyio
SELECT = Statement("SELECT", "SELECT 1")


def append(queue: Queue, tenants: Iterable[str]) -> list[Query]:
    """A query for each name, in the tenants' lines."""
    loop = asyncio.get_running_loop()
    queries = [Query(SELECT, [], name, loop.create_future()) for name in tenants]
    for query in queries:
        queue.append(query)
    return queries


def take(queue: Queue, pipeline: int) -> list[Query]:
    """All queries that may go to a pipeline now."""
    return list(iter(lambda: queue.take(pipeline), None))


def names(queries: list[Query]) -> str:
    return "".join(query.tenant_name for query in queries)


@pytest.mark.parametrize(
    ("came", "sent"),
    [
        ("abcdabcd", "abcdabcd"),  # who sends less than one query of STEP loses nothing
        ("aaab", "abaa"),
        ("a" * 9 + "bcdebcde", "abcdeabcdeaaaaaaa"),
    ],
)
async def test_queries_are_sent_in_their_order_but_a_burst_waits_for_the_others(
    came: str, sent: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pgpipeline.queue.FEW", 20)
    queue = Queue(size=2)
    append(queue, came)
    assert names(take(queue, 1)) == sent


async def test_whoever_sent_nothing_before_has_no_turns_to_catch_up() -> None:
    queue = Queue(size=2)
    for query in append(queue, "a" * 100)[:50]:
        assert queue.take(1) is query
        queue.ended(query, 1, quickly=True)
    append(queue, "bbbb")
    assert names(take(queue, 1)[:8]) == "babababa"


async def test_queries_that_were_never_sent_take_no_places_of_their_tenants_next_one() -> None:
    queue = Queue(size=2)
    queries = append(queue, "a" * 500)
    assert queue.take(1) is queries[0]
    for query in queries[1:]:
        queue.remove(query)
    append(queue, "bcdaef")
    assert names(take(queue, 1)) == "bcdaef"


async def test_a_tenant_has_few_queries_under_way_while_others_wait() -> None:
    queue = Queue(size=2)
    queries = append(queue, "a" * 10 + "b" * 10)
    assert sorted(names(take(queue, 1))) == ["a"] * FEW + ["b"] * FEW
    for query in queries[10 + FEW :]:
        queue.remove(query)
    assert names(take(queue, 1)) == "a" * (10 - FEW)


async def test_slow_tenants_have_one_query_each_on_pipelines_without_others() -> None:
    queue = Queue(size=4)
    for query in append(queue, "aabb")[::2]:
        queue.found_slow(query.tenant)
    assert [names(take(queue, pipeline)) for pipeline in range(4)] == ["a", "b", "", ""]
    append(queue, "c")
    assert [names(take(queue, pipeline)) for pipeline in range(4)] == ["", "", "c", ""]


async def test_who_waits_behind_a_slow_tenant_may_use_another_pipeline() -> None:
    queue = Queue(size=3)
    slow, _ = append(queue, "ab")
    assert names(take(queue, 1)) == "ab"
    queue.found_slow(slow.tenant)
    append(queue, "b")
    assert names(take(queue, 2)) == "b"


async def test_while_others_have_queries_slow_tenants_have_one_pipeline() -> None:
    queue = Queue(size=3)
    for query in append(queue, "abc")[:2]:
        queue.found_slow(query.tenant)
    assert [names(take(queue, pipeline)) for pipeline in (1, 2, 3)] == ["a", "c", ""]


async def test_a_tenant_is_slow_no_longer_after_some_time() -> None:
    queue = Queue(size=3)
    queue.found_slow(append(queue, "aaa")[0].tenant)
    queue.forget_slow(time.monotonic() + SLOW_MEMORY - 0.1)
    assert names(take(queue, 1)) == "a"
    queue.forget_slow(time.monotonic() + SLOW_MEMORY)
    assert names(take(queue, 1)) == "aa"


async def test_a_tenant_is_slow_while_one_of_its_queries_is() -> None:
    queue = Queue(size=3)
    slow, quick, later = append(queue, "aaa")
    assert take(queue, 1) == [slow, quick, later]
    queue.found_slow(slow.tenant)
    queue.ended(quick, 1, quickly=True)
    assert slow.tenant in queue.slow
    queue.ended(slow, 1, quickly=False)
    queue.ended(later, 1, quickly=True)
    assert not queue.slow


@pytest.mark.parametrize(("size", "used"), [(1, 1), (2, 1), (3, 2), (5, 4)])
async def test_a_tenant_has_queries_on_all_pipelines_but_one(size: int, used: int) -> None:
    queue = Queue(size)
    append(queue, "a" * 20)
    taken = [bool(queue.take(pipeline)) for pipeline in range(size)]
    assert taken == [True] * used + [False] * (size - used)
    assert queue.take(0)  # where it has some already


@pytest.mark.parametrize(("came", "refused"), [("aabcdef", 1), ("abcdefg", 6)])
async def test_when_the_queue_is_full_the_longest_line_gives_way_and_of_equal_ones_the_latest(
    monkeypatch: pytest.MonkeyPatch, came: str, refused: int
) -> None:
    monkeypatch.setattr("pgpipeline.queue.MAX_QUEUE", 6)
    queue = Queue(size=2)
    queries = append(queue, came)
    assert isinstance(queries[refused].result.exception(), Unavailable)
    assert [query for query in queries if query.result.done()] == [queries[refused]]
    assert len(queue.waiting) == 6
