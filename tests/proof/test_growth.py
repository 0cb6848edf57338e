"""No statement of the ledger reads more as history grows: what each really read, on a short and on a long history.

The server says so itself: auto_explain sends the plan of every statement that runs, with the rows and pages that each
step of it touched. So it is the real operations that are measured, with all that they send.
"""

from __future__ import annotations

import datetime as dt
import json
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import sqlalchemy as sa

from tallystick import Consume, CreditTransaction, Ledger
from tallystick.devdb import Server
from tallystick.errors import TallystickError
from worlds import SHAPES, World

SHORT, LONG = 1_000, 100_000
OTHERS = 10  # rows of each other user: they are as many together as the first user's
LATEST = dt.datetime(2026, 1, 1, tzinfo=dt.UTC)
FIRST = uuid.UUID(int=1)

# Of each ten rows: a purchase of 10, six consumptions of which three unlock a workshop, a refund of that purchase,
# two more consumptions. So ten rows leave a credit. One minute lies between two rows of a user.
FILL = """
SET LOCAL session_replication_role = replica;
INSERT INTO users (id, email, credit_balance, credit_sequence)
SELECT ('00000000-0000-0000-0000-' || lpad(to_hex(n), 12, '0'))::uuid, n || '@example.com', rows / 10, rows
FROM generate_series(1, 1 + {rows} / {others}) n, LATERAL (SELECT CASE n WHEN 1 THEN {rows} ELSE {others} END) r (rows);
INSERT INTO credit_transactions (id, user_id, type, status, amount, balance_after, sequence, description, workshop_id,
  refund_of, stripe_session_id, stripe_payment_intent_id, idempotency_key, created_at, completed_at)
SELECT b.id, u.id, type::credit_transaction_type, 'completed',
  amount, (k - 1) / 10 + (ARRAY[10, 9, 8, 7, 6, 5, 4, 3, 2, 1])[step], k, 'x',
  CASE WHEN step IN (2, 3, 4) THEN md5('workshop ' || of)::uuid END,
  CASE WHEN step = 8 THEN md5('row ' || u.id || ' ' || k - 7)::uuid END,
  CASE WHEN step = 1 THEN 'cs ' || of END, CASE WHEN step = 1 THEN 'pi ' || of END, 'key ' || k, at, at
FROM users u, LATERAL generate_series(1, credit_sequence) k,
  LATERAL (SELECT mod(k - 1, 10) + 1, u.id || ' ' || k,
    '{latest}'::timestamptz - (credit_sequence - k) * interval '1 minute') a (step, of, at),
  LATERAL (SELECT md5('row ' || of)::uuid, (ARRAY['purchase', 'consumption', 'refund'])[CASE step WHEN 1 THEN 1
    WHEN 8 THEN 3 ELSE 2 END], CASE step WHEN 1 THEN 10 ELSE -1 END) b (id, type, amount);
INSERT INTO workshops (id, user_id, title, credit_consumed_at)
SELECT workshop_id, user_id, 'A workshop', completed_at FROM credit_transactions WHERE workshop_id IS NOT NULL;
"""


@dataclass(frozen=True)
class History:
    """A world of so many rows of the first user, and as many of all others together."""

    world: World
    rows: int

    @property
    def ledger(self) -> Ledger:
        return self.world.ledger


@pytest.fixture(scope="module")
def histories(server: Server, _templates: Callable[[str], str]) -> Iterator[dict[int, History]]:
    made = {}
    for rows in (SHORT, LONG):
        url = server.create_database(f"growth_{uuid.uuid4().hex}", template=_templates("uuid"))
        world = World(url, SHAPES["uuid"].host)
        with world.engine.begin() as conn:
            conn.exec_driver_sql(FILL.format(rows=rows, others=OTHERS, latest=LATEST))
        with world.autocommit.connect() as conn:
            conn.exec_driver_sql("VACUUM ANALYZE")
        # prepared at once, so that a generic plan can be asked for
        world.engine = sa.create_engine(url, poolclass=sa.NullPool, connect_args={"prepare_threshold": 0})
        made[rows] = History(world, rows)
    yield made
    for history in made.values():
        server.drop_database(str(sa.make_url(history.world.url).database))


# --- operations ---

Call = Callable[[sa.Connection], Any]


