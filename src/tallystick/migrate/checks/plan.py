"""The plan of a run: its statements and locks, and the present obstacles. Changes nothing."""

from __future__ import annotations

import json
import math
import re
import shlex
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Literal

import sqlalchemy as sa
from psycopg.sql import Composable, Identifier

from tallystick.config import Config, HostMapping, Word
from tallystick.database import refuse_other_than
from tallystick.migrate.host.blockers import Blocker, Watch
from tallystick.migrate.host.preflight import Host, examine, setting_of, spelled_otherwise, unfit
from tallystick.migrate.host.privileges import forced_policies
from tallystick.migrate.host.proposal import balances_apart
from tallystick.migrate.host.tables import (
    HostColumn,
    HostTable,
    columns_of,
    oid_of,
    oids_of,
    quoted,
    reading_catalogues,
)
from tallystick.migrate.revisions import HostNames, Revision, after, revisions
from tallystick.migrate.runner.messages import STALL_BUDGET_MS, Messages, text, upward
from tallystick.migrate.runner.run import renewal_of, undo_command
from tallystick.migrate.runner.session import USE_UNPOOLED, pooler_sign
from tallystick.schema import LEDGER, changed_columns

Phase = Literal["prepare", "locked", "online"]


@dataclass(frozen=True)
class PlannedStatement:
    """One statement; ``locks`` are those on tables that exist already: (table, lock).

    ``prepare`` statements run before any lock that blocks traffic, ``locked`` ones as one message with their commit,
    ``online`` ones afterwards, each alone.
    """

    phase: Phase
    sql: str
    locks: tuple[tuple[str, str], ...]
    scans: bool
    rewrites: bool


@dataclass(frozen=True)
class PlannedRevision:
    """A pending revision."""

    revision: str
    title: str
    kind: Literal["expand", "contract"]


@dataclass(frozen=True)
class TableSize:
    """A table of the host, with the server's estimate of its rows, and its bytes without indexes."""

    table: str
    rows: int
    bytes: int


@dataclass(frozen=True)
class PlanNote:
    """A note to read before the run. A ``stop`` ends the run before anything is changed."""

    severity: Literal["stop", "warning", "note"]
    text: str


@dataclass(frozen=True)
class Replica:
    """A standby of this server, or with ``logical`` a subscriber to rows of this database.

    Commits wait for it where ``sync_state`` is ``sync`` or ``quorum``. ``lag_s`` is its delay at the last change, None
    if idle; ``behind_bytes`` of the log are not replayed there yet, by its last report (every
    wal_receiver_status_interval). All three are None for a role that may not see them (GRANT pg_monitor).
    """

    name: str
    state: str
    lag_s: float | None
    behind_bytes: int | None
    sync_state: str | None = None
    logical: bool = False


@dataclass(frozen=True)
class Plan:
    """The plan of a run. ``before`` is the present revision; ``revisions`` are the pending ones, perhaps none.

    ``statements`` are one transaction for all of them, and the online steps after it. ``estimated_hold_ms`` is how long
    the tables will be locked, from the measured cost of each operation; the receipt has the real time. ``blockers`` are
    transactions that hold these tables now. ``long_transactions`` are the process ids and ages in seconds of
    transactions in the database for which a concurrent index build would wait. ``renewed`` are the columns, with both
    names, for which the functions are to be made anew.
    """

    before: str | None
    after: str
    revisions: tuple[PlannedRevision, ...]
    statements: tuple[PlannedStatement, ...]
    estimated_hold_ms: float
    tables: tuple[TableSize, ...]
    adopted: tuple[str, ...]
    server: str
    blockers: tuple[Blocker, ...]
    long_transactions: tuple[tuple[int, float], ...]
    replicas: tuple[Replica, ...]
    database_bytes: int
    findings: tuple[PlanNote, ...]
    renewed: tuple[str, ...] = ()


