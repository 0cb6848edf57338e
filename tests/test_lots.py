"""Credits that expire: which are spent first, what is taken back and when, and where given back ones go."""

from __future__ import annotations

import datetime as dt
import json
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import sqlalchemy as sa

from tallystick import errors as e
from tallystick.audit import audit
from tallystick.cli import main
from tallystick.errors import Key
from worlds import World


@pytest.fixture(autouse=True)
def _ledger_is_consistent(request: pytest.FixtureRequest) -> Iterator[None]:
    """Every test ends with a clean audit."""
    world: World = request.getfixturevalue("any_world" if "any_world" in request.fixturenames else "world")
    yield
    with world.engine.connect() as conn:
        report = audit(conn, world.config)
    assert not report.findings


def days(number: float) -> dt.datetime:
    return dt.datetime.now(dt.UTC) + dt.timedelta(days=number)


def give(world: World, conn: sa.Connection, user: Key, credits: int, for_days: float | None, key: str):
    expires_at = None if for_days is None else days(for_days)
    return world.ledger.grant(conn, user, credits=credits, key=key, description=key, expires_at=expires_at)


def left(world: World, conn: sa.Connection, user: Key) -> list[tuple[str, int]]:
    return [(lot.description, lot.remaining) for lot in world.ledger.lots(conn, user)]


def test_what_expires_soonest_is_spent_first_then_what_does_not(any_world: World):
    ledger, user = any_world.ledger, any_world.user(credits=2)
    with any_world.engine.begin() as conn:
        late, soon = give(any_world, conn, user, 3, 30, "late"), give(any_world, conn, user, 3, 10, "soon")
        assert soon.expires_at is not None
        assert left(any_world, conn, user) == [("soon", 3), ("late", 3)]
        ledger.consume(conn, user, credits=4, key="a")
        assert left(any_world, conn, user) == [("late", 2)]
        ledger.consume(conn, user, credits=3, key="b")
        assert left(any_world, conn, user) == []
        assert ledger.balance(conn, user) == 1
        assert late.expires_at is not None


def test_what_is_left_expires_as_a_row_and_a_balance_read_before_it_is_right(any_world: World):
    ledger, user = any_world.ledger, any_world.user(credits=1)
    with any_world.engine.begin() as conn:
        lot = give(any_world, conn, user, 5, 10, "promotion")
        ledger.consume(conn, user, credits=2, key="a")
    any_world.pass_time(days=11)
    with any_world.engine.begin() as conn:
        assert ledger.balance(conn, user) == 1
        assert ledger.history(conn, user)[0].type == "consumption"
        with pytest.raises(e.InsufficientCredits) as refused:
            ledger.consume(conn, user, credits=2, key="b")
        assert refused.value.balance == 1
        row = ledger.history(conn, user)[0]
        assert (row.type, row.amount, row.balance_after, row.refund_of) == ("expiry", -3, 1, lot.id)
        assert row.description == "Expired: promotion"
        assert ledger.balance(conn, user) == 1


def test_every_answer_tells_the_balance_without_what_has_expired(any_world: World):
    ledger, accounts, user = any_world.ledger, any_world.accounts, any_world.user(credits=3)
    with any_world.engine.begin() as conn:
        give(any_world, conn, user, 5, 10, "promotion")
        open_, other = (ledger.start_purchase(conn, user, credits=1, description="A pack", key=key) for key in "ab")
        ledger.hold(conn, user, credits=4, key="h", expires_in=dt.timedelta(days=30))
    any_world.pass_time(days=11)
    with any_world.engine.begin() as conn:
        told = [
            account.credit_balance
            for account in (
                accounts.get(conn, user),
                accounts.complete_onboarding(conn, user),
                accounts.reset_onboarding(conn, user),
                accounts.set_plan_tier(conn, user, "pro"),
                accounts.set_stripe_customer(conn, user, "cus_1"),
                accounts.set_low_balance(conn, user, 2),
                accounts.delete_user(conn, user),
                accounts.restore_user(conn, user),
                accounts.erase(conn, user),
                accounts.restore_user(conn, user),
            )
        ]
        told += [
            row.balance
            for row in (
                ledger.start_purchase(conn, user, credits=1, description="A pack", key="c"),
                ledger.start_purchase(conn, user, credits=1, description="A pack", key="c"),
                ledger.attach_session(conn, user, open_.id, stripe_session_id="cs_1"),
                ledger.attach_session(conn, user, open_.id, stripe_session_id="cs_1"),
                ledger.fail_purchase(conn, user, purchase=other.id, reason="expired"),
                ledger.fail_purchase(conn, user, purchase=other.id, reason="expired"),
            )
        ]
        assert "expiry" not in {row.type for row in ledger.history(conn, user)}  # nothing of it is written yet
        assert told == [4] * len(told)  # what the hold has set aside is kept
        assert ledger.complete_purchase(conn, user, purchase=open_.id).balance == 5
        assert ledger.complete_purchase(conn, user, purchase=open_.id).balance == 5


