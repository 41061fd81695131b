"""A database that is far away: passes TCP connections on to a unix socket and holds every byte back for a while.

Its arguments: the TCP port on loopback, the path of the unix socket, and the milliseconds each way.
"""

import asyncio
import selectors
import sys
from collections import deque
from functools import partial


async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, delay: float) -> None:
    """Writes what it reads, `delay` seconds later. It goes on reading meanwhile: latency, not less bandwidth."""
    loop = asyncio.get_running_loop()
    held: deque[bytes] = deque()  # as timers of the same moment may fire in any order
    try:
        while data := await reader.read(65536):
            held.append(data)
            loop.call_later(delay, lambda: writer.write(held.popleft()))
    finally:
        loop.call_later(delay, writer.close)


async def connect(socket: str, delay: float, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    database_reader, database_writer = await asyncio.open_unix_connection(socket)
    await asyncio.gather(
        pump(reader, database_writer, delay), pump(database_reader, writer, delay), return_exceptions=True
    )


async def serve(port: int, socket: str, delay: float) -> None:
    server = await asyncio.start_server(partial(connect, socket, delay), "127.0.0.1", port)
    await server.serve_forever()


if __name__ == "__main__":
    # epoll, the default, rounds timeouts up to whole milliseconds.
    loop = asyncio.SelectorEventLoop(selectors.SelectSelector())
    loop.run_until_complete(serve(int(sys.argv[1]), sys.argv[2], float(sys.argv[3]) / 1000))
