"""One table of operations, with the same answers through every connection that they take."""

from __future__ import annotations

import asyncio
import datetime as dt
import gc
import sqlite3
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import MappingProxyType
from typing import Any
from uuid import UUID, uuid4

import psycopg
import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_scoped_session, create_async_engine
from sqlalchemy.orm import Session
from sqlalchemy.util.concurrency import greenlet_spawn

from caller_connections import CALLER_CONNECTIONS, ENCODED, CallerConnection
from tallystick import AccessReason, Combiner, Consume, CreditTransaction, Ledger, errors, events, migrate, verify
from tallystick.accounts import Account
from tallystick.allowances import Allowances
from tallystick.audit import audit
from tallystick.database import standby, translated
from tallystick.dev.postgres import Server
from tallystick.dev.seed import seed
from tallystick.ledger.connections import autocommitting
from tallystick.ledger.operations import Access
from tallystick.schema import INT64_MAX, CreditTransactionType
from tallystick.web import router
from tallystick.web.console.routes import console
from worlds import SHAPES, World

pytestmark = pytest.mark.one_server  # it is about the drivers; the tests of the operations run on both

ODD = 'ß "quoted" \\ back {1,NULL} %s %% $1 :name \' \t é'
METADATA = {
    "seats": [1, None, 2.5],
    "who": "é \"\\ '",
    "deep": {"": True},
    "path": "C:\\u0000dir",  # a backslash and letters, no NUL
    "frozen": MappingProxyType({"a": MappingProxyType({"b": 1})}),
}
KOLKATA = dt.timezone(dt.timedelta(hours=5, minutes=30))
LONG = dt.timedelta(days=200, seconds=1, microseconds=1)  # over a change of the clocks, wherever there is one


class CallContext:
    """The subjects of the table's lines: users, a workshop, and the results of the lines before."""

    def __init__(self, world: World, caller: CallerConnection) -> None:
        self.ledger, self.accounts, self.caller = world.ledger, world.accounts, caller
        self.user, self.debtor, self.nobody = world.user(), world.user(credits=7), uuid4()
        self.workshop, self.second = (world.workshop(self.user, title=title) for title in ("Café Ü", ODD))
        self.results: dict[str, Any] = {}

    @property
    def purchase(self) -> UUID:
        found: UUID = self.results["start"].id
        return found


