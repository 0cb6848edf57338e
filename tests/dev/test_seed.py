"""The seed, on each shape of host app: the same end state from any beginning, and nothing left after a reset."""

from __future__ import annotations

import datetime as dt
import itertools
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psycopg
import pytest
import sqlalchemy as sa
from psycopg import sql

from tallystick import Config, HostMapping, Pack, Progress, UsersTable, WorkshopsTable, migrate
from tallystick.audit import audit
from tallystick.declared_tables import Schema
from tallystick.dev.host_tables import INTEGER_KEYS_FROM
from tallystick.dev.seed import (
    ENVIRONMENT_VARIABLES,
    MANY_USERS,
    NAMES,
    SCENARIOS,
    ScenarioOutcome,
    SeedReport,
    _is_local,
    reset,
    seed,
)
from tallystick.errors import (
    Conflict,
    InvalidArgument,
    NotMigrated,
    PermissionDenied,
    SeedImpossible,
    SeedRefused,
)
from tallystick.events import enable
from tallystick.ledger import AccessReason
from worlds import SHAPES, World

ROOT = Path(__file__).parents[2]
PATIENCE_S = 60
NOWHERE: dict[str, str] = {}  # an environment that says nothing
BALANCES = {
    "new": 0,
    "mid_onboarding": 1,
    "funded": 3,
    "long_history": 16,
    "refunded_in_full": 0,
    "refunded_in_part": 2,
    "in_debt": -3,
    "many_workshops": 2,
    "grandfathered": 0,
    "pending": 0,
    "pending_for_days": 0,
    "failed": 0,
    "failed_then_paid": 1,
    "deleted_user": 3,
    "deleted_workshop": 1,
    "names": 2,
    "granted": 2,
    "dispute_won": 3,
    "holding": 2,
    "reversed": 2,
    "expiring": 5,
    "corrected": -1,
    "merged_user": 4,
    "erased_user": 5,
    "low_balance": 1,
}


@pytest.fixture
def pooled() -> Iterator[Callable[[World], World]]:
    """``pooled(world) -> world``, with a pool: the seed connects for each scenario, of which there are two dozen."""
    pools: list[sa.Engine] = []

    def give(world: World) -> World:
        world.engine = sa.create_engine(world.url)
        world.autocommit = world.engine.execution_options(isolation_level="AUTOCOMMIT")
        pools.append(world.engine)
        return world

    yield give
    for pool in pools:
        pool.dispose()


@pytest.fixture
def make_world(make_world: Callable[..., World], pooled: Callable[[World], World]) -> Callable[..., World]:
    return lambda *args, **settings: pooled(make_world(*args, **settings))


def seed_world(world: World, **options: Any) -> SeedReport:
    return seed(world.engine, world.config, environ=NOWHERE, **options)


def reset_world(world: World, **options: Any) -> SeedReport:
    return reset(world.engine, world.config, environ=NOWHERE, **options)


def outcomes(report: SeedReport) -> dict[str, str]:
    return {one.scenario: one.outcome.value for one in report.scenarios}


def tables(schema: Schema) -> list[sa.Table]:
    return [table for table in (schema.users, schema.workshops, schema.credit_transactions) if table is not None]


def every_row(world: World) -> list[list[str]]:
    """All columns of all rows as the server prints them, the host's own columns and timestamps included."""
    whole_row = sa.cast(sa.literal_column("host_row"), sa.Text)
    with world.engine.connect() as conn:
        return [
            sorted(conn.scalars(sa.select(whole_row).select_from(table.alias("host_row"))))
            for table in tables(world.schema)
        ]


def test_events_go_with_their_rows_and_a_reader_gets_those_that_follow(world: World) -> None:
    enable(world.engine, world.config)
    seed_world(world)
    reset_world(world)
    user = world.user(credits=1)
    world.wait_for_analyze()
    with world.autocommit.connect() as conn:
        found = world.ledger.events(conn, limit=1)
        assert [(event.kind, event.user_id) for event in found] == [("purchase.completed", user)]


def test_lots_go_with_their_user(world: World) -> None:
    seed_world(world, only=["expiring"])
    with world.engine.connect() as conn:
        lots, moves = world.schema.lots, world.schema.lot_moves
        counts = [sa.select(sa.func.count()).select_from(table) for table in (lots, moves)]
        assert [conn.scalar(count) for count in counts] == [2, 1]
        reset_world(world)
        assert [conn.scalar(count) for count in counts] == [0, 0]


def every_fact(world: World) -> list[list[tuple[object, ...]]]:
    """All rows but for what rightly differs from one run to another: random ids, and times beyond set or not set."""

    def comparable(name: str, value: object, ids: dict[object, int]) -> object:
        if name in ("id", "refund_of"):
            return ids.get(value)
        if name == "idempotency_key" and str(value).startswith("tallystick:"):
            return str(value).rpartition(":")[0]  # an id follows
        return value is None if name.endswith("_at") else value

    found = []
    with world.engine.connect() as conn:
        for table in tables(world.schema):
            rows = conn.execute(sa.select(table)).mappings().all()
            in_order = (
                sorted(rows, key=lambda row: (str(row["user_id"]), row["sequence"] or 0)) if "id" in table.c else []
            )
            ids = {row["id"]: number for number, row in enumerate(in_order)}
            found.append(
                sorted((tuple(comparable(name, value, ids) for name, value in row.items()) for row in rows), key=str)
            )
    return found


# --- what there is ---


