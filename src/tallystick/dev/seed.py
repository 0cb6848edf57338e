"""Named scenarios to develop against, from a new user to one in debt, made by the ledger's own operations.

Each scenario is one user under a fixed key with a fixed story, made in one transaction. A user who is there already
is left as it is, whatever was done to it since, so a second run changes nothing, and a run after a killed one makes
what is missing. ``reset`` takes a scenario away, so that the next run makes it anew.

Time. Workshops may be older than today, since ``created_at`` is the host's own column. The ledger's times are the
server's clock; the seed does not forge them, so a long history is long and not old. The one exception is a purchase
that has been pending for days: no operation writes a row of the past, so that row is inserted here. It moves no
balance, and giving ``Ledger.start_purchase`` a date would let every caller lie about time.
"""

from __future__ import annotations

import datetime as dt
import difflib
import hashlib
import ipaddress
import os
import uuid
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType
from typing import Any, Literal

import sqlalchemy as sa
from psycopg import sql
from sqlalchemy.dialects import postgresql as pg
from sqlalchemy.exc import DBAPIError, SAWarning
from uuid_utils.compat import uuid7

from tallystick.accounts import Accounts
from tallystick.config import Config, Pack, UsersTable, WorkshopsTable
from tallystick.database import translated
from tallystick.errors import InvalidArgument, Key, PermissionDenied, SeedImpossible, SeedRefused, shown
from tallystick.ledger import CreditTransaction, Ledger
from tallystick.schema import LEDGER, TRIGGERS, Schema, migration_log, verify

DEFAULT_PACKS = (
    Pack(name="Single Flight", credits=1, amount=7900),
    Pack(name="Serial Entrepreneur", credits=3, amount=14900),
)
"""On sale where the configuration names no packs."""

INTEGER_KEYS_FROM = -2_000_000_000
"""Integer keys of users and workshops: a thousand below this for each scenario, far from any sequence."""

ENVIRONMENT_VARIABLES = ("TALLYSTICK_ENV", "APP_ENV", "NODE_ENV", "RAILS_ENV", "VERCEL_ENV", "ENVIRONMENT")
MANY_USERS = 1_000

_NAMESPACE = uuid.UUID("5eed7a11-0000-5000-8000-000000000000")
_KEYS_PER_SCENARIO = 1_000
_TURN = int.from_bytes(_NAMESPACE.bytes[:8], signed=True)
_RESET_LOCK_TIMEOUT = "5s"

Bind = sa.Engine | sa.Connection
Needs = Literal["workshops", "created_at"]


class ScenarioOutcome(StrEnum):
    """The result of a scenario."""

    CREATED = "created"
    UNCHANGED = "unchanged"
    SKIPPED = "skipped"
    REMOVED = "removed"
    ABSENT = "absent"


@dataclass(frozen=True, slots=True, kw_only=True)
class Seeded:
    """One scenario of a run: its user's key, and the credits, None where there is no such user now.

    ``reason`` says why a scenario was skipped.
    """

    scenario: str
    user: Key
    balance: int | None
    outcome: ScenarioOutcome
    reason: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class SeedReport:
    """The result of a run, scenario by scenario in the order of ``SCENARIOS``."""

    scenarios: tuple[Seeded, ...]

    @property
    def changed(self) -> bool:
        """True where anything was made or removed."""
        return any(one.outcome in (ScenarioOutcome.CREATED, ScenarioOutcome.REMOVED) for one in self.scenarios)


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """A story about one user. ``number`` is its place among the fixed keys and never changes; nor does ``name``.

    ``workshops`` is how many it may make; ``needs`` what a host must have for it.
    """

    name: str
    description: str
    number: int
    workshops: int
    needs: Needs | None
    tell: Callable[[_Story], None]

    def unmet(self, schema: Schema) -> str | None:
        """Why this host cannot have the scenario, or None."""
        if self.needs is None:
            return None
        if schema.workshops is None:
            return "this host has no workshops table"
        if self.needs == "created_at" and "created_at" not in schema.workshops.c:
            return "host.workshops.created_at is not mapped"
        return None

    def user_key(self, schema: Schema) -> Key:
        """The key of the scenario's user."""
        return self._key(schema.host.users.key_type, "user", 0)

    def workshop_key(self, schema: Schema, number: int) -> Key:
        """The key of the scenario's workshop ``number``, from 1."""
        if schema.host.workshops is None or not 1 <= number <= self.workshops:
            raise AssertionError(f"scenario {self.name} has no workshop {number}")
        return self._key(schema.host.workshops.key_type, "workshop", number)

    def workshop_keys(self, schema: Schema) -> list[Key]:
        """The keys of all workshops that the scenario may have made."""
        if schema.workshops is None:
            return []
        return [self.workshop_key(schema, number) for number in range(1, self.workshops + 1)]

    def _key(self, key_type: str, kind: str, number: int) -> Key:
        text = f"seed_{self.name}_{number}" if number else f"seed_{self.name}"
        match key_type:
            case "uuid":
                return uuid.uuid5(_NAMESPACE, f"{kind}:{text}")
            case "text" | "char" | "citext":
                return text
            case _:
                return INTEGER_KEYS_FROM - self.number * _KEYS_PER_SCENARIO - number


