"""Effect of consumptions on the host's users table: HOT updates and growth, at several fillfactors.

    python benchmarks/bloat.py            ten minutes; the table of benchmarks/README.md
    python benchmarks/bloat.py --quick    seconds, to see that it runs

A consumption updates one row of ``users``, no indexed column of it. Where the row's page has room the new version goes
there (HOT): no index is touched, and the next reader of the page clears the old one away. Otherwise the row moves to
another page and every index of the table gets an entry. A table that was just loaded has full pages unless its
fillfactor says otherwise. The server's autovacuum is as PostgreSQL ships it.
"""

from __future__ import annotations

import argparse
import platform
import random
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from uuid import UUID, uuid4

import sqlalchemy as sa

import stage
from stage import table
from tallystick import Config, Consume, Ledger, UsersTable, migrate
from tallystick.config import HostMapping
from tallystick.dev.postgres import Server

CONFIG = Config(host=HostMapping(users=UsersTable(email="email"), workshops=None))
THREADS = 2  # as many as the cores that the table was made on

# As wide as users tables are: 20 rows a page, three indexes of the host's own.
HOST = """
CREATE TABLE users (
  id uuid PRIMARY KEY, email text NOT NULL UNIQUE, name text NOT NULL, avatar_url text, password_hash text NOT NULL,
  settings jsonb NOT NULL, created_at timestamptz NOT NULL, last_seen_at timestamptz);
CREATE INDEX ON users (created_at);
"""
FILL = """
INSERT INTO users
SELECT ('00000000-0000-4000-8000-' || lpad(to_hex(n), 12, '0'))::uuid, 'user' || n || '@example.com',
  'A Name of Ordinary Length', 'https://images.example.com/avatars/' || md5(n::text) || '.png',
  '$argon2id$v=19$m=65536,t=3,p=4$' || md5(n::text) || md5('x' || n),
  '{"theme": "dark", "language": "en", "emails": {"weekly": true, "offers": false}}', now(), now()
FROM generate_series(1, :users) n
"""
STATE = """
SELECT n_tup_upd AS updates, n_tup_hot_upd AS hot, autovacuum_count AS vacuums, pg_table_size(relid) AS size,
       pg_indexes_size(relid) AS indexes
FROM pg_stat_user_tables WHERE relname = 'users'
"""


@dataclass(frozen=True)
class Variant:
    """A fillfactor; ``rewritten`` when the rows were loaded under it, not before it was set.

    ``reader``: all the while somebody else's transaction keeps its snapshot, as a dump or a forgotten session does.
    ``indexed``: the host has an index on ``updated_at``, which every update of a row changes.
    """

    fillfactor: int
    rewritten: bool = True
    reader: bool = False
    indexed: bool = False

    @property
    def name(self) -> str:
        of = "the default" if self.fillfactor == 100 else "table rewritten" if self.rewritten else "set, not rewritten"
        more = [", a reader stays"] * self.reader + [", updated_at indexed"] * self.indexed
        return f"fillfactor {self.fillfactor}, {of}{''.join(more)}"


VARIANTS = (
    Variant(100),
    Variant(90),
    Variant(80, rewritten=False),
    Variant(80),
    Variant(100, reader=True),
    Variant(80, reader=True),
    Variant(100, indexed=True),
)


def user(number: int) -> UUID:
    return UUID(f"00000000-0000-4000-8000-{number:012x}")


def migrated(server: Server) -> None:
    """The database that each variant begins as a copy of."""
    url = server.create_database("migrated")
    with sa.create_engine(url, poolclass=sa.NullPool).begin() as conn:
        conn.exec_driver_sql(HOST)
    migrate.apply(url, CONFIG)


