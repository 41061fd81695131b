"""Defects that a review proved once. Each test fails when the mechanism that mends one is gone.

The numbers are those of the review.
"""

import asyncio
import hashlib
import json
import os
import signal
import socket
import statistics
import struct
import subprocess
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager, suppress
from datetime import datetime
from pathlib import Path
from threading import Event
from typing import Any

import psutil
import psycopg
import pytest
from fastapi import Request
from httpx import Client, Response
from psycopg.conninfo import make_conninfo
from starlette.responses import PlainTextResponse
from uvicorn.config import Config
from uvicorn.server import ServerState

import auth
import db
from conftest import (
    HERE,
    Account,
    Issuer,
    Play,
    Proxy,
    Server,
    Task,
    bearer,
    client,
    connect,
    copy_service,
    environment,
    execute,
    free_port,
    memory,
    new_email,
    post,
    refusal,
    serving,
    serving_by_procfile,
    status,
    uvicorn,
    wait_for_start,
    wait_until,
)
from lib.protocol import Protocol
from lib.state import RequestState
from pgpipeline import Statement

parametrize = pytest.mark.parametrize
TITLE = {"title": "x"}


def timed(call: Callable[[], Response]) -> tuple[int, float]:
    started = time.monotonic()
    return call().status_code, time.monotonic() - started


def use_all_connections(api: Client) -> None:
    """Makes the service open as many connections as it may."""
    with ThreadPoolExecutor(32) as pool:
        calls = [pool.submit(api.get, "/tasks") for _ in range(64)]
        calls += [pool.submit(api.post, "/tasks", json=TITLE) for _ in range(64)]
        assert all(call.result().is_success for call in calls)


# 1. Dead peers.


@pytest.fixture
def proxy(database: str) -> Iterator[Proxy]:
    with closing(Proxy(database)) as proxy:
        yield proxy


@pytest.fixture
def through_proxy(proxy: Proxy, tmp_path: Path) -> Iterator[Client]:
    with serving(proxy.url, tmp_path / "log") as server, client(server) as api:
        yield api


def test_a_read_finds_a_live_connection_when_all_peers_are_gone_and_the_write_after_it_too(
    through_proxy: Client, proxy: Proxy
) -> None:
    for _ in range(6):
        use_all_connections(through_proxy)
        time.sleep(0.3)  # so that no pipeline holds one
        proxy.forget()
        assert through_proxy.get("/tasks").status_code == 200
        assert through_proxy.post("/tasks", json=TITLE).status_code == 201


def test_a_write_after_a_rest_finds_a_live_connection_when_all_peers_are_gone(
    through_proxy: Client, proxy: Proxy
) -> None:
    use_all_connections(through_proxy)
    time.sleep(0.3)
    proxy.forget()
    time.sleep(16)  # those that rested for 15 s are tested before a write
    assert through_proxy.post("/tasks", json=TITLE).status_code == 201


# 2. Clients that do not read.


@pytest.fixture
def large(database: str, tmp_path: Path) -> Iterator[tuple[Server, Client]]:
    """A service, and a client of a user with 2,000 tasks of 5 KB each."""
    user = uuid.uuid4().hex
    with serving(database, tmp_path / "log") as server, client(server, user) as api:
        execute(
            database,
            f"INSERT INTO todo.users (id) VALUES ('{user}')",
            "INSERT INTO todo.tasks (user_id, title, description) "
            f"SELECT '{user}', n::text, repeat('x', 5000) FROM generate_series(1, 2000) AS n",
        )
        yield server, api


def test_a_page_is_bounded_by_bytes_and_its_links_lead_to_every_task_once(
    large: tuple[Server, Client],
) -> None:
    page, titles = large[1].get("/tasks"), list[str]()
    while True:
        assert len(page.content) <= 1_000_100
        titles += [task["title"] for task in page.json()]
        if "next" not in page.links:
            break
        page = large[1].get(page.links["next"]["url"])
    assert sorted(map(int, titles)) == list(range(1, 2001))


