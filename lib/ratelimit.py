"""Limits on how often a key may do something in a window of time.

    limiter = RateLimiter(storage_uri="")
    await limiter.hit("login", parse_limit("10/minute"), "ann@example.com")  # HTTPProblem(429)

With a URI, Redis counts for all instances, by one question a hit. A dict counts without, and while
Redis fails or is slow. Windows are fixed, so twice the limit may pass around the end of one.
"""

import logging
from ipaddress import ip_address, ip_network
from math import ceil
from time import monotonic
from typing import Any, NamedTuple

from lib.problems import HTTPProblem
from lib.state import RequestState

MAX_COUNTERS = 50_000  # of a limit and level of networks: some 7 MB
PATIENCE = 0.1  # seconds that a request waits for an answer of Redis
CONNECT_TIMEOUT = 0.5  # seconds that it waits for a new connection before that
MAX_CONNECTIONS = 50  # to Redis: a burst waits for them, for POOL_TIMEOUT seconds
POOL_TIMEOUT = 1.0
MAX_FAILURES = 3  # of Redis in a row
PAUSE = 5.0  # seconds between two questions from then on
UNITS = {"second": 1, "minute": 60, "hour": 3600, "day": 86_400}
# Atomic, so that no counter stays without its end.
COUNT = """
local count = redis.call('INCR', KEYS[1])
if count == 1 then redis.call('EXPIRE', KEYS[1], ARGV[1]) end
return {count, redis.call('PTTL', KEYS[1])}
"""
LIMIT = rf"[1-9]\d{{0,8}} ?/ ?({'|'.join(UNITS)})"  # what parse_limit() takes

log = logging.getLogger("ratelimit")


class Limit(NamedTuple):
    """So many hits in so many seconds."""

    amount: int
    seconds: int


def parse_limit(text: str) -> Limit:
    """Reads LIMIT, like 600/minute."""
    amount, unit = text.split("/")
    return Limit(int(amount), UNITS[unit.strip()])


class RateLimiter:
    """Counts by name and key. The counters of a window that is over are dropped as a whole."""

    def __init__(self, storage_uri: str = "") -> None:
        """Raises SystemExit where RATE_LIMIT_STORAGE_URI, which `storage_uri` is, cannot work."""
        self.windows: dict[str, tuple[float, dict[str, int]]] = {}  # by name: end, counters
        self.redis: Any = connect(storage_uri) if storage_uri else None
        self.failures = 0  # of Redis in a row
        self.ask_again_at = 0.0  # by monotonic(): when one request asks, after MAX_FAILURES

    async def hit(self, name: str, limit: Limit, *keys: str) -> None:
        """Counts one for the first key. Raises HTTPProblem(429) above the limit.

        Further keys are coarser, such as an address's networks, so that whoever invents keys shares
        a limit. Counted by the first key that has a counter or finds room. With room for none, by
        one of MAX_COUNTERS shared counters, so a stranger may meet a full one. Redis uses the first
        key only.
        """
        wait = await self.ask(name, limit, keys[0]) if self.redis else None
        if wait is None:
            wait = self.count(name, limit, keys)
        if wait:
            seconds = ceil(wait)
            text = f"Too many attempts: try again in {seconds} second{'s' if seconds > 1 else ''}"
            headers = {"Retry-After": str(seconds)}  # and draft-ietf-httpapi-ratelimit-headers-10
            headers["RateLimit-Policy"] = f'"{name}";q={limit.amount};w={limit.seconds}'
            headers["RateLimit"] = f'"{name}";r=0;t={seconds}'
            raise HTTPProblem(429, text, headers=headers)

    def count(self, name: str, limit: Limit, keys: tuple[str, ...]) -> float:
        """Counts one here. The seconds to wait above the limit, or 0."""
        now = monotonic()
        ends, counters = self.windows.get(name, (0.0, {}))
        if now >= ends:
            ends, counters = self.windows[name] = now + limit.seconds, {}
        for level, key in enumerate(keys, 1):
            if key in counters or len(counters) < level * MAX_COUNTERS:
                break
        else:  # there is no room at any level
            key = f"shared {hash(keys[-1]) % MAX_COUNTERS}"
        counters[key] = counters.get(key, 0) + 1
        return ends - now if counters[key] > limit.amount else 0.0

    async def ask(self, name: str, limit: Limit, key: str) -> float | None:
        """As count(), in Redis. None if it fails or is slow, or was not asked because it did."""
        if self.failures >= MAX_FAILURES and monotonic() < self.ask_again_at:
            return None
        self.ask_again_at = monotonic() + PAUSE  # one request in PAUSE asks until one is answered
        try:
            place = f"ratelimit:{name}:{key}"
            count, left = await self.redis.eval(COUNT, 1, place, limit.seconds)
        except Exception as error:
            self.failures += 1
            if self.failures == MAX_FAILURES:
                text = "Redis fails or is slow: this instance counts alone: %s"
                log.warning(text, type(error).__name__)
            return None
        if self.failures >= MAX_FAILURES:
            log.warning("Redis counts again")
        self.failures = 0
        return max(left, 1) / 1000 if count > limit.amount else 0.0  # of milliseconds


def connect(storage_uri: str) -> Any:
    """A client of Redis that has not connected yet. Raises SystemExit."""
    from redis.asyncio import BlockingConnectionPool, Redis  # takes 7 MB
    from redis.asyncio.connection import parse_url

    ours: Any = {"socket_timeout": PATIENCE, "socket_connect_timeout": CONNECT_TIMEOUT}
    ours |= {"max_connections": MAX_CONNECTIONS, "timeout": POOL_TIMEOUT}
    try:
        # Not from_url(), for which the URI's own parameters win.
        pool: Any = BlockingConnectionPool(**{**parse_url(storage_uri), **ours})
        pool.make_connection()  # finds parameters that no connection knows
    except (ValueError, TypeError):
        raise SystemExit("RATE_LIMIT_STORAGE_URI has a wrong port or parameter") from None
    return Redis(connection_pool=pool)


def networks(address: str) -> list[str]:
    """Keys of a client: the /64 and wider networks of IPv6, or the IPv4 address and wider ones."""
    try:
        ip = ip_address(address.partition("%")[0])
    except ValueError:
        return [address]
    ip = getattr(ip, "ipv4_mapped", None) or ip
    lengths = (32, 24, 16) if ip.version == 4 else (64, 48, 32)
    return [str(ip_network(f"{ip}/{bits}", strict=False)) for bits in lengths]


def owner_of(state: RequestState) -> str:
    """Whose share the bytes of a request count for: a user's, or an address's without one."""
    return state.user_id or networks(state.client)[0]
