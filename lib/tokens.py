"""Verifies JWTs (RFC 7519): the signature first, and then what the claims say.

verifier = TokenVerifier(secret=..., key_set=..., issuer="https://app.example", ...)
verified = await verifier.verify(token)  # Verified(user_id, expires, by_jwks); raises Unauthorized
"""

import re
from dataclasses import dataclass
from time import time
from typing import Any, NamedTuple

import jwt

from lib.jwks import KeySet
from lib.problems import Unauthorized

CLAIMS = ("exp", "nbf", "iat", "iss", "aud", "sub", "jti")  # PyJWT would take "1" for a time
OPTIONS: Any = {f"verify_{name}": False for name in CLAIMS}
OPTIONS["enforce_minimum_key_length"] = True  # of RSA 2048 bits: RFC 7518 section 3.3
COMPACT_JWS = re.compile(r"[\w-]+\.[\w-]+\.[\w-]+", re.ASCII)  # RFC 7515 section 7.1: no padding


class Verified(NamedTuple):
    """What a good token says."""

    user_id: str
    expires: float  # seconds since 1970
    by_jwks: bool  # whether the issuer's keys verified it, and not the secret


@dataclass(kw_only=True, repr=False)  # it would show the secret
class TokenVerifier:
    """HS256 meets the secret alone, and every other algorithm the keys of the issuer alone."""

    secret: str
    key_set: KeySet
    issuer: str  # the `iss` that a token has to have; "" for any
    audience: str  # what its `aud` has to be or hold; "" for any
    user_claim: str  # which holds the user id
    max_token: int  # bytes
    max_user_id: int  # characters
    clock_skew: int  # seconds that the issuer's clock may be ahead

    async def verify(self, token: str) -> Verified:
        """Raises Unauthorized, which says which claim is wrong, but not why a signature is.

        Raises HTTPProblem(503) while the issuer's keys are out of reach.
        """
        if token.count(".") != 2:
            text = "not a signed JWT: an opaque session token has to be exchanged for one"
            raise Unauthorized(code="token_not_jwt", description=text)
        if len(token) > self.max_token or not COMPACT_JWS.fullmatch(token):
            raise Unauthorized(reason="not a JWT, or too long")
        try:
            header = jwt.get_unverified_header(token)
            alg, kid = str(header.get("alg")), header.get("kid")
            if alg == "HS256" and self.secret:
                return Verified(*self.read(decode(token, alg, self.secret)), by_jwks=False)
            claims = await self.decode_by_issuer(token, alg, kid)
            return Verified(*self.read(claims), by_jwks=True)
        except jwt.PyJWTError as error:
            raise Unauthorized(reason=str(error)[:100]) from None

    async def decode_by_issuer(self, token: str, alg: str, kid: str | None) -> dict[str, Any]:
        """Tries the known keys that fit, and then those that have replaced them, if any."""
        tried: list[Any] = []
        error: jwt.PyJWTError = jwt.InvalidKeyError(f"no key for {alg:.16}, or none with its kid")
        while keys := await self.key_set.find(kid, alg, tried=tried):
            for key in keys:
                try:
                    return decode(token, alg, key)
                except (jwt.InvalidSignatureError, jwt.InvalidKeyError) as refusal:
                    error = refusal
            tried += keys
        raise error

    def read(self, claims: dict[str, Any]) -> tuple[str, float]:
        """The user id and the expiry. Raises Unauthorized that names the first wrong claim."""
        if wrong := self.wrong_claim(claims):
            raise Unauthorized(description=wrong)
        if claims["exp"] <= time():
            raise Unauthorized(code="token_expired", description="the token has expired")
        return claims[self.user_claim], claims["exp"]

    def wrong_claim(self, claims: dict[str, Any]) -> str:
        """What is wrong with a claim, apart from an `exp` that is over; "" for nothing."""
        latest, size = time() + self.clock_skew, self.max_user_id
        for name in ("exp", self.user_claim, self.issuer and "iss", self.audience and "aud"):
            if name and claims.get(name) is None:
                return f"the token has no claim {name}"
        for name in ("exp", "nbf", "iat"):
            if (value := claims.get(name)) is None:
                continue
            # True is an int. JavaScript's milliseconds would make a token good for 50,000 years.
            if type(value) not in (int, float) or not 0 <= value < 1e12:
                return f"the claim {name} is not a number of seconds since 1970"
            if name != "exp" and value > latest:
                return f"the claim {name} is in the future"
        if self.issuer and claims["iss"] != self.issuer:
            return "the token is of another issuer"
        aud = claims.get("aud")
        if self.audience and self.audience not in (aud if isinstance(aud, list) else [aud]):
            return "the token is for another audience"
        user_id = claims[self.user_claim]
        if isinstance(user_id, str) and user_id.isprintable() and 1 <= len(user_id) <= size:
            return ""
        return f"the claim {self.user_claim} is not a text of 1 to {size} printable characters"


def decode(token: str, alg: str, key: Any) -> dict[str, Any]:
    """The claims of a token that this key has signed. Raises jwt.PyJWTError."""
    return jwt.decode(token, key, [alg], options=OPTIONS)
