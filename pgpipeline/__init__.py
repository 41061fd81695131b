"""Statements of many callers share a few PostgreSQL connections. README.md explains how.

ADD = Statement("ADD", "SELECT %(a)s::integer + %(b)s::integer AS total")
async with ConnectionPool(conninfo, max_size=8) as connections:
    pool = PipelinePool(connections, size=2, depth=16)
    result = await pool.execute(ADD, {"a": 1, "b": 2}, tenant="ann")
    result.rows         # [(b"3",)]
    result.json()       # b'{"total":3}'
    await pool.close()
"""

from pgpipeline.connection import ConnectionPool
from pgpipeline.errors import (
    ForeignKeyViolation,
    InvalidValue,
    Unavailable,
    UnexpectedError,
    UniqueViolation,
)
from pgpipeline.pool import PipelinePool
from pgpipeline.result import Result
from pgpipeline.statement import Statement, Value

__all__ = [
    "ConnectionPool",
    "ForeignKeyViolation",
    "InvalidValue",
    "PipelinePool",
    "Result",
    "Statement",
    "Unavailable",
    "UnexpectedError",
    "UniqueViolation",
    "Value",
]
