"""The feed: each change of the ledger once, in an order, and none missed while transactions are open."""

from __future__ import annotations

import datetime as dt
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import psycopg
import pytest
import sqlalchemy as sa

from tallystick import Event, events, migrate
from tallystick.audit import audit
from tallystick.errors import InvalidArgument, Key, MigrationBlocked, UnknownUser
from tallystick.ledger import Consume
from worlds import World


def feed(world: World, after: str | None = None) -> list[Event]:
    """All that there is behind a cursor, a few at a time."""
    found: list[Event] = []
    world.wait_for_analyze()
    with world.engine.connect() as conn:
        while page := world.ledger.events(conn, after=found[-1].cursor if found else after, limit=3):
            found += page
    return found


def kinds(found: list[Event]) -> list[str]:
    return [event.kind for event in found]


def written(world: World) -> int:
    with world.engine.connect() as conn:
        return conn.scalar(sa.text("SELECT count(*) FROM tallystick.events")) or 0


def trigger(world: World) -> int:
    with world.engine.connect() as conn:
        return conn.scalar(sa.text("SELECT count(*) FROM pg_trigger WHERE tgname = 'tallystick_events'")) or 0


class TestOnAndOff:
    def test_nothing_is_written_while_events_are_off(self, world: World) -> None:
        user = world.user(credits=3)
        with world.engine.begin() as conn:
            world.ledger.consume(conn, user, key="a")
            assert world.ledger.events(conn) == []
            assert events.status(conn) == events.EventsStatus(None, None, False, None, None, 0)
        assert (written(world), trigger(world)) == (0, 0)

    def test_on_and_off_and_on(self, any_world: World) -> None:
        user = any_world.user(credits=5)
        for number, on in enumerate([True, True, False, False, True]):
            (events.enable if on else events.disable)(any_world.url, any_world.config)
            with any_world.engine.begin() as conn:
                any_world.ledger.consume(conn, user, key=f"{number}")
                status = events.status(conn)
                assert (status.enabled, trigger(any_world)) == (on, on)
        assert [event.idempotency_key for event in feed(any_world)] == ["0", "1", "4"]
        with any_world.engine.connect() as conn:
            assert migrate.status(conn, any_world.config).healthy

    def test_settings_that_are_not_given_stay(self, world: World) -> None:
        events.enable(world.url, world.config, low_balance=3, notify=True)
        events.enable(world.url, world.config)
        with world.engine.connect() as conn:
            assert (events.status(conn).low_balance, events.status(conn).notifies) == (3, True)
        events.enable(world.url, world.config, low_balance=0, notify=False)
        with world.engine.connect() as conn:
            assert (events.status(conn).low_balance, events.status(conn).notifies) == (0, False)
        with pytest.raises(InvalidArgument, match="low_balance=-1"):
            events.enable(world.url, world.config, low_balance=-1)

    def test_a_busy_ledger_is_not_waited_for(self, world: World) -> None:
        user = world.user(credits=1)
        with world.engine.begin() as conn:
            world.ledger.consume(conn, user, key="a")
            with pytest.raises(MigrationBlocked, match='credit_transactions" was never free for 20 ms'):
                events.enable(world.url, world.config, lock_timeout_ms=20, give_up_after_s=0.1)
        assert trigger(world) == 0

    @pytest.mark.parametrize(
        ("on", "change", "remedy"),
        [
            (True, "ALTER TABLE credit_transactions DISABLE TRIGGER tallystick_events", "enable"),
            (True, "DROP TRIGGER tallystick_events ON credit_transactions", "enable"),
            (False, "UPDATE tallystick.event_settings SET recorded_since = NULL", "disable"),
        ],
    )
    def test_a_trigger_that_is_not_as_it_should_be(self, world: World, on: bool, change: str, remedy: str) -> None:
        events.enable(world.url, world.config)
        with world.engine.begin() as conn:
            conn.execute(sa.text(change))
        with world.engine.connect() as conn:
            (drift,) = migrate.status(conn, world.config).drift
            assert (drift.kind, drift.where) == ("trigger", "public.credit_transactions.tallystick_events")
            assert drift.remedy == f"tallystick events {remedy}"
        (events.enable if on else events.disable)(world.url, world.config)
        with world.engine.connect() as conn:
            assert migrate.status(conn, world.config).healthy

    def test_undo_takes_the_feed_away(self, world: World) -> None:
        world.user(credits=1)
        events.enable(world.url, world.config)
        world.user(credits=1)
        before = "0002"
        migrate.undo(world.url, world.config, to=before, discard_ledger=True)
        with world.engine.connect() as conn:
            assert conn.scalar(sa.text("SELECT to_regclass('tallystick.events')")) is None
        world.user(credits=1)  # and the ledger goes on
        migrate.apply(world.url, world.config)
        assert feed(world) == []


