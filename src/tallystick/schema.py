"""The revision and the mapping of a database, and the values that its columns keep.

The tables are in ``declared_tables``, for what builds its statements with SQLAlchemy. A call of the ledger does not.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from enum import StrEnum
from typing import TYPE_CHECKING, Any
from uuid import UUID

from pydantic import ValidationError

from tallystick.config import CREDITS_MAX, INTEGER_KEYS, Config, HostMapping, KeyType
from tallystick.database import AnyConnection, one_row, translated
from tallystick.errors import HostMismatch, InvalidArgument, Key, NotMigrated, SchemaError, SchemaTooNew, shown

if TYPE_CHECKING:
    import sqlalchemy as sa

HEAD = "0005"
"""The revision that this package works with; a test compares it with ``migrate/versions``."""

BOOKKEEPING_SCHEMA = "tallystick"
INT32_MIN, INT32_MAX = -(2**31), 2**31 - 1
INT64_MIN, INT64_MAX = -(2**63), 2**63 - 1
_BYTES = {"smallint": 2, "integer": 4, "bigint": 8}


class CreditTransactionType(StrEnum):
    """The types of a credit transaction. Later revisions may add some."""

    PURCHASE = "purchase"
    CONSUMPTION = "consumption"
    REFUND = "refund"
    GRANT = "grant"
    REVERSAL = "reversal"
    CORRECTION = "correction"
    EXPIRY = "expiry"
    TRANSFER = "transfer"

    @classmethod
    def _missing_(cls, value: object) -> CreditTransactionType | None:
        """A member for a label of a later revision, which an older package reads during a rolling deployment."""
        if not isinstance(value, str):
            return None
        later = str.__new__(cls, value)
        later._name_, later._value_ = value.upper(), value
        return later


class CreditTransactionStatus(StrEnum):
    """The states of a credit transaction. Only a completed one counts in the balance."""

    PENDING = "pending"
    COMPLETED = "completed"
    FAILED = "failed"


LEDGER = "credit_transactions"

ROW = (
    "id",
    "user_id",
    "type",
    "status",
    "amount",
    "balance_after",
    "sequence",
    "description",
    "workshop_id",
    "refund_of",
    "stripe_session_id",
    "stripe_payment_intent_id",
    "stripe_price_id",
    "amount_paid",
    "currency",
    "idempotency_key",
    "metadata",
    "created_at",
    "completed_at",
)
"""The columns of a credit transaction, as ``tallystick.answer`` gives them after the outcome."""

OPENING_KEY = "tallystick:opening"
"""The idempotency key of an opening balance."""

HISTORY = f"coalesce(idempotency_key, '') !~ '^({OPENING_KEY}$|tallystick:app:)'"
"""True for rows of the ledger's own history, not for the opening balances of an app that had balances before."""

CHECKS: dict[str, str] = {
    "type": "CASE type"
    " WHEN 'consumption' THEN amount < 0 AND refund_of IS NULL"
    " AND (balance_after >= 0 AND status = 'completed' OR held IS NOT NULL)"
    " WHEN 'purchase' THEN amount > 0 AND refund_of IS NULL"
    " WHEN 'refund' THEN amount < 0 AND refund_of IS NOT NULL AND status = 'completed'"
    " WHEN 'grant' THEN amount > 0 AND status = 'completed'"
    # types that were added later give or take, and refer to another row
    " ELSE amount <> 0 AND refund_of IS NOT NULL AND status = 'completed' END",
    "status": "num_nonnulls(balance_after, sequence, completed_at) = CASE status WHEN 'completed' THEN 3 ELSE 0 END"
    " AND sequence > 0",
    "paid": "num_nonnulls(stripe_session_id, stripe_payment_intent_id, stripe_price_id, amount_paid, currency) = 0"
    " OR type = 'purchase' AND (amount_paid IS NULL) = (currency IS NULL)"
    " AND amount_paid >= 0 AND currency ~ '^[a-z]{3}$'",
    "held": "CASE WHEN held IS NULL THEN capture_limit IS NULL"
    " ELSE type = 'consumption' AND held > 0 AND expires_at IS NOT NULL END",
}
"""The ledger's rules, each also an audit check."""

TRIGGERS: dict[str, tuple[str, ...]] = {
    LEDGER: ("tallystick_append_only", "tallystick_no_truncate"),
    "users": ("tallystick_updated_at", "A_tallystick_buyer_stays"),
}

FOLLOWING = ("tallystick_new_balance", "tallystick_balance")
"""Triggers on users that record in the ledger what the app's own code writes to a balance that it had before."""

EVENTS_TRIGGER = "tallystick_events"
"""On the ledger while events are on."""


