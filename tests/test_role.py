"""The app's role of ``migrate.role``: every operation works with it, and rewriting history does not."""

from __future__ import annotations

import datetime as dt
import shlex
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import psycopg
import pytest
import sqlalchemy as sa
from psycopg import errors, sql

from tallystick import CreditTransaction, HostMapping, Pack, migrate, stripe
from tallystick.audit import audit
from tallystick.dev.stripe import DevStripe
from tallystick.errors import InsufficientCredits, InvalidArgument, Key, MigrationError, PermissionDenied
from tallystick.ledger import Consume
from tallystick.migrate import role
from tallystick.schema import CreditTransactionStatus, CreditTransactionType
from worlds import World

ORIGIN = "http://127.0.0.1:8000"
ODD_NAME = "app$$; DROP TABLE users; -- \"quoted'"


def run_script(world: World, script: str) -> None:
    with psycopg.connect(world.url.replace("+psycopg", ""), autocommit=True) as conn:
        conn.execute(script.encode())


def host_grants(world: World, name: str) -> None:
    """What an app's role has on the app's own tables, before the ledger's script; TRIGGER comes with GRANT ALL."""
    tables = [world.schema.users, *([world.schema.workshops] if world.schema.workshops is not None else [])]
    script = sql.SQL(
        "GRANT SELECT, INSERT, UPDATE, TRIGGER ON {tables} TO {role}; "
        "GRANT USAGE ON ALL SEQUENCES IN SCHEMA {schema} TO {role}"
    ).format(
        tables=sql.SQL(", ").join(sql.Identifier(str(table.schema), table.name) for table in tables),
        schema=sql.Identifier(world.config.host.users.schema),
        role=sql.Identifier(name),
    )
    run_script(world, script.as_string())


@pytest.fixture
def app(any_world: World) -> Iterator[tuple[World, sa.Engine]]:
    """The owner's world, and an engine that is the app's role."""
    name = f"{ODD_NAME} {uuid.uuid4().hex[:8]}"
    identifier = sql.Identifier(name)
    with psycopg.connect(any_world.url.replace("+psycopg", ""), autocommit=True) as conn:
        conn.execute(sql.SQL("CREATE ROLE {} LOGIN").format(identifier))
        host_grants(any_world, name)
        run_script(any_world, role.grant(any_world.config.host, name))
        run_script(any_world, role.grant(any_world.config.host, name))  # again: nothing changes
        engine = sa.create_engine(sa.make_url(any_world.url).set(username=name), poolclass=sa.NullPool)
        yield any_world, engine
        run_script(any_world, role.revoke(any_world.config.host, name))
        conn.execute(sql.SQL("DROP OWNED BY {}").format(identifier))
        conn.execute(sql.SQL("DROP ROLE {}").format(identifier))


def test_the_scripts_own_grants_are_enough(world: World) -> None:
    name = f"bare {uuid.uuid4().hex[:8]}"
    identifier = sql.Identifier(name)
    user, other = world.user(credits=9), world.user(credits=9)
    with psycopg.connect(world.url.replace("+psycopg", ""), autocommit=True) as conn:
        conn.execute(sql.SQL("CREATE ROLE {} LOGIN").format(identifier))
        run_script(world, role.grant(world.config.host, name))
        engine = sa.create_engine(sa.make_url(world.url).set(username=name), poolclass=sa.NullPool)
        with engine.connect() as app, app.begin():
            world.ledger.consume(app, user, workshop=world.workshop(user), key="a")
            world.ledger.consume_many(app, [Consume(user, key="b"), Consume(other, key="b")])
            assert world.ledger.lock(app, user) == world.ledger.balance(app, user) == 7
            world.accounts.set_plan_tier(app, user, "pro")
        run_script(world, role.revoke(world.config.host, name))
        conn.execute(sql.SQL("DROP OWNED BY {}").format(identifier))
        conn.execute(sql.SQL("DROP ROLE {}").format(identifier))


