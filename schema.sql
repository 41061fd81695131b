-- The tables, for PostgreSQL 14 to 18. The service applies this file at start when the digest in the comment on tasks
-- is another than this text's; `psql "$DATABASE_URL" -f schema.sql` does it by hand. It can be applied again and again.
--
-- The limits of the API (lengths, blank titles) stand here a second time, as named constraints: whatever else
-- writes to this database meets them too, and db.py turns their names into answers.

-- UUID version 7 (RFC 9562 section 5.7) begins with the time, so the primary key of tasks is also their order.
-- It is built in from PostgreSQL 18; before that, this gives the same layout: 48 bits of milliseconds, 12 bits of
-- the fraction below one (section 6.2, method 3), 62 random bits.
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
            FROM (SELECT (extract(epoch FROM clock_timestamp()) * 1000000)::bigint AS microseconds) AS clock
        $function$;
    END IF;
END
$block$;

-- One row for everybody who owns tasks. Users of an outside issuer have an id and nothing else: their first task
-- makes the row. Ids are text because issuers choose them (Better Auth: 32 characters, Auth0: "auth0|…").
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

-- Serves the login, and lets nobody register Ann@example.com beside ann@example.com.
CREATE UNIQUE INDEX IF NOT EXISTS users_email_key ON users (lower(email));

-- The primary key begins with the owner: it is the isolation (no statement reaches a task without its owner), the
-- one index that every read, page and write needs (newest first is its backward scan), and what Citus shards by.
-- A second index on completed was left out: it would end HOT updates, and a page that filters still reads in order.
--
-- version counts the writes to a task and becomes its ETag; updated_at cannot, as two writes may share a microsecond.
-- fillfactor leaves a tenth of each page free, so that an update finds room beside the row and touches no index.
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

-- A retried POST finds the task of its first try here. Partial, so that tasks stored without a key pay nothing. A key
-- lasts as long as its task: deleting the task frees it.
CREATE UNIQUE INDEX IF NOT EXISTS tasks_idempotency_key ON tasks (user_id, idempotency_key)
    WHERE idempotency_key IS NOT NULL;
