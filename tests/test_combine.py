"""Callers who share a statement must not notice it."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import sqlalchemy as sa

from tallystick import CreditTransaction, InsufficientCredits
from tallystick.audit import audit
from tallystick.errors import Conflict, DatabaseUnavailable, InvalidArgument, OutcomeUnknown, UnknownUser
from tallystick.ledger.combiner import Combiner
from worlds import World

PATIENCE_S = 120


@pytest.fixture
def combiner(world: World) -> Iterator[Combiner]:
    with Combiner(world.ledger, world.engine) as made:
        yield made
    with world.engine.connect() as conn:
        assert audit(conn, world.config).findings == ()


def held(world: World, user: Any) -> Any:
    """A transaction in which the user's row is somebody else's: statements wait, and calls gather."""
    users = world.schema.users
    conn = world.engine.connect()
    conn.execute(sa.select(users.c.key).where(users.c.key == user).with_for_update())
    return conn


def test_one_call_is_a_consumption(world: World, combiner: Combiner) -> None:
    user = world.user(credits=3)
    workshop = world.workshop(user)
    row = combiner.consume(user, workshop=workshop, key="a").result(PATIENCE_S)
    with world.engine.connect() as conn:
        assert row == world.ledger.history(conn, user)[0]
    assert combiner.consume(user, workshop=workshop, key="a").result(PATIENCE_S).replayed


def test_what_gathers_goes_out_together_and_each_gets_its_own(world: World, combiner: Combiner) -> None:
    user = world.user(credits=10)
    with held(world, user):
        first = combiner.consume(user, key="first")
        calls = [combiner.consume(user, key=f"{n}") for n in range(6)]
        refused = combiner.consume(user, credits=9, key="too much")
        nobody = combiner.consume(world.key("uuid"), key="a")
        wrong = combiner.consume(user, credits=-1, key="a")
        last = combiner.consume(user, credits=3, key="last")
        assert not first.done()
    rows = [call.result(PATIENCE_S) for call in (first, *calls, last)]
    assert [row.balance_after for row in rows] == [9, 8, 7, 6, 5, 4, 3, 0]
    assert isinstance(refused.exception(PATIENCE_S), InsufficientCredits)
    assert isinstance(nobody.exception(PATIENCE_S), UnknownUser)
    assert isinstance(wrong.exception(PATIENCE_S), InvalidArgument)
    # one transaction, for now() is when that began; what follows the refused one had to wait for its refusal
    assert len({row.created_at for row in rows[1:7]}) == 1


def test_threads(world: World, combiner: Combiner) -> None:
    user = world.user(credits=100)

    def spend(number: int) -> list[Any]:
        calls = [combiner.consume(user, key=f"{number}-{n}") for n in range(8)]
        return [call.exception(PATIENCE_S) or call.result() for call in calls]

    with ThreadPoolExecutor(16) as pool:
        results = [result for some in pool.map(spend, range(16)) for result in some]
    spent = [result for result in results if not isinstance(result, InsufficientCredits)]
    assert sorted(row.balance_after for row in spent) == list(range(100))
    assert len(results) == 128


def test_asyncio(world: World, combiner: Combiner) -> None:
    user = world.user(credits=50)

    async def main() -> list[Any]:
        calls = (combiner.aconsume(user, key=f"{n}") for n in range(60))
        return await asyncio.gather(*calls, return_exceptions=True)

    results = asyncio.run(main())
    assert sum(isinstance(result, InsufficientCredits) for result in results) == 10
    assert sorted(row.balance_after for row in results if isinstance(row, CreditTransaction)) == list(range(50))


def test_a_task_that_gives_up_does_not_touch_the_others(world: World, combiner: Combiner) -> None:
    """Cancelled before it is sent it is not made; once it was sent nobody hears of it."""
    user = world.user(credits=10)

    async def main() -> CreditTransaction:
        with held(world, user):
            sent = asyncio.create_task(combiner.aconsume(user, key="sent"))
            while not waits(world):  # noqa: ASYNC110 - the database has no event to wait for
                await asyncio.sleep(0.01)
            unsent, kept = (asyncio.create_task(combiner.aconsume(user, key=key)) for key in ("unsent", "kept"))
            await asyncio.sleep(0)
            sent.cancel()
            unsent.cancel()
        return await kept

    assert asyncio.run(main()).balance_after == 8
    with world.engine.connect() as conn:
        assert {row.idempotency_key for row in world.ledger.history(conn, user)} >= {"sent", "kept"}
        assert "unsent" not in {row.idempotency_key for row in world.ledger.history(conn, user)}


def test_a_loop_that_is_gone_stops_nobody(world: World, combiner: Combiner) -> None:
    user = world.user(credits=10)

    async def leave() -> None:
        task = asyncio.create_task(combiner.aconsume(user, key="left"))
        while not waits(world):  # noqa: ASYNC110 - the database has no event to wait for
            await asyncio.sleep(0.01)
        task.cancel()

    with held(world, user):
        asyncio.run(leave())
    assert combiner.consume(user, key="next").result(PATIENCE_S).balance_after == 8


def waits(world: World) -> bool:
    """A statement of the combiner's waits for a lock."""
    with world.engine.connect() as conn:
        return conn.scalar(
            sa.text(
                "SELECT count(*) > 0 FROM pg_stat_activity"
                " WHERE datname = current_database() AND wait_event_type = 'Lock'"
            )
        )


