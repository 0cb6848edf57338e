"""The arithmetic of refunds: the credits that a purchase keeps, and the money that stands for credits."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction

from tallystick.config import Rounding

STEPS = {"isk": 100, "ugx": 100} | dict.fromkeys(("bhd", "jod", "kwd", "omr", "tnd"), 10)
"""Currencies in which Stripe takes only amounts that are a multiple of this many minor units."""


@dataclass(frozen=True, slots=True)
class Gone:
    """Money that is no longer the shop's: its share of what was paid, and the credits that a mark says it takes."""

    share: Fraction
    credits: int | None = None


def kept(granted: int, gone: Iterable[Gone], rounding: Rounding) -> int:
    """The credits that a purchase of ``granted`` keeps.

    Marked refunds take the credits of their marks. The rest of the credits stands for the rest of the money, and the
    unmarked refunds take their part of it: rounded once, over all of them, so that rounding never adds up. When all of
    that money is gone, nothing is kept.
    """
    gone = list(gone)
    credits = max(0, granted - sum(one.credits for one in gone if one.credits is not None))
    share = sum((one.share for one in gone if one.credits is None), Fraction())
    rest = 1 - sum((one.share for one in gone if one.credits is not None), Fraction())
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
    """The money for ``credits`` of ``left_credits``, for which ``left_money`` minor units stand.

    Rounded down to an amount that Stripe takes; all of the credits are worth all of the money.
    """
    if credits == left_credits:
        return left_money
    amount = left_money * credits // left_credits
    return amount - amount % STEPS.get(currency, 1)
