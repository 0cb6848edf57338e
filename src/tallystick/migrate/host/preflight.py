"""The preflight of a migration: the mapping compared with the live tables, before any change. Only reads."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql as pg

from tallystick.config import CREDITS_MAX, INTEGER_KEYS, Config, HostMapping, KeyType, UsersTable, Word, WorkshopsTable
from tallystick.database import refuse_hidden_rows
from tallystick.declared_tables import Schema, alembic_version, migration_log
from tallystick.declared_tables import mapping as stored_mapping
from tallystick.errors import (
    HostMismatch,
    IncompatibleColumn,
    LedgerNotEmpty,
    PermissionDenied,
    SchemaError,
    SchemaTooNew,
)
from tallystick.migrate.host.candidates import platform_refusal
from tallystick.migrate.host.dependents import breaks_with_more_columns
from tallystick.migrate.host.tables import (
    KEY_WORDS,
    MOMENTS,
    HostColumn,
    HostTable,
    columns_of,
    host_tables,
    oid_of,
    plain,
    quoted,
    unsuitable,
)
from tallystick.migrate.revisions import Adopted, HostNames, after, revisions
from tallystick.schema import (
    HISTORY,
    LEDGER,
    bookkeeping_lost,
    changed_columns,
    has_bookkeeping,
    mapping_of,
    refuse_other_mapping,
    was_applied,
)

OLDEST_SERVER = 140000
_MAX_COLUMNS = 1600

_TAKEN = sa.text("""
    SELECT taken.name
    FROM (SELECT relname AS name, relnamespace AS schema FROM pg_class
          UNION SELECT typname, typnamespace FROM pg_type) taken
    WHERE taken.schema = to_regnamespace(quote_ident(:schema)) AND taken.name = ANY (:names)
    ORDER BY 1
""")

_KEYS = sa.text("""
    SELECT conname AS name, confrelid::bigint AS oid, nspname AS schema, relname AS bare,
           quote_ident(nspname) || '.' || quote_ident(relname) AS table
    FROM pg_constraint JOIN pg_class c ON c.oid = confrelid JOIN pg_namespace n ON n.oid = relnamespace
    WHERE conrelid = to_regclass(quote_ident(:schema) || '.credit_transactions')
      AND conname IN ('credit_transactions_user_fk', 'credit_transactions_workshop_fk')
""")

_ROLE = sa.text("""
    SELECT current_user AS role, current_database() AS database,
           has_database_privilege(current_database(), 'CREATE') AS database_create,
           coalesce(has_schema_privilege(to_regnamespace(quote_ident(:schema))::oid, 'CREATE'), false)
             AS schema_create,
           current_setting('server_version_num')::int AS version,
           current_setting('server_version') AS version_text,
           pg_is_in_recovery() AS standby,
           (SELECT rolinherit FROM pg_roles WHERE rolname = current_user) AS inherits,
           to_regnamespace('tallystick') IS NOT NULL AS has_schema,
           to_regclass('tallystick.alembic_version') IS NOT NULL AS has_version
