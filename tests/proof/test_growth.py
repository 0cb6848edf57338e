"""No statement of the ledger reads more as history grows: what each really read, on a short and on a long history.

The server says so itself: auto_explain sends the plan of every statement that runs, with the rows and pages that each
step of it touched. So it is the real operations that are measured, with all that they send.
"""

from __future__ import annotations

import datetime as dt
import json
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import sqlalchemy as sa

from parallel import declared_functions, functions_called
from tallystick import Consume, CreditTransaction, Ledger
from tallystick.database import driver
from tallystick.dev.postgres import Server
from tallystick.errors import TallystickError
from worlds import SHAPES, World

SHORT, LONG = 300, 30_000
MADE = ("short", "long", "suddenly long", "abandoned")
LATEST = dt.datetime(2026, 1, 1, tzinfo=dt.UTC)
FIRST = uuid.UUID(int=1)

# Of each ten rows: a purchase of 10, six consumptions of which three unlock a workshop, a refund of that purchase,
# two more consumptions. So ten rows leave a credit. One minute lies between two rows of a user.
FILL = """
SET LOCAL session_replication_role = replica;
INSERT INTO users (id, email, credit_balance, credit_sequence)
SELECT ('00000000-0000-0000-0000-' || lpad(to_hex(n), 12, '0'))::uuid, n || '@example.com',
  (rows - 1) / 10 + (ARRAY[10, 9, 8, 7, 6, 5, 4, 3, 2, 1])[mod(rows - 1, 10) + 1], rows
FROM generate_series({users}) n, LATERAL (SELECT {rows}) r (rows)
ON CONFLICT (id) DO UPDATE SET credit_balance = excluded.credit_balance, credit_sequence = excluded.credit_sequence;
INSERT INTO credit_transactions (id, user_id, type, status, amount, balance_after, sequence, description, workshop_id,
  refund_of, stripe_session_id, stripe_payment_intent_id, idempotency_key, created_at, completed_at)
SELECT b.id, u.id, type::credit_transaction_type, 'completed',
  amount, (k - 1) / 10 + (ARRAY[10, 9, 8, 7, 6, 5, 4, 3, 2, 1])[step], k, 'x',
  CASE WHEN step IN (2, 3, 4) THEN md5('workshop ' || of)::uuid END,
  CASE WHEN step = 8 THEN md5('row ' || u.id || ' ' || k - 7)::uuid END,
  CASE WHEN step = 1 THEN 'cs ' || of END, CASE WHEN step = 1 THEN 'pi ' || of END, 'key ' || k, at, at
FROM users u, LATERAL generate_series({since}, credit_sequence) k,
  LATERAL (SELECT mod(k - 1, 10) + 1, u.id || ' ' || k,
    '{latest}'::timestamptz - (credit_sequence - k) * interval '1 minute') a (step, of, at),
  LATERAL (SELECT md5('row ' || of)::uuid, (ARRAY['purchase', 'consumption', 'refund'])[CASE step WHEN 1 THEN 1
    WHEN 8 THEN 3 ELSE 2 END], CASE step WHEN 1 THEN 10 ELSE -1 END) b (id, type, amount);
INSERT INTO workshops (id, user_id, title, credit_consumed_at)
SELECT workshop_id, user_id, 'A workshop', completed_at FROM credit_transactions WHERE workshop_id IS NOT NULL
ON CONFLICT DO NOTHING;
"""

# Purchases of the first user that came to nothing, older and newer than any that is made.
ABANDON = """
INSERT INTO credit_transactions (id, user_id, type, status, amount, description, created_at)
SELECT md5('abandoned ' || n)::uuid, '{first}', 'purchase', 'failed', 10, 'x', '{latest}'
FROM generate_series(1, {rows}) n;
"""


@dataclass(frozen=True)
class History:
    """A world with so many completed rows of the first user; ``large`` if so large that no table is read whole."""

    world: World
    rows: int
    large: bool

    @property
    def ledger(self) -> Ledger:
        return self.world.ledger


