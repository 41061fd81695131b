"""Random statements through pgpipeline, while their connections are ended in four ways.

FUZZ_SECONDS=60 FUZZ_SEED=7 python -m pytest pgpipeline/tests/test_fuzz.py -s    (8 without)
"""

import asyncio
import os
import random
import time
from collections import Counter
from collections.abc import Iterator

import psycopg
import pytest
import uvloop
from psycopg.conninfo import make_conninfo

from pgpipeline import ConnectionPool, InvalidValue, PipelinePool, Result, Statement, Unavailable
from pgpipeline.tests.conftest import Proxy, value

SECONDS = float(os.environ.get("FUZZ_SECONDS") or 8)
SEED = int(os.environ.get("FUZZ_SEED") or time.time())
ENDINGS = ["terminate", "cancel", "reset", "cut"]

# Of each kind: its SQL, and how often it is picked. Every one is asked for a number and a text.
INSERT = "INSERT INTO fuzz (n, text) SELECT %(n)s::bigint, %(text)s::text"
ECHO = "%(n)s::bigint, %(text)s::text"
KINDS: dict[str, tuple[str, int]] = {
    "read": (f"SELECT {ECHO}", 200),
    "slow read": (f"SELECT {ECHO} FROM pg_sleep(%(n)s::bigint % 10 * 0.01)", 10),
    "stuck read": (f"SELECT {ECHO} FROM pg_sleep(1.5)", 1),
    "wrong read": (f"SELECT {ECHO}, 1 / (%(n)s::bigint - %(n)s)", 20),
    "write": (f"{INSERT} RETURNING n, text", 200),
    "slow write": (f"{INSERT} FROM pg_sleep(%(n)s::bigint % 10 * 0.01) RETURNING n, text", 10),
    "silent write": (INSERT, 50),
    "wrong write": (f"{INSERT} RETURNING n, 1 / (n - n)", 20),
}
STATEMENTS = {name: Statement(name, sql) for name, (sql, _) in KINDS.items()}


class Fuzz:
    """What was asked, what came of it, and how often connections were ended."""

    def __init__(self, pools: list[PipelinePool]) -> None:
        self.reads, self.writes = pools
        self.last, self.longest, self.outcomes = 0, 0.0, Counter[str]()
        self.texts: dict[int, str] = {}  # of each write that may be stored
        self.acknowledged = set[int]()

    async def ask(self, kind: str, text: str, patience: float | None = None) -> None:
        n, statement = self.last + 1, STATEMENTS[kind]
        pool = self.reads if statement.reads_only else self.writes
        if "write" in kind and kind != "wrong write":
            self.texts[n] = text
        self.last, started = n, time.monotonic()
        try:
            async with asyncio.timeout(patience):
                result = await pool.execute(statement, {"n": n, "text": text}, tenant=f"{n % 5}")
                self.check(kind, n, text, result)
        except InvalidValue:
            assert kind.startswith("wrong"), kind
            self.outcomes["refused"] += 1
        except (Unavailable, TimeoutError) as error:
            self.outcomes[type(error).__name__] += 1
        self.longest = max(self.longest, time.monotonic() - started)

    def check(self, kind: str, n: int, text: str, result: Result) -> None:
        expected = [] if kind == "silent write" else [(str(n).encode(), text.encode())]
        assert result.rows == expected, f"{kind} {n} has got {str(result.rows)[:200]}"
        self.outcomes["answered"] += 1
        self.acknowledged |= {n} & self.texts.keys()

    async def call(self, until: float) -> None:
        while time.monotonic() < until:
            [kind] = random.choices([*KINDS], [weight for _, weight in KINDS.values()])
            size = 1_000_000 if random.random() < 0.02 else random.choice([3, 30, 3000])
            patience = random.choice([None] * 30 + [0.001, 0.02])  # some callers leave
            await self.ask(kind, random.randbytes(size // 2).hex(), patience)

    async def end_connections(self, admin: str, proxy: Proxy) -> None:
        others = "FROM pg_stat_activity WHERE application_name = 'fuzz' ORDER BY random() LIMIT 1"
        async with await psycopg.AsyncConnection.connect(admin, autocommit=True) as connection:
            while True:
                await asyncio.sleep(random.uniform(0, 0.1))
                ending = random.choice(ENDINGS)
                if ending in ("terminate", "cancel"):
                    await connection.execute(f"SELECT pg_{ending}_backend(pid) {others}".encode())
                else:
                    proxy.end(ending)
                self.outcomes[ending] += 1


@pytest.fixture
def table(database: str) -> Iterator[str]:
    """The database, with a table in which nothing hides that a row was stored twice."""
    value(database, "DROP TABLE IF EXISTS fuzz; CREATE TABLE fuzz (n bigint, text text)")
    yield database
    value(database, "DROP TABLE fuzz")


async def run(database: str) -> Fuzz:
    proxy = Proxy(make_conninfo(database, application_name="fuzz"))
    async with proxy.serve() as way, ConnectionPool(way, max_size=8) as connections:
        pools = [PipelinePool(connections, 3, 16), PipelinePool(connections, 5, 5)]
        fuzz, until = Fuzz(pools), time.monotonic() + SECONDS
        ending = asyncio.create_task(fuzz.end_connections(database, proxy))
        async with asyncio.timeout(SECONDS + 20):  # every future settles
            await asyncio.gather(*[fuzz.call(until) for _ in range(40)])
        ending.cancel()
        proxy.left.clear()
        await asyncio.sleep(1)
        answered = fuzz.outcomes["answered"]
        await asyncio.gather(*[fuzz.ask(kind, "a") for kind in ["read", "write"] * 30])
        assert fuzz.outcomes["answered"] == answered + 60
        await asyncio.sleep(0.3)
        assert not any(pool.queue.waiting or pool.pipelines for pool in pools)
        assert connections.get_stats()["pool_available"] == connections.get_stats()["pool_size"]
    return fuzz


@pytest.mark.slow
def test_whatever_ends_connections_a_write_is_there_once_and_an_answer_is_its_own(
    table: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pgpipeline.pipeline.MAX_HOLD", 2.0)
    monkeypatch.setattr("pgpipeline.connection.MAX_IDLE", 0.2)
    random.seed(SEED)
    fuzz = uvloop.run(run(table))
    print(f"seed {SEED}, at most {fuzz.longest:.1f} s, {dict(fuzz.outcomes)}")
    with psycopg.connect(table) as connection:
        rows = connection.execute("SELECT n, text FROM fuzz").fetchall()
    stored = Counter(n for n, _ in rows)
    assert [n for n, times in stored.items() if times > 1] == []  # nothing is there twice
    assert fuzz.acknowledged - set(stored) == set()
    assert all(fuzz.texts.get(n) == text for n, text in rows)  # and nothing that was wrong
    assert fuzz.longest < 7
    assert fuzz.outcomes["answered"] > 20 * SECONDS
    assert min(fuzz.outcomes[ending] for ending in ENDINGS) > SECONDS / 8
