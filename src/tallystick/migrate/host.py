"""The host's live tables: what ``tallystick init`` proposes, and the preflight before a migration. Only reads."""

from __future__ import annotations

import difflib
import json
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

import sqlalchemy as sa

from tallystick.config import Config, HostMapping, KeyType, UsersTable, WorkshopsTable
from tallystick.database import translated
from tallystick.errors import (
    HostMismatch,
    IncompatibleColumn,
    LedgerNotEmpty,
    PermissionDenied,
    SchemaError,
    SchemaTooNew,
)
from tallystick.migrate.dependents import breaks_with_more_columns
from tallystick.migrate.revisions import Adopted, Word, revisions
from tallystick.schema import LEDGER, alembic_version, mapping_of, migration_log, refuse_other

OLDEST_SERVER = 140000
_MAX_COLUMNS = 1600

_KEY_FAMILIES: Mapping[str, KeyType] = {
    "uuid": "uuid",
    "text": "text",
    "varchar": "text",
    "bpchar": "char",
    "citext": "citext",
    "int2": "smallint",
    "int4": "integer",
    "int8": "bigint",
}
_MOMENTS = ("timestamp", "timestamptz")

_RELATIONS = sa.text("""
    SELECT c.oid::bigint AS oid, n.nspname AS schema, c.relname AS table, c.relkind::text AS kind,
           c.relpersistence::text AS persistence, r.rolname AS owner,
           pg_has_role(current_user, c.relowner, 'USAGE') AS owned,
           greatest(c.reltuples, 0)::bigint AS rows,
           c.relpages * current_setting('block_size')::bigint AS bytes,
           EXISTS (SELECT FROM pg_inherits i WHERE c.oid IN (i.inhparent, i.inhrelid)) AS inherits,
           (SELECT max(attnum) FROM pg_attribute a WHERE a.attrelid = c.oid) AS columns_ever
    FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace JOIN pg_roles r ON r.oid = c.relowner
    WHERE c.relkind IN ('r', 'p', 'v', 'm', 'f')
      AND n.nspname NOT IN ('pg_catalog', 'information_schema', 'pg_toast', 'tallystick')
      AND n.nspname NOT LIKE 'pg\\_temp\\_%'
    ORDER BY n.nspname, c.relname
""")

_COLUMNS = sa.text("""
    SELECT a.attname AS name, t.typname AS type, format_type(a.atttypid, a.atttypmod) AS shown,
           b.typname AS base, b.schema AS base_schema,
           CASE WHEN a.attcollation NOT IN (0, 100) THEN ARRAY[cn.nspname::text, c.collname::text] END AS collation,
           coalesce(NOT c.collisdeterministic, false) AS nondeterministic,
           a.atttypmod AS modifier, a.attnotnull AS not_null, a.attgenerated <> '' AS generated,
           pg_get_expr(d.adbin, d.adrelid) AS default,
           EXISTS (
             SELECT FROM pg_index i
             WHERE i.indrelid = a.attrelid AND i.indisunique AND i.indisvalid AND i.indimmediate
               AND i.indnkeyatts = 1 AND i.indkey[0] = a.attnum AND i.indpred IS NULL
           ) AS is_unique,
           EXISTS (
             SELECT FROM pg_index i WHERE i.indrelid = a.attrelid AND i.indisprimary AND a.attnum = ANY (i.indkey)
           ) AS is_primary
    FROM pg_attribute a JOIN pg_type t ON t.oid = a.atttypid
    CROSS JOIN LATERAL (
      WITH RECURSIVE base AS (
        SELECT t.oid, t.typtype, t.typbasetype, t.typname, t.typnamespace
        UNION ALL
        SELECT u.oid, u.typtype, u.typbasetype, u.typname, u.typnamespace
        FROM base JOIN pg_type u ON u.oid = base.typbasetype WHERE base.typtype = 'd'
      )
      SELECT base.typname, n.nspname AS schema FROM base JOIN pg_namespace n ON n.oid = base.typnamespace
      WHERE base.typtype <> 'd'
    ) b
    LEFT JOIN pg_collation c ON c.oid = a.attcollation LEFT JOIN pg_namespace cn ON cn.oid = c.collnamespace
    LEFT JOIN pg_attrdef d ON d.adrelid = a.attrelid AND d.adnum = a.attnum
    WHERE a.attrelid = :oid AND a.attnum > 0 AND NOT a.attisdropped
    ORDER BY a.attnum
""")

