"""Selling credits through Stripe Checkout, correct whatever Stripe sends and in whatever order.

::

    from tallystick import stripe

    bought = stripe.checkout(engine, config, user, "Single Flight", success_url=…, cancel_url=…, key=form_id)
    redirect(bought.url)
    …
    stripe.receive(engine, config, request.body, request.headers.get("Stripe-Signature"))  # the webhook
    stripe.confirm(engine, config, user, request.query["session_id"])                      # the success page

Unlike the ledger's operations these take an engine: a request to Stripe must never wait inside a database transaction,
so they open and commit their own short ones around it. ``docs/stripe.md`` has the states and the table of cases.
"""

try:
    import stripe as _sdk  # noqa: F401 - before the modules that use it
except ImportError as error:
    raise ImportError("tallystick.stripe needs Stripe's SDK. Run: pip install 'tallystick[stripe]'") from error

from tallystick.stripe.checkout import Checkout, Confirmation, Sale, checkout, confirm, start_sale
from tallystick.stripe.client import API_VERSION
from tallystick.stripe.customers import CustomerCheck, check_customers
from tallystick.stripe.reconciliation import Reconciliation, ReconciliationProgress, dismiss, reconcile
from tallystick.stripe.refunds import RefundPreview, preview_refund, refund
from tallystick.stripe.setup import EndpointSetup, PackCheck, PackSetup, Setup, check, setup
from tallystick.stripe.store import FailedDelivery, FindingKind, Outcome, StripeFinding
from tallystick.stripe.top_ups import TopUp, TopUpOutcome, top_up
from tallystick.stripe.webhooks import BODY_MAX_BYTES, Received, failed_deliveries, receive, redeliver

__all__ = [
    "API_VERSION",
    "BODY_MAX_BYTES",
    "Checkout",
    "Confirmation",
    "CustomerCheck",
    "EndpointSetup",
    "FailedDelivery",
    "FindingKind",
    "Outcome",
    "PackCheck",
    "PackSetup",
    "Received",
    "Reconciliation",
    "ReconciliationProgress",
    "RefundPreview",
    "Sale",
    "Setup",
    "StripeFinding",
    "TopUp",
    "TopUpOutcome",
    "check",
    "check_customers",
    "checkout",
    "confirm",
    "dismiss",
    "failed_deliveries",
    "preview_refund",
    "receive",
    "reconcile",
    "redeliver",
    "refund",
    "setup",
    "start_sale",
    "top_up",
]
