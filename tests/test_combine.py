"""Callers who share a statement must not notice it."""

from __future__ import annotations

import asyncio
import ctypes
import os
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
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
        with pytest.raises(InvalidArgument, match="credits=-1"):
            combiner.consume(user, credits=-1, key="a")
        last = combiner.consume(user, credits=3, key="last")
        assert not first.done()
    rows = [call.result(PATIENCE_S) for call in (first, *calls, last)]
    assert [row.balance_after for row in rows] == [9, 8, 7, 6, 5, 4, 3, 0]
    assert isinstance(refused.exception(PATIENCE_S), InsufficientCredits)
    assert isinstance(nobody.exception(PATIENCE_S), UnknownUser)
    # now() is when a transaction began: one for all that had gathered, and a second for what came while it was sent
    assert len({row.created_at for row in rows[1:7]}) <= 2


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
            while not served_apart(world):  # noqa: ASYNC110 - the database has no event to wait for
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
        while not served_apart(world):  # noqa: ASYNC110 - the database has no event to wait for
            await asyncio.sleep(0.01)
        task.cancel()

    with held(world, user):
        asyncio.run(leave())
    assert combiner.consume(user, key="next").result(PATIENCE_S).balance_after == 8


def served_apart(world: World) -> bool:
    """A user is locked, and the thread for such users waits: what comes after is not in its statement."""
    return any(thread.name == "tallystick-combiner-locked" for thread in threading.enumerate()) and waits(world)


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


def test_a_lock_timeout_after_a_cut_leaves_the_outcome_unknown(world: World) -> None:
    """The second attempt wrote nothing, which tells nothing of the first."""
    user = world.user(credits=10)
    with Combiner(world.ledger, world.engine, lock_timeout_s=0.5) as combiner:
        with held(world, user) as conn:
            conn.exec_driver_sql("SET application_name = 'holds'")
            calls = [combiner.consume(user, key=key) for key in "ab"]
            while not served_apart(world):
                time.sleep(0.01)
            end_all_sessions(world)
            errors = [call.exception(PATIENCE_S) for call in calls]
        assert isinstance(errors[0], OutcomeUnknown), errors
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


# --- a user who is locked, or whose calls raise, costs nobody else ---


def test_a_user_who_is_locked_keeps_nobody_else_waiting(world: World) -> None:
    """The lock is held until all others have their rows, however long they are asked for."""
    locked, others = world.user(credits=10), [world.user(credits=2) for _ in range(5)]
    with Combiner(world.ledger, world.engine, lock_timeout_s=PATIENCE_S) as combiner:
        with held(world, locked):
            theirs = [combiner.consume(locked, key="first")]
            for key in "ab":
                calls = [combiner.consume(user, key=key) for user in others]
                theirs.append(combiner.consume(locked, key=key))
                assert {call.result(PATIENCE_S).amount for call in calls} == {-1}
            assert not any(call.done() for call in theirs)
        assert [call.result(PATIENCE_S).balance_after for call in theirs] == [9, 8, 7]
        assert not combiner.consume(locked, key="later").result(PATIENCE_S).replayed


def test_many_locked_users_wait_at_the_same_time(world: World) -> None:
    """One after the other they would take longer than anybody has patience."""
    locked, other = [world.user(credits=2) for _ in range(20)], world.user(credits=2)
    with Combiner(world.ledger, world.engine, lock_timeout_s=1) as combiner, ExitStack() as stack:
        for user in locked:
            stack.enter_context(held(world, user))
        theirs = [combiner.consume(user, key=key) for user in locked for key in "ab"]
        assert combiner.consume(other, key="a").result(PATIENCE_S).balance_after == 1
        assert {type(call.exception(PATIENCE_S)) for call in theirs} == {Conflict}


