"""Stripe's objects written into the ledger, inside the caller's database transaction; no requests to Stripe.

Objects come as Stripe's JSON, from an event, from the success page or from reconciliation, in any order and any
number of times. The end state is the same, because of three rules:

- a purchase moves forward only (paid beats failed, and nothing beats paid);
- a refund or dispute is stored by its id, with a status that moves forward only; of two decisions the later counts;
- both determine the credits that a purchase keeps, and the difference to the ledger is appended.

Locks are taken in one order: the payment intent, then the user. While both are held, rows that were read stay the same.
"""

from __future__ import annotations

import datetime as dt
import hashlib
import re
from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum
from fractions import Fraction
from functools import lru_cache
from typing import Any, Literal
from uuid import UUID

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql as pg

from tallystick.config import Config, Rounding
from tallystick.database import DbConnection, run
from tallystick.declared_tables import (
    Schema,
    migration_log,
    stripe_checkouts,
    stripe_failed_deliveries,
    stripe_findings,
    stripe_reversals,
)
from tallystick.errors import IdempotencyKeyReused, InvalidArgument, SessionConflict
from tallystick.ledger import CreditTransaction, Ledger
from tallystick.schema import CreditTransactionStatus, CreditTransactionType
from tallystick.stripe.client import Object
from tallystick.stripe.shares import ReversedShare, credits_kept

PENDING, COMPLETED, FAILED = CreditTransactionStatus

PAID = ("paid", "no_payment_required")

# A status replaces those with a lower number; of two with the same number the one that Stripe stated later counts.
REFUND_RANK = {"pending": 0, "requires_action": 0, "succeeded": 1, "failed": 2, "canceled": 2}
DISPUTE_RANK = {
    "warning_needs_response": 0,
    "warning_under_review": 1,
    "needs_response": 2,
    "under_review": 3,
    "warning_closed": 4,
    "prevented": 4,
    "won": 4,
    "lost": 4,
}
# Statuses in which the shop has the money: the customer never got it, or the shop has it back, or (an inquiry) it never
# moved.
MONEY_WITH_SHOP = {
    "failed",
    "canceled",
    "warning_needs_response",
    "warning_under_review",
    "warning_closed",
    "prevented",
    "won",
}

ReversalKind = Literal["refund", "dispute"]

METADATA_KEY = "tallystick_purchase"
"""The metadata of our sessions and payments that names the purchase."""

CREDITS_KEY = "tallystick_credits"
"""The metadata of a refund or dispute with the number of credits that it takes; 0 keeps all of them."""

REALM_KEY = "tallystick_realm"
"""The metadata that names the installation, so that several can share one Stripe account."""

REALM_DIGITS = 16

ID_MAX = 255  # characters of Stripe's ids, and of the ledger's keys


class Outcome(StrEnum):
    """The result for one of Stripe's objects."""

    GRANTED = "granted"
    PENDING = "pending"
    FAILED = "failed"
    TAKEN_BACK = "taken_back"
    GIVEN_BACK = "given_back"
    REMEMBERED = "remembered"  # a refund or dispute whose purchase is not completed here
    UNCHANGED = "unchanged"
    UNKNOWN = "unknown"  # the purchase that it names is missing or not proven; a finding if it is paid
    FOREIGN = "foreign"  # a sale of something else at the same Stripe account
    REFUSED = "refused"  # the ledger refused it; there is a finding
    DUPLICATE = "duplicate"
    IGNORED = "ignored"


class FindingKind(StrEnum):
    """A difference that a person should look at."""

    UNKNOWN_SESSION = "unknown_session"
    UNKNOWN_CUSTOMER = "unknown_customer"  # a paid invoice for an allowance, of a customer without a user
    UNPROVEN_SESSION = "unproven_session"  # it names a purchase without the merchant's proof
    SECOND_SESSION = "second_session"
    AMOUNT_DIFFERS = "amount_differs"
    CURRENCY_DIFFERS = "currency_differs"
    CUSTOMER_DIFFERS = "customer_differs"
    DELETED_USER = "deleted_user"
    UNMEASURED = "unmeasured"  # a refund whose share of the payment is unknown; it reopens until it is known
    SESSION_MISSING = "session_missing"  # a stored session that Stripe does not have: another account or mode
    REFUSED = "refused"
    TOP_UP_CEILING = "top_up_ceiling"  # a user's automatic top-ups have reached the monthly maximum


