"""Every operation on a purchase, a workshop and a user who gets a grant: one cell for each state and operation.

Read a cell as: the state afterwards, then what the balance did; ``=`` is a replay (nothing changed, the result says
so); ``!Name`` is that refusal (nothing changed, and the caller's transaction goes on). Every cell runs through every
door that a caller may come by.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.orm import Session

from tallystick import CreditTransaction, errors
from tallystick.dev.postgres import Server
from tallystick.errors import Key, LedgerError
from tallystick.schema import INT32_MAX
from worlds import SHAPES, World

BOUGHT = 5  # credits of the purchase in question
FUNDS = 10  # credits that the user has apart from it
PRICE = {"amount_paid": 14_900, "currency": "usd", "stripe_payment_intent_id": "pi_1"}

PURCHASES = """
                | absent           | pending                      | attached                     | failed                       | completed                    | part refunded                | refunded                     | given back                   | other user's
start again     | pending +0       | =                            | =                            | =                            | =                            | =                            | =                            | =                            | pending +0
start dearer    | pending +0       | !IdempotencyKeyReused        | !IdempotencyKeyReused        | !IdempotencyKeyReused        | !IdempotencyKeyReused        | !IdempotencyKeyReused        | !IdempotencyKeyReused        | !IdempotencyKeyReused        | pending +0
attach          | !UnknownPurchase | attached +0                  | =                            | failed +0                    | completed +0                 | part refunded +0             | refunded +0                  | completed +0                 | !UnknownPurchase
attach other    | !UnknownPurchase | attached +0                  | !SessionConflict             | failed +0                    | completed +0                 | part refunded +0             | refunded +0                  | completed +0                 | !UnknownPurchase
attach taken    | !UnknownPurchase | !SessionConflict             | !SessionConflict             | !SessionConflict             | !SessionConflict             | !SessionConflict             | !SessionConflict             | !SessionConflict             | !UnknownPurchase
complete        | !UnknownPurchase | completed +5                 | completed +5                 | completed +5                 | =                            | =                            | =                            | =                            | !UnknownPurchase
  by session    | !UnknownPurchase | !UnknownPurchase             | completed +5                 | !UnknownPurchase             | !UnknownPurchase             | !UnknownPurchase             | !UnknownPurchase             | !UnknownPurchase             | !UnknownPurchase
  by both       | !UnknownPurchase | completed +5                 | completed +5                 | completed +5                 | =                            | =                            | =                            | =                            | !UnknownPurchase
  dearer        | !UnknownPurchase | completed +5                 | completed +5                 | completed +5                 | !IdempotencyKeyReused        | !IdempotencyKeyReused        | !IdempotencyKeyReused        | !IdempotencyKeyReused        | !UnknownPurchase
