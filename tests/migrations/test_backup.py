"""A backup: whole or not there, verified, private, and a restore that gives the same database."""

from __future__ import annotations

import errno
import os
import re
import resource
import signal
import stat
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path

import pytest
import sqlalchemy as sa
import zstandard
from hosts import HOSTS, App

from servers import EMBEDDED
from tallystick import Progress, migrate
from tallystick.backup import (
    Backup,
    backup,
    installed,
    programs_for,
    read_manifest,
    restore,
    verify_backup,
)
from tallystick.dev.postgres import find_binaries
from tallystick.errors import BackupError, DatabaseUnavailable, PermissionDenied

STRANGE = '''
CREATE SCHEMA "a:b";
CREATE TABLE "a:b"."Strange ""name""" (n int, t text);
INSERT INTO "a:b"."Strange ""name""" SELECT i, E'line\\nline\\\\.\\n\\\\.' FROM generate_series(1, 7) i;
CREATE TABLE nothing ();
CREATE TABLE parts (n int) PARTITION BY RANGE (n);
CREATE TABLE part_1 PARTITION OF parts FOR VALUES FROM (0) TO (9);
INSERT INTO parts VALUES (1), (2);
CREATE TABLE "Sales (2024)" ("a (b)" int, "c
 FROM stdin;" int);
INSERT INTO "Sales (2024)" SELECT i FROM generate_series(1, 3) i;
CREATE TABLE heir (k int) INHERITS ("Sales (2024)", nothing);
INSERT INTO heir VALUES (1, 2, 3), (4, 5, 6);
CREATE TABLE "a
b"();
'''


@pytest.fixture
def app(make_migrated: Callable[..., App]) -> App:
    return make_migrated(HOSTS["uuid"].ddl + STRANGE)


def take_backup(app: App, target: Path, **options: object) -> Backup:
    return backup(app.url, target, bin_dir=app.server.bin, **options)


def is_empty(folder: Path) -> bool:
    return not list(folder.iterdir())


def test_there_and_back(app: App, make_app: Callable[..., App], tmp_path: Path) -> None:
    reported: list[Progress] = []
    made = take_backup(app, tmp_path / "app.backup", progress=reported.append)

    others = (".stripe_", ".event", ".low_balances")
    rows = {table: count for table, count in made.manifest.rows.items() if not any(each in table for each in others)}
    assert rows == {
        '"a:b"."Strange ""name"""': 7,
        'public."Sales (2024)"': 3,
        'public."a\nb"': 0,
        "public.credit_transactions": 0,
        "public.heir": 2,
        "public.nothing": 0,
        "public.part_1": 2,
        "public.users": 500,
        "public.workshops": 500,
        "tallystick.alembic_version": 1,
        "tallystick.migration_log": len(migrate.revisions()),
        "tallystick.mapping": 1,
        "tallystick.lots": 0,
        "tallystick.lot_moves": 0,
        "tallystick.days": 0,
        "tallystick.daily_sums": 0,
    }
    assert stat.S_IMODE(made.path.stat().st_mode) == 0o600
    assert [path.name for path in tmp_path.iterdir()] == ["app.backup"]
    assert {now.step for now in reported} == {"dumping", "counting rows", "verifying"}
    assert all(0 <= now.done <= (now.total or 0) for now in reported)
    assert verify_backup(made.path, bin_dir=app.server.bin) == made.manifest

    other = make_app("SELECT 1")
    assert restore(made.path, other.url, bin_dir=app.server.bin) == made.manifest
    assert other.dump() == app.dump()
    with other.engine.connect() as conn:
        assert migrate.status(conn, app.config).healthy


def test_it_can_be_read_without_us(app: App, tmp_path: Path) -> None:
    made = take_backup(app, tmp_path / "app.backup")
    with made.path.open("rb") as file:
        dump = zstandard.ZstdDecompressor().stream_reader(file).read()
    listed = subprocess.run(app.server.command("pg_restore", "--list"), input=dump, capture_output=True, check=True)
    assert b"TABLE DATA public users" in listed.stdout


