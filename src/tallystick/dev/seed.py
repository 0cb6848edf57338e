"""Named scenarios for development, from a new user to one in debt, made by the ledger's own operations.

Each scenario is one user with a fixed key and history, made in one transaction. An existing user is left as it is, so
a second run changes nothing, and a run after a killed one makes the missing users. ``reset`` removes a scenario, so
that the next run makes it again.

Workshops may be older than today, since ``created_at`` is the host's own column. The ledger's times are the server's
clock, and the seed does not forge them, so a long history is not old. The only exception is a purchase that has been
pending for days: no operation writes a past row, so the seed inserts it. It moves no balance; a date in
``Ledger.start_purchase`` would let every caller forge times.
"""

from __future__ import annotations

import datetime as dt
import difflib
import ipaddress
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType
from typing import Any, Literal

import sqlalchemy as sa
from psycopg import sql
from sqlalchemy.exc import DBAPIError
from uuid_utils.compat import uuid7

from tallystick.accounts import Accounts
from tallystick.config import Config, Pack
from tallystick.database import refuse_hidden_rows, refuse_other_than, server_message, translated
from tallystick.declared_tables import Schema, days, events, migration_log
from tallystick.dev.host_tables import HostFault, HostRow, HostTables
from tallystick.errors import InvalidArgument, Key, PermissionDenied, SeedImpossible, SeedRefused, shown
from tallystick.ledger import CreditTransaction, Ledger
from tallystick.progress import OnProgress, Progress, ignore_progress
from tallystick.schema import LEDGER, TRIGGERS, verify

DEFAULT_PACKS = (
    Pack(name="Single Flight", credits=1, amount=7900),
    Pack(name="Serial Entrepreneur", credits=3, amount=14900),
)
"""The packs if the configuration has none."""

ENVIRONMENT_VARIABLES = ("TALLYSTICK_ENV", "APP_ENV", "NODE_ENV", "RAILS_ENV", "VERCEL_ENV", "ENVIRONMENT")
MANY_USERS = 1_000

_ROWS_PER_SCENARIO = 1_000
_TURN = 0x5EED7A1100005000
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
    """One scenario of a run: its user's key, and the credits, None if there is no such user now.

    ``reason`` is why a scenario was skipped.
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
        """True if anything was made or removed."""
        return any(one.outcome in (ScenarioOutcome.CREATED, ScenarioOutcome.REMOVED) for one in self.scenarios)


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """A scenario for one user. ``number`` determines its keys and never changes; nor does ``name``.

    ``workshops`` is the most that it makes; ``needs`` is a table or column that the host must have; ``users`` is the
    number of users that it makes, of which the first is its own.
    """

    name: str
    description: str
    number: int
    workshops: int
    needs: Needs | None
    make: Callable[[_ScenarioRun], None]
    users: int = 1

    def unmet(self, schema: Schema) -> str | None:
        """The reason why this host cannot have the scenario, or None."""
        if self.needs is None:
            return None
        if (impossible := _without_workshops(schema)) is not None:
            return impossible
        if self.needs == "created_at" and (schema.host.workshops is None or schema.host.workshops.created_at is None):
            return "host.workshops.created_at is not mapped"
        return None

    def row(self, number: int = 0, text: str | None = None) -> HostRow:
        """The row of the scenario's user, or of its workshop ``number``, from 1."""
        label = f"seed_{self.name}_{number}" if number else f"seed_{self.name}"
        shown = self.name.replace("_", " ").capitalize() if text is None else text
        return HostRow(label, self.number * _ROWS_PER_SCENARIO + number, shown)

    def user_key(self, schema: Schema) -> Key:
        """The key of the scenario's user."""
        return self.user_keys(schema)[0]

    def user_keys(self, schema: Schema) -> list[Key]:
        """The keys of all users of the scenario, its own first."""
        return [self.row(number).key(schema.host.users.key_type, "user") for number in range(self.users)]

    def workshop_key(self, schema: Schema, number: int) -> Key:
        """The key of the scenario's workshop ``number``, from 1."""
        assert schema.host.workshops is not None  # noqa: S101 - only a host with workshops has scenarios with them
        return self.row(number).key(schema.host.workshops.key_type, "workshop")

    def workshop_keys(self, schema: Schema) -> list[Key]:
        """The keys of all workshops that the scenario may have made."""
        if _without_workshops(schema) is not None:
            return []
        return [self.workshop_key(schema, number) for number in range(1, self.workshops + 1)]


