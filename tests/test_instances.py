"""Two instances of the service on one database, with one Redis."""

import subprocess
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from conftest import Server, serving, status, token

pytestmark = pytest.mark.slow


@pytest.fixture
def two_instances(
    database: str, redis: tuple[str, subprocess.Popen[bytes]], tmp_path: Path
) -> Iterator[tuple[Server, Server]]:
    """Two instances of the service on one database, which count in one Redis."""
    settings = {"RATE_LIMIT": "10/hour", "RATE_LIMIT_STORAGE_URI": redis[0]}
    first = serving(database, tmp_path / "1", **settings)
    with first as one, serving(database, tmp_path / "2", **settings) as other:
        yield one, other


def test_two_instances_share_one_limit_by_redis(two_instances: tuple[Server, Server]) -> None:
    one, other = two_instances
    mine, somebodys = token("u" + uuid.uuid4().hex), token("u" + uuid.uuid4().hex)
    codes = [status(instance, mine) for _ in range(8) for instance in (one, other)]
    assert codes == [200] * 10 + [429] * 6
    assert status(other, somebodys) == 200


def test_while_redis_is_down_each_instance_counts_by_itself_and_nobody_fails(
    two_instances: tuple[Server, Server], redis: tuple[str, subprocess.Popen[bytes]]
) -> None:
    user = token(uuid.uuid4().hex)
    assert status(two_instances[0], user) == 200
    redis[1].kill()
    redis[1].wait()
    codes = [status(instance, user) for _ in range(12) for instance in two_instances]
    assert codes == [200] * 20 + [429] * 4
