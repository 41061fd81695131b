"""Password hashes by bcrypt, in threads, a few at a time.

passwords = Passwords(cost=12, max_concurrent=2, max_waiting=20)
stored = await passwords.hash("correct horse")
await passwords.check("correct horse", stored)  # True
"""

import base64
import hashlib
import unicodedata

import anyio.to_thread
import bcrypt

from lib.problems import HTTPProblem

MAX_BYTES = 72  # bcrypt reads no further


class Passwords:
    """`cost` is bcrypt's: 12 takes 0.24 s of a core."""

    def __init__(self, cost: int, max_concurrent: int, max_waiting: int) -> None:
        self.cost, self.max_waiting = cost, max_waiting
        self.limiter = anyio.CapacityLimiter(max_concurrent)
        # Compared with where there is no hash, so that this takes as long as a wrong password.
        self.dummy = b"$2b$%02d$" % cost + b"." * 53

    def refuse_if_busy(self) -> None:
        """Raises HTTPProblem(503) when too many passwords wait."""
        if self.limiter.statistics().tasks_waiting >= self.max_waiting:
            raise HTTPProblem(503, "Too many logins at once", headers={"Retry-After": "3"})

    async def hash(self, password: str) -> str:
        """The hash of a password of any length, in Unicode's form NFC (RFC 8265 section 4.2.2)."""
        secret, salt = for_bcrypt(unicodedata.normalize("NFC", password)), bcrypt.gensalt(self.cost)
        hashed = await anyio.to_thread.run_sync(bcrypt.hashpw, secret, salt, limiter=self.limiter)
        return hashed.decode()

    async def check(self, password: str, stored: bytes | None) -> bool:
        """Whether `stored` is the hash of the password. None never is, and takes as long.

        A password that NFC changes is also tried as it was sent, because release 1 hashed it so.
        """
        hashed, matches = stored or self.dummy, False
        for text in dict.fromkeys([unicodedata.normalize("NFC", password), password]):
            matches = matches or await anyio.to_thread.run_sync(
                bcrypt.checkpw, for_bcrypt(text), hashed, limiter=self.limiter
            )
        return matches and stored is not None


def for_bcrypt(text: str) -> bytes:
    """The bytes that bcrypt takes, those of more than MAX_BYTES as the base64 of their SHA-256."""
    secret = text.encode()
    return secret if len(secret) <= MAX_BYTES else base64.b64encode(hashlib.sha256(secret).digest())