@dataclass(frozen=True, slots=True)
class StripeFinding:
    """A finding for a person; ``object_id`` is Stripe's."""

    kind: FindingKind
    object_id: str
    purchase: UUID | None
    expected: str | None
    found: str | None

    def __str__(self) -> str:
        about = f" (purchase {self.purchase})" if self.purchase else ""
        compared = f": expected {self.expected}, found {self.found}" if self.expected else f": {self.found}"
        return f"{self.kind} {self.object_id}{about}{compared if self.found else ''}"


@dataclass(frozen=True, slots=True)
class FailedDelivery:
    """A signed delivery without effect, and the reason. ``object_id`` is Stripe's."""

    event_id: str
    type: str
    object_type: str
    object_id: str
    reason: str
    attempts: int
    first_at: dt.datetime
    last_at: dt.datetime


@dataclass(frozen=True, slots=True)
class Reversal:
    """The fields of a refund or dispute that the ledger needs. ``amount`` is in minor units.

    ``credits`` is the number in its metadata: the credits that it takes, whatever its amount. ``charge_amount`` is the
    whole payment in the reversal's own currency, if the purchase's amount is not in it. ``stated_at`` is the time of
    the event that states all this; None for an object that was just read from Stripe.
    """

    id: str
    kind: ReversalKind
    payment_intent: str
    amount: int
    currency: str
    status: str
    charge: str | None = None
    credits: int | None = None
    charge_amount: int | None = None
    stated_at: dt.datetime | None = None

    @classmethod
    def of(cls, stated: Object, *, stated_at: dt.datetime | None = None) -> Reversal | None:
        """Read Stripe's refund or dispute; None for one without a payment intent, which is never ours."""
        intent = id_of(stated.get("payment_intent"))
        if intent is None:
            return None
        kind: ReversalKind = "refund" if stated["object"] == "refund" else "dispute"
        mark = (stated.get("metadata") or {}).get(CREDITS_KEY) or ""
        return cls(
            id=stated["id"],
            kind=kind,
            payment_intent=intent,
            amount=stated["amount"],
            currency=stated["currency"],
            status=stated["status"] or "pending",
            charge=id_of(stated.get("charge")),
            credits=int(mark) if re.fullmatch("[0-9]{1,15}", mark) else None,
            stated_at=stated_at,
        )

    @property
    def is_gone(self) -> bool:
        """True if the shop no longer has the money."""
        return self.status not in MONEY_WITH_SHOP

    @property
    def status_rank(self) -> int:
        """The rank of the status; an unknown status has the lowest."""
        return (REFUND_RANK if self.kind == "refund" else DISPUTE_RANK).get(self.status, 0)


@dataclass(frozen=True, slots=True)
class Terms:
    """The terms of a sale: its price before discounts and tax, and the request that made its session."""

    amount: int
    currency: str
    request: Object

    @property
    def _item(self) -> Object:
        item: Object = self.request.get("line_items", [{}])[0]
        return item

    @property
    def quantity(self) -> int:
        """The number of packs that the purchase was started with."""
        return int(self._item.get("quantity", 1))

    def paid_quantity(self, session: Object) -> int | None:
        """The number of packs in a session, from its price; None if the price does not fit."""
        price = session["amount_subtotal"]
        most = self._item.get("adjustable_quantity", {}).get("maximum")
        if price is None or session["currency"] != self.currency:
            return None
        if most is None or self.amount == 0:
            return self.quantity if price == self.amount else None
        number, rest = divmod(price * self.quantity, self.amount)
        return number if rest == 0 and 1 <= number <= most else None

    def expected_amount(self, session: Object) -> int | None:
        """The price of a session less the discount and plus the tax that the terms allow; None for another price."""
        if self.paid_quantity(session) is None:
            return None
        details = session.get("total_details") or {}
        amount = int(session["amount_subtotal"])
        if self.request.get("allow_promotion_codes"):
            amount -= details.get("amount_discount") or 0
        tax = (details.get("amount_tax") or 0) if self.request.get("automatic_tax") else 0
        return amount + tax if amount + tax == session["amount_total"] else amount  # a price may include its tax


@dataclass(frozen=True, slots=True)
class Claim:
    """The purchase that a session pays for, or None.

    ``named`` is a purchase of ours that it names without the ``expected`` proof. ``is_foreign`` is true if it names
    none of ours: something else was sold. ``terms`` are the stored ones.
    """

    purchase: CreditTransaction | None
    named: UUID | None = None
    expected: str | None = None
    is_foreign: bool = False
    terms: Terms | None = None


