"""``docs/teams.md``: an organization holds the credits, its members spend them, each up to a cap."""

from __future__ import annotations

import datetime as dt
import re
import tomllib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from uuid import UUID, uuid4

import psycopg
import pytest
import sqlalchemy as sa

import pages
from tallystick import Config, migrate
from tallystick.dev.postgres import Server
from tallystick.testing import Databases, TestDatabase

FILES = pages.files_of("teams.md")
(SETTINGS,) = pages.blocks(pages.ROOT / "docs" / "teams.md", "toml")


@pytest.fixture(scope="module")
def databases(server: Server) -> Iterator[Databases]:
    with Databases.on(server.url(), Config(**tomllib.loads(SETTINGS)), schema=FILES["schema.sql"]) as made:
        yield made


@pytest.fixture
def db(databases: Databases) -> Iterator[TestDatabase]:
    with databases.open() as made:
        made.conn.exec_driver_sql(FILES["spend_as_member.sql"])
        now = made.clock.now()
        in_a_month = (now.replace(day=1) + dt.timedelta(days=32)).replace(day=2)  # and at the end of none
        made.clock.advance(seconds=(in_a_month - now).total_seconds())
        yield made
        made.assert_balanced()


def member_of(db: TestDatabase, organization: Any, *, cap: int | None = None) -> UUID:
    return db.conn.execute(
        sa.text(
            "INSERT INTO members (organization_id, email, credits_per_month) VALUES (:of, :email, :cap) RETURNING id"
        ),
        {"of": organization, "email": f"{uuid4()}@example.com", "cap": cap},
    ).scalar_one()


def page(name: str) -> dict[str, Any]:
    names: dict[str, Any] = {}
    exec(compile(FILES[name], f"docs/teams.md: {name}", "exec"), names)
    return names


def test_init_writes_these_settings(fresh_database: Callable[..., str]):
    with sa.create_engine(fresh_database(), poolclass=sa.NullPool).begin() as conn:
        conn.exec_driver_sql(FILES["schema.sql"])
        assert migrate.propose(conn, users="organizations") == Config(**tomllib.loads(SETTINGS)).host


def test_a_workshop_is_the_teams_and_tells_who_opened_it(db: TestDatabase):
    organization = db.funded(credits=5)
    ann, ben = member_of(db, organization), member_of(db, organization)
    workshop = db.workshop(organization)
    unlock = page("spending.py")["unlock"]
    first = unlock(db.ledger, db.conn, organization=organization, member=ann, workshop=workshop)
    second = unlock(db.ledger, db.conn, organization=organization, member=ben, workshop=workshop)
    assert (first.replayed, second.replayed, db.balance(organization)) == (False, True, 4)
    assert first.metadata == second.metadata == {"actor": str(ann)}
    assert by_member(db, organization) == {str(ann): 1}


def by_member(db: TestDatabase, organization: Any) -> dict[str, int]:
    with psycopg.connect(db.url) as conn:
        return dict(conn.execute(FILES["by_member.sql"], {"organization": organization}).fetchall())


def test_the_index_serves_both_queries_and_is_no_drift(db: TestDatabase):
    organizations = [db.funded(credits=4_000) for _ in range(3)]
    members = [str(uuid4()) for _ in range(20)]
    spend = """
        SELECT count(tallystick.consume(%s, 'k' || n, metadata => CASE n %% 4 WHEN 0 THEN
          pg_catalog.jsonb_build_object('actor', (%s::text[])[1 + n / 4 %% 20]) END))
        FROM generate_series(1, 1200) AS n
    """
    with psycopg.connect(db.url, autocommit=True) as conn:
        for organization in organizations:
            conn.execute(spend, [organization, members])
        conn.execute(FILES["actor_index.sql"])
        conn.execute("VACUUM ANALYZE credit_transactions")
        given = {"organization": organizations[0]}
        assert sum(credits for _, credits in conn.execute(FILES["by_member.sql"], given)) == 300
        plan = "\n".join(line for (line,) in conn.execute(f"EXPLAIN {FILES['by_member.sql']}", given))
        assert "credit_transactions_actor" in plan, plan
        (summed,) = re.findall(r"SELECT coalesce\(-sum.*?;", FILES["spend_as_member.sql"], re.DOTALL)
        for name, value in (
            (" INTO spent", ""),
            ("member.organization_id", "%(organization)s"),
            ("member_id::text", "%(actor)s"),
            ("<> key;", "<> 'another'"),
        ):
            assert name in summed
            summed = summed.replace(name, value)
        found = conn.execute(f"EXPLAIN {summed}", given | {"actor": members[0]})
        plan = "\n".join(line for (line,) in found)
        assert "credit_transactions_actor" in plan, plan
    with sa.create_engine(db.config.database_url, poolclass=sa.NullPool).connect() as conn:
        assert migrate.status(conn, db.config).drift == ()


SPEND = "SELECT outcome, balance, left_of_cap FROM spend_as_member(%s, %s, %s)"


