"""Clients in other languages: tallystick client typescript."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from tallystick.cli.app import app, invocation, out, reading
from tallystick.database import connect_driver
from tallystick.errors import ConfigError
from tallystick.files import replace_file
from tallystick.ledger.typescript import SIGNED, typescript
from tallystick.schema import mapping_of, verify

client = typer.Typer(no_args_is_help=True, help="Write a client of the ledger for an app in another language.")
app.add_typer(client, name="client", rich_help_panel="Begin here")

_STDOUT = Path("-")


@client.command("typescript")
def write_typescript(
    ctx: typer.Context,
    output: Annotated[Path, typer.Option("--output", help="The file to write; - for stdout.", metavar="FILE")] = Path(
        "tallystick.ts"
    ),
) -> None:
    """Write one typed TypeScript file that calls the functions in the database, over any driver.

    The types of keys and credits are those of the migrated database. It replaces only a file that it wrote itself.
    """
    with reading(), invocation(ctx).connection(connect_driver) as (conn, _):
        verify(conn)
        host = mapping_of(conn)
    text = typescript(host)
    if output == _STDOUT:
        sys.stdout.write(text)
        return
    if output.exists() and SIGNED not in output.read_text("utf-8", errors="replace"):
        raise ConfigError(
            f"{output} exists, and this command did not write it. Move it away, or name another file with --output",
            path=str(output),
        )
    replace_file(output, text.encode())
    users, workshops = host.users, host.workshops
    keys = f"users by {users.key_type}" + (f", workshops by {workshops.key_type}" if workshops else "")
    out.print(f"Wrote {output}: {keys}; credits are {host.credits}.", markup=False)
