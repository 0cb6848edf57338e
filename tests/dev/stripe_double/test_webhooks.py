"""Deliveries: signed, retried, held, reordered, duplicated, lost."""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from typing import Any

import pytest
import stripe

from tallystick.dev.stripe import DevStripe
from tallystick.errors import DevStripeError

from .conftest import Receiver

pytestmark = pytest.mark.one_server  # it is about the double, which has no database

COMPLETED = "checkout.session.completed"


def test_a_delivery_is_signed(
    dev: DevStripe, receiver: Receiver, endpoint: stripe.WebhookEndpoint, session: stripe.checkout.Session
) -> None:
    dev.pay(session.id)
    assert dev.wait_delivered()

    [event] = receiver.received(endpoint.secret)
    assert (event.type, event.data.object["id"]) == (COMPLETED, session.id)
    with pytest.raises(stripe.SignatureVerificationError):
        receiver.received("whsec_another")
    [attempt] = dev.deliveries()
    assert (attempt["event"], attempt["attempt"], attempt["status"]) == (event.id, 1, 200)


def test_only_wanted_types_are_delivered_and_only_to_enabled_endpoints(
    dev: DevStripe,
    client: stripe.StripeClient,
    receiver: Receiver,
    endpoint: stripe.WebhookEndpoint,
    order: Any,
) -> None:
    sessions = client.v1.checkout.sessions
    dev.pay(sessions.create(order).id)
    assert dev.wait_delivered()
    client.v1.webhook_endpoints.update(endpoint.id, {"disabled": True})
    dev.pay(sessions.create(order).id)
    client.v1.webhook_endpoints.update(endpoint.id, {"disabled": False, "enabled_events": ["*"]})
    client.v1.customers.create({"email": "ada@example.com"})
    assert dev.wait_delivered()
    client.v1.webhook_endpoints.delete(endpoint.id)
    dev.pay(sessions.create(order).id)
    assert dev.wait_delivered()
    assert [event.type for event in receiver.received(endpoint.secret)] == [COMPLETED, "customer.created"]


@pytest.mark.parametrize("status", [500, 404, 307])
def test_a_failed_delivery_is_retried(
    dev: DevStripe,
    client: stripe.StripeClient,
    receiver: Receiver,
    endpoint: stripe.WebhookEndpoint,
    session: stripe.checkout.Session,
    status: int,
) -> None:
    receiver.answers = [status]
    dev.pay(session.id)
    assert dev.wait_delivered()
    assert [attempt["status"] for attempt in dev.deliveries()] == [status, 200]
    first, second = receiver.received(endpoint.secret)
    assert first.id == second.id
    assert client.v1.events.retrieve(first.id).pending_webhooks == 0


def test_an_endpoint_that_stays_down_can_be_caught_up_with(
    dev: DevStripe,
    client: stripe.StripeClient,
    receiver: Receiver,
    endpoint: stripe.WebhookEndpoint,
    session: stripe.checkout.Session,
) -> None:
    receiver.answers = [503, 503, 503]
    dev.pay(session.id)
    assert dev.wait_delivered()
    assert [attempt["status"] for attempt in dev.deliveries()] == [503, 503, 503]

    undelivered = client.v1.events.list({"delivery_success": False})
    assert [event.type for event in undelivered.data] == [COMPLETED]

    assert dev.resend(undelivered.data[0].id) == 1
    assert dev.wait_delivered()
    assert dev.deliveries()[-1]["status"] == 200
    assert client.v1.events.list({"delivery_success": False}).data == []


def test_an_endpoint_that_is_gone_is_logged(
    dev: DevStripe,
    receiver: Receiver,
    endpoint: stripe.WebhookEndpoint,
    session: stripe.checkout.Session,
) -> None:
    receiver.close()
    dev.pay(session.id)
    assert dev.wait_delivered()
    assert {attempt["status"] for attempt in dev.deliveries()} == {None}
    assert "ConnectionRefusedError" in dev.deliveries()[0]["error"]


@pytest.fixture
def held(dev: DevStripe, endpoint: stripe.WebhookEndpoint, session: stripe.checkout.Session) -> dict[str, str]:
    """The ids of three held events, by type: a bank debit that arrives, and its refund."""
    dev.hold()
    intent = dev.pay(session.id, card="async")["payment_intent"]
    dev.settle(session.id, succeeded=True)
    dev.refund(intent)
    return {delivery["type"]: delivery["event"] for delivery in dev.held()}


LATER = "checkout.session.async_payment_succeeded"


def test_nothing_is_sent_while_held(dev: DevStripe, receiver: Receiver, held: dict[str, str]) -> None:
    assert list(held) == [COMPLETED, LATER, "charge.refunded"]
    assert dev.wait_delivered()
    assert receiver.bodies == []


def test_release_sends_all_in_order_and_ends_the_hold(
    dev: DevStripe, receiver: Receiver, endpoint: stripe.WebhookEndpoint, held: dict[str, str]
) -> None:
    attempts = dev.release()
    assert [attempt["type"] for attempt in attempts] == list(held)
    assert [event.type for event in receiver.received(endpoint.secret)] == list(held)
    dev.resend(held[LATER])
    assert dev.wait_delivered()
    assert len(receiver.bodies) == 4


