"""An app that has "updatedAt" and "deletedAt" already: the ledger uses them, and adds none beside them."""

from __future__ import annotations

import datetime as dt
import json
from collections.abc import Callable
from typing import Any
from uuid import uuid4

import pytest
import sqlalchemy as sa
from hosts import HOSTS, App

from tallystick import Config, HostMapping, Ledger, UsersTable, WorkshopsTable, migrate
from tallystick.accounts import Accounts
from tallystick.audit import audit
from tallystick.config import to_toml
from tallystick.errors import (
    HostMismatch,
    IncompatibleColumn,
    StripeCustomerConflict,
    UserDeleted,
    WorkshopDeleted,
)
from tallystick.ledger import Consume
from tallystick.migrate.host.role import grant
from tallystick.web.console.queries import Queries

HOST = HOSTS["Prisma, with such columns in its own spelling"]
PEOPLE = """
    INSERT INTO "User" (id, email, "updatedAt") VALUES ('u2', 'b@example.com', '2026-01-02');
    INSERT INTO "Workshop" (id, "userId") VALUES ('w1', 'u1'), ('w2', 'u2'), ('w3', 'u2');
"""


@pytest.fixture
def app(make_app: Callable[..., App]) -> App:
    return make_app(HOST.ddl + PEOPLE, HOST.mapping)


@pytest.fixture
def migrated(make_migrated: Callable[..., App]) -> App:
    return make_migrated(HOST.ddl + PEOPLE, HOST.mapping)


def mapped(users: dict[str, Any] | None = None, workshops: dict[str, Any] | None = None) -> HostMapping:
    """The mapping without the app's own moments, but for what is given."""
    return HostMapping(
        users=UsersTable(**{"table": "User", "key_type": "text", **(users or {})}),
        workshops=WorkshopsTable(
            **{"table": "Workshop", "key_type": "text", "owner": "userId", "created_at": "createdAt"}
            | (workshops or {})
        ),
    )


def faults(app: App) -> list[str]:
    with app.engine.connect() as conn:
        found = [f"{one.check}: {one.expected}; {one.found}" for one in audit(conn, app.config).findings]
        return found + [f"{one.where}: {one.found}" for one in migrate.status(conn, app.config).drift]


def names(app: App) -> set[str]:
    return {
        text.split()[2]
        for kind, text in app.shape()
        if kind == "column" and text.split()[0] in ('"User"', '"Workshop"')
    }


def test_whom_the_app_deletes_spends_nothing(app: App) -> None:
    before = app.shape()
    receipt = migrate.apply(app.url, app.config)
    assert receipt.adopted == HOST.adopted
    assert names(app).isdisjoint({"updated_at", "deleted_at"})
    ledger, accounts = Ledger(app.engine), Accounts(app.engine)
    with app.engine.begin() as conn:
        with pytest.raises(UserDeleted, match="2026-01-03"):
            ledger.grant(conn, "u1", credits=5, key="g", description="welcome")
        ledger.grant(conn, "u2", credits=9, key="g", description="welcome")
        assert ledger.consume(conn, "u2", key="a", workshop="w2").balance == 8
        # no trigger of ours sets it: the app does, as before
        assert accounts.get(conn, "u2").updated_at == dt.datetime(2026, 1, 2, tzinfo=dt.UTC)
    assert faults(app) == []

    app.run("UPDATE \"User\" SET \"deletedAt\" = now() - interval '1 hour' WHERE id = 'u2'")
    with app.engine.begin() as conn:
        for spend in (
            lambda: ledger.consume(conn, "u2", key="b"),
            lambda: ledger.hold(conn, "u2", credits=1, key="h", expires_in=dt.timedelta(hours=1)),
            lambda: ledger.start_purchase(conn, "u2", credits=1, key="q", description="pack"),
        ):
            with pytest.raises(UserDeleted):
                spend()
        [refused] = ledger.consume_many(conn, [Consume("u2", key="c")])
        assert isinstance(refused, UserDeleted)
        assert accounts.restore_user(conn, "u2").deleted_at is None
        assert app_sees(conn, 'SELECT "deletedAt" FROM "User" WHERE id = \'u2\'') is None
        assert ledger.consume(conn, "u2", key="b").balance == 7
        deleted = accounts.delete_user(conn, "u2").deleted_at
        assert deleted is not None
        assert app_sees(conn, 'SELECT "deletedAt" FROM "User" WHERE id = \'u2\'') == deleted.replace(tzinfo=None)
    assert faults(app) == []
    shown = {
        row.key: f"{row.updated_at} {row.deleted_at}" for row in Queries(app.config, app.engine).users().page().rows
    }
    assert shown["u1"] == "2026-01-02 00:00:00+00:00 2026-01-03 00:00:00+00:00"

    kept = 'SELECT id, "updatedAt", "deletedAt", "stripeCustomerId" FROM "User" ORDER BY id'
    values = app.rows(kept)
    migrate.undo(app.url, app.config, discard_ledger=True)
    assert app.shape() == before
    assert app.rows(kept) == values


