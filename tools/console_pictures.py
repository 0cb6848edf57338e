"""Take the pictures of the console for the documentation: python tools/console_pictures.py (needs chromium)."""

from __future__ import annotations

import datetime as dt
import os
import random
import shutil
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import sqlalchemy as sa
import uvicorn
from playwright.sync_api import expect, sync_playwright

from tallystick import Config, Ledger, events, migrate
from tallystick.config import HostMapping, UsersTable
from tallystick.dev.postgres import Server
from tallystick.events.deliver import add_endpoint, deliver
from tallystick.web.console import LocalLink, console

DOCS = Path(__file__).parents[1] / "docs"
TABLES = """
CREATE TABLE users (id uuid PRIMARY KEY, email text NOT NULL UNIQUE);
CREATE TABLE workshops (id uuid PRIMARY KEY, user_id uuid NOT NULL REFERENCES users (id), title text,
  created_at timestamptz NOT NULL DEFAULT now());
"""
# Each user's rows over the 58 days before today, in their order: the ledger's clock is the server's, and nothing
# but a picture needs a past.
SPREAD = """
UPDATE credit_transactions AS t SET completed_at = past.at, created_at = past.at
FROM (SELECT id, now() - interval '58 days' * (1 - (sequence - random() * 0.9) / (1 + max(sequence) OVER (
  PARTITION BY user_id))) - interval '3 hours' AS at FROM credit_transactions WHERE sequence IS NOT NULL) AS past
WHERE past.id = t.id
"""
USERS = 140
PRESENTS, REFUNDS = 0.25, 0.1
SECRET = "HOOK_SECRET"  # noqa: S105 - the variable's name
PACKS = ((1, 7900), (3, 14900), (5, 24900))