def test_a_sweep_writes_what_nobody_touched_once(world: World):
    users = [world.user() for _ in range(5)]
    with world.engine.begin() as conn:
        for user in users:
            give(world, conn, user, 2, 1, "trial")
        assert world.ledger.sweep(conn) == 0
    world.pass_time(days=2)
    with world.engine.begin() as conn:
        assert world.ledger.sweep(conn, limit=3) == 3
        assert world.ledger.sweep(conn) == 2
        assert world.ledger.sweep(conn) == 0
        assert [world.ledger.history(conn, user)[0].type for user in users] == ["expiry"] * 5


def test_credits_go_back_to_the_lot_they_came_from_and_an_expired_one_stays_expired(world: World):
    ledger, user = world.ledger, world.user(credits=1)
    with world.engine.begin() as conn:
        give(world, conn, user, 2, 10, "soon")
        give(world, conn, user, 2, 30, "late")
        spent = ledger.consume(conn, user, credits=5, key="all")
        ledger.reverse(conn, user, spent.id, credits=2, key="r1")  # the one that never expires, then of the latest
        assert left(world, conn, user) == [("late", 1)]
    world.pass_time(days=11)
    with world.engine.begin() as conn:
        back = ledger.reverse(conn, user, spent.id, key="r2")
        assert (back.amount, back.balance_after, back.balance) == (3, 5, 3)
        assert left(world, conn, user) == [("late", 2)]
        assert [(row.type, row.amount) for row in ledger.history(conn, user)[:2]] == [("expiry", -2), ("reversal", 3)]


def test_a_hold_keeps_what_it_set_aside_alive_and_nothing_else(world: World):
    ledger, user = world.ledger, world.user(credits=1)
    with world.engine.begin() as conn:
        give(world, conn, user, 5, 10, "trial")
        held = ledger.hold(conn, user, credits=3, key="h", expires_in=dt.timedelta(days=20))
        other = ledger.hold(conn, user, credits=1, key="h2", expires_in=dt.timedelta(days=20))
    world.pass_time(days=11)
    with world.engine.begin() as conn:
        assert world.ledger.standing(conn, user).balance == 4  # 2 of the 6 were held by nobody
        assert ledger.capture(conn, user, held.id).balance_after == 1
        ledger.release(conn, user, other.id)
        give(world, conn, user, 1, None, "touch")
        assert ledger.balance(conn, user) == 2


def test_a_lot_that_a_hold_keeps_alive_waits_for_its_end_and_no_sweep_for_it(world: World):
    ledger, user = world.ledger, world.user()
    with world.engine.begin() as conn:
        give(world, conn, user, 5, 10, "trial")
        held = ledger.hold(conn, user, credits=3, key="h", expires_in=dt.timedelta(days=20))
        ledger.hold(conn, user, credits=1, key="h2", expires_in=dt.timedelta(days=20))
    world.pass_time(days=11)
    with world.engine.begin() as conn:
        assert [ledger.sweep(conn) for _ in range(2)] == [1, 0]
        assert world.ledger.standing(conn, user).balance == 4
        given_up = ledger.release(conn, user, held.id)
        assert given_up.balance == 1  # nothing else has set them aside
        assert ledger.balance(conn, user) == 1
        assert ledger.sweep(conn) == 0


