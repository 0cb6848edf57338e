"""The host's own migration tool: what its table says."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from uuid import uuid4

import pytest
import sqlalchemy as sa
from hosts import HOSTS, App
from node_tools import DRIZZLE, Project, project, write_drizzle

from tallystick import Config, migrate
from tallystick.dev.postgres import Server
from tallystick.errors import ConfigError
from tallystick.migrate.host_tools.trackers import Entry, Tracker, concerns, trackers

pytestmark = pytest.mark.one_server  # it is about the files and tables of other tools

DRIZZLE_0 = "CREATE SCHEMA drizzle; CREATE TABLE drizzle.__drizzle_migrations (id serial, hash text, created_at bigint)"
DRIZZLE_1 = (
    "CREATE SCHEMA drizzle; CREATE TABLE drizzle.__drizzle_migrations"
    " (id serial, hash text, created_at bigint, name text, applied_at timestamptz DEFAULT now())"
)


def sha256(text: bytes) -> str:
    return hashlib.sha256(text).hexdigest()


def trackers_of(app: App, **options: object) -> tuple[Tracker, ...]:
    with app.engine.connect() as conn:
        return trackers(conn, **options)


def test_our_own_is_none_of_the_hosts(migrated: App) -> None:
    assert trackers_of(migrated) == ()


def test_alembic(app: App) -> None:
    app.run(
        "CREATE TABLE alembic_version (version_num varchar(32))", "INSERT INTO alembic_version VALUES ('abc'), ('b')"
    )
    assert trackers_of(app) == (Tracker("alembic", "public.alembic_version", "abc, b"),)


def test_drizzle_before_1(app: App, tmp_path: Path) -> None:
    """Each state in turn; the files' times are 1 to 7, and 6 is the newest that was applied."""
    files = {
        "0_same": b"a\n",
        "1_crlf": b"a\nb\n",
        "2_lf": b"c\r\n",
        "3_other": b"d\n",
        "4_masked": b"e\n",
        "6_new": b"f\n",
    }
    (tmp_path / "meta").mkdir()
    for tag, text in files.items():
        (tmp_path / f"{tag}.sql").write_bytes(text)
    times = dict(zip(files, (1, 2, 3, 4, 5, 7), strict=True))
    journal = {"entries": [{"tag": tag, "when": when} for tag, when in times.items()]}
    (tmp_path / "meta" / "_journal.json").write_text(json.dumps(journal))
    app.run(
        *DRIZZLE_0.split(";"),
        "INSERT INTO drizzle.__drizzle_migrations (hash, created_at) VALUES "
        f"('{sha256(b'a' + bytes([10]))}', 1), ('{sha256(b'a' + bytes([13, 10]) + b'b' + bytes([13, 10]))}', 2),"
        f" ('{sha256(b'c' + bytes([10]))}', 3), ('{sha256(b'before')}', 4), ('{sha256(b'gone')}', 6)",
    )

    [found] = trackers_of(app, drizzle=tmp_path)

    assert (found.tool, found.table, found.newest) == ("drizzle 0.x", "drizzle.__drizzle_migrations", "6")
    assert found.entries == (
        Entry("1_crlf", "line endings"),
        Entry("2_lf", "line endings"),
        Entry("3_other", "changed"),
        Entry("4_masked", "masked"),
        Entry("6_new", "pending"),
        Entry("6", "unknown"),
    )
    assert any("4_masked is not applied and never will be" in line for line in concerns([found]))
    assert trackers_of(app)[0].entries == ()


def test_drizzle_1(app: App, tmp_path: Path) -> None:
    for name, text in (("20260101_a", b"a"), ("20260102_b", b"b"), ("20260103_c", b"c")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "migration.sql").write_bytes(text)
    app.run(
        *DRIZZLE_1.split(";"),
        "INSERT INTO drizzle.__drizzle_migrations (hash, name) VALUES "
        f"('{sha256(b'a')}', '20260101_a'), ('{sha256(b'other')}', '20260103_c'), ('{sha256(b'x')}', '20260104_gone')",
    )
    [found] = trackers_of(app, drizzle=tmp_path)
    assert (found.tool, found.newest) == ("drizzle 1.0", "20260104_gone")
    assert found.entries == (
        Entry("20260102_b", "pending"),
        Entry("20260103_c", "changed"),
        Entry("20260104_gone", "unknown"),
    )