def test_each_change_is_an_event(world: World) -> None:
    events.enable(world.url, world.config)
    user = world.user()
    workshop = world.workshop(user)
    ledger = world.ledger
    with world.engine.begin() as conn:
        bought = world.buy(conn, user, 5)
        given_up = ledger.start_purchase(conn, user, credits=9, description="nine")
        ledger.fail_purchase(conn, user, purchase=given_up.id, reason="expired")
        spent = ledger.consume(conn, user, workshop=workshop, key="a", metadata={"actor": "Ada"})
        ledger.consume(conn, user, workshop=workshop, key="a")  # a replay is nothing new
        ledger.refund(conn, user, bought.id, credits=2, key="r")
        ledger.reinstate(conn, user, bought.id, credits=1, key="i")
        ledger.grant(conn, user, credits=4, key="g", description="Welcome")
        ledger.consume_many(conn, [Consume(user, key="b"), Consume(user, key="c"), Consume(user, key="d", credits=99)])
    found = feed(world)
    assert kinds(found) == [
        "purchase.completed",
        "purchase.failed",
        "consumption.completed",
        "refund.completed",
        "grant.completed",
        "grant.completed",
        "consumption.completed",
        "consumption.completed",
    ]
    assert [event.sequence for event in found if event.sequence] == [1, 2, 3, 4, 5, 6, 7]
    assert found[2] == Event(
        id=found[2].id,
        cursor=found[2].cursor,
        kind="consumption.completed",
        created_at=found[2].created_at,
        user_id=user,
        transaction_id=spent.id,
        amount=-1,
        balance_after=4,
        sequence=2,
        workshop_id=workshop,
        idempotency_key="a",
        metadata={"actor": "Ada"},
        threshold=None,
    )
    assert found[2].created_at.tzinfo == dt.UTC


def test_holds_are_events_as_they_were(world: World) -> None:
    """Told later, an event still says what was held, not what was captured."""
    events.enable(world.url, world.config, low_balance=3)
    user = world.user(credits=9)
    ledger = world.ledger
    with world.engine.begin() as conn:
        captured = ledger.hold(conn, user, credits=5, key="a", expires_in=dt.timedelta(hours=1), capture_limit=8)
        released = ledger.hold(conn, user, credits=2, key="b", expires_in=dt.timedelta(hours=1))
        expired = ledger.hold(conn, user, credits=1, key="c", expires_in=dt.timedelta(seconds=1))
        ledger.release(conn, user, released.id)
        ledger.capture(conn, user, captured.id, credits=7)
    time.sleep(1.1)
    with world.engine.begin() as conn:
        ledger.reverse(conn, user, captured.id, credits=6, key="d")
    found = feed(world)[1:]
    assert [(event.kind, event.transaction_id, event.amount, event.balance_after) for event in found[:-1]] == [
        ("consumption.held", captured.id, -5, None),
        ("consumption.held", released.id, -2, None),
        ("consumption.held", expired.id, -1, None),
        ("consumption.released", released.id, -2, None),
        ("consumption.completed", captured.id, -7, 2),
        ("balance.low", captured.id, -7, 2),
        ("consumption.expired", expired.id, -1, None),
    ]
    assert (found[-1].kind, found[-1].amount, found[-1].balance_after) == ("reversal.completed", 6, 8)


def test_credits_that_expire_are_events(world: World) -> None:
    events.enable(world.url, world.config, low_balance=2)
    user = world.user()
    with world.engine.begin() as conn:
        soon = dt.datetime.now(dt.UTC) + dt.timedelta(seconds=1)
        world.ledger.grant(conn, user, credits=3, key="g", description="Trial", expires_at=soon)
    time.sleep(1.1)
    with world.engine.begin() as conn:
        world.ledger.sweep(conn)
    assert [(event.kind, event.amount) for event in feed(world)] == [
        ("grant.completed", 3),
        ("expiry.completed", -3),
        ("balance.low", -3),
    ]