_REFERENCES = sa.text("""
    SELECT f.attname AS column, t.attname AS key
    FROM pg_constraint c
    JOIN pg_attribute f ON f.attrelid = c.conrelid AND f.attnum = c.conkey[1]
    JOIN pg_attribute t ON t.attrelid = c.confrelid AND t.attnum = c.confkey[1]
    WHERE c.contype = 'f' AND c.conrelid = :from AND c.confrelid = :to AND array_length(c.conkey, 1) = 1
    ORDER BY f.attnum
""")

_TAKEN = sa.text("""
    SELECT taken.name
    FROM (SELECT relname AS name, relnamespace AS schema FROM pg_class
          UNION SELECT typname, typnamespace FROM pg_type) taken
    WHERE taken.schema = to_regnamespace(quote_ident(:schema)) AND taken.name = ANY (:names)
    ORDER BY 1
""")

_OID = sa.text("SELECT to_regclass(quote_ident(:schema) || '.' || quote_ident(:table))::oid::bigint")

_ROLE = sa.text("""
    SELECT current_user AS role, current_database() AS database,
           has_database_privilege(current_database(), 'CREATE') AS database_create,
           coalesce(has_schema_privilege(to_regnamespace(quote_ident(:schema))::oid, 'CREATE'), false)
             AS schema_create,
           current_setting('server_version_num')::int AS version,
           current_setting('server_version') AS version_text,
           pg_is_in_recovery() AS standby,
           to_regnamespace('tallystick') IS NOT NULL AS has_schema,
           to_regclass('tallystick.alembic_version') IS NOT NULL AS has_version
""")


@dataclass(frozen=True)
class HostColumn:
    """A live column: ``type`` as in pg_type, ``shown`` as a person writes it, ``base`` what a domain is over.

    ``collation`` (schema and name) is None where it is the database's.
    """

    name: str
    type: str
    shown: str
    base: str
    base_schema: str
    collation: list[str] | None
    nondeterministic: bool
    modifier: int
    not_null: bool
    generated: bool
    default: str | None
    is_unique: bool
    is_primary: bool

    @property
    def key_type(self) -> KeyType | None:
        """The mapping's word for the type, or None where it cannot be a key."""
        return _KEY_FAMILIES.get(self.base)

    @property
    def key_settings(self) -> dict[str, Any]:
        """The settings of a mapping whose key this column is; it can be one."""
        return {
            "key": self.name,
            "key_type": self.key_type,
            "key_type_schema": self.base_schema if self.base == "citext" else None,
            "key_collation": self.collation and tuple(self.collation),
        }

    @property
    def identifies(self) -> bool:
        """Whether it can be a key of the mapping."""
        return self.not_null and self.is_unique and not self.generated and self.key_type is not None


@dataclass(frozen=True)
class HostTable:
    """A live table: rows and bytes as the server last estimated them."""

    oid: int
    schema: str
    table: str
    kind: str
    persistence: str
    owner: str
    owned: bool
    rows: int
    bytes: int
    inherits: bool
    columns_ever: int

    @property
    def shown(self) -> str:
        """As a person types it."""
        return f"{self.schema}.{self.table}"


@dataclass(frozen=True)
class Host:
    """What the preflight found. ``adopted`` are columns of ours that the host had before revision 0001.

    ``prepared`` is the revision after ``revision`` where its new objects are committed and nothing uses them yet.
    ``missing_privileges`` and ``breaks`` (what of the app's would fail with further columns) stop a run.
    """

    server_version: int
    server: str
    revision: str | None
    users: HostTable
    workshops: HostTable | None
    adopted: Adopted
    missing_privileges: tuple[str, ...] = ()
    prepared: str | None = None
    breaks: tuple[str, ...] = ()

    @property
    def by_word(self) -> dict[Word, HostTable]:
        """The mapped tables, by our words for them."""
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
        """As in ``migration_log``: ``users.updated_at``, by our words for the tables."""
        return tuple(sorted(f"{word}.{column}" for word, column in self.adopted))


# --- the preflight


