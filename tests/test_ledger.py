"""The ledger's contract, on every shape of host app."""

from __future__ import annotations

import datetime as dt
import uuid
from collections.abc import Callable
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import Session, registry

from tallystick import AccessReason, CreditTransaction, InsufficientCredits, Ledger
from tallystick import errors as e
from tallystick.audit import audit
from tallystick.errors import Key
from tallystick.ledger import Consume
from tallystick.schema import INT32_MAX, CreditTransactionStatus, CreditTransactionType
from worlds import World


def test_buying_spending_and_giving_back(any_world: World):
    ledger, user = any_world.ledger, any_world.user()
    with any_world.engine.begin() as conn:
        started = ledger.start_purchase(
            conn, user, credits=3, description="Purchased Serial Entrepreneur pack", stripe_price_id="price_1"
        )
        assert (started.status, started.balance_after, started.sequence) == ("pending", None, None)
        assert ledger.balance(conn, user) == 0
        assert ledger.attach_session(conn, user, started.id, stripe_session_id="cs_1").stripe_session_id == "cs_1"
        bought = ledger.complete_purchase(
            conn, user, stripe_session_id="cs_1", amount_paid=14900, currency="USD", stripe_payment_intent_id="pi_1"
        )
        assert bought.id == started.id
        assert (bought.status, bought.amount, bought.balance_after, bought.sequence) == ("completed", 3, 3, 1)
        assert (bought.amount_paid, bought.currency, bought.stripe_payment_intent_id) == (14900, "usd", "pi_1")
        spent = ledger.consume(conn, user, credits=2, key="spend", description="Two at once")
        assert (spent.type, spent.amount, spent.balance_after, spent.sequence) == ("consumption", -2, 1, 2)
        back = ledger.refund(conn, user, bought.id, credits=2, key="re_1")
        assert (back.type, back.amount, back.balance_after, back.refund_of) == ("refund", -2, -1, bought.id)
        rest = ledger.refund(conn, user, bought.id, key="re_2")
        assert (rest.amount, rest.balance_after, rest.sequence) == (-1, -2, 4)
        assert ledger.balance(conn, user) == -2
        assert [row.sequence for row in ledger.history(conn, user)] == [4, 3, 2, 1]


def test_a_credit_unlocks_a_workshop_once(world: World):
    ledger, user = world.ledger, world.user(credits=2)
    workshop = world.workshop(user, title="Mobile App Discovery")
    with world.engine.begin() as conn:
        first = ledger.consume(conn, user, workshop=workshop, key="unlock-1")
        assert first.description == "Credit consumed for Workshop: Mobile App Discovery"
        assert first.workshop_id == workshop
        marked = conn.execute(sa.select(world.schema.workshops.c.credit_consumed_at)).scalar_one()
        assert marked == first.completed_at
        for key in ("unlock-1", "another tab"):
            again = ledger.consume(conn, user, workshop=workshop, key=key)
            assert again.replayed
            assert (again.id, again.sequence) == (first.id, first.sequence)
        assert ledger.balance(conn, user) == 1


def test_workshops_of_every_shape_are_unlocked(any_world: World):
    user = any_world.user(credits=1)
    if any_world.schema.workshops is None:
        with any_world.engine.begin() as conn, pytest.raises(e.InvalidArgument, match="no workshops table"):
            any_world.ledger.consume(conn, user, workshop="w", key="k")
        return
    workshop = any_world.workshop(user, title="Ünlöck \u202ertl\u202c 🎉")
    with any_world.engine.begin() as conn:
        done = any_world.ledger.consume(conn, user, workshop=workshop, key="k")
        assert done.description == "Credit consumed for Workshop: Ünlöck \u202ertl\u202c 🎉"
        assert any_world.ledger.access(conn, workshop).reason is AccessReason.UNLOCKED


def test_a_workshop_made_in_the_same_session_can_be_paid_for_in_it(world: World):
    class Workshop:
        pass

    registry().map_imperatively(
        Workshop,
        world.schema.workshops,
        primary_key=[world.schema.workshops.c.key],
        include_properties=["key", "owner"],
    )
    user = world.user(credits=1)
    with Session(world.engine) as session, session.begin():
        workshop = Workshop()
        workshop.key, workshop.owner = uuid.uuid4(), user
        session.add(workshop)
        done = world.ledger.consume(session, user, workshop=workshop.key, key="k")
        assert done.workshop_id == workshop.key


