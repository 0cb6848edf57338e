"""Rows of users and workshops in an app's own tables, with plausible values for all other required columns."""

from __future__ import annotations

import datetime as dt
import hashlib
import ipaddress
import uuid
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql as pg
from sqlalchemy.exc import DBAPIError, SAWarning

from tallystick.config import UsersTable, WorkshopsTable
from tallystick.declared_tables import Schema
from tallystick.errors import Key, SeedImpossible

INTEGER_KEYS_FROM = -2_000_000_000
"""Keys of users and workshops that are integer or bigint begin below this, far from any sequence."""

_KEY_RULES = sa.text("""
    WITH RECURSIVE key AS (
      SELECT attrelid, attnum, atttypid FROM pg_attribute
      WHERE attrelid = to_regclass(quote_ident(:schema) || '.' || quote_ident(:table)) AND attname = :key
    ), types AS (
      SELECT atttypid AS oid FROM key UNION SELECT t.typbasetype FROM types JOIN pg_type t USING (oid)
    )
    SELECT c.conname::text FROM pg_constraint c
    WHERE c.contype = 'c' AND (c.contypid IN (SELECT oid FROM types WHERE oid <> 0)
      OR EXISTS (SELECT FROM key WHERE attrelid = c.conrelid AND attnum = ANY (c.conkey)))
""")
"""Names of the CHECK constraints of a table's key, also of those of its domain."""

_REFERENCES = sa.text("""
    SELECT c.conname::text AS name, n.nspname::text AS referred_schema, t.relname::text AS referred_table,
      ARRAY(SELECT a.attname::text FROM unnest(c.conkey) WITH ORDINALITY AS k (number, place)
        JOIN pg_attribute a ON a.attrelid = c.conrelid AND a.attnum = k.number ORDER BY k.place) AS constrained_columns,
      ARRAY(SELECT a.attname::text FROM unnest(c.confkey) WITH ORDINALITY AS k (number, place)
        JOIN pg_attribute a ON a.attrelid = c.confrelid AND a.attnum = k.number ORDER BY k.place) AS referred_columns
    FROM pg_constraint c JOIN pg_class t ON t.oid = c.confrelid JOIN pg_namespace n ON n.oid = t.relnamespace
    WHERE c.contype = 'f' AND c.conrelid = to_regclass(quote_ident(:schema) || '.' || quote_ident(:table))
    ORDER BY c.conname
""")
"""The foreign keys of a table. SQLAlchemy's inspector reads none whose names have a comma or a newline."""

_NAMESPACE = uuid.UUID("5eed7a11-0000-5000-8000-000000000000")


@dataclass(frozen=True, slots=True)
class HostFault:
    """A refusal by a rule of the host: a constraint, a type, or a trigger that raises."""

    table: str
    column: str | None
    constraint: str | None
    message: str

    @staticmethod
    def of(error: DBAPIError) -> HostFault | None:
        """Read a driver's error; None if it is not about the values."""
        state = getattr(error.orig, "sqlstate", None) or ""
        if state[:2] not in ("22", "23") and state != "P0001":
            return None
        diagnostics = getattr(error.orig, "diag")  # noqa: B009 - psycopg's, since it has an sqlstate
        table = ".".join(part for part in (diagnostics.schema_name, diagnostics.table_name) if part)
        text = (
            f"{diagnostics.message_primary} ({diagnostics.message_detail})"
            if diagnostics.message_detail
            else diagnostics.message_primary
        )
        if diagnostics.table_name is None:  # a domain's rule
            table = ".".join(part for part in (diagnostics.schema_name, diagnostics.datatype_name) if part)
        return HostFault(table or "the host's tables", diagnostics.column_name, diagnostics.constraint_name, text)


