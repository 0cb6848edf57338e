"""People change: a key that changes, two accounts that become one, a person who is forgotten."""

from __future__ import annotations

import datetime as dt
import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import psycopg
import pytest
import sqlalchemy as sa

from tallystick import Merged, errors
from tallystick.audit import audit
from tallystick.declared_tables import event_dead_letters, stripe_checkouts
from tallystick.errors import Key
from tallystick.schema import INT32_MAX, INT32_MIN
from worlds import World

uuid_keys = pytest.mark.parametrize("any_world", ["uuid"], indirect=True)


def another_key(world: World) -> Key:
    return world.key(world.config.host.users.key_type)


def rekeyed(world: World, conn: sa.Connection, user: Key) -> Key:
    """The host gives the user another key, by its own UPDATE."""
    users, new = world.schema.users, another_key(world)
    conn.execute(sa.update(users).where(users.c.key == user).values(key=new))
    return new


def chain(world: World, conn: sa.Connection, user: Key) -> list[tuple[str, int, int | None]]:
    rows = world.ledger.history(conn, user, limit=1000)
    return [(str(row.type), row.amount, row.balance_after) for row in reversed(rows)]


def clean(world: World) -> None:
    with world.engine.connect() as conn:
        found = audit(conn, world.config)
        assert found.clean, found.findings


# --- a key changes ---


def test_the_rows_follow_the_key_that_the_app_changes(any_world: World) -> None:
    world, user = any_world, any_world.user(credits=5)
    with world.engine.begin() as conn:
        world.ledger.start_purchase(conn, user, credits=2, description="A pack", key="open")
        world.ledger.grant(conn, user, credits=2, key="g", description="x", expires_at=soon(1))
        world.accounts.set_low_balance(conn, user, 3)
        before, lots = world.ledger.history(conn, user), left(world, conn, user)
        new = rekeyed(world, conn, user)
        with pytest.raises(errors.UnknownUser):
            world.ledger.balance(conn, user)
        assert [row.id for row in world.ledger.history(conn, new)] == [row.id for row in before]
        assert {row.user_id for row in world.ledger.history(conn, new)} == {new}
        assert left(world, conn, new) == lots
        assert conn.execute(sa.select(world.schema.low_balances)).all() == [(new, 3)]
        assert world.ledger.consume(conn, new, key="after").balance_after == 6
    clean(world)


@uuid_keys
def test_all_keys_at_once_as_from_a_development_to_a_production_instance(any_world: World) -> None:
    world = any_world
    balances = {world.user(credits=credits): credits for credits in range(1, 9)}
    renamed = {user: another_key(world) for user in balances}
    with world.engine.begin() as conn:
        for user in renamed:
            world.ledger.consume(conn, user, key="one")
        pairs = sa.values(sa.column("old", sa.Uuid), sa.column("new", sa.Uuid), name="pairs").data(
            list(renamed.items())
        )
        users = world.schema.users
        conn.execute(sa.update(users).where(users.c.key == pairs.c.old).values(key=pairs.c.new))
        assert {new: world.ledger.balance(conn, new) for new in renamed.values()} == {
            renamed[user]: credits - 1 for user, credits in balances.items()
        }
    clean(world)


def test_no_row_goes_to_another_user_by_itself(any_world: World) -> None:
    world, user, other = any_world, any_world.user(credits=5), any_world.user(credits=5)
    ledger = world.schema.credit_transactions
    with world.engine.connect() as conn:
        for new in (other, another_key(world)):
            with pytest.raises(sa.exc.DBAPIError, match="what the row is about"), conn.begin():
                conn.execute(sa.update(ledger).where(ledger.c.user_id == user).values(user_id=new))
    clean(world)


@uuid_keys
def test_a_trigger_of_the_apps_moves_no_row_either(any_world: World) -> None:
    world, user, other = any_world, any_world.user(credits=5), any_world.user(credits=5)
    with world.engine.begin() as conn:
        conn.exec_driver_sql(
            "CREATE FUNCTION steal() RETURNS trigger LANGUAGE plpgsql AS $$BEGIN"
            f" UPDATE credit_transactions SET user_id = '{other}' WHERE user_id = '{user}'; RETURN NULL; END$$;"
            " CREATE TRIGGER steal AFTER UPDATE ON users FOR EACH ROW EXECUTE FUNCTION steal()"
        )
    with pytest.raises(sa.exc.DBAPIError, match="what the row is about"), world.engine.begin() as conn:
        conn.execute(sa.update(world.schema.users).values(plan_tier="pro"))
    clean(world)


