"""The app's role of ``migrate.role``: every operation works with it, and nothing is written past the functions."""

from __future__ import annotations

import shlex
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import psycopg
import pytest
import sqlalchemy as sa
from psycopg import errors, sql

from partitioned import partition
from tallystick import CreditTransaction, HostMapping, Pack, migrate, stripe
from tallystick.audit import audit
from tallystick.dev.seed import seed
from tallystick.dev.stripe import DevStripe
from tallystick.errors import InsufficientCredits, InvalidArgument, Key, PermissionDenied, UnknownUser
from tallystick.ledger import Consume
from tallystick.migrate.host import role
from tallystick.schema import CreditTransactionStatus, CreditTransactionType
from worlds import World

ORIGIN = "http://127.0.0.1:8000"
ODD_NAME = "app$$; DROP TABLE users; -- \"quoted'"


def run_script(world: World, script: str) -> list[str]:
    """As the owner; gives the notices."""
    notices: list[str] = []
    with psycopg.connect(world.url.replace("+psycopg", ""), autocommit=True) as conn:
        conn.add_notice_handler(lambda notice: notices.append(f"{notice.severity}: {notice.message_primary}"))
        conn.execute(script.encode())
    return notices


def host_grants(world: World, name: str) -> None:
    """Privileges of an app's role on the app's own tables before the ledger's script; TRIGGER comes with GRANT ALL."""
    tables = [world.schema.users, *([world.schema.workshops] if world.schema.workshops is not None else [])]
    script = sql.SQL(
        "GRANT ALL ON {tables} TO {role}; GRANT USAGE ON ALL SEQUENCES IN SCHEMA {schema} TO {role}"
    ).format(
        tables=sql.SQL(", ").join(sql.Identifier(str(table.schema), table.name) for table in tables),
        schema=sql.Identifier(world.config.host.users.schema),
        role=sql.Identifier(name),
    )
    run_script(world, script.as_string())


@dataclass(frozen=True)
class App:
    """The app's role in a world of the owner's."""

    world: World
    name: str
    engine: sa.Engine

    @property
    def quoted(self) -> str:
        return sql.Identifier(self.name).as_string()

    def grant(self) -> list[str]:
        return run_script(self.world, role.grant(self.world.config.host, self.name))

    def owner_runs(self, statements: str, **names: str) -> None:
        """SQL with ``{app}`` for the role, ``{group}`` and others for more roles of the test."""
        run_script(self.world, statements.format(app=self.quoted, **names))

    def ways(self) -> list[migrate.Drift]:
        with self.world.engine.connect() as conn:
            status = migrate.status(conn, self.world.config)
            assert status.healthy == (not status.drift)
            return [drift for drift in status.drift if drift.where == self.name or "the functions" in drift.expected]


@pytest.fixture
def make_role(any_world: World) -> Iterator[Callable[..., str]]:
    """``make_role(options="LOGIN", name=None)``: a role that is gone after the test."""
    made: list[str] = []

    def make(options: str = "LOGIN", *, name: str = "role") -> str:
        made.append(f"{name} {uuid.uuid4().hex[:8]}")
        run_script(any_world, f"CREATE ROLE {sql.Identifier(made[-1]).as_string()} {options}")
        return made[-1]

    yield make
    if made:
        gone = ", ".join(sql.Identifier(name).as_string() for name in made)
        run_script(
            any_world,
            f"ALTER DATABASE {any_world.engine.url.database} OWNER TO postgres;"
            f"REASSIGN OWNED BY {gone} TO postgres; DROP OWNED BY {gone}; DROP ROLE {gone}",
        )


@pytest.fixture
def app(any_world: World, make_role: Callable[..., str]) -> App:
    """The app's role, given the ledger."""
    name = make_role(name=ODD_NAME)
    host_grants(any_world, name)
    made = App(any_world, name, sa.create_engine(sa.make_url(any_world.url).set(username=name), poolclass=sa.NullPool))
    made.grant()
    return made


one_shape = pytest.mark.parametrize("any_world", ["uuid"], indirect=True)
"""Of tests in which the shape of the host's tables plays no part."""


@one_shape
def test_the_scripts_own_grants_are_enough(any_world: World, make_role: Callable[..., str]) -> None:
    world, name = any_world, make_role()
    user, other = world.user(credits=9), world.user(credits=9)
    run_script(world, role.grant(world.config.host, name))
    engine = sa.create_engine(sa.make_url(world.url).set(username=name), poolclass=sa.NullPool)
    with engine.connect() as conn, conn.begin():
        world.ledger.consume(conn, user, workshop=world.workshop(user), key="a")
        world.ledger.consume_many(conn, [Consume(user, key="b"), Consume(other, key="b")])
        assert world.ledger.lock(conn, user) == world.ledger.balance(conn, user) == 7
        world.accounts.set_plan_tier(conn, user, "pro")
        assert conn.scalar(sa.select(sa.func.sum(world.schema.users.c.credit_balance))) == 15


@one_shape
def test_the_seed_sends_the_role_to_the_owner(app: App) -> None:
    """It inserts a purchase that has been pending for days, which no function does."""
    with pytest.raises(PermissionDenied, match=r"permission denied for table .* the tables' owner: --database-url$"):
        seed(app.engine, app.world.config, environ={})


