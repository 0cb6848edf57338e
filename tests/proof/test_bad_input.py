"""Whatever text or number comes in: it is stored as it is or refused before the first write, and never becomes SQL."""

from __future__ import annotations

import enum
import uuid
from collections import UserDict
from collections.abc import Callable
from types import MappingProxyType
from typing import Any

import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from psycopg import sql

from tallystick import Config, Consume, HostMapping, UsersTable, WorkshopsTable, migrate
from tallystick.audit import audit
from tallystick.errors import ConfigError, InvalidArgument, LedgerError, TallystickError
from tallystick.ledger.operations import KEY_MAX, TEXT_MAX
from worlds import World

QUIET = settings(deadline=None, database=None, suppress_health_check=list(HealthCheck))

NASTY = st.sampled_from(
    [
        "",
        " ",
        "\0",
        "a\0b",
        "\ud800",
        "x\udfff",
        "\u202e\u0000",
        "🪵" * 300,
        "x" * (TEXT_MAX + 1),
        "'; DROP TABLE credit_transactions; --",
        '"; DROP TABLE users; --',
        "%s %(p_user)s :p_user $1 {} {0}",
        "\\'; SELECT pg_sleep(9)",
        "NULL",
        "{}",
        '{"a"}',
        "é",
        "é",
    ]
)
TEXTS = NASTY | st.text(alphabet=st.characters(exclude_categories=()), max_size=300)
NUMBERS = st.integers() | st.floats() | st.booleans() | st.none() | st.text(max_size=5) | st.decimals() | st.binary()


def storable(text: object, longest: int) -> bool:
    if not isinstance(text, str) or not 0 < len(text) <= longest or "\0" in text:
        return False
    return not any("\ud800" <= character <= "\udfff" for character in text)


def refused(call: Callable[[], Any]) -> bool:
    try:
        call()
    except InvalidArgument as error:
        assert len(str(error)) < 400  # a megabyte of somebody's input does not go into a log
        return True
    return False


def test_texts_are_stored_as_they_are_or_refused(world: World) -> None:
    ledger = world.ledger
    user, other = (world.user(credits=1_000_000) for _ in range(2))

    @settings(QUIET, max_examples=150)
    @given(key=TEXTS, description=TEXTS)
    def check(key: str, description: str) -> None:
        fine = storable(key, KEY_MAX) and storable(description, TEXT_MAX)
        with world.autocommit.connect() as conn:
            before = ledger.balance(conn, user)
            assert refused(lambda: ledger.consume(conn, user, key=key, description=description)) is not fine
            if fine:
                last = ledger.history(conn, user, limit=1)[0]
                if not (replay := before == ledger.balance(conn, user)):
                    assert (last.idempotency_key, last.description) == (key, description)
                assert ledger.consume(conn, user, key=key, description=description).replayed
                assert replay or ledger.balance(conn, user) == before - 1
                one, none = (
                    Consume(who, key=key, description=text) for who, text in ((other, description), (user, None))
                )
                in_a_list, again = ledger.consume_many(conn, [one, none])
                assert (again.idempotency_key, again.replayed) == (key, True)
                if not in_a_list.replayed:
                    assert ledger.history(conn, other, limit=1) == [in_a_list]
                    assert (in_a_list.idempotency_key, in_a_list.description) == (key, description)
            else:
                assert ledger.balance(conn, user) == before

    check()
    healthy(world)


def test_amounts(world: World) -> None:
    ledger = world.ledger
    user = world.user(credits=1_000)

    @settings(QUIET, max_examples=150)
    @given(amount=NUMBERS)
    @example(0)
    @example(-1)
    @example(2**31)
    @example(2**63)
    @example(1.0)
    @example(True)
    @example(10**5000)  # more digits than Python writes
    @example(-(10**5000))
    def check(amount: Any) -> None:
        whole = isinstance(amount, int) and not isinstance(amount, bool) and 1 <= amount < 2**31
        key = uuid.uuid4().hex
        with world.autocommit.connect() as conn:
            for call in (
                lambda: ledger.start_purchase(conn, user, credits=amount, description="x", key=key),
                lambda: ledger.consume(conn, user, credits=amount, key=key),
                lambda: (
                    ledger.refund(conn, user, uuid.uuid4(), credits=amount, key=key)
                    if amount is not None
                    else ledger.consume(conn, user, credits=None, key=key)
                ),
            ):
                try:
                    call()
                except InvalidArgument:
                    assert not whole
                except LedgerError:
                    assert whole  # too much, or no such purchase
                else:
                    assert whole
            (result,) = ledger.consume_many(conn, [Consume(user, credits=amount, key=f"{key} many")])
            assert isinstance(result, InvalidArgument) is not whole

    check()
    healthy(world)


class Job(enum.StrEnum):
    NIGHTLY = "nightly"