@translated()
def seed(
    bind: Bind,
    config: Config,
    *,
    only: Sequence[str] = (),
    force_production: bool = False,
    progress: OnProgress = ignore_progress,
    environ: Mapping[str, str] | None = None,
) -> SeedReport:
    """Make the missing scenarios, all or those named in ``only``.

    With an Engine each scenario is a transaction of its own, so that an interrupted run leaves whole ones. With a
    Connection all happens in the caller's transaction. ``progress`` counts scenarios. ``environ`` replaces the
    process's environment.

    Raises:
        InvalidArgument: ``only`` names no scenario.
        SeedRefused: this does not look like a development database, and ``force_production`` is not set.
        SeedImpossible: the host's tables do not take such rows; names the column or the constraint.
        PermissionDenied: this role does not own the tables, or row level security hides rows from it.
        NotMigrated, SchemaTooNew, DatabaseError: as any operation.
    """
    chosen = _chosen(only)
    schema = Schema.of(config.host)
    with _transaction(bind) as conn:
        verify(conn, config.host)
        _refuse_hidden_rows(conn, schema)
        if not force_production:
            _refuse_production(conn, schema, environ, "tallystick seed --force-production")
        host = HostTables(conn, schema)
        present = _present(conn, schema, chosen)
        if any(scenario.name not in present and scenario.unmet(schema) is None for scenario in chosen):
            _rehearse(conn, host)
    ledger = Ledger(config)
    done = []
    for scenario in chosen:
        done.append(_seed_one(bind, ledger, host, scenario))
        progress(Progress("scenarios", len(done), len(chosen)))
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
    """Remove the rows of ``seed``, all scenarios or those named in ``only``, and nothing else; in one transaction.

    A seeded user is removed with all of its ledger rows, also those of other writers. The trigger that refuses DELETE
    is off during this transaction, which only the table's owner can do and which locks out other writers. If rows of
    the host reference a seeded user or workshop, and were not made by the seed, nothing is removed (except rows that
    the host itself deletes in cascade, which are removed too).

    Raises:
        InvalidArgument, SeedRefused: as ``seed``.
        SeedImpossible: other rows depend on the seeded ones; names the table.
        PermissionDenied: this role does not own the ledger, or row level security hides rows from it.
        Conflict: other writers kept the ledger busy for five seconds.
        NotMigrated, SchemaTooNew, DatabaseError: as any operation.
    """
    chosen = _chosen(only)
    schema = Schema.of(config.host)
    users = [key for scenario in chosen for key in scenario.user_keys(schema)]
    workshops = [key for scenario in chosen for key in scenario.workshop_keys(schema)]
    ledger = schema.credit_transactions
    with _removing(), _transaction(bind) as conn:
        verify(conn, config.host)
        _refuse_hidden_rows(conn, schema)
        if not force_production:
            _refuse_production(conn, schema, environ, "tallystick seed --reset --force-production")
        if schema.workshops is not None and _without_workshops(schema) is None:
            _refuse_entangled(conn, schema.workshops, schema.owner, users, workshops)
        removed = set()
        if _present(conn, schema, chosen):
            with _append_only_lifted(conn, ledger):
                # first, so that no day of their rows is closed meanwhile; the days are added up again
                on = sa.cast(sa.func.timezone("UTC", ledger.c.completed_at), sa.Date)
                conn.execute(sa.delete(days).where(days.c.day.in_(sa.select(on).where(ledger.c.user_id.in_(users)))))
                rows = conn.scalars(sa.delete(ledger).where(ledger.c.user_id.in_(users)).returning(ledger.c.id)).all()
                # a reader gets no event without its row, and would stay behind a page of them
                conn.execute(sa.delete(events).where(events.c.transaction_id.in_(rows)))
                gone_lots = sa.delete(schema.lots).where(schema.lots.c.user_id.in_(users)).returning(schema.lots.c.id)
                lots = conn.scalars(gone_lots).all()
                conn.execute(sa.delete(schema.lot_moves).where(schema.lot_moves.c.lot_id.in_(lots)))
        for table, made in ((schema.workshops, Scenario.workshop_keys), (schema.users, Scenario.user_keys)):
            if table is None:
                continue
            for scenario in chosen:
                # counted, since a key may come back in other letters, or with spaces behind it, as a char(26)
                if conn.execute(sa.delete(table).where(table.c.key.in_(made(scenario, schema)))).rowcount:
                    removed.add(scenario.name)
        if removed:
            rows = [(one.row(number), key) for one in chosen for number, key in enumerate(one.user_keys(schema))]
            HostTables(conn, schema).forget_parents(conn, rows)
    return SeedReport(
        scenarios=tuple(
            Seeded(
                scenario=scenario.name,
                user=scenario.user_key(schema),
                balance=None,
                outcome=ScenarioOutcome.REMOVED if scenario.name in removed else ScenarioOutcome.ABSENT,
            )
            for scenario in chosen
        )
    )