def test_every_operation_works(app: tuple[World, sa.Engine]) -> None:
    world, engine = app
    ledger, accounts, users = world.ledger, world.accounts, world.schema.users
    user, other = another_key(world), world.user(credits=9)
    with engine.connect() as conn, conn.begin():  # the app's own writes, of every column as ORMs do
        conn.execute(new_user(world, user, credit_balance=0, credit_sequence=0))
        conn.execute(sa.update(users).where(users.c.key == other).values(credit_balance=9, credit_sequence=1))
    workshops = [world.workshop(user) for _ in range(2)] if world.config.host.workshops else []
    workshop = workshops[0] if workshops else None
    with engine.connect() as conn, conn.begin():
        assert conn.scalar(sa.text("SELECT current_user")).startswith(ODD_NAME)
        bought = ledger.start_purchase(conn, user, credits=5, description="A pack", key="p")
        ledger.attach_session(conn, user, bought.id, stripe_session_id="cs_1")
        ledger.complete_purchase(conn, user, stripe_session_id="cs_1", amount_paid=7900, currency="usd")
        failed = ledger.start_purchase(conn, user, credits=5, description="A pack")
        ledger.fail_purchase(conn, user, id=failed.id, reason="expired")
        ledger.consume(conn, user, workshop=workshop, key="c")
        items = [Consume(user, key="d"), Consume(other, amount=3, key="d"), Consume(user, key="e")]
        items += [Consume(other, amount=9, key="e"), *(Consume(other, key=f"f{n}") for n in range(3))]
        *written, last = ledger.consume_many(conn, items)
        refused = written.pop(3)
        assert isinstance(refused, InsufficientCredits)
        assert all(isinstance(row, CreditTransaction) for row in written)
        assert isinstance(last, CreditTransaction)
        assert (last.balance_after, last.sequence) == (3, 5)
        ledger.refund(conn, user, bought.id, credits=1, key="r")
        with pytest.raises(InsufficientCredits):
            ledger.consume(conn, user, amount=9, key="f")
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
        double.refund(double.account.objects["checkout.session"][bought.session]["payment_intent"], amount=2634)
        for held in double.held():
            body, signature = double.signed(held["event"], held["endpoint"])
            assert stripe.receive(engine, shop, body.encode(), signature).status == 200
        assert not stripe.reconcile(engine, shop).changed
    with engine.connect() as conn:
        assert world.ledger.balance(conn, user) == 2


def now(conn: sa.Connection):
    return conn.scalar(sa.select(sa.func.clock_timestamp()))


def added(
    *rows: tuple[int, int, int],
    place: tuple[int, int] | None,
    days: int = 0,
    **values: object,
) -> Callable[[World], sa.Executable]:
    """Rows ``(amount, balance_after, sequence)`` by hand, and in the same statement their user moved to ``place``."""

    def statement(world: World) -> sa.Executable:
        users, ledger = world.schema.users, world.schema.credit_transactions
        given = [
            {
                "id": uuid.uuid4(),
                "user_id": sa.select(users.c.key).scalar_subquery(),
                "type": CreditTransactionType.GRANT,
                "status": CreditTransactionStatus.COMPLETED,
                "amount": amount,
                "balance_after": balance,
                "sequence": sequence,
                "description": "By hand",
                "completed_at": sa.func.clock_timestamp() + dt.timedelta(days=days),
                **values,
            }
            for amount, balance, sequence in rows
        ]
        written = sa.insert(ledger).values(given).returning(ledger.c.id).cte("written")
        done = sa.select(written.c.id)
        if place is None:
            return done
        moved = sa.update(users).values(credit_balance=place[0], credit_sequence=place[1]).cte("moved")
        return done.add_cte(moved)

    return statement


def completed(place: tuple[int, int] | None) -> Callable[[World], sa.Executable]:
    """What waits is completed as the tenth row."""

    def statement(world: World) -> sa.Executable:
        users, row = world.schema.users, world.schema.credit_transactions.c
        step = {"status": CreditTransactionStatus.COMPLETED, "balance_after": 1_000, "sequence": 10}
        done = (
            sa.update(world.schema.credit_transactions)
            .where(row.status == CreditTransactionStatus.PENDING)
            .values(**step, completed_at=sa.func.clock_timestamp())
        )
        if place is None:
            return done
        moved = sa.update(users).values(credit_balance=place[0], credit_sequence=place[1]).cte("moved")
        return sa.select(done.returning(row.id).cte("done").c.id).add_cte(moved)

    return statement


