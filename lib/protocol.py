"""uvicorn's HTTP protocol, which drops a client that takes nothing of its response for a while.

    uvicorn main:app --http lib.protocol:Protocol

uvicorn itself waits for ever: a client that asks for a page and never reads it holds the page.
After a reset it keeps the connection's objects until the keep-alive would have ended.
"""

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

WRITE_TIMEOUT = 30  # seconds without a byte taken


class Protocol(HttpToolsProtocol):
    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._unset_keepalive_if_required()

    def pause_writing(self) -> None:
        super().pause_writing()
        self.watch()

    def watch(self, left: int = 0) -> None:
        """Drops the client if as much is `left` to write as WRITE_TIMEOUT seconds before."""
        size = self.transport.get_write_buffer_size()
        if size == left and size:
            self.transport.abort()
        elif self.flow.write_paused and not self.transport.is_closing():
            self.loop.call_later(WRITE_TIMEOUT, self.watch, size)
