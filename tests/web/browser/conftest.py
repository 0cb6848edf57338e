"""The example app in a real browser: Debian's Chromium, driven by Playwright."""

from __future__ import annotations

import itertools
import shutil
import subprocess
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
import uvicorn
from playwright.sync_api import Browser

from sites import DjangoShop
from tallystick.dev.postgres import Server
from tallystick.dev.stripe import DevStripe
from web_browser import Example, Visitor
from workshops.__main__ import prepare
from workshops.app import create_app

AXE = "axe-core@4.14.1"
_people = itertools.count(1)


@pytest.fixture(scope="session")
def example(server: Server) -> Iterator[Example]:
    with DevStripe(retry_delays_s=(0.2, 0.5)) as double:
        sockets = uvicorn.Config("", host="127.0.0.1", port=0).bind_socket()
        origin = f"http://127.0.0.1:{sockets.getsockname()[1]}"
        config = prepare(server.create_database("workshops"), origin, double)
        engine = sa.create_engine(str(config.database_url))
        # a browser may keep a connection open for ever
        app = uvicorn.Server(
            uvicorn.Config(create_app(config, engine), log_level="warning", timeout_graceful_shutdown=5)
        )
        thread = threading.Thread(target=app.run, kwargs={"sockets": [sockets]}, daemon=True)
        thread.start()
        while not app.started:
            assert thread.is_alive()
            time.sleep(0.05)
        yield Example(origin, engine, double)
        app.should_exit = app.force_exit = True
        thread.join(timeout=20)  # a daemon: whatever still holds it must not hold the tests
        sockets.close()
        engine.dispose()


@pytest.fixture
def visit(example: Example, browser: Browser) -> Iterator[Callable[..., Visitor]]:
    """``visit(email=None, **context) -> Visitor``: a person with a device of their own."""
    yield from _visiting(example, browser)


@pytest.fixture
def visit_django(django_shop: DjangoShop, browser: Browser) -> Iterator[Callable[..., Visitor]]:
    """As ``visit``, in front of the example in Django."""
    yield from _visiting(django_shop, browser)


def _visiting(example: Example | DjangoShop, browser: Browser) -> Iterator[Callable[..., Visitor]]:
    """Afterwards nobody has met an error in a script or a thing that the Content-Security-Policy blocked."""
    visitors: list[Visitor] = []

    def arrive(email: str | None = None, **context: Any) -> Visitor:
        visitors.append(Visitor(example, browser.new_context(**context), email or f"person{next(_people)}@example.com"))
        return visitors[-1]

    yield arrive
    for visitor in visitors:
        visitor.context.close()
    assert [complaint for visitor in visitors for complaint in visitor.complaints] == []


@pytest.fixture(scope="session")
def axe(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The source of axe-core, from the npm registry."""
    npm = shutil.which("npm")
    if npm is None:
        pytest.skip("needs npm, for the newest axe-core (install Node.js)")
    folder: Path = tmp_path_factory.mktemp("axe")
    packed = subprocess.run(
        [npm, "pack", AXE, "--silent", "--pack-destination", str(folder)], capture_output=True, text=True, check=False
    )
    if packed.returncode:
        pytest.skip(f"npm could not bring {AXE}: {packed.stderr.strip()[:200]}")
    with tarfile.open(next(folder.glob("*.tgz"))) as archive:
        member = archive.extractfile("package/axe.min.js")
        assert member is not None
        return member.read().decode()
