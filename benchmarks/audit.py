"""Speed of the audit: ledger rows a second, beside one plain sum over the same table.

    python benchmarks/audit.py [--rows 1000000] [--rows-each 20] [--url postgresql://…]

Makes a healthy ledger in an empty database (without ``--url``: of an embedded server that is thrown away): users of
``--rows-each`` rows each, nine of ten rows unlocking a workshop, all keys uuids, every user's rows scattered over
the table as time would. Then floor and audit take turns; shown are the medians.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import sqlalchemy as sa

from tallystick import Config
from tallystick.audit import audit
from tallystick.declared_tables import Schema, stripe_reversals
from tallystick.dev.postgres import Server

TURNS = 5

FILL = (
    # a purchase of 10, then nine consumptions, and again: each ten rows leave one credit
    """
    INSERT INTO users (id, credit_balance, credit_sequence)
    SELECT md5('user ' || n)::uuid, 10 * ((:each + 9) / 10) - (:each - (:each + 9) / 10), :each
    FROM generate_series(1, :users) n
    """,
    """
    INSERT INTO workshops (id, user_id, title, credit_consumed_at)
    SELECT md5('workshop ' || n || ' ' || k)::uuid, md5('user ' || n)::uuid, 'Workshop', now()
    FROM generate_series(1, :each) k, generate_series(1, :users) n WHERE k % 10 <> 1
    """,
    """
    INSERT INTO credit_transactions (id, user_id, type, status, amount, balance_after, sequence, description,
                                     workshop_id, idempotency_key, amount_paid, currency, completed_at)
    SELECT md5('row ' || n || ' ' || k)::uuid, md5('user ' || n)::uuid,
           (CASE WHEN buys THEN 'purchase' ELSE 'consumption' END)::credit_transaction_type, 'completed',
           CASE WHEN buys THEN 10 ELSE -1 END, 10 * ((k + 9) / 10) - (k - (k + 9) / 10), k,
           CASE WHEN buys THEN 'Purchased 10' ELSE 'Credit consumed for Workshop: Workshop' END,
           CASE WHEN NOT buys THEN md5('workshop ' || n || ' ' || k)::uuid END,
           CASE WHEN NOT buys THEN 'unlock-' || n || '-' || k END,
           CASE WHEN buys THEN 7900 END, CASE WHEN buys THEN 'usd' END, now()
    FROM generate_series(1, :each) k, generate_series(1, :users) n, LATERAL (SELECT k % 10 = 1 AS buys) kind
    """,
)


def fill(url: str, *, users: int, each: int) -> None:
    pool = sa.create_engine(url, poolclass=sa.NullPool)
    with pool.begin() as conn:
        conn.exec_driver_sql("CREATE SCHEMA tallystick")
        Schema.of(Config().host).metadata.create_all(conn)
        stripe_reversals.metadata.create_all(conn)  # the audit compares it with the ledger
        conn.exec_driver_sql("SET LOCAL session_replication_role = replica")  # spares the foreign keys' triggers
        for statement in FILL:
            conn.execute(sa.text(statement), {"users": users, "each": each})
    with pool.connect().execution_options(isolation_level="AUTOCOMMIT") as conn:
        conn.exec_driver_sql("VACUUM ANALYZE")


def seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def measure(url: str) -> None:
    pool = sa.create_engine(url, poolclass=sa.NullPool)
    with pool.connect().execution_options(isolation_level="AUTOCOMMIT") as conn:
        floor = sa.text("SELECT count(*), sum(amount) FROM credit_transactions")
        rows = conn.execute(floor).scalar_one()
        if not (report := audit(conn, Config())).clean:
            raise SystemExit(f"the ledger is not healthy: {report.findings[0]}")
        user = conn.scalar(sa.text("SELECT id FROM users LIMIT 1"))
        turns = [
            (
                seconds(lambda: conn.execute(floor).all()),
                seconds(lambda: audit(conn, Config())),
                seconds(lambda: audit(conn, Config(), user=user)),
            )
            for _ in range(TURNS)
        ]
        conn.execute(sa.text("UPDATE users SET credit_balance = credit_balance + 1 WHERE id = :user"), {"user": user})
        search = seconds(lambda: audit(conn, Config()))
    plain, whole, one = (statistics.median(each) for each in zip(*turns, strict=True))
    print(f"{rows:,} ledger rows, {report.users:,} users; medians of {TURNS}")
    for name, took in (
        ("SELECT count(*), sum(amount)", plain),
        ("audit, healthy", whole),
        ("audit, one balance wrong (one run)", search),
    ):
        print(f"  {name:<36} {took:8.3f} s  {rows / took:12,.0f} rows/s  {took / plain:6.1f} x the plain sum")
    print(f"  {'audit of one user':<36} {one:8.3f} s")


@contextmanager
def database(url: str | None) -> Iterator[str]:
    if url is not None:
        yield url
        return
    with tempfile.TemporaryDirectory(prefix="tallystick-bench-") as folder:
        Path(folder).chmod(0o711)  # root's server runs as another user
        with Server(Path(folder) / "server") as server:
            yield server.create_database("bench")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--rows-each", type=int, default=20, help="rows of each user")
    parser.add_argument("--url", help="an empty database; superuser")
    arguments = parser.parse_args()
    with database(arguments.url) as url:
        fill(url, users=arguments.rows // arguments.rows_each, each=arguments.rows_each)
        measure(url)


if __name__ == "__main__":
    main()