# --- two accounts become one ---


def test_a_merge_moves_all_credits_and_leaves_both_chains_whole(any_world: World) -> None:
    world, user, into = any_world, any_world.user(credits=5), any_world.user(credits=2)
    with world.engine.begin() as conn:
        world.ledger.consume(conn, user, key="one")
        assert world.ledger.merge(conn, user, into=into, key="ticket 7") == Merged(into, 4, 6)
        closing, opening = (world.ledger.history(conn, one)[0] for one in (user, into))
        assert (closing.amount, closing.balance_after, closing.idempotency_key) == (-4, 0, "ticket 7")
        assert (opening.amount, opening.balance_after, opening.type) == (4, 6, "transfer")
        assert (closing.refund_of, opening.refund_of) == (opening.id, closing.id)
        assert closing.description == "Merged into another account"
        assert chain(world, conn, into) == [("purchase", 2, 2), ("transfer", 4, 6)]
        assert world.accounts.get(conn, user).deleted_at is not None
        with pytest.raises(errors.UserDeleted):
            world.ledger.consume(conn, user, key="two")
        assert world.ledger.consume(conn, into, key="two").balance_after == 5
    clean(world)


def test_a_second_call_is_a_replay_and_another_intent_is_told(any_world: World) -> None:
    world, user, into, third = any_world, any_world.user(credits=5), any_world.user(), any_world.user()
    with world.engine.begin() as conn:
        world.ledger.merge(conn, user, into=into, key="m")
        world.ledger.consume(conn, into, key="c")
        again = world.ledger.merge(conn, user, into=into, key="m", description="Not compared")
        assert again == Merged(into, 5, 4, replayed=True)
        with pytest.raises(errors.IdempotencyKeyReused) as caught:
            world.ledger.merge(conn, user, into=third, key="m")
        assert set(caught.value.differs) == {"user_id"}
    clean(world)


def test_what_comes_later_is_moved_by_another_merge(any_world: World) -> None:
    world, user, into = any_world, any_world.user(credits=5), any_world.user()
    with world.engine.begin() as conn:
        late = world.ledger.start_purchase(conn, user, credits=3, description="A pack")
        world.ledger.merge(conn, user, into=into, key="m")
        world.ledger.complete_purchase(conn, user, purchase=late.id)
        assert world.ledger.merge(conn, user, into=into, key="m again") == Merged(into, 3, 8)
    clean(world)


def test_a_debt_moves_too(any_world: World) -> None:
    world, user, into = any_world, any_world.user(credits=5), any_world.user(credits=4)
    with world.engine.begin() as conn:
        bought = world.ledger.history(conn, user)[0]
        world.ledger.consume(conn, user, key="c", credits=3)
        world.ledger.refund(conn, user, bought.id, key="r")
        assert world.ledger.merge(conn, user, into=into, key="m") == Merged(into, -3, 1)
        assert world.ledger.balance(conn, user) == 0
    clean(world)


def test_the_largest_debt_has_no_row_that_takes_it(world: World) -> None:
    user, other = world.user(credits=INT32_MAX), world.user()
    with world.engine.begin() as conn:
        bought = [world.ledger.history(conn, user)[0]]
        world.ledger.consume(conn, user, credits=INT32_MAX, key="all")
        bought.append(world.buy(conn, user, 1))
        world.ledger.consume(conn, user, key="one more")
        for each in bought:
            world.ledger.refund(conn, user, each.id, key=str(each.id))
        assert world.ledger.balance(conn, user) == INT32_MIN
        with pytest.raises(errors.BalanceOutOfRange):
            world.ledger.merge(conn, user, into=other, key="m")


