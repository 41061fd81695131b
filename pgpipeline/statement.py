"""Statements: SQL with named parameters, and the values that are sent with it."""

import hashlib
import re
from datetime import date, datetime, time
from decimal import Decimal
from enum import Enum
from typing import get_args
from uuid import UUID

from psycopg import DataError, ProgrammingError
from psycopg.adapt import PyFormat, Transformer

from pgpipeline.errors import InvalidValue

adapt = Transformer()
Scalar = str | bool | int | float | Decimal | UUID | date | time  # datetime is a date
Value = Scalar | Enum | list[str] | list[int] | None
# COPY has results without an end. The others are for a session, which is everybody's here.
NO_STATEMENT = re.compile(r"\s*(BEGIN|START|COPY|LISTEN)\b", re.IGNORECASE)
MAX_PARAMETERS = 65_535  # of the protocol
SCALARS = {datetime, *get_args(Scalar)}


class Statement:
    """SQL with %(name)s parameters, which is prepared once on each connection.

        ADD = Statement("ADD", "SELECT %(a)s::integer + %(b)s::integer AS total")

    `name` is shown in logs and traces. A statement whose text begins with SELECT in capitals counts
    as a read: it may be executed again when its connection is lost, with the functions that it
    calls. Two percent signs are not an escape here. Make each once: its text stays prepared on the
    server. Raises ValueError for what cannot share a connection, such as BEGIN.
    """

    def __init__(self, name: str, text: str) -> None:
        self.name = name
        names = self.parameters = list(dict.fromkeys(re.findall(r"%\((\w+)\)s", text)))
        if NO_STATEMENT.match(text) or len(names) > MAX_PARAMETERS:
            raise ValueError(f"{name} is not a statement that can share a connection")
        # The protocol numbers parameters: $1 is the first one.
        numbered = re.sub(r"%\((\w+)\)s", lambda found: f"${names.index(found[1]) + 1}", text)
        self.text = numbered.encode()
        self.reads_only = text.lstrip().startswith("SELECT")
        self.generation = 0
        self.renew()

    def renew(self) -> None:
        """Gives it a new name on the server, so that each connection prepares it again.

        PostgreSQL refuses a prepared statement whose result has changed its columns (0A000). The
        digest tells statements of two releases apart that share a pooler's connections.
        """
        self.generation += 1
        digest = hashlib.sha256(self.text).hexdigest()[:16]
        # PostgreSQL would cut the whole after 63 bytes.
        name = self.name.encode()[:40].decode(errors="ignore")
        self.prepared_name = f"{name}_{digest}_{self.generation}".encode()


def encode(value: Value) -> bytes | None:
    """A value in PostgreSQL's text format. Raises InvalidValue for a text with a NUL."""
    if value is None:
        return None
    if type(value) not in SCALARS:
        return encode_other(value)
    # A lone surrogate passes here, and PostgreSQL refuses it: its error names the encoding.
    encoded = str(value).encode(errors="surrogatepass")
    if b"\0" in encoded:  # libpq would send the text up to here
        raise InvalidValue("22021")
    return encoded


def encode_other(value: Value) -> bytes | None:
    """The value of an Enum's member, or a list. Raises TypeError for what is no Value."""
    if isinstance(value, Enum):
        return encode(value.value)
    if not isinstance(value, list):  # such as bytes, which str() writes as Python does
        raise TypeError(f"{type(value).__name__} is not a type of Value")
    try:  # psycopg quotes the elements
        return bytes(adapt.get_dumper(value, PyFormat.TEXT).dump(value) or b"")
    except (DataError, UnicodeEncodeError):  # a NUL, or a lone surrogate
        raise InvalidValue("22021") from None
    except ProgrammingError as error:  # no dumper for its elements
        raise TypeError(str(error)) from None