def _without_workshops(schema: Schema) -> str | None:
    """The reason why a scenario of this host has no workshops, or None where it has."""
    if schema.workshops is None:
        return "this host has no workshops table"
    if schema.owner is schema.workshops.c.key:
        return "host.workshops.key is the owner too, so a user has one workshop at most"
    return None


def _chosen(only: Sequence[str]) -> list[Scenario]:
    for name in only:
        if name not in SCENARIOS:
            near = difflib.get_close_matches(name, SCENARIOS, n=1)
            hint = f"; did you mean {near[0]}?" if near else ". List them with: tallystick seed --list"
            raise InvalidArgument(f"there is no scenario {shown(name)}{hint}", argument="only", value=name)
    return [scenario for scenario in SCENARIOS.values() if not only or scenario.name in only]


@contextmanager
def _transaction(bind: Bind) -> Iterator[sa.Connection]:
    """A transaction for scenarios, of one run at a time."""
    refuse_other_than(bind, (sa.Engine, sa.Connection), "the seed takes SQLAlchemy's Engine or Connection")
    if isinstance(bind, sa.Connection):
        _take_turn(bind)
        yield bind
        return
    with translated(connecting=True):
        conn = bind.connect()
    # an engine in autocommit would leave a partial scenario when it is killed
    with conn.execution_options(isolation_level="READ COMMITTED") as conn, conn.begin():
        _take_turn(conn)
        yield conn


def _take_turn(conn: sa.Connection) -> None:
    # not ON CONFLICT: two INSERTs of one row deadlock if the table has a second unique index
    conn.execute(sa.select(sa.func.pg_advisory_xact_lock(_TURN)))


def _present(conn: sa.Connection, schema: Schema, chosen: Sequence[Scenario]) -> set[str]:
    # each alone, since the key that comes back may differ from the one asked for, as a char(26) with spaces behind it
    there = {one.name: sa.exists().where(schema.users.c.key == one.user_key(schema)) for one in chosen}
    return {name for name, exists in there.items() if conn.scalar(sa.select(exists))}


def _seed_one(bind: Bind, ledger: Ledger, host: HostTables, scenario: Scenario) -> Seeded:
    schema = host.schema
    user = scenario.user_key(schema)
    unmet = scenario.unmet(schema)
    if unmet is not None:
        return Seeded(scenario=scenario.name, user=user, balance=None, outcome=ScenarioOutcome.SKIPPED, reason=unmet)
    with _wanting_owner(), host.raising_seed_impossible(), _transaction(bind) as conn:
        outcome = ScenarioOutcome.UNCHANGED
        if not _present(conn, schema, [scenario]):
            host.insert_user(conn, scenario.row(), key=user)
            scenario.make(_ScenarioRun(conn, ledger, host, scenario))
            outcome = ScenarioOutcome.CREATED
        balance = ledger.balance(conn, user)
    return Seeded(scenario=scenario.name, user=user, balance=balance, outcome=outcome)


@contextmanager
def _wanting_owner() -> Iterator[None]:
    """Name the owner's address as the remedy: an app's role may write no row of the ledger itself."""
    try:
        with translated():
            yield
    except PermissionDenied as error:
        raise PermissionDenied(
            f"{server_message(error.__cause__ or error)}. The seed also writes rows that the ledger's functions do "
            "not. Run it with the address of the tables' owner: --database-url",
            sqlstate=error.sqlstate,
        ) from error