""")


@dataclass(frozen=True)
class Host:
    """The result of the preflight. ``adopted`` are columns of ours that the host had before their revision.

    ``prepared`` are the revisions after ``revision`` whose new objects are committed but not used yet. ``columns`` are
    the present names in each mapped table. ``stored`` is the mapping that the functions were made for, if the settings
    name other columns that are only read. ``missing_privileges`` and ``breaks`` (objects of the app that would fail
    with more columns) stop a run.
    """

    server_version: int
    server: str
    revision: str | None
    users: HostTable
    workshops: HostTable | None
    adopted: Adopted
    missing_privileges: tuple[str, ...] = ()
    prepared: tuple[str, ...] = ()
    breaks: tuple[str, ...] = ()
    ledger_schema: str = "public"
    balance: str = "credit_balance"
    follows: bool = False
    stored: HostMapping | None = None
    columns: Mapping[Word, tuple[str, ...]] = field(default_factory=dict)

    @property
    def by_word(self) -> dict[Word, HostTable]:
        """The mapped tables, by our names for them."""
        found: dict[Word, HostTable] = {"users": self.users}
        if self.workshops:
            found["workshops"] = self.workshops
        return found

    @property
    def tables(self) -> tuple[HostTable, ...]:
        """The mapped tables."""
        return tuple(self.by_word.values())

    @property
    def adopted_names(self) -> tuple[str, ...]:
        """As in ``migration_log``: ``users.updated_at``, by our names for the tables."""
        return tuple(sorted(f"{word}.{column}" for word, column in self.adopted))


def examine(
    conn: sa.Connection,
    config: Config,
    *,
    strict: bool = True,
    changes: bool = True,
    removes: bool = False,
    renews: bool = False,
) -> Host:
    """Check that this database can be migrated (or is already), before anything is changed.

    With ``strict`` off, missing privileges and objects that would break are in the result, not raised. With
    ``changes`` off nothing is to be changed, and a standby is accepted. With ``removes`` all of Tallystick is to be
    taken out, for which columns that are only read, and the table of workshops, may be missing. With ``renews`` the
    settings may name other columns that are only read than the database: the functions are to be made anew.

    Raises:
        SchemaError: the server is too old, or is a standby and cannot be changed; or the bookkeeping is lost.
        HostMismatch: the mapping names missing or unsuitable tables or columns, a name of ours is taken, or an object
            of the app would fail once its tables have more columns.
        IncompatibleColumn: the host has a column of ours that cannot be adopted.
        PermissionDenied: with the GRANT to run.
        SchemaTooNew: a later version of Tallystick migrated the database.
    """
    mapping = config.host
    role = conn.execute(_ROLE, {"schema": mapping.users.schema}).one()
    _refuse_server(role, changes=changes)
    _refuse_part_of_ours(conn)
    revision = current_revision(conn)
    prepared = prepared_revisions(conn)
    if revision is None and was_applied(conn):
        raise bookkeeping_lost("alembic_version")
    stored = mapping_of(conn) if revision is not None or prepared else mapping
    if not (renews and not prepared and changed_columns(stored, mapping)):
        refuse_other_mapping(stored, mapping)
        stored = mapping
    migrated = revision is not None or bool(prepared)
    users, users_columns = _mapped_users(conn, mapping, migrated=migrated, removes=removes)
    if removes and migrated and mapping.workshops is not None and _is_gone(conn, mapping):
        mapping = replace(mapping, workshops=None)
    workshops, workshops_columns = _mapped_workshops(
        conn, mapping, migrated=migrated, removes=removes, renews=stored != mapping
    )
    if revision is None and not prepared and role.has_schema:
        raise HostMismatch(
            'this database has a schema "tallystick" that is not ours. Rename it: '
            "ALTER SCHEMA tallystick RENAME TO tallystick_before",
            table="tallystick",
        )
    adopted, faults = _adoptable(conn, "users", users, users_columns, mapping=mapping, revision=revision)
    if workshops is not None:
        of_workshops, others = _adoptable(
            conn, "workshops", workshops, workshops_columns, mapping=mapping, revision=revision
        )
        adopted, faults = adopted | of_workshops, [*faults, *others]
    _refuse_unadoptable(faults, [] if prepared else taken(conn, mapping, revision), mapping)
    if revision is not None:
        adopted |= adopted_columns(conn)
        _check_same_host(conn, mapping.schema_of_ledger, users, workshops)

    tables = [table for table in (users, workshops) if table]
    missing = tuple(_missing_privileges(role, mapping, tables, migrated=migrated))
    shaped = [(table.oid, table.schema, table.table) for table in tables]
    breaks = tuple(breaks_with_more_columns(conn, shaped)) if revision is None else ()
    if strict and missing:
        raise PermissionDenied(missing[0], sqlstate="42501")
    if strict and breaks:
        raise HostMismatch(". ".join([*breaks, "Nothing was changed"]), table=users.shown)
    return Host(
        server_version=role.version,
        server=role.version_text,
        revision=revision,
        users=users,
        workshops=workshops,
        adopted=adopted,
        missing_privileges=missing,
        prepared=prepared,
        breaks=breaks,
        ledger_schema=mapping.schema_of_ledger,
        balance=mapping.users.balance,
        follows=revision is not None and ("users", "credit_balance") in adopted and not was_cut_over(conn),
        stored=None if stored == mapping else stored,
        columns={"users": tuple(users_columns), "workshops": tuple(workshops_columns)},
    )


def _refuse_part_of_ours(conn: sa.Connection) -> None:
    """Raise SchemaError if one of the tables that tell the revision and the mapping is missing, and another is there.

    Without it the database would seem not to be migrated, and its columns would be taken for the app's.
    """
    tables = [table.name for table in (alembic_version, migration_log, stored_mapping)]
    missing = [name for name in tables if not has_bookkeeping(conn, name)]
    if missing and len(missing) < len(tables):
        raise bookkeeping_lost(missing[0])


def refuse_rows(conn: sa.Connection, host: Host, how: str) -> None:
    """Raise LedgerNotEmpty if the ledger has history; ``how`` is the way to delete it on purpose."""
    refuse_hidden_rows(conn, [(host.ledger_schema, LEDGER)], "whether it has rows")
    ledger = sa.table(LEDGER, schema=host.ledger_schema)
    rows = conn.scalar(sa.select(sa.func.count()).select_from(ledger).where(sa.text(HISTORY)))
    if rows:
        many = "" if rows == 1 else "s"
        raise LedgerNotEmpty(
            f"the ledger holds {rows} credit transaction{many}, which undo would throw away. Take a backup, then {how}",
            rows=rows,
        )


def current_revision(conn: sa.Connection) -> str | None:
    """The database's revision, None before 0001. Raises SchemaTooNew."""
    if not has_bookkeeping(conn, "alembic_version"):
        return None
    found = conn.scalar(sa.select(alembic_version.c.version_num))
    return None if found is None else _known(found, "at")


