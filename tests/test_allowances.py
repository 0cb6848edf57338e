"""Credits that a plan gives every month or week: once, also when asked often and at once, and when the plan changes."""

from __future__ import annotations

import dataclasses
import datetime as dt
import functools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import psycopg
import pytest
import sqlalchemy as sa

from tallystick import Config, Consume, Progress
from tallystick.allowances import AllowanceRun, Allowances, Paid, Period
from tallystick.audit import audit
from tallystick.config import Allowance
from tallystick.dev.postgres import Server
from tallystick.errors import ConfigError, DatabaseUnavailable, Key
from tallystick.testing import Databases, TestDatabase
from worlds import SHAPES

INT32_MAX = 2**31 - 1
BY_INDEX = "-c enable_seqscan=off"  # a table of one user is read as a whole

PLANS = (
    Allowance(plan_tier="free", credits=5),
    Allowance(plan_tier="pro", credits=100, rollover=20),
    Allowance(plan_tier="weekly", credits=7, every="week", rollover=1),
)


@pytest.fixture
def db(server: Server) -> Iterator[TestDatabase]:
    """A database with a clock, which stands at the beginning of the next month."""
    config = Config(host=SHAPES["uuid"].host, allowances=PLANS)
    with (
        Databases.on(server.url(), config, schema=SHAPES["uuid"].ddl) as databases,
        databases.open() as made,
    ):
        now = made.clock.now().astimezone(dt.UTC)
        made.clock.advance(seconds=(Period.of(now, "month").end - now).total_seconds() + 60)
        yield made
        with engine_of(made).connect() as conn:
            assert audit(conn, config).findings == ()


@pytest.fixture
def allowances(db: TestDatabase) -> Allowances:
    return Allowances(Config(host=SHAPES["uuid"].host, allowances=PLANS))


@functools.cache
def engine_of(db: TestDatabase) -> sa.Engine:
    return sa.create_engine(db.url, poolclass=sa.NullPool)


def plan(db: TestDatabase, allowances: Allowances, tier: str, user: Key | None = None) -> Key:
    user = user or db.user()
    with engine_of(db).begin() as conn:
        allowances.accounts.set_plan_tier(conn, user, tier)
    return user


def give(db: TestDatabase, allowances: Allowances, user: Key) -> int | None:
    with engine_of(db).begin() as conn:
        row = allowances.give(conn, user)
    return None if row is None else row.amount


@pytest.mark.parametrize(
    ("moment", "every", "start", "end"),
    [
        ("2026-11-28T17:00:00+00:00", "month", "2026-11-01", "2026-12-01"),
        ("2026-12-31T23:59:59+00:00", "month", "2026-12-01", "2027-01-01"),
        ("2026-01-01T00:30:00+01:00", "month", "2025-12-01", "2026-01-01"),  # in UTC it is still December
        ("2028-02-29T12:00:00+00:00", "month", "2028-02-01", "2028-03-01"),
        ("2026-11-28T17:00:00+00:00", "week", "2026-11-23", "2026-11-30"),
        ("2026-11-30T00:00:00+00:00", "week", "2026-11-30", "2026-12-07"),
        ("2027-01-01T00:00:00+00:00", "week", "2026-12-28", "2027-01-04"),
    ],
)
def test_a_period(moment: str, every: str, start: str, end: str) -> None:
    period = Period.of(dt.datetime.fromisoformat(moment), every)  # type: ignore[arg-type]
    assert [f"{each:%Y-%m-%dT%H:%M%z}" for each in period] == [f"{each}T00:00+0000" for each in (start, end)]


def test_it_is_given_once_a_period_and_expires_with_it(db: TestDatabase, allowances: Allowances) -> None:
    user = db.user()
    assert [give(db, allowances, user) for _ in range(2)] == [5, None]
    assert db.balance(user) == 5
    db.clock.advance(days=32)
    assert db.balance(user) == 0
    assert give(db, allowances, user) == 5
    with engine_of(db).connect() as conn:
        newest, expired, first = allowances.ledger.history(conn, user)
    assert (str(expired.type), expired.amount, expired.refund_of) == ("expiry", -5, first.id)
    assert newest.description.startswith("Allowance of the plan free until ")


