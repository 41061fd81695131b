"""Limits on how often a key may do something in a window of time.

    limiter = RateLimiter(storage_uri="")
    await limiter.hit("login", parse_limit("10/minute"), "ann@example.com")  # HTTPProblem(429)

A dict in this process counts: 1 us a hit, where MemoryStorage of the `limits` library takes 5 to 10
and grows without a bound. With a URI `limits` counts in Redis, for all instances together. Windows
are fixed: around the border of two, twice the limit may pass within the length of one.
"""

import asyncio
import logging
from ipaddress import ip_address, ip_network
from math import ceil
from time import monotonic, time
from typing import Any, NamedTuple

from lib.problems import HTTPProblem

MAX_COUNTERS = 50_000  # exact ones of one limit in one window, some 7 MB
PAUSE = 5.0  # seconds without asking a Redis that did not answer
TIMEOUT = 1.0  # seconds for Redis to answer
PATIENCE = 0.1  # seconds of those for which a request waits
UNITS = {"second": 1, "minute": 60, "hour": 3600, "day": 86_400}
LIMIT = r"[1-9]\d{0,8} ?/ ?(?:second|minute|hour|day)"  # what parse_limit() takes

log = logging.getLogger("ratelimit")


class Limit(NamedTuple):
    """So many hits in so many seconds."""

    amount: int
    seconds: int


def parse_limit(text: str) -> Limit:
    """A limit like 600/minute, as LIMIT."""
    amount, unit = text.split("/")
    return Limit(int(amount), UNITS[unit.strip()])


class RateLimiter:
    """Counts in fixed windows. A window that is over is dropped as a whole."""

    def __init__(self, storage_uri: str = "") -> None:
        """Without a URI no other instance's hits count."""
        self.windows: dict[str, tuple[float, dict[str | int, int]]] = {}  # by name: end, counters
        self.shared: Any = connect(storage_uri) if storage_uri else None
        self.paused_until = 0.0  # 0 while Redis answers
        self.slow: asyncio.Task[float | None] | None = None  # the question that others wait behind

    async def hit(self, name: str, limit: Limit | None, *keys: str) -> None:
        """Counts one for the first key. Raises HTTPProblem(429) above the limit, if there is one.

        Further keys are coarser, such as an address's networks: each counts where there is no room
        for those before it. So whoever invents keys shares a limit, and nobody else is refused.
        """
        if limit is None:
            return
        wait = await self.ask(name, limit, keys[0]) if self.shared else None
        if wait is None:
            wait = self.count(name, limit, keys)
        if wait:
            raise too_many_requests(name, limit, seconds=ceil(wait))

    def count(self, name: str, limit: Limit, keys: tuple[str, ...]) -> float:
        """Counts one here. Above the limit it gives the seconds to wait, or else 0."""
        now = monotonic()
        ends, counters = self.windows.get(name, (0.0, {}))
        if now >= ends:
            ends, counters = self.windows[name] = now + limit.seconds, {}
        key: str | int = hash(keys[-1]) % MAX_COUNTERS  # where no key finds room, some share one
        for level, each in enumerate(keys, 1):
            if each in counters or len(counters) < level * MAX_COUNTERS:
                key = each
                break
        counters[key] = counters.get(key, 0) + 1
        return ends - now if counters[key] > limit.amount else 0.0

    async def ask(self, name: str, limit: Limit, key: str) -> float | None:
        """As count(), in Redis. None when it does not answer in time, or has not answered others.

        While one question waits for a frozen Redis, or tries it after a pause, the rest count here.
        """
        if monotonic() < self.paused_until or (self.slow and not self.slow.done()):
            return None
        asked = asyncio.create_task(self.count_in_redis(name, limit, key))
        self.slow = asked if self.paused_until else None
        done, _ = await asyncio.wait([asked], timeout=PATIENCE)
        self.slow = self.slow if done else asked
        return asked.result() if done else None

    async def count_in_redis(self, name: str, limit: Limit, key: str) -> float | None:
        from limits import RateLimitItemPerSecond

        item, wait = RateLimitItemPerSecond(*limit), 0.0
        try:
            async with asyncio.timeout(TIMEOUT):
                if not await self.shared.hit(item, name, key):
                    window = await self.shared.get_window_stats(item, name, key)
                    wait = max(window.reset_time - time(), 0) + 0.5  # Redis rounds its seconds
        except Exception as error:
            log.warning("rate limit storage failed: %s", type(error).__name__)
            self.paused_until = monotonic() + PAUSE
            return None
        self.paused_until = 0.0
        return wait


def connect(uri: str) -> Any:
    """What counts behind a URI like redis://host:6379. Imported here: `limits` takes 1.6 MB."""
    from limits.aio.strategies import FixedWindowRateLimiter
    from limits.storage import storage_from_string

    storage: Any = storage_from_string("async+" + uri, implementation="redispy")
    return FixedWindowRateLimiter(storage)


def networks(address: str) -> list[str]:
    """Keys of a client: the /64 and wider networks of IPv6, or the IPv4 address and wider ones."""
    try:
        ip = ip_address(address.partition("%")[0])
    except ValueError:
        return [address]
    ip = getattr(ip, "ipv4_mapped", None) or ip
    lengths = (32, 24, 16) if ip.version == 4 else (64, 48, 32)
    return [str(ip_network(f"{ip}/{bits}", strict=False)) for bits in lengths]


def too_many_requests(name: str, limit: Limit, seconds: int) -> HTTPProblem:
    """429 with Retry-After, and the fields of draft-ietf-httpapi-ratelimit-headers-10."""
    headers = {"RateLimit-Policy": f'"{name}";q={limit.amount};w={limit.seconds}'}
    headers |= {"RateLimit": f'"{name}";r=0;t={seconds}', "Retry-After": str(seconds)}
    text = f"Too many attempts: try again in {seconds} second{'s' if seconds > 1 else ''}"
    return HTTPProblem(429, text, headers=headers)
