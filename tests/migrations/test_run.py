"""The run itself: who it waits for, when it gives up, what it leaves, and how it goes on after an interruption."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import psycopg
import pytest
import sqlalchemy as sa
from hosts import HOSTS, App
from processes import PROCESSES

from tallystick import Config, migrate
from tallystick.dev.postgres import Server
from tallystick.errors import (
    ConfigError,
    Conflict,
    DatabaseUnavailable,
    MigrationBlocked,
    MigrationError,
    MigrationRunning,
    OutcomeUnknown,
)
from tallystick.migrate.revisions import HostNames, revisions
from tallystick.migrate.runner.messages import ADVISORY_KEY
from tallystick.migrate.runner.online import index_state
from tallystick.migrate.runner.session import session
from tallystick.schema import HEAD

INDEX = "tallystick_users_stripe_customer_id"
OURS = "SELECT * FROM pg_stat_activity WHERE application_name = 'tallystick migrate' AND datname = current_database()"
WRAPAROUND = {"fsync": "off", "synchronous_commit": "off", "autovacuum_naptime": "1"}


def libpq(app: App) -> str:
    return sa.make_url(app.url).set(drivername="postgresql").render_as_string(hide_password=False)


@contextmanager
def holding(
    app: App, statement: str, application: str = "a report"
) -> Iterator[psycopg.Connection[tuple[object, ...]]]:
    """A transaction that has run ``statement`` and stays open."""
    with psycopg.connect(libpq(app), application_name=application) as conn:
        conn.execute(statement)
        yield conn


def wait_until(app: App, query: str) -> None:
    """Until it gives something other than none."""
    deadline = time.monotonic() + 60
    while not app.value(query):
        assert time.monotonic() < deadline, query
        time.sleep(0.01)


@contextmanager
def snapshot(app: App) -> Iterator[psycopg.Connection[tuple[object, ...]]]:
    """One that an index built concurrently waits for; it holds no table."""
    with holding(app, "SET TRANSACTION ISOLATION LEVEL REPEATABLE READ") as reader:
        reader.execute("SELECT 1")
        yield reader


def vacuum_of(app: App, table: str = "users") -> int | None:
    found = app.rows(f"SELECT pid FROM pg_stat_progress_vacuum WHERE relid = '{table}'::regclass")
    return found[0][0] if found else None


def wait_for_vacuum(app: App, table: str = "users") -> int:
    deadline = time.monotonic() + 90
    while not (pid := vacuum_of(app, table)):
        assert time.monotonic() < deadline, "autovacuum did not come"
        time.sleep(0.1)
    return pid


class TestWaiting:
    def test_for_an_open_transaction_until_it_ends(self, app: App) -> None:
        seen: list[migrate.MigrationProgress] = []
        with holding(app, "SELECT count(*) FROM users") as reader, ThreadPoolExecutor(1) as pool:
            reader_pid = reader.info.backend_pid
            waiting = threading.Event()

            def progress(step: migrate.MigrationProgress) -> None:
                seen.append(step)
                if step.phase == "waiting":
                    waiting.set()

            run = pool.submit(migrate.apply, app.url, app.config, progress=progress)
            assert waiting.wait(60)
            # nobody queues behind us meanwhile
            app.run("UPDATE users SET email = email")
            reader.commit()
            receipt = run.result(60)

        [blocker] = receipt.waited_for
        assert (blocker.pid, blocker.application, blocker.kind) == (reader_pid, "a report", "client")
        assert (blocker.state, blocker.tables) == ("idle in transaction", ("public.users",))
        phases = list(dict.fromkeys((step.phase, step.revision) for step in seen if step.phase != "waiting"))
        host = HostNames.of(app.config.host)
        online = [
            each.revision
            for each in revisions()
            if each.indexes(host) or each.ledger_indexes(host) or each.validates(host)
        ]
        assert phases == [("locking", HEAD), ("applied", HEAD), *(("online", name) for name in online)]
        with app.engine.connect() as conn:
            newest = "SELECT waited_for -> 0 ->> 'application' FROM tallystick.migration_log ORDER BY id DESC LIMIT 1"
            assert app.value(newest) == "a report"
            assert migrate.status(conn, app.config).healthy

    @pytest.mark.parametrize(
        "statement",
        [
            "SELECT FROM users LIMIT 1",
            "UPDATE workshops SET title = title",
            "LOCK TABLE users IN SHARE UPDATE EXCLUSIVE MODE",
            "LOCK TABLE workshops",
        ],
    )
    def test_gives_up_loudly_and_changes_nothing(self, app: App, statement: str) -> None:
        before = app.shape()
        with holding(app, statement) as blocker:
            with pytest.raises(MigrationBlocked) as caught:
                migrate.apply(app.url, app.config, give_up_after_s=0.6)
            assert f"pid {blocker.info.backend_pid} (a report), idle in transaction" in str(caught.value)
            assert "Nothing was changed" in str(caught.value)
            assert caught.value.retryable
        assert app.shape() == before
        assert migrate.apply(app.url, app.config).changed

    def test_a_prepared_transaction_is_named(self, scratch: Path, server: Server) -> None:
        with Server(scratch, settings={"fsync": "off", "max_prepared_transactions": "2"}, bin_dir=server.bin) as own:
            url = own.create_database("app")
            app = App(url, Config(database_url=url, host=HOSTS["uuid"].mapping), own)
            app.run(*HOSTS["uuid"].ddl.split(";")[:-1])
            with app.engine.connect() as conn:
                conn.exec_driver_sql("UPDATE users SET email = email")
                conn.exec_driver_sql("PREPARE TRANSACTION 'forgotten'")
            with pytest.raises(MigrationBlocked, match=r"prepared transaction 'forgotten' on public\.users"):
                migrate.apply(app.url, app.config, give_up_after_s=0.3)
            app.run("ROLLBACK PREPARED 'forgotten'")
            assert migrate.apply(app.url, app.config).changed

    def test_a_vacuum_against_wraparound_is_deferred_to(self, scratch: Path, server: Server) -> None:
        """A real one: it would not yield, so it is neither cancelled nor queued behind, but named and waited for."""
        with Server(scratch, settings=WRAPAROUND, bin_dir=server.bin) as own:
            app = self.old_table(own)
            vacuum = wait_for_vacuum(app)
            before = app.shape()

            with app.engine.connect() as conn:
                [planned] = migrate.plan(conn, app.config).blockers
            with pytest.raises(MigrationBlocked) as caught:
                migrate.apply(app.url, app.config, give_up_after_s=1)

            assert (planned.pid, planned.kind) == (vacuum, "wraparound vacuum")
            assert f"pid {vacuum}, wraparound vacuum, holds public.users" in str(caught.value)
            assert caught.value.attempts == 0  # not once was a lock asked for
            assert app.shape() == before

            waiting = threading.Event()
            with ThreadPoolExecutor(1) as pool:
                run = pool.submit(migrate.apply, app.url, app.config, progress=partial(set_event, waiting))
                assert waiting.wait(60)
                assert not app.value("SELECT count(*) FROM pg_locks WHERE NOT granted AND relation = 'users'::regclass")
                app.run("UPDATE users SET email = email WHERE email = 'user 1'")  # nobody waits for us
                assert vacuum_of(app) == vacuum
                # what an administrator may do: it comes back at once unless told not to
                app.run("ALTER SYSTEM SET autovacuum = off", "SELECT pg_reload_conf()")
                while vacuum_of(app):
                    app.run(f"SELECT pg_terminate_backend({vacuum_of(app) or 0})")
                    time.sleep(0.1)
                [blocker] = run.result(60).waited_for
            assert (blocker.pid, blocker.kind) == (vacuum, "wraparound vacuum")

    def test_a_role_that_may_not_see_a_vacuum_finds_it_by_the_fence(self, scratch: Path, server: Server) -> None:
        with Server(scratch, settings=WRAPAROUND, bin_dir=server.bin) as own:
            app = self.old_table(own)
            app.run(
                "CREATE ROLE owner LOGIN",
                "GRANT CREATE ON DATABASE app TO owner",
                "GRANT CREATE ON SCHEMA public TO owner",
                "ALTER TABLE users OWNER TO owner",
                "ALTER TABLE workshops OWNER TO owner",
            )
            vacuum = wait_for_vacuum(app)
            url = sa.make_url(app.url).set(username="owner").render_as_string(hide_password=False)
            with pytest.raises(MigrationBlocked) as caught:
                migrate.apply(url, app.config, give_up_after_s=1)
            assert f"pid {vacuum}, autovacuum, holds public.users" in str(caught.value)
            assert caught.value.attempts == 1
            assert vacuum_of(app) == vacuum

    def old_table(self, own: Server) -> App:
        """A host whose users are too old in transaction ids, and large enough for their vacuum to take minutes."""
        url = own.create_database("app")
        app = App(url, Config(database_url=url, host=HOSTS["uuid"].mapping), own)
        app.run(
            "ALTER SYSTEM SET autovacuum = off",  # not before it is needed
            "SELECT pg_reload_conf()",
            *HOSTS["uuid"].ddl.replace("(1, 500)", "(1, 20000)").split(";")[:-1],
            # one page, then a pause
            "ALTER TABLE users SET (autovacuum_freeze_max_age = 100000, autovacuum_vacuum_cost_delay = 100,"
            " autovacuum_vacuum_cost_limit = 1)",
            "DO $$ BEGIN FOR i IN 1..100100 LOOP PERFORM txid_current(); COMMIT; END LOOP; END $$",
            "ALTER SYSTEM RESET autovacuum",
            "SELECT pg_reload_conf()",
        )
        return app

    def test_plan_names_who_is_in_the_way_now(self, app: App) -> None:
        with holding(app, "SELECT FROM users LIMIT 1"):
            time.sleep(0.3)
            with app.engine.connect() as conn:
                [blocker] = migrate.plan(conn, app.config).blockers
        assert blocker.application == "a report"
        assert blocker.age_ms >= 250

    def test_looking_waits_for_an_exclusive_lock_but_not_for_ever(self, app: App) -> None:
        def look(at: Callable[[sa.Connection, Config], object]) -> None:
            with app.engine.connect() as conn, pytest.raises(Conflict):
                at(conn, app.config)

        with holding(app, "LOCK TABLE users"), ThreadPoolExecutor(2) as pool:
            for looked in [pool.submit(look, at) for at in (migrate.plan, migrate.status)]:
                looked.result(60)

    def test_undo_waits_too(self, migrated: App) -> None:
        with holding(migrated, "SELECT FROM users LIMIT 1"), pytest.raises(MigrationBlocked):
            migrate.undo(migrated.url, migrated.config, give_up_after_s=0.3)
        assert migrate.undo(migrated.url, migrated.config).changed


def slow_down(app: App) -> None:
    """Each change takes 80 ms while a table is locked."""
    app.run(
        "CREATE FUNCTION slow() RETURNS event_trigger LANGUAGE plpgsql AS $$ BEGIN"
        " IF EXISTS (SELECT FROM pg_locks WHERE pid = pg_backend_pid() AND mode = 'AccessExclusiveLock'"
        " AND relation = 'public.users'::regclass) THEN PERFORM pg_sleep(0.08); END IF; END $$",
        "CREATE EVENT TRIGGER slow ON ddl_command_end EXECUTE FUNCTION slow()",
    )


class TestTheBudget:
    def test_all_statements_under_the_lock_share_it(self, app: App) -> None:
        before = app.shape()
        slow_down(app)
        with pytest.raises(MigrationBlocked, match="takes longer than the stall budget") as caught:
            migrate.apply(app.url, app.config, stall_budget_ms=100, give_up_after_s=1)
        assert "Nothing was changed" in str(caught.value)
        assert "--two-transactions" not in str(caught.value)
        app.run("DROP EVENT TRIGGER slow", "DROP FUNCTION slow()")
        assert app.shape() == before

    def test_with_a_larger_one_it_goes_through_and_is_measured(self, app: App) -> None:
        slow_down(app)
        receipt = migrate.apply(app.url, app.config, stall_budget_ms=20_000)
        assert 240 < receipt.locked_ms < 20_000  # three tables are altered

    def test_the_time_in_which_others_queued_behind_it_counts(self, app: App) -> None:
        with psycopg.connect(libpq(app)) as reader, ThreadPoolExecutor(1) as pool:

            def progress(now: migrate.MigrationProgress) -> None:
                if (now.phase, now.revision, now.attempt) == ("locking", HEAD, 1):
                    reader.execute("SELECT FROM users LIMIT 1")

            run = pool.submit(migrate.apply, app.url, app.config, stall_budget_ms=20_000, progress=progress)
            wait_until(app, "SELECT count(*) FROM pg_locks WHERE NOT granted AND relation = 'users'::regclass")
            time.sleep(0.5)
            reader.rollback()
            assert run.result(60).locked_ms > 500


class TestTwoAtOnce:
    def test_the_second_says_so_and_stops(self, app: App) -> None:
        with holding(app, f"SELECT pg_advisory_lock({ADVISORY_KEY})") as first:
            before = app.shape()
            with pytest.raises(MigrationRunning, match=f"pid {first.info.backend_pid}"):
                migrate.apply(app.url, app.config)
            assert app.shape() == before

    def test_one_that_has_returned_is_in_nobodys_way(self, app: App) -> None:
        with psycopg.connect(libpq(app), autocommit=True) as next_one:
            for _ in range(30):
                migrate.apply(app.url, app.config)
                row = next_one.execute("SELECT pg_try_advisory_lock(%s)", [ADVISORY_KEY]).fetchone()
                assert row == (True,)
                next_one.execute("SELECT pg_advisory_unlock(%s)", [ADVISORY_KEY])

    def test_many_at_once_end_as_one(self, app: App) -> None:
        def run() -> bool | None:
            try:
                return migrate.apply(app.url, app.config).changed
            except MigrationRunning:
                return None

        with ThreadPoolExecutor(6) as pool:
            outcomes = [task.result(120) for task in [pool.submit(run) for _ in range(6)]]

        assert outcomes.count(True) == 1
        assert app.rows("SELECT count(*) FROM tallystick.migration_log") == [(len(revisions()),)]
        with app.engine.connect() as conn:
            assert migrate.status(conn, app.config).healthy


class TestOnline:
    """The index that is built after the commit."""

    def test_a_missing_one_is_built_by_the_next_run(self, migrated: App) -> None:
        after = migrated.shape()
        migrated.run(f"DROP INDEX {INDEX}")

        [step] = migrate.apply(migrated.url, migrated.config).online

        assert (step.name, step.outcome) == (INDEX, "built")
        assert migrated.shape() == after

    def test_an_invalid_one_is_told_and_repaired(self, migrated: App) -> None:
        after = migrated.shape()
        migrated.run(f"DROP INDEX {INDEX}", "UPDATE users SET stripe_customer_id = 'cus_1'")
        with pytest.raises(MigrationError, match=r"Key \(stripe_customer_id\)=\(cus_1\) is duplicated"):
            migrate.apply(migrated.url, migrated.config)
        with migrated.engine.connect() as conn:
            [drift] = migrate.status(conn, migrated.config).drift
        assert (drift.kind, "INVALID" in str(drift.found)) == ("index", True)
        migrated.run("UPDATE users SET stripe_customer_id = NULL")

        [step] = migrate.apply(migrated.url, migrated.config).online

        assert step.outcome == "repaired"
        assert migrated.shape() == after

    def test_one_that_still_enforces_is_told_from_one_that_does_not(self, migrated: App) -> None:
        """Whatever a build that was killed in one of its phases has left, and what it does with a duplicate."""
        duplicate = "UPDATE users SET stripe_customer_id = 'cus_1' WHERE email IN ('user 1', 'user 2')"
        for ready, state in ((True, "invalid, enforcing"), (False, "invalid")):
            migrated.run(
                f"UPDATE pg_index SET indisvalid = false, indisready = {ready} WHERE indexrelid = '{INDEX}'::regclass"
            )
            with migrated.engine.connect() as conn:
                assert index_state(conn, "public", INDEX) == state
                [drift] = migrate.status(conn, migrated.config).drift
            assert ("but still enforcing" in str(drift.found), "enforcing nothing" in str(drift.found)) == (
                ready,
                not ready,
            )
            if ready:
                with pytest.raises(sa.exc.IntegrityError, match=INDEX):
                    migrated.run(duplicate)
                with migrated.engine.connect() as conn:
                    assert index_state(conn, "public", INDEX) == state
        migrated.run(duplicate)
        with pytest.raises(MigrationError, match="duplicated"):
            migrate.apply(migrated.url, migrated.config)
        migrated.run("UPDATE users SET stripe_customer_id = NULL")
        assert migrate.apply(migrated.url, migrated.config).online[0].outcome == "repaired"
        with migrated.engine.connect() as conn:
            assert index_state(conn, "public", INDEX) == "valid"

    def test_what_a_killed_rebuild_left_is_removed(self, migrated: App) -> None:
        after = migrated.shape()
        for suffix in ("_ccnew", "_ccnew1", "_ccold"):
            migrated.run(f"CREATE INDEX {INDEX}{suffix} ON users (stripe_customer_id)")
        migrated.run(f"UPDATE pg_index SET indisvalid = false WHERE indexrelid::regclass::text ~ '^{INDEX}'")

        migrate.apply(migrated.url, migrated.config)

        assert migrated.shape() == after


@pytest.mark.parametrize(
    ("style", "zone"),
    [("SQL, DMY", "Asia/Jakarta"), ("German", "Europe/Berlin"), ("Postgres, MDY", "America/Sao_Paulo")],
)
def test_times_are_written_as_the_database_likes(app: App, style: str, zone: str) -> None:
    name = app.engine.url.database
    app.run(f"ALTER DATABASE {name} SET datestyle = '{style}'", f"ALTER DATABASE {name} SET timezone = '{zone}'")
    assert migrate.apply(app.url, app.config).locked_ms > 0
    script = migrate.sql(None, app.config)
    assert migrate.undo(app.url, app.config).changed
    app.psql(script)


def test_nothing_is_compiled_under_the_lock(app: App) -> None:
    """Compiling a query on the catalogues of a large database takes longer than the stall budget."""
    app.run(f'ALTER DATABASE "{app.engine.url.database}" SET jit = on')
    with session(app.engine) as conn:
        assert conn.scalar(sa.text("SHOW jit")) == "off"


class TestFaults:
    def test_no_database(self, app: App) -> None:
        url = sa.make_url(app.url).set(database="nowhere").render_as_string(hide_password=False)
        with pytest.raises(DatabaseUnavailable, match='database "nowhere" does not exist'):
            migrate.apply(url, app.config)

    def test_a_budget_of_nothing(self, app: App) -> None:
        with pytest.raises(ConfigError, match="stall budget of 0 ms"):
            migrate.apply(app.url, app.config, stall_budget_ms=0)

    def test_another_driver_is_refused(self, app: App) -> None:
        engine = sa.create_engine("sqlite://")
        with pytest.raises(MigrationError, match=r"postgresql\+psycopg://"):
            migrate.apply(engine, app.config)
        engine.dispose()

    def test_a_role_that_may_not_lock(self, app: App) -> None:
        app.run(
            "CREATE FUNCTION forbid() RETURNS event_trigger LANGUAGE plpgsql AS"
            " $$ BEGIN RAISE insufficient_privilege USING MESSAGE = 'ask first'; END $$",
            "CREATE EVENT TRIGGER forbid ON ddl_command_start WHEN tag IN ('ALTER TABLE') EXECUTE FUNCTION forbid()",
        )
        before = app.shape()
        with pytest.raises(MigrationError, match="the event trigger forbid forbids it: ask first"):
            migrate.apply(app.url, app.config)
        assert app.shape() == before

    def test_an_event_trigger_that_names_a_table_without_its_schema(self, app: App) -> None:
        app.run(
            "CREATE TABLE changes (tag text)",
            "CREATE FUNCTION note() RETURNS event_trigger LANGUAGE plpgsql AS"
            " $$ BEGIN INSERT INTO changes VALUES (tg_tag); END $$",
            "CREATE EVENT TRIGGER notes ON ddl_command_end EXECUTE FUNCTION note()",
        )
        with pytest.raises(MigrationError, match="the event trigger notes does not find a name") as caught:
            migrate.apply(app.url, app.config)
        assert 'relation "changes" does not exist. Nothing was changed. Let its owner write the schema' in str(
            caught.value
        )
        app.run("ALTER FUNCTION note() SET search_path = public")
        assert migrate.apply(app.url, app.config).changed

    def test_an_event_trigger_that_hides_new_tables_from_their_owner(self, app: App) -> None:
        """Whoever connects is the owner already; the remedy is the trigger's."""
        owner = f"owner_{uuid.uuid4().hex}"
        app.psql(
            f"""
            CREATE ROLE {owner} LOGIN;
            ALTER TABLE users OWNER TO {owner};
            ALTER TABLE workshops OWNER TO {owner};
            GRANT CREATE ON SCHEMA public TO {owner};
            GRANT CREATE ON DATABASE {app.engine.url.database} TO {owner};
            """
        )
        app.psql(
            """
            CREATE FUNCTION bind() RETURNS event_trigger LANGUAGE plpgsql AS $$
            DECLARE made record;
            BEGIN
              FOR made IN SELECT * FROM pg_event_trigger_ddl_commands() WHERE command_tag = 'CREATE TABLE' LOOP
                EXECUTE format('ALTER TABLE %s ENABLE ROW LEVEL SECURITY', made.object_identity);
                EXECUTE format('ALTER TABLE %s FORCE ROW LEVEL SECURITY', made.object_identity);
              END LOOP;
            END $$;
            CREATE FUNCTION look() RETURNS event_trigger LANGUAGE plpgsql AS 'BEGIN END';
            CREATE EVENT TRIGGER binds ON ddl_command_end WHEN TAG IN ('CREATE TABLE') EXECUTE FUNCTION bind();
            CREATE EVENT TRIGGER looks ON ddl_command_end EXECUTE FUNCTION look();
            """
        )
        before = app.dump()
        url = sa.make_url(app.url).set(username=owner).render_as_string(hide_password=False)
        try:
            with pytest.raises(MigrationError, match="the event trigger binds hides new tables from") as caught:
                migrate.apply(url, app.config)
            assert "Nothing was changed. Let its owner run: ALTER EVENT TRIGGER binds DISABLE; then" in str(
                caught.value
            )
            assert app.dump() == before

            app.psql("ALTER EVENT TRIGGER binds DISABLE")
            migrate.apply(url, app.config)
            with app.engine.connect() as conn:
                assert migrate.status(conn, app.config).healthy
        finally:
            app.psql(f"REASSIGN OWNED BY {owner} TO CURRENT_USER; DROP OWNED BY {owner}; DROP ROLE {owner}")

    def test_a_privilege_that_is_granted_meanwhile(self, app: App) -> None:
        """PostgreSQL 18 locks the table for it; before, ours finds a row of the catalogue changed under it."""
        with psycopg.connect(libpq(app)) as granting, ThreadPoolExecutor(1) as pool:
            granting.execute("GRANT SELECT ON users TO PUBLIC")
            named = app.value("SELECT count(*) FROM pg_locks WHERE relation = 'users'::regclass")
            message = f"pid {granting.info.backend_pid}" if named else "has changed their privileges"
            with pytest.raises(MigrationBlocked, match=message):
                migrate.apply(app.url, app.config, give_up_after_s=0.3)
            run = pool.submit(migrate.apply, app.url, app.config, stall_budget_ms=20_000)
            if not named:
                wait_until(app, f"SELECT count(*) FROM ({OURS}) ours WHERE wait_event = 'transactionid'")
            granting.commit()
            assert run.result(60).attempts == (1 if named else 2)

    def test_a_server_without_room(self, app: App) -> None:
        """The search of functions sorts their bodies, in a file where they are large."""
        app.psql(
            "DO $$ BEGIN FOR i IN 1..200 LOOP EXECUTE format('CREATE FUNCTION large_%s() RETURNS text LANGUAGE plpgsql"
            " AS %L', i, 'BEGIN END --' || repeat('x', 2000)); END LOOP; END $$"
        )
        name = app.engine.url.database
        app.run(f"ALTER DATABASE {name} SET temp_file_limit = 0", f"ALTER DATABASE {name} SET work_mem = '64kB'")
        with pytest.raises(MigrationError, match=r"temp_file_limit.* Give the server disk or memory, then"):
            migrate.apply(app.url, app.config)
        app.run(f"ALTER DATABASE {name} RESET ALL")
        assert migrate.apply(app.url, app.config).changed

    def test_an_error_of_the_server_is_no_lost_connection(self, app: App) -> None:
        app.run(
            "CREATE FUNCTION fail() RETURNS event_trigger LANGUAGE plpgsql AS"
            " $$ BEGIN RAISE internal_error USING MESSAGE = 'out of luck'; END $$",
            "CREATE EVENT TRIGGER fail ON ddl_command_start WHEN tag IN ('ALTER TABLE') EXECUTE FUNCTION fail()",
        )
        before = app.shape()
        with pytest.raises(MigrationError, match=r"out of luck.*Nothing was changed"):
            migrate.apply(app.url, app.config)
        assert app.shape() == before

    def test_a_connection_that_dies_under_the_run(self, app: App) -> None:
        before = app.shape()

        def kill(step: migrate.MigrationProgress) -> None:
            if step.phase == "locking":
                app.run(
                    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                    " WHERE application_name = 'tallystick migrate' AND datname = current_database()"
                )

        with pytest.raises(OutcomeUnknown, match="Run the same command again"):
            migrate.apply(app.url, app.config, progress=kill)
        assert app.shape() == before
        assert migrate.apply(app.url, app.config).changed


