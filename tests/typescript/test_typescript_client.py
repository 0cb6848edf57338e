"""``tallystick client typescript``: the file it writes, compiled strictly and run over each driver's real package."""

from __future__ import annotations

import dataclasses
import re
import shutil
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psycopg
import pytest
import sqlalchemy as sa

from node_environment import environment
from node_packages import Project
from tallystick import Config, HostMapping, UsersTable, WorkshopsTable, events, migrate
from tallystick.audit import audit
from tallystick.ledger.functions import declared
from tallystick.ledger.reference import outcomes_of, refusals
from tallystick.ledger.typescript import typescript
from worlds import SHAPES, Shape, World

pytestmark = pytest.mark.one_server  # it is about the drivers of Node; the tests of the operations run on both

HERE = Path(__file__).parent
DRIVERS = [
    "pg",
    "pg, rows as arrays",
    "pg, other settings",
    "postgres",
    "postgres, names in camel case",
    "postgres, its tag",
    "drizzle over pg",
    "drizzle over postgres",
    "neon",
    "drizzle over neon",
    "prisma",
]
SHAPE_FILES = ("database.ts", "shape.ts", "table.ts", "workshops.ts")


MORE_SHAPES = {
    # credits of 64 bits
    "micro": Shape(SHAPES["uuid"].ddl, dataclasses.replace(SHAPES["uuid"].host, credits="bigint")),
    # keys of rarer types
    "rare": Shape(
        """
        CREATE SCHEMA "My Extensions";
        CREATE EXTENSION citext SCHEMA "My Extensions";
        CREATE TABLE users (id "My Extensions".citext PRIMARY KEY);
        CREATE TABLE workshops (
          id smallint PRIMARY KEY, user_id "My Extensions".citext NOT NULL REFERENCES users (id), title text,
          created_at timestamptz NOT NULL DEFAULT now());
        """,
        HostMapping(
            users=UsersTable(key_type="citext", key_type_schema="My Extensions"),
            workshops=WorkshopsTable(key_type="smallint"),
        ),
    ),
    "padded": Shape(
        """
        CREATE TABLE users (id char(12) PRIMARY KEY);
        CREATE TABLE workshops (
          id char(12) PRIMARY KEY, user_id char(12) NOT NULL REFERENCES users (id), title text,
          created_at timestamptz NOT NULL DEFAULT now());
        """,
        HostMapping(users=UsersTable(key_type="char"), workshops=WorkshopsTable(key_type="char")),
    ),
}
OTHERS = ("clerk", "quoted", "alone", *MORE_SHAPES)


def of_shape(name: str) -> HostMapping:
    return {**SHAPES, **MORE_SHAPES}[name].host


@pytest.fixture(scope="module")
def app(packages: Project) -> Project:
    """The programs of ``src``, and for each other shape of host its own client and tables, compiled by tsc."""
    folder = packages.folder
    shutil.copytree(HERE / "src", folder / "src")
    (folder / "src" / "keys.ts").unlink()
    (folder / "src" / "tallystick.ts").write_text(typescript(of_shape("uuid")))
    for shape in OTHERS:
        (folder / shape).mkdir()
        for name in (*SHAPE_FILES, *(["keys.ts"] if shape == "quoted" else [])):
            if not (shape == "alone" and name == "workshops.ts"):
                shutil.copy(HERE / "src" / name, folder / shape)
        (folder / shape / "tallystick.ts").write_text(typescript(of_shape(shape)))
    packages.run("tsc", "--project", ".")
    return packages


def run(app: Project, program: str, world: World, *args: str, **given: Any) -> None:
    app.run("node", f"out/{program}.js", *args, env=environment(world, **given))


def given(world: World) -> dict[str, Any]:
    """Users and workshops for the tables."""
    users, workshops = world.config.host.users, world.config.host.workshops
    as_told: dict[str, Callable[[Any], Any]] = defaultdict(lambda: str, integer=int, smallint=int)
    events.enable(world.url, world.config)
    user, gone, rich = world.user(), world.user(), world.user(credits=9)
    with world.engine.begin() as conn:
        world.accounts.delete_user(conn, gone)
    made: dict[str, Any] = {"user": user, "gone": gone, "nobody": world.key(users.key_type), "rich": rich}
    made = {name: as_told[users.key_type](key) for name, key in made.items()}
    if workshops:
        others = {
            "workshop": world.workshop(rich),
            "second": world.workshop(rich),
            "others": world.workshop(user),
            "closed": world.workshop(rich, deleted_at=sa.func.now()),
            # long before any consumption here, or the audit takes it for one that was deleted and put back
            "marked": world.workshop(rich, credit_consumed_at=sa.text("now() - interval '1 hour'")),
            "nowhere": world.key(workshops.key_type),
        }
        made |= {name: as_told[workshops.key_type](key) for name, key in others.items()}
        made["dated"] = workshops.created_at is not None
    return made | {"bigint": world.config.host.credits == "bigint"}


