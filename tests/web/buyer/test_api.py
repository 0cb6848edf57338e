"""The JSON side: what it answers, on every shape of host, on sync and async engines."""

from __future__ import annotations

import asyncio
import datetime as dt
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import anyio
import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import create_async_engine

from sites import HTML, HTMX, Site
from tallystick.errors import Key
from tallystick.web.buyer.engine import Database
from worlds import World

pytestmark = pytest.mark.one_server  # it is about requests and answers

PROBLEM = "application/problem+json"


def problem(response: Any, status: int, name: str) -> dict[str, Any]:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == PROBLEM
    body: dict[str, Any] = response.json()
    assert (body["type"], body["status"]) == (f"urn:tallystick:problem:{name}", status)
    assert body["title"]
    assert body["detail"]
    return body


@pytest.mark.parametrize("shape", ["uuid", "clerk", "quoted"])
def test_a_workshop_is_paid_for_once(make_site: Callable[..., Site], shape: str) -> None:
    site = make_site(shape)
    user = site.world.user(credits=3)
    workshop = site.world.workshop(user)
    about = f"/billing/api/workshops/{workshop}"
    before = site.get(user, f"{about}/access").json()
    assert (before["open"], before["reason"], before["required"], before["balance"]) == (False, "locked", 1, 3)
    assert site.get(user, f"/paid/{workshop}").status_code == 402

    first = site.post(user, f"{about}/unlock").json()
    again = site.post(user, f"{about}/unlock").json()
    assert (first["balance"], first["replayed"]) == (2, False)
    assert (again["balance"], again["replayed"]) == (2, True)
    assert first["transaction"]["id"] == again["transaction"]["id"]

    assert site.get(user, f"{about}/access").json()["reason"] == "unlocked"
    opened = site.get(user, f"/paid/{workshop}")
    assert opened.json() == "unlocked"
    assert (opened.headers["cache-control"], opened.headers["vary"]) == ("private", "Cookie")
    assert site.get(user, "/billing/api/balance").json() == {
        "balance": 2, "held": 0, "available": 2, "expiring": [], "plan_tier": "free",
    }  # fmt: skip


def test_a_cancelled_request_gives_its_connection_back(world: World) -> None:
    user = world.user(credits=3)
    asleep = (
        "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND query = 'SELECT pg_sleep(120)'"
    )

    async def cancelled_then_asked() -> int:
        engine = create_async_engine(world.url, pool_size=1, max_overflow=0)
        database = Database(engine)
        async with anyio.create_task_group() as group:
            group.start_soon(database.run, lambda conn: conn.cursor().execute("SELECT pg_sleep(120)"))
            with world.engine.connect() as conn:
                while not conn.exec_driver_sql(asleep).scalar():
                    await anyio.sleep(0.01)
                    conn.rollback()  # the view is as of a transaction's first look
            group.cancel_scope.cancel()
        found = await database.run(lambda conn: world.ledger.balance(conn, user))
        await engine.dispose()
        return found

    with ThreadPoolExecutor(1) as other:  # a browser that is open in this thread has its own event loop
        assert other.submit(asyncio.run, cancelled_then_asked()).result(60) == 3


def test_a_cancelled_request_on_a_sync_engine_waits_for_its_thread(world: World) -> None:
    engine = sa.create_engine(world.url, pool_size=1, max_overflow=0)
    database = Database(engine)
    begun = threading.Event()

    def work(conn: Any) -> None:
        begun.set()
        conn.cursor().execute("SELECT pg_sleep(0.5)")

    async def cancelled() -> int:
        async with anyio.create_task_group() as group:
            group.start_soon(database.run, work)
            await anyio.to_thread.run_sync(begun.wait)
            group.cancel_scope.cancel()
        assert isinstance(engine.pool, sa.QueuePool)
        return engine.pool.checkedout()

    with ThreadPoolExecutor(1) as other:
        assert other.submit(asyncio.run, cancelled()).result(60) == 0
    engine.dispose()


def test_both_engines(either_site: Site) -> None:
    site = either_site
    user = site.world.user(credits=1)
    one, other = site.world.workshop(user), site.world.workshop(user)
    assert site.post(user, f"/billing/api/workshops/{one}/unlock").status_code == 200
    refused = problem(site.post(user, f"/billing/api/workshops/{other}/unlock"), 402, "insufficient-credits")
    assert (refused["balance"], refused["required"]) == (0, 1)
    assert site.get(user, f"/paid/{one}").status_code == 200
    problem(site.get(user, f"/paid/{other}"), 402, "workshop-locked")
    problem(site.client.get("/billing/api/balance"), 401, "not-signed-in")


