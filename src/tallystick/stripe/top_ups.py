"""Automatic top-up: a saved payment method is charged for a pack when the user's balance is low.

The app decides when to call, and keeps the user's consent, threshold and ceiling, which each call states. A gap is the
time from one completed top-up to the next. All calls in it that name the same pack and price charge for one purchase,
and each attempt to pay it is recorded at Stripe. A call that names another pack or price starts another purchase, once
the one before has failed.
"""

from __future__ import annotations

import datetime as dt
import hashlib
from dataclasses import dataclass
from enum import StrEnum
from typing import Any
from uuid import UUID

import sqlalchemy as sa

from tallystick.accounts import Account, Accounts
from tallystick.config import Config, Pack
from tallystick.database import run
from tallystick.declared_tables import stripe_checkouts
from tallystick.errors import IdempotencyKeyReused, InvalidArgument, Key, StripeRefused
from tallystick.ledger import CreditTransaction
from tallystick.schema import CreditTransactionStatus, CreditTransactionType
from tallystick.stripe.checkout import (
    CLOCK_SKEW_MAX_S,
    metadata_of,
    names,
    pack_named,
    price_of,
    require_not_deleted,
    require_price,
    require_room,
    store_terms,
)
from tallystick.stripe.client import MISSING, Object, ask, ask_or_none, is_live, list_all
from tallystick.stripe.effects import PAGE, Effect, Effects, in_transaction
from tallystick.stripe.store import FindingKind, Outcome, id_of

MODE = "top_up"
"""The mode in the stored request of a top-up; that of a session has Stripe's ``payment``."""

BACK_OFF = (dt.timedelta(hours=1), dt.timedelta(hours=12), dt.timedelta(days=2))
"""The time from each declined attempt to the next one. After the last of them the user is asked."""

PURCHASES_EXAMINED = 5  # the newest paid ones for a saved payment method, and the newest top-ups for the gap

PENDING_MAX = dt.timedelta(hours=1)
"""The age up to which a pending top-up may have a payment under way that Stripe does not list yet."""

DIGEST_DIGITS = 32  # hexadecimal; enough that two payers never have the same digest

_DECLINED = 402
_AUTHENTICATION = "authentication_required"


class TopUpOutcome(StrEnum):
    """The result of a call of ``top_up``."""

    ENOUGH = "enough"  # the balance is not below the threshold
    CHARGED = "charged"  # the credits are there
    UNDER_WAY = "under_way"  # a payment is not finished, perhaps of another pack or price; call again
    WAITING = "waiting"  # a charge was declined; the next attempt is at ``retry_at``
    CEILING = "ceiling"  # the monthly maximum is reached; there is a finding for an operator
    ASK = "ask"  # the user has to pay: no payment method is saved, or the bank asks for authentication


@dataclass(frozen=True, slots=True)
class TopUp:
    """The result of a top-up, with its purchase once there is one. ``retry_at`` belongs to ``waiting``."""

    outcome: TopUpOutcome
    purchase: CreditTransaction | None = None
    retry_at: dt.datetime | None = None