def operations(history: History, conn: sa.Connection) -> dict[str, Call]:
    """Each operation of the ledger on the user with the long history, done and refused, to be called once."""
    ledger, world, key = history.ledger, history.world, uuid.uuid4().hex
    half = history.rows // 2
    row = world.schema.credit_transactions.c
    bought = conn.scalars(sa.select(row.id).where(row.user_id == FIRST, row.sequence == 1)).one()
    unlocked = conn.scalar(sa.text("SELECT id FROM workshops WHERE user_id = :user LIMIT 1"), {"user": FIRST})
    fresh = [uuid.uuid4() for _ in range(2)]
    for each in fresh:
        conn.execute(sa.insert(world.schema.workshops).values(key=each, owner=FIRST, title="New"))
    waiting = [ledger.start_purchase(conn, FIRST, credits=1, description="x").id for _ in range(5)]
    by_hand, _, lost, _, unattached = waiting
    for n, purchase in enumerate(waiting[:4]):
        ledger.attach_session(conn, FIRST, purchase, stripe_session_id=f"{key} {n}")
    many = [
        Consume(FIRST, key=f"{key} many"),
        Consume(FIRST, workshop=fresh[1], key=f"{key} many 2"),
        Consume(FIRST, amount=2**30, key=f"{key} many 3"),
        Consume(FIRST, key="key 2"),
    ]
    return {
        "start_purchase": lambda c: ledger.start_purchase(c, FIRST, credits=1, description="x", key=f"{key} s"),
        "attach_session": lambda c: ledger.attach_session(c, FIRST, unattached, stripe_session_id=f"{key} a"),
        "attach_session, again": lambda c: ledger.attach_session(c, FIRST, waiting[3], stripe_session_id=f"{key} 3"),
        "complete_purchase by id": lambda c: ledger.complete_purchase(c, FIRST, id=by_hand),
        "complete_purchase by session": lambda c: ledger.complete_purchase(c, FIRST, stripe_session_id=f"{key} 1"),
        "complete_purchase, again": lambda c: ledger.complete_purchase(c, FIRST, id=bought),
        "fail_purchase by id": lambda c: ledger.fail_purchase(c, FIRST, id=lost, reason="expired"),
        "fail_purchase by session": lambda c: ledger.fail_purchase(
            c, FIRST, stripe_session_id=f"{key} 3", reason="expired"
        ),
        "consume": lambda c: ledger.consume(c, FIRST, key=f"{key} c"),
        "consume, again": lambda c: ledger.consume(c, FIRST, key="key 2"),
        "consume, refused": lambda c: ledger.consume(c, FIRST, amount=2**30, key=f"{key} r"),
        "consume for a workshop": lambda c: ledger.consume(c, FIRST, workshop=fresh[0], key=f"{key} w"),
        "consume for an unlocked workshop": lambda c: ledger.consume(c, FIRST, workshop=unlocked, key=f"{key} u"),
        "consume_many": lambda c: ledger.consume_many(c, many),
        "refund": lambda c: ledger.refund(c, FIRST, bought, credits=1, key=f"{key} b"),
        "refund, refused": lambda c: ledger.refund(c, FIRST, bought, credits=99, key=f"{key} t"),
        "reinstate": lambda c: ledger.reinstate(c, FIRST, bought, credits=1, key=f"{key} i"),
        "grant": lambda c: ledger.grant(c, FIRST, credits=1, key=f"{key} g", description="x"),
        "balance": lambda c: ledger.balance(c, FIRST),
        "balance_at, now": lambda c: ledger.balance_at(c, FIRST, dt.datetime.now(dt.UTC)),
        "balance_at, long ago": lambda c: ledger.balance_at(c, FIRST, LATEST - dt.timedelta(minutes=half)),
        "history, first page": lambda c: ledger.history(c, FIRST, limit=20),
        "history, far back": lambda c: ledger.history(c, FIRST, limit=20, before=str(half)),
        "history, last page": lambda c: ledger.history(c, FIRST, limit=20, before="21"),
        "access": lambda c: ledger.access(c, unlocked),
    }


# --- what they read ---


@dataclass(frozen=True)
class Read:
    """What the statements of one operation touched; ``descents`` are the ways down an index, each as long as it is
    high."""

    rows: int
    pages: int
    descents: int
    statements: int


