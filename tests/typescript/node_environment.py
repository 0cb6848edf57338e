"""The environment variables for the Node programs of these tests."""

from __future__ import annotations

import json
from typing import Any

import sqlalchemy as sa

from worlds import World


def address(world: World) -> dict[str, Any]:
    """The database's address for a driver of Node."""
    url = sa.make_url(world.url)
    return {
        "host": url.query["host"],
        "port": int(str(url.query["port"])),
        "user": url.username or "postgres",
        "database": url.database,
    }


def environment(world: World, **given: Any) -> dict[str, str]:
    """The environment of a program: the database's address, and the test's values."""
    return {"ADDRESS": json.dumps(address(world)), "GIVEN": json.dumps(given, default=str)}
