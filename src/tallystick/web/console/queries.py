"""The console's queries: bounded statements in read-only transactions, whatever the size of the ledger.

No statement of a page depends on the number of users or rows: lists use keyset pagination on an index, totals of large
tables are the planner's estimates. Slow sums (the credits of all users, and the rows of days that are not closed) are
not made in a request; see ``background``.
"""

from __future__ import annotations

import datetime as dt
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from fractions import Fraction
from itertools import groupby
from typing import Any, Generic, TypeVar
from uuid import UUID

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql as pg

from tallystick.config import TEXT_KEYS, Config
from tallystick.database import Standby, refuse_hidden_rows, standby, transaction, with_known_settings
from tallystick.declared_tables import (
    Schema,
    daily_sums,
    migration_log,
    stripe_failed_deliveries,
    stripe_findings,
    stripe_reversals,
)
from tallystick.declared_tables import days as kept_days
from tallystick.errors import InvalidArgument, Key, UnknownUser
from tallystick.ledger import Ledger, Standing
from tallystick.schema import CreditTransactionStatus

PAGE_ROWS = 50
TALLY_ROWS = 30
CHART_ROWS = 400
COUNT_UP_TO = 1000
REFUSED_KINDS = ("refused", "second_session")  # of findings: what Outcome.REFUSED leaves, if Stripe's extra is there
SUM_ROWS = 5_000
"""The number of a user's newest rows that are summed up."""
ROWS_A_PAGE = 40
"""The estimate of rows in a page of a table that was never analyzed."""
PAGE_TIMEOUT_MS = 5_000
SUM_TIMEOUT_MS = 300_000
DAYS = 30

PENDING, FAILED = CreditTransactionStatus.PENDING, CreditTransactionStatus.FAILED

Row = TypeVar("Row")


@dataclass(frozen=True, slots=True)
class Page(Generic[Row]):
    """A page of a list. ``before`` and ``after`` are cursors to the pages on either side, None at an end."""

    rows: list[Row]
    before: str | None
    after: str | None


@dataclass(frozen=True, slots=True)
class Count:
    """A number of rows: counted up to a thousand, above that an estimate, or "more than" the counted number."""

    number: int
    about: str = ""


@dataclass(frozen=True, slots=True)
class UserRow:
    """A user in a list. Times without a zone in the host's columns are taken as UTC."""

    key: Key
    email: str | None
    credit_balance: int
    credit_sequence: int
    onboarding_complete: bool
    stripe_customer_id: str | None
    plan_tier: str
    updated_at: dt.datetime | None
    deleted_at: dt.datetime | None


@dataclass(frozen=True, slots=True)
class OneUser(UserRow):
    """A user on the user's own page, correct also if credits have expired and no row for it is written yet.

    ``credit_expired`` are these credits: the balance here is lower by them than in the table. Without ``credit_due_at``
    no credits are held or expire.
    """

    credit_held: int
    credit_available: int
    credit_expired: int
    credit_due_at: dt.datetime | None


@dataclass(frozen=True, slots=True)
class Origins:
    """The sums of a user's ledger, by origin.

    ``bought`` are paid credits less refunded ones; ``granted``, ``consumed`` and ``expired`` are less their reversals
    and corrections; ``moved`` came by a merge of two accounts, below 0 if they went. They add up to the balance if
    ``rows`` are all rows. ``paid`` is the money, in minor units, by currency.
    """

    bought: int
    refunded: int
    granted: int
    consumed: int
    expired: int
    moved: int
    paid: dict[str, int]
    rows: int


@dataclass(frozen=True, slots=True)
class LotRow:
    """Credits that expire: ``remaining`` of those that were ``given``, for money if ``paid``."""

    id: UUID
    expires_at: dt.datetime
    remaining: int
    given: int
    paid: bool
    description: str
    amount_paid: int | None
    currency: str | None


@dataclass(frozen=True, slots=True)
class Expiring:
    """The sums of a user's lots: credits that expire, bought and granted, in how many lots."""

    bought: int
    granted: int
    lots: int


@dataclass(frozen=True, slots=True)
class Notch:
    """The fields of a ledger row for the tally."""

    id: UUID
    status: str
    amount: int
    balance_after: int | None
    sequence: int | None
    refund_of: UUID | None


