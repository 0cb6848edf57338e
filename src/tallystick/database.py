"""Talking to PostgreSQL: engines, one way to run a statement, and the driver's errors as ours."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NoReturn, Union

import sqlalchemy as sa
from sqlalchemy.exc import DBAPIError, OperationalError

from tallystick.errors import Conflict, DatabaseUnavailable, NotMigrated, OutcomeUnknown, PermissionDenied

if TYPE_CHECKING:  # the ORM takes longer to import than all the rest, and most hosts of a Connection never do
    from sqlalchemy.orm import Session

DbConnection = Union[sa.Connection, "Session"]
"""What every operation takes first: the caller's, in the caller's transaction."""


def run(conn: DbConnection, statement: sa.Executable, values: Mapping[str, Any]) -> sa.CursorResult[*tuple[Any, ...]]:
    """Execute one statement on the caller's connection.

    What a Session holds back is flushed before, so that a workshop created in it can be paid for in the same
    transaction.

    Raises:
        DatabaseError: of the kind that says what the caller may do.
    """
    if not isinstance(conn, sa.Connection):
        with translated(connecting=True):
            conn.flush()
            conn = conn.connection()
    with translated():
        return conn.execute(statement, values)


@contextmanager
def translated(*, connecting: bool = False) -> Iterator[None]:
    """Raise the driver's errors as ours where they mean something to a caller; let the others through.

    ``connecting`` says that nothing was sent yet, so a lost connection has no unknown outcome.
    """
    try:
        yield
    except DBAPIError as error:
        _raise(error, connecting=connecting)


def _raise(error: DBAPIError, *, connecting: bool) -> NoReturn:
    state: str | None = getattr(error.orig, "sqlstate", None)
    text = str(error.orig).strip()
    lost = isinstance(error, OperationalError) and state is None
    match state:
        case "40001" | "40P01" | "23505" | "55P03" | "57014":
            raise Conflict(
                f"another transaction was in the way: {text}. Nothing was written; roll back and run it again",
                sqlstate=state,
            ) from error
        case "42501":
            raise PermissionDenied(
                f"{text}. Grant it to this role, or use the role that owns the tables", sqlstate=state
            ) from error
        case "42P01" | "42703" | "3F000" | "42704":
            raise NotMigrated(
                f"{text}. Look with: tallystick migrate status, then: tallystick migrate apply", revision=None
            ) from error
    if connecting and (lost or state is None or state[:2] in ("08", "28", "3D", "53", "57")):
        raise DatabaseUnavailable(
            f"cannot connect: {text}. Check the address, and that the server runs", sqlstate=state
        ) from error
    if lost or (state or "")[:2] in ("08", "57") or state in ("58030", "XX000"):
        raise OutcomeUnknown(
            f"the connection died under this call: {text}. Whether it was written is unknown; "
            "make the same call again with the same key",
            sqlstate=state,
        ) from error
    raise error


def engine(url: str | sa.URL, **options: Any) -> sa.Engine:
    """An engine for ``url`` that names itself ``tallystick`` to the server, where operators look for who is who."""
    address = sa.make_url(url)
    connect_args = {"application_name": "tallystick", "connect_timeout": 10} | options.pop("connect_args", {})
    for name in address.query:
        connect_args.pop(name, None)  # what the address says wins
    return sa.create_engine(address, connect_args=connect_args, **options)


@contextmanager
def connect(url: str | sa.URL, *, autocommit: bool = False) -> Iterator[sa.Connection]:
    """One connection of its own, for a command: committed at the end, or each statement by itself.

    Raises:
        DatabaseUnavailable: names what the server or the network said.
    """
    pool = engine(url, poolclass=sa.NullPool)
    with translated(connecting=True):
        conn = pool.connect()
    with conn:
        if autocommit:
            yield conn.execution_options(isolation_level="AUTOCOMMIT")
            return
        with conn.begin():
            yield conn
