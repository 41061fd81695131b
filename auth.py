"""Speaks identity: from a token to a user id, issuing tokens, passwords, and who asks too often.

The policy comes first. A key's family is chosen by configuration: HS256 meets only the secret, and the asymmetric
algorithms only the keys behind JWT_JWKS_URL, whatever a token says of itself (RFC 8725 section 3.1).
"""

import asyncio
import hashlib
import json
import logging
import os
import re
import urllib.request
from inspect import isawaitable
from time import monotonic, time
from types import SimpleNamespace
from typing import Any

import anyio.to_thread
import bcrypt
import jwt
from fastapi import HTTPException, Request
from fastapi.security import HTTPBearer, OAuth2PasswordBearer
from limits import RateLimitItem, parse, storage, strategies
from limits.aio import strategies as asyncio_strategies

SECRET = os.environ.get("JWT_SECRET") or os.environ.get("BETTER_AUTH_SECRET") or ""
JWKS_URL = os.environ.get("JWT_JWKS_URL") or ""
ISSUER = os.environ.get("JWT_ISSUER") or None
AUDIENCE = os.environ.get("JWT_AUDIENCE") or None
USER_CLAIM = os.environ.get("JWT_USER_CLAIM") or "sub"
ACCOUNTS = bool(SECRET) and os.environ.get("ACCOUNTS") != "off"
RATE_LIMIT = os.environ.get("RATE_LIMIT", "600/minute")
RATE_LIMIT_STORAGE_URI = os.environ.get("RATE_LIMIT_STORAGE_URI") or ""

MIN_SECRET = 32  # bytes: RFC 7518 section 3.2 wants a key no shorter than the hash
MAX_TOKEN = 8192  # bytes: no issuer comes near; a longer one is refused unread
MAX_USER_ID = 255  # characters, as in schema.sql
ASYMMETRIC = ("EdDSA", "ES256", "RS256")
CLOCK_SKEW = 10  # seconds an issuer's clock may be ahead (iat, nbf); exp has no grace
TOKEN_LIFETIME = 86_400  # seconds: a token cannot be taken back, so it lives for a day
REMEMBER = 60  # seconds for which a verified token is looked up (1 us), not verified again (34-136 us)
MAX_REMEMBERED = 10_000  # tokens, 260 bytes each
JWKS_LIFETIME = 600  # seconds until keys are fetched anew, behind the requests' backs
JWKS_PAUSE = 5  # seconds between two fetches: invented kids cannot make us flood the issuer
BCRYPT_COST = 12  # 0.24 s
MAX_COUNTERS = 50_000  # of the limiter, some 20 MB; invented e-mails and addresses could fill the memory
MAX_PASSWORD = 72  # bytes: bcrypt reads no further
HASHING = anyio.CapacityLimiter(2)  # passwords hashed at a time, each in a thread
MAX_HASHING = 20  # passwords that may wait for that: 2.4 s
PER_ACCOUNT = parse("10/minute")  # logins
PER_ADDRESS = parse("100/minute")  # logins and registrations

COMPACT = re.compile(r"[\w-]+\.[\w-]+\.[\w-]+", re.ASCII)  # RFC 7515 section 7.1: no padding, which PyJWT lets pass
log = logging.getLogger("todo.auth")


def check_settings() -> None:
    """Raises SystemExit with one line that names the setting that is missing or wrong."""
    if not SECRET and not JWKS_URL:
        raise SystemExit("JWT_SECRET is not set, nor JWT_JWKS_URL: no token could be verified")
    if SECRET and len(SECRET.encode()) < MIN_SECRET:
        name = "JWT_SECRET" if os.environ.get("JWT_SECRET") else "BETTER_AUTH_SECRET"
        raise SystemExit(f"{name} is shorter than {MIN_SECRET} bytes: `openssl rand -base64 32` makes a good one")
    if JWKS_URL and not JWKS_URL.startswith(("https://", "http://")):
        raise SystemExit("JWT_JWKS_URL is not an http or https URL")
    if os.environ.get("ACCOUNTS", "") not in ("", "on", "off"):
        raise SystemExit("ACCOUNTS is neither on nor off")
    try:
        limiter.open()
    except Exception as error:
        raise SystemExit(f"RATE_LIMIT or RATE_LIMIT_STORAGE_URI is not valid: {type(error).__name__}") from None


class Unauthorized(HTTPException):
    """401 and its challenge (RFC 6750 section 3): without an error code when no token came."""

    def __init__(self, code: str = "invalid_token", hint: str = "") -> None:
        challenge = 'Bearer realm="todo"'
        challenge += ', error="invalid_token"' if code not in ("not_authenticated", "wrong_credentials") else ""
        challenge += f', error_description="{hint}"' if hint else ""
        super().__init__(401, "Could not validate credentials", {"WWW-Authenticate": challenge})
        self.code, self.hint = code, hint


class TooManyRequests(HTTPException):
    """429 with Retry-After, and the fields of draft-ietf-httpapi-ratelimit-headers-10."""

    def __init__(self, name: str, limit: RateLimitItem, wait: int) -> None:
        headers = {
            "Retry-After": str(wait),
            "RateLimit-Policy": f'"{name}";q={limit.amount};w={limit.get_expiry()}',
            "RateLimit": f'"{name}";r=0;t={wait}',
        }
        super().__init__(429, "Too many requests", headers)