@dataclass(frozen=True, slots=True)
class HostRow:
    """A row to be made. ``label`` and ``number`` are unique; ``text`` is for people."""

    label: str
    number: int
    text: str

    def key(self, key_type: str, kind: Literal["user", "workshop"]) -> Key:
        """The row's key, always the same for the same row."""
        match key_type:
            case "uuid":
                return uuid.uuid5(_NAMESPACE, f"{kind}:{self.label}")
            case "text" | "char" | "citext":
                return self.label
            case "smallint":
                return -1 - self.number % 2**15
            case _:
                return INTEGER_KEYS_FROM - self.number

    def value(self, kind: sa.types.TypeEngine[Any], column: str, *, unique: bool) -> Any:
        """A plausible value of a type, always the same for the same row; None for a type that is not known."""
        made: Any = next((constant for known, constant in _CONSTANTS if isinstance(kind, known)), None)
        match kind:
            case pg.DOMAIN():
                made = self.value(kind.data_type, column, unique=unique)
            case sa.Enum():
                made = next(iter(kind.enums), None)
            case sa.Uuid():
                made = uuid.uuid5(_NAMESPACE, f"{column}:{self.label}")
            case sa.DateTime() | sa.Date() | sa.Time():
                made = _moment(kind, dt.datetime.now(dt.UTC))
            case sa.Integer() | sa.Numeric() | sa.Float():
                made = self._number(kind, unique=unique)
            case sa.String():
                made = self._words(kind, column.lower(), unique=unique)
            case sa.LargeBinary():
                made = self.label.encode()
        return made

    def _number(self, kind: sa.types.TypeEngine[Any], *, unique: bool) -> int:
        if unique:
            return -INTEGER_KEYS_FROM + self.number
        fraction = isinstance(kind, sa.Numeric) and kind.precision is not None and kind.precision == kind.scale
        return 0 if fraction else 1  # 1 is too large for numeric(3, 3)

    def _words(self, kind: sa.String, column: str, *, unique: bool) -> str:
        if "email" in column:
            return _fit(kind, f"{self.label}@example.com")
        if "name" in column and not unique:
            return _fit(kind, self.text, cut=True)
        return _fit(kind, self.label)


class HostTables:
    """An app's tables, to which it adds users and workshops on any connection to a database like that of ``conn``."""

    def __init__(self, conn: sa.Connection, schema: Schema) -> None:
        self.schema = schema
        users, workshops = schema.host.users, schema.host.workshops
        self.users = _HostTable(conn, users, {users.key, users.email or users.key}, None, with_parents=True)
        self.workshops: _HostTable | None = None
        if workshops is not None:
            given = {workshops.key, workshops.owner, workshops.title, workshops.created_at}
            self.workshops = _HostTable(conn, workshops, {name for name in given if name}, schema.users)

    def insert_user(self, conn: sa.Connection, row: HostRow, *, key: Key | None) -> Key:
        """Add a user with ``key``; with None, the column's default, or else the row's own key."""
        names = self.schema.host.users
        values = self._keyed(self.users, row.key(names.key_type, "user"), key)
        if names.email and names.email != names.key:
            values[names.email] = self.users.fitted(names.email, f"{row.label}@example.com")
        for parent in self.users.parents:
            if parent.column == self.users.key:
                values.setdefault(parent.column, row.key(names.key_type, "user"))
            values.setdefault(parent.column, parent.value(row))
            parent.rows.insert(conn, parent.rows.row(conn, row, {parent.rows.key: values[parent.column]}, None))
        # a trigger on the row that it references may have made it, as in Supabase's guide
        made = self.users.table.c[self.users.key]
        there: Key | None = values.get(self.users.key)
        if there is not None and self.users.parents and conn.scalar(sa.select(made).where(made == there)) is not None:
            return there
        return self.users.insert(conn, self.users.row(conn, row, values, None))

    def forget_parents(self, conn: sa.Connection, rows: Sequence[tuple[HostRow, Key]]) -> None:
        """Remove the rows that were made for users to reference; the users are gone already."""
        for parent in self.users.parents:
            values = [key if parent.column == self.users.key else parent.value(row) for row, key in rows]
            conn.execute(sa.delete(parent.rows.table).where(parent.rows.table.c[parent.rows.key].in_(values)))

    def insert_workshop(
        self, conn: sa.Connection, row: HostRow, *, owner: Key, key: Key | None, created_at: dt.datetime | None
    ) -> Key:
        """Add a workshop of ``owner`` with the row's text as its title; ``key`` as for users, ``created_at`` now."""
        names, table = self.schema.host.workshops, self.workshops
        if names is None or table is None:
            raise AssertionError("this host has no workshops table")
        values = self._keyed(table, row.key(names.key_type, "workshop"), key) | {names.owner: owner}
        if names.title and names.title not in values:
            values[names.title] = table.fitted(names.title, row.text, cut=True)
        if names.created_at:
            values[names.created_at] = _moment(table.types[names.created_at], created_at or dt.datetime.now(dt.UTC))
        return table.insert(conn, table.row(conn, row, values, owner))

    @staticmethod
    def _keyed(table: _HostTable, made: Key, key: Key | None) -> dict[str, Any]:
        if key is None and table.key_has_default:
            return {}
        return {table.key: made if key is None else key}

    @contextmanager
    def raising_seed_impossible(self) -> Iterator[None]:
        """Raise SeedImpossible for a refusal by the host's rules."""
        try:
            yield
        except DBAPIError as error:
            fault = HostFault.of(error)
            if fault is None:
                raise
            of_keys = self.users.key_rules | (self.workshops.key_rules if self.workshops else set())
            advice = (
                "The rule is for a key, and those of these rows are fixed: negative numbers, which no sequence gives, "
                "and texts that begin with seed_. Leave the rule out of the database that you develop with"
                if fault.constraint in of_keys
                else "Give the column a DEFAULT that the rule accepts, and it is left alone; if the row is left "
                "over from an earlier seed, run: tallystick seed --reset"
            )
            raise SeedImpossible(
                f"{fault.table} does not take the row made for it: {fault.message}. Nothing was written of it. "
                f"{advice}",
                table=fault.table,
                column=fault.column,
                constraint=fault.constraint,
            ) from error


