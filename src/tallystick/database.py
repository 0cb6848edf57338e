"""Talking to PostgreSQL: engines, one way to run a statement, and the driver's errors as ours."""

from __future__ import annotations

import datetime as dt
import random
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn, Union

from tallystick.address import Address
from tallystick.errors import (
    Conflict,
    DatabaseError,
    DatabaseUnavailable,
    HostInterfered,
    InvalidArgument,
    MigrationError,
    NotMigrated,
    OutcomeUnknown,
    PermissionDenied,
    TallystickError,
    shown,
    type_shown,
)

if TYPE_CHECKING:  # each takes longer to import than all the rest, and is loaded where a caller uses it
    import psycopg
    import sqlalchemy as sa
    from sqlalchemy.orm import Session

DbConnection = Union["sa.Connection", "Session"]
"""The first argument of what builds its statements with SQLAlchemy: the caller's connection, in the caller's
transaction."""

AnyConnection = Union[DbConnection, "psycopg.Connection[Any]"]
"""The first argument of what sends a statement as it is."""


def refuse_other_than(given: object, kinds: tuple[type, ...], takes: str) -> None:
    """Refuse an argument of another type before it is used. ``takes`` names the call and the types, for the message.

    Raises:
        InvalidArgument: names the type.
    """
    if not isinstance(given, kinds):
        _refuse(given, takes)


def _refuse(given: object, takes: str) -> NoReturn:
    raise InvalidArgument(f"{takes}, not {type_shown(type(given))}", argument="conn", value=given)


def refuse_other_than_sqlalchemys(given: object) -> None:
    """Refuse what is neither a Connection nor a Session of SQLAlchemy's, or one of asyncio. Raises InvalidArgument."""
    import sqlalchemy as sa  # noqa: PLC0415 - loaded, since the caller has a connection of it, or a statement
    from sqlalchemy.orm import Session, scoped_session  # noqa: PLC0415

    takes = "this takes SQLAlchemy's Connection or Session (of an async one, through run_sync)"
    refuse_other_than(given, (sa.Connection, Session, scoped_session), takes)


def one_row(conn: AnyConnection, statement: str) -> Sequence[Any] | None:
    """The first row of a statement of ours, which has no parameters; None without any."""
    given: Any = conn
    takes = "this takes SQLAlchemy's Connection or Session (of an async one, through run_sync) or psycopg's Connection"
    if any(each.__module__.startswith("sqlalchemy.ext.asyncio.") for each in type(given).__mro__):
        _refuse(given, takes)
    if hasattr(given, "get_bind"):  # a session's
        given = given.connection()
    if hasattr(given, "exec_driver_sql"):
        row: Sequence[Any] | None = given.exec_driver_sql(statement).fetchone()
        return row
    import psycopg  # noqa: PLC0415 - loaded, if the caller has a connection of it
    from psycopg.rows import tuple_row  # noqa: PLC0415

    refuse_other_than(given, (psycopg.Connection,), takes)
    with given.cursor(row_factory=tuple_row) as cursor:
        return cursor.execute(statement).fetchone()  # type: ignore[no-any-return]


def run(conn: DbConnection, statement: sa.Executable, values: Mapping[str, Any]) -> sa.CursorResult[*tuple[Any, ...]]:
    """Execute one statement on the caller's connection.

    Pending changes of a Session are flushed first, so that a workshop created in it can be paid for in the same
    transaction.

    Raises:
        DatabaseError: as ``translated``. An error of the host's flush is raised as it is.
    """
    import sqlalchemy as sa  # noqa: PLC0415 - loaded, since the caller has a statement of it

    if not isinstance(conn, sa.Connection):
        refuse_other_than_sqlalchemys(conn)
        session = conn
        with translated(connecting=True):
            conn = session.connection()
        session.flush()
    with translated():
        return conn.execute(statement, values)


def refuse_hidden_rows(conn: DbConnection, tables: Iterable[tuple[str, str]], what: str) -> None:
    """Refuse to read tables (schema and name) whose policies may hide rows from this role, as if there were none.

    ``what`` cannot be told then, as in "whether the balances are right".

    Raises:
        PermissionDenied: names a table, and the role to connect as.
    """
    import sqlalchemy as sa  # noqa: PLC0415 - loaded, since the caller has a connection of it

    schemas, names = zip(*tables, strict=True)
    row = run(conn, sa.text(_HIDING), {"schemas": list(schemas), "names": list(names)}).first()
    if row is None:
        return
    how = f"Run this as {row.owner}, which owns it, or as a role with BYPASSRLS"
    if row.forced:
        how = (
            f"Run this as a role with BYPASSRLS, or as {row.owner} after: ALTER TABLE {row.name} NO FORCE ROW LEVEL "
            "SECURITY, and FORCE it again afterwards"
        )
    raise PermissionDenied(
        f"row level security hides rows of {row.name} from {row.role}, so {what} cannot be told. {how}. "
        "Nothing was changed",
        sqlstate="42501",
    )


