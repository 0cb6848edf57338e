"""Events: tallystick events enable, disable, status, follow, prune; endpoint, deliver, dead-letters, replay."""

from __future__ import annotations

import datetime as dt
import re
from types import ModuleType
from typing import Annotated, Any

import sqlalchemy as sa
import typer

from tallystick import events
from tallystick.accounts import Accounts
from tallystick.cli.app import (
    Json,
    UserArgument,
    address,
    app,
    counted,
    emit,
    escape,
    examples,
    invocation,
    note,
    out,
    place,
    table,
    write_json,
)
from tallystick.cli.ledger import OfUser, credits_of, mapped, user_key
from tallystick.database import connect, engine, transaction
from tallystick.errors import ConfigError
from tallystick.events.switch import low_balance_of
from tallystick.schema import verify

group = typer.Typer(name="events", no_args_is_help=True, help="Read or deliver a feed of the ledger's changes.")
app.add_typer(group, name="events", rich_help_panel="Credits")

endpoint_group = typer.Typer(name="endpoint", no_args_is_help=True, help="Add, list and remove webhooks.")
group.add_typer(endpoint_group)

_AGES = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days", "w": "weeks"}


@group.command()
def enable(
    ctx: typer.Context,
    low_balance: Annotated[
        int | None,
        typer.Option("--low-balance", help="The default threshold: a balance below it is low; 0 for none.", min=0),
    ] = None,
    notify: Annotated[
        bool | None, typer.Option("--notify/--no-notify", help="Wake readers with NOTIFY tallystick_events.")
    ] = None,
) -> None:
    """Write events from now on, by a trigger on the ledger. A second run changes the given settings."""
    with invocation(ctx).database(migrating=True) as config:
        _show_target(address(config))
        events.enable(address(config), config, low_balance=low_balance, notify=notify)
    out.print("Events are on.")


@group.command()
def disable(ctx: typer.Context) -> None:
    """Stop writing events. Existing events stay."""
    with invocation(ctx).database(migrating=True) as config:
        _show_target(address(config))
        events.disable(address(config), config)
    out.print("Events are off.")


@group.command()
def status(ctx: typer.Context, as_json: Json = False) -> None:
    """Show if events are on, and the newest cursor of the feed."""
    with mapped(ctx, connect) as (conn, _):
        found = events.status(conn)

    def show() -> None:
        if not found.enabled:
            out.print("Events are off. To write them: tallystick events enable")
        else:
            out.print(f"Events are on. Every row since {found.recorded_since:%Y-%m-%d %H:%M:%S} UTC has its events.")
            low = f"below {found.low_balance}" if found.low_balance else "none"
            out.print(f"Default threshold of balance.low: {low}. NOTIFY is {'on' if found.notifies else 'off'}.")
        if found.cursor:
            out.print(f"The newest event that readers can get: {found.cursor}.")
        if found.waiting:
            out.print(f"{found.waiting} more wait for the end of an older transaction.")

    emit(found, show, as_json=as_json)


@group.command()
def follow(
    ctx: typer.Context,
    after: Annotated[str | None, typer.Option("--after", help="Begin after this cursor.", metavar="CURSOR")] = None,
    poll: Annotated[float, typer.Option("--poll", help="The seconds between two queries.", min=0.05)] = 1.0,
) -> None:
    """Print each event as a line of JSON, and wait for the next. Stop with Ctrl-C."""
    with invocation(ctx).database(migrating=True) as config:
        with connect(address(config)) as conn:
            verify(conn)
            _note_if_off(events.status(conn))
        try:
            for event in events.follow(address(config), config, after=after, poll_s=poll, lost=_show_lost):
                write_json(event)
        except KeyboardInterrupt:
            raise typer.Exit from None


@group.command()
def prune(
    ctx: typer.Context,
    older_than: Annotated[str, typer.Option("--older-than", help="The age, such as 30d or 12h.", metavar="AGE")],
) -> None:
    """Remove old events, but none that a webhook has not received yet."""
    found = re.fullmatch(r"(\d{1,6})([smhdw])", older_than)
    if found is None:
        raise typer.BadParameter(f"{older_than!r} is no age. Write a number and s, m, h, d or w, such as 30d")
    with invocation(ctx).database(migrating=True) as config:
        _show_target(address(config))
        removed = events.prune(address(config), older_than=dt.timedelta(**{_AGES[found[2]]: int(found[1])}))
    out.print(f"{counted(removed, 'event')} removed.")


