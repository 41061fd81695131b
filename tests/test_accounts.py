"""Accounts of the running service: their limits, their spelling, and their end."""

from pathlib import Path

from httpx import Client

from conftest import execute, new_email, post, refusal, serving

TITLE = {"title": "x"}


def test_all_spellings_of_an_email_are_one_account_with_one_limit(public: Client) -> None:
    rest = new_email()
    spellings = [
        "\u0130" + rest,
        "i\u0307" + rest.upper(),
        "I\u0307" + rest,
        "\u0130" + rest.upper(),
    ]
    ann = {"email": spellings[0], "password": "correct horse"}
    assert public.post("/auth/register", json=ann).status_code == 201
    codes = []
    for n in range(12):
        login = {"email": spellings[n % 4], "password": "correct horse" if n < 4 else "wrong"}
        codes.append(public.post("/auth/login", json=login).status_code)
    assert codes == [200] * 4 + [401] * 5 + [429] * 3  # the registration counts


def test_another_unique_violation_does_not_say_that_the_email_is_taken(
    empty: str, tmp_path: Path
) -> None:
    with serving(empty, tmp_path / "log") as server:
        execute(empty, "CREATE UNIQUE INDEX users_only_one ON todo.users ((1))")
        one, other = ({"email": new_email(), "password": "correct horse"} for _ in range(2))
        assert post(server.url + "/auth/register", json=one).status_code == 201
        taken = post(server.url + "/auth/register", json=one)
        refused = post(server.url + "/auth/register", json=other)
        assert refusal(refused, 409, "conflict")
        assert taken.status_code == 409
