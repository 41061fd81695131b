"""Queries that share pipelines: each gets its own answer, in time, and disturbs no other."""

import asyncio
import gc
import socket
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import pytest
from psycopg.conninfo import make_conninfo

from pgpipeline import (
    ConnectionPool,
    ForeignKeyViolation,
    InvalidValue,
    PipelinePool,
    Statement,
    Unavailable,
    UnexpectedError,
    UniqueViolation,
)
from pgpipeline.connection import Connection
from pgpipeline.pipeline import State
from pgpipeline.tests.conftest import OTHERS, Proxy, ask, pool_of, seconds, start, value

pytestmark = pytest.mark.anyio
INSERT = "INSERT INTO stored VALUES (%(n)s::integer) RETURNING n"
FAILS = "INSERT INTO stored SELECT fails(%(code)s, %(times)s::integer) RETURNING n"


async def outcomes(*calls: Any) -> list[Any]:
    """The result or the exception of each call."""
    return await asyncio.gather(*calls, return_exceptions=True)


# Answers.


async def test_an_error_leaves_nothing_to_the_garbage_collector(pool: PipelinePool) -> None:
    gc.collect()
    gc.disable()
    try:
        with suppress(InvalidValue):
            await ask(pool, "SELECT 1 / %(n)s::integer", n=0)
        await asyncio.sleep(0)  # the loop has the future while it wakes this task
        assert not [each for each in gc.get_objects() if isinstance(each, InvalidValue)]
    finally:
        gc.enable()


async def test_each_of_thousands_of_queries_gets_its_own_answer(pool: PipelinePool) -> None:
    results = await outcomes(
        *[
            ask(pool, f"SELECT %(n)s::integer, {n % 5}, 1 / (%(n)s::integer % 7)", f"{n % 9}", n=n)
            for n in range(1500)
        ]
    )
    for n, result in enumerate(results):
        if n % 7:
            assert result.rows == [(b"%d" % n, b"%d" % (n % 5), b"1" if n % 7 == 1 else b"0")]
        else:
            assert isinstance(result, InvalidValue)


async def test_null_is_none_and_without_rows_a_result_is_false(pool: PipelinePool) -> None:
    assert (await ask(pool, "SELECT %(text)s::text", text=None)).rows == [(None,)]
    assert not await ask(pool, "SELECT 1 WHERE %(yes)s::boolean", yes=False)
    assert not await ask(pool, "-- nothing")


async def test_a_neighbours_error_neither_undoes_a_write_nor_hides_it(
    pool: PipelinePool, table: str
) -> None:
    fails = ask(pool, "WITH a AS (SELECT 1) SELECT 1 / 0 FROM a")
    calls = [ask(pool, INSERT, n=n) for n in range(300)]
    results = await outcomes(*calls[:150], fails, *calls[150:])
    assert isinstance(results.pop(150), InvalidValue)
    assert [result.rows for result in results] == [[(b"%d" % n,)] for n in range(300)]
    assert value(table, "SELECT count(*) FROM stored") == 300


async def test_a_query_whose_result_cannot_be_made_fails_at_once(database: str) -> None:
    async with pool_of(make_conninfo(database, client_encoding="latin1")) as pool:
        calls = [ask(pool, "SELECT 1"), ask(pool, r'SELECT 1 AS U&"\00fc"'), ask(pool, "SELECT 1")]
        async with asyncio.timeout(1):
            one, wrong, other = await outcomes(*calls)
    assert isinstance(wrong, UnicodeDecodeError)
    assert one.rows == other.rows == [(b"1",)]


async def test_a_copy_fails_and_hangs_nothing(pool: PipelinePool) -> None:
    with pytest.raises(Unavailable):
        await ask(pool, "/* unseen */ COPY (SELECT 1) TO STDOUT")
    assert (await ask(pool, "SELECT 1")).rows == [(b"1",)]