@dataclass(frozen=True, slots=True)
class LedgerRow:
    """A ledger row for the user's page."""

    id: UUID
    type: str
    status: str
    amount: int
    balance_after: int | None
    sequence: int | None
    description: str
    workshop_id: Key | None
    workshop_title: str | None
    refund_of: UUID | None
    stripe_session_id: str | None
    stripe_payment_intent_id: str | None
    stripe_price_id: str | None
    amount_paid: int | None
    currency: str | None
    idempotency_key: str | None
    created_at: dt.datetime
    completed_at: dt.datetime | None
    expires_at: dt.datetime | None
    held: int | None
    capture_limit: int | None

    @property
    def state(self) -> str:
        """The status; for a hold ``held``, ``captured``, ``released`` or ``expired``."""
        if self.held is None:
            return self.status
        if self.status == PENDING:
            return "held" if self.expires_at is None or self.expires_at > dt.datetime.now(dt.UTC) else "expired"
        return "captured" if self.sequence is not None else "released" if self.capture_limit == 0 else "expired"


@dataclass(frozen=True, slots=True)
class PendingRow:
    """A pending purchase."""

    id: UUID
    user_id: Key
    email: str | None
    amount: int
    description: str
    stripe_session_id: str | None
    created_at: dt.datetime


@dataclass(frozen=True, slots=True)
class LostDelivery:
    """A failed delivery of Stripe's, and the reason of the last attempt."""

    event_id: str
    type: str
    object_id: str
    reason: str
    attempts: int
    first_at: dt.datetime
    last_at: dt.datetime


@dataclass(frozen=True, slots=True)
class RefusedPayment:
    """An open finding about an object of Stripe's whose effect the ledger refused, and the reason."""

    object_id: str
    reason: str
    seen_at: dt.datetime


@dataclass(frozen=True, slots=True)
class MigrationRun:
    """A run of a migration, from ``migration_log``; times in milliseconds, None if not measured."""

    id: int
    revision: str
    direction: str
    applied_at: dt.datetime
    adopted: list[str]
    attempts: int
    locked_ms: float | None
    duration_ms: float | None
    waited_for: list[Any]


@dataclass(frozen=True, slots=True)
class Waiting:
    """Pending purchases by age; ``counted_all`` is false if there are more than were counted."""

    total: int
    under_an_hour: int
    under_a_day: int
    older: int
    oldest: dt.datetime | None
    counted_all: bool


@dataclass(frozen=True, slots=True)
class Day:
    """Credits that moved on one UTC day, less reversals and the like of that day.

    A reversal lowers ``consumed``, a correction ``granted``, a reinstatement ``refunded``. A day with more of these has
    a number below 0, so that the sum of the days is right.
    """

    date: dt.date
    sold: int = 0
    granted: int = 0
    consumed: int = 0
    refunded: int = 0
    expired: int = 0


@dataclass(frozen=True, slots=True)
class Holdings:
    """The credits of all users: those not yet spent, and those that users in debt owe, both as positive numbers."""

    outstanding: int
    holders: int
    debt: int
    debtors: int


@dataclass(frozen=True, slots=True)
class Money:
    """Payments: minor units of ``currency`` in the last 30 days and in the 30 before, and the credits sold for them.

    ``back`` and ``back_before`` are the refunds and disputes in these times that the ledger applied.
    """

    currency: str
    now: int = 0
    before: int = 0
    credits: int = 0
    back: int = 0
    back_before: int = 0

    @property
    def average(self) -> Fraction | None:
        """Minor units for a credit, None if none was sold."""
        return Fraction(self.now + self.before, self.credits) if self.credits else None


@dataclass(frozen=True, slots=True)
class Figures:
    """The sums of the overview: 60 days, the oldest first, their payments, and the present credits of users."""

    days: list[Day]
    money: list[Money]
    holdings: Holdings

    def total(self, name: str, *, earlier: bool = False) -> int:
        """``sold``, ``consumed``, … of the last 30 days, or of the 30 before."""
        days = self.days[:DAYS] if earlier else self.days[DAYS:]
        return sum(getattr(day, name) for day in days)


