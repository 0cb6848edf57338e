"""Reading and moving credits by hand: balance, history, consume, refund, onboarding, audit."""

from __future__ import annotations

import datetime as dt
import re
import shlex
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any
from uuid import UUID, uuid4

import typer
from psycopg.sql import SQL, Identifier
from typer.core import TyperCommand

from tallystick.accounts import Accounts
from tallystick.cli.app import (
    C,
    Connect,
    Invocation,
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
    progress_bar,
    reading,
    table,
)
from tallystick.config import FILE_NAME, INTEGER_KEYS, Config
from tallystick.database import connect, connect_driver, driver, engine, server_message, transaction, translated
from tallystick.errors import (
    ConfigError,
    InvalidArgument,
    Key,
    NotMigrated,
    OutcomeUnknown,
    PermissionDenied,
    TallystickError,
    UnknownUser,
    shown,
)
from tallystick.ledger import CreditTransaction, Ledger, close_all_days
from tallystick.ledger.connections import reader_of
from tallystick.schema import Keys, verify, with_stored_mapping

if TYPE_CHECKING:
    import psycopg
    import sqlalchemy as sa
    from rich.table import Table

    from tallystick.allowances import AllowanceRun
    from tallystick.audit import AuditReport


def made_up_key(ctx: typer.Context) -> str | None:
    """The key that this command has made up, which nobody knows who is not told; None if the caller named one."""
    source, key = ctx.get_parameter_source("key"), ctx.params.get("key")
    return key if source is not None and source.name == "DEFAULT" else None


def _no_empty_key(key: str) -> str:
    """The key, unless it is empty, as an unset variable makes it: a new one in its place would do everything twice."""
    if not key:
        raise typer.BadParameter("it is empty. Name the intent, or leave --key out for a new name")
    return key


KeyOption = Annotated[
    str,
    typer.Option(
        "--key",
        default_factory=lambda: f"cli-{uuid4()}",
        show_default=False,
        callback=_no_empty_key,
        help="A name of this intent: a second run with the same name changes nothing. By default a new one.",
    ),
]
"""Keyword-only in a command: without a default of its own, since each call has a new one."""


RowArgument = Annotated[UUID, typer.Argument(help="The id of the row, as `tallystick history` shows it.", metavar="ID")]
PurchaseArgument = Annotated[
    UUID, typer.Argument(help="The id of the purchase, as `tallystick history` shows it.", metavar="PURCHASE")
]
AllOption = Annotated[
    int | None, typer.Option("--credits", help="The number of credits; by default all that are left.")
]
DescriptionOption = Annotated[str | None, typer.Option("--description", help="The text in the user's history.")]

NARROW = 120  # columns of a terminal in which a table would break ids


class OfUser(TyperCommand):
    """A command about a user, whose key may be a negative number and must not be parsed as an option."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the arguments, with a negative number as the key."""
        ctx.ignore_unknown_options = any(re.fullmatch(r"-\d+", arg) for arg in args)
        return super().parse_args(ctx, args)


def user_key(conn: sa.Connection | psycopg.Connection[Any], config: Config, text: str) -> Key:
    """The key of the user with this e-mail address or key. Raises InvalidArgument, UnknownUser."""
    users = config.host.users
    email = None if users.email == users.key else users.email
    if "@" in text and email is None and users.key_type in {"uuid", *INTEGER_KEYS}:
        raise InvalidArgument.of(
            "user", text, "no column with e-mail addresses is mapped (host.users.email). Pass the user's key"
        )
    if "@" in text and email is not None:
        statement = SQL("SELECT {} FROM {} WHERE lower({}::text) = %s LIMIT 2").format(
            Identifier(users.key), Identifier(users.schema, users.table), Identifier(email)
        )
        try:
            with translated():
                rows = driver(conn).execute(statement, [text.lower()]).fetchall()
        except PermissionDenied as error:
            raise PermissionDenied(
                f"{server_message(error.__cause__ or error)}: role {driver(conn).info.user} cannot look up an e-mail "
                "address. Pass the user's key, or connect as a role that reads this table",
                sqlstate=error.sqlstate,
            ) from error
        found: list[Key] = [reader_of(users.key_type)(key) for (key,) in rows]
        if len(found) > 1:
            raise InvalidArgument.of("user", text, "more than one user has this address. Pass the user's key")
        if found:
            return found[0]
        if users.key_type in {"uuid", *INTEGER_KEYS}:
            raise UnknownUser(
                f"no user has the e-mail address {shown(text)}. Check its spelling, or pass the user's key", user=text
            )
    return Keys(config.host).user_key_of(text)


