"""A saved payment method is charged when the balance is low: once for a gap, up to a ceiling, with pauses."""

from __future__ import annotations

import datetime as dt
import threading
import uuid
from dataclasses import replace

import pytest
import sqlalchemy as sa

from stripe_sales.shop import CREDITS, PACK, PRICE, Shop
from stripe_sales.test_reconciliation import while_the_key_changes
from tallystick import Pack, stripe
from tallystick import errors as e
from tallystick.accounts import Account, Accounts
from tallystick.audit import audit
from tallystick.config import CheckoutOptions
from tallystick.errors import Key
from tallystick.schema import INT32_MAX
from tallystick.stripe import TopUpOutcome, reconciliation, top_ups

pytestmark = pytest.mark.one_server  # it is about what is asked of Stripe; test_machine runs on both

INTENTS = "/v1/payment_intents"
DECLINED, AUTHENTICATED = "4000000000000341", "4000002760003184"


def low(shop: Shop, *, saved: bool = True) -> Key:
    """A user who bought a pack, saved the card, and has spent all but one of the credits."""
    user = shop.world.user()
    buy_and_spend(shop, user, saved=saved)
    return user


def buy_and_spend(shop: Shop, user: Key, *, saved: bool = True) -> None:
    """Buy a pack, save the card, and spend all but one of the credits."""
    started = shop.checkout(user, options=CheckoutOptions(save_payment_method=saved))
    shop.dev.pay(started.session)
    shop.deliver_all()
    shop.dev.drop(shop.events())
    spend(shop, user, shop.balance(user) - 1)


def spend(shop: Shop, user: Key, credits: int) -> None:
    with shop.engine.begin() as conn:
        shop.world.ledger.consume(conn, user, credits=credits, key=str(uuid.uuid4()))


def top_up(shop: Shop, user: Key, **options: int) -> stripe.TopUp:
    return stripe.top_up(shop.engine, shop.config, user, PACK, **({"below": 10, "monthly_max": 5 * PRICE} | options))


def card_is(shop: Shop, card: str) -> None:
    """Each saved card is this one from now on."""
    shop.dev.account.cards.update(dict.fromkeys(shop.dev.account.cards, card))


def charges(shop: Shop) -> int:
    return len(shop.api.charges.list({"limit": 100}).data)


def later(patch: pytest.MonkeyPatch) -> None:
    """The pause after each decline is over."""
    patch.setattr(top_ups, "BACK_OFF", (dt.timedelta(0),) * len(top_ups.BACK_OFF))


def test_a_low_balance_is_topped_up_once_for_each_gap(shop: Shop):
    user = low(shop)
    assert top_up(shop, user, below=1).outcome is TopUpOutcome.ENOUGH
    done = top_up(shop, user)
    assert (done.outcome, shop.balance(user), charges(shop)) == (TopUpOutcome.CHARGED, CREDITS + 1, 2)
    assert done.purchase is not None
    assert (done.purchase.amount_paid, done.purchase.currency) == (PRICE, "usd")
    assert top_up(shop, user).outcome is TopUpOutcome.ENOUGH
    spend(shop, user, CREDITS)
    assert top_up(shop, user).outcome is TopUpOutcome.CHARGED
    assert (shop.balance(user), charges(shop)) == (CREDITS + 1, 3)
    shop.dev.refund(str(done.purchase.stripe_payment_intent_id))
    shop.deliver_all()
    assert (shop.balance(user), shop.findings()) == (1, [])
    with shop.engine.begin() as conn:
        assert audit(conn, shop.config).findings == ()


def test_calls_beside_each_other_charge_once(shop: Shop):
    user = low(shop)
    done: list[stripe.TopUp] = []
    calls = [threading.Thread(target=lambda: done.append(top_up(shop, user))) for _ in range(6)]
    for call in calls:
        call.start()
    for call in calls:
        call.join()
    assert len(done) == 6
    assert {one.outcome for one in done} <= {TopUpOutcome.CHARGED, TopUpOutcome.ENOUGH}
    assert (shop.balance(user), charges(shop)) == (CREDITS + 1, 2)


