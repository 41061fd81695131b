"""The service behind PgBouncer, which hands server connections from transaction to transaction."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from conftest import Server, client, serving, start
from tests.pgbouncer import PGBOUNCER, needs_pgbouncer, pgbouncer


@needs_pgbouncer
def test_a_pooler_that_mixes_up_prepared_statements_is_refused_with_one_line(
    database: str, tmp_path: Path
) -> None:
    with pgbouncer(database, tmp_path, tracks=0) as url:
        ended = start(url)
    *_, last = (ended.stdout + ended.stderr).splitlines()
    assert "a pooler that mixes up prepared statements" in last
    assert (ended.returncode, "Traceback" in ended.stderr) == (1, False)


@needs_pgbouncer
def test_a_database_that_the_pooler_does_not_know_stops_the_start_at_once(
    database: str, tmp_path: Path
) -> None:
    with pgbouncer(database, tmp_path, tracks=0) as url:
        ended = start(url.replace("/todo_test", "/nowhere"))
    *_, last = (ended.stdout + ended.stderr).splitlines()
    assert '"DATABASE_URL does not work, correct it: ' in last
    assert "no such database: nowhere" in last


@pytest.fixture
def pooled(database: str, tmp_path: Path) -> Iterator[Server]:
    """A service that reaches its database through PgBouncer."""
    if PGBOUNCER < (1, 21):
        pytest.skip("pgbouncer is not installed, or older than 1.21")
    with pgbouncer(database, tmp_path, 100) as url, serving(url, tmp_path / "log") as server:
        yield server


def test_a_pooler_that_tracks_prepared_statements_changes_no_answer(pooled: Server) -> None:
    def use(n: int) -> None:
        api, stranger = (one, other) if n % 2 else (other, one)
        created = api.post("/tasks", json={"title": f"{n}"})
        assert created.status_code == 201
        path = "/tasks/" + created.json()["id"]
        assert api.get(path).json() == created.json()
        assert api.patch(path + "/toggle").json() == api.get(path).json()
        assert stranger.get(path).status_code == 404

    with client(pooled) as one, client(pooled) as other, ThreadPoolExecutor(16) as pool:
        list(pool.map(use, range(300)))