class Limiter:
    """Counts requests with the limits library: in this process, or in Redis for all instances together."""

    def open(self) -> None:
        """Raises whatever limits finds wrong with RATE_LIMIT or RATE_LIMIT_STORAGE_URI."""
        self.user_limit = parse(RATE_LIMIT) if RATE_LIMIT else None
        self.paused_until = self.next_sweep = 0.0
        self.memory = storage.MemoryStorage()
        # It would start a thread every 10 ms to look for expired counters among all; sweep() does once a minute.
        self.memory.timer.cancel()
        self.memory.timer = SimpleNamespace(is_alive=lambda: True)  # type: ignore[assignment]
        self.strategy: Any = strategies.FixedWindowRateLimiter(self.memory)
        if RATE_LIMIT_STORAGE_URI:
            shared = storage.storage_from_string("async+" + RATE_LIMIT_STORAGE_URI, implementation="redispy")
            self.strategy = asyncio_strategies.FixedWindowRateLimiter(shared)

    def sweep(self) -> None:
        self.next_sweep = monotonic() + 60
        for key, expiry in list(self.memory.expirations.items()):
            if expiry < time():
                self.memory.clear(key)
        if len(self.memory.expirations) > MAX_COUNTERS:
            self.memory.reset()

    async def hit(self, name: str, limit: RateLimitItem, key: str) -> None:
        """Counts one request. Raises TooManyRequests above the limit, and nothing while Redis is out of reach."""
        now = monotonic()
        if now < self.paused_until:
            return
        if now > self.next_sweep or len(self.memory.expirations) > MAX_COUNTERS:
            self.sweep()
        try:
            allowed = self.strategy.hit(limit, name, key)
            if isawaitable(allowed):
                allowed = await asyncio.wait_for(allowed, 1)
            if allowed:
                return
            stats = self.strategy.get_window_stats(limit, name, key)
            reset, _ = await asyncio.wait_for(stats, 1) if isawaitable(stats) else stats
        except Exception as error:
            log.warning("rate limit storage failed: %s", type(error).__name__)
            self.paused_until = now + 5
            return
        raise TooManyRequests(name, limit, max(1, round(reset - time())))


limiter = Limiter()


class KeySet:
    """The public keys behind JWT_JWKS_URL (RFC 7517). Keys once fetched stay when the issuer is down."""

    def __init__(self) -> None:
        self.keys: list[jwt.PyJWK] = []
        self.fetched = self.tried = float("-inf")
        self.fetching: asyncio.Task[None] | None = None

    async def find(self, kid: object, alg: str) -> jwt.PyJWK:
        """The key a token names, or the only one for its algorithm. Raises PyJWKError when there is none."""
        key = self._known(kid, alg)
        stale = key is None or monotonic() - self.fetched > JWKS_LIFETIME
        if stale and monotonic() - self.tried > JWKS_PAUSE:
            self.tried = monotonic()
            self.fetching = asyncio.create_task(self._fetch())
        if key is None and self.fetching:
            await asyncio.wait([self.fetching])
            key = self._known(kid, alg)
        if key is None:
            raise jwt.PyJWKError
        return key

    def _known(self, kid: object, alg: str) -> jwt.PyJWK | None:
        keys = [key for key in self.keys if key.algorithm_name == alg and kid in (None, key.key_id)]
        return keys[0] if len(keys) == 1 else None

    async def _fetch(self) -> None:
        try:
            async with asyncio.timeout(JWKS_PAUSE):
                document = json.loads(await asyncio.to_thread(self._download))
            keys = [key for jwk in document["keys"] if (key := self._usable(jwk))]
            self.keys, self.fetched = keys or self.keys, monotonic()  # an empty set is an issuer's mishap
        except Exception as error:
            log.warning("JWKS not fetched: %s", type(error).__name__)

    @staticmethod
    def _download() -> bytes:
        # Some issuers stand behind a filter that refuses Python's own User-Agent.
        request = urllib.request.Request(JWKS_URL, headers={"User-Agent": "todo"})  # noqa: S310  # http(s), checked
        with urllib.request.urlopen(request, timeout=JWKS_PAUSE) as response:  # noqa: S310
            return bytes(response.read(1 << 18))

    @staticmethod
    def _usable(jwk: Any) -> jwt.PyJWK | None:
        try:
            key = jwt.PyJWK.from_dict(jwk)
        except Exception:  # one key of a kind we do not know must not cost us the others
            return None
        return key if key.algorithm_name in ASYMMETRIC and key.public_key_use in (None, "sig") else None


key_set = KeySet()


