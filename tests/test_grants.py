"""Credits that nobody bought, and credits that a refund took and somebody gave back."""

from __future__ import annotations

import threading

import pytest

from tallystick import errors as e
from tallystick.schema import INT32_MAX
from worlds import World


def test_a_grant_is_credits_for_nothing(any_world: World):
    ledger, user = any_world.ledger, any_world.user()
    with any_world.engine.begin() as conn:
        given = ledger.grant(conn, user, credits=3, key="welcome", description="Welcome")
        assert (given.type, given.status, given.amount, given.balance_after) == ("grant", "completed", 3, 3)
        assert (given.sequence, given.refund_of, given.amount_paid) == (1, None, None)
        again = ledger.grant(conn, user, credits=3, key="welcome", description="Welcome, again")
        assert (again.id, again.replayed) == (given.id, True)
        with pytest.raises(e.IdempotencyKeyReused):
            ledger.grant(conn, user, credits=4, key="welcome", description="Welcome")
        assert ledger.consume(conn, user, credits=3, key="spend").balance_after == 0


@pytest.mark.parametrize(
    ("wrong", "error"),
    [
        ({"credits": 0}, e.InvalidArgument),
        ({"credits": True}, e.InvalidArgument),
        ({"credits": 2.5}, e.InvalidArgument),
        ({"description": ""}, e.InvalidArgument),
        ({"key": "x" * 256}, e.InvalidArgument),
    ],
)
def test_what_is_no_grant_is_refused(world: World, wrong, error):
    user = world.user()
    with world.engine.begin() as conn, pytest.raises(error):
        world.ledger.grant(conn, user, **{"credits": 1, "key": "k", "description": "d"} | wrong)


def test_nobody_is_granted_what_cannot_be_held(world: World):
    user, gone = world.user(), world.user()
    with world.engine.begin() as conn:
        world.ledger.grant(conn, user, credits=INT32_MAX, key="all", description="All there is")
        with pytest.raises(e.BalanceOutOfRange):
            world.ledger.grant(conn, user, credits=1, key="more", description="One more")
        world.accounts.delete_user(conn, gone)
        with pytest.raises(e.UserDeleted):
            world.ledger.grant(conn, gone, credits=1, key="k", description="d")
        with pytest.raises(e.UnknownUser):
            world.ledger.grant(conn, world.key("uuid"), credits=1, key="k", description="d")


def test_what_a_refund_took_can_be_given_back_once_and_refunded_again(any_world: World):
    ledger, user = any_world.ledger, any_world.user()
    with any_world.engine.begin() as conn:
        bought = any_world.buy(conn, user, 5)
        with pytest.raises(e.ReinstatementExceedsRefunds):
            ledger.reinstate(conn, user, bought.id, key="too early")
        ledger.refund(conn, user, bought.id, credits=4, key="dispute")
        with pytest.raises(e.ReinstatementExceedsRefunds) as refused:
            ledger.reinstate(conn, user, bought.id, credits=5, key="too much")
        assert (refused.value.taken, refused.value.asked) == (4, 5)
        back = ledger.reinstate(conn, user, bought.id, key="won")
        assert (back.type, back.amount, back.balance_after, back.refund_of) == ("grant", 4, 5, bought.id)
        assert back.description.startswith("Given back: ")
        assert ledger.reinstate(conn, user, bought.id, key="won").replayed
        with pytest.raises(e.IdempotencyKeyReused):
            ledger.grant(conn, user, credits=4, key="won", description="Something else")
        assert ledger.refund(conn, user, bought.id, key="after all").amount == -5


def test_a_deleted_user_is_given_back_what_is_theirs(world: World):
    user = world.user()
    with world.engine.begin() as conn:
        bought = world.buy(conn, user, 2)
        world.ledger.refund(conn, user, bought.id, key="refund")
        world.accounts.delete_user(conn, user)
        assert world.ledger.reinstate(conn, user, bought.id, key="failed").balance_after == 2


def test_many_at_once_give_back_no_more_than_was_taken(world: World):
    user = world.user()
    with world.engine.begin() as conn:
        bought = world.buy(conn, user, 5)
        world.ledger.refund(conn, user, bought.id, key="refund")
    given: list[int] = []

    def give_back(number: int) -> None:
        with world.autocommit.connect() as conn:
            try:
                given.append(world.ledger.reinstate(conn, user, bought.id, credits=1, key=f"back {number}").amount)
            except e.ReinstatementExceedsRefunds:
                given.append(0)

    threads = [threading.Thread(target=give_back, args=(number,)) for number in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(given) == [0] * 7 + [1] * 5
    with world.engine.begin() as conn:
        assert world.ledger.balance(conn, user) == 5
