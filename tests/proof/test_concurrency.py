"""Real threads and real processes at one account, one key, one workshop, one purchase."""

from __future__ import annotations

import random
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from itertools import chain
from typing import Any
from uuid import UUID, uuid4

import pytest
import sqlalchemy as sa

from parallel import PATIENCE_S, assert_ledger_consistent, outcome, processes, threads, waiting_for_a_lock
from tallystick import CreditTransaction, InsufficientCredits, Merged, errors
from tallystick.database import translated
from tallystick.errors import Conflict, Key, PurchaseNotPending, RefundExceedsPurchase, WorkshopNotOwned
from tallystick.ledger import Consume
from worlds import World

RUNNERS: dict[str, Callable[..., list[Any]]] = {"threads": threads, "processes": processes}
# to the server they are connections, as threads are
PROCESSES = pytest.param("processes", 3, marks=pytest.mark.one_server)
CALLERS = 16


@pytest.fixture(autouse=True)
def _ledger_is_consistent(world: World) -> Iterator[None]:
    yield
    assert_ledger_consistent(world)


def new(results: list[Any]) -> list[CreditTransaction]:
    return [result for result in results if isinstance(result, CreditTransaction) and not result.replayed]


def spend_ten(world: World, conn: sa.Connection, number: int, user: Key) -> list[Any]:
    return [outcome(lambda n=n: world.ledger.consume(conn, user, key=f"{number}-{n}")) for n in range(10)]


@pytest.mark.parametrize(("runner", "count"), [("threads", CALLERS), PROCESSES])
def test_a_hot_account_is_spent_to_the_last_credit_and_not_beyond(world: World, runner: str, count: int) -> None:
    credits = 10 * count - 7
    user = world.user(credits=credits)
    results = list(chain.from_iterable(RUNNERS[runner](world, count, spend_ten, user)))
    assert sorted(row.balance_after for row in new(results)) == list(range(credits))
    refused = [result for result in results if isinstance(result, InsufficientCredits)]
    assert [(refusal.balance, refusal.required) for refusal in refused] == [(0, 1)] * 7


def spend_with_one_key(world: World, conn: sa.Connection, number: int, user: Key) -> CreditTransaction:
    return world.ledger.consume(conn, user, key="the same")


@pytest.mark.parametrize(("runner", "count"), [("threads", CALLERS), PROCESSES])
def test_one_key_at_once_is_one_row(world: World, runner: str, count: int) -> None:
    user = world.user(credits=3)
    results = RUNNERS[runner](world, count, spend_with_one_key, user)
    assert len({row.id for row in results}) == 1
    assert len(new(results)) == 1


def unlock(world: World, conn: sa.Connection, number: int, user: Key, workshop: Key) -> CreditTransaction:
    return world.ledger.consume(conn, user, workshop=workshop, key=f"tab {number}, {workshop}")


def test_a_workshop_is_paid_for_once(world: World) -> None:
    user = world.user(credits=CALLERS)
    results = threads(world, CALLERS, unlock, user, world.workshop(user))
    assert len({row.id for row in results}) == 1
    assert len(new(results)) == 1


def complete(world: World, conn: sa.Connection, number: int, user: Key, purchase: UUID) -> CreditTransaction:
    return world.ledger.complete_purchase(conn, user, purchase=purchase, amount_paid=7900, currency="usd")


def test_a_purchase_is_granted_once(world: World) -> None:
    user = world.user()
    with world.engine.begin() as conn:
        purchase = world.ledger.start_purchase(conn, user, credits=5, description="A pack")
    results = threads(world, CALLERS, complete, user, purchase.id)
    assert len(new(results)) == 1
    assert {row.balance_after for row in results} == {5}


def settle(world: World, conn: sa.Connection, number: int, user: Key, purchase: UUID) -> Any:
    if number % 2:
        return world.ledger.complete_purchase(conn, user, purchase=purchase, amount_paid=7900, currency="usd")
    return outcome(lambda: world.ledger.fail_purchase(conn, user, purchase=purchase, reason="expired"))