def test_an_empty_account_is_closed_without_a_row(any_world: World) -> None:
    world, user, into = any_world, any_world.user(), any_world.user(credits=1)
    with world.engine.begin() as conn:
        for _ in range(2):
            assert world.ledger.merge(conn, user, into=into, key="m") == Merged(into, 0, 1)
        assert world.ledger.history(conn, user) == []
        assert world.accounts.get(conn, user).deleted_at is not None
    clean(world)


@uuid_keys
def test_a_merge_that_moved_nothing_keeps_no_key(any_world: World) -> None:
    world, user, into = any_world, any_world.user(), any_world.user(credits=1)
    with world.engine.begin() as conn:
        late = world.ledger.start_purchase(conn, user, credits=3, description="A pack")
        assert world.ledger.merge(conn, user, into=into, key="m") == Merged(into, 0, 1)
        world.ledger.complete_purchase(conn, user, purchase=late.id)
        assert world.ledger.merge(conn, user, into=into, key="m") == Merged(into, 3, 4)
        world.ledger.consume(conn, into, key="c")
        assert world.ledger.merge(conn, user, into=into, key="m") == Merged(into, 3, 3, replayed=True)
    clean(world)


def soon(days: int) -> dt.datetime:
    return dt.datetime.now(dt.UTC).replace(microsecond=0) + dt.timedelta(days=days)


def left(world: World, conn: sa.Connection, user: Key) -> list[tuple[int, dt.datetime]]:
    return [(lot.remaining, lot.expires_at) for lot in world.ledger.lots(conn, user)]


def test_credits_that_expire_go_on_to_expire_at_their_moment(any_world: World) -> None:
    world, user, into = any_world, any_world.user(credits=5), any_world.user()
    first, second, third = soon(1), soon(2), soon(3)
    with world.engine.begin() as conn:
        for credits, expires_at, who in ((3, third, user), (4, first, user), (2, second, into)):
            key = f"g{credits}"
            world.ledger.grant(conn, who, credits=credits, key=key, description="x", expires_at=expires_at)
        world.ledger.consume(conn, user, key="c")
        assert world.ledger.merge(conn, user, into=into, key="m") == Merged(into, 11, 13)
        assert left(world, conn, user) == []
        assert left(world, conn, into) == [(3, first), (2, second), (3, third)]
        assert chain(world, conn, into) == [
            ("grant", 2, 2),
            ("transfer", 3, 5),
            ("transfer", 3, 8),
            ("transfer", 5, 13),
        ]
        assert world.ledger.merge(conn, user, into=into, key="m") == Merged(into, 11, 13, replayed=True)
        assert world.ledger.consume(conn, into, credits=4, key="c").balance_after == 9
        assert left(world, conn, into) == [(1, second), (3, third)]
    clean(world)


def test_credits_that_were_moved_expire_there(any_world: World) -> None:
    world, user, into = any_world, any_world.user(), any_world.user(credits=2)
    with world.engine.begin() as conn:
        world.ledger.grant(conn, user, credits=5, key="g", description="x", expires_at=soon(1))
        world.ledger.merge(conn, user, into=into, key="m")
        world.ledger.consume(conn, into, key="c")
    world.pass_time(days=2)
    with world.engine.begin() as conn:
        assert world.ledger.sweep(conn) == 1
        assert chain(world, conn, into)[-2:] == [("consumption", -1, 6), ("expiry", -4, 2)]
    clean(world)


@pytest.mark.parametrize("swept", [True, False])
def test_what_expired_after_a_merge_is_not_taken_back_again(any_world: World, swept: bool) -> None:
    world, user, into, last = any_world, *(any_world.user() for _ in range(3))
    ledger = world.ledger
    with world.engine.begin() as conn:
        month = dt.timedelta(days=30)
        bought = ledger.start_purchase(conn, user, credits=10, description="A pack", expires_after=month)
        ledger.complete_purchase(conn, user, purchase=bought.id)
        given = ledger.grant(conn, user, credits=5, key="g", description="x", expires_at=soon(20))
        ledger.refund(conn, user, bought.id, credits=1, key="r")
        ledger.merge(conn, user, into=into, key="m")
        ledger.consume(conn, into, credits=7, key="c")  # all that was given, and 2 of the pack
        ledger.merge(conn, into, into=last, key="m")
        ledger.consume(conn, last, credits=3, key="c")
    world.pass_time(days=31)
    with world.engine.begin() as conn:
        if swept:
            assert ledger.sweep(conn) == 1
        with pytest.raises(errors.RefundExceedsPurchase):
            ledger.refund(conn, user, bought.id, credits=6, key="all")
        assert ledger.refund(conn, user, bought.id, key="all").amount == -5  # what was spent
        assert ledger.correct(conn, user, given.id, key="correct").amount == -5
        assert [ledger.balance(conn, each) for each in (user, into, last)] == [-10, 0, 0]
    clean(world)


