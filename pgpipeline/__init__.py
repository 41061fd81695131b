"""Statements of many callers share a few PostgreSQL connections. README.md explains how.

ADD = Statement("ADD", "SELECT %(a)s::integer + %(b)s::integer AS total")
async with ConnectionPool(conninfo, max_size=8) as connections:
    pool = PipelinePool(connections, size=2, depth=16)
    result = await pool.execute(ADD, {"a": 1, "b": 2}, tenant="ann")
    result.rows         # [(b"3",)]
    result.json()       # b'{"total":3}'
    await pool.close()
"""

from pgpipeline.connection import ConnectionPool as ConnectionPool
from pgpipeline.errors import ForeignKeyViolation as ForeignKeyViolation
from pgpipeline.errors import InvalidValue as InvalidValue
from pgpipeline.errors import Unavailable as Unavailable
from pgpipeline.errors import UnexpectedError as UnexpectedError
from pgpipeline.errors import UniqueViolation as UniqueViolation
from pgpipeline.pool import PipelinePool as PipelinePool
from pgpipeline.result import Result as Result
from pgpipeline.statement import Statement as Statement
from pgpipeline.statement import Value as Value
