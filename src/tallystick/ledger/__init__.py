"""The ledger: functions in the database (``sql/``), and their Python face."""

from tallystick.ledger.days import close_all_days
from tallystick.ledger.operations import (
    HISTORY_MAX,
    Access,
    AccessReason,
    Consume,
    CreditTransaction,
    Event,
    Ledger,
    Lot,
    Merged,
    Standing,
)

__all__ = [
    "HISTORY_MAX",
    "Access",
    "AccessReason",
    "Consume",
    "CreditTransaction",
    "Event",
    "Ledger",
    "Lot",
    "Merged",
    "Standing",
    "close_all_days",
]
