"""The arithmetic of refunds: the credits that a purchase keeps, and the price of credits."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction

from tallystick.config import Rounding

STEPS = {"isk": 100, "ugx": 100} | dict.fromkeys(("bhd", "jod", "kwd", "omr", "tnd"), 10)
"""Currencies in which Stripe takes only amounts that are a multiple of this many minor units."""


@dataclass(frozen=True, slots=True)
class ReversedShare:
    """A refund or dispute: its share of the payment, and the number of credits in its metadata."""

    share: Fraction
    credits: int | None = None


def credits_kept(granted: int, reversed_shares: Iterable[ReversedShare], rounding: Rounding) -> int:
    """The credits that a purchase of ``granted`` keeps.

    1. A refund with a number of credits takes these.
    2. The other refunds take the same share of the remaining credits as of the remaining money, rounded once over all
       of them, so that rounding errors do not add up.
    3. If they take all of the remaining money, no credits are kept.
    """
    reversed_shares = list(reversed_shares)
    credits = max(0, granted - sum(one.credits for one in reversed_shares if one.credits is not None))
    share = sum((one.share for one in reversed_shares if one.credits is None), Fraction())
    rest = 1 - sum((one.share for one in reversed_shares if one.credits is not None), Fraction())
    if not share:
        return credits
    if share >= rest:
        return 0
    return credits - _rounded(credits * share / rest, rounding)


def _rounded(credits: Fraction, rounding: Rounding) -> int:
    match rounding:
        case "down":
            return credits.numerator // credits.denominator
        case "nearest":
            return (2 * credits.numerator + credits.denominator) // (2 * credits.denominator)
        case "up":
            return -(-credits.numerator // credits.denominator)


def price(credits: int, *, left_credits: int, left_money: int, currency: str) -> int:
    """The money for ``credits`` of ``left_credits``, which are worth ``left_money`` minor units.

    It is rounded down to an amount that Stripe accepts; all of the credits are worth all of the money.
    """
    if credits == left_credits:
        return left_money
    amount = left_money * credits // left_credits
    return amount - amount % STEPS.get(currency, 1)
