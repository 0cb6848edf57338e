"""Every history of a purchase, its events in every order, once, twice, at once from several processes, and with
crashes between storing and committing: it always ends where Stripe's money is, and the audit finds nothing."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import random
import uuid
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import sqlalchemy as sa

from stripe_sales.shop import CREDITS, PRICE, Shop
from tallystick import Config, stripe
from tallystick.audit import audit
from tallystick.config import CheckoutOptions, Rounding
from tallystick.declared_tables import stripe_events
from tallystick.dev.stripe import DevStripe

pytestmark = pytest.mark.one_server  # it is about the order of events; test_machine runs on both

ORDERS = int(os.environ.get("TALLYSTICK_TEST_ORDERS", "12"))  # of each history; all of them where there are fewer

History = Callable[[Shop, stripe.Checkout], None]


def paid(shop: Shop, bought: stripe.Checkout) -> None:
    shop.dev.pay(bought.session)


def two_partial_refunds(shop: Shop, bought: stripe.Checkout) -> None:
    paid(shop, bought)
    for _ in range(2):
        shop.dev.refund(shop.intent(bought), amount=333)


def a_refund_that_fails_and_one_that_stays(shop: Shop, bought: stripe.Checkout) -> None:
    paid(shop, bought)
    first = shop.dev.refund(shop.intent(bought), amount=400)
    shop.dev.refund(shop.intent(bought), amount=100)
    shop.dev.settle_refund(first["id"], "failed")


def dispute_won(shop: Shop, bought: stripe.Checkout) -> None:
    paid(shop, bought)
    shop.dev.move_dispute(shop.dev.dispute(shop.intent(bought))["id"], "won")


def late_payment_then_dispute_lost(shop: Shop, bought: stripe.Checkout) -> None:
    shop.dev.pay(bought.session, card="async")
    shop.dev.settle(bought.session, succeeded=True)
    shop.dev.move_dispute(shop.dev.dispute(shop.intent(bought))["id"], "lost")


def late_payment_fails(shop: Shop, bought: stripe.Checkout) -> None:
    shop.dev.pay(bought.session, card="async")
    shop.dev.settle(bought.session, succeeded=False)


def expired(shop: Shop, bought: stripe.Checkout) -> None:
    shop.api.checkout.sessions.expire(bought.session)


def half_refunded_and_half_disputed(shop: Shop, bought: stripe.Checkout) -> None:
    paid(shop, bought)
    shop.dev.refund(shop.intent(bought), amount=500)
    shop.dev.move_dispute(shop.dev.dispute(shop.intent(bought), amount=500)["id"], "lost")


def refunded_and_disputed_and_won(shop: Shop, bought: stripe.Checkout) -> None:
    paid(shop, bought)
    shop.dev.refund(shop.intent(bought), amount=250)
    shop.dev.move_dispute(shop.dev.dispute(shop.intent(bought))["id"], "won")


def inquiry_closed(shop: Shop, bought: stripe.Checkout) -> None:
    paid(shop, bought)
    shop.dev.move_dispute(shop.dev.dispute(shop.intent(bought), inquiry=True)["id"], "warning_closed")


def customer_gone(shop: Shop, bought: stripe.Checkout) -> None:
    shop.api.customers.delete(str(shop.api.checkout.sessions.retrieve(bought.session).customer))
    paid(shop, bought)
    shop.dev.refund(shop.intent(bought), amount=333)


def spoofed_reference(shop: Shop, bought: stripe.Checkout) -> None:
    """Another sale at the same account names the purchase in its address, and is refunded; the purchase is not paid."""
    session = shop.foreign(client_reference_id=str(bought.purchase.id))
    shop.dev.refund(str(shop.api.checkout.sessions.retrieve(session).payment_intent), amount=25)


def foreign_sale_beside_it(shop: Shop, bought: stripe.Checkout) -> None:
    paid(shop, bought)
    session = shop.foreign(client_reference_id=str(bought.purchase.id), metadata={"order": "7"})
    shop.dev.dispute(str(shop.api.checkout.sessions.retrieve(session).payment_intent))


def sale_of_another_installation(shop: Shop, bought: stripe.Checkout) -> None:
    paid(shop, bought)
    mark = {"tallystick_purchase": str(uuid.uuid4()), "tallystick_realm": "staging"}
    session = shop.foreign(metadata=mark)
    shop.dev.refund(str(shop.api.checkout.sessions.retrieve(session).payment_intent))


def other_currency_at_the_bank(shop: Shop, bought: stripe.Checkout) -> None:
    """The charge is in another currency than the session, and so are its refunds."""
    paid(shop, bought)
    intent = shop.api.payment_intents.retrieve(shop.intent(bought))
    shop.dev.account.objects["charge"][str(intent.latest_charge)].update(currency="eur", amount=920)
    shop.dev.refund(shop.intent(bought), amount=200)
    shop.dev.move_dispute(shop.dev.dispute(shop.intent(bought), amount=460)["id"], "lost")


def rounded_up(shop: Shop, bought: stripe.Checkout) -> None:
    two_partial_refunds(shop, bought)


def rounded_to_the_nearest(shop: Shop, bought: stripe.Checkout) -> None:
    two_partial_refunds(shop, bought)


def money_alone_and_then_a_part(shop: Shop, bought: stripe.Checkout) -> None:
    paid(shop, bought)
    vat = shop.dev.refund(shop.intent(bought), amount=160)
    shop.api.refunds.update(vat["id"], {"metadata": {"tallystick_credits": "0"}})
    shop.dev.refund(shop.intent(bought), amount=420)  # half of the rest


def three_with_a_code_and_tax(shop: Shop, bought: stripe.Checkout) -> None:
    shop.dev.pay(bought.session, quantity=3, discount=500, tax=250)
    shop.dev.refund(shop.intent(bought), amount=275)  # a tenth of 2750


def left(gone: int) -> int:
    """The credits that are left: a part of a credit's price takes nothing."""
    return CREDITS - CREDITS * gone // PRICE