class Queries:
    """The queries on one database. Every method opens and ends a read-only transaction of its own.

    Raises:
        DatabaseError, NotMigrated: from every method.
    """

    def __init__(self, config: Config, engine: sa.Engine) -> None:
        self.config = config
        self.engine = with_known_settings(engine, read_only=True)
        self.schema = Schema.of(config.host)
        self._balances = Ledger(config)
        self._users = self.schema.users.c
        self._ledger = self.schema.credit_transactions.c

    @contextmanager
    def reading(self, *, timeout_ms: int = PAGE_TIMEOUT_MS) -> Iterator[sa.Connection]:
        """A read-only transaction, in which PostgreSQL refuses writes, with a statement timeout."""
        with transaction(self.engine) as reader:
            reader.execute(sa.select(sa.func.set_config("statement_timeout", str(timeout_ms), sa.true())))
            yield reader

    def streamed(self, statement: sa.Select[Any], row: Callable[..., Row]) -> Iterator[Row]:
        """All rows of a statement, read as they are used; ``row`` makes one of its columns."""
        with self.reading(timeout_ms=SUM_TIMEOUT_MS) as conn:
            for found in conn.execution_options(yield_per=1000).execute(statement):
                yield row(*found)

    def age(self) -> Standby | None:
        """The standby that is read from, with its age; None if it is none."""
        with self.reading() as conn:
            return standby(conn)

    def require_all_rows(self) -> None:
        """Raise PermissionDenied if row level security hides rows that the overview counts or adds up."""
        tables = self.schema.users, self.schema.credit_transactions, daily_sums, kept_days, stripe_reversals
        with self.reading() as conn:
            refuse_hidden_rows(conn, [(table.schema or "", table.name) for table in tables], "what there is in all")

    # --- users ---

    def sizes(self) -> tuple[Count, Count]:
        """The numbers of users and of ledger rows, estimated for large tables.

        An estimate is the planner's: rows a page when the table was last analyzed, times its present pages.
        """
        users, ledger = self.schema.users, self.schema.credit_transactions
        with self.reading() as conn:
            return _size(conn, users, users.c.key), _size(conn, ledger, ledger.c.id)

    def user(self, key: Key) -> OneUser:
        """The user with this key, in one statement unless credits are held or expire. Raises UnknownUser."""
        c = self._users
        with self.reading() as conn:
            statement = self._select_users().add_columns(c.credit_held, c.credit_due_at)
            row = conn.execute(statement.where(self._is_user(key))).one_or_none()
            if row is None:
                raise UnknownUser(f"no user {key!r}. Search by another key or e-mail", user=key)
            *shown_in_lists, held, due = row
            user = _user(*shown_in_lists)
            now = Standing(user.credit_balance, held) if due is None else self._balances.standing(conn, user.key)
        listed = {field.name: getattr(user, field.name) for field in fields(user)} | {"credit_balance": now.balance}
        return OneUser(
            **listed,
            credit_held=now.held,
            credit_available=now.available,
            credit_expired=user.credit_balance - now.balance,
            credit_due_at=due,
        )

    def users(self, *, search: str = "") -> Listing[UserRow]:
        """Users by key, ascending.

        ``search`` is tried as a user's key, then as an id of a user's object (customer, session, payment intent, credit
        transaction), then as a whole e-mail address, then as a part of one.
        """
        users = self._select_users().where(self._matches(search))
        return Listing(self, users, (self._users.key,), _user, self._cursor)

    def tallies(self, keys: Sequence[Key]) -> dict[Key, list[Notch]]:
        """The last completed rows of each of these users, and their pending ones."""
        if not keys:
            return {}
        ledger, users = self._ledger, self._users
        wanted = sa.select(users.key).where(users.key.in_(keys)).subquery()
        status = sa.cast(ledger.status, sa.Text).label("status")
        columns = (ledger.id, status, ledger.amount, ledger.balance_after, ledger.sequence, ledger.refund_of)
        done = (
            sa.select(*columns)
            .where(ledger.user_id == wanted.c.key, ledger.sequence.is_not(None))
            .order_by(ledger.sequence.desc())
            .limit(TALLY_ROWS)
        )
        waiting = (
            sa.select(*columns)
            .where(
                ledger.user_id == wanted.c.key,
                ledger.sequence.is_(None),
                ledger.status == PENDING,
                sa.or_(ledger.held.is_(None), self._is_held()),
            )
            .limit(TALLY_ROWS)
        )
        last = sa.union_all(done, waiting).subquery().lateral()
        found: dict[Key, list[Notch]] = {key: [] for key in keys}
        with self.reading() as conn:
            for key, *notch in conn.execute(sa.select(wanted.c.key, last).join(last, sa.true())):
                found[key].append(Notch(*notch))
        return found

    # --- a user's ledger ---

    def ledger(self, user: Key) -> Listing[LedgerRow]:
        """Completed rows of ``user``, newest first."""
        rows = self._select_ledger().where(self._owned(user), self._ledger.sequence.is_not(None))
        return Listing(self, rows, (self._ledger.sequence,), LedgerRow, _whole_cursor, descending=True)

    def unfinished(self, user: Key) -> list[LedgerRow]:
        """The newest pending rows of ``user``, without holds; then the newest failed ones."""
        ledger = self._ledger
        query = self._select_ledger().where(self._owned(user), ledger.sequence.is_(None), sa.not_(self._is_held()))
        query = query.order_by(ledger.id.desc())
        states = (query.where(ledger.status == state).limit(PAGE_ROWS).subquery() for state in (PENDING, FAILED))
        with self.reading() as conn:
            rows = [LedgerRow(*row) for row in conn.execute(sa.union_all(*(sa.select(state) for state in states)))]
        return sorted(rows, key=lambda row: (row.status != PENDING, -row.id.int))

    def holds(self, user: Key) -> Listing[LedgerRow]:
        """Credits of ``user`` set aside for work under way, the newest hold first."""
        holds = self._select_ledger().where(self._owned(user), self._ledger.sequence.is_(None), self._is_held())
        return Listing(self, holds, (self._ledger.id,), LedgerRow, _uuid_cursor, descending=True)

    def lots(self, user: Key) -> Listing[LotRow]:
        """Credits of ``user`` that expire, in the order in which they are spent."""
        lot = self.schema.lots.c
        return Listing(self, self._select_lots(user), (lot.expires_at, lot.id), LotRow, _moment_cursor)

    def expiring(self, user: Key) -> Expiring:
        """The sums of ``lots``."""
        left, is_bought = sa.func.sum(self.schema.lots.c.remaining), self._ledger.type == "purchase"
        sums = (
            sa.func.coalesce(left.filter(is_bought), 0),
            sa.func.coalesce(left.filter(sa.not_(is_bought)), 0),
            sa.func.count(),
        )
        with self.reading() as conn:
            return Expiring(*map(int, conn.execute(self._select_lots(user).with_only_columns(*sums)).one()))

    def origins(self, user: Key) -> Origins:
        """The sums of the newest rows of ``user``, by origin."""
        ledger = self._ledger
        newest = (
            sa.select(
                sa.cast(ledger.type, sa.Text).label("type"),
                ledger.refund_of.is_not(None).label("linked"),
                ledger.currency,
                ledger.amount,
                ledger.amount_paid,
            )
            .where(self._owned(user), ledger.sequence.is_not(None))
            .order_by(ledger.sequence.desc())
            .limit(SUM_ROWS)
            .subquery()
        )
        c = newest.c
        sums = (sa.func.sum(c.amount), sa.func.sum(c.amount_paid), sa.func.count())
        statement = sa.select(c.type, c.linked, c.currency, *sums).group_by(c.type, c.linked, c.currency)
        with self.reading() as conn:
            return _origins(conn.execute(statement).all())

    def every_row(self, user: Key) -> Iterator[LedgerRow]:
        """The whole ledger of ``user``, newest first, streamed."""
        ledger = self._ledger
        rows = self._select_ledger().where(self._owned(user))
        return self.streamed(rows.order_by(ledger.sequence.desc().nulls_first(), ledger.id.desc()), LedgerRow)

    def transaction(self, user: Key, id: UUID) -> LedgerRow | None:
        """One row of ``user``'s ledger."""
        with self.reading() as conn:
            row = conn.execute(self._select_ledger().where(self._owned(user), self._ledger.id == id)).one_or_none()
        return None if row is None else LedgerRow(*row)

    def refunded(self, user: Key, purchase: UUID) -> int:
        """The refunded credits of ``purchase``."""
        ledger = self._ledger
        statement = sa.select(sa.func.coalesce(-sa.func.sum(ledger.amount), 0)).where(
            ledger.refund_of == purchase, self._owned(user)
        )
        with self.reading() as conn:
            return int(conn.scalar(statement) or 0)

    def steps(self, user: Key) -> list[tuple[dt.datetime, int]]:
        """The balance after each of the last rows of ``user``, oldest first, with its time."""
        ledger = self._ledger
        statement = (
            sa.select(ledger.completed_at, ledger.balance_after)
            .where(self._owned(user), ledger.sequence.is_not(None))
            .order_by(ledger.sequence.desc())
            .limit(CHART_ROWS)
        )
        with self.reading() as conn:
            return [(row[0], row[1]) for row in conn.execute(statement)][::-1]

    # --- pending purchases and failed deliveries ---

    def pending(self) -> Listing[PendingRow]:
        """Pending purchases, oldest first."""
        c, users = self._ledger, self._users
        purchases = (
            sa.select(c.id, c.user_id, self.email(), c.amount, c.description, c.stripe_session_id, c.created_at)
            .join_from(self.schema.credit_transactions, self.schema.users, users.key == c.user_id, isouter=True)
            .where(self._is_pending())
        )
        return Listing(self, purchases, (c.created_at, c.id), PendingRow, _moment_cursor)

    def waiting(self) -> Waiting:
        """The numbers of pending purchases by age; up to a thousand are counted, the oldest first."""
        ledger = self._ledger
        oldest = (
            sa.select(ledger.created_at).where(self._is_pending()).order_by(ledger.created_at).limit(COUNT_UP_TO + 1)
        ).subquery()
        age = sa.func.now() - oldest.c.created_at
        hour, day = (sa.literal(dt.timedelta(hours=hours), sa.Interval) for hours in (1, 24))
        count = sa.func.count()
        statement = sa.select(
            count,
            count.filter(age < hour),
            count.filter(age >= hour, age < day),
            count.filter(age >= day),
            sa.func.min(oldest.c.created_at),
        ).select_from(oldest)
        with self.reading() as conn:
            total, young, middle, old, first = conn.execute(statement).one()
        return Waiting(min(total, COUNT_UP_TO), young, middle, old, first, total <= COUNT_UP_TO)

    def lost_deliveries(self) -> list[LostDelivery]:
        """Failed deliveries of Stripe's, the oldest first: as many as a page can show."""
        row = stripe_failed_deliveries.c
        columns = [row[name] for name in LostDelivery.__dataclass_fields__]
        statement = sa.select(*columns).where(row.resolved_at.is_(None)).order_by(row.first_at, row.event_id)
        with self.reading() as conn:
            return [LostDelivery(*found) for found in conn.execute(statement.limit(PAGE_ROWS))]

    def refused_payments(self) -> list[RefusedPayment]:
        """Open findings about what the ledger refused, the oldest first: as many as a page can show."""
        row = stripe_findings.c
        statement = sa.select(row.object_id, row.found, row.seen_at).order_by(row.seen_at, row.object_id)
        refused = statement.where(row.kind.in_(REFUSED_KINDS), row.dismissed_at.is_(None))
        with self.reading() as conn:
            return [RefusedPayment(*found) for found in conn.execute(refused.limit(PAGE_ROWS))]

    # --- migrations ---

    def receipts(self) -> list[MigrationRun]:
        """Runs of migrations, newest first."""
        columns = [migration_log.c[name] for name in MigrationRun.__dataclass_fields__]
        statement = sa.select(*columns).order_by(migration_log.c.id.desc()).limit(200)
        with self.reading() as conn:
            return [MigrationRun(*row) for row in conn.execute(statement)]

    # --- sums, too slow for a request ---

    def figures(self, now: dt.datetime) -> Figures:
        """The sums of the overview as of ``now``. Reads the rows of days that are not closed, and all users.

        Raises:
            PermissionDenied: row level security hides rows from this role.
        """
        self.require_all_rows()
        today = now.astimezone(dt.UTC).date()
        first = today - dt.timedelta(days=2 * DAYS - 1)
        with self.reading(timeout_ms=SUM_TIMEOUT_MS) as conn:
            # this result decides: a day that is closed or opened again from here on is counted by it
            sums = conn.execute(self._closed_days(first, today)).all()
            closed = {row.day for row in sums}
            days = [first + dt.timedelta(days=n) for n in range(2 * DAYS)]
            moved = [*sums, *conn.execute(self._by_day([day for day in days if day not in closed]))]
            back = conn.execute(self._money_back(first)).all()
            holdings = Holdings(*map(int, conn.execute(self._holdings()).one()))
        return _figures(moved, back, holdings, first)

    def _closed_days(self, first: dt.date, last: dt.date) -> sa.Select[Any]:
        """The sums of closed days; a closed day without sums has a row too."""
        day, kept = kept_days.c, daily_sums.c
        return (
            sa.select(day.day, kept.kind, kept.currency, kept.credits, kept.paid)
            .select_from(kept_days.outerjoin(daily_sums, kept.day == day.day))
            .where(day.day.between(first, last), day.closed_at.is_not(None))
        )

    def _by_day(self, days: Sequence[dt.date]) -> sa.Select[Any]:
        """The sums of the rows of other ``days``, in the same form."""
        ledger = self._ledger
        day = sa.cast(sa.func.timezone("UTC", ledger.completed_at), sa.Date).label("day")
        undoes = sa.and_(sa.cast(ledger.type, sa.Text) == "grant", ledger.refund_of.is_not(None))
        kind = sa.case((undoes, "reinstatement"), else_=sa.cast(ledger.type, sa.Text)).label("kind")
        currency = sa.func.coalesce(sa.cast(ledger.currency, sa.Text), "").label("currency")
        sums = sa.func.sum(ledger.amount).label("credits"), sa.func.coalesce(sa.func.sum(ledger.amount_paid), 0)
        of_days = sa.or_(sa.false(), *(ledger.completed_at.between(*ends) for ends in _consecutive_days(days)))
        completed = ledger.status == sa.literal_column("'completed'")  # the index's predicate
        return sa.select(day, kind, currency, *sums).where(completed, of_days).group_by(day, kind, currency)

    def _money_back(self, first: dt.date) -> sa.Select[Any]:
        row = stripe_reversals.c
        since, middle = (dt.datetime.combine(first + dt.timedelta(days=n), dt.time(), dt.UTC) for n in (0, DAYS))
        is_late = row.seen_at >= middle
        return (
            sa.select(row.currency, is_late, sa.func.sum(row.amount))
            .where(row.seen_at >= since, row.applied != "none")
            .group_by(row.currency, is_late)
        )

    def _holdings(self) -> sa.Select[Any]:
        now = sa.func.tallystick.balance(self._users.key).table_valued(sa.column("balance", sa.BigInteger)).alias("now")
        settled = sa.select(now.c.balance).correlate(self.schema.users).scalar_subquery()
        # the column includes expired credits until the row of their expiry is written
        is_due = self._users.credit_due_at <= sa.func.now()
        each = sa.select(sa.case((is_due, settled), else_=self.schema.balance).label("balance"))
        # OFFSET keeps the planner from evaluating the CASE, with its function call, for each mention of balance
        balance = each.select_from(self.schema.users).offset(sa.literal_column("0")).subquery().c.balance
        total, count = sa.func.sum(balance), sa.func.count()
        return sa.select(
            sa.func.coalesce(total.filter(balance > 0), 0),
            count.filter(balance > 0),
            sa.func.coalesce(-total.filter(balance < 0), 0),
            count.filter(balance < 0),
        )

    # --- statements ---

    def _select_users(self) -> sa.Select[Any]:
        c = self._users
        return sa.select(
            c.key,
            self.email(),
            self.schema.balance,
            c.credit_sequence,
            sa.func.coalesce(c.onboarding_complete, sa.false()),
            c.stripe_customer_id,
            sa.func.coalesce(c.plan_tier, "free"),
            c.updated_at,
            c.deleted_at,
        )

    def email(self) -> sa.ColumnElement[Any]:
        """A user's e-mail address, null if the app has none."""
        return sa.cast(self._users.email, sa.Text) if "email" in self._users else sa.null()

    def _select_lots(self, user: Key) -> sa.Select[Any]:
        lot, row = self.schema.lots.c, self._ledger
        is_bought = (row.type == "purchase").label("paid")
        columns = (lot.id, lot.expires_at, lot.remaining, lot.amount, is_bought)
        return (
            sa.select(*columns, row.description, row.amount_paid, row.currency)
            .join_from(self.schema.lots, self.schema.credit_transactions, self._ledger.id == lot.id)
            .where(
                lot.user_id == sa.literal(self.schema.user_key(user), lot.user_id.type),
                lot.remaining > sa.literal_column("0"),  # as in the partial index
                lot.expires_at > sa.func.now(),
            )
        )

    def _select_ledger(self) -> sa.Select[Any]:
        c, workshops = self._ledger, self.schema.workshops
        title: sa.ColumnElement[Any] = sa.null()
        table: sa.FromClause = self.schema.credit_transactions
        if workshops is not None and self.schema.title is not None:
            title = sa.cast(self.schema.title, sa.Text)
            table = table.outerjoin(workshops, workshops.c.key == c.workshop_id)
        columns: list[Any] = []
        for name in LedgerRow.__dataclass_fields__:
            if name == "workshop_title":
                columns.append(title.label(name))
            elif name in ("type", "status"):  # a label of a later version is shown as it is
                columns.append(sa.cast(c[name], sa.Text).label(name))
            else:
                columns.append(c[name])
        return sa.select(*columns).select_from(table)

    def _is_pending(self) -> sa.ColumnElement[bool]:
        # a literal, not a parameter: the planner must see that it implies the partial index's predicate
        return sa.and_(self._ledger.status == sa.literal_column("'pending'"), self._ledger.held.is_(None))

    def _is_held(self) -> sa.ColumnElement[bool]:
        """True for an open hold: one that has expired counts as released, even before that is written."""
        ledger = self._ledger
        waits = ledger.status == sa.literal_column("'pending'")
        return sa.and_(waits, ledger.held.is_not(None), ledger.expires_at > sa.func.now())

    def _is_user(self, key: Key) -> sa.ColumnElement[bool]:
        return self._users.key == sa.literal(self.schema.user_key(key), self._users.key.type)

    def _owned(self, user: Key) -> sa.ColumnElement[bool]:
        return self._ledger.user_id == sa.literal(self.schema.user_key(user), self._ledger.user_id.type)

    # --- search ---

    def _matches(self, search: str) -> sa.ColumnElement[bool]:
        if not search:
            return sa.true()
        exact = self._found(search)
        return self._users.key.in_(exact) if exact else self._resembles(search)

    def _found(self, search: str) -> list[Key]:
        """Users whom ``search`` identifies exactly; each kind of id has an index."""
        users, ledger = self._users, self._ledger
        if "\0" in search:
            return []
        tries: list[sa.Select[Any]] = []
        if (key := self.key(search)) is not None:
            tries.append(sa.select(users.key).where(self._is_user(key)))
        if search.startswith("cus_"):
            tries.append(sa.select(users.key).where(users.stripe_customer_id == search))
        if search.startswith("cs_"):
            tries.append(sa.select(ledger.user_id).where(ledger.stripe_session_id == search))
        if search.startswith("pi_"):
            tries.append(sa.select(ledger.user_id).where(ledger.stripe_payment_intent_id == search).limit(PAGE_ROWS))
        if (id := as_uuid(search)) is not None:
            tries.append(sa.select(ledger.user_id).where(ledger.id == id))
        if "email" in users and "@" in search:
            tries.append(sa.select(users.key).where(users.email == search).limit(PAGE_ROWS))
        with self.reading() as conn:
            for statement in tries:
                if found := list(dict.fromkeys(conn.scalars(statement))):
                    return found
        return []

    def _resembles(self, search: str) -> sa.ColumnElement[bool]:
        users, host = self._users, self.config.host.users
        if "\0" in search:
            return sa.false()
        parts = [users.email.icontains(search, autoescape=True)] if "email" in users else []
        if host.key_type in TEXT_KEYS:
            parts.append(sa.cast(users.key, sa.Text).icontains(search, autoescape=True))
        return sa.or_(sa.false(), *parts)

    def key(self, text: str) -> Key | None:
        """``text`` as a user's key, or None if it is none."""
        try:
            return self.schema.user_key_of(text)
        except InvalidArgument:
            return None

    def _cursor(self, text: str) -> tuple[Any, ...]:
        key = self.key(text)
        if key is None:
            raise _bad_cursor(text)
        return (key,)


