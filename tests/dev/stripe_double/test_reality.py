"""The double against three things of Stripe's: its OpenAPI document, its SDK and its command line."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import stripe

from tallystick.dev.stripe import DevStripe
from tallystick.dev.stripe.api import ROUTES
from tallystick.dev.stripe.parameters import specification

from .conftest import Schemas, client_of

pytestmark = pytest.mark.one_server  # it is about the double, which has no database

CLI = "@stripe/cli@1.52.0"
CACHE = Path(__file__).parents[3] / ".tallystick" / CLI.replace("/", "-")  # ignored by git


@pytest.fixture
def history(dev: DevStripe, client: stripe.StripeClient, order: Any) -> DevStripe:
    """An account in which everything has happened that the double knows."""
    customer = client.v1.customers.create({"email": "ada@example.com", "name": "Ada"})
    sessions = client.v1.checkout.sessions
    made = order | {"customer": customer.id}
    card, debit, bounced, free, expired, inquired = [sessions.create(made).id for _ in range(6)]
    intent = dev.pay(card)["payment_intent"]
    dev.pay(debit, card="async")
    slow = dev.settle(debit, succeeded=True)["payment_intent"]
    dev.pay(bounced, card="async")
    dev.settle(bounced, succeeded=False)
    dev.pay(free, discount=5000)
    sessions.expire(expired)
    client.v1.refunds.create({"payment_intent": intent, "amount": 500, "reason": "requested_by_customer"})
    refund = client.v1.refunds.create({"payment_intent": slow})
    dev.settle_refund(refund.id, "failed")
    dev.move_dispute(dev.dispute(intent)["id"], "won")
    dev.move_dispute(dev.dispute(slow, amount=100)["id"], "lost")
    inquiry = dev.dispute(str(dev.pay(inquired)["payment_intent"]), inquiry=True)["id"]
    dev.move_dispute(inquiry, "needs_response")
    dev.bill(customer.id, [{"price": order_price(client), "amount": 900, "start": 1_800_000_000, "end": 1_802_000_000}])
    client.v1.webhook_endpoints.create({"url": "http://127.0.0.1:1/hook", "enabled_events": ["invoice.paid"]})
    return dev


def order_price(client: stripe.StripeClient) -> str:
    return client.v1.prices.create({"currency": "usd", "unit_amount": 900, "product_data": {"name": "Pro"}}).id


# -- 1. the OpenAPI document


def test_every_kind_was_checked_against_its_schema(history: DevStripe, schemas: Schemas) -> None:
    for kind, objects in history.account.objects.items():
        assert objects, kind
        for one in objects.values():
            schemas.check(one)
    assert schemas.violations == []


@pytest.mark.parametrize(
    "change", [{"status": "sold"}, {"amount_total": "5000"}, {"colour": "red"}, {"payment_intent": 1}]
)
def test_the_schemas_find_a_wrong_session(
    schemas: Schemas, session: stripe.checkout.Session, change: dict[str, Any]
) -> None:
    schemas.check(session.to_dict() | change)
    assert len(schemas.violations) == 1
    schemas.violations.clear()


def test_every_route_is_stripes_and_every_modelled_parameter_too() -> None:
    for operation, route in ROUTES.items():
        if "/payment_pages/" in operation:  # undocumented; shown by the command line below
            continue
        known = specification()["requests"][operation]["properties"]
        assert route.params <= known.keys(), operation


# -- 2. the SDK's annotations

CLASSES: dict[str, Any] = {
    "balance_transaction": stripe.BalanceTransaction,
    "charge": stripe.Charge,
    "checkout.session": stripe.checkout.Session,
    "customer": stripe.Customer,
    "dispute": stripe.Dispute,
    "event": stripe.Event,
    "invoice": stripe.Invoice,
    "item": stripe.LineItem,
    "line_item": stripe.InvoiceLineItem,
    "payment_intent": stripe.PaymentIntent,
    "payment_method": stripe.PaymentMethod,
    "price": stripe.Price,
    "product": stripe.Product,
    "refund": stripe.Refund,
    "webhook_endpoint": stripe.WebhookEndpoint,
}


def parts(annotation: Any) -> Iterator[Any]:
    """Yield the members of unions, lists and the like, however deep."""
    origin = typing.get_origin(annotation)
    if origin is typing.Literal or origin is None:
        yield annotation
        return
    for argument in typing.get_args(annotation):
        yield from parts(argument)


def differences(value: Any, annotation: Any, path: str) -> Iterator[str]:
    options = list(parts(annotation))
    literals = [one for option in options for one in typing.get_args(option)]
    if isinstance(value, list):
        for item in value:
            yield from differences(item, annotation, f"{path}[]")
    elif value is None:
        if types.NoneType not in options:
            yield f"{path} is null"
    elif isinstance(value, dict):
        for option in options:
            if isinstance(option, type) and issubclass(option, stripe.StripeObject):
                yield from unknown_to(option, value, path)
    elif literals and value not in literals:
        yield f"{path} is {value!r}"


def unknown_to(cls: Any, subject: dict[str, Any], path: str) -> Iterator[str]:
    if not cls.__annotations__:  # free-form: metadata, an event's object
        return
    for name, value in subject.items():
        if name not in cls.__annotations__:
            yield f"{path}.{name}"
        elif (path, name) != ("event", "data"):
            yield from differences(value, cls.__annotations__[name], f"{path}.{name}")


def test_the_sdk_knows_every_key_and_value(history: DevStripe) -> None:
    assert CLASSES.keys() == history.account.objects.keys()
    found = {
        difference
        for kind, objects in history.account.objects.items()
        for one in objects.values()
        for difference in unknown_to(CLASSES[kind], one, kind)
    }
    assert found == set()


def test_the_annotations_find_a_wrong_session(session: stripe.checkout.Session) -> None:
    wrong = session.to_dict() | {"colour": "red", "status": "sold", "currency": None}
    wrong["total_details"]["amount_tip"] = 1
    found = set(unknown_to(stripe.checkout.Session, wrong, "session"))
    assert {"session.colour", "session.status is 'sold'", "session.total_details.amount_tip"} <= found


# -- 3. the official command line


@pytest.fixture(scope="module")
def stripe_cli() -> Path:
    npm = shutil.which("npm")
    if npm is None:
        pytest.skip("needs npm, for Stripe's own command line (install Node.js)")
    binary = CACHE / "node_modules" / ".bin" / "stripe"
    if not binary.exists():
        fresh = CACHE.with_name(f"npm-{os.getpid()}")
        fresh.mkdir(parents=True)
        subprocess.run(
            [npm, "install", "--no-audit", "--no-fund", "--prefix", str(fresh), CLI],
            check=True,
            timeout=300,
            capture_output=True,
        )
        try:
            fresh.rename(CACHE)
        except OSError:  # another test process was faster
            shutil.rmtree(fresh)
    return binary


@pytest.mark.parametrize(
    ("event", "expected"),
    [
        ("checkout.session.completed", {"checkout.session.completed", "payment_intent.succeeded"}),
        ("checkout.session.expired", {"checkout.session.expired"}),
        # Stripe settles the debit by itself some minutes later; the double waits to be told.
        ("checkout.session.async_payment_succeeded", {"checkout.session.completed"}),
        ("charge.refunded", {"charge.refunded", "refund.created"}),
        ("charge.refund.updated", {"charge.refunded", "refund.created"}),
        ("charge.dispute.created", {"charge.dispute.created"}),
        ("charge.dispute.closed", {"charge.dispute.created", "charge.dispute.closed"}),
    ],
)
def test_stripe_trigger(stripe_cli: Path, schemas: Schemas, tmp_path: Path, event: str, expected: set[str]) -> None:
    quiet = {"STRIPE_CLI_TELEMETRY_OPTOUT": "1"}
    key = "sk_test_51" + "a" * 32  # the command line looks at the shape of a key
    with DevStripe(secret_key=key, check=schemas.check) as dev:
        run = subprocess.run(
            [stripe_cli, "trigger", event, "--api-key", key, "--api-base", dev.url],
            check=False,
            capture_output=True,
            text=True,
            timeout=120,
            env=os.environ | {"XDG_CONFIG_HOME": str(tmp_path), "HOME": str(tmp_path), **quiet},
        )
        assert run.returncode == 0, run.stdout + run.stderr
        seen = {one.type for one in client_of(dev).v1.events.list({"limit": 100}).data}
        assert expected <= seen


def test_the_listen_recipe_uses_options_that_the_command_line_has(stripe_cli: Path, tmp_path: Path) -> None:
    page = (Path(__file__).parents[3] / "docs" / "stripe.md").read_text(encoding="utf-8")
    recipe = "".join(re.findall(r"^```sh\n(.*?)^```", page, re.MULTILINE | re.DOTALL))
    of_stripe = "".join(re.findall(r"^.*stripe listen(?:.*\\\n)*.*$", recipe, re.MULTILINE))
    options = set(re.findall(r"--[a-z-]+", of_stripe))
    run = subprocess.run(
        [stripe_cli, "listen", "--help"],
        check=True,
        capture_output=True,
        text=True,
        timeout=60,
        env=os.environ | {"XDG_CONFIG_HOME": str(tmp_path), "HOME": str(tmp_path), "STRIPE_CLI_TELEMETRY_OPTOUT": "1"},
    )
    assert options == {"--print-secret", "--events-from", "--forward-to", "--events"}
    assert options <= set(re.findall(r"--[a-z-]+", run.stdout))