# --- idempotency ---


def test_the_same_key_and_payload_give_the_first_result(world: World):
    ledger, user = world.ledger, world.user(credits=5)
    with world.engine.begin() as conn:
        purchase = ledger.history(conn, user)[0]
        calls = [
            lambda: ledger.start_purchase(conn, user, credits=1, description="x", key="a"),
            lambda: ledger.consume(conn, user, credits=2, key="b"),
            lambda: ledger.refund(conn, user, purchase.id, credits=1, key="c"),
            lambda: ledger.refund(conn, user, purchase.id, key="d"),
        ]
        for call in calls:
            first, again = call(), call()
            assert not first.replayed
            assert again.replayed
            assert again.id == first.id


@pytest.mark.parametrize(
    ("other", "differs"),
    [
        (lambda led, c, u, w, p: led.consume(c, u, credits=2, key="k"), "amount"),
        (lambda led, c, u, w, p: led.consume(c, u, workshop=w, key="k"), "workshop_id"),
        (lambda led, c, u, w, p: led.refund(c, u, p, key="k"), "type"),
        (lambda led, c, u, w, p: led.start_purchase(c, u, credits=1, description="x", key="k"), "type"),
    ],
)
def test_the_same_key_with_another_payload_is_refused(world: World, other: Any, differs: str):
    user = world.user(credits=5)
    workshop = world.workshop(user)
    with world.engine.begin() as conn:
        purchase = world.ledger.history(conn, user)[0].id
        world.ledger.consume(conn, user, key="k")
        with pytest.raises(e.IdempotencyKeyReused) as caught:
            other(world.ledger, conn, user, workshop, purchase)
        assert differs in caught.value.differs
        assert caught.value.key == "k"
        assert world.ledger.balance(conn, user) == 4


def test_a_key_is_one_users_own(world: World):
    with world.engine.begin() as conn:
        for user in (world.user(credits=1), world.user(credits=1)):
            assert not world.ledger.consume(conn, user, key="the same words").replayed


@pytest.mark.parametrize("state", ["pending", "failed"])
def test_a_number_that_the_buyer_chose_is_granted_and_is_the_rows_from_then_on(world: World, state: str):
    user = world.user()
    with world.engine.begin() as conn:
        bought = world.ledger.start_purchase(conn, user, credits=3, description="A pack")
        if state == "failed":
            world.ledger.fail_purchase(conn, user, purchase=bought.id, reason="expired")
        for wrong in (0, -1, 2**31):
            with pytest.raises(e.InvalidArgument):
                world.ledger.complete_purchase(conn, user, purchase=bought.id, credits=wrong)
        done = world.ledger.complete_purchase(conn, user, purchase=bought.id, credits=9)
        assert (done.amount, done.balance_after) == (9, 9)
        assert world.ledger.complete_purchase(conn, user, purchase=bought.id, credits=9).replayed
        assert world.ledger.complete_purchase(conn, user, purchase=bought.id).amount == 9
        with pytest.raises(e.IdempotencyKeyReused, match="amount"):
            world.ledger.complete_purchase(conn, user, purchase=bought.id, credits=3)
        world.ledger.refund(conn, user, bought.id, key="all of it")
        assert world.ledger.balance(conn, user) == 0
        assert audit(conn, world.config).clean


def test_a_start_is_a_replay_also_after_the_buyer_chose_another_number(any_world: World):
    ledger, user = any_world.ledger, any_world.user()
    with any_world.engine.begin() as conn:

        def start(credits: int) -> CreditTransaction:
            return ledger.start_purchase(conn, user, credits=credits, description="A pack", key="k")

        first = start(3)
        ledger.complete_purchase(conn, user, purchase=first.id, credits=9)
        again = start(3)
        assert (again.id, again.amount, again.status, again.replayed) == (first.id, 9, "completed", True)
        for other in (4, 9):  # also what was paid for: the call is another one
            with pytest.raises(e.IdempotencyKeyReused) as caught:
                start(other)
            assert caught.value.differs == {"started_amount": (3, other)}
    ledger_rows = any_world.schema.credit_transactions
    with pytest.raises(sa.exc.DBAPIError, match="append-only"), any_world.engine.begin() as conn:
        conn.execute(sa.update(ledger_rows).values(started_amount=4))