@dataclass(frozen=True, slots=True)
class Listing(Generic[Row]):
    """A list in the order of columns that no two rows share: page by page, or as a whole.

    ``row`` makes a row of its columns. A cursor is a row's values of ``order`` as a text, with ``separator`` between
    them; ``parse`` reads it.
    """

    queries: Queries
    statement: sa.Select[Any]
    order: tuple[sa.ColumnElement[Any], ...]
    row: Callable[..., Row]
    parse: Callable[[str], tuple[object, ...]]
    descending: bool = False
    separator: str = "~"

    def page(self, *, before: str | None = None, after: str | None = None, limit: int = PAGE_ROWS) -> Page[Row]:
        """The rows next to a cursor, in the list's order; with ``before`` those above it."""
        upwards, order = before is not None, self.order
        cursor = before if upwards else after
        falling = self.descending != upwards
        statement = self._ordered(falling=falling).limit(limit + 1)
        if cursor is not None:
            values = [sa.literal(value, column.type) for value, column in zip(self.parse(cursor), order, strict=True)]
            left, right = (sa.tuple_(*order), sa.tuple_(*values)) if len(order) > 1 else (order[0], values[0])
            statement = statement.where(left < right if falling else left > right)
        with self.queries.reading() as conn:
            rows = list(conn.execute(statement))
        more = len(rows) > limit
        rows = rows[:limit]
        if upwards:
            rows.reverse()
        if not rows:
            return Page([], None, None)
        return Page(
            [self.row(*row) for row in rows],
            before=self._cursor_of(rows[0]) if (more if upwards else after is not None) else None,
            after=self._cursor_of(rows[-1]) if upwards or more else None,
        )

    def every(self) -> Iterator[Row]:
        """All rows, streamed."""
        return self.queries.streamed(self._ordered(falling=self.descending), self.row)

    def _ordered(self, *, falling: bool) -> sa.Select[Any]:
        return self.statement.order_by(*(column.desc() if falling else column.asc() for column in self.order))

    def _cursor_of(self, row: sa.Row[Any]) -> str:
        place = (row._mapping[column] for column in self.order)  # noqa: SLF001 - SQLAlchemy's public name
        return self.separator.join(part.isoformat() if isinstance(part, dt.datetime) else str(part) for part in place)


