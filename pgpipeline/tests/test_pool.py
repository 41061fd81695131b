"""Statements that share connections: each gets its own answer, and none disturbs another.

These tests call fetch() themselves, since no request makes a statement fail on purpose. The last
ones use the service.
"""

import asyncio
import os
import shutil
import socket
import subprocess
import time
import uuid
from collections.abc import Awaitable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, LiteralString

import psycopg
import pytest
from httpx import Client
from psycopg.conninfo import conninfo_to_dict
from psycopg.pq import ConnStatus

import db
from conftest import Play, Server, client, free_port, serving, start, wait_for_start, wait_until
from pgpipeline import (
    ConnectionPool,
    ForeignKeyViolation,
    InvalidValue,
    PipelinePool,
    Statement,
    Unavailable,
    UnexpectedError,
    UniqueViolation,
    pipeline,
)


def statement(text: str) -> Statement:
    return Statement("TEST", text)


async def fetch(statement: Statement, **values: Any) -> list[Any]:
    return (await db.fetch(statement, **values)).rows


async def settle(calls: list[Awaitable[Any]]) -> list[Any]:
    """Waits for all calls. Gives the result or the exception of each."""
    return await asyncio.gather(*calls, return_exceptions=True)


# Answers.


def test_of_thousands_of_interleaved_statements_each_gets_its_own_answer(play: Play) -> None:
    async def story() -> None:
        values = "%(text)s::text, %(number)s::integer"
        echo = statement(f"SELECT {values}")
        write = statement(f"WITH nothing AS (SELECT 1) SELECT {values} FROM nothing")
        divide = statement("SELECT %(text)s::text, 10 / (%(number)s::integer - %(number)s)")

        async def ask(n: int) -> None:
            text = uuid.uuid4().hex
            if n % 7 == 0:
                with pytest.raises(InvalidValue):
                    await fetch(divide, text=text, number=n)
            else:
                rows = await fetch(write if n % 3 else echo, text=text, number=n)
                assert rows == [(text.encode(), str(n).encode())]

        await asyncio.gather(*[ask(n) for n in range(3000)])

    play(story)


def test_null_is_none_and_no_rows_are_an_empty_list(play: Play) -> None:
    async def story() -> None:
        assert await fetch(statement("SELECT %(text)s::text"), text=None) == [(None,)]
        assert await fetch(statement("SELECT 1 WHERE %(yes)s::boolean"), yes=False) == []

    play(story)


@pytest.mark.parametrize("text", ["a\0b", "\ud800"])
def test_text_that_postgresql_cannot_hold_is_an_invalid_value(play: Play, text: str) -> None:
    async def story() -> None:
        echo = statement("SELECT %(text)s::text")
        answers = await settle([fetch(echo, text=each) for each in ("a", text, "b")])
        assert isinstance(answers.pop(1), InvalidValue)
        assert answers == [[(b"a",)], [(b"b",)]]

    play(story)


# Errors.

INSERT_USER = "INSERT INTO todo.users (id) VALUES (%(user)s) RETURNING id"
INSERT_TASK = "INSERT INTO todo.tasks (user_id, title) VALUES (%(user)s, %(title)s) RETURNING id"
SELECT_IDS = "SELECT id FROM todo.tasks WHERE user_id = %(user)s"


def test_a_neighbours_error_neither_undoes_a_write_nor_hides_it(play: Play) -> None:
    async def story() -> None:
        fail = statement("WITH nothing AS (SELECT 1) SELECT 1 / %(number)s::integer FROM nothing")
        insert, user = statement(INSERT_TASK), uuid.uuid4().hex
        await fetch(statement(INSERT_USER), user=user)
        calls = [
            fetch(insert, user=user, title=f"{n}") if n % 2 else fetch(fail, number=0)
            for n in range(1000)
        ]
        answers = await settle([*calls])
        assert {type(answer) for answer in answers[::2]} == {InvalidValue}
        created = {answer[0][0] for answer in answers[1::2]}
        stored = await fetch(statement(SELECT_IDS), user=user)
        assert len(created) == 500
        assert {id for (id,) in stored} == created

    play(story)


def test_a_unique_violation_names_its_constraint(play: Play) -> None:
    async def story() -> None:
        insert, user = statement(INSERT_USER), uuid.uuid4().hex
        await fetch(insert, user=user)
        with pytest.raises(UniqueViolation, match=r"^users_pkey$"):
            await fetch(insert, user=user)

    play(story)