def prepare(server: Server, variant: Variant, users: int) -> str:
    """A migrated app whose users, all rich, were loaded under the fillfactor or before it was set."""
    url = server.create_database(f"fill_{VARIANTS.index(variant)}", template="migrated")
    engine = sa.create_engine(url, poolclass=sa.NullPool, isolation_level="AUTOCOMMIT")
    with engine.connect() as conn:
        fillfactor = f"ALTER TABLE users SET (fillfactor = {variant.fillfactor})"
        if variant.rewritten:
            conn.exec_driver_sql(fillfactor)
        if variant.indexed:
            conn.exec_driver_sql("CREATE INDEX ON users (updated_at)")
        conn.exec_driver_sql("ALTER TABLE users ALTER COLUMN credit_balance SET DEFAULT 1000000000")
        conn.execute(sa.text(FILL), {"users": users})
        conn.exec_driver_sql("ALTER TABLE users ALTER COLUMN credit_balance SET DEFAULT 0")
        if not variant.rewritten:
            conn.exec_driver_sql(fillfactor)
        conn.exec_driver_sql("VACUUM ANALYZE users")
    return url


def spend(url: str, users: int, count: int, size: int) -> None:
    """``count`` consumptions of one connection each, in lists of ``size`` or, if that is 1, single calls."""
    ledger, rng, tag = Ledger(CONFIG), random.Random(), uuid4().hex
    engine = sa.create_engine(url, poolclass=sa.NullPool, isolation_level="AUTOCOMMIT")
    with engine.connect() as conn:
        for n in range(0, count, size):
            if size == 1:
                ledger.consume(conn, user(rng.randint(1, users)), key=f"{tag} {n}")
            else:
                chosen = [user(rng.randint(1, users)) for _ in range(size)]
                ledger.consume_many(conn, [Consume(each, key=f"{tag} {n + i}") for i, each in enumerate(chosen)])


def state(url: str) -> dict[str, int]:
    others = sa.text(
        "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()"
        " AND backend_type = 'client backend' AND pid <> pg_backend_pid()"
    )
    with sa.create_engine(url, poolclass=sa.NullPool, isolation_level="AUTOCOMMIT").connect() as conn:
        while conn.scalar(others):  # sessions report what they did before they are gone
            time.sleep(0.02)
        return dict(conn.execute(sa.text(STATE)).mappings().one())


@contextmanager
def reading(url: str) -> Iterator[None]:
    engine = sa.create_engine(url, poolclass=sa.NullPool, isolation_level="REPEATABLE READ")
    with engine.connect() as conn:
        conn.execute(sa.text("SELECT count(*) FROM users"))
        yield


def measure(server: Server, variant: Variant, *, users: int, count: int, singles: int) -> list[str]:
    url = prepare(server, variant, users)
    before, took = state(url), time.perf_counter()
    with ThreadPoolExecutor(THREADS) as pool, reading(url) if variant.reader else nullcontext():
        for share, size in ((singles, 1), (count - singles, 500)):
            list(pool.map(lambda _, of=(share, size): spend(url, users, of[0] // THREADS, of[1]), range(THREADS)))
    took = time.perf_counter() - took
    after = state(url)
    updates = after["updates"] - before["updates"]
    return [
        variant.name,
        f"{100 * (after['hot'] - before['hot']) / updates:.1f} %",
        *(
            f"{before[what] / 2**20:.1f} → {after[what] / 2**20:.1f} ({after[what] / before[what]:.2f})"
            for what in ("size", "indexes")
        ),
        f"{after['vacuums'] - before['vacuums']}",
        f"{count / took:,.0f}",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="1,000 consumptions, to see that it runs")
    parser.add_argument("--count", type=int, default=1_000_000, help="consumptions for each fillfactor")
    parser.add_argument("--folder", type=Path, help="put the server's data here, on the disk to be measured")
    asked = parser.parse_args()
    users, count = (500, 1_000) if asked.quick else (50_000, asked.count)
    with stage.server(asked.folder) as server:
        about = f"PostgreSQL {server.version}, Python {platform.python_version()}, fsync on"
        migrated(server)
        lines = []
        for variant in VARIANTS:
            print(variant.name, file=sys.stderr, flush=True)
            lines.append(measure(server, variant, users=users, count=count, singles=count // 50))
            print(*lines[-1], file=sys.stderr, flush=True)
    print(f"{about}; {users:,} users, {count:,} consumptions of random ones\n")
    print(table(["users", "HOT", "table MB", "indexes MB", "autovacuums", "a second"], lines))


if __name__ == "__main__":
    main()
