"""The run: one transaction for all pending revisions, its locked part and COMMIT in one message, retried as a whole.

If a database is so busy that this never succeeds, ``two_transactions`` commits the new objects first, in a transaction
of their own. A try is then one message of the locked part alone.

docs/migration.md has the measurements and reasons. In short, no query may wait for us longer than the stall budget. A
lock that is requested and not granted makes all later queries queue behind it. So a run takes these steps:

1. It checks which sessions hold the tables.
2. It requests the locks without waiting (NOWAIT).
3. Only then it waits for them, briefly.
4. While it holds them, no network round trip happens.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import psycopg
import sqlalchemy as sa
from psycopg.sql import Composable

from tallystick.config import Config
from tallystick.database import driver
from tallystick.declared_tables import migration_log
from tallystick.errors import ConfigError, MigrationBlocked, TallystickError
from tallystick.migrate.host.blockers import OLD_MS, Blocker, Watch
from tallystick.migrate.host.preflight import Host, examine, refuse_rows
from tallystick.migrate.host.role import granted_roles
from tallystick.migrate.host.tables import mapped_oids, oids_of
from tallystick.migrate.revisions import HostNames, Revision, adopted_by, after, revision_named, revisions, up_to
from tallystick.migrate.runner.messages import (
    MEASURE,
    STALL_BUDGET_MAX_MS,
    STALL_BUDGET_MS,
    Messages,
    downward,
    preparation,
    renewal,
    text,
    upward,
)
from tallystick.migrate.runner.online import Building, OnlineStep, online
from tallystick.migrate.runner.session import engine_of, forbidden_by, lost, session, single_run, translate
from tallystick.migrate.runner.widen import refuse_interrupted, validate_keys
from tallystick.progress import Progress
from tallystick.schema import changed_columns

GIVE_UP_AFTER_S = 120.0

_PROBE_EVERY_S = 0.1

Phase = Literal["connecting", "waiting", "prepared", "locking", "applied", "undone", "online"]

_SHORT = "short transactions, one after the other"
_SLOW = (
    "nobody who holds them, but what is done under the lock takes longer than the stall budget. Where nothing of yours "
    "slows it down (an event trigger does, or thousands of foreign keys: see tallystick migrate plan), an open "
    "transaction has changed their privileges or definition"
)
_NOTHING = "Nothing was changed"
_PREPARED = (
    "The new objects of revision {} are there and nothing uses them; nothing of yours was changed. "
    "To take them away again: {}"
)


@dataclass(frozen=True, kw_only=True)
class MigrationProgress(Progress):
    """The present phase of a run. ``step`` is the phase too, or the name of an online step.

    ``revision`` is the target, or for an undo the revision that is undone. The phase ``connecting`` comes while the
    server is starting up, with its message as ``detail``; ``prepared`` between the two transactions of a run with two.
    ``blockers`` hold the tables. For a long online step, ``detail`` is the server's name of its present work, ``done``
    the fraction of it (``total`` is 1), ``waits_for`` the process that it waits for.
    """

    phase: Phase
    revision: str | None = None
    attempt: int = 0
    blockers: tuple[Blocker, ...] = ()
    detail: str | None = None
    waits_for: int | None = None


@dataclass(frozen=True)
class Receipt:
    """The result of a run: ``revisions`` applied or undone, all in one transaction, and the online steps after it.

    ``locked_ms`` is measured on the server, from the request of the first lock, in the successful try, until after the
    commit: no query waited longer for it. ``two_transactions`` is True if new objects were committed before, by this
    run or an earlier one. ``changed`` is False if there was nothing to do. ``roles`` had been granted the ledger until
    an undo. ``renewed`` are the columns, with both names, for which the functions were made anew.
    """

    action: Literal["apply", "undo"]
    before: str | None
    after: str | None
    revisions: tuple[str, ...] = ()
    attempts: int = 0
    locked_ms: float = 0
    duration_ms: float = 0
    waited_for: tuple[Blocker, ...] = ()
    adopted: tuple[str, ...] = ()
    two_transactions: bool = False
    online: tuple[OnlineStep, ...] = ()
    roles: tuple[str, ...] = ()
    renewed: tuple[str, ...] = ()

    @property
    def changed(self) -> bool:
        """True if anything was done."""
        return bool(self.revisions or self.online or self.renewed)


def apply(
    database: sa.Engine | str,
    config: Config,
    *,
    stall_budget_ms: int = STALL_BUDGET_MS,
    give_up_after_s: float = GIVE_UP_AFTER_S,
    two_transactions: bool = False,
    progress: Callable[[MigrationProgress], None] | None = None,
) -> Receipt:
    """Bring the database to this package's revision, while its traffic goes on.

    All pending revisions are one transaction: a run that is killed leaves the database as before it or after it. A
    second run changes nothing, and finishes the online steps of an interrupted one. If the mapping names other columns
    that are only read than the database, the functions are made anew for them in the same transaction.

    With ``two_transactions`` the new objects are committed first, and only the locked part is retried. A run killed
    between the two leaves unused objects: ``status`` names them, the next run continues, ``undo`` removes them.

    Args:
        database: an engine, or an address; a direct one, not a pooler's.
        config: with the mapping of the host's tables.
        stall_budget_ms: how long one attempt may make live traffic wait, for its locks and for its work under them.
        give_up_after_s: for how long attempts are made.
        two_transactions: for a database too busy for one; never chosen automatically.
        progress: called with each ``MigrationProgress``.

    Raises:
        KeyboardInterrupt: during an online step, which is cancelled, with a note of the state.
        MigrationBlocked: the tables could not be locked in time; names the sessions that held them.
        MigrationRunning: another run is active.
        PoolerRefused: the address is a pooler's.
        SchemaError: the database cannot be migrated as it is (see ``examine``).
        OutcomeUnknown: the connection died at the commit. Run it again: it continues.
        DatabaseUnavailable: also if the server was starting up or did not answer for 15 seconds.
        PermissionDenied, MigrationError: otherwise.
    """
    with _exclusive_run(database, config, stall_budget_ms, give_up_after_s, progress) as run:
        return run.apply(two_transactions=two_transactions)


def undo(
    database: sa.Engine | str,
    config: Config,
    *,
    to: str | None = None,
    discard_ledger: bool = False,
    stall_budget_ms: int = STALL_BUDGET_MS,
    give_up_after_s: float = GIVE_UP_AFTER_S,
    progress: Callable[[MigrationProgress], None] | None = None,
) -> Receipt:
    """Remove Tallystick from the database, which is then exactly as before.

    Of a role that was made by ``tallystick migrate sql --role``, USAGE on the app's schemas stays, and TRIGGER on its
    tables does not come back: nobody wrote down what it had.

    ``to`` is the revision to stop at, if the database was at it before. Other arguments and errors are those of
    ``apply``.

    Raises:
        LedgerNotEmpty: the ledger has rows, and ``discard_ledger`` is False.
        MigrationError: there is no revision ``to``.
    """
    with _exclusive_run(database, config, stall_budget_ms, give_up_after_s, progress) as run:
        return run.undo(to=to, discard_ledger=discard_ledger)


def renewal_of(host: Host, names: HostNames) -> list[Composable]:
    """The statements that make the functions anew, if they were made for another mapping."""
    if host.stored is None or host.revision is None:
        return []
    return renewal(HostNames.of(host.stored, host.adopted), names, host.revision)


def undo_command(revision: str | None) -> str:
    """The command that undoes a preparation and leaves the database at ``revision``."""
    return "tallystick migrate undo" + ("" if revision is None else f" --to {revision}")


def _phase_progress(phase: Phase, revision: str | None = None, **more: Any) -> MigrationProgress:
    return MigrationProgress(phase, phase=phase, revision=revision, **more)


def _connecting_progress(progress: Callable[[MigrationProgress], None] | None) -> Callable[[str], None] | None:
    return None if progress is None else lambda message: progress(_phase_progress("connecting", detail=message))


class _Run:
    """One session that migrates."""

    def __init__(
        self,
        conn: sa.Connection,
        config: Config,
        *,
        stall_budget_ms: int,
        give_up_after_s: float,
        progress: Callable[[MigrationProgress], None] | None,
    ) -> None:
        if stall_budget_ms < 1:
            raise ConfigError(f"a stall budget of {stall_budget_ms} ms is no time at all; give at least 1")
        if stall_budget_ms > STALL_BUDGET_MAX_MS:
            raise ConfigError(f"a stall budget of {stall_budget_ms} ms is too long; give at most {STALL_BUDGET_MAX_MS}")
        self.conn = conn
        self.config = config
        self.stall_budget_ms = stall_budget_ms
        self.give_up_after_s = give_up_after_s
        self.progress = progress or (lambda _: None)

    def apply(self, *, two_transactions: bool) -> Receipt:
        host = self._examine(renews=True)
        refuse_interrupted(self.conn)
        receipt = Receipt("apply", host.revision, revisions()[-1].revision)
        pending = after(host.revision)
        if pending or host.stored:
            receipt = self._upward(host, pending, receipt, two_transactions=two_transactions)
        if pending:
            self._log(receipt)
        names = HostNames.of(self.config.host, host.adopted)
        try:
            built = [
                step
                for one in revisions()
                for step in online(self.conn, one, names, self._online_progress(one.revision))
            ]
            built += validate_keys(self.conn, names, self._online_progress(None))
        except KeyboardInterrupt as stopped:
            stopped.add_note(
                f"Revision {receipt.after} is in place, and the app may use it; its indexes or checks are not "
                "finished. To finish them: tallystick migrate apply"
            )
            raise
        return replace(receipt, online=tuple(built))

    def _upward(self, host: Host, pending: Sequence[Revision], receipt: Receipt, *, two_transactions: bool) -> Receipt:
        names = HostNames.of(self.config.host, host.adopted)
        prepared, before = host.prepared, host.stored
        if two_transactions and before is None and (others := [one for one in pending if one.revision not in prepared]):
            message = preparation(others, names, expected=host.revision, adopted=host.adopted_names)
            self._prepare(others[-1], message)
            prepared += tuple(one.revision for one in others)
        messages = upward(
            pending,
            names,
            expected=host.revision,
            adopted=host.adopted_names,
            stall_budget_ms=self.stall_budget_ms,
            prepared=prepared,
            renewal=renewal_of(host, names),
        )
        receipt = replace(
            receipt,
            renewed=() if before is None else changed_columns(before, self.config.host),
            revisions=tuple(one.revision for one in pending),
            adopted=tuple(name for one in pending for name in adopted_by(one, host.adopted_names)),
            two_transactions=bool(prepared),
        )
        left = _PREPARED.format(prepared[-1], undo_command(host.revision)) if prepared else _NOTHING
        return self._transaction(messages, receipt, shown=revisions()[-1].revision, left=left)

    def undo(self, *, to: str | None, discard_ledger: bool) -> Receipt:
        if to is not None:
            revision_named(to)
        host = self._examine(removes=to is None)
        refuse_interrupted(self.conn)
        names = HostNames.of(self.config.host, host.adopted)
        if names.workshops is not None and host.workshops is None:
            names = replace(names, workshops=replace(names.workshops, gone=True))
        gone = tuple(reversed([revision for revision in up_to(host.revision) if revision not in up_to(to)]))
        prepared = [revision for revision in reversed(after(host.revision)) if revision.revision in host.prepared]
        receipt = Receipt("undo", host.revision, to if gone else host.revision)
        if not gone and not prepared:
            return receipt
        if gone and not discard_ledger:
            refuse_rows(self.conn, host, "run: tallystick migrate undo --discard-ledger")
        # all of them in one transaction, since nobody wants half an undo
        messages = downward(
            gone,
            names,
            expected=host.revision,
            discard_ledger=discard_ledger,
            stall_budget_ms=self.stall_budget_ms,
            prepared=prepared,
        )
        roles = granted_roles(self.conn) if gone and to is None else ()
        receipt = replace(receipt, revisions=tuple(one.revision for one in (*prepared, *gone)), roles=roles)
        return self._transaction(messages, receipt, shown=receipt.revisions[0])

    def _examine(self, *, removes: bool = False, renews: bool = False) -> Host:
        """Run the preflight. It waits for a session that holds a table exclusively, which is named as a blocker."""
        watch = Watch(self.conn, mapped_oids(self.conn, self.config.host))
        deadline = time.monotonic() + self.give_up_after_s
        while True:
            try:
                return examine(self.conn, self.config, removes=removes, renews=renews)
            except sa.exc.OperationalError as error:
                if not isinstance(error.orig, psycopg.errors.LockNotAvailable):
                    raise
                blockers = watch.holders()
                if time.monotonic() > deadline:
                    raise self._blocked(0, blockers) from None
                self.progress(_phase_progress("waiting", blockers=tuple(blockers)))

    def _prepare(self, revision: Revision, message: Sequence[Composable]) -> None:
        """Commit the new objects. Nothing can block them, so there is no second try."""
        try:
            _send(self.conn, message)
        except psycopg.Error as error:
            _roll_back(self.conn)
            raise self._explained(error, "apply") from error
        self.progress(_phase_progress("prepared", revision.revision))

    def _transaction(self, messages: Messages, receipt: Receipt, *, shown: str, left: str = _NOTHING) -> Receipt:
        """Run both messages until they succeed, from the start each time; ``left`` is the state after a failure.

        In the second of two transactions they are one message: a round trip between them would take longer than the
        rest, with the fence held. ``shown`` is the revision for the progress.
        """
        action, two_transactions = receipt.action, receipt.two_transactions
        watch = Watch(self.conn, oids_of(self.conn, messages.locks))
        started = time.monotonic()
        deadline = started + self.give_up_after_s
        waited_for: dict[tuple[int, str | None], Blocker] = {}
        pause_s = 0.1
        attempts = 0
        while True:
            self._wait_for_old_transactions(watch, shown, attempts, deadline, waited_for, left=left)
            attempts += 1
            self.progress(_phase_progress("locking", shown, attempt=attempts))
            try:
                if two_transactions:
                    locked_ms = _send(self.conn, (*messages.opening, *messages.at_once, MEASURE))
                else:
                    _send(self.conn, messages.opening)
                    locked_ms = _send(self.conn, (*messages.at_once, MEASURE))
            except psycopg.Error as error:
                _roll_back(self.conn)
                if not _is_transient(error):
                    raise self._explained(error, action, left) from error
                blockers = watch.holders()
                waited_for |= {(b.pid, b.gid): b for b in _old(blockers)}
                if time.monotonic() + pause_s > deadline:
                    busy = isinstance(error, psycopg.errors.LockNotAvailable)
                    saturated = busy and action == "apply" and not two_transactions and not _old(blockers)
                    cause = _SHORT if busy else _SLOW
                    raise self._blocked(attempts, blockers, left, cause=cause, saturated=saturated) from error
                self.progress(_phase_progress("waiting", shown, attempt=attempts, blockers=tuple(blockers)))
                time.sleep(pause_s * random.uniform(0.5, 1))  # noqa: S311  # jitter, not a secret
                pause_s = min(pause_s * 2, 2)
                continue
            self.progress(_phase_progress("applied" if action == "apply" else "undone", shown, attempt=attempts))
            return replace(
                receipt,
                attempts=attempts,
                locked_ms=round(locked_ms or 0, 3),
                duration_ms=round((time.monotonic() - started) * 1000, 3),
                waited_for=tuple(waited_for.values()),
            )

    def _explained(self, error: psycopg.Error, action: str, left: str = _NOTHING) -> TallystickError:
        gone = lost(self.conn)
        triggers = [] if gone else forbidden_by(self.conn, error)
        return translate(error, action, lost=gone, unchanged=left, event_triggers=triggers)

    def _wait_for_old_transactions(
        self,
        watch: Watch,
        shown: str,
        attempts: int,
        deadline: float,
        waited_for: dict[tuple[int, str | None], Blocker],
        *,
        left: str,
    ) -> None:
        while blockers := watch.blockers():
            waited_for |= {(b.pid, b.gid): b for b in blockers}
            if time.monotonic() > deadline:
                raise self._blocked(attempts, blockers, left)
            self.progress(_phase_progress("waiting", shown, attempt=attempts, blockers=tuple(blockers)))
            time.sleep(_PROBE_EVERY_S)

    def _blocked(
        self,
        attempts: int,
        blockers: Sequence[Blocker],
        left: str = _NOTHING,
        *,
        cause: str = _SHORT,
        saturated: bool = False,
    ) -> MigrationBlocked:
        """The error. ``cause`` is named if no session holds the tables; ``saturated`` if too many hold them briefly."""
        who = "; ".join(str(blocker) for blocker in blockers) or cause
        other = ", or make each try cheaper (--two-transactions)" if saturated else ""
        return MigrationBlocked(
            f"the tables could not be locked within {self.give_up_after_s:g} s "
            f"({attempts} attempts). In the way: {who}. {left}. Run it again when that has ended, "
            f"or wait longer (--give-up-after), or allow more (--stall-budget-ms, now {self.stall_budget_ms}){other}",
            attempts=attempts,
            blockers=list(blockers),
        )

    def _log(self, receipt: Receipt) -> None:
        """Store the receipt in the log row of the newest revision."""
        newest = sa.select(sa.func.max(migration_log.c.id))
        try:
            self.conn.execute(
                migration_log.update()
                .where(migration_log.c.id == newest.scalar_subquery())
                .values(
                    attempts=receipt.attempts,
                    locked_ms=receipt.locked_ms,
                    duration_ms=receipt.duration_ms,
                    waited_for=[json.loads(json.dumps(asdict(blocker), default=str)) for blocker in receipt.waited_for],
                )
            )
        except sa.exc.DBAPIError:
            if lost(self.conn):
                raise
            # the revisions are applied nevertheless, and the receipt is returned

    def _online_progress(self, revision: str | None) -> Callable[[str, Building | None], None]:
        def report(step: str, building: Building | None) -> None:
            self.progress(
                MigrationProgress(
                    step,
                    building.fraction or 0 if building else 0,
                    1 if building and building.fraction is not None else None,
                    phase="online",
                    revision=revision,
                    detail=building.phase if building else None,
                    waits_for=building.waits_for if building else None,
                )
            )

        return report


def _is_transient(error: psycopg.Error) -> bool:
    """True if a retry may succeed."""
    busy = (psycopg.errors.LockNotAvailable, psycopg.errors.QueryCanceled, psycopg.errors.DeadlockDetected)
    # internal errors are always in English; this one comes from a concurrent GRANT, which takes no lock
    return isinstance(error, busy) or "tuple concurrently " in str(error)


def _old(blockers: Sequence[Blocker]) -> list[Blocker]:
    return [blocker for blocker in blockers if blocker.age_ms >= OLD_MS]


@contextmanager
def _exclusive_run(
    database: sa.Engine | str,
    config: Config,
    stall_budget_ms: int,
    give_up_after_s: float,
    progress: Callable[[MigrationProgress], None] | None,
) -> Iterator[_Run]:
    """A run on a connection of its own, with no other run at the same time."""
    with session(engine_of(database), waiting=_connecting_progress(progress)) as conn, single_run(conn):
        yield _Run(conn, config, stall_budget_ms=stall_budget_ms, give_up_after_s=give_up_after_s, progress=progress)


def _send(conn: sa.Connection, statements: Sequence[Composable]) -> float | None:
    """Send all statements as one message and return the last result, if any: the time held, in milliseconds.

    Without parameters psycopg uses the simple protocol, which takes many statements; in autocommit it adds no BEGIN.
    """
    with driver(conn).cursor() as cursor:
        cursor.execute(text(statements).encode(driver(conn).info.encoding), prepare=False)
        while cursor.nextset():
            pass
        row = cursor.fetchone() if cursor.description else None
    return float(row[0]) if row else None  # type: ignore[arg-type]  # a numeric


def _roll_back(conn: sa.Connection) -> None:
    raw = driver(conn)
    if not raw.closed:
        with suppress(psycopg.OperationalError):  # the connection died; the caller reports it
            raw.execute("ROLLBACK")