@pytest.mark.parametrize("through", [False, True])
def test_the_debt_of_a_refund_is_paid_by_the_credits_that_were_refunded(any_world: World, through: bool) -> None:
    world, user, into = any_world, any_world.user(credits=4), any_world.user(credits=10)
    ledger, between = world.ledger, any_world.user()
    with world.engine.begin() as conn:
        month = dt.timedelta(days=30)
        started = [
            ledger.start_purchase(conn, user, credits=credits, description="A pack", expires_after=month)
            for credits in (6, 5)
        ]
        refunded, _ = (ledger.complete_purchase(conn, user, purchase=each.id) for each in started)
        for first, then in [(user, between), (between, into)] if through else [(user, into)]:
            ledger.merge(conn, first, into=then, key="m")
        ledger.consume(conn, into, credits=1, key="c")
        ledger.refund(conn, user, refunded.id, credits=4, key="half")
        assert ledger.merge(conn, user, into=into, key="m2") == Merged(into, -4, 20)
        assert [lot.remaining for lot in ledger.lots(conn, into)] == [1, 5]
        other = next(row for row in ledger.history(conn, user) if row.type == "purchase" and row.amount == 4)
        ledger.refund(conn, user, other.id, key="other")
        assert ledger.merge(conn, user, into=into, key="m3") == Merged(into, -4, 16)
        assert [lot.remaining for lot in ledger.lots(conn, into)] == [1, 5]
        ledger.refund(conn, user, refunded.id, key="all")
        assert ledger.merge(conn, user, into=into, key="m4") == Merged(into, -2, 14)
        assert [lot.remaining for lot in ledger.lots(conn, into)] == [5]
    world.pass_time(days=31)
    with world.engine.begin() as conn:
        assert ledger.balance(conn, into) == 9  # its own, less the one that was spent and then refunded
    clean(world)


@uuid_keys
def test_credits_that_have_expired_are_not_moved(any_world: World) -> None:
    world, user, into = any_world, any_world.user(credits=1), any_world.user()
    with world.engine.begin() as conn:
        moment = conn.scalar(sa.text("SELECT clock_timestamp() + interval '0.2 s'"))
        world.ledger.grant(conn, user, credits=7, key="g", description="x", expires_at=moment)
        conn.execute(sa.text("SELECT pg_sleep(0.3)"))
        assert world.ledger.merge(conn, user, into=into, key="m") == Merged(into, 1, 1)
        assert [row[0] for row in chain(world, conn, user)] == ["purchase", "grant", "expiry", "transfer"]
    clean(world)


@uuid_keys
def test_a_debt_is_paid_by_what_expires_and_takes_what_is_not_covered(any_world: World) -> None:
    world, user, into = any_world, any_world.user(credits=6), any_world.user()
    with world.engine.begin() as conn:
        bought = world.ledger.history(conn, user)[0]
        world.ledger.consume(conn, user, key="c", credits=6)
        world.ledger.refund(conn, user, bought.id, key="r")
        world.ledger.grant(conn, into, credits=4, key="g", description="x", expires_at=soon(1))
        assert world.ledger.merge(conn, user, into=into, key="m") == Merged(into, -6, -2)
        assert left(world, conn, into) == []
    clean(world)
    indebted, funded = into, world.user()
    with world.engine.begin() as conn:
        world.ledger.grant(conn, funded, credits=5, key="g", description="x", expires_at=soon(1))
        assert world.ledger.merge(conn, funded, into=indebted, key="m") == Merged(indebted, 5, 3)
        assert [credits for credits, _ in left(world, conn, indebted)] == [3]
    clean(world)


