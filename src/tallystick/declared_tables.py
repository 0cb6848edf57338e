"""The tables, for one host mapping: the ledger, the host columns that Tallystick adds, its bookkeeping.

This is the declared shape. ``migrate/versions`` creates it by frozen, literal DDL, and the tests compare a migrated
database with these declarations. Column order and names are those of the documentation's data model.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum
from functools import lru_cache
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql as pg
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.schema import CheckConstraint, Column, ForeignKey, Index, Table
from sqlalchemy.sql.compiler import TypeCompiler

from tallystick.config import TEXT_KEYS, HostMapping, KeyType, UsersTable, WorkshopsTable
from tallystick.schema import (
    BOOKKEEPING_SCHEMA,
    CHECKS,
    LEDGER,
    ROW,
    CreditTransactionStatus,
    CreditTransactionType,
    Keys,
)

_KEY_TYPES: dict[KeyType, sa.types.TypeEngine[Any]] = {
    "uuid": sa.Uuid(),
    "text": sa.Text(),
    "smallint": sa.SmallInteger(),
    "integer": sa.Integer(),
    "bigint": sa.BigInteger(),
}


class _TextKey(sa.types.UserDefinedType[str]):
    """A text key whose type or collation is not that of ``text``; the server converts the values.

    ``name`` and ``collation`` are identifiers, with their schema before them unless it is ``pg_catalog``.
    """

    cache_ok = True

    def __init__(self, name: tuple[str, ...], collation: tuple[str, ...] | None) -> None:
        self.name = name
        self.collation = collation

    def literal_processor(self, dialect: sa.Dialect) -> Callable[[str], str] | None:
        """As that of a text: the audit prints statements with their values."""
        return sa.Text().literal_processor(dialect)  # type: ignore[no-any-return, no-untyped-call]  # of SQLAlchemy


@compiles(_TextKey)
def _declared(key: _TextKey, compiler: TypeCompiler, **_: Any) -> str:
    quote = compiler.dialect.identifier_preparer.quote  # it doubles a % only where the driver halves it again
    of_key = ".".join(map(quote, key.name))
    return of_key if key.collation is None else f"{of_key} COLLATE {'.'.join(map(quote, key.collation))}"


def _key_type(table: UsersTable | WorkshopsTable) -> sa.types.TypeEngine[Any]:
    if table.key_type not in TEXT_KEYS or (table.key_type == "text" and table.key_collation is None):
        return _KEY_TYPES[table.key_type]
    citext = table.key_type_schema or "public", "citext"
    name = {"char": ("bpchar",), "citext": citext}.get(table.key_type, ("text",))
    return _TextKey(name, table.key_collation)


class Schema(Keys):
    """SQLAlchemy tables for one mapping; host columns have our names (``users.c.key``, ``workshops.c.owner``).

    ``lots`` are granted or bought credits that expire, by the row that gave them; ``lot_moves`` are the credits that
    each row took of a lot, below 0 where it gave them back. ``row`` are the columns of a ``CreditTransaction``.

    ``users`` and ``workshops`` have only the columns that Tallystick reads or writes; ``workshops`` is None for a
    host without such a table. ``owner`` and ``title`` are columns of workshops that may be their key too: each column
    is in ``workshops.c`` once, in the first of its roles. Use ``of``, which makes one object for each mapping.
    """

    def __init__(self, host: HostMapping) -> None:
        super().__init__(host)
        self.metadata = sa.MetaData()
        user_key = _key_type(host.users)

        self.users = Table(
            host.users.table,
            self.metadata,
            Column(host.users.key, user_key, key="key", nullable=False, unique=True),
            *(
                [Column(host.users.email, sa.Text, key="email")]
                if host.users.email not in (None, host.users.key)
                else ()
            ),
            *user_columns(host),
            schema=host.users.schema,
        )
        customer, due_at = self.users.c.stripe_customer_id, self.users.c.credit_due_at
        self.users_stripe_customer = _where_set(customer, "tallystick_users_stripe_customer_id", customer, unique=True)
        self.users_due = _where_set(due_at, "tallystick_users_credit_due_at", due_at)

        self.workshops: Table | None = None
        self.title: Column[Any] | None = None
        workshop_key: sa.types.TypeEngine[Any] = sa.Uuid()
        workshop_reference: tuple[ForeignKey, ...] = ()
        if host.workshops is not None:
            names = host.workshops
            workshop_key = _key_type(names)
            read = [
                Column(names.key, workshop_key, key="key", nullable=False, unique=True),
                Column(names.owner, user_key, key="owner"),
                *([Column(names.title, sa.Text, key="title")] if names.title else ()),
                *([Column(names.created_at, sa.DateTime, key="created_at")] if names.created_at else ()),
            ]
            # one column may be the key and the owner, as where each user has one workshop, or the key and the title
            once = {column.name: column for column in reversed(read)}
            self.workshops = Table(
                names.table,
                self.metadata,
                *reversed(once.values()),
                *workshop_columns(host),
                schema=names.schema,
            )
            self.title = once[names.title] if names.title else None
            workshop_reference = (ForeignKey(self.workshops.c.key, ondelete="SET NULL", name=f"{LEDGER}_workshop_fk"),)

        self.credit_transactions = Table(
            LEDGER,
            self.metadata,
            Column("id", sa.Uuid, nullable=False),
            Column(
                "user_id",
                user_key,
                ForeignKey(self.users.c.key, onupdate="CASCADE", ondelete="RESTRICT", name=f"{LEDGER}_user_fk"),
                nullable=False,
            ),
            Column("type", _enum(CreditTransactionType, "credit_transaction_type", host), nullable=False),
            Column("status", _enum(CreditTransactionStatus, "credit_transaction_status", host), nullable=False),
            Column("amount", _CREDITS[host.credits], nullable=False),
            Column("balance_after", _CREDITS[host.credits]),
            Column("sequence", sa.Integer),
            Column("description", sa.Text, nullable=False),
            Column("workshop_id", workshop_key, *workshop_reference),
            Column("refund_of", sa.Uuid),
            Column("stripe_session_id", sa.Text),
            Column("stripe_payment_intent_id", sa.Text),
            Column("stripe_price_id", sa.Text),
            Column("amount_paid", sa.BigInteger),
            Column("currency", sa.CHAR(3)),
            Column("idempotency_key", sa.Text),
            Column("metadata", pg.JSONB),
            Column("created_at", pg.TIMESTAMP(timezone=True), nullable=False, server_default=sa.text("now()")),
            Column("completed_at", pg.TIMESTAMP(timezone=True)),
            # of a hold, or of the credits that the row gave; bought ones expire expires_after the payment
            Column("expires_at", pg.TIMESTAMP(timezone=True)),
            Column("expires_after", pg.INTERVAL),
            # the credits that a hold has set aside (0 once it is released), and the most that may be captured
            Column("held", _CREDITS[host.credits]),
            Column("capture_limit", _CREDITS[host.credits]),
            # of a purchase that was completed with another number of credits: the number that it was started with
            Column("started_amount", _CREDITS[host.credits]),
            sa.PrimaryKeyConstraint("id", name=f"{LEDGER}_pkey"),
            sa.ForeignKeyConstraint(
                ["refund_of"], [f"{host.schema_of_ledger}.{LEDGER}.id"], name=f"{LEDGER}_refund_fk", link_to_name=True
            ),
            *(CheckConstraint(rule, name=f"{LEDGER}_{name}") for name, rule in CHECKS.items()),
            schema=host.schema_of_ledger,
        )
        self.lots = Table(
            "lots",
            self.metadata,
            Column("id", sa.Uuid, nullable=False),
            Column("user_id", user_key, nullable=False),
            Column("amount", _CREDITS[host.credits], nullable=False),
            Column("remaining", _CREDITS[host.credits], nullable=False),
            Column("expires_at", pg.TIMESTAMP(timezone=True), nullable=False),
            sa.PrimaryKeyConstraint("id", name="lots_pkey"),
            CheckConstraint("remaining >= 0 AND remaining <= amount", name="lots_remaining"),
            schema=BOOKKEEPING_SCHEMA,
        )
        lot = self.lots.c
        Index("lots_user", lot.user_id, lot.expires_at, postgresql_where=lot.remaining > sa.literal_column("0"))
        self.lot_moves = Table(
            "lot_moves",
            self.metadata,
            Column("transaction_id", sa.Uuid, nullable=False),
            Column("lot_id", sa.Uuid, nullable=False),
            Column("amount", _CREDITS[host.credits], nullable=False),
            sa.PrimaryKeyConstraint("transaction_id", "lot_id", name="lot_moves_pkey"),
            Index("lot_moves_lot", "lot_id"),
            schema=BOOKKEEPING_SCHEMA,
        )
        self.low_balances = Table(
            "low_balances",
            self.metadata,
            Column(
                "user_id",
                user_key,
                ForeignKey(self.users.c.key, onupdate="CASCADE", ondelete="CASCADE", name="low_balances_user_fk"),
                primary_key=True,
                autoincrement=False,
            ),
            Column("threshold", sa.BigInteger, nullable=False),
            schema=BOOKKEEPING_SCHEMA,
        )
        self.row = tuple(self.credit_transactions.c[name] for name in ROW)
        row = self.credit_transactions.c
        self.indexes = (
            # idempotency; the foreign key's check, when a user is deleted
            Index(f"{LEDGER}_idempotency_key", row.user_id, row.idempotency_key, unique=True),
            # a user's history newest first; the audit; unique numbers
            _where_set(row.sequence, f"{LEDGER}_sequence", row.user_id, row.sequence, unique=True),
            # a user's rows that have not completed, each state newest first
            Index(f"{LEDGER}_unfinished", row.user_id, row.status, row.id, postgresql_where=row.sequence.is_(None)),
            # one purchase a Stripe session; consumptions, the most rows by far, are not in the index
            _where_set(row.stripe_session_id, f"{LEDGER}_stripe_session", row.stripe_session_id, unique=True),
            # balance_at, which needs the last of the rows of one moment
            _where_set(row.completed_at, f"{LEDGER}_completed", row.user_id, row.completed_at, row.sequence),
            # the rows of a day, of all users
            Index(
                f"{LEDGER}_completed_at",
                row.completed_at,
                postgresql_where=row.status == sa.literal_column("'completed'"),
            ),
            # the rest of a purchase that can be refunded
            _where_set(row.refund_of, f"{LEDGER}_refund_of", row.refund_of),
            # pending purchases, oldest first
            Index(
                f"{LEDGER}_pending",
                row.created_at,
                postgresql_where=row.status == sa.literal_column("'pending'"),
            ),
            # the rows that unlocked a workshop
            _where_set(row.workshop_id, f"{LEDGER}_workshop", row.workshop_id),
            # refunds and disputes name the payment intent
            _where_set(row.stripe_payment_intent_id, f"{LEDGER}_payment_intent", row.stripe_payment_intent_id),
        )

    @staticmethod
    @lru_cache(maxsize=32)
    def of(host: HostMapping) -> Schema:
        """The tables of ``host``, the same object each time."""
        return Schema(host)

    @property
    def bookkeeping(self) -> tuple[Table, ...]:
        """The tables in the schema ``tallystick``, each after those that it refers to."""
        return self.lots, self.lot_moves, *_bookkeeping.sorted_tables, self.low_balances

    @property
    def owner(self) -> Column[Any]:
        """The column of workshops that holds the owner's key, of a host that has workshops."""
        if self.workshops is None or self.host.workshops is None:
            raise AssertionError("this host has no workshops table")
        return next(column for column in self.workshops.c if column.name == self.host.workshops.owner)

    @property
    def balance(self) -> sa.ColumnElement[int]:
        """The balance of a user's row. An adopted column may be of another type of number, and may hold nulls."""
        column = self.users.c.credit_balance
        return sa.func.coalesce(sa.cast(column, column.type), sa.literal_column("0"))