@contextmanager
def mapped(
    ctx: typer.Context, connect: Connect[C], *, changes: bool = False, only_reads: bool = False
) -> Iterator[tuple[C, Config]]:
    """A connection to a migrated database, with clear errors for a wrong mapping.

    With ``changes`` a note names the database. Without it, it is only read. ``connect`` and ``only_reads`` are those
    of ``Invocation.connection``.
    """
    given = invocation(ctx)
    lost = _telling_key(ctx) if changes else reading()
    with lost, given.connection(connect, only_reads=only_reads) as (conn, config):
        config = _mapping_of(given, conn, config, changes=changes)  # noqa: PLW2901 - the same, with the database's
        with _naming_mapping(given):
            yield conn, config


@contextmanager
def pool(ctx: typer.Context, *, changes: bool = False) -> Iterator[tuple[sa.Engine, Config]]:
    """As ``mapped``, with an engine, for operations that manage transactions themselves."""
    import sqlalchemy as sa  # noqa: PLC0415 - most commands need no engine

    given = invocation(ctx)
    with given.database() as config:
        made = engine(address(config), poolclass=sa.NullPool)
        with transaction(made) as conn:
            config = _mapping_of(given, conn, config, changes=changes)  # noqa: PLW2901 - the same, with the database's
        with _naming_mapping(given):
            yield made, config


def _mapping_of(
    given: Invocation, conn: sa.Connection | psycopg.Connection[Any], config: Config, *, changes: bool
) -> Config:
    """The settings with the mapping of a migrated database, which a note names before ``changes``."""
    if changes:
        given.note_once(place(conn))
    verify(conn)
    return with_stored_mapping(conn, config)


@contextmanager
def _naming_mapping(given: Invocation) -> Iterator[None]:
    """Name the source of the mapping in errors that a fault in it may have caused."""
    try:
        yield
    except NotMigrated as error:  # the database is migrated, so the missing column is the app's
        what = server_message(error.__cause__) if error.__cause__ else error.message
        raise NotMigrated(
            f"{what}. The database is migrated: {_mapping_source(given)}. To see what is missing: "
            "tallystick migrate status",
            revision=error.revision,
        ) from error
    except InvalidArgument as error:
        if error.argument != "user":
            raise
        message = f"{error.message}: {_mapping_source(given)}"
        raise InvalidArgument(message, argument=error.argument, value=error.value) from error


@contextmanager
def _telling_key(ctx: typer.Context) -> Iterator[None]:
    """Add the key that this command has made up to the message that says to use it again."""
    try:
        yield
    except OutcomeUnknown as error:
        if (key := made_up_key(ctx)) is None:
            raise
        raise OutcomeUnknown(f"{error.message}: --key {key}", sqlstate=error.sqlstate) from error


@contextmanager
def telling_done(ctx: typer.Context) -> Iterator[None]:
    """Say that the change is made if its result cannot be written, since a second run could make it again."""
    try:
        yield
    except OSError as error:
        key = made_up_key(ctx)
        again = f"run it again with --key {key}" if key else "run it again"
        raise TallystickError(
            f"It is done, but the result could not be written: {error.strerror}. To see it, {again}: that changes "
            "nothing"
        ) from error


def _mapping_source(given: Invocation) -> str:
    """The source of the mapping, for a message about a fault in it."""
    if "host" in Config.load(given.config_path).model_fields_set:
        return f"check [host.users] in {given.config_path or FILE_NAME}"
    return "the mapping is the one that the migration stored in the database"


def credits_of(number: int) -> str:
    """A number of credits, as "1 credit" or "0 credits"."""
    return f"{number} credit" if number in (1, -1) else f"{number} credits"


def deletion(*, before: bool, now: bool) -> str:
    """The state of a user or a workshop after a soft delete or its undo, for a message."""
    if now:
        return "was deleted already" if before else "is deleted"
    return "is back" if before else "was not deleted"


