"""Speaks SQL: the statements of the service, the connections they travel on, and the schema.

Statements do not wait for one another's answers. Each connection runs in libpq's pipeline mode and has a window of
them under way, with a Sync after each: every statement is its own transaction, and an error stays its own
(https://www.postgresql.org/docs/current/libpq-pipeline-mode.html).

The functions below their SQL are what the rest calls. A task is JSON that PostgreSQL rendered, passed on as bytes;
"no row" is None. All may raise Unavailable, those that write Refused, and nothing here knows of HTTP.
"""

import asyncio
import hashlib
import logging
import os
import re
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import Any, NamedTuple

import psycopg
from opentelemetry import trace
from psycopg import AsyncConnection, conninfo
from psycopg.pq import ConnStatus, DiagnosticField, ExecStatus
from psycopg.pq.abc import PGresult
from psycopg_pool import AsyncConnectionPool, PoolTimeout

DEADLINE = 5.0  # seconds for an answer, wherever they are spent: queue, connect, network, lock
PATIENCE = 1.0  # seconds until a statement is cancelled for the sake of those behind it; a list of 10 MB takes 0.1
# Connections, and statements under way on each. Reads cost the service's time: few connections, wide windows. Commits
# wait for the disk one after the other on a connection, and together across connections: more of those, narrow ones.
READERS, READ_WINDOW = 2, 16
WRITERS, WRITE_WINDOW = 6, 4
MAX_TRIES = 3  # of a statement whose first try is sure not to have happened
MAX_WAITING = 2000  # statements that may wait in a lane, at 20 KB a request; one more is refused at once
BOOT_PATIENCE = 30.0  # seconds that start-up waits for an absent database

# PostgreSQL writes a timestamptz in the session's zone; libpq asks for this one while it connects. (Poolers refuse
# the `options` way of asking, and a SET would reach their other clients.)
os.environ["PGTZ"] = "UTC"

log = logging.getLogger("todo.db")
tracer = trace.get_tracer("todo.db")


class Unavailable(Exception):
    """The database did not answer in time or cannot now. A write may have been made or not."""


class Refused(Exception):
    """PostgreSQL refused a value: SQLSTATE class 22, or a check constraint. Nothing was stored."""


class Conflict(Exception):
    """The unique constraint in the argument holds such a row already. Nothing was stored."""


class StatementFailed(Exception):
    """What no request should be able to cause: a bug of ours. The argument is the SQLSTATE."""


class Statement:
    """SQL with %(name)s parameters, numbered as the protocol wants them.

    Its name on the server has a digest of the text: behind a pooler another release may have prepared its own.
    """

    def __init__(self, text: str) -> None:
        self.parameters = list(dict.fromkeys(re.findall(r"%\((\w+)\)s", text)))
        numbered = re.sub(r"%\((\w+)\)s", lambda found: f"${self.parameters.index(found[1]) + 1}", text)
        self.text = numbered.encode()
        self.name = b"todo_" + hashlib.sha256(self.text).hexdigest()[:16].encode()
        self.label = ""  # the name of its constant
        self.only_reads = text.lstrip().startswith("SELECT")


Value = str | bool | int | None
Rows = list[tuple[Any, ...]]  # every column as bytes in PostgreSQL's text format, or None


def encode(value: Value) -> bytes | None:
    """A value in PostgreSQL's text format. Raises Refused for text that PostgreSQL cannot hold."""
    if value is None:
        return None
    encoded = str(value).encode(errors="surrogatepass")  # a lone surrogate is for PostgreSQL to refuse
    if b"\0" in encoded:  # libpq would send the text up to here
        raise Refused("22021")
    return encoded


@dataclass(slots=True, eq=False)
class Call:
    """A statement on its way, and the future that gets its rows."""

    statement: Statement
    values: list[bytes | None]
    reply: asyncio.Future[Rows]
    deadline: float
    tries: int = 1
    cancelled: bool = False