def assert_clean(world: World, *, marked: int = 1) -> None:
    """The auditor finds nothing but the workshop that the test marked by hand."""
    with world.engine.connect() as conn:
        assert len(audit(conn, world.config).findings) == marked


@pytest.mark.parametrize("driver", DRIVERS)
def test_each_operation_answers_the_same_over_each_driver(driver: str, app: Project, world: World):
    run(app, "src/operations", world, driver, **given(world))
    assert_clean(world)


@pytest.mark.parametrize("shape", OTHERS)
def test_each_operation_answers_the_same_on_each_shape_of_host(
    shape: str, app: Project, make_world: Callable[..., World], fresh_database: Callable[..., str]
):
    if shape in MORE_SHAPES:
        world = World(fresh_database(), of_shape(shape))
        with psycopg.connect(world.url.replace("+psycopg", "", 1)) as conn:
            conn.execute(MORE_SHAPES[shape].ddl)
        migrate.apply(world.url, Config(database_url=world.url, host=world.config.host))
    else:
        world = make_world(shape)
    run(app, f"{shape}/shape", world, **given(world))
    assert_clean(world, marked=0 if shape == "alone" else 1)


def test_a_strict_call_rolls_a_batch_back(app: Project, world: World):
    run(app, "src/batches", world, rich=world.user(credits=9), poor=world.user())
    assert_clean(world, marked=0)


def test_refusals_are_thrown_where_asked_and_other_errors_stay_the_drivers(app: Project, world: World):
    run(app, "src/errors", world, rich=world.user(credits=9), poor=world.user())
    assert_clean(world, marked=0)


AGES = {
    "no function": ("DROP FUNCTION tallystick.consume", "tallystick migrate apply"),
    "no such attribute": ("ALTER TYPE tallystick.answer DROP ATTRIBUTE item", "tallystick migrate apply"),
    "no schema": ("DROP SCHEMA tallystick CASCADE", "tallystick migrate apply"),
    "an outcome of later": (
        """
        DROP FUNCTION tallystick.consume;
        CREATE FUNCTION tallystick.consume(user_id uuid, key text) RETURNS tallystick.answer LANGUAGE sql AS
          $$ SELECT json_populate_record(NULL::tallystick.answer, '{"outcome": "paused"}') $$
        """,
        "tallystick client typescript",
    ),
}


@pytest.mark.parametrize("age", AGES)
def test_functions_of_another_version_are_told_with_what_to_run(age: str, app: Project, world: World):
    change, command = AGES[age]
    with world.engine.begin() as conn:
        conn.exec_driver_sql(change)
    run(app, "src/versions", world, command)


def test_every_function_is_in_it():
    text = typescript(SHAPES["uuid"].host)
    for function in declared():
        assert f'"{function.name}", "' in text
        for parameter, _, _ in function.parameters:
            assert f'["{parameter}", "' in text
    assert "`item`" not in text  # answers are in order, and have none


def test_each_field_that_the_types_promise_is_read():
    text = typescript(SHAPES["uuid"].host)
    fields = {refusal.name: refusal.fields for refusal in refusals()}
    facts = text.partition("const COLUMNS = {")[2].partition("} as const;")[0]
    shapes = re.findall(r"^  (\w+): \{([^}]*)\}", facts, re.MULTILINE)
    columns = {kind: set(re.findall(r'(\w+): "', of)) for kind, of in shapes}
    kinds = dict(re.findall(r'new FunctionCall\("(\w+)", "(\w+)"', text))
    assert set(kinds) == {function.name for function in declared()}
    unread = {
        (function, outcome, field)
        for function, kind in kinds.items()
        for outcome in outcomes_of(function)
        for field in fields.get(outcome, {})
        if ("detail" if field.startswith("detail.") else field) not in columns[kind]
    }
    assert unread == set()