def set_event(event: threading.Event, _: migrate.MigrationProgress) -> None:
    event.set()


def set_event_in(event: threading.Event, phase: str, now: migrate.MigrationProgress) -> None:
    if now.phase == phase:
        event.set()


def without_online(shape: set[tuple[str, str]]) -> set[tuple[str, str]]:
    """Without what is done after the commit."""
    online = (INDEX, "tallystick_users_credit_due_at", "credit_transactions_completed_at")
    return {
        (kind, text.removesuffix(" NOT VALID")) for kind, text in shape if not any(index in text for index in online)
    }


class TestKilled:
    """At any moment: what is there afterwards is the old or the new, and the next run ends as if nothing was."""

    MOMENTS = 30
    SERVER_MOMENTS = 10

    def test_the_client(self, app: App) -> None:
        app.engine = sa.create_engine(app.url, pool_size=1)  # it looks often
        old = app.shape()
        started = time.monotonic()
        migrate.apply(app.url, app.config)
        latest_s = time.monotonic() - started
        new = app.shape()
        migrate.undo(app.url, app.config)
        seen = set()
        for _ in range(self.MOMENTS):
            process = PROCESSES.Process(target=migrate.apply, args=(app.url, app.config), daemon=True)
            process.start()
            while not self.sessions(app) and process.is_alive():
                time.sleep(0.001)
            time.sleep(random.uniform(0, latest_s))
            process.kill()
            process.join()
            self.wait_until_gone(app)

            seen.add(found := self.standing(app, old, new))
            latest_s *= 0.9 if found == "new" else 1.1  # so that moments fall on both sides, however busy the machine
            migrate.apply(app.url, app.config)
            assert app.shape() == new
            migrate.undo(app.url, app.config)
            assert app.shape() == old
        assert seen == {"old", "new"}
        app.engine.dispose()

    def standing(self, app: App, old: set[tuple[str, str]], new: set[tuple[str, str]]) -> str:
        """The revision at which a killed run left the database: none or the last."""
        found = without_online(app.shape())
        if found == without_online(old):
            return "old"
        assert found == without_online(new)
        return "new"

    def sessions(self, app: App) -> int:
        return app.value(
            "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'tallystick migrate'"
            " AND datname = current_database()"
        )

    def wait_until_gone(self, app: App) -> None:
        """The server ends what a killed client began, but not at once."""
        deadline = time.monotonic() + 60
        while self.sessions(app):
            assert time.monotonic() < deadline
            time.sleep(0.01)

    def test_the_server(self, scratch: Path, server: Server) -> None:
        with Server(scratch, settings={"fsync": "off"}, bin_dir=server.bin) as own:
            url = own.create_database("app")
            app = App(url, Config(database_url=url, host=HOSTS["uuid"].mapping), own)
            app.run(*HOSTS["uuid"].ddl.split(";")[:-1])
            old = app.shape()
            started = time.monotonic()
            migrate.apply(app.url, app.config)
            latest_s = time.monotonic() - started
            new = app.shape()
            migrate.undo(app.url, app.config)

            def crash() -> None:
                os.kill(int((scratch / "server/data/postmaster.pid").read_text().split()[0]), signal.SIGKILL)

            seen = set()
            # just before anything is locked, and just after all is committed; the others anywhere
            for phase in ("locking", "online", *[None] * (self.SERVER_MOMENTS - 2)):

                def progress(now: migrate.MigrationProgress, phase: str | None = phase) -> None:
                    if now.phase == phase:
                        crash()
                        time.sleep(0.5)  # until the process that serves us has noticed

                with ThreadPoolExecutor(1) as pool:
                    run = pool.submit(migrate.apply, app.url, app.config, progress=progress)
                    if phase is None:
                        time.sleep(random.uniform(0, latest_s))
                        crash()
                    error = run.exception(60)
                assert error is None or isinstance(error, OutcomeUnknown | DatabaseUnavailable), error
                own.start()

                seen.add(found := self.standing(app, old, new))
                if phase is None:
                    latest_s *= 0.9 if found == "new" else 1.1
                else:
                    assert found == {"locking": "old", "online": "new"}[phase]
                migrate.apply(app.url, app.config)
                assert app.shape() == new
                migrate.undo(app.url, app.config)
                assert app.shape() == old
            assert seen == {"old", "new"}