HISTORIES: dict[History, int] = {
    paid: CREDITS,
    two_partial_refunds: left(666),
    a_refund_that_fails_and_one_that_stays: left(100),
    dispute_won: CREDITS,
    late_payment_then_dispute_lost: 0,
    late_payment_fails: 0,
    expired: 0,
    half_refunded_and_half_disputed: 0,
    refunded_and_disputed_and_won: left(250),
    inquiry_closed: CREDITS,
    customer_gone: left(333),
    spoofed_reference: 0,
    foreign_sale_beside_it: CREDITS,
    sale_of_another_installation: CREDITS,
    other_currency_at_the_bank: CREDITS - CREDITS * 660 // 920,
    rounded_up: CREDITS - 65,  # 64.602
    rounded_to_the_nearest: CREDITS - 65,
    money_alone_and_then_a_part: CREDITS - CREDITS // 2,
    three_with_a_code_and_tax: 3 * CREDITS - 29,
}
ROUNDING: dict[History, Rounding] = {rounded_up: "up", rounded_to_the_nearest: "nearest"}
ALL_OPTIONS = CheckoutOptions(promotion_codes=True, automatic_tax=True, quantity_max=3)


AT_ONCE = [*list(HISTORIES)[:10], spoofed_reference, foreign_sale_beside_it]
"""Those whose events many deliver at once; the others differ from them in numbers alone."""

AGAIN = {"unchanged", "remembered", "failed", "unknown", "foreign"}
"""The outcomes of facts that are known already."""


def orders(events: Sequence[str], seed: int, most: int = ORDERS) -> list[tuple[str, ...]]:
    """All orders, or as many as wanted drawn from a named seed."""
    if len(events) <= 4:
        return list(itertools.permutations(events))[:most]
    chance = random.Random(seed)
    return [tuple(chance.sample(events, len(events))) for _ in range(most)]


def happened(shop: Shop, history: History) -> Any:
    """A new user with this history."""
    user = shop.world.user()
    shop.configure(refund_rounding=ROUNDING.get(history, "down"))
    history(shop, shop.checkout(user, options=ALL_OPTIONS if history is three_with_a_code_and_tax else None))
    return user


def made(shop: Shop, history: History) -> tuple[Any, list[str]]:
    """A user with this history, and the events of it, none delivered."""
    shop.dev.drop(shop.events())
    user = happened(shop, history)
    ours = stripe.webhooks.HANDLERS
    return user, [one["event"] for one in shop.dev.held() if one["type"] in ours]


def require_clean(shop: Shop) -> None:
    with shop.engine.begin() as conn:
        assert audit(conn, shop.config).findings == ()