class Connection(AsyncConnection[Any]):
    """A connection in pipeline mode that knows its prepared statements, and those whose Parse is on its way."""

    prepared: set[bytes]
    parsed: set[bytes]
    refuses_writes: bool

    async def configure(self) -> None:
        self.prepared, self.parsed, self.refuses_writes = set(), set(), False
        self.pgconn.enter_pipeline_mode()

    def alive(self) -> bool:
        """False once the server has closed its end. It costs 1 us, where asking with a query costs a round trip:
        the first read takes the farewell that came while the connection lay idle, the second meets the end."""
        with suppress(psycopg.OperationalError):
            self.pgconn.consume_input()
            self.pgconn.consume_input()
        return self.pgconn.status == ConnStatus.OK


class Lane:
    """A queue of statements and the carriers that take them to PostgreSQL."""

    prepares = True  # until a pooler turns out to mix up prepared statements (PgBouncer before 1.21)

    def __init__(self, carriers: int, window: int) -> None:
        self.window = window
        self.waiting: asyncio.Queue[Call] = asyncio.Queue(MAX_WAITING)
        self.unsettled: set[Call] = set()
        self.carriers = [Carrier(self) for _ in range(carriers)]
        self.tasks: list[asyncio.Task[None]] = []

    def start(self) -> None:
        self.tasks = [asyncio.create_task(work) for work in (self.watch(), *(each.work() for each in self.carriers))]

    async def run(self, statement: Statement, values: dict[str, Value]) -> Rows:
        encoded = [encode(values[name]) for name in statement.parameters]
        call = Call(statement, encoded, asyncio.get_running_loop().create_future(), monotonic() + DEADLINE)
        try:
            self.waiting.put_nowait(call)
        except asyncio.QueueFull:
            raise Unavailable("too many statements wait") from None
        self.unsettled.add(call)
        try:
            return await call.reply
        finally:
            self.unsettled.discard(call)

    async def watch(self) -> None:
        """Sees to the deadlines. A timer for each call would cost it 1 us."""
        while True:
            await asyncio.sleep(0.1)
            now = monotonic()
            for call in [call for call in self.unsettled if call.deadline < now]:
                self.fail(call, Unavailable("no answer by the deadline"), again=False)
            for carrier in self.carriers:
                if carrier.unanswered:
                    carrier.step(carrier.tick)

    def fail(self, call: Call, error: Exception, again: bool) -> None:
        if call.reply.done():
            return
        if again and call.tries < MAX_TRIES and not self.waiting.full():
            call.tries += 1
            self.waiting.put_nowait(call)
        else:
            call.reply.set_exception(error)


# Statement not prepared or prepared twice, serialization failure, deadlock, cancelled in a neighbour's place, and
# read-only transaction.
NOT_RUN = {"26000", "42P05", "40001", "40P01", "57014", "25006"}