def test_a_check_constraint_is_an_invalid_value(play: Play) -> None:
    async def story() -> None:
        with pytest.raises(InvalidValue, match="23514"):
            await fetch(statement(INSERT_USER), user="")

    play(story)


def test_a_write_is_acknowledged_when_it_is_committed_and_not_when_its_rows_come(
    play: Play, table: str
) -> None:
    async def story() -> None:
        with psycopg.connect(table) as connection:
            connection.execute(
                "ALTER TABLE stored ADD UNIQUE (n),"
                " ADD other integer REFERENCES stored (n) DEFERRABLE INITIALLY DEFERRED"
            )
        insert = statement("INSERT INTO stored (n, other) VALUES (1, %(n)s::integer) RETURNING n")
        with pytest.raises(ForeignKeyViolation):
            await fetch(insert, n=7)
        assert value(table, "SELECT count(*) FROM stored") == 0

    play(story)


# Waiting.


def test_a_statement_whose_caller_left_disturbs_nobody(play: Play) -> None:
    async def story() -> None:
        echo = statement("SELECT %(number)s::integer FROM pg_sleep(0.001)")
        calls = [asyncio.create_task(fetch(echo, number=n)) for n in range(600)]
        await asyncio.sleep(0.05)
        for call in calls[::2]:
            call.cancel()
        answers = await settle([*calls])
        assert answers[1::2] == [[(str(n).encode(),)] for n in range(1, 600, 2)]

    play(story)


def test_a_slow_statement_is_cancelled_and_those_behind_it_are_answered(play: Play) -> None:
    async def story() -> None:
        slow, fast = statement("SELECT 1 FROM pg_sleep(30)"), statement("SELECT %(n)s::integer")
        started = time.monotonic()
        answers = await settle([fetch(slow), *[fetch(fast, n=n) for n in range(100)]])
        assert isinstance(answers[0], Unavailable)
        assert answers[1:] == [[(str(n).encode(),)] for n in range(100)]
        assert time.monotonic() - started < 4  # and not only at the deadline of 5 s

    play(story)


def test_beyond_the_queue_a_statement_is_refused_at_once_and_those_in_it_are_answered(
    play: Play,
) -> None:
    async def story() -> None:
        echo = statement("SELECT %(n)s::integer")
        answers = await settle([fetch(echo, n=n) for n in range(5000)])
        refused = [answer for answer in answers if isinstance(answer, Unavailable)]
        assert 0 < len(refused) < 4000
        for n, answer in enumerate(answers):
            assert isinstance(answer, Unavailable) or answer == [(str(n).encode(),)]

    play(story)


def test_a_write_that_waits_for_a_lock_holds_up_no_read(database: str, api: Client) -> None:
    tasks = [api.post("/tasks", json={"title": "x"}).json()["id"] for _ in range(8)]
    toggle = f"/tasks/{tasks[0]}/toggle"
    with psycopg.connect(database) as other, ThreadPoolExecutor(16) as pool:
        other.execute("SELECT 1 FROM todo.tasks WHERE id = %s FOR UPDATE", [tasks[0]])
        stuck = [pool.submit(api.patch, toggle) for _ in range(3)]
        time.sleep(0.1)
        assert {api.get("/tasks/" + id).status_code for id in tasks} == {200}
        assert not any(call.done() for call in stuck)  # each write waits a second for the lock
        assert {call.result().status_code for call in stuck} == {503}
        waiting = "SELECT 1 FROM pg_locks WHERE NOT granted"
        wait_until(lambda: not other.execute(waiting).fetchall())  # the last one is cancelled late
        other.rollback()
    assert api.patch(toggle).json()["completed"] is True


# Lost connections, and statements that are sent again.


@pytest.fixture
def table(database: str) -> Iterator[str]:
    """The database, with a table, and a function that fails at first and counts its calls."""
    with psycopg.connect(database, autocommit=True) as connection:
        connection.execute(
            "CREATE TABLE stored (n integer); CREATE SEQUENCE calls;"
            "CREATE FUNCTION fails(code text, times integer) RETURNS bigint LANGUAGE plpgsql AS $$"
            "DECLARE call bigint := nextval('calls'); BEGIN IF call <= times THEN"
            "    RAISE EXCEPTION 'a secret' USING ERRCODE = code; END IF; RETURN call; END $$"
        )
        yield database
        connection.execute("DROP FUNCTION fails; DROP SEQUENCE calls; DROP TABLE stored")


