"""Eighteen seconds of ``make hammer``, and that its check does find what it is there to find."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from clients import Request, facts
from hammer import APPS, HOLDING, SINGLE, WRITES, LoggedAnswer, LoggedQuestion, Plan, contradictions, hammer
from servers import pg_bin

pytestmark = pytest.mark.one_server  # it is about who asks, and about the check of what was answered


def test_nothing_is_lost_or_done_twice_under_the_hammer() -> None:
    plan = Plan(processes=len(APPS), seconds=18, server_kill_every_s=4, server_kills=3, client_kill_every_s=3, seed=7)
    report = hammer(plan, bin_dir=pg_bin())
    assert report.faults == []
    assert report.server_kills >= 3
    assert report.client_kills >= 4
    # each was granted, not only refused, and somebody was answered by each driver and at each level
    answered = {part for kind in report.kinds for part in kind.split(", ")}
    assert answered >= {
        *WRITES,
        *HOLDING,
        "balance",
        *(part for app in APPS for driver in app.drivers for part in driver),
    }


def test_it_ends_when_enough_was_asked() -> None:
    plan = Plan(
        processes=1, seconds=600, questions=50, server_kill_every_s=60, client_kill_every_s=60, seed=7, apps=[SINGLE]
    )
    report = hammer(plan, bin_dir=pg_bin())
    assert report.faults == []
    assert 50 <= report.asked < 1000


# --- the check ---


def row(id: str, sequence: int, amount: int, balance: int, kind: str = "consumption", **more: Any) -> Any:
    """A row of ann's ledger, asked for under its id."""
    fixed = {"user_id": "ann", "idempotency_key": id, "workshop_id": None, "refund_of": None, "held": None}
    names = {"id": id, "sequence": sequence, "amount": amount, "balance_after": balance, "type": kind}
    return SimpleNamespace(**fixed | names | more)


# The first is there from the start; the second was asked for at 10 and told of at 20, the third at 30 and 40.
PACK = row("pack", 1, 100, 100, "purchase", idempotency_key=None)
A, B = row("A", 2, -1, 99), row("B", 3, -10, 89)
WANTS_A, WANTS_B = Request("consume", "ann", "A", 1), Request("consume", "ann", "B", 10)


def new(one: Any) -> list[Any]:
    return ["row", False, *facts(one)]


def again(one: Any) -> list[Any]:
    return ["row", True, *facts(one)]


def short(balance: int, required: int) -> list[Any]:
    return ["InsufficientCredits", {"user": "ann", "balance": balance, "required": required}]


def exchange(at: float, request: Request, until: float | None = None, *answers: Any) -> Any:
    return LoggedQuestion(at, [request]), None if until is None else LoggedAnswer(until, list(answers))


def balance(at: float, until: float, value: int) -> Any:
    return exchange(at, Request("balance", "ann"), until, ["balance", value])


GRANTED_A, GRANTED_B = exchange(10, WANTS_A, 20, new(A)), exchange(30, WANTS_B, 40, new(B))


def faults(*exchanges: Any, rows: Any = (PACK, A, B)) -> int:
    return len(contradictions(list(rows), list(exchanges)))


def test_what_can_be_explained() -> None:
    assert faults(GRANTED_A, GRANTED_B) == 0
    for at, until, value in [(0, 1, 100), (12, 13, 100), (12, 13, 99), (25, 26, 99), (35, 36, 99), (50, 51, 89)]:
        assert faults(GRANTED_A, GRANTED_B, balance(at, until, value)) == 0
    # nobody was told of A
    assert faults(exchange(10, WANTS_A), exchange(10, WANTS_B, 20, new(B)), balance(5, 6, 100)) == 0
    # at the same time, so in either order
    assert faults(exchange(10, WANTS_A, 40, new(A)), exchange(20, WANTS_B, 30, new(B))) == 0
    # refused before it was covered, in doubt, asked again, told twice
    assert (
        faults(exchange(0, WANTS_A), exchange(5, WANTS_A, 20, new(A)), exchange(30, WANTS_A, 31, again(A)), GRANTED_B)
        == 0
    )
    assert faults(GRANTED_A, GRANTED_B, exchange(41, Request("consume", "ann", "C", 90), 42, short(89, 90))) == 0


def test_what_cannot_be_explained() -> None:
    assert faults(GRANTED_A, GRANTED_B, balance(0, 99, 9)) == 1  # never the balance
    assert faults(GRANTED_A, GRANTED_B, balance(21, 22, 100)) == 1  # somebody had been told of A by then
    assert faults(GRANTED_A, GRANTED_B, balance(1, 29, 89)) == 1  # nobody had asked for B yet
    # done and told before the one ahead of it was asked for
    assert faults(exchange(30, WANTS_A, 40, new(A)), exchange(10, WANTS_B, 20, new(B))) == 1
    # asked for in vain at 0, made by the call at 30: and nevertheless ahead of B
    assert faults(exchange(0, WANTS_A), exchange(30, WANTS_A, 40, new(A)), exchange(10, WANTS_B, 20, new(B))) == 1
    assert faults(GRANTED_B) >= 1  # a row that nobody asked for