def test_tables_of_an_extension_are_its_own(app: App, tmp_path: Path) -> None:
    """As of PostGIS and pg_cron: pg_dump keeps some rows of them, and CREATE EXTENSION makes the others."""
    app.psql("""
        CREATE EXTENSION citext;
        CREATE TABLE settings (n int);
        INSERT INTO settings VALUES (1), (200);
        ALTER EXTENSION citext ADD TABLE settings;
        SET allow_system_table_mods = on;
        UPDATE pg_extension SET extconfig = ARRAY['settings'::regclass::oid], extcondition = ARRAY['WHERE n > 100']
        WHERE extname = 'citext';
    """)
    made = take_backup(app, tmp_path / "app.backup")
    assert "public.settings" not in made.manifest.rows
    assert verify_backup(made.path, bin_dir=app.server.bin) == made.manifest


def test_no_timeout_of_the_database_ends_a_backup(app: App, make_app: Callable[..., App], tmp_path: Path) -> None:
    app.run("CREATE TABLE much AS SELECT i FROM generate_series(1, 500000) i")
    other = make_app("SELECT 1")
    timeouts = {"statement_timeout": "20ms", "idle_in_transaction_session_timeout": "1s"}
    if int(app.server.version.partition(".")[0]) >= 17:
        timeouts["transaction_timeout"] = "1s"
    for each in (app, other):
        database = each.engine.url.database
        each.run(*(f"ALTER DATABASE {database} SET {name} = '{value}'" for name, value in timeouts.items()))
    made = take_backup(
        app, tmp_path / "app.backup", progress=lambda now: time.sleep(1.5 * (now.step == "counting rows"))
    )
    assert restore(made.path, other.url, bin_dir=app.server.bin).rows["public.much"] == 500_000


def test_a_connection_that_dies_is_told(app: App, tmp_path: Path) -> None:
    def die(now: Progress) -> None:
        if now.step == "counting rows":
            app.run(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                " WHERE datname = current_database() AND pid <> pg_backend_pid()"
            )

    with pytest.raises(BackupError, match=r"the database stopped answering: .*Run the same command again"):
        take_backup(app, tmp_path / "app.backup", progress=die)
    assert is_empty(tmp_path)


@pytest.mark.parametrize("encoding", ["LATIN1", "WIN1252"])
def test_a_database_in_another_encoding(app: App, tmp_path: Path, encoding: str) -> None:
    name = f"{app.engine.url.database}_other"
    app.run(f"CREATE DATABASE {name} TEMPLATE template0 ENCODING '{encoding}' LOCALE 'C'")
    other = App(app.engine.url.set(database=name).render_as_string(hide_password=False), app.config, app.server)
    try:
        other.run('CREATE TABLE "größe" ("ü" text)', "INSERT INTO \"größe\" VALUES ('é')")
        assert take_backup(other, tmp_path / "app.backup").manifest.rows == {'public."größe"': 1}
    finally:
        app.server.drop_database(name)


def test_an_address_with_several_hosts(app: App, tmp_path: Path) -> None:
    here = app.engine.url.query.get("host") or app.engine.url.host
    several = app.engine.url.set(host=None, port=None, query={"host": ("/nowhere", str(here))})
    made = backup(several.render_as_string(hide_password=False), tmp_path / "app.backup", bin_dir=app.server.bin)
    assert made.manifest.rows["public.users"] == 500