_ESTIMATED_ROWS = sa.text("""
SELECT (coalesce(nullif(reltuples / nullif(relpages, 0), -1), :rows_a_page)
  * (pg_relation_size(oid) / current_setting('block_size')::int))::bigint
FROM pg_class WHERE oid = to_regclass(:table)
""")


def _size(conn: sa.Connection, table: sa.Table, key: sa.ColumnElement[Any]) -> Count:
    first = sa.select(key).order_by(key).limit(COUNT_UP_TO + 1).subquery()  # by its index, past dead rows
    counted = conn.execute(sa.select(sa.func.count()).select_from(first)).scalar_one()
    if counted <= COUNT_UP_TO:
        return Count(counted)
    # one that doubles no %
    preparer = pg.dialect(paramstyle="named").identifier_preparer  # type: ignore[no-untyped-call]
    values = {"table": preparer.format_table(table), "rows_a_page": ROWS_A_PAGE}
    estimated = conn.execute(_ESTIMATED_ROWS, values).scalar() or 0
    use_estimate = estimated > counted  # old statistics may be too low
    return Count(estimated, "about ") if use_estimate else Count(COUNT_UP_TO, "more than ")


def _whole_cursor(text: str) -> tuple[int]:
    if text.isascii() and text.isdigit() and len(text) < 11:  # noqa: PLR2004 - digits of a 32-bit integer
        return (min(int(text), 2**31 - 1),)
    raise _bad_cursor(text)


