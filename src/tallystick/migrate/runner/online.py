"""Online steps after the commit: indexes are built and constraints validated while traffic goes on.

The state is checked before and after each step, so any run may continue another one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import psycopg
import sqlalchemy as sa
from psycopg.sql import SQL, Composable, Identifier

from tallystick.database import driver, with_known_settings
from tallystick.errors import MigrationError
from tallystick.migrate.revisions import HostNames, Revision
from tallystick.migrate.runner.opening import open_balances
from tallystick.migrate.runner.session import NEVER_CUT, lost, restoring_settings, set_settings, translate

_LOOK_EVERY_S = 0.25

State = Literal["missing", "valid", "invalid, enforcing", "invalid"]
"""States of an index. A killed build may leave one that refuses duplicates, and slows writes, but serves no query."""


@dataclass(frozen=True)
class OnlineStep:
    """An index built, a constraint validated, or balances opened, outside of the transaction."""

    name: str
    outcome: Literal["built", "repaired", "validated", "opened"]
    duration_ms: float


@dataclass(frozen=True)
class Building:
    """The progress of a build: the server's name of its ``phase``, its ``fraction``, the process that it waits for."""

    phase: str
    fraction: float | None
    waits_for: int | None


def online(
    conn: sa.Connection, revision: Revision, names: HostNames, progress: Callable[[str, Building | None], None]
) -> Iterator[OnlineStep]:
    """Run the online steps of a revision; ``progress`` is called with the name of each.

    Raises:
        MigrationError: the data does not allow it.
    """
    for schema, indexes in (
        (names.users.schema, revision.indexes(names)),
        (names.ledger_schema, revision.ledger_indexes(names)),
    ):
        for name, statement in indexes.items():
            yield from build(conn, schema=schema, name=name, statement=statement, progress=partial(progress, name))
    for name, statement in revision.validates(names).items():
        yield from validate(conn, table=names.ledger, name=name, statement=statement, progress=partial(progress, name))
    if revision.down_revision is None and names.adopts_balance:
        yield from _openings(conn, names, progress)


def _openings(
    conn: sa.Connection, names: HostNames, progress: Callable[[str, Building | None], None]
) -> Iterator[OnlineStep]:
    started = time.monotonic()
    opened, _left = open_balances(
        conn, names, lambda now: progress(now.step, Building(f"{now.done:,} done", None, None))
    )
    if opened:
        duration_ms = round((time.monotonic() - started) * 1000, 3)
        yield OnlineStep(f"the balances of {opened:,} users", "opened", duration_ms)


def build(
    conn: sa.Connection,
    *,
    schema: str,
    name: str,
    statement: Composable,
    progress: Callable[[Building | None], None],
) -> Iterator[OnlineStep]:
    """Build an index, or rebuild an invalid one; nothing if it is valid.

    Raises:
        MigrationError: the data does not allow it (duplicates); the next run repairs what is left.
    """
    started = time.monotonic()
    try:
        for leftover in _leftovers(conn, schema, name):
            _run_in_autocommit(conn, SQL("DROP INDEX CONCURRENTLY {}").format(Identifier(schema, leftover)), progress)
        state = index_state(conn, schema, name)
        if state == "valid":
            return
        progress(None)
        if state != "missing":
            # the invalid index may still enforce uniqueness until the new one replaces it
            statement = SQL("REINDEX INDEX CONCURRENTLY {}").format(Identifier(schema, name))
        _run_in_autocommit(conn, statement, progress)
    except psycopg.Error as error:
        raise translate(error, "apply", lost=lost(conn), online=name) from error
    if index_state(conn, schema, name) != "valid":
        raise MigrationError(f"the index {name} did not become valid. Run: tallystick migrate apply")
    yield OnlineStep(
        name,
        "built" if state == "missing" else "repaired",
        round((time.monotonic() - started) * 1000, 3),
    )


