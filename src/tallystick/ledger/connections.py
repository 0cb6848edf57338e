"""The connections that an operation takes, and how each sends its call.

An operation is written once, as a ``Call``: a function of the database, its arguments, and how its rows are read.
The type of the caller's connection decides how it is sent, and if the caller gets a result or an awaitable::

    SQLAlchemy   Connection, Session, scoped_session     AsyncConnection, AsyncSession, async_scoped_session
    psycopg      Connection                              AsyncConnection
    psycopg2     connection
    asyncpg                                              Connection, PoolConnectionProxy
    Django       connection

Through SQLAlchemy a call goes to the driver's own cursor, inside the transaction that SQLAlchemy has begun: that takes
a third of the time of a compiled statement. With listeners to statements (``echo=True``, an event, a tracer), or with
``execution_options(tallystick_events=True)``, it goes through ``exec_driver_sql``, which the listeners see.

Nothing here opens, commits, rolls back or retries a database transaction. ``autocommitting`` takes a connection from an
engine's pool for calls that need none.
"""

from __future__ import annotations

import datetime as dt
import json
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, update_wrapper
from typing import TYPE_CHECKING, Any, Concatenate, Generic, ParamSpec, Protocol, TypeVar, Union, overload
from uuid import UUID

from tallystick.database import translated
from tallystick.errors import InvalidArgument, type_shown

if TYPE_CHECKING:  # none of these is needed before a caller passes one
    import psycopg
    import sqlalchemy as sa
    from sqlalchemy.ext.asyncio import AsyncConnection as SqlAlchemyAsyncConnection
    from sqlalchemy.ext.asyncio import AsyncSession, async_scoped_session
    from sqlalchemy.orm import Session, scoped_session

    SqlAlchemy = sa.Connection | Session | scoped_session[Any]
    SqlAlchemyAsync = SqlAlchemyAsyncConnection | AsyncSession | async_scoped_session[Any]


class DjangoConnection(Protocol):
    """``django.db.connection``, or one of ``django.db.connections``."""

    vendor: str

    def ensure_connection(self) -> None: ...  # noqa: D102 - Django's own

    def cursor(self) -> Any: ...  # noqa: D102


class AsyncpgConnection(Protocol):
    """A connection of asyncpg, or of its pool."""

    async def fetch(self, query: str, *args: Any) -> Any: ...  # noqa: D102 - asyncpg's own


SyncConnection = Union["SqlAlchemy", "psycopg.Connection[Any]", DjangoConnection]
AsyncConnection = Union["SqlAlchemyAsync", "psycopg.AsyncConnection[Any]", AsyncpgConnection]

P = ParamSpec("P")
R = TypeVar("R")
Owner = TypeVar("Owner")

Rows = Sequence[Sequence[Any]]

LOCK_TIMEOUT = "lock_timeout"
"""A setting of the server's, among the names of arguments."""


@dataclass(frozen=True, slots=True)
class Call(Generic[R]):
    """One call of a function in schema ``tallystick``. ``arguments`` that are None keep the function's default.

    ``lock_timeout_ms`` replaces the connection's lock timeout, for a call that is a transaction of its own.
    """

    function: str
    arguments: Mapping[str, Any]
    read: Callable[[Rows], R]
    lock_timeout_ms: int | None = None

    def given(self) -> tuple[tuple[str, ...], list[Any]]:
        """The names and values that are sent."""
        sent = {name: value for name, value in self.arguments.items() if value is not None}
        if self.lock_timeout_ms is not None:
            sent = {LOCK_TIMEOUT: self.lock_timeout_ms} | sent
        return tuple(sent), list(sent.values())


class Operation(Generic[Owner, P, R]):
    """An operation: its method makes a call of the arguments, which is sent on the connection before them."""

    def __init__(self, make: Callable[Concatenate[Owner, P], Call[R]]) -> None:
        self.make = make
        update_wrapper(self, make)  # type: ignore[arg-type]  # its signature and docstring

    def __get__(self, owner: Owner, kind: type[Owner] | None = None) -> BoundOperation[Owner, P, R]:
        return BoundOperation(self.make, owner)


