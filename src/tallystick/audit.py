"""The audit: does every balance follow from the ledger? It reads, and changes nothing.

1. Sums. Each completed row is a step of its user from ``(sequence - 1, balance_after - amount)`` to
   ``(sequence, balance_after)``. A user starts at ``(0, 0)`` and ends at ``(credit_sequence, credit_balance)``. If the
   steps form one unbroken chain, the points where steps begin, plus the users' ends, are exactly the points where
   steps end, plus the users' starts. Each point is hashed to 64 bits with its user's key, and both sides are added up:
   one scan of the tables in any order, without a sort. The converse holds too: sequences only grow, so the sums are
   equal only where each user's steps are one chain from start to end (or where hashes collide, one chance in 2^64).
   Marked workshops are compared with the consumptions that paid for them in the same way, whichever user they belong
   to: a workshop that was paid for may get another owner.
2. Users. Where a sum is wrong it is taken again for each user.
3. Searches. For the users whose sum is wrong the precise, slower checks say what is wrong and where.

Users, ledger and workshops are compared within one statement, hence in one snapshot: live traffic never looks like
a fault. A large database is audited in ranges of user keys, so that outside a transaction of REPEATABLE READ or above
no snapshot is held for long: a few seconds each, or an eighth of a very large ledger. Each range may scan the whole
table for its rows, so more ranges would take longer in all. An audit can continue ``after`` a range.

A sum does not show the order of two rows. An index is read in its order to see that rows completed in the order of
their numbers, which takes longer than all else together. An audit of everyone ends by comparing the console's sums of
closed days with the rows of these days. A ``quick`` audit leaves out both.
"""

from __future__ import annotations

import copy
import datetime as dt
import shlex
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any
from uuid import UUID

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql as pg
from sqlalchemy.dialects.postgresql import aggregate_order_by
from sqlalchemy.dialects.postgresql.base import PGDialect
from sqlalchemy.orm import Session, scoped_session

from tallystick.config import Config, KeyType
from tallystick.database import DbConnection, refuse_hidden_rows, refuse_other_than, run
from tallystick.declared_tables import Schema, daily_sums, days, event_settings, events, stripe_reversals
from tallystick.errors import InvalidArgument, Key, UnknownUser, shown
from tallystick.progress import OnProgress, Progress, ignore_progress
from tallystick.schema import CreditTransactionStatus, CreditTransactionType

PART_ROWS = 5_000_000
"""About how many rows of users and ledger one statement looks at."""

PARTS = 8
"""A large ledger is divided into about so many parts, of more rows each."""

SUSPECTS = 10_000
"""The most users with a wrong sum in a part; above that the precise checks run on all users of the part."""

DELETION_TAKES = dt.timedelta(minutes=5)
"""An app's own deletion is dated from the beginning of its transaction; the user may spend until it locks the row."""

KEPT_WITHIN_S = 1
"""The precision of a moment in a host's column: its type may have no fractions of a second."""

_PURCHASE, _CONSUMPTION, _REFUND, _GRANT, _REVERSAL, _CORRECTION, _EXPIRY, _TRANSFER = CreditTransactionType
_TAKE = [_CONSUMPTION, _REFUND, _CORRECTION, _EXPIRY]
_LINKED = [_REFUND, _REVERSAL, _CORRECTION, _EXPIRY, _TRANSFER]
_PENDING, _COMPLETED = CreditTransactionStatus.PENDING, CreditTransactionStatus.COMPLETED
# writes names and statements for people, so a % in a name is not doubled
_SPELLING = PGDialect(paramstyle="named")  # type: ignore[no-untyped-call]  # SQLAlchemy leaves it untyped

