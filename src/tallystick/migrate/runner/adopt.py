"""The app's own credits after the migration: opening the remaining balances, noting its history, the cut-over.

Each of these may be killed and run again.
"""

from __future__ import annotations

from dataclasses import dataclass
from uuid import UUID

import sqlalchemy as sa
from psycopg.sql import SQL, Composable, Identifier, Literal

from tallystick.config import Config
from tallystick.database import driver, refuse_hidden_rows
from tallystick.declared_tables import migration_log
from tallystick.errors import MigrationError
from tallystick.migrate.host.own_credits import HistoryTable, OwnCredits, find_history, own_credits
from tallystick.migrate.host.preflight import Host, examine
from tallystick.migrate.host.proposal import balances_apart
from tallystick.migrate.host.tables import columns_of, reading_catalogues
from tallystick.migrate.revisions import HostNames, revisions
from tallystick.migrate.runner.opening import fetch_all, open_balances, refuse_unfit
from tallystick.migrate.runner.session import engine_of, send_when_free, session
from tallystick.progress import OnProgress, ignore_progress
from tallystick.schema import FOLLOWING, LEDGER, OPENING_KEY, has_bookkeeping

_BATCH = 50


@dataclass(frozen=True)
class Adopted:
    """The result of a run: users whose balance it opened, users that others had locked, openings with history."""

    opened: int
    left: int
    noted: int


def look_at_own_credits(conn: sa.Connection, config: Config, *, history: str | None = None) -> OwnCredits:
    """The app's own credits, before or after the migration. Raises what ``own_credits`` and ``examine`` do."""
    with reading_catalogues(conn):
        host = examine(conn, config, strict=False) if has_bookkeeping(conn, "alembic_version") else None
        names = HostNames.of(config.host, host.adopted if host else frozenset({("users", "credit_balance")}))
        return own_credits(
            conn,
            config.host,
            names,
            migrated=host is not None and host.revision is not None,
            follows=host is not None and host.follows,
            history=history,
        )


def adopt(
    database: sa.Engine | str,
    config: Config,
    *,
    history: str | None = None,
    note_history: bool = False,
    progress: OnProgress = ignore_progress,
) -> Adopted:
    """Open the remaining balances beside live traffic, and with ``note_history`` note the app's history in them.

    Raises:
        MigrationError: the database is not migrated, or had no balances before; or the app wrote a balance, just before
            the migration, that a ledger cannot begin with.
        HostMismatch: the named history does not exist.
    """
    with session(engine_of(database)) as conn:
        host, names = _adopting(conn, config)
        opened, left = open_balances(conn, names, progress) if host.follows else (0, 0)
        found = find_history(conn, config.host, history) if note_history else None
        if note_history and found is None:
            raise MigrationError("no table looks like a history of credits. Name it: tallystick adopt --history TABLE")
        return Adopted(opened, left, 0 if found is None else _note(conn, names, found))


def cut_over(
    database: sa.Engine | str, config: Config, *, lock_timeout_ms: int = 50, give_up_after_s: float = 60
) -> Adopted:
    """Stop recording what the app's own code writes to balances: from now on only the ledger writes them.

    Raises:
        MigrationError: the column's default gives credits, others have locked users whose balance is not opened, or
            the app wrote a balance, just before the migration, that a ledger cannot begin with.
        MigrationBlocked: the table was never free.
    """
    with session(engine_of(database)) as conn:
        host, names = _adopting(conn, config)
        if not host.follows:
            return Adopted(0, 0, 0)
        default = columns_of(conn, host.users)[host.balance].default
        if default is not None and _gives(conn, default):
            column = SQL("{}.{}").format(names.users.name, names.users.balance).as_string(None)
            raise MigrationError(
                f"the default of {column} gives new users {default} credits without a row in the ledger. Give them "
                f"with ledger.grant, and run: ALTER TABLE {names.users.name.as_string(None)} ALTER COLUMN "
                f"{names.users.balance.as_string(None)} SET DEFAULT 0"
            )
        refuse_unfit(conn, names)  # while the triggers let the app write no other
        drops = [
            SQL("DROP TRIGGER IF EXISTS {} ON {}").format(Identifier(name), names.users.name) for name in FOLLOWING
        ]
        send_when_free(
            conn,
            drops,
            action="adopt",
            tables=[names.users.name],
            lock_timeout_ms=lock_timeout_ms,
            give_up_after_s=give_up_after_s,
        )
        opened, left = open_balances(conn, names)
        if left:
            raise MigrationError(
                f"other transactions hold {left} user{'' if left == 1 else 's'} with a balance that is not opened. Run "
                "it again when they have ended: tallystick adopt --cut-over"
            )
        conn.execute(sa.insert(migration_log).values(revision=revisions()[0].revision, direction="adopt"))
        return Adopted(opened, 0, 0)