def _where_set(column: Column[Any], name: str, *columns: Column[Any], unique: bool = False) -> Index:
    """An index of ``columns`` with the rows alone in which ``column`` is not null."""
    return Index(name, *columns, unique=unique, postgresql_where=column.is_not(None))


_CREDITS: dict[str, type[sa.Integer]] = {"integer": sa.Integer, "bigint": sa.BigInteger}


def user_columns(host: HostMapping | None = None) -> tuple[Column[object], ...]:
    """Tallystick's columns of the users table, in this order: with the names of ``host``, and ours as the key."""
    host = host or HostMapping()
    names = host.users
    return (
        Column(
            names.balance, _CREDITS[host.credits], key="credit_balance", nullable=False, server_default=sa.text("0")
        ),
        Column("credit_sequence", sa.Integer, nullable=False, server_default=sa.text("0")),
        Column("onboarding_complete", sa.Boolean, nullable=False, server_default=sa.text("false")),
        Column(names.stripe_customer_id, sa.Text, key="stripe_customer_id"),
        Column("plan_tier", sa.String(32), nullable=False, server_default=sa.text("'free'")),
        Column(
            names.updated_at,
            pg.TIMESTAMP(timezone=True),
            key="updated_at",
            nullable=False,
            server_default=sa.text("now()"),
        ),
        Column(names.deleted_at, pg.TIMESTAMP(timezone=True), key="deleted_at"),
        Column("credit_held", _CREDITS[host.credits], nullable=False, server_default=sa.text("0")),
        Column("credit_due_at", pg.TIMESTAMP(timezone=True)),
    )