fail            | !UnknownPurchase | failed +0                    | failed +0                    | =                            | !PurchaseNotPending          | !PurchaseNotPending          | !PurchaseNotPending          | !PurchaseNotPending          | !UnknownPurchase
fail session    | !UnknownPurchase | !UnknownPurchase             | failed +0                    | !UnknownPurchase             | !UnknownPurchase             | !UnknownPurchase             | !UnknownPurchase             | !UnknownPurchase             | !UnknownPurchase
refund 2        | !UnknownPurchase | !PurchaseNotCompleted        | !PurchaseNotCompleted        | !PurchaseNotCompleted        | part refunded -2             | part refunded -2             | !RefundExceedsPurchase       | part refunded -2             | !UnknownPurchase
refund all      | !UnknownPurchase | !PurchaseNotCompleted        | !PurchaseNotCompleted        | !PurchaseNotCompleted        | refunded -5                  | refunded -4                  | !RefundExceedsPurchase       | refunded -5                  | !UnknownPurchase
refund 6        | !UnknownPurchase | !PurchaseNotCompleted        | !PurchaseNotCompleted        | !PurchaseNotCompleted        | !RefundExceedsPurchase       | !RefundExceedsPurchase       | !RefundExceedsPurchase       | !RefundExceedsPurchase       | !UnknownPurchase
refund again    | !UnknownPurchase | !PurchaseNotCompleted        | !PurchaseNotCompleted        | !PurchaseNotCompleted        | part refunded -1             | =                            | =                            | =                            | !UnknownPurchase
reinstate 1     | !UnknownPurchase | !ReinstatementExceedsRefunds | !ReinstatementExceedsRefunds | !ReinstatementExceedsRefunds | !ReinstatementExceedsRefunds | completed +1                 | part refunded +1             | !ReinstatementExceedsRefunds | !UnknownPurchase
reinstate all   | !UnknownPurchase | !ReinstatementExceedsRefunds | !ReinstatementExceedsRefunds | !ReinstatementExceedsRefunds | !ReinstatementExceedsRefunds | completed +1                 | completed +5                 | !ReinstatementExceedsRefunds | !UnknownPurchase
reinstate 6     | !UnknownPurchase | !ReinstatementExceedsRefunds | !ReinstatementExceedsRefunds | !ReinstatementExceedsRefunds | !ReinstatementExceedsRefunds | !ReinstatementExceedsRefunds | !ReinstatementExceedsRefunds | !ReinstatementExceedsRefunds | !UnknownPurchase
reinstate again | !UnknownPurchase | !ReinstatementExceedsRefunds | !ReinstatementExceedsRefunds | !ReinstatementExceedsRefunds | !ReinstatementExceedsRefunds | completed +1                 | part refunded +1             | =                            | !UnknownPurchase
refund's key    | !UnknownPurchase | !ReinstatementExceedsRefunds | !ReinstatementExceedsRefunds | !ReinstatementExceedsRefunds | !ReinstatementExceedsRefunds | !IdempotencyKeyReused        | !IdempotencyKeyReused        | !IdempotencyKeyReused        | !UnknownPurchase
"""  # noqa: E501 - a table

WORKSHOPS = """
               | locked                | unlocked | deleted          | other user's      | absent           | none                  | marked by hand
consume        | unlocked -1           | =        | !WorkshopDeleted | !WorkshopNotOwned | !UnknownWorkshop | none -1               | !WorkshopUnaccounted
consume 10     | unlocked -10          | =        | !WorkshopDeleted | !WorkshopNotOwned | !UnknownWorkshop | none -10              | !WorkshopUnaccounted
consume 11     | !InsufficientCredits  | =        | !WorkshopDeleted | !WorkshopNotOwned | !UnknownWorkshop | !InsufficientCredits  | !WorkshopUnaccounted
by nobody      | !UnknownUser          | !UnknownUser | !UnknownUser | !UnknownUser      | !UnknownUser     | !UnknownUser          | !UnknownUser
by a deleted   | !UserDeleted          | !UserDeleted | !UserDeleted | !UserDeleted      | !UserDeleted     | !UserDeleted          | !UserDeleted
key used       | !IdempotencyKeyReused | !IdempotencyKeyReused | !IdempotencyKeyReused | !IdempotencyKeyReused | = | = | !IdempotencyKeyReused
key used, 2    | !IdempotencyKeyReused | !IdempotencyKeyReused | !IdempotencyKeyReused | !IdempotencyKeyReused | !IdempotencyKeyReused | !IdempotencyKeyReused | !IdempotencyKeyReused
"""  # noqa: E501 - a table

GIFTS = """
        | user     | given 3               | key used              | in debt  | nearly full        | deleted      | nobody
