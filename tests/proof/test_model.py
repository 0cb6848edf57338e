"""The ledger against a model that fits on half a page: hypothesis looks for calls after which the two differ."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import sqlalchemy as sa
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    multiple,
    rule,
    run_state_machine_as_test,
)

from crowd import books_balance, declared_functions, functions_called, outcome
from tallystick import Consume, CreditTransaction
from tallystick.errors import Key
from worlds import World


@dataclass
class Model:
    """One user. Each operation gives the name of the refusal, or None and has happened."""

    balance: int = 0
    rows: int = 0
    status: dict[Any, str] = field(default_factory=dict)
    left: dict[Any, int] = field(default_factory=dict)
    taken: Counter[Any] = field(default_factory=Counter)
    unlocked: set[Key | None] = field(default_factory=set)

    def move(self, amount: int) -> None:
        self.balance, self.rows = self.balance + amount, self.rows + 1

    def consume(self, amount: int, workshop: Key | None = None) -> str | None:
        if workshop in self.unlocked:
            return None
        if amount > self.balance:
            return "InsufficientCredits"
        self.unlocked |= {workshop} - {None}
        return self.move(-amount)

    def complete(self, purchase: Any) -> None:
        if self.status[purchase] != "completed":
            self.status[purchase] = "completed"
            self.move(self.left[purchase])

    def fail(self, purchase: Any) -> str | None:
        if self.status[purchase] == "completed":
            return "PurchaseNotPending"
        self.status[purchase] = "failed"
        return None

    def refund(self, purchase: Any, credits: int | None) -> str | None:
        if self.status[purchase] != "completed":
            return "PurchaseNotCompleted"
        asked = self.left[purchase] if credits is None else credits
        if not 0 < asked <= self.left[purchase]:
            return "RefundExceedsPurchase"
        self.left[purchase] -= asked
        self.taken[purchase] += asked
        return self.move(-asked)

    def reinstate(self, purchase: Any, credits: int | None) -> str | None:
        asked = self.taken[purchase] if credits is None else credits
        if not 0 < asked <= self.taken[purchase]:
            return "ReinstatementExceedsRefunds"
        self.left[purchase] += asked
        self.taken[purchase] -= asked
        return self.move(asked)


class Machine(RuleBasedStateMachine):
    purchases = Bundle("purchases")
    done = Bundle("done")  # calls that were made with a key: (the call, the row it gave)

    def __init__(self, world: World) -> None:
        super().__init__()
        self.world, self.ledger, self.calls = world, world.ledger, 0
        self.model = Model()

    @initialize()
    def begin(self) -> None:
        self.conn = self.world.autocommit.connect()
        self.user = self.world.user()
        self.workshops = [self.world.workshop(self.user) for _ in range(3)]

    def key(self) -> str:
        self.calls += 1
        return f"call {self.calls}"

    def agree(self, expected: str | None, call: Callable[[], CreditTransaction]) -> CreditTransaction | None:
        found = outcome(call)
        assert (None if isinstance(found, CreditTransaction) else type(found).__name__) == expected
        with self.world.autocommit.connect() as another:
            assert self.ledger.balance(another, self.user) == self.model.balance
        if expected is not None:
            return None
        if not found.replayed and found.status == "completed":
            assert (found.balance_after, found.sequence) == (self.model.balance, self.model.rows)
        return found

    @rule(target=purchases, credits=st.integers(1, 6))
    def start(self, credits: int) -> Any:
        key = self.key()
        row = self.agree(
            None, lambda: self.ledger.start_purchase(self.conn, self.user, credits=credits, description="A", key=key)
        )
        assert row is not None
        self.model.status[row.id], self.model.left[row.id] = "pending", credits
        return row.id

    @rule(purchase=purchases)
    def complete(self, purchase: Any) -> None:
        self.model.complete(purchase)
        self.agree(None, lambda: self.ledger.complete_purchase(self.conn, self.user, purchase=purchase))

    @rule(purchase=purchases)
    def fail(self, purchase: Any) -> None:
        expected = self.model.fail(purchase)
        self.agree(
            expected, lambda: self.ledger.fail_purchase(self.conn, self.user, purchase=purchase, reason="expired")
        )

    def keyed(self, expected: str | None, call: Callable[[], CreditTransaction]) -> Any:
        row = self.agree(expected, call)
        return (call, row)

    @rule(target=done, amount=st.integers(1, 8))
    def consume(self, amount: int) -> Any:
        key = self.key()
        return self.keyed(
            self.model.consume(amount), lambda: self.ledger.consume(self.conn, self.user, credits=amount, key=key)
        )

    @rule(target=done, which=st.integers(0, 2))
    def unlock(self, which: int) -> Any:
        key, workshop = self.key(), self.workshops[which]
        return self.keyed(
            self.model.consume(1, workshop),
            lambda: self.ledger.consume(self.conn, self.user, workshop=workshop, key=key),
        )

    @rule(target=done, wanted=st.lists(st.tuples(st.integers(1, 5), st.none() | st.integers(0, 2)), max_size=5))
    def many(self, wanted: list[tuple[int, int | None]]) -> Any:
        """Each as if by itself, in order; and each is known by its key afterwards."""
        items = [
            Consume(
                self.user, workshop=None if which is None else self.workshops[which], credits=amount, key=self.key()
            )
            for amount, which in wanted
        ]
        found = self.ledger.consume_many(self.conn, items)
        assert len(found) == len(items)
        for item, row in zip(items, found, strict=True):
            expected = self.model.consume(item.credits, item.workshop)
            assert (None if isinstance(row, CreditTransaction) else type(row).__name__) == expected
            if isinstance(row, CreditTransaction) and not row.replayed:
                assert (row.balance_after, row.sequence) == (self.model.balance, self.model.rows)
        with self.world.autocommit.connect() as another:
            assert self.ledger.balance(another, self.user) == self.model.balance
        return multiple(
            *(
                (self.alone(item), row if isinstance(row, CreditTransaction) else None)
                for item, row in zip(items, found, strict=True)
            )
        )

    def alone(self, item: Consume) -> Callable[[], CreditTransaction]:
        return lambda: self.ledger.consume(
            self.conn, item.user, workshop=item.workshop, credits=item.credits, key=item.key
        )

    @rule(target=done, purchase=purchases, credits=st.none() | st.integers(1, 7))
    def refund(self, purchase: Any, credits: int | None) -> Any:
        key = self.key()
        return self.keyed(
            self.model.refund(purchase, credits),
            lambda: self.ledger.refund(self.conn, self.user, purchase, credits=credits, key=key),
        )

    @rule(target=done, purchase=purchases, credits=st.none() | st.integers(1, 7))
    def reinstate(self, purchase: Any, credits: int | None) -> Any:
        key = self.key()
        return self.keyed(
            self.model.reinstate(purchase, credits),
            lambda: self.ledger.reinstate(self.conn, self.user, purchase, credits=credits, key=key),
        )

    @rule(target=done, credits=st.integers(1, 3))
    def grant(self, credits: int) -> Any:
        key = self.key()
        self.model.move(credits)
        return self.keyed(
            None, lambda: self.ledger.grant(self.conn, self.user, credits=credits, key=key, description="A gift")
        )

    @rule(call=consumes(done))
    def again(self, call: Any) -> None:
        """What was done comes back as it was; what was refused was not done, so its key is free: leave it."""
        again, first = call
        if first is not None:
            repeated = again()
            assert repeated.replayed
            assert repeated.id == first.id
            assert repeated.balance_after == first.balance_after

    def teardown(self) -> None:
        self.conn.close()


def test_no_sequence_of_calls_tells_the_ledger_from_its_model(world: World) -> None:
    world.engine = sa.create_engine(world.url)  # connecting anew would take most of the time here
    world.autocommit = world.engine.execution_options(isolation_level="AUTOCOMMIT")
    seen = functions_called(world.engine)
    run_state_machine_as_test(
        lambda: Machine(world),
        settings=settings(
            max_examples=50,
            stateful_step_count=30,
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
    books_balance(world)
    # sessions are Stripe's names for a purchase and move nothing; the others only read
    assert seen == declared_functions() - {"attach_session", "lock", "balance_at", "history", "access"}
    world.engine.dispose()