def test_a_folder_of_which_nothing_was_applied(app: App, tmp_path: Path) -> None:
    (tmp_path / "20260101_a").mkdir()
    (tmp_path / "20260101_a" / "migration.sql").touch()
    [found] = trackers_of(app, drizzle=tmp_path)
    assert (found.tool, found.entries) == ("drizzle 1.0", (Entry("20260101_a", "pending"),))
    assert "__drizzle_migrations" in found.table
    app.run("CREATE TABLE alembic_version (version_num varchar(32))")
    (tmp_path / "meta").mkdir()
    (tmp_path / "meta" / "_journal.json").write_text('{"entries": [{"tag": "0_a", "when": 1}]}')
    _, found = trackers_of(app, drizzle=tmp_path)
    assert (found.tool, found.entries) == ("drizzle 0.x", (Entry("0_a", "pending"),))


def test_a_row_without_a_time(app: App) -> None:
    app.run(
        *DRIZZLE_0.split(";"),
        "INSERT INTO drizzle.__drizzle_migrations (hash, created_at) VALUES ('x', NULL), ('y', 1), ('z', 1)",
    )
    [found] = trackers_of(app)
    assert (found.newest, found.entries) == ("1", (Entry("the row x", "undated"),))
    assert "every migration again" in concerns([found])[0]


@pytest.mark.parametrize("ddl", [DRIZZLE_0, DRIZZLE_1])
def test_a_table_that_this_role_may_not_read(app: App, ddl: str) -> None:
    role = f"reader {uuid4().hex}"
    app.run(*ddl.split(";"), "CREATE TABLE alembic_version (version_num varchar(32))", f'CREATE ROLE "{role}"')
    with app.engine.connect() as conn:
        conn.exec_driver_sql(f'SET ROLE "{role}"')
        found = trackers(conn)
        assert [tracker.newest for tracker in found] == [None, None]
        grants = [concern.partition(" Let its owner run: ")[2] for concern in concerns(found)]
        app.run(*(statement for grant in grants for statement in grant.split("; ")))
        assert [tracker.grant for tracker in trackers(conn)] == [None, None]
    app.run(f'DROP OWNED BY "{role}"', f'DROP ROLE "{role}"')


@pytest.mark.parametrize("ddl", [DRIZZLE_0, DRIZZLE_1])
def test_a_folder_that_is_none_of_drizzles(app: App, tmp_path: Path, ddl: str) -> None:
    app.run(*ddl.split(";"))
    with pytest.raises(ConfigError, match="drizzle-kit"):
        trackers_of(app, drizzle=tmp_path)


@pytest.fixture(scope="module", params=DRIZZLE)
def history(
    request: pytest.FixtureRequest, server: Server, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path, str]:
    """A history that drizzle-kit wrote and applied, once for all tests: its packages, its folder, its database."""
    folder, database = tmp_path_factory.mktemp(request.param), f"history_{request.param}"
    node, url = project(request.param, folder), server.create_database(database)
    write_drizzle(node, sa.make_url(url))
    node.run("drizzle-kit", "generate", "--name", "first")
    node.run("drizzle-kit", "migrate")
    migrate.apply(url, Config(database_url=url, host=HOSTS["uuid"].mapping))
    return request.param, folder, database


@pytest.fixture
def drizzle(
    history: tuple[str, Path, str], fresh_database: Callable[..., str], server: Server, tmp_path: Path
) -> tuple[App, Project, str]:
    """An app whose tables come from such a history."""
    packages, folder, database = history
    shutil.copytree(folder / "drizzle", tmp_path / "drizzle")
    url = fresh_database(database)
    app, node = App(url, Config(database_url=url, host=HOSTS["uuid"].mapping), server), project(packages, tmp_path)
    write_drizzle(node, app.engine.url)
    return app, node, "drizzle 0.x" if packages == "drizzle_0" else "drizzle 1.0"


