"""The PostgreSQL that the tests run on.

``TALLYSTICK_TEST_PG`` chooses it: ``18`` (the default) is the embedded wheel, another number is the machine's
own (``/usr/lib/postgresql/15/bin``, or the folder named by ``TALLYSTICK_TEST_PG_BIN``).
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from tallystick.dev.postgres import Server, find_binaries

EMBEDDED = "18"


def pg_bin() -> Path:
    chosen = os.environ.get("TALLYSTICK_TEST_PG", EMBEDDED)
    if chosen == EMBEDDED:
        return find_binaries()
    return Path(os.environ.get("TALLYSTICK_TEST_PG_BIN", f"/usr/lib/postgresql/{chosen}/bin"))


@cache
def major() -> int:
    """Of the PostgreSQL that the tests run on."""
    output = subprocess.run([pg_bin() / "postgres", "--version"], capture_output=True, text=True, check=True).stdout
    return int(re.search(r"\d+", output)[0])  # type: ignore[index]  # it says its version


@contextmanager
def standby_of(primary: Server, folder: Path, *, name: str) -> Iterator[Server]:
    """A streaming replica that reads along and can be asked, made by pg_basebackup; ``name`` is how it is seen."""
    standby = Server(folder, settings=primary.settings, bin_dir=primary.bin)
    standby._make_folder()
    where = f"host={primary.env['PGHOST']} port={primary.env['PGPORT']} user=postgres application_name={name}"
    standby._run("pg_basebackup", "-D", "data", "-d", where, "--write-recovery-conf", "--checkpoint=fast", "--no-sync")
    with standby:
        yield standby
