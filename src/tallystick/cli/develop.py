"""For developing: seed data, and the demo."""

from __future__ import annotations

from typing import Annotated

import typer

from tallystick.cli.app import Json, address, app, emit, invocation, out, progress_bar, table, with_mapping
from tallystick.database import engine
from tallystick.dev import seed as seeding
from tallystick.errors import DevServerError

Only = Annotated[
    list[str] | None, typer.Option("--only", help="Only this scenario; may be said again.", metavar="NAME")
]


@app.command(rich_help_panel="Development")
def seed(
    ctx: typer.Context,
    list_them: Annotated[bool, typer.Option("--list", help="List the scenarios, and exit.")] = False,
    only: Only = None,
    reset: Annotated[bool, typer.Option("--reset", help="Remove what the seed made, and nothing else.")] = False,
    force_production: Annotated[
        bool, typer.Option("--force-production", help="Do it to a database that does not look like development.")
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
            with pool.connect() as conn:
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
        rows = table("scenario", "user", "balance", "", right=("balance",))
        for one in report.scenarios:
            balance = "" if one.balance is None else str(one.balance)
            rows.add_row(one.scenario, str(one.user), balance, one.reason or str(one.outcome))
        out.print(rows)
        if not report.changed:
            out.print(
                "Nothing changed: it was all there." if not reset else "Nothing changed: there was nothing of it."
            )

    emit(report, show, as_json=as_json)


@app.command(rich_help_panel="Development")
def demo(
    users: Annotated[int, typer.Option("--users", help="Users of the host app.", min=100)] = 200_000,
    workshops: Annotated[int, typer.Option("--workshops", help="Workshops of the host app.", min=100)] = 300_000,
) -> None:
    """Migrate a busy database, sell, spend, refund and audit, on a throw-away PostgreSQL. Under a minute."""
    try:
        from tallystick.cli import demo as story  # noqa: PLC0415 - it needs extras, which other commands do not
    except ImportError as error:
        raise DevServerError(
            f"the demo needs the extras devdb and stripe ({error}). Run: pip install 'tallystick[devdb,stripe]'"
        ) from None
    if not story.run(out, users=users, workshops=workshops):
        raise typer.Exit(1)