def test_every_operation_works(app: App) -> None:
    world, engine = app.world, app.engine
    ledger, accounts, users = world.ledger, world.accounts, world.schema.users
    user, other = another_key(world), world.user(credits=9)
    with engine.connect() as conn, conn.begin():  # the app's own writes
        conn.execute(new_user(world, user))
        conn.execute(sa.update(users).where(users.c.key == other).values(plan_tier="pro", onboarding_complete=True))
    workshops = [world.workshop(user) for _ in range(2)] if world.config.host.workshops else []
    workshop = workshops[0] if workshops else None
    with engine.connect() as conn, conn.begin():
        assert conn.scalar(sa.text("SELECT current_user")).startswith(ODD_NAME)
        bought = ledger.start_purchase(conn, user, credits=5, description="A pack", key="p")
        ledger.attach_session(conn, user, bought.id, stripe_session_id="cs_1")
        ledger.complete_purchase(conn, user, stripe_session_id="cs_1", amount_paid=7900, currency="usd")
        failed = ledger.start_purchase(conn, user, credits=5, description="A pack")
        ledger.fail_purchase(conn, user, purchase=failed.id, reason="expired")
        ledger.consume(conn, user, workshop=workshop, key="c")
        items = [Consume(user, key="d"), Consume(other, credits=3, key="d"), Consume(user, key="e")]
        items += [Consume(other, credits=9, key="e"), *(Consume(other, key=f"f{n}") for n in range(3))]
        *written, last = ledger.consume_many(conn, items)
        refused = written.pop(3)
        assert isinstance(refused, InsufficientCredits)
        assert all(isinstance(row, CreditTransaction) for row in written)
        assert isinstance(last, CreditTransaction)
        assert (last.balance_after, last.sequence) == (3, 5)
        ledger.refund(conn, user, bought.id, credits=1, key="r")
        with pytest.raises(InsufficientCredits):
            ledger.consume(conn, user, credits=9, key="f")
        assert ledger.balance(conn, user) == ledger.balance_at(conn, user, now(conn)) == 1
        assert len(ledger.history(conn, user, include_failed=True)) == 6
        ledger.grant(conn, user, credits=2, key="g", description="Welcome")
        ledger.reinstate(conn, user, bought.id, credits=1, key="r failed")
        if workshop is not None:
            ledger.consume_many(conn, [Consume(user, workshop=workshops[1], key="w"), Consume(user, key="v")])
            assert all(ledger.access(conn, one).open for one in workshops)
            accounts.delete_workshop(conn, workshop)
            accounts.restore_workshop(conn, workshop)
        accounts.complete_onboarding(conn, user)
        accounts.reset_onboarding(conn, user)
        accounts.set_plan_tier(conn, user, "pro")
        accounts.set_stripe_customer(conn, user, "cus_1")
        accounts.delete_user(conn, user)
        accounts.restore_user(conn, user)
    with world.engine.connect() as conn:  # the owner's to ask: it reads whole tables
        assert audit(conn, world.config).clean
        assert migrate.status(conn, world.config).healthy


@one_shape
def test_a_sale_through_stripe_works(app: App) -> None:
    world, engine = app.world, app.engine
    user = world.user()
    with DevStripe() as double:
        at_double = {"stripe_secret_key": double.secret_key, "stripe_api_base": double.url}
        pack = Pack(name="Single Flight", credits=3, amount=7900)
        shop = world.config.model_copy(update=at_double | {"checkout_origins": (ORIGIN,), "packs": (pack,)})
        made = stripe.setup(shop, endpoint_url=f"{ORIGIN}/webhook")
        priced = Pack(name=pack.name, credits=3, amount=7900, stripe_price_id=made.packs[0].price)
        shop = shop.model_copy(update={"packs": (priced,), "stripe_webhook_secret": made.endpoint.secret})
        double.hold()
        addresses = {"success_url": f"{ORIGIN}/done", "cancel_url": f"{ORIGIN}/packs"}
        bought = stripe.checkout(engine, shop, user, pack.name, key="form", **addresses)
        double.pay(bought.session)
        double.refund(double.account.objects["checkout.session"][bought.session]["payment_intent"], amount=3000)
        for held in double.held():
            body, signature = double.signed(held["event"], held["endpoint"])
            assert stripe.receive(engine, shop, body.encode(), signature).status == 200
        assert not stripe.reconcile(engine, shop).changed
    with engine.connect() as conn:
        assert world.ledger.balance(conn, user) == 2


def now(conn: sa.Connection):
    return conn.scalar(sa.select(sa.func.clock_timestamp()))


def new_user(world: World, key: Key, **values: int) -> sa.Executable:
    email = {"email": f"{key}@example.com"} if "email" in world.schema.users.c else {}
    return sa.insert(world.schema.users).values(key=key, **email, **values)


def another_key(world: World) -> Key:
    return world.key(world.config.host.users.key_type)


