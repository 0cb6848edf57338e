"""Schemathesis: whatever the OpenAPI document allows, and much that it does not, is answered as it says."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from uuid import uuid4

import pytest
from hypothesis import HealthCheck, Phase, given, settings

from sites import Shop, Site

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # its imports, not our calls
    import schemathesis
    from schemathesis.specs.openapi.checks import positive_data_acceptance

pytestmark = pytest.mark.one_server  # it is about requests and answers

# These find bugs without a second search for the smallest case, and keep the whole under a minute.
SHORT = settings(
    max_examples=25, deadline=None, phases=(Phase.explicit, Phase.generate), database=None, derandomize=True,
    suppress_health_check=list(HealthCheck),
)  # fmt: skip


def drive(site: Site, user: object) -> int:
    schema = schemathesis.openapi.from_asgi("/openapi.json", site.app)
    calls = 0
    for found in schema.get_all_operations():
        operation = found.ok()
        if not operation.path.startswith("/billing"):
            continue

        @SHORT
        @given(case=operation.as_strategy())
        def answered(case: schemathesis.Case) -> None:
            nonlocal calls
            calls += 1
            answer = case.call(headers={"x-session": str(user)})
            # the one valid request that is refused for what an earlier one was: its key is used
            reused = answer.status_code == 422 and "idempotency-key-reused" in answer.text
            case.validate_response(answer, excluded_checks=[positive_data_acceptance] if reused else [])

        answered()
    return calls


def test_nothing_is_answered_with_a_fault(shop: Shop) -> None:
    """As a user with credits and a workshop."""
    user = shop.world.user(credits=3)
    shop.world.workshop(user)
    assert drive(shop, user) > 100


def test_nor_to_a_stranger(site: Site) -> None:
    assert drive(site, uuid4()) > 100


def test_nor_with_other_keys(make_site: Callable[..., Site]) -> None:
    site = make_site("quoted", settings={"packs": ()})  # bigint users, integer workshops, nothing on sale
    assert drive(site, site.world.user(credits=1)) > 100
