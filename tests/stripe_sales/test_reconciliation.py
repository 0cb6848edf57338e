"""Reconciliation finds changes that no webhook reported; a second run changes nothing; a dry run never does."""

from __future__ import annotations

import datetime as dt
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar
from uuid import uuid4

import pytest
import sqlalchemy as sa

from stripe_sales.shop import CREDITS, PRICE, Shop
from tallystick import stripe
from tallystick.audit import audit
from tallystick.declared_tables import stripe_reconciliations
from tallystick.errors import InvalidArgument, Key, StripeRefused, StripeUnavailable
from tallystick.stripe import reconciliation

pytestmark = pytest.mark.one_server  # it is about what Stripe answers; test_machine runs on both

SESSIONS = "/v1/checkout/sessions"

T = TypeVar("T")


def reconcile(shop: Shop, **options) -> stripe.Reconciliation:
    return stripe.reconcile(shop.engine, shop.config, **options)


def a_busy_month(shop: Shop) -> dict[Key, int]:
    """Users and the balances that Stripe's money stands for; not one event was delivered."""
    users = [shop.world.user() for _ in range(8)]
    paid, refunded, disputed, won, expired, late, never, free = (shop.checkout(user) for user in users)
    for bought in (paid, refunded, disputed, won):
        shop.dev.pay(bought.session)
    shop.dev.refund(shop.intent(refunded), amount=500)
    shop.dev.move_dispute(shop.dev.dispute(shop.intent(disputed))["id"], "lost")
    shop.dev.move_dispute(shop.dev.dispute(shop.intent(won))["id"], "won")
    shop.api.checkout.sessions.expire(expired.session)
    for bought, succeeded in ((late, True), (never, False)):
        shop.dev.pay(bought.session, card="async")
        shop.dev.settle(bought.session, succeeded=succeeded)
    shop.dev.pay(free.session, discount=PRICE)
    shop.dev.drop(shop.events())
    return dict(zip(users, (97, 49, 0, 97, 0, 97, 0, 97), strict=True))


@pytest.mark.parametrize("days_later", [0, 4, 100])
def test_everything_is_found_however_late(shop: Shop, days_later):
    expected = a_busy_month(shop)
    shop.dev.advance(days_later * 86_400)  # after thirty days Stripe has no events any more
    progress: list[stripe.ReconciliationProgress] = []
    report = reconcile(shop, progress=progress.append)
    assert {user: shop.balance(user) for user in expected} == expected
    assert report.looked_at["pending"] == 8
    assert {one.step for one in progress} == {
        "pending",
        "top_ups",
        "sessions",
        "refunds",
        "disputes",
        "open",
        "events",
        "failed",
    }
    assert "amount_differs" in {finding.kind for finding in report.findings}
    again = reconcile(shop)
    assert (again.changed, again.since is not None) == (False, True)
    with shop.engine.begin() as conn:
        assert audit(conn, shop.config).clean


def test_a_dry_run_tells_and_does_nothing(shop: Shop):
    expected = a_busy_month(shop)
    before = shop.written()
    report = reconcile(shop, dry_run=True)
    assert shop.written() == before
    assert {shop.balance(user) for user in expected} == {0}
    assert sorted({str(outcome) for _, outcome in report.changes}) == ["failed", "granted", "pending", "taken_back"]
    assert "amount_differs" in {finding.kind for finding in report.findings}
    with shop.engine.begin() as conn:
        assert conn.scalar(sa.select(sa.func.count()).select_from(stripe_reconciliations)) == 0
    assert reconcile(shop).changed


def test_since_leaves_out_what_is_older_but_for_what_is_pending_here(shop: Shop):
    user = shop.world.user()
    bought = shop.checkout(user)
    shop.dev.pay(bought.session)
    shop.deliver_all()
    shop.dev.refund(shop.intent(bought))
    waiting = shop.checkout(user)
    shop.dev.pay(waiting.session)
    shop.dev.drop(shop.events())
    report = reconcile(shop, since=dt.datetime.now(dt.UTC) + dt.timedelta(days=1))
    assert shop.purchase(waiting).status == "completed"
    assert (report.looked_at.get("refunds", 0), shop.balance(user)) == (0, 2 * CREDITS)
    with pytest.raises(InvalidArgument):
        reconcile(shop, since=dt.datetime(2026, 1, 1))  # noqa: DTZ001 - the point


