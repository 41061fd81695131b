"""The SQL of the service: each statement above the function that runs it.

Tasks come back as the same JSON: pages by row_to_json(), one by Result.json(). "No such row" is
None. A function may raise pgpipeline's Unavailable (a 503 by main.py). One that writes may also
raise InvalidValue (422). Values in a row are text as bytes: b"t" is true.
"""

import hashlib
import json
from collections.abc import Awaitable
from pathlib import Path
from typing import NamedTuple
from uuid import UUID

from lib.database_url import connection_string
from lib.prepare import prepare_database
from lib.settings import BaseSettings
from lib.telemetry import span_of
from pgpipeline import ConnectionPool, ForeignKeyViolation, PipelinePool, Result, Statement, Value


class Settings(BaseSettings):
    database_url: str = ""  # required, but not by `python main.py`


settings = Settings.load()

# What a client may write, and what an answer shows. A new field goes into WRITABLE.
WRITABLE = ["title", "description", "completed"]
SHOWN = ["id", "user_id", *WRITABLE, "completed AS is_completed", "created_at", "updated_at"]
COLUMNS = ", ".join(SHOWN)
SHAPE = hashlib.sha256(COLUMNS.encode()).hexdigest()[:8]  # in ETags: a new field makes all stale
PAGE_BYTES = 1_000_000  # the most in a page of tasks, so that none fills the memory
PING_TTL = 5.0  # seconds: ping() asks only if no answer came within this time

# A formatter would break the line before each f""".
# fmt: off


class TaskJSON(NamedTuple):
    """A task as JSON in UTF-8, its id, and its ETag: "version-SHAPE"."""

    json: bytes
    id: str
    etag: str


# The primary key, tasks_pkey, serves every statement on tasks but INSERT.
SELECT_TASK = Statement("SELECT_TASK", f"""
SELECT {COLUMNS}, version
FROM todo.tasks
WHERE user_id = %(user_id)s AND id = %(task_id)s
""")


async def select_task(user_id: str, task_id: UUID) -> TaskJSON | None:
    return to_task(await fetch(SELECT_TASK, user_id=user_id, task_id=task_id))


class Page(NamedTuple):
    """A JSON array of tasks, the last id if more follow, and whether it was cut at PAGE_BYTES."""

    json: bytes
    last_id: str | None
    is_cut: bool


# With `after`, a backward scan of the primary key begins where the last page ended, so page 100
# costs as much as page 1. coalesce() keeps the condition on id an index range; OR would not.
# LIMIT + 1 tells whether more tasks follow. row_to_json() escapes line breaks: one line, one task.
# 1,000 tasks may take 33 MB (\u0001 takes 6 bytes), so PostgreSQL cuts the text. CASE avoids
# left(), which counts characters, for a short text. string_agg() keeps the subquery's order.
SELECT_TASKS = Statement("SELECT_TASKS", f"""
SELECT CASE WHEN octet_length(lines) > {PAGE_BYTES} THEN left(lines, {PAGE_BYTES}) ELSE lines END,
    count
FROM (
    SELECT string_agg(row_to_json(page)::text, E',\\n') AS lines, count(*) AS count
    FROM (
        SELECT {COLUMNS}
        FROM todo.tasks
        WHERE user_id = %(user_id)s
            AND id < coalesce(%(after)s, 'ffffffff-ffff-ffff-ffff-ffffffffffff'::uuid)
            AND (completed = %(completed)s OR %(completed)s IS NULL)
        ORDER BY id DESC
        LIMIT %(limit)s::integer + 1
        OFFSET %(offset)s::bigint
    ) AS page
) AS whole
""")


async def select_tasks(
    user_id: str, completed: bool | None, after: UUID | None, offset: int, limit: int
) -> Page:
    """Up to `limit` tasks of at most PAGE_BYTES together, newest first."""
    values: dict[str, Value] = {"user_id": user_id, "completed": completed, "after": after}
    [(lines, count)] = await fetch(SELECT_TASKS, offset=offset, limit=limit, **values)
    return to_page(lines or b"", has_surplus=int(count) > limit)