def test_every_scenario_is_made_where_the_host_has_what_it_needs(any_world: World) -> None:
    report = seed_world(any_world)
    host = any_world.config.host
    lacking = set()
    if host.workshops is None:
        lacking = {"many_workshops", "grandfathered", "deleted_workshop"}
    elif host.workshops.created_at is None:
        lacking = {"grandfathered"}
    assert [one.scenario for one in report.scenarios] == list(SCENARIOS) == list(BALANCES)
    assert {one.scenario for one in report.scenarios if one.outcome is ScenarioOutcome.SKIPPED} == lacking
    assert all(one.reason for one in report.scenarios if one.scenario in lacking)
    made = {one.scenario: one.balance for one in report.scenarios if one.scenario not in lacking}
    assert made == {name: balance for name, balance in BALANCES.items() if name not in lacking}
    assert {one.outcome for one in report.scenarios if one.scenario not in lacking} == {ScenarioOutcome.CREATED}
    with any_world.engine.connect() as conn:
        for one in report.scenarios:
            if one.scenario not in lacking:
                assert any_world.ledger.balance(conn, one.user) == one.balance


def test_each_scenario_says_in_one_line_what_it_is() -> None:
    for scenario in SCENARIOS.values():
        assert scenario.description
        assert "\n" not in scenario.description
    assert len({scenario.number for scenario in SCENARIOS.values()}) == len(SCENARIOS)


def test_keys_are_fixed_and_out_of_the_way() -> None:
    funded = SCENARIOS["funded"]

    def keys(key_type: Any) -> tuple[object, object]:
        schema = Schema.of(
            HostMapping(users=UsersTable(key_type=key_type), workshops=WorkshopsTable(key_type=key_type))
        )
        return funded.user_key(schema), funded.workshop_key(schema, 1)

    assert keys("text") == ("seed_funded", "seed_funded_1")
    assert keys("integer") == keys("bigint") == (INTEGER_KEYS_FROM - 3_000, INTEGER_KEYS_FROM - 3_001)
    assert [str(key) for key in keys("uuid")] == [
        "88ce0570-9b59-579a-96ce-8f7fda98352d",
        "981cf2c7-d813-5ca5-aff0-bf718a150fd4",
    ]


def states(world: World, scenario: str) -> list[tuple[str, str, int]]:
    with world.engine.connect() as conn:
        user = SCENARIOS[scenario].user_key(world.schema)
        rows = world.ledger.history(conn, user, limit=1000, include_failed=True)
        return [(str(row.type), str(row.status), row.amount) for row in reversed(rows)]


def test_states_of_purchases(any_world: World) -> None:
    seed_world(any_world)
    assert states(any_world, "new") == []
    assert states(any_world, "pending") == [("purchase", "pending", 1)]
    assert states(any_world, "failed") == [("purchase", "failed", 1)]
    assert states(any_world, "failed_then_paid") == [("purchase", "completed", 1)]
    assert states(any_world, "refunded_in_full") == [("purchase", "completed", 1), ("refund", "completed", -1)]
    assert states(any_world, "refunded_in_part") == [("purchase", "completed", 3), ("refund", "completed", -1)]
    assert states(any_world, "in_debt") == [
        ("purchase", "completed", 3),
        ("consumption", "completed", -3),
        ("refund", "completed", -3),
    ]
    assert len(states(any_world, "long_history")) > 100
    with any_world.engine.connect() as conn:
        (waiting,) = any_world.ledger.history(conn, SCENARIOS["pending_for_days"].user_key(any_world.schema))
        days = conn.scalar(sa.select(sa.func.extract("day", sa.func.now() - waiting.created_at)))
    assert (waiting.status, waiting.balance_after, days) == ("pending", None, 3)


def test_accounts(any_world: World) -> None:
    seed_world(any_world, only=["new", "mid_onboarding", "funded", "deleted_user"])
    with any_world.engine.connect() as conn:

        def account(scenario: str) -> Any:
            return any_world.accounts.get(conn, SCENARIOS[scenario].user_key(any_world.schema))

        assert not account("new").onboarding_complete
        assert not account("mid_onboarding").onboarding_complete
        assert account("funded").onboarding_complete
        assert account("funded").stripe_customer_id == "cus_seed_funded"
        assert account("deleted_user").deleted_at is not None
        assert account("deleted_user").credit_balance == 3


def access(world: World, scenario: str) -> list[AccessReason]:
    with world.engine.connect() as conn:
        return [world.ledger.access(conn, key).reason for key in SCENARIOS[scenario].workshop_keys(world.schema)]


@pytest.mark.parametrize("shape", ["uuid", "clerk", "quoted"])
def test_workshops(make_world: Callable[..., World], shape: str) -> None:
    world = make_world(shape)
    seed_world(world)
    assert access(world, "funded") == [AccessReason.LOCKED]
    many = access(world, "many_workshops")
    assert (len(many), many.count(AccessReason.UNLOCKED), many.count(AccessReason.LOCKED)) == (250, 100, 150)
    assert access(world, "deleted_workshop") == [AccessReason.DELETED, AccessReason.UNLOCKED]
    if world.config.host.workshops and world.config.host.workshops.created_at:
        assert access(world, "grandfathered") == [*[AccessReason.GRANDFATHERED] * 3, AccessReason.LOCKED]


