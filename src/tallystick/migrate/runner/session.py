"""The connection of a run: direct, our own, in autocommit; and its server's errors as ours."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress

import psycopg
import sqlalchemy as sa
from psycopg.sql import SQL, Composable, Identifier, Literal

from tallystick.database import (
    KNOWN_SETTINGS,
    connect_with_retries,
    driver,
    engine,
    refuse_other_than,
    server_message,
    with_known_settings,
)
from tallystick.errors import (
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
from tallystick.migrate.host.blockers import Watch
from tallystick.migrate.host.dependents import DEPENDED_ON
from tallystick.migrate.host.tables import oids_of
from tallystick.migrate.runner.messages import ADVISORY_KEY, MOVED, NOT_EMPTY, RUNNING
from tallystick.migrate.runner.trial_writes import BROKEN

APPLICATION_NAME = "tallystick migrate"

_CHECKS_CLIENT = 140000
_GRACE_S = 3.0  # the time that a killed run's server process may take to notice

NEVER_CUT: Mapping[str, str] = dict.fromkeys(
    (
        "lock_timeout",
        "statement_timeout",
        "transaction_timeout",
        "idle_in_transaction_session_timeout",
        "idle_session_timeout",
    ),
    "0",
)
"""Settings that could end a statement or session of ours halfway, switched off."""

_OURS = {
    **NEVER_CUT,
    "application_name": APPLICATION_NAME,
    "lock_timeout": "500ms",  # for reading the catalogues
    # a concurrent index build waits for a snapshot that lasts
    "default_transaction_isolation": "read committed",
    # it may compile a query on the catalogues of a large database for longer than the stall budget, under the lock
    "jit": "off",
    "client_encoding": "utf8",
    **KNOWN_SETTINGS,
}
"""Settings that our own connection does not inherit from the database, the role or the address."""


def engine_of(database: sa.Engine | str) -> sa.Engine:
    """An engine for the address, or the given one, with our own settings."""
    if isinstance(database, str):
        return engine(database, poolclass=sa.NullPool)
    refuse_other_than(database, (sa.Engine,), "a migration takes an address or an Engine of SQLAlchemy")
    return with_known_settings(database)


@contextmanager
def session(source: sa.Engine, *, waiting: Callable[[str], None] | None = None) -> Iterator[sa.Connection]:
    """A connection of our own in autocommit, closed afterwards and never returned to a pool.

    ``waiting`` is called with the message of a server that is starting up.
    """
    try:
        conn = connect_with_retries(source, waiting=waiting).execution_options(isolation_level="AUTOCOMMIT")
    except sa.exc.OperationalError as error:
        raise DatabaseUnavailable(
            f"cannot connect: {server_message(error)}. Check the address, and that the server runs"
        ) from error
    try:
        conn.detach()  # no other user of the pool must get its settings
        driver(conn)  # refuses other drivers
        refuse_pooler(conn)
        set_settings(conn, _OURS, local=False)
        # the server cancels the statement of a killed client, which would keep our lock to its end
        if driver(conn).info.server_version >= _CHECKS_CLIENT:
            with suppress(sa.exc.DBAPIError):  # not supported on every operating system
                conn.execute(sa.select(sa.func.set_config("client_connection_check_interval", "500ms", sa.false())))
        yield conn
    except sa.exc.DBAPIError as error:
        if isinstance(error.orig, psycopg.Error):
            raise translate(error.orig, "run", lost=lost(conn)) from error
        raise
    except sa.exc.PendingRollbackError as error:  # the connection died before, unnoticed
        raise _lost("it had ended", None) from error
    finally:
        with suppress(sa.exc.DBAPIError):  # a dead connection has nothing to roll back
            conn.close()


def set_settings(conn: sa.Connection, settings: Mapping[str, str], *, local: bool) -> None:
    """Set the settings that this server knows, for the session or the transaction."""
    conn.execute(_SET_SETTINGS, {"settings": json.dumps(dict(settings)), "local": local})


_SET_SETTINGS = sa.text("""
    SELECT set_config(wanted.key, wanted.value, :local)
    FROM json_each_text(CAST(:settings AS json)) wanted WHERE current_setting(wanted.key, true) IS NOT NULL
""")


@contextmanager
def restoring_settings(conn: sa.Connection, names: Iterable[str] = NEVER_CUT, *, local: bool) -> Iterator[None]:
    """Restore the settings of these names afterwards, which on the host's connection are the host's."""
    before = {row.name: row.value for row in conn.execute(_NOW, {"names": list(names)})}
    try:
        yield
    finally:
        # in a transaction that failed, or on a connection that died, there is nothing
        with suppress(sa.exc.DBAPIError):
            set_settings(conn, before, local=local)


_NOW = sa.text("""
    SELECT name, current_setting(name, true) AS value FROM unnest(CAST(:names AS text[])) name
    WHERE current_setting(name, true) IS NOT NULL
