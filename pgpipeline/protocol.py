"""The protocol of a connection in pipeline mode: what is sent on it, and whose each result is.

No query waits for the answer to the one before it. A Sync follows each query, so each is a
transaction of its own, and an error never touches a neighbour
(https://www.postgresql.org/docs/current/libpq-pipeline-mode.html). This module knows no event loop,
no time and no pool: pipeline.py drives it.
"""

from collections import deque
from collections.abc import Iterator

import psycopg.errors as postgres
from psycopg.pq import ExecStatus
from psycopg.pq.abc import PGconn, PGresult

from pgpipeline import errors
from pgpipeline.queue import Query
from pgpipeline.result import Result

SUCCESS = {ExecStatus.TUPLES_OK, ExecStatus.COMMAND_OK, ExecStatus.EMPTY_QUERY}


class Protocol:
    """The queries under way on one connection, and the names it has prepared."""

    def __init__(self, pgconn: PGconn, prepared: set[bytes]) -> None:
        self.pgconn, self.prepared = pgconn, prepared
        self.sent: deque[Query] = deque()  # in the order of their answers
        self.answer: Result | Exception | None = None  # to the first of them, until its Sync comes

    def send(self, query: Query) -> bool:
        """Puts a query under way. Whether the kernel is full, and flush() has to follow.

        After an exception nobody knows what was sent.
        """
        self.sent.append(query)
        name = query.sent_by_name = query.statement.prepared_name
        if name not in self.prepared:
            self.prepared.add(name)
            self.pgconn.send_prepare(name, query.statement.text)
        self.pgconn.send_query_prepared(name, query.values)
        # Without a Sync, all that are under way were one transaction. libpq writes with each.
        self.pgconn.pipeline_sync()
        return bool(self.pgconn.flush())

    def receive(self) -> Iterator[tuple[Query, Result | Exception]]:
        """Reads what has come: each query whose transaction has ended, and what came of it.

        After an exception no more can be read, because nobody knows whose the next answer is:
        psycopg.Error if the connection is lost, and of errors.ends_session() if PostgreSQL gave up.
        """
        separated, lost = False, None
        try:
            self.pgconn.consume_input()
        except postgres.OperationalError as error:
            lost = error  # PostgreSQL's last word may have been read before the end of the stream
        while self.sent and not self.pgconn.is_busy():
            result = self.pgconn.get_result()
            if not result and separated:
                # libpq separates two results by one None. After two of them nothing will come,
                # so an answer is missing and all that follow would go to the wrong callers.
                raise lost or postgres.OperationalError("an answer is missing")
            separated = not result
            if result and result.status == ExecStatus.PIPELINE_SYNC:
                answer, self.answer = self.answer, None
                if answer is None:
                    raise postgres.OperationalError("a Sync without an answer")
                yield self.sent.popleft(), answer
            elif result:
                self.keep(result)
        if lost:
            raise lost

    def keep(self, result: PGresult) -> None:
        """Keeps an answer until its Sync comes, because rows leave PostgreSQL before the commit."""
        status = result.status
        if status == ExecStatus.FATAL_ERROR:
            self.keep_error(postgres.error_from_result(result))
        elif status == ExecStatus.PIPELINE_ABORTED:
            pass  # the query was skipped: the answer is the error of its Parse, which came before
        elif status == ExecStatus.COMMAND_OK and not result.command_status:
            pass  # the statement is prepared, and the query not yet executed
        elif status in SUCCESS:
            try:
                self.answer = Result(result)
            except UnicodeDecodeError as error:  # no other query has to do with it
                self.answer = error
        else:  # a COPY, whose results would never end
            raise postgres.NotSupportedError(ExecStatus(status).name)

    def keep_error(self, error: postgres.Error) -> None:
        # Even a write without rows sends an answer, and may be committed after it.
        if self.answer is None and errors.ends_session(error):
            raise error
        if isinstance(error, postgres.InvalidSqlStatementName):
            self.prepared.discard(self.sent[0].sent_by_name)
        self.answer = error  # instead of rows, if their commit fails