def lose_the_answer(shop: Shop, user: Key) -> None:
    """A charge that Stripe makes, and whose answer does not arrive."""
    shop.dev.fault("POST", INTENTS, "cut", when="after")
    shop.dev.fault("POST", INTENTS, "cut", times=2)
    with pytest.raises(e.StripeUnavailable):
        top_up(shop, user)


@pytest.mark.parametrize("by", ["the next call", "reconciliation"])
def test_a_charge_whose_answer_was_lost_is_found(shop: Shop, by: str):
    user = low(shop)
    lose_the_answer(shop, user)
    shop.dev.forget_idempotency_keys()
    if by == "reconciliation":
        assert [str(outcome) for _, outcome in stripe.reconcile(shop.engine, shop.config).changes] == ["granted"]
    else:
        assert top_up(shop, user).outcome is TopUpOutcome.CHARGED
    assert (shop.balance(user), charges(shop)) == (CREDITS + 1, 2)


@pytest.mark.parametrize("by", ["the next call", "reconciliation"])
def test_a_key_that_changes_before_a_charge_is_found(shop: Shop, by: str):
    user = low(shop)
    lose_the_answer(shop, user)
    shop.dev.forget_idempotency_keys()
    user, _ = while_the_key_changes(
        shop,
        user,
        lambda: stripe.reconcile(shop.engine, shop.config) if by == "reconciliation" else top_up(shop, user),
    )
    assert (shop.balance(user), charges(shop), shop.findings()) == (CREDITS + 1, 2, [])


@pytest.mark.parametrize("by", ["the next call", "reconciliation"])
def test_a_refund_before_the_answer_to_the_charge_is_applied(shop: Shop, by: str):
    user = low(shop)
    lose_the_answer(shop, user)
    shop.dev.refund(shop.api.payment_intents.list().data[0].id)
    assert set(shop.outcomes("refund.created", "charge.refunded")) == {"remembered"}
    if by == "reconciliation":
        stripe.reconcile(shop.engine, shop.config)
    else:
        top_up(shop, user)
    assert shop.rows(user)[-2:] == [("purchase", CREDITS), ("refund", -CREDITS)]
    assert (shop.balance(user), charges(shop)) == (1, 2)
    assert not stripe.reconcile(shop.engine, shop.config).changed


def test_a_top_up_of_a_user_who_was_deleted_meanwhile_is_granted_and_reported(shop: Shop):
    user = low(shop)
    lose_the_answer(shop, user)
    with shop.engine.begin() as conn:
        shop.world.accounts.delete_user(conn, user)
    found = stripe.reconcile(shop.engine, shop.config).findings
    paid = shop.api.payment_intents.list().data[0].id
    assert (shop.balance(user), shop.rows(user)[-1]) == (CREDITS + 1, ("purchase", CREDITS))
    assert str(next(one for one in found if one.object_id == paid).kind) == "deleted_user"


def test_a_paid_top_up_that_the_balance_cannot_hold_is_a_finding(shop: Shop):
    user = low(shop)
    lose_the_answer(shop, user)
    with shop.engine.begin() as conn:
        shop.world.ledger.grant(conn, user, credits=INT32_MAX - 1, key="all", description="All there is")
    done = stripe.reconcile(shop.engine, shop.config)
    assert [str(one.kind) for one in done.findings] == ["refused"]
    waits = top_up(shop, user, below=INT32_MAX + 1)
    assert (waits.outcome, waits.purchase.status) == (TopUpOutcome.UNDER_WAY, "pending")
    spend(shop, user, CREDITS)
    assert top_up(shop, user, below=INT32_MAX + 1).outcome is TopUpOutcome.CHARGED
    assert (shop.balance(user), charges(shop)) == (INT32_MAX, 2)


