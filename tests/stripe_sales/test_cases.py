"""The cases that fulfilment must survive: one test for each row of the table in docs/stripe-cases.md."""

from __future__ import annotations

import functools
import itertools
import json
import socket
import threading
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
import sqlalchemy as sa
import stripe as sdk

from stripe_sales.shop import CREDITS, ORIGIN, PACK, PRICE, Shop
from tallystick import Pack, stripe
from tallystick import errors as e
from tallystick.audit import audit
from tallystick.declared_tables import stripe_events, stripe_reversals
from tallystick.schema import INT32_MAX

pytestmark = pytest.mark.one_server  # it is about what Stripe sends; test_machine runs on both

COMPLETED = "checkout.session.completed"
SUCCEEDED = "checkout.session.async_payment_succeeded"
FAILED = "checkout.session.async_payment_failed"
EXPIRED = "checkout.session.expired"
SESSIONS = "/v1/checkout/sessions"
REFUNDS = ("refund.created", "refund.updated", "refund.failed", "charge.refund.updated", "charge.refunded")


def bought(shop: Shop, *, card: str = "4242424242424242") -> tuple[e.Key, stripe.Checkout]:
    """A user whose purchase is paid, its event delivered and gone from the hold."""
    user = shop.world.user()
    started = shop.checkout(user)
    shop.dev.pay(started.session, card=card)
    shop.deliver_all()
    shop.dev.drop(shop.events())
    return user, started


def lose_answer(shop: Shop, path: str, outcome: str | int) -> None:
    """The next POST has its effect at Stripe; neither it nor the SDK's retries bring that home."""
    shop.dev.fault("POST", path, outcome, when="after")
    shop.dev.fault("POST", path, outcome, times=2)