grant 3 | given +3 | =                     | !IdempotencyKeyReused | given +3 | !BalanceOutOfRange | !UserDeleted | !UnknownUser
grant 4 | given +4 | !IdempotencyKeyReused | !IdempotencyKeyReused | given +4 | !BalanceOutOfRange | !UserDeleted | !UnknownUser
"""  # noqa: E501 - a table


def cells(table: str) -> list[Any]:
    (_, *states), *lines = ([part.strip() for part in line.split("|")] for line in table.strip("\n").splitlines())
    return [
        pytest.param(state, operation, cell, id=f"{operation} when {state}")
        for operation, *expected in lines
        for state, cell in zip(states, expected, strict=True)
    ]


# --- the connections of callers ---


class Connector:
    """``run(work)`` runs ``work(conn)`` in a database transaction of its own, or each statement in its own."""

    def __init__(self, run: Callable[[World, Callable[[Any], None]], None]) -> None:
        self.run = run


def _connection(isolation: str) -> Connector:
    def run(world: World, work: Callable[[Any], None]) -> None:
        engine = world.engine.execution_options(isolation_level=isolation)
        with engine.connect() as conn, conn.begin():
            work(conn)

    return Connector(run)


def _session(world: World, work: Callable[[Any], None]) -> None:
    with Session(world.engine) as session, session.begin():
        work(session)


def _asyncio(world: World, work: Callable[[Any], None]) -> None:
    async def main() -> None:
        async with world.asyncio.begin() as conn:
            await conn.run_sync(work)

    world.runner.run(main())


CONNECTORS = {
    "autocommit": _connection("AUTOCOMMIT"),
    "read committed": _connection("READ COMMITTED"),
    "repeatable read": _connection("REPEATABLE READ"),
    "serializable": _connection("SERIALIZABLE"),
    "session": Connector(_session),
    "asyncio": Connector(_asyncio),
}


OF_THE_CLIENT = {"session", "asyncio"}  # to the server they are "read committed"


@pytest.fixture(
    params=[pytest.param(name, marks=pytest.mark.one_server if name in OF_THE_CLIENT else ()) for name in CONNECTORS]
)
def connector(request: pytest.FixtureRequest) -> Connector:
    return CONNECTORS[request.param]


@pytest.fixture(scope="module")
def world(server: Server, _templates: Callable[[str], str]) -> Iterator[World]:
    """One database for all cells, since each has a user of its own."""
    name = f"states_{uuid.uuid4().hex}"
    world = World(server.create_database(name, template=_templates("uuid")), SHAPES["uuid"].host)
    world.engine = sa.create_engine(world.url)  # connecting anew would take most of the time here
    world.asyncio = create_async_engine(world.url)
    with asyncio.Runner() as world.runner:
        yield world
        world.runner.run(world.asyncio.dispose())
    world.engine.dispose()
    server.drop_database(name)


def everything(world: World, user: Key) -> list[tuple[Any, ...]]:
    """All that an operation for ``user`` could change, and that all of it agrees."""
    users, ledger, workshops = world.schema.users, world.schema.credit_transactions, world.schema.workshops
    assert workshops is not None
    with world.engine.connect() as conn:
        mine = conn.execute(sa.select(users.c.credit_balance, users.c.credit_sequence).where(users.c.key == user)).all()
        rows = conn.execute(sa.select(ledger).where(ledger.c.user_id == user).order_by(ledger.c.id)).all()
        marks = conn.execute(sa.select(workshops.c.key, workshops.c.credit_consumed_at).order_by("key")).all()
    done = sorted((row for row in rows if row.status == "completed"), key=lambda row: row.sequence)
    running = 0
    for number, row in enumerate(done, 1):
        running += row.amount
        assert (row.sequence, row.balance_after) == (number, running)
    assert [tuple(row) for row in mine] == [(running, len(done))] * len(mine)
    return [tuple(row) for row in (*mine, *rows, *marks)]


@contextmanager
def refusal(name: str) -> Iterator[None]:
    kind: type[LedgerError] = getattr(errors, name)
    with pytest.raises(kind) as caught:
        yield
    assert type(caught.value) is kind
    assert not caught.value.retryable
    assert not caught.value.outcome_unknown


def check(case: Purchase | Unlocking | Gift, connector: Connector, operation: str, cell: str) -> None:
    """Run one operation through a door and hold what it did against the table's cell."""
    world = case.world
    before, state = everything(world, case.user), case.state()
    marker = uuid.uuid4()
    users = world.schema.users

    def work(conn: Any) -> None:
        if cell.startswith("!"):
            with refusal(cell[1:]):
                case.operate(operation, conn)
        else:
            done = case.operate(operation, conn)
            assert done.replayed is (cell == "=")
        # the caller goes on in the same transaction, whatever happened
        conn.execute(sa.insert(users).values(key=marker, email=str(marker)))

    connector.run(world, work)

    after = everything(world, case.user)
    with world.engine.connect() as conn:
        assert world.ledger.balance(conn, marker) == 0
    if cell == "=" or cell.startswith("!"):
        assert (after, case.state()) == (before, state)
    else:
        expected, _, change = cell.rpartition(" ")
        assert case.state() == expected
        assert after[0][0] - before[0][0] == int(change)


# --- a purchase ---