@uuid_keys
def test_holds_end_before_the_account_does(any_world: World) -> None:
    world, user, into = any_world, any_world.user(credits=5), any_world.user(credits=5)
    with world.engine.begin() as conn:
        held = world.ledger.hold(conn, user, credits=2, key="h")
        theirs = world.ledger.hold(conn, into, credits=1, key="h")
        with pytest.raises(errors.HoldsPending, match="set 2 credits aside") as caught:
            world.ledger.merge(conn, user, into=into, key="m")
        assert (caught.value.user, caught.value.held) == (user, 2)
        world.ledger.capture(conn, user, held.id, credits=1)
        assert world.ledger.merge(conn, user, into=into, key="m") == Merged(into, 4, 9)
        assert world.ledger.capture(conn, into, theirs.id).balance_after == 8
    clean(world)


@uuid_keys
def test_a_hold_that_has_expired_is_in_nobodys_way(any_world: World) -> None:
    world, user, into = any_world, any_world.user(credits=5), any_world.user()
    with world.engine.begin() as conn:
        world.ledger.hold(conn, user, credits=2, key="h", expires_in=dt.timedelta(seconds=1))
        conn.execute(sa.text("SELECT pg_sleep(1.1)"))
        assert world.ledger.merge(conn, user, into=into, key="m") == Merged(into, 5, 5)
    clean(world)


def test_a_workshop_stays_unlocked_whoever_owns_it_afterwards(world: World) -> None:
    user, into = world.user(credits=5), world.user(credits=5)
    workshop = world.workshop(user)
    with world.engine.begin() as conn:
        paid = world.ledger.consume(conn, user, workshop=workshop, key="c")
        world.ledger.merge(conn, user, into=into, key="m")
        conn.execute(sa.update(world.schema.workshops).values(owner=into))
        again = world.ledger.consume(conn, into, workshop=workshop, key="c")
        assert (again.id, again.replayed, again.balance) == (paid.id, True, 9)
    clean(world)


REFUSED: dict[str, tuple[Callable[[World, sa.Connection, Key, Key], Any], type[Exception], str]] = {
    "itself": (lambda w, c, a, _b: w.ledger.merge(c, a, into=a, key="m"), errors.InvalidArgument, "into_user_id"),
    "from nobody": (
        lambda w, c, _a, b: w.ledger.merge(c, another_key(w), into=b, key="m"),
        errors.UnknownUser,
        "no user",
    ),
    "into nobody": (
        lambda w, c, a, _b: w.ledger.merge(c, a, into=another_key(w), key="m"),
        errors.UnknownUser,
        "no user",
    ),
    "into a deleted user": (
        lambda w, c, a, b: (w.accounts.delete_user(c, b), w.ledger.merge(c, a, into=b, key="m")),
        errors.UserDeleted,
        "was deleted",
    ),
    "too much": (
        lambda w, c, a, b: (
            w.ledger.grant(c, b, credits=2**31 - 1, key="g", description="x"),
            w.ledger.merge(c, a, into=b, key="m"),
        ),
        errors.BalanceOutOfRange,
        "range",
    ),
    "a key of another call": (
        lambda w, c, a, b: (w.ledger.consume(c, a, key="m"), w.ledger.merge(c, a, into=b, key="m")),
        errors.IdempotencyKeyReused,
        "type consumption",
    ),
    "an empty key": (lambda w, c, a, b: w.ledger.merge(c, a, into=b, key=""), errors.InvalidArgument, "key"),
}


@pytest.mark.parametrize("case", REFUSED)
@uuid_keys
def test_a_merge_that_is_refused_writes_nothing(any_world: World, case: str) -> None:
    world, user, into = any_world, any_world.user(credits=5), any_world.user()
    call, kind, message = REFUSED[case]
    transfers = sa.select(sa.func.count()).where(world.schema.credit_transactions.c.type == "transfer")
    with world.engine.begin() as conn:
        with pytest.raises(kind, match=message) as caught:
            call(world, conn, user, into)
        assert conn.scalar(transfers) == 0
        assert world.accounts.get(conn, user).deleted_at is None
        if case == "into nobody":
            assert getattr(caught.value, "user") not in (user, into)  # noqa: B009 - of UnknownUser alone
        if case == "into a deleted user":
            assert getattr(caught.value, "user") == into  # noqa: B009
    clean(world)


