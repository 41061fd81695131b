"""Results: JSON as PostgreSQL writes it, and columns that belong to their rows."""

import asyncio
from collections.abc import Iterator

import psycopg
import pytest

from pgpipeline import PipelinePool, Statement
from pgpipeline.result import ENCODERS
from pgpipeline.tests.conftest import ask, value

pytestmark = pytest.mark.anyio

NUMBERS = ["NaN", "Infinity", "-Infinity", "0", "-1.5", "1e30"]
WHOLE = ["0", "-7", "32767"]
TIMES = ["2026-11-21 13:15:00.123456", "0044-03-15 12:00:00 BC", "infinity", "-infinity"]
TIMES += ["10000-01-01", "1600-02-29 00:00"]
TEXTS = ["", "null", 'a "b" \\ /', "\t\n\r\b\f\x01\x1f\x7f", "ü 🧀 \u2028", "'"]
JSON = ['{"b": [1,  null], "a": "\\u00fc"}', "null", '"a"', " [1] "]
ARRAYS = ["{}", "{NULL}", "{{1,2},{3,NULL}}", "[0:1]={1,2}"]
TEXT_ARRAYS = ["{}", '{a,NULL,"NULL","a,b","\\"","\\\\","{}",""," "}', "{{a,b},{c,NULL}}"]
VALUES = {
    "boolean": ["t", "f"],
    **dict.fromkeys(["smallint", "integer", "bigint", "oid"], WHOLE[::2]),
    "real": NUMBERS,
    "double precision": NUMBERS,
    "numeric": [*NUMBERS, "0.10"],
    **dict.fromkeys(["text", "varchar"], TEXTS),
    "char(3)": ["a"],
    "json": JSON,
    "jsonb": JSON,
    "uuid": ["0199aaaa-0000-7000-8000-000000000000"],
    "date": ["2026-11-21", "infinity", "0044-03-15 BC"],
    "time": ["13:15:00.1"],
    "timetz": ["13:15:00+02"],
    "interval": ["1 year 2 days 03:04:05.6", "-1 hour"],
    "timestamp": TIMES,
    "timestamptz": [*TIMES, "2026-11-21 13:15:00+05:45"],
    "bytea": ["\\xdeadbeef"],
    "inet": ["192.0.2.1"],
    "mood": ["so so"],
    "int4range": ["[1,3)"],
    **dict.fromkeys(["smallint[]", "integer[]", "bigint[]", "real[]", "numeric[]"], ARRAYS),
    "double precision[]": [*ARRAYS, "{NaN,-Infinity,0.1}"],
    **dict.fromkeys(["text[]", "varchar[]"], TEXT_ARRAYS),
    "boolean[]": ["{t,f,NULL}", "{{t},{f}}"],
    "uuid[]": ["{0199aaaa-0000-7000-8000-000000000000,NULL}"],
    "date[]": ["{2026-11-21,infinity}"],
    "timestamp[]": ["{2026-11-21 13:15:00.5,NULL,infinity,0044-03-15 12:00:00 BC}"],
    "timestamptz[]": ["{2026-11-21 13:15:00.5,NULL,infinity}"],
}


@pytest.fixture
def mood(database: str) -> Iterator[str]:
    """The database with an enum of this name."""
    value(database, "CREATE TYPE mood AS ENUM ('so so')")
    yield database
    value(database, "DROP TYPE mood")


async def test_a_row_is_written_as_row_to_json_writes_it(pool: PipelinePool, mood: str) -> None:
    oids = set[int]()
    for kind, texts in VALUES.items():
        quoted = [text.replace("'", "''") for text in texts]
        row = ", ".join(f"'{text}'::{kind}" for text in quoted)
        row += f""", NULL::{kind} AS "a ""name"" \\ \t" """
        written = await ask(pool, f"SELECT {row}")
        expected = await ask(pool, f"SELECT row_to_json(r)::text FROM (SELECT {row}) AS r")
        assert written.json() == expected.rows[0][0], kind
        oids.add(written.columns[0][1])
    assert set(ENCODERS) <= oids  # each type is among these


async def test_a_row_may_be_written_without_its_last_columns(pool: PipelinePool) -> None:
    result = await ask(pool, "SELECT n AS a, n * n AS b, 0 AS c FROM generate_series(2, 3) AS n")
    assert (len(result), result.json(1, stop=-1)) == (2, b'{"a":3,"b":9}')


async def test_columns_travel_with_their_rows_while_a_table_is_altered(
    pool: PipelinePool, table: str
) -> None:
    select = Statement("SELECT", "SELECT * FROM stored")
    shapes = {b'{"n":1}', b'{"n":1,"m":2}', b'{"n":"1"}', b'{"n":"1","m":2}'}
    seen, ended = set[bytes](), asyncio.Event()

    async def read() -> None:
        while not ended.is_set():
            seen.add((await pool.execute(select, {}, tenant="ann")).json())

    changes = ["ADD m integer DEFAULT 2", "ALTER n TYPE text", "DROP m", "ALTER n TYPE int USING 1"]
    value(table, "INSERT INTO stored VALUES (1)")
    readers = [asyncio.create_task(read()) for _ in range(20)]
    async with await psycopg.AsyncConnection.connect(table, autocommit=True) as connection:
        for change in changes * 5:
            await connection.execute(f"ALTER TABLE stored {change}".encode())
            await asyncio.sleep(0.02)
    ended.set()
    await asyncio.gather(*readers)
    assert seen == shapes
    assert select.generation < 100  # each change costs one name, and not one for each reader