class Carrier:
    """Takes statements of its lane to PostgreSQL, on one connection at a time, and keeps a window of them under way.

    The event loop calls receive() and flush() while deliver() waits. psycopg's AsyncConnection.wait() would drive it
    too, but registers the socket anew for each reply: 15 us of each.
    """

    connection: Connection
    over: asyncio.Future[None]

    def __init__(self, lane: Lane) -> None:
        self.lane = lane
        self.unanswered: deque[Call] = deque()
        self.outcome: PGresult | None = None
        self.heard = 0.0

    async def work(self) -> None:
        """A carrier's life. What waits is taken when there is a connection, and not a moment before, but for the
        first; the connection goes back to the pool when nothing waits any more."""
        while True:
            first = await self.lane.waiting.get()
            self.connection = await borrow()
            try:
                await self.deliver(first)
            except Exception as error:  # whatever it was: the connection goes, the carrier stays
                log.warning("connection lost: %s", type(error).__name__)
                await self.connection.close()
                not_run = isinstance(error, psycopg.errors.AdminShutdown)
                for call in self.unanswered:
                    self.lane.fail(call, Unavailable("connection lost"), not_run or call.statement.only_reads)
            self.unanswered.clear()
            await pool.putconn(self.connection)

    async def deliver(self, first: Call) -> None:
        """Returns when every call is settled. Raises when the connection is lost, or silent for DEADLINE."""
        loop, socket = asyncio.get_running_loop(), self.connection.pgconn.socket
        self.over, self.outcome = loop.create_future(), None
        loop.add_reader(socket, self.step, self.receive)
        try:
            self.step(self.send, first)
            self.step(self.load)
            await self.over
        finally:
            loop.remove_reader(socket)
            loop.remove_writer(socket)

    def step(self, act: Callable[..., None], *args: Any) -> None:
        if self.over.done():
            return
        try:
            act(*args)
        except Exception as error:
            self.over.set_exception(error)

    def load(self) -> None:
        """Sends what waits, as far as the window goes."""
        waiting, retired = self.lane.waiting, self.connection.refuses_writes
        while len(self.unanswered) < self.lane.window and not waiting.empty() and not retired:
            self.send(waiting.get_nowait())
        self.flush()
        if not self.unanswered:
            if retired:  # since a failover it may lead to what is a standby now
                raise psycopg.errors.ReadOnlySqlTransaction
            self.over.set_result(None)

    def send(self, call: Call) -> None:
        if call.reply.done():  # nobody waits for it any more
            return
        if not self.unanswered:
            self.heard = monotonic()
        self.unanswered.append(call)
        statement, pgconn, parsed = call.statement, self.connection.pgconn, self.connection.parsed
        if not Lane.prepares:
            pgconn.send_query_params(statement.text, call.values)
        else:
            if statement.name not in parsed:
                pgconn.send_prepare(statement.name, statement.text)
                parsed.add(statement.name)
            pgconn.send_query_prepared(statement.name, call.values)
        pgconn.pipeline_sync()  # without it, all that is under way would be one transaction

    def flush(self) -> None:
        pgconn, loop = self.connection.pgconn, asyncio.get_running_loop()
        if pgconn.flush():  # the socket is full: 16 tasks of the largest size are a megabyte
            loop.add_writer(pgconn.socket, self.step, self.flush)
        else:
            loop.remove_writer(pgconn.socket)

    def receive(self) -> None:
        self.heard, pgconn = monotonic(), self.connection.pgconn
        pgconn.consume_input()
        gaps = 0
        while self.unanswered and not pgconn.is_busy():
            result = pgconn.get_result()
            gaps = 0 if result else gaps + 1
            if gaps > 1:  # one stands between two results; a broken connection has nothing else any more
                raise psycopg.OperationalError
            if result:
                self.take(result)
        self.load()

    def take(self, result: PGresult) -> None:
        """Settles a call when its Sync comes back: only then is its statement committed."""
        if result.status == ExecStatus.PIPELINE_SYNC:
            self.settle(self.unanswered.popleft(), self.outcome)
            self.outcome = None
        elif result.status == ExecStatus.COMMAND_OK:  # prepared, or done without rows
            self.connection.prepared.add(self.unanswered[0].statement.name)
        elif result.status != ExecStatus.PIPELINE_ABORTED:
            if not self.outcome and result.status == ExecStatus.FATAL_ERROR:
                raise_if_lost(result)
            self.outcome = result

    def tick(self) -> None:
        """Cancels a statement after PATIENCE, and after DEADLINE gives up the connection."""
        silence, call = monotonic() - self.heard, self.unanswered[0]
        if silence > DEADLINE:
            raise TimeoutError
        if (silence > PATIENCE or call.reply.done()) and not call.cancelled:  # done: nobody waits for it any more
            call.cancelled = True
            cancellation = asyncio.create_task(self.connection.cancel_safe(timeout=DEADLINE))
            cancellation.add_done_callback(asyncio.Task.exception)

    def settle(self, call: Call, outcome: PGresult | None) -> None:
        """Gives a call its rows, its error, or another try where the first is sure not to have happened."""
        if outcome is None or outcome.status == ExecStatus.TUPLES_OK:
            if not call.reply.done():
                call.reply.set_result(rows_of(outcome) if outcome else [])
            return
        sqlstate = sqlstate_of(outcome)
        prepared = call.statement.name in self.connection.prepared
        if not prepared:
            self.connection.parsed.discard(call.statement.name)
        if sqlstate == "42P05" or (sqlstate == "26000" and prepared):
            log.warning("prepared statements are off: a pooler on the way mixes them up")
            Lane.prepares = False
        self.connection.refuses_writes |= sqlstate == "25006"
        again = sqlstate in NOT_RUN and not call.cancelled
        self.lane.fail(call, error_of(sqlstate, outcome), again)


