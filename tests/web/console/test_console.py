"""Each page says what the ledger holds, as a page, as JSON and as CSV, on every shape of host app."""

from __future__ import annotations

import csv
import datetime as dt
import hashlib
import html
import io
import logging
import re
import threading
import time
import uuid
from importlib import resources
from urllib.parse import urlencode

import pytest
import sqlalchemy as sa
from starlette.applications import Starlette
from starlette.routing import Mount
from starlette.testclient import TestClient

from tallystick import migrate
from tallystick.declared_tables import stripe_reversals
from tallystick.errors import DatabaseUnavailable
from tallystick.events.deliver import remove_endpoint
from tallystick.ledger.typescript import typescript
from tallystick.schema import HEAD
from tallystick.web.console import LocalLink, console, queries
from tallystick.web.console.queries import Queries
from tallystick.web.shared.numbers import MINUS
from worlds import SHAPES, World

PAGES = ["/", "/users", "/pending", "/events", "/audit", "/migrations"]
LISTS = ["/users", "/pending", "/events", "/audit", "/migrations", "/days"]


def url_of(path, **query):
    return f"{path}?{urlencode(query)}"


def text_of(answer):
    """The text of a page, as read."""
    assert answer.status_code == 200, answer.text
    return re.sub(r"\s+", " ", html.unescape(re.sub(r"<[^>]+>", " ", answer.text)))


def table(answer):
    assert answer.status_code == 200, answer.text
    return list(csv.DictReader(io.StringIO(answer.text)))


def spend(world, user, *, times=1, **more):
    with world.engine.begin() as conn:
        for number in range(times):
            world.ledger.consume(conn, user, key=f"spend {number} {more}", **more)


def buy(world, user, credits):
    with world.engine.begin() as conn:
        return world.buy(conn, user, credits)


def start(world, user, credits=5, **more):
    with world.engine.begin() as conn:
        return world.ledger.start_purchase(conn, user, credits=credits, description="Purchased Five Flights", **more)


def balance(world, user):
    with world.engine.connect() as conn:
        return world.ledger.balance(conn, user)


def test_every_page_and_list_on_every_host(any_world, open_console):
    user = any_world.user(credits=3)
    if any_world.schema.workshops is not None:
        spend(any_world, user, workshop=any_world.workshop(user, title="Bread & Butter"))
    else:
        spend(any_world, user)
    start(any_world, user)
    visitor = open_console(any_world)

    for path in PAGES:
        assert visitor.get(path).status_code == 200, path
    for path in LISTS:
        assert visitor.get(f"{path}.json").headers["content-type"] == "application/json"
        assert visitor.get(f"{path}.csv").headers["content-type"] == "text/csv; charset=utf-8"

    text = text_of(visitor.overview())
    assert "All 1 balances agree with their ledgers" in text
    assert "1 pending purchase :" in text
    assert f"Revision {HEAD} , applied" in text
    assert "$3" in text

    page = text_of(visitor.get(url_of("/user", key=user)))
    assert "2 entries, balance 2, 1 pending, no gaps" in page
    assert str(user) in page
    ledger = visitor.get(url_of("/user.json", key=user)).json()
    assert [(row["sequence"], row["type"], row["amount"], row["balance_after"]) for row in ledger["rows"]] == [
        (2, "consumption", -1, 2),
        (1, "purchase", 3, 3),
    ]
    assert [row["status"] for row in ledger["unfinished"]] == ["pending"]
    assert ledger["user"]["credit_balance"] == 2
    assert [row["amount"] for row in table(visitor.get(url_of("/user.csv", key=user)))] == ["5", "-1", "3"]
    assert visitor.get(url_of("/user/steps.json", key=user)).json()["balance"] == [3, 2]
    assert [row["user_id"] for row in visitor.get("/pending.json").json()["rows"]] == [
        user if isinstance(user, int) else str(user)
    ]


def test_a_user_of_whom_the_app_notes_no_change_is_shown(make_world, open_console):
    world = make_world("clerk")  # its updated_at is the app's own
    user = world.user(credits=3)
    with world.engine.begin() as conn:
        conn.execute(sa.text("ALTER TABLE users ALTER updated_at DROP NOT NULL"))
        conn.execute(sa.text("UPDATE users SET updated_at = NULL"))
    visitor = open_console(world)
    assert visitor.get("/users.json").json()["rows"][0]["updated_at"] is None
    assert table(visitor.get("/users.csv"))[0]["updated_at"] == ""
    assert str(user) in text_of(visitor.get("/users"))
    assert "Changed not known" in text_of(visitor.get(url_of("/user", key=user)))
    with world.engine.connect() as conn:
        assert world.accounts.get(conn, user).updated_at is None
    assert "updatedAt: Date | null;" in typescript(world.config.host)


def test_an_empty_host_says_what_would_be_here(any_world, open_console):
    visitor = open_console(any_world)
    assert "No payment in the last 60 days" in text_of(visitor.overview())
    assert "No users yet" in text_of(visitor.get("/users"))
    assert "No purchase is waiting" in text_of(visitor.get("/pending"))
    for path in LISTS:
        assert visitor.get(f"{path}.csv").status_code == 200
    user = any_world.user()
    assert "No entries yet" in text_of(visitor.get(url_of("/user", key=user)))


