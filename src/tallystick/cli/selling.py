"""Selling through Stripe: tallystick stripe check, setup, reconcile, dismiss, refund, deliveries, redeliver."""

from __future__ import annotations

import datetime as dt
import sys
from typing import Annotated, Any

import typer

from tallystick.cli.app import (
    Json,
    app,
    counted,
    emit,
    err,
    escape,
    examples,
    invocation,
    note,
    out,
    reading,
    table,
)
from tallystick.cli.ledger import AllOption, KeyOption, PurchaseArgument, credits_of, made_up_key, pool
from tallystick.errors import StripeNotConfigured, TallystickError

selling = typer.Typer(
    no_args_is_help=True, help="Sell credits through Stripe Checkout: prices, webhooks, refunds, reconciliation."
)
app.add_typer(selling, name="stripe", rich_help_panel="Credits")


def stripe() -> Any:
    """The module, imported when needed: it is an extra, and Stripe's SDK is slow to load."""
    try:
        from tallystick import stripe as module  # noqa: PLC0415 - see above
    except ImportError as error:
        raise StripeNotConfigured(str(error), setting="stripe") from error
    return module


@selling.command()
def check(ctx: typer.Context, as_json: Json = False) -> None:
    """Compare every pack with its price at Stripe, and check some users' customers. Exit code 1 on a difference."""
    config = invocation(ctx).config()
    packs = stripe().check(config)
    customers: list[Any] = []
    if config.database_url is not None:
        with reading(), pool(ctx) as (made, config):
            customers = stripe().check_customers(made, config)

    def show() -> None:
        if not packs:
            out.print("There are no packs. Write those on sale into tallystick.toml, under [[packs]].", markup=False)
        for one in packs:
            verdict = f"[red]{escape(one.problem)}[/]" if one.problem else "[green]as the pack says[/]"
            out.print(f"{escape(one.pack)}  {one.price or ''}  {verdict}")
        for customer in customers:
            out.print(f"User {customer.user}: {customer.problem}.", markup=False, style="red")

    emit({"packs": packs, "customers": customers}, show, as_json=as_json)
    if customers or any(one.problem for one in packs):
        raise typer.Exit(1)


@selling.command()
def setup(
    ctx: typer.Context,
    endpoint: Annotated[
        str | None,
        typer.Option("--endpoint", help="The address at which your app receives webhooks: https://…", metavar="URL"),
    ] = None,
    as_json: Json = False,
) -> None:
    """Create missing products and prices at Stripe, and with --endpoint the webhook endpoint."""
    done = stripe().setup(invocation(ctx).config(), endpoint_url=endpoint)

    def show() -> None:
        for one in done.packs:
            out.print(
                f"{one.pack}: {'created' if one.made else 'exists already'}. For its [[packs]] in tallystick.toml:",
                markup=False,
            )
            out.print(f'stripe_price_id = "{one.price}"', markup=False)
        if done.endpoint:
            what = (
                "created"
                if done.endpoint.made
                else "subscribed to the missing events"
                if done.endpoint.changed
                else "exists already"
            )
            out.print(f"Webhook endpoint {done.endpoint.id}: {what}.", markup=False)
            if done.endpoint.secret:
                note("Stripe shows this secret once. Put it into the environment of your app:")
                out.print(f"STRIPE_WEBHOOK_SECRET={done.endpoint.secret}", markup=False)
            for old in done.endpoint.outdated:
                note(
                    f"{old} sends another API version to the same address. Delete it at Stripe once "
                    "the new secret is in place."
                )

    emit(done, show, as_json=as_json)