def test_a_user_who_stays_locked_is_that_users_conflict_alone(world: World) -> None:
    locked, other = world.user(credits=10), world.user(credits=10)
    with Combiner(world.ledger, world.engine, lock_timeout_s=0.3) as combiner, held(world, locked):
        theirs = [combiner.consume(locked, key=f"{n}") for n in range(20)]
        assert combiner.consume(other, key="a").result(PATIENCE_S).balance_after == 9
        errors = [call.exception(PATIENCE_S) for call in theirs]
        assert len(set(map(id, errors))) == 20
        assert all(isinstance(error, Conflict) and error.retryable for error in errors)
        assert f"{locked}" in str(errors[0])


def test_a_call_inside_a_transaction_that_has_changed_the_user_ends_with_what_to_do(world: World) -> None:
    user = world.user(credits=10)
    with Combiner(world.ledger, world.engine, lock_timeout_s=0.3) as combiner:
        with world.engine.begin() as conn:
            world.ledger.consume(conn, user, key="a")
            error = combiner.consume(user, key="b").exception(PATIENCE_S)
            assert isinstance(error, Conflict)
            assert "ledger.consume(conn, …)" in str(error)
            assert world.ledger.consume(conn, user, key="b").balance_after == 8
        assert combiner.consume(user, key="b").result(PATIENCE_S).replayed


def test_a_call_that_raises_fails_alone(world: World, gate: Any) -> None:
    """A trigger of the host's that refuses one user's balance of 7, and of 4, which all three calls together give."""
    engine, release = gate
    refused, others = world.user(credits=10), [world.user(credits=10) for _ in range(5)]
    with world.engine.begin() as conn:
        conn.exec_driver_sql(
            "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS"
            " $$ BEGIN RAISE EXCEPTION 'not this one' USING ERRCODE = 'HOST1'; END $$"
        )
        conn.exec_driver_sql(
            "CREATE TRIGGER refuse BEFORE UPDATE ON users FOR EACH ROW"
            f" WHEN (OLD.id = '{refused}' AND NEW.credit_balance IN (4, 7)) EXECUTE FUNCTION refuse()"
        )
    with Combiner(world.ledger, engine) as combiner:
        calls = [combiner.consume(user, key=key) for key in "ab" for user in others]
        theirs = [combiner.consume(refused, credits=credits, key=f"{credits}") for credits in (1, 2, 3)]
        release()
        assert [call.result(PATIENCE_S).balance_after for call in calls] == [9] * 5 + [8] * 5
        assert "not this one" in str(theirs[1].exception(PATIENCE_S))
        assert [theirs[n].result(PATIENCE_S).balance_after for n in (0, 2)] == [9, 6]


# --- the queue: bounded, and fair ---


@pytest.fixture
def gate(world: World) -> Iterator[tuple[sa.Engine, Callable[[], None]]]:
    """An engine without a free connection, and what frees one: until then calls gather."""
    engine = sa.create_engine(world.url, pool_size=2, max_overflow=0, pool_timeout=PATIENCE_S)
    with ExitStack() as stack:
        for _ in range(2):
            stack.enter_context(engine.connect())
        yield engine, stack.close
    engine.dispose()


def test_a_flood_of_one_user_does_not_keep_others_from_their_turn(world: World, gate: Any) -> None:
    engine, release = gate
    flooding, others = world.user(credits=200), [world.user(credits=2) for _ in range(3)]
    with Combiner(world.ledger, engine, batch_max=10) as combiner:
        flood = [combiner.consume(flooding, key=f"{n}") for n in range(200)]
        calls = [combiner.consume(user, key=key) for key in "ab" for user in others]
        release()
        last = max(call.result(PATIENCE_S).created_at for call in calls)
        before = [call for call in flood if call.result(PATIENCE_S).created_at <= last]
    # the first call was on its way before the others came; then two statements of ten with a call of everybody's
    assert len(before) <= 1 + 20 - 6


