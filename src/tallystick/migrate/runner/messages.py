"""The messages of a run: two for all pending revisions, and the statements after the commit.

1. The first message makes all objects that nobody can wait for.
2. The second takes the locks, changes the host's tables and commits. It is one string, so that no network round trip
   happens while the locks are held.

With ``two_transactions``, ``preparation`` commits the new objects. ``opening`` and ``locked`` are then one message with
the locked section only, so a try on a busy table is cheap. Between the two, ``tallystick.migration_log`` has a row of
direction ``prepare``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from psycopg.sql import SQL, Composable, Composed, Identifier
from psycopg.sql import Literal as SqlLiteral

from tallystick.declared_tables import user_columns, workshop_columns
from tallystick.migrate.host.dependents import refuse_dependents
from tallystick.migrate.host.privileges import close_new_objects, remember_objects
from tallystick.migrate.host.role import restore_table_privileges
from tallystick.migrate.revisions import HostNames, Revision, TableNames, adopted_by, do_block, up_to
from tallystick.migrate.runner.trial_writes import try_writes, try_writes_again
from tallystick.schema import HISTORY

ADVISORY_KEY = 8_386_103_206_419_437_683  # "tallystk" as eight bytes; advisory locks are per database

STALL_BUDGET_MS = 100
STALL_BUDGET_MAX_MS = 600_000
"""Ten minutes: PostgreSQL's settings of timeouts take no number that is much larger."""

# SQLSTATEs of our own
RUNNING, MOVED, NOT_EMPTY = "TS001", "TS002", "TS003"

_NOW_MS = (
    "extract(epoch FROM clock_timestamp()) * 1000"  # a number: the text of a time depends on the session's settings
)
_HELD_MS = f"{_NOW_MS} - current_setting('tallystick.locked_at')::numeric"

MEASURE = SQL(f"SELECT {_HELD_MS}")
"""The milliseconds for which others may have waited for us, read after the commit, by the server's clock."""


@dataclass(frozen=True)
class Messages:
    """The messages: ``opening`` and ``locked`` are sent as one string each; ``online`` statements one by one.

    ``locks`` are the tables that they lock. In ``locked`` each statement may take all of the stall budget; in
    ``at_once``, which must be sent as one string, they share it.
    """

    locks: tuple[Identifier, ...]
    opening: tuple[Composable, ...]
    locked: tuple[Composable, ...]
    online: Mapping[str, Composable]
    stall_budget_ms: int

    @property
    def at_once(self) -> tuple[Composable, ...]:
        """``locked`` as it is sent: the limit of each statement under the lock is the rest of the budget."""
        if not self.locks:
            return self.locked
        left_ms = f"greatest(1, ceil({self.stall_budget_ms} - ({_HELD_MS})))"
        left = SQL(f"SELECT set_config('statement_timeout', {left_ms}::text, true)")
        lock, _, *changes = self.locked
        return (lock, *(statement for change in changes for statement in (left, change)))


def upward(
    pending: Sequence[Revision],
    names: HostNames,
    *,
    expected: str | None,
    adopted: Iterable[str],
    stall_budget_ms: int,
    prepared: Collection[str] = (),
    renewal: Sequence[Composable] = (),
) -> Messages:
    """The messages from ``expected`` to the last of ``pending``; the preparation of ``prepared`` is committed already.

    ``adopted`` are the columns of ours that the host had, as ``users.updated_at``. ``renewal`` comes first; with it
    nothing need be pending.
    """
    locks = _without_duplicates(table for revision in pending for table in revision.locks(names))
    # in order, so that a function that two revisions change ends as in the later one
    replaces = [one for revision in pending for one in revision.replaces(names)] if not prepared else []
    changes = (
        one
        for revision in pending
        for one in (*(revision.replaces(names) if prepared else ()), *revision.locked(names))
    )
    online: dict[str, Composable] = {}
    for revision in pending:
        online |= {**revision.indexes(names), **revision.ledger_indexes(names), **revision.validates(names)}
    return Messages(
        locks=locks,
        opening=(
            *_begin(expected=expected),
            *renewal,
            *_prepared([revision for revision in pending if revision.revision not in prepared], names),
            *_fence(locks),
            *([_step_up(pending[-1], expected)] if pending else []),
            *(_log_prepared(revision, tuple(adopted), prepared=revision.revision in prepared) for revision in pending),
            *_trial_writes(locks, names, inserts=True),
            *replaces,
        ),
        locked=tuple(_locked(locks, _with_trial_writes(changes, locks, names), stall_budget_ms)),
        online=online,
        stall_budget_ms=stall_budget_ms,
    )


