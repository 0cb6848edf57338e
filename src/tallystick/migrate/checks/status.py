"""The state of a database: its revision, and each difference between the live objects and the declared ones."""

from __future__ import annotations

import datetime as dt
import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any, Literal

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql as pg

from tallystick.config import Config, HostMapping
from tallystick.database import refuse_other_than, standby
from tallystick.declared_tables import Schema, event_settings, migration_log, user_columns, workshop_columns
from tallystick.errors import MigrationError, PermissionDenied
from tallystick.migrate.host.preflight import Host, adopted_columns, examine, unfit
from tallystick.migrate.host.privileges import forced_policies, open_policies, writers
from tallystick.migrate.host.role import ways_out
from tallystick.migrate.host.tables import columns_of, oid_of, oids_in, quoted, reading_catalogues
from tallystick.migrate.revisions import HostNames, revisions
from tallystick.migrate.runner.messages import MADE, as_replacement, functions_of, text
from tallystick.migrate.runner.session import autocommits
from tallystick.migrate.runner.widen import KEYS, STAND_INS
from tallystick.schema import (
    BOOKKEEPING_SCHEMA,
    EVENTS_TRIGGER,
    FOLLOWING,
    HEAD,
    LEDGER,
    TRIGGERS,
    CreditTransactionStatus,
    CreditTransactionType,
    has_bookkeeping,
)

APPLY = "tallystick migrate apply"
FUNCTIONS = 'tallystick migrate sql --functions | psql "$DATABASE_URL"'

Kind = Literal["table", "column", "constraint", "index", "trigger", "rule", "enum", "type", "function", "privilege"]

# Without a column's options (attoptions), which the app sets for the planner, or a minor release of the server adds.
_COLUMNS = sa.text("""
    SELECT a.attrelid::bigint AS relation, a.attname AS name,
           format_type(a.atttypid, a.atttypmod) || CASE WHEN a.attnotnull THEN ' NOT NULL' ELSE '' END
             || coalesce(' DEFAULT ' || pg_get_expr(d.adbin, d.adrelid), '') AS definition
    FROM pg_attribute a LEFT JOIN pg_attrdef d ON d.adrelid = a.attrelid AND d.adnum = a.attnum
    WHERE a.attrelid = ANY (CAST(:oids AS oid[])) AND a.attnum > 0 AND NOT a.attisdropped
""")

# A foreign key is compared by columns and rule, since the tables' names differ by schema.
_CONSTRAINTS = sa.text("""
    SELECT c.conrelid::bigint AS relation, c.conname AS name,
           CASE WHEN c.contype <> 'f' THEN pg_get_constraintdef(c.oid)
           ELSE 'FOREIGN KEY (' || (SELECT string_agg(a.attname, ', ' ORDER BY k.n)
                  FROM unnest(c.conkey) WITH ORDINALITY k (num, n)
                  JOIN pg_attribute a ON a.attrelid = c.conrelid AND a.attnum = k.num)
             || ') REFERENCES ' || r.relname || ' (' || (SELECT string_agg(a.attname, ', ' ORDER BY k.n)
                  FROM unnest(c.confkey) WITH ORDINALITY k (num, n)
                  JOIN pg_attribute a ON a.attrelid = c.confrelid AND a.attnum = k.num)
             || ') ON UPDATE ' || CASE c.confupdtype WHEN 'c' THEN 'CASCADE' WHEN 'a' THEN 'NO ACTION' ELSE 'other' END
             || ' ON DELETE ' || CASE c.confdeltype
                  WHEN 'r' THEN 'RESTRICT' WHEN 'n' THEN 'SET NULL' WHEN 'c' THEN 'CASCADE'
                  WHEN 'd' THEN 'SET DEFAULT' ELSE 'NO ACTION' END
             || CASE WHEN c.convalidated THEN '' ELSE ' NOT VALID' END
             || CASE WHEN EXISTS (SELECT FROM pg_trigger t WHERE t.tgconstraint = c.oid
                                    AND t.tgenabled NOT IN ('O', 'A')) THEN ' DISABLED' ELSE '' END
           END AS definition
    FROM pg_constraint c LEFT JOIN pg_class r ON r.oid = c.confrelid
    WHERE c.conrelid = ANY (CAST(:oids AS oid[])) AND c.contype IN ('c', 'f', 'p', 'u', 'x')
""")

