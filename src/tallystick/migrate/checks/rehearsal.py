"""Rehearsal: a migration on a copy, with its real locks, scans and rewrites, and the way back.

It runs each statement by itself and checks, in the same transaction, its locks (``pg_locks``), rows read
(``pg_stat_xact_user_tables``) and rewrites (``relfilenode``). A real run sends all as one message, so it holds the
locks for a shorter time than measured here. Then the ledger is used as an app would use it, and all is undone.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

import psycopg
import sqlalchemy as sa

from tallystick.config import Config, HostMapping
from tallystick.database import driver
from tallystick.declared_tables import Schema, user_columns, workshop_columns
from tallystick.errors import Key, MigrationError, TallystickError
from tallystick.ledger import Ledger
from tallystick.migrate.checks.plan import Phase, PlannedStatement, plan
from tallystick.migrate.checks.status import status
from tallystick.migrate.host.preflight import Host, current_revision, examine
from tallystick.migrate.host.tables import oid_of
from tallystick.migrate.revisions import after
from tallystick.migrate.runner.run import undo
from tallystick.migrate.runner.session import engine_of, session
from tallystick.progress import OnProgress, Progress, ignore_progress
from tallystick.schema import LEDGER


@dataclass(frozen=True)
class Traced:
    """One statement as it ran: its time (milliseconds from the start), and its effect on the host's tables.

    ``locks`` are those held after it, (table, lock); ``surprises`` are the differences from the plan.
    """

    phase: Phase
    sql: str
    started_ms: float
    took_ms: float
    locks: tuple[tuple[str, str], ...]
    rows_read: int
    rewrites: bool
    surprises: tuple[str, ...]


@dataclass(frozen=True)
class LedgerCheck:
    """One operation of the ledger on the migrated copy; ``fault`` is the error, or None."""

    what: str
    took_ms: float
    fault: str | None


@dataclass(frozen=True)
class Rehearsal:
    """The record of a rehearsal.

    ``drift`` is that of the migrated copy, with the audit's findings. ``broken`` are statements of the app that failed
    there. ``left_behind`` are differences after the way back, and rows of the app that changed at any step. ``lived``
    are the operations tried; it is empty where the copy has no user that is not deleted.
    """

    tables: tuple[tuple[str, int], ...]
    statements: tuple[Traced, ...]
    locked_ms: float
    drift: tuple[str, ...]
    broken: tuple[str, ...]
    left_behind: tuple[str, ...]
    lived: tuple[LedgerCheck, ...] = ()

    @property
    def surprises(self) -> tuple[str, ...]:
        """Differences between the copy's behaviour and the plan."""
        return tuple(text for statement in self.statements for text in statement.surprises)

    @property
    def passed(self) -> bool:
        """True if the original can be migrated the same way."""
        return not self.problems

    @property
    def problems(self) -> tuple[str, ...]:
        """All problems, one sentence each."""
        faults = (f"the ledger, {one.what}: {one.fault}" for one in self.lived if one.fault)
        return (*self.surprises, *faults, *self.drift, *self.broken, *self.left_behind)


def refuse_nothing_to_rehearse(conn: sa.Connection) -> None:
    """Raise MigrationError if no revision is pending. Call it with the original, before a copy is made."""
    revision = current_revision(conn)
    if not after(revision):
        raise MigrationError(f"there is nothing to rehearse: the database is at revision {revision} already")


