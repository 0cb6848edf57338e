"""Prepaid credits, billing state and onboarding state inside an app's own PostgreSQL, kept honest."""

from tallystick.config import Config, HostMapping, Pack, UsersTable, WorkshopsTable
from tallystick.errors import InsufficientCredits, TallystickError
from tallystick.ledger import Access, AccessReason, Consume, CreditTransaction, Ledger

__all__ = [
    "Access",
    "AccessReason",
    "Config",
    "Consume",
    "CreditTransaction",
    "HostMapping",
    "InsufficientCredits",
    "Ledger",
    "Pack",
    "TallystickError",
    "UsersTable",
    "WorkshopsTable",
]
