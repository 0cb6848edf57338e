"""The sums of closed days: exactly what the rows say, whoever writes, and only of days that no row can come to."""

from __future__ import annotations

import datetime as dt
import json
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psycopg
import pytest
import sqlalchemy as sa
from starlette.testclient import TestClient

from tallystick.audit import Finding, audit
from tallystick.cli import main
from tallystick.declared_tables import days
from tallystick.dev.seed import reset, seed
from tallystick.errors import Conflict
from tallystick.ledger import close_all_days
from tallystick.web.console import LocalLink, console
from tallystick.web.console.queries import Figures, Queries
from worlds import World

KEPT = "SELECT count(*) FROM tallystick.days WHERE closed_at IS NOT NULL"


def figures(world: World, *, earlier: int = 0) -> Figures:
    return Queries(world.config, world.engine).figures(dt.datetime.now(dt.UTC) - dt.timedelta(days=earlier))


def close_days_once(world: World) -> int:
    with world.engine.begin() as conn:
        return world.ledger.close_days(conn)


def close(world: World) -> int:
    """All days; an analyze of the server's own may keep them open for a moment, as any transaction does."""
    deadline, before = time.monotonic() + 60, ask(world, KEPT)
    while close_all_days(world.engine, world.ledger) and time.monotonic() < deadline:
        time.sleep(0.01)
    return ask(world, KEPT) - before


def ask(world: World, question: str) -> Any:
    with world.engine.connect() as conn:
        return conn.scalar(sa.text(question))


def without_trigger(world: World, *statements: str) -> None:
    """Past the ledger's own trigger."""
    with world.engine.begin() as conn:
        conn.execute(sa.text("SET LOCAL session_replication_role = replica"))
        for statement in statements:
            conn.execute(sa.text(statement))


def run(world: World, *statements: str) -> None:
    with world.engine.begin() as conn:
        for statement in statements:
            conn.execute(sa.text(statement))


AGED = (
    # over three months and more, some at the very ends of a day
    """
    UPDATE credit_transactions AS t SET completed_at = completed_at - n * interval '25 hours' - interval '2 days'
    FROM (SELECT id, row_number() OVER (ORDER BY id DESC) AS n FROM credit_transactions) AS r WHERE r.id = t.id
    """,
    "UPDATE credit_transactions SET completed_at = date_trunc('day', completed_at, 'UTC') WHERE mod(sequence, 5) = 1",
    """
    UPDATE credit_transactions SET completed_at = date_trunc('day', completed_at, 'UTC') - interval '1 microsecond'
    WHERE mod(sequence, 5) = 2
    """,
)


@pytest.fixture
def filled(world: World) -> World:
    """A buyer with rows of most types over months, the youngest two days old; no day is closed yet."""
    ledger, user = world.ledger, world.user(credits=5)
    with world.engine.begin() as conn:
        for number in range(8):
            bought = world.buy(conn, user, 3 + number)
            spent = ledger.consume(conn, user, credits=2, key=f"consume {number}")
            ledger.reverse(conn, user, spent.id, credits=1, key=f"reverse {number}")
            given = ledger.grant(conn, user, credits=4, key=f"grant {number}", description="Given")
            ledger.correct(conn, user, given.id, credits=1, key=f"correct {number}")
            ledger.refund(conn, user, bought.id, credits=2, key=f"refund {number}")
            ledger.reinstate(conn, user, bought.id, credits=1, key=f"reinstate {number}")
            other = ledger.start_purchase(conn, user, credits=1, description="In yen")
            ledger.complete_purchase(conn, user, purchase=other.id, amount_paid=500, currency="jpy")
            ledger.start_purchase(conn, user, credits=1, description="Waits")
    without_trigger(world, *AGED)
    return world


@pytest.fixture
def writer(filled: World) -> Iterator[psycopg.Connection[Any]]:
    """A session whose transaction has a number and goes on."""
    with psycopg.connect(filled.url.replace("+psycopg", "", 1)) as conn:
        conn.execute("SELECT pg_current_xact_id()")
        yield conn