def value(database: str, query: LiteralString) -> Any:
    with psycopg.connect(database) as connection:
        return (connection.execute(query).fetchone() or [None])[0]


FAILS = "INSERT INTO stored SELECT fails(%(code)s, %(times)s::integer) RETURNING n"
SLOW_INSERT = "INSERT INTO stored SELECT 1 FROM pg_sleep(0.5) RETURNING n"
OTHERS = "FROM pg_stat_activity WHERE query LIKE '%pg_sleep%' AND pid <> pg_backend_pid()"
END: dict[str, LiteralString] = {
    "terminate": f"SELECT pg_terminate_backend(pid) {OTHERS}",
    "cancel": f"SELECT pg_cancel_backend(pid) {OTHERS}",
}


async def started(pool: PipelinePool, text: str) -> asyncio.Task[Any]:
    """A statement that PostgreSQL is working on."""
    call = asyncio.create_task(pool.execute(statement(text), {}))
    await asyncio.sleep(0.2)
    return call


def cut(pool: PipelinePool) -> None:
    """Ends the connections that the pool's pipelines use, without a word from PostgreSQL."""
    for each in pool.pipelines:
        with socket.socket(fileno=os.dup(each.connection.pgconn.socket)) as peer:
            peer.shutdown(socket.SHUT_RDWR)


def test_a_read_whose_connection_is_lost_is_sent_again(play: Play) -> None:
    async def story() -> None:
        call = await started(db.reads, "SELECT 1 FROM pg_sleep(0.5)")
        cut(db.reads)
        assert (await call).rows == [(b"1",)]

    play(story)


def test_a_write_whose_connection_is_lost_is_not_sent_again(play: Play, table: str) -> None:
    async def story() -> None:
        call = await started(db.writes, SLOW_INSERT)
        cut(db.writes)
        with pytest.raises(Unavailable):
            await call
        await asyncio.sleep(1)
        assert value(table, "SELECT count(*) FROM stored") == 1  # PostgreSQL made it all the same

    play(story)


def test_a_socket_that_gets_the_number_of_a_lost_one_is_watched(
    play: Play, monkeypatch: pytest.MonkeyPatch
) -> None:
    received, replaced = asyncio.Event(), list[int]()
    ours, theirs = socket.socketpair()
    step = pipeline.Pipeline.step

    def replace(self: pipeline.Pipeline, watch: Any = None) -> None:
        """Opens a socket as soon as libpq has closed the one that was cut."""
        pgconn = self.connection.pgconn
        number = pgconn.socket if pgconn.status == ConnStatus.OK else None
        step(self, watch)
        if number and pgconn.status != ConnStatus.OK and not replaced:
            replaced.append(os.dup2(ours.fileno(), number))
            asyncio.get_running_loop().add_reader(number, received.set)

    async def story() -> None:
        monkeypatch.setattr(pipeline.Pipeline, "step", replace)
        call = await started(db.reads, "SELECT 1 FROM pg_sleep(0.5)")
        cut(db.reads)
        assert (await call).rows == [(b"1",)]
        theirs.send(b"x")
        await asyncio.wait_for(received.wait(), 1)
        asyncio.get_running_loop().remove_reader(replaced[0])
        os.close(replaced[0])

    with ours, theirs:
        play(story)


@pytest.mark.parametrize("how", END)
def test_a_write_that_postgresql_says_it_has_not_made_is_made_once(
    play: Play, table: str, how: str
) -> None:
    async def story() -> None:
        call = await started(db.writes, SLOW_INSERT)
        value(table, END[how])
        assert (await call).rows == [(b"1",)]
        assert value(table, "SELECT count(*) FROM stored") == 1

    play(story)


@pytest.mark.parametrize("code", ["0A000", "25006", "26000", "40001", "40P01", "42P05", "57014"])
def test_a_statement_that_has_not_run_is_sent_again(play: Play, table: str, code: str) -> None:
    async def story() -> None:
        assert await fetch(statement(FAILS), code=code, times=1) == [(b"2",)]

    play(story)


def test_a_statement_is_sent_three_times_at_most(play: Play, table: str) -> None:
    async def story() -> None:
        with pytest.raises(Unavailable):
            await fetch(statement(FAILS), code="40001", times=1000)
        assert value(table, "SELECT last_value FROM calls") == 3

    play(story)