@app.command(cls=OfUser, rich_help_panel="Credits")
def balance(ctx: typer.Context, user: UserArgument, as_json: Json = False) -> None:
    """Show how many credits a user has."""
    with mapped(ctx, connect_driver, only_reads=True) as (conn, config):
        now = Ledger(config).standing(conn, user_key(conn, config, user))

    def show() -> None:
        kept = f": {now.held} set aside by holds, {now.available} to spend" if now.held else ""
        typer.echo(f"{credits_of(now.balance)}{kept}")

    result = {"user": user, "balance": now.balance, "held": now.held, "available": now.available}
    emit(result, show, as_json=as_json)


@app.command(cls=OfUser, rich_help_panel="Credits")
def lots(ctx: typer.Context, user: UserArgument, as_json: Json = False) -> None:
    """Show a user's credits that expire, in the order in which they are spent."""
    with mapped(ctx, connect_driver, only_reads=True) as (conn, config):
        ledger, key = Ledger(config), user_key(conn, config, user)
        ledger.balance(conn, key)  # an unknown user is an error here, not an empty list
        found = ledger.lots(conn, key)

    def show() -> None:
        if not found:
            out.print("No credits that expire.")
            return
        shown = table("expires (UTC)", "left", "given", "description", "id", right=("left", "given"))
        for lot in found:
            moment = f"{lot.expires_at:%Y-%m-%d %H:%M}"
            shown.add_row(moment, str(lot.remaining), str(lot.given), escape(lot.description), str(lot.id))
        shown.columns[-1].no_wrap = True
        out.print(shown)

    emit(found, show, as_json=as_json)


def ledger_table(rows: Sequence[CreditTransaction]) -> Table:
    """Rows of a ledger as a table."""
    shown = table("#", "when (UTC)", "type", "amount", "balance", "description", "id", right=("#", "amount", "balance"))
    for row in rows:
        moment = (row.completed_at or row.created_at).astimezone(dt.UTC)
        shown.add_row(
            str(row.sequence or row.status),
            f"{moment:%Y-%m-%d %H:%M:%S}",
            str(row.type),
            f"{row.amount:+}",
            "" if row.balance_after is None else str(row.balance_after),
            escape(row.description),
            str(row.id),
        )
    shown.columns[-1].no_wrap = True  # it is to be copied
    return shown


def show_ledger(rows: Sequence[CreditTransaction]) -> None:
    """Print rows as a table, or as lines if that is too wide."""
    if out.width >= NARROW:
        out.print(ledger_table(rows))
        return
    for row in rows:
        moment = (row.completed_at or row.created_at).astimezone(dt.UTC)
        balance = "" if row.balance_after is None else f", balance {row.balance_after}"
        out.print(f"{row.sequence or row.status}  {moment:%Y-%m-%d %H:%M:%S} UTC  {row.type} {row.amount:+}{balance}")
        out.print(f"  {row.id}  {row.description}", markup=False)


@app.command(cls=OfUser, rich_help_panel="Credits")
def history(
    ctx: typer.Context,
    user: UserArgument,
    limit: Annotated[int, typer.Option("--limit", help="Rows to show.", min=1, max=1000)] = 50,
    before: Annotated[
        str | None,
        typer.Option("--before", help="Show older rows than this one: its number (#), or its id.", metavar="ROW"),
    ] = None,
    failed: Annotated[bool, typer.Option("--failed", help="Show failed purchases too.")] = False,
    as_json: Json = False,
) -> None:
    """Show a user's ledger, newest first."""
    with mapped(ctx, connect_driver, only_reads=True) as (conn, config):
        ledger = Ledger(config)
        key = user_key(conn, config, user)
        ledger.balance(conn, key)  # an unknown user is an error here, not an empty list
        rows = ledger.history(conn, key, limit=limit, before=before, include_failed=failed)

    def show() -> None:
        if not rows:
            out.print("No credit transactions yet.")
            return
        show_ledger(rows)
        if len(rows) == limit:
            note(f"Older ones: tallystick history {shlex.quote(user)} --before {shlex.quote(rows[-1].cursor)}")

    emit(rows, show, as_json=as_json)


