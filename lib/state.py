"""What is known of a request while it is served."""

from dataclasses import dataclass

from starlette.types import Scope


@dataclass(slots=True)
class RequestState:
    """RequestLog makes one for each request; state_of() finds it from anywhere inside."""

    headers: dict[bytes, bytes]  # names in lower case; of several lines, one list
    request_id: str
    client: str  # the address of the client, for limits and the log
    body: bytes | bytearray | None  # b"" when none was announced, None until it has been read
    path: str = ""  # as the client wrote it, root path included; set by CanonicalPath
    user_id: str | None = None  # set by auth.current_user
    status: int | None = None  # set when the response starts
    reason: str = ""  # why a request was refused, for the log alone


def state_of(scope: Scope) -> RequestState:
    """The state of a request. Raises KeyError outside RequestLog."""
    state: RequestState = scope["state"]["request"]
    return state
