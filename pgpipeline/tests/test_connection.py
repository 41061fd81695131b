"""Connections that are lost, idle, refused, or changed: no query fails without need, or twice."""

import asyncio
import logging
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, LiteralString

import psycopg
import pytest
from psycopg.conninfo import make_conninfo
from psycopg.pq import ConnStatus

from pgpipeline import ConnectionPool, PipelinePool, Result, Statement, Unavailable, UnexpectedError
from pgpipeline.connection import Connection
from pgpipeline.pipeline import Pipeline, State
from pgpipeline.protocol import Protocol
from pgpipeline.queue import Query
from pgpipeline.tests.conftest import OTHERS, Proxy, ask, pool_of, start, value

pytestmark = pytest.mark.anyio
SLOW_INSERT = "INSERT INTO stored SELECT 1 FROM pg_sleep(0.5) RETURNING n"
END: dict[str, LiteralString] = {
    "terminate": f"SELECT pg_terminate_backend(pid) {OTHERS}",
    "cancel": f"SELECT pg_cancel_backend(pid) {OTHERS}",
}


# Connections in use.


def cut(connection: Connection) -> None:
    """Ends a connection without a word from PostgreSQL, as a proxy does."""
    with socket.socket(fileno=os.dup(connection.pgconn.socket)) as peer:
        peer.shutdown(socket.SHUT_RDWR)


def cut_all(pool: PipelinePool) -> None:
    for pipeline in pool.pipelines:
        cut(pipeline.connection)


async def test_a_read_whose_connection_is_lost_is_sent_again(pool: PipelinePool) -> None:
    query = await start(pool, "\n SELECT 1 FROM pg_sleep(0.5)")
    cut_all(pool)
    assert (await query).rows == [(b"1",)]


async def test_a_write_whose_connection_is_lost_is_not_sent_again(
    pool: PipelinePool, table: str
) -> None:
    query = await start(pool, SLOW_INSERT)
    cut_all(pool)
    with pytest.raises(Unavailable):
        await query
    await asyncio.sleep(1)
    assert value(table, "SELECT count(*) FROM stored") == 1  # PostgreSQL made it all the same


@pytest.mark.parametrize("how", END)
async def test_a_write_that_postgresql_says_it_has_not_made_is_made_once(
    pool: PipelinePool, table: str, how: str
) -> None:
    query = await start(pool, SLOW_INSERT)
    [pipeline] = pool.pipelines
    other = Query(Statement("OTHER", "SELECT 1"), [], "ann", query.get_loop().create_future())
    pipeline.cancelled = other  # as if it had been cancelled too late
    value(table, END[how])
    assert (await query).rows == [(b"1",)]
    assert value(table, "SELECT count(*) FROM stored") == 1
    assert how == "terminate" or not pipeline.cancelled  # that one has come


