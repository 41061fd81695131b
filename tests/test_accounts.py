"""Accounts of the running service: their limits, their spelling, and their end."""

from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest
from httpx import Client

from conftest import (
    Account,
    Server,
    bearer,
    execute,
    new_email,
    post,
    refusal,
    serving,
    serving_by_procfile,
)

TITLE = {"title": "x"}


@pytest.fixture
def deployed(database: str, tmp_path: Path) -> Iterator[Server]:
    with serving_by_procfile(database, tmp_path / "log") as server:
        yield server


def test_the_hop_that_the_platforms_proxy_adds_counts_and_not_the_clients_own(
    deployed: Server,
) -> None:
    account, refused = {"email": new_email(), "password": "wrong"}, ""
    with Client(base_url=deployed.url, timeout=20, verify=False) as public:
        for n in range(101):
            hops = {"X-Forwarded-For": f"9.9.{n}.9, 203.0.113.7, 10.0.0.{n}"}
            refused = public.post("/auth/login", json=account, headers=hops).headers.get(
                "RateLimit-Policy", ""
            )
    assert refused == '"address";q=100;w=60'


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


def test_a_token_that_outlived_its_account_makes_no_owner(
    database: str, public: Client, account: Account
) -> None:
    user = public.post("/auth/login", json=account).json()
    headers, id = bearer(user["access_token"]), user["user"]["id"]
    assert public.post("/tasks", json=TITLE, headers=headers).status_code == 201
    with psycopg.connect(database) as connection:
        connection.execute("DELETE FROM todo.users WHERE id = %s", [id])
        connection.commit()
        assert public.post("/tasks", json=TITLE, headers=headers).status_code == 401
        assert not connection.execute("SELECT 1 FROM todo.users WHERE id = %s", [id]).fetchall()