def test_paid_beats_failed_in_any_order(world: World) -> None:
    for _ in range(5):
        user = world.user()
        with world.engine.begin() as conn:
            purchase = world.ledger.start_purchase(conn, user, credits=5, description="A pack")
        results = threads(world, 8, settle, user, purchase.id)
        assert sum(row.status == "completed" for row in new(results)) == 1
        assert all(isinstance(r, CreditTransaction | PurchaseNotPending) for r in results)
        with world.engine.connect() as conn:
            assert world.ledger.balance(conn, user) == 5


# --- the snapshot trap ---


@contextmanager
def held(world: World, user: Key) -> Iterator[None]:
    """Nobody else gets to write to the user's row meanwhile."""
    users = world.schema.users
    with world.engine.begin() as conn:
        conn.execute(sa.select(users.c.key).where(users.c.key == user).with_for_update())
        yield


def refund_one(world: World, conn: sa.Connection, number: int, user: Key, purchase: UUID) -> Any:
    return outcome(lambda: world.ledger.refund(conn, user, purchase, credits=1, key=f"re_{number}"))


def refunds_that_waited_together(world: World, job: Callable[..., Any]) -> tuple[list[Any], int]:
    """16 refunds of one credit each, of a purchase of 5, which all begin before any of them may write."""
    user = world.user(credits=100)
    with world.engine.begin() as conn:
        purchase = world.buy(conn, user, 5)
    with ThreadPoolExecutor(1) as background:
        with held(world, user):
            callers = background.submit(threads, world, CALLERS, job, user, purchase.id)
            waiting_for_a_lock(world, CALLERS)
        results = callers.result(PATIENCE_S)
    with world.engine.connect() as conn:
        return results, 105 - world.ledger.balance(conn, user)


def test_a_purchase_is_never_refunded_beyond_its_credits(world: World) -> None:
    results, taken = refunds_that_waited_together(world, refund_one)
    assert taken == len(new(results)) == 5
    assert [r.left for r in results if isinstance(r, RefundExceedsPurchase)] == [0] * 11


# --- deadlocks ---


def test_two_purchases_in_transactions_of_their_own_do_not_block_each_other_for_good(world: World) -> None:
    user = world.user()
    started = threading.Barrier(2)

    def buy(world: World, conn: sa.Connection, number: int) -> int | None:
        with conn.begin():
            row = world.ledger.start_purchase(conn, user, credits=1, description="A pack")
            started.wait(PATIENCE_S)  # both hold what the new row's foreign key takes
            return world.ledger.complete_purchase(conn, user, purchase=row.id).balance_after

    assert sorted(threads(world, 2, buy, isolation="READ COMMITTED")) == [1, 2]


@pytest.mark.parametrize("first", ["an operation", "an update", "a lock"])
def test_a_transaction_that_has_the_user_already_waits_for_nobody(world: World, first: str) -> None:
    """The host has changed or locked its user and then spends, while somebody else waits to spend for that user."""
    user, users = world.user(credits=10), world.schema.users
    before: dict[str, Callable[[sa.Connection], object]] = {
        "an operation": lambda conn: world.accounts.set_plan_tier(conn, user, "pro"),
        "an update": lambda conn: conn.execute(sa.update(users).where(users.c.key == user).values(plan_tier="pro")),
        "a lock": lambda conn: conn.execute(sa.select(users.c.key).where(users.c.key == user).with_for_update()),
    }
    with world.engine.begin() as conn:
        bought = world.ledger.start_purchase(conn, user, credits=5, description="A pack")
    with ThreadPoolExecutor(1) as background:
        with world.engine.begin() as conn:
            before[first](conn)
            waiting = background.submit(threads, world, 4, spend_ten, user)
            waiting_for_a_lock(world, 4)
            assert world.ledger.consume(conn, user, key="ours").balance_after == 9
            world.ledger.attach_session(conn, user, bought.id, stripe_session_id="cs_1")
            assert world.ledger.complete_purchase(conn, user, stripe_session_id="cs_1").balance_after == 14
            assert world.ledger.refund(conn, user, bought.id, credits=1, key="back").balance_after == 13
        assert len(new(list(chain.from_iterable(waiting.result(PATIENCE_S))))) == 13
    assert world.deadlocks() == 0


