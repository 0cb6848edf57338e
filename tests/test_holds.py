"""Credits set aside for work under way: hold, then capture or release, or neither and time passes."""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import sqlalchemy as sa

from tallystick import CreditTransaction
from tallystick import errors as e
from tallystick.audit import audit
from tallystick.errors import Key
from tallystick.ledger.outcomes import Refusal, error_of
from tallystick.schema import INT32_MAX
from worlds import SHAPES, World

MINUTE = dt.timedelta(minutes=1)


WITH_WORKSHOPS = [name for name, shape in SHAPES.items() if shape.host.workshops is not None]


@pytest.fixture(autouse=True)
def _ledger_is_consistent(request: pytest.FixtureRequest) -> Iterator[None]:
    """Every test ends with a clean audit."""
    world: World = request.getfixturevalue("any_world" if "any_world" in request.fixturenames else "world")
    yield
    with world.engine.connect() as conn:
        report = audit(conn, world.config)
    assert not report.findings


def standing(world: World, conn: sa.Connection, user: Key) -> tuple[int, int, int]:
    now = world.ledger.standing(conn, user)
    return now.balance, now.held, now.available


def test_a_hold_is_charged_for_what_the_work_took(any_world: World):
    ledger, user = any_world.ledger, any_world.user(credits=5)
    with any_world.engine.begin() as conn:
        held = ledger.hold(conn, user, credits=3, key="answer-1", description="An answer", metadata={"model": "m"})
        assert (held.type, held.status, held.amount, held.balance, held.sequence) == (
            "consumption",
            "pending",
            -3,
            5,
            None,
        )
        assert held.expires_at is not None
        assert standing(any_world, conn, user) == (5, 3, 2)
        charged = ledger.capture(conn, user, held.id, credits=2)
        assert (charged.id, charged.status, charged.amount, charged.balance_after) == (held.id, "completed", -2, 3)
        assert (charged.description, charged.metadata, charged.sequence) == ("An answer", {"model": "m"}, 2)
        assert standing(any_world, conn, user) == (3, 0, 3)
        again = ledger.capture(conn, user, held.id, credits=2)
        assert (again.id, again.replayed) == (held.id, True)
        with pytest.raises(e.IdempotencyKeyReused):
            ledger.capture(conn, user, held.id, credits=1)
        with pytest.raises(e.HoldClosed, match="captured already"):
            ledger.release(conn, user, held.id)


def test_a_hold_is_given_up(any_world: World):
    ledger, user = any_world.ledger, any_world.user(credits=3)
    with any_world.engine.begin() as conn:
        held = ledger.hold(conn, user, credits=3, key="h")
        given_up = ledger.release(conn, user, held.id)
        assert (given_up.id, given_up.status, given_up.balance_after) == (held.id, "failed", None)
        assert given_up.description.endswith(" (released)")
        assert ledger.release(conn, user, held.id).replayed
        assert standing(any_world, conn, user) == (3, 0, 3)
        with pytest.raises(e.HoldClosed, match=r"released\. Place another one, with another key"):
            ledger.capture(conn, user, held.id)


def test_the_key_of_a_hold_that_has_ended_sets_nothing_aside(any_world: World):
    """The page tells a job that is tried again to look at the status."""
    ledger, user = any_world.ledger, any_world.user(credits=3)
    with any_world.engine.begin() as conn:
        assert ledger.hold(conn, user, credits=1, key="h").status == "pending"
        again = ledger.hold(conn, user, credits=1, key="h")
        assert (again.status, again.replayed) == ("pending", True)
        ledger.release(conn, user, again.id)
        charged = ledger.hold(conn, user, credits=1, key="c")
        ledger.capture(conn, user, charged.id)
        for key, status in (("h", "failed"), ("c", "completed")):
            ended = ledger.hold(conn, user, credits=1, key=key)
            assert (ended.status, ended.replayed) == (status, True)
        assert standing(any_world, conn, user) == (2, 0, 2)


