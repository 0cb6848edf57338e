"""Obstacles that stop a migration before anything is changed, and the remedy in each message."""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import sqlalchemy as sa
from hosts import App
from starlette.testclient import TestClient

from tallystick import Config, HostMapping, Ledger, UsersTable, WorkshopsTable, migrate, stripe
from tallystick.allowances import Allowances
from tallystick.audit import audit
from tallystick.config import Allowance
from tallystick.dev.seed import reset, seed
from tallystick.errors import (
    HostMismatch,
    IncompatibleColumn,
    PermissionDenied,
    SchemaTooNew,
    TallystickError,
)
from tallystick.schema import verify
from tallystick.web.console import LocalLink, console
from tallystick.web.console.queries import Queries

ALONE = HostMapping(workshops=None)
FOREIGN_SERVER = "CREATE FOREIGN DATA WRAPPER none; CREATE SERVER elsewhere FOREIGN DATA WRAPPER none;"
UUID_USERS = "CREATE TABLE users (id uuid PRIMARY KEY, email text);"


def stopped(app: App, kind: type[TallystickError]) -> TallystickError:
    before = app.dump()
    with pytest.raises(kind) as caught:
        migrate.apply(app.url, app.config)
    with pytest.raises(kind), app.engine.connect() as conn:
        migrate.plan(conn, app.config)
    assert app.dump() == before
    return caught.value


@pytest.mark.parametrize(
    ("column", "found"),
    [
        ("credit_balance smallint NOT NULL DEFAULT 0", "smallint"),
        ("credit_balance money NOT NULL DEFAULT 0", "money"),
        ("credit_balance integer GENERATED ALWAYS AS (3) STORED", "integer GENERATED"),
        ("credit_sequence integer NOT NULL DEFAULT 7", "integer DEFAULT 7"),
        ("onboarding_complete text", "text"),
        ("stripe_customer_id uuid", "uuid"),
        ("plan_tier varchar(8) NOT NULL DEFAULT 'free'", "character varying(8)"),
        ("updated_at date", "date"),
        ("deleted_at boolean", "boolean"),
        ("deleted_at text GENERATED ALWAYS AS (email) STORED", "text"),
        ("plan_tier text GENERATED ALWAYS AS (email) STORED", "text GENERATED"),
        ("credit_balance numeric(4,0) NOT NULL DEFAULT 0", "numeric(4,0)"),
        ("credit_balance numeric(9,2) NOT NULL DEFAULT 0", "numeric(9,2)"),
        ("stripe_customer_id varchar(8)", "character varying(8)"),
    ],
)
def test_a_column_of_ours_with_another_meaning(make_app: Callable[..., App], column: str, found: str) -> None:
    app = make_app(f"{UUID_USERS} ALTER TABLE users ADD {column}", HostMapping(workshops=None))
    error = stopped(app, IncompatibleColumn)
    assert isinstance(error, IncompatibleColumn)
    assert (error.table, error.column, error.found) == ("public.users", column.split(maxsplit=1)[0], found)
    assert error.expected in str(error)
    assert f"ALTER TABLE public.users RENAME COLUMN {error.column} TO {error.column}_before" in str(error)


@pytest.mark.parametrize("kind", ["numeric", "numeric(10,2)", "numeric(8,0)", "integer"])
def test_a_balance_that_holds_enough(make_app: Callable[..., App], kind: str) -> None:
    app = make_app(f"{UUID_USERS} ALTER TABLE users ADD credit_balance {kind} NOT NULL DEFAULT 0", ALONE)
    with app.engine.connect() as conn:
        assert migrate.plan(conn, app.config).adopted == ("users.credit_balance",)


@pytest.mark.since(15)
def test_a_balance_of_thousands_holds_enough(make_app: Callable[..., App]) -> None:
    app = make_app(f"{UUID_USERS} ALTER TABLE users ADD credit_balance numeric(5,-3) NOT NULL DEFAULT 0", ALONE)
    with app.engine.connect() as conn:
        assert migrate.plan(conn, app.config).adopted == ("users.credit_balance",)