def prepared_revisions(conn: sa.Connection) -> tuple[str, ...]:
    """The revisions of which only the new objects exist, oldest first. Raises SchemaTooNew."""
    if not has_bookkeeping(conn, "migration_log"):
        return ()
    log = migration_log.c
    found = conn.scalars(sa.select(log.revision).where(log.direction == "prepare").order_by(log.id))
    return tuple(_known(revision, "on the way to") for revision in found)


def _known(found: str, where: str) -> str:
    known = [revision.revision for revision in revisions()]
    if found not in known:
        raise SchemaTooNew(
            f"this database is {where} revision {found}, this package knows {known[-1]}. "
            "Run: pip install -U tallystick",
            revision=found,
        )
    return found


def was_cut_over(conn: sa.Connection) -> bool:
    """True after the cut-over: only the ledger writes balances."""
    log = migration_log.c
    return bool(conn.scalar(sa.select(sa.exists().where(log.direction == "adopt"))))


def adopted_columns(conn: sa.Connection) -> Adopted:
    """The columns that the revisions adopted."""
    rows = conn.scalars(sa.select(migration_log.c.adopted).where(migration_log.c.direction == "apply"))
    pairs = (name.split(".", 1) for row in rows for name in row)
    return frozenset((cast("Word", word), column) for word, column in pairs)


def _missing_privileges(
    role: sa.Row[Any], mapping: HostMapping, tables: Sequence[HostTable], *, migrated: bool
) -> Iterator[str]:
    """Each missing privilege, as a sentence that ends with the GRANT to run."""
    for table in tables:
        if refusal := platform_refusal(table):
            yield f"{table.shown} {refusal}"
        elif not table.owned:
            yield (
                f"{role.role} does not own {table.shown}{', and does not inherit it' if table.member else ''}. "
                f"Connect as {table.owner}, or let an administrator run: {_membership(role, table)}"
            )
    if not migrated and not role.database_create:
        yield (
            f"{role.role} may not create the schema tallystick. Let an administrator run: "
            f"GRANT CREATE ON DATABASE {quoted(role.database)} TO {quoted(role.role)}"
        )
    if not role.schema_create:
        yield (
            f"{role.role} may not create tables in schema {mapping.users.schema}. Let an administrator run: "
            f"GRANT CREATE ON SCHEMA {quoted(mapping.users.schema)} TO {quoted(role.role)}"
        )


_INHERITS_BY_GRANT = 160000


def _membership(role: sa.Row[Any], table: HostTable) -> str:
    """The statement with which the role has the rights of the table's owner."""
    grant = f"GRANT {quoted(table.owner)} TO {quoted(role.role)}"
    if role.version >= _INHERITS_BY_GRANT:
        return f"{grant} WITH INHERIT TRUE" if table.member or not role.inherits else grant
    inherit = f"ALTER ROLE {quoted(role.role)} INHERIT"
    return "; ".join([*([] if table.member and not role.inherits else [grant]), *([] if role.inherits else [inherit])])


def _refuse_server(role: sa.Row[Any], *, changes: bool) -> None:
    if role.version < OLDEST_SERVER:
        raise SchemaError(f"PostgreSQL {role.version_text} is too old. Tallystick needs 14 or later")
    if role.standby and changes:
        raise SchemaError("this server is a standby and cannot be written to. Use the primary's address")


def _mapped_users(
    conn: sa.Connection, mapping: HostMapping, *, migrated: bool, removes: bool
) -> tuple[HostTable, Mapping[str, HostColumn]]:
    names = mapping.users
    table = mapped_table(conn, "users", names.schema, names.table, migrated=migrated, removes=removes)
    columns = columns_of(conn, table)
    _check_key("users", table, columns, names, migrated=migrated)
    if names.email and not migrated:  # no function uses it, and the setting may change at any time
        _column("users", "email", table, columns, names.email)
    return table, columns


