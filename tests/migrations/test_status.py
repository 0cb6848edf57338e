"""Each way in which a migrated database can differ from its declaration is told, and nothing else is."""

from __future__ import annotations

import uuid
from collections import Counter
from collections.abc import Callable

import psycopg
import pytest
import sqlalchemy as sa
from hosts import App

from tallystick import HostMapping, UsersTable, WorkshopsTable, migrate
from tallystick.audit import audit
from tallystick.errors import MigrationError, PermissionDenied, SchemaError
from tallystick.migrate import Drift, functions_sql
from tallystick.migrate.checks.status import APPLY, FUNCTIONS
from tallystick.web.console.queries import Count, Queries
from worlds import World

LEDGER = "public.credit_transactions"

FOREIGN_KEY = "credit_transactions_user_fk"
DROPPED = f"ALTER TABLE credit_transactions DROP CONSTRAINT {FOREIGN_KEY}"
KEY = "credit_transactions_idempotency_key"
BODY = "() RETURNS trigger LANGUAGE plpgsql AS $$BEGIN RETURN NEW;END$$"
PINNED = "SET search_path = pg_catalog, pg_temp"
GRANT = '"grant"(uuid, integer, text, text, jsonb, timestamp with time zone)'


def anew(events: str, condition: str = "") -> str:
    return (
        "DROP TRIGGER tallystick_append_only ON credit_transactions; CREATE TRIGGER tallystick_append_only "
        f"BEFORE {events} ON credit_transactions FOR EACH ROW {condition} EXECUTE FUNCTION tallystick.append_only()"
    )


DRIFTS = [
    ("column", "public.users.plan_tier", "ALTER TABLE users ALTER plan_tier SET DEFAULT 'pro'"),
    ("column", "public.users.credit_balance", "ALTER TABLE users ALTER credit_balance TYPE bigint"),
    ("column", "public.users.onboarding_complete", "ALTER TABLE users ALTER onboarding_complete DROP NOT NULL"),
    ("column", "public.workshops.credit_consumed_at", "ALTER TABLE workshops DROP credit_consumed_at"),
    ("constraint", f"{LEDGER}.{FOREIGN_KEY}", DROPPED),
    (
        "constraint",
        f"{LEDGER}.credit_transactions_workshop_fk",
        "ALTER TABLE credit_transactions DROP CONSTRAINT credit_transactions_workshop_fk",
    ),
    (
        "constraint",
        f"{LEDGER}.{FOREIGN_KEY}",
        f"{DROPPED}, ADD CONSTRAINT {FOREIGN_KEY} FOREIGN KEY (user_id) REFERENCES users ON DELETE CASCADE",
    ),
    (
        "constraint",
        f"{LEDGER}.{FOREIGN_KEY}",
        f"{DROPPED}, ADD CONSTRAINT {FOREIGN_KEY} FOREIGN KEY (user_id) REFERENCES users ON DELETE RESTRICT",
    ),
    ("index", f"{LEDGER}.credit_transactions_completed", "DROP INDEX credit_transactions_completed"),
    (
        "index",
        f"{LEDGER}.{KEY}",
        f"DROP INDEX {KEY}; CREATE INDEX {KEY} ON credit_transactions (user_id, idempotency_key)",
    ),
    (
        "trigger",
        f"{LEDGER}.tallystick_append_only",
        "ALTER TABLE credit_transactions DISABLE TRIGGER tallystick_append_only",
    ),
    (
        "trigger",
        f"{LEDGER}.tallystick_append_only",
        "ALTER TABLE credit_transactions ENABLE REPLICA TRIGGER tallystick_append_only",
    ),
    ("trigger", f"{LEDGER}.tallystick_append_only", anew("UPDATE OR DELETE", "WHEN (false)")),
    ("trigger", f"{LEDGER}.tallystick_append_only", anew("UPDATE OF description OR DELETE")),
    (
        "trigger",
        f"{LEDGER}.swallow",
        f"CREATE TRIGGER swallow BEFORE INSERT ON {LEDGER} FOR EACH ROW EXECUTE FUNCTION tallystick.append_only()",
    ),
    ("rule", f"{LEDGER}.swallow", "CREATE RULE swallow AS ON INSERT TO credit_transactions DO INSTEAD NOTHING"),
    ("table", LEDGER, "ALTER TABLE credit_transactions SET UNLOGGED"),
    (
        "table",
        LEDGER,
        "ALTER TABLE credit_transactions ENABLE ROW LEVEL SECURITY, FORCE ROW LEVEL SECURITY",
    ),
    ("constraint", f"{LEDGER}.small", "ALTER TABLE credit_transactions ADD CONSTRAINT small CHECK (amount < 2)"),
    ("constraint", f"{LEDGER}.once", "ALTER TABLE credit_transactions ADD CONSTRAINT once UNIQUE (user_id)"),
    ("index", f"{LEDGER}.once", "CREATE UNIQUE INDEX once ON credit_transactions (user_id)"),
    ("trigger", f"{LEDGER}.tallystick_no_truncate", "DROP TRIGGER tallystick_no_truncate ON credit_transactions"),
    ("trigger", "public.users.tallystick_updated_at", "DROP TRIGGER tallystick_updated_at ON users"),
    ("trigger", "public.users.A_tallystick_buyer_stays", 'DROP TRIGGER "A_tallystick_buyer_stays" ON users'),
    ("enum", "public.credit_transaction_status", "ALTER TYPE credit_transaction_status ADD VALUE 'lost'"),
]