def _moment_cursor(text: str) -> tuple[dt.datetime, UUID]:
    moment, _, id = text.partition("~")
    try:
        parsed, row = dt.datetime.fromisoformat(moment), UUID(id)
        if parsed.tzinfo is not None:
            return parsed.astimezone(dt.UTC), row  # PostgreSQL has no offsets of 16 hours and more
    except (ValueError, OverflowError):
        pass
    raise _bad_cursor(text)


def _uuid_cursor(text: str) -> tuple[UUID]:
    if (id := as_uuid(text)) is None:
        raise _bad_cursor(text)
    return (id,)


def _bad_cursor(text: str) -> InvalidArgument:
    return InvalidArgument.of("cursor", text, "no place in this list. Begin at its first page")


def as_uuid(text: str) -> UUID | None:
    """``text`` as an id of ours, or None if it is none."""
    try:
        return UUID(text)
    except ValueError:
        return None


def _utc(moment: Any) -> Any:
    return moment.replace(tzinfo=dt.UTC) if isinstance(moment, dt.datetime) and moment.tzinfo is None else moment


def _user(*columns: Any) -> UserRow:
    return UserRow(*map(_utc, columns))


_FIGURE_OF = {
    "purchase": "sold",
    "grant": "granted",
    "correction": "granted",
    "consumption": "consumed",
    "reversal": "consumed",
    "refund": "refunded",
    "reinstatement": "refunded",
    "expiry": "expired",
}
"""The figure of the overview for each type of row; ``reinstatement`` is a grant that undoes a refund."""
_CREDITS_OUT = ("consumed", "refunded", "expired")