def by_hand(world: World) -> sa.Executable:
    return sa.insert(world.schema.credit_transactions).values(
        id=uuid.uuid4(),
        user_id=sa.select(world.schema.users.c.key).scalar_subquery(),
        type=CreditTransactionType.GRANT,
        status=CreditTransactionStatus.COMPLETED,
        amount=1_000,
        balance_after=1_004,
        sequence=3,
        description="By hand",
        completed_at=sa.func.clock_timestamp(),
    )


# of a user whose two rows are 5 bought and 1 spent, and who is about to buy 7
FORBIDDEN: dict[str, Callable[[World], sa.Executable]] = {
    "set a balance": lambda w: sa.update(w.schema.users).values(credit_balance=1_000),
    "set a balance beside another column": lambda w: sa.update(w.schema.users).values(
        plan_tier="pro", credit_balance=1_000
    ),
    "set a number": lambda w: sa.update(w.schema.users).values(credit_sequence=9),
    "set the balance that is there": lambda w: sa.update(w.schema.users).values(credit_balance=4, credit_sequence=2),
    "take another's key": lambda w: sa.update(w.schema.users).values(key=w.schema.users.c.key),
    "add a user with a balance": lambda w: new_user(w, another_key(w), credit_balance=1_000),
    "add a user with a number": lambda w: new_user(w, another_key(w), credit_sequence=1),
    "add a row": by_hand,
    "complete a purchase": lambda w: sa.update(w.schema.credit_transactions).values(
        status=CreditTransactionStatus.COMPLETED, balance_after=11, sequence=3, completed_at=sa.func.now()
    ),
    "change an amount": lambda w: sa.update(w.schema.credit_transactions).values(amount=1_000),
    "change a description": lambda w: sa.update(w.schema.credit_transactions).values(description="Mine"),
    "delete a row": lambda w: sa.delete(w.schema.credit_transactions),
    "truncate": lambda w: sa.text(f'TRUNCATE "{w.config.host.users.schema}".credit_transactions'),
    "truncate users": lambda w: sa.text(f'TRUNCATE "{w.schema.users.schema}"."{w.schema.users.name}" CASCADE'),
    "have a trigger run as the owner": lambda w: sa.text(
        f'CREATE TRIGGER mine BEFORE UPDATE ON "{w.schema.users.schema}"."{w.schema.users.name}"'
        " FOR EACH ROW EXECUTE FUNCTION tallystick.touch_updated_at()"
    ),
    "put another function in place": lambda _: sa.text(
        "CREATE FUNCTION tallystick.settle(text, integer, integer) RETURNS void LANGUAGE sql AS ''"
    ),
    "call what the functions call": lambda _: sa.text("SELECT tallystick.uuid7()"),
    "switch triggers off": lambda _: sa.text("SET session_replication_role = replica"),
    "forget the migration": lambda _: sa.text("DELETE FROM tallystick.migration_log"),
    "number the events again": lambda _: sa.text("SELECT setval('tallystick.events_id_seq', 1)"),
    "change the mapping": lambda _: sa.text("UPDATE tallystick.mapping SET host = '{}'"),
}
OF_WORKSHOPS: dict[str, Callable[[World], sa.Executable]] = {
    "unlock a workshop": lambda w: sa.update(w.schema.workshops).values(credit_consumed_at=sa.func.now()),
    "lock a workshop": lambda w: sa.update(w.schema.workshops).values(credit_consumed_at=None),
    "give a workshop another's key": lambda w: sa.update(w.schema.workshops).values(key=w.schema.workshops.c.key),
    "add an unlocked workshop": lambda w: sa.insert(w.schema.workshops).values(
        key=w.key(w.config.host.workshops.key_type), owner=None, credit_consumed_at=sa.func.now()
    ),
}


def test_nothing_is_written_past_the_functions(app: App) -> None:
    world = app.world
    user = world.user(credits=5)
    forbidden = FORBIDDEN | (OF_WORKSHOPS if world.schema.workshops is not None else {})
    with app.engine.connect() as conn:
        with conn.begin():
            world.ledger.consume(conn, user, key="a")
            world.ledger.start_purchase(conn, user, credits=7, description="A pack")
        for name, statement in forbidden.items():
            with pytest.raises(sa.exc.ProgrammingError) as caught, conn.begin():
                conn.execute(statement(world))
            assert isinstance(caught.value.orig, errors.InsufficientPrivilege), name
        with conn.begin():
            assert world.ledger.consume(conn, user, key="b").balance_after == 3
    with world.engine.connect() as conn:
        assert audit(conn, world.config).clean