class Accepts(BaseHTTPRequestHandler):
    """A webhook that takes everything."""

    def do_POST(self) -> None:
        """Answer 204."""
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(204)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Nothing."""


class Shop:
    """An app that has sold credits for two months, and one user with some of everything."""

    def __init__(self, url: str) -> None:
        self.config = Config(database_url=url, host=HostMapping(users=UsersTable(email="email")))
        self.engine = sa.create_engine(url)
        self.ledger = Ledger(self.config)
        self.chance = random.Random(18)  # noqa: S311 - the same picture each time
        with self.engine.begin() as conn:
            conn.exec_driver_sql(TABLES)
        migrate.apply(url, self.config)
        for number in range(USERS):
            self.user(f"person{number}@example.com")
        self.ada = self.user("ada@example.com")
        with self.engine.begin() as conn:
            conn.exec_driver_sql("SET LOCAL session_replication_role = replica")
            conn.exec_driver_sql(SPREAD)
        self.today()

    def user(self, email: str) -> uuid.UUID:
        """Somebody who buys, spends, and now and then gets money back or a present."""
        user = uuid.UUID(int=self.chance.getrandbits(128), version=4)
        with self.engine.begin() as conn:
            conn.execute(sa.text("INSERT INTO users VALUES (:id, :email)"), {"id": user, "email": email})
            for turn in range(self.chance.randint(1, 4)):
                bought = self.buy(conn, user, *self.chance.choice(PACKS))
                if self.chance.random() < PRESENTS:
                    self.ledger.grant(conn, user, credits=1, key=f"g{turn}", description="Thank you")
                spare = self.ledger.balance(conn, user)
                for spent in range(self.chance.randint(0, spare)):
                    self.ledger.consume(conn, user, key=f"c{turn}.{spent}", description="Report")
                if self.chance.random() < REFUNDS:
                    self.ledger.refund(conn, user, bought, credits=1, key=f"r{turn}")
        return user

    def buy(self, conn: sa.Connection, user: uuid.UUID, credits: int, amount: int) -> uuid.UUID:
        """A pack that is paid."""
        started = self.ledger.start_purchase(conn, user, credits=credits, description=f"Purchased {credits} credits")
        self.ledger.complete_purchase(conn, user, purchase=started.id, amount_paid=amount, currency="usd")
        return started.id

    def today(self) -> None:
        """Holds, credits that expire, and events, of which one endpoint takes all and another none."""
        url, ada, ledger = str(self.engine.url.render_as_string(hide_password=False)), self.ada, self.ledger
        events.enable(url, self.config, low_balance=2)
        os.environ[SECRET] = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
        accepting = ThreadingHTTPServer(("127.0.0.1", 0), Accepts)
        threading.Thread(target=accepting.serve_forever, daemon=True).start()
        here = f"http://127.0.0.1:{accepting.server_port}"
        with self.engine.begin() as conn:
            add_endpoint(conn, "crm", here, secret_variable=SECRET)
            nobody, low = "http://127.0.0.1:9", ["balance.low", "balance.debt"]
            add_endpoint(conn, "mail", nobody, secret_variable=SECRET, kinds=low)
        with self.engine.begin() as conn:
            spare = ledger.balance(conn, ada)
            workshop = uuid.UUID(int=self.chance.getrandbits(128), version=4)
            named = {"id": workshop, "user": ada, "title": "Mobile App Discovery"}
            conn.execute(sa.text("INSERT INTO workshops VALUES (:id, :user, :title)"), named)
            self.buy(conn, ada, 5, 24900)
            ledger.consume(conn, ada, credits=spare + 4, key="all but one", description="Report")
            self.buy(conn, ada, 5, 24900)
            now = dt.datetime.now(dt.UTC)
            ledger.grant(conn, ada, credits=4, key="w", description="Winter", expires_at=now + dt.timedelta(days=12))
            started = ledger.start_purchase(
                conn, ada, credits=3, description="Purchased 3 credits", expires_after=dt.timedelta(days=365)
            )
            ledger.complete_purchase(conn, ada, purchase=started.id, amount_paid=14900, currency="usd")
            ledger.hold(conn, ada, credits=2, key="h1", workshop=workshop, expires_in=dt.timedelta(minutes=14))
            ledger.hold(
                conn, ada, credits=1, key="h2", description="Render of 24 frames", capture_limit=4,
                expires_in=dt.timedelta(hours=3),
            )  # fmt: skip
            ledger.start_purchase(conn, ada, credits=5, description="Purchased 5 credits")
        deliver(url, self.config, once=True, pauses_s=(), timeout_s=5)
        with self.engine.begin() as conn:
            conn.exec_driver_sql(
                "UPDATE tallystick.event_endpoints SET url = 'https://' || name || '.example.com/hooks'"
            )
        accepting.shutdown()


@contextmanager
def served() -> Iterator[tuple[Shop, str, LocalLink]]:
    """The shop, the address of its console, and a link to sign in with."""
    folder = Path(tempfile.mkdtemp(prefix="tallystick-pictures-"))
    folder.chmod(0o711)  # root's server runs as another account and has to reach it
    listening = uvicorn.Config("", host="127.0.0.1", port=0).bind_socket()
    address = f"http://127.0.0.1:{listening.getsockname()[1]}"
    try:
        with Server(folder) as server:
            shop, link = Shop(server.create_database("app")), LocalLink()
            app = console(shop.config, engine=shop.engine, sign_in=link, address=address, allow_actions=True)
            running = uvicorn.Server(uvicorn.Config(app, log_level="warning", lifespan="off"))
            thread = threading.Thread(target=running.run, kwargs={"sockets": [listening]}, daemon=True)
            thread.start()
            while not running.started:
                time.sleep(0.05)
            yield shop, address, link
            running.should_exit = True
            thread.join()
            shop.engine.dispose()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def main() -> None:
    """Make the shop, take the pictures, leave nothing behind."""
    chromium = shutil.which("chromium")
    if chromium is None:
        raise SystemExit("no chromium on PATH. Install it with: apt-get install chromium")
    with served() as (shop, address, link), sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(viewport={"width": 1080, "height": 980})
        page.goto(f"{address}/enter?token={link.token}")
        expect(page.locator("progress")).to_have_count(0, timeout=60_000)
        for name, path in (("overview", "/"), ("user", f"/user?key={shop.ada}"), ("events", "/events")):
            page.goto(address + path)
            page.wait_for_load_state("networkidle")
            page.screenshot(path=DOCS / f"console-{name}.png")
        browser.close()


if __name__ == "__main__":
    main()
