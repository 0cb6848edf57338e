"""The app's role of ``migrate.role``: every operation works with it, and rewriting history does not."""

from __future__ import annotations

import shlex
import uuid
from collections.abc import Callable, Iterator

import psycopg
import pytest
import sqlalchemy as sa
from psycopg import errors, sql

from tallystick import Pack, migrate, stripe
from tallystick.audit import audit
from tallystick.devstripe import DevStripe
from tallystick.errors import InsufficientCredits, InvalidArgument, MigrationError, PermissionDenied
from tallystick.ledger import Consume
from tallystick.migrate import role
from worlds import World

ORIGIN = "http://127.0.0.1:8000"
ODD_NAME = "app$$; DROP TABLE users; -- \"quoted'"


def run_script(world: World, script: str) -> None:
    with psycopg.connect(world.url.replace("+psycopg", ""), autocommit=True) as conn:
        conn.execute(script.encode())


@pytest.fixture
def app(any_world: World) -> Iterator[tuple[World, sa.Engine]]:
    """The owner's world, and an engine that is the app's role."""
    name = f"{ODD_NAME} {uuid.uuid4().hex[:8]}"
    identifier = sql.Identifier(name)
    with psycopg.connect(any_world.url.replace("+psycopg", ""), autocommit=True) as conn:
        conn.execute(sql.SQL("CREATE ROLE {} LOGIN").format(identifier))
        run_script(any_world, role.grant(any_world.config.host, name))
        run_script(any_world, role.grant(any_world.config.host, name))  # again: nothing changes
        engine = sa.create_engine(sa.make_url(any_world.url).set(username=name), poolclass=sa.NullPool)
        yield any_world, engine
        run_script(any_world, role.revoke(any_world.config.host, name))
        conn.execute(sql.SQL("DROP OWNED BY {}").format(identifier))
        conn.execute(sql.SQL("DROP ROLE {}").format(identifier))


def test_every_operation_works(app: tuple[World, sa.Engine]) -> None:
    world, engine = app
    ledger, accounts, user = world.ledger, world.accounts, world.user()
    workshop = world.workshop(user) if world.config.host.workshops else None
    with engine.connect() as conn, conn.begin():
        assert conn.scalar(sa.text("SELECT current_user")).startswith(ODD_NAME)
        bought = ledger.start_purchase(conn, user, credits=5, description="A pack", key="p")
        ledger.attach_session(conn, user, bought.id, stripe_session_id="cs_1")
        ledger.complete_purchase(conn, user, stripe_session_id="cs_1", amount_paid=7900, currency="usd")
        failed = ledger.start_purchase(conn, user, credits=5, description="A pack")
        ledger.fail_purchase(conn, user, id=failed.id, reason="expired")
        ledger.consume(conn, user, workshop=workshop, key="c")
        ledger.consume_many(conn, [Consume(user, key="d"), Consume(user, key="e")])
        ledger.refund(conn, user, bought.id, credits=1, key="r")
        with pytest.raises(InsufficientCredits):
            ledger.consume(conn, user, amount=9, key="f")
        assert ledger.balance(conn, user) == ledger.balance_at(conn, user, now(conn)) == 1
        assert len(ledger.history(conn, user, include_failed=True)) == 6
        ledger.grant(conn, user, credits=2, key="g", description="Welcome")
        ledger.reinstate(conn, user, bought.id, credits=1, key="r failed")
        if workshop is not None:
            assert ledger.access(conn, workshop).open
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


def test_a_sale_through_stripe_works(app: tuple[World, sa.Engine]) -> None:
    world, engine = app
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
        double.refund(double.account.objects["checkout.session"][bought.session]["payment_intent"], amount=1000)
        for held in double.held():
            body, signature = double.signed(held["event"], held["endpoint"])
            assert stripe.receive(engine, shop, body.encode(), signature).status == 200
        assert not stripe.reconcile(engine, shop).changed
    with engine.connect() as conn:
        assert world.ledger.balance(conn, user) == 2


def now(conn: sa.Connection):
    return conn.scalar(sa.select(sa.func.clock_timestamp()))


FORBIDDEN: dict[str, Callable[[World], sa.Executable]] = {
    "set a balance": lambda w: sa.update(w.schema.users).values(credit_balance=1_000),
    "set a balance and its number": lambda w: sa.update(w.schema.users).values(credit_balance=1_000, credit_sequence=9),
    "set an older balance": lambda w: sa.update(w.schema.users).values(credit_balance=5),
    "change an amount": lambda w: sa.update(w.schema.credit_transactions).values(amount=1_000),
    "change whose it is": lambda w: sa.update(w.schema.credit_transactions).values(user_id=sa.null()),
    "change a key": lambda w: sa.update(w.schema.credit_transactions).values(idempotency_key="mine"),
    "change when": lambda w: sa.update(w.schema.credit_transactions).values(created_at=sa.func.now()),
    "delete a row": lambda w: sa.delete(w.schema.credit_transactions),
    "truncate": lambda w: sa.text(f'TRUNCATE "{w.config.host.users.schema}".credit_transactions'),
    "delete a user": lambda w: sa.delete(w.schema.users),
    "switch triggers off": lambda w: sa.text("SET session_replication_role = replica"),
    "forget the migration": lambda w: sa.text("DELETE FROM tallystick.migration_log"),
}