def _rehearse(conn: sa.Connection, host: HostTables) -> None:
    """Add one row to each table and roll it back, so that a refusal by the host comes before anything is written."""
    with _wanting_owner(), host.raising_seed_impossible(), conn.begin_nested() as savepoint:
        row = HostRow("seed_rehearsal", 0, "Rehearsal")
        user = host.insert_user(conn, row, key=row.key(host.schema.host.users.key_type, "user"))
        if host.schema.host.workshops is not None and _without_workshops(host.schema) is None:
            key = row.key(host.schema.host.workshops.key_type, "workshop")
            host.insert_workshop(conn, row, owner=user, key=key, created_at=None)
        conn.execute(sa.text("SET CONSTRAINTS ALL IMMEDIATE"))
        savepoint.rollback()


# --- development, or not ---


def _refuse_production(conn: sa.Connection, schema: Schema, environ: Mapping[str, str] | None, remedy: str) -> None:
    """Raise SeedRefused if there are signs that this is no development database."""
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
    ours = [key for scenario in SCENARIOS.values() for key in scenario.user_keys(schema)]
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


def _refuse_hidden_rows(conn: sa.Connection, schema: Schema) -> None:
    """Raise PermissionDenied if policies hide users, workshops or the ledger: a live database would look empty."""
    read = [(table.schema or "", table.name) for table in schema.metadata.tables.values()]
    refuse_hidden_rows(conn, read, "whether this is a development database, and what is seeded,")


def _is_local(server: str) -> bool:
    """True for a socket, this machine, or a container's name, by the connection and not the URL."""
    if not server or server.startswith(("/", "@")) or server == "host.docker.internal":
        return True
    try:
        return ipaddress.ip_address(server).is_loopback
    except ValueError:
        return "." not in server


# --- removing ---


@contextmanager
def _append_only_lifted(conn: sa.Connection, ledger: sa.Table) -> Iterator[None]:
    """Allow DELETE during the block; its lock lasts until the transaction ends."""
    owner = conn.execute(_OWNER, {"schema": ledger.schema, "table": ledger.name}).one()
    if not owner.owned:
        raise PermissionDenied(
            f"the seed is removed by the owner of {ledger.schema}.{LEDGER}, {owner.name}; {owner.role} is not. "
            "Nothing was removed. Run it with that role's address: --database-url",
        )
    conn.execute(sa.select(sa.func.pg_catalog.set_config("lock_timeout", _RESET_LOCK_TIMEOUT, sa.true())))
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


def _refuse_entangled(
    conn: sa.Connection, workshops: sa.Table, owner: sa.Column[Any], users: list[Key], ours: list[Key]
) -> None:
    """Raise SeedImpossible if a workshop was given to a seeded user, or by one: it must not be removed or orphaned."""
    owned = sa.func.coalesce(owner.in_(users), sa.false())
    key = workshops.c.key
    given = sa.select(key, owner.label("owner")).where(key.in_(ours) != owned)
    found = conn.execute(given.limit(1)).one_or_none()
    if found is not None:
        table = f"{workshops.schema}.{workshops.name}"
        raise SeedImpossible(
            f"workshop {found.key} in {table} (owner: {found.owner}) was made or moved by someone else. "
            "Delete it, or give it another owner, first; nothing was removed",
            table=table,
        )


@contextmanager
def _removing() -> Iterator[None]:
    try:
        yield
    except DBAPIError as error:
        fault = HostFault.of(error)
        if fault is None:
            raise
        raise SeedImpossible(
            f"the seeded rows cannot be removed: {fault.message}. Delete what depends on them in {fault.table} first; "
            "nothing was removed",
            table=fault.table,
            column=fault.column,
            constraint=fault.constraint,
        ) from error


# --- the steps of a scenario ---


