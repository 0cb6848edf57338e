"""``docs/testing.md``: its project for vitest, type-checked and run."""

from __future__ import annotations

import os
import re
import shutil
import sys
from pathlib import Path

import pytest

import node_packages
import pages
from tallystick.dev.postgres import Server
from tallystick.ledger.typescript import typescript
from worlds import SHAPES

pytestmark = pytest.mark.one_server  # it is about the host's test runner

HERE = Path(__file__).parent / "vitest"


def test_the_vitest_example(tmp_path: Path, scratch: Path):
    shape = SHAPES["uuid"]
    files = pages.files_of("testing.md", "vitest")
    pages.write(tmp_path, files | {"schema.sql": shape.ddl, "lib/tallystick.ts": typescript(shape.host)})
    shutil.copy(HERE / "tsconfig.json", tmp_path)
    app = node_packages.project(HERE, tmp_path)
    app.run("tsc", "--project", ".")
    environ = {"TALLYSTICK_HOME": str(scratch / "home"), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    output = app.run("vitest", "run", env=environ)
    assert re.search(r"Tests +3 passed", output), output
    assert not Server(scratch / "home").running