def test_a_replay_writes_what_has_expired_under_the_lock_alone(world: World):
    """While another transaction has the user the call has written nothing, so the two do not wait in a circle."""
    ledger, user = world.ledger, world.user(credits=1)
    with world.engine.begin() as conn:
        give(world, conn, user, 2, 1, "trial")
        first = ledger.consume(conn, user, key="a")
    world.pass_time(days=2)

    def replay() -> tuple[bool, int | None]:
        with world.autocommit.connect() as another:
            row = ledger.consume(another, user, key="a")
        assert row.id == first.id
        return row.replayed, row.balance

    with ThreadPoolExecutor(1) as pool, world.engine.begin() as conn:
        ledger.lock(conn, world.user())  # a transaction of its own, before the user's row
        conn.execute(sa.select(world.schema.users).where(world.schema.users.c.key == user).with_for_update())
        waits = pool.submit(replay)
        waiting = "SELECT count(*) FROM pg_locks WHERE NOT granted AND pg_backend_pid() = ANY (pg_blocking_pids(pid))"
        while not conn.scalar(sa.text(waiting)):
            time.sleep(0.01)
        assert ledger.sweep(conn) == 1
        conn.commit()
        assert waits.result(30) == (True, 1)


def test_what_was_taken_back_of_a_grant_does_not_expire_once_more(world: World):
    ledger, user = world.ledger, world.user(credits=5)
    with world.engine.begin() as conn:
        lot = give(world, conn, user, 2, 10, "by mistake")
        spent = ledger.consume(conn, user, credits=2, key="a")
        ledger.correct(conn, user, lot.id, key="k")
        assert ledger.balance(conn, user) == 3
    world.pass_time(days=11)
    with world.engine.begin() as conn:
        back = ledger.reverse(conn, user, spent.id, key="r")
        assert (back.balance_after, back.balance) == (5, 5)


def test_a_debt_is_paid_from_a_lot_and_what_paid_it_does_not_expire(world: World):
    ledger, user = world.ledger, world.user(credits=3)
    with world.engine.begin() as conn:
        bought = ledger.history(conn, user)[0]
        ledger.consume(conn, user, credits=3, key="all")
        ledger.refund(conn, user, bought.id, key="refund")
        give(world, conn, user, 5, 10, "goodwill")
        assert left(world, conn, user) == [("goodwill", 2)]
    world.pass_time(days=11)
    with world.engine.begin() as conn:
        assert ledger.sweep(conn) == 1
        assert ledger.balance(conn, user) == 0


def test_bought_credits_last_from_the_moment_they_are_paid(world: World):
    ledger, user = world.ledger, world.user()
    with world.engine.begin() as conn:
        started = ledger.start_purchase(
            conn, user, credits=3, description="A month", expires_after=dt.timedelta(days=30)
        )
        assert started.expires_at is None
        paid = ledger.complete_purchase(conn, user, purchase=started.id)
        assert paid.expires_at is not None
        assert abs(paid.expires_at - days(30)) < dt.timedelta(minutes=5)
        assert left(world, conn, user) == [("A month", 3)]
        ledger.consume(conn, user, key="c")
        assert ledger.refund(conn, user, started.id, credits=1, key="r").balance_after == 1
        assert left(world, conn, user) == [("A month", 1)]
    world.pass_time(days=31)
    with world.engine.begin() as conn:
        assert ledger.sweep(conn) == 1
        # what has expired is gone already: the refund of the money takes no more than is left
        with pytest.raises(e.RefundExceedsPurchase) as refused:
            ledger.refund(conn, user, started.id, credits=2, key="r2")
        assert refused.value.left == 1
        assert ledger.refund(conn, user, started.id, key="r3").balance_after == -1
        with pytest.raises(e.ReinstatementExceedsRefunds):
            ledger.reinstate(conn, user, started.id, credits=3, key="won")
        back = ledger.reinstate(conn, user, started.id, key="won")
        assert (back.amount, back.balance) == (2, 0)  # one went back into the lot, and has expired with it