def test_users_are_found_by_key_mail_and_what_stripe_calls_them(any_world, open_console):
    user, others = any_world.user(), [any_world.user() for _ in range(3)]
    purchase = start(any_world, user)
    with any_world.engine.begin() as conn:
        any_world.ledger.attach_session(conn, user, purchase.id, stripe_session_id="cs_test_1")
        any_world.ledger.complete_purchase(
            conn, user, purchase=purchase.id, amount_paid=1, currency="usd", stripe_payment_intent_id="pi_1"
        )
        any_world.accounts.set_stripe_customer(conn, user, "cus_1")
    visitor = open_console(any_world)
    searches = [str(user), "cs_test_1", "pi_1", "cus_1", str(purchase.id), f"  {user} "]
    if "email" in any_world.schema.users.c:
        searches += [f"{user}@example.com", f"{str(user).upper()}@EXAMPLE"]
    for search in searches:
        answer = visitor.get(url_of("/users", q=search))
        assert answer.status_code == 303, search
        assert answer.headers["location"] == url_of("/user", key=user)
    if "email" in any_world.schema.users.c:
        assert len(visitor.get(url_of("/users.json", q="@example.com")).json()["rows"]) == 1 + len(others)
    for search in (
        "nobody",
        "%",
        "100%",
        "'; DROP TABLE users --",
        "\\",
        "cs_none",
        "0" * 40,
        "\0",
        "é",
        "a" * 900,
    ):
        assert visitor.get(url_of("/users.json", q=search)).json()["rows"] == [], search


def walk(visitor, path, direction="after"):
    """Every row of a list, page by page, and the addresses on the way."""
    rows, pages = [], []
    while path:
        page = visitor.get(path).json()
        pages.append(path)
        rows = rows + page["rows"] if direction == "after" else page["rows"] + rows
        path = page[direction]
    return rows, pages


def test_lists_are_walked_there_and_back(any_world, open_console):
    users = [any_world.user() for _ in range(101)]
    user = users[0]
    buy(any_world, user, 200)
    spend(any_world, user, times=120)
    for _ in range(51):
        start(any_world, user)
    visitor = open_console(any_world)
    for path, length, name in (
        ("/users.json", 101, "key"),
        (url_of("/user.json", key=user), 121, "sequence"),
        ("/pending.json", 51, "id"),
    ):
        rows, pages = walk(visitor, path)
        assert len(rows) == length
        assert len({row[name] for row in rows}) == length
        assert len(pages) == (length + 49) // 50
        last = visitor.get(pages[-1]).json()
        back, _ = walk(visitor, last["before"], "before")
        assert back + last["rows"] == rows
        assert len(table(visitor.get(path.replace(".json", ".csv")))) == length + (51 if "user.json" in path else 0)
    sequences = [row["sequence"] for row in walk(visitor, url_of("/user.json", key=user))[0]]
    assert sequences == list(range(121, 0, -1))


def test_a_gap_and_a_debt_are_seen(world, open_console):
    user = world.user()
    bought = buy(world, user, 3)
    spend(world, user, times=3)
    with world.engine.begin() as conn:
        world.ledger.refund(conn, user, bought.id, key="refund")
        conn.execute(sa.text("ALTER TABLE credit_transactions DISABLE TRIGGER tallystick_append_only"))
        conn.execute(sa.text("DELETE FROM credit_transactions WHERE sequence = 3"))
        conn.execute(sa.text("ALTER TABLE credit_transactions ENABLE TRIGGER tallystick_append_only"))
    visitor = open_console(world)
    page = text_of(visitor.get(url_of("/user", key=user)))
    assert "4 entries, balance -3 (debt), 1 linked to an earlier one, 1 missing" in page
    assert "1 missing: the ledger has a gap here" in page
    assert f"{MINUS}3 debt" in page

    visitor.submit("/audit/run")
    answer = visitor.get("/audit")
    while "data-watch" in answer.text:
        threading.Event().wait(0.1)
        answer = visitor.get("/audit")
    text = text_of(answer)
    assert "finding" in text
    assert "What to do" in text
    assert url_of("/user", key=user) in html.unescape(answer.text)
    assert "finding" in text_of(visitor.overview())
    found = table(visitor.get("/audit.csv"))
    assert {row["user"] for row in found} == {str(user)}
    assert visitor.get("/audit.json").json()["report"]["findings"][0]["user"] == str(user)


def test_the_figures_are_the_ledgers(world, open_console):
    user = world.user()
    first = buy(world, user, 10)
    spend(world, user, times=4)
    with world.engine.begin() as conn:
        world.ledger.refund(conn, user, first.id, credits=2, key="r")
        world.ledger.grant(conn, user, credits=3, key="g", description="sorry")
        late = world.ledger.start_purchase(conn, user, credits=1, description="late")
        world.ledger.complete_purchase(conn, user, purchase=late.id, amount_paid=500, currency="jpy")
    other = world.user()
    with world.engine.begin() as conn:
        world.ledger.refund(conn, other, world.buy(conn, other, 1).id, key="r")
    debtor = world.user(credits=2)
    spend(world, debtor, times=2)

    with world.engine.begin() as conn:
        for id, amount, applied, days_ago in (
            ("re_1", 250, "share", 1),
            ("re_2", 70, "none", 1),
            ("dp", 100, "marked", 40),
        ):
            seen = dt.datetime.now(dt.UTC) - dt.timedelta(days=days_ago)
            conn.execute(
                sa.insert(stripe_reversals).values(
                    id=id, kind="refund", stripe_payment_intent_id="pi", amount=amount, currency="usd",
                    status="succeeded", status_rank=1, applied=applied, seen_at=seen,
                )
            )  # fmt: skip

    visitor = open_console(world)
    days = visitor.get("/days.json").json()
    page = text_of(visitor.overview())
    assert f"USD $13 $2.50 $10.50 {MINUS}$1 $1" in page
    assert "They were sold in more than one currency" in page
    assert len(days["days"]) == 60
    assert sum(day["sold"] for day in days["days"][:59]) == 0
    assert {k: v for k, v in days["days"][-1].items() if k != "date"} == {
        "sold": 14, "granted": 3, "consumed": 6, "refunded": 3, "expired": 0,
    }  # fmt: skip
    assert days["money"] == [
        {"currency": "jpy", "now": 500, "before": 0, "credits": 1, "back": 0, "back_before": 0},
        {"currency": "usd", "now": 1300, "before": 0, "credits": 13, "back": 250, "back_before": 100},
    ]
    assert days["holdings"] == {"outstanding": 8, "holders": 1, "debt": 0, "debtors": 0}


