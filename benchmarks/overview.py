"""The figures of the console's overview: days added up once, beside reading the rows of sixty days each time.

    python benchmarks/overview.py            minutes; a table of docs/scaling.md
    python benchmarks/overview.py --quick    seconds, to see that it runs
    python benchmarks/overview.py --rows 1000000 100000000 --days 1095 1095     the other tables; each takes 30 GB of
    python benchmarks/overview.py --rows 1000000 100000000 --days 100 10000    disk and most of an hour

Two apps on one server, with as many users and with few and many rows, spread evenly over some days up to now: a busier
app, if over the same days, or an older one, if with as many rows a day. CPU of the server's process for the statements
of one overview, so that what else the machine does counts for nothing. Parallel workers are off, since their CPU is not
that process's.
"""

from __future__ import annotations

import argparse
import datetime as dt
import statistics
from collections.abc import Iterator

import sqlalchemy as sa

import stage
from cpu import used_ms
from stage import table
from tallystick.dev.postgres import Server
from tallystick.ledger import close_all_days
from tallystick.web.console.queries import Queries

USERS = 1_000
ROUNDS = 10
FILL = """
INSERT INTO credit_transactions
  (id, user_id, type, status, amount, balance_after, sequence, description, idempotency_key, amount_paid, currency,
   created_at, completed_at)
SELECT gen_random_uuid(), 1 + mod(k, :users), (CASE WHEN buys THEN 'purchase' ELSE 'consumption' END)::{type},
  'completed', CASE WHEN buys THEN 1000 ELSE -1 END, 1000000, 10 + k / :users, 'Filled', 'overview ' || k,
  CASE WHEN buys THEN 7900 END, CASE WHEN buys THEN 'usd' END, at, at
FROM generate_series(1, :rows) AS k,
  LATERAL (SELECT mod(k, 10) = 0, now() - (:rows - k)::float / :rows * :days * interval '1 day') AS row (buys, at)
"""
# What an overview does not read, and each row is checked for, takes most of the time to fill.
NEEDLESS = """
SELECT format('ALTER TABLE credit_transactions DROP CONSTRAINT %I CASCADE', conname) FROM pg_constraint
WHERE conrelid = 'credit_transactions'::regclass AND contype IN ('c', 'p', 'u')
UNION ALL
SELECT format('DROP INDEX %s', indexrelid::regclass) FROM pg_index
WHERE indrelid = 'credit_transactions'::regclass
  AND NOT EXISTS (SELECT FROM pg_constraint WHERE conindid = indexrelid)
"""
INDEX = "SELECT pg_get_indexdef('credit_transactions_completed_at'::regclass)"


class Overview:
    """The overview of one app, all of it in one process of the server."""

    def __init__(self, app: stage.App, *, closed: bool) -> None:
        self.engine = sa.create_engine(app.url, pool_size=1, max_overflow=0)
        with self.engine.connect() as conn:
            self.pid = conn.scalar(sa.text("SELECT pg_backend_pid()"))
        self.queries, begun = Queries(app.ledger.config, self.engine), used_ms(self.pid)
        while closed and close_all_days(self.engine, app.ledger):
            pass
        self.closing_ms = used_ms(self.pid) - begun
        self.queries.figures(dt.datetime.now(dt.UTC))

    def cpu_ms(self, enough_ms: float) -> float:
        """CPU in ms of one, the mean of as many as take ``enough_ms``."""
        begun, times, spent = used_ms(self.pid), 0, 0.0
        while spent < enough_ms:
            self.queries.figures(dt.datetime.now(dt.UTC))
            times, spent = times + 1, used_ms(self.pid) - begun
        return spent / times


def filled(server: Server, rows: int, days: int) -> stage.App:
    app = stage.app(server, f"overview_{rows}", users=USERS, rows_each=1)
    with app.engine.execution_options(isolation_level="AUTOCOMMIT").connect() as conn:
        index = conn.scalar(sa.text(INDEX))
        for drop in conn.scalars(sa.text(NEEDLESS)).all():
            conn.execute(sa.text(drop))
        conn.execute(sa.text("SET session_replication_role = replica"))
        fill = FILL.format(type="credit_transaction_type")
        conn.execute(sa.text(fill), {"users": USERS, "rows": rows, "days": days})
        conn.execute(sa.text(index))
        conn.execute(sa.text("VACUUM ANALYZE credit_transactions"))
    return app


def lines(apps: list[stage.App], enough_ms: float, turns: int) -> Iterator[list[str]]:
    for closed in (False, True):
        both = [Overview(app, closed=closed) for app in apps]
        # in turns, so that what else the machine does meets both
        rounds = [[each.cpu_ms(enough_ms / turns) for each in both] for _ in range(turns)]
        few, many = (statistics.median(of_one) for of_one in zip(*rounds, strict=True))
        name = "days closed, but for today" if closed else "each day read from its rows"
        yield [name, f"{few:.1f}", f"{many:.1f}", f"{statistics.median(many / few for few, many in rounds):.1f}"]
        if closed:
            few, many = (each.closing_ms for each in both)
            yield ["closing sixty days, once", f"{few:.0f}", f"{many:.0f}", f"{many / max(few, 1):.1f}"]
        for each in both:
            each.engine.dispose()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="500 rows against 2,000, few times")
    parser.add_argument("--rows", type=int, nargs=2, default=[100_000, 3_000_000], help="of the two apps")
    parser.add_argument("--days", type=int, nargs=2, default=[90, 90], help="over which they are spread")
    asked = parser.parse_args()
    sizes, enough_ms, turns = ([500, 2_000], 2, 2) if asked.quick else (asked.rows, 2_000, ROUNDS)
    settings = stage.SETTINGS | {"autovacuum": "off", "fsync": "off", "max_parallel_workers_per_gather": "0"}
    with stage.server(settings=settings) as server:
        print(f"CPU of the server in ms for one overview, PostgreSQL {server.version}, {USERS:,} users")
        spread = list(zip(sizes, asked.days, strict=True))
        head = ["", *(f"{rows:,} rows in {days:,} days" for rows, days in spread), "ratio"]
        print(table(head, lines([filled(server, *each) for each in spread], enough_ms, turns)))


if __name__ == "__main__":
    main()