def id_of(expandable: object) -> str | None:
    """The id of an expandable field, which is an id, the object itself, or null."""
    if isinstance(expandable, dict):
        return str(expandable["id"])
    return None if expandable is None else str(expandable)


@lru_cache(maxsize=16)
def store_of(config: Config) -> Store:
    """The store of a configuration, made once."""
    return Store(config)


class Store:
    """The operations for one configuration. Holds no connection and no state."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.ledger = Ledger(config)
        self.schema = Schema.of(config.host)
        # made once: making them takes longer than a delivery
        self._claimed = _claimed(self.schema)
        self._reversals = _reversals(self.schema)
        row = self.schema.credit_transactions.c
        self._purchase_of_id = _purchase(self.schema, row.id == sa.bindparam("p_id", type_=sa.Uuid()))
        self._purchase_of_intent = _purchase(self.schema, row.stripe_payment_intent_id == sa.bindparam("p_intent"))

    # --- records ---

    def purchase(
        self, conn: DbConnection, *, id: UUID | None = None, intent: str | None = None
    ) -> CreditTransaction | None:
        """The purchase with this id, or of this payment intent."""
        if intent is None:
            found = run(conn, self._purchase_of_id, {"p_id": id}).one_or_none()
        else:
            found = run(conn, self._purchase_of_intent, {"p_intent": intent}).one_or_none()
        return None if found is None else CreditTransaction(*found)

    def record_event(self, conn: DbConnection, event: str, event_type: str, object_id: str) -> bool:
        """Store the id of an event; False if it had its effect already. Waits for a transaction that stores the same.

        An event that has failed is due again, and its failure is marked as resolved.
        """
        values = {"event": event, "type": event_type, "object": object_id}
        return bool(run(conn, _RECORD_EVENT, values).scalar_one())

    def record_failed_delivery(self, conn: DbConnection, event: Object, reason: str) -> None:
        """Record a delivery without effect, with the reason."""
        about = event["data"]["object"]
        values = {"event": event["id"], "type": event["type"], "object_type": about["object"], "object": about["id"]}
        run(conn, _RECORD_FAILED_DELIVERY, values | {"reason": reason})

    def failures(self, conn: DbConnection, events: Collection[str] | None = None) -> list[FailedDelivery]:
        """The failed deliveries that are not resolved, oldest first; only those of ``events`` if given."""
        row = stripe_failed_deliveries.c
        columns = [row[name] for name in FailedDelivery.__dataclass_fields__]
        statement = sa.select(*columns).where(row.resolved_at.is_(None)).order_by(row.first_at, row.event_id)
        if events is not None:
            statement = statement.where(row.event_id.in_([storable("events", one) for one in events]))
        return [FailedDelivery(*values) for values in run(conn, statement, {})]

    def record_finding(
        self,
        conn: DbConnection,
        kind: FindingKind,
        object_id: str,
        *,
        purchase: UUID | None = None,
        expected: object = None,
        found: object = None,
        reopen: bool = False,
    ) -> None:
        """Record a finding for a person, once: one that was dismissed stays so, unless ``reopen``.

        Recorded again, it says what was expected and found now.
        """
        values = {
            "kind": str(kind),
            "object_id": object_id,
            "purchase_id": purchase,
            "expected": None if expected is None else str(expected),
            "found": None if found is None else str(found),
        }
        new = pg.insert(stripe_findings).values(**values)
        now = {name: values[name] for name in ("expected", "found")} | ({"dismissed_at": None} if reopen else {})
        run(conn, new.on_conflict_do_update(index_elements=["kind", "object_id"], set_=now), {})

    def findings(self, conn: DbConnection) -> list[StripeFinding]:
        """All findings that are not dismissed, oldest first."""
        row = stripe_findings.c
        statement = sa.select(row.kind, row.object_id, row.purchase_id, row.expected, row.found)
        statement = statement.where(row.dismissed_at.is_(None))
        return [
            StripeFinding(FindingKind(kind), *rest)
            for kind, *rest in run(conn, statement.order_by(row.seen_at, row.kind, row.object_id), {})
        ]

    def refusal(self, conn: DbConnection, object_id: str) -> str | None:
        """The reason why an object was refused, in the ledger's words; None if no finding is about the object."""
        row = stripe_findings.c
        statement = sa.select(row.kind, row.object_id, row.purchase_id, row.expected, row.found)
        kinds = (FindingKind.REFUSED, FindingKind.SECOND_SESSION, FindingKind.UNKNOWN_CUSTOMER)
        statement = statement.where(row.object_id == object_id, row.kind.in_(map(str, kinds)))
        found = run(conn, statement.order_by(row.seen_at.desc()).limit(1), {}).one_or_none()
        if found is None:
            return None
        return str(
            found.found if found.kind == FindingKind.REFUSED else StripeFinding(FindingKind(found.kind), *found[1:])
        )

    def dismiss(self, conn: DbConnection, objects: Collection[str] | None, kind: FindingKind | None) -> int:
        """Mark findings as dealt with; returns their number."""
        row = stripe_findings.c
        seen = sa.update(stripe_findings).where(row.dismissed_at.is_(None))
        if objects is not None:
            seen = seen.where(row.object_id.in_([storable("objects", one) for one in objects]))
        if kind is not None:
            seen = seen.where(row.kind == str(kind))
        return len(run(conn, seen.values(dismissed_at=sa.func.now()).returning(row.kind), {}).all())

    # --- Stripe's objects ---

    def claim(self, conn: DbConnection, session: Object, *, lock: str | None = None) -> Claim:
        """The purchase that a session pays for, if data that only the merchant can write proves it.

        The proof is that the session is the stored one, or that its metadata names the purchase and its price before
        discounts and tax is the stored one. ``client_reference_id`` proves nothing: on a Payment Link or a buy button
        it is a parameter of the address, which the buyer may change. Nor do the fields that a buyer fills in: e-mail,
        name, custom fields. ``lock``, a payment intent, is locked as in ``_lock``.
        """
        metadata = session.get("metadata") or {}
        marked = as_uuid(metadata.get(METADATA_KEY))
        named_by = {"p_marked": marked, "p_referred": as_uuid(session.get("client_reference_id"))}
        rows = run(conn, self._claimed, {"p_session": session["id"], "p_lock": lock, **named_by})
        found = [
            (CreditTransaction(*columns), None if amount is None else Terms(amount, currency, request or {}))
            for _, amount, currency, request, *columns in rows
            if columns[0] is not None
        ]
        stored = next((it for it in found if it[0].stripe_session_id == session["id"]), None)
        named = stored or next((it for it in found if it[0].id == marked), None)
        # A renamed database still knows its purchases. One with a configured name may be a copy, so the name decides.
        asks_realm = marked is not None and (named is None or (stored is None and self.config.stripe_realm is not None))
        if asks_realm and metadata.get(REALM_KEY) not in (None, self.realm(conn)):
            return Claim(None, is_foreign=True)
        if named is None:
            if found:
                referring = found[0][0].id
                return Claim(None, referring, f"metadata {METADATA_KEY}={referring}")
            return Claim(None, is_foreign=marked is None)
        purchase, terms = named
        if session["mode"] != "payment":
            return Claim(None, purchase.id, "a session of mode payment")
        if stored is None and terms is not None and terms.paid_quantity(session) is None:
            return Claim(None, purchase.id, f"{terms.amount} {terms.currency} before discounts and tax")
        return Claim(purchase, terms=terms)

    def realm(self, conn: DbConnection) -> str:
        """The name of this installation in metadata: the configured one, or the database's own."""
        if self.config.stripe_realm is not None:
            return self.config.stripe_realm
        first = sa.select(sa.func.min(migration_log.c.applied_at), sa.func.current_database())
        return hashlib.sha256(repr(tuple(run(conn, first, {}).one())).encode()).hexdigest()[:REALM_DIGITS]

    def fulfil(self, conn: DbConnection, session: Object, *, failed: str | None = None) -> Outcome:
        """Bring the purchase of a Checkout Session to the state of the session.

        ``failed`` is the reason why an unpaid, complete session will not be paid any more; an expired one needs none.
        """
        intent = id_of(session.get("payment_intent"))
        claim = self.claim(conn, session, lock=intent)
        purchase = claim.purchase
        paid = session["status"] == "complete" and session["payment_status"] in PAID
        if purchase is None:
            return self._without_purchase(conn, session, claim)
        if paid and purchase.status is not COMPLETED and purchase.stripe_session_id in (None, session["id"]):
            # completing locks the user, and refuses if the purchase has changed meanwhile
            with suppress(IdempotencyKeyReused, SessionConflict):
                return self._paid(conn, purchase, session, intent, claim.terms)
        self.ledger.lock(conn, purchase.user_id)
        purchase = self.purchase(conn, id=purchase.id) or purchase  # as of now, under the lock
        if purchase.stripe_session_id not in (None, session["id"]):
            self.record_finding(
                conn,
                FindingKind.SECOND_SESSION,
                session["id"],
                purchase=purchase.id,
                expected=purchase.stripe_session_id,
                found=f"{session['id']}, {session['payment_status']}",
            )
            return Outcome.REFUSED
        if paid:
            return self._paid(conn, purchase, session, intent, claim.terms)
        return self._unpaid(conn, purchase, session, intent, failed)

    def complete_paid(
        self, conn: DbConnection, purchase: CreditTransaction, *, intent: str, amount: int, currency: str
    ) -> Outcome:
        """Complete a purchase that was paid without a session, and apply the refunds and disputes that came before."""
        run(conn, sa.select(_lock()), {"p_lock": intent})
        purchase = self.purchase(conn, id=purchase.id) or purchase  # the user's key may have changed
        done = self.ledger.complete_purchase(
            conn,
            purchase.user_id,
            purchase=purchase.id,
            stripe_payment_intent_id=intent,
            amount_paid=amount,
            currency=currency,
        )
        settled = self._settle_paid(conn, done, about=intent)
        outcome = Outcome.UNCHANGED if done.replayed else Outcome.GRANTED
        return outcome if settled is Outcome.UNCHANGED else settled

    def reverse(self, conn: DbConnection, reversal: Reversal) -> Outcome:
        """Store a refund or dispute, and adapt the credits of its purchase to the money that is left."""
        run(conn, sa.select(_lock()), {"p_lock": reversal.payment_intent})
        self._store_reversal(conn, reversal)
        purchase = self.purchase(conn, intent=reversal.payment_intent)
        if purchase is None or purchase.status is not COMPLETED:
            return Outcome.REMEMBERED  # completing the purchase applies it
        self.ledger.lock(conn, purchase.user_id)
        return self._settle(conn, purchase, self._known(conn, purchase))

    def _without_purchase(self, conn: DbConnection, session: Object, claim: Claim) -> Outcome:
        if claim.is_foreign:
            return Outcome.FOREIGN
        if session["status"] == "complete":
            self.record_finding(
                conn,
                FindingKind.UNKNOWN_SESSION if claim.named is None else FindingKind.UNPROVEN_SESSION,
                session["id"],
                purchase=claim.named,
                expected=claim.expected,
                found=_money(session),
            )
        return Outcome.UNKNOWN

    def _unpaid(
        self, conn: DbConnection, purchase: CreditTransaction, session: Object, intent: str | None, failed: str | None
    ) -> Outcome:
        if purchase.status is not PENDING:
            return Outcome.UNCHANGED
        user, stripe_ids = purchase.user_id, {"stripe_session_id": session["id"], "stripe_payment_intent_id": intent}
        attached = self.ledger.attach_session(conn, user, purchase.id, **stripe_ids)
        reason = failed or ("the session expired" if session["status"] == "expired" else None)
        if reason:
            self.ledger.fail_purchase(conn, user, purchase=purchase.id, reason=reason)
            return Outcome.FAILED
        return Outcome.UNCHANGED if attached.replayed else Outcome.PENDING

    def _paid(
        self, conn: DbConnection, purchase: CreditTransaction, session: Object, intent: str | None, terms: Terms | None
    ) -> Outcome:
        outcome = Outcome.UNCHANGED
        if purchase.status is not COMPLETED:
            purchase = self.ledger.complete_purchase(
                conn,
                purchase.user_id,
                purchase=purchase.id,
                stripe_session_id=session["id"],
                amount_paid=session["amount_total"],
                currency=session["currency"],
                stripe_payment_intent_id=intent,
                credits=_chosen_credits(purchase, session, terms),
            )
            outcome = Outcome.UNCHANGED if purchase.replayed else Outcome.GRANTED
        elif intent is not None and purchase.stripe_payment_intent_id is None:  # completed by the host itself
            purchase = self.ledger.attach_session(
                conn,
                purchase.user_id,
                purchase.id,
                stripe_session_id=session["id"],
                stripe_payment_intent_id=intent,
            )
        if terms is not None:
            self._record_differences(conn, purchase, session, terms)
        settled = self._settle_paid(conn, purchase, about=session["id"])
        return outcome if settled is Outcome.UNCHANGED else settled

    def _record_differences(
        self, conn: DbConnection, purchase: CreditTransaction, session: Object, terms: Terms
    ) -> None:
        """Record findings where the payment differs from the terms; the row's own credits are granted."""
        expected = terms.expected_amount(session)
        compared = (
            (FindingKind.AMOUNT_DIFFERS, terms.amount if expected is None else expected, session["amount_total"]),
            (FindingKind.CURRENCY_DIFFERS, terms.currency, session["currency"]),
            (FindingKind.CUSTOMER_DIFFERS, terms.request.get("customer"), id_of(session.get("customer"))),
        )
        for kind, wanted, found in compared:
            if wanted is not None and wanted != found:
                self.record_finding(conn, kind, session["id"], purchase=purchase.id, expected=wanted, found=found)

    def _store_reversal(self, conn: DbConnection, reversal: Reversal) -> None:
        """Store it by id. Its status moves forward only; its credits and the charge's amount stay once known.

        Of two statuses with the same rank, as ``lost`` and ``won``, the one counts that Stripe stated later. What was
        read from Stripe is later than any event so far.
        """
        values = {
            "id": reversal.id,
            "kind": reversal.kind,
            "stripe_payment_intent_id": reversal.payment_intent,
            "amount": reversal.amount,
            "currency": reversal.currency,
            "charge_amount": reversal.charge_amount,
            "credits": reversal.credits,
            "status": reversal.status,
            "status_rank": reversal.status_rank,
        }
        if reversal.stated_at is None:
            run(conn, _STORE_REVERSAL_READ, values)
        else:
            run(conn, _STORE_REVERSAL_STATED, values | {"stated_at": reversal.stated_at})

    def _known(self, conn: DbConnection, purchase: CreditTransaction) -> Sequence[Any]:
        """The refunds and disputes of a purchase, each with the user's ``is_deleted``; a row without an id for none."""
        values = {"p_intent": purchase.stripe_payment_intent_id, "p_user": purchase.user_id}
        return run(conn, self._reversals, values).all()

    def _settle_paid(self, conn: DbConnection, purchase: CreditTransaction, *, about: str) -> Outcome:
        """Apply the refunds and disputes of a paid purchase; record a finding if its user was deleted meanwhile."""
        known = self._known(conn, purchase)
        if known[0].is_deleted:
            self.record_finding(conn, FindingKind.DELETED_USER, about, purchase=purchase.id, found="paid, and granted")
        return self._settle(conn, purchase, known)

    def _settle(self, conn: DbConnection, purchase: CreditTransaction, known: Sequence[Any]) -> Outcome:
        """Append the difference of each refund and dispute that the ledger has not applied yet."""
        outcome = Outcome.UNCHANGED
        if known[0].id is None:
            return outcome
        row = stripe_reversals.c
        rounding = self.rounding(conn, purchase)
        reversed_shares: dict[str, ReversedShare] = {}
        for one in known:
            share = _share(purchase, one)
            if one.applied != "none":
                reversed_shares[one.id] = ReversedShare(
                    share or Fraction(), one.credits if one.applied == "marked" else None
                )
        for one in known:
            wanted = "none" if one.status in MONEY_WITH_SHOP else "share" if one.credits is None else "marked"
            share = _share(purchase, one)
            if wanted == one.applied:
                continue  # the ledger has applied it
            if wanted == "share" and share is None:
                self._record_unmeasured(conn, purchase, one)
                continue
            before = credits_kept(purchase.amount, reversed_shares.values(), rounding)
            reversed_shares.pop(one.id, None)
            if wanted != "none":
                reversed_shares[one.id] = ReversedShare(share or Fraction(), one.credits)
            after = credits_kept(purchase.amount, reversed_shares.values(), rounding)
            key = f"stripe:{one.id}:{_STEPS[wanted]}:{one.stated_at.timestamp():.6f}"
            outcome = self._move_to(conn, purchase, before, after, key=key) or outcome
            run(conn, sa.update(stripe_reversals).where(row.id == one.id).values(applied=wanted), {})
        return outcome

    def _move_to(
        self, conn: DbConnection, purchase: CreditTransaction, before: int, after: int, *, key: str
    ) -> Outcome | None:
        """Bring the purchase to ``after`` credits, if that is the step's direction; None if nothing is to do."""
        left = self.left(conn, purchase)
        if after < before and after < left:
            self.ledger.refund(conn, purchase.user_id, purchase.id, credits=left - after, key=key)
            return Outcome.TAKEN_BACK
        if after > before and after > left:
            back = min(after - left, self._taken(conn, purchase))  # credits that expired meanwhile stay expired
            if back:
                self.ledger.reinstate(conn, purchase.user_id, purchase.id, credits=back, key=key)
                return Outcome.GIVEN_BACK
        return None

    def _record_unmeasured(self, conn: DbConnection, purchase: CreditTransaction, one: Any) -> None:
        """Record that a share is unknown: the amount is missing or in another currency, and so is the charge's."""
        paid = "no amount" if purchase.amount_paid is None else f"{purchase.amount_paid} {purchase.currency}"
        self.record_finding(
            conn,
            FindingKind.UNMEASURED,
            one.id,
            purchase=purchase.id,
            expected=f"a part of {paid}",
            found=f"{one.amount} {one.currency}",
            reopen=True,
        )

    def rounding(self, conn: DbConnection, purchase: CreditTransaction) -> Rounding:
        """The rounding in the purchase's terms; the present setting if it was not sold by checkout."""
        terms = stripe_checkouts.c
        sold = sa.select(terms.rounding).where(terms.purchase_id == purchase.id)
        return run(conn, sold, {}).scalar_one_or_none() or self.config.refund_rounding

    def left(self, conn: DbConnection, purchase: CreditTransaction) -> int:
        """The credits of a purchase that were not taken back, and have not expired."""
        expired = run(conn, sa.select(sa.func.tallystick.expired(purchase.id)), {}).scalar_one()
        return purchase.amount - self._taken(conn, purchase) - int(expired)

    def _taken(self, conn: DbConnection, purchase: CreditTransaction) -> int:
        """The credits of a purchase that refunds took and that were not given back."""
        row = self.schema.credit_transactions.c
        taken = sa.select(-sa.func.coalesce(sa.func.sum(row.amount), 0))
        taken = taken.where(row.refund_of == purchase.id, row.type != CreditTransactionType.EXPIRY)
        return int(run(conn, taken, {}).scalar_one())