class Purchase:
    """One purchase brought into a state, and what the ledger says of it."""

    def __init__(self, world: World, state: str) -> None:
        self.world = world
        ledger = world.ledger
        self.user = world.user(credits=FUNDS)
        self.tag = uuid.uuid4().hex
        self.id = uuid.uuid4()
        holder = world.user() if state == "other user's" else self.user
        with world.engine.begin() as conn:
            taken = ledger.start_purchase(conn, holder, credits=1, description="another")
            ledger.attach_session(conn, holder, taken.id, stripe_session_id=self.session("taken"))
            if state == "absent":
                return
            self.id = self.start(conn, holder).id
            if state == "attached":
                ledger.attach_session(conn, self.user, self.id, stripe_session_id=self.session("own"))
            elif state == "failed":
                ledger.fail_purchase(conn, self.user, purchase=self.id, reason="expired")
            elif state in ("completed", "part refunded", "refunded", "given back"):
                ledger.complete_purchase(conn, self.user, purchase=self.id, **PRICE)
                if state != "completed":
                    ledger.refund(conn, self.user, self.id, credits=1, key="again")
                if state == "refunded":
                    ledger.refund(conn, self.user, self.id, key="rest")
                if state == "given back":
                    ledger.reinstate(conn, self.user, self.id, credits=1, key="back")

    def session(self, name: str) -> str:
        return f"cs_{name}_{self.tag}"

    def start(self, conn: Any, user: Key, credits: int = BOUGHT) -> CreditTransaction:
        return self.world.ledger.start_purchase(conn, user, credits=credits, description="A pack", key=self.tag)

    def operate(self, operation: str, conn: Any) -> CreditTransaction:
        ledger, user, id = self.world.ledger, self.user, self.id
        own, other, taken = (self.session(name) for name in ("own", "other", "taken"))
        calls: dict[str, Callable[[], CreditTransaction]] = {
            "start again": lambda: self.start(conn, user),
            "start dearer": lambda: self.start(conn, user, BOUGHT + 1),
            "attach": lambda: ledger.attach_session(conn, user, id, stripe_session_id=own),
            "attach other": lambda: ledger.attach_session(conn, user, id, stripe_session_id=other),
            "attach taken": lambda: ledger.attach_session(conn, user, id, stripe_session_id=taken),
            "complete": lambda: ledger.complete_purchase(conn, user, purchase=id, **PRICE),
            "by session": lambda: ledger.complete_purchase(conn, user, stripe_session_id=own, **PRICE),
            "by both": lambda: ledger.complete_purchase(conn, user, purchase=id, stripe_session_id=own, **PRICE),
            "dearer": lambda: ledger.complete_purchase(conn, user, purchase=id, **{**PRICE, "amount_paid": 19_900}),
            "fail": lambda: ledger.fail_purchase(conn, user, purchase=id, reason="expired"),
            "fail session": lambda: ledger.fail_purchase(conn, user, stripe_session_id=own, reason="expired"),
            "refund 2": lambda: ledger.refund(conn, user, id, credits=2, key="two"),
            "refund all": lambda: ledger.refund(conn, user, id, key="all"),
            "refund 6": lambda: ledger.refund(conn, user, id, credits=6, key="six"),
            "refund again": lambda: ledger.refund(conn, user, id, credits=1, key="again"),
            "reinstate 1": lambda: ledger.reinstate(conn, user, id, credits=1, key="one"),
            "reinstate all": lambda: ledger.reinstate(conn, user, id, key="all"),
            "reinstate 6": lambda: ledger.reinstate(conn, user, id, credits=6, key="six"),
            "reinstate again": lambda: ledger.reinstate(conn, user, id, credits=1, key="back"),
            "refund's key": lambda: ledger.reinstate(conn, user, id, credits=1, key="again"),
        }
        return calls[operation]()

    def state(self) -> str:
        row = self.world.schema.credit_transactions.c
        with self.world.engine.connect() as conn:
            mine = sa.select(row.id, row.status, row.stripe_session_id, row.amount).where(
                row.user_id == self.user, row.idempotency_key == self.tag
            )
            found = conn.execute(mine).one_or_none()
            if found is None:
                return "absent"
            back = conn.scalar(sa.select(-sa.func.sum(row.amount)).where(row.refund_of == found.id)) or 0
        if found.status == "pending" and found.stripe_session_id is not None:
            return "attached"
        if back:
            return "refunded" if back == found.amount else "part refunded"
        return str(found.status)