class Keys:
    """The keys of users and workshops, and the numbers of credits, that the columns of one mapping hold."""

    def __init__(self, host: HostMapping) -> None:
        self.host = host

    @property
    def credits_max(self) -> int:
        """The largest number of credits that a column holds."""
        return CREDITS_MAX[self.host.credits]

    def user_key(self, value: object) -> Key:
        """``value`` as a user's key. Raises InvalidArgument."""
        return _as_key("user", value, self.host.users.key_type)

    def workshop_key(self, value: object) -> Key:
        """``value`` as a workshop's key. Raises InvalidArgument."""
        if self.host.workshops is None:
            raise InvalidArgument.of(
                "workshop",
                value,
                "this host has no workshops table. Leave the workshop out, or map one under [host.workshops]",
            )
        return _as_key("workshop", value, self.host.workshops.key_type)

    def user_key_of(self, text: str) -> Key:
        """The user's key that ``text`` stands for, as in an address or on a command line. Raises InvalidArgument."""
        return self.user_key(_number_of(text) if self.host.users.key_type in INTEGER_KEYS else text)

    def workshop_key_of(self, text: str) -> Key:
        """As ``user_key_of``, of a workshop."""
        mapped = self.host.workshops
        return self.workshop_key(_number_of(text) if mapped and mapped.key_type in INTEGER_KEYS else text)


def verify(conn: AnyConnection, host: HostMapping | None = None) -> None:
    """Check that this package works with the database, and that ``host``, if given, is its mapping.

    A database that is ahead of the package by expansions only is accepted: a rolling deployment migrates it first.

    Call it when the app starts, to refuse early instead of failing on a missing column.

    Raises:
        HostMismatch: the database was migrated for another mapping.
        NotMigrated: run ``tallystick migrate apply``.
        PermissionDenied: this role may not read the revision.
        SchemaError: the revision or the mapping of a migrated database is lost.
        SchemaTooNew: upgrade the package.
    """
    _verify_revision(conn)
    if host is not None:
        refuse_other_mapping(mapping_of(conn), host)


def has_bookkeeping(conn: AnyConnection, table: str) -> bool:
    """True where the database has this table of ours: it is migrated, or its migration has begun."""
    row = one_row(conn, f"SELECT pg_catalog.to_regclass('{BOOKKEEPING_SCHEMA}.{table}')::pg_catalog.text")
    return row is not None and row[0] is not None


def was_applied(conn: AnyConnection) -> bool:
    """True where the log has a migration, whatever the other bookkeeping says."""
    if not has_bookkeeping(conn, "migration_log"):
        return False
    return one_row(conn, "SELECT 1 FROM tallystick.migration_log WHERE direction = 'apply' LIMIT 1") is not None


def bookkeeping_lost(table: str) -> SchemaError:
    """The error for a database that was migrated and has lost a table of the bookkeeping, or its row."""
    return SchemaError(
        f"this database was migrated, but tallystick.{table} is missing or empty: its bookkeeping is lost. Restore "
        "that table from a backup before anything else, and leave schema tallystick as it is"
    )


def _verify_revision(conn: AnyConnection) -> None:
    with translated(connecting=True):  # nothing is written, so no outcome is unknown
        is_there = has_bookkeeping(conn, "alembic_version")
        row = one_row(conn, "SELECT version_num FROM tallystick.alembic_version") if is_there else None
        found: str | None = row[0] if row else None
        if found is None and was_applied(conn):
            raise bookkeeping_lost("alembic_version")
    if not is_there:
        raise NotMigrated("this database has no Tallystick schema yet. Run: tallystick migrate apply")
    if found == HEAD:
        return
    if found is not None and found > HEAD:
        with translated(connecting=True):
            if not one_row(conn, _BROKEN):
                return
        raise SchemaTooNew(
            f"this database is at revision {found}, this package knows {HEAD}. Run: pip install -U tallystick",
            revision=found,
        )
    raise NotMigrated(
        f"this database is at revision {found}, this package needs {HEAD}. Run: tallystick migrate apply",
        revision=found,
    )


_BROKEN = f"""
    SELECT l.revision FROM tallystick.migration_log AS l, tallystick.alembic_version AS v
    WHERE l.kind <> 'expand' AND l.revision > '{HEAD}' AND l.revision <= v.version_num LIMIT 1
"""  # noqa: S608 - a constant of ours
"""A revision of this database's that an older package does not work with, and that this one does not know."""


