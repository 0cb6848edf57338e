"""The double's states, driven through the official SDK. Every object passes Stripe's schemas (conftest)."""

from __future__ import annotations

from typing import Any

import pytest
import stripe

from tallystick.dev.stripe import DevStripe
from tallystick.errors import DevStripeError

pytestmark = pytest.mark.one_server  # it is about the double, which has no database


def event_types(client: stripe.StripeClient) -> list[str]:
    """Oldest first, without those of the catalogue."""
    kinds = ("customer.", "price.", "product.")
    events = client.v1.events.list({"limit": 100}).auto_paging_iter()
    return [event.type for event in events if not event.type.startswith(kinds)][::-1]


def test_a_paid_session(dev: DevStripe, client: stripe.StripeClient, session: stripe.checkout.Session) -> None:
    assert (session.status, session.payment_status, session.amount_total) == ("open", "unpaid", 5000)
    assert session.payment_intent is None
    assert session.livemode is False

    dev.pay(session.id)

    paid = client.v1.checkout.sessions.retrieve(session.id, {"expand": ["payment_intent.latest_charge"]})
    assert (paid.status, paid.payment_status, paid.url) == ("complete", "paid", None)
    intent = paid.payment_intent
    assert isinstance(intent, stripe.PaymentIntent)
    assert (intent.status, intent.metadata.to_dict()) == ("succeeded", {"purchase": "018f"})
    assert isinstance(intent.latest_charge, stripe.Charge)
    assert intent.latest_charge.amount == 5000
    assert event_types(client) == [
        "payment_intent.created",
        "charge.succeeded",
        "payment_intent.succeeded",
        "checkout.session.completed",
    ]


@pytest.mark.parametrize(
    ("succeeded", "payment_status", "event"),
    [
        (True, "paid", "checkout.session.async_payment_succeeded"),
        (False, "unpaid", "checkout.session.async_payment_failed"),
    ],
)
def test_a_bank_debit_settles_later(
    dev: DevStripe,
    client: stripe.StripeClient,
    session: stripe.checkout.Session,
    succeeded: bool,
    payment_status: str,
    event: str,
) -> None:
    completed = dev.pay(session.id, card="async")
    assert (completed["status"], completed["payment_status"]) == ("complete", "unpaid")

    settled = dev.settle(session.id, succeeded=succeeded)

    assert settled["payment_status"] == payment_status
    assert event_types(client)[-1] == event
    with pytest.raises(DevStripeError):
        dev.settle(session.id, succeeded=True)


def test_a_discount_of_everything_needs_no_payment(
    dev: DevStripe, client: stripe.StripeClient, session: stripe.checkout.Session
) -> None:
    paid = dev.pay(session.id, discount=5000)
    assert (paid["payment_status"], paid["amount_total"]) == ("no_payment_required", 0)
    assert paid["payment_intent"] is None
    assert event_types(client) == ["checkout.session.completed"]


def test_a_discount_lowers_what_is_paid(dev: DevStripe, session: stripe.checkout.Session) -> None:
    paid = dev.pay(session.id, discount=1000)
    assert (paid["amount_subtotal"], paid["amount_total"]) == (5000, 4000)


def test_a_declined_card_leaves_the_session_open(
    dev: DevStripe, client: stripe.StripeClient, session: stripe.checkout.Session
) -> None:
    with pytest.raises(DevStripeError, match="declined"):
        dev.pay(session.id, card="4000000000000002")
    assert client.v1.checkout.sessions.retrieve(session.id).status == "open"
    assert event_types(client) == []


@pytest.mark.parametrize("how", ["asked", "by the clock"])
def test_an_expired_session_cannot_be_paid(
    dev: DevStripe, client: stripe.StripeClient, session: stripe.checkout.Session, how: str
) -> None:
    if how == "asked":
        client.v1.checkout.sessions.expire(session.id)
    else:
        dev.advance(86_400)
    assert client.v1.checkout.sessions.retrieve(session.id).status == "expired"
    assert event_types(client) == ["checkout.session.expired"]
    with pytest.raises(DevStripeError, match="no longer open"):
        dev.pay(session.id)
    with pytest.raises(stripe.InvalidRequestError, match="can be expired"):
        client.v1.checkout.sessions.expire(session.id)


def test_a_customer_is_made_when_asked_for(dev: DevStripe, client: stripe.StripeClient, order: Any) -> None:
    order |= {"customer_creation": "always", "customer_email": "ada@example.com"}
    session = client.v1.checkout.sessions.create(order)
    customer = dev.pay(session.id)["customer"]
    assert client.v1.customers.retrieve(customer).email == "ada@example.com"


def test_an_unmodelled_parameter_is_refused_by_name(client: stripe.StripeClient, order: Any) -> None:
    with pytest.raises(stripe.InvalidRequestError, match="does not model the parameter 'discounts'"):
        client.v1.checkout.sessions.create(order | {"discounts": [{"coupon": "half"}]})