def test_the_overview_says_the_same_of_closed_days_as_of_their_rows(filled: World) -> None:
    by_rows, before = figures(filled), figures(filled, earlier=1)
    assert all(by_rows.total(name) for name in ("sold", "granted", "consumed", "refunded"))
    assert [money.currency for money in by_rows.money] == ["jpy", "usd"]

    assert close(filled) == 60
    assert figures(filled) == by_rows
    assert figures(filled, earlier=1) == before
    assert close_days_once(filled) == 0

    with filled.engine.begin() as conn:
        filled.ledger.grant(conn, filled.user(), credits=7, key="today", description="Today")
    now = figures(filled)
    assert now.total("granted") == by_rows.total("granted") + 7
    without_trigger(filled, "DELETE FROM credit_transactions WHERE idempotency_key IS DISTINCT FROM 'today'")
    assert figures(filled).days == now.days  # no row of a closed day is read


def test_a_day_that_is_open_between_closed_ones_is_read_from_its_rows(filled: World) -> None:
    by_rows = figures(filled)
    close(filled)
    run(filled, "DELETE FROM tallystick.days WHERE mod(day - date '2020-01-01', 3) = 0")
    assert ask(filled, KEPT) == 40
    assert figures(filled) == by_rows
    assert close(filled) == 20
    assert figures(filled) == by_rows


def test_days_are_those_of_utc_whatever_the_session_has(filled: World) -> None:
    by_rows = figures(filled)
    with filled.engine.begin() as conn:
        conn.execute(sa.text("SET LOCAL TimeZone = 'Pacific/Kiritimati'"))
        conn.execute(sa.text("SET LOCAL DateStyle = 'SQL, DMY'"))
        filled.ledger.close_days(conn)
    close(filled)
    assert figures(filled) == by_rows


def test_a_day_stays_open_while_a_transaction_of_before_may_write(
    filled: World, writer: psycopg.Connection[Any]
) -> None:
    assert close_all_days(filled.engine, filled.ledger) == 60
    with psycopg.connect(filled.url.replace("+psycopg", "", 1)) as later:
        later.execute("SELECT pg_current_xact_id()")  # of after the days were over: nothing waits for it
        assert close_days_once(filled) == 60
        writer.rollback()
        assert close(filled) == 60


def test_a_prepared_transaction_keeps_days_open(filled: World, writer: psycopg.Connection[Any]) -> None:
    [(most,)] = writer.execute("SELECT current_setting('max_prepared_transactions')::int").fetchall()
    if not most:
        with pytest.raises(psycopg.errors.ObjectNotInPrerequisiteState):
            writer.execute("PREPARE TRANSACTION 'days'")
        return
    writer.execute("PREPARE TRANSACTION 'days'")
    assert close_all_days(filled.engine, filled.ledger) == 60
    writer.autocommit = True
    writer.execute("ROLLBACK PREPARED 'days'")
    assert close(filled) == 60


def test_calls_beside_one_another_close_each_day_once(filled: World) -> None:
    by_rows = figures(filled)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: close_all_days(filled.engine, filled.ledger), range(8)))
    close(filled)  # one that begins beside another may leave the days to the next
    assert (ask(filled, KEPT), figures(filled)) == (60, by_rows)


def test_a_transaction_that_wrote_before_closes_what_others_noted_and_notes_nothing(
    filled: World, writer: psycopg.Connection[Any]
) -> None:
    with filled.engine.begin() as conn:
        conn.execute(sa.text("SELECT pg_current_xact_id()"))
        assert filled.ledger.close_days(conn) == 60
    assert ask(filled, "SELECT count(*) FROM tallystick.days") == 0
    assert close_days_once(filled) == 60
    writer.rollback()
    with filled.engine.begin() as conn:
        conn.execute(sa.text("SELECT pg_current_xact_id()"))
        filled.ledger.close_days(conn)
    assert ask(filled, "SELECT count(DISTINCT writers_before) FROM tallystick.days") == 1
    close(filled)


def test_a_number_from_another_server_is_replaced(filled: World, writer: psycopg.Connection[Any]) -> None:
    assert close_days_once(filled) == 60
    writer.rollback()
    run(filled, "UPDATE tallystick.days SET writers_before = 4611686018427387904")
    assert close(filled) == 60