""")


def autocommits(conn: sa.Connection) -> bool:
    """True if each statement is its own transaction.

    The driver knows: SQLAlchemy's isolation level is the server's, which has no such level.
    """
    return bool(getattr(conn.connection.dbapi_connection, "autocommit", False))


def pooler_sign(conn: sa.Connection) -> str | None:
    """The sign of a transaction pooler between us and the server; None if there is none.

    Alembic may run on another driver, which does not show the pooler's greeting: then only the host name decides.
    """
    raw = conn.connection.dbapi_connection
    host = raw.info.host if isinstance(raw, psycopg.Connection) else conn.engine.url.host
    if "-pooler." in f"{host}.":
        return f"the host is called {host}"
    if not isinstance(raw, psycopg.Connection):
        return None
    if raw.info.backend_pid != conn.scalar(sa.select(sa.func.pg_backend_pid())):
        return "the server process is another than the one that greeted us"
    return None


def refuse_pooler(conn: sa.Connection) -> None:
    """Raise PoolerRefused if a transaction pooler is between us and the server."""
    sign = pooler_sign(conn)
    if sign:
        raise PoolerRefused(
            f"this address is a connection pooler's ({sign}); a migration needs a session of its own. {USE_UNPOOLED}"
        )


USE_UNPOOLED = "Put the direct address into DATABASE_URL_UNPOOLED (or database_url_unpooled)"


def lost(conn: sa.Connection) -> bool:
    """True if the connection is lost."""
    return conn.invalidated or driver(conn).closed


_READ_ONLY = (
    ". Where default_transaction_read_only is on for this role or database, let an administrator switch it off for the "
    "migration: ALTER ROLE … SET default_transaction_read_only = off"
)


_NOT_FOUND = ("42P01", "42883", "42704", "3F000")
"""SQLSTATEs of an undefined table, function, type or schema."""


def _of_event_triggers(error: psycopg.Error, reason: str, unchanged: str, names: Sequence[str]) -> MigrationError:
    what, mend = "hides new tables from their owner" if _is_hidden(error) else "forbids it", "run"
    if error.sqlstate in _NOT_FOUND:
        what = "does not find a name without a schema, since a migration looks up names in pg_catalog alone"
        mend = "write the schema into its function, or set the function's search_path (ALTER FUNCTION … SET), or run"
    triggers = [f"ALTER EVENT TRIGGER {name}" for name in names]
    return MigrationError(
        f"the event trigger {' and '.join(names)} {what}: {reason}. {unchanged}. Let its owner {mend}: "
        f"{'; '.join(f'{each} DISABLE' for each in triggers)}; then run this again, then: "
        f"{'; '.join(f'{each} ENABLE' for each in triggers)}"
    )


def translate(
    error: psycopg.Error,
    action: str,
    *,
    lost: bool,
    online: str | None = None,
    unchanged: str = "Nothing was changed",
    event_triggers: Sequence[str] = (),
) -> TallystickError:
    """The error for a refused statement of a migration; ``unchanged`` is a sentence on the resulting state.

    ``event_triggers`` are those that ``forbidden_by`` names.
    """
    reason = (error.diag.message_primary or str(error)).strip().rstrip(".")
    detail = error.diag.message_detail or ""
    state = error.sqlstate
    meaning: TallystickError
    if event_triggers:
        meaning = _of_event_triggers(error, reason, unchanged, event_triggers)
    elif state in (RUNNING, MOVED):
        meaning = MigrationRunning(f"another run came first: {reason}. Look: tallystick migrate status")
    elif state == NOT_EMPTY:
        meaning = LedgerNotEmpty(
            f"a credit transaction was written just now. {unchanged}. Take a backup, then run: "
            "tallystick migrate undo --discard-ledger",
            rows=1,
        )
    elif state == DEPENDED_ON:
        meaning = MigrationError(
            f"undo would drop what is yours with its columns: {reason}. {unchanged}. Drop it yourself, or "
            "change it to do without them, then run this again"
        )
    elif state == BROKEN:
        shape = "more columns in the table" if action == "apply" else "the columns that the table had before"
        meaning = MigrationError(
            f"something of yours would fail after it: {reason} ({detail or 'no function'}). {unchanged}. "
            f"Make it work with {shape}, then run this again"
        )
    elif state == "42501":
        meaning = PermissionDenied(
            f"the database refused: {reason}. {unchanged}. Connect as the owner of the tables",
            sqlstate=state,
        )
    elif lost or (state or "").startswith(("08", "57P")):  # the server closed the connection after this error
        meaning = _lost(reason, state)
    elif online is not None:
        meaning = MigrationError(
            f"{online} could not be built or validated: {reason}. {detail} "
            "The revision itself is in place. Mend the cause, then run: tallystick migrate apply"
        )
    elif state == "2BP01":
        meaning = MigrationError(
            f"something of yours depends on what undo removes: {detail or reason}. {unchanged}. Drop or change it first"
        )
    else:
        # the object that depends on a column whose type changes
        dependent = f"; {detail}" if state == "0A000" and detail else ""
        advice = (
            _READ_ONLY
            if state == "25006"
            else ". Drop that first, and make it anew afterwards"
            if dependent
            else ". Give the server disk or memory, then run this again"
            if (state or "").startswith("53")
            else ""
        )
        meaning = MigrationError(
            f"the database refused to {action}: {reason} ({state}{dependent}). {unchanged}{advice}"
        )
    return meaning


def send_when_free(
    conn: sa.Connection,
    statements: Iterable[Composable],
    *,
    action: str,
    tables: Sequence[Identifier],
    lock_timeout_ms: int,
    give_up_after_s: float,
    unchanged: str = "Nothing was changed",
) -> float:
    """Run the statements as one transaction and one message, and retry while ``tables`` are busy.

    Traffic waits for at most ``lock_timeout_ms`` behind a try, for each table. Returns the milliseconds of the
    successful try.

    Raises:
        MigrationBlocked: the tables were never free; names the sessions that held them.
        MigrationError, PermissionDenied, OutcomeUnknown: see ``translate``.
    """
    raw, deadline, attempts = driver(conn), time.monotonic() + give_up_after_s, 0
    watch = Watch(conn, oids_of(conn, tables))
    timeout = SQL("SET LOCAL lock_timeout = {}").format(Literal(f"{lock_timeout_ms}ms"))
    message = SQL("; ").join([SQL("BEGIN"), timeout, *statements, SQL("COMMIT")])
    while True:
        attempts, started = attempts + 1, time.monotonic()
        try:
            raw.execute(message.as_string(raw).encode(raw.info.encoding), prepare=False)
        except psycopg.errors.LockNotAvailable:
            raw.execute("ROLLBACK")
            blockers = watch.holders()
            if time.monotonic() > deadline:
                names = " and ".join(table.as_string(None) for table in tables)
                who = "; ".join(str(blocker) for blocker in blockers) or "short transactions, one after the other"
                raise MigrationBlocked(
                    f"{names} {'was' if len(tables) == 1 else 'were'} never free for {lock_timeout_ms} ms within "
                    f"{give_up_after_s:g} s ({attempts} attempts). In the way: {who}. {unchanged}. Run it again "
                    "when that has ended",
                    attempts=attempts,
                    blockers=list(blockers),
                ) from None
            # let the queries that queued behind us run first
            time.sleep(lock_timeout_ms / 1000 * random.uniform(2, 6))  # noqa: S311  # jitter, not a secret
        except psycopg.Error as error:
            gone = lost(conn)
            if not gone:
                raw.execute("ROLLBACK")
            triggers = [] if gone else forbidden_by(conn, error)
            raise translate(error, action, lost=gone, unchanged=unchanged, event_triggers=triggers) from error
        else:
            return (time.monotonic() - started) * 1000


@contextmanager
def single_run(conn: sa.Connection) -> Iterator[None]:
    """Lock out other runs: the catalogues must not change between two queries."""
    deadline = time.monotonic() + _GRACE_S
    while not conn.scalar(sa.select(sa.func.pg_try_advisory_lock(ADVISORY_KEY))):
        if time.monotonic() > deadline:
            holder = conn.scalar(_LOCK_HOLDER, {"key": ADVISORY_KEY})
            raise MigrationRunning(
                f"another migration of this database is running (pid {holder}). Wait for it, then look: "
                "tallystick migrate status"
            )
        time.sleep(0.1)
    try:
        yield
    finally:
        # Unlocked here, since the server notices the end of the session only after we have returned.
        with suppress(sa.exc.SQLAlchemyError):
            conn.execute(sa.select(sa.func.pg_advisory_unlock(ADVISORY_KEY)))


_LOCK_HOLDER = sa.text("""
    SELECT pid FROM pg_locks
    WHERE locktype = 'advisory' AND granted AND objsubid = 1
      AND (classid::bigint << 32 | objid::bigint) = :key
      AND database = (SELECT oid FROM pg_database WHERE datname = current_database())
    LIMIT 1
