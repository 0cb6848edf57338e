"""The embedded PostgreSQL by hand: tallystick db start, stop, status, url, psql."""

from __future__ import annotations

import os
from typing import Annotated

import typer
from psycopg.errors import DuplicateTable
from sqlalchemy.exc import ProgrammingError

from tallystick.cli.app import EMBEDDED_DATABASE, Json, app, embedded_address, emit, err, out
from tallystick.dev import postgres
from tallystick.dev.demo import build_host_app
from tallystick.errors import DevServerError

db = typer.Typer(
    no_args_is_help=True,
    help="An embedded PostgreSQL to develop against, in ./.tallystick (TALLYSTICK_HOME moves it). "
    "It listens on no network, and only you get in.",
)
app.add_typer(db, name="db", rich_help_panel="Development")


def _server() -> postgres.Server:
    return postgres.Server(postgres.default_folder())


@db.command()
def start() -> None:
    """Start the embedded server and leave it running until `tallystick db stop`."""
    server = _server()
    with err.status("Starting PostgreSQL …"):
        server.start(keep=True)
        url = embedded_address(server)
        server.release()
    out.print(f"PostgreSQL {server.version} runs in {server.folder}.")
    out.print(f"DATABASE_URL={_libpq(url)}", markup=False)


@db.command()
def stop() -> None:
    """Stop the embedded server, unless other processes use it."""
    server = _server()
    if server.stop():
        out.print("Stopped.")
        return
    pids = ", ".join(str(pid) for pid in server.users())
    out.print(f"Still in use by process {pids}; it stops when they leave.")
    raise typer.Exit(1)


@db.command()
def status(as_json: Json = False) -> None:
    """Say whether the embedded server runs, where, and who uses it. Exit code 1 if it does not run."""
    server = _server()
    state = {
        "running": server.running,
        "kept": server.kept,
        "folder": str(server.folder),
        "users": server.users(),
        "log": str(server.log),
    }

    def show() -> None:
        out.print(f"{'Running' if state['running'] else 'Not running'}, in {state['folder']}.", markup=False)
        if not state["running"]:
            out.print("Start it with: tallystick db start")

    emit(state, show, as_json=as_json)
    if not state["running"]:
        raise typer.Exit(1)


@db.command()
def example(
    users: Annotated[int, typer.Option("--users", help="How many users.", min=1)] = 100,
    workshops: Annotated[int, typer.Option("--workshops", help="How many workshops.", min=1)] = 150,
) -> None:
    """Make an example app in the embedded database: tables of users and workshops that know nothing of credits."""
    with _server() as server:
        try:
            build_host_app(embedded_address(server), users=users, workshops=workshops)
        except ProgrammingError as error:
            if not isinstance(error.orig, DuplicateTable):
                raise
            raise DevServerError(
                "the embedded database has such tables already. Look with: tallystick db psql"
            ) from None
    out.print(
        f"Made {users:,} users and {workshops:,} workshops. Next: tallystick init, then: tallystick migrate apply"
    )


@db.command()
def url() -> None:
    """Print the embedded database's address, for DATABASE_URL and other tools."""
    out.print(_libpq(_server().url(EMBEDDED_DATABASE)), markup=False)


@db.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def psql(
    arguments: Annotated[list[str] | None, typer.Argument(help="Passed on to psql.", metavar="[ARGS]…")] = None,
) -> None:
    """Open psql on the embedded database; further arguments are psql's own."""
    server = _server()
    with server:
        embedded_address(server)
        command = server.command("psql", *(arguments or ()))
        environment = server.env | {"PGDATABASE": EMBEDDED_DATABASE}
        code = os.spawnve(os.P_WAIT, command[0], command, environment)  # noqa: S606 - psql takes over the terminal
    raise typer.Exit(code)


def _libpq(url: str) -> str:
    """Without SQLAlchemy's driver in the scheme, as psql and an app's own tools want it."""
    return url.replace("postgresql+psycopg://", "postgresql://", 1)
