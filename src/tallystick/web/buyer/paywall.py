"""A user's workshops and what opens them. Each operation takes a connection and knows no web framework."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import sqlalchemy as sa

from tallystick.config import Config
from tallystick.database import run
from tallystick.errors import (
    InvalidArgument,
    Key,
    UnknownWorkshop,
    WorkshopDeleted,
    WorkshopLocked,
    WorkshopNotOwned,
    shown,
)
from tallystick.ledger import Access, AccessReason, CreditTransaction, Ledger, Standing
from tallystick.ledger.outcomes import Refusal, error_of

UNLOCK_CREDITS: Final = 1
"""The credits that open a workshop."""


@dataclass(frozen=True, slots=True)
class Workshop:
    """A workshop as its owner sees it. ``title`` is None where the host maps none."""

    key: Key
    title: str | None
    access: Access

    def require_there(self) -> None:
        """Raises WorkshopDeleted: no credit opens it again."""
        if self.access.reason is AccessReason.DELETED:
            raise WorkshopDeleted(
                f"workshop {self.key} was deleted. To bring it back: Accounts.restore_workshop", workshop=self.key
            )


class Paywall:
    """Reads and opens the workshops of one configuration. Holds no connection."""

    def __init__(self, config: Config) -> None:
        self.ledger = Ledger(config)
        self._schema = self.ledger.schema

    def workshop(self, conn: sa.Connection, user: Key, workshop: object) -> Workshop:
        """A workshop of the user's, from its key or the text of it in an address.

        Raises:
            UnknownWorkshop, WorkshopNotOwned.
        """
        key = self._key(workshop)
        table = self._schema.workshops
        assert table is not None  # noqa: S101 - _key refuses a host without workshops
        title = table.c.title if "title" in table.c else sa.null()
        # compared by the database, which knows when two texts are one key (citext, char)
        is_theirs = table.c.owner == sa.bindparam("p_user", type_=table.c.owner.type)
        row = run(
            conn,
            sa.select(is_theirs, title).where(table.c.key == sa.bindparam("p_workshop", type_=table.c.key.type)),
            {"p_workshop": key, "p_user": self._schema.user_key(user)},
        ).one_or_none()
        if row is None:
            raise UnknownWorkshop(f"no workshop {key!r}", workshop=key)
        if not row[0]:
            raise WorkshopNotOwned(f"workshop {key} belongs to another user than {user}", workshop=key, user=user)
        return Workshop(key, row[1], self.ledger.access(conn, key))

    def workshop_and_standing(self, conn: sa.Connection, user: Key, workshop: object) -> tuple[Workshop, Standing]:
        """As ``workshop``, and the user's credits."""
        return self.workshop(conn, user, workshop), self.ledger.standing(conn, user)

    def require_open(self, conn: sa.Connection, user: Key, workshop: object) -> Access:
        """The access of a workshop that is open and the user's.

        Raises:
            WorkshopLocked, WorkshopDeleted, UnknownWorkshop, WorkshopNotOwned.
        """
        found = self.workshop(conn, user, workshop)
        found.require_there()
        if not found.access.open:
            now = self.ledger.standing(conn, user)
            raise WorkshopLocked(
                f"workshop {found.key} is {found.access.reason}. To open it: POST …/workshops/{found.key}/unlock",
                workshop=found.key,
                title=found.title,
                user=user,
                balance=now.balance,
                held=now.held,
                available=now.available,
                required=UNLOCK_CREDITS,
            )
        return found.access

    def require_credits(self, conn: sa.Connection, user: Key, amount: int) -> int:
        """The credits that can be spent, if they are at least ``amount``. Raises InsufficientCredits, UnknownUser."""
        now = self.ledger.standing(conn, user)
        if now.available < amount:
            raise error_of(
                "insufficient_credits",
                Refusal({"user_id": user}, balance=now.balance, held=now.held, required=amount),
            )
        return now.available

    def unlock(self, conn: sa.Connection, user: Key, workshop: object, *, key: str | None = None) -> CreditTransaction:
        """Spend a credit on a workshop; ``key`` is the client's name for this intent.

        Without one the workshop itself names the intent, since it is paid for once. A client's keys are kept apart
        from the host's and Stripe's, so that nobody can occupy one of those.

        Raises:
            InsufficientCredits, IdempotencyKeyReused, UnknownWorkshop, WorkshopNotOwned, WorkshopDeleted, …
        """
        opened = self._key(workshop)
        name = f"web:key:{key}" if key is not None else f"web:unlock:{opened}"
        return self.ledger.consume(conn, user, workshop=opened, credits=UNLOCK_CREDITS, key=name)

    def _key(self, text: object) -> Key:
        """The key that ``text`` in an address stands for. Raises UnknownWorkshop where it can be none."""
        schema = self._schema
        try:
            return schema.workshop_key_of(text) if isinstance(text, str) else schema.workshop_key(text)
        except InvalidArgument:
            raise UnknownWorkshop(f"no workshop {shown(text)}", workshop=shown(text)) from None
