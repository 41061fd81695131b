"""A distant database: `delay.py PORT SOCKET MS` passes TCP on to a socket, MS/2 late each way."""

import asyncio
import selectors
import sys

PORT, SOCKET, DELAY = int(sys.argv[1]), sys.argv[2], float(sys.argv[3]) / 2000


async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Reads on while it waits to write: more latency, not less bandwidth."""
    loop, held = asyncio.get_running_loop(), []
    while data := await reader.read(65536):
        held.append(data)  # since timers of the same moment fire in any order
        loop.call_later(DELAY, lambda: writer.write(held.pop(0)))
    loop.call_later(DELAY, writer.close)


async def connect(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    database_reader, database_writer = await asyncio.open_unix_connection(SOCKET)
    await asyncio.gather(pump(reader, database_writer), pump(database_reader, writer))


loop = asyncio.SelectorEventLoop(selectors.SelectSelector())  # epoll rounds up to milliseconds
loop.run_until_complete(asyncio.start_server(connect, "127.0.0.1", PORT))
loop.run_forever()