_INDEXES = sa.text("""
    SELECT i.indrelid::bigint AS relation, c.relname AS name,
           CASE WHEN i.indisunique THEN 'UNIQUE ' ELSE '' END || m.amname || ' ('
             || (SELECT string_agg(pg_get_indexdef(i.indexrelid, n, true), ', ' ORDER BY n)
                 FROM generate_series(1, i.indnatts) n)
             || ')' || coalesce(' WHERE ' || pg_get_expr(i.indpred, i.indrelid, true), '')
             || CASE WHEN NOT i.indisready THEN ' INVALID, and enforcing nothing'
                     WHEN NOT i.indisvalid THEN ' INVALID, but still enforcing'
                     ELSE '' END AS definition
    FROM pg_index i JOIN pg_class c ON c.oid = i.indexrelid JOIN pg_am m ON m.oid = c.relam
    WHERE i.indrelid = ANY (CAST(:oids AS oid[]))
""")

_TRIGGERS = sa.text("""
    SELECT t.tgrelid::bigint AS relation, t.tgname AS name, t.tgtype AS bits,
           n.nspname || '.' || p.proname AS function,
           concat(CASE WHEN t.tgattr::text <> '' THEN ' of some columns' END,
                  CASE WHEN t.tgqual IS NOT NULL THEN ' on a condition' END,
                  CASE t.tgenabled WHEN 'D' THEN ' DISABLED' WHEN 'R' THEN ' DISABLED but on a replica' END) AS limits
    FROM pg_trigger t JOIN pg_proc p ON p.oid = t.tgfoid JOIN pg_namespace n ON n.oid = p.pronamespace
    WHERE t.tgrelid = ANY (CAST(:oids AS oid[])) AND NOT t.tgisinternal
""")

_LABELS = sa.text("""
    SELECT t.typname AS name, string_agg(e.enumlabel, ', ' ORDER BY e.enumsortorder) AS definition
    FROM pg_enum e JOIN pg_type t ON t.oid = e.enumtypid
    WHERE t.typnamespace = to_regnamespace(quote_ident(:schema))
      AND t.typname IN ('credit_transaction_type', 'credit_transaction_status')
    GROUP BY t.typname
""")

_FUNCTIONS = sa.text("""
    SELECT quote_ident(p.proname) || '(' || oidvectortypes(p.proargtypes) || ')' AS name, p.prosrc AS body,
           pg_get_function_arguments(p.oid) AS arguments, pg_get_function_result(p.oid) AS result,
           concat_ws(' ', 'LANGUAGE', l.lanname,
             CASE p.provolatile WHEN 'i' THEN 'IMMUTABLE' WHEN 's' THEN 'STABLE' ELSE 'VOLATILE' END,
             CASE WHEN p.proisstrict THEN 'STRICT' END, CASE WHEN p.proleakproof THEN 'LEAKPROOF' END,
             CASE p.proparallel WHEN 's' THEN 'PARALLEL SAFE' WHEN 'r' THEN 'PARALLEL RESTRICTED' END,
             CASE WHEN p.prosecdef THEN 'SECURITY DEFINER' ELSE 'SECURITY INVOKER' END,
             'SET ' || array_to_string(p.proconfig, ' SET ')) AS options,
           pg_get_userbyid(p.proowner) AS owner,
           EXISTS (SELECT FROM aclexplode(coalesce(p.proacl, acldefault('f', p.proowner))) a
                   WHERE a.grantee = 0) AS open
    FROM pg_proc p JOIN pg_language l ON l.oid = p.prolang
    WHERE p.pronamespace = CAST(CAST(:schema AS text) AS regnamespace)
""")

_COMPOSITES = sa.text("""
    SELECT t.typname AS name,
           string_agg(quote_ident(a.attname) || ' ' || format_type(a.atttypid, a.atttypmod), ', ' ORDER BY a.attnum)
             AS definition
    FROM pg_type t JOIN pg_class c ON c.oid = t.typrelid AND c.relkind = 'c'
    JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped
    WHERE t.typnamespace = CAST(CAST(:schema AS text) AS regnamespace) GROUP BY t.typname
""")

_OWNER = sa.text("SELECT pg_get_userbyid(relowner) FROM pg_class WHERE oid = :oid")

_TEMPORARY = sa.text("SELECT nspname FROM pg_namespace WHERE oid = pg_my_temp_schema()")

# The functions run as it, and so do the host's triggers that they fire.
_SUPERUSER = sa.text("""
    SELECT 'the owner of the ledger is a superuser (' || r.rolname || '): every trigger on the tables runs as it.'
           ' Give the tables and the functions to a role of their own'
    FROM pg_class c JOIN pg_roles r ON r.oid = c.relowner AND r.rolsuper
    WHERE c.oid = to_regclass(quote_ident(:schema) || '.credit_transactions')
""")