def test_credits_sold_in_one_currency_have_a_price_whatever_money_went_back(world, open_console):
    user = world.user()
    buy(world, user, 2)
    with world.engine.begin() as conn:
        conn.execute(
            sa.insert(stripe_reversals).values(
                id="re_1", kind="refund", stripe_payment_intent_id="pi", amount=1, currency="eur",
                status="succeeded", status_rank=1, applied="share", seen_at=dt.datetime.now(dt.UTC),
            )
        )  # fmt: skip
    assert "2 credits , about $2 at the average price" in text_of(open_console(world).overview())


def test_each_user_with_something_due_costs_one_call_of_balance(world):
    queries = Queries(world.config, world.engine)
    sums: list[tuple[str, object]] = []
    sa.event.listen(
        world.engine, "before_cursor_execute", lambda *event_args: sums.append((event_args[2], event_args[3]))
    )
    queries.figures(dt.datetime.now(dt.UTC))
    [(asked, values)] = [each for each in sums if "tallystick.balance" in each[0]]
    with world.engine.connect() as conn:
        plan = "\n".join(conn.exec_driver_sql("EXPLAIN " + asked, values).scalars())
    assert plan.count("Function Scan on balance") == 1


# --- what people typed elsewhere ---

NASTY = "<script>alert(1)</script>'\"&{{ 7*191 }}"


def test_sizes_are_counted_where_that_is_cheap(world, open_console):
    """Also where statistics say otherwise: of twenty users it is not "about 2"."""
    for _ in range(2):
        world.user()
    with world.engine.begin() as conn:
        conn.exec_driver_sql("ANALYZE users")
    for _ in range(18):
        world.user()
    visitor = open_console(world)
    assert "Users 20 " in text_of(visitor.get("/users"))
    with world.engine.begin() as conn:
        conn.exec_driver_sql(
            "INSERT INTO users (id, email) SELECT gen_random_uuid(), n FROM generate_series(1, 3000) n"
        )
    assert "Users more than 1,000 " in text_of(visitor.get("/users"))
    with world.engine.begin() as conn:
        conn.exec_driver_sql("ANALYZE users")
    assert "Users about 3,020 " in text_of(visitor.get("/users"))


def test_what_is_not_paid_is_not_called_purchased(world, open_console):
    user = world.user(credits=1)
    start(world, user)
    failed = start(world, user)
    with world.engine.begin() as conn:
        world.ledger.fail_purchase(conn, user, purchase=failed.id, reason="expired")
    visitor = open_console(world)
    page = text_of(visitor.get(url_of("/user", key=user)))
    assert "Five Flights" in page
    assert "Purchased Five Flights" not in page
    assert "Purchased 1" in page
    for path in ("/pending", "/"):
        assert "Purchased" not in text_of(visitor.get(path))


def test_times_are_there_in_full_and_actions_before_the_ledger(world, open_console):
    user = world.user(credits=1)
    page = text_of(open_console(world, allow_actions=True).get(url_of("/user", key=user)))
    assert re.search(r"just now \d{4}-\d\d-\d\d \d\d:\d\d purchase", page)
    assert page.index("Grant credits") < page.index("Account") < page.index("Tally ") < page.index("Ledger #")


def test_text_of_others_is_text(make_world, open_console):
    world = make_world()
    user = world.user(credits=5)
    workshop = world.workshop(user, title=NASTY)
    spend(world, user, workshop=workshop)
    spend(world, user, description=f"=HYPERLINK(1) {NASTY}")
    with world.engine.begin() as conn:
        conn.execute(sa.update(world.schema.users).values(email=f"=1+1 {NASTY}", plan_tier="<b>"))
        pending = world.ledger.start_purchase(conn, user, credits=1, description=NASTY)
        world.ledger.attach_session(conn, user, pending.id, stripe_session_id='cs_"><script>')
    visitor = open_console(world, allow_actions=True)
    addresses = [
        *PAGES,
        url_of("/user", key=user),
        url_of("/users", q=NASTY + "x"),
        url_of("/user", key=NASTY),
        "/" + NASTY,
    ]
    addresses += [
        url_of("/user/grant", key=user, credits=NASTY, reason=NASTY),
        url_of("/user/grant", key=user, credits=1, reason=NASTY),
    ]
    for address in addresses:
        text = visitor.get(address).text
        assert "<script>alert" not in text, address
        assert "<b>" not in text
        assert "1337" not in text
    assert NASTY in html.unescape(visitor.get(url_of("/user", key=user)).text)
    mail = table(visitor.get("/users.csv"))[0]["email"]
    assert mail == f"'=1+1 {NASTY}"  # no formula for a spreadsheet
    assert any(
        row["description"].startswith("'=HYPERLINK") for row in table(visitor.get(url_of("/user.csv", key=user)))
    )
    assert {row["amount"] for row in table(visitor.get(url_of("/user.csv", key=user)))} >= {"-1", "5"}


