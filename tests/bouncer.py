"""A real PgBouncer in transaction mode, for tests and for benchmarks/ledger.py."""

from __future__ import annotations

import os
import pwd
import re
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import sqlalchemy as sa

PROGRAM = shutil.which("pgbouncer") or shutil.which("pgbouncer", path="/usr/sbin")
PREPARES_SINCE = (1, 21)  # before, a client's prepared statement was on whichever server connection it met first
START_S = 120  # a loaded machine is slow

SETTINGS = """
[databases]
{database} = host={host} port={port} dbname={database} user=postgres
[pgbouncer]
listen_addr =
unix_socket_dir = {folder}
listen_port = 6432
auth_type = any
pool_mode = transaction
default_pool_size = {connections}
max_client_conn = 200
server_idle_timeout = 2
logfile = {folder}/log
"""


def version() -> tuple[int, ...]:
    """Of the machine's PgBouncer, (1, 18, 0) for one; ``PROGRAM`` must be there."""
    output = subprocess.run([str(PROGRAM), "--version"], check=True, capture_output=True, text=True).stdout
    found = re.search(r"PgBouncer (\d+)\.(\d+)\.(\d+)", output)
    assert found, output
    return tuple(map(int, found.groups()))


@contextmanager
def bouncing(url: str, *, connections: int = 4) -> Iterator[str]:
    """The address of the same database through a pool of so many server connections that all clients share."""
    address = sa.make_url(url)
    where = {"database": address.database, "host": address.query["host"], "port": address.query["port"]}
    with tempfile.TemporaryDirectory(prefix="tallystick-bouncer-") as name:
        folder = Path(name)
        settings = folder / "pgbouncer.ini"
        prepared = "max_prepared_statements = 200\n" if version() >= PREPARES_SINCE else ""
        settings.write_text(SETTINGS.format(folder=folder, connections=connections, **where) + prepared)
        command = [str(PROGRAM), "-q", str(settings)]
        if os.geteuid() == 0:  # it refuses to be root, and must get to the server's socket
            owner = Path(str(where["host"])).stat().st_uid
            os.chown(folder, owner, -1)
            os.chown(settings, owner, -1)
            command[1:1] = ["-u", pwd.getpwuid(owner).pw_name]
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
            try:
                deadline = time.monotonic() + START_S
                while not _listens(folder / ".s.PGSQL.6432"):
                    assert process.poll() is None, (folder / "log").read_text()
                    assert time.monotonic() < deadline
                    time.sleep(0.02)
                yield address.set(query={"host": name, "port": "6432"}).render_as_string(hide_password=False)
            finally:
                process.terminate()


def _listens(address: Path) -> bool:
    """True once it takes connections: its socket's file is there a moment before."""
    with socket.socket(socket.AF_UNIX) as client:
        return client.connect_ex(str(address)) == 0