@one_shape
def test_the_apps_own_columns_stay_its_own(any_world: World, make_role: Callable[..., str]) -> None:
    """And the script says which they are; a column that is added later needs its own GRANT."""
    world, name = any_world, make_role()
    host_grants(world, name)
    quoted = sql.Identifier(name).as_string()
    output = run_script(world, role.grant(world.config.host, name))
    assert (
        "NOTICE: UPDATE on public.users is now for these columns: email, created_at, onboarding_complete, "
        "stripe_customer_id, plan_tier, updated_at, deleted_at" in output
    )
    assert sum(line.startswith("NOTICE") for line in output) == 4  # two rights, two tables
    assert not [line for line in run_script(world, role.grant(world.config.host, name)) if line.startswith("NOTICE")]
    engine = sa.create_engine(sa.make_url(world.url).set(username=name), poolclass=sa.NullPool)
    user = another_key(world)
    with engine.connect() as conn:
        with conn.begin():
            conn.execute(new_user(world, user))
            conn.exec_driver_sql(
                "UPDATE users SET email = 'new', created_at = now(), onboarding_complete = true, plan_tier = 'pro',"
                " stripe_customer_id = 'cus_1', updated_at = now(), deleted_at = NULL"
            )
            conn.exec_driver_sql("SELECT FROM users FOR UPDATE")
            conn.exec_driver_sql("DELETE FROM users")
        run_script(world, "ALTER TABLE users ADD nickname text")
        with pytest.raises(sa.exc.ProgrammingError, match="permission denied"), conn.begin():
            conn.exec_driver_sql("UPDATE users SET nickname = 'Bo'")
        run_script(world, f"GRANT INSERT (nickname), UPDATE (nickname) ON users TO {quoted}")
        with conn.begin():
            conn.exec_driver_sql("UPDATE users SET nickname = 'Bo'")
    with world.engine.connect() as conn:
        assert migrate.status(conn, world.config).healthy


@one_shape
def test_the_whole_tables_come_back(any_world: World, make_role: Callable[..., str]) -> None:
    """With --revoke, and with undo, which needs no other step."""
    world, name = any_world, make_role()
    rights = sa.text(
        "SELECT relname, relacl::text, ARRAY(SELECT attname || attacl::text FROM pg_attribute"
        " WHERE attrelid = c.oid AND NOT attisdropped AND attacl IS NOT NULL) AS columns"
        " FROM pg_class c WHERE relname IN ('users', 'workshops') ORDER BY 1"
    )
    host_grants(world, name)
    quoted = sql.Identifier(name).as_string()
    run_script(world, f"REVOKE TRIGGER ON users, workshops FROM {quoted}; REVOKE UPDATE ON workshops FROM {quoted}")
    run_script(world, f"GRANT UPDATE (title) ON workshops TO {quoted}")
    with world.autocommit.connect() as owner:
        before = owner.execute(rights).all()
        run_script(world, role.grant(world.config.host, name))
        assert owner.execute(rights).all() != before
        run_script(world, role.revoke(world.config.host, name))
        assert sorted(map(str, owner.execute(rights).all())) == sorted(map(str, before))
        run_script(world, role.revoke(world.config.host, name))  # again: nothing changes
        assert owner.execute(rights).all() == before
        run_script(world, role.grant(world.config.host, name))
        assert migrate.undo(world.url, world.config).after is None
        assert owner.execute(rights).all() == before
        schemas = owner.exec_driver_sql("SELECT to_regnamespace('tallystick')").scalar()
        assert schemas is None