def test_keys_of_any_spelling(make_world, open_console):
    world = make_world("clerk")
    visitor = open_console(world)
    for key in ("a/b", "..", "a?b=c&d", "a b", "ü", "%2e", "a.json", "#", "x" * 150):
        with world.engine.begin() as conn:
            conn.execute(sa.insert(world.schema.users).values(key=key, email=None))
        assert text_of(visitor.get(url_of("/user", key=key))).count(key) >= 1
        assert visitor.get(url_of("/user.json", key=key)).json()["user"]["key"] == key
        assert visitor.get(url_of("/user.csv", key=key)).status_code == 200
        assert html.escape(url_of("/user", key=key)) in visitor.get(url_of("/users", q="")).text


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/user", 404),
        ("/user?key=nobody", 404),
        ("/user.json?key=nobody", 404),
        ("/user?key=00000000-0000-0000-0000-000000000000", 404),
        ("/users?after=nonsense", 400),
        ("/users.json?before=%00", 400),
        ("/pending?after=2026-01-01", 400),
        ("/pending?after=2026-01-01T00:00:00~x", 400),
        ("/user/steps.json?key=", 404),
        ("/static/secret.py", 404),
        ("/static/..%2fapp.py", 404),
    ],
)
def test_what_is_not_there_is_said_so(world, open_console, path, status):
    answer = open_console(world).get(path)
    assert answer.status_code == status
    if ".json" in path:
        assert answer.json()["status"] == status


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    "key", ["--5", "9" * 5_000, "-", "+1", "1_0", "\N{ARABIC-INDIC DIGIT THREE}", " 1", "1e3", "", "%00"]
)
def test_a_text_that_is_no_key_is_nobody(console_of_shape, shape, key):
    """On any type of key; a text key may be any text, but nobody has these."""
    visitor = console_of_shape(shape)
    for path in ("/user", "/user.json", "/user.csv", "/user/steps.json", "/user/grant"):
        answer = visitor.get(path, params={"key": key})
        empty = path.endswith("steps.json") and answer.json() == {"at": [], "balance": []}
        assert empty or answer.status_code == 404, (path, answer.text)
    assert visitor.get("/users", params={"q": key}).status_code == 200
    assert visitor.submit("/user/grant", key=key, credits=1, reason="x", once="y").status_code == 404


@pytest.mark.parametrize(
    "moment", ["0001-01-01T00:00:00+23:59", "9999-12-31T23:59:59-23:59", "2026-01-01T00:00:00+16:00", "2026-W01-1"]
)
def test_a_moment_that_postgresql_does_not_know_is_no_server_error(world, open_console, moment):
    answer = open_console(world).get("/pending", params={"after": f"{moment}~{uuid.uuid4()}"})
    assert answer.status_code in {200, 400}


def test_cursors_out_of_range_are_no_server_errors(world, open_console):
    visitor = open_console(world)
    user = world.user(credits=1)
    for after in ("0", "9" * 10, "9" * 30, "-1", "x", "1e5"):
        assert visitor.get(url_of("/user.json", key=user, after=after)).status_code in (200, 400)


# --- actions ---


def test_read_only_unless_allowed(world, open_console):
    user = world.user(credits=2)
    visitor = open_console(world)
    assert visitor.get(url_of("/user/grant", key=user)).status_code == 404
    assert visitor.submit("/user/grant", key=user, credits=1, reason="x", once="1").status_code == 404
    assert visitor.submit("/pending/ask").status_code == 404
    assert "Grant credits" not in visitor.get(url_of("/user", key=user)).text
    assert balance(world, user) == 2


def test_reading_is_read_only_in_the_database(world):
    queries = Queries(world.config, world.engine)
    user = world.user()
    with pytest.raises(DatabaseUnavailable, match="read-only transaction"), queries.reading() as conn:
        conn.execute(sa.update(world.schema.users).values(credit_balance=9).where(world.schema.users.c.key == user))


def test_a_grant_is_shown_done_once_and_recorded(any_world, open_console, caplog):
    caplog.set_level(logging.INFO, "tallystick.console")
    user = any_world.user(credits=2)
    visitor = open_console(any_world, allow_actions=True)

    review = visitor.get(url_of("/user/grant", key=user, credits=3, reason="The demo failed"))
    assert "This will grant 3 credits to" in text_of(review)
    assert "Balance: 2 → 5" in text_of(review)
    fields = dict(
        re.findall(r'<input type="hidden" name="(\w+)" value="([^"]*)"', review.text.partition('class="confirm"')[2])
    )
    fields = {name: html.unescape(value) for name, value in fields.items()}
    assert balance(any_world, user) == 2

    answers = [visitor.post("/user/grant", data=fields) for _ in range(3)]  # a double click, and a reload
    assert {answer.status_code for answer in answers} == {303}
    assert len({answer.headers["location"] for answer in answers}) == 1
    assert balance(any_world, user) == 5
    page = text_of(visitor.get(answers[0].headers["location"]))
    assert "3 credits granted. Balance after: 5." in page
    assert "The demo failed" in page
    assert "by local operator, from the console" in page

    log = [record.getMessage() for record in caplog.records if "action=grant" in record.getMessage()]
    assert len(log) == 3
    assert "operator='local operator'" in log[0]
    assert f"user={user!r}" in log[0]
    assert "reason='The demo failed'" in log[0]
    assert [line.endswith("replayed=True") for line in log] == [False, True, True]


def test_a_refund_of_all_that_is_left_replays_too(world, open_console):
    user = world.user()
    bought = buy(world, user, 5)
    spend(world, user, times=4)
    visitor = open_console(world, allow_actions=True)
    asked = {"key": user, "purchase": bought.id, "credits": 5, "reason": "Refunded by bank transfer"}

    review = text_of(visitor.get(url_of("/user/refund", **asked)))
    assert f"Balance: 1 → {MINUS}4 (debt)" in review
    assert "5 left to refund, of which 4 are spent already. The balance is 1." in review
    assert "moves no money" in review
    before = text_of(visitor.get(url_of("/user/refund", key=user, purchase=bought.id)))
    assert "5 left to refund, of which 4 are spent already. The balance is 1." in before
    first = visitor.submit("/user/refund", **asked, once="abc")
    again = visitor.submit("/user/refund", **asked, once="abc")
    assert first.status_code == again.status_code == 303
    assert first.headers["location"] == again.headers["location"]
    assert balance(world, user) == -4

    other = visitor.submit("/user/refund", **asked, once="another")
    assert other.status_code == 409
    assert "0 credits left to refund" in other.text
    assert "Nothing of this purchase is left" in visitor.get(url_of("/user/refund", **asked)).text