def rows_of(result: PGresult) -> Rows:
    columns, value = range(result.nfields), result.get_value
    return [tuple([value(row, column) for column in columns]) for row in range(result.ntuples)]


def sqlstate_of(result: PGresult) -> str:
    return (result.error_field(DiagnosticField.SQLSTATE) or b"").decode()


def raise_if_lost(error: PGresult) -> None:
    """Raises AdminShutdown when the server said farewell in place of an answer: rows come before the commit, so where
    none came there was none. Raises OperationalError when libpq itself tells of a broken connection."""
    sqlstate = sqlstate_of(error)
    if sqlstate == "57P01":
        raise psycopg.errors.AdminShutdown
    if not sqlstate:
        raise psycopg.OperationalError


def error_of(sqlstate: str, result: PGresult) -> Exception:
    """The error of this module for an SQLSTATE. PostgreSQL's own text is dropped: it may repeat the user's input."""
    if sqlstate == "23505":
        return Conflict((result.error_field(DiagnosticField.CONSTRAINT_NAME) or b"").decode())
    if sqlstate[:2] == "22" or sqlstate in {"23514", "23502"}:
        return Refused(sqlstate)
    if sqlstate[:2] in {"08", "40", "53", "57"} or sqlstate in {"25006", "55P03"}:
        return Unavailable(sqlstate)
    return StatementFailed(sqlstate)


def connection_string() -> str:
    """DATABASE_URL over our defaults: what the URL sets wins.

    Raises SystemExit with one line that names the variable when it is missing or malformed.
    """
    url = os.environ.get("DATABASE_URL")
    if not url:
        raise SystemExit("DATABASE_URL is not set: the service needs a PostgreSQL database")
    try:
        given = conninfo.conninfo_to_dict(url)
    except psycopg.ProgrammingError:  # it repeats the URL, password included
        raise SystemExit("DATABASE_URL is not of the form postgresql://user:password@host/database") from None
    ours: dict[str, Any] = {"application_name": "todo", "client_encoding": "utf8", "connect_timeout": 3}
    return conninfo.make_conninfo("", **{**ours, "keepalives_idle": 30, **given})


# max_idle: Neon suspends after 5 idle minutes, so unused connections go well before. reconnect_timeout: a pool that
# gives up after 2 s starts afresh when it is next asked; one that does not waits ever longer between its tries.
pool = AsyncConnectionPool(
    connection_string,
    connection_class=Connection,
    configure=Connection.configure,
    min_size=1,
    max_size=READERS + WRITERS,
    max_idle=90,
    max_lifetime=1800,
    reconnect_timeout=2,
    open=False,
)
# Two lanes, so that writes waiting for a lock never hold up a read.
reads, writes = Lane(READERS, READ_WINDOW), Lane(WRITERS, WRITE_WINDOW)


async def borrow() -> Connection:
    """A connection that the server has not closed, as soon as there is one."""
    while True:
        with suppress(PoolTimeout):  # ask each second: what sets the pool to connect is being asked
            connection = await pool.getconn(timeout=1)
            if connection.alive():
                return connection
            await connection.close()
            await pool.putconn(connection)


async def start() -> None:
    """Waits for the database, applies the schema and opens the connections. Raises Unavailable after BOOT_PATIENCE."""
    give_up = monotonic() + BOOT_PATIENCE
    while True:
        try:
            await apply_schema((Path(__file__).parent / "schema.sql").read_bytes())
            break
        except psycopg.OperationalError as error:
            if monotonic() > give_up:
                raise Unavailable(str(error).splitlines()[0]) from None
            await asyncio.sleep(0.5)
    await pool.open()
    reads.start()
    writes.start()


async def stop() -> None:
    """Closes the connections."""
    for task in reads.tasks + writes.tasks:
        task.cancel()
    await pool.close()


# Two sessions that create one table at once fail, IF NOT EXISTS or not: the lock lets one instance do it and the
# others find it done. It ends with the transaction, so that a pooler is no obstacle. An ordinary boot runs no DDL:
# it finds the digest of this very text in the comment of the table.
async def apply_schema(schema: bytes) -> None:
    """Applies the schema unless this text was the last to be applied."""
    digest = hashlib.sha256(schema).hexdigest()
    async with await AsyncConnection.connect(connection_string(), prepare_threshold=None) as connection:
        await connection.execute("SELECT pg_advisory_xact_lock(hashtext('todo schema'))")
        applied = await connection.execute("SELECT obj_description(to_regclass('tasks'), 'pg_class')")
        if await applied.fetchone() != (digest,):
            await connection.execute(schema)
            await connection.execute(f"COMMENT ON TABLE tasks IS '{digest}'".encode())
            log.info("schema applied")