@translated()
def seed(
    bind: Bind,
    config: Config,
    *,
    only: Sequence[str] = (),
    force_production: bool = False,
    progress: Callable[[int, int], None] | None = None,
    environ: Mapping[str, str] | None = None,
) -> SeedReport:
    """Make the scenarios that are not there yet, all or those named in ``only``.

    With an Engine each scenario is a transaction of its own, so that an interrupted run leaves whole ones. With a
    Connection all of it happens in the caller's transaction. ``progress`` is called with the scenarios done and the
    scenarios in all. ``environ`` stands for the process's environment.

    Raises:
        InvalidArgument: ``only`` names no scenario.
        SeedRefused: this does not look like a development database, and ``force_production`` is not set.
        SeedImpossible: the host's tables do not take such rows; names the column or the constraint.
        NotMigrated, SchemaTooNew, DatabaseError.
    """
    chosen = _chosen(only)
    schema = Schema.of(config.host)
    with _transaction(bind) as conn:
        verify(conn, config.host)
        if not force_production:
            _refuse_production(conn, schema, environ, "tallystick seed --force-production")
        host = _HostTables(conn, schema)
        present = _present(conn, schema, chosen)
        if any(scenario.name not in present and scenario.unmet(schema) is None for scenario in chosen):
            host.rehearse(conn)
    ledger = Ledger(config)
    done = []
    for scenario in chosen:
        done.append(_seed_one(bind, ledger, host, scenario))
        if progress is not None:
            progress(len(done), len(chosen))
    return SeedReport(scenarios=tuple(done))


@translated()
def reset(
    bind: Bind,
    config: Config,
    *,
    only: Sequence[str] = (),
    force_production: bool = False,
    environ: Mapping[str, str] | None = None,
) -> SeedReport:
    """Remove what ``seed`` made, all scenarios or those named in ``only``, and nothing else; in one transaction.

    A seeded user goes with all of its ledger, whoever wrote it. The ledger refuses DELETE, so the trigger that does
    is off for the length of this transaction, which only the table's owner can do and which keeps other writers out
    meanwhile. Rows of the host that hang on to a seeded user or workshop, and were not made by the seed, are a reason
    to remove nothing (those that the host itself deletes in cascade go along).

    Raises:
        InvalidArgument, SeedRefused: as ``seed``.
        SeedImpossible: other rows depend on the seeded ones; names the table.
        PermissionDenied: this role does not own the ledger.
        Conflict: other writers kept the ledger busy for five seconds.
        NotMigrated, SchemaTooNew, DatabaseError.
    """
    chosen = _chosen(only)
    schema = Schema.of(config.host)
    users = {scenario.user_key(schema): scenario for scenario in chosen}
    workshops = {key: scenario for scenario in chosen for key in scenario.workshop_keys(schema)}
    ledger = schema.credit_transactions
    with _removing(), _transaction(bind) as conn:
        verify(conn, config.host)
        if not force_production:
            _refuse_production(conn, schema, environ, "tallystick seed --reset --force-production")
        if schema.workshops is not None:
            _refuse_entangled(conn, schema.workshops, list(users), list(workshops))
        removed = set()
        if _present(conn, schema, chosen):
            with _append_only_lifted(conn, ledger):
                conn.execute(sa.delete(ledger).where(ledger.c.user_id.in_(users)))
        for table, made in ((schema.workshops, workshops), (schema.users, users)):
            if table is not None:
                gone = conn.scalars(sa.delete(table).where(table.c.key.in_(made)).returning(table.c.key))
                removed |= {made[key].name for key in gone}
    return SeedReport(
        scenarios=tuple(
            Seeded(
                scenario=scenario.name,
                user=user,
                balance=None,
                outcome=ScenarioOutcome.REMOVED if scenario.name in removed else ScenarioOutcome.ABSENT,
            )
            for user, scenario in users.items()
        )
    )


def _chosen(only: Sequence[str]) -> list[Scenario]:
    for name in only:
        if name not in SCENARIOS:
            near = difflib.get_close_matches(name, SCENARIOS, n=1)
            hint = f"; did you mean {near[0]}?" if near else ". List them with: tallystick seed --list"
            raise InvalidArgument(f"there is no scenario {shown(name)}{hint}", argument="only", value=name)
    return [scenario for scenario in SCENARIOS.values() if not only or scenario.name in only]


