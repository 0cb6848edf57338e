"""Cost of a ledger of ten million rows, beside one of ten thousand.

    python benchmarks/growth.py                   five minutes and 6 GB of disk; the tables of benchmarks/README.md
    python benchmarks/growth.py --rows 100000     half a minute, to see that it runs
    python benchmarks/growth.py --quick           the least that shows all tables

Two migrated apps on one server with fsync on, both as the ledger would have left them, filled by SQL past it: a tenth
of the rows belongs to one user, the others have ten rows each, scattered over the table as time would scatter them.
Then operations take turns on both, and both are audited. At last consumptions are taken apart, by whether a user's
pages are in memory and whether PostgreSQL writes them whole to its log (as it does with each page that changes for the
first time since a checkpoint): which of the two makes the large ledger slower?
"""

from __future__ import annotations

import argparse
import datetime as dt
import hashlib
import itertools
import platform
import resource
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import sqlalchemy as sa

import stage
from stage import table
from tallystick import Config, Ledger, Progress, migrate
from tallystick.audit import audit
from tallystick.dev.postgres import Server

SETTINGS = {
    **stage.SETTINGS,
    "shared_buffers": "2GB",
    "max_wal_size": "16GB",
    "maintenance_work_mem": "1GB",
    "checkpoint_timeout": "30min",
}
HOST = """
CREATE TABLE users (id uuid PRIMARY KEY, email text NOT NULL);
CREATE TABLE workshops (
  id uuid PRIMARY KEY, user_id uuid NOT NULL REFERENCES users, title text,
  created_at timestamptz NOT NULL DEFAULT now());
CREATE INDEX ON workshops (user_id);
"""
CONFIG = Config()
EACH = 10  # rows of an ordinary user
PAGE = 20
LATEST = dt.datetime(2026, 1, 1, tzinfo=dt.UTC)

# Of each ten rows: a purchase of 1,000, then nine consumptions, two of which unlock a workshop. In each batch every
# ordinary user gets one row, and the first user a tenth of its own.
USERS = """
INSERT INTO users (id, email, credit_balance, credit_sequence)
SELECT md5('user ' || n)::uuid, 'user' || n || '@example.com', 1000 * (k / 10) - (k - k / 10), k
FROM generate_series(1, 1 + {users}) n, LATERAL (SELECT CASE n WHEN 1 THEN {heavy} ELSE {each} END) r (k)
"""
BATCH = """
INSERT INTO credit_transactions (id, user_id, type, status, amount, balance_after, sequence, description,
                                 workshop_id, idempotency_key, amount_paid, currency, created_at, completed_at)
SELECT md5('row ' || n || ' ' || k)::uuid, md5('user ' || n)::uuid,
       (CASE WHEN buys THEN 'purchase' ELSE 'consumption' END)::credit_transaction_type, 'completed',
       CASE WHEN buys THEN 1000 ELSE -1 END, 1000 * ((k + 9) / 10) - (k - (k + 9) / 10), k,
       CASE WHEN buys THEN 'Purchased 1,000' ELSE 'Credit consumed' END,
       CASE WHEN k % 10 IN (2, 3) THEN md5('workshop ' || n || ' ' || k)::uuid END,
       CASE WHEN NOT buys THEN 'key ' || n || ' ' || k END,
       CASE WHEN buys THEN 7900 END, CASE WHEN buys THEN 'usd' END, at, at
FROM (SELECT n, {batch} AS k FROM generate_series(2, 1 + {users}) n
      UNION ALL SELECT 1, k FROM generate_series(({batch} - 1) * {heavy} / 10 + 1, {batch} * {heavy} / 10) k) of,
  LATERAL (SELECT k % 10 = 1, '{latest}'::timestamptz - (1000000 - k) * interval '1 minute') x (buys, at)
"""
WORKSHOPS = """
INSERT INTO workshops (id, user_id, title, credit_consumed_at)
SELECT workshop_id, user_id, 'Workshop', completed_at FROM credit_transactions WHERE workshop_id IS NOT NULL
"""