def test_a_completion_told_with_another_amount_is_refused(world: World):
    user = world.user()
    with world.engine.begin() as conn:
        started = world.ledger.start_purchase(conn, user, credits=1, description="x")
        world.ledger.complete_purchase(conn, user, purchase=started.id, amount_paid=100, currency="usd")
        assert world.ledger.complete_purchase(conn, user, purchase=started.id).replayed
        with pytest.raises(e.IdempotencyKeyReused) as caught:
            world.ledger.complete_purchase(conn, user, purchase=started.id, amount_paid=99, currency="usd")
        assert caught.value.differs == {"amount_paid": (100, 99)}


def test_a_replay_after_the_host_deleted_the_workshop(world: World):
    user = world.user(credits=1)
    workshop = world.workshop(user)
    with world.engine.begin() as conn:
        first = world.ledger.consume(conn, user, workshop=workshop, key="k")
        conn.execute(sa.delete(world.schema.workshops))
        again = world.ledger.consume(conn, user, workshop=workshop, key="k")
        assert again.replayed
        assert (again.id, again.workshop_id) == (first.id, None)


# --- refusals: each is a type with its values, writes nothing, and leaves the transaction usable ---


def refuse(world: World, expected: type[e.TallystickError], call: Any, **fields: object) -> None:
    with world.engine.begin() as conn:
        before = conn.execute(sa.select(world.schema.credit_transactions).order_by("id")).all()
        with pytest.raises(expected) as caught:
            call(world.ledger, conn)
        assert {name: getattr(caught.value, name) for name in fields} == fields
        assert conn.execute(sa.select(world.schema.credit_transactions).order_by("id")).all() == before


def test_what_is_not_there_is_not_spent(any_world: World):
    user = any_world.user(credits=2)
    refuse(
        any_world,
        InsufficientCredits,
        lambda ledger, conn: ledger.consume(conn, user, credits=3, key="k"),
        user=user,
        balance=2,
        required=3,
    )


def test_unknown_and_deleted_users(any_world: World):
    nobody = any_world.key(any_world.config.host.users.key_type)
    deleted = any_world.user(credits=1)
    with any_world.engine.begin() as conn:
        purchase = any_world.ledger.history(conn, deleted)[0]
        any_world.accounts.delete_user(conn, deleted)
    for kind, user in ((e.UnknownUser, nobody), (e.UserDeleted, deleted)):
        refuse(any_world, kind, lambda led, c, u=user: led.consume(c, u, key="k"), user=user)
        refuse(any_world, kind, lambda led, c, u=user: led.start_purchase(c, u, credits=1, description="x"), user=user)
    refuse(any_world, e.UnknownUser, lambda led, c: led.balance(c, nobody), user=nobody)
    refuse(any_world, e.UnknownUser, lambda led, c: led.refund(c, nobody, purchase.id, key="k"), user=nobody)
    with any_world.engine.begin() as conn:  # money keeps moving for a deleted user
        assert any_world.ledger.refund(conn, deleted, purchase.id, key="k").balance_after == 0


def test_money_for_a_deleted_user_is_granted(world: World):
    user = world.user()
    with world.engine.begin() as conn:
        started = world.ledger.start_purchase(conn, user, credits=1, description="x")
        world.accounts.delete_user(conn, user)
        assert world.ledger.complete_purchase(conn, user, purchase=started.id).balance_after == 1


def test_workshops_that_cannot_be_unlocked(world: World):
    user, other = world.user(credits=1), world.user(credits=1)
    theirs, deleted, unpaid = world.workshop(other), world.workshop(user), world.workshop(user)
    with world.engine.begin() as conn:
        world.accounts.delete_workshop(conn, deleted)
        names = world.schema.workshops
        conn.execute(sa.update(names).where(names.c.key == unpaid).values(credit_consumed_at=sa.func.now()))
    for kind, workshop in (
        (e.UnknownWorkshop, uuid.uuid4()),
        (e.WorkshopNotOwned, theirs),
        (e.WorkshopDeleted, deleted),
        (e.WorkshopUnaccounted, unpaid),
    ):
        refuse(world, kind, lambda led, c, w=workshop: led.consume(c, user, workshop=w, key="k"), workshop=workshop)


