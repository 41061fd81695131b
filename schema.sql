-- The tables, for PostgreSQL 14 to 18. The service applies this file at start when it is not the
-- one that was applied last; `psql "$DATABASE_URL" -f schema.sql` does it by hand. CREATE TABLE IF
-- NOT EXISTS leaves a table that exists as it is. So a change is written twice: in the table, for
-- new databases, and at the end of this file, for those that exist. The limits of the API stand
-- here a second time, as named constraints: whatever else writes to this database meets them too.

-- UUID version 7 (RFC 9562 section 5.7) begins with the time, so the primary key of tasks is also
-- their order. PostgreSQL 18 has uuidv7(); before, this one lays out the same 16 bytes: 6 are the
-- milliseconds, 2 the version (7) and a fraction (section 6.2, method 3), 8 are random.
DO $block$
BEGIN
    IF to_regprocedure('uuidv7()') IS NULL THEN
        CREATE FUNCTION uuidv7() RETURNS uuid
        LANGUAGE sql VOLATILE PARALLEL SAFE
        AS $function$
            SELECT encode(
                substring(int8send(microseconds / 1000) FROM 3)
                || substring(int8send(x'7000'::bigint + microseconds % 1000 * 4096 / 1000) FROM 7)
                || substring(uuid_send(gen_random_uuid()) FROM 9),
                'hex'
            )::uuid
            FROM (SELECT (extract(epoch FROM clock_timestamp()) * 1e6)::bigint) AS c (microseconds)
        $function$;
    END IF;
END
$block$;

-- Whoever owns tasks has a row. A user of an outside issuer gets one with the first task: an id and
-- nothing else. Ids are text because issuers choose them (Auth0: "auth0|…"). E-mails are stored
-- in lower case, by auth.py's rule, and are unique by the index at the end.
CREATE TABLE IF NOT EXISTS users (
    id            text        NOT NULL DEFAULT uuidv7()::text,
    email         text,
    password_hash text,
    created_at    timestamptz NOT NULL DEFAULT now(),
    CONSTRAINT users_pkey PRIMARY KEY (id),
    CONSTRAINT users_id_length CHECK (length(id) BETWEEN 1 AND 255),
    CONSTRAINT users_email_length CHECK (length(email) BETWEEN 3 AND 254),
    CONSTRAINT users_account_is_whole CHECK ((email IS NULL) = (password_hash IS NULL))
);

-- The primary key begins with the owner, and every statement names the owner, so none reaches
-- another user's task, and Citus can shard by user_id. No other index is needed: "newest first"
-- is a backward scan of this one. One on completed would make each toggle write to indexes.
--
-- version counts the writes to a task and becomes its ETag. updated_at cannot, as two writes may
-- share a microsecond. fillfactor leaves 10 % of each page free for HOT updates.
CREATE TABLE IF NOT EXISTS tasks (
    user_id     text        NOT NULL,
    id          uuid        NOT NULL DEFAULT uuidv7(),
    title       text        NOT NULL,
    description text,
    completed   boolean     NOT NULL DEFAULT false,
    version     bigint      NOT NULL DEFAULT 1,
    created_at  timestamptz NOT NULL DEFAULT now(),
    updated_at  timestamptz NOT NULL DEFAULT now(),
    idempotency_key    text,
    idempotency_digest text,
    CONSTRAINT tasks_pkey PRIMARY KEY (user_id, id),
    CONSTRAINT tasks_user_id_fkey FOREIGN KEY (user_id) REFERENCES users (id) ON DELETE CASCADE,
    CONSTRAINT tasks_title_length CHECK (length(title) BETWEEN 1 AND 500),
    CONSTRAINT tasks_title_not_blank CHECK (title ~ '\S'),
    CONSTRAINT tasks_description_length CHECK (length(description) <= 5000)
) WITH (fillfactor = 90);

-- A retried POST finds the task of its first attempt here; the digest is of what it sent. Tasks
-- without a key pay nothing. A key lasts as long as its task: deleting the task frees it.
CREATE UNIQUE INDEX IF NOT EXISTS tasks_idempotency_key ON tasks (user_id, idempotency_key)
    WHERE idempotency_key IS NOT NULL;

-- Changes to tables that exist, oldest first. Each can be applied again.

-- 1.1: e-mails are stored in lower case. Those of 1.0 are lowered while its index is there.
UPDATE users SET email = lower(email) WHERE to_regclass('users_email_key') IS NOT NULL;
CREATE UNIQUE INDEX IF NOT EXISTS users_email_unique ON users (email);
DROP INDEX IF EXISTS users_email_key;
