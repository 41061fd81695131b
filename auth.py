"""Identity: settings, tokens, the user of a request, and limits on login attempts.

No key serves two algorithms, so no token can choose how a key is used (RFC 8725 section 3.1): HS256
takes only the secret, the others only the keys behind JWT_JWKS_URL.
"""

import hashlib
import re
from time import time
from typing import Annotated, Literal

import jwt
from fastapi import Request
from fastapi.security import HTTPBearer, OAuth2PasswordBearer
from fastapi.security.base import SecurityBase

from lib.jwks import KeySet
from lib.passwords import Passwords
from lib.problems import Unauthorized
from lib.ratelimit import LIMIT, RateLimiter, networks, parse_limit
from lib.settings import HOST, BaseSettings, Secret, form
from lib.state import state_of
from lib.tokens import TokenVerifier

ALGORITHMS = ("EdDSA", "ES256", "RS256")  # of JWT_JWKS_URL
MAX_TOKEN = 8192  # bytes: a longer token is not read
MAX_USER_ID = 255  # characters, as in schema.sql
CLOCK_SKEW = 10  # seconds that an issuer's clock may be ahead (iat, nbf); exp is exact
TOKEN_LIFETIME = 86_400  # seconds: nobody can take a token back, so it ends after a day
TOKEN_CACHE_TTL = 60  # seconds: to look it up takes 1 us, to verify it 34 to 136
TOKEN_CACHE_SIZE = 10_000  # tokens, of 260 bytes each
BCRYPT_COST = 12  # 0.24 s of a core
MAX_HASHING, MAX_HASHING_QUEUE = 2, 20  # at once, and waiting: for 2.4 s at most
ACCOUNT_LIMIT = parse_limit("10/minute")  # attempts with one e-mail
ADDRESS_LIMIT = parse_limit("100/minute")  # per IPv4 or IPv6 /64; per wider network when crowded
# form() refuses what does not match, such as `a,b` for a NAME or `exp` for a CLAIM.
URL, REDIS = rf"https?://(?![^/]*@){HOST}(/\S*)?", rf"rediss?://{HOST}(/\d*)?(\?\S*)?"
NAME, CLAIM = r"(?!https?:/*$)[^\s,]+", r"(?!(exp|iat|nbf|iss|aud|jti)$)[\w:/.~-]+"
UUID_V7 = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-7[0-9a-f]{3}-[0-9a-f]{4}-[0-9a-f]{12}")


class Settings(BaseSettings):
    jwt_secret: Secret = ""  # signs and verifies HS256 tokens; with it there are accounts
    better_auth_secret: Secret = ""  # verifies them where jwt_secret is not set
    # The URL of an issuer's keys. `iss` and `aud`, if set, are required of every token.
    jwt_jwks_url: Annotated[str, form(URL, "is not an http or https URL without a user")] = ""
    jwt_issuer: Annotated[str, form(NAME, "is not a single `iss`")] = ""
    jwt_audience: Annotated[str, form(NAME, "is not a single `aud`")] = ""
    jwt_user_claim: Annotated[str, form(CLAIM, "cannot name the user")] = "sub"
    accounts: Literal["on", "off"] | None = None  # None: on if jwt_secret is set; off: verify only
    # Requests of one user, or `off` for any number, and a Redis that counts for several instances.
    rate_limit: Annotated[str, form(rf"{LIMIT}|off", "is not like 600/minute")] = "600/minute"
    rate_limit_storage_uri: Annotated[str, form(REDIS, "is not like redis://host")] = ""


settings = Settings.load()
SECRET = settings.jwt_secret or settings.better_auth_secret
JWKS_URL, USER_CLAIM = settings.jwt_jwks_url, settings.jwt_user_claim
ISSUER, AUDIENCE = settings.jwt_issuer, settings.jwt_audience
# Not with BETTER_AUTH_SECRET alone: the frontend would take our tokens for its own.
ACCOUNTS = bool(settings.jwt_secret) and settings.accounts != "off"
USER_LIMIT = None if settings.rate_limit == "off" else parse_limit(settings.rate_limit)

