"""Descriptions of the ledger's rows for people."""

from __future__ import annotations

_BOUGHT = "Purchased "
_SPENT = "Credit consumed"
_UNDONE = {"reversal": "Reversed: ", "correction": "Corrected: ", "expiry": "Expired: "}


def description_of(description: str, *, done: bool, kind: str = "") -> str:
    """A row's description, without the word for bought or consumed until the row is ``done``.

    A pending row is written with its final description, which is never changed. With ``kind``, the type of a row that
    undoes another, the result is the other row's description.
    """
    if kind in _UNDONE:
        return description.removeprefix(_UNDONE[kind])
    if done:
        return description
    for prefix, instead in ((_BOUGHT, ""), (f"{_SPENT} for ", ""), (_SPENT, "Work")):
        if description.startswith(prefix):
            return instead + description.removeprefix(prefix)
    return description
