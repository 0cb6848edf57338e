"""A consumption given back, and a grant taken back: each linked to what it is about, and bounded by it."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from tallystick import errors as e
from tallystick.audit import audit
from worlds import SHAPES, World

WITH_WORKSHOPS = [name for name, shape in SHAPES.items() if shape.host.workshops is not None]


@pytest.fixture(autouse=True)
def _ledger_is_consistent(request: pytest.FixtureRequest) -> Iterator[None]:
    """Every test ends with a clean audit."""
    world: World = request.getfixturevalue("any_world" if "any_world" in request.fixturenames else "world")
    yield
    with world.engine.connect() as conn:
        report = audit(conn, world.config)
    assert not report.findings


def test_a_consumption_is_reversed_in_parts_and_never_above_itself(any_world: World):
    ledger, user = any_world.ledger, any_world.user(credits=5)
    with any_world.engine.begin() as conn:
        spent = ledger.consume(conn, user, credits=4, key="job", description="A job")
        back = ledger.reverse(conn, user, spent.id, credits=1, key="r1")
        assert (back.type, back.amount, back.balance_after, back.refund_of) == ("reversal", 1, 2, spent.id)
        assert back.description == "Reversed: A job"
        assert ledger.reverse(conn, user, spent.id, credits=1, key="r1").replayed
        with pytest.raises(e.ReversalExceedsConsumption) as refused:
            ledger.reverse(conn, user, spent.id, credits=4, key="r2")
        assert (refused.value.left, refused.value.asked) == (3, 4)
        assert ledger.reverse(conn, user, spent.id, key="rest").amount == 3
        with pytest.raises(e.ReversalExceedsConsumption):
            ledger.reverse(conn, user, spent.id, key="once more")
        assert ledger.balance(conn, user) == 5


@pytest.mark.parametrize("any_world", WITH_WORKSHOPS, indirect=True)
def test_a_whole_reversal_locks_the_workshop_and_unlocking_charges_again(any_world: World):
    ledger, user = any_world.ledger, any_world.user(credits=4)
    workshop = any_world.workshop(user)
    with any_world.engine.begin() as conn:
        spent = ledger.consume(conn, user, workshop=workshop, credits=2, key="unlock")
        part = ledger.reverse(conn, user, spent.id, credits=1, key="part")
        assert part.workshop_id is None
        assert ledger.access(conn, workshop).reason == "unlocked"
        whole = ledger.reverse(conn, user, spent.id, key="whole")
        assert whole.workshop_id == workshop
        assert ledger.access(conn, workshop).reason != "unlocked"
        again = ledger.consume(conn, user, workshop=workshop, credits=2, key="unlock again")
        assert (again.replayed, again.balance_after) == (False, 2)
        assert ledger.consume(conn, user, workshop=workshop, credits=2, key="and again").id == again.id


def test_what_is_no_consumption_of_the_user_is_not_reversed(world: World):
    ledger, user, other = world.ledger, world.user(credits=3), world.user(credits=3)
    with world.engine.begin() as conn:
        bought = ledger.history(conn, user)[0]
        spent = ledger.consume(conn, user, key="c")
        held = ledger.hold(conn, user, credits=1, key="h")
        for who, what in ((user, bought.id), (other, spent.id), (user, held.id)):
            with pytest.raises(e.UnknownConsumption):
                ledger.reverse(conn, who, what, key="r")
        ledger.capture(conn, user, held.id)
        assert ledger.reverse(conn, user, held.id, key="captured").balance_after == 2
        with pytest.raises(e.IdempotencyKeyReused):
            ledger.reverse(conn, user, spent.id, key="captured")


def test_a_mistaken_grant_is_corrected_beyond_what_is_left(any_world: World):
    ledger, user = any_world.ledger, any_world.user()
    with any_world.engine.begin() as conn:
        given = ledger.grant(conn, user, credits=5, key="g", description="Goodwill")
        ledger.consume(conn, user, credits=4, key="c")
        part = ledger.correct(conn, user, given.id, credits=1, key="k")
        assert (part.type, part.amount, part.balance_after, part.refund_of) == ("correction", -1, 0, given.id)
        assert part.description == "Corrected: Goodwill"
        assert ledger.correct(conn, user, given.id, key="rest").balance_after == -4
        assert ledger.correct(conn, user, given.id, key="rest").replayed
        with pytest.raises(e.CorrectionExceedsGrant):
            ledger.correct(conn, user, given.id, key="more")


def test_only_grants_are_corrected(world: World):
    ledger, user = world.ledger, world.user(credits=3)
    with world.engine.begin() as conn:
        bought = ledger.history(conn, user)[0]
        ledger.refund(conn, user, bought.id, key="refund")
        back = ledger.reinstate(conn, user, bought.id, key="won")
        for what in (bought.id, back.id):
            with pytest.raises(e.UnknownGrant):
                ledger.correct(conn, user, what, key="k")


def test_whoever_and_however_often_asks(world: World):
    ledger, user = world.ledger, world.user(credits=10)
    with world.engine.begin() as conn:
        spent = ledger.consume(conn, user, credits=10, key="job")

    def one(number: int) -> int:
        with world.engine.begin() as conn:
            try:
                return ledger.reverse(conn, user, spent.id, credits=3, key=f"{number % 8}").amount
            except e.ReversalExceedsConsumption:
                return 0

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(one, range(32)))
    with world.engine.begin() as conn:
        assert ledger.balance(conn, user) == 9