@contextmanager
def _transaction(bind: Bind) -> Iterator[sa.Connection]:
    """Whole scenarios, one run's at a time."""
    if isinstance(bind, sa.Connection):
        _take_turn(bind)
        yield bind
        return
    with translated(connecting=True):
        conn = bind.connect()
    # an engine in autocommit would leave half a scenario behind when it is killed
    with conn.execution_options(isolation_level="READ COMMITTED") as conn, conn.begin():
        _take_turn(conn)
        yield conn


def _take_turn(conn: sa.Connection) -> None:
    # ON CONFLICT would not do: two INSERTs of one row deadlock where the table has a second unique index
    conn.execute(sa.select(sa.func.pg_advisory_xact_lock(_TURN)))


def _present(conn: sa.Connection, schema: Schema, chosen: Sequence[Scenario]) -> set[str]:
    by_key = {scenario.user_key(schema): scenario.name for scenario in chosen}
    key = schema.users.c.key
    return {by_key[found] for found in conn.scalars(sa.select(key).where(key.in_(by_key)))}


def _seed_one(bind: Bind, ledger: Ledger, host: _HostTables, scenario: Scenario) -> Seeded:
    schema = host.schema
    user = scenario.user_key(schema)
    unmet = scenario.unmet(schema)
    if unmet is not None:
        return Seeded(scenario=scenario.name, user=user, balance=None, outcome=ScenarioOutcome.SKIPPED, reason=unmet)
    with host.obeyed(), _transaction(bind) as conn:
        outcome = ScenarioOutcome.UNCHANGED
        if not _present(conn, schema, [scenario]):
            host.insert_user(conn, scenario)
            scenario.tell(_Story(conn, ledger, host, scenario))
            outcome = ScenarioOutcome.CREATED
        balance = ledger.balance(conn, user)
    return Seeded(scenario=scenario.name, user=user, balance=balance, outcome=outcome)


# --- development, or not ---


def _refuse_production(conn: sa.Connection, schema: Schema, environ: Mapping[str, str] | None, remedy: str) -> None:
    """Raise SeedRefused with every sign that people depend on this database."""
    environ = os.environ if environ is None else environ
    ledger, users = schema.credit_transactions.c, schema.users.c
    signs = [
        f"{name} is {environ[name]!r}"
        for name in ENVIRONMENT_VARIABLES
        if environ.get(name, "").lower() in ("production", "prod", "live")
    ]
    server = conn.connection.driver_connection.info.host  # type: ignore[union-attr]  # psycopg's
    if not _is_local(server) and environ.get("TALLYSTICK_ENV", "").lower() not in ("development", "test"):
        signs.append(f"its server is {server}, not this machine (a development server? set TALLYSTICK_ENV=development)")
    live = sa.select(ledger.id).where(ledger.stripe_session_id.like("cs\\_live\\_%")).limit(1)
    if conn.scalar(live) is not None:
        signs.append("its ledger holds purchases from live Stripe sessions")
    ours = [scenario.user_key(schema) for scenario in SCENARIOS.values()]
    others = sa.select(users.key).where(users.key.not_in(ours)).limit(MANY_USERS + 1).subquery()
    if (conn.scalar(sa.select(sa.func.count()).select_from(others)) or 0) > MANY_USERS:
        signs.append(f"it has more than {MANY_USERS} users of its own")
    if signs:
        reason = "; ".join(signs)
        raise SeedRefused(
            f"this does not look like a development database: {reason}. Nothing was changed. "
            f"If it is one all the same, type: {remedy}",
            reason=reason,
        )


def _is_local(server: str) -> bool:
    """A socket, this machine, or a container's name; by what was connected to, not by what a URL says."""
    if not server or server.startswith(("/", "@")) or server == "host.docker.internal":
        return True
    try:
        return ipaddress.ip_address(server).is_loopback
    except ValueError:
        return "." not in server


# --- removing ---


@contextmanager
def _append_only_lifted(conn: sa.Connection, ledger: sa.Table) -> Iterator[None]:
    """DELETE is allowed in here; the lock that this takes lasts until the transaction ends."""
    owner = conn.execute(_OWNER, {"schema": ledger.schema, "table": ledger.name}).one()
    if not owner.owned:
        raise PermissionDenied(
            f"the seed is removed by the owner of {ledger.schema}.{LEDGER}, {owner.name}; {owner.role} is not. "
            "Nothing was removed. Run it with that role's address: --database-url",
            sqlstate=None,
        )
    conn.execute(sa.select(sa.func.set_config("lock_timeout", _RESET_LOCK_TIMEOUT, sa.true())))
    _alter_trigger(conn, ledger, "DISABLE")
    yield
    _alter_trigger(conn, ledger, "ENABLE")