def test_without_hard_links_nothing_is_dumped(app: App, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on exFAT and SMB."""

    def refuse(*_: object) -> None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "link", refuse)
    reported: list[str] = []
    with pytest.raises(BackupError, match=r"without hard links .*Name a folder on another"):
        take_backup(app, tmp_path / "app.backup", progress=lambda now: reported.append(now.step))
    assert reported == []
    assert is_empty(tmp_path)


def test_nothing_is_overwritten(app: App, tmp_path: Path) -> None:
    target = tmp_path / "precious"
    target.write_text("mine")
    with pytest.raises(BackupError, match="never overwritten"):
        take_backup(app, target)
    assert target.read_text() == "mine"
    assert len(list(tmp_path.iterdir())) == 1


def test_a_file_that_comes_meanwhile_is_kept(app: App, tmp_path: Path) -> None:
    target = tmp_path / "app.backup"

    def come(now: Progress) -> None:
        if now.step == "verifying":
            target.write_text("mine")

    with pytest.raises(BackupError, match="come meanwhile"):
        take_backup(app, target, progress=come)
    assert target.read_text() == "mine"
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("moment", ["dumping", "counting rows", "verifying"])
def test_ctrl_c_leaves_nothing(app: App, tmp_path: Path, moment: str) -> None:
    def interrupt(now: Progress) -> None:
        if now.step == moment:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        take_backup(app, tmp_path / "app.backup", progress=interrupt)
    assert is_empty(tmp_path)


def test_a_full_disk_leaves_nothing(app: App, tmp_path: Path) -> None:
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limit[1]))
    try:
        with pytest.raises(BackupError, match="Nothing was left there"):
            take_backup(app, tmp_path / "app.backup")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert is_empty(tmp_path)


def test_a_table_that_cannot_be_dumped_is_told(app: App, tmp_path: Path) -> None:
    """With the role, the table, and what to grant, until a backup can be taken."""
    role = f"reader {uuid.uuid4().hex[:8]}"
    app.run(f'CREATE ROLE "{role}" LOGIN')
    url = sa.make_url(app.url).set(username=role).render_as_string(hide_password=False)
    reader = App(url, app.config, app.server)
    try:
        with pytest.raises(
            BackupError, match=r"and \d+ more\. Let an administrator run: GRANT pg_read_all_data TO"
        ) as told:
            take_backup(reader, tmp_path / "app.backup")
        assert f'"{role}" may not read "a:b", ' in str(told.value)
        app.run(
            f'GRANT USAGE ON SCHEMA tallystick TO "{role}"',
            f'GRANT SELECT ON ALL TABLES IN SCHEMA public, tallystick TO "{role}"',
            f'GRANT SELECT ON ALL SEQUENCES IN SCHEMA public, tallystick TO "{role}"',
            f'REVOKE SELECT ON users FROM "{role}"',
        )
        with pytest.raises(BackupError, match=r'may not read "a:b", "a:b"\."Strange.*, public\.users') as told:
            take_backup(reader, tmp_path / "app.backup")
        app.run(*str(told.value).partition("Let the owner run: ")[2].partition(". Or let")[0].split("; "))
        app.run("ALTER TABLE users ENABLE ROW LEVEL SECURITY")
        with pytest.raises(PermissionDenied, match=r"row level security hides rows of public\.users"):
            take_backup(reader, tmp_path / "app.backup")
        assert is_empty(tmp_path)
        app.run("ALTER TABLE users DISABLE ROW LEVEL SECURITY")
        take_backup(reader, tmp_path / "app.backup")
    finally:
        app.run(f'DROP OWNED BY "{role}"', f'DROP ROLE "{role}"')


@pytest.mark.parametrize("since", ["before", "under way"])
def test_who_is_waited_for_is_told(app: App, tmp_path: Path, since: str) -> None:
    """Once for each holder, whether the table was locked before the backup or under it."""
    told: list[str] = []
    with app.engine.connect() as holder:
        pid = holder.exec_driver_sql("SELECT pg_backend_pid()").scalar_one()

        def lock() -> None:
            holder.exec_driver_sql("LOCK TABLE users IN ACCESS EXCLUSIVE MODE")

        def waiting(who: str) -> None:
            told.append(who)
            time.sleep(1.5)  # it is looked at again meanwhile
            holder.rollback()

        def progress(now: Progress) -> None:
            if since != "before" and now.step == "counting rows":
                lock()

        if since == "before":
            lock()
        take_backup(app, tmp_path / "app.backup", waiting=waiting, progress=progress)
    (who,) = told
    assert re.fullmatch(rf"pid {pid}.*, idle in transaction, holds (public\.)?users for .* s", who)


def test_no_database_and_no_folder_and_no_program(app: App, tmp_path: Path) -> None:
    nowhere = sa.make_url(app.url).set(database="nowhere").render_as_string(hide_password=False)
    with pytest.raises(DatabaseUnavailable):
        backup(nowhere, tmp_path / "b", bin_dir=app.server.bin)
    with pytest.raises(BackupError, match="Name a folder"):
        take_backup(app, tmp_path / "missing" / "b")
    with pytest.raises(BackupError, match="pg_dump cannot be run"):
        backup(app.url, tmp_path / "b", bin_dir=tmp_path)
    assert is_empty(tmp_path)


def test_damage_is_found_wherever_it_is(app: App, make_app: Callable[..., App], tmp_path: Path) -> None:
    whole = take_backup(app, tmp_path / "app.backup").path.read_bytes()
    other = make_app("SELECT 1")
    damaged = tmp_path / "damaged"
    for at in (4, 100, len(whole) // 2, len(whole) - 200, len(whole) - 6):
        damaged.write_bytes(whole[:at] + bytes([whole[at] ^ 0xFF]) + whole[at + 1 :])
        with pytest.raises(BackupError):
            restore(damaged, other.url, bin_dir=app.server.bin)
    for size in (0, 5, 100, len(whole) // 2, len(whole) - 1):
        damaged.write_bytes(whole[:size])
        with pytest.raises(BackupError):
            restore(damaged, other.url, bin_dir=app.server.bin)
    assert other.rows("SELECT count(*) FROM pg_class WHERE relnamespace = 'public'::regnamespace") == [(0,)]


def test_only_an_empty_database_is_restored_into(app: App, tmp_path: Path) -> None:
    made = take_backup(app, tmp_path / "app.backup")
    before = app.dump()
    with pytest.raises(BackupError, match="not empty"):
        restore(made.path, app.url, bin_dir=app.server.bin)
    assert app.dump() == before


def test_a_file_that_is_no_backup(app: App, tmp_path: Path) -> None:
    (tmp_path / "x").write_text("hello, this is no backup at all")
    with pytest.raises(BackupError, match="not a backup"):
        read_manifest(tmp_path / "x")
    with pytest.raises(BackupError, match=r"there is no file .*y\. Name an existing backup"):
        read_manifest(tmp_path / "y")


def test_counts_and_dump_are_of_one_moment(app: App, tmp_path: Path) -> None:
    """Rows that come while pg_dump runs are in neither."""

    def write(now: Progress) -> None:
        if now.step == "dumping":
            app.run("INSERT INTO users (email) SELECT 'new ' || gen_random_uuid()")

    made = take_backup(app, tmp_path / "app.backup", progress=write)
    assert made.manifest.rows["public.users"] == 500
    assert app.value("SELECT count(*) FROM users") > 500


def test_the_password_is_on_no_command_line(app: App, tmp_path: Path) -> None:
    seen: list[str] = []

    def look(_: Progress) -> None:
        for process in Path("/proc").glob("[0-9]*"):
            try:
                line = (process / "cmdline").read_text()
                if "pg_dump" in line or "pg_restore" in line:
                    seen.append(line)
            except OSError:
                continue

    if not Path("/proc/self/cmdline").exists():
        pytest.skip("other processes' command lines are read from /proc, which only Linux has")
    url = sa.make_url(app.url).set(password="s3cret").render_as_string(hide_password=False)
    made = backup(url, tmp_path / "app.backup", bin_dir=app.server.bin, progress=look)
    assert seen
    assert not [line for line in seen if "s3cret" in line]
    assert b"s3cret" not in made.path.read_bytes()


ALONE = """
import os, signal, sys
from pathlib import Path
from tallystick.backup import backup, restore

url, file, programs, moment, number = sys.argv[1:]

def hit(now):
    if now.step == moment:
        os.kill(os.getpid(), int(number))

if moment == "restoring":
    restore(Path(file), url, bin_dir=Path(programs), progress=hit)
else:
    backup(url, Path(file), bin_dir=Path(programs), progress=hit)
"""


def run_and_signal(app: App, file: Path, moment: str, number: signal.Signals) -> int:
    """A backup, or a restore, in a process of its own, which gets a signal at a moment; its exit code."""
    arguments = [sys.executable, "-c", ALONE, app.url, file, app.server.bin, moment, str(int(number))]
    return subprocess.run(arguments, timeout=120, capture_output=True, check=False).returncode


@pytest.mark.parametrize("moment", ["dumping", "counting rows", "verifying"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_leaves_nothing(app: App, tmp_path: Path, number: signal.Signals, moment: str) -> None:
    # more than the pipes hold, so that whoever is not read from waits
    app.run("CREATE TABLE much AS SELECT i, repeat(md5(i::text), 30) FROM generate_series(1, 3000) i")
    code = run_and_signal(app, tmp_path / "app.backup", moment, number)
    assert code == (-number if number is signal.SIGINT else 128 + number)
    assert is_empty(tmp_path)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGKILL])
def test_a_restore_that_a_signal_ends_leaves_the_database_empty(
    app: App, make_app: Callable[..., App], tmp_path: Path, number: signal.Signals
) -> None:
    app.run("CREATE TABLE much AS SELECT i, repeat(md5(i::text), 30) FROM generate_series(1, 3000) i")
    made, empty_one = take_backup(app, tmp_path / "app.backup"), make_app("")
    code = run_and_signal(empty_one, made.path, "restoring", number)
    assert code == (128 + number if number in {signal.SIGTERM, signal.SIGHUP} else -number)
    # a killed program's session ends when the server notices
    others = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
    for _ in range(200):
        if empty_one.value(others) == 0:
            break
        time.sleep(0.05)
    again = restore(made.path, empty_one.url, bin_dir=app.server.bin)
    assert again.rows == made.manifest.rows


def test_what_a_killed_run_left_goes_with_the_next(app: App, tmp_path: Path) -> None:
    assert run_and_signal(app, tmp_path / "first.backup", "dumping", signal.SIGKILL) == -signal.SIGKILL
    [left] = tmp_path.iterdir()
    assert left.name.startswith(".first.backup.")
    (tmp_path / ".other.partial").write_text("not ours")
    take_backup(app, tmp_path / "second.backup")
    assert {path.name for path in tmp_path.iterdir()} == {"second.backup", ".other.partial"}


def test_two_at_once_leave_each_other_alone(app: App, tmp_path: Path) -> None:
    def another(now: Progress) -> None:
        if now.step == "counting rows":
            take_backup(app, tmp_path / "b.backup")

    made = take_backup(app, tmp_path / "a.backup", progress=another)
    assert {path.name for path in tmp_path.iterdir()} == {"a.backup", "b.backup"}
    assert verify_backup(made.path, bin_dir=app.server.bin) == made.manifest


OLD = Path("/usr/lib/postgresql/15/bin")


@pytest.mark.skipif(
    not OLD.exists(),
    reason=f"needs an older PostgreSQL beside the embedded one, in {OLD} (apt-get install postgresql-15)",
)
def test_the_programs_that_fit_the_server_are_chosen(app: App) -> None:
    folders = [find_binaries(), OLD]
    server = int(app.server.version.partition(".")[0])
    assert OLD in installed()
    for restoring in (False, True):
        assert programs_for(app.url, folders, restoring=restoring).major == server
    assert programs_for(app.url, [find_binaries()]).major == int(EMBEDDED)
    if server < int(EMBEDDED):
        with pytest.raises(BackupError, match="TALLYSTICK_PG_BIN=/usr/lib/postgresql/15/bin"):
            programs_for(app.url, [find_binaries()], restoring=True)
    else:
        with pytest.raises(BackupError, match="found: PostgreSQL 15's programs"):
            programs_for(app.url, [OLD])
