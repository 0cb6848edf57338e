"""A server as in production (fsync on, a real disk) and host apps filled to size, for the benchmarks."""

from __future__ import annotations

import shutil
import statistics
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import sqlalchemy as sa

from tallystick import Config, HostMapping, Ledger, UsersTable, WorkshopsTable, migrate
from tallystick.dev.postgres import Server

HOST = HostMapping(
    users=UsersTable(key_type="bigint"), workshops=WorkshopsTable(key_type="bigint", title=None, created_at=None)
)
CREDITS = 1_000_000_000  # of each user; nobody runs out

SETTINGS = {"shared_buffers": "512MB", "max_connections": "100", "max_wal_size": "4GB"}

TABLES = """
CREATE TABLE users (id bigint PRIMARY KEY, email text NOT NULL);
CREATE TABLE workshops (id bigint PRIMARY KEY, user_id bigint NOT NULL REFERENCES users (id));
"""

# Written past the ledger, since only what it holds matters here; as the ledger would have written it.
# The keys are like its own: of one time prefix and random otherwise would be kinder to the index than life is.
FILL = """
INSERT INTO users (id, email, credit_balance, credit_sequence)
SELECT n, 'user' || n || '@example.com', {credits} - {each} + 1, {each} FROM generate_series(1, {users}) AS n;
INSERT INTO credit_transactions
  (id, user_id, type, status, amount, balance_after, sequence, description, idempotency_key, created_at, completed_at)
SELECT gen_random_uuid(), n, CASE k WHEN 1 THEN 'purchase' ELSE 'consumption' END::credit_transaction_type, 'completed',
  CASE k WHEN 1 THEN {credits} ELSE -1 END, {credits} - k + 1, k, 'Credit consumed', 'fill ' || k,
  now() - ({each} - k) * interval '1 minute', now() - ({each} - k) * interval '1 minute'
FROM generate_series(1, {each}) AS k, generate_series(1, {users}) AS n;
"""


FLOOR = """
WITH moved AS (
  UPDATE users SET credit_balance = credit_balance - 1, credit_sequence = credit_sequence + 1
  WHERE id = {user} AND credit_balance >= 1 AND deleted_at IS NULL
  RETURNING id, credit_balance AS balance, credit_sequence AS sequence
)
INSERT INTO credit_transactions
  (id, user_id, type, status, amount, balance_after, sequence, description, idempotency_key, completed_at)
SELECT gen_random_uuid(), id, 'consumption', 'completed', -1, balance, sequence, 'Credit consumed', {key},
  clock_timestamp()
FROM moved RETURNING *
"""
"""The floor: a bare UPDATE and INSERT in one statement, without any rule but the table's own."""

UPDATE = """
UPDATE users SET credit_balance = credit_balance - 1, credit_sequence = credit_sequence + 1
WHERE id = %s AND credit_balance >= 1 AND deleted_at IS NULL
RETURNING credit_balance, credit_sequence
"""
INSERT = """
INSERT INTO credit_transactions
  (id, user_id, type, status, amount, balance_after, sequence, description, idempotency_key, completed_at)
VALUES (gen_random_uuid(), %s, 'consumption', 'completed', -1, %s, %s, 'Credit consumed', %s, clock_timestamp())
RETURNING *
"""
"""The same as an app sends them: each a statement of its own, in a transaction."""

CONSUME = "SELECT * FROM tallystick.consume(user_id => {user}, key => {key}, amount => 1)"
"""The call that the ledger sends."""


def pgbench_script(users: int, statement: str) -> str:
    """``FLOOR`` or ``CONSUME`` for pgbench, with keys as random as ours."""
    limits = {"user": users, "one": 10**9, "two": 10**9}
    drawn = "".join(f"\\set {name} random(1, {most})\n" for name, most in limits.items())
    return drawn + statement.format(user=":user", key="'bench ' || :one || ' ' || :two").strip() + ";\n"


@dataclass(frozen=True)
class App:
    """A migrated host app with ``users`` users (keys 1, 2, …) of ``rows_each`` ledger rows."""

    server: Server
    database: str
    users: int
    rows_each: int

    @property
    def url(self) -> str:
        return self.server.url(self.database)

    @property
    def libpq(self) -> str:
        """The address for psycopg and pgbench."""
        return self.server.url(self.database, driver="")

    @property
    def engine(self) -> sa.Engine:
        """A connection of its own for each use."""
        return sa.create_engine(self.url, poolclass=sa.NullPool)

    @property
    def ledger(self) -> Ledger:
        return Ledger(Config(database_url=self.url, host=HOST))

    @property
    def rows(self) -> int:
        return self.users * self.rows_each


@contextmanager
def server(folder: Path | None = None, settings: Mapping[str, str] = SETTINGS) -> Iterator[Server]:
    """A server in a temporary folder (of ``folder``, if the default one is not on the disk in question)."""
    home = Path(tempfile.mkdtemp(prefix="tallystick-bench-", dir=folder))
    try:
        with Server(home, settings=settings) as running:
            yield running
    finally:
        shutil.rmtree(home)


def app(running: Server, database: str, *, users: int, rows_each: int) -> App:
    """A new host app, migrated, filled, analysed and written to disk."""
    made = App(running, database, users, rows_each)
    engine = sa.create_engine(running.create_database(database), poolclass=sa.NullPool)
    with engine.begin() as conn:
        conn.exec_driver_sql(TABLES)
    migrate.apply(made.url, Config(database_url=made.url, host=HOST))
    with engine.execution_options(isolation_level="AUTOCOMMIT").connect() as conn:
        conn.exec_driver_sql(FILL.format(users=users, each=rows_each, credits=CREDITS))
        conn.exec_driver_sql("VACUUM ANALYZE")
        conn.exec_driver_sql("CHECKPOINT")
    return made


@dataclass(frozen=True)
class Timing:
    """The measurements of a run: each call's time, and the calls of all connections together in a second."""

    median_ms: float
    p99_ms: float
    per_second: float

    @classmethod
    def of(cls, seconds: Sequence[float], elapsed_s: float) -> Timing:
        ordered = sorted(seconds)
        return cls(
            median_ms=statistics.median(ordered) * 1000,
            p99_ms=ordered[int(len(ordered) * 0.99)] * 1000,
            per_second=len(ordered) / elapsed_s,
        )


def median_run(runs: Sequence[Timing]) -> Timing:
    """The run with the middle median: one number from several runs without mixing them."""
    return sorted(runs, key=lambda run: run.median_ms)[len(runs) // 2]


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    lines = [list(head), *(list(row) for row in rows)]
    widths = [max(len(line[n]) for line in lines) for n in range(len(lines[0]))]
    lines.insert(1, ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])])

    def row_of(line: list[str]) -> str:
        cells = [line[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(line[1:], widths[1:], strict=True))]
        return f"| {' | '.join(cells)} |"

    return "\n".join(map(row_of, lines))