@pytest.mark.parametrize(
    ("fields", "fault"),
    [
        ({"credits": "", "reason": "x"}, "Say how many credits"),
        ({"credits": "0", "reason": "x"}, "Say how many credits"),
        ({"credits": "-1", "reason": "x"}, "Say how many credits"),
        ({"credits": "1.5", "reason": "x"}, "Say how many credits"),
        ({"credits": "٣", "reason": "x"}, "Say how many credits"),
        ({"credits": "2147483648", "reason": "x"}, "Say how many credits"),
        ({"credits": "9" * 30, "reason": "x"}, "Say how many credits"),
        ({"credits": "1", "reason": "  "}, "Give a reason"),
        ({"credits": "1", "reason": "x" * 501}, "Give a reason"),
    ],
)
def test_what_is_missing_is_asked_for(world, open_console, fields, fault):
    user = world.user(credits=1)
    visitor = open_console(world, allow_actions=True)
    answer = visitor.get(url_of("/user/grant", key=user, **fields))
    assert answer.status_code == 422
    assert fault in answer.text
    assert visitor.submit("/user/grant", key=user, once="1", **fields).status_code == 422
    assert balance(world, user) == 1


def test_what_the_ledger_refuses_is_said(world, open_console):
    user = world.user(credits=1)
    visitor = open_console(world, allow_actions=True)
    once = {"key": user, "reason": "x", "once": "1"}
    assert visitor.submit("/user/grant", **once, credits=2**31 - 1).status_code == 409
    assert visitor.submit("/user/grant", **once, credits=1).status_code == 303
    reused = visitor.submit("/user/grant", **once, credits=2)  # the same form with another amount
    assert reused.status_code == 409
    assert "used before" in reused.text
    with world.engine.begin() as conn:
        world.accounts.delete_user(conn, user)
    assert "deleted" in visitor.submit("/user/grant", key=user, credits=1, reason="x", once="2").text
    assert visitor.submit("/user/grant", key=user, credits=1, reason="x").status_code == 422  # no key of the form
    assert visitor.submit("/user/steal", key=user, credits=1, reason="x", once="1").status_code == 404
    assert balance(world, user) == 2


def test_another_users_purchase_cannot_be_refunded_here(world, open_console):
    user, other = world.user(), world.user()
    bought = buy(world, other, 5)
    visitor = open_console(world, allow_actions=True)
    fields = {"key": user, "purchase": bought.id, "credits": 1, "reason": "x"}
    assert visitor.get(url_of("/user/refund", **fields)).status_code == 404
    assert visitor.submit("/user/refund", **fields, once="1").status_code == 404
    assert balance(world, other) == 5


# --- around ---


def test_it_can_be_mounted_below_a_path(world):
    link = LocalLink()
    app = Starlette(
        routes=[Mount("/ops", console(world.config, engine=world.engine, sign_in=link, address="http://shop"))]
    )
    visitor = TestClient(app, base_url="http://shop", follow_redirects=False)
    user = world.user(credits=1)
    assert visitor.get("/ops/users").status_code == 401
    assert visitor.get("/ops/enter", params={"token": link.token}).headers["location"] == "/ops/"
    for path in ("/ops/", "/ops/users", f"/ops/user?key={user}", "/ops/audit"):
        page = visitor.get(path)
        assert page.status_code == 200
        addresses = re.findall(r'(?:href|src|action|data-watch|data-steps)="([^"#]+)', page.text)
        assert all(address.startswith(("/ops/", "https://")) for address in addresses), addresses
    assert visitor.get("/ops/static/console.css").status_code == 200


def test_an_unmigrated_database_says_what_to_run(fresh_database, open_console):
    visitor = open_console(World(fresh_database(), SHAPES["uuid"].host))
    answer = visitor.overview()
    assert answer.status_code == 503
    assert "tallystick migrate apply" in answer.text


def test_vendored_files_are_what_they_say():
    folder = resources.files("tallystick.web.console").joinpath("static")
    listed = re.findall(r"([0-9a-f]{64})  (\S+)", folder.joinpath("README.md").read_text())
    assert {name for _, name in listed} == {"uPlot.iife.min.js", "uPlot.min.css"}
    for digest, name in listed:
        assert hashlib.sha256(folder.joinpath(name).read_bytes()).hexdigest() == digest


def test_no_page_holds_script_or_style_of_its_own(world, open_console):
    user = world.user(credits=1)
    visitor = open_console(world, allow_actions=True)
    for path in (*PAGES, url_of("/user", key=user), url_of("/user/grant", key=user)):
        page = visitor.get(path).text
        assert not re.search(r"<style|<script(?![^>]* src=)|\sstyle=|\son\w+=|javascript:", page), path


def test_a_migration_on_its_way_is_not_called_applied(world, open_console):
    """The state between the two transactions of a run, where a later package brings a further revision."""
    with world.engine.begin() as conn:
        conn.exec_driver_sql("INSERT INTO tallystick.migration_log (revision, direction) VALUES ('0999', 'prepare')")
    visitor = open_console(world)
    assert "Revision 0999 , prepared" in text_of(visitor.overview())
    assert "0999 prepared" in text_of(visitor.get("/migrations"))


# --- holds, reversals, corrections, and credits that expire ---


