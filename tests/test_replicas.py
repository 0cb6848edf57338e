"""A hot standby that is read: by the operations, the commands, the console and an audit, each telling its age."""

from __future__ import annotations

import datetime as dt
import json
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg
import pytest
import sqlalchemy as sa
from starlette.testclient import TestClient
from typer.testing import CliRunner

from servers import standby_of
from tallystick import audit, migrate
from tallystick.cli import commands
from tallystick.database import engine, standby, with_known_settings
from tallystick.dev.postgres import Server
from tallystick.dev.throwaway import FAST, FOLDER_PREFIX, scratch_root
from tallystick.errors import DatabaseUnavailable
from tallystick.ledger import close_all_days
from tallystick.web.console import LocalLink, console
from tallystick.web.console.queries import Queries
from worlds import SHAPES, World, dispose_when_idle


@dataclass
class Pair:
    """A host app on a primary, and the same on its standby."""

    primary: World
    standby: World
    pool: sa.Engine
    """One connection to the standby, used again and again."""

    def catch_up(self) -> None:
        """Until the standby has repeated all that was done before."""
        deadline = time.monotonic() + 60
        with self.primary.engine.begin() as here:
            here.exec_driver_sql("SET LOCAL synchronous_commit = on")  # else it is sent much later
            here.exec_driver_sql("SELECT pg_logical_emit_message(true, 'test', 'so far')")
        with self.primary.engine.connect() as here, self.standby.autocommit.connect() as there:
            mark = here.scalar(sa.text("SELECT pg_current_wal_flush_lsn()::text"))
            while not there.scalar(sa.text("SELECT pg_last_wal_replay_lsn() >= CAST(:mark AS pg_lsn)"), {"mark": mark}):
                assert time.monotonic() < deadline
                time.sleep(0.02)

    def replay(self, *, goes_on: bool) -> None:
        with psycopg.connect(self.standby.url.replace("+psycopg", ""), autocommit=True) as conn:
            conn.execute(f"SELECT pg_wal_replay_{'resume' if goes_on else 'pause'}()")
            for _ in range(100):
                if goes_on or conn.execute("SELECT pg_get_wal_replay_pause_state()").fetchone() == ("paused",):
                    return
                time.sleep(0.02)
        raise AssertionError("replay was not paused")


@pytest.fixture(scope="module")
def pair(server: Server) -> Iterator[Pair]:
    folder = Path(tempfile.mkdtemp(prefix=FOLDER_PREFIX, dir=scratch_root()))
    folder.chmod(0o711)
    with Server(folder / "primary", settings=FAST, bin_dir=server.bin) as primary:
        url = primary.create_database("app")
        with psycopg.connect(url.replace("+psycopg", "", 1)) as conn:
            conn.execute(SHAPES["uuid"].ddl)
        here = World(url, SHAPES["uuid"].host)
        migrate.apply(url, here.config)
        with standby_of(primary, folder / "standby", name="reporting") as other:
            there = World(other.url("app"), SHAPES["uuid"].host)
            pool = engine(there.url, pool_size=1, max_overflow=0)
            yield Pair(here, there, pool)
            dispose_when_idle(pool)
    shutil.rmtree(folder)