WAYS: dict[str, tuple[str, str]] = {
    # setup by the owner, and what is said of it
    "a trigger, by the role": ("GRANT TRIGGER ON users TO {app}", "may TRIGGER public.users"),
    "a trigger, by a group": (
        "GRANT TRIGGER ON users TO {group}; GRANT {group} TO {app}",
        "may TRIGGER public.users as {group}",
    ),
    "a trigger, by a group that is not inherited": (
        "GRANT TRIGGER ON users TO {group}; ALTER ROLE {app} NOINHERIT; GRANT {group} TO {app}",
        "may TRIGGER public.users as {group}",
    ),
    "a trigger, by PUBLIC": ("GRANT TRIGGER ON workshops TO PUBLIC", "may TRIGGER public.workshops as everybody may"),
    "a trigger of the ledger": (
        "GRANT TRIGGER ON credit_transactions TO PUBLIC",
        "may TRIGGER public.credit_transactions",
    ),
    "names in public": ("GRANT CREATE ON SCHEMA public TO {app}", "may CREATE in SCHEMA public"),
    "names in public, by PUBLIC": (
        "GRANT CREATE ON SCHEMA public TO PUBLIC",
        "may CREATE in SCHEMA public as everybody",
    ),
    "names in our schema": ("GRANT CREATE ON SCHEMA tallystick TO {app}", "may CREATE in SCHEMA tallystick"),
    "the balance, by a group": (
        "GRANT UPDATE ON users TO {group}; GRANT {group} TO {app}",
        "may UPDATE public.users as {group}",
    ),
    "the balance, by a column": ("GRANT UPDATE (credit_balance) ON users TO PUBLIC", "may UPDATE (credit_balance)"),
    "the balance, by a chain of roles": (
        "GRANT UPDATE (credit_balance) ON users TO {other}; GRANT {other} TO {group}; GRANT {group} TO {app}",
        "may UPDATE (credit_balance) public.users as {other}",
    ),
    "a new balance": ("GRANT INSERT (credit_balance) ON users TO PUBLIC", "may INSERT (credit_balance)"),
    "the whole table again": ("GRANT ALL ON users TO {app}", "may INSERT, UPDATE public.users"),
    "the mark": ("GRANT UPDATE (credit_consumed_at) ON workshops TO {app}", "may UPDATE (credit_consumed_at)"),
    "the ledger": (
        "GRANT INSERT ON credit_transactions TO {group}; GRANT {group} TO {app}",
        "may INSERT public.credit",
    ),
    "the ledger's columns": ("GRANT UPDATE (amount) ON credit_transactions TO {app}", "may UPDATE (amount)"),
    "what was seen of Stripe": (
        "GRANT DELETE ON tallystick.stripe_events TO {app}",
        "may DELETE tallystick.stripe_events",
    ),
    "the mapping": ("GRANT UPDATE ON tallystick.mapping TO {app}", "may UPDATE tallystick.mapping"),
    "the numbers of events": (
        "GRANT UPDATE ON SEQUENCE tallystick.events_id_seq TO {group}; GRANT {group} TO {app}",
        "may UPDATE tallystick.events_id_seq as {group}",
    ),
    "all data": ("GRANT pg_write_all_data TO {app}", "is a member of pg_write_all_data"),
    "all data, by a group": ("GRANT pg_write_all_data TO {group}; GRANT {group} TO {app}", "is a member of pg_write"),
    "programs": ("GRANT pg_execute_server_program TO {app}", "is a member of pg_execute_server_program"),
    "a superuser": ("ALTER ROLE {group} SUPERUSER; GRANT {group} TO {app}", "can become the superuser {group}"),
    "the schema's owner": ("ALTER SCHEMA public OWNER TO {app}", "owns SCHEMA public"),
    "the database's owner": ("ALTER DATABASE {database} OWNER TO {group}; GRANT {group} TO {app}", "owns DATABASE"),
    "a function's owner": (
        "ALTER FUNCTION tallystick.settle OWNER TO {app}",
        "owns FUNCTION tallystick.settle(uuid,",
    ),
    "a trigger function's owner": (
        (
            "CREATE FUNCTION public.mine() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NEW; END';"
            "ALTER FUNCTION public.mine() OWNER TO {app};"
            "CREATE TRIGGER mine AFTER UPDATE ON users FOR EACH ROW EXECUTE FUNCTION public.mine()"
        ),
        "owns FUNCTION public.mine()",
    ),
    "a default's owner": (
        (
            "CREATE FUNCTION public.mine() RETURNS text LANGUAGE sql AS 'SELECT NULL';"
            "ALTER FUNCTION public.mine() OWNER TO {app}; ALTER TABLE users ADD nickname text DEFAULT public.mine()"
        ),
        "owns FUNCTION public.mine()",
    ),
    "the owner of a function in a domain's check": (
        (
            "CREATE FUNCTION public.mine(text) RETURNS boolean LANGUAGE sql AS 'SELECT true';"
            "ALTER FUNCTION public.mine(text) OWNER TO {app};"
            "CREATE DOMAIN public.word AS text CHECK (public.mine(VALUE)); CREATE DOMAIN public.nick AS public.word;"
            "ALTER TABLE users ADD n public.nick"
        ),
        "owns FUNCTION public.mine(text)",
    ),
    "the owner of a domain that another one is over": (
        (
            "CREATE DOMAIN public.word AS text; ALTER TYPE public.word OWNER TO {app};"
            "CREATE DOMAIN public.nick AS public.word; ALTER TABLE users ADD n public.nick"
        ),
        "owns TYPE public.word",
    ),
    "a parameter that switches triggers off": (
        "GRANT SET ON PARAMETER session_replication_role TO {group}; GRANT {group} TO {app}",
        "may set the parameter session_replication_role as {group}",
    ),
    "a parameter that names a program": (
        "GRANT ALTER SYSTEM ON PARAMETER archive_command TO {app}",
        "may set the parameter archive_command",
    ),
    "a type's owner": (
        "CREATE DOMAIN public.nick AS text; ALTER TYPE public.nick OWNER TO {app}; ALTER TABLE users ADD n public.nick",
        "owns TYPE public.nick",
    ),
    "a view": (
        "CREATE VIEW public.active AS SELECT * FROM users; GRANT UPDATE ON public.active TO {app}",
        "may UPDATE public.active",
    ),
    "a column of a view of a view, under another name": (
        (
            "CREATE VIEW public.some AS SELECT id, credit_balance AS credits FROM users;"
            "CREATE VIEW public.fewer AS SELECT id, credits AS coins FROM public.some;"
            "GRANT UPDATE (coins) ON public.fewer TO PUBLIC"
        ),
        "may UPDATE (coins) public.fewer as everybody may",
    ),
    "a rule of another table": (
        (
            "CREATE TABLE public.topped_up (id uuid); CREATE RULE more AS ON INSERT TO public.topped_up"
            " DO ALSO UPDATE users SET credit_balance = 1000 WHERE users.id = NEW.id;"
            "GRANT INSERT ON public.topped_up TO {app}"
        ),
        "may INSERT public.topped_up",
    ),
    "a key that the user's key follows": (
        (
            "CREATE TABLE public.people (id uuid PRIMARY KEY);"
            "ALTER TABLE users ADD FOREIGN KEY (id) REFERENCES public.people ON UPDATE CASCADE;"
            "GRANT UPDATE ON public.people TO {app}"
        ),
        "may UPDATE public.people",
    ),
    "the owner of a key that the user's key follows": (
        (
            "CREATE TABLE public.people (id uuid PRIMARY KEY); ALTER TABLE public.people OWNER TO {group};"
            "ALTER TABLE users ADD FOREIGN KEY (id) REFERENCES public.people ON UPDATE CASCADE; GRANT {group} TO {app}"
        ),
        "owns TABLE public.people",
    ),
    "the ledger, passed on": (
        "GRANT EXECUTE ON ALL FUNCTIONS IN SCHEMA tallystick TO {app} WITH GRANT OPTION",
        "may pass on EXECUTE on FUNCTION tallystick.",
    ),
    "a table, passed on": ("GRANT SELECT ON users TO {app} WITH GRANT OPTION", "may pass on SELECT on public.users"),
}
OF_THE_ROLE = {
    "a trigger, by the role",
    "a trigger of the ledger",
    "the whole table again",
    "the mark",
    "the ledger's columns",
    "the mapping",
    "what was seen of Stripe",
}
"""The ways past the functions that the script closes by itself."""


