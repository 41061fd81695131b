"""What a process does as it starts and ends.

app = FastAPI(lifespan=startup.lifespan(connect, close))  # connect() may raise NotReady
"""

import gc
import logging
import os
import signal
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, nullcontext
from typing import Any, NoReturn

from fastapi import FastAPI

from lib import logs
from lib.connect_errors import NotReady


def lifespan(start: Callable[[], Awaitable[None]], stop: Callable[[], Awaitable[None]]) -> Any:
    """A lifespan for FastAPI that starts a service, and stops it even if its start or use fails."""

    @asynccontextmanager
    async def run(_: FastAPI) -> AsyncIterator[None]:
        # FastAPI's TestClient runs this in a thread of another program, which gets no signals.
        is_main = threading.current_thread() is threading.main_thread()
        try:
            async with AsyncExitStack() as stack:
                stack.callback(logs.output.flush)  # uvicorn's end runs no atexit
                stack.push_async_callback(stop)  # after a start that failed, too
                with ended_by_signals() if is_main else nullcontext():
                    await start()
                # What was made by now stays: not to walk through it saves a tenth of each request.
                gc.collect()
                gc.freeze()
                gc.set_threshold(50_000, 20, 100)
                yield
        except NotReady as error:
            if not is_main:
                raise
            logging.getLogger("startup").critical("%s", error)
            end(1)  # uvicorn would write a traceback

    return run


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """A signal ends the process at once: uvicorn's handlers would wait for the start."""
    handlers = {n: signal.signal(n, lambda *_: end(0)) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def end(code: int) -> NoReturn:
    """Ends the process with this code at once, when its log is written."""
    logs.output.flush()
    os._exit(code)