async def fetch(statement: Statement, **values: Value) -> Rows:
    lane = reads if statement.only_reads else writes
    if not trace.get_current_span().is_recording():  # 0.3 us, where a span that nobody asked for is 6
        return await lane.run(statement, values)
    attributes = {"db.system.name": "postgresql", "db.query.summary": statement.label}
    with tracer.start_as_current_span(statement.label, kind=trace.SpanKind.CLIENT, attributes=attributes):
        return await lane.run(statement, values)


class Task(NamedTuple):
    """A task, or a page of them, as JSON in UTF-8; and what its ETag is made of."""

    json: bytes
    version: bytes


# The task that every answer shows, and the count of its writes. (row_to_json would need a subquery in RETURNING.)
TASK = """json_build_object(
    'id', id, 'user_id', user_id, 'title', title, 'description', description,
    'completed', completed, 'is_completed', completed, 'created_at', created_at, 'updated_at', updated_at
), version"""

SELECT_TASK = Statement(f"""
SELECT {TASK}
FROM tasks
WHERE user_id = %(user_id)s AND id = %(task_id)s
""")


async def select_task(user_id: str, task_id: str) -> Task | None:
    rows = await fetch(SELECT_TASK, user_id=user_id, task_id=task_id)
    return Task(*rows[0]) if rows else None


# A backward scan of the primary key from where the last page ended: page 100 costs what page 1 does. The one task
# too many tells that more follow, and the sum of the rows' hashes changes with any of them.
SELECT_TASKS = Statement("""
SELECT coalesce(json_agg(page), '[]'), coalesce(sum(hash_record_extended(page, 0)), 0), count(*)
FROM (
    SELECT id, user_id, title, description, completed, completed AS is_completed, created_at, updated_at
    FROM tasks
    WHERE user_id = %(user_id)s
        AND id < coalesce(%(after)s, 'ffffffff-ffff-ffff-ffff-ffffffffffff'::uuid)
        AND (completed = %(completed)s OR %(completed)s IS NULL)
    ORDER BY user_id DESC, id DESC
    LIMIT %(limit)s::integer + 1
) AS page
""")


async def select_tasks(user_id: str, after: str | None, completed: bool | None, limit: int) -> tuple[Task, str | None]:
    """Up to `limit` tasks as a JSON array, newest first, and the id of the last one while more follow."""
    [(page, version, count)] = await fetch(SELECT_TASKS, user_id=user_id, after=after, completed=completed, limit=limit)
    if int(count) <= limit:
        return Task(page, version), None
    # Quotes are escaped within JSON strings, so these bytes stand only where a task begins.
    surplus = page.rindex(b'{"id":')
    last = page.rindex(b'{"id":', 0, surplus)
    page_end = page.rindex(b",", 0, surplus)
    return Task(page[:page_end] + b"]", version), page[last + 7 : last + 43].decode()


# The user of an outside issuer has no row before the first task. Of two first tasks at once the second waits for the
# first's row; the foreign key is checked after both. A key that is there already makes the insert an update of
# nothing, which waits for a twin under way and gives the task with xmax set; with another body it gives no row.
INSERT_TASK = Statement(f"""
WITH owner AS (
    INSERT INTO users (id)
    VALUES (%(user_id)s)
    ON CONFLICT (id) DO NOTHING
)
INSERT INTO tasks (user_id, title, description, completed, idempotency_key, idempotency_digest)
VALUES (%(user_id)s, %(title)s, %(description)s, coalesce(%(completed)s, false), %(key)s, %(digest)s)
ON CONFLICT (user_id, idempotency_key) WHERE idempotency_key IS NOT NULL
DO UPDATE SET idempotency_key = excluded.idempotency_key
WHERE tasks.idempotency_digest = excluded.idempotency_digest
RETURNING {TASK}, id, xmax <> 0
""")


