"""docs/platforms.md: the commands of each section, on a database of its shape, as a role of its rights."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psycopg
import pytest
import sqlalchemy as sa
from test_supabase import SUPABASE

from tallystick.audit import audit
from tallystick.cli import main
from tallystick.config import Config

PAGE = (Path(__file__).parents[2] / "docs" / "platforms.md").read_text(encoding="utf-8")
SECTIONS = dict(re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL))

TABLES = """
    CREATE TABLE users (id {key} PRIMARY KEY, email text NOT NULL UNIQUE);
    CREATE TABLE workshops (id {key} PRIMARY KEY, user_id {key} NOT NULL REFERENCES users, title text,
      created_at timestamptz NOT NULL DEFAULT now());
"""


@dataclass(frozen=True)
class Platform:
    ddl: str
    superuser: bool = False
    file: str | None = None  # of the app's tool, in its folder


PLATFORMS = {
    "Neon": Platform(TABLES.format(key="uuid")),
    "Supabase": Platform(SUPABASE, superuser=True),  # which has an event trigger
    "Amazon RDS and Aurora": Platform(TABLES.format(key="bigint")),
    "Prisma": Platform(
        """
        CREATE TABLE "User" (id text PRIMARY KEY, email text NOT NULL UNIQUE, "updatedAt" timestamp(3) NOT NULL,
          "deletedAt" timestamp(3));
        CREATE TABLE "Workshop" (id text PRIMARY KEY, "userId" text NOT NULL REFERENCES "User", name text,
          "createdAt" timestamp(3) NOT NULL DEFAULT now());
        """,
        file="prisma.config.ts",
    ),
    "Drizzle": Platform(TABLES.format(key="integer"), file="drizzle.config.ts"),
}


def blocks(section: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", section, re.MULTILINE | re.DOTALL)


def test_each_section_is_run() -> None:
    assert set(SECTIONS) == set(PLATFORMS)


@pytest.mark.parametrize("name", PLATFORMS)
def test_a_section_runs_from_top_to_bottom(
    name: str,
    fresh_database: Callable[..., str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    platform, section = PLATFORMS[name], SECTIONS[name]
    url = sa.make_url(fresh_database())
    with psycopg.connect(
        url.set(drivername="postgresql").render_as_string(hide_password=False), autocommit=True
    ) as conn:
        conn.execute("DO $$ BEGIN CREATE ROLE platform_owner LOGIN; EXCEPTION WHEN duplicate_object THEN NULL; END $$")
        if not platform.superuser:
            conn.execute(f'ALTER DATABASE "{url.database}" OWNER TO platform_owner')
            conn.execute("SET ROLE platform_owner")
        conn.execute(platform.ddl)
    if not platform.superuser:
        url = url.set(username="platform_owner")
    monkeypatch.chdir(tmp_path)
    if platform.file:
        (tmp_path / platform.file).touch()
    monkeypatch.delenv("TALLYSTICK_HOME", raising=False)
    for variable in ("DATABASE_URL", "DATABASE_URL_UNPOOLED"):
        monkeypatch.setenv(variable, url.render_as_string(hide_password=False))
    monkeypatch.setenv("COLUMNS", "200")

    def tallystick(line: str) -> str:
        monkeypatch.setattr(sys, "argv", shlex.split(line))
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capfd.readouterr()
        assert ended.value.code in (None, 0), f"{line}: {out}{err}"
        return out

    output: dict[str, str] = {}
    for kind, block in re.findall(r"^```(sh|sql)\n(.*?)^```", section, re.MULTILINE | re.DOTALL):
        if kind == "sql":
            with psycopg.connect(url.set(drivername="postgresql").render_as_string(hide_password=False)) as conn:
                conn.execute(block)
            continue
        output |= {line: tallystick(line) for line in block.splitlines()}
    [proposed] = blocks(section, "text")
    for line in proposed.splitlines():
        assert line in output["tallystick init"]
    if platform.file:
        tool = name.lower()
        assert f"tallystick migrate snippet {tool}" in output["tallystick migrate apply"]
        assert "credit_balance" in output[f"tallystick migrate snippet {tool}"]
    assert "As declared" in output["tallystick migrate status"]
    engine = sa.create_engine(url, poolclass=sa.NullPool)
    with engine.connect() as conn:
        assert audit(conn, Config.load().at(url.render_as_string(hide_password=False))).clean
