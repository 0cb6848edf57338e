"""Stalls of live traffic during a migration: the worst, of ours and of other ways, in one run.

    python benchmarks/migration.py [--rows 1000000] [--reader 10] [--rate 300] [--runs 5] [--warm 2] [--quick]

Every candidate migrates a fresh copy of one database (``users`` and ``workshops`` with ``--rows`` rows each) to the
same end, with the same statements, while an app reads and writes both tables at a fixed rate and a report reads
``users`` for ``--reader`` seconds. The load is open: a transaction's latency counts from the moment it was due, so
clients that wait cannot hide a stall. The server, the app and the migration are processes of their own. A worst stall
is one moment's luck, so each candidate has several runs, in turns, and the table shows the one in the middle.
"""

from __future__ import annotations

import argparse
import dataclasses
import multiprocessing
import random
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import psycopg
import sqlalchemy as sa

from tallystick import Config, migrate
from tallystick.dev.postgres import Server
from tallystick.migrate.revisions import HostNames, revisions

# the traffic is the one that the tests migrate under
sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "migrations"))
from traffic import traffic

SETTINGS = {"shared_buffers": "512MB", "max_wal_size": "4GB"}
HOST = """
CREATE TABLE users (id uuid PRIMARY KEY DEFAULT gen_random_uuid(), email text NOT NULL UNIQUE);
CREATE TABLE workshops (
  id uuid PRIMARY KEY DEFAULT gen_random_uuid(), user_id uuid NOT NULL REFERENCES users, title text,
  created_at timestamptz NOT NULL DEFAULT now());
INSERT INTO users (email) SELECT 'user ' || i FROM generate_series(1, %(rows)s) i;
INSERT INTO workshops (user_id, title) SELECT id, 'of ' || email FROM users;
CREATE INDEX ON workshops (user_id);
"""


@dataclasses.dataclass(frozen=True)
class Result:
    """One candidate: what traffic felt (milliseconds), what it took."""

    name: str
    worst_ms: float
    over_50_ms: int
    transactions: int
    errors: int
    attempts: int
    took_s: float


Candidate = Callable[[str, Config], int]
"""Migrates the database at an address and gives the number of attempts."""


def ours(url: str, config: Config) -> int:
    return migrate.apply(url, config).attempts


def retried(lock_timeout: str | None) -> Candidate:
    """The same statements one by one in one transaction, as migration tools send them."""

    def run(url: str, config: Config) -> int:
        attempts = 0
        with psycopg.connect(libpq(url), autocommit=True) as conn:
            while True:
                attempts += 1
                try:
                    with conn.transaction():
                        if lock_timeout:
                            conn.execute("SELECT set_config('lock_timeout', %s, true)", (lock_timeout,))
                        for statement in statements(config):
                            conn.execute(statement.as_bytes(conn))
                except (psycopg.errors.LockNotAvailable, psycopg.errors.DeadlockDetected):
                    time.sleep(random.uniform(0.5, 1.5))
                else:
                    break
            for index in revisions()[0].indexes(HostNames.of(config.host)).values():
                conn.execute(index.as_bytes(conn))
        return attempts

    return run


def statements(config: Config) -> Iterator[psycopg.sql.Composable]:
    """The host's tables first, then what is new: the order in which a diff of models is written down."""
    names = HostNames.of(config.host)
    revision = revisions()[0]  # the later ones leave the host's tables alone
    *changes, keys, trigger = revision.locked(names)
    yield from changes
    yield from revision.prepare(names)
    yield keys
    yield trigger


def nothing(_url: str, _config: Config) -> int:
    """The latencies of the machine alone."""
    time.sleep(3)
    return 0


CANDIDATES: dict[str, Candidate] = {
    "Tallystick": ours,
    "lock_timeout 200 ms and retry": retried("200ms"),
    "lock_timeout 500 ms and retry": retried("500ms"),
    "lock_timeout 5 s and retry": retried("5s"),
    "no timeout (naive)": retried(None),
    "no migration at all": nothing,
}


def libpq(url: str) -> str:
    return sa.make_url(url).set(drivername="postgresql").render_as_string(hide_password=False)


