"""The revisions, and the names of a host that they get.

A revision is a module in ``versions/``, found and ordered by Alembic's ``ScriptDirectory``. It has ``revision``,
``down_revision``, ``kind`` (``"expand"``: old code keeps working, or ``"contract"``), ``creates`` (names of relations
and types that must be free in the users' schema before) and ``columns`` (new columns of the app's tables, by our name
for the table), and these functions of the ``HostNames``, each returning ``psycopg.sql`` statements:

==================  ==================================================================================
``prepare``         new objects, made before any existing table is locked
``replaces``        functions that it changes, if any: before the tables are locked, since nobody sees
                    them before the commit; in the second of two transactions under the lock
``locks``           the existing tables that ``locked`` changes, in locking order
``locked``          their changes: no scan, no rewrite, at most one ALTER for each table
``indexes``         name → statement: built concurrently after the commit, on the users' table
``ledger_indexes``  the same on the ledger, if any
``validates``       name → statement: constraints of the ledger that ``locked`` added NOT VALID, checked
                    after the commit, beside live traffic
``undo_locks``      the tables that ``undo`` changes, in locking order
``unreplaces``      the undo of ``replaces``, before the tables are locked
``undo``            the undo of the rest, under lock
``unprepare_locks`` the tables that ``unprepare`` drops, all of them ours
``unprepare``       the undo of ``prepare`` if ``locked`` has not run
==================  ==================================================================================

There is no ``env.py``: it would only wrap the runner's connection, and Alembic's own transaction handling (one
transaction for all revisions, a statement at a time) must not happen here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from psycopg.sql import SQL, Composable, Identifier
from psycopg.sql import Literal as SqlLiteral

from tallystick.config import HostMapping, KeyType, UsersTable, Word, WorkshopsTable
from tallystick.errors import MigrationError
from tallystick.ledger import functions
from tallystick.schema import LEDGER

Adopted = frozenset[tuple[Word, str]]
"""Columns of ours that the host had before: (table, column)."""

_KEY_TYPES: Mapping[KeyType, SQL] = {
    "uuid": SQL("uuid"),
    "text": SQL("text"),
    "char": SQL("bpchar"),  # of any length, with the rules of char(n)
    "smallint": SQL("smallint"),
    "integer": SQL("integer"),
    "bigint": SQL("bigint"),
}


@dataclass(frozen=True)
class TableNames:
    """The names of one table of the host, for a revision.

    ``gone`` is True for a table that the app has dropped since: an undo leaves it out.
    ``key_type`` is the type of the key as a function's parameter; ``key_column`` is that of a column that references
    the key. ``key_type_schema`` is the schema of an extension's type, for a function's search_path.
    """

    word: Word
    schema: str
    table: str
    key: Identifier
    key_type: Composable
    balance: Identifier
    stripe_customer_id: Identifier
    updated_at: Identifier
    deleted_at: Identifier
    key_collation: Composable | None = None
    key_type_schema: Identifier | None = None
    owner: Identifier | None = None
    title: Identifier | None = None
    created_at: Identifier | None = None
    gone: bool = False

    @classmethod
    def of(cls, word: Word, table: UsersTable | WorkshopsTable) -> TableNames:
        """The names of a mapped table."""
        schema = None
        if table.key_type == "citext":
            schema = table.key_type_schema or "public"
            key_type: Composable = Identifier(schema, "citext")
        else:
            key_type = _KEY_TYPES[table.key_type]
        ours = ("stripe_customer_id", "updated_at", "deleted_at")
        columns: dict[str, Any] = {name: Identifier(table.adoptable.get(name, name)) for name in ours}
        read = {name: getattr(table, name, None) for name in ("owner", "title", "created_at")}
        columns |= {name: Identifier(column) for name, column in read.items() if column}
        return cls(
            word,
            table.schema,
            table.table,
            key=Identifier(table.key),
            key_type=key_type,
            balance=Identifier(table.adoptable.get("credit_balance", "credit_balance")),
            key_collation=Identifier(*table.key_collation) if table.key_collation else None,
            key_type_schema=Identifier(schema) if schema else None,
            **columns,
        )

    @property
    def key_column(self) -> Composable:
        """The type of a column that references the key, with its collation."""
        return self.key_type if self.key_collation is None else self.key_type + SQL(" COLLATE ") + self.key_collation

    @property
    def name(self) -> Identifier:
        """The qualified, quoted name."""
        return Identifier(self.schema, self.table)


@dataclass(frozen=True)
class HostNames:
    """The names of a host, for a revision. Fields are only ever added."""

    users: TableNames
    workshops: TableNames | None
    adopted: Adopted = frozenset()
    credits: Literal["integer", "bigint"] = "integer"
    mapping: str = "{}"
    ledger_schema: str = "public"
    ledger_goes: bool = False
    """True for an undo of all revisions: the ledger need not be changed, since it is dropped."""

    @property
    def tables(self) -> list[TableNames]:
        """The mapped tables, without one that the app has dropped."""
        return [table for table in (self.users, self.workshops) if table and not table.gone]

    @property
    def ledger(self) -> Identifier:
        """The ledger, qualified and quoted."""
        return Identifier(self.ledger_schema, LEDGER)

    @property
    def adopts_balance(self) -> bool:
        """True if the host had the balance column before, perhaps with balances in it."""
        return ("users", "credit_balance") in self.adopted

    @property
    def adopted_names(self) -> tuple[str, ...]:
        """As in ``migration_log``: ``users.updated_at``, by our names for the tables."""
        return tuple(sorted(f"{word}.{column}" for word, column in self.adopted))

    def functions(self, revision: str) -> Iterable[Composable]:
        """The ledger's types and functions as of ``revision``, for this host."""
        return functions.statements(self, revision)

    def other_functions(self, before: str, after: str) -> Iterator[Composable]:
        """The changes from one revision to another, either way, of functions whose name only one of them has."""
        return functions.changes(self, before, after, by_name=True)

    def changed_functions(self, before: str, after: str) -> Iterator[Composable]:
        """The changes from one revision to another, either way, of functions that both have and that differ."""
        return functions.changes(self, before, after, by_name=False)

    def placeholders(self) -> dict[str, Composable]:
        """The values of the functions' placeholders, for a revision's own SQL."""
        return functions.names_of(self)

    def sql(self, text: str, **values: Composable) -> Composable:
        """A revision's own SQL with ``values``, its body quoted by a dollar tag that none of them contains."""
        return functions.with_names(text.strip(), values)

    def drop_functions(self, revision: str) -> Iterator[Composable]:
        """The statements that drop ``functions``, without their types."""
        return functions.drops(self, revision)

    def drop_types(self, revision: str) -> Iterator[Composable]:
        """The statements that drop the types: a session's first use of one waits for the transaction that drops it."""
        return functions.type_drops(self, revision)

    @classmethod
    def of(cls, host: HostMapping, adopted: Adopted = frozenset()) -> HostNames:
        """The names of a mapping. A column of ours with another name there is an adopted one."""
        renamed: Adopted = frozenset(
            (word, ours)
            for word, table in host.by_word.items()
            for ours, name in table.adoptable.items()
            if name != ours
        )
        return cls(
            users=TableNames.of("users", host.users),
            workshops=TableNames.of("workshops", host.workshops) if host.workshops else None,
            adopted=adopted | renamed,
            credits=host.credits,
            mapping=host.to_json(),
            ledger_schema=host.schema_of_ledger,
        )


