"""Password hashes by bcrypt, in threads, a few at a time.

passwords = Passwords(cost=12, max_concurrent=2, max_waiting=20)
stored = await passwords.hash("correct horse")
await passwords.check("correct horse", stored)  # True
"""

import anyio.to_thread
import bcrypt

from lib.problems import HTTPProblem

MAX_LENGTH = 72  # bytes: bcrypt reads no further


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
        """The hash of a password of at most MAX_LENGTH bytes."""
        secret, salt = password.encode(), bcrypt.gensalt(self.cost)
        hashed = await anyio.to_thread.run_sync(bcrypt.hashpw, secret, salt, limiter=self.limiter)
        return hashed.decode()

    async def check(self, password: str, stored: bytes | None) -> bool:
        """Whether `stored` is the hash of the password. None never is, and takes as long."""
        secret, hashed = password.encode(), stored or self.dummy
        cut = secret[:MAX_LENGTH]
        matches = await anyio.to_thread.run_sync(bcrypt.checkpw, cut, hashed, limiter=self.limiter)
        return matches and stored is not None and cut == secret
