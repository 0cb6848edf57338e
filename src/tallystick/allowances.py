"""Allowances: credits that a plan gives every week or month, once for each user and period.

Each is a grant that expires when its period ends. Its key names the period and the plan, so nothing is given twice,
and an interrupted run goes on where it stopped. ``give`` serves a user who visits the app; ``run`` serves all users.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import NamedTuple
from uuid import UUID

import sqlalchemy as sa
from sqlalchemy.exc import DBAPIError

from tallystick.accounts import Accounts
from tallystick.config import Allowance, Config, Every
from tallystick.database import (
    DbConnection,
    refuse_hidden_rows,
    refuse_other_than_sqlalchemys,
    run,
    server_message,
    transaction,
)
from tallystick.declared_tables import Schema
from tallystick.errors import Conflict, HostInterfered, Key, LedgerError
from tallystick.ledger import CreditTransaction, Ledger
from tallystick.progress import OnProgress, Progress, ignore_progress
from tallystick.schema import CreditTransactionType

PAGE = 500


class Period(NamedTuple):
    """A week from Monday, or a month, in UTC; ``end`` is the beginning of the next."""

    start: dt.datetime
    end: dt.datetime

    @classmethod
    def of(cls, moment: dt.datetime, every: Every) -> Period:
        """The period that ``moment`` is in."""
        day = moment.astimezone(dt.UTC).replace(hour=0, minute=0, second=0, microsecond=0)
        if every == "week":
            start = day - dt.timedelta(days=day.weekday())
            return cls(start, start + dt.timedelta(days=7))
        start = day.replace(day=1)
        return cls(start, (start + dt.timedelta(days=31)).replace(day=1))


class Paid(NamedTuple):
    """A line of a paid invoice: ``quantity`` of a price, for a period of a subscription's ``item``.

    ``key`` names the line, once for all deliveries.
    """

    price: str
    quantity: int
    item: str
    period: Period
    key: str


@dataclass(frozen=True, slots=True)
class RefusedAllowance:
    """A user who got no allowance, and the reason. ``error`` is the name of an error's type, ``message`` its text."""

    user: Key
    error: str
    message: str


@dataclass(frozen=True, slots=True)
class AllowanceRun:
    """The result of a run: the number of ``users`` who got an allowance, and those for whom it was ``refused``."""

    users: int
    refused: tuple[RefusedAllowance, ...]


