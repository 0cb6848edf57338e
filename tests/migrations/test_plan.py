"""The report of ``plan``, before anything is changed."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa
from hosts import HOSTS, App

from tallystick import Config, HostMapping, UsersTable, migrate
from tallystick.audit import audit
from tallystick.database import connect
from tallystick.dev.postgres import Server
from tallystick.errors import MigrationError
from tallystick.migrate.host import role
from tallystick.migrate.host.tables import reading_catalogues
from tallystick.schema import HEAD


def plan(app: App, **options: object) -> migrate.Plan:
    with app.engine.connect() as conn:
        return migrate.plan(conn, app.config, **options)


@pytest.mark.parametrize("name", HOSTS)
def test_nothing_under_the_lock_scans_or_rewrites(name: str, make_app: Callable[..., App]) -> None:
    app = make_app(HOSTS[name].ddl, HOSTS[name].mapping)
    for statement in plan(app).statements:
        assert not statement.rewrites
        assert not statement.scans or statement.phase == "online"


def test_the_catalogues_are_read_without_jit(app: App) -> None:
    """Compiling one search of them took PostgreSQL 15 a quarter of a second, and the search 3 ms."""
    with app.engine.begin() as conn:
        conn.exec_driver_sql("SET LOCAL jit = on")
        with reading_catalogues(conn):
            assert conn.scalar(sa.text("SHOW jit")) == "off"
        assert conn.scalar(sa.text("SHOW jit")) == "on"


def test_it_changes_nothing(app: App) -> None:
    before = app.dump()
    plan(app)
    assert app.dump() == before


def test_it_tells_sizes_columns_and_the_way(app: App) -> None:
    app.run("ANALYZE")
    found = plan(app)
    assert (found.before, found.after) == (None, HEAD)
    assert [(table.table, table.rows) for table in found.tables] == [("public.users", 500), ("public.workshops", 500)]
    assert found.adopted == ()
    assert 0 < found.estimated_hold_ms < 100
    assert found.database_bytes > 0
    migrate.apply(app.url, app.config)
    assert plan(app).revisions == ()


def test_many_foreign_keys_need_a_larger_stall_budget(app: App, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some thousand do; here each counts as much as a thousand, since to make them takes minutes."""
    app.run(
        "CREATE TABLE visits (user_id uuid)",
        *(f"ALTER TABLE visits ADD CONSTRAINT of_{n} FOREIGN KEY (user_id) REFERENCES users" for n in range(5)),
    )
    assert not [finding for finding in plan(app).findings if "foreign keys" in finding.text]
    monkeypatch.setattr("tallystick.migrate.checks.plan._KEY_MS", 50)
    found = plan(app)
    (warning,) = (finding for finding in found.findings if "foreign keys" in finding.text)
    assert warning.text.startswith("6 foreign keys refer to public.users and public.workshops")
    assert found.estimated_hold_ms > 300
    assert int(warning.text.rpartition("--stall-budget-ms ")[2]) >= 2 * found.estimated_hold_ms


def test_it_is_json(app: App) -> None:
    assert json.loads(json.dumps(dataclasses.asdict(plan(app)), default=str))["after"] == HEAD


def test_a_role_without_privileges_sees_the_plan_and_what_is_missing(app: App) -> None:
    app.run("DROP ROLE IF EXISTS nobody_much", "CREATE ROLE nobody_much LOGIN")
    url = sa.make_url(app.url).set(username="nobody_much").render_as_string(hide_password=False)
    try:
        found = plan(App(url, app.config, app.server))
        assert found.revisions
        stops = [finding.text for finding in found.findings if finding.severity == "stop"]
        assert any("does not own public.users" in text for text in stops)
        assert any("GRANT CREATE ON DATABASE" in text for text in stops)
    finally:
        app.run("DROP ROLE nobody_much")


def test_enough_room_for_a_backup(app: App, tmp_path: Path) -> None:
    enough = plan(app, backup_folder=tmp_path)
    assert not [finding for finding in enough.findings if "free" in finding.text]


