"""The records of the host's own migration tool: Alembic's version table, Drizzle's of 0.x and 1.0. Only reads.

Drizzle 0.x applies an entry only if it is newer than the newest row of its table. An entry out of order (two branches,
merged the other way round) is skipped for ever, and reported as success: here it is called masked.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import sqlalchemy as sa

from tallystick.errors import ConfigError
from tallystick.schema import BOOKKEEPING_SCHEMA

Tool = Literal["alembic", "drizzle 0.x", "drizzle 1.0"]


@dataclass(frozen=True)
class Entry:
    """One migration of the host's that needs attention.

    Its tool will apply a ``pending`` one, but never a ``masked`` one, though it is missing. ``changed`` was applied
    from a file with other contents, ``line endings`` from one with CRLF instead of LF or the reverse. ``unknown`` was
    applied and has no file; ``undated`` is a row without a time.
    """

    name: str
    state: Literal["pending", "masked", "changed", "line endings", "unknown", "undated"]


@dataclass(frozen=True)
class Tracker:
    """A migration tool's table in this database, and its contents; ``newest`` is the last applied migration.

    ``grant`` is the GRANT that this role needs to read it, or None.
    """

    tool: Tool
    table: str
    newest: str | None
    entries: tuple[Entry, ...] = ()
    grant: str | None = None


_FOUND = sa.text("""
    SELECT n.nspname AS schema, c.relname AS table,
           EXISTS (SELECT FROM pg_attribute a WHERE a.attrelid = c.oid AND a.attname = 'name') AS named,
           CASE WHEN NOT has_schema_privilege(n.oid, 'USAGE') OR NOT has_table_privilege(c.oid, 'SELECT') THEN
             format('GRANT USAGE ON SCHEMA %I TO %I; GRANT SELECT ON %I.%I TO %I',
                    n.nspname, current_user, n.nspname, c.relname, current_user) END AS lacking
    FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
    WHERE c.relkind = 'r' AND c.relname IN ('alembic_version', '__drizzle_migrations') AND n.nspname <> :ours
    ORDER BY 1, 2
""")


@dataclass(frozen=True)
class HostTool:
    """A tool for the app's schema: the sign of it, and its effect on columns that it does not know.

    ``snippet`` is its name for ``snippet``.
    """

    name: str
    snippet: str
    sign: str
    otherwise: str


_DROPS = "would drop columns and tables of the ledger that its schema does not name"
_TOOLS: Sequence[tuple[str, str, str, Sequence[str], str]] = (
    ("Drizzle", "drizzle", "__drizzle_migrations", ("drizzle.config.ts", "drizzle.config.js"), _DROPS),
    ("Prisma", "prisma", "_prisma_migrations", ("prisma/schema.prisma", "schema.prisma", "prisma.config.ts"), _DROPS),
    ("Django", "django", "django_migrations", ("manage.py",), "cannot read the ledger's columns until its models do"),
    ("Alembic", "sqlalchemy", "alembic_version", ("alembic.ini",), _DROPS),
)
_THERE = sa.text("""
    SELECT DISTINCT c.relname FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
    WHERE c.relkind = 'r' AND c.relname = ANY (:names) AND n.nspname <> :ours
""")


def tools(conn: sa.Connection, folder: Path) -> tuple[HostTool, ...]:
    """The tools that have a table in this database or a file in the app's ``folder``."""
    names = [table for _, _, table, _, _ in _TOOLS]
    tables = set(conn.scalars(_THERE, {"names": names, "ours": BOOKKEEPING_SCHEMA}))
    found = []
    for name, snippet, table, files, otherwise in _TOOLS:
        signs = [f"its table {table}"] if table in tables else [file for file in files if (folder / file).is_file()]
        if signs:
            found.append(HostTool(name, snippet, signs[0], otherwise))
    return tuple(found)


def trackers(conn: sa.Connection, *, drizzle: Path | None = None) -> tuple[Tracker, ...]:
    """The trackers of other tools in this database.

    ``drizzle``: the app's folder of Drizzle migrations; without it only the table is read.

    Raises:
        ConfigError: the folder is not one of Drizzle's.
    """
    if drizzle is not None and not drizzle.is_dir():
        raise ConfigError(f"{drizzle} is no folder. Give the one that drizzle-kit writes to", path=str(drizzle))
    found = [_tracker(conn, row, drizzle) for row in conn.execute(_FOUND, {"ours": BOOKKEEPING_SCHEMA})]
    if drizzle is not None and all(tracker.tool == "alembic" for tracker in found):
        found.append(_unused(drizzle))
    return tuple(found)


def _tracker(conn: sa.Connection, row: sa.Row[Any], drizzle: Path | None) -> Tracker:
    tool: Tool = "alembic" if row.table == "alembic_version" else "drizzle 1.0" if row.named else "drizzle 0.x"
    if row.lacking:
        return Tracker(tool, f"{row.schema}.{row.table}", None, grant=row.lacking)
    if tool == "alembic":
        return _alembic(conn, row.schema)
    return (_drizzle_1 if row.named else _drizzle_0)(conn, row.schema, drizzle)


