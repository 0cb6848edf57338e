from __future__ import annotations

from pathlib import Path

import pytest

import node_packages
from node_packages import Project

HERE = Path(__file__).parent


@pytest.fixture(scope="session")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """An app with the packages of ``package.json``, and with Prisma's client generated."""
    made = node_packages.project(HERE, tmp_path_factory.mktemp("typescript"))
    for name in ("package.json", "tsconfig.json", "schema.prisma"):
        made.write(name, (HERE / name).read_text())
    # it never starts this engine, but would fetch it from elsewhere
    made.run("prisma", "generate", "--schema", "schema.prisma", env={"PRISMA_SCHEMA_ENGINE_BINARY": "/bin/false"})
    return made