""")


def forbidden_by(conn: sa.Connection, error: psycopg.Error) -> list[str]:
    """The event triggers, quoted, whose function raised the error or forced row level security on our new tables."""
    given = {"context": error.diag.context or "", "hidden": _is_hidden(error)}
    return list(conn.scalars(_EVENT_TRIGGERS, given))


def _is_hidden(error: psycopg.Error) -> bool:
    """True if a policy refused the row. A run inserts into its own new tables only, and makes no policies."""
    return error.diag.source_function == "ExecWithCheckOptions" and error.sqlstate == "42501"


_EVENT_TRIGGERS = sa.text("""
    SELECT quote_ident(e.evtname) FROM pg_event_trigger e JOIN pg_proc p ON p.oid = e.evtfoid
    WHERE e.evtenabled <> 'D' AND (
      position(' ' || e.evtfoid::regproc || '() ' IN :context) > 0
      OR (:hidden AND e.evtevent = 'ddl_command_end' AND p.prosrc ~* 'row\\s+level\\s+security')
    ) ORDER BY 1
""")


def _lost(reason: str, state: str | None) -> OutcomeUnknown:
    return OutcomeUnknown(
        f"the connection was lost ({reason}). The database is as before or as after, never between. "
        "Run the same command again: it continues from whatever is there",
        sqlstate=state,
    )