@dataclass(frozen=True)
class Revision:
    """One module of ``versions/``."""

    revision: str
    down_revision: str | None
    kind: Literal["expand", "contract"]
    title: str
    creates: tuple[str, ...]
    columns: Mapping[Word, tuple[str, ...]]
    prepare: Callable[[HostNames], Iterable[Composable]]
    locks: Callable[[HostNames], tuple[Identifier, ...]]
    locked: Callable[[HostNames], Iterable[Composable]]
    indexes: Callable[[HostNames], Mapping[str, Composable]]
    validates: Callable[[HostNames], Mapping[str, Composable]]
    undo_locks: Callable[[HostNames], tuple[Identifier, ...]]
    undo: Callable[[HostNames], Iterable[Composable]]
    unprepare_locks: Callable[[HostNames], tuple[Identifier, ...]]
    unprepare: Callable[[HostNames], Iterable[Composable]]
    replaces: Callable[[HostNames], Iterable[Composable]] = lambda _: ()
    ledger_indexes: Callable[[HostNames], Mapping[str, Composable]] = lambda _: {}
    unreplaces: Callable[[HostNames], Iterable[Composable]] = lambda _: ()


def do_block(body: Composable) -> Composable:
    """A statement that runs a block of PL/pgSQL."""
    return SQL("DO {}").format(SqlLiteral(body.as_string()))


@lru_cache(maxsize=1)
def revisions() -> tuple[Revision, ...]:
    """Every revision, oldest first."""
    from alembic.script import ScriptDirectory  # noqa: PLC0415 - slow to import, and only migrations need it

    scripts = ScriptDirectory(str(Path(__file__).parent))
    found = []
    for script in reversed(list(scripts.walk_revisions())):
        module = script.module
        own = {each.name: getattr(module, each.name) for each in fields(Revision) if hasattr(module, each.name)}
        found.append(Revision(title=script.doc, **own))
    return tuple(found)


def revision_named(name: str) -> Revision:
    """The revision of that name. Raises MigrationError if there is none."""
    found = next((each for each in revisions() if each.revision == name), None)
    if found is None:
        raise MigrationError(f"there is no revision {name!r}. Known: {', '.join(r.revision for r in revisions())}")
    return found


def after(revision: str | None) -> tuple[Revision, ...]:
    """The pending revisions, oldest first."""
    return revisions()[len(up_to(revision)) :]


def adopted_by(revision: Revision, names: Iterable[str]) -> tuple[str, ...]:
    """The adopted columns, as ``users.updated_at``, that ``revision`` would have added."""
    own = {f"{word}.{column}" for word, columns in revision.columns.items() for column in columns}
    return tuple(name for name in names if name in own)


def up_to(revision: str | None) -> tuple[Revision, ...]:
    """The applied revisions, oldest first."""
    all_of_them = revisions()
    return all_of_them[: [r.revision for r in all_of_them].index(revision) + 1] if revision is not None else ()
