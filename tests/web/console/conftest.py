from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import psycopg
import pytest
import sqlalchemy as sa
from starlette.testclient import TestClient
from starlette.types import ASGIApp

from tallystick import events
from tallystick.events.deliver import add_endpoint, deliver
from tallystick.web.console import LocalLink, SignIn, console
from worlds import SHAPES, World, dispose_when_idle

ADDRESS = "http://127.0.0.1:8420"
CROWD_USERS = 100_000
CROWD_ROWS_EACH = 3


class Visitor(TestClient):
    """A browser without JavaScript, from this machine unless another ``peer`` is named."""

    def __init__(self, app: ASGIApp, *, peer: str = "127.0.0.1", address: str = ADDRESS) -> None:
        super().__init__(app, base_url=address, client=(peer, 50_000), follow_redirects=False)

    def token(self, path: str = "/") -> str:
        """The token in the forms of a page."""
        page = self.get(path)
        found = re.search(r'name="token" value="([0-9a-f]+)"', page.text)
        assert found, (path, page.status_code, page.text)
        return found[1]

    def overview(self) -> Any:
        """The overview once its figures are there, however busy the machine is."""
        deadline = time.monotonic() + 60
        while re.search("Adding up|Checking every", (answer := self.get("/")).text) and time.monotonic() < deadline:
            time.sleep(0.1)
        return answer

    def submit(self, path: str, **fields: Any) -> Any:
        return self.post(path, data={"token": self.token(), **{name: str(value) for name, value in fields.items()}})


@pytest.fixture
def open_console() -> Iterator[Callable[..., Visitor]]:
    """``open_console(world, **options) -> Visitor`` who has come in by the link."""
    with ExitStack() as stack:

        def make(world: World, *, address: str = ADDRESS, sign_in: SignIn | None = None, **options: Any) -> Visitor:
            link = LocalLink()
            engine = sa.create_engine(world.url)
            stack.callback(dispose_when_idle, engine)
            app = console(world.config, engine=engine, sign_in=sign_in or link, address=address, **options)
            visitor = stack.enter_context(Visitor(app, address=address))  # one event loop for all of its requests
            if sign_in is None:
                assert visitor.get("/enter", params={"token": link.token}).status_code == 303
            return visitor

        yield make


SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"


class Hook:
    """A webhook that answers with ``status``, and keeps the ids of what it was sent; ``seen`` is called before that."""

    def __init__(self) -> None:
        self.status = 500
        self.seen: Callable[[], None] = lambda: None
        self.ids: list[str] = []
        hook = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                self.rfile.read(int(self.headers["Content-Length"]))
                hook.ids.append(self.headers["webhook-id"])
                hook.seen()
                self.send_response(hook.status)
                self.end_headers()

            def log_message(self, *_: object) -> None:
                """Nothing."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/hook"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def add(self, world: World, name: str, **options: Any) -> None:
        """An endpoint of this name, with events on."""
        events.enable(world.url, world.config, low_balance=2)
        with world.engine.begin() as conn:
            add_endpoint(conn, name, self.url, secret_variable="HOOK_SECRET", **options)

    def deliver(self, world: World, *, attempts: int = 1) -> None:
        """All that is due."""
        world.wait_for_analyze()
        deliver(world.url, world.config, once=True, pauses_s=(3600.0,) * (attempts - 1), timeout_s=30)


@pytest.fixture
def hook(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hook]:
    monkeypatch.setenv("HOOK_SECRET", SECRET)
    made = Hook()
    yield made
    made.server.shutdown()
    made.server.server_close()


@pytest.fixture(scope="module")
def console_of_shape(server: Any, _templates: Callable[[str], str]) -> Iterator[Callable[[str], Visitor]]:
    """``console_of_shape(shape) -> Visitor`` of an empty host app of that shape, kept for the module."""
    made: dict[str, Visitor] = {}

    def visitor(shape: str) -> Visitor:
        if shape not in made:
            link = LocalLink()
            world = World(server.create_database(f"console_{shape}", template=_templates(shape)), SHAPES[shape].host)
            made[shape] = Visitor(console(world.config, engine=world.engine, sign_in=link, allow_actions=True))
            assert made[shape].get("/enter", params={"token": link.token}).status_code == 303
        return made[shape]

    yield visitor
    for shape in made:
        server.drop_database(f"console_{shape}")


@pytest.fixture(scope="session")
def empty_world(server: Any, _templates: Callable[[str], str]) -> Iterator[World]:
    """A migrated host app for tests that change nothing of each other's."""
    yield World(server.create_database("console", template=_templates("uuid")), SHAPES["uuid"].host)
    server.drop_database("console")


