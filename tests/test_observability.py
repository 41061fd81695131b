"""What an operator sees: the log, and what an OpenTelemetry collector gets."""

import errno
import json
import logging
import os
import subprocess
import sys
import threading
from collections import defaultdict
from collections.abc import Iterator
from datetime import datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import psycopg
import pytest
from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceRequest
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.util.re import parse_env_headers

from conftest import HERE, client, serving
from lib import logs

# The log.


def test_lines_that_a_full_disk_refused_are_whole_when_it_has_room_again(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    real, sizes = os.write, iter([10])

    def write(fd: int, data: bytes) -> int:
        size = next(sizes, 0)
        if not size:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(fd, data[:size])

    monkeypatch.setattr(os, "write", write)
    logs.write("INFO", {"message": "x"})
    monkeypatch.undo()
    logs.write("INFO", {"message": "y"})
    written = [json.loads(line)["message"] for line in capfd.readouterr().out.splitlines()]
    assert written == ["x", "y"]


def test_a_line_logged_while_another_is_written_doubles_neither(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    real, messages = os.write, iter("y")

    def write(fd: int, data: bytes) -> int:
        size = real(fd, data)
        for message in messages:  # as the garbage collector or a signal's handler may
            logs.write("INFO", {"message": message})
        return size

    monkeypatch.setattr(os, "write", write)
    logs.write("INFO", {"message": "x"})
    written = [json.loads(line)["message"] for line in capfd.readouterr().out.splitlines()]
    assert written == ["x", "y"]


def test_half_of_a_surrogate_pair_costs_no_line(capfd: pytest.CaptureFixture[str]) -> None:
    logs.write("INFO", {"message": "request", "reason": "no key for \ud800é"})
    line = json.loads(capfd.readouterr().out)
    assert (line["message"], line["reason"]) == ("request", "no key for ?é")
    assert datetime.fromisoformat(line["time"]).tzinfo


def test_processes_that_share_a_pipe_do_not_mix_their_lines() -> None:
    reader, writer = os.pipe()
    ours, theirs, read = logs.Output(writer), logs.Output(writer), b""
    for _ in range(200):
        ours.write("INFO", {"message": "a" * 700})  # of which some wait, because the pipe is full
    for _ in range(20):
        read += os.read(reader, 4096)
        theirs.write(
            "INFO", {"message": "b" * 700}
        )  # which finds room between two parts of the other's
        ours.write("INFO", {"message": "a" * 700})
    os.close(writer)
    while part := os.read(reader, 65_536):
        read += part
    os.close(reader)
    assert {json.loads(line)["message"] for line in read.splitlines()} == {"a" * 700, "b" * 700}


ENDS = {
    "a stop": "",
    "an exception": "raise ValueError",
    "a failed start": "raise NotReady('why')",
    "a signal": "os.kill(os.getpid(), signal.SIGTERM)",
}
END = """
import asyncio, logging, os, signal, sys
from lib import logs, startup
from lib.connect_errors import NotReady

async def start():
    logging.error("the last line")
    print("ending", file=sys.stderr, flush=True)
    {end}

async def stop(): ...

async def main():
    async with startup.lifespan(start, stop)(None): ...
    os._exit(0)  # as uvicorn, which ends by the signal that stopped it

logs.Output.flush.__defaults__ = (60,)
logs.configure()
asyncio.run(main())
"""


@pytest.mark.parametrize("end", ENDS)
def test_a_process_that_ends_waits_a_moment_for_the_reader_of_its_last_lines(end: str) -> None:
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    os.write(writer, b" " * 65_536)  # it is full
    os.set_blocking(writer, True)
    command = [sys.executable, "-c", END.format(end=ENDS[end])]
    with subprocess.Popen(command, cwd=HERE, stdout=writer, stderr=subprocess.PIPE) as process:
        os.close(writer)
        assert process.stderr and process.stderr.readline() == b"ending\n"
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.5)
        with open(reader, "rb") as log:
            lines = log.read().splitlines()
    assert b"the last line" in lines[0]
    assert len(lines) == 1 + (end == "a failed start")  # which says why


def test_what_otel_says_of_a_wrong_header_is_logged_without_the_header(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    log = logging.getLogger("opentelemetry.util.re")
    monkeypatch.setattr(log, "handlers", [logs.JsonHandler()])
    parse_env_headers("Authorization: Bearer hunter2")
    line = capfd.readouterr().out
    assert "Header format invalid" in line and "hunter2" not in line


def test_of_an_exception_and_its_cause_the_types_and_places_are_logged_and_not_the_texts(
    capfd: pytest.CaptureFixture[str],
) -> None:
    try:
        try:
            int("a secret")
        except ValueError as error:
            raise KeyError("a secret") from error
    except KeyError as error:
        info: Any = (KeyError, error, error.__traceback__)
    record = logging.LogRecord("test", logging.ERROR, "", 0, "failed", (), info)
    logs.JsonHandler().emit(record)
    line = capfd.readouterr().out
    fields, place = json.loads(line), "test_observability.py:"
    for part, name in (fields, "KeyError"), (fields["cause"], "ValueError"):
        assert part["exception"] == name and part["trace"][0].startswith(place)
    assert "a secret" not in line


# OpenTelemetry.

ERROR = "pgpipeline.errors.UnexpectedError"  # the exception that a missing table causes


class Collector:
    """An OTLP/HTTP endpoint on loopback, with what arrived at it."""

    def __init__(self) -> None:
        self.received = received = defaultdict[str, list[bytes]](list)  # by path

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                received[self.path].append(self.rfile.read(int(self.headers["Content-Length"])))
                self.send_response(200)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def spans(self) -> list[Any]:
        bodies = self.received["/v1/traces"]
        groups = [g for b in bodies for g in ExportTraceServiceRequest.FromString(b).resource_spans]
        return [span for group in groups for scope in group.scope_spans for span in scope.spans]

    def points(self, name: str) -> list[dict[str, Any]]:
        bodies = self.received["/v1/metrics"]
        requests = [ExportMetricsServiceRequest.FromString(body) for body in bodies]
        scopes = [s for r in requests for group in r.resource_metrics for s in group.scope_metrics]
        metrics = [metric for scope in scopes for metric in scope.metrics if metric.name == name]
        return [plain(point) for metric in metrics for point in metric.histogram.data_points]

    def logs(self) -> list[dict[str, Any]]:
        bodies = self.received["/v1/logs"]
        groups = [g for b in bodies for g in ExportLogsServiceRequest.FromString(b).resource_logs]
        scopes = [scope for group in groups for scope in group.scope_logs]
        return [plain(record) for scope in scopes for record in scope.log_records]


def plain(part: Any) -> dict[str, Any]:
    """The attributes of a span, point or log record."""
    return {each.key: each.value.string_value or each.value.int_value for each in part.attributes}


SECRET_TITLE = "a title that nobody may read in a trace"


@pytest.fixture(scope="module")
def collector(database: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Collector]:
    """A collector with all that one service sent, which served a task, failed once and ended."""
    collector = Collector()
    settings = {"FASTAPI_OTEL_AUTO_CONFIGURE": "true"}
    settings |= {"OTEL_EXPORTER_OTLP_ENDPOINT": collector.url}
    log = tmp_path_factory.mktemp("log") / "log"
    with serving(database, log, **settings) as server, client(server) as api:
        api.post("/tasks", content="x")  # 415, as without a collector
        made = api.post("/tasks", json={"title": SECRET_TITLE})
        assert api.get("/api/me/tasks/" + made.json()["id"]).status_code == 200
        with psycopg.connect(database, autocommit=True) as connection:
            connection.execute("ALTER TABLE todo.tasks RENAME TO tasks_away")
            try:
                assert api.get("/tasks").status_code == 500
            finally:
                connection.execute("ALTER TABLE todo.tasks_away RENAME TO tasks")
    yield collector
    collector.server.shutdown()
    collector.server.server_close()


@pytest.mark.slow
def test_requests_are_metered_by_route_and_status(collector: Collector) -> None:
    points = collector.points("http.server.request.duration")
    names = ("http.request.method", "http.route", "http.response.status_code")
    seen = {tuple(point[name] for name in names) for point in points}
    assert seen >= {("POST", "/tasks", 201), ("POST", "/tasks", 415), ("GET", "/tasks", 500)}
    assert ("GET", "/api/{user_id}/tasks/{task_id}", 200) in seen


@pytest.mark.slow
def test_a_trace_shows_the_time_of_each_statement_by_its_name(collector: Collector) -> None:
    spans = {span.name: span for span in collector.spans()}
    for name, route in {"INSERT_TASK": "POST /tasks", "SELECT_TASKS": "GET /tasks"}.items():
        span = spans[name]
        assert span.trace_id == spans[route].trace_id
        assert 0 < span.end_time_unix_nano - span.start_time_unix_nano < 10**10
        assert plain(span) == {"db.system.name": "postgresql", "db.query.summary": name}


@pytest.mark.slow
def test_an_error_arrives_as_one(collector: Collector) -> None:
    [error] = [span for span in collector.spans() if span.name == "GET /tasks"]
    assert (plain(error)["error.type"], error.status.code) == ("500", 2)
    assert ERROR in {record.get("exception.type") for record in collector.logs()}


@pytest.mark.slow
def test_nothing_that_a_user_wrote_reaches_the_collector(collector: Collector) -> None:
    everything = b"".join(body for bodies in collector.received.values() for body in bodies)
    assert b"INSERT_TASK" in everything
    for secret in (SECRET_TITLE.encode(), b"Bearer", b"INSERT INTO"):
        assert secret not in everything
