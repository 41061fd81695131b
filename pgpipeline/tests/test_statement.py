"""Statements: how parameters are numbered, and how values travel."""

import asyncio
import json
import uuid
from datetime import date
from enum import Enum
from typing import Any

import pytest

from pgpipeline import InvalidValue, PipelinePool, Statement, Value
from pgpipeline.tests.conftest import ask


class Color(Enum):
    RED = "red"


pytestmark = pytest.mark.anyio
HARD = ["a,b", 'a "quote"', "NULL", "null", "", " ", "back\\slash", "{}", "{a,b}", "ü\n'", "%(n)s"]


def test_a_parameter_has_one_number_wherever_it_stands() -> None:
    statement = Statement("TEST", "SELECT %(b)s, %(a)s, %(b)s, '100%%'")
    assert statement.text == b"SELECT $1, $2, $1, '100%%'"
    assert statement.parameters == ["b", "a"]


@pytest.mark.parametrize("text", ["a\0b", "\ud800", ["a", "b\0"], ["\udfff"]])
async def test_text_that_postgresql_cannot_hold_is_an_invalid_value(
    pool: PipelinePool, text: Value
) -> None:
    echo = f"SELECT %(v)s::text{'[]' * isinstance(text, list)} AS v"
    usual = "a" if isinstance(text, str) else ["a"]
    calls = [ask(pool, echo, v=each) for each in (usual, text, usual)]
    one, wrong, other = await asyncio.gather(*calls, return_exceptions=True)
    assert isinstance(wrong, InvalidValue)
    assert not isinstance(one, BaseException)
    assert not isinstance(other, BaseException)
    assert json.loads(one.json()) == json.loads(other.json()) == {"v": usual}


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        ("text", "ü 🧀 \\ ' \" \n"),
        ("text", None),
        ("boolean", False),
        ("bigint", -(2**63)),
        ("double precision", 0.1),
        ("uuid", uuid.UUID(int=7)),
        ("date", date(2026, 1, 31)),
        ("text", Color.RED),
        ("text[]", HARD),
        ("text[]", []),
        ("integer[]", [1, -2]),
    ],
)
async def test_a_value_arrives_as_it_is(pool: PipelinePool, kind: str, value: Value) -> None:
    result = await ask(pool, f"SELECT %(v)s::{kind} AS v", v=value)
    sent = str(value) if isinstance(value, uuid.UUID | date) else value
    sent = value.value if isinstance(value, Enum) else sent
    assert json.loads(result.json()) == {"v": sent}


@pytest.mark.parametrize("value", [b"abc", {"a": 1}, [{"a": 1}]])
async def test_what_python_writes_in_its_own_way_is_a_type_error(
    pool: PipelinePool, value: Any
) -> None:
    with pytest.raises(TypeError, match=r"bytes|dict"):
        await ask(pool, "SELECT %(v)s::text", v=value)


async def test_statements_of_one_name_and_two_texts_are_told_apart(pool: PipelinePool) -> None:
    statements = [Statement("x" + "ж" * 40, f"SELECT {n}") for n in (1, 2, 1)]
    results = [await pool.execute(each, {}, "ann") for each in statements]
    assert [result.rows for result in results] == [[(b"1",)], [(b"2",)], [(b"1",)]]


@pytest.mark.parametrize("sql", ["\n begin", "START TRANSACTION", "COPY t TO STDOUT", "LISTEN c"])
def test_what_cannot_share_a_connection_is_no_statement(sql: str) -> None:
    with pytest.raises(ValueError, match="TEST"):
        Statement("TEST", sql)


def test_a_statement_has_as_many_parameters_as_the_protocol_takes() -> None:
    with pytest.raises(ValueError, match="TEST"):
        Statement("TEST", "".join(f"%(p{n})s" for n in range(65_536)))