def test_names_in_the_sql_of_a_message_are_quoted(make_app: Callable[..., App]) -> None:
    mapping = HostMapping(users=UsersTable(schema="My App", table="Users"), workshops=None)
    app = make_app('CREATE SCHEMA "My App"; CREATE TABLE "My App"."Users" (id uuid PRIMARY KEY)', mapping)
    app.run('ALTER TABLE "My App"."Users" ADD plan_tier integer')
    rename = str(stopped(app, IncompatibleColumn)).partition("breaks with ")[2].partition(", so")[0]
    app.run(rename, 'ALTER TABLE "My App"."Users" SET UNLOGGED')
    app.run(str(stopped(app, HostMismatch)).partition("Run ")[2].partition(" first")[0])
    assert migrate.apply(app.url, app.config).changed


@pytest.mark.parametrize(
    ("users", "owner", "remedy"),
    [
        ("bigint", "integer", "ALTER TABLE public.workshops ALTER COLUMN user_id TYPE bigint"),
        ("smallint", "integer", "ALTER TABLE public.users ALTER COLUMN id TYPE integer"),
    ],
)
def test_two_sizes_of_integer_get_the_statement(
    make_app: Callable[..., App], users: str, owner: str, remedy: str
) -> None:
    app = make_app(
        f"""
        CREATE TABLE users (id {users} PRIMARY KEY);
        CREATE TABLE workshops (
          id bigint PRIMARY KEY, user_id {owner} REFERENCES users, title text, created_at timestamptz)""",
        HostMapping(users=UsersTable(key_type=users), workshops=WorkshopsTable(key_type="bigint")),
    )
    assert remedy in str(stopped(app, HostMismatch))
    with app.engine.connect() as conn, pytest.raises(HostMismatch, match=remedy):
        migrate.propose(conn)
    app.run(remedy)
    with app.engine.connect() as conn:
        assert migrate.propose(conn).workshops is not None


@pytest.mark.parametrize(
    ("ddl", "found"),
    [
        (
            """ALTER TABLE users ADD credit_balance numeric NOT NULL DEFAULT 0;
            INSERT INTO users (id, credit_balance)
            SELECT gen_random_uuid(), unnest(ARRAY[5, 0.5, -1, 1e10])""",
            "(below 0: 1, above 2147483647: 1, not a whole number: 1)",
        ),
        (
            """ALTER TABLE users ADD stripe_customer_id text;
            INSERT INTO users (id, stripe_customer_id)
            VALUES (gen_random_uuid(), 'cus_1'), (gen_random_uuid(), 'cus_1')""",
            "text with the same value twice",
        ),
    ],
)
def test_a_column_of_ours_with_other_contents(make_app: Callable[..., App], ddl: str, found: str) -> None:
    error = stopped(make_app(f"{UUID_USERS} {ddl}", ALONE), IncompatibleColumn)
    assert found in str(error)


def test_customers_twice_in_the_apps_own_column(make_app: Callable[..., App]) -> None:
    users = UsersTable(stripe_customer_id="stripeCustomerId")
    app = make_app(
        f"""{UUID_USERS} ALTER TABLE users ADD "stripeCustomerId" text;
        INSERT INTO users (id, "stripeCustomerId") VALUES (gen_random_uuid(), 'cus_1'), (gen_random_uuid(), 'cus_1')""",
        HostMapping(users=users, workshops=None),
    )
    error = stopped(app, IncompatibleColumn)
    assert (error.column, "text with the same value twice" in str(error)) == ("stripeCustomerId", True)


