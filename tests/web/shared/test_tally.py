"""The tally says in words what it draws, and draws what the rows say."""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

from tallystick.web.shared.tally import SMALL, tally

pytestmark = pytest.mark.one_server  # it is about a picture

SVG = "{http://www.w3.org/2000/svg}"


@dataclass
class Entry:
    amount: int
    sequence: int | None
    balance_after: int | None
    status: str = "completed"
    refund_of: uuid.UUID | None = None
    id: uuid.UUID = None

    def __post_init__(self):
        self.id = self.id or uuid.uuid4()


def chain(*amounts, skip=()):
    balance, rows = 0, []
    for sequence, amount in enumerate(amounts, 1):
        balance += amount
        if sequence not in skip:
            rows.append(Entry(amount, sequence, balance))
    return rows


def pending(amount=5):
    return Entry(amount, None, None, status="pending")


def parts_of(rows, **how):
    svg = ET.fromstring(tally(rows, standalone=True, **how))
    rects = [dict(rect.attrib) for rect in svg.iter(f"{SVG}rect")]
    return svg.find(f"{SVG}title").text, rects, [dict(path.attrib) for path in svg.iter(f"{SVG}path")]


@pytest.mark.parametrize(
    ("rows", "total", "words"),
    [
        ([], None, "No entries yet"),
        (chain(5), None, "1 entry, balance 5, no gaps"),
        (chain(5, -1, -1), None, "3 entries, balance 3, no gaps"),
        ([*chain(5, -1), pending()], None, "2 entries, balance 4, 1 pending, no gaps"),
        ([pending()], None, "0 entries, balance 0, 1 pending, no gaps"),
        ([*chain(5), pending(), pending(-2)], None, "1 entry, balance 5, 1 pending, 1 held, no gaps"),
        ([*chain(5), pending(-2)], None, "1 entry, balance 5, 1 held, no gaps"),
        (
            [*chain(5), Entry(-2, 2, 3, refund_of=uuid.uuid4())],
            None,
            "2 entries, balance 3, 1 linked to an earlier one, no gaps",
        ),
        (chain(5, -1, -1, -1, skip={3}), None, "3 entries, balance 2, 1 missing"),
        (chain(5, -1, -1, skip={1}), None, "2 entries, balance 3, 1 missing"),
        (chain(3, -2, -3), None, "3 entries, balance -2 (debt), no gaps"),
        (chain(*([5] + [-1] * 4))[2:], 5, "last 3 of 5 entries, balance 1, no gaps"),
        ([Entry(5, None, None, status="failed")], None, "No entries yet"),
    ],
)
def test_the_text_alternative(rows, total, words):
    assert parts_of(rows, total=total)[0] == words


def test_credits_in_stand_up_and_credits_out_hang_down_as_long_as_the_root_of_their_amount():
    _, rects, _ = parts_of(chain(16, -4))
    wood = next(rect for rect in rects if rect["fill"] == "var(--ts-hazel)")
    up = next(rect for rect in rects if rect["fill"] == "var(--ts-in)")
    down = next(rect for rect in rects if rect["fill"] == "var(--ts-out)")
    assert float(up["y"]) + float(up["height"]) == pytest.approx(float(wood["y"]), abs=0.1)
    assert float(down["y"]) == pytest.approx(float(wood["y"]) + float(wood["height"]), abs=0.1)
    assert float(up["height"]) == pytest.approx(2 * float(down["height"]), rel=0.01)
    assert float(up["x"]) < float(down["x"])


def test_pending_purchases_stand_hollow_after_the_end():
    _, rects, _ = parts_of([pending(), *chain(5, -1)])
    hollow = [rect for rect in rects if rect["fill"] == "none"]
    solid = [rect for rect in rects if rect["fill"] in ("var(--ts-in)", "var(--ts-out)")]
    wood = next(rect for rect in rects if rect["fill"] == "var(--ts-hazel)")
    assert len(hollow) == 1
    assert float(hollow[0]["x"]) > max(float(rect["x"]) for rect in solid)
    assert float(hollow[0]["x"]) > float(wood["x"]) + float(wood["width"])