def _move(
    ctx: typer.Context,
    user: str,
    move: Callable[[Ledger, psycopg.Connection[Any], Key], CreditTransaction],
    *,
    as_json: bool,
) -> None:
    """Make one credit transaction of ``user``, and print it."""
    with mapped(ctx, connect_driver, changes=True) as (conn, config):
        ledger, key = Ledger(config), user_key(conn, config, user)
        done = move(ledger, conn, key)
        now = ledger.balance(conn, key)

    def show() -> None:
        word = "Already done:" if done.replayed else "Done:"
        balance = f"Balance {done.balance_after}"
        if now != done.balance_after:
            balance = f"{balance} then, {now} now"
        typer.echo(f"{word} {done.description} ({done.amount:+}). {balance}. Row {done.sequence}, {done.id}.")

    with telling_done(ctx):
        emit(done, show, as_json=as_json)


@app.command(
    cls=OfUser,
    rich_help_panel="Credits",
    epilog=examples(
        "tallystick consume ada@example.com --workshop 42 --key unlock-42",
        'tallystick consume 7 --credits 3 --key report-9 --description "Report of May"',
    ),
)
def consume(
    ctx: typer.Context,
    user: UserArgument,
    *,
    workshop: Annotated[str | None, typer.Option("--workshop", help="The workshop to unlock.", metavar="KEY")] = None,
    credits: Annotated[int, typer.Option("--credits", help="The number of credits.")] = 1,
    key: KeyOption,
    description: DescriptionOption = None,
    as_json: Json = False,
) -> None:
    """Spend a user's credits, for a workshop or for anything else."""
    _move(
        ctx,
        user,
        lambda ledger, conn, who: ledger.consume(
            conn,
            who,
            workshop=None if workshop is None else ledger.keys.workshop_key_of(workshop),
            credits=credits,
            key=key,
            description=description,
        ),
        as_json=as_json,
    )


@app.command(
    cls=OfUser,
    rich_help_panel="Credits",
    epilog=examples(
        'tallystick grant ada@example.com 5 --key ticket-81 --description "Goodwill"',
        "tallystick grant 7 10 --expires-in 30 --key spring",
    ),
)
def grant(
    ctx: typer.Context,
    user: UserArgument,
    credits: Annotated[int, typer.Argument(help="The number of credits.", metavar="CREDITS")],
    *,
    description: Annotated[str, typer.Option("--description", help="The text in the user's history.")] = "Granted",
    expires_in: Annotated[
        float | None,
        typer.Option(
            "--expires-in", help="The number of days after which these credits expire.", metavar="DAYS", min=0.001
        ),
    ] = None,
    key: KeyOption,
    as_json: Json = False,
) -> None:
    """Give a user credits that nobody paid for: goodwill, a promotion, an opening balance."""
    expires_at = None if expires_in is None else dt.datetime.now(dt.UTC) + dt.timedelta(days=min(expires_in, 365_000))
    _move(
        ctx,
        user,
        lambda ledger, conn, who: ledger.grant(
            conn,
            who,
            credits=credits,
            key=key,
            description=description,
            expires_at=expires_at,
        ),
        as_json=as_json,
    )


def _takes_back(
    ctx: typer.Context,
    user: str,
    operation: str,
    row: UUID | str,
    *,
    credits: int | None,
    key: str,
    description: str | None,
    as_json: bool,
) -> None:
    """Make a row that refers to ``row`` and is limited by it."""
    _move(
        ctx,
        user,
        lambda ledger, conn, who: getattr(ledger, operation)(
            conn, who, row, credits=credits, key=key, description=description
        ),
        as_json=as_json,
    )


@app.command(cls=OfUser, rich_help_panel="Credits")
def reverse(
    ctx: typer.Context,
    user: UserArgument,
    consumption: RowArgument,
    *,
    credits: AllOption = None,
    key: KeyOption,
    description: DescriptionOption = None,
    as_json: Json = False,
) -> None:
    """Give a consumption's credits back. If all are given back, its workshop is locked again."""
    _takes_back(ctx, user, "reverse", consumption, credits=credits, key=key, description=description, as_json=as_json)


@app.command(cls=OfUser, rich_help_panel="Credits")
def correct(
    ctx: typer.Context,
    user: UserArgument,
    grant: RowArgument,
    *,
    credits: AllOption = None,
    key: KeyOption,
    description: DescriptionOption = None,
    as_json: Json = False,
) -> None:
    """Take back credits of a grant that was a mistake. The balance may fall below zero."""
    _takes_back(ctx, user, "correct", grant, credits=credits, key=key, description=description, as_json=as_json)


