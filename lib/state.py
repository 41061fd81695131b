"""What is known of a request while it is served."""

from dataclasses import dataclass

from starlette.types import Scope


@dataclass(slots=True)
class RequestState:
    """RequestLog makes one for each request; state_of() finds it from anywhere inside."""

    headers: dict[bytes, bytes]  # names in lower case; of several lines, one list
    request_id: str
    client: str  # the address of the client, for limits and the log
    body: bytes | None  # None: announced, but not read yet. b"" also where none was announced
    path: str = ""  # as the client wrote it, with the root path; set by lib.paths
    user_id: str | None = None  # set by whoever verifies the token
    status: int | None = None  # set when the response starts
    reason: str = ""  # why a request was refused, for the log alone


def state_of(scope: Scope) -> RequestState:
    """The state of a request. Raises KeyError unless RequestLog is outside of the caller."""
    return scope["state"]["request"]  # type: ignore[no-any-return]
