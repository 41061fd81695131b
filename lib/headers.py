"""What routes take from headers, and a Link: conditional requests, Idempotency-Key, next pages."""

import re
from collections.abc import Iterable
from functools import partial
from itertools import islice, pairwise
from typing import Annotated, NamedTuple
from urllib.parse import urlencode

from fastapi import Depends, Header, Request, Response
from pydantic import AfterValidator, WithJsonSchema

from lib.paths import client_path
from lib.problems import HTTPProblem

TAG = r'(?:W/)?"[!#-~\x80-\xff]*"'
# Possessive (`*+`): white space between commas matches one way only, so that it takes linear time.
TAGS = re.compile(rf"(?:{TAG})?(?:[ \t]*+,[ \t]*+(?:{TAG})?)*+")
KEY = r'"([!#-~]{1,255})"|([!#-~][!-~]{0,254})'  # of an Idempotency-Key, in quotes or without

precondition_failed = partial(HTTPProblem, 412, "It has been changed since")


class Conditions(NamedTuple):
    """The entity tags of If-Match and If-None-Match (RFC 9110 section 13); None without one."""

    match: list[str] | None = None
    none_match: list[str] | None = None

    def versions(self, shape: str) -> str | None:
        """The versions that may be written, as int8multirange: {[2,2],[4,4]} for If-Match "2-s",
        "4-s" and shape s. None: any. If-Match compares strongly (a weak tag is no version),
        If-None-Match weakly."""
        if self.none_match == ["*"]:
            return "{}"
        refused = numbers((tag.removeprefix("W/") for tag in self.none_match or ()), shape)
        if self.match is not None and self.match != ["*"]:
            wanted = numbers(self.match, shape) - refused
            return "{" + ",".join(f"[{version},{version}]" for version in wanted) + "}"
        bounds = ["", *sorted(refused), ""]
        gaps = ",".join(f"({low},{high})" for low, high in pairwise(bounds))
        return "{" + gaps + "}" if refused else None

    def respond(self, json: bytes, etag: str, headers: dict[str, str]) -> Response:
        """200, or 304 where the client has it already. Raises HTTPProblem(412)."""
        if self.match is not None and self.match != ["*"] and etag not in self.match:
            raise precondition_failed()
        headers["ETag"] = etag
        known = [tag.removeprefix("W/") for tag in self.none_match or ()]
        if known == ["*"] or etag in known:
            return Response(None, 304, headers)
        return Response(json, 200, headers, "application/json")


def numbers(tags: Iterable[str], shape: str) -> set[int]:
    """The versions in entity tags like "version-shape"."""
    found = (re.fullmatch(rf'"([1-9]\d{{0,17}})-{re.escape(shape)}"', tag) for tag in tags)
    return {int(each[1]) for each in found if each}


def parse_tags(value: str | None) -> list[str] | None:
    """The tags of a list. What is no list of entity tags matches nothing."""
    if value is None:
        return None
    if value == "*":
        return ["*"]
    return re.findall(TAG, value) if TAGS.fullmatch(value) else []


async def read_conditions(
    if_match: Annotated[str | None, Header(alias="If-Match", max_length=4096)] = None,
    if_none_match: Annotated[str | None, Header(alias="If-None-Match", max_length=4096)] = None,
) -> Conditions:
    """A dependency: what IfConditions gives."""
    return Conditions(parse_tags(if_match), parse_tags(if_none_match))


def check_key(sent: str | None) -> str | None:
    """The key without its quotes. Raises HTTPProblem(400)."""
    if sent is None:
        return None
    key = re.fullmatch(KEY, sent)
    if not key:
        raise HTTPProblem(400, "An Idempotency-Key has 1 to 255 visible characters")
    return key[1] or key[2]


IfConditions = Annotated[Conditions, Depends(read_conditions)]
IdempotencyKey = Annotated[str | None, Header(alias="Idempotency-Key"), AfterValidator(check_key),
    WithJsonSchema({"type": "string", "pattern": f"^({KEY})$"}),
]  # fmt: skip


def next_link(request: Request, last_id: str) -> str:
    """Link to what follows `last_id`: the request's path and query, with `after` for the place."""
    place = ("after", "offset", "skip", "page")
    sent = (urlencode([each]) for each in request.query_params.items() if each[0] not in place)
    kept = islice((each for each in sent if len(each) <= 100), 20)  # fits a proxy's buffer
    return f'<{client_path(request)}?{"&".join([*kept, f"after={last_id}"])}>; rel="next"'
