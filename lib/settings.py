"""Settings from the environment and from .env, each declared once, in the module that owns it.

    class Settings(BaseSettings):
        jwt_secret: str = ""            # JWT_SECRET

    settings = Settings.load()          # raises SystemExit with one line about a wrong value

The environment wins over .env. White space and quotes around a value are not part of it, because
dashboards, `docker --env-file` and copied lines leave them there. An empty value counts as none.
"""

import re
from pathlib import Path
from typing import Annotated, Any, Self
from urllib.parse import urlsplit

import pydantic_settings
from pydantic import AfterValidator, ValidationError, ValidationInfo, field_validator

ENV_FILE = Path(__file__).parent.parent / ".env"
MIN_SECRET = 32  # bytes: RFC 7518 section 3.2 wants a key no shorter than the hash
PLACEHOLDER = re.compile(r"(?i)(change|replace).?(me|this)|your.{0,12}secret|^<.*>$|\$\(")
HOST = r"([^\s/?#@]*@)?(\[[^\s/?#@]+\]|[^\s/?#@:]+)(:[1-9]\d{0,4})?"  # of a URL, with user and port


class BaseSettings(pydantic_settings.BaseSettings):
    """The base of a module's settings. A field's name in upper case is the variable's."""

    model_config = pydantic_settings.SettingsConfigDict(
        env_file=ENV_FILE, env_file_encoding="utf-8-sig", extra="ignore", frozen=True
    )

    # env_ignore_empty would let .env win over an empty value, and str_strip_whitespace keep quotes.
    @field_validator("*", mode="before")
    @classmethod
    def clean(cls, value: Any, info: ValidationInfo) -> Any:
        if not isinstance(value, str):  # a default
            return value
        text = re.sub(r"^(['\"])(.*)\1$", r"\2", value.strip(), flags=re.DOTALL).strip()
        if re.search(r"[\r\n]", re.sub(r"\s*,\s*", ",", text)):  # a list may have one at a comma
            raise ValueError("has a line break in it")
        return text or cls.model_fields[str(info.field_name)].default

    @classmethod
    def load(cls) -> Self:
        """Raises SystemExit with one line that names a wrong setting, and not its value."""
        try:
            return cls()
        except ValidationError as error:
            first = error.errors()[0]
            reason = first["msg"].removeprefix("Value error, ")
            raise SystemExit(f"{str(first['loc'][0]).upper()} {reason}") from None
        except (OSError, UnicodeDecodeError):
            raise SystemExit(".env cannot be read: it has to be a text file in UTF-8") from None


# Types of settings.


def check_secret(secret: str) -> str:
    if secret and len(secret.encode()) < MIN_SECRET:
        raise ValueError(f"is shorter than {MIN_SECRET} bytes: `openssl rand -base64 32` makes one")
    if secret and (PLACEHOLDER.search(secret) or len(set(secret)) == 1):
        raise ValueError("can be guessed: `openssl rand -base64 32` makes one that cannot")
    return secret


Secret = Annotated[str, AfterValidator(check_secret)]


def form(pattern: str, text: str) -> AfterValidator:
    """A validator of a str that has to match a pattern, if it is set: else the error is `text`."""

    def check(value: str) -> str:
        if value.rstrip("/").endswith("/openid-configuration"):
            raise ValueError("is the discovery document: take `jwks_uri` or `issuer` out of it")
        if value and not re.fullmatch(pattern, value, re.ASCII):
            raise ValueError(text)
        urlsplit(value).port  # noqa: B018  raises ValueError above 65535
        return value

    return AfterValidator(check)