def test_an_interrupted_run_goes_on_where_it_stood(shop: Shop, monkeypatch):
    monkeypatch.setattr(reconciliation, "PAGE", 2)
    user = shop.world.user()
    for _ in range(6):
        shop.dev.pay(shop.checkout(user).session)
    shop.dev.drop(shop.events())
    retrieved = 0

    def stop(progress: stripe.ReconciliationProgress) -> None:
        nonlocal retrieved
        retrieved = progress.done
        if progress.done == 4:
            shop.dev.fault("GET", f"{SESSIONS}/*", 500, times=3)

    with pytest.raises(StripeUnavailable):
        reconcile(shop, progress=stop)
    assert (retrieved, shop.balance(user)) == (4, 4 * CREDITS)
    report = reconcile(shop)
    assert (report.resumed, report.looked_at["pending"]) == (True, 2)
    assert shop.balance(user) == 6 * CREDITS
    assert not reconcile(shop).resumed


def test_a_purchase_that_never_reached_stripe_fails_only_when_it_is_old(shop: Shop, monkeypatch):
    user = shop.world.user()
    shop.dev.fault("POST", SESSIONS, 500, times=3)
    with pytest.raises(StripeUnavailable):
        shop.checkout(user, key="form 1")
    assert not reconcile(shop).changed
    monkeypatch.setattr(reconciliation, "SESSIONLESS_MAX", dt.timedelta(0))
    assert [str(outcome) for _, outcome in reconcile(shop).changes] == ["failed"]
    with shop.engine.begin() as conn:
        [row] = shop.world.ledger.history(conn, user, include_failed=True)
    assert row.description.endswith("(failed: Stripe has no session for it)")


def while_the_key_changes(shop: Shop, user: Key, work: Callable[[], T]) -> tuple[Key, T]:
    """Do it until it waits for the user, whose key has changed then; give the new key too."""
    users, new = shop.world.schema.users, uuid4()
    waiting = "SELECT count(*) FROM pg_locks WHERE NOT granted AND pg_backend_pid() = ANY (pg_blocking_pids(pid))"
    with ThreadPoolExecutor(1) as pool, shop.world.engine.begin() as conn:
        conn.execute(sa.update(users).where(users.c.key == user).values(key=new))
        waits = pool.submit(work)
        while not conn.scalar(sa.text(waiting)):
            assert not waits.done()
            time.sleep(0.01)
        conn.commit()
        return new, waits.result(60)


def test_a_key_that_changes_meanwhile_is_in_nobodys_way(shop: Shop):
    user = shop.world.user()
    started = shop.checkout(user)
    shop.dev.pay(started.session)
    [completed] = shop.events("checkout.session.completed")
    user, [received] = while_the_key_changes(shop, user, lambda: shop.deliver(completed))
    assert str(received.outcome) == "granted"
    shop.dev.refund(shop.intent(started), amount=500)
    [refunded] = shop.events("refund.created")
    user, [received] = while_the_key_changes(shop, user, lambda: shop.deliver(refunded))
    assert str(received.outcome) == "taken_back"
    assert (shop.balance(user), shop.findings()) == (CREDITS - 48, [])


def test_a_key_that_changes_while_a_purchase_is_given_up(shop: Shop, monkeypatch: pytest.MonkeyPatch):
    user = shop.world.user()
    shop.dev.fault("POST", SESSIONS, 500, times=3)
    with pytest.raises(StripeUnavailable):
        shop.checkout(user, key="form 1")
    monkeypatch.setattr(reconciliation, "SESSIONLESS_MAX", dt.timedelta(0))
    user, report = while_the_key_changes(shop, user, lambda: reconcile(shop))
    assert ([str(outcome) for _, outcome in report.changes], report.findings) == (["failed"], ())


def test_a_session_that_stripe_does_not_have_is_reported_not_failed(shop: Shop):
    user = shop.world.user()
    started = shop.checkout(user)
    del shop.dev.account.objects["checkout.session"][started.session]  # as with the key of another account
    report = reconcile(shop)
    assert [finding.kind for finding in report.findings] == ["session_missing"]
    assert shop.purchase(started).status == "pending"