_OWNER = sa.text("""
    SELECT r.rolname AS name, current_user AS role, pg_has_role(current_user, c.relowner, 'USAGE') AS owned
    FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace JOIN pg_roles r ON r.oid = c.relowner
    WHERE n.nspname = :schema AND c.relname = :table
""")


def _alter_trigger(conn: sa.Connection, ledger: sa.Table, action: Literal["ENABLE", "DISABLE"]) -> None:
    statement = sql.SQL("ALTER TABLE {} {} TRIGGER {}").format(
        sql.Identifier(str(ledger.schema), ledger.name), sql.SQL(action), sql.Identifier(TRIGGERS[LEDGER][0])
    )
    conn.exec_driver_sql(statement.as_string(), execution_options={"no_parameters": True})


def _refuse_entangled(conn: sa.Connection, workshops: sa.Table, users: list[Key], ours: list[Key]) -> None:
    """A workshop that someone gave to a seeded user, or took from one, is not the seed's to remove or to orphan."""
    names = workshops.c
    owned = sa.func.coalesce(names.owner.in_(users), sa.false())
    found = conn.execute(sa.select(names.key, names.owner).where(names.key.in_(ours) != owned).limit(1)).one_or_none()
    if found is not None:
        table = f"{workshops.schema}.{workshops.name}"
        raise SeedImpossible(
            f"workshop {found.key} in {table} (owner: {found.owner}) was made or moved by someone else. "
            "Delete it, or give it another owner, first; nothing was removed",
            table=table,
            column=None,
            constraint=None,
        )


@contextmanager
def _removing() -> Iterator[None]:
    try:
        yield
    except DBAPIError as error:
        fault = _Fault.of(error)
        if fault is None:
            raise
        raise SeedImpossible(
            f"the seeded rows cannot be removed: {fault.said}. Delete what depends on them in {fault.table} first; "
            "nothing was removed",
            table=fault.table,
            column=fault.column,
            constraint=fault.constraint,
        ) from error


@dataclass(frozen=True, slots=True)
class _Fault:
    """A refusal by a rule of the host: a constraint, a type, or a trigger that raises."""

    table: str
    column: str | None
    constraint: str | None
    said: str

    @staticmethod
    def of(error: DBAPIError) -> _Fault | None:
        """None when it is not about the values."""
        state = getattr(error.orig, "sqlstate", None) or ""
        if state[:2] not in ("22", "23") and state != "P0001":
            return None
        said = getattr(error.orig, "diag")  # noqa: B009 - psycopg's, where there is an sqlstate
        table = ".".join(part for part in (said.schema_name, said.table_name) if part)
        text = f"{said.message_primary} ({said.message_detail})" if said.message_detail else said.message_primary
        return _Fault(table or "the host's tables", said.column_name, said.constraint_name, text)


# --- rows of the host ---


class _HostTables:
    """Adds users and workshops to tables whose other columns are the host's business."""

    def __init__(self, conn: sa.Connection, schema: Schema) -> None:
        self.schema = schema
        users, workshops = schema.host.users, schema.host.workshops
        self.users = _HostTable(conn, users, {users.key, users.email or users.key}, None)
        self.workshops: _HostTable | None = None
        if workshops is not None:
            given = {workshops.key, workshops.owner, workshops.title, workshops.created_at}
            self.workshops = _HostTable(conn, workshops, {name for name in given if name}, schema.users)

    def insert_user(self, conn: sa.Connection, scenario: Scenario) -> None:
        """Add the scenario's user."""
        names = self.schema.host.users
        label = f"seed_{scenario.name}"
        values = {names.key: scenario.user_key(self.schema)}
        if names.email:
            values[names.email] = self.users.fitted(names.email, f"{label}@example.com")
        text = scenario.name.replace("_", " ").capitalize()
        row = self.users.row(conn, _Row(label, scenario.number * _KEYS_PER_SCENARIO, text), values, None)
        self.users.insert(conn, [row])

    def insert_workshops(
        self,
        conn: sa.Connection,
        scenario: Scenario,
        titles: Sequence[str],
        *,
        first: int,
        created_at: dt.datetime | None,
    ) -> list[Key]:
        """Add workshops ``first``, ``first + 1``, … of the scenario, in this order."""
        names, table = self.schema.host.workshops, self.workshops
        if names is None or table is None:
            raise AssertionError("this host has no workshops table")
        rows = []
        user = scenario.user_key(self.schema)
        for number, title in enumerate(titles, first):
            values = {names.key: scenario.workshop_key(self.schema, number), names.owner: user}
            if names.title:
                values[names.title] = table.fitted(names.title, title, cut=True)
            if names.created_at:
                values[names.created_at] = _moment(table.types[names.created_at], created_at or dt.datetime.now(dt.UTC))
            row = _Row(f"seed_{scenario.name}_{number}", scenario.number * _KEYS_PER_SCENARIO + number, title)
            rows.append(table.row(conn, row, values, user))
        table.insert(conn, rows)
        return [row[names.key] for row in rows]

    def rehearse(self, conn: sa.Connection) -> None:
        """Add one row to each table and take it back: what the host refuses is known before anything is written."""
        with self.obeyed(), conn.begin_nested() as savepoint:
            self.insert_user(conn, _REHEARSAL)
            if self.workshops is not None:
                self.insert_workshops(conn, _REHEARSAL, ["Rehearsal"], first=1, created_at=None)
            conn.execute(sa.text("SET CONSTRAINTS ALL IMMEDIATE"))
            savepoint.rollback()

    @contextmanager
    def obeyed(self) -> Iterator[None]:
        """Raise what the host's rules refuse as SeedImpossible."""
        try:
            yield
        except DBAPIError as error:
            fault = _Fault.of(error)
            if fault is None:
                raise
            raise SeedImpossible(
                f"{fault.table} does not take the seed's row: {fault.said}. Nothing was written of it. "
                "Give the column a DEFAULT that the rule accepts, and the seed leaves it alone; if the row is left "
                "over from an earlier seed, run: tallystick seed --reset",
                table=fault.table,
                column=fault.column,
                constraint=fault.constraint,
            ) from error


