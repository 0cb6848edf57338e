"""A rehearsal on a copy: what the plan said is what happened, and nothing is left."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from hosts import HOSTS, App

from tallystick import migrate
from tallystick.migrate import Rehearsal, Traced, rehearse, report

NAMES = ("uuid", "keyed by an external identity", "quoted, reserved and in schemas", "with every column already")


@pytest.mark.parametrize("name", NAMES)
def test_what_the_plan_said_is_what_happened(name: str, make_app: Callable[..., App]) -> None:
    app = make_app(HOSTS[name].ddl, HOSTS[name].mapping)
    before = app.dump("--schema-only")
    done = rehearse(app.url, app.config)
    assert done.passed, done
    assert app.dump("--schema-only") == before
    first = [one for one in done.statements if one.revision == "0001"]
    assert sum(one.rows_read for one in first) == 0
    assert not any(one.rewrites for one in done.statements)
    locked = [one for one in first if any(lock == "ACCESS EXCLUSIVE" for _, lock in one.locks)]
    assert locked
    assert all(one.phase == "locked" for one in locked)
    assert done.locked_ms > 0


def test_statements_of_the_app_are_tried(app: App) -> None:
    done = rehearse(
        app.url,
        app.config,
        app_statements=(
            "SELECT id, email FROM users LIMIT 1",
            "INSERT INTO users (email) VALUES ('new')",
            "INSERT INTO users SELECT gen_random_uuid(), 'by position'",
            "INSERT INTO other SELECT * FROM users",  # failed before as well, so it says nothing
            "SELECT u.* FROM users u UNION SELECT gen_random_uuid(), 'x'",  # counts on two columns
        ),
    )
    [broken] = done.broken
    assert "after the migration, SELECT u.* FROM users u UNION" in broken
    assert not done.passed
    assert app.value("SELECT count(*) FROM users") == 500


def test_the_report_is_one_page_that_needs_nothing_else(app: App, tmp_path: Path) -> None:
    done = rehearse(app.url, app.config)
    page = report(done)
    assert page.startswith("<!doctype html>")
    assert "Passed" in page
    assert page.count("<svg") == len(migrate.revisions())
    assert "http" not in page
    assert "src=" not in page


def test_what_was_not_planned_is_told() -> None:
    surprise = Traced("0001", "locked", "X", 0, 1, (("t", "ACCESS EXCLUSIVE"),), 5, False, ("it read",))
    done = Rehearsal((("t", 5),), (surprise,), 1, (), (), ())
    assert not done.passed
    assert "it read" in report(done)


def test_faults_of_the_audit_count(app: App) -> None:
    done = rehearse(app.url, app.config, audit=lambda conn: [f"users: {conn.exec_driver_sql('SELECT 1').scalar()}"])
    assert done.drift == ("users: 1",)
    assert not done.passed
