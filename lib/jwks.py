"""The public keys of an issuer of tokens, from a URL (RFC 7517).

    keys = KeySet("https://example.com/api/auth/jwks", algorithms=("EdDSA", "ES256"))
    await keys.find(kid="2026-11", alg="EdDSA")  # [the public key]

A key that find() knows is FRESH for 10 minutes after the set was fetched. Any other starts a fetch:

    OLD      Older. find() waits for the fetch, 1 s at most, and gives the key if it is left.
    DOWN     Older, and the last fetch failed. find() gives the key, however old it is.
    UNKNOWN  find() waits for the fetch, 5 s at most. The token is 401 if the new set has no key
             for it, and 503 if the fetch failed or goes on.

A fetch starts when the last one has ended, and 5 s after its start at the earliest, because anybody
can invent a kid. Until then the last one counts. An answer may come byte by byte and never end, so
a fetch is given up after 30 s. Its thread stays until the answer ends.
"""

import asyncio
import json
import logging
import threading
import urllib.request
from collections.abc import Callable, Collection
from concurrent.futures import Future
from contextlib import suppress
from time import monotonic, time
from typing import Any

import jwt

from lib.problems import RETRY, HTTPProblem

FRESH_FOR = 600  # seconds
MAX_AGE = 2 * FRESH_FOR  # seconds until a set without a key replaces one with keys
FETCH_LIMIT = 30  # seconds that a fetch may take
MIN_INTERVAL = 5  # seconds between the starts of two fetches
TIMEOUT = 5  # seconds from the start of a fetch that a token waits if its key is UNKNOWN
PATIENCE = 1  # seconds from there that it waits if its key is OLD
MAX_SIZE = 262_144  # bytes of a key set
MAX_TRIED = 10  # keys that a token is tried with
SAME = {"Ed25519": "EdDSA", "ESP256": "ES256"}  # RFC 9864's names

for name, known in SAME.items():
    with suppress(NotImplementedError, ValueError):  # without cryptography; or PyJWT has the name
        jwt.register_algorithm(name, jwt.get_algorithm_by_name(known))

log = logging.getLogger("jwks")
Key = tuple[str | None, str, Any]  # kid (RFC 7517 section 4.5: optional), algorithm, public key


class KeySet:
    """The keys of one issuer, in one event loop."""

    def __init__(self, url: str, algorithms: Collection[str]) -> None:
        self.url, self.algorithms = url, algorithms
        self.keys: list[Key] = []
        self.fetched = float("-inf")  # by time(): monotonic() stands still in a suspended machine
        self.started = float("-inf")  # the last fetch, by monotonic()
        self.fetching: asyncio.Task[None] | None = None  # the last fetch, which may have ended
        self.failure = ""  # why the last one that has ended brought no set

    # Finding keys...

    async def find(self, kid: str | None, alg: str, tried: Collection[Any] = ()) -> list[Any]:
        """The public keys to try a token with. [] if the issuer has none but those `tried`.

        One that was tried did not verify the token, and may have been replaced under its kid.
        Raises HTTPProblem(503) if nothing is known of the token's key.
        """
        alg = SAME.get(alg, alg)
        if alg not in self.algorithms or not self.url:
            return []
        keys = self.fitting(kid, alg, tried)
        if keys and 0 <= time() - self.fetched <= FRESH_FOR:  # a clock may be set back
            return keys
        fetch = self.start_fetch()
        if not keys:  # UNKNOWN
            wait = TIMEOUT
        elif self.failure:  # DOWN
            wait = 0
        else:  # OLD
            wait = PATIENCE
        await asyncio.wait([fetch], timeout=self.started + wait - monotonic())
        keys = self.fitting(kid, alg, tried)
        if not keys and (self.failure or not fetch.done()):
            text, reason = "The issuer's keys are out of reach: try again later", self.failure
            raise HTTPProblem(503, text, "keys_unavailable", RETRY, reason=reason or "no answer")
        return keys

    def fitting(self, kid: str | None, alg: str, tried: Collection[Any]) -> list[Any]:
        """As find(), among the keys that are known."""
        keys = [
            key
            for key_id, key_alg, key in self.keys
            if key_alg == alg and (kid is None or key_id in (None, kid)) and key not in tried
        ]
        return keys[: MAX_TRIED - len(tried)]

    # Fetching them...

    def start_fetch(self) -> asyncio.Task[None]:
        """A new fetch if one may start, or the last one."""
        may_start = monotonic() - self.started > MIN_INTERVAL
        if self.fetching is None or (self.fetching.done() and may_start):
            self.started = monotonic()
            self.fetching = asyncio.create_task(self.fetch())
        return self.fetching

    async def fetch(self) -> None:
        """Replaces the keys, or says in `failure` and in the log why not."""
        try:
            async with asyncio.timeout(FETCH_LIMIT):
                keys = await in_daemon_thread(self.download)
            if not keys and time() - self.fetched <= MAX_AGE:
                raise ValueError("no key that can verify a token")  # may be a mishap
        except Exception as error:
            self.failure = str(error)[:200] or type(error).__name__
            log.warning("JWKS not fetched: %s", self.failure)
        else:
            self.keys, self.fetched, self.failure = keys, time(), ""

    def download(self) -> list[Key]:
        """The keys of the issuer. Raises OSError, or ValueError for what is no key set."""
        # Some issuers stand behind a filter that refuses Python's own User-Agent.
        request = urllib.request.Request(self.url, headers={"User-Agent": "jwks"})  # noqa: S310
        with urllib.request.urlopen(request, timeout=TIMEOUT) as response:  # noqa: S310
            body = response.read(MAX_SIZE + 1)
        if len(body) > MAX_SIZE:
            raise ValueError(f"more than {MAX_SIZE} bytes")
        try:
            jwks = json.loads(body)["keys"]
        except (ValueError, TypeError, KeyError, RecursionError):
            jwks = None
        if not isinstance(jwks, list):
            raise ValueError('not a JSON object with a list "keys"')
        return [key for each in jwks if (key := self.read_key(each))]

    def read_key(self, jwk: Any) -> Key | None:
        """A public key for signatures by one of our algorithms. None for any other."""
        with suppress(Exception):  # PyJWT raises many errors, and no key may spoil another
            key = jwt.PyJWK(jwk, SAME.get(jwk.get("alg"), jwk.get("alg")))
            is_public, operations = "d" not in jwk, jwk.get("key_ops", ["verify"])
            verifies = key.public_key_use in (None, "sig") and "verify" in operations
            if key.algorithm_name in self.algorithms and is_public and verifies:
                return key.key_id, key.algorithm_name, key.key
        return None


def in_daemon_thread(function: Callable[[], Any]) -> asyncio.Future[Any]:
    """As asyncio.to_thread(), but the thread does not hold up the end of the process."""
    future = Future[Any]()

    def run() -> None:
        try:
            future.set_result(function())
        except Exception as error:
            # The traceback leads to this future, so the connection in it would stay open.
            future.set_exception(error.with_traceback(None))

    future.set_running_or_notify_cancel()  # now nobody cancels it, and its result can be set
    threading.Thread(target=run, daemon=True).start()
    return asyncio.wrap_future(future)