def workshop_columns(host: HostMapping | None = None) -> tuple[Column[object], ...]:
    """Tallystick's columns of the workshops table, as ``user_columns``."""
    names = (host and host.workshops) or WorkshopsTable()
    return (
        Column("credit_consumed_at", pg.TIMESTAMP(timezone=True)),
        Column(names.deleted_at, pg.TIMESTAMP(timezone=True), key="deleted_at"),
    )


_bookkeeping = sa.MetaData(schema=BOOKKEEPING_SCHEMA)

alembic_version = Table(
    "alembic_version",
    _bookkeeping,
    Column("version_num", sa.String(32), nullable=False),
    sa.PrimaryKeyConstraint("version_num", name="alembic_version_pkc"),
)

migration_log = Table(
    "migration_log",
    _bookkeeping,
    Column("id", sa.BigInteger, sa.Identity(always=True), primary_key=True),
    Column("revision", sa.Text, nullable=False),
    Column("direction", sa.Text, nullable=False),
    Column("applied_at", pg.TIMESTAMP(timezone=True), nullable=False, server_default=sa.text("now()")),
    Column("adopted", pg.JSONB, nullable=False, server_default=sa.text("'[]'")),
    Column("attempts", sa.Integer, nullable=False, server_default=sa.text("1")),
    Column("locked_ms", sa.Double),
    Column("duration_ms", sa.Double),
    Column("waited_for", pg.JSONB, nullable=False, server_default=sa.text("'[]'")),
    # after an expansion, older packages go on working
    Column("kind", sa.Text, nullable=False, server_default=sa.text("'expand'")),
)