@pytest.fixture(scope="module")
def histories(server: Server, _templates: Callable[[str], str]) -> Iterator[dict[str, History]]:
    """Short and long; long, while statistics know of one row for each user; short, beside failed purchases."""
    made = {}
    for name in MADE:
        url = server.create_database(f"growth_{uuid.uuid4().hex}", template=_templates("uuid"))
        world = World(url, SHAPES["uuid"].host)
        rows = LONG if "long" in name else SHORT
        others = 1 if name == "suddenly long" else 10  # rows of each other user
        count = 1 + rows // others // (10 if others == 1 else 1)
        with world.engine.begin() as conn:
            if name == "suddenly long":
                for each in ("users", "workshops", "credit_transactions"):
                    conn.exec_driver_sql(f"ALTER TABLE {each} SET (autovacuum_enabled = off)")
                conn.exec_driver_sql(fill(users=(1, count), rows="1"))
                conn.exec_driver_sql("ANALYZE users, workshops, credit_transactions")
                conn.exec_driver_sql(fill(users=(1, 1), rows=str(rows), since=2))
            else:
                conn.exec_driver_sql(fill(users=(1, count), rows=f"CASE n WHEN 1 THEN {rows} ELSE {others} END"))
            failed = LONG if name == "abandoned" else 100
            conn.exec_driver_sql(ABANDON.format(rows=failed, first=FIRST, latest=LATEST))
        with world.autocommit.connect() as conn:
            conn.exec_driver_sql("VACUUM" if name == "suddenly long" else "VACUUM ANALYZE")
        # prepared at once, so that a generic plan can be asked for; one connection for all that is measured
        world.engine = sa.create_engine(url, pool_size=1, max_overflow=0, connect_args={"prepare_threshold": 0})
        world.autocommit = world.engine.execution_options(isolation_level="AUTOCOMMIT")
        made[name] = History(world, rows, large=rows == LONG)
    yield made
    for history in made.values():
        history.world.engine.dispose()
        server.drop_database(str(sa.make_url(history.world.url).database))


def fill(*, users: tuple[int, int], rows: str, since: int = 1) -> str:
    return FILL.format(users=f"{users[0]}, {users[1]}", rows=rows, since=since, latest=LATEST)


# --- operations ---

Call = Callable[[sa.Connection], Any]