limiter = RateLimiter(settings.rate_limit_storage_uri)
verifier = TokenVerifier(
    secret=SECRET, key_set=KeySet(JWKS_URL, ALGORITHMS), issuer=ISSUER, audience=AUDIENCE,
    user_claim=USER_CLAIM, max_token=MAX_TOKEN, max_user_id=MAX_USER_ID, clock_skew=CLOCK_SKEW,
)  # fmt: skip
passwords = Passwords(BCRYPT_COST, MAX_HASHING, MAX_HASHING_QUEUE)


def check_settings() -> None:
    """Raises SystemExit with one line that names what is missing."""
    if not SECRET and not JWKS_URL:
        raise SystemExit("JWT_SECRET, BETTER_AUTH_SECRET or JWT_JWKS_URL has to be set")
    if settings.accounts == "on" and not settings.jwt_secret:
        raise SystemExit("ACCOUNTS is on, but JWT_SECRET is not set")
    if JWKS_URL and not jwt.algorithms.has_crypto:
        raise SystemExit("JWT_JWKS_URL needs another package: pip install 'PyJWT[crypto]'")


# Tokens. An error's `description` goes into WWW-Authenticate, and `reason` into the log.

# By the SHA-256 of a token: its user, and the time() from which it is verified again.
verified: dict[bytes, tuple[str, float]] = {}


async def user_of(token: str) -> str:
    """The user id of a JWT, verified again after TOKEN_CACHE_TTL. Raises as verifier.verify()."""
    digest, now = hashlib.sha256(token.encode()).digest(), time()
    user_id, until = verified.get(digest, ("", 0.0))
    if until <= now:
        user_id, expires, by_jwks = await verifier.verify(token)
        if by_jwks and is_account_id(user_id):
            raise Unauthorized(description="an outside user may not have an account's id")
        if digest not in verified and len(verified) >= TOKEN_CACHE_SIZE:
            del verified[next(iter(verified))]  # the first seen
        verified[digest] = user_id, min(expires, now + TOKEN_CACHE_TTL)
    return user_id


def is_account_id(user_id: str) -> bool:
    """Whether an account may have this id (a UUIDv7). No outside token may name one."""
    return ACCOUNTS and bool(UUID_V7.fullmatch(user_id))


def issue_token(user_id: str) -> str:
    """An HS256 JWT for an account, valid for TOKEN_LIFETIME, with the `iss` and `aud` if set."""
    now = int(time())
    claims = {"sub": user_id, USER_CLAIM: user_id, "iat": now, "exp": now + TOKEN_LIFETIME}
    claims |= {name: value for name, value in (("iss", ISSUER), ("aud", AUDIENCE)) if value}
    return jwt.encode(claims, SECRET, "HS256")


# The user of a request.


class BearerToken(SecurityBase):
    """The dependency that gives the user id of a request's token (RFC 6750 section 2.1).

    Raises what user_of() does, and HTTPProblem(429) for a user above USER_LIMIT.
    """

    def __init__(self, scheme: OAuth2PasswordBearer | HTTPBearer) -> None:
        """`scheme` is what OpenAPI shows."""
        self.scheme_name, self.model = type(self).__name__, scheme.model

    async def __call__(self, request: Request) -> str:
        state = state_of(request.scope)
        sent = state.headers.get(b"authorization")
        if sent is None:
            raise Unauthorized(code="not_authenticated")
        scheme, _, token = sent.decode("latin-1").partition(" ")
        if scheme.lower() != "bearer":
            raise Unauthorized(reason="not Authorization with Bearer")
        user_id = await user_of(token.lstrip(" "))  # after one space or more: RFC 9110 section 11.4
        state.user_id = user_id  # for the log and limits
        if USER_LIMIT:
            await limiter.hit("user", USER_LIMIT, user_id)
        return user_id


JWT = "A JWT (RFC 7519), checked as RFC8725 says."  # OpenAPI's linter wants "RFC8725"
current_user = BearerToken(
    OAuth2PasswordBearer(tokenUrl="auth/token", description=JWT)
    if ACCOUNTS
    else HTTPBearer(bearerFormat="JWT", description=JWT)
)


# Accounts.


async def throttle(request: Request, email: str) -> None:
    """Counts an attempt before anything is hashed. Raises HTTPProblem: 429, or 503 when busy."""
    await limiter.hit("address", ADDRESS_LIMIT, *networks(state_of(request.scope).client))
    await limiter.hit("account", ACCOUNT_LIMIT, email)
    passwords.refuse_if_busy()