def renewal(before: HostNames, now: HostNames, revision: str) -> list[Composable]:
    """The statements that make the functions of a revision anew where the names differ, and store the mapping."""
    both = zip(functions_of(before, revision), functions_of(now, revision), strict=True)
    made: list[Composable] = [SQL(as_replacement(new)) for old, new in both if new != old]
    stored = SQL("UPDATE tallystick.mapping SET host = {}, stored_at = now()").format(SqlLiteral(now.mapping))
    return [*made, stored]


MADE = r"CREATE (?:OR REPLACE )?(FUNCTION|TYPE) tallystick\."


def as_replacement(statement: str) -> str:
    """The statement that creates a function, so that it may be there already."""
    return re.sub(MADE, r"CREATE OR REPLACE \1 tallystick.", statement, count=1)


def functions_of(names: HostNames, revision: str) -> list[str]:
    """The types and functions of a revision, and the triggers' functions as the revisions up to it leave them."""
    last = [text([made]) for made in names.functions(revision)]
    triggers: dict[str, str] = {}
    for each in up_to(revision):
        for statement in (text([made]) for made in (*each.prepare(names), *each.replaces(names))):
            if found := re.match(r"CREATE (?:OR REPLACE )?FUNCTION tallystick\.(\w+)\(\) RETURNS trigger", statement):
                triggers[found[1]] = statement
    return [*(made for made in triggers.values() if made not in last), *last]


def _without_duplicates(tables: Iterable[Identifier]) -> tuple[Identifier, ...]:
    """The tables once each, in the order of their first mention, which is the locking order."""
    found: list[Identifier] = []
    for table in tables:
        if table not in found:
            found.append(table)
    return tuple(found)


def preparation(
    pending: Sequence[Revision], names: HostNames, *, expected: str | None, adopted: Iterable[str]
) -> tuple[Composable, ...]:
    """The message that commits the new objects of ``pending``, which nothing uses yet."""
    return (
        *_begin(expected=expected),
        *_prepared(pending, names),
        *(_log_revision(revision, "prepare", tuple(adopted)) for revision in pending),
        SQL("COMMIT"),
    )


def downward(
    gone: Sequence[Revision],
    names: HostNames,
    *,
    expected: str | None,
    discard_ledger: bool,
    stall_budget_ms: int,
    prepared: Sequence[Revision] = (),
) -> Messages:
    """The messages that undo ``gone``, newest first, of which the first is ``expected``: all in one transaction.

    ``prepared`` are later revisions, newest first, whose ``preparation`` was committed: it is undone too.
    """
    names = replace(names, ledger_goes=bool(gone) and gone[-1].down_revision is None)
    # the oldest revision's locks first: the host's tables, then ours
    locks = _without_duplicates(
        table
        for of_one in (
            *(revision.undo_locks(names) for revision in reversed(gone)),
            *(revision.unprepare_locks(names) for revision in prepared),
        )
        for table in of_one
    )
    oldest = (*prepared, *gone)[-1]
    loses = bool(gone) or oldest.down_revision is None
    changes = [
        *([_refuse_if_rows(names)] if loses and not discard_ledger else []),
        *(
            [refuse_dependents(_added(names)), restore_table_privileges(names)]
            if gone and gone[-1].down_revision is None
            else []
        ),
        *(one for revision in prepared for one in revision.unprepare(names)),
        *_with_trial_writes((one for revision in gone for one in revision.undo(names)), locks, names),
        *(_step_down(gone[-1]) if gone else ()),
        # unless the log itself is dropped
        *([SQL("DELETE FROM tallystick.migration_log WHERE direction = 'prepare'")] if oldest.down_revision else []),
    ]
    return Messages(
        locks=locks,
        opening=(
            *_begin(expected=expected),
            *_fence(locks),
            *_trial_writes(locks, names, inserts=False),
            *(one for revision in gone for one in revision.unreplaces(names)),
        ),
        locked=tuple(_locked(locks, changes, stall_budget_ms)),
        online={},
        stall_budget_ms=stall_budget_ms,
    )


