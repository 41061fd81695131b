"""Clients that are slow to read: what all of them together may hold, and who is dropped for it."""

from asyncio import Transport
from collections import Counter

MAX_UNREAD = 32_000_000  # bytes of responses that all clients have not taken


class Readers:
    """The connections with a response that waits for its client, the oldest first."""

    def __init__(self) -> None:
        self.clients: dict[Transport, str] = {}

    def add(self, transport: Transport, client: str) -> list[str]:
        """Notes a connection. Beyond MAX_UNREAD, the client that holds most loses its oldest.
        Returns who lost one."""
        self.clients[transport], losers = client, []
        held = {each: each.get_write_buffer_size() for each in self.clients}
        while sum(held.values()) > MAX_UNREAD:
            shares = Counter[str]()
            for each, size in held.items():
                shares[self.clients[each]] += size
            [(largest, _)] = shares.most_common(1)
            dropped = next(each for each in held if self.clients[each] == largest)
            del held[dropped], self.clients[dropped]
            dropped.abort()
            losers.append(largest)
        return losers

    def discard(self, transport: Transport) -> None:
        """Forgets a connection that has nothing left to take, or is gone."""
        self.clients.pop(transport, None)
