"""Draw the demo's output as docs/demo.svg, for the README: make picture."""

from __future__ import annotations

import re
from pathlib import Path

from rich.console import Console
from rich.terminal_theme import MONOKAI

from tallystick.cli import demo

WIDTH = 118


def main() -> None:
    """Play the demo once, and draw it."""
    console = Console(record=True, width=WIDTH, highlight=False, force_terminal=True)
    demo.run(console)
    svg = console.export_svg(title="make demo", theme=MONOKAI, unique_id="demo")
    # The picture must not fetch anything: the fonts of whoever looks at it will do.
    svg = re.sub(r"@font-face\s*{.*?}\s*", "", svg, flags=re.DOTALL)
    Path(__file__).parents[1].joinpath("docs", "demo.svg").write_text(svg, encoding="utf-8")


if __name__ == "__main__":
    main()