def test_refunds_are_bounded_by_their_purchase(world: World):
    user, other = world.user(credits=3), world.user(credits=1)
    with world.engine.begin() as conn:
        purchase = world.ledger.history(conn, user)[0].id
        pending = world.ledger.start_purchase(conn, user, credits=1, description="x").id
        spent = world.ledger.consume(conn, user, key="s").id
        world.ledger.refund(conn, user, purchase, credits=2, key="r")
    refuse(world, e.RefundExceedsPurchase, lambda led, c: led.refund(c, user, purchase, credits=2, key="k"), left=1)
    refuse(world, e.PurchaseNotCompleted, lambda led, c: led.refund(c, user, pending, key="k"), status="pending")
    for unknown, owner in ((uuid.uuid4(), user), (spent, user), (purchase, other)):
        refuse(world, e.UnknownPurchase, lambda led, c, p=unknown, u=owner: led.refund(c, u, p, key="k"))
    with world.engine.begin() as conn:
        world.ledger.refund(conn, user, purchase, key="all")
    refuse(world, e.RefundExceedsPurchase, lambda led, c: led.refund(c, user, purchase, key="k"), left=0)


def test_a_session_pays_for_one_purchase(world: World):
    user = world.user()
    with world.engine.begin() as conn:
        one, two = (world.ledger.start_purchase(conn, user, credits=1, description="x").id for _ in range(2))
        world.ledger.attach_session(conn, user, one, stripe_session_id="cs_1")
        assert world.ledger.attach_session(conn, user, one, stripe_session_id="cs_1").replayed
    for call in (
        lambda led, c: led.attach_session(c, user, two, stripe_session_id="cs_1"),
        lambda led, c: led.attach_session(c, user, one, stripe_session_id="cs_2"),
        lambda led, c: led.complete_purchase(c, user, purchase=two, stripe_session_id="cs_1"),
        lambda led, c: led.complete_purchase(c, user, purchase=one, stripe_session_id="cs_2"),
    ):
        refuse(world, e.SessionConflict, call)
    with world.engine.begin() as conn:  # completed by id, before its session was stored
        done = world.ledger.complete_purchase(conn, user, purchase=two, stripe_session_id="cs_2")
        assert (done.stripe_session_id, done.balance_after) == ("cs_2", 1)


def test_a_balance_stays_in_its_range(world: World):
    user = world.user(credits=INT32_MAX)
    with world.engine.begin() as conn:
        started = world.ledger.start_purchase(conn, user, credits=1, description="one too many").id
    refuse(
        world, e.BalanceOutOfRange, lambda led, c: led.complete_purchase(c, user, purchase=started), balance=INT32_MAX
    )
    with world.engine.begin() as conn:
        world.ledger.consume(conn, user, credits=INT32_MAX, key="all of it")
        purchase = world.ledger.history(conn, user, before="2")[0]
        assert world.ledger.refund(conn, user, purchase.id, key="r").balance_after == -INT32_MAX
        world.ledger.complete_purchase(conn, user, purchase=started)
        assert world.ledger.balance(conn, user) == -INT32_MAX + 1


@pytest.mark.parametrize("amount", [0, -1, INT32_MAX + 1, 10**30, 1.0, "1", True, None, float("nan")])
def test_amounts_that_are_none(world: World, amount: object):
    user = world.user(credits=1)
    refuse(world, e.InvalidArgument, lambda led, c: led.consume(c, user, credits=amount, key="k"), argument="credits")
    refuse(
        world,
        e.InvalidArgument,
        lambda led, c: led.start_purchase(c, user, credits=amount, description="x"),
        argument="credits",
    )


@pytest.mark.parametrize("key", ["", "a\0b", "\ud800", "x" * 256, 7, None, b"k"])
def test_keys_that_are_none(world: World, key: object):
    user = world.user(credits=1)
    refuse(world, ValueError, lambda led, c: led.consume(c, user, key=key), argument="key")