def test_the_figures_count_what_was_taken_back(world, open_console):
    user = world.user(credits=10)
    with world.engine.begin() as conn:
        used = world.ledger.consume(conn, user, credits=4, key="c")
        world.ledger.reverse(conn, user, used.id, credits=3, key="r")
        given = world.ledger.grant(conn, user, credits=5, key="g", description="Imported")
        world.ledger.correct(conn, user, given.id, credits=2, key="x")
        bought = world.buy(conn, user, 6)
        world.ledger.refund(conn, user, bought.id, credits=4, key="f")
        world.ledger.reinstate(conn, user, bought.id, credits=1, key="b")
        world.ledger.hold(conn, user, credits=2, key="h")
        soon = dt.datetime.now(dt.UTC) + dt.timedelta(days=1)
        world.ledger.grant(conn, user, credits=7, key="e", description="Spring", expires_at=soon)
    world.pass_time(days=2)
    with world.engine.begin() as conn:
        world.ledger.sweep(conn)
    visitor = open_console(world)
    assert {k: v for k, v in visitor.get("/days.json").json()["days"][-1].items() if k != "date"} == {
        "sold": 16, "granted": 10, "consumed": 1, "refunded": 3, "expired": 7,
    }  # fmt: skip
    page = text_of(visitor.overview())
    assert "Granted without payment 10 0 in the 30 days before" in page
    assert "Expired 7 0 in the 30 days before" in page
    assert "No purchase is waiting" in page


def test_a_day_that_gave_back_more_than_was_consumed_is_below_zero(world, open_console):
    user = world.user(credits=5)
    with world.engine.begin() as conn:
        used = world.ledger.consume(conn, user, credits=4, key="c")
        world.ledger.reverse(conn, user, used.id, key="r")
        conn.exec_driver_sql("SET LOCAL session_replication_role = replica")
        conn.exec_driver_sql(
            "UPDATE credit_transactions SET completed_at = now() - interval '3 days' WHERE amount = -4"
        )
    days = open_console(world).get("/days.json").json()["days"]
    assert (days[-4]["consumed"], days[-1]["consumed"]) == (4, -4)


def test_what_is_held_and_what_expires_is_shown(any_world, open_console):
    ledger, user = any_world.ledger, any_world.user(credits=10)
    soon = dt.datetime.now(dt.UTC) + dt.timedelta(days=30)
    with any_world.engine.begin() as conn:
        spring = ledger.grant(conn, user, credits=4, key="g", description="Spring promotion", expires_at=soon)
        used = ledger.consume(conn, user, credits=3, key="c", description="Answer 16")
        ledger.reverse(conn, user, used.id, credits=1, key="r")
        ledger.release(conn, user, ledger.hold(conn, user, credits=1, key="h1", description="Answer 17").id)
        held = ledger.hold(
            conn, user, credits=5, key="h2", description="Answer 18", capture_limit=8, expires_in=dt.timedelta(hours=1)
        )
    visitor = open_console(any_world)
    answer = visitor.get(url_of("/user", key=user))
    page = text_of(answer)
    assert "12 credits 5 held , 7 can be spent" in page
    assert re.search(rf"in 59 min {held.expires_at:%Y-%m-%d %H:%M} 5 8 Answer 18", page)
    assert "hold, released" in page
    assert f"in 29 d {soon:%Y-%m-%d %H:%M} 2 4 grant Spring promotion" in page
    assert "2 credits of 12 will expire: 0 bought, 2 granted. The other 10 do not expire." in page
    assert "Bought 10 $10 paid Granted 4 without payment Consumed 2 Expired 0" in page
    assert "4 entries, balance 12, 1 linked to an earlier one, 1 held, no gaps" in page
    assert f'aria-label="of consumption {used.id}"' in answer.text
    assert "pending" not in page

    data = visitor.get(url_of("/user.json", key=user)).json()
    about = data["user"]
    assert (about["credit_balance"], about["credit_held"], about["credit_available"]) == (12, 5, 7)
    assert [(lot["id"], lot["remaining"], lot["given"], lot["paid"]) for lot in data["lots"]] == [
        (str(spring.id), 2, 4, False)
    ]
    assert [(row["status"], row["held"], row["capture_limit"]) for row in data["holds"]] == [("pending", 5, 8)]
    assert [(row["status"], row["held"], row["capture_limit"]) for row in data["unfinished"]] == [("failed", 1, 0)]
    for path, shown in (("/user/holds", "Answer 18"), ("/user/lots", "Spring promotion")):
        assert shown in text_of(visitor.get(url_of(path, key=user)))
        assert [row["description"] for row in visitor.get(url_of(f"{path}.json", key=user)).json()["rows"]] == [shown]
        assert [row["description"] for row in table(visitor.get(url_of(f"{path}.csv", key=user)))] == [shown]
    rows = table(visitor.get(url_of("/user.csv", key=user)))
    assert [row["held"] for row in rows if row["id"] == str(held.id)] == ["5"]
    assert visitor.get("/pending.json").json()["rows"] == []
    assert "1 held" in text_of(visitor.get("/users"))


def test_what_has_expired_without_a_row_is_not_shown_as_there(world, open_console):
    ledger, user = world.ledger, world.user(credits=2)
    soon = dt.datetime.now(dt.UTC) + dt.timedelta(days=1)
    with world.engine.begin() as conn:
        ledger.grant(conn, user, credits=4, key="g", description="Spring promotion", expires_at=soon)
        ledger.hold(conn, user, credits=2, key="h", description="Answer 18")
    world.pass_time(days=2)
    visitor = open_console(world)
    page = text_of(visitor.get(url_of("/user", key=user)))
    assert "2 credits 4 expired; the row follows" in page
    assert "can be spent" not in page
    assert "hold, expired" in page
    assert "Credits that expire" not in page
    assert "2 entries, balance 6, no gaps" in page
    assert "held" not in text_of(visitor.get("/users"))
    assert visitor.get("/days.json").json()["holdings"] == {"outstanding": 2, "holders": 1, "debt": 0, "debtors": 0}
    with world.engine.begin() as conn:
        ledger.sweep(conn)
    page = text_of(visitor.get(url_of("/user", key=user)))
    assert "the row follows" not in page
    assert "hold, expired" in page
    assert "3 entries, balance 2, 1 linked to an earlier one, no gaps" in page


