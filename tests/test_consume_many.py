"""Many consumptions in one statement are as many, one after the other."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from servers import pg_bin
from tallystick import CreditTransaction, migrate
from tallystick.dev.postgres import Server
from tallystick.dev.throwaway import FAST
from tallystick.errors import (
    IdempotencyKeyReused,
    InsufficientCredits,
    InvalidArgument,
    LedgerError,
    LedgerInconsistent,
    UnknownUser,
    UnknownWorkshop,
    WorkshopNotOwned,
)
from tallystick.ledger import Consume
from worlds import SHAPES, World


def outcome_of(result: CreditTransaction | LedgerError) -> tuple[Any, ...]:
    if isinstance(result, InsufficientCredits):
        return (InsufficientCredits, result.balance, result.required)
    if isinstance(result, LedgerError):
        return (type(result),)
    return (result.replayed, result.amount, result.balance_after, result.sequence)


def decided(result: CreditTransaction | LedgerError) -> tuple[Any, ...]:
    """As ``outcome_of``, without the balance that a refusal names: a smaller item may or may not be settled by then."""
    return (type(result),) if isinstance(result, LedgerError) else outcome_of(result)


def test_each_item_is_settled_by_itself(any_world: World) -> None:
    world, ledger = any_world, any_world.ledger
    rich, poor = world.user(credits=5), world.user(credits=1)
    stranger = world.key(world.config.host.users.key_type)
    items = [
        Consume(rich, key="a"),
        Consume(rich, key="a"),  # again
        Consume(rich, key="a", credits=2),  # the key means something else
        Consume(poor, key="a", credits=2),  # too much
        Consume(poor, key="b"),  # less is covered
        Consume(stranger, key="a"),
        Consume(rich, key=""),
        Consume(rich, key="c", credits=4, description="The rest"),
        Consume(rich, key="d"),
    ]
    with world.engine.begin() as conn:
        results = ledger.consume_many(conn, items)
        assert [outcome_of(result) for result in results] == [
            (False, -1, 4, 2),
            (True, -1, 4, 2),
            (IdempotencyKeyReused,),
            (InsufficientCredits, 1, 2),
            (False, -1, 0, 2),
            (UnknownUser,),
            (InvalidArgument,),
            (False, -4, 0, 3),
            (InsufficientCredits, 0, 1),
        ]
        # the rows are those of the ledger, to the last column
        assert results[7] == ledger.history(conn, rich, limit=1)[0]
        assert results[0] == replace(results[1], replayed=False) == ledger.history(conn, rich, limit=2)[1]
        # all of it again is a replay
        again = ledger.consume_many(conn, items)
    assert [outcome_of(result)[0] for result in again] == [
        True, True, IdempotencyKeyReused, InsufficientCredits, True, UnknownUser, InvalidArgument, True,
        InsufficientCredits,
    ]  # fmt: skip


def test_workshops(world: World) -> None:
    user, other = world.user(credits=3), world.user(credits=3)
    mine, also_mine = world.workshop(user), world.workshop(user, title=None)
    theirs = world.workshop(other)
    with world.engine.begin() as conn:
        results = world.ledger.consume_many(
            conn,
            [
                Consume(user, workshop=mine, key="a"),
                Consume(user, workshop=mine, key="b"),  # is open by now
                Consume(user, workshop=theirs, key="c"),
                Consume(user, workshop=also_mine, key="d"),
                Consume(other, workshop=theirs, key="e"),
            ],
        )
        assert [outcome_of(result) for result in results] == [
            (False, -1, 2, 2),
            (True, -1, 2, 2),
            (WorkshopNotOwned,),
            (False, -1, 1, 3),
            (False, -1, 2, 2),
        ]
        assert results[0] == world.ledger.history(conn, user, limit=2)[1]
        assert results[3].description == f"Credit consumed for Workshop: {also_mine}"
        assert all(world.ledger.access(conn, workshop).open for workshop in (mine, also_mine, theirs))


def test_a_faulty_item_behind_a_good_one_is_refused_as_it_is_alone(world: World) -> None:
    user = world.user(credits=5)
    nobodys, *locked = (world.workshop(user) for _ in range(3))
    with world.engine.begin() as conn:
        conn.exec_driver_sql("ALTER TABLE workshops ALTER user_id DROP NOT NULL")
        conn.execute(sa.text("UPDATE workshops SET user_id = NULL WHERE id = :id"), {"id": nobodys})
        faults = (uuid4(), UnknownWorkshop), (nobodys, WorkshopNotOwned)
        for mine, (workshop, refusal) in zip(locked, faults, strict=True):
            good = Consume(user, workshop=mine, key=f"good {mine}")
            faulty = Consume(user, workshop=workshop, key=f"faulty {mine}")
            done, refused = world.ledger.consume_many(conn, [good, faulty])
            assert isinstance(done, CreditTransaction)
            assert isinstance(refused, refusal)
        asked = sa.text(
            "SELECT outcome FROM tallystick.consume_many(ARRAY[:user, :user]::uuid[], ARRAY['with a key', NULL])"
        )
        assert conn.scalars(asked, {"user": str(user)}).all() == ["completed", "invalid_argument"]
        assert world.ledger.balance(conn, user) == 2


def test_what_repeats_itself_takes_no_statement_for_each(world: World) -> None:
    """One key, one workshop with keys of its own, and what is refused: a thousand times, in a handful of statements."""
    rich, poor, busy = world.user(credits=5), world.user(), world.user(credits=5)
    workshop, closed = world.workshop(rich), world.workshop(poor)
    items = [
        item
        for n in range(1000)
        for item in (
            Consume(rich, key="again"),
            Consume(rich, workshop=workshop, key=f"tab {n}"),
            Consume(poor, key="again"),
            Consume(poor, workshop=closed, key=f"tab {n}"),
            Consume(busy, key="again", credits=1 + n % 2),
        )
    ]
    sent: list[str] = []
    with world.engine.begin() as conn:
        sa.event.listen(conn, "before_cursor_execute", lambda *args: sent.append(args[2]))
        results = world.ledger.consume_many(conn, items)
        assert len(sent) <= 4
        assert [world.ledger.balance(conn, user) for user in (rich, poor, busy)] == [3, 0, 4]
    assert {outcome_of(result) for result in results[0::5]} == {(False, -1, 4, 2), (True, -1, 4, 2)}
    assert {outcome_of(result)[:1] for result in results[1::5]} == {(False,), (True,)}
    assert {outcome_of(result) for result in results[2::5] + results[3::5]} == {(InsufficientCredits, 0, 1)}
    assert [outcome_of(result)[0] for result in results[4::5]] == [False, IdempotencyKeyReused] + [
        True,
        IdempotencyKeyReused,
    ] * 499


def test_an_item_of_another_type_is_refused_in_its_place(world: World) -> None:
    user = world.user(credits=3)
    with world.engine.begin() as conn:
        items = [Consume(user, key="a"), {"user": user, "key": "b"}, None, Consume(user, key="c")]
        first, mapping, none, last = world.ledger.consume_many(conn, items)  # type: ignore[arg-type]
        assert [outcome_of(first), outcome_of(last)] == [(False, -1, 2, 2), (False, -1, 1, 3)]
        assert isinstance(mapping, InvalidArgument)
        assert mapping.message.startswith("items[1]={'user': ")
        assert mapping.message.endswith(": pass Consume(user, key=…), with the arguments of consume")
        assert isinstance(none, InvalidArgument)
        assert none.message.startswith("items[2]=None: pass Consume(")
        assert world.ledger.balance(conn, user) == 1


def test_a_null_in_a_list_that_the_server_would_read_as_a_text_is_refused(any_world: World) -> None:
    world, user = any_world, any_world.user(credits=5)
    items = [Consume(user, key="a"), Consume(user, key="b", description="The second")]
    with world.engine.connect() as conn:
        conn.exec_driver_sql("SET array_nulls = off")
        conn.commit()
        with pytest.raises(sa.exc.DBAPIError, match="array_nulls is off, so NULL in a list is read as a text"):
            world.ledger.consume_many(conn, items)
        conn.rollback()
        assert world.ledger.consume_many(conn, items[:1])[0].description == "Credit consumed"  # no NULL is sent
        if world.config.host.workshops:
            opened = Consume(user, key="w", workshop=world.workshop(user))
            with pytest.raises(sa.exc.DBAPIError, match=r'array_nulls is off|invalid input syntax for type .*: "NULL"'):
                world.ledger.consume_many(conn, [opened, items[0]])
            conn.rollback()
        conn.exec_driver_sql("RESET array_nulls")
        assert [row.description for row in world.ledger.consume_many(conn, items)] == ["Credit consumed", "The second"]


def test_nothing_to_do(world: World) -> None:
    with world.engine.begin() as conn:
        assert world.ledger.consume_many(conn, []) == []


ITEMS = st.lists(
    st.tuples(
        st.integers(0, 2),  # whose
        st.none() | st.integers(0, 3),  # which workshop: two of the first user's, one of the second's, one deleted
        st.sampled_from((1, 1, 1, 2, 5)),
        st.sampled_from("abcdefgh"),
    ),
    min_size=1,
    max_size=14,
)


def test_as_one_after_the_other(world: World) -> None:
    """Two sets of the same users get the same items, one in lists and one singly, and cannot be told apart."""
    autocommit = world.autocommit

    def create() -> tuple[list[Any], list[Any]]:
        users = [world.user(credits=credits) for credits in (6, 2)] + [world.user()]
        workshops = [world.workshop(users[n]) for n in (0, 0, 1, 0)]
        with world.engine.begin() as conn:
            world.accounts.delete_workshop(conn, workshops[3])
        return users, workshops

    def items(created: tuple[list[Any], list[Any]], asked: list[Any]) -> list[Consume]:
        users, workshops = created
        return [
            Consume(users[whose], workshop=None if which is None else workshops[which], credits=amount, key=key)
            for whose, which, amount, key in asked
        ]

    @settings(max_examples=60, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(lists=st.lists(ITEMS, min_size=1, max_size=3))
    def indistinguishable(lists: list[Any]) -> None:
        one, other = create(), create()
        with autocommit.connect() as conn:
            for asked in lists:
                many = [decided(result) for result in world.ledger.consume_many(conn, items(one, asked))]
                singly = []
                for item in items(other, asked):
                    try:
                        row = world.ledger.consume(
                            conn, item.user, workshop=item.workshop, credits=item.credits, key=item.key
                        )
                        singly.append(decided(row))
                    except LedgerError as refusal:
                        singly.append(decided(refusal))
                assert many == singly

    indistinguishable()


def test_a_user_whose_ledger_contradicts_itself_does_not_touch_the_others(world: World) -> None:
    torn, fine = world.user(credits=3), world.user(credits=3)
    with world.engine.begin() as conn:
        users = world.schema.users
        conn.execute(sa.update(users).values(credit_sequence=0).where(users.c.key == torn))
    items = [Consume(torn, key="a"), Consume(fine, key="b"), Consume(torn, credits=9, key="c"), Consume(torn, key="d")]
    with world.engine.begin() as conn:
        first, done, short, again = world.ledger.consume_many(conn, items)
        assert world.ledger.balance(conn, torn) == 3
    assert isinstance(done, CreditTransaction)
    assert isinstance(short, InsufficientCredits)
    for refused in (first, again):
        assert isinstance(refused, LedgerInconsistent)
        assert (refused.user, f"tallystick audit --user {torn}" in str(refused)) == (torn, True)


def test_more_users_than_the_servers_lock_table_holds(scratch: Path) -> None:
    """A lock of a row takes no entry of it."""
    tiny = FAST | {"max_locks_per_transaction": "10", "max_connections": "10"}
    with Server(scratch, settings=tiny, bin_dir=pg_bin()) as server:
        world = World(server.create_database("app"), SHAPES["uuid"].host)
        with world.engine.begin() as conn:
            conn.exec_driver_sql(SHAPES["uuid"].ddl)
        migrate.apply(world.url, world.config)
        users = [uuid4() for _ in range(5_000)]
        with world.engine.begin() as conn:
            conn.execute(
                sa.insert(world.schema.users), [{"key": user, "email": f"{user}@example.com"} for user in users]
            )
            for user in users[:3]:
                world.ledger.grant(conn, user, credits=1, key="gift", description="A present")
            done = world.ledger.consume_many(conn, [Consume(user, key="k") for user in users])
        assert [isinstance(each, CreditTransaction) for each in done] == [True] * 3 + [False] * 4_997


@pytest.mark.parametrize("subscripts", ["[0:2]=", "[-3:-1]=", "[7:9]="])
def test_a_list_may_begin_at_another_subscript(world: World, subscripts: str) -> None:
    """As one that PL/pgSQL filled from 0 on: each item keeps its own user, key and amount."""
    first, second = world.user(credits=20), world.user(credits=20)
    lists = {
        "users": f"{subscripts}{{{first},{second},{second}}}",
        "keys": f"{subscripts}{{a,b,b}}",  # the last is a replay, and the first is more than there is
        "amounts": f"{subscripts}{{30,5,5}}",
    }
    call = sa.text(
        "SELECT item, outcome, user_id, idempotency_key, amount FROM tallystick.consume_many("
        "CAST(:users AS uuid[]), CAST(:keys AS text[]), amounts => CAST(:amounts AS integer[])) ORDER BY item"
    )
    with world.engine.begin() as conn:
        assert [tuple(row) for row in conn.execute(call, lists)] == [
            (1, "insufficient_credits", None, None, None),
            (2, "completed", second, "b", -5),
            (3, "replayed", second, "b", -5),
        ]
        assert world.ledger.balance(conn, first) == 20


def test_a_list_of_lists_is_one_list(world: World) -> None:
    user = world.user(credits=20)
    call = sa.text(
        "SELECT item, outcome, idempotency_key FROM tallystick.consume_many("
        "ARRAY[[:user, :user], [:user, :user]]::uuid[], ARRAY[['a', 'b'], ['a', 'c']]) ORDER BY item"
    )
    expected = [(1, "completed", "a"), (2, "completed", "b"), (3, "replayed", "a"), (4, "completed", "c")]
    with world.engine.begin() as conn:
        assert [tuple(row) for row in conn.execute(call, {"user": user})] == expected
