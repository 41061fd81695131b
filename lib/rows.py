"""Rows as JSON objects, byte for byte as PostgreSQL's row_to_json() writes them.

columns = columns_of(result)             # a PGresult, once for each statement
to_json(columns, [b"7", b"Buy milk"])    # b'{"id":7,"title":"Buy milk"}', in 2 us
"""

from collections.abc import Callable, Sequence
from json.encoder import encode_basestring
from typing import NamedTuple

from psycopg.pq.abc import PGresult

# By the type's oid; any other type is written as a string.
ENCODERS: dict[int, Callable[[str], str]] = {
    16: {"t": "true", "f": "false"}.__getitem__,  # boolean
    1184: lambda text: f'"{text.replace(" ", "T")}:00"',  # timestamptz, in UTC and DateStyle ISO
    **dict.fromkeys([20, 21, 23, 700, 701, 1700, 114, 3802], str),  # numbers, json, jsonb
}


class Column(NamedTuple):
    """What is written before a value, and how the value is written."""

    key: str
    encode: Callable[[str], str]


def columns_of(result: PGresult) -> list[Column]:
    """The columns of a result, for to_json()."""
    return [
        Column(
            f'"{(result.fname(n) or b"").decode()}":',
            ENCODERS.get(result.ftype(n), encode_basestring),
        )
        for n in range(result.nfields)
    ]


def to_json(columns: Sequence[Column], row: Sequence[bytes | None]) -> bytes:
    """The first columns of a row, as many as `columns`, as an object."""
    members = [
        key + ("null" if value is None else encode(value.decode()))
        for (key, encode), value in zip(columns, row, strict=False)
    ]
    return ("{" + ",".join(members) + "}").encode()


def cut_array(array: bytes, has_surplus: bool, max_size: int) -> tuple[bytes, str | None]:
    """A JSON array of objects, one a line, without its last where that is a surplus, and within a
    size; and the id of the last object where anything was cut. Strings of JSON break no line.
    """
    end = array.rindex(b",\n") if has_surplus else len(array)
    if end > max_size:
        end = max(array.rfind(b",\n", 0, max_size), array.find(b",\n"))
    if end in (-1, len(array)):
        return array, None
    last = array.rfind(b'\n{"id":"', 0, end) + 1 or 1
    return array[:end] + b"]", array[last + 7 : last + 43].decode()
