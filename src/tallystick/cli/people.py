"""A user's account: tallystick users show, delete, restore, merge, erase."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from tallystick.accounts import Account, Accounts
from tallystick.cli.app import Json, UserArgument, app, emit, note, out
from tallystick.cli.ledger import KeyOption, OfUser, credits_of, deletion, mapped, telling_done, user_key
from tallystick.database import connect_driver
from tallystick.errors import InvalidArgument
from tallystick.ledger import Ledger

people = typer.Typer(no_args_is_help=True, help="Show, delete or restore a user, merge two, or erase a person's data.")
app.add_typer(people, name="users", rich_help_panel="Credits")

Yes = Annotated[bool, typer.Option("--yes", help="Do not ask first.")]


def _ask(question: str, *, yes: bool, as_json: bool) -> None:
    """Ask for confirmation at a terminal, but not in scripts. No transaction is open meanwhile."""
    if not yes and sys.stdin.isatty() and not as_json:
        typer.confirm(question, abort=True, err=True)


@people.command(cls=OfUser)
def show(ctx: typer.Context, user: UserArgument, as_json: Json = False) -> None:
    """Show a user's account: credits, plan, onboarding, Stripe customer, deletion."""
    with mapped(ctx, connect_driver, only_reads=True) as (conn, config):
        account = Accounts(config).get(conn, user_key(conn, config, user))
    emit(account, lambda: out.print(_lines(account), markup=False), as_json=as_json)


def _lines(account: Account) -> str:
    deleted = account.deleted_at and f"{account.deleted_at:%Y-%m-%d %H:%M} UTC"
    facts = {
        "Credits": f"{account.credit_balance}" + (f", {held} of them held" if (held := account.standing.held) else ""),
        "Plan": account.plan_tier,
        "Onboarding": "complete" if account.onboarding_complete else "not complete",
        "Stripe customer": account.stripe_customer_id or "none",
        "Deleted": deleted or "no",
    }
    return "\n".join([f"User {account.user}", *(f"  {name:<16}{value}" for name, value in facts.items())])


@people.command(cls=OfUser)
def delete(ctx: typer.Context, user: UserArgument, as_json: Json = False) -> None:
    """Soft-delete a user: the row and its ledger stay, and nothing can be bought or spent. Undo: users restore USER."""
    _change(ctx, user, deleted=True, as_json=as_json)


@people.command(cls=OfUser)
def restore(ctx: typer.Context, user: UserArgument, as_json: Json = False) -> None:
    """Bring a soft-deleted user back. Credits are as they were."""
    _change(ctx, user, deleted=False, as_json=as_json)


def _change(ctx: typer.Context, user: str, *, deleted: bool, as_json: bool) -> None:
    with mapped(ctx, connect_driver, changes=True) as (conn, config):
        accounts, key = Accounts(config), user_key(conn, config, user)
        before = accounts.get(conn, key).deleted_at is not None
        account = (accounts.delete_user if deleted else accounts.restore_user)(conn, key)
    state = deletion(before=before, now=deleted)
    message = f"User {account.user} {state}, with {credits_of(account.credit_balance)}."
    emit(account, lambda: out.print(message, markup=False), as_json=as_json)


@people.command(cls=OfUser)
def merge(
    ctx: typer.Context,
    user: UserArgument,
    into: Annotated[
        str, typer.Argument(help="The key or e-mail address of the user who gets the credits.", metavar="INTO")
    ],
    *,
    key: KeyOption,
    description: Annotated[
        str | None, typer.Option("--description", help="The text in the history of both users.")
    ] = None,
    yes: Yes = False,
    as_json: Json = False,
) -> None:
    """Move all credits of USER to INTO, debts too, and soft-delete USER. Shows the effect, and asks at a terminal."""
    with mapped(ctx, connect_driver, changes=True) as (conn, config):
        accounts = Accounts(config)
        gone, stays = (accounts.get(conn, user_key(conn, config, text)) for text in (user, into))
        if gone.user == stays.user:
            raise InvalidArgument(
                f"USER and INTO are the same user, {gone.user}. Name two users", argument="into", value=into
            )
    after = gone.credit_balance + stays.credit_balance
    note(
        f"This moves {credits_of(gone.credit_balance)} of user {gone.user} to user {stays.user}, whose balance goes "
        f"from {stays.credit_balance} to {after}, and soft-deletes {gone.user}. Workshops, plan ({gone.plan_tier}) and "
        f"Stripe customer ({gone.stripe_customer_id or 'none'}) of {gone.user} stay there."
    )
    _ask("Merge them?", yes=yes, as_json=as_json)
    with mapped(ctx, connect_driver, changes=True) as (conn, config):
        ledger = Ledger(config)
        done = ledger.merge(conn, gone.user, into=stays.user, key=key, description=description)
    word = "Already done" if done.replayed else "Done"
    message = f"{word}: {credits_of(done.credits)} moved. User {done.into} has {credits_of(done.balance)}."
    with telling_done(ctx):
        emit(done, lambda: typer.echo(message), as_json=as_json)


@people.command(cls=OfUser)
def erase(ctx: typer.Context, user: UserArgument, yes: Yes = False, as_json: Json = False) -> None:
    """Remove a person's data from the ledger, and soft-delete the user. It cannot be undone; asks at a terminal."""
    with mapped(ctx, connect_driver, changes=True) as (conn, config):
        found = Accounts(config).get(conn, user_key(conn, config, user))
    customer = found.stripe_customer_id
    at_stripe = f", and delete the customer {customer} at Stripe" if customer else ""
    note(
        f"This removes the descriptions, metadata and keys of user {found.user}'s credit transactions for good, and "
        f"soft-deletes the user, who has {credits_of(found.credit_balance)}. Empty your own columns of the user "
        f"yourself{at_stripe}."
    )
    _ask("Erase it?", yes=yes, as_json=as_json)
    with mapped(ctx, connect_driver, changes=True) as (conn, config):
        done = Accounts(config).erase(conn, found.user)
    emit(
        done,
        lambda: out.print(f"Done: only the numbers of user {done.user} are left.", markup=False),
        as_json=as_json,
    )