# Row security that does not bind the owner is Supabase's way to close tables, and does not affect the functions.
_OF_OURS = sa.text("""
    SELECT c.oid::bigint AS relation, c.relpersistence <> 'p' AS unlogged,
           c.relrowsecurity AND c.relforcerowsecurity AS rows_hidden,
           ARRAY(SELECT w.rulename::text FROM pg_rewrite w WHERE w.ev_class = c.oid ORDER BY 1) AS rules
    FROM pg_class c WHERE c.oid = ANY (CAST(:oids AS oid[]))
""")

_WRITES = "written by the owner's functions alone, and by an app's role made with: tallystick migrate sql --role ROLE"

_RECORDS = "AFTER INSERT OR UPDATE FOR EACH ROW tallystick.record_event of some columns"

_EXPECTED_TRIGGERS = {
    "tallystick_append_only": "BEFORE UPDATE OR DELETE FOR EACH ROW tallystick.append_only",
    "tallystick_no_truncate": "BEFORE TRUNCATE FOR EACH STATEMENT tallystick.append_only",
    "A_tallystick_buyer_stays": "AFTER DELETE FOR EACH ROW tallystick.buyer_stays",
    "tallystick_updated_at": "BEFORE UPDATE FOR EACH ROW tallystick.touch_updated_at",
    "tallystick_new_balance": "AFTER INSERT FOR EACH ROW tallystick.follow_balance on a condition",
    "tallystick_balance": "AFTER UPDATE FOR EACH ROW tallystick.follow_balance on a condition",
}


@dataclass(frozen=True)
class Drift:
    """One difference. ``found`` is None for a missing object; ``remedy`` fixes it, and is empty where none is known.

    The remedy is SQL, or a command: ``APPLY`` for the rest of an interrupted run, ``FUNCTIONS`` for a function that
    differs. For a column whose values are gone with it, it is a sentence.
    """

    kind: Kind
    where: str
    expected: str
    found: str | None
    remedy: str = ""

    def __str__(self) -> str:
        return f"{self.kind} {self.where}: {self.found or 'missing'}; expected {self.expected}"


@dataclass(frozen=True)
class Applied:
    """A row of ``tallystick.migration_log``."""

    revision: str
    direction: str
    applied_at: dt.datetime
    attempts: int
    locked_ms: float | None
    duration_ms: float | None


@dataclass(frozen=True)
class Status:
    """The state. ``revision`` is None before the first migration; ``drift`` is empty where all is as declared.

    ``prepared`` is a pending revision whose new objects exist unused: a run in two transactions was interrupted between
    them. ``warnings`` are sentences about data that others may read, and the role that functions run as.
    """

    revision: str | None
    head: str
    adopted: tuple[str, ...]
    drift: tuple[Drift, ...]
    history: tuple[Applied, ...]
    prepared: str | None = None
    warnings: tuple[str, ...] = ()

    @property
    def healthy(self) -> bool:
        """True at this package's revision, without drift."""
        return self.revision == self.head and not self.drift


def status(conn: sa.Connection, config: Config) -> Status:
    """The revision, and each difference of a column, constraint, index, trigger, function or enum from its declaration.

    The declared objects are made on this server as temporary ones, under a savepoint that is rolled back, so the server
    describes both sides. ``conn`` must be in a transaction of the caller's, not in autocommit. On a standby no table
    can be made: the result has the revision, its history, and a warning that nothing was compared.

    Raises what ``examine`` does, but requires no privilege other than TEMPORARY on the database, and MigrationError on
    a connection in autocommit and in a transaction that is read only.
    """
    refuse_other_than(conn, (sa.Connection,), "status takes a Connection of SQLAlchemy")
    if autocommits(conn):
        raise MigrationError(
            "status makes temporary tables to compare with and takes them back, which needs a transaction. Call it on "
            "a connection that is not in autocommit"
        )
    with reading_catalogues(conn):
        return _status(conn, config)