def _is_gone(conn: sa.Connection, mapping: HostMapping) -> bool:
    """True if the table of workshops was dropped; one that has another name is still referenced by the ledger."""
    names = mapping.workshops
    referenced = {key.name for key in conn.execute(_KEYS, {"schema": mapping.schema_of_ledger})}
    return (
        names is not None
        and oid_of(conn, names.schema, names.table) is None
        and "credit_transactions_workshop_fk" not in referenced
    )


def _refuse_missing(conn: sa.Connection, word: Word, schema: str, name: str) -> None:
    """Raise HostMismatch for a mapped table that has been renamed or dropped since the migration, with the way back."""
    stored = mapping_of(conn)
    shown = f"{schema}.{name}"
    for key in conn.execute(_KEYS, {"schema": stored.schema_of_ledger}):
        if key.name == f"credit_transactions_{word.removesuffix('s')}_fk":
            moved = f"ALTER TABLE {key.table} SET SCHEMA {quoted(schema)}" if key.schema != schema else ""
            renamed = f"ALTER TABLE {quoted(schema, key.bare)} RENAME TO {quoted(name)}" if key.bare != name else ""
            raise HostMismatch(
                f"{shown} is {key.table} now, and the ledger's functions call it by the name that it had at the "
                f"migration. Give it that name back: {'; '.join(each for each in (moved, renamed) if each)}",
                table=shown,
            )
    made = Schema.of(stored).workshops if word == "workshops" else None
    how = ""
    if made is not None:
        dialect = pg.dialect(paramstyle="named")  # type: ignore[no-untyped-call]  # it does not double a %
        ddl = " ".join(str(sa.schema.CreateTable(made).compile(dialect=dialect)).split())
        how = f", or make it again, empty: {ddl}. To take Tallystick out of the database: tallystick migrate undo"
    raise HostMismatch(
        f"{shown} is gone, and the ledger's functions need it. Restore it from a backup{how}", table=shown
    )


def mapped_table(
    conn: sa.Connection, word: Word, schema: str, name: str, *, migrated: bool | None = None, removes: bool = False
) -> HostTable:
    """The mapped table. Raises HostMismatch if it is missing or unsuitable, with a similar name.

    ``migrated`` is None if the caller does not know. With ``removes`` other tables may inherit from it.
    """
    if migrated is None:
        stored = mapping_of(conn).by_word.get(word) if has_bookkeeping(conn, "mapping") else None
        migrated = stored is not None and (stored.schema, stored.table) == (schema, name)
    everything = host_tables(conn)
    table = next((t for t in everything if (t.schema, t.table) == (schema, name)), None)
    where = f"host.{word}"
    if table is None:
        if migrated:
            _refuse_missing(conn, word, schema, name)
        named = {t.table: t.shown for t in everything}  # alike without the schema, which most tables share
        near = [named[other] for other in difflib.get_close_matches(name, named, n=1, cutoff=0.5)]
        hint = f"did you mean {near[0]}? Set it under [{where}]" if near else f"name it under [{where}]"
        raise HostMismatch(
            f"there is no table {schema}.{name}; {hint} in tallystick.toml, or run: tallystick init",
            table=f"{schema}.{name}",
        )
    heirs = conn.scalars(_HEIRS, {"oid": table.oid}).all() if migrated and table.inherits else []
    if heirs and not removes:
        raise HostMismatch(
            f"other tables inherit from {table.shown}, whose rows the ledger does not find by its keys. Take them out: "
            + "; ".join(f"ALTER TABLE {heir} NO INHERIT {quoted(schema, name)}" for heir in heirs),
            table=table.shown,
        )
    fault = None if heirs else unsuitable(table)
    if fault:
        other = "" if migrated else f". Name another table under [{where}]"
        raise HostMismatch(f"{table.shown} {fault}{other}", table=table.shown)
    if table.columns_ever + 10 > _MAX_COLUMNS and not migrated:
        raise HostMismatch(
            f"{table.shown} has had {table.columns_ever} columns, dropped ones included; "
            f"PostgreSQL allows {_MAX_COLUMNS} in a table's life. Copy it into a new table first",
            table=table.shown,
        )
    return table


_HEIRS = sa.text("SELECT inhrelid::regclass::text FROM pg_inherits WHERE inhparent = :oid ORDER BY 1")


_OPTIONAL = ("email", "title", "created_at")