def examine(conn: sa.Connection, config: Config, *, strict: bool = True) -> Host:
    """Check that this database can be migrated (or is already), before anything is changed.

    With ``strict`` off, missing privileges and what of the app's would break are told in the result, not raised.

    Raises:
        SchemaError: the server is too old, or is a standby.
        HostMismatch: the mapping names what is not there or cannot serve, a name of ours is taken, or something of the
            app's would fail once its tables have further columns.
        IncompatibleColumn: the host has a column of ours that cannot be adopted.
        PermissionDenied: names what to GRANT.
        SchemaTooNew: a later version of Tallystick was here.
    """
    mapping = config.host
    role = conn.execute(_ROLE, {"schema": mapping.users.schema}).one()
    if role.version < OLDEST_SERVER:
        raise SchemaError(f"PostgreSQL {role.version_text} is too old. Tallystick needs 14 or later")
    if role.standby:
        raise SchemaError("this server is a standby and cannot be written to. Use the primary's address")

    revision = current_revision(conn)
    prepared = prepared_revision(conn)
    if revision is not None or prepared is not None:
        refuse_other(mapping_of(conn), mapping)
    users, users_columns = _mapped_users(conn, mapping)
    workshops, workshops_columns = _mapped_workshops(conn, mapping)
    if revision is None:
        if role.has_schema and prepared is None:
            raise HostMismatch(
                'this database has a schema "tallystick" that is not ours. Rename it: '
                "ALTER SCHEMA tallystick RENAME TO tallystick_before",
                table="tallystick",
                column=None,
            )
        taken = _adoptable(conn, "users", users, users_columns, mapping.credits)
        adopted = taken
        if workshops is not None:
            adopted |= _adoptable(conn, "workshops", workshops, workshops_columns, mapping.credits)
        if prepared is None:
            _check_free(conn, mapping)
    else:
        adopted = adopted_columns(conn)
        _check_same_host(conn, users, workshops)

    tables = [table for table in (users, workshops) if table]
    missing = tuple(_missing_privileges(role, mapping, tables, migrated=revision is not None or prepared is not None))
    shaped = [(table.oid, table.schema, table.table) for table in tables]
    breaks = tuple(breaks_with_more_columns(conn, shaped)) if revision is None else ()
    if strict and missing:
        raise PermissionDenied(missing[0], sqlstate="42501")
    if strict and breaks:
        raise HostMismatch(". ".join([*breaks, "Nothing was changed"]), table=users.shown, column=None)
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
    )


@contextmanager
def looking(conn: sa.Connection) -> Iterator[None]:
    """Reading the catalogues of a table waits for whoever holds it exclusively: not for long, and then say so.

    No operator is looked for but PostgreSQL's own, see ``KNOWN_SETTINGS``. Raises Conflict (see
    ``tallystick.database``).
    """
    with translated():
        before = {name: conn.scalar(sa.select(sa.func.current_setting(name))) for name in _LOOKING}
        _set(conn, _LOOKING)
        yield
        _set(conn, before)


def _set(conn: sa.Connection, settings: Mapping[str, str | None]) -> None:
    for name, value in settings.items():
        conn.execute(sa.select(sa.func.set_config(name, value, sa.true())))


_LOOKING = {"lock_timeout": "3s", "search_path": "pg_catalog"}


def mapped_oids(conn: sa.Connection, mapping: HostMapping) -> list[int]:
    """Those of the mapped tables that are there; waits for nobody."""
    tables = [table for table in (mapping.users, mapping.workshops) if table]
    found = (conn.scalar(_OID, {"schema": table.schema, "table": table.table}) for table in tables)
    return [oid for oid in found if oid is not None]


def refuse_rows(conn: sa.Connection, host: Host, how: str) -> None:
    """Raises LedgerNotEmpty where there is history to lose; ``how`` says what loses it on purpose."""
    names = {"schema": host.users.schema, "table": LEDGER}
    _see_every_row(conn, conn.scalar(_OID, names), f"{host.users.schema}.{LEDGER}", "whether it has rows")
    rows = conn.scalar(sa.select(sa.func.count()).select_from(sa.table(LEDGER, schema=host.users.schema)))
    if rows:
        raise LedgerNotEmpty(
            f"the ledger holds {rows} credit transactions, which undo would throw away. Take a backup, then {how}",
            rows=rows,
        )


