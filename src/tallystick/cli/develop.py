"""Commands for development: the embedded PostgreSQL, seed data, and the demo."""

from __future__ import annotations

import os
from typing import Annotated

import typer
from psycopg.errors import DuplicateTable
from sqlalchemy.exc import ProgrammingError

from tallystick.cli.app import (
    EMBEDDED_DATABASE,
    Json,
    address,
    app,
    embedded_address,
    emit,
    err,
    invocation,
    note,
    out,
    progress_bar,
    table,
    with_mapping,
)
from tallystick.database import engine, transaction
from tallystick.dev import postgres
from tallystick.dev import seed as seeding
from tallystick.dev.demo_app import build_host_app
from tallystick.errors import DevServerError

Only = Annotated[
    list[str] | None, typer.Option("--only", help="Only this scenario; repeat the option for more.", metavar="NAME")
]


@app.command(rich_help_panel="Development")
def seed(
    ctx: typer.Context,
    list_them: Annotated[bool, typer.Option("--list", help="List the scenarios, and exit.")] = False,
    only: Only = None,
    reset: Annotated[bool, typer.Option("--reset", help="Remove what the seed made, and nothing else.")] = False,
    force_production: Annotated[
        bool, typer.Option("--force-production", help="Also work on a database that does not look like development.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Fill a development database with named scenarios, through the ledger. A second run changes nothing."""
    if list_them:
        listing = {name: scenario.description for name, scenario in seeding.SCENARIOS.items()}
        shown = table("scenario", "what it shows")
        for name, description in listing.items():
            shown.add_row(name, description)
        emit(listing, lambda: out.print(shown), as_json=as_json)
        return
    with invocation(ctx).database() as config:
        pool = engine(address(config))
        try:
            with transaction(pool) as conn:
                config = with_mapping(conn, config)  # noqa: PLW2901 - the same, with the database's mapping
            if reset:
                report = seeding.reset(pool, config, only=only or (), force_production=force_production)
            else:
                with progress_bar("Seeding") as progress:
                    report = seeding.seed(
                        pool, config, only=only or (), force_production=force_production, progress=progress
                    )
        finally:
            pool.dispose()

    def show() -> None:
        rows = table("scenario", "user", "balance", "result", right=("balance",))
        for one in report.scenarios:
            balance = "" if one.balance is None else str(one.balance)
            rows.add_row(one.scenario, str(one.user), balance, one.reason or str(one.outcome))
        out.print(rows)
        if not report.changed:
            why = "there are no seeded rows" if reset else "all of it existed already"
            out.print(f"Nothing changed: {why}.")

    emit(report, show, as_json=as_json)


@app.command(rich_help_panel="Development")
def demo(
    users: Annotated[int, typer.Option("--users", help="The number of users.", min=100)] = 200_000,
    workshops: Annotated[int, typer.Option("--workshops", help="The number of workshops.", min=100)] = 300_000,
) -> None:
    """Migrate a busy database, sell, spend, refund and audit, on a temporary PostgreSQL. Under a minute."""
    try:
        from tallystick.cli import demo as module  # noqa: PLC0415 - it needs extras, which other commands do not
    except ImportError:
        raise DevServerError(
            "the demo needs the extras devdb and stripe. Run: pip install 'tallystick[devdb,stripe]'"
        ) from None
    if not module.run(out, users=users, workshops=workshops):
        raise typer.Exit(1)


db = typer.Typer(
    no_args_is_help=True,
    help="An embedded PostgreSQL for development, in ./.tallystick or the folder that TALLYSTICK_HOME names. "
    "It listens on no network, and only your own account can connect.",
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
        embedded_address(server)
        server.release()
    out.print(f"PostgreSQL {server.version} runs in {server.folder}.")
    out.print("tallystick uses it in this folder. For other programs:", markup=False)
    out.print(f"export DATABASE_URL='{server.url(EMBEDDED_DATABASE, driver='')}'", markup=False)


@db.command()
def stop() -> None:
    """Stop the embedded server, unless other processes use it."""
    server = _server()
    ran = server.running
    if server.stop():
        out.print("Stopped." if ran else "It was not running.")
        return
    pids = ", ".join(str(pid) for pid in server.users())
    out.print(f"Processes that use it: {pids}. It stops when they have ended.")
    raise typer.Exit(1)


@db.command()
def status(as_json: Json = False) -> None:
    """Show if the embedded server runs, and its folder. Exit code 1 if it does not run."""
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
    users: Annotated[int, typer.Option("--users", help="The number of users.", min=1)] = 100,
    workshops: Annotated[int, typer.Option("--workshops", help="The number of workshops.", min=1)] = 150,
) -> None:
    """Make an example app in the embedded database: tables of users and workshops, without credits."""
    with _server() as server:
        try:
            build_host_app(embedded_address(server), users=users, workshops=workshops)
        except ProgrammingError as error:
            if not isinstance(error.orig, DuplicateTable):
                raise
            raise DevServerError(
                "the embedded database has tables of these names already. To look at them: tallystick db psql"
            ) from None
    out.print(f"Made {users:,} users and {workshops:,} workshops. Next: tallystick init, then: tallystick migrate plan")


@db.command()
def url() -> None:
    """Print the embedded database's address, for DATABASE_URL and other tools."""
    server = _server()
    out.print(server.url(EMBEDDED_DATABASE, driver=""), markup=False)
    if not server.running:
        note("The server does not run. Start it with: tallystick db start")


@db.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def psql(
    arguments: Annotated[
        list[str] | None, typer.Argument(help="Options and arguments of psql.", metavar="ARGUMENT")
    ] = None,
) -> None:
    """Open psql on the embedded database."""
    with _server() as server:
        embedded_address(server)
        command = server.command("psql", *(arguments or ()))
        environment = server.env | {"PGDATABASE": EMBEDDED_DATABASE}
        code = os.spawnve(os.P_WAIT, command[0], command, environment)  # noqa: S606 - psql gets the terminal
    raise typer.Exit(code)
