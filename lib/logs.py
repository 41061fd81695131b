"""Logs: a line of JSON on standard output for each record.

logs.configure()                              # logging's own records
logs.write("INFO", {"message": "request"})    # without logging, which takes 8 us more
"""

import logging
import os
import traceback
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic_core import to_json


def write(level: str, fields: dict[str, Any]) -> None:
    """Writes a line. A full disk is no request's fault, nor is text that is no Unicode."""
    with suppress(OSError, ValueError):
        os.write(1, to_json({"time": datetime.now(UTC), "level": level, **fields}) + b"\n")


class JsonHandler(logging.Handler):
    """Of an exception it keeps the type and the places: the message may repeat what a user sent."""

    def emit(self, record: logging.LogRecord) -> None:
        fields: dict[str, Any] = {"message": record.getMessage(), "logger": record.name}
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
