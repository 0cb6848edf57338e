"""A minute of ``make hammer``, and that its check does find what it is there to find."""

from __future__ import annotations

import math
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest

from hammer import Event, Plan, hammer, unexplained
from servers import pg_bin


@pytest.mark.one_server
def test_nothing_is_lost_or_done_twice_under_the_hammer() -> None:
    plan = Plan(processes=4, seconds=60, server_kill_every_s=3, client_kill_every_s=4, seed=7)
    report = hammer(plan, bin_dir=pg_bin())
    assert report.faults == []
    assert report.server_kills >= 5
    assert report.client_kills >= 5
    assert report.answered >= 100


def chain(*balances: int) -> list[Any]:
    return [
        SimpleNamespace(id=str(n), user_id="ann", sequence=n, balance_after=balance)
        for n, balance in enumerate(balances, 1)
    ]


# Row 1 is there from the start; row 2 was asked for at 10 and told of at 20, row 3 at 30 and 40.
TOLD = {"2": Event(10, 20), "3": Event(30, 40)}


def faults(events: dict[str, Event], *balances: tuple[int, float, float]) -> int:
    return len(unexplained(chain(5, 4, 3), defaultdict(Event, events), list(balances)))


def test_what_can_be_explained() -> None:
    assert faults(TOLD) == 0
    assert faults(TOLD, (5, 0, 1), (5, 12, 13), (4, 12, 13), (4, 25, 26), (4, 35, 36), (3, 35, 36), (3, 50, 51)) == 0
    assert faults({"2": Event(10, math.inf), "3": Event(10, 20)}, (5, 5, 6)) == 0  # nobody was told of row 2
    assert faults({"2": Event(10, 40), "3": Event(20, 30)}) == 0  # at the same time, so in either order


def test_what_cannot_be_explained() -> None:
    assert faults(TOLD, (9, 0, 100)) == 1  # never the balance
    assert faults(TOLD, (5, 21, 22)) == 1  # somebody had been told of row 2 by then
    assert faults(TOLD, (3, 1, 29)) == 1  # nobody had asked for row 3 yet
    assert faults({"2": Event(30, 40), "3": Event(10, 20)}) == 1  # done and told before the one ahead of it was asked
    assert faults({"3": Event(30, 40)}) >= 1  # a row that nobody asked for
