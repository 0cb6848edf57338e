"""Onboarding, plan tier, Stripe customer, soft delete: on every shape of host app."""

from __future__ import annotations

import datetime as dt

import pytest
import sqlalchemy as sa

from tallystick import errors as e
from tallystick.ledger import Standing
from worlds import World


def test_a_new_account_is_free_empty_and_not_onboarded(any_world: World):
    user = any_world.user()
    with any_world.engine.begin() as conn:
        account = any_world.accounts.get(conn, user)
    assert (account.user, account.credit_balance, account.plan_tier) == (user, 0, "free")
    assert not account.onboarding_complete
    assert account.stripe_customer_id is None
    assert account.deleted_at is None


def test_onboarding_is_completed_and_reset(any_world: World):
    user = any_world.user()
    with any_world.engine.begin() as conn:
        assert any_world.accounts.complete_onboarding(conn, user).onboarding_complete
        assert any_world.accounts.complete_onboarding(conn, user).onboarding_complete
        assert not any_world.accounts.reset_onboarding(conn, user).onboarding_complete


def test_the_plan_tier_is_the_hosts_word(any_world: World):
    user = any_world.user()
    with any_world.engine.begin() as conn:
        assert any_world.accounts.set_plan_tier(conn, user, "prö").plan_tier == "prö"
        for wrong in ("", "x" * 33, "a\nb", None, 3):
            with pytest.raises(e.InvalidArgument, match="plan_tier"):
                any_world.accounts.set_plan_tier(conn, user, wrong)
        assert any_world.accounts.get(conn, user).plan_tier == "prö"


def test_a_stripe_customer_and_a_user_are_each_others(any_world: World):
    accounts, user, other = any_world.accounts, any_world.user(), any_world.user()
    with any_world.engine.begin() as conn:
        for _ in range(2):
            assert accounts.set_stripe_customer(conn, user, "cus_1").stripe_customer_id == "cus_1"
        with pytest.raises(e.StripeCustomerConflict, match="another user has"):
            accounts.set_stripe_customer(conn, other, "cus_1")
        with pytest.raises(e.StripeCustomerConflict, match="replace=True"):
            accounts.set_stripe_customer(conn, user, "cus_2")
        asked = sa.text("SELECT outcome FROM tallystick.set_stripe_customer(:user, 'cus_2', NULL)")
        assert conn.execute(asked, {"user": user}).scalar_one() == "stripe_customer_conflict"
        assert accounts.set_stripe_customer(conn, user, "cus_2", replace=True).stripe_customer_id == "cus_2"
        assert accounts.set_stripe_customer(conn, other, "cus_1").stripe_customer_id == "cus_1"


def test_a_deleted_user_keeps_credits_and_the_first_moment(any_world: World):
    user = any_world.user(credits=2)
    with any_world.engine.begin() as conn:
        first = any_world.accounts.delete_user(conn, user)
        assert any_world.accounts.delete_user(conn, user).deleted_at == first.deleted_at
        assert first.credit_balance == 2
        assert any_world.accounts.restore_user(conn, user).deleted_at is None
        assert any_world.ledger.consume(conn, user, key="k").balance_after == 1


def test_a_deletion_is_dated_when_it_happens_also_in_a_transaction_that_began_long_before(world: World):
    """Else the audit takes a consumption of the time in between for one of a deleted user."""
    user = world.user(credits=2)
    workshop = world.workshop(user)
    with world.engine.begin() as long, world.autocommit.connect() as conn:
        long.execute(sa.text("SELECT now()"))
        spent = world.ledger.consume(conn, user, workshop=workshop, key="k")
        world.accounts.delete_workshop(long, workshop)
        world.accounts.delete_user(long, user)
        for table in (world.schema.users, world.schema.workshops):
            assert table is not None
            assert long.execute(sa.select(table.c.deleted_at)).scalar_one() > spent.completed_at