@pytest.mark.parametrize("case", ["from", "into"])
@uuid_keys
def test_a_chain_that_is_broken_is_not_merged(any_world: World, case: str) -> None:
    world = any_world
    pair = {"from": world.user(credits=5), "into": world.user(credits=5)}
    users = world.schema.users
    with world.engine.begin() as conn:
        conn.execute(sa.update(users).where(users.c.key == pair[case]).values(credit_sequence=0))
        with pytest.raises(errors.LedgerInconsistent) as caught:
            world.ledger.merge(conn, pair["from"], into=pair["into"], key="m")
        assert caught.value.user == pair[case]


# --- a person is forgotten ---


def fill(world: World, conn: sa.Connection, user: Key) -> None:
    """Rows of each type, with a person in every text."""
    about = {"metadata": {"who": "Ada"}}
    ledger = world.ledger
    bought = ledger.start_purchase(conn, user, credits=9, description="For Ada", key="ada-buys", **about)
    ledger.complete_purchase(conn, user, purchase=bought.id, stripe_session_id="cs_1", amount_paid=1, currency="usd")
    failed = ledger.start_purchase(conn, user, credits=9, description="For Ada", key="ada-fails")
    ledger.fail_purchase(conn, user, purchase=failed.id, reason="Ada left")
    ledger.start_purchase(conn, user, credits=2, description="For Ada")
    ledger.consume(conn, user, credits=2, key="ada-spends", description="Of Ada", **about)
    ledger.refund(conn, user, bought.id, credits=2, key="refund-1", description="To Ada", **about)
    ledger.reinstate(conn, user, bought.id, credits=1, key="reinstate-1", description="To Ada")
    ledger.grant(conn, user, credits=2, key="ada-gets", description="For Ada", **about)
    conn.execute(
        sa.insert(stripe_checkouts).values(
            purchase_id=bought.id,
            amount=1,
            currency="usd",
            request={
                "mode": "payment",
                "customer": "cus_1",
                "success_url": "https://example.com/ada",
                "line_items": [],
            },
        )
    )
    world.accounts.set_stripe_customer(conn, user, "cus_1")


def money(world: World, conn: sa.Connection) -> list[Any]:
    row = world.schema.credit_transactions.c
    kept = [c for c in row if c.name not in ("description", "metadata", "idempotency_key")]
    return list(map(tuple, conn.execute(sa.select(*kept).order_by(row.id))))


def test_nothing_of_a_person_is_left_and_all_of_the_money(any_world: World) -> None:
    world, user, other = any_world, any_world.user(), any_world.user()
    ledger = world.schema.credit_transactions
    with world.engine.begin() as conn:
        fill(world, conn, user)
        world.ledger.grant(conn, other, credits=1, key="ada too", description="Bob's")
        bought = next(row for row in world.ledger.history(conn, user) if row.stripe_session_id)
        event = {"user_id": str(user), "transaction_id": str(bought.id)}
        body = {"type": "purchase.completed", "data": event | {"metadata": {"who": "Ada"}, "idempotency_key": "ada"}}
        letter = {"endpoint": "e", "event_id": 1, "kind": "purchase.completed", "body": json.dumps(body)}
        conn.execute(sa.insert(event_dead_letters).values(**letter, attempts=1, last_error="HTTP 500"))
        before = money(world, conn)
        account = world.accounts.erase(conn, user)
        assert json.loads(conn.scalar(sa.select(event_dead_letters.c.body))) == body | {"data": event}
        assert (account.credit_balance, account.stripe_customer_id) == (8, None)
        assert account.deleted_at is not None
        assert money(world, conn) == before
        mine = conn.execute(sa.select(ledger).where(ledger.c.user_id == user)).all()
        assert {row.description for row in mine} == {"Erased"}
        assert {row.metadata for row in mine} == {None}
        texts = [value for row in mine for value in row if isinstance(value, str) and value != user]
        assert not [text for text in texts if "ada" in text.lower() and not text.startswith("tallystick:erased:")]
        assert {row.idempotency_key for row in mine if row.refund_of is not None} == {"refund-1", "reinstate-1"}
        assert conn.scalar(sa.select(stripe_checkouts.c.request)) == {
            "mode": "payment",
            "customer": "cus_1",
            "line_items": [],
        }
        assert world.ledger.history(conn, other)[0].description == "Bob's"
        # twice is once
        written = conn.execute(sa.select(ledger).order_by(ledger.c.id)).all()
        assert world.accounts.erase(conn, user).deleted_at == account.deleted_at
        assert conn.execute(sa.select(ledger).order_by(ledger.c.id)).all() == written
    clean(world)


