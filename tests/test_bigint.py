"""A host that counts in parts of a credit: every operation beyond 2^31, up to both ends of bigint."""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable, Iterator
from fractions import Fraction

import psycopg
import pytest
import sqlalchemy as sa

from tallystick import Config, HostMapping, Pack, errors, migrate
from tallystick.audit import audit
from tallystick.ledger import Consume
from tallystick.schema import INT64_MAX, INT64_MIN
from tallystick.web.console.queries import Queries
from worlds import SHAPES, World

MILLION = 1_000_000
MUCH = 5_000 * MILLION  # more than 2^31, and less than 2^33


@pytest.fixture
def big(fresh_database: Callable[..., str]) -> Iterator[World]:
    url = fresh_database()
    with psycopg.connect(url.replace("+psycopg", "")) as conn:
        conn.execute(SHAPES["uuid"].ddl.encode())
    host = HostMapping(users=SHAPES["uuid"].host.users, credits="bigint")
    migrate.apply(url, Config(database_url=url, host=host))
    world = World(url, host)
    yield world
    with world.engine.connect() as conn:
        assert audit(conn, world.config).clean
        assert migrate.status(conn, world.config).healthy


def test_the_overview_and_the_snippets_count_beyond_an_integer(big: World) -> None:
    user = big.user()
    with big.engine.begin() as conn:
        bought = big.ledger.start_purchase(conn, user, credits=MUCH, description="A pack", key="p")
        big.ledger.complete_purchase(conn, user, purchase=bought.id, amount_paid=700, currency="usd")
    figures = Queries(big.config, big.engine).figures(dt.datetime.now(dt.UTC))
    assert (figures.holdings.outstanding, figures.total("sold")) == (MUCH, MUCH)
    assert figures.money[0].average == Fraction(700, MUCH)
    assert 'bigint("credit_balance", { mode: "number" })' in migrate.snippet("drizzle", big.config)
    django = migrate.snippet("django", big.config)
    assert "credit_held = of_the_ledger(models.BigIntegerField(" in django
    assert "credit_sequence = of_the_ledger(models.IntegerField(" in django
    assert "credit_balance: Mapped[int] = mapped_column(BigInteger," in migrate.snippet("sqlalchemy", big.config)
    assert "BigInteger, Integer," in migrate.snippet("sqlalchemy", big.config)
    assert "creditBalance      BigInt " in migrate.snippet("prisma", big.config)


def test_every_operation_counts_beyond_an_integer(big: World) -> None:
    ledger, user, other = big.ledger, big.user(), big.user()
    workshop = big.workshop(user)
    with big.engine.begin() as conn:
        bought = ledger.start_purchase(conn, user, credits=MUCH, description="A pack", key="p")
        assert ledger.complete_purchase(conn, user, purchase=bought.id).balance_after == MUCH
        assert ledger.consume(conn, user, credits=MUCH - 1, workshop=workshop, key="c").balance_after == 1
        assert ledger.consume(conn, user, credits=MUCH - 1, workshop=workshop, key="c").replayed
        with pytest.raises(errors.IdempotencyKeyReused, match=str(MUCH)):
            ledger.consume(conn, user, credits=MUCH, key="c")
        with pytest.raises(errors.InsufficientCredits) as refused:
            ledger.consume(conn, user, credits=MUCH, key="d")
        assert (refused.value.balance, refused.value.required) == (1, MUCH)
        assert ledger.refund(conn, user, bought.id, credits=MUCH - 1, key="r").balance_after == 2 - MUCH
        with pytest.raises(errors.RefundExceedsPurchase) as exceeded:
            ledger.refund(conn, user, bought.id, credits=MUCH, key="s")
        assert exceeded.value.left == 1
        assert ledger.reinstate(conn, user, bought.id, key="t").balance_after == 1
        granted = ledger.grant(conn, user, credits=3 * MUCH, key="g", description="Welcome")
        assert granted.balance_after == ledger.balance(conn, user) == ledger.lock(conn, user) == 3 * MUCH + 1
        ledger.grant(conn, other, credits=MUCH, key="g", description="Welcome")
        items = [Consume(user, credits=MUCH, key=f"m{n}") for n in range(3)]
        done = ledger.consume_many(conn, [*items, Consume(other, credits=MUCH + 1, key="m"), Consume(other, key="n")])
        assert [getattr(row, "balance_after", None) for row in done] == [2 * MUCH + 1, MUCH + 1, 1, None, MUCH - 1]
        assert isinstance(done[3], errors.InsufficientCredits)
        assert ledger.balance_at(conn, user, granted.completed_at) == 3 * MUCH + 1
        amounts = [row.amount for row in ledger.history(conn, user)]
        assert amounts == [-MUCH, -MUCH, -MUCH, 3 * MUCH, MUCH - 1, 1 - MUCH, 1 - MUCH, MUCH]
        assert big.accounts.get(conn, other).credit_balance == MUCH - 1