def test_a_user_with_nothing_held_costs_no_further_statement(world):
    plain, holder = world.user(credits=2), world.user(credits=2)
    with world.engine.begin() as conn:
        world.ledger.hold(conn, holder, credits=1, key="h")
    queries = Queries(world.config, world.engine)
    asked: list[str] = []
    sa.event.listen(world.engine, "before_cursor_execute", lambda *event_args: asked.append(event_args[2]))
    assert queries.user(plain).credit_available == 2
    alone = len(asked)
    assert queries.user(holder).credit_available == 1
    assert len(asked) - alone == alone + 1


def test_failed_holds_push_nothing_that_waits_off_the_page(world, open_console):
    user = world.user(credits=1)
    waits = start(world, user)
    with world.engine.begin() as conn:
        for number in range(60):
            world.ledger.release(conn, user, world.ledger.hold(conn, user, credits=1, key=str(number)).id)
    rows = open_console(world).get(url_of("/user.json", key=user)).json()["unfinished"]
    assert (rows[0]["id"], rows[0]["status"]) == (str(waits.id), "pending")
    assert len(rows) == 51
    assert all(row["status"] == "failed" for row in rows[1:])


def test_what_was_paid_for_is_told_apart_from_what_was_given(world, open_console):
    ledger, user, other = world.ledger, world.user(), world.user(credits=3)
    with world.engine.begin() as conn:
        bought = world.buy(conn, user, 10)
        ledger.refund(conn, user, bought.id, credits=4, key="f")
        ledger.reinstate(conn, user, bought.id, credits=1, key="i")
        given = ledger.grant(conn, user, credits=5, key="g", description="Imported")
        ledger.correct(conn, user, given.id, credits=2, key="x")
        year = ledger.start_purchase(
            conn, user, credits=2, description="A year's", expires_after=dt.timedelta(days=365)
        )
        ledger.complete_purchase(conn, user, purchase=year.id, amount_paid=700, currency="eur")
        ledger.consume(conn, user, credits=1, key="c")
        ledger.merge(conn, other, into=user, key="m")
    visitor = open_console(world)
    page = text_of(visitor.get(url_of("/user", key=user)))
    assert "Bought 9 €7, $10 paid; less 3 refunded Granted 3 without payment Consumed 1 Expired 0" in page
    assert "3 credits came by a merge of two accounts." in page
    assert "1 credit of 14 will expire: 1 bought, 0 granted." in page
    assert "3 credits went by a merge" in text_of(visitor.get(url_of("/user", key=other)))
    lots = visitor.get(url_of("/user/lots.json", key=user)).json()["rows"]
    assert [(lot["paid"], lot["remaining"], lot["amount_paid"]) for lot in lots] == [(True, 1, 700)]


def test_of_a_long_ledger_the_newest_rows_are_summed(world, open_console, monkeypatch):
    monkeypatch.setattr(queries, "SUM_ROWS", 2)
    user = world.user(credits=5)
    spend(world, user, times=3)
    page = text_of(open_console(world).get(url_of("/user", key=user)))
    assert "How the credits came and went, in the last 2 entries Bought 0" in page