def _column(
    word: Word,
    setting: str,
    table: HostTable,
    columns: Mapping[str, HostColumn],
    name: str,
    *,
    since: UsersTable | WorkshopsTable | None = None,
) -> HostColumn:
    """The column. ``since`` is the table's mapping, if the database was migrated for it."""
    if name in columns:
        return columns[name]
    if since is not None:
        used = {getattr(since, each) for each in type(since).__dataclass_fields__} | set(_ADOPTABLE[word])
        near = difflib.get_close_matches(name, [each for each in columns if each not in used], n=1, cutoff=0.5)
        alter, ours = f"ALTER TABLE {quoted(table.schema, table.table)}", quoted(name)
        kind = {"title": "text", "created_at": "timestamptz"}.get(setting, "…")
        again = "" if setting == "key" else f". If it was dropped, add it again: {alter} ADD COLUMN {ours} {kind}"
        other = "another column" if setting == "owner" else "another column or to false"
        renew = f". Or set host.{word}.{setting} to {other} (tallystick init writes the settings), and run: "
        renew = "" if setting == "key" else f"{renew}tallystick migrate apply"
        raise HostMismatch(
            f"{table.shown} has no column {name!r} any more, and the ledger's functions use it "
            f"(host.{word}.{setting}). Give it its name back: {alter} RENAME COLUMN "
            f"{quoted(*near) if near else '…'} TO {ours}{again}{renew}",
            table=table.shown,
            column=name,
        )
    raise HostMismatch(
        f"{table.shown} has no column {name!r}{_near(name, columns)} "
        f"Set host.{word}.{setting} in tallystick.toml{', to false if there is none' if setting in _OPTIONAL else ''}, "
        "or run: tallystick init",
        table=table.shown,
        column=name,
    )