class _ScenarioRun:
    """One scenario while it is made: its user, and the steps.

    Idempotency keys, and a purchase's Stripe ids, consist of the scenario's name and a count.
    """

    def __init__(self, conn: sa.Connection, ledger: Ledger, host: HostTables, scenario: Scenario) -> None:
        self.conn, self.ledger, self.host, self.scenario = conn, ledger, host, scenario
        self.config, self.accounts = ledger.config, Accounts(ledger.config)
        self.schema = host.schema
        self.user = scenario.user_key(host.schema)
        self._acts = 0
        self._workshops = 0

    def onboard(self) -> None:
        """Complete the onboarding, and set a Stripe customer."""
        self.accounts.complete_onboarding(self.conn, self.user)
        self.accounts.set_stripe_customer(self.conn, self.user, f"cus_seed_{self.scenario.name}")

    def pack(self, credits: int) -> Pack:
        """The smallest pack on sale with at least so many credits, else one of our own."""
        fitting = [pack for pack in self.config.packs if pack.credits >= credits]
        fitting = fitting or [pack for pack in DEFAULT_PACKS if pack.credits >= credits]
        return min(fitting, key=lambda pack: pack.credits)

    def start(self, credits: int = 1) -> CreditTransaction:
        """Start the purchase of a pack of at least ``credits``, up to Stripe's page."""
        pack = self.pack(credits)
        started = self.ledger.start_purchase(
            self.conn,
            self.user,
            credits=pack.credits,
            description=f"Purchased {pack.name} pack",
            key=self.key(),
            stripe_price_id=pack.stripe_price_id,
        )
        return self.ledger.attach_session(
            self.conn, self.user, started.id, stripe_session_id=f"cs_test_{self._stripe_name()}"
        )

    def start_days_ago(self, days: int) -> None:
        """Start a purchase in the past; the module's docstring says why this row does not come from the ledger."""
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
                idempotency_key=self.key(),
                stripe_session_id=f"cs_test_{self._stripe_name()}",
                created_at=sa.func.now() - past,
            )
        )

    def pay(self, started: CreditTransaction) -> CreditTransaction:
        """Complete a purchase, as after Stripe's event."""
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
        """Fail a purchase, as after Stripe's event for an expired session."""
        self.ledger.fail_purchase(self.conn, self.user, purchase=started.id, reason="expired")

    def refund(self, bought: CreditTransaction, credits: int | None = None) -> None:
        """Give back ``credits`` of a purchase, or all of it."""
        self.ledger.refund(self.conn, self.user, bought.id, credits=credits, key=self.key())

    def grant(self, credits: int, *, description: str, days: int | None = None) -> CreditTransaction:
        """Give credits that nobody paid for; they expire in so many ``days``."""
        expires_at = None if days is None else dt.datetime.now(dt.UTC) + dt.timedelta(days=days)
        return self.ledger.grant(
            self.conn, self.user, credits=credits, key=self.key(), description=description, expires_at=expires_at
        )

    def hold(self, credits: int, *, description: str) -> CreditTransaction:
        """Set credits aside, for the longest time allowed."""
        year = dt.timedelta(days=365)
        return self.ledger.hold(
            self.conn, self.user, credits=credits, key=self.key(), expires_in=year, description=description
        )

    def spend(self, amount: int = 1, *, description: str | None = None) -> CreditTransaction:
        """Spend credits without a workshop."""
        return self.ledger.consume(self.conn, self.user, credits=amount, key=self.key(), description=description)

    def draft(self, *titles: str, created_at: dt.datetime | None = None) -> list[Key]:
        """Make locked workshops; none if the host cannot have them."""
        if _without_workshops(self.schema) is not None:
            return []
        first, self._workshops = self._workshops + 1, self._workshops + len(titles)
        return [
            self.host.insert_workshop(
                self.conn,
                self.scenario.row(number, title),
                owner=self.user,
                key=self.scenario.workshop_key(self.schema, number),
                created_at=created_at,
            )
            for number, title in enumerate(titles, first)
        ]

    def unlock(self, workshop: Key) -> CreditTransaction:
        """Spend a credit on a workshop."""
        return self.ledger.consume(self.conn, self.user, workshop=workshop, key=self.key())

    def key(self) -> str:
        """A new idempotency key."""
        self._acts += 1
        return f"seed:{self.scenario.name}:{self._acts}"

    def _stripe_name(self) -> str:
        return f"seed_{self.scenario.name}_{self._acts}"


# --- the scenarios ---

_scenarios: dict[str, Scenario] = {}


def _scenario(
    number: int, *, workshops: int = 0, needs: Needs | None = None, users: int = 1
) -> Callable[[Callable[[_ScenarioRun], None]], Callable[[_ScenarioRun], None]]:
    """Register a scenario under its function's name; ``--list`` shows its docstring."""

    def register(make: Callable[[_ScenarioRun], None]) -> Callable[[_ScenarioRun], None]:
        name = make.__name__.strip("_")
        description = (make.__doc__ or "").rstrip(".")
        _scenarios[name] = Scenario(
            name=name,
            description=description,
            number=number,
            workshops=workshops,
            needs=needs,
            make=make,
            users=users,
        )
        return make

    return register


