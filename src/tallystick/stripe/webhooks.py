"""Receiving events. A framework hands over the raw body and one header, and answers with a status."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
import stripe as sdk

from tallystick.config import Config
from tallystick.errors import DatabaseError, SchemaError, StripeError, StripeRefused
from tallystick.stripe.client import API_VERSION, Object, is_live
from tallystick.stripe.effects import Effect, Effects, in_transaction
from tallystick.stripe.store import FailedDelivery, Outcome, store_of

BODY_MAX_BYTES = 1 << 20  # Stripe's own events stay far below
AGE_MAX_S = 300

_log = logging.getLogger("tallystick.stripe")


@dataclass(frozen=True, slots=True)
class Received:
    """The answer to a delivery: ``status`` is HTTP's. 2xx stands for what is stored, or needs no storing."""

    status: int
    outcome: Outcome
    event: str | None = None
    detail: str = ""


def receive(engine: sa.Engine, config: Config, raw_body: bytes, signature: str | None) -> Received:
    """Take one delivery: verify it, and store the event's id and its effect in one database transaction.

    ``raw_body`` is the body byte for byte, ``signature`` the header ``Stripe-Signature``. Nothing is written for
    what is not signed with one of the configuration's secrets within the last five minutes. Statuses: 200 stored,
    seen before, or nothing of ours; 400 no event that Stripe signed; 413 too large; 503 not configured, or the
    database or Stripe did not answer, so that Stripe sends it again.
    """
    event = _verified(config, raw_body, signature)
    if isinstance(event, Received):
        _log.warning("a delivery was refused with %s: %s", event.status, event.detail)
        return event
    id, event_type = event["id"], event["type"]
    if event["livemode"] is not is_live(config):
        _log.warning("event %s (%s) is of the other mode (livemode=%s): ignored", id, event_type, event["livemode"])
        return Received(200, Outcome.IGNORED, id, "the other mode")
    if event.get("account"):
        _log.warning("event %s (%s) is of the connected account %s: ignored", id, event_type, event["account"])
        return Received(200, Outcome.IGNORED, id, "a connected account's")
    try:
        effect = prepared(Effects(engine, config), event)
        outcome = Outcome.IGNORED if effect is None else in_transaction(engine, effect)
    except (DatabaseError, SchemaError, StripeError) as error:
        _log.error("event %s (%s) was not stored: %s", id, event_type, error)
        _keep(engine, config, event, f"{type(error).__name__}: {error}")
        return Received(503, Outcome.REFUSED, id, "not stored; send it again")
    level = logging.WARNING if outcome in (Outcome.UNKNOWN, Outcome.REFUSED) else logging.INFO
    _log.log(level, "event %s (%s) about %s: %s", id, event_type, event["data"]["object"].get("id"), outcome)
    return Received(200, outcome, id)


def prepared(effects: Effects, event: Object) -> Effect | None:
    """The effect of an event, with its id stored beside it, so that it comes once; None for no event of ours."""
    handler = HANDLERS.get(event["type"])
    said: Object | None = event["data"]["object"]
    if handler is not None and said is not None and event["api_version"] != API_VERSION:
        said = effects.again(said)
    if handler is None or said is None:
        return None
    about, effect = said["id"], handler(effects, said)

    def once(conn: sa.Connection) -> Outcome:
        if not effects.store.is_due(conn, event["id"], event["type"], about):
            return Outcome.DUPLICATE
        outcome = Outcome.IGNORED if effect is None else effect(conn)
        if outcome is Outcome.REFUSED:
            effects.store.note_failure(conn, event, f"refused; the finding about {about} says why")
        return outcome

    return once


def failed_deliveries(engine: sa.Engine, config: Config) -> list[FailedDelivery]:
    """The deliveries that had no effect, oldest first: refused by the ledger, or cut short by Stripe or the database.

    One that a later delivery or ``redeliver`` settled is not among them. An unsigned delivery is logged and never
    stored: anybody could fill the table.
    """
    return in_transaction(engine, lambda conn: store_of(config).failures(conn))


def redeliver(engine: sa.Engine, config: Config, events: Collection[str] | None = None) -> list[tuple[str, Outcome]]:
    """Run failed deliveries again, of ``events`` alone if given, with their objects as they are at Stripe now.

    Returns each event's id and outcome; one that fails again stays on record with the new reason.

    Raises:
        StripeNotConfigured, StripeUnavailable, DatabaseError: the rest was not run.
    """
    effects = Effects(engine, config)
    failed = in_transaction(engine, lambda conn: effects.store.failures(conn, events))
    return [(one.event_id, _run_again(effects, one)) for one in failed]


def _run_again(effects: Effects, failed: FailedDelivery) -> Outcome:
    return in_transaction(effects.engine, prepared_again(effects, failed))


