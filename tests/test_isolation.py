"""Two users, thousands of random steps, and a model of what each of them has."""

from typing import Any

import httpx
import pytest
from httpx import Response
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    rule,
    run_state_machine_as_test,
)

from conftest import NOBODYS_ID, Server, client

pytestmark = pytest.mark.slow


class TwoUsers(RuleBasedStateMachine):
    """Two users send all kinds of requests for their own and each other's tasks.

    A model holds what each of them has.
    """

    tasks = Bundle("tasks")
    users = st.sampled_from([0, 1])
    letters = st.characters(exclude_characters="\0", exclude_categories=["Cs"])
    texts = st.text(letters, min_size=1, max_size=30)
    roots = st.sampled_from(["/tasks", "/api/me/tasks"])
    words = st.sampled_from(["complete", "toggle"])
    methods = st.sampled_from(["PUT", "PATCH"])
    server: Server
    steps = 0

    def __init__(self) -> None:
        super().__init__()
        self.apis = [client(self.server) for _ in range(2)]
        self.model: list[dict[str, dict[str, Any]]] = [{}, {}]

    def send(self, user: int, method: str, path: str, **options: Any) -> Response:
        TwoUsers.steps += 1
        return self.apis[user].request(method, path, **options)

    def expect(self, user: int, owned: tuple[int, str], response: Response, **change: Any) -> None:
        owner, id = owned
        if user != owner or id not in self.model[owner]:
            assert (response.status_code, response.json()["code"]) == (404, "task_not_found")
            return
        self.model[owner][id] |= change
        shown = response.json()
        assert response.status_code == 200
        assert {name: shown[name] for name in self.model[owner][id]} == self.model[owner][id]

    @rule(target=tasks, user=users, title=texts.map("x".__add__), root=roots)
    def create(self, user: int, title: str, root: str) -> Any:
        response = self.send(user, "POST", root, json={"title": title})
        assert response.status_code == 201
        stored = {"title": title, "description": None, "completed": False}
        self.model[user][response.json()["id"]] = stored
        return (user, response.json()["id"])

    @rule(user=users, owned=tasks, tag=st.sampled_from([None, '"0"', "W/*"]))
    def read(self, user: int, owned: tuple[int, str], tag: str | None) -> None:
        headers = {"If-None-Match": tag} if tag else {}
        self.expect(user, owned, self.send(user, "GET", "/tasks/" + owned[1], headers=headers))

    @rule(user=users, owned=tasks, description=st.none() | texts, method=methods)
    def update(
        self, user: int, owned: tuple[int, str], description: str | None, method: str
    ) -> None:
        body = {"description": description, "user_id": "someone", "id": NOBODYS_ID}
        response = self.send(user, method, "/tasks/" + owned[1], json=body)
        self.expect(user, owned, response, description=description)

    @rule(user=users, owned=tasks, value=st.none() | st.booleans(), word=words)
    def toggle(self, user: int, owned: tuple[int, str], value: bool | None, word: str) -> None:
        mine = self.model[owned[0]].get(owned[1], {"completed": False})
        body = {} if value is None else {"completed": value}
        response = self.send(user, "PATCH", f"/tasks/{owned[1]}/{word}", json=body)
        completed = not mine["completed"] if value is None else value
        self.expect(user, owned, response, completed=completed)

    @rule(user=users, owned=consumes(tasks))
    def delete(self, user: int, owned: tuple[int, str]) -> None:
        response = self.send(user, "DELETE", "/tasks/" + owned[1])
        there = user == owned[0] and self.model[user].pop(owned[1], None) is not None
        assert response.status_code == (200 if there else 404)

    @rule(user=users, completed=st.none() | st.booleans(), limit=st.integers(1, 5))
    def walk(self, user: int, completed: bool | None, limit: int) -> None:
        query: dict[str, Any] = {"limit": limit}
        query |= {} if completed is None else {"completed": completed}
        url, seen = str(httpx.URL("/tasks", params=query)), []
        while url:
            response = self.send(user, "GET", url)
            assert response.status_code == 200
            seen += [task["id"] for task in response.json()]
            url = response.links.get("next", {}).get("url", "")
        mine = self.model[user].items()
        wanted = [id for id, task in mine if completed in (None, task["completed"])]
        assert seen == sorted(wanted, reverse=True)

    def teardown(self) -> None:
        for api in self.apis:
            api.close()


def test_two_users_never_see_each_other_in_thousands_of_random_steps(server: Server) -> None:
    TwoUsers.server = server
    amount = settings(max_examples=120, stateful_step_count=60, deadline=None, database=None)
    run_state_machine_as_test(TwoUsers, settings=amount)
    print(f"{TwoUsers.steps} random steps of two users, 0 leaks, 0 differences")
    assert TwoUsers.steps >= 5000