@_scenario(1)
def _new(_run: _ScenarioRun) -> None:
    """A new user: 0 credits, onboarding not begun."""


@_scenario(2, workshops=2)
def _mid_onboarding(run: _ScenarioRun) -> None:
    """Half-way through onboarding: a credit bought, workshops drafted, nothing unlocked."""
    run.buy()
    run.draft("First Idea", "Second Thoughts")


@_scenario(3, workshops=1)
def _funded(run: _ScenarioRun) -> None:
    """Onboarded, with credits to spend and a workshop to spend one on."""
    run.onboard()
    run.buy(3)
    run.draft("Mobile App Discovery")


@_scenario(4)
def _long_history(run: _ScenarioRun) -> None:
    """Sixty packs bought and mostly spent, some of it refunded: pages of history."""
    run.onboard()
    for number in range(1, 61):
        bought = run.buy(3 if number % 3 == 0 else 1)
        run.spend(bought.amount if number % 6 else 1, description=f"Credits consumed for session {number}")
        if number % 15 == 0:
            run.refund(bought, 1)


@_scenario(5)
def _refunded_in_full(run: _ScenarioRun) -> None:
    """A purchase that was refunded in full: 0 credits again."""
    run.onboard()
    run.refund(run.buy())


@_scenario(6)
def _refunded_in_part(run: _ScenarioRun) -> None:
    """A purchase of several credits, one of them refunded."""
    run.onboard()
    run.refund(run.buy(3), 1)


@_scenario(7)
def _in_debt(run: _ScenarioRun) -> None:
    """Spent first, refunded afterwards: the balance is below zero."""
    run.onboard()
    bought = run.buy(3)
    run.spend(bought.amount)
    run.refund(bought)


@_scenario(8, workshops=250, needs="workshops")
def _many_workshops(run: _ScenarioRun) -> None:
    """250 workshops, 100 of them unlocked."""
    run.onboard()
    workshops = run.draft(*(f"Workshop {number:03}" for number in range(1, 251)))
    credits = 0
    while credits < 100:  # noqa: PLR2004 - as the description says
        credits += run.buy(3).amount
    for workshop in workshops[::5] + workshops[1::5]:
        run.unlock(workshop)


@_scenario(9, workshops=4, needs="created_at")
def _grandfathered(run: _ScenarioRun) -> None:
    """Three workshops from before the paywall, open without a credit, and a locked one from after."""
    run.onboard()
    paywalled_since = run.config.grandfathered_before or run.conn.scalar(
        sa.select(sa.func.min(migration_log.c.applied_at)).where(migration_log.c.revision == "0001")
    )
    try:
        before = ((paywalled_since or dt.datetime.now(dt.UTC)) - dt.timedelta(days=30)).astimezone(dt.UTC)
    except OverflowError:  # 30 days before that is before the year 1
        before = dt.datetime.min.replace(tzinfo=dt.UTC)
    run.draft("From the Early Days", "Before Credits", "Free Forever", created_at=before)
    run.draft("From After the Paywall")


@_scenario(10)
def _pending(run: _ScenarioRun) -> None:
    """At Stripe's checkout right now: a pending purchase."""
    run.onboard()
    run.start()


@_scenario(11)
def _pending_for_days(run: _ScenarioRun) -> None:
    """A purchase pending for three days: what a lost webhook leaves, and the audit reports."""
    run.onboard()
    run.start_days_ago(3)


@_scenario(12)
def _failed(run: _ScenarioRun) -> None:
    """A purchase that failed: the session expired."""
    run.onboard()
    run.fail(run.start())


@_scenario(13)
def _failed_then_paid(run: _ScenarioRun) -> None:
    """A purchase that failed, and was paid after all."""
    run.onboard()
    started = run.start()
    run.fail(started)
    run.pay(started)


@_scenario(14)
def _deleted_user(run: _ScenarioRun) -> None:
    """A soft-deleted user who still has credits."""
    run.onboard()
    run.buy(3)
    run.accounts.delete_user(run.conn, run.user)


@_scenario(15, workshops=2, needs="workshops")
def _deleted_workshop(run: _ScenarioRun) -> None:
    """An unlocked workshop that was soft-deleted, beside an unlocked one that was not."""
    run.onboard()
    run.buy(3)
    for workshop in (deleted := run.draft("Deleted After Use", "Still There")):
        run.unlock(workshop)
    run.accounts.delete_workshop(run.conn, deleted[0])


