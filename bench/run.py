"""Measures the service against the figures it promises: `python bench/run.py`, or with --quick in half a minute.

It starts all it needs on loopback (a PostgreSQL of its own, the service by its Procfile, a bare FastAPI route, the same
API written the usual way), loads them in turns with wrk, and writes bench/results.md and bench/chart.svg.

Absolute times mean little on a machine that does other work as well. So nearly every figure is a ratio of two loads
that ran one right after the other, and what counts is the median of several rounds.
"""

import argparse
import os
import resource
import shutil
import signal
import sys
import tempfile
from collections import defaultdict
from contextlib import ExitStack
from datetime import date
from pathlib import Path
from statistics import median
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench import report
from bench.report import Figure
from bench.rig import EACH_WAY, RATE_LIMIT, Load, Rig, Server


class Plan(NamedTuple):
    """How much is done."""

    rounds: int
    seconds: int  # of a load
    crowd_seconds: int  # of a load of mixed work: 1,000 connections take a while to arrive
    users: int  # of the large table, with 100 tasks each


FULL, QUICK = Plan(5, 2, 5, 10_000), Plan(1, 1, 2, 1_000)

OPERATIONS = ("GET one task", "list of 100", "create", "toggle")
TABLE_OPERATIONS = (*OPERATIONS, "update", "create and delete")
CROWD = "1,000 connections, mixed work: "
TABLE = "large table against empty: "
FIGURES = {
    "CPU: GET one task": Figure(2.5, 2.0, " floors"),
    "CPU: list of 100": Figure(3.5, 2.75, " floors"),
    "CPU: create": Figure(3.0, 2.3, " floors"),
    "CPU: toggle": Figure(3.0, 2.0, " floors"),
    "throughput against usual: GET one task": Figure(8, 12, "x", at_least=True),
    "throughput against usual: list of 100": Figure(10, 15, "x", at_least=True),
    "throughput against usual: create": Figure(8, 12, "x", at_least=True),
    "throughput against usual: toggle": Figure(8, 12, "x", at_least=True),
    CROWD + "errors": Figure(0, 0, "", over_rounds=sum),
    CROWD + "p99": Figure(500, 300, " ms"),
    CROWD + "CPU per request against 32": Figure(1.25, 1.1, "x"),
    CROWD + "database connections": Figure(8, 4, "", over_rounds=max),
    "peak memory of the service": Figure(100, 85, " MB", over_rounds=max),
    **{TABLE + operation: Figure(1.3, 1.05, "x") for operation in TABLE_OPERATIONS},
    "page 100 against page 1": Figure(1.3, 1.05, "x"),
    "database 5 ms away against local: GET one task": Figure(0.5, 1, "x", at_least=True),
}


class Bench:
    """Runs the rounds and keeps what they gave."""

    def __init__(self, plan: Plan, rig: Rig) -> None:
        self.plan, self.rig = plan, rig
        self.samples: dict[str, list[float]] = defaultdict(list)
        self.rates: dict[tuple[str, str], list[float]] = defaultdict(list)
        self.distant_connections = 0.0

    def run(self) -> None:
        for n in range(self.plan.rounds):
            print(f"round {n + 1} of {self.plan.rounds}", flush=True)
            self.measure_operations()
            self.measure_crowd()
            self.measure_table()
            self.measure_distance()
            self.samples["peak memory of the service"].append(self.rig.service.peak_memory())

    def load(self, server: Server, name: str, connections: int = 32) -> Load:
        return self.rig.load(server, name, self.plan.seconds, connections)

    def measure_operations(self) -> None:
        for operation in OPERATIONS:
            floor = self.load(self.rig.floor, "constant")
            service = self.load(self.rig.service, operation)
            usual = self.load(self.rig.usual, operation)
            self.samples[f"CPU: {operation}"].append(service.cpu / floor.cpu)
            self.samples[f"throughput against usual: {operation}"].append(service.rate / usual.rate)
            for server, load in ("service", service), ("usual", usual), ("floor", floor):
                self.rates[server, operation].append(load.rate)

    def measure_crowd(self) -> None:
        few = self.rig.load(self.rig.service, "mixed", self.plan.crowd_seconds)
        crowd = self.rig.load(self.rig.service, "mixed", self.plan.crowd_seconds, connections=1000)
        self.samples[CROWD + "errors"].append(crowd.errors)
        self.samples[CROWD + "p99"].append(crowd.p99)
        self.samples[CROWD + "CPU per request against 32"].append(crowd.cpu / few.cpu)
        self.samples[CROWD + "database connections"].append(crowd.connections)

    def measure_table(self) -> None:
        """What rows cost is PostgreSQL's time and not the service's: hence by requests per second."""
        for operation in TABLE_OPERATIONS:
            samples = self.samples[TABLE + operation]
            turn = -1 if len(samples) % 2 else 1  # in the one order and the other: writes leave work to who comes next
            loads = [self.load(server, operation) for server in (self.rig.small, self.rig.large)[::turn]][::turn]
            samples.append(loads[0].rate / loads[1].rate)
        ratio = self.load(self.rig.service, "page 1").rate / self.load(self.rig.service, "page 100").rate
        self.samples["page 100 against page 1"].append(ratio)

    def measure_distance(self) -> None:
        local = self.load(self.rig.service, "GET one task", connections=64)
        distant = self.load(self.rig.distant, "GET one task", connections=64)
        self.samples["database 5 ms away against local: GET one task"].append(distant.rate / local.rate)
        self.distant_connections = max(self.distant_connections, distant.connections)

    def rates_of(self, server: str) -> dict[str, float]:
        return {operation: median(self.rates[server, operation]) for operation in OPERATIONS}

    def text(self, arguments: str, busy: float) -> str:
        servers = {"the service": "service", "the usual way": "usual", "floor": "floor"}
        [[postgres]] = self.rig.database.execute("SHOW server_version").fetchall()
        return report.TEXT.format(
            arguments=arguments,
            busy=busy,
            date=date.today().isoformat(),
            machine=report.machine(),
            versions=report.versions(postgres),
            figures=report.figure_table(FIGURES, self.samples),
            rates=report.rate_table({label: self.rates_of(server) for label, server in servers.items()}),
            tasks=100 * self.plan.users,
            rate_limit=RATE_LIMIT,
            each_way=EACH_WAY,
            round_trip=self.rig.round_trip(),
            distant_connections=self.distant_connections,
            errors=self.rig.errors,
            **self.plan._asdict(),
        )


def measure(quick: bool) -> str:
    busy = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as directory, ExitStack() as running:
        rig = Rig(Path(directory), running)
        plan = QUICK if quick else FULL
        rig.prepare(plan.users)
        bench = Bench(plan, rig)
        bench.run()
        text = bench.text(" --quick" if quick else "", busy)
        here = Path(__file__).parent
        (here / "results.md").write_text(text)
        (here / "chart.svg").write_text(report.chart(bench.rates_of("service"), bench.rates_of("usual")))
    return text


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one short round and a smaller table: half a minute")
    quick = parser.parse_args().quick
    if not shutil.which("wrk") or not Path("/proc/self/stat").exists():
        print("bench/run.py needs wrk (apt install wrk) and Linux", file=sys.stderr)
        return 1
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))  # 1,000 connections do not fit in the usual 1,024
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        print("\n" + measure(quick))
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
