"""What a process does as it starts and ends.

app = FastAPI(lifespan=startup.lifespan(connect, close))  # connect() may raise NotReady
"""

import gc
import logging
import os
import signal
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, NoReturn

from fastapi import FastAPI

from lib import logs
from lib.connect_errors import NotReady

log = logging.getLogger("startup")


def lifespan(start: Callable[[], Awaitable[None]], stop: Callable[[], Awaitable[None]]) -> Any:
    """A lifespan for FastAPI that starts a service, and stops it even if its use fails."""

    @asynccontextmanager
    async def run(_: FastAPI) -> AsyncIterator[None]:
        # FastAPI's TestClient runs this in a thread of another program, which gets no signals.
        if threading.current_thread() is threading.main_thread():
            await start_process(start)
        else:
            await start()
        try:
            yield
        finally:
            await stop()
            logs.flush()  # uvicorn ends by the signal that stopped it, which runs no exit handler

    return run


async def start_process(start: Callable[[], Awaitable[None]]) -> None:
    """A signal ends the start at once, and NotReady with code 1 and one line.

    uvicorn's own handlers wait for a start to end, and an exception comes out as a traceback.
    """
    signals = (signal.SIGINT, signal.SIGTERM)
    servers: Any = {each: signal.signal(each, lambda *_: end(0)) for each in signals}
    try:
        await start()
    except NotReady as error:
        log.critical("%s", error)
        end(1)
    for each, handler in servers.items():
        signal.signal(each, handler)
    # What was made by now stays: not to walk through it again saves a tenth of each request.
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)


def end(code: int) -> NoReturn:
    """Ends the process with this code at once, when its log is written."""
    logs.flush()
    os._exit(code)