@contextmanager
def deaf_clients(server: Server, api: Client) -> Iterator[set[int]]:
    """66 clients that ask for more pages than the kernel's buffers take, and read none."""
    asked = b"GET /tasks?limit=190 HTTP/1.1\r\nHost: x\r\nAuthorization: %b\r\n\r\n"
    with ExitStack() as stack:
        deaf = [stack.enter_context(socket.socket()) for _ in range(66)]
        for connection in deaf:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.connect(("127.0.0.1", server.port))
            connection.sendall(asked % api.headers["Authorization"].encode() * 9)
        time.sleep(8)  # so that each has got as much as it takes
        yield {connection.getsockname()[1] for connection in deaf}


def test_clients_that_do_not_read_hold_up_nobody_and_are_dropped_after_60_seconds(
    large: tuple[Server, Client],
) -> None:
    server, api = large
    use_all_connections(api)
    before, process = memory(server), psutil.Process(server.process.pid)
    with deaf_clients(server, api) as ports, client(server) as other:
        # A request that finds no slot waits 0.25 s until the limit gives way.
        assert statistics.median(timed(lambda: other.get("/tasks"))[1] for _ in range(20)) < 0.2
        assert memory(server) - before < 200  # each asks for two pages of a megabyte

        def connected() -> set[int]:
            connections = process.net_connections("tcp")
            return ports & {each.raddr.port for each in connections if each.raddr}

        assert connected() == ports
        wait_until(lambda: not connected(), 75)


def test_nothing_holds_a_connection_that_its_client_reset() -> None:
    async def story() -> None:
        config = Config(
            PlainTextResponse("answer"), http=Protocol, timeout_keep_alive=75, log_config=None
        )
        config.load()
        protocol = Protocol(config, ServerState(), {})
        loop = asyncio.get_running_loop()
        async with await loop.create_server(lambda: protocol, "127.0.0.1", 0) as listener:
            reader, writer = await asyncio.open_connection(*listener.sockets[0].getsockname())
            writer.write(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
            await reader.readuntil(b"answer")
            timer = protocol.timeout_keep_alive_task
            assert timer and not timer.cancelled()
            reset = struct.pack("ii", 1, 0)  # SO_LINGER of no seconds
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, reset)
            writer.close()
            await asyncio.sleep(0.3)
            assert timer.cancelled()

    asyncio.run(story())


# 3 to 5. Limits.


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


# 6. Schema changes.

COLUMN = "    description text,\n"


def next_release(folder: Path, *changes: str) -> None:
    """Copies the service with one more column, made by CREATE TABLE, and these changes."""
    copy_service(folder)
    schema, code = folder / "schema.sql", folder / "db.py"
    text = schema.read_text()
    assert COLUMN in text
    schema.write_text("\n".join([text.replace(COLUMN, COLUMN + "    due date,\n"), *changes]))
    shown = '"completed AS is_completed"'
    assert shown in code.read_text()
    code.write_text(code.read_text().replace(shown, f'"due", {shown}'))


@contextmanager
def starting(
    folder: Path, database: str, log: Path
) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    port = free_port()
    with log.open("wb") as output:
        process = subprocess.Popen(
            uvicorn(port), cwd=folder, env=environment(database), stdout=output, stderr=output
        )
    try:
        yield process, port
    finally:
        process.kill()
        process.wait()


def test_a_column_that_existing_tables_lack_stops_the_start_with_one_line(
    empty: str, tmp_path: Path
) -> None:
    with serving(empty, tmp_path / "old"):
        pass
    next_release(tmp_path / "next")
    with starting(tmp_path / "next", empty, tmp_path / "log") as (process, _):
        assert process.wait(60) == 1
    last = json.loads((tmp_path / "log").read_text().splitlines()[-1])
    assert last["message"].startswith("the schema does not fit this release: ")
    assert 'column "due" ' in last["message"]
    assert "Traceback" not in (tmp_path / "log").read_text()


ADD_COLUMN = "ALTER TABLE todo.tasks ADD COLUMN IF NOT EXISTS due date;"
ADD_INDEX = "CREATE INDEX IF NOT EXISTS tasks_due ON todo.tasks (user_id, due);"


def use_for(seconds: float, api: Client, task: str) -> bool:
    """Reads and writes, and accepts no failure. Gives False."""
    stop = time.monotonic() + seconds
    while time.monotonic() < stop:
        assert api.post("/tasks", json=TITLE).status_code == 201
        assert api.patch(task, json=TITLE).status_code == 200
        assert api.get(task).status_code == 200
    return False


