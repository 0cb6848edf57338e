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
import ipaddress
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType
from typing import Literal

import sqlalchemy as sa
from psycopg import sql
from sqlalchemy.exc import DBAPIError
from uuid_utils.compat import uuid7

from tallystick.accounts import Accounts
from tallystick.config import Config, Pack
from tallystick.database import translated
from tallystick.dev.host_tables import HostFault, HostRow, HostTables
from tallystick.errors import InvalidArgument, Key, PermissionDenied, SeedImpossible, SeedRefused, shown
from tallystick.ledger import CreditTransaction, Ledger
from tallystick.progress import OnProgress, Progress, ignore_progress
from tallystick.schema import LEDGER, TRIGGERS, Schema, days, migration_log, verify

DEFAULT_PACKS = (
    Pack(name="Single Flight", credits=1, amount=7900),
    Pack(name="Serial Entrepreneur", credits=3, amount=14900),
)
"""On sale where the configuration names no packs."""

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

    ``workshops`` is how many it may make; ``needs`` what a host must have for it; ``users`` how many it
    makes, the user that it is about being the first.
    """

    name: str
    description: str
    number: int
    workshops: int
    needs: Needs | None
    tell: Callable[[_Story], None]
    users: int = 1

    def unmet(self, schema: Schema) -> str | None:
        """The reason why this host cannot have the scenario, or None."""
        if self.needs is None:
            return None
        if schema.workshops is None:
            return "this host has no workshops table"
        if self.needs == "created_at" and "created_at" not in schema.workshops.c:
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
        """The keys of all users that the scenario makes, its own first."""
        return [self.row(number).key(schema.host.users.key_type, "user") for number in range(self.users)]

    def workshop_key(self, schema: Schema, number: int) -> Key:
        """The key of the scenario's workshop ``number``, from 1."""
        if schema.host.workshops is None or not 1 <= number <= self.workshops:
            raise AssertionError(f"scenario {self.name} has no workshop {number}")
        return self.row(number).key(schema.host.workshops.key_type, "workshop")

    def workshop_keys(self, schema: Schema) -> list[Key]:
        """The keys of all workshops that the scenario may have made."""
        if schema.workshops is None:
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
    """Make the scenarios that are not there yet, all or those named in ``only``.

    With an Engine each scenario is a transaction of its own, so that an interrupted run leaves whole ones. With a
    Connection all of it happens in the caller's transaction. ``progress`` counts scenarios.
    ``environ`` stands for the process's environment.

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
    users = {key: scenario for scenario in chosen for key in scenario.user_keys(schema)}
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
                # first, so that no day of theirs is closed meanwhile; they are added up anew
                on = sa.cast(sa.func.timezone("UTC", ledger.c.completed_at), sa.Date)
                conn.execute(sa.delete(days).where(days.c.day.in_(sa.select(on).where(ledger.c.user_id.in_(users)))))
                conn.execute(sa.delete(ledger).where(ledger.c.user_id.in_(users)))
                gone_lots = sa.delete(schema.lots).where(schema.lots.c.user_id.in_(users)).returning(schema.lots.c.id)
                lots = conn.scalars(gone_lots).all()
                conn.execute(sa.delete(schema.lot_moves).where(schema.lot_moves.c.lot_id.in_(lots)))
        for table, made in ((schema.workshops, workshops), (schema.users, users)):
            if table is not None:
                gone = conn.scalars(sa.delete(table).where(table.c.key.in_(made)).returning(table.c.key))
                removed |= {made[key].name for key in gone}
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


def _seed_one(bind: Bind, ledger: Ledger, host: HostTables, scenario: Scenario) -> Seeded:
    schema = host.schema
    user = scenario.user_key(schema)
    unmet = scenario.unmet(schema)
    if unmet is not None:
        return Seeded(scenario=scenario.name, user=user, balance=None, outcome=ScenarioOutcome.SKIPPED, reason=unmet)
    with host.obeyed(), _transaction(bind) as conn:
        outcome = ScenarioOutcome.UNCHANGED
        if not _present(conn, schema, [scenario]):
            host.insert_user(conn, scenario.row(), key=user)
            scenario.tell(_Story(conn, ledger, host, scenario))
            outcome = ScenarioOutcome.CREATED
        balance = ledger.balance(conn, user)
    return Seeded(scenario=scenario.name, user=user, balance=balance, outcome=outcome)


def _rehearse(conn: sa.Connection, host: HostTables) -> None:
    """Add one row to each table and take it back: what the host refuses is known before anything is written."""
    with host.obeyed(), conn.begin_nested() as savepoint:
        row = HostRow("seed_rehearsal", 0, "Rehearsal")
        user = host.insert_user(conn, row, key=row.key(host.schema.host.users.key_type, "user"))
        if host.schema.host.workshops is not None:
            key = row.key(host.schema.host.workshops.key_type, "workshop")
            host.insert_workshop(conn, row, owner=user, key=key, created_at=None)
        conn.execute(sa.text("SET CONSTRAINTS ALL IMMEDIATE"))
        savepoint.rollback()


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
        fault = HostFault.of(error)
        if fault is None:
            raise
        raise SeedImpossible(
            f"the seeded rows cannot be removed: {fault.said}. Delete what depends on them in {fault.table} first; "
            "nothing was removed",
            table=fault.table,
            column=fault.column,
            constraint=fault.constraint,
        ) from error


# --- telling a story ---


class _Story:
    """One scenario while it is made: its user, and what happens to it.

    Each act's idempotency key, and each purchase's Stripe names, are the scenario's name and a count.
    """

    def __init__(self, conn: sa.Connection, ledger: Ledger, host: HostTables, scenario: Scenario) -> None:
        self.conn, self.ledger, self.host, self.scenario = conn, ledger, host, scenario
        self.config, self.accounts = ledger.config, Accounts(ledger.config)
        self.schema = host.schema
        self.user = scenario.user_key(host.schema)
        self._acts = 0
        self._workshops = 0

    def merge_duplicate(self) -> None:
        """Make a second account of the same person, with a credit, and merge it into the user's."""
        duplicate = self.scenario.user_keys(self.schema)[1]
        self.host.insert_user(self.conn, self.scenario.row(1), key=duplicate)
        self.ledger.grant(self.conn, duplicate, credits=1, key=self._key(), description="Welcome to the beta")
        self.ledger.merge(self.conn, duplicate, into=self.user, key=self._key())

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

    def grant(self, credits: int, *, description: str, days: int | None = None) -> CreditTransaction:
        """Give credits that nobody paid for; they expire in so many ``days``."""
        expires_at = None if days is None else dt.datetime.now(dt.UTC) + dt.timedelta(days=days)
        return self.ledger.grant(
            self.conn, self.user, credits=credits, key=self._key(), description=description, expires_at=expires_at
        )

    def correct(self, given: CreditTransaction) -> None:
        """Take back a grant."""
        self.ledger.correct(self.conn, self.user, given.id, key=self._key())

    def hold(self, credits: int, *, description: str) -> CreditTransaction:
        """Set credits aside, for longer than anybody develops."""
        year = dt.timedelta(days=365)
        return self.ledger.hold(
            self.conn, self.user, credits=credits, key=self._key(), expires_in=year, description=description
        )

    def capture(self, hold: CreditTransaction, credits: int) -> None:
        """Charge a hold."""
        self.ledger.capture(self.conn, self.user, hold.id, credits=credits)

    def release(self, hold: CreditTransaction) -> None:
        """Give a hold up."""
        self.ledger.release(self.conn, self.user, hold.id)

    def reverse(self, spent: CreditTransaction) -> None:
        """Give back a consumption."""
        self.ledger.reverse(self.conn, self.user, spent.id, key=self._key())

    def spend(self, amount: int = 1, *, description: str | None = None) -> CreditTransaction:
        """Spend credits on no workshop."""
        return self.ledger.consume(self.conn, self.user, credits=amount, key=self._key(), description=description)

    def draft(self, *titles: str, created_at: dt.datetime | None = None) -> list[Key]:
        """Make workshops, locked ones; none where the host has no such thing."""
        if self.schema.workshops is None:
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
        return self.ledger.consume(self.conn, self.user, workshop=workshop, key=self._key())

    def _key(self) -> str:
        self._acts += 1
        return f"seed:{self.scenario.name}:{self._acts}"

    def _stripe_name(self) -> str:
        return f"seed_{self.scenario.name}_{self._acts}"