@app.command(rich_help_panel="Credits")
def sweep(
    ctx: typer.Context,
    limit: Annotated[int, typer.Option("--limit", help="Users in one transaction.", min=1, max=100_000)] = 1000,
    as_json: Json = False,
) -> None:
    """Write the rows for expired holds and credits of users without a write since then.

    Tallystick gives the right balances without it. Run it once a day for code that reads the tables directly. It also
    adds up past days, so that the console's overview need not read their rows.
    """
    swept = 0
    with pool(ctx, changes=True) as (made, config):
        ledger = Ledger(config)
        while True:
            with transaction(made) as conn:
                found = ledger.sweep(conn, limit=limit)
            swept += found
            if not found:  # fewer than the limit may be all but one who fails
                break
        message = f"{counted(swept, 'user')} had holds or credits that expired."
        emit({"users": swept}, lambda: out.print(message), as_json=as_json)
        try:
            left = close_all_days(made, ledger)
        except TallystickError as refused:
            note(f"Past days were not added up for the console, which reads their rows instead: {refused.message}")
        else:
            if left:
                note(f"{left} of the last 60 days wait for open transactions. The next sweep adds them up.")


allowances = typer.Typer(no_args_is_help=True, help="Give the credits of a plan for this week or month.")
app.add_typer(allowances, name="allowances", rich_help_panel="Credits")


@allowances.command("run")
def allowances_run(ctx: typer.Context, as_json: Json = False) -> None:
    """Give each user the plan's credits for this period, unless they are given already.

    You may run it at any time, also after an interruption: nothing is given twice. A user who is refused does not stop
    the others; exit code 1 if there are any.
    """
    from tallystick.allowances import Allowances  # noqa: PLC0415 - only this command needs it

    with pool(ctx, changes=True) as (made, config):
        if not config.allowances:
            raise ConfigError("no plan has an allowance. Write [[allowances]] into tallystick.toml", key="allowances")
        with progress_bar("Giving") as progress:  # each user's grant is a transaction of its own
            result = Allowances(config).run(made, progress=progress)
    emit(result, lambda: show_allowances(result), as_json=as_json)
    if result.refused:
        raise typer.Exit(1)


REFUSED_SHOWN = 10


def show_allowances(result: AllowanceRun) -> None:
    """Print how many users got credits, then the first of those who were refused, with the reasons."""
    out.print(f"{counted(result.users, 'user')} got credits.")
    if not result.refused:
        return
    number, left = len(result.refused), len(result.refused) - REFUSED_SHOWN
    whom = (
        "1 user got none, since the grant was" if number == 1 else f"{number:,} users got none, since their grants were"
    )
    out.print(f"{whom} refused. Correct the cause, then run it again:", style="red", markup=False)
    for each in result.refused[:REFUSED_SHOWN]:
        out.print(f"  User {each.user}: {each.message}", style="red", markup=False)
    if left > 0:
        out.print(f"  … and {left} more. To see all: tallystick allowances run --json", style="red", markup=False)


holds = typer.Typer(no_args_is_help=True, help="Set credits aside for work under way, then charge or release them.")
app.add_typer(holds, name="hold", rich_help_panel="Credits")


@holds.command(
    "place",
    cls=OfUser,
    epilog=examples("tallystick hold place ada@example.com 5 --minutes 30 --key answer-17"),
)
def hold_place(
    ctx: typer.Context,
    user: UserArgument,
    credits: Annotated[int, typer.Argument(help="The number of credits.", metavar="CREDITS")],
    *,
    minutes: Annotated[
        float,
        typer.Option("--minutes", help="The minutes after which the hold ends, up to 366 days.", min=0.02, max=527_040),
    ] = 15,
    key: KeyOption,
    description: DescriptionOption = None,
    as_json: Json = False,
) -> None:
    """Set credits aside for work under way."""
    with mapped(ctx, connect_driver, changes=True) as (conn, config):
        ledger = Ledger(config)
        held = ledger.hold(
            conn,
            user_key(conn, config, user),
            credits=credits,
            key=key,
            expires_in=dt.timedelta(minutes=minutes),
            description=description,
        )
    word = "Held already" if held.replayed else "Held"
    until = f" until {held.expires_at.astimezone(dt.UTC):%Y-%m-%d %H:%M:%S} UTC" if held.expires_at else ""
    message = (
        f"{word}: {credits_of(credits)}{until}, {held.id}.\n"
        f"To charge them: tallystick hold capture {shlex.quote(user)} {held.id}"
    )
    with telling_done(ctx):
        emit(held, lambda: typer.echo(message), as_json=as_json)