def test_the_release_before_writes_on_while_the_next_waits_for_a_lock_and_after_it(
    empty: str, tmp_path: Path
) -> None:
    next_release(tmp_path / "next", ADD_COLUMN, ADD_INDEX)
    log = tmp_path / "log"
    with (
        serving(empty, tmp_path / "old") as old,
        client(old) as api,
        psycopg.connect(empty) as other,
    ):
        task = "/tasks/" + api.post("/tasks", json=TITLE).json()["id"]
        other.execute("LOCK TABLE todo.tasks IN ROW EXCLUSIVE MODE")  # as a long transaction does
        with starting(tmp_path / "next", empty, log) as (process, port):
            wait_until(lambda: use_for(0.2, api, task) or "waits for a lock" in log.read_text())
            use_for(4, api, task)
            other.rollback()
            wait_for_start(process, port, log)
            use_for(1, api, task)


@contextmanager
def in_use(server: Server) -> Iterator[None]:
    """Four users read and write until the block ends, and no request of theirs may fail."""
    ended = Event()

    def use() -> None:
        with client(server) as api:
            task = "/tasks/" + api.post("/tasks", json=TITLE).raise_for_status().json()["id"]
            while not ended.is_set():
                use_for(0.1, api, task)
                assert api.get("/tasks?limit=2").status_code == 200

    with ThreadPoolExecutor(4) as pool:
        users = [pool.submit(use) for _ in range(4)]
        try:
            yield
        finally:
            ended.set()
    for user in users:
        user.result()


def test_a_release_with_a_new_column_and_the_way_back_fail_no_request(
    empty: str, tmp_path: Path
) -> None:
    next_release(tmp_path / "next", ADD_COLUMN, ADD_INDEX)
    log = tmp_path / "log"
    with ExitStack() as first, ExitStack() as second:
        old = first.enter_context(serving(empty, tmp_path / "old"))
        first.enter_context(in_use(old))
        process, port = second.enter_context(starting(tmp_path / "next", empty, log))
        wait_for_start(process, port, log)
        new = Server(port, process, log)
        second.enter_context(in_use(new))
        time.sleep(1)  # both serve
        first.close()
        with serving(empty, tmp_path / "again") as again, in_use(again):
            time.sleep(1)
            second.close()
            time.sleep(1)
        assert old.failures() == new.failures() == again.failures() == []


# 7 to 11. Connections and the pipeline.


def test_a_columns_type_altered_under_prepared_statements_fails_no_request(
    empty: str, tmp_path: Path
) -> None:
    with serving(empty, tmp_path / "log") as server, client(server) as api:
        task = "/tasks/" + api.post("/tasks", json=TITLE).json()["id"]
        for n in range(4):
            use_all_connections(api)
            kind = ("varchar(600)", "text")[n % 2]
            execute(empty, f"ALTER TABLE todo.tasks ALTER COLUMN title TYPE {kind}")
            assert api.get(task).status_code == 200
            assert api.patch(task, json=TITLE).status_code == 200
            assert api.post("/tasks", json=TITLE).status_code == 201
        assert server.failures() == []


@parametrize("broken", ["no reader", "a full disk"])
def test_a_log_that_cannot_be_written_fails_no_request(database: str, broken: str) -> None:
    port, full = free_port(), os.open("/dev/full", os.O_WRONLY)
    reader, writer = os.pipe()
    output = full if broken == "a full disk" else writer
    process = subprocess.Popen(
        uvicorn(port), cwd=HERE, env=environment(database), stdout=output, stderr=output
    )
    for descriptor in (full, reader, writer):
        os.close(descriptor)
    try:
        wait_for_start(process, port)
        with client(Server(port, process, Path())) as api:
            use_all_connections(api)
            assert {api.get("/tasks").status_code for _ in range(50)} == {200}
            assert api.get("/tasks", headers={"Authorization": ""}).status_code == 401
    finally:
        process.kill()
        process.wait()


def read_until(api: Client, stop: float) -> set[int]:
    codes = set()
    while time.monotonic() < stop:
        codes.add(api.get("/tasks").status_code)
    return codes


