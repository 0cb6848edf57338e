"""A function of the ledger reads and writes rows of one user, bound by that user's key, as tables that are distributed
by user would need it. The functions with a statement that finds its row by something else are named here, with the
reason: they would be changed first."""

from __future__ import annotations

import re
from pathlib import Path

import tallystick.ledger

SQL = Path(tallystick.ledger.__file__).parent / "sql"
TABLE = re.compile(
    r"(?:FROM|JOIN|UPDATE|INTO) +(\{ledger\}|\{users\}|tallystick\.(?:lots|lot_moves|low_balances))(?= )"
)
BOUND = re.compile(r"user_id|\{user_key\} (?:=|\{is\}) |low_balances")

OF_MANY_USERS = {
    "merge": "is about two users",
    "sweep": "is about whoever has something expired",
    "events": "is the feed of all users",
    "close_days": "adds up the rows of all users",
}
BY_ANOTHER_KEY = {
    # reason → the functions with statements that name no user
    "by the row's id, which the caller passes: a row of another user is refused by name, not overlooked": {
        "attach_session",
        "capture",
        "complete_purchase",
        "fail_purchase",
        "find_purchase",
        "give_or_take",
        "release",
    },
    "by the session, which is one purchase in all of the ledger": {"find_purchase"},
    "by the lot and the row that moved it, both found as the user's before": {
        "give_to_lots",
        "open_lot",
        "settle_due",
        "take_back_from_lots",
        "take_from_lots",
    },
}


def statements(text: str) -> list[str]:
    """The statements of a function's body that name a table of the ledger."""
    body = "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("--"))
    return [part for part in body.split(";") if TABLE.search(part)]


def test_a_statement_names_the_user_or_is_named_here() -> None:
    found = set()
    seen = 0
    for file in SQL.glob("*.sql"):
        for statement in statements(file.read_text("utf-8")):
            seen += 1
            if not BOUND.search(statement.partition("WHERE")[2] if "INSERT" not in statement else statement):
                found.add(file.stem)
    assert seen > 80  # the tables are still found by these words
    assert set(found) == set(OF_MANY_USERS).union(*BY_ANOTHER_KEY.values())