def tracker_of(app: App, node: Project) -> Tracker:
    [found] = trackers_of(app, drizzle=node.folder / "drizzle")
    return found


def test_what_drizzle_kit_wrote_and_applied(drizzle: tuple[App, Project, str]) -> None:
    app, node, tool = drizzle
    found = tracker_of(app, node)
    assert (found.tool, found.table, found.entries) == (tool, "drizzle.__drizzle_migrations", ())
    assert found.newest

    [file] = (node.folder / "drizzle").rglob("*.sql")
    name = file.stem if tool == "drizzle 0.x" else file.parent.name
    applied = file.read_bytes()
    assert b"\n" in applied
    file.write_bytes(applied.replace(b"\n", b"\r\n"))
    assert tracker_of(app, node).entries == (Entry(name, "line endings"),)
    file.write_bytes(applied + b"-- edited\n")
    assert tracker_of(app, node).entries == (Entry(name, "changed"),)


@pytest.mark.parametrize("ends", ["LF", "CRLF"])
def test_what_drizzle_kit_applied_from_a_windows_checkout(
    ends: str, make_app: Callable[..., App], tmp_path: Path
) -> None:
    """The file is as git gave it there; here it is with the other ends."""
    node = project("drizzle_0", tmp_path)
    app = make_app("SELECT 1")
    write_drizzle(node, app.engine.url)
    node.run("drizzle-kit", "generate", "--name", "first")
    [file] = (tmp_path / "drizzle").rglob("*.sql")
    forms = {"LF": file.read_bytes(), "CRLF": file.read_bytes().replace(b"\n", b"\r\n")}
    file.write_bytes(forms.pop(ends))
    node.run("drizzle-kit", "migrate")
    assert tracker_of(app, node).entries == ()
    file.write_bytes(forms.popitem()[1])
    assert tracker_of(app, node).entries == (Entry(file.stem, "line endings"),)


def test_what_drizzle_kit_will_apply_and_what_it_never_will(drizzle: tuple[App, Project, str]) -> None:
    """A second migration, which another branch wrote before the first was applied."""
    app, node, tool = drizzle
    [first] = (node.folder / "drizzle").rglob("*.sql")
    write_drizzle(node, app.engine.url, users='  nickname: text("nickname"),')
    node.run("drizzle-kit", "generate", "--name", "second")
    [second] = {*(node.folder / "drizzle").rglob("*.sql")} - {first}
    name = second.stem if tool == "drizzle 0.x" else second.parent.name
    assert tracker_of(app, node).entries == (Entry(name, "pending"),)

    there = "SELECT count(*) FROM pg_attribute WHERE attrelid = 'users'::regclass AND attname = 'nickname'"
    if tool == "drizzle 0.x":
        journal = node.folder / "drizzle" / "meta" / "_journal.json"
        known = json.loads(journal.read_text())
        known["entries"][1]["when"] = known["entries"][0]["when"] - 1
        journal.write_text(json.dumps(known))
        assert tracker_of(app, node).entries == (Entry(name, "masked"),)
        assert "migrations applied successfully" in node.run("drizzle-kit", "migrate")
        assert tracker_of(app, node).entries == (Entry(name, "masked"),)
        assert app.value(there) == 0
    else:  # which goes by the names, in whatever order they come
        second.parent.rename(node.folder / "elsewhere")
        write_drizzle(node, app.engine.url, workshops='  colour: text("colour"),')
        node.run("drizzle-kit", "generate", "--name", "third")
        node.run("drizzle-kit", "migrate")
        (node.folder / "elsewhere").rename(second.parent)
        found = tracker_of(app, node)
        assert found.newest is not None
        assert name < found.newest
        assert found.entries == (Entry(name, "pending"),)
        node.run("drizzle-kit", "migrate")
        assert tracker_of(app, node).entries == ()
        assert app.value(there) == 1
