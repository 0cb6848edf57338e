"""Prepaid credits, billing state and onboarding state inside an app's own PostgreSQL, with an audit of every balance.

Each name is imported when it is first used: an app that needs few of them starts faster.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tallystick.accounts import Accounts
    from tallystick.config import Config, HostMapping, Pack, UsersTable, WorkshopsTable
    from tallystick.errors import InsufficientCredits, TallystickError
    from tallystick.ledger import Access, AccessReason, Consume, CreditTransaction, Event, Ledger, Lot, Merged, Standing
    from tallystick.ledger.combiner import Combiner
    from tallystick.progress import Progress
    from tallystick.schema import verify

_HOMES = {
    "accounts": ("Accounts",),
    "config": ("Config", "HostMapping", "Pack", "UsersTable", "WorkshopsTable"),
    "errors": ("InsufficientCredits", "TallystickError"),
    "ledger": (
        "Access",
        "AccessReason",
        "Consume",
        "CreditTransaction",
        "Event",
        "Ledger",
        "Lot",
        "Merged",
        "Standing",
    ),
    "ledger.combiner": ("Combiner",),
    "progress": ("Progress",),
    "schema": ("verify",),
}

__all__ = [
    "Access",
    "AccessReason",
    "Accounts",
    "Combiner",
    "Config",
    "Consume",
    "CreditTransaction",
    "Event",
    "HostMapping",
    "InsufficientCredits",
    "Ledger",
    "Lot",
    "Merged",
    "Pack",
    "Progress",
    "Standing",
    "TallystickError",
    "UsersTable",
    "WorkshopsTable",
    "verify",
]


def __getattr__(name: str) -> Any:
    for module, names in _HOMES.items():
        if name in names:
            found = getattr(importlib.import_module(f"{__name__}.{module}"), name)
            globals()[name] = found
            return found
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