@pytest.mark.parametrize(
    ("ddl", "mapping", "message"),
    [
        ("CREATE TABLE user_accounts (id uuid PRIMARY KEY)", ALONE, "no table public.users"),
        (
            "CREATE TABLE userz (id uuid PRIMARY KEY)",
            ALONE,
            r"did you mean public.userz\? Set it under \[host.users\]",
        ),
        (
            "CREATE TABLE projects (id uuid PRIMARY KEY)",
            ALONE,
            r"no table public.users; name it under \[host.users\] in tallystick.toml",
        ),
        ("CREATE VIEW users AS SELECT 1 AS id", ALONE, "is a view"),
        ("CREATE MATERIALIZED VIEW users AS SELECT 1 AS id", ALONE, "is a view"),
        ("CREATE TABLE users (id uuid PRIMARY KEY) PARTITION BY HASH (id)", ALONE, "is partitioned"),
        (
            f"{FOREIGN_SERVER} CREATE FOREIGN TABLE users (id uuid) SERVER elsewhere",
            ALONE,
            "is a foreign table; nothing can reference it",
        ),
        ("CREATE UNLOGGED TABLE users (id uuid PRIMARY KEY)", ALONE, "SET LOGGED"),
        (
            "CREATE TYPE ut AS (id uuid, email text); CREATE TABLE users OF ut (PRIMARY KEY (id))",
            ALONE,
            r"is a typed table; .* ALTER TABLE public\.users NOT OF first",
        ),
        ("CREATE TABLE users (id uuid PRIMARY KEY); CREATE TABLE vip () INHERITS (users)", ALONE, "inherits"),
        ("CREATE TABLE users (uid uuid PRIMARY KEY)", ALONE, "has no column 'id'; did you mean 'uid'"),
        ("CREATE TABLE users (id uuid, uid uuid NOT NULL UNIQUE)", ALONE, "host.users.key to one of: uid"),
        ("CREATE TABLE users (id uuid UNIQUE)", ALONE, "not both NOT NULL and UNIQUE"),
        (
            "CREATE TABLE users (id uuid NOT NULL); CREATE UNIQUE INDEX ON users (id) WHERE id IS NOT NULL",
            ALONE,
            "not both",
        ),
        ("CREATE TABLE users (id uuid NOT NULL UNIQUE DEFERRABLE)", ALONE, "not both"),
        ("CREATE TABLE users (id uuid, n int, PRIMARY KEY (id, n))", ALONE, "not both"),
        ("CREATE TABLE users (id numeric PRIMARY KEY)", ALONE, "numeric, which cannot be a key"),
        (
            'CREATE TABLE users (id text COLLATE "C" PRIMARY KEY)',
            HostMapping(users=UsersTable(key_type="text"), workshops=None),
            r"text COLLATE pg_catalog.C, but the configuration says nothing. Set host.users.key_collation = ",
        ),
        ("CREATE TABLE users (id text PRIMARY KEY)", ALONE, 'key_type = "text", or run: tallystick init'),
        (UUID_USERS, HostMapping(), "no table public.workshops"),
        (
            f"{UUID_USERS} CREATE TABLE workshops (id uuid PRIMARY KEY, user_id integer)",
            HostMapping(),
            "user_id is integer, but users are keyed by id",
        ),
        (
            f"{UUID_USERS} CREATE TABLE workshops (id uuid PRIMARY KEY, user_id uuid, created_at timestamptz)",
            HostMapping(),
            "no column 'title'",
        ),
        (
            f"{UUID_USERS} CREATE TABLE workshops (id uuid PRIMARY KEY, user_id uuid, title text, created_at date)",
            HostMapping(),
            "created_at is date, not a timestamp",
        ),
        (UUID_USERS, HostMapping(users=UsersTable(email="mail"), workshops=None), "did you mean 'email'"),
        (f"{UUID_USERS} CREATE TABLE credit_transactions ()", ALONE, 'already has "public"."credit_transactions"'),
        (f"{UUID_USERS} CREATE TYPE credit_transaction_type AS ENUM ('x')", ALONE, "credit_transaction_type"),
        (f"{UUID_USERS} CREATE SEQUENCE credit_transactions_sequence", ALONE, "credit_transactions_sequence"),
        (f"{UUID_USERS} CREATE SCHEMA tallystick", ALONE, "ALTER SCHEMA tallystick RENAME"),
    ],
)
def test_a_host_that_cannot_serve(make_app: Callable[..., App], ddl: str, mapping: HostMapping, message: str) -> None:
    with pytest.raises(HostMismatch, match=message):
        raise stopped(make_app(ddl, mapping), HostMismatch)


def test_a_table_that_was_given_too_many_columns(make_app: Callable[..., App]) -> None:
    columns = ", ".join(f"c{n} int" for n in range(1595))
    app = make_app(f"CREATE TABLE users (id uuid PRIMARY KEY, {columns})", ALONE)
    assert "1600" in str(stopped(app, HostMismatch))


def test_a_database_that_is_ahead(migrated: App) -> None:
    migrated.run("UPDATE tallystick.alembic_version SET version_num = '9999'")
    assert "pip install -U tallystick" in str(stopped(migrated, SchemaTooNew))