def test_a_reinstatement_gives_to_a_lot_what_the_refund_took_from_it_and_no_more(world: World):
    ledger, spent, debtor = world.ledger, world.user(credits=20), world.user(credits=4)
    month = dt.timedelta(days=30)
    with world.engine.begin() as conn:
        first = ledger.start_purchase(conn, spent, credits=10, description="A month", expires_after=month)
        ledger.complete_purchase(conn, spent, purchase=first.id)
        ledger.consume(conn, spent, credits=8, key="a")

        paid = ledger.history(conn, debtor)[0]
        ledger.consume(conn, debtor, credits=4, key="a")
        ledger.refund(conn, debtor, paid.id, key="debt")
        second = ledger.start_purchase(conn, debtor, credits=10, description="A month", expires_after=month)
        ledger.complete_purchase(conn, debtor, purchase=second.id)  # of which 4 pay the debt
        give(world, conn, debtor, 4, None, "goodwill")
        ledger.refund(conn, debtor, second.id, key="refund")
        ledger.reinstate(conn, debtor, second.id, key="won")
        assert left(world, conn, debtor) == [("A month", 6)]
        assert ledger.balance(conn, debtor) == 10
    world.pass_time(days=31)
    with world.engine.begin() as conn:
        ledger.sweep(conn)
        assert ledger.balance(conn, debtor) == 4
        assert ledger.balance(conn, spent) == 20
        # the 2 that nobody spent have expired, so the refund takes 8 that do not expire
        assert ledger.refund(conn, spent, first.id, key="refund").balance_after == 12
        assert ledger.reinstate(conn, spent, first.id, key="won").balance == 20


def test_a_lot_that_expires_while_a_call_waits_for_its_workshop_is_spent_first(world: World):
    ledger, user = world.ledger, world.user(credits=5)
    workshop = world.workshop(user)
    with world.engine.begin() as conn:
        give(world, conn, user, 5, 1 / 86_400, "for a second")

    def unlock() -> int | None:
        with world.autocommit.connect() as another:
            return ledger.consume(another, user, credits=5, workshop=workshop, key="a").balance

    with ThreadPoolExecutor(1) as pool:
        with world.engine.begin() as conn:
            conn.execute(sa.text("SELECT FROM workshops WHERE id = :id FOR UPDATE"), {"id": workshop})
            waits = pool.submit(unlock)
            time.sleep(1.5)
            assert not waits.done()
        assert waits.result(30) == 5
    with world.engine.begin() as conn:
        ledger.sweep(conn)
        assert ledger.balance(conn, user) == 5


def test_a_grant_that_is_repeated_after_its_credits_have_expired_is_a_replay(world: World):
    ledger, user = world.ledger, world.user()
    soon = days(0.3 / 86_400)
    with world.autocommit.connect() as conn:
        first = ledger.grant(conn, user, credits=2, key="g", description="d", expires_at=soon)
        time.sleep(0.4)
        again = ledger.grant(conn, user, credits=2, key="g", description="d", expires_at=soon)
        assert (again.id, again.replayed, again.balance) == (first.id, True, 0)
        with pytest.raises(e.IdempotencyKeyReused):
            ledger.grant(conn, user, credits=3, key="g", description="d", expires_at=soon)
        with pytest.raises(e.InvalidArgument):
            ledger.grant(conn, user, credits=2, key="another", description="d", expires_at=soon)


def test_the_next_expiry_is_never_one_that_has_passed(world: World):
    ledger, user = world.ledger, world.user()
    with world.engine.begin() as conn:
        give(world, conn, user, 1, 1, "soon")
        give(world, conn, user, 1, 9, "late")
    for gone, due in ((2, 7), (4, 3)):
        world.pass_time(days=gone)
        with world.engine.begin() as conn:
            for at in (ledger.standing(conn, user).due_at, world.accounts.get(conn, user).credit_due_at):
                assert at is not None
                assert abs(at - days(due)) < dt.timedelta(minutes=5)
    world.pass_time(days=4)
    with world.engine.begin() as conn:
        assert ledger.standing(conn, user).due_at is None
        assert ledger.history(conn, user)[0].type == "grant"  # nothing was written


