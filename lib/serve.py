"""Starts the server. Its flags stand only here. A port that is taken ends it with one line.

python -m lib.serve main:app --host 0.0.0.0    # on the port that PORT names
"""

import argparse
import socket
from contextlib import suppress
from typing import Any

import uvicorn
from pydantic import Field

from lib.settings import BaseSettings

SHUTDOWN = 8  # seconds that requests have to end after SIGTERM; platforms kill after 10 or more

# libuv accepts one connection for each listening socket and turn of the event loop (its PR 3696),
# so a newcomer among 1,000 clients would wait for long. The price: each new connection takes 250 us
# more CPU than with one listener, measured with /health and `Connection: close`.
LISTENERS = 64  # duplicates of the socket: 200 connections take 5 turns instead of 201

FLAGS: dict[str, Any] = {
    "http": "lib.protocol:Protocol",
    "ws": "none",
    "timeout_graceful_shutdown": SHUTDOWN,
    "proxy_headers": False,  # lib.middleware.client_address() finds the client
    "server_header": False,
    "access_log": False,  # RequestLog says more
    "log_config": None,  # the application configures logging
}


class Settings(BaseSettings):
    port: int = Field(8000, ge=0, le=65_535)  # 0: any free port


def duplicates(listener: socket.socket) -> list[socket.socket]:
    """The socket LISTENERS times, each with a descriptor of its own."""
    return [listener, *(listener.dup() for _ in range(LISTENERS - 1))]


class Server(uvicorn.Server):
    """Ends where another process began to listen on the port during the start."""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        try:
            for each in sockets or ():
                each.getsockname()
        except OSError:  # uvloop closes a socket that cannot listen, and says nothing
            await self.lifespan.shutdown()
            raise SystemExit(f"PORT {self.config.port} is taken by another process") from None


def run(app: str, host: str = "", fd: int | None = None) -> None:
    """Serves `app` until a signal. `fd`, a socket that listens already, replaces host and port.

    The port is taken first, and listened on when the application has started.
    """
    config = uvicorn.Config(app, host, Settings.load().port, fd=fd, **FLAGS)
    config.load()  # so that the application's logging is there before the first line
    with suppress(KeyboardInterrupt):  # Ctrl-C, after the server has shut down
        Server(config).run(duplicates(config.bind_socket()))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m lib.serve")
    parser.add_argument("app", help="module:name")
    parser.add_argument("--host", default="127.0.0.1", help="the address to listen on")
    run(**vars(parser.parse_args()))