@one_shape
@pytest.mark.parametrize(
    "way",
    [pytest.param(way, marks=[pytest.mark.since(15)] if " ON PARAMETER " in WAYS[way][0] else []) for way in WAYS],
)
def test_a_way_past_the_functions_is_told_and_mended(app: App, make_role: Callable[..., str], way: str) -> None:
    """By status, and by the script, which changes nothing; and what both say to run closes it."""
    setup, words = WAYS[way]
    names = {name: sql.Identifier(make_role("NOLOGIN", name=name)).as_string() for name in ("group", "other")}
    names["database"] = str(app.world.engine.url.database)
    app.owner_runs(setup, **names)
    message = None
    if way not in {*OF_THE_ROLE, "the ledger, passed on"}:
        with pytest.raises(errors.RaiseException, match="can get past the functions") as refused:
            app.grant()
        message = str(refused.value)
    found = app.ways()
    assert found
    assert {drift.where for drift in found} == {app.name}
    assert any(str(drift.found).startswith(words.format(**names)) for drift in found), found
    assert all(drift.remedy for drift in found)
    if message:
        assert all(f"- it {drift.found}. To take that back: {drift.remedy}" in message for drift in found)
    if way in OF_THE_ROLE:
        app.grant()  # which takes from the role what is the role's own
    else:
        for drift in found:
            remedy = drift.remedy.replace("TO another", "TO postgres")
            if remedy.startswith("tallystick migrate sql --role"):
                run_script(app.world, role.grant(app.world.config.host, names["group"].strip('"')))
            else:
                run_script(app.world, remedy)
    assert app.ways() == []
    app.grant()


@one_shape
def test_the_script_leaves_no_way(app: App) -> None:
    assert app.ways() == []


ATTACKS: dict[str, tuple[str, str]] = {
    # of a user with 5 credits: setup by the owner, and the statement by which the role changes the balance
    "a view": (WAYS["a view"][0], "UPDATE public.active SET credit_balance = 1000"),
    "a column of a view of a view": (
        WAYS["a column of a view of a view, under another name"][0] + "; GRANT SELECT ON public.fewer TO {app}",
        "UPDATE public.fewer SET coins = 1000",
    ),
    "a rule of another table": (
        WAYS["a rule of another table"][0],
        "INSERT INTO public.topped_up SELECT id FROM users",
    ),
    "a key that the user's key follows": (
        (
            "CREATE TABLE public.people (id uuid PRIMARY KEY); INSERT INTO public.people SELECT id FROM users;"
            "ALTER TABLE users ADD FOREIGN KEY (id) REFERENCES public.people ON UPDATE CASCADE;"
            "GRANT SELECT, UPDATE ON public.people TO {app}"
        ),
        "UPDATE public.people SET id = gen_random_uuid()",
    ),
}


@one_shape
@pytest.mark.parametrize("way", ATTACKS)
def test_a_way_through_another_relation_works_until_it_is_closed(app: App, way: str) -> None:
    """So what is told is a way, and the remedy closes it."""
    setup, attack = ATTACKS[way]
    user = app.world.user(credits=5)
    app.owner_runs(setup)

    def changed() -> bool:
        with app.world.engine.connect() as conn:
            try:
                return app.world.ledger.balance(conn, user) != 5
            except UnknownUser:
                return True

    with app.engine.connect() as conn:
        conn.exec_driver_sql(attack)
        conn.commit()
    assert changed()
    for drift in app.ways():
        run_script(app.world, str(drift.remedy))
    assert app.ways() == []
    with app.engine.connect() as conn, pytest.raises(sa.exc.ProgrammingError, match="permission denied"):
        conn.exec_driver_sql(attack)