def test_what_postgresql_says_of_an_error_may_be_a_users_and_is_not_repeated(
    play: Play, table: str
) -> None:
    async def story() -> None:
        with pytest.raises(UnexpectedError) as raised:
            await fetch(statement(FAILS), code="P0001", times=1)
        assert str(raised.value) == "TEST: P0001"

    play(story)


@pytest.mark.parametrize("text", ["DEALLOCATE ALL", "SET default_transaction_read_only = on"])
def test_a_session_that_was_changed_fails_nothing(play: Play, table: str, text: str) -> None:
    async def story() -> None:
        insert = statement("INSERT INTO stored VALUES (%(n)s::integer) RETURNING n")
        await fetch(insert, n=1)
        await db.writes.execute(statement(text), {})
        assert await fetch(insert, n=2) == [(b"2",)]

    play(story)


def test_a_column_may_change_its_type_while_statements_are_prepared(play: Play, table: str) -> None:
    async def story() -> None:
        insert = statement("INSERT INTO stored VALUES (%(n)s::integer) RETURNING n")
        await fetch(insert, n=1)
        with psycopg.connect(table) as connection:
            connection.execute("ALTER TABLE stored ALTER n TYPE text")
        assert (await db.fetch(insert, n=2)).json() == b'{"n":"2"}'

    play(story)


def test_a_statement_that_could_not_be_prepared_is_prepared_later(play: Play, table: str) -> None:
    async def story() -> None:
        late = statement("SELECT n FROM late")
        with pytest.raises(UnexpectedError, match="42P01"):
            await fetch(late)
        with psycopg.connect(table) as connection:
            connection.execute("CREATE TABLE late (n integer)")
        assert await fetch(late) == []

    play(story)
    with psycopg.connect(table) as connection:
        connection.execute("DROP TABLE late")


# Connections that rest.


async def open_all(amount: int = 8) -> None:
    """Opens the connections of db.py, and lets them rest."""
    borrowed = [await db.connections.acquire() for _ in range(amount)]
    for connection in borrowed:
        await db.connections.putconn(connection)


@contextmanager
def dead_peers() -> Iterator[None]:
    """Nobody answers on the connections that rest, and nobody has said goodbye."""
    pairs = [socket.socketpair() for _ in db.connections._pool]
    for connection, (ours, _) in zip(db.connections._pool, pairs, strict=True):
        ours.setblocking(False)
        os.dup2(ours.fileno(), connection.pgconn.socket)
    yield
    for each in [end for pair in pairs for end in pair]:
        each.close()


def test_connections_that_postgresql_has_ended_fail_nothing(play: Play, table: str) -> None:
    async def story() -> None:
        await open_all()
        value(table, "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity"
              " WHERE application_name = 'todo'")  # fmt: skip
        await asyncio.sleep(0.2)
        assert (await db.writes.execute(statement(SLOW_INSERT), {})).rows == [(b"1",)]
        assert value(table, "SELECT count(*) FROM stored") == 1

    play(story)


def test_connections_that_rested_and_whose_peers_vanished_fail_no_write(
    play: Play, table: str
) -> None:
    async def story() -> None:
        await open_all()
        for connection in db.connections._pool:
            connection.last_used -= 20
        with dead_peers():
            assert (await db.writes.execute(statement(SLOW_INSERT), {})).rows == [(b"1",)]

    play(story)


