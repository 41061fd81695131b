"""The policy of auth.py and the counters behind it, in this process.

Tokens, hashes, an issuer on loopback: all of it is real. Only clocks and lifetimes are set forward.
"""

import asyncio
import gc
import json
import os
import runpy
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Coroutine, Iterator
from contextlib import closing
from types import SimpleNamespace
from typing import Any

import bcrypt
import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ed25519, rsa

from conftest import HERE, NOBODYS_ID, SECRET, SETTINGS, Issuer, Redis, outside
from lib import jwks, ratelimit
from lib.jwks import KeySet
from lib.passwords import Passwords
from lib.problems import HTTPProblem, Unauthorized
from lib.ratelimit import Limit, RateLimiter, parse_limit
from lib.state import RequestState

for name in SETTINGS:
    os.environ.pop(name, None)
os.environ["JWT_SECRET"] = SECRET

import auth  # noqa: E402

parametrize = pytest.mark.parametrize
ALGORITHMS = ["EdDSA", "ES256", "RS256"]


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """No token has been verified, and nothing was counted."""
    monkeypatch.setattr(auth, "verified", {})
    monkeypatch.setattr(auth, "limiter", RateLimiter())
    monkeypatch.setattr(auth, "SECRET", SECRET)
    monkeypatch.setattr(auth.verifier, "secret", SECRET)
    monkeypatch.setattr(auth, "ACCOUNTS", True)


@pytest.fixture
def issuer() -> Iterator[Issuer]:
    with closing(Issuer()) as issuer:
        yield issuer


def signed(**claims: Any) -> str:
    return jwt.encode({"sub": "u", "exp": time.time() + 600} | claims, SECRET, "HS256")


async def accepted(token: str) -> bool:
    try:
        return await auth.user_of(token) != ""
    except Unauthorized:
        return False


def refused(token: str) -> bool:
    return not asyncio.run(accepted(token))