def test_what_is_held_is_not_spent_and_every_refusal_tells_all_three(world: World):
    ledger, user = world.ledger, world.user(credits=5)
    with world.engine.begin() as conn:
        ledger.hold(conn, user, credits=4, key="h")
        for spend in (
            lambda: ledger.consume(conn, user, credits=2, key="c"),
            lambda: ledger.hold(conn, user, credits=2, key="h2"),
        ):
            with pytest.raises(
                e.InsufficientCredits, match=r"5 credits, of which holds keep 4 and 1 can be spent"
            ) as r:
                spend()
            assert (r.value.balance, r.value.held, r.value.available, r.value.required) == (5, 4, 1, 2)
        assert ledger.consume(conn, user, key="one is left").balance_after == 4
        [refused, _] = [
            *ledger.consume_many(conn, [world_item(user, "m")]),
            None,
        ]
        assert isinstance(refused, e.InsufficientCredits)
        assert refused.available == 0


def world_item(user: Key, key: str):
    from tallystick import Consume

    return Consume(user, key=key)


def test_an_expired_hold_counts_as_released_before_anything_has_run(world: World):
    ledger, user = world.ledger, world.user(credits=3)
    with world.engine.begin() as conn:
        held = ledger.hold(conn, user, credits=3, key="h", expires_in=MINUTE)
    world.pass_time(minutes=2)
    with world.engine.begin() as conn:
        assert standing(world, conn, user) == (3, 0, 3)
        assert ledger.history(conn, user)[0].status == "pending"
        assert ledger.consume(conn, user, credits=2, key="c").balance_after == 1
        [row] = [row for row in ledger.history(conn, user, include_failed=True) if row.id == held.id]
        assert (row.status, row.description) == ("failed", "Credit consumed (expired)")
        assert ledger.release(conn, user, held.id).replayed


@pytest.mark.parametrize("touched", [True, False])
def test_a_late_capture_charges_where_the_credits_are_there_and_says_so(world: World, touched: bool):
    ledger, user, poor = world.ledger, world.user(credits=3), world.user(credits=3)
    with world.engine.begin() as conn:
        held = ledger.hold(conn, user, credits=3, key="h", expires_in=MINUTE)
        other = ledger.hold(conn, poor, credits=3, key="h", expires_in=MINUTE)
    world.pass_time(minutes=2)
    with world.engine.begin() as conn:
        if touched:
            assert ledger.sweep(conn) == 2
        late = ledger.capture(conn, user, held.id)
        assert (late.status, late.balance_after) == ("completed", 0)
        assert late.description == "Credit consumed (captured late)"
        ledger.consume(conn, poor, key="meanwhile")
        with pytest.raises(e.InsufficientCredits):
            ledger.capture(conn, poor, other.id)
        owed = ledger.capture(conn, poor, other.id, allow_debt=True)
        assert (owed.amount, owed.balance_after) == (-3, -1)


def test_dearer_work_is_charged_up_to_the_limit_and_as_debt_if_allowed(world: World):
    ledger, user = world.ledger, world.user(credits=5)
    with world.engine.begin() as conn:
        held = ledger.hold(conn, user, credits=3, key="h", capture_limit=8)
        ledger.hold(conn, user, credits=1, key="another")
        with pytest.raises(e.CaptureExceedsHold) as refused:
            ledger.capture(conn, user, held.id, credits=9)
        assert (refused.value.limit, refused.value.asked) == (8, 9)
        with pytest.raises(e.InsufficientCredits) as poor:
            ledger.capture(conn, user, held.id, credits=5)
        assert (poor.value.balance, poor.value.held, poor.value.required) == (5, 1, 5)  # held by the other hold
        assert ledger.capture(conn, user, held.id, credits=8, allow_debt=True).balance_after == -3
        assert standing(world, conn, user) == (-3, 1, -4)