def test_a_lost_connection_condemns_those_that_rest(
    play: Play, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def story() -> None:
        one = statement("SELECT 1")
        await open_all()
        monkeypatch.setattr(pipeline, "QUERY_TIMEOUT", 0.5)
        with dead_peers():
            with pytest.raises(Unavailable):
                await fetch(one)
            await asyncio.sleep(0.5)
            assert await fetch(one) == [(b"1",)]

    play(story)


# Time.


def test_a_statement_that_nobody_waits_behind_may_take_longer(play: Play) -> None:
    async def story() -> None:
        assert await fetch(statement("SELECT 1 FROM pg_sleep(1.7)")) == [(b"1",)]

    play(story)


def test_a_statement_that_nobody_waits_for_is_cancelled(play: Play, database: str) -> None:
    async def story() -> None:
        call = await started(db.reads, "SELECT 1 FROM pg_sleep(30)")
        call.cancel()
        await asyncio.sleep(0.6)
        assert value(database, f"SELECT count(*) {OTHERS} AND state = 'active'") == 0

    play(story)


def test_a_statement_has_failed_by_its_deadline(
    play: Play, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def story() -> None:
        begun = time.monotonic()
        with pytest.raises(Unavailable):
            await fetch(statement("SELECT 1 FROM pg_sleep(30)"))
        assert 0.4 < time.monotonic() - begun < 1.5

    monkeypatch.setattr(pipeline, "QUERY_TIMEOUT", pipeline.QUERY_TIMEOUT / 10)
    play(story)


def test_nothing_is_sent_behind_a_slow_statement(play: Play) -> None:
    async def story() -> None:
        slow = await started(db.reads, "SELECT 1 FROM pg_sleep(0.9)")
        begun, one = time.monotonic(), statement("SELECT 1")
        await asyncio.gather(*[fetch(one) for _ in range(100)])
        assert time.monotonic() - begun < 0.5
        await slow

    play(story)


def test_queries_that_wait_wake_the_pool_no_more_often_than_answers_do(
    play: Play, monkeypatch: pytest.MonkeyPatch
) -> None:
    dispatch, calls = PipelinePool.dispatch, list[int]()

    def count(pool: PipelinePool, answered: Any = None) -> None:
        calls.append(len(pool.queue))
        dispatch(pool, answered)

    async def ask() -> None:
        for _ in range(50):
            await db.writes.execute(statement("SELECT pg_sleep(0.001)"), {})

    async def story() -> None:
        await asyncio.gather(*[ask() for _ in range(40)])  # 2,000 queries

    monkeypatch.setattr(PipelinePool, "dispatch", count)
    play(story)
    assert len(calls) < 5 * 2000  # 2 a query, where each query that waited once made 10 to 14


def test_one_users_slow_statements_leave_a_pipeline_to_others(play: Play) -> None:
    async def story() -> None:
        slow = statement("SELECT %(user_id)s FROM pg_sleep(0.8)")
        calls = []
        for _ in range(3):
            calls.append(asyncio.create_task(fetch(slow, user_id="one")))
            await asyncio.sleep(0.25)  # slowness is looked for every 0.1 s
        begun = time.monotonic()
        await fetch(statement("SELECT %(user_id)s"), user_id="other")
        assert time.monotonic() - begun < 0.1
        await settle([*calls])

    play(story)


# Sharing.


def test_a_parameter_larger_than_the_sockets_buffer_is_sent_without_pauses(play: Play) -> None:
    async def story() -> None:
        begun = time.monotonic()
        length = statement("SELECT length(%(text)s::text)")
        assert await fetch(length, text="x" * 8_000_000) == [(b"8000000",)]
        assert time.monotonic() - begun < 1.5

    play(story)


async def watch(pool: PipelinePool, work: asyncio.Future[Any]) -> tuple[int, int]:
    """The most pipelines that the pool had at a time, and the most statements in one of them."""
    pipelines, longest = 0, 0
    while not work.done():
        pipelines = max(pipelines, len(pool.pipelines))
        longest = max([longest, *[len(each.sent) for each in pool.pipelines]])
        await asyncio.sleep(0)
    return pipelines, longest


def test_a_pool_has_so_many_pipelines_and_each_so_many_statements(play: Play) -> None:
    async def story() -> None:
        pool = PipelinePool(db.connections, size=2, depth=3)
        one = statement("SELECT 1 FROM pg_sleep(0.01)")
        work = asyncio.gather(*[pool.execute(one, {}) for _ in range(100)])
        assert await watch(pool, work) == (2, 3)
        await pool.close()

    play(story)


@pytest.mark.parametrize("waits", [True, False])
def test_a_busy_pipeline_gives_its_connection_back_in_time(
    play: Play, database: str, monkeypatch: pytest.MonkeyPatch, waits: bool
) -> None:
    async def story() -> None:
        async with ConnectionPool(database, max_size=1) as connections:
            busy, other = PipelinePool(connections, 1, 16), PipelinePool(connections, 1, 16)
            one, until = statement("SELECT 1 FROM pg_sleep(0.01)"), time.monotonic() + 1.5
            await busy.execute(one, {})
            call = asyncio.create_task((other if waits else busy).execute(one, {}))

            async def ask() -> None:  # four of these: it is never without a query
                while time.monotonic() < until:
                    await busy.execute(one, {})

            await asyncio.gather(*[ask() for _ in range(4)])
            assert call.done()
            assert waits or connections.get_stats()["requests_num"] >= 4
            await settle([busy.close(), other.close()])

    monkeypatch.setattr(pipeline, "MAX_HOLD", 60 if waits else 0.3)
    play(story)


# Poolers.


@contextmanager
def pgbouncer(database: str, folder: Path, tracks: int, size: int = 3) -> Iterator[str]:
    """A PgBouncer that shares `size` connections to the database by transaction.

    It tracks so many prepared statements of each connection.
    """
    port, target = free_port(), conninfo_to_dict(database)
    user, host = target.get("user", "postgres"), str(target.get("host") or "/var/run/postgresql")
    address = f"host={host} port={target.get('port', 5432)} dbname={target['dbname']}"
    (folder / "users").write_text(f'"{user}" "{target.get("password", "")}"\n')
    (folder / "ini").write_text(
        f"[databases]\ntodo_test = {address}\n"
        f"[pgbouncer]\nlisten_addr = 127.0.0.1\nlisten_port = {port}\nunix_socket_dir =\n"
        f"auth_type = trust\nauth_file = {folder}/users\n"
        f"pool_mode = transaction\ndefault_pool_size = {size}\n"
        + (f"max_prepared_statements = {tracks}\n" if PGBOUNCER >= (1, 21) else "")
    )
    command = ["pgbouncer", str(folder / "ini")]
    if os.geteuid() == 0:  # it refuses to run as root
        for path in (folder, *folder.parents[:2], folder / "ini", folder / "users"):
            path.chmod(0o755)
        command[1:1] = ["-u", Path(host).owner() if host.startswith("/") else "nobody"]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    try:
        wait_for_start(process, port)
        yield f"postgresql://{user}@127.0.0.1:{port}/todo_test"
    finally:
        process.terminate()
        process.wait(30)


def version_of_pgbouncer() -> tuple[int, ...]:
    """(0,) where it is not installed."""
    if not shutil.which("pgbouncer"):
        return (0,)
    shown = subprocess.run(["pgbouncer", "--version"], capture_output=True, text=True).stdout
    return tuple(int(part) for part in shown.split()[1].split("."))


PGBOUNCER = version_of_pgbouncer()
needs_pgbouncer = pytest.mark.skipif(PGBOUNCER == (0,), reason="pgbouncer is not installed")


@needs_pgbouncer
def test_a_pooler_that_mixes_up_prepared_statements_is_refused_with_one_line(
    database: str, tmp_path: Path
) -> None:
    with pgbouncer(database, tmp_path, tracks=0) as url:
        ended = start(url)
    *_, last = (ended.stdout + ended.stderr).splitlines()
    assert "a pooler that mixes up prepared statements" in last
    assert (ended.returncode, "Traceback" in ended.stderr) == (1, False)


@needs_pgbouncer
def test_a_database_that_the_pooler_does_not_know_stops_the_start_at_once(
    database: str, tmp_path: Path
) -> None:
    with pgbouncer(database, tmp_path, tracks=0) as url:
        ended = start(url.replace("/todo_test", "/nowhere"))
    *_, last = (ended.stdout + ended.stderr).splitlines()
    assert '"DATABASE_URL does not work: ' in last
    assert "no such database: nowhere" in last


@pytest.fixture
def pooled(database: str, tmp_path: Path) -> Iterator[Server]:
    """A service that reaches its database through PgBouncer."""
    if PGBOUNCER < (1, 21):
        pytest.skip("pgbouncer is not installed, or older than 1.21")
    with pgbouncer(database, tmp_path, 100) as url, serving(url, tmp_path / "log") as server:
        yield server


def test_a_pooler_that_tracks_prepared_statements_changes_no_answer(pooled: Server) -> None:
    def use(n: int) -> None:
        api, stranger = (one, other) if n % 2 else (other, one)
        created = api.post("/tasks", json={"title": f"{n}"})
        assert created.status_code == 201
        path = "/tasks/" + created.json()["id"]
        assert api.get(path).json() == created.json()
        assert api.patch(path + "/toggle").json() == api.get(path).json()
        assert stranger.get(path).status_code == 404

    with client(pooled) as one, client(pooled) as other, ThreadPoolExecutor(16) as pool:
        list(pool.map(use, range(300)))