# A line: its name, the operation with its arguments, and what it tells: attributes of a result or an error, or a value.
TABLE: list[tuple[str, Callable[[CallContext], Any], Any]] = [
    (
        "start",
        lambda a: a.caller.do(
            a.ledger.start_purchase, a.user, credits=5, description=ODD, key="p", stripe_price_id="price_1",
            metadata=METADATA,
        ),
        {
            "type": "purchase", "status": "pending", "amount": 5, "balance_after": None, "sequence": None,
            "description": ODD, "stripe_price_id": "price_1", "idempotency_key": "p", "metadata": METADATA,
            "completed_at": None, "replayed": False, "balance": 0, "refund_of": None, "workshop_id": None,
        },
    ),
    (
        "start again",
        lambda a: a.caller.do(a.ledger.start_purchase, a.user, credits=5, description="x", key="p"),
        {"replayed": True, "description": ODD, "metadata": METADATA},
    ),
    (
        "attach",
        lambda a: a.caller.do(a.ledger.attach_session, a.user, a.purchase, stripe_session_id=f"cs_{a.user}"),
        {"status": "pending", "replayed": False},
    ),
    (
        "fail",
        lambda a: a.caller.do(a.ledger.fail_purchase, a.user, purchase=a.purchase, reason="too late"),
        {"status": "failed", "description": f"{ODD} (failed: too late)"},
    ),
    (
        "complete",
        lambda a: a.caller.do(
            a.ledger.complete_purchase, a.user, stripe_session_id=f"cs_{a.user}", amount_paid=INT64_MAX, currency="EUR"
        ),
        {"status": "completed", "amount_paid": INT64_MAX, "currency": "eur", "balance": 5, "sequence": 1},
    ),
    (
        "fail what is paid",
        lambda a: a.caller.do(a.ledger.fail_purchase, a.user, purchase=str(a.purchase), reason="x"),
        (errors.PurchaseNotPending, lambda a: {"purchase": a.purchase, "status": "completed"}),
    ),
    (
        "unlock",
        lambda a: a.caller.do(
            a.ledger.consume, a.user, workshop=a.workshop, key="k", metadata=MappingProxyType(METADATA)
        ),
        {
            "type": "consumption", "amount": -1, "balance_after": 4, "sequence": 2, "metadata": METADATA,
            "description": "Credit consumed for Workshop: Café Ü", "replayed": False, "balance": 4,
        },
    ),
    (
        "unlock again",
        lambda a: a.caller.do(a.ledger.consume, a.user, workshop=a.workshop, key="other"),
        {"idempotency_key": "k", "replayed": True, "sequence": 2, "balance": 4},
    ),
    (
        "too dear",
        lambda a: a.caller.do(a.ledger.consume, a.user, credits=99, key="dear"),
        (errors.InsufficientCredits, lambda a: {"user": a.user, "balance": 4, "required": 99}),
    ),
    (
        "reused",
        lambda a: a.caller.do(a.ledger.consume, a.user, credits=2, key="k"),
        (errors.IdempotencyKeyReused, lambda a: {"differs": {
            "amount": (-1, -2), "workshop_id": (str(a.workshop), None),
        }}),
    ),
    (
        "many",
        lambda a: a.caller.do(a.ledger.consume_many, [
            Consume(a.user, key=ODD, description=ODD, metadata=METADATA), Consume(a.user, key="m", credits=50),
            Consume(a.debtor, key="m"), Consume(a.user, key=ODD), Consume("nobody", key="m"),
            Consume(a.user, workshop=a.second, key="s"), Consume(a.nobody, key="m"),
        ]),
        ["completed", "InsufficientCredits", "completed", "replayed", "InvalidArgument", "completed", "UnknownUser"],
    ),
    (
        "refund",
        lambda a: a.caller.do(a.ledger.refund, a.user, a.purchase, key="r", description=ODD),
        lambda a: {"type": "refund", "amount": -5, "balance_after": -3, "refund_of": a.purchase, "description": ODD},
    ),
    (
        "refund too much",
        lambda a: a.caller.do(a.ledger.refund, a.user, a.purchase, credits=1, key="r2"),
        (errors.RefundExceedsPurchase, lambda a: {"left": 0, "asked": 1}),
    ),
    (
        "reinstate",
        lambda a: a.caller.do(a.ledger.reinstate, a.user, a.purchase, credits=4, key="i"),
        lambda a: {"type": "grant", "amount": 4, "balance_after": 1, "refund_of": a.purchase},
    ),
    (
        "grant",
        lambda a: a.caller.do(a.ledger.grant, a.user, credits=10, key="g", description="A gift", metadata={}),
        {"type": "grant", "amount": 10, "balance_after": 11, "metadata": {}, "description": "A gift"},
    ),
    (
        "unknown purchase",
        lambda a: a.caller.do(a.ledger.refund, a.user, a.nobody, key="u"),
        (errors.UnknownPurchase, lambda a: {"purchase": a.nobody}),
    ),
    ("balance", lambda a: a.caller.do(a.ledger.balance, a.user), 11),
    ("lock", lambda a: a.caller.do(a.ledger.lock, a.user), 11),
    ("balance of nobody", lambda a: a.caller.do(a.ledger.balance, a.nobody), (errors.UnknownUser, lambda a: {})),
    (
        "balance then",
        lambda a: a.caller.do(a.ledger.balance_at, a.user, a.results["unlock"].completed_at.astimezone(KOLKATA)),
        4,
    ),
    ("balance before", lambda a: a.caller.do(a.ledger.balance_at, a.user, dt.datetime(1999, 2, 1, tzinfo=KOLKATA)), 0),
    (
        "history",
        lambda a: [row.sequence for row in a.caller.do(a.ledger.history, a.user, include_failed=True)],
        [7, 6, 5, 4, 3, 2, 1],
    ),
    (
        "history, a page",
        lambda a: [row.sequence for row in a.caller.do(a.ledger.history, a.user, limit=2, before="4")],
        [3, 2],
    ),
    ("no history", lambda a: a.caller.do(a.ledger.history, a.nobody), []),
    ("access", lambda a: a.caller.do(a.ledger.access, a.workshop), Access(open=True, reason=AccessReason.UNLOCKED)),
    (
        "account",
        lambda a: a.caller.do(a.accounts.get, a.user),
        lambda a: {"user": a.user, "credit_balance": 11, "plan_tier": "free", "deleted_at": None},
    ),
    ("onboarded", lambda a: a.caller.do(a.accounts.complete_onboarding, a.user), {"onboarding_complete": True}),
    ("not onboarded", lambda a: a.caller.do(a.accounts.reset_onboarding, a.user), {"onboarding_complete": False}),
    ("tier", lambda a: a.caller.do(a.accounts.set_plan_tier, a.user, "prø"), {"plan_tier": "prø"}),
    (
        "customer",
        lambda a: a.caller.do(a.accounts.set_stripe_customer, a.user, f"cus_{a.user}"),
        lambda a: {"stripe_customer_id": f"cus_{a.user}"},
    ),
    (
        "customer of somebody else",
        lambda a: a.caller.do(a.accounts.set_stripe_customer, a.debtor, f"cus_{a.user}"),
        (errors.StripeCustomerConflict, lambda a: {"user": a.debtor}),
    ),
    ("deleted workshop", lambda a: a.caller.do(a.accounts.delete_workshop, a.workshop), None),
    ("no access", lambda a: a.caller.do(a.ledger.access, a.workshop), Access(open=False, reason=AccessReason.DELETED)),
    ("workshop again", lambda a: a.caller.do(a.accounts.restore_workshop, a.workshop), None),
    ("deleted", lambda a: a.caller.do(a.accounts.delete_user, a.user).deleted_at.tzinfo, dt.UTC),
    (
        "spend of a deleted user",
        lambda a: a.caller.do(a.ledger.consume, a.user, key="d"),
        (errors.UserDeleted, lambda a: {"user": a.user}),
    ),
    ("restored", lambda a: a.caller.do(a.accounts.restore_user, a.user), {"deleted_at": None}),
    (
        "hold for some time",
        lambda a: a.caller.do(a.ledger.hold, a.debtor, credits=2, key="h", expires_in=LONG, capture_limit=3),
        {"status": "pending", "amount": -2},
    ),
    (
        "capture",
        lambda a: a.caller.do(a.ledger.capture, a.debtor, a.results["hold for some time"].id, credits=3),
        {"status": "completed", "amount": -3, "balance": 3},
    ),
    (
        "start what expires",
        lambda a: a.caller.do(a.ledger.start_purchase, a.debtor, credits=4, description="x", expires_after=LONG),
        {"status": "pending"},
    ),
    (
        "complete what expires",
        lambda a: a.caller.do(a.ledger.complete_purchase, a.debtor, purchase=a.results["start what expires"].id),
        {"status": "completed", "balance": 7},
    ),
    (
        "lots",
        lambda a: [lot.remaining for lot in a.caller.do(a.ledger.lots, a.debtor)],
        [4],
    ),
]  # fmt: skip