def _added(names: HostNames) -> Iterator[tuple[TableNames, list[str]]]:
    """The columns that the first revision added to each of the app's tables."""
    columns = {"users": user_columns(), "workshops": workshop_columns()}
    for table in names.tables:
        ours = [column.name for column in columns[table.word]]
        yield table, [name for name in ours if (table.word, name) not in names.adopted]


def text(statements: Iterable[Composable], separator: str = ";\n") -> str:
    """The statements as one string."""
    return separator.join(statement.as_string(None) for statement in statements)


def _with_trial_writes(
    changes: Iterable[Composable], locks: Sequence[Identifier], names: HostNames
) -> Iterator[Composable]:
    """The changes, followed by the trial writes of the first message."""
    yield from changes
    if _locked_app_tables(locks, names):
        # a function that ran before the changes would keep its old plan, unlike in the app's next session
        yield SQL("DISCARD PLANS")
        yield try_writes_again()


def _locked_app_tables(locks: Sequence[Identifier], names: HostNames) -> list[TableNames]:
    """The locked tables of the app."""
    return [table for table in names.tables if table.name in locks]


def _locked(locks: Sequence[Identifier], changes: Iterable[Composable], stall_budget_ms: int) -> Iterator[Composable]:
    yield _lock_all(locks, stall_budget_ms)
    if locks:
        # no statement under the lock may take longer than the stall budget
        yield SQL("SET LOCAL statement_timeout = {}").format(SqlLiteral(f"{stall_budget_ms}ms"))
    yield from changes
    yield SQL("COMMIT")


def _trial_writes(locks: Sequence[Identifier], names: HostNames, *, inserts: bool) -> list[Composable]:
    tables = _locked_app_tables(locks, names)
    ours = [column.name for column in (*user_columns(), *workshop_columns())]
    return [try_writes(tables, without=ours, inserts=inserts)] if tables else []


def _prepared(pending: Sequence[Revision], names: HostNames) -> Iterator[Composable]:
    """The new objects, which only their owner may use."""
    if pending:
        yield remember_objects(names)
        for revision in pending:
            yield from revision.prepare(names)
        yield close_new_objects(names)


def _step_up(to: Revision, expected: str | None) -> Composed:
    if expected is None:
        version = SQL("INSERT INTO tallystick.alembic_version (version_num) VALUES ({})")
    else:
        version = SQL("UPDATE tallystick.alembic_version SET version_num = {}")
    return version.format(SqlLiteral(to.revision))


def _log_prepared(revision: Revision, adopted: Sequence[str], *, prepared: bool) -> Composed:
    if not prepared:
        return _log_revision(revision, "apply", adopted)
    return SQL(
        "UPDATE tallystick.migration_log SET direction = 'apply', applied_at = now(), adopted = {}"
        " WHERE revision = {} AND direction = 'prepare'"
    ).format(_own(revision, adopted), SqlLiteral(revision.revision))


def _log_revision(revision: Revision, direction: str, adopted: Sequence[str]) -> Composed:
    return SQL(
        "INSERT INTO tallystick.migration_log (revision, direction, adopted, kind) VALUES ({}, {}, {}, {})"
    ).format(SqlLiteral(revision.revision), SqlLiteral(direction), _own(revision, adopted), SqlLiteral(revision.kind))


def _own(revision: Revision, adopted: Sequence[str]) -> SqlLiteral:
    return SqlLiteral(json.dumps(adopted_by(revision, adopted)))


def _begin(*, expected: str | None) -> Iterator[Composable]:
    yield SQL("BEGIN")
    yield SQL("SET LOCAL lock_timeout = '3s'")
    yield SQL("SET LOCAL statement_timeout = '30s'")
    # a frozen client must not even keep the fence
    yield SQL("SET LOCAL idle_in_transaction_session_timeout = '60s'")
    # with the tables locked, COMMIT must not wait for a standby, where a query may delay the replay of the lock
    yield SQL(
        "SELECT set_config('synchronous_commit', 'local', true) WHERE current_setting('synchronous_commit') <> 'off'"
    )
    yield do_block(
        SQL("""
DECLARE
  found text;
BEGIN
  IF NOT pg_try_advisory_xact_lock({key}) THEN
    RAISE EXCEPTION 'another migration is running' USING ERRCODE = {running};
  END IF;
  IF to_regclass('tallystick.alembic_version') IS NOT NULL THEN
    EXECUTE 'SELECT version_num FROM tallystick.alembic_version' INTO found;
  END IF;
  IF found IS DISTINCT FROM {expected} THEN
    RAISE EXCEPTION 'the revision is % now', found USING ERRCODE = {moved};
  END IF;
END""").format(
            key=SqlLiteral(ADVISORY_KEY),
            running=SqlLiteral(RUNNING),
            moved=SqlLiteral(MOVED),
            expected=SqlLiteral(expected),
        )
    )


