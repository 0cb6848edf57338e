"""The commands around a migration, as typed: snippet, backup, restore, rehearse, and plan's findings."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
import sqlalchemy as sa
from hosts import HOSTS, App
from rich.live import Live

from servers import EMBEDDED
from tallystick import Config, HostMapping, UsersTable, WorkshopsTable, migrate
from tallystick.cli import main
from tallystick.cli.app import err
from tallystick.config import to_toml
from tallystick.dev.postgres import find_binaries
from tallystick.schema import HEAD


@pytest.fixture
def tally(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], app: App
) -> Callable[..., tuple[int, str, str]]:
    """``tally("migrate", "plan") -> (code, out, err)`` in a folder whose tallystick.toml knows the app."""
    monkeypatch.chdir(tmp_path)
    for name in ("DATABASE_URL_UNPOOLED", "TALLYSTICK_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("DATABASE_URL", app.url)
    monkeypatch.setenv("COLUMNS", "200")
    (tmp_path / "tallystick.toml").write_text(to_toml(app.config.host))

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["tallystick", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capfd.readouterr()
        assert "Traceback" not in out + err
        return int(ended.value.code or 0), out, err

    return run


Tally = Callable[..., tuple[int, str, str]]

printed = pytest.mark.one_server  # it is about what is printed, and when a command ends


def as_json(result: tuple[int, str, str]) -> Any:
    return json.loads(result[1])


@printed
def test_snippet(tally: Tally) -> None:
    assert "credit_balance: Mapped[int]" in tally("migrate", "snippet", "sqlalchemy")[1]
    code, _, err = tally("migrate", "snippet", "hibernate")
    assert (code, "sqlalchemy, drizzle" in err) == (1, True)


def test_backup_apply_and_restore(
    tally: Tally, app: App, make_app: Callable[..., App], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TALLYSTICK_PG_BIN", str(app.server.bin))  # dumps and restores need the server's own version
    code, _, err = tally("migrate", "apply", "--backup", "before.backup")
    assert code == 0
    assert "verified" in err
    assert tally("backup", "before.backup", "--check")[0] == 0
    assert tally("backup", "before.backup")[0] == 1  # never overwritten
    code, out, _ = tally("backup", "after.backup")
    assert (code, "rows in" in out) == (0, True)

    other = make_app("SELECT 1")
    code, out, _ = tally("--database-url", other.url, "restore", "before.backup")
    assert (code, out) == (0, "Restored 1,000 rows in 2 tables.\n")
    assert tally("--database-url", other.url, "restore", "after.backup")[0] == 1  # not empty any more


def test_programs_are_found_for_the_server(
    tally: Tally, app: App, make_app: Callable[..., App], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On an older server those that the machine has for it; the embedded ones cannot restore there."""
    major = app.server.version.partition(".")[0]
    code, _, err = tally("backup", "app.backup")
    assert (code, f"Using PostgreSQL {major}'s programs in" in err) == (0, True)
    other = make_app("SELECT 1")
    code, _, err = tally("--database-url", other.url, "restore", "app.backup")
    assert (code, f"Using PostgreSQL {major}'s programs in" in err) == (0, True)

    if major != EMBEDDED:
        monkeypatch.setenv("TALLYSTICK_PG_BIN", str(find_binaries()))
        code, out, err = tally("--database-url", make_app("SELECT 1").url, "restore", "app.backup")
        assert (code, out, "TALLYSTICK_PG_BIN=" in err) == (1, "", True)