def _status(conn: sa.Connection, config: Config) -> Status:
    host = examine(conn, config, strict=False, changes=False)
    drift: tuple[Drift, ...] = ()
    history: tuple[Applied, ...] = ()
    if host.revision is not None:
        log = migration_log.c
        history = tuple(
            Applied(*row)
            for row in conn.execute(
                sa.select(
                    log.revision, log.direction, log.applied_at, log.attempts, log.locked_ms, log.duration_ms
                ).order_by(log.id)
            )
        )
    here = standby(conn)
    if host.revision == HEAD and here is None:
        _require_temporary_tables(conn)
        savepoint = conn.begin_nested()
        try:
            drift = (*_drift(conn, config, host), *_privileges(conn, config.host, host))
            if drift:
                ledger_oid = oid_of(conn, host.ledger_schema, LEDGER)
                remedies = _Remedies(config, host, conn.scalar(_OWNER, {"oid": ledger_oid}))
                drift = tuple(replace(found, remedy=found.remedy or remedies.of(found)) for found in drift)
        finally:
            savepoint.rollback()
    warnings: tuple[str, ...] = ()
    email = config.host.users.email
    if host.revision is not None and email is not None and email not in host.columns["users"]:
        warnings = (_NO_EMAIL.format(host.users.shown, email),)
    if host.revision is not None:
        superuser = conn.scalars(_SUPERUSER, {"schema": host.ledger_schema})
        forced = forced_policies(conn, host, oid_of(conn, host.ledger_schema, LEDGER))
        warnings = (*warnings, *open_policies(conn, host, config.host), *superuser, *forced)
        if here is not None:
            warnings = (*warnings, _ON_A_STANDBY)
        if host.follows:
            warnings = (*warnings, _FOLLOWS.format(f"{host.users.shown}.{host.balance}"))
    return Status(
        host.revision, HEAD, host.adopted_names, drift, history, host.prepared[-1] if host.prepared else None, warnings
    )


_MAY_MAKE_THEM = sa.text("""
    SELECT current_user AS role, current_database() AS database, current_setting('transaction_read_only') AS read_only,
           has_database_privilege(current_database(), 'TEMPORARY') AS allowed
""")


def _require_temporary_tables(conn: sa.Connection) -> None:
    """Raise PermissionDenied or MigrationError where this role or transaction cannot make what status compares with."""
    here = conn.execute(_MAY_MAKE_THEM).one()
    if not here.allowed:
        raise PermissionDenied(
            f"status makes temporary tables to compare with, and {here.role} may not make any in {here.database}. Let "
            f"an administrator run: GRANT TEMPORARY ON DATABASE {quoted(here.database)} TO {quoted(here.role)}",
            sqlstate="42501",
        )
    if here.read_only == "on":
        raise MigrationError(
            "status makes temporary tables to compare with, and takes them back, but transactions are read only here "
            "(default_transaction_read_only). Allow it for this one command: "
            "PGOPTIONS='-c default_transaction_read_only=off' tallystick migrate status"
        )


_NO_EMAIL = (
    "{} has no column {!r} any more, by which people are found and shown. Set host.users.email in tallystick.toml to "
    "another, or to false; without [host] in the file, run tallystick init first"
)


_ON_A_STANDBY = (
    "this server is a standby, where no table can be made to compare with, so no table and no function was compared. "
    "Its catalogue is a copy of its primary's: run tallystick migrate status there too"
)
_FOLLOWS = (
    "code of the app's own may still write {}, and what it writes is taken into the ledger. When none does any more: "
    "tallystick adopt --cut-over"
)
_GONE = (
    "{} RENAME COLUMN … TO {} if it was renamed. If it was dropped, only a backup has its values: restore it from one"
)
_DIALECT: sa.Dialect = pg.dialect(paramstyle="named")  # type: ignore[no-untyped-call]  # it does not double a %
_Shape = Mapping[tuple[Kind, str], str]  # (kind, name) → definition
_TYPES = "credit_transaction_"  # the prefix of our types


def _drift(conn: sa.Connection, config: Config, host: Host) -> Iterator[Drift]:
    schema = host.ledger_schema
    ledger_oid = oid_of(conn, schema, LEDGER)
    labels = _pairs(conn, _LABELS, schema=schema)
    yield from _of_tables(conn, host, Schema.of(config.host), ledger_oid)
    yield from _adopted(conn, config.host, host)
    for name, wanted in _declared_labels().items():
        if labels.get(name) != wanted:
            yield Drift("enum", f"{schema}.{name}", wanted, labels.get(name))
    yield from _functions(conn, HostNames.of(config.host, host.adopted), owner=conn.scalar(_OWNER, {"oid": ledger_oid}))
    for role, way, remedy in ways_out(conn, config.host):
        yield Drift("privilege", role, "nothing but what the functions let it do", way, remedy)