class OldJob(str, enum.Enum):  # noqa: UP042 - its str() is its name, unlike a StrEnum's
    NIGHTLY = "nightly"


class Size(enum.IntEnum):
    SMALL = 2


@pytest.mark.parametrize("job", [Job.NIGHTLY, OldJob.NIGHTLY])
def test_members_of_enums_are_the_texts_and_numbers_that_they_are(make_world: Callable[..., World], job: Any) -> None:
    world = make_world()
    ledger, user = world.ledger, world.user(credits=9)
    with world.engine.begin() as conn:
        once = ledger.consume(conn, user, credits=Size.SMALL, key=job, description=job)
        assert (once.idempotency_key, once.description, once.amount) == ("nightly", "nightly", -2)
        assert type(once.idempotency_key) is str
        again = [Consume(user, credits=amount, key=key) for amount, key in ((Size.SMALL, job), (2, "nightly"))]
        assert all(
            row.replayed for row in (ledger.consume(conn, user, credits=2, key=job), *ledger.consume_many(conn, again))
        )
        (new,) = ledger.consume_many(conn, [Consume(user, credits=Size.SMALL, key=f"{job.value} 2", description=job)])
        assert (new.description, new.balance_after) == ("nightly", 5)


def test_keys_of_users_and_workshops(any_world: World) -> None:
    world, ledger = any_world, any_world.ledger
    user = world.user(credits=5)
    anything = TEXTS | NUMBERS | st.uuids() | st.lists(st.integers(), max_size=2)
    with world.autocommit.connect() as conn:

        @settings(QUIET, max_examples=80)
        @given(other=anything)
        @example(10**5000)
        def check(other: Any) -> None:
            with pytest.raises(LedgerError):
                ledger.consume(conn, other, key="a")
            if other is not None:
                with pytest.raises(LedgerError):
                    ledger.consume(conn, user, workshop=other, key="a")
            assert refused(lambda: ledger.history(conn, other)) or ledger.history(conn, other) == []
            with pytest.raises(LedgerError):
                ledger.balance(conn, other)

        check()
        assert ledger.balance(conn, user) == 5


def test_cursors_and_purchases(world: World) -> None:
    ledger = world.ledger
    user = world.user(credits=5)
    with world.autocommit.connect() as conn:

        @settings(QUIET, max_examples=80)
        @given(anything=TEXTS | NUMBERS | st.uuids())
        @example("9" * 5000)
        @example("9" * 10)
        @example(10**5000)
        def check(anything: Any) -> None:
            if anything is not None:
                assert refused(lambda: ledger.history(conn, user, before=anything)) or isinstance(anything, str)
            for call in (
                lambda: ledger.refund(conn, user, anything, key="a"),
                lambda: ledger.complete_purchase(conn, user, purchase=anything),
                lambda: ledger.fail_purchase(conn, user, stripe_session_id=anything, reason="a"),
            ):
                with pytest.raises(LedgerError):
                    call()

        check()
    healthy(world)


def healthy(world: World) -> None:
    with world.engine.connect() as conn:
        assert audit(conn, world.config).findings == ()
        tables = set(sa.inspect(conn).get_table_names())
    assert {"users", "workshops", "credit_transactions"} <= tables


def nested(depth: int) -> dict[str, Any]:
    value: dict[str, Any] = {}
    for n in range(depth - 1):
        value = {"a": [value]} if n % 2 else {"a": value}
    return value


@pytest.mark.parametrize(
    ("metadata", "stored"),
    [
        (MappingProxyType({"a": MappingProxyType({"b": 1})}), {"a": {"b": 1}}),
        (UserDict(a=UserDict()), {"a": {}}),
        ({"path": "C:\\u0000dir", "\\\\u0000": "\\\\\\u0000"}, ...),
        ({"a" * 200: ["{[" * 200] * 99}, ...),
        ({"a": [{} for _ in range(500)]}, ...),
        (nested(67), ...),
        ({"a": "b\0c"}, None),
        ({"a\0": 1}, None),
        ({"a": "\\\0"}, None),
        ({"a": "\ud800"}, None),
        ({"a": float("nan")}, None),
        ({"a": {1}}, None),
        (nested(68), None),
        (nested(3_000), None),
        (nested(100_000), None),
        ([1], None),
    ],
)
def test_metadata_is_stored_as_it_is_or_refused(world: World, metadata: Any, stored: Any) -> None:
    user = world.user(credits=2)
    with world.engine.begin() as conn:
        if stored is None:
            with pytest.raises(InvalidArgument, match=r"metadata=.*: pass a mapping that is a JSON object") as refused:
                world.ledger.consume(conn, user, key="a", metadata=metadata)
            assert len(refused.value.message) < 400
        else:
            world.ledger.consume(conn, user, key="a", metadata=metadata)
            world.ledger.consume_many(conn, [Consume(user, key="b", metadata=metadata)])
            rows = world.ledger.history(conn, user, limit=2)
            assert [row.metadata for row in rows] == [metadata if stored is ... else stored] * 2