def plan(conn: sa.Connection, config: Config, *, backup_folder: Path | None = None) -> Plan:
    """The effect of ``apply`` on this database, and notes to read before.

    ``backup_folder``: the folder for a backup, to compare its free space with the database's size.

    Raises what ``examine`` does; missing privileges and objects of the app that would break are notes.
    """
    refuse_other_than(conn, (sa.Connection,), "plan takes a Connection of SQLAlchemy")
    with reading_catalogues(conn):
        host = examine(conn, config, strict=False, renews=True)
        pending, messages = _messages(config, host, STALL_BUDGET_MS)
        statements = tuple(_statements(pending, host, config, messages)) if messages else ()
        replicas = tuple(Replica(*row) for row in conn.execute(_REPLICAS))
        locked = oids_of(conn, messages.locks if messages else ())
        keys = conn.scalar(_KEYS, {"tables": locked}) or 0
        hold_ms = _estimated_hold_ms(statements, keys)
        long = tuple((row.pid, round(float(row.age_s), 1)) for row in conn.execute(_LONG_TRANSACTIONS))
        database_bytes = conn.scalar(_DATABASE_BYTES) or 0
        findings = (
            *_about_the_connection(conn, host),
            *_about_an_interrupted_run(host),
            *_about_cached_plans(conn, host),
            *_about_balances(conn, host, config.host),
            *_about_checks(conn, host, config.host),
            *_about_triggers(conn, host),
            *_about_twins(conn, host, config.host),
            *_about_rules(conn, host),
            *_about_collations(conn, host, config.host),
            *_about_event_triggers(conn),
            *_about_keys(host, keys, hold_ms),
            *_about_replicas(replicas),
            *_about_publications(conn, host, statements),
            *_about_rights(conn, host),
            *_about_room(database_bytes, backup_folder),
        )
    return Plan(
        before=host.revision,
        after=revisions()[-1].revision,
        revisions=tuple(PlannedRevision(one.revision, one.title, one.kind) for one in pending),
        statements=statements,
        estimated_hold_ms=hold_ms,
        tables=tuple(TableSize(table.shown, table.rows, table.bytes) for table in host.tables),
        adopted=host.adopted_names,
        server=host.server,
        blockers=tuple(Watch(conn, locked).blockers()),
        long_transactions=long,
        replicas=replicas,
        database_bytes=database_bytes,
        findings=findings,
        renewed=changed_columns(host.stored, config.host) if host.stored else (),
    )


_REPLICAS = sa.text("""
    SELECT coalesce(nullif(r.application_name, ''), r.client_addr::text, 'standby') AS name,
           coalesce(r.state, '?') AS state, extract(epoch FROM r.replay_lag)::float AS lag_s,
           greatest(pg_wal_lsn_diff(pg_current_wal_lsn(), r.replay_lsn), 0)::bigint AS behind_bytes,
           r.sync_state, coalesce(s.slot_type = 'logical', false) AS logical
    FROM pg_stat_replication r LEFT JOIN pg_replication_slots s ON s.active_pid = r.pid
    WHERE r.state IS DISTINCT FROM 'backup' AND coalesce(s.database, current_database()) = current_database()
    ORDER BY 1
""")

# Publications without a column list; a table is not named where its whole schema or the database is published.
_PUBLICATIONS = sa.text("""
    SELECT p.pubname AS name, p.puballtables AS everything, c.oid::bigint AS oid, r.oid IS NOT NULL AS named
    FROM pg_publication p JOIN pg_publication_tables t ON t.pubname = p.pubname
    JOIN pg_namespace n ON n.nspname = t.schemaname
    JOIN pg_class c ON c.relnamespace = n.oid AND c.relname = t.tablename
    LEFT JOIN pg_publication_rel r ON r.prpubid = p.oid AND r.prrelid = c.oid
    WHERE c.oid = ANY (CAST(:tables AS oid[])) AND to_jsonb(r) ->> 'prattrs' IS NULL
    ORDER BY p.pubname, t.schemaname, t.tablename
""")