@one_shape
def test_a_view_that_writes_no_balance_is_no_way(app: App) -> None:
    user = app.world.user()
    app.owner_runs("""
        CREATE VIEW public.mails AS SELECT email, plan_tier FROM users; GRANT ALL ON public.mails TO {app};
        CREATE VIEW public.active AS SELECT * FROM users WHERE deleted_at IS NULL;
        GRANT SELECT, INSERT (id, email), UPDATE (email, plan_tier) ON public.active TO {app};
        CREATE VIEW public.sums AS SELECT sum(credit_balance) FROM users; GRANT ALL ON public.sums TO {app};
        CREATE VIEW public.titles AS SELECT title, credit_balance FROM workshops, users; GRANT ALL ON titles TO {app};
        CREATE VIEW public.mine AS SELECT * FROM users; ALTER VIEW public.mine OWNER TO {app};
        CREATE VIEW public.as_caller WITH (security_invoker = on) AS SELECT * FROM users;
        GRANT ALL ON public.as_caller TO {app};
        CREATE TABLE public.people (id uuid PRIMARY KEY); GRANT ALL ON public.people TO {app};
        INSERT INTO public.people SELECT id FROM users;
        ALTER TABLE users ADD FOREIGN KEY (id) REFERENCES public.people ON DELETE CASCADE
    """)
    assert app.ways() == []
    app.grant()
    for view in ("mine", "as_caller"):
        with app.engine.connect() as conn, pytest.raises(sa.exc.ProgrammingError, match="permission denied"):
            conn.exec_driver_sql(f"UPDATE public.{view} SET credit_balance = 1000")
    with app.world.engine.connect() as conn:
        assert app.world.ledger.balance(conn, user) == 0


@one_shape
def test_a_command_names_a_role_as_one_word_of_a_shell(app: App, make_role: Callable[..., str]) -> None:
    """A name may hold what a shell would run, and quotes of both kinds."""
    name = make_role("NOLOGIN", name="group$(touch here)`id`'\"\\")
    app.owner_runs("GRANT UPDATE ON users TO {group}; GRANT {group} TO {app}", group=sql.Identifier(name).as_string())
    (found,) = app.ways()
    assert shlex.split(str(found.remedy))[:5] == ["tallystick", "migrate", "sql", "--role", name]


@one_shape
def test_a_partition_of_the_ledger_is_guarded_as_the_whole(app: App) -> None:
    """Its privileges are its own."""
    partition(app.world.engine, app.world.config)
    app.grant()
    app.owner_runs("GRANT UPDATE ON public.ledger_1 TO {app}")
    assert [str(drift.found) for drift in app.ways()] == ["may UPDATE public.ledger_1"]
    run_script(app.world, str(app.ways()[0].remedy))
    assert app.ways() == []


@one_shape
def test_createrole_is_a_way_out_before_16(app: App) -> None:
    app.owner_runs("ALTER ROLE {app} CREATEROLE")
    with app.world.engine.connect() as conn:
        old = conn.dialect.server_version_info < (16,)
    assert [str(drift.found) for drift in app.ways()] == (
        ["may give itself any role but a superuser's (CREATEROLE)"] if old else []
    )
    if old:
        with pytest.raises(errors.RaiseException, match="NOCREATEROLE"):
            app.grant()
        run_script(app.world, app.ways()[0].remedy)
    assert app.ways() == []


@one_shape
def test_rights_that_the_role_passed_on_are_told(any_world: World, make_role: Callable[..., str]) -> None:
    """PostgreSQL would not take them back from the role alone."""
    name, friend = make_role(), sql.Identifier(make_role()).as_string()
    quoted = sql.Identifier(name).as_string()
    run_script(
        any_world,
        f"GRANT ALL ON users TO {quoted} WITH GRANT OPTION; SET ROLE {quoted}; GRANT UPDATE ON users TO {friend}",
    )
    with pytest.raises(errors.RaiseException, match="has passed on its rights") as refused:
        run_script(any_world, role.grant(any_world.config.host, name))
    run_script(any_world, str(refused.value.diag.message_hint).partition("needed: ")[2])
    run_script(any_world, role.grant(any_world.config.host, name))


@one_shape
def test_what_the_ledger_got_by_default_is_taken_back(any_world: World, make_role: Callable[..., str]) -> None:
    """ALTER DEFAULT PRIVILEGES gives an app's role all rights on each new table and function."""
    name = make_role()
    quoted = sql.Identifier(name).as_string()
    run_script(
        any_world,
        f"ALTER DEFAULT PRIVILEGES GRANT ALL ON TABLES TO {quoted};"
        f"ALTER DEFAULT PRIVILEGES GRANT ALL ON SEQUENCES TO {quoted};"
        f"ALTER DEFAULT PRIVILEGES GRANT EXECUTE ON FUNCTIONS TO {quoted}",
    )
    migrate.undo(any_world.url, any_world.config)
    migrate.apply(any_world.url, any_world.config)
    run_script(any_world, role.grant(any_world.config.host, name))
    engine = sa.create_engine(sa.make_url(any_world.url).set(username=name), poolclass=sa.NullPool)
    user = any_world.user(credits=5)
    with engine.connect() as conn:
        kept = ("add a row", "delete a row", "call what the functions call", "change the mapping")
        for forbidden in (*kept, "number the events again"):
            with pytest.raises(sa.exc.ProgrammingError, match="permission denied"), conn.begin():
                conn.execute(FORBIDDEN[forbidden](any_world))
        with conn.begin():
            any_world.ledger.consume(conn, user, key="a")


