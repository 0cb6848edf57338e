"""Copies of the database: tallystick backup, restore."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import Annotated

import typer

from tallystick.cli.app import Json, address, app, emit, invocation, note, out, place, progress_bar
from tallystick.database import connect
from tallystick.dev import postgres
from tallystick.errors import BackupError, DevServerError


def backups() -> ModuleType:
    """The module, which needs packages of an extra."""
    try:
        from tallystick import backup  # noqa: PLC0415
    except ModuleNotFoundError as missing:
        raise BackupError(f"backups need {missing.name}. Run: pip install 'tallystick[backup]'") from None
    return backup


def programs_for(url: str, *, restoring: bool = False) -> Path:
    """The folder of the programs to use, which a note on stderr names."""
    found = backups().programs_for(url, _folders(), restoring=restoring)
    note(f"Using {found}.")
    return Path(found.folder)


def _folders() -> list[Path]:
    """The folders of pg_dump and pg_restore: the configured one, which needs no server, else all found."""
    if named := os.environ.get("TALLYSTICK_PG_BIN"):
        return [Path(named).expanduser().absolute()]
    folders: list[Path] = backups().installed()
    with suppress(DevServerError):
        folders.insert(0, postgres.find_binaries())
    return folders


def take_backup(url: str, target: Path) -> None:
    """Take a backup with a progress bar, and a note on stderr when it is verified."""
    programs = programs_for(url)
    with progress_bar("Backup") as bar:
        made = backups().backup(
            url, target, bin_dir=programs, progress=bar, waiting=lambda who: note(f"Waiting for {who}.")
        )
    note(f"Backup {made.path}: {made.bytes:,} bytes, {sum(made.manifest.rows.values()):,} rows, verified.")


@app.command(rich_help_panel="Trust")
def backup(
    ctx: typer.Context,
    file: Annotated[
        Path,
        typer.Argument(
            help="The file to write, which must not exist; with --check, the file to verify.", metavar="FILE"
        ),
    ],
    check: Annotated[bool, typer.Option("--check", help="Only verify an existing backup.")] = False,
    as_json: Json = False,
) -> None:
    """Take a backup of the whole database, and verify it by reading every row back.

    After a failure there is no file. The format is pg_dump's, compressed with zstd: zstd -dc FILE | pg_restore.
    """
    if check:
        programs = backups().newest_programs(_folders()).folder
        with progress_bar("Verifying") as bar:
            manifest = backups().verify_backup(file, bin_dir=programs, progress=bar)
    else:
        with invocation(ctx).database(migrating=True) as config:
            take_backup(address(config), file)
        manifest = backups().read_manifest(file)

    def show() -> None:
        out.print(
            f"{file}: {manifest.database} of {manifest.taken_at}, PostgreSQL {manifest.server}, "
            f"{sum(manifest.rows.values()):,} rows in {len(manifest.rows)} tables.",
            markup=False,
        )

    emit(manifest, show, as_json=as_json)


@app.command(rich_help_panel="Trust")
def restore(
    ctx: typer.Context,
    file: Annotated[Path, typer.Argument(help="A backup.", metavar="FILE")],
    no_owners: Annotated[
        bool,
        typer.Option(
            "--no-owners", help="Make the restoring role the owner, and leave out privileges and tablespaces."
        ),
    ] = False,
    as_json: Json = False,
) -> None:
    """Restore a backup into an empty database, in one transaction, and count its rows."""
    with invocation(ctx).database(migrating=True) as config:
        with connect(address(config)) as conn:
            note(f"{place(conn)}.")
        programs = programs_for(address(config), restoring=True)
        with progress_bar("Restore") as bar:
            manifest = backups().restore(file, address(config), bin_dir=programs, owners=not no_owners, progress=bar)
    emit(
        manifest,
        lambda: out.print(f"Restored {sum(manifest.rows.values()):,} rows in {len(manifest.rows)} tables."),
        as_json=as_json,
    )
