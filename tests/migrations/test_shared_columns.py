"""Workshops with one column in two roles: a user has one workshop each, or a workshop's title is its key."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import sqlalchemy as sa
from hosts import App

from tallystick import Config, Ledger, migrate
from tallystick.audit import audit
from tallystick.declared_tables import Schema
from tallystick.dev.seed import ScenarioOutcome, reset, seed

USERS = "CREATE TABLE users (id integer PRIMARY KEY, email text); INSERT INTO users VALUES (1, 'a'), (2, 'b');"
SHAPES = {
    "the key is the owner": (
        """
        CREATE TABLE workshops (
          user_id integer PRIMARY KEY REFERENCES users, title text, created_at timestamptz NOT NULL DEFAULT now());
        INSERT INTO workshops VALUES (1, 'one'), (2, 'two')""",
        (1, 2),
        ("user_id", "user_id", "title"),
    ),
    "the key is the title": (
        """
        CREATE TABLE workshops (
          name text PRIMARY KEY, user_id integer REFERENCES users, created_at timestamptz NOT NULL DEFAULT now());
        INSERT INTO workshops VALUES ('one', 1), ('two', 2)""",
        ("one", "two"),
        ("name", "user_id", "name"),
    ),
}


@pytest.mark.parametrize("name", SHAPES)
def test_everything_works(name: str, make_app: Callable[..., App]) -> None:
    ddl, (one, two), roles = SHAPES[name]
    app = make_app(USERS + ddl)
    before = app.dump()
    with app.engine.connect() as conn:
        host = migrate.propose(conn)
    assert (host.workshops.key, host.workshops.owner, host.workshops.title) == roles
    schema = Schema.of(host)
    assert (schema.workshops.c.key.name, schema.owner.name, schema.title.name) == roles
    config = Config(host=host)
    migrate.apply(app.url, config)
    ledger = Ledger(config)
    with app.engine.begin() as conn:
        assert migrate.status(conn, config).healthy
        ledger.grant(conn, 1, credits=3, key="g", description="a gift")
        assert ledger.consume(conn, 1, workshop=one, key="c").description.endswith("one")
    with app.engine.begin() as conn:
        assert audit(conn, config).clean
        for marked, check, workshop in (("NULL", "workshop_marked", one), ("now()", "workshop_paid", two)):
            with conn.begin_nested() as savepoint:
                conn.execute(sa.text(f"UPDATE workshops SET credit_consumed_at = {marked}"))
                assert [(each.check, each.workshop) for each in audit(conn, config).findings] == [(check, workshop)]
                savepoint.rollback()
    one_each = roles[0] == roles[1]
    made = {each.scenario: each for each in seed(app.engine, config, environ={}).scenarios}
    assert (made["many_workshops"].outcome == ScenarioOutcome.SKIPPED) == one_each
    assert {each.reason for each in made.values()} == {
        None,
        *(["host.workshops.key is the owner too, so a user has one workshop at most"] if one_each else []),
    }
    with app.engine.begin() as conn:
        assert {found.check for found in audit(conn, config).findings if found.fault} == set()
    reset(app.engine, config, environ={})
    with app.engine.begin() as conn:
        report = audit(conn, config)
        assert (report.clean, report.users, report.rows) == (True, 2, 2)
    migrate.undo(app.url, config, discard_ledger=True)
    assert sorted(app.dump().splitlines()) == sorted(before.splitlines())  # in another order