@uuid_keys
def test_calls_with_the_keys_of_before(any_world: World) -> None:
    """Calls that a deleted user is refused have lost their keys; those that still move credits stay replays."""
    world, user = any_world, any_world.user()
    with world.engine.begin() as conn:
        fill(world, conn, user)
        bought = next(row for row in world.ledger.history(conn, user) if row.stripe_session_id)
        world.accounts.erase(conn, user)
        for again in (
            lambda: world.ledger.consume(conn, user, credits=2, key="ada-spends"),
            lambda: world.ledger.grant(conn, user, credits=2, key="ada-gets", description="x"),
            lambda: world.ledger.start_purchase(conn, user, credits=9, key="ada-buys", description="x"),
        ):
            with pytest.raises(errors.UserDeleted):
                again()
        assert world.ledger.refund(conn, user, bought.id, credits=2, key="refund-1").replayed
        assert world.ledger.reinstate(conn, user, bought.id, credits=1, key="reinstate-1").replayed
        assert world.ledger.complete_purchase(conn, user, purchase=bought.id).replayed
    clean(world)


@uuid_keys
def test_what_goes_on_after_it(any_world: World) -> None:
    """An open purchase is paid, a refund is taken, what is left moves to another account."""
    world, user, into = any_world, any_world.user(), any_world.user()
    with world.engine.begin() as conn:
        fill(world, conn, user)
        bought = next(row for row in world.ledger.history(conn, user) if row.stripe_session_id)
        opened = world.ledger.history(conn, user)[0]
        world.accounts.erase(conn, user)
        assert world.ledger.complete_purchase(conn, user, purchase=opened.id).balance_after == 10
        assert world.ledger.refund(conn, user, bought.id, key="refund-2").description == "Refunded: Erased"
        assert world.ledger.merge(conn, user, into=into, key="m") == Merged(into, 2, 2)
        world.accounts.erase(conn, user)
        assert world.ledger.merge(conn, user, into=into, key="m").replayed
    clean(world)


def test_nobody_is_nobody(any_world: World) -> None:
    with any_world.engine.begin() as conn, pytest.raises(errors.UnknownUser):
        any_world.accounts.erase(conn, another_key(any_world))


EDITS = {
    "description = 'Another'": "without a step of its status",
    "description = 'erased'": "without a step of its status",
    "idempotency_key = 'tallystick:erased:' || id": "what the row is about",
    "idempotency_key = 'tallystick:erased:x', description = 'Erased'": "what the row is about",
    "idempotency_key = NULL, description = 'Erased'": "what the row is about",
    "description = 'Erased', amount = amount + 1": "amount",
    "description = 'Erased', balance_after = 7": "without a step of its status",
    "description = 'Erased', completed_at = now()": "without a step of its status",
    "description = 'Erased', stripe_session_id = 'cs_2'": "what Stripe said",
}


@pytest.mark.parametrize("edit", EDITS)
@uuid_keys
def test_the_owner_of_the_table_may_erase_and_edit_nothing(any_world: World, edit: str) -> None:
    world, user = any_world, any_world.user()
    with world.engine.begin() as conn:
        fill(world, conn, user)
    statement = f"UPDATE credit_transactions SET {edit} WHERE stripe_session_id = 'cs_1'"
    with pytest.raises(sa.exc.DBAPIError, match=EDITS[edit]), world.engine.begin() as conn:
        conn.exec_driver_sql(statement)