def test_an_answer_is_about_what_was_asked_for() -> None:
    # two callers are given each other's rows
    assert faults(exchange(10, WANTS_A, 40, new(B)), exchange(10, WANTS_B, 40, new(A))) == 2
    # told of somebody's row for a key that is nowhere
    assert faults(GRANTED_A, GRANTED_B, exchange(50, Request("consume", "ann", "C", 50), 51, again(B))) == 1
    assert faults(GRANTED_A, GRANTED_B, exchange(50, Request("consume", "bob", "A", 1), 51, again(A))) == 1
    # asked for 7 and charged 1, answered or not
    assert faults(exchange(10, Request("consume", "ann", "A", 7), 20, new(A)), GRANTED_B) == 1
    assert faults(exchange(10, Request("consume", "ann", "A", 7)), GRANTED_B) == 1
    # a refund where a consumption was asked for
    assert faults(exchange(10, Request("refund", "ann", "A", 1, "pack"), 20, new(A)), GRANTED_B) == 1
    # what was told is not what is there
    assert faults(exchange(10, WANTS_A, 20, new(row("A", 2, -1, 98))), GRANTED_B) == 1
    # fewer answers than questions, a balance for a row
    assert faults(GRANTED_A, (LoggedQuestion(30, [WANTS_B, WANTS_A]), LoggedAnswer(40, [new(B)]))) == 1
    assert faults(GRANTED_A, exchange(30, WANTS_B, 40, ["balance", 89])) == 1


def test_it_is_there_once() -> None:
    assert faults(GRANTED_A, GRANTED_B, rows=(PACK, row("B", 2, -10, 90))) >= 1  # told of A, which is nowhere
    assert faults(GRANTED_A, GRANTED_B, rows=(PACK, A, B, row("A", 4, -1, 88))) >= 1
    assert faults(GRANTED_A, exchange(12, WANTS_A, 20, new(A)), GRANTED_B) == 1  # two were told that they made it


SHOP = row("A", 2, -1, 99, workshop_id="shop")
OPENS_A, OPENS_C = Request("consume", "ann", "A", 1, "shop"), Request("consume", "ann", "C", 1, "shop")


def test_what_is_done_in_one_transaction_is_told_after_its_commit() -> None:
    both = LoggedQuestion(10, [WANTS_A, Request("balance", "ann"), WANTS_B], "SERIALIZABLE")
    answers = LoggedAnswer(40, [new(A), ["balance", 99], new(B)])
    assert faults((both, answers), balance(15, 20, 100), balance(15, 20, 89)) == 0
    assert faults((both, None), (both._replace(at=50), LoggedAnswer(60, [again(A), ["balance", 89], again(B)]))) == 0
    assert faults((both, answers), balance(41, 42, 99)) == 1  # they were committed together, and that was over
    assert faults((both, answers), balance(5, 8, 89)) == 1


def test_a_workshop_is_unlocked_once_and_whoever_asks_is_told_by_whom() -> None:
    opened, rows = exchange(10, OPENS_A, 20, new(SHOP)), (PACK, SHOP)
    assert faults(opened, exchange(12, OPENS_C, 20, again(SHOP)), rows=rows) == 0
    assert faults(opened, exchange(12, OPENS_C, 20, new(SHOP)), rows=rows) >= 1  # it made nothing
    assert faults(opened, exchange(12, OPENS_C._replace(of="other"), 20, again(SHOP)), rows=rows) == 1
    assert faults(opened, exchange(12, OPENS_C, 20, new(row("C", 3, -1, 98, workshop_id="shop"))), rows=rows) == 1
    twice = (*rows, row("C", 3, -1, 98, workshop_id="shop"))
    assert faults(opened, exchange(12, OPENS_C, 20, new(twice[2])), rows=twice) >= 1


@pytest.mark.parametrize(
    "kind", ["LedgerInconsistent", "UnknownUser", "IdempotencyKeyReused", "UnknownPurchase", "PurchaseNotCompleted"]
)
def test_a_refusal_that_nobody_caused(kind: str) -> None:
    assert faults(GRANTED_A, GRANTED_B, exchange(50, WANTS_A, 51, [kind, {"user": "ann"}])) == 1
    assert (
        faults(
            GRANTED_A, GRANTED_B, exchange(50, Request("refund", "ann", "R", 1, "pack"), 51, [kind, {"user": "ann"}])
        )
        == 1
    )