def test_a_refusal_about_a_purchase_does_not_end_the_run(shop: Shop):
    users = [shop.world.user() for _ in range(3)]
    bought = [shop.checkout(user) for user in users]
    for one in bought:
        shop.dev.pay(one.session)
    shop.dev.fault("GET", f"{SESSIONS}/{bought[1].session}", 400)
    report = reconcile(shop)
    assert [shop.balance(user) for user in users] == [CREDITS] * 3  # the walk over Stripe's sessions has the second
    assert [(str(one.kind), one.object_id) for one in report.findings] == [("refused", str(bought[1].purchase.id))]
    assert report.outcomes["refused"] == 1


@pytest.mark.parametrize("code", ["raise_exception", "lock_not_available"])
def test_a_trigger_of_the_host_that_refuses_one_user_stops_nothing_for_the_others(shop: Shop, code: str):
    """Nor does a user whom others have always locked: that is the second code, with a lock_timeout of the role."""
    users = sorted((shop.world.user() for _ in range(3)), key=str)
    bought = [shop.checkout(user) for user in users]
    for one in bought:
        shop.dev.pay(one.session)
    refused = users[1]
    with shop.engine.begin() as conn:
        conn.exec_driver_sql(
            "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS "
            f"$$BEGIN IF OLD.id = '{refused}' THEN RAISE {code} USING MESSAGE = 'not this one'; END IF;"
            " RETURN NEW; END$$"
        )
        conn.exec_driver_sql("CREATE TRIGGER refuse BEFORE UPDATE ON users FOR EACH ROW EXECUTE FUNCTION refuse()")

    received = shop.deliver(*shop.events("checkout.session.completed"))
    assert sorted(one.status for one in received) == [200, 200, 503]
    [failed] = stripe.failed_deliveries(shop.engine, shop.config)
    assert "not this one" in failed.reason
    assert "UPDATE" not in failed.reason.splitlines()[0]  # the message, and not the statement
    assert stripe.redeliver(shop.engine, shop.config) == [(failed.event_id, "refused")]
    report = reconcile(shop)
    assert [shop.balance(user) for user in users] == [CREDITS, 0, CREDITS]
    assert {(str(one.kind), "not this one" in (one.found or "")) for one in report.findings} == {("refused", True)}

    with shop.engine.begin() as conn:
        conn.exec_driver_sql("DROP TRIGGER refuse ON users")
    assert stripe.redeliver(shop.engine, shop.config) == [(failed.event_id, "granted")]
    assert shop.balance(refused) == CREDITS


def test_a_refusal_about_a_dispute_does_not_end_the_run(shop: Shop):
    users = [shop.world.user() for _ in range(2)]
    bought = [shop.checkout(user) for user in users]
    for one in bought:
        shop.dev.pay(one.session)
    disputes = [shop.dev.dispute(shop.intent(one))["id"] for one in bought]
    shop.deliver_all()
    for dispute in disputes:
        shop.dev.move_dispute(dispute, "won")
    shop.dev.drop(shop.events())
    first, second = sorted(disputes)
    shop.dev.fault("GET", f"/v1/disputes/{first}", 400)
    report = reconcile(shop, since=dt.datetime.now(dt.UTC) + dt.timedelta(days=1))
    assert [(str(one.kind), one.object_id) for one in report.findings] == [("refused", first)]
    assert sorted(shop.balance(user) for user in users) == [0, CREDITS]
    assert [id for id, _ in report.changes] == [second]


def test_a_purchase_whose_customer_stripe_does_not_know_is_found_or_failed(shop: Shop, monkeypatch):
    users = [shop.world.user() for _ in range(2)]
    shop.dev.fault("POST", SESSIONS, "cut", when="after")
    shop.dev.fault("POST", SESSIONS, "cut", times=2)
    shop.dev.fault("POST", SESSIONS, 500, times=3)
    for user in users:
        with pytest.raises(StripeUnavailable):
            shop.checkout(user, key="form 1")
    [session] = shop.api.checkout.sessions.list().data
    for customer in shop.api.customers.list().data:
        shop.api.customers.delete(customer.id)
    shop.dev.pay(session.id)
    shop.dev.drop(shop.events())
    monkeypatch.setattr(reconciliation, "SESSIONLESS_MAX", dt.timedelta(0))
    report = reconcile(shop)
    assert [str(outcome) for _, outcome in report.changes] == ["granted", "failed"]
    assert ([shop.balance(user) for user in users], report.findings) == ([CREDITS, 0], ())