stripe_events = Table(
    "stripe_events",
    _bookkeeping,
    Column("id", sa.Text, primary_key=True),
    Column("type", sa.Text, nullable=False),
    Column("object_id", sa.Text, nullable=False),
    Column("received_at", pg.TIMESTAMP(timezone=True), nullable=False, server_default=sa.text("now()")),
)
"""Stripe's events that had their effect: each id once, written in the transaction of the effect."""

stripe_checkouts = Table(
    "stripe_checkouts",
    _bookkeeping,
    Column("purchase_id", sa.Uuid, primary_key=True),
    Column("pack", sa.Text),
    Column("amount", sa.BigInteger, nullable=False),
    Column("currency", sa.CHAR(3), nullable=False),
    Column("rounding", sa.Text, nullable=False, server_default=sa.text("'down'")),
    Column("request", pg.JSONB),
    Column("created_at", pg.TIMESTAMP(timezone=True), nullable=False, server_default=sa.text("now()")),
    CheckConstraint("rounding IN ('down', 'nearest', 'up')", name="stripe_checkouts_rounding"),
)
"""The terms of a purchase: its price before discounts and tax, how refunds round, and the request for the session,
which can so be repeated exactly. ``pack`` and ``request`` are null for a session of the host's."""

stripe_reversals = Table(
    "stripe_reversals",
    _bookkeeping,
    Column("id", sa.Text, primary_key=True),
    Column("kind", sa.Text, nullable=False),
    Column("stripe_payment_intent_id", sa.Text, nullable=False),
    Column("amount", sa.BigInteger, nullable=False),
    Column("currency", sa.CHAR(3), nullable=False),
    Column("charge_amount", sa.BigInteger),
    Column("credits", sa.BigInteger),
    Column("status", sa.Text, nullable=False),
    Column("status_rank", sa.SmallInteger, nullable=False),
    Column("stated_at", pg.TIMESTAMP(timezone=True), nullable=False, server_default=sa.text("now()")),
    Column("applied", sa.Text, nullable=False, server_default=sa.text("'none'")),
    Column("seen_at", pg.TIMESTAMP(timezone=True), nullable=False, server_default=sa.text("now()")),
    CheckConstraint("kind IN ('refund', 'dispute')", name="stripe_reversals_kind"),
    CheckConstraint("applied IN ('none', 'share', 'marked')", name="stripe_reversals_applied"),
    # the reversals of a purchase
    Index("stripe_reversals_payment_intent", "stripe_payment_intent_id"),
)
"""Stripe's refunds and disputes by id. ``status_rank`` orders the status and only grows; of two with the same rank, the
one that Stripe stated later counts, at ``stated_at``. ``charge_amount`` is the whole of which ``amount`` is a part,
where that is not the purchase's amount. ``credits`` are those in the object's metadata.
``applied`` is what the ledger has taken for it: nothing, its share, or these credits."""