def _fence(locks: Sequence[Identifier]) -> Iterator[Composable]:
    """A lock that makes a running autovacuum yield; it blocks neither reads nor writes."""
    if locks:
        yield SQL("LOCK TABLE {} IN SHARE UPDATE EXCLUSIVE MODE").format(SQL(", ").join(locks))


def _lock_all(locks: Sequence[Identifier], stall_budget_ms: int) -> Composable:
    """Take every lock: first without waiting, then with short waits that together stay within the budget.

    Each refused try costs a transaction id, which limits their number. A revision may have nothing to lock.
    """
    if not locks:
        return SQL("SELECT set_config('tallystick.locked_at', ({})::text, false)").format(SQL(_NOW_MS))
    nowait = SQL("LOCK TABLE {} IN ACCESS EXCLUSIVE MODE NOWAIT;").format(SQL(", ").join(locks))
    # lock_timeout is per table, so all tables of one wait share its time
    waiting = SQL("\n        ").join(
        SQL("""PERFORM set_config('lock_timeout', greatest(1, ceil(until - {}))::text, true);
        LOCK TABLE {} IN ACCESS EXCLUSIVE MODE;""").format(SQL(_NOW_MS), table)
        for table in locks
    )
    return do_block(
        SQL("""
DECLARE
  wait_ms integer;
  asked_at numeric;
  until numeric;
BEGIN
  FOR attempt IN 1..100 LOOP
    BEGIN
      asked_at := {now_ms};
      {nowait}
      PERFORM set_config('tallystick.locked_at', asked_at::text, false);
      RETURN;
    EXCEPTION WHEN lock_not_available THEN
      NULL;
    END;
    PERFORM pg_sleep(0.003);
  END LOOP;
  FOREACH wait_ms IN ARRAY {waits} LOOP
    BEGIN
      asked_at := {now_ms};  -- from here on others wait behind us
      until := asked_at + wait_ms * (0.75 + random() / 4);
      {waiting}
      PERFORM set_config('tallystick.locked_at', asked_at::text, false);
      RETURN;
    EXCEPTION WHEN lock_not_available THEN
      NULL;
    END;
    -- those who queued behind us go first
    PERFORM pg_sleep(wait_ms * 2 / 1000.0);
  END LOOP;
  RAISE EXCEPTION 'the tables are busy' USING ERRCODE = 'lock_not_available';
END""").format(
            now_ms=SQL(_NOW_MS),
            nowait=nowait,
            waiting=waiting,
            waits=SQL("ARRAY[{}]").format(
                SQL(", ").join(map(SqlLiteral, sorted({max(1, stall_budget_ms // 4), max(1, stall_budget_ms // 2)})))
            ),
        )
    )


def _refuse_if_rows(names: HostNames) -> Composable:
    return do_block(
        SQL("""
BEGIN
  IF EXISTS (SELECT FROM {ledger} WHERE {lost}) THEN
    RAISE EXCEPTION 'the ledger has rows' USING ERRCODE = {code};
  END IF;
END""").format(ledger=names.ledger, lost=SQL(HISTORY), code=SqlLiteral(NOT_EMPTY))
    )


def _step_down(revision: Revision) -> list[Composable]:
    if revision.down_revision is None:
        return []  # the log was dropped with it
    return [
        SQL("UPDATE tallystick.alembic_version SET version_num = {}").format(SqlLiteral(revision.down_revision)),
        SQL("INSERT INTO tallystick.migration_log (revision, direction) VALUES ({}, 'undo')").format(
            SqlLiteral(revision.revision)
        ),
    ]