class _HostTable:
    """One table: the columns that must be given, each with a way to make a value for it.

    ``given`` are the mapped columns; ``owner`` is the table of users, where each row belongs to one.
    """

    def __init__(
        self, conn: sa.Connection, names: UsersTable | WorkshopsTable, given: set[str], owner: sa.Table | None
    ) -> None:
        inspector = sa.inspect(conn)
        self.shown = f"{names.schema}.{names.table}"
        self.owner = owner
        where: Mapping[str, Any] = {"table_name": names.table, "schema": names.schema}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SAWarning)  # of types it does not know; where it matters, we say so
            columns = inspector.get_columns(**where)
        self.types: dict[str, sa.types.TypeEngine[Any]] = {column["name"]: column["type"] for column in columns}
        self.table = sa.table(
            names.table, *(sa.column(name, kind) for name, kind in self.types.items()), schema=names.schema
        )
        self.unique = _unique_columns(inspector, where)
        required = {column["name"] for column in columns if _must_be_given(column)} - given
        self.references: list[Any] = [
            {**key, "referred_schema": key["referred_schema"] or inspector.default_schema_name}
            for key in inspector.get_foreign_keys(**where)
            if required & set(key["constrained_columns"])
        ]
        self.referred: dict[str, Any] = {}
        for key in self.references:
            if not self._refers_to_owner(key):
                self.referred |= self._referred(conn, key, None)
            required -= set(key["constrained_columns"])
        self.required = sorted(required)
        for name in self.required:
            if _Row("", 0, "").value(self.types[name], name, unique=False) is None:
                raise SeedImpossible(
                    f"{self.shown}.{name} is NOT NULL without a default, and the seed has no value for its type "
                    f"({self.types[name]!r}). Nothing was written. Give it one: ALTER TABLE {self.shown} "
                    f"ALTER COLUMN {name} SET DEFAULT …",
                    table=self.shown,
                    column=name,
                    constraint=None,
                )

    def row(self, conn: sa.Connection, row: _Row, values: Mapping[str, Any], user: Key | None) -> dict[str, Any]:
        """A whole row around ``values``; ``user`` owns it, where rows have an owner."""
        made = dict(self.referred)
        for key in self.references:
            if self._refers_to_owner(key):
                made |= self._referred(conn, key, user)
        for name in self.required:
            made[name] = row.value(self.types[name], name, unique=name in self.unique)
        return made | dict(values)

    def insert(self, conn: sa.Connection, rows: Sequence[Mapping[str, Any]]) -> None:
        """Add whole rows, all of the same columns."""
        names = {f"given_{number}": name for number, name in enumerate(rows[0])}
        # for keys that are GENERATED ALWAYS AS IDENTITY; to others it is nothing
        places = ", ".join(f":{given}" for given in names)
        values = sa.text("OVERRIDING SYSTEM VALUE VALUES (" + places + ")").bindparams(
            *(sa.bindparam(given, type_=self.types[name]) for given, name in names.items())
        )
        statement = sa.insert(self.table).from_select(list(names.values()), values.columns())
        conn.execute(statement, [{given: row[name] for given, name in names.items()} for row in rows])

    def fitted(self, column: str, text: str, *, cut: bool = False) -> str:
        """``text``, within the length of ``column``."""
        return _fit(self.types[column], text, cut=cut)

    def _refers_to_owner(self, key: Any) -> bool:
        owner = self.owner
        return owner is not None and (key["referred_schema"], key["referred_table"]) == (owner.schema, owner.name)

    def _referred(self, conn: sa.Connection, key: Any, user: Key | None) -> dict[str, Any]:
        """Values for a foreign key: those of the owner's row, or of the first row that there is."""
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


