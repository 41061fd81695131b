"""Logs: a line of JSON on standard output for each record. A reader that stalls delays nobody,
except at a stopped terminal, or where several processes write to one full pipe.

A line is written whole, now or with a later one, or it is dropped whole and counted. Processes that
share a pipe do not mix lines of up to PIPE_BUF bytes, which only a long trace exceeds.
"""

import atexit
import json
import logging
import os
import select
import threading
import traceback
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from time import monotonic
from typing import Any

from pydantic_core import to_json

MAX_WAITING = 1_000_000  # bytes that wait for the reader; further lines are dropped
LAST_WAIT = 0.1  # seconds that the end of the process waits for the reader


class Output:
    """Writes lines to a file descriptor, from any thread, while poll() says that it has room.

    O_NONBLOCK instead would hold for all that share the descriptor, such as a terminal's shell.
    """

    def __init__(self, fd: int) -> None:
        self.fd, self.waiting, self.dropped = fd, bytearray(), 0
        self.room = select.poll()
        self.room.register(fd, select.POLLOUT)
        self.lock = threading.Lock()

    def write(self, level: str, fields: dict[str, Any]) -> None:
        """Adds a line with these fields, or drops it."""
        if len(self.waiting) < MAX_WAITING:
            self.waiting += encode(level, fields)
        else:
            self.dropped += 1
        self.flush(0)

    def flush(self, seconds: float = LAST_WAIT) -> None:
        """Writes what waits, as far as there is room within so many seconds."""
        end = monotonic() + seconds
        # Whoever has the lock writes this line too, or whoever logs next. It may be this thread: a
        # signal or the garbage collector may log before what was written is deleted.
        if not self.lock.acquire(timeout=seconds):
            return
        try:
            while self.waiting and self.room.poll(max(0, end - monotonic()) * 1000):
                # As many whole lines as fit into PIPE_BUF, or a part of one that does not fit.
                size = self.waiting.rfind(b"\n", 0, select.PIPE_BUF) + 1 or select.PIPE_BUF
                del self.waiting[: os.write(self.fd, self.waiting[:size])]
                if self.dropped:
                    lost = {"message": "log lines dropped", "lines": self.dropped}
                    self.waiting += encode("WARNING", lost)
                    self.dropped = 0
        except OSError:  # full disk or no reader: a later call goes on at that byte
            pass
        finally:
            self.lock.release()


output = Output(1)
write = output.write  # takes 8 us less than logging


def encode(level: str, fields: dict[str, Any]) -> bytes:
    """A line of JSON."""
    line = {"time": datetime.now(UTC), "level": level, **fields}
    try:
        return to_json(line) + b"\n"
    except ValueError:  # half of a surrogate pair: it becomes a "?"
        line["time"] = line["time"].isoformat()
        return json.dumps(line, default=str, ensure_ascii=False).encode(errors="replace") + b"\n"


class JsonHandler(logging.Handler):
    """Of an exception it keeps no text, because that may repeat what a user sent."""

    def emit(self, record: logging.LogRecord) -> None:
        fields: dict[str, Any] = {"message": str(record.msg), "logger": record.name}
        if record.name != "opentelemetry.util.re":  # it would show OTEL_EXPORTER_OTLP_HEADERS
            with suppress(Exception):  # arguments that do not fit
                fields["message"] = record.getMessage()
        if record.exc_info and (error := record.exc_info[1]):
            fields |= described(error)
            if cause := error.__cause__ or error.__context__:
                fields["cause"] = described(cause)
        write(record.levelname, fields)


def described(error: BaseException) -> dict[str, Any]:
    """The type of an exception, and the places that it passed."""
    frames = traceback.walk_tb(error.__traceback__)
    trace = [f"{Path(frame.f_code.co_filename).name}:{line}" for frame, line in frames]
    return {"exception": type(error).__name__, "trace": trace}


def configure() -> None:
    """Sends all records through JsonHandler."""
    logging.basicConfig(level=logging.INFO, handlers=[JsonHandler()], force=True)
    atexit.register(output.flush)