@pytest.mark.usefixtures("server")
def test_with_two_connections_busy_readers_leave_one_to_writers(
    database: str, tmp_path: Path
) -> None:
    role = "two" + uuid.uuid4().hex
    execute(database, f"CREATE ROLE {role} LOGIN SUPERUSER", f"ALTER ROLE {role} NOSUPERUSER")
    execute(
        database,
        f"GRANT USAGE ON SCHEMA todo TO {role}",
        f"GRANT ALL ON todo.users, todo.tasks TO {role}",
        f"ALTER ROLE {role} CONNECTION LIMIT 2",
    )
    with (
        serving(make_conninfo(database, user=role), tmp_path / "log") as server,
        client(server) as api,
        ThreadPoolExecutor(16) as pool,
    ):
        stop = time.monotonic() + 6
        readers = [pool.submit(read_until, api, stop) for _ in range(12)]
        writes = [timed(lambda: api.post("/tasks", json=TITLE)) for _ in range(10)]
        assert {code for code, _ in writes} == {201}
        assert max(seconds for _, seconds in writes) < 3
        assert set().union(*[reader.result() for reader in readers]) == {200}
    execute(database, f"DROP OWNED BY {role}", f"DROP ROLE {role}")


def test_a_lone_write_waits_for_a_lock_longer_than_the_statements_timeout(
    database: str, api: Client, task: Task
) -> None:
    with psycopg.connect(database) as other, ThreadPoolExecutor(1) as pool:
        other.execute("SELECT 1 FROM todo.tasks WHERE id = %s FOR UPDATE", [task["id"]])
        waiting = pool.submit(api.patch, f"/tasks/{task['id']}/toggle")
        time.sleep(1.8)
        other.rollback()
        assert waiting.result().status_code == 200


def test_one_users_slow_pages_go_one_at_a_time_and_leave_others_a_connection(
    play: Play,
) -> None:
    slow = Statement("SLOW", "SELECT %(user_id)s::text FROM pg_sleep(0.4)")
    fast = Statement("FAST", "SELECT %(user_id)s::text")

    async def load_page_after_page() -> None:
        while True:
            assert (await db.fetch(slow, user_id="slow")).rows == [(b"slow",)]

    async def story() -> None:
        loads, seconds = [asyncio.create_task(load_page_after_page()) for _ in range(6)], []
        await asyncio.sleep(1)  # by then the user is known to be slow
        for n in range(40):
            await asyncio.sleep(0.05)
            started = time.monotonic()
            assert (await db.fetch(fast, user_id=f"{n}")).rows == [(f"{n}".encode(),)]
            seconds.append(time.monotonic() - started)
        assert statistics.quantiles(seconds, n=10)[-1] < 1
        assert not any(load.done() for load in loads)
        for load in loads:
            load.cancel()

    play(story)


# 12. Uploads.


def upload(server: Server, authorization: str) -> socket.socket:
    """Sends a body that is one byte short of the largest."""
    head = f"POST /tasks HTTP/1.1\r\nHost: x\r\n{authorization}Content-Length: 131072\r\n"
    connection = connect(server)
    head += "Content-Type: application/json\r\n\r\n"
    with suppress(OSError):  # it was answered and closed before
        connection.sendall(head.encode() + b" " * 131_071)
    return connection


def answer(connection: socket.socket) -> bytes:
    try:
        return connection.recv(12)[9:]
    except OSError:
        return b"reset"


def test_uploads_without_a_token_are_refused_before_their_bodies_and_take_no_memory(
    server: Server,
) -> None:
    before, started = memory(server), time.monotonic()
    with ThreadPoolExecutor(32) as pool:
        connections = list(pool.map(lambda _: upload(server, ""), range(1000)))
    assert {answer(each) for each in connections} <= {b"401", b"reset"}
    assert time.monotonic() - started < 9  # and not when the bodies time out
    assert memory(server) - before < 30
    for connection in connections:
        connection.close()


def test_bodies_under_way_have_a_common_bound(server: Server, api: Client) -> None:
    before, authorization = memory(server), f"Authorization: {api.headers['Authorization']}\r\n"
    with ThreadPoolExecutor(32) as pool:
        connections = list(pool.map(lambda _: upload(server, authorization), range(600)))
    time.sleep(1)
    assert memory(server) - before < 90  # 600 bodies are 79 MB, each in up to three copies
    assert api.get("/tasks").status_code == 200
    codes = [answer(each) for each in connections]
    assert 100 < codes.count(b"503") + codes.count(b"reset") < 500
    assert codes.count(b"408") > 100
    for connection in connections:
        connection.close()


# 14 to 17. Times and identity.


