"""The metadata of a release: the repository's address and an absolute readme, or neither."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]


def metadata() -> dict[str, Any]:
    """As the hook sets it."""
    found = importlib.util.spec_from_file_location("hatch_build", ROOT / "hatch_build.py")
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    project: dict[str, Any] = {"version": "1.2"}
    module.RepositoryMetadata(str(ROOT), {}).update(project)
    return project


def test_a_build_of_github_actions_names_its_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GITHUB_SERVER_URL", "https://git.example")
    monkeypatch.setenv("GITHUB_REPOSITORY", "shop/tallystick")
    project = metadata()
    assert project["urls"]["Source"] == "https://git.example/shop/tallystick"
    text = project["readme"]["text"]
    assert "](https://git.example/shop/tallystick/blob/v1.2/docs/ledger.md)" in text
    assert "](https://git.example/shop/tallystick/raw/v1.2/docs/tally.svg)" in text
    assert "](docs/" not in text


@pytest.mark.parametrize("alone", ["GITHUB_SERVER_URL", "GITHUB_REPOSITORY"])
def test_any_other_build_names_none(monkeypatch: pytest.MonkeyPatch, alone: str) -> None:
    for name in ("GITHUB_SERVER_URL", "GITHUB_REPOSITORY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(alone, "shop/tallystick")
    project = metadata()
    assert "urls" not in project
    assert project["readme"]["text"] == (ROOT / "README.md").read_text(encoding="utf-8")
