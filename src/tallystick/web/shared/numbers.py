"""Numbers for people: credits and changes, and money from minor units, with integer arithmetic only."""

from __future__ import annotations

from typing import Final

MINUS: Final = "\N{MINUS SIGN}"

# By Stripe: https://docs.stripe.com/currencies#minor-units. All others have two decimals.
ZERO_DECIMAL: Final = frozenset(
    ["bif", "clp", "djf", "gnf", "jpy", "kmf", "krw", "mga", "pyg", "rwf", "vnd", "vuv", "xaf", "xof", "xpf"]
)
THREE_DECIMAL: Final = frozenset(["bhd", "jod", "kwd", "omr", "tnd"])

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
    decimals = 0 if code in ZERO_DECIMAL else 3 if code in THREE_DECIMAL else 2
    whole, minor = divmod(abs(amount), 10**decimals)
    digits = f"{whole:,}.{minor:0{decimals}}" if minor else f"{whole:,}"
    sign = MINUS if amount < 0 else ""
    symbol = _SYMBOLS.get(code)
    return f"{sign}{symbol}{digits}" if symbol else f"{sign}{code.upper()}\N{NO-BREAK SPACE}{digits}"
