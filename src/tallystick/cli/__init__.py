"""The command line: parse, call, print. Everything it does is a public function that a program can call as well."""

from __future__ import annotations

import errno
import sys
from typing import NoReturn

from sqlalchemy.exc import DBAPIError, SQLAlchemyError

from tallystick.cli import (  # noqa: F401 - each adds its commands to the app
    backups,
    clients,
    develop,
    doctor,
    events,
    ledger,
    migrations,
    people,
    selling,
    serve,
)
from tallystick.cli.app import app, complain
from tallystick.database import said
from tallystick.errors import TallystickError
from tallystick.signals import ended_by_signals

__all__ = ["app", "main"]

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)


def main() -> NoReturn:
    """Run the command line and exit.

    0 done, 1 refused or something was found, 2 wrong usage, 128 + its number where a signal ended it.
    """
    try:
        with ended_by_signals():  # so that nothing is left of what a command had started
            app()
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
    except DBAPIError as error:
        complain(f"The database refused: {said(error)}")
    except SQLAlchemyError as error:
        complain(f"The database could not be used: {error}")
    sys.exit(1)
