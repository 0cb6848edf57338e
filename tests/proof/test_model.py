"""The ledger against a model that fits on two pages: hypothesis looks for calls after which the two differ."""

from __future__ import annotations

import datetime as dt
import itertools
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

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

from parallel import assert_ledger_consistent, declared_functions, functions_called, outcome
from tallystick import Consume, CreditTransaction
from tallystick.errors import Key
from worlds import World


@dataclass
class Lot:
    """Credits that expire, in the order in which they came."""

    days: int
    number: int
    left: int
    credits: int
    gone: int = 0  # expired, or taken back of the row that gave it
    expired: int = 0


@dataclass
class Hold:
    """Credits set aside: live, past its time, released or captured."""

    credits: int
    limit: int
    workshop: Key | None
    state: str = "live"
    charged: int = 0


@dataclass
class Model:
    """One user. Each operation gives the name of the refusal, or None and has happened.

    ``balance`` and ``rows`` are what is written; what has expired is written by the next ``touch``.
    """

    balance: int = 0
    rows: int = 0
    status: dict[Any, str] = field(default_factory=dict)
    left: dict[Any, int] = field(default_factory=dict)
    taken: Counter[Any] = field(default_factory=Counter)
    unlocked: set[Key | None] = field(default_factory=set)
    holds: dict[Any, Hold] = field(default_factory=dict)
    lots: list[Lot] = field(default_factory=list)
    lot_of: dict[Any, Lot] = field(default_factory=dict)
    used: dict[Any, dict[int, int]] = field(default_factory=dict)  # row → lot's number → credits of it
    opened: dict[Any, Key | None] = field(default_factory=dict)  # consumption → its workshop
    last: dict[Any, int | None] = field(default_factory=dict)  # purchase → the days that its credits last
    numbers: Iterator[int] = field(default_factory=itertools.count)  # of lots; accounts that are merged share them

    @property
    def held(self) -> int:
        return sum(hold.credits for hold in self.holds.values() if hold.state == "live")

    @property
    def seen(self) -> int:
        """The balance as it is read: without what has expired and is not written yet."""
        gone = sum(lot.left for lot in self.lots if lot.days <= 0)
        return self.balance - min(gone, max(self.balance - self.held, 0))

    def wait(self, days: int) -> None:
        for hold in self.holds.values():
            hold.state = "late" if hold.state == "live" else hold.state
        for lot in self.lots:
            lot.days -= days

    def touch(self) -> None:
        for lot in sorted(self.lots, key=lambda lot: (lot.days, lot.number)):
            if lot.days <= 0 and lot.left:
                gone = min(lot.left, max(self.balance - self.held, 0))
                if gone:
                    self.move(-gone)
                lot.gone, lot.expired = lot.gone + gone, lot.expired + gone
                lot.left = min(lot.left - gone, self.held)

    def move(self, amount: int) -> None:
        self.balance, self.rows = self.balance + amount, self.rows + 1

    def take(self, row: Any, amount: int, *, expired: bool = False) -> None:
        """Take ``amount`` from the lots, from those that expire soonest first."""
        for lot in sorted(self.lots, key=lambda lot: (lot.days, lot.number)):
            if lot.left and amount > 0 and (expired or lot.days > 0):
                some = min(lot.left, amount)
                lot.left, amount = lot.left - some, amount - some
                uses = self.used.setdefault(row, {})
                uses[lot.number] = uses.get(lot.number, 0) + some

    def take_back(self, row: Any, amount: int) -> None:
        """From its own lot, then what the balance no longer covers."""
        if own := self.lot_of.get(row):
            some, uses = min(own.left, amount), self.used.setdefault(row, {})
            own.left, own.gone, uses[own.number] = own.left - some, own.gone + amount, uses.get(own.number, 0) + some
        uncovered = sum(lot.left for lot in self.lots) - max(self.balance, 0)
        self.take(row, uncovered, expired=True)

    def give_back(self, row: Any, amount: int, most: int) -> None:
        uses = self.used.get(row, {})
        amount -= max(most - sum(uses.values()), 0)  # what came from no lot goes to none
        amount = min(amount, max(self.balance - sum(lot.left for lot in self.lots), 0))  # nor what pays a debt
        for lot in sorted(self.lots, key=lambda lot: (-lot.days, -lot.number)):
            some = min(max(amount, 0), uses.get(lot.number, 0), lot.credits - lot.gone - lot.left)
            if some > 0:
                lot.left, amount, uses[lot.number] = lot.left + some, amount - some, uses[lot.number] - some
        self.touch()

    def consume(self, amount: int, workshop: Key | None = None) -> str | None:
        self.touch()
        if workshop in self.unlocked:
            return None
        if amount > self.balance - self.held:
            return "InsufficientCredits"
        self.unlocked |= {workshop} - {None}
        self.move(-amount)
        return None

    def spent(self, row: Any, amount: int, workshop: Key | None = None, *, expired: bool = False) -> None:
        """After a consumption, when the name of its row is known."""
        self.take(row, amount, expired=expired)
        self.left[row], self.opened[row] = amount, workshop

    def reverse(self, row: Any, credits: int | None) -> str | None:
        self.touch()
        asked = self.left[row] if credits is None else credits
        if not 0 < asked <= self.left[row]:
            return "ReversalExceedsConsumption"
        most, self.left[row] = self.left[row], self.left[row] - asked
        if not self.left[row]:
            self.unlocked.discard(self.opened[row])
        self.move(asked)
        self.give_back(row, asked, most)
        return None

    def grant(self, credits: int) -> None:
        self.touch()
        self.move(credits)

    def granted(self, row: Any, credits: int, days: int | None) -> None:
        self.left[row] = credits
        if days is not None:
            self.lot_of[row] = self.open(days, next(self.numbers), credits)

    def open(self, days: int, number: int, credits: int) -> Lot:
        """A lot of credits that have come, less the debt that they paid."""
        covered = max(self.balance - sum(lot.left for lot in self.lots), 0)
        self.lots.append(lot := Lot(days, number, min(credits, covered), credits))
        return lot

    def expired(self, row: Any) -> int:
        return lot.expired if (lot := self.lot_of.get(row)) else 0

    def merge(self, other: Model) -> int:
        """Take all credits of an account that has no holds and no debt: each lot by itself, then the rest."""
        self.touch()
        other.touch()
        all_of_it = other.balance
        for lot in sorted(other.lots, key=lambda lot: (lot.days, lot.number)):
            if some := lot.left:
                lot.left = 0
                other.move(-some)
                self.move(some)
                self.open(lot.days, lot.number, some)
        if rest := other.balance:
            other.move(-rest)
            self.move(rest)
        return all_of_it

    def correct(self, row: Any, credits: int | None) -> str | None:
        self.touch()
        most = self.left[row] - self.expired(row)
        asked = most if credits is None else credits
        if not 0 < asked <= most:
            return "CorrectionExceedsGrant"
        self.left[row] -= asked
        self.move(-asked)
        self.take_back(row, asked)
        return None

    def hold(self, credits: int) -> str | None:
        self.touch()
        return "InsufficientCredits" if credits > self.balance - self.held else None

    def capture(self, row: Any, credits: int | None, *, debt: bool) -> str | None:
        self.touch()
        hold = self.holds[row]
        charged = credits or (hold.charged if hold.state == "captured" else hold.credits)
        if hold.state == "captured":
            return None if charged == hold.charged else "IdempotencyKeyReused"
        if hold.workshop in self.unlocked:
            hold.state = "released" if hold.state == "live" else hold.state
            self.touch()
            return None
        if hold.state == "released":
            return "HoldClosed"
        if charged > hold.limit:
            return "CaptureExceedsHold"
        own = hold.credits if hold.state == "live" else 0
        if charged > self.balance - (self.held - own) and not debt:
            return "InsufficientCredits"
        hold.state, hold.charged = "captured", charged
        self.unlocked |= {hold.workshop} - {None}
        self.move(-charged)
        self.spent(row, charged, hold.workshop, expired=True)
        self.touch()
        return None

    def release(self, row: Any) -> str | None:
        self.touch()
        hold = self.holds[row]
        if hold.state == "captured":
            return "HoldClosed"
        hold.state = "released"
        self.touch()
        return None

    def complete(self, purchase: Any) -> None:
        self.touch()
        if self.status[purchase] != "completed":
            self.status[purchase] = "completed"
            self.move(self.left[purchase])
            self.granted(purchase, self.left[purchase], self.last[purchase])

    def fail(self, purchase: Any) -> str | None:
        if self.status[purchase] == "completed":
            return "PurchaseNotPending"
        self.status[purchase] = "failed"
        return None

    def refund(self, purchase: Any, credits: int | None) -> str | None:
        self.touch()
        if self.status[purchase] != "completed":
            return "PurchaseNotCompleted"
        most = self.left[purchase] - self.expired(purchase)
        asked = most if credits is None else credits
        if not 0 < asked <= most:
            return "RefundExceedsPurchase"
        self.left[purchase] -= asked
        self.taken[purchase] += asked
        self.move(-asked)
        self.take_back(purchase, asked)
        return None

    def reinstate(self, purchase: Any, credits: int | None) -> str | None:
        self.touch()
        asked = self.taken[purchase] if credits is None else credits
        if not 0 < asked <= self.taken[purchase]:
            return "ReinstatementExceedsRefunds"
        most = self.taken[purchase]
        self.left[purchase] += asked
        self.taken[purchase] -= asked
        if own := self.lot_of.get(purchase):
            own.gone -= asked
        self.move(asked)
        self.give_back(purchase, asked, most)
        return None


