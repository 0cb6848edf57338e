"""Events delivered to a real receiver that fails in every way: at least once, in order, signed, kept if not taken."""

from __future__ import annotations

import datetime as dt
import json
import os
import re
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import sqlalchemy as sa
from standardwebhooks import Webhook

from tallystick import events
from tallystick.cli import main
from tallystick.declared_tables import event_endpoints
from tallystick.errors import ConfigError, InvalidArgument
from tallystick.events.deliver import (
    KINDS,
    Sent,
    add_endpoint,
    dead_letters,
    deliver,
    endpoints,
    remove_endpoint,
    replay,
)
from worlds import World

pytestmark = pytest.mark.one_server  # it is about what is sent; test_events runs on both

SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
OTHER = "whsec_C2FVsBQIhrscChlQIMV+b5sSYspob7oD"
AT_ONCE = (0.0, 0.0, 0.0)  # four attempts


@dataclass
class Receiver:
    folder: Path
    url: str = ""

    def answers(self, *answers: object) -> None:
        (self.folder / "answers").write_text("\n".join(map(str, answers)))

    @property
    def received(self) -> list[dict[str, Any]]:
        file = self.folder / "received"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    @property
    def taken(self) -> list[int]:
        """The amounts of what was answered with 2xx, each verified."""
        return [
            Webhook(SECRET).verify(each["body"], each["headers"])["data"]["amount"]
            for each in self.received
            if each["answer"] == "200"
        ]