def test_nothing_is_left_locked_or_open(app: App) -> None:
    migrate.apply(app.url, app.config)
    assert app.value("SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'") == 0
    assert (
        app.value(
            "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'tallystick migrate'"
            " AND datname = current_database()"
        )
        == 0
    )
    assert app.value("SELECT version_num FROM tallystick.alembic_version") == HEAD


def test_the_lock_was_short_and_measured(make_app: Callable[..., App]) -> None:
    app = make_app()
    receipt = migrate.apply(app.url, app.config)
    assert 0 < receipt.locked_ms < receipt.duration_ms


SETTINGS = {
    "default_transaction_isolation": "repeatable read",
    "transaction_timeout": "500ms",
    "statement_timeout": "500ms",
    "lock_timeout": "500ms",
    "idle_session_timeout": "500ms",
}


SINCE = {"transaction_timeout": 17}


@pytest.mark.parametrize(
    "setting", [pytest.param(name, marks=pytest.mark.since(SINCE.get(name, 14))) for name in SETTINGS]
)
def test_settings_of_the_database_do_not_end_a_build(app: App, setting: str) -> None:
    """Nor may the second connection, which looks how far it is, be what the build waits for."""
    with psycopg.connect(libpq(app)) as writer, ThreadPoolExecutor(1) as pool:
        app.run(f"ALTER DATABASE {app.engine.url.database} SET {setting} = '{SETTINGS[setting]}'")
        online = threading.Event()

        def progress(now: migrate.MigrationProgress) -> None:
            if now.phase == "online" and not online.is_set():
                writer.execute("UPDATE users SET email = email")  # the build waits for it before it looks at anything
                online.set()

        run = pool.submit(migrate.apply, app.url, app.config, progress=progress)
        assert online.wait(60)
        time.sleep(1)
        writer.rollback()
        try:
            assert run.result(30).online[0].outcome == "built"
        finally:
            app.run(f"SELECT pg_terminate_backend(pid) FROM ({OURS}) ours")