def test_a_charge_after_a_decline_whose_answer_was_lost_is_found_by_reconciliation(shop: Shop, monkeypatch):
    user = low(shop)
    card_is(shop, DECLINED)
    declined = top_up(shop, user)
    card_is(shop, "4242424242424242")
    later(monkeypatch)
    lose_the_answer(shop, user)
    assert declined.purchase is not None
    changes = stripe.reconcile(shop.engine, shop.config).changes
    assert changes == ((str(declined.purchase.id), stripe.Outcome.GRANTED),)
    assert (shop.balance(user), charges(shop)) == (CREDITS + 1, 2)
    assert not stripe.reconcile(shop.engine, shop.config).changed


def test_a_charge_that_never_reached_stripe_is_given_up_after_a_day(shop: Shop, monkeypatch):
    user = low(shop)
    shop.dev.fault("POST", INTENTS, 503, times=3)
    with pytest.raises(e.StripeUnavailable):
        top_up(shop, user)
    assert not stripe.reconcile(shop.engine, shop.config).changed
    monkeypatch.setattr(reconciliation, "SESSIONLESS_MAX", reconciliation.SESSIONLESS_MAX * 0)
    assert [str(outcome) for _, outcome in stripe.reconcile(shop.engine, shop.config).changes] == ["failed"]
    assert top_up(shop, user).outcome is TopUpOutcome.CHARGED  # the same purchase, paid after all
    assert (shop.balance(user), charges(shop)) == (CREDITS + 1, 2)


def test_after_a_decline_there_is_a_longer_pause_each_time_and_then_the_user_is_asked(shop: Shop, monkeypatch):
    user = low(shop)
    card_is(shop, DECLINED)
    first = top_up(shop, user)
    assert first.purchase is not None
    assert first.purchase.status == "failed"
    for hours in (1, 12, 48):
        waits = top_up(shop, user)
        assert waits.outcome is TopUpOutcome.WAITING
        assert waits.retry_at is not None
        assert round((waits.retry_at - dt.datetime.now(dt.UTC)) / dt.timedelta(hours=1)) == hours
        with monkeypatch.context() as patch:
            later(patch)
            again = top_up(shop, user)
        assert again.purchase is not None
        assert again.purchase.id == first.purchase.id
    assert (again.outcome, top_up(shop, user).outcome) == (TopUpOutcome.ASK, TopUpOutcome.ASK)
    assert len(shop.api.payment_intents.list().data) == 5  # the purchase, and four attempts
    assert (shop.balance(user), charges(shop)) == (1, 1)


def test_a_card_that_works_again_pays_the_same_purchase(shop: Shop, monkeypatch):
    user = low(shop)
    card_is(shop, DECLINED)
    declined = top_up(shop, user)
    card_is(shop, "4242424242424242")
    later(monkeypatch)
    done = top_up(shop, user)
    assert done.purchase is not None
    assert declined.purchase is not None
    assert (done.outcome, done.purchase.id) == (TopUpOutcome.CHARGED, declined.purchase.id)
    assert (shop.balance(user), done.purchase.description.endswith("(paid after all)")) == (CREDITS + 1, True)


@pytest.mark.parametrize("what", ["card", "customer"])
def test_a_new_card_or_customer_pays_after_the_old_one_was_removed(shop: Shop, what: str):
    user = low(shop)
    if what == "card":
        shop.dev.account.objects["payment_method"].clear()
        assert top_up(shop, user).outcome is TopUpOutcome.ASK
    else:
        card_is(shop, DECLINED)
        assert top_up(shop, user).outcome is TopUpOutcome.WAITING
        card_is(shop, "4242424242424242")
        shop.api.customers.delete(shop.api.customers.list().data[0].id)
    buy_and_spend(shop, user)
    done = top_up(shop, user)
    assert (done.outcome, shop.balance(user), charges(shop)) == (TopUpOutcome.CHARGED, CREDITS + 1, 3)