def test_days_are_kept_for_sixty_days(filled: World) -> None:
    by_rows = figures(filled)
    close(filled)
    without_trigger(
        filled, "UPDATE tallystick.daily_sums SET day = day - 100", "UPDATE tallystick.days SET day = day - 100"
    )
    close(filled)
    assert (ask(filled, "SELECT count(*) FROM tallystick.days"), figures(filled)) == (60, by_rows)
    assert ask(filled, "SELECT min(d.day) <= min(s.day) FROM tallystick.days AS d, tallystick.daily_sums AS s")


TAMPERED = (
    "UPDATE credit_transactions SET completed_at = completed_at - interval '1 day' WHERE amount = 10",
    "DELETE FROM credit_transactions WHERE amount = 9",
    "UPDATE credit_transactions SET amount_paid = 1 WHERE amount = 8",
    "UPDATE tallystick.daily_sums SET credits = 70 WHERE kind = 'purchase' AND credits = 7",
    "DELETE FROM tallystick.daily_sums WHERE kind = 'purchase' AND credits = 6",
)
FOUND = {
    ("+0 credits by purchase, and 0 usd", "+10 and 1000"),
    ("+10 credits by purchase, and 1000 usd", "+0 and 0"),
    ("+0 credits by purchase, and 0 usd", "+9 and 900"),
    ("+8 credits by purchase, and 1 usd", "+8 and 800"),
    ("+7 credits by purchase, and 700 usd", "+70 and 700"),
    ("+6 credits by purchase, and 600 usd", "+0 and 0"),
}


def wrong_days(world: World, **how: Any) -> list[Finding]:
    with world.engine.connect() as conn:
        return [found for found in audit(conn, world.config, **how).findings if found.check == "daily_sums"]


def test_sums_that_are_not_those_of_the_rows_are_found_and_mended(filled: World) -> None:
    close(filled)
    assert wrong_days(filled) == []
    without_trigger(filled, *TAMPERED)

    found = wrong_days(filled)
    assert {(each.expected.partition(" paid")[0], each.found.partition(" in ")[0]) for each in found} == FOUND
    assert all(not each.fault and each.where.startswith("day 20") for each in found)
    assert wrong_days(filled, quick=True) == []

    run(filled, *(each.what_to_do.partition("again: ")[2].partition(";")[0] for each in found))
    assert close(filled) == len({each.where for each in found})
    assert wrong_days(filled) == []


def test_the_audit_looks_at_the_days_once_and_only_for_everyone(filled: World, monkeypatch: pytest.MonkeyPatch) -> None:
    close(filled)
    run(filled, "UPDATE tallystick.daily_sums SET credits = 11 WHERE kind = 'purchase' AND credits = 10")
    for _ in range(20):
        filled.user()
    monkeypatch.setattr("tallystick.audit.PART_ROWS", 5)
    parts: list[Any] = []
    with filled.engine.connect() as conn:
        found = audit(conn, filled.config, each=parts.append).findings
        assert len(parts) > 1
        assert [each.check for each in found].count("daily_sums") == 1
        since = dt.datetime.now(dt.UTC)
        assert "daily_sums" not in audit(conn, filled.config, since=since).checked
        assert "daily_sums" not in audit(conn, filled.config, after=parts[0].last).checked


def test_taking_the_seed_back_opens_its_days_again(world: World) -> None:
    environ: dict[str, str] = {}
    with world.engine.begin() as conn:
        seed(conn, world.config, environ=environ)
    without_trigger(world, "UPDATE credit_transactions SET completed_at = completed_at - interval '5 days'")
    close(world)
    assert figures(world).total("sold") > 0
    with world.engine.begin() as conn:
        reset(conn, world.config, environ=environ)
    assert ask(world, KEPT) == 59
    assert figures(world).total("sold") == 0


