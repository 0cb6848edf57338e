"""Words of the ledger's rows as people should read them."""

from __future__ import annotations

_BOUGHT = "Purchased "
_UNDONE = {"reversal": "Reversed: ", "correction": "Corrected: ", "expiry": "Expired: "}


def what(description: str, *, done: bool, kind: str = "") -> str:
    """A row's description; of a purchase that is not paid it does not say that it was bought.

    With ``kind``, the type of a row that undoes another, it is the description of that other one.
    A purchase's row is written before it is paid, with the description that it will have then, and is not changed.
    """
    if kind in _UNDONE:
        return description.removeprefix(_UNDONE[kind])
    return description if done else description.removeprefix(_BOUGHT)
