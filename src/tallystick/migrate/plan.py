"""What a run would do, and what stands in its way now. Changes nothing."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import sqlalchemy as sa
from psycopg.sql import Composable

from tallystick.config import Config
from tallystick.migrate.blockers import Blocker, Watch
from tallystick.migrate.host import Host, examine, looking
from tallystick.migrate.revisions import HostNames, Revision, after, revisions
from tallystick.migrate.rules import Lock, Operation, estimated_ms, operations
from tallystick.migrate.session import USE_UNPOOLED, pooler_sign
from tallystick.migrate.statements import STALL_BUDGET_MS, Messages, text, upward
from tallystick.schema import LEDGER

Phase = Literal["prepare", "locked", "online"]


@dataclass(frozen=True)
class PlannedStatement:
    """One statement; ``locks`` are those on tables that exist already: (table, lock).

    ``prepare`` statements run before any lock that traffic could feel, ``locked`` ones as one message with their
    commit, ``online`` ones afterwards, each alone.
    """

    phase: Phase
    sql: str
    locks: tuple[tuple[str, str], ...]
    scans: bool
    rewrites: bool


@dataclass(frozen=True)
class PlannedRevision:
    """One transaction, and the online steps after it.

    ``estimated_hold_ms`` is for how long the tables will be locked, reckoned from what each operation cost when it
    was measured; the receipt tells how long it was.
    """

    revision: str
    title: str
    kind: Literal["expand", "contract"]
    statements: tuple[PlannedStatement, ...]
    estimated_hold_ms: float


@dataclass(frozen=True)
class TableSize:
    """A table of the host: rows as estimated by the server, bytes without indexes."""

    table: str
    rows: int
    bytes: int


@dataclass(frozen=True)
class Finding:
    """Something to know before the run. A ``stop`` would end it before anything is changed."""

    severity: Literal["stop", "warning", "note"]
    text: str


@dataclass(frozen=True)
class Replica:
    """A standby that follows this server.

    ``lag_s`` is by how much the last change was late there, None where it is idle; ``behind_bytes`` of the log are not
    repeated there yet, as far as it has told (every wal_receiver_status_interval). Both are None to a role that may
    not see it (GRANT pg_monitor).
    """

    name: str
    state: str
    lag_s: float | None
    behind_bytes: int | None


@dataclass(frozen=True)
class Plan:
    """``before`` is the revision now; ``revisions`` are those to come, none where there is nothing to do.

    ``blockers`` hold the tables now. ``long_transactions`` are process ids and ages in seconds of the transactions
    anywhere in the database that an index built concurrently would wait for.
    """

    before: str | None
    after: str
    revisions: tuple[PlannedRevision, ...]
    tables: tuple[TableSize, ...]
    adopted: tuple[str, ...]
    server: str
    blockers: tuple[Blocker, ...]
    long_transactions: tuple[tuple[int, float], ...]
    replicas: tuple[Replica, ...]
    database_bytes: int
    findings: tuple[Finding, ...]


def plan(conn: sa.Connection, config: Config, *, backup_folder: Path | None = None) -> Plan:
    """What :func:`apply` would do to this database, and what to know before.

    ``backup_folder``: where a backup would go, to compare the room there with the database's size.

    Raises what :func:`examine` does, but for missing privileges, which are findings.
    """
    with looking(conn):
        host = examine(conn, config, privileges=False)
        replicas = tuple(Replica(row.name, row.state, row.lag_s, row.behind_bytes) for row in conn.execute(_REPLICAS))
        long = tuple((row.pid, round(float(row.age_s), 1)) for row in conn.execute(_LONG_TRANSACTIONS))
        database_bytes = conn.scalar(_DATABASE_BYTES) or 0
        findings = (
            *_about_the_connection(conn, host),
            *_about_an_interrupted_run(host),
            *_about_cached_plans(conn, host),
            *_about_replicas(replicas),
            *_about_room(database_bytes, backup_folder),
        )
    return Plan(
        before=host.revision,
        after=revisions()[-1].revision,
        revisions=tuple(
            _planned(config, revision, messages, host)
            for revision, messages in _messages(config, host, STALL_BUDGET_MS)
        ),
        tables=tuple(TableSize(table.shown, table.rows, table.bytes) for table in host.tables),
        adopted=host.adopted_names,
        server=host.server,
        blockers=tuple(Watch(conn, [table.oid for table in host.tables]).in_the_way()),
        long_transactions=long,
        replicas=replicas,
        database_bytes=database_bytes,
        findings=findings,
    )


_REPLICAS = sa.text("""
    SELECT coalesce(nullif(application_name, ''), client_addr::text, 'standby') AS name, coalesce(state, '?') AS state,
           extract(epoch FROM replay_lag)::float AS lag_s,
           greatest(pg_wal_lsn_diff(pg_current_wal_lsn(), replay_lsn), 0)::bigint AS behind_bytes
    FROM pg_stat_replication ORDER BY 1
