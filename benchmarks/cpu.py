"""CPU per call, of the client and of its server process: it holds on a busy machine, where times do not.

    python benchmarks/cpu.py            minutes; the table of benchmarks/README.md
    python benchmarks/cpu.py --quick    seconds, to see that it runs

The floor is a bare UPDATE and INSERT in one statement, without any rule; beside it stand the same as an app sends them,
two statements in a transaction. Both sides are what the kernel counts of their processes (``/proc/PID/stat``); each way
takes its turn in each round, on a prepared connection in autocommit. The server does not wait for its disk (fsync off),
which would take time and no CPU.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import json
import os
import platform
import random
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from uuid import uuid4

import psycopg
import pytest
import sqlalchemy as sa

import stage
from stage import App, table
from tallystick import Ledger
from tallystick.errors import InsufficientCredits
from tallystick.ledger.typescript import typescript

# the packages of Node are those of the tests
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
import node_packages

USERS = 1_000
TICKS = os.sysconf("SC_CLK_TCK")
REPLAYED = "used before"  # by the first user


class Cpu(NamedTuple):
    """Milliseconds of one call."""

    server: float
    client: float


def used_ms(pid: int, *, of_children: bool = False) -> float:
    """CPU milliseconds that a process has used so far, or all of its children that have ended."""
    exact = Path(f"/proc/{pid}/schedstat")  # in nanoseconds; not every kernel has it
    if exact.exists() and not of_children:
        return int(exact.read_text().split()[0]) / 1e6
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    first = 13 if of_children else 11
    return (int(fields[first]) + int(fields[first + 1])) / TICKS * 1000


def user() -> int:
    return random.randint(1, USERS)


# --- Python ---


def on_psycopg(app: App, ledger: Ledger) -> Iterator[tuple[str, int, Callable[[], object]]]:
    conn = psycopg.connect(app.libpq, autocommit=True, prepare_threshold=0)
    floor, function = (statement.format(user="%s", key="%s") for statement in (stage.FLOOR, stage.CONSUME))

    def in_a_transaction() -> None:
        spender = user()
        with conn.transaction():
            [balance, sequence] = conn.execute(stage.UPDATE, (spender,)).fetchall()[0]
            conn.execute(stage.INSERT, (spender, balance, sequence, uuid4().hex)).fetchall()

    yield from (
        (f"{name}, psycopg", conn.info.backend_pid, call)
        for name, call in {
            "floor": lambda: conn.execute(floor, (user(), uuid4().hex)).fetchall(),
            "the two in a transaction": in_a_transaction,
            "the function alone": lambda: conn.execute(function, (user(), uuid4().hex)).fetchall(),
            **operations(ledger, conn),
        }.items()
    )


def on_sqlalchemy(app: App, ledger: Ledger) -> Iterator[tuple[str, int, Callable[[], object]]]:
    conn = sa.create_engine(app.url, poolclass=sa.NullPool, isolation_level="AUTOCOMMIT").connect()
    pid = conn.scalar(sa.text("SELECT pg_backend_pid()"))
    yield from ((f"{name}, SQLAlchemy", pid, call) for name, call in operations(ledger, conn).items())


def operations(ledger: Ledger, conn: Any) -> dict[str, Callable[[], object]]:
    def refused() -> None:
        try:
            ledger.consume(conn, user(), credits=2_000_000_000, key=uuid4().hex)
        except InsufficientCredits:
            return
        raise AssertionError("it was not refused")

    return {
        "consume": lambda: ledger.consume(conn, user(), key=uuid4().hex),
        "consume refused": refused,
        "consume replayed": lambda: ledger.consume(conn, 1, key=REPLAYED),
        "balance": lambda: ledger.balance(conn, user()),
        "history of 20": lambda: ledger.history(conn, user(), limit=20),
    }


def measured(pid: int, call: Callable[[], object], calls: int) -> Cpu:
    for _ in range(20):
        call()
    server, client = used_ms(pid), time.thread_time()
    for _ in range(calls):
        call()
    return Cpu((used_ms(pid) - server) / calls, (time.thread_time() - client) * 1000 / calls)


async def on_asyncpg(app: App, ledger: Ledger, calls: int) -> dict[str, Cpu]:
    import asyncpg  # noqa: PLC0415 - where it is installed

    conn = await asyncpg.connect(app.libpq)
    pid = conn.get_server_pid()

    async def refused() -> None:
        try:
            await ledger.consume(conn, user(), credits=2_000_000_000, key=uuid4().hex)
        except InsufficientCredits:
            return
        raise AssertionError("it was not refused")

    found = {}
    each: dict[str, Callable[[], Awaitable[object]]] = {
        "consume": lambda: ledger.consume(conn, user(), key=uuid4().hex),
        "consume refused": refused,
        "consume replayed": lambda: ledger.consume(conn, 1, key=REPLAYED),
    }
    for name, call in each.items():
        for _ in range(20):
            await call()
        server, client = used_ms(pid), time.thread_time()
        for _ in range(calls):
            await call()
        found[f"{name}, asyncpg"] = Cpu((used_ms(pid) - server) / calls, (time.thread_time() - client) * 1000 / calls)
    await conn.close()
    return found


# --- others ---


def on_pgbench(app: App, statement: str, calls: int) -> Cpu:
    """The least that a client takes, in C. Its server process is counted when it has ended."""
    postmaster = int((app.server.folder / "server" / "data" / "postmaster.pid").read_text().split()[0])
    with tempfile.TemporaryDirectory() as folder, psycopg.connect(app.libpq, autocommit=True) as other:
        Path(folder, "one.sql").write_text(stage.pgbench_script(USERS, statement))
        command = app.server.command(
            "pgbench", "--no-vacuum", "--protocol=prepared", f"--file={folder}/one.sql", f"--transactions={calls}",
            app.libpq,
        )  # fmt: skip
        server, client = used_ms(postmaster, of_children=True), _children_s()
        subprocess.run(command, env=app.server.env, check=True, capture_output=True)
        client = _children_s() - client
        while other.execute("SELECT FROM pg_stat_activity WHERE application_name = 'pgbench'").fetchone():
            time.sleep(0.01)
        time.sleep(0.1)  # until the postmaster has heard of its end
    return Cpu((used_ms(postmaster, of_children=True) - server) / calls, client * 1000 / calls)


def _children_s() -> float:
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return children.ru_utime + children.ru_stime


def node_program(folder: Path) -> node_packages.Project | None:
    try:
        made = node_packages.project(Path(node_packages.__file__).parent / "typescript", folder)
    except pytest.skip.Exception as reason:
        print(f"without Node: {reason}")
        return None
    shutil.copy(Path(__file__).with_suffix(".ts"), folder)
    made.write("tallystick.ts", typescript(stage.HOST))
    made.run(
        "esbuild", "cpu.ts", "--bundle", "--platform=node", "--format=esm", "--packages=external", "--outfile=cpu.mjs"
    )
    return made


def on_node(app: App, program: node_packages.Project, calls: int) -> dict[str, Cpu]:
    env = app.server.env | {"PGDATABASE": app.database}
    command = ["node", "cpu.mjs", str(calls), str(USERS), REPLAYED]
    ran = subprocess.run(command, cwd=program.folder, env=env, check=True, stdout=subprocess.PIPE)
    return {name: Cpu(**cpu) for name, cpu in json.loads(ran.stdout).items()}


# --- the table ---


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few calls, to see that it runs")
    parser.add_argument("--calls", type=int, help="calls of each kind in each round (3000, or 200 with --quick)")
    asked = parser.parse_args()
    calls, rounds = (asked.calls or 200, 1) if asked.quick else (asked.calls or 3_000, 3)
    spent: dict[str, list[Cpu]] = defaultdict(list)
    # what else its processes do is not to be counted
    with (
        stage.server(settings=stage.SETTINGS | {"autovacuum": "off", "fsync": "off"}) as server,
        tempfile.TemporaryDirectory() as folder,
    ):
        app = stage.app(server, "cpu", users=USERS, rows_each=10)
        ledger = app.ledger
        with app.engine.begin() as conn:
            ledger.consume(conn, 1, key=REPLAYED)
        ways = [*on_psycopg(app, ledger), *on_sqlalchemy(app, ledger)]
        program = node_program(Path(folder))
        for _ in range(rounds):
            for name, statement in {"floor": stage.FLOOR, "the function alone": stage.CONSUME}.items():
                spent[f"{name}, pgbench"].append(on_pgbench(app, statement, calls))
            for name, pid, call in ways:
                spent[name].append(measured(pid, call, calls))
            others = asyncio.run(on_asyncpg(app, ledger, calls)) if importlib.util.find_spec("asyncpg") else {}
            if program is not None:
                others |= on_node(app, program, calls)
            for name, cpu in others.items():
                spent[name].append(cpu)
        print(
            f"CPU of a call in ms, PostgreSQL {server.version}, Python {platform.python_version()}, fsync off; medians "
            f"of {rounds} rounds of {calls:,} calls"
        )
    middle = {name: Cpu(*map(statistics.median, zip(*cpus, strict=True))) for name, cpus in spent.items()}
    print(table(["", "server", "client", "sum", "server ÷ floor", "sum ÷ floor", "sum ÷ consume"], lines(middle)))


def lines(middle: dict[str, Cpu]) -> Iterator[list[str]]:
    floor = middle["floor, psycopg"]
    for name, cpu in middle.items():
        connection = name.partition(", ")[2]
        consume = middle.get(f"consume, {connection}")
        yield [
            name,
            *(f"{ms:.3f}" for ms in (*cpu, sum(cpu))),
            ratio(cpu.server, floor.server),
            ratio(sum(cpu), sum(floor)),
            ratio(sum(cpu), sum(consume)) if consume else "",
        ]


def ratio(part: float, whole: float) -> str:
    """Empty where the kernel, which counts in ticks, has seen nothing of the whole: in a few calls it may."""
    return f"{part / whole:.2f}" if whole else ""


if __name__ == "__main__":
    main()