class BoundOperation(Generic[Owner, P, R]):
    """An operation of one ledger: returns the result, or with an async connection an awaitable of it."""

    __slots__ = ("__wrapped__", "owner")

    def __init__(self, make: Callable[Concatenate[Owner, P], Call[R]], owner: Owner) -> None:
        self.__wrapped__ = make
        self.owner = owner

    @property
    def __doc__(self) -> str | None:  # type: ignore[override]
        return self.__wrapped__.__doc__

    def call(self, *args: P.args, **kwargs: P.kwargs) -> Call[R]:
        """The statement and arguments that would be sent."""
        return self.__wrapped__(self.owner, *args, **kwargs)

    @overload
    def __call__(self, conn: SyncConnection, /, *args: P.args, **kwargs: P.kwargs) -> R: ...

    @overload
    def __call__(self, conn: AsyncConnection, /, *args: P.args, **kwargs: P.kwargs) -> Awaitable[R]: ...

    def __call__(self, conn: Any, /, *args: P.args, **kwargs: P.kwargs) -> Any:
        """Send it on the caller's connection."""
        # the connection first: a wrong object is refused before the arguments are checked
        kind: Any = type(conn)
        sender = _sender(kind)
        return sender(conn, self.__wrapped__(self.owner, *args, **kwargs))


def send(conn: SyncConnection, call: Call[R]) -> R:
    """Send a call."""
    kind: Any = type(conn)
    result: R = _sender(kind)(conn, call)
    return result


# --- what is sent ---

_ACCOUNT = (
    "outcome, user_id, credit_balance, onboarding_complete, stripe_customer_id, plan_tier, {updated_at}, {deleted_at}, "
    "detail::pg_catalog.text"
)
_WORKSHOP = "outcome, workshop_id, open, reason, {deleted_at}"
_EVENT = (
    "outcome, cursor, event_id, kind, {created_at}, user_id, transaction_id, amount, balance_after, sequence, "
    "workshop_id, idempotency_key, metadata::pg_catalog.text, threshold, detail::pg_catalog.text"
)
_COLUMNS: Mapping[str, str] = {
    **dict.fromkeys(
        (
            "account",
            "complete_onboarding",
            "reset_onboarding",
            "set_plan_tier",
            "set_stripe_customer",
            "delete_user",
            "restore_user",
            "set_low_balance",
            "erase",
        ),
        _ACCOUNT,
    ),
    **dict.fromkeys(("access", "delete_workshop", "restore_workshop"), _WORKSHOP),
    "events": _EVENT,
    "close_days": "close_days",
}
_ANSWER = (
    "outcome, id, user_id, type, status, amount, balance_after, sequence, description, workshop_id, refund_of, "
    "stripe_session_id, stripe_payment_intent_id, stripe_price_id, amount_paid, currency, idempotency_key, "
    "metadata::pg_catalog.text, {created_at}, {completed_at}, balance, required, remaining, detail::pg_catalog.text, "
    "item, credit_held, {expires_at}"
)
_MOMENTS = {
    # the caller's search_path may have an operator of this name that is not PostgreSQL's
    name: f"(extract(epoch FROM {name}) OPERATOR(pg_catalog.*) 1000000)::bigint"
    for name in ("created_at", "completed_at", "expires_at", "updated_at", "deleted_at")
}
PLAIN_ANSWER = _ANSWER.format(**_MOMENTS)
"""The columns of an answer as ``plain`` statements select them, for a statement with more than the call."""


_INTERVALS = ("expires_in", "expires_after")