@pytest.mark.parametrize("fails", [True, False])
async def test_a_connection_is_closed_to_which_a_cancellation_may_still_be_on_its_way(
    pool: PipelinePool, monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    async def cancel_late(_: Connection, **__: float) -> None:
        await asyncio.sleep(0.2 if fails else 5)
        raise psycopg.errors.CancellationTimeout

    monkeypatch.setattr(Connection, "cancel_safe", cancel_late)
    query = await start(pool, "SELECT 1 FROM pg_sleep(0.6)")
    [pipeline] = pool.pipelines
    query.cancel()
    await asyncio.sleep(0.8)
    await pool.close()
    assert pipeline.connection.closed


async def test_a_lost_connection_is_seen_while_a_cancellation_is_on_its_way(
    pool: PipelinePool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Connection, "cancel_safe", lambda *_, timeout: asyncio.sleep(timeout))
    monkeypatch.setattr("pgpipeline.pipeline.STATEMENT_TIMEOUT", 0.1)
    slow = await start(pool, "SELECT 1 FROM pg_sleep(0.9)")
    await asyncio.sleep(0.2)  # by then rule 3 lets its tenant have one query under way
    query = asyncio.create_task(ask(pool, "SELECT 1"))  # waits, so that the first is cancelled
    await asyncio.sleep(0.2)
    cut_all(pool)
    async with asyncio.timeout(1.5):
        await asyncio.gather(slow, query)


async def test_a_write_that_met_the_end_of_an_idle_session_is_made_once(table: str) -> None:
    proxy = Proxy(table)
    proxy.delay = 0.05  # so that PostgreSQL's word is on its way when the write is sent
    async with proxy.serve() as far, pool_of(far, size=1) as pool:
        await ask(pool, "SELECT set_config('idle_session_timeout', '1ms', false)")
        await ask(pool, "INSERT INTO stored VALUES (1)")
    assert value(table, "SELECT count(*) FROM stored") == 1


async def test_a_write_sent_between_the_last_word_and_the_end_of_a_session_is_made_once(
    pool: PipelinePool, table: str
) -> None:
    await ask(pool, "SELECT 'pg_sleep'")
    [pipeline] = pool.pipelines
    asyncio.get_running_loop().remove_reader(pipeline.socket)
    value(table, END["terminate"])
    pipeline.connection.pgconn.consume_input()  # reads that word, and not yet the end
    assert (await ask(pool, "INSERT INTO stored VALUES (1) RETURNING n")).rows == [(b"1",)]
    assert value(table, "SELECT count(*) FROM stored") == 1


async def test_queries_that_are_sent_again_keep_their_order(table: str) -> None:
    sql = "INSERT INTO stored SELECT %(n)s::integer FROM pg_sleep(0.3)"
    async with pool_of(table, size=1, depth=2) as pool:
        queries = [asyncio.create_task(ask(pool, sql, n=n)) for n in range(4)]
        await asyncio.sleep(0.2)
        value(table, END["terminate"])
        await asyncio.gather(*queries)
    assert value(table, "SELECT array_agg(n) FROM stored") == [0, 1, 2, 3]


@pytest.mark.parametrize("end", ["RETURNING n, 'pg_sleep'", "/* pg_sleep */"])
async def test_a_write_whose_answer_came_before_the_end_of_its_session_is_not_sent_again(
    pool: PipelinePool, table: str, end: str
) -> None:
    value(
        table,
        "CREATE OR REPLACE FUNCTION commits_slowly() RETURNS trigger LANGUAGE plpgsql AS"
        " 'BEGIN PERFORM pg_sleep(0.7); RETURN NULL; END';"
        "CREATE CONSTRAINT TRIGGER slowly AFTER INSERT ON stored DEFERRABLE INITIALLY DEFERRED"
        " FOR EACH ROW EXECUTE FUNCTION commits_slowly()",
    )
    query = await start(pool, f"INSERT INTO stored SELECT nextval('calls') {end}")
    value(table, END["terminate"])
    with pytest.raises(Unavailable):
        await query
    value(table, "DROP FUNCTION commits_slowly CASCADE")
    assert value(table, "SELECT last_value FROM calls") == 1


async def test_an_answer_that_never_comes_is_a_lost_connection(pool: PipelinePool) -> None:
    query = await start(pool, "SELECT 1 FROM pg_sleep(0.5)")
    [pipeline] = pool.pipelines
    missing = Query(Statement("M", "SELECT 2"), [], "ann", query.get_loop().create_future())
    missing.tenant = pipeline.sent[0].tenant
    pipeline.sent.append(missing)
    missing.tenant.under_way.append(pipeline)
    assert (await query).rows == [(b"1",)]
    assert (await asyncio.wait_for(missing.result, 1)).rows == [(b"2",)]  # sent again: it reads
    assert pipeline.connection.closed


@pytest.mark.parametrize("under_way", [0, 1])
async def test_a_pipeline_that_is_cancelled_often_loses_neither_query_nor_connection(
    pool: PipelinePool, under_way: int
) -> None:
    await ask(pool, "SELECT 1")
    [pipeline], [task] = pool.pipelines, pool.tasks
    sql = "SELECT 1 FROM pg_sleep(0.5)"
    queries = [asyncio.create_task(ask(pool, sql)) for _ in range(under_way)]
    await asyncio.sleep(0.05 * under_way)
    async with pool.connections._lock:  # drain() waits for it, and putconn() of what is not lost
        for _ in range(3):
            task.cancel()
            await asyncio.sleep(0.01)
        assert pipeline.state > State.ACTIVE
    async with asyncio.timeout(2):
        assert [result.rows for result in await asyncio.gather(*queries)] == [[(b"1",)]] * under_way
    await asyncio.sleep(0.3)
    stats = pool.connections.get_stats()
    assert stats["pool_available"] == stats["pool_size"]


async def test_a_socket_that_gets_the_number_of_a_lost_one_is_watched(
    pool: PipelinePool, monkeypatch: pytest.MonkeyPatch
) -> None:
    received, replaced = asyncio.Event(), list[int]()
    ours, theirs = socket.socketpair()
    step = Pipeline.step

    def replace(self: Pipeline) -> None:
        """Opens a socket as soon as libpq has closed the one that was cut."""
        pgconn = self.connection.pgconn
        number = pgconn.socket if pgconn.status == ConnStatus.OK else None
        step(self)
        if number and pgconn.status != ConnStatus.OK and not replaced:
            replaced.append(os.dup2(ours.fileno(), number))
            asyncio.get_running_loop().add_reader(number, received.set)

    monkeypatch.setattr(Pipeline, "step", replace)
    with ours, theirs:
        query = await start(pool, "SELECT 1 FROM pg_sleep(0.5)")
        cut_all(pool)
        assert (await query).rows == [(b"1",)]
        theirs.send(b"x")
        await asyncio.wait_for(received.wait(), 1)
        asyncio.get_running_loop().remove_reader(replaced[0])
        os.close(replaced[0])


@pytest.mark.parametrize("sql", ["DEALLOCATE ALL", "SET default_transaction_read_only = on"])
async def test_a_session_that_was_changed_fails_nothing(table: str, sql: str) -> None:
    insert = "INSERT INTO stored VALUES (%(n)s::integer) RETURNING n"
    listed = "SELECT count(*) FROM pg_prepared_statements WHERE name ~ 'TEST'"
    async with pool_of(table, size=1, max_size=1) as pool:
        await ask(pool, insert, n=1)
        await ask(pool, sql)
        assert (await ask(pool, insert, n=2)).rows == [(b"2",)]
        assert (await ask(pool, listed)).rows == [(b"2",)]  # that one, and this one


@pytest.mark.parametrize("at_once", [1, 10])
async def test_writes_are_made_though_all_connections_lead_to_a_standby(
    table: str, at_once: int
) -> None:
    standby = make_conninfo(table, options="-c default_transaction_read_only=on")
    servers = iter([standby] * 8)
    async with ConnectionPool(lambda: next(servers, table), max_size=8) as connections:
        pool = PipelinePool(connections, 3, 16)
        await open_all(pool)
        calls = [ask(pool, "SELECT 1 FROM pg_sleep(0.01)", f"{n}") for n in range(100)]
        await asyncio.gather(*calls)
        assert len(pool.pipelines) == 3
        insert = "INSERT INTO stored VALUES (%(n)s::integer)"
        await asyncio.gather(*[ask(pool, insert, f"{n}", n=n) for n in range(at_once)])
        await pool.close()
    assert value(table, "SELECT count(*) FROM stored") == at_once


async def test_a_query_that_ends_its_session_costs_those_behind_it_no_attempt(table: str) -> None:
    ends = "SELECT pg_terminate_backend(pg_backend_pid()) FROM pg_sleep(0.05)"
    async with pool_of(table, size=1) as pool:
        poison = asyncio.create_task(ask(pool, ends))
        await asyncio.sleep(0)
        calls = [ask(pool, "INSERT INTO stored VALUES (%(n)s::integer)", n=n) for n in range(9)]
        await asyncio.gather(*calls)
        with pytest.raises(Unavailable):
            await poison
    assert value(table, "SELECT count(*) FROM stored") == 9


async def test_a_database_that_refuses_each_write_costs_few_connections(table: str) -> None:
    standby = make_conninfo(table, options="-c default_transaction_read_only=on")
    async with pool_of(standby) as pool:
        await open_all(pool)
        for _ in range(40):
            with pytest.raises(Unavailable):
                await ask(pool, "INSERT INTO stored VALUES (1) RETURNING n")
        assert pool.connections.get_stats()["connections_num"] < 200


async def test_a_mistake_in_our_code_is_logged_with_its_traceback(
    pool: PipelinePool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    await ask(pool, "SELECT 1")
    with monkeypatch.context() as broken:
        broken.setattr(Protocol, "keep", None)
        with pytest.raises(Unavailable):
            await ask(pool, "INSERT INTO absent VALUES (1)")
    assert "TypeError: 'NoneType' object is not callable" in caplog.text


async def test_a_statement_that_could_not_be_prepared_is_prepared_later(
    pool: PipelinePool, table: str
) -> None:
    with pytest.raises(UnexpectedError, match="42703"):
        await ask(pool, "SELECT late FROM stored")
    value(table, "ALTER TABLE stored ADD late integer")
    assert (await ask(pool, "SELECT late FROM stored")).rows == []


# Idle connections.


async def open_all(pool: PipelinePool) -> None:
    """Opens all connections, and leaves them idle."""
    connections = [await pool.connections.acquire() for _ in range(8)]
    for connection in connections:
        await pool.connections.release(connection)


@contextmanager
def dead_peers(pool: PipelinePool) -> Iterator[None]:
    """Nobody answers on the connections that are idle, and nobody has said goodbye."""
    pairs = [socket.socketpair() for _ in pool.connections._pool]
    for connection, (ours, _) in zip(pool.connections._pool, pairs, strict=True):
        ours.setblocking(False)
        os.dup2(ours.fileno(), connection.pgconn.socket)
    yield
    for each in [end for pair in pairs for end in pair]:
        each.close()


@pytest.mark.parametrize("says_so", [True, False])
async def test_idle_connections_that_were_ended_fail_nothing(
    pool: PipelinePool, table: str, says_so: bool
) -> None:
    await open_all(pool)
    for each in list(pool.connections._pool):
        if says_so:
            value(table, f"SELECT pg_terminate_backend({each.info.backend_pid})")
        else:
            cut(each)
    await asyncio.sleep(0.2)
    assert (await ask(pool, SLOW_INSERT)).rows == [(b"1",)]
    assert value(table, "SELECT count(*) FROM stored") == 1


async def test_connections_that_were_idle_for_long_and_whose_peers_vanished_fail_no_write(
    pool: PipelinePool, table: str
) -> None:
    await open_all(pool)
    for connection in pool.connections._pool:
        connection.last_used -= 20
    with dead_peers(pool):
        assert (await ask(pool, SLOW_INSERT)).rows == [(b"1",)]


async def test_a_pool_is_closed_at_once_while_a_peer_that_vanished_is_pinged(
    pool: PipelinePool,
) -> None:
    await open_all(pool)
    for connection in pool.connections._pool:
        connection.last_used -= 20
    with dead_peers(pool):
        query = await start(pool, "SELECT 1")
        async with asyncio.timeout(0.5):
            await pool.close()
        with pytest.raises(Unavailable):
            await query


async def test_an_idle_connection_whose_next_answer_is_not_the_pings_is_not_used(
    pool: PipelinePool,
) -> None:
    connection = await pool.connections.acquire()
    connection.pgconn.send_prepare(b"wrong", b"SELECT absent")
    connection.last_used -= 20
    with pytest.raises(psycopg.OperationalError):
        await connection.check()
    await connection.close()
    await pool.connections.release(connection)


async def test_a_lost_connection_condemns_those_that_are_idle(
    pool: PipelinePool, monkeypatch: pytest.MonkeyPatch
) -> None:
    await open_all(pool)
    monkeypatch.setattr("pgpipeline.pool.QUERY_TIMEOUT", 0.5)
    monkeypatch.setattr("pgpipeline.pipeline.CANCEL_TIMEOUT", 0.2)
    with dead_peers(pool):
        with pytest.raises(Unavailable):
            await ask(pool, "SELECT 1")
        await asyncio.sleep(1)
        assert (await ask(pool, "SELECT 1")).rows == [(b"1",)]


# Connections that cannot be had.


@pytest.mark.parametrize("why", ["not open", "refused", "closed", "broken"])
async def test_without_connections_queries_fail_by_the_deadline_and_nothing_spins(
    database: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    why: str,
) -> None:
    monkeypatch.setattr("pgpipeline.pool.QUERY_TIMEOUT", 1.0)
    caplog.set_level(logging.INFO)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    connections = ConnectionPool(f"port={port}" if why == "refused" else database, max_size=2)
    pool, tries = PipelinePool(connections, 2, 16), list[object]()
    acquire, getconn = ConnectionPool.acquire, ConnectionPool.getconn

    async def count_acquire(self: ConnectionPool, needs: Any) -> Connection:
        tries.append(self)
        return await acquire(self if why != "broken" else None, needs)  # type: ignore[arg-type]

    async def count_getconn(self: ConnectionPool, **given: float) -> Connection:
        tries.append(self)
        return await getconn(self, **given)

    monkeypatch.setattr(ConnectionPool, "acquire", count_acquire)
    monkeypatch.setattr(ConnectionPool, "getconn", count_getconn)
    if why != "not open":
        await connections.open()
    if why == "closed":
        await connections.close()
    started = time.monotonic()
    calls = [ask(pool, "SELECT 1", f"{n}") for n in range(100)]
    results = await asyncio.gather(*calls, return_exceptions=True)
    assert {type(result) for result in results} == {Unavailable}
    assert time.monotonic() - started < 2
    assert len(tries) < 30
    assert len(caplog.records) < 30, caplog.text
    await pool.close()
    await connections.close()


async def test_after_a_pipeline_has_failed_queries_are_sent_by_another(
    pool: PipelinePool, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, failures = Pipeline.run, iter([RuntimeError])

    async def fail_once(self: Pipeline) -> None:
        for failure in failures:
            raise failure
        await run(self)

    monkeypatch.setattr(Pipeline, "run", fail_once)
    assert (await ask(pool, "SELECT 1")).rows == [(b"1",)]


async def test_one_pipeline_at_a_time_waits_for_its_connection(database: str) -> None:
    connections = ConnectionPool(database, max_size=8)
    pool, calls = PipelinePool(connections, 3, 16), list[asyncio.Task[Result]]()
    for n in range(100):  # in many turns of the loop
        calls.append(asyncio.create_task(ask(pool, "SELECT 1", f"{n}")))
        await asyncio.sleep(0)
    opened = len(pool.tasks)
    await connections.open()
    await asyncio.gather(*calls)
    await pool.close()
    await connections.close()
    assert opened == 1


async def test_connections_are_made_again_when_the_database_is_back(database: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    addresses = iter([f"host=127.0.0.1 port={port}"] * 2)
    async with ConnectionPool(lambda: next(addresses, database), max_size=1) as connections:
        pool = PipelinePool(connections, 2, 16)
        assert (await ask(pool, "SELECT 1")).rows == [(b"1",)]
        await pool.close()
