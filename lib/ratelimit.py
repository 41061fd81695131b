"""Limits on how often a key may do something in a window of time.

    limiter = RateLimiter(os.environ.get("RATE_LIMIT_STORAGE_URI"))
    await limiter.hit("login", parse("10/minute"), "ann@example.com")  # raises HTTPProblem(429)

A dict in this process counts. With a URI the `limits` library counts in Redis, for all instances
together; while Redis is out of reach, the dict does.
"""

import asyncio
import logging
from contextlib import suppress
from time import monotonic, time
from typing import Any

from limits import RateLimitItem, parse
from limits.aio.strategies import FixedWindowRateLimiter
from limits.storage import storage_from_string

from lib.problems import HTTPProblem

MAX_COUNTERS = 50_000  # of one limit in one window, some 10 MB: invented e-mails could fill memory
PAUSE = 5.0  # seconds without asking a Redis that did not answer
STORAGE_TIMEOUT = 1.0  # seconds for Redis to answer

log = logging.getLogger("ratelimit")


def parse_limit(text: str, setting: str = "") -> RateLimitItem | None:
    """A limit like 600/minute; None for "". Raises SystemExit with a line that names `setting`."""
    with suppress(ValueError):
        if not text or (limit := parse(text)).amount:
            return limit if text else None
    raise SystemExit(f"{setting} is not a limit like 600/minute")


class RateLimiter:
    """Counts in fixed windows. A window that is over is dropped as a whole."""

    def __init__(self, storage_uri: str | None = None) -> None:
        """Raises SystemExit for a URI that `limits` does not know."""
        self.windows: dict[str, tuple[float, dict[str, int]]] = {}  # by name: its end, its counters
        self.shared: FixedWindowRateLimiter | None = None
        self.paused_until = 0.0
        if storage_uri:
            try:
                redis: Any = storage_from_string("async+" + storage_uri, implementation="redispy")
            except Exception:
                raise SystemExit("RATE_LIMIT_STORAGE_URI is not like redis://host:6379") from None
            self.shared = FixedWindowRateLimiter(redis)

    async def hit(self, name: str, limit: RateLimitItem | None, key: str) -> None:
        """Counts one. Raises HTTPProblem(429) above the limit, if there is one."""
        if limit is None:
            return
        wait = None
        if not self.shared or monotonic() < self.paused_until:
            wait = self.count(name, limit, key)
        else:
            try:
                async with asyncio.timeout(STORAGE_TIMEOUT):
                    if not await self.shared.hit(limit, name, key):
                        window = await self.shared.get_window_stats(limit, name, key)
                        wait = window.reset_time - time()
            except Exception as error:
                log.warning("rate limit storage failed: %s", type(error).__name__)
                self.paused_until = monotonic() + PAUSE
                wait = self.count(name, limit, key)
        if wait is not None:
            raise too_many_requests(name, limit, max(1, round(wait)))

    def count(self, name: str, limit: RateLimitItem, key: str) -> float | None:
        """Counts one here. Above the limit it gives the seconds to wait.

        A new key is refused while MAX_COUNTERS are in use: a reset would free who is locked out.
        """
        now = monotonic()
        ends, counters = self.windows.get(name, (0.0, {}))
        if now >= ends:
            ends, counters = self.windows[name] = now + limit.get_expiry(), {}
        count = counters.get(key, 0)
        if count >= limit.amount or (not count and len(counters) >= MAX_COUNTERS):
            return ends - now
        counters[key] = count + 1
        return None


def too_many_requests(name: str, limit: RateLimitItem, wait: int) -> HTTPProblem:
    """429 with Retry-After, and the fields of draft-ietf-httpapi-ratelimit-headers-10."""
    policy = f'"{name}";q={limit.amount};w={limit.get_expiry()}'
    headers = {"RateLimit-Policy": policy, "RateLimit": f'"{name}";r=0;t={wait}'}
    return HTTPProblem(429, "Too many requests", headers={"Retry-After": str(wait), **headers})
