"""Every word a buyer reads, in one place.

To translate, subclass :class:`Texts`, write the sentences anew and pass an instance as ``texts``. A sentence is a
template of ``str.format``; what its braces name is said beside it. Numbers and plurals are methods, since languages
differ in more than words.
"""

from __future__ import annotations

from tallystick.web.money import MINUS, money


class Texts:
    """English. All attributes are text for people; none is HTML."""

    language = "en"

    def credits(self, count: int) -> str:
        """``count`` credits with the noun: "1 credit", "0 credits"."""
        return f"{self.number(count)} {'credit' if abs(count) == 1 else 'credits'}"

    def number(self, value: int) -> str:
        """A whole number, with a true minus sign."""
        return f"{value:,}".replace("-", MINUS)

    def change(self, value: int) -> str:
        """A whole number that always carries its sign."""
        return f"+{value:,}" if value > 0 else self.number(value)

    def money(self, amount: int, currency: str) -> str:
        """``amount`` minor units of ``currency``."""
        return money(amount, currency)
