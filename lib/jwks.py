"""The public keys of an issuer of tokens, from a URL (RFC 7517).

keys = KeySet("https://example.com/api/auth/jwks", algorithms=("EdDSA", "ES256"))
key = await keys.find(kid="2026-11", alg="EdDSA")
"""

import asyncio
import concurrent.futures
import json
import logging
import threading
import urllib.request
from collections.abc import Collection
from contextlib import suppress
from time import monotonic
from urllib.error import HTTPError

import jwt

from lib.problems import RETRY, HTTPProblem

LIFETIME = 600  # seconds until keys are fetched again, while requests use the old ones
MAX_AGE = 2 * LIFETIME  # seconds until a request waits for that, and until an empty set counts
MIN_INTERVAL = 5  # seconds between two fetches: invented kids cannot make us flood the issuer
TIMEOUT = 5  # seconds for a fetch
PATIENCE = 1  # seconds that a token of a known key waits for a fetch
MAX_SIZE = 262_144  # bytes of a key set
SAME = {"Ed25519": "EdDSA", "ESP256": "ES256"}  # RFC 9864's names, unknown to PyJWT

if jwt.algorithms.has_crypto:
    for name, known in SAME.items():
        jwt.register_algorithm(name, jwt.get_algorithm_by_name(known))

log = logging.getLogger("jwks")


class KeySet:
    """The keys of one issuer. Those that were fetched once serve while the issuer is down."""

    def __init__(self, url: str, algorithms: Collection[str]) -> None:
        self.url, self.algorithms = url, algorithms
        self.keys: dict[tuple[str | None, str], jwt.PyJWK] = {}  # by kid and algorithm
        self.fetched = self.tried = float("-inf")
        self.fetching: asyncio.Task[None] | None = None
        self.failure = ""  # why the last fetch brought no set
        self.downloading: concurrent.futures.Future[bytes] | None = None
        self.started = 0.0  # when the download began, on the clock of time.monotonic()

    async def find(
        self, kid: str | None, alg: str, refused: jwt.PyJWK | None = None
    ) -> jwt.PyJWK | None:
        """The key that a token names, or without a kid the only one for its algorithm.

        None if the issuer has none. Raises HTTPProblem(503) if it cannot be asked. A key that was
        `refused`, because it did not verify the token, may have been replaced under its kid.
        """
        alg = SAME.get(alg, alg)
        if alg not in self.algorithms or not self.url:
            return None
        key, now = self.get(kid, alg, refused), monotonic()
        if (key is None or now - self.fetched > LIFETIME) and now - self.tried > MIN_INTERVAL:
            self.tried = now
            self.fetching = asyncio.create_task(self.fetch())
        if self.fetching and key is None:
            await asyncio.wait([self.fetching])
        elif self.fetching and now - self.fetched > MAX_AGE and not self.failure:
            # The key may have been taken back. While an issuer hangs, no second token waits here.
            done, _ = await asyncio.wait([self.fetching], timeout=PATIENCE)
            self.failure = self.failure if done else "no answer yet"
        key = self.get(kid, alg, refused)
        if key is None and self.failure and refused is None:
            text = "The issuer's keys are out of reach: try again later"
            raise HTTPProblem(503, text, "keys_unavailable", RETRY, reason=self.failure)
        return key

    def get(self, kid: str | None, alg: str, refused: jwt.PyJWK | None) -> jwt.PyJWK | None:
        """As find(), among the keys that are known."""
        keys = [self.keys[its] for its in self.keys if its[1] == alg and kid in (None, its[0])]
        return keys[0] if len(keys) == 1 and keys[0] is not refused else None

    async def fetch(self) -> None:
        """Replaces the keys. While an issuer does not answer, or not with a set, the old stay."""
        try:
            async with asyncio.timeout(TIMEOUT):
                body = await self.start_download()
            keys, self.failure = self.read(body), ""
        except Exception as error:
            self.failure = str(error)[:200] or f"no answer within {TIMEOUT} seconds"
            log.warning("JWKS not fetched: %s", self.failure)
            return
        if keys or monotonic() - self.fetched > MAX_AGE:  # an empty set may be a mishap
            self.keys, self.fetched = keys, monotonic()
        if not keys:
            log.warning("JWKS has no key for %s", ", ".join(self.algorithms))

    def start_download(self) -> asyncio.Future[bytes]:
        """Downloads in a daemon thread, because others hold up the end of the process.

        urllib waits for ever for an answer that comes byte by byte.
        """
        waits = self.downloading is not None and not self.downloading.done()
        if waits and monotonic() - self.started < LIFETIME:  # it may wait for ever
            raise TimeoutError("no answer to an earlier request")
        result: concurrent.futures.Future[bytes] = concurrent.futures.Future()
        result.set_running_or_notify_cancel()  # fetch() may give up, and the thread go on

        def run() -> None:
            try:
                result.set_result(self.download())
            except Exception as error:
                result.set_exception(error)

        threading.Thread(target=run, daemon=True).start()
        self.downloading, self.started = result, monotonic()
        return asyncio.wrap_future(result)

    def download(self) -> bytes:
        """The issuer's answer. Raises OSError, or ValueError for too long a one."""
        # Some issuers stand behind a filter that refuses Python's own User-Agent.
        request = urllib.request.Request(self.url, headers={"User-Agent": "jwks"})  # noqa: S310
        try:
            with urllib.request.urlopen(request, timeout=TIMEOUT) as response:  # noqa: S310
                body: bytes = response.read(MAX_SIZE + 1)
        except HTTPError as error:
            with error:
                raise ValueError(f"status {error.code}") from None
        if len(body) > MAX_SIZE:
            raise ValueError(f"more than {MAX_SIZE} bytes")
        return body

    def read(self, body: bytes) -> dict[tuple[str | None, str], jwt.PyJWK]:
        """The keys that can verify a token. Raises ValueError for what is no set."""
        try:
            document = dict(json.loads(body))
        except (ValueError, TypeError, RecursionError):
            raise ValueError("not a JSON object") from None
        if "jwks_uri" in document:
            raise ValueError("the discovery document: its jwks_uri is the URL of the keys")
        if not isinstance(document.get("keys"), list):
            raise ValueError('JSON without a list "keys"')
        keys = {}
        for each in document["keys"]:
            with suppress(Exception):  # one that PyJWT cannot read spoils no other
                key = jwt.PyJWK(each, SAME.get(each.get("alg"), each.get("alg")))
                usable = key.algorithm_name in self.algorithms and "d" not in each  # not private
                if usable and key.public_key_use in (None, "sig"):
                    keys[key.key_id, key.algorithm_name] = key
        return keys