def rehearse(
    database: sa.Engine | str,
    config: Config,
    *,
    app_statements: Sequence[str] = (),
    audit: Callable[[sa.Connection], Sequence[str]] | None = None,
    progress: OnProgress = ignore_progress,
) -> Rehearsal:
    """Migrate a copy, check it, and undo. Pass it only a copy that can be thrown away.

    ``app_statements`` are the app's own. Each is tried before the migration, after it and after the undo, and rolled
    back each time. For a user of the copy, with a workshop if there is one, credits are granted, bought, spent,
    refunded and read; then ``audit`` returns faults. ``progress`` is called when a step begins.

    Raises what ``plan``, ``apply`` and ``undo`` do, and MigrationError if no revision is pending.
    """
    engine = engine_of(database)
    progress(Progress("planning"))
    with session(engine) as conn:
        host = examine(conn, config)
        planned = plan(conn, config)
        refuse_nothing_to_rehearse(conn)
        before = _catalogue(conn)
        own_triggers = {table.shown for table in host.tables if conn.scalar(_TRIGGERS, {"table": table.oid})}
        there = _contents(conn, host, config.host)
        works = [statement for statement in app_statements if _error_of(conn, statement) is None]
        progress(Progress("migrating, statement by statement"))
        traced = tuple(_trace(conn, host, planned.statements))
        broken = tuple(_broken(conn, works, "after the migration"))
        rows = tuple((table.shown, _rows(conn, table.oid)) for table in host.tables)
        migrated = _contents(conn, host, config.host)
    progress(Progress("using the ledger"))
    with engine.connect() as conn:
        lived = tuple(_use_ledger(conn, config))
    progress(Progress("auditing"))
    with engine.connect() as conn:
        drift = tuple(str(each) for each in status(conn, config).drift) + tuple(audit(conn) if audit else ())
        used = _contents(conn, host, config.host)
    progress(Progress("going back"))
    undo(engine, config, to=host.revision, discard_ledger=True)
    progress(Progress("comparing with what was there"))
    with session(engine) as conn:
        broken += tuple(_broken(conn, works, "after the way back"))
        left = tuple(sorted(before ^ _catalogue(conn)))
        left += tuple(_changed(there, migrated, "the migration"))
        # a trigger of the app's may write to its tables when the ledger is used
        left += tuple(_changed(migrated, used, "using the ledger", except_in=own_triggers))
        left += tuple(_changed(used, _contents(conn, host, config.host), "the way back"))
    return Rehearsal(rows, traced, round(_locked_ms(traced), 3), drift, broken, left, lived)


def refuse_same_database(copy: sa.Connection, original: sa.Connection) -> None:
    """Raise MigrationError if both connections lead to the same database, whatever their addresses."""
    if copy.execute(_IDENTITY).one() == original.execute(_IDENTITY).one():
        raise MigrationError(
            "this is the app's own database, not a copy of it. A rehearsal changes its database and empties the "
            "ledger there: give the address of a copy"
        )


_IDENTITY = sa.text("""
    SELECT oid::bigint, datname, pg_postmaster_start_time() FROM pg_database WHERE datname = current_database()
""")

_PARTS = re.compile(
    r"""--[^\n]* | /\*.*?\*/ | [eE]'(?:[^'\\]|\\.|'')*' | '(?:[^']|'')*' | "(?:[^"]|"")*"
      | (?P<tag>\$(?:[^\W\d]\w*)?\$).*?(?P=tag) | \w+ | .""",
    re.VERBOSE | re.DOTALL,
)


def split(script: str) -> Iterator[str]:
    """The statements of an SQL script. A semicolon in a string, a comment or a dollar-quoted body does not end one."""
    statement = ""
    for part in _PARTS.finditer(script):
        if part[0] == ";":
            if statement.strip():
                yield statement.strip()
            statement = ""
        elif not part[0].startswith(("--", "/*")):
            statement += part[0]
    if statement.strip():
        yield statement.strip()