def top_up(engine: sa.Engine, config: Config, user: Key, pack: str, *, below: int, monthly_max: int) -> TopUp:
    """Charge the user's saved payment method for a pack if the credits that can be spent are ``below`` a number.

    Call it after a consumption, or from time to time, for users who agreed to it. At most ``monthly_max`` minor units
    of the pack's currency are charged in a calendar month (UTC). The payment method is the one that was saved with a
    purchase, by the option ``save_payment_method``. Concurrent calls, and calls after a lost answer, charge once.
    Nothing else is charged than the pack that the call names, at its present price.

    Raises:
        StripeNotConfigured, UnknownPack, PackMismatch, UnknownUser, UserDeleted, BalanceOutOfRange, InvalidArgument:
            nothing was charged.
        StripeUnavailable: it may have been charged; call again, or reconcile.
        StripeRefused: nothing was charged; the message gives the reason.
    """
    for argument, value in (("below", below), ("monthly_max", monthly_max)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise InvalidArgument.of(argument, value, "pass 1 or more")
    effects, chosen = Effects(engine, config), pack_named(config, pack)
    # the gap first: a top-up that is completed after it was read either raises the balance, or has the same key
    gap = in_transaction(engine, lambda conn: _find_gap(effects, conn, user))
    account = in_transaction(engine, lambda conn: Accounts(config).get(conn, user))
    require_not_deleted(account)
    if account.standing.available >= below:
        return TopUp(TopUpOutcome.ENOUGH)
    attempts = _attempts_in(effects, gap)
    for sold in gap.purchases:
        made = [one for one in attempts if names(one, sold.purchase)]
        if any(one["status"] in ("succeeded", "processing") for one in made):
            return _settle(effects, sold.purchase, made)
    return _next_attempt(effects, account, chosen, gap, attempts, monthly_max)


def attempts_of(effects: Effects, purchase: CreditTransaction, customer: str) -> list[Object]:
    """The payment intents of a top-up, newest first; of any customer if this one is gone."""
    since: Any = {"created": {"gte": int(purchase.created_at.timestamp()) - CLOCK_SKEW_MAX_S}, "limit": PAGE}
    intents = effects.client.v1.payment_intents
    of_customer: Any = {"customer": customer, **since}
    page = ask_or_none(lambda: intents.list(of_customer))
    made = [one.to_dict() for one in list_all(lambda: page or intents.list(since))]
    return [one for one in made if names(one, purchase)]


def effect_of(effects: Effects, purchase: CreditTransaction, attempts: list[Object]) -> Effect | None:
    """The effect of a paid top-up; None for one that is not paid."""
    paid = next((one for one in attempts if one["status"] == "succeeded"), None)
    if paid is None:
        return None

    def complete(conn: sa.Connection) -> Outcome:
        return effects.store.complete_paid(
            conn, purchase, intent=paid["id"], amount=paid["amount_received"], currency=paid["currency"]
        )

    return lambda conn: effects.recording_refusal(conn, paid["id"], lambda: complete(conn))


@dataclass(frozen=True, slots=True)
class _Sold:
    """A top-up's purchase with its stored terms. ``customer`` is the one whose payments are examined."""

    purchase: CreditTransaction
    customer: str
    pack: str
    amount: int
    currency: str

    def fits(self, pack: Pack) -> bool:
        """True if the stored terms are those of the pack now."""
        stored = (self.pack, self.purchase.amount, self.amount, self.currency, self.purchase.stripe_price_id)
        return stored == (pack.name, pack.credits, pack.amount, pack.currency, pack.stripe_price_id)

    @property
    def may_be_under_way(self) -> bool:
        """True if another call may be charging for it now."""
        is_young = dt.datetime.now(dt.UTC) - self.purchase.created_at < PENDING_MAX
        return self.purchase.status is CreditTransactionStatus.PENDING and is_young


@dataclass(frozen=True, slots=True)
class _Gap:
    """A user's present gap: its purchases, newest first, and the completed top-up before it."""

    purchases: tuple[_Sold, ...] = ()
    last: UUID | None = None


def _attempts_in(effects: Effects, gap: _Gap) -> list[Object]:
    """The attempts to pay the purchases of a gap, newest first."""
    return [one for sold in gap.purchases for one in attempts_of(effects, sold.purchase, sold.customer)]


def _next_attempt(  # noqa: PLR0917 - the findings of top_up, by position
    effects: Effects, account: Account, pack: Pack, gap: _Gap, attempts: list[Object], monthly_max: int
) -> TopUp:
    newest = gap.purchases[0] if gap.purchases else None
    purchase = None if newest is None else newest.purchase
    customer = account.stripe_customer_id
    method = None if customer is None else _saved_method(effects, account.user, customer)
    if customer is None or method is None:
        return TopUp(TopUpOutcome.ASK, purchase)
    if stopped := _stopped_by_declines(purchase, [one for one in attempts if _method_of(one) == method]):
        return stopped
    if _exceeds_ceiling(effects, account.user, pack, monthly_max):
        return TopUp(TopUpOutcome.CEILING, purchase)
    require_room(effects.store, account, pack.credits, pack.name)
    require_price(pack, price_of(effects.client, pack), live=is_live(effects.config))
    try:
        started = in_transaction(
            effects.engine, lambda conn: _purchase_of_gap(effects, conn, account.user, pack, gap, customer)
        )
    except IdempotencyKeyReused:  # a concurrent call started another pack
        started = None
    if started is None or not started.fits(pack):
        return TopUp(TopUpOutcome.UNDER_WAY, purchase if started is None else started.purchase)
    if started.purchase.status is CreditTransactionStatus.COMPLETED:  # by a concurrent call
        return TopUp(TopUpOutcome.CHARGED, started.purchase)
    attempt = 1 + sum(names(one, started.purchase) and _method_of(one) == method for one in attempts)
    return _charge(effects, started, customer, method, attempt=attempt)


def _find_gap(effects: Effects, conn: sa.Connection, user: Key) -> _Gap:
    purchases = effects.store.schema.credit_transactions
    newest = _sold(effects).where(*_top_ups_of(effects, user)).order_by(purchases.c.id.desc()).limit(PURCHASES_EXAMINED)
    found: list[_Sold] = []
    for row in run(conn, newest, {}):
        sold = _sold_of(row)
        if sold.purchase.status is CreditTransactionStatus.COMPLETED:
            return _Gap(tuple(found), last=sold.purchase.id)
        found.append(sold)
    return _Gap(tuple(found))


def _sold(effects: Effects) -> sa.Select[Any]:
    """A query of purchases with their terms, for ``_sold_of``."""
    purchases, sold = effects.store.schema.credit_transactions, stripe_checkouts.c
    terms = (sold.request["customer"].astext, sold.pack, sold.amount, sold.currency)
    return sa.select(*terms, *effects.store.schema.row).join_from(
        purchases, stripe_checkouts, sold.purchase_id == purchases.c.id
    )


def _sold_of(row: Any) -> _Sold:
    customer, pack, amount, currency, *columns = row
    return _Sold(CreditTransaction(*columns), customer, pack, amount, currency)


def _top_ups_of(effects: Effects, user: Key) -> tuple[sa.ColumnElement[bool], ...]:
    row = effects.store.schema.credit_transactions.c
    return (
        row.user_id == effects.store.schema.user_key(user),
        row.type == CreditTransactionType.PURCHASE,
        stripe_checkouts.c.request["mode"].astext == MODE,
    )


def _purchase_of_gap(  # noqa: PLR0917 - as above
    effects: Effects, conn: sa.Connection, user: Key, pack: Pack, gap: _Gap, customer: str
) -> _Sold:
    """The gap's purchase of this pack, written if there is none; concurrent calls write the same.

    It is one of another pack or price if that may be under way.
    """
    newest = gap.purchases[0] if gap.purchases else None
    request = {"mode": MODE, "customer": customer}
    if newest is not None and (newest.fits(pack) or newest.may_be_under_way):
        id = newest.purchase.id
        if newest.fits(pack) and customer != newest.customer:
            stored = sa.update(stripe_checkouts).where(stripe_checkouts.c.purchase_id == id)
            run(conn, stored.values(request=request), {})
    else:
        before = "" if newest is None else f" not {newest.purchase.id}"
        id = effects.store.ledger.start_purchase(
            conn,
            user,
            credits=pack.credits,
            description=f"Purchased {pack.name} pack, automatically",
            key=f"top-up after {gap.last or 'none'}{before}",
            stripe_price_id=pack.stripe_price_id,
            expires_after=pack.expires_after,
        ).id
        store_terms(effects, conn, id, pack, request)
    this = _sold(effects).where(effects.store.schema.credit_transactions.c.id == id)
    return _sold_of(run(conn, this, {}).one())


def _stopped_by_declines(purchase: CreditTransaction | None, declined: list[Object]) -> TopUp | None:
    """The result, if the declined attempts with this payment method forbid another one now."""
    result = _after_declines(purchase, declined) if declined else None
    is_over = result is not None and result.retry_at is not None and result.retry_at <= dt.datetime.now(dt.UTC)
    return None if is_over else result


def _after_declines(purchase: CreditTransaction | None, declined: list[Object]) -> TopUp:
    """The result after declined attempts with a payment method; Stripe may not list the newest one yet."""
    code = (declined[0]["last_payment_error"] or {}).get("code") if declined else None
    if code == _AUTHENTICATION or len(declined) > len(BACK_OFF):
        return TopUp(TopUpOutcome.ASK, purchase)
    at = dt.datetime.fromtimestamp(declined[0]["created"], dt.UTC) if declined else dt.datetime.now(dt.UTC)
    return TopUp(TopUpOutcome.WAITING, purchase, at + BACK_OFF[max(0, len(declined) - 1)])


def _method_of(attempt: Object) -> str | None:
    """The payment method of an attempt; after a decline only the error has it."""
    error = attempt["last_payment_error"] or {}
    return id_of(error.get("payment_method")) or id_of(attempt["payment_method"])


def _exceeds_ceiling(effects: Effects, user: Key, pack: Pack, monthly_max: int) -> bool:
    """True if a charge would exceed the monthly maximum, which is recorded as a finding."""
    row, sold = effects.store.schema.credit_transactions.c, stripe_checkouts.c
    month = sa.func.date_trunc("month", sa.func.now(), "UTC")
    spent = (
        sa.select(sa.func.coalesce(sa.func.sum(sold.amount), 0), sa.func.to_char(month, "YYYY-MM"))
        .join_from(effects.store.schema.credit_transactions, stripe_checkouts, sold.purchase_id == row.id)
        .where(*_top_ups_of(effects, user), row.completed_at >= month, sold.currency == pack.currency)
    )

    def work(conn: sa.Connection) -> bool:
        so_far, of_month = run(conn, spent, {}).one()
        if so_far + (pack.amount or 0) <= monthly_max:
            return False
        about, state = f"top-up of {user} in {of_month}", f"{so_far} {pack.currency} charged, and the balance is low"
        effects.store.record_finding(
            conn, FindingKind.TOP_UP_CEILING, about, expected=f"at most {monthly_max} {pack.currency}", found=state
        )
        return True

    return in_transaction(effects.engine, work)


def _saved_method(effects: Effects, user: Key, customer: str) -> str | None:
    """The payment method of the user's newest purchase that saved one."""
    row = effects.store.schema.credit_transactions.c
    newest = (
        sa.select(row.stripe_payment_intent_id)
        .where(
            row.user_id == effects.store.schema.user_key(user),
            row.type == CreditTransactionType.PURCHASE,
            row.stripe_payment_intent_id.is_not(None),
            row.stripe_session_id.is_not(None),
            row.sequence.is_not(None),
        )
        .order_by(row.sequence.desc())
        .limit(PURCHASES_EXAMINED)
    )
    intents = in_transaction(effects.engine, lambda conn: run(conn, newest, {}).scalars().all())
    for id in intents:
        intent = ask_or_none(lambda id=id: effects.client.v1.payment_intents.retrieve(id))  # type: ignore[misc]
        if intent is not None and intent.setup_future_usage == "off_session" and id_of(intent.customer) == customer:
            return id_of(intent.payment_method)
    return None


def _charge(effects: Effects, started: _Sold, customer: str, method: str, *, attempt: int) -> TopUp:
    """Charge once: concurrent calls have the same attempt number, and so the same idempotency key at Stripe.

    The key names the customer and the payment method: with others the request differs.
    """
    purchase = started.purchase
    request: Any = {
        "amount": started.amount,
        "currency": started.currency,
        "customer": customer,
        "payment_method": method,
        "off_session": True,
        "confirm": True,
        "metadata": in_transaction(effects.engine, lambda conn: metadata_of(effects.store, conn, purchase)),
    }
    payer = hashlib.sha256(f"{customer} {method}".encode()).hexdigest()[:DIGEST_DIGITS]
    once: Any = {"idempotency_key": f"{purchase.id} {payer} attempt {attempt}"}
    try:
        intent = ask(lambda: effects.client.v1.payment_intents.create(request, once)).to_dict()
    except StripeRefused as refusal:
        if refusal.status != _DECLINED and refusal.code != MISSING:
            raise
        code = refusal.code
    else:
        return _settle(effects, purchase, [intent])

    def fail(conn: sa.Connection) -> CreditTransaction:
        now = effects.store.purchase(conn, id=purchase.id) or purchase
        if now.status is not CreditTransactionStatus.PENDING:
            return now
        return effects.store.ledger.fail_purchase(
            conn, now.user_id, purchase=purchase.id, reason=f"not charged: {code}"
        )

    failed = in_transaction(effects.engine, fail)
    if code in (_AUTHENTICATION, MISSING):  # the payment method may have been removed
        return TopUp(TopUpOutcome.ASK, failed)
    gap = in_transaction(effects.engine, lambda conn: _find_gap(effects, conn, failed.user_id))
    declined = [one for one in _attempts_in(effects, gap) if _method_of(one) == method]
    return _after_declines(failed, declined)


def _settle(effects: Effects, purchase: CreditTransaction, attempts: list[Object]) -> TopUp:
    effect = effect_of(effects, purchase, attempts)
    if effect is None:
        return TopUp(TopUpOutcome.UNDER_WAY, purchase)

    def work(conn: sa.Connection) -> CreditTransaction:
        effect(conn)
        return effects.store.purchase(conn, id=purchase.id) or purchase

    paid = in_transaction(effects.engine, work)
    is_granted = paid.status is CreditTransactionStatus.COMPLETED  # else the ledger refused it: there is a finding
    return TopUp(TopUpOutcome.CHARGED if is_granted else TopUpOutcome.UNDER_WAY, paid)
