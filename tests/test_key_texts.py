"""From text to a host's key: one rule for addresses and command lines."""

from __future__ import annotations

from typing import get_args
from uuid import UUID

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tallystick.config import INTEGER_KEYS, TEXT_KEYS, HostMapping, KeyType, UsersTable, WorkshopsTable
from tallystick.declared_tables import Schema
from tallystick.errors import InvalidArgument

BOUNDS = {"smallint": 2**15, "integer": 2**31, "bigint": 2**63}
KINDS = {"uuid": UUID, **dict.fromkeys(TEXT_KEYS, str), **dict.fromkeys(INTEGER_KEYS, int)}
TEXTS = st.one_of(
    st.text(),
    st.text(st.characters(categories=["Nd"]) | st.sampled_from("+-_ .eE"), max_size=30),
    st.integers(-(2**70), 2**70).map(str),
    st.uuids().map(str),
)


@settings(deadline=None)
@given(text=TEXTS, key_type=st.sampled_from(get_args(KeyType)))
@example(text="--5", key_type="integer")
@example(text="9" * 5_000, key_type="bigint")
@example(text="-" * 5_000, key_type="integer")
@example(text="٣", key_type="integer")  # a digit, but not one of an integer in SQL
@example(text="1_000", key_type="bigint")
@example(text="\0", key_type="text")
@example(text="\ud800", key_type="text")
@example(text="", key_type="uuid")
def test_any_text_is_a_key_or_an_invalid_argument(text: str, key_type: KeyType) -> None:
    schema = Schema.of(HostMapping(users=UsersTable(key_type=key_type), workshops=WorkshopsTable(key_type=key_type)))
    for parsed in (schema.user_key_of, schema.workshop_key_of):
        try:
            key = parsed(text)
        except InvalidArgument as refused:
            assert len(refused.message) < 400
            continue
        assert type(key) is KINDS[key_type]
        assert parsed(str(key)) == key
        if isinstance(key, int):
            assert -BOUNDS[key_type] <= key < BOUNDS[key_type]
            assert str(key).lstrip("-") == (text.lstrip("-").lstrip("0") or "0")


@pytest.mark.parametrize("key_type", sorted(INTEGER_KEYS))
def test_the_bounds_are_keys_and_what_is_beyond_them_is_not(key_type: KeyType) -> None:
    schema = Schema.of(HostMapping(users=UsersTable(key_type=key_type)))
    assert schema.user_key_of(str(-BOUNDS[key_type])) == -BOUNDS[key_type]
    assert schema.user_key_of(str(BOUNDS[key_type] - 1)) == BOUNDS[key_type] - 1
    for beyond in (BOUNDS[key_type], -BOUNDS[key_type] - 1):
        with pytest.raises(InvalidArgument):
            schema.user_key_of(str(beyond))


def test_a_host_without_workshops_has_no_key_of_one() -> None:
    with pytest.raises(InvalidArgument, match="no workshops table"):
        Schema.of(HostMapping(workshops=None)).workshop_key_of("1")