def test_another_mapping_than_the_one_that_was_migrated(app: App, make_app: Callable[..., App]) -> None:
    app.run("CREATE TABLE courses (id uuid PRIMARY KEY, user_id uuid, title text, created_at timestamptz)")
    app.run("CREATE SCHEMA crm", "CREATE TABLE crm.users (id uuid PRIMARY KEY)")
    migrate.apply(app.url, app.config)
    for mapping, message in (
        (
            HostMapping(workshops=WorkshopsTable(table="courses")),
            r"host\.workshops\.table is 'courses', in the database 'workshops'",
        ),
        (
            HostMapping(users=UsersTable(schema="crm"), workshops=None),
            r"host\.users\.schema is 'crm', in the database 'public'",
        ),
        (HostMapping(workshops=None), r"host\.workshops is not set, in the database 'public\.workshops'"),
        (HostMapping(credits="bigint"), r"host\.credits is 'bigint', in the database 'integer'"),
    ):
        other = app.config.model_copy(update={"host": mapping})
        for change in (migrate.apply, migrate.undo):
            with pytest.raises(HostMismatch, match=message):
                change(app.url, other)

    alone = make_app(
        f"{UUID_USERS} CREATE TABLE workshops (id uuid PRIMARY KEY, user_id uuid, title text, created_at timestamptz)",
        ALONE,
    )
    migrate.apply(alone.url, alone.config)
    with pytest.raises(HostMismatch, match=r"host\.workshops is 'public\.workshops', in the database not set"):
        migrate.apply(alone.url, alone.config.model_copy(update={"host": HostMapping()}))


def test_a_table_that_took_the_name_of_the_one_that_was_migrated(migrated: App) -> None:
    migrated.run("ALTER TABLE users RENAME TO people", "CREATE TABLE users (id uuid PRIMARY KEY, email text)")
    with pytest.raises(
        HostMismatch, match=r"was migrated for public\.people, which is not public\.users or public\.workshops"
    ):
        migrate.apply(migrated.url, migrated.config)


