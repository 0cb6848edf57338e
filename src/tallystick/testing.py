"""Tools for an app's own tests: migrated databases, users in every state, a movable clock, an audit.

pytest has these as fixtures wherever this package is installed (``tallystick.pytest_plugin``). Without pytest::

    with Databases.on(address, Config.load(), schema=Path("schema.sql").read_text()) as databases:
        with databases.open() as db:
            user = db.funded(credits=5)
            ...
            db.assert_balanced()

Users get their state by the ledger's own operations, never by writing Tallystick's columns.
"""

from __future__ import annotations

import datetime as dt
import itertools
import re
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cached_property
from typing import Any, Self

import psycopg
import sqlalchemy as sa
from psycopg import rows, sql

from tallystick import migrate
from tallystick.audit import audit
from tallystick.config import Config
from tallystick.database import translated
from tallystick.declared_tables import Schema
from tallystick.dev.host_tables import HostRow, HostTables
from tallystick.errors import InvalidArgument, Key, PermissionDenied, shown
from tallystick.ledger import CreditTransaction, Ledger, Standing
from tallystick.ledger.connections import send

AppSchema = str | Callable[[str], object]
"""The app's own tables: SQL, or a function that gets the address of an empty database and makes them there."""

_PREFIX = "tallystick_test_"
_LEFT_OVER = """
SELECT d.datname FROM pg_database AS d
WHERE starts_with(d.datname, %(prefix)s) AND pg_get_userbyid(d.datdba) = current_user
  AND NOT EXISTS (SELECT FROM pg_stat_activity WHERE application_name = left(d.datname, length(%(run)s)))
"""
_ROWS_FROM = 10_000_000  # after those of the seed

_numbers = itertools.count(1)


class Databases:
    """The databases of one run of tests: a migrated template, made when first needed, and copies of it.

    They are made on the server of the given address, whose own database is not touched; their names begin with
    ``tallystick_test_``. After a run that was killed the next run on the server drops them.
    """

    def __init__(self, conn: psycopg.Connection[Any], run: str, config: Config, schema: AppSchema) -> None:
        self.config = config
        self._conn, self._run, self._schema = conn, run, schema
        self._tables = _looked_at_once(config)

    @classmethod
    @contextmanager
    def on(cls, address: str, config: Config, *, schema: AppSchema) -> Iterator[Self]:
        """The databases of a run on the server of ``address``; all are dropped at the end.

        Raises:
            ConfigError: ``address`` is no address of PostgreSQL.
            DatabaseUnavailable: the server cannot be reached.
        """
        config = config.at(address)
        run = f"{_PREFIX}{uuid.uuid4().hex[:12]}"  # pg_stat_activity shows it as long as the connection is open
        with translated(connecting=True):
            conn = psycopg.connect(_libpq(config), autocommit=True, application_name=run)
        with conn:
            made = cls(conn, run, config, schema)
            made._drop(_LEFT_OVER, {"prefix": _PREFIX, "run": run})
            try:
                yield made
            finally:
                made._drop("SELECT datname FROM pg_database WHERE starts_with(datname, %(run)s)", {"run": run})

    def create(self) -> str:
        """A new database with the app's tables and Tallystick's; its address, as for DATABASE_URL.

        Raises:
            PermissionDenied: the role may make no databases.
        """
        return self._create(template=self._template)

    @contextmanager
    def open(self) -> Iterator[TestDatabase]:
        """A new database, connected to, and dropped at the end."""
        config = self.config.at(self.create())
        # each statement is a transaction of its own, so the app under test sees it at once
        pool = sa.create_engine(_url(config), poolclass=sa.NullPool, isolation_level="AUTOCOMMIT")
        try:
            with pool.connect() as conn:
                yield TestDatabase(conn, config, tables=self._tables)
        finally:
            self._administer("DROP DATABASE IF EXISTS {} WITH (FORCE)", _database(config))

    @cached_property
    def _template(self) -> str:
        address = self._create(template=None)
        config = self.config.at(address)
        with psycopg.connect(address, autocommit=True) as conn:
            _make_clock_movable(conn)  # before anything is defined in terms of now()
            if isinstance(self._schema, str):
                # pg_dump writes commands of psql around its SQL
                conn.execute(re.sub(r"^\\(un)?restrict .*$", "", self._schema, flags=re.MULTILINE).encode())
        if not isinstance(self._schema, str):
            self._schema(address)
        migrate.apply(_url(config), config)
        # a database with an open connection cannot be copied
        name = _database(config)
        self._administer("ALTER DATABASE {} ALLOW_CONNECTIONS false", name)
        left = "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE datname = %s"
        self._conn.execute(left, [name])
        return name

    def _create(self, *, template: str | None) -> str:
        name = f"{self._run}_{next(_numbers)}"
        try:
            if template is None:
                self._administer("CREATE DATABASE {}", name)
            else:
                self._administer(f"CREATE DATABASE {{}} TEMPLATE {{}} {self._strategy}", name, template)
        except psycopg.errors.InsufficientPrivilege as error:
            role = self._conn.info.user
            raise PermissionDenied(
                f"{role} may not make the databases of the tests: {error}. Run: ALTER ROLE "
                f"{sql.Identifier(role).as_string()} CREATEDB, or leave the address out, for the embedded server",
                sqlstate=error.sqlstate,
            ) from error
        return _libpq(self.config, database=name)

    @cached_property
    def _strategy(self) -> str:
        """The strategy of CREATE DATABASE: copying files takes half the time where nothing is synced to disk."""
        asked = "SELECT current_setting('fsync') = 'off' AND current_setting('server_version_num')::int >= 150000"
        return "STRATEGY file_copy" if self._conn.execute(asked).fetchone() == (True,) else ""

    def _drop(self, which: Any, values: dict[str, str]) -> None:
        for (name,) in self._conn.execute(which, values).fetchall():
            self._administer("DROP DATABASE IF EXISTS {} WITH (FORCE)", name)

    def _administer(self, statement: Any, *names: str) -> None:
        self._conn.execute(sql.SQL(statement).format(*map(sql.Identifier, names)))