def mapping_of(source: sa.Engine | AnyConnection) -> HostMapping:
    """The mapping that the database stores, through an engine, a connection or a session.

    Raises:
        NotMigrated: run ``tallystick migrate apply``.
        SchemaError: the mapping of a migrated database is lost.
    """
    conn: Any = source
    if hasattr(conn, "raw_connection") and not hasattr(conn, "sync_engine"):  # an engine, and none of asyncio
        with translated(connecting=True):
            conn = conn.connect()
        with conn:
            return mapping_of(conn)
    with translated(connecting=True):
        is_there = has_bookkeeping(conn, "mapping")
        row = one_row(conn, "SELECT host::pg_catalog.text FROM tallystick.mapping") if is_there else None
        if row is None and was_applied(conn):
            raise bookkeeping_lost("mapping")
    if row is None:
        raise NotMigrated("this database has no Tallystick schema yet. Run: tallystick migrate apply")
    try:
        return HostMapping.from_json(row[0])
    except ValidationError as error:
        raise SchemaTooNew(
            f"this package does not understand the mapping that the database stores: {error}. "
            "Run: pip install -U tallystick",
        ) from error


def with_stored_mapping(conn: AnyConnection, config: Config) -> Config:
    """``config`` with the mapping that the database stores. A mapping in ``config`` must be the same.

    Raises:
        HostMismatch: shows both.
        NotMigrated: run ``tallystick migrate apply``.
    """
    stored = mapping_of(conn)
    if "host" not in config.model_fields_set:
        return config.model_copy(update={"host": stored})
    refuse_other_mapping(stored, config.host)
    return config


def refuse_other_mapping(stored: HostMapping, given: HostMapping) -> None:
    """Refuse a mapping that is not the stored one. The e-mail column may differ: the functions do not use it.

    Raises:
        HostMismatch: shows both.
    """
    differs = list(_differences(stored, given))
    if not differs:
        return
    both = "; ".join(f"{name} is {_set(here)}, in the database {_set(there)}" for name, here, there in differs)
    only_read = all(name in _ONLY_READ for name, _, _ in differs)
    renew = ". If the settings are right, make the functions anew: tallystick migrate apply" if only_read else ""
    raise HostMismatch(
        f"the settings and the database disagree about the app's tables: {both}. Correct [host] in tallystick.toml, or "
        f"write it anew from the database: tallystick init --force{renew}",
        table=f"{stored.users.schema}.{stored.users.table}",
    )


_ONLY_READ = ("host.workshops.owner", "host.workshops.title", "host.workshops.created_at")
"""Settings of columns that the functions only read: ``migrate apply`` makes the functions anew for other ones."""


def changed_columns(stored: HostMapping, given: HostMapping) -> tuple[str, ...]:
    """The columns that the functions only read and that differ, each with both values.

    Raises:
        HostMismatch: the mappings differ in something else.
    """
    differs = list(_differences(stored, given))
    if any(name not in _ONLY_READ for name, _, _ in differs):
        refuse_other_mapping(stored, given)
    return tuple(f"{name} is {_set(here)}, and was {_set(there)}" for name, here, there in differs)


def _differences(stored: HostMapping, given: HostMapping) -> Iterator[tuple[str, str | None, str | None]]:
    """The settings that differ, as in tallystick.toml, with both values."""
    for name in ("credits", "ledger_schema"):
        if getattr(given, name) != getattr(stored, name):
            yield f"host.{name}", getattr(given, name), getattr(stored, name)
    for word in ("users", "workshops"):
        here, there = getattr(given, word), getattr(stored, word)
        if here is None or there is None:
            if here is not there:
                yield f"host.{word}", here and f"{here.schema}.{here.table}", there and f"{there.schema}.{there.table}"
            continue
        for name in type(here).__dataclass_fields__:
            if name != "email" and getattr(here, name) != getattr(there, name):
                yield f"host.{word}.{name}", getattr(here, name), getattr(there, name)


def _set(value: str | None) -> str:
    return "not set" if value is None else repr(value)


def _number_of(text: str) -> int | str:
    """``text`` as a whole number; else ``text`` itself, which is no key then, as with too many digits for Python."""
    return int(text) if re.fullmatch(r"-?[0-9]{1,19}", text, re.ASCII) else text


def _as_key(argument: str, value: object, key_type: KeyType) -> Key:
    """A key in the form that the driver sends as ``key_type``, so that its index is used.

    An enum member becomes its text or number: written out it would be the member's name.
    """
    match key_type, value:
        case "uuid", UUID():
            return value
        case "uuid", str():
            try:
                return UUID(value)
            except ValueError:
                pass
        case (("text" | "char" | "citext"), str()) if "\0" not in value and not any(
            "\ud800" <= c <= "\udfff" for c in value
        ):
            return str.__str__(value)
        case _, int() if key_type in INTEGER_KEYS and not isinstance(value, bool):
            limit = 2 ** (8 * _BYTES[key_type] - 1)
            if -limit <= value < limit:
                return int(value)
    raise InvalidArgument(
        f"{argument}={shown(value)} is no {key_type} key. Pass the value of the mapped key column "
        f"(host.{argument}s.key_type is {key_type!r})",
        argument=argument,
        value=value,
    )
