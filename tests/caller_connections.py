"""All kinds of connections that an operation takes, each of a real driver, with the same interface."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import asyncpg
import psycopg
import psycopg2
import psycopg2.extras
import sqlalchemy as sa
from psycopg import rows
from sqlalchemy.ext.asyncio import AsyncSession, async_scoped_session, async_sessionmaker, create_async_engine
from sqlalchemy.orm import Session, scoped_session, sessionmaker


@dataclass(frozen=True)
class CallerConnection:
    """A connection of a caller: ``do`` an operation on it, run ``sql`` as the host would, end its transaction."""

    conn: Any
    do: Callable[..., Any]
    sql: Callable[[str], Any]
    commit: Callable[[], Any] | None = None
    rollback: Callable[[], Any] | None = None

    @property
    def autocommit(self) -> bool:
        return self.commit is None


def bare(url: str) -> str:
    return url.replace("+psycopg", "", 1)


def with_driver(url: str, driver: str) -> sa.URL:
    return sa.make_url(url).set(drivername=f"postgresql+{driver}")


def _called(conn: Any) -> Callable[..., Any]:
    return lambda operation, *args, **options: operation(conn, *args, **options)


# --- SQLAlchemy ---


@contextmanager
def sqlalchemy(url: str, *, driver: str = "psycopg", echo: bool = False, **options: Any) -> Iterator[CallerConnection]:
    engine = sa.create_engine(with_driver(url, driver), poolclass=sa.NullPool, **options)
    if echo:
        sa.event.listen(engine, "before_cursor_execute", lambda *_: None)
    with engine.connect() as conn:
        ends = (None, None) if "isolation_level" in options else (conn.commit, conn.rollback)
        yield CallerConnection(conn, _called(conn), conn.exec_driver_sql, *ends)


@contextmanager
def session(url: str, *, driver: str = "psycopg", scoped: bool = False) -> Iterator[CallerConnection]:
    engine = sa.create_engine(with_driver(url, driver), poolclass=sa.NullPool)
    conn: Any = scoped_session(sessionmaker(engine)) if scoped else Session(engine)
    with closing(conn):
        yield CallerConnection(
            conn, _called(conn), lambda text: conn.execute(sa.text(text)), conn.commit, conn.rollback
        )


@contextmanager
def _async(runner: asyncio.Runner, conn: Any, execute: Any, *ends: Any) -> Iterator[CallerConnection]:
    """An asynchronous connection, whose calls are awaited one after the other."""

    def awaited(function: Any) -> Any:
        async def call(*args: Any, **options: Any) -> Any:
            return await function(*args, **options)

        return lambda *args, **options: runner.run(call(*args, **options))

    try:
        yield CallerConnection(conn, awaited(_called(conn)), awaited(execute), *map(awaited, ends))
    finally:
        with suppress(sa.exc.DBAPIError, asyncpg.InterfaceError):  # the server may have ended it
            awaited(conn.close)()


@contextmanager
def sqlalchemy_async(url: str, *, driver: str, echo: bool = False, **options: Any) -> Iterator[CallerConnection]:
    engine = create_async_engine(with_driver(url, driver), poolclass=sa.NullPool, **options)
    if echo:
        sa.event.listen(engine.sync_engine, "before_cursor_execute", lambda *_: None)
    with asyncio.Runner() as runner:
        conn = runner.run(engine.connect().start())
        ends = () if "isolation_level" in options else (conn.commit, conn.rollback)
        with _async(runner, conn, conn.exec_driver_sql, *ends) as caller:
            yield caller


@contextmanager
def session_async(url: str, *, driver: str, scoped: bool = False) -> Iterator[CallerConnection]:
    engine = create_async_engine(with_driver(url, driver), poolclass=sa.NullPool)
    conn: Any = AsyncSession(engine)
    if scoped:
        conn = async_scoped_session(async_sessionmaker(engine), scopefunc=lambda: 1)
    with (
        asyncio.Runner() as runner,
        _async(runner, conn, lambda text: conn.execute(sa.text(text)), conn.commit, conn.rollback) as caller,
    ):
        yield caller


# --- psycopg ---


@dataclass(frozen=True)
class Made:
    """A row of a factory with its own type."""

    values: tuple[Any, ...]

    @classmethod
    def of(cls, *values: Any, **named: Any) -> Made:
        return cls((*values, *named))


ROW_FACTORIES: dict[str, Any] = {
    "tuple": rows.tuple_row,
    "dict": rows.dict_row,
    "namedtuple": rows.namedtuple_row,
    "scalar": rows.scalar_row,
    "class": rows.class_row(Made),
    "args": rows.args_row(Made.of),
    "kwargs": rows.kwargs_row(Made.of),
}


@contextmanager
def psycopg3(url: str, **options: Any) -> Iterator[CallerConnection]:
    with closing(psycopg.connect(bare(url), **options)) as conn:
        ends = (None, None) if options.get("autocommit") else (conn.commit, conn.rollback)
        yield CallerConnection(conn, _called(conn), conn.execute, *ends)


@contextmanager
def psycopg3_async(url: str, **options: Any) -> Iterator[CallerConnection]:
    with asyncio.Runner() as runner:
        conn = runner.run(psycopg.AsyncConnection.connect(bare(url), **options))
        ends = () if options.get("autocommit") else (conn.commit, conn.rollback)
        with _async(runner, conn, conn.execute, *ends) as caller:
            yield caller


@contextmanager
def psycopg2_bare(url: str, *, autocommit: bool = False, **options: Any) -> Iterator[CallerConnection]:
    with closing(psycopg2.connect(bare(url), **options)) as conn:
        conn.autocommit = autocommit
        ends = (None, None) if autocommit else (conn.commit, conn.rollback)
        yield CallerConnection(conn, _called(conn), lambda text: conn.cursor().execute(text), *ends)


# --- asyncpg ---


@contextmanager
def asyncpg_bare(
    url: str, *, pool: bool = False, transaction: bool = False, codecs: bool = False
) -> Iterator[CallerConnection]:
    async def opened() -> Any:
        if not pool:
            return await asyncpg.connect(bare(url))
        made = await asyncpg.create_pool(bare(url), min_size=1, max_size=1)
        return await made.acquire()

    async def with_codecs(conn: Any) -> None:
        """Register codecs, as many apps do, since asyncpg returns JSON as text."""
        import json

        await conn.set_type_codec("jsonb", encoder=json.dumps, decoder=json.loads, schema="pg_catalog")
        await conn.set_type_codec("uuid", encoder=str, decoder=str, schema="pg_catalog")

    with asyncio.Runner() as runner:
        conn = runner.run(opened())
        if codecs:
            runner.run(with_codecs(conn))
        begun: list[Any] = []

        async def begin() -> None:
            begun[:] = [conn.transaction()]
            await begun[0].start()

        async def commit() -> None:
            await begun[0].commit()
            await begin()

        async def rollback() -> None:
            await begun[0].rollback()
            await begin()

        if transaction:
            runner.run(begin())
        with _async(runner, conn, conn.execute, *((commit, rollback) if transaction else ())) as caller:
            yield caller


# --- Django, with the driver that the process has ---


@contextmanager
def django(url: str, *, atomic: bool) -> Iterator[CallerConnection]:
    from django import setup
    from django.conf import settings
    from django.db import connection, transaction

    if not settings.configured:
        address = sa.make_url(url)
        settings.configure(
            USE_TZ=True,
            TIME_ZONE="Asia/Kolkata",
            DATABASES={
                "default": {
                    "ENGINE": "django.db.backends.postgresql",
                    "NAME": address.database,
                    "USER": address.username,
                    "HOST": address.query["host"],
                    "PORT": address.query["port"],
                }
            },
        )
        setup()
    begun: list[Any] = []

    def begin() -> None:
        begun[:] = [transaction.atomic()]
        begun[0].__enter__()

    def commit() -> None:
        begun[0].__exit__(None, None, None)
        begin()

    def rollback() -> None:
        transaction.set_rollback(True)
        commit()

    if atomic:
        begin()
    try:
        yield CallerConnection(
            connection,
            _called(connection),
            lambda text: connection.cursor().execute(text),
            *((commit, rollback) if atomic else ()),
        )
    finally:
        if atomic:
            transaction.set_rollback(True)
            begun[0].__exit__(None, None, None)
        connection.close()


AUTOCOMMIT: dict[str, Any] = {"isolation_level": "AUTOCOMMIT"}

# psycopg and Django alone notice an encoding that is set by SQL
ENCODED = (
    "SQLAlchemy Connection, psycopg",
    "AsyncConnection, psycopg",
    "psycopg Conn",
    "psycopg Async",
    "Session, psycopg",
)

CALLER_CONNECTIONS: dict[str, Callable[[str], Any]] = {
    **{
        f"SQLAlchemy Connection, {driver}{how}": partial(sqlalchemy, driver=driver, **options)
        for driver in ("psycopg", "psycopg2")
        for how, options in {"": {}, ", autocommit": AUTOCOMMIT, ", listened to": {"echo": True}}.items()
    },
    "SQLAlchemy Connection, psycopg2, LATIN1": partial(sqlalchemy, driver="psycopg2", client_encoding="latin1"),
    "Session, psycopg": session,
    "Session, psycopg2": partial(session, driver="psycopg2"),
    "scoped_session": partial(session, scoped=True),
    **{
        f"AsyncConnection, {driver}{how}": partial(sqlalchemy_async, driver=driver, **options)
        for driver in ("psycopg", "asyncpg")
        for how, options in {"": {}, ", autocommit": AUTOCOMMIT, ", listened to": {"echo": True}}.items()
    },
    "AsyncSession, psycopg": partial(session_async, driver="psycopg"),
    "AsyncSession, asyncpg": partial(session_async, driver="asyncpg"),
    "async_scoped_session": partial(session_async, driver="asyncpg", scoped=True),
    **{f"psycopg Connection, {name}_row": partial(psycopg3, row_factory=made) for name, made in ROW_FACTORIES.items()},
    "psycopg Connection, autocommit": partial(psycopg3, autocommit=True),
    "psycopg Connection, ClientCursor": partial(psycopg3, cursor_factory=psycopg.ClientCursor),
    "psycopg Connection, RawCursor": partial(psycopg3, cursor_factory=psycopg.RawCursor),
    **{
        f"psycopg AsyncConnection, {name}_row": partial(psycopg3_async, row_factory=made)
        for name, made in ROW_FACTORIES.items()
    },
    "psycopg AsyncConnection, autocommit": partial(psycopg3_async, autocommit=True),
    "psycopg AsyncConnection, ClientCursor": partial(psycopg3_async, cursor_factory=psycopg.AsyncClientCursor),
    "psycopg AsyncConnection, RawCursor": partial(psycopg3_async, cursor_factory=psycopg.AsyncRawCursor),
    "psycopg2 connection": psycopg2_bare,
    "psycopg2 connection, autocommit": partial(psycopg2_bare, autocommit=True),
    "psycopg2 connection, LATIN1": partial(psycopg2_bare, client_encoding="latin1"),
    **{
        f"psycopg2 connection, {made.__name__}": partial(psycopg2_bare, cursor_factory=made)
        for made in (psycopg2.extras.DictCursor, psycopg2.extras.RealDictCursor, psycopg2.extras.NamedTupleCursor)
    },
    "asyncpg Connection": partial(asyncpg_bare, transaction=True),
    "asyncpg Connection, autocommit": asyncpg_bare,
    "asyncpg Connection, codecs": partial(asyncpg_bare, codecs=True),
    "asyncpg pool": partial(asyncpg_bare, pool=True),
}
