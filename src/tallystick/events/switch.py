"""Switching events on and off, by a trigger on the ledger that exists only while they are on; and removing old ones."""

from __future__ import annotations

import datetime as dt
from dataclasses import dataclass

import sqlalchemy as sa
from psycopg.sql import SQL, Composable, Identifier, Literal

from tallystick.config import Config
from tallystick.database import DbConnection, run
from tallystick.declared_tables import Schema, event_settings
from tallystick.errors import InvalidArgument, Key
from tallystick.migrate.runner.session import engine_of, send_when_free, session
from tallystick.schema import EVENTS_TRIGGER, LEDGER, verify, with_stored_mapping

_BATCH = 10_000

# Positions are transaction numbers. In a database restored from another server existing positions may be higher than
# this server's numbers: then positions since the restoration are shifted to follow the existing ones.
_SETTINGS = SQL("""
WITH feed AS (
  SELECT last.id, CASE WHEN last.position >= s.xid_offset + pg_snapshot_xmax(now.snapshot)::text::bigint
    THEN last.position + 1 - least(
      s.xid_offset + pg_snapshot_xmin(now.snapshot)::text::bigint,
      (SELECT min(e.position) FROM tallystick.events AS e WHERE e.id > last.id)
    ) ELSE 0 END AS shift
  FROM tallystick.event_settings AS s CROSS JOIN pg_current_snapshot() AS now (snapshot)
  LEFT JOIN LATERAL (SELECT * FROM tallystick.events ORDER BY position DESC, id DESC LIMIT 1) AS last ON true
), moved AS (
  UPDATE tallystick.events AS e SET position = e.position + feed.shift FROM feed
  WHERE feed.shift > 0 AND e.id > feed.id
)
UPDATE tallystick.event_settings AS s SET xid_offset = s.xid_offset + feed.shift,
  recorded_since = coalesce(s.recorded_since, clock_timestamp()),
  low_balance = coalesce({low_balance}, s.low_balance), notifies = coalesce({notify}, s.notifies)
FROM feed""")

_ON = SQL(
    "CREATE OR REPLACE TRIGGER {trigger} AFTER INSERT OR UPDATE OF status ON {ledger}"
    " FOR EACH ROW EXECUTE FUNCTION tallystick.record_event()"
)
_OFF = SQL("DROP TRIGGER IF EXISTS {trigger} ON {ledger}")

_STATUS = sa.text("""
SELECT s.recorded_since, s.low_balance, s.notifies,
  (SELECT min(e.created_at) FROM tallystick.events AS e) AS oldest,
  (SELECT e.position || '-' || e.id FROM tallystick.events AS e WHERE e.position < ended
   ORDER BY e.position DESC, e.id DESC LIMIT 1) AS cursor,
  (SELECT count(*) FROM tallystick.events AS e WHERE e.position >= ended) AS waiting
FROM tallystick.event_settings AS s
CROSS JOIN LATERAL (SELECT s.xid_offset + pg_snapshot_xmin(pg_current_snapshot())::text::bigint AS ended) AS feed
""")


@dataclass(frozen=True, slots=True)
class EventsStatus:
    """The state of the feed: since when events are written, and the ``cursor`` of the newest one that readers get.

    ``waiting`` events are written, but readers do not get them before an older writing transaction ends.
    """

    recorded_since: dt.datetime | None
    low_balance: int | None
    notifies: bool
    oldest: dt.datetime | None
    cursor: str | None
    waiting: int

    @property
    def enabled(self) -> bool:
        """True while the ledger's trigger writes events."""
        return self.recorded_since is not None


