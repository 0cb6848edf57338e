"""Effects of Stripe's objects: first the requests to Stripe, then one database transaction that writes the effect.

No request is made inside a transaction: a slow answer would keep a user's row locked, and a lost answer would leave
it unknown what was written.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import sqlalchemy as sa
from sqlalchemy.exc import DBAPIError

from tallystick.allowances import Allowances, Paid, Period
from tallystick.config import Config
from tallystick.database import run, transaction
from tallystick.errors import Conflict, HostInterfered, Key, LedgerError, UnknownUser
from tallystick.stripe.client import Object, ask, ask_or_none, client, list_all
from tallystick.stripe.store import FindingKind, Outcome, Reversal, Store, id_of, store_of

PAGE = 100
_TRIES = 3

HOSTS_REFUSALS = (HostInterfered, Conflict, DBAPIError)
"""Errors of triggers, rules and locks of the host's tables. They concern one user, and must not stop work for others.

A Conflict is one that ``in_transaction`` has tried again."""

T = TypeVar("T")
Effect = Callable[[sa.Connection], Outcome]
"""A function that writes an effect in one transaction, after the requests to Stripe."""


def in_transaction(engine: sa.Engine, work: Callable[[sa.Connection], T]) -> T:
    """Run ``work`` in a transaction, and retry it after a Conflict."""
    for attempt in range(1, _TRIES + 1):
        try:
            with transaction(engine) as conn:
                return work(conn)
        except Conflict:
            if attempt == _TRIES:
                raise
    raise AssertionError


class Effects:
    """A maker of effects from Stripe's objects. Holds no connection."""

    def __init__(self, engine: sa.Engine, config: Config) -> None:
        self.engine = engine
        self.config = config
        self.store: Store = store_of(config)
        self.client = client(config)

    def retrieve(self, stated: Object) -> Object | None:
        """The object as it is at Stripe now, in our API version; None if Stripe no longer has it."""
        v1 = self.client.v1
        kinds: dict[str, Callable[[str], Any]] = {
            "checkout.session": v1.checkout.sessions.retrieve,
            "refund": v1.refunds.retrieve,
            "dispute": v1.disputes.retrieve,
            "charge": v1.charges.retrieve,
            "invoice": v1.invoices.retrieve,
        }
        fetch = kinds[stated["object"]]
        found = ask_or_none(lambda: fetch(stated["id"]))
        return None if found is None else found.to_dict()

    def session(self, session: Object, *, failed: str | None = None) -> Effect:
        """The effect of a Checkout Session."""
        return lambda conn: self.recording_refusal(
            conn, session["id"], lambda: self.store.fulfil(conn, session, failed=failed)
        )

    def reversal(self, stated: Object, *, stated_at: dt.datetime | None = None) -> Effect | None:
        """The effect of a refund or dispute, after completing a purchase that was missed; None if it is not ours.

        ``stated_at`` is the time of the event that has it; None for one that was read from Stripe.
        """
        reversal = Reversal.of(stated, stated_at=stated_at)
        if reversal is None:
            return None
        intent = reversal.payment_intent
        bought = in_transaction(self.engine, lambda conn: self.store.purchase(conn, intent=intent))
        completed = bought is not None and bought.completed_at is not None
        session = None if completed else self.session_of(intent)
        if session is not None and in_transaction(self.engine, lambda conn: self.store.claim(conn, session)).is_foreign:
            return lambda _: Outcome.FOREIGN
        paid = None if bought is None or not completed or not bought.amount_paid else bought.currency
        if paid != reversal.currency and reversal.is_gone and (bought is not None or session is not None):
            reversal = replace(reversal, charge_amount=self._charge_amount(reversal))

        def effect(conn: sa.Connection) -> Outcome:
            if session is not None:
                self.store.fulfil(conn, session)
            return self.store.reverse(conn, reversal)

        return lambda conn: self.recording_refusal(conn, reversal.id, lambda: effect(conn))

    def invoice(self, invoice: Object) -> Effect | None:
        """The effect of a paid invoice: the allowances of the prices that it bills; None if none has one."""
        allowances = Allowances(self.config)
        paid = [
            line
            for line in (self._lines_of(invoice) if allowances.prices else ())
            if line["amount"] > 0 and _price_of(line) in allowances.prices and not _is_over(invoice, line)
        ]
        return partial(self._give, allowances=allowances, invoice=invoice, paid=paid) if paid else None

    def _lines_of(self, invoice: Object) -> list[Object]:
        lines: list[Object] = invoice["lines"]["data"]
        if not invoice["lines"]["has_more"]:
            return lines
        items = list_all(lambda: self.client.v1.invoices.line_items.list(invoice["id"], {"limit": PAGE}))
        return [line.to_dict() for line in items]

    def _give(self, conn: sa.Connection, *, allowances: Allowances, invoice: Object, paid: list[Object]) -> Outcome:
        customer = id_of(invoice.get("customer"))
        users = self.store.schema.users.c

        def user_now() -> Key | None:
            who = sa.select(users.key).where(users.stripe_customer_id == customer)
            return None if customer is None else run(conn, who, {}).scalar_one_or_none()

        if user_now() is None:
            wanted = f"a user with the Stripe customer {customer}"
            self.store.record_finding(conn, FindingKind.UNKNOWN_CUSTOMER, invoice["id"], expected=wanted, found="none")
            return Outcome.REFUSED
        # the user gets the other lines if one is refused: each has an idempotency key of its own
        outcomes = {
            self.recording_refusal(
                conn, invoice["id"], partial(_give_line, conn, allowances, user_now, _paid(invoice, line))
            )
            for line in paid
        }
        return next((one for one in (Outcome.REFUSED, Outcome.GRANTED) if one in outcomes), Outcome.UNCHANGED)

    def _charge_amount(self, reversal: Reversal) -> int | None:
        """The charge's amount, if it is in the currency of the refund or dispute."""
        charge = reversal.charge
        now = None if charge is None else ask_or_none(lambda: self.client.v1.charges.retrieve(charge))
        return now.amount if now is not None and now.currency == reversal.currency else None

    def session_of(self, payment_intent: str) -> Object | None:
        """The Checkout Session of a payment; None if it has none."""
        page = ask(lambda: self.client.v1.checkout.sessions.list({"payment_intent": payment_intent, "limit": 1}))
        return page.data[0].to_dict() if page.data else None

    def refunds_of(self, charge: Object) -> list[Object]:
        """All refunds of a charge."""
        refunds = list_all(lambda: self.client.v1.refunds.list({"charge": charge["id"], "limit": PAGE}))
        return [refund.to_dict() for refund in refunds]

    def session_now(self, id: str) -> Object | None:
        """A session with its payment intent; None if Stripe has no session of this id."""
        got = ask_or_none(lambda: self.client.v1.checkout.sessions.retrieve(id, {"expand": ["payment_intent"]}))
        return None if got is None else got.to_dict()

    def recording_refusal(self, conn: sa.Connection, object_id: str, effect: Callable[[], Outcome]) -> Outcome:
        """Run an effect, and record a refusal of the ledger, such as a balance out of range, as a finding."""
        try:
            try:
                return effect()
            except UnknownUser:  # the user's key changed after the effect had read it; it reads the new one now
                return effect()
        except LedgerError as refusal:
            self.store.record_finding(conn, FindingKind.REFUSED, object_id, found=refusal.message)
            return Outcome.REFUSED


