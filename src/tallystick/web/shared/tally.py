"""The tally: a user's ledger drawn as the notched stick that the project is named after, as SVG.

It is a pure function of ledger rows. Each completed row is a notch, in the order of ``sequence``: up for credits in,
down for credits out, as long as the square root of its amount. Pending rows are hollow notches after the stick's end: a
purchase up, a hold down. A thin line connects a refund, reversal, correction or expiry to the row that it undoes. The
stick is broken at a missing sequence number, so that a deleted row is visible. Above it, on the same axis, a step line
shows the balance.

Colours come from the custom properties of the page (``--ts-in``, ``--ts-out``, ``--ts-debt``, …), so the drawing
needs no style of its own and fits a strict Content-Security-Policy; ``standalone=True`` adds them for a file.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol
from uuid import UUID
from xml.sax.saxutils import escape

from tallystick.schema import CreditTransactionStatus


class TallyEntry(Protocol):
    """The fields of a ledger row that the drawing needs, as a ``CreditTransaction`` has them."""

    @property
    def id(self) -> UUID: ...  # noqa: D102 - the ledger's columns
    @property
    def status(self) -> str: ...  # noqa: D102
    @property
    def amount(self) -> int: ...  # noqa: D102
    @property
    def balance_after(self) -> int | None: ...  # noqa: D102
    @property
    def sequence(self) -> int | None: ...  # noqa: D102
    @property
    def refund_of(self) -> UUID | None: ...  # noqa: D102


@dataclass(frozen=True, slots=True)
class Size:
    """Measures of a drawing, in CSS pixels."""

    pitch: float  # distance from notch to notch
    notch: float  # width of a notch
    reach: float  # length of the longest notch, from the stick's edge
    stick: float  # height of the stick
    balance: float  # height of the balance line's panel; 0 leaves it out


SMALL = Size(pitch=5, notch=2, reach=10, stick=4, balance=0)
LARGE = Size(pitch=14, notch=5, reach=38, stick=11, balance=80)

_MARGIN = 6.0
_LONGEST_GAP = 3  # columns for any number of missing rows
_FEWEST = 12  # columns of the shortest stick

_STANDALONE = """
svg { --ts-ink: #1f1a14; --ts-muted: #6b6257; --ts-line: #e6dfd4; --ts-hazel: #8a5a2b; --ts-in: #2f6b3c;
  --ts-out: #1f1a14; --ts-debt: #a8321f; font: 11px system-ui, sans-serif; }
@media (prefers-color-scheme: dark) { svg { --ts-ink: #efe9df; --ts-muted: #a59b8d; --ts-line: #332c23;
  --ts-hazel: #d9a066; --ts-in: #7cc48a; --ts-out: #efe9df; --ts-debt: #f0917f; } }
"""


def tally(
    entries: Iterable[TallyEntry], *, total: int | None = None, size: Size = LARGE, standalone: bool = False
) -> str:
    """Draw ``entries``, rows of one user's ledger in any order; failed purchases are left out.

    ``total`` is the number of completed rows, if ``entries`` has only the last of them. The text alternative (the SVG's
    title) has the same content as the picture.
    """
    done, pending = _sorted(entries)
    places, gaps = _places([row.sequence or 0 for row in done], whole=total is None)
    columns = (places[-1] + 1 if places else 0) + len(pending)
    pitch, width = size.pitch, max(columns, _FEWEST) * size.pitch + 2 * _MARGIN
    longest = max((abs(row.amount) for row in (*done, *pending)), default=1)
    top = size.balance + (_MARGIN if size.balance else 0) + size.reach + 2
    bottom = top + size.stick
    height = bottom + size.reach + 2

    def x(place: float) -> float:
        return _MARGIN + (place + 0.5) * pitch

    def length(amount: int) -> float:
        return max(2.0, size.reach * math.sqrt(abs(amount) / longest))

    def notch(row: TallyEntry, place: int, *, hollow: bool = False) -> str:
        long = length(row.amount)
        y = top - long if row.amount > 0 else bottom
        kind = "in" if row.amount > 0 else "out"
        paint = f'fill="none" stroke="var(--ts-{kind})"' if hollow else f'fill="var(--ts-{kind})"'
        inset = 0.5 if hollow else 0
        return (
            f'<rect x="{x(place) - size.notch / 2 + inset:g}" y="{y + inset:.4g}" width="{size.notch - 2 * inset:g}" '
            f'height="{max(long - 2 * inset, 1):.4g}" {paint}/>'
        )

    parts: list[str] = []
    if size.balance and done:
        parts += _balance_line(done, places, x, pitch, size.balance)
    end = _MARGIN + (max(places[-1] + 1, 1) if places else 1) * pitch
    parts += _stick(end if done or pending else width - _MARGIN, gaps, top, bottom, pitch)
    parts += [notch(row, place) for row, place in zip(done, places, strict=True)]
    first_pending = places[-1] + 1 if places else 1
    parts += [notch(row, first_pending + number, hollow=True) for number, row in enumerate(pending)]

    at = {row.id: place for row, place in zip(done, places, strict=True)}
    for row, place in zip(done, places, strict=True):
        if row.refund_of in at:
            a, b = x(at[row.refund_of]), x(place)
            depth = bottom + min(size.reach, max((b - a) / 2, size.reach / 2))
            parts.append(
                f'<path d="M{a:g} {bottom:g} C{a:g} {depth:.4g} {b:g} {depth:.4g} {b:g} {bottom:g}" '
                'fill="none" stroke="var(--ts-muted)" stroke-width="0.75"/>'
            )
    title = escape(describe(done, pending, total=total))
    style = f"<style>{_STANDALONE}</style>" if standalone else ""
    namespace = ' xmlns="http://www.w3.org/2000/svg"' if standalone else ""
    return (
        f'<svg{namespace} class="ts-tally" role="img" viewBox="0 0 {width:g} {height:g}" '
        f'width="{width:g}" height="{height:g}"><title>{title}</title>{style}{"".join(parts)}</svg>'
    )


def describe(done: list[TallyEntry], pending: list[TallyEntry], *, total: int | None = None) -> str:
    """The picture in words: "42 entries, balance 3, 1 pending, no gaps"."""
    if not done and not pending:
        return "No entries yet"
    count = len(done) if total is None else max(total, len(done))
    entries = "1 entry" if count == 1 else f"{count:,} entries"
    if count > len(done):
        entries = f"last {len(done):,} of {entries}"
    balance = done[-1].balance_after or 0 if done else 0
    words = [entries, f"balance {balance:,}" + (" (debt)" if balance < 0 else "")]
    if linked := sum(row.refund_of is not None for row in done):
        words.append(f"{linked:,} linked to an earlier one")
    holds = sum(row.amount < 0 for row in pending)
    if len(pending) > holds:
        words.append(f"{len(pending) - holds:,} pending")
    if holds:
        words.append(f"{holds:,} held")
    sequences = [row.sequence or 0 for row in done]
    missing = sum(b - a - 1 for a, b in pairwise(sequences))
    if done and total is None:
        missing += sequences[0] - 1
    words.append(f"{missing:,} missing" if missing else "no gaps")
    return ", ".join(words)


def _sorted(entries: Iterable[TallyEntry]) -> tuple[list[TallyEntry], list[TallyEntry]]:
    done: list[TallyEntry] = []
    pending: list[TallyEntry] = []
    for row in entries:
        if row.sequence is not None:
            done.append(row)
        elif row.status == CreditTransactionStatus.PENDING:
            pending.append(row)
    return sorted(done, key=lambda row: row.sequence or 0), sorted(pending, key=lambda row: row.id)


def _places(sequences: list[int], *, whole: bool) -> tuple[list[int], list[tuple[int, int]]]:
    """Columns for these sequence numbers, and the gaps between them as (first column, columns).

    A ``whole`` ledger begins at 1, so rows may be missing before its first one.
    """
    places: list[int] = []
    gaps: list[tuple[int, int]] = []
    before = 0 if whole or not sequences else sequences[0] - 1
    column = 0
    for sequence in sequences:
        missing = min(max(sequence - before - 1, 0), _LONGEST_GAP)
        if missing:
            gaps.append((column, missing))
        places.append(column + missing)
        column += missing + 1
        before = sequence
    return places, gaps


def _stick(end: float, gaps: list[tuple[int, int]], top: float, bottom: float, pitch: float) -> list[str]:
    """The stick, broken where rows are missing."""
    parts = []
    start = _MARGIN / 2
    for first, columns in gaps:
        left, right = _MARGIN + first * pitch, _MARGIN + (first + columns) * pitch
        if first:
            parts.append(_stick_segment(start, left, top, bottom))
        middle = (top + bottom) / 2
        parts.append(
            f'<path d="M{left:g} {middle:g} H{right:g}" stroke="var(--ts-debt)" stroke-width="2" '
            'stroke-dasharray="2 2" fill="none"/>'
        )
        start = right
    return [*parts, _stick_segment(start, end + _MARGIN / 2, top, bottom)]


def _stick_segment(left: float, right: float, top: float, bottom: float) -> str:
    height = bottom - top
    return (
        f'<rect x="{left:g}" y="{top:g}" width="{max(right - left, 1):g}" height="{height:g}" '
        f'rx="{height / 3:.3g}" fill="var(--ts-hazel)"/>'
    )


def _balance_line(done: list[TallyEntry], places: list[int], x: _Axis, pitch: float, height: float) -> list[str]:
    """The balance after each row as a step line, with a zero line and the last value."""
    first = done[0]
    before = (first.balance_after or 0) - first.amount
    balances = [row.balance_after or 0 for row in done]
    high, low = max(0, before, *balances), min(0, before, *balances)
    room = height - 12  # for the labels

    def y(value: int) -> float:
        return 10 + room * (1 - (value - low) / ((high - low) or 1))

    path = [f"M{x(places[0]) - pitch / 2:g} {y(before):.4g}"]
    for place, balance in zip(places, balances, strict=True):
        path.append(f"H{x(place):g}V{y(balance):.4g}")
    last = x(places[-1]) + pitch / 2
    path.append(f"H{last:g}")
    return [
        f'<path d="M{x(places[0]) - pitch / 2:g} {y(0):.4g} H{last:g}" stroke="var(--ts-line)" fill="none"/>',
        f'<path d="{"".join(path)}" stroke="var(--ts-ink)" stroke-width="1.5" fill="none"/>',
    ]


class _Axis(Protocol):
    def __call__(self, place: float, /) -> float: ...
