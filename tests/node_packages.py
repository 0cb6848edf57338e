"""Packages of npm for tests with real Node programs: installed once, into the repository's ignored folder."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
CACHE = REPOSITORY / ".tallystick" / "node"
UNREACHABLE = ("ENOTFOUND", "ECONNREFUSED", "ECONNRESET", "ETIMEDOUT", "EAI_AGAIN", "ENETUNREACH", "ENOTCACHED")


@dataclass(frozen=True)
class Project:
    """A folder of a Node app, with its packages."""

    folder: Path

    def write(self, name: str, text: str) -> None:
        (self.folder / name).write_text(text)

    def run(self, program: str, *args: str, env: dict[str, str] | None = None, ok: bool = True) -> str:
        """All that it said. Unless ``ok`` is off, it must have succeeded."""
        done = subprocess.run(
            ["node" if program == "node" else self.folder / "node_modules" / ".bin" / program, *args],
            cwd=self.folder,
            env={**os.environ, "NO_COLOR": "1", **(env or {})},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=120,
            check=False,
        )
        assert not ok or done.returncode == 0, done.stdout
        return done.stdout


def project(packages: Path, folder: Path) -> Project:
    """An app in ``folder`` with the packages of a ``package.json``; skips where npm or its registry is not there."""
    (folder / "node_modules").symlink_to(installed(packages))
    return Project(folder)


def installed(packages: Path) -> Path:
    """The packages that the folder ``packages`` lists, by its lock where it has one."""
    if shutil.which("npm") is None:
        pytest.skip("needs npm, for the real packages of Node apps (install Node.js)")
    wanted = {file.name: file.read_bytes() for file in sorted(packages.glob("package*.json"))}
    named = hashlib.sha256(b"\0".join(wanted.values())).hexdigest()[:12]
    target = CACHE / f"{packages.name}-{named}"
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the processes of one test run share it
        if not target.exists():
            _install(wanted, target)
    return target / "node_modules"


def _install(wanted: dict[str, bytes], target: Path) -> None:
    """Under its name only when it is whole."""
    with tempfile.TemporaryDirectory(dir=CACHE) as folder:
        partial = Path(folder) / "app"
        partial.mkdir()
        for name, text in wanted.items():
            (partial / name).write_bytes(text)
        how = ["ci"] if "package-lock.json" in wanted else ["install", "--no-package-lock"]
        # without scripts: Prisma's would download engines from elsewhere
        command = ["npm", *how, "--ignore-scripts", "--no-audit", "--no-fund", "--fetch-retries=1"]
        done = subprocess.run(command, cwd=partial, capture_output=True, text=True, timeout=300, check=False)
        if done.returncode != 0:
            if any(word in done.stderr for word in UNREACHABLE):
                pytest.skip("npm cannot reach its registry, from which the real packages of Node apps come")
            raise AssertionError(done.stderr)
        partial.rename(target)