def _unused(folder: Path) -> Tracker:
    """A tracker without a table: nothing was applied, or the app's drizzle.config.ts gives the table another name."""
    first: Tool = "drizzle 0.x" if (folder / "meta" / "_journal.json").exists() else "drizzle 1.0"
    entries = _entries_0(folder, {}, None) if first == "drizzle 0.x" else _entries_1(folder, {})
    return Tracker(first, "no table __drizzle_migrations in any schema", None, tuple(entries))


def _alembic(conn: sa.Connection, schema: str) -> Tracker:
    table = sa.table("alembic_version", sa.column("version_num", sa.String), schema=schema)
    heads = conn.scalars(sa.select(table.c.version_num).order_by(table.c.version_num)).all()
    return Tracker("alembic", f"{schema}.alembic_version", ", ".join(heads) or None)


def _drizzle_0(conn: sa.Connection, schema: str, folder: Path | None) -> Tracker:
    columns = (sa.column("hash", sa.Text), sa.column("created_at", sa.BigInteger))
    table = sa.table("__drizzle_migrations", *columns, schema=schema)
    rows = conn.execute(sa.select(table.c.hash, table.c.created_at).order_by(table.c.created_at)).all()
    applied = {row.created_at: row.hash for row in rows if row.created_at is not None}
    newest = max(applied, default=None)
    undated = [Entry(f"the row {row.hash}", "undated") for row in rows if row.created_at is None]
    entries = (*undated, *(_entries_0(folder, applied, newest) if folder else ()))
    return Tracker("drizzle 0.x", f"{schema}.__drizzle_migrations", None if newest is None else str(newest), entries)


def _entries_0(folder: Path, applied: dict[int, str], newest: int | None) -> Iterator[Entry]:
    journal = folder / "meta" / "_journal.json"
    try:
        entries = json.loads(journal.read_text(encoding="utf-8"))["entries"]
        known = [(str(entry["tag"]), int(entry["when"])) for entry in entries]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{journal} cannot be read ({error}). Give the folder that drizzle-kit writes to", path=str(journal)
        ) from error
    for tag, when in known:
        if when not in applied:
            yield Entry(tag, "masked" if newest is not None and when <= newest else "pending")
        else:
            yield from _compared(tag, folder / f"{tag}.sql", applied[when])
    for when in sorted(set(applied) - {when for _, when in known}):
        yield Entry(str(when), "unknown")


def _drizzle_1(conn: sa.Connection, schema: str, folder: Path | None) -> Tracker:
    columns = (sa.column("hash", sa.Text), sa.column("name", sa.Text), sa.column("id", sa.Integer))
    table = sa.table("__drizzle_migrations", *columns, schema=schema)
    rows = conn.execute(sa.select(table.c.name, table.c.hash).order_by(table.c.id)).all()
    applied = {row.name: row.hash for row in rows if row.name}
    entries = tuple(_entries_1(folder, applied)) if folder else ()
    newest = rows[-1].name if rows else None
    return Tracker("drizzle 1.0", f"{schema}.__drizzle_migrations", newest, entries)


def _entries_1(folder: Path, applied: dict[str, str]) -> Iterator[Entry]:
    files = {file.parent.name: file for file in sorted(folder.glob("*/migration.sql"))}
    if not files:
        raise ConfigError(
            f"{folder} has no */migration.sql. Give the folder that drizzle-kit writes to", path=str(folder)
        )
    for name, file in files.items():
        if name not in applied:
            yield Entry(name, "pending")
        else:
            yield from _compared(name, file, applied[name])
    for name in sorted(set(applied) - set(files)):
        yield Entry(name, "unknown")


def _compared(name: str, file: Path, applied: str) -> Iterator[Entry]:
    """Compare a file with the SHA-256 that Drizzle stored, and itself never compares."""
    try:
        text = file.read_bytes()
    except OSError:
        yield Entry(name, "unknown")
        return
    lf = text.replace(b"\r\n", b"\n")
    hashes = [hashlib.sha256(form).hexdigest() for form in (text, lf, lf.replace(b"\n", b"\r\n"))]
    if applied == hashes[0]:
        return
    yield Entry(name, "line endings" if applied in hashes else "changed")


def concerns(found: Sequence[Tracker]) -> list[str]:
    """Advice to a person, one sentence each."""
    advice = {
        "pending": "is not applied yet; its tool will",
        "masked": "is not applied and never will be: it is older than the newest applied one. Give it a later time",
        "changed": "was applied from a file with other contents. Restore the file, or write a further migration",
        "line endings": "differs in its line endings only. Keep them with: *.sql text eol=lf in .gitattributes",
        "unknown": "was applied and has no file here. Fetch the branch that has it",
        "undated": "has no created_at, and its tool will apply every migration again. Give it its migration's time",
    }
    unread = [
        f"{tracker.tool}: this role may not read {tracker.table}. Let its owner run: {tracker.grant}"
        for tracker in found
        if tracker.grant
    ]
    advised = [f"{tracker.tool}: {entry.name} {advice[entry.state]}" for tracker in found for entry in tracker.entries]
    return unread + advised