def test_no_caller_uses_a_key_of_the_ledgers_own(world: World):
    user, other = world.user(credits=1), world.user()
    with world.engine.connect() as conn:
        bought = world.ledger.history(conn, user)[0].id
    calls: list[Callable[[Ledger, Any], object]] = [
        lambda led, c: led.consume(c, user, key="tallystick:expiry:1"),
        lambda led, c: led.hold(c, user, credits=1, key="tallystick:expiry:1"),
        lambda led, c: led.start_purchase(c, user, credits=1, description="d", key="tallystick:allowance:pro"),
        lambda led, c: led.grant(c, user, credits=1, description="d", key="tallystick:opening"),
        lambda led, c: led.refund(c, user, bought, key="tallystick:x"),
        lambda led, c: led.merge(c, user, into=other, key="tallystick:merge:1"),
    ]
    for call in calls:
        refuse(world, e.InvalidArgument, call, argument="key")
    with world.engine.begin() as conn:
        [answer] = world.ledger.consume_many(conn, [Consume(user, key="tallystick:x")])
    assert isinstance(answer, e.InvalidArgument)


@pytest.mark.parametrize(
    ("shape", "user"),
    [
        ("uuid", "not a uuid"),
        ("uuid", 1),
        ("clerk", uuid.uuid4()),
        ("clerk", "nul\0"),
        ("alone", "1"),
        ("alone", 2**31),
        ("alone", True),
        ("quoted", 2**63),
        ("quoted", 1.0),
    ],
)
def test_keys_of_another_type(make_world: Any, shape: str, user: object):
    world = make_world(shape)
    refuse(world, e.InvalidArgument, lambda led, c: led.balance(c, user), argument="user", value=user)


def test_a_ledger_that_contradicts_itself_is_not_written_to(world: World):
    user = world.user(credits=3)
    with world.engine.begin() as conn:
        conn.execute(sa.update(world.schema.users).values(credit_sequence=0))
    refuse(world, e.LedgerInconsistent, lambda led, c: led.consume(c, user, key="k"), user=user)


def test_a_database_that_is_not_migrated_says_so(fresh_database: Any, world: World):
    engine = sa.create_engine(fresh_database(), poolclass=sa.NullPool)
    with engine.connect() as conn, pytest.raises(e.NotMigrated, match="tallystick migrate apply"):
        world.ledger.balance(conn, uuid.uuid4())


# --- reading ---


def test_history_pages_by_cursor_and_shows_what_is_pending_first(world: World):
    user = world.user(credits=10)
    with world.engine.begin() as conn:
        for n in range(5):
            world.ledger.consume(conn, user, key=f"c{n}")
        pending = [world.ledger.start_purchase(conn, user, credits=1, description="x").id for _ in range(3)]
        failed = world.ledger.start_purchase(conn, user, credits=1, description="x").id
        world.ledger.fail_purchase(conn, user, purchase=failed, reason="expired")
        whole = world.ledger.history(conn, user)
        assert [row.id for row in whole[:3]] == pending[::-1]
        assert [row.sequence for row in whole[3:]] == [6, 5, 4, 3, 2, 1]
        assert world.ledger.history(conn, user, include_failed=True)[0].id == failed
        for size in (1, 2, 4, 9):
            paged, before = [], None
            while page := world.ledger.history(conn, user, limit=size, before=before):
                paged += page
                before = page[-1].cursor
            assert paged == whole
        assert world.ledger.history(conn, uuid.uuid4()) == []


@pytest.mark.parametrize("arguments", [{"limit": 0}, {"limit": 1001}, {"before": "x"}, {"before": 3}, {"before": "-1"}])
def test_pages_that_are_none(world: World, arguments: dict[str, Any]):
    refuse(world, e.InvalidArgument, lambda led, c: led.history(c, uuid.uuid4(), **arguments))


