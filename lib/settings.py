"""Settings from the environment and from .env, each declared once, in the module that owns it.

    class Settings(BaseSettings):
        jwt_secret: str = ""            # JWT_SECRET

    settings = Settings.load()          # raises SystemExit with one line about a wrong value

The environment wins over .env. White space and quotes around a value are not part of it, because
dashboards, `docker --env-file` and copied lines leave them there. An empty value counts as none.
"""

import re
from pathlib import Path
from typing import Any, Self

import pydantic_settings
from pydantic import ValidationError, ValidationInfo, field_validator


class BaseSettings(pydantic_settings.BaseSettings):
    """The base of a module's settings. A field's name in upper case is the variable's."""

    model_config = pydantic_settings.SettingsConfigDict(
        env_file=Path(__file__).parent.parent / ".env",
        env_file_encoding="utf-8-sig",
        extra="ignore",
        frozen=True,
    )

    @field_validator("*", mode="before")
    @classmethod
    def clean(cls, value: Any, info: ValidationInfo) -> Any:
        if not isinstance(value, str):
            return value
        text = value.strip()
        if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"":
            text = text[1:-1].strip()
        if re.search(r"[\r\n]", re.sub(r"\s*,\s*", ",", text)):  # a list may have one at a comma
            raise ValueError("has a line break in it")
        return text or cls.model_fields[str(info.field_name)].default

    @classmethod
    def load(cls) -> Self:
        """Reads the settings. Raises SystemExit with a line that names the first wrong one.

        The line never has the value, which may be a secret.
        """
        try:
            return cls()
        except ValidationError as error:
            first = error.errors(include_input=False, include_url=False)[0]
            reason = first.get("ctx", {}).get("error") or first["msg"]
            raise SystemExit(f"{str(first['loc'][0]).upper()} {reason}") from None
        except (OSError, UnicodeDecodeError):
            raise SystemExit(".env cannot be read: it has to be a text file in UTF-8") from None