def test_a_shop_that_sold_before_gets_a_count_and_no_list(shop: Shop):
    for _ in range(12):
        shop.foreign()
    shop.dev.drop(shop.events())
    report = reconcile(shop)
    assert (report.findings, report.outcomes["foreign"]) == ((), 12)


def test_many_findings_are_dismissed_at_once(shop: Shop):
    mark = "tallystick_purchase"
    unknown = [shop.foreign(metadata={mark: f"0195bd5e-0000-7000-8000-00000000000{n}"}) for n in range(4)]
    user = shop.world.user()
    bought = shop.checkout(user)
    shop.dev.pay(bought.session, discount=250)
    assert len(reconcile(shop).findings) == 5
    assert stripe.dismiss(shop.engine, shop.config, unknown[:2]) == 2
    assert len(reconcile(shop).findings) == 3
    assert stripe.dismiss(shop.engine, shop.config, unknown[2], kind=stripe.FindingKind.AMOUNT_DIFFERS) == 0
    assert stripe.dismiss(shop.engine, shop.config, kind=stripe.FindingKind.UNKNOWN_SESSION) == 2
    assert [one.kind for one in reconcile(shop).findings] == ["amount_differs"]
    assert stripe.dismiss(shop.engine, shop.config) == 1
    assert reconcile(shop).findings == ()


@pytest.mark.parametrize("status", [401, 403])
def test_a_refused_key_ends_the_run(shop: Shop, status: int):
    bought = shop.checkout(shop.world.user())
    shop.dev.fault("GET", f"{SESSIONS}/{bought.session}", status)
    with pytest.raises(StripeRefused):
        reconcile(shop)
    assert shop.findings() == []


def test_a_run_goes_on_though_the_object_where_it_stood_is_gone(shop: Shop, monkeypatch):
    monkeypatch.setattr(reconciliation, "PAGE", 1)
    users = [shop.world.user() for _ in range(3)]
    for user in users:
        bought = shop.checkout(user)
        shop.dev.pay(bought.session)
        shop.dev.refund(shop.intent(bought))
    shop.deliver(*shop.events("checkout.session.completed"))
    shop.dev.drop(shop.events())

    def stop(progress: stripe.ReconciliationProgress) -> None:
        if (progress.step, progress.done) == ("refunds", 1):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        reconcile(shop, progress=stop)
    newest = shop.api.refunds.list({"limit": 1}).data[0].id
    del shop.dev.account.objects["refund"][newest]
    report = reconcile(shop)
    assert (report.resumed, [shop.balance(user) for user in users]) == (True, [0, 0, 0])


def test_purchases_that_the_host_sells_itself_are_left_alone(shop: Shop):
    user = shop.world.user()
    with shop.engine.begin() as conn:
        shop.world.ledger.start_purchase(conn, user, credits=1, description="Sold by the host")
    assert not reconcile(shop).changed


def test_an_open_dispute_is_asked_about_however_old_it_is(shop: Shop):
    user = shop.world.user()
    bought = shop.checkout(user)
    shop.dev.pay(bought.session)
    dispute = shop.dev.dispute(shop.intent(bought))
    shop.deliver_all()
    assert shop.balance(user) == 0
    shop.dev.move_dispute(dispute["id"], "won")
    shop.dev.advance(60 * 86_400)
    shop.dev.drop(shop.events())
    reconcile(shop, since=dt.datetime.now(dt.UTC) + dt.timedelta(days=59))
    assert shop.balance(user) == CREDITS


def test_a_hold_is_no_purchase_that_waits(shop: Shop):
    user = shop.world.user(credits=2)
    with shop.engine.begin() as conn:
        shop.world.ledger.hold(conn, user, credits=1, key="answer-1")
    shop.dev.advance(4 * 86_400)
    assert reconcile(shop).looked_at.get("pending", 0) == 0
