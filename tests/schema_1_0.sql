-- The schema of release 1.0.0. It stays as it is: tests/test_constraints.py brings it up to date.

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

CREATE UNIQUE INDEX IF NOT EXISTS users_email_key ON users (lower(email));

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

CREATE UNIQUE INDEX IF NOT EXISTS tasks_idempotency_key ON tasks (user_id, idempotency_key)
    WHERE idempotency_key IS NOT NULL;