# Privileges on single columns do not extend to new columns.
_WRITERS = sa.text("""
    SELECT coalesce(r.rolname, 'PUBLIC') AS role, r.oid IS NULL AS everyone,
           string_agg(a.privilege_type, ' and ' ORDER BY a.privilege_type DESC) AS rights
    FROM pg_class c
    CROSS JOIN aclexplode(coalesce(c.relacl, acldefault('r', c.relowner))) a
    LEFT JOIN pg_roles r ON r.oid = a.grantee
    WHERE c.oid = :users AND a.privilege_type IN ('INSERT', 'UPDATE')
      AND a.grantee <> c.relowner AND NOT coalesce(r.rolsuper, false)
    GROUP BY r.oid, r.rolname ORDER BY 1
""")

_NO_TEMPORARY = sa.text("""
    SELECT current_user AS role, current_database() AS database
    WHERE NOT has_database_privilege(current_database(), 'TEMPORARY')
""")

_DEFAULT_RIGHTS = sa.text("""
    SELECT coalesce(r.rolname, 'PUBLIC') AS role, d.defaclrole::regrole::text AS maker,
           d.defaclnamespace = 0 AS anywhere,
           string_agg(a.privilege_type, ', ' ORDER BY a.privilege_type) AS rights
    FROM pg_default_acl d CROSS JOIN aclexplode(d.defaclacl) a LEFT JOIN pg_roles r ON r.oid = a.grantee
    WHERE d.defaclobjtype = 'r' AND d.defaclrole = CAST(quote_ident(current_user) AS regrole)
      AND a.grantee <> d.defaclrole
      AND d.defaclnamespace IN (0, to_regnamespace(quote_ident(:schema))::oid)
    GROUP BY r.rolname, d.defaclrole, d.defaclnamespace ORDER BY 1
""")

_LONG_TRANSACTIONS = sa.text("""
    SELECT pid, extract(epoch FROM clock_timestamp() - xact_start) AS age_s
    FROM pg_stat_activity
    WHERE datname = current_database() AND pid <> pg_backend_pid() AND backend_type = 'client backend'
      AND xact_start < clock_timestamp() - interval '10 s'
    ORDER BY xact_start
""")

_DATABASE_BYTES = sa.text(
    "SELECT CASE WHEN has_database_privilege(current_database(), 'CONNECT')"
    " THEN pg_database_size(current_database()) END"
)

_STATEMENTS_SCHEMA = sa.text("""
    SELECT n.nspname FROM pg_extension e JOIN pg_namespace n ON n.oid = e.extnamespace
    WHERE e.extname = 'pg_stat_statements'
      AND current_setting('pg_stat_statements.max', true) IS NOT NULL  -- set only where the library is loaded
""")

_HERE = "(SELECT oid FROM pg_database WHERE datname = current_database())"

_HIDDEN = "<insufficient privilege>"  # pg_stat_statements shows this for another role's statement

_NEW_TABLE = re.compile(r"CREATE TABLE ((?:\"[^\"]*\"|[\w.])+) \(")  # as in our revisions

_STAR = re.compile(r"\b(?:select(?:\s+distinct)?|returning|,)\s+(?:[\w\"$.]+\.)?\*(?!\s*\d)", re.IGNORECASE)


def _about_the_connection(conn: sa.Connection, host: Host) -> Iterator[PlanNote]:
    sign = pooler_sign(conn)
    if sign:
        yield PlanNote("stop", f"This address is a connection pooler's ({sign}). {USE_UNPOOLED}")
    for stop in (*host.missing_privileges, *host.breaks):
        yield PlanNote("stop", stop)


