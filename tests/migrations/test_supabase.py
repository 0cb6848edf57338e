"""A host as Supabase makes one: who may write credits, and who is told."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import sqlalchemy as sa
from hosts import App

from tallystick import HostMapping, UsersTable, WorkshopsTable, migrate

SUPABASE = """
    DO $$ BEGIN
      IF to_regrole('anon') IS NULL THEN CREATE ROLE anon; END IF;
      IF to_regrole('authenticated') IS NULL THEN CREATE ROLE authenticated; END IF;
      IF to_regrole('service_role') IS NULL THEN CREATE ROLE service_role BYPASSRLS; END IF;
    END $$;
    CREATE SCHEMA auth;
    CREATE TABLE auth.users (id uuid PRIMARY KEY, email text);
    CREATE FUNCTION auth.uid() RETURNS uuid LANGUAGE sql STABLE AS
      $$ SELECT nullif(current_setting('request.jwt.claim.sub', true), '')::uuid $$;
    GRANT USAGE ON SCHEMA public, auth TO anon, authenticated, service_role;
    ALTER DEFAULT PRIVILEGES IN SCHEMA public GRANT ALL ON TABLES TO anon, authenticated, service_role;
    ALTER DEFAULT PRIVILEGES IN SCHEMA public GRANT ALL ON FUNCTIONS TO anon, authenticated, service_role;
    ALTER DEFAULT PRIVILEGES IN SCHEMA public GRANT ALL ON SEQUENCES TO anon, authenticated, service_role;
    CREATE TABLE public.profiles (
      id uuid PRIMARY KEY REFERENCES auth.users ON DELETE CASCADE, full_name text, avatar_url text);
    CREATE TABLE public.workshops (
      id uuid PRIMARY KEY DEFAULT gen_random_uuid(), user_id uuid NOT NULL REFERENCES public.profiles, title text,
      created_at timestamptz NOT NULL DEFAULT now());
    ALTER TABLE public.profiles ENABLE ROW LEVEL SECURITY;
    CREATE POLICY "Public profiles are viewable by everyone." ON profiles FOR SELECT USING (true);
    CREATE POLICY "Users can update own profile." ON profiles FOR UPDATE USING (auth.uid() = id);
    CREATE FUNCTION rls_auto_enable() RETURNS event_trigger LANGUAGE plpgsql AS $$
    DECLARE cmd record;
    BEGIN
      FOR cmd IN SELECT * FROM pg_event_trigger_ddl_commands() WHERE command_tag = 'CREATE TABLE' LOOP
        IF cmd.schema_name = 'public' THEN
          EXECUTE format('ALTER TABLE %s ENABLE ROW LEVEL SECURITY', cmd.object_identity);
        END IF;
      END LOOP;
    END $$;
    CREATE EVENT TRIGGER ensure_rls ON ddl_command_end EXECUTE FUNCTION rls_auto_enable();
    INSERT INTO auth.users VALUES ('00000000-0000-0000-0000-000000000001', 'a@example.com');
    INSERT INTO profiles VALUES ('00000000-0000-0000-0000-000000000001', 'Ada');
"""
MAPPING = HostMapping(users=UsersTable(table="profiles"), workshops=WorkshopsTable())
ADA = "SET request.jwt.claim.sub = '00000000-0000-0000-0000-000000000001'"


@pytest.fixture
def supabase(make_app: Callable[..., App]) -> App:
    return make_app(SUPABASE, MAPPING)


def status(app: App) -> migrate.Status:
    with app.engine.connect() as conn:
        return migrate.status(conn, app.config)


def mend(app: App) -> None:
    """Runs the remedies of all that status tells."""
    app.run(*(part for each in status(app).drift for part in each.remedy.split("; ")))


def as_role(app: App, role: str, *statements: str) -> str | None:
    """The server's error about the last statement, or None."""
    with app.engine.connect() as conn:
        conn.exec_driver_sql(ADA)
        conn.exec_driver_sql(f"SET ROLE {role}")
        try:
            for statement in statements:
                conn.exec_driver_sql(statement)
        except sa.exc.ProgrammingError as error:
            return str(error.orig)
    return None


def test_nobody_but_the_owner_gets_at_the_ledger(supabase: App) -> None:
    migrate.apply(supabase.url, supabase.config)
    assert supabase.value("SELECT relrowsecurity FROM pg_class WHERE relname = 'credit_transactions'")
    for role in ("anon", "authenticated", "service_role"):
        for statement in (
            "SELECT FROM credit_transactions",
            "DELETE FROM credit_transactions",
            "TRUNCATE credit_transactions",
            "SELECT FROM tallystick.migration_log",
        ):
            assert "permission denied" in (as_role(supabase, role, statement) or ""), (role, statement)


def test_status_fails_until_nobody_can_set_a_balance_and_its_remedies_open_nothing(supabase: App) -> None:
    migrate.apply(supabase.url, supabase.config)
    assert as_role(supabase, "authenticated", "UPDATE profiles SET credit_balance = 99") is None  # as it was found
    found = status(supabase)
    assert {(each.kind, each.where) for each in found.drift} == {("privilege", "public.profiles")}
    assert {str(each.found) for each in found.drift} == {
        f"{role} may INSERT, UPDATE" for role in ("anon", "authenticated", "service_role")
    }
    assert not found.healthy
    assert "DISABLE" not in str(found.drift)
    mend(supabase)
    assert status(supabase).healthy
    assert "permission denied" in (as_role(supabase, "authenticated", "UPDATE profiles SET credit_balance = 99") or "")
    assert as_role(supabase, "authenticated", "UPDATE profiles SET full_name = 'Ada L.'") is None