class Allowances:
    """The allowances of ``config``, by plan. Holds no connection and no state; share it freely."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.ledger, self.accounts = Ledger(config), Accounts(config)
        self.schema = Schema.of(config.host)
        self.plans = {each.plan_tier: each for each in config.allowances if each.stripe_price_id is None}
        self.prices = {each.stripe_price_id: each for each in config.allowances if each.stripe_price_id is not None}

    def give(self, conn: DbConnection, user: Key) -> CreditTransaction | None:
        """Grant the allowance of the user's plan for this period, by the server's clock; None if it was given already.

        A plan with a ``stripe_price_id`` gives nothing here: its paid invoices do. The rest of the last period is
        carried over, up to the plan's ``rollover``. A plan that is changed within a period gives the difference, where
        the new one gives more; nothing is taken back.

        Raises:
            UnknownUser, BalanceOutOfRange: nothing was written.
            InvalidArgument: ``conn`` is not SQLAlchemy's, or asynchronous: ``await conn.run_sync(give, user)``.
        """
        refuse_other_than_sqlalchemys(conn)
        account = self.accounts.get(conn, user)
        allowance = self.plans.get(account.plan_tier)
        if allowance is None or account.deleted_at is not None:
            return None
        self.ledger.lock(conn, user)  # no other caller gives it meanwhile
        period = Period.of(_now(conn), allowance.every)
        key = _key(period, allowance)
        keys = [_key(period, plan) for plan in self.plans.values() if plan.every == allowance.every]
        given = self._given(conn, user, self.schema.credit_transactions.c.idempotency_key.in_(keys))
        if key in given or sum(given.values()) >= allowance.credits:
            return None
        # Also of plans that the settings have no more. This reads all rows of the period, so it comes second.
        given = self._given(conn, user, self._is_of(period, allowance.every))
        if sum(given.values()) >= allowance.credits:
            return None
        self.ledger.lock(conn, user)  # writes what has expired if the last period has ended since the first lock
        carried = 0 if given else min(allowance.rollover, self._left(conn, user, period, allowance.every))
        credits = allowance.credits - sum(given.values())
        more = f", {carried} of them carried over" if carried else ""
        return self.ledger.grant(
            conn,
            user,
            credits=credits + carried,
            key=key,
            description=f"Allowance of the plan {allowance.plan_tier} until {period.end:%Y-%m-%d}{more}",
            metadata={"allowance": credits, "carried_over": carried},
            expires_at=period.end,
        )

    def give_paid(self, conn: DbConnection, user: Key, paid: Paid) -> CreditTransaction | None:
        """Grant the credits of a line of a paid invoice, until the end of its period; None if they were given already.

        Credits left of the item's last period are carried over, up to the allowance's ``rollover``. A price or quantity
        that is changed within a period gives the difference, where the new one gives more; nothing is taken back.

        Raises:
            UnknownUser, UserDeleted, BalanceOutOfRange: nothing was written.
            InvalidArgument: the period is over; nothing was written.
        """
        allowance = self.prices[paid.price]
        self.ledger.lock(conn, user)  # as in give
        key = f"{_of_item(paid.item)}{paid.key}"
        given = self._given_paid(conn, user, paid.item, until=paid.period.end)
        credits = allowance.credits * paid.quantity - sum(amount for _, _, amount in given)
        if key in {key for _, key, _ in given} or credits <= 0:
            return None
        last = [] if given else [id for id, _, _ in self._given_paid(conn, user, paid.item, until=paid.period.start)]
        carried = min(allowance.rollover, self._expired_of(conn, last)) if last else 0
        more = f", {carried} of them carried over" if carried else ""
        return self.ledger.grant(
            conn,
            user,
            credits=credits + carried,
            key=key,
            description=f"Allowance of the plan {allowance.plan_tier} until {paid.period.end:%Y-%m-%d}{more}",
            metadata={"allowance": credits, "carried_over": carried},
            expires_at=paid.period.end,
        )

    def run(self, engine: sa.Engine, *, progress: OnProgress = ignore_progress) -> AllowanceRun:
        """Give all users their allowances, each in a transaction of its own.

        A user whose allowance is refused, or whom another transaction has locked for some seconds (the connection's
        ``lock_timeout``, else five), does not stop the others; the result has the reason. ``progress`` counts the users
        done. Run it again after an interruption: it skips the users who have theirs.

        Raises:
            PermissionDenied: row level security hides users or rows of the ledger from this role.
            DatabaseError: the database did not answer. Users before this one have got theirs.
        """
        if not self.plans:
            return AllowanceRun(0, ())  # paid invoices give all of them
        read = [(table.schema or "", table.name) for table in (self.schema.users, self.schema.credit_transactions)]
        with transaction(engine) as conn:
            refuse_hidden_rows(conn, read, "who has got an allowance")
        got = 0
        refused: list[RefusedAllowance] = []
        for done, user in enumerate(self._users(engine), 1):
            try:
                with transaction(engine) as conn:
                    run(conn, _WAIT_FOR_SECONDS, {})
                    got += self.give(conn, user) is not None
            except (LedgerError, HostInterfered, Conflict, DBAPIError) as error:  # the last is a trigger's of the host
                refused.append(RefusedAllowance(user, type(error).__name__, server_message(error)))
            progress(Progress("allowances", done))
        return AllowanceRun(got, tuple(refused))

    def _users(self, engine: sa.Engine) -> Iterator[Key]:
        """The users without this period's allowance of their plan, in the order of their keys."""
        users, row = self.schema.users.c, self.schema.credit_transactions.c
        last: Key | None = None
        while True:
            with engine.connect() as conn:
                now = _now(conn)
                keys_now = {plan.plan_tier: _key(Period.of(now, plan.every), plan) for plan in self.plans.values()}
                key_now = sa.case(keys_now, value=users.plan_tier)
                has = sa.exists().where(row.user_id == users.key, row.idempotency_key == key_now)
                page = sa.select(users.key).where(
                    users.plan_tier.in_(list(self.plans)), users.deleted_at.is_(None), ~has
                )
                if last is not None:
                    page = page.where(users.key > last)
                keys = run(conn, page.order_by(users.key).limit(PAGE), {}).scalars().all()
            yield from keys
            if len(keys) < PAGE:
                return
            last = keys[-1]

    def _given(self, conn: DbConnection, user: Key, of: sa.ColumnElement[bool]) -> dict[str, int]:
        """The credits given, by the plan's key, without those that were carried over."""
        row = self.schema.credit_transactions.c
        given = sa.select(row.idempotency_key, self._credits()).where(row.user_id == self.schema.user_key(user), of)
        return {key: int(credits) for key, credits in run(conn, given, {})}

    def _left(self, conn: DbConnection, user: Key, period: Period, every: Every) -> int:
        """The credits of the last period's allowance that expired."""
        row = self.schema.credit_transactions.c
        before = Period.of(period.start - dt.timedelta(days=1), every)
        gave = sa.select(row.id).where(row.user_id == self.schema.user_key(user), self._is_of(before, every))
        return self._expired_of(conn, run(conn, gave, {}).scalars().all())

    def _expired_of(self, conn: DbConnection, grants: Sequence[UUID]) -> int:
        """The credits of grants that expired, also where merges moved them to another account and back."""
        row = self.schema.credit_transactions.c
        expired = sa.select(sa.func.coalesce(sa.func.sum(sa.func.tallystick.expired(row.id)), 0))
        return int(run(conn, expired.where(row.id.in_(grants)), {}).scalar_one())

    def _given_paid(
        self, conn: DbConnection, user: Key, item: str, *, until: dt.datetime
    ) -> list[tuple[UUID, str, int]]:
        """The grants for a subscription's item that expire then: id, key, and credits without those carried over."""
        row = self.schema.credit_transactions.c
        given = sa.select(row.id, row.idempotency_key, self._credits()).where(
            row.user_id == self.schema.user_key(user),
            row.type == CreditTransactionType.GRANT,
            row.expires_at == until,
            sa.func.starts_with(row.idempotency_key, _of_item(item)),
        )
        return [(id, key, int(credits)) for id, key, credits in run(conn, given, {})]

    def _credits(self) -> sa.ColumnElement[Decimal]:
        """The credits of a grant without those that were carried over; all of them where the row does not say.

        ``Accounts.erase`` removes the metadata, and the app may have made a grant under a key of ours.
        """
        row = self.schema.credit_transactions.c
        own = row.metadata["allowance"].as_string()
        return sa.case((own.regexp_match("^[0-9]{1,19}$"), own.cast(sa.Numeric)), else_=row.amount.cast(sa.Numeric))

    def _is_of(self, period: Period, every: Every) -> sa.ColumnElement[bool]:
        """True for the grants of a period, of any plan."""
        row = self.schema.credit_transactions.c
        # found by the index of completed_at, among the period's rows; a clock may be set back by less than a day
        since = row.completed_at >= period.start - dt.timedelta(days=1)
        return sa.and_(since, sa.func.starts_with(row.idempotency_key, _of_period(period, every)))


_WAIT_FOR_SECONDS = sa.text("""
    SELECT pg_catalog.set_config('lock_timeout', '5s', true) WHERE pg_catalog.current_setting('lock_timeout') = '0'
""")


def _now(conn: DbConnection) -> dt.datetime:
    """The present moment, by the server's clock."""
    now: dt.datetime = run(conn, sa.select(sa.func.clock_timestamp()), {}).scalar_one()
    return now


def _of_item(item: str) -> str:
    """The beginning of the keys of a subscription's item: ``Accounts.erase`` removes metadata, and no key of ours."""
    return f"tallystick:allowance:item:{item}:"


def _of_period(period: Period, every: Every) -> str:
    """The beginning of the keys of a period; the plan follows."""
    return f"tallystick:allowance:{every}:{period.start:%Y-%m-%d}:"


def _key(period: Period, allowance: Allowance) -> str:
    return f"{_of_period(period, allowance.every)}{allowance.plan_tier}"