def _about_an_interrupted_run(host: Host) -> Iterator[PlanNote]:
    if host.prepared:
        yield PlanNote(
            "note",
            f"The new objects of revision {host.prepared[-1]} are there already, from a run in two transactions that "
            "was interrupted; nothing uses them. apply goes on from there. To take them "
            f"away: {undo_command(host.revision)}",
        )


def _about_cached_plans(conn: sa.Connection, host: Host) -> Iterator[PlanNote]:
    """Notes on prepared ``SELECT *`` statements, which fail on old connections once their table has a new column."""
    if host.revision is not None:
        return
    schema = conn.scalar(_STATEMENTS_SCHEMA)
    if schema is None:
        yield PlanNote(
            "note",
            "the extension pg_stat_statements is not installed, so the plan could not search for prepared statements "
            "with SELECT * or RETURNING *. On connections opened before the migration these fail with "
            '"cached plan must not change result type"',
        )
        return
    table = sa.table("pg_stat_statements", sa.column("query"), sa.column("calls"), sa.column("dbid"), schema=schema)
    names = [re.compile(rf"\b{re.escape(table.table)}\b") for table in host.tables]
    rows = conn.execute(sa.select(table.c.query, table.c.calls).where(table.c.dbid == sa.literal_column(_HERE)))
    hidden = 0
    for row in rows:
        hidden += row.query == _HIDDEN
        if row.query and _STAR.search(row.query) and any(name.search(row.query) for name in names):
            shown = " ".join(row.query.split())[:120]
            yield PlanNote(
                "warning",
                f'"{shown}" ({row.calls} calls): where a driver has prepared it, it fails on connections opened '
                "before the migration until they are opened again. Name the columns, or restart the app afterwards",
            )
    if hidden:
        role = conn.scalar(sa.text("SELECT quote_ident(current_user)"))
        yield PlanNote(
            "warning",
            f"pg_stat_statements hides {hidden} statements of other roles from {role}, so a prepared SELECT * or "
            "RETURNING * of the app's own role is not found here. "
            f"Let an administrator run: GRANT pg_read_all_stats TO {role}",
        )


def _about_balances(conn: sa.Connection, host: Host, mapping: HostMapping) -> Iterator[PlanNote]:
    if host.revision is None:
        for apart in balances_apart(conn, mapping):
            yield PlanNote("warning", apart.sentence())
    for row in conn.execute(_CHECKS, {"table": host.users.oid, "column": host.balance}):
        yield PlanNote(
            "warning",
            f"The rule {row.name} on {row.table}, {row.rule}, also holds for what the ledger writes. If it forbids a "
            f"{host.balance} below 0, a refund of credits that are spent already fails, since it leaves a debt. The "
            f"ledger itself spends no credit that is not there: ALTER TABLE {row.table} DROP CONSTRAINT {row.name}",
        )


def _about_checks(conn: sa.Connection, host: Host, mapping: HostMapping) -> Iterator[PlanNote]:
    """Rules of the app's about columns of its own that the functions write."""
    for word, ours in sorted(host.adopted - {("users", "credit_balance"), ("users", "updated_at")}):
        column = mapping.by_word[word].adoptable.get(ours, ours)
        for row in conn.execute(_CHECKS, {"table": host.by_word[word].oid, "column": column}):
            yield PlanNote(
                "note",
                f"The rule {row.name} on {row.table}, {row.rule}, also holds for what the ledger writes to {column}: "
                "a call that breaks it fails",
            )


_CHECKS = sa.text("""
    SELECT quote_ident(c.conname) AS name, c.conrelid::regclass::text AS table,
           pg_get_constraintdef(c.oid, true) AS rule
    FROM pg_constraint c JOIN pg_attribute a ON a.attrelid = c.conrelid AND a.attnum = ANY (c.conkey)
    WHERE c.contype = 'c' AND c.conrelid = :table AND a.attname = :column ORDER BY 1
""")