def test_sweep_closes_days(filled: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DATABASE_URL", filled.url)
    monkeypatch.setattr(sys, "argv", ["tallystick", "sweep"])
    deadline = time.monotonic() + 60
    while ask(filled, KEPT) < 60 and time.monotonic() < deadline:
        with pytest.raises(SystemExit) as ended:
            main()
        assert not ended.value.code
    assert ask(filled, KEPT) == 60


def test_a_console_with_actions_closes_days_before_it_shows_its_figures(filled: World) -> None:
    """As ``tallystick serve --allow-actions`` does; one without writes nothing."""
    shown = json.loads(days_shown(filled, allow_actions=False))
    assert ask(filled, "SELECT count(*) FROM tallystick.days") == 0
    deadline = time.monotonic() + 60
    while ask(filled, KEPT) < 60 and time.monotonic() < deadline:  # each looks once, and keeps its figures for a minute
        now = json.loads(days_shown(filled, allow_actions=True))
        assert now["days"] == shown["days"]
    assert ask(filled, KEPT) == 60


def days_shown(world: World, *, allow_actions: bool) -> str:
    link, address = LocalLink(), "http://127.0.0.1:8420"
    pages = console(world.config, engine=world.engine, sign_in=link, address=address, allow_actions=allow_actions)
    with TestClient(pages, base_url=address, client=("127.0.0.1", 5000)) as visitor:
        visitor.get("/enter", params={"token": link.token})
        return visitor.get("/days.json").text


def test_a_sweep_beside_an_open_writer_says_that_days_wait(
    filled: World, writer: psycopg.Connection[Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("DATABASE_URL", filled.url)
    monkeypatch.setattr(sys, "argv", ["tallystick", "sweep", "--json"])
    with pytest.raises(SystemExit):
        main()
    output = capsys.readouterr()
    assert json.loads(output.out) == {"users": 0}
    assert "60 of the last 60 days wait for open transactions" in output.err


def test_a_day_that_is_opened_again_at_the_moment_is_not_waited_for(filled: World) -> None:
    close(filled)
    with filled.engine.begin() as conn:
        conn.execute(sa.text("DELETE FROM tallystick.days WHERE day = (SELECT min(day) FROM tallystick.days)"))
        assert close_all_days(filled.engine, filled.ledger) == 0  # as if it were closed
        run(filled, "DELETE FROM tallystick.days WHERE day = (SELECT max(day) FROM tallystick.days)")
        assert close_all_days(filled.engine, filled.ledger) == 1
    assert close(filled) == 2


def test_a_clock_that_was_ahead_leaves_no_day_closed_that_is_not_over(filled: World) -> None:
    by_rows = figures(filled)
    close(filled)
    run(
        filled,
        "UPDATE tallystick.days SET day = day + 2 WHERE day >= (SELECT max(day) FROM tallystick.days) - 1",
        "UPDATE tallystick.days SET closed_at = NULL WHERE day > (SELECT max(day) FROM tallystick.days) - 1",
    )
    close(filled)
    today = "(clock_timestamp() AT TIME ZONE 'UTC' - interval '1 hour')::date"
    assert ask(filled, f"SELECT count(*) FROM tallystick.days WHERE day >= {today}") == 0
    assert (ask(filled, KEPT), figures(filled)) == (60, by_rows)


def test_the_rows_of_a_day_are_read_by_their_index(filled: World) -> None:
    with filled.engine.begin() as conn:
        conn.execute(sa.text("SET LOCAL enable_seqscan = off"))
        asked = Queries(filled.config, filled.engine)._by_day([dt.date(2026, 11, 1), dt.date(2026, 11, 5)])
        plan = conn.exec_driver_sql(f"EXPLAIN {asked.compile(conn, compile_kwargs={'literal_binds': True})}").scalars()
        assert "credit_transactions_completed_at" in "\n".join(plan)


def test_in_a_transaction_of_its_own_snapshot_the_sums_are_of_that_snapshot(filled: World) -> None:
    by_rows = figures(filled)
    close_days_once(filled)
    with filled.engine.connect().execution_options(isolation_level="REPEATABLE READ") as conn, conn.begin():
        conn.execute(sa.select(days))
        filled.ledger.close_days(conn)
    with filled.engine.connect().execution_options(isolation_level="REPEATABLE READ") as conn, conn.begin():
        conn.execute(sa.select(days))
        close(filled)
        with pytest.raises(Conflict):
            filled.ledger.close_days(conn)
        conn.rollback()
    assert (ask(filled, KEPT), figures(filled)) == (60, by_rows)
