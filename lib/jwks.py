"""The public keys of an issuer of tokens, from a URL (RFC 7517).

keys = KeySet("https://example.com/api/auth/jwks", algorithms=("EdDSA", "ES256"))
key = await keys.find(kid="2026-11", alg="EdDSA")
"""

import asyncio
import logging
import urllib.request
from collections.abc import Collection
from time import monotonic

import anyio.to_thread
import jwt

LIFETIME = 600  # seconds until keys are fetched anew, while requests use the old ones
MAX_AGE = 2 * LIFETIME  # seconds until requests wait for that: a revoked key ends here
MIN_INTERVAL = 5  # seconds between two fetches: invented kids cannot make us flood the issuer
TIMEOUT = 5  # seconds for a fetch
MAX_SIZE = 262_144  # bytes of a key set

log = logging.getLogger("jwks")


class KeySet:
    """Keys that were fetched once stay while the issuer is down."""

    def __init__(self, url: str, algorithms: Collection[str]) -> None:
        self.url, self.algorithms = url, algorithms
        self.keys: list[jwt.PyJWK] = []
        self.fetched = self.tried = float("-inf")
        self.fetching: asyncio.Task[None] | None = None

    async def find(self, kid: object, alg: str) -> jwt.PyJWK | None:
        """The key that a token names, or the only one for its algorithm; None if there is none."""
        key, now = self.get(kid, alg), monotonic()
        if (key is None or now - self.fetched > LIFETIME) and now - self.tried > MIN_INTERVAL:
            self.tried = now
            self.fetching = asyncio.create_task(self.fetch())
        if self.fetching and (key is None or now - self.fetched > MAX_AGE):
            await asyncio.wait([self.fetching])
            key = self.get(kid, alg)
        return key

    def get(self, kid: object, alg: str) -> jwt.PyJWK | None:
        keys = [key for key in self.keys if key.algorithm_name == alg and kid in (None, key.key_id)]
        return keys[0] if len(keys) == 1 else None

    def is_usable(self, key: jwt.PyJWK) -> bool:
        return key.algorithm_name in self.algorithms and key.public_key_use in (None, "sig")

    async def fetch(self) -> None:
        """In a thread that is left alone after TIMEOUT: an issuer cannot hold up the next fetch."""
        try:
            async with asyncio.timeout(TIMEOUT):
                body = await anyio.to_thread.run_sync(self.download, abandon_on_cancel=True)
            keys = [key for key in jwt.PyJWKSet.from_json(body.decode()) if self.is_usable(key)]
            self.keys, self.fetched = keys or self.keys, monotonic()  # an empty set is a mishap
        except Exception as error:
            log.warning("JWKS not fetched: %s", type(error).__name__)

    def download(self) -> bytes:
        """Raises TimeoutError for a body that is too large, or not there in time."""
        give_up, body = monotonic() + TIMEOUT, b""
        # Some issuers stand behind a filter that refuses Python's own User-Agent.
        request = urllib.request.Request(self.url, headers={"User-Agent": "jwks"})  # noqa: S310
        with urllib.request.urlopen(request, timeout=TIMEOUT) as response:  # noqa: S310
            while part := response.read1(MAX_SIZE):
                body += part
                if monotonic() > give_up or len(body) > MAX_SIZE:
                    raise TimeoutError
        return body
