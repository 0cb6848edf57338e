"""The run: one transaction for each revision, its locked part and COMMIT in one message, retried as a whole.

What was measured, and why each line is where it is, stands in docs/migration.md. In short: nobody may wait for us
longer than the stall budget. A lock that is asked for and not given makes every later query queue behind it, so we
first look who is there, then ask without waiting, and only then wait, briefly; and once we have it, the network is
not allowed between two statements.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from typing import Literal

import psycopg
import sqlalchemy as sa
from psycopg.sql import SQL, Composable, Identifier
from sqlalchemy.pool import NullPool

from tallystick.config import Config
from tallystick.errors import (
    ConfigError,
    DatabaseUnavailable,
    LedgerNotEmpty,
    MigrationBlocked,
    MigrationError,
    MigrationRunning,
    OutcomeUnknown,
    PermissionDenied,
    PoolerRefused,
    TallystickError,
)
from tallystick.migrate.blockers import Blocker, Watch
from tallystick.migrate.host import Host, examine
from tallystick.migrate.revisions import HostNames, Revision, after, revisions, up_to
from tallystick.migrate.statements import (
    ADVISORY_KEY,
    MEASURE,
    MOVED,
    NOT_EMPTY,
    RUNNING,
    STALL_BUDGET_MS,
    Messages,
    downward,
    text,
    upward,
)
from tallystick.schema import LEDGER, migration_log

GIVE_UP_AFTER_S = 120.0

APPLICATION_NAME = "tallystick migrate"

_PROBE_EVERY_S = 0.1
_CHECKS_CLIENT = 140000
_GRACE_S = 3.0  # how long a killed run's server process may take to notice

Phase = Literal["waiting", "locking", "applied", "online"]


@dataclass(frozen=True)
class Progress:
    """What a run is doing now. ``blockers`` are in its way; ``fraction`` (0 to 1) is known for online steps."""

    phase: Phase
    revision: str
    attempt: int = 0
    blockers: tuple[Blocker, ...] = ()
    step: str | None = None
    fraction: float | None = None


@dataclass(frozen=True)
class Step:
    """One revision that was applied or undone.

    ``locked_ms`` is measured on the server, from the moment the last table lock was given until after the commit.
    """

    revision: str
    attempts: int
    locked_ms: float
    duration_ms: float
    waited_for: tuple[Blocker, ...]
    adopted: tuple[str, ...] = ()


@dataclass(frozen=True)
class OnlineStep:
    """An index built, or a constraint validated, outside of the transaction."""

    name: str
    outcome: Literal["built", "repaired", "validated"]
    duration_ms: float


@dataclass(frozen=True)
class Receipt:
    """What a run did. ``changed`` is False where there was nothing to do."""

    action: Literal["apply", "undo"]
    before: str | None
    after: str | None
    steps: tuple[Step, ...] = ()
    online: tuple[OnlineStep, ...] = ()

    @property
    def changed(self) -> bool:
        """Whether anything was done."""
        return bool(self.steps or self.online)


def apply(
    database: sa.Engine | str,
    config: Config,
    *,
    stall_budget_ms: int = STALL_BUDGET_MS,
    give_up_after_s: float = GIVE_UP_AFTER_S,
    progress: Callable[[Progress], None] | None = None,
) -> Receipt:
    """Bring the database to this package's revision, while its traffic goes on.

    Each revision is one transaction: killed at any point, the database is before it or after it. A second run
    changes nothing, and finishes what an interrupted one left of the online steps.

    Args:
        database: an engine, or an address; a direct one, not a pooler's.
        config: whose mapping says what the host's tables are called.
        stall_budget_ms: how long one attempt may let live traffic wait for a lock, and how long any one statement
            under the lock may take.
        give_up_after_s: for how long attempts are made, for each revision.
        progress: called with each :class:`Progress`.

    Raises:
        MigrationBlocked: the tables could not be locked in time; names who was in the way.
        MigrationRunning: another run is at it.
        PoolerRefused: the address is a pooler's.
        SchemaError: the database cannot be migrated as it is (see :func:`~tallystick.migrate.examine`).
        OutcomeUnknown: the connection died at the commit. Run it again: it continues from whatever is there.
        DatabaseUnavailable, PermissionDenied, MigrationError: otherwise.
    """
    with _session(database) as conn:
        run = _Run(conn, config, stall_budget_ms, give_up_after_s, progress or (lambda _: None))
        return run.apply()


def undo(
    database: sa.Engine | str,
    config: Config,
    *,
    discard_ledger: bool = False,
    stall_budget_ms: int = STALL_BUDGET_MS,
    give_up_after_s: float = GIVE_UP_AFTER_S,
    progress: Callable[[Progress], None] | None = None,
) -> Receipt:
    """Take Tallystick out of the database again: exactly what was there before remains.

    Arguments and errors are those of :func:`apply`.

    Raises:
        LedgerNotEmpty: the ledger has rows, and ``discard_ledger`` is False.
    """
    with _session(database) as conn:
        run = _Run(conn, config, stall_budget_ms, give_up_after_s, progress or (lambda _: None))
        return run.undo(discard_ledger=discard_ledger)


class _Run:
    """One session that migrates."""

    def __init__(
        self,
        conn: sa.Connection,
        config: Config,
        stall_budget_ms: int,
        give_up_after_s: float,
        progress: Callable[[Progress], None],
    ) -> None:
        if stall_budget_ms < 1:
            raise ConfigError(f"a stall budget of {stall_budget_ms} ms is no time at all; give at least 1")
        self.conn = conn
        self.config = config
        self.stall_budget_ms = stall_budget_ms
        self.give_up_after_s = give_up_after_s
        self.progress = progress

    def apply(self) -> Receipt:
        host = examine(self.conn, self.config)
        _become_the_only_run(self.conn)
        host = examine(self.conn, self.config)  # another run may have ended just now
        names = HostNames.of(self.config.host, host.adopted)
        steps = []
        reached = host.revision
        for revision in after(host.revision):
            adopted = host.adopted_names if revision.down_revision is None else ()
            steps.append(
                self._transaction(
                    revision,
                    host,
                    "apply",
                    upward(
                        revision,
                        names,
                        expected=reached,
                        adopted=adopted,
                        stall_budget_ms=self.stall_budget_ms,
                    ),
                    adopted=adopted,
                )
            )
            reached = revision.revision
            self._log(steps[-1])
        online = [step for revision in revisions() for step in self._online(revision, names)]
        return Receipt("apply", host.revision, reached, tuple(steps), tuple(online))

    def undo(self, *, discard_ledger: bool) -> Receipt:
        examine(self.conn, self.config)
        _become_the_only_run(self.conn)
        host = examine(self.conn, self.config)
        if host.revision is not None and not discard_ledger:
            self._refuse_rows(host)
        names = HostNames.of(self.config.host, host.adopted)
        steps = []
        for revision in reversed(up_to(host.revision)):
            messages = downward(revision, names, discard_ledger=discard_ledger, stall_budget_ms=self.stall_budget_ms)
            steps.append(self._transaction(revision, host, "undo", messages))
        return Receipt("undo", host.revision, None, tuple(steps))

    def _transaction(
        self,
        revision: Revision,
        host: Host,
        action: Literal["apply", "undo"],
        messages: Messages,
        *,
        adopted: tuple[str, ...] = (),
    ) -> Step:
        """Run both messages until they go through, from the start each time."""
        watch = Watch(self.conn, [table.oid for table in host.tables])
        started = time.monotonic()
        deadline = started + self.give_up_after_s
        waited_for: dict[tuple[int, str | None], Blocker] = {}
        pause_s = 0.1
        attempts = 0
        while True:
            self._wait_for_old_transactions(watch, revision, attempts, deadline, waited_for)
            attempts += 1
            self.progress(Progress("locking", revision.revision, attempts))
            try:
                _send(self.conn, messages.opening)
                locked_ms = _send(self.conn, (*messages.locked, MEASURE))
            except (
                psycopg.errors.LockNotAvailable,
                psycopg.errors.QueryCanceled,
                psycopg.errors.DeadlockDetected,
            ):
                _roll_back(self.conn)
                blockers = watch.holders()
                if time.monotonic() + pause_s > deadline:
                    raise self._blocked(revision, attempts, blockers) from None
                self.progress(Progress("waiting", revision.revision, attempts, tuple(blockers)))
                time.sleep(pause_s * random.uniform(0.5, 1))  # noqa: S311  # jitter, not a secret
                pause_s = min(pause_s * 2, 2)
                continue
            except psycopg.Error as error:
                _roll_back(self.conn)
                raise _translate(error, action) from error
            self.progress(Progress("applied", revision.revision, attempts))
            return Step(
                revision=revision.revision,
                attempts=attempts,
                locked_ms=round(locked_ms or 0, 3),
                duration_ms=round((time.monotonic() - started) * 1000, 3),
                waited_for=tuple(waited_for.values()),
                adopted=adopted,
            )

    def _wait_for_old_transactions(
        self,
        watch: Watch,
        revision: Revision,
        attempts: int,
        deadline: float,
        waited_for: dict[tuple[int, str | None], Blocker],
    ) -> None:
        while blockers := watch.in_the_way():
            for blocker in blockers:
                waited_for[blocker.pid, blocker.gid] = blocker
            if time.monotonic() > deadline:
                raise self._blocked(revision, attempts, blockers)
            self.progress(Progress("waiting", revision.revision, attempts, tuple(blockers)))
            time.sleep(_PROBE_EVERY_S)

    def _blocked(self, revision: Revision, attempts: int, blockers: Sequence[Blocker]) -> MigrationBlocked:
        who = "; ".join(str(blocker) for blocker in blockers) or "short transactions, one after the other"
        return MigrationBlocked(
            f"revision {revision.revision} could not lock the tables within {self.give_up_after_s:g} s "
            f"({attempts} attempts). In the way: {who}. Nothing was changed. Run it again when that has ended, "
            f"or wait longer (--give-up-after), or allow more (--stall-budget-ms, now {self.stall_budget_ms})",
            attempts=attempts,
            blockers=list(blockers),
        )

    def _log(self, step: Step) -> None:
        newest = sa.select(sa.func.max(migration_log.c.id)).where(migration_log.c.revision == step.revision)
        self.conn.execute(
            migration_log.update()
            .where(migration_log.c.id == newest.scalar_subquery())
            .values(
                attempts=step.attempts,
                locked_ms=step.locked_ms,
                duration_ms=step.duration_ms,
                waited_for=[json.loads(json.dumps(asdict(blocker), default=str)) for blocker in step.waited_for],
            )
        )

    def _refuse_rows(self, host: Host) -> None:
        rows = self.conn.scalar(sa.select(sa.func.count()).select_from(sa.table(LEDGER, schema=host.users.schema)))
        if rows:
            raise LedgerNotEmpty(
                f"the ledger holds {rows} credit transactions, which undo would throw away. Take a backup, "
                "then run: tallystick migrate undo --discard-ledger",
                rows=rows,
            )

    # --- after the commit

    def _online(self, revision: Revision, names: HostNames) -> Iterator[OnlineStep]:
        for name, statement in revision.indexes(names).items():
            index = Identifier(names.users.schema, name)
            started = time.monotonic()
            state = _index_state(self.conn, names.users.schema, name)
            if state == "valid":
                continue
            self.progress(Progress("online", revision.revision, step=name))
            for leftover in _leftovers(self.conn, names.users.schema, name):
                _alone(self.conn, SQL("DROP INDEX CONCURRENTLY {}").format(Identifier(names.users.schema, leftover)))
            try:
                if state == "missing":
                    _alone(self.conn, statement)
                else:
                    # keeps whatever uniqueness the broken one still enforces until the new one takes over
                    _alone(self.conn, SQL("REINDEX INDEX CONCURRENTLY {}").format(index))
            except psycopg.Error as error:
                raise _translate(error, "apply", online=name) from error
            if _index_state(self.conn, names.users.schema, name) != "valid":
                raise MigrationError(f"the index {name} did not become valid. Run: tallystick migrate apply")
            yield OnlineStep(
                name,
                "built" if state == "missing" else "repaired",
                round((time.monotonic() - started) * 1000, 3),
            )
        for name, statement in revision.validates(names).items():
            values = {"schema": names.users.schema, "table": LEDGER, "name": name}
            if self.conn.scalar(_IS_VALIDATED, values) is not False:
                continue
            started = time.monotonic()
            self.progress(Progress("online", revision.revision, step=name))
            try:
                _alone(self.conn, statement)
            except psycopg.Error as error:
                raise _translate(error, "apply", online=name) from error
            yield OnlineStep(name, "validated", round((time.monotonic() - started) * 1000, 3))


# --- the session


@contextmanager
def _session(database: sa.Engine | str) -> Iterator[sa.Connection]:
    """A connection of our own in autocommit, closed afterwards and never given back to a pool."""
    engine = sa.create_engine(database, poolclass=NullPool) if isinstance(database, str) else database
    try:
        conn = engine.execution_options(isolation_level="AUTOCOMMIT").connect()
    except sa.exc.OperationalError as error:
        raise DatabaseUnavailable(
            f"no connection to the database: {str(error.orig).strip()}. Check the address (--database-url)",
            sqlstate=None,
        ) from error
    try:
        conn.detach()  # its settings must not reach whoever would get it next
        refuse_pooler(conn)
        conn.execute(sa.select(sa.func.set_config("application_name", APPLICATION_NAME, sa.false())))
        # the server ends what a killed client was running, instead of holding our lock to the end
        if driver(conn).info.server_version >= _CHECKS_CLIENT:
            with suppress(sa.exc.DBAPIError):  # not on every operating system
                conn.execute(sa.select(sa.func.set_config("client_connection_check_interval", "500ms", sa.false())))
        yield conn
    except sa.exc.DBAPIError as error:
        if isinstance(error.orig, psycopg.Error):
            raise _translate(error.orig, "run") from error
        raise
    finally:
        conn.close()


def driver(conn: sa.Connection) -> psycopg.Connection[tuple[object, ...]]:
    """The psycopg connection under ``conn``: a whole message is sent to it as text."""
    found = conn.connection.dbapi_connection
    if not isinstance(found, psycopg.Connection):
        raise MigrationError(
            f"migrations need psycopg 3, this engine uses {conn.dialect.driver}. Use postgresql+psycopg://…"
        )
    return found


def refuse_pooler(conn: sa.Connection) -> None:
    """Raise PoolerRefused where a transaction pooler stands between us and the server."""
    info = driver(conn).info
    sign = None
    if "-pooler." in f"{info.host}.":
        sign = f"the host is called {info.host}"
    elif info.backend_pid != conn.scalar(sa.select(sa.func.pg_backend_pid())):
        sign = "the server process is another than the one that greeted us"
    if sign:
        raise PoolerRefused(
            f"this address is a connection pooler's ({sign}); a migration needs a session of its own. "
            "Put the direct address into DATABASE_URL_UNPOOLED (or database_url_unpooled)"
        )


def _become_the_only_run(conn: sa.Connection) -> None:
    deadline = time.monotonic() + _GRACE_S
    while not conn.scalar(sa.select(sa.func.pg_try_advisory_lock(ADVISORY_KEY))):
        if time.monotonic() > deadline:
            holder = conn.scalar(_LOCK_HOLDER, {"key": ADVISORY_KEY})
            raise MigrationRunning(
                f"another migration of this database is running (pid {holder}). Wait for it, then look: "
                "tallystick migrate status"
            )
        time.sleep(0.1)


_LOCK_HOLDER = sa.text("""
    SELECT pid FROM pg_locks
    WHERE locktype = 'advisory' AND granted AND objsubid = 1
      AND (classid::bigint << 32 | objid::bigint) = :key
      AND database = (SELECT oid FROM pg_database WHERE datname = current_database())
    LIMIT 1