async def verify(token: str) -> tuple[str, float]:
    """The user id and the expiry (seconds since 1970) of a JWT. Raises Unauthorized."""
    if token.count(".") != 2:
        raise Unauthorized("token_not_jwt", "not a JWT: an opaque session token has to be exchanged for one")
    if len(token) > MAX_TOKEN or not COMPACT.fullmatch(token):
        raise Unauthorized
    try:
        header = jwt.get_unverified_header(token)
        alg = header.get("alg")
        if alg == "HS256" and SECRET:
            key: str | jwt.PyJWK = SECRET
        elif alg in ASYMMETRIC and JWKS_URL:
            key = await key_set.find(header.get("kid"), alg)
        else:
            raise Unauthorized
        options: Any = {"require": ["exp", USER_CLAIM], "verify_aud": AUDIENCE is not None}
        claims = jwt.decode(token, key, [alg], options=options, issuer=ISSUER, audience=AUDIENCE, leeway=CLOCK_SKEW)
    except jwt.ExpiredSignatureError:
        raise Unauthorized("token_expired", "the token has expired") from None
    except jwt.PyJWTError:
        raise Unauthorized from None
    user_id, exp = claims[USER_CLAIM], claims["exp"]
    if not isinstance(user_id, str) or not 1 <= len(user_id) <= MAX_USER_ID or not user_id.isprintable():
        raise Unauthorized
    if type(exp) not in (int, float):  # true is an int to isinstance
        raise Unauthorized
    if exp <= time():  # jwt.decode allowed it CLOCK_SKEW more
        raise Unauthorized("token_expired", "the token has expired")
    return user_id, exp


verified: dict[bytes, tuple[str, float]] = {}  # by the token's SHA-256: the user id, and until when to trust that


def recall(headers: dict[bytes, bytes]) -> str | None:
    """The user whose token was verified in the last REMEMBER seconds and has not expired."""
    scheme, _, token = headers.get(b"authorization", b"").partition(b" ")
    user_id, until = verified.get(hashlib.sha256(token).digest(), (None, 0.0))
    return user_id if time() < until and scheme.lower() == b"bearer" else None


class CurrentUser(OAuth2PasswordBearer):
    """The dependency of every protected route: the id of the user whose token came, counted by the limiter.

    The request's state has it already where recall() knew the token. Raises Unauthorized and TooManyRequests.
    """

    async def __call__(self, request: Request) -> str:  # type: ignore[override]  # the user, not the token
        user_id: str = request.state.user_id or await self.identify(request)
        if limiter.user_limit:
            await limiter.hit("user", limiter.user_limit, user_id)
        return user_id

    async def identify(self, request: Request) -> str:
        credentials = request.headers.getlist("authorization")
        if not credentials:
            raise Unauthorized("not_authenticated")
        scheme, _, token = credentials[0].partition(" ")
        if len(credentials) > 1 or scheme.lower() != "bearer":
            raise Unauthorized
        user_id, exp = await verify(token)
        if len(verified) >= MAX_REMEMBERED:
            del verified[next(iter(verified))]
        verified[hashlib.sha256(token.encode()).digest()] = user_id, min(exp, time() + REMEMBER)
        request.state.user_id = user_id
        return user_id


current_user = CurrentUser(
    tokenUrl="auth/token",
    refreshUrl="auth/token",
    description="A JWT, verified as RFC8725 asks. It lives for a day and cannot be refreshed: log in again.",
)
if not ACCOUNTS:  # for the OpenAPI document: the tokens come from somebody else
    current_user.model = HTTPBearer(bearerFormat="JWT", description="A JWT, verified as RFC8725 asks.").model


def issue_token(user_id: str) -> tuple[str, int]:
    """An HS256 JWT for a user of ours, and its lifetime in seconds."""
    now = int(time())
    claims = {"sub": user_id, USER_CLAIM: user_id, "iat": now, "exp": now + TOKEN_LIFETIME}
    claims |= {name: value for name, value in (("iss", ISSUER), ("aud", AUDIENCE)) if value}
    return jwt.encode(claims, SECRET, "HS256"), TOKEN_LIFETIME


async def throttle(request: Request, email: str) -> None:
    """Counts an attempt to log in or register, before anything is hashed. Raises TooManyRequests."""
    await limiter.hit("address", PER_ADDRESS, request.client.host if request.client else "")
    await limiter.hit("account", PER_ACCOUNT, email.lower())
    if HASHING.statistics().tasks_waiting >= MAX_HASHING:
        raise HTTPException(503, "Too many logins at once", {"Retry-After": "3"})


async def hash_password(password: str) -> str:
    """The bcrypt hash of a password of at most MAX_PASSWORD bytes."""
    salt = bcrypt.gensalt(BCRYPT_COST)
    return (await anyio.to_thread.run_sync(bcrypt.hashpw, password.encode(), salt, limiter=HASHING)).decode()


# Compared with when there is no account: a wrong e-mail takes as long as a wrong password.
NO_ACCOUNT = b"$2b$12$" + b"." * 53


async def check_password(password: str, password_hash: bytes | None) -> bool:
    """Whether the password is the one hashed; never, but no sooner, without a hash."""
    encoded = password.encode()
    matches = await anyio.to_thread.run_sync(
        bcrypt.checkpw, encoded[:MAX_PASSWORD], password_hash or NO_ACCOUNT, limiter=HASHING
    )
    return matches and password_hash is not None and len(encoded) <= MAX_PASSWORD