# --- statements ---


def _lock() -> sa.ColumnElement[Any]:
    """A lock on a payment, by which transactions about it run one after the other even before it has a row."""
    name = sa.literal("tallystick ") + sa.bindparam("p_lock", type_=sa.Text())
    return sa.func.pg_advisory_xact_lock(sa.func.hashtextextended(name, 0)).label("locked")


_RECORD_EVENT = sa.text("""
WITH resolved AS (
  UPDATE tallystick.stripe_failed_deliveries SET resolved_at = now()
  WHERE event_id = :event AND resolved_at IS NULL RETURNING event_id
), new AS (
  INSERT INTO tallystick.stripe_events (id, type, object_id) VALUES (:event, :type, :object)
  ON CONFLICT DO NOTHING RETURNING id
)
SELECT EXISTS (SELECT FROM resolved) OR EXISTS (SELECT FROM new)
""")

_RECORD_FAILED_DELIVERY = sa.text("""
INSERT INTO tallystick.stripe_failed_deliveries AS it (event_id, type, object_type, object_id, reason)
VALUES (:event, :type, :object_type, :object, :reason)
ON CONFLICT (event_id) DO UPDATE
SET reason = excluded.reason, attempts = it.attempts + 1, last_at = now(), resolved_at = NULL
""")