async def test_a_write_is_acknowledged_when_it_is_committed_and_not_when_its_rows_come(
    pool: PipelinePool, table: str
) -> None:
    value(
        table,
        "ALTER TABLE stored ADD other integer REFERENCES stored (n) DEFERRABLE INITIALLY DEFERRED",
    )
    with pytest.raises(ForeignKeyViolation, match=r"^stored_other_fkey$"):
        await ask(pool, "INSERT INTO stored VALUES (1, 7) RETURNING n")
    assert value(table, "SELECT count(*) FROM stored") == 0


async def test_queries_of_one_tenant_are_executed_in_their_order(database: str, table: str) -> None:
    async with pool_of(database, size=1, depth=4) as pool:
        await asyncio.gather(*[ask(pool, INSERT, n=n) for n in range(100)])
        stored = await ask(pool, "SELECT n FROM stored ORDER BY ctid")
    assert [int(n) for (n,) in stored] == list(range(100))


# Errors.


async def test_a_unique_violation_names_its_constraint(pool: PipelinePool, table: str) -> None:
    await ask(pool, INSERT, n=1)
    with pytest.raises(UniqueViolation, match=r"^stored_n_key$"):
        await ask(pool, INSERT, n=1)


async def test_a_row_that_others_refer_to_is_a_foreign_key_violation(
    pool: PipelinePool, table: str
) -> None:
    with pytest.raises(ForeignKeyViolation):
        await ask(pool, FAILS, code="23001", times=1)  # ON DELETE RESTRICT, from PostgreSQL 18


@pytest.mark.parametrize("code", ["22000", "22021", "22P02", "23502", "23514"])
async def test_a_value_that_postgresql_refuses_is_invalid(
    pool: PipelinePool, table: str, code: str
) -> None:
    with pytest.raises(InvalidValue, match=rf"^{code}$"):
        await ask(pool, FAILS, code=code, times=1)


@pytest.mark.parametrize("code", ["25006", "26000", "40001", "40P01", "42P05"])
async def test_a_query_that_was_not_executed_is_sent_again(
    pool: PipelinePool, table: str, code: str
) -> None:
    assert (await ask(pool, FAILS, code=code, times=1)).rows == [(b"2",)]


@pytest.mark.parametrize(
    ("code", "attempts"),
    [("0A000", 1), ("42P05", 3), ("57014", 1), ("57P01", 1), ("40001", 10), ("40P01", 10)],
)
async def test_a_query_is_sent_so_often_and_no_more(
    pool: PipelinePool, table: str, monkeypatch: pytest.MonkeyPatch, code: str, attempts: int
) -> None:
    monkeypatch.setattr("pgpipeline.pool.PAUSE", 0.0001)
    with pytest.raises((Unavailable, UnexpectedError)):
        await ask(pool, FAILS, code=code, times=1000)
    assert value(table, "SELECT last_value FROM calls") == attempts


@pytest.mark.parametrize("code", ["40001", "08006", "53300", "55P03", "26000", "42P05"])
async def test_what_may_pass_is_unavailable(
    pool: PipelinePool, table: str, monkeypatch: pytest.MonkeyPatch, code: str
) -> None:
    monkeypatch.setattr("pgpipeline.pool.PAUSE", 0.0001)
    with pytest.raises(Unavailable, match=rf"^TEST: {code}$"):
        await ask(pool, FAILS, code=code, times=1000)


async def test_queries_in_conflict_all_succeed_since_they_pause(table: str) -> None:
    serializable = make_conninfo(table, options="-c default_transaction_isolation=serializable")
    toggle = "UPDATE stored SET n = 1 - n RETURNING n"
    value(table, "INSERT INTO stored VALUES (0)")
    async with pool_of(serializable, size=5, depth=5) as pool:
        for tenants in (1, 101):
            calls = [ask(pool, toggle, f"{n % tenants}") for n in range(101)]
            assert {result.rows[0] for result in await asyncio.gather(*calls)} == {(b"0",), (b"1",)}
    assert value(table, "SELECT n FROM stored") == 0


async def test_the_text_of_an_error_may_be_a_users_and_is_not_repeated(
    pool: PipelinePool, table: str
) -> None:
    with pytest.raises(UnexpectedError, match=r"^TEST: P0001$"):
        await ask(pool, FAILS, code="P0001", times=1)
    with pytest.raises(UnexpectedError, match=r'^TEST: 42P01 relation "absent" does not exist$'):
        await ask(pool, "SELECT 1 FROM absent")


