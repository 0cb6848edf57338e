from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import jsonschema_rs
import pytest
import stripe

from tallystick.dev.stripe import DevStripe
from tallystick.dev.stripe.parameters import specification

stripe.enable_telemetry = False  # it would write a file into the home directory


class Schemas:
    """Checks objects against Stripe's own schemas, and remembers what broke them."""

    def __init__(self) -> None:
        self.definitions: dict[str, Any] = specification()["$defs"]
        self.checked: list[str] = []
        self.violations: list[str] = []
        self._validators: dict[str, jsonschema_rs.Draft202012Validator] = {}

    def check(self, subject: dict[str, Any]) -> None:
        kind = subject["object"]
        if subject.get("deleted"):
            kind = f"deleted_{kind}"
        self.checked.append(kind)
        self.violations += [
            f"{kind} {'/'.join(map(str, error.instance_path))}: {error.message[:200]}"
            for error in self._validator(kind).iter_errors(subject)
        ]

    def _validator(self, kind: str) -> jsonschema_rs.Draft202012Validator:
        if kind not in self._validators:
            schema = {"$ref": f"#/$defs/{kind}", "$defs": self.definitions}
            self._validators[kind] = jsonschema_rs.Draft202012Validator(schema)
        return self._validators[kind]


@pytest.fixture(scope="session")
def all_schemas() -> Schemas:
    return Schemas()


@pytest.fixture
def schemas(all_schemas: Schemas) -> Iterator[Schemas]:
    """Every object and event of every test goes through Stripe's schemas."""
    all_schemas.checked.clear()
    yield all_schemas
    found = list(all_schemas.violations)
    all_schemas.violations.clear()
    assert found == []


@pytest.fixture
def dev(schemas: Schemas) -> Iterator[DevStripe]:
    with DevStripe(check=schemas.check, retry_delays_s=(0.05, 0.05), senders=1) as double:
        yield double


def client_of(dev: DevStripe, **options: Any) -> stripe.StripeClient:
    return stripe.StripeClient(dev.secret_key, base_addresses={"api": dev.url}, **options)


@pytest.fixture
def client(dev: DevStripe) -> stripe.StripeClient:
    return client_of(dev)


@pytest.fixture
def price(client: stripe.StripeClient) -> stripe.Price:
    product = client.v1.products.create({"name": "Single Flight"})
    return client.v1.prices.create({"product": product.id, "currency": "usd", "unit_amount": 2500})


@pytest.fixture
def order(price: stripe.Price) -> dict[str, Any]:
    """The parameters with which a Checkout Session is created."""
    return {
        "mode": "payment",
        "line_items": [{"price": price.id, "quantity": 2}],
        "success_url": "http://127.0.0.1:1/done?session={CHECKOUT_SESSION_ID}",
        "cancel_url": "http://127.0.0.1:1/cancelled",
        "client_reference_id": "018f-reference",
        "metadata": {"purchase": "018f"},
        "payment_intent_data": {"metadata": {"purchase": "018f"}},
    }


@pytest.fixture
def session(client: stripe.StripeClient, order: Any) -> stripe.checkout.Session:
    return client.v1.checkout.sessions.create(order)


class Receiver:
    """An app's webhook endpoint: keeps what it got, and answers what it is told to."""

    def __init__(self) -> None:
        self.bodies: list[bytes] = []
        self.signatures: list[str] = []
        self.answers: list[int] = []  # statuses of the next answers; 200 when there are none left
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                receiver.bodies.append(self.rfile.read(int(self.headers["Content-Length"])))
                receiver.signatures.append(self.headers["Stripe-Signature"])
                status = receiver.answers.pop(0) if receiver.answers else 200
                self.send_response(status)
                if status == 307:
                    self.send_header("Location", receiver.url)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *_args: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/hook"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05})
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def received(self, secret: str | None) -> list[stripe.Event]:
        """Everything that came, its signature checked by the SDK."""
        assert secret is not None
        return [
            stripe.Webhook.construct_event(body, signature, secret)
            for body, signature in zip(self.bodies, self.signatures, strict=True)
        ]


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    made = Receiver()
    yield made
    made.close()


@pytest.fixture
def endpoint(client: stripe.StripeClient, receiver: Receiver) -> stripe.WebhookEndpoint:
    enabled = [
        "charge.dispute.*", "charge.refunded", "checkout.session.async_payment_failed",
        "checkout.session.async_payment_succeeded", "checkout.session.completed", "checkout.session.expired",
    ]  # fmt: skip
    enabled[0:1] = ["charge.dispute.created", "charge.dispute.closed"]
    return client.v1.webhook_endpoints.create({"url": receiver.url, "enabled_events": enabled})