stripe_failed_deliveries = Table(
    "stripe_failed_deliveries",
    _bookkeeping,
    Column("event_id", sa.Text, primary_key=True),
    Column("type", sa.Text, nullable=False),
    Column("object_type", sa.Text, nullable=False),
    Column("object_id", sa.Text, nullable=False),
    Column("reason", sa.Text, nullable=False),
    Column("attempts", sa.Integer, nullable=False, server_default=sa.text("1")),
    Column("first_at", pg.TIMESTAMP(timezone=True), nullable=False, server_default=sa.text("now()")),
    Column("last_at", pg.TIMESTAMP(timezone=True), nullable=False, server_default=sa.text("now()")),
    Column("resolved_at", pg.TIMESTAMP(timezone=True)),
)
"""Deliveries without effect, with the reason; ``resolved_at`` is when a later one succeeded."""

stripe_findings = Table(
    "stripe_findings",
    _bookkeeping,
    Column("kind", sa.Text, nullable=False),
    Column("object_id", sa.Text, nullable=False),
    Column("purchase_id", sa.Uuid),
    Column("expected", sa.Text),
    Column("found", sa.Text),
    Column("seen_at", pg.TIMESTAMP(timezone=True), nullable=False, server_default=sa.text("now()")),
    Column("dismissed_at", pg.TIMESTAMP(timezone=True)),
    sa.PrimaryKeyConstraint("kind", "object_id", name="stripe_findings_pkey"),
)
"""Findings that a person must look at: unknown sessions, different amounts, and the like."""

stripe_reconciliations = Table(
    "stripe_reconciliations",
    _bookkeeping,
    Column("id", sa.BigInteger, sa.Identity(always=True), primary_key=True),
    Column("since", pg.TIMESTAMP(timezone=True)),
    Column("stage", sa.Text, nullable=False),
    Column("position", sa.Text),
    Column("report", pg.JSONB, nullable=False, server_default=sa.text("'{}'")),
    Column("started_at", pg.TIMESTAMP(timezone=True), nullable=False, server_default=sa.text("now()")),
    Column("finished_at", pg.TIMESTAMP(timezone=True)),
)
"""Reconciliations, each with its position, for one that is interrupted."""

events = Table(
    "events",
    _bookkeeping,
    Column("position", sa.BigInteger, nullable=False),
    Column("id", sa.BigInteger, sa.Identity(always=True), nullable=False),
    Column("kind", sa.Text, nullable=False),
    Column("transaction_id", sa.Uuid, nullable=False),
    Column("threshold", sa.BigInteger),
    Column("created_at", pg.TIMESTAMP(timezone=True), nullable=False, server_default=sa.text("clock_timestamp()")),
    sa.PrimaryKeyConstraint("position", "id", name="events_pkey"),
    # the events of a row of the ledger
    Index("events_transaction", "transaction_id"),
)
"""Events, in the order of ``position`` and ``id``. ``position`` is the number of the database transaction plus
``event_settings.xid_offset``. All else about an event is in the ledger's row."""