def test_privileges_on_the_ledger_are_told(supabase: App) -> None:
    migrate.apply(supabase.url, supabase.config)
    mend(supabase)
    supabase.run(
        "GRANT INSERT (id) ON credit_transactions TO anon",
        "GRANT TRUNCATE ON credit_transactions TO PUBLIC",
        "GRANT UPDATE ON tallystick.migration_log TO authenticated",
        "GRANT UPDATE (credit_balance) ON profiles TO service_role",
    )
    found = status(supabase)
    assert sorted((each.where, str(each.found)) for each in found.drift) == [
        ("public.credit_transactions", "PUBLIC may TRUNCATE"),
        ("public.credit_transactions", "anon may INSERT"),
        ("public.profiles", "service_role may UPDATE"),
        ("tallystick.migration_log", "authenticated may UPDATE"),
    ]
    mend(supabase)
    assert status(supabase).drift == ()


def test_a_view_of_the_balance_is_told(supabase: App) -> None:
    """Supabase grants all on each new view too, and row level security does not bind the view's owner."""
    migrate.apply(supabase.url, supabase.config)
    mend(supabase)
    supabase.run(
        "CREATE VIEW public.people AS SELECT * FROM profiles",
        "CREATE VIEW public.names AS SELECT id, full_name FROM profiles",
        "CREATE VIEW public.own WITH (security_invoker = on) AS SELECT * FROM profiles",
        "CREATE VIEW public.wallets AS SELECT id, credit_balance AS coins FROM people",
        "CREATE VIEW public.called AS SELECT id, full_name FROM people",
    )
    attacks = ("UPDATE people SET credit_balance = 99", "UPDATE wallets SET coins = 99")
    assert [as_role(supabase, "anon", attack) for attack in attacks] == [None, None]
    found = status(supabase)
    assert {(each.where, str(each.found)) for each in found.drift} == {
        (f"public.{view}", f"{role} may INSERT, UPDATE")
        for view in ("people", "wallets")
        for role in ("anon", "authenticated", "service_role")
    }
    mend(supabase)
    assert status(supabase).drift == ()
    for attack in attacks:
        assert "permission denied" in (as_role(supabase, "anon", attack) or "")


def test_a_policy_that_shows_billing_to_others_is_warned_of(supabase: App) -> None:
    migrate.apply(supabase.url, supabase.config)
    # the owner of these tables is a superuser, which is another warning
    warnings = [warning for warning in status(supabase).warnings if "policy" in warning]
    assert [warning.partition(" ")[0] for warning in warnings] == ["anon", "authenticated"]
    assert "the policy Public profiles are viewable by everyone. of public.profiles" in warnings[0]
    supabase.run(*(part for each in warnings for part in each.partition("meant: ")[2].split("; ")))
    assert not any("policy" in warning for warning in status(supabase).warnings)
    assert "permission denied" in (as_role(supabase, "anon", "SELECT stripe_customer_id FROM profiles") or "")
    assert as_role(supabase, "anon", "SELECT full_name FROM profiles") is None


def test_remedies_keep_balances_of_the_apps_own_and_leave_its_other_columns(make_app: Callable[..., App]) -> None:
    """Under whatever names the app had them."""
    own = SUPABASE.replace("avatar_url text", 'credits integer, "deletedAt" timestamp, "stripeCustomerId" text')
    users = UsersTable(
        table="profiles", balance="credits", deleted_at="deletedAt", stripe_customer_id="stripeCustomerId"
    )
    app = make_app(own, HostMapping(users=users))
    migrate.apply(app.url, app.config)
    migrate.cut_over(app.url, app.config)
    found = status(app)
    assert "anon may read credits, stripeCustomerId and plan_tier of other people" in found.warnings[0]
    policies = [one.partition("meant: ")[2] for one in found.warnings if "policy" in one]
    app.run(*(part for one in (*policies, *(each.remedy for each in found.drift)) for part in one.split("; ")))
    assert status(app).healthy
    for refused in (
        "SELECT credits FROM profiles",
        'SELECT "stripeCustomerId" FROM profiles',
        "UPDATE profiles SET credits = 9",
        "INSERT INTO profiles (id, credits) VALUES (gen_random_uuid(), 9)",
    ):
        assert "permission denied" in (as_role(app, "authenticated", refused) or ""), refused
    assert as_role(app, "authenticated", 'UPDATE profiles SET "deletedAt" = now()') is None
    assert as_role(app, "anon", 'SELECT "deletedAt" FROM profiles') is None


def test_undo_leaves_the_apps_privileges_as_they_were(supabase: App) -> None:
    before = supabase.dump()
    migrate.apply(supabase.url, supabase.config)
    migrate.undo(supabase.url, supabase.config)
    assert supabase.dump() == before