def run_table(world: World, caller: CallerConnection) -> CallContext:
    context = CallContext(world, caller)
    for name, operation, expected in TABLE:
        if isinstance(expected, tuple):
            kind, fields = expected
            with pytest.raises(errors.TallystickError) as caught:
                operation(context)
            assert type(caught.value) is kind, name
            for field, value in fields(context).items():
                assert getattr(caught.value, field) == value, name
            continue
        results = context.results[name] = operation(context)
        if callable(expected):
            expected = expected(context)  # noqa: PLW2901
        if name == "many":
            results = [type(row).__name__ if isinstance(row, Exception) else row.status for row in results]
            replayed = [getattr(row, "replayed", False) for row in context.results[name]]
            results = ["replayed" if again else each for each, again in zip(results, replayed, strict=True)]
        if isinstance(expected, dict):
            assert {field: getattr(results, field) for field in expected} == expected, name
        else:
            assert results == expected, name
    types(context)
    return context


def types(context: CallContext) -> None:
    """Values are of the types that are promised, and not of those that a driver would have."""
    row = context.results["unlock"]
    for each in (row.id, row.user_id, row.workshop_id, context.results["refund"].refund_of):
        assert isinstance(each, UUID)  # asyncpg has one of its own, made from it
    assert row.type is CreditTransactionType.CONSUMPTION
    for moment in (row.created_at, row.completed_at, context.results["account"].updated_at):
        assert (type(moment), moment.tzinfo) == (dt.datetime, dt.UTC)
        assert abs(dt.datetime.now(dt.UTC) - moment) < dt.timedelta(minutes=10)
    for name in ("hold for some time", "complete what expires"):
        from_now = context.results[name].expires_at - dt.datetime.now(dt.UTC)
        assert abs(from_now - LONG) < dt.timedelta(minutes=10)
    assert type(context.results["balance"]) is int
    account = context.results["account"]
    assert type(account) is Account
    assert (type(account.credit_balance), type(account.onboarding_complete)) == (int, bool)


def compare(world: World, context: CallContext) -> None:
    """Another connection, of another driver, reads the rows of the results."""
    with world.engine.connect() as conn:
        rows = {row.id: row for row in world.ledger.history(conn, context.user)}
    many = [
        row for row in context.results["many"] if isinstance(row, CreditTransaction) and row.user_id == context.user
    ]
    results = [context.results[name] for name in ("complete", "unlock", "refund", "reinstate", "grant")] + many
    assert {row.id for row in results} == set(rows)
    for row in results:
        assert row == rows[row.id] if not row.replayed else row.sequence == rows[row.id].sequence


