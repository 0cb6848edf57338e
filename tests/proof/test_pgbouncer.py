"""Behind a real PgBouncer in transaction mode: each call may meet another server connection than the last."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
import sqlalchemy as sa

from crowd import PATIENCE_S, books_balance, outcome, threads
from tallystick import Consume, CreditTransaction, InsufficientCredits
from tallystick.errors import Key, PoolerRefused
from tallystick.migrate import apply
from worlds import World

BOUNCER = shutil.which("pgbouncer") or shutil.which("pgbouncer", path="/usr/sbin")

pytestmark = pytest.mark.skipif(BOUNCER is None, reason="needs a real pgbouncer (apt-get install pgbouncer)")

SETTINGS = """
[databases]
{database} = host={host} port=5432 dbname={database} user=postgres
[pgbouncer]
listen_addr =
unix_socket_dir = {folder}
listen_port = 6432
auth_type = any
pool_mode = transaction
default_pool_size = 4
max_client_conn = 200
server_idle_timeout = 2
logfile = {folder}/log
"""


@pytest.fixture
def pooled(world: World) -> Iterator[World]:
    """The same host app, reached through a pool of four server connections."""
    address = sa.make_url(world.url)
    with tempfile.TemporaryDirectory(prefix="tallystick-bouncer-") as name:
        folder = Path(name)
        settings = folder / "pgbouncer.ini"
        settings.write_text(SETTINGS.format(database=address.database, host=address.query["host"], folder=folder))
        command = [str(BOUNCER), "-q", str(settings)]
        if os.geteuid() == 0:  # it refuses to be root, and must get to the server's socket
            owner = Path(str(address.query["host"])).stat().st_uid
            os.chown(folder, owner, -1)
            os.chown(settings, owner, -1)
            command[1:1] = ["-u", pwd.getpwuid(owner).pw_name]
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
            try:
                deadline = time.monotonic() + PATIENCE_S
                while not (folder / ".s.PGSQL.6432").exists():
                    assert process.poll() is None, (folder / "log").read_text()
                    assert time.monotonic() < deadline
                    time.sleep(0.02)
                yield World(f"{world.url.split('?')[0]}?host={quote(name, safe='')}&port=6432", world.config.host)
            finally:
                process.terminate()
    books_balance(world)


def through(pooled: World) -> World:
    """As an app connects there: without prepared statements, which older PgBouncers do not follow."""
    pooled.engine = sa.create_engine(
        pooled.url, poolclass=sa.NullPool, connect_args={"prepare_threshold": None, "application_name": "app"}
    )
    return pooled


def spend(world: World, conn: sa.Connection, number: int, user: Key) -> list[Any]:
    results = [outcome(lambda n=n: world.ledger.consume(conn, user, key=f"{number}-{n}")) for n in range(10)]
    many = [Consume(user, key=f"{number}-many-{n}") for n in range(5)] + [Consume(user, key=f"{number}-0")]
    return results + world.ledger.consume_many(conn, many)


def test_a_hot_account_through_a_pool_in_transaction_mode(pooled: World) -> None:
    world = through(pooled)
    user = world.user(credits=100)
    results = list(chain.from_iterable(threads(world, 16, spend, user)))
    spent = [row for row in results if isinstance(row, CreditTransaction) and not row.replayed]
    assert sorted(row.balance_after for row in spent) == list(range(100))
    assert all(isinstance(result, CreditTransaction | InsufficientCredits) for result in results)


def test_transactions_of_several_calls_through_the_pool(pooled: World) -> None:
    world = through(pooled)
    user = world.user()

    def live(world: World, conn: sa.Connection, number: int) -> None:
        for n in range(5):
            with conn.begin():
                bought = world.ledger.start_purchase(conn, user, credits=3, description="A pack", key=f"{number}-{n}")
                world.ledger.complete_purchase(conn, user, id=bought.id)
                world.ledger.consume(conn, user, key=f"{number}-{n} spent")
                world.ledger.refund(conn, user, bought.id, credits=1, key=f"{number}-{n} back")

    threads(world, 8, live, isolation="READ COMMITTED")
    with world.engine.connect() as conn:
        assert world.ledger.balance(conn, user) == 40


def test_a_migration_is_refused_there(pooled: World) -> None:
    with pytest.raises(PoolerRefused):
        apply(pooled.url, pooled.config)
