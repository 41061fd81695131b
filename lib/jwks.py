"""The public keys of an issuer of tokens, from a URL (RFC 7517).

    keys = KeySet("https://example.com/api/auth/jwks", algorithms=("EdDSA", "ES256"))
    await keys.find(kid="2026-11", alg="EdDSA")  # [the public key]

What find() does for a token that a known key fits depends on the state of the key set:

    FRESH     up to 10 minutes old       gives the key
    STALE     up to 20 minutes old       starts a fetch, and gives the key
    EXPIRED   older, or never fetched    waits for a fetch, 1 s at most; gives the key if it is left
    DOWN      the last fetch failed      starts a fetch, and gives the key, however old it is

A token that no known key fits waits for a fetch in any state, 5 s at most. It is 401 if the set has
no such key, and 503 if the fetch failed or has no answer yet. A fetch starts when the last one has
ended, 5 s after its start at the earliest, because anybody can invent a kid. Until then the outcome
of the last one counts. One that has not ended after 10 minutes is given up, but keeps its thread:
an issuer may send its answer byte by byte.
"""

import asyncio
import json
import logging
import threading
import urllib.request
from collections.abc import Collection
from contextlib import suppress
from enum import Enum
from time import monotonic
from typing import Any

import jwt

from lib.problems import RETRY, HTTPProblem

LIFETIME = 600  # seconds that a set is FRESH
MAX_AGE = 2 * LIFETIME  # seconds until it is EXPIRED
MIN_INTERVAL = 5  # seconds between the starts of two fetches
TIMEOUT = 5  # seconds from the start of a fetch that a token without a key waits
PATIENCE = 1  # seconds from there that a token with an EXPIRED key waits
MAX_SIZE = 262_144  # bytes of a key set
MAX_TRIED = 10  # keys that a token is tried with
SAME = {"Ed25519": "EdDSA", "ESP256": "ES256"}  # RFC 9864's names

for name, known in SAME.items():
    with suppress(NotImplementedError, ValueError):  # without cryptography; or PyJWT has the name
        jwt.register_algorithm(name, jwt.get_algorithm_by_name(known))

log = logging.getLogger("jwks")
State = Enum("State", ["FRESH", "STALE", "EXPIRED", "DOWN"])
Key = tuple[str | None, str, Any]  # kid (RFC 7517 section 4.5: optional), algorithm, public key


class KeySet:
    """The keys of one issuer."""

    def __init__(self, url: str, algorithms: Collection[str]) -> None:
        self.url, self.algorithms = url, algorithms
        self.keys: list[Key] = []
        self.fetched = self.started = float("-inf")  # by monotonic(): the keys, and the last fetch
        self.failure = ""  # why the last fetch brought no set
        self.answered = asyncio.Event()  # clear while a fetch is under way
        self.answered.set()

    @property
    def state(self) -> State:
        age = monotonic() - self.fetched
        if self.failure:
            return State.DOWN
        if age > MAX_AGE:
            return State.EXPIRED
        return State.STALE if age > LIFETIME else State.FRESH

    # Finding keys...

    async def find(self, kid: str | None, alg: str, refused: Collection[Any] = ()) -> list[Any]:
        """The public keys to try a token with. [] if the issuer has none but those `refused`.

        One that did not verify the token is refused, and may have been replaced under its kid.
        Raises HTTPProblem(503) if nothing is known of the token's key.
        """
        alg = SAME.get(alg, alg)
        if alg not in self.algorithms or not self.url:
            return []
        state, keys = self.state, self.fitting(kid, alg, refused)  # before it ends
        if keys and state is State.FRESH:
            return keys
        self.start_fetch()
        if not keys or state is State.EXPIRED:
            end = self.started + (PATIENCE if keys else TIMEOUT)
            with suppress(TimeoutError):
                await asyncio.wait_for(self.answered.wait(), end - monotonic())
            keys = self.fitting(kid, alg, refused)
        if not keys and (self.failure or not self.answered.is_set()):
            text, reason = "The issuer's keys are out of reach: try again later", self.failure
            raise HTTPProblem(503, text, "keys_unavailable", RETRY, reason=reason or "no answer")
        return keys

    def fitting(self, kid: str | None, alg: str, refused: Collection[Any]) -> list[Any]:
        """As find(), among the keys that are known."""
        keys = [
            key
            for key_id, key_alg, key in self.keys
            if key_alg == alg and (kid is None or key_id in (None, kid)) and key not in refused
        ]
        return keys[: MAX_TRIED - len(refused)]

    # Fetching them...

    def start_fetch(self) -> None:
        """Starts a fetch, if one may start."""
        interval = MIN_INTERVAL if self.answered.is_set() else LIFETIME
        if monotonic() - self.started > interval:
            self.started, self.answered = monotonic(), asyncio.Event()
            # A daemon, so that it does not hold up the end of the process.
            arguments = (asyncio.get_running_loop(), self.answered)
            try:
                threading.Thread(target=self.fetch, args=arguments, daemon=True).start()
            except RuntimeError as error:  # no thread is left
                log.warning("JWKS not fetched: %s", error)
                self.failure = str(error)
                self.answered.set()

    def fetch(self, loop: asyncio.AbstractEventLoop, answered: asyncio.Event) -> None:
        """Replaces the keys. In a thread, because urllib would hold up the loop."""
        try:
            keys, failure = self.read(self.download()), ""
        except Exception as error:
            keys, failure = [], str(error)[:200] or type(error).__name__
        if answered is not self.answered:  # this fetch was given up
            return
        self.failure = failure
        if failure:
            log.warning("JWKS not fetched: %s", failure)
        if keys or self.state is State.EXPIRED:  # a set without keys may be a mishap
            self.keys, self.fetched = keys, monotonic()
        with suppress(RuntimeError):  # the loop was closed
            loop.call_soon_threadsafe(answered.set)

    def download(self) -> bytes:
        """The issuer's answer. Raises OSError, or ValueError for too long a one."""
        # Some issuers stand behind a filter that refuses Python's own User-Agent.
        request = urllib.request.Request(self.url, headers={"User-Agent": "jwks"})  # noqa: S310
        with urllib.request.urlopen(request, timeout=TIMEOUT) as response:  # noqa: S310
            body: bytes = response.read(MAX_SIZE + 1)
        if len(body) > MAX_SIZE:
            raise ValueError(f"more than {MAX_SIZE} bytes")
        return body

    def read(self, body: bytes) -> list[Key]:
        """The keys that can verify a token. Raises ValueError for what is no set."""
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
            is_public, is_for_signatures = "d" not in jwk, key.public_key_use in (None, "sig")
            if key.algorithm_name in self.algorithms and is_public and is_for_signatures:
                return key.key_id, key.algorithm_name, key.key
        return None