# --- the scenarios ---

_scenarios: dict[str, Scenario] = {}


def _scenario(
    number: int, *, workshops: int = 0, needs: Needs | None = None, users: int = 1
) -> Callable[[Callable[[_Story], None]], Callable[[_Story], None]]:
    """Register a story under its function's name; its docstring is what ``--list`` shows."""

    def register(tell: Callable[[_Story], None]) -> Callable[[_Story], None]:
        name = tell.__name__.strip("_")
        description = (tell.__doc__ or "").rstrip(".")
        _scenarios[name] = Scenario(
            name=name,
            description=description,
            number=number,
            workshops=workshops,
            needs=needs,
            tell=tell,
            users=users,
        )
        return tell

    return register


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


@_scenario(19)
def _holding(story: _Story) -> None:
    """Credits set aside for a job under way, beside one that was charged and one that was given up."""
    story.onboard()
    story.buy(3)
    story.capture(story.hold(2, description="An answer"), 1)
    story.release(story.hold(1, description="A render that was cancelled"))
    story.hold(1, description="A render under way")


@_scenario(20, workshops=2)
def _reversed(story: _Story) -> None:
    """A workshop that was unlocked by mistake: reversed, and so locked again, beside one that was not."""
    story.onboard()
    story.buy(3)
    spent = [story.unlock(workshop) for workshop in story.draft("Unlocked By Mistake", "Meant To Be")]
    spent = spent or [story.spend(), story.spend()]
    story.reverse(spent[0])


@_scenario(21)
def _expiring(story: _Story) -> None:
    """Credits that expire, some of them spent, beside bought ones that do not."""
    story.onboard()
    story.buy(1)
    story.grant(5, description="Spring promotion", days=30)
    story.grant(2, description="Thank you for your patience", days=365)
    story.spend(3)


@_scenario(22)
def _corrected(story: _Story) -> None:
    """A grant by mistake, partly spent before it was taken back: in debt."""
    story.onboard()
    mistake = story.grant(50, description="Imported twice")
    story.spend(1)
    story.correct(mistake)


@_scenario(23, users=2)
def _merged_user(story: _Story) -> None:
    """A user who had a second account, which was merged into this one."""
    story.onboard()
    story.buy(3)
    story.merge_duplicate()


@_scenario(24)
def _erased_user(story: _Story) -> None:
    """A person who was forgotten: the numbers are there, and no text."""
    story.onboard()
    story.buy(3)
    story.grant(2, description="Welcome to the beta")
    story.accounts.erase(story.conn, story.user)


@_scenario(25)
def _low_balance(story: _Story) -> None:
    """A threshold of the user's own, and a balance that has fallen below it: with events on, one of them says so."""
    story.onboard()
    story.buy(3)
    story.accounts.set_low_balance(story.conn, story.user, 2)
    story.spend(2)


SCENARIOS: Mapping[str, Scenario] = MappingProxyType(_scenarios)
"""Every scenario by name, in the order in which they are made."""