def _use_ledger(conn: sa.Connection, config: Config) -> Iterator[LedgerCheck]:
    """Use the ledger as an app would, each step in a transaction of its own, up to the first failure."""
    ledger = Ledger(config)
    mark = f"rehearsal {uuid4()}"
    with conn.begin():
        user, workshop = _pick_user(conn, ledger)
    if user is None:
        return
    spending = "spending a credit" if workshop is None else "unlocking a workshop"
    begin: int = 0
    bought: Any = None

    def read(conn: sa.Connection) -> None:
        nonlocal begin
        begin = ledger.balance(conn, user)

    def buy(conn: sa.Connection) -> None:
        nonlocal bought
        bought = ledger.start_purchase(conn, user, credits=3, description=mark)

    def check(conn: sa.Connection) -> str | None:
        # 2 granted, 3 bought, 1 spent, 2 of the bought given back
        found, newest = ledger.balance(conn, user), ledger.history(conn, user, limit=4)
        if found != begin + 2:
            return f"the balance is {found} instead of {begin + 2}"
        kinds = [str(row.type) for row in newest]
        return None if kinds == _HISTORY else f"the history is {', '.join(kinds)} instead of {', '.join(_HISTORY)}"

    steps: Sequence[tuple[str, Callable[[sa.Connection], object]]] = (
        ("reading the balance", read),
        ("granting 2 credits", lambda conn: ledger.grant(conn, user, credits=2, key=f"{mark} grant", description=mark)),
        ("starting a purchase of 3", buy),
        ("completing it", lambda conn: ledger.complete_purchase(conn, user, purchase=bought.id)),
        (spending, lambda conn: ledger.consume(conn, user, workshop=workshop, key=f"{mark} spend")),
        ("refunding 2", lambda conn: ledger.refund(conn, user, bought.id, credits=2, key=f"{mark} refund")),
        ("reading balance and history", check),
    )
    for what, step in steps:
        started = time.monotonic()
        try:
            with conn.begin():
                result = step(conn)
            fault = result if isinstance(result, str) else None
        except (TallystickError, sa.exc.DBAPIError) as error:
            fault = str(error).partition("\n")[0]
        yield LedgerCheck(what, round((time.monotonic() - started) * 1000, 3), fault)
        if fault:
            return


_HISTORY = ["refund", "consumption", "purchase", "grant"]


def _pick_user(conn: sa.Connection, ledger: Ledger) -> tuple[Key | None, Key | None]:
    """A user, with a workshop of the user that is not paid for yet, if there is one."""
    schema = Schema.of(ledger.config.host)
    users, workshops = schema.users.c, schema.workshops
    living = sa.select(users.key).where(users.key.is_not(None), users.deleted_at.is_(None)).limit(1)
    if workshops is not None:
        shop = workshops.c
        free = living.add_columns(shop.key).join_from(schema.users, workshops, schema.owner == users.key)
        for user, workshop in conn.execute(free.where(shop.credit_consumed_at.is_(None), shop.deleted_at.is_(None))):
            return user, workshop
    return conn.scalar(living), None


def _contents(conn: sa.Connection, host: Host, mapping: HostMapping) -> dict[str, tuple[int, int]]:
    """By table, the number of rows and a hash of them, without the columns that Tallystick writes."""
    ours = {column.name for column in (*user_columns(mapping), *workshop_columns(mapping))}
    found = {}
    for table in host.tables:
        names = conn.scalars(_COLUMNS, {"table": table.oid}).all()
        columns: list[sa.ColumnClause[Any]] = [sa.column(name) for name in names if name not in ours]
        digest = sa.func.hashtextextended(sa.cast(sa.func.row(*columns), sa.Text), 0)
        rows = sa.table(table.table, schema=table.schema)
        count, total = conn.execute(
            sa.select(sa.func.count(), sa.func.coalesce(sa.func.sum(digest), 0)).select_from(rows)
        ).one()
        found[table.shown] = (int(count), int(total))
    return found


def _changed(
    before: Mapping[str, tuple[int, int]],
    after: Mapping[str, tuple[int, int]],
    by: str,
    *,
    except_in: Collection[str] = (),
) -> Iterator[str]:
    for table in sorted(before.keys() - except_in):
        if after.get(table) != before[table]:
            yield f"{table}: {by} changed its rows"