def test_a_plan_that_gets_another_name_gives_nothing_twice(db: TestDatabase, allowances: Allowances) -> None:
    """The settings no longer have the old plan; its allowance of the period counts, and its rest is carried over."""
    user, other = plan(db, allowances, "pro"), plan(db, allowances, "pro")
    assert [give(db, allowances, each) for each in (user, other)] == [100, 100]
    plans = (
        Allowance(plan_tier="professional", credits=100, rollover=20),
        Allowance(plan_tier="team", credits=130, rollover=20),
    )
    renamed = Allowances(Config(host=SHAPES["uuid"].host, allowances=plans))
    plan(db, renamed, "professional", user), plan(db, renamed, "team", other)
    assert [give(db, renamed, each) for each in (user, other) for _ in range(2)] == [None, None, 30, None]
    db.clock.advance(days=32)
    plan(db, renamed, "team", user)
    assert renamed.run(engine_of(db)) == AllowanceRun(2, ())
    assert [db.balance(each) for each in (user, other)] == [150, 150]


def test_a_plan_that_gets_another_name_makes_no_long_history_read(db: TestDatabase, allowances: Allowances) -> None:
    user = plan(db, allowances, "pro")
    with engine_of(db).begin() as conn:
        allowances.ledger.grant(conn, user, credits=3000, key="g", description="Many")
        allowances.ledger.consume_many(conn, [Consume(user, key=str(n)) for n in range(3000)])
    db.clock.advance(days=32)
    assert give(db, allowances, user) == 100
    renamed = Allowances(
        Config(host=SHAPES["uuid"].host, allowances=(Allowance(plan_tier="professional", credits=100),))
    )
    plan(db, renamed, "professional", user)
    with engine_of(db).execution_options(isolation_level="AUTOCOMMIT").connect() as conn:
        conn.execute(sa.text("ANALYZE credit_transactions"))
    # as where texts are not in the order of their bytes: no index finds the keys that begin alike
    for_any_value = {"prepare_threshold": 0, "options": f"-c plan_cache_mode=force_generic_plan {BY_INDEX}"}
    with sa.create_engine(db.url, poolclass=sa.NullPool, connect_args=for_any_value).begin() as conn:
        assert renamed.give(conn, user) is None
        read = "SELECT seq_tup_read + idx_tup_fetch FROM pg_stat_xact_user_tables WHERE relname = 'credit_transactions'"
        assert conn.scalar(sa.text(read)) < 100


def test_what_is_left_is_carried_over_up_to_the_cap(db: TestDatabase, allowances: Allowances) -> None:
    rich, poor = plan(db, allowances, "pro"), plan(db, allowances, "pro")
    assert [give(db, allowances, user) for user in (rich, poor)] == [100, 100]
    with engine_of(db).begin() as conn:
        allowances.ledger.consume(conn, poor, credits=93, key="spent")
    db.clock.advance(days=32)
    assert [give(db, allowances, user) for user in (rich, poor)] == [120, 107]
    # after a month in which nobody came there is nothing to carry over
    db.clock.advance(days=65)
    assert [give(db, allowances, user) for user in (rich, poor)] == [100, 100]


def test_what_is_left_is_carried_over_where_the_period_ends_within_the_call(
    db: TestDatabase, allowances: Allowances
) -> None:
    user = plan(db, allowances, "pro")
    assert give(db, allowances, user) == 100
    now = db.clock.now()
    db.clock.advance(seconds=(Period.of(now, "month").end - now).total_seconds() - 60)
    meanwhile = engine_of(db).execution_options()

    def end_the_period(_conn: object, _cursor: object, statement: str, *_: object) -> None:
        if statement.startswith("SELECT clock_timestamp()"):
            db.clock.advance(seconds=120)

    sa.event.listen(meanwhile, "before_cursor_execute", end_the_period)
    with meanwhile.begin() as conn:
        row = allowances.give(conn, user)
    assert row is not None
    assert row.amount == 120


def test_a_change_of_plan_gives_the_difference_and_takes_nothing(db: TestDatabase, allowances: Allowances) -> None:
    user = db.user()
    assert give(db, allowances, user) == 5
    plan(db, allowances, "pro", user)
    assert [give(db, allowances, user) for _ in range(2)] == [95, None]
    plan(db, allowances, "free", user)
    assert give(db, allowances, user) is None
    plan(db, allowances, "pro", user)
    assert give(db, allowances, user) is None
    assert db.balance(user) == 100
    db.clock.advance(days=32)
    assert give(db, allowances, user) == 120  # both of the last month's grants are carried over, up to the cap