""")

_LONG_TRANSACTIONS = sa.text("""
    SELECT pid, extract(epoch FROM clock_timestamp() - xact_start) AS age_s
    FROM pg_stat_activity
    WHERE datname = current_database() AND pid <> pg_backend_pid() AND backend_type = 'client backend'
      AND xact_start < clock_timestamp() - interval '10 s'
    ORDER BY xact_start
""")

_DATABASE_BYTES = sa.text(
    "SELECT CASE WHEN has_database_privilege(current_database(), 'CONNECT')"
    " THEN pg_database_size(current_database()) END"
)

_STATEMENTS_SCHEMA = sa.text("""
    SELECT n.nspname FROM pg_extension e JOIN pg_namespace n ON n.oid = e.extnamespace
    WHERE e.extname = 'pg_stat_statements'
      AND current_setting('pg_stat_statements.max', true) IS NOT NULL  -- set only where the library is loaded
""")

_HERE = "(SELECT oid FROM pg_database WHERE datname = current_database())"

_STAR = re.compile(r"\b(?:select(?:\s+distinct)?|returning|,)\s+(?:[\w\"$.]+\.)?\*(?!\s*\d)", re.IGNORECASE)


def _about_the_connection(conn: sa.Connection, host: Host) -> Iterator[Finding]:
    sign = pooler_sign(conn)
    if sign:
        yield Finding("stop", f"This address is a connection pooler's ({sign}). {USE_UNPOOLED}")
    for missing in host.missing_privileges:
        yield Finding("stop", missing)


def _about_an_interrupted_run(host: Host) -> Iterator[Finding]:
    if host.prepared is not None:
        yield Finding(
            "note",
            f"The new objects of revision {host.prepared} are there already, from a run in two transactions that was "
            "interrupted; nothing uses them. apply goes on from there, undo takes them away",
        )


def _about_cached_plans(conn: sa.Connection, host: Host) -> Iterator[Finding]:
    """A prepared ``SELECT *`` fails on old connections once its table has a further column."""
    if host.revision is not None:
        return
    schema = conn.scalar(_STATEMENTS_SCHEMA)
    if schema is None:
        yield Finding(
            "note",
            "pg_stat_statements is not there, so prepared SELECT * and RETURNING * could not be looked for. "
            'On connections opened before the migration they fail with "cached plan must not change result type"',
        )
        return
    table = sa.table("pg_stat_statements", sa.column("query"), sa.column("calls"), sa.column("dbid"), schema=schema)
    names = [re.compile(rf"\b{re.escape(table.table)}\b") for table in host.tables]
    rows = conn.execute(sa.select(table.c.query, table.c.calls).where(table.c.dbid == sa.literal_column(_HERE)))
    for row in rows:
        if row.query and _STAR.search(row.query) and any(name.search(row.query) for name in names):
            shown = " ".join(row.query.split())[:120]
            yield Finding(
                "warning",
                f'"{shown}" ({row.calls} calls): where a driver has prepared it, it fails on connections opened '
                "before the migration until they are opened again. Name the columns, or restart the app afterwards",
            )


def _about_replicas(replicas: Sequence[Replica]) -> Iterator[Finding]:
    for replica in replicas:
        late = f", {replica.lag_s:.1f} s late" if replica.lag_s else ""
        behind = f", {replica.behind_bytes / 1e6:.1f} MB behind" if replica.behind_bytes else ""
        yield Finding(
            "warning",
            f"The standby {replica.name} ({replica.state}{late}{behind}) repeats the lock, and no run can look who is "
            "there: while a query there holds one of the tables, everything after the lock is late and new queries of "
            "the table wait, until that query ends or max_standby_streaming_delay cancels it. Run it when no long "
            "report does",
        )


def _about_room(database_bytes: int, folder: Path | None) -> Iterator[Finding]:
    if folder is not None and not folder.is_dir():
        yield Finding("warning", f"there is no folder {folder} for a backup. Make it, or name another with --backup")
    elif folder is not None:
        free = shutil.disk_usage(folder).free
        if free < database_bytes:
            yield Finding(
                "warning",
                f"{folder} has {free / 1e9:.1f} GB free and the database takes {database_bytes / 1e9:.1f} GB: a backup "
                "is compressed and may fit, but need not. Name another place with --backup",
            )


def _planned(config: Config, revision: Revision, messages: Messages, host: Host) -> PlannedRevision:
    names = HostNames.of(config.host, host.adopted)
    sizes = {table.shown: table.bytes for table in host.tables}
    if host.revision is not None:
        sizes[f"{host.users.schema}.{LEDGER}"] = 0  # there already; what a revision does to it is always without a scan
    locked = [operations(f"LOCK TABLE {table.as_string(None)}")[0].table or "" for table in revision.locks(names)]
    statements = tuple(_statements(messages, set(sizes), locked))
    hold_ms = sum(
        estimated_ms(operation, sizes.get(operation.table or "", 0))
        for statement in statements
        if statement.phase == "locked"
        for operation in operations(statement.sql)
        if operation.name != "block of code"
    )
    return PlannedRevision(revision.revision, revision.title, revision.kind, statements, round(hold_ms, 1))


def sql(conn: sa.Connection | None, config: Config, *, stall_budget_ms: int = STALL_BUDGET_MS) -> str:
    """The same as a script for psql, for review or to be run by hand.

    Without a connection it is the whole way from nothing, and takes no column for granted.

    Raises what :func:`examine` does.
    """
    host = None
    if conn is not None:
        with looking(conn):
            host = examine(conn, config)
    parts = [
        "-- Tallystick: " + (", ".join(r.revision for r in after(host.revision if host else None)) or "nothing to do"),
        "-- psql sends what is joined by \\; as one message: the network is not allowed between two statements",
        "-- while a table is locked. When a lock cannot be had in time it fails and changes nothing: run it again.",
        "\\set ON_ERROR_STOP on",
    ]
    for revision, messages in _messages(config, host, stall_budget_ms):
        parts += [
            f"\n-- {revision.revision}: {revision.title}\n-- new objects",
            text(messages.opening) + ";",
            "\n-- the tables, locked",
            text(messages.at_once, " \\;\n") + ";",
        ]
        if messages.online:
            parts += [
                "\n-- after the commit, online",
                "SET lock_timeout = 0; SET statement_timeout = 0;",
                text(messages.online.values()) + ";",
            ]
    return "\n".join(parts) + "\n"


def _messages(config: Config, host: Host | None, stall_budget_ms: int) -> Iterable[tuple[Revision, Messages]]:
    names = HostNames.of(config.host, host.adopted if host else frozenset())
    reached = host.revision if host else None
    for revision in after(reached):
        yield (
            revision,
            upward(
                revision,
                names,
                expected=reached,
                adopted=host.adopted_names if host and revision.down_revision is None else (),
                stall_budget_ms=stall_budget_ms,
                prepared=host is not None and host.prepared == revision.revision,
            ),
        )
        reached = revision.revision


def _statements(messages: Messages, existing: set[str], locked: Sequence[str]) -> Iterable[PlannedStatement]:
    phases: tuple[tuple[Phase, Iterable[Composable]], ...] = (
        ("prepare", messages.opening),
        ("locked", messages.locked),
        ("online", messages.online.values()),
    )
    for phase, statements in phases:
        for statement in statements:
            shown = text([statement])
            found = operations(shown)
            if phase == "locked" and shown.startswith("DO "):
                # the only block of code that a revision's message has: the lock itself
                locks = {table: Lock.ACCESS_EXCLUSIVE for table in locked if table in existing}
                found = ()
            else:
                locks = _locks(found, existing)
            touching = [operation for operation in found if operation.table in existing]
            yield PlannedStatement(
                phase,
                shown,
                tuple((table, str(lock)) for table, lock in locks.items()),
                scans=any(operation.scans for operation in touching),
                rewrites=any(operation.rewrites for operation in touching),
            )


def _locks(found: Iterable[Operation], existing: set[str]) -> dict[str, Lock]:
    strongest: dict[str, Lock] = {}
    for operation in found:
        for table, lock in ((operation.table, operation.lock), *operation.also):
            if table in existing and table is not None and lock > strongest.get(table, Lock.NONE):
                strongest[table] = lock
    return strongest