# Time.


@pytest.mark.parametrize("bursts", ["", "a"])
async def test_a_query_that_takes_no_turn_from_others_may_take_longer(
    pool: PipelinePool, bursts: str
) -> None:
    bob = await start(pool, "SELECT 1 FROM pg_sleep(1.5)", "bob")
    with users(pool, bursts, "SELECT 1 FROM pg_sleep(0.001)", at_once=60):
        assert await bob


async def test_a_slow_query_is_cancelled_when_others_wait(database: str) -> None:
    async with pool_of(database, size=1) as pool:
        slow = asyncio.create_task(ask(pool, "SELECT 1 FROM pg_sleep(30)", "slow"))
        started = time.monotonic()
        calls = [ask(pool, "SELECT %(n)s::integer", "ann", n=n) for n in range(100)]
        results = await asyncio.gather(*calls)
        assert [result.rows for result in results] == [[(b"%d" % n,)] for n in range(100)]
        with pytest.raises(Unavailable):
            await slow
        assert time.monotonic() - started < 3  # and not only at the deadline of 5 s


async def test_a_slow_query_is_cancelled_when_its_tenant_waits_for_others(
    pool: PipelinePool,
) -> None:
    slow = await start(pool, "SELECT 1 FROM pg_sleep(30)", "ann")
    await asyncio.sleep(0.2)  # by then rule 3 lets her have one query under way
    assert await seconds(pool, "SELECT 1", "ann") < 2
    await outcomes(slow)


async def test_a_query_whose_caller_left_is_cancelled(pool: PipelinePool, database: str) -> None:
    query = await start(pool, "SELECT 1 FROM pg_sleep(30)")
    query.cancel()
    await asyncio.sleep(0.6)
    assert value(database, f"SELECT count(*) {OTHERS} AND state = 'active'") == 0


async def test_a_query_whose_caller_left_the_queue_is_not_sent(table: str) -> None:
    async with pool_of(table, size=1, depth=1) as pool:
        first = await start(pool, "SELECT 1 FROM pg_sleep(0.3)")
        waiting = [asyncio.create_task(ask(pool, INSERT, n=n)) for n in range(4)]
        await asyncio.sleep(0)
        waiting[1].cancel()
        waiting[2].cancel()
        await outcomes(first, *waiting)
        assert (await ask(pool, "SELECT sum(n) FROM stored")).rows == [(b"3",)]