@one_shape
def test_a_renamed_role_is_the_same_role(app: App, make_role: Callable[..., str]) -> None:
    """Rights are the role's and not its name's; and another that has the name now has none of them."""
    world, old = app.world, app.quoted
    user = world.user(credits=5)
    new = f"renamed {uuid.uuid4().hex[:8]}"
    quoted = sql.Identifier(new).as_string()
    run_script(world, f"ALTER ROLE {old} RENAME TO {quoted}; CREATE ROLE {old} LOGIN")
    try:
        engine = sa.create_engine(sa.make_url(world.url).set(username=new), poolclass=sa.NullPool)
        with engine.connect() as conn:
            with conn.begin():
                assert world.ledger.consume(conn, user, key="a").balance_after == 4
            with pytest.raises(sa.exc.ProgrammingError, match="permission denied"), conn.begin():
                conn.execute(FORBIDDEN["set a balance"](world))
        with app.engine.connect() as conn, pytest.raises(PermissionDenied):
            world.ledger.consume(conn, user, key="b")
        assert app.ways() == []
        run_script(world, f"GRANT UPDATE (credit_balance) ON users TO {quoted}")
        assert [drift.where for drift in app.ways()] == [new]
    finally:
        run_script(world, f"DROP ROLE {old}; ALTER ROLE {quoted} RENAME TO {old}")


@one_shape
def test_two_roles_have_the_ledger(app: App, make_role: Callable[..., str]) -> None:
    world, second = app.world, make_role()
    user = world.user(credits=5)
    run_script(world, role.grant(world.config.host, second))
    other = sa.create_engine(sa.make_url(world.url).set(username=second), poolclass=sa.NullPool)
    for engine, left in ((app.engine, 4), (other, 3)):
        with engine.connect() as conn, conn.begin():
            assert world.ledger.consume(conn, user, key=f"{left}").balance_after == left
    run_script(world, f"GRANT UPDATE (credit_balance) ON users TO {sql.Identifier(second).as_string()}")
    assert [drift.where for drift in app.ways()] == [second]


@one_shape
def test_an_owner_that_is_a_superuser_is_a_warning(app: App, make_role: Callable[..., str]) -> None:
    """By the script and by status; with another owner neither says it."""
    warning = "the owner of the ledger is a superuser"
    assert any(warning in line for line in app.grant())
    with app.world.engine.connect() as conn:
        status = migrate.status(conn, app.world.config)
        assert status.healthy
        assert any(warning in line for line in status.warnings)
    owner = make_role(name="owner")
    quoted = sql.Identifier(owner).as_string()
    owned = sql.SQL("""
        DO $$
        DECLARE
          one text;
        BEGIN
          FOR one IN
            SELECT format('ALTER %s %s OWNER TO %I', kind, name, {owner}) FROM (
              SELECT 'TABLE', oid::regclass::text FROM pg_class WHERE relkind = 'r'
                AND relnamespace IN ('public'::regnamespace, 'tallystick'::regnamespace)
              UNION ALL
              SELECT 'FUNCTION', oid::regprocedure::text FROM pg_proc WHERE pronamespace = 'tallystick'::regnamespace
            ) AS o (kind, name)
          LOOP
            EXECUTE one;
          END LOOP;
        END $$""").format(owner=sql.Literal(owner))
    run_script(app.world, f"{owned.as_string()}; ALTER SCHEMA tallystick OWNER TO {quoted}")
    assert not any(warning in line for line in app.grant())
    user = app.world.user(credits=5)
    with app.engine.connect() as conn, conn.begin():
        assert app.world.ledger.consume(conn, user, workshop=app.world.workshop(user), key="a").balance_after == 4
    with app.world.engine.connect() as conn:
        status = migrate.status(conn, app.world.config)
        assert status.healthy, status.drift
        assert not status.warnings


@one_shape
def test_without_the_grants_the_error_says_what_is_missing(any_world: World, make_role: Callable[..., str]) -> None:
    user = any_world.user()
    engine = sa.create_engine(sa.make_url(any_world.url).set(username=make_role()), poolclass=sa.NullPool)
    with engine.connect() as stranger, pytest.raises(PermissionDenied, match="tallystick migrate sql --role"):
        any_world.ledger.balance(stranger, user)


@one_shape
def test_a_superuser_cannot_be_limited(any_world: World) -> None:
    with pytest.raises(errors.RaiseException, match="no privilege limits"):
        run_script(any_world, role.grant(any_world.config.host, "postgres"))


@one_shape
def test_a_role_that_is_not_there_is_told(any_world: World) -> None:
    with pytest.raises(errors.RaiseException, match="there is no role nobody here") as refused:
        run_script(any_world, role.grant(any_world.config.host, "nobody here"))
    assert refused.value.diag.message_hint == 'Make it first: CREATE ROLE "nobody here" LOGIN'


@pytest.mark.parametrize("name", ["", "a\0b", "a\ud800", "x" * 64, "ö" * 32])
@pytest.mark.parametrize("script", [role.grant, role.revoke])
def test_what_is_no_name_of_a_role_is_refused(script: Callable[[HostMapping, str], str], name: str) -> None:
    with pytest.raises(InvalidArgument, match="1 to 63 bytes"):
        script(HostMapping(), name)
