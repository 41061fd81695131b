"""What an OpenTelemetry collector gets of the service."""

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import psycopg
import pytest
from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceRequest
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from conftest import client, serving

pytestmark = pytest.mark.slow
ERROR = "pgpipeline.errors.UnexpectedError"  # the exception that a missing table causes


class Collector:
    """An OTLP/HTTP endpoint on loopback, with what arrived at it."""

    def __init__(self) -> None:
        self.received: dict[str, list[bytes]] = {
            "/v1/traces": [],
            "/v1/metrics": [],
            "/v1/logs": [],
        }
        received = self.received

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


def test_requests_are_metered_by_route_and_status(collector: Collector) -> None:
    points = collector.points("http.server.request.duration")
    names = ("http.request.method", "http.route", "http.response.status_code")
    seen = {tuple(point[name] for name in names) for point in points}
    assert seen >= {("POST", "/tasks", 201), ("GET", "/tasks", 500)}
    assert ("GET", "/api/{user_id}/tasks/{task_id}", 200) in seen


def test_a_trace_shows_the_time_of_each_statement_by_its_name(collector: Collector) -> None:
    spans = {span.name: span for span in collector.spans()}
    for name, route in {"INSERT_TASK": "POST /tasks", "SELECT_TASKS": "GET /tasks"}.items():
        span = spans[name]
        assert span.trace_id == spans[route].trace_id
        assert 0 < span.end_time_unix_nano - span.start_time_unix_nano < 10**10
        assert plain(span) == {"db.system.name": "postgresql", "db.query.summary": name}


def test_an_error_arrives_as_one(collector: Collector) -> None:
    [error] = [span for span in collector.spans() if span.name == "GET /tasks"]
    assert (plain(error)["error.type"], error.status.code) == ("500", 2)
    assert ERROR in {record.get("exception.type") for record in collector.logs()}


def test_nothing_that_a_user_wrote_reaches_the_collector(collector: Collector) -> None:
    everything = b"".join(body for bodies in collector.received.values() for body in bodies)
    assert b"INSERT_TASK" in everything
    for secret in (SECRET_TITLE.encode(), b"Bearer", b"INSERT INTO"):
        assert secret not in everything