@lru_cache(maxsize=1_000)
def _text(function: str, names: tuple[str, ...], *, mark: str = "%s", plain: bool = False) -> str:
    """The statement. All names are those of our functions, their parameters and attributes, never a caller's.

    ``plain`` asks for moments as numbers, for a driver that reads them as text: that text depends on DateStyle.
    """
    marks = ["%s" if mark == "%s" else f"${number}" for number in range(1, len(names) + 1)]
    source = ""
    if names[:1] == (LOCK_TIMEOUT,):
        # It holds until the statement's transaction ends, also behind a transaction pooler. An argument of the call
        # depends on it, so it is set before the function is called.
        source = f"pg_catalog.set_config('lock_timeout', {marks[0]}, true) AS waits, LATERAL "
        names, marks = names[1:], marks[1:]
        types = {"key": "text", "keys": "text[]"}
        marks = [
            f"CASE WHEN waits IS NOT NULL THEN {mark}::pg_catalog.{types[name]} END" if name in types else mark
            for name, mark in zip(names, marks, strict=True)
        ]
    if "metadata" in names:
        # as a text: a driver, or a codec that its owner has registered, would encode the JSON again
        at, many = names.index("metadata"), "[]" * (function == "consume_many")
        marks[at] += f"::pg_catalog.text{many}::pg_catalog.jsonb{many}"
    for at, name in enumerate(names):
        if name in _INTERVALS:
            # as a text too: asyncpg would send the days of a timedelta as days of the calendar, some of 23 or 25 hours
            marks[at] += "::pg_catalog.text::pg_catalog.interval"
    arguments = ", ".join(f"{name} => {mark}" for name, mark in zip(names, marks, strict=True))
    # by name, and not *: a prepared statement still works when a later revision adds attributes to the answer
    columns = _COLUMNS.get(function, _ANSWER).format(**(_MOMENTS if plain else {name: name for name in _MOMENTS}))
    return f"SELECT {columns} FROM {source}tallystick.{function}({arguments})"  # noqa: S608 - see above


def as_text(value: Any) -> str:
    """A value as a text that PostgreSQL reads for a parameter of any type, so that a call is parsed only once."""
    match value:
        case str():
            text = str.__str__(value)
        case bool():
            text = "true" if value else "false"
        case dt.datetime():
            text = value.isoformat()
        case dt.timedelta():
            text = f"{value // dt.timedelta(microseconds=1)} microseconds"
        case Mapping():
            text = json_text(value)
        case list() | tuple():
            text = array(value)
        case _:
            text = str(value)
    return text


def json_text(value: Mapping[str, Any], *, ascii_only: bool = True) -> str:
    """A JSON document. Mappings in it may be of any type, as ``MappingProxyType``.

    Raises:
        TypeError, ValueError: it holds what JSON has no text for.
        RecursionError: it is nested too deeply.
    """
    return json.dumps(value, allow_nan=False, ensure_ascii=ascii_only, default=_plain_mapping)


def _plain_mapping(value: object) -> dict[Any, Any]:
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"JSON has no text for a {type(value).__name__}")


def array(items: Iterable[object]) -> str:
    """A list as PostgreSQL writes an array. The driver would look up an adapter for each item."""
    return "{" + ",".join(["NULL" if item is None else _quoted(as_text(item)) for item in items]) + "}"