@holds.command("capture", cls=OfUser)
def hold_capture(
    ctx: typer.Context,
    user: UserArgument,
    hold: RowArgument,
    credits: Annotated[
        int | None, typer.Option("--credits", help="The number of credits; by default all that are held.")
    ] = None,
    debt: Annotated[bool, typer.Option("--debt", help="Also charge credits beyond the balance, as a debt.")] = False,
    as_json: Json = False,
) -> None:
    """Charge a hold, once."""
    _move(
        ctx,
        user,
        lambda ledger, conn, who: ledger.capture(conn, who, hold, credits=credits, allow_debt=debt),
        as_json=as_json,
    )


@holds.command("release", cls=OfUser)
def hold_release(ctx: typer.Context, user: UserArgument, hold: RowArgument, as_json: Json = False) -> None:
    """End a hold without a charge: its credits can be spent again."""
    with mapped(ctx, connect_driver, changes=True) as (conn, config):
        done = Ledger(config).release(conn, user_key(conn, config, user), hold)
    message = f"{'Released already' if done.replayed else 'Released'}: {done.description}, {done.id}."
    emit(done, lambda: out.print(message, markup=False), as_json=as_json)


@app.command(cls=OfUser, rich_help_panel="Credits")
def refund(
    ctx: typer.Context,
    user: UserArgument,
    purchase: Annotated[
        str, typer.Argument(help="The id of the purchase, as `tallystick history` shows it.", metavar="PURCHASE")
    ],
    *,
    credits: AllOption = None,
    key: KeyOption,
    description: DescriptionOption = None,
    as_json: Json = False,
) -> None:
    """Take back credits of a purchase. It moves no money; tallystick stripe refund moves both."""
    _takes_back(ctx, user, "refund", purchase, credits=credits, key=key, description=description, as_json=as_json)


purchases = typer.Typer(no_args_is_help=True, help="Settle a purchase by hand, where it was sold without Stripe.")
app.add_typer(purchases, name="purchase", rich_help_panel="Credits")


@purchases.command(cls=OfUser)
def complete(
    ctx: typer.Context,
    user: UserArgument,
    purchase: PurchaseArgument,
    amount_paid: Annotated[
        int | None, typer.Option("--amount-paid", help="The amount paid, in minor units: 7900 for $79.00.")
    ] = None,
    currency: Annotated[str | None, typer.Option("--currency", help="The currency, such as usd.")] = None,
    as_json: Json = False,
) -> None:
    """Give the credits of a purchase that was paid. A second run changes nothing."""
    _move(
        ctx,
        user,
        lambda ledger, conn, who: ledger.complete_purchase(
            conn, who, purchase=purchase, amount_paid=amount_paid, currency=currency
        ),
        as_json=as_json,
    )


@purchases.command(cls=OfUser)
def fail(
    ctx: typer.Context,
    user: UserArgument,
    purchase: PurchaseArgument,
    reason: Annotated[str, typer.Option("--reason", help="The text in the user's history.")] = "not paid",
    as_json: Json = False,
) -> None:
    """Mark a pending purchase as failed. A second run changes nothing."""
    with mapped(ctx, connect_driver, changes=True) as (conn, config):
        done = Ledger(config).fail_purchase(conn, user_key(conn, config, user), purchase=purchase, reason=reason)

    def show() -> None:
        out.print(f"{'Already failed' if done.replayed else 'Failed'}: {done.description}, {done.id}.", markup=False)

    emit(done, show, as_json=as_json)


