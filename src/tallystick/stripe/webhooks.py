"""Receiving events. A framework passes the raw body and one header, and answers with the status."""

from __future__ import annotations

import datetime as dt
import json
import logging
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
import stripe as sdk
from sqlalchemy.exc import DBAPIError

from tallystick.config import Config
from tallystick.database import server_message
from tallystick.errors import DatabaseError, SchemaError, StripeError, StripeRefused
from tallystick.stripe.client import API_VERSION, Object, is_live
from tallystick.stripe.effects import HOSTS_REFUSALS, Effect, Effects, in_transaction
from tallystick.stripe.store import FailedDelivery, Outcome, store_of

BODY_MAX_BYTES = 1 << 20  # Stripe's own events stay far below
AGE_MAX_S = 300

_log = logging.getLogger("tallystick.stripe")


@dataclass(frozen=True, slots=True)
class Received:
    """The answer to a delivery. ``status`` is HTTP's: 2xx if it is stored, or need not be."""

    status: int
    outcome: Outcome
    event: str | None = None
    detail: str = ""


def receive(engine: sa.Engine, config: Config, raw_body: bytes, signature: str | None) -> Received:
    """Take one delivery: verify it, and store the event's id and its effect in one database transaction.

    ``raw_body`` is the body byte for byte, ``signature`` the header ``Stripe-Signature``. Nothing is written unless
    one of the configured secrets signed the body within the last five minutes. Statuses: 200 stored, a duplicate, or
    not ours; 400 no event that Stripe signed; 413 too large; 503 not configured, or the database or Stripe did not
    answer, so that Stripe sends it again.
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
        effect = effect_of_event(Effects(engine, config), event)
        outcome = Outcome.IGNORED if effect is None else in_transaction(engine, effect)
    except (DatabaseError, SchemaError, StripeError, DBAPIError) as error:
        reason = f"{type(error).__name__}: {server_message(error)}"
        _log.error("event %s (%s) was not stored: %s", id, event_type, reason)
        _record_failure(engine, config, event, reason)
        return Received(503, Outcome.REFUSED, id, "not stored; send it again")
    level = logging.WARNING if outcome in (Outcome.UNKNOWN, Outcome.REFUSED) else logging.INFO
    _log.log(level, "event %s (%s) about %s: %s", id, event_type, event["data"]["object"].get("id"), outcome)
    return Received(200, outcome, id)


def effect_of_event(effects: Effects, event: Object) -> Effect | None:
    """The effect of an event, which also stores the event's id so that it happens once; None for no event of ours."""
    handler = HANDLERS.get(event["type"])
    stated: Object | None = event["data"]["object"]
    # without a time: a failed delivery, whose object was read from Stripe now
    stated_at = dt.datetime.fromtimestamp(event["created"], dt.UTC) if "created" in event else None
    if handler is not None and stated is not None and event["api_version"] != API_VERSION:
        stated, stated_at = effects.retrieve(stated), None
    if handler is None or stated is None:
        return None
    object_id, effect = stated["id"], handler(effects, stated, stated_at)

    def once(conn: sa.Connection) -> Outcome:
        if not effects.store.record_event(conn, event["id"], event["type"], object_id):
            return Outcome.DUPLICATE
        outcome = Outcome.IGNORED if effect is None else effect(conn)
        if outcome is Outcome.REFUSED:
            why = effects.store.refusal(conn, object_id)  # a charge has none: the findings are about its refunds
            reason = f"refused; a finding about a refund of {object_id} says why" if why is None else f"refused: {why}"
            effects.store.record_failed_delivery(conn, event, reason)
        return outcome

    return once


def failed_deliveries(engine: sa.Engine, config: Config) -> list[FailedDelivery]:
    """The deliveries without effect, oldest first: the ledger refused them, or Stripe or the database failed.

    Those that a later delivery or ``redeliver`` resolved are not among them. An unsigned delivery is logged and never
    stored: anybody could fill the table.
    """
    return in_transaction(engine, lambda conn: store_of(config).failures(conn))


def redeliver(engine: sa.Engine, config: Config, events: Collection[str] | None = None) -> list[tuple[str, Outcome]]:
    """Run failed deliveries again, only those of ``events`` if given, with their objects as they are at Stripe now.

    Returns each event's id and outcome; one that fails again stays failed, with the new reason.

    Raises:
        InvalidArgument: one of ``events`` is no id; nothing was run.
        StripeNotConfigured, StripeUnavailable, DatabaseError: the rest was not run.
    """
    effects = Effects(engine, config)
    failed = in_transaction(engine, lambda conn: effects.store.failures(conn, events))
    return [(one.event_id, _run_again(effects, one)) for one in failed]


def _run_again(effects: Effects, failed: FailedDelivery) -> Outcome:
    try:
        return in_transaction(effects.engine, effect_of_failed(effects, failed))
    except HOSTS_REFUSALS as error:
        reason = server_message(error)
        return in_transaction(effects.engine, _failing(effects, _event_of(failed), reason))