NAMES = (
    "🎪 Café Ünïcode 👩‍👩‍👧‍👦 for teams 🏳️‍🌈",
    "ورشة عمل: اكتشاف تطبيق الجوال",
    "סדנה: גילוי אפליקציות (2026) — mixed with English",
    ("A title of exactly five hundred characters, as someone will surely paste one. " * 7)[:499] + "!",
)
"""The titles of the scenario ``names``."""


@_scenario(16, workshops=len(NAMES))
def _names(run: _ScenarioRun) -> None:
    """Names with emoji, right-to-left text and 500 characters."""
    run.onboard()
    credits = 0
    while credits < len(NAMES):
        credits += run.buy(3).amount
    for workshop in (workshops := run.draft(*NAMES)):
        run.unlock(workshop)
    for name in () if workshops else NAMES:
        run.spend(description=name)


@_scenario(17)
def _granted(run: _ScenarioRun) -> None:
    """Welcome credits, and no purchase."""
    run.onboard()
    run.grant(2, description="Welcome to the beta")


@_scenario(18)
def _dispute_won(run: _ScenarioRun) -> None:
    """A purchase that was disputed: its credits were taken, and reinstated when the dispute was won."""
    run.onboard()
    bought = run.buy(3)
    run.refund(bought)
    run.ledger.reinstate(run.conn, run.user, bought.id, key=run.key())


@_scenario(19)
def _holding(run: _ScenarioRun) -> None:
    """Credits set aside for a job under way, beside one that was charged and one that was given up."""
    run.onboard()
    run.buy(3)
    charged = run.hold(2, description="An answer")
    run.ledger.capture(run.conn, run.user, charged.id, credits=1)
    cancelled = run.hold(1, description="A render that was cancelled")
    run.ledger.release(run.conn, run.user, cancelled.id)
    run.hold(1, description="A render under way")


@_scenario(20, workshops=2)
def _reversed(run: _ScenarioRun) -> None:
    """A workshop that was unlocked by mistake: reversed, and so locked again, beside one that was not."""
    run.onboard()
    run.buy(3)
    spent = [run.unlock(workshop) for workshop in run.draft("Unlocked By Mistake", "Meant To Be")]
    spent = spent or [run.spend(), run.spend()]
    run.ledger.reverse(run.conn, run.user, spent[0].id, key=run.key())


@_scenario(21)
def _expiring(run: _ScenarioRun) -> None:
    """Credits that expire, some of them spent, beside bought ones that do not."""
    run.onboard()
    run.buy(1)
    run.grant(5, description="Spring promotion", days=30)
    run.grant(2, description="Thank you for your patience", days=365)
    run.spend(3)


@_scenario(22)
def _corrected(run: _ScenarioRun) -> None:
    """A grant by mistake, partly spent before it was taken back: in debt."""
    run.onboard()
    mistake = run.grant(50, description="Imported twice")
    run.spend(1)
    run.ledger.correct(run.conn, run.user, mistake.id, key=run.key())


@_scenario(23, users=2)
def _merged_user(run: _ScenarioRun) -> None:
    """A user who had a second account, which was merged into this one."""
    run.onboard()
    run.buy(3)
    duplicate = run.scenario.user_keys(run.schema)[1]
    run.host.insert_user(run.conn, run.scenario.row(1), key=duplicate)
    run.ledger.grant(run.conn, duplicate, credits=1, key=run.key(), description="Welcome to the beta")
    run.ledger.merge(run.conn, duplicate, into=run.user, key=run.key())


@_scenario(24)
def _erased_user(run: _ScenarioRun) -> None:
    """A user whose personal data was erased: the numbers are there, and no text."""
    run.onboard()
    run.buy(3)
    run.grant(2, description="Welcome to the beta")
    run.accounts.erase(run.conn, run.user)


@_scenario(25)
def _low_balance(run: _ScenarioRun) -> None:
    """A threshold of the user's own, and a balance that has fallen below it: with events on, one of them says so."""
    run.onboard()
    run.buy(3)
    run.accounts.set_low_balance(run.conn, run.user, 2)
    run.spend(2)


SCENARIOS: Mapping[str, Scenario] = MappingProxyType(_scenarios)
"""Every scenario by name, in the order in which they are made."""
