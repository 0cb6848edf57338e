"""Opening balances: each user whose balance the app had before gets a first row in the ledger, beside live traffic.

A batch is a transaction of its own and takes about 10 ms, for which writers to its users wait. It leaves out users that
others have locked; they are tried again. A run may be killed and begun again anywhere, since a user without an opening
balance gets it at the first write to the ledger.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import psycopg
import sqlalchemy as sa
from psycopg.sql import SQL, Composable, Literal

from tallystick.database import driver
from tallystick.errors import MigrationError
from tallystick.migrate.revisions import HostNames
from tallystick.migrate.runner.session import lost, restoring_settings, set_settings, translate
from tallystick.progress import OnProgress, Progress, ignore_progress

BATCH_MS = 10.0
"""About the time for which a batch may lock its users."""

_PAGE = 2000
_PASSES = 5
_FIRST_BATCH = 10
# openings that are lost by a crash of the server are repeated by the next run
_SETTINGS = {"synchronous_commit": "off", "lock_timeout": "0", "statement_timeout": "0"}


def open_balances(conn: sa.Connection, names: HostNames, progress: OnProgress = ignore_progress) -> tuple[int, int]:
    """Open balances; returns how many, and how many are left because others hold the users.

    ``conn`` is in autocommit. ``progress`` counts the balances.

    Raises:
        MigrationError: see ``refuse_unfit``; all other balances are opened.
    """
    with restoring_settings(conn, _SETTINGS, local=False):
        set_settings(conn, _SETTINGS, local=False)
        try:
            opened, left = _open_all(driver(conn), names, progress)
        except psycopg.Error as error:
            raise translate(error, "apply", lost=lost(conn), online="opening balances") from error
    refuse_unfit(conn, names)
    return opened, left


def _open_all(raw: psycopg.Connection[Any], names: HostNames, progress: OnProgress) -> tuple[int, int]:
    opened, left, size = 0, 0, float(_FIRST_BATCH)
    for attempt in range(_PASSES):
        left = 0
        for page in _pages(raw, names):
            begin = 0
            while begin < len(page):
                batch = page[begin : begin + int(size)]
                started = time.monotonic()
                done = _open(raw, names, batch)
                took_ms = max((time.monotonic() - started) * 1000, 0.1)
                size = min(max(1.0, size * min(BATCH_MS / took_ms, 2)), _PAGE)
                opened, left, begin = opened + done, left + len(batch) - done, begin + len(batch)
                progress(Progress("opening balances", opened))
        if not left:
            break
        time.sleep(0.1 * 2**attempt)
    return opened, left


def refuse_unfit(conn: sa.Connection, names: HostNames) -> None:
    """Raise MigrationError if the ledger cannot begin with a balance.

    The preflight refuses such balances, and after the migration a trigger does. Between the two the app may write one.
    """
    find = SQL("SELECT u.{key}, {column} FROM {users} AS u WHERE u.credit_sequence = 0 AND NOT ({fit})")
    unfit = find.format(**_words(names))
    if number := fetch_all(driver(conn), SQL("SELECT count(*) FROM ({}) AS unfit").format(unfit))[0][0]:
        raise MigrationError(
            f"{number} user{'' if number == 1 else 's'} {'has' if number == 1 else 'have'} a balance that a ledger "
            "cannot begin with: below 0, not a whole number, or too large. The app wrote it while the migration waited "
            f"for the tables. Correct it in the app's column, then run this again. To find it: {unfit.as_string(None)}"
        )


def _pages(raw: psycopg.Connection[Any], names: HostNames) -> Iterator[list[Any]]:
    """Keys of users without an opening balance, in order, read without a lock."""
    further: Composable = SQL("")
    while True:
        query = SQL("SELECT u.{key} FROM {users} AS u WHERE {waiting} {further} ORDER BY u.{key} LIMIT {page}")
        page = [row[0] for row in fetch_all(raw, query.format(**_words(names), further=further, page=Literal(_PAGE)))]
        if page:
            yield page
        if len(page) < _PAGE:
            return
        further = SQL("AND u.{key} > {last}::{key_type}").format(**_words(names), last=Literal(page[-1]))


def _open(raw: psycopg.Connection[Any], names: HostNames, keys: list[Any]) -> int:
    query = SQL(
        "SELECT count(tallystick.open_balance(held.key)) FROM ("
        "SELECT u.{key} AS key FROM {users} AS u WHERE u.{key} = ANY ({keys}::{key_type}[]) AND {waiting}"
        " ORDER BY u.{key} FOR NO KEY UPDATE SKIP LOCKED) AS held"
    )
    return int(fetch_all(raw, query.format(**_words(names), keys=Literal(keys)))[0][0])


def fetch_all(raw: psycopg.Connection[Any], query: Composable) -> list[Any]:
    """The rows of a query without parameters, in which a % stands for itself."""
    return raw.execute(query.as_string(raw).encode(raw.info.encoding), prepare=False).fetchall()


def _words(names: HostNames) -> dict[str, Composable]:
    column = SQL("u.{}").format(names.users.balance)
    fit = SQL("coalesce({c}, 0) BETWEEN 0 AND {most} AND coalesce({c}, 0) % 1 = 0").format(
        c=column, most=names.placeholders()["credits_max"]
    )
    return {
        "key": names.users.key,
        "key_type": names.users.key_type,
        "users": names.users.name,
        "column": column,
        "fit": fit,
        "waiting": SQL("u.credit_sequence = 0 AND {} > 0 AND {}").format(column, fit),
    }
