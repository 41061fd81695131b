"""Logs: a line of JSON on standard output for each record. Nothing waits for who reads them.

    logs.configure()                              # logging's own records
    logs.write("INFO", {"message": "request"})    # without logging, which takes 8 us more

Standard output stays blocking, because O_NONBLOCK would hold for all that share it, as a terminal's
shell. poll() tells instead whether it takes PIPE_BUF bytes: a pipe, a socket or a terminal does.
"""

import logging
import os
import select
import threading
import traceback
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic_core import to_json

MAX_BUFFER = 1_000_000  # bytes of lines that wait; what comes then is dropped and counted


class Output:
    """A file descriptor to write lines to, from any thread."""

    def __init__(self, fd: int) -> None:
        self.fd, self.lines, self.dropped = fd, bytearray(), 0
        self.room = select.poll()
        self.room.register(fd, select.POLLOUT)
        self.lock = threading.RLock()  # the garbage collector may log while write() runs

    def write(self, line: bytes) -> None:
        """Writes what can go without waiting. The rest goes with a later line."""
        with self.lock:
            if len(self.lines) >= MAX_BUFFER:
                self.dropped += 1
            else:
                if self.dropped:
                    lost = {"message": "log lines dropped", "lines": self.dropped}
                    self.lines, self.dropped = self.lines + encode("WARNING", lost), 0
                self.lines += line
            try:
                while self.lines and self.room.poll(0):
                    del self.lines[: os.write(self.fd, self.lines[: select.PIPE_BUF])]
            except OSError:  # as on a full disk
                self.dropped += self.lines.count(b"\n")
                self.lines.clear()


output = Output(1)


def encode(level: str, fields: dict[str, Any]) -> bytes:
    return to_json({"time": datetime.now(UTC), "level": level, **fields}) + b"\n"


def write(level: str, fields: dict[str, Any]) -> None:
    """Writes a line. Text that is no Unicode loses it."""
    with suppress(ValueError):
        output.write(encode(level, fields))


class JsonHandler(logging.Handler):
    """Of an exception it keeps the type and the places: the message may repeat what a user sent."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            fields: dict[str, Any] = {"message": record.getMessage(), "logger": record.name}
        except Exception:  # a library's call has other arguments than its message asks for
            fields = {"message": str(record.msg), "logger": record.name}
        if record.exc_info and record.exc_info[1]:
            frames = traceback.extract_tb(record.exc_info[2])
            fields["exception"] = type(record.exc_info[1]).__name__
            fields["trace"] = [f"{Path(frame.filename).name}:{frame.lineno}" for frame in frames]
        write(record.levelname, fields)


def configure() -> None:
    """Sends all records through JsonHandler, except uvicorn's access log: ours says more."""
    logging.basicConfig(level=logging.INFO, handlers=[JsonHandler()], force=True)
    for name in ("uvicorn", "uvicorn.error", "uvicorn.access"):
        logging.getLogger(name).handlers.clear()
        logging.getLogger(name).propagate = name != "uvicorn.access"