class TestPrivileges:
    @pytest.fixture
    def role(self, app: App) -> Iterator[str]:
        name = f"r_{app.engine.url.database}"[:60]
        app.run(f"CREATE ROLE {name} LOGIN")
        yield name
        app.run(f"REASSIGN OWNED BY {name} TO postgres", f"DROP OWNED BY {name}", f"DROP ROLE {name}")

    def as_role(self, app: App, role: str) -> App:
        url = sa.make_url(app.url).set(username=role).render_as_string(hide_password=False)
        return App(url, app.config, app.server)

    def test_each_missing_one_is_named_with_the_grant(self, app: App, role: str) -> None:
        ours = self.as_role(app, role)
        database = app.engine.url.database
        app.run("REVOKE CREATE ON SCHEMA public FROM PUBLIC")
        for missing, grants in (
            ("does not own public.users. Connect as postgres", [f"ALTER TABLE users OWNER TO {role}"]),
            ("does not own public.workshops", [f"ALTER TABLE workshops OWNER TO {role}"]),
            (f"GRANT CREATE ON DATABASE {database} TO {role}", [f"GRANT CREATE ON DATABASE {database} TO {role}"]),
            (f"GRANT CREATE ON SCHEMA public TO {role}", [f"GRANT CREATE ON SCHEMA public TO {role}"]),
        ):
            with pytest.raises(PermissionDenied) as caught:
                migrate.apply(ours.url, ours.config)
            assert missing in str(caught.value)
            app.run(*grants)
        assert migrate.apply(ours.url, ours.config).changed

    @pytest.mark.parametrize("inherits", ["INHERIT", "NOINHERIT"])
    def test_a_member_of_the_owner_that_inherits_nothing(self, app: App, role: str, inherits: str) -> None:
        owner = f"{role[:50]} of"
        app.run(f'CREATE ROLE "{owner}"')
        try:
            app.run(
                *(f'ALTER TABLE {table} OWNER TO "{owner}"' for table in ("users", "workshops")),
                f"GRANT CREATE ON DATABASE {app.engine.url.database} TO {role}",
                f"GRANT CREATE ON SCHEMA public TO {role}",
                f'ALTER ROLE {role} {inherits}; {f"""GRANT "{owner}" TO {role}""" if inherits == "NOINHERIT" else ""}',
            )
            ours = self.as_role(app, role)
            with pytest.raises(PermissionDenied, match=r"does not own public\.users") as caught:
                migrate.apply(ours.url, ours.config)
            app.run(*caught.value.message.partition("run: ")[2].split("; "))
            assert migrate.apply(ours.url, ours.config).changed
        finally:
            app.run(f'DROP OWNED BY "{owner}" CASCADE', f'DROP ROLE "{owner}"')

    def test_policies_that_hide_rows_from_their_owner(self, make_app: Callable[..., App], role: str) -> None:
        """Balances that the owner cannot see do not count as 0."""
        app = make_app(
            f"{UUID_USERS} ALTER TABLE users ADD credit_balance integer NOT NULL DEFAULT 0;"
            "INSERT INTO users (id, credit_balance) VALUES (gen_random_uuid(), 500);"
            f"ALTER TABLE users OWNER TO {role}, ENABLE ROW LEVEL SECURITY, FORCE ROW LEVEL SECURITY;"
            f"GRANT CREATE ON SCHEMA public TO {role}",
            ALONE,
        )
        try:
            app.run(f"GRANT CREATE ON DATABASE {app.engine.url.database} TO {role}")
            ours = self.as_role(app, role)
            with pytest.raises(PermissionDenied, match=r"its column credit_balance cannot be told.*NO FORCE"):
                migrate.apply(ours.url, ours.config)
            app.run("ALTER TABLE users NO FORCE ROW LEVEL SECURITY", "UPDATE users SET credit_balance = 0")
            assert migrate.apply(ours.url, ours.config).changed

            app.run(
                "ALTER TABLE credit_transactions ENABLE ROW LEVEL SECURITY",
                "ALTER TABLE credit_transactions FORCE ROW LEVEL SECURITY",
            )
            with pytest.raises(PermissionDenied, match=r"public.credit_transactions .* whether it has rows"):
                migrate.undo(ours.url, ours.config)
        finally:
            app.run(f"DROP OWNED BY {role} CASCADE")

    def test_forced_policies_are_named_and_nothing_counts_what_they_hide(
        self, make_app: Callable[..., App], role: str
    ) -> None:
        app = make_app(
            f"{UUID_USERS} ALTER TABLE users OWNER TO {role}, ENABLE ROW LEVEL SECURITY, FORCE ROW LEVEL SECURITY;"
            f"GRANT CREATE ON SCHEMA public TO {role}",
            ALONE,
        )
        forced = (
            f"ow level security is forced on public.users, so it binds {role}, which the ledger's functions run as: a "
            "user or workshop that its policies hide is unknown to them. Let the owner run: ALTER TABLE public.users "
            f"NO FORCE ROW LEVEL SECURITY, or an administrator: ALTER ROLE {role} BYPASSRLS"
        )
        try:
            app.run(f"GRANT CREATE ON DATABASE {app.engine.url.database} TO {role}")
            ours = self.as_role(app, role)
            with ours.engine.connect() as conn:
                assert ("warning", f"R{forced}") in [
                    (one.severity, one.text) for one in migrate.plan(conn, ours.config).findings
                ]
            migrate.apply(ours.url, ours.config)
            with ours.engine.connect() as conn:
                assert migrate.status(conn, ours.config).warnings == (f"r{forced}",)
            app.run(
                "INSERT INTO users (id) SELECT gen_random_uuid() FROM generate_series(1, 100)",
                "UPDATE users SET credit_balance = 99, plan_tier = 'pro'",
            )
            plans = ours.config.model_copy(update={"allowances": (Allowance(plan_tier="pro", credits=1),)})
            with ours.engine.connect() as conn:
                for read in (
                    lambda: audit(conn, ours.config),
                    lambda: seed(conn, ours.config),
                    lambda: reset(conn, ours.config),
                    lambda: migrate.look_at_own_credits(conn, ours.config),
                    lambda: Allowances(plans).run(ours.engine),
                ):
                    with pytest.raises(
                        PermissionDenied, match=f"hides rows of public.users from {role}, so .* NO FORCE"
                    ):
                        read()
            app.run("ALTER TABLE users NO FORCE ROW LEVEL SECURITY")
            with ours.engine.connect() as conn:
                assert migrate.status(conn, ours.config).warnings == ()
                assert not audit(conn, ours.config).clean
        finally:
            app.run(f"DROP OWNED BY {role} CASCADE")

    def test_what_policies_hide_from_another_role_is_not_audited(self, app: App, role: str) -> None:
        migrate.apply(app.url, app.config)
        app.run(
            f"GRANT USAGE ON SCHEMA tallystick TO {role}",
            f"GRANT SELECT ON ALL TABLES IN SCHEMA public, tallystick TO {role}",
        )
        with self.as_role(app, role).engine.connect() as conn:
            assert audit(conn, app.config).users == 500
        for table in ("public.workshops", "public.credit_transactions", "tallystick.lots"):
            app.run(f"ALTER TABLE {table} ENABLE ROW LEVEL SECURITY")
            with self.as_role(app, role).engine.connect() as conn, pytest.raises(PermissionDenied) as caught:
                audit(conn, app.config)
            assert f"hides rows of {table} from {role}, so whether the balances follow from" in str(caught.value)
            assert "Run this as postgres, which owns it, or as a role with BYPASSRLS" in str(caught.value)
            app.run(f"ALTER TABLE {table} DISABLE ROW LEVEL SECURITY")

    def test_what_policies_hide_from_another_role_is_neither_counted_nor_reconciled(self, app: App, role: str) -> None:
        migrate.apply(app.url, app.config)
        app.run(
            f"GRANT USAGE ON SCHEMA tallystick TO {role}",
            f"GRANT SELECT ON ALL TABLES IN SCHEMA public, tallystick TO {role}",
        )
        ours = self.as_role(app, role)
        selling = ours.config.model_copy(update={"stripe_secret_key": "sk_test_1"})
        link, at = LocalLink(), "http://127.0.0.1:8420"
        visitor = TestClient(console(ours.config, engine=ours.engine, sign_in=link, address=at), base_url=at)
        visitor.get("/enter", params={"token": link.token})
        assert visitor.get("/").status_code == 200
        for table in ("public.users", "public.credit_transactions", "tallystick.stripe_reversals"):
            app.run(f"ALTER TABLE {table} ENABLE ROW LEVEL SECURITY")
            refused = f"hides rows of {table} from {role}, so what"
            with pytest.raises(PermissionDenied, match=refused):
                stripe.reconcile(ours.engine, selling)
            with pytest.raises(PermissionDenied, match=refused):
                Queries(ours.config, ours.engine).figures(dt.datetime.now(dt.UTC))
            page = visitor.get("/")
            assert page.status_code == 503
            assert refused in page.text
            app.run(f"ALTER TABLE {table} DISABLE ROW LEVEL SECURITY")

    def test_balances_that_policies_hide_are_not_cut_over(self, make_app: Callable[..., App], role: str) -> None:
        app = make_app(
            f"{UUID_USERS} ALTER TABLE users ADD credit_balance integer NOT NULL DEFAULT 0;"
            f"ALTER TABLE users OWNER TO {role}; GRANT CREATE ON SCHEMA public TO {role}",
            ALONE,
        )
        try:
            app.run(f"GRANT CREATE ON DATABASE {app.engine.url.database} TO {role}")
            ours = self.as_role(app, role)
            migrate.apply(ours.url, ours.config)
            app.run("ALTER TABLE users ENABLE ROW LEVEL SECURITY", "ALTER TABLE users FORCE ROW LEVEL SECURITY")
            for adopting in (migrate.adopt, migrate.cut_over):
                with pytest.raises(PermissionDenied, match="so whose balance waits to be opened cannot be told"):
                    adopting(ours.url, ours.config)
        finally:
            app.run(f"DROP OWNED BY {role} CASCADE")

    def test_status_asks_for_none(self, app: App, role: str) -> None:
        migrate.apply(app.url, app.config)
        app.run(
            f"GRANT USAGE ON SCHEMA tallystick TO {role}", f"GRANT SELECT ON ALL TABLES IN SCHEMA tallystick TO {role}"
        )
        with self.as_role(app, role).engine.connect() as conn:
            assert migrate.status(conn, app.config).healthy