def _give_line(conn: sa.Connection, allowances: Allowances, user_now: Callable[[], Key | None], paid: Paid) -> Outcome:
    user = user_now()
    given = None if user is None else allowances.give_paid(conn, user, paid)
    return Outcome.UNCHANGED if given is None else Outcome.GRANTED


def _price_of(line: Object) -> str | None:
    pricing = line.get("pricing") or {}
    return id_of((pricing.get("price_details") or {}).get("price"))


def _is_over(invoice: Object, line: Object) -> bool:
    """True for a line whose period a later invoice bills, as Stripe does by default after a change in the period."""
    parent = (line.get("parent") or {}).get("subscription_item_details") or {}
    return bool(parent.get("proration")) and line["period"]["end"] <= invoice["created"]


def _paid(invoice: Object, line: Object) -> Paid:
    """A line of an invoice, for ``Allowances.give_paid``."""
    start, end = (dt.datetime.fromtimestamp(line["period"][edge], dt.UTC) for edge in ("start", "end"))
    parent = (line.get("parent") or {}).get("subscription_item_details") or {}
    return Paid(
        price=_price_of(line) or "",
        quantity=1 if line["quantity"] is None else line["quantity"],
        item=parent.get("subscription_item") or invoice["id"],
        period=Period(start, end),
        key=f"{invoice['id']}:{line['id']}",
    )


def failure_of(session: Object) -> str | None:
    """The reason why a session can no longer be paid, from its expanded payment intent; None if it still can."""
    intent = session.get("payment_intent")
    if session["status"] == "expired":
        return "the session expired"
    gone = isinstance(intent, dict) and intent["status"] in ("requires_payment_method", "canceled")
    return "the payment failed" if session["status"] == "complete" and gone else None
