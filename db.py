"""Speaks SQL: each statement of the service, above the function that runs it.

A task comes back as JSON that goes to the client as it is. "No row" is None. Each function may
raise Unavailable (503); one that writes may raise InvalidValue (422) too. A Statement that begins
with SELECT only reads. The values in a row are bytes.
"""

import hashlib
from pathlib import Path
from typing import NamedTuple
from uuid import UUID

from lib.pipeline import ConnectionPool, ForeignKeyViolation, PipelinePool, Rows, Statement, Value
from lib.postgres import connection_string, prepare_database
from lib.rows import cut_array, to_json
from lib.settings import BaseSettings


class Settings(BaseSettings):
    database_url: str = ""  # required, but for `python main.py`


settings = Settings.load()

# What a client may write, and what an answer shows (id first). A new field goes into WRITABLE.
WRITABLE = ["title", "description", "completed"]
SHOWN = ["id", "user_id", *WRITABLE, "completed AS is_completed", "created_at", "updated_at"]
COLUMNS = ", ".join(SHOWN)
SHAPE = hashlib.sha256(COLUMNS.encode()).hexdigest()[:8]  # in ETags: a new field makes all stale
PING_TTL = 5.0  # seconds that an answer of the database counts
PAGE_BYTES = 1_000_000  # at most: a client that never reads holds no more

# A formatter would put a line break before the f""" of each statement.
# fmt: off


class Task(NamedTuple):
    """A task as JSON in UTF-8, and its ETag: "version-SHAPE"."""

    json: bytes
    etag: str


# tasks_pkey serves every statement on tasks but INSERT.
SELECT_TASK = Statement("SELECT_TASK", f"""
SELECT {COLUMNS}, version
FROM todo.tasks
WHERE user_id = %(user_id)s AND id = %(task_id)s
""")


async def select_task(user_id: str, task_id: UUID) -> Task | None:
    return task_in(SELECT_TASK, await fetch(SELECT_TASK, user_id=user_id, task_id=task_id))


# A backward scan of the primary key from where the last page ended: without a filter, page 100
# costs what page 1 does. coalesce() keeps that one range, as OR would not. LIMIT + 1 tells whether
# more follow. Each task is one line, as JSON escapes line breaks: cut_array() cuts between lines.
# row_to_json() is twice as fast as lib's to_json(); Citus bars it in RETURNING.
SELECT_TASKS = Statement("SELECT_TASKS", f"""
SELECT '[' || coalesce(string_agg(row_to_json(page)::text, E',\\n'), '') || ']', count(*)
FROM (
    SELECT {COLUMNS}
    FROM todo.tasks
    WHERE user_id = %(user_id)s
        AND id < coalesce(%(after)s, 'ffffffff-ffff-ffff-ffff-ffffffffffff'::uuid)
        AND (completed = %(completed)s OR %(completed)s IS NULL)
    ORDER BY user_id DESC, id DESC
    LIMIT %(limit)s::integer + 1
    OFFSET %(offset)s::bigint
) AS page
""")


async def select_tasks(
    user_id: str, completed: bool | None, after: UUID | None, offset: int, limit: int
) -> tuple[bytes, str | None]:
    """Up to `limit` tasks or PAGE_BYTES, newest first, and the last id while more follow."""
    values: dict[str, Value] = {"user_id": user_id, "completed": completed, "after": after}
    [(array, count)] = await fetch(SELECT_TASKS, offset=offset, limit=limit, **values)
    return cut_array(array, has_surplus=int(count) > limit, max_size=PAGE_BYTES)


class Stored(NamedTuple):
    """A stored task, its id, and whether an earlier request with its key had stored it."""

    task: Task
    id: str
    replayed: bool