# A known Idempotency-Key makes this an UPDATE that changes nothing, because DO NOTHING returns no
# row. xmax is 0 in a new row; ON CONFLICT locks an old one, which sets xmax.
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
    user_id: str, fields: dict[str, Value], key: str | None, sent: str, *, outside: bool
) -> tuple[TaskJSON, bool] | None:
    """Stores a task, and says whether an earlier request with its key had stored it.

    None when the key was used with another body than `sent`. A user of an `outside` issuer gets a
    row with the first task. Raises ForeignKeyViolation for an account that has been deleted.
    """
    digest = hashlib.sha256(sent.encode()).hexdigest() if key else None
    values = {**fields, "user_id": user_id, "key": key, "digest": digest}
    try:
        result = await fetch(INSERT_TASK, **values)
    except ForeignKeyViolation:
        if not outside:
            raise
        await fetch(INSERT_OWNER, user_id=user_id)
        result = await fetch(INSERT_TASK, **values)
    task = to_task(result)
    return (task, result.rows[0][-1] == b"t") if task else None


# Fields that were not sent keep their values. No index has these columns, so the update is HOT.
# now() is when this UPDATE, a transaction of its own, began. One that began later may commit
# first, so greatest() keeps updated_at from going back.
UPDATE_TASK = Statement("UPDATE_TASK", f"""
UPDATE todo.tasks
SET {", ".join(f"{n} = CASE WHEN %(sets_{n})s THEN %({n})s ELSE {n} END" for n in WRITABLE)},
    version = version + 1,
    updated_at = greatest(now(), updated_at)
WHERE user_id = %(user_id)s AND id = %(task_id)s
    AND (%(versions)s::int8multirange IS NULL OR version <@ %(versions)s::int8multirange)
RETURNING {COLUMNS}, version
""")


async def update_task(
    user_id: str, task_id: UUID, changes: dict[str, Value], versions: str | None
) -> TaskJSON | None:
    """Changes a task if its version is in `versions`, like '{[7,7]}'. None means any."""
    if not changes and versions is None:  # nothing to write, and no version to compare
        return await select_task(user_id, task_id)
    values: dict[str, Value] = {"user_id": user_id, "task_id": task_id, "versions": versions}
    for field in WRITABLE:
        values |= {field: changes.get(field), f"sets_{field}": field in changes}
    return to_task(await fetch(UPDATE_TASK, **values))


# `NOT completed` is read and written under the row's lock: of two toggles at once, both count.
TOGGLE_TASK = Statement("TOGGLE_TASK", f"""
UPDATE todo.tasks
SET completed = coalesce(%(completed)s, NOT completed),
    version = version + 1,
    updated_at = greatest(now(), updated_at)
WHERE user_id = %(user_id)s AND id = %(task_id)s
    AND (%(versions)s::int8multirange IS NULL OR version <@ %(versions)s::int8multirange)
RETURNING {COLUMNS}, version
""")


async def toggle_task(
    user_id: str, task_id: UUID, completed: bool | None, versions: str | None
) -> TaskJSON | None:
    """Sets `completed`, or flips it for None, if the version is in `versions`."""
    values: dict[str, Value] = {"completed": completed, "versions": versions}
    return to_task(await fetch(TOGGLE_TASK, user_id=user_id, task_id=task_id, **values))


DELETE_TASK = Statement("DELETE_TASK", """
DELETE FROM todo.tasks
WHERE user_id = %(user_id)s AND id = %(task_id)s
    AND (%(versions)s::int8multirange IS NULL OR version <@ %(versions)s::int8multirange)
RETURNING id
""")


async def delete_task(user_id: str, task_id: UUID, versions: str | None) -> bool:
    """Deletes a task if its version is in `versions`. False when no row matched."""
    return bool(await fetch(DELETE_TASK, user_id=user_id, task_id=task_id, versions=versions))


class Account(NamedTuple):
    """A user. One of an outside issuer has no e-mail and password. `json` goes to the client."""

    id: str
    email: str | None
    json: bytes
    password_hash: bytes | None


# A taken e-mail returns no row. An error could only be recognized by its constraint's name, and
# that name differs on each shard of Citus.
INSERT_ACCOUNT = Statement("INSERT_ACCOUNT", """
INSERT INTO todo.users (email, password_hash)
VALUES (%(email)s, %(password_hash)s)
ON CONFLICT (email) DO NOTHING
RETURNING id, email, created_at, password_hash
""")


async def insert_account(email: str, password_hash: str) -> Account | None:
    """None if the e-mail is taken."""
    return to_account(await fetch(INSERT_ACCOUNT, email=email, password_hash=password_hash))