def test_what_went_to_another_account_and_came_back_is_carried_over(db: TestDatabase, allowances: Allowances) -> None:
    user, other = plan(db, allowances, "pro"), db.user()
    assert give(db, allowances, user) == 100
    with engine_of(db).begin() as conn:
        for first, then in ((user, other), (other, user)):
            allowances.ledger.merge(conn, first, into=then, key="m")
            allowances.accounts.restore_user(conn, first)
        allowances.ledger.consume(conn, user, credits=93, key="c")
    now = db.clock.now().astimezone(dt.UTC)
    db.clock.advance(seconds=(Period.of(now, "month").end - now).total_seconds() + 60)
    assert [give(db, allowances, each) for each in (user, other)] == [107, 5]


def test_a_paid_period_carries_over_what_the_item_had_left(db: TestDatabase) -> None:
    price = "price_1"
    paid_for = Allowances(
        Config(
            host=SHAPES["uuid"].host,
            allowances=(Allowance(plan_tier="pro", credits=100, rollover=20, stripe_price_id=price),),
        )
    )
    user, spent = db.user(), {"first": 93, "second": 0, "third": 0}
    got = []
    for month, credits in spent.items():
        now = db.clock.now().replace(microsecond=0)
        edges = (now, now + dt.timedelta(days=30))
        with engine_of(db).begin() as conn:
            one = paid_for.give_paid(conn, user, Paid(price, 1, "si_1", Period(*edges), month))
            other = paid_for.give_paid(conn, user, Paid(price, 1, "si_1", Period(*edges), month + " again"))
            assert one is not None
            assert other is None
            got.append(one.amount)
            if credits:
                paid_for.ledger.consume(conn, user, credits=credits, key=f"spent in {month}")
            assert paid_for.give(conn, user) is None  # its plan gives by invoice alone
        db.clock.advance(seconds=(edges[1] - db.clock.now()).total_seconds())
    assert got == [100, 107, 120]


def test_who_gets_none(db: TestDatabase, allowances: Allowances) -> None:
    other, gone = plan(db, allowances, "enterprise"), db.user()
    with engine_of(db).begin() as conn:
        allowances.accounts.delete_user(conn, gone)
    assert [give(db, allowances, user) for user in (other, gone)] == [None, None]


def test_asked_by_many_at_once(db: TestDatabase, allowances: Allowances) -> None:
    user = plan(db, allowances, "weekly")
    with ThreadPoolExecutor(8) as pool:
        got = list(pool.map(lambda _: give(db, allowances, user), range(16)))
    assert sorted(got, key=str) == [7, *[None] * 15]