@pytest.fixture(scope="module")
def shared(server: Server, _templates: Callable[[str], str]) -> Iterator[World]:
    """One database for all connections: each has users of its own."""
    name = f"doors_{uuid4().hex}"
    world = World(server.create_database(name, template=_templates("uuid")), SHAPES["uuid"].host)
    yield world
    with world.engine.connect() as conn:
        assert audit(conn, world.config).findings == ()
    server.drop_database(name)


@pytest.fixture(params=CALLER_CONNECTIONS)
def caller(request: pytest.FixtureRequest, shared: World) -> Iterator[CallerConnection]:
    with CALLER_CONNECTIONS[request.param](shared.url) as opened:
        yield opened


def test_every_operation(shared: World, caller: CallerConnection) -> None:
    context = run_table(shared, caller)
    if caller.commit:
        caller.commit()
    compare(shared, context)


def test_events(shared: World, caller: CallerConnection) -> None:
    """As another connection reads them."""
    events.enable(shared.url, shared.config)
    with shared.engine.connect() as conn:
        cursor = events.status(conn).cursor
    user, threshold = shared.user(credits=5), 4
    assert caller.do(shared.accounts.set_low_balance, user, threshold).user == user
    if caller.commit:
        caller.commit()
    with shared.engine.begin() as conn:
        shared.ledger.consume(conn, user, credits=2, key="a", metadata=METADATA)
    with shared.engine.connect() as conn:
        expected = shared.ledger.events(conn, after=cursor)
    assert [event.kind for event in expected] == ["purchase.completed", "consumption.completed", "balance.low"]
    assert caller.do(shared.ledger.events, after=cursor, limit=9) == expected
    with pytest.raises(errors.InvalidArgument, match="after"):
        caller.do(shared.ledger.events, after="1-a")


def test_settings_of_a_connection_change_no_result(
    shared: World, caller: CallerConnection, request: pytest.FixtureRequest
) -> None:
    of = request.node.callspec.id
    settings(caller, encoding=of.startswith(ENCODED) and "psycopg2" not in of)
    context = run_table(shared, caller)
    if caller.commit:
        caller.commit()
    compare(shared, context)


def settings(caller: CallerConnection, *, encoding: bool) -> None:
    """Of the session, or of the transaction that is open from now on: a Session's next one is another connection's."""
    for setting in (
        "DateStyle = 'SQL, DMY'", "IntervalStyle = 'sql_standard'", "TimeZone = 'America/St_Johns'",
        "bytea_output = 'escape'", "extra_float_digits = -10", "search_path = nowhere",
        *(["client_encoding = 'LATIN1'"] if encoding else []),
    ):  # fmt: skip
        caller.sql(f"SET {setting}")


def test_a_connection_without_characters_is_refused_before_anything_is_written(world: World) -> None:
    user = world.user(credits=9)
    address = world.url.replace("+psycopg", "", 1)
    refused = r"client_encoding is SQL_ASCII.*Connect with client_encoding='utf8'"
    with (
        psycopg.connect(address, client_encoding="SQL_ASCII", autocommit=True) as conn,
        pytest.raises(errors.InvalidArgument, match=refused),
    ):
        world.ledger.consume(conn, user, key="a")

    async def consume() -> None:
        async with await psycopg.AsyncConnection.connect(address, client_encoding="SQL_ASCII", autocommit=True) as conn:
            await world.ledger.consume(conn, user, key="a")

    with pytest.raises(errors.InvalidArgument, match=refused):
        asyncio.run(consume())
    engine = sa.create_engine(world.url.replace("+psycopg", "+psycopg2", 1), client_encoding="SQL_ASCII")
    with engine.begin() as conn, pytest.raises(errors.InvalidArgument, match=refused):
        world.ledger.consume(conn, user, key="a")
    engine.dispose()
    with world.engine.connect() as one:
        assert world.ledger.balance(one, user) == 9


def test_what_is_written_is_the_connections_own_transaction(shared: World, caller: CallerConnection) -> None:
    transaction(shared, caller)