class TestPropose:
    def propose(self, app: App, **asked: str) -> HostMapping:
        with app.engine.connect() as conn:
            return migrate.propose(conn, **asked)

    @pytest.mark.parametrize(
        ("ddl", "asked", "message"),
        [
            ("CREATE TABLE things (id uuid PRIMARY KEY)", {}, r"there are: public\.things\).*--users"),
            ("", {}, "none at all"),
            ("CREATE TABLE users (id numeric PRIMARY KEY)", {}, "no column that is NOT NULL, UNIQUE"),
            (UUID_USERS, {"users": "usres"}, "did you mean users"),
            (UUID_USERS, {"workshops": "courses"}, "no table courses"),
            ("CREATE VIEW users AS SELECT 1 AS id", {"users": "users"}, "is a view"),
            (f"{UUID_USERS} CREATE TABLE workshops (n int)", {}, "--workshops"),
            (f"{UUID_USERS} CREATE TABLE workshops (id int PRIMARY KEY)", {}, "refers to public.users"),
        ],
    )
    def test_says_what_to_type(
        self, make_app: Callable[..., App], ddl: str, asked: dict[str, str], message: str
    ) -> None:
        with pytest.raises(HostMismatch, match=message):
            self.propose(make_app(ddl or "SELECT 1"), **asked)

    def test_follows_the_foreign_key_to_the_users_key(self, make_app: Callable[..., App]) -> None:
        app = make_app(
            "CREATE TABLE users (id bigint PRIMARY KEY, sub text NOT NULL UNIQUE);"
            "CREATE TABLE workshops (id bigint PRIMARY KEY, user_id bigint, made_by text REFERENCES users (sub))"
        )
        found = self.propose(app)
        assert (found.users.key, found.workshops and found.workshops.owner) == ("sub", "made_by")

    def test_takes_no_workshops_where_none_are_asked_for(self, make_app: Callable[..., App]) -> None:
        app = make_app(f"{UUID_USERS} CREATE TABLE workshops (id uuid PRIMARY KEY, user_id uuid REFERENCES users)")
        assert self.propose(app, workshops="workshops").workshops == WorkshopsTable(title=None, created_at=None)
        assert self.propose(app, workshops="none").workshops is None

    def test_takes_another_table_that_is_named(self, make_app: Callable[..., App]) -> None:
        app = make_app(f"{UUID_USERS} CREATE TABLE courses (id uuid PRIMARY KEY, user_id uuid REFERENCES users)")
        assert self.propose(app).workshops is None
        assert self.propose(app, workshops="courses").workshops == WorkshopsTable(
            table="courses", title=None, created_at=None
        )