def test_a_megabyte(world: World) -> None:
    huge, user = "x" * 1_000_000, world.user(credits=1)
    with world.engine.begin() as conn:
        assert refused(lambda: world.ledger.consume(conn, user, key=huge))
        assert refused(lambda: world.ledger.consume(conn, user, key="a", description=huge))
        assert refused(lambda: world.ledger.balance(conn, huge))
        assert refused(lambda: world.ledger.history(conn, user, before=huge))
        assert refused(lambda: world.accounts.set_plan_tier(conn, user, huge))


# --- names ---

NAMES = st.text(
    alphabet=st.characters(exclude_characters="\0", exclude_categories=("Cs",)), min_size=1, max_size=63
).filter(lambda name: len(name.encode()) <= 63)
TRICKY = st.sampled_from(
    [
        'a"b',
        '"',
        '""',
        "'",
        "%",
        "%s",
        "%(p_user)s",
        ":p_user",
        "select",
        "x; DROP TABLE y",
        "a.b",
        "$1",
        "{}",
        "\\",
        "ö",
    ]
)


@settings(QUIET, max_examples=12)
@given(names=st.lists(TRICKY | NAMES, min_size=7, max_size=7, unique_by=str.casefold))
@example(names=["u", "k", "w", "i", "o", "t", 'a, (b) RETURNS "c" DEFAULT d'])
@example(names=['u"', "%s", "w'", ":p_user", "%(p_workshop)s", "{0}", 's"; --'])
def test_a_name_is_a_name(fresh_database: Callable[..., str], names: list[str]) -> None:
    """Tables and columns of any name that PostgreSQL takes: migrated, sold from, spent from, audited."""
    users, key, workshops, workshop_key, owner, title, schema = names
    host = HostMapping(
        users=UsersTable(schema=schema, table=users, key=key, key_type="bigint"),
        workshops=WorkshopsTable(
            schema=schema,
            table=workshops,
            key=workshop_key,
            key_type="bigint",
            owner=owner,
            title=title,
            created_at=None,
        ),
    )
    url = fresh_database()
    ddl = sql.SQL(
        "CREATE SCHEMA {schema}; CREATE TABLE {users} ({key} bigint PRIMARY KEY);"
        "CREATE TABLE {workshops} ({workshop_key} bigint PRIMARY KEY, {owner} bigint REFERENCES {users}, {title} text)"
    ).format(
        schema=sql.Identifier(schema),
        users=sql.Identifier(schema, users),
        workshops=sql.Identifier(schema, workshops),
        **{
            n: sql.Identifier(v)
            for n, v in (("key", key), ("workshop_key", workshop_key), ("owner", owner), ("title", title))
        },
    )
    world = World(url, host)
    if schema.startswith("pg_") or {schema, users, workshops} & {"credit_transactions", "tallystick"}:
        return
    with world.engine.connect() as conn, conn.begin():
        conn.connection.driver_connection.execute(ddl)
    migrate.apply(url, world.config)
    user = world.user(credits=2)
    workshop = world.workshop(user)
    with world.engine.begin() as conn:
        assert world.ledger.consume(conn, user, workshop=workshop, key="a").balance_after == 1
        results = world.ledger.consume_many(conn, [Consume(user, workshop=workshop, key="b"), Consume(user, key="c")])
        assert [result.replayed for result in results] == [True, False]
        assert world.ledger.access(conn, workshop).open
        assert audit(conn, world.config).findings == ()
        assert set(sa.inspect(conn).get_table_names(schema)) == {users, workshops, "credit_transactions"}


@pytest.mark.one_server  # no server is asked
@settings(QUIET, max_examples=300)
@given(
    values=st.dictionaries(
        st.sampled_from([*Config.model_fields, "nonsense"]),
        st.recursive(
            NUMBERS | TEXTS, lambda inner: st.lists(inner, max_size=2) | st.dictionaries(TEXTS, inner, max_size=2)
        ),
        max_size=3,
    )
)
def test_settings_are_taken_or_refused_with_one_sentence(values: dict[str, Any]) -> None:
    environ = {f"TALLYSTICK_{name.upper()}": str(value) for name, value in values.items()}
    try:
        Config.load(environ=environ)
    except ConfigError as error:
        assert error.key
        assert "\n" not in str(error).rstrip()


@pytest.mark.one_server  # no server is asked
@settings(QUIET, max_examples=150)
@given(text=TEXTS)
def test_a_settings_file_is_taken_or_refused_with_one_sentence(tmp_path_factory: Any, text: str) -> None:
    file = tmp_path_factory.mktemp("config") / "tallystick.toml"
    file.write_bytes(text.encode("utf-8", "surrogatepass"))
    try:
        Config.load(file, environ={})
    except TallystickError as error:
        assert str(file) in str(error)