def _quoted(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


# --- how it is sent ---


def _reading(rows_of: Callable[[Any, Call[Any]], Rows]) -> Callable[[Any, Call[Any]], Any]:
    """A sender that reads the rows of ``rows_of``; errors of the driver are ours."""

    def sender(conn: Any, call: Call[R]) -> R:
        with translated():
            rows = rows_of(conn, call)
        return call.read(rows)

    return sender


def _on_psycopg(conn: psycopg.Connection[Any], call: Call[Any]) -> Rows:
    from psycopg.rows import tuple_row  # noqa: PLC0415 - loaded, since the caller has a connection of it

    with conn.cursor(row_factory=tuple_row) as cursor:
        text, values, binary = _for_psycopg(cursor, call)
        cursor.execute(text, values, binary=binary)
        return cursor.fetchall()


async def _psycopg_async(conn: psycopg.AsyncConnection[Any], call: Call[R]) -> R:
    with translated():
        rows = await _on_psycopg_async(conn, call)
    return call.read(rows)


async def _on_psycopg_async(conn: psycopg.AsyncConnection[Any], call: Call[Any]) -> Rows:
    from psycopg.rows import tuple_row  # noqa: PLC0415

    async with conn.cursor(row_factory=tuple_row) as cursor:
        text, values, binary = _for_psycopg(cursor, call)
        await cursor.execute(text, values, binary=binary)
        return await cursor.fetchall()


def _for_psycopg(
    cursor: psycopg.Cursor[Any] | psycopg.AsyncCursor[Any], call: Call[Any]
) -> tuple[str, list[str], bool]:
    """The statement, its values, and if the answer is binary: the text of a moment depends on DateStyle."""
    if cursor.connection.pgconn.parameter_status(b"client_encoding") == b"SQL_ASCII":  # psycopg answers texts as bytes
        raise _without_characters()
    names, values = call.given()
    kind: type = type(cursor)
    mark, binary = _style(kind)
    return _text(call.function, names, mark=mark, plain=not binary), [as_text(value) for value in values], binary


@lru_cache(maxsize=100)
def _style(kind: type) -> tuple[str, bool]:
    """The parameter mark of a cursor class, and if it reads binary answers: the host may have its own class."""
    from psycopg import AsyncClientCursor, AsyncRawCursor, ClientCursor, RawCursor  # noqa: PLC0415

    mark = "$" if issubclass(kind, (RawCursor, AsyncRawCursor)) else "%s"
    return mark, not issubclass(kind, (ClientCursor, AsyncClientCursor))


def _on_psycopg2(conn: Any, call: Call[Any]) -> Rows:
    from psycopg2.extensions import cursor  # noqa: PLC0415

    if conn.encoding in ("SQL_ASCII", "SQLASCII"):  # psycopg2 reads texts as ASCII, after the call has written
        raise _without_characters()
    # not the host's cursor_factory, whose rows may be dictionaries
    return _on_cursor(conn.cursor(cursor_factory=cursor), call)


def _on_django(conn: DjangoConnection, call: Call[Any]) -> Rows:
    """Send a call through Django's cursor, which keeps Django's own bookkeeping, inside Django's transaction."""
    if conn.vendor != "postgresql":
        raise _refused(f"a {conn.vendor} connection of Django")
    return _on_cursor(conn.cursor(), call)


def _on_cursor(cursor: Any, call: Call[Any]) -> Rows:
    names, values = call.given()
    with cursor:
        cursor.execute(_text(call.function, names, plain=True), [as_text(value) for value in values])
        rows: Rows = cursor.fetchall()
        return rows


async def _asyncpg(conn: AsyncpgConnection, call: Call[R]) -> R:
    names, values = call.given()
    with translated():
        rows: Rows = await conn.fetch(_text(call.function, names, mark="$"), *map(_asyncpg_value, values))
    return call.read(rows)


def _asyncpg_value(value: Any) -> Any:
    """A value for asyncpg, which wants one of the parameter's own type; those of JSON and of intervals are texts."""
    match value:
        case dt.timedelta() | Mapping():
            return as_text(value)
        case list():
            return [_asyncpg_value(item) for item in value]
    return value


def _on_sqlalchemy(conn: sa.Connection, call: Call[Any]) -> Rows:
    dialect = conn.dialect
    if dialect.driver not in _DRIVERS or dialect.name != "postgresql":
        raise _refused(f"a connection of SQLAlchemy to {dialect.name}, through {dialect.driver}")
    if not conn.in_transaction():
        conn.begin()  # as SQLAlchemy itself does at the first statement
    driver: Any = conn.connection.dbapi_connection
    send_on = _CURSORS.get(_name(driver))
    if send_on is None or _is_listened_to(conn):
        names, values = call.given()
        if dialect.paramstyle == "numeric_dollar":
            sent = tuple(map(_asyncpg_value, values))
            return conn.exec_driver_sql(_text(call.function, names, mark="$"), sent).fetchall()
        return conn.exec_driver_sql(
            _text(call.function, names, plain=True), tuple(as_text(value) for value in values)
        ).fetchall()
    try:
        return send_on(driver, call)
    except dialect.loaded_dbapi.Error as error:
        raise _sqlalchemy_error(conn, call, error) from error


def _sqlalchemy_error(conn: sa.Connection, call: Call[Any], error: Exception) -> Exception:
    """The driver's error as SQLAlchemy raises it. A dead connection is invalidated, with those of its pool."""
    from sqlalchemy.exc import DBAPIError  # noqa: PLC0415

    lost = conn.dialect.is_disconnect(error, conn.connection.dbapi_connection, None)  # type: ignore[arg-type]
    if lost and not conn.invalidated:
        _invalidate_pool(conn.engine, conn.connection, error)
        conn.invalidate(error)
    return DBAPIError.instance(
        f"tallystick.{call.function}",
        None,
        error,
        conn.dialect.loaded_dbapi.Error,
        connection_invalidated=lost,
        dialect=conn.dialect,
    )


def _on_adapted_psycopg(conn: Any, call: Call[Any]) -> Rows:
    """Send a call on SQLAlchemy's synchronous adapter of an asynchronous connection, inside ``run_sync``."""
    from sqlalchemy.util import await_only  # noqa: PLC0415

    return await_only(_on_psycopg_async(conn.driver_connection, call))


_DRIVERS = ("psycopg", "psycopg_async", "psycopg2", "asyncpg")

_CURSORS: Mapping[str, Callable[[Any, Call[Any]], Rows]] = {
    "psycopg.Connection": _on_psycopg,
    "psycopg2.extensions.connection": _on_psycopg2,
    "sqlalchemy.dialects.postgresql.psycopg.AsyncAdapt_psycopg_connection": _on_adapted_psycopg,
}


def _name(driver: object) -> str:
    return f"{type(driver).__module__}.{type(driver).__qualname__}"


def _is_listened_to(conn: sa.Connection) -> bool:
    """True where a listener expects to see each statement."""
    if conn._echo or conn.get_execution_options().get("tallystick_events"):  # noqa: SLF001 - it has no public name
        return True
    # an engine of another isolation level has events too, which are not about statements
    places: tuple[Any, ...] = (conn, conn.engine, conn.dialect)
    return any(
        getattr(place.dispatch, event, None)
        for place in places
        if place._has_events  # noqa: SLF001
        for event in _STATEMENT_EVENTS
    )


_STATEMENT_EVENTS = ("before_cursor_execute", "after_cursor_execute", "do_execute", "handle_error")


@contextmanager
def autocommitting(engine: sa.Engine) -> Iterator[SyncConnection]:
    """A connection of ``engine``'s pool on which each statement is a transaction of its own.

    It is the driver's, which takes half as long as SQLAlchemy's: pool, creator, ``connect_args`` and the pool's events
    are the host's in both cases. SQLAlchemy's is for engines with options, ``echo`` or listeners, which expect it, and
    for drivers other than psycopg. For an asynchronous engine call it in a greenlet, with its ``sync_engine``.

    Raises:
        DatabaseUnavailable: no connection could be made.
    """
    pooled = _pooled(engine)
    if pooled is None:
        with translated(connecting=True):
            conn = engine.connect()
        with conn:
            with translated(connecting=True):
                conn.execution_options(isolation_level="AUTOCOMMIT")
            yield conn
        return
    driver: Any = pooled.dbapi_connection
    before = driver.autocommit
    try:
        driver.autocommit = True
        yield driver
    finally:
        try:
            driver.autocommit = before
        except engine.dialect.loaded_dbapi.Error as error:
            if engine.dialect.is_disconnect(error, driver, None):
                _invalidate_pool(engine, pooled, error)
            else:  # a cancelled statement still runs on it
                pooled.invalidate(error)
        else:
            pooled.close()


def _invalidate_pool(engine: sa.Engine, pooled: sa.PoolProxiedConnection, error: Exception) -> None:
    """Let the pool replace its older connections too, as SQLAlchemy does after a disconnect: the server may be new."""
    engine.pool._invalidate(pooled, error)  # noqa: SLF001 - it has no public name


def _pooled(engine: sa.Engine) -> sa.PoolProxiedConnection | None:
    """A connection of the pool; None where the host expects one of SQLAlchemy's, or where psycopg's is wrapped."""
    dialect = engine.dialect
    if (
        (dialect.name, dialect.driver) not in (("postgresql", "psycopg"), ("postgresql", "psycopg_async"))
        or engine._has_events  # noqa: SLF001 - they have no public name
        or dialect._has_events  # noqa: SLF001
        or engine._connection_cls._has_events  # noqa: SLF001
        or engine._should_log_info()  # noqa: SLF001
        or engine.get_execution_options()
    ):
        return None
    with translated(connecting=True):
        pooled = engine.raw_connection()
    if _name(pooled.dbapi_connection) in _CURSORS:
        return pooled
    pooled.close()
    return None


_sqlalchemy = _reading(_on_sqlalchemy)


def _session(session: Session | scoped_session[Any], call: Call[R]) -> R:
    with translated(connecting=True):
        conn = session.connection()
    # Pending changes are flushed first: a workshop made in the session can be paid for in the same transaction. An
    # error of the flush is the host's own, and is raised as it is.
    session.flush()
    result: R = _sqlalchemy(conn, call)
    return result


async def _sqlalchemy_async(conn: SqlAlchemyAsyncConnection, call: Call[R]) -> R:
    return await conn.run_sync(_sqlalchemy, call)


async def _session_async(session: AsyncSession, call: Call[R]) -> R:
    return await session.run_sync(_session, call)


async def _scoped_session_async(scoped: async_scoped_session[Any], call: Call[R]) -> R:
    return await _session_async(scoped(), call)


_SENDERS: Mapping[str, Callable[[Any, Call[Any]], Any]] = {
    "sqlalchemy.engine.base.Connection": _sqlalchemy,
    "sqlalchemy.orm.session.Session": _session,
    "sqlalchemy.orm.scoping.scoped_session": _session,
    "sqlalchemy.ext.asyncio.engine.AsyncConnection": _sqlalchemy_async,
    "sqlalchemy.ext.asyncio.session.AsyncSession": _session_async,
    "sqlalchemy.ext.asyncio.scoping.async_scoped_session": _scoped_session_async,
    "sqlalchemy.dialects.postgresql.psycopg.AsyncAdapt_psycopg_connection": _reading(_on_adapted_psycopg),
    "psycopg.Connection": _reading(_on_psycopg),
    "psycopg.AsyncConnection": _psycopg_async,
    "psycopg2.extensions.connection": _reading(_on_psycopg2),
    "django.db.backends.base.base.BaseDatabaseWrapper": _reading(_on_django),
    "django.utils.connection.ConnectionProxy": _reading(_on_django),
    "asyncpg.connection.Connection": _asyncpg,
    "asyncpg.pool.PoolConnectionProxy": _asyncpg,
}


@lru_cache(maxsize=100)
def _sender(kind: type) -> Callable[[Any, Call[Any]], Any]:
    for each in kind.__mro__:
        if sender := _SENDERS.get(f"{each.__module__}.{each.__qualname__}"):
            return sender
    raise _refused(type_shown(kind))


def _without_characters() -> InvalidArgument:
    return InvalidArgument(
        "the connection's client_encoding is SQL_ASCII, in which texts have no characters. "
        "Connect with client_encoding='utf8'",
        argument="conn",
        value="SQL_ASCII",
    )


def _refused(found: str) -> InvalidArgument:
    return InvalidArgument(
        f"the first argument is {found}. Pass a connection to PostgreSQL: SQLAlchemy's Connection, Session, "
        "AsyncConnection or AsyncSession (through psycopg, psycopg2 or asyncpg), psycopg's Connection or "
        "AsyncConnection, psycopg2's connection, asyncpg's Connection, or Django's connection",
        argument="conn",
        value=found,
    )


# --- what comes back ---


def moment(value: Any) -> dt.datetime | None:
    """A moment in UTC, from one in any time zone or from microseconds since 1970."""
    if isinstance(value, int):
        return _EPOCH + dt.timedelta(microseconds=value)
    return None if value is None else value.astimezone(dt.UTC)


_EPOCH = dt.datetime(1970, 1, 1, tzinfo=dt.UTC)


def reader_of(key_type: str | None) -> Callable[[Any], Any]:
    """A function that reads the host's keys as the type that the mapping names, whatever the connection returns."""
    return uuid if key_type == "uuid" else _text_of


def _text_of(value: Any) -> Any:
    """A text, also of a type such as citext that the driver does not know and returns as bytes."""
    return value.decode() if isinstance(value, bytes) else value


def uuid(value: Any) -> Any:
    """A UUID, also from a connection that has it loaded as text."""
    return UUID(value) if isinstance(value, str) else value


def document(text: str | None) -> Any:
    """A JSON document."""
    return None if text is None else json.loads(text)