RENAMED = "Give it its name back: ALTER TABLE "
AFTERWARDS = {
    "a renamed title": (
        "ALTER TABLE workshops RENAME title TO titel",
        f"{RENAMED}public.workshops RENAME COLUMN titel TO title. If it was dropped",
        True,
    ),
    "a dropped time": (
        "ALTER TABLE workshops DROP created_at",
        "RENAME COLUMN … TO created_at. If it was dropped, add it again: ALTER TABLE public.workshops ADD COLUMN",
        True,
    ),
    "a renamed owner": (
        "ALTER TABLE workshops RENAME user_id TO owner_id",
        f"{RENAMED}public.workshops RENAME COLUMN owner_id TO user_id",
        True,
    ),
    "a renamed key": (
        "ALTER TABLE users RENAME id TO uid",
        f"{RENAMED}public.users RENAME COLUMN uid TO id",
        False,
    ),
    "renamed workshops": (
        "ALTER TABLE workshops RENAME TO events",
        "Give it that name back: ALTER TABLE public.events RENAME TO workshops",
        False,
    ),
    "users elsewhere": (
        "CREATE SCHEMA other; ALTER TABLE users SET SCHEMA other; ALTER TABLE other.users RENAME TO people",
        "ALTER TABLE other.people SET SCHEMA public; ALTER TABLE public.people RENAME TO users",
        False,
    ),
    "dropped workshops": (
        "DROP TABLE workshops CASCADE",
        "make it again, empty: CREATE TABLE public.workshops (",
        True,
    ),
    "a table that inherits": (
        "CREATE TABLE vip () INHERITS (users)",
        "Take them out: ALTER TABLE public.vip NO INHERIT public.users",
        True,
    ),
}


@pytest.mark.parametrize("name", AFTERWARDS)
def test_what_the_app_changes_afterwards_has_a_way_back(name: str, app: App) -> None:
    """The functions have the names of the migration. For a column that is only read there is another way as well."""
    change, way_back, removable = AFTERWARDS[name]
    migrate.apply(app.url, app.config)
    app.run(change)
    with app.engine.connect() as conn:
        for look in (migrate.status, migrate.plan):
            with pytest.raises(HostMismatch) as caught:
                look(conn, app.config)
            assert way_back in str(caught.value)
            only_read = name in ("a renamed title", "a dropped time", "a renamed owner")
            assert str(caught.value).endswith("and run: tallystick migrate apply") == only_read
    if removable:
        assert migrate.undo(app.url, app.config).changed
        with app.engine.connect() as conn:
            assert conn.scalar(sa.text("SELECT to_regnamespace('tallystick')")) is None
            columns = conn.scalars(sa.text("SELECT attname FROM pg_attribute WHERE attname ~ 'credit'")).all()
            assert columns == []
        return
    with pytest.raises(HostMismatch) as caught:
        migrate.undo(app.url, app.config)
    app.run(*str(caught.value).partition(" back: ")[2].split("; "))
    with app.engine.connect() as conn:
        assert migrate.status(conn, app.config).healthy


