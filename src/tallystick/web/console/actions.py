"""Actions of an operator, if the console was started to allow them: grant credits, refund a purchase's.

1. A review shows the reason, and the balance before and after.
2. The action has a key that was made for the form, so a double click, a reload or the back button does not repeat it.
3. The key in the ledger's row names the operator; the log also has the reason.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace

import sqlalchemy as sa

from tallystick.config import CREDITS_MAX, Config
from tallystick.database import transaction
from tallystick.errors import LedgerError, TallystickError
from tallystick.ledger import CreditTransaction, Ledger, close_all_days
from tallystick.web.console.queries import LedgerRow, UserRow

log = logging.getLogger("tallystick.console")

REASON_MAX = 500
KEY_PREFIX = "console"
CLOSING_S = 5


@dataclass(frozen=True, slots=True)
class Review:
    """An action as filled in so far. ``fault`` is the error in it, if any.

    ``complete`` is true if nothing is missing. Even then the ledger decides when the action is performed: the fault may
    be that it was performed already.
    """

    name: str
    user: UserRow
    credits: int | None
    reason: str
    filled_in: bool  # something was filled in
    complete: bool
    fault: str | None
    purchase: LedgerRow | None
    left: int | None  # of the purchase

    @property
    def change(self) -> int:
        """The change of the balance."""
        return (self.credits or 0) * (-1 if self.name == "refund" else 1)

    @property
    def spent(self) -> int:
        """The number of the purchase's credits that are spent already."""
        return max(0, (self.left or 0) - max(0, self.user.credit_balance))

    @property
    def after(self) -> int:
        """The balance afterwards, if nothing else happens in between."""
        return self.user.credit_balance + self.change


class Actions:
    """Actions through the ledger, each in a transaction of its own."""

    names = ("grant", "refund")

    def __init__(self, config: Config, engine: sa.Engine) -> None:
        self._ledger = Ledger(config)
        self._engine = engine
        self._most = CREDITS_MAX[config.host.credits]

    def review(
        self, name: str, user: UserRow, fields: Mapping[str, str], *, purchase: LedgerRow | None, refunded: int
    ) -> Review:
        """The action for ``fields`` (credits, reason), and its fault."""
        reason = fields.get("reason", "").strip()
        left = None if purchase is None else purchase.amount - refunded
        typed = fields.get("credits", "").strip()
        credits = int(typed) if typed.isascii() and typed.isdigit() and len(typed) < 20 else None  # noqa: PLR2004
        enough = credits is not None and 0 < credits <= self._most
        why = 0 < len(reason) <= REASON_MAX and "\0" not in reason
        fault = None
        if purchase is not None and (purchase.type != "purchase" or purchase.status != "completed"):
            fault = "Only a completed purchase can be refunded."
        elif left is not None and left < 1:
            fault = "Nothing of this purchase is left to refund."
        elif name == "grant" and user.deleted_at is not None:
            fault = "This user is deleted. Credits are granted to users who are there."
        elif not enough or (left is not None and (credits or 0) > left):
            most = "" if left is None else f" up to {left:,}, what is left of the purchase"
            fault = f"Say how many credits: a whole number from 1{most}."
        elif not why:
            fault = f"Give a reason of 1 to {REASON_MAX} characters. The user reads it in their history."
        filled_in = bool(typed or reason)
        return Review(name, user, credits, reason, filled_in, enough and why, fault, purchase, left)

    def perform(self, review: Review, *, operator: str, token: str) -> CreditTransaction:
        """Perform it. The same ``token`` again returns the first result.

        Raises:
            LedgerError: refused; nothing was written.
            DatabaseError: it may or may not have been written; the same form may be sent again.
        """
        key = f"{KEY_PREFIX}:{operator}:{token[:64]}"
        credits = review.credits or 0
        try:
            with transaction(self._engine) as conn:
                user, reason = review.user.key, review.reason
                if review.purchase is None:
                    row = self._ledger.grant(conn, user, credits=credits, key=key, description=reason)
                else:
                    purchase = review.purchase.id
                    row = self._ledger.refund(conn, user, purchase, credits=credits, key=key, description=reason)
        except LedgerError as error:
            log.warning(
                "action=%s operator=%r user=%r credits=%d reason=%r refused=%s",
                review.name, operator, review.user.key, credits, review.reason, type(error).__name__,
            )  # fmt: skip
            raise
        log.info(
            "action=%s operator=%r user=%r credits=%d reason=%r transaction=%s replayed=%s",
            review.name, operator, review.user.key, credits, review.reason, row.id, row.replayed,
        )  # fmt: skip
        return row

    def close_days(self) -> None:
        """Add up days that are over, for some seconds. The figures are right without it, so it may be refused."""
        try:
            close_all_days(self._engine, self._ledger, seconds=CLOSING_S)
        except TallystickError as error:
            log.info("days are not closed, and their rows are read: %s", error.message)

    def refused(self, review: Review, error: LedgerError) -> Review:
        """The review again, with what the ledger said."""
        return replace(review, fault=f"Refused: {error.message}.")


def operator_of(idempotency_key: str | None) -> str | None:
    """The operator who made a ledger row in the console, else None."""
    prefix, _, rest = (idempotency_key or "").partition(":")
    return rest.rpartition(":")[0] or None if prefix == KEY_PREFIX else None
