"""Speed of a consumption, beside the least that PostgreSQL itself needs for it.

    python benchmarks/ledger.py            minutes; the table of benchmarks/README.md
    python benchmarks/ledger.py --quick    half a minute, to see that it runs

Beside it stands pgbench, written in C, which sends the very call that the ledger sends, prepared, on the same server
in the same run, in turns with ours; and as the floor the bare UPDATE and INSERT that a consumption comes down to, sent
by pgbench too, with no rule of the ledger's. All commit each consumption to disk. Where the machine has a PgBouncer,
they also go through it in transaction mode, with one protocol.
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
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import psycopg
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import create_async_engine

import stage
from stage import App, Timing, table
from tallystick import Config, Consume, Ledger
from tallystick.ledger.combiner import Combiner

# the PgBouncer is started as the tests start theirs
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
import bouncer

PROCESSES = 2  # of ours, at more than one connection: as many as the cores that the tables were made on
POOL = 4  # server connections of PgBouncer
CALLERS = 256
SHARED = 16  # connections for all of them


@dataclass(frozen=True)
class Way:
    """The way to the server, if the statement is prepared or sent anew each time, and the sender that ours uses."""

    url: str
    prepared: bool = True
    sqlalchemy: bool = True

    @property
    def protocol(self) -> str:
        """As pgbench calls what psycopg does there: parameters apart from the text, in either case."""
        return "prepared" if self.prepared else "extended"


# --- pgbench ---


def pgbench(app: App, way: Way, statement: str, *, users: int, connections: int, seconds: float) -> Timing:
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder, "consume.sql")
        script.write_text(stage.pgbench_script(users, statement))
        # its time is in whole seconds
        length = f"--time={round(seconds)}" if seconds >= 1 else f"--transactions={round(100 * seconds)}"
        command = app.server.command(
            "pgbench", "--no-vacuum", f"--protocol={way.protocol}", f"--file={script}", f"--client={connections}",
            f"--jobs={min(connections, PROCESSES)}", length, "--log",
            f"--log-prefix={folder}/log", way.url.replace("+psycopg", "", 1),
        )  # fmt: skip
        ran = subprocess.run(command, env=app.server.env, check=True, capture_output=True, text=True)
        took = [float(line.split()[2]) / 1e6 for log in Path(folder).glob("log*") for line in log.open()]
    rate = re.search(r"tps = ([\d.]+)", ran.stdout)
    assert rate, ran.stdout
    return Timing.of(took, len(took) / float(rate[1]))


# --- ours ---


_gate: Any = None


def _enter(gate: Any) -> None:
    global _gate  # noqa: PLW0603 - a barrier can be inherited by a process, not sent to it
    _gate = gate


def _spend(way: Way, users: int, seconds: float, seed: int) -> list[float]:
    """One connection that consumes for so long, once all others are ready as well; the time of each call."""
    ledger = Ledger(Config(database_url=way.url, host=stage.HOST))
    rng, tag = random.Random(seed), uuid4().hex
    took: list[float] = []
    with _connected(way) as conn:
        for _ in range(20):  # the statement is prepared and planned
            ledger.consume(conn, rng.randint(1, users), key=uuid4().hex)
        _gate.wait()
        until = time.perf_counter() + seconds
        while time.perf_counter() < until:
            user, key = rng.randint(1, users), f"{tag} {len(took)}"
            begun = time.perf_counter()
            ledger.consume(conn, user, key=key)
            took.append(time.perf_counter() - begun)
    return took


def _connected(way: Way) -> AbstractContextManager[Any]:
    how = {} if way.prepared else {"prepare_threshold": None}
    if not way.sqlalchemy:
        return psycopg.connect(way.url.replace("+psycopg", "", 1), autocommit=True, **how)
    return sa.create_engine(way.url, poolclass=sa.NullPool, isolation_level="AUTOCOMMIT", connect_args=how).connect()


def _spend_in_threads(way: Way, users: int, seconds: float, seeds: list[int]) -> list[float]:
    with ThreadPoolExecutor(len(seeds)) as pool:
        return [took for run in pool.map(lambda seed: _spend(way, users, seconds, seed), seeds) for took in run]


def _in_processes(count: int, calls: Iterable[tuple[Any, ...]]) -> list[Any]:
    """Each call in a process of its own; ``count`` connections wait for each other before they begin."""
    context, calls = multiprocessing.get_context("forkserver"), list(calls)
    # imported once, and not by each process anew
    context.set_forkserver_preload(
        ["tallystick.ledger.combiner", "tallystick.migrate", "sqlalchemy.ext.asyncio", "psycopg"]
    )
    with ProcessPoolExecutor(len(calls), context, _enter, (context.Barrier(count),)) as pool:
        return [run.result() for run in [pool.submit(*call) for call in calls]]


def ours(way: Way, *, users: int, connections: int, seconds: float) -> Timing:
    shares = [list(range(n, connections, PROCESSES)) for n in range(min(connections, PROCESSES))]
    runs = _in_processes(connections, [(_spend_in_threads, way, users, seconds, share) for share in shares])
    return Timing.of([took for run in runs for took in run], seconds)


# --- many at once ---


def batches(app: App, *, size: int, seconds: float) -> float:
    """Consumptions a second of one hot account in lists of this size, from as many processes as cores."""
    return float(sum(_in_processes(PROCESSES, [(_spend_lists, app.url, size, seconds)] * PROCESSES)))


def _spend_lists(url: str, size: int, seconds: float) -> float:
    ledger, tag, done = Ledger(Config(database_url=url, host=stage.HOST)), uuid4().hex, 0
    engine = sa.create_engine(url, poolclass=sa.NullPool, isolation_level="AUTOCOMMIT")
    with engine.connect() as conn:

        def spend() -> None:
            ledger.consume_many(conn, [Consume(1, key=f"{tag} {done + n}") for n in range(size)])

        spend()
        _gate.wait()
        begun = time.perf_counter()
        while time.perf_counter() < begun + seconds:
            done += size
            spend()
        return done / (time.perf_counter() - begun)  # the last list ends after the time


# --- concurrent clients ---


def concurrent_clients(app: App, *, callers: int, seconds: float) -> dict[str, tuple[Timing, Timing]]:
    """``callers`` in one process, as in a busy web server: through a pool that they share, and through a Combiner.

    Each waits for its own call before the next. The first moment, in which connections are made and statements
    prepared, does not count.
    """
    ledger, found = app.ledger, {}
    pool = {"pool_size": SHARED, "max_overflow": 0, "pool_timeout": 600, "isolation_level": "AUTOCOMMIT"}
    engine = sa.create_engine(app.url, **pool)

    def single(user: int, *, key: str) -> None:
        with engine.connect() as conn:
            ledger.consume(conn, user, key=key)

    def combined(user: int, *, key: str) -> None:
        combiner.consume(user, key=key).result()

    async def in_asyncio() -> None:
        engine = create_async_engine(app.url, **pool)

        async def single(user: int, *, key: str) -> None:
            async with engine.connect() as conn:
                await conn.run_sync(ledger.consume, user, key=key)

        for span in (seconds / 5, seconds):
            found["asyncio tasks"] = await _tasks(single, callers, span), await _tasks(combiner.aconsume, callers, span)
        await engine.dispose()

    with Combiner(ledger, sa.create_engine(app.url, poolclass=sa.NullPool)) as combiner:
        for span in (seconds / 5, seconds):
            found["threads"] = _threads(single, callers, span), _threads(combined, callers, span)
        engine.dispose()
        asyncio.run(in_asyncio())
    return found


def _threads(spend: Callable[..., object], callers: int, seconds: float) -> Timing:
    tag, took = uuid4().hex, []
    begun = time.perf_counter()

    def caller(number: int) -> None:
        for n in itertools.count():
            asked = time.perf_counter()
            if n and asked > begun + seconds:
                return
            spend(1, key=f"{tag} {number} {n}")
            took.append(time.perf_counter() - asked)

    with ThreadPoolExecutor(callers) as pool:
        list(pool.map(caller, range(callers)))
    return Timing.of(took, time.perf_counter() - begun)


async def _tasks(spend: Callable[..., Awaitable[object]], callers: int, seconds: float) -> Timing:
    tag, took = uuid4().hex, []
    begun = time.perf_counter()

    async def caller(number: int) -> None:
        for n in itertools.count():
            asked = time.perf_counter()
            if n and asked > begun + seconds:
                return
            await spend(1, key=f"{tag} {number} {n}")
            took.append(time.perf_counter() - asked)

    await asyncio.gather(*map(caller, range(callers)))
    return Timing.of(took, time.perf_counter() - begun)


# --- tables ---


def against_the_floor(
    app: App, ways: Mapping[str, tuple[Way, int, int]], *, seconds: float, turns: int
) -> list[Timing]:
    """Print a line for each way of so many connections to so many users; ours, to compare others with."""
    head = [
        "", "floor ms", "pgbench ms", "ours ms", "ms ÷ pgbench", "ms ÷ floor", "p99 pgbench", "p99 ours",
        "pgbench/s", "ours/s", "per s ÷ pgbench",
    ]  # fmt: skip
    lines, found = [], []
    for name, (way, connections, users) in ways.items():
        taken: list[tuple[Timing, Timing, Timing]] = []
        for _ in range(turns):
            of: dict[str, Any] = {"users": users, "connections": connections, "seconds": seconds}
            bare, sent = (pgbench(app, way, statement, **of) for statement in (stage.FLOOR, stage.CONSUME))
            taken.append((bare, sent, ours(way, **of)))
        floor, low, high = (stage.median_run(side) for side in zip(*taken, strict=True))
        lines.append(
            [
                name,
                *(f"{t:.2f}" for t in (floor.median_ms, low.median_ms, high.median_ms)),
                *(f"{high.median_ms / t.median_ms:.2f}" for t in (low, floor)),
                *(f"{t:.2f}" for t in (low.p99_ms, high.p99_ms)),
                *(f"{t:,.0f}" for t in (low.per_second, high.per_second)),
                f"{high.per_second / low.per_second:.2f}",
            ]
        )
        found.append(high)
    print(table(head, lines))
    return found


def through_pgbouncer(app: App, *, seconds: float, turns: int) -> None:
    if bouncer.PROGRAM is None:
        print("\nthrough PgBouncer: not measured, there is none on this machine (apt-get install pgbouncer)")
        return
    version = bouncer.version()
    with bouncer.bouncing(app.url, connections=POOL) as url:
        way = Way(url, prepared=version >= bouncer.PREPARES_SINCE)
        number = ".".join(map(str, version))
        print(f"\nconsume through PgBouncer {number}, transaction mode, pool of {POOL}; all sides: {way.protocol}")
        ways = {"one connection, spread": (way, 1, app.users), "16 connections, spread": (way, 16, app.users)}
        against_the_floor(app, ways, seconds=seconds, turns=turns)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small and short")
    parser.add_argument("--seconds", type=float, help="how long each measurement takes (5, or 1 with --quick)")
    parser.add_argument("--folder", type=Path, help="put the server's data here, on the disk to be measured")
    asked = parser.parse_args()
    users, callers, turns = (1_000, 32, 1) if asked.quick else (10_000, CALLERS, 3)
    seconds = asked.seconds or (1.0 if asked.quick else 5.0)

    with stage.server(asked.folder) as server:
        print(f"PostgreSQL {server.version}, Python {platform.python_version()}, fsync on; medians over {turns} turns")
        app = stage.app(server, "speed", users=users, rows_each=1)
        direct = Way(app.url)
        print(f"\nconsume through SQLAlchemy; all sides: {direct.protocol}")
        ways = {
            "one connection, spread": (direct, 1, users),
            "the same, psycopg without SQLAlchemy": (Way(app.url, sqlalchemy=False), 1, users),
            "one connection, one account": (direct, 1, 1),
            "16 connections, spread": (direct, 16, users),
            "16 connections, one account": (direct, 16, 1),
        }
        alone = against_the_floor(app, ways, seconds=seconds, turns=turns)[-1].per_second
        through_pgbouncer(app, seconds=seconds, turns=turns)

        print("\nlists, one account")
        lines = [
            [f"consume_many, {size:,} a statement", f"{rate:,.0f}", f"{rate / alone:.1f}"]
            for size in (10, 100, 1_000, 8_000)
            for rate in [statistics.median(batches(app, size=size, seconds=seconds) for _ in range(turns))]
        ]
        print(table(["", "a second", "times consume at 16 connections"], lines))

        print(f"\n{callers} callers at once in one process, one account: a pool of {SHARED} against one Combiner")
        taken = [concurrent_clients(app, callers=callers, seconds=seconds) for _ in range(turns)]
        lines = []
        for name in taken[0]:
            low, high = (stage.median_run(side) for side in zip(*(turn[name] for turn in taken), strict=True))
            lines.append(
                [
                    name,
                    *(f"{t:,.0f}" for t in (low.per_second, high.per_second)),
                    f"{high.per_second / low.per_second:.1f}",
                    *(f"{t:.1f}" for t in (low.median_ms, high.median_ms, low.p99_ms, high.p99_ms)),
                ]
            )
        head = ["", "pool/s", "Combiner/s", "times", "pool ms", "Combiner ms", "p99 pool", "p99 Combiner"]
        print(table(head, lines))


if __name__ == "__main__":
    main()
