"""Revision 0002 on a ledger that is in use: the label, the weaker rule, and the way back."""

from __future__ import annotations

import sqlalchemy as sa

from tallystick import migrate
from tallystick.migrate.revisions import HostNames, revisions
from tallystick.migrate.statements import downward, text
from tallystick.schema import verify
from worlds import World


def step_down(world: World) -> None:
    """From 0002 to 0001, as a package that knew only 0001 would find it."""
    messages = downward([revisions()[1]], HostNames.of(world.config.host), discard_ledger=True, stall_budget_ms=1000)
    with world.autocommit.connect() as conn:
        for message in (messages.opening, messages.locked):
            conn.connection.dbapi_connection.execute(text(message), prepare=False)


def revision(world: World) -> str | None:
    with world.engine.begin() as conn:
        return migrate.status(conn, world.config).revision


def test_the_migrated_database_is_the_declared_one(any_world: World):
    with any_world.engine.begin() as conn:
        found = migrate.status(conn, any_world.config)
        verify(conn)
    assert found.drift == ()
    assert found.healthy


def test_a_ledger_in_use_is_brought_from_0001_to_0002(any_world: World):
    user = any_world.user(credits=5)
    step_down(any_world)
    assert revision(any_world) == "0001"
    with any_world.engine.begin() as conn:
        any_world.ledger.consume(conn, user, key="on 0001")  # the older schema still serves
    receipt = migrate.apply(any_world.url, any_world.config)
    assert [step.revision for step in receipt.steps] == ["0002"]
    assert [(step.name, step.outcome) for step in receipt.online] == [("credit_transactions_refund_of", "validated")]
    with any_world.engine.begin() as conn:
        assert migrate.status(conn, any_world.config).healthy
        given = any_world.ledger.grant(conn, user, credits=2, key="sorry", description="Goodwill")
    assert (given.type, given.balance_after) == ("grant", 6)
    assert not migrate.apply(any_world.url, any_world.config).changed


def test_a_validation_that_was_interrupted_is_finished_by_the_next_run(world: World):
    with world.engine.begin() as conn:
        ledger = world.schema.credit_transactions
        rule = next(c for c in ledger.constraints if c.name == "credit_transactions_refund_of")
        conn.execute(sa.schema.DropConstraint(rule))
        conn.exec_driver_sql(
            "ALTER TABLE credit_transactions ADD CONSTRAINT credit_transactions_refund_of "
            f"CHECK ({rule.sqltext}) NOT VALID"
        )
        assert [drift.where for drift in migrate.status(conn, world.config).drift] == [
            "public.credit_transactions.credit_transactions_refund_of"
        ]
    receipt = migrate.apply(world.url, world.config)
    assert [(step.name, step.outcome) for step in receipt.online] == [("credit_transactions_refund_of", "validated")]
    with world.engine.begin() as conn:
        assert migrate.status(conn, world.config).healthy


def test_undo_takes_everything_out_again(any_world: World):
    user = any_world.user()
    with any_world.engine.begin() as conn:
        given = any_world.ledger.grant(conn, user, credits=2, key="k", description="Goodwill")
        assert given.balance_after == 2
    receipt = migrate.undo(any_world.url, any_world.config, discard_ledger=True)
    assert [step.revision for step in receipt.steps] == ["0002", "0001"]
    with any_world.engine.begin() as conn:
        left = "SELECT count(*) FROM pg_type WHERE typname LIKE 'credit_transaction%' OR typname LIKE 'stripe_%'"
        assert conn.exec_driver_sql(left.replace("%", "%%")).scalar_one() == 0
        assert conn.exec_driver_sql("SELECT to_regnamespace('tallystick')").scalar_one() is None
    assert migrate.apply(any_world.url, any_world.config).after == "0002"


def test_from_0001_it_goes_on_in_either_direction(make_world):
    world = make_world()
    step_down(world)
    migrate.apply(world.url, world.config)
    with world.engine.begin() as conn:
        assert migrate.status(conn, world.config).healthy
    step_down(world)
    assert migrate.undo(world.url, world.config).after is None