def _must_be_given(column: Any) -> bool:
    kind = column["type"]
    not_null, default = not column["nullable"], column["default"]
    if isinstance(kind, pg.DOMAIN):
        not_null, default = not_null or bool(kind.not_null), default or kind.default
    return not_null and default is None and not column.get("computed") and not column.get("identity")


def _unique_columns(inspector: sa.Inspector, where: Mapping[str, Any]) -> set[str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SAWarning)  # of index features that do not matter here
        indexes = [index["column_names"] for index in inspector.get_indexes(**where) if index["unique"]]
    indexes.append([*inspector.get_pk_constraint(**where)["constrained_columns"]])
    return {name for names in indexes for name in names if name is not None}


_CONSTANTS: tuple[tuple[type[sa.types.TypeEngine[Any]], Any], ...] = (
    (sa.ARRAY, []),
    (sa.JSON, {}),
    (sa.Boolean, False),
    (sa.Interval, dt.timedelta(hours=1)),
    (pg.INTERVAL, dt.timedelta(hours=1)),
    (pg.INET, ipaddress.ip_address("127.0.0.1")),
    (pg.CIDR, ipaddress.ip_network("127.0.0.0/8")),
)


@dataclass(frozen=True, slots=True)
class _Row:
    """The values of a row's unmapped columns: ``label`` and ``number`` are its alone, ``text`` is for people."""

    label: str
    number: int
    text: str

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
        return 0 if fraction else 1  # numeric(3, 3) holds no 1

    def _words(self, kind: sa.String, column: str, *, unique: bool) -> str:
        if "email" in column:
            return _fit(kind, f"{self.label}@example.com")
        if "name" in column and not unique:
            return _fit(kind, self.text, cut=True)
        return _fit(kind, self.label)


def _moment(kind: sa.types.TypeEngine[Any], moment: dt.datetime) -> Any:
    """``moment`` (UTC) for a column; one without a time zone holds UTC, by custom."""
    match kind:
        case sa.Date():
            return moment.date()
        case sa.Time():
            return moment.timetz() if kind.timezone else moment.time()
        case sa.DateTime() if not kind.timezone:
            return moment.replace(tzinfo=None)
    return moment


def _fit(kind: sa.types.TypeEngine[Any], text: str, *, cut: bool = False) -> str:
    """``text`` in the length of its type; what must stay unlike all others becomes a digest of itself."""
    longest = kind.length if isinstance(kind, sa.String) else None
    if longest is None or len(text) <= longest:
        return text
    return text[:longest] if cut else hashlib.sha256(text.encode()).hexdigest()[:longest]


# --- telling a story ---