@pytest.mark.parametrize("history", HISTORIES, ids=lambda history: history.__name__)
def test_every_order_ends_the_same(shop: Shop, history: History):
    missed, events = made(shop, history)  # of this one nothing is ever delivered
    for number, order in enumerate(orders(range(len(events)), seed=len(events))):
        user, events = made(shop, history)
        received = shop.deliver(*(events[position] for position in order))
        assert {one.status for one in received} == {200}
        assert shop.balance(user) == HISTORIES[history], order
        rows = shop.rows(user)
        again = random.Random(number).sample(events, len(events))
        assert {str(one.outcome) for one in shop.deliver(*again)} == {"duplicate"}
        assert shop.rows(user) == rows
        # a second id for each fact: nothing moves either
        with shop.engine.begin() as conn:
            conn.execute(sa.delete(stripe_events))
        assert {str(one.outcome) for one in shop.deliver(*again)} <= AGAIN
        assert shop.rows(user) == rows
    stripe.reconcile(shop.engine, shop.config)
    assert shop.balance(missed) == HISTORIES[history]
    assert not stripe.reconcile(shop.engine, shop.config).changed
    require_clean(shop)


SERVERS = multiprocessing.get_context("forkserver")
"""Starts processes of one that has imported the library, and nothing else: importing it takes most of a start."""
SERVERS.set_forkserver_preload(["pytest", "stripe", "psycopg", "tallystick.audit", "tallystick.dev.stripe"])


def deliver_many(url: str, config: Config, deliveries: list[tuple[bytes, str]], crash_after: int | None) -> None:
    """The work of one web server process; on demand it dies after its effects are stored and before the commit."""
    engine = sa.create_engine(url, pool_size=1)
    commits = itertools.count(1)

    def die(_conn: sa.Connection) -> None:
        if next(commits) == crash_after:
            os._exit(9)

    sa.event.listen(engine, "commit", die)
    for body, signature in deliveries:
        received = stripe.receive(engine, config, body, signature)
        assert received.status in (200, 503), received
    engine.dispose()


def test_processes_at_once_some_of_which_die(shop: Shop):
    """Each process gets every event, most in an order of its own, and half of the processes die on the way."""
    chance = random.Random(4)
    users, events = {}, []
    for history in AT_ONCE:
        user, some = made(shop, history)
        users[user] = history
        events += [(body.encode(), signature) for body, signature in (shop.dev.signed(e, shop.endpoint) for e in some)]
    crashes = [None, 3, 11, None, 29, 41]
    processes = [
        SERVERS.Process(
            target=deliver_many,
            args=(shop.world.url, shop.config, chance.sample(events, len(events)), crash),
            daemon=True,
        )
        for crash in crashes
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=300)
    assert [process.exitcode for process in processes] == [0 if crash is None else 9 for crash in crashes]
    assert {user: shop.balance(user) for user in users} == {user: HISTORIES[h] for user, h in users.items()}
    require_clean(shop)


def test_what_dies_before_its_commit_is_redone(shop: Shop):
    """One process alone, dying at each commit in turn: nothing is stored by halves, and the redelivery ends it."""
    for history in (two_partial_refunds, dispute_won):
        user, events = made(shop, history)
        signed = [shop.dev.signed(event, shop.endpoint) for event in events]
        deliveries = [(body.encode(), signature) for body, signature in signed]
        for crash_after in (1, 2, 4):
            given = shop.world.url, shop.config, deliveries, crash_after
            process = SERVERS.Process(target=deliver_many, args=given, daemon=True)
            process.start()
            process.join(timeout=120)
            assert process.exitcode == 9
            require_clean(shop)
        shop.deliver(*events)
        assert shop.balance(user) == HISTORIES[history]
    require_clean(shop)


def test_senders_of_the_double_race_each_other(make_shop, app):
    """The double's own threads deliver, retry and overtake each other over HTTP."""
    with DevStripe(retry_delays_s=(0.05, 0.1, 0.2), senders=4) as dev:
        shop = make_shop(dev=dev, endpoint_url=app.url)
        app.receive = lambda body, signature: stripe.receive(shop.engine, shop.config, body, signature)
        dev.release()
        users = {}
        for history in AT_ONCE:
            users[happened(shop, history)] = HISTORIES[history]
        assert dev.wait_delivered(120)
        assert {user: shop.balance(user) for user in users} == users
    require_clean(shop)