def delivery() -> ModuleType:
    """The module, which needs packages of an extra."""
    try:
        from tallystick.events import deliver as module  # noqa: PLC0415
    except ModuleNotFoundError as missing:
        raise ConfigError(f"webhooks need {missing.name}. Run: pip install 'tallystick[events]'") from None
    return module


@endpoint_group.command(
    "add",
    epilog=examples(
        "tallystick events endpoint add crm https://crm.example.com/hooks --secret-variable CRM_SECRET",
        "tallystick events endpoint add mail https://mail.example.com/low --secret-variable MAIL_SECRET "
        "--kind balance.low",
    ),
)
def add_endpoint(
    ctx: typer.Context,
    name: Annotated[str, typer.Argument(help="A name that you choose.", metavar="NAME")],
    url: Annotated[str, typer.Argument(help="The address of the webhook, https://….", metavar="URL")],
    secret_variable: Annotated[
        str,
        typer.Option("--secret-variable", help="The environment variable that holds the secret.", metavar="VARIABLE"),
    ],
    kind: Annotated[
        list[str] | None,
        typer.Option("--kind", help="Send only this kind, such as balance.low; repeat the option for more."),
    ] = None,
    after: Annotated[str | None, typer.Option("--after", help="Begin after this cursor.", metavar="CURSOR")] = None,
    from_oldest: Annotated[bool, typer.Option("--from-oldest", help="Begin with the oldest stored event.")] = False,
    as_json: Json = False,
) -> None:
    """Add a webhook that gets the events from now on.

    A second run replaces its address, secret and kinds, and tries an event that waits at once. Its position changes
    only with --after or --from-oldest.
    """
    with mapped(ctx, connect, changes=True) as (conn, _):
        added = delivery().add_endpoint(
            conn,
            name,
            url,
            secret_variable=secret_variable,
            kinds=kind or None,
            after=after,
            from_oldest=from_oldest,
        )
    emit(added, lambda: out.print(f"Added {name}. To deliver its events: tallystick events deliver"), as_json=as_json)


@endpoint_group.command("list")
def list_endpoints(ctx: typer.Context, as_json: Json = False) -> None:
    """Show each endpoint, its cursor and its last error."""
    with mapped(ctx, connect) as (conn, _):
        found = delivery().endpoints(conn)

    def show() -> None:
        shown = table("name", "url", "cursor", "failed attempts", "last error", right=("failed attempts",))
        for each in found:
            shown.add_row(
                *map(escape, (each.name, each.url, each.cursor or "", str(each.attempts), each.last_error or ""))
            )
        out.print(shown if found else "No endpoints. To add one: tallystick events endpoint add")

    emit(found, show, as_json=as_json)


@endpoint_group.command("remove")
def remove_endpoint(ctx: typer.Context, name: Annotated[str, typer.Argument(help="Its name.", metavar="NAME")]) -> None:
    """Stop delivering to an endpoint."""
    with mapped(ctx, connect, changes=True) as (conn, _):
        delivery().remove_endpoint(conn, name)
    out.print("Removed.")


@group.command()
def deliver(
    ctx: typer.Context,
    once: Annotated[bool, typer.Option("--once", help="Deliver the events that are due now, then stop.")] = False,
    attempts: Annotated[
        int,
        typer.Option("--attempts", help="The number of attempts after which an event is a dead letter.", min=1, max=10),
    ] = 10,
    timeout: Annotated[
        float, typer.Option("--timeout", help="The seconds in which an endpoint must answer.", min=0.1)
    ] = 15.0,
) -> None:
    """POST each event to each endpoint, in order, until it is accepted. Stop with Ctrl-C.

    With --once, exit code 1 if an endpoint has failed: an event waits for its next attempt, or is a dead letter now.
    """
    module = delivery()
    dead: list[Any] = []

    def report(sent: Any) -> None:
        _show_attempt(sent)
        if not isinstance(sent, str) and sent.dead:
            dead.append(sent)

    with invocation(ctx).database(migrating=True) as config:
        url = address(config)
        _show_target(url)
        try:
            module.deliver(
                url,
                config,
                once=once,
                pauses_s=module.PAUSES_S[: attempts - 1],
                timeout_s=timeout,
                report=report,
            )
        except KeyboardInterrupt:
            raise typer.Exit from None
        with connect(url) as conn:  # a run within the pause after a failed attempt sends nothing
            waiting = [each for each in module.endpoints(conn) if each.attempts]
    for each in waiting:
        at = f"{each.next_attempt_at.astimezone(dt.UTC):%Y-%m-%d %H:%M:%S} UTC"
        note(f"{each.name}: an event waits until {at}, after failed attempt {each.attempts}: {each.last_error}.")
    if waiting or dead:
        raise typer.Exit(1)