class _Story:
    """One scenario while it is made: its user, and what happens to it.

    Each act's idempotency key, and each purchase's Stripe names, are the scenario's name and a count.
    """

    def __init__(self, conn: sa.Connection, ledger: Ledger, host: _HostTables, scenario: Scenario) -> None:
        self.conn, self.ledger, self.host, self.scenario = conn, ledger, host, scenario
        self.config, self.accounts = ledger.config, Accounts(ledger.config)
        self.schema = host.schema
        self.user = scenario.user_key(host.schema)
        self._acts = 0
        self._workshops = 0

    def onboard(self) -> None:
        """Through onboarding, and known to Stripe."""
        self.accounts.complete_onboarding(self.conn, self.user)
        self.accounts.set_stripe_customer(self.conn, self.user, f"cus_seed_{self.scenario.name}")

    def pack(self, credits: int) -> Pack:
        """The smallest pack on sale that has at least so many credits, else one of our own."""
        fitting = [pack for pack in self.config.packs if pack.credits >= credits]
        fitting = fitting or [pack for pack in DEFAULT_PACKS if pack.credits >= credits]
        return min(fitting, key=lambda pack: pack.credits)

    def start(self, credits: int = 1) -> CreditTransaction:
        """Begin to buy a pack of at least ``credits``, as far as Stripe's page."""
        pack = self.pack(credits)
        started = self.ledger.start_purchase(
            self.conn,
            self.user,
            credits=pack.credits,
            description=f"Purchased {pack.name} pack",
            key=self._key(),
            stripe_price_id=pack.stripe_price_id,
        )
        return self.ledger.attach_session(
            self.conn, self.user, started.id, stripe_session_id=f"cs_test_{self._stripe_name()}"
        )

    def start_days_ago(self, days: int) -> None:
        """Begin to buy, and never come back. See the module on why this row does not come from the ledger."""
        pack, past = self.pack(1), dt.timedelta(days=days)
        self.conn.execute(
            sa.insert(self.schema.credit_transactions).values(
                id=uuid7(),
                user_id=self.user,
                type="purchase",
                status="pending",
                amount=pack.credits,
                description=f"Purchased {pack.name} pack",
                stripe_price_id=pack.stripe_price_id,
                idempotency_key=self._key(),
                stripe_session_id=f"cs_test_{self._stripe_name()}",
                created_at=sa.func.now() - past,
            )
        )

    def pay(self, started: CreditTransaction) -> CreditTransaction:
        """Stripe says that it was paid."""
        pack = self.pack(started.amount)
        return self.ledger.complete_purchase(
            self.conn,
            self.user,
            purchase=started.id,
            amount_paid=pack.amount,
            currency=None if pack.amount is None else pack.currency,
            stripe_payment_intent_id=f"pi_{self._stripe_name()}",
        )

    def buy(self, credits: int = 1) -> CreditTransaction:
        """Buy a pack of at least ``credits``."""
        return self.pay(self.start(credits))

    def fail(self, started: CreditTransaction) -> None:
        """Stripe says that the session expired."""
        self.ledger.fail_purchase(self.conn, self.user, purchase=started.id, reason="expired")

    def refund(self, bought: CreditTransaction, credits: int | None = None) -> None:
        """Give back ``credits`` of a purchase, or all of it."""
        self.ledger.refund(self.conn, self.user, bought.id, credits=credits, key=self._key())

    def reinstate(self, bought: CreditTransaction) -> None:
        """Give back what refunds of a purchase took."""
        self.ledger.reinstate(self.conn, self.user, bought.id, key=self._key())

    def grant(self, credits: int, *, description: str) -> None:
        """Give credits that nobody paid for."""
        self.ledger.grant(self.conn, self.user, credits=credits, key=self._key(), description=description)

    def spend(self, amount: int = 1, *, description: str | None = None) -> None:
        """Spend credits on no workshop."""
        self.ledger.consume(self.conn, self.user, credits=amount, key=self._key(), description=description)

    def draft(self, *titles: str, created_at: dt.datetime | None = None) -> list[Key]:
        """Make workshops, locked ones; none where the host has no such thing."""
        if self.schema.workshops is None:
            return []
        first, self._workshops = self._workshops + 1, self._workshops + len(titles)
        return self.host.insert_workshops(self.conn, self.scenario, titles, first=first, created_at=created_at)

    def unlock(self, workshop: Key) -> None:
        """Spend a credit on a workshop."""
        self.ledger.consume(self.conn, self.user, workshop=workshop, key=self._key())

    def _key(self) -> str:
        self._acts += 1
        return f"seed:{self.scenario.name}:{self._acts}"

    def _stripe_name(self) -> str:
        return f"seed_{self.scenario.name}_{self._acts}"


# --- the scenarios ---

_scenarios: dict[str, Scenario] = {}


def _scenario(
    number: int, *, workshops: int = 0, needs: Needs | None = None
) -> Callable[[Callable[[_Story], None]], Callable[[_Story], None]]:
    """Register a story under its function's name; its docstring is what ``--list`` shows."""

    def register(tell: Callable[[_Story], None]) -> Callable[[_Story], None]:
        name = tell.__name__.strip("_")
        description = (tell.__doc__ or "").rstrip(".")
        _scenarios[name] = Scenario(
            name=name, description=description, number=number, workshops=workshops, needs=needs, tell=tell
        )
        return tell

    return register


_REHEARSAL = Scenario(name="rehearsal", description="", number=0, workshops=1, needs=None, tell=lambda _story: None)


@_scenario(1)
def _new(_story: _Story) -> None:
    """A new user: 0 credits, onboarding not begun."""


@_scenario(2, workshops=2)
def _mid_onboarding(story: _Story) -> None:
    """Half-way through onboarding: a credit bought, workshops drafted, nothing unlocked."""
    story.buy()
    story.draft("First Idea", "Second Thoughts")


@_scenario(3, workshops=1)
def _funded(story: _Story) -> None:
    """Onboarded, with credits to spend and a workshop to spend one on."""
    story.onboard()
    story.buy(3)
    story.draft("Mobile App Discovery")