def test_names_are_stored_faithfully(any_world: World) -> None:
    seed_world(any_world, only=["names"])
    assert len(NAMES[-1]) == 500
    user = SCENARIOS["names"].user_key(any_world.schema)
    with any_world.engine.connect() as conn:
        spent = [row for row in any_world.ledger.history(conn, user) if row.type == "consumption"]
        titles = [row.description.removeprefix("Credit consumed for Workshop: ") for row in reversed(spent)]
        longest = 200 if any_world.config.host.users.key == "clerk_user_id" else 500  # title varchar(200)
        assert titles == [name[:longest] for name in NAMES]
        workshops = any_world.schema.workshops
        if workshops is not None:
            stored = conn.scalars(sa.select(workshops.c.title).where(workshops.c.owner == user))
            assert sorted(stored) == sorted(titles)


def test_packs_of_the_configuration_are_sold(make_world: Callable[..., World]) -> None:
    packs = (
        Pack(name="Ten", credits=10, amount=50_000, currency="eur", stripe_price_id="price_ten"),
        Pack(name="Two", credits=2),
    )
    world = make_world("uuid", packs=packs)
    balances = {one.scenario: one.balance for one in seed_world(world).scenarios}
    assert (balances["funded"], balances["failed_then_paid"], balances["in_debt"]) == (10, 2, -10)
    with world.engine.connect() as conn:
        (ten,) = world.ledger.history(conn, SCENARIOS["funded"].user_key(world.schema))
        (two,) = world.ledger.history(conn, SCENARIOS["failed_then_paid"].user_key(world.schema))
    assert (ten.description, ten.amount_paid, ten.currency) == ("Purchased Ten pack", 50_000, "eur")
    assert ten.stripe_price_id == "price_ten"
    assert (two.amount_paid, two.currency) == (None, None)


def test_packs_too_small_for_a_story_give_way_to_ours(make_world: Callable[..., World]) -> None:
    world = make_world("uuid", packs=(Pack(name="One", credits=1, amount=100),))
    assert {one.scenario: one.balance for one in seed_world(world).scenarios} == BALANCES


# --- again, and after an interruption ---


def test_a_second_run_changes_nothing(any_world: World) -> None:
    first = seed_world(any_world)
    before = every_row(any_world)
    again = seed_world(any_world)
    assert every_row(any_world) == before
    assert not again.changed
    assert [(one.user, one.balance) for one in again.scenarios] == [(one.user, one.balance) for one in first.scenarios]


def test_what_a_developer_did_to_a_seeded_user_stays(world: World) -> None:
    seed_world(world)
    funded = SCENARIOS["funded"].user_key(world.schema)
    with world.engine.begin() as conn:
        world.ledger.consume(conn, funded, credits=3, key="mine")
        world.accounts.set_plan_tier(conn, funded, "pro")
    before = every_row(world)
    report = seed_world(world)
    assert every_row(world) == before
    assert next(one.balance for one in report.scenarios if one.scenario == "funded") == 0


CHILD = """
import sys
import sqlalchemy as sa
from tallystick import Config
from tallystick.dev.seed import seed
config = Config.model_validate_json(sys.argv[1])
engine = sa.create_engine(config.database_url, poolclass=sa.NullPool)
seed(engine, config, environ={}, progress=lambda now: print(now.done, flush=True))
"""


@contextmanager
def seeding(world: World) -> Iterator[subprocess.Popen[str]]:
    """Another process that seeds this world and prints how many scenarios it has done; killed at the end."""
    config = world.config.model_dump_json()
    command = [sys.executable, "-c", CHILD, config]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        try:
            yield child
        finally:
            child.send_signal(signal.SIGKILL)


def wait_until_done(child: subprocess.Popen[str], scenarios: int) -> None:
    assert child.stdout is not None
    for line in child.stdout:
        if int(line) >= scenarios:
            return
    raise AssertionError("the seed ended early")


def wait_until_gone(world: World) -> None:
    """The server notices a killed client at its next message; its transaction ends then."""
    deadline = time.monotonic() + PATIENCE_S
    world.engine.dispose()  # what is left is the child's
    with world.autocommit.connect() as conn:
        while conn.scalar(
            sa.text(
                "SELECT count(*) FROM pg_stat_activity"
                " WHERE datname = current_database() AND pid <> pg_backend_pid() AND backend_type = 'client backend'"
            )
        ):
            assert time.monotonic() < deadline
            time.sleep(0.02)


@pytest.mark.one_server  # what is not committed is gone on each
def test_killed_in_the_middle_of_a_scenario(any_world: World, make_world: Callable[..., World]) -> None:
    with any_world.engine.begin() as blocker:
        # the second scenario waits for this lock half-made: its user is inserted, its purchase is not
        lock(blocker, any_world.schema.credit_transactions)
        with seeding(any_world) as child:
            wait_until_done(child, 1)
            wait_until_stuck(any_world)
    wait_until_gone(any_world)
    made = outcomes(seed_world(any_world))
    assert (made["new"], made["mid_onboarding"]) == ("unchanged", "created")
    assert every_fact(any_world) == uninterrupted(any_world, make_world)


@pytest.mark.one_server  # what is not committed is gone on each
@pytest.mark.parametrize("scenarios", [1, 3, 7, 11])
def test_killed_at_a_random_moment(world: World, make_world: Callable[..., World], scenarios: int) -> None:
    with seeding(world) as child:
        wait_until_done(child, scenarios)
        time.sleep(random.uniform(0, 0.05))
    wait_until_gone(world)
    assert outcomes(seed_world(world))["new"] == "unchanged"
    assert every_fact(world) == uninterrupted(world, make_world)