@pytest.fixture(scope="session")
def large_world(server: Any, _templates: Callable[[str], str]) -> Iterator[World]:
    """100,000 users with three rows each, 90 days of them, made set-wise; only read from."""
    url = server.create_database("large_world", template=_templates("uuid"))
    fill(url)
    yield World(url, SHAPES["uuid"].host)
    server.drop_database("large_world")


USERS = """
INSERT INTO users (id, email, credit_sequence, credit_balance)
SELECT md5('user ' || n)::uuid, 'person' || n || '@example.com', %(each)s, 6 - %(each)s
FROM generate_series(1, %(users)s) n
"""

# A user buys five credits and spends the rest of the rows one by one. Times run up to now over 90 days, user after
# user, so that rows lie as live traffic would have left them; ids are UUIDv7.
ROWS = """
INSERT INTO credit_transactions (
  id, user_id, type, status, amount, balance_after, sequence, description, idempotency_key, amount_paid, currency,
  created_at, completed_at)
SELECT
  (lpad(to_hex((extract(epoch FROM at) * 1000)::bigint), 12, '0') || '7' || substr(md5(k::text), 1, 3)
    || '8' || substr(md5(k::text), 4, 15))::uuid,
  md5('user ' || u)::uuid,
  (CASE WHEN s = 1 THEN 'purchase' ELSE 'consumption' END)::credit_transaction_type,
  'completed',
  CASE WHEN s = 1 THEN 5 ELSE -1 END,
  6 - s,
  s,
  CASE WHEN s = 1 THEN 'Purchased Five Flights pack' ELSE 'Credit consumed for Workshop: Mobile App Discovery' END,
  CASE WHEN s > 1 THEN 'consumption ' || k END,
  CASE WHEN s = 1 THEN 34900 END,
  CASE WHEN s = 1 THEN 'usd' END,
  at,
  at
FROM (
  SELECT k, 1 + k %% %(users)s AS u, (1 + k / %(users)s)::int AS s,
    now() - interval '90 days' + (k + 1)::float / (%(users)s * %(each)s) * interval '90 days' AS at
  FROM generate_series(0, %(users)s * %(each)s - 1) k) made
"""

# One for each row, of one transaction: all of them before whatever is open.
EVENTS = """
INSERT INTO tallystick.events (position, kind, transaction_id, created_at)
SELECT 1, type || '.completed', id, completed_at FROM credit_transactions ORDER BY completed_at
"""


def fill(url: str, *, users: int = CROWD_USERS, each: int = CROWD_ROWS_EACH) -> None:
    with psycopg.connect(url.replace("+psycopg", "", 1), autocommit=True) as conn:
        conn.execute("SET session_replication_role = replica")  # the foreign keys hold by construction
        conn.execute(USERS, {"users": users, "each": each})
        conn.execute(ROWS, {"users": users, "each": each})
        conn.execute(EVENTS)
        conn.execute("RESET session_replication_role")
        conn.execute("VACUUM ANALYZE users")
        conn.execute("VACUUM ANALYZE credit_transactions")
        conn.execute("VACUUM ANALYZE tallystick.events")
