"""Revision 0001 on every kind of host: what it makes is what is declared, and undo leaves no trace."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import sqlalchemy as sa
from hosts import HOSTS, App, HostCase
from sqlalchemy.schema import CreateColumn, CreateSchema

from tallystick import migrate
from tallystick.declared_tables import Schema, alembic_version, user_columns, workshop_columns
from tallystick.errors import LedgerNotEmpty, MigrationError, NotMigrated
from tallystick.migrate.revisions import HostNames
from tallystick.schema import HEAD, verify


@pytest.fixture(params=HOSTS)
def case(request: pytest.FixtureRequest) -> HostCase:
    return HOSTS[request.param]


@pytest.fixture
def host(case: HostCase, make_app: Callable[..., App]) -> App:
    return make_app(case.ddl, case.mapping)


def test_init_proposes_the_mapping(case: HostCase, host: App) -> None:
    with host.engine.connect() as conn:
        assert migrate.propose(conn, **(case.asked or {})) == case.mapping


def test_up_and_down_leaves_no_trace(host: App) -> None:
    before = host.dump()

    migrate.apply(host.url, host.config)
    assert host.dump() != before
    migrate.undo(host.url, host.config)

    assert host.dump() == before


def test_a_second_run_changes_nothing(case: HostCase, host: App) -> None:
    first = migrate.apply(host.url, host.config)
    assert (first.before, first.after, first.changed) == (None, HEAD, True)
    assert first.adopted == case.adopted
    after = host.dump()

    second = migrate.apply(host.url, host.config)

    assert (second.before, second.after, second.changed) == (HEAD, HEAD, False)
    assert host.dump() == after


def test_the_migrated_database_is_as_declared(case: HostCase, host: App, make_app: Callable[..., App]) -> None:
    migrate.apply(host.url, host.config)
    # triggers, functions and a table without rows are the only parts that the declarations do not hold
    adopted = frozenset((word, name) for word, _, name in (each.partition(".") for each in case.adopted))
    names = HostNames.of(host.config.host, adopted)  # the words of the mapping
    host.run(
        "DROP FUNCTION IF EXISTS tallystick.follow_balance CASCADE",
        *(statement.as_string(None) for statement in names.drop_functions(HEAD)),
        *(statement.as_string(None) for statement in names.drop_types(HEAD)),
        "DROP FUNCTION tallystick.append_only CASCADE",
        "DROP FUNCTION tallystick.buyer_stays CASCADE",
        "DROP FUNCTION IF EXISTS tallystick.touch_updated_at CASCADE",
        "DROP TABLE IF EXISTS tallystick.workshops",
    )
    declared = make_app(case.ddl, case.mapping)
    create_as_declared(declared, case)

    assert host.dump("--schema-only") == declared.dump("--schema-only")


def create_as_declared(app: App, case: HostCase) -> None:
    schema = Schema.of(case.mapping)
    with app.engine.begin() as conn:
        quote = conn.dialect.identifier_preparer.format_table
        for word, table, columns in (
            ("users", schema.users, user_columns()),
            ("workshops", schema.workshops, workshop_columns()),
        ):
            for column in columns:
                if table is not None and f"{word}.{column.key}" not in case.adopted:
                    added = CreateColumn(table.c[column.key]).compile(conn)
                    conn.exec_driver_sql(f"ALTER TABLE {quote(table)} ADD COLUMN {added}")
        for enum in (schema.credit_transactions.c.type.type, schema.credit_transactions.c.status.type):
            enum.create(conn)
        schema.credit_transactions.create(conn, checkfirst=True)  # SQLAlchemy 2.0 would make the types once more
        schema.users_stripe_customer.create(conn)
        schema.users_due.create(conn)
        conn.execute(CreateSchema("tallystick"))
        schema.lots.create(conn)
        schema.low_balances.create(conn)
        schema.lot_moves.create(conn)
        alembic_version.metadata.create_all(conn)


def test_status_is_healthy_and_verify_content(host: App) -> None:
    with host.engine.connect() as conn:
        assert migrate.status(conn, host.config).revision is None
        with pytest.raises(NotMigrated, match="tallystick migrate apply"):
            verify(conn)

    migrate.apply(host.url, host.config)

    with host.engine.connect() as conn:
        status = migrate.status(conn, host.config)
        assert status.healthy, status.drift
        verify(conn)


def test_everyone_starts_with_nothing(app: App) -> None:
    migrate.apply(app.url, app.config)

    assert app.rows(
        "SELECT DISTINCT credit_balance, credit_sequence, onboarding_complete, stripe_customer_id, plan_tier,"
        " deleted_at FROM users"
    ) == [(0, 0, False, None, "free", None)]
    assert app.rows("SELECT DISTINCT credit_consumed_at, deleted_at FROM workshops") == [(None, None)]


def test_updated_at_follows_every_change_when_we_brought_it(migrated: App) -> None:
    before = migrated.value("SELECT max(updated_at) FROM users")

    migrated.run("UPDATE users SET email = 'changed' WHERE email = 'user 1'")

    assert migrated.value("SELECT updated_at FROM users WHERE email = 'changed'") > before
    assert migrated.value("SELECT max(updated_at) FROM users WHERE email <> 'changed'") == before


def test_a_host_that_had_updated_at_keeps_its_own_way(make_app: Callable[..., App]) -> None:
    app = make_app(
        "CREATE TABLE users (id uuid PRIMARY KEY, email text, updated_at timestamp); CREATE TABLE workshops"
        " (id uuid PRIMARY KEY, user_id uuid, title text, created_at timestamptz);"
        "INSERT INTO users VALUES (gen_random_uuid(), 'x', '2020-01-01')"
    )
    migrate.apply(app.url, app.config)

    app.run("UPDATE users SET plan_tier = 'gold'")

    assert str(app.value("SELECT updated_at FROM users")) == "2020-01-01 00:00:00"


def test_the_log_tells_what_the_receipt_tells(app: App) -> None:
    receipt = migrate.apply(app.url, app.config)

    assert [(online.name, online.outcome) for online in receipt.online] == [
        ("tallystick_users_stripe_customer_id", "built"),
        ("tallystick_users_credit_due_at", "built"),
        ("credit_transactions_type", "validated"),
        ("credit_transactions_held", "validated"),
        ("credit_transactions_completed_at", "built"),
    ]
    with app.engine.connect() as conn:
        log = migrate.status(conn, app.config).history
    assert log[-1].revision == HEAD
    assert [(row.revision, row.direction) for row in log] == [(revision, "apply") for revision in receipt.revisions]
    last = (log[-1].attempts, log[-1].locked_ms, log[-1].duration_ms)
    assert last == (receipt.attempts, receipt.locked_ms, receipt.duration_ms)
    assert all(row.locked_ms is None for row in log[:-1])  # they were one transaction


class TestUndo:
    def test_is_refused_while_the_ledger_has_rows(self, migrated: App) -> None:
        migrated.run(a_purchase)
        before = migrated.dump()

        with pytest.raises(LedgerNotEmpty, match=r"holds 1 credit transaction, .* --discard-ledger") as refused:
            migrate.undo(migrated.url, migrated.config)

        assert refused.value.rows == 1
        assert migrated.dump() == before

    def test_may_be_told_to_discard_them(self, app: App) -> None:
        before = app.dump()
        migrate.apply(app.url, app.config)
        app.run(a_purchase)

        migrate.undo(app.url, app.config, discard_ledger=True)

        assert app.dump() == before

    def test_of_nothing_does_nothing(self, app: App) -> None:
        before = app.dump()
        assert not migrate.undo(app.url, app.config).changed
        assert app.dump() == before

    def test_tells_what_of_the_hosts_depends_on_it(self, migrated: App) -> None:
        migrated.run("CREATE VIEW rich AS SELECT id FROM users WHERE credit_balance > 9")
        before = migrated.dump()

        with pytest.raises(MigrationError, match=r"rule _RETURN on view public.rich"):
            migrate.undo(migrated.url, migrated.config)

        assert migrated.dump() == before


a_purchase = (
    "INSERT INTO credit_transactions (id, user_id, type, status, amount, description)"
    " SELECT gen_random_uuid(), id, 'purchase', 'pending', 3, 'three' FROM users LIMIT 1"
)


def test_the_script_does_the_same_as_the_run(app: App, make_app: Callable[..., App]) -> None:
    other = make_app()
    migrate.apply(app.url, app.config)
    with other.engine.connect() as conn:
        script = migrate.sql(conn, other.config)

    other.psql(script)

    def without_log(dump: str) -> str:
        return "\n".join(line for line in dump.splitlines() if "\tapply\t" not in line)

    stored = "SELECT host, the_only_row FROM tallystick.mapping"
    assert other.rows(stored) == app.rows(stored)
    ids = "--exclude-table-data=tallystick.mapping", "--exclude-table-data=users", "--exclude-table-data=workshops"
    assert without_log(other.dump(*ids)) == without_log(app.dump(*ids))


def test_the_script_may_be_written_without_a_database(make_app: Callable[..., App]) -> None:
    app = make_app()
    with app.engine.connect() as conn:
        assert migrate.sql(None, app.config) == migrate.sql(conn, app.config)


def test_the_script_of_a_migrated_database_is_empty(migrated: App) -> None:
    with migrated.engine.connect() as conn:
        assert "nothing to do" in migrate.sql(conn, migrated.config)
        assert "ALTER" not in migrate.sql(conn, migrated.config)


def test_the_package_knows_the_newest_revision() -> None:
    assert migrate.revisions()[-1].revision == HEAD


def test_every_revision_says_what_it_is() -> None:
    assert all(revision.kind in ("expand", "contract") and revision.title for revision in migrate.revisions())


def test_an_engine_is_as_good_as_an_address(app: App) -> None:
    pooled = sa.create_engine(app.url, pool_size=1, max_overflow=0)
    migrate.apply(pooled, app.config)
    with pooled.connect() as conn:
        assert conn.exec_driver_sql("SHOW statement_timeout").scalar() == "0"
        assert conn.exec_driver_sql("SHOW application_name").scalar() == ""
    pooled.dispose()
