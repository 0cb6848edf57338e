"""The credits that an app had before Tallystick: its balances, compared with a history of its own. Only reads.

A history is any table with a row for each change: a user, an amount, and perhaps a type and a status. Its rows never
become rows of the ledger, since its balances may be wrong and its order unknown: users are owed the balance that they
see. Differences are shown by user and amount, for a person to decide.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from psycopg.sql import SQL, Composable, Identifier, Literal

from tallystick.config import HostMapping
from tallystick.database import refuse_hidden_rows
from tallystick.errors import HostMismatch
from tallystick.migrate.host.preflight import mapped_table
from tallystick.migrate.host.proposal import balances_apart
from tallystick.migrate.host.tables import MOMENTS, HostColumn, HostTable, columns_of, host_tables, plain
from tallystick.migrate.revisions import HostNames
from tallystick.schema import HISTORY, LEDGER, OPENING_KEY

_HISTORIES = (
    *("credittransactions", "credittransaction", "credithistory", "creditledger", "creditlog", "creditlogs"),
    *("creditshistory", "creditslog", "creditevents", "creditentries"),
)
_AMOUNTS = ("amount", "credits", "delta", "change", "creditamount", "quantity")
_USERS = ("userid", "ownerid", "accountid", "customerid", "memberid", "clerkuserid", "user")
"""Usual names, as ``plain`` gives them."""

_NUMBERS = ("int2", "int4", "int8", "numeric")
_FINISHED = ("completed", "complete", "succeeded", "success", "paid", "posted", "settled", "done")
_TAKES = "consum|debit|spen[dt]|us(e|age)|deduct|charge|redeem|withdraw|refund"
DIFFERENCES = 20


@dataclass(frozen=True)
class Difference:
    """A user whose balance differs from the sum of the history."""

    user: Any
    balance: int
    history: int

    @property
    def by(self) -> int:
        """The balance less the sum of the history."""
        return self.balance - self.history


@dataclass(frozen=True)
class OwnHistory:
    """The app's history, compared with its balances.

    ``differences`` are the largest ones, of ``differing`` users in all. ``wrong_balances`` counts rows whose balance
    differs from the sum of the rows up to them. If no amount is negative, the type determines its sign.
    """

    table: str
    rows: int
    signs_from_type: bool
    differing: int
    differences: tuple[Difference, ...]
    wrong_balances: int | None


@dataclass(frozen=True)
class OwnCredits:
    """The app's own balances: those of ``opened`` users are in the ledger, those of ``waiting`` users not yet.

    ``changed_by_app`` counts later writes by the app's own code; with ``follows`` it may still write.
    """

    migrated: bool
    column: str
    users: int
    credits: int
    opened: int
    waiting: int
    changed_by_app: int
    follows: bool
    history: OwnHistory | None = None


@dataclass(frozen=True)
class HistoryTable:
    """A table of the app as a history, with its columns by their meaning."""

    table: HostTable
    user: str
    amount: str
    type: str | None
    status: str | None
    balance_after: str | None
    moment: str | None
    key: str | None

    @property
    def name(self) -> Identifier:
        """Qualified and quoted."""
        return Identifier(self.table.schema, self.table.table)


def own_credits(
    conn: sa.Connection, mapping: HostMapping, names: HostNames, *, migrated: bool, follows: bool, history: str | None
) -> OwnCredits:
    """The app's own credits. ``history`` names its history, or is None for a table with a usual name.

    Raises:
        HostMismatch: there is no such column or table, or the table is no history.
    """
    users = mapped_table(conn, "users", mapping.users.schema, mapping.users.table)
    column = columns_of(conn, users).get(mapping.users.balance)
    if column is None:
        apart = balances_apart(conn, mapping)
        raise HostMismatch(
            f"{users.shown} has no column {mapping.users.balance}. "
            + (
                " ".join(one.sentence() for one in apart)
                or "Name the one that holds credits in host.users.balance, or run: tallystick init"
            ),
            table=users.shown,
            column=mapping.users.balance,
        )
    read = [(users.schema, users.table), *([(names.ledger_schema, LEDGER)] if migrated else [])]
    refuse_hidden_rows(conn, read, "how many credits the users have")
    balance = SQL("coalesce(u.{}, 0)").format(names.users.balance)
    _refuse_no_numbers(conn, users, names.users.name, column.name)
    row = _one(
        conn,
        SQL("SELECT count(*) FILTER (WHERE {b} <> 0) AS users, coalesce(sum({b}), 0) AS credits FROM {users} AS u"),
        b=balance,
        users=names.users.name,
    )
    opened = changed = waiting = 0
    if migrated:
        kept = _one(
            conn,
            SQL(
                "SELECT count(*) FILTER (WHERE idempotency_key = {opening}) AS opened,"
                " count(*) FILTER (WHERE idempotency_key LIKE 'tallystick:app:%') AS changed FROM {ledger}"
            ),
            opening=Literal(OPENING_KEY),
            ledger=names.ledger,
        )
        opened, changed = kept.opened, kept.changed
        waiting = _one(
            conn,
            SQL("SELECT count(*) AS waiting FROM {users} AS u WHERE u.credit_sequence = 0 AND {b} > 0"),
            b=balance,
            users=names.users.name,
        ).waiting
    found = find_history(conn, mapping, history)
    return OwnCredits(
        migrated=migrated,
        column=f"{users.shown}.{mapping.users.balance}",
        users=row.users,
        credits=int(row.credits),
        opened=opened,
        waiting=waiting,
        changed_by_app=changed,
        follows=follows,
        history=None if found is None else _compared(conn, names, found, balance, migrated=migrated),
    )


def find_history(conn: sa.Connection, mapping: HostMapping, asked: str | None) -> HistoryTable | None:
    """The app's history, by its name or a usual one. Raises HostMismatch if the named table is no history."""
    ours = (mapping.schema_of_ledger, LEDGER)
    for table in host_tables(conn):
        named = plain(table.table) in _HISTORIES if asked is None else asked in (table.table, table.shown)
        if not named or (table.schema, table.table) == ours or table.kind not in "rp":
            continue
        found = _as_history(table, columns_of(conn, table), mapping)
        if found is not None:
            return found
        if asked is not None:
            raise HostMismatch(
                f"{table.shown} is no history of credits: it needs a column with the user's key "
                f"({mapping.users.key}, or one called like user_id, owner_id, account_id) and one with a number "
                f"({', '.join(_AMOUNTS[:4])})",
                table=table.shown,
            )
    if asked is not None:
        raise HostMismatch(f"there is no table {asked}. Name another: --history schema.table", table=asked)
    return None


