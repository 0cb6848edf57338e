"""Every message of every operation, lost in turn: before the server has it, after it has committed, and between."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import count
from typing import Any

import pytest
import sqlalchemy as sa

from parallel import assert_ledger_consistent, declared_functions, functions_called
from tallystick import Consume, CreditTransaction, Merged
from tallystick.errors import DatabaseError, DatabaseUnavailable, Key, OutcomeUnknown
from tallystick.ledger.combiner import Combiner
from wire import Fault, Harm, Proxy
from worlds import World

pytestmark = pytest.mark.one_server  # it is about the client, whose messages are those of any server

Call = Callable[[sa.Connection], Any]
PATIENCE_S = 30


@dataclass
class Case:
    """One operation that is ready to be called, and what the balance does when it happens once."""

    call: Call
    user: Key
    change: int


def prepared(world: World, operation: str) -> Case:
    """The same operation for a new user each time, so that nothing of the last fault is left."""
    ledger, user, duplicate = world.ledger, world.user(credits=10), world.user(credits=3)
    workshop = world.workshop(user)
    with world.engine.begin() as conn:
        bought, refunded = world.buy(conn, user, 5), world.buy(conn, user, 4)
        ledger.refund(conn, user, refunded.id, key="all of it")
        pending, attached = (ledger.start_purchase(conn, user, credits=7, description="A pack") for _ in range(2))
        ledger.attach_session(conn, user, attached.id, stripe_session_id=f"cs {user}")
        given = ledger.grant(conn, user, credits=3, key="given", description="A gift")
        spent = ledger.consume(conn, user, key="spent")
        held = ledger.hold(conn, user, credits=2, key="held")
    many = [Consume(user, key="1"), Consume(user, workshop=workshop, key="2"), Consume(user, credits=99, key="3")]
    calls: dict[str, tuple[Call, int]] = {
        "start_purchase": (lambda c: ledger.start_purchase(c, user, credits=7, description="A pack", key="s"), 0),
        "attach_session": (lambda c: ledger.attach_session(c, user, pending.id, stripe_session_id=f"cs_{user}"), 0),
        "complete_purchase": (lambda c: ledger.complete_purchase(c, user, purchase=pending.id), +7),
        "complete_purchase by session": (
            lambda c: ledger.complete_purchase(c, user, stripe_session_id=f"cs {user}"),
            +7,
        ),
        "fail_purchase": (lambda c: ledger.fail_purchase(c, user, purchase=pending.id, reason="expired"), 0),
        "fail_purchase by session": (
            lambda c: ledger.fail_purchase(c, user, stripe_session_id=f"cs {user}", reason="expired"),
            0,
        ),
        "consume": (lambda c: ledger.consume(c, user, credits=2, key="c"), -2),
        "consume for a workshop": (lambda c: ledger.consume(c, user, workshop=workshop, key="w"), -1),
        "consume_many": (lambda c: ledger.consume_many(c, many), -2),
        "refund": (lambda c: ledger.refund(c, user, bought.id, credits=3, key="r"), -3),
        "reinstate": (lambda c: ledger.reinstate(c, user, refunded.id, credits=3, key="i"), +3),
        "grant": (lambda c: ledger.grant(c, user, credits=3, key="g", description="A gift"), +3),
        "hold": (lambda c: ledger.hold(c, user, credits=3, key="h"), 0),
        "capture": (lambda c: ledger.capture(c, user, held.id, credits=1), -1),
        "release": (lambda c: ledger.release(c, user, held.id), 0),
        "reverse": (lambda c: ledger.reverse(c, user, spent.id, key="v"), +1),
        "correct": (lambda c: ledger.correct(c, user, given.id, credits=2, key="k"), -2),
        "merge": (lambda c: ledger.merge(c, duplicate, into=user, key="m"), +3),
    }
    call, change = calls[operation]
    return Case(call, user, change)


@pytest.fixture
def world(world: World) -> Iterator[World]:
    """With one connection for all that is not cut: a dozen operations are prepared for each fault."""
    world.engine = sa.create_engine(world.url, pool_size=1, max_overflow=0)
    world.autocommit = world.engine.execution_options(isolation_level="AUTOCOMMIT")
    yield world
    world.engine.dispose()


@pytest.fixture
def proxy(world: World) -> Iterator[Proxy]:
    made = Proxy(world.url)
    yield made
    made.close()


def faults(proxy: Proxy, attempt: Callable[[], Any], *harms: Harm) -> list[Fault]:
    """Each of these at each message of an attempt that nobody disturbs."""
    proxy.watch(None)
    attempt()
    seen = dict(proxy.seen)
    assert min(seen.values()) > 0
    return [Fault(side, number, harm) for side, count in seen.items() for number in range(count) for harm in harms]


OPERATIONS = [
    "start_purchase",
    "attach_session",
    "complete_purchase",
    "complete_purchase by session",
    "fail_purchase",
    "fail_purchase by session",
    "consume",
    "consume for a workshop",
    "consume_many",
    "refund",
    "reinstate",
    "grant",
    "hold",
    "capture",
    "release",
    "reverse",
    "correct",
    "merge",
]
# a sweep does for many users what each call does for its own
WRITING_NOTHING = {"lock", "balance", "balance_at", "history", "access", "lots", "sweep"}


def test_every_function_that_writes_is_among_them(world: World) -> None:
    engine = sa.create_engine(world.url, poolclass=sa.NullPool, isolation_level="AUTOCOMMIT")
    seen = functions_called(engine)
    for operation in OPERATIONS:
        with engine.connect() as conn:
            prepared(world, operation).call(conn)
    assert seen == declared_functions() - WRITING_NOTHING


@pytest.mark.parametrize("operation", OPERATIONS)
def test_cut_at_each_message(world: World, proxy: Proxy, operation: str) -> None:
    engine = sa.create_engine(proxy.url, poolclass=sa.NullPool, isolation_level="AUTOCOMMIT")

    def attempt(case: Case, fault: Fault | None = None) -> Any:
        with engine.connect() as conn:
            conn.execute(sa.text("SELECT 1"))
            proxy.watch(fault)
            return case.call(conn)

    committed = lost = 0
    for fault in faults(proxy, lambda: attempt(prepared(world, operation)), "cut", "cut in the middle"):
        case = prepared(world, operation)
        try:
            attempt(case, fault)
        except OutcomeUnknown as error:
            assert error.outcome_unknown
        else:
            # what is cut behind the last row is no loss: the client had its answer
            assert fault.side == "to the client"
        assert fault.done.wait(30)
        settled(world)
        with world.autocommit.connect() as conn:
            first = case.call(conn)
            again = case.call(conn)
            assert world.ledger.balance(conn, case.user) == 17 + case.change
        assert replays(again) == [True] * len(replays(again))
        committed += all(replays(first))
        lost += not any(replays(first))
    # both kinds of loss were met, or the faults do not reach where they should
    assert committed > 0
    assert lost > 0
    assert_ledger_consistent(world)


def replays(result: Any) -> list[bool]:
    rows = result if isinstance(result, list) else [result]
    return [row.replayed for row in rows if isinstance(row, CreditTransaction | Merged)]


def settled(world: World) -> None:
    """Until the server has noticed that its client is gone, and ended what it was at."""
    others = sa.text(
        "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
    )
    pause = threading.Event()
    with world.autocommit.connect() as conn:
        for _ in range(1200):
            if not conn.scalar(others):
                return
            pause.wait(0.02)
    raise AssertionError("a connection outlived its client")


def test_cut_at_each_message_of_a_transaction(world: World, proxy: Proxy) -> None:
    """A workshop and its payment: both or neither, up to the answer to COMMIT."""
    workshops = world.schema.workshops
    assert workshops is not None
    engine = sa.create_engine(proxy.url, poolclass=sa.NullPool)
    user = world.user(credits=1_000)

    def attempt(workshop: Key, fault: Fault | None = None) -> None:
        with engine.connect() as conn:
            conn.execute(sa.text("SELECT 1"))
            conn.rollback()
            proxy.watch(fault)
            with conn.begin():
                conn.execute(sa.insert(workshops).values(key=workshop, owner=user, title="Both or neither"))
                world.ledger.consume(conn, user, workshop=workshop, key=f"pay {workshop}")

    both = neither = 0
    for fault in faults(proxy, lambda: attempt(world.key("uuid")), "cut", "cut in the middle"):
        workshop = world.key("uuid")
        # in the operation the error is ours; in the caller's own statements and COMMIT it is SQLAlchemy's
        with suppress(OutcomeUnknown, sa.exc.OperationalError):
            attempt(workshop, fault)
        settled(world)
        with world.engine.connect() as conn:
            mark = conn.execute(sa.select(workshops.c.credit_consumed_at).where(workshops.c.key == workshop)).all()
        assert mark == [] or mark[0][0] is not None
        both, neither = both + bool(mark), neither + (not mark)
    assert both > 0
    assert neither > 0
    assert_ledger_consistent(world)


def test_cut_at_each_message_of_a_combiner(world: World, proxy: Proxy) -> None:
    """Whoever is told that it is unknown asks again, whoever is not has a row; and each is done once."""
    engine = sa.create_engine(proxy.url, poolclass=sa.NullPool)
    user, keys = world.user(credits=1_000), count()
    lost: list[BaseException] = []
    seen: set[bool] = set()

    def attempt(fault: Fault | None = None) -> None:
        with Combiner(world.ledger, engine) as combiner:

            def rows(*names: str) -> list[CreditTransaction]:
                calls = [combiner.consume(user, key=name) for name in names]
                answers = [call.exception(PATIENCE_S) or call.result() for call in calls]
                unknown = [error for error in answers if isinstance(error, OutcomeUnknown)]
                lost.extend(unknown)
                return rows(*names) if unknown else answers

            rows(str(next(keys)))  # it is connected
            proxy.watch(fault)
            mine = [str(next(keys)) for _ in range(3)]
            first = rows(*mine)
            assert [row.idempotency_key for row in first] == mine
            seen.update(replays(first))
            assert replays(rows(*mine)) == [True] * 3

    for fault in faults(proxy, attempt, "cut", "cut in the middle"):
        attempt(fault)
    assert seen == {False, True}  # of some the answer was lost, and of some the question
    assert len({id(error) for error in lost}) == len(lost)  # each has its own
    with world.autocommit.connect() as conn:
        assert world.ledger.balance(conn, user) == 1_000 - next(keys)
    assert_ledger_consistent(world)


def test_cut_for_good_after_a_commit_of_a_combiner(world: World, proxy: Proxy) -> None:
    """The second attempt cannot connect, which tells nothing of the first: its caller must not hear "not written"."""
    engine = sa.create_engine(proxy.url, poolclass=sa.NullPool)
    user = world.user(credits=10)
    with Combiner(world.ledger, engine) as combiner:
        combiner.consume(user, key="before").result(PATIENCE_S)  # it is connected
        proxy.watch(fault := Fault("to the client", 0, "cut for good"))
        error = combiner.consume(user, key="committed").exception(PATIENCE_S)
        later = combiner.consume(user, key="later").exception(PATIENCE_S)
    assert fault.done.is_set()
    assert isinstance(error, OutcomeUnknown), error
    assert isinstance(later, DatabaseUnavailable)  # this one was never sent
    with world.autocommit.connect() as conn:
        assert world.ledger.balance(conn, user) == 8
    assert_ledger_consistent(world)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_late_or_twice_at_each_message(world: World, proxy: Proxy, operation: str) -> None:
    """A late message gives an answer. No network sends a message twice; if one did, nothing would be done twice."""
    engine = sa.create_engine(proxy.url, poolclass=sa.NullPool, isolation_level="AUTOCOMMIT")

    def attempt(case: Case, fault: Fault | None = None) -> Any:
        with engine.connect() as conn:
            conn.exec_driver_sql(f"SET statement_timeout = '{PATIENCE_S}s'")
            proxy.watch(fault)
            return case.call(conn)

    confused = 0
    for fault in faults(proxy, lambda: attempt(prepared(world, operation)), "twice", "delay"):
        case = prepared(world, operation)
        try:
            answers = replays(attempt(case, fault))
        except (DatabaseError, sa.exc.SQLAlchemyError, ValueError):  # more rows than were asked for
            assert fault.harm == "twice"
            confused += 1
        else:
            assert not any(answers) or operation == "attach_session"
        assert fault.done.wait(PATIENCE_S)
        settled(world)
        with world.autocommit.connect() as conn:
            case.call(conn)
            again = case.call(conn)
            assert world.ledger.balance(conn, case.user) == 17 + case.change
        assert replays(again) == [True] * len(replays(again))
    assert confused > 0, "no message was sent twice where it matters"
    assert_ledger_consistent(world)