# A known Idempotency-Key makes this an update that changes nothing, as DO NOTHING returns no row.
# xmax is 0 in a new row only. The same key with other fields returns no row.
INSERT_TASK = Statement("INSERT_TASK", f"""
INSERT INTO todo.tasks (user_id, {", ".join(WRITABLE)}, idempotency_key, idempotency_digest)
VALUES (%(user_id)s, {", ".join(f"%({field})s" for field in WRITABLE)}, %(key)s, %(digest)s)
ON CONFLICT (user_id, idempotency_key) WHERE idempotency_key IS NOT NULL
DO UPDATE SET idempotency_key = excluded.idempotency_key
WHERE tasks.idempotency_digest = excluded.idempotency_digest
RETURNING {COLUMNS}, version, xmax <> 0
""")

INSERT_OWNER = Statement("INSERT_OWNER", """
INSERT INTO todo.users (id)
VALUES (%(user_id)s)
ON CONFLICT (id) DO NOTHING
""")


async def insert_task(
    user_id: str, fields: dict[str, Value], key: str | None, sent: str, outside: bool
) -> Stored | None:
    """Stores a task; returns None if its key came with another body. `sent` is the body as JSON.

    A user of an `outside` issuer gets a row with the first task. Raises ForeignKeyViolation for an
    account that has been deleted.
    """
    digest = hashlib.sha256(sent.encode()).hexdigest() if key else None
    values = {**fields, "user_id": user_id, "key": key, "digest": digest}
    try:
        rows = await fetch(INSERT_TASK, **values)
    except ForeignKeyViolation:
        if not outside:
            raise
        await fetch(INSERT_OWNER, user_id=user_id)
        rows = await fetch(INSERT_TASK, **values)
    task = task_in(INSERT_TASK, rows)
    return Stored(task, rows[0][0].decode(), rows[0][-1] == b"t") if task else None


# Fields that were not sent stay. The update is HOT, as no index has these columns.
# now() is the start of this UPDATE: one that began later may have been first to write.
UPDATE_TASK = Statement("UPDATE_TASK", f"""
UPDATE todo.tasks
SET {", ".join(f"{n} = CASE WHEN %(sets_{n})s THEN %({n})s ELSE {n} END" for n in WRITABLE)},
    version = version + 1,
    updated_at = greatest(now(), updated_at)
WHERE user_id = %(user_id)s AND id = %(task_id)s
    AND (%(versions)s::bigint[] IS NULL OR version = ANY (%(versions)s))
RETURNING {COLUMNS}, version
""")


async def update_task(
    user_id: str, task_id: UUID, changes: dict[str, Value], versions: list[int] | None
) -> Task | None:
    """Changes a task if its version is one of `versions` (of If-Match; None: any version)."""
    if not changes and versions is None:  # a read will do
        return await select_task(user_id, task_id)
    values: dict[str, Value] = {"user_id": user_id, "task_id": task_id, "versions": versions}
    for field in WRITABLE:
        values |= {field: changes.get(field), f"sets_{field}": field in changes}
    return task_in(UPDATE_TASK, await fetch(UPDATE_TASK, **values))


# `NOT completed` is read and written under the row's lock: no toggle is lost to another.
TOGGLE_TASK = Statement("TOGGLE_TASK", f"""
UPDATE todo.tasks
SET completed = coalesce(%(completed)s, NOT completed),
    version = version + 1,
    updated_at = greatest(now(), updated_at)
WHERE user_id = %(user_id)s AND id = %(task_id)s
    AND (%(versions)s::bigint[] IS NULL OR version = ANY (%(versions)s))
RETURNING {COLUMNS}, version
""")


async def toggle_task(
    user_id: str, task_id: UUID, completed: bool | None, versions: list[int] | None
) -> Task | None:
    """Sets `completed`, or flips it for None, if the version is one of `versions`."""
    values: dict[str, Value] = {"user_id": user_id, "task_id": task_id}
    values |= {"completed": completed, "versions": versions}
    return task_in(TOGGLE_TASK, await fetch(TOGGLE_TASK, **values))


DELETE_TASK = Statement("DELETE_TASK", """
DELETE FROM todo.tasks
WHERE user_id = %(user_id)s AND id = %(task_id)s
    AND (%(versions)s::bigint[] IS NULL OR version = ANY (%(versions)s))
RETURNING id
""")


