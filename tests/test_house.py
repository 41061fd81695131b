"""The style, the sizes and the documents of this repository.

None of it is a promise of the service: a fork may delete this file.
"""

import ast
import re
from collections.abc import Callable
from functools import partial
from graphlib import TopologicalSorter

import pytest
from httpx import Client

from conftest import HERE, SETTINGS, documented_routes, service_files
from tests.test_change import FIELD, changed_text, places
from tests.test_packaging import imports

parametrize = pytest.mark.parametrize


# Documents.

FRONT = ["schema.sql", "db.py", "auth.py", "main.py"]
PYTHON = [str(path) for path in service_files() if path.suffix == ".py"]
LIB = [name for name in PYTHON if name.startswith("lib/")]
PGPIPELINE = [name for name in PYTHON if name.startswith("pgpipeline/")]
LIBRARY = LIB + PGPIPELINE


def text_of(*names: str) -> str:
    return "".join((HERE / name).read_text() for name in names)


def test_env_example_names_exactly_the_variables_that_the_code_reads() -> None:
    parsed = [ast.parse(text_of(name)) for name in [*FRONT[1:], *LIBRARY]]
    classes = [each for file in parsed for each in file.body if isinstance(each, ast.ClassDef)]
    fields = [field for each in classes if each.name == "Settings" for field in each.body]
    declared = {ast.unparse(each.target) for each in fields if isinstance(each, ast.AnnAssign)}
    assert {name.upper() for name in declared} | {"PORT"} == set(SETTINGS)


def test_the_files_that_documents_name_are_there() -> None:
    documents = [*HERE.glob("*.md"), *HERE.glob("docs/*.md"), *HERE.glob("*/README.md")]
    text = "".join(path.read_text() for path in documents)
    named = set(re.findall(r"`((?:lib|tests|docs|bench|pgpipeline)/[\w./-]+\.\w+)`", text))
    assert len(named) > 20
    assert [name for name in named if not (HERE / name).exists()] == []


def test_the_route_tables_are_the_apps(public: Client) -> None:
    roots = {route.replace("/api/{user_id}", "") for route in documented_routes(public)}
    in_main = re.findall(r"^    ([A-Z]+) +(/\S*)", text_of("main.py"), re.M)
    table = "\n".join(re.findall(r"^\| `.*", text_of("README.md"), re.M))
    in_readme = re.findall(r"`([A-Z]+) (/[^`?]*)", table)
    served = {tuple(route.split()) for route in roots}
    assert set(in_main) == served, "main.py: the table at its top differs from its routes"
    assert set(in_readme) == served, "README.md: the table of 'Use it' differs from the routes"


# Style.

ROUTE = r"@([\w.]+\.)?(get|post|put|patch|delete|route)\("
SQL = r"\s*(SELECT|INSERT INTO|UPDATE|DELETE FROM|WITH)\s"
Function = ast.FunctionDef | ast.AsyncFunctionDef


def functions(name: str) -> list[Function]:
    return [node for node in ast.walk(ast.parse(text_of(name))) if isinstance(node, Function)]


def statements(name: str) -> list[int]:
    """The lines of the file on which an SQL statement begins."""
    constants = [node for node in ast.walk(ast.parse(text_of(name))) if type(node) is ast.Constant]
    return [node.lineno for node in constants if re.match(SQL, str(node.value))]


def test_no_line_of_schema_sql_is_over_100_characters() -> None:  # ruff looks at Python's
    assert [line for line in text_of("schema.sql").splitlines() if len(line) > 100] == []


@parametrize("name", PYTHON)
def test_no_function_is_over_30_lines(name: str) -> None:
    found = {each.name: (each.end_lineno or 0) - each.lineno + 1 for each in functions(name)}
    assert [each for each, lines in found.items() if lines > 30] == []


def test_no_test_of_the_specification_is_over_15_lines() -> None:
    tests = [each for each in functions("test_main.py") if each.name.startswith("test_")]
    found = {each.name: (each.end_lineno or 0) - each.body[0].lineno + 1 for each in tests}
    assert [each for each, lines in found.items() if lines > 15] == []


def test_the_first_statement_of_db_stands_by_line_60() -> None:
    assert min(statements("db.py")) <= 60


def test_the_first_route_of_main_stands_by_line_280() -> None:
    lines = text_of("main.py").splitlines()
    assert [line for line in lines[:280] if re.match(ROUTE, line)]


def test_main_holds_no_sql() -> None:
    assert statements("main.py") == []


# Sizes: the front is read in one sitting. A fork may raise them.


def with_field() -> str:
    """The front with the field that CONTRIBUTING shows, so that whoever adds it has room."""
    texts = {name: text_of(name) for name in FRONT}
    for name, *change in places(FIELD):
        if name in texts:
            texts[name] = changed_text(texts[name], *change)
    return "".join(texts.values())


SIZES = [  # the most lines, and the most bytes in UTF-8
    ("the front with CONTRIBUTING's field", with_field, 1_060, 46_080),
    ("lib/", partial(text_of, *LIB), 2_914, 133_699),
    ("pgpipeline/", partial(text_of, *PGPIPELINE), 1_062, 48_298),
]


@parametrize(("part", "read", "lines", "size"), SIZES, ids=[each[0] for each in SIZES])
def test_no_floor_of_the_house_outgrows_its_readers(
    part: str, read: Callable[[], str], lines: int, size: int
) -> None:
    text = read()
    has = (len(text.splitlines()), len(text.encode()))
    sizes = "{} has {:,} lines and {:,} bytes; SIZES in tests/test_house.py allow {:,} and {:,}"
    advice = "shorten it, or raise them if this is your fork"
    fits = has[0] <= lines and has[1] <= size
    assert fits, f"{sizes.format(part, *has, lines, size)}: {advice}"


# Layers.


def test_the_map_of_lib_names_each_of_its_modules() -> None:
    named = re.findall(r"^    ([a-z_]+) ", text_of("lib/__init__.py"), re.M)
    assert sorted(named) == sorted({each[4:-3] for each in LIB} - {"__init__"})


@parametrize("name", LIBRARY)
def test_no_module_imports_what_is_above_it(name: str) -> None:
    outer = {"lib", "fastapi", "starlette"} if name in PGPIPELINE else set[str]()
    above = {"main", "auth", "db"} | outer
    assert {each.partition(".")[0] for each in imports(name)} & above == set()


@parametrize("name", [*FRONT[1:], *LIBRARY])
def test_no_private_name_of_another_package_is_imported(name: str) -> None:
    parts = {part for each in imports(name) for part in each.split(".")}
    assert [part for part in parts if part.startswith("_") and not part.startswith("__")] == []


def test_the_librarys_imports_close_no_circle() -> None:
    modules = {name.removesuffix(".py").replace("/", "."): name for name in LIBRARY}
    graph = {module: imports(name) & set(modules) for module, name in modules.items()}
    TopologicalSorter(graph).prepare()  # raises CycleError


def test_code_that_the_readme_shows_stands_in_the_code() -> None:
    shown = re.findall(r"^```python\n(.*?)^```", text_of("README.md"), re.M | re.S)
    assert shown
    for block in shown:
        assert any(block in text_of(name) for name in FRONT)
