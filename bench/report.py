"""Turns what was measured into Markdown and a chart."""

import os
import platform
import re
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import NamedTuple

PACKAGES = ("fastapi", "starlette", "uvicorn", "psycopg", "sqlmodel", "SQLAlchemy")


class Figure(NamedTuple):
    """What is promised, most of it as a ceiling, and how it follows from the rounds."""

    must: float
    aim: float
    unit: str
    at_least: bool = False
    over_rounds: Callable[[list[float]], float] = median


def figure_table(figures: Mapping[str, Figure], samples: Mapping[str, list[float]]) -> str:
    lines = ["| what | must | aim | measured | rounds | |", "|---|--:|--:|--:|--:|---|"]
    for what, figure in figures.items():
        measured = figure.over_rounds(samples[what])
        kept = measured >= figure.must if figure.at_least else measured <= figure.must
        low, high = min(samples[what]), max(samples[what])
        line = f"| {what} | {figure.must:g}{figure.unit} | {figure.aim:g} | **{measured:.3g}** |"
        lines.append(f"{line} {low:.3g} to {high:.3g} | {'ok' if kept else 'MISSED'} |")
    return "\n".join(lines)


def rate_table(rates: Mapping[str, Mapping[str, float]]) -> str:
    """Requests per second, by server and operation."""
    operations = next(iter(rates.values()))
    lines = [f"| requests per second | {' | '.join(operations)} |", "|---" + "|--:" * len(operations) + "|"]
    for server, by_operation in rates.items():
        lines.append(f"| {server} | {' | '.join(f'{rate:,.0f}' for rate in by_operation.values())} |")
    return "\n".join(lines)


def machine() -> str:
    model = re.search(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text())
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{os.cpu_count()} cores ({model[1] if model else platform.machine()}), {memory:.0f} GB of memory"


def versions(postgres: str) -> str:
    packages = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
    return f"Python {platform.python_version()}, PostgreSQL {postgres}, {packages}"


TEXT = """# Results

Of `python bench/run.py{arguments}` on {date}: {machine}, load average {busy:.1f} before the start.
{versions}.

{figures}

{rates}

Interleaved rounds: {rounds}, with {seconds} s a load ({crowd_seconds} s of mixed work), from 32 connections where
nothing else is said; one uvicorn worker each, with wrk and PostgreSQL on the same machine. "Measured" is the median of
the rounds; for errors it is their sum, for database connections and memory their maximum.

- CPU is the user and system time of the service's process per request. A floor is that of a bare FastAPI route which
  returns a constant (`bench/floor.py`), measured right before.
- The service ran by its Procfile, with its log written to a file. Its rate limit was set to {rate_limit}: it counted
  each request and refused none. Floor and usual (`bench/usual.py`) wrote no access log, which favours them.
- GET one task came with EdDSA tokens, verified by a JWKS, everything else with HS256 tokens.
- Mixed work: half lists of 20, a quarter GET, the rest in equal parts create, toggle and update.
- The large table had {tasks:,} tasks of {users:,} users, each user's far apart as they were made in turns. The empty
  one had what was asked for, 10,000 tasks of 100 users. These are compared by requests per second, as the pages are.
- The distant database was behind a proxy that delays each direction by {each_way} ms: a query took {round_trip:.1f} ms
  through it. The service used {distant_connections:.0f} connections to it for its 64 clients.
- Requests that failed in all loads together: {errors:.0f}.
"""

# Without a background of its own: the bars are readable on light and dark pages, and the text follows the scheme.
CHART = """<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 640 {height}" width="640" height="{height}" role="img"
  aria-label="Requests per second: the service against the same API written the usual way">
<style>
text {{ font: 13px system-ui, sans-serif; fill: #1f2328 }}
.service {{ fill: #2f81f7 }}
.usual {{ fill: #8b949e }}
@media (prefers-color-scheme: dark) {{ text {{ fill: #e6edf3 }} }}
</style>
<rect class="service" x="100" y="5" width="12" height="12"/><text x="118" y="16">this service</text>
<rect class="usual" x="212" y="5" width="12" height="12"/><text x="230" y="16">the usual way, requests/s</text>
{bars}
</svg>
"""


def chart(service: Mapping[str, float], usual: Mapping[str, float]) -> str:
    bars, y, longest = [], 32, max([*service.values(), *usual.values()])
    for operation in service:
        bars.append(f'<text x="90" y="{y + 19}" text-anchor="end">{operation}</text>')
        for name, rate in ("service", service[operation]), ("usual", usual[operation]):
            width = 470 * rate / longest
            bars.append(f'<rect class="{name}" x="100" y="{y}" width="{width:.0f}" height="13"/>')
            bars.append(f'<text x="{width + 106:.0f}" y="{y + 11}">{rate:,.0f}</text>')
            y += 15
        y += 10
    return CHART.format(height=y, bars="\n".join(bars))