class TestDatabase:
    """A migrated database in a test: users in every state, its clock, its audit.

    ``conn`` is a synchronous connection of SQLAlchemy, psycopg, psycopg2 or Django. All happens in its transaction,
    which is neither committed nor rolled back.
    """

    __test__ = False  # pytest must not collect it

    def __init__(
        self, conn: Any, config: Config, *, tables: Callable[[sa.Connection], HostTables] | None = None
    ) -> None:
        self.conn = conn
        self.config = config
        self.ledger = Ledger(config)
        self.clock = Clock(conn)
        self._tables = tables or _looked_at_once(config)

    @property
    def url(self) -> str:
        """The address, as for DATABASE_URL."""
        return _libpq(self.config)

    def user(self) -> Key:
        """A new user without credits; the key."""
        with self._host() as (conn, tables):
            return tables.insert_user(conn, _row("Test user"), key=None)

    def workshop(self, owner: Key, *, title: str = "Test workshop", created_at: dt.datetime | None = None) -> Key:
        """A new locked workshop of ``owner``; returns its key. ``created_at`` is now, if not given."""
        with self._host() as (conn, tables):
            return tables.insert_workshop(conn, _row(title), owner=owner, key=None, created_at=created_at)

    def funded(self, credits: int = 1, *, user: Key | None = None) -> Key:
        """A user who has bought ``credits``: a new one, or ``user``; the key."""
        user = self.user() if user is None else user
        self._buy(user, credits)
        return user

    def indebted(self, credits: int = 1, *, user: Key | None = None) -> Key:
        """A user exactly ``credits`` below zero, who has spent a purchase that was refunded: a new one, or ``user``.

        A ``user`` with credits spends them too; holds stay open. A user who is that far below zero already stays as it
        is.

        Raises:
            InvalidArgument: ``user`` is further below zero; nothing was written to the ledger.
        """
        user = self.user() if user is None else user
        self._check(user, credits)
        standing = self._standing(user)
        spent = standing.balance + credits
        if spent < 0:
            debt = -standing.balance
            already = f"user {user} is {debt} below zero already. Pass {debt} or more, or another user"
            raise InvalidArgument.of("credits", credits, already)
        if spent > 0:
            bought = self._buy(user, credits + standing.held)  # holds keep their credits from being spent
            with _as_sqlalchemy(self.conn) as conn:
                self.ledger.consume(conn, user, credits=spent, key=_key())
                self.ledger.refund(conn, user, bought.id, key=_key())
        return user

    def holding(
        self,
        credits: int = 1,
        *,
        held: int | None = None,
        expires_in: dt.timedelta | None = None,
        user: Key | None = None,
    ) -> Key:
        """A user who has bought ``credits``, with ``held`` of them (all, if not given) set aside by a hold.

        A new one, or ``user``. The hold is the first row of the user's history, and expires as ``Ledger.hold`` says.

        Raises:
            InvalidArgument: the purchase and the user's other credits do not cover the hold; nothing was written to the
                ledger.
        """
        user = self.user() if user is None else user
        self._check(user, credits)
        held = credits if held is None else held
        hold = self.ledger.hold.call(user, credits=held, key=_key(), expires_in=expires_in)
        available = self._standing(user).available + credits
        if available < held:
            too_few = f"user {user} would have {available} to set aside. Pass more credits, or fewer held"
            raise InvalidArgument.of("held", held, too_few)
        self._buy(user, credits)
        with _as_sqlalchemy(self.conn) as conn:
            send(conn, hold)
        return user

    def expiring(
        self, credits: int = 1, *, expires_in: dt.timedelta = dt.timedelta(days=30), user: Key | None = None
    ) -> Key:
        """A user who was granted ``credits`` that expire ``expires_in`` from now: a new one, or ``user``."""
        user = self.user() if user is None else user
        expires_at = self.clock.now() + expires_in
        with _as_sqlalchemy(self.conn) as conn:
            self.ledger.grant(conn, user, credits=credits, key=_key(), description="Expiring", expires_at=expires_at)
        return user

    def balance(self, user: Key) -> int:
        """The credits of ``user``."""
        with _as_sqlalchemy(self.conn) as conn:
            return self.ledger.balance(conn, user)

    def assert_balanced(self) -> None:
        """Fail with the audit's findings if there is a fault."""
        __tracebackhide__ = True
        assert_balanced(self.conn, self.config)

    def _check(self, user: Key, credits: int) -> None:
        """Refuse a wrong number of credits before anything is written."""
        self.ledger.start_purchase.call(user, credits=credits, description="-")

    def _standing(self, user: Key) -> Standing:
        with _as_sqlalchemy(self.conn) as conn:
            return self.ledger.standing(conn, user)

    def _buy(self, user: Key, credits: int) -> CreditTransaction:
        with _as_sqlalchemy(self.conn) as conn:
            started = self.ledger.start_purchase(conn, user, credits=credits, description=f"Purchased {credits}")
            return self.ledger.complete_purchase(
                conn, user, purchase=started.id, amount_paid=100 * credits, currency="usd"
            )

    @contextmanager
    def _host(self) -> Iterator[tuple[sa.Connection, HostTables]]:
        with _as_sqlalchemy(self.conn) as conn:
            tables = self._tables(conn)
            with tables.raising_seed_impossible():
                yield conn, tables