@pytest.mark.parametrize(
    ("change", "code", "param"),
    [
        ({"colour": "red"}, "parameter_unknown", "colour"),
        ({"line_items": [{"prize": "x"}]}, "parameter_unknown", "line_items[0][prize]"),
        (
            {"line_items": [{"price": "price_none", "quantity": 1}]},
            "resource_missing",
            "line_items[0][price]",
        ),
        ({"line_items": []}, "parameter_missing", "line_items"),
        ({"success_url": None}, "parameter_missing", "success_url"),
        ({"customer": "cus_none"}, "resource_missing", "customer"),
        ({"expires_at": "soon"}, "parameter_invalid_integer", "expires_at"),
        ({"expires_at": 1}, None, "expires_at"),
        ({"mode": "gift"}, None, "mode"),
        ({"client_reference_id": "x" * 201}, None, "client_reference_id"),
        ({"metadata": {"k": "x" * 501}}, None, "metadata[k]"),
    ],
)
def test_a_bad_session_is_refused(
    client: stripe.StripeClient, order: Any, change: dict[str, Any], code: str, param: str
) -> None:
    request = {name: value for name, value in (order | change).items() if value is not None}
    with pytest.raises(stripe.InvalidRequestError) as caught:
        client.v1.checkout.sessions.create(request)
    assert (caught.value.code, caught.value.param, caught.value.http_status) == (code, param, 400)
    assert client.v1.checkout.sessions.list().data == []


LONG = "http://127.0.0.1:1/" + "x" * 5000


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"success_url": LONG}, "success_url"),
        ({"cancel_url": LONG}, "cancel_url"),
        ({"client_reference_id": "x" * 201}, "client_reference_id"),
        ({"metadata": {"k" * 41: "v"}}, f"metadata[{'k' * 41}]"),
        ({"metadata": {"k": "v" * 501}}, "metadata[k]"),
        ({"metadata": {f"k{n}": "v" for n in range(51)}}, "metadata"),
        ({"payment_intent_data": {"description": "x" * 1001}}, "payment_intent_data[description]"),
    ],
)
def test_a_parameter_over_its_limit_is_refused(
    client: stripe.StripeClient, order: Any, change: Any, param: str
) -> None:
    with pytest.raises(stripe.InvalidRequestError) as caught:
        client.v1.checkout.sessions.create(order | change)
    assert caught.value.param == param


def test_the_longest_address_is_taken(client: stripe.StripeClient, order: Any) -> None:
    longest = LONG[:5000]
    assert client.v1.checkout.sessions.create(order | {"success_url": longest}).success_url == longest


@pytest.mark.parametrize(
    ("email", "code"),
    [
        ("ada", "email_invalid"),
        ("ada@localhost", "email_invalid"),
        ("a b@example.com", "email_invalid"),
        ("x" * 513, None),
    ],
)
def test_an_email_that_is_none_is_refused(client: stripe.StripeClient, email: str, code: str | None) -> None:
    known = client.v1.customers.create({"email": "ada@example.com"})
    for call in (client.v1.customers.create, lambda params: client.v1.customers.update(known.id, params)):
        with pytest.raises(stripe.InvalidRequestError) as caught:
            call({"email": email})
        assert (caught.value.param, caught.value.code) == ("email", code)
    assert client.v1.customers.retrieve(known.id).email == "ada@example.com"


def test_an_amount_of_nine_digits_is_refused(client: stripe.StripeClient, price: stripe.Price) -> None:
    with pytest.raises(stripe.InvalidRequestError) as caught:
        client.v1.prices.create({"product": str(price.product), "currency": "usd", "unit_amount": 100_000_000})
    assert caught.value.code == "amount_too_large"


def test_an_inactive_price_is_refused(client: stripe.StripeClient, price: stripe.Price, order: Any) -> None:
    client.v1.prices.update(price.id, {"active": False})
    with pytest.raises(stripe.InvalidRequestError, match="inactive"):
        client.v1.checkout.sessions.create(order)


# -- refunds and disputes


@pytest.fixture
def intent(dev: DevStripe, session: stripe.checkout.Session) -> str:
    """A payment of 5000."""
    return str(dev.pay(session.id)["payment_intent"])


def charge_of(client: stripe.StripeClient, intent: str) -> stripe.Charge:
    return client.v1.charges.list({"payment_intent": intent}).data[0]


def test_partial_refunds_add_up_and_stop_at_the_charge(client: stripe.StripeClient, intent: str) -> None:
    client.v1.refunds.create({"payment_intent": intent, "amount": 2000, "metadata": {"why": "asked"}})
    assert charge_of(client, intent).amount_refunded == 2000
    with pytest.raises(stripe.InvalidRequestError, match="greater than unrefunded"):
        client.v1.refunds.create({"payment_intent": intent, "amount": 3001})
    client.v1.refunds.create({"payment_intent": intent})
    charge = charge_of(client, intent)
    assert (charge.amount_refunded, charge.refunded) == (5000, True)
    with pytest.raises(stripe.InvalidRequestError) as caught:
        client.v1.refunds.create({"payment_intent": intent})
    assert caught.value.code == "charge_already_refunded"
    assert event_types(client)[-4:] == ["refund.created", "charge.refunded"] * 2