def _gives(conn: sa.Connection, default: str) -> bool:
    """True if a default, as the server shows it, is a number other than 0."""
    text = f"SELECT coalesce(({default})::numeric, 0) <> 0".replace("%", "%%")
    return bool(conn.exec_driver_sql(text).scalar())


def _adopting(conn: sa.Connection, config: Config) -> tuple[Host, HostNames]:
    host = examine(conn, config) if has_bookkeeping(conn, "alembic_version") else None
    if host is None or host.revision is None:
        raise MigrationError(
            "the database is not migrated yet. Run: tallystick migrate plan, then: tallystick migrate apply"
        )
    read = [(host.users.schema, host.users.table), (host.ledger_schema, LEDGER)]
    refuse_hidden_rows(conn, read, "whose balance waits to be opened")
    names = HostNames.of(config.host, host.adopted)
    if not names.adopts_balance:
        apart = " ".join(
            one.sentence("tallystick migrate undo, and tallystick init --force")
            for one in balances_apart(conn, config.host)
        )
        raise MigrationError(
            f"{host.users.shown}.{host.balance} is Tallystick's own: the app had no balances there before. "
            f"{apart or 'Nothing is left to adopt'}"
        )
    return host, names


def _note(conn: sa.Connection, names: HostNames, found: HistoryTable) -> int:
    """Store the app's history up to an opening balance in each one that has none, a few at a time.

    One that was erased stays as it is; so does one of a deleted user, who may have been erased before it was written.
    """
    moment = Identifier(found.moment) if found.moment else None
    order: list[Composable] = [SQL("h.{}").format(moment)] if moment else []
    if found.key:
        order.append(SQL("h.{}").format(Identifier(found.key)))
    words = {
        "ledger": names.ledger,
        "users": names.users.name,
        "key": names.users.key,
        "deleted_at": names.users.deleted_at,
        "opening": Literal(OPENING_KEY),
        "batch": Literal(_BATCH),
        "order": SQL(", ").join(order) if order else SQL("1"),
        "h": found.name,
        "user": Identifier(found.user),
        "before": SQL("AND tallystick.utc(h.{}) <= s.created_at").format(moment) if moment else SQL(""),
    }
    query = SQL(
        "WITH some_of AS (SELECT t.id, t.user_id, t.created_at FROM {ledger} AS t WHERE t.idempotency_key = {opening}"
        " AND t.description <> 'Erased'"
        " AND NOT EXISTS (SELECT FROM {users} AS u WHERE u.{key} = t.user_id AND u.{deleted_at} IS NOT NULL)"
        " AND NOT coalesce(t.metadata, '{{}}') ? 'history' AND t.id > {last} ORDER BY t.id LIMIT {batch})"
        " UPDATE {ledger} AS t SET metadata = coalesce(t.metadata, '{{}}') || jsonb_build_object('history',"
        " coalesce((SELECT jsonb_agg(to_jsonb(h) ORDER BY {order}) FROM {h} AS h WHERE h.{user} = s.user_id {before}),"
        " '[]')) FROM some_of AS s WHERE t.id = s.id RETURNING t.id"
    )
    raw, noted, last = driver(conn), 0, UUID(int=0)
    while ids := [row[0] for row in fetch_all(raw, query.format(**words, last=Literal(last)))]:
        noted, last = noted + len(ids), max(ids)
    return noted