event_settings = Table(
    "event_settings",
    _bookkeeping,
    Column("xid_offset", sa.BigInteger, nullable=False, server_default=sa.text("0")),
    Column("low_balance", sa.BigInteger),
    Column("notifies", sa.Boolean, nullable=False, server_default=sa.false()),
    Column("recorded_since", pg.TIMESTAMP(timezone=True)),
    Column("the_only_row", sa.Boolean, primary_key=True, server_default=sa.true()),
    CheckConstraint("the_only_row", name="event_settings_the_only_row"),
)
"""The settings of events. ``low_balance`` is for users without a threshold of their own; with ``notifies`` each event
sends a NOTIFY; each row that completed since ``recorded_since`` has its events, null while events are off."""

event_endpoints = Table(
    "event_endpoints",
    _bookkeeping,
    Column("name", sa.Text, primary_key=True),
    Column("url", sa.Text, nullable=False),
    Column("secret_variable", sa.Text, nullable=False),
    Column("kinds", pg.ARRAY(sa.Text)),
    Column("cursor", sa.Text),
    Column("attempts", sa.Integer, nullable=False, server_default=sa.text("0")),
    Column("next_attempt_at", pg.TIMESTAMP(timezone=True)),
    Column("last_error", sa.Text),
    Column("created_at", pg.TIMESTAMP(timezone=True), nullable=False, server_default=sa.text("now()")),
    Column("removed_at", pg.TIMESTAMP(timezone=True)),
)
"""Webhooks: ``secret_variable`` is the environment variable of the secret, ``cursor`` the last event that was delivered
or given up, ``attempts`` the failed attempts of the next one."""

event_dead_letters = Table(
    "event_dead_letters",
    _bookkeeping,
    Column("endpoint", sa.Text, nullable=False),
    Column("event_id", sa.BigInteger, nullable=False),
    Column("kind", sa.Text, nullable=False),
    Column("body", sa.Text, nullable=False),
    Column("attempts", sa.Integer, nullable=False),
    Column("last_error", sa.Text, nullable=False),
    Column("failed_at", pg.TIMESTAMP(timezone=True), nullable=False, server_default=sa.text("now()")),
    Column("replayed_at", pg.TIMESTAMP(timezone=True)),
    sa.PrimaryKeyConstraint("endpoint", "event_id", name="event_dead_letters_pkey"),
)
"""Events that an endpoint did not accept, as they were sent; ``replayed_at`` is when it accepted one later."""


days = Table(
    "days",
    _bookkeeping,
    Column("day", sa.Date, primary_key=True),
    Column("writers_before", sa.BigInteger, nullable=False),
    Column("closed_at", pg.TIMESTAMP(timezone=True)),
)
"""The last sixty UTC days that are over. A day is closed once every transaction with a number below ``writers_before``
has ended; ``daily_sums`` then has its sums. Deleting its row opens it again."""

daily_sums = Table(
    "daily_sums",
    _bookkeeping,
    Column("day", sa.Date, ForeignKey(days.c.day, ondelete="CASCADE", name="daily_sums_day_fk"), nullable=False),
    Column("kind", sa.Text, nullable=False),
    Column("currency", sa.Text, nullable=False),
    Column("credits", sa.Numeric, nullable=False),
    Column("paid", sa.Numeric, nullable=False),
    sa.PrimaryKeyConstraint("day", "kind", "currency", name="daily_sums_pkey"),
)
"""The sums of each closed day: credits by the type of row (a grant with a ``refund_of`` is a ``reinstatement``), and
the payments in minor units of ``currency``, which is empty where nothing was paid."""

mapping = Table(
    "mapping",
    _bookkeeping,
    Column("host", pg.JSONB, nullable=False),
    Column("stored_at", pg.TIMESTAMP(timezone=True), nullable=False, server_default=sa.text("now()")),
    Column("the_only_row", sa.Boolean, primary_key=True, server_default=sa.true()),
    CheckConstraint("the_only_row", name="mapping_the_only_row"),
)
"""The mapping that the functions were made for."""


def _enum(labels: type[StrEnum], name: str, host: HostMapping) -> pg.ENUM:
    return pg.ENUM(labels, name=name, schema=host.schema_of_ledger, values_callable=lambda e: [x.value for x in e])