BOOKKEEPING_DRIFTS = [
    ("table", "tallystick.lots", "DROP TABLE tallystick.lots CASCADE"),
    ("table", "tallystick.events", "DROP TABLE tallystick.events"),
    ("table", "tallystick.event_settings", "DROP TABLE tallystick.event_settings"),
    ("table", "tallystick.low_balances", "DROP TABLE tallystick.low_balances"),
    ("table", "tallystick.lot_moves", "ALTER TABLE tallystick.lot_moves SET UNLOGGED"),
    ("column", "tallystick.lots.remaining", "ALTER TABLE tallystick.lots DROP remaining CASCADE"),
    ("column", "tallystick.events.kind", "ALTER TABLE tallystick.events ALTER kind DROP NOT NULL"),
    ("constraint", "tallystick.lots.lots_remaining", "ALTER TABLE tallystick.lots DROP CONSTRAINT lots_remaining"),
    ("constraint", "tallystick.daily_sums.daily_sums_day_fk", "DROP TABLE tallystick.days CASCADE"),
    (
        "constraint",
        "tallystick.stripe_events.stripe_events_pkey",
        "ALTER TABLE tallystick.stripe_events DROP CONSTRAINT stripe_events_pkey",
    ),
    ("constraint", "tallystick.days.few", "ALTER TABLE tallystick.days ADD CONSTRAINT few CHECK (writers_before < 9)"),
    ("index", "tallystick.lots.lots_user", "DROP INDEX tallystick.lots_user"),
    ("rule", "tallystick.events.swallow", "CREATE RULE swallow AS ON INSERT TO tallystick.events DO INSTEAD NOTHING"),
    (
        "trigger",
        "tallystick.lots.no",
        "CREATE TRIGGER no BEFORE INSERT ON tallystick.lots EXECUTE FUNCTION tallystick.append_only()",
    ),
]

FUNCTION_DRIFTS = [
    ("append_only()", f"CREATE OR REPLACE FUNCTION tallystick.append_only{BODY} {PINNED}"),
    ("append_only()", "ALTER FUNCTION tallystick.append_only() RESET search_path"),
    ("utc(date)", "DROP FUNCTION tallystick.utc(date)"),
    ("uuid7()", "ALTER FUNCTION tallystick.uuid7() STRICT"),
    (GRANT, f"ALTER FUNCTION tallystick.{GRANT} SECURITY INVOKER"),
    (GRANT, f"ALTER FUNCTION tallystick.{GRANT} SET search_path = public"),
    (GRANT, f"ALTER FUNCTION tallystick.{GRANT} STABLE"),
    (GRANT, f"GRANT EXECUTE ON FUNCTION tallystick.{GRANT} TO PUBLIC"),
    (GRANT, f"ALTER FUNCTION tallystick.{GRANT} OWNER TO pg_monitor"),
    (
        "kept_as(timestamp with time zone, timestamp without time zone)",
        (
            "CREATE OR REPLACE FUNCTION tallystick.kept_as(moment timestamptz, in_column timestamp) RETURNS timestamp"
            " LANGUAGE sql IMMUTABLE AS $$ SELECT moment AT TIME ZONE 'CET' $$"
        ),
    ),
    (
        "balance(uuid)",
        (
            "DROP FUNCTION tallystick.balance(uuid); CREATE FUNCTION tallystick.balance(someone uuid)"
            f" RETURNS tallystick.answer LANGUAGE plpgsql STABLE SECURITY DEFINER {PINNED}"
            " AS $$BODY$$; REVOKE ALL ON FUNCTION tallystick.balance FROM PUBLIC"
        ),
    ),
    ("utc(text)", "CREATE FUNCTION tallystick.utc(text) RETURNS timestamptz LANGUAGE sql AS 'SELECT now()'"),
]