def test_what_is_rolled_back_is_no_event(world: World) -> None:
    events.enable(world.url, world.config)
    user = world.user(credits=2)
    with world.engine.connect() as conn:
        world.ledger.consume(conn, user, key="a")
        conn.rollback()
    assert kinds(feed(world)) == ["purchase.completed"]


class TestThresholds:
    def move(self, world: World, user: Key, *amounts: int) -> None:
        with world.engine.begin() as conn:
            for amount in amounts:
                key = f"{random.random()}"
                if amount > 0:
                    world.ledger.grant(conn, user, credits=amount, key=key, description="given")
                else:
                    world.ledger.consume(conn, user, credits=-amount, key=key)

    def crossings(self, world: World, user: Key) -> list[tuple[str, int | None, int | None]]:
        return [
            (event.kind, event.threshold, event.balance_after)
            for event in feed(world)
            if event.user_id == user and event.kind.startswith("balance.")
        ]

    def test_low_is_told_once_for_each_crossing(self, world: World) -> None:
        events.enable(world.url, world.config, low_balance=3)
        user = world.user()
        self.move(world, user, +5, -1, -1, -1, -1, +1, +1, -1, -2)
        assert self.crossings(world, user) == [("balance.low", 3, 2), ("balance.low", 3, 2)]

    def test_a_users_own_threshold_comes_first(self, any_world: World) -> None:
        events.enable(any_world.url, any_world.config, low_balance=3)
        careful, never, back = any_world.user(), any_world.user(), any_world.user()
        accounts = any_world.accounts
        with any_world.engine.begin() as conn:
            for user, threshold in ((careful, 10), (never, 0), (back, 7), (back, 8)):
                assert accounts.set_low_balance(conn, user, threshold).user == user
            accounts.set_low_balance(conn, back, None)
            with pytest.raises(UnknownUser):
                accounts.set_low_balance(conn, any_world.key(any_world.config.host.users.key_type), 3)
            with pytest.raises(InvalidArgument, match="threshold=-1"):
                accounts.set_low_balance(conn, back, -1)
        for user in (careful, never, back):
            self.move(any_world, user, +10, -1, -7, -2)
        assert self.crossings(any_world, careful) == [("balance.low", 10, 9)]
        assert self.crossings(any_world, never) == []
        assert self.crossings(any_world, back) == [("balance.low", 3, 2)]

    def test_debt_is_told_when_it_begins(self, world: World) -> None:
        events.enable(world.url, world.config, low_balance=1)
        user = world.user()
        with world.engine.begin() as conn:
            bought = world.buy(conn, user, 5)
            world.ledger.consume(conn, user, credits=3, key="a")
            for number in range(5):
                world.ledger.refund(conn, user, bought.id, credits=1, key=f"{number}")
        assert self.crossings(world, user) == [("balance.low", 1, 0), ("balance.debt", None, -1)]

    def test_crossings_are_exact_under_concurrency(self, world: World) -> None:
        """Spent by many, and topped up beside: as many as the chain of balances has."""
        events.enable(world.url, world.config, low_balance=6)
        user = world.user(credits=5)

        def many(seed: int) -> None:
            with world.autocommit.connect() as conn:
                for number in range(20):
                    world.ledger.grant(conn, user, credits=2, key=f"{seed}-{number}", description="given")
                    world.ledger.consume(conn, user, key=f"{seed}-{number} a")
                    world.ledger.consume_many(conn, [Consume(user, key=f"{seed}-{number} b")])

        with ThreadPoolExecutor(4) as pool:
            list(pool.map(many, range(4)))
        with world.engine.connect() as conn:
            rows = sorted(world.ledger.history(conn, user, limit=1000), key=lambda row: row.sequence or 0)
        chain = [(row.balance_after or 0) for row in rows]
        expected = [after for before, after in itertools.pairwise(chain) if before >= 6 > after]
        assert expected  # the last one ends where the first began
        assert sorted(after or 0 for _, _, after in self.crossings(world, user)) == sorted(expected)