def test_who_refers_to_a_user_does_not_make_those_who_spend_for_it_wait_in_a_circle(world: World) -> None:
    user = world.user(credits=1000)
    done = threading.Event()

    def refer() -> None:
        while not done.is_set():
            with world.engine.begin() as conn:  # the new row's foreign key holds the user, for longer than a call takes
                conn.execute(sa.insert(world.schema.workshops).values(key=uuid4(), owner=user, title="x"))
                done.wait(0.005)

    with ThreadPoolExecutor(2) as background:
        holding = [background.submit(refer) for _ in range(2)]
        try:
            results = list(chain.from_iterable(threads(world, CALLERS, spend_ten, user)))
            results += chain.from_iterable(threads(world, CALLERS, spend_behind_a_change, user))
            results += chain.from_iterable(
                threads(world, CALLERS, spend_behind_a_change, user, isolation="READ COMMITTED")
            )
            results += chain.from_iterable(
                threads(world, CALLERS, spend_behind_a_lock, user, isolation="READ COMMITTED")
            )
        finally:
            done.set()
        for each in holding:
            each.result(PATIENCE_S)
    assert len(new(results)) == 40 * CALLERS
    assert world.deadlocks() == 0


def spend_behind_a_change(world: World, conn: sa.Connection, number: int, user: Key) -> list[Any]:
    """As ``spend_ten``, each behind a change of the user's row, in the same transaction where there is one."""
    users, results = world.schema.users, []
    for _ in range(10):
        with conn.begin():
            conn.execute(sa.update(users).where(users.c.key == user).values(plan_tier=f"{number}"))
            results.append(world.ledger.consume(conn, user, key=f"{uuid4()}"))
    return results


def spend_behind_a_lock(world: World, conn: sa.Connection, number: int, user: Key) -> list[Any]:
    """As ``spend_ten``, each decided in two steps, as the docs tell an app to do that would lock the user itself."""
    results = []
    for _ in range(10):
        with conn.begin():
            assert world.ledger.lock(conn, user) > 0
            results.append(world.ledger.consume(conn, user, key=f"{uuid4()}"))
    return results


def test_two_users_at_each_others_workshops(world: World) -> None:
    users = [world.user(credits=50) for _ in range(2)]
    workshops = [[world.workshop(user) for _ in range(20)] for user in users]

    def cross(world: World, conn: sa.Connection, number: int) -> list[Any]:
        me = number % 2
        order = [(whose, workshop) for whose in (0, 1) for workshop in workshops[whose]]
        random.Random(number).shuffle(order)
        return [(whose == me, outcome(partial(unlock, world, conn, number, users[me], w))) for whose, w in order]

    results = list(chain.from_iterable(threads(world, 8, cross)))
    assert all(isinstance(result, CreditTransaction if mine else WorkshopNotOwned) for mine, result in results)
    assert len(new([result for _, result in results])) == 40


def test_a_callers_own_deadlock_is_a_conflict_to_retry(world: World) -> None:
    """Two database transactions that spend for the same two users in opposite order: PostgreSQL ends one of them."""
    users = [world.user(credits=10), world.user(credits=10)]
    both_hold_one = threading.Barrier(2)

    def transfer(world: World, conn: sa.Connection, number: int) -> int:
        for attempt in range(10):
            try:
                with conn.begin():
                    world.ledger.consume(conn, users[number], key=f"{number} first")
                    if attempt == 0:
                        both_hold_one.wait(PATIENCE_S)
                    world.ledger.consume(conn, users[1 - number], key=f"{number} second")
            except Conflict as conflict:
                assert conflict.retryable
                assert conflict.sqlstate == "40P01"
            else:
                return attempt
        raise AssertionError("still in each other's way")

    assert sum(threads(world, 2, transfer, isolation="READ COMMITTED")) >= 1
    with world.engine.connect() as conn:
        assert [world.ledger.balance(conn, user) for user in users] == [8, 8]