# of another type, default or body: what to do depends on who uses it
FOR_A_PERSON = {change for kind, _, change in DRIFTS if kind == "enum" or " ALTER " in change}


def drift(app: App) -> tuple[Drift, ...]:
    with app.engine.connect() as conn:
        return migrate.status(conn, app.config).drift


def test_it_asks_about_all_tables_at_once(world: World) -> None:
    """A database far away answers each statement after tens of milliseconds."""
    asked = []
    with world.engine.connect() as conn:
        sa.event.listen(conn, "before_cursor_execute", lambda *given: asked.append(given[2]))
        assert migrate.status(conn, world.config).healthy
    tables = len(world.schema.bookkeeping)
    assert tables > 15
    assert max(Counter(asked).values()) < tables / 2, Counter(asked).most_common(3)


def test_right_after_a_migration_nothing_differs(migrated: App) -> None:
    """Nor in the tests below before their change, whose databases are copies of the same one."""
    assert drift(migrated) == ()


@pytest.mark.parametrize(
    ("kind", "where", "change"), BOOKKEEPING_DRIFTS, ids=[change[:60] for _, _, change in BOOKKEEPING_DRIFTS]
)
def test_a_change_in_our_own_schema_is_found_and_mended(kind: str, where: str, change: str, migrated: App) -> None:
    migrated.run(change)
    found = drift(migrated)
    assert (kind, where) in {(one.kind, one.where) for one in found}
    for one in found:
        if one.kind == "column":  # its values are lost, or nulls came in
            assert ("restore it from one" in one.remedy) == (one.found is None)
            return
        migrated.run(*one.remedy.split("; "))
    assert drift(migrated) == ()
    with migrated.engine.connect() as conn:
        assert audit(conn, migrated.config).clean


def test_names_of_ours_in_the_apps_schema(make_app: Callable[..., App]) -> None:
    """The app's own events, days and lots are nothing of the ledger's."""
    app = make_app(
        """
        CREATE TABLE lots (id integer PRIMARY KEY);
        CREATE TABLE events (id integer PRIMARY KEY, user_id integer REFERENCES lots, title text, created_at timestamp);
        """,
        HostMapping(
            users=UsersTable(table="lots", key_type="integer"),
            workshops=WorkshopsTable(table="events", key_type="integer"),
        ),
    )
    migrate.apply(app.url, app.config)
    assert drift(app) == ()


@pytest.mark.parametrize("table", ["alembic_version", "migration_log", "mapping"])
def test_a_database_without_its_revision_or_mapping_is_not_taken_for_a_new_one(migrated: App, table: str) -> None:
    migrated.run(f"DROP TABLE tallystick.{table}")
    for run in (migrate.apply, migrate.undo):
        with pytest.raises(SchemaError, match=rf"tallystick\.{table} is missing or empty: .* Restore that table"):
            run(migrated.url, migrated.config)
    with pytest.raises(SchemaError, match="Restore that table from a backup"):
        drift(migrated)


@pytest.mark.parametrize(("kind", "where", "change"), DRIFTS, ids=[change[:60] for _, _, change in DRIFTS])
def test_a_difference_is_told(migrated: App, kind: str, where: str, change: str) -> None:
    migrated.run(*change.split("; "))
    [found] = drift(migrated)
    assert (found.kind, found.where) == (kind, where)
    assert found.found != found.expected
    assert str(found).startswith(f"{kind} {where}: ")
    if change in FOR_A_PERSON:
        assert found.remedy == ""
        return
    migrated.run(*found.remedy.split("; "))
    assert drift(migrated) == ()