def test_a_key_that_somebody_else_is_writing_is_a_replay(world: World, combiner: Combiner) -> None:
    """The statement fails as a whole, and each call is made by itself."""
    user = world.user(credits=10)
    with world.engine.connect() as conn, conn.begin():
        world.ledger.consume(conn, user, key="shared")
        shared = combiner.consume(user, key="shared")
        own = combiner.consume(user, key="own")
    assert shared.result(PATIENCE_S).replayed
    assert own.result(PATIENCE_S).balance_after == 8


def end_all_sessions(world: World) -> None:
    with world.autocommit.connect() as conn:
        conn.execute(
            sa.text(
                "SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity"
                " WHERE datname = current_database() AND pid <> pg_backend_pid() AND application_name <> 'holds'"
            )
        )


def test_a_connection_that_was_cut_while_nobody_needed_it_is_replaced(world: World, combiner: Combiner) -> None:
    user = world.user(credits=10)
    combiner.consume(user, key="before").result(PATIENCE_S)
    end_all_sessions(world)
    assert [combiner.consume(user, key=key).result(PATIENCE_S).balance_after for key in "ab"] == [8, 7]


def test_a_connection_that_is_cut_again_and_again_is_everybodys_error(world: World, combiner: Combiner) -> None:
    user = world.user(credits=10)
    with held(world, user) as conn:
        conn.exec_driver_sql("SET application_name = 'holds'")
        calls = [combiner.consume(user, key="a"), combiner.consume(user, key="b")]
        while not all(call.done() for call in calls):
            if waits(world):
                end_all_sessions(world)
    errors = [call.exception(0) for call in calls]
    assert all(isinstance(error, OutcomeUnknown) and error.outcome_unknown for error in errors)
    assert errors[0] is not errors[1]
    assert not combiner.consume(user, key="a").result(PATIENCE_S).replayed


@pytest.mark.one_server  # it came with PostgreSQL 17
def test_a_timeout_that_ends_the_session_is_a_conflict_and_the_next_call_connects_anew(world: World) -> None:
    user = world.user(credits=10)
    engine = sa.create_engine(world.url, connect_args={"options": "-c transaction_timeout=500"})
    with Combiner(world.ledger, engine) as combiner:
        with held(world, user):
            error = combiner.consume(user, key="a").exception(PATIENCE_S)
            assert isinstance(error, Conflict)
            assert error.retryable
        assert not combiner.consume(user, key="a").result(PATIENCE_S).replayed
    engine.dispose()


def test_a_user_who_cannot_be_had_in_time_is_that_users_conflict_alone(world: World) -> None:
    held_user, other = world.user(credits=10), world.user(credits=10)
    engine = sa.create_engine(world.url, connect_args={"options": "-c lock_timeout=300"})
    with Combiner(world.ledger, engine) as combiner, held(world, held_user):
        theirs = [combiner.consume(held_user, key=f"{n}") for n in range(20)]
        assert combiner.consume(other, key="a").result(PATIENCE_S).balance_after == 9
        assert {type(call.exception(PATIENCE_S)) for call in theirs} == {Conflict}
    engine.dispose()


def test_a_pool_that_has_no_connection_to_give(world: World) -> None:
    engine = sa.create_engine(world.url, pool_size=1, max_overflow=0, pool_timeout=0.2)
    with engine.connect(), Combiner(world.ledger, engine) as combiner:
        calls = [combiner.consume(world.key("uuid"), key="a") for _ in range(20)]
        assert {type(call.exception(PATIENCE_S)) for call in calls} == {DatabaseUnavailable}
    engine.dispose()


def test_a_forked_process_is_told_to_make_its_own(combiner: Combiner) -> None:
    child = os.fork()
    if not child:
        try:
            combiner.consume("a", key="a")
        except RuntimeError:
            os._exit(42)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 42


@pytest.mark.parametrize("raised", [ValueError, SystemExit])
def test_a_callback_that_fails_stops_nobody(world: World, combiner: Combiner, raised: type[BaseException]) -> None:
    def fail(_future: object) -> None:
        raise raised

    user = world.user(credits=10)
    with held(world, user):
        first = combiner.consume(user, key="first")
        first.add_done_callback(fail)
        second = combiner.consume(user, key="second")
    assert [call.result(PATIENCE_S).balance_after for call in (first, second)] == [9, 8]
    assert combiner.consume(user, key="third").result(PATIENCE_S).balance_after == 7


def test_without_a_server(world: World) -> None:
    engine = sa.create_engine("postgresql+psycopg://nobody@/nothing?host=/nonexistent", poolclass=sa.NullPool)
    with Combiner(world.ledger, engine) as combiner:
        errors = [combiner.consume(world.key("uuid"), key="a").exception(PATIENCE_S) for _ in range(2)]
    assert all(isinstance(error, DatabaseUnavailable) for error in errors)
    assert errors[0] is not errors[1]


def test_a_cancelled_call_is_not_made(world: World, combiner: Combiner) -> None:
    user = world.user(credits=10)
    with held(world, user):
        under_way = combiner.consume(user, key="under way")
        while not under_way.running():
            threading.Event().wait(0.01)
        waiting = combiner.consume(user, key="waiting")
        assert waiting.cancel()
    assert under_way.result(PATIENCE_S).balance_after == 9
    with world.engine.connect() as conn:
        assert world.ledger.balance(conn, user) == 9


def test_closing_finishes_what_was_asked_for(world: World) -> None:
    user = world.user(credits=10)
    combiner = Combiner(world.ledger, world.engine, most=2)
    calls = [combiner.consume(user, key=f"{n}") for n in range(7)]
    combiner.close()
    combiner.close()
    assert [call.result(0).balance_after for call in calls] == [9, 8, 7, 6, 5, 4, 3]
    with pytest.raises(RuntimeError, match="make another one"):
        combiner.consume(user, key="late")