# users_email_unique serves this.
SELECT_ACCOUNT = Statement("SELECT_ACCOUNT", """
SELECT id, email, created_at, password_hash
FROM todo.users
WHERE email = %(email)s
""")


async def select_account(email: str) -> Account | None:
    return to_account(await fetch(SELECT_ACCOUNT, email=email))


SELECT_USER = Statement("SELECT_USER", """
SELECT id, email, created_at, password_hash
FROM todo.users
WHERE id = %(user_id)s
""")


async def select_user(user_id: str) -> Account | None:
    """None for a user of an outside issuer before the first task, and for a deleted account."""
    return to_account(await fetch(SELECT_USER, user_id=user_id))


# The second of two changes at once finds another hash.
UPDATE_PASSWORD = Statement("UPDATE_PASSWORD", """
UPDATE todo.users
SET password_hash = %(new)s
WHERE id = %(user_id)s AND password_hash = %(old)s
RETURNING id
""")


async def update_password(account: Account, new: str) -> bool:
    """False if the stored hash is not the account's any more."""
    old = (account.password_hash or b"").decode()
    return bool(await fetch(UPDATE_PASSWORD, user_id=account.id, old=old, new=new))


# The foreign key deletes the user's tasks too, by their primary key.
DELETE_USER = Statement("DELETE_USER", """
DELETE FROM todo.users
WHERE id = %(user_id)s
""")


async def delete_user(user_id: str) -> None:
    await fetch(DELETE_USER, user_id=user_id)


PING = Statement("PING", "SELECT 1")


async def ping() -> None:
    """Returns when the database answers, or did in the last PING_TTL seconds."""
    if reads.seconds_since_answer() > PING_TTL:
        await fetch(PING)


# fmt: on

# Prepared at start, so that a mistake in one shows then.
STATEMENTS = [each for each in list(globals().values()) if isinstance(each, Statement)]


def conninfo() -> str:
    """How to connect. Raises SystemExit if DATABASE_URL is wrong or asks for another schema."""
    return connection_string(settings.database_url, schema="todo")


# 9 connections at most. Reads are limited by this process's CPU: 3 connections suffice, with up to
# 16 reads under way on each. Commits on one connection wait for the disk in turn, so writes get 6.
# A write may wait for a lock and would delay reads behind it, so each kind has its own pool.
connections = ConnectionPool(conninfo, max_size=9)
reads = PipelinePool(connections, size=3, depth=16, span=span_of)
writes = PipelinePool(connections, size=6, depth=4, span=span_of)


async def start() -> None:
    """Waits for the database, applies schema.sql if it is not what was applied last, connects."""
    schema = Path(__file__).with_name("schema.sql")
    await prepare_database(conninfo(), schema, "todo.tasks", STATEMENTS)
    await connections.open()


async def stop() -> None:
    await reads.close()
    await writes.close()
    await connections.close(timeout=1)  # second of the 10 after SIGTERM


def fetch(statement: Statement, **values: Value) -> Awaitable[Result]:
    """Runs a statement, a SELECT in `reads`. Its queue serves users (at login: e-mails) in turn."""
    pool = reads if statement.reads_only else writes
    tenant = values.get("user_id") or values.get("email") or ""
    return pool.execute(statement, values, str(tenant))


def to_task(result: Result) -> TaskJSON | None:
    if not result:
        return None
    task_id, version = result.rows[0][0].decode(), result.rows[0][len(SHOWN)].decode()
    return TaskJSON(result.json(stop=len(SHOWN)), task_id, f'"{version}-{SHAPE}"')


def to_page(lines: bytes, *, has_surplus: bool) -> Page:
    """A page of tasks, one a line. Drops a surplus task and what exceeds PAGE_BYTES.
    One task always fits, because a task's JSON has 35 KB at most."""
    is_cut = len(lines) >= PAGE_BYTES  # left() counts characters, of one byte or more each
    if not is_cut and not has_surplus:
        return Page(b"[" + lines + b"]", None, is_cut=False)
    shown = lines[: lines.rindex(b",\n", 0, PAGE_BYTES)]
    last = json.loads(shown[shown.rfind(b"\n") + 1 :])
    return Page(b"[" + shown + b"]", last["id"], is_cut)


def to_account(result: Result) -> Account | None:
    if not result:
        return None
    [(user_id, email, _, password_hash)] = result
    email = email and email.decode()
    return Account(user_id.decode(), email, result.json(stop=3), password_hash)