REFUND_STATUSES = ["pending", "succeeded", "failed", "canceled"]
REFUND_STEPS = {
    ("pending", "succeeded"), ("pending", "failed"), ("pending", "canceled"),
    ("succeeded", "failed"), ("succeeded", "canceled"),
}  # fmt: skip


@pytest.mark.parametrize("to", REFUND_STATUSES)
@pytest.mark.parametrize("start", REFUND_STATUSES)
def test_steps_of_a_refund(dev: DevStripe, client: stripe.StripeClient, intent: str, start: Any, to: Any) -> None:
    refund = dev.refund(intent, amount=1000, pending=True)
    if start != "pending":
        dev.settle_refund(refund["id"], start)
    if (start, to) not in REFUND_STEPS:
        with pytest.raises(DevStripeError, match=f"cannot become {to}"):
            dev.settle_refund(refund["id"], to)
        assert client.v1.refunds.retrieve(refund["id"]).status == start
        return
    dev.settle_refund(refund["id"], to)
    assert client.v1.refunds.retrieve(refund["id"]).status == to
    given_back = to in ("failed", "canceled")
    assert charge_of(client, intent).amount_refunded == (0 if given_back else 1000)
    updates = ["refund.updated", "charge.refund.updated"]
    expected = ["refund.failed", *updates] if to == "failed" else updates
    assert event_types(client)[-len(expected) :] == expected


DISPUTE_STATUSES = [
    "warning_needs_response", "warning_under_review", "warning_closed", "needs_response", "under_review",
    "won", "lost",
]  # fmt: skip
DISPUTE_PATHS: dict[str, list[str]] = {
    "warning_needs_response": [],
    "warning_under_review": ["warning_under_review"],
    "warning_closed": ["warning_closed"],
    "needs_response": [],
    "under_review": ["under_review"],
    "won": ["won"],
    "lost": ["lost"],
}
DISPUTE_STEPS = {
    ("warning_needs_response", "warning_under_review"), ("warning_needs_response", "warning_closed"),
    ("warning_needs_response", "needs_response"), ("warning_under_review", "warning_closed"),
    ("warning_under_review", "needs_response"), ("needs_response", "under_review"),
    ("needs_response", "won"), ("needs_response", "lost"), ("under_review", "won"), ("under_review", "lost"),
    ("won", "lost"), ("lost", "won"),
}  # fmt: skip
MONEY = {"needs_response": "funds_withdrawn", "won": "funds_reinstated"}


@pytest.mark.parametrize("to", DISPUTE_STATUSES)
@pytest.mark.parametrize("start", DISPUTE_STATUSES)
def test_steps_of_a_dispute(dev: DevStripe, client: stripe.StripeClient, intent: str, start: str, to: str) -> None:
    dispute = dev.dispute(intent, amount=2000, inquiry=start.startswith("warning_"))["id"]
    for status in DISPUTE_PATHS[start]:
        dev.move_dispute(dispute, status)
    before = event_types(client)
    if (start, to) not in DISPUTE_STEPS:
        with pytest.raises(DevStripeError, match=f"cannot become {to}"):
            dev.move_dispute(dispute, to)
        assert event_types(client) == before
        return
    dev.move_dispute(dispute, to)
    money = MONEY | ({"lost": "funds_withdrawn"} if start == "won" else {})
    expected = ["updated", *([money[to]] if to in money else [])]
    expected += ["closed"] if to in ("won", "lost", "warning_closed") else []
    assert event_types(client)[len(before) :] == [f"charge.dispute.{name}" for name in expected]


def test_money_of_disputes(dev: DevStripe, client: stripe.StripeClient, intent: str) -> None:
    dispute = dev.dispute(intent)
    with pytest.raises(stripe.InvalidRequestError, match="charged back"):
        client.v1.refunds.create({"payment_intent": intent})
    dev.move_dispute(dispute["id"], "won")
    moved = client.v1.disputes.retrieve(dispute["id"]).balance_transactions
    assert [one.amount for one in moved] == [-5000, 5000]


def test_test_cards_bring_disputes_and_slow_refunds(dev: DevStripe, client: stripe.StripeClient, order: Any) -> None:
    def pay_with(card: str) -> str:
        return str(dev.pay(client.v1.checkout.sessions.create(order).id, card=card)["payment_intent"])

    [disputed] = client.v1.disputes.list({"payment_intent": pay_with("4000000000000259")}).data
    assert disputed.status == "needs_response"
    [inquired] = client.v1.disputes.list({"payment_intent": pay_with("4000000000001976")}).data
    assert inquired.status == "warning_needs_response"
    refund = client.v1.refunds.create({"payment_intent": pay_with("4000000000007726")})
    assert refund.status == "pending"