@pytest.mark.parametrize("any_world", WITH_WORKSHOPS, indirect=True)
def test_a_hold_carries_a_workshop_that_is_unlocked_at_capture(any_world: World):
    ledger, user, other = any_world.ledger, any_world.user(credits=3), any_world.user(credits=1)
    workshop = any_world.workshop(user, title="Soldering")
    with any_world.engine.begin() as conn:
        with pytest.raises(e.WorkshopNotOwned):
            ledger.hold(conn, other, credits=1, key="h", workshop=workshop)
        first = ledger.hold(conn, user, credits=1, key="h", workshop=workshop)
        second = ledger.hold(conn, user, credits=1, key="h2", workshop=workshop)
        assert first.description.startswith("Credit consumed for Workshop: ")
        assert not ledger.access(conn, workshop).open or ledger.access(conn, workshop).reason == "grandfathered"
        ledger.capture(conn, user, first.id)
        assert ledger.access(conn, workshop).reason == "unlocked"
        free = ledger.capture(conn, user, second.id)
        assert (free.id, free.replayed) == (first.id, True)
        assert standing(any_world, conn, user) == (2, 0, 2)
        third = ledger.hold(conn, user, credits=1, key="h3", workshop=workshop)
        assert (third.id, third.replayed) == (first.id, True)


@pytest.mark.parametrize("any_world", WITH_WORKSHOPS, indirect=True)
def test_a_capture_that_is_refused_for_its_workshop_names_it(any_world: World):
    world, user, other = any_world, any_world.user(credits=3), any_world.user()
    workshop = world.workshop(user)
    shop = world.schema.workshops
    assert shop is not None
    with world.engine.begin() as conn:
        held = world.ledger.hold(conn, user, credits=1, key="h", workshop=workshop)
        of_it = sa.update(shop).where(shop.c.key == workshop)
        conn.execute(of_it.values(owner=other))
        with pytest.raises(e.WorkshopNotOwned, match=f"workshop {workshop} belongs to another user") as not_owned:
            world.ledger.capture(conn, user, held.id)
        conn.execute(of_it.values(owner=user, deleted_at=sa.func.now()))
        with pytest.raises(e.WorkshopDeleted, match=f"workshop {workshop} was deleted") as deleted:
            world.ledger.capture(conn, user, held.id)
        assert not_owned.value.workshop == deleted.value.workshop == workshop
        conn.execute(of_it.values(deleted_at=None))


def test_a_refusal_names_the_workshop_of_the_call_before_that_of_the_answer():
    refused = error_of("workshop_unaccounted", Refusal({"user_id": 1}, workshop_id=7))
    assert isinstance(refused, e.WorkshopUnaccounted)
    assert (refused.workshop, "workshop 7 is marked" in refused.message) == (7, True)
    asked = error_of("workshop_unaccounted", Refusal({"user_id": 1, "workshop_id": 0}, workshop_id=7))
    assert isinstance(asked, e.WorkshopUnaccounted)
    assert asked.workshop == 0


def test_a_workshop_that_the_app_opened_by_itself_leaves_the_hold(world: World):
    ledger, user = world.ledger, world.user(credits=3)
    workshop = world.workshop(user)
    marked = world.schema.workshops.c if world.schema.workshops is not None else None
    assert marked is not None
    with world.engine.begin() as conn:
        held = ledger.hold(conn, user, credits=1, key="h", workshop=workshop)
        opened = sa.update(world.schema.workshops).where(marked.key == workshop)
        conn.execute(opened.values(credit_consumed_at=sa.func.now()))
        with pytest.raises(e.WorkshopUnaccounted) as refused:
            ledger.capture(conn, user, held.id)
        assert refused.value.workshop == workshop
        assert standing(world, conn, user) == (3, 1, 2)
        conn.execute(opened.values(credit_consumed_at=None))
        assert ledger.capture(conn, user, held.id).balance_after == 2


def test_a_hold_that_was_released_after_its_time_is_never_charged(world: World):
    ledger, user = world.ledger, world.user(credits=3)
    with world.engine.begin() as conn:
        held = ledger.hold(conn, user, credits=2, key="h")
    world.pass_time(hours=1)
    with world.engine.begin() as conn:
        assert ledger.release(conn, user, held.id).replayed
        with pytest.raises(e.HoldClosed):
            ledger.capture(conn, user, held.id)
        assert ledger.release(conn, user, held.id).replayed
        assert ledger.balance(conn, user) == 3