class Clock:
    """The clock of a test's database.

    ``advance`` moves ``now()``, ``transaction_timestamp()``, ``statement_timestamp()`` and ``clock_timestamp()`` of the
    database ahead of the server's clock, for every connection: in Tallystick's functions, the app's SQL and the
    defaults of its columns. CURRENT_TIMESTAMP and the like still give the server's clock, and the app's process has its
    own.
    """

    def __init__(self, conn: Any) -> None:
        self._conn = conn

    def advance(self, **by: float) -> None:
        """Move the clock on, by the arguments of ``datetime.timedelta``: ``advance(days=30)``.

        It is part of the connection's transaction, and other connections see it when that is committed.

        Raises:
            InvalidArgument: the clock would go backwards, before rows that are written already.
            PermissionDenied: the database was not made by ``Databases`` with a superuser's address.
        """
        step = dt.timedelta(**by)
        if step < dt.timedelta(0):
            raise InvalidArgument(f"advance({shown(by)}): a clock goes forward only", argument="by", value=by)
        with _as_sqlalchemy(self._conn) as conn:
            if not conn.scalar(sa.text("SELECT to_regclass('tallystick_testing.clock') IS NOT NULL")):
                raise PermissionDenied(
                    "the clock of this database cannot be moved: functions of PostgreSQL's are replaced for it, in a "
                    "database that Databases makes with the address of a superuser, as on the embedded server",
                )
            conn.execute(sa.text(_ADVANCE), {"seconds": step.total_seconds()})

    def now(self) -> dt.datetime:
        """The database's present time, in UTC."""
        with _as_sqlalchemy(self._conn) as conn:
            found: dt.datetime = conn.execute(sa.text("SELECT clock_timestamp()")).scalar_one()
        return found.astimezone(dt.UTC)


def assert_balanced(conn: Any, config: Config | None = None) -> None:
    """Fail with the audit's findings if there is a fault. Without ``config`` the mapping is read from the database.

    Raises:
        AssertionError: names every fault, with its likely cause.
    """
    __tracebackhide__ = True
    with _as_sqlalchemy(conn) as on:
        report = audit(on, config or Ledger(on).config)
    faults = [str(finding) for finding in report.findings if finding.fault]
    if faults:
        raise AssertionError("\n\n".join([f"faults that the audit finds: {len(faults)}", *faults]))


# --- addresses ---


def _url(config: Config) -> str:
    if config.database_url is None:
        raise InvalidArgument("config has no database_url. Pass config.at(address)", argument="config", value=None)
    return config.database_url


def _database(config: Config) -> str:
    return sa.make_url(_url(config)).database or ""