class Machine(RuleBasedStateMachine):
    purchases = Bundle("purchases")
    done = Bundle("done")  # calls that were made with a key: (the call, the row it gave)
    spendings = Bundle("spendings")
    gifts = Bundle("gifts")
    holds = Bundle("holds")

    def __init__(self, world: World) -> None:
        super().__init__()
        self.world, self.ledger, self.calls = world, world.ledger, 0
        self.model = Model()
        self.aside = Model(numbers=self.model.numbers)

    @initialize()
    def begin(self) -> None:
        self.conn = self.world.autocommit.connect()
        self.user, self.duplicate = self.world.user(), self.world.user()
        self.workshops = [self.world.workshop(self.user) for _ in range(3)]
        self.ledger.grant(self.conn, self.user, credits=6, key="welcome", description="Welcome")
        self.model.move(6)

    def key(self) -> str:
        self.calls += 1
        return f"call {self.calls}"

    def agree(
        self, expected: str | None, call: Callable[[], CreditTransaction], *, held: int = 0
    ) -> CreditTransaction | None:
        """The ledger did the same as the model; ``held`` is the number of credits that the call sets aside."""
        found = outcome(call)
        assert (None if isinstance(found, CreditTransaction) else type(found).__name__) == expected
        with self.world.autocommit.connect() as another:
            now = self.ledger.standing(another, self.user)
        assert (now.balance, now.held) == (self.model.seen, self.model.held + (held if expected is None else 0))
        if expected is not None:
            return None
        # a reversal into a lot that has expired is followed by what expires again
        if not found.replayed and found.status == "completed" and found.balance == found.balance_after:
            assert (found.balance_after, found.sequence) == (self.model.balance, self.model.rows)
        return found

    @rule(target=purchases, credits=st.integers(1, 6), days=st.none() | st.integers(1, 4))
    def start(self, credits: int, days: int | None) -> Any:
        key = self.key()
        lasts = None if days is None else dt.timedelta(days=days - 0.5)  # as in grant
        row = self.agree(
            None,
            lambda: self.ledger.start_purchase(
                self.conn, self.user, credits=credits, description="A", key=key, expires_after=lasts
            ),
        )
        assert row is not None
        self.model.status[row.id], self.model.left[row.id], self.model.last[row.id] = "pending", credits, days
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

    @rule(target=spendings, amount=st.integers(1, 8))
    def consume(self, amount: int) -> Any:
        key = self.key()
        expected = self.model.consume(amount)
        row = self.agree(expected, lambda: self.ledger.consume(self.conn, self.user, credits=amount, key=key))
        return self.spent(row, amount)

    def spent(self, row: CreditTransaction | None, amount: int, workshop: Key | None = None) -> Any:
        if row is None or row.replayed:
            return multiple()
        self.model.spent(row.id, amount, workshop)
        return row.id

    @rule(target=spendings, which=st.integers(0, 2))
    def unlock(self, which: int) -> Any:
        key, workshop = self.key(), self.workshops[which]
        expected = self.model.consume(1, workshop)
        row = self.agree(expected, lambda: self.ledger.consume(self.conn, self.user, workshop=workshop, key=key))
        return self.spent(row, 1, workshop)

    @rule(target=done, row=spendings, credits=st.none() | st.integers(1, 8))
    def reverse(self, row: Any, credits: int | None) -> Any:
        key = self.key()
        return self.keyed(
            self.model.reverse(row, credits),
            lambda: self.ledger.reverse(self.conn, self.user, row, credits=credits, key=key),
        )

    @rule(target=holds, credits=st.integers(1, 5), more=st.integers(0, 3), which=st.none() | st.integers(0, 2))
    def hold(self, credits: int, more: int, which: int | None) -> Any:
        key, workshop = self.key(), None if which is None else self.workshops[which]
        if workshop in self.model.unlocked:
            return multiple()
        row = self.agree(
            self.model.hold(credits),
            lambda: self.ledger.hold(
                self.conn,
                self.user,
                credits=credits,
                key=key,
                workshop=workshop,
                capture_limit=credits + more,
            ),
            held=credits,
        )
        if row is None:
            return multiple()
        self.model.holds[row.id] = Hold(credits, credits + more, workshop)
        return row.id

    @rule(target=spendings, row=holds, credits=st.none() | st.integers(1, 8), debt=st.booleans())
    def capture(self, row: Any, credits: int | None, *, debt: bool) -> Any:
        before = self.model.holds[row].state
        expected = self.model.capture(row, credits, debt=debt)
        found = self.agree(
            expected, lambda: self.ledger.capture(self.conn, self.user, row, credits=credits, allow_debt=debt)
        )
        is_new = found is not None and found.id == row and before != self.model.holds[row].state == "captured"
        return row if is_new else multiple()

    @rule(row=holds)
    def release(self, row: Any) -> None:
        self.agree(self.model.release(row), lambda: self.ledger.release(self.conn, self.user, row))

    @rule(days=st.integers(1, 3))
    def wait(self, days: int) -> None:
        self.world.pass_time(days=days)
        self.model.wait(days)
        self.aside.wait(days)

    @rule()
    def sweep(self) -> None:
        self.ledger.sweep(self.conn)
        self.model.touch()
        self.aside.touch()
        with self.world.autocommit.connect() as another:
            assert self.ledger.balance(another, self.user) == self.model.balance

    @rule()
    def lots(self) -> None:
        live = sorted((lot.days, lot.number, lot.left) for lot in self.model.lots if lot.left and lot.days > 0)
        found = self.ledger.lots(self.conn, self.user)
        assert [lot.remaining for lot in found] == [left for *_, left in live]

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
                self.model.spent(row.id, item.credits, item.workshop)
        with self.world.autocommit.connect() as another:
            assert self.ledger.balance(another, self.user) == self.model.seen
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

    @rule(target=gifts, credits=st.integers(1, 4), days=st.none() | st.integers(1, 4))
    def grant(self, credits: int, days: int | None) -> Any:
        key, soon = self.key(), None
        if days is not None:
            # half a day before, so that days passed are days, however long the test takes
            soon = dt.datetime.now(dt.UTC) + dt.timedelta(days=days - 0.5)
        self.model.grant(credits)
        row = self.agree(
            None,
            lambda: self.ledger.grant(
                self.conn, self.user, credits=credits, key=key, description="A gift", expires_at=soon
            ),
        )
        assert row is not None
        self.model.granted(row.id, credits, days)
        return row.id

    @rule(row=gifts, credits=st.none() | st.integers(1, 5))
    def correct(self, row: Any, credits: int | None) -> None:
        key = self.key()
        expected = self.model.correct(row, credits)
        self.agree(expected, lambda: self.ledger.correct(self.conn, self.user, row, credits=credits, key=key))

    @rule(credits=st.integers(1, 4), days=st.none() | st.integers(1, 4), spent=st.integers(0, 3))
    def fund_the_duplicate(self, credits: int, days: int | None, spent: int) -> None:
        soon = None if days is None else dt.datetime.now(dt.UTC) + dt.timedelta(days=days - 0.5)
        self.aside.grant(credits)
        row = self.ledger.grant(
            self.conn, self.duplicate, credits=credits, key=self.key(), description="A gift", expires_at=soon
        )
        self.aside.granted(row.id, credits, days)
        if spent and self.aside.consume(spent) is None:
            row = self.ledger.consume(self.conn, self.duplicate, credits=spent, key=self.key())
            self.aside.spent(row.id, spent)

    @rule()
    def merge(self) -> None:
        moved = self.model.merge(self.aside)
        merged = self.ledger.merge(self.conn, self.duplicate, into=self.user, key=self.key())
        assert (merged.credits, merged.balance) == (moved, self.model.balance)
        self.world.accounts.restore_user(self.conn, self.duplicate)
        with self.world.autocommit.connect() as another:
            now = self.ledger.standing(another, self.user)
            assert (now.balance, now.held) == (self.model.balance, self.model.held)
            assert self.ledger.balance(another, self.duplicate) == 0

    @rule(call=consumes(done))
    def again(self, call: Any) -> None:
        """A call that was done is a replay, with the same answer. A refused call left its key free: skip it.

        So is the key of a workshop that was unlocked already: it is charged, once that was reversed.
        """
        again, first = call
        if first is not None and not first.replayed:
            repeated = again()
            assert repeated.replayed
            assert repeated.id == first.id
            assert repeated.balance_after == first.balance_after

    def teardown(self) -> None:
        self.conn.close()


def test_no_sequence_of_calls_tells_the_ledger_from_its_model(world: World) -> None:
    seen = functions_called(world.engine)
    # sessions are Stripe's names for a purchase and move nothing; the others only read
    called = declared_functions() - {"attach_session", "lock", "balance_at", "history", "access"} | {"restore_user"}
    for _ in range(5):
        run_state_machine_as_test(
            lambda: Machine(world),
            settings=settings(
                max_examples=120,
                stateful_step_count=40,
                deadline=None,
                database=None,
                suppress_health_check=list(HealthCheck),
            ),
        )
        if seen >= called:  # seldom, the sequences of a run leave one out
            break
    assert_ledger_consistent(world)
    assert seen == called
