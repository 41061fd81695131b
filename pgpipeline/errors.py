"""What can go wrong with a statement, and what PostgreSQL's errors mean for its caller.

https://www.postgresql.org/docs/current/errcodes-appendix.html has the SQLSTATE of each.
"""

import psycopg.errors as postgres


class Unavailable(Exception):
    """The database did not answer in time, or cannot now. A write may have been made or not."""


class InvalidValue(Exception):
    """PostgreSQL refused a value: SQLSTATE class 22, or a check constraint. Nothing was stored."""


class UniqueViolation(Exception):
    """Such a row exists already. The argument is the constraint. Nothing was stored."""


class ForeignKeyViolation(Exception):
    """A row refers to one that is missing, or is to go. The argument is the constraint."""


class UnexpectedError(Exception):
    """No caller should be able to cause this one. The argument says what may be logged."""


# With another transaction, which needs some time to end.
CONFLICTS = (postgres.SerializationFailure, postgres.DeadlockDetected)
RETRYABLE = (
    *CONFLICTS,
    postgres.ReadOnlySqlTransaction,  # since a failover, by a server that is a standby
    postgres.DuplicatePreparedStatement,
    postgres.InvalidSqlStatementName,  # after DEALLOCATE ALL, or if its Parse was refused before
)
SHUTDOWN = (postgres.AdminShutdown, postgres.IdleSessionTimeout)


def ends_session(error: postgres.Error) -> bool:
    """Whether PostgreSQL ends the session in good order. A function may raise the same SQLSTATE,
    and a shard may pass its own on: then the session lives, and executes what was sent."""
    return isinstance(error, SHUTDOWN) and error.diag.severity_nonlocalized == "FATAL"


def is_outdated(error: postgres.Error) -> bool:
    """Whether a table's columns have changed since the statement was prepared. That is 0A000, as
    whatever PostgreSQL cannot do, but it comes from this function."""
    return error.diag.source_function == "RevalidateCachedQuery"


def may_retry(error: postgres.Error) -> bool:
    """Whether the statement was not executed, or was rolled back. A write may be sent again too."""
    return isinstance(error, RETRYABLE) or is_outdated(error)


def error_of(name: str, error: postgres.Error) -> Exception:
    """The exception for a failed statement of this name.

    PostgreSQL's text is kept for class 42 alone, which is a mistake in our SQL. In other classes
    the text may repeat what a user sent, so it must not reach a log.
    """
    sqlstate = error.diag.sqlstate or ""
    if isinstance(error, postgres.UniqueViolation):
        return UniqueViolation(error.diag.constraint_name)
    if isinstance(error, postgres.ForeignKeyViolation | postgres.RestrictViolation):
        return ForeignKeyViolation(error.diag.constraint_name)
    if sqlstate[:2] == "22" or sqlstate in {"23514", "23502"}:
        return InvalidValue(sqlstate)
    is_outage = sqlstate[:2] in {"08", "40", "53", "57", "58"} or sqlstate == "55P03"
    if is_outage or isinstance(error, RETRYABLE):
        return Unavailable(f"{name}: {sqlstate}")
    text = error.diag.message_primary if sqlstate[:2] == "42" else ""
    return UnexpectedError(f"{name}: {sqlstate} {text}".strip())