def new_user(world: World, key: Key, **values: int) -> sa.Executable:
    email = {"email": f"{key}@example.com"} if "email" in world.schema.users.c else {}
    return sa.insert(world.schema.users).values(key=key, **email, **values)


def another_key(world: World) -> Key:
    return world.key(world.config.host.users.key_type)


# of a user whose two rows are 5 bought and 1 spent, and who is about to buy 7
FORBIDDEN: dict[str, Callable[[World], sa.Executable]] = {
    "set a balance": lambda w: sa.update(w.schema.users).values(credit_balance=1_000),
    "set a balance and its number": lambda w: sa.update(w.schema.users).values(credit_balance=1_000, credit_sequence=9),
    "set an older balance": lambda w: sa.update(w.schema.users).values(credit_balance=5),
    "set an older balance and its number": lambda w: sa.update(w.schema.users).values(
        credit_balance=5, credit_sequence=1
    ),
    "set back to the start": lambda w: sa.update(w.schema.users).values(credit_balance=0, credit_sequence=0),
    "add a user with a balance": lambda w: new_user(w, another_key(w), credit_balance=1_000),
    "add a user with a number": lambda w: new_user(w, another_key(w), credit_sequence=1),
    "add a user with both": lambda w: new_user(w, another_key(w), credit_balance=5, credit_sequence=1),
    "add a row and move no balance": added((1_000, 1_004, 3), place=None),
    "add a row and move the balance elsewhere": added((1_000, 1_004, 3), place=(1_000, 3)),
    "add a row whose balance is not the sum": added((1, 1_004, 3), place=(1_004, 3)),
    "add a row that leaves the balance": added((1_000, 4, 3), place=(4, 3)),
    "add a row after a gap": added((1, 5, 9), place=(5, 9)),
    "add a row behind the last": added((1, 5, 3), (1, 6, 4), place=(5, 3)),
    "add rows of which one is wrong": added((1, 1_000, 3), (1, 6, 4), place=(6, 4)),
    "add rows in another order": added((2, 6, 4), (1, 7, 3), place=(6, 4)),
    "add a row of the past": added((1, 5, 3), place=(5, 3), days=-1),
    "add a row of the future": added((1, 5, 3), place=(5, 3), days=1),
    "add a row that was made before": added((1, 5, 3), place=(5, 3), created_at=sa.func.now()),
    "complete a purchase and move no balance": completed(None),
    "complete a purchase and set a balance": completed((1_000, 10)),
    "change an amount": lambda w: sa.update(w.schema.credit_transactions).values(amount=1_000),
    "change whose it is": lambda w: sa.update(w.schema.credit_transactions).values(user_id=sa.null()),
    "change a key": lambda w: sa.update(w.schema.credit_transactions).values(idempotency_key="mine"),
    "change when": lambda w: sa.update(w.schema.credit_transactions).values(created_at=sa.func.now()),
    "delete a row": lambda w: sa.delete(w.schema.credit_transactions),
    "truncate": lambda w: sa.text(f'TRUNCATE "{w.config.host.users.schema}".credit_transactions'),
    "delete a user": lambda w: sa.delete(w.schema.users),
    "have a trigger run as whoever writes": lambda w: sa.text(
        f'CREATE TRIGGER mine BEFORE UPDATE ON "{w.schema.users.schema}"."{w.schema.users.name}"'
        " FOR EACH ROW EXECUTE FUNCTION tallystick.touch_updated_at()"
    ),
    "switch triggers off": lambda w: sa.text("SET session_replication_role = replica"),
    "forget the migration": lambda w: sa.text("DELETE FROM tallystick.migration_log"),
}