def test_a_hold_stands_hollow_after_the_end_as_credits_out():
    _, rects, _ = parts_of([*chain(5, -1), pending(-2)])
    (hollow,) = [rect for rect in rects if rect["fill"] == "none"]
    wood = next(rect for rect in rects if rect["fill"] == "var(--ts-hazel)")
    assert hollow["stroke"] == "var(--ts-out)"
    assert float(hollow["y"]) >= float(wood["y"]) + float(wood["height"])
    assert float(hollow["x"]) > float(wood["x"]) + float(wood["width"])


@pytest.mark.parametrize(("skip", "sticks"), [(set(), 1), ({3}, 2), ({2, 4}, 3), ({1}, 1), ({3, 4, 5, 6}, 2)])
def test_a_missing_row_breaks_the_stick(skip, sticks):
    _, rects, paths = parts_of(chain(9, -1, -1, -1, -1, -1, -1, skip=skip))
    wood = sorted((float(r["x"]), float(r["x"]) + float(r["width"])) for r in rects if r["fill"] == "var(--ts-hazel)")
    assert len(wood) == sticks
    assert all(left[1] < right[0] for left, right in pairwise(wood))
    dashed = [path for path in paths if "stroke-dasharray" in path]
    assert bool(dashed) == bool(skip)
    assert all(path["stroke"] == "var(--ts-debt)" for path in dashed)


def test_a_refund_is_tied_to_its_purchase():
    rows = chain(5, -1)
    _, _, before = parts_of(rows)
    _, rects, after = parts_of([*rows, Entry(-3, 3, 1, refund_of=rows[0].id)])
    threads = [path for path in after if path["stroke"] == "var(--ts-muted)"]
    assert not [path for path in before if path["stroke"] == "var(--ts-muted)"]
    assert len(threads) == 1
    purchase = next(rect for rect in rects if rect["fill"] == "var(--ts-in)")
    start = float(threads[0]["d"][1:].split(" ")[0])
    assert float(purchase["x"]) < start < float(purchase["x"]) + float(purchase["width"])


def test_the_balance_is_a_step_line_in_the_large_one_only():
    _, _, large = parts_of(chain(5, -1))
    _, _, small = parts_of(chain(5, -1), size=SMALL)
    assert [path for path in large if path["stroke"] == "var(--ts-ink)"]
    assert not small


def test_order_does_not_matter_and_the_same_rows_give_the_same_picture():
    rows = [*chain(9, -1, -4, 2), pending()]
    assert tally(rows) == tally(rows[::-1])


def test_nothing_is_drawn_outside_the_picture():
    rows = [*chain(*[1, -1] * 60, 1_000_000), pending(2_000_000)]
    svg = ET.fromstring(tally(rows, standalone=True))
    _, _, width, height = (float(part) for part in svg.attrib["viewBox"].split())
    for rect in svg.iter(f"{SVG}rect"):
        x, y, w, h = (float(rect.attrib[name]) for name in ("x", "y", "width", "height"))
        assert x >= 0
        assert y >= 0
        assert x + w <= width
        assert y + h <= height


def test_inline_it_needs_no_style_of_its_own():
    inline = tally(chain(5, -1))
    assert "style" not in inline
    assert "style" in tally(chain(5, -1), standalone=True)


def test_the_readmes_picture_is_this_drawing():
    """After a change of the drawing: python tests/web/test_tally.py."""
    assert PICTURE.read_text(encoding="utf-8") == tally(every_kind_of_row(), standalone=True)


PICTURE = Path(__file__).parents[3] / "docs" / "tally.svg"


def every_kind_of_row():
    """A ledger with one of everything."""
    rows = chain(1, -1, 3, -1, -1, 10, -1, -1, -1, -1, -1, -1, -1, -1, -1, 5, -5, -1, 2, skip={12})
    for number, row in enumerate(rows, 1):
        row.id = uuid.UUID(int=number)
    refund = next(row for row in rows if row.amount == -5)
    refund.refund_of = next(row for row in rows if row.amount == 5).id
    waits = pending(3)
    waits.id = uuid.UUID(int=99)
    return [*rows, waits]


if __name__ == "__main__":
    PICTURE.write_text(tally(every_kind_of_row(), standalone=True), encoding="utf-8")