def app_sees(conn: sa.Connection, query: str) -> Any:
    return conn.exec_driver_sql(query).scalar_one()


def test_a_workshop_that_the_app_deletes_is_closed(migrated: App) -> None:
    ledger, accounts = Ledger(migrated.engine), Accounts(migrated.engine)
    migrated.run('UPDATE "Workshop" SET "deletedAt" = now() WHERE id = \'w3\'')
    with migrated.engine.begin() as conn:
        ledger.grant(conn, "u2", credits=9, key="g", description="welcome")
        assert (ledger.access(conn, "w3").open, ledger.access(conn, "w3").reason) == (False, "deleted")
        with pytest.raises(WorkshopDeleted):
            ledger.consume(conn, "u2", key="a", workshop="w3")
        with pytest.raises(WorkshopDeleted):
            ledger.hold(conn, "u2", credits=1, key="h", workshop="w3", expires_in=dt.timedelta(hours=1))
        [refused] = ledger.consume_many(conn, [Consume("u2", key="c", workshop="w3")])
        assert isinstance(refused, WorkshopDeleted)
        accounts.restore_workshop(conn, "w3")
        assert ledger.consume(conn, "u2", key="a", workshop="w3").balance == 8
        accounts.delete_workshop(conn, "w3")
        assert app_sees(conn, 'SELECT "deletedAt" FROM "Workshop" WHERE id = \'w3\'') is not None
    assert faults(migrated) == []


def test_the_apps_stripe_customer_is_the_ledgers(migrated: App) -> None:
    accounts = Accounts(migrated.engine)
    with migrated.engine.begin() as conn:
        assert accounts.get(conn, "u1").stripe_customer_id == "cus_1"
        with pytest.raises(StripeCustomerConflict):
            accounts.set_stripe_customer(conn, "u2", "cus_1")
        accounts.set_stripe_customer(conn, "u2", "cus_2")
        assert app_sees(conn, 'SELECT "stripeCustomerId" FROM "User" WHERE id = \'u2\'') == "cus_2"
    with pytest.raises(sa.exc.IntegrityError, match="tallystick_users_stripe_customer_id"):
        migrated.run("UPDATE \"User\" SET \"stripeCustomerId\" = 'cus_1' WHERE id = 'u2'")
    assert faults(migrated) == []
    with migrated.engine.connect() as conn:
        host = migrate.examine(conn, migrated.config)
    lines = migrate.snippet("drizzle", migrated.config, host.adopted_names, there=host.columns)
    assert '.on(table.stripeCustomerId)\n    .where(sql`"stripeCustomerId" IS NOT NULL`)' in lines
    assert "deletedAt" not in lines
    lines = migrate.snippet("sqlalchemy", migrated.config, host.adopted_names, there=host.columns)
    assert r'postgresql_where=text("\"stripeCustomerId\" IS NOT NULL")' in lines


def test_what_was_spent_after_the_apps_deletion_is_found(migrated: App) -> None:
    ledger = Ledger(migrated.engine)
    with migrated.engine.begin() as conn:
        ledger.grant(conn, "u2", credits=9, key="g", description="welcome")
        ledger.consume(conn, "u2", key="a")
    migrated.run("UPDATE \"User\" SET \"deletedAt\" = now() - interval '2 days' WHERE id = 'u2'")
    [found] = faults(migrated)
    assert found.startswith("spent_after_deletion: no consumption after deletedAt 2")


