"""Selling through Stripe: tallystick stripe check, setup, reconcile, dismiss, refund."""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any
from uuid import UUID, uuid4

import sqlalchemy as sa
import typer
from rich.markup import escape

from tallystick.cli.app import Json, address, app, emit, err, invocation, note, out, table
from tallystick.cli.ledger import KeyOption, credits_of
from tallystick.config import Config
from tallystick.database import engine, transaction
from tallystick.errors import StripeNotConfigured
from tallystick.schema import agreed, verify

selling = typer.Typer(
    no_args_is_help=True, help="Sell credits through Stripe Checkout: prices, webhooks, refunds, reconciliation."
)
app.add_typer(selling, name="stripe", rich_help_panel="Credits")


def stripe() -> Any:
    """The module, when it is needed: it is an extra, and Stripe's SDK takes its time to load."""
    try:
        from tallystick import stripe as module  # noqa: PLC0415 - as said
    except ImportError as error:
        raise StripeNotConfigured(str(error), setting="stripe") from error
    return module


@contextmanager
def pool(ctx: typer.Context) -> Iterator[tuple[sa.Engine, Config]]:
    """An engine for operations that manage transactions themselves."""
    with invocation(ctx).database() as config:
        made = engine(address(config), poolclass=sa.NullPool)
        with transaction(made) as conn:
            verify(conn)
            config = agreed(conn, config)  # noqa: PLW2901 - the same, with the database's mapping
        yield made, config


@selling.command()
def check(ctx: typer.Context, as_json: Json = False) -> None:
    """Compare every pack with its price at Stripe; exit code 1 if one cannot be sold as it says."""
    found = stripe().check(invocation(ctx).config())

    def show() -> None:
        if not found:
            out.print("No packs. Name what is on sale in tallystick.toml, under [[packs]].", markup=False)
        for one in found:
            verdict = f"[red]{escape(one.problem)}[/]" if one.problem else "[green]as the pack says[/]"
            out.print(f"{escape(one.pack)}  {one.price or ''}  {verdict}")

    emit(found, show, as_json=as_json)
    if any(one.problem for one in found):
        raise typer.Exit(1)


@selling.command()
def setup(
    ctx: typer.Context,
    endpoint: Annotated[
        str | None, typer.Option("--endpoint", help="Where your app receives webhooks: https://…", metavar="URL")
    ] = None,
    as_json: Json = False,
) -> None:
    """Make what is missing at Stripe: a product and a price for each pack, and the webhook endpoint."""
    done = stripe().setup(invocation(ctx).config(), endpoint_url=endpoint)

    def show() -> None:
        for one in done.packs:
            out.print(f"{one.pack}: {'made' if one.made else 'there'}. In its [[packs]]:", markup=False)
            out.print(f'stripe_price_id = "{one.price}"', markup=False)
        if done.endpoint:
            what = (
                "made" if done.endpoint.made else "subscribed to what was missing" if done.endpoint.changed else "there"
            )
            out.print(f"Webhook endpoint {done.endpoint.id}: {what}.", markup=False)
            if done.endpoint.secret:
                out.print(f"STRIPE_WEBHOOK_SECRET={done.endpoint.secret}", markup=False)
            for old in done.endpoint.outdated:
                note(f"{old} sends another API version to the same address. Remove it when the new secret is in place.")

    emit(done, show, as_json=as_json)


@selling.command()
def reconcile(
    ctx: typer.Context,
    since: Annotated[
        dt.datetime | None,
        typer.Option(
            "--since", help="How far to look back at Stripe (UTC); three days before the last run if left out."
        ),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done, and do nothing.")] = False,
    as_json: Json = False,
) -> None:
    """Find at Stripe what no webhook told: complete, fail, take back, give back, and report the rest.

    Run it daily. It may be stopped and started again; exit code 1 when something waits for a person.
    """
    with pool(ctx) as (made, config), err.status("Asking Stripe") as status:
        report = stripe().reconcile(
            made,
            config,
            since=None if since is None else since.replace(tzinfo=since.tzinfo or dt.UTC),
            dry_run=dry_run,
            progress=lambda at: status.update(f"{at.stage}: {at.looked_at:,} looked at, {at.changed:,} changed"),
        )

    def show() -> None:
        looked_at = ", ".join(f"{count:,} {stage}" for stage, count in report.looked_at.items()) or "nothing"
        out.print(f"{'Dry run; nothing was changed. ' if dry_run else ''}Looked at {looked_at}.", markup=False)
        if report.changes:
            shown = table("at Stripe", "would be" if dry_run else "is now")
            for object_id, outcome in report.changes:
                shown.add_row(object_id, str(outcome))
            out.print(shown)
        else:
            out.print("Nothing to change.")
        for finding in report.findings:
            out.print(f"Look at: {finding}", markup=False, style="red")

    emit(report, show, as_json=as_json)
    if report.findings:
        raise typer.Exit(1)


@selling.command()
def dismiss(
    ctx: typer.Context,
    object_id: Annotated[str, typer.Argument(help="Stripe's id, as a finding names it.", metavar="ID")],
    as_json: Json = False,
) -> None:
    """Take what reconciliation found about one of Stripe's objects off the list; you have dealt with it."""
    with pool(ctx) as (made, config):
        count = stripe().dismiss(made, config, object_id)
    emit({"dismissed": count}, lambda: out.print(f"{count or 'No'} findings about {object_id}."), as_json=as_json)
    if not count:
        raise typer.Exit(1)


@selling.command("refund")
def send_back(
    ctx: typer.Context,
    purchase: Annotated[
        UUID, typer.Argument(help="The id of the purchase, as `tallystick history` shows it.", metavar="PURCHASE")
    ],
    credits: Annotated[
        int | None, typer.Option("--credits", help="Credits to pay back; all that is left of it if left out.")
    ] = None,
    key: KeyOption = None,
    as_json: Json = False,
) -> None:
    """Send money back through Stripe, and take the credits that it bought."""
    with pool(ctx) as (made, config):
        done = stripe().refund(made, config, purchase, credits=credits, key=key or f"cli-{uuid4()}")
        with transaction(made) as conn:
            left = stripe().store.store_of(config).left(conn, done)
    emit(done, lambda: out.print(f"Done. The purchase has {credits_of(left)} left."), as_json=as_json)
