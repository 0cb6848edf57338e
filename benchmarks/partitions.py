"""CPU of a consumption on a ledger in four hash partitions by user, beside the plain ledger.

    python benchmarks/partitions.py            a minute or two; the figure of docs/scaling.md
    python benchmarks/partitions.py --quick    seconds, to see that it runs

Two apps on one server, each called on a connection of its own, in turns; CPU of the server's process for each call, so
that what else the machine does counts for little. The median of the turns.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
from pathlib import Path

import psycopg

import stage
from cpu import used_ms

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from partitioned import partition

CALL = stage.CONSUME.format(user="%s", key="%s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few calls, to see that it runs")
    users, calls, turns = (200, 20, 1) if parser.parse_args().quick else (2_000, 500, 15)
    with stage.server(settings=stage.SETTINGS | {"autovacuum": "off", "fsync": "off"}) as server:
        apps = {name: stage.app(server, name, users=users, rows_each=10) for name in ("plain", "partitioned")}
        partition(apps["partitioned"].engine, apps["partitioned"].ledger.config)
        conns = {name: psycopg.connect(app.libpq, autocommit=True) for name, app in apps.items()}
        numbers = itertools.count()
        spent: dict[str, list[float]] = {name: [] for name in apps}
        for turn in range(turns + 1):
            for name, conn in conns.items():
                begun = used_ms(conn.info.backend_pid)
                for _ in range(calls):
                    number = next(numbers)
                    conn.execute(CALL, (1 + number * 7919 % users, f"bench {number}"))
                if turn:  # the first prepares statements and reads catalogs
                    spent[name].append((used_ms(conn.info.backend_pid) - begun) / calls)
        for conn in conns.values():
            conn.close()
        plain, partitioned = (statistics.median(of) for of in spent.values())
        print(f"CPU of the server for a consumption, PostgreSQL {server.version}, {turns} turns of {calls:,} calls")
        print(
            stage.table(
                ["", "ms", "÷ plain"],
                [
                    ["plain", f"{plain:.3f}", "1.00"],
                    ["four hash partitions", f"{partitioned:.3f}", f"{partitioned / plain:.2f}"],
                ],
            )
        )


if __name__ == "__main__":
    main()