def test_many_holds_and_lots_are_walked_there_and_back(world, open_console):
    user = world.user(credits=60)
    with world.engine.begin() as conn:
        for number in range(51):
            world.ledger.hold(conn, user, credits=1, key=f"h{number}", expires_in=dt.timedelta(days=2))
            soon = dt.datetime.now(dt.UTC) + dt.timedelta(days=1 + number // 2)
            world.ledger.grant(conn, user, credits=1, key=f"g{number}", description="A day", expires_at=soon)
    visitor = open_console(world)
    page = text_of(visitor.get(url_of("/user", key=user)))
    assert "All holds" in page
    assert "All 51 that expire" in page
    for path in ("/user/holds.json", "/user/lots.json"):
        rows, pages = walk(visitor, url_of(path, key=user))
        assert (len({row["id"] for row in rows}), len(pages)) == (51, 2)
        last = visitor.get(pages[-1]).json()
        assert walk(visitor, last["before"], "before")[0] + last["rows"] == rows
        assert len(table(visitor.get(url_of(path.replace(".json", ".csv"), key=user)))) == 51
        assert visitor.get(url_of(path, key=user, after="x")).status_code == 400


# --- events ---


def dead_letters(visitor):
    return [(row["endpoint"], row["event_id"]) for row in visitor.get("/events.json").json()["dead_letters"]]


@pytest.mark.parametrize("shape", ["quoted", "alone"])
def test_events_are_listed_with_where_they_were_delivered(make_world, shape, open_console, hook):
    world = make_world(shape)
    visitor = open_console(world)
    user = world.user(credits=9)
    assert "Events are off" in text_of(visitor.get("/events"))
    assert "All events" not in text_of(visitor.get(url_of("/user", key=user)))
    hook.add(world, "crm")
    assert "No events of the entries above" in text_of(visitor.get(url_of("/user", key=user)))
    with world.engine.begin() as conn:
        held = world.ledger.hold(conn, user, credits=3, key="h", description="Answer 18", capture_limit=8)
    hook.deliver(world)
    hook.status = 200
    with world.engine.begin() as conn:
        world.ledger.capture(conn, user, held.id, credits=8)
    hook.deliver(world)
    hook.status = 500
    spend(world, user)
    hook.deliver(world, attempts=2)
    other = world.user(credits=1)

    events = visitor.get(url_of("/events.json", key=user)).json()["rows"]
    assert [(row["kind"], row["amount"], [one["state"] for one in row["deliveries"]]) for row in events] == [
        ("consumption.completed", -1, ["waits"]),
        ("balance.low", -8, ["delivered"]),
        ("consumption.completed", -8, ["delivered"]),
        ("consumption.held", -3, ["dead letter"]),
    ]
    assert len(visitor.get("/events.json").json()["rows"]) == 1 + len(events)
    assert len(table(visitor.get("/events.csv"))) == 1 + len(table(visitor.get(url_of("/events.csv", key=user)))) == 5
    page = text_of(visitor.get(url_of("/user", key=user)))
    assert "consumption.held" in page
    assert "crm dead letter" in page
    page = text_of(visitor.get("/events"))
    assert re.search(r"crm http://\S+ \d+-\d+ 2 since .* all kinds it answered 500 .* 1 failed attempt; the next", page)
    assert "1 dead letter, 1 endpoint of events failing" in text_of(visitor.overview())
    assert str(other) in page

    with world.engine.begin() as conn:
        remove_endpoint(conn, "crm")
    assert "crm removed" in text_of(visitor.get("/events"))
    assert [row["deliveries"] for row in visitor.get(url_of("/events.json", key=user)).json()["rows"]] == [[]] * 4
    hook.add(world, "crm")  # anew: of what was before nothing is known
    assert {state["state"] for row in visitor.get("/events.json").json()["rows"] for state in row["deliveries"]} == {
        "dead letter"
    }


def test_events_are_walked_there_and_back(world, open_console, hook):
    hook.add(world, "crm", kinds=["balance.debt"])
    user = world.user(credits=60)
    spend(world, user, times=60)
    visitor = open_console(world)
    for path in ("/events.json", url_of("/events.json", key=user)):
        rows, pages = walk(visitor, path)
        assert len({row["id"] for row in rows}) == 62  # of each row one, and one of the balance
        last = visitor.get(pages[-1]).json()
        assert walk(visitor, last["before"], "before")[0] + last["rows"] == rows
        assert len(table(visitor.get(path.replace(".json", ".csv")))) == 62
    for cursor in ("x", "1", "1-x", "9" * 30 + "-1"):
        assert visitor.get(url_of("/events.json", after=cursor)).status_code == 400


def test_a_dead_letter_is_sent_again_by_whom_the_log_says(world, open_console, hook, caplog):
    caplog.set_level(logging.INFO, "tallystick.console")
    hook.add(world, "crm")
    world.user(credits=1)
    hook.deliver(world)
    reader, visitor = open_console(world), open_console(world, allow_actions=True)
    [(endpoint, event)] = dead_letters(visitor)
    assert "tallystick events replay crm" in text_of(reader.get("/events"))
    assert "Send again" not in text_of(reader.get("/events"))
    assert reader.submit("/events/send", endpoint=endpoint, event=event).status_code == 404
    assert visitor.post("/events/send", data={"endpoint": endpoint, "event": event}).status_code == 403
    assert visitor.submit("/events/send", endpoint=endpoint, event="x").status_code == 404
    assert visitor.submit("/events/send", endpoint="\0", event=event).status_code == 404
    assert len(hook.ids) == 1

    def send():
        answer = visitor.submit("/events/send", endpoint=endpoint, event=event)
        assert answer.status_code == 303, answer.text
        return text_of(visitor.get(answer.headers["location"]))

    hook.status = 503
    assert "not taken. The list has the new reason." in (page := send())
    assert "2 it answered 503" in page
    hook.status = 200
    assert "Sent again, and taken" in send()
    assert dead_letters(visitor) == []
    assert "nothing was sent" in send()  # a double click
    assert hook.ids == [f"evt_{event}"] * 3
    logged = [record.getMessage() for record in caplog.records if "action=send-again" in record.getMessage()]
    assert logged == [
        f"action=send-again operator='local operator' endpoint='crm' event={event} outcome={outcome}"
        for outcome in ("refused", "taken", "gone")
    ]


def test_no_transaction_is_open_while_an_endpoint_is_waited_for(world, open_console, hook):
    hook.add(world, "crm")
    world.user(credits=1)
    hook.deliver(world)
    visitor = open_console(world, allow_actions=True)
    [(endpoint, event)] = dead_letters(visitor)
    idle = []
    others = sa.text(
        "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND backend_type = 'client backend' "
        "AND pid <> pg_backend_pid() AND state <> 'idle'"
    )

    def look():
        deadline = time.monotonic() + 20  # the overview's figures, which were asked for on the way, end before
        with world.autocommit.connect() as conn:
            while (busy := conn.scalar(others)) and time.monotonic() < deadline:
                time.sleep(0.05)
        idle.append(not busy)

    hook.seen, hook.status = look, 200
    assert visitor.submit("/events/send", endpoint=endpoint, event=event).status_code == 303
    assert idle == [True]


def test_without_the_endpoints_secret_it_says_so(world, open_console, hook, monkeypatch):
    hook.add(world, "crm")
    world.user(credits=1)
    hook.deliver(world)
    visitor = open_console(world, allow_actions=True)
    [(endpoint, event)] = dead_letters(visitor)
    monkeypatch.delenv("HOOK_SECRET")
    answer = visitor.submit("/events/send", endpoint=endpoint, event=event)
    assert answer.status_code == 409
    assert "HOOK_SECRET, the secret of the endpoint crm, is not set" in html.unescape(answer.text)
    assert len(hook.ids) == 1


def test_a_database_of_a_revision_before_events(world, open_console):
    user = world.user(credits=3)
    with world.engine.begin() as conn:
        world.ledger.hold(conn, user, credits=1, key="h")
    migrate.undo(world.url, world.config, to="0002", discard_ledger=True)
    visitor = open_console(world)
    assert "3 credits 1 held , 2 can be spent" in text_of(visitor.get(url_of("/user", key=user)))
    assert "balances" in text_of(visitor.get("/"))
    answer = visitor.get("/events")
    assert answer.status_code == 503
    assert "tallystick migrate apply" in answer.text