def test_a_refund_and_a_correction_take_from_their_own_lot_first(world: World):
    ledger, user = world.ledger, world.user(credits=1)
    with world.engine.begin() as conn:
        give(world, conn, user, 3, 5, "soon")
        late = give(world, conn, user, 3, 30, "late")
        ledger.correct(conn, user, late.id, credits=2, key="k")
        assert left(world, conn, user) == [("soon", 3), ("late", 1)]
        ledger.correct(conn, user, late.id, key="rest")
        assert left(world, conn, user) == [("soon", 3)]
        bought = ledger.history(conn, user)[-1]
        ledger.refund(conn, user, bought.id, key="refund")
        assert left(world, conn, user) == [("soon", 3)]
        assert ledger.balance(conn, user) == 3


def test_credits_that_pay_a_debt_go_back_into_no_lot(world: World):
    """A purchase after it is not taken away with the lot."""
    ledger, reversed_, reinstated = world.ledger, world.user(), world.user()
    with world.engine.begin() as conn:
        give(world, conn, reversed_, 10, 30, "promotion")
        spent = ledger.consume(conn, reversed_, credits=10, key="a")
        bought = world.buy(conn, reversed_, 10)
        ledger.consume(conn, reversed_, credits=10, key="b")
        ledger.refund(conn, reversed_, bought.id, key="refund")
        assert ledger.reverse(conn, reversed_, spent.id, key="r").balance == 0
        assert left(world, conn, reversed_) == []
        world.buy(conn, reversed_, 10)

        started = ledger.start_purchase(
            conn, reinstated, credits=10, description="A month", expires_after=dt.timedelta(days=30)
        )
        ledger.complete_purchase(conn, reinstated, purchase=started.id)
        ledger.consume(conn, reinstated, credits=3, key="a")
        ledger.refund(conn, reinstated, started.id, key="refund")
        assert ledger.reinstate(conn, reinstated, started.id, key="won").balance == 7
        assert left(world, conn, reinstated) == [("A month", 7)]
    world.pass_time(days=31)
    with world.engine.begin() as conn:
        ledger.sweep(conn)
        assert (ledger.balance(conn, reversed_), ledger.balance(conn, reinstated)) == (10, 0)


def test_a_user_whose_expiries_cannot_be_written_stops_nobody_elses(world: World):
    ledger, bad, good = world.ledger, world.user(), world.user()
    with world.engine.begin() as conn:
        give(world, conn, bad, 2, 1, "trial")
        give(world, conn, good, 2, 1.5, "trial")
        conn.execute(
            sa.text(
                "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS "
                "$$BEGIN IF OLD.id = :bad THEN RAISE 'not this one'; END IF; RETURN NEW; END$$".replace(
                    ":bad", f"'{bad}'"
                )
            )
        )
        conn.exec_driver_sql("CREATE TRIGGER refuse BEFORE UPDATE ON users FOR EACH ROW EXECUTE FUNCTION refuse()")
    world.pass_time(days=2)
    with world.engine.begin() as conn:
        assert ledger.sweep(conn) == 1
        assert ledger.history(conn, good)[0].type == "expiry"
        conn.exec_driver_sql("DROP TRIGGER refuse ON users")
        assert ledger.sweep(conn) == 1