class _HostTable:
    """One table: its required columns, each with a way to make a value.

    ``given`` are the mapped columns; ``owner`` is the table of users, if each row belongs to one.
    """

    def __init__(
        self,
        conn: sa.Connection,
        names: UsersTable | WorkshopsTable,
        given: set[str],
        owner: sa.Table | None,
        *,
        with_parents: bool = False,
    ) -> None:
        inspector = sa.inspect(conn)
        self.shown = f"{names.schema}.{names.table}"
        self.owner = owner
        where: Mapping[str, Any] = {"table_name": names.table, "schema": names.schema}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SAWarning)  # on unknown types; required ones raise an error below
            columns = inspector.get_columns(**where)
        self.key = names.key
        mapped = {"schema": names.schema, "table": names.table, "key": names.key}
        self.key_rules = set(conn.scalars(_KEY_RULES, mapped))
        self.key_has_default = not any(c["name"] == names.key and _must_be_given(c) for c in columns)
        self.types: dict[str, sa.types.TypeEngine[Any]] = {column["name"]: column["type"] for column in columns}
        self.table = sa.table(
            names.table, *(sa.column(name, kind) for name, kind in self.types.items()), schema=names.schema
        )
        uniques = _unique_columns(inspector, where)
        self.unique = {name for unique in uniques for name in unique}
        alone = {unique[0] for unique in uniques if len(unique) == 1}
        required = {column["name"] for column in columns if _must_be_given(column)}
        # a constant default of a unique column is good for one row only
        required |= {c["name"] for c in columns if c["name"] in alone and c["default"] and "(" not in c["default"]}
        keys: list[Any] = list(conn.execute(_REFERENCES, mapped).mappings())
        # rows that only one user references are made with it
        self.parents = [
            _Parent.of(conn, key)
            for key in (keys if with_parents else ())
            if len(key["constrained_columns"]) == 1
            and alone.intersection(key["constrained_columns"])
            and (key["constrained_columns"][0] == names.key or required.intersection(key["constrained_columns"]))
        ]
        required -= given | {parent.column for parent in self.parents}
        self.references = [key for key in keys if required & set(key["constrained_columns"])]
        for key in self.references:
            required -= set(key["constrained_columns"])
        self.required = sorted(required)
        quote = conn.dialect.identifier_preparer.quote
        for name in self.required:
            if HostRow("", 0, "").value(self.types[name], name, unique=False) is None:
                raise SeedImpossible(
                    f"{self.shown}.{name} is NOT NULL without a default, and there is no value to give for its type "
                    f"({self.types[name]!r}). Nothing was written. Give it one: ALTER TABLE {quote(names.schema)}."
                    f"{quote(names.table)} ALTER COLUMN {quote(name)} SET DEFAULT …",
                    table=self.shown,
                    column=name,
                )

    def row(self, conn: sa.Connection, row: HostRow, values: Mapping[str, Any], user: Key | None) -> dict[str, Any]:
        """A whole row with ``values``; ``user`` owns it, if rows have an owner."""
        made: dict[str, Any] = {}
        for key in self.references:
            made |= self._referred(conn, key, user if self._refers_to_owner(key) else None)
        for name in self.required:
            made[name] = row.value(self.types[name], name, unique=name in self.unique)
        return made | dict(values)

    def insert(self, conn: sa.Connection, row: Mapping[str, Any]) -> Key:
        """Add a whole row; its key."""
        key = self.table.c[self.key]
        if not row:
            alone: Key = conn.execute(sa.insert(self.table).returning(key), {}).scalar_one()
            return alone
        names = {f"given_{number}": name for number, name in enumerate(row)}
        # for keys that are GENERATED ALWAYS AS IDENTITY; no effect on others
        places = ", ".join(f":{given}" for given in names)
        values = sa.text("OVERRIDING SYSTEM VALUE VALUES (" + places + ")").bindparams(
            *(sa.bindparam(given, type_=self.types[name]) for given, name in names.items())
        )
        statement = sa.insert(self.table).from_select(list(names.values()), values.columns()).returning(key)
        made: Key = conn.execute(statement, {given: row[name] for given, name in names.items()}).scalar_one()
        return made

    def fitted(self, column: str, text: str, *, cut: bool = False) -> str:
        """``text``, within the length of ``column``."""
        return _fit(self.types[column], text, cut=cut)

    def _refers_to_owner(self, key: Any) -> bool:
        owner = self.owner
        return owner is not None and (key["referred_schema"], key["referred_table"]) == (owner.schema, owner.name)

    def _referred(self, conn: sa.Connection, key: Any, user: Key | None) -> dict[str, Any]:
        """Values for a foreign key: those of the owner's row, or of the first existing row."""
        there = sa.table(key["referred_table"], *map(sa.column, key["referred_columns"]), schema=key["referred_schema"])
        found = sa.select(*there.c).order_by(*there.c).limit(1)
        if user is not None and self.owner is not None:
            name = self.owner.c.key.name
            found = found.where(sa.column(name, self.owner.c.key.type) == user)
        row = conn.execute(found).one_or_none()
        if row is None:
            table = f"{key['referred_schema']}.{key['referred_table']}"
            raise SeedImpossible(
                f"{self.shown}.{', '.join(key['constrained_columns'])} must refer to a row of {table}, and there is "
                f"none. Nothing was written. Insert one row into {table} first",
                table=self.shown,
                column=key["constrained_columns"][0],
                constraint=key["name"],
            )
        return dict(zip(key["constrained_columns"], row, strict=True))


