"""Migration tools of Node apps, as npm has them: installed once, into the repository's ignored folder."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pytest
import sqlalchemy as sa

REPOSITORY = Path(__file__).parents[2]
PACKAGES = Path(__file__).parent / "node"  # a folder for each set of exact versions
CACHE = REPOSITORY / ".tallystick" / "node"
UNREACHABLE = ("ENOTFOUND", "ECONNREFUSED", "ECONNRESET", "ETIMEDOUT", "EAI_AGAIN", "ENETUNREACH", "ENOTCACHED")


@dataclass(frozen=True)
class Project:
    """A folder of a Node app, with its packages."""

    folder: Path

    def write(self, name: str, text: str) -> None:
        (self.folder / name).write_text(text)

    def run(self, program: str, *args: str, env: dict[str, str] | None = None, ok: bool = True) -> str:
        """All that it said. Unless ``ok`` is off, it must have succeeded."""
        done = subprocess.run(
            [self.folder / "node_modules" / ".bin" / program, *args],
            cwd=self.folder,
            env={**os.environ, "NO_COLOR": "1", **(env or {})},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=120,
            check=False,
        )
        assert not ok or done.returncode == 0, done.stdout
        return done.stdout


def project(packages: str, folder: Path) -> Project:
    """An app in ``folder`` with one of the sets of ``PACKAGES``; skips where npm or its registry is not there."""
    (folder / "node_modules").symlink_to(_installed(packages))
    return Project(folder)


def _installed(packages: str) -> Path:
    if shutil.which("npm") is None:
        pytest.skip("needs npm, for the real Drizzle and Prisma (install Node.js)")
    wanted = (PACKAGES / packages / "package.json").read_bytes()
    target = CACHE / f"{packages}-{hashlib.sha256(wanted).hexdigest()[:12]}"
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the processes of one test run share it
        if not target.exists():
            _install(wanted, target)
    return target / "node_modules"


def _install(wanted: bytes, target: Path) -> None:
    """Under its name only when it is whole."""
    with tempfile.TemporaryDirectory(dir=CACHE) as folder:
        partial = Path(folder) / "app"
        partial.mkdir()
        (partial / "package.json").write_bytes(wanted)
        # without scripts: Prisma's would download engines from elsewhere
        command = [
            "npm",
            "install",
            "--ignore-scripts",
            "--no-package-lock",
            "--no-audit",
            "--no-fund",
            "--fetch-retries=1",
        ]
        done = subprocess.run(command, cwd=partial, capture_output=True, text=True, timeout=300, check=False)
        if done.returncode != 0:
            if any(word in done.stderr for word in UNREACHABLE):
                pytest.skip("npm cannot reach its registry, from which the real Drizzle and Prisma come")
            raise AssertionError(done.stderr)
        partial.rename(target)


_SCHEMA = """\
import {{ sql }} from "drizzle-orm";
import {{ boolean, integer, pgEnum, pgTable, text, timestamp, uniqueIndex, uuid, varchar }} from "drizzle-orm/pg-core";

export const users = pgTable("users", {{
  id: uuid("id").primaryKey().defaultRandom(),
  email: text("email").notNull().unique(),
{users}
}}, (table) => [
{indexes}
]);

export const workshops = pgTable("workshops", {{
  id: uuid("id").primaryKey().defaultRandom(),
  userId: uuid("user_id").notNull().references(() => users.id),
  title: text("title"),
  createdAt: timestamp("created_at", {{ withTimezone: true }}).notNull().defaultNow(),
{workshops}
}});
{types}
"""
_DRIZZLE_CONFIG = """\
import {{ defineConfig }} from "drizzle-kit";
export default defineConfig({{
  dialect: "postgresql",
  schema: "./schema.ts",
  out: "./drizzle",
  dbCredentials: {{ host: "{host}", port: {port}, user: "postgres", database: "{database}", ssl: false }},
{config}
}});
"""
DRIZZLE = ("drizzle_0", "drizzle_1")


def write_drizzle(app: Project, url: sa.URL, **lines: str) -> None:
    """A schema.ts and its configuration; ``lines``: users, indexes, workshops, types and config."""
    at = {"host": url.query["host"], "port": url.query["port"], "database": url.database}
    given = dict.fromkeys(("users", "indexes", "workshops", "types", "config"), "") | lines
    app.write("schema.ts", _SCHEMA.format(**given))
    app.write("drizzle.config.ts", _DRIZZLE_CONFIG.format(**at, **given))