def test_sixteen_calls_at_once_never_exceed_a_members_cap(db: TestDatabase):
    organization = db.funded(credits=100)
    capped, free = member_of(db, organization, cap=10), member_of(db, organization)

    def spend(n: int) -> list[str]:
        with psycopg.connect(db.url, autocommit=True) as conn:
            return [
                conn.execute(SPEND, [member, credits, f"{n}-{member}-{credits}"]).fetchone()[0]
                for credits in (1, 2)
                for member in (capped, free)
            ]

    with ThreadPoolExecutor(16) as pool:
        outcomes = [outcome for each in pool.map(spend, range(16)) for outcome in each]
    spent = by_member(db, organization)
    assert spent == {str(capped): 10, str(free): 48}
    assert db.balance(organization) == 42
    assert set(outcomes) == {"completed", "member_cap_reached"}


def test_a_cap_is_of_a_month_and_a_retry_is_not_counted_against_it(db: TestDatabase):
    organization = db.funded(credits=20)
    member, other = member_of(db, organization, cap=3), member_of(db, organization, cap=30)
    render = page("capped.py")["render"]
    with psycopg.connect(db.url, autocommit=True) as conn:
        assert conn.execute(SPEND, [member, 3, "one"]).fetchone() == ("completed", 17, 3)
        assert conn.execute(SPEND, [member, 1, "two"]).fetchone() == ("member_cap_reached", 17, 0)
        assert conn.execute(SPEND, [member, 3, "one"]).fetchone() == ("replayed", 17, 3)
        assert conn.execute(SPEND, [other, 18, "three"]).fetchone() == ("insufficient_credits", 17, 30)
        assert conn.execute(SPEND, [other, 0, "four"]).fetchone()[0] == "invalid_argument"
    spends = {"member": member, "credits": 2}
    assert render(db.conn, request=uuid4(), **spends) == "You have 0 credits left this month."
    db.clock.advance(days=31)
    assert render(db.conn, request=uuid4(), **spends) == "Rendering."
    assert render(db.conn, request=uuid4(), **spends) == "You have 1 credits left this month."
    assert render(db.conn, request=uuid4(), member=other, credits=16) == "Your organization has 15 credits."


def test_a_member_at_the_cap_opens_what_the_team_has_unlocked(db: TestDatabase):
    organization = db.funded(credits=20)
    capped, other = member_of(db, organization, cap=0), member_of(db, organization)
    workshop, locked = db.workshop(organization), db.workshop(organization)
    unlock = "SELECT outcome FROM spend_as_member(%s, 1, %s, %s)"
    with psycopg.connect(db.url, autocommit=True) as conn:
        assert conn.execute(unlock, [capped, "one", workshop]).fetchone() == ("member_cap_reached",)
        assert conn.execute(unlock, [other, "two", workshop]).fetchone() == ("completed",)
        assert conn.execute(unlock, [capped, "one", workshop]).fetchone() == ("replayed",)
        assert conn.execute(unlock, [capped, "three", locked]).fetchone() == ("member_cap_reached",)
    assert by_member(db, organization) == {str(other): 1}


def test_what_is_given_back_and_a_hold_that_has_ended_do_not_count(db: TestDatabase):
    organization = db.funded(credits=20)
    member = member_of(db, organization, cap=3)
    actor = {"actor": str(member)}
    hold = db.ledger.hold(db.conn, organization, credits=2, key="hold", metadata=actor)
    ended = db.ledger.hold(
        db.conn, organization, credits=1, key="short", metadata=actor, expires_in=dt.timedelta(minutes=1)
    )
    with psycopg.connect(db.url, autocommit=True) as conn:
        assert conn.execute(SPEND, [member, 1, "one"]).fetchone() == ("member_cap_reached", 20, 0)
        db.clock.advance(minutes=2)
        assert conn.execute(SPEND, [member, 1, "one"]).fetchone() == ("completed", 19, 1)
        db.ledger.capture(db.conn, organization, hold.id)
        assert conn.execute(SPEND, [member, 1, "two"]).fetchone() == ("member_cap_reached", 17, 0)
        db.ledger.reverse(db.conn, organization, hold.id, credits=1, key="back", metadata=hold.metadata)
        assert by_member(db, organization) == {str(member): 2}
        assert conn.execute(SPEND, [member, 1, "two"]).fetchone() == ("completed", 17, 1)
    assert ended.status == "pending"


def test_the_apps_role_spends_by_no_other_way(db: TestDatabase, server: Server):
    role = f"app_{uuid4().hex[:8]}"
    organization = db.funded(credits=5)
    member = member_of(db, organization, cap=3)
    with psycopg.connect(db.url, autocommit=True) as conn:
        conn.execute(f"CREATE ROLE {role}")
        try:
            conn.execute(f"GRANT USAGE ON SCHEMA tallystick TO {role}")
            conn.execute(f"GRANT EXECUTE ON ALL FUNCTIONS IN SCHEMA tallystick TO {role}")
            conn.execute(re.sub(r"\bapp\b", role, FILES["grants.sql"]))
            conn.execute(f"SET ROLE {role}")
            for call in ("consume(%s, 'past it')", "consume_strict(%s, 'past it')", "hold(%s, 1, 'past it')"):
                with pytest.raises(psycopg.errors.InsufficientPrivilege):
                    conn.execute(f"SELECT tallystick.{call}", [organization])
            assert conn.execute(SPEND, [member, 2, "one"]).fetchone() == ("completed", 3, 3)
            conn.execute("RESET ROLE")
        finally:
            conn.execute("RESET ROLE")
            conn.execute(f"DROP OWNED BY {role}")
            conn.execute(f"DROP ROLE {role}")