def test_a_full_queue_holds_its_callers(world: World, gate: Any) -> None:
    engine, release = gate
    users = [world.user(credits=21) for _ in range(2)]
    calls: list[Any] = []

    def flood(combiner: Combiner) -> None:
        calls.extend(combiner.consume(users[0], key=f"{n}") for n in range(20))

    with Combiner(world.ledger, engine, waiting_max=5) as combiner:
        first = combiner.consume(users[0], key="on its way")
        while not first.running():
            time.sleep(0.01)
        thread = threading.Thread(target=flood, args=(combiner,))
        thread.start()
        while len(calls) < 5:
            time.sleep(0.01)
        thread.join(0.3)
        assert len(calls) == 5
        # asyncio's calls are no more than its tasks, and one that is given up leaves the queue
        with pytest.raises(TimeoutError):
            asyncio.run(asyncio.wait_for(combiner.aconsume(users[1], key="given up"), 0.1))
        release()
        thread.join(PATIENCE_S)
        assert [call.result(PATIENCE_S).balance_after for call in (first, *calls)] == list(range(20, -1, -1))
    with world.engine.connect() as conn:
        assert world.ledger.balance(conn, users[1]) == 21


def test_a_caller_who_was_held_for_too_long_is_told_that_the_call_is_not_made(world: World, gate: Any) -> None:
    engine, release = gate
    user = world.user(credits=20)
    with Combiner(world.ledger, engine, waiting_max=2, held_max_s=0.1) as combiner:
        calls = [combiner.consume(user, key="on its way")]
        while not calls[0].running():
            time.sleep(0.01)
        calls += [combiner.consume(user, key=key) for key in "ab"]
        with pytest.raises(DatabaseUnavailable, match="more than 2 calls") as caught:
            combiner.consume(user, key="c")
        assert caught.value.retryable
        release()
        assert [call.result(PATIENCE_S).balance_after for call in calls] == [19, 18, 17]
        assert combiner.consume(user, key="d").result(PATIENCE_S).balance_after == 16


def test_nothing_of_it_stays_with_a_connection(world: World) -> None:
    engine = sa.create_engine(world.url, pool_size=1, max_overflow=0)
    user = world.user(credits=5)
    with Combiner(world.ledger, engine) as combiner:
        calls = [combiner.consume(user, key=f"{n}") for n in range(5)]
    assert all(call.result(0) for call in calls)
    with engine.connect() as conn:
        assert conn.exec_driver_sql("SHOW lock_timeout").scalar() == "0"
    engine.dispose()


# --- the thread ends before its time ---


def end(name: str) -> None:
    """An exception in another thread, as a profiler or a time limit of the host's may raise it."""
    (thread,) = (each for each in threading.enumerate() if each.name == name)
    assert ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident), ctypes.py_object(SystemExit)) == 1


not_traced = pytest.mark.skipif(
    sys.gettrace() is not None,
    reason="beside a tracer (make coverage), Python stops all threads while an exception for a blocked one is pending",
)


@not_traced
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_thread_that_was_ended_tells_everybody_and_the_next_call_starts_another(world: World, gate: Any) -> None:
    engine, release = gate
    user, other = world.user(credits=10), world.user(credits=10)
    with Combiner(world.ledger, engine, batch_max=1) as combiner:
        on_its_way = combiner.consume(user, key="on its way")
        while not on_its_way.running():
            time.sleep(0.01)
        waiting = [combiner.consume(user, key="a"), combiner.consume(other, key="b")]
        end("tallystick-combiner")
        release()
        error = on_its_way.exception(PATIENCE_S)
        assert isinstance(error, OutcomeUnknown)
        assert "SystemExit" in str(error)
        for call in waiting:
            error = call.exception(PATIENCE_S)
            assert isinstance(error, DatabaseUnavailable)
            assert error.retryable
        assert combiner.consume(user, key="a").result(PATIENCE_S).balance_after == 9
        assert combiner.consume(user, key="on its way").result(PATIENCE_S).balance_after == 8