@_scenario(4)
def _long_history(story: _Story) -> None:
    """Sixty packs bought and mostly spent, some of it refunded: pages of history."""
    story.onboard()
    for number in range(1, 61):
        bought = story.buy(3 if number % 3 == 0 else 1)
        story.spend(bought.amount if number % 6 else 1, description=f"Credits consumed for session {number}")
        if number % 15 == 0:
            story.refund(bought, 1)


@_scenario(5)
def _refunded_in_full(story: _Story) -> None:
    """A purchase given back whole: 0 credits again."""
    story.onboard()
    story.refund(story.buy())


@_scenario(6)
def _refunded_in_part(story: _Story) -> None:
    """A purchase of several credits, one of them given back."""
    story.onboard()
    story.refund(story.buy(3), 1)


@_scenario(7)
def _in_debt(story: _Story) -> None:
    """Spent first, refunded afterwards: the balance is below zero."""
    story.onboard()
    bought = story.buy(3)
    story.spend(bought.amount)
    story.refund(bought)


@_scenario(8, workshops=250, needs="workshops")
def _many_workshops(story: _Story) -> None:
    """250 workshops, 100 of them unlocked."""
    story.onboard()
    workshops = story.draft(*(f"Workshop {number:03}" for number in range(1, 251)))
    credits = 0
    while credits < 100:  # noqa: PLR2004 - as the description says
        credits += story.buy(3).amount
    for workshop in workshops[::5] + workshops[1::5]:
        story.unlock(workshop)


@_scenario(9, workshops=4, needs="created_at")
def _grandfathered(story: _Story) -> None:
    """Three workshops from before the paywall, open without a credit, and a locked one from after."""
    story.onboard()
    paywalled_since = story.config.grandfathered_before or story.conn.scalar(
        sa.select(sa.func.min(migration_log.c.applied_at)).where(migration_log.c.revision == "0001")
    )
    before = (paywalled_since or dt.datetime.now(dt.UTC)) - dt.timedelta(days=30)
    story.draft("From the Early Days", "Before Credits", "Free Forever", created_at=before.astimezone(dt.UTC))
    story.draft("From After the Paywall")


@_scenario(10)
def _pending(story: _Story) -> None:
    """At Stripe's checkout right now: a pending purchase."""
    story.onboard()
    story.start()


@_scenario(11)
def _pending_for_days(story: _Story) -> None:
    """A purchase pending for three days: what a lost webhook leaves, and the audit reports."""
    story.onboard()
    story.start_days_ago(3)


@_scenario(12)
def _failed(story: _Story) -> None:
    """A purchase that failed: the session expired."""
    story.onboard()
    story.fail(story.start())


@_scenario(13)
def _failed_then_paid(story: _Story) -> None:
    """A purchase that failed, and was paid after all."""
    story.onboard()
    started = story.start()
    story.fail(started)
    story.pay(started)


@_scenario(14)
def _deleted_user(story: _Story) -> None:
    """A soft-deleted user who still has credits."""
    story.onboard()
    story.buy(3)
    story.accounts.delete_user(story.conn, story.user)


@_scenario(15, workshops=2, needs="workshops")
def _deleted_workshop(story: _Story) -> None:
    """An unlocked workshop that was soft-deleted, beside an unlocked one that was not."""
    story.onboard()
    story.buy(3)
    for workshop in (deleted := story.draft("Deleted After Use", "Still There")):
        story.unlock(workshop)
    story.accounts.delete_workshop(story.conn, deleted[0])


NAMES = (
    "🎪 Café Ünïcode 👩‍👩‍👧‍👦 for teams 🏳️‍🌈",
    "ورشة عمل: اكتشاف تطبيق الجوال",
    "סדנה: גילוי אפליקציות (2026) — mixed with English",
    ("A title of exactly five hundred characters, as someone will surely paste one. " * 7)[:499] + "!",
)
"""The titles of the scenario ``names``."""


@_scenario(16, workshops=len(NAMES))
def _names(story: _Story) -> None:
    """Names with emoji, right-to-left text and 500 characters."""
    story.onboard()
    credits = 0
    while credits < len(NAMES):
        credits += story.buy(3).amount
    for workshop in (workshops := story.draft(*NAMES)):
        story.unlock(workshop)
    for name in () if workshops else NAMES:
        story.spend(description=name)


@_scenario(17)
def _granted(story: _Story) -> None:
    """Welcome credits, never bought any."""
    story.onboard()
    story.grant(2, description="Welcome to the beta")


@_scenario(18)
def _dispute_won(story: _Story) -> None:
    """A purchase that was disputed and taken back, and given back when the dispute was won."""
    story.onboard()
    bought = story.buy(3)
    story.refund(bought)
    story.reinstate(bought)


SCENARIOS: Mapping[str, Scenario] = MappingProxyType(_scenarios)
"""Every scenario by name, in the order in which they are made."""
