"""Parts of schemas that do not depend on what the service is about, and the schemas of accounts.

A field's title and description are the message of a 422. SQLModel serves as pydantic's BaseModel.
"""

import re
from datetime import datetime
from typing import Annotated, Any, Literal
from uuid import UUID

from fastapi import Query
from pydantic import AfterValidator, AliasChoices, BaseModel, Field, StringConstraints
from pydantic_core import core_schema
from sqlmodel import SQLModel

# \s differs between Rust, Python and JavaScript. PostgreSQL stores no \x00.
WHITESPACE = r"\x00-\x20\x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
# The default of a field that a client may leave out. The service reads only the fields that were
# sent (exclude_unset). A plain default would stand in OpenAPI, and clients would send it.
NOT_SENT: Any = Field(default_factory=str)

# Pages of a list.
Limit = Annotated[int, Query(ge=1, le=1000, description="a whole number from 1 to 1000")]
PageNumber = Annotated[int | None, Query(ge=1, le=10**6, description="a whole number from 1")]
Offset = Annotated[int | None, Query(ge=0, le=10**9, description="a whole number to skip",
    validation_alias=AliasChoices("offset", "skip"))]  # fmt: skip
After = Annotated[UUID | None, Query(description="the id of the last one seen")]


def refuse_number(value: Any) -> Any:
    """Raises ValueError for a number or its text: pydantic takes them as seconds from 1970."""
    if isinstance(value, int | float) or re.fullmatch(r"[+-]?[\d.]+", str(value)):
        raise ValueError("has to be a text in the form of ISO 8601")
    return value


def tighten(schema: Any) -> Any:
    """A schema of pydantic's core, changed to take only the types of values that OpenAPI says."""
    for part in schema.values() if isinstance(schema, dict) else schema:
        if isinstance(part, dict | list | tuple):
            tighten(part)
    kind = isinstance(schema, dict) and schema.get("type")
    if kind in ("bool", "int", "float"):
        schema["strict"] = True
    if kind in ("date", "datetime", "time", "timedelta"):  # if strict, these take no text
        schema |= core_schema.no_info_before_validator_function(refuse_number, schema.copy())
    return schema


class Body(SQLModel):
    """A JSON body. A plain SQLModel would take "1" for 1, "yes" for true and 0 for 1970-01-01."""

    __init__ = BaseModel.__init__  # SQLModel's, made for tables, takes 5 us more
    model_dump = BaseModel.model_dump  # and SQLModel's 2 us

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: Any) -> Any:
        return tighten(handler(source))


# Accounts.


# In lower case it is stored, found and counted. It may be longer then, as "İ" becomes.
Email = Annotated[str, StringConstraints(strip_whitespace=True), Field(
    min_length=3, max_length=254, pattern=rf"^[^@{WHITESPACE}]+@[^@{WHITESPACE}]+$", title="E-mail",
    description="needs an @ between two parts without spaces", examples=["ann@example.com"],
), AfterValidator(str.lower), StringConstraints(max_length=254)]  # fmt: skip
Password = Annotated[str, Field(title="Password", min_length=8, max_length=128,
    description="8 to 128 characters", examples=["correct horse"])]  # fmt: skip
AnyPassword = Annotated[str, Field(min_length=1, max_length=1024, examples=["correct horse"],
    description="has to be sent, in up to 1024 characters")]  # fmt: skip


class User(SQLModel):
    """A user. One of an outside issuer has no e-mail here, and no date before the first write."""

    id: str
    email: Email | None
    created_at: datetime | None


class Login(Body):
    """An e-mail, in upper or lower case, and a password."""

    email: Email = Field(validation_alias=AliasChoices("email", "username"))
    password: AnyPassword


class Registration(Login):
    """A new account."""

    password: Password


class PasswordChange(Body):
    """The password of an account, and the one that takes its place."""

    current_password: AnyPassword
    new_password: Password


class Confirmation(Body):
    """The password of an account, which is asked for again."""

    password: AnyPassword


class AccessToken(SQLModel):
    """A token (RFC 6749 section 5.1), good for `expires_in` seconds, and its user."""

    access_token: str
    token_type: Literal["bearer"]
    expires_in: int = Field(examples=[86_400])
    user: User