def test_a_host_without_workshops(make_site: Callable[..., Site]) -> None:
    site = make_site("alone")
    user = site.world.user(credits=2)
    assert site.get(user, "/billing/api/balance").json()["balance"] == 2
    report = site.get(user, "/report")
    assert report.json() == 2
    assert (report.headers["cache-control"], report.headers["vary"]) == ("private", "Cookie")
    assert site.post(user, "/billing/api/workshops/1/unlock").status_code == 404
    assert "/billing/api/workshops/{workshop}/unlock" not in site.app.openapi()["paths"]


def test_a_refusal_says_how_to_go_on(site: Site) -> None:
    user = site.world.user()
    body = problem(site.get(user, "/report"), 402, "insufficient-credits")
    assert (body["balance"], body["required"], body["checkout"]) == (0, 2, "/billing/api/checkout")
    assert body["packs"][1] == {"name": "Flight Crew", "credits": 3, "amount": 14900, "currency": "usd"}
    assert body["detail"] == "You have 0 credits. This takes 2."


def test_an_idempotency_key_names_one_intent(site: Site) -> None:
    user = site.world.user(credits=3)
    one, other = site.world.workshop(user), site.world.workshop(user)
    keyed = {"idempotency-key": "from-the-phone"}
    assert site.post(user, f"/billing/api/workshops/{one}/unlock", headers=keyed).json()["balance"] == 2
    assert site.post(user, f"/billing/api/workshops/{one}/unlock", headers=keyed).json()["replayed"] is True
    again = site.post(user, f"/billing/api/workshops/{other}/unlock", headers=keyed)
    body = problem(again, 422, "idempotency-key-reused")
    assert body["detail"].startswith(
        "The key from-the-phone was used before, for another request. Nothing was changed."
    )
    assert "web:" not in again.text
    assert "workshop_id" not in again.text
    assert site.balance(user) == 2


def test_a_key_of_the_hosts_is_not_named(site: Site) -> None:
    user = site.world.user(credits=3)

    @site.app.get("/spend/{credits}")
    def spend(credits: int) -> None:
        with site.world.engine.begin() as conn:
            site.world.ledger.consume(conn, user, credits=credits, key="nightly-report")

    site.get(user, "/spend/1")
    for headers in ({}, HTML):
        refused = site.get(user, "/spend/2", headers=headers)
        assert refused.status_code == 422
        assert "It was used before, for another request. Nothing was changed." in refused.text
        assert "nightly" not in refused.text


def test_a_client_cannot_occupy_a_key_of_the_hosts(site: Site) -> None:
    user = site.world.user(credits=3)
    workshop = site.world.workshop(user)
    site.post(user, f"/billing/api/workshops/{workshop}/unlock", headers={"idempotency-key": "nightly-report"})
    with site.world.engine.begin() as conn:
        assert site.world.ledger.consume(conn, user, credits=2, key="nightly-report").replayed is False


