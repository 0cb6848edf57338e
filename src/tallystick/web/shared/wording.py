"""Words of the ledger's rows as people should read them."""

from __future__ import annotations

_BOUGHT = "Purchased "
_SPENT = "Credit consumed"
_UNDONE = {"reversal": "Reversed: ", "correction": "Corrected: ", "expiry": "Expired: "}


def what(description: str, *, done: bool, kind: str = "") -> str:
    """A row's description; of a purchase that is not paid, or a hold, it does not say that it was bought, or consumed.

    With ``kind``, the type of a row that undoes another, it is the description of that other one.
    Their rows are written before that, with the description that they will have then, which is not changed.
    """
    if kind in _UNDONE:
        return description.removeprefix(_UNDONE[kind])
    if done:
        return description
    for prefix, instead in ((_BOUGHT, ""), (f"{_SPENT} for ", ""), (_SPENT, "Work")):
        if description.startswith(prefix):
            return instead + description.removeprefix(prefix)
    return description
