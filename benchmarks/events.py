"""The cost of events for a consumption: off, on, and on with NOTIFY.

    python benchmarks/events.py            a minute; the table of benchmarks/README.md
    python benchmarks/events.py --quick    seconds, to see that it runs

CPU is that of the server process of one connection (``/proc/PID/stat``), which holds on a busy machine. The number a
second is of eight connections of pgbench with fsync on, where a NOTIFY makes commits wait for each other. Each way
takes its turn in each round.
"""

from __future__ import annotations

import argparse
import re
import statistics
import subprocess
import tempfile
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from uuid import uuid4

import psycopg

import stage
from cpu import measured, user
from tallystick import Ledger, events

WAYS = {"off": None, "on": False, "on, with NOTIFY": True}
CLIENTS = 8


def on_pgbench(app: stage.App, length: str) -> float:
    """Consumptions a second."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "one.sql").write_text(stage.pgbench_script(app.users, stage.CONSUME))
        command = app.server.command(
            "pgbench", "--no-vacuum", "--protocol=prepared", f"--file={folder}/one.sql", length,
            f"--client={CLIENTS}", app.libpq,
        )  # fmt: skip
        ran = subprocess.run(command, env=app.server.env, check=True, capture_output=True, text=True)
    found = re.search(r"tps = ([\d.]+)", ran.stdout)
    assert found, ran.stdout
    return float(found[1])


def consumption(ledger: Ledger, conn: psycopg.Connection) -> Callable[[], object]:
    return lambda: ledger.consume(conn, user(), key=uuid4().hex)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few calls, to see that it runs")
    asked = parser.parse_args()
    calls, length, rounds = (20, "--transactions=20", 1) if asked.quick else (2_000, "--time=3", 3)
    cpu: dict[str, list[float]] = defaultdict(list)
    a_second: dict[str, list[float]] = defaultdict(list)
    with stage.server(settings=stage.SETTINGS | {"autovacuum": "off"}) as server:
        app = stage.app(server, "events", users=1_000, rows_each=10)
        ledger = app.ledger
        for _ in range(rounds):
            for name, notify in WAYS.items():
                if notify is None:
                    events.disable(app.url, ledger.config)
                else:
                    events.enable(app.url, ledger.config, low_balance=10, notify=notify)
                with psycopg.connect(app.libpq, autocommit=True, prepare_threshold=0) as conn:
                    consume = measured(conn.info.backend_pid, consumption(ledger, conn), calls)
                cpu[name].append(consume.server)
                a_second[name].append(on_pgbench(app, length))
        print(f"PostgreSQL {server.version}, fsync on; {rounds} rounds of {calls:,} calls and pgbench {length}")
    middle = {name: (statistics.median(cpu[name]), statistics.median(a_second[name])) for name in WAYS}
    cpu_off, a_second_off = middle["off"]
    print(
        stage.table(
            ["events", "server CPU ms", "CPU ÷ off", f"{CLIENTS} connections, a second", "per s ÷ off"],
            (
                [name, f"{ms:.3f}", f"{ms / cpu_off:.2f}", f"{done:,.0f}", f"{done / a_second_off:.2f}"]
                for name, (ms, done) in middle.items()
            ),
        )
    )


if __name__ == "__main__":
    main()
