"""A PostgreSQL for one test run: without durability, in memory if there is room, removed with its process."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tallystick.dev.postgres import Server
from tallystick.errors import DevServerError
from tallystick.signals import Cleanup

FAST = {
    "fsync": "off",
    "synchronous_commit": "off",
    "full_page_writes": "off",
    "max_connections": "200",
    "max_wal_size": "256MB",
}
"""Settings for data that need not survive a crash."""

FOLDER_PREFIX = "tallystick-test-"

_ROOM_BYTES = 2 * 2**30
_LEFT_OVER_AFTER_S = 3600


def scratch_root() -> Path:
    """A folder in memory if there is enough, else the temporary folder; the account of root's server can enter it."""
    memory = Path("/dev/shm")  # noqa: S108 - the folders in it are made by mkdtemp
    if os.access(memory, os.W_OK) and shutil.disk_usage(memory).free > _ROOM_BYTES:
        return memory
    return Path(tempfile.gettempdir())


@contextmanager
def throwaway_server(*, bin_dir: Path | None = None) -> Iterator[Server]:
    """A server for this process alone, with ``FAST``; its folder is removed at the end. ``bin_dir`` as for ``Server``.

    Folders that killed runs left are removed as well.

    Raises:
        DevServerError: there are no binaries, or the server does not start.
    """
    root = scratch_root()
    _remove_leftovers(root, bin_dir)
    with Cleanup() as stack:
        folder = Path(tempfile.mkdtemp(prefix=FOLDER_PREFIX, dir=root))
        stack.callback(shutil.rmtree, folder)
        yield stack.enter_context(Server(folder, settings=FAST, bin_dir=bin_dir))


def _remove_leftovers(root: Path, bin_dir: Path | None) -> None:
    """Stop the servers of killed runs, which nobody uses, and remove their folders."""
    for folder in root.glob(f"{FOLDER_PREFIX}*"):
        with suppress(FileNotFoundError, DevServerError):  # another run may do the same
            found = folder.stat()
            old = time.time() - found.st_mtime > _LEFT_OVER_AFTER_S
            if old and found.st_uid == os.geteuid() and Server(folder, bin_dir=bin_dir).stop():
                shutil.rmtree(folder, ignore_errors=True)