@group.command("dead-letters")
def dead_letters(ctx: typer.Context, as_json: Json = False) -> None:
    """List the events that an endpoint did not accept in all attempts."""
    with mapped(ctx, connect) as (conn, _):
        found = delivery().dead_letters(conn)

    def show() -> None:
        shown = table(
            "endpoint", "event", "kind", "attempts", "failed at (UTC)", "last error", right=("event", "attempts")
        )
        for each in found:
            at = f"{each.failed_at:%Y-%m-%d %H:%M:%S}"
            shown.add_row(
                *map(escape, (each.endpoint, str(each.event_id), each.kind, str(each.attempts), at, each.last_error))
            )
        out.print(shown if found else "No dead letters.")

    emit(found, show, as_json=as_json)


@group.command()
def replay(
    ctx: typer.Context,
    endpoint: Annotated[str, typer.Argument(help="The endpoint's name.", metavar="ENDPOINT")],
    event: Annotated[
        list[int] | None,
        typer.Argument(help="The numbers of events, as dead-letters lists them; by default all.", metavar="EVENT"),
    ] = None,
) -> None:
    """Send the dead letters of an endpoint again."""
    module = delivery()
    with invocation(ctx).database() as config:
        _show_target(address(config))
        with transaction(engine(address(config), poolclass=sa.NullPool), isolation="AUTOCOMMIT") as conn:
            verify(conn)
            done = module.replay(conn, endpoint, event or None)
    for each in done:
        _show_attempt(each)
    if any(each.error for each in done):
        raise typer.Exit(1)
    if not done:
        out.print("No dead letters.")


@app.command("low-balance", cls=OfUser, rich_help_panel="Credits")
def low_balance(
    ctx: typer.Context,
    user: UserArgument,
    below: Annotated[
        int | None,
        typer.Option("--below", help="Give the user this threshold, in credits; 0 for never.", min=0),
    ] = None,
    default: Annotated[
        bool, typer.Option("--default", help="Remove the user's own threshold: the default applies again.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Show or set a user's threshold: the event balance.low is written when the balance falls below it."""
    if default and below is not None:
        raise typer.BadParameter("--below sets the user's own threshold, and --default removes it. Pass one of them")
    with mapped(ctx, connect, changes=default or below is not None) as (conn, config):
        accounts, key = Accounts(config), user_key(conn, config, user)
        if default or below is not None:
            account = accounts.set_low_balance(conn, key, below)
        else:
            account = accounts.get(conn, key)
        own = low_balance_of(conn, config, account.user)
        settings = events.status(conn)

    threshold = settings.low_balance if own is None else own
    source = "the default" if own is None else "the user's own threshold"

    def show() -> None:
        when = f"written when the balance falls below {credits_of(threshold)}" if threshold else "never written"
        out.print(f"balance.low is {when}: {source}.", markup=False)
        _note_if_off(settings)

    result = {"user": account.user, "threshold": threshold, "own": own is not None, "events_enabled": settings.enabled}
    emit(result, show, as_json=as_json)


def _note_if_off(settings: events.EventsStatus) -> None:
    if not settings.enabled:
        note("Events are off. To write them: tallystick events enable")


def _show_target(url: str) -> None:
    with connect(url) as conn:
        note(place(conn))


def _show_lost(why: str) -> None:
    note(f"The connection ended: {why}. Connecting again.")


def _show_attempt(sent: Any) -> None:
    if isinstance(sent, str):
        note(sent)
    elif sent.error is None:
        out.print(f"{sent.endpoint}: event {sent.event_id} {sent.kind} was accepted.", markup=False)
    else:
        then = "It is a dead letter now: tallystick events dead-letters" if sent.dead else "It will be sent again"
        note(f"{sent.endpoint}: event {sent.event_id} {sent.kind}: {sent.error}. {then}.")