def all_at_once(*calls):
    results: list[object] = [None] * len(calls)

    def run(number: int) -> None:
        results[number] = calls[number]()

    threads = [threading.Thread(target=run, args=(number,)) for number in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


# --- the same thing more than once ---


def test_the_same_event_twice(shop: Shop):
    user = shop.world.user()
    shop.dev.pay(shop.checkout(user).session)
    assert shop.outcomes(COMPLETED) == ["granted"]
    assert shop.outcomes(COMPLETED) == ["duplicate"]
    assert shop.rows(user) == [("purchase", CREDITS)]


def test_the_same_event_concurrently(shop: Shop):
    user = shop.world.user()
    shop.dev.pay(shop.checkout(user).session)
    [event] = shop.events(COMPLETED)
    received = all_at_once(*[lambda: shop.deliver(event)[0].outcome] * 8)
    assert sorted(received) == ["duplicate"] * 7 + ["granted"]
    assert shop.rows(user) == [("purchase", CREDITS)]


def test_the_handler_crashes_half_way(shop: Shop):
    user = shop.world.user()
    shop.dev.pay(shop.checkout(user).session)
    before = shop.written()

    def crash(_conn: sa.Connection) -> None:
        raise RuntimeError("the power went out before the commit")

    sa.event.listen(shop.engine, "commit", crash)
    with pytest.raises(RuntimeError):  # which a web framework answers with 500
        shop.deliver(*shop.events(COMPLETED))
    sa.event.remove(shop.engine, "commit", crash)
    assert shop.written() == before
    assert shop.balance(user) == 0
    assert shop.outcomes(COMPLETED) == ["granted"]


def test_two_event_ids_for_one_fact(shop: Shop):
    user = shop.world.user()
    shop.dev.pay(shop.checkout(user).session)
    [event] = shop.events(COMPLETED)
    body, _ = shop.dev.signed(event, shop.endpoint)
    other = json.dumps(json.loads(body) | {"id": "evt_another"})
    signature = sdk.WebhookSignature.generate_signature_header(other, shop.config.stripe_webhook_secret)
    assert shop.deliver(event)[0].outcome == "granted"
    assert stripe.receive(shop.engine, shop.config, other.encode(), signature).outcome == "unchanged"
    assert shop.rows(user) == [("purchase", CREDITS)]


def test_webhook_and_success_page_race(shop: Shop):
    user = shop.world.user()
    session = shop.checkout(user).session
    shop.dev.pay(session)
    [event] = shop.events(COMPLETED)
    outcomes = all_at_once(
        *[
            lambda: shop.deliver(event)[0].outcome,
            lambda: stripe.confirm(shop.engine, shop.config, user, session).outcome,
        ]
        * 3
    )
    assert sorted(outcomes).count("granted") == 1
    assert shop.rows(user) == [("purchase", CREDITS)]


# --- the success page ---


def test_webhooks_for_somebody_who_spends_meanwhile(shop: Shop):
    user = shop.world.user(credits=1000)
    for _ in range(5):
        shop.dev.pay(shop.checkout(user).session)
    done = threading.Event()

    def spend(number: int) -> int:
        with shop.world.autocommit.connect() as conn:
            for n in itertools.count(1):
                shop.world.ledger.consume(conn, user, key=f"{number}-{n}")
                if done.is_set():
                    return n
        raise AssertionError

    with ThreadPoolExecutor(3) as pool:
        spending = [pool.submit(spend, number) for number in range(3)]
        received = shop.deliver_all()
        done.set()
        spent = sum(each.result() for each in spending)
    assert {one.status for one in received} == {200}
    assert shop.balance(user) == 1000 + 5 * CREDITS - spent
    assert shop.world.deadlocks() == 0


def test_success_page_for_another_users_session(shop: Shop):
    user, thief = shop.world.user(), shop.world.user()
    session = shop.checkout(user).session
    shop.dev.pay(session)
    for who, what in ((thief, session), (user, "cs_test_unknown"), (user, "../../etc"), (user, "")):
        with pytest.raises(e.SessionNotYours):
            stripe.confirm(shop.engine, shop.config, who, what)
    assert (shop.balance(user), shop.balance(thief)) == (0, 0)
    assert stripe.confirm(shop.engine, shop.config, user, session).granted


def test_success_page_for_an_unpaid_session(shop: Shop):
    user = shop.world.user()
    session = shop.checkout(user).session
    confirmed = stripe.confirm(shop.engine, shop.config, user, session)
    assert (confirmed.granted, confirmed.purchase.status) == (False, "pending")
    shop.dev.pay(session, card="async")
    assert not stripe.confirm(shop.engine, shop.config, user, session).granted
    assert shop.balance(user) == 0


# --- delayed payments ---


def test_completed_with_unpaid_stays_pending(shop: Shop):
    user = shop.world.user()
    started = shop.checkout(user)
    shop.dev.pay(started.session, card="async")
    assert shop.outcomes(COMPLETED) == ["pending"]
    purchase = shop.purchase(started)
    assert (purchase.status, purchase.stripe_payment_intent_id) == ("pending", shop.intent(started))
    assert shop.balance(user) == 0


@pytest.mark.parametrize("order", [(COMPLETED, SUCCEEDED), (SUCCEEDED, COMPLETED)])
def test_async_succeeded_before_or_after_completed(shop: Shop, order):
    user = shop.world.user()
    session = shop.checkout(user).session
    shop.dev.pay(session, card="async")
    shop.dev.settle(session, succeeded=True)
    assert [outcome for one in order for outcome in shop.outcomes(one)].count("granted") == 1
    assert shop.rows(user) == [("purchase", CREDITS)]


def test_async_failed_then_a_late_completed_stays_failed(shop: Shop):
    user = shop.world.user()
    started = shop.checkout(user)
    shop.dev.pay(started.session, card="async")
    shop.dev.settle(started.session, succeeded=False)
    assert shop.outcomes(FAILED) == ["failed"]
    assert shop.outcomes(COMPLETED) == ["unchanged"]
    assert shop.purchase(started).status == "failed"
    assert shop.balance(user) == 0


def test_no_payment_required_is_granted(shop: Shop):
    user = shop.world.user()
    started = shop.checkout(user)
    shop.dev.pay(started.session, discount=PRICE)
    assert shop.outcomes(COMPLETED) == ["granted"]
    purchase = shop.purchase(started)
    assert (purchase.amount_paid, purchase.currency, purchase.stripe_payment_intent_id) == (0, "usd", None)
    assert shop.balance(user) == CREDITS


# --- expiry ---


def test_expired_after_paid_is_ignored(shop: Shop):
    user = shop.world.user()
    started = shop.checkout(user)
    shop.api.checkout.sessions.expire(started.session)
    [event] = shop.events(EXPIRED)
    other = shop.checkout(user)
    shop.dev.pay(other.session)
    shop.outcomes(COMPLETED)
    # the expiry of the paid session, which Stripe never sends, made of the real one
    body, _ = shop.dev.signed(event, shop.endpoint)
    forged = body.replace(started.session, other.session).replace(str(started.purchase.id), str(other.purchase.id))
    signature = sdk.WebhookSignature.generate_signature_header(forged, shop.config.stripe_webhook_secret)
    assert stripe.receive(shop.engine, shop.config, forged.encode(), signature).outcome == "unchanged"
    assert shop.purchase(other).status == "completed"


def test_expired(shop: Shop):
    user = shop.world.user()
    started = shop.checkout(user)
    shop.dev.advance(86_400)
    assert shop.outcomes(EXPIRED) == ["failed"]
    assert shop.purchase(started).description == f"Purchased {PACK} pack (failed: the session expired)"


def test_paid_beats_failed(shop: Shop):
    user = shop.world.user()
    started = shop.checkout(user)
    with shop.engine.begin() as conn:
        shop.world.ledger.fail_purchase(conn, user, purchase=started.purchase.id, reason="given up too early")
    shop.dev.pay(started.session)
    assert shop.outcomes(COMPLETED) == ["granted"]
    assert shop.purchase(started).description.endswith("(paid after all)")


# --- between Stripe and the database ---


def test_webhook_before_the_session_id_is_stored(shop: Shop):
    user = shop.world.user()
    lose_answer(shop, SESSIONS, "cut")
    with pytest.raises(e.StripeUnavailable):
        shop.checkout(user, key="form 1")
    [session] = shop.api.checkout.sessions.list().data
    shop.dev.pay(session.id)
    assert shop.outcomes(COMPLETED) == ["granted"]
    with shop.engine.begin() as conn:
        [row] = shop.world.ledger.history(conn, user)
    assert (row.status, row.stripe_session_id) == ("completed", session.id)
    again = shop.checkout(user, key="form 1")
    assert (again.purchase.id, again.session, again.url) == (row.id, session.id, None)


@pytest.mark.parametrize("outcome", ["cut", 503])
def test_a_crash_between_asking_stripe_and_storing_its_answer(either_shop: Shop, outcome):
    shop = either_shop
    user = shop.world.user()
    lose_answer(shop, SESSIONS, outcome)
    with pytest.raises(e.StripeUnavailable) as lost:
        shop.checkout(user, key="form 1")
    assert lost.value.retryable
    again = shop.checkout(user, key="form 1")
    assert [one.id for one in shop.api.checkout.sessions.list().data] == [again.session]
    assert again.url is not None
    assert again.purchase.stripe_session_id == again.session


def test_retry_after_a_day_when_the_key_is_forgotten(shop: Shop):
    user = shop.world.user()
    lose_answer(shop, SESSIONS, "cut")
    with pytest.raises(e.StripeUnavailable):
        shop.checkout(user, key="form 1")
    assert shop.dev.forget_idempotency_keys() > 0
    again = shop.checkout(user, key="form 1")
    assert [one.id for one in shop.api.checkout.sessions.list().data] == [again.session]


@pytest.mark.parametrize("outcome", [500, 502, "cut", 429])
def test_create_answers_5xx_timeout_or_429(either_shop: Shop, outcome):
    shop = either_shop
    user = shop.world.user()
    shop.dev.fault("POST", SESSIONS, outcome, times=3)
    with pytest.raises(e.StripeUnavailable):
        shop.checkout(user, key="form 1")
    with shop.engine.begin() as conn:
        [row] = shop.world.ledger.history(conn, user)
    assert (row.status, row.stripe_session_id) == ("pending", None)
    again = shop.checkout(user, key="form 1")
    assert (again.purchase.id, len(shop.api.checkout.sessions.list().data)) == (row.id, 1)


@pytest.mark.parametrize("outcome", [500, 502, "cut", 429])
def test_a_passing_failure_is_not_even_noticed(either_shop: Shop, outcome):
    shop = either_shop
    shop.dev.fault("POST", SESSIONS, outcome, times=2)
    assert shop.checkout(shop.world.user()).url


def test_nobody_at_stripes_address(either_shop: Shop):
    shop = either_shop
    user = shop.world.user()
    with socket.socket() as taken:  # a port that refuses: bound, and nobody listens
        taken.bind(("127.0.0.1", 0))
        shop.configure(stripe_api_base=f"http://127.0.0.1:{taken.getsockname()[1]}")
        with pytest.raises(e.StripeUnavailable, match="Stripe did not answer") as away:
            shop.checkout(user)
    assert (away.value.status, away.value.retryable) == (None, True)
    with shop.engine.begin() as conn:
        assert shop.world.ledger.history(conn, user) == []


def test_a_session_that_is_unknown_here(shop: Shop, caplog):
    marked = {"tallystick_purchase": str(uuid.uuid4())}  # sold by this database before it was restored from a backup
    made = shop.foreign(metadata=marked)
    assert shop.outcomes(COMPLETED) == ["unknown"]
    assert shop.findings() == ["unknown_session"]
    assert made in caplog.text
    assert any(made in str(finding) for finding in stripe.reconcile(shop.engine, shop.config).findings)


# --- others at the same Stripe account ---


@pytest.mark.parametrize("fields", [{}, {"client_reference_id": "order 7"}, {"metadata": {"order": "7"}}])
def test_a_sale_of_something_else_is_counted_and_not_listed(shop: Shop, fields):
    session = shop.foreign(**fields)
    intent = shop.api.checkout.sessions.retrieve(session).payment_intent
    shop.dev.refund(str(intent), amount=10)
    shop.dev.dispute(str(intent), amount=40)
    assert set(shop.outcomes()) == {"foreign"}
    report = stripe.reconcile(shop.engine, shop.config)
    assert (report.findings, report.changes) == ((), ())
    assert report.outcomes == {"foreign": 3}  # the session, the refund, the dispute
    with shop.engine.begin() as conn:
        assert conn.scalar(sa.select(sa.func.count()).select_from(stripe_reversals)) == 0


def test_two_installations_at_one_account_ignore_each_other(make_shop, make_world, dev):
    here = make_shop()
    there = Shop(make_world("uuid"), dev, endpoint_url="http://127.0.0.1:2/webhook")
    try:
        users = here.world.user(), there.world.user()
        for shop, user in zip((here, there), users, strict=True):
            bought = shop.checkout(user)
            dev.pay(bought.session)
            dev.refund(shop.intent(bought), amount=500)
        for shop in (here, there):
            events = [one["event"] for one in dev.held() if one["endpoint"] == shop.endpoint]
            outcomes = [str(one.outcome) for one in shop.deliver(*events)]
            assert (outcomes.count("granted"), outcomes.count("taken_back")) == (1, 1)
            assert outcomes.count("foreign") == 3  # the other's session, its refund, and its charge
            assert stripe.reconcile(shop.engine, shop.config).findings == ()
        assert (here.balance(users[0]), there.balance(users[1])) == (49, 49)
    finally:
        there.engine.dispose()


def test_a_copy_of_the_database_is_told_apart_by_a_realm_of_its_own(shop: Shop):
    user, _ = started_without_a_session(shop, "pending")
    [session] = shop.api.checkout.sessions.list().data
    shop.dev.pay(session.id)
    staging = shop.config.model_copy(update={"stripe_realm": "staging"})
    [event] = shop.events(COMPLETED)
    body, signature = shop.dev.signed(event, shop.endpoint)
    assert stripe.receive(shop.engine, staging, body.encode(), signature).outcome == "foreign"
    with shop.engine.begin() as conn:
        conn.execute(sa.delete(stripe_events))
    assert shop.outcomes(COMPLETED) == ["granted"]
    assert shop.balance(user) == CREDITS


# --- fields that a buyer or an address sets prove nothing ---


def started_without_a_session(shop: Shop, state: str) -> tuple[e.Key, uuid.UUID]:
    """A user and the id of a purchase that has no stored session, as the user's own CSV shows it."""
    user = shop.world.user()
    with shop.engine.begin() as conn:
        if state == "the host's own":
            return user, shop.world.ledger.start_purchase(conn, user, credits=9, description="Sold by the host").id
    lose_answer(shop, SESSIONS, 503)
    with pytest.raises(e.StripeUnavailable):
        shop.checkout(user, key="form 1")
    with shop.engine.begin() as conn:
        [row] = shop.world.ledger.history(conn, user)
        if state == "failed":
            shop.world.ledger.fail_purchase(conn, user, purchase=row.id, reason="given up")
    return user, row.id


@pytest.mark.parametrize("state", ["pending", "failed", "the host's own"])
@pytest.mark.parametrize("path", ["webhook", "success page", "reconcile"])
def test_a_reference_alone_grants_nothing(shop: Shop, state, path):
    user, purchase = started_without_a_session(shop, state)
    session = shop.foreign(client_reference_id=str(purchase))  # 0.50, for a pack of 10.00
    if path == "webhook":
        assert shop.outcomes(COMPLETED) == ["unknown"]
    elif path == "reconcile":
        stripe.reconcile(shop.engine, shop.config)
    else:
        with pytest.raises(e.SessionNotYours):
            stripe.confirm(shop.engine, shop.config, user, session)
    assert (shop.balance(user), shop.rows(user)) == (0, [])
    if path != "success page":
        [finding] = [one for one in stripe.reconcile(shop.engine, shop.config).findings if one.object_id == session]
        assert str(finding) == (
            f"unproven_session {session} (purchase {purchase}): "
            f"expected metadata tallystick_purchase={purchase}, found payment, 50 usd, paid"
        )


@pytest.mark.parametrize(
    "changes",
    [
        {"metadata": {}},
        {"metadata": None},
        {"metadata": {}, "payment_link": "plink_1"},
        {"metadata": {}, "custom_fields": [{"key": "tallystick_purchase", "text": {"value": "{purchase}"}}]},
        {"metadata": {}, "customer_details": {"email": "{purchase}", "name": "tallystick_purchase={purchase}"}},
        {"metadata": {"client_reference_id": "{purchase}"}},
        {"metadata": {"tallystick_purchase": "not a purchase"}},
        {"metadata": {}, "client_reference_id": "{PURCHASE}"},
    ],
)
def test_nothing_that_a_buyer_fills_in_names_a_purchase(shop: Shop, changes):
    user, purchase = started_without_a_session(shop, "pending")
    [session] = shop.api.checkout.sessions.list().data
    shop.dev.pay(session.id)
    text = json.dumps(changes).replace("{purchase}", str(purchase)).replace("{PURCHASE}", str(purchase).upper())
    assert changed_session(shop, id="cs_test_other", **json.loads(text)).outcome == "unknown"
    assert shop.balance(user) == 0
    assert shop.outcomes(COMPLETED) == ["granted"]  # the real one has the metadata


@pytest.mark.parametrize(
    "changes",
    [
        {"mode": "subscription", "amount_total": 0, "payment_status": "no_payment_required"},
        {"mode": "setup", "amount_total": 0, "payment_status": "no_payment_required"},
        {"mode": "subscription"},
        {"amount_subtotal": 50, "amount_total": 50},
        {"amount_subtotal": 10 * PRICE, "amount_total": 10 * PRICE},
        {"currency": "jpy"},
    ],
)
@pytest.mark.parametrize("state", ["pending", "failed"])
def test_a_session_that_is_not_stored_grants_its_own_price_alone(shop: Shop, state, changes):
    user, _ = started_without_a_session(shop, state)
    [session] = shop.api.checkout.sessions.list().data
    shop.dev.pay(session.id)
    assert changed_session(shop, id="cs_test_other", **changes).outcome == "unknown"
    assert (shop.balance(user), shop.findings()) == (0, ["unproven_session"])
    assert shop.outcomes(COMPLETED) == ["granted"]
    assert shop.balance(user) == CREDITS


@pytest.mark.parametrize("mode", ["subscription", "setup"])
def test_a_stored_session_of_another_mode_grants_nothing(shop: Shop, mode):
    user = shop.world.user()
    shop.dev.pay(shop.checkout(user).session)
    assert changed_session(shop, mode=mode, amount_total=0, payment_status="no_payment_required").outcome == "unknown"
    assert (shop.balance(user), shop.findings()) == (0, ["unproven_session"])


@pytest.mark.parametrize("changes", [{"amount_total": PRICE - 250}, {"amount_total": PRICE + 190}])
def test_a_discount_or_tax_is_no_reason_to_refuse_what_was_paid(shop: Shop, changes):
    user, _ = started_without_a_session(shop, "pending")
    [session] = shop.api.checkout.sessions.list().data
    shop.dev.pay(session.id)
    assert changed_session(shop, **changes).outcome == "granted"
    assert shop.balance(user) == CREDITS


def test_a_reference_neither_fails_nor_occupies_a_purchase(shop: Shop):
    user, purchase = started_without_a_session(shop, "pending")
    price = shop.config.packs[0].stripe_price_id
    link = shop.api.checkout.sessions.create(
        {
            "mode": "payment",
            "line_items": [{"price": price, "quantity": 1}],
            "success_url": f"{ORIGIN}/",
            "client_reference_id": str(purchase),
        }
    )
    shop.api.checkout.sessions.expire(link.id)
    assert shop.outcomes(EXPIRED) == ["unknown"]
    again = shop.checkout(user, key="form 1")
    assert (again.purchase.status, again.purchase.id, again.session != link.id) == ("pending", purchase, True)
    assert shop.findings() == []


def test_a_session_of_the_hosts_own_is_found_by_its_metadata(shop: Shop):
    user, purchase = started_without_a_session(shop, "the host's own")
    session = shop.foreign(metadata={"tallystick_purchase": str(purchase)})
    assert shop.outcomes(COMPLETED) == ["granted"]
    assert (shop.balance(user), shop.findings()) == (9, [])
    assert stripe.confirm(shop.engine, shop.config, user, session).granted


# --- what was on sale, and what was paid ---


def test_price_or_catalogue_edited_meanwhile(shop: Shop):
    user = shop.world.user()
    started = shop.checkout(user)
    shop.configure(packs=(Pack(name=PACK, credits=1, amount=1, stripe_price_id="price_other"),))
    shop.dev.pay(started.session)
    assert shop.outcomes(COMPLETED) == ["granted"]
    assert shop.balance(user) == CREDITS
    assert shop.findings() == []


def test_a_coupon_makes_the_amount_differ(shop: Shop):
    user = shop.world.user()
    started = shop.checkout(user)
    shop.dev.pay(started.session, discount=250)
    assert shop.outcomes(COMPLETED) == ["granted"]
    assert (shop.balance(user), shop.purchase(started).amount_paid) == (CREDITS, PRICE - 250)
    assert shop.findings() == ["amount_differs"]


def test_another_currency_is_granted_and_reported(shop: Shop):
    user = shop.world.user()
    started = shop.checkout(user)
    shop.dev.pay(started.session)
    [event] = shop.events(COMPLETED)
    body, _ = shop.dev.signed(event, shop.endpoint)
    payload = json.loads(body)
    payload["data"]["object"]["currency"] = "eur"  # adaptive pricing, which the double does not model
    changed = json.dumps(payload)
    signature = sdk.WebhookSignature.generate_signature_header(changed, shop.config.stripe_webhook_secret)
    assert stripe.receive(shop.engine, shop.config, changed.encode(), signature).outcome == "granted"
    assert shop.findings() == ["currency_differs"]
    assert shop.purchase(started).currency == "eur"


def changed_session(shop: Shop, **changes: object) -> stripe.Received:
    """Deliver the held completion with some fields of its session changed, signed as Stripe would."""
    [event] = shop.events(COMPLETED)
    payload = json.loads(shop.dev.signed(event, shop.endpoint)[0])
    payload["data"]["object"] |= changes
    payload["id"] = f"evt_{len(changes)}_{next(iter(changes))}"
    return stripe.receive(shop.engine, shop.config, *_signed(shop, json.dumps(payload)))


def test_another_customer_is_granted_and_reported(shop: Shop):
    user = shop.world.user()
    shop.dev.pay(shop.checkout(user).session)
    assert changed_session(shop, customer="cus_other").outcome == "granted"
    assert (shop.balance(user), shop.findings()) == (CREDITS, ["customer_differs"])


def test_a_second_session_for_one_purchase_is_reported_not_granted(shop: Shop):
    user = shop.world.user()
    shop.dev.pay(shop.checkout(user).session)
    assert changed_session(shop, id="cs_test_second").outcome == "refused"
    [kept] = stripe.failed_deliveries(shop.engine, shop.config)
    assert kept.reason.startswith("refused: second_session cs_test_second (purchase ")
    assert (shop.balance(user), shop.findings()) == (0, ["second_session"])
    assert shop.outcomes(COMPLETED) == ["granted"]


def test_what_a_balance_cannot_hold_is_reported_and_found_again(shop: Shop):
    user = shop.world.user()
    started = shop.checkout(user)
    with shop.engine.begin() as conn:
        shop.world.ledger.grant(conn, user, credits=INT32_MAX, key="all", description="All there is")
    shop.dev.pay(started.session)
    assert shop.outcomes(COMPLETED) == ["refused"]
    assert (shop.purchase(started).status, shop.findings()) == ("pending", ["refused"])
    with shop.engine.begin() as conn:
        shop.world.ledger.consume(conn, user, credits=CREDITS, key="room")
    stripe.reconcile(shop.engine, shop.config)
    assert (shop.purchase(started).status, shop.balance(user)) == ("completed", INT32_MAX)


def test_a_deleted_user_who_paid_is_granted_and_reported(shop: Shop):
    user = shop.world.user()
    started = shop.checkout(user)
    with shop.engine.begin() as conn:
        shop.world.accounts.delete_user(conn, user)
    shop.dev.pay(started.session)
    assert shop.outcomes(COMPLETED) == ["granted"]
    assert (shop.balance(user), shop.findings()) == (CREDITS, ["deleted_user"])


# --- refunds ---


def test_partial_refunds(shop: Shop):
    user, started = bought(shop)
    for amount in (333, 333, 334):
        shop.dev.refund(shop.intent(started), amount=amount)
    shop.deliver_all()
    assert shop.rows(user) == [("purchase", 97), ("refund", -32), ("refund", -32), ("refund", -33)]
    assert shop.balance(user) == 0


def test_all_events_of_one_refund_make_one_reversal(shop: Shop):
    user, started = bought(shop)
    refund = shop.dev.refund(shop.intent(started), amount=500, pending=True)
    shop.dev.settle_refund(refund["id"], "succeeded")
    assert sorted(shop.outcomes()).count("taken_back") == 1
    assert {"refund.created", "charge.refunded", "refund.updated"} <= {one["type"] for one in shop.dev.held()}
    assert shop.rows(user) == [("purchase", 97), ("refund", -48)]


def test_refund_before_completed(shop: Shop):
    user = shop.world.user()
    started = shop.checkout(user)
    shop.dev.pay(started.session)
    shop.dev.refund(shop.intent(started), amount=500)
    assert shop.outcomes("refund.created") == ["taken_back"]
    assert shop.rows(user) == [("purchase", 97), ("refund", -48)]
    assert shop.outcomes(COMPLETED) == ["unchanged"]


def test_refund_made_in_the_dashboard(shop: Shop):
    user, started = bought(shop)
    refund = shop.dev.refund(shop.intent(started))
    assert refund["metadata"] == {}
    assert shop.outcomes("refund.created") == ["taken_back"]
    assert shop.balance(user) == 0


def test_refund_made_here(shop: Shop):
    user, started = bought(shop)
    for _ in range(2):  # the same call again sends nothing more
        stripe.refund(shop.engine, shop.config, started.purchase.id, credits=40, key="ticket 7")
    [sent] = shop.api.refunds.list({"payment_intent": shop.intent(started)}).data
    assert sent.amount == 40 * PRICE // CREDITS
    shop.outcomes(*REFUNDS)
    assert shop.rows(user) == [("purchase", 97), ("refund", -40)]
    stripe.refund(shop.engine, shop.config, started.purchase.id, key="ticket 8")
    assert shop.balance(user) == 0
    assert sum(one.amount for one in shop.api.refunds.list().data) == PRICE
    with pytest.raises(e.RefundExceedsPurchase):
        stripe.refund(shop.engine, shop.config, started.purchase.id, key="ticket 9")


def test_refund_made_here_whose_answer_is_lost(shop: Shop):
    user, started = bought(shop)
    lose_answer(shop, "/v1/refunds", "cut")
    with pytest.raises(e.StripeUnavailable):
        stripe.refund(shop.engine, shop.config, started.purchase.id, key="ticket 7")
    stripe.refund(shop.engine, shop.config, started.purchase.id, key="ticket 7")
    assert len(shop.api.refunds.list().data) == 1
    assert shop.rows(user) == [("purchase", 97), ("refund", -97)]


def test_a_refund_takes_the_longest_key_and_no_longer_one(shop: Shop):
    _, started = bought(shop)
    for key in ("", "k" * 501):
        with pytest.raises(e.InvalidArgument, match="1 to 500"):
            stripe.refund(shop.engine, shop.config, started.purchase.id, credits=1, key=key)
    for _ in range(2):
        stripe.refund(shop.engine, shop.config, started.purchase.id, credits=1, key="é" * 500)
    assert len(shop.api.refunds.list().data) == 1


def test_credits_that_the_host_took_back_with_the_money_are_taken_once(shop: Shop):
    user, started = bought(shop)
    with shop.engine.begin() as conn:
        shop.world.ledger.refund(conn, user, started.purchase.id, key="by hand")
    shop.dev.refund(shop.intent(started))
    shop.deliver_all()
    assert shop.rows(user) == [("purchase", 97), ("refund", -97)]


@pytest.mark.parametrize("end", ["failed", "canceled"])
@pytest.mark.parametrize("succeeded", [True, False])
def test_refund_failed_or_canceled(shop: Shop, end, succeeded):
    user, started = bought(shop)
    refund = shop.dev.refund(shop.intent(started), pending=True)
    if succeeded:
        shop.dev.settle_refund(refund["id"], "succeeded")
    assert "taken_back" in shop.outcomes()
    shop.dev.settle_refund(refund["id"], end)
    assert "given_back" in shop.outcomes()
    assert shop.rows(user) == [("purchase", 97), ("refund", -97), ("grant", 97)]


def test_refund_after_the_credits_are_spent(shop: Shop):
    user, started = bought(shop)
    with shop.engine.begin() as conn:
        shop.world.ledger.consume(conn, user, credits=90, key="spent")
    shop.dev.refund(shop.intent(started))
    shop.outcomes("refund.created")
    assert shop.balance(user) == -90
    with shop.engine.begin() as conn, pytest.raises(e.InsufficientCredits):
        shop.world.ledger.consume(conn, user, key="more")


@pytest.mark.parametrize("merged", [False, True])
def test_a_refund_after_an_expiry_takes_what_was_spent(shop: Shop, merged: bool):
    shop.configure(packs=(replace(shop.config.packs[0], expires_after_days=30),))
    user, started = bought(shop)
    into = shop.world.user() if merged else user
    with shop.engine.begin() as conn:
        if merged:
            shop.world.ledger.merge(conn, user, into=into, key="one person")
        shop.world.ledger.consume(conn, into, credits=7, key="spent")
    shop.world.pass_time(days=31)
    assert stripe.preview_refund(shop.engine, shop.config, started.purchase.id).credits == 7
    refund = shop.dev.refund(shop.intent(started))
    shop.deliver_all()
    assert shop.balance(user) == -7
    with shop.engine.begin() as conn:
        assert audit(conn, shop.config).findings == ()
    shop.dev.settle_refund(refund["id"], "failed")
    shop.deliver_all()
    assert (shop.balance(user), shop.balance(into)) == (0, 0)
    assert not stripe.reconcile(shop.engine, shop.config).changed


# --- parts of a credit's price, marked refunds, other currencies ---


@pytest.fixture
def single(shop: Shop) -> Shop:
    """A shop whose pack is one credit for 79.00."""
    pack = Pack(name=PACK, credits=1, amount=7900)
    shop.configure(packs=(pack,))
    shop.configure(packs=(replace(pack, stripe_price_id=stripe.setup(shop.config).packs[0].price),))
    return shop


@pytest.mark.parametrize(
    ("rounding", "amounts", "left"),
    [
        ("down", (1, 1261, 6637, 1), (1, 1, 1, 0)),  # a cent of goodwill, the VAT of 19 %, nearly all, all
        ("nearest", (1, 3948, 1, 3950), (1, 1, 0, 0)),
        ("up", (1, 7899), (0, 0)),
    ],
)
@pytest.mark.parametrize("where", ["pack", "settings"])
def test_a_part_of_a_credits_price_rounds_as_the_policy_says(single: Shop, rounding, amounts, left, where):
    if where == "pack":
        single.configure(packs=(replace(single.config.packs[0], refund_rounding=rounding),))
    else:
        single.configure(refund_rounding=rounding)
    user, started = bought(single)
    single.configure(refund_rounding="up" if rounding == "down" else "down", packs=())  # sold is sold
    for amount, expected in zip(amounts, left, strict=True):
        single.dev.refund(single.intent(started), amount=amount)
        single.outcomes("refund.created")
        single.dev.drop(single.events())
        assert single.balance(user) == expected, amount


@pytest.mark.parametrize(
    ("rounding", "expected"), [("down", [32, 64, 96, 97]), ("nearest", [32, 65, 97, 97]), ("up", [33, 65, 97, 97])]
)
def test_cumulative_refunds_are_exact_under_each_policy(shop: Shop, rounding, expected):
    shop.configure(refund_rounding=rounding)
    user, started = bought(shop)
    taken = []
    for amount in (333, 333, 333, 1):
        shop.dev.refund(shop.intent(started), amount=amount)
        shop.outcomes("refund.created")
        shop.dev.drop(shop.events())
        taken.append(CREDITS - shop.balance(user))
    assert taken == expected
    assert shop.findings() == []


def test_goodwill_leaves_the_next_pack_alone(single: Shop):
    user, started = bought(single)
    with single.engine.begin() as conn:
        single.world.ledger.consume(conn, user, key="spent")
    single.dev.refund(single.intent(started), amount=1)
    single.deliver_all()
    single.dev.drop(single.events())
    assert single.balance(user) == 0
    single.dev.pay(single.checkout(user).session)
    single.deliver_all()
    assert single.balance(user) == 1


def test_a_refund_of_money_alone(shop: Shop):
    user, started = bought(shop)
    purchase = started.purchase.id
    stripe.refund(shop.engine, shop.config, purchase, amount=160, keep_credits=True, key="the VAT")
    shop.deliver_all()
    assert shop.rows(user) == [("purchase", 97)]
    stripe.refund(shop.engine, shop.config, purchase, credits=40, key="ticket 7")
    assert shop.balance(user) == 57
    assert [one.amount for one in shop.api.refunds.list().data] == [840 * 40 // 97, 160]
    stripe.refund(shop.engine, shop.config, purchase, key="the rest")  # the last money takes the last credits
    shop.deliver_all()
    assert (shop.balance(user), sum(one.amount for one in shop.api.refunds.list().data)) == (0, PRICE)
    assert shop.findings() == []


def test_all_of_the_money_and_none_of_the_credits(shop: Shop):
    user, started = bought(shop)
    stripe.refund(shop.engine, shop.config, started.purchase.id, keep_credits=True, key="sorry")
    shop.deliver_all()
    assert (shop.rows(user), shop.api.refunds.list().data[0].amount) == ([("purchase", 97)], PRICE)
    with pytest.raises(e.RefundExceedsPurchase):
        stripe.refund(shop.engine, shop.config, started.purchase.id, amount=1, key="more")


@pytest.mark.parametrize("mark_first", [True, False])
def test_a_refund_in_the_dashboard_is_marked_by_its_metadata(shop: Shop, mark_first: bool):
    user, started = bought(shop)
    refund = shop.dev.refund(shop.intent(started), amount=500)
    if not mark_first:
        assert "taken_back" in shop.outcomes("refund.created")
        assert shop.balance(user) == 49
    shop.api.refunds.update(refund["id"], {"metadata": {"tallystick_credits": "0"}})
    assert ("given_back" in shop.outcomes("refund.updated")) is not mark_first
    assert shop.balance(user) == 97
    assert {str(one.outcome) for one in shop.deliver_all()} <= {"duplicate", "unchanged"}  # the older event too
    assert shop.balance(user) == 97
    shop.dev.settle_refund(refund["id"], "failed")
    shop.deliver_all()
    assert shop.balance(user) == 97


def test_a_mark_says_how_many_credits_a_refund_takes(shop: Shop):
    user, started = bought(shop)
    refund = shop.dev.refund(shop.intent(started), amount=500)
    shop.api.refunds.update(refund["id"], {"metadata": {"tallystick_credits": "90"}})
    shop.deliver_all()
    assert shop.balance(user) == 7
    shop.dev.refund(shop.intent(started), amount=250)  # half of the money that is left, half of its credits
    shop.deliver_all()
    assert shop.balance(user) == 4
    shop.dev.refund(shop.intent(started), amount=250)
    shop.deliver_all()
    assert shop.balance(user) == 0


@pytest.mark.parametrize("mark", ["-1", "1.5", "many", "", "9" * 16])
def test_a_mark_that_is_no_number_is_none(shop: Shop, mark: str):
    user, started = bought(shop)
    refund = shop.dev.refund(shop.intent(started), amount=500)
    shop.api.refunds.update(refund["id"], {"metadata": {"tallystick_credits": mark}})
    shop.deliver_all()
    assert shop.balance(user) == 49


def completed_by_the_host(shop: Shop, **paid: Any) -> tuple[e.Key, str]:
    """A user and the payment intent of a purchase that the host completed itself."""
    user = shop.world.user()
    with shop.engine.begin() as conn:
        row = shop.world.ledger.start_purchase(conn, user, credits=10, description="Sold by the host")
    session = shop.foreign()
    intent = str(shop.api.checkout.sessions.retrieve(session).payment_intent)
    with shop.engine.begin() as conn:
        shop.world.ledger.attach_session(
            conn, user, row.id, stripe_session_id=session, stripe_payment_intent_id=intent if paid else None
        )
        shop.world.ledger.complete_purchase(
            conn, user, purchase=row.id, **{k: v for k, v in paid.items() if v is not None}
        )
    shop.dev.drop(shop.events())
    return user, intent


@pytest.mark.parametrize("paid", [{}, {"amount_paid": None}, {"amount_paid": 45, "currency": "eur"}])
@pytest.mark.parametrize("path", ["webhook", "reconcile"])
def test_a_purchase_without_its_amount_is_refunded_by_the_share_of_the_charge(shop: Shop, paid, path):
    user, intent = completed_by_the_host(shop, **paid)
    for amount, left in ((20, 6), (30, 0)):
        shop.dev.refund(intent, amount=amount)  # of 50
        if path == "reconcile":
            shop.dev.drop(shop.events())
            stripe.reconcile(shop.engine, shop.config)
        else:
            assert "taken_back" in shop.outcomes("refund.created")
            shop.dev.drop(shop.events())
        assert shop.balance(user) == left
    assert shop.findings() == []


def test_a_refund_and_a_dispute_in_another_currency_take_their_share(shop: Shop):
    user, started = bought(shop)
    charge = shop.dev.account.objects["charge"][shop.api.charges.list().data[0].id]
    charge.update(currency="eur", amount=920)  # as the buyer paid it, for 10.00 usd
    shop.dev.refund(shop.intent(started), amount=460)
    shop.deliver_all()
    assert shop.balance(user) == 49
    shop.dev.dispute(shop.intent(started), amount=920)
    shop.deliver_all()
    assert (shop.balance(user), shop.findings()) == (0, [])


def test_a_share_that_nobody_tells_is_a_finding_that_comes_back(shop: Shop):
    user, started = bought(shop)
    charge = shop.dev.account.objects["charge"].pop(shop.api.charges.list().data[0].id)
    charge.update(currency="eur", amount=920)
    shop.dev.account.objects["charge"][charge["id"]] = charge
    refund = shop.dev.refund(shop.intent(started), amount=460)["id"]
    del shop.dev.account.objects["charge"][charge["id"]]
    assert shop.outcomes("refund.created") == ["unchanged"]
    shop.dev.drop(shop.events())
    for _ in range(2):
        [finding] = stripe.reconcile(shop.engine, shop.config).findings
        assert (finding.kind, finding.object_id, finding.found) == ("unmeasured", refund, "460 eur")
        stripe.dismiss(shop.engine, shop.config, refund)
    assert shop.balance(user) == 97
    with shop.engine.begin() as conn:
        [record] = audit(conn, shop.config).findings
    assert (record.check, record.fault, record.transaction) == ("money_and_credits", False, started.purchase.id)
    assert f"the refund {refund} of 460 eur is succeeded" in record.expected
    shop.dev.account.objects["charge"][charge["id"]] = charge
    stripe.reconcile(shop.engine, shop.config)
    assert shop.balance(user) == 49
    with shop.engine.begin() as conn:
        assert audit(conn, shop.config).findings == ()


def test_a_share_that_nobody_tells_is_settled_by_a_mark(shop: Shop):
    user, intent = completed_by_the_host(shop, amount_paid=None)
    refund = shop.dev.refund(intent, amount=20)["id"]
    charge = shop.dev.account.objects["charge"].popitem()
    assert shop.outcomes("refund.created") == ["unchanged"]
    assert shop.findings() == ["unmeasured"]
    shop.dev.account.objects["charge"].update([charge])
    shop.api.refunds.update(refund, {"metadata": {"tallystick_credits": "3"}})
    assert shop.outcomes("refund.updated") == ["taken_back"]
    assert shop.balance(user) == 7


STEPS = {"isk": 100, "ugx": 100, "kwd": 10, "bhd": 10, "jod": 10, "omr": 10, "tnd": 10}


@pytest.mark.parametrize("currency", STEPS)
def test_partial_refunds_are_amounts_that_stripe_takes(shop: Shop, currency):
    pack = Pack(name=PACK, credits=7, amount=100_000, currency=currency)
    shop.configure(packs=(pack,))
    shop.configure(packs=(replace(pack, stripe_price_id=stripe.setup(shop.config).packs[0].price),))
    user, started = bought(shop)
    purchase = started.purchase.id
    with pytest.raises(e.InvalidArgument, match=f"a multiple of {STEPS[currency]}"):
        stripe.refund(shop.engine, shop.config, purchase, amount=101, key="odd")
    for credits in (2, 1, 4):
        stripe.refund(shop.engine, shop.config, purchase, credits=credits, key=f"ticket {credits}")
    amounts = [one.amount for one in reversed(shop.api.refunds.list().data)]
    assert [amount % STEPS[currency] for amount in amounts] == [0, 0, 0]
    assert (sum(amounts), shop.balance(user)) == (100_000, 0)


def test_a_refund_says_before_what_it_will_do(shop: Shop):
    user, started = bought(shop)
    with shop.engine.begin() as conn:
        shop.world.ledger.consume(conn, user, credits=60, key="spent")
    look = functools.partial(stripe.preview_refund, shop.engine, shop.config, started.purchase.id)
    before = shop.written()
    all_of_it = look()
    assert (all_of_it.amount, all_of_it.credits, all_of_it.left, all_of_it.spent) == (PRICE, 97, 97, 60)
    assert (all_of_it.balance, all_of_it.balance_after) == (37, -60)
    some = look(credits=40)
    assert (some.amount, some.credits, some.balance_after) == (412, 40, -3)
    vat = look(amount=160, keep_credits=True)
    assert (vat.amount, vat.credits, vat.balance_after) == (160, 0, 37)
    assert (shop.written(), shop.api.refunds.list().data) == (before, [])
    stripe.refund(shop.engine, shop.config, started.purchase.id, credits=40, key="ticket 7")
    assert shop.balance(user) == some.balance_after
    again = look(credits=40, key="ticket 7")
    assert (again.amount, again.credits, again.balance_after) == (0, 0, -3)


# --- disputes ---


def test_an_inquiry_moves_nothing(shop: Shop):
    user, started = bought(shop)
    dispute = shop.dev.dispute(shop.intent(started), inquiry=True)
    shop.dev.move_dispute(dispute["id"], "warning_under_review")
    shop.dev.move_dispute(dispute["id"], "warning_closed")
    assert set(shop.outcomes()) == {"unchanged"}
    assert shop.rows(user) == [("purchase", 97)]


def test_dispute_opened_and_lost(shop: Shop):
    user, started = bought(shop)
    dispute = shop.dev.dispute(shop.intent(started))
    shop.dev.move_dispute(dispute["id"], "lost")
    assert shop.outcomes().count("taken_back") == 1
    assert shop.rows(user) == [("purchase", 97), ("refund", -97)]


def test_dispute_won_and_reinstated(shop: Shop):
    user, started = bought(shop)
    dispute = shop.dev.dispute(shop.intent(started), amount=300)
    shop.outcomes()
    assert shop.rows(user) == [("purchase", 97), ("refund", -29)]
    shop.dev.move_dispute(dispute["id"], "under_review")
    shop.dev.move_dispute(dispute["id"], "won")
    assert shop.outcomes().count("given_back") == 1
    assert shop.rows(user) == [("purchase", 97), ("refund", -29), ("grant", 29)]
    # and it can be refunded after all
    shop.dev.refund(shop.intent(started))
    shop.outcomes("refund.created")
    assert shop.balance(user) == 0


LOST, WON, LOST_AGAIN = ("refund", -97), ("grant", 97), ("refund", -97)


@pytest.mark.parametrize(
    ("decisions", "order", "rows"),
    [
        (["lost", "won"], [0, 1], [LOST, WON]),
        (["lost", "won"], [1, 0], []),
        (["won", "lost"], [0, 1], [LOST]),
        (["won", "lost"], [1, 0], [LOST]),
        (["lost", "won", "lost"], [0, 1, 2], [LOST, WON, LOST_AGAIN]),
        (["lost", "won", "lost"], [0, 2, 1], [LOST]),
        (["lost", "won", "lost", "won"], [0, 1, 2, 3], [LOST, WON, LOST_AGAIN, WON]),
    ],
)
def test_the_later_decision_of_a_dispute_counts(
    shop: Shop, decisions: list[str], order: list[int], rows: list[tuple[str, int]]
):
    user, started = bought(shop)
    dispute = shop.dev.dispute(shop.intent(started))
    shop.dev.drop(shop.events())
    for decision in decisions:
        shop.dev.advance(60)
        shop.dev.move_dispute(dispute["id"], decision)
    events = shop.events("charge.dispute.closed")
    assert {one.status for one in shop.deliver(*(events[number] for number in order))} == {200}
    assert shop.rows(user) == [("purchase", 97), *rows]
    shop.deliver_all()  # those of the same moments, late
    assert shop.rows(user) == [("purchase", 97), *rows]
    assert not stripe.reconcile(shop.engine, shop.config).changed
    with shop.engine.begin() as conn:
        assert audit(conn, shop.config).clean


def test_a_later_decision_that_no_webhook_told_is_found(shop: Shop):
    user, started = bought(shop)
    dispute = shop.dev.dispute(shop.intent(started))
    shop.dev.move_dispute(dispute["id"], "lost")
    shop.deliver_all()
    shop.dev.move_dispute(dispute["id"], "won")
    shop.dev.drop(shop.events())
    assert stripe.reconcile(shop.engine, shop.config).changed
    assert shop.rows(user) == [("purchase", 97), LOST, WON]


def test_decisions_that_are_read_within_a_second_all_count(shop: Shop):
    user, started = bought(shop)
    dispute = shop.dev.dispute(shop.intent(started))
    for status in ("lost", "won", "lost", "won", "lost"):
        shop.dev.move_dispute(dispute["id"], status)
        shop.dev.drop(shop.events())
        assert stripe.reconcile(shop.engine, shop.config).changed
    assert shop.rows(user) == [("purchase", 97), LOST, WON, LOST, WON, LOST]


def test_an_inquiry_that_became_a_dispute(shop: Shop):
    user, started = bought(shop)
    dispute = shop.dev.dispute(shop.intent(started), inquiry=True)
    shop.dev.move_dispute(dispute["id"], "needs_response")
    assert shop.outcomes().count("taken_back") == 1
    assert shop.balance(user) == 0


def test_partial_dispute_and_a_refund_are_capped(shop: Shop):
    user, started = bought(shop)
    shop.dev.refund(shop.intent(started), amount=600)
    shop.dev.dispute(shop.intent(started), amount=1000)  # banks take what they like
    shop.deliver_all()
    assert shop.rows(user) == [("purchase", 97), ("refund", -58), ("refund", -39)]


# --- what no webhook told ---


def test_events_lost_for_over_three_days(shop: Shop):
    user = shop.world.user()
    paid, expired, refunded = shop.checkout(user), shop.checkout(user), shop.checkout(user)
    shop.dev.pay(paid.session)
    shop.dev.pay(refunded.session)
    shop.dev.refund(shop.intent(refunded), amount=500)
    shop.dev.advance(4 * 86_400)
    shop.dev.drop(shop.events())
    assert shop.balance(user) == 0
    report = stripe.reconcile(shop.engine, shop.config)
    assert report.changed
    assert shop.balance(user) == 97 + 97 - 48
    assert shop.purchase(expired).status == "failed"


def test_reconciliation_races_a_webhook_and_runs_twice(shop: Shop):
    users = [shop.world.user() for _ in range(5)]
    for user in users:
        shop.dev.pay(shop.checkout(user).session)
    all_at_once(
        lambda: stripe.reconcile(shop.engine, shop.config),
        lambda: stripe.reconcile(shop.engine, shop.config),
        shop.deliver_all,
    )
    assert [shop.rows(user) for user in users] == [[("purchase", CREDITS)]] * 5
    again = stripe.reconcile(shop.engine, shop.config)
    assert (again.changed, again.changes) == (False, ())


# --- deliveries that failed ---


def failed(shop: Shop) -> list[tuple[str, str, int]]:
    return [(one.type, one.object_id, one.attempts) for one in stripe.failed_deliveries(shop.engine, shop.config)]


def test_a_delivery_that_stripe_cut_short_is_kept_and_resolved_by_the_next(shop: Shop):
    _, started = bought(shop)
    refund = shop.dev.refund(shop.intent(started))
    shop.dev.fault("GET", "/v1/refunds", 500, times=6)
    for attempts in (1, 2):
        assert shop.deliver(*shop.events("charge.refunded"))[0].status == 503
        [kept] = stripe.failed_deliveries(shop.engine, shop.config)
        assert (kept.attempts, kept.object_id, kept.object_type) == (attempts, refund["charge"], "charge")
        assert kept.reason.startswith("StripeUnavailable: Stripe answered 500.")
    assert shop.outcomes("charge.refunded") == ["taken_back"]
    assert failed(shop) == []


def test_a_delivery_that_the_ledger_refused_is_kept_and_runs_again(shop: Shop):
    user = shop.world.user()
    started = shop.checkout(user)
    with shop.engine.begin() as conn:
        shop.world.ledger.grant(conn, user, credits=INT32_MAX, key="all", description="All there is")
    shop.dev.pay(started.session)
    [event] = shop.events(COMPLETED)
    assert shop.outcomes(COMPLETED) == ["refused"]
    assert failed(shop) == [(COMPLETED, started.session, 1)]
    [kept] = stripe.failed_deliveries(shop.engine, shop.config)
    assert kept.reason.startswith("refused: ")
    assert f"has {INT32_MAX} credits" in kept.reason
    with shop.engine.begin() as conn:
        shop.world.ledger.consume(conn, user, key="too little")
    assert stripe.redeliver(shop.engine, shop.config) == [(event, "refused")]
    assert failed(shop) == [(COMPLETED, started.session, 2)]
    [kept] = stripe.failed_deliveries(shop.engine, shop.config)
    assert f"has {INT32_MAX - 1} credits" in kept.reason
    [found] = stripe.reconcile(shop.engine, shop.config).findings
    assert kept.reason == f"refused: {found.found}"
    with shop.engine.begin() as conn:
        shop.world.ledger.consume(conn, user, credits=CREDITS - 1, key="room")
    assert stripe.redeliver(shop.engine, shop.config, ["evt_another"]) == []
    assert stripe.redeliver(shop.engine, shop.config, [event]) == [(event, "granted")]
    assert (failed(shop), shop.balance(user)) == ([], INT32_MAX)
    assert shop.outcomes(COMPLETED) == ["duplicate"]


def test_a_redelivery_by_stripe_of_what_the_ledger_refused_is_no_duplicate(shop: Shop):
    user = shop.world.user()
    started = shop.checkout(user)
    with shop.engine.begin() as conn:
        shop.world.ledger.grant(conn, user, credits=INT32_MAX, key="all", description="All there is")
    shop.dev.pay(started.session)
    [event] = shop.events(COMPLETED)
    assert shop.outcomes(COMPLETED) == ["refused"]
    with shop.engine.begin() as conn:
        shop.world.ledger.consume(conn, user, credits=CREDITS, key="room")
    received = all_at_once(*[lambda: shop.deliver(event)[0].outcome] * 6)
    assert sorted(received) == ["duplicate"] * 5 + ["granted"]
    assert (failed(shop), shop.balance(user)) == ([], INT32_MAX)


def test_reconciliation_runs_failed_deliveries_again(shop: Shop):
    user, started = bought(shop)
    shop.dev.refund(shop.intent(started))
    shop.dev.fault("GET", "/v1/refunds", 500, times=3)
    assert shop.deliver(*shop.events("charge.refunded"))[0].status == 503
    shop.dev.drop(shop.events())
    stripe.reconcile(shop.engine, shop.config)
    assert (failed(shop), shop.balance(user)) == ([], 0)


def test_a_failed_delivery_whose_object_is_gone_stays_on_record(shop: Shop):
    _, started = bought(shop)
    charge = shop.dev.refund(shop.intent(started))["charge"]
    shop.dev.fault("GET", "/v1/refunds", 500, times=3)
    shop.deliver(*shop.events("charge.refunded"))
    del shop.dev.account.objects["charge"][charge]
    assert [outcome for _, outcome in stripe.redeliver(shop.engine, shop.config)] == ["refused"]
    [kept] = stripe.failed_deliveries(shop.engine, shop.config)
    assert (kept.reason, kept.attempts) == (f"Stripe no longer has {charge}", 2)


# --- what is no event for us ---


def _signed(shop: Shop, body: str, *, secret: str | None = None) -> tuple[bytes, str]:
    secret = secret or shop.config.stripe_webhook_secret
    return body.encode(), sdk.WebhookSignature.generate_signature_header(body, secret)


@pytest.mark.parametrize(
    ("case", "status"),
    [
        ("unsigned", 400),
        ("signed with another secret", 400),
        ("tampered", 400),
        ("signed ten minutes ago", 400),
        ("garbage for a signature", 400),
        ("not UTF-8", 400),
        ("not JSON", 400),
        ("a list", 400),
        ("a thin event", 400),
        ("nothing inside", 400),
        ("oversized", 413),
        ("no secret here", 503),
        ("no key here", 503),
    ],
)
def test_a_body_that_is_refused_writes_nothing(shop: Shop, case, status):  # noqa: C901, PLR0912 - a table of cases
    user = shop.world.user()
    shop.dev.pay(shop.checkout(user).session)
    [event] = shop.events(COMPLETED)
    text, signature = shop.dev.signed(event, shop.endpoint)
    body, config = text.encode(), shop.config
    match case:
        case "unsigned":
            signature = None
        case "signed with another secret":
            body, signature = _signed(shop, text, secret="whsec_other")
        case "tampered":
            body = body.replace(b"unpaid", b"paid").replace(f"{PRICE}".encode(), b"9")
        case "signed ten minutes ago":
            _, signature = shop.dev.signed(event, shop.endpoint, at=int(time.time()) - 600)
        case "garbage for a signature":
            signature = "t=1,v1=\u00e9,\x00"
        case "not UTF-8":
            body = b"\xff\xfe" + body
        case "not JSON":
            body, signature = _signed(shop, "{not json")
        case "a list":
            body, signature = _signed(shop, "[]")
        case "a thin event":
            body, signature = _signed(shop, json.dumps({"object": "v2.core.event", "id": "evt_1", "type": COMPLETED}))
        case "nothing inside":
            body, signature = _signed(shop, json.dumps(json.loads(text) | {"data": {}}))
        case "oversized":
            body, signature = _signed(shop, text + " " * stripe.BODY_MAX_BYTES)
        case "no secret here":
            config = config.model_copy(update={"stripe_webhook_secret": None})
        case "no key here":
            config = config.model_copy(update={"stripe_secret_key": None})
    before = shop.written()
    received = stripe.receive(shop.engine, config, body, signature)
    assert (received.status, received.outcome) == (status, "refused")
    assert shop.written() == before
    assert shop.balance(user) == 0


def test_a_replayed_delivery_changes_nothing(shop: Shop):
    user = shop.world.user()
    shop.dev.pay(shop.checkout(user).session)
    [event] = shop.events(COMPLETED)
    body, signature = shop.dev.signed(event, shop.endpoint)
    stripe.receive(shop.engine, shop.config, body.encode(), signature)
    before = shop.written()
    assert stripe.receive(shop.engine, shop.config, body.encode(), signature).outcome == "duplicate"
    assert shop.written() == before


def test_a_delivery_refused_for_its_age_says_so(shop: Shop):
    user = shop.world.user()
    shop.dev.pay(shop.checkout(user).session)
    [event] = shop.events(COMPLETED)
    body, signature = shop.dev.signed(event, shop.endpoint, at=int(time.time()) - 301)
    before = shop.written()
    answer = stripe.receive(shop.engine, shop.config, body.encode(), signature)
    assert (answer.status, answer.detail.partition(":")[0]) == (
        400,
        "signed more than 300 s ago by this server's clock",
    )
    assert shop.written() == before


def test_both_secrets_serve_while_one_is_replaced(shop: Shop):
    users = [shop.world.user() for _ in range(2)]
    shop.dev.pay(shop.checkout(users[0]).session)
    old = shop.config.stripe_webhook_secret
    new = shop.dev.roll_secret(shop.endpoint, keep_old_s=0)
    assert {one.status for one in shop.deliver_all()} == {400}
    shop.configure(stripe_webhook_secret=f"{old}, {new}")
    assert "granted" in [str(one.outcome) for one in shop.deliver_all()]


def test_wrong_livemode_is_ignored_and_logged(shop: Shop, caplog):
    user = shop.world.user()
    shop.dev.pay(shop.checkout(user).session)
    [event] = shop.events(COMPLETED)
    text, _ = shop.dev.signed(event, shop.endpoint)
    before = shop.written()
    received = stripe.receive(
        shop.engine, shop.config, *_signed(shop, json.dumps(json.loads(text) | {"livemode": True}))
    )
    assert (received.status, received.outcome) == (200, "ignored")
    assert "other mode" in caplog.text
    assert shop.written() == before


def test_a_connected_accounts_event_is_ignored_and_logged(shop: Shop, caplog):
    user = shop.world.user()
    shop.dev.pay(shop.checkout(user).session)
    [event] = shop.events(COMPLETED)
    text, _ = shop.dev.signed(event, shop.endpoint)
    before = shop.written()
    theirs = json.dumps(json.loads(text) | {"account": "acct_another"})
    received = stripe.receive(shop.engine, shop.config, *_signed(shop, theirs))
    assert (received.status, received.outcome) == (200, "ignored")
    assert "connected account acct_another" in caplog.text
    assert (shop.written(), shop.balance(user)) == (before, 0)


def test_another_api_version_is_asked_for_again(shop: Shop):
    user = shop.world.user()
    shop.dev.pay(shop.checkout(user).session)
    [event] = shop.events(COMPLETED)
    payload = json.loads(shop.dev.signed(event, shop.endpoint)[0]) | {"api_version": "2019-12-03"}
    session = payload["data"]["object"]
    payload["data"]["object"] = {"id": session["id"], "object": "checkout.session"}  # whatever its shape was then
    received = stripe.receive(shop.engine, shop.config, *_signed(shop, json.dumps(payload)))
    assert (received.status, received.outcome) == (200, "granted")


def test_an_unknown_event_type_is_answered_and_changes_nothing(shop: Shop):
    shop.dev.pay(shop.checkout(shop.world.user()).session)
    [event] = shop.events(COMPLETED)
    text, _ = shop.dev.signed(event, shop.endpoint)
    before = shop.written()
    received = stripe.receive(
        shop.engine, shop.config, *_signed(shop, json.dumps(json.loads(text) | {"type": "customer.created"}))
    )
    assert (received.status, received.outcome) == (200, "ignored")
    assert shop.written() == before


def test_a_database_that_is_away_makes_stripe_send_it_again(shop: Shop):
    user = shop.world.user()
    shop.dev.pay(shop.checkout(user).session)
    [event] = shop.events(COMPLETED)
    body, signature = shop.dev.signed(event, shop.endpoint)
    nowhere = sa.create_engine("postgresql+psycopg://nobody@127.0.0.1:1/nothing?connect_timeout=2")
    assert stripe.receive(nowhere, shop.config, body.encode(), signature).status == 503
    assert shop.outcomes(COMPLETED) == ["granted"]


def test_stripe_that_is_away_makes_stripe_send_it_again(either_shop: Shop):
    shop = either_shop
    user = shop.world.user()
    started = shop.checkout(user)
    shop.dev.pay(started.session)
    shop.dev.refund(shop.intent(started))
    shop.dev.fault("GET", SESSIONS, 500, times=3)
    before = shop.written()
    [received] = shop.deliver(*shop.events("refund.created"))
    assert received.status == 503
    assert shop.written() == before
    assert shop.outcomes("refund.created") == ["taken_back"]


def test_every_event_is_on_record_once(shop: Shop):
    bought(shop)
    with shop.engine.begin() as conn:
        [(id, event_type)] = conn.execute(sa.select(stripe_events.c.id, stripe_events.c.type)).all()
    assert (id[:4], event_type) == ("evt_", COMPLETED)


@pytest.mark.parametrize("shape", ["clerk", "quoted", "alone"])
def test_every_shape_of_host_sells(make_shop, shape):
    shop = make_shop(shape)
    user, started = bought(shop)
    shop.dev.refund(shop.intent(started), amount=500)
    shop.deliver_all()
    assert shop.rows(user) == [("purchase", 97), ("refund", -48)]
