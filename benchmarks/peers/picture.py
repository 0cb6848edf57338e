"""The picture of a run: one row of bars for each workload, drawn by hand as SVG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from xml.sax.saxutils import escape

WIDTH, LEFT, RIGHT, BAR, GAP, HEAD = 720, 170, 90, 16, 6, 40
STYLE = """
svg { --ink: #1f1a14; --muted: #6b6257; --line: #e6dfd4; --ours: #8a5a2b; --other: #b9ab97;
  font: 12px system-ui, sans-serif; }
@media (prefers-color-scheme: dark) { svg { --ink: #efe9df; --muted: #a59b8d; --line: #332c23;
  --ours: #d9a066; --other: #6b6257; } }
"""
TITLES = {
    "alone": "one connection",
    "spread": "16 threads, 1,000 accounts",
    "one account": "16 threads, one account",
}


def picture(bars: Mapping[str, Sequence[tuple[str, float]]]) -> str:
    """Consumptions a second: for each workload its candidates' names and numbers, all to one scale of the workload."""
    parts, y = [], 8
    for workload, rows in bars.items():
        title = f"{TITLES[workload]}: consumptions a second"
        parts.append(f'<text x="0" y="{y + 14}" fill="var(--ink)" font-weight="600">{escape(title)}</text>')
        y += HEAD - 12
        most = max(number for _, number in rows)
        parts.append(f'<path d="M{LEFT} {y - 3}V{y + len(rows) * (BAR + GAP)}" stroke="var(--line)"/>')
        for name, number in rows:
            width = max(1, (WIDTH - LEFT - RIGHT) * number / most)
            colour = "--ours" if name.startswith("Tallystick") else "--other"
            middle = y + BAR - 4
            parts += [
                f'<text x="{LEFT - 8}" y="{middle}" text-anchor="end" fill="var(--ink)">{escape(name)}</text>',
                f'<rect x="{LEFT}" y="{y}" width="{width:.1f}" height="{BAR}" rx="3" fill="var({colour})"/>',
                f'<text x="{LEFT + width + 6:.1f}" y="{middle}" fill="var(--muted)">{number:,.0f}</text>',
            ]
            y += BAR + GAP
        y += 14
    description = "; ".join(
        f"{TITLES[name]}: {', '.join(f'{who} {n:,.0f}' for who, n in rows)}" for name, rows in bars.items()
    )
    size = f'viewBox="0 0 {WIDTH} {y}" width="{WIDTH}" height="{y}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" role="img" {size}><title>{escape(description)}</title>'
    return f"{head}<style>{STYLE}</style>{''.join(parts)}</svg>\n"