@dataclass(frozen=True, slots=True)
class _Parent:
    """A table with a row for each user: the users' unique ``column`` references the key of ``rows``."""

    column: str
    rows: _HostTable

    @staticmethod
    def of(conn: sa.Connection, key: Any) -> _Parent:
        """The parent that a foreign key of one column references."""
        referred = key["referred_columns"][0]
        names = UsersTable(schema=key["referred_schema"], table=key["referred_table"], key=referred)
        return _Parent(key["constrained_columns"][0], _HostTable(conn, names, {referred}, None))

    def value(self, row: HostRow) -> Any:
        """The key of the parent's row, always the same for the same row."""
        return row.value(self.rows.types[self.rows.key], self.rows.shown, unique=True)


def _must_be_given(column: Any) -> bool:
    kind = column["type"]
    not_null, default = not column["nullable"], column["default"]
    if isinstance(kind, pg.DOMAIN):
        not_null, default = not_null or bool(kind.not_null), default or kind.default
    return not_null and default is None and not column.get("computed") and not column.get("identity")


def _unique_columns(inspector: sa.Inspector, where: Mapping[str, Any]) -> list[list[str]]:
    """The columns of each unique index without expressions."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SAWarning)  # of index features that do not matter here
        indexes = [index["column_names"] for index in inspector.get_indexes(**where) if index["unique"]]
    indexes.append([*inspector.get_pk_constraint(**where)["constrained_columns"]])
    return [[name for name in names if name is not None] for names in indexes]


_CONSTANTS: tuple[tuple[type[sa.types.TypeEngine[Any]], Any], ...] = (
    (sa.ARRAY, []),
    (sa.JSON, {}),
    (sa.Boolean, False),
    (sa.Interval, dt.timedelta(hours=1)),
    (pg.INTERVAL, dt.timedelta(hours=1)),
    (pg.INET, ipaddress.ip_address("127.0.0.1")),
    (pg.CIDR, ipaddress.ip_network("127.0.0.0/8")),
)


def _moment(kind: sa.types.TypeEngine[Any], moment: dt.datetime) -> Any:
    """``moment`` (UTC) for a column; one without a time zone is taken to hold UTC."""
    match kind:
        case sa.Date():
            return moment.date()
        case sa.Time():
            return moment.timetz() if kind.timezone else moment.time()
        case sa.DateTime() if not kind.timezone:
            return moment.replace(tzinfo=None)
    return moment


def _fit(kind: sa.types.TypeEngine[Any], text: str, *, cut: bool = False) -> str:
    """``text`` in the length of its type: cut off, or if it must stay unique, as a digest."""
    longest = kind.length if isinstance(kind, sa.String) else None
    if longest is None or len(text) <= longest:
        return text
    return text[:longest] if cut else hashlib.sha256(text.encode()).hexdigest()[:longest]