def test_reordered_duplicated_and_dropped(
    dev: DevStripe, receiver: Receiver, endpoint: stripe.WebhookEndpoint, held: dict[str, str]
) -> None:
    dev.release([held["charge.refunded"], held[COMPLETED], held[COMPLETED]])
    assert dev.drop([held[LATER]]) == 1
    assert dev.release() == []
    sent = [event.id for event in receiver.received(endpoint.secret)]
    assert sent == [held["charge.refunded"], held[COMPLETED], held[COMPLETED]]


def test_a_retry_is_held_too(dev: DevStripe, receiver: Receiver, held: dict[str, str]) -> None:
    receiver.answers = [500]
    dev.release([held[COMPLETED]])
    assert [one["attempt"] for one in dev.held() if one["event"] == held[COMPLETED]] == [2]
    dev.release([held[COMPLETED]])
    assert [attempt["status"] for attempt in dev.deliveries()] == [500, 200]


def test_releasing_what_is_not_held_is_refused(dev: DevStripe, held: dict[str, str]) -> None:
    dev.drop([held[LATER]])
    with pytest.raises(DevStripeError, match=f"No delivery of {held[LATER]} is held"):
        dev.release([held[LATER]])


def test_both_secrets_sign_while_one_is_rolled(
    dev: DevStripe, receiver: Receiver, endpoint: stripe.WebhookEndpoint, session: stripe.checkout.Session
) -> None:
    new = dev.roll_secret(endpoint.id)
    dev.pay(session.id)
    assert dev.wait_delivered()
    assert receiver.received(endpoint.secret)[0].id == receiver.received(new)[0].id

    newest = dev.roll_secret(endpoint.id, keep_old_s=0)
    body, signature = dev.signed(dev.deliveries()[0]["event"], endpoint.id)
    assert stripe.Webhook.construct_event(body, signature, newest).type == COMPLETED
    for old in (endpoint.secret, new):
        with pytest.raises(stripe.SignatureVerificationError):
            stripe.Webhook.construct_event(body, signature, old)


def test_an_old_signature(
    dev: DevStripe, client: stripe.StripeClient, endpoint: stripe.WebhookEndpoint, price: stripe.Price
) -> None:
    event = client.v1.events.list().data[0].id
    body, signature = dev.signed(event, endpoint.id, at=int(time.time()) - 301)
    with pytest.raises(stripe.SignatureVerificationError, match="tolerance"):
        stripe.Webhook.construct_event(body, signature, endpoint.secret)


def test_an_endpoint_keeps_its_api_version(dev: DevStripe, client: stripe.StripeClient, receiver: Receiver) -> None:
    pinned = client.v1.webhook_endpoints.create(
        {"url": receiver.url, "enabled_events": ["customer.created"], "api_version": "2026-10-28.endive"}
    )
    client.v1.customers.create({})
    assert dev.wait_delivered()
    [event] = receiver.received(pinned.secret)
    assert event.api_version == "2026-10-28.endive"
    assert client.v1.events.retrieve(event.id).api_version == dev.account.api_version


# -- controls for other processes


def control(dev: DevStripe, name: str, **arguments: object) -> Any:
    request = urllib.request.Request(f"{dev.url}/_control/{name}", json.dumps(arguments).encode())
    with urllib.request.urlopen(request, timeout=30) as answer:
        return json.load(answer)


def test_controls_over_http(
    dev: DevStripe, receiver: Receiver, endpoint: stripe.WebhookEndpoint, session: stripe.checkout.Session
) -> None:
    control(dev, "hold")
    intent = control(dev, "pay", session=session.id)["payment_intent"]
    refund = control(dev, "refund", payment_intent=intent, amount=100)
    assert control(dev, "settle_refund", refund=refund["id"], status="failed")["status"] == "failed"
    held = control(dev, "held")
    assert [one["type"] for one in held] == [COMPLETED, "charge.refunded"]
    assert control(dev, "drop", events=[held[1]["event"]]) == 1
    assert [one["status"] for one in control(dev, "release")] == [200]
    assert control(dev, "deliveries") == dev.deliveries()
    assert abs(control(dev, "advance", seconds=3600) - time.time() - 3600) < 600


@pytest.mark.parametrize(
    ("name", "body", "status", "says"),
    [
        ("close", "{}", 404, "There is no control 'close'"),
        ("pay", "{}", 400, "missing a required argument: 'session'"),
        ("pay", '{"session": "cs_none"}', 404, "No such checkout.session"),
        ("pay", "session=1", 400, "not JSON"),
        ("pay", "[]", 400, "a JSON object"),
        ("fault", '{"method": "GET", "path": "/v1/events", "outcome": "storm"}', 400, "storm"),
        ("fault", '{"method": "GET", "path": "/v1/events", "outcome": 429, "when": "after"}', 400, "before"),
    ],
)
def test_a_wrong_control_is_refused(dev: DevStripe, name: str, body: str, status: int, says: str) -> None:
    request = urllib.request.Request(f"{dev.url}/_control/{name}", body.encode())
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(request, timeout=30)
    with caught.value as answer:
        assert (answer.code, says in json.load(answer)["error"]) == (status, True)
