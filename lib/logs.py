"""Logs: a line of JSON on standard output for each record.

logs.configure()                                   # logging's own records
logs.write("INFO", '"message": "request", …')      # by hand, where each request pays for it
"""

import json
import logging
import os
import traceback
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any


def write(level: str, fields: str) -> None:
    """Writes a line; `fields` is JSON without its braces. A full disk is no request's fault."""
    now = datetime.now(UTC).isoformat(timespec="milliseconds")
    with suppress(OSError):
        os.write(1, f'{{"time": "{now}", "level": "{level}", {fields}}}\n'.encode())


class JsonHandler(logging.Handler):
    """Of an exception it keeps the type and the places: the message may repeat what a user sent."""

    def emit(self, record: logging.LogRecord) -> None:
        fields: dict[str, Any] = {"message": record.getMessage(), "logger": record.name}
        if record.exc_info and record.exc_info[1]:
            frames = traceback.extract_tb(record.exc_info[2])
            fields["exception"] = type(record.exc_info[1]).__name__
            fields["trace"] = [f"{Path(frame.filename).name}:{frame.lineno}" for frame in frames]
        write(record.levelname, json.dumps(fields)[1:-1])


def configure() -> None:
    """Sends all records through JsonHandler, except uvicorn's access log: ours says more."""
    logging.basicConfig(level=logging.INFO, handlers=[JsonHandler()], force=True)
    for name in ("uvicorn", "uvicorn.error", "uvicorn.access"):
        logging.getLogger(name).handlers.clear()
        logging.getLogger(name).propagate = name != "uvicorn.access"