def test_a_build_that_cannot_be_looked_at_goes_on(app: App) -> None:
    lone = f"lone_{app.engine.url.database}"
    app.run(
        f"CREATE ROLE {lone} LOGIN CONNECTION LIMIT 1",
        f"GRANT CREATE ON DATABASE {app.engine.url.database} TO {lone}",
        f"GRANT CREATE ON SCHEMA public TO {lone}",
        f"ALTER TABLE users OWNER TO {lone}",
        f"ALTER TABLE workshops OWNER TO {lone}",
    )
    url = app.engine.url.set(username=lone).render_as_string(hide_password=False)
    online = threading.Event()
    try:
        with ThreadPoolExecutor(1) as pool, snapshot(app) as reader:
            run = pool.submit(migrate.apply, url, app.config, progress=partial(set_event_in, online, "online"))
            assert online.wait(60)
            time.sleep(1)
            reader.rollback()
            assert run.result(30).online[0].outcome == "built"
    finally:
        app.run(f"REASSIGN OWNED BY {lone} TO postgres", f"DROP OWNED BY {lone}", f"DROP ROLE {lone}")


def test_a_connection_that_dies_while_a_leftover_is_dropped(migrated: App) -> None:
    migrated.run(
        f"CREATE INDEX {INDEX}_ccnew ON users (stripe_customer_id)",
        f"UPDATE pg_index SET indisvalid = false WHERE indexrelid = '{INDEX}_ccnew'::regclass",
    )
    with ThreadPoolExecutor(1) as pool, holding(migrated, "SELECT FROM users LIMIT 1"):
        run = pool.submit(migrate.apply, migrated.url, migrated.config)
        kill = f"SELECT pg_terminate_backend(pid) FROM ({OURS}) ours WHERE left(query, 10) = 'DROP INDEX'"
        deadline = time.monotonic() + 60
        while not migrated.rows(kill):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        with pytest.raises(OutcomeUnknown, match="Run the same command again"):
            run.result(60)
    assert not migrate.apply(migrated.url, migrated.config).changed