def effect_of_failed(effects: Effects, failed: FailedDelivery) -> Effect:
    """The effect of a failed delivery, with its object as it is at Stripe now."""
    event = _event_of(failed)
    reason = f"Stripe no longer has {failed.object_id}"
    try:
        found = effects.retrieve(event["data"]["object"])
        effect = effect_of_event(effects, event | {"data": {"object": found}})
    except StripeRefused as refusal:
        effect, reason = None, refusal.message
    return _failing(effects, event, reason) if effect is None else effect


def _event_of(failed: FailedDelivery) -> Object:
    """The event of a failed delivery, with an object that has no more than its type and id."""
    stub: Object = {"object": failed.object_type, "id": failed.object_id}
    return {"id": failed.event_id, "type": failed.type, "api_version": API_VERSION, "data": {"object": stub}}


def _failing(effects: Effects, event: Object, reason: str) -> Effect:
    def effect(conn: sa.Connection) -> Outcome:
        effects.store.record_failed_delivery(conn, event, reason)
        return Outcome.REFUSED

    return effect


def _record_failure(engine: sa.Engine, config: Config, event: Object, reason: str) -> None:
    """Record a failed delivery if possible; Stripe sends it again in any case."""
    if event["type"] not in HANDLERS:
        return
    try:
        in_transaction(engine, lambda conn: store_of(config).record_failed_delivery(conn, event, reason))
    except (DatabaseError, SchemaError) as error:
        _log.error("that event %s failed could not be stored: %s", event["id"], error)


def _session(effects: Effects, session: Object, _: dt.datetime | None) -> Effect:
    return effects.session(session)


def _payment_failed(effects: Effects, session: Object, _: dt.datetime | None) -> Effect:
    return effects.session(session, failed="the payment failed")


def _invoice(effects: Effects, invoice: Object, _: dt.datetime | None) -> Effect | None:
    return effects.invoice(invoice)


def _reversal(effects: Effects, reversal: Object, stated_at: dt.datetime | None) -> Effect | None:
    return effects.reversal(reversal, stated_at=stated_at)


def _charge_refunded(effects: Effects, charge: Object, _: dt.datetime | None) -> Effect | None:
    """The effect of all refunds of a charge, which itself has only their sum."""
    reversals = [effect for refund in effects.refunds_of(charge) if (effect := effects.reversal(refund))]

    def reverse_each(conn: sa.Connection) -> Outcome:
        outcomes = [effect(conn) for effect in reversals]
        return next((one for one in outcomes if one is not Outcome.UNCHANGED), Outcome.UNCHANGED)

    return reverse_each if reversals else None


HANDLERS: dict[str, Callable[[Effects, Object, dt.datetime | None], Effect | None]] = {
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
"""Event type → its handler. ``stripe setup`` subscribes to exactly these."""


def _verified(config: Config, raw_body: bytes, signature: str | None) -> Object | Received:
    """The event if Stripe signed it, else the answer."""
    secrets = [one.strip() for one in (config.stripe_webhook_secret or "").split(",") if one.strip()]
    if not secrets or not config.stripe_secret_key:
        return Received(503, Outcome.REFUSED, detail="STRIPE_WEBHOOK_SECRET or STRIPE_SECRET_KEY is not set")
    if len(raw_body) > BODY_MAX_BYTES:
        return Received(413, Outcome.REFUSED, detail=f"the body is larger than {BODY_MAX_BYTES} bytes")
    if not _is_signed(raw_body, signature, secrets, age_max_s=AGE_MAX_S):
        is_old = _is_signed(raw_body, signature, secrets, age_max_s=None)
        old = f"signed more than {AGE_MAX_S} s ago by this server's clock: set the clock, if the delivery is a new one"
        return Received(400, Outcome.REFUSED, detail=old if is_old else "no valid signature")
    event = _event(raw_body)
    return Received(400, Outcome.REFUSED, detail="signed, but no event with an object") if event is None else event


def _is_signed(raw_body: bytes, signature: str | None, secrets: list[str], *, age_max_s: int | None) -> bool:
    if signature is None or not signature.isascii():
        return False
    try:
        body = raw_body.decode()
    except UnicodeDecodeError:
        return False
    for secret in secrets:
        try:
            sdk.WebhookSignature.verify_header(body, signature, secret, age_max_s)
        except sdk.SignatureVerificationError:
            continue
        return True
    return False


def _event(raw_body: bytes) -> dict[str, Any] | None:
    """A snapshot event that has all fields we read; None for anything else, such as a thin event."""
    try:
        event = json.loads(raw_body)
    except ValueError:
        return None
    if not isinstance(event, dict) or event.get("object") != "event":
        return None
    data = event.get("data")
    stated = data.get("object") if isinstance(data, dict) else None
    valid = (
        isinstance(event.get("id"), str)
        and isinstance(event.get("type"), str)
        and isinstance(event.get("livemode"), bool)
        and "api_version" in event
        and isinstance(stated, dict)
        and isinstance(stated.get("object"), str)
    )
    return event if valid else None
