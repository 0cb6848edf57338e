"""Behind a real PgBouncer in transaction mode: each call may meet another server connection than the last."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from typing import Any

import pytest
import sqlalchemy as sa

import bouncer
from parallel import assert_ledger_consistent, outcome, threads
from tallystick import Consume, CreditTransaction, InsufficientCredits
from tallystick.errors import Key, PoolerRefused
from tallystick.migrate import apply
from worlds import World

pytestmark = pytest.mark.skipif(bouncer.PROGRAM is None, reason="needs a real pgbouncer (apt-get install pgbouncer)")


@pytest.fixture
def pooled(world: World) -> Iterator[World]:
    """The same host app, reached through a pool of four server connections."""
    with bouncer.bouncing(world.url) as url:
        yield World(url, world.config.host)
    assert_ledger_consistent(world)


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
                world.ledger.complete_purchase(conn, user, purchase=bought.id)
                world.ledger.consume(conn, user, key=f"{number}-{n} spent")
                world.ledger.refund(conn, user, bought.id, credits=1, key=f"{number}-{n} back")

    threads(world, 8, live, isolation="READ COMMITTED")
    with world.engine.connect() as conn:
        assert world.ledger.balance(conn, user) == 40


def test_a_migration_is_refused_there(pooled: World) -> None:
    with pytest.raises(PoolerRefused):
        apply(pooled.url, pooled.config)