async def insert_task(user_id: str, task: dict[str, Value], key: str | None) -> tuple[Task, str, bool] | None:
    """Stores a task. Gives it, its id, and whether it was there before under this key; None if with another body."""
    values = {"description": None, "completed": None, **task}
    digest = key and hashlib.sha256(repr(sorted(values.items())).encode()).hexdigest()
    rows = await fetch(INSERT_TASK, user_id=user_id, key=key, digest=digest, **values)
    return (Task(*rows[0][:2]), rows[0][2].decode(), rows[0][3] == b"t") if rows else None


# NOT reads and writes under the row's lock: of 300 toggles at once, each one counts. The update is HOT, as no
# index has these columns.
UPDATE_TASK = Statement(f"""
UPDATE tasks
SET title = coalesce(%(title)s, title),
    description = CASE WHEN %(describe)s THEN %(description)s ELSE description END,
    completed = CASE WHEN %(toggle)s THEN NOT completed ELSE coalesce(%(completed)s, completed) END,
    version = version + 1,
    updated_at = now()
WHERE user_id = %(user_id)s AND id = %(task_id)s
    AND (%(versions)s::bigint[] IS NULL OR version = ANY (%(versions)s))
RETURNING {TASK}
""")


async def update_task(user_id: str, task_id: str, changes: dict[str, Value], versions: str | None) -> Task | None:
    """Changes title, description and completed where `changes` has them; its `toggle` flips completed.

    Only in one of the versions ("{3,4}"), unless that is None.
    """
    if not changes and versions is None:
        return await select_task(user_id, task_id)
    values = {"title": None, "description": None, "completed": None, "toggle": False, **changes}
    values |= {"user_id": user_id, "task_id": task_id, "versions": versions, "describe": "description" in changes}
    rows = await fetch(UPDATE_TASK, **values)
    return Task(*rows[0]) if rows else None


DELETE_TASK = Statement("""
DELETE FROM tasks
WHERE user_id = %(user_id)s AND id = %(task_id)s
    AND (%(versions)s::bigint[] IS NULL OR version = ANY (%(versions)s))
RETURNING id
""")


async def delete_task(user_id: str, task_id: str, versions: str | None) -> bool:
    """Deletes a task, in one of the versions unless that is None. False when there was none."""
    return bool(await fetch(DELETE_TASK, user_id=user_id, task_id=task_id, versions=versions))


USER = "json_build_object('id', id, 'email', email, 'created_at', created_at)"

INSERT_USER = Statement(f"""
INSERT INTO users (email, password_hash)
VALUES (%(email)s, %(password_hash)s)
RETURNING id, {USER}
""")


async def insert_user(email: str, password_hash: str) -> tuple[str, bytes]:
    """Stores an account. Gives its user id and the user as JSON. Raises Conflict("users_email_key")."""
    [(user_id, user)] = await fetch(INSERT_USER, email=email, password_hash=password_hash)
    return user_id.decode(), user


# Served by users_email_key.
SELECT_ACCOUNT = Statement(f"""
SELECT id, {USER}, password_hash
FROM users
WHERE lower(email) = lower(%(email)s)
""")


async def select_account(email: str) -> tuple[str, bytes, bytes] | None:
    """The user id, the user as JSON and the password hash."""
    rows = await fetch(SELECT_ACCOUNT, email=email)
    return (rows[0][0].decode(), rows[0][1], rows[0][2]) if rows else None


# The join gives one row in any case: a user of an outside issuer may have none here yet.
SELECT_USER = Statement("""
SELECT json_build_object('id', %(user_id)s::text, 'email', email, 'created_at', created_at)
FROM (VALUES (%(user_id)s)) AS asked (user_id)
LEFT JOIN users ON id = asked.user_id
""")


async def select_user(user_id: str) -> bytes:
    """The user as JSON; email and created_at are null as long as nothing is stored for them."""
    [(user,)] = await fetch(SELECT_USER, user_id=user_id)
    return bytes(user)


PING = Statement("SELECT 1")


async def ping() -> None:
    """Returns when the database answers."""
    await fetch(PING)


for name, value in list(globals().items()):
    if isinstance(value, Statement):
        value.label = name
