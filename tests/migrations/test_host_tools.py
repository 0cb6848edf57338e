"""The host's own migration tool: what its table says."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from hosts import App

from tallystick import migrate
from tallystick.errors import ConfigError
from tallystick.migrate.trackers import Entry, Tracker, concerns, trackers

DRIZZLE_0 = "CREATE SCHEMA drizzle; CREATE TABLE drizzle.__drizzle_migrations (id serial, hash text, created_at bigint)"
DRIZZLE_1 = (
    "CREATE SCHEMA drizzle; CREATE TABLE drizzle.__drizzle_migrations"
    " (id serial, hash text, created_at bigint, name text, applied_at timestamptz DEFAULT now())"
)


def sha(text: bytes) -> str:
    return hashlib.sha256(text).hexdigest()


def look(app: App, **options: object) -> tuple[Tracker, ...]:
    with app.engine.connect() as conn:
        return trackers(conn, **options)


def test_our_own_is_none_of_the_hosts(app: App) -> None:
    migrate.apply(app.url, app.config)
    assert look(app) == ()


def test_alembic(app: App) -> None:
    app.run(
        "CREATE TABLE alembic_version (version_num varchar(32))", "INSERT INTO alembic_version VALUES ('abc'), ('b')"
    )
    assert look(app) == (Tracker("alembic", "public.alembic_version", "abc, b"),)


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
        f"('{sha(b'a' + bytes([10]))}', 1), ('{sha(b'a' + bytes([13, 10]) + b'b' + bytes([13, 10]))}', 2),"
        f" ('{sha(b'c' + bytes([10]))}', 3), ('{sha(b'before')}', 4), ('{sha(b'gone')}', 6)",
    )

    [found] = look(app, drizzle=tmp_path)

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
    assert look(app)[0].entries == ()


def test_drizzle_1(app: App, tmp_path: Path) -> None:
    for name, text in (("20260101_a", b"a"), ("20260102_b", b"b"), ("20260103_c", b"c")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "migration.sql").write_bytes(text)
    app.run(
        *DRIZZLE_1.split(";"),
        "INSERT INTO drizzle.__drizzle_migrations (hash, name) VALUES "
        f"('{sha(b'a')}', '20260101_a'), ('{sha(b'other')}', '20260103_c'), ('{sha(b'x')}', '20260104_gone')",
    )
    [found] = look(app, drizzle=tmp_path)
    assert (found.tool, found.newest) == ("drizzle 1.0", "20260104_gone")
    assert found.entries == (
        Entry("20260102_b", "pending"),
        Entry("20260103_c", "changed"),
        Entry("20260104_gone", "unknown"),
    )


@pytest.mark.parametrize("ddl", [DRIZZLE_0, DRIZZLE_1])
def test_a_folder_that_is_none_of_drizzles(app: App, tmp_path: Path, ddl: str) -> None:
    app.run(*ddl.split(";"))
    with pytest.raises(ConfigError, match="drizzle-kit"):
        look(app, drizzle=tmp_path)
