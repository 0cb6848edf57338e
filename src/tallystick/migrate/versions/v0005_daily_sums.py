"""Sums of the days that are over, for the console's overview.

An expansion: old code keeps working.

Frozen in time: literal DDL, nothing imported from today's code; ``host`` as in revision 0001.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from psycopg.sql import SQL, Composable, Identifier

from tallystick.migrate.versions import v0002_holds_and_lots as before

revision = "0005"
down_revision = "0004"
kind = "expand"

COMPLETED_AT = "credit_transactions_completed_at"

columns: dict[str, tuple[str, ...]] = {}
creates = (COMPLETED_AT,)

TABLES = (
    """
CREATE TABLE tallystick.days (
  day date NOT NULL,
  writers_before bigint NOT NULL,
  closed_at timestamptz,
  CONSTRAINT days_pkey PRIMARY KEY (day)
)""",
    """
CREATE TABLE tallystick.daily_sums (
  day date NOT NULL,
  kind text NOT NULL,
  currency text NOT NULL,
  credits numeric NOT NULL,
  paid numeric NOT NULL,
  CONSTRAINT daily_sums_pkey PRIMARY KEY (day, kind, currency),
  CONSTRAINT daily_sums_day_fk FOREIGN KEY (day) REFERENCES tallystick.days (day) ON DELETE CASCADE
)""",
)

SAME_READERS = """
    UNION ALL
    SELECT format('GRANT SELECT ON tallystick.days, tallystick.daily_sums TO %I', r.rolname)
      FROM callers JOIN pg_roles r ON r.oid = callers.role"""


def prepare(host: Any) -> Iterator[Composable]:
    """New objects: nothing uses them yet."""
    for statement in TABLES:
        yield SQL(statement.strip())
    yield from host.other_functions("0004", "0005")


def locks(_host: Any) -> tuple[Identifier, ...]:
    """None: no existing table is changed."""
    return ()


def locked(_host: Any) -> Iterator[Composable]:
    """Grant the privileges, after the default ones of new objects were revoked."""
    yield SQL(before.SAME_CALLERS.strip()).format(others=SQL(SAME_READERS.strip()))


def indexes(_host: Any) -> dict[str, Composable]:
    """None on the app's table."""
    return {}


def ledger_indexes(host: Any) -> dict[str, Composable]:
    """Indexes to build concurrently, after the commit: the rows of a day.

    Its predicate keeps it for statements that ask for that status. Without it, old statistics let the planner take
    it in ``balance_at`` for the user's own index, and read the rows of all users.

    Not a BRIN index: a purchase is completed by an update, and new rows take the space that vacuum frees. So a page
    gets rows of days further and further apart, and reading a day would read most of the table.
    """
    return {
        COMPLETED_AT: SQL("CREATE INDEX CONCURRENTLY {} ON {} (completed_at) WHERE status = 'completed'").format(
            Identifier(COMPLETED_AT), _ledger(host)
        )
    }


def validates(_host: Any) -> dict[str, Composable]:
    """Nothing."""
    return {}


def undo_locks(host: Any) -> tuple[Identifier, ...]:
    """The ledger, for its index."""
    return (_ledger(host),)


def unreplaces(host: Any) -> Iterator[Composable]:
    """Undo all but the index, before the ledger is locked."""
    yield from unprepare(host)


def undo(host: Any) -> Iterator[Composable]:
    """Undo to revision 0004."""
    if not host.ledger_goes:
        yield SQL("DROP INDEX IF EXISTS {}").format(Identifier(host.ledger_schema, COMPLETED_AT))


def unprepare_locks(_host: Any) -> tuple[Identifier, ...]:
    """None: nobody uses the dropped objects."""
    return ()


def unprepare(host: Any) -> Iterator[Composable]:
    """Undo ``prepare`` alone."""
    yield from host.other_functions("0005", "0004")
    yield SQL("DROP TABLE tallystick.daily_sums, tallystick.days")


def _ledger(host: Any) -> Identifier:
    return Identifier(host.ledger_schema, "credit_transactions")
