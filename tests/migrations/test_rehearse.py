"""A rehearsal on a copy: what the plan said is what happened, and nothing is left."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import sqlalchemy as sa
from hosts import HOSTS, App

from tallystick import Progress, migrate
from tallystick.audit import audit
from tallystick.cli.rehearsal_report import rehearsal_page
from tallystick.declared_tables import Schema
from tallystick.errors import MigrationError
from tallystick.migrate import PlannedStatement, Rehearsal, Traced, rehearse
from tallystick.migrate.checks.rehearsal import split
from tallystick.schema import HEAD

NAMES = ("uuid", "keyed by an external identity", "quoted, reserved and in schemas", "with every column already")


@pytest.mark.parametrize("name", NAMES)
def test_what_the_plan_said_is_what_happened(name: str, make_app: Callable[..., App]) -> None:
    app = make_app(HOSTS[name].ddl, HOSTS[name].mapping)
    before = app.dump("--schema-only")
    done = rehearse(app.url, app.config)
    assert done.passed, done.problems
    assert app.dump("--schema-only") == before
    assert sum(one.rows_read for one in done.statements if one.phase != "online") == 0
    assert not any(one.rewrites for one in done.statements)
    locked = [one for one in done.statements if any(lock == "ACCESS EXCLUSIVE" for _, lock in one.locks)]
    assert locked
    assert all(one.phase == "locked" for one in locked)
    assert done.locked_ms > 0


WEAKEST_FIRST = ("SHARE", "SHARE ROW EXCLUSIVE", "EXCLUSIVE", "ACCESS EXCLUSIVE")


def test_the_first_lock_that_writers_feel_is_the_strongest(app: App) -> None:
    """A stronger one later would deadlock with the app; this is what the server says, not the plan."""
    first: dict[str, str] = {}
    for one in rehearse(app.url, app.config).statements:
        for table, lock in one.locks:
            if lock in WEAKEST_FIRST:
                assert WEAKEST_FIRST.index(lock) <= WEAKEST_FIRST.index(first.setdefault(table, lock))
    assert first == {"public.users": "ACCESS EXCLUSIVE", "public.workshops": "ACCESS EXCLUSIVE"}


def test_a_script_is_split_where_psql_would() -> None:
    script = """-- one; two
    SELECT 'a;b', E'it\\'s; so', "x;y" /* ; */;
    DO $do$ BEGIN PERFORM $$;$$; END $do$ ; ;
    SELECT $1::int  -- the last; without an end
    """
    assert list(split(script)) == [
        """SELECT 'a;b', E'it\\'s; so', "x;y\"""",
        "DO $do$ BEGIN PERFORM $$;$$; END $do$",
        "SELECT $1::int",
    ]


FALSE_PLANS: dict[str, Callable[[PlannedStatement], tuple[tuple[str, str], ...]]] = {
    "no lock at all": lambda _: (),
    "less than there is": lambda one: tuple((table, "ACCESS SHARE") for table, _ in one.locks),
    "more than there is": lambda one: tuple((table, "ACCESS EXCLUSIVE") for table, _ in one.locks),
    "one table only": lambda one: one.locks[:1],
    "one statement too early": lambda one: (("public.users", "SHARE UPDATE EXCLUSIVE"), *one.locks),
}


@pytest.mark.parametrize("how", FALSE_PLANS)
def test_a_plan_with_other_locks_is_found_out(how: str, app: App, monkeypatch: pytest.MonkeyPatch) -> None:
    def false_plan(*arguments: Any) -> migrate.Plan:
        planned = migrate.plan(*arguments)
        false = tuple(replace(one, locks=FALSE_PLANS[how](one)) for one in planned.statements)
        return replace(planned, statements=false)

    monkeypatch.setattr(sys.modules["tallystick.migrate.checks.rehearsal"], "plan", false_plan)
    done = rehearse(app.url, app.config)
    assert any("the plan said" in surprise for surprise in done.surprises)
    assert len(done.surprises) < 12, "each is told once"
    assert not done.passed


def test_without_a_revision_to_come_there_is_nothing_to_rehearse(app: App) -> None:
    migrate.apply(app.url, app.config)
    with pytest.raises(MigrationError, match=f"at revision {HEAD} already"):
        rehearse(app.url, app.config)


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


def test_what_was_not_planned_is_told() -> None:
    surprise = Traced("locked", "X", 0, 1, (("t", "ACCESS EXCLUSIVE"),), 5, False, ("it read",))
    done = Rehearsal((("t", 5),), (surprise,), 1, (), (), ())
    assert not done.passed
    assert "it read" in " ".join(rehearsal_page(done).split())


def test_faults_of_the_audit_count(app: App) -> None:
    done = rehearse(app.url, app.config, audit=lambda conn: [f"users: {conn.exec_driver_sql('SELECT 1').scalar()}"])
    assert done.drift == ("users: 1",)
    assert not done.passed