_HIDING = """
    SELECT quote_ident(n.nspname) || '.' || quote_ident(c.relname) AS name, pg_get_userbyid(c.relowner) AS owner,
           c.relforcerowsecurity AS forced, current_user AS role
    FROM unnest(CAST(:schemas AS text[]), CAST(:names AS text[])) AS read (schema, name)
    JOIN pg_namespace n ON n.nspname = read.schema JOIN pg_class c ON c.relnamespace = n.oid AND c.relname = read.name
    WHERE row_security_active(c.oid) ORDER BY 1 LIMIT 1
"""


def driver(conn: sa.Connection | psycopg.Connection[Any]) -> psycopg.Connection[tuple[object, ...]]:
    """The psycopg connection under ``conn``, which sends several statements as one message. Raises MigrationError."""
    import psycopg  # noqa: PLC0415 - it is loaded where the engine uses it

    if isinstance(conn, psycopg.Connection):
        return conn
    dbapi_connection = conn.connection.dbapi_connection
    if not isinstance(dbapi_connection, psycopg.Connection):
        raise MigrationError(
            f"migrations need psycopg 3, this engine uses {conn.dialect.driver}. Use postgresql+psycopg://…"
        )
    return dbapi_connection


@contextmanager
def translated(*, connecting: bool = False) -> Iterator[None]:
    """Raise the driver's errors as ours where a caller can act on them; let the others through.

    The errors of SQLAlchemy, psycopg, psycopg2, asyncpg and Django are all told apart by their SQLSTATE. With
    ``connecting`` nothing was sent yet, so a lost connection has no unknown outcome.
    """
    try:
        yield
    except TallystickError:
        raise
    except UnicodeEncodeError as error:
        raise InvalidArgument(
            f"{shown(error.object)} holds a lone surrogate, which PostgreSQL cannot store. Correct the text",
            argument="text",
            value=error.object,
        ) from error
    except Exception as error:  # an error that is no driver's is raised as it is
        if meaning := _meaning(error, connecting=connecting):
            raise meaning from error
        raise


_SUPPOSED = re.compile(r"\n\t(Is the server running|This probably means|before or while processing)[^\n]*")


def server_message(error: BaseException) -> str:
    """The message of the server or the network, without what libpq supposes about its cause and its last full stop."""
    original: BaseException = getattr(error, "orig", None) or error
    return _SUPPOSED.sub("", str(original).strip()).rstrip(".")


def sqlstate(error: BaseException) -> str | None:
    """The SQLSTATE of a driver's error; None where the server did not answer."""
    for found in _causes(error):
        if state := getattr(found, "sqlstate", None) or getattr(found, "pgcode", None):
            return str(state)
    return None


_IN_THE_WAY = "another transaction was in the way: {}. This statement wrote nothing; roll back and run it again"
_CANCELED = (
    "the server canceled this statement: {}. It wrote nothing; roll back and run it again. If statement_timeout ends "
    "it each time, give the role or the connection a longer one"
)
_ENDED = "the server has ended the transaction: {}. Nothing of it was written; run all of it again"
_READ_ONLY = (
    "the server takes no writes: {}. Where default_transaction_read_only is on, use a role or database without it; "
    "after a fail-over connect to the new primary"
)
_MEANINGS: Mapping[str, tuple[type[DatabaseError], str]] = {
    **dict.fromkeys(("40001", "40P01", "23503", "23505", "55P03"), (Conflict, _IN_THE_WAY)),
    "57014": (Conflict, _CANCELED),
    **dict.fromkeys(("25P03", "25P04"), (Conflict, _ENDED)),
    "25006": (DatabaseUnavailable, _READ_ONLY),
    "42501": (
        PermissionDenied,
        "{}. The owner of the tables can let a role run the ledger: tallystick migrate sql --role ROLE",
    ),
    "TS119": (HostInterfered, "{}. Nothing was written. Exempt Tallystick's columns from it"),
}
_NAMES = ("42P01", "42703", "3F000", "42704")
"""SQLSTATEs of an undefined table, column, schema or type."""
_FUNCTION = "42883"

