"""Statements: SQL with named parameters, and the values that are sent with it."""

import hashlib
import re
from uuid import UUID

from pgpipeline.errors import InvalidValue

Value = str | bool | int | float | UUID | list[str] | list[int] | None


class Statement:
    """SQL with %(name)s parameters, which is prepared once on each connection.

        ADD = Statement("ADD", "SELECT %(a)s::integer + %(b)s::integer AS total")

    `name` is shown in logs and traces. A statement that begins with SELECT only reads: it may be
    sent again when its connection is lost. Two percent signs are not an escape here.
    """

    def __init__(self, name: str, text: str) -> None:
        self.name = name
        names = self.parameters = list(dict.fromkeys(re.findall(r"%\((\w+)\)s", text)))
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
        self.prepared_name = f"{self.name}_{digest}_{self.generation}".encode()

    def __repr__(self) -> str:
        return f"<Statement {self.name}>"


def encode(value: Value) -> bytes | None:
    """A value in PostgreSQL's text format. Raises InvalidValue for a text with a NUL."""
    if value is None:
        return None
    text = encode_array(value) if isinstance(value, list) else str(value)
    # A lone surrogate passes here, and PostgreSQL refuses it: its error names the encoding.
    encoded = text.encode(errors="surrogatepass")
    if b"\0" in encoded:  # libpq would send the text up to here
        raise InvalidValue("22021")
    return encoded


def encode_array(values: list[str] | list[int]) -> str:
    """An array literal. Texts are quoted, so that a comma or NULL in one is only a text."""
    quoted = [
        '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
        if isinstance(value, str)
        else str(value)
        for value in values
    ]
    return "{" + ",".join(quoted) + "}"