def _about_triggers(conn: sa.Connection, host: Host) -> Iterator[PlanNote]:
    for row in conn.execute(_BEFORE_UPDATE, {"tables": [table.oid for table in host.tables]}):
        yield PlanNote(
            "note",
            f"The trigger {row.name} on {row.table} runs {row.function} before each UPDATE, those of the ledger too. "
            f"If it changes or refuses what the ledger writes ({host.balance}, credit_sequence), the operation fails",
        )


_BEFORE_UPDATE = sa.text("""
    SELECT quote_ident(t.tgname) AS name, t.tgrelid::regclass::text AS table, t.tgfoid::regproc::text AS function
    FROM pg_trigger t
    WHERE t.tgrelid = ANY (CAST(:tables AS oid[])) AND NOT t.tgisinternal AND t.tgenabled <> 'D'
      AND t.tgtype & 19 = 19 AND t.tgname NOT LIKE 'tallystick\\_%' ORDER BY 2, 1
""")  # for each row, before, of an update


def _about_twins(conn: sa.Connection, host: Host, mapping: HostMapping) -> Iterator[PlanNote]:
    """Notes on columns of the app with the same meaning as one of ours, in another spelling."""
    for word, table in host.by_word.items():
        coming = {name for revision in after(host.revision) for name in revision.columns.get(word, ())}
        there = columns_of(conn, table)
        names = mapping.by_word[word].adoptable
        for ours in sorted(coming - there.keys()):
            for twin in spelled_otherwise(ours, there) if names.get(ours, ours) == ours else ():
                yield PlanNote(
                    "warning",
                    f'{table.shown} has "{twin}", and gets a column {ours} beside it: the ledger reads and writes '
                    f"only its own. {_in_place(word, ours, there[twin], named=ours in names)} the app's code write "
                    f'both where it writes "{twin}"',
                )


def _in_place(word: Word, ours: str, twin: HostColumn, *, named: bool) -> str:
    """The way to use the column of the app, up to the word before the other way."""
    if not named:
        return "Have"
    name = f"set {setting_of(word, ours)} = {json.dumps(twin.name, ensure_ascii=False)} in tallystick.toml"
    if wrong := unfit(word, ours, twin):
        return (
            f"If it means the same, make it {wrong.expected} (it is {wrong.found}) before the migration, and {name}. "
            "Else have"
        )
    return f"If it means the same, name it before the migration: {name}. Else have"


def _about_rules(conn: sa.Connection, host: Host) -> Iterator[PlanNote]:
    for row in conn.execute(_UPDATE_RULES, {"tables": [table.oid for table in host.tables]}):
        yield PlanNote(
            "warning",
            f"The rule {row.name} on {row.table} rewrites each UPDATE ({'DO INSTEAD' if row.instead else 'DO ALSO'}), "
            "those of the ledger too, and PostgreSQL then refuses some of them. A trigger does the same without that; "
            f"make one, then run: DROP RULE {row.name} ON {row.table}",
        )


_UPDATE_RULES = sa.text("""
    SELECT quote_ident(r.rulename) AS name, r.ev_class::regclass::text AS table, r.is_instead AS instead
    FROM pg_rewrite r
    WHERE r.ev_class = ANY (CAST(:tables AS oid[])) AND r.ev_type = '2' AND r.ev_enabled <> 'D' ORDER BY 2, 1
""")


def _about_collations(conn: sa.Connection, host: Host, mapping: HostMapping) -> Iterator[PlanNote]:
    for word, table in host.by_word.items():
        column = columns_of(conn, table)[mapping.by_word[word].key]
        if column.nondeterministic:
            yield PlanNote(
                "note",
                f"{table.shown}.{column.name} has the collation {'.'.join(column.collation or ())}, which is not "
                "deterministic: keys that differ in their letters' case or accents may be one key, for the ledger too",
            )