_LOST = {
    # drivers' errors without an SQLSTATE, for a connection that ends or is closed already
    "psycopg": ("OperationalError",),
    "psycopg2": ("OperationalError", "InterfaceError"),
    "asyncpg": ("InterfaceError", "ConnectionDoesNotExistError"),
}


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The error, then those it wraps: SQLAlchemy's ``orig``, Django's ``__cause__``."""
    found: BaseException | None = error
    while found is not None:
        yield found
        found = getattr(found, "orig", None) or found.__cause__


def _is_drivers(error: BaseException) -> bool:
    return any(
        type(found).__module__.partition(".")[0] in ("psycopg", "psycopg2", "asyncpg") for found in _causes(error)
    )


def _meaning(  # noqa: C901, PLR0911 - a table of meanings
    error: Exception, *, connecting: bool
) -> DatabaseError | NotMigrated | None:
    """The error of ours for this one; None where it is the host's own, or no driver's."""
    kind = f"{type(error).__module__}.{type(error).__qualname__}"
    if kind == "sqlalchemy.exc.TimeoutError":
        return DatabaseUnavailable(f"no connection became free: {error}. Give the engine a larger pool")
    state = sqlstate(error)
    if not (_is_drivers(error) or (connecting and isinstance(error, OSError))):
        return None
    text = server_message(error)
    lost = getattr(error, "connection_invalidated", False) or (state is None and _has_no_answer(error))
    if state in ("23503", "23505") and not _is_ours(error):
        return None  # the host's own, such as a trigger's
    if (
        (state == "42804" and "return row" in text)
        or (state == "42846" and "to tallystick.answer" in text)
        or (state == "XX000" and "cache lookup failed for function" in text)  # an internal message is always English
    ):
        return Conflict(f"the functions were replaced under this call: {text}. Make it again", sqlstate=state)
    if found := _MEANINGS.get(state or ""):
        meaning, message = found
        return meaning(message.format(text), sqlstate=state)
    if state == _FUNCTION and "function tallystick." in text.partition(chr(10))[0]:
        return NotMigrated(
            f"{text.partition(chr(10))[0]}. The functions of this database are older than this package. Run: "
            "tallystick migrate apply",
        )
    if state in _NAMES:
        return NotMigrated(
            f"{text.partition(chr(10))[0]}. Is it the app's? It is mapped in tallystick.toml. Is it Tallystick's? Run: "
            "tallystick migrate apply",
        )
    if connecting and (lost or state is None or state[:2] in ("08", "28", "3D", "53", "57")):
        return DatabaseUnavailable(
            f"cannot connect: {text}. Check the address, and that the server runs", sqlstate=state
        )
    if (state or "").startswith("53"):
        return DatabaseUnavailable(
            f"the server has no room: {text}. Nothing was written; give it disk or memory and run it again",
            sqlstate=state,
        )
    if lost or (state or "")[:2] in ("08", "57") or state in ("58030", "XX000"):
        return OutcomeUnknown(
            f"the connection died under this call: {text}. A call that writes may have written: make the same call "
            "again, with the same key if it has one",
            sqlstate=state,
        )
    return None


def _has_no_answer(error: BaseException) -> bool:
    return any(
        type(found).__name__ in _LOST.get(type(found).__module__.partition(".")[0], ())
        or isinstance(found, ConnectionError)
        for found in _causes(error)
    )


def _is_ours(error: BaseException) -> bool:
    """True if the error names a constraint of the ledger's, which a concurrent write or delete has broken."""
    for found in _causes(error):
        name = getattr(getattr(found, "diag", None), "constraint_name", None) or getattr(found, "constraint_name", None)
        if name:
            return str(name).startswith(("credit_transactions_", "tallystick_", "stripe_"))
    return False


def engine(url: str | sa.URL, **options: Any) -> sa.Engine:
    """An engine for ``url`` with the application name ``tallystick``, which operators see in ``pg_stat_activity``.

    Its transactions begin as those of ``with_known_settings``.
    """
    import sqlalchemy as sa  # noqa: PLC0415 - see the top

    address = sa.make_url(url)
    connect_args = _OURS | options.pop("connect_args", {})
    for name in address.query:
        connect_args.pop(name, None)  # the address wins
    connect_args |= _ENCODING
    if address.get_driver_name() == "psycopg":
        connect_args = _UNPREPARED | connect_args
    # without hstore, which SQLAlchemy looks up before the first transaction, in the database's own search_path
    made = sa.create_engine(address, connect_args=connect_args, use_native_hstore=False, **options)
    sa.event.listen(made, "begin", _set_known)
    return made


