"""A workshop: tallystick workshops access, delete, restore."""

from __future__ import annotations

from typing import Annotated

import typer

from tallystick.accounts import Accounts
from tallystick.cli.app import Json, app, emit, out
from tallystick.cli.ledger import OfUser, deletion, mapped
from tallystick.database import connect_driver
from tallystick.ledger import AccessReason, Ledger

workshops = typer.Typer(no_args_is_help=True, help="Show a workshop's access, delete it, or restore it.")
app.add_typer(workshops, name="workshops", rich_help_panel="Credits")

WorkshopArgument = Annotated[
    str, typer.Argument(help="The workshop's key (the value in the mapped key column).", metavar="WORKSHOP")
]

_REASONS = {
    AccessReason.UNLOCKED: "a credit unlocked it",
    AccessReason.GRANDFATHERED: "it is older than the paywall",
    AccessReason.PAYWALL_OFF: "the paywall is off",
    AccessReason.LOCKED: "no credit has unlocked it",
    AccessReason.DELETED: "it was deleted",
}


@workshops.command(cls=OfUser)
def access(ctx: typer.Context, workshop: WorkshopArgument, as_json: Json = False) -> None:
    """Show a workshop's access: open or closed, and why."""
    with mapped(ctx, connect_driver, only_reads=True) as (conn, config):
        ledger = Ledger(config)
        key = ledger.keys.workshop_key_of(workshop)
        found = ledger.access(conn, key)
    message = f"Workshop {key} is {'open' if found.open else 'closed'}: {_REASONS[found.reason]}."
    result = {"workshop": key, "open": found.open, "reason": found.reason}
    emit(result, lambda: out.print(message, markup=False), as_json=as_json)


@workshops.command(cls=OfUser)
def delete(ctx: typer.Context, workshop: WorkshopArgument, as_json: Json = False) -> None:
    """Soft-delete a workshop: the credit that unlocked it stays spent. Undo: workshops restore WORKSHOP."""
    _change(ctx, workshop, deleted=True, as_json=as_json)


@workshops.command(cls=OfUser)
def restore(ctx: typer.Context, workshop: WorkshopArgument, as_json: Json = False) -> None:
    """Bring a soft-deleted workshop back, open if a credit had unlocked it."""
    _change(ctx, workshop, deleted=False, as_json=as_json)


def _change(ctx: typer.Context, workshop: str, *, deleted: bool, as_json: bool) -> None:
    with mapped(ctx, connect_driver, changes=True) as (conn, config):
        accounts = Accounts(config)
        key = accounts.keys.workshop_key_of(workshop)
        before = Ledger(config).access(conn, key).reason is AccessReason.DELETED
        (accounts.delete_workshop if deleted else accounts.restore_workshop)(conn, key)
    message = f"Workshop {key} {deletion(before=before, now=deleted)}."
    emit({"workshop": key, "deleted": deleted}, lambda: out.print(message, markup=False), as_json=as_json)