@pytest.mark.parametrize(("state", "operation", "cell"), cells(PURCHASES))
def test_a_purchase(world: World, connector: Connector, state: str, operation: str, cell: str) -> None:
    check(Purchase(world, state), connector, operation, cell)


# --- a workshop ---


class Unlocking:
    """A workshop in a state, a user with some credits, and a key that was used before."""

    def __init__(self, world: World, state: str) -> None:
        self.world = world
        self.user = world.user(credits=FUNDS + (2 if state == "unlocked" else 1))
        self.nobody = uuid.uuid4()
        self.deleted = world.user(credits=FUNDS)
        self.workshop: Key | None = None
        self.tag = state
        with world.engine.begin() as conn:
            world.accounts.delete_user(conn, self.deleted)
            world.ledger.consume(conn, self.user, key="used")
        if state == "absent":
            self.workshop = uuid.uuid4()
        elif state != "none":
            self.workshop = world.workshop(world.user() if state == "other user's" else self.user)
        with world.engine.begin() as conn:
            if state == "unlocked":
                world.ledger.consume(conn, self.user, workshop=self.workshop, key="first")
            elif state == "deleted":
                world.accounts.delete_workshop(conn, self.workshop)
            elif state == "marked by hand":
                assert world.schema.workshops is not None
                conn.execute(
                    sa.update(world.schema.workshops)
                    .where(world.schema.workshops.c.key == self.workshop)
                    .values(credit_consumed_at=sa.func.now())
                )

    def operate(self, operation: str, conn: Any) -> CreditTransaction:
        user, amount, key = {
            "consume": (self.user, 1, "new"),
            "consume 10": (self.user, FUNDS, "new"),
            "consume 11": (self.user, FUNDS + 1, "new"),
            "by nobody": (self.nobody, 1, "new"),
            "by a deleted": (self.deleted, 1, "new"),
            "key used": (self.user, 1, "used"),
            "key used, 2": (self.user, 2, "used"),
        }[operation]
        return self.world.ledger.consume(conn, user, workshop=self.workshop, credits=amount, key=key)

    def state(self) -> str:
        if self.tag not in ("locked", "unlocked"):
            return self.tag
        with self.world.engine.connect() as conn:
            assert self.workshop is not None
            return str(self.world.ledger.access(conn, self.workshop).reason)


@pytest.mark.parametrize(("state", "operation", "cell"), cells(WORKSHOPS))
def test_a_workshop(world: World, connector: Connector, state: str, operation: str, cell: str) -> None:
    check(Unlocking(world, state), connector, operation, cell)


# --- a present ---


class Gift:
    """A user in a state, and the key under which credits are given."""

    def __init__(self, world: World, state: str) -> None:
        self.world = world
        ledger = world.ledger
        self.user = uuid.uuid4() if state == "nobody" else world.user(credits=FUNDS)
        with world.engine.begin() as conn:
            if state == "given 3":
                ledger.grant(conn, self.user, credits=3, key="gift", description="A present")
            elif state == "key used":
                ledger.consume(conn, self.user, key="gift")
            elif state == "in debt":
                bought = ledger.start_purchase(conn, self.user, credits=BOUGHT, description="A pack")
                ledger.complete_purchase(conn, self.user, purchase=bought.id)
                ledger.consume(conn, self.user, credits=FUNDS + BOUGHT, key="all of it")
                ledger.refund(conn, self.user, bought.id, key="the pack")
            elif state == "nearly full":
                ledger.grant(conn, self.user, credits=INT32_MAX - FUNDS - 2, key="plenty", description="Plenty")
            elif state == "deleted":
                world.accounts.delete_user(conn, self.user)

    def operate(self, operation: str, conn: Any) -> CreditTransaction:
        credits = int(operation.removeprefix("grant "))
        return self.world.ledger.grant(conn, self.user, credits=credits, key="gift", description="A present")

    def state(self) -> str:
        row = self.world.schema.credit_transactions.c
        with self.world.engine.connect() as conn:
            given = conn.scalar(sa.select(row.type).where(row.user_id == self.user, row.idempotency_key == "gift"))
        return "given" if given == "grant" else "not given"


@pytest.mark.parametrize(("state", "operation", "cell"), cells(GIFTS))
def test_a_present(world: World, connector: Connector, state: str, operation: str, cell: str) -> None:
    check(Gift(world, state), connector, operation, cell)