class TestOrder:
    def test_what_an_open_transaction_may_still_write_is_waited_for(self, world: World) -> None:
        """The reader that would have gone on past it gets it in its place."""
        events.enable(world.url, world.config)
        first, second, third = (world.user() for _ in range(3))
        with world.engine.connect() as open_one:
            world.buy(open_one, first, 1)
            with world.engine.begin() as conn:
                world.buy(conn, second, 2)
            assert feed(world) == []
            with world.engine.connect() as conn:
                assert events.status(conn).waiting == 1
            world.buy(open_one, third, 3)
            open_one.commit()
        assert [event.user_id for event in feed(world)] == [first, third, second]

    def test_a_reader_sees_nothing_of_its_own_open_transaction(self, world: World) -> None:
        events.enable(world.url, world.config)
        with world.engine.begin() as conn:
            world.buy(conn, world.user(), 1)
            assert world.ledger.events(conn) == []
        assert kinds(feed(world)) == ["purchase.completed"]

    def test_a_reader_beside_open_transactions_skips_nothing(self, world: World) -> None:
        events.enable(world.url, world.config)
        users = [world.user(credits=1000) for _ in range(3)]
        seen = feed(world)
        done = threading.Event()

        def write(seed: int) -> int:
            chance, spent = random.Random(seed), 0
            with world.engine.connect() as conn:
                for number in range(60):
                    world.ledger.consume(conn, users[seed], key=f"{number}")
                    if chance.random() < 0.3:
                        time.sleep(chance.random() / 50)
                    if chance.random() < 0.5:
                        conn.commit()
                    spent += 1
                conn.commit()
            return spent

        def read() -> None:
            with world.autocommit.connect() as conn:
                while True:
                    last_look = done.is_set()
                    page = world.ledger.events(conn, after=seen[-1].cursor, limit=7)
                    seen.extend(page)
                    if last_look and not page:
                        return

        with ThreadPoolExecutor(4) as pool:
            reader = pool.submit(read)
            spent = sum(pool.map(write, range(3)))
            done.set()
            reader.result()
        assert len(seen) == len({event.id for event in seen}) == spent + 3
        places = [tuple(map(int, event.cursor.split("-"))) for event in seen]
        assert places == sorted(places)
        for user in users:
            assert [event.sequence for event in seen if event.user_id == user] == list(range(1, 62))

    @pytest.mark.parametrize("cursor", ["", "1", "a-b", "1-2-3", "-1-2", "1-2 ", "9" * 30 + "-1"])
    def test_no_cursor(self, world: World, cursor: str) -> None:
        with world.engine.connect() as conn, pytest.raises(InvalidArgument, match="after"):
            world.ledger.events(conn, after=cursor)

    def test_limits(self, world: World) -> None:
        with world.engine.connect() as conn:
            for limit in (0, 1001):
                with pytest.raises(InvalidArgument, match=f"limit={limit}"):
                    world.ledger.events(conn, limit=limit)


class TestOnAnotherServer:
    """A database that was restored where fewer transactions had run; here its events are given higher numbers."""

    @pytest.fixture
    def restored(self, world: World) -> World:
        events.enable(world.url, world.config)
        for credits in (1, 2):
            world.user(credits=credits)
        with world.engine.begin() as conn:
            conn.execute(sa.text("UPDATE tallystick.events SET position = position + 1000000"))
        return world

    def test_the_feed_says_so_until_it_is_enabled_again(self, restored: World) -> None:
        restored.user(credits=3)
        with restored.engine.connect() as conn, pytest.raises(sa.exc.DBAPIError, match="tallystick events enable"):
            restored.ledger.events(conn)
        with restored.engine.begin() as conn:
            cursor = conn.scalar(sa.text("SELECT max(position) || '-' || max(id) - 1 FROM tallystick.events"))
        for _ in range(5):  # others go on meanwhile
            with restored.engine.begin() as conn:
                conn.execute(sa.text("SELECT pg_current_xact_id()"))

        events.enable(restored.url, restored.config)

        restored.user(credits=4)
        assert [event.amount for event in feed(restored)] == [1, 2, 3, 4]
        # a reader that had read it all on the old server
        assert [event.amount for event in feed(restored, after=cursor)] == [3, 4]
        before = feed(restored)
        events.enable(restored.url, restored.config)
        assert feed(restored) == before


def test_old_events_are_removed(world: World) -> None:
    events.enable(world.url, world.config)
    for credits in (1, 2, 3):
        world.user(credits=credits)
    with world.engine.begin() as conn:
        age = "UPDATE tallystick.events SET created_at = created_at - interval '40 days' WHERE id <= 2"
        conn.execute(sa.text(age))
    assert events.prune(world.url, older_than=dt.timedelta(days=50)) == 0
    assert events.prune(world.url, older_than=dt.timedelta(days=30)) == 2
    assert [event.amount for event in feed(world)] == [3]
    with pytest.raises(InvalidArgument):
        events.prune(world.url, older_than=dt.timedelta(days=-1))


