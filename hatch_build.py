"""Hatchling's hook for the package's metadata: the repository's address, and a readme that an index can show.

The address is in no file: GitHub Actions sets GITHUB_SERVER_URL and GITHUB_REPOSITORY when a release is built. Without
them the package names no address, and the readme keeps its relative links.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface

LINK = re.compile(r"(?P<is_picture>!?)\[(?P<text>[^]]*)\]\((?P<target>(?![a-z]+:|#)[^)]+)\)")


class RepositoryMetadata(MetadataHookInterface):
    """Sets ``urls`` and ``readme``, which are dynamic fields of ``pyproject.toml``."""

    def update(self, metadata: dict[str, Any]) -> None:
        """Set both in ``metadata``, the table ``project`` as hatchling has read it."""
        readme = Path(self.root, "README.md").read_text(encoding="utf-8")
        server, name = os.environ.get("GITHUB_SERVER_URL"), os.environ.get("GITHUB_REPOSITORY")
        if server and name:
            address = f"{server}/{name}"
            tag = f"v{metadata['version']}"
            metadata["urls"] = {
                "Source": address,
                "Documentation": f"{address}/tree/{tag}/docs",
                "Changelog": f"{address}/blob/{tag}/CHANGELOG.md",
                "Issues": f"{address}/issues",
            }

            def absolute(link: re.Match[str]) -> str:
                kind = "raw" if link["is_picture"] else "blob"
                return f"{link['is_picture']}[{link['text']}]({address}/{kind}/{tag}/{link['target']})"

            readme = LINK.sub(absolute, readme)
        metadata["readme"] = {"content-type": "text/markdown", "text": readme}