@pytest.mark.parametrize("time_zone", ["UTC", "Asia/Kathmandu"])
def test_deletion_is_the_true_moment_in_columns_with_and_without_a_time_zone(any_world: World, time_zone: str):
    user = any_world.user()
    with any_world.engine.begin() as conn:
        conn.execute(sa.text("SELECT set_config('TimeZone', :zone, true)"), {"zone": time_zone})
        at = any_world.accounts.delete_user(conn, user).deleted_at
    at = at.replace(tzinfo=dt.UTC) if at.tzinfo is None else at
    assert abs(dt.datetime.now(dt.UTC) - at) < dt.timedelta(minutes=5)


def test_workshops_are_deleted_and_restored(world: World):
    user = world.user(credits=1)
    workshop = world.workshop(user)
    with world.engine.begin() as conn:
        world.accounts.delete_workshop(conn, workshop)
        with pytest.raises(e.WorkshopDeleted):
            world.ledger.consume(conn, user, workshop=workshop, key="k")
        world.accounts.restore_workshop(conn, workshop)
        assert world.ledger.consume(conn, user, workshop=workshop, key="k").workshop_id == workshop


def test_updated_at_follows_every_change_whoever_makes_it(world: World):
    user = world.user(credits=1)
    seen = []
    for change in (
        lambda conn: conn.execute(sa.text("UPDATE users SET email = 'new@example.com'")),
        lambda conn: world.accounts.complete_onboarding(conn, user),
        lambda conn: world.ledger.consume(conn, user, key="k"),
    ):
        with world.engine.begin() as conn:
            change(conn)
        with world.engine.begin() as conn:
            seen.append(world.accounts.get(conn, user).updated_at)
    assert seen == sorted(set(seen))


def test_what_is_not_there_is_named(any_world: World):
    nobody = any_world.key(any_world.config.host.users.key_type)
    accounts = any_world.accounts
    with any_world.engine.begin() as conn:
        for call in (accounts.get, accounts.complete_onboarding, accounts.delete_user, accounts.restore_user):
            with pytest.raises(e.UnknownUser) as caught:
                call(conn, nobody)
            assert caught.value.user == nobody
        with pytest.raises(e.UnknownUser):
            accounts.set_stripe_customer(conn, nobody, "cus_1")
        if any_world.schema.workshops is None:
            with pytest.raises(e.InvalidArgument):
                accounts.delete_workshop(conn, 1)
        else:
            workshop = any_world.key(any_world.config.host.workshops.key_type)
            with pytest.raises(e.UnknownWorkshop):
                accounts.delete_workshop(conn, workshop)


def test_an_account_tells_what_is_held_and_is_right_after_something_expired(any_world: World):
    ledger, user = any_world.ledger, any_world.user(credits=2)
    with any_world.engine.begin() as conn:
        assert any_world.accounts.get(conn, user).standing == Standing(2, 0)
        soon = dt.datetime.now(dt.UTC) + dt.timedelta(days=1)
        ledger.grant(conn, user, credits=3, key="g", description="Spring promotion", expires_at=soon)
        held = ledger.hold(conn, user, credits=4, key="h")
        account = any_world.accounts.get(conn, user)
        assert account.standing == ledger.standing(conn, user) == Standing(5, 4, held.expires_at)
        assert (account.standing.available, account.standing.spendable) == (1, 1)
    any_world.pass_time(days=2)
    with any_world.engine.connect() as conn:
        account = any_world.accounts.get(conn, user)
        assert (account.credit_balance, account.credit_held) == (2, 0)
        assert account.standing == ledger.standing(conn, user)


def test_what_people_are_told_can_be_spent():
    now = {pair: Standing(*pair).spendable for pair in ((5, 0), (5, 4), (5, 5), (1, 3), (-2, 0), (-2, 1))}
    assert list(now.values()) == [5, 1, 0, 0, -2, -2]
