"""Password hashes by bcrypt, in threads, a few at a time.

    passwords = Passwords(cost=12, max_concurrent=2, max_waiting=20)
    stored = await passwords.hash("correct horse")  # "$2b$12$..."
    await passwords.check("correct horse", stored.encode())  # True

They are hashed in Unicode's form NFC (RFC 8265 section 4.2.2), because keyboards send "ä" as one or
as two code points. Release 1 hashed what was sent: check() tries that too.
"""

import base64
import hashlib
import logging
from collections.abc import Callable
from functools import partial
from typing import Any
from unicodedata import normalize

import anyio.to_thread
import bcrypt

from lib.problems import HTTPProblem

MAX_BYTES = 72  # bcrypt reads no further
log = logging.getLogger("passwords")
busy = partial(HTTPProblem, 503, "Too many logins at once", headers={"Retry-After": "3"})


class Passwords:
    """Hashes a few at a time. `cost` is bcrypt's: 12 takes 0.24 s of a core."""

    def __init__(self, cost: int, max_concurrent: int, max_waiting: int) -> None:
        self.cost, self.limiter = cost, anyio.CapacityLimiter(max_concurrent)
        self.pending, self.max_pending = 0, max_concurrent + max_waiting
        # Compared with where there is no hash, so that this takes as long as a wrong password.
        self.dummy = b"$2b$%02d$" % cost + b"." * 53

    async def hash(self, password: str) -> str:
        """The hash of a password of any length. Raises HTTPProblem(503) if too many wait."""
        secret, salt = to_bytes(normalize("NFC", password)), bcrypt.gensalt(self.cost)
        return str(await self.run(bcrypt.hashpw, secret, salt), "ascii")

    async def check(self, password: str, stored: bytes | None) -> bool:
        """Whether `stored` is the hash of the password, and not None. Raises as hash()."""
        for text in dict.fromkeys([normalize("NFC", password), password]):
            secret = to_bytes(text)
            try:
                if await self.run(bcrypt.checkpw, secret, stored or self.dummy):
                    return stored is not None
            except ValueError as error:  # a hash by something else
                log.error("a stored hash cannot be checked: %s", error)
                return False
        return False

    def refuse_if_busy(self) -> None:
        """Raises HTTPProblem(503) if too many passwords wait."""
        if self.pending >= self.max_pending:
            raise busy()

    async def run(self, function: Callable[..., Any], *arguments: bytes) -> Any:
        """Runs a function of bcrypt in a thread. Raises as hash(), or RuntimeError without one."""
        self.refuse_if_busy()
        self.pending += 1  # before the thread begins, because other requests come until then
        try:
            return await anyio.to_thread.run_sync(function, *arguments, limiter=self.limiter)
        finally:
            self.pending -= 1


def to_bytes(text: str) -> bytes:
    """What bcrypt takes: UTF-8, or of more than MAX_BYTES the base64 of their SHA-256."""
    secret = text.encode()
    return secret if len(secret) <= MAX_BYTES else base64.b64encode(hashlib.sha256(secret).digest())
