"""The comparison with other ledgers, without the others: our own adapter goes through all that is asked of each."""

from __future__ import annotations

import sys
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks" / "peers"))
import run
from picture import picture

OURS = [candidate for candidate in run.CANDIDATES if not candidate.packages]

pytestmark = pytest.mark.one_server  # it is about the comparison


@pytest.mark.parametrize("candidate", OURS, ids=lambda candidate: candidate.adapter)
def test_our_adapters(candidate: run.Candidate, fresh_database: Callable[..., str]) -> None:
    url = fresh_database()
    run.drive(candidate, "setup", url, accounts=3, credits=run.CREDITS)
    assert run.round_trips(candidate, url) == pytest.approx(1, abs=0.1)
    spent = run.drive(candidate, "spend", url, accounts=3, connections=4, seconds=0.2)
    assert spent["took"]
    assert spent["errors"] == {}
    state = run.check(candidate, url)
    assert (state.wrong, state.overdraft, state.once) == (0, "refused", "one row")
    assert state.rows > len(spent["took"])


def test_an_error_is_counted_and_shown(fresh_database: Callable[..., str]) -> None:
    url = fresh_database()
    run.drive(OURS[0], "setup", url, accounts=1, credits=90)  # fewer than are asked for
    spent = run.drive(OURS[0], "spend", url, accounts=1, connections=2, seconds=1)
    assert spent["errors"]["refused"] > 0


def test_the_picture_is_svg() -> None:
    drawn = ET.fromstring(picture({"alone": [("Tallystick", 1000.0), ("<other>", 10.0)]}))
    assert [element.get("width") for element in drawn.iter("{http://www.w3.org/2000/svg}rect")] == ["460.0", "4.6"]