def _of_tables(conn: sa.Connection, host: Host, declared: Schema, ledger_oid: int | None) -> Iterator[Drift]:
    """Differences of the mapped tables, the ledger and the tables in schema tallystick, and of what is on them."""
    ours = oids_in(conn, BOOKKEEPING_SCHEMA, (table.name for table in declared.bookkeeping))
    oids = {LEDGER: ledger_oid, **{table.fullname: ours.get(table.name) for table in declared.bookkeeping}}
    wholes = {row.relation: row for row in conn.execute(_OF_OURS, {"oids": _there(oids.values())})}
    shown = {word: word for word in oids} | {LEDGER: f"{host.ledger_schema}.{LEDGER}"}
    for app_table, mapped in host.by_word.items():
        shown[app_table], oids[app_table] = mapped.shown, mapped.oid
    # the declared types are temporary, and the server names those without a schema
    typed = f"{conn.scalar(sa.select(sa.func.quote_ident(host.ledger_schema)))}.{_TYPES}"
    live = _shapes(conn, oids.values())
    found: dict[str, _Shape] = {
        word: {each: made.replace(typed, _TYPES) for each, made in live[oid].items()} for word, oid in oids.items()
    }
    added = _added(declared)
    for word, expected in _declared_shapes(conn, declared).items():
        if oids[word] is None:
            yield Drift("table", shown[word], "the table of its revision, whose rows only a backup has now", None)
        elif word in added:  # in the host's tables only our additions count
            for kind, name, there, wanted in _differences(expected, found[word]):
                if name in added[word] and not (there and f"{word}.{added[word][name]}" in host.adopted_names):
                    yield Drift(kind, f"{shown[word]}.{name}", wanted, there)
        else:
            yield from _of_ours(wholes[oids[word]], shown[word], expected, found[word])
    for of, bare, there, wanted in _trigger_differences(host, found):
        yield Drift("trigger", f"{shown[of]}.{bare}", wanted, there)
    if oids[event_settings.fullname] is not None:
        yield from _events_trigger(conn, found[LEDGER], shown[LEDGER])


def _of_ours(whole: sa.Row[Any], shown: str, expected: _Shape, found: _Shape) -> Iterator[Drift]:
    """Drift of the ledger or of a table in schema tallystick."""
    for kind, name, there, wanted in _differences(expected, found):
        yield Drift(kind, f"{shown}.{name}", wanted, there)
    if whole.unlogged:
        yield Drift("table", shown, "a logged table", "UNLOGGED: a crash of the server empties it")
    if whole.rows_hidden:
        hidden = "row level security that binds its owner, and so hides rows from the ledger"
        yield Drift("table", shown, "none", hidden)
    for name in whole.rules:
        yield Drift("rule", f"{shown}.{name}", "none", "a rule, which can rewrite what the ledger writes")
    for kind, name in _not_ours(found, expected):
        yield Drift(kind, f"{shown}.{name}", "none but ours", found[kind, name])


def _privileges(conn: sa.Connection, mapping: HostMapping, host: Host) -> Iterator[Drift]:
    # before the cut-over the app's own code writes balances
    followed = host.users.shown if host.follows else None
    for writer in writers(conn, host, mapping, oid_of(conn, host.ledger_schema, LEDGER)):
        if writer.table == followed:
            continue
        found = f"{writer.role} may {', '.join(writer.privileges)}"
        yield Drift("privilege", writer.table, _WRITES, found, writer.remedy)


def _adopted(conn: sa.Connection, mapping: HostMapping, host: Host) -> Iterator[Drift]:
    """Columns of the app's in place of ours that it has changed since into what could not be adopted."""
    for word, table in host.by_word.items():
        columns, names = columns_of(conn, table), mapping.by_word[word].adoptable
        for ours in sorted(name for of, name in host.adopted if of == word):
            column = columns.get(names.get(ours, ours))
            if column is not None and (wrong := unfit(word, ours, column, mapping.credits)):
                yield Drift("column", f"{table.shown}.{column.name}", wrong.expected, wrong.found)


def _differences(expected: _Shape, found: _Shape) -> Iterator[tuple[Kind, str, str | None, str]]:
    for (kind, name), wanted in expected.items():
        there = found.get((kind, name))
        if there != wanted:
            yield kind, name, there, wanted


def _trigger_differences(host: Host, found: Mapping[str, _Shape]) -> Iterator[tuple[str, str, str | None, str]]:
    for word, names in TRIGGERS.items():
        for name in names:
            there, wanted = found[word].get(("trigger", name)), _EXPECTED_TRIGGERS[name]
            kept_by_host = name == "tallystick_updated_at" and "users.updated_at" in host.adopted_names
            if there != wanted and not kept_by_host:
                yield word, name, there, wanted
    for name in FOLLOWING if host.follows else ():
        there, wanted = found["users"].get(("trigger", name)), _EXPECTED_TRIGGERS[name]
        if there != wanted:
            yield "users", name, there, wanted


