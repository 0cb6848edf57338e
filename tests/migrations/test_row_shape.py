"""Objects of an app that depend on all columns of its tables: found before, or by the run before its commit."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import sqlalchemy as sa
from hosts import App

from tallystick import Config, HostMapping, UsersTable, WorkshopsTable, migrate
from tallystick.errors import HostMismatch, MigrationError

AUDIT = """
    CREATE TABLE users_audit (op "char", at timestamptz, by text, id uuid, email text);
    CREATE FUNCTION audit() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN {body} RETURN NULL; END $$;
    CREATE TRIGGER audit AFTER INSERT OR UPDATE OR DELETE ON users FOR EACH ROW EXECUTE FUNCTION audit();
"""

# of PostgreSQL's manual, word by word
MANUAL = """
    IF (TG_OP = 'DELETE') THEN
        INSERT INTO users_audit SELECT 'D', now(), current_user, OLD.*;
    ELSIF (TG_OP = 'UPDATE') THEN
        INSERT INTO users_audit SELECT 'U', now(), current_user, NEW.*;
    ELSIF (TG_OP = 'INSERT') THEN
        INSERT INTO users_audit SELECT 'I', now(), current_user, NEW.*;
    END IF;
"""

SEEN = {
    "the manual's audit trigger": (AUDIT.format(body=MANUAL), "the function audit(), which the trigger audit on users"),
    "values, with a list of columns": (
        AUDIT.format(body="INSERT INTO users_audit (id, email) VALUES (NEW.*);"),
        "Name the columns in it, on both sides of the INSERT",
    ),
    "a statement put together": (
        AUDIT.format(body="EXECUTE 'INSERT INTO users_audit SELECT $2, now(), ''x'', ($1).*' USING NEW, 'U';"),
        "copies whole rows",
    ),
    "a function of the row type": (
        "CREATE FUNCTION known() RETURNS SETOF users LANGUAGE sql AS 'SELECT id, email FROM users'",
        "the function known() lists the columns of rows",
    ),
    "the same in PL/pgSQL": (
        """CREATE FUNCTION known() RETURNS SETOF users LANGUAGE plpgsql AS
        $$ BEGIN RETURN QUERY SELECT u.id, u.email FROM users u WHERE u.email > ''; END $$""",
        "Select * there",
    ),
    "a body that is no text": (
        "CREATE FUNCTION known() RETURNS SETOF users LANGUAGE sql BEGIN ATOMIC SELECT * FROM users; END",
        "the function known() lists the columns of rows",
    ),
    "columns of a function": (
        """CREATE FUNCTION known() RETURNS TABLE (a uuid, b text) LANGUAGE plpgsql AS
        $$ BEGIN RETURN QUERY SELECT * FROM public.users; END $$""",
        "gives every column",
    ),
    "a copy of the table": (
        """CREATE TABLE gone (LIKE users); CREATE FUNCTION archive(x uuid) RETURNS void LANGUAGE sql AS
        'INSERT INTO gone SELECT * FROM users WHERE id = x'""",
        "the function archive(uuid) takes every column",
    ),
    "a union": (
        """CREATE TABLE gone (LIKE users); CREATE FUNCTION everybody() RETURNS bigint LANGUAGE sql AS
        'SELECT count(*) FROM (SELECT u.* FROM users u UNION ALL SELECT * FROM gone) x'""",
        "the function everybody() takes every column",
    ),
    "a column of the row type": ("CREATE TABLE kept (who users)", "the column kept.who holds whole rows of users"),
    "an array in a composite type": (
        "CREATE TYPE team AS (name text, people users[]); CREATE TABLE teams (it team)",
        "the column teams.it holds whole rows of users",
    ),
}


@pytest.mark.parametrize("name", SEEN)
def test_what_would_fail_with_more_columns_stops_the_run(name: str, app: App) -> None:
    ddl, message = SEEN[name]
    app.psql(ddl)
    before = app.dump()
    with app.engine.connect() as conn:
        [stop] = [found.text for found in migrate.plan(conn, app.config).findings if found.severity == "stop"]
    assert message in stop.replace("public.", "")
    with pytest.raises(HostMismatch) as caught:
        migrate.apply(app.url, app.config)
    assert message in str(caught.value).replace("public.", "")
    assert app.dump() == before


def test_all_of_it_is_told_at_once(app: App) -> None:
    app.psql(AUDIT.format(body=MANUAL) + SEEN["a copy of the table"][0])
    with pytest.raises(HostMismatch, match=r"archive\(uuid\).*audit\(\).*Nothing was changed"):
        migrate.apply(app.url, app.config)


def test_the_remedy_for_a_body_that_is_no_text_works(app: App) -> None:
    """In BEGIN ATOMIC the star that helps elsewhere is the columns of the day on which the function was made."""
    app.psql("CREATE FUNCTION known() RETURNS SETOF users LANGUAGE sql BEGIN ATOMIC SELECT * FROM users; END")
    with pytest.raises(HostMismatch, match=r"Select a whole row as one value there, as in SELECT u FROM users u \("):
        migrate.apply(app.url, app.config)

    app.psql("CREATE OR REPLACE FUNCTION known() RETURNS SETOF users BEGIN ATOMIC SELECT u FROM users u; END")
    migrate.apply(app.url, app.config)
    assert app.value("SELECT count(email) FROM known() WHERE credit_balance = 0") == 500


HARMLESS = [
    AUDIT.format(body="INSERT INTO users_audit (id) SELECT NEW.id WHERE OLD.* IS DISTINCT FROM NEW.*;"),
    AUDIT.format(body="IF ROW(NEW.*) = ROW(OLD.*) THEN INSERT INTO users_audit (by) VALUES (to_jsonb(NEW)); END IF;"),
    AUDIT.format(body="-- INSERT INTO users_audit SELECT 'U', now(), current_user, NEW.*\n"),
    # a refusal of the app's own, which it would meet without us as well
    AUDIT.format(body="RAISE 'users are frozen';"),
    "CREATE FUNCTION known() RETURNS SETOF users LANGUAGE sql AS 'SELECT u.* FROM users u'",
    "CREATE FUNCTION known() RETURNS SETOF users LANGUAGE sql AS 'SELECT u FROM users u'",
    "CREATE FUNCTION r() RETURNS SETOF users LANGUAGE plpgsql AS 'BEGIN RETURN QUERY SELECT * FROM users; END'",
    "CREATE FUNCTION known() RETURNS bigint LANGUAGE sql AS 'SELECT count(*) FROM users'",
    "CREATE TABLE gone (LIKE users); CREATE RULE kept AS ON DELETE TO users DO ALSO INSERT INTO gone SELECT OLD.*",
    "CREATE VIEW everybody AS SELECT * FROM users; CREATE TYPE team AS (people users)",
]


@pytest.mark.parametrize("ddl", HARMLESS)
def test_what_would_not_fail_is_left_alone(ddl: str, app: App) -> None:
    app.psql(ddl)
    before = app.shape()
    migrate.apply(app.url, app.config)
    if "frozen" not in ddl:
        app.run("UPDATE users SET email = email", "DELETE FROM workshops", "DELETE FROM users")
    migrate.undo(app.url, app.config)
    assert app.shape() == before


COPY = "EXECUTE concat('INSERT ', 'INTO users_audit ', 'SELECT $1, now(), $1, $2.*') USING 'U', NEW;"

HIDDEN = {
    "a statement put together": (
        AUDIT.format(body=COPY),
        "an UPDATE of a row of users",
    ),
    "a function that the trigger calls": (
        """CREATE FUNCTION copied(one users) RETURNS void LANGUAGE plpgsql AS
        $$ BEGIN INSERT INTO users_audit SELECT 'U', now(), current_user, one.*; END $$;"""
        + AUDIT.format(body="PERFORM copied(NEW);"),
        "an UPDATE of a row of users",
    ),
    "a trigger that is deferred": (
        AUDIT.format(body=COPY)
        .replace("CREATE TRIGGER", "CREATE CONSTRAINT TRIGGER")
        .replace("ON users FOR", "ON users DEFERRABLE INITIALLY DEFERRED FOR"),
        "an UPDATE of a row of users",
    ),
    "before an INSERT": (
        AUDIT.format(body=COPY)
        .replace("RETURN NULL", "RETURN NEW")
        .replace("AFTER INSERT OR UPDATE OR DELETE", "BEFORE INSERT"),
        "an INSERT into users",
    ),
    "a row that a function puts together": (
        "CREATE FUNCTION known() RETURNS SETOF users LANGUAGE sql AS 'VALUES (gen_random_uuid(), ''x'')'",
        "the function known()",
    ),
}


@pytest.mark.parametrize("name", HIDDEN)
def test_what_nobody_could_see_stops_the_run_before_its_commit(name: str, app: App) -> None:
    ddl, message = HIDDEN[name]
    app.psql(ddl)
    before = app.dump()
    with pytest.raises(MigrationError, match="Nothing was changed") as caught:
        migrate.apply(app.url, app.config)
    assert message in str(caught.value).replace("public.", "")
    assert app.dump() == before
    assert app.value("SELECT count(*) FROM pg_locks WHERE relation = 'users'::regclass") == 0


def test_the_workshops_are_written_to_as_well(app: App) -> None:
    app.psql(
        AUDIT.format(body=COPY).replace("ON users", "ON workshops").replace("id uuid, email text", "LIKE workshops")
    )
    with pytest.raises(MigrationError, match=r"an UPDATE of a row of public.workshops fails") as caught:
        migrate.apply(app.url, app.config)
    assert "PL/pgSQL function audit() line 1 at EXECUTE" in str(caught.value)


def test_undo_too_proves_that_the_app_still_works(migrated: App) -> None:
    migrated.psql(AUDIT.format(body="IF NEW.plan_tier = 'x' THEN RAISE 'x'; END IF;").replace("OR DELETE", ""))
    with pytest.raises(
        MigrationError, match=r'an UPDATE of a row of public.users fails.*"new" has no field "plan_tier"'
    ):
        migrate.undo(migrated.url, migrated.config)
    with migrated.engine.connect() as conn:
        assert migrate.status(conn, migrated.config).healthy


def test_no_row_is_changed_whatever_its_columns_are(make_app: Callable[..., App]) -> None:
    app = make_app(
        '''
        CREATE TABLE "User" ("%s" integer GENERATED ALWAYS AS IDENTITY PRIMARY KEY, "a ""b""" text,
          twice integer GENERATED ALWAYS AS (1 + 1) STORED);
        CREATE TABLE workshops (id integer GENERATED ALWAYS AS IDENTITY PRIMARY KEY, owner integer REFERENCES "User");
        INSERT INTO "User" ("a ""b""") VALUES ('x'), ('y');
        INSERT INTO workshops (owner) VALUES (1);
        ''',
        HostMapping(
            users=UsersTable(table="User", key="%s", key_type="integer"),
            workshops=WorkshopsTable(key_type="integer", owner="owner", title=None, created_at=None),
        ),
    )
    before = app.rows('SELECT ctid, xmin, * FROM "User"')
    migrate.apply(app.url, app.config)
    assert [row[:5] for row in app.rows('SELECT ctid, xmin, * FROM "User"')] == before
    migrate.undo(app.url, app.config)
    assert app.rows('SELECT ctid, xmin, * FROM "User"') == before


def test_no_sequence_of_the_app_goes_on(make_app: Callable[..., App]) -> None:
    """A trial write that takes a number would leave a gap: nextval is never rolled back."""
    app = make_app(
        """
        CREATE TABLE users (
          id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, number serial,
          other integer GENERATED ALWAYS AS IDENTITY);
        CREATE TABLE workshops (
          id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, user_id bigint REFERENCES users, title text,
          created_at timestamptz);
        INSERT INTO users DEFAULT VALUES; INSERT INTO workshops (user_id) SELECT id FROM users;
        CREATE TABLE accounts (id integer GENERATED ALWAYS AS IDENTITY PRIMARY KEY);
        INSERT INTO accounts DEFAULT VALUES;
        """,
        HostMapping(users=UsersTable(key_type="bigint"), workshops=WorkshopsTable(key_type="bigint")),
    )
    before = app.rows("SELECT sequencename, last_value FROM pg_sequences ORDER BY 1")
    migrate.apply(app.url, app.config)
    migrate.undo(app.url, app.config)
    only_a_key = Config(host=HostMapping(users=UsersTable(table="accounts", key_type="integer"), workshops=None))
    migrate.apply(app.url, only_a_key)
    migrate.undo(app.url, only_a_key)
    assert app.rows("SELECT sequencename, last_value FROM pg_sequences ORDER BY 1") == before


def test_the_script_and_alembics_way_prove_it_too(app: App) -> None:
    from alembic.operations import Operations
    from alembic.runtime.migration import MigrationContext

    app.psql(HIDDEN["a function that the trigger calls"][0])
    before = app.dump()
    with app.engine.connect() as conn:
        script = migrate.sql(conn, app.config)
    with pytest.raises(Exception, match="an UPDATE of a row of users fails"):
        app.psql(script)
    with app.engine.connect() as conn, pytest.raises(sa.exc.DBAPIError, match="an UPDATE of a row of users fails"):
        migrate.upgrade_revision(Operations(MigrationContext.configure(conn)), to="0001", config=app.config)
    assert app.dump() == before


def test_a_slow_trigger_takes_part_in_the_stall_budget(app: App) -> None:
    app.psql(AUDIT.format(body="PERFORM pg_sleep(0.2);"))
    config: Config = app.config
    migrate.apply(app.url, config, stall_budget_ms=2000)
    with app.engine.connect() as conn:
        assert migrate.status(conn, config).healthy