def test_the_functions_are_made_anew_for_columns_that_are_only_read(migrated: App) -> None:
    """In one transaction, which the plan shows; and other settings than the database's are refused as before."""
    migrated.run(
        "ALTER TABLE workshops RENAME title TO name",
        "ALTER TABLE workshops RENAME user_id TO owner_id",
        "ALTER TABLE workshops DROP created_at",
    )
    workshops = WorkshopsTable(owner="owner_id", title="name", created_at=None)
    now = Config(database_url=migrated.url, host=replace(migrated.config.host, workshops=workshops))
    with migrated.engine.connect() as conn:
        with pytest.raises(HostMismatch, match=r"'name', in the database 'title'.*anew: tallystick migrate apply"):
            migrate.status(conn, now)
        planned = migrate.plan(conn, now)
    changes = (
        "host.workshops.owner is 'owner_id', and was 'user_id'",
        "host.workshops.title is 'name', and was 'title'",
        "host.workshops.created_at is not set, and was 'created_at'",
    )
    assert (planned.revisions, planned.renewed) == ((), changes)
    made = {one.sql.partition("(")[0] for one in planned.statements if one.sql.startswith("CREATE")}
    assert "CREATE OR REPLACE FUNCTION tallystick.consume" in made
    assert not any(one.locks for one in planned.statements)

    done = migrate.apply(migrated.url, now)
    assert (done.changed, done.revisions, done.renewed) == (True, (), changes)
    assert not migrate.apply(migrated.url, now).changed
    with migrated.engine.begin() as conn:
        assert migrate.status(conn, now).healthy
        verify(conn, now.host)
        user, workshop, name = conn.exec_driver_sql("SELECT owner_id, id, name FROM workshops LIMIT 1").one()
        ledger = Ledger(conn)
        ledger.grant(conn, user, credits=1, key="g", description="Welcome")
        assert ledger.consume(conn, user, workshop=workshop, key="c").description.endswith(name)
    other = Config(database_url=migrated.url, host=replace(now.host, users=UsersTable(key="email", key_type="text")))
    with pytest.raises(HostMismatch, match="the settings and the database disagree"):
        migrate.apply(migrated.url, other)


def test_the_table_of_workshops_is_made_again(migrated: App) -> None:
    migrated.run("DROP TABLE workshops CASCADE")
    with migrated.engine.connect() as conn, pytest.raises(HostMismatch) as caught:
        migrate.status(conn, migrated.config)
    migrated.run(str(caught.value).partition("empty: ")[2].partition(". To take")[0])
    with migrated.engine.connect() as conn:
        (missing,) = migrate.status(conn, migrated.config).drift
    migrated.run(*missing.remedy.split("; "))
    with migrated.engine.connect() as conn:
        assert migrate.status(conn, migrated.config).healthy


def test_the_column_of_addresses_may_go(make_app: Callable[..., App]) -> None:
    """No function uses it, and the setting may differ from the stored one."""
    app = make_app(UUID_USERS, HostMapping(users=UsersTable(email="email"), workshops=None))
    migrate.apply(app.url, app.config)
    app.run("ALTER TABLE users RENAME email TO mail")
    with app.engine.connect() as conn:
        found = migrate.status(conn, app.config)
        assert (found.healthy, "Set host.users.email in tallystick.toml" in " ".join(found.warnings)) == (True, True)
        again = migrate.propose(conn)
        assert again.users.email == "mail"
        assert "host.users.email" not in " ".join(migrate.status(conn, Config(host=again)).warnings)
    assert migrate.undo(app.url, app.config).changed


def test_an_adopted_column_that_is_gone_is_not_added(make_app: Callable[..., App]) -> None:
    """The app's balances and deletions are in it, under another name."""
    app = make_app(
        f"{UUID_USERS} ALTER TABLE users ADD credits integer NOT NULL DEFAULT 0, ADD deleted_at timestamp",
        HostMapping(users=UsersTable(balance="credits"), workshops=None),
    )
    migrate.apply(app.url, app.config)
    app.run("ALTER TABLE users RENAME credits TO points", "ALTER TABLE users RENAME deleted_at TO removed_at")
    with app.engine.connect() as conn:
        found = {one.where: one for one in migrate.status(conn, app.config).drift}
    for name in ("credits", "deleted_at"):
        gone = found[f"public.users.{name}"]
        assert gone.found is None
        assert gone.remedy.startswith(f"ALTER TABLE public.users RENAME COLUMN … TO {name} if it was renamed. ")
