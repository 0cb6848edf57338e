"""Each benchmark in its shortest form, to its last table. What it measured is nobody's concern here.

All but ``benchmarks/peers``, which installs other people's packages; ``tests/proof/test_peers.py`` goes through it.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
SHORT = {
    "migration.py": ["--quick"],
    "opening.py": ["--quick"],
    "cpu.py": ["--quick", "--calls", "10"],
    "ledger.py": ["--quick", "--seconds", "0.05"],
    "web.py": ["--quick"],
    "bloat.py": ["--quick"],
    "growth.py": ["--quick"],
    "console.py": ["--quick"],
    "webhooks.py": ["--deliveries", "8"],
    "audit.py": ["--rows", "1000"],
    "events.py": ["--quick"],
    "overview.py": ["--quick"],
    "partitions.py": ["--quick"],
    "widen.py": ["--quick"],
}
PRINTED = {  # of each table the last line, and whatever may be left out
    "migration.py": ["| no migration at all |"],
    "opening.py": ["| beside apply and the opening balances |"],
    "cpu.py": ["| floor, psycopg ", "| consume, SQLAlchemy ", "| consume replayed, SQLAlchemy "],
    "ledger.py": [
        "16 connections, one account",
        "through PgBouncer",
        "| consume_many, 8,000 a ",
        "| asyncio tasks |",
    ],
    "web.py": ["| sync | unlock |", "| async | unlock |"],
    "bloat.py": ["| fillfactor 100, the default, updated_at indexed |"],
    "growth.py": [
        "| audit of one user ",
        "| audit of the user with a tenth of all rows, 5,000 rows |",
        "| new users ",
    ],
    "console.py": ["| the overview, with figures ", "| migrations "],
    "webhooks.py": ["\nreceive ", "\nratio of the totals: "],
    "events.py": ["| on, with NOTIFY |"],
    "overview.py": ["| days closed, but for today ", "| closing sixty days, once "],
    "partitions.py": ["| four hash partitions |"],
    "widen.py": ["| 2,000 |"],
    "audit.py": ["  audit, healthy ", "  audit of one user "],
}


@pytest.mark.one_server  # each starts a server of its own, the embedded one
@pytest.mark.parametrize("name", SHORT)
def test_it_runs_and_prints_its_tables(name: str) -> None:
    command = [sys.executable, str(BENCHMARKS / name), *SHORT[name]]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for line in PRINTED[name]:
        assert line in done.stdout


def test_none_is_forgotten() -> None:
    assert {path.name for path in BENCHMARKS.glob("*.py")} - {"stage.py"} == SHORT.keys() == PRINTED.keys()