def test_a_notification_wakes_readers(world: World) -> None:
    events.enable(world.url, world.config, notify=True)
    with psycopg.connect(world.url.replace("+psycopg", ""), autocommit=True) as listener:
        listener.execute("LISTEN tallystick_events")
        world.user(credits=1)
        assert [each.channel for each in listener.notifies(timeout=10, stop_after=1)] == ["tallystick_events"]
        events.enable(world.url, world.config, notify=False)
        world.user(credits=1)
        assert list(listener.notifies(timeout=0.5)) == []


class TestFollow:
    @contextmanager
    def running(self, world: World, *arguments: str, encoding: str = "utf-8") -> Iterator[subprocess.Popen[str]]:
        command = [
            sys.executable,
            "-c",
            "from tallystick.cli import main; main()",
            "events",
            "follow",
            "--poll",
            "0.1",
            *arguments,
        ]
        environ = {**os.environ, "DATABASE_URL": world.url, "PYTHONIOENCODING": encoding}
        with subprocess.Popen(
            command, env=environ, encoding=encoding, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        ) as process:
            try:
                yield process
            finally:
                process.kill()

    def test_each_line_is_an_event(self, world: World) -> None:
        events.enable(world.url, world.config)
        world.user(credits=1)
        with self.running(world) as process:
            assert process.stdout is not None
            first = json.loads(process.stdout.readline())
            assert (first["kind"], first["amount"]) == ("purchase.completed", 1)
            user = world.user(credits=2)
            second = json.loads(process.stdout.readline())
            assert (second["user_id"], second["amount"]) == (str(user), 2)
            process.send_signal(signal.SIGINT)
            assert process.communicate(timeout=20) == ("", "")
            assert process.returncode == 0
        with self.running(world, "--after", first["cursor"]) as process:
            assert process.stdout is not None
            assert json.loads(process.stdout.readline()) == second

    def test_a_line_is_json_in_every_encoding(self, world: World) -> None:
        events.enable(world.url, world.config)
        with world.engine.begin() as conn:
            world.ledger.grant(conn, world.user(), credits=1, description="Welcome", key="für 😀")
        with self.running(world, encoding="latin-1") as process:
            assert process.stdout is not None
            assert json.loads(process.stdout.readline())["idempotency_key"] == "für 😀"

    def test_while_events_are_off_a_note_says_so(self, world: World) -> None:
        with self.running(world) as process:
            assert process.stderr is not None
            assert process.stderr.readline() == "Events are off. To write them: tallystick events enable\n"
            events.enable(world.url, world.config)
            world.user(credits=1)
            assert process.stdout is not None
            assert json.loads(process.stdout.readline())["kind"] == "purchase.completed"

    def test_it_goes_on_over_a_lost_connection(self, world: World) -> None:
        events.enable(world.url, world.config)
        lost: list[str] = []
        followed = events.follow(world.url, world.config, poll_s=0.1, lost=lost.append)
        amounts = []
        for credits in (1, 2, 3):
            world.user(credits=credits)
            amounts.append(next(followed).amount)
            with world.autocommit.connect() as conn:
                ended = "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE query LIKE '%events(%'"
                conn.execute(sa.text(f"{ended} AND pid <> pg_backend_pid()"))
        followed.close()
        assert amounts == [1, 2, 3]
        assert len(lost) == 2

    def test_a_wrong_cursor_is_refused(self, world: World) -> None:
        with pytest.raises(InvalidArgument, match="after"):
            next(events.follow(world.url, world.config, after="yesterday"))


def test_the_audit_finds_a_row_without_its_event(world: World) -> None:
    """Rows that completed before events were on have none; the audit looks for no event that was pruned."""
    user = world.user(credits=9)
    events.enable(world.url, world.config)
    with world.engine.begin() as conn:
        world.ledger.consume(conn, user, key="a")
        conn.execute(sa.text("ALTER TABLE credit_transactions DISABLE TRIGGER tallystick_events"))
        lost = world.ledger.consume(conn, user, key="b")
        conn.execute(sa.text("ALTER TABLE credit_transactions ENABLE TRIGGER tallystick_events"))
    with world.engine.connect() as conn:
        (finding,) = audit(conn, world.config).findings
        assert (finding.check, finding.transaction, finding.fault) == ("event_recorded", lost.id, True)
    assert events.prune(world.url, older_than=dt.timedelta()) == 1
    with world.engine.connect() as conn:
        assert audit(conn, world.config).clean
