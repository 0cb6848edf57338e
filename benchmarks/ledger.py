"""How fast is a consumption, against the least that PostgreSQL itself takes for it?

    python benchmarks/ledger.py            minutes; the table of benchmarks/README.md
    python benchmarks/ledger.py --quick    half a minute, to see that it runs

The floor is pgbench, written in C, running the very statement that the ledger compiled, prepared, on the same server
in the same run, in turns with ours. Both sides commit each consumption to disk.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import multiprocessing
import platform
import random
import re
import statistics
import subprocess
import tempfile
import time
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any
from uuid import uuid4

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql

import stage
from stage import App, Timing
from tallystick import Config, Consume, Ledger
from tallystick.combine import Combiner

PROCESSES = 2  # of ours, at more than one connection: as many as the cores that the tables were made on


# --- the floor ---


def pgbench_script(ledger: Ledger, users: int) -> str:
    """The compiled statement with its parameters put in: numbers are pgbench's, ids and keys as random as ours."""
    dialect = postgresql.psycopg.dialect(paramstyle="named")
    statement = " ".join(str(ledger.statements["consume"].compile(dialect=dialect)).split())
    given = {
        "p_user": ":user",
        "p_id": "gen_random_uuid()",
        "p_amount": "1",
        "p_description": "NULL",
        "p_key": "('bench ' || :one || :two)",
    }
    for name, value in given.items():
        statement = re.sub(rf":{name}\b", value, statement)
    limits = {"user": users, "one": 10**9, "two": 10**9}
    return "".join(f"\\set {name} random(1, {most})\n" for name, most in limits.items()) + f"{statement};\n"


def floor(app: App, *, users: int, connections: int, seconds: float) -> Timing:
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder, "consume.sql")
        script.write_text(pgbench_script(app.ledger, users))
        command = app.server.command(
            "pgbench", "--no-vacuum", "--protocol=prepared", f"--file={script}", f"--client={connections}",
            f"--jobs={min(connections, PROCESSES)}", f"--time={max(1, round(seconds))}", "--log",
            f"--log-prefix={folder}/log", app.database,
        )  # fmt: skip
        subprocess.run(command, env=app.server.env, check=True, capture_output=True)
        took = [float(line.split()[2]) / 1e6 for log in Path(folder).glob("log*") for line in log.open()]
    return Timing.of(took, max(1, round(seconds)))


# --- ours ---


_gate: Any = None


def _enter(gate: Any) -> None:
    global _gate  # noqa: PLW0603 - a barrier can be inherited by a process, not sent to it
    _gate = gate


def _spend(url: str, users: int, seconds: float, seed: int) -> list[float]:
    """One connection that consumes for so long, once all others are ready as well; the time of each call."""
    ledger, dice, tag, took = Ledger(Config(database_url=url, host=stage.HOST)), random.Random(seed), uuid4().hex, []
    engine = sa.create_engine(url, poolclass=sa.NullPool, isolation_level="AUTOCOMMIT")
    with engine.connect() as conn:
        for _ in range(20):  # the statement is compiled, prepared and planned
            ledger.consume(conn, dice.randint(1, users), key=uuid4().hex)
        _gate.wait()
        until = time.perf_counter() + seconds
        while time.perf_counter() < until:
            user, key = dice.randint(1, users), f"{tag} {len(took)}"
            begun = time.perf_counter()
            ledger.consume(conn, user, key=key)
            took.append(time.perf_counter() - begun)
    return took


def _spend_in_threads(url: str, users: int, seconds: float, seeds: list[int]) -> list[float]:
    with ThreadPoolExecutor(len(seeds)) as pool:
        return [took for run in pool.map(lambda seed: _spend(url, users, seconds, seed), seeds) for took in run]


def _in_processes(count: int, calls: Iterable[tuple[Any, ...]]) -> list[Any]:
    """Each call in a process of its own; ``count`` connections wait for each other before they begin."""
    context, calls = multiprocessing.get_context("spawn"), list(calls)
    with ProcessPoolExecutor(len(calls), context, _enter, (context.Barrier(count),)) as pool:
        return [run.result() for run in [pool.submit(*call) for call in calls]]


def ours(app: App, *, users: int, connections: int, seconds: float) -> Timing:
    shares = [list(range(n, connections, PROCESSES)) for n in range(min(connections, PROCESSES))]
    runs = _in_processes(connections, [(_spend_in_threads, app.url, users, seconds, share) for share in shares])
    return Timing.of([took for run in runs for took in run], seconds)


