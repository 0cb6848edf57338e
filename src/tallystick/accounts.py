"""The billing side of a user: onboarding, plan tier, Stripe customer, soft delete and restore.

As in the ledger, each operation is one statement on the caller's connection, and doing it twice changes nothing more.
Nothing here moves a balance.
"""

from __future__ import annotations

import datetime as dt
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from tallystick.config import Config
from tallystick.database import DbConnection, run
from tallystick.errors import InvalidArgument, Key, StripeCustomerConflict, UnknownUser, UnknownWorkshop, shown
from tallystick.schema import Schema

PLAN_TIER_MAX = 32
STRIPE_ID_MAX = 255


@dataclass(frozen=True, slots=True)
class Account:
    """What Tallystick keeps about a user. ``updated_at`` and ``deleted_at`` are as the host's columns give them."""

    user: Key
    credit_balance: int
    onboarding_complete: bool
    stripe_customer_id: str | None
    plan_tier: str
    updated_at: dt.datetime
    deleted_at: dt.datetime | None


class Accounts:
    """The operations for one configuration. Holds no connection and no state; share it freely."""

    def __init__(self, config: Config) -> None:
        self.schema = Schema.of(config.host)
        users = self.schema.users.c
        self._columns = (
            users.key,
            users.credit_balance,
            sa.func.coalesce(users.onboarding_complete, sa.false()),
            users.stripe_customer_id,
            sa.func.coalesce(users.plan_tier, sa.literal_column("'free'", sa.Text())),
            users.updated_at,
            users.deleted_at,
        )

    def get(self, conn: DbConnection, user: Key) -> Account:
        """The account of ``user``. Raises UnknownUser."""
        users = self.schema.users.c
        statement = sa.select(*self._columns).where(users.key == sa.bindparam("p_user", type_=users.key.type))
        return self._one(conn, statement, user)

    def complete_onboarding(self, conn: DbConnection, user: Key) -> Account:
        """The user has seen it through. Raises UnknownUser."""
        return self._update(conn, user, onboarding_complete=sa.true())

    def reset_onboarding(self, conn: DbConnection, user: Key) -> Account:
        """The user is to see it again. Raises UnknownUser."""
        return self._update(conn, user, onboarding_complete=sa.false())

    def set_plan_tier(self, conn: DbConnection, user: Key, plan_tier: str) -> Account:
        """Put the user on a plan, a name of 1 to 32 characters of the host's choosing.

        Raises:
            InvalidArgument, UnknownUser.
        """
        return self._update(conn, user, plan_tier=_name("plan_tier", plan_tier, PLAN_TIER_MAX))

    def set_stripe_customer(
        self, conn: DbConnection, user: Key, stripe_customer_id: str, *, replace: bool = False
    ) -> Account:
        """Tie the user to a Stripe customer; an existing tie to another one stays unless ``replace``.

        Raises:
            InvalidArgument, UnknownUser, StripeCustomerConflict: the user has another customer, or the customer
            is another user's.
        """
        customer = _name("stripe_customer_id", stripe_customer_id, STRIPE_ID_MAX)
        users = self.schema.users
        other = users.alias("other")
        statement = self._where_user(
            sa.update(users)
            .where(
                sa.true() if replace else sa.func.coalesce(users.c.stripe_customer_id, customer) == customer,
                ~sa.select(other.c.key)
                .where(other.c.stripe_customer_id == customer, other.c.key != users.c.key)
                .exists(),
            )
            .values(stripe_customer_id=customer)
        )
        row = run(conn, statement, {"p_user": self.schema.user_key(user)}).one_or_none()
        if row is not None:
            return Account(*row)
        found = self.get(conn, user)
        reason = (
            "another user has this customer"
            if found.stripe_customer_id in (None, customer) or replace
            else f"the user has {found.stripe_customer_id}. To change it: replace=True"
        )
        raise StripeCustomerConflict(
            f"cannot give user {user} the Stripe customer {customer}: {reason}",
            user=user,
            stripe_customer_id=customer,
        )

    def delete_user(self, conn: DbConnection, user: Key) -> Account:
        """Soft-delete: the row and its ledger stay, and nothing can be bought or spent. Keeps the first time.

        Raises:
            UnknownUser.
        """
        return self._update(conn, user, deleted_at=sa.func.coalesce(self.schema.users.c.deleted_at, _now()))

    def restore_user(self, conn: DbConnection, user: Key) -> Account:
        """Undo a soft delete; credits are as they were. Raises UnknownUser."""
        return self._update(conn, user, deleted_at=sa.null())

    def delete_workshop(self, conn: DbConnection, workshop: Key) -> None:
        """Soft-delete a workshop; what unlocked it stays on record. Keeps the first time.

        Raises:
            InvalidArgument, UnknownWorkshop.
        """
        self._delete_workshop(conn, workshop, deleted=True)

    def restore_workshop(self, conn: DbConnection, workshop: Key) -> None:
        """Undo a soft delete of a workshop.

        Raises:
            InvalidArgument, UnknownWorkshop.
        """
        self._delete_workshop(conn, workshop, deleted=False)

    def _delete_workshop(self, conn: DbConnection, workshop: Key, *, deleted: bool) -> None:
        key = self.schema.workshop_key(workshop)  # also refuses a host without workshops
        workshops = self.schema.workshops
        assert workshops is not None  # noqa: S101 - for the type checker
        statement = (
            sa.update(workshops)
            .where(workshops.c.key == sa.bindparam("p_workshop", type_=workshops.c.key.type))
            .values(deleted_at=sa.func.coalesce(workshops.c.deleted_at, _now()) if deleted else sa.null())
            .returning(workshops.c.key)
        )
        if run(conn, statement, {"p_workshop": key}).one_or_none() is None:
            raise UnknownWorkshop(f"no workshop {shown(workshop)}", workshop=workshop)

    def _update(self, conn: DbConnection, user: Key, **values: Any) -> Account:
        return self._one(conn, self._where_user(sa.update(self.schema.users).values(**values)), user)

    def _where_user(self, statement: sa.Update) -> sa.Executable:
        users = self.schema.users.c
        by_key = users.key == sa.bindparam("p_user", type_=users.key.type)
        return statement.where(by_key).returning(*self._columns)

    def _one(self, conn: DbConnection, statement: sa.Executable, user: Key) -> Account:
        row = run(conn, statement, {"p_user": self.schema.user_key(user)}).one_or_none()
        if row is None:
            raise UnknownUser(
                f"no user {shown(user)}. Is it the mapped key (tallystick.toml, host.users.key)?", user=user
            )
        return Account(*row)


def _now() -> Any:
    """The moment in UTC, as text that the server reads as the column's own type.

    A host's ``deleted_at`` may be a ``timestamp`` without time zone, which by custom holds UTC: it ignores the offset
    of a literal, where ``now()`` would be turned into the session's time zone.
    """
    return sa.literal(dt.datetime.now(dt.UTC).isoformat(), sa.types.NullType())


def _name(argument: str, value: object, longest: int) -> str:
    if isinstance(value, str) and 0 < len(value) <= longest and value.isprintable():
        return value
    raise InvalidArgument(
        f"{argument}={shown(value)}: pass a text of 1 to {longest} printable characters", argument=argument, value=value
    )