# --- everything at once ---


def live(world: World, conn: sa.Connection, number: int, users: list[Key], workshops: dict[Key, list[Key]]) -> Any:
    """Sixty random operations, each sent once or twice; counts what became of them."""
    rng, ledger, seen = random.Random(number), world.ledger, Counter[str]()
    bought: list[tuple[Key, UUID]] = []

    def call(key: str) -> Callable[[], CreditTransaction]:
        user, workshop = rng.choice([(user, workshop) for user in users for workshop in workshops[user]])
        buyer, purchase = rng.choice(bought)
        amount, back = rng.choice((1, 1, 2, 5)), rng.choice((1, 2, None))
        calls = (
            lambda: ledger.consume(conn, user, credits=amount, key=key),
            lambda: ledger.consume(conn, user, workshop=workshop, key=key),
            lambda: ledger.refund(conn, buyer, purchase, credits=back, key=key),
            lambda: ledger.complete_purchase(conn, buyer, purchase=purchase),
            lambda: ledger.fail_purchase(conn, buyer, purchase=purchase, reason="expired"),
        )
        return rng.choice(calls)

    for n in range(60):
        if n % 4 == 0:
            buyer = rng.choice(users)
            row = ledger.start_purchase(conn, buyer, credits=5, description="A pack", key=f"{number}-{n}")
            bought.append((buyer, row.id))
        else:
            again = call(f"{number}-{n}")
            for _ in range(rng.choice((1, 2))):
                seen[type(outcome(again)).__name__] += 1
    return seen


@pytest.mark.parametrize(("runner", "count"), [("threads", 8), PROCESSES])
def test_all_operations_mixed(world: World, runner: str, count: int) -> None:
    users = [world.user(credits=5) for _ in range(3)]
    workshops = {user: [world.workshop(user) for _ in range(4)] for user in users}
    seen = sum(RUNNERS[runner](world, count, live, users, workshops), Counter[str]())
    assert seen["CreditTransaction"] > 10 * count
    assert set(seen) <= {"CreditTransaction"} | {
        kind.__name__
        for kind in (
            errors.InsufficientCredits,
            errors.RefundExceedsPurchase,
            errors.PurchaseNotCompleted,
            errors.PurchaseNotPending,
        )
    }


@pytest.mark.parametrize("isolation", ["READ COMMITTED", "REPEATABLE READ", "SERIALIZABLE"])
def test_a_hot_account_in_transactions_of_each_isolation(world: World, isolation: str) -> None:
    """Stricter isolation costs retries of the caller's transaction, which ``retryable`` says; never a credit."""
    user = world.user(credits=30)

    def spend(world: World, conn: sa.Connection, number: int) -> list[Any]:
        results = []
        for n in range(6):
            for _ in range(1000):
                try:
                    with translated(), conn.begin():  # COMMIT too may find that another was first
                        spent = world.ledger.consume(conn, user, key=f"{number}-{n}")
                    results.append(spent)
                    break
                except InsufficientCredits as refusal:
                    results.append(refusal)
                    break
                except Conflict as conflict:
                    assert conflict.retryable
        return results

    results = list(chain.from_iterable(threads(world, 6, spend, isolation=isolation)))
    assert sorted(row.balance_after for row in new(results)) == list(range(30))
    assert len(results) == 36


# --- many in one statement ---