def operations(history: History, conn: sa.Connection) -> dict[str, Call]:
    """Each operation of the ledger on the user with the long history, done and refused, to be called once."""
    ledger, world, key = history.ledger, history.world, uuid.uuid4().hex
    half = history.rows // 2
    row = world.schema.credit_transactions.c
    bought = conn.scalars(sa.select(row.id).where(row.user_id == FIRST, row.sequence == 1)).one()
    spent = conn.scalars(sa.select(row.id).where(row.user_id == FIRST, row.sequence == 2)).one()
    unlocked = conn.scalar(sa.text("SELECT id FROM workshops WHERE user_id = :user LIMIT 1"), {"user": FIRST})
    fresh = [uuid.uuid4() for _ in range(2)]
    for each in fresh:
        conn.execute(sa.insert(world.schema.workshops).values(key=each, owner=FIRST, title="New"))
    waiting = [ledger.start_purchase(conn, FIRST, credits=1, description="x").id for _ in range(5)]
    by_hand, _, lost, _, unattached = waiting
    for n, purchase in enumerate(waiting[:4]):
        ledger.attach_session(conn, FIRST, purchase, stripe_session_id=f"{key} {n}")
    others = [uuid.uuid4() for _ in range(2)]
    for other in others:
        conn.execute(sa.insert(world.schema.users).values(key=other, email=f"{other}@example.com"))
        ledger.grant(conn, other, credits=3, key="given", description="x")
    many = [
        Consume(FIRST, key=f"{key} many"),
        Consume(FIRST, workshop=fresh[1], key=f"{key} many 2"),
        Consume(FIRST, credits=2**30, key=f"{key} many 3"),
        Consume(FIRST, key="key 2"),
    ]
    return {
        "start_purchase": lambda c: ledger.start_purchase(c, FIRST, credits=1, description="x", key=f"{key} s"),
        "attach_session": lambda c: ledger.attach_session(c, FIRST, unattached, stripe_session_id=f"{key} a"),
        "attach_session, again": lambda c: ledger.attach_session(c, FIRST, waiting[3], stripe_session_id=f"{key} 3"),
        "complete_purchase by id": lambda c: ledger.complete_purchase(c, FIRST, purchase=by_hand),
        "complete_purchase by session": lambda c: ledger.complete_purchase(c, FIRST, stripe_session_id=f"{key} 1"),
        "complete_purchase, again": lambda c: ledger.complete_purchase(c, FIRST, purchase=bought),
        "fail_purchase by id": lambda c: ledger.fail_purchase(c, FIRST, purchase=lost, reason="expired"),
        "fail_purchase by session": lambda c: ledger.fail_purchase(
            c, FIRST, stripe_session_id=f"{key} 3", reason="expired"
        ),
        "consume": lambda c: ledger.consume(c, FIRST, key=f"{key} c"),
        "consume, again": lambda c: ledger.consume(c, FIRST, key="key 2"),
        "consume, refused": lambda c: ledger.consume(c, FIRST, credits=2**30, key=f"{key} r"),
        "consume for a workshop": lambda c: ledger.consume(c, FIRST, workshop=fresh[0], key=f"{key} w"),
        "consume for an unlocked workshop": lambda c: ledger.consume(c, FIRST, workshop=unlocked, key=f"{key} u"),
        "consume_many": lambda c: ledger.consume_many(c, many),
        "refund": lambda c: ledger.refund(c, FIRST, bought, credits=1, key=f"{key} b"),
        "refund, refused": lambda c: ledger.refund(c, FIRST, bought, credits=99, key=f"{key} t"),
        "reinstate": lambda c: ledger.reinstate(c, FIRST, bought, credits=1, key=f"{key} i"),
        "grant": lambda c: ledger.grant(c, FIRST, credits=1, key=f"{key} g", description="x"),
        "hold": lambda c: ledger.hold(c, FIRST, credits=1, key=f"{key} h"),
        "hold and capture": lambda c: ledger.capture(
            c, FIRST, ledger.hold(c, FIRST, credits=1, key=f"{key} h").id, credits=1
        ),
        "hold and release": lambda c: ledger.release(c, FIRST, ledger.hold(c, FIRST, credits=1, key=f"{key} h").id),
        "reverse": lambda c: ledger.reverse(c, FIRST, spent, key=f"{key} v"),
        "grant and correct": lambda c: ledger.correct(
            c, FIRST, ledger.grant(c, FIRST, credits=1, key=f"{key} e", description="x").id, key=f"{key} k"
        ),
        "grant that expires": lambda c: ledger.grant(
            c,
            FIRST,
            credits=1,
            key=f"{key} l",
            description="x",
            expires_at=dt.datetime.now(dt.UTC) + dt.timedelta(days=1),
        ),
        "merge into it": lambda c: ledger.merge(c, others[0], into=FIRST, key=f"{key} m"),
        "merge of it": lambda c: ledger.merge(c, FIRST, into=others[1], key=f"{key} f"),
        "lots": lambda c: ledger.lots(c, FIRST),
        "sweep": ledger.sweep,
        "lock": lambda c: ledger.lock(c, FIRST),
        "balance": lambda c: ledger.balance(c, FIRST),
        "balance_at, now": lambda c: ledger.balance_at(c, FIRST, dt.datetime.now(dt.UTC)),
        "balance_at, long ago": lambda c: ledger.balance_at(c, FIRST, LATEST - dt.timedelta(minutes=half)),
        "history, first page": lambda c: ledger.history(c, FIRST, limit=20),
        "history, far back": lambda c: ledger.history(c, FIRST, limit=20, before=str(half)),
        "history, last page": lambda c: ledger.history(c, FIRST, limit=20, before="21"),
        "history with failed, first page": lambda c: ledger.history(c, FIRST, limit=20, include_failed=True),
        "history with failed, further": lambda c: ledger.history(
            c, FIRST, limit=20, include_failed=True, before=str(uuid.UUID(int=2**127))
        ),
        "access": lambda c: ledger.access(c, unlocked),
    }


# --- what they read ---


@dataclass(frozen=True)
class Read:
    """The reads of one operation's statements; ``descents`` are the ways down an index, each as long as it is
    high."""

    rows: int
    pages: int
    descents: int
    statements: int


def measured(history: History, name: str, mode: str, spoil: Sequence[str] = ()) -> Read:
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
        "auto_explain.log_nested_statements": "on",  # a call is one statement, and its function's are inside it
        "auto_explain.log_format": "json",
        "client_min_messages": "log",
        # what a small table is read for in one go is no measure of what is read for one answer
        "enable_seqscan": "on" if history.large else "off",
    }
    with history.world.autocommit.connect() as conn:
        conn.exec_driver_sql("VACUUM (INDEX_CLEANUP ON) users, workshops, credit_transactions")  # what was rolled back
    with history.world.engine.connect() as conn:
        conn.exec_driver_sql("DISCARD PLANS")  # those of the measurement before
        for each in spoil:
            conn.exec_driver_sql(each)
        first, second = (operations(history, conn)[name] for _ in range(2))
        conn.exec_driver_sql("LOAD 'auto_explain'")
        for setting, value in settings.items():
            conn.exec_driver_sql(f"SET {setting} = '{value}'")
        outcome(first, conn)
        conn.exec_driver_sql(FLUSH)
        driver(conn).add_notice_handler(listen)
        outcome(second, conn)
        conn.exec_driver_sql(FLUSH)
        driver(conn).remove_notice_handler(listen)
        conn.rollback()
    # A call counts the pages of the statements inside it once more.
    plans = [plan for plan in plans if plan["Plan"]["Node Type"] not in ("Function Scan", "Result")]
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
    """True if more was read; a way down a higher index may cost a page or two more, and each row lie on its own."""
    return long.rows > short.rows + 4 or long.pages > short.pages + 2 * long.descents + long.rows


