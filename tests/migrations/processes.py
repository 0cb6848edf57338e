"""Processes that a test kills in the middle of a migration. Each begins with what a migration loads, loaded once."""

from __future__ import annotations

import multiprocessing

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(
    ["tallystick.migrate", "alembic.op", "alembic.runtime.environment", "alembic.script", "psycopg"]
)