@not_traced
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_thread_that_was_ended_after_the_row_was_written(world: World, combiner: Combiner) -> None:
    """The server has committed, and the thread ends before it can tell: unknown, and the same call again tells it."""
    user, other = world.user(credits=10), world.user(credits=10)
    with held(world, user):
        written = combiner.consume(user, key="a")
        while not served_apart(world):
            time.sleep(0.01)
        waiting = combiner.consume(user, key="b")
        end("tallystick-combiner-locked")
    assert isinstance(written.exception(PATIENCE_S), OutcomeUnknown)
    assert isinstance(waiting.exception(PATIENCE_S), DatabaseUnavailable)
    assert combiner.consume(other, key="a").result(PATIENCE_S).balance_after == 9
    assert combiner.consume(user, key="a").result(PATIENCE_S).replayed
    assert combiner.consume(user, key="b").result(PATIENCE_S).balance_after == 8


# --- the interpreter exits ---

PROGRAM = """
import multiprocessing, sys, threading
import sqlalchemy as sa
from tallystick import Ledger
from tallystick.ledger.combiner import Combiner

how, url, user = sys.argv[1:]

def ask():
    engine = sa.create_engine(url, poolclass=sa.NullPool)
    with engine.connect() as conn:
        ledger = Ledger(conn)
    if how == "unreachable":
        engine = sa.create_engine("postgresql+psycopg://nobody@/nothing?host=/nonexistent", poolclass=sa.NullPool)
    combiner = Combiner(ledger, engine, batch_max=3)
    calls = [combiner.consume(user, key=f"{n}") for n in range(40)]
    threading.Thread(target=wait, args=(combiner, calls)).start()

def wait(combiner, calls):
    print(sorted({type(call.exception() or call.result()).__name__ for call in calls}), flush=True)
    threading.main_thread().join()  # a Combiner closes as the main thread ends
    try:
        combiner.consume(user, key="late")
    except RuntimeError as error:
        print(error, flush=True)

if how == "multiprocessing":
    process = multiprocessing.get_context("fork").Process(target=ask)
    process.start()
    process.join()
    sys.exit(process.exitcode)
ask()
if how == "exception":
    raise ValueError("the app's own")
"""


@pytest.mark.parametrize(
    ("how", "expected", "code"),
    [
        ("end", "CreditTransaction", 0),
        ("exception", "CreditTransaction", 1),
        ("multiprocessing", "CreditTransaction", 0),
        ("unreachable", "DatabaseUnavailable", 0),
    ],
)
def test_what_waits_when_the_interpreter_exits_is_written_or_told(
    world: World, how: str, expected: str, code: int
) -> None:
    user = world.user(credits=100)
    ran = subprocess.run(
        [sys.executable, "-c", PROGRAM, how, world.url, str(user)],
        capture_output=True, text=True, timeout=PATIENCE_S, check=False,
    )  # fmt: skip
    assert ran.returncode == code, ran.stderr
    assert ran.stdout.splitlines()[0] == f"['{expected}']", ran.stderr
    assert "this Combiner is closed; make another one" in ran.stdout
    assert ("Traceback" in ran.stderr) == (how == "exception")
    with world.engine.connect() as conn:
        assert world.ledger.balance(conn, user) == (60 if expected == "CreditTransaction" else 100)


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
            combiner.consume(uuid.uuid4(), key="a")
        except RuntimeError:
            os._exit(42)
        finally:
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
        while not served_apart(world):
            time.sleep(0.01)
        waiting = combiner.consume(user, key="waiting")
        assert waiting.cancel()
    assert under_way.result(PATIENCE_S).balance_after == 9
    with world.engine.connect() as conn:
        assert world.ledger.balance(conn, user) == 9


def test_closing_finishes_what_was_asked_for(world: World) -> None:
    user = world.user(credits=10)
    combiner = Combiner(world.ledger, world.engine, batch_max=2)
    calls = [combiner.consume(user, key=f"{n}") for n in range(7)]
    combiner.close()
    combiner.close()
    assert [call.result(0).balance_after for call in calls] == [9, 8, 7, 6, 5, 4, 3]
    with pytest.raises(RuntimeError, match="make another one"):
        combiner.consume(user, key="late")