def measured(history: History, name: str, mode: str, spoil: str | None = None) -> Read:
    """The second time on a connection, when its caches are warm; ``spoil`` is run before. Nothing stays."""
    plans: list[dict[str, Any]] = []

    def listen(notice: Any) -> None:
        if "plan:" in notice.message_primary and FLUSH not in notice.message_primary:
            plans.append(json.loads(notice.message_primary.split("plan:", 1)[1]))

    settings = {
        "plan_cache_mode": mode,
        "auto_explain.log_min_duration": "0",
        "auto_explain.log_analyze": "on",
        "auto_explain.log_buffers": "on",
        "auto_explain.log_format": "json",
        "client_min_messages": "log",
        # what a small table is read for in one go is no measure of what is read for one answer
        "enable_seqscan": "on" if history.rows == LONG else "off",
    }
    with history.world.autocommit.connect() as conn:
        conn.exec_driver_sql("VACUUM (INDEX_CLEANUP ON) users, workshops, credit_transactions")  # what was rolled back
    with history.world.engine.connect() as conn:
        if spoil:
            conn.exec_driver_sql(spoil)
        first, second = (operations(history, conn)[name] for _ in range(2))
        conn.exec_driver_sql("LOAD 'auto_explain'")
        for setting, value in settings.items():
            conn.exec_driver_sql(f"SET {setting} = '{value}'")
        outcome(first, conn)
        conn.exec_driver_sql(FLUSH)
        conn.connection.dbapi_connection.add_notice_handler(listen)
        outcome(second, conn)
        conn.exec_driver_sql(FLUSH)
        conn.rollback()
    assert plans, "the server explained nothing"
    steps = [step for plan in plans for step in nodes(plan["Plan"])]
    return Read(
        rows=sum(read(step) for step in steps),
        pages=sum(plan["Plan"]["Shared Hit Blocks"] + plan["Plan"]["Shared Read Blocks"] for plan in plans),
        descents=sum(step["Actual Loops"] for step in steps if "Index" in step["Node Type"])
        + sum(ENTRIES for step in steps if step["Node Type"] == "ModifyTable"),
        statements=len(plans),
    )


ENTRIES = 8  # a written row goes into at most so many indexes
FLUSH = "SELECT 'flush'"  # a statement ends, and is explained, when the next one begins


def outcome(call: Call, conn: sa.Connection) -> CreditTransaction | TallystickError | None:
    try:
        return call(conn)
    except TallystickError as refused:
        return refused


def nodes(plan: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    yield plan
    for child in plan.get("Plans", ()):
        yield from nodes(child)


def read(step: Mapping[str, Any]) -> int:
    """Rows that a scan took from its table or index, with those that it threw away."""
    if "Relation Name" not in step or "Scan" not in step["Node Type"]:
        return 0
    thrown = sum(count for what, count in step.items() if what.startswith("Rows Removed by"))
    return round((step["Actual Rows"] + thrown) * step["Actual Loops"])


def grows(short: Read, long: Read) -> bool:
    """Whether more was read; every way down a higher index may cost a page or two more."""
    return long.rows > short.rows + 4 or long.pages > short.pages + 2 * long.descents


NAMES = [
    "start_purchase", "attach_session", "attach_session, again", "complete_purchase by id",
    "complete_purchase by session", "complete_purchase, again", "fail_purchase by id", "fail_purchase by session",
    "consume", "consume, again", "consume, refused", "consume for a workshop", "consume for an unlocked workshop",
    "consume_many", "refund", "refund, refused", "reinstate", "grant", "balance", "balance_at, now",
    "balance_at, long ago", "history, first page", "history, far back", "history, last page", "access",
]  # fmt: skip


@pytest.mark.parametrize("mode", ["force_custom_plan", "force_generic_plan"])
@pytest.mark.parametrize("name", NAMES)
def test_an_operation_reads_as_much_after_a_hundred_times_as_many_rows(
    histories: dict[int, History], name: str, mode: str
) -> None:
    short, long = (measured(histories[rows], name, mode) for rows in (SHORT, LONG))
    assert not grows(short, long), f"{SHORT:,} rows: {short}\n{LONG:,} rows: {long}"


def test_every_statement_of_the_ledger_is_among_them(histories: dict[int, History]) -> None:
    history, seen = histories[SHORT], set()
    names = {id(statement): name for name, statement in history.ledger.statements.items()}

    def listen(_conn: Any, statement: Any, *_rest: Any) -> None:
        seen.add(names.get(id(statement)))

    sa.event.listen(history.world.engine, "before_execute", listen)
    try:
        with history.world.engine.connect() as conn:
            calls = operations(history, conn)
            for call in calls.values():
                outcome(call, conn)
            conn.rollback()
    finally:
        sa.event.remove(history.world.engine, "before_execute", listen)
    assert list(calls) == NAMES
    assert seen - {None} == set(names.values())


@pytest.mark.parametrize(
    ("name", "index"),
    [
        ("history, first page", "sequence"),
        ("balance_at, long ago", "completed"),
        ("consume, refused", "idempotency_key"),
        ("refund", "refund_of"),
    ],
)
def test_growth_would_be_noticed(histories: dict[int, History], name: str, index: str) -> None:
    drop = f"DROP INDEX credit_transactions_{index}"
    short, long = (measured(histories[rows], name, "force_custom_plan", spoil=drop) for rows in (SHORT, LONG))
    assert grows(short, long), f"{SHORT:,} rows: {short}\n{LONG:,} rows: {long}"