_OURS = {"application_name": "tallystick", "connect_timeout": 10}
_ENCODING = {"client_encoding": "utf8"}  # with that of a database in SQL_ASCII, psycopg returns bytes
# A transaction pooler may hand the session to another client, and psycopg gives its statements the same names there.
_UNPREPARED = {"prepare_threshold": None}

KNOWN_SETTINGS: Mapping[str, str] = {
    "search_path": "pg_catalog",
    "datestyle": "ISO, MDY",
    "intervalstyle": "postgres",
    "timezone": "UTC",
    "quote_all_identifiers": "off",
}
"""Settings that our connections never take from the database, the role or the address.

With another schema in ``search_path``, a query may run an operator in it that fits the types better than PostgreSQL's
own, such as ``public.=(varchar, text)``: code that anybody may have made, with our role's rights.
"""

_SET_KNOWN = "; ".join(
    f"SET LOCAL {name} = {value if name == 'search_path' else repr(value)}" for name, value in KNOWN_SETTINGS.items()
)


def with_known_settings(pool: sa.Engine, *, read_only: bool = False) -> sa.Engine:
    """A copy of ``pool`` whose transactions begin by setting ``KNOWN_SETTINGS``.

    They end with the transaction: behind a transaction pooler another client has the session afterwards. Hence they do
    not apply in autocommit. With ``read_only`` PostgreSQL refuses writes in these transactions.
    """
    import sqlalchemy as sa  # noqa: PLC0415

    derived = pool.execution_options()
    sa.event.listen(derived, "begin", _set_read_only if read_only else _set_known)
    return derived


def _set_known(conn: sa.Connection) -> None:
    conn.exec_driver_sql(_SET_KNOWN)  # SET is no query, so the isolation level may still be set after it


def _set_read_only(conn: sa.Connection) -> None:
    # Not SQLAlchemy's postgresql_readonly: it sets an attribute of the driver's connection, and resets it when the
    # connection returns to its pool. Every later transaction then begins as READ WRITE, which a standby refuses.
    conn.exec_driver_sql(f"{_SET_KNOWN}; SET TRANSACTION READ ONLY")


@dataclass(frozen=True, slots=True)
class Standby:
    """A standby server. It has replayed all commits up to ``as_of``, None if unknown.

    Where it has replayed all that it received, ``as_of`` is when it last heard from its primary. A role without
    ``pg_read_all_stats`` cannot see that, and gets the present time.
    """

    as_of: dt.datetime | None
    seconds: float | None

    def __str__(self) -> str:
        if self.as_of is None or self.seconds is None:
            return "Read from a standby of unknown age."
        return f"Read from a standby as of {self.as_of:%Y-%m-%d %H:%M:%S} UTC, {max(self.seconds, 0):.1f} s ago."


_STANDBY = """
    SELECT s.as_of AT TIME ZONE 'UTC', extract(epoch FROM clock_timestamp() - s.as_of)::float8
    FROM (
      SELECT CASE
        WHEN pg_last_wal_replay_lsn() >= pg_last_wal_receive_lsn() AND r.pid IS NOT NULL
        THEN greatest(coalesce(r.last_msg_receipt_time, clock_timestamp()), pg_last_xact_replay_timestamp())
        ELSE pg_last_xact_replay_timestamp() END AS as_of
      FROM (SELECT) AS one LEFT JOIN pg_stat_wal_receiver AS r ON true
    ) AS s
    WHERE pg_is_in_recovery()
"""


def standby(conn: AnyConnection) -> Standby | None:
    """The standby that ``conn`` reads from, with its age; None where the server is no standby.

    Call it before reading: data that is read afterwards is at least as young.
    """
    with translated():
        row = one_row(conn, _STANDBY)
    if row is None:
        return None
    at, seconds = row
    return Standby(None if at is None else at.replace(tzinfo=dt.UTC), seconds)


PATIENCE_S = 15.0
"""The time that a server may take to start: one that sleeps when idle, as Neon's, takes seconds to wake."""

_WAKING = re.compile(r"Couldn't connect to compute node|Control plane request failed(?!:)")
"""Messages of Neon's proxy for a server that is waking, always as XX000; after a colon it names a lasting failure."""