def _see_every_row(conn: sa.Connection, oid: int | None, table: str, what: str) -> None:
    """Raises PermissionDenied where policies would hide rows from a question about all of them."""
    if conn.scalar(sa.text("SELECT row_security_active(CAST(:oid AS oid))"), {"oid": oid}):
        role = conn.scalar(sa.text("SELECT current_user"))
        raise PermissionDenied(
            f"row level security hides rows of {table} from {role}, so {what} cannot be told. Run this as a role with "
            f"BYPASSRLS, or let the owner run: ALTER TABLE {table} NO FORCE ROW LEVEL SECURITY, and FORCE afterwards. "
            "Nothing was changed",
            sqlstate="42501",
        )


def current_revision(conn: sa.Connection) -> str | None:
    """Where the database stands, None before revision 0001. Raises SchemaTooNew."""
    if conn.scalar(sa.text("SELECT to_regclass('tallystick.alembic_version')")) is None:
        return None
    return _known(conn.scalar(sa.select(alembic_version.c.version_num)), "at")


def prepared_revision(conn: sa.Connection) -> str | None:
    """The revision of which only the new objects are there, if any. Raises SchemaTooNew."""
    if conn.scalar(sa.text("SELECT to_regclass('tallystick.migration_log')")) is None:
        return None
    rows = sa.select(migration_log.c.revision).where(migration_log.c.direction == "prepare")
    return _known(conn.scalar(rows), "on the way to")


def _known(found: str | None, where: str) -> str | None:
    known = [revision.revision for revision in revisions()]
    if found is not None and found not in known:
        raise SchemaTooNew(
            f"this database is {where} revision {found}, this package knows {known[-1]}. "
            "Run: pip install -U tallystick",
            revision=found,
        )
    return found


def adopted_columns(conn: sa.Connection) -> Adopted:
    """The columns that revision 0001 found and left as they were."""
    rows = conn.scalars(
        sa.select(migration_log.c.adopted).where(
            migration_log.c.revision == revisions()[0].revision, migration_log.c.direction == "apply"
        )
    )
    pairs = (name.split(".", 1) for row in rows for name in row)
    return frozenset((cast("Word", word), column) for word, column in pairs)


def _missing_privileges(
    role: sa.Row[Any], mapping: HostMapping, tables: Sequence[HostTable], *, migrated: bool
) -> Iterator[str]:
    """Each as a sentence that ends with what to GRANT."""
    for table in tables:
        if not table.owned:
            yield (
                f"{role.role} does not own {table.shown}. Connect as {table.owner}, "
                f'or let an administrator run: GRANT "{table.owner}" TO "{role.role}"'
            )
    if not migrated and not role.database_create:
        yield (
            f"{role.role} may not create the schema tallystick. Let an administrator run: "
            f'GRANT CREATE ON DATABASE "{role.database}" TO "{role.role}"'
        )
    if not role.schema_create:
        yield (
            f"{role.role} may not create tables in schema {mapping.users.schema}. Let an administrator run: "
            f'GRANT CREATE ON SCHEMA "{mapping.users.schema}" TO "{role.role}"'
        )


def _mapped_users(conn: sa.Connection, mapping: HostMapping) -> tuple[HostTable, Mapping[str, HostColumn]]:
    names = mapping.users
    table = _mapped(conn, "users", names.schema, names.table)
    columns = _columns(conn, table)
    _check_key("users", table, columns, names)
    if names.email:
        _column("users", "email", table, columns, names.email)
    return table, columns


def _mapped(conn: sa.Connection, word: Word, schema: str, name: str) -> HostTable:
    everything = _tables(conn)
    table = next((t for t in everything if (t.schema, t.table) == (schema, name)), None)
    where = f"host.{word}"
    if table is None:
        near = difflib.get_close_matches(f"{schema}.{name}", [t.shown for t in everything], n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}? Set it under [{where}]" if near else "name it"
        raise HostMismatch(
            f"there is no table {schema}.{name}; {hint} in tallystick.toml, or run: tallystick init",
            table=f"{schema}.{name}",
            column=None,
        )
    fault = _unsuitable(table)
    if fault:
        raise HostMismatch(f"{table.shown} {fault}. Name another table under [{where}]", table=table.shown, column=None)
    if table.columns_ever + 10 > _MAX_COLUMNS:
        raise HostMismatch(
            f"{table.shown} has had {table.columns_ever} columns, dropped ones included; "
            f"PostgreSQL allows {_MAX_COLUMNS} in a table's life. Copy it into a new table first",
            table=table.shown,
            column=None,
        )
    return table