@pytest.mark.parametrize("name", HOSTS)
def test_the_ledger_is_used_and_leaves_nothing(name: str, make_app: Callable[..., App]) -> None:
    app = make_app(HOSTS[name].ddl, HOSTS[name].mapping)
    seen: list[int | None] = []

    def audited(conn: sa.Connection) -> list[str]:
        rows = Schema.of(app.config.host).credit_transactions
        seen.append(conn.scalar(sa.select(sa.func.count()).select_from(rows)))
        return [str(finding) for finding in audit(conn, app.config).findings if finding.fault]

    before = app.dump("--schema-only")
    steps: list[str] = []
    done = rehearse(app.url, app.config, audit=audited, progress=lambda now: steps.append(now.step))
    assert done.passed, done.problems
    assert app.dump("--schema-only") == before
    opened = name == "balances in a table of their own"
    has_users = opened or name in {
        *("uuid", "text", "integer", "keyed by an external identity", "keyed by a reserved word"),
        "with names that would end a quoted body",
    }
    assert [one.fault for one in done.lived] == ([None] * 7 if has_users else [])
    assert seen == [4 * has_users + opened]
    assert steps.index("using the ledger") < steps.index("auditing") < steps.index("going back")


def test_a_workshop_is_unlocked_where_there_is_one(app: App, make_app: Callable[..., App]) -> None:
    before = sorted(app.dump().splitlines())  # a row that was changed lies elsewhere
    done = rehearse(app.url, app.config)
    assert "unlocking a workshop" in [one.what for one in done.lived]
    assert sorted(app.dump().splitlines()) == before, "the rows too"
    assert "unlocking a workshop" in " ".join(rehearsal_page(done).split())

    other = make_app(HOSTS["keyed by an external identity"].ddl, HOSTS["keyed by an external identity"].mapping)
    assert "spending a credit" in [one.what for one in rehearse(other.url, other.config).lived]

    nobody = make_app(HOSTS["no workshops"].ddl, HOSTS["no workshops"].mapping)
    done = rehearse(nobody.url, nobody.config)
    assert (done.passed, done.lived) == (True, ())
    assert "the copy has no user that is not deleted" in " ".join(rehearsal_page(done).split())


def test_a_ledger_that_does_not_work_there_is_told(app: App) -> None:
    """A trigger of the app's forbids what the ledger has to do."""
    app.psql("""
        CREATE FUNCTION frozen() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE 'users are frozen'; END $$;
        CREATE TRIGGER frozen BEFORE UPDATE ON users FOR EACH ROW EXECUTE FUNCTION frozen();
    """)
    done = rehearse(app.url, app.config)
    assert [(one.what, bool(one.fault)) for one in done.lived][-1] == ("granting 2 credits", True)
    assert any("users are frozen" in problem for problem in done.problems)
    assert not done.passed
    assert "users are frozen" in " ".join(rehearsal_page(done).split())


def test_rows_that_did_not_come_back_are_told(app: App) -> None:
    """Somebody else changes the copy meanwhile."""

    def change_rows(now: Progress) -> None:
        if now.step == "auditing":
            app.run("UPDATE workshops SET title = 'other' WHERE id = (SELECT id FROM workshops LIMIT 1)")

    done = rehearse(app.url, app.config, progress=change_rows)
    assert done.left_behind == ("public.workshops: using the ledger changed its rows",)


def test_a_table_with_a_trigger_of_the_apps_is_compared_as_well(app: App) -> None:
    """The trigger may write when the ledger is used; the migration and the way back may not."""
    app.run("""
        ALTER TABLE users ADD visits integer NOT NULL DEFAULT 0;
        CREATE FUNCTION visited() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN NEW.visits := NEW.visits + 1; RETURN NEW;
          END $$;
        CREATE TRIGGER visited BEFORE UPDATE ON users FOR EACH ROW EXECUTE FUNCTION visited();
    """)
    done = rehearse(app.url, app.config)
    assert done.passed, done.problems
    assert app.value("SELECT sum(visits) FROM users") > 0

    def change_rows(now: Progress) -> None:
        if now.step == "going back":
            app.run("UPDATE users SET email = upper(email)")

    assert rehearse(app.url, app.config, progress=change_rows).left_behind == (
        "public.users: the way back changed its rows",
    )


def test_columns_that_the_app_had_before_may_keep_what_the_ledger_wrote(make_app: Callable[..., App]) -> None:
    case = HOSTS["with every column already"]
    app = make_app(case.ddl, case.mapping)
    app.run("INSERT INTO users (id) VALUES (gen_random_uuid())")
    done = rehearse(app.url, app.config)
    assert done.passed, done.problems
    assert app.value("SELECT credit_balance FROM users") == 2
