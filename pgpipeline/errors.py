"""What can go wrong with a statement, and what each SQLSTATE means for its caller.

https://www.postgresql.org/docs/current/errcodes-appendix.html
"""

from psycopg.pq import DiagnosticField
from psycopg.pq.abc import PGresult


class Unavailable(Exception):
    """The database did not answer in time, or cannot now. A write may have been made or not."""


class InvalidValue(Exception):
    """PostgreSQL refused a value: SQLSTATE class 22, or a check constraint. Nothing was stored."""


class UniqueViolation(Exception):
    """Such a row exists already. The argument is the constraint. Nothing was stored."""


class ForeignKeyViolation(Exception):
    """The row referred to is missing. The argument is the constraint. Nothing was stored."""


class UnexpectedError(Exception):
    """No caller should be able to cause this one. The argument says what may be logged."""


# The statement was not executed, or was rolled back. So it may be sent again, a write too.
RETRYABLE = {
    "26000",  # invalid_sql_statement_name: DEALLOCATE ALL, or its Parse was refused before
    "40001",  # serialization_failure
    "40P01",  # deadlock_detected
    "42P05",  # duplicate_prepared_statement
    "57014",  # query_canceled: a cancellation that was meant for the statement before it
}
CONFLICTS = {"40001", "40P01"}  # with another transaction, which needs some time to end
SHUTDOWN = {"57P01", "57P05"}  # admin_shutdown, idle_session_timeout


def is_outdated(result: PGresult) -> bool:
    """Whether a table's columns have changed since the statement was prepared.

    It is 0A000, as whatever PostgreSQL cannot do, and told from that by the function it comes from.
    """
    return result.error_field(DiagnosticField.SOURCE_FUNCTION) == b"RevalidateCachedQuery"


def error_of(name: str, result: PGresult) -> Exception:
    """The exception for a failed statement of this name.

    PostgreSQL's text is kept for class 42 alone, which is a mistake in our SQL. In other classes
    the text may repeat what a user sent, so it must not reach a log.
    """
    sqlstate = sqlstate_of(result)
    if sqlstate in {"23505", "23503"}:
        kind = UniqueViolation if sqlstate == "23505" else ForeignKeyViolation
        return kind(field_of(result, DiagnosticField.CONSTRAINT_NAME))
    if sqlstate[:2] == "22" or sqlstate in {"23514", "23502"}:
        return InvalidValue(sqlstate)
    if sqlstate[:2] in {"08", "40", "53", "57"} or sqlstate in {"25006", "55P03"}:
        return Unavailable(f"{name}: {sqlstate}")
    text = field_of(result, DiagnosticField.MESSAGE_PRIMARY) if sqlstate[:2] == "42" else ""
    return UnexpectedError(f"{name}: {sqlstate} {text}".strip())


def sqlstate_of(result: PGresult) -> str:
    return field_of(result, DiagnosticField.SQLSTATE)


def field_of(result: PGresult, field: DiagnosticField) -> str:
    return (result.error_field(field) or b"").decode(errors="replace")