def _events_trigger(conn: sa.Connection, found: _Shape, shown: str) -> Iterator[Drift]:
    """Drift of the ledger's event trigger, which must be there exactly while events are on."""
    enabled = conn.scalar(sa.select(event_settings.c.recorded_since)) is not None
    there, wanted = found.get(("trigger", EVENTS_TRIGGER)), _RECORDS if enabled else None
    if there != wanted:
        mend = f"tallystick events {'enable' if enabled else 'disable'}"
        yield Drift("trigger", f"{shown}.{EVENTS_TRIGGER}", wanted or "none while events are off", there, mend)


def _not_ours(found: _Shape, expected: _Shape) -> Iterator[tuple[Kind, str]]:
    """Host objects on a table of ours that can change, drop or refuse its rows; a host may add all others."""
    for (kind, name), there in found.items():
        if kind == "trigger":
            meddles = name not in TRIGGERS[LEDGER] and there.startswith("BEFORE")
        elif kind == "index":
            meddles = there.startswith("UNIQUE ") and ("constraint", name) not in found
        else:
            meddles = kind == "constraint"
        if meddles and (kind, name) not in expected:
            yield kind, name


class _Remedies:
    """The statements that fix a difference by the declarations, without blocking traffic during a scan."""

    def __init__(self, config: Config, host: Host, owner: str | None) -> None:
        declared, names = Schema.of(config.host), HostNames.of(config.host, host.adopted)
        dialect = _DIALECT
        ddl = dialect.ddl_compiler(dialect, None)  # type: ignore[arg-type]
        self.quote = dialect.identifier_preparer.quote
        self.online = {
            name
            for each in revisions()
            for name in (*each.indexes(names), *each.ledger_indexes(names), *each.validates(names))
        } | KEYS
        self.tables: dict[str, str] = {}  # a Drift's ``where`` → the name in SQL
        self.made: dict[tuple[str, str], str] = {}
        for table in dict.fromkeys((*declared.metadata.tables.values(), *declared.bookkeeping)):
            shown = dialect.identifier_preparer.format_table(table)
            self.tables[f"{table.schema}.{table.name}"] = shown
            for index in table.indexes:
                created = " ".join(str(sa.schema.CreateIndex(index).compile(dialect=dialect)).split())
                self.made["index", str(index.name)] = created.replace("INDEX", "INDEX CONCURRENTLY", 1)
        for table in declared.bookkeeping:
            self.made["table", table.fullname] = self._anew(table, dialect, owner)
        tables = (declared.credit_transactions, *declared.bookkeeping)
        for constraint in (each for table in tables for each in table.constraints):
            # PostgreSQL's own name for one that has none
            name = str(constraint.name or f"{constraint.table.name}_pkey")
            self.made["constraint", name] = ddl.process(constraint)
        # what the app had in it is lost, or in a column of another name by now: an empty one would hide that
        self.adopted = {
            f"{host.by_word[word].shown}.{config.host.by_word[word].adoptable.get(ours, ours)}"
            for word, ours in host.adopted
        }
        self.of_the_app = {f"{table.schema}.{table.table}" for table in host.tables}
        for each in revisions():
            for statement in (text([made]) for made in (*each.prepare(names), *each.locked(names))):
                if found := re.match(r'CREATE TRIGGER "?(\w+)"? ', statement):
                    self.made["trigger", found[1]] = statement.replace("CREATE", "CREATE OR REPLACE", 1)

    def _anew(self, table: sa.Table, dialect: sa.Dialect, owner: str | None) -> str:
        """The statements that make a table of ours again, for the ledger's owner."""
        name = self.tables[table.fullname]
        parts: list[sa.schema.ExecutableDDLElement] = [sa.schema.CreateTable(table)]
        parts += map(sa.schema.CreateIndex, table.indexes)
        made = [" ".join(str(part.compile(dialect=dialect)).split()) for part in parts]
        if table is event_settings:  # it has one row
            made.append(f"INSERT INTO {name} DEFAULT VALUES")
        if owner is not None:
            made.append(f"ALTER TABLE {name} OWNER TO {self.quote(owner)}")
        return "; ".join(made)

    def of(self, drift: Drift) -> str:
        """As ``Drift.remedy``."""
        where = next((each for each in self.tables if f"{drift.where}.".startswith(f"{each}.")), None)
        if where is None:
            return ""
        table, bare, there = self.tables[where], drift.where[len(where) + 1 :], drift.found or ""
        name, made, alter = self.quote(bare), self.made.get((drift.kind, bare), ""), f"ALTER TABLE {table}"
        match drift.kind:
            case "table":
                # policies and privileges stay as they are: they close the table to others
                what = "SET LOGGED" if there.startswith("UNLOGGED") else "NO FORCE ROW LEVEL SECURITY"
                parts = [f"{alter} {what}" if there else self.made.get((drift.kind, where), "")]
            case "rule":
                parts = [f"DROP RULE {name} ON {table}"]
            case "column" if not there:
                ours = where in self.of_the_app and drift.where not in self.adopted
                parts = [f"{alter} ADD {name} {drift.expected}" if ours else _GONE.format(alter, name)]
            case "trigger" if there.startswith(f"{drift.expected} DISABLED"):
                parts = [f"{alter} ENABLE TRIGGER {name}"]
            case "trigger":
                parts = [made or f"DROP TRIGGER {name} ON {table}"]
            case "index" if bare in self.online and (not there or " INVALID, " in there):
                parts = [APPLY]
            case "index":
                schema = self.quote(where.split(".", maxsplit=1)[0])
                parts = [f"DROP INDEX CONCURRENTLY {schema}.{name}" if there else "", made]
            case "constraint":
                parts = self._constraint(drift, alter, name, made)
            case _:
                parts = []
        return "; ".join(part for part in parts if part)

    def _constraint(self, drift: Drift, alter: str, name: str, made: str) -> list[str]:
        there, validate = drift.found or "", f"{alter} VALIDATE CONSTRAINT {name}"
        if there.endswith(" DISABLED"):
            return [f"{alter} ENABLE TRIGGER ALL"]
        if there == f"{drift.expected} NOT VALID":
            return [APPLY if name in self.online else validate]
        drop = f"DROP CONSTRAINT {name}" if there else ""
        if not made or "PRIMARY KEY" in made:
            return [f"{alter} {', '.join(part for part in (drop, made and f'ADD {made}') if part)}"]
        return [f"{alter} {f'{drop}, ' if drop else ''}ADD {made} NOT VALID", validate]


