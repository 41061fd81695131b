"""Speaks identity: policy, tokens, the user of a request, and passwords.

No key serves two algorithms, so no token can choose how a key is used (RFC 8725 section 3.1): HS256
takes only the secret, the others only the keys behind JWT_JWKS_URL.
"""

import hashlib
import re
from time import time
from typing import Any, Literal, NamedTuple

import jwt
from fastapi import Request
from fastapi.security import HTTPBearer, OAuth2PasswordBearer

from lib.jwks import KeySet
from lib.passwords import Passwords
from lib.problems import Unauthorized
from lib.ratelimit import RateLimiter, parse_limit
from lib.settings import BaseSettings
from lib.state import state_of


class Settings(BaseSettings):
    jwt_secret: str = ""
    better_auth_secret: str = ""
    jwt_jwks_url: str = ""
    jwt_issuer: str | None = None
    jwt_audience: str | None = None
    jwt_user_claim: str = "sub"
    accounts: Literal["on", "off"] | None = None
    rate_limit: str = "600/minute"
    rate_limit_storage_uri: str = ""


settings = Settings.load()
SECRET = settings.jwt_secret or settings.better_auth_secret
JWKS_URL, USER_CLAIM = settings.jwt_jwks_url, settings.jwt_user_claim
ISSUER, AUDIENCE = settings.jwt_issuer, settings.jwt_audience
# Not with BETTER_AUTH_SECRET: the frontend would take tokens we issue for its own.
ACCOUNTS = bool(settings.jwt_secret) and settings.accounts != "off"

MIN_SECRET = 32  # bytes: RFC 7518 section 3.2 wants a key no shorter than the hash
ALGORITHMS = ("EdDSA", "ES256", "RS256")  # of JWT_JWKS_URL
MAX_TOKEN = 8192  # bytes: a longer token is refused unread
MAX_USER_ID = 255  # characters, as in schema.sql
CLOCK_SKEW = 10  # seconds that an issuer's clock may be ahead (iat, nbf); exp gets none
TOKEN_LIFETIME = 86_400  # seconds: nobody can take a token back, so it ends after a day
TOKEN_CACHE_TTL = 60  # seconds: to look a token up takes 1 us, to verify it 34 to 136
TOKEN_CACHE_SIZE = 10_000  # tokens, of 260 bytes each
MIN_PASSWORD, MAX_PASSWORD = 8, 72  # bytes: bcrypt reads no further
BCRYPT_COST = 12  # 0.24 s of a core
MAX_HASHING, MAX_HASHING_QUEUE = 2, 20  # passwords at a time, and those that wait: for 2.4 s
USER_LIMIT = parse_limit("" if settings.rate_limit == "off" else settings.rate_limit, "RATE_LIMIT")
ACCOUNT_LIMIT = parse_limit("10/minute")  # logins and registrations with one e-mail
ADDRESS_LIMIT = parse_limit("100/minute")  # logins and registrations from one IP address

COMPACT_JWS = re.compile(r"[\w-]+\.[\w-]+\.[\w-]+", re.ASCII)  # RFC 7515 section 7.1: no padding
UUID_V7 = re.compile(r"[0-9a-f-]{14}7[0-9a-f-]{21}")  # as accounts have

limiter = RateLimiter(settings.rate_limit_storage_uri)
key_set = KeySet(JWKS_URL, ALGORITHMS)
passwords = Passwords(BCRYPT_COST, MAX_HASHING, MAX_HASHING_QUEUE)


def check_settings() -> None:
    """Raises SystemExit with one line that names the setting that is missing or wrong."""
    if not SECRET and not JWKS_URL:
        raise SystemExit("JWT_SECRET, BETTER_AUTH_SECRET or JWT_JWKS_URL has to be set")
    if SECRET and len(SECRET.encode()) < MIN_SECRET:
        name = "JWT_SECRET" if settings.jwt_secret else "BETTER_AUTH_SECRET"
        raise SystemExit(f"{name} is shorter than 32 bytes: `openssl rand -base64 32` makes one")
    if JWKS_URL and not re.match(r"https?://[^/\s]", JWKS_URL):
        raise SystemExit("JWT_JWKS_URL is not an http or https URL")
    if USER_CLAIM in {"exp", "iat", "nbf", "iss", "aud", "jti"}:
        raise SystemExit("JWT_USER_CLAIM names a claim that holds no user")
    if settings.accounts == "on" and not settings.jwt_secret:
        raise SystemExit("ACCOUNTS is on, and JWT_SECRET is not set")


# Tokens.


class VerifiedToken(NamedTuple):
    """A token's user, and when it must be verified again, in seconds since 1970."""

    user_id: str
    until: float


verified: dict[bytes, VerifiedToken] = {}  # by the SHA-256 of the token


async def verify_once(token: str) -> str:
    """The user id of a JWT, which is verified anew after TOKEN_CACHE_TTL. Raises Unauthorized."""
    digest, now = hashlib.sha256(token.encode()).digest(), time()
    known = verified.get(digest)
    if known is None or known.until <= now:
        user_id, expires = read_claims(await verify(token))
        known = VerifiedToken(user_id, min(expires, now + TOKEN_CACHE_TTL))
        if len(verified) >= TOKEN_CACHE_SIZE:
            del verified[next(iter(verified))]  # the first seen
        verified[digest] = known
    return known.user_id