def key(number: int) -> UUID:
    """Of a user by number, as USERS makes it."""
    return UUID(hashlib.md5(f"user {number}".encode(), usedforsecurity=False).hexdigest())


@dataclass(frozen=True)
class Filled:
    """An app of so many rows; ``heavy`` of them belong to its first user."""

    url: str
    rows: int
    heavy: int
    users: int

    @property
    def thousandth_page(self) -> str:
        """The cursor of the first user's thousandth page, or of the last one if there are fewer."""
        return str(max(PAGE + 1, self.heavy - 999 * PAGE))


def fill(server: Server, database: str, rows: int) -> Filled:
    """Tables and rules by the migration; rows without triggers and secondary indexes, which are built at the end."""
    heavy = rows // 10
    made = Filled(server.create_database(database), rows, heavy, (rows - heavy) // EACH)
    engine = sa.create_engine(made.url, poolclass=sa.NullPool, isolation_level="AUTOCOMMIT")
    with engine.connect() as conn:
        conn.exec_driver_sql(HOST)
    migrate.apply(made.url, CONFIG)
    indexes = """
        SELECT indexrelid::regclass::text AS name, pg_get_indexdef(indexrelid) AS made FROM pg_index
        WHERE indrelid IN ('credit_transactions'::regclass, 'workshops'::regclass)
          AND indexrelid NOT IN (SELECT conindid FROM pg_constraint)
    """
    with engine.connect() as conn:
        later = conn.execute(sa.text(indexes)).all()
        conn.exec_driver_sql("SET session_replication_role = replica")
        for index in later:
            conn.exec_driver_sql(f"DROP INDEX {index.name}")
        values = {"users": made.users, "heavy": heavy, "each": EACH, "latest": LATEST}
        conn.exec_driver_sql(USERS.format(**values))
        for batch in range(1, EACH + 1):
            log(f"{database}: batch {batch} of {EACH}")
            conn.exec_driver_sql(BATCH.format(batch=batch, **values).replace("%", "%%"))
        conn.exec_driver_sql(WORKSHOPS)
        for index in later:
            log(f"{database}: {index.name}")
            conn.exec_driver_sql(index.made)
        conn.exec_driver_sql("VACUUM ANALYZE")
        conn.exec_driver_sql("CHECKPOINT")
    return made


def log(words: str) -> None:
    print(words, file=sys.stderr, flush=True)


# --- operations ---


def calls(app: Filled) -> dict[str, Callable[[sa.Connection, int], Any]]:
    """Each operation, called with a connection and a number that never comes twice."""
    ledger, first = Ledger(CONFIG), key(1)
    ago = LATEST - dt.timedelta(minutes=1_000_000 - app.heavy // 2)

    def some(n: int) -> UUID:
        return key(2 + n * 7919 % app.users)

    return {
        "consume": lambda conn, n: ledger.consume(conn, some(n), key=uuid4().hex),
        "consume, the user with a tenth of all rows": lambda conn, _: ledger.consume(conn, first, key=uuid4().hex),
        "balance": lambda conn, n: ledger.balance(conn, some(n)),
        "balance_at, half of all rows ago": lambda conn, _: ledger.balance_at(conn, first, ago),
        "history, first page of 20": lambda conn, _: ledger.history(conn, first, limit=PAGE),
        "history, thousandth page": lambda conn, _: ledger.history(conn, first, limit=PAGE, before=app.thousandth_page),
        "audit of one user": lambda conn, n: audit(conn, CONFIG, user=some(n)),
    }


def medians(apps: list[Filled], numbers: Iterator[int], *, count: int, turns: int) -> dict[str, list[float]]:
    """The median of each operation in each app, in milliseconds, taken in turns."""
    engines = [sa.create_engine(app.url, poolclass=sa.NullPool, isolation_level="AUTOCOMMIT") for app in apps]
    found: dict[str, list[list[float]]] = {}
    conns = [engine.connect() for engine in engines]
    for _ in range(turns):
        for which, (app, conn) in enumerate(zip(apps, conns, strict=True)):
            for name, call in calls(app).items():
                times = count // 10 if "audit" in name else count
                took = []
                for n in range(times + 20):
                    begun = time.perf_counter()
                    call(conn, next(numbers))
                    if n >= 20:
                        took.append(time.perf_counter() - begun)
                found.setdefault(name, [[] for _ in apps])[which].append(statistics.median(took) * 1000)
    for conn in conns:
        conn.close()
    return {name: [statistics.median(of) for of in each] for name, each in found.items()}


def consumptions(apps: list[Filled], numbers: Iterator[int], *, count: int, turns: int) -> list[list[str]]:
    """Of each kind, in each app: the median in milliseconds, and the bytes that one call adds to PostgreSQL's log.

    Random users are new ones (of the large app), then the same again: their pages are in memory by then, and in the
    log; a checkpoint takes the second away, and ``full_page_writes = off`` does without it.
    """
    random, heavy = "consume", "consume, the user with a tenth of all rows"
    engines = [sa.create_engine(app.url, poolclass=sa.NullPool, isolation_level="AUTOCOMMIT") for app in apps]
    *conns, beside = [engine.connect() for engine in (*engines, engines[0])]
    found: dict[str, list[list[tuple[float, float]]]] = {}

    def written() -> int:
        return int(beside.scalar(sa.text("SELECT pg_current_wal_insert_lsn() - '0/0'")))

    def take(kind: str, name: str, users: list[int]) -> None:
        """Call by call in turns: what else the machine does meets both apps."""
        each: list[tuple[Callable[..., Any], sa.Connection, list[float], list[int]]] = [
            (calls(app)[name], conn, [], []) for app, conn in zip(apps, conns, strict=True)
        ]
        for n in users:
            for call, conn, took, wal in each:
                before, begun = written(), time.perf_counter()
                call(conn, n)
                took.append(time.perf_counter() - begun)
                wal.append(written() - before)
        for runs, (_, _, took, wal) in zip(found.setdefault(kind, [[] for _ in apps]), each, strict=True):
            runs.append((statistics.median(took) * 1000, statistics.mean(wal)))

    def whole_pages(*, logged: bool) -> None:
        beside.exec_driver_sql(f"ALTER SYSTEM {'RESET full_page_writes' if logged else 'SET full_page_writes = off'}")
        beside.exec_driver_sql("SELECT pg_reload_conf()")
        time.sleep(1)  # the checkpointer is the one who passes it on

    take("not counted", random, list(itertools.islice(numbers, 20)))  # statements are prepared, catalogs read
    del found["not counted"]
    for _ in range(turns):
        users, others = (list(itertools.islice(numbers, count)) for _ in range(2))
        beside.exec_driver_sql("CHECKPOINT")
        take("new users", random, users)
        take("the same users again", random, users)
        beside.exec_driver_sql("CHECKPOINT")
        take("the same users after a checkpoint", random, users)
        whole_pages(logged=False)
        take("new users, full_page_writes off", random, others)
        take("the same users again, full_page_writes off", random, others)
        whole_pages(logged=True)
        take("the user with a tenth of all rows", heavy, users)
    for conn in (*conns, beside):
        conn.close()
    lines = []
    for kind, each in found.items():
        (few_ms, few_wal), (many_ms, many_wal) = (map(statistics.median, zip(*of, strict=True)) for of in each)
        ms = [f"{few_ms:.2f}", f"{many_ms:.2f}", f"{many_ms / few_ms:.2f}"]
        lines.append([kind, *ms, f"{few_wal:,.0f}", f"{many_wal:,.0f}"])
    return lines


# --- audits ---


@dataclass
class Cost:
    """Cost of an audit: its seconds, the longest statement's, the memory of its server processes and of its client."""

    seconds: float = 0
    longest_s: float = 0
    server_mb: float = 0
    client_mb: float = 0
    rows: int = 0


@contextmanager
def memory_of(database: str, conn: sa.Connection, cost: Cost) -> Iterator[None]:
    """The most private memory that the backend and its parallel workers had at once, looked at 50 times a second."""
    leader = conn.scalar(sa.text("SELECT pg_backend_pid()"))
    done = threading.Event()
    engine = sa.create_engine(database, poolclass=sa.NullPool, isolation_level="AUTOCOMMIT")

    def look() -> None:
        crew = sa.text("SELECT pid FROM pg_stat_activity WHERE pid = :leader OR leader_pid = :leader")
        with engine.connect() as watching:
            while not done.wait(0.02):
                pids = watching.execute(crew, {"leader": leader}).scalars().all()
                cost.server_mb = max(cost.server_mb, sum(private_mb(pid) for pid in pids))

    watcher = threading.Thread(target=look)
    watcher.start()
    try:
        yield
    finally:
        done.set()
        watcher.join()


def private_mb(pid: int) -> float:
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return 0
    return next((int(line.split()[1]) / 1024 for line in status.splitlines() if line.startswith("RssAnon")), 0)


def audited(app: Filled, *, user: UUID | None = None) -> Cost:
    cost, last = Cost(), time.perf_counter()

    def progress(_: Progress) -> None:
        nonlocal last
        now = time.perf_counter()
        cost.longest_s, last = max(cost.longest_s, now - last), now

    engine = sa.create_engine(app.url, poolclass=sa.NullPool, isolation_level="AUTOCOMMIT")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with engine.connect() as conn, memory_of(app.url, conn, cost):
        last = time.perf_counter()
        report = audit(conn, CONFIG, user=user, progress=progress)
    if not report.clean:
        raise SystemExit(f"the ledger is not clean: {report.findings[0]}")
    cost.seconds, cost.rows = report.seconds, report.rows
    cost.client_mb = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    return cost


def audits(apps: list[Filled], turns: int) -> list[list[str]]:
    lines = []
    for name, user in (("whole audit", None), ("audit of the user with a tenth of all rows", key(1))):
        for app in apps:
            runs = sorted((audited(app, user=user) for _ in range(turns)), key=lambda run: run.seconds)
            run = runs[turns // 2]
            lines.append(
                [
                    f"{name}, {app.rows:,} rows",
                    f"{run.seconds:.2f}",
                    f"{run.rows / run.seconds:,.0f}",
                    f"{run.longest_s:.2f}",
                    f"{max(each.server_mb for each in runs):.0f}",
                    f"{max(each.client_mb for each in runs):.0f}",
                ]
            )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=10_000_000, help="ledger rows of the large app")
    parser.add_argument("--small", type=int, default=10_000, help="ledger rows of the small one")
    parser.add_argument("--folder", type=Path, help="put the server's data here, on the disk to be measured")
    parser.add_argument("--quick", action="store_true", help="5,000 rows against 1,000, few calls, one turn")
    asked = parser.parse_args()
    rows, small, count, turns = (5_000, 1_000, 10, 1) if asked.quick else (asked.rows, asked.small, 500, 3)
    with stage.server(asked.folder, SETTINGS) as server:
        begun = time.perf_counter()
        apps = [fill(server, "small", small), fill(server, "large", rows)]
        log(f"filled in {time.perf_counter() - begun:.0f} s")
        few, many = (f"{app.rows:,} rows" for app in apps)
        print(f"PostgreSQL {server.version}, Python {platform.python_version()}, fsync on; medians of {turns} turns\n")
        numbers = itertools.count(1)
        lines = audits(apps, turns)
        found = medians(apps, numbers, count=count, turns=turns)
        head = ["median ms", few, many, "ratio"]
        print(table(head, ([name, f"{a:.2f}", f"{b:.2f}", f"{b / a:.2f}"] for name, (a, b) in found.items())))
        print()
        print(table(["", "s", "rows/s", "longest part s", "server MB", "client MB"], lines))
        print()
        lines = consumptions(apps, numbers, count=count, turns=turns)
        print(table(["consume, ms and bytes of WAL", few, many, "ratio", f"WAL, {few}", f"WAL, {many}"], lines))


if __name__ == "__main__":
    main()