@pytest.fixture(scope="module")
def receiving(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Receiver]:
    """The process that receives, with a folder in which each test has one of its own."""
    folder = tmp_path_factory.mktemp("receiver")
    command = [sys.executable, str(Path(__file__).with_name("webhook_receiver.py")), str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        yield Receiver(folder, f"http://127.0.0.1:{int(process.stdout.readline())}")
        process.kill()


@pytest.fixture
def receiver(receiving: Receiver) -> Receiver:
    name = uuid.uuid4().hex
    made = Receiver(receiving.folder / name, f"{receiving.url}/{name}/hook")
    made.folder.mkdir()
    made.answers(200)
    return made


@pytest.fixture
def shop(world: World, receiver: Receiver, monkeypatch: pytest.MonkeyPatch) -> World:
    """Events are on, and one endpoint named ``app``."""
    monkeypatch.setenv("HOOK_SECRET", SECRET)
    events.enable(world.url, world.config, low_balance=5)
    with world.engine.begin() as conn:
        add_endpoint(conn, "app", receiver.url, secret_variable="HOOK_SECRET")
    return world


def run(world: World, **options: Any) -> list[Sent]:
    """All that can be delivered now, and what failed at once again."""
    reported: list[Any] = []
    world.wait_for_analyze()
    options = {"pauses_s": AT_ONCE, "timeout_s": 1.0, "poll_s": 0.1} | options
    deliver(world.url, world.config, once=True, report=reported.append, **options)
    return reported


def test_an_event_is_signed_and_sent_once(shop: World, receiver: Receiver) -> None:
    user = shop.user(credits=7)
    assert [(done.kind, done.error) for done in run(shop)] == [("purchase.completed", None)]
    (sent,) = receiver.received
    payload = Webhook(SECRET).verify(sent["body"], sent["headers"])
    with shop.engine.connect() as conn:
        (event,) = shop.ledger.events(conn)
    assert sent["headers"]["webhook-id"] == f"evt_{event.id}"
    assert (payload["type"], payload["timestamp"]) == ("purchase.completed", event.created_at.isoformat())
    assert payload["data"] == {
        "id": event.id,
        "cursor": event.cursor,
        "user_id": str(user),
        "transaction_id": str(event.transaction_id),
        "amount": 7,
        "balance_after": 7,
        "sequence": 1,
        "workshop_id": None,
        "idempotency_key": None,
        "metadata": None,
        "threshold": None,
    }
    assert run(shop) == []


def test_two_secrets_while_one_is_replaced(shop: World, receiver: Receiver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOOK_SECRET", f"{OTHER} {SECRET}")
    shop.user(credits=1)
    run(shop)
    (sent,) = receiver.received
    for secret in (SECRET, OTHER):
        assert Webhook(secret).verify(sent["body"], sent["headers"])["data"]["amount"] == 1


@pytest.mark.parametrize("answer", ["500", "302", "404", "hang", "drip", "close"])
def test_what_is_not_taken_is_sent_again_and_the_next_waits(shop: World, receiver: Receiver, answer: str) -> None:
    receiver.answers(answer, answer, 200)
    for credits in (1, 2):
        shop.user(credits=credits)
    reported = run(shop)
    assert [done.error is None for done in reported] == [False, False, True, True]
    assert receiver.taken == [1, 2]
    ids = [sent["headers"]["webhook-id"] for sent in receiver.received]
    assert ids == [ids[0], ids[0], ids[0], ids[3]]


def test_a_receiver_that_is_not_there(shop: World, receiver: Receiver) -> None:
    with shop.engine.begin() as conn:
        add_endpoint(conn, "app", "http://127.0.0.1:9/hook", secret_variable="HOOK_SECRET")
    shop.user(credits=1)
    (done,) = run(shop, pauses_s=(60.0,))
    assert "Connection refused" in str(done.error)
    with shop.engine.connect() as conn:
        (endpoint,) = endpoints(conn)
    assert (endpoint.attempts, endpoint.last_error) == (1, done.error)


def test_a_pause_is_kept(shop: World, receiver: Receiver) -> None:
    receiver.answers(500)
    shop.user(credits=1)
    assert [done.error for done in run(shop, pauses_s=(60.0,))] == ["it answered 500 Internal Server Error"]
    assert run(shop) == []
    assert len(receiver.received) == 1


def test_an_endpoint_that_is_changed_is_tried_at_once(shop: World, receiver: Receiver) -> None:
    """With all attempts again: those before failed at another address, or with another secret."""
    with shop.engine.begin() as conn:
        add_endpoint(conn, "app", "http://127.0.0.1:9/hook", secret_variable="HOOK_SECRET")
    shop.user(credits=1)
    assert [done.dead for done in run(shop, pauses_s=(60.0,))] == [False]
    receiver.answers(500, 200)
    with shop.engine.begin() as conn:
        changed = add_endpoint(conn, "app", receiver.url, secret_variable="HOOK_SECRET")
        assert (changed.attempts, changed.next_attempt_at, changed.last_error) == (0, None, None)
    assert [(done.error is None, done.dead) for done in run(shop, pauses_s=(0.0,))] == [(False, False), (True, False)]
    assert receiver.taken == [1]


def test_after_the_last_attempt_it_is_a_dead_letter_and_can_be_replayed(shop: World, receiver: Receiver) -> None:
    receiver.answers(500, 500, 500, 500, 200)
    for credits in (1, 2):
        shop.user(credits=credits)
    reported = run(shop)
    assert [(done.error is None, done.dead) for done in reported] == [
        *[(False, False)] * 3,
        (False, True),
        (True, False),
    ]
    assert receiver.taken == [2]
    with shop.engine.begin() as conn:
        (letter,) = dead_letters(conn)
        assert (letter.endpoint, letter.attempts, letter.kind) == ("app", 4, "purchase.completed")
        assert events.prune(shop.url, older_than=dt.timedelta()) == 2  # it is kept whole
        with pytest.raises(InvalidArgument, match="no dead letter 999"):
            replay(conn, "app", [999])
        receiver.answers(503, 200)
        assert [done.error for done in replay(conn, "app")] == ["it answered 503 Service Unavailable"]
        assert dead_letters(conn)[0].attempts == 5
        assert [done.error for done in replay(conn, "app", [letter.event_id])] == [None]
        assert (dead_letters(conn), replay(conn, "app")) == ([], [])
    assert receiver.taken == [2, 1]
    bodies = [sent["body"] for sent in receiver.received]
    assert bodies[0] == bodies[-1]


def test_only_the_kinds_that_are_asked_for(shop: World, receiver: Receiver) -> None:
    with shop.engine.begin() as conn:
        add_endpoint(conn, "app", receiver.url, secret_variable="HOOK_SECRET", kinds=["balance.low"])
    user = shop.user(credits=6)
    with shop.engine.begin() as conn:
        for number in range(3):
            shop.ledger.consume(conn, user, key=f"{number}")
    assert [done.kind for done in run(shop)] == ["balance.low"]
    with shop.engine.connect() as conn:
        (endpoint,) = endpoints(conn)
        assert endpoint.cursor == events.status(conn).cursor


def test_an_endpoint_begins_now_or_where_it_is_told(world: World, receiver: Receiver, monkeypatch) -> None:
    monkeypatch.setenv("HOOK_SECRET", SECRET)
    events.enable(world.url, world.config)
    for credits in (1, 2, 3):
        world.user(credits=credits)
    with world.engine.begin() as conn:
        first = world.ledger.events(conn)[0]
        for name, where in (("now", {}), ("all", {"from_oldest": True}), ("some", {"after": first.cursor})):
            add_endpoint(conn, name, receiver.url, secret_variable="HOOK_SECRET", **where)
    done = run(world)
    assert sorted((each.endpoint, each.event_id - first.id) for each in done) == [
        *(("all", number) for number in range(3)),
        *(("some", number) for number in (1, 2)),
    ]
    with world.engine.begin() as conn:
        remove_endpoint(conn, "all")
        with pytest.raises(InvalidArgument, match="no endpoint 'all'"):
            remove_endpoint(conn, "all")
        assert [endpoint.name for endpoint in endpoints(conn)] == ["now", "some"]


@pytest.mark.parametrize("url", ["http://example.com/hook", "ftp://example.com", "example.com", "https://"])
def test_an_address_that_others_could_read(shop: World, url: str) -> None:
    with shop.engine.begin() as conn, pytest.raises(InvalidArgument, match="https://"):
        add_endpoint(conn, "app", url, secret_variable="HOOK_SECRET")


@pytest.mark.parametrize(
    ("argument", "value", "told"),
    [
        ("after", "abc", "after='abc': pass the cursor of an event; the newest: tallystick events status"),
        ("after", "1-2\n", "after='1-2\\n': pass the cursor"),
        ("after", "", "after='': pass the cursor"),
        ("kinds", ["balance.low", "purchase.complete"], "kinds='purchase.complete': pass some of purchase.completed, "),
        ("kinds", [], "kinds=[]: pass some of "),
        ("kinds", "balance.low", "kinds='b': pass some of "),
        ("url", "https://example.com/Käse?a=1", "as 'https://example.com/K%C3%A4se?a=1'"),
        ("url", "https://example.com/a b", "as 'https://example.com/a%20b'"),
        ("url", "https://[::1", "pass an address"),
        ("url", "https://example.com:99999/", "a port from 1 to 65535"),
        ("url", "https://example.com:0/", "a port from 1 to 65535"),
        ("url", "https://example.com:https/", "a port from 1 to 65535"),
        ("url", "https://crm:secret@example.com/", "the database would store its password"),
        ("url", "https://example.com/\0", "percent-encode"),
        ("name", "a\0", "NUL"),
        ("name", "", "pass a text"),
        ("secret_variable", "whsec_a+b/c=", "pass the name of an environment variable"),
    ],
)
def test_an_endpoint_that_could_get_no_event_is_refused(shop: World, argument: str, value: Any, told: str) -> None:
    arguments = {"name": "crm", "url": "https://example.com", "secret_variable": "HOOK_SECRET", argument: value}
    with shop.engine.begin() as conn:
        with pytest.raises(InvalidArgument) as refused:
            add_endpoint(conn, arguments.pop("name"), arguments.pop("url"), **arguments)
        assert told in refused.value.message
        assert (refused.value.argument, len(endpoints(conn))) == (argument, 1)


def test_the_page_lists_all_kinds_of_events() -> None:
    page = (Path(__file__).parents[1] / "docs" / "events.md").read_text(encoding="utf-8")
    table = page[page.index("| kind |") :].partition("\n\n")[0]
    assert sorted(re.findall(r"`([a-z]+\.[a-z]+)`", table)) == sorted({*KINDS, "balance.low"})


@pytest.mark.parametrize(("secret", "message"), [("", "is not set"), ("whsec_", "holds no"), ("whsec_a", "holds no")])
def test_a_secret_that_is_none(shop: World, monkeypatch: pytest.MonkeyPatch, secret: str, message: str) -> None:
    monkeypatch.setenv("HOOK_SECRET", secret)
    with pytest.raises(ConfigError, match=f"HOOK_SECRET, .* {message}"):
        run(shop)


def add_broken(world: World, name: str, column: str, value: str) -> None:
    """An endpoint with a value that ``add_endpoint`` refuses, written by somebody else."""
    with world.engine.begin() as conn:
        add_endpoint(conn, name, "http://127.0.0.1:9/", secret_variable="HOOK_SECRET")
        change = sa.update(event_endpoints).where(event_endpoints.c.name == name)
        conn.execute(change.values({column: value}))


BROKEN = [
    ("cursor", "abc", "after='abc'", InvalidArgument),
    ("secret_variable", "NO_SECRET", "NO_SECRET, the secret of the endpoint a, is not set", ConfigError),
]


@pytest.mark.parametrize(("column", "value", "told", "error"), BROKEN)
def test_a_fault_of_one_endpoint_stops_no_other(
    shop: World, receiver: Receiver, column: str, value: str, told: str, error: type[Exception]
) -> None:
    for name in ("a", "b"):
        add_broken(shop, name, column, value)
    shop.user(credits=1)
    reported: list[Any] = []
    with pytest.raises(error, match=told.partition(" ")[0]):
        deliver(shop.url, shop.config, once=True, report=reported.append)
    assert receiver.taken == [1]
    sentences = sorted(each for each in reported if isinstance(each, str))
    assert [each[:3] for each in sentences] == ["a: ", "b: "]
    assert told in sentences[0]


def test_a_fault_of_an_endpoint_is_reported_while_the_others_go_on(shop: World, receiver: Receiver) -> None:
    shop.user(credits=1)
    with process(shop) as running:
        try:
            eventually(lambda: receiver.taken == [1])
            for number, (column, value, *_) in enumerate(BROKEN):
                add_broken(shop, f"broken-{number}", column, value)
            time.sleep(0.5)
            shop.user(credits=2)
            eventually(lambda: receiver.taken == [1, 2])
            assert running.poll() is None
        finally:
            running.terminate()


def test_an_unexpected_error_is_reported_and_raised(shop: World, receiver: Receiver, monkeypatch) -> None:
    shop.user(credits=1)

    def fail(*_: object) -> str:
        raise RuntimeError("nobody expected this")

    monkeypatch.setattr("tallystick.events.deliver._body", fail)
    with pytest.raises(RuntimeError, match="nobody expected this"):
        run(shop)


@pytest.mark.parametrize(
    "url",
    [
        *("http://127.0.0.1:9/ü", "http://127.0.0.1:port/", "nothing"),
        *("http://example.com/hook", "file:///dev/null", "data:text/plain,x"),
    ],
)
def test_an_address_that_add_endpoint_refuses_is_a_failed_attempt(shop: World, receiver: Receiver, url: str) -> None:
    """An app's role may write the table. A file would be read as if it had accepted the event."""
    add_broken(shop, "broken", "url", url)
    shop.user(credits=1)
    done = {each.endpoint: each.error for each in run(shop, pauses_s=(60.0,))}
    assert done["app"] is None
    assert str(done["broken"]).startswith("its address is not used: ")
    with shop.engine.connect() as conn:
        assert [each.attempts for each in endpoints(conn)] == [0, 1]


def process(world: World) -> subprocess.Popen[str]:
    script = (
        "import sys; from tallystick import Config; from tallystick.events.deliver import deliver; "
        f"deliver({world.url!r}, Config(database_url={world.url!r}), poll_s=0.1, pauses_s=(0.2,) * 50)"
    )
    return subprocess.Popen([sys.executable, "-c", script], env={**os.environ, "HOOK_SECRET": SECRET})


def eventually(check: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not check():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_killed_in_the_middle_it_is_sent_again(shop: World, receiver: Receiver) -> None:
    receiver.answers("hang", 200)
    for credits in (1, 2, 3):
        shop.user(credits=credits)
    with process(shop) as first:
        eventually(lambda: len(receiver.received) == 1)
        first.kill()
    with process(shop) as second:
        eventually(lambda: receiver.taken == [1, 2, 3])
        shop.user(credits=4)
        eventually(lambda: receiver.taken == [1, 2, 3, 4])
        second.terminate()


def test_one_deliverer_at_a_time(shop: World, receiver: Receiver) -> None:
    """Several share the work of one endpoint: each event arrives once and in order."""
    with process(shop) as first, process(shop) as second:
        try:
            for credits in range(1, 21):
                shop.user(credits=credits)
            eventually(lambda: len(receiver.taken) >= 20)
        finally:
            first.terminate()
            second.terminate()
    assert receiver.taken == list(range(1, 21))


def test_an_endpoint_that_hangs_keeps_no_other(shop: World, receiver: Receiver) -> None:
    receiver.answers("hang", 200)
    with shop.engine.begin() as conn:
        add_endpoint(conn, "another", receiver.url, secret_variable="HOOK_SECRET")
    shop.user(credits=1)
    done: list[Any] = []
    thread = threading.Thread(target=lambda: done.extend(run(shop, timeout_s=3.0, pauses_s=(60.0,))))
    thread.start()
    eventually(lambda: receiver.taken == [1])
    assert thread.is_alive()  # the first still waits for its answer
    thread.join()
    assert sorted(each.error is None for each in done) == [False, True]


class Ran(NamedTuple):
    """The end of a command."""

    code: int
    out: str
    err: str


class TestCommands:
    @pytest.fixture
    def tally(
        self, shop: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
    ) -> Callable[..., Ran]:
        """``tally("list") -> Ran``: ``tallystick events list`` in this process, on the shop's database."""
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("DATABASE_URL", shop.url)

        def run(*arguments: str) -> Ran:
            shop.wait_for_analyze()
            monkeypatch.setattr(sys, "argv", ["tallystick", "events", *arguments])
            with pytest.raises(SystemExit) as ended:
                main()
            return Ran(int(ended.value.code or 0), *capfd.readouterr())

        return run

    def test_from_the_first_event_to_a_replay(self, shop: World, receiver: Receiver, tally: Callable[..., Ran]) -> None:
        add = (
            "endpoint",
            "add",
            "crm",
            receiver.url,
            "--secret-variable",
            "HOOK_SECRET",
            "--kind",
            "purchase.completed",
        )
        assert tally(*add).code == 0
        assert tally("endpoint", "remove", "app").code == 0
        listed = json.loads(tally("endpoint", "list", "--json").out)
        assert [(each["name"], each["kinds"]) for each in listed] == [("crm", ["purchase.completed"])]
        receiver.answers(500, 200)
        for credits in (1, 2):
            shop.user(credits=credits)
        ran = tally("deliver", "--once", "--attempts", "1")
        assert ran.code == 1, ran.err
        assert "It is a dead letter" in ran.err
        assert "purchase.completed was accepted" in ran.out
        (letter,) = json.loads(tally("dead-letters", "--json").out)
        assert str(letter["event_id"]) in tally("dead-letters").out
        assert tally("replay", "crm").code == 0
        assert receiver.taken == [2, 1]
        assert tally("replay", "nobody").code == 1
        assert "No dead letters" in tally("dead-letters").out

    def test_a_postponed_event_is_an_exit_code(
        self, shop: World, receiver: Receiver, tally: Callable[..., Ran]
    ) -> None:
        """So that cron sees it, also in a run within the pause; and no longer once the event is accepted."""
        receiver.answers(500, 200)
        shop.user(credits=1)
        for wait in (dt.timedelta(hours=1), dt.timedelta(0)):
            ran = tally("deliver", "--once")
            assert ran.code == 1, ran.err
            assert re.search(r"app: an event waits until .* UTC, after failed attempt 1: it answered 500", ran.err)
            with shop.engine.begin() as conn:
                conn.execute(sa.update(event_endpoints).values(next_attempt_at=sa.func.now() + wait))
        assert len(receiver.received) == 1
        ran = tally("deliver", "--once")
        assert ran.code == 0, ran.err
        assert "purchase.completed was accepted" in ran.out

    def test_a_replay_that_waits_for_an_answer_holds_no_reader_back_and_keeps_what_it_did(
        self, shop: World, receiver: Receiver
    ) -> None:
        receiver.answers(500, 500, 200, "hang")
        for credits in (1, 2):
            shop.user(credits=credits)
        run(shop, pauses_s=())
        command = [sys.executable, "-c", "from tallystick.cli import main; main()", "events", "replay", "app"]
        with subprocess.Popen(command, env={**os.environ, "DATABASE_URL": shop.url}) as waiting:
            try:
                eventually(lambda: len(receiver.received) == 4)  # the second is under way
                shop.user(credits=3)
                with shop.engine.connect() as conn:
                    assert [event.amount for event in shop.ledger.events(conn)] == [1, 2, 3]
            finally:
                waiting.kill()
        with shop.engine.connect() as conn:
            (left,) = dead_letters(conn)
        assert json.loads(receiver.received[3]["body"])["data"]["id"] == left.event_id