def test_both_ends_of_the_range_hold(big: World) -> None:
    ledger, user = big.ledger, big.user()
    with big.engine.begin() as conn:
        bought = ledger.start_purchase(conn, user, credits=INT64_MAX, description="All there is")
        one_more = ledger.start_purchase(conn, user, credits=1, description="One more")
        assert ledger.complete_purchase(conn, user, purchase=bought.id).balance_after == INT64_MAX
        for call in (
            lambda: ledger.complete_purchase(conn, user, purchase=one_more.id),
            lambda: ledger.grant(conn, user, credits=1, key="g", description="One more"),
            lambda: ledger.grant(conn, user, credits=INT64_MAX, key="g", description="As much again"),
        ):
            with pytest.raises(errors.BalanceOutOfRange):
                call()
        assert ledger.consume(conn, user, credits=INT64_MAX, key="all").balance_after == 0
        assert ledger.refund(conn, user, bought.id, key="r").balance_after == -INT64_MAX
        second = ledger.complete_purchase(conn, user, purchase=one_more.id)
        assert second.balance_after == 1 - INT64_MAX
        assert ledger.refund(conn, user, second.id, key="s").balance_after == -INT64_MAX
        assert ledger.reinstate(conn, user, bought.id, key="t").balance_after == 0
        for credits in (INT64_MAX + 1, -1, 0):
            with pytest.raises(errors.InvalidArgument, match=f"from 1 to {INT64_MAX}"):
                ledger.consume(conn, user, credits=credits, key="n")


@pytest.mark.parametrize(("column", "off"), [("balance_after", 1), ("balance_after", 2**32), ("amount", 2**32)])
def test_the_audit_sees_all_digits(big: World, column: str, off: int) -> None:
    """Also a fault of 2^32, and one at the end of the range, where sums are larger than a bigint."""
    user = big.user()
    with big.engine.connect() as conn:
        big.ledger.grant(conn, user, credits=INT64_MAX - 2**33, key="g", description="Nearly all")
        big.ledger.grant(conn, user, credits=1, key="h", description="One more")
        assert audit(conn, big.config).clean
        conn.exec_driver_sql("ALTER TABLE credit_transactions DISABLE TRIGGER tallystick_append_only")
        conn.exec_driver_sql(f"UPDATE credit_transactions SET {column} = {column} + {off} WHERE sequence = 1")
        found = audit(conn, big.config).findings
        assert {finding.check for finding in found} == {"chain_arithmetic"}, found
        conn.rollback()


def test_the_lowest_balance_is_not_passed(big: World) -> None:
    ledger, user = big.ledger, big.user()
    with big.engine.begin() as conn:
        purchases = []
        for n in range(3):
            bought = ledger.start_purchase(conn, user, credits=2**62, description=f"Pack {n}")
            ledger.complete_purchase(conn, user, purchase=bought.id)
            ledger.consume(conn, user, credits=2**62, key=f"c{n}")
            purchases.append(bought.id)
        ledger.refund(conn, user, purchases[0], key="r0")
        assert ledger.refund(conn, user, purchases[1], key="r1").balance_after == INT64_MIN
        with pytest.raises(errors.BalanceOutOfRange):
            ledger.refund(conn, user, purchases[2], key="r2")
        assert ledger.balance(conn, user) == INT64_MIN
        assert ledger.reinstate(conn, user, purchases[0], key="r3").balance_after == -(2**62)


def test_the_host_may_have_the_column_already(fresh_database: Callable[..., str]) -> None:
    host = HostMapping(credits="bigint")
    for kind, fits in (("bigint", True), ("integer", False)):
        url = fresh_database()
        with psycopg.connect(url.replace("+psycopg", "")) as conn:
            conn.execute(SHAPES["uuid"].ddl.encode())
            conn.execute(f"ALTER TABLE users ADD credit_balance {kind} NOT NULL DEFAULT 0".encode())
        config = Config(database_url=url, host=host)
        if not fits:
            with pytest.raises(errors.IncompatibleColumn, match="needs bigint or numeric of 8 digits or more, whole"):
                migrate.apply(url, config)
            continue
        migrate.apply(url, config)
        with sa.create_engine(url, poolclass=sa.NullPool).connect() as conn:
            assert migrate.status(conn, config).adopted == ("users.credit_balance",)
            assert migrate.status(conn, config).healthy


def test_packs_are_as_large_as_the_credits_that_are_counted() -> None:
    packs = (Pack(name="Large", credits=MUCH),)
    assert Config(packs=packs, host=HostMapping(credits="bigint")).packs == packs
    with pytest.raises(ValueError, match="Large has 5000000000 credits"):
        Config(packs=packs)