def test_a_column_that_the_app_had_and_that_is_gone_is_told_with_the_way_back(app: App) -> None:
    """An empty one in its place would hide that its values are elsewhere, or lost."""
    app.run("ALTER TABLE users ADD updated_at timestamptz NOT NULL DEFAULT now()")
    migrate.apply(app.url, app.config)
    app.run("ALTER TABLE users RENAME updated_at TO changed_at")
    [gone] = drift(app)
    assert (gone.where, gone.found) == ("public.users.updated_at", None)
    statement, _, otherwise = gone.remedy.partition(" if it was renamed. ")
    assert otherwise == "If it was dropped, only a backup has its values: restore it from one"
    app.run(statement.replace("…", "changed_at"))
    assert drift(app) == ()


@pytest.mark.parametrize("balances", ["ours", "the app's own"])
def test_another_function_is_told_and_put_back(app: App, balances: str) -> None:
    """Its body, its options, its owner, and who may call it; of all with one name, the one that differs."""
    if balances != "ours":
        app.run("ALTER TABLE users ADD credit_balance integer")
    migrate.apply(app.url, app.config)
    left = list(FUNCTION_DRIFTS)
    while left:
        changes: dict[str, tuple[str, str]] = {}  # at most one of each name at a time
        for name, change in left:
            changes.setdefault(name.partition("(")[0], (name, change))
        left = [each for each in left if each not in changes.values()]
        body = app.value("SELECT prosrc FROM pg_proc WHERE oid = 'tallystick.balance(uuid)'::regprocedure")
        for _, change in changes.values():
            app.run(*change.replace("$$BODY$$", f"$${body}$$").split("; "))
        found = drift(app)
        told = {("function", f"tallystick.{name}") for name, _ in changes.values()}
        assert {(each.kind, each.where) for each in found} == told
        remedies = dict.fromkeys(part for each in found for part in each.remedy.split("; then: "))
        for remedy in sorted(remedies, key=FUNCTIONS.__eq__):  # all of them last: one must be dropped before
            with app.engine.connect() as conn:
                script = functions_sql(conn, app.config) if remedy == FUNCTIONS else remedy
            with psycopg.connect(app.url.replace("+psycopg", ""), autocommit=True) as owner:
                owner.execute(script.encode())
        assert drift(app) == (), changes


def test_another_answer_is_told(migrated: App) -> None:
    migrated.run("ALTER TYPE tallystick.account_answer ADD ATTRIBUTE more text CASCADE")
    [found] = drift(migrated)
    assert (found.kind, found.where) == ("type", "tallystick.account_answer")
    assert found.found == f"{found.expected}, more text"


def test_what_an_interrupted_run_left_is_for_the_next_one_to_mend(migrated: App) -> None:
    migrated.run("DROP INDEX tallystick_users_stripe_customer_id")
    assert [found.remedy for found in drift(migrated)] == [APPLY]
    migrate.apply(migrated.url, migrated.config)
    assert drift(migrated) == ()


def test_foreign_keys_that_are_off_are_told(migrated: App) -> None:
    migrated.run(
        "ALTER TABLE credit_transactions DISABLE TRIGGER ALL", "ALTER TABLE credit_transactions ENABLE TRIGGER USER"
    )
    found = drift(migrated)
    assert {each.where.rpartition("_transactions_")[2] for each in found} == {"user_fk", "workshop_fk", "refund_fk"}
    assert all(str(each.found).endswith(" DISABLED") for each in found)
    migrated.run(*{each.remedy for each in found})
    assert drift(migrated) == ()


def test_row_security_that_does_not_bind_the_owner_is_no_difference(migrated: App) -> None:
    migrated.run(
        "ALTER TABLE credit_transactions ENABLE ROW LEVEL SECURITY", "GRANT SELECT ON credit_transactions TO PUBLIC"
    )
    assert drift(migrated) == ()
    migrated.run("ALTER TABLE credit_transactions FORCE ROW LEVEL SECURITY")
    [found] = drift(migrated)
    assert "row level security that binds its owner" in str(found)
    assert found.remedy == "ALTER TABLE public.credit_transactions NO FORCE ROW LEVEL SECURITY"


def test_what_is_the_apps_own_is_no_difference(migrated: App) -> None:
    migrated.run(
        "ALTER TABLE users ADD nickname text, ALTER email SET STATISTICS 500",
        "CREATE INDEX ON users (plan_tier)",
        "CREATE INDEX by_month ON workshops (credit_consumed_at)",
        "CREATE INDEX by_price ON credit_transactions (stripe_price_id)",
        "CREATE FUNCTION tell() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END'",
        "CREATE TRIGGER tell AFTER INSERT ON credit_transactions FOR EACH ROW EXECUTE FUNCTION tell()",
        "ALTER TABLE credit_transactions ENABLE ALWAYS TRIGGER tallystick_append_only, ENABLE ROW LEVEL SECURITY",
        "ANALYZE",
    )
    assert drift(migrated) == ()