def test_a_folder_with_the_two_programs_is_enough(
    tally: Tally, app: App, make_app: Callable[..., App], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A client package has no server."""
    (tmp_path / "client").mkdir()
    for name in ("pg_dump", "pg_restore"):
        (tmp_path / "client" / name).symlink_to(app.server.bin / name)
    monkeypatch.setenv("TALLYSTICK_PG_BIN", "client")
    assert tally("backup", "app.backup")[0] == 0
    assert tally("backup", "app.backup", "--check")[0] == 0
    assert tally("--database-url", make_app("SELECT 1").url, "restore", "app.backup")[0] == 0
    monkeypatch.setenv("TALLYSTICK_PG_BIN", "nowhere")
    code, _, err = tally("backup", "app.backup", "--check")
    assert (code, "nowhere/pg_restore cannot be run" in err, "Set TALLYSTICK_PG_BIN" in err) == (1, True, True)


def test_a_backup_is_checked_with_the_programs_of_the_machine(
    tally: Tally, app: App, monkeypatch: pytest.MonkeyPatch
) -> None:
    tally("backup", "app.backup")
    monkeypatch.setattr("tallystick.dev.postgres._WHEEL", "not_installed")
    monkeypatch.setenv("PATH", f"{app.server.bin}:{os.environ['PATH']}")
    assert tally("backup", "app.backup", "--check")[0] == 0


@printed
def test_one_display_at_a_time(tally: Tally, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rich before version 14.1 refuses a second one."""
    shown = 0
    start, stop = Live.start, Live.stop

    def starts(live: Live, *arguments: Any, **options: Any) -> None:
        nonlocal shown
        shown += 1
        assert shown == 1
        start(live, *arguments, **options)

    def stops(live: Live) -> None:
        nonlocal shown
        shown -= live.is_started
        stop(live)

    monkeypatch.setattr(Live, "start", starts)
    monkeypatch.setattr(Live, "stop", stops)
    monkeypatch.setattr(err, "_force_terminal", True)
    for command in (["rehearse"], ["apply", "--backup", "x.backup"], ["undo"]):
        assert tally("migrate", *command)[0] == 0


@printed
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.usefixtures("tally")
def test_an_interrupted_run_says_what_is_done_and_what_to_do(app: App, number: signal.Signals) -> None:
    command = [sys.executable, "-c", "from tallystick.cli import main; main()", "migrate", "apply"]
    with app.engine.execution_options(isolation_level="REPEATABLE READ").connect() as reader:
        reader.exec_driver_sql("SELECT 1")  # the index waits for everyone who could need what it does not hold
        with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as running:
            assert running.stderr is not None
            output = iter(running.stderr)
            assert any("waits for pid" in line for line in output)  # a cancel that comes before the statement is lost
            running.send_signal(number)
            rest = "".join(output)
            code = running.wait(60)
    assert code == 128 + number, rest
    assert f"Interrupted. Committed: {HEAD}. Not finished: " in rest
    assert "run the same command again" in rest
    done = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert "beside the traffic" in done


@pytest.fixture
def scratch() -> Iterator[Path]:
    """A folder that another account gets through to, as it does in /tmp; pytest's are private."""
    with tempfile.TemporaryDirectory(prefix="tallystick-test-") as folder:
        Path(folder).chmod(0o711)
        yield Path(folder)


@printed
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
@pytest.mark.usefixtures("tally")
def test_a_rehearsal_that_a_signal_ends_leaves_no_server(number: signal.Signals, scratch: Path) -> None:
    """Also if the signal comes once more while the copy is removed: Ctrl-C is pressed twice."""
    script = f"""
import os, shutil
from tallystick.cli import main
remove = shutil.rmtree
def interrupted(*arguments, **options):
    os.kill(os.getpid(), {number.value})
    remove(*arguments, **options)
shutil.rmtree = interrupted
main()
"""
    command = [sys.executable, "-c", script, "migrate", "rehearse"]
    with subprocess.Popen(
        command,
        env={**os.environ, "TMPDIR": str(scratch)},
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    ) as running:
        assert running.stderr is not None
        output = iter(running.stderr)
        assert any("restoring the copy" in line for line in output)
        running.send_signal(number)
        rest = list(output)
        code = running.wait(60)
    assert code == 128 + number, rest
    assert not [line for line in rest if "Traceback" in line]
    assert list(scratch.iterdir()) == []


def test_rehearse(tally: Tally, app: App, tmp_path: Path) -> None:
    before = app.dump()
    (tmp_path / "app.sql").write_text("SELECT email FROM users; UPDATE users SET email = email;")
    code, out, err = tally("migrate", "rehearse", "--statements", "app.sql", "--html", "report.html")
    assert code == 0, out
    assert "The ledger was used on the copy: reading the balance" in " ".join(out.split())
    assert err.index("restoring the copy") < err.index("using the ledger") < err.index("going back")
    assert "Passed" in out
    page = (tmp_path / "report.html").read_text()
    assert "SHARE UPDATE EXCLUSIVE on public.users" in page
    assert ("href=" in page, "src=" in page) == (False, False)
    assert app.dump() == before

    tally("backup", "copy.backup")
    (tmp_path / "app.sql").write_text("SELECT u.* FROM users u UNION SELECT gen_random_uuid(), 'two columns'")
    result = tally("migrate", "rehearse", "--from", "copy.backup", "--statements", "app.sql", "--json")
    assert result[0] == 1
    assert "after the migration" in as_json(result)["broken"][0]
    assert [one["fault"] for one in as_json(result)["lived"]] == [None] * 7


@printed
def test_statements_that_are_no_utf8_are_refused(tally: Tally, tmp_path: Path) -> None:
    (tmp_path / "app.sql").write_bytes("SELECT 'Überblick'".encode("latin-1"))
    code, _, err = tally("migrate", "rehearse", "--statements", "app.sql")
    assert (code, err) == (1, "app.sql: not UTF-8. Save it as UTF-8\n")


@printed
def test_nothing_to_rehearse_is_said_before_a_copy_is_made(tally: Tally, app: App) -> None:
    migrate.apply(app.url, app.config)
    code, _, err = tally("migrate", "rehearse")
    assert (code, "there is nothing to rehearse: the database is at revision" in err) == (1, True)
    assert "backup" not in err.lower()
    assert "starting an embedded server" not in err


@printed
def test_apply_ends_with_the_snippet_of_the_apps_tool(tally: Tally, app: App, tmp_path: Path) -> None:
    app.run("CREATE TABLE django_migrations (id serial)", "CREATE TABLE _prisma_migrations (id serial)")
    (tmp_path / "drizzle.config.ts").touch()
    output = tally("migrate", "apply")[1]
    for tool, sign in (
        ("drizzle", "drizzle.config.ts"),
        ("prisma", "its table _prisma_migrations"),
        ("django", "its table django_migrations"),
    ):
        assert f"({sign}), which" in output
        assert f"tallystick migrate snippet {tool}. " in output
    assert "snippet" not in tally("migrate", "apply")[1]


def test_a_rehearsal_on_a_copy_that_was_made(
    tally: Tally, app: App, fresh_database: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = fresh_database(app.engine.url.database)
    before = app.dump()
    code, out, err = tally("migrate", "rehearse", "--on", copy)
    assert (code, "Passed" in out) == (0, True), out + err
    assert str(sa.make_url(copy).database) in err.splitlines()[0]

    # by another name for the same server it is the same database
    monkeypatch.setenv("DATABASE_URL", f"{app.url}{'&' if '?' in app.url else '?'}application_name=other")
    code, _, err = tally("migrate", "rehearse", "--on", app.url)
    assert (code, "the app's own database, not a copy" in err) == (1, True), err
    assert app.dump() == before
    assert tally("migrate", "rehearse", "--on", copy, "--from", "x.backup")[0] == 2


def test_a_copy_needs_no_roles_and_no_tablespaces_of_its_server(tally: Tally, app: App) -> None:
    """As of Supabase and PostgREST, whose policies are for roles."""
    name = f"authenticated {app.engine.url.database}"
    app.psql(f"""
        CREATE ROLE "{name}";
        GRANT SELECT ON users TO "{name}";
        ALTER TABLE users ENABLE ROW LEVEL SECURITY;
        CREATE POLICY own ON users TO "{name}" USING (true);
        SET allow_in_place_tablespaces = on;
        CREATE TABLESPACE "{name}" LOCATION '';
        CREATE TABLE elsewhere (n int) TABLESPACE "{name}";
    """)
    try:
        code, out, err = tally("migrate", "rehearse")
        assert (code, "Passed" in out) == (0, True), out + err
    finally:
        app.psql(f'DROP TABLE elsewhere; DROP TABLESPACE "{name}"; DROP OWNED BY "{name}"; DROP ROLE "{name}";')


def test_an_extension_that_the_copys_server_does_not_have(tally: Tally, app: App) -> None:
    app.psql("""
        CREATE EXTENSION citext;
        SET allow_system_table_mods = on;
        UPDATE pg_extension SET extname = 'postgis' WHERE extname = 'citext';
    """)
    code, _, err = tally("migrate", "rehearse")
    assert code == 1
    assert "needs the extension postgis, which the rehearsal's server does not have" in err
    assert "TALLYSTICK_PG_BIN=" in err
    assert "--on ADDRESS" in err


@printed
def test_plan_and_status_say_more(tally: Tally, app: App) -> None:
    app.run("CREATE TABLE alembic_version (version_num text)", "INSERT INTO alembic_version VALUES ('abc')")
    code, out, _ = tally("migrate", "plan", "--backup", "x.backup")
    assert code == 0
    assert "The tables will be locked for about" in out
    assert tally("migrate", "apply")[0] == 0
    code, out, _ = tally("migrate", "status")
    assert code == 0
    assert "The app's own alembic (public.alembic_version) is at abc." in out
    assert as_json(tally("migrate", "status", "--json"))["trackers"][0]["newest"] == "abc"


@printed
def test_each_change_says_first_which_database_it_is_of(
    tally: Tally, app: App, make_app: Callable[..., App], monkeypatch: pytest.MonkeyPatch
) -> None:
    url = app.engine.url.set(password="s3cret")
    monkeypatch.setenv("DATABASE_URL", url.render_as_string(hide_password=False))
    port = app.value("SHOW port")
    here = f"Database {url.database} on {url.query.get('host') or url.host}:{port} as role postgres"
    mapped = "users by public.users.id (tallystick.toml)."
    assert tally("migrate", "plan")[1].startswith(f"{here}, {mapped}\n")
    assert here not in tally("migrate", "plan", "--json")[1]
    for command in (["rehearse"], ["apply", "--backup", "x.backup"], ["undo"]):
        code, out, err = tally("migrate", *command)
        assert (code, err.startswith(f"{here}, {mapped}\n")) == (0, True), err
        assert "s3cret" not in out + err
    assert tally("migrate", "rehearse", "--from", "x.backup")[2].startswith(f"A copy from x.backup, {mapped}\n")
    Path("tallystick.toml").unlink()
    assert "users by public.users.id (defaults).\n" in tally("migrate", "plan")[1]
    other = make_app("SELECT 1")
    code, _, err = tally("--database-url", other.url, "restore", "x.backup")
    assert (code, err.startswith(f"Database {other.engine.url.database} on ")) == (0, True)


@printed
@pytest.mark.parametrize("named", ["TALLYSTICK_DATABASE_URL", "tallystick.toml"])
def test_an_unpooled_address_from_elsewhere_is_left_alone(
    tally: Tally, app: App, make_app: Callable[..., App], monkeypatch: pytest.MonkeyPatch, named: str
) -> None:
    """Production's, say, in the environment of a person who has named staging."""
    production = make_app()
    monkeypatch.setenv("DATABASE_URL_UNPOOLED", production.url)
    if named == "tallystick.toml":
        file = Path("tallystick.toml")
        file.write_text(f'database_url = "{app.url}"\n{file.read_text()}')
    else:
        monkeypatch.setenv(named, app.url)
    code, _, err = tally("migrate", "apply")
    assert (code, "DATABASE_URL_UNPOOLED is not used" in err) == (0, True)
    assert app.value("SELECT to_regclass('credit_transactions') IS NOT NULL")
    assert not production.value("SELECT to_regclass('credit_transactions') IS NOT NULL")


@printed
def test_a_plan_that_would_be_stopped_has_no_next_step(tally: Tally, app: App, monkeypatch: pytest.MonkeyPatch) -> None:
    name = f"weak_{app.engine.url.database}"
    app.run(f"CREATE ROLE {name} LOGIN")
    try:
        monkeypatch.setenv("DATABASE_URL", app.engine.url.set(username=name).render_as_string(hide_password=False))
        code, out, _ = tally("migrate", "plan")
        assert (code, "\nStop: " in out, "Next:" in out) == (1, True, False)
        assert tally("migrate", "plan", "--json")[0] == 1
    finally:
        app.run(f"DROP ROLE {name}")


@printed
def test_init_says_what_it_means_that_workshops_have_no_date(
    tally: Tally, app: App, make_app: Callable[..., App], tmp_path: Path
) -> None:
    message = "old workshops will need a credit too"
    assert message not in tally("init", "--force")[1]
    dateless = make_app(HOSTS["integer"].ddl)
    code, out, _ = tally("--database-url", dateless.url, "init", "--force")
    assert (code, message in out) == (0, True)
    assert "\ncreated_at = false  # " in (tmp_path / "tallystick.toml").read_text()
    assert Config.load(tmp_path / "tallystick.toml").host == HOSTS["integer"].mapping
    assert tally("--database-url", dateless.url, "migrate", "apply")[0] == 0


@printed
def test_a_column_that_need_not_be_there_may_be_false(tally: Tally, make_app: Callable[..., App]) -> None:
    dateless = make_app(HOSTS["integer"].ddl)
    mapping = HostMapping(
        users=UsersTable(key_type="integer"), workshops=WorkshopsTable(key_type="integer", title=None)
    )
    Path("tallystick.toml").write_text(to_toml(mapping))
    code, _, err = tally("--database-url", dateless.url, "migrate", "plan")
    assert code == 1
    assert "Set host.workshops.created_at in tallystick.toml, to false if there is none" in err


@printed
def test_two_transactions_and_what_is_between_them(tally: Tally, app: App) -> None:
    def stop(now: migrate.MigrationProgress) -> None:
        if now.phase == "prepared":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        migrate.apply(app.url, app.config, two_transactions=True, progress=stop)
    code, out, _ = tally("migrate", "status")
    assert code == 1
    assert f"On the way to revision {HEAD}: its new objects exist, and nothing uses them yet." in out
    assert "Not migrated yet" not in out
    assert as_json(tally("migrate", "status", "--json"))["prepared"] == HEAD
    assert "from a run in two transactions that was interrupted" in tally("migrate", "plan")[1]

    code, out, err = tally("migrate", "apply", "--two-transactions")
    assert code == 0
    assert out.count(", in two transactions.") == 1
    assert f"{HEAD}: applied" in err
    assert as_json(tally("migrate", "status", "--json"))["prepared"] is None


@printed
def test_a_log_gets_a_line_for_what_is_new(tally: Tally, app: App) -> None:
    """Without a terminal a run that waits does not write a line for each look at what is in its way."""
    with app.engine.connect() as conn:
        conn.exec_driver_sql("SELECT FROM users")
        code, _, output = tally("migrate", "apply", "--give-up-after", "3")
    assert code == 1
    assert output.count(f"{HEAD}: waiting") == 1


def test_who_keeps_a_table_locked_is_named(tally: Tally, app: App) -> None:
    """A definition cannot be read beside a VACUUM FULL; apply waits for its end, the others say whose it is."""
    with psycopg.connect(app.url.replace("+psycopg", "", 1), application_name="vacuum full") as holder:
        holder.execute("LOCK TABLE users IN ACCESS EXCLUSIVE MODE")
        who = f"In the way: pid {holder.info.backend_pid} (vacuum full), idle in transaction, holds public.users for"
        code, _, message = tally("migrate", "plan")
        assert (code, who in message, "run it again when that has ended" in message) == (1, True, True)
        code, _, message = tally("migrate", "apply", "--give-up-after", "1")
        assert (code, who in message, "Nothing was changed" in message) == (1, True, True)
    assert tally("migrate", "apply")[0] == 0