def test_a_new_customer_whose_card_is_declined_waits_like_any(shop: Shop, monkeypatch):
    user = low(shop)
    card_is(shop, DECLINED)
    top_up(shop, user)
    card_is(shop, "4242424242424242")
    shop.api.customers.delete(shop.api.customers.list().data[0].id)
    buy_and_spend(shop, user)
    card_is(shop, DECLINED)
    for _ in range(2):
        waits = top_up(shop, user)
        assert (waits.outcome, waits.retry_at is None) == (TopUpOutcome.WAITING, False)
    card_is(shop, "4242424242424242")
    later(monkeypatch)
    assert top_up(shop, user).outcome is TopUpOutcome.CHARGED


def test_a_decline_that_stripe_does_not_list_yet_has_a_time_to_try_again(shop: Shop, monkeypatch):
    user = low(shop)
    card_is(shop, DECLINED)
    monkeypatch.setattr(top_ups, "attempts_of", lambda *_: [])
    waits = top_up(shop, user)
    assert waits.outcome is TopUpOutcome.WAITING
    assert waits.retry_at is not None
    assert waits.retry_at > dt.datetime.now(dt.UTC)


def on_sale(shop: Shop, *packs: Pack) -> None:
    """These packs are on sale from now on, at the prices that they have here."""
    made = stripe.setup(shop.configure(packs=packs))
    shop.configure(
        packs=tuple(replace(pack, stripe_price_id=of.price) for pack, of in zip(packs, made.packs, strict=True))
    )


def with_small(shop: Shop) -> None:
    on_sale(shop, *shop.config.packs, Pack(name="Small", credits=5, amount=100))


def small(shop: Shop, user: Key, **options: int) -> stripe.TopUp:
    return stripe.top_up(shop.engine, shop.config, user, "Small", **({"below": 10, "monthly_max": 500} | options))


@pytest.mark.parametrize("changed", ["the pack", "the price", "the credits"])
def test_after_a_decline_the_pack_and_price_of_the_next_call_are_charged(shop: Shop, monkeypatch, changed: str):
    with_small(shop)
    user = low(shop)
    card_is(shop, DECLINED)
    declined = top_up(shop, user) if changed == "the pack" else small(shop, user)
    credits, amount = {"the pack": (5, 100), "the price": (5, 300), "the credits": (7, 100)}[changed]
    on_sale(shop, shop.config.packs[0], Pack(name="Small", credits=credits, amount=amount))
    card_is(shop, "4242424242424242")
    later(monkeypatch)
    assert small(shop, user, monthly_max=amount - 1).outcome is TopUpOutcome.CEILING
    done = small(shop, user)
    assert done.purchase is not None
    assert declined.purchase is not None
    assert (done.outcome, done.purchase.amount_paid, done.purchase.amount) == (TopUpOutcome.CHARGED, amount, credits)
    assert (done.purchase.id != declined.purchase.id, shop.balance(user), charges(shop)) == (True, credits + 1, 2)
    assert not stripe.reconcile(shop.engine, shop.config).changed


def test_another_pack_does_not_shorten_the_pause_after_a_decline(shop: Shop, monkeypatch):
    with_small(shop)
    user = low(shop)
    card_is(shop, DECLINED)
    assert top_up(shop, user).outcome is TopUpOutcome.WAITING
    assert small(shop, user).outcome is TopUpOutcome.WAITING
    later(monkeypatch)
    outcomes = [small(shop, user).outcome, top_up(shop, user).outcome, small(shop, user).outcome]
    assert outcomes == [TopUpOutcome.WAITING, TopUpOutcome.WAITING, TopUpOutcome.ASK]
    assert len(shop.api.payment_intents.list().data) == 5  # the purchase, and four attempts


def test_a_top_up_that_may_be_under_way_is_not_joined_by_one_of_another_pack(shop: Shop, monkeypatch):
    with_small(shop)
    user = low(shop)
    shop.dev.fault("POST", INTENTS, 503, times=3)
    with pytest.raises(e.StripeUnavailable):
        top_up(shop, user)
    assert small(shop, user).outcome is TopUpOutcome.UNDER_WAY
    assert (shop.balance(user), charges(shop)) == (1, 1)
    monkeypatch.setattr(top_ups, "PENDING_MAX", dt.timedelta(0))
    done = small(shop, user)
    assert (done.outcome, shop.balance(user), charges(shop)) == (TopUpOutcome.CHARGED, 6, 2)