def _libpq(config: Config, *, database: str | None = None) -> str:
    """The address in ``config`` without SQLAlchemy's driver name, or that of another database on the server."""
    url = sa.make_url(_url(config)).set(drivername="postgresql")
    return (url if database is None else url.set(database=database)).render_as_string(hide_password=False)


# --- rows ---


def _looked_at_once(config: Config) -> Callable[[sa.Connection], HostTables]:
    """The app's tables, examined once: that takes longer than all else in a test."""
    found: list[HostTables] = []

    def tables(conn: sa.Connection) -> HostTables:
        if not found:
            found.append(HostTables(conn, Schema.of(config.host)))
        return found[0]

    return tables


def _row(text: str) -> HostRow:
    number = next(_numbers)
    return HostRow(f"test_{number}", _ROWS_FROM + number, text)


def _key() -> str:
    return f"testing-{next(_numbers)}"


# --- the clock ---

CLOCK = """
CREATE SCHEMA tallystick_testing;
CREATE TABLE tallystick_testing.clock (ahead interval NOT NULL);
INSERT INTO tallystick_testing.clock VALUES ('0');
GRANT USAGE ON SCHEMA tallystick_testing TO PUBLIC;
GRANT SELECT, UPDATE ON tallystick_testing.clock TO PUBLIC;
DO $$
DECLARE name text;
BEGIN
  FOREACH name IN ARRAY ARRAY['now', 'transaction_timestamp', 'statement_timestamp', 'clock_timestamp'] LOOP
    EXECUTE format('ALTER FUNCTION pg_catalog.%I() RENAME TO %I', name, 'real_' || name);
    EXECUTE format(
      'CREATE FUNCTION pg_catalog.%I() RETURNS timestamptz LANGUAGE sql %s PARALLEL SAFE AS '
      '''SELECT pg_catalog.%I() OPERATOR(pg_catalog.+) ahead FROM tallystick_testing.clock''',
      name, CASE name WHEN 'clock_timestamp' THEN 'VOLATILE' ELSE 'STABLE' END, 'real_' || name);
  END LOOP;
END $$
"""
"""The SQL that makes the clock of a database movable, for tests in another language; a superuser runs it."""

# in seconds: the length of a day depends on the session's time zone
_ADVANCE = "UPDATE tallystick_testing.clock SET ahead = ahead + make_interval(secs => :seconds)"


def _make_clock_movable(conn: psycopg.Connection[Any]) -> None:
    """Replace PostgreSQL's own functions, in this database alone. ``Clock`` raises where the role may not."""
    with suppress(psycopg.errors.InsufficientPrivilege), conn.transaction():
        conn.execute(CLOCK)


# --- connections ---

_SESSIONS = {"sqlalchemy.orm.session.Session", "sqlalchemy.orm.scoping.scoped_session"}
_DRIVERS = {"psycopg.Connection": "psycopg", "psycopg2.extensions.connection": "psycopg2"}


@contextmanager
def _as_sqlalchemy(conn: Any) -> Iterator[sa.Connection]:
    """The caller's connection as one of SQLAlchemy's, inside the caller's transaction, which it cannot end."""
    names = [f"{kind.__module__}.{kind.__qualname__}" for kind in type(conn).__mro__]
    if isinstance(conn, sa.Connection):
        yield conn
        return
    if _SESSIONS.intersection(names):
        conn.flush()
        yield conn.connection()
        return
    if hasattr(conn, "ensure_connection"):  # Django's
        conn.ensure_connection()
        with _as_sqlalchemy(conn.connection) as made:
            yield made
        return
    driver = next((_DRIVERS[name] for name in names if name in _DRIVERS), None)
    if driver is None:
        raise InvalidArgument(
            f"conn is a {names[0]}. Pass a synchronous connection to PostgreSQL: SQLAlchemy's, psycopg's, psycopg2's "
            "or Django's",
            argument="conn",
            value=names[0],
        )
    borrowed = sa.create_engine(
        f"postgresql+{driver}://", creator=lambda: conn, poolclass=sa.NullPool, use_native_hstore=False
    )
    for ending in ("do_commit", "do_rollback", "do_close", "do_terminate"):
        setattr(borrowed.dialect, ending, lambda _: None)
    with _rows_as_tuples(conn), borrowed.connect() as made:
        yield made


@contextmanager
def _rows_as_tuples(conn: Any) -> Iterator[None]:
    """Let a connection return tuples, which SQLAlchemy needs; its owner may have set another row type."""
    if not isinstance(conn, psycopg.Connection):
        yield
        return
    before, conn.row_factory = conn.row_factory, rows.tuple_row
    try:
        yield
    finally:
        conn.row_factory = before