def test_history_cannot_be_rewritten(app: tuple[World, sa.Engine]) -> None:
    world, engine = app
    user = world.user(credits=5)
    with engine.connect() as conn:
        with conn.begin():
            world.ledger.consume(conn, user, key="a")
        for name, statement in FORBIDDEN.items():
            with pytest.raises(sa.exc.ProgrammingError) as caught, conn.begin():
                conn.execute(statement(world))
            assert isinstance(caught.value.orig, errors.InsufficientPrivilege), name
        # what the role may write is held by the ledger's own triggers
        with pytest.raises(sa.exc.DatabaseError), conn.begin():
            conn.execute(sa.update(world.schema.credit_transactions).values(balance_after=1_000))
        assert world.ledger.balance(conn, user) == 4
    with world.engine.connect() as conn:
        assert audit(conn, world.config).clean


def test_without_the_grants_the_error_says_what_is_missing(world: World) -> None:
    name = f"stranger_{uuid.uuid4().hex[:8]}"
    user = world.user()
    with world.autocommit.connect() as conn:
        conn.exec_driver_sql(f"CREATE ROLE {name} LOGIN")
        engine = sa.create_engine(sa.make_url(world.url).set(username=name), poolclass=sa.NullPool)
        with engine.connect() as stranger, pytest.raises(PermissionDenied, match="Grant it to this role"):
            world.ledger.balance(stranger, user)
        conn.exec_driver_sql(f"DROP ROLE {name}")


def test_a_superuser_cannot_be_limited(world: World) -> None:
    with pytest.raises(errors.RaiseException, match="no privilege limits"):
        run_script(world, role.grant(world.config.host, "postgres"))


def test_a_role_that_is_not_there_is_told(world: World) -> None:
    with pytest.raises(errors.RaiseException, match="there is no role nobody"):
        run_script(world, role.grant(world.config.host, "nobody"))


def test_a_second_role_becomes_a_member_of_the_first(app: tuple[World, sa.Engine]) -> None:
    """Its members have its privileges, and are held to the ledger as it is; the owner is not."""
    world, engine = app
    worker = f"worker_{uuid.uuid4().hex[:8]}"
    user = world.user(credits=5)
    with world.autocommit.connect() as owner:
        owner.exec_driver_sql(f"CREATE ROLE {worker} LOGIN")
        with pytest.raises(errors.RaiseException, match="another role runs the ledger already") as refused:
            run_script(world, role.grant(world.config.host, worker))
        assert "GRANT the_other TO this_one" in str(refused.value.diag.message_hint)
        first = sql.Identifier(str(engine.url.username))
        run_script(world, sql.SQL("GRANT {} TO {}").format(first, sql.Identifier(worker)).as_string())
        members = sa.create_engine(sa.make_url(world.url).set(username=worker), poolclass=sa.NullPool)
        try:
            with members.connect() as conn:
                with conn.begin():
                    assert world.ledger.consume(conn, user, key="a").balance_after == 4
                with pytest.raises(sa.exc.ProgrammingError, match="last row says"), conn.begin():
                    conn.execute(FORBIDDEN["set a balance"](world))
            owner.execute(FORBIDDEN["set a balance"](world))
            assert world.ledger.balance(owner, user) == 1_000
        finally:
            owner.exec_driver_sql(f"DROP OWNED BY {worker}")
            owner.exec_driver_sql(f"DROP ROLE {worker}")


def test_a_dropped_role_stops_nobody_and_undo_says_what_is_left(world: World) -> None:
    name = f"gone_{uuid.uuid4().hex[:8]}"
    user = world.user(credits=5)
    with world.autocommit.connect() as owner:
        owner.exec_driver_sql(f"CREATE ROLE {name} LOGIN")
        run_script(world, role.grant(world.config.host, name))
        owner.exec_driver_sql(f"DROP OWNED BY {name}")
        owner.exec_driver_sql(f"DROP ROLE {name}")
        assert world.ledger.consume(owner, user, key="a").balance_after == 4
        with pytest.raises(MigrationError, match="is gone, but not its trigger") as refused:
            migrate.undo(world.url, world.config, discard_ledger=True)
        for statement in str(refused.value).split("tables: ")[1].split("; then")[0].split("; "):
            owner.exec_driver_sql(statement)
    assert migrate.undo(world.url, world.config, discard_ledger=True).after is None


def test_undo_names_the_role_that_is_in_the_way(app: tuple[World, sa.Engine]) -> None:
    world, engine = app
    assert engine.url.username is not None
    with pytest.raises(MigrationError) as refused:
        migrate.undo(world.url, world.config)
    words = shlex.split(str(refused.value).split("owner of the tables: ")[1].split(" | ")[0])
    assert words == ["tallystick", "migrate", "sql", "--role", engine.url.username, "--revoke"]
    assert refused.value.__cause__ is None  # told before anything was tried
    run_script(world, role.revoke(world.config.host, engine.url.username))
    run_script(world, role.revoke(world.config.host, engine.url.username))  # again: nothing changes
    assert migrate.undo(world.url, world.config).after is None
    migrate.apply(world.url, world.config)  # the fixture's revoke needs the ledger


@pytest.mark.parametrize("name", ["", "a\0b", "a\ud800", "x" * 64, "ö" * 32])
def test_what_is_no_name_of_a_role_is_refused(world: World, name: str) -> None:
    for script in (role.grant, role.revoke):
        with pytest.raises(InvalidArgument, match="1 to 63 bytes"):
            script(world.config.host, name)
