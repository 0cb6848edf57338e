"""The console's queries on events: the endpoints, their dead letters, and the events of each row of the ledger.

The endpoints are few. Lists of events use keyset pagination on the primary key; those of one user, the user's rows.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from uuid import UUID

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql as pg

from tallystick.database import run
from tallystick.declared_tables import event_dead_letters, event_endpoints, event_settings, events
from tallystick.errors import InvalidArgument, Key, NotMigrated
from tallystick.web.console.queries import COUNT_UP_TO, PAGE_ROWS, Listing, Page, Queries

_EXPORT_ROWS = 1_000

DELIVERED, DEAD, WAITS = "delivered", "dead letter", "waits"


@dataclass(frozen=True, slots=True)
class EventsState:
    """The settings: ``recorded_since`` is None while events are off; ``low_balance`` is the default threshold."""

    recorded_since: dt.datetime | None
    low_balance: int | None


@dataclass(frozen=True, slots=True)
class DeliveryProblems:
    """Dead letters, counted up to a thousand, and endpoints whose last attempt failed."""

    dead_letters: int
    failing: int


@dataclass(frozen=True, slots=True)
class EndpointRow:
    """A webhook and its position.

    Of the next thousand events after ``cursor``, ``waiting`` are of its kinds, the oldest since ``waiting_since``;
    ``counted_all`` is false if there are more events.
    """

    name: str
    url: str
    secret_variable: str
    kinds: list[str] | None
    cursor: str | None
    attempts: int
    next_attempt_at: dt.datetime | None
    last_error: str | None
    created_at: dt.datetime
    waiting: int
    waiting_since: dt.datetime | None
    counted_all: bool


@dataclass(frozen=True, slots=True)
class LetterRow:
    """A dead letter, and its user; ``has_endpoint`` is false once its endpoint was removed."""

    endpoint: str
    event_id: int
    kind: str
    attempts: int
    last_error: str
    failed_at: dt.datetime
    has_endpoint: bool
    user_id: Key | None
    email: str | None


@dataclass(frozen=True, slots=True)
class DeliveryState:
    """The state of an event at an endpoint: ``delivered``, ``waits`` or ``dead letter``."""

    endpoint: str
    state: str


@dataclass(frozen=True, slots=True)
class EventRow:
    """An event with its row of the ledger, and its deliveries.

    ``deliveries`` has no endpoints that do not get its kind, or that were added after it.
    """

    cursor: str
    id: int
    kind: str
    created_at: dt.datetime
    transaction_id: UUID
    threshold: int | None
    user_id: Key
    email: str | None
    amount: int
    description: str
    deliveries: list[DeliveryState]


def state(queries: Queries) -> EventsState | None:
    """The settings of the feed; None on a database of a revision before events."""
    try:
        with queries.reading() as conn:
            statement = sa.select(event_settings.c.recorded_since, event_settings.c.low_balance)
            return EventsState(*run(conn, statement, {}).one())
    except NotMigrated:
        return None


def delivery_problems(queries: Queries) -> DeliveryProblems | None:
    """The deliveries that need attention; None on a database of a revision before events."""
    letters = sa.select(event_dead_letters.c.event_id).where(event_dead_letters.c.replayed_at.is_(None))
    some = letters.limit(COUNT_UP_TO).subquery()
    endpoint = event_endpoints.c
    failing = sa.select(sa.func.count()).where(endpoint.removed_at.is_(None), endpoint.attempts > 0)
    statement = sa.select(
        sa.select(sa.func.count()).select_from(some).scalar_subquery(),
        failing.select_from(event_endpoints).scalar_subquery(),
    )
    try:
        with queries.reading() as conn:
            return DeliveryProblems(*run(conn, statement, {}).one())
    except NotMigrated:
        return None


_ENDPOINTS = sa.text("""
SELECT p.name, p.url, p.secret_variable, p.kinds, p.cursor, p.attempts, p.next_attempt_at, p.last_error, p.created_at,
  behind.waiting, behind.since, behind.events <= :most AS counted_all