def test_too_little_room_for_a_backup(app: App, tmp_path: Path) -> None:
    """On a real file system of one megabyte, mounted where only this command sees it, and gone with it."""
    small = ["unshare", "--mount", *([] if os.geteuid() == 0 else ["--user", "--map-root-user"]), "sh", "-c"]
    small += ['mount -t tmpfs -o size=1m tmpfs "$1" && shift && exec "$@"', "sh", str(tmp_path)]
    try:
        made = subprocess.run([*small, "true"], capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        made = False
    if not made:
        pytest.skip("only Linux lets unshare(1) mount a small file system to fill, and not in every container")
    plan_it = "import sys; from tallystick.cli import main; sys.argv[0] = 'tallystick'; main()"
    where = ["--database-url", app.url, "migrate", "plan", "--backup", str(tmp_path / "app.backup"), "--json"]
    done = subprocess.run(
        [*small, sys.executable, "-c", plan_it, *where], capture_output=True, text=True, check=True, cwd="/"
    )
    [warning] = [finding for finding in json.loads(done.stdout)["findings"] if "free" in finding["text"]]
    assert warning["severity"] == "warning"
    assert f"{tmp_path} has 0.0 GB free" in warning["text"]
    assert "--backup" in warning["text"]


def test_prepared_stars_and_replicas_are_named(scratch: Path, server: Server) -> None:
    settings = {"fsync": "off", "shared_preload_libraries": "pg_stat_statements"}
    with Server(scratch, settings=settings, bin_dir=server.bin) as own:
        url = own.create_database("app")
        app = App(url, Config(database_url=url, host=HOSTS["uuid"].mapping), own)
        app.run(*HOSTS["uuid"].ddl.split(";")[:-1], "CREATE EXTENSION pg_stat_statements")
        app.run(
            "SELECT * FROM users WHERE email = 'a'",
            "SELECT w.* FROM workshops w LIMIT 1",
            "UPDATE users SET email = email WHERE false RETURNING *",
            "SELECT count(*) FROM users",
            "SELECT id FROM users LIMIT 2 * 3",
            "SELECT * FROM pg_class",
        )
        stars = [finding.text for finding in plan(app).findings]

        # what another role runs is hidden from the owner of the tables, and that is said
        app.run("CREATE ROLE owner LOGIN", "ALTER TABLE users OWNER TO owner", "ALTER TABLE workshops OWNER TO owner")
        owners = App(url.replace("postgres@", "owner@"), app.config, own)
        texts = [finding.text for finding in plan(owners).findings]
        assert not any("SELECT * FROM users" in text for text in texts)
        assert any(
            re.match(r"pg_stat_statements hides \d+ statements of other roles from owner", text) for text in texts
        )
        app.run("GRANT pg_read_all_stats TO owner")
        texts = [finding.text for finding in plan(owners).findings]
        assert any("SELECT * FROM users" in text for text in texts)
        assert not any("hides" in text for text in texts)
    assert len(stars) == 3
    for part in ("SELECT * FROM users", "SELECT w.* FROM workshops", "RETURNING *"):
        assert any(part in text for text in stars)


@pytest.mark.since(15)
def test_a_publication_with_a_list_of_columns_is_not_in_the_way(app: App) -> None:
    app.run("CREATE PUBLICATION p FOR TABLE users (id, email)", "CREATE PUBLICATION q FOR TABLES IN SCHEMA public")
    [warning] = [finding.text for finding in plan(app).findings if "publication" in finding.text]
    assert "The publication q sends new columns, and new tables too (public.credit_transactions)" in warning


@pytest.fixture
def roles(app: App) -> Iterator[tuple[str, str]]:
    """An app's role, and one that end users act as."""
    names = tuple(f"{name} of {app.engine.url.database}" for name in ("webapp", "anon"))
    app.run(*(f'CREATE ROLE "{name}" LOGIN' for name in names))
    yield names
    app.run(*(f'DROP OWNED BY "{name}"; DROP ROLE "{name}"' for name in names))


def test_who_could_set_a_balance_is_named(app: App, roles: tuple[str, str]) -> None:
    webapp, anon = roles
    assert not [finding for finding in plan(app).findings if "every column" in finding.text]
    app.run(
        f'GRANT SELECT, INSERT, UPDATE ON users TO "{webapp}"',
        f'GRANT SELECT, UPDATE ON users TO "{anon}"',
        f'GRANT UPDATE (email) ON users TO PUBLIC; CREATE POLICY own ON users TO "{anon}" USING (email = current_user)',
        "ALTER TABLE users ENABLE ROW LEVEL SECURITY",
    )
    ends, apps = (finding.text for finding in plan(app).findings if "every column" in finding.text)
    assert apps.startswith(f"{webapp} may UPDATE and INSERT every column of public.users, credit_balance too")
    assert f"tallystick migrate sql --role '{webapp}'" in apps
    assert ends.startswith(f"{anon} may UPDATE every column")

    # what the warnings say is enough
    migrate.apply(app.url, app.config)
    revoke = f'REVOKE UPDATE ON public.users FROM "{anon}"'
    assert revoke in ends
    app.run(revoke)
    app.psql(role.grant(app.config.host, webapp))
    try:
        assert not [finding for finding in plan(app).findings if "every column" in finding.text]
    finally:
        app.psql(role.revoke(app.config.host, webapp))


def test_who_would_get_rights_on_the_ledger_is_named(app: App, roles: tuple[str, str]) -> None:
    _, anon = roles
    here = f'ALTER DEFAULT PRIVILEGES IN SCHEMA public GRANT ALL ON TABLES TO "{anon}"'
    app.run(here, "ALTER DEFAULT PRIVILEGES GRANT SELECT ON TABLES TO PUBLIC")
    everyone, ends = (finding.text for finding in plan(app).findings if "By default" in finding.text)
    assert re.match(
        rf"By default {anon} gets DELETE, INSERT, .* on tables that postgres makes, so on the ledger. ", ends
    )
    assert everyone.startswith("By default PUBLIC gets SELECT on tables that postgres makes, so on the ledger and what")
    assert "apply takes that back. If it is your app's role, run afterwards what tallystick migrate sql" in ends

    migrate.apply(app.url, app.config)
    with app.engine.connect() as conn:
        assert migrate.status(conn, app.config).drift == ()
    given = app.value("""
        SELECT count(*) FROM pg_class c CROSS JOIN LATERAL aclexplode(c.relacl) a
        WHERE a.grantee <> c.relowner
          AND (c.relname = 'credit_transactions' OR c.relnamespace = 'tallystick'::regnamespace)
    """)
    assert given == 0
    app.run(f'GRANT SELECT ON credit_transactions TO "{anon}"', "GRANT USAGE ON SCHEMA tallystick TO PUBLIC")


def test_what_an_index_will_wait_for_is_told(app: App) -> None:
    other = app.engine.connect()
    other.exec_driver_sql("SELECT 1")
    try:
        time.sleep(0.1)
        assert plan(app).long_transactions == ()  # not old enough to matter
    finally:
        other.close()


def test_triggers_that_could_change_a_balance_are_named(app: App) -> None:
    app.psql("""
        CREATE FUNCTION stamp() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NEW; END';
        CREATE TRIGGER stamp BEFORE INSERT OR UPDATE ON users FOR EACH ROW EXECUTE FUNCTION stamp();
        CREATE TRIGGER stamped AFTER UPDATE ON users FOR EACH ROW EXECUTE FUNCTION stamp();
        CREATE TRIGGER made BEFORE INSERT ON users FOR EACH ROW EXECUTE FUNCTION stamp();
    """)
    [found] = [finding for finding in plan(app).findings if "before each UPDATE" in finding.text]
    assert found.text.startswith("The trigger stamp on public.users runs public.stamp before each UPDATE")
    assert found.severity == "note"


def test_columns_that_mean_the_same_in_camel_case_are_named(app: App) -> None:
    app.run('ALTER TABLE users ADD "updatedAt" timestamp(3), ADD "emailVerified" timestamp(3)')
    app.run('ALTER TABLE workshops ADD "deletedAt" timestamp(3)')
    found = [finding for finding in plan(app).findings if "beside it" in finding.text]
    assert [finding.text.partition(",")[0] for finding in found] == [
        'public.users has "updatedAt"',
        'public.workshops has "deletedAt"',
    ]
    assert {finding.severity for finding in found} == {"warning"}
    migrate.apply(app.url, app.config)
    assert not [finding for finding in plan(app).findings if "beside it" in finding.text]


@pytest.mark.parametrize("does", ["DO ALSO", "DO INSTEAD"])
def test_rules_that_rewrite_what_the_ledger_writes_are_named(app: App, does: str) -> None:
    app.run(f"CREATE RULE keep AS ON UPDATE TO users {does} SELECT 1")
    [found] = [finding for finding in plan(app).findings if finding.text.startswith("The rule")]
    assert found.severity == "warning"
    assert f"The rule keep on public.users rewrites each UPDATE ({does})" in found.text
    assert "DROP RULE keep ON public.users" in found.text


def test_a_key_whose_collation_makes_two_keys_one_is_named(
    needs_icu: Callable[[], None], make_app: Callable[..., App]
) -> None:
    needs_icu()
    app = make_app(
        """
        CREATE COLLATION folded (provider = icu, locale = 'und-u-ks-level2', deterministic = false);
        CREATE TABLE users (id text COLLATE folded PRIMARY KEY, email text COLLATE folded UNIQUE);
        """,
        HostMapping(users=UsersTable(key_type="text", key_collation=("public", "folded")), workshops=None),
    )
    [found] = [finding.text for finding in plan(app).findings if "deterministic" in finding.text]
    assert found.startswith("public.users.id has the collation public.folded, which is not deterministic")


def test_a_database_that_is_read_only_by_default_is_called_that(app: App) -> None:
    app.run(f'ALTER DATABASE "{app.engine.url.database}" SET default_transaction_read_only = on')
    with pytest.raises(MigrationError, match="Where default_transaction_read_only is on") as caught:
        migrate.apply(app.url, app.config)
    assert "fail-over" not in str(caught.value)


def test_status_needs_a_transaction(migrated: App) -> None:
    before = migrated.dump()
    with (
        migrated.engine.execution_options(isolation_level="AUTOCOMMIT").connect() as conn,
        pytest.raises(MigrationError, match="a connection that is not in autocommit"),
    ):
        migrate.status(conn, migrated.config)
    assert migrated.dump() == before


def test_a_database_in_sql_ascii(app: App, server: Server) -> None:
    name = f"ascii_{app.engine.url.database}"
    app.run(
        f"CREATE DATABASE {name} ENCODING 'SQL_ASCII' LOCALE_PROVIDER libc LC_COLLATE 'C' LC_CTYPE 'C' "
        "TEMPLATE template0"
    )
    try:
        url = app.engine.url.set(database=name).render_as_string(hide_password=False)
        there = App(url, Config(database_url=url, host=app.config.host), server)
        there.psql(HOSTS["uuid"].ddl)
        with connect(url) as conn:
            assert migrate.plan(conn, there.config).revisions
        migrate.apply(url, there.config)
        with connect(url) as conn:
            assert migrate.status(conn, there.config).healthy
            assert audit(conn, there.config).clean
        migrate.undo(url, there.config)
    finally:
        app.run(f"DROP DATABASE {name}")


def test_what_an_apps_tests_do_to_empty_its_tables(migrated: App) -> None:
    """As docs/seed.md says."""
    with pytest.raises(sa.exc.DBAPIError, match="append-only: truncate is refused"):
        migrated.run("TRUNCATE users CASCADE")
    migrated.run("ALTER TABLE credit_transactions DISABLE TRIGGER tallystick_no_truncate", "TRUNCATE users CASCADE")
    assert migrated.value("SELECT count(*) FROM users") == 0
    with migrated.engine.connect() as conn:
        [drift] = migrate.status(conn, migrated.config).drift
    migrated.run(drift.remedy)
