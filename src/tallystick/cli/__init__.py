"""The command line: parse, call, print. Each command calls public functions that a program can call as well."""

from __future__ import annotations

import errno
import io
import signal
import sys
from collections.abc import Iterable
from copy import copy
from importlib import import_module
from typing import NoReturn

import typer
from typer.main import get_command_name
from typer.models import CommandInfo

from tallystick.cli.app import app, print_error, without_global_options
from tallystick.errors import TallystickError
from tallystick.signals import ended_by_signals

__all__ = ["commands", "main"]

MODULES = {
    "backups": ("backup", "restore"),
    "clients": ("client",),
    "develop": ("db", "demo", "seed"),
    "doctor": ("config", "doctor"),
    "events": ("events", "low-balance"),
    "ledger": (
        "allowances",
        "audit",
        "balance",
        "consume",
        "correct",
        "grant",
        "history",
        "hold",
        "lots",
        "onboarding",
        "purchase",
        "refund",
        "reverse",
        "sweep",
    ),
    "migrations": ("adopt", "init", "migrate"),
    "people": ("users",),
    "selling": ("stripe",),
    "serve": ("serve",),
    "workshops": ("workshops",),
}
"""The commands of each module. To import a module and make its commands takes longer than most of them do, so only what
is requested is imported and made."""

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)


def commands(words: Iterable[str] = ()) -> typer.Typer:
    """The command that a command line of these words requests; all commands if it requests none that there is."""
    _, others = without_global_options(words)
    requested = next(iter(others), None)
    found = [module for module, names in MODULES.items() if requested in names]
    for module in found or MODULES:
        import_module(f"{__name__}.{module}")
    if not found:
        return app
    made = copy(app)
    made.registered_commands = [each for each in app.registered_commands if _name(each) == requested]
    made.registered_groups = [each for each in app.registered_groups if each.name == requested]
    return made


def _name(command: CommandInfo) -> str | None:
    return command.name or (command.callback and get_command_name(command.callback.__name__))


def _requested() -> typer.Typer:
    if sys.stdout is None:
        raise TallystickError("The result cannot be written, since stdout is closed. Send it to a file or to /dev/null")
    try:
        return commands(sys.argv[1:])
    except KeyboardInterrupt:  # while the modules are imported; a command that runs ends with the same code
        sys.exit(128 + signal.SIGINT)


def main() -> NoReturn:
    """Run the command line and exit.

    The exit code is 0 for done, 1 for refused or findings, 2 for wrong usage, 128 + the number of a signal.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal's encoding may lack a character of a title
    try:
        with ended_by_signals():  # so that a command cleans up
            _requested()()
    except SystemExit:
        raise  # without importing SQLAlchemy
    except TallystickError as error:
        print_error(error.message)
    except BrokenPipeError:
        sys.stderr.close()  # the reader, as in `| head`, has ended
    except OSError as error:
        if error.filename is not None:
            print_error(f"{error.filename}: {error.strerror}. Check this path, and who may read and write it")
        elif error.errno in _FULL:
            print_error(f"The result could not be written: {error.strerror}. Check where the output goes")
        else:
            raise
    except _of_the_database() as error:
        print_error(_explained(error))
    sys.exit(1)


def _of_the_database() -> tuple[type[Exception], ...]:
    from psycopg import Error  # noqa: PLC0415 - only needed after an error
    from sqlalchemy.exc import SQLAlchemyError  # noqa: PLC0415

    return Error, SQLAlchemyError


def _explained(error: Exception) -> str:
    from psycopg import Error  # noqa: PLC0415
    from sqlalchemy.exc import DBAPIError  # noqa: PLC0415

    from tallystick.database import server_message  # noqa: PLC0415

    if isinstance(error, (DBAPIError, Error)):
        return f"The database refused: {server_message(error)}"
    return f"The database could not be used: {error}"
