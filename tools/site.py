"""The pages of the documentation's site, in ``.site/pages``, for ``make docs``.

The site shows ``docs/``, and some pages that are kept elsewhere in the repository: the README is the first page; the
guide for contributors, the changelog and the benchmarks follow. Links between them are written for a reader of the
repository, and become links of the site here.
"""

import posixpath
import re
import shutil
from functools import partial
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "benchmarks/README.md": "benchmarks.md",
}
"""Files of the repository, and the pages that they become; each page of ``docs/`` keeps its name."""

_LINK = re.compile(r"(?<=\]\()(?![a-z]+:|#)([^)#\s]+)")


def main() -> None:
    """Write all pages anew."""
    site = ROOT / ".site" / "pages"
    shutil.rmtree(site.parent, ignore_errors=True)
    shutil.copytree(ROOT / "docs", site)
    pages = PAGES | {f"docs/{page.name}": page.name for page in (ROOT / "docs").glob("*.md")}
    for source, page in pages.items():
        text = (ROOT / source).read_text("utf-8")
        for target in _LINK.findall(text):
            path = _path(source, target)
            if path not in pages and not path.startswith("docs/"):
                shutil.copy(ROOT / path, site / Path(path).name)  # a picture that a page elsewhere shows

        (site / page).write_text(_LINK.sub(partial(_on_the_site, pages, source), text), "utf-8")


def _path(source: str, target: str) -> str:
    return posixpath.normpath(posixpath.join(posixpath.dirname(source), target))


def _on_the_site(pages: dict[str, str], source: str, link: re.Match[str]) -> str:
    path = _path(source, link[1])
    return pages.get(path) or (path.removeprefix("docs/") if path.startswith("docs/") else posixpath.basename(path))


if __name__ == "__main__":
    main()