def test_updated_at_never_goes_back_while_the_version_advances(
    database: str, api: Client, task: Task
) -> None:
    later = "UPDATE todo.tasks SET updated_at = clock_timestamp() WHERE id = %s "
    later += "RETURNING updated_at"
    with psycopg.connect(database) as other, ThreadPoolExecutor(2) as pool:
        other.execute("SELECT 1 FROM todo.tasks WHERE id = %s FOR UPDATE", [task["id"]])
        waiting = [
            pool.submit(api.patch, f"/tasks/{task['id']}/toggle"),
            pool.submit(api.patch, f"/tasks/{task['id']}", json=TITLE),
        ]
        time.sleep(0.5)  # their transactions have begun, and with them now()
        [(written,)] = other.execute(later, [task["id"]]).fetchall()
        other.commit()
        times = [call.result().json()["updated_at"] for call in waiting]
    assert min(datetime.fromisoformat(each) for each in times) >= written


def test_an_issuers_user_with_the_id_of_an_account_reads_none_of_its_tasks(
    database: str, issuer: Issuer, tmp_path: Path
) -> None:
    with serving(database, tmp_path / "log", JWT_JWKS_URL=issuer.url) as server:
        ann = {"email": new_email(), "password": "correct horse"}
        account = post(server.url + "/auth/register", json=ann).json()
        assert status(server, account["access_token"]) == 200
        assert status(server, issuer.token(sub=account["user"]["id"])) == 401
        assert status(server, issuer.token(sub="a user of the issuer")) == 200


def test_with_better_auths_secret_alone_nobody_can_register(database: str, tmp_path: Path) -> None:
    secret = os.environ.get("NOTHING") or "a secret of Better Auth, thirty-two bytes and more"
    with serving(database, tmp_path / "log", JWT_SECRET="", BETTER_AUTH_SECRET=secret) as server:
        ann = {"email": new_email(), "password": "correct horse"}
        for name in ("register", "login", "token"):
            assert post(f"{server.url}/auth/{name}", json=ann).status_code == 404


def test_a_header_sent_twice_leaves_the_token_cache_on(monkeypatch: pytest.MonkeyPatch) -> None:
    verified = 0

    async def verify(_: str) -> dict[str, Any]:
        nonlocal verified
        verified += 1
        return {auth.USER_CLAIM: "u", "exp": time.time() + 60}

    monkeypatch.setattr(auth, "verify", verify)
    sent = uuid.uuid4().hex.encode()
    headers = [(b"x", b"1"), (b"authorization", b"Bearer " + sent), (b"x", b"2")]
    for _ in range(3):
        state = RequestState({}, "id", "192.0.2.1", b"")
        scope: Any = {"type": "http", "headers": headers, "state": {"request": state}}
        assert asyncio.run(auth.current_user(Request(scope))) == state.user_id == "u"
    assert verified == 1


# 18. Preconditions.


def ask(api: Client, method: str, path: str, *headers: tuple[str, str]) -> int:
    body = None if method == "GET" else TITLE
    sent = [("Authorization", api.headers["Authorization"]), *headers]
    return api.request(method, path, headers=sent, json=body).status_code


def test_a_put_that_wants_none_to_be_there_is_412_and_changes_nothing(
    api: Client, task: Task
) -> None:
    path = "/tasks/" + task["id"]
    assert ask(api, "PUT", path, ("If-None-Match", "*")) == 412
    assert api.get(path).json() == task


def test_a_read_of_another_version_is_412(api: Client, task: Task) -> None:
    path = "/tasks/" + task["id"]
    etag = api.get(path).headers["etag"]
    assert ask(api, "GET", path, ("If-Match", etag)) == 200
    assert ask(api, "GET", path, ("If-Match", '"0-00000000"')) == 412


@parametrize("method", ["PUT", "PATCH", "DELETE"])
def test_only_the_whole_entity_tag_matches(api: Client, task: Task, method: str) -> None:
    path = "/tasks/" + task["id"]
    etag = api.get(path).headers["etag"]
    version = etag.strip('"').partition("-")[0]
    for wrong in (f'"{version}"', version, "W/" + etag, etag.strip('"'), f'"0{etag[1:]}'):
        assert ask(api, method, path, ("If-Match", wrong)) == 412, wrong


