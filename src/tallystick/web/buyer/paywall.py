"""A user's workshops: reading and unlocking them. Each operation takes a connection and uses no web framework."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any, Final

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql as pg

from tallystick.config import Config
from tallystick.database import run, translated
from tallystick.declared_tables import Schema
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
from tallystick.ledger.connections import PLAIN_ANSWER, Rows, SyncConnection, as_text
from tallystick.ledger.outcomes import Refusal, error_of
from tallystick.web.shared.client_keys import ledger_key

UNLOCK_CREDITS: Final = 1
"""The credits that open a workshop."""

_FREE: Final = (AccessReason.GRANDFATHERED, AccessReason.PAYWALL_OFF)
"""The reasons for which a workshop is open although nobody paid for it."""

# One statement, so that unlocking is one round trip. consume refuses an amount of 0 before it reads anything.
# Names for the columns of access keep those of consume unambiguous.
_UNLOCK: Final = (
    f"SELECT reason, {PLAIN_ANSWER} FROM "  # noqa: S608 - names of ours
    "tallystick.access(%s, %s, %s) AS access (access_outcome, its_workshop, is_open, reason, its_deletion), "
    "LATERAL tallystick.consume(user_id => %s, key => %s, workshop_id => %s, amount => "
    f"CASE WHEN reason IN ('{_FREE[0]}', '{_FREE[1]}') THEN 0 ELSE {UNLOCK_CREDITS} END)"
)


@dataclass(frozen=True, slots=True)
class Workshop:
    """A workshop for its owner. ``title`` is None if the host maps none."""

    key: Key
    title: str | None
    access: Access

    def require_not_deleted(self) -> None:
        """Raise WorkshopDeleted if it is deleted: no credit opens it again."""
        if self.access.reason is AccessReason.DELETED:
            raise WorkshopDeleted(
                f"workshop {self.key} was deleted. To bring it back: tallystick workshops restore, or "
                "Accounts.restore_workshop",
                workshop=self.key,
            )


class Paywall:
    """The paywall of one configuration: reads and unlocks workshops. Holds no connection."""

    def __init__(self, config: Config) -> None:
        self.ledger = Ledger(config)
        self._schema = Schema.of(config.host)
        if self._schema.workshops is None:
            return
        self._statement = self._select(self._schema.workshops)
        driver = pg.dialect(paramstyle="pyformat")  # type: ignore[no-untyped-call]
        self._text = str(self._statement.compile(dialect=driver))  # for a cursor of the driver's or Django's
        self._paywall = {"p_paywall": config.paywall, "p_before": config.grandfathered_before}

    def _select(self, workshops: sa.Table) -> sa.Select[Any]:
        """The statement for a workshop and a user; the ledger's function decides if it is open."""
        w, u = workshops.c, self._schema.users.c
        key = sa.bindparam("p_workshop", type_=w.key.type)
        access = (
            sa.func.tallystick.access(
                w.key,
                sa.bindparam("p_paywall", type_=sa.Boolean),
                sa.bindparam("p_before", type_=sa.DateTime(timezone=True)),
            )
            .table_valued(sa.column("open"), sa.column("reason"))
            .alias("access")
        )
        # compared by the database, where different texts may be the same key (citext, char)
        owner = self._schema.owner
        is_theirs = owner == sa.bindparam("p_user", type_=owner.type)
        title = sa.null() if self._schema.title is None else self._schema.title
        standing = self._schema.balance, u.credit_held, u.credit_due_at
        return (
            sa.select(is_theirs, title, access.c.open, access.c.reason, u.key.is_not(None), *standing)
            .select_from(workshops.outerjoin(self._schema.users, u.key == sa.bindparam("p_key", type_=u.key.type)))
            .join(access, sa.true())
            .where(w.key == key)
        )

    def workshop(self, conn: SyncConnection, user: Key, workshop: object) -> Workshop:
        """A workshop of the user's, by its key or the text of the key in an address.

        Raises:
            UnknownWorkshop, WorkshopNotOwned.
        """
        return self._read(conn, user, workshop)[0]

    def workshop_and_standing(self, conn: SyncConnection, user: Key, workshop: object) -> tuple[Workshop, Standing]:
        """As ``workshop``, and the user's credits: one statement, unless some of them may have expired."""
        found, now = self._read(conn, user, workshop)
        return found, now if now.due_at is None else self.ledger.standing(conn, user)

    def _read(self, conn: SyncConnection, user: Key, workshop: object) -> tuple[Workshop, Standing]:
        key = self._key(workshop)
        owner = self._schema.user_key(user)
        values = {"p_workshop": key, "p_user": owner, "p_key": owner, **self._paywall}
        row: Any
        if isinstance(conn, sa.Connection):
            row = run(conn, self._statement, values).one_or_none()
        else:
            row = next(iter(_rows(conn, self._text, values)), None)
        if row is None:
            raise UnknownWorkshop(f"no workshop {key!r}", workshop=key)
        is_theirs, title, is_open, reason, is_there, *standing = row
        if not is_theirs:
            raise WorkshopNotOwned(f"workshop {key} belongs to another user than {user}", workshop=key, user=user)
        now = Standing(*standing) if is_there else self.ledger.standing(conn, user)  # raises UnknownUser
        return Workshop(key, title, Access(open=is_open, reason=AccessReason(reason))), now

    def require_open(self, conn: SyncConnection, user: Key, workshop: object) -> Access:
        """The access of a workshop that is open and the user's.

        Raises:
            WorkshopLocked, WorkshopDeleted, UnknownWorkshop, WorkshopNotOwned.
        """
        found, now = self.workshop_and_standing(conn, user, workshop)
        found.require_not_deleted()
        if not found.access.open:
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

    def require_credits(self, conn: SyncConnection, user: Key, amount: int) -> int:
        """The credits that can be spent, if they are at least ``amount``. Raises InsufficientCredits, UnknownUser."""
        now = self.ledger.standing(conn, user)
        if now.available < amount:
            raise error_of(
                "insufficient_credits",
                Refusal({"user_id": user}, balance=now.balance, held=now.held, required=amount),
            )
        return now.available

    def unlock(
        self, conn: SyncConnection, user: Key, workshop: object, *, key: str | None = None
    ) -> CreditTransaction | None:
        """Spend a credit on a workshop; None, and nothing is spent, if it is open although nobody paid for it.

        ``key`` is the client's name for this intent. Without one the workshop itself is the intent, since it is paid
        for once.

        Raises:
            InsufficientCredits, IdempotencyKeyReused, UnknownWorkshop, WorkshopNotOwned, WorkshopDeleted, …
        """
        opened = self._key(workshop)
        name = ledger_key("key", key) if key is not None else f"web:unlock:{opened}"
        call = self.ledger.consume.call(user, workshop=opened, credits=UNLOCK_CREDITS, key=name)
        sent = call.arguments
        values = (opened, *self._paywall.values(), sent["user_id"], sent["key"], sent["workshop_id"])
        ((reason, *answer),) = _rows(
            conn, _UNLOCK, tuple(None if value is None else as_text(value) for value in values)
        )
        if reason in _FREE:
            self.workshop(conn, user, opened)  # it must be the user's
            return None
        return call.read([answer])

    def _key(self, text: object) -> Key:
        """The key for ``text`` in an address. Raises UnknownWorkshop if it is no key."""
        schema = self._schema
        try:
            return schema.workshop_key_of(text) if isinstance(text, str) else schema.workshop_key(text)
        except InvalidArgument:
            raise UnknownWorkshop(f"no workshop {shown(text)}", workshop=shown(text)) from None


def _rows(conn: SyncConnection, text: str, values: Mapping[str, Any] | Sequence[Any]) -> Rows:
    """The rows of a statement, on the driver's connection, SQLAlchemy's or Django's."""
    with translated():
        if isinstance(conn, sa.Connection):
            return conn.exec_driver_sql(text, values).fetchall()
        connection: Any = conn
        with closing(connection.cursor()) as cursor:
            cursor.execute(text, values)
            rows: Rows = cursor.fetchall()
            return rows