def _store_reversal(*, stated: bool) -> pg.Insert:
    """Insert a refund or dispute or move it forward: ``stated`` by an event at a time, or read from Stripe now."""
    row, names = stripe_reversals.c, ("id", "kind", "stripe_payment_intent_id", "amount", "currency", "charge_amount")
    new = pg.insert(stripe_reversals).values(
        {name: sa.bindparam(name) for name in (*names, "credits", "status", "status_rank")}
        | {"stated_at": sa.bindparam("stated_at") if stated else sa.func.clock_timestamp()}
    )
    is_later = row.stated_at < new.excluded.stated_at if stated else sa.true()
    is_newer = sa.or_(
        row.status_rank < new.excluded.status_rank,
        sa.and_(row.status_rank == new.excluded.status_rank, is_later),
    )
    forward = {
        name: sa.case((is_newer, new.excluded[name]), else_=row[name]) for name in ("amount", "status", "status_rank")
    }
    # the clocks of Stripe and of this server differ
    forward["stated_at"] = sa.case(
        (is_newer, sa.func.greatest(row.stated_at, new.excluded.stated_at)), else_=row.stated_at
    )
    known = {name: sa.func.coalesce(row[name], new.excluded[name]) for name in ("charge_amount", "credits")}
    return new.on_conflict_do_update(index_elements=["id"], set_=forward | known)