def _added(declared: Schema) -> dict[str, dict[str, str]]:
    """The columns and indexes that we added to the host's tables: the name there → our name."""
    indexes = (str(declared.users_stripe_customer.name), str(declared.users_due.name))
    return {
        "users": {column.name: column.key for column in user_columns(declared.host)} | {i: i for i in indexes},
        "workshops": {column.name: column.key for column in workshop_columns(declared.host)},
    }


def _declared_labels() -> dict[str, str]:
    return {
        "credit_transaction_type": ", ".join(CreditTransactionType),
        "credit_transaction_status": ", ".join(CreditTransactionStatus),
    }


def _there(oids: Iterable[int | None]) -> list[int]:
    return [oid for oid in oids if oid is not None]


def _shapes(conn: sa.Connection, oids: Iterable[int | None]) -> Mapping[int | None, _Shape]:
    """Oid → shape of the tables that exist; each of the others has an empty one."""
    tables = {"oids": _there(oids)}
    shapes: defaultdict[int | None, dict[tuple[Kind, str], str]] = defaultdict(dict)
    parts: tuple[tuple[Kind, sa.TextClause], ...] = (
        ("column", _COLUMNS),
        ("constraint", _CONSTRAINTS),
        ("index", _INDEXES),
    )
    for kind, query in parts:
        for row in conn.execute(query, tables):
            shapes[row.relation][kind, row.name] = row.definition
    for row in conn.execute(_TRIGGERS, tables):
        shapes[row.relation]["trigger", row.name] = _trigger(row)
    return shapes


def _trigger(row: sa.Row[Any]) -> str:
    events = [word for bit, word in ((4, "INSERT"), (16, "UPDATE"), (8, "DELETE"), (32, "TRUNCATE")) if row.bits & bit]
    when = "BEFORE" if row.bits & 2 else "AFTER"
    each = "ROW" if row.bits & 1 else "STATEMENT"
    return f"{when} {' OR '.join(events)} FOR EACH {each} {row.function}{row.limits}"


def _pairs(conn: sa.Connection, query: sa.TextClause, **values: object) -> dict[str, str]:
    return {row.name: row.definition for row in conn.execute(query, values)}


def _declared_shapes(conn: sa.Connection, declared: Schema) -> dict[str, _Shape]:
    """Make the declared tables as temporary ones and read them back."""
    # the app may have a table of the same name as one of ours, so these are made apart
    ours = {table.fullname: table for table in declared.bookkeeping}
    low = {declared.low_balances.fullname: ours.pop(declared.low_balances.fullname)}  # it refers to the users
    apps = {"users": declared.users, "workshops": declared.workshops, LEDGER: declared.credit_transactions, **low}
    shapes: dict[str, _Shape] = {}
    for named in (ours, {word: table for word, table in apps.items() if table is not None}):
        with conn.begin_nested() as savepoint:
            _execute(conn, _making(named.values()))
            oids = oids_in(conn, conn.scalars(_TEMPORARY).one(), (table.name for table in named.values()))
            made = _shapes(conn, oids.values())
            shapes |= {word: made[oids[table.name]] for word, table in named.items()}
            savepoint.rollback()
    return shapes


