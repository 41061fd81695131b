"""Settings as dashboards, shells and editors leave them."""

from pathlib import Path
from typing import Any, Literal

import pytest
from pydantic_settings import SettingsConfigDict

from lib.cors import cors
from lib.settings import BaseSettings

parametrize = pytest.mark.parametrize


def settings(
    monkeypatch: pytest.MonkeyPatch, environ: dict[str, str], file: Path | None = None
) -> Any:
    """The settings of each kind that these variables, or else this .env, give."""

    class Settings(BaseSettings):
        model_config = SettingsConfigDict(env_file=file)

        a_text: str = "default"
        a_number: int = 1
        a_flag: bool = False
        a_choice: Literal["on", "off"] | None = None

    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    return Settings.load()


@parametrize("around", ["{}", " {}\r\n", "'{}'", '"{}"\n', "' {}'"])
def test_white_space_and_quotes_are_no_part_of_a_value_of_any_kind(
    monkeypatch: pytest.MonkeyPatch, around: str
) -> None:
    given = {"A_TEXT": "it's", "A_NUMBER": "7", "A_FLAG": "true", "A_CHOICE": "on"}
    environ = {name: around.format(value) for name, value in given.items()}
    found = settings(monkeypatch, environ)
    assert (found.a_text, found.a_number, found.a_flag, found.a_choice) == ("it's", 7, True, "on")


@parametrize("given", ["A_TEXT=hunter2\nhunter2", "A_NUMBER=hunter2", "A_CHOICE=hunter2"])
def test_a_wrong_value_is_one_line_without_the_value(
    monkeypatch: pytest.MonkeyPatch, given: str
) -> None:
    name, _, value = given.partition("=")
    with pytest.raises(SystemExit) as raised:
        settings(monkeypatch, {name: value})
    [line] = str(raised.value).splitlines()
    assert line.startswith(f"{name} {'has a line break' if name == 'A_TEXT' else 'Input should'}")
    assert "hunter2" not in line


def test_a_list_may_go_over_several_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    assert settings(monkeypatch, {"A_TEXT": "a,\r\n b,\n"}).a_text == "a,\r\n b,"


def test_a_list_of_origins_may_go_over_several_lines() -> None:
    respond: Any = None
    allowed = cors("https://a.a,\n https://b.b,", "CORS_ORIGINS", respond).args[0]
    assert allowed == ["https://a.a", "https://b.b"]


@parametrize(
    "given",
    [
        "https://app.example/",
        "app.example",
        "https://app.example?x",
        "https://a.example;https://b.example",
        "localhost:3000",
        "https://ok.example, https://u@app.example",
        "https://app.example:99999",
        "https://*.com",
        "https://a.*.example.com",
    ],
)
def test_what_no_browser_sends_as_an_origin_is_one_line_that_names_the_setting(given: str) -> None:
    respond: Any = None
    with pytest.raises(SystemExit) as raised:
        cors(given, "CORS_ORIGINS", respond)
    [line] = str(raised.value).splitlines()
    assert line.startswith("CORS_ORIGINS ")


@parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_a_file_in_utf8_is_read(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, encoding: str
) -> None:
    (tmp_path / ".env").write_bytes("A_TEXT='\xe9'\r\nA_NUMBER=7 \r\n".encode(encoding))
    found = settings(monkeypatch, {}, tmp_path / ".env")
    assert (found.a_text, found.a_number) == ("\xe9", 7)


@parametrize("encoding", ["utf-16", "utf-16-le", "latin-1"])
def test_a_file_in_another_encoding_is_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, encoding: str
) -> None:
    (tmp_path / ".env").write_bytes("# \xe9\nA_TEXT=x\n".encode(encoding))
    with pytest.raises(SystemExit, match=r"\.env cannot be read"):
        settings(monkeypatch, {}, tmp_path / ".env")