def _trace(conn: sa.Connection, host: Host, statements: Sequence[PlannedStatement]) -> Iterator[Traced]:
    raw = driver(conn)
    tables = {table.oid: table.shown for table in host.tables}
    ledger = oid_of(conn, host.ledger_schema, LEDGER)
    if ledger is not None:  # a new ledger is not in the plan's locks
        tables[ledger] = f"{host.ledger_schema}.{LEDGER}"
    first_started = time.monotonic()
    expected: dict[str, str] = {}
    reported: set[tuple[str, str, str]] = set()
    after = _state_of(conn, tables)
    for statement in statements:
        before, started = after, time.monotonic()
        raw.execute(statement.sql.encode(raw.info.encoding), prepare=False)
        ended = time.monotonic()
        after = _state_of(conn, tables)
        over = statement.phase == "online" or statement.sql == "COMMIT"
        locks = {} if over else after.locks
        read = 0 if over else max(0, after.read - before.read)
        rewrites = after.files != before.files
        surprises = []
        expected = {} if over else _stronger(expected, statement.locks)
        for table in () if over else tables.values():
            pair = table, expected.get(table, "no lock"), locks.get(table, "none")
            if pair[1:] != ("no lock", "none") and pair[1] != pair[2] and pair not in reported:
                reported.add(pair)  # the difference lasts until the commit: report it once
                surprises.append(f"{_short(statement.sql)}: the plan said {pair[1]} on {table}; there was {pair[2]}")
        if read and not statement.scans:
            surprises.append(f"{_short(statement.sql)}: it read {read} rows, the plan said none")
        if rewrites != statement.rewrites:
            surprises.append(f"{_short(statement.sql)}: {'it' if rewrites else 'nothing'} was written anew")
        yield Traced(
            statement.phase,
            statement.sql,
            round((started - first_started) * 1000, 3),
            round((ended - started) * 1000, 3),
            tuple(locks.items()),
            read,
            rewrites,
            tuple(surprises),
        )


def _locked_ms(traced: Sequence[Traced]) -> float:
    """The time for which readers were blocked."""
    exclusive = [one for one in traced if any(lock == "ACCESS EXCLUSIVE" for _, lock in one.locks)]
    commit = next((one for one in traced if one.sql == "COMMIT"), None)
    if not exclusive or commit is None:
        return 0.0
    return commit.started_ms + commit.took_ms - exclusive[0].started_ms - exclusive[0].took_ms


_COLUMNS = sa.text("""
    SELECT attname FROM pg_attribute WHERE attrelid = CAST(:table AS oid) AND attnum > 0 AND NOT attisdropped
    ORDER BY attnum
""")
_TRIGGERS = sa.text("""
    SELECT count(*) FROM pg_trigger t JOIN pg_proc p ON p.oid = t.tgfoid
    WHERE t.tgrelid = CAST(:table AS oid) AND NOT t.tgisinternal AND p.proname NOT LIKE 'tallystick\\_%'
""")
_STATE = sa.text("""
    WITH asked AS (SELECT oid FROM unnest(CAST(:tables AS oid[])) AS oid)
    SELECT (SELECT string_agg(concat_ws(' ', c.oid, c.relfilenode), ', ' ORDER BY c.oid)
            FROM pg_class c JOIN asked USING (oid)) AS files,
           (SELECT coalesce(sum(pg_stat_get_xact_tuples_returned(oid)), 0)::bigint FROM asked) AS read,
           ARRAY(SELECT concat_ws(' ', oid, l.mode) FROM pg_locks l JOIN asked ON oid = l.relation
                 WHERE l.pid = pg_backend_pid() AND l.granted AND l.locktype = 'relation') AS locks
""")
_CATALOGUE = sa.text("""
    WITH ours AS (SELECT oid FROM pg_namespace WHERE nspname <> 'information_schema' AND nspname !~ '^pg_')
    SELECT concat('column ', a.attrelid::regclass, '.', a.attname, ' ', format_type(a.atttypid, a.atttypmod),
                  a.attnotnull, pg_get_expr(d.adbin, d.adrelid))
    FROM pg_class c JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped
    LEFT JOIN pg_attrdef d ON d.adrelid = c.oid AND d.adnum = a.attnum WHERE c.relnamespace IN (SELECT oid FROM ours)
    UNION ALL SELECT concat('relation ', c.oid::regclass, ' ', c.relkind) FROM pg_class c
    WHERE c.relnamespace IN (SELECT oid FROM ours)
    -- a rule of ours comes back unchecked, since checking would read the ledger under the lock
    UNION ALL SELECT concat('constraint ', conrelid::regclass, ' ', conname, ' ',
                            replace(pg_get_constraintdef(oid), ' NOT VALID', ''))
    FROM pg_constraint WHERE connamespace IN (SELECT oid FROM ours)
    UNION ALL SELECT concat('trigger ', pg_get_triggerdef(oid)) FROM pg_trigger WHERE NOT tgisinternal
    UNION ALL SELECT concat('function ', oid::regprocedure) FROM pg_proc WHERE pronamespace IN (SELECT oid FROM ours)
    UNION ALL SELECT concat('type ', oid::regtype) FROM pg_type WHERE typnamespace IN (SELECT oid FROM ours)
    UNION ALL SELECT concat('schema ', nspname) FROM pg_namespace WHERE oid IN (SELECT oid FROM ours)
""")
_ROWS = sa.text("SELECT n_live_tup FROM pg_stat_user_tables WHERE relid = :oid")
# pg_locks's RowShareLock is ROW SHARE elsewhere; weakest first
_MODES = {
    "AccessShareLock": "ACCESS SHARE",
    "RowShareLock": "ROW SHARE",
    "RowExclusiveLock": "ROW EXCLUSIVE",
    "ShareUpdateExclusiveLock": "SHARE UPDATE EXCLUSIVE",
    "ShareLock": "SHARE",
    "ShareRowExclusiveLock": "SHARE ROW EXCLUSIVE",
    "ExclusiveLock": "EXCLUSIVE",
    "AccessExclusiveLock": "ACCESS EXCLUSIVE",
}