def test_a_build_that_waits_tells_for_whom(app: App) -> None:
    """CREATE INDEX CONCURRENTLY waits for every older snapshot of the database; traffic does not feel it."""
    seen: list[migrate.MigrationProgress] = []
    waiting = threading.Event()

    def progress(step: migrate.MigrationProgress) -> None:
        seen.append(step)
        if step.waits_for:
            waiting.set()

    with snapshot(app) as reader, ThreadPoolExecutor(1) as pool:
        pid = reader.info.backend_pid
        run = pool.submit(migrate.apply, app.url, app.config, progress=progress)
        assert waiting.wait(60)
        app.run("UPDATE users SET email = email", "UPDATE workshops SET title = title")
        reader.commit()
        run.result(60)

    waited = next(step for step in seen if step.waits_for)
    assert (waited.phase, waited.step, waited.waits_for) == ("online", INDEX, pid)
    assert "waiting for" in str(waited.detail)
    assert app.value("SELECT indisvalid FROM pg_index WHERE indexrelid::regclass::text = '" + INDEX + "'")


def test_a_run_that_is_stopped_leaves_nothing_building(app: App) -> None:
    def stop(step: migrate.MigrationProgress) -> None:
        if step.waits_for:
            raise KeyboardInterrupt

    with snapshot(app):
        with pytest.raises(KeyboardInterrupt) as caught:
            migrate.apply(app.url, app.config, progress=stop)
        [note] = caught.value.__notes__
        assert f"Revision {HEAD} is in place" in note
        assert app.value("SELECT version_num FROM tallystick.alembic_version") == HEAD
        assert app.value("SELECT count(*) FROM pg_stat_progress_create_index") == 0
    assert migrate.apply(app.url, app.config).online[0].outcome == "repaired"
