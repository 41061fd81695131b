"""No pattern of the service takes more than linear time: 4,096 bytes are matched within 5 ms.

Run as a program, this file prints every pattern of the service, found in its syntax trees and while
it is imported. So a pattern that somebody adds is tested without being named here.
"""

import ast
import builtins
import importlib
import itertools
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import pytest
from pydantic import Field, TypeAdapter, ValidationError

HERE = Path(__file__).parent.parent
AT_START = {HERE / "lib/settings.py", HERE / "lib/database_url.py"}  # read what operators write
SECRET = "a secret of the tests, thirty-two bytes and more"
SIZE = 4096  # bytes of an input
MOST = 0.005  # seconds of CPU
FUNCTIONS = ["compile", "match", "fullmatch", "search", "findall", "finditer", "sub", "split"]
SEARCHING = {"search", "findall", "finditer", "sub", "split"}
Patterns = dict[str, list[Any]]
Match = Callable[[str], Any]


class Names(dict[str, Any]):
    """The names of a module. One that is known only while the service runs stands for "x"."""

    def __missing__(self, name: str) -> Any:
        return getattr(builtins, name, "x")


def record_calls(found: list[tuple[str, Any]]) -> None:
    """Makes the functions of `re` note each pattern that a file of the service gives them."""

    def noting(name: str, made: Callable[..., Any]) -> Callable[..., Any]:
        def note(pattern: Any, *rest: Any, **more: Any) -> Any:
            caller = Path(sys._getframe(1).f_code.co_filename)
            if HERE in caller.parents and ".venv" not in caller.parts and caller not in AT_START:
                found.append((name, getattr(pattern, "pattern", pattern)))
            return made(pattern, *rest, **more)

        return note

    for name in FUNCTIONS:
        setattr(re, name, noting(name, getattr(re, name)))


def patterns_in(path: Path) -> Iterator[tuple[str, Any]]:
    """The function and the pattern of each call like re.fullmatch(…) or PATTERN.fullmatch(…)."""
    module = importlib.import_module(".".join(path.relative_to(HERE).with_suffix("").parts))
    for node in ast.walk(ast.parse(path.read_text())):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
            continue
        if node.func.attr in FUNCTIONS and isinstance(node.func.value, ast.Name):
            named = getattr(module, node.func.value.id, None)
            if named is re:
                text = ast.unparse(node.args[0])
                named = eval(text, vars(module), Names(vars(module)))
            if isinstance(named, str | bytes | re.Pattern):
                yield node.func.attr, getattr(named, "pattern", named)


def collect() -> Patterns:
    """The patterns of the service, for Python's engine and for that of pydantic."""
    found: list[tuple[str, Any]] = []
    record_calls(found)
    main = importlib.import_module("main")
    main.app.build_middleware_stack()
    files = [HERE / name for name in ("main.py", "auth.py", "db.py")]
    for folder in ("lib", "pgpipeline"):
        files += [path for path in (HERE / folder).rglob("*.py") if "test" not in path.name]
    for path in set(files) - AT_START:
        found += patterns_in(path)
    found += [("match", route.path_regex.pattern) for route in main.app.routes]
    texts = {(name, each.decode() if isinstance(each, bytes) else each) for name, each in found}
    document = json.dumps(main.app.openapi())
    declared = [
        json.loads(text) for text in re.findall(r'"pattern": ("(?:\\.|[^"\\])*")', document)
    ]
    return {"python": sorted(texts), "pydantic": sorted(set(declared))}


def inputs(pattern: str, size: int) -> Iterator[str]:
    """Texts that repeat what the pattern has, begin as it does, and end as it does not."""
    plain = re.sub(r"\(\?[:=<!imsux]*|\\.|[\^$*+?(){}\[\]|]", "\n", pattern)
    marks = {" ", ",", '"', "a", "0", "/", "-", "=", *re.sub(r"[\s\w]", "", plain)}
    starts = {"", *plain.split("\n")[:2], "".join(plain.split("\n"))}
    for length in (1, 2):
        for pump in map("".join, itertools.product(sorted(marks), repeat=length)):
            for start in starts:
                yield (start + pump * size)[:size] + "\0"


def slowest(pattern: str, match: Match) -> float:
    """The CPU seconds of the worst input. It grows step by step, so that a bad one ends early."""
    worst = 0.0
    for size in [*range(8, 40, 4), 64, 512, SIZE]:
        for text in inputs(pattern, size):
            took = min_time(match, text)
            worst = max(worst, took)
            if worst > MOST:
                return worst
    return worst


def min_time(match: Match, text: str) -> float:
    """The seconds of CPU of a match: the least of three where the first took long."""
    times: list[float] = []
    while len(times) < 3 and (not times or times[-1] > MOST):
        started = time.thread_time()
        match(text)
        times.append(time.thread_time() - started)
    return min(times)


def matcher(function: str, pattern: str) -> Match:
    """How Python matches it. What is only compiled is matched from the start of a text."""
    compiled = re.compile(pattern)
    return compiled.search if function in SEARCHING else compiled.fullmatch


def rust_matcher(pattern: str) -> Match:
    adapter = TypeAdapter(Annotated[str, Field(pattern=pattern)])

    def match(text: str) -> None:
        with suppress(ValidationError):
            adapter.validate_python(text)

    return match


@pytest.fixture(scope="module")
def patterns() -> Patterns:
    environ = os.environ | {"PYTHONPATH": str(HERE), "JWT_SECRET": SECRET}
    environ |= {"DATABASE_URL": "postgresql://u@localhost/x", "CORS_ORIGINS": "https://*.a.example"}
    command = [sys.executable, __file__]
    printed = subprocess.run(command, env=environ, cwd=HERE, capture_output=True, check=True)
    found: Patterns = json.loads(printed.stdout)
    return found


def test_every_pattern_takes_linear_time(patterns: Patterns) -> None:
    assert len(patterns["python"]) > 30
    times = [(slowest(text, matcher(name, text)), text) for name, text in patterns["python"]]
    assert [each for each in times if each[0] > MOST] == []


def test_every_pattern_of_a_field_takes_linear_time(patterns: Patterns) -> None:
    assert len(patterns["pydantic"]) > 3
    times = {pattern: slowest(pattern, rust_matcher(pattern)) for pattern in patterns["pydantic"]}
    assert {pattern: took for pattern, took in times.items() if took > MOST} == {}


if __name__ == "__main__":
    print(json.dumps(collect()))