def _about_event_triggers(conn: sa.Connection) -> Iterator[PlanNote]:
    for row in conn.execute(_EVENT_TRIGGERS):
        yield PlanNote(
            "note",
            f"The event trigger {row.name} ({row.event}, {row.function}) runs for what the migration does, under its "
            f"locks too, and may refuse it. {_DROPS if row.event == 'sql_drop' else 'Then all of a run is taken back'}",
        )


_DROPS = "apply drops nothing of a fresh installation, undo does"

_EVENT_TRIGGERS = sa.text("""
    SELECT quote_ident(evtname) AS name, evtevent AS event, evtfoid::regproc::text AS function FROM pg_event_trigger
    WHERE evtenabled IN ('O', 'A') AND evtevent <> 'login' ORDER BY 1
""")


def _about_replicas(replicas: Sequence[Replica]) -> Iterator[PlanNote]:
    for replica in replicas:
        if replica.logical:
            yield PlanNote(
                "note",
                f"{replica.name} ({replica.state}) follows by logical replication: it repeats no lock. Where it "
                "is sent the tables, it is sent their new columns from the first change on",
            )
            continue
        late = f", {replica.lag_s:.1f} s late" if replica.lag_s else ""
        behind = f", {replica.behind_bytes / 1e6:.1f} MB behind" if replica.behind_bytes else ""
        yield PlanNote(
            "warning",
            f"The standby {replica.name} ({replica.state}{late}{behind}) repeats the lock, and no run can look who is "
            "there: while a query there holds one of the tables, everything after the lock is late and new queries of "
            "the table wait, until that query ends or max_standby_streaming_delay cancels it. Run it when no long "
            "report does",
        )
        if replica.sync_state in ("sync", "quorum"):
            yield PlanNote(
                "warning",
                f"Commits here wait for the standby {replica.name} (sync_state {replica.sync_state}): where "
                "synchronous_commit is remote_apply, every commit of your app waits for a query there just as long. "
                "Set remote_write or on for the time of the migration",
            )


def _about_publications(conn: sa.Connection, host: Host, planned: Sequence[PlannedStatement]) -> Iterator[PlanNote]:
    """Notes on publications: a subscriber gets new columns and tables too, and stops at the first that it lacks."""
    shown = {table.oid: table.shown for table in host.tables}
    statements = [one.sql for one in planned if one.phase != "online"]
    made = [found[1].replace('"', "") for found in map(_NEW_TABLE.match, statements) if found]
    added: dict[str, list[str]] = {}
    for table in host.tables:
        for statement in statements:
            if statement.startswith(f"ALTER TABLE {_table(table)} ADD COLUMN "):
                adds = statement.replace("ADD COLUMN ", "ADD COLUMN IF NOT EXISTS ")
                added.setdefault(table.shown, []).append(adds)
    rows = conn.execute(_PUBLICATIONS, {"tables": list(shown)})
    for name, group in groupby(rows, lambda row: row.name):
        sent = list(group)
        everything = any(row.everything for row in sent)
        schema = any(row.oid == host.users.oid and not row.named for row in sent)
        new = [table for table in made if everything or (schema and table.startswith(f"{host.users.schema}."))]
        columns = [adds for row in sent for adds in added.get(shown[row.oid], ())]
        if new:
            kept = [table for table in new if table.startswith("tallystick.")]
            emptied = f"TRUNCATE {', '.join(kept)}; " if kept else ""
            yield PlanNote(
                "warning",
                f"The publication {name} sends new columns, and new tables too ({', '.join(new)}), of which its "
                "subscribers know nothing: they stop at the first change until they have them. First run tallystick "
                "migrate apply with the address of each subscriber, then here. A subscriber is sent no rows of the new "
                f"tables until then is run there: {emptied}ALTER SUBSCRIPTION … REFRESH PUBLICATION",
            )
        elif columns:
            yield PlanNote(
                "warning",
                f"The publication {name} sends new columns, of which its subscribers know nothing: they stop at the "
                f"first change until they have them. Run there first: {'; '.join(columns)}",
            )