def _making(tables: Collection[sa.Table]) -> list[str]:
    """The statements that make ``tables`` as temporary ones, with their types and indexes."""
    of_all = {table.metadata: None for table in tables}
    temporary = {table.schema: "pg_temp" for metadata in of_all for table in metadata.tables.values()}
    made: list[str] = []

    def keep(statement: Any, *_: Any, **__: Any) -> None:
        named = statement.compile(dialect=_DIALECT, schema_translate_map=temporary, render_schema_translate=True)
        made.append(str(named))

    collecting = sa.create_mock_engine("postgresql+psycopg://", keep)
    for metadata in of_all:
        metadata.create_all(collecting, tables=[each for each in tables if each.metadata is metadata], checkfirst=False)
    return made


def _execute(conn: sa.Connection, statements: Iterable[str]) -> None:
    """Execute all in one round trip, by the driver's own cursor, which leaves a % as it is."""
    with closing(conn.connection.cursor()) as cursor:
        cursor.execute("; ".join(statements))


def _functions(conn: sa.Connection, names: HostNames, *, owner: str | None) -> Iterator[Drift]:
    """Differences of functions and types from this package's, which are made as temporary ones and read back."""
    made = (re.sub(MADE, r"CREATE \1 pg_temp.", statement, count=1) for statement in functions_of(names, HEAD))
    _execute(conn, ("SET LOCAL check_function_bodies = off", *made))  # they are read, not called
    places = (conn.scalar(_TEMPORARY), "tallystick")
    wanted, there = (_pairs(conn, _COMPOSITES, schema=schema) for schema in places)
    for name, definition in wanted.items():
        if there.get(name) != definition:
            yield Drift("type", f"tallystick.{name}", definition, there.get(name))
    declared, found = ({row.name: row for row in conn.execute(_FUNCTIONS, {"schema": schema})} for schema in places)
    for name, wants in declared.items():
        if name in found:
            yield from _of_function(f"tallystick.{name}", wants, found[name], owner or "")
        else:
            yield Drift("function", f"tallystick.{name}", "the function of its revision", None, FUNCTIONS)
    for name in found.keys() - declared.keys():
        word = next((word for word, stands_in in STAND_INS.items() if name == f"{stands_in}()"), None)
        mend = f"tallystick migrate widen-key {word}" if word else f"DROP FUNCTION tallystick.{name}"
        yield Drift("function", f"tallystick.{name}", "none but ours", "another", mend)


def _of_function(where: str, wants: sa.Row[Any], has: sa.Row[Any], owner: str) -> Iterator[Drift]:
    for part in ("arguments", "result"):
        if getattr(has, part) != getattr(wants, part):
            again = f"DROP FUNCTION {where}; then: {FUNCTIONS}"
            yield Drift("function", where, getattr(wants, part), getattr(has, part), again)
    if has.options != wants.options:
        yield Drift("function", where, wants.options, has.options, FUNCTIONS)
    if has.body != wants.body:
        yield Drift("function", where, "the body of its revision", "another body", FUNCTIONS)
    if has.owner != owner:
        mend = f"ALTER FUNCTION {where} OWNER TO {quoted(owner)}"
        yield Drift("function", where, f"owner {owner}, as the ledger", f"owner {has.owner}", mend)
    if has.open:
        shut = f"REVOKE ALL ON FUNCTION {where} FROM PUBLIC"
        yield Drift("function", where, "EXECUTE for those who were given it", "EXECUTE for PUBLIC", shut)


def functions_sql(conn: sa.Connection | None, config: Config) -> str:
    """A script that replaces functions that differ by this package's, and revokes them from PUBLIC.

    They depend on the columns that the app had before, which the database knows. Without a connection, only columns
    that the mapping has under other names than ours are taken for those.
    """
    known = conn is not None and has_bookkeeping(conn, "migration_log")
    adopted = adopted_columns(conn) if conn is not None and known else frozenset()
    made = [
        as_replacement(statement)
        for statement in functions_of(HostNames.of(config.host, adopted), HEAD)
        if not statement.startswith("CREATE TYPE")
    ]
    shut = "REVOKE ALL ON ALL FUNCTIONS IN SCHEMA tallystick FROM PUBLIC"
    return ";\n".join(["BEGIN", "SET LOCAL search_path = pg_catalog, pg_temp", *made, shut, "COMMIT"]) + ";\n"