FROM tallystick.event_endpoints AS p
CROSS JOIN LATERAL (
  SELECT count(*) AS events,
    count(*) FILTER (WHERE p.kinds IS NULL OR next.kind = ANY (p.kinds)) AS waiting,
    min(next.created_at) FILTER (WHERE p.kinds IS NULL OR next.kind = ANY (p.kinds)) AS since
  FROM (
    SELECT e.kind, e.created_at FROM tallystick.events AS e
    WHERE (e.position, e.id) > (
      coalesce(split_part(p.cursor, '-', 1)::bigint, -1), coalesce(split_part(p.cursor, '-', 2)::bigint, 0))
    ORDER BY e.position, e.id LIMIT :most + 1
  ) AS next
) AS behind
WHERE p.removed_at IS NULL ORDER BY p.name
""")


def endpoints(queries: Queries) -> list[EndpointRow]:
    """All webhooks, by name."""
    with queries.reading() as conn:
        return [EndpointRow(*row) for row in run(conn, _ENDPOINTS, {"most": COUNT_UP_TO})]


def dead_letters(queries: Queries) -> list[LetterRow]:
    """Dead letters that were not sent since, by endpoint, the oldest first: as many as a page can show."""
    letter, ledger, users = event_dead_letters.c, queries.schema.credit_transactions.c, queries.schema.users.c
    about = sa.cast(letter.body, pg.JSONB)[("data", "transaction_id")].astext
    some = (
        sa.select(event_dead_letters, sa.cast(about, sa.Uuid).label("transaction_id"))
        .where(letter.replayed_at.is_(None))
        .order_by(letter.endpoint, letter.event_id)
        .limit(PAGE_ROWS)
        .subquery()
    )
    there = sa.exists().where(event_endpoints.c.name == some.c.endpoint, event_endpoints.c.removed_at.is_(None))
    named = [some.c[name] for name in ("endpoint", "event_id", "kind", "attempts", "last_error", "failed_at")]
    statement = (
        sa.select(*named, there, ledger.user_id, queries.email())
        .select_from(some)
        .outerjoin(queries.schema.credit_transactions, ledger.id == some.c.transaction_id)
        .outerjoin(queries.schema.users, users.key == ledger.user_id)
        .order_by(some.c.endpoint, some.c.event_id)
    )
    with queries.reading() as conn:
        return [LetterRow(*row) for row in run(conn, statement, {})]


def latest(
    queries: Queries, *, before: str | None = None, after: str | None = None, limit: int = PAGE_ROWS
) -> Page[EventRow]:
    """Events of all users, the newest first, also those that the feed does not return yet."""
    listing: Listing[tuple[Any, ...]] = Listing(
        queries,
        _select_events(queries),
        (events.c.position, events.c.id),
        lambda *columns: columns,
        _position,
        descending=True,
        separator="-",
    )
    page = listing.page(before=before, after=after, limit=limit)
    with queries.reading() as conn:
        return Page(_with_deliveries(conn, page.rows), page.before, page.after)


def of_user(queries: Queries, user: Key, *, before: str | None = None, after: str | None = None) -> Page[EventRow]:
    """Events of ``user``: those of one page of the ledger and, on the first, those of rows that have not completed."""
    page = queries.ledger(user).page(before=before, after=after)
    rows = [row.id for row in page.rows]
    if page.before is None:
        rows += [row.id for row in (*queries.holds(user).page().rows, *queries.unfinished(user))]
    return Page(of_rows(queries, rows), page.before, page.after)


def of_rows(queries: Queries, rows: Sequence[UUID]) -> list[EventRow]:
    """The events of these rows of the ledger, the newest first."""
    if not rows:
        return []
    event = events.c
    statement = _select_events(queries).where(event.transaction_id.in_(rows))
    with queries.reading() as conn:
        found = run(conn, statement.order_by(event.position.desc(), event.id.desc()), {}).all()
        return _with_deliveries(conn, found)


def every(queries: Queries, user: Key | None) -> Iterator[EventRow]:
    """All of ``latest``, or of ``of_user``, page by page."""
    after = None
    while True:
        page = latest(queries, after=after, limit=_EXPORT_ROWS) if user is None else of_user(queries, user, after=after)
        yield from page.rows
        after = page.after
        if after is None:
            return


def _select_events(queries: Queries) -> sa.Select[Any]:
    event, ledger, users = events.c, queries.schema.credit_transactions.c, queries.schema.users.c
    # once a hold is captured, its row no longer has the credits that it set aside
    is_of_hold = sa.and_(ledger.held.is_not(None), event.kind.in_(_OF_HOLDS))
    return (
        sa.select(
            event.position,
            event.id,
            event.kind,
            event.created_at,
            event.transaction_id,
            event.threshold,
            ledger.user_id,
            queries.email(),
            sa.case((is_of_hold, -ledger.held), else_=ledger.amount),
            ledger.description,
        )
        .select_from(events)
        .join(queries.schema.credit_transactions, ledger.id == event.transaction_id)
        .outerjoin(queries.schema.users, users.key == ledger.user_id)
    )


_OF_HOLDS = ("consumption.held", "consumption.released", "consumption.expired")


def _with_deliveries(conn: sa.Connection, found: Sequence[Sequence[Any]]) -> list[EventRow]:
    endpoint, letter = event_endpoints.c, event_dead_letters.c
    columns = (endpoint.name, endpoint.kinds, endpoint.cursor, endpoint.created_at)
    there = run(conn, sa.select(*columns).where(endpoint.removed_at.is_(None)).order_by(endpoint.name), {}).all()
    ids = [row[1] for row in found]
    letters: dict[tuple[str, int], bool] = {}
    if there and ids:
        statement = sa.select(letter.endpoint, letter.event_id, letter.replayed_at.is_not(None)).where(
            letter.endpoint.in_([row.name for row in there]), letter.event_id.in_(ids)
        )
        letters = {(name, id): taken for name, id, taken in run(conn, statement, {})}
    made = []
    for position, id, kind, created_at, *rest in found:
        deliveries = []
        for name, kinds, cursor, since in there:
            if (name, id) in letters:
                deliveries.append(DeliveryState(name, DELIVERED if letters[name, id] else DEAD))
            elif kinds is not None and kind not in kinds:
                continue
            elif (position, id) > (_position(cursor) if cursor else (-1, 0)):
                deliveries.append(DeliveryState(name, WAITS))
            elif created_at >= since:
                deliveries.append(DeliveryState(name, DELIVERED))
        made.append(EventRow(*(f"{position}-{id}", id, kind, created_at, *rest, deliveries)))
    return made


def _position(cursor: str) -> tuple[int, int]:
    position, dash, id = cursor.partition("-")
    if dash and all(part.isascii() and part.isdigit() and len(part) < 19 for part in (position, id)):  # noqa: PLR2004
        return int(position), int(id)
    raise InvalidArgument.of("cursor", cursor, "no place in this list. Begin at its first page")