def validate(
    conn: sa.Connection,
    *,
    table: Identifier,
    name: str,
    statement: Composable,
    progress: Callable[[Building | None], None],
) -> Iterator[OnlineStep]:
    """Validate a constraint that was added NOT VALID; nothing if it is valid.

    Raises:
        MigrationError: a row violates it.
    """
    started = time.monotonic()
    if is_validated(conn, table, name) is not False:
        return
    progress(None)
    try:
        _run_in_autocommit(conn, statement, progress)
    except psycopg.Error as error:
        raise translate(error, "apply", lost=lost(conn), online=name) from error
    yield OnlineStep(name, "validated", round((time.monotonic() - started) * 1000, 3))


def index_state(conn: sa.Connection, schema: str, name: str) -> State:
    """The state of the index of this name."""
    row = conn.execute(_INDEX_STATE, {"schema": schema, "name": name}).one_or_none()
    if row is None:
        return "missing"
    if row.valid:
        return "valid"
    return "invalid, enforcing" if row.ready else "invalid"


_INDEX_STATE = sa.text("""
    SELECT i.indisvalid AND i.indisready AND i.indislive AS valid, i.indisready AS ready
    FROM pg_index i JOIN pg_class c ON c.oid = i.indexrelid
    WHERE c.relnamespace = to_regnamespace(quote_ident(:schema)) AND c.relname = :name
""")

_IS_VALIDATED = sa.text("""
    SELECT convalidated FROM pg_constraint WHERE conrelid = to_regclass(:table) AND conname = :name
""")

_LEFTOVERS = sa.text("""
    SELECT c.relname FROM pg_index i JOIN pg_class c ON c.oid = i.indexrelid
    WHERE c.relnamespace = to_regnamespace(quote_ident(:schema)) AND NOT i.indisvalid
      AND c.relname ~ ('^' || :name || '_cc(new|old)[0-9]*$')
""")

_BUILDING = sa.text("""
    SELECT phase, nullif(current_locker_pid, 0) AS locker,
           CASE WHEN blocks_total > 0 THEN blocks_done::float / blocks_total
                WHEN tuples_total > 0 THEN tuples_done::float / tuples_total
                WHEN lockers_total > 0 THEN lockers_done::float / lockers_total
           END AS fraction
    FROM pg_stat_progress_create_index WHERE pid = :pid
""")


def _leftovers(conn: sa.Connection, schema: str, name: str) -> Sequence[str]:
    """Indexes that a killed REINDEX CONCURRENTLY left."""
    return conn.scalars(_LEFTOVERS, {"schema": schema, "name": name}).all()


def is_validated(conn: sa.Connection, table: Composable, name: str) -> bool | None:
    """True if a constraint of ``table`` is validated; None if there is none."""
    found: bool | None = conn.scalar(_IS_VALIDATED, {"table": table.as_string(None), "name": name})
    return found


def _run_in_autocommit(conn: sa.Connection, statement: Composable, progress: Callable[[Building | None], None]) -> None:
    """Run a statement that cannot be in a transaction, without a timeout."""
    raw = driver(conn)
    with restoring_settings(conn, local=False), ThreadPoolExecutor(1) as pool:
        set_settings(conn, NEVER_CUT, local=False)
        task = pool.submit(raw.execute, statement.as_string(raw).encode(raw.info.encoding), prepare=False)
        try:
            _report_progress(task, conn.engine, raw.info.backend_pid, progress)
            task.result()
        except BaseException:
            # After Ctrl-C, or a failed progress bar, the build must not go on. A cancel request that arrives before the
            # statement has begun is lost, so it is repeated.
            while not task.done():
                with suppress(psycopg.Error):
                    raw.cancel_safe()
                wait([task], timeout=_LOOK_EVERY_S)
            raise


def _report_progress(
    task: Future[Any], engine: sa.Engine, pid: int, progress: Callable[[Building | None], None]
) -> None:
    """Report the progress of a statement until it is done, unless it is short.

    It uses a second connection, since the first is busy, with a short transaction for each look, or the build would
    wait for it. Without a connection nothing is reported.
    """
    if wait([task], timeout=_LOOK_EVERY_S).done:
        return
    with suppress(sa.exc.SQLAlchemyError), with_known_settings(engine).connect() as side:
        while not wait([task], timeout=_LOOK_EVERY_S).done:
            with side.begin():
                row = side.execute(_BUILDING, {"pid": pid}).one_or_none()
            if row is not None:
                progress(Building(row.phase, row.fraction, row.locker))
