"""Refunds of money: the preview of a refund, and the refund itself."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from fractions import Fraction
from typing import Any
from uuid import UUID

import sqlalchemy as sa

from tallystick.accounts import Accounts
from tallystick.config import Config
from tallystick.errors import (
    InvalidArgument,
    PurchaseNotCompleted,
    RefundExceedsPurchase,
    UnknownPurchase,
)
from tallystick.ledger import CreditTransaction
from tallystick.stripe.client import Object, ask, list_all
from tallystick.stripe.customers import METADATA_MAX
from tallystick.stripe.effects import PAGE, Effects, in_transaction
from tallystick.stripe.shares import STEPS, ReversedShare, credits_kept, price
from tallystick.stripe.store import CREDITS_KEY, METADATA_KEY, Reversal, storable

REFUND_KEY = "tallystick_refund"
KEY_MAX = METADATA_MAX  # it is a value of metadata


@dataclass(frozen=True, slots=True)
class RefundPreview:
    """The effect of a refund before it is sent. ``amount`` is in minor units of ``currency``.

    ``left`` are the purchase's credits that were not taken back before. ``spent`` of them are spent already: the
    user's ``balance`` is that much lower. ``credits`` will be taken, which leaves ``balance_after``.
    """

    purchase: UUID
    amount: int
    currency: str
    credits: int
    left: int
    spent: int
    balance: int
    balance_after: int


@dataclass(frozen=True, slots=True)
class _Plan:
    """A refund, ready to be sent. ``mark`` is the number of credits in its metadata."""

    currency: str
    amount: int
    mark: int | None
    takes: int
    left: int


def refund(
    engine: sa.Engine,
    config: Config,
    purchase: UUID,
    *,
    credits: int | None = None,
    amount: int | None = None,
    keep_credits: bool = False,
    key: str,
) -> CreditTransaction:
    """Send money back through Stripe, and take the credits that it bought.

    Pass ``credits`` to take exactly these and send their money, rounded down to an amount that Stripe accepts; or
    ``amount`` minor units to take the credits that follow from the purchase's rounding; or neither for all that is
    left. With ``keep_credits`` no credits are taken, as for goodwill or a tax. ``key`` is the caller's name for this
    refund: the same call again sends nothing more. Returns the purchase; the refund is a row of its own that names it.

    Raises:
        InvalidArgument, UnknownPurchase, PurchaseNotCompleted, RefundExceedsPurchase: nothing was sent.
        StripeUnavailable: call again with the same ``key``.
        StripeNotConfigured, StripeRefused: nothing was sent.
    """
    storable("key", key, KEY_MAX)
    effects = Effects(engine, config)
    bought, charge, sent = _facts(effects, purchase)
    made = next((one for one in sent if one["metadata"].get(REFUND_KEY) == key), None)
    if made is None:
        plan = _plan(effects, bought, charge, sent, credits=credits, amount=amount, keep_credits=keep_credits)
        marks = {} if plan.mark is None else {CREDITS_KEY: str(plan.mark)}
        request: Any = {
            "payment_intent": bought.stripe_payment_intent_id,
            "amount": plan.amount,
            "metadata": {METADATA_KEY: str(bought.id), REFUND_KEY: key, **marks},
        }
        digest = hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()  # Stripe takes 255 characters
        once: Any = {"idempotency_key": f"{bought.id} refund {digest}"}
        made = ask(lambda: effects.client.v1.refunds.create(request, once)).to_dict()
    effect = effects.reversal(made)

    def work(conn: sa.Connection) -> CreditTransaction:
        if effect is not None:
            effect(conn)
        return effects.store.purchase(conn, id=purchase) or bought

    return in_transaction(engine, work)


def preview_refund(
    engine: sa.Engine,
    config: Config,
    purchase: UUID,
    *,
    credits: int | None = None,
    amount: int | None = None,
    keep_credits: bool = False,
    key: str | None = None,
) -> RefundPreview:
    """The effect of ``refund`` with the same arguments; sends and writes nothing.

    If ``key`` was sent already, ``amount`` and ``credits`` are 0.

    Raises what ``refund`` raises.
    """
    effects = Effects(engine, config)
    bought, charge, sent = _facts(effects, purchase)
    if key is not None and any(one["metadata"].get(REFUND_KEY) == key for one in sent):
        left = in_transaction(engine, lambda conn: effects.store.left(conn, bought))
        plan = _Plan(charge["currency"], 0, None, 0, left)
    else:
        plan = _plan(effects, bought, charge, sent, credits=credits, amount=amount, keep_credits=keep_credits)
    account = in_transaction(engine, lambda conn: Accounts(config).get(conn, bought.user_id))
    balance = account.credit_balance
    return RefundPreview(
        purchase=purchase,
        amount=plan.amount,
        currency=plan.currency,
        credits=plan.takes,
        left=plan.left,
        spent=max(0, plan.left - max(0, balance)),
        balance=balance,
        balance_after=balance - plan.takes,
    )


def _facts(effects: Effects, purchase: UUID) -> tuple[CreditTransaction, Object, list[Object]]:
    """The purchase, its charge at Stripe, and its refunds."""
    bought = in_transaction(effects.engine, lambda conn: effects.store.purchase(conn, id=purchase))
    if bought is None:
        raise UnknownPurchase(
            f"there is no purchase {purchase}. Each one's id is in its user's history: tallystick history USER",
            user=None,
            purchase=purchase,
        )
    intent = bought.stripe_payment_intent_id
    v1 = effects.client.v1
    charge = None
    if bought.status == "completed" and bought.amount_paid != 0 and intent is not None:
        charge = ask(lambda: v1.payment_intents.retrieve(intent, {"expand": ["latest_charge"]})).to_dict()[
            "latest_charge"
        ]
    if intent is None or charge is None:
        raise PurchaseNotCompleted(
            f"purchase {purchase} is {bought.status} with {bought.amount_paid or 0} paid through Stripe; "
            "there is no money to send back. To take credits alone: tallystick refund, or ledger.refund in Python",
            purchase=purchase,
            status=str(bought.status),
        )
    sent = [one.to_dict() for one in list_all(lambda: v1.refunds.list({"payment_intent": intent, "limit": PAGE}))]
    return bought, charge, sent


def _plan(
    effects: Effects,
    bought: CreditTransaction,
    charge: Object,
    sent: list[Object],
    *,
    credits: int | None,
    amount: int | None,
    keep_credits: bool,
) -> _Plan:
    """Compute the money and credits of a refund. Raises InvalidArgument, RefundExceedsPurchase."""
    if credits is not None and amount is not None:
        raise InvalidArgument("credits and amount: pass one of them, or neither", argument="amount", value=amount)
    currency, paid = charge["currency"], charge["amount"]
    reversals = [one for one in map(Reversal.of, sent) if one is not None and one.is_gone]
    reversed_shares = [ReversedShare(Fraction(one.amount, paid), one.credits) for one in reversals]

    def facts(conn: sa.Connection) -> tuple[Any, int]:
        return effects.store.rounding(conn, bought), effects.store.left(conn, bought)

    rounding, left = in_transaction(effects.engine, facts)
    worth, left_money = (
        credits_kept(bought.amount, reversed_shares, rounding),
        paid - sum(one.amount for one in reversals),
    )
    if amount is not None:
        money = _whole_amount(bought, amount, left_money, currency)
    else:
        wanted = worth if credits is None else credits
        money = left_money if credits is None else 0
        if credits is not None and 0 < wanted <= worth:
            money = price(wanted, left_credits=worth, left_money=left_money, currency=currency)
        if money < 1 or (worth == 0 and not keep_credits):
            raise RefundExceedsPurchase(
                f"purchase {bought.id} has {worth} of {bought.amount} credits left that money can be sent back for, "
                f"and {left_money} {currency} of the money; asked: {'all' if credits is None else credits}",
                purchase=bought.id,
                left=worth,
                asked=wanted,
            )
    mark = 0 if keep_credits else credits if credits is not None and credits < worth else None
    after = credits_kept(bought.amount, [*reversed_shares, ReversedShare(Fraction(money, paid), mark)], rounding)
    takes = max(0, left - after) if after < worth else 0
    return _Plan(currency, money, mark, takes, left)


def _whole_amount(bought: CreditTransaction, amount: int, left: int, currency: str) -> int:
    """``amount``, if Stripe accepts it. Raises InvalidArgument, RefundExceedsPurchase."""
    step = STEPS.get(currency, 1)
    if amount < 1 or amount % step:
        multiple = f" and a multiple of {step}" if step > 1 else ""
        raise InvalidArgument.of(
            "amount", amount, f"Stripe takes whole minor units of {currency}, at least 1{multiple}"
        )
    if amount > left:
        raise RefundExceedsPurchase(
            f"purchase {bought.id} has {left} {currency} of its money left to send back; asked: {amount}",
            purchase=bought.id,
            left=left,
            asked=amount,
        )
    return amount
