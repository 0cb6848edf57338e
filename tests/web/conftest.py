"""Host apps on databases of their own, the Stripe double, and a browser."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest
import sqlalchemy as sa
from playwright.sync_api import Browser, sync_playwright
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from sites import DjangoShop, Shop, Site, settings_for
from tallystick.audit import audit
from tallystick.dev.postgres import Server
from tallystick.dev.stripe import DevStripe
from worlds import SHAPES, World

# Without the first, root's Chromium does not start; the rest keep it from calling home, and quick.
FLAGS = (
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
)  # fmt: skip


@pytest.fixture(scope="session")
def double() -> Iterator[DevStripe]:
    with DevStripe(retry_delays_s=(), senders=1) as running:
        yield running


@pytest.fixture
def make_site(make_world: Callable[..., World], double: DevStripe) -> Iterator[Callable[..., Site]]:
    """``make_site(shape="uuid", asynchronous=False, world=None, **options) -> Site``."""
    with ExitStack() as stack:

        def make(
            shape: str = "uuid", *, asynchronous: bool = False, settings: dict[str, Any] | None = None, **options: Any
        ) -> Site:
            world = make_world(shape, **{**settings_for(double), **(settings or {})})
            engine: sa.Engine | AsyncEngine = world.engine
            if asynchronous:
                engine = create_async_engine(world.url, poolclass=sa.NullPool)
            site = Site(world, engine, **options)
            stack.enter_context(site.client)
            return site

        yield make


@pytest.fixture(scope="session")
def site(server: Server, _templates: Callable[[str], str], double: DevStripe) -> Iterator[Site]:
    """The first user's app: uuid keys, a sync engine. Shared: each test makes users of its own."""
    url = server.create_database("web_site", template=_templates("uuid"))
    shared = Site(World(url, SHAPES["uuid"].host, **settings_for(double)))
    with shared.client:
        yield shared
    server.drop_database("web_site")


@pytest.fixture(params=["sync", "async"])
def either_site(request: pytest.FixtureRequest, make_site: Callable[..., Site]) -> Site:
    """The same app on a sync and on an async engine."""
    return make_site(asynchronous=request.param == "async")


@pytest.fixture(scope="session")
def shop(server: Server, _templates: Callable[[str], str], double: DevStripe) -> Iterator[Shop]:
    """An app whose packs are on sale at the double; shared as ``site`` is."""
    url = server.create_database("web_shop", template=_templates("uuid"))
    with Shop(url, double) as open_for_business:
        yield open_for_business
    server.drop_database("web_shop")


@pytest.fixture
def make_shop(make_world: Callable[..., World], double: DevStripe) -> Iterator[Callable[[str, AsyncEngine], Shop]]:
    """``make_shop(url, engine) -> Shop`` on an async engine of the test's own; ``url`` is where its database is."""
    with ExitStack() as stack:
        yield lambda url, engine: stack.enter_context(Shop(url, double, engine))


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    # Chromium without its window takes a third less of the processor
    found = shutil.which("chromium-headless-shell") or shutil.which("chromium")
    if found is None:
        pytest.skip("needs a real browser (apt-get install chromium-headless-shell)")
    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=found, args=list(FLAGS))
        yield running
        running.close()


@pytest.fixture(scope="session")
def django_shop(server: Server) -> Iterator[DjangoShop]:
    """The example in Django, whose settings are this process's. It listens for a browser, too."""
    # Playwright's loop runs in this thread for as long as the browser is open, and Django would take it for a view's
    os.environ["DJANGO_ALLOW_ASYNC_UNSAFE"] = "true"
    from django.core.handlers.wsgi import WSGIHandler
    from django.db import connections

    from django_workshops.__main__ import listening
    from django_workshops.settings import prepare

    with DevStripe(retry_delays_s=(0.2, 0.5)) as double, listening() as site:
        origin = f"http://127.0.0.1:{site.server_port}"
        url = server.create_database("django_shop")
        prepare(url, origin, double)
        site.set_app(WSGIHandler())
        thread = threading.Thread(target=site.serve_forever, daemon=True)
        thread.start()
        engine = sa.create_engine(url, poolclass=sa.NullPool)
        yield DjangoShop(origin, engine, double)
        site.shutdown()
        thread.join(timeout=20)
        from django_workshops.billing import billing

        with engine.connect() as conn:
            assert audit(conn, billing.config).clean  # whatever the tests did
        billing.engine.dispose()
        connections.close_all()
    server.drop_database("django_shop")
