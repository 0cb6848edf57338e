from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
import stripe as sdk

from stripe_sales.shop import Shop
from tallystick.dev.stripe import DevStripe
from tallystick.stripe import Received
from worlds import World

sdk.enable_telemetry = False  # it would write a file into the home directory


@pytest.fixture
def dev() -> Iterator[DevStripe]:
    with DevStripe(retry_delays_s=(), senders=1) as double:
        yield double


@pytest.fixture
def make_shop(make_world: Callable[..., World], dev: DevStripe) -> Iterator[Callable[..., Shop]]:
    """``make_shop(shape="uuid", dev=…, endpoint_url=…, asynchronous=…) -> Shop``"""
    made: list[Shop] = []

    def make(shape: str = "uuid", *, dev: DevStripe = dev, **options: Any) -> Shop:
        made.append(Shop(make_world(shape), dev, **options))
        return made[-1]

    yield make
    for shop in made:
        shop.engine.dispose()


@pytest.fixture
def shop(make_shop: Callable[..., Shop]) -> Shop:
    return make_shop()


@pytest.fixture(params=["sync", "async"])
def either_shop(request: pytest.FixtureRequest, make_shop: Callable[..., Shop]) -> Shop:
    """As ``shop``, on a sync and on an async engine."""
    return make_shop(asynchronous=request.param == "async")


class App:
    """The host's web server, with the webhook route and nothing else."""

    def __init__(self) -> None:
        self.receive: Callable[[bytes, str | None], Received]
        self.answers: list[int] = []
        app = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                status = app.receive(body, self.headers["Stripe-Signature"]).status
                app.answers.append(status)
                self.send_response(status)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *_args: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/webhook"


@pytest.fixture
def app() -> Iterator[App]:
    """Set ``app.receive``; what is sent to ``app.url`` goes there."""
    running = App()
    thread = threading.Thread(target=running.server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    yield running
    running.server.shutdown()
    running.server.server_close()
    thread.join()
