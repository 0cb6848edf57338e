"""Migration tools of Node apps, as npm has them."""

from __future__ import annotations

from pathlib import Path

import sqlalchemy as sa

import node_packages
from node_packages import Project

PACKAGES = Path(__file__).parent / "node"  # a folder for each set of exact versions


def project(packages: str, folder: Path) -> Project:
    """An app in ``folder`` with one of the sets of ``PACKAGES``."""
    return node_packages.project(PACKAGES / packages, folder)


_SCHEMA = """\
import {{ sql }} from "drizzle-orm";
import {{ boolean, index, integer, pgEnum, pgTable, text, timestamp, uniqueIndex }} from "drizzle-orm/pg-core";
import {{ uuid, varchar }} from "drizzle-orm/pg-core";

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