_STORE_REVERSAL_STATED, _STORE_REVERSAL_READ = _store_reversal(stated=True), _store_reversal(stated=False)


def _purchase(schema: Schema, which: sa.ColumnElement[bool]) -> sa.Select[Any]:
    row = schema.credit_transactions.c
    return (
        sa.select(*schema.row)
        .where(which, row.type == CreditTransactionType.PURCHASE)
        .order_by(row.status == COMPLETED, row.id)
        .limit(1)
    )


def _claimed(schema: Schema) -> sa.Select[Any]:
    """Lock, and select the purchases that a session may be about, with their terms; a row of nulls for none."""
    purchases, sold = schema.credit_transactions, stripe_checkouts.c
    row = purchases.c
    which = [row.stripe_session_id == sa.bindparam("p_session")]
    which += [row.id == sa.bindparam(name, type_=sa.Uuid()) for name in ("p_marked", "p_referred")]
    claimed = (
        sa.select(sold.amount.label("sold_amount"), sold.currency.label("sold_currency"), sold.request, *schema.row)
        .select_from(purchases.outerjoin(stripe_checkouts, sold.purchase_id == row.id))
        .where(row.type == CreditTransactionType.PURCHASE, sa.or_(*which))
        .subquery()
    )
    locked = sa.select(_lock()).subquery()
    return sa.select(locked, claimed).select_from(locked.outerjoin(claimed, sa.true()))


