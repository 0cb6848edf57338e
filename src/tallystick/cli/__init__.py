"""The command line: parse, call, print. Everything it does is a public function that a program can call as well."""

from __future__ import annotations

import errno
import sys
from collections.abc import Iterable
from importlib import import_module
from typing import NoReturn

import typer

from tallystick.cli.app import app, complain
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
}
"""The commands of each module. An import takes longer than most commands, so only the one that is asked for is made."""

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)


def commands(words: Iterable[str] = ()) -> typer.Typer:
    """The commands that are among ``words``; all of them where there is none."""
    asked = set(words)
    found = [module for module, names in MODULES.items() if asked.intersection(names)]
    for module in found or MODULES:
        import_module(f"{__name__}.{module}")
    return app


def main() -> NoReturn:
    """Run the command line and exit.

    0 done, 1 refused or something was found, 2 wrong usage, 128 + its number where a signal ended it.
    """
    try:
        with ended_by_signals():  # so that nothing is left of what a command had started
            commands(sys.argv[1:])()
    except SystemExit:
        raise  # before SQLAlchemy is imported for nothing
    except TallystickError as error:
        complain(error.message)
    except BrokenPipeError:
        sys.stderr.close()  # the reader, as in `| head`, has what it wanted
    except OSError as error:
        if error.filename is not None:
            complain(f"{error.filename}: {error.strerror}. Check this path, and who may read and write it")
        elif error.errno in _FULL:
            complain(f"The result could not be written: {error.strerror}. Check where the output goes")
        else:
            raise
    except _sqlalchemys_own() as error:
        complain(_explained(error))
    sys.exit(1)


def _sqlalchemys_own() -> type[Exception]:
    from sqlalchemy.exc import SQLAlchemyError  # noqa: PLC0415 - asked for once something was raised

    return SQLAlchemyError


def _explained(error: Exception) -> str:
    from sqlalchemy.exc import DBAPIError  # noqa: PLC0415

    from tallystick.database import server_message  # noqa: PLC0415

    if isinstance(error, DBAPIError):
        return f"The database refused: {server_message(error)}"
    return f"The database could not be used: {error}"
