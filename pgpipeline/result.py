"""Results: rows with their columns, and rows as JSON objects.

JSON is written byte for byte as PostgreSQL's row_to_json() writes it, for scalars and the ARRAYS
listed below, so that one object looks the same whoever wrote it. PostgreSQL does it for pages of
rows. It cannot for a RETURNING on Citus, which takes no STABLE function there, so this module does
it for single rows, in 2 us.
"""

from collections.abc import Callable, Iterator
from functools import lru_cache
from json.encoder import encode_basestring
from typing import Any

from psycopg.adapt import Transformer
from psycopg.pq import Format
from psycopg.pq.abc import PGresult

Row = tuple[Any, ...]  # each value as bytes in PostgreSQL's text format, or None for NULL
Encoder = Callable[[str], str]

load_texts = Transformer().get_loader(1009, Format.TEXT).load  # text[] as lists of str


def encode_number(text: str) -> str:
    """A number. JSON has no NaN and no infinity, so those become texts."""
    return f'"{text}"' if text[-1] in "Ny" else text  # NaN, Infinity


def encode_timestamp(text: str) -> str:
    """A timestamp in DateStyle ISO. A time zone is UTC, written with its minutes."""
    return '"' + text.replace(" ", "T", 1).replace("+00", "+00:00", 1) + '"'


def array_of(encode: Encoder) -> Encoder:
    """The encoder of an array whose elements this one encodes."""

    def encode_part(part: Any) -> str:
        if isinstance(part, list):
            return "[" + ",".join(map(encode_part, part)) + "]"
        return "null" if part is None else encode(part)

    return lambda text: encode_part(load_texts(text.encode()))


# By the oid of the type. Every other scalar type is a text to row_to_json() as well.
ENCODERS: dict[int, Encoder] = {
    16: {"t": "true", "f": "false"}.__getitem__,  # boolean
    **dict.fromkeys([20, 21, 23, 700, 701, 1700], encode_number),  # integers, floats, numeric
    **dict.fromkeys([114, 3802], str),  # json, jsonb
    **dict.fromkeys([1114, 1184], encode_timestamp),  # timestamp, timestamptz
}
ARRAYS = {1000: 16, 1005: 21, 1007: 23, 1016: 20, 1021: 700, 1022: 701, 1231: 1700}
ARRAYS |= {1009: 25, 1015: 1043, 2951: 2950, 1182: 1082, 1115: 1114, 1185: 1184}
ENCODERS |= {oid: array_of(ENCODERS.get(element, encode_basestring))
             for oid, element in ARRAYS.items()}  # fmt: skip


@lru_cache(maxsize=1000)
def members_of(columns: tuple[tuple[str, int], ...]) -> list[tuple[str, Encoder]]:
    """For each column, a name and a type's oid, the key and the encoder of its values."""
    return [
        (encode_basestring(name) + ":", ENCODERS.get(oid, encode_basestring))
        for name, oid in columns
    ]


class Result:
    """The rows of an answer. It is falsy without rows, and gives its rows when iterated over.

    The columns travel with their rows: an ALTER TABLE may change them from answer to answer.
    """

    __slots__ = ("columns", "rows")

    def __init__(self, result: PGresult) -> None:
        """Reads a libpq result."""
        numbers, value = range(result.nfields), result.get_value
        self.columns = [((result.fname(n) or b"").decode(), result.ftype(n)) for n in numbers]
        self.rows: list[Row] = [
            tuple([value(r, n) for n in numbers]) for r in range(result.ntuples)
        ]

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def json(self, row: int = 0, stop: int | None = None) -> bytes:
        """A row as a JSON object in UTF-8, of its columns up to the number `stop`."""
        columns = members_of(tuple(self.columns[:stop]))
        members = [
            key + ("null" if value is None else encode(value.decode()))
            for (key, encode), value in zip(columns, self.rows[row], strict=False)
        ]
        return ("{" + ",".join(members) + "}").encode()
