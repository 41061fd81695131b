"""How long this project lets its files become. The specification is for those who change them."""

from collections.abc import Iterable
from pathlib import Path

from conftest import HERE, service_files

FRONT = service_files()[:4]
LIBRARY = [path for path in service_files()[4:] if path.suffix == ".py"]


def text_of(paths: Iterable[Path]) -> str:
    return "".join((HERE / path).read_text() for path in paths)


def test_the_front_is_read_in_one_sitting() -> None:
    assert {str(path) for path in FRONT} == {"schema.sql", "db.py", "auth.py", "main.py"}
    assert len(text_of(FRONT).splitlines()) <= 1_000
    assert len(text_of(FRONT).encode()) <= 42_000


def test_the_library_does_not_grow() -> None:
    assert len(text_of(LIBRARY).splitlines()) <= 2_020
    assert len(text_of([*FRONT, *LIBRARY]).encode()) <= 128_800
