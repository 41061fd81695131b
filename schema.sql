-- The tables, for PostgreSQL 14 to 18. The service applies this file at its start and then adds
-- its SHA-256 to the comment on todo.tasks. After a change all of it runs again, so each statement
-- has to allow that. CREATE TABLE IF NOT EXISTS leaves a table that exists as it is: write a change
-- in the table, for new databases, and at the end of this file, for those that exist. Write each
-- name with its schema, because a search_path may lead to another application's tables. The limits
-- of the API are here too, as named constraints, because other programs may write.
-- CREATE SCHEMA IF NOT EXISTS would need the privilege even where the schema exists.
DO $$ BEGIN IF to_regnamespace('todo') IS NULL THEN CREATE SCHEMA todo; END IF; END $$;

-- UUID version 7 (RFC 9562 section 5.7) begins with the time, so the primary key of tasks is also
-- their order. Its digits are 12 of milliseconds, the version, 3 of 1/4096 ms (section 6.2, method
-- 3), and the last two groups of a random UUID. Only PostgreSQL 18 has a uuidv7() of its own.
CREATE OR REPLACE FUNCTION todo.uuidv7() RETURNS uuid LANGUAGE sql VOLATILE PARALLEL SAFE
RETURN overlay(
    lpad(to_hex((extract(epoch FROM clock_timestamp()) * 1000 * 4096)::bigint), 15, '0')
    || substring(gen_random_uuid()::text FROM 20) PLACING '7' FROM 13 FOR 0
)::uuid;

-- New databases skip this: it moves the tables of releases 1.0 and 1.1 from public, if a column and
-- a foreign key show that they are ours. E-mails become lower case as in Python, also an I with a
-- dot (chr 304). Locale C knows only ASCII, so %I is a better collation. If several become equal,
-- only the oldest changes, or none if one is in lower case already.
DO $move$ BEGIN
    PERFORM FROM pg_constraint
    JOIN pg_attribute ON attrelid = conrelid AND attname = 'idempotency_digest'
    JOIN pg_class ON pg_class.oid = confrelid AND relname = 'users' AND relnamespace = connamespace
    WHERE conname = 'tasks_user_id_fkey' AND connamespace = to_regnamespace('public');
    IF NOT FOUND OR to_regclass('todo.users') IS NOT NULL THEN RETURN; END IF;
    PERFORM set_config('citus.multi_shard_modify_mode', 'sequential', true); -- foreign keys need it
    ALTER TABLE public.users SET SCHEMA todo;
    ALTER TABLE public.tasks SET SCHEMA todo;
    ALTER TABLE todo.users ALTER COLUMN id SET DEFAULT todo.uuidv7()::text;
    ALTER TABLE todo.tasks ALTER COLUMN id SET DEFAULT todo.uuidv7();
    DROP INDEX IF EXISTS todo.users_email_key; -- of 1.0, on lower(email)
    EXECUTE (
        SELECT format('UPDATE todo.users SET email = new FROM (
            SELECT DISTINCT ON (new) id AS first, new
            FROM (SELECT *, lower(replace(email, chr(304), ''i'' || chr(775)) COLLATE %I) AS new
                FROM todo.users) AS spelled ORDER BY new, email = new DESC, created_at
        ) AS found WHERE id = first AND email <> new AND length(new) <= 254', name)
        FROM unnest('{und-x-icu,pg_unicode_fast,C.utf8,default}'::text[]) WITH ORDINALITY AS name
        JOIN pg_collation ON collname = name ORDER BY ordinality LIMIT 1
    );
END $move$;

-- Whoever owns tasks has a row. A user of an outside issuer gets one with the first task: an id
-- without an account. Ids are text because issuers choose them, as Auth0 does with "auth0|5f7c".
CREATE TABLE IF NOT EXISTS todo.users (
    id            text        NOT NULL DEFAULT todo.uuidv7()::text,
    email         text,       -- in lower case
    password_hash text,
    created_at    timestamptz NOT NULL DEFAULT now(),
    CONSTRAINT users_pkey PRIMARY KEY (id),
    CONSTRAINT users_id_length CHECK (length(id) BETWEEN 1 AND 255),
    CONSTRAINT users_email_length CHECK (length(email) BETWEEN 3 AND 254),
    CONSTRAINT users_account_is_whole CHECK ((email IS NULL) = (password_hash IS NULL))
);
CREATE UNIQUE INDEX IF NOT EXISTS users_email_unique ON todo.users (email);

-- The primary key begins with the owner, and every statement names the owner, so no statement
-- reaches another user's task, and Citus can shard by user_id. Reads need no other index: "newest
-- first" is a backward scan of it. An index on completed would prevent HOT updates (below).
-- version counts the writes to a task and is in its ETag, as two writes may share an updated_at.
-- fillfactor leaves 10 % of each page free, so that an updated row stays in its page and no index
-- has to be written (HOT, a heap-only tuple).
CREATE TABLE IF NOT EXISTS todo.tasks (
    user_id     text        NOT NULL,
    id          uuid        NOT NULL DEFAULT todo.uuidv7(),
    title       text        NOT NULL,
    description text,
    completed   boolean     NOT NULL DEFAULT false,
    version     bigint      NOT NULL DEFAULT 1,
    created_at  timestamptz NOT NULL DEFAULT now(),
    updated_at  timestamptz NOT NULL DEFAULT now(),
    idempotency_key    text,
    idempotency_digest text,
    CONSTRAINT tasks_pkey PRIMARY KEY (user_id, id),
    CONSTRAINT tasks_user_id_fkey FOREIGN KEY (user_id) REFERENCES todo.users ON DELETE CASCADE,
    CONSTRAINT tasks_title_length CHECK (length(title) BETWEEN 1 AND 500),
    CONSTRAINT tasks_title_not_blank CHECK (title ~ E'\\S'), -- the API refuses more kinds of space
    CONSTRAINT tasks_description_length CHECK (length(description) <= 5000)
) WITH (fillfactor = 90);

-- A retried POST finds the task of its first attempt here. The digest is the SHA-256 of its body.
-- Tasks without a key are not in this index. Deleting a task frees its key.
CREATE UNIQUE INDEX IF NOT EXISTS tasks_idempotency_key ON todo.tasks (user_id, idempotency_key)
    WHERE idempotency_key IS NOT NULL;

-- Changes to tables that exist go here, oldest first. Each can be applied again.
