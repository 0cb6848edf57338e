"""Files that a command writes."""

from __future__ import annotations

import errno
import os
import shutil
import uuid
from contextlib import suppress
from pathlib import Path


def replace_file(path: Path, content: bytes) -> None:
    """Write a file that is whole, or stays as it was: a full disk or a kill leaves neither a part nor an empty file.

    A file that is mounted by itself, as in a container, cannot be replaced, so its content is. Until that is done, the
    folder has the new content as a whole, in a hidden file.

    Raises:
        OSError: with the path as its ``filename``.
    """
    target = path.resolve()
    if target.exists() and not target.is_file():
        path.write_bytes(content)  # a device or a pipe cannot be replaced
        return
    new = target.with_name(f".{uuid.uuid4().hex}.tallystick-new")
    kept = ""
    try:
        with new.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if target.exists():
            found = target.stat()
            with suppress(PermissionError):
                os.chown(new, found.st_uid, found.st_gid)
            shutil.copymode(target, new)
        try:
            new.replace(target)
        except OSError as error:
            if error.errno != errno.EBUSY:
                raise
            kept = f". It may be incomplete; copy the whole content from {new}"
            with target.open("r+b") as file:
                file.write(content)
                file.truncate()
                file.flush()
                os.fsync(file.fileno())
            kept = ""
    except OSError as error:
        raise OSError(error.errno, f"{error.strerror}{kept}", str(path)) from error
    finally:
        if not kept:
            new.unlink(missing_ok=True)
