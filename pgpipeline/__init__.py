"""Statements of many callers share a few PostgreSQL connections. README.md has an example."""

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
