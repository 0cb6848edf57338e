"""Parts of Stripe's API that all objects share: keys, idempotency, faults, pages, expand."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest
import stripe

from tallystick.dev.stripe import DevStripe

from .conftest import client_of

pytestmark = pytest.mark.one_server  # it is about the double, which has no database

SESSIONS = "/v1/checkout/sessions"


def sessions_made(dev: DevStripe) -> int:
    return len(dev.account.objects["checkout.session"])


def test_a_wrong_key_is_refused(dev: DevStripe) -> None:
    client = stripe.StripeClient("sk_test_wrong", base_addresses={"api": dev.url})
    with pytest.raises(stripe.AuthenticationError, match=r"Invalid API Key provided: sk_test\*"):
        client.v1.customers.list()


def test_what_is_not_modelled_is_404(client: stripe.StripeClient) -> None:
    with pytest.raises(stripe.InvalidRequestError, match="Unrecognized request URL") as caught:
        client.v1.subscriptions.list()
    assert caught.value.http_status == 404


@pytest.mark.parametrize("kind", ["customers", "prices", "refunds", "disputes", "events", "charges"])
def test_an_unknown_id_is_404(client: stripe.StripeClient, kind: str) -> None:
    with pytest.raises(stripe.InvalidRequestError) as caught:
        getattr(client.v1, kind).retrieve("nothing")
    assert (caught.value.http_status, caught.value.code) == (404, "resource_missing")


def test_the_api_version_is_answered(client: stripe.StripeClient) -> None:
    customer = client.v1.customers.create({}, {"stripe_version": "2026-08-26.dahlia"})
    assert customer.last_response.headers["Stripe-Version"] == "2026-08-26.dahlia"


# -- idempotency keys


def test_the_same_key_gets_the_same_answer(dev: DevStripe, client: stripe.StripeClient, order: Any) -> None:
    first = client.v1.checkout.sessions.create(order, {"idempotency_key": "purchase-1"})
    dev.pay(first.id)
    again = client.v1.checkout.sessions.create(order, {"idempotency_key": "purchase-1"})
    # The first answer, not the session as it is now.
    assert (again.id, again.status, again.url) == (first.id, "open", first.url)
    assert again.last_response.headers["Idempotent-Replayed"] == "true"
    assert again.last_response.headers["Original-Request"] == first.last_response.request_id


@pytest.mark.parametrize("other", ["parameters", "path"])
def test_the_same_key_for_something_else_is_refused(client: stripe.StripeClient, order: Any, other: str) -> None:
    client.v1.checkout.sessions.create(order, {"idempotency_key": "purchase-1"})
    with pytest.raises(stripe.IdempotencyError):
        if other == "path":
            client.v1.customers.create({}, {"idempotency_key": "purchase-1"})
        else:
            client.v1.checkout.sessions.create(
                order | {"client_reference_id": "other"}, {"idempotency_key": "purchase-1"}
            )


@pytest.mark.parametrize("how", ["after a day", "pruned"])
def test_a_forgotten_key_makes_a_second_session(
    dev: DevStripe, client: stripe.StripeClient, order: Any, how: str
) -> None:
    options: stripe.RequestOptions = {"idempotency_key": "purchase-1"}
    first = client.v1.checkout.sessions.create(order, options)
    if how == "pruned":
        assert dev.forget_idempotency_keys() > 0
    else:
        dev.advance(86_400)
    assert client.v1.checkout.sessions.create(order, options).id != first.id


def test_refused_parameters_do_not_use_up_the_key(client: stripe.StripeClient, order: Any) -> None:
    options: stripe.RequestOptions = {"idempotency_key": "purchase-1"}
    with pytest.raises(stripe.InvalidRequestError):
        client.v1.checkout.sessions.create({**order, "colour": "red"}, options)
    assert client.v1.checkout.sessions.create(order, options).status == "open"


def test_a_refusal_is_remembered(dev: DevStripe, client: stripe.StripeClient, session: stripe.checkout.Session) -> None:
    intent = str(dev.pay(session.id)["payment_intent"])
    refund = dev.refund(intent, pending=True)
    for _attempt in range(2):
        with pytest.raises(stripe.InvalidRequestError) as caught:
            client.v1.refunds.create({"payment_intent": intent}, {"idempotency_key": "refund-1"})
        assert caught.value.code == "charge_already_refunded"
        if refund["status"] == "pending":
            refund = dev.settle_refund(refund["id"], "failed")


def test_a_key_over_its_limit_is_refused(client: stripe.StripeClient) -> None:
    assert client.v1.customers.create({}, {"idempotency_key": "k" * 255}).id
    with pytest.raises(stripe.InvalidRequestError, match="255"):
        client.v1.customers.create({}, {"idempotency_key": "k" * 256})


# -- faults


@pytest.mark.parametrize(
    ("outcome", "error"),
    [
        (500, stripe.APIError),
        (503, stripe.APIError),
        (429, stripe.RateLimitError),
        ("cut", stripe.APIConnectionError),
    ],
)
def test_a_fault_before_the_effect(
    dev: DevStripe, client: stripe.StripeClient, order: Any, outcome: Any, error: type[Exception]
) -> None:
    dev.fault("POST", SESSIONS, outcome)
    options: stripe.RequestOptions = {"idempotency_key": "purchase-1"}
    with pytest.raises(error):
        client.v1.checkout.sessions.create(order, options)
    assert sessions_made(dev) == 0
    client.v1.checkout.sessions.create(order, options)
    assert sessions_made(dev) == 1


@pytest.mark.parametrize("outcome", [502, "cut"])
def test_a_lost_answer_comes_again_with_the_same_key(
    dev: DevStripe, client: stripe.StripeClient, order: Any, outcome: Any
) -> None:
    dev.fault("POST", SESSIONS, outcome, when="after")
    options: stripe.RequestOptions = {"idempotency_key": "purchase-1"}
    with pytest.raises(stripe.StripeError):
        client.v1.checkout.sessions.create(order, options)
    assert sessions_made(dev) == 1
    session = client.v1.checkout.sessions.create(order, options)
    assert [session.id] == list(dev.account.objects["checkout.session"])


def test_a_500_after_the_effect_is_remembered(dev: DevStripe, client: stripe.StripeClient, order: Any) -> None:
    dev.fault("POST", SESSIONS, 500, when="after")
    for _attempt in range(2):
        with pytest.raises(stripe.APIError):
            client.v1.checkout.sessions.create(order, {"idempotency_key": "purchase-1"})
    assert sessions_made(dev) == 1


def test_a_timeout(dev: DevStripe, order: Any) -> None:
    http = stripe.RequestsClient(timeout=1)
    client = client_of(dev, http_client=http)
    dev.fault("POST", SESSIONS, "timeout", when="after")
    with pytest.raises(stripe.APIConnectionError, match=r"[Tt]imed? ?out"):
        client.v1.checkout.sessions.create(order)
    assert sessions_made(dev) == 1
    http.close()


def test_the_sdk_retries_through_faults_with_one_session(dev: DevStripe, order: Any) -> None:
    client = client_of(dev, max_network_retries=2)
    dev.fault("POST", "/v1/checkout/*", "cut", when="after")
    dev.fault("POST", SESSIONS, 503)
    session = client.v1.checkout.sessions.create(order)
    assert [session.id] == list(dev.account.objects["checkout.session"])
    assert dev.api.requests.count(("POST", SESSIONS)) == 3


def test_a_fault_spoils_what_it_names(dev: DevStripe, client: stripe.StripeClient) -> None:
    dev.fault("POST", "/v1/customers", 500, times=2)
    client.v1.customers.list()
    for _time in range(2):
        with pytest.raises(stripe.APIError):
            client.v1.customers.create({})
    client.v1.customers.create({})


# -- lists


@pytest.fixture
def customers(dev: DevStripe, client: stripe.StripeClient) -> list[str]:
    """Seven ids, newest first."""
    return [client.v1.customers.create({"email": f"{i}@example.com"}).id for i in range(7)][::-1]


def test_pages(client: stripe.StripeClient, customers: list[str]) -> None:
    first = client.v1.customers.list({"limit": 3})
    assert ([one.id for one in first.data], first.has_more) == (customers[:3], True)
    last = client.v1.customers.list({"limit": 3, "starting_after": customers[4]})
    assert ([one.id for one in last.data], last.has_more) == (customers[5:], False)
    before = client.v1.customers.list({"limit": 3, "ending_before": customers[4]})
    assert ([one.id for one in before.data], before.has_more) == (customers[1:4], True)
    assert (first.url, first.object) == ("/v1/customers", "list")


def test_paging_goes_both_ways(client: stripe.StripeClient, customers: list[str]) -> None:
    down = client.v1.customers.list({"limit": 2})
    assert [one.id for one in down.auto_paging_iter()] == customers
    up = client.v1.customers.list({"limit": 2, "ending_before": customers[-1]})
    assert [one.id for one in up.auto_paging_iter()] == customers[-2::-1]


@pytest.mark.parametrize(
    ("params", "code"),
    [
        ({"limit": 0}, "parameter_invalid_integer"),
        ({"limit": 101}, "parameter_invalid_integer"),
        ({"starting_after": "cus_none"}, "resource_missing"),
        ({"colour": "red"}, "parameter_unknown"),
        ({"created": {"since": 1}}, "parameter_unknown"),
    ],
)
def test_a_wrong_list_is_refused(client: stripe.StripeClient, params: Any, code: str) -> None:
    with pytest.raises(stripe.InvalidRequestError) as caught:
        client.v1.customers.list(params)
    assert caught.value.code == code


def test_lists_by_time(dev: DevStripe, client: stripe.StripeClient) -> None:
    old = client.v1.customers.create({})
    dev.advance(1000)
    new = client.v1.customers.create({})

    def listed(**bounds: int) -> list[str]:
        return [one.id for one in client.v1.customers.list({"created": bounds}).data]

    assert listed(gt=old.created) == [new.id]
    assert listed(gte=old.created) == [new.id, old.id]
    assert listed(lt=new.created) == [old.id]
    assert listed(gt=old.created, lte=new.created - 1) == []


def test_lists_by_field(dev: DevStripe, client: stripe.StripeClient, order: Any) -> None:
    customer = client.v1.customers.create({"email": "ada@example.com"}).id
    sessions = client.v1.checkout.sessions
    open_, paid = sessions.create(order | {"customer": customer}), sessions.create(order)
    intent = str(dev.pay(paid.id)["payment_intent"])
    refund = client.v1.refunds.create({"payment_intent": intent, "amount": 100})
    for found, expected in [
        (sessions.list({"status": "open"}), open_.id),
        (sessions.list({"customer": customer}), open_.id),
        (sessions.list({"payment_intent": intent}), paid.id),
        (client.v1.refunds.list({"payment_intent": intent}), refund.id),
        (client.v1.customers.list({"email": "ada@example.com"}), customer),
        (client.v1.products.list({"active": True}), dev.account.get("price", _price(order))["product"]),
        (client.v1.balance_transactions.list({"source": refund.id}), refund.balance_transaction),
    ]:
        assert [one.id for one in found.data] == [expected]
    assert client.v1.products.list({"active": False}).data == []
    types = [event.type for event in client.v1.events.list({"types": ["refund.created", "charge.refunded"]}).data]
    assert types == ["charge.refunded", "refund.created"]
    assert len(client.v1.events.list({"type": "charge.*"}).data) == 2


def _price(order: Any) -> str:
    return str(order["line_items"][0]["price"])


def test_a_customer_that_was_deleted(client: stripe.StripeClient, order: Any) -> None:
    options: stripe.RequestOptions = {"idempotency_key": "customer 1"}
    gone = client.v1.customers.create({}, options).id
    client.v1.customers.delete(gone)
    assert client.v1.customers.retrieve(gone).to_dict() == {"id": gone, "object": "customer", "deleted": True}
    assert client.v1.customers.create({}, options).id == gone  # its key goes on answering it for a day
    for call in (client.v1.checkout.sessions.create, client.v1.checkout.sessions.list):
        with pytest.raises(stripe.InvalidRequestError) as caught:
            call({"customer": gone} | (order if call == client.v1.checkout.sessions.create else {}))
        assert (caught.value.code, caught.value.param) == ("resource_missing", "customer")


def test_lookup_keys(client: stripe.StripeClient, price: stripe.Price) -> None:
    product = str(price.product)
    wanted: Any = {"product": product, "currency": "eur", "unit_amount": 900, "lookup_key": "flight"}
    first = client.v1.prices.create(wanted)
    assert [one.id for one in client.v1.prices.list({"lookup_keys": ["flight"]}).data] == [first.id]
    with pytest.raises(stripe.InvalidRequestError, match="already uses that lookup key"):
        client.v1.prices.create(wanted)
    second = client.v1.prices.create(wanted | {"transfer_lookup_key": True})
    assert [one.id for one in client.v1.prices.list({"lookup_keys": ["flight"]}).data] == [second.id]


def test_events_are_kept_for_thirty_days(dev: DevStripe, client: stripe.StripeClient) -> None:
    client.v1.customers.create({})
    [event] = client.v1.events.list().data
    dev.advance(30 * 86_400)
    assert client.v1.events.list().data == []
    with pytest.raises(stripe.InvalidRequestError, match="No such event"):
        client.v1.events.retrieve(event.id)


# -- expand


def test_expand(dev: DevStripe, client: stripe.StripeClient, session: stripe.checkout.Session) -> None:
    dev.pay(session.id)
    plain = client.v1.checkout.sessions.retrieve(session.id).to_dict()
    assert isinstance(plain["payment_intent"], str)
    assert "line_items" not in plain

    full: Any = client.v1.checkout.sessions.retrieve(
        session.id, {"expand": ["payment_intent.latest_charge.balance_transaction", "line_items", "customer"]}
    ).to_dict()
    assert full["payment_intent"]["latest_charge"]["balance_transaction"]["amount"] == 5000
    assert full["line_items"]["data"][0]["quantity"] == 2
    assert full["customer"] is None
    [listed] = client.v1.checkout.sessions.list({"expand": ["data.payment_intent"]}).data
    assert isinstance(listed.payment_intent, stripe.PaymentIntent)
    # Expanding an answer leaves the account's own objects alone.
    assert client.v1.checkout.sessions.retrieve(session.id).to_dict() == plain


@pytest.mark.parametrize(
    "path", ["colour", "status", "payment_intent.colour", "payment_intent.latest_charge.customer.x.y"]
)
def test_what_cannot_be_expanded(
    dev: DevStripe, client: stripe.StripeClient, session: stripe.checkout.Session, path: str
) -> None:
    dev.pay(session.id)
    with pytest.raises(stripe.InvalidRequestError, match="expand"):
        client.v1.checkout.sessions.retrieve(session.id, {"expand": [path]})


# -- the server


def test_a_crowd_is_answered(dev: DevStripe, order: Any) -> None:
    failures: list[BaseException] = []

    def buy() -> None:
        try:
            client = client_of(dev)
            for _time in range(5):
                dev.pay(client.v1.checkout.sessions.create(order).id)
        except BaseException as error:
            failures.append(error)
            raise

    threads = [threading.Thread(target=buy) for _ in range(20)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    assert failures == []
    assert sessions_made(dev) == 100
    assert len(dev.account.objects["charge"]) == 100


def test_closing_ends_the_threads(order: Any) -> None:
    before = threading.active_count()
    with DevStripe() as dev:
        client = client_of(dev)
        client.v1.customers.create({})  # leaves its connection open
        dev.fault("POST", "/v1/customers", "timeout")
        late = threading.Thread(target=lambda: pytest.raises(stripe.APIConnectionError, client.v1.customers.create))  # noqa: RUF061 - in a thread
        late.start()
        while len(dev.api.requests) < 2:
            time.sleep(0.01)
    late.join()
    deadline = time.monotonic() + 30
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() <= before


def test_only_this_machine_is_served(dev: DevStripe) -> None:
    assert dev.url.startswith("http://127.0.0.1:")
    assert dev._server.socket.getsockname()[0] == "127.0.0.1"