Expression = sa.ColumnElement[Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """A finding: the check, the place, and what to do. All texts are for people.

    With ``fault`` False the balances are right, and a person should look at it.
    """

    check: str
    fault: bool
    where: str
    user: Key | None
    transaction: UUID | None
    workshop: Key | None
    expected: str
    found: str
    likely_cause: str
    what_to_do: str

    def __str__(self) -> str:
        """Its texts, one a line."""
        return (
            f"{self.check}  {self.where}\n  expected      {self.expected}\n  found         {self.found}\n"
            f"  likely cause  {self.likely_cause}\n  what to do    {self.what_to_do}"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditReport:
    """The result of an audit: the numbers of ``users`` and ledger ``rows`` read, the checks run, and their findings.

    ``truncated`` says that a check reached its limit: there may be more of its findings. ``last`` is the last user's
    key of a range, where more users follow it.
    """

    findings: tuple[Finding, ...]
    truncated: bool
    users: int
    rows: int
    seconds: float
    checked: tuple[str, ...]
    last: Key | None = None

    @property
    def clean(self) -> bool:
        """True if no fault was found; there may be findings that are none."""
        return not any(finding.fault for finding in self.findings)


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """A rule, named after its demand. ``search`` selects the rows that break it; it runs where the sums raise a sign.

    A search selects one or more of ``user``, ``transaction`` and ``workshop``, and the columns that the texts mention.
    ``fix`` makes a statement from such a row, shown as ``{fix}``. A finding is a ``fault`` unless the check says
    otherwise.
    """

    name: str
    purpose: str
    signs: frozenset[str]
    search: Callable[[_Part], sa.Select[Any]]
    expected: str
    found: str
    likely_cause: str
    what_to_do: str
    fix: Callable[[Schema, Mapping[str, Any]], sa.Update] | None = None
    needs_workshops: bool = False
    fault: bool = True


def audit(
    conn: DbConnection,
    config: Config,
    *,
    user: Key | None = None,
    since: dt.datetime | None = None,
    after: Key | None = None,
    quick: bool = False,
    limit: int = 1000,
    progress: OnProgress = ignore_progress,
    each: Callable[[AuditReport], None] | None = None,
) -> AuditReport:
    """Check everything, or one ``user``, or those users whose ledger got or completed a row at or after ``since``.

    A user's whole chain is checked even when only the end of it is younger than ``since``. ``quick`` leaves out
    ``completed_in_order``, which reads the ledger in the order of its users, and ``daily_sums``, which reads its young
    rows once more; an audit of some users leaves out the latter as well. Each check reports at most ``limit`` findings,
    so that a common fault does not hide a rare one; the worst come first. ``progress`` is called with the ledger rows
    done and the rows in all (an estimate, never less than those done).

    ``each`` is called with the report of each range of users. Keep its findings, and its ``last``: after an
    interruption, an audit with that as ``after`` continues with the users that follow.

    On a connection without a transaction each range has one of its own, so that no lock is held for longer. A
    transaction of the caller's is neither committed nor rolled back.

    Raises:
        InvalidArgument: ``user`` or ``after`` is no key of the mapped type or both are given, ``since`` has no time
            zone, ``limit`` is below 1, ``quick`` is no boolean.
        UnknownUser: ``user`` is neither in the users table nor in the ledger.
        PermissionDenied: row level security hides rows from this role, or it may not read a table.
        NotMigrated: a table or column is missing.
        DatabaseError: the database did not answer.
    """
    started = time.perf_counter()
    takes = "audit takes SQLAlchemy's Connection or Session (of an async one, through run_sync)"
    refuse_other_than(conn, (sa.Connection, Session, scoped_session), takes)
    _check_arguments(user=user, since=since, after=after, quick=quick, limit=limit)
    schema = Schema.of(config.host)
    if user is not None:
        user = schema.user_key(user)
    read = [*schema.metadata.tables.values(), daily_sums, days, event_settings, events, stripe_reversals]
    with _transaction(conn):
        refuse_hidden_rows(
            conn, [(table.schema or "", table.name) for table in read], "whether the balances follow from the ledger"
        )
        facts = _read_facts(conn, schema)
    checks = _checks(schema, quick=quick, everyone=user is None and since is None and after is None)
    found: dict[str, list[Finding]] = {check.name: [] for check in checks}
    users = rows = 0
    low: Key | None = None if after is None else schema.user_key(after)
    part_rows = max(PART_ROWS, (facts.users + facts.rows) // PARTS)
    divided = user is None and facts.users + facts.rows > part_rows
    step = max(1, facts.users * part_rows // max(facts.users + facts.rows, 1))
    while True:
        begun, before = time.perf_counter(), {name: len(some) for name, some in found.items()}
        with _transaction(conn):
            high = _last_key(conn, schema, low, step) if divided else None
            part = _Part(schema, facts, low=low, high=high, user=user, since=since)
            sums = run(conn, part.sums(), {}).mappings().one()
            users, rows = users + sums["users"], rows + sums["rows"]
            signs = facts.signs | {sign for sign, raised in sums.items() if raised is True}
            _search(conn, part, signs, found, most=limit + 1)  # one more tells whether it is all
        _search_days(conn, part, found, most=limit + 1)
        progress(Progress("ledger rows", rows, rows if high is None else max(rows, facts.rows)))
        if each is not None:
            new = {name: some[before[name] :] for name, some in found.items()}
            each(_report(new, found, limit, users=sums["users"], rows=sums["rows"], began=begun, last=high))
        if high is None:
            break
        # adapt to the rows that users really have, at most fourfold, since neighbouring users may be alike
        step = max(1, min(step * part_rows // max(sums["users"] + sums["rows"], 1), step * 4))
        low = high
    if user is not None and not users and not rows:
        raise UnknownUser(
            f"user {shown(user)} is neither in {_name(schema.users)} nor in the ledger. "
            "Check the key, or leave out --user to audit all users",
            user=user,
        )
    return _report(found, found, limit, users=users, rows=rows, began=started)


def _check_arguments(*, user: object, since: object, after: object, quick: object, limit: object) -> None:
    """Refuse arguments that make no sense, before anything is read."""
    if not isinstance(limit, int) or isinstance(limit, bool) or limit < 1:
        raise InvalidArgument.of("limit", limit, "pass a whole number of 1 or more")
    if not isinstance(quick, bool):
        raise InvalidArgument.of("quick", quick, "pass True or False")
    if since is not None and not isinstance(since, dt.datetime):
        raise InvalidArgument.of("since", since, "pass a datetime with a time zone")
    if since is not None and since.tzinfo is None:
        raise InvalidArgument(
            f"since={since}: add a time zone, as in {since.isoformat()}+00:00", argument="since", value=since
        )
    if user is not None and after is not None:
        raise InvalidArgument(
            f"user={shown(user)}, after={shown(after)}: pass only one of them",
            argument="after",
            value=after,
        )


def _checks(schema: Schema, *, quick: bool, everyone: bool) -> list[Check]:
    left_out = {*(["completed_in_order"] if quick else ()), *(["daily_sums"] if quick or not everyone else ())}
    return [
        check
        for check in CHECKS.values()
        if check.name not in left_out and (schema.workshops is not None or not check.needs_workshops)
    ]


@contextmanager
def _transaction(conn: DbConnection) -> Iterator[None]:
    """A transaction on a connection that has none."""
    its_own = isinstance(conn, sa.Connection) and not conn.in_transaction()  # of a Session it would flush and commit
    with conn.begin() if its_own else nullcontext():
        yield


def _report(
    new: Mapping[str, list[Finding]],
    found: Mapping[str, list[Finding]],
    limit: int,
    *,
    users: int,
    rows: int,
    began: float,
    last: Key | None = None,
) -> AuditReport:
    """A report of ``new`` findings, the last of those ``found`` so far; each check shows at most ``limit`` of all."""
    shown = {name: some[: max(0, limit - (len(found[name]) - len(some)))] for name, some in new.items()}
    return AuditReport(
        findings=tuple(finding for some in shown.values() for finding in some),
        truncated=any(len(some) > limit for some in found.values()),
        users=users,
        rows=rows,
        seconds=time.perf_counter() - began,
        checked=tuple(new),
        last=last,
    )


def _search(
    conn: DbConnection,
    part: _Part,
    signs: frozenset[str],
    found: dict[str, list[Finding]],
    *,
    most: int,
) -> None:
    """Run the checks with one of ``signs`` on a part, and add to ``found`` up to ``most`` findings of each."""
    suspects: dict[str, _Part] = {sign: part.suspects(conn, sign) for sign in ("chain", "unlocks") if sign in signs}
    if "completed_in_order" in found:
        suspects["order"] = part.narrowed(conn, part.out_of_order())
        signs = signs if suspects["order"].among == [] else signs | {"order"}
    for name, findings in found.items():
        check, room = CHECKS[name], most - len(findings)
        if (
            not check.signs & signs
            or not room
            or (name == "tally" and any(f.fault for some in found.values() for f in some))
        ):
            continue
        sign, *others = check.signs
        where = part if others else suspects.get(sign, part)
        selected = run(conn, check.search(where).limit(room), {}).mappings()
        findings.extend(_finding(check, part.schema, dict(row)) for row in selected)


def _search_days(conn: DbConnection, part: _Part, found: dict[str, list[Finding]], *, most: int) -> None:
    """Add to ``found`` the days whose sums are wrong, each in a transaction of its own, after the last part."""
    of_days = {name: some for name, some in found.items() if name == "daily_sums"}
    for day in part.facts.closed_days if of_days and part.high is None else ():
        with _transaction(conn):
            _search(conn, part.on(day), frozenset({"days"}), of_days, most=most)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Facts:
    """The catalogue's view of the ledger: estimated sizes, and the triggers and constraints that are in force."""

    users: int
    rows: int
    signs: frozenset[str]
    """Signs of possible faults: a missing unique index, a refund of money that took no credits, and the like."""
    collations: Mapping[str, str]
    """Columns that must be compared in the collation of the host's key, since theirs is another."""
    follows: bool = False
    """True where the app had balances before and its own code may still write them; a trigger records those writes."""
    marked_before: dt.datetime | None = None
    """Until then the app marked workshops without a ledger; until ``followed_until`` its code may still do so."""
    followed_until: dt.datetime | None = None
    closed_days: tuple[dt.date, ...] = ()
    """The days whose rows the console has added up."""
    recorded_since: dt.datetime | None = None
    """The time since when each completed row has its event; None while events are off."""


_CATALOG = sa.text(
    """
    SELECT ceil(CASE WHEN reltuples > 0 THEN reltuples / relpages ELSE 50 END
                * pg_relation_size(c.oid) / current_setting('block_size')::int)::bigint AS rows,
           ARRAY(SELECT ARRAY(SELECT attname::text FROM unnest(indkey) AS k
                              JOIN pg_attribute i ON i.attrelid = c.oid AND i.attnum = k ORDER BY attname)::text
                        || coalesce(pg_get_expr(indpred, indrelid), '')
                 FROM pg_index
                 WHERE indrelid = c.oid AND indisunique AND indisvalid AND indexprs IS NULL) AS unique_indexes,
           ARRAY(SELECT ARRAY[attname, collname]::text[]
                 FROM pg_attribute JOIN pg_collation l ON l.oid = attcollation
                 WHERE attrelid = c.oid AND attnum > 0) AS collations
    FROM pg_class c WHERE c.oid = to_regclass(:table)
    """
)


_ADOPTION = sa.text(
    """
    -- by the log and not by the triggers: a cut-over that was interrupted has dropped them and not opened all balances
    SELECT EXISTS (SELECT FROM tallystick.migration_log
                   WHERE direction = 'apply' AND adopted @> '["users.credit_balance"]')
             AND NOT EXISTS (SELECT FROM tallystick.migration_log WHERE direction = 'adopt') AS follows,
           (SELECT min(applied_at) FROM tallystick.migration_log
            WHERE direction = 'apply' AND adopted @> '["workshops.credit_consumed_at"]') AS marked_before,
           (SELECT max(applied_at) FROM tallystick.migration_log WHERE direction = 'adopt') AS followed_until
    """
)


def _read_facts(conn: DbConnection, schema: Schema) -> _Facts:
    sizes: list[int] = []
    collations: dict[sa.Column[Any], str] = {}
    indexes: set[str] = set()
    ledger, users, workshops = schema.credit_transactions, schema.users, schema.workshops
    for table in (ledger, users, *([] if workshops is None else [workshops])):
        seen = run(conn, _CATALOG, {"table": _name(table)}).one_or_none()
        sizes.append(seen.rows if seen else 0)  # the first sum reports a missing table
        collated = dict(seen.collations) if seen else {}
        collations |= {column: collated[column.name] for column in table.c if column.name in collated}
        indexes |= set(seen.unique_indexes) if seen and table is ledger else set()
    unsettled = run(conn, sa.select(sa.exists().where(_money_and_credits_disagree())), {}).scalar_one()
    lots = run(conn, sa.select(sa.exists().select_from(schema.lots)), {}).scalar_one()
    closed = sa.select(days.c.day).where(days.c.closed_at.is_not(None)).order_by(days.c.day)
    recorded_since = run(conn, sa.select(event_settings.c.recorded_since), {}).scalar_one_or_none()
    pairs = {"user_id": (ledger.c.user_id, users.c.key)}
    if workshops is not None:
        pairs["owner"] = schema.owner, users.c.key
        pairs["workshop_id"] = ledger.c.workshop_id, workshops.c.key
    adoption = run(conn, _ADOPTION, {}).one()
    return _Facts(
        follows=adoption.follows,
        marked_before=adoption.marked_before,
        followed_until=adoption.followed_until,
        rows=sizes[0],
        users=sizes[1],
        signs=frozenset(
            sign
            for sign, columns, predicate in (
                ("keys may repeat", "{idempotency_key,user_id}", "(idempotency_key IS NOT NULL)"),
                ("sessions may repeat", "{stripe_session_id}", "(stripe_session_id IS NOT NULL)"),
            )
            if not indexes & {columns, columns + predicate}
        )
        | ({"unsettled"} if unsettled else frozenset())
        | ({"lots"} if lots else frozenset())
        | (frozenset() if recorded_since is None else {"events"}),
        closed_days=tuple(run(conn, closed, {}).scalars()),
        recorded_since=recorded_since,
        collations={
            name: collations[key]
            for name, (column, key) in pairs.items()
            if key in collations and collations[key] != collations.get(column)
        },
    )


def _last_key(conn: DbConnection, schema: Schema, low: Key | None, step: int) -> Key | None:
    """The last user key of the range that begins after ``low``; None for all the rest."""
    key = schema.users.c.key
    keys = sa.select(key).order_by(key).offset(step - 1).limit(1)
    last: Key | None = run(conn, keys if low is None else keys.where(key > low), {}).scalar()
    return last


class _Part:
    """A range of users with their ledger rows and workshops, and the terms that sums and searches are made of."""

    def __init__(
        self,
        schema: Schema,
        facts: _Facts,
        *,
        low: Key | None,
        high: Key | None,
        user: Key | None,
        since: dt.datetime | None,
    ) -> None:
        self.schema, self.facts = schema, facts
        self.low, self.high, self.user, self.since = low, high, user, since
        self.among: list[Key] | None = None
        self.day = dt.date.min
        self.row = schema.credit_transactions.c
        self.user_id = self.comparable(self.row.user_id)
        self.workshop_id = self.comparable(self.row.workshop_id)

    @property
    def workshop(self) -> sa.Table:
        """The host's workshops; used only where the host has a table of them."""
        if self.schema.workshops is None:
            raise AssertionError("a check of workshops ran on a host that has none")
        return self.schema.workshops

    @property
    def owner(self) -> Expression:
        """The owner of a workshop, as ``comparable``."""
        return self.comparable(self.schema.owner, "owner")

    def comparable(self, column: Expression, role: str | None = None) -> Expression:
        """``column`` in the collation of the host's key, for a comparison with it."""
        collation = self.facts.collations.get(role or column.key or "")
        return column if collation is None else sa.collate(column, collation)

    def covers(self, key: Expression) -> Expression:
        """True where a user's key belongs to this part."""
        if self.since is None:
            return self._bounds(key)
        moved = self.schema.credit_transactions.alias("moved").c
        mover = self.comparable(moved.user_id)
        recent = sa.or_(moved.completed_at >= self.since, moved.created_at >= self.since)
        return sa.and_(self._bounds(key), key.in_(sa.select(mover).where(self._bounds(mover), recent)))

    def _bounds(self, key: Expression) -> Expression:
        terms: list[Expression] = []
        if self.user is not None:
            terms.append(key == self.user)
        if self.low is not None:
            terms.append(key > self.low)
        if self.high is not None:
            terms.append(key <= self.high)
        if self.among is not None:
            terms.append(key == sa.any_(sa.cast(self.among, pg.ARRAY(self.schema.users.c.key.type))))
        return sa.and_(sa.true(), *terms)

    def covers_owner(self) -> Expression:
        """As ``covers``, for workshops; those without an owner belong to the last part."""
        owner = self.schema.owner
        covered = self.covers(self.owner)
        last_of_all = self.high is None and self.user is None and self.since is None
        return sa.or_(covered, owner.is_(None)) if last_of_all else covered

    def covers_rows(self) -> Expression:
        """As ``covers``, for rows of the ledger; those without a user belong to the last part."""
        covered = self.covers(self.user_id)
        all_the_rest = self.low is not None and self.high is None and self.among is None and self.since is None
        return sa.or_(covered, self.user_id.is_(None)) if all_the_rest else covered

    def on(self, day: dt.date) -> _Part:
        """This part, for a check of one day."""
        other = copy.copy(self)
        other.day = day
        return other

    def describe(self) -> str:
        """The users of this part, in words."""
        if self.user is not None:
            return f"user {self.user}"
        if self.low is None and self.high is None:
            return "all users"
        return f"users after {self.low or 'the first'} up to {self.high or 'the last'}"

    def rows(self, *columns: Expression) -> sa.Select[Any]:
        """Rows of the ledger in this part."""
        selected = sa.select(self.user_id.label("user"), self.row.id.label("transaction"), *columns)
        return selected.where(self.covers_rows())

    def steps(self) -> sa.Subquery:
        """The numbered rows, each with the one before it, where it should begin."""
        row = self.row
        window: dict[str, Any] = {"partition_by": row.user_id, "order_by": (row.sequence, row.id)}
        previous = sa.func.lag(row.sequence).over(**window)
        before = sa.case((previous.is_(None), 0), else_=sa.func.lag(row.balance_after).over(**window))
        return (
            self.rows(
                row.amount,
                row.sequence,
                row.balance_after,
                sa.func.coalesce(previous, 0).cast(sa.BigInteger).label("previous"),
                before.cast(_SUMS[self.schema.host.credits]).label("before"),
            )
            .where(row.sequence > 0)
            .subquery("steps")
        )

    def ends(self) -> sa.Subquery:
        """Each user's last numbered row."""
        row = self.row
        last_first = sa.func.row_number().over(partition_by=row.user_id, order_by=(row.sequence.desc(), row.id))
        each = self.rows(row.sequence, row.balance_after, last_first.label("place")).where(row.sequence > 0).subquery()
        return sa.select(each).where(each.c.place == 1).subquery("ends")

    def unlocks(self) -> sa.Subquery:
        """Workshops that users of this part paid for: how often in all (``net``), by whom, and by which row last.

        Where several users paid for one, it is given to the last of them who does not own it: that user's sum is wrong,
        whichever part the owner is in. So each workshop is one finding, of one part.
        """
        row, shop, exact = self.row, self.workshop, _SUMS[self.schema.host.credits]
        owns = sa.func.coalesce(self.owner == self.user_id, sa.false())
        order = (owns, row.completed_at.desc(), row.id.desc())

        def last(column: Expression, kind: sa.types.TypeEngine[Any]) -> Expression:
            return sa.func.array_agg(aggregate_order_by(column, *order), type_=pg.ARRAY(kind))[1]

        paid = sa.select(self.workshop_id).where(self.covers(self.user_id), row.status == _COMPLETED)
        each = (
            sa.select(
                last(self.user_id, self.schema.users.c.key.type).label("user"),
                self.workshop_id.label("workshop"),
                self.net().label("net"),
                last(row.id, sa.Uuid()).label("transaction"),
                last(-row.amount.cast(exact), exact()).label("credits"),
                sa.func.max(row.completed_at).label("completed_at"),
            )
            .select_from(self.schema.credit_transactions)
            .join(shop, shop.c.key == self.workshop_id, isouter=True)
            .where(row.status == _COMPLETED, self.workshop_id.in_(paid))
            .group_by(self.workshop_id)
            .having(self.net() > 0)
            .subquery()
        )
        return sa.select(each).where(self.covers(each.c.user)).subquery("unlocks")

    def net(self) -> Expression:
        """The number of consumptions less that of reversals, of a group of completed rows."""
        return sa.func.count().filter(self.spends()) - sa.func.count().filter(self.gives_back())

    def spends(self) -> Expression:
        """True where a row unlocks its workshop."""
        return self.row.type == _CONSUMPTION

    def gives_back(self) -> Expression:
        """True where a row undoes an unlocking."""
        return self.row.type == _REVERSAL

    def sums(self) -> sa.Select[Any]:
        """One row: the numbers of users and ledger rows, and each sign of a fault, as a boolean."""
        key, deleted_at = self.schema.users.c.key, self.schema.users.c.deleted_at
        users = sa.select(
            sa.func.count().label("users"),
            self._sum_of_users().label("chain"),
            sa.func.count(deleted_at).label("deleted"),
            sa.func.count().filter(self.unopened()).label("unopened"),
            sa.func.count().filter(self.schema.users.c.credit_held != 0).label("held"),
        ).where(self.covers(key))
        ledger = sa.select(
            sa.func.count().label("rows"),
            self._sum_of_steps().label("chain"),
            *((sa.func.count().filter(sign(self)) > 0).label(name) for name, sign in _COUNTED.items()),
        ).where(self.covers_rows())
        if self.schema.workshops is not None:
            ledger = ledger.add_columns(self._sum_of_unlocks().label("unlocks"))
        u, r = users.subquery("of_users"), ledger.subquery("of_ledger")
        sums = sa.select(
            u.c.users,
            r.c.rows,
            (u.c.chain + r.c.chain != 0).label("chain"),
            (u.c.deleted > 0).label("deletions"),
            (u.c.unopened > 0).label("unopened"),
            (u.c.held > 0).label("held"),
            *(r.c[name] for name in _COUNTED),
        ).join_from(u, r, sa.true())
        if self.schema.workshops is None:
            return sums
        w = sa.select(self._sum_of_marks().label("unlocks")).where(self.covers_owner()).subquery("of_workshops")
        return sums.add_columns((r.c.unlocks + w.c.unlocks != 0).label("unlocks")).join(w, sa.true())

    def suspects(self, conn: DbConnection, sign: str) -> _Part:
        """This part, narrowed to the users whose own sum is wrong."""
        key: Expression = self.schema.users.c.key
        covered, sum_of_users, sum_of_ledger = self.covers(key), self._sum_of_users, self._sum_of_steps
        if sign == "unlocks":
            key = self.owner
            covered, sum_of_users, sum_of_ledger = self.covers_owner(), self._sum_of_marks, self._sum_of_unlocks
        each = sa.union_all(
            sa.select(key.label("user"), sum_of_users().label("off")).where(covered).group_by(key),
            sa.select(self.user_id.label("user"), sum_of_ledger().label("off"))
            .where(self.covers(self.user_id))
            .group_by(self.user_id),
        ).subquery()
        return self.narrowed(conn, sa.select(each.c.user).group_by(each.c.user).having(sa.func.sum(each.c.off) != 0))

    def out_of_order(self) -> sa.Select[Any]:
        """Users with a row that completed before one of a lower number, by an index-only scan where possible."""
        row = self.row
        before = sa.func.lag(row.sequence).over(partition_by=row.user_id, order_by=(row.completed_at, row.sequence))
        each = (
            sa.select(self.user_id.label("user"), row.sequence, before.label("before"))
            .where(self.covers(self.user_id), row.completed_at.is_not(None), row.sequence > 0)
            .subquery()
        )
        return sa.select(each.c.user).where(each.c.sequence < each.c.before).distinct()

    def narrowed(self, conn: DbConnection, of: sa.Select[Any]) -> _Part:
        """This part with the users of ``of`` only, unless they are too many."""
        users = run(conn, of.limit(SUSPECTS + 1), {}).scalars().all()
        if len(users) > SUSPECTS:
            return self
        narrowed = copy.copy(self)
        narrowed.among = [user for user in users if user is not None]  # a workshop may have no owner
        return narrowed

    def _sum_of_users(self) -> Expression:
        """The sum of the users' ends, less that of their starts."""
        user, key_type = self.schema.users.c, self.schema.host.users.key_type
        stands = self._point(sa.func.greatest(user.credit_sequence, -1), self.balance())
        started = self._point(sa.literal(0, sa.Integer), sa.literal(0, sa.BigInteger))
        return _sum(_hash(user.key, key_type, stands)) - _sum(_hash(user.key, key_type, started))

    def balance(self) -> Expression:
        """The balance that the ledger should have of a user: 0 while it has not recorded the opening balance.

        A column that the app had before may hold nulls, and may be of another type of number.
        """
        column = self.schema.users.c.credit_balance
        kept = sa.cast(sa.func.coalesce(column, 0), column.type)
        return sa.case((self.unopened(), 0), else_=kept) if self.facts.follows else kept

    def unopened(self) -> Expression:
        """True where the ledger has not recorded the opening balance of a user yet."""
        user = self.schema.users.c
        return sa.and_(user.credit_sequence == 0, user.credit_balance > 0) if self.facts.follows else sa.false()

    def marked(self, before: dt.datetime | None) -> Expression:
        """True for a marked workshop, unless the mark is older than ``before`` and so the app's own."""
        mark = self.workshop.c.credit_consumed_at
        moment = sa.literal(before, pg.TIMESTAMP(timezone=True))
        return mark.is_not(None) if before is None else _epoch(mark) >= _epoch(moment)

    def _sum_of_steps(self) -> Expression:
        """The sum of the points where steps begin, less that of the points where they end."""
        row, key_type = self.row, self.schema.host.users.key_type
        begins = self._point(row.sequence - 1, row.balance_after.cast(_SUMS[self.schema.host.credits]) - row.amount)
        ends = self._point(row.sequence, row.balance_after)
        numbered = row.sequence > 0
        return _sum(_hash(row.user_id, key_type, begins), numbered) - _sum(_hash(row.user_id, key_type, ends), numbered)

    def _point(self, sequence: Expression, balance: Expression) -> Expression:
        """A point as the 64-bit seed for the hash of a key: 32 bits each, or a hash where credits are bigint."""
        if self.schema.host.credits == "integer":
            return sequence.cast(sa.BigInteger) * 2**32 + balance
        return sa.func.hash_numeric_extended(balance.cast(sa.Numeric), sequence.cast(sa.BigInteger))

    def _sum_of_unlocks(self) -> Expression:
        """The sum of workshops paid for, less those given back."""
        row, workshop = self.row, self._hash_of_workshop(self.row.workshop_id)
        completed = row.status == _COMPLETED
        return _sum(workshop, completed & self.spends()) - _sum(workshop, completed & self.gives_back())

    def _sum_of_marks(self) -> Expression:
        """Less the sum of workshops marked as unlocked."""
        shop = self.workshop.c
        return -_sum(self._hash_of_workshop(shop.key), self.marked(self.facts.marked_before))

    def _hash_of_workshop(self, key: Expression) -> Expression:
        host = self.schema.host
        key_type = host.workshops.key_type if host.workshops is not None else "uuid"
        return _hash(key, key_type, sa.literal(0, sa.BigInteger))


def _hash(key: Expression, key_type: KeyType, seed: Expression) -> Expression:
    if key_type == "uuid":
        return sa.func.uuid_hash_extended(key, seed)
    # PostgreSQL's hash of a bigint depends on only 32 bits
    return sa.func.hashtextextended(key if key_type == "text" else key.cast(sa.Text), seed)


_SUMS: Mapping[str, type[sa.types.TypeEngine[Any]]] = {"integer": sa.BigInteger, "bigint": sa.Numeric}
"""A type that holds the sum of two numbers of credits, even in a faulty ledger."""


def _epoch(moment: Expression) -> Expression:
    """A moment in seconds since 1970, of a column with a time zone or of one without, which holds UTC."""
    return sa.extract("epoch", moment)


def _sum(hashes: Expression, where: Expression | None = None) -> Expression:
    added = sa.func.sum(hashes, type_=sa.Numeric)  # of bigints it is exact, whatever their number
    return sa.func.coalesce(added if where is None else added.filter(where), 0)


# --- the rules about one row ---

Row = sa.sql.base.ReadOnlyColumnCollection[str, sa.Column[Any]]


def _completed(row: Row) -> Expression:
    done = row.status == _COMPLETED
    return sa.or_(*(done != column.is_not(None) for column in (row.balance_after, row.sequence, row.completed_at)))


def _paid(row: Row) -> Expression:
    halves = row.amount_paid.is_(None) != row.currency.is_(None)
    return sa.or_(halves, row.amount_paid < 0, ~row.currency.regexp_match("^[a-z]{3}$"))


def _malformed_key(row: Row) -> Expression:
    length = sa.func.coalesce(sa.func.char_length(row.idempotency_key), sa.case((row.type == _PURCHASE, 1), else_=0))
    return ~length.between(1, 255)


def _wrong_amount_of_hold(row: Row) -> Expression:
    amount = row.amount.cast(sa.Numeric)  # whose opposite may be beyond the column's type
    beyond_limit = -amount > sa.func.coalesce(row.capture_limit, row.held)
    set_aside = sa.case((row.status == _COMPLETED, beyond_limit), else_=-amount != row.held)
    closed = sa.and_(row.capture_limit == 0, row.status == CreditTransactionStatus.FAILED)
    below = sa.and_(row.capture_limit < row.held, ~closed)
    return sa.and_(row.type == _CONSUMPTION, row.held > 0, sa.or_(set_aside, below))


_BROKEN: dict[str, Callable[[Row], Expression]] = {
    "amount_sign": lambda row: sa.or_(
        row.amount == 0, sa.and_(row.type != _TRANSFER, (row.amount < 0) != row.type.in_(_TAKE))
    ),
    "no_overdraft": lambda row: sa.and_(row.type == _CONSUMPTION, row.held.is_(None), row.balance_after < 0),
    "completed": _completed,
    "sequence_positive": lambda row: row.sequence < 1,
    "only_purchases_wait": lambda row: sa.and_(row.status != _COMPLETED, row.type != _PURCHASE, row.held.is_(None)),
    "refund_of": lambda row: sa.and_(row.type != _GRANT, row.type.in_(_LINKED) != row.refund_of.is_not(None)),
    "paid": _paid,
    "only_purchases_are_paid": lambda row: sa.and_(
        row.type != _PURCHASE,
        sa.func.num_nonnulls(
            row.stripe_session_id,
            row.stripe_payment_intent_id,
            row.stripe_price_id,
            row.amount_paid,
            row.currency,
        )
        > 0,
    ),
    "workshop_link": lambda row: sa.and_(row.workshop_id.is_not(None), row.type.not_in([_CONSUMPTION, _REVERSAL])),
    "key_shape": _malformed_key,
    "hold_shape": lambda row: sa.case(
        (row.held.is_(None), row.capture_limit.is_not(None)),
        else_=sa.or_(row.type != _CONSUMPTION, row.held < 1, row.expires_at.is_(None)),
    ),
    "hold_amount": _wrong_amount_of_hold,
}

_COUNTED: dict[str, Callable[[_Part], Expression]] = {
    "rules": lambda part: sa.or_(*(broken(part.row) for broken in _BROKEN.values())),
    "waiting": lambda part: _waits_long(part.row),
    "late beginnings": lambda part: _began_late(part.row),
    "unfinished": lambda part: part.row.status != _COMPLETED,
    "refunds": lambda part: sa.and_(part.row.refund_of.is_not(None), part.row.type != _TRANSFER),
    "transfers": lambda part: part.row.type == _TRANSFER,
    "lots": lambda part: sa.and_(part.row.expires_at.is_not(None), part.row.held.is_(None)),
    "holds": lambda part: sa.and_(part.row.held.is_not(None), part.row.status == _PENDING),
    "other workshops": lambda part: sa.and_(
        part.row.workshop_id.is_not(None), sa.or_(part.row.status != _COMPLETED, ~part.spends())
    ),
}


def _waits_long(row: Row) -> Expression:
    old = row.created_at < sa.func.now() - sa.literal(dt.timedelta(days=1))
    return sa.and_(row.status == _PENDING, row.held.is_(None), old)


def _began_late(row: Row) -> Expression:
    # created_at is the beginning of a transaction, completed_at a moment in the same or a later one
    return row.created_at > row.completed_at


# --- the searches ---


def _rows_that_break(name: str) -> Callable[[_Part], sa.Select[Any]]:
    def search(part: _Part) -> sa.Select[Any]:
        row = part.row
        shown = (
            row.amount,
            row.balance_after,
            row.sequence,
            row.completed_at,
            row.refund_of,
            row.amount_paid,
            row.held,
        )
        links = (part.workshop_id.label("linked"), row.idempotency_key, row.stripe_session_id, row.capture_limit)
        texts = (row.type.cast(sa.Text).label("type"), row.status.cast(sa.Text).label("status"), row.currency)
        return part.rows(*shown, *links, *texts).where(_BROKEN[name](row))

    return search


def _gaps(part: _Part) -> sa.Select[Any]:
    step = part.steps().c
    return sa.select(*step, (step.previous + 1).label("next")).where(step.sequence != step.previous + 1)


def _wrong_sums(part: _Part) -> sa.Select[Any]:
    step = part.steps().c
    total = (step.before + step.amount).label("total")
    # a missing row breaks the arithmetic too, and is the other check's finding
    return sa.select(*step, total).where(step.sequence == step.previous + 1, step.balance_after != total)


def _standings(part: _Part) -> sa.Select[Any]:
    """Each user's balance and sequence, and those of the last row of the ledger."""
    users, ends = part.schema.users, part.ends()
    balance = sa.case((ends.c.sequence.is_(None), 0), else_=ends.c.balance_after)
    return (
        sa.select(
            users.c.key.label("user"),
            users.c.credit_sequence,
            part.balance().label("credit_balance"),
            sa.func.coalesce(ends.c.sequence, 0).label("sequence"),
            balance.label("balance"),
        )
        .join_from(users, ends, ends.c.user == users.c.key, isouter=True)
        .where(part.covers(users.c.key))
    )


def _wrong_sequences(part: _Part) -> sa.Select[Any]:
    each = _standings(part).subquery().c
    return sa.select(*each).where(each.credit_sequence != each.sequence)


def _wrong_balances(part: _Part) -> sa.Select[Any]:
    each = _standings(part).subquery().c
    # a wrong number of rows means a wrong last row, and is the other check's finding
    return sa.select(*each).where(each.credit_sequence == each.sequence, each.credit_balance != each.balance)


def _unopened(part: _Part) -> sa.Select[Any]:
    waiting = sa.select(sa.func.count().label("waiting")).add_columns(sa.literal(part.describe()).label("part"))
    return waiting.select_from(part.schema.users).where(part.covers(part.schema.users.c.key), part.unopened())


def _unknown_users(part: _Part) -> sa.Select[Any]:
    key = part.schema.users.c.key
    orphans = part.rows().where(~sa.exists().where(key == part.user_id)).subquery()
    return sa.select(orphans.c.user, sa.func.count().label("rows")).group_by(orphans.c.user)


def _refunds(part: _Part) -> tuple[sa.Select[Any], sa.FromClause]:
    purchase = part.schema.credit_transactions.alias("purchase")
    refunds = part.rows(part.row.amount, part.row.refund_of)
    refunds = refunds.where(part.row.refund_of.is_not(None), part.row.type != _TRANSFER)
    return refunds.join(purchase, purchase.c.id == part.row.refund_of, isouter=True), purchase


def _unknown_purchases(part: _Part) -> sa.Select[Any]:
    refunds, purchase = _refunds(part)
    return refunds.where(purchase.c.id.is_(None))


def _not_refundable(part: _Part) -> sa.Select[Any]:
    refunds, purchase = _refunds(part)
    of = purchase.c
    return refunds.add_columns(
        of.user_id.label("buyer"), of.type.cast(sa.Text).label("type"), of.status.cast(sa.Text).label("status")
    ).where(sa.or_(part.comparable(of.user_id) != part.user_id, ~_may_link(part.row, of), of.status != _COMPLETED))


def _may_link(row: Row, of: Any) -> Expression:
    """True where a row's type may refer to a row of the other's type."""
    return sa.case(
        (row.type.in_([_REFUND, _GRANT]), of.type == _PURCHASE),
        (row.type == _REVERSAL, of.type == _CONSUMPTION),
        (row.type == _CORRECTION, of.type == _GRANT),
        # an expiry: a merge moves credits that expire, by a transfer
        else_=sa.or_(of.type.in_([_PURCHASE, _GRANT]), sa.and_(of.type == _TRANSFER, of.amount > 0)),
    )


def _excessive_refunds(part: _Part) -> sa.Select[Any]:
    refunds, purchase = _refunds(part)
    of = purchase.c
    back = -sa.func.sum(part.row.amount) * sa.case((of.amount < 0, -1), else_=1)
    return (
        refunds.with_only_columns(
            part.user_id.label("user"),
            of.id.label("transaction"),
            sa.func.abs(of.amount).label("amount"),
            back.label("refunded"),
            sa.func.count().label("refunds"),
        )
        # a row that cannot be refunded at all is another check's finding
        .where(part.row.status == _COMPLETED, of.status == _COMPLETED, _may_link(part.row, of))
        .where(part.comparable(of.user_id) == part.user_id)
        .group_by(part.user_id, of.id, of.amount)
        .having(sa.or_(back > sa.func.abs(of.amount), back < 0))
    )


def _wrongly_held(part: _Part) -> sa.Select[Any]:
    """Users whose open holds do not add up to ``credit_held``."""
    row, users = part.row, part.schema.users.c
    holds = (
        part.rows(row.held)
        .with_only_columns(part.user_id.label("user"), sa.func.sum(row.held).label("holds"))
        .where(row.held.is_not(None), row.status == _PENDING)
        .group_by(part.user_id)
        .subquery("holds")
    )
    held = sa.func.coalesce(holds.c.holds, 0)
    return (
        sa.select(users.key.label("user"), users.credit_held, held.label("holds"))
        .select_from(part.schema.users)
        .join(holds, holds.c.user == users.key, isouter=True)
        .where(part.covers(users.key), users.credit_held != held)
    )


def _lots(part: _Part, *columns: Expression) -> sa.Select[Any]:
    """Each lot with the row that gave it."""
    lot, row = part.schema.lots.c, part.row
    selected = sa.select(lot.user_id.label("user"), lot.id.label("transaction"), *columns)
    joined = selected.select_from(part.schema.lots).join(
        part.schema.credit_transactions, sa.and_(row.id == lot.id, part.user_id == lot.user_id), isouter=True
    )
    return joined.where(part.covers(lot.user_id))


def _wrong_lots(part: _Part) -> sa.Select[Any]:
    """Lots whose moves do not add up to their rest, or that no row gave."""
    lot, move, row = part.schema.lots.c, part.schema.lot_moves.c, part.row
    taken = sa.func.coalesce(
        sa.select(sa.func.sum(move.amount)).where(move.lot_id == lot.id).scalar_subquery(), sa.literal(0)
    )
    given = sa.case((row.status == _COMPLETED, row.amount), else_=0)
    columns = (given.label("given"), taken.label("taken"), row.expires_at.label("until"))
    return _lots(part, lot.amount, lot.remaining, lot.expires_at, *columns).where(
        sa.or_(
            given.is_distinct_from(lot.amount),
            lot.remaining.is_distinct_from(lot.amount - taken),
            lot.expires_at.is_distinct_from(row.expires_at),
        )
    )


def _stray_moves(part: _Part) -> sa.Select[Any]:
    """Moves of lots by a row that did not take, or give back, as many credits of the lot's user."""
    lot, move = part.schema.lots.c, part.schema.lot_moves.c
    by = part.schema.credit_transactions.alias("by").c
    fits = sa.case(
        (move.transaction_id == lot.id, move.amount > 0),  # it paid a debt
        (by.amount < 0, move.amount.between(1, -by.amount.cast(sa.Numeric))),
        else_=move.amount.between(-by.amount.cast(sa.Numeric), -1),
    )
    made = sa.exists().where(
        by.id == move.transaction_id, part.comparable(by.user_id) == lot.user_id, by.status == _COMPLETED, fits
    )
    moves = _lots(part, move.amount.label("moved"), move.transaction_id.label("by"))
    return moves.join(part.schema.lot_moves, move.lot_id == lot.id).where(~made)


def _missing_lots(part: _Part) -> sa.Select[Any]:
    """Rows that gave credits which expire, and have no lot."""
    row = part.row
    there = sa.exists().where(part.schema.lots.c.id == row.id)
    return part.rows(row.amount, row.expires_at).where(
        row.expires_at.is_not(None), row.held.is_(None), row.status == _COMPLETED, ~there
    )


def _uncovered_lots(part: _Part) -> sa.Select[Any]:
    """Users with more credits left in lots than the balance has."""
    row, users, lot = part.row, part.schema.users.c, part.schema.lots.c
    lots = (
        sa.select(lot.user_id.label("user"), sa.func.sum(lot.remaining).label("left"))
        .where(part.covers(lot.user_id), lot.remaining > 0)
        .group_by(lot.user_id)
        .subquery("open_lots")
    )
    # An app with balances of its own takes credits from no lot. The rows of its writes stay after the cut-over.
    taken_by_the_app = sa.exists().where(
        part.user_id == users.key, row.amount < 0, row.idempotency_key.startswith("tallystick:app:")
    )
    return (
        sa.select(users.key.label("user"), part.balance().label("credit_balance"), lots.c.left)
        .select_from(part.schema.users)
        .join(lots, lots.c.user == users.key)
        .where(lots.c.left > sa.func.greatest(part.balance(), 0), ~taken_by_the_app)
    )


def _early_expiries(part: _Part) -> sa.Select[Any]:
    lot, row = part.schema.lots.c, part.row
    rows = part.rows(row.completed_at, lot.expires_at).join(part.schema.lots, lot.id == row.refund_of)
    return rows.where(row.type == _EXPIRY, row.completed_at < lot.expires_at)


def _due_too_late(part: _Part) -> sa.Select[Any]:
    """Users with a hold or lot that expires before ``credit_due_at``: a balance would be read without it."""
    row, users, lot = part.row, part.schema.users.c, part.schema.lots.c
    waiting = sa.union_all(
        part.rows()
        .with_only_columns(part.user_id.label("user"), row.expires_at.label("first"))
        .where(row.held.is_not(None), row.status == _PENDING),
        sa.select(lot.user_id, lot.expires_at)
        .join(part.schema.users, users.key == lot.user_id)
        .where(part.covers(lot.user_id), lot.remaining > 0)
        # holds keep the rest of an expired lot until they end
        # not now(): a writer beside this transaction may have found since it began that one has expired
        .where(sa.or_(users.credit_held == 0, lot.expires_at > sa.func.clock_timestamp())),
    ).subquery("waiting")
    first = sa.func.min(waiting.c.first)
    return (
        sa.select(users.key.label("user"), users.credit_due_at, first.label("first"))
        .select_from(part.schema.users)
        .join(waiting, waiting.c.user == users.key)
        .group_by(users.key, users.credit_due_at)
        .having(sa.or_(users.credit_due_at.is_(None), users.credit_due_at > first))
    )


def _one_sided(part: _Part) -> sa.Select[Any]:
    """Rows of a merge without a matching row of the other account, whichever part that is in."""
    row, other = part.row, part.schema.credit_transactions.alias("other").c
    fits = sa.and_(
        other.id == row.refund_of,
        other.refund_of == row.id,
        other.type == _TRANSFER,
        other.user_id != row.user_id,
        other.amount == -row.amount,
    )
    rows = part.rows((-row.amount).label("opposite"), row.refund_of)
    # without an amount it is the tally's finding
    return rows.where(row.type == _TRANSFER, row.amount.is_not(None), ~sa.exists().where(fits))


def _unmarked_workshops(part: _Part) -> sa.Select[Any]:
    shop, unlock = part.workshop.c, part.unlocks()
    return sa.select(unlock).join(part.workshop, shop.key == unlock.c.workshop).where(shop.credit_consumed_at.is_(None))


def _charged_twice(part: _Part) -> sa.Select[Any]:
    unlock = part.unlocks()
    return sa.select(unlock).where(unlock.c.net > 1)


def _unpaid_workshops(part: _Part) -> sa.Select[Any]:
    row, shop = part.row, part.workshop.c
    before = part.facts.followed_until or part.facts.marked_before
    # the app's old code may go on marking workshops as long as its balances are followed
    marked = sa.and_(part.covers_owner(), part.marked(before), sa.literal(not part.facts.follows))
    paid = (
        sa.select(part.workshop_id.label("workshop"))
        .where(row.status == _COMPLETED, part.workshop_id.in_(sa.select(shop.key).where(marked)))
        .group_by(part.workshop_id)
        .having(part.net() > 0)
        .subquery("paid")
    )
    # Deleting a workshop empties workshop_id. A host that inserts it again keeps the mark of the consumption's moment.
    unlinked = part.schema.credit_transactions.alias("unlinked").c
    reinserted = sa.exists().where(
        part.comparable(unlinked.user_id) == part.owner,
        unlinked.type == _CONSUMPTION,
        unlinked.workshop_id.is_(None),
        sa.func.abs(_epoch(unlinked.completed_at) - _epoch(shop.credit_consumed_at)) < KEPT_WITHIN_S,
    )
    workshops = sa.select(part.schema.owner.label("user"), shop.key.label("workshop"), shop.credit_consumed_at)
    return workshops.where(marked, ~sa.exists().where(paid.c.workshop == shop.key), ~reinserted)


def _unknown_workshops(part: _Part) -> sa.Select[Any]:
    missing = ~sa.exists().where(part.workshop.c.key == part.workshop_id)
    rows = part.rows(part.workshop_id.label("workshop"))
    return rows.where(part.row.workshop_id.is_not(None), ~_BROKEN["workshop_link"](part.row), missing)


def _unsettled(part: _Part) -> sa.Select[Any]:
    reversal = stripe_reversals.c
    took = sa.case((reversal.applied == "none", "none"), else_="some").label("took")
    paid = sa.func.coalesce(part.row.amount_paid.cast(sa.Text) + " " + part.row.currency, "no amount").label("paid")
    columns = (
        reversal.id,
        reversal.kind,
        reversal.amount.label("money"),
        reversal.currency,
        reversal.status,
        took,
        paid,
    )
    rows = part.rows(*columns).join(
        stripe_reversals, reversal.stripe_payment_intent_id == part.row.stripe_payment_intent_id
    )
    return rows.where(part.row.type == _PURCHASE, part.row.status == _COMPLETED, _money_and_credits_disagree())


def _money_and_credits_disagree() -> Expression:
    """True for a refund or dispute that moved money but no credits, or credits but no money."""
    reversal = stripe_reversals.c
    ours = ("failed", "canceled", "won", "prevented", "warning_needs_response", "warning_under_review")
    return reversal.status.not_in([*ours, "warning_closed"]) == (reversal.applied == "none")


def _out_of_order(part: _Part) -> sa.Select[Any]:
    row = part.row
    before = sa.func.lag(row.completed_at).over(partition_by=row.user_id, order_by=(row.sequence, row.id))
    rows = part.rows(row.sequence, row.completed_at, before.label("before"))
    rows = rows.where(row.completed_at.is_not(None), row.sequence > 0)
    each = rows.subquery().c
    return sa.select(*each).where(each.completed_at < each.before)


def _spent_after_deletion(part: _Part) -> sa.Select[Any]:
    row, users = part.row, part.schema.users
    late = _epoch(row.completed_at) - _epoch(users.c.deleted_at) > DELETION_TAKES.total_seconds()
    deleted_at = users.c.deleted_at.label("deleted_at")
    rows = part.rows(row.amount, row.completed_at, deleted_at).join(users, users.c.key == part.user_id)
    return rows.where(row.type == _CONSUMPTION, row.held.is_(None), users.c.deleted_at.is_not(None), late)


def _repeated(*columns: str) -> Callable[[_Part], sa.Select[Any]]:
    """Rows with the same values of ``columns`` as an earlier one."""

    def search(part: _Part) -> sa.Select[Any]:
        first = part.schema.credit_transactions.alias("first").c
        same = (first[name] == part.row[name] for name in columns)
        shown = (part.row[name] for name in columns if name != "user_id")
        return part.rows(*shown).where(sa.exists().where(*same, first.id < part.row.id))

    return search


def _unrecorded(part: _Part) -> sa.Select[Any]:
    row, event = part.row, events.c
    kind = row.type.cast(sa.Text) + ".completed"
    recorded = sa.exists().where(event.transaction_id == row.id, event.kind == kind)
    rows = part.rows(kind.label("kind"), row.completed_at)
    return rows.where(row.status == _COMPLETED, row.completed_at >= part.facts.recorded_since, ~recorded)


def _wrong_days(part: _Part) -> sa.Select[Any]:
    """Sums of the part's day that differ from those of its rows, of all users."""
    row, kept = part.row, daily_sums.c
    begin, end = (dt.datetime.combine(part.day + dt.timedelta(days=n), dt.time(), dt.UTC) for n in (0, 1))
    undoes = sa.and_(row.type == _GRANT, row.refund_of.is_not(None))
    kind = sa.case((undoes, "reinstatement"), else_=row.type.cast(sa.Text)).label("kind")
    currency = sa.func.coalesce(row.currency.cast(sa.Text), "").label("currency")
    paid = sa.func.coalesce(sa.func.sum(row.amount_paid), 0).label("paid")
    added = (
        sa.select(kind, currency, sa.func.sum(row.amount).label("credits"), paid)
        .where(row.completed_at >= begin, row.completed_at < end, row.status == sa.literal_column("'completed'"))
        .group_by(kind, currency)
        .subquery("added")
    )
    sums = sa.select(kept.kind, kept.currency, kept.credits, kept.paid).where(kept.day == part.day).subquery("kept")
    of = {name: sa.func.coalesce(sums.c[name], added.c[name]) for name in ("kind", "currency")}
    same = sa.and_(*(sums.c[name] == added.c[name] for name in of))
    figures = {
        f"{whose}_{name}": sa.func.coalesce(side.c[name], 0)
        for whose, side in (("kept", sums), ("rows", added))
        for name in ("credits", "paid")
    }
    differs = sa.or_(*(figures[f"kept_{name}"] != figures[f"rows_{name}"] for name in ("credits", "paid")))
    is_closed = sa.exists().where(days.c.day == part.day, days.c.closed_at.is_not(None))  # it may be opened meanwhile
    shown = {"part": sa.literal(f"day {part.day}"), "day": sa.literal(str(part.day))}
    columns = (expression.label(name) for name, expression in (shown | of | figures).items())
    selected: list[Expression] = [*columns]
    return (
        sa.select(*selected)
        .select_from(sums.join(added, same, full=True))
        .where(differs, is_closed)
        .order_by(*of.values())
    )


# --- statements that fix a finding ---


def _set_of_user(column: str, to: str) -> Callable[[Schema, Mapping[str, Any]], sa.Update]:
    """Set a column of the user to the value that a search selected as ``to``."""

    def fix(schema: Schema, row: Mapping[str, Any]) -> sa.Update:
        users = schema.users
        return sa.update(users).where(users.c.key == row["user"]).values({column: row[to]})

    return fix


def _set_mark(schema: Schema, row: Mapping[str, Any]) -> sa.Update:
    """Set the mark to the moment of the consumption, or to null without one."""
    if schema.workshops is None:
        raise AssertionError("a check of workshops ran on a host that has none")
    mark = {"credit_consumed_at": row.get("completed_at")}
    return sa.update(schema.workshops).where(schema.workshops.c.key == row["workshop"]).values(mark)


def _name(table: sa.Table) -> str:
    return _SPELLING.identifier_preparer.format_table(table)


def _finding(check: Check, schema: Schema, row: Mapping[str, Any]) -> Finding:
    user, transaction, workshop = row.get("user"), row.get("transaction"), row.get("workshop")
    words: dict[str, Any] = {
        "users": _name(schema.users),
        "workshops": "" if schema.workshops is None else _name(schema.workshops),
        "balance_column": schema.users.c.credit_balance.name,
        "deletion_column": schema.users.c.deleted_at.name,
        "history": f"tallystick history {shlex.quote(str(user))}",
        "grant": f"tallystick grant {shlex.quote(str(user))}",
        "purchase": f"{shlex.quote(str(user))} {transaction}",
        **row,
    }
    if check.fix is not None:
        statement = check.fix(schema, row).compile(dialect=_SPELLING, compile_kwargs={"literal_binds": True})
        words["fix"] = str(statement)
    if transaction is not None:
        where = f"credit transaction {transaction}"
    elif workshop is not None:
        where = f"workshop {workshop}"
    else:
        where = row.get("part", "no user") if user is None else f"user {user}"
    return Finding(
        check=check.name,
        fault=check.fault,
        where=where,
        user=user,
        transaction=transaction,
        workshop=workshop,
        expected=check.expected.format_map(words),
        found=check.found.format_map(words),
        likely_cause=check.likely_cause.format_map(words),
        what_to_do=check.what_to_do.format_map(words),
    )


_BY_HAND = "changed by hand, with the append-only trigger off"
_LOOK = "Look with: {history}. "
_RESTORE = _LOOK + "Restore the row from your latest backup, then run: tallystick migrate status"
_CLOCK = f"the server's clock was set back, or a fail-over led to a slower clock; or {_BY_HAND}"
_COMPARE = _LOOK + "For several users at one time the clock is the cause. For one user, compare with your backup"
_CONSTRAINT = _LOOK + "Correct or restore the row, then find out which constraint is missing: tallystick migrate status"


def _rule(
    name: str, purpose: str, *, expected: str, found: str, constrained: bool = True, needs_workshops: bool = False
) -> Check:
    """A rule about one row, which a constraint keeps as well where it is ``constrained``."""
    return Check(
        name=name,
        purpose=purpose,
        signs=frozenset({"rules"}),
        search=_rows_that_break(name),
        expected=expected,
        found=found,
        likely_cause=f"written or {_BY_HAND}, while a constraint of the ledger's was missing"
        if constrained
        else f"written without Tallystick, or {_BY_HAND}",
        what_to_do=_CONSTRAINT if constrained else _RESTORE,
        needs_workshops=needs_workshops,
    )


CHECKS: Mapping[str, Check] = {
    check.name: check
    for check in (
        Check(
            name="gapless_sequence",
            purpose="a user's completed rows are numbered 1, 2, 3 … without a gap or a repetition",
            signs=frozenset({"chain"}),
            search=_gaps,
            expected="sequence {next}",
            found="sequence {sequence}",
            likely_cause=f"a row before it was deleted, or this one's number was {_BY_HAND}",
            what_to_do=_RESTORE,
        ),
        Check(
            name="chain_arithmetic",
            purpose="each balance_after is the balance_after before it plus the amount",
            signs=frozenset({"chain"}),
            search=_wrong_sums,
            expected="balance_after {total}, which is {before} {amount:+}",
            found="balance_after {balance_after}",
            likely_cause="{balance_column} was set by hand or by the app before this row; or the row's amount was "
            f"{_BY_HAND}; or its balance_after was, if the next row is off by the opposite",
            what_to_do=_LOOK + "If your latest backup has another row, restore that. If not, write the row that is "
            "missing before it: docs/troubleshooting.md has the statements",
        ),
        Check(
            name="user_sequence",
            purpose="a user's credit_sequence is that of the last completed row",
            signs=frozenset({"chain"}),
            search=_wrong_sequences,
            expected="credit_sequence {sequence} with balance {balance}, where the ledger ends",
            found="credit_sequence {credit_sequence} with balance {credit_balance}",
            likely_cause="if the user is ahead, the last rows were deleted; "
            "if the ledger is ahead, a row was written without Tallystick",
            what_to_do=_LOOK + "Restore missing rows from your latest backup before this user's next purchase",
        ),
        Check(
            name="user_balance",
            purpose="a user's credit_balance is the last completed row's balance_after",
            signs=frozenset({"chain"}),
            search=_wrong_balances,
            expected="{balance_column} {balance}, where the ledger ends",
            found="{balance_column} {credit_balance}",
            likely_cause="the column was set by hand or by the app",
            what_to_do=_LOOK + "If its rows are right, run: {fix}",
            fix=_set_of_user("credit_balance", to="balance"),
        ),
        Check(
            name="balance_opened",
            purpose="each balance from before Tallystick has its opening balance in the ledger",
            signs=frozenset({"unopened"}),
            search=_unopened,
            expected="an opening balance for every user who has credits",
            found="{waiting} users without one",
            likely_cause="the run that opens balances has not reached them, or the app's code has given credits since",
            what_to_do="Nothing: the first write to the ledger opens each balance. To open all: tallystick adopt",
            fault=False,
        ),
        Check(
            name="unknown_user",
            purpose="each row of the ledger belongs to a user",
            signs=frozenset({"chain", "unfinished"}),
            search=_unknown_users,
            expected="a row in {users} with this key",
            found="none, but credit transactions: {rows}",
            likely_cause="the user was deleted, or its key changed, while foreign keys were off",
            what_to_do="Restore the user's row from your latest backup; to close an account, soft-delete it",
        ),
        _rule(
            "no_overdraft",
            "a consumption never leaves a balance below 0, except for the capture of a hold with allow_debt",
            expected="balance_after of 0 or more",
            found="balance_after {balance_after} after a consumption of {amount}",
        ),
        _rule(
            "amount_sign",
            "consumptions, refunds, corrections and expiries take; transfers take or give; all others give; none is 0",
            expected="an amount with the sign of a {type}",
            found="amount {amount}",
        ),
        _rule(
            "completed",
            "exactly the completed rows have a balance_after, a sequence and a completed_at",
            expected="all of them if completed, none otherwise; the row is {status}",
            found="balance_after {balance_after}, sequence {sequence}, completed_at {completed_at}",
        ),
        _rule(
            "sequence_positive",
            "sequences begin at 1",
            expected="a sequence of 1 or more",
            found="sequence {sequence}",
        ),
        _rule(
            "only_purchases_wait",
            "only purchases and holds are pending",
            expected="status completed, since the row is a {type}",
            found="status {status}",
        ),
        _rule(
            "refund_of",
            "each refund, reversal, correction, expiry and transfer names another row in refund_of; a grant may",
            expected="a refund_of if it is one of these, none unless it is a grant; the row is a {type}",
            found="refund_of {refund_of}",
        ),
        _rule(
            "paid",
            "amount_paid is 0 or more, in a currency of three lower-case letters",
            expected="amount_paid and currency both or neither, such as 7900 and usd",
            found="amount_paid {amount_paid}, currency {currency}",
        ),
        _rule(
            "only_purchases_are_paid",
            "only purchases have money and Stripe's ids",
            expected="no amount_paid, currency, session, payment intent or price, since the row is a {type}",
            found="amount_paid {amount_paid}, stripe_session_id {stripe_session_id}, or another of them",
        ),
        _rule(
            "workshop_link",
            "only consumptions and reversals name a workshop",
            expected="an empty workshop_id, since the row is a {type}",
            found="workshop_id {linked}",
            constrained=False,
            needs_workshops=True,
        ),
        _rule(
            "key_shape",
            "an idempotency key has 1 to 255 characters, and only a purchase may have none",
            expected="an idempotency_key of 1 to 255 characters; the row is a {type}",
            found="idempotency_key {idempotency_key}",
            constrained=False,
        ),
        _rule(
            "hold_shape",
            "only a consumption is a hold, of 1 credit or more, with an end",
            expected="no credits held by a {type}, or 1 or more of a consumption that expires",
            found="held {held}, capture_limit {capture_limit}",
        ),
        _rule(
            "hold_amount",
            "a hold takes what it has set aside, and once it is captured no more than its limit",
            expected="an amount of as many credits as are held, or once completed of at most the capture_limit; "
            "the row is {status}",
            found="amount {amount}, held {held}, capture_limit {capture_limit}",
            constrained=False,
        ),
        Check(
            name="spent_after_deletion",
            purpose="a soft-deleted user spends nothing",
            signs=frozenset({"deletions"}),
            search=_spent_after_deletion,
            expected="no consumption after {deletion_column} {deleted_at}",
            found="{amount} credits at {completed_at}",
            likely_cause="written without Tallystick, or {deletion_column} was set to an earlier moment afterwards",
            what_to_do=_LOOK + "If the user was deleted later than it says, correct that moment",
        ),
        Check(
            name="refund_excess",
            purpose="no more is taken or given back of a row than it moved: refunds and expiries of a purchase, "
            "reversals of a consumption, corrections of a grant",
            signs=frozenset({"refunds"}),
            search=_excessive_refunds,
            expected="0 to {amount} credits taken or given back in all",
            found="{refunded} credits in {refunds} rows that name it",
            likely_cause="one of them was written without Tallystick",
            what_to_do=_LOOK + "If the customer was refunded too much in money, settle it there. Credits that were "
            "taken too many go back with: {grant} CREDITS --description 'Given back' --key audit-{transaction}",
        ),
        Check(
            name="refundable",
            purpose="a refund names a completed purchase of the same user, a reversal a consumption, a correction a "
            "grant, an expiry the row that gave the credits",
            signs=frozenset({"refunds"}),
            search=_not_refundable,
            expected="a completed row of user {user} that this one can be about, behind refund_of {refund_of}",
            found="a {status} {type} of user {buyer}",
            likely_cause=f"written without Tallystick, or {_BY_HAND}",
            what_to_do=_RESTORE,
        ),
        Check(
            name="unknown_purchase",
            purpose="the row that a refund names is in the ledger",
            signs=frozenset({"refunds"}),
            search=_unknown_purchases,
            expected="a credit transaction {refund_of}, which this one refunds",
            found="none",
            likely_cause="the purchase was deleted while triggers and foreign keys were off",
            what_to_do=_RESTORE,
        ),
        Check(
            name="held",
            purpose="a user's credit_held is the sum of the open holds",
            signs=frozenset({"holds", "held"}),
            search=_wrongly_held,
            expected="credit_held {holds}, the sum of the pending holds",
            found="credit_held {credit_held}",
            likely_cause="the column was set by hand or by the app",
            what_to_do=_LOOK + "If its rows are right, run: {fix}",
            fix=_set_of_user("credit_held", to="holds"),
        ),
        Check(
            name="lot",
            purpose="the rest of a lot is the credits given less the credits taken, and never below 0",
            signs=frozenset({"lots"}),
            search=_wrong_lots,
            expected="{given} credits given, less {taken} taken, until {until}",
            found="{remaining} left of {amount}, until {expires_at}",
            likely_cause="tallystick.lots, tallystick.lot_moves or the row that gave the credits was changed by hand",
            what_to_do=_RESTORE,
        ),
        Check(
            name="lot_moves",
            purpose="credits leave a lot, or come back to it, by a row of its user that took, or gave, as many",
            signs=frozenset({"lots"}),
            search=_stray_moves,
            expected="a completed row of user {user} behind each move of the lot, which took, or gave, as many credits",
            found="a move of {moved} by credit transaction {by}",
            likely_cause="tallystick.lot_moves was changed by hand; or that row was changed or deleted",
            what_to_do=_LOOK + "Restore the user's rows in tallystick.lot_moves from your latest backup. Until then a "
            "reversal of that row may give credits back with another end date than they had",
        ),
        Check(
            name="lot_kept",
            purpose="credits that expire have a lot",
            signs=frozenset({"lots"}),
            search=_missing_lots,
            expected="a lot of {amount} credits that expires at {expires_at}",
            found="none",
            likely_cause="the lot was deleted by hand",
            what_to_do=_RESTORE,
        ),
        Check(
            name="lots_covered",
            purpose="the lots of a user have no more credits left than the balance, and none in debt",
            signs=frozenset({"lots"}),
            search=_uncovered_lots,
            expected="at most the {balance_column} of {credit_balance} left in lots, and none below 0",
            found="{left} left",
            likely_cause="tallystick.lots was changed by hand; or a row that takes credits was written without "
            "Tallystick",
            what_to_do="Look with: {history}, and tallystick lots. When they expire, they take credits that do not "
            "expire. Restore the user's rows in tallystick.lots and tallystick.lot_moves from your latest backup, or "
            "give back what expired too many with: {grant} CREDITS --description 'Given back' --key audit-lots",
        ),
        Check(
            name="expiry_in_time",
            purpose="credits do not expire before their time",
            signs=frozenset({"lots"}),
            search=_early_expiries,
            expected="an expiry at {expires_at} or later",
            found="completed_at {completed_at}",
            likely_cause="written without Tallystick, or the server's clock was ahead",
            what_to_do=_LOOK
            + "Give it back with: {grant} CREDITS --description 'Given back' --key audit-{transaction}",
        ),
        Check(
            name="due",
            purpose="a user's credit_due_at is no later than the end of the user's first hold or lot",
            signs=frozenset({"holds", "lots"}),
            search=_due_too_late,
            expected="credit_due_at {first} or earlier",
            found="credit_due_at {credit_due_at}",
            likely_cause="the column was set by hand or by the app",
            what_to_do=_LOOK + "Run: {fix}",
            fix=_set_of_user("credit_due_at", to="first"),
        ),
        Check(
            name="merged_on_both_sides",
            purpose="a merge takes credits from one account and gives as many to another, in two linked rows",
            signs=frozenset({"transfers"}),
            search=_one_sided,
            expected="a transfer of {opposite:+} of another user, each of the two with the other as its refund_of",
            found="none behind refund_of {refund_of}",
            likely_cause=f"one of the two was deleted, or {_BY_HAND}; or it was written without Tallystick",
            what_to_do=_RESTORE,
        ),
        Check(
            name="workshop_charged_once",
            purpose="each workshop is paid for once",
            signs=frozenset({"unlocks"}),
            search=_charged_twice,
            expected="one consumption for workshop {workshop}",
            found="{net}; this is the last of them",
            likely_cause="one of them was written without Tallystick, or with credit_consumed_at cleared in between",
            what_to_do=_LOOK
            + "Give it back with: {grant} {credits} --description 'Given back' --key audit-{transaction}",
            needs_workshops=True,
        ),
        Check(
            name="workshop_marked",
            purpose="each workshop with a consumption is marked as unlocked",
            signs=frozenset({"unlocks"}),
            search=_unmarked_workshops,
            expected="workshop {workshop} with a credit_consumed_at: it was paid for at {completed_at}",
            found="credit_consumed_at is empty, so its user is locked out",
            likely_cause="the app or a person cleared the column",
            what_to_do="Unlock it: {fix}",
            fix=_set_mark,
            needs_workshops=True,
        ),
        Check(
            name="workshop_paid",
            purpose="each workshop marked as unlocked has a consumption",
            signs=frozenset({"unlocks"}),
            search=_unpaid_workshops,
            expected="a completed consumption for the workshop",
            found="none, but credit_consumed_at {credit_consumed_at}",
            likely_cause="the app or a person set the column; or the consumption was deleted",
            what_to_do="If its owner's history lacks no row (tallystick history), lock it: {fix}",
            fix=_set_mark,
            needs_workshops=True,
        ),
        Check(
            name="unknown_workshop",
            purpose="the workshop that a row names exists",
            signs=frozenset({"unlocks", "other workshops"}),
            search=_unknown_workshops,
            expected="a row in {workshops} with key {workshop}, or an empty workshop_id",
            found="workshop_id {workshop}, which does not exist",
            likely_cause="the workshop was deleted, or its key changed, while foreign keys were off",
            what_to_do="Restore the workshop from your latest backup; to remove one, soft-delete it",
            needs_workshops=True,
        ),
        Check(
            name="unique_idempotency_key",
            purpose="a user's idempotency key stands for one row (searched where its unique index is missing)",
            signs=frozenset({"keys may repeat"}),
            search=_repeated("user_id", "idempotency_key"),
            expected="one row of user {user} with idempotency key {idempotency_key}",
            found="an earlier row has it too",
            likely_cause="a call was repeated while the index credit_transactions_idempotency_key was missing",
            what_to_do=_LOOK + "Undo the double row, then restore the index: tallystick migrate status",
        ),
        Check(
            name="unique_stripe_session",
            purpose="a Stripe session stands for one purchase (searched where its unique index is missing)",
            signs=frozenset({"sessions may repeat"}),
            search=_repeated("stripe_session_id"),
            expected="one row with the Stripe session {stripe_session_id}",
            found="an earlier row has it too",
            likely_cause="a webhook was repeated while the index credit_transactions_stripe_session was missing",
            what_to_do=_LOOK + "Undo the double row, then restore the index: tallystick migrate status",
        ),
        Check(
            name="settled_within_a_day",
            purpose="a purchase is completed or failed within a day (reported, but no fault of the ledger)",
            fault=False,
            signs=frozenset({"waiting"}),
            search=lambda part: part.rows(part.row.created_at, part.row.stripe_session_id).where(_waits_long(part.row)),
            expected="a completed or failed purchase; it began at {created_at}",
            found="it is pending, Stripe session {stripe_session_id}",
            likely_cause="the webhook of its payment or expiry never arrived",
            what_to_do="Ask Stripe with: tallystick stripe reconcile. Sold without Stripe: if it was paid, "
            "tallystick purchase complete {purchase}; if not, tallystick purchase fail {purchase}",
        ),
        Check(
            name="money_and_credits",
            purpose="a refund or dispute at Stripe has taken its credits (reported, but no fault of the ledger)",
            fault=False,
            signs=frozenset({"unsettled"}),
            search=_unsettled,
            expected="credits that follow the money: the {kind} {id} of {money} {currency} is {status}",
            found="it has taken {took}; the purchase has {paid} on record",
            likely_cause="Stripe does not state its part of the payment, or the balance could not hold it",
            what_to_do="Ask Stripe with: tallystick stripe reconcile. If that changes nothing, set its metadata "
            "tallystick_credits at Stripe to the number of credits that it takes, such as 0 or 5",
        ),
        Check(
            name="event_recorded",
            purpose="each row completed while events were on has its event",
            signs=frozenset({"events"}),
            search=_unrecorded,
            expected="an event {kind}, as events were on at {completed_at}",
            found="no event",
            likely_cause=f"the trigger tallystick_events was disabled; or {_BY_HAND}",
            what_to_do="Look with: tallystick migrate status. Report this row by hand to the readers of events",
        ),
        Check(
            name="completed_in_order",
            purpose="rows complete in the order of their numbers (reported, but no fault: a clock may be set back)",
            fault=False,
            signs=frozenset({"order"}),
            search=_out_of_order,
            expected="a completed_at of {before} or later, as the row before has",
            found="completed_at {completed_at} of row {sequence}",
            likely_cause=_CLOCK,
            what_to_do=_COMPARE,
        ),
        Check(
            name="created_before_completed",
            purpose="a row is completed after it was created (reported, but no fault: a clock may be set back)",
            fault=False,
            signs=frozenset({"late beginnings"}),
            search=lambda part: part.rows(part.row.created_at, part.row.completed_at).where(_began_late(part.row)),
            expected="a created_at of {completed_at} or earlier, when it was completed",
            found="created_at {created_at}",
            likely_cause=_CLOCK,
            what_to_do=_COMPARE,
        ),
        Check(
            name="daily_sums",
            purpose="the console's sums of a closed day are those of its rows (reported, but no fault of the ledger)",
            fault=False,
            signs=frozenset({"days"}),
            search=_wrong_days,
            expected="{rows_credits:+} credits by {kind}, and {rows_paid} {currency} paid for them, as its rows say",
            found="{kept_credits:+} and {kept_paid} in tallystick.daily_sums",
            likely_cause=f"a row of that day was {_BY_HAND}; or the server's clock was wrong by more than an hour",
            what_to_do="If no other check has found a row of that day, add it up again: "
            "DELETE FROM tallystick.days WHERE day = '{day}'; then: tallystick sweep",
        ),
        Check(
            name="tally",
            purpose="the sums are right wherever no other check has found a fault",
            signs=frozenset({"chain"}),
            search=lambda part: sa.select(sa.literal(part.describe()).label("part")).where(
                part.sums().subquery().c.chain
            ),
            expected="rows that begin and end where the users do",
            found="sums that differ, although no other check has found the place",
            likely_cause="a required value is missing, such as an amount",
            what_to_do="Run: tallystick migrate status",
        ),
    )
}
"""The checks, worst findings first; each one's ``purpose`` is its documentation."""