def _reversals(schema: Schema) -> sa.Select[Any]:
    row, users = stripe_reversals.c, schema.users.c
    deleted = sa.exists().where(
        users.key == sa.bindparam("p_user", type_=users.key.type), users.deleted_at.is_not(None)
    )
    buyer = sa.select(deleted.label("is_deleted")).subquery()
    columns = (row.id, row.amount, row.currency, row.charge_amount, row.credits, row.status, row.applied, row.stated_at)
    of_payment = row.stripe_payment_intent_id == sa.bindparam("p_intent", type_=sa.Text())
    return (
        sa.select(buyer, *columns)
        .select_from(buyer.outerjoin(stripe_reversals, of_payment))
        .order_by(row.seen_at, row.id)
    )


_STEPS = {"none": "given back", "share": "taken back", "marked": "marked"}
"""The name of a value of ``stripe_reversals.applied`` in the ledger's keys, before the time of Stripe's statement."""


def _chosen_credits(purchase: CreditTransaction, session: Object, terms: Terms | None) -> int | None:
    """The credits of the number of packs that the buyer chose; None for the row's own."""
    number = None if terms is None else terms.paid_quantity(session)
    if terms is None or number in (None, terms.quantity):
        return None
    return purchase.amount // terms.quantity * (number or 0)