def transaction(world: World, caller: CallerConnection) -> None:
    user = world.user(credits=9)

    def seen() -> int:
        with world.engine.connect() as conn:
            return world.ledger.balance(conn, user)

    caller.do(world.ledger.consume, user, key="a")
    if caller.autocommit:
        assert seen() == 8
        return
    assert (caller.do(world.ledger.balance, user), seen()) == (8, 9)
    caller.sql(f"UPDATE public.users SET email = 'spent@example.com' WHERE id = '{user}' AND credit_balance = 8")
    with pytest.raises(errors.InsufficientCredits):  # a refusal leaves it as it is
        caller.do(world.ledger.consume, user, credits=99, key="b")
    caller.rollback()
    assert (caller.do(world.ledger.balance, user), seen()) == (9, 9)
    assert not caller.do(world.ledger.consume, user, key="a").replayed
    caller.commit()
    assert seen() == 8
    with world.engine.connect() as conn:
        email = conn.scalar(sa.select(world.schema.users.c.email).where(world.schema.users.c.key == user))
    assert email == f"{user}@example.com"


# --- what the database says ---


def check_errors(world: World, open_door: Callable[[], Any]) -> None:
    """The same error through each connection, by the SQLSTATE and not by what the driver calls it."""
    user, ledger = world.user(credits=3), world.ledger
    with open_door() as caller, world.engine.connect() as other:
        ledger.lock(other, user)
        caller.sql("SET lock_timeout = '20ms'")
        with pytest.raises(errors.Conflict) as caught:
            caller.do(ledger.consume, user, key="a")
        assert (caught.value.sqlstate, caught.value.retryable) == ("55P03", True)
    with open_door() as caller:
        caller.sql("SET default_transaction_read_only = on")
        caller.sql("SET transaction_read_only = on")
        with pytest.raises(errors.DatabaseUnavailable, match="new primary"):
            caller.do(ledger.consume, user, key="a")
    with open_door() as caller:
        caller.sql("SET ROLE pg_monitor")
        with pytest.raises(errors.PermissionDenied, match="migrate sql --role"):
            caller.do(ledger.consume, user, key="a")
    with open_door() as caller:
        caller.do(ledger.balance, user)
        with world.autocommit.connect() as other:
            other.exec_driver_sql(
                "SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity"
                " WHERE datname = current_database() AND pid <> pg_backend_pid()"
            )
        with pytest.raises(errors.TallystickError) as caught:
            caller.do(ledger.consume, user, key="a")
        assert isinstance(caught.value, errors.OutcomeUnknown), repr(caught.value)
        with pytest.raises(Exception) as again:
            caller.do(ledger.consume, user, key="a")
        assert not isinstance(again.value, AttributeError | TypeError)
    with world.engine.connect() as conn:
        assert ledger.balance(conn, user) == 3
    # SQLAlchemy drops a connection of asyncpg's that the server has ended, and does not close it
    del caught, again, caller
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()


@pytest.mark.parametrize("name", [name for name in CALLER_CONNECTIONS if "_row" not in name or "tuple" in name])
def test_errors_of_the_database_are_told_alike(world: World, name: str) -> None:
    check_errors(world, lambda: CALLER_CONNECTIONS[name](world.url))


# --- Django, whose driver is the process's ---

DJANGO = """
import sys
from functools import partial
if sys.argv[1] == "psycopg2":
    sys.modules["psycopg"] = None  # Django takes psycopg2 where there is no psycopg
    import django.db.backends.postgresql.base
    del sys.modules["psycopg"]
import caller_connections, test_connections as t
from worlds import SHAPES, World

world = World(sys.argv[2], SHAPES["uuid"].host)
for atomic in (False, True):
    with caller_connections.django(world.url, atomic=atomic) as caller:
        assert t.driver_of(caller) == sys.argv[1]
        context = t.run_table(world, caller)
        if caller.commit:
            caller.commit()
        t.compare(world, context)
        t.transaction(world, caller)
    with caller_connections.django(world.url, atomic=atomic) as caller:
        t.settings(caller, encoding=sys.argv[1] == "psycopg")
        t.run_table(world, caller)
t.check_errors(world, partial(caller_connections.django, world.url, atomic=False))
print("done")
"""


def driver_of(caller: CallerConnection) -> str:
    caller.conn.ensure_connection()
    module: str = type(caller.conn.connection).__module__
    return module.partition(".")[0]


