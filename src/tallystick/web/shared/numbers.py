"""Numbers for people: credits and changes, and money from minor units, with integer arithmetic only."""

from __future__ import annotations

from typing import Final

from tallystick.config import decimals_of

MINUS: Final = "\N{MINUS SIGN}"

_SYMBOLS: Final = {
    "usd": "$",
    "eur": "€",
    "gbp": "£",
    "jpy": "¥",
    "inr": "₹",
    "krw": "₩",
    "cad": "CA$",
    "aud": "A$",
    "nzd": "NZ$",
    "brl": "R$",
    "ils": "₪",
}


def number(value: int) -> str:
    """A whole number, with a true minus sign."""
    return f"{value:,}".replace("-", MINUS)


def change(value: int) -> str:
    """A whole number that always carries its sign."""
    return f"+{value:,}" if value > 0 else number(value)


def money(amount: int, currency: str) -> str:
    """``amount`` minor units of ``currency`` for people: ``14900, "usd"`` is ``$149``, ``7950`` is ``$79.50``.

    A currency without a symbol is named by its code (``CHF 79``). Zero cents are left out.
    """
    code = currency.lower()
    decimals = decimals_of(code)
    whole, minor = divmod(abs(amount), 10**decimals)
    digits = f"{whole:,}.{minor:0{decimals}}" if minor else f"{whole:,}"
    sign = MINUS if amount < 0 else ""
    symbol = _SYMBOLS.get(code)
    return f"{sign}{symbol}{digits}" if symbol else f"{sign}{code.upper()}\N{NO-BREAK SPACE}{digits}"