def _share(purchase: CreditTransaction, reversal: Any) -> Fraction | None:
    """A reversal's share of the payment; None where the whole amount is unknown."""
    whole = reversal.charge_amount
    if purchase.amount_paid and purchase.currency == reversal.currency:
        whole = purchase.amount_paid
    return Fraction(reversal.amount, whole) if whole else None


def _money(session: Object) -> str:
    """A session's mode and amounts, for a person."""
    total, before = session["amount_total"], session["amount_subtotal"]
    amounts = f"{total}" if total == before else f"{total} ({before} before discounts and tax)"
    return f"{session['mode']}, {amounts} {session['currency']}, {session['payment_status']}"


def storable(argument: str, text: str, longest: int = ID_MAX) -> str:
    """``text``, if it has 1 to ``longest`` characters that PostgreSQL can store. Raises InvalidArgument."""
    if not 0 < len(text) <= longest or "\0" in text or any("\ud800" <= c <= "\udfff" for c in text):
        problem = f"pass a text of 1 to {longest} characters, without NUL and lone surrogates"
        raise InvalidArgument.of(argument, text, problem)
    return text


def as_uuid(value: object) -> UUID | None:
    """A ``client_reference_id`` as the id of a purchase; None for anything else that other software has put there."""
    try:
        return UUID(value) if isinstance(value, str) else None
    except ValueError:
        return None