def test_two_at_once_make_one(world: World, make_world: Callable[..., World]) -> None:
    reports: list[SeedReport] = []
    threads = [threading.Thread(target=lambda: reports.append(seed_world(world))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_S)
    made = [outcomes(report) for report in reports]
    assert len(made) == 3
    for name in SCENARIOS:
        assert sorted(one[name] for one in made) == ["created", "unchanged", "unchanged"]
    assert every_fact(world) == uninterrupted(world, make_world)


def uninterrupted(world: World, make_world: Callable[..., World]) -> list[list[tuple[object, ...]]]:
    shape = next(name for name, known in SHAPES.items() if known.host == world.config.host)
    if shape not in _uninterrupted:
        other = make_world(shape)
        seed_world(other)
        _uninterrupted[shape] = every_fact(other)
    return _uninterrupted[shape]


_uninterrupted: dict[str, list[list[tuple[object, ...]]]] = {}
"""By shape: it is the same each time."""


def lock(conn: sa.Connection, table: sa.Table) -> None:
    name = sql.SQL("LOCK TABLE {} IN EXCLUSIVE MODE").format(sql.Identifier(str(table.schema), table.name))
    conn.exec_driver_sql(name.as_string())


def wait_until_stuck(world: World) -> None:
    deadline = time.monotonic() + PATIENCE_S
    waiting = sa.text(
        "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
    )
    with world.autocommit.connect() as conn:
        while not conn.scalar(waiting):
            assert time.monotonic() < deadline
            time.sleep(0.02)


# --- which ones, and in whose transaction ---


def test_only_the_scenarios_that_are_named(world: World) -> None:
    assert outcomes(seed_world(world, only=["in_debt", "new"])) == {"new": "created", "in_debt": "created"}
    assert outcomes(seed_world(world, only=["new", "names"])) == {"new": "unchanged", "names": "created"}
    assert outcomes(reset_world(world, only=["in_debt", "funded"])) == {"funded": "absent", "in_debt": "removed"}
    assert outcomes(seed_world(world))["in_debt"] == "created"


def test_an_unknown_scenario_is_named_with_its_neighbour(world: World) -> None:
    before = every_row(world)
    for call in (seed_world, reset_world):
        with pytest.raises(InvalidArgument, match="no scenario 'indebt'; did you mean in_debt"):
            call(world, only=["new", "indebt"])
        with pytest.raises(InvalidArgument, match="tallystick seed --list"):
            call(world, only=["%%%"])
    assert every_row(world) == before


def test_progress_counts_scenarios(world: World) -> None:
    seen: list[Progress] = []
    seed_world(world, only=["new", "funded", "names"], progress=seen.append)
    assert seen == [Progress("scenarios", done, 3) for done in (1, 2, 3)]


def test_on_a_connection_the_transaction_is_the_callers(world: World) -> None:
    before = every_row(world)
    with world.engine.connect() as conn, conn.begin() as transaction:
        assert seed(conn, world.config, environ=NOWHERE).changed
        transaction.rollback()
    assert every_row(world) == before


def test_an_engine_in_autocommit_gets_whole_scenarios_too(world: World) -> None:
    with world.engine.begin() as conn:
        conn.exec_driver_sql("ALTER TABLE workshops ADD CONSTRAINT taste CHECK (title <> 'Second Thoughts')")
    with pytest.raises(SeedImpossible, match="taste"):
        seed(world.autocommit, world.config, environ=NOWHERE)
    assert outcomes(reset_world(world)) == {name: "removed" if name == "new" else "absent" for name in SCENARIOS}


def test_a_database_that_is_not_migrated(fresh_database: Callable[..., str]) -> None:
    url = fresh_database()
    engine = sa.create_engine(url, poolclass=sa.NullPool)
    for call in (seed, reset):
        with pytest.raises(NotMigrated, match="tallystick migrate apply"):
            call(engine, Config(database_url=url), environ=NOWHERE)


# --- reset ---


def test_reset_removes_what_the_seed_made_and_nothing_else(any_world: World) -> None:
    user = any_world.user(credits=2)
    if any_world.schema.workshops is not None:
        with any_world.engine.begin() as conn:
            any_world.ledger.consume(conn, user, workshop=any_world.workshop(user), key="mine")
    before = every_row(any_world)
    seed_world(any_world)
    assert every_row(any_world) != before
    report = reset_world(any_world)
    assert every_row(any_world) == before
    assert report.changed
    assert not reset_world(any_world).changed
    seed_world(any_world)
    assert not seed_world(any_world).changed


def test_the_ledger_refuses_delete_again_after_a_reset(world: World) -> None:
    user = world.user(credits=2)
    seed_world(world, only=["funded"])
    reset_world(world)
    row = world.schema.credit_transactions
    with pytest.raises(sa.exc.DBAPIError, match="append-only"), world.engine.begin() as conn:
        conn.execute(sa.delete(row).where(row.c.user_id == user))


def test_reset_takes_the_whole_ledger_of_a_seeded_user(world: World) -> None:
    before = every_row(world)
    seed_world(world, only=["new", "funded"])
    with world.engine.begin() as conn:
        world.ledger.consume(conn, SCENARIOS["funded"].user_key(world.schema), key="by hand")
    reset_world(world)
    assert every_row(world) == before


@pytest.mark.parametrize("shape", ["uuid", "clerk", "quoted"])
def test_reset_leaves_all_when_a_seeded_user_owns_what_it_did_not_make(
    make_world: Callable[..., World], shape: str
) -> None:
    world = make_world(shape)
    seed_world(world, only=["new", "funded"])
    mine = world.workshop(SCENARIOS["new"].user_key(world.schema))
    before = every_row(world)
    with pytest.raises(SeedImpossible, match=f"workshop {mine} in .* nothing was removed"):
        reset_world(world)
    assert every_row(world) == before
    assert outcomes(reset_world(world, only=["funded"])) == {"funded": "removed"}


def test_reset_leaves_all_when_a_seeded_workshop_went_to_someone_else(world: World) -> None:
    seed_world(world, only=["funded"])
    (workshop,) = SCENARIOS["funded"].workshop_keys(world.schema)
    workshops = world.schema.workshops
    assert workshops is not None
    with world.engine.begin() as conn:
        conn.execute(sa.update(workshops).where(workshops.c.key == workshop).values(owner=world.user()))
    before = every_row(world)
    with pytest.raises(SeedImpossible, match=str(workshop)):
        reset_world(world)
    assert every_row(world) == before


@pytest.mark.parametrize("deferred", ["", "DEFERRABLE INITIALLY DEFERRED"])
def test_reset_leaves_all_when_other_tables_hold_on(world: World, deferred: str) -> None:
    seed_world(world, only=["names"])
    with world.engine.begin() as conn:
        conn.exec_driver_sql(f"CREATE TABLE comments (author uuid NOT NULL REFERENCES users (id) {deferred})")
        author = SCENARIOS["names"].user_key(world.schema)
        conn.execute(sa.text("INSERT INTO comments VALUES (:author)"), {"author": author})
    before = every_row(world)
    with pytest.raises(SeedImpossible, match=r"Delete what depends on them in public\.comments first") as refused:
        reset_world(world)
    assert refused.value.table == "public.comments"
    assert every_row(world) == before


def test_reset_wants_the_owner_of_the_ledger(world: World) -> None:
    seed_world(world, only=["names"])
    before = every_row(world)
    with world.engine.connect() as conn, conn.begin() as transaction:
        conn.exec_driver_sql("CREATE ROLE seed_test_app")  # gone with the rollback
        for table in ("users", "workshops", "credit_transactions", "tallystick.alembic_version", "tallystick.mapping"):
            conn.exec_driver_sql(f"GRANT ALL ON {table} TO seed_test_app")
        conn.exec_driver_sql("GRANT USAGE ON SCHEMA tallystick TO seed_test_app")
        conn.exec_driver_sql("SET LOCAL ROLE seed_test_app")
        with pytest.raises(PermissionDenied, match=r"removed by the owner of public\.credit_transactions, postgres"):
            reset(conn, world.config, environ=NOWHERE)
        transaction.rollback()
    assert every_row(world) == before


def test_reset_does_not_wait_forever(world: World) -> None:
    seed_world(world, only=["new"])
    before = every_row(world)
    with world.engine.begin() as busy:
        lock(busy, world.schema.credit_transactions)
        with pytest.raises(Conflict):
            reset_world(world)
    assert every_row(world) == before


# --- development only ---


def test_refuses_in_a_production_environment(world: World) -> None:
    for name, value in itertools.product(ENVIRONMENT_VARIABLES, ("production", "Prod", "LIVE")):
        for call, remedy in ((seed, "tallystick seed"), (reset, "tallystick seed --reset")):
            with pytest.raises(SeedRefused, match=f"type: {remedy} --force-production") as refused:
                call(world.engine, world.config, environ={name: value})
            assert refused.value.reason == f"{name} is {value!r}"


def test_takes_other_environments_for_what_they_say(world: World) -> None:
    for environ in ({"NODE_ENV": "development"}, {"VERCEL_ENV": "preview"}, {"APP_ENV": ""}):
        assert seed(world.engine, world.config, environ=environ, only=["new"]).scenarios[0].user


def test_refuses_where_live_purchases_are(world: World) -> None:
    user = world.user()
    with world.engine.begin() as conn:
        bought = world.buy(conn, user, 1)
        world.ledger.attach_session(conn, user, bought.id, stripe_session_id="cs_live_a1b2")
    before = every_row(world)
    with pytest.raises(SeedRefused, match="live Stripe sessions"):
        seed_world(world)
    assert every_row(world) == before


def test_refuses_where_many_users_are(world: World) -> None:
    users = world.schema.users
    seed_world(world, only=["new", "funded"])

    def add(count: int) -> None:
        with world.engine.begin() as conn:
            keys = [world.key("uuid") for _ in range(count)]
            conn.execute(sa.insert(users), [{"key": key, "email": f"{key}@example.com"} for key in keys])

    add(MANY_USERS)
    assert not seed_world(world, only=["new"]).changed
    add(1)
    with pytest.raises(SeedRefused, match=f"more than {MANY_USERS} users"):
        seed_world(world)
    assert reset_world(world, force_production=True).changed


def test_every_sign_is_named_at_once_and_force_overrules_them(world: World) -> None:
    environ = {"NODE_ENV": "production", "VERCEL_ENV": "production"}
    with pytest.raises(SeedRefused, match="NODE_ENV is 'production'; VERCEL_ENV is 'production'"):
        seed(world.engine, world.config, environ=environ)
    assert seed(world.engine, world.config, environ=environ, only=["new"], force_production=True).changed
    assert reset(world.engine, world.config, environ=environ, only=["new"], force_production=True).changed


@pytest.mark.parametrize(
    ("server", "local"),
    [
        ("", True),
        ("/var/run/postgresql", True),
        ("@abstract", True),
        ("localhost", True),
        ("db", True),
        ("host.docker.internal", True),
        ("127.0.0.1", True),
        ("127.9.9.9", True),
        ("::1", True),
        ("10.0.0.5", False),
        ("192.168.1.5", False),
        ("2001:db8::1", False),
        ("ep-cool-1.eu-central-1.aws.neon.tech", False),
        ("mydb.abc.us-east-1.rds.amazonaws.com", False),
    ],
)
def test_which_servers_are_near(server: str, local: bool) -> None:
    assert _is_local(server) is local


# --- whatever the host's tables want ---

DEMANDING = """
CREATE TYPE plan AS ENUM ('basic', 'enterprise');
CREATE DOMAIN positive AS integer NOT NULL CHECK (VALUE > 0);
CREATE DOMAIN locale AS text NOT NULL DEFAULT 'en';
CREATE TABLE orgs (id integer, region text, PRIMARY KEY (id, region));
CREATE TABLE users (
  internal_id bigint PRIMARY KEY,
  id varchar(40) NOT NULL UNIQUE,
  org integer NOT NULL,
  region text,
  email_address varchar(20) NOT NULL UNIQUE,
  first_name varchar(8) NOT NULL,
  handle char(6) NOT NULL UNIQUE,
  password text NOT NULL,
  plan plan NOT NULL,
  seats positive,
  language locale,
  tags text[] NOT NULL,
  settings jsonb NOT NULL,
  admin boolean NOT NULL,
  joined timestamp NOT NULL,
  seen timestamptz NOT NULL,
  birthday date NOT NULL,
  wakes_at time NOT NULL,
  patience interval NOT NULL,
  token uuid NOT NULL UNIQUE,
  rate numeric(3, 3) NOT NULL,
  price numeric(8, 2) NOT NULL,
  score real NOT NULL,
  age smallint NOT NULL,
  avatar bytea NOT NULL,
  address inet NOT NULL,
  network cidr NOT NULL,
  "100%, (really)" text NOT NULL,
  counter integer NOT NULL GENERATED ALWAYS AS IDENTITY,
  doubled integer NOT NULL GENERATED ALWAYS AS (age * 2) STORED,
  optional text,
  updated_at timestamp(3) NOT NULL,
  FOREIGN KEY (org, region) REFERENCES orgs
);
CREATE TABLE workshops (
  id integer PRIMARY KEY,
  user_id varchar(40) NOT NULL REFERENCES users (id),
  created_by bigint NOT NULL REFERENCES users DEFERRABLE INITIALLY DEFERRED,
  title varchar(30) NOT NULL,
  slug text NOT NULL UNIQUE,
  created_at timestamp NOT NULL
);
"""
DEMANDING_HOST = HostMapping(users=UsersTable(key_type="text"), workshops=WorkshopsTable(key_type="integer"))


@pytest.fixture
def host_app(fresh_database: Callable[..., str], pooled: Callable[[World], World]) -> Callable[..., World]:
    """``host_app(ddl, host) -> World``: a host app of other tables, migrated."""

    def make(ddl: str, host: HostMapping) -> World:
        url = fresh_database()
        with psycopg.connect(url.replace("+psycopg", "", 1)) as conn:
            conn.execute(ddl)
        migrate.apply(url, Config(database_url=url, host=host))
        return pooled(World(url, host))

    return make


IDENTITY = """
CREATE TABLE users (id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY);
CREATE TABLE workshops (
  id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, user_id bigint NOT NULL REFERENCES users, title text,
  number integer GENERATED ALWAYS AS IDENTITY, created_at timestamptz);
"""


def test_names_with_commas_and_newlines(host_app: Callable[..., World]) -> None:
    users = UsersTable(table="the\nusers, all", key="i,d\n", email="e\n,mail")
    workshops = WorkshopsTable(
        table="work\nshops, all", key="i,d\n", owner="of,\nuser", title="ti\ntle,", created_at="at,\n"
    )
    world = host_app(
        """
        CREATE TABLE "the\nplans, all" ("na,\nme" text PRIMARY KEY);
        INSERT INTO "the\nplans, all" VALUES ('free');
        CREATE TABLE "the\nusers, all" ("i,d\n" uuid PRIMARY KEY, "e\n,mail" text UNIQUE,
          "pl\na,n" text NOT NULL REFERENCES "the\nplans, all");
        CREATE TABLE "work\nshops, all" ("i,d\n" uuid PRIMARY KEY, "ti\ntle," text, "at,\n" timestamptz,
          "of,\nuser" uuid NOT NULL REFERENCES "the\nusers, all", UNIQUE ("of,\nuser", "i,d\n"));
        """,
        HostMapping(users=users, workshops=workshops),
    )
    before = every_row(world)
    assert set(outcomes(seed_world(world)).values()) == {"created"}
    reset_world(world)
    assert every_row(world) == before


def test_keys_that_the_host_generates_always(host_app: Callable[..., World]) -> None:
    big = HostMapping(users=UsersTable(key_type="bigint"), workshops=WorkshopsTable(key_type="bigint"))
    world = host_app(IDENTITY, big)
    report = seed_world(world)
    assert {one.outcome for one in report.scenarios} == {ScenarioOutcome.CREATED}
    assert {one.scenario: one.balance for one in report.scenarios} == BALANCES
    with world.engine.begin() as conn:
        assert conn.exec_driver_sql("INSERT INTO users DEFAULT VALUES RETURNING id").scalar() == 1
        assert conn.exec_driver_sql("SELECT min(number) FROM workshops").scalar() > 0
    assert {one.outcome for one in reset_world(world).scenarios} == {ScenarioOutcome.REMOVED}


OTHER_KEYS = {
    "char(26)": ("char(26)", UsersTable(key_type="char"), "char"),
    "smallint": ("smallint", UsersTable(key_type="smallint"), "smallint"),
    "an e-mail address": ("text", UsersTable(key="email", key_type="text", email="email"), "text"),
}


@pytest.mark.parametrize("name", OTHER_KEYS)
def test_keys_of_other_types(host_app: Callable[..., World], name: str) -> None:
    """A char(26) comes back with spaces, a smallint is small, and an address may be the key itself."""
    kind, users, key_type = OTHER_KEYS[name]
    world = host_app(
        f"""
        CREATE TABLE users ({users.key} {kind} PRIMARY KEY);
        CREATE TABLE workshops (id {kind} PRIMARY KEY, user_id {kind} NOT NULL REFERENCES users, title text,
          created_at timestamptz);
        """,
        HostMapping(users=users, workshops=WorkshopsTable(key_type=key_type)),
    )
    assert {one.scenario: one.balance for one in seed_world(world).scenarios} == BALANCES
    assert not seed_world(world).changed
    assert outcomes(reset_world(world, only=["funded"])) == {"funded": "removed"}
    assert outcomes(seed_world(world))["funded"] == "created"
    assert {one.outcome for one in reset_world(world).scenarios} == {ScenarioOutcome.REMOVED}
    assert every_row(world) == [[], [], []]


@pytest.mark.parametrize("kind", ["serial", "positive"])
def test_a_rule_of_the_key_that_no_seeded_key_keeps(host_app: Callable[..., World], kind: str) -> None:
    check = "CHECK (id > 0)" if kind == "serial" else ""
    world = host_app(
        f"""
        CREATE DOMAIN small AS integer CHECK (VALUE > 0); CREATE DOMAIN positive AS small;
        CREATE TABLE users (id {kind} PRIMARY KEY {check});
        """,
        HostMapping(users=UsersTable(key_type="integer"), workshops=None),
    )
    with pytest.raises(SeedImpossible, match=r"The rule is for a key.*Leave the rule out") as refused:
        seed_world(world)
    assert refused.value.table == ("public.users" if check else "public.positive")
    assert "DEFAULT" not in str(refused.value)


def test_the_paywall_came_in_the_first_days_of_time(make_world: Callable[..., World]) -> None:
    first = dt.datetime(1, 1, 5, tzinfo=dt.UTC)
    world = make_world(grandfathered_before=first)
    assert outcomes(seed_world(world, only=["grandfathered"])) == {"grandfathered": "created"}
    assert access(world, "grandfathered") == [AccessReason.GRANDFATHERED] * 3 + [AccessReason.LOCKED]


PARENTS = """
CREATE SCHEMA auth;
CREATE TABLE auth.users (id uuid PRIMARY KEY, email text UNIQUE NOT NULL);
CREATE TABLE wallets (id integer PRIMARY KEY, currency text NOT NULL);
CREATE TABLE profiles (
  id uuid PRIMARY KEY REFERENCES auth.users ON DELETE CASCADE, full_name text,
  wallet integer {wallet} UNIQUE REFERENCES wallets, code text UNIQUE DEFAULT 'none');
{trigger}
"""
MAKES_PROFILES = """
CREATE FUNCTION profile() RETURNS trigger LANGUAGE plpgsql AS
  $$ BEGIN INSERT INTO public.profiles (id, code) VALUES (NEW.id, NEW.id::text); RETURN NEW; END $$;
CREATE TRIGGER profile AFTER INSERT ON auth.users FOR EACH ROW EXECUTE FUNCTION profile();
"""


@pytest.mark.parametrize(("wallet", "trigger"), [("NOT NULL", ""), ("", MAKES_PROFILES)])
def test_rows_that_a_user_has_alone_are_made_and_removed_with_it(
    host_app: Callable[..., World], wallet: str, trigger: str
) -> None:
    """A key that refers to another table, as Supabase's; a column that refers to a row of its own; one default."""
    world = host_app(
        PARENTS.format(wallet=wallet, trigger=trigger), HostMapping(users=UsersTable(table="profiles"), workshops=None)
    )
    only = ("funded", "granted", "merged_user")
    assert {one.balance for one in seed_world(world, only=only).scenarios} == {BALANCES[name] for name in only}
    assert not seed_world(world, only=only).changed
    with world.engine.connect() as conn:
        assert conn.exec_driver_sql("SELECT count(*), count(DISTINCT code) FROM profiles").one() == (4, 4)
        assert conn.exec_driver_sql("SELECT count(*) FROM auth.users").scalar() == 4
        assert conn.exec_driver_sql("SELECT count(*) FROM wallets").scalar() == (4 if wallet else 0)
    assert reset_world(world, only=only).changed
    with world.engine.connect() as conn:
        for table in ("profiles", "auth.users", "wallets"):
            assert conn.exec_driver_sql(f"SELECT count(*) FROM {table}").scalar() == 0, table


def test_columns_that_must_be_given_are_given(host_app: Callable[..., World]) -> None:
    world = host_app(DEMANDING + "INSERT INTO orgs VALUES (7, 'eu'), (9, 'us')", DEMANDING_HOST)
    report = seed_world(world)
    assert {one.scenario: one.balance for one in report.scenarios} == BALANCES
    before = every_row(world)
    assert not seed_world(world).changed
    assert every_row(world) == before
    with world.engine.connect() as conn:
        found = conn.execute(sa.text("SELECT * FROM users WHERE id = 'seed_refunded_in_part'")).mappings().one()
        strangers = conn.scalar(
            sa.text(
                "SELECT count(*) FROM workshops w JOIN users u ON u.internal_id = w.created_by WHERE u.id <> w.user_id"
            )
        )
    assert (found["org"], found["region"], found["plan"], found["seats"]) == (7, "eu", "basic", 1)
    assert (found["language"], found["tags"], found["settings"], found["admin"]) == ("en", [], {}, False)
    assert (found["first_name"], found["optional"], len(found["email_address"])) == ("Refunded", None, 20)
    assert strangers == 0
    assert reset_world(world).changed
    assert every_row(world) == [[], [], []]


@pytest.mark.parametrize(
    ("column", "message"),
    [
        ("place point NOT NULL", r"public\.users\.place is NOT NULL without a default.*SET DEFAULT"),
        ("org integer NOT NULL REFERENCES orgs", r"public\.users\.org must refer to a row of public\.orgs"),
        ("age integer NOT NULL CHECK (age >= 18)", r"public\.users does not take the row .*users_age_check"),
        ("pin smallint NOT NULL UNIQUE", "out of range"),
    ],
)
def test_a_column_that_cannot_be_given_is_named_before_anything_is_written(
    host_app: Callable[..., World], column: str, message: str
) -> None:
    world = host_app(
        f"""
        CREATE TABLE orgs (id integer PRIMARY KEY);
        CREATE TABLE users (id uuid PRIMARY KEY, {column});
        CREATE TABLE workshops (id uuid PRIMARY KEY, user_id uuid NOT NULL REFERENCES users, title text,
          created_at timestamptz NOT NULL DEFAULT now());
        """,
        HostMapping(),
    )
    with pytest.raises(SeedImpossible, match=message):
        seed_world(world)
    assert every_row(world) == [[], [], []]


@pytest.mark.parametrize("when", ["", "DEFERRABLE INITIALLY DEFERRED"])
def test_a_workshop_that_the_host_refuses_is_known_before_the_first_user_is_written(
    host_app: Callable[..., World], when: str
) -> None:
    world = host_app(
        f"""
        CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE 'no workshops on Sundays'; END $$;
        CREATE TABLE users (id uuid PRIMARY KEY);
        CREATE TABLE workshops (id uuid PRIMARY KEY, user_id uuid NOT NULL REFERENCES users, title text,
          created_at timestamptz NOT NULL DEFAULT now());
        CREATE {"CONSTRAINT" if when else ""} TRIGGER refuse AFTER INSERT ON workshops {when}
          FOR EACH ROW EXECUTE FUNCTION refuse();
        """,
        HostMapping(),
    )
    with pytest.raises(SeedImpossible, match="no workshops on Sundays"):
        seed_world(world)
    assert every_row(world) == [[], [], []]


def test_an_address_that_is_taken_is_named(world: World) -> None:
    with world.engine.begin() as conn:
        conn.execute(sa.insert(world.schema.users).values(key=world.key("uuid"), email="seed_funded@example.com"))
    with pytest.raises(SeedImpossible, match="users_email_key") as refused:
        seed_world(world)
    assert (refused.value.table, refused.value.constraint) == ("public.users", "users_email_key")
    assert outcomes(reset_world(world))["funded"] == "absent"


# --- told elsewhere ---


def test_the_audit_is_clean_and_names_who_waits(any_world: World) -> None:
    seed_world(any_world)
    with any_world.autocommit.connect() as conn:
        report = audit(conn, any_world.config)
    assert report.clean
    assert report.rows > 100
    waiting = SCENARIOS["pending_for_days"].user_key(any_world.schema)
    assert [(finding.user, finding.fault) for finding in report.findings] == [(waiting, False)]


@pytest.mark.one_server  # it is about npm
@pytest.mark.skipif(shutil.which("npm") is None, reason="`npm run db:seed` needs npm (install Node.js)")
def test_npm_run_db_seed(world: World, tmp_path: Path) -> None:
    url = world.url.replace("+psycopg", "", 1)
    environ = {
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        "HOME": str(tmp_path),
        "DATABASE_URL": url,
    }
    command = ["npm", "run", "--silent", "db:seed", "--", "--only", "funded"]
    done = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert "funded" in done.stdout
    assert outcomes(seed_world(world, only=["funded"])) == {"funded": "unchanged"}


@pytest.mark.one_server  # it is about npm
@pytest.mark.skipif(shutil.which("npm") is None, reason="`npm run db:seed` needs npm (install Node.js)")
def test_npm_says_what_to_install(tmp_path: Path) -> None:
    shutil.copy(ROOT / "package.json", tmp_path)
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in ("npm", "node", "sh", "env"):
        found = shutil.which(name)
        assert found
        (tools / name).symlink_to(Path(found).resolve())
    environ = {"PATH": str(tools), "HOME": str(tmp_path)}
    command = ["npm", "run", "--silent", "db:seed"]
    done = subprocess.run(command, cwd=tmp_path, env=environ, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 127
    assert "pip install tallystick" in done.stderr


def test_the_documentation_names_every_scenario_and_every_sign() -> None:
    page = (ROOT / "docs" / "seed.md").read_text(encoding="utf-8")
    for scenario in SCENARIOS.values():
        assert f"| `{scenario.name}` | {scenario.description} |" in page
    for name in ENVIRONMENT_VARIABLES:
        assert f"`{name}`" in page
    assert f"{MANY_USERS:,}" in page