def app(url: str, rows: int, rate: float, pipe: Connection) -> None:
    """The app's process: traffic until told to stop."""
    with traffic(libpq(url), clients=16, per_second=rate, users=rows) as seen:
        pipe.send("running")
        pipe.recv()
    latencies = [latency for _, latency in seen.latencies_ms]
    pipe.send((max(latencies), sum(latency > 50 for latency in latencies), len(latencies), len(seen.errors)))


def report(url: str, seconds: float) -> None:
    """A reader of users, such as a report or a dump."""
    with psycopg.connect(libpq(url), application_name="report") as conn:
        conn.execute("SELECT count(*) FROM users WHERE email = 'user 1'")
        conn.execute("SELECT pg_sleep(%s)", (seconds,))


def measure(name: str, candidate: Candidate, url: str, options: argparse.Namespace) -> Result:
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["tallystick.migrate", "psycopg"])  # imported once, and not for each run anew
    here, there = processes.Pipe()
    traffic_process = processes.Process(target=app, args=(url, options.rows, options.rate, there), daemon=True)
    traffic_process.start()
    here.recv()
    time.sleep(options.warm)  # caches and plans
    reader = threading.Thread(target=report, args=(url, options.reader))
    reader.start()
    time.sleep(0.5)
    started = time.monotonic()
    attempts = candidate(url, Config(database_url=url))
    took_s = time.monotonic() - started
    reader.join()
    time.sleep(options.warm / 2)
    here.send("stop")
    worst_ms, over, transactions, errors = here.recv()
    traffic_process.join()
    return Result(name, worst_ms, over, transactions, errors, attempts, took_s)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000, help="rows in each of the two tables")
    parser.add_argument("--reader", type=float, default=10, help="seconds for which a report reads users")
    parser.add_argument("--rate", type=float, default=300, help="transactions a second")
    parser.add_argument("--runs", type=int, default=5, help="of each candidate")
    parser.add_argument(
        "--warm", type=float, default=2, help="seconds of traffic before a migration, half as many after it"
    )
    parser.add_argument("--quick", action="store_true", help="1,000 rows, half a second, one run: to see that it works")
    options = parser.parse_args()
    if options.quick:
        options.rows, options.reader, options.rate, options.runs, options.warm = 1_000, 0.5, 50, 1, 0.2

    with tempfile.TemporaryDirectory(prefix="tallystick-bench-") as folder:
        Path(folder).chmod(0o711)
        with Server(Path(folder) / "server", settings=SETTINGS) as server:
            template = server.create_database("template_app")
            with psycopg.connect(libpq(template), autocommit=True) as conn:
                conn.execute(HOST % {"rows": options.rows})
                conn.execute("VACUUM ANALYZE")
                version = conn.info.server_version // 10000
            runs: dict[str, list[Result]] = {name: [] for name in CANDIDATES}
            for turn in range(options.runs):
                for name, candidate in CANDIDATES.items():
                    print(f"{turn + 1} of {options.runs}: {name} …", file=sys.stderr, flush=True)
                    url = server.create_database("app", template="template_app")
                    with psycopg.connect(libpq(url), autocommit=True) as conn:
                        conn.execute("CHECKPOINT")  # the copy is on disk before anybody's latency is taken
                    runs[name].append(measure(name, candidate, url, options))
                    server.drop_database("app")

    print(
        f"PostgreSQL {version}, {options.rows:,} rows in each table, {options.rate:g} transactions a second, "
        f"a reader of {options.reader:g} s on users; the middle one of {options.runs} runs\n"
    )
    print("| migration | worst stall | of all runs | times ours | over 50 ms | app errors | attempts | took |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    ordered = [sorted(results, key=lambda run: run.worst_ms) for results in runs.values()]
    middles = [results[len(results) // 2] for results in ordered]
    best = middles[0].worst_ms
    for row, results in zip(middles, ordered, strict=True):
        spread = f"{results[0].worst_ms:,.0f} to {results[-1].worst_ms:,.0f} ms"
        felt = f"{row.worst_ms:,.0f} ms | {spread} | {row.worst_ms / best:.1f} | {row.over_50_ms} of {row.transactions}"
        print(f"| {row.name} | {felt} | {row.errors} | {row.attempts} | {row.took_s:.1f} s |")


if __name__ == "__main__":
    main()