""")


def _send(conn: sa.Connection, statements: Sequence[Composable]) -> float | None:
    """Send everything as one message and give the last result, if any: the time held, in milliseconds.

    Without parameters psycopg uses the simple protocol, which takes many statements; autocommit keeps it from
    adding a BEGIN of its own.
    """
    with driver(conn).cursor() as cursor:
        cursor.execute(text(statements).encode(driver(conn).info.encoding), prepare=False)
        while cursor.nextset():
            pass
        row = cursor.fetchone() if cursor.description else None
    return float(row[0]) if row else None  # type: ignore[arg-type]  # a numeric


def _alone(conn: sa.Connection, statement: Composable) -> None:
    """Run a statement that allows no transaction around it; it may wait for as long as it needs."""
    with driver(conn).cursor() as cursor:
        cursor.execute("SELECT set_config('lock_timeout', '0', false), set_config('statement_timeout', '0', false)")
        cursor.execute(SQL("{}").format(statement), prepare=False)


def _roll_back(conn: sa.Connection) -> None:
    raw = driver(conn)
    if not raw.closed:
        with suppress(psycopg.OperationalError):  # it died; the caller tells what that means
            raw.execute("ROLLBACK")


def _translate(error: psycopg.Error, action: str, *, online: str | None = None) -> TallystickError:
    """What a refused statement means to the person who ran the migration."""
    said = (error.diag.message_primary or str(error)).strip().rstrip(".")
    detail = error.diag.message_detail or ""
    state = error.sqlstate
    found: TallystickError
    if state in (RUNNING, MOVED):
        found = MigrationRunning(f"another run came first: {said}. Look: tallystick migrate status")
    elif state == NOT_EMPTY:
        found = LedgerNotEmpty(
            "a credit transaction was written just now. Nothing was changed. Take a backup, then run: "
            "tallystick migrate undo --discard-ledger",
            rows=1,
        )
    elif state == "42501":
        found = PermissionDenied(
            f"the database refused: {said}. Nothing was changed. Connect as the owner of the tables",
            sqlstate=state,
        )
    elif state is None or state.startswith(("08", "57P")) or state in ("58030", "XX000"):
        found = OutcomeUnknown(
            f"the connection was lost ({said}). The database is as before or as after, never between. "
            "Run the same command again: it continues from whatever is there",
            sqlstate=state,
        )
    elif online is not None:
        found = MigrationError(
            f"{online} could not be built or validated: {said}. {detail} "
            "The revision itself is in place. Mend the cause, then run: tallystick migrate apply"
        )
    elif state == "2BP01":
        found = MigrationError(
            f"something of yours depends on what undo removes: {detail or said}. "
            "Nothing was changed. Drop or change it first"
        )
    else:
        found = MigrationError(f"the database refused to {action}: {said} ({state}). Nothing was changed")
    return found


_INDEX_STATE = sa.text("""
    SELECT i.indisvalid AND i.indisready AND i.indislive
    FROM pg_index i JOIN pg_class c ON c.oid = i.indexrelid
    WHERE c.relnamespace = to_regnamespace(quote_ident(:schema)) AND c.relname = :name
""")

_IS_VALIDATED = sa.text("""
    SELECT convalidated FROM pg_constraint
    WHERE conrelid = to_regclass(quote_ident(:schema) || '.' || quote_ident(:table)) AND conname = :name
""")

_LEFTOVERS = sa.text("""
    SELECT c.relname FROM pg_index i JOIN pg_class c ON c.oid = i.indexrelid
    WHERE c.relnamespace = to_regnamespace(quote_ident(:schema)) AND NOT i.indisvalid
      AND c.relname ~ ('^' || :name || '_cc(new|old)[0-9]*$')
""")


def _index_state(conn: sa.Connection, schema: str, name: str) -> Literal["missing", "valid", "invalid"]:
    found = conn.scalar(_INDEX_STATE, {"schema": schema, "name": name})
    if found is None:
        return "missing"
    return "valid" if found else "invalid"


def _leftovers(conn: sa.Connection, schema: str, name: str) -> Sequence[str]:
    """What a killed REINDEX CONCURRENTLY left."""
    return conn.scalars(_LEFTOVERS, {"schema": schema, "name": name}).all()