def test_calls_beside_each_other_for_two_packs_charge_for_one(shop: Shop):
    with_small(shop)
    user = low(shop)
    done: list[TopUpOutcome] = []
    calls = [threading.Thread(target=lambda it=it: done.append(it(shop, user, below=2).outcome)) for it in TWO_PACKS]
    for call in calls:
        call.start()
    for call in calls:
        call.join()
    assert len(done) == 6
    assert TopUpOutcome.CHARGED in done
    assert set(done) <= {TopUpOutcome.CHARGED, TopUpOutcome.UNDER_WAY, TopUpOutcome.ENOUGH}
    assert (shop.balance(user) in (6, CREDITS + 1), charges(shop)) == (True, 2)


TWO_PACKS = (small, top_up) * 3


def test_a_balance_that_a_concurrent_call_has_raised_is_not_topped_up_again(shop: Shop, monkeypatch):
    user = low(shop)

    class Reader:
        def __init__(self, _config: object) -> None:
            pass

        def get(self, conn: sa.Connection, key: Key) -> Account:
            account = Accounts(shop.config).get(conn, key)
            monkeypatch.setattr(top_ups, "Accounts", Accounts)
            assert top_up(shop, user).outcome is TopUpOutcome.CHARGED
            return account

    monkeypatch.setattr(top_ups, "Accounts", Reader)
    assert top_up(shop, user).outcome is TopUpOutcome.CHARGED
    assert (shop.balance(user), charges(shop)) == (CREDITS + 1, 2)


def test_the_ceiling_counts_money_of_the_packs_currency(shop: Shop):
    user = low(shop)
    assert top_up(shop, user).outcome is TopUpOutcome.CHARGED
    spend(shop, user, CREDITS)
    on_sale(shop, Pack(name="Small", credits=5, amount=100, currency="jpy"))
    assert small(shop, user, monthly_max=100).outcome is TopUpOutcome.CHARGED
    assert small(shop, user, monthly_max=100).outcome is TopUpOutcome.CEILING


def test_a_bank_that_asks_for_authentication_asks_the_user(shop: Shop, monkeypatch):
    user = low(shop)
    later(monkeypatch)
    card_is(shop, AUTHENTICATED)
    for _ in range(2):
        assert top_up(shop, user).outcome is TopUpOutcome.ASK
    assert len(shop.api.payment_intents.list().data) == 2  # it is not tried again


@pytest.mark.parametrize("why", ["not saved", "customer gone"])
def test_without_a_saved_payment_method_the_user_is_asked(shop: Shop, why: str):
    user = low(shop, saved=why != "not saved")
    if why == "customer gone":
        shop.api.customers.delete(shop.api.customers.list().data[0].id)
    assert top_up(shop, user).outcome is TopUpOutcome.ASK
    assert (shop.balance(user), charges(shop)) == (1, 1)


def test_the_months_ceiling_ends_a_runaway_and_tells_an_operator(shop: Shop):
    user = low(shop)
    for _ in range(2):
        assert top_up(shop, user, monthly_max=2 * PRICE).outcome is TopUpOutcome.CHARGED
        spend(shop, user, CREDITS)
    for _ in range(2):
        assert top_up(shop, user, monthly_max=2 * PRICE).outcome is TopUpOutcome.CEILING
    assert (shop.balance(user), charges(shop), shop.findings()) == (1, 3, ["top_up_ceiling"])


@pytest.mark.parametrize("wrong", [{"below": 0}, {"below": 1.5}, {"monthly_max": 0}, {"monthly_max": True}])
def test_a_threshold_or_ceiling_that_is_none(shop: Shop, wrong):
    with pytest.raises(e.InvalidArgument, match="pass 1 or more"):
        top_up(shop, shop.world.user(), **wrong)
