"""Sessions that hold the tables, checked before the lock is tried, so that live traffic never queues behind a wait."""

from __future__ import annotations

import datetime as dt
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal

import sqlalchemy as sa

from tallystick.database import with_known_settings

OLD_MS = 250
"""A transaction younger than this is ordinary traffic and will end soon."""

_HOLDERS = sa.text("""
    SELECT coalesce(l.pid, 0) AS pid, l.virtualtransaction AS transaction,
           array_agg(DISTINCT l.relation::regclass::text ORDER BY l.relation::regclass::text) AS tables,
           a.application_name AS application, a.usename AS role, a.state, a.backend_type, a.query_start,
           extract(epoch FROM clock_timestamp() - a.xact_start) * 1000 AS age_ms,
           a.backend_type = 'autovacuum worker' AND a.query LIKE '%(to prevent wraparound)%' AS wraparound,
           -- to a role that may not see what others do it has neither a type nor, unlike a client, an owner
           a.pid IS NOT NULL AND a.backend_type IS NULL AND a.usesysid IS NULL AS unseen_worker,
           (SELECT p.gid FROM pg_locks x JOIN pg_prepared_xacts p ON p.transaction = x.transactionid
            WHERE l.pid IS NULL AND x.pid IS NULL AND x.virtualtransaction = l.virtualtransaction LIMIT 1) AS gid
    FROM pg_locks l LEFT JOIN pg_stat_activity a ON a.pid = l.pid
    WHERE l.locktype = 'relation' AND l.granted AND l.relation = ANY (CAST(:tables AS oid[]))
      AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database())
      AND l.pid IS DISTINCT FROM pg_backend_pid()
    GROUP BY l.pid, l.virtualtransaction, a.application_name, a.usename, a.state, a.backend_type, a.query_start,
             a.xact_start, a.query, a.pid, a.usesysid
    ORDER BY age_ms DESC NULLS LAST
""")


Kind = Literal["client", "autovacuum", "wraparound vacuum", "prepared transaction"]


@dataclass(frozen=True)
class Blocker:
    """A transaction that holds one of the tables.

    ``pid`` is 0 and ``gid`` set for a prepared transaction. ``age_ms`` is how long the transaction has been open, or
    how long we have watched it if the role may not see more (GRANT pg_read_all_stats). Such a role cannot tell a vacuum
    against wraparound from another one: the run notices when it does not yield to the fence.
    """

    kind: Kind
    pid: int
    application: str
    role: str | None
    state: str | None
    tables: tuple[str, ...]
    age_ms: float
    query_start: dt.datetime | None
    gid: str | None = None

    def __str__(self) -> str:
        if self.kind == "prepared transaction":
            return f"prepared transaction {self.gid!r} on {', '.join(self.tables)} (ROLLBACK PREPARED or COMMIT it)"
        who = f"pid {self.pid}"
        if self.application:
            who += f" ({self.application})"
        what = f", {self.state}" if self.state and self.kind == "client" else f", {self.kind}"
        return f"{who}{what}, holds {', '.join(self.tables)} for {self.age_ms / 1000:.1f} s"


_LOCKED = sa.text("""
    SELECT DISTINCT relation FROM pg_locks
    WHERE locktype = 'relation' AND granted AND mode = 'AccessExclusiveLock' AND pid IS DISTINCT FROM pg_backend_pid()
      AND database = (SELECT oid FROM pg_database WHERE datname = current_database())
      AND relation IN (SELECT oid FROM pg_class WHERE relkind IN ('r', 'p', 'v', 'm'))
""")


def locked_by(conn: sa.Connection) -> str:
    """The sessions that hold tables exclusively, for a message; empty if that cannot be told.

    It uses a connection of its own: the transaction of ``conn`` has failed.
    """
    with suppress(sa.exc.SQLAlchemyError), with_known_settings(conn.engine).connect() as side:
        return "; ".join(map(str, exclusive_holders(side)))
    return ""


def exclusive_holders(conn: sa.Connection) -> list[Blocker]:
    """The transactions that hold tables exclusively, so that not even a reader gets them."""
    return Watch(conn, conn.scalars(_LOCKED).all()).holders()


class Watch:
    """A repeated check of the sessions that hold some tables, with the time since when each was seen."""

    def __init__(self, conn: sa.Connection, oids: Sequence[int]) -> None:
        self._conn = conn
        self._oids = list(oids)
        self._first_seen: dict[tuple[int, str], float] = {}

    def holders(self) -> list[Blocker]:
        """All transactions that hold a table now, oldest first."""
        now = time.monotonic()
        seen: dict[tuple[int, str], float] = {}
        found = []
        for row in self._conn.execute(_HOLDERS, {"tables": self._oids}):
            identity = (row.pid, row.transaction)
            seen[identity] = self._first_seen.get(identity, now)
            watched_ms = (now - seen[identity]) * 1000
            kind: Kind = "client"
            if row.pid == 0:
                kind = "prepared transaction"
            elif row.wraparound:
                kind = "wraparound vacuum"
            elif row.backend_type == "autovacuum worker" or row.unseen_worker:
                kind = "autovacuum"
            found.append(
                Blocker(
                    kind=kind,
                    pid=row.pid,
                    application=row.application or "",
                    role=row.role,
                    state=row.state,
                    tables=tuple(row.tables),
                    age_ms=max(float(row.age_ms or 0), watched_ms),
                    query_start=row.query_start,
                    gid=row.gid,
                )
            )
        self._first_seen = seen
        return found

    def blockers(self) -> list[Blocker]:
        """The transactions to wait for: not autovacuums, which yield to the fence, nor young ones, which end soon."""
        return [
            holder
            for holder in self.holders()
            if holder.kind in ("prepared transaction", "wraparound vacuum")
            or (holder.kind == "client" and holder.age_ms >= OLD_MS)
        ]