def test_history_cannot_be_rewritten(app: tuple[World, sa.Engine]) -> None:
    world, engine = app
    user = world.user(credits=5)
    with engine.connect() as conn:
        with conn.begin():
            world.ledger.consume(conn, user, key="a")
            world.ledger.start_purchase(conn, user, credits=7, description="A pack")
        for name, statement in FORBIDDEN.items():
            with pytest.raises(sa.exc.ProgrammingError) as caught, conn.begin():
                conn.execute(statement(world))
            assert isinstance(caught.value.orig, errors.InsufficientPrivilege), name
        # what the role may write is held by the ledger's own triggers
        with pytest.raises(sa.exc.DatabaseError), conn.begin():
            conn.execute(sa.update(world.schema.credit_transactions).values(balance_after=1_000))
        with conn.begin():  # and what the ledger would have added can be added
            assert world.ledger.balance(conn, user) == 4
            conn.execute(added((1, 5, 3), (2, 7, 4), place=(7, 4))(world))
        with conn.begin():
            assert world.ledger.consume(conn, user, key="b").balance_after == 6
    with world.engine.connect() as conn:
        assert audit(conn, world.config).clean


def test_nobody_takes_the_key_of_another(app: tuple[World, sa.Engine]) -> None:
    """Whose rows those are: the foreign key lets a key go where another user takes it in the same statement."""
    world, engine = app
    rich, poor, spare = world.user(credits=5), world.user(), another_key(world)
    users = world.schema.users
    leaves, takes = (
        sa.update(users).where(users.c.key == before).values(key=after).returning(users.c.key).cte(name)
        for name, before, after in (("leaves", rich, spare), ("takes", poor, rich))
    )
    swap = sa.select(leaves.c.key).add_cte(takes)
    with engine.connect() as conn:
        with pytest.raises(sa.exc.ProgrammingError, match="last row says"), conn.begin():
            conn.execute(swap)
        with conn.begin():  # whose ledger is empty may have another key
            conn.execute(sa.update(users).where(users.c.key == poor).values(key=spare))
    with world.engine.connect() as conn:
        conn.execute(sa.update(users).where(users.c.key == spare).values(key=poor))
        conn.execute(swap)  # the owner can
        conn.rollback()
        assert audit(conn, world.config).clean


def test_what_stays_possible_is_found_by_the_audit(app: tuple[World, sa.Engine]) -> None:
    """What a row says besides its number, its balance and its time; and a workshop's mark."""
    world, engine = app
    user, other = world.user(credits=5), world.user()
    users, ledger, workshops = world.schema.users, world.schema.credit_transactions, world.schema.workshops
    by_hand: dict[str, object] = {"id": uuid.uuid4(), "user_id": user, "type": CreditTransactionType.REFUND}
    by_hand |= {"status": CreditTransactionStatus.COMPLETED, "amount": -6, "balance_after": -1, "sequence": 2}
    by_hand |= {"description": "By hand", "completed_at": sa.func.clock_timestamp()}
    expected = {"refund_excess"}
    with engine.connect() as conn, conn.begin():
        bought = world.ledger.history(conn, user)[0]
        written = sa.insert(ledger).values(**by_hand, refund_of=bought.id).returning(ledger.c.id).cte("written")
        moved = sa.update(users).where(users.c.key == user).values(credit_balance=-1, credit_sequence=2).cte("moved")
        conn.execute(sa.select(written.c.id).add_cte(moved))
        if workshops is not None:
            conn.execute(
                sa.update(workshops)
                .where(workshops.c.key == world.workshop(other))
                .values(credit_consumed_at=sa.func.now())
            )
            expected |= {"workshop_paid"}
    with world.engine.connect() as conn:
        assert {finding.check for finding in audit(conn, world.config).findings} == expected


def test_the_triggers_find_rows_by_index(app: tuple[World, sa.Engine]) -> None:
    """A session keeps the plan of a small table, whatever grows out of it."""
    world, engine = app
    user = world.user(credits=50)
    with world.autocommit.connect() as owner:
        owner.exec_driver_sql("ANALYZE")
    scans = sa.text("SELECT coalesce(sum(seq_scan), 0) FROM pg_stat_xact_user_tables WHERE relname = :ledger")
    with engine.connect() as conn, conn.begin():
        for n in range(10):
            world.ledger.consume(conn, user, key=f"{n}")
        assert conn.scalar(scans, {"ledger": world.schema.credit_transactions.name}) == 0