@uuid_keys
def test_keys_that_keep_credits_from_moving_twice_are_not_erased(any_world: World) -> None:
    world, user = any_world, any_world.user()
    with world.engine.begin() as conn:
        fill(world, conn, user)
    statement = (
        "UPDATE credit_transactions SET description = 'Erased', idempotency_key = 'tallystick:erased:' || id"
        " WHERE refund_of IS NOT NULL"
    )
    with pytest.raises(sa.exc.DBAPIError, match="what the row is about"), world.engine.begin() as conn:
        conn.exec_driver_sql(statement)


# --- a buyer's row is not deleted ---


def test_deleting_a_buyer_is_refused_with_the_way_out(any_world: World) -> None:
    world, buyer, opened, nobody = any_world, any_world.user(credits=1), any_world.user(), any_world.user()
    users = world.schema.users
    with world.engine.begin() as conn:
        world.ledger.start_purchase(conn, opened, credits=1, description="A pack")
        for user in (buyer, opened):
            with pytest.raises(sa.exc.IntegrityError) as caught, conn.begin_nested():
                conn.execute(sa.delete(users).where(users.c.key == user))
            error = caught.value.orig
            assert isinstance(error, psycopg.errors.ForeignKeyViolation)
            assert error.diag.message_primary == f"user {user} has credit transactions, and history stays"
            assert error.diag.table_name == users.name
            hint = str(error.diag.message_hint)
            for way in re.findall(r"SELECT \* FROM tallystick\.\w+\('[^']*'\)", hint):
                with conn.begin_nested():
                    assert conn.exec_driver_sql(way).one().deleted_at is not None
            assert hint.count(str(user)) == 2
        assert conn.execute(sa.delete(users).where(users.c.key == nobody)).rowcount == 1
    clean(world)


@uuid_keys
def test_a_soft_delete_of_the_apps_own_goes_first(any_world: World) -> None:
    world, user = any_world, any_world.user(credits=1)
    with world.engine.begin() as conn:
        conn.exec_driver_sql(
            "CREATE FUNCTION soft() RETURNS trigger LANGUAGE plpgsql AS $$BEGIN"
            " UPDATE users SET deleted_at = now() WHERE id = OLD.id; RETURN NULL; END$$;"
            " CREATE TRIGGER zz_soft BEFORE DELETE ON users FOR EACH ROW EXECUTE FUNCTION soft()"
        )
        conn.execute(sa.delete(world.schema.users))
        assert world.accounts.get(conn, user).deleted_at is not None


# --- found by the audit ---


def test_a_merge_with_one_side_is_found(world: World) -> None:
    user, into = world.user(credits=5), world.user()
    ledger = world.schema.credit_transactions
    with world.engine.begin() as conn:
        world.ledger.merge(conn, user, into=into, key="m")
        conn.exec_driver_sql("ALTER TABLE credit_transactions DISABLE TRIGGER ALL")
        conn.execute(sa.delete(ledger).where(ledger.c.user_id == into))
        conn.exec_driver_sql("ALTER TABLE credit_transactions ENABLE TRIGGER ALL")
        found = audit(conn, world.config)
    [finding] = [finding for finding in found.findings if finding.check == "merged_on_both_sides"]
    assert (finding.user, finding.fault) == (user, True)
    assert finding.expected.startswith("a transfer of +5")


def test_the_page_is_true(world: World, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DATABASE_URL", world.url)
    monkeypatch.setattr(sa, "create_engine", partial(sa.create_engine, poolclass=sa.NullPool))
    page = (Path(__file__).parents[1] / "docs" / "people.md").read_text(encoding="utf-8")
    names: dict[str, object] = {}
    for block in re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL):
        exec(compile(block, "docs/people.md", "exec"), names)
    with world.engine.begin() as conn, pytest.raises(sa.exc.IntegrityError) as caught:
        conn.execute(sa.delete(world.schema.users).where(world.schema.users.c.key == names["new_key"]))
    message = f"{caught.value.orig.diag.message_primary}\nHINT:  {caught.value.orig.diag.message_hint}"
    assert message.replace(str(names["new_key"]), "42") in page
    clean(world)