async def verify(token: str) -> dict[str, Any]:
    """The claims of a JWT of the right signer, issuer, audience and time. Raises Unauthorized."""
    if token.count(".") != 2:
        text = "not a JWT: an opaque session token has to be exchanged for one"
        raise Unauthorized("token_not_jwt", text)
    if len(token) > MAX_TOKEN or not COMPACT_JWS.fullmatch(token):
        raise Unauthorized
    options: Any = {"require": ["exp", USER_CLAIM], "verify_aud": AUDIENCE is not None}
    rules: Any = {"issuer": ISSUER, "audience": AUDIENCE, "leeway": CLOCK_SKEW}
    try:
        alg, key = await find_key(jwt.get_unverified_header(token))
        claims: dict[str, Any] = jwt.decode(token, key, [alg], options=options, **rules)
    except jwt.ExpiredSignatureError:
        raise Unauthorized("token_expired", "the token has expired") from None
    except jwt.MissingRequiredClaimError as error:
        raise Unauthorized(description=f"the token has no claim {error.claim}") from None
    except jwt.InvalidIssuerError:
        raise Unauthorized(description="the token is of another issuer") from None
    except jwt.InvalidAudienceError:
        raise Unauthorized(description="the token is for another audience") from None
    except jwt.PyJWTError:
        raise Unauthorized from None
    if alg != "HS256" and is_account_id(str(claims[USER_CLAIM])):
        raise Unauthorized(description="an outside user may not have an account's id")
    return claims


async def find_key(header: dict[str, Any]) -> tuple[str, Any]:
    """The algorithm of a token, and the key that verifies its signature."""
    alg = header.get("alg")
    if alg == "HS256" and SECRET:
        return alg, SECRET
    key = await key_set.find(header.get("kid"), alg) if alg in ALGORITHMS and JWKS_URL else None
    if key is None:
        raise Unauthorized
    return str(alg), key


def read_claims(claims: dict[str, Any]) -> tuple[str, float]:
    """The user id and the expiry. PyJWT has checked that they are there, and not their types."""
    user_id, exp = claims[USER_CLAIM], claims["exp"]
    if not isinstance(user_id, str) or not 1 <= len(user_id) <= MAX_USER_ID:
        text = f"the claim {USER_CLAIM} is not a text of 1 to {MAX_USER_ID} characters"
        raise Unauthorized(description=text)
    if not user_id.isprintable() or type(exp) not in (int, float):  # True is an int
        raise Unauthorized
    if exp <= time():  # jwt.decode() allowed it CLOCK_SKEW more
        raise Unauthorized("token_expired", "the token has expired")
    return user_id, exp


def is_account_id(user_id: str) -> bool:
    """Whether an account may have this id (a UUIDv7). No outside token may name one."""
    return ACCOUNTS and bool(UUID_V7.fullmatch(user_id))


def issue_token(user_id: str) -> str:
    """An HS256 JWT for an account, good for TOKEN_LIFETIME."""
    now = int(time())
    claims = {"sub": user_id, USER_CLAIM: user_id, "iat": now, "exp": now + TOKEN_LIFETIME}
    claims |= {name: value for name, value in (("iss", ISSUER), ("aud", AUDIENCE)) if value}
    return jwt.encode(claims, SECRET, "HS256")


# The user of a request.


class UserFromToken(OAuth2PasswordBearer):
    """The dependency that gives the user id. Its base class is for OpenAPI alone.

    Raises Unauthorized, and HTTPProblem(429) for a user above USER_LIMIT.
    """

    async def __call__(self, request: Request) -> str:  # type: ignore[override]  # never None
        sent = [value for name, value in request.scope["headers"] if name == b"authorization"]
        if not sent:
            raise Unauthorized("not_authenticated")
        scheme, _, token = sent[0].decode("latin-1").partition(" ")
        if len(sent) > 1 or scheme.lower() != "bearer":
            raise Unauthorized
        user_id = state_of(request.scope).user_id = await verify_once(token)
        await limiter.hit("user", USER_LIMIT, user_id)
        return user_id


current_user = UserFromToken(tokenUrl="auth/token", description="A JWT (RFC8725) for a day.")
if not ACCOUNTS:  # OpenAPI says that the tokens come from somebody else
    current_user.model = HTTPBearer(bearerFormat="JWT", description="A JWT (RFC8725).").model


# Passwords.


def normal_email(email: str) -> str:
    """The one spelling by which an e-mail is stored, found and counted."""
    return email.lower()


def check_length(password: str) -> str:
    """Raises ValueError for a password that is too short, or that bcrypt would cut."""
    if not MIN_PASSWORD <= len(password.encode()) <= MAX_PASSWORD:
        raise ValueError
    return password


async def throttle(request: Request, email: str) -> None:
    """Counts an attempt to log in or register, before anything is hashed. Raises HTTPProblem."""
    address = request.client.host if request.client else ""  # by --proxy-headers
    await limiter.hit("address", ADDRESS_LIMIT, address)
    await limiter.hit("account", ACCOUNT_LIMIT, email)
    passwords.refuse_if_busy()