def _near(name: str, columns: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, columns, n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else "."


def _serves(given: str, there: str | None, *, migrated: bool) -> bool:
    """True if a key of type ``there`` fits the mapped type ``given``; the ledger may be widened before the key."""
    return there == given or (migrated and given == "bigint" and there in ("smallint", "integer"))


def _check_key(
    word: Word,
    table: HostTable,
    columns: Mapping[str, HostColumn],
    names: UsersTable | WorkshopsTable,
    *,
    migrated: bool,
) -> None:
    name = names.key
    column = _column(word, "key", table, columns, name, since=names if migrated else None)
    if column.key_type is None or column.generated:
        raise HostMismatch(
            f"{table.shown}.{name} is {column.shown}{' (generated)' if column.generated else ''}, which cannot be "
            f"a key here: {KEY_WORDS} can. {_other_keys(word, columns)}",
            table=table.shown,
            column=name,
        )
    if not column.identifies:
        raise HostMismatch(
            f"{table.shown}.{name} is not both NOT NULL and UNIQUE (a partial, deferrable or invalid unique index "
            f"does not count), so it cannot tell rows apart. {_other_keys(word, columns)}",
            table=table.shown,
            column=name,
        )
    for setting, found in column.key_settings.items():
        given = getattr(names, setting)
        if given != found and not (setting == "key_type" and _serves(given, found, migrated=migrated)):
            wanted = "false" if found is None else json.dumps(found, ensure_ascii=False)
            proposed = "" if migrated else ", or run: tallystick init"
            raise HostMismatch(
                f"{table.shown}.{name} is {column.shown}{_collated(column)}, but the configuration says "
                f"{given or 'nothing'}. Set host.{word}.{setting} = {wanted}{proposed}",
                table=table.shown,
                column=name,
            )


def _collated(column: HostColumn) -> str:
    return f" COLLATE {'.'.join(column.collation)}" if column.collation else ""


def _other_keys(word: Word, columns: Mapping[str, HostColumn]) -> str:
    others = [column.name for column in columns.values() if column.identifies]
    if others:
        return f"Set host.{word}.key to one of: {', '.join(others)}"
    return f"Give the table such a column and name it in host.{word}.key"


def _mapped_workshops(
    conn: sa.Connection, mapping: HostMapping, *, migrated: bool, removes: bool, renews: bool
) -> tuple[HostTable | None, Mapping[str, HostColumn]]:
    names = mapping.workshops
    if names is None:
        return None, {}
    table = mapped_table(conn, "workshops", names.schema, names.table, migrated=migrated, removes=removes)
    columns = columns_of(conn, table)
    _check_key("workshops", table, columns, names, migrated=migrated)
    if not removes:
        _check_read_columns(table, columns, mapping, names, migrated=migrated, renews=renews)
    return table, columns


def _check_read_columns(
    table: HostTable,
    columns: Mapping[str, HostColumn],
    mapping: HostMapping,
    names: WorkshopsTable,
    *,
    migrated: bool,
    renews: bool,
) -> None:
    """Check the columns of workshops that the functions only read."""
    since = names if migrated and not renews else None
    owner = _column("workshops", "owner", table, columns, names.owner, since=since)
    users = (mapping.users.schema, mapping.users.table, mapping.users.key)
    refuse_two_integers(users, mapping.users.key_type, table, owner, migrated=migrated)
    if not _serves(mapping.users.key_type, owner.key_type, migrated=migrated) or (
        owner.collation is not None and mapping.users.key_collation not in (None, tuple(owner.collation))
    ):
        raise HostMismatch(
            f"{table.shown}.{names.owner} is {owner.shown}{_collated(owner)}, but users are keyed by "
            f"{mapping.users.key} ({mapping.users.key_type}). Name the column that holds that key in "
            "host.workshops.owner, or the users' column that it holds in host.users.key",
            table=table.shown,
            column=names.owner,
        )
    if names.title:
        _column("workshops", "title", table, columns, names.title, since=since)
    if names.created_at:
        created = _column("workshops", "created_at", table, columns, names.created_at, since=since)
        if created.type not in MOMENTS:
            raise HostMismatch(
                f"{table.shown}.{names.created_at} is {created.shown}, not a timestamp. "
                "Name another column in host.workshops.created_at",
                table=table.shown,
                column=names.created_at,
            )


_WIDER = ("smallint", "integer", "bigint")


def refuse_two_integers(
    users: tuple[str, str, str], key_type: KeyType, table: HostTable, owner: HostColumn, *, migrated: bool
) -> None:
    """Raise HostMismatch where the workshops hold the users' key (schema, table, column) in another size of integer."""
    there = owner.key_type
    if not {key_type, there} <= INTEGER_KEYS or there is None or _serves(key_type, there, migrated=migrated):
        return
    schema, of_users, key = users
    wider = max(key_type, there, key=_WIDER.index)
    narrow = (table.schema, table.table, owner.name) if wider == key_type else users
    raise HostMismatch(
        f"{table.shown}.{owner.name} is {owner.shown}, and {schema}.{of_users}.{key} is {key_type}: both have to be "
        f"of one type. Run ALTER TABLE {quoted(*narrow[:2])} ALTER COLUMN {quoted(narrow[2])} TYPE {wider}, which "
        "rewrites the table while nobody can use it, then try again",
        table=table.shown,
        column=owner.name,
    )


@dataclass(frozen=True)
class _Rule:
    """The condition for adopting a column of ours that the host already has."""

    types: tuple[str, ...]
    expected: str
    nullable: bool = False  # null has a meaning
    zero: bool = False  # integer NOT NULL DEFAULT 0, 0 in all rows: no user has a row of the ledger
    empty: bool = False  # null in all rows
    credits: bool = False  # whole numbers from 0 to the ledger's maximum, or nulls
    distinct: bool = False  # no value twice: it gets a unique index
    length: int = 0


_DIGITS = 8
"""The least number of digits before the point of an adopted balance: numeric(10, 2) is usual."""

_BIGINT = {
    "credit_balance": _Rule(
        ("int8", "numeric"), f"bigint or numeric of {_DIGITS} digits or more, whole numbers from 0", credits=True
    ),
    "credit_held": _Rule(("int8",), "bigint NOT NULL DEFAULT 0", zero=True),
}

_DELETED_AT = _Rule(MOMENTS, "timestamp or timestamptz that may be null", nullable=True)

_ADOPTABLE: Mapping[Word, Mapping[str, _Rule]] = {
    "users": {
        "credit_balance": _Rule(
            ("int4", "int8", "numeric"),
            f"integer, bigint or numeric of {_DIGITS} digits or more, whole numbers from 0",
            credits=True,
        ),
        "credit_sequence": _Rule(("int4",), "integer NOT NULL DEFAULT 0", zero=True),
        "onboarding_complete": _Rule(("bool",), "boolean"),
        "stripe_customer_id": _Rule(
            ("text", "varchar"),
            "text or varchar(32) that may be null, no value twice",
            nullable=True,
            distinct=True,
            length=32,
        ),
        "plan_tier": _Rule(("text", "varchar"), "text or varchar(32)", length=32),
        "updated_at": _Rule(MOMENTS, "timestamp or timestamptz"),
        "deleted_at": _DELETED_AT,
        "credit_held": _Rule(("int4",), "integer NOT NULL DEFAULT 0", zero=True),
        "credit_due_at": _Rule(("timestamptz",), "timestamptz without a value", empty=True),
    },
    "workshops": {
        "credit_consumed_at": _Rule(MOMENTS, "timestamp or timestamptz that may be null", nullable=True),
        "deleted_at": _DELETED_AT,
    },
}


def setting_of(word: Word, ours: str) -> str:
    """The mapping's setting for a column of ours that may have another name."""
    return f"host.{word}.{'balance' if ours == 'credit_balance' else ours}"


def spelled_otherwise(ours: str, names: Iterable[str]) -> list[str]:
    """The names that differ from ``ours`` only in capitals and underscores, as "deletedAt" from deleted_at."""
    return [name for name in names if name != ours and plain(name) == plain(ours)]


@dataclass(frozen=True)
class Unfit:
    """A column that cannot be in the place of one of ours, as it is declared."""

    found: str
    expected: str


def unfit(word: Word, ours: str, column: HostColumn, credits: str = "integer") -> Unfit | None:
    """The reason why the column's declaration keeps it from being adopted in place of ``ours``, or None."""
    rule = _rule(word, ours, credits)
    found = _fault_of_declaration(column, rule)
    return None if found is None else Unfit(found, rule.expected)


def _rule(word: Word, ours: str, credits: str) -> _Rule:
    usual = _ADOPTABLE[word][ours]
    return _BIGINT.get(ours, usual) if credits == "bigint" else usual


def _adoptable(
    conn: sa.Connection,
    word: Word,
    table: HostTable,
    columns: Mapping[str, HostColumn],
    *,
    mapping: HostMapping,
    revision: str | None,
) -> tuple[Adopted, list[IncompatibleColumn]]:
    """Columns of pending revisions that the table has already, and the errors of those that cannot be adopted."""
    coming = {name for each in after(revision) for name in each.columns.get(word, ())}
    names = mapping.by_word[word].adoptable
    adopted: set[tuple[Word, str]] = set()
    faults = []
    for ours in _ADOPTABLE[word]:
        if ours not in coming:
            continue
        rule = _rule(word, ours, mapping.credits)
        name = names.get(ours, ours)
        column = columns.get(name)
        setting = setting_of(word, ours)
        if column is None:
            if name != ours:
                raise HostMismatch(
                    f"{table.shown} has no column {name!r}, which {setting} names"
                    f"{_near(name, columns)} Correct it, or take it out of tallystick.toml: the migration then adds a "
                    f"column {ours}",
                    table=table.shown,
                    column=name,
                )
            continue
        adopted.add((word, ours))
        found = _fault(conn, table, column, rule, mapping)
        if found is not None:
            faults.append(
                _incompatible(table, name, found, rule, ours=ours, setting=setting if ours in names else None)
            )
    return frozenset(adopted), faults


def _incompatible(
    table: HostTable, name: str, found: str, rule: _Rule, *, ours: str, setting: str | None
) -> IncompatibleColumn:
    if name != ours:
        return IncompatibleColumn(
            f"{table.shown}.{name}, which {setting} names, is {found}; Tallystick needs {rule.expected}. Change that, "
            f"name another column there, or take it out of tallystick.toml: the migration then adds a column {ours}",
            table=table.shown,
            column=name,
            found=found,
            expected=rule.expected,
        )
    other = f", or name the column that does in {setting}" if setting else ""
    return IncompatibleColumn(
        f"{table.shown} already has a column {name}: {found}; Tallystick needs {rule.expected}. If it means the same, "
        f"change it to that type and contents{other}. If it means something else, it needs another name: code that "
        f"uses it breaks with ALTER TABLE {table.quoted} RENAME COLUMN {quoted(name)} TO {quoted(f'{name}_before')}, "
        "so deploy code that knows both names first",
        table=table.shown,
        column=name,
        found=found,
        expected=rule.expected,
    )


def _refuse_unadoptable(faults: Sequence[IncompatibleColumn], names_taken: Sequence[str], mapping: HostMapping) -> None:
    """Raise one error for all obstacles."""
    faults_found = [fault.message for fault in faults]
    schema = mapping.users.schema
    if names_taken:
        names = ", ".join(f'"{schema}"."{name}"' for name in names_taken)
        faults_found.append(
            f"the database already has {names}, which Tallystick would make. Let its ledger have a schema of its own: "
            'set ledger_schema = "tallystick" under [host]. Nothing of the app\'s has to be renamed then'
            if mapping.ledger_schema is None
            else f"the database already has {names}, a name that Tallystick needs. No code names an index: rename it, "
            f'as in ALTER INDEX "{schema}"."{names_taken[0]}" RENAME TO "{names_taken[0]}_before"'
        )
    if not faults_found:
        return
    message = ". ".join([*faults_found, "Nothing was changed"])
    if faults:
        first = faults[0]
        raise IncompatibleColumn(
            message, table=first.table, column=first.column, found=first.found, expected=first.expected
        )
    raise HostMismatch(message, table=f"{schema}.{names_taken[0]}")


def _fault(conn: sa.Connection, table: HostTable, column: HostColumn, rule: _Rule, mapping: HostMapping) -> str | None:
    if found := _fault_of_declaration(column, rule):
        return found
    if rule.credits:
        return _credits_fault(conn, table, column, CREDITS_MAX[mapping.credits])
    return _content_fault(conn, table, column, rule)


def _fault_of_declaration(column: HostColumn, rule: _Rule) -> str | None:
    limited = column.modifier != -1
    too_short = limited and rule.length and column.modifier - _HEADER < rule.length
    too_small = limited and rule.credits and column.type == "numeric" and _digits(column.modifier) < _DIGITS
    if column.type not in rule.types or too_short or too_small:
        return column.shown
    if column.generated or (rule.nullable and column.not_null):
        return f"{column.shown} {'GENERATED' if column.generated else 'NOT NULL'}"
    if rule.zero and not column.not_null:
        return f"{column.shown}, nullable"
    if rule.zero and column.default != "0":
        return f"{column.shown} DEFAULT {column.default or 'nothing'}"
    return None


_HEADER = 4  # what PostgreSQL adds to a length, or to precision and scale, in atttypmod


def _digits(modifier: int) -> int:
    """The digits before the point of a numeric."""
    precision, scale = divmod(modifier - _HEADER, 2**16)
    return precision - ((scale & 0x7FF) ^ 0x400) + 0x400  # the scale is a number of 11 bits with a sign


def _credits_fault(conn: sa.Connection, table: HostTable, column: HostColumn, most: int) -> str | None:
    """The balances that the ledger cannot open, with the number of their users."""
    refuse_hidden_rows(conn, [(table.schema, table.table)], f"what is in its column {column.name}")
    live: sa.ColumnClause[Any] = sa.column(column.name, sa.Numeric)
    wrong = {
        "below 0": live < sa.literal_column("0"),
        f"above {most}": live > sa.literal_column(str(most)),
        "not a whole number": sa.func.mod(live, sa.literal_column("1")) != sa.literal_column("0"),
    }
    counts = conn.execute(
        sa.select(*(sa.func.count().filter(fault) for fault in wrong.values())).select_from(
            sa.table(table.table, live, schema=table.schema)
        )
    ).one()
    found = [f"{fault}: {count}" for count, fault in zip(counts, wrong, strict=True) if count]
    return f"{column.shown} with balances that a ledger cannot begin with ({', '.join(found)})" if found else None


def _content_fault(conn: sa.Connection, table: HostTable, column: HostColumn, rule: _Rule) -> str | None:
    live: sa.ColumnClause[Any] = sa.column(column.name)
    rows: sa.Select[Any] = sa.select(sa.literal_column("1")).select_from(
        sa.table(table.table, live, schema=table.schema)
    )
    if rule.zero:
        fault, rows = "with values in it", rows.where(live != sa.literal_column("0"))
    elif rule.empty:
        fault, rows = "with values in it", rows.where(live.is_not(None))
    elif rule.distinct:
        fault = "with the same value twice"
        rows = rows.where(live.is_not(None)).group_by(live).having(sa.func.count() > sa.literal_column("1"))
    else:
        return None
    refuse_hidden_rows(conn, [(table.schema, table.table)], f"what is in its column {column.name}")
    return f"{column.shown} {fault}" if conn.scalar(sa.select(sa.exists(rows))) else None


def taken(conn: sa.Connection, mapping: HostMapping, revision: str | None = None) -> Sequence[str]:
    """Names in the users' schema that revisions after ``revision`` need and that objects of the app have."""
    names = HostNames.of(mapping)
    # in a schema of its own the ledger's names are free; indexes are in their table's schema
    alone = mapping.ledger_schema is not None
    wanted = [name for each in after(revision) for name in (each.indexes(names) if alone else each.creates)]
    return conn.scalars(_TAKEN, {"schema": mapping.users.schema, "names": wanted}).all()


def _check_same_host(conn: sa.Connection, schema: str, users: HostTable, workshops: HostTable | None) -> None:
    """Check that the mapped tables are those that the ledger's foreign keys reference."""
    mapped = {table.oid: table.shown for table in (users, workshops) if table}
    for key in conn.execute(_KEYS, {"schema": schema}):
        if key.oid not in mapped:
            raise HostMismatch(
                f"this database was migrated for {key.table}, which is not {' or '.join(mapped.values())} any more. "
                "Give the table its name back",
                table=key.table,
            )