@pytest.mark.parametrize("driver", ["psycopg", "psycopg2"])
def test_django(world: World, driver: str) -> None:
    ran = subprocess.run(
        [sys.executable, "-c", DJANGO, driver, world.url],
        cwd=Path(__file__).parent, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert (ran.returncode, ran.stdout) == (0, "done\n"), ran.stderr
    with world.engine.connect() as conn:
        assert audit(conn, world.config).findings == ()


# --- other objects ---


def test_what_is_no_connection_is_refused_with_a_sentence(world: World) -> None:
    lite = sa.create_engine("sqlite://")
    refused: dict[Any, str] = {
        None: "NoneType", world.url: "str", world.engine: "Engine", sqlite3.connect(":memory:"): "sqlite3.Connection",
        lite.connect(): "SQLAlchemy to sqlite, through pysqlite", Session(lite): "SQLAlchemy to sqlite",
        world.engine.raw_connection(): "_ConnectionFairy", world.ledger: "Ledger",
    }  # fmt: skip
    for each, message in refused.items():
        with pytest.raises(errors.InvalidArgument) as caught:
            world.ledger.balance(each, uuid4())
        assert message in str(caught.value)
        assert "psycopg's Connection or AsyncConnection" in str(caught.value)
        if hasattr(each, "close"):
            each.close()


@pytest.mark.parametrize(
    ("call", "takes"),
    [
        (migrate.status, ()),
        (migrate.plan, ()),
        (audit, ()),
        (lambda source, _: migrate.propose(source), ()),
        (lambda source, _: verify(source), ()),
        (lambda source, _: Ledger(source), (sa.Engine,)),
        (migrate.apply, (sa.Engine, str)),
        (seed, (sa.Engine,)),
        (lambda source, config: Combiner(Ledger(config), source), (sa.Engine,)),
        (lambda source, config: Combiner(source, sa.create_engine(config.database_url)), ()),
        (lambda source, config: router(config, engine=source, current_user=lambda: None), (sa.Engine, AsyncEngine)),
        (lambda source, config: console(config, engine=source, sign_in=lambda: None), (sa.Engine,)),
    ],
)
def test_what_reads_the_schema_refuses_another_argument_with_a_sentence(
    world: World, call: Callable[..., object], takes: tuple[type, ...]
) -> None:
    given = (None, world.url, world.engine, create_async_engine(world.url))
    for each in given:
        if not isinstance(each, takes):
            with pytest.raises(errors.InvalidArgument, match=f", not a .*{type(each).__name__}$"):
                call(each, world.config)


@pytest.mark.parametrize(
    "call",
    [
        lambda given, _: verify(given),
        lambda given, _: Ledger(given),
        audit,
        lambda given, config: Allowances(config).give(given, uuid4()),
        lambda given, _: events.status(given),
        lambda given, _: standby(given),
    ],
)
def test_what_is_synchronous_refuses_connections_of_asyncio_with_a_sentence(
    world: World, call: Callable[..., object]
) -> None:
    async def calls() -> None:
        engine = create_async_engine(world.url)
        async with engine.connect() as conn, AsyncSession(engine) as session:
            for each in (conn, session, async_scoped_session(lambda: session, lambda: None)):
                with pytest.raises(errors.InvalidArgument, match=rf"through run_sync.*, not .*{type(each).__name__}$"):
                    call(each, world.config)
        await engine.dispose()

    asyncio.run(calls())


@pytest.mark.parametrize("name", ["psycopg Connection, tuple_row", "psycopg2 connection", "asyncpg Connection"])
def test_what_builds_its_statements_with_sqlalchemy_refuses_a_drivers_connection(world: World, name: str) -> None:
    user = world.user()
    with CALLER_CONNECTIONS[name](world.url) as caller:
        for call in (lambda conn: Allowances(world.config).give(conn, user), events.status):
            with pytest.raises(errors.InvalidArgument, match=r"SQLAlchemy's Connection or Session.*, not a "):
                call(caller.conn)


def test_a_combiner_refuses_the_engine_of_an_asynchronous_one(world: World) -> None:
    engine = create_async_engine(world.url)
    with pytest.raises(errors.InvalidArgument, match="this Engine is an AsyncEngine's"):
        Combiner(world.ledger, engine.sync_engine)


def test_other_databases_of_django_are_refused() -> None:
    ran = subprocess.run(
        [sys.executable, "-c", """
from django.conf import settings
settings.configure(DATABASES={"default": {"ENGINE": "django.db.backends.sqlite3", "NAME": ":memory:"}})
from django.db import connection
from tallystick import HostMapping, Ledger, errors
from uuid import uuid4
try:
    Ledger(HostMapping()).balance(connection, uuid4())
except errors.InvalidArgument as error:
    print(error)
"""], capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert "a sqlite connection of Django" in ran.stdout, ran.stderr


# --- what SQLAlchemy's listeners see ---


def seen_by(engine: sa.Engine, event: str) -> list[str]:
    seen: list[str] = []

    @sa.event.listens_for(engine, event)
    def listen(*arguments: Any) -> None:
        seen.extend(each for each in arguments if isinstance(each, str) and "tallystick." in each)

    return seen


@pytest.mark.parametrize("event", ["before_cursor_execute", "after_cursor_execute"])
def test_listeners_to_statements_see_the_calls(world: World, event: str) -> None:
    user = world.user(credits=2)
    seen = seen_by(world.engine, event)
    with world.engine.begin() as conn:
        world.ledger.consume(conn, user, key="a")
    assert [text.partition("tallystick.")[2].partition("(")[0] for text in seen] == ["consume"]


def test_a_listener_to_errors_sees_them(world: World) -> None:
    seen: list[Any] = []
    sa.event.listen(world.engine, "handle_error", lambda context: seen.append(context.original_exception))
    with world.engine.connect() as conn:
        conn.exec_driver_sql("SET ROLE pg_monitor")
        with pytest.raises(errors.PermissionDenied):
            world.ledger.consume(conn, uuid4(), key="a")
    assert [error.sqlstate for error in seen] == ["42501"]


def test_echo_logs_the_calls(world: World, caplog: pytest.LogCaptureFixture) -> None:
    engine = sa.create_engine(world.url, poolclass=sa.NullPool, echo=True)
    with engine.connect() as conn:
        world.ledger.balance(conn, world.user())
    assert "FROM tallystick.balance(user_id => %s)" in caplog.text


def test_other_events_and_isolation_levels_leave_the_drivers_cursor(world: World) -> None:
    """An engine of another isolation level has a listener of SQLAlchemy's own."""
    user = world.user(credits=5)
    engine = world.engine.execution_options(isolation_level="AUTOCOMMIT")
    begun: list[Any] = []
    sa.event.listen(engine, "begin", begun.append)
    seen = seen_by(engine, "before_execute")
    with engine.connect() as conn:
        world.ledger.consume(conn, user, key="a")
        assert begun
        sent = conn.exec_driver_sql("SELECT 1").cursor  # SQLAlchemy's own statements are sent as ever
        assert sent is not None
        assert seen == []
        conn.execution_options(tallystick_events=True)
        with pytest.MonkeyPatch.context() as patched:
            texts: list[str] = []
            send = type(conn).exec_driver_sql
            patched.setattr(
                type(conn),
                "exec_driver_sql",
                lambda self, text, *more: (texts.append(text), send(self, text, *more))[1],
            )
            world.ledger.consume(conn, user, key="b")
            conn.execution_options(tallystick_events=False)
            world.ledger.consume(conn, user, key="c")
        assert len(texts) == 1


# --- a connection of an engine's pool, for calls that need no transaction ---


@pytest.fixture
def pool(world: World) -> Iterator[sa.Engine]:
    engine = sa.create_engine(world.url, pool_size=1, max_overflow=0)
    yield engine
    engine.dispose()


def test_a_plain_engine_gives_the_drivers_connection_for_a_while(world: World, pool: sa.Engine) -> None:
    user = world.user(credits=2)
    with autocommitting(pool) as conn:
        assert isinstance(conn, psycopg.Connection)
        world.ledger.consume(conn, user, key="a")
        with world.engine.connect() as other:
            assert world.ledger.balance(other, user) == 1
    with pool.connect() as again:
        assert again.connection.dbapi_connection is conn
        assert not conn.autocommit


def test_an_asynchronous_engine_gives_the_drivers_connection_too(world: World) -> None:
    user = world.user(credits=2)

    def work(engine: sa.Engine) -> list[Any]:
        with autocommitting(engine) as conn:
            return [type(conn).__name__, world.ledger.consume(conn, user, key="a").balance_after]

    async def run() -> list[Any]:
        engine = create_async_engine(world.url)
        found = await greenlet_spawn(work, engine.sync_engine)
        async with engine.connect() as conn:
            found.append((await conn.get_raw_connection()).driver_connection.autocommit)
        await engine.dispose()
        return found

    with ThreadPoolExecutor(1) as other:  # a browser that is open in this thread has its own event loop
        assert other.submit(asyncio.run, run()).result(60) == ["AsyncAdapt_psycopg_connection", 1, False]


class Wrapped(psycopg.Connection[Any]):
    """A connection as a tracer would make it."""


EXPECTING_SQLALCHEMYS: dict[str, Callable[[World], sa.Engine]] = {
    "options": lambda world: world.engine.execution_options(logging_token="x"),
    "echo": lambda world: sa.create_engine(world.url, poolclass=sa.NullPool, echo=True),
    "psycopg2": lambda world: sa.create_engine(world.url.replace("+psycopg", "+psycopg2"), poolclass=sa.NullPool),
    "a wrapped connection": lambda world: sa.create_engine(
        world.url, poolclass=sa.NullPool, creator=lambda: Wrapped.connect(world.url.replace("+psycopg", ""))
    ),
}


@pytest.mark.parametrize("what", EXPECTING_SQLALCHEMYS)
def test_where_sqlalchemys_is_expected_it_is_given(world: World, what: str) -> None:
    user = world.user(credits=2)
    with autocommitting(EXPECTING_SQLALCHEMYS[what](world)) as conn:
        assert isinstance(conn, sa.Connection)
        world.ledger.consume(conn, user, key="a")
        with world.engine.connect() as other:
            assert world.ledger.balance(other, user) == 1


@pytest.mark.parametrize("event", ["before_cursor_execute", "begin", "handle_error", "engine_connect"])
def test_a_listener_is_given_sqlalchemys(world: World, pool: sa.Engine, event: str) -> None:
    sa.event.listen(pool, event, lambda *_: None)
    with autocommitting(pool) as conn:
        assert isinstance(conn, sa.Connection)


def test_a_listener_on_all_connections_is_given_sqlalchemys(
    world: World, pool: sa.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sa.Connection, "_has_events", True)  # listen sets it, and remove leaves it
    seen: list[str] = []

    def listen(*args: Any) -> None:
        seen.append(args[2])

    sa.event.listen(sa.Connection, "before_cursor_execute", listen)
    try:
        with autocommitting(pool) as conn:
            world.ledger.balance(conn, world.user())
    finally:
        sa.event.remove(sa.Connection, "before_cursor_execute", listen)
    assert any("tallystick.balance" in statement for statement in seen)


@pytest.mark.parametrize("take", [autocommitting, sa.Engine.connect])
def test_after_a_restart_one_call_fails_and_the_pool_is_new(world: World, take: Callable[[sa.Engine], Any]) -> None:
    user, engine = world.user(credits=2), sa.create_engine(world.url, pool_size=3, max_overflow=0)
    with engine.connect() as one, engine.connect() as two, engine.connect() as three:
        pids = [conn.scalar(sa.text("SELECT pg_backend_pid()")) for conn in (one, two, three)]
    with world.autocommit.connect() as other:
        for pid in pids:
            other.exec_driver_sql(f"SELECT pg_terminate_backend({pid}, 10000)")
    with pytest.raises(errors.OutcomeUnknown), take(engine) as conn:
        world.ledger.balance(conn, user)
    for _ in range(3):
        with take(engine) as conn:
            assert world.ledger.balance(conn, user) == 2
    engine.dispose()


def test_events_of_the_pool_are_the_hosts(world: World, pool: sa.Engine) -> None:
    seen: list[str] = []
    for event in ("connect", "checkout", "checkin"):
        sa.event.listen(pool, event, lambda *_, event=event: seen.append(event))
    with autocommitting(pool) as conn:
        assert isinstance(conn, psycopg.Connection)
    assert seen == ["connect", "checkout", "checkin"]


def test_a_connection_that_has_died_is_not_given_again(world: World, pool: sa.Engine) -> None:
    user = world.user(credits=2)
    with pytest.raises(errors.OutcomeUnknown), autocommitting(pool) as conn:
        assert isinstance(conn, psycopg.Connection)
        with world.autocommit.connect() as other:
            other.exec_driver_sql(f"SELECT pg_terminate_backend({conn.info.backend_pid}, 10000)")
        world.ledger.consume(conn, user, key="a")
    with autocommitting(pool) as conn:
        assert world.ledger.balance(conn, user) == 2


def test_without_a_server_or_a_free_connection_it_is_unavailable(pool: sa.Engine) -> None:
    nowhere = sa.create_engine("postgresql+psycopg://nobody@127.0.0.1:1/x", poolclass=sa.NullPool)
    with pytest.raises(errors.DatabaseUnavailable, match="cannot connect"), autocommitting(nowhere):
        pass
    full = sa.create_engine(pool.url, pool_size=1, max_overflow=0, pool_timeout=0.01)
    with autocommitting(full), pytest.raises(errors.DatabaseUnavailable, match="larger pool"), autocommitting(full):
        pass
    full.dispose()


def test_a_call_under_which_the_functions_are_replaced_is_made_again(world: World) -> None:
    """The server then does not find a function that it looked up before: nothing was written."""
    refuse = "DO $$ BEGIN RAISE 'cache lookup failed for function 16625' USING ERRCODE = 'XX000'; END $$"
    with (
        pytest.raises(errors.Conflict, match="were replaced under this call") as caught,
        translated(),
        world.engine.begin() as conn,
    ):
        conn.exec_driver_sql(refuse)
    assert caught.value.retryable