def test_a_run_goes_on_where_it_stopped(
    db: TestDatabase, allowances: Allowances, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tallystick.allowances.PAGE", 2)
    users = [db.user() for _ in range(5)]
    plan(db, allowances, "enterprise", users[0])

    def stop(now: Progress) -> None:
        if now.done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        allowances.run(engine_of(db), progress=stop)
    seen: list[Progress] = []
    assert allowances.run(engine_of(db), progress=seen.append) == AllowanceRun(1, ())
    assert seen == [Progress("allowances", 1)]  # who has got theirs is not looked at again
    assert allowances.run(engine_of(db)) == AllowanceRun(0, ())
    with engine_of(db).connect() as conn:
        users_table = allowances.schema.users.c
        balances = conn.scalars(sa.select(users_table.credit_balance).where(users_table.plan_tier == "free")).all()
    assert balances == [5] * 4


def test_a_refused_user_does_not_stop_the_others(db: TestDatabase, allowances: Allowances) -> None:
    full, deleted, locked, other = sorted((db.user() for _ in range(4)), key=str)
    users_table = allowances.schema.users
    with engine_of(db).begin() as conn:
        allowances.ledger.grant(conn, full, credits=INT32_MAX, key="all", description="As many as fit")

    def delete(now: Progress) -> None:
        if now.done == 1:
            with engine_of(db).begin() as conn:
                conn.execute(sa.delete(users_table).where(users_table.c.key == deleted))

    with engine_of(db).begin() as conn:
        allowances.ledger.lock(conn, locked)
        result = allowances.run(engine_of(db), progress=delete)
    assert result.users == 1
    assert [(each.user, each.error) for each in result.refused] == [
        (full, "BalanceOutOfRange"),
        (deleted, "UnknownUser"),
        (locked, "Conflict"),
    ]
    assert f"user {full} has {INT32_MAX} credits" in result.refused[0].message
    again = allowances.run(engine_of(db))
    assert (again.users, [each.user for each in again.refused]) == (1, [full])
    assert [db.balance(user) for user in (full, locked, other)] == [INT32_MAX, 5, 5]


def test_a_database_that_does_not_answer_ends_the_run(db: TestDatabase, allowances: Allowances) -> None:
    db.user()
    connections = 0

    def refuse(*_: object) -> None:
        nonlocal connections
        connections += 1
        if connections > 2:  # those that find the users
            raise psycopg.OperationalError("no room")

    gone = sa.create_engine(engine_of(db).url, poolclass=sa.NullPool)
    seen: list[Progress] = []
    sa.event.listen(gone, "do_connect", refuse)
    with pytest.raises(DatabaseUnavailable):
        allowances.run(gone, progress=seen.append)
    assert (connections, seen) == (3, [])


def test_a_trigger_of_the_host_that_refuses_one_user_does_not_stop_the_others(
    db: TestDatabase, allowances: Allowances
) -> None:
    refused, other = db.user(), db.user()
    with engine_of(db).begin() as conn:
        conn.exec_driver_sql(
            "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS "
            f"$$BEGIN IF OLD.id = '{refused}' THEN RAISE 'not this one'; END IF; RETURN NEW; END$$"
        )
        conn.exec_driver_sql("CREATE TRIGGER refuse BEFORE UPDATE ON users FOR EACH ROW EXECUTE FUNCTION refuse()")
    result = allowances.run(engine_of(db))
    assert (result.users, db.balance(other)) == (1, 5)
    assert [(each.user, each.message.startswith("not this one")) for each in result.refused] == [(refused, True)]


def test_an_erased_grant_counts_with_its_amount(db: TestDatabase, allowances: Allowances) -> None:
    user = db.user()
    assert give(db, allowances, user) == 5
    with engine_of(db).begin() as conn:
        allowances.accounts.erase(conn, user)
        allowances.accounts.restore_user(conn, user)
    assert give(db, allowances, user) is None
    plan(db, allowances, "pro", user)
    assert [give(db, allowances, user) for _ in range(2)] == [95, None]


def test_a_large_allowance_in_bigint_credits(server: Server) -> None:
    credits = 3_000_000_000
    host = dataclasses.replace(SHAPES["uuid"].host, credits="bigint")
    plans = (Allowance(plan_tier="free", credits=credits), Allowance(plan_tier="pro", credits=credits + 1))
    large = Allowances(Config(host=host, allowances=plans))
    with Databases.on(server.url(), large.config, schema=SHAPES["uuid"].ddl) as databases, databases.open() as db:
        user = db.user()
        assert [give(db, large, user) for _ in range(2)] == [credits, None]
        plan(db, large, "pro", user)
        assert give(db, large, user) == 1


def test_a_plan_with_two_allowances_or_too_many_credits_is_refused(tmp_path) -> None:
    file = tmp_path / "tallystick.toml"
    one = '[[allowances]]\nplan_tier = "free"\ncredits = {}\n'
    file.write_text(one.format(5) * 2)
    with pytest.raises(ConfigError, match="the plan 'free' has two allowances"):
        Config.load(file, environ={})
    by_price = '[[allowances]]\nplan_tier = "{}"\ncredits = 5\nstripe_price_id = "price_1"\n'
    file.write_text(by_price.format("pro") + by_price.format("basic"))
    with pytest.raises(ConfigError, match="the price 'price_1' has two allowances"):
        Config.load(file, environ={})
    file.write_text(one.format(2**31))
    with pytest.raises(ConfigError, match="a number of credits is at most 2147483647"):
        Config.load(file, environ={})
    file.write_text(one.format(5) + 'every = "day"\n')
    with pytest.raises(ConfigError, match="every"):
        Config.load(file, environ={})