def _as_history(table: HostTable, columns: Mapping[str, HostColumn], mapping: HostMapping) -> HistoryTable | None:
    def pick(names: tuple[str, ...], types: tuple[str, ...] | None = None) -> str | None:
        fitting = [c for c in columns.values() if plain(c.name) in names and (types is None or c.base in types)]
        return min((c.name for c in fitting), key=lambda name: names.index(plain(name)), default=None)

    of_users = {plain(c.name): c.name for c in columns.values() if c.key_type == mapping.users.key_type}
    called = (plain(mapping.users.key), *_USERS)
    user = next((of_users[name] for name in called if name != "id" and name in of_users), None)
    amount = pick(_AMOUNTS, _NUMBERS)
    if user is None or amount is None:
        return None
    return HistoryTable(
        table=table,
        user=user,
        amount=amount,
        type=pick(("type", "kind", "transactiontype", "reason", "action")),
        status=pick(("status", "state")),
        balance_after=pick(("balanceafter", "balance", "newbalance"), _NUMBERS),
        moment=pick(("createdat", "created", "insertedat", "timestamp"), MOMENTS),
        key=next((c.name for c in columns.values() if c.is_primary), None),
    )


def _compared(
    conn: sa.Connection, names: HostNames, found: HistoryTable, balance: Composable, *, migrated: bool
) -> OwnHistory:
    _refuse_no_numbers(conn, found.table, found.name, found.amount)
    amount = SQL("h.{}").format(Identifier(found.amount))
    signed = _one(
        conn,
        SQL("SELECT count(*) AS rows, coalesce(bool_or({a} < 0), false) AS signed FROM {h} AS h"),
        a=amount,
        h=found.name,
    )
    from_type = not signed.signed and found.type is not None
    if from_type:
        amount = SQL("CASE WHEN h.{}::text ~* {} THEN - {a} ELSE {a} END").format(
            Identifier(str(found.type)), Literal(_TAKES), a=amount
        )
    counts: Composable = SQL("true")
    if found.status is not None:
        status = SQL("lower(h.{}::text)").format(Identifier(found.status))
        # without any known word the column means something else
        counts = SQL(
            "({s} IS NULL OR {s} = ANY ({words}) OR NOT EXISTS (SELECT FROM {h} AS h WHERE {s} = ANY ({words})))"
        ).format(s=status, words=Literal(list(_FINISHED)), h=found.name)
    # the ledger's own changes are not in the app's history
    since: Composable = SQL("0")
    if migrated:
        since = SQL(
            "coalesce((SELECT sum(t.amount) FROM {ledger} AS t WHERE t.user_id = u.{key} AND t.status = 'completed'"
            " AND {own}), 0)"
        ).format(ledger=names.ledger, key=names.users.key, own=SQL(HISTORY))
    each = SQL(
        "SELECT u.{key} AS user, {b} - {since} AS balance, coalesce(h.total, 0) AS history FROM {users} AS u"
        " LEFT JOIN (SELECT h.{user} AS user, sum({a}) AS total FROM {h} AS h WHERE {counts} GROUP BY 1) AS h"
        " ON h.user = u.{key}"
    ).format(
        key=names.users.key,
        b=balance,
        since=since,
        users=names.users.name,
        user=Identifier(found.user),
        a=amount,
        h=found.name,
        counts=counts,
    )
    rows = _all(
        conn,
        SQL(
            "SELECT *, count(*) OVER () AS differing FROM ({each}) AS e WHERE e.balance <> e.history"
            " ORDER BY abs(e.balance - e.history) DESC, e.user LIMIT {most}"
        ),
        each=each,
        most=Literal(DIFFERENCES),
    )
    return OwnHistory(
        table=found.table.shown,
        rows=signed.rows,
        signs_from_type=from_type,
        differing=rows[0].differing if rows else 0,
        differences=tuple(Difference(row.user, int(row.balance), int(row.history)) for row in rows),
        wrong_balances=_wrong_balances(conn, found, amount, counts),
    )