def _figure(kind: str, *, linked: bool) -> str | None:
    return _FIGURE_OF.get("reinstatement" if kind == "grant" and linked else kind)


def _origins(summed: Sequence[Sequence[Any]]) -> Origins:
    moved, paid, rows = Counter[str](), Counter[str](), 0
    for kind, linked, currency, credits, money, number in summed:
        moved[_figure(kind, linked=linked) or kind] += int(credits)
        rows += number
        if currency is not None and money is not None:
            paid[currency] += int(money)
    return Origins(
        bought=moved["sold"] + moved["refunded"],
        refunded=-moved["refunded"],
        granted=moved["granted"],
        consumed=-moved["consumed"],
        expired=-moved["expired"],
        moved=moved["transfer"],
        paid=dict(sorted(paid.items())),
        rows=rows,
    )


def _consecutive_days(days: Sequence[dt.date]) -> Iterator[tuple[dt.datetime, dt.datetime]]:
    """The first and the last moment of each run of consecutive ``days``."""
    for _, stretch in groupby(enumerate(days), key=lambda each: each[1] - dt.timedelta(days=each[0])):
        dates = [day for _, day in stretch]
        yield (
            dt.datetime.combine(dates[0], dt.time.min, dt.UTC),
            dt.datetime.combine(dates[-1], dt.time.max, dt.UTC),
        )


def _figures(
    moved: Sequence[Sequence[Any]], back: Sequence[Sequence[Any]], holdings: Holdings, first: dt.date
) -> Figures:
    days = {first + dt.timedelta(days=n): dict.fromkeys(_FIGURE_OF.values(), 0) for n in range(2 * DAYS)}
    money: defaultdict[str, Counter[str]] = defaultdict(Counter)
    middle = first + dt.timedelta(days=DAYS)
    for date, kind, currency, summed, paid in moved:
        if kind is None:
            continue  # a closed day without sums
        credits = int(summed)  # a sum of bigint is a numeric
        if (name := _FIGURE_OF.get(kind)) is not None:
            days[date][name] += -credits if name in _CREDITS_OUT else credits
        if currency:
            money[currency]["now" if date >= middle else "before"] += int(paid)
            money[currency]["credits"] += credits
    for currency, is_late, amount in back:
        money[currency]["back" if is_late else "back_before"] += int(amount)
    return Figures(
        days=[Day(date, **sums) for date, sums in days.items()],
        money=[Money(currency, **sums) for currency, sums in sorted(money.items())],
        holdings=holdings,
    )