@selling.command()
def reconcile(
    ctx: typer.Context,
    since: Annotated[
        dt.datetime | None,
        typer.Option(
            "--since", help="The time from which to compare (UTC); by default three days before the last run."
        ),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Report the changes without making them.")] = False,
    as_json: Json = False,
) -> None:
    """Find changes at Stripe that no webhook reported, apply them to purchases, and report the rest.

    Run it daily. You may interrupt it and run it again. Exit code 1 if a person has to decide something.
    """
    with pool(ctx, changes=not dry_run) as (made, config), err.status("Asking Stripe") as status:
        report = stripe().reconcile(
            made,
            config,
            since=None if since is None else since.replace(tzinfo=since.tzinfo or dt.UTC),
            dry_run=dry_run,
            progress=lambda at: status.update(f"{at.step}: {at.done:,} looked at, {at.changed:,} changed"),
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
        if foreign := report.outcomes.get("foreign"):
            out.print(f"Objects of other sales at this Stripe account: {foreign:,}.")
        for finding in report.findings:
            out.print(f"Look at: {finding}", markup=False, style="red")

    emit(report, show, as_json=as_json)
    if report.findings:
        raise typer.Exit(1)


@selling.command()
def dismiss(
    ctx: typer.Context,
    object_ids: Annotated[
        list[str] | None, typer.Argument(help="Stripe's ids, as in the findings.", metavar="ID")
    ] = None,
    kind: Annotated[
        str | None, typer.Option("--kind", help="Only findings of this kind, such as unknown_session.", metavar="KIND")
    ] = None,
    every: Annotated[bool, typer.Option("--all", help="All findings.")] = False,
    as_json: Json = False,
) -> None:
    """Remove findings that you have dealt with from the list."""
    if bool(object_ids) == (every or kind is not None) and not (object_ids and kind):
        raise typer.BadParameter("name Stripe's ids, --kind, or --all")
    kinds = [str(one) for one in stripe().FindingKind]
    if kind is not None and kind not in kinds:
        raise typer.BadParameter(f"there is no kind {kind!r}. There are: {', '.join(kinds)}")
    with pool(ctx, changes=True) as (made, config):
        wanted = None if kind is None else stripe().FindingKind(kind)
        count = stripe().dismiss(made, config, object_ids or None, kind=wanted)
    if not count:
        about = ", ".join(object_ids or ()) or kind
        none = f"no open finding is about {about}" if about else "there is no open finding"
        raise TallystickError(f"{none}. List them: tallystick stripe reconcile --dry-run")
    emit({"dismissed": count}, lambda: out.print(f"{counted(count, 'finding')} dismissed."), as_json=as_json)


@selling.command()
def deliveries(ctx: typer.Context, as_json: Json = False) -> None:
    """List the failed and refused webhook deliveries, with the reasons. Exit code 1 if there is one."""
    with reading(), pool(ctx) as (made, config):
        failed = stripe().failed_deliveries(made, config)

    def show() -> None:
        if not failed:
            out.print("No delivery has failed.")
            return
        for one in failed:
            moment = one.last_at.astimezone(dt.UTC)
            times = "" if one.attempts == 1 else f", {one.attempts} times"
            out.print(f"{one.event_id}  {one.type}  {one.object_id}  {moment:%Y-%m-%d %H:%M:%S} UTC{times}")
            out.print(f"  {one.reason}", markup=False)
        note("Run them again with: tallystick stripe redeliver --all")

    emit(failed, show, as_json=as_json)
    if failed:
        raise typer.Exit(1)


@selling.command()
def redeliver(
    ctx: typer.Context,
    events: Annotated[
        list[str] | None,
        typer.Argument(help="Ids of events, as `tallystick stripe deliveries` shows them.", metavar="EVENT"),
    ] = None,
    every: Annotated[bool, typer.Option("--all", help="All failed deliveries.")] = False,
    as_json: Json = False,
) -> None:
    """Process failed deliveries again, with the current objects from Stripe. Exit code 1 if one fails again."""
    if bool(events) == every:
        raise typer.BadParameter("name events, or --all")
    with pool(ctx, changes=True) as (made, config):
        done = stripe().redeliver(made, config, events or None)

    def show() -> None:
        for event, outcome in done:
            out.print(f"{event}  {outcome}", markup=False)
        if not done:
            out.print("No delivery has failed.")

    emit([{"event": event, "outcome": outcome} for event, outcome in done], show, as_json=as_json)
    if any(outcome == "refused" for _, outcome in done):
        raise typer.Exit(1)


@selling.command(
    "refund",
    epilog=examples(
        "tallystick stripe refund PURCHASE --credits 1 --key ticket-7",
        "tallystick stripe refund PURCHASE --amount 1261 --keep-credits",
    ),
)
def send_back(
    ctx: typer.Context,
    purchase: PurchaseArgument,
    *,
    credits: AllOption = None,
    amount: Annotated[
        int | None, typer.Option("--amount", help="The money to send back, in minor units, in place of --credits.")
    ] = None,
    keep_credits: Annotated[
        bool, typer.Option("--keep-credits", help="Take no credits: for goodwill, or a tax.")
    ] = False,
    key: KeyOption,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask first.")] = False,
    as_json: Json = False,
) -> None:
    """Send money back through Stripe, and take its credits. Shows the effect, and asks at a terminal."""
    wanted: dict[str, Any] = {"credits": credits, "amount": amount, "keep_credits": keep_credits, "key": key}
    with pool(ctx, changes=True) as (made, config):
        preview = stripe().preview_refund(made, config, purchase, **wanted)
        note(_preview_text(preview))
        if made_up_key(ctx):  # told before it is sent: an answer may be lost, and a new key would send the money again
            note(f"If it ends without an answer, run it again with --key {key}: that sends nothing twice.")
        if not yes and sys.stdin.isatty() and not as_json:
            typer.confirm("Send it?", abort=True, err=True)
        done = stripe().refund(made, config, purchase, **wanted)
        with made.connect() as conn:
            left = stripe().store.store_of(config).left(conn, done)
    emit(done, lambda: out.print(f"Done. The purchase has {credits_of(left)} left."), as_json=as_json)


def _preview_text(preview: Any) -> str:
    return (
        f"This sends back {preview.amount} {preview.currency} (minor units) and takes {credits_of(preview.credits)}. "
        f"The purchase has {credits_of(preview.left)} left, of which {preview.spent} are spent already. "
        f"The balance goes from {preview.balance} to {preview.balance_after}."
    )