def _about_rights(conn: sa.Connection, host: Host) -> Iterator[PlanNote]:
    """Notes on forced policies and on privileges: those on a table hold for new columns, default ones on new tables."""
    for forced in forced_policies(conn, host, oid_of(conn, host.ledger_schema, LEDGER)):
        yield PlanNote("warning", f"{forced[0].upper()}{forced[1:]}")
    users = host.users
    for row in conn.execute(_WRITERS, {"users": users.oid}):
        named = "PUBLIC" if row.everyone else quoted(row.role)
        script = f"tallystick migrate sql --role {shlex.quote(row.role)}"
        yield PlanNote(
            "warning",
            f"{row.role} may {row.rights} every column of {users.shown}, {host.balance} too: it can make itself "
            "credits that no row of the ledger explains, and a policy tells rows apart, not columns. "
            + ("" if row.everyone else f"If it is your app's role, run after the migration what {script} prints. ")
            + f"If end users act as it, take it back: REVOKE {row.rights.replace(' and ', ', ')} ON {users.quoted} "
            f"FROM {named}, and GRANT UPDATE of the columns that are theirs",
        )
    lacking = conn.execute(_NO_TEMPORARY).one_or_none()
    if lacking is not None:
        yield PlanNote(
            "note",
            f"{lacking.role} may make no temporary tables, with which tallystick migrate status compares. Let an "
            f"administrator run: GRANT TEMPORARY ON DATABASE {quoted(lacking.database)} TO {quoted(lacking.role)}",
        )
    if host.revision is not None:
        return
    for row in conn.execute(_DEFAULT_RIGHTS, {"schema": users.schema}):
        new = "the ledger and what is in schema tallystick" if row.anywhere else "the ledger"
        script = f"tallystick migrate sql --role {shlex.quote(row.role)}"
        yield PlanNote(
            "note",
            f"By default {row.role} gets {row.rights} on tables that {row.maker} makes, so on {new}. apply takes that "
            f"back. If it is your app's role, run afterwards what {script} prints",
        )


def _table(table: HostTable) -> str:
    return Identifier(table.schema, table.table).as_string(None)


def _about_room(database_bytes: int, folder: Path | None) -> Iterator[PlanNote]:
    if folder is not None and not folder.is_dir():
        yield PlanNote("warning", f"there is no folder {folder} for a backup. Make it, or name another with --backup")
    elif folder is not None:
        free = shutil.disk_usage(folder).free
        if free < database_bytes:
            yield PlanNote(
                "warning",
                f"{folder} has {free / 1e9:.1f} GB free and the database takes {database_bytes / 1e9:.1f} GB: a backup "
                "is compressed and may fit, but need not. Name another place with --backup",
            )


_DDL_MS = 1.5  # measured for an operation that reads no rows
_KEY_MS = 0.05  # measured for a foreign key to a table that is locked: the server reads each anew after a change

_KEYS = sa.text("SELECT count(*) FROM pg_constraint WHERE contype = 'f' AND confrelid = ANY (CAST(:tables AS oid[]))")


def _estimated_hold_ms(statements: Sequence[PlannedStatement], keys: int) -> float:
    changes = [one.sql for one in statements if one.phase == "locked" and one.sql.startswith(("ALTER", "CREATE"))]
    return round(_DDL_MS * sum(1 + change.count(", ADD ") for change in changes) + _KEY_MS * keys, 1)


def _about_keys(host: Host, keys: int, hold_ms: float) -> Iterator[PlanNote]:
    """A note on more foreign keys to the app's tables than the usual stall budget allows."""
    if hold_ms > STALL_BUDGET_MS:
        budget_ms = math.ceil(hold_ms / STALL_BUDGET_MS) * 2 * STALL_BUDGET_MS
        yield PlanNote(
            "warning",
            f"{keys:,} foreign keys refer to {' and '.join(table.shown for table in host.tables)}, and the work under "
            f"the lock takes the longer the more there are: about {hold_ms:.0f} ms, and the stall budget is "
            f"{STALL_BUDGET_MS} ms. Allow more: tallystick migrate apply --stall-budget-ms {budget_ms}",
        )


