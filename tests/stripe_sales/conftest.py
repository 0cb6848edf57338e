from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from stripe_sales.shop import Shop
from tallystick.devstripe import DevStripe
from worlds import World


@pytest.fixture
def dev() -> Iterator[DevStripe]:
    with DevStripe(retry_delays_s=(), senders=1) as double:
        yield double


@pytest.fixture
def shop(world: World, dev: DevStripe) -> Shop:
    return Shop(world, dev)


@pytest.fixture
def make_shop(make_world: Callable[..., World], dev: DevStripe) -> Callable[..., Shop]:
    def make(shape: str) -> Shop:
        return Shop(make_world(shape), dev)

    return make