def test_a_refusal_says_the_truth() -> None:
    wants_c = Request("consume", "ann", "C", 90)
    assert faults(GRANTED_A, GRANTED_B, exchange(50, wants_c, 51, short(89, 89))) == 1  # asked for another amount
    assert faults(GRANTED_A, GRANTED_B, exchange(50, wants_c, 51, short(99, 90))) == 1  # it was covered
    assert faults(GRANTED_A, GRANTED_B, exchange(50, wants_c, 51, short(99, 99))) == 1
    assert faults(GRANTED_A, GRANTED_B, exchange(50, wants_c, 51, short(80, 90))) == 1  # never the balance
    # no refusal of what is there already, nor of the workshop that somebody unlocked
    rows = (PACK, row("S", 2, -100, 0), row("P", 3, 100, 100, "purchase"), row("A", 4, -1, 99, workshop_id="shop"))
    before = exchange(10, Request("consume", "ann", "S", 100), 20, new(rows[1]))
    spent = exchange(90, Request("consume", "ann", "T", 99), 91, new(row("T", 5, -99, 0)))
    bought, opened = (
        exchange(30, Request("buy", "ann", "P", 100), 40, new(rows[2])),
        exchange(50, OPENS_A, 60, new(rows[3])),
    )
    rows = (*rows, row("T", 5, -99, 0))
    for request in (OPENS_A, OPENS_C):
        assert faults(before, bought, opened, spent, exchange(22, request, 25, short(0, 1)), rows=rows) == 0
        assert faults(before, bought, opened, spent, exchange(92, request, 93, short(0, 1)), rows=rows) == 1


def test_a_hold_is_captured_once_for_what_was_asked() -> None:
    def held(sequence: int | None = None, amount: int = -4) -> Any:
        balance_after = None if sequence is None else 100 + amount
        return row("H", sequence, amount, balance_after, held=4)

    wants, charges, ends = (
        Request("hold", "ann", "H", 4),
        Request("capture", "ann", None, 1, "H"),
        Request("release", "ann", None, 0, "H"),
    )
    placed, charged, closed = exchange(10, wants, 20, new(held())), held(2, -1), ["HoldClosed", {"hold": "H"}]
    captured, rows = exchange(30, charges, 40, new(charged)), (PACK, charged)
    assert (
        faults(placed, captured, exchange(50, charges, 60, again(charged)), exchange(50, ends, 60, closed), rows=rows)
        == 0
    )
    assert faults(placed, captured, exchange(50, charges, 60, new(charged)), rows=rows) >= 1  # charged twice
    assert faults(placed, captured, exchange(15, wants, 20, new(held())), rows=rows) == 1  # placed twice
    assert faults(placed, captured, exchange(50, charges, 60, closed), rows=rows) == 1  # it was not given up
    assert (
        faults(placed, exchange(30, charges._replace(amount=4), 40, new(charged)), rows=rows) == 1
    )  # 4 were asked for
    assert faults(placed, exchange(30, charges), rows=rows) == 0  # its answer was lost
    assert faults(placed, rows=rows) == 1  # nobody asked for the charge
    # given up
    released = exchange(30, ends, 40, new(held()))
    assert faults(placed, released, exchange(50, charges, 60, closed), rows=(PACK, held())) == 0
    assert faults(placed, captured, rows=(PACK, held())) == 1
    assert faults(placed, exchange(50, ends, 60, closed), rows=(PACK, held())) == 1
    assert faults(exchange(10, wants._replace(amount=5), 20, new(held())), rows=(PACK, held())) >= 1
    # what is set aside cannot be spent
    short_by_it = ["InsufficientCredits", {"user": "ann", "balance": 100, "held": 4, "required": 98}]
    assert faults(placed, exchange(20, Request("consume", "ann", "C", 98), 30, short_by_it), rows=(PACK, held())) == 0
    assert faults(placed, exchange(20, Request("consume", "ann", "C", 96), 30, short_by_it), rows=(PACK, held())) == 1


def test_what_is_left_of_a_purchase() -> None:
    rows = (PACK, row("P", 2, 20, 120, "purchase"), row("R", 3, -15, 105, "refund", refund_of="P"))
    bought = exchange(10, Request("buy", "ann", "P", 20), 20, new(rows[1]))
    back = exchange(30, Request("refund", "ann", "R", 15, "P"), 40, new(rows[2]))

    def refused(at: float, until: float, left: int, asked: int) -> int:
        error = ["RefundExceedsPurchase", {"purchase": "P", "left": left, "asked": asked}]
        return faults(bought, back, exchange(at, Request("refund", "ann", "F", 10, "P"), until, error), rows=rows)

    def not_given_back(at: float, until: float, taken: int) -> int:
        error = ["ReinstatementExceedsRefunds", {"purchase": "P", "taken": taken, "asked": 20}]
        return faults(bought, back, exchange(at, Request("reinstate", "ann", "F", 20, "P"), until, error), rows=rows)

    assert not_given_back(32, 60, 15) == not_given_back(22, 25, 0) == 0
    assert not_given_back(22, 25, 15) == not_given_back(50, 60, 0) == not_given_back(50, 60, 20) == 1
    assert refused(32, 60, 5, 10) == refused(50, 60, 5, 10) == 0
    assert refused(22, 25, 5, 10) == 1  # not yet
    assert refused(50, 60, 15, 10) == 1  # that would have been enough
    assert refused(50, 60, 4, 10) == 1  # at no moment
    assert refused(50, 60, 5, 11) == 1  # not what was asked