def test_a_column_that_the_app_drops_is_a_difference(migrated: App) -> None:
    migrated.run('ALTER TABLE "User" DROP "deletedAt"')
    with migrated.engine.connect() as conn:
        [found] = [one for one in migrate.status(conn, migrated.config).drift if one.kind == "column"]
    # what was in it is lost, or in a column of another name: only the app knows
    assert (found.where, found.found) == ("public.User.deletedAt", None)
    assert found.remedy.startswith('ALTER TABLE public."User" RENAME COLUMN … TO "deletedAt" if it was renamed. ')
    migrated.run(f'ALTER TABLE "User" ADD "deletedAt" {found.expected}')
    assert faults(migrated) == []


CHANGED = {
    '"User" ALTER "deletedAt" TYPE date': ("User.deletedAt", "date"),
    '"User" ALTER "deletedAt" SET DEFAULT now(), ALTER "deletedAt" SET NOT NULL': (
        "User.deletedAt",
        "timestamp(3) without time zone NOT NULL",
    ),
    '"User" ALTER "stripeCustomerId" TYPE char(30)': ("User.stripeCustomerId", "character(30)"),
    '"Workshop" ALTER "deletedAt" TYPE boolean USING false': ("Workshop.deletedAt", "boolean"),
}


@pytest.mark.parametrize("change", CHANGED)
def test_a_column_that_the_app_makes_unfit_is_a_difference(migrated: App, change: str) -> None:
    migrated.run('UPDATE "User" SET "deletedAt" = now()', 'ALTER TABLE "User" ALTER "deletedAt" TYPE timestamptz(0)')
    assert faults(migrated) == []  # one that could be adopted as well
    migrated.run('ALTER TABLE "User" ALTER "deletedAt" TYPE timestamp(3)', f"ALTER TABLE {change}")
    where, found = CHANGED[change]
    assert faults(migrated) == [f"public.{where}: {found}"]


def test_an_apps_role_reads_them(migrated: App) -> None:
    role = f"shop_{uuid4().hex}"
    migrated.run(f"CREATE ROLE {role}")
    try:
        migrated.psql(grant(migrated.config.host, role))
        with migrated.engine.connect() as conn:
            conn.exec_driver_sql(f"SET ROLE {role}")
            assert app_sees(conn, "SELECT outcome FROM tallystick.delete_user('u2')") == "completed"
            assert app_sees(conn, 'SELECT count("updatedAt") + count("deletedAt") FROM "User"') == 4
            assert app_sees(conn, 'SELECT count("deletedAt") FROM "Workshop"') == 0
    finally:
        migrated.run(f"DROP OWNED BY {role}", f"DROP ROLE {role}")


def test_the_script_for_an_unread_database_adds_no_second_column(app: App) -> None:
    before = app.shape()
    script = migrate.sql(None, app.config)
    app.psql(script)
    assert names(app).isdisjoint({"updated_at", "deleted_at"})
    assert faults(app) == []
    migrate.undo(app.url, app.config)
    assert app.shape() == before


def test_a_rule_of_the_apps_about_them_is_told(app: App) -> None:
    app.run(
        'ALTER TABLE "User" ADD gone boolean NOT NULL DEFAULT false',
        """UPDATE "User" SET gone = "deletedAt" IS NOT NULL""",
        """ALTER TABLE "User" ADD CONSTRAINT agree CHECK (("deletedAt" IS NOT NULL) = gone)""",
    )
    with app.engine.connect() as conn:
        [told] = [one.text for one in migrate.plan(conn, app.config).findings if "The rule" in one.text]
    assert told.startswith('The rule agree on public."User", CHECK (("deletedAt" IS NOT NULL) = gone), also holds')
    assert told.endswith("writes to deletedAt: a call that breaks it fails")


