"""Words of the ledger's rows as people should read them."""

from __future__ import annotations

_BOUGHT = "Purchased "


def what(description: str, *, done: bool) -> str:
    """A row's description; of a purchase that is not paid it does not say that it was bought.

    A purchase's row is written before it is paid, with the description that it will have then, and is not changed.
    """
    return description if done else description.removeprefix(_BOUGHT)
