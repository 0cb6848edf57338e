"""The time for which ``tallystick migrate widen-key`` locks the ledger, and the time to validate its foreign keys.

    python benchmarks/widen.py [--rows 1000000] [--quick]

An app with integer keys has 10,000 users and ``--rows`` credit transactions. Nobody else uses the server.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import sqlalchemy as sa

from tallystick import Config, HostMapping, UsersTable, migrate
from tallystick.dev.postgres import Server

USERS = 10_000
LEDGER = """
INSERT INTO credit_transactions
  (id, user_id, type, status, amount, balance_after, sequence, description, idempotency_key, completed_at)
SELECT tallystick.uuid7(), i %% {users} + 1, 'grant', 'completed', 1, i / {users} + 1, i / {users} + 1, 'A grant', i,
  now()
FROM generate_series(0, {rows} - 1) i
"""


def main() -> None:
    """Print a table of one line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--quick", action="store_true", help="2,000 rows, to see that it runs")
    options = parser.parse_args()
    rows = 2_000 if options.quick else options.rows
    mapping = HostMapping(users=UsersTable(key_type="integer"), workshops=None)
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)  # root's embedded server runs as another account
        with Server(Path(folder) / "server", settings={"max_wal_size": "4GB"}) as server:
            url = server.create_database("app")
            engine = sa.create_engine(url, isolation_level="AUTOCOMMIT")
            with engine.connect() as conn:
                conn.exec_driver_sql("CREATE TABLE users (id integer PRIMARY KEY)")
                conn.exec_driver_sql(f"INSERT INTO users SELECT generate_series(1, {USERS})")
            migrate.apply(url, Config(database_url=url, host=mapping))
            with engine.connect() as conn:
                conn.exec_driver_sql(LEDGER.format(users=USERS, rows=rows), ())
                conn.exec_driver_sql("VACUUM ANALYZE")
            widened = migrate.widen_key(url, "users")
            engine.dispose()
    validated_ms = sum(step.duration_ms for step in widened.online)
    print("| rows | the ledger is locked | its foreign keys are validated |\n|---:|---:|---:|")
    print(f"| {rows:,} | {widened.rewrite_ms / 1000:.1f} s | {validated_ms / 1000:.1f} s |")


if __name__ == "__main__":
    main()