def test_a_workshop_is_unlocked_by_its_consumption_and_not_by_a_hold(world: World):
    ledger, user = world.ledger, world.user(credits=5)
    workshop, marked = world.workshop(user), world.workshop(user)
    with world.engine.begin() as conn:
        first = ledger.hold(conn, user, credits=2, key="h1", workshop=workshop)
        ledger.release(conn, user, first.id)
        second = ledger.hold(conn, user, credits=2, key="h2", workshop=workshop)
        unlocked = ledger.consume(conn, user, workshop=workshop, key="c")
        assert ledger.consume(conn, user, workshop=workshop, key="c2").id == unlocked.id
        for _ in range(2):  # the first releases the hold, and a retry gets the same
            captured = ledger.capture(conn, user, second.id)
            assert (captured.id, captured.replayed) == (unlocked.id, True)
        assert ledger.hold(conn, user, credits=1, key="h3", workshop=workshop).id == unlocked.id
        other = ledger.hold(conn, user, credits=1, key="h4", workshop=marked)
        ledger.release(conn, user, other.id)
    with world.engine.connect() as conn:
        conn.execute(sa.text("UPDATE workshops SET credit_consumed_at = now() WHERE id = :id"), {"id": marked})
        with pytest.raises(e.WorkshopUnaccounted):
            ledger.consume(conn, user, workshop=marked, key="c3")
        conn.rollback()


def test_a_refused_capture_counts_the_holds_own_credits(world: World):
    ledger, user = world.ledger, world.user(credits=8)
    with world.engine.begin() as conn:
        held = ledger.hold(conn, user, credits=5, key="h", capture_limit=20)
        with pytest.raises(e.InsufficientCredits) as refused:
            ledger.capture(conn, user, held.id, credits=10)
        assert (refused.value.balance, refused.value.held, refused.value.available) == (8, 0, 8)
        assert ledger.capture(conn, user, held.id, credits=8).balance == 0


def test_the_largest_debt_beside_a_hold_is_refused_like_any_other(world: World):
    """The balance less what is held is below the range of the type."""
    ledger, user = world.ledger, world.user(credits=INT32_MAX)
    with world.engine.begin() as conn:
        large = ledger.history(conn, user)[0]
        ledger.consume(conn, user, credits=INT32_MAX, key="all")
        small = world.buy(conn, user, 20)
        held = ledger.hold(conn, user, credits=20, key="h")
        ledger.refund(conn, user, large.id, key="r1")
        ledger.refund(conn, user, small.id, key="r2")
        assert standing(world, conn, user) == (-INT32_MAX, 20, -INT32_MAX - 20)
        for spend in (
            lambda: ledger.consume(conn, user, key="c"),
            lambda: ledger.hold(conn, user, credits=1, key="h2"),
            lambda: ledger.capture(conn, user, held.id),
        ):
            with pytest.raises(e.InsufficientCredits):
                spend()
    world.pass_time(hours=1)
    with world.engine.begin() as conn:
        assert standing(world, conn, user) == (-INT32_MAX, 0, -INT32_MAX)
        assert ledger.sweep(conn) == 1
        assert standing(world, conn, user) == (-INT32_MAX, 0, -INT32_MAX)


def test_a_hold_is_one_intent(world: World):
    ledger, user = world.ledger, world.user(credits=5)
    with world.engine.begin() as conn:
        held = ledger.hold(conn, user, credits=2, key="h")
        assert ledger.hold(conn, user, credits=2, key="h").replayed
        with pytest.raises(e.IdempotencyKeyReused):
            ledger.hold(conn, user, credits=3, key="h")
        with pytest.raises(e.IdempotencyKeyReused):
            ledger.consume(conn, user, credits=2, key="h")
        ledger.capture(conn, user, held.id, credits=1)
        after = ledger.hold(conn, user, credits=2, key="h")
        assert (after.id, after.replayed, after.status) == (held.id, True, "completed")
        ledger.consume(conn, user, key="c")
        with pytest.raises(e.IdempotencyKeyReused):
            ledger.hold(conn, user, credits=1, key="c")
        assert standing(world, conn, user) == (3, 0, 3)


