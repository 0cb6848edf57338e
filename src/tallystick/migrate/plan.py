"""What a run would do, and what stands in its way now. Changes nothing."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import sqlalchemy as sa
from psycopg.sql import Composable

from tallystick.config import Config
from tallystick.migrate.blockers import Blocker, Watch
from tallystick.migrate.host import Host, HostTable, examine, looking
from tallystick.migrate.revisions import HostNames, Revision, after, revisions
from tallystick.migrate.rules import Lock, Operation, operations
from tallystick.migrate.statements import STALL_BUDGET_MS, Messages, text, upward

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
    """One transaction, and the online steps after it."""

    revision: str
    title: str
    kind: Literal["expand", "contract"]
    statements: tuple[PlannedStatement, ...]


@dataclass(frozen=True)
class TableSize:
    """A table of the host: rows as estimated by the server, bytes without indexes."""

    table: str
    rows: int
    bytes: int


@dataclass(frozen=True)
class Plan:
    """``before`` is the revision now; ``revisions`` are those to come, none where there is nothing to do."""

    before: str | None
    after: str
    revisions: tuple[PlannedRevision, ...]
    tables: tuple[TableSize, ...]
    adopted: tuple[str, ...]
    server: str
    blockers: tuple[Blocker, ...]


def plan(conn: sa.Connection, config: Config) -> Plan:
    """What :func:`apply` would do to this database.

    Raises what :func:`examine` does.
    """
    with looking(conn):
        host = examine(conn, config)
    return Plan(
        before=host.revision,
        after=revisions()[-1].revision,
        revisions=tuple(
            PlannedRevision(revision.revision, revision.title, revision.kind, tuple(_statements(messages, host.tables)))
            for revision, messages in _messages(config, host, STALL_BUDGET_MS)
        ),
        tables=tuple(TableSize(table.shown, table.rows, table.bytes) for table in host.tables),
        adopted=host.adopted_names,
        server=host.server,
        blockers=tuple(Watch(conn, [table.oid for table in host.tables]).in_the_way()),
    )


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
            text(messages.locked, " \\;\n") + ";",
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
            ),
        )
        reached = revision.revision


def _statements(messages: Messages, tables: Sequence[HostTable]) -> Iterable[PlannedStatement]:
    phases: tuple[tuple[Phase, Iterable[Composable]], ...] = (
        ("prepare", messages.opening),
        ("locked", messages.locked),
        ("online", messages.online.values()),
    )
    existing = {table.shown for table in tables}
    for phase, statements in phases:
        for statement in statements:
            shown = text([statement])
            found = operations(shown)
            if phase == "locked" and shown.startswith("DO "):
                # the only block of code that a revision's message has: the lock itself
                locks = {table.shown: Lock.ACCESS_EXCLUSIVE for table in tables}
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