def test_many_at_once_spend_one_credit(site: Site) -> None:
    user = site.world.user(credits=5)
    workshop = site.world.workshop(user)
    answers: list[bool] = []

    def press() -> None:
        answers.append(site.post(user, f"/billing/api/workshops/{workshop}/unlock").json()["replayed"])

    threads = [threading.Thread(target=press) for _ in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(answers) == [False] + [True] * 11
    assert site.balance(user) == 4


def test_history_is_read_page_by_page(site: Site) -> None:
    user = site.world.user(credits=20)
    for number in range(7):
        with site.world.engine.begin() as conn:
            site.world.ledger.consume(conn, user, key=f"k{number}", description=f"Use {number}")
    seen: list[int] = []
    before: str | None = None
    while True:
        page = site.get(user, "/billing/api/history", params={"limit": 3} | ({"before": before} if before else {}))
        seen += [row["sequence"] for row in page.json()["rows"]]
        if (before := page.json()["next"]) is None:
            break
    assert seen == [8, 7, 6, 5, 4, 3, 2, 1]
    row = page.json()["rows"][-1]
    assert not {"idempotency_key", "stripe_session_id", "stripe_payment_intent_id"} & set(row)
    problem(site.get(user, "/billing/api/history", params={"before": "x"}), 422, "invalid-argument")
    problem(site.get(user, "/billing/api/history", params={"limit": 0}), 422, "invalid-argument")


def test_onboarding_is_remembered_in_the_database(site: Site) -> None:
    user = site.world.user()
    assert site.get(user, "/billing/api/onboarding").json() == {"complete": False}
    for complete in (True, True, False):
        answer = site.client.put("/billing/api/onboarding", json={"complete": complete}, headers=site.as_(user))
        assert answer.json() == {"complete": complete}
        with site.world.engine.connect() as conn:
            assert site.world.accounts.get(conn, user).onboarding_complete is complete


def test_grandfathered_and_switched_off(make_site: Callable[..., Site]) -> None:
    long_ago = dt.datetime(2020, 1, 1, tzinfo=dt.UTC)
    site = make_site()
    user = site.world.user()
    old, new = site.world.workshop(user, created_at=long_ago), site.world.workshop(user)
    assert site.get(user, f"/paid/{old}").json() == "grandfathered"
    assert site.get(user, f"/paid/{new}").status_code == 402
    free = make_site(settings={"paywall": False})
    user = free.world.user()
    assert free.get(user, f"/paid/{free.world.workshop(user)}").json() == "paywall_off"


def deleted_user(site: Site) -> Key:
    user = site.world.user(credits=1)
    with site.world.engine.begin() as conn:
        site.world.accounts.delete_user(conn, user)
    return user


def test_who_may_not(site: Site) -> None:
    workshop = site.world.workshop(owner := site.world.user(credits=1))
    gone = site.world.workshop(owner)
    with site.world.engine.begin() as conn:
        site.world.accounts.delete_workshop(conn, gone)
    unlock = "/billing/api/workshops/{}/unlock".format
    problem(site.post(owner, unlock(gone)), 410, "workshop-deleted")
    problem(site.post(deleted_user(site), unlock(workshop)), 403, "user-deleted")
    for nonsense in ("0", "%00", "..", "x" * 150, "é", "1" * 60):
        assert site.post(owner, unlock(nonsense)).status_code == 404
    assert site.balance(owner) == 1


def test_openapi_documents_every_json_route_with_examples(site: Site) -> None:
    document = site.app.openapi()
    ours = {path: methods for path, methods in document["paths"].items() if path.startswith("/billing")}
    assert all(path.startswith("/billing/api/") for path in ours)
    for path, methods in ours.items():
        for method, operation in methods.items():
            assert operation["summary"], path
            assert operation["description"], path
            if path != "/billing/api/packs":
                assert {"401", "422", "503"} <= set(operation["responses"]), (path, method)
                assert PROBLEM in operation["responses"]["422"]["content"]
    schemas = document["components"]["schemas"]
    for name in ("BalanceAnswer", "HistoryAnswer", "AccessAnswer", "UnlockAnswer", "CheckoutAnswer", "Problem"):
        assert schemas[name]["examples"]


def test_a_fault_of_ours_has_a_reference_and_no_details(
    make_site: Callable[..., Site], caplog: pytest.LogCaptureFixture
) -> None:
    site = make_site()
    user = site.world.user(credits=1)
    with site.world.engine.begin() as conn:
        conn.exec_driver_sql("ALTER TABLE users RENAME COLUMN credit_balance TO elsewhere")
    body = problem(site.get(user, "/billing/api/balance"), 500, "server-error")
    assert "elsewhere" not in str(body)
    assert "credit_balance" not in str(body)
    assert f"reference {body['reference']}: NotMigrated" in caplog.text
    page = site.get(user, "/billing/history", headers=HTML)
    assert page.status_code == 500
    assert "Reference: " in page.text


def test_a_database_that_is_away_is_503(make_site: Callable[..., Site]) -> None:
    site = make_site()
    user = site.world.user()
    with site.world.engine.connect() as conn:
        name = conn.exec_driver_sql("SELECT current_database()").scalar_one()
    with site.world.autocommit.connect() as conn:
        conn.exec_driver_sql(f'ALTER DATABASE "{name}" CONNECTION LIMIT 0')
        conn.exec_driver_sql("CREATE ROLE visitor LOGIN")
    try:
        url = site.world.engine.url.set(username="visitor")
        away = Site(site.world, sa.create_engine(url, poolclass=sa.NullPool))
        answer = away.get(user, "/billing/api/balance")
        problem(answer, 503, "unavailable")
        assert answer.headers["retry-after"] == "5"
    finally:
        with site.world.autocommit.connect() as conn:
            conn.exec_driver_sql(f'ALTER DATABASE "{name}" CONNECTION LIMIT -1')
            conn.exec_driver_sql("DROP ROLE visitor")


def test_what_is_held_and_what_expires(either_site: Site) -> None:
    site, world = either_site, either_site.world
    user, workshop = world.user(credits=2), None
    soon = dt.datetime.now(dt.UTC) + dt.timedelta(days=30)
    with world.engine.begin() as conn:
        spring = world.ledger.grant(conn, user, credits=3, key="g", description="Spring promotion", expires_at=soon)
        held = world.ledger.hold(conn, user, credits=4, key="h")
    answer = site.get(user, "/billing/api/balance").json()
    assert (answer["balance"], answer["held"], answer["available"]) == (5, 4, 1)
    (lot,) = answer["expiring"]
    assert (lot["id"], lot["credits"], lot["description"]) == (str(spring.id), 3, "Spring promotion")
    assert dt.datetime.fromisoformat(lot["expires_at"]) == soon
    workshop = world.workshop(user)
    access = site.get(user, f"/billing/api/workshops/{workshop}/access").json()
    assert (access["balance"], access["available"]) == (5, 1)
    body = problem(site.get(user, "/report"), 402, "insufficient-credits")
    assert (body["balance"], body["held"], body["available"], body["required"]) == (5, 4, 1, 2)
    assert body["detail"] == "You have 1 credit. This takes 2."
    body = problem(site.get(user, f"/paid/{workshop}"), 402, "workshop-locked")
    assert (body["balance"], body["held"], body["available"]) == (5, 4, 1)
    rows = site.get(user, "/billing/api/history").json()["rows"]
    assert (rows[0]["id"], rows[0]["status"]) == (str(held.id), "pending")
    assert all(row["expires_at"] for row in rows[:2])

    world.pass_time(days=31)
    answer = site.get(user, "/billing/api/balance").json()
    assert (answer["balance"], answer["held"], answer["available"], answer["expiring"]) == (2, 0, 2, [])


LONG_AGO = dt.datetime(2020, 1, 1, tzinfo=dt.UTC)


@pytest.mark.parametrize(
    ("settings", "made", "reason"),
    [
        ({"paywall": False}, {}, "paywall_off"),
        ({}, {"created_at": LONG_AGO}, "grandfathered"),
        ({"grandfathered_before": dt.datetime(2060, 1, 1, tzinfo=dt.UTC)}, {}, "grandfathered"),
    ],
)
@pytest.mark.parametrize("asynchronous", [False, True])
def test_nothing_is_charged_for_a_workshop_that_is_open_already(
    make_site: Callable[..., Site], settings: dict[str, Any], made: dict[str, Any], reason: str, asynchronous: bool
) -> None:
    site = make_site(settings=settings, asynchronous=asynchronous)
    rich, poor = site.world.user(credits=2), site.world.user()
    for user, other, balance in ((rich, poor, 2), (poor, rich, 0)):
        workshop = site.world.workshop(user, **made)
        page, about = f"/billing/workshops/{workshop}/unlock", f"/billing/api/workshops/{workshop}"
        assert site.get(user, f"{about}/access").json()["reason"] == reason
        for headers in ({}, {"idempotency-key": "from-the-phone"}):
            answer = site.post(user, f"{about}/unlock", headers=headers)
            assert answer.json() == {"transaction": None, "balance": balance, "replayed": True}
        sent = site.post(user, page, headers=HTML)
        assert (sent.status_code, "spent=0" in sent.headers["location"]) == (303, True)
        for shown in (site.get(user, sent.headers["location"], headers=HTML), site.post(user, page, headers=HTMX)):
            assert "unlocked already. Nothing was charged" in shown.text
        assert site.balance(user) == balance
        problem(site.post(other, f"{about}/unlock"), 404, "unknown-workshop")
    assert len(site.get(rich, "/billing/api/history").json()["rows"]) == 1


def test_unlocking_is_one_statement(make_site: Callable[..., Site]) -> None:
    site = make_site()
    user = site.world.user(credits=2)
    workshop = site.world.workshop(user)
    asked: list[str] = []
    sa.event.listen(site.world.engine, "before_cursor_execute", lambda *event_args: asked.append(event_args[2]))
    assert site.post(user, f"/billing/api/workshops/{workshop}/unlock").json()["balance"] == 1
    assert len(asked) == 1, asked