def _stronger(held: Mapping[str, str], more: Sequence[tuple[str, str]]) -> dict[str, str]:
    """The stronger lock on each table, of two sets."""
    rank = ["", *_MODES.values()]
    strongest = dict(held)
    for table, lock in more:
        strongest[table] = max(strongest.get(table, ""), lock, key=rank.index)
    return strongest


@dataclass(frozen=True)
class _TableState:
    """The state of some tables after a statement, in this session."""

    files: str
    """Changes when a table is written anew."""
    read: int
    """The rows that scans have read; only a difference is meaningful."""
    locks: Mapping[str, str]
    """Table → the strongest lock."""


def _state_of(conn: sa.Connection, tables: Mapping[int, str]) -> _TableState:
    row = conn.execute(_STATE, {"tables": list(tables)}).one()
    held = (each.split() for each in row.locks)
    return _TableState(row.files, row.read, _stronger({}, [(tables[int(oid)], _MODES[mode]) for oid, mode in held]))


def _catalogue(conn: sa.Connection) -> frozenset[str]:
    return frozenset(conn.scalars(_CATALOGUE))


def _rows(conn: sa.Connection, oid: int) -> int:
    return conn.scalar(_ROWS, {"oid": oid}) or 0


def _error_of(conn: sa.Connection, statement: str) -> str | None:
    """Try a statement and roll it back; returns the server's error, or None."""
    raw = driver(conn)
    raw.execute("BEGIN; SET LOCAL search_path TO DEFAULT")  # the app's, not ours
    try:
        raw.execute(statement.encode(raw.info.encoding), prepare=False)
    except psycopg.Error as error:
        return str(error.diag.message_primary or error)
    finally:
        raw.execute("ROLLBACK")
    return None


def _broken(conn: sa.Connection, statements: Sequence[str], when: str) -> Iterator[str]:
    for statement in statements:
        error = _error_of(conn, statement)
        if error is not None:
            yield f"{when}, {_short(statement)}: {error}"


def _short(statement: str) -> str:
    line = " ".join(statement.split())
    return line if len(line) <= 80 else f"{line[:79]}…"  # noqa: PLR2004 - what fits on a line