async def delete_task(user_id: str, task_id: UUID, versions: list[int] | None) -> bool:
    """Deletes a task if its version is one of `versions`. False when there was none."""
    return bool(await fetch(DELETE_TASK, user_id=user_id, task_id=task_id, versions=versions))


class Account(NamedTuple):
    """A user with an e-mail and a password. An answer shows the JSON."""

    id: str
    json: bytes
    password_hash: bytes


# A taken e-mail returns no row. An error would name its constraint, which Citus renames.
INSERT_ACCOUNT = Statement("INSERT_ACCOUNT", """
INSERT INTO todo.users (email, password_hash)
VALUES (%(email)s, %(password_hash)s)
ON CONFLICT (email) DO NOTHING
RETURNING id, email, created_at, password_hash
""")


async def insert_account(email: str, password_hash: str) -> Account | None:
    """Stores an account. None when the e-mail has one."""
    rows = await fetch(INSERT_ACCOUNT, email=email, password_hash=password_hash)
    return account_in(INSERT_ACCOUNT, rows)


# users_email_unique serves this.
SELECT_ACCOUNT = Statement("SELECT_ACCOUNT", """
SELECT id, email, created_at, password_hash
FROM todo.users
WHERE email = %(email)s
""")


async def select_account(email: str) -> Account | None:
    return account_in(SELECT_ACCOUNT, await fetch(SELECT_ACCOUNT, email=email))


# The join gives a row in any case: a user of an outside issuer may have none here yet.
SELECT_USER = Statement("SELECT_USER", """
SELECT asked.id, email, created_at
FROM (VALUES (%(user_id)s)) AS asked (id)
LEFT JOIN todo.users ON users.id = asked.id
""")


async def select_user(user_id: str) -> bytes:
    """The user as JSON. email and created_at may be null."""
    [user] = await fetch(SELECT_USER, user_id=user_id)
    return to_json(SELECT_USER.columns, user)


PING = Statement("PING", "SELECT 1")


async def ping() -> None:
    """Returns when the database answers, or did in the last PING_TTL seconds."""
    if reads.seconds_since_answer() > PING_TTL:
        await fetch(PING)


# fmt: on

# Connections.

# Prepared at start, so that a mistake in one shows.
STATEMENTS = [each for each in list(globals().values()) if isinstance(each, Statement)]

connections = ConnectionPool(lambda: connection_string(settings.database_url), max_size=8)
# Reads are bound by our CPU: 2 connections do, with up to 16 statements under way on each. Commits
# on one connection wait for the disk in turn, so writes get 6. A write that waits for a lock must
# not hold up reads, so each has a pool.
reads = PipelinePool(connections, size=2, max_pipeline=16)
writes = PipelinePool(connections, size=6, max_pipeline=4)


async def start() -> None:
    """Waits for the database, applies a schema.sql that is not the last applied, connects."""
    schema = Path(__file__).with_name("schema.sql")
    await prepare_database(
        connection_string(settings.database_url), schema, "todo.tasks", STATEMENTS
    )
    await connections.open()


async def stop() -> None:
    await reads.close()
    await writes.close()
    await connections.close()


async def fetch(statement: Statement, **values: Value) -> Rows:
    """The rows. One user's slow statements run one at a time."""
    pool = reads if statement.reads_only else writes
    return await pool.execute(statement, values, user_id=str(values.get("user_id", "")))


def task_in(statement: Statement, rows: Rows) -> Task | None:
    if not rows:
        return None
    json, version = to_json(statement.columns[: len(SHOWN)], rows[0]), rows[0][len(SHOWN)]
    return Task(json, f'"{version.decode()}-{SHAPE}"')


def account_in(statement: Statement, rows: Rows) -> Account | None:
    if not rows:
        return None
    [(user_id, *_, password_hash)] = rows
    return Account(user_id.decode(), to_json(statement.columns[:-1], rows[0]), password_hash)
