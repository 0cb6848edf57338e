"""The code that a page shows: a block of it may begin with a comment that is the name of a file."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
_BLOCK = re.compile(r"^```\w+\n(?:#|//|--) (\S+\.\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(page: Path, language: str) -> list[str]:
    """All blocks of a language, in their order."""
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def files_of(page: str, section: str | None = None) -> dict[str, str]:
    """The texts by their names, of a page in ``docs/`` or of one of its sections."""
    text = (ROOT / "docs" / page).read_text("utf-8")
    if section is not None:
        text = text.partition(f"\n## {section}\n")[2].partition("\n## ")[0]
    found = dict(_BLOCK.findall(text))
    assert found, f"no files in {page}, {section}"
    return found


def write(folder: Path, files: dict[str, str]) -> Path:
    """Put files into a folder; their names may hold folders."""
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    return folder
