"""No pattern of the service takes more than linear time: 4,096 bytes are matched within 5 ms.

The patterns are found in its syntax trees, so one that somebody adds is tested without being named
here. Those of pydantic's fields are left out: Rust's regex takes linear time whatever they are.
"""

import ast
import builtins
import importlib
import itertools
import re
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from conftest import HERE, SECRET, service_files

AT_START = {"lib/settings.py", "lib/database_url.py"}  # read what operators write
SIZE = 4096  # bytes of an input
MOST = 0.005  # seconds of CPU
SEARCHING = {"search", "findall", "finditer", "sub", "split"}
FUNCTIONS = {"compile", "match", "fullmatch", *SEARCHING}
Match = Callable[[str], Any]


class Names(dict[str, Any]):
    """The names of a module. One that is known only while the service runs stands for "x"."""

    def __missing__(self, name: str) -> Any:
        return getattr(builtins, name, "x")


def patterns_in(path: Path) -> Iterator[tuple[str, str]]:
    """The function and the pattern of each call like re.fullmatch(…) or PATTERN.fullmatch(…)."""
    module = importlib.import_module(".".join(path.with_suffix("").parts))
    for node in ast.walk(ast.parse((HERE / path).read_text())):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
            continue
        if node.func.attr in FUNCTIONS and isinstance(node.func.value, ast.Name):
            named = getattr(module, node.func.value.id, None)
            if named is re:
                text = ast.unparse(node.args[0])
                named = eval(text, vars(module), Names(vars(module)))
            pattern = getattr(named, "pattern", named)
            if isinstance(pattern, str | bytes):
                yield node.func.attr, pattern if isinstance(pattern, str) else pattern.decode()


def inputs(pattern: str, size: int) -> Iterator[str]:
    """Texts that repeat what the pattern has, begin as it does, and end as it does not."""
    plain = re.sub(r"\(\?[:=<!imsux]*|\\.|[\^$*+?(){}\[\]|]", "\n", pattern)
    marks = {" ", ",", '"', "a", "0", "/", "-", "=", *re.sub(r"[\s\w]", "", plain)}
    starts = set(itertools.accumulate(plain.split("\n"), initial=""))
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


def test_every_pattern_takes_linear_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATABASE_URL", "postgresql://nobody@127.0.0.1/nothing")
    monkeypatch.setenv("JWT_SECRET", SECRET)
    for module in ("auth", "db", "main"):  # another test may have imported them without these
        monkeypatch.delitem(sys.modules, module, raising=False)
    files = [path for path in service_files() if path.suffix == ".py" and str(path) not in AT_START]
    found = {pattern for path in files for pattern in patterns_in(path)}
    main = sys.modules["main"]
    found |= {("fullmatch", route.path_regex.pattern) for route in main.app.routes}
    found.add(("fullmatch", main.CANONICAL))
    assert len(found) > 50
    times = [(slowest(text, matcher(name, text)), text) for name, text in found]
    assert [each for each in times if each[0] > MOST] == []
