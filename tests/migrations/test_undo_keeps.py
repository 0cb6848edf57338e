"""undo drops nothing of the app's own in silence, and says what stands in its way."""

from __future__ import annotations

import pytest
from hosts import App

from tallystick import migrate
from tallystick.errors import MigrationError

OWN = {
    "index public.by_email": "CREATE UNIQUE INDEX by_email ON users (email) WHERE deleted_at IS NULL",
    "index public.by_tier": "CREATE INDEX by_tier ON users (plan_tier)",
    "index public.opened": "CREATE INDEX opened ON workshops ((credit_consumed_at AT TIME ZONE 'UTC'))",
    "constraint paying on table public.users": "ALTER TABLE users ADD CONSTRAINT paying CHECK (plan_tier <> email)",
    "constraint once on table public.users": "ALTER TABLE users ADD CONSTRAINT once UNIQUE (email, plan_tier)",
    "statistics object public.tiers": "CREATE STATISTICS tiers ON plan_tier, email FROM users",
    "rule _RETURN on view public.paid": "CREATE VIEW paid AS SELECT id FROM users WHERE credit_balance > 0",
    "policy living on table public.users": "CREATE POLICY living ON users USING (deleted_at IS NULL)",
    "trigger moved on table public.users": (
        "CREATE FUNCTION moved() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END'; CREATE TRIGGER moved "
        "AFTER UPDATE OF plan_tier ON users FOR EACH ROW EXECUTE FUNCTION moved()"
    ),
}


def test_what_depends_on_our_columns_is_named_and_kept(app: App) -> None:
    migrate.apply(app.url, app.config)
    app.psql(";\n".join(OWN.values()) + ";")
    before = app.dump()
    with pytest.raises(MigrationError, match="undo would drop what is yours") as caught:
        migrate.undo(app.url, app.config)
    for name in OWN:
        assert name in str(caught.value)
    assert str(caught.value).count(" on table public.users") == 4
    assert "tallystick" not in str(caught.value).partition("Nothing was changed")[0]
    assert app.dump() == before


@pytest.mark.parametrize("name", [name for name in OWN if name.startswith(("index", "constraint", "statistics"))])
def test_each_alone_is_enough(name: str, app: App) -> None:
    migrate.apply(app.url, app.config)
    app.psql(OWN[name])
    with pytest.raises(MigrationError, match=name):
        migrate.undo(app.url, app.config)


def test_without_them_it_goes_through(app: App) -> None:
    before = app.dump()
    app.psql("CREATE INDEX mine ON users (email); CREATE STATISTICS mine_too ON id, email FROM users")
    migrate.apply(app.url, app.config)
    app.psql("CREATE INDEX theirs ON credit_transactions (stripe_price_id)")
    migrate.undo(app.url, app.config)
    app.psql("DROP INDEX mine; DROP STATISTICS mine_too")
    assert app.dump() == before


NO_DROPS = """
    CREATE FUNCTION no_drops() RETURNS event_trigger LANGUAGE plpgsql AS
      $$ BEGIN RAISE EXCEPTION 'nothing is dropped on Fridays'; END $$;
    CREATE EVENT TRIGGER "no drops" ON sql_drop EXECUTE FUNCTION no_drops();
"""


def test_an_event_trigger_that_forbids_drops(app: App) -> None:
    app.psql(NO_DROPS)
    with app.engine.connect() as conn:
        findings = [finding.text for finding in migrate.plan(conn, app.config).findings]
    assert any(
        'The event trigger "no drops" (sql_drop, public.no_drops) runs for what the migration does' in f
        for f in findings
    )
    # the second revision puts a constraint in another's place
    with pytest.raises(MigrationError, match=r'event trigger "no drops" forbids it.*Nothing was changed') as stopped:
        migrate.apply(app.url, app.config)
    with app.engine.connect() as conn:
        assert migrate.status(conn, app.config).revision is None
    off, _, on = str(stopped.value).partition("Let its owner run: ")[2].partition("; then run this again, then: ")
    app.run(off)
    migrate.apply(app.url, app.config)
    app.run(on.partition(". ")[0])
    with app.engine.connect() as conn:
        assert migrate.status(conn, app.config).healthy
    with pytest.raises(MigrationError, match='event trigger "no drops" forbids it: nothing is dropped on') as caught:
        migrate.undo(app.url, app.config)
    with app.engine.connect() as conn:
        assert migrate.status(conn, app.config).healthy
    first, _, last = str(caught.value).partition("Let its owner run: ")[2].partition("; then run this again, then: ")
    app.run(first)
    migrate.undo(app.url, app.config)
    app.run(last)


def test_an_event_trigger_that_forbids_everything(app: App) -> None:
    app.psql(NO_DROPS.replace("ON sql_drop", "ON ddl_command_start"))
    with pytest.raises(
        MigrationError, match=r"forbids it: nothing is dropped .* Nothing was changed. Let its owner run"
    ):
        migrate.apply(app.url, app.config)
    with app.engine.connect() as conn:
        assert migrate.status(conn, app.config).revision is None