def test_several_lines_of_a_condition_are_one_list(api: Client, task: Task) -> None:
    path = "/tasks/" + task["id"]
    etag = api.get(path).headers["etag"]
    lines = [(name, tag) for name in ("If-None-Match", "If-Match") for tag in ('"x"', etag)]
    assert ask(api, "GET", path, *lines[:2]) == ask(api, "GET", path, *lines[1::-1]) == 304
    assert ask(api, "PATCH", path, *lines[2:]) == 200


def test_a_tasks_etag_names_the_form_of_the_answer(api: Client, task: Task) -> None:
    etag = api.get("/tasks/" + task["id"]).headers["etag"]
    assert etag == f'"1-{db.SHAPE}"'
    assert hashlib.sha256(db.COLUMNS.encode()).hexdigest().startswith(db.SHAPE)


def test_two_tasks_that_swap_their_titles_change_the_lists_etag(api: Client) -> None:
    one, other = (api.post("/tasks", json={"title": title}).json()["id"] for title in "ab")
    etag = api.get("/tasks").headers["etag"]
    api.patch("/tasks/" + one, json={"title": "b"})
    api.patch("/tasks/" + other, json={"title": "a"})
    assert ask(api, "GET", "/tasks", ("If-None-Match", etag)) == 200


# 19 and 20. Accounts.


def test_another_unique_violation_does_not_say_that_the_email_is_taken(
    empty: str, tmp_path: Path
) -> None:
    with serving(empty, tmp_path / "log") as server:
        execute(empty, "CREATE UNIQUE INDEX users_only_one ON users ((1))")
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


# 21 to 25.


@parametrize("silent", [False, True])
def test_ctrl_c_ends_a_start_that_waits_for_its_database(tmp_path: Path, silent: bool) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1] if silent else free_port()
        url = f"postgresql://app@127.0.0.1:{port}/absent"
        with starting(HERE, url, tmp_path / "log") as (process, _):
            wait_until(lambda: "Waiting for application startup" in (tmp_path / "log").read_text())
            time.sleep(1)
            process.send_signal(signal.SIGINT)
            process.wait(3)


def test_after_deallocate_all_statements_are_prepared_again(play: Play) -> None:
    nothing = "WITH nothing AS (SELECT 1) SELECT"
    echo = Statement("ECHO", f"{nothing} %(n)s::integer FROM nothing")
    listed = Statement(
        "LISTED", f"{nothing} count(*) FROM pg_prepared_statements WHERE name ~ 'ECHO'"
    )
    forget = Statement("FORGET", "DEALLOCATE ALL")

    async def story() -> None:
        assert (await db.fetch(echo, n=1)).rows == [(b"1",)]
        await db.fetch(forget)
        assert (await db.fetch(echo, n=2)).rows == [(b"2",)]
        assert (await db.fetch(listed)).rows == [(b"1",)]

    play(story)


def test_answers_that_lay_ready_while_the_process_was_paused_are_given(
    database: str, server: Server, api: Client, task: Task
) -> None:
    path = f"/tasks/{task['id']}/toggle"
    with psycopg.connect(database) as other, ThreadPoolExecutor(6) as pool:
        other.execute("SELECT 1 FROM todo.tasks WHERE id = %s FOR UPDATE", [task["id"]])
        waiting = [pool.submit(api.patch, path) for _ in range(6)]
        time.sleep(0.3)
        server.process.send_signal(signal.SIGSTOP)
        other.rollback()
        time.sleep(6)
        server.process.send_signal(signal.SIGCONT)
        assert [each.result().status_code for each in waiting] == [200] * 6


@parametrize("user", ["a/b", "https://issuer.example/users/1", "a%2Fb", "/"])
def test_a_user_id_with_a_slash_takes_me_for_its_path(server: Server, user: str) -> None:
    with client(server, user) as api:
        made = api.post("/api/me/tasks", json=TITLE)
        assert made.status_code == 201
        assert api.get(made.headers["location"]).json() == made.json()


def test_however_many_ask_whether_it_is_ready_the_database_is_asked_once_in_5_seconds(
    through_proxy: Client, proxy: Proxy
) -> None:
    assert through_proxy.get("/health/ready").status_code == 200
    before = proxy.sent
    assert {through_proxy.get("/health/ready").status_code for _ in range(200)} == {200}
    assert proxy.sent == before
    time.sleep(5.5)
    assert through_proxy.get("/health/ready").status_code == 200
    assert proxy.sent > before