def test_every_user_is_swept_where_one_cannot_be(
    world: World, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """A user whose row is behind the ledger has no expiries written, and is not counted as if there were some."""
    ledger, users = world.ledger, [world.user() for _ in range(5)]
    with world.engine.begin() as conn:
        for user in users:
            give(world, conn, user, 2, 1, "trial")
    world.pass_time(days=2)
    behind = sa.update(world.schema.users).where(world.schema.users.c.key == users[0])
    with world.engine.begin() as conn:
        conn.execute(behind.values(credit_sequence=0))
        assert [ledger.sweep(conn, limit=1) for _ in range(2)] == [1, 1]  # one who fails keeps no other waiting
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DATABASE_URL", world.url)
    monkeypatch.setattr(sys, "argv", ["tallystick", "sweep", "--limit", "2", "--json"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code
    assert json.loads(capsys.readouterr().out) == {"users": 2}
    with world.engine.begin() as conn:
        conn.execute(behind.values(credit_sequence=1))
        assert ledger.sweep(conn) == 1


def test_a_user_behind_the_ledger_is_told_so_by_every_operation_that_writes(world: World):
    ledger, user = world.ledger, world.user(credits=1)
    with world.engine.begin() as conn:
        give(world, conn, user, 2, 1, "trial")
        held = ledger.hold(conn, user, credits=1, key="h", expires_in=dt.timedelta(days=9))
        before = ledger.history(conn, user)
    with world.engine.connect() as conn:
        conn.execute(sa.text("UPDATE users SET credit_sequence = credit_sequence - 1 WHERE id = :user"), {"user": user})
        for call in (
            lambda: ledger.capture(conn, user, held.id),
            lambda: ledger.consume(conn, user, key="c"),
            lambda: ledger.grant(conn, user, credits=1, key="g", description="d"),
        ):
            with pytest.raises(e.LedgerInconsistent):
                call()
        conn.execute(sa.text("UPDATE tallystick.lots SET expires_at = now() - interval '1 hour'"))
        conn.execute(
            sa.text("UPDATE users SET credit_due_at = now() - interval '1 hour' WHERE id = :user"), {"user": user}
        )
        with pytest.raises(e.LedgerInconsistent):
            ledger.consume(conn, user, key="c")
        ledger.sweep(conn)
        assert ledger.history(conn, user) == before
        conn.rollback()


MOMENTS = [
    dt.datetime.now(),  # noqa: DTZ005
    dt.datetime(2020, 1, 1, tzinfo=dt.UTC),
    dt.datetime(9999, 5, 1, tzinfo=dt.UTC),
    "tomorrow",
    5,
]


@pytest.mark.parametrize("when", MOMENTS)
def test_a_moment_that_cannot_be_is_refused(world: World, when: object):
    user = world.user()
    with world.engine.begin() as conn, pytest.raises(e.InvalidArgument) as refused:
        world.ledger.grant(conn, user, credits=1, key="k", description="d", expires_at=when)
    assert refused.value.argument == "expires_at"


@pytest.mark.parametrize("after", [dt.timedelta(days=365_000), dt.timedelta.max, dt.timedelta(0), "300000 years"])
def test_a_time_that_credits_cannot_last_is_refused_when_the_purchase_starts(world: World, after: object):
    user = world.user()
    with world.engine.begin() as conn, pytest.raises(e.InvalidArgument) as refused:
        world.ledger.start_purchase(conn, user, credits=1, description="d", expires_after=after)
    assert refused.value.argument == "expires_after"
    if isinstance(after, str):
        with world.engine.begin() as conn:
            asked = sa.text("SELECT outcome FROM tallystick.start_purchase(:user, 1, 'd', expires_after => :after)")
            assert conn.execute(asked, {"user": user, "after": after}).scalar_one() == "invalid_argument"


def test_users_without_lots_or_holds_have_nothing_due(world: World):
    user = world.user(credits=3)
    with world.engine.begin() as conn:
        held = world.ledger.hold(conn, user, credits=1, key="h")
        world.ledger.capture(conn, user, held.id)
        give(world, conn, user, 1, 5, "lot")
        world.ledger.consume(conn, user, key="c")
    world.pass_time(days=6)
    with world.engine.begin() as conn:
        world.ledger.consume(conn, user, key="touch")
        users = world.schema.users.c
        due = conn.execute(sa.select(users.credit_held, users.credit_due_at).where(users.key == user)).one()
        assert tuple(due) == (0, None)