def prepared_again(effects: Effects, failed: FailedDelivery) -> Effect:
    """The effect of a failed delivery, with its object as it is at Stripe now."""
    named: Object = {"object": failed.object_type, "id": failed.object_id}
    event: Object = {"id": failed.event_id, "type": failed.type, "api_version": API_VERSION, "data": {"object": named}}
    reason = f"Stripe no longer has {failed.object_id}"
    try:
        now = effects.again(named)
        effect = prepared(effects, event | {"data": {"object": now}})
    except StripeRefused as refusal:
        effect, reason = None, refusal.message

    def failing(conn: sa.Connection) -> Outcome:
        effects.store.note_failure(conn, event, reason)
        return Outcome.REFUSED

    return failing if effect is None else effect


def _keep(engine: sa.Engine, config: Config, event: Object, reason: str) -> None:
    """Put a failed delivery on record, if the database takes it; Stripe sends it again either way."""
    if event["type"] not in HANDLERS:
        return
    try:
        in_transaction(engine, lambda conn: store_of(config).note_failure(conn, event, reason))
    except (DatabaseError, SchemaError) as error:
        _log.error("that event %s failed could not be stored: %s", event["id"], error)


def _session(effects: Effects, session: Object) -> Effect:
    return effects.session(session)


def _payment_failed(effects: Effects, session: Object) -> Effect:
    return effects.session(session, failed="the payment failed")


def _reversal(effects: Effects, said: Object) -> Effect | None:
    return effects.reversal(said)


def _invoice(effects: Effects, invoice: Object) -> Effect | None:
    return effects.invoice(invoice)


def _charge_refunded(effects: Effects, charge: Object) -> Effect | None:
    """A charge says only how much was refunded in all; its refunds say which."""
    reversals = [effect for refund in effects.refunds_of(charge) if (effect := effects.reversal(refund))]

    def all_of_them(conn: sa.Connection) -> Outcome:
        outcomes = [effect(conn) for effect in reversals]
        return next((one for one in outcomes if one is not Outcome.UNCHANGED), Outcome.UNCHANGED)

    return all_of_them if reversals else None


HANDLERS: dict[str, Callable[[Effects, Object], Effect | None]] = {
    "checkout.session.completed": _session,
    "checkout.session.async_payment_succeeded": _session,
    "checkout.session.async_payment_failed": _payment_failed,
    "checkout.session.expired": _session,
    "refund.created": _reversal,
    "refund.updated": _reversal,
    "refund.failed": _reversal,
    "charge.refund.updated": _reversal,
    "charge.refunded": _charge_refunded,
    "charge.dispute.created": _reversal,
    "charge.dispute.updated": _reversal,
    "charge.dispute.closed": _reversal,
    "charge.dispute.funds_withdrawn": _reversal,
    "charge.dispute.funds_reinstated": _reversal,
    "invoice.paid": _invoice,
}
"""Event type → what it does. ``stripe setup`` subscribes to exactly these."""


def _verified(config: Config, raw_body: bytes, signature: str | None) -> Object | Received:
    """The event that Stripe signed, or the answer to anything else."""
    secrets = [one.strip() for one in (config.stripe_webhook_secret or "").split(",") if one.strip()]
    if not secrets or not config.stripe_secret_key:
        return Received(503, Outcome.REFUSED, detail="STRIPE_WEBHOOK_SECRET or STRIPE_SECRET_KEY is not set")
    if len(raw_body) > BODY_MAX_BYTES:
        return Received(413, Outcome.REFUSED, detail=f"the body is larger than {BODY_MAX_BYTES} bytes")
    if not _is_signed(raw_body, signature, secrets):
        return Received(400, Outcome.REFUSED, detail="no valid signature")
    event = _event(raw_body)
    return Received(400, Outcome.REFUSED, detail="signed, but no event with an object") if event is None else event


def _is_signed(raw_body: bytes, signature: str | None, secrets: list[str]) -> bool:
    if signature is None or not signature.isascii():
        return False
    try:
        body = raw_body.decode()
    except UnicodeDecodeError:
        return False
    for secret in secrets:
        try:
            sdk.WebhookSignature.verify_header(body, signature, secret, AGE_MAX_S)
        except sdk.SignatureVerificationError:
            continue
        return True
    return False


def _event(raw_body: bytes) -> dict[str, Any] | None:
    """A snapshot event with what we read of it; None for anything else, such as a thin event."""
    try:
        said = json.loads(raw_body)
    except ValueError:
        return None
    if not isinstance(said, dict) or said.get("object") != "event":
        return None
    data = said.get("data")
    about = data.get("object") if isinstance(data, dict) else None
    whole = (
        isinstance(said.get("id"), str)
        and isinstance(said.get("type"), str)
        and isinstance(said.get("livemode"), bool)
        and "api_version" in said
        and isinstance(about, dict)
        and isinstance(about.get("object"), str)
    )
    return said if whole else None