TOO_LATE = dt.datetime.max.replace(tzinfo=dt.timezone(-dt.timedelta(hours=1)))  # in UTC it is the year 10000


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda w, c, u: w.ledger.history(c, u, include_failed="maybe"), "include_failed='maybe': pass True or False"),
        (lambda w, c, u: w.ledger.history(c, u, include_failed=None), "include_failed=None: pass True or False"),
        (
            lambda w, c, u: w.ledger.capture(c, u, uuid.uuid4(), allow_debt="false"),
            "allow_debt='false': pass True or False",
        ),
        (lambda w, c, u: w.accounts.set_stripe_customer(c, u, "cus_1", replace=1), "replace=1: pass True or False"),
        (
            lambda w, c, u: w.ledger.hold(c, u, credits=1, key="h", expires_in=dt.timedelta.max),
            "expires_in=.*: pass a timedelta of at most 360000 days",
        ),
        (
            lambda w, c, u: w.ledger.start_purchase(
                c, u, credits=1, description="x", expires_after=dt.timedelta(days=10**8)
            ),
            "expires_after=.*: pass a timedelta of at most 360000 days",
        ),
        (
            lambda w, c, u: w.ledger.grant(c, u, credits=1, key="g", description="x", expires_at=TOO_LATE),
            "expires_at=.*: pass a datetime that is in the years 1 to 9999 in UTC",
        ),
        (lambda w, c, u: w.ledger.consume_many(c, (i for i in [])), r"items=.*: pass a list of Consume\("),
        (lambda w, c, u: w.ledger.consume_many(c, Consume(u, key="k")), r"items=.*: pass a list of Consume\("),
        (lambda w, c, u: w.ledger.consume_many(c, {"user": u, "key": "k"}), r"items=.*: pass a list of Consume\("),
    ],
)
def test_arguments_of_another_type_leave_the_transaction_as_it_is(
    world: World, call: Callable[[World, sa.Connection, Key], Any], message: str
):
    user = world.user(credits=1)
    with world.engine.begin() as conn:
        with pytest.raises(e.InvalidArgument, match=message):
            call(world, conn, user)
        assert world.ledger.balance(conn, user) == 1


def test_the_balance_at_any_moment(any_world: World):
    user = any_world.user()
    before = dt.datetime.now(dt.UTC)
    moments = []
    for n in range(1, 4):
        with any_world.engine.begin() as conn:
            moments.append(any_world.buy(conn, user, n).completed_at)
    with any_world.engine.begin() as conn:
        balances = [any_world.ledger.balance_at(conn, user, moment) for moment in moments]
        assert balances == [1, 3, 6]
        assert any_world.ledger.balance_at(conn, user, before) == 0
        assert any_world.ledger.balance_at(conn, user, moments[1] - dt.timedelta(microseconds=1)) == 1
        with pytest.raises(e.InvalidArgument, match="time zone"):
            any_world.ledger.balance_at(conn, user, dt.datetime(2026, 1, 1))  # noqa: DTZ001 - the point


def test_access_and_its_reasons(make_world: Any):
    world = make_world()
    user = world.user(credits=1)
    locked, unlocked, deleted = (world.workshop(user) for _ in range(3))
    old = world.workshop(user, created_at=dt.datetime(2020, 1, 1, tzinfo=dt.UTC))
    with world.engine.begin() as conn:
        world.ledger.consume(conn, user, workshop=unlocked, key="k")
        world.accounts.delete_workshop(conn, deleted)
    expected = {
        locked: (False, AccessReason.LOCKED),
        unlocked: (True, AccessReason.UNLOCKED),
        deleted: (False, AccessReason.DELETED),
        old: (True, AccessReason.GRANDFATHERED),
    }
    free = World(world.url, world.config.host, paywall=False)
    since = World(world.url, world.config.host, grandfathered_before=dt.datetime(2019, 1, 1, tzinfo=dt.UTC))
    with world.engine.begin() as conn:
        for workshop, (is_open, reason) in expected.items():
            access = world.ledger.access(conn, workshop)
            assert (access.open, access.reason) == (is_open, reason)
        assert free.ledger.access(conn, locked).reason is AccessReason.PAYWALL_OFF
        assert since.ledger.access(conn, old).reason is AccessReason.LOCKED
        with pytest.raises(e.UnknownWorkshop):
            world.ledger.access(conn, uuid.uuid4())


def test_rows_are_made_of_the_enums_themselves(world: World):
    user = world.user(credits=1)
    with world.engine.begin() as conn:
        row = world.ledger.history(conn, user)[0]
    assert row.type is CreditTransactionType.PURCHASE
    assert row.status is CreditTransactionStatus.COMPLETED


# --- what the database says, to whom it means something ---


