"""Tables and columns, from the server's catalogues. Only reads."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import sqlalchemy as sa
from psycopg.sql import Identifier
from sqlalchemy.dialects import postgresql as pg

from tallystick.config import HostMapping, KeyType
from tallystick.database import translated
from tallystick.errors import Conflict
from tallystick.migrate.host.blockers import locked_by

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
MOMENTS = ("timestamp", "timestamptz")

KEY_WORDS = "uuid, text, varchar, char, citext, smallint, integer and bigint"

_RELATIONS = sa.text("""
    SELECT c.oid::bigint AS oid, n.nspname AS schema, c.relname AS table, c.relkind::text AS kind,
           c.relpersistence::text AS persistence, r.rolname AS owner,
           pg_has_role(current_user, c.relowner, 'USAGE') AS owned,
           greatest(c.reltuples, 0)::bigint AS rows,
           c.relpages * current_setting('block_size')::bigint AS bytes,
           EXISTS (SELECT FROM pg_inherits i WHERE c.oid IN (i.inhparent, i.inhrelid)) AS inherits,
           (SELECT max(attnum) FROM pg_attribute a WHERE a.attrelid = c.oid) AS columns_ever,
           pg_has_role(current_user, c.relowner, 'MEMBER') AS member, c.reloftype <> 0 AS typed
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

_OIDS_OF = sa.text("""
    SELECT to_regclass(name)::oid FROM unnest(CAST(:names AS text[])) name WHERE to_regclass(name) IS NOT NULL
""")
_OIDS_IN = sa.text("""
    SELECT c.relname AS name, c.oid::bigint AS oid FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
    WHERE n.nspname = :schema AND c.relname = ANY (CAST(:tables AS text[]))
""")


@dataclass(frozen=True)
class HostColumn:
    """A live column: ``type`` as in pg_type, ``shown`` as a person writes it, ``base`` the base type of a domain.

    ``collation`` (schema and name) is None if it is the database's.
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
        """The mapping's name of the type, or None if it cannot be a key."""
        return _KEY_FAMILIES.get(self.base)

    @property
    def key_settings(self) -> dict[str, Any]:
        """The settings of a mapping with this column as its key."""
        return {
            "key": self.name,
            "key_type": self.key_type,
            "key_type_schema": self.base_schema if self.base == "citext" else None,
            "key_collation": self.collation and tuple(self.collation),
        }

    @property
    def identifies(self) -> bool:
        """True if it can be a key of the mapping."""
        return self.not_null and self.is_unique and not self.generated and self.key_type is not None


@dataclass(frozen=True)
class HostTable:
    """A live table, with the server's last estimate of its rows and bytes.

    A role that is a ``member`` of the owner, and does not inherit, does not have it ``owned``. A ``typed`` one is OF a
    composite type.
    """

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
    member: bool
    typed: bool

    @property
    def shown(self) -> str:
        """As a person types it."""
        return f"{self.schema}.{self.table}"

    @property
    def quoted(self) -> str:
        """As SQL has it."""
        return quoted(self.schema, self.table)


def quoted(*names: str) -> str:
    """A name as SQL has it, each part quoted where it needs it."""
    return ".".join(map(_PREPARER.quote, names))


def plain(name: str) -> str:
    """Without capitals and underscores: "creditBalance" and credit_balance are one name, made by two tools."""
    return name.replace("_", "").lower()


def host_tables(conn: sa.Connection) -> list[HostTable]:
    """All tables and views except the system's and ours."""
    return [HostTable(**cast("Any", row)) for row in conn.execute(_RELATIONS).mappings()]


def columns_of(conn: sa.Connection, table: HostTable) -> dict[str, HostColumn]:
    """The columns of a table by name, in their order."""
    rows = conn.execute(_COLUMNS, {"oid": table.oid}).mappings()
    return {row["name"]: HostColumn(**cast("Any", row)) for row in rows}


def unsuitable(table: HostTable) -> str | None:
    """The reason why the ledger cannot reference this table, or None if it can."""
    if table.kind in "vm":
        return "is a view; credits need the table behind it"
    if table.kind == "f":
        return "is a foreign table; nothing can reference it"
    if table.kind == "p" or table.inherits:
        return "is partitioned (or inherits); no index can be built on it concurrently"
    if table.persistence != "p":
        return f"is unlogged; a ledger cannot reference it. Run ALTER TABLE {table.quoted} SET LOGGED first"
    if table.typed:
        return f"is a typed table; it gets no column of its own. Run ALTER TABLE {table.quoted} NOT OF first"
    return None


def oid_of(conn: sa.Connection, schema: str, table: str) -> int | None:
    """The oid of a table, None if it does not exist."""
    return oids_in(conn, schema, [table]).get(table)


def oids_in(conn: sa.Connection, schema: str, tables: Iterable[str]) -> dict[str, int]:
    """Name → oid of those of ``tables`` that exist."""
    return {row.name: row.oid for row in conn.execute(_OIDS_IN, {"schema": schema, "tables": list(tables)})}


def oids_of(conn: sa.Connection, tables: Iterable[Identifier]) -> list[int]:
    """Object ids of the tables that exist already; takes no lock."""
    names = [table.as_string(None) for table in tables]
    return list(conn.scalars(_OIDS_OF, {"names": names}))


def mapped_oids(conn: sa.Connection, mapping: HostMapping) -> list[int]:
    """Object ids of the mapped tables that exist; takes no lock."""
    found = (oid_of(conn, table.schema, table.table) for table in mapping.by_word.values())
    return [oid for oid in found if oid is not None]


@contextmanager
def reading_catalogues(conn: sa.Connection) -> Iterator[None]:
    """Set a short lock timeout for reading a table's catalogues, which waits for an exclusive lock on it.

    Names in a definition are quoted only where they need it. Only PostgreSQL's own operators are used, see
    ``KNOWN_SETTINGS``. Raises Conflict, which names the sessions that hold such a lock (see ``tallystick.database``).
    """
    try:
        with translated():
            current = sa.func.pg_catalog.current_setting
            before = conn.execute(sa.select(*(current(name).label(name) for name in _READING))).one()._asdict()
            _set(conn, _READING)
            yield
            _set(conn, before)
    except Conflict as error:
        if error.sqlstate == "55P03" and (who := locked_by(conn)):
            raise Conflict(
                f"another transaction keeps a table's definition from being read. In the way: {who}. This statement "
                "wrote nothing; roll back, and run it again when that has ended",
                sqlstate=error.sqlstate,
            ) from error
        raise


def _set(conn: sa.Connection, settings: Mapping[str, str | None]) -> None:
    set_config = sa.func.pg_catalog.set_config
    conn.execute(sa.select(*(set_config(name, value, sa.true()) for name, value in settings.items())))


_PREPARER = pg.dialect(paramstyle="named").identifier_preparer  # type: ignore[no-untyped-call]  # it does not double a %
_READING = {
    "lock_timeout": "3s",
    "search_path": "pg_catalog",
    "quote_all_identifiers": "off",
    "jit": "off",  # it compiles a search of the catalogue for longer than the search takes
}
