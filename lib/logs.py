"""Logs: a line of JSON on standard output for each record. Nothing waits for who reads them.

    logs.configure()                              # logging's own records
    logs.write("INFO", {"message": "request"})    # without logging, which takes 8 us more

The lines of one turn of the event loop go out in one write(). Standard output stays blocking,
because O_NONBLOCK would hold for all that share it, a terminal's shell or the platform's agent.
poll() tells instead whether it takes PIPE_BUF bytes at once: a pipe, a socket or a terminal does.
"""

import asyncio
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
RETRY = 0.1  # seconds until output that took nothing is tried again


class Output:
    """A file descriptor to write lines to, from any thread."""

    def __init__(self, fd: int) -> None:
        self.fd, self.lines, self.dropped = fd, bytearray(), 0
        self.lock, self.room = threading.RLock(), select.poll()
        self.room.register(fd, select.POLLOUT)
        self.loop: asyncio.AbstractEventLoop | None = None  # that is about to flush

    def write(self, line: bytes) -> None:
        """Writes a line at the end of this turn of the event loop, or at once where none runs."""
        with self.lock:
            if len(self.lines) < MAX_BUFFER:
                self.lines += line
            else:
                self.dropped += 1
        if not self.schedule(0):
            self.flush()

    def schedule(self, seconds: float) -> bool:
        """Makes the event loop flush. False in a thread that has none, and at the start."""
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            return False
        if loop is not self.loop:
            self.loop = loop
            loop.call_later(seconds, self.flush)
        return True

    def flush(self) -> None:
        """Writes what goes without waiting. What fails, as on a full disk, is dropped."""
        with self.lock:
            self.loop = None
            try:
                while self.lines and self.room.poll(0):
                    del self.lines[: os.write(self.fd, self.lines[: select.PIPE_BUF])]
            except OSError:
                self.dropped += self.lines.count(b"\n")
                self.lines.clear()
            else:
                if self.dropped and len(self.lines) < MAX_BUFFER:
                    dropped, self.dropped = self.dropped, 0
                    write("WARNING", {"message": "log lines dropped", "lines": dropped})
            if self.lines:
                self.schedule(RETRY)


output = Output(1)


def write(level: str, fields: dict[str, Any]) -> None:
    """Writes a line. Text that is no Unicode loses it."""
    with suppress(ValueError):
        output.write(to_json({"time": datetime.now(UTC), "level": level, **fields}) + b"\n")


class JsonHandler(logging.Handler):
    """Of an exception it keeps the type and the places: the message may repeat what a user sent."""

    def emit(self, record: logging.LogRecord) -> None:
        fields: dict[str, Any] = {"message": record.getMessage(), "logger": record.name}
        if record.exc_info and record.exc_info[1]:
            frames = traceback.extract_tb(record.exc_info[2])
            fields["exception"] = type(record.exc_info[1]).__name__
            fields["trace"] = [f"{Path(frame.filename).name}:{frame.lineno}" for frame in frames]
        write(record.levelname, fields)
        output.flush()  # at the end of the process no turn of the loop may follow


def configure() -> None:
    """Sends all records through JsonHandler, except uvicorn's access log: ours says more."""
    logging.basicConfig(level=logging.INFO, handlers=[JsonHandler()], force=True)
    for name in ("uvicorn", "uvicorn.error", "uvicorn.access"):
        logging.getLogger(name).handlers.clear()
        logging.getLogger(name).propagate = name != "uvicorn.access"