@pytest.mark.parametrize(
    ("wrong", "argument"),
    [
        ({"credits": 0}, "credits"),
        ({"credits": INT32_MAX + 1}, "credits"),
        ({"expires_in": dt.timedelta(0)}, "expires_in"),
        ({"expires_in": dt.timedelta(days=-1)}, "expires_in"),
        ({"expires_in": dt.timedelta(days=400)}, "expires_in"),
        ({"expires_in": 15}, "expires_in"),
        ({"capture_limit": 1, "credits": 2}, "capture_limit"),
        ({"key": ""}, "key"),
        ({"metadata": []}, "metadata"),
    ],
)
def test_what_is_no_hold_is_refused(world: World, wrong: dict[str, object], argument: str):
    user = world.user(credits=5)
    with world.engine.begin() as conn:
        with pytest.raises(e.InvalidArgument) as refused:
            world.ledger.hold(conn, user, **{"credits": 1, "key": "k"} | wrong)
        assert refused.value.argument == argument
        assert standing(world, conn, user) == (5, 0, 5)


def test_nobody_elses_hold_is_captured(world: World):
    ledger, user, other = world.ledger, world.user(credits=2), world.user(credits=2)
    with world.engine.begin() as conn:
        held = ledger.hold(conn, user, credits=1, key="h")
        spent = ledger.consume(conn, user, key="c")
        for act in (ledger.capture, ledger.release):
            with pytest.raises(e.UnknownHold):
                act(conn, other, held.id)
            with pytest.raises(e.UnknownHold):
                act(conn, user, spent.id)
            with pytest.raises(e.UnknownUser):
                act(conn, world.key("uuid"), held.id)
        world.accounts.delete_user(conn, user)
        with pytest.raises(e.UserDeleted):
            ledger.hold(conn, user, credits=1, key="h2")
        assert ledger.capture(conn, user, held.id).status == "completed"  # the work was done


def test_sixteen_at_once_never_hold_more_than_there_is(world: World):
    user = world.user(credits=10)

    def one(number: int) -> CreditTransaction | None:
        with world.engine.begin() as conn:
            try:
                return world.ledger.hold(conn, user, credits=1, key=f"{number}")
            except e.InsufficientCredits:
                return None

    def spend(number: int) -> CreditTransaction | None:
        with world.autocommit.connect() as conn:
            try:
                return world.ledger.consume(conn, user, key=f"c {number}")
            except e.InsufficientCredits:
                return None

    with ThreadPoolExecutor(16) as pool:
        jobs: list[Callable[[], CreditTransaction | None]] = [
            lambda n=n: one(n) if n % 2 else spend(n) for n in range(32)
        ]
        done = [row for row in pool.map(lambda job: job(), jobs) if row is not None]
    assert len(done) == 10
    with world.engine.begin() as conn:
        held = [row for row in done if row.status == "pending"]
        now = world.ledger.standing(conn, user)
        assert (now.held, now.available) == (len(held), 0)
    with ThreadPoolExecutor(16) as pool:  # each is captured once, and half of them are released at the same time

        def end(number: int) -> str:
            with world.engine.begin() as conn:
                act = world.ledger.capture if number % 3 else world.ledger.release
                try:
                    return act(conn, user, held[number % len(held)].id).status if held else "none"
                except e.HoldClosed:
                    return "closed"

        assert set(pool.map(end, range(48))) <= {"completed", "failed", "closed", "none"}
    with world.engine.begin() as conn:
        captured = sum(
            row.status == "completed" for row in world.ledger.history(conn, user) if row.type == "consumption"
        )
        now = world.ledger.standing(conn, user)
        assert (now.balance, now.held) == (10 - captured, 0)
