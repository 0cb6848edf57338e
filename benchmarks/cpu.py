"""CPU per call: of the client's thread and of its server process, which holds on a busy machine where times do not.

    python benchmarks/cpu.py            # a table, the floor first

The floor is a bare UPDATE and INSERT in one statement, without any rule. Both sides are read from ``/proc``.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psycopg
import sqlalchemy as sa

import stage
from tallystick.errors import LedgerError

USERS = 1_000
TICKS = os.sysconf("SC_CLK_TCK")

FLOOR = """
WITH w AS (
  UPDATE users SET credit_balance = credit_balance - 1, credit_sequence = credit_sequence + 1
  WHERE id = %s AND credit_balance >= 1 AND deleted_at IS NULL
  RETURNING id, credit_balance AS balance, credit_sequence AS sequence
)
INSERT INTO credit_transactions
  (id, user_id, type, status, amount, balance_after, sequence, description, idempotency_key, completed_at)
SELECT gen_random_uuid(), id, 'consumption', 'completed', -1, balance, sequence, 'Credit consumed', %s,
  clock_timestamp()
FROM w RETURNING *
"""
CONSUME = "SELECT * FROM tallystick.consume(user_id => %s, key => %s)"


def server_ms(pid: int) -> float:
    """What a process has used so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / TICKS * 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--calls", type=int, default=3_000, help="calls of each kind, in each of three rounds")
    calls = parser.parse_args().calls
    with stage.server() as server:
        app = stage.app(server, "cpu", users=USERS, rows_each=10)
        address = app.url.replace("+psycopg", "", 1)
        raw = psycopg.connect(address, autocommit=True)
        raw.prepare_threshold = 0
        engine = sa.create_engine(app.url, poolclass=sa.NullPool, isolation_level="AUTOCOMMIT")
        conn = engine.connect()
        ledger = app.ledger

        def user() -> int:
            return random.randint(1, USERS)

        def refused(on: Any) -> None:
            try:
                ledger.consume(on, user(), credits=2_000_000_000, key=uuid.uuid4().hex)
            except LedgerError:
                return
            raise AssertionError("it was not refused")

        used = uuid.uuid4().hex
        ledger.consume(raw, 1, key=used)
        ways: dict[str, tuple[Any, Callable[[], object]]] = {
            "floor: UPDATE and INSERT, psycopg": (
                raw,
                lambda: raw.execute(FLOOR, (user(), uuid.uuid4().hex)).fetchall(),
            ),
            "the function, psycopg": (raw, lambda: raw.execute(CONSUME, (user(), uuid.uuid4().hex)).fetchall()),
            "ledger.consume, psycopg": (raw, lambda: ledger.consume(raw, user(), key=uuid.uuid4().hex)),
            "ledger.consume, SQLAlchemy": (conn, lambda: ledger.consume(conn, user(), key=uuid.uuid4().hex)),
            "refused, SQLAlchemy": (conn, lambda: refused(conn)),
            "replayed, SQLAlchemy": (conn, lambda: ledger.consume(conn, 1, key=used)),
            "ledger.balance, SQLAlchemy": (conn, lambda: ledger.balance(conn, user())),
            "ledger.history of 20, SQLAlchemy": (conn, lambda: ledger.history(conn, user(), limit=20)),
        }
        spent: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
        for _ in range(3):
            for name, (on, call) in ways.items():
                pid = raw.info.backend_pid if on is raw else conn.connection.dbapi_connection.info.backend_pid
                for _ in range(20):
                    call()
                server_before, client_before = server_ms(pid), time.thread_time()
                for _ in range(calls):
                    call()
                client = (time.thread_time() - client_before) * 1000
                spent[name].append(((server_ms(pid) - server_before) / calls, client / calls))
        floor = statistics.median(sum(each) for each in spent["floor: UPDATE and INSERT, psycopg"])
        print("| | server, ms | client, ms | sum ÷ floor |\n|---|---|---|---|")
        for name, rounds in spent.items():
            on_server, on_client = (statistics.median(each[side] for each in rounds) for side in (0, 1))
            print(f"| {name} | {on_server:.3f} | {on_client:.3f} | {(on_server + on_client) / floor:.2f} |")


if __name__ == "__main__":
    main()