@pytest.mark.parametrize("script", [role.grant, role.revoke])
def test_the_scripts_do_not_deadlock_with_the_app(
    app: tuple[World, sa.Engine], script: Callable[[HostMapping, str], str]
) -> None:
    world, engine = app
    user = world.user()
    waits = sa.text(
        "SELECT count(*) FROM pg_locks WHERE NOT granted AND locktype = 'relation'"
        " AND database = (SELECT oid FROM pg_database WHERE datname = current_database())"
    )
    with world.autocommit.connect() as owner, engine.connect() as conn, ThreadPoolExecutor(1) as thread:
        with conn.begin():
            world.ledger.start_purchase(conn, user, credits=1, description="A pack")  # locks the ledger
            done = thread.submit(run_script, world, script(world.config.host, str(engine.url.username)))
            while not owner.scalar(waits):
                assert not done.done()
                time.sleep(0.01)
            world.accounts.set_plan_tier(conn, user, "pro")  # and then the users
        done.result()


EARLIER = """
DROP TRIGGER tallystick_balance_has_moved ON credit_transactions;
DROP FUNCTION tallystick.balance_has_moved();
GRANT INSERT ON credit_transactions TO {role};
CREATE OR REPLACE FUNCTION tallystick.balance_by_ledger() RETURNS trigger LANGUAGE plpgsql
SET search_path = pg_catalog, pg_temp AS $$
BEGIN
  IF (NEW.credit_balance, NEW.credit_sequence) IS DISTINCT FROM (OLD.credit_balance, OLD.credit_sequence)
    AND NOT EXISTS (
      SELECT FROM public.credit_transactions
      WHERE user_id = NEW.id AND sequence = NEW.credit_sequence AND balance_after = NEW.credit_balance)
    AND NOT pg_has_role(current_user, (SELECT relowner FROM pg_class WHERE oid = TG_RELID), 'usage')
  THEN
    RAISE EXCEPTION 'a balance is what the ledger''s last row says' USING ERRCODE = '42501';
  END IF;
  RETURN NULL;
END $$;
CREATE OR REPLACE TRIGGER tallystick_balance_by_ledger AFTER UPDATE OF credit_balance, credit_sequence ON users
  FOR EACH ROW WHEN (pg_catalog.pg_has_role(current_user, pg_catalog.to_regrole('{role}'), 'usage'))
  EXECUTE FUNCTION tallystick.balance_by_ledger('{role}');
"""
"""What an earlier script left, where it differs from today's."""


def test_what_an_earlier_script_left_open_is_closed_by_running_it_again(world: World) -> None:
    name = f"early_{uuid.uuid4().hex[:8]}"
    user = world.user(credits=5)
    open_once = [FORBIDDEN[what] for what in ("set an older balance and its number", "add a user with a balance")]
    with world.autocommit.connect() as owner:
        owner.exec_driver_sql(f"CREATE ROLE {name} LOGIN")
    host_grants(world, name)
    run_script(world, role.grant(world.config.host, name))
    run_script(world, EARLIER.format(role=name))
    engine = sa.create_engine(sa.make_url(world.url).set(username=name), poolclass=sa.NullPool)
    with engine.connect() as conn:
        with conn.begin():
            world.ledger.consume(conn, user, key="a")
        for statement in open_once:
            conn.execute(statement(world))
            conn.rollback()
        run_script(world, role.grant(world.config.host, name))
        for statement in open_once:
            with pytest.raises(sa.exc.ProgrammingError, match="last row says"), conn.begin():
                conn.execute(statement(world))
    run_script(world, EARLIER.format(role=name))
    run_script(world, role.revoke(world.config.host, name))
    assert migrate.undo(world.url, world.config, discard_ledger=True).after is None
    with world.autocommit.connect() as owner:
        owner.exec_driver_sql(f"DROP OWNED BY {name}")
        owner.exec_driver_sql(f"DROP ROLE {name}")


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
        with pytest.raises(MigrationError, match="is gone, but not its triggers") as refused:
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