_NO_ANSWER = re.compile(
    "Connection refused|Connection reset|Connection timed out|closed the connection unexpectedly|SSL SYSCALL error"
    "|SSL connection has been closed unexpectedly|timeout expired"
)
"""Messages of libpq where the server did not answer, in English in every locale."""


def connect_with_retries(
    pool: sa.Engine, *, patience_s: float = PATIENCE_S, waiting: Callable[[str], None] | None = None
) -> sa.Connection:
    """A connection from ``pool``, tried again for ``patience_s`` while the server is starting up or not there yet.

    A wrong password, name or database is not tried again. ``waiting`` is called each time with the server's message.

    Raises:
        sqlalchemy.exc.OperationalError: as ``pool.connect()``.
    """
    from sqlalchemy.exc import OperationalError  # noqa: PLC0415

    deadline = time.monotonic() + patience_s
    pause_s = 0.2
    while True:
        try:
            return pool.connect()
        except OperationalError as error:
            if time.monotonic() + pause_s > deadline or not _starting_up(error.orig):
                raise
            if waiting is not None:
                waiting(server_message(error))
        time.sleep(pause_s * random.uniform(0.5, 1))  # noqa: S311  # jitter, not a secret
        pause_s = min(pause_s * 2, 2)


def _starting_up(error: BaseException | None) -> bool:
    import psycopg  # noqa: PLC0415 - it is loaded by now; at the top it would slow down every import of the package

    if not isinstance(error, psycopg.OperationalError):
        return False
    if isinstance(error, psycopg.errors.ConnectionTimeout) or _WAKING.search(str(error)):
        return True
    if error.pgconn is None:
        return False
    options = {option.keyword.decode(): option.val.decode() for option in error.pgconn.info if option.val}
    if _NO_ANSWER.search(str(error)):
        return not options.get("host", "/").startswith(("/", "@"))  # a starting server has its socket already
    # The server answered, so a ping is quick. libpq does not give the SQLSTATE of a refused connection, and the message
    # is in the server's language; but its ping tells 57P03, cannot_connect_now, from all others.
    conninfo = psycopg.conninfo.make_conninfo("", **options | {"connect_timeout": "2"})
    return psycopg.pq.PGconn.ping(conninfo.encode()) == psycopg.pq.Ping.REJECT


@contextmanager
def connect(
    url: str | sa.URL,
    *,
    patience_s: float = 0,
    waiting: Callable[[str], None] | None = None,
) -> Iterator[sa.Connection]:
    """One transaction on a connection of its own, for a command; committed at the end.

    ``patience_s`` and ``waiting`` are those of ``connect_with_retries``.

    Raises:
        DatabaseUnavailable: with the message of the server or the network.
    """
    from sqlalchemy import NullPool  # noqa: PLC0415

    pool = engine(url, poolclass=NullPool)
    with translated(connecting=True):
        conn = connect_with_retries(pool, patience_s=patience_s, waiting=waiting)
    with conn:
        with translated(connecting=True):
            begun = conn.begin()
        yield conn
        if begun.is_active:
            with translated():
                begun.commit()


@contextmanager
def connect_driver(url: str) -> Iterator[psycopg.Connection[tuple[Any, ...]]]:
    """As ``connect``, with the driver's own connection, for a command that only calls the ledger.

    Raises:
        DatabaseUnavailable: with the message of the server or the network.
    """
    import psycopg  # noqa: PLC0415

    arguments: dict[str, Any] = _OURS | Address.of(url).arguments | _ENCODING | _UNPREPARED
    with translated(connecting=True):
        conn = psycopg.connect(**arguments)
    with closing(conn):
        with translated(connecting=True):
            conn.execute(_SET_KNOWN)  # it also begins the transaction
        yield conn
        with translated():
            conn.commit()


@contextmanager
def transaction(pool: sa.Engine, *, keep: bool = True, isolation: str = "READ COMMITTED") -> Iterator[sa.Connection]:
    """One transaction on a connection of ``pool``: committed at the end, rolled back on an error or without ``keep``.

    The isolation level is ours, not that of the host's engine: the ledger's functions read rows that others committed
    meanwhile. With ``"AUTOCOMMIT"`` each statement is a transaction of its own.

    Raises:
        DatabaseUnavailable: no connection could be made.
        DatabaseError: as ``translated``, for all statements in it.
    """
    with translated(connecting=True):
        conn = pool.connect()
    with conn, translated():
        conn = conn.execution_options(isolation_level=isolation)
        with conn.begin() as begun:
            yield conn
            if not keep:
                begun.rollback()