def enable(
    database: sa.Engine | str,
    config: Config,
    *,
    low_balance: int | None = None,
    notify: bool | None = None,
    lock_timeout_ms: int = 50,
    give_up_after_s: float = 60,
) -> None:
    """Write events from now on, as the owner of the ledger; traffic waits for at most ``lock_timeout_ms``.

    A further call changes the settings that are given: ``low_balance`` is the threshold of users without one of their
    own, 0 for none, and ``notify`` sends ``NOTIFY tallystick_events`` with each event. On a database that was restored
    on another server it lets the feed continue.

    Raises:
        InvalidArgument: ``low_balance`` is below 0.
        MigrationBlocked: the ledger was never free to be locked.
        NotMigrated, PermissionDenied, MigrationError: nothing was changed.
    """
    if low_balance is not None and low_balance < 0:
        raise InvalidArgument.of("low_balance", low_balance, "pass a whole number of credits, or 0 for none")
    settings = _SETTINGS.format(low_balance=Literal(low_balance), notify=Literal(notify))
    _switch(database, config, settings, _ON, lock_timeout_ms=lock_timeout_ms, give_up_after_s=give_up_after_s)


def disable(
    database: sa.Engine | str, config: Config, *, lock_timeout_ms: int = 50, give_up_after_s: float = 60
) -> None:
    """Write no more events; existing ones stay until ``prune``. Raises what ``enable`` does."""
    settings = SQL("UPDATE tallystick.event_settings SET recorded_since = NULL")
    _switch(database, config, settings, _OFF, lock_timeout_ms=lock_timeout_ms, give_up_after_s=give_up_after_s)


def status(conn: DbConnection) -> EventsStatus:
    """The feed's state, for any role that may read the ledger."""
    return EventsStatus(*run(conn, _STATUS, {}).one())


def low_balance_of(conn: DbConnection, config: Config, user: Key) -> int | None:
    """The threshold of the user's own for ``balance.low``, 0 for never; None where the default applies."""
    table = Schema.of(config.host).low_balances
    own: int | None = run(conn, sa.select(table.c.threshold).where(table.c.user_id == user), {}).scalar()
    return own


def prune(database: sa.Engine | str, *, older_than: dt.timedelta) -> int:
    """Remove events of that age, except those that an endpoint has not received; returns their number.

    Raises:
        InvalidArgument: ``older_than`` is below 0.
    """
    if older_than < dt.timedelta():
        raise InvalidArgument(f"older_than={older_than}: pass 0 or more", argument="older_than", value=older_than)
    removed = 0
    with session(engine_of(database)) as conn:
        verify(conn)
        before = conn.scalar(sa.select(sa.func.clock_timestamp() - older_than))
        raised = sa.case((event_settings.c.recorded_since < before, before), else_=event_settings.c.recorded_since)
        # first, so that no audit searches for removed events
        conn.execute(event_settings.update().values(recorded_since=raised))
        while done := conn.execute(_PRUNE, {"before": before, "batch": _BATCH}).rowcount:
            removed += done
    return removed


_PRUNE = sa.text("""
DELETE FROM tallystick.events WHERE (position, id) IN (
  SELECT e.position, e.id FROM tallystick.events AS e
  WHERE e.created_at < :before AND NOT EXISTS (
    SELECT FROM tallystick.event_endpoints AS p WHERE p.removed_at IS NULL AND (p.cursor IS NULL OR (e.position, e.id)
      > (split_part(p.cursor, '-', 1)::bigint, split_part(p.cursor, '-', 2)::bigint)))
  ORDER BY e.position, e.id LIMIT :batch)
""")


def _switch(
    database: sa.Engine | str,
    config: Config,
    settings: Composable,
    trigger_change: SQL,
    *,
    lock_timeout_ms: int,
    give_up_after_s: float,
) -> None:
    """Lock the ledger against writers, then change the settings and the trigger."""
    with session(engine_of(database)) as conn:
        verify(conn)
        host = with_stored_mapping(conn, config).host
        ledger, trigger = Identifier(host.schema_of_ledger, LEDGER), Identifier(EVENTS_TRIGGER)
        send_when_free(
            conn,
            [
                SQL("LOCK TABLE {} IN SHARE ROW EXCLUSIVE MODE").format(ledger),
                settings,
                trigger_change.format(trigger=trigger, ledger=ledger),
            ],
            action="switch events",
            tables=[ledger],
            lock_timeout_ms=lock_timeout_ms,
            give_up_after_s=give_up_after_s,
        )