MISTAKES = {
    "a customer that is never null": (
        {"users": {"stripe_customer_id": "email"}},
        "email, which host.users.stripe_customer_id names, is text NOT NULL; Tallystick needs text or varchar(32) that",
    ),
    "no such column": (
        {"users": {"deleted_at": "deletedOn"}},
        (
            "public.User has no column 'deletedOn', which host.users.deleted_at names; did you mean 'deletedAt'? "
            "Correct it, or take it out of tallystick.toml: the migration then adds a column deleted_at"
        ),
    ),
    "no such column of workshops": (
        {"workshops": {"deleted_at": "removedAt"}},
        "public.Workshop has no column 'removedAt', which host.workshops.deleted_at names",
    ),
    "of another type": (
        {"users": {"updated_at": "email"}},
        (
            "public.User.email, which host.users.updated_at names, is text; Tallystick needs timestamp or timestamptz. "
            "Change that, name another column there, or take it out"
        ),
    ),
    "never null": (
        {"users": {"deleted_at": "createdAt"}},
        (
            "public.User.createdAt, which host.users.deleted_at names, is timestamp(3) without time zone NOT NULL; "
            "Tallystick needs timestamp or timestamptz that may be null"
        ),
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_name_that_cannot_be_is_refused_before_anything_is_written(app: App, mistake: str) -> None:
    given, message = MISTAKES[mistake]
    before = app.shape()
    config = app.config.model_copy(update={"host": mapped(**given)})
    with pytest.raises((HostMismatch, IncompatibleColumn)) as refused:
        migrate.apply(app.url, config)
    assert message in str(refused.value)
    assert app.shape() == before


@pytest.mark.parametrize(
    ("users", "workshops"),
    [
        ({"deleted_at": "updated_at"}, {}),
        ({"updated_at": "id"}, {}),
        ({"email": "email", "stripe_customer_id": "email"}, {}),
        ({}, {"deleted_at": "createdAt"}),
    ],
)
def test_one_column_has_one_meaning(users: dict[str, Any], workshops: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="both name the column"):
        mapped(users, workshops)


def test_a_column_of_ours_that_is_never_null_is_not_adopted(make_app: Callable[..., App]) -> None:
    app = make_app()
    app.run("ALTER TABLE users ADD deleted_at timestamptz NOT NULL DEFAULT now()")
    with pytest.raises(IncompatibleColumn, match="deleted_at: timestamp with time zone NOT NULL; Tallystick needs"):
        migrate.apply(app.url, app.config)


def test_init_offers_them_and_leaves_them(app: App) -> None:
    app.run('ALTER TABLE "Workshop" ALTER "deletedAt" TYPE boolean USING false')
    with app.engine.connect() as conn:
        proposed, own = migrate.propose(conn), migrate.propose(conn, own_columns=True)
        assert migrate.in_place_of_ours(conn, proposed) == [
            ('public.User."stripeCustomerId"', "stripe_customer_id"),
            ('public.User."updatedAt"', "updated_at"),
            ('public.User."deletedAt"', "deleted_at"),
        ]
        assert migrate.in_place_of_ours(conn, own) == []
        reported = [one.text for one in migrate.plan(conn, Config(host=own)).findings if "beside it" in one.text]
    assert (proposed.users.updated_at, proposed.users.deleted_at) == ("updatedAt", "deletedAt")
    assert proposed.workshops is not None
    assert proposed.workshops.deleted_at == "deleted_at"  # a yes or no is no moment
    assert own.users == mapped({"email": "email"}).users
    assert 'If it means the same, name it before the migration: set host.users.deleted_at = "deletedAt"' in reported[0]
    assert (
        "make it timestamp or timestamptz that may be null (it is boolean) before the migration, and set"
        in reported[-1]
    )
    assert 'deleted_at = "deletedAt"' in to_toml(proposed)
    assert "updated" not in to_toml(own)


def test_a_mapping_of_before_is_read() -> None:
    stored = json.loads(mapped().to_json())
    for word in ("users", "workshops"):
        del stored[word]["deleted_at"]
    del stored["users"]["updated_at"], stored["users"]["stripe_customer_id"]
    assert HostMapping.from_json(json.dumps(stored)) == mapped()