def sql(conn: sa.Connection | None, config: Config, *, stall_budget_ms: int = STALL_BUDGET_MS) -> str:
    """The plan as a script for psql, for review or to be run by hand.

    Without a connection it contains all revisions, and adds all columns but those that the mapping names differently.

    Raises what ``examine`` does.
    """
    host = None
    if conn is not None:
        with reading_catalogues(conn):
            host = examine(conn, config)
    pending, messages = _messages(config, host, stall_budget_ms)
    parts = [
        "-- Tallystick: " + (", ".join(revision.revision for revision in pending) or "nothing to do"),
        "-- psql sends statements that are joined by \\; as one message: while a table is locked, none waits for the",
        "-- network. If a table is not free in time, the script fails and changes nothing: run it again.",
        "\\set ON_ERROR_STOP on",
    ]
    if messages:
        parts += [
            "",
            *(f"-- {revision.revision}: {revision.title}" for revision in pending),
            "-- new objects",
            text(messages.opening) + ";",
            "\n-- the tables, locked",
            text(messages.at_once, " \\;\n") + ";",
        ]
        if messages.online:
            parts += [
                "\n-- after the commit, online",
                "SET lock_timeout = 0; SET statement_timeout = 0;",
                text(messages.online.values()) + ";",
            ]
    return "\n".join(parts) + "\n"


def _messages(config: Config, host: Host | None, stall_budget_ms: int) -> tuple[tuple[Revision, ...], Messages | None]:
    """The pending revisions, and the messages of their run; None where there are none."""
    pending = after(host.revision if host else None)
    if not pending and (host is None or host.stored is None):
        return (), None
    names = HostNames.of(config.host, host.adopted if host else frozenset())
    messages = upward(
        pending,
        names,
        expected=host.revision if host else None,
        adopted=names.adopted_names,
        stall_budget_ms=stall_budget_ms,
        prepared=host.prepared if host else (),
        renewal=renewal_of(host, names) if host else (),
    )
    return pending, messages


def _statements(
    pending: Sequence[Revision], host: Host, config: Config, messages: Messages
) -> Iterator[PlannedStatement]:
    """Each statement with the locks that it adds; a rehearsal compares them with ``pg_locks``.

    They follow from the two messages of a run: the fence, then one lock of all tables that is stronger than any lock
    after it. By the contract of a revision only an online step reads a table.
    """
    names = HostNames.of(config.host, host.adopted)
    there = {_table(table): table.shown for table in host.tables}
    ledger = Identifier(host.ledger_schema, LEDGER).as_string(None)
    if host.revision is not None:
        there[ledger] = f"{host.ledger_schema}.{LEDGER}"
    tables = [there[name] for name in (table.as_string(None) for table in messages.locks) if name in there]
    fence = tuple((table, "SHARE UPDATE EXCLUSIVE") for table in tables)
    for statement in map(_shown, messages.opening):
        yield PlannedStatement("prepare", statement, fence if statement.startswith("LOCK TABLE ") else (), False, False)
    for number, statement in enumerate(map(_shown, messages.locked)):
        locks = () if number else tuple((table, "ACCESS EXCLUSIVE") for table in tables)
        yield PlannedStatement("locked", statement, locks, False, False)
    indexes = {name for revision in pending for name in revision.indexes(names)}
    for name, step in messages.online.items():
        table = there.get(_table(host.users) if name in indexes else ledger)
        locks = ((table, "SHARE UPDATE EXCLUSIVE"),) if table else ()
        yield PlannedStatement("online", _shown(step), locks, table is not None, False)


def _shown(statement: Composable) -> str:
    return text([statement])