def spend_lists(world: World, conn: sa.Connection, number: int, users: list[Key]) -> list[Any]:
    """Lists over all users in this member's own order, single calls, and keys that others use at the same time."""
    rng = random.Random(number)
    results: list[Any] = []
    for n in range(8):
        keys = [f"{number}-{n}-{k}" for k in range(10)] + [f"shared {n}"]
        items = [Consume(user, key=key) for user in users for key in keys]
        rng.shuffle(items)
        for _ in range(1000):
            try:
                results += world.ledger.consume_many(conn, items)
                break
            except Conflict as conflict:
                assert conflict.sqlstate == "40001"
        results.append(outcome(partial(world.ledger.consume, conn, rng.choice(users), key=f"{number}-{n}")))
    return results


def test_lists_and_single_calls_at_once(world: World) -> None:
    users = [world.user(credits=300), world.user(credits=300), world.user(credits=2000)]
    results = list(chain.from_iterable(threads(world, 6, spend_lists, users)))
    spent = new(results)
    with world.engine.connect() as conn:
        left = [world.ledger.balance(conn, user) for user in users]
    assert sum(left) == 2600 - len(spent)
    assert left[:2] == [0, 0]  # 528 items and more for each of them
    assert len({row.id for row in spent}) == len(spent)
    assert all(isinstance(result, CreditTransaction | InsufficientCredits) for result in results)


@pytest.mark.parametrize("isolation", ["READ COMMITTED", "REPEATABLE READ", "SERIALIZABLE"])
def test_lists_in_transactions_of_each_isolation(world: World, isolation: str) -> None:
    """As single calls: stricter isolation costs retries of the whole transaction, and nothing else."""
    users = [world.user(credits=100) for _ in range(3)]
    workshops = {user: [world.workshop(user) for _ in range(5)] for user in users}

    def spend(world: World, conn: sa.Connection, number: int) -> list[Any]:
        rng, results = random.Random(number), []
        for n in range(5):
            items = [Consume(user, key=f"{number}-{n}-{k}") for user in users for k in range(4)]
            items += [Consume(user, key=f"shared {n}") for user in users]
            items += [Consume(user, workshop=rng.choice(workshops[user]), key=f"{number}-{n}") for user in users]
            rng.shuffle(items)
            for _ in range(1000):
                try:
                    with conn.begin():
                        rows = world.ledger.consume_many(conn, items)
                    results += rows
                    break
                except Conflict as conflict:
                    assert conflict.retryable
        return results

    results = list(chain.from_iterable(threads(world, 6, spend, isolation=isolation)))
    assert len(results) == 6 * 5 * 18
    # 120 items and the shared ones for each of them
    assert Counter(row.user_id for row in new(results)) == dict.fromkeys(users, 100)
    assert all(isinstance(result, CreditTransaction | InsufficientCredits) for result in results)


# --- people who change ---


def test_spending_beside_a_change_of_key_loses_nothing(world: World) -> None:
    user = world.user(credits=50)
    changed = uuid4()

    def work(world: World, conn: sa.Connection, number: int) -> list[Any]:
        users = world.schema.users
        if number == 0:
            conn.execute(sa.update(users).where(users.c.key == user).values(key=changed))
            return []
        return [
            outcome(lambda n=n, key=key: world.ledger.consume(conn, key, key=f"{number}-{n}"))
            for n in range(10)
            for key in (user, changed)
        ]

    results = [one for some in threads(world, 5, work) for one in some]
    assert {type(one) for one in results} <= {CreditTransaction, errors.UnknownUser, InsufficientCredits}
    spent = len(new(results))  # a call that has spent under the old key is replayed under the changed one
    with world.engine.connect() as conn:
        assert world.ledger.balance(conn, changed) == 50 - spent


