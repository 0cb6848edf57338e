"""Draw docs/scaling.svg, the arrangements of docs/scaling.md: python tools/scaling_picture.py."""

from __future__ import annotations

from html import escape
from pathlib import Path

WIDE, HIGH = 760, 330
STYLE = """
svg { --ink: #1f1a14; --muted: #6b6257; --line: #b9ab97; --ours: #8a5a2b; --paper: #fbf8f3; font: 13px sans-serif; }
@media (prefers-color-scheme: dark) {
  svg { --ink: #efe9df; --muted: #a59b8d; --line: #5b5145; --ours: #d29a5f; --paper: #1d1914; }
}
text { fill: var(--ink); } .small { fill: var(--muted); font-size: 11px; }
rect { fill: var(--paper); stroke: var(--line); } .ours { stroke: var(--ours); stroke-width: 2; }
path { stroke: var(--muted); fill: none; }
"""
SAID = "Four arrangements: a larger server, a standby that is read, a ledger beside distributed tables, many databases"

Box = tuple[int, int, int, str, str, bool]
"""x, y, width, name, what is in it, and if the ledger is."""

PANELS: tuple[tuple[str, int, int, tuple[Box, ...], tuple[str, ...]], ...] = (
    ("1. A larger compute", 10, 24, ((10, 40, 340, "PostgreSQL", "app and ledger", True),), ()),
    (
        "2. A replica",
        400,
        24,
        (
            (400, 40, 150, "primary", "writes", True),
            (600, 40, 150, "standby", "balance, console, audit", True),
        ),
        ("M550 70 H596",),
    ),
    (
        "3. Credits local, beside distributed tables",
        10,
        164,
        (
            (10, 180, 150, "coordinator", "users, ledger", True),
            (200, 180, 150, "worker", "the app's tables", False),
            (200, 250, 150, "worker", "the app's tables", False),
        ),
        ("M160 210 H196", "M160 210 C185 210 175 280 196 280"),
    ),
    (
        "4. Many whole databases",
        400,
        164,
        (
            (400, 215, 110, "Stripe", "every event to all", False),
            (600, 180, 150, "database", "realm eu", True),
            (600, 250, 150, "database", "realm us", True),
        ),
        ("M510 245 C560 245 550 210 596 210", "M510 245 C560 245 550 280 596 280"),
    ),
)


def main() -> None:
    """Write the picture anew."""
    parts = []
    for title, x, y, boxes, lines in PANELS:
        parts.append(f'<text x="{x}" y="{y}" font-weight="bold">{escape(title)}</text>')
        parts += [f'<path d="{line}"/>' for line in lines]
        for left, top, width, name, inside, ours in boxes:
            kind = ' class="ours"' if ours else ""
            parts.append(f'<rect{kind} x="{left}" y="{top}" width="{width}" height="60" rx="6"/>')
            parts.append(f'<text x="{left + 12}" y="{top + 26}">{escape(name)}</text>')
            parts.append(f'<text class="small" x="{left + 12}" y="{top + 44}">{escape(inside)}</text>')
    head = f'<svg xmlns="http://www.w3.org/2000/svg" role="img" viewBox="0 0 {WIDE} {HIGH}"><title>{SAID}</title>'
    picture = f"{head}<style>{STYLE}</style>{''.join(parts)}</svg>\n"
    Path(__file__).parents[1].joinpath("docs", "scaling.svg").write_text(picture, encoding="utf-8")


if __name__ == "__main__":
    main()
