"""A stand-in for tables distributed by user: each function of the ledger, unchanged, on hash partitions by user."""

from __future__ import annotations

import datetime as dt
import re
from typing import Any

import psycopg
import pytest
import sqlalchemy as sa

from partitioned import partition
from tallystick import Consume, events
from tallystick.audit import audit
from tallystick.errors import InsufficientCredits
from tallystick.ledger.functions import declared
from worlds import World

DAY = dt.timedelta(days=1)
USERS = 8
"""Enough that several partitions have some."""


@pytest.fixture
def partitioned(world: World) -> World:
    partition(world.engine, world.config)
    return world


def call_every_function(world: World, conn: sa.Connection) -> list[Any]:
    """Each function once and more, each doing what it says; gives the users."""
    ledger, accounts = world.ledger, world.accounts
    now = dt.datetime.now(dt.UTC)
    users = [world.key("uuid") for _ in range(USERS)]
    for user in users:
        conn.execute(sa.insert(world.schema.users).values(key=user, email=f"{user}@example.com"))
        shop = world.key("uuid")
        conn.execute(sa.insert(world.schema.workshops).values(key=shop, owner=user, title="Mobile App Discovery"))
        bought = ledger.start_purchase(conn, user, credits=10, description="Purchased 10")
        ledger.attach_session(conn, user, bought.id, stripe_session_id=f"cs_{user}")
        paid = {"amount_paid": 1000, "currency": "usd"}
        assert ledger.complete_purchase(conn, user, stripe_session_id=f"cs_{user}", **paid).id == bought.id
        assert ledger.complete_purchase(conn, user, purchase=bought.id, **paid).replayed
        failed = ledger.start_purchase(conn, user, credits=10, description="Purchased 10")
        assert ledger.fail_purchase(conn, user, purchase=failed.id, reason="expired").status == "failed"
        spent = ledger.consume(conn, user, workshop=shop, key="unlock")
        assert ledger.consume(conn, user, workshop=shop, key="unlock").replayed
        assert ledger.access(conn, shop).open
        ledger.reverse(conn, user, spent.id, key="undo")
        assert not ledger.access(conn, shop).open
        given = ledger.grant(conn, user, credits=4, key="gift", description="Gift", expires_at=now + DAY)
        assert [lot.remaining for lot in ledger.lots(conn, user)] == [4]
        ledger.correct(conn, user, given.id, credits=1, key="less")
        hold = ledger.hold(conn, user, credits=5, key="hold", expires_in=DAY)
        assert ledger.standing(conn, user).available == 8
        assert ledger.capture(conn, user, hold.id, credits=2).balance_after == 11
        ledger.release(conn, user, ledger.hold(conn, user, credits=1, key="other", expires_in=DAY).id)
        ledger.refund(conn, user, bought.id, credits=2, key="back")
        ledger.reinstate(conn, user, bought.id, credits=1, key="again")
        assert ledger.lock(conn, user) == ledger.balance(conn, user) == ledger.balance_at(conn, user, now + DAY) == 10
        assert [row.sequence for row in ledger.history(conn, user)] == [*range(8, 0, -1)]
        ledger.hold(conn, user, credits=1, key="left to expire", expires_in=DAY)
        accounts.complete_onboarding(conn, user)
        accounts.reset_onboarding(conn, user)
        accounts.set_plan_tier(conn, user, "gold")
        accounts.set_stripe_customer(conn, user, f"cus_{user}")
        accounts.set_low_balance(conn, user, 2)
        assert accounts.get(conn, user).plan_tier == "gold"
        accounts.delete_workshop(conn, shop)
        accounts.restore_workshop(conn, shop)
    many = ledger.consume_many(conn, [Consume(user, key="many", credits=3) for user in users])
    assert [row.balance_after for row in many] == [7] * USERS
    with pytest.raises(InsufficientCredits):
        ledger.consume(conn, users[0], credits=8, key="too much")
    return users


def test_every_function_and_the_audit_run_on_partitions_unchanged(
    partitioned: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    events.enable(partitioned.engine, partitioned.config)
    called: set[str] = set()
    with partitioned.engine.begin() as conn:

        def record_calls(_conn: Any, _cursor: Any, statement: str, *_: Any) -> None:
            called.update(re.findall(r"tallystick\.(\w+)\(", statement))

        sa.event.listen(conn, "before_cursor_execute", record_calls)
        users = call_every_function(partitioned, conn)
    partitioned.pass_time(days=2)
    with partitioned.engine.begin() as conn:
        sa.event.listen(conn, "before_cursor_execute", record_calls)
        assert partitioned.ledger.sweep(conn) == USERS
        assert partitioned.ledger.balance(conn, users[0]) == 7
        for user, other in zip(users[0::2], users[1::2], strict=True):
            partitioned.ledger.merge(conn, user, into=other, key="one person")
        partitioned.accounts.delete_user(conn, users[1])
        partitioned.accounts.restore_user(conn, users[1])
        partitioned.accounts.erase(conn, users[3])
    partitioned.wait_for_analyze()
    with partitioned.engine.begin() as conn:
        sa.event.listen(conn, "before_cursor_execute", record_calls)
        assert len(partitioned.ledger.events(conn, limit=1000)) > 10 * USERS
        partitioned.ledger.close_days(conn)
    assert called - {"close_days"} == {function.name for function in declared()}
    with partitioned.engine.connect() as conn:
        assert audit(conn, partitioned.config).findings == ()
        assert conn.scalar(sa.text("SELECT count(DISTINCT tableoid) > 1 FROM credit_transactions"))


def test_what_needs_more_than_one_user_is_refused_or_found(partitioned: World) -> None:
    """The limits of a key that holds the user."""
    one, other = partitioned.user(credits=3), partitioned.user(credits=3)
    # a row that moves to another partition is deleted in the first, which the append-only trigger refuses
    with (
        pytest.raises(sa.exc.IntegrityError, match="append-only: delete is refused"),
        partitioned.engine.begin() as conn,
    ):
        key = one
        for _ in range(64):
            old, key = key, partitioned.key("uuid")
            conn.execute(
                sa.update(partitioned.schema.users).where(partitioned.schema.users.c.key == old).values(key=key)
            )
    # a session of two purchases is no longer refused by a unique index, so that the audit looks for it
    for user in (one, other):
        with psycopg.connect(partitioned.url.replace("+psycopg", "", 1)) as conn:
            conn.execute("SET session_replication_role = replica")
            conn.execute("UPDATE credit_transactions SET stripe_session_id = 'cs_same' WHERE user_id = %s", (user,))
    with partitioned.engine.connect() as conn:
        found = {finding.check for finding in audit(conn, partitioned.config).findings}
    assert "unique_stripe_session" in found