NAMES = [
    "start_purchase", "attach_session", "attach_session, again", "complete_purchase by id",
    "complete_purchase by session", "complete_purchase, again", "fail_purchase by id", "fail_purchase by session",
    "consume", "consume, again", "consume, refused", "consume for a workshop", "consume for an unlocked workshop",
    "consume_many", "refund", "refund, refused", "reinstate", "grant", "hold", "hold and capture", "hold and release",
    "reverse", "grant and correct", "grant that expires", "merge into it",
    "merge of it", "lots", "sweep", "lock", "balance",
    "balance_at, now", "balance_at, long ago", "history, first page", "history, far back", "history, last page",
    "history with failed, first page", "history with failed, further", "access",
]  # fmt: skip


@pytest.mark.parametrize("mode", ["force_custom_plan", "force_generic_plan"])
@pytest.mark.parametrize("name", NAMES)
def test_an_operation_reads_as_much_after_a_hundred_times_as_many_rows(
    histories: dict[str, History], name: str, mode: str
) -> None:
    reads = {made: measured(history, name, mode) for made, history in histories.items()}
    assert not [made for made in MADE if grows(reads["short"], reads[made])], "\n".join(map(str, reads.items()))


def test_every_function_of_the_ledger_is_among_them(histories: dict[str, History]) -> None:
    engine = sa.create_engine(histories["short"].world.url, poolclass=sa.NullPool)
    seen = functions_called(engine)
    with engine.connect() as conn:
        calls = operations(histories["short"], conn)
        for call in calls.values():
            outcome(call, conn)
        conn.rollback()
    assert list(calls) == NAMES
    assert seen == declared_functions()


def replace_index(index: str, *instead: str) -> list[str]:
    """Statements that replace one of the ledger's indexes by another, if any."""
    made = [f"CREATE INDEX ON credit_transactions {definition}" for definition in instead]
    return [f"DROP INDEX credit_transactions_{index}", *made]


@pytest.mark.parametrize(
    ("name", "made", "spoil"),
    [
        ("history, first page", "long", replace_index("sequence")),
        ("balance_at, long ago", "long", [*replace_index("completed"), *replace_index("completed_at")]),
        ("consume, refused", "long", replace_index("idempotency_key")),
        ("refund", "long", replace_index("refund_of")),
        ("history, first page", "abandoned", replace_index("unfinished", "(user_id, id) WHERE sequence IS NULL")),
    ],
)
def test_growth_would_be_noticed(histories: dict[str, History], name: str, made: str, spoil: Sequence[str]) -> None:
    short, long = (measured(histories[each], name, "force_custom_plan", spoil=spoil) for each in ("short", made))
    assert grows(short, long), f"short: {short}\n{made}: {long}"


def test_a_function_that_was_called_before_plans_nothing(world: World) -> None:
    """Also where many rows share a key, as 'welcome': the plan of one call then looks cheaper than one for all."""
    with world.engine.begin() as conn:
        conn.exec_driver_sql("ALTER TABLE credit_transactions SET (autovacuum_enabled = off)")
        conn.exec_driver_sql(fill(users=(1, 1_000), rows="10"))
        conn.exec_driver_sql("ANALYZE users, workshops, credit_transactions")
        conn.exec_driver_sql(fill(users=(1, 1_000), rows="100", since=11))
    planned: dict[str, list[str]] = {}
    history = History(world, 100, large=False)
    for name in ("consume", "consume, again", "consume, refused", "grant", "hold", "refund, refused", "start_purchase"):
        with world.engine.connect() as conn:
            calls = [operations(history, conn)[name] for _ in range(12)]
            for call in calls[:-1]:
                outcome(call, conn)
            conn.exec_driver_sql("SET client_min_messages = log")
            conn.exec_driver_sql("SET debug_print_plan = on")
            contexts = planned[name] = []
            driver(conn).add_notice_handler(lambda notice, found=contexts: found.append(str(notice.context)))
            outcome(calls[-1], conn)
            conn.rollback()
    # the call itself is planned here: the connection prepares no statement
    inside = {name: [context for context in contexts if context != "None"] for name, contexts in planned.items()}
    assert not {name: contexts for name, contexts in inside.items() if contexts}
