"""Closed days: the ledger's past days, added up for the console's overview, each in a transaction of its own."""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING

from tallystick.database import transaction
from tallystick.ledger.operations import Ledger

if TYPE_CHECKING:
    import sqlalchemy as sa


def close_all_days(engine: sa.Engine, ledger: Ledger, *, seconds: float = math.inf) -> int:
    """Close every day that is over, or as many as ``seconds`` allow; returns the number that stay open.

    A transaction that began before a day's end keeps that day open until it ends. The next call closes it.
    """
    until, before = time.monotonic() + seconds, math.inf
    while True:
        with transaction(engine) as conn:
            left = ledger.close_days(conn)
        if not 0 < left < before or time.monotonic() > until:
            return left
        before = left