@app.command(cls=OfUser, rich_help_panel="Credits")
def onboarding(
    ctx: typer.Context,
    user: UserArgument,
    complete: Annotated[bool, typer.Option("--complete", help="Mark the onboarding as complete.")] = False,
    reset: Annotated[bool, typer.Option("--reset", help="Mark the onboarding as not begun.")] = False,
    as_json: Json = False,
) -> None:
    """Show or change a user's onboarding state."""
    if complete and reset:
        raise typer.BadParameter("--complete and --reset exclude each other. Leave one out")
    changes = complete or reset
    with mapped(ctx, connect_driver, changes=changes, only_reads=not changes) as (conn, config):
        accounts, key = Accounts(config), user_key(conn, config, user)
        if complete:
            account = accounts.complete_onboarding(conn, key)
        elif reset:
            account = accounts.reset_onboarding(conn, key)
        else:
            account = accounts.get(conn, key)
    state = "complete" if account.onboarding_complete else "not complete"
    emit(account, lambda: typer.echo(f"Onboarding is {state}."), as_json=as_json)


@app.command(
    rich_help_panel="Trust",
    epilog=examples(
        "tallystick audit --user ada@example.com",
        'tallystick audit --since "2026-11-01 09:30:00"',
    ),
)
def audit(
    ctx: typer.Context,
    user: Annotated[str | None, typer.Option("--user", help="Only this user.", metavar="KEY")] = None,
    since: Annotated[
        dt.datetime | None,
        typer.Option(
            "--since",
            help="Only users whose ledger has changed since this time (UTC): 2026-11-01, or 2026-11-01T09:30:00.",
            metavar="TIME",
        ),
    ] = None,
    after: Annotated[
        str | None,
        typer.Option("--after", help="Continue an interrupted audit after this user.", metavar="KEY"),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Leave out the slowest check, completed_in_order.")] = False,
    limit: Annotated[int, typer.Option("--limit", help="The largest number of findings to show.", min=1)] = 100,
    checks: Annotated[bool, typer.Option("--checks", help="List what is checked, and exit.")] = False,
    as_json: Json = False,
) -> None:
    """Check every balance against its ledger. Changes nothing; exit code 1 if a fault is found.

    The audit shares no code with the ledger's functions.
    """
    from tallystick import audit as auditing  # noqa: PLC0415 - only this command needs it

    if checks:
        listing = {name: check.purpose for name, check in auditing.CHECKS.items()}
        shown = table("check", "what must hold")
        for name, purpose in listing.items():
            shown.add_row(name, purpose)
        emit(listing, lambda: out.print(shown), as_json=as_json)
        return
    parts: list[AuditReport] = []
    with mapped(ctx, connect, only_reads=True) as (conn, config):
        try:
            with progress_bar("Auditing") as progress:
                report = auditing.audit(
                    conn,
                    config,
                    user=None if user is None else user_key(conn, config, user),
                    since=None if since is None else since.replace(tzinfo=since.tzinfo or dt.UTC),
                    after=None if after is None else user_key(conn, config, after),
                    quick=quick,
                    limit=limit,
                    progress=progress,
                    each=parts.append,
                )
        except (KeyboardInterrupt, SystemExit):  # the latter by SIGTERM or SIGHUP
            if parts:
                for part in [] if as_json else parts:  # stdout stays empty, or it would be no JSON
                    show_findings(part)
                behind = shlex.quote(str(parts[-1].last))
                note(f"Stopped. To check the other users: tallystick audit --after {behind}")
            raise
    emit(report, lambda: show_audit(report), as_json=as_json)
    if not report.clean:
        raise typer.Exit(1)


def show_audit(report: AuditReport) -> None:
    """Print a report, the verdict first."""
    size = f"{counted(report.users, 'user')} and {counted(report.rows, 'credit transaction')} in {report.seconds:.1f} s"
    faults = sum(finding.fault for finding in report.findings)
    if report.clean:
        out.print(f"[green]Clean.[/] All balances agree with their ledgers: {size}, {len(report.checked)} checks.")
    else:
        out.print(
            f"[red]{f'{faults:,} or more faults' if report.truncated else counted(faults, 'fault')}[/] in {size}."
        )
    if waiting := len(report.findings) - faults:
        out.print(f"{counted(waiting, 'more finding')}, by which no balance is wrong.")
    show_findings(report)


def show_findings(report: AuditReport) -> None:
    """Print the findings, each with its place and remedy."""
    for finding in report.findings:
        out.print()
        out.print(f"[bold]{finding.check}[/]{escape(str(finding).removeprefix(finding.check))}")