@pytest.fixture
def shop(pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of an app whose settings name both."""
    for name in ("DATABASE_URL", "DATABASE_URL_UNPOOLED", "DATABASE_URL_REPLICA", "TALLYSTICK_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DATABASE_URL", pair.primary.url)
    monkeypatch.setenv("DATABASE_URL_REPLICA", pair.standby.url)
    return tmp_path


def tallystick(*arguments: str) -> Any:
    return CliRunner().invoke(commands(), arguments)


def test_every_operation_that_reads_does_so_there(pair: Pair) -> None:
    user = pair.primary.user(credits=5)
    workshop = pair.primary.workshop(user)
    ledger = pair.standby.ledger
    with pair.primary.engine.begin() as conn:
        ledger.grant(
            conn,
            user,
            credits=2,
            key="g",
            description="Hello",
            expires_at=dt.datetime.now(dt.UTC) + dt.timedelta(seconds=0.3),
        )
        hold = ledger.hold(conn, user, credits=1, key="h", expires_in=dt.timedelta(minutes=5))
    pair.catch_up()
    time.sleep(0.35)  # the lot has expired, and no row says so
    with pair.pool.begin() as conn:
        assert ledger.standing(conn, user).balance == ledger.balance(conn, user) == 5
        assert ledger.standing(conn, user).held == 1
        assert ledger.lots(conn, user) == []
        assert ledger.history(conn, user)[0].id == hold.id
        assert ledger.balance_at(conn, user, dt.datetime.now(dt.UTC)) == 7
        assert not ledger.access(conn, workshop).open
        assert pair.standby.accounts.get(conn, user).credit_balance == 5
    with pytest.raises(DatabaseUnavailable, match="read-only"), pair.pool.begin() as conn:
        ledger.consume(conn, user, workshop=workshop, key="c")


def test_an_engine_that_the_console_has_used_reads_on(pair: Pair) -> None:
    """Of one connection: what the console sets on it is no trouble for the next that has it from the pool."""
    user = pair.primary.user(credits=3)
    pair.catch_up()
    link = LocalLink()
    visitor = TestClient(
        console(pair.standby.config, engine=pair.pool, sign_in=link, address="http://127.0.0.1:8420"),
        base_url="http://127.0.0.1:8420",
        client=("127.0.0.1", 5000),
    )
    visitor.get("/enter", params={"token": link.token})
    for path in ("/", "/users", f"/user?key={user}", "/pending", "/events", "/audit", "/migrations", "/days.json"):
        assert visitor.get(path).status_code == 200, path
    with pair.pool.begin() as conn:
        assert pair.standby.ledger.balance(conn, user) == 3
    with with_known_settings(pair.pool).connect() as conn:
        assert audit.audit(conn, pair.standby.config).clean


def test_the_age_is_told(pair: Pair) -> None:
    with pair.primary.engine.connect() as conn:
        assert standby(conn) is None
    user = pair.primary.user(credits=1)
    pair.catch_up()
    with pair.pool.begin() as conn:
        fresh = standby(conn)
    assert fresh is not None
    assert fresh.seconds is not None
    assert fresh.seconds < 40  # an idle primary is heard of every 30 s
    pair.replay(goes_on=False)
    try:
        with pair.primary.engine.begin() as conn:
            before = conn.scalar(sa.text("SELECT clock_timestamp()"))
            pair.primary.ledger.grant(conn, user, credits=1, key="later", description="Later")
        time.sleep(0.2)
        with pair.pool.begin() as conn:
            old = standby(conn)
            assert pair.standby.ledger.balance(conn, user) == 1
    finally:
        pair.replay(goes_on=True)
    assert old is not None
    assert old.as_of is not None
    assert old.as_of < before
    assert str(old).startswith(f"Read from a standby as of {old.as_of:%Y-%m-%d %H:%M:%S} UTC, ")
    pair.catch_up()
    with pair.pool.begin() as conn:
        assert pair.standby.ledger.balance(conn, user) == 2


def test_commands_that_only_read_go_there_and_say_so(pair: Pair, shop: Path) -> None:
    user = pair.primary.user(credits=4)
    pair.catch_up()
    pair.replay(goes_on=False)
    try:
        done = tallystick("consume", str(user), "--key", "c")
        assert (done.exit_code, "Balance 3" in done.output) == (0, True)
        for command in (("balance",), ("history",), ("lots",), ("onboarding",), ("audit", "--user")):
            found = tallystick(*command, str(user))
            assert found.exit_code == 0, found.output
            assert found.stderr.startswith("Read from a standby as of "), command
        assert json.loads(tallystick("balance", str(user), "--json").stdout)["balance"] == 4
        primary = tallystick("--database-url", pair.primary.url, "balance", str(user))
        assert (primary.stdout, primary.stderr) == ("3 credits\n", "")
    finally:
        pair.replay(goes_on=True)
    pair.catch_up()
    assert tallystick("balance", str(user)).stdout == "3 credits\n"
    assert json.loads(tallystick("config", "show", "--json").stdout)["database_url_replica"] == {
        "value": "set",
        "from": "DATABASE_URL_REPLICA",
    }


def test_the_doctor_knows_a_copy_from_another_database(
    pair: Pair, shop: Path, monkeypatch: pytest.MonkeyPatch, world: World
) -> None:
    def message() -> str:
        [found] = [one for one in json.loads(tallystick("doctor", "--json").stdout) if one["about"] == "Replica"]
        return f"{found['found']}. {found['remedy']}"

    pair.primary.user()  # until it has replayed a transaction, its age is unknown
    pair.catch_up()
    assert message().startswith("Read from a standby as of ")
    assert message().endswith(" ago. None")
    monkeypatch.setenv("DATABASE_URL_REPLICA", pair.primary.url)
    assert message().endswith(" takes writes. Correct database_url_replica, or leave it out")
    monkeypatch.setenv("DATABASE_URL_REPLICA", world.url)
    assert message().endswith(" is not a copy of this database. Correct database_url_replica")


def test_status_of_a_standby(pair: Pair, shop: Path) -> None:
    pair.catch_up()
    here = tallystick("migrate", "status", "--json")
    there = tallystick("--database-url", pair.standby.url, "migrate", "status", "--json")
    assert (here.exit_code, there.exit_code) == (0, 0), there.stderr
    one, other = json.loads(here.stdout), json.loads(there.stdout)
    [message] = set(other.pop("warnings")) - set(one.pop("warnings"))
    assert message.startswith("this server is a standby")
    assert other == one


def test_the_console_reads_there_and_acts_here(pair: Pair) -> None:
    user = pair.primary.user(credits=2)
    pair.catch_up()
    link = LocalLink()
    pages = console(
        pair.primary.config,
        engine=pair.primary.engine,
        replica=pair.pool,
        sign_in=link,
        address="http://127.0.0.1:8420",
        allow_actions=True,
    )
    visitor = TestClient(pages, base_url="http://127.0.0.1:8420", client=("127.0.0.1", 5000))
    visitor.get("/enter", params={"token": link.token})
    pair.replay(goes_on=False)
    try:
        with pair.primary.engine.begin() as conn:
            pair.primary.ledger.consume(conn, user, credits=1, key="c")
        lists = visitor.get("/users.json", params={"q": str(user)}).json()
        assert [row["credit_balance"] for row in lists["rows"]] == [2]
        assert dt.datetime.fromisoformat(lists["standby"]["as_of"]) < dt.datetime.now(dt.UTC)
        assert 'id="age">Read from a standby as of ' in visitor.get("/users").text
        assert 'id="age">Read from a standby as of ' in visitor.get("/").text
        one = visitor.get("/user.json", params={"key": str(user)}).json()  # where an action would be seen at once
        assert one["user"]["credit_balance"] == 1
        assert "standby" not in one
        assert 'id="age"' not in visitor.get("/user", params={"key": str(user)}).text
    finally:
        pair.replay(goes_on=True)


THREE_DAYS_AGO = "UPDATE credit_transactions SET completed_at = completed_at - interval '3 days' WHERE user_id = :user"


def test_the_overview_of_a_standby_reads_the_sums_of_closed_days(pair: Pair) -> None:
    """The same figures as on the primary, and those of a closed day from its sums, not from its rows."""
    user, now = pair.primary.user(credits=9), dt.datetime.now(dt.UTC)
    with pair.primary.engine.begin() as conn:
        conn.exec_driver_sql("DELETE FROM tallystick.daily_sums; DELETE FROM tallystick.days")  # another test's
        pair.primary.ledger.consume(conn, user, credits=4, key="long ago")
        conn.exec_driver_sql("SET LOCAL session_replication_role = replica")  # past the ledger's own trigger
        conn.execute(sa.text(THREE_DAYS_AGO), {"user": user})
    deadline = time.monotonic() + 60
    while close_all_days(pair.primary.engine, pair.primary.ledger):  # an analyze of the server's keeps days open
        assert time.monotonic() < deadline
        time.sleep(0.02)
    pair.catch_up()
    here = Queries(pair.primary.config, pair.primary.engine).figures(now)
    reports = Queries(pair.standby.config, pair.pool)
    assert here.total("consumed") >= 4
    assert reports.figures(now) == here

    mark = "UPDATE tallystick.daily_sums SET credits = credits - :more WHERE kind = 'consumption'"
    for more, expected in ((1000, here.total("consumed") + 1000), (-1000, here.total("consumed"))):
        with pair.primary.engine.begin() as conn:
            assert conn.execute(sa.text(mark), {"more": more}).rowcount == 1
        pair.catch_up()
        assert reports.figures(now).total("consumed") == expected