# --- many at once ---


def batches(app: App, *, size: int, seconds: float) -> float:
    """Consumptions a second of one hot account in lists of this size, from as many processes as cores."""
    return sum(_in_processes(PROCESSES, [(_spend_lists, app.url, size, seconds)] * PROCESSES)) / seconds


def _spend_lists(url: str, size: int, seconds: float) -> int:
    ledger, tag, done = Ledger(Config(database_url=url, host=stage.HOST)), uuid4().hex, 0
    engine = sa.create_engine(url, poolclass=sa.NullPool, isolation_level="AUTOCOMMIT")
    with engine.connect() as conn:

        def spend() -> None:
            ledger.consume_many(conn, [Consume(1, key=f"{tag} {done + n}") for n in range(size)])

        spend()
        _gate.wait()
        until = time.perf_counter() + seconds
        while time.perf_counter() < until:
            done += size
            spend()
    return done


def combined(app: App, *, callers: int, seconds: float) -> float:
    """Consumptions a second of so many asyncio tasks, each of which waits for its own before it asks again."""
    tag, done = uuid4().hex, 0

    async def caller(combiner: Combiner, number: int, until: float) -> None:
        nonlocal done
        for n in itertools.count():
            if time.perf_counter() > until:
                return
            await combiner.aconsume(1, key=f"{tag} {number} {n}")
            done += 1

    async def crowd() -> None:
        with Combiner(app.ledger, sa.create_engine(app.url, poolclass=sa.NullPool)) as combiner:
            until = time.perf_counter() + seconds
            await asyncio.gather(*(caller(combiner, number, until) for number in range(callers)))

    asyncio.run(crowd())
    return done / seconds


# --- tables ---


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    lines = [list(head), *(list(row) for row in rows)]
    widths = [max(len(line[n]) for line in lines) for n in range(len(lines[0]))]
    lines.insert(1, ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])])

    def shown(line: list[str]) -> str:
        cells = [line[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(line[1:], widths[1:], strict=True))]
        return f"| {' | '.join(cells)} |"

    return "\n".join(map(shown, lines))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small and short")
    parser.add_argument("--folder", type=Path, help="put the server's data here, on the disk to be measured")
    asked = parser.parse_args()
    seconds, turns = (1.0, 1) if asked.quick else (5.0, 3)
    users = 1_000 if asked.quick else 10_000

    with stage.server(asked.folder) as server:
        print(f"PostgreSQL {server.version}, Python {platform.python_version()}, fsync on; medians over {turns} turns")
        app = stage.app(server, "speed", users=users, rows_each=1)
        lines = []
        for name, among, connections in (
            ("one connection, spread", users, 1),
            ("one connection, one account", 1, 1),
            ("16 connections, spread", users, 16),
            ("16 connections, one account", 1, 16),
        ):
            taken: list[tuple[Timing, Timing]] = []
            for _ in range(turns):
                of = {"users": among, "connections": connections, "seconds": seconds}
                taken.append((floor(app, **of), ours(app, **of)))
            low, high = (stage.middle(side) for side in zip(*taken, strict=True))
            lines.append(
                [
                    name,
                    *(f"{t:.2f}" for t in (low.median_ms, high.median_ms)),
                    f"{high.median_ms / low.median_ms:.2f}",
                    *(f"{t:.2f}" for t in (low.p99_ms, high.p99_ms)),
                    *(f"{t:,.0f}" for t in (low.per_second, high.per_second)),
                    f"{high.per_second / low.per_second:.2f}",
                ]
            )
        print("\nconsume")
        print(
            table(
                ["", "pgbench ms", "ours ms", "ratio", "p99 pgbench", "p99 ours", "pgbench/s", "ours/s", "ratio"], lines
            )
        )

        alone = high.per_second
        print("\nmany at once, one account, consumptions a second")
        lines = [
            [f"consume_many, {size:,} a statement", f"{rate:,.0f}", f"{rate / alone:.1f}"]
            for size in (10, 100, 1_000, 8_000)
            for rate in [statistics.median(batches(app, size=size, seconds=seconds) for _ in range(turns))]
        ]
        rate = statistics.median(combined(app, callers=256, seconds=seconds) for _ in range(turns))
        lines.append(["Combiner, 256 asyncio callers", f"{rate:,.0f}", f"{rate / alone:.1f}"])
        print(table(["", "a second", "times consume at 16 connections"], lines))


if __name__ == "__main__":
    main()
