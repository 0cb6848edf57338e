"""Stalls of live traffic while opening balances are written: the worst, beside the same traffic alone.

    python benchmarks/opening.py [--rows 1000000] [--rate 200] [--kills 20] [--quick]

``--rows`` users have credits. An app reads and writes users and workshops at a fixed rate, first alone, then beside
``tallystick migrate apply``, which gives each user an opening balance. It is killed at ``--kills`` random moments, and
begun again each time. A transaction's latency counts from the moment it was due, so clients that wait cannot hide a
stall. Afterwards the audit must find nothing.
"""

from __future__ import annotations

import argparse
import multiprocessing
import random
import sys
import tempfile
import time
from pathlib import Path

import sqlalchemy as sa

from tallystick import Config, migrate
from tallystick.audit import audit
from tallystick.dev.postgres import Server

# the traffic is the one that the tests migrate under
sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "migrations"))
from traffic import Traffic, traffic

HOST = """
CREATE TABLE users (
  id uuid PRIMARY KEY DEFAULT gen_random_uuid(), email text NOT NULL UNIQUE, credit_balance integer DEFAULT 0);
CREATE TABLE workshops (
  id uuid PRIMARY KEY DEFAULT gen_random_uuid(), user_id uuid NOT NULL REFERENCES users, title text,
  created_at timestamptz NOT NULL DEFAULT now());
INSERT INTO users (email, credit_balance) SELECT 'user ' || i, mod(i, 9) + 1 FROM generate_series(1, %(rows)s) i;
INSERT INTO workshops (user_id, title) SELECT id, 'of ' || email FROM users LIMIT 10000;
CREATE INDEX ON workshops (user_id);
"""


def main() -> None:
    """Print a table of two lines."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--rate", type=float, default=200)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--quick", action="store_true", help="1,000 users, to see that it runs")
    options = parser.parse_args()
    rows, rate = (1_000, 50) if options.quick else (options.rows, options.rate)
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)  # root's embedded server runs as another account
        measure(folder, rows, rate, 0.5 if options.quick else 20, 1 if options.quick else options.kills)


def measure(folder: str, rows: int, rate: float, alone_s: float, kills: int) -> None:
    """Both runs of the traffic, on one server."""
    with Server(Path(folder) / "server", settings={"max_wal_size": "4GB"}) as server:
        url = server.create_database("app")
        config = Config(database_url=url)
        libpq = sa.make_url(url).set(drivername="postgresql").render_as_string(hide_password=False)
        engine = sa.create_engine(url, isolation_level="AUTOCOMMIT")
        with engine.connect() as conn:
            for statement in filter(str.strip, (HOST % {"rows": rows}).split(";\n")):
                conn.exec_driver_sql(statement)
            conn.exec_driver_sql("VACUUM ANALYZE")
        with traffic(libpq, per_second=rate, users=rows) as alone:
            time.sleep(alone_s)
        with traffic(libpq, per_second=rate, users=rows) as beside:
            began = time.perf_counter()
            left = [killed(url, config, random.uniform(2, 4)) for _ in range(kills)]
            migrate.apply(url, config)
            taken_s = time.perf_counter() - began
        with engine.connect() as conn:
            report = audit(conn, config)
            opened = conn.exec_driver_sql(OPENED).scalar_one()
        engine.dispose()
    if opened != rows:
        sys.exit(f"{opened:,} of {rows:,} users have an opening balance")
    print(f"{opened:,} opening balances in {taken_s:.1f} s, killed {sum(left)} times; rows audited: {report.rows:,}")
    print("| traffic | worst stall | over 50 ms | transactions | errors |\n|---|---:|---:|---:|---:|")
    print(line("alone", alone))
    print(line("beside apply and the opening balances", beside))
    if not report.clean:
        sys.exit(f"the audit found {report.findings[0]}")


OPENED = "SELECT count(*) FROM credit_transactions WHERE idempotency_key = 'tallystick:opening'"


def killed(url: str, config: Config, after_s: float) -> bool:
    """Run ``migrate.apply`` in a process of its own and kill it; false if it was done before that."""
    process = multiprocessing.get_context("spawn").Process(target=migrate.apply, args=(url, config), daemon=True)
    process.start()
    process.join(after_s)
    is_killed = process.is_alive()
    process.kill()
    process.join()
    return is_killed


def line(name: str, seen: Traffic) -> str:
    """One line of the table."""
    slow = sum(1 for _, latency in seen.latencies_ms if latency > 50)
    return f"| {name} | {seen.worst_ms:.0f} ms | {slow} | {len(seen.latencies_ms):,} | {len(seen.errors)} |"


if __name__ == "__main__":
    main()
