"""Paid invoices of a subscription give the allowances of their prices: once each, whatever is delivered again."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest

from stripe_sales.shop import Shop
from stripe_sales.test_reconciliation import while_the_key_changes
from tallystick import stripe
from tallystick.allowances import AllowanceRun, Allowances
from tallystick.audit import audit
from tallystick.config import Allowance

pytestmark = pytest.mark.one_server  # it is about what Stripe sends; test_allowances runs on both

DAY_S = 86_400
Line = dict[str, Any]


class Subscribers:
    """Two prices with an allowance, one without, and customers to bill."""

    def __init__(self, shop: Shop) -> None:
        self.shop = shop
        names = ("basic", "pro", "something else")
        self.prices = {
            name: shop.api.prices.create({"currency": "usd", "unit_amount": 900, "product_data": {"name": name}}).id
            for name in names
        }
        shop.configure(
            allowances=(
                Allowance(plan_tier="basic", credits=10, stripe_price_id=self.prices["basic"]),
                Allowance(plan_tier="pro", credits=100, stripe_price_id=self.prices["pro"]),
            )
        )
        self.now = int(time.time())

    def user(self) -> tuple[Any, str]:
        user, customer = self.shop.world.user(), self.shop.api.customers.create({"email": "ada@example.com"}).id
        with self.shop.engine.begin() as conn:
            self.shop.world.accounts.set_stripe_customer(conn, user, customer)
        return user, customer

    def line(self, price: str, amount: int = 900, **more: Any) -> Line:
        period = {"start": self.now, "end": self.now + 30 * DAY_S}
        return {"price": self.prices[price], "amount": amount, "item": "si_1"} | period | more

    def paid(self, customer: str, *lines: Line) -> str:
        """Deliver the invoice twice, and give the outcome of the first delivery."""
        self.shop.dev.bill(customer, lines)
        event = self.shop.events("invoice.paid")[-1]
        first, again = self.shop.deliver(event, event)
        assert (first.status, again.status, str(again.outcome)) == (200, 200, "duplicate")
        return str(first.outcome)


@pytest.fixture
def subscribers(shop: Shop) -> Subscribers:
    return Subscribers(shop)


def up(subscribers: Subscribers, customer: str) -> None:
    """An upgrade within the period, billed at once."""
    subscribers.paid(
        customer,
        subscribers.line("basic", -450, proration=True),
        subscribers.line("pro", 4500, proration=True),
    )


def down(subscribers: Subscribers, customer: str) -> None:
    """And back; Stripe owes the customer, and the invoice of less than nothing counts as paid."""
    subscribers.paid(
        customer,
        subscribers.line("pro", -4500, proration=True),
        subscribers.line("basic", 450, proration=True),
    )


def up_and_down_and_up(subscribers: Subscribers, customer: str) -> None:
    for change in (up, down, up):
        change(subscribers, customer)


@pytest.mark.parametrize(
    ("later", "granted"),
    [
        (lambda _subscribers, _customer: None, [10]),
        (lambda them, customer: them.paid(customer, them.line("basic", quantity=3)), [10, 20]),
        (up, [10, 90]),
        (up_and_down_and_up, [10, 90]),
        (lambda them, customer: them.paid(customer, them.line("basic", item="si_2")), [10, 10]),
        (lambda them, customer: them.paid(customer, them.line("something else")), [10]),
        (lambda them, customer: them.paid(customer, them.line("pro", 0)), [10]),
        (lambda them, customer: them.paid(customer, them.line("pro", 9000, discount=9000)), [10, 90]),
        (lambda them, customer: them.paid(customer, *[them.line("something else")] * 10, them.line("pro")), [10, 90]),
    ],
    ids=[
        "alone",
        "more seats",
        "upgrade",
        "to and fro",
        "another item",
        "something else",
        "trial",
        "coupon of 100 %",
        "many lines",
    ],
)
def test_what_invoices_give(
    subscribers: Subscribers, later: Callable[[Subscribers, str], object], granted: list[int]
) -> None:
    user, customer = subscribers.user()
    assert subscribers.paid(customer, subscribers.line("basic")) == "granted"
    later(subscribers, customer)
    shop = subscribers.shop
    assert shop.rows(user) == [("grant", amount) for amount in granted]
    with shop.engine.begin() as conn:
        lots = shop.world.ledger.lots(conn, user)
        assert audit(conn, shop.config).findings == ()
    assert {lot.expires_at.timestamp() for lot in lots} == {subscribers.now + 30 * DAY_S}


def test_a_change_that_is_billed_with_the_next_period_gives_that_period(subscribers: Subscribers) -> None:
    """Stripe's default: the rest of the old period comes first in the renewal's invoice, and is over."""
    user, customer = subscribers.user()
    over = {"start": subscribers.now - 15 * DAY_S, "end": subscribers.now - 60, "proration": True}
    outcome = subscribers.paid(
        customer,
        subscribers.line("pro", 4500, **over),
        subscribers.line("basic", -450, **over),
        subscribers.line("pro", 9000),
    )
    assert (outcome, subscribers.shop.rows(user)) == ("granted", [("grant", 100)])
    assert Allowances(subscribers.shop.config).run(subscribers.shop.engine) == AllowanceRun(0, ())


def test_a_line_that_is_refused_does_not_cost_the_others(subscribers: Subscribers) -> None:
    user, customer = subscribers.user()
    over = subscribers.line("basic", start=subscribers.now - 9 * DAY_S, end=subscribers.now - DAY_S, item="si_2")
    subscribers.shop.dev.bill(customer, [over, subscribers.line("pro")])
    assert subscribers.shop.outcomes("invoice.paid") == ["refused"]
    assert (subscribers.shop.findings(), subscribers.shop.rows(user)) == (["refused"], [("grant", 100)])


def test_one_that_no_webhook_told_is_found_by_reconciliation(subscribers: Subscribers) -> None:
    user, customer = subscribers.user()
    subscribers.shop.dev.bill(customer, [subscribers.line("pro")])
    for _ in range(2):
        assert stripe.reconcile(subscribers.shop.engine, subscribers.shop.config).findings == ()
    assert subscribers.shop.rows(user) == [("grant", 100)]


def test_one_that_stripe_keeps_no_event_of_is_not_found(subscribers: Subscribers) -> None:
    """The other lists need no events; a paid invoice is found by its event alone, which Stripe keeps for 30 days."""
    user, customer = subscribers.user()
    subscribers.shop.dev.bill(customer, [subscribers.line("pro")])
    subscribers.shop.dev.account.objects["event"].clear()
    assert stripe.reconcile(subscribers.shop.engine, subscribers.shop.config).findings == ()
    assert subscribers.shop.rows(user) == []


def test_one_of_a_customer_that_no_user_has_waits_for_its_user(subscribers: Subscribers) -> None:
    shop, user = subscribers.shop, subscribers.shop.world.user()
    customer = shop.api.customers.create({"email": "ada@example.com"}).id
    shop.dev.bill(customer, [subscribers.line("pro")])
    assert shop.outcomes("invoice.paid") == ["refused"]
    assert shop.findings() == ["unknown_customer"]
    with shop.engine.begin() as conn:
        shop.world.accounts.set_stripe_customer(conn, user, customer)
    [(_, outcome)] = stripe.redeliver(shop.engine, shop.config)
    assert (str(outcome), shop.rows(user)) == ("granted", [("grant", 100)])
    assert stripe.failed_deliveries(shop.engine, shop.config) == []


def test_one_that_was_paid_when_its_period_was_over_is_a_finding(subscribers: Subscribers) -> None:
    user, customer = subscribers.user()
    over = subscribers.line("pro", start=subscribers.now - 9 * DAY_S, end=subscribers.now - DAY_S)
    subscribers.shop.dev.bill(customer, [over])
    assert subscribers.shop.outcomes("invoice.paid") == ["refused"]
    assert (subscribers.shop.findings(), subscribers.shop.rows(user)) == (["refused"], [])


def test_a_key_that_changes_meanwhile_is_in_nobodys_way(subscribers: Subscribers) -> None:
    user, customer = subscribers.user()
    shop = subscribers.shop
    shop.dev.bill(customer, [subscribers.line("basic")])
    [event] = shop.events("invoice.paid")
    user, [received] = while_the_key_changes(shop, user, lambda: shop.deliver(event))
    assert (str(received.outcome), shop.balance(user), shop.findings()) == ("granted", 10, [])


def test_an_erased_user_who_is_back_gets_no_period_twice(subscribers: Subscribers) -> None:
    user, customer = subscribers.user()
    subscribers.paid(customer, subscribers.line("basic"))
    shop, accounts = subscribers.shop, subscribers.shop.world.accounts
    with shop.engine.begin() as conn:
        accounts.erase(conn, user)
        accounts.restore_user(conn, user)
        accounts.set_stripe_customer(conn, user, customer)
    up(subscribers, customer)
    assert shop.rows(user) == [("grant", 10), ("grant", 90)]