async def test_a_query_has_failed_by_its_deadline(
    pool: PipelinePool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pgpipeline.pool.QUERY_TIMEOUT", 0.5)
    started = time.monotonic()
    with pytest.raises(Unavailable):
        await ask(pool, "SELECT 1 FROM pg_sleep(30)")
    assert 0.4 < time.monotonic() - started < 1.5


async def test_an_answer_that_lay_ready_while_the_process_stood_still_is_given(
    pool: PipelinePool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pgpipeline.pool.QUERY_TIMEOUT", 0.5)
    loop, (ours, theirs) = asyncio.get_running_loop(), socket.socketpair()
    with ours, theirs:
        query = await start(pool, "SELECT 1 FROM pg_sleep(0.3)")
        # From here the loop looks at its timers before it looks at its sockets.
        loop.add_reader(ours, lambda: time.sleep(0.7 * len(ours.recv(1))))
        theirs.send(b"x")
        assert (await query).rows == [(b"1",)]
        loop.remove_reader(ours)


async def test_when_a_pool_is_closed_queries_fail_that_wait_or_are_under_way(
    database: str,
) -> None:
    async with pool_of(database, size=1, depth=1) as pool:
        queries = [await start(pool, "SELECT 1 FROM pg_sleep(30)") for _ in range(2)]
    async with asyncio.timeout(1):
        results = await outcomes(*queries, ask(pool, "SELECT 1"))
    assert {type(result) for result in results} == {Unavailable}
    assert [str(result) for result in results[1:]] == ["the pool is closed"] * 2
    assert not pool.pipelines
    assert pool.connections.drained_at < 0  # other pools may use them


async def test_nothing_is_left_of_queries_however_they_end(
    table: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pgpipeline.pool.QUERY_TIMEOUT", 0.5)
    monkeypatch.setattr("pgpipeline.queue.SLOW_MEMORY", 0.1)
    async with pool_of(table, size=2) as pool:
        sqls = ["SELECT 1", "SELECT 1 / 0", "SELECT '\0'", "SELECT 1 FROM pg_sleep(9)"]
        calls = [asyncio.create_task(ask(pool, sqls[n % 4], f"{n % 10}")) for n in range(60)]
        calls += [asyncio.create_task(ask(pool, sqls[0], f"left {n}")) for n in range(10)]
        await asyncio.sleep(0.1)
        for call in calls[-10:]:
            call.cancel()
        await outcomes(*calls)
        await asyncio.sleep(1)
        assert (await ask(pool, "SELECT 1")).rows
        await asyncio.sleep(0.3)
        assert (pool.queue.tenants, pool.queue.waiting, pool.pipelines) == ({}, set(), [])
        assert pool.queue.heads == []


# Fairness.


@contextmanager
def users(pool: PipelinePool, names: str, sql: str, at_once: int = 1) -> Iterator[list[float]]:
    """Tenants who send queries as long as the block runs. Gives how many seconds each took."""
    times = list[float]()

    async def use(name: str) -> None:
        while True:
            times.append(await seconds(pool, sql, name))

    tasks = [asyncio.create_task(use(name)) for name in names * at_once]
    yield times
    for task in tasks:
        task.cancel()


async def test_nothing_is_sent_behind_a_slow_query(
    pool: PipelinePool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pgpipeline.queue.SLOW_MEMORY", 0.0)  # rule 3 does not know it yet
    slow = await start(pool, "SELECT 1 FROM pg_sleep(0.9)", "slow")
    started = time.monotonic()
    await asyncio.gather(*[ask(pool, "SELECT 1", f"{n}") for n in range(100)])
    assert time.monotonic() - started < 0.5
    await slow


# On a lone pipeline, each of a quick tenant's 8 queries waits for 2 slow ones.
@pytest.mark.parametrize(("size", "longest"), [(1, 3), (2, 1), (3, 1)])
async def test_neither_slow_tenants_nor_quick_ones_starve(
    database: str, size: int, longest: float
) -> None:
    async with pool_of(database, size) as pool:
        quick, slow = "SELECT 1 FROM pg_sleep(0.002)", "SELECT 1 FROM pg_sleep(0.15)"
        with users(pool, "abcdefgh", quick, at_once=8) as quicks, users(pool, "xy", slow) as slows:
            await asyncio.sleep(3)
        assert (max(quicks) < longest, max(slows) < longest) == (True, True)
        assert len(slows) > 4


async def test_slow_tenants_share_one_pipeline(pool: PipelinePool) -> None:
    with users(pool, "uvwxyz", "SELECT 1 FROM pg_sleep(0.3)"):
        await asyncio.sleep(1)  # by then they are known to be slow
        with users(pool, "abc", "SELECT 1 FROM pg_sleep(0.01)") as times:
            await asyncio.sleep(1.5)
    assert (statistics.median(times) < 0.08, max(times) < 0.25) == (True, True)


async def test_tenants_who_are_all_slow_use_all_pipelines_but_one(database: str) -> None:
    async with pool_of(database, size=4) as pool:
        with users(pool, "uvwxyz", "SELECT 1 FROM pg_sleep(0.3)") as times:
            await asyncio.sleep(3)
            used = {each for each in pool.pipelines if each.sent}
            assert await seconds(pool, "SELECT 1", "bob") < 0.2
    assert (len(times) > 15, len(used)) == (True, 3)


async def test_nobody_is_sent_behind_a_tenant_who_is_known_to_be_slow(
    pool: PipelinePool, monkeypatch: pytest.MonkeyPatch
) -> None:
    await ask(pool, "SELECT 1 FROM pg_sleep(0.3)", "slow")
    await asyncio.sleep(0.3)  # by then the pipeline has gone
    monkeypatch.setattr("pgpipeline.pipeline.SLOW", 1.0)  # so that the next one is never silent
    slow = asyncio.create_task(ask(pool, "SELECT 1 FROM pg_sleep(0.5)", "slow"))
    await asyncio.sleep(0.05)
    assert await seconds(pool, "SELECT 1", "bob") < 0.3
    await slow


async def test_the_first_query_of_a_tenant_waits_for_a_pipeline_and_not_behind_a_burst(
    database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    acquire = ConnectionPool.acquire

    async def acquire_late(connections: ConnectionPool, needs: Any) -> Connection:
        await asyncio.sleep(0.1)
        return await acquire(connections, needs)

    monkeypatch.setattr(ConnectionPool, "acquire", acquire_late)
    async with pool_of(database, size=2) as pool:
        with users(pool, "a", "SELECT 1 FROM pg_sleep(0.05)", at_once=40):
            await asyncio.sleep(0.4)
            assert await seconds(pool, "SELECT 1", "bob") < 0.3


@pytest.mark.parametrize("size", [2, 3])
async def test_a_tenant_who_became_slow_does_not_take_the_pipeline_that_was_left(
    database: str, size: int
) -> None:
    async with pool_of(database, size) as pool:
        slow = [asyncio.create_task(ask(pool, "SELECT 1 FROM pg_sleep(0.8)", "a")) for _ in "12345"]
        await asyncio.sleep(0.4)  # by then it is known to be slow
        assert await seconds(pool, "SELECT 1", "bob") < 0.3
    await asyncio.gather(*slow, return_exceptions=True)


# Sharing.


async def test_a_value_larger_than_the_sockets_buffer_is_sent_without_pauses(
    pool: PipelinePool,
) -> None:
    started = time.monotonic()
    result = await ask(pool, "SELECT length(%(text)s::text)", text="x" * 8_000_000)
    assert result.rows == [(b"8000000",)]
    assert time.monotonic() - started < 1.5


@pytest.mark.parametrize(
    ("size", "depth", "tenants", "pipelines"), [(2, 3, 100, 2), (2, 1, 100, 2), (2, 3, 1, 1)]
)
async def test_a_pool_has_so_many_pipelines_and_each_so_many_queries(
    database: str, size: int, depth: int, tenants: int, pipelines: int
) -> None:
    async with pool_of(database, size, depth) as pool:
        calls = [ask(pool, "SELECT 1 FROM pg_sleep(0.01)", f"{n % tenants}") for n in range(100)]
        work, seen = asyncio.gather(*calls), set[tuple[int, int]]()
        while not work.done():
            lengths = [len(pipeline.sent) for pipeline in pool.pipelines]
            seen.add((len(lengths), max(lengths, default=0)))
            await asyncio.sleep(0)
    assert max(n for n, _ in seen) == pipelines
    assert max(longest for _, longest in seen) == depth


async def test_a_pool_with_too_few_connections_keeps_and_fills_its_pipelines(database: str) -> None:
    async with pool_of(database, size=3, max_size=1) as pool:
        with users(pool, "abcdefgh", "SELECT 1 FROM pg_sleep(0.001)", at_once=4):
            await asyncio.sleep(0.3)
            [pipeline], lengths = pool.pipelines, set[int]()
            for _ in range(150):  # 1.5 seconds
                await asyncio.sleep(0.01)
                lengths.add(len(pipeline.sent))
            assert (pool.pipelines, max(lengths)) == ([pipeline], 16)


@pytest.mark.parametrize(("size", "depth"), [(0, 1), (1, 0)])
async def test_a_pool_without_pipelines_or_depth_is_refused(size: int, depth: int) -> None:
    with pytest.raises(ValueError, match="1 or more"):
        PipelinePool(ConnectionPool("", max_size=1), size, depth)


async def test_queries_that_come_in_one_turn_of_the_loop_are_dispatched_together(
    pool: PipelinePool, monkeypatch: pytest.MonkeyPatch
) -> None:
    dispatch, calls = PipelinePool.dispatch, list[PipelinePool]()

    def count(pool: PipelinePool) -> None:
        calls.append(pool)
        dispatch(pool)

    async def use(name: str) -> None:
        for _ in range(50):
            await ask(pool, "SELECT 1", name)

    monkeypatch.setattr(PipelinePool, "dispatch", count)
    await asyncio.gather(*[use(f"{n}") for n in range(40)])  # 2,000 queries
    assert len(calls) < 1500  # 2,200 when each query that is put wakes it


async def test_queries_far_from_the_database_are_not_slow(database: str) -> None:
    proxy = Proxy(database)
    async with proxy.serve() as far:
        proxy.delay = 0.1
        async with pool_of(far, size=2) as pool:
            await ask(pool, "SELECT 1")
            started = time.monotonic()
            await asyncio.gather(*[ask(pool, "SELECT 1") for _ in range(16)])
            assert time.monotonic() - started < 1.5
            assert not pool.queue.slow


@pytest.mark.parametrize("waits", [True, False])
async def test_a_busy_pipeline_gives_its_connection_back_in_time(
    database: str, monkeypatch: pytest.MonkeyPatch, waits: bool
) -> None:
    monkeypatch.setattr("pgpipeline.pipeline.MAX_HOLD", 60 if waits else 0.3)
    async with ConnectionPool(database, max_size=1) as connections:
        busy, other = PipelinePool(connections, 1, 16), PipelinePool(connections, 1, 16)
        with users(busy, "abcd", "SELECT 1 FROM pg_sleep(0.01)"):
            await asyncio.sleep(0.1)
            call = asyncio.create_task(ask(other if waits else busy, "SELECT 1"))
            await asyncio.sleep(1.4)
            assert call.done()
        assert waits or connections.get_stats()["requests_num"] >= 4
        await outcomes(busy.close(), other.close())


async def test_two_pools_that_share_a_connection_have_turns(database: str) -> None:
    async with ConnectionPool(database, max_size=1) as connections:
        one, other = PipelinePool(connections, 3, 16), PipelinePool(connections, 3, 16)
        sql = "SELECT 1 FROM pg_sleep(0.01)"
        with users(one, "abcd", sql) as times, users(other, "abcd", sql) as others:
            await asyncio.sleep(0.5)
            before = len(times), len(others)
            await asyncio.sleep(2)
        assert min(len(times) - before[0], len(others) - before[1]) > 10
        await outcomes(one.close(), other.close())


async def test_who_waits_for_a_connection_does_not_wait_for_a_slow_query(database: str) -> None:
    async with pool_of(database, size=2, max_size=2) as pool:
        slow = await start(pool, "SELECT 1 FROM pg_sleep(3)", "slow")
        with users(pool, "ab", "SELECT 1 FROM pg_sleep(0.01)"):
            await asyncio.sleep(0.2)
            pool.pipelines[0].advance(State.DRAINING)  # as it may have been first to look
            async with asyncio.timeout(0.5):
                connection = await pool.connections.acquire()
            await pool.connections.release(connection)
        await outcomes(slow)


async def test_who_waits_for_a_connection_gets_one_and_no_more(database: str) -> None:
    async with pool_of(database, size=3, max_size=3) as pool:
        with users(pool, "abcdefgh", "SELECT 1 FROM pg_sleep(0.01)"):
            await asyncio.sleep(0.5)
            before = set(pool.pipelines)
            connection = await pool.connections.acquire()
            await asyncio.sleep(0.5)
            assert len(before & set(pool.pipelines)) == 2
            await pool.connections.release(connection)


async def test_a_query_is_traced_while_it_runs(database: str) -> None:
    seen = list[str]()

    @contextmanager
    def span(statement: Statement) -> Iterator[None]:
        seen.append(statement.name)
        yield
        seen.append("ended")

    async with ConnectionPool(database, max_size=1) as connections:
        pool = PipelinePool(connections, 1, 1, span=span)
        await ask(pool, "SELECT 1")
        await pool.close()
    assert seen == ["TEST", "ended"]