def test_two_accounts_are_merged_into_each_other_at_once(world: World) -> None:
    pairs = [(world.user(credits=3), world.user(credits=4)) for _ in range(8)]

    def work(world: World, conn: sa.Connection, number: int) -> list[Any]:
        found = []
        for one, other in pairs:
            user, into = (one, other) if number % 2 else (other, one)
            found.append(outcome(lambda u=user, i=into: world.ledger.merge(conn, u, into=i, key="m")))
        return found

    results = [one for some in threads(world, 6, work) for one in some]
    assert {type(one) for one in results} == {Merged, errors.UserDeleted}
    with world.engine.connect() as conn:
        for pair in pairs:
            assert sorted(world.ledger.balance(conn, user) for user in pair) == [0, 7]
    assert world.deadlocks() == 0


def test_spending_beside_a_merge_spends_each_credit_once(world: World) -> None:
    user, into = world.user(credits=20), world.user(credits=20)

    def work(world: World, conn: sa.Connection, number: int) -> list[Any]:
        if number == 0:
            return [outcome(lambda: world.ledger.merge(conn, user, into=into, key="m"))]
        return [
            outcome(lambda n=n, who=who: world.ledger.consume(conn, who, key=f"{number}-{n}"))
            for n in range(10)
            for who in (user, into)
        ]

    results = [one for some in threads(world, 5, work) for one in some]
    spent = sum(isinstance(one, CreditTransaction) and one.type == "consumption" for one in results)
    with world.engine.connect() as conn:
        assert world.ledger.balance(conn, user) == 0
        assert world.ledger.balance(conn, into) == 40 - spent
    assert world.deadlocks() == 0


def test_a_purchase_that_starts_while_the_key_changes_is_a_conflict(world: World) -> None:
    """It takes no lock but the foreign key's, which finds the user gone."""
    user, users = world.user(), world.schema.users
    start = partial(world.ledger.start_purchase, credits=1, description="x", key="k")
    with world.engine.connect() as renaming, world.engine.connect() as conn, ThreadPoolExecutor(1) as pool:
        renaming.execute(sa.update(users).where(users.c.key == user).values(key=uuid4()))
        started = pool.submit(start, conn, user)
        waiting_for_a_lock(world, 1)
        renaming.commit()
        with pytest.raises(Conflict):
            started.result(PATIENCE_S)
        conn.rollback()
        with pytest.raises(errors.UnknownUser):
            start(conn, user)


KEYED: dict[str, Callable[..., Any]] = {
    "consume": lambda led, c, user, of: led.consume(c, user, key="k"),
    "hold": lambda led, c, user, of: led.hold(c, user, credits=1, key="k"),
    "grant": lambda led, c, user, of: led.grant(c, user, credits=1, key="k", description="x"),
    "refund": lambda led, c, user, of: led.refund(c, user, of["purchase"], credits=1, key="k"),
    "reinstate": lambda led, c, user, of: led.reinstate(c, user, of["purchase"], credits=1, key="k"),
    "reverse": lambda led, c, user, of: led.reverse(c, user, of["consumption"], credits=1, key="k"),
    "correct": lambda led, c, user, of: led.correct(c, user, of["grant"], credits=1, key="k"),
}


@pytest.mark.parametrize("kind", KEYED)
def test_the_key_of_a_purchase_that_is_starting_is_used(world: World, kind: str) -> None:
    """A purchase starts without the user's lock: the call finds its key only when it writes."""
    ledger, user = world.ledger, world.user(credits=5)
    with world.engine.begin() as conn:
        ledger.consume(conn, user, key="c", credits=2)
        ledger.grant(conn, user, credits=1, key="g", description="x")
        of = {str(row.type): row.id for row in ledger.history(conn, user)}
        ledger.refund(conn, user, of["purchase"], credits=1, key="r")
    with world.engine.connect() as starting, world.autocommit.connect() as conn, ThreadPoolExecutor(1) as pool:
        ledger.start_purchase(starting, user, credits=1, description="x", key="k")
        called = pool.submit(outcome, lambda: KEYED[kind](ledger, conn, user, of))
        waiting_for_a_lock(world, 1)
        starting.commit()
        assert isinstance(called.result(PATIENCE_S), errors.IdempotencyKeyReused)
    assert_ledger_consistent(world)