def test_a_name_with_a_percent_sign_is_no_difference(make_app: Callable[..., App]) -> None:
    app = make_app(
        'CREATE SCHEMA "50% off"; CREATE TABLE "50% off".users (id integer PRIMARY KEY);'
        'INSERT INTO "50% off".users SELECT generate_series(1, 1500); ANALYZE',
        HostMapping(users=UsersTable(schema="50% off", key_type="integer"), workshops=None),
    )
    migrate.apply(app.url, app.config)
    assert drift(app) == ()
    assert Queries(app.config, app.engine).sizes()[0] == Count(1500, "about ")


def test_the_options_of_a_column_are_no_difference(migrated: App) -> None:
    """An app's options for the planner, and ``pg_attver=N`` on all columns from the minor releases of November 2026 on;
    older ones are made to look so."""
    migrated.run(
        "ALTER TABLE credit_transactions ALTER user_id SET (n_distinct = -0.05)",
        "UPDATE pg_attribute SET attoptions = attoptions || ARRAY['pg_attver=' || attrelid::text] "
        "WHERE attrelid IN ('users'::regclass, 'workshops'::regclass, 'credit_transactions'::regclass) AND attnum > 0 "
        "AND attoptions::text ~ 'pg_attver' IS NOT TRUE",
    )
    assert drift(migrated) == ()


def test_looking_waits_for_nobody_and_leaves_nothing(migrated: App) -> None:
    """Not even for a report that reads the ledger, or a vacuum of it."""
    shape = migrated.shape()
    with migrated.engine.connect() as other, migrated.engine.connect() as conn:
        other.exec_driver_sql("LOCK TABLE credit_transactions IN SHARE UPDATE EXCLUSIVE MODE")
        conn.exec_driver_sql("SET LOCAL lock_timeout = '2s'")
        assert migrate.status(conn, migrated.config).healthy
        held = conn.exec_driver_sql(
            "SELECT DISTINCT mode FROM pg_locks WHERE pid = pg_backend_pid() "
            "AND relation IN ('users'::regclass, 'credit_transactions'::regclass)"
        ).scalars()
        assert set(held) <= {"AccessShareLock"}
    assert migrated.shape() == shape


def test_a_role_that_makes_no_temporary_tables_is_told_the_grant(app: App, request: pytest.FixtureRequest) -> None:
    database, role = sa.make_url(app.url).database, f"no temp {uuid.uuid4().hex}"
    app.run(
        f'CREATE ROLE "{role}" LOGIN',
        f'GRANT CREATE ON SCHEMA public TO "{role}"',
        *(f'ALTER TABLE {table} OWNER TO "{role}"' for table in ("users", "workshops")),
        f"REVOKE TEMPORARY ON DATABASE {database} FROM PUBLIC",
    )
    request.addfinalizer(lambda: app.run(f'DROP OWNED BY "{role}" CASCADE', f'DROP ROLE "{role}"'))
    owner = sa.create_engine(sa.make_url(app.url).set(username=role), poolclass=sa.NullPool)
    grant = f'GRANT TEMPORARY ON DATABASE {database} TO "{role}"'
    with owner.connect() as conn:
        assert any(grant in finding.text for finding in migrate.plan(conn, app.config).findings)
    migrate.apply(app.url, app.config)
    app.run(
        f'GRANT USAGE ON SCHEMA tallystick TO "{role}"', f'GRANT SELECT ON ALL TABLES IN SCHEMA tallystick TO "{role}"'
    )
    with owner.connect() as conn, pytest.raises(PermissionDenied, match=f"run: {grant}"):
        migrate.status(conn, app.config)
    app.run(grant)
    with owner.connect() as conn:
        migrate.status(conn, app.config)


def test_transactions_that_are_read_only_are_told_the_way(migrated: App) -> None:
    migrated.run(f"ALTER DATABASE {sa.make_url(migrated.url).database} SET default_transaction_read_only = on")
    with (
        migrated.engine.connect() as conn,
        pytest.raises(MigrationError, match="PGOPTIONS='-c default_transaction_read_onl"),
    ):
        migrate.status(conn, migrated.config)