def _unsuitable(table: HostTable) -> str | None:
    if table.kind in "vm":
        return "is a view; credits need the table behind it"
    if table.kind == "f":
        return "is a foreign table; nothing can reference it"
    if table.kind == "p" or table.inherits:
        return "is partitioned (or inherits); no index can be built on it concurrently"
    if table.persistence != "p":
        return "is unlogged; a ledger cannot reference it. Run ALTER TABLE … SET LOGGED first"
    return None


_OPTIONAL = ("email", "title", "created_at")


def _column(word: Word, setting: str, table: HostTable, columns: Mapping[str, HostColumn], name: str) -> HostColumn:
    if name in columns:
        return columns[name]
    near = difflib.get_close_matches(name, columns, n=1, cutoff=0.5)
    raise HostMismatch(
        f"{table.shown} has no column {name!r}{f'; did you mean {near[0]!r}?' if near else '.'} "
        f"Set host.{word}.{setting} in tallystick.toml{', to false if there is none' if setting in _OPTIONAL else ''}",
        table=table.shown,
        column=name,
    )


def _check_key(
    word: Word, table: HostTable, columns: Mapping[str, HostColumn], names: UsersTable | WorkshopsTable
) -> None:
    name = names.key
    column = _column(word, "key", table, columns, name)
    if column.key_type is None or column.generated:
        raise HostMismatch(
            f"{table.shown}.{name} is {column.shown}{' (generated)' if column.generated else ''}, which cannot be "
            f"a key here: {_KEY_WORDS} can. {_other_keys(word, columns)}",
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
        if given != found:
            wanted = "false" if found is None else json.dumps(found, ensure_ascii=False)
            raise HostMismatch(
                f"{table.shown}.{name} is {column.shown}{_collated(column)}, but the configuration says "
                f"{given or 'nothing'}. Set host.{word}.{setting} = {wanted}",
                table=table.shown,
                column=name,
            )


_KEY_WORDS = "uuid, text, varchar, char, citext, smallint, integer and bigint"


def _collated(column: HostColumn) -> str:
    return f" COLLATE {'.'.join(column.collation)}" if column.collation else ""


def _other_keys(word: Word, columns: Mapping[str, HostColumn]) -> str:
    others = [column.name for column in columns.values() if column.identifies]
    if others:
        return f"Set host.{word}.key to one of: {', '.join(others)}"
    return f"Give the table such a column and name it in host.{word}.key"


def _mapped_workshops(conn: sa.Connection, mapping: HostMapping) -> tuple[HostTable | None, Mapping[str, HostColumn]]:
    names = mapping.workshops
    if names is None:
        return None, {}
    table = _mapped(conn, "workshops", names.schema, names.table)
    columns = _columns(conn, table)
    _check_key("workshops", table, columns, names)
    owner = _column("workshops", "owner", table, columns, names.owner)
    if owner.key_type != mapping.users.key_type or (
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
        _column("workshops", "title", table, columns, names.title)
    if names.created_at:
        created = _column("workshops", "created_at", table, columns, names.created_at)
        if created.type not in _MOMENTS:
            raise HostMismatch(
                f"{table.shown}.{names.created_at} is {created.shown}, not a timestamp. "
                "Name another column in host.workshops.created_at",
                table=table.shown,
                column=names.created_at,
            )
    return table, columns


@dataclass(frozen=True)
class _Rule:
    """When a column of ours that the host already has can be used as it is."""

    types: tuple[str, ...]
    expected: str
    zero: bool = False  # integer NOT NULL DEFAULT 0, all rows 0: every user starts at nothing
    empty: bool = False  # all rows null: no workshop is unlocked without a ledger row
    distinct: bool = False  # no value twice: a unique index follows
    not_null: bool = False
    length: int = 0


_BIGINT = _Rule(("int8",), "bigint NOT NULL DEFAULT 0", zero=True)

_ADOPTABLE: Mapping[Word, Mapping[str, _Rule]] = {
    "users": {
        "credit_balance": _Rule(("int4",), "integer NOT NULL DEFAULT 0", zero=True),
        "credit_sequence": _Rule(("int4",), "integer NOT NULL DEFAULT 0", zero=True),
        "onboarding_complete": _Rule(("bool",), "boolean NOT NULL", not_null=True),
        "stripe_customer_id": _Rule(("text", "varchar"), "text or varchar, no value twice", distinct=True),
        "plan_tier": _Rule(("text", "varchar"), "text or varchar(32)", length=32),
        "updated_at": _Rule(_MOMENTS, "timestamp or timestamptz"),
        "deleted_at": _Rule(_MOMENTS, "timestamp or timestamptz"),
    },
    "workshops": {
        "credit_consumed_at": _Rule(("timestamptz",), "timestamptz", empty=True),
        "deleted_at": _Rule(_MOMENTS, "timestamp or timestamptz"),
    },
}


def _adoptable(
    conn: sa.Connection, word: Word, table: HostTable, columns: Mapping[str, HostColumn], credits: str
) -> frozenset[tuple[Word, str]]:
    adopted = set()
    for name, usual in _ADOPTABLE[word].items():
        rule = _BIGINT if (name, credits) == ("credit_balance", "bigint") else usual
        column = columns.get(name)
        if column is None:
            continue
        found = _fault(conn, table, column, rule)
        if found is not None:
            raise IncompatibleColumn(
                f"{table.shown} already has a column {name}: {found}; Tallystick needs {rule.expected}. "
                f"If it means something else, rename it (ALTER TABLE … RENAME COLUMN {name} TO {name}_before); "
                "if it means the same, change it to that type and contents. Nothing was changed",
                table=table.shown,
                column=name,
                found=found,
                expected=rule.expected,
            )
        adopted.add((word, name))
    return frozenset(adopted)


def _fault(conn: sa.Connection, table: HostTable, column: HostColumn, rule: _Rule) -> str | None:
    too_short = rule.length and column.modifier != -1 and column.modifier - 4 < rule.length
    if column.type not in rule.types or too_short:
        return column.shown
    if column.generated:
        return f"{column.shown} GENERATED"
    if (rule.not_null or rule.zero) and not column.not_null:
        return f"{column.shown}, nullable"
    if rule.zero and column.default != "0":
        return f"{column.shown} DEFAULT {column.default or 'nothing'}"
    return _content_fault(conn, table, column, rule)


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
    _see_every_row(conn, table.oid, table.shown, f"what is in its column {column.name}")
    return f"{column.shown} {fault}" if conn.scalar(sa.select(sa.exists(rows))) else None


def _check_free(conn: sa.Connection, mapping: HostMapping) -> None:
    schema = mapping.users.schema
    names = [name for revision in revisions() for name in revision.creates]
    taken = conn.scalars(_TAKEN, {"schema": schema, "names": names}).all()
    if taken:
        name = LEDGER if LEDGER in taken else taken[0]
        raise HostMismatch(
            f'the database already has "{schema}"."{name}", a name that Tallystick needs. Rename what is there '
            f'(ALTER {"TABLE" if name == LEDGER else "…"} "{schema}"."{name}" RENAME TO "{name}_before"). '
            "Nothing was changed",
            table=f"{schema}.{name}",
            column=None,
        )


def _check_same_host(conn: sa.Connection, users: HostTable, workshops: HostTable | None) -> None:
    """The ledger's foreign keys say which tables were migrated; another one with such a name is a mistake."""
    mapped = {table.oid: table.shown for table in (users, workshops) if table}
    for key in conn.execute(_KEYS, {"schema": users.schema}):
        if key.oid not in mapped:
            raise HostMismatch(
                f"this database was migrated for {key.table}, which is not {' or '.join(mapped.values())} any more. "
                "Give the table its name back",
                table=key.table,
                column=None,
            )


_KEYS = sa.text("""
    SELECT conname AS name, confrelid::bigint AS oid, confrelid::regclass::text AS table FROM pg_constraint
    WHERE conrelid = to_regclass(quote_ident(:schema) || '.credit_transactions')
      AND conname IN ('credit_transactions_user_fk', 'credit_transactions_workshop_fk')
""")

# --- the proposal

_USERS = ("users", "user", "app_users", "app_user", "accounts", "account", "members", "customers", "profiles")
_WORKSHOPS = ("workshops", "workshop")
_OWNERS = ("user_id", "owner_id", "userid", "ownerid", "owner", "user", "created_by", "author_id", "clerk_user_id")
_TITLES = ("title", "name", "subject", "heading", "topic")
_CREATED = ("created_at", "createdat", "created", "created_on", "inserted_at", "date_created")
_EMAILS = ("email", "email_address", "emailaddress", "mail")


def propose(
    conn: sa.Connection,
    users: str | None = None,
    workshops: str | None = None,
    users_key: str | None = None,
    *,
    credits: Literal["integer", "bigint"] | None = None,
) -> HostMapping:
    """A mapping for this database, from what its tables are called and how they refer to each other.

    Args:
        conn: only read from.
        users: which table, as ``table`` or ``schema.table``, where the guess would be wrong.
        workshops: likewise; the default is a table named workshop(s), or none. ``"none"`` is none, whatever there is.
        users_key: which column of the users is their key, where it is not the primary one.
        credits: the type of a number of credits, ``integer`` unless it says another.

    A database that is migrated has its mapping, which is given back.

    Raises:
        HostMismatch: no table, or more than one, could be meant; the message says what to type. Or the database was
            migrated for another mapping than the one that is asked for.
    """
    with looking(conn):
        stored = mapping_of(conn) if current_revision(conn) or prepared_revision(conn) else None
        if stored is not None and users is workshops is users_key is credits is None:
            return stored
        found = replace(_propose(conn, users, workshops, users_key), credits=credits or "integer")
        if stored is not None:
            refuse_other(stored, found)
        return found


def other_than_primary(conn: sa.Connection, mapping: HostMapping) -> str | None:
    """The primary key of the users, where the mapping names another column as their key."""
    table = _mapped(conn, "users", mapping.users.schema, mapping.users.table)
    primary = [column.name for column in _columns(conn, table).values() if column.is_primary]
    return None if not primary or primary == [mapping.users.key] else ", ".join(primary)


def _propose(conn: sa.Connection, users: str | None, workshops: str | None, users_key: str | None) -> HostMapping:
    everything = _tables(conn)
    users_table = _find("users", everything, users, _USERS)
    if users_table is None:
        tables = ", ".join(t.shown for t in everything if not _unsuitable(t))
        then = "Say which: --users schema.table" if tables else "Make the app's own first, or check the address"
        raise HostMismatch(
            f"no table looks like users (there are: {tables or 'none at all'}). {then}",
            table="users",
            column=None,
        )
    columns = _columns(conn, users_table)
    keys = [column for column in columns.values() if column.identifies]
    if not keys:
        raise HostMismatch(
            f"{users_table.shown} has no column that is NOT NULL, UNIQUE and of a type that can be a key "
            f"({_KEY_WORDS}). Give it one, or say another table: --users schema.table",
            table=users_table.shown,
            column=None,
        )
    key = _users_key(users_table, columns, keys, users_key)
    workshops_table = None if workshops == "none" else _find("workshops", everything, workshops, _WORKSHOPS)
    found = None
    if workshops_table is not None:
        asked = [key] if users_key is not None else keys
        key, found = _propose_workshops(conn, users_table, asked, key, workshops_table)
    return HostMapping(
        users=UsersTable(
            schema=users_table.schema,
            table=users_table.table,
            **key.key_settings,
            email=_pick(columns.values(), _EMAILS, ("text", "varchar", "citext")),
        ),
        workshops=found,
    )


def _users_key(
    table: HostTable, columns: Mapping[str, HostColumn], keys: Sequence[HostColumn], asked: str | None
) -> HostColumn:
    """The primary key, or what was asked for; never another column in its place without a word."""
    found = [column for column in keys if (column.name == asked if asked is not None else column.is_primary)]
    primary = [f"{column.name} ({column.shown})" for column in columns.values() if column.is_primary]
    if not found and (asked is not None or primary or len(keys) > 1):
        cause = f"{asked} is none of its keys" if asked is not None else "it has no primary key"
        if asked is None and primary:
            cause = f"its primary key {', '.join(primary)} cannot be a key here ({_KEY_WORDS} of one column can)"
        others = " or ".join(f"--users-key {shlex.quote(column.name)}" for column in keys)
        raise HostMismatch(
            f"by which column of {table.shown} users are known cannot be told: {cause}. Say which: {others}",
            table=table.shown,
            column=asked,
        )
    return (found or list(keys))[0]


def _propose_workshops(
    conn: sa.Connection, users: HostTable, keys: Sequence[HostColumn], primary: HostColumn, table: HostTable
) -> tuple[HostColumn, WorkshopsTable]:
    """The workshops, and the users' key that they name their owner by."""
    columns = _columns(conn, table)
    key = next(
        (c for c in sorted(columns.values(), key=lambda c: not c.is_primary) if c.identifies),
        None,
    )
    if key is None:
        raise HostMismatch(
            f"{table.shown} has no column that is NOT NULL, UNIQUE and of a type that can be a key ({_KEY_WORDS}). "
            "Give it one, or say another table: --workshops schema.table",
            table=table.shown,
            column=None,
        )
    by_name = {candidate.name: candidate for candidate in keys}
    references = {
        row.column: by_name[row.key]
        for row in conn.execute(_REFERENCES, {"from": table.oid, "to": users.oid})
        if row.key in by_name
    }
    owner = next((name for name in _ranked(references, _OWNERS)), None)
    if owner is not None:
        users_key = references[owner]
    else:
        # No foreign key: a column called like a users' key, or by a usual name with a key's type.
        like_a_key = [name for name in by_name if name in columns and name not in (key.name, primary.name)]
        usual = [name for name in columns if name.lower() in _OWNERS]
        matches = [
            (name, candidate)
            for name in (*like_a_key, *_ranked(usual, _OWNERS))
            for candidate in sorted(keys, key=lambda c: (c.name != name, not c.is_primary))
            if columns[name].key_type == candidate.key_type
        ]
        if not matches:
            raise HostMismatch(
                f"no column of {table.shown} refers to {users.shown}. Say which table holds what a credit unlocks "
                "(--workshops schema.table), or write host.workshops.owner into tallystick.toml by hand",
                table=table.shown,
                column=None,
            )
        owner, users_key = matches[0]
    return users_key, WorkshopsTable(
        schema=table.schema,
        table=table.table,
        **key.key_settings,
        owner=owner,
        title=_pick(columns.values(), _TITLES, ("text", "varchar")),
        created_at=_pick(columns.values(), _CREATED, _MOMENTS),
    )


def _find(word: Word, everything: Sequence[HostTable], asked: str | None, usual: Sequence[str]) -> HostTable | None:
    if asked is not None:
        found = [t for t in everything if asked in (t.table, t.shown, f'{t.schema}."{t.table}"', f'"{t.table}"')]
    else:
        suitable = [t for t in everything if not _unsuitable(t) and t.table.lower() in usual]
        best = min((usual.index(t.table.lower()) for t in suitable), default=None)
        found = [t for t in suitable if usual.index(t.table.lower()) == best]
    if len(found) > 1:
        # the app's own table beats one of an extension or an auth service
        found = [t for t in found if t.schema == "public"] or found
    if len(found) > 1:
        raise HostMismatch(
            f"more than one table could be {word}: {', '.join(t.shown for t in found)}. "
            f"Say which: --{word} {found[0].shown}",
            table=word,
            column=None,
        )
    if asked is not None and not found:
        near = difflib.get_close_matches(
            asked, [name for t in everything for name in (t.table, t.shown)], n=1, cutoff=0.5
        )
        raise HostMismatch(
            f"there is no table {asked}{f'; did you mean {near[0]}?' if near else '.'} Say which: --{word} …",
            table=asked,
            column=None,
        )
    if found and (fault := _unsuitable(found[0])):
        raise HostMismatch(
            f"{found[0].shown} {fault}. Say another: --{word} schema.table", table=found[0].shown, column=None
        )
    return found[0] if found else None


def _ranked(names: Iterable[str], usual: Sequence[str]) -> list[str]:
    return sorted(names, key=lambda n: usual.index(n.lower()) if n.lower() in usual else len(usual))


def _pick(columns: Iterable[HostColumn], usual: Sequence[str], types: Sequence[str]) -> str | None:
    fitting = [c.name for c in columns if c.name.lower() in usual and c.type in types]
    return _ranked(fitting, usual)[0] if fitting else None


def _tables(conn: sa.Connection) -> list[HostTable]:
    return [HostTable(**cast("Any", row)) for row in conn.execute(_RELATIONS).mappings()]


def _columns(conn: sa.Connection, table: HostTable) -> dict[str, HostColumn]:
    rows = conn.execute(_COLUMNS, {"oid": table.oid}).mappings()
    return {row["name"]: HostColumn(**cast("Any", row)) for row in rows}