def _refuse_no_numbers(conn: sa.Connection, table: HostTable, name: Composable, column: str) -> None:
    """Raise HostMismatch if the column has a NaN or an infinity, since no sum with one can be compared."""
    wrong = _one(
        conn,
        SQL(
            "SELECT count(*) AS rows FROM {t} AS t"
            " WHERE t.{c}::numeric = ANY (ARRAY['NaN', 'Infinity', '-Infinity']::numeric[])"
        ),
        t=name,
        c=Identifier(column),
    ).rows
    if wrong:
        where = f"WHERE {Identifier(column).as_string(None)} IN ('NaN', 'Infinity', '-Infinity')"
        find = f"SELECT * FROM {name.as_string(None)} {where}"  # noqa: S608 - for a person to read
        raise HostMismatch(
            f"{table.shown}.{column} is NaN or infinite in {wrong} row{'' if wrong == 1 else 's'}, so nothing can be "
            f"added up. Correct them first: {find}",
            table=table.shown,
            column=column,
        )


def _wrong_balances(conn: sa.Connection, found: HistoryTable, amount: Composable, counts: Composable) -> int | None:
    """The number of rows whose balance differs from the sum so far; None if the table has no balance or no order."""
    if found.balance_after is None or found.moment is None or found.key is None:
        return None
    return int(
        _one(
            conn,
            SQL(
                "SELECT count(*) AS wrong FROM (SELECT h.{after} AS after, sum({a}) OVER"
                " (PARTITION BY h.{user} ORDER BY h.{moment}, h.{key}) AS total FROM {h} AS h WHERE {counts}) AS e"
                " WHERE e.after IS DISTINCT FROM e.total"
            ),
            after=Identifier(found.balance_after),
            a=amount,
            user=Identifier(found.user),
            moment=Identifier(found.moment),
            key=Identifier(found.key),
            h=found.name,
            counts=counts,
        ).wrong
    )


def _all(conn: sa.Connection, query: SQL, **parts: Composable) -> list[Any]:
    # sent as the driver's own text: a % or a colon in a name stays as it is
    text = query.format(**parts).as_string(None).replace("%", "%%")
    return list(conn.exec_driver_sql(text).all())


def _one(conn: sa.Connection, query: SQL, **parts: Composable) -> Any:
    return _all(conn, query, **parts)[0]
