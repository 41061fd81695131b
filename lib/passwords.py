"""Password hashes by bcrypt, in threads, a few at a time.

passwords = Passwords(cost=12, max_concurrent=2, max_waiting=20)
stored = await passwords.hash("correct horse")
await passwords.check("correct horse", stored)  # True
"""

import base64
import hashlib
import unicodedata
from collections.abc import Callable
from typing import Any

import anyio.to_thread
import bcrypt

from lib.problems import HTTPProblem

MAX_BYTES = 72  # bcrypt reads no further


class Passwords:
    """`cost` is bcrypt's: 12 takes 0.24 s of a core."""

    def __init__(self, cost: int, max_concurrent: int, max_waiting: int) -> None:
        self.cost, self.max_waiting = cost, max_waiting
        self.limiter, self.waiting = anyio.CapacityLimiter(max_concurrent), 0
        # Compared with where there is no hash, so that this takes as long as a wrong password.
        self.dummy = b"$2b$%02d$" % cost + b"." * 53

    def refuse_if_busy(self) -> None:
        """Raises HTTPProblem(503) when too many passwords wait."""
        if self.waiting >= self.max_waiting + self.limiter.total_tokens:
            raise HTTPProblem(503, "Too many logins at once", headers={"Retry-After": "3"})

    async def run(self, function: Callable[..., Any], *arguments: bytes) -> Any:
        """Runs a function of bcrypt in a thread. Raises HTTPProblem(503) when too many wait."""
        self.refuse_if_busy()
        self.waiting += 1  # at once: others come before the thread has begun
        try:
            return await anyio.to_thread.run_sync(function, *arguments, limiter=self.limiter)
        finally:
            self.waiting -= 1

    async def hash(self, password: str) -> str:
        """The hash of a password of any length, in Unicode's form NFC (RFC 8265 section 4.2.2)."""
        secret, salt = for_bcrypt(unicodedata.normalize("NFC", password)), bcrypt.gensalt(self.cost)
        hashed: bytes = await self.run(bcrypt.hashpw, secret, salt)
        return hashed.decode()

    async def check(self, password: str, stored: bytes | None) -> bool:
        """Whether `stored` is the hash of the password. None never is, and takes as long.

        A password that NFC changes is also tried as it was sent, because release 1 hashed it so.
        """
        hashed, matches = stored or self.dummy, False
        for text in dict.fromkeys([unicodedata.normalize("NFC", password), password]):
            matches = matches or await self.run(bcrypt.checkpw, for_bcrypt(text), hashed)
        return bool(matches) and stored is not None


def for_bcrypt(text: str) -> bytes:
    """The bytes that bcrypt takes, those of more than MAX_BYTES as the base64 of their SHA-256."""
    secret = text.encode()
    return secret if len(secret) <= MAX_BYTES else base64.b64encode(hashlib.sha256(secret).digest())
