"""What rows cost: a million tasks against ten thousand, and page 100 of a list against page 1.

SCALE=1 python -m pytest tests/test_scale.py     takes two minutes and needs wrk
"""

import os
from collections.abc import Iterator
from contextlib import ExitStack
from statistics import median

import psycopg
import pytest

from bench.run import OPERATIONS, OTHERS, Bench

pytestmark = pytest.mark.skipif(not os.environ.get("SCALE"), reason="SCALE=1 runs it")
ROUNDS = 5
OWNER = OTHERS[0]  # who owns no tasks but those made here
INSERT_USER = "INSERT INTO todo.users (id) VALUES (%s) ON CONFLICT DO NOTHING"
INSERT_TASKS = """
INSERT INTO todo.tasks (user_id, title)
SELECT %s, 'Buy milk'
FROM generate_series(1, %s)
RETURNING id
"""


@pytest.fixture(scope="module")
def bench() -> Iterator[Bench]:
    """The service twice: "small" has 10,000 tasks, "large" 1,000,000 of 10,000 users."""
    with ExitStack() as running:
        bench = Bench(running, seconds=1)
        bench.start_service("small")
        bench.users = 10_000
        bench.start_service("large")
        yield bench


def read(bench: Bench, name: str, operation: str) -> list[str]:
    return (bench.directory / f"{name} {operation}").read_text().splitlines()


def write(bench: Bench, name: str, operation: str, lines: list[str]) -> None:
    (bench.directory / f"{name} {operation}").write_text("\n".join(lines))


def insert_tasks(bench: Bench, name: str, number: int) -> tuple[str, list[str]]:
    """Gives the owner tasks; returns the owner's token, and the ids from the oldest on."""
    with psycopg.connect(bench.postgres.get_uri(name), autocommit=True) as database:
        database.execute(INSERT_USER, [OWNER])
        ids = [str(id) for (id,) in database.execute(INSERT_TASKS, [OWNER, number]).fetchall()]
    return read(bench, name, "create")[0].split()[2], sorted(ids)


@pytest.mark.parametrize("operation", [*OPERATIONS, "update", "delete"])
def test_a_hundred_times_the_tasks_slow_nothing_by_a_third(bench: Bench, operation: str) -> None:
    ratios = []
    for n in range(ROUNDS):
        rates = {}
        for name in ("small", "large")[:: (-1) ** n]:  # writes leave work to whoever comes next
            if operation == "update":
                toggles = [line.replace("/toggle", "") for line in read(bench, name, "toggle")]
                write(bench, name, "update", [line + ' {"title": "Buy bread"}' for line in toggles])
            if operation == "delete":
                token, ids = insert_tasks(bench, name, 20_000)
                write(bench, name, "delete", [f"DELETE /tasks/{id} {token}" for id in ids])
            load = bench.load(name, operation)
            assert load["errors"] == 0
            rates[name] = load["rate"]
        ratios.append(rates["small"] / rates["large"])
    assert median(ratios) < 1.3, ratios


def test_page_100_costs_what_page_1_does(bench: Bench) -> None:
    token, ids = insert_tasks(bench, "small", 10_001)
    write(bench, "small", "page 1", [f"GET /tasks?limit=100 {token}"])
    write(bench, "small", "page 100", [f"GET /tasks?limit=100&after={ids[-9900]} {token}"])
    pages = "page 1", "page 100"
    rates = [[bench.load("small", page)["rate"] for page in pages] for _ in range(ROUNDS)]
    assert median(first / last for first, last in rates) < 1.3, rates