def test_what_a_flush_raises_is_the_hosts_own(world: World) -> None:
    """A constraint of the host's, broken by what it had not sent yet, is nothing to be tried again."""
    user = world.user(credits=1)
    users = world.schema.users

    class User:
        pass

    registry().map_imperatively(User, users, primary_key=[users.c.key], include_properties=["key", "email"])
    with Session(world.engine) as session:
        twice = User()
        twice.key, twice.email = world.key("uuid"), f"{user}@example.com"
        session.add(twice)
        with pytest.raises(sa.exc.IntegrityError, match="users_email_key"):
            world.ledger.consume(session, user, key="a")


def test_what_a_trigger_of_the_hosts_refuses_is_the_hosts_own(world: World) -> None:
    """It runs inside the ledger's function, and finds the host's tables by their bare names all the same."""
    user = world.user(credits=1)
    with world.engine.begin() as conn:
        conn.exec_driver_sql("CREATE TABLE once (n int CONSTRAINT only_once PRIMARY KEY)")
        conn.exec_driver_sql("INSERT INTO once VALUES (1)")
        conn.exec_driver_sql(
            "CREATE FUNCTION note() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN INSERT INTO once VALUES (1);"
            " RETURN NEW; END $$"
        )
        conn.exec_driver_sql("CREATE TRIGGER note AFTER UPDATE ON users EXECUTE FUNCTION note()")
    with world.engine.connect() as conn, pytest.raises(sa.exc.IntegrityError, match="only_once"):
        world.ledger.consume(conn, user, key="a")


def test_a_transaction_that_idled_for_too_long_is_to_be_run_again(world: World) -> None:
    user = world.user(credits=1)
    with world.engine.connect() as conn:
        conn.exec_driver_sql("SET idle_in_transaction_session_timeout = '100ms'")
        world.ledger.balance(conn, user)
        wait_for_the_end_of(conn, world)
        with pytest.raises(e.Conflict) as caught:
            world.ledger.consume(conn, user, key="a")
    assert caught.value.retryable
    with world.engine.connect() as conn:
        assert world.ledger.balance(conn, user) == 1


def wait_for_the_end_of(conn: sa.Connection, world: World) -> None:
    pid = conn.connection.dbapi_connection.info.backend_pid
    with world.autocommit.connect() as other:
        while other.scalar(sa.text("SELECT count(*) FROM pg_stat_activity WHERE pid = :pid"), {"pid": pid}):
            pass


def test_a_server_that_takes_no_writes(world: World) -> None:
    user = world.user(credits=1)
    with world.autocommit.connect() as conn:
        conn.exec_driver_sql("SET default_transaction_read_only = on")
        with pytest.raises(e.DatabaseUnavailable, match="new primary"):
            world.ledger.consume(conn, user, key="a")
        assert world.ledger.balance(conn, user) == 1


def test_a_pool_that_has_no_connection_to_give(world: World) -> None:
    engine = sa.create_engine(world.url, pool_size=1, max_overflow=0, pool_timeout=0.1)
    with engine.connect(), Session(engine) as session, pytest.raises(e.DatabaseUnavailable, match="larger pool"):
        world.ledger.balance(session, world.key("uuid"))
    engine.dispose()


def test_a_clock_that_steps_back_does_not_reorder_the_ledger(world: World) -> None:
    """The order is that of the numbers, and the audit names the row. For one call the clock is an hour behind."""
    user = world.user(credits=5)
    with world.autocommit.connect() as conn:
        definition = conn.scalar(sa.text("SELECT pg_get_functiondef('tallystick.consume'::regproc)"))
        behind = definition.replace("clock_timestamp()", "clock_timestamp() - interval '1 hour'")
        assert behind != definition
        world.ledger.consume(conn, user, key="a")
        conn.exec_driver_sql(behind)
        late = world.ledger.consume(conn, user, key="b")
        conn.exec_driver_sql(definition)
        world.ledger.consume(conn, user, key="c")
        rows = world.ledger.history(conn, user)
        assert [row.idempotency_key for row in rows] == ["c", "b", "a", None]
        assert [row.balance_after for row in rows] == [2, 3, 4, 5]
        assert late.completed_at is not None
        assert late.completed_at < rows[2].completed_at
        findings = audit(conn, world.config).findings
    assert {(one.check, one.fault, one.transaction) for one in findings} == {
        ("completed_in_order", False, late.id),
        ("created_before_completed", False, late.id),
    }