def clock(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    """Sets the clock of tokens forward."""
    for module in ("auth", "lib.tokens"):
        monkeypatch.setattr(f"{module}.time", lambda: time.time() + seconds)


# Tokens.


@parametrize(("size", "is_refused"), [(8192, False), (8193, True)])
def test_a_token_of_more_than_8_kb_is_refused(size: int, is_refused: bool) -> None:
    later = int(time.time()) + 600  # a float has more digits now and then
    tokens = [signed(x="x" * length, exp=later) for length in range(5900, 6200)]
    [token, *_] = [token for token in tokens if len(token) >= size]
    assert len(token) <= size + 1
    assert refused(token) is (is_refused or len(token) > 8192)


@parametrize(("claim", "seconds", "is_refused"), [
    ("iat", 8, False), ("iat", 13, True), ("nbf", 8, False), ("nbf", 13, True), ("exp", -1, True),
])  # fmt: skip
def test_an_issuers_clock_may_be_10_seconds_ahead_and_exp_has_no_grace(
    claim: str, seconds: float, is_refused: bool
) -> None:
    assert refused(signed(**{claim: int(time.time() + seconds)})) is is_refused


@parametrize(("length", "is_refused"), [(255, False), (256, True)])
def test_a_user_id_has_255_characters_at_most(length: int, is_refused: bool) -> None:
    assert refused(signed(sub="\U0001f9c0" * length)) is is_refused


@parametrize(("seconds", "is_refused"), [(50, False), (61, True)])
def test_a_token_is_verified_again_after_a_minute(
    monkeypatch: pytest.MonkeyPatch, seconds: float, is_refused: bool
) -> None:
    token = signed()
    assert not refused(token)
    monkeypatch.setattr(auth.verifier, "secret", "another secret, of thirty-two bytes and more")
    clock(monkeypatch, seconds)
    assert refused(token) is is_refused


def test_a_token_in_the_cache_ends_with_its_exp(monkeypatch: pytest.MonkeyPatch) -> None:
    token = signed(exp=time.time() + 30)
    assert not refused(token)
    clock(monkeypatch, 31)
    assert refused(token)


def test_ten_thousand_verified_tokens_are_kept_and_the_oldest_goes() -> None:
    later = ("u", time.time() + 600)
    auth.verified.update({b"%d" % n: later for n in range(10_000)})
    token = signed()
    for _ in range(2):  # the second time it only takes its own place
        assert not refused(token)
        auth.verified.update({list(auth.verified)[-1]: ("u", 0)})
    assert len(auth.verified) == 10_000
    assert next(iter(auth.verified)) == b"1"


def test_an_accounts_token_lives_for_a_day() -> None:
    claims = jwt.decode(auth.issue_token("u"), SECRET, ["HS256"])
    assert claims["exp"] - claims["iat"] == 86_400


def test_an_accounts_token_has_what_is_asked_of_other_tokens(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    wanted = {"ISSUER": "https://issuer.example", "AUDIENCE": "todo", "USER_CLAIM": "user_id"}
    for name, value in wanted.items():
        monkeypatch.setattr(auth, name, value)
        monkeypatch.setattr(auth.verifier, name.lower(), value)
    made = auth.issue_token("u")
    claims = jwt.decode(made, SECRET, ["HS256"], options={"verify_aud": False})
    assert (claims["iss"], claims["aud"]) == ("https://issuer.example", "todo")
    assert claims["user_id"] == claims["sub"] == asyncio.run(auth.user_of(made)) == "u"


@parametrize(("sub", "is_refused"), [(NOBODYS_ID, True), ("u", False)])
def test_an_issuers_user_never_is_an_account(
    monkeypatch: pytest.MonkeyPatch, issuer: Issuer, sub: str, is_refused: bool
) -> None:
    federate(monkeypatch, issuer)
    monkeypatch.setattr(auth.verifier, "audience", "todo")
    assert refused(issuer.token(sub=sub)) is is_refused


@parametrize(
    ("settings", "accounts"),
    [
        ({"JWT_SECRET": SECRET}, True),
        ({"BETTER_AUTH_SECRET": SECRET}, False),
        ({"JWT_SECRET": SECRET, "ACCOUNTS": "off"}, False),
    ],
)
def test_accounts_take_a_secret_of_their_own(
    monkeypatch: pytest.MonkeyPatch, settings: dict[str, str], accounts: bool
) -> None:
    for name in SETTINGS:
        monkeypatch.setenv(name, settings.get(name, ""))
    assert runpy.run_path(str(HERE / "auth.py"))["ACCOUNTS"] is accounts


WRONG_SETTINGS = {
    "JWT_SECRET": [
        "x" * 31, "x" * 40, "change-me-change-me-change-me-change-me", "é" * 15,
        "<paste the output of openssl here>", "$(openssl rand -base64 32) of a shell",
    ],
    "BETTER_AUTH_SECRET": ["your-super-secret-key-of-thirty-two-bytes", "hunter2"],
    "JWT_JWKS_URL": [
        "issuer.example/jwks", "https://", "file:///etc/passwd", "https://a b/jwks",
        "https://issuer.example:0/jwks", "https://issuer.example:99999/jwks",
        "https://issuer.example:port/jwks", "https:///jwks",
        "https://issuer.example/.well-known/openid-configuration/", "http://user:secret@h.example/",
    ],
    "JWT_ISSUER": ["https://", "https://a.example, https://b.example", "https://a.example b"],
    "JWT_AUDIENCE": ["a,b", "http:", "a b"],
    "JWT_USER_CLAIM": ["user id", "exp", "aud", 'a"b', "\u00e9"],
    "ACCOUNTS": ["yes"],
    "RATE_LIMIT": ["600", "0/minute", "600/fortnight", "-1/minute", "1e3/minute", "a lot"],
    "RATE_LIMIT_STORAGE_URI": [
        "ftp://h", "redis://", "redis://h:port", "redis://h:0",
        "h:6379", "redis://h/zero",
    ],
}  # fmt: skip


@parametrize(
    ("name", "value"), [(name, value) for name in WRONG_SETTINGS for value in WRONG_SETTINGS[name]]
)
def test_a_line_names_a_setting_that_can_never_work(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as raised:
        auth.Settings.load()
    line = str(raised.value)
    assert line.startswith(name + " ") and "\n" not in line and "secret@" not in line


@parametrize(("name", "value"), [
    ("JWT_SECRET", "tests, of thirty-two bytes or more"), ("RATE_LIMIT", "5 / hour"),
    ("JWT_JWKS_URL", "http://[::1]:3000/api/auth/jwks?v=1"), ("RATE_LIMIT", "off"),
    ("JWT_JWKS_URL", "https://issuer.example/@me"), ("JWT_ISSUER", "accounts.example"),
    ("JWT_USER_CLAIM", "https://app.example/user_id"), ("JWT_AUDIENCE", "urn:todo"),
    ("RATE_LIMIT_STORAGE_URI", "rediss://:p%40ss@h.example:6380/0?ssl_cert_reqs=none"),
])  # fmt: skip
def test_a_setting_that_can_work_is_taken(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)
    assert getattr(auth.Settings.load(), name.lower()) == value


# Passwords.


def test_a_password_is_hashed_by_bcrypt_at_cost_12() -> None:
    assert asyncio.run(auth.passwords.hash("correct horse")).startswith("$2b$12$")


def bcrypted(password: str) -> bytes:
    """The hash that release 1 stored."""
    return bcrypt.hashpw(password.encode(), bcrypt.gensalt(4))


@parametrize("password", ["correct horse", "x" * 72, "п" * 36, "a\u0308" * 8, "\xe4" * 8])
def test_a_password_of_release_1_stays_good(password: str) -> None:
    assert asyncio.run(auth.passwords.check(password, bcrypted(password)))


def test_a_stored_hash_that_bcrypt_cannot_read_fits_no_password(caplog: Any) -> None:
    assert not asyncio.run(auth.passwords.check("correct horse", b"$argon2id$v=19$x"))
    assert "a stored hash cannot be checked" in caplog.text


def test_a_password_is_the_same_however_its_accents_are_sent(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(auth.passwords, "cost", 4)
    hashed = asyncio.run(auth.passwords.hash("a\u0308" * 8)).encode()
    for sent, matches in (("\xe4" * 8, True), ("a\u0308" * 8, True), ("a" * 8, False)):
        assert asyncio.run(auth.passwords.check(sent, hashed)) is matches


def test_an_unknown_e_mail_takes_as_long_as_a_wrong_password() -> None:
    async def check(password_hash: bytes | None) -> float:
        started = time.monotonic()
        assert not await auth.passwords.check("wrong", password_hash)
        return time.monotonic() - started

    hashed = asyncio.run(auth.passwords.hash("correct horse")).encode()
    known, unknown = asyncio.run(check(hashed)), asyncio.run(check(None))
    assert known / 4 < unknown < known * 4
    assert unknown < 5


def test_two_passwords_at_a_time_are_hashed() -> None:
    async def hash_many() -> int:
        calls = [asyncio.create_task(auth.passwords.hash("correct horse")) for _ in range(3)]
        await asyncio.sleep(0.05)
        hashing = auth.passwords.limiter.statistics().borrowed_tokens
        await asyncio.gather(*calls)
        return int(hashing)

    assert asyncio.run(hash_many()) == 2


def attempt(email: str, address: str = "192.0.2.1") -> str:
    """The status of an attempt to log in, before anything is hashed; "ok" for none."""
    state = RequestState({}, "id", address, b"")
    request: Any = SimpleNamespace(scope={"state": {"request": state}})
    try:
        asyncio.run(auth.throttle(request, email))
    except HTTPProblem as problem:
        return str(problem.status_code)
    return "ok"


def test_beyond_twenty_passwords_that_wait_a_login_is_503(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auth.passwords, "pending", 21)  # two of them are hashed
    assert attempt("a@example.com") == "ok"
    monkeypatch.setattr(auth.passwords, "pending", 22)
    assert attempt("a@example.com") == "503"


def test_of_logins_at_once_no_more_than_twenty_wait() -> None:
    async def hash_many() -> list[Any]:
        hashes = Passwords(4, 2, 20)
        calls = [hashes.hash("correct horse") for _ in range(100)]
        return await asyncio.gather(*calls, return_exceptions=True)

    answers = asyncio.run(hash_many())
    assert [type(each) for each in answers].count(HTTPProblem) == 78


def test_an_account_has_ten_attempts_a_minute_from_wherever() -> None:
    answers = [attempt("a@example.com", f"192.0.2.{n}") for n in range(12)]
    assert answers == ["ok"] * 10 + ["429"] * 2
    assert attempt("b@example.com") == "ok"
    assert auth.ACCOUNT_LIMIT.seconds == 60


def test_an_address_has_a_hundred_attempts_a_minute_for_whatever_account() -> None:
    answers = [attempt(f"{n}@example.com") for n in range(102)]
    assert answers == ["ok"] * 100 + ["429"] * 2
    assert attempt("a@example.com", "192.0.2.2") == "ok"
    assert auth.ADDRESS_LIMIT.seconds == 60


# Counters.


def hits(limiter: RateLimiter, keys: list[str], limit: str = "2/second") -> list[bool]:
    """For each key, whether it was let through."""

    async def hit(key: str) -> bool:
        try:
            await limiter.hit("test", parse_limit(limit), key)
        except HTTPProblem:
            return False
        return True

    async def hit_all() -> list[bool]:
        return [await hit(key) for key in keys]

    return asyncio.run(hit_all())


@parametrize("storage", ["", "redis"])
def test_who_obeys_retry_after_is_let_through(request: pytest.FixtureRequest, storage: str) -> None:
    async def obey(limiter: RateLimiter, pause: float) -> None:
        limit, key, started = Limit(2, 2), f"{pause}", time.monotonic()
        await limiter.hit(key, limit, key)
        await asyncio.sleep(pause)
        await limiter.hit(key, limit, key)
        with pytest.raises(HTTPProblem) as raised:
            await limiter.hit(key, limit, key)
        wait = int((raised.value.headers or {})["Retry-After"])
        assert time.monotonic() + wait >= started + 2
        assert 1 <= wait <= 2
        await asyncio.sleep(wait)
        await limiter.hit(key, limit, key)

    async def story() -> None:
        limiter = RateLimiter(request.getfixturevalue("redis")[0] if storage else "")
        await asyncio.gather(*[obey(limiter, pause) for pause in (0.0, 0.55, 0.6, 0.65)])

    run_and_collect(story())


def test_while_redis_is_frozen_one_request_asks_and_the_rest_count_here(
    monkeypatch: pytest.MonkeyPatch, redis: Redis
) -> None:
    monkeypatch.setattr(ratelimit, "PAUSE", 1.5)

    async def story() -> None:
        limiter = RateLimiter(f"{redis[0]}?socket_timeout=4")  # ours wins
        limit, process = Limit(1000, 600), redis[1]
        await limiter.hit("test", limit, "u")
        process.send_signal(signal.SIGSTOP)
        for askers in (20, 1, 1, 1, 1):
            calls = [timed(limiter.hit("test", limit, "u")) for _ in range(20)]
            times = await asyncio.gather(*calls)
            assert sum(each > 0.05 for each in times) <= askers and max(times) < 0.5
            await asyncio.sleep(0.5)
        process.send_signal(signal.SIGCONT)
        await asyncio.sleep(1.6)
        here = dict(limiter.windows["test"][1])
        for _ in range(5):
            await limiter.hit("test", limit, "u")
        assert limiter.windows["test"][1] == here  # Redis counts again

    run_and_collect(story())


def test_of_a_burst_of_300_redis_lets_the_limit_through(redis: Redis) -> None:
    async def story() -> None:
        limiter, limit = RateLimiter(redis[0]), Limit(50, 600)
        calls = [limiter.hit("test", limit, "u") for _ in range(300)]
        answers = await asyncio.gather(*calls, return_exceptions=True)
        assert answers.count(None) == 50

    run_and_collect(story())


@parametrize("end", [":99999", "?socket_timeout=abc", "?hunter2=bar"])
def test_a_uri_that_redis_cannot_have_is_one_line(end: str) -> None:
    with pytest.raises(SystemExit, match="RATE_LIMIT_STORAGE_URI ") as raised:
        RateLimiter(f"redis://h{end}")
    assert "hunter2" not in str(raised.value)


class Asked:
    """A Redis that has counted as often as it was asked, or that fails."""

    asked, fails = 0, False

    async def eval(self, *_: Any) -> tuple[int, int]:
        self.asked += 1
        if self.fails:
            raise TimeoutError
        return self.asked, 1500


def test_a_refusal_asks_redis_once_as_an_admission_does() -> None:
    limiter = RateLimiter()
    limiter.redis = Asked()
    assert hits(limiter, ["u"] * 25, "10/minute") == [True] * 10 + [False] * 15
    assert (limiter.redis.asked, limiter.failures) == (25, 0)


def test_after_three_failures_one_request_in_five_seconds_asks_redis(caplog: Any) -> None:
    async def story() -> None:
        limiter = RateLimiter()
        redis = limiter.redis = Asked()
        for seconds, redis.fails, asked in (
            (0, True, 3),
            (3, True, 3),
            (5, True, 4),
            (5, False, 14),
        ):
            limiter.ask_again_at -= seconds
            for _ in range(10):
                await limiter.hit("test", Limit(1000, 600), "u")
            assert redis.asked == asked

    asyncio.run(story())
    assert [record.message[:12] for record in caplog.records] == ["Redis fails ", "Redis counts"]


def run_and_collect(story: Coroutine[Any, Any, None]) -> None:
    """A service never closes its connections to Redis, so Python warns of those of a test."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        asyncio.run(story)
        gc.collect()


async def timed(call: Coroutine[Any, Any, Any]) -> float:
    started = time.monotonic()
    await call
    return time.monotonic() - started


def test_full_counters_refuse_no_stranger_and_forget_nobody(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ratelimit, "MAX_COUNTERS", 2000)
    limiter, limit = RateLimiter(), "9/minute"
    assert hits(limiter, ["locked"] * 10, limit) == [True] * 9 + [False]
    hits(limiter, [f"invented {n}" for n in range(5000)], limit)
    assert hits(limiter, ["locked"], limit) == [False]  # a reset would have unlocked it
    assert all(hits(limiter, [f"stranger {n}" for n in range(100)], limit))
    [(_, counters)] = limiter.windows.values()
    assert len(counters) <= 4000


@parametrize(("one", "other", "is_one_network"), [
    ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::9", True), ("2001:db8:1:2::", "2001:db8:1:3::", False),
    ("::ffff:192.0.2.1", "192.0.2.1", True), ("192.0.2.1", "192.0.2.2", False),
    ("fe80::1%eth0", "fe80::2", True), ("", "", True),
])  # fmt: skip
def test_an_ipv6_address_counts_as_its_64_and_an_ipv4_address_as_itself(
    one: str, other: str, is_one_network: bool
) -> None:
    assert (ratelimit.networks(one)[0] == ratelimit.networks(other)[0]) is is_one_network


def test_a_network_that_fills_the_counters_is_refused_and_others_are_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ratelimit, "MAX_COUNTERS", 100)
    answers = [attempt(f"{n}@example.com", f"2001:db8:1:{n:x}::1") for n in range(300)]
    assert answers == ["ok"] * 200 + ["429"] * 100  # 100 exact ones, and 100 of the /48
    assert attempt("a@example.com", "2001:db8:2::1") == "ok"
    assert attempt("b@example.com", "192.0.2.1") == "ok"


def test_redis_is_imported_where_it_counts_and_nowhere_else() -> None:
    command = [sys.executable, "-c", "import auth, sys; print('redis' in sys.modules)"]
    for uri, is_imported in (("", "False"), ("redis://127.0.0.1:1", "True")):
        environ = outside(JWT_SECRET=SECRET, RATE_LIMIT_STORAGE_URI=uri)
        run = subprocess.run(command, cwd=HERE, env=environ, capture_output=True, text=True)
        assert run.stdout.strip() == is_imported


# An issuer's keys.


async def finds(keys: KeySet, issuer: Issuer, alg: str = "EdDSA", kid: str = "") -> bool:
    return bool(await keys.find(kid or issuer.keys[alg][0], alg))


def age(keys: KeySet, seconds: float) -> None:
    """Makes the last fetch this old."""
    keys.fetched -= seconds
    keys.started -= seconds


@parametrize(("seconds", "is_good"), [(590, True), (601, False)])
def test_a_key_that_the_issuer_withdraws_is_good_for_ten_minutes(
    monkeypatch: pytest.MonkeyPatch, issuer: Issuer, seconds: float, is_good: bool
) -> None:
    async def story() -> None:
        keys, kid = KeySet(issuer.url, ALGORITHMS), issuer.keys["EdDSA"][0]
        assert await finds(keys, issuer)
        issuer.rotate()
        keys.started -= 6
        monkeypatch.setattr(jwks, "time", lambda: time.time() + seconds)  # monotonic() may stop
        assert await finds(keys, issuer, kid=kid) is is_good

    asyncio.run(story())


def test_unknown_keys_are_asked_for_every_five_seconds_at_most(issuer: Issuer) -> None:
    async def story() -> None:
        keys = KeySet(issuer.url, ALGORITHMS)
        for n in range(20):
            assert not await finds(keys, issuer, kid=f"{n}")
        assert issuer.requests == 1
        keys.started -= 6
        issuer.rotate()
        assert await finds(keys, issuer)
        assert issuer.requests == 2

    asyncio.run(story())


@pytest.mark.filterwarnings("ignore::jwt.InsecureKeyLengthWarning")
def test_an_rsa_key_of_less_than_2048_bits_is_not_used_and_the_log_says_so(
    monkeypatch: pytest.MonkeyPatch, issuer: Issuer
) -> None:
    federate(monkeypatch, issuer)
    issuer.keys["RS256"] = ("weak", rsa.generate_private_key(65537, 2047))
    with pytest.raises(Unauthorized) as raised:
        asyncio.run(auth.user_of(issuer.token("RS256")))
    assert "2047 bits" in raised.value.reason


@parametrize("change", [
    {"use": "enc"}, {"key_ops": ["encrypt"]}, {"alg": "RS512"}, {"alg": "PS256"},
])  # fmt: skip
def test_only_a_key_for_signatures_by_its_algorithm_is_used(
    monkeypatch: pytest.MonkeyPatch, issuer: Issuer, change: dict[str, Any]
) -> None:
    public, wanted = issuer.public(), {"use": "sig", "key_ops": ["verify"]}
    monkeypatch.setattr(issuer, "public", lambda: [key | wanted for key in public])
    assert asyncio.run(finds(KeySet(issuer.url, ALGORITHMS), issuer, "RS256"))
    wanted |= change
    asked = change.get("alg", "RS256")
    assert not asyncio.run(finds(KeySet(issuer.url, ALGORITHMS), issuer, "RS256"))
    assert not asyncio.run(KeySet(issuer.url, ALGORITHMS).find(issuer.keys["RS256"][0], asked))


def test_a_private_key_in_a_set_is_never_used(
    monkeypatch: pytest.MonkeyPatch, issuer: Issuer
) -> None:
    kid, key = issuer.keys["EdDSA"]
    private = jwt.algorithms.OKPAlgorithm.to_jwk(key, as_dict=True) | {"kid": kid}
    monkeypatch.setattr(issuer, "public", lambda: [private])
    assert not asyncio.run(finds(KeySet(issuer.url, ALGORITHMS), issuer))


@parametrize(("seconds", "stays"), [(1190, True), (1201, False)])
def test_an_issuer_that_has_no_key_left_revokes_all_after_twenty_minutes(
    issuer: Issuer, seconds: float, stays: bool
) -> None:
    async def story() -> None:
        keys = KeySet(issuer.url, ALGORITHMS)
        assert await finds(keys, issuer)
        issuer.failing = True  # it sends no key that anybody can use
        age(keys, seconds)
        assert await finds(keys, issuer) is stays

    asyncio.run(story())


def test_known_keys_outlast_an_issuer_that_is_down_for_an_hour_and_nobody_waits_for_it(
    issuer: Issuer,
) -> None:
    async def story() -> None:
        keys = KeySet(issuer.url, ALGORITHMS)
        assert await finds(keys, issuer)
        keys.url += "/missing"
        for issuer.delay in (0.0, 0.9):
            age(keys, 3600)
            started = time.monotonic()
            assert await finds(keys, issuer)
        assert time.monotonic() - started < 0.5

    asyncio.run(story())


def test_an_issuer_that_hangs_delays_one_token_of_a_known_key_by_a_second(issuer: Issuer) -> None:
    async def story() -> None:
        keys = KeySet(issuer.url, ALGORITHMS)
        assert await finds(keys, issuer)
        issuer.delay = 3
        age(keys, 1201)
        assert await timed(finds(keys, issuer)) < 2.5
        started = time.monotonic()
        assert all([await finds(keys, issuer) for _ in range(100)])
        assert time.monotonic() - started < 0.5

    asyncio.run(story())


def test_a_fetch_without_an_end_is_given_up_and_its_answer_replaces_nothing(
    monkeypatch: pytest.MonkeyPatch, issuer: Issuer
) -> None:
    async def story() -> None:
        keys, issuer.delay = KeySet(issuer.url, ALGORITHMS), 1
        with pytest.raises(HTTPProblem) as raised:
            await finds(keys, issuer)
        assert raised.value.reason == "TimeoutError"
        issuer.delay = 0
        keys.started -= 6
        assert await finds(keys, issuer)
        fetched = keys.fetched
        await asyncio.sleep(1.5)
        assert keys.fetched == fetched and issuer.requests == 2

    monkeypatch.setattr(jwks, "FETCH_LIMIT", jwks.FETCH_LIMIT / 60)  # 0.5 s
    asyncio.run(story())


def start_none(_: threading.Thread) -> None:
    """As Thread.start() where the process may have no more."""
    raise RuntimeError("can't start new thread")


def test_a_fetch_that_gets_no_thread_is_503_and_the_next_one_brings_the_keys(
    monkeypatch: pytest.MonkeyPatch, issuer: Issuer
) -> None:
    keys = KeySet(issuer.url, ALGORITHMS)
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", start_none)
        assert unreachable(keys, issuer).reason == "can't start new thread"
    keys.started -= 6
    assert asyncio.run(finds(keys, issuer))


@parametrize(("in_set", "in_token"), [(False, False), (False, True), (True, False)])
def test_where_the_set_or_the_token_has_no_kid_ten_keys_are_tried_and_no_more(
    monkeypatch: pytest.MonkeyPatch, issuer: Issuer, in_set: bool, in_token: bool
) -> None:
    federate(monkeypatch, issuer)
    tokens, keys = [], []
    for n in range(11):
        issuer.keys["EdDSA"] = (f"{n}", ed25519.Ed25519PrivateKey.generate())
        tokens.append(issuer.token(headers=None if in_token else {}))
        keys.append(issuer.public()[0] | ({} if in_set else {"kid": None}))
    monkeypatch.setattr(issuer, "public", lambda: keys)

    async def story() -> list[bool]:
        return [await accepted(token) for token in tokens]

    assert asyncio.run(story()) == [True] * 10 + [False]


def unreachable(keys: KeySet, issuer: Issuer) -> HTTPProblem:
    """The 503 of a token whose key is not known."""
    with pytest.raises(HTTPProblem) as raised:
        asyncio.run(finds(keys, issuer))
    assert (raised.value.status_code, raised.value.code) == (503, "keys_unavailable")
    assert raised.value.headers == {"Retry-After": "2"}
    return raised.value


NO_SETS = [b"", b"<html>", b"\xff", b"[" * 9999, b"7", b"[]", b"{}", b'{"keys": {}}']


@parametrize(("url", "body", "words"), [
    ("{}/missing", b"", "Error 404"), ("http://127.0.0.1:1", b"", "refused"),
    ("{}", b" " * 262_145, "more than 262144 b"), *(("{}", b, 'a list "keys"') for b in NO_SETS),
])  # fmt: skip
def test_an_issuer_that_sends_no_key_set_is_503_and_the_log_says_why(
    issuer: Issuer, caplog: Any, url: str, body: bytes, words: str
) -> None:
    issuer.body = body
    reason = unreachable(KeySet(url.format(issuer.url), ALGORITHMS), issuer).reason
    assert words in reason and reason in caplog.text


def federate(monkeypatch: pytest.MonkeyPatch, issuer: Issuer) -> KeySet:
    """Makes auth.py take this issuer's tokens."""
    keys = KeySet(issuer.url, ALGORITHMS)
    monkeypatch.setattr(auth.verifier, "key_set", keys)
    return keys


def test_a_key_replaced_under_its_kid_is_fetched_when_a_token_does_not_verify(
    monkeypatch: pytest.MonkeyPatch, issuer: Issuer
) -> None:
    async def story() -> None:
        keys, kid = federate(monkeypatch, issuer), issuer.keys["EdDSA"][0]
        assert await accepted(issuer.token())
        issuer.rotate()
        issuer.keys["EdDSA"] = (kid, issuer.keys["EdDSA"][1])
        assert not await accepted(issuer.token())  # asked less than 5 s ago
        keys.started -= 6
        assert await accepted(issuer.token())
        assert issuer.requests == 2

    asyncio.run(story())


def test_while_the_issuer_is_down_a_key_replaced_under_its_kid_is_503(issuer: Issuer) -> None:
    async def story() -> None:
        keys, kid = KeySet(issuer.url, ALGORITHMS), issuer.keys["EdDSA"][0]
        old = await keys.find(kid, "EdDSA")
        keys.url += "/missing"
        keys.started -= 6
        with pytest.raises(HTTPProblem) as raised:
            await keys.find(kid, "EdDSA", tried=old)
        assert raised.value.code == "keys_unavailable"

    asyncio.run(story())


@parametrize(("alg", "name"), [("EdDSA", "Ed25519"), ("ES256", "ESP256")])
def test_an_algorithm_may_have_its_name_of_rfc_9864(
    monkeypatch: pytest.MonkeyPatch, issuer: Issuer, alg: str, name: str
) -> None:
    federate(monkeypatch, issuer)
    keys = [key | ({"alg": name} if key.get("alg") == alg else {}) for key in issuer.public()]
    monkeypatch.setattr(issuer, "public", lambda: keys)
    kid, key = issuer.keys[alg]
    for used in (alg, name):
        assert not refused(
            jwt.encode({"sub": "u", "exp": time.time() + 60}, key, used, {"kid": kid})
        )


SPOILT: list[Any] = [None, 7, {}, {"kty": ["x"]}, {"kty": "RSA", "n": 5, "e": {}, "alg": []}]
SPOILT += [{"kty": "OKP", "crv": "X25519", "x": "AA"}, {"kty": "EC", "crv": "P-256", "x": "!"}]


def test_a_bom_a_key_twice_and_broken_keys_spoil_no_other(issuer: Issuer) -> None:
    keys = [*SPOILT, *issuer.public(), *issuer.public()]
    issuer.body = b"\xef\xbb\xbf" + json.dumps({"keys": keys}).encode()

    async def story() -> None:
        keys = KeySet(issuer.url, ALGORITHMS)
        for alg in ALGORITHMS:
            assert await finds(keys, issuer, alg)

    asyncio.run(story())


def test_an_issuer_that_trickles_is_given_up_and_does_not_hold_up_the_end_of_the_process() -> None:
    story = """
import asyncio, socket, threading, time
from lib import jwks
from lib.problems import HTTPProblem

jwks.TIMEOUT = 0.5
listener = socket.create_server(("127.0.0.1", 0))

def trickle():
    connection, _ = listener.accept()
    while connection.send(b"HTTP/1.1 200 OK"[:1]):
        time.sleep(0.1)

threading.Thread(target=trickle, daemon=True).start()
keys = jwks.KeySet(f"http://127.0.0.1:{listener.getsockname()[1]}/", ["EdDSA"])
try:
    asyncio.run(keys.find("new", "EdDSA"))
except HTTPProblem as problem:
    print(problem.code)
"""
    command = [sys.executable, "-c", story]
    run = subprocess.run(command, cwd=HERE, capture_output=True, text=True, timeout=15)
    assert "keys_unavailable" in run.stdout
