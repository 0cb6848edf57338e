"""The demo, on a temporary database: adopt, migrate under traffic, seed, sell, spend, refund, audit."""

from __future__ import annotations

import dataclasses
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import sqlalchemy as sa
from rich.console import Console
from rich.table import Table

from tallystick import audit, migrate, stripe
from tallystick.cli.migrations import show_plan
from tallystick.config import Config
from tallystick.database import connect, engine
from tallystick.dev import seed
from tallystick.dev.demo_app import LOOK_EVERY_S, Traffic, build_host_app, trade_concurrently
from tallystick.dev.postgres import Server
from tallystick.dev.stripe import DevStripe
from tallystick.errors import DevStripeError
from tallystick.ledger import Ledger
from tallystick.signals import Cleanup

SOME_TRAFFIC_S = 1.5
FELT_MS = 250
"""A longer wait for a table is noticeable, unless statements took as long before the migration."""

_ACKNOWLEDGED = """
SELECT type::text, count(*) FROM public.credit_transactions
WHERE idempotency_key LIKE 'demo-%%' AND status = 'completed' GROUP BY 1
"""


def run(console: Console, *, users: int = 200_000, workshops: int = 300_000, seconds: float = 3.0) -> bool:
    """Run the demo on a database of its own, which is removed afterwards.

    Returns:
        True if every promise held.

    Raises:
        DevServerError: there is no embedded PostgreSQL.
    """
    began = time.perf_counter()
    promises = _Promises()
    with Cleanup() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="tallystick-demo-")))
        folder.chmod(0o755)  # root's server runs as another account, which must be able to enter
        demo = _Demo(console, stack.enter_context(Server(folder / "server")), promises)
        demo.adopt(users, workshops)
        demo.migrate()
        demo.sell(seconds)
        demo.checkout()
        demo.audit()
    console.print(promises.table(f"Tallystick's promises, in {time.perf_counter() - began:.0f} seconds"))
    return promises.all


@contextmanager
def closing_pool(url: str) -> Iterator[sa.Engine]:
    """An engine with a connection for each thread, closed afterwards."""
    pool = engine(url, pool_size=16)
    try:
        yield pool
    finally:
        pool.dispose()


class _Promises:
    """The promises, each with its measurement and verdict."""

    def __init__(self) -> None:
        self.rows: list[tuple[str, str, bool]] = []

    def add(self, promise: str, seen: str, held: bool) -> None:
        self.rows.append((promise, seen, held))

    @property
    def all(self) -> bool:
        return all(held for _, _, held in self.rows)

    def table(self, title: str) -> Table:
        made = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
        for column in ("", "promised", "seen"):
            made.add_column(column, overflow="fold")
        for promise, seen, held in self.rows:
            made.add_row("[green]yes[/]" if held else "[red]NO[/]", promise, seen)
        return made


class _Demo:
    """One run of the demo; each method is a chapter."""

    def __init__(self, console: Console, server: Server, promises: _Promises) -> None:
        self.console = console
        self.server = server
        self.promises = promises
        self.url = server.create_database("app")
        self.config = Config(database_url=self.url, packs=seed.DEFAULT_PACKS)
        self.chapters = 0

    def chapter(self, title: str) -> None:
        self.chapters += 1
        self.console.print(f"\n[bold]{self.chapters}. {title}[/]")

    def say(self, line: str) -> None:
        self.console.print(f"   {line}")

    def count(self, query: str) -> int:
        with connect(self.url) as conn:
            return int(conn.exec_driver_sql(query).scalar_one())

    def adopt(self, users: int, workshops: int) -> None:
        self.chapter("An app without credits")
        build_host_app(self.url, users=users, workshops=workshops)
        with connect(self.url) as conn:
            self.config = self.config.model_copy(update={"host": migrate.propose(conn)})
        self.say(f"PostgreSQL {self.server.version} with {users:,} users and {workshops:,} workshops.")
        self.chapter("The plan")
        with connect(self.url) as conn:
            show_plan(self.console, migrate.plan(conn, self.config))

    def migrate(self) -> None:
        self.chapter("The migration, while the old app goes on working")
        traffic = Traffic.of(self.url)
        with traffic.running():
            time.sleep(SOME_TRAFFIC_S)
            usual, before, began = traffic.median_ms(), traffic.worst_ms(), time.perf_counter()
            receipt = migrate.apply(self.url, self.config)
            time.sleep(SOME_TRAFFIC_S)
        worst, errors = traffic.worst_ms(since=began), sum(traffic.errors.values())
        waited = traffic.waited_ms(since=began)
        waits = f"under {1000 * LOOK_EVERY_S:.0f} ms" if waited == 0 else f"{waited:.0f} ms"  # too short to be seen
        self.say(
            f"Tables locked for {receipt.locked_ms:.1f} ms. Live traffic went on before, meanwhile and after: "
            f"{len(traffic.latencies_ms):,} statements, median {usual:.1f} ms, {errors} failed. The slowest took "
            f"{before:.0f} ms before the migration, and {worst:.0f} ms since it began; the longest wait for a table "
            f"was {waits}."
        )
        for error, times in traffic.errors.items():
            self.say(f"{times} times {error}")
        self.promises.add(
            "The migration is all or nothing, and live traffic goes on beside it",
            f"tables locked for {receipt.locked_ms:.1f} ms, longest wait for a table {waits}, slowest "
            f"statement {worst:.0f} ms ({before:.0f} ms before), {errors} errors",
            # the latency itself also grows with the other work of a machine
            errors == 0 and waited <= max(FELT_MS, 4 * before),
        )
        users = self.count(
            "SELECT count(*) FROM public.users WHERE credit_balance <> 0 OR onboarding_complete OR plan_tier <> 'free'"
        )
        workshops = self.count("SELECT count(credit_consumed_at) FROM public.workshops")
        with connect(self.url) as conn:
            status = migrate.status(conn, self.config)
        self.promises.add(
            "Every existing user has 0 credits and incomplete onboarding, every workshop is unconsumed",
            f"{users} users and {workshops} workshops differ; {len(status.drift)} differences from the schema",
            not users and not workshops and status.healthy,
        )

    def sell(self, seconds: float) -> None:
        with closing_pool(self.url) as pool:
            self.chapter("Seed data to develop against")
            # with 200,000 users it does not look like a development database, which it is
            seeded = seed.seed(pool, self.config, force_production=True)
            self.say(f"{len(seeded.scenarios)} scenarios, from a funded user to one in debt.")
            self.chapter(f"16 threads buy, unlock, retry and overdraw for {seconds:.0f} seconds")
            done = trade_concurrently(pool, self.config, seconds=seconds)
        self.say(
            f"{done.bought:,} purchases, {done.unlocked:,} credits spent, {done.refunded:,} refunds, "
            f"{done.refused:,} refusals for want of credits, {done.replayed:,} repeated calls that changed nothing."
        )
        with connect(self.url) as conn:
            in_ledger = {type_: rows for type_, rows in conn.exec_driver_sql(_ACKNOWLEDGED)}  # noqa: C416 - rows are no pairs to mypy
        granted, spent = in_ledger.get("purchase", 0), in_ledger.get("consumption", 0)
        overdrawn = self.count(
            "SELECT count(*) FROM public.credit_transactions WHERE type = 'consumption' AND balance_after < 0"
        )
        self.promises.add(
            "Nothing is counted twice and nothing is lost",
            f"acknowledged {done.bought:,} purchases and {done.unlocked:,} credits spent; "
            f"in the ledger {granted:,} and {spent:,}",
            (done.bought, done.unlocked) == (granted, spent),
        )
        self.promises.add(
            "A credit that isn't there is never spent",
            f"{done.refused:,} times refused, {overdrawn} times overdrawn",
            overdrawn == 0 and done.refused > 0,
        )

    def checkout(self) -> None:
        """A purchase, its webhook twice, and a partial refund: with the real SDK, against the test double."""
        self.chapter("A sale through Stripe Checkout, with a double on this machine in Stripe's place")
        origin = "http://127.0.0.1:8000"
        with DevStripe() as double, closing_pool(self.url) as pool:
            at_double = {"stripe_secret_key": double.secret_key, "stripe_api_base": double.url}
            shop = self.config.model_copy(update=at_double | {"checkout_origins": (origin,)})
            made = stripe.setup(shop, endpoint_url=f"{origin}/webhook")
            if made.endpoint is None or made.endpoint.secret is None:
                raise DevStripeError("the double made no webhook endpoint; report this as a fault of Tallystick")
            prices = {one.pack: one.price for one in made.packs}
            packs = tuple(dataclasses.replace(pack, stripe_price_id=prices[pack.name]) for pack in shop.packs)
            shop = shop.model_copy(update={"packs": packs, "stripe_webhook_secret": made.endpoint.secret})
            double.hold()  # the deliveries are made below
            pack = packs[-1]
            with connect(self.url) as conn:
                buyer = conn.scalar(sa.text("SELECT id FROM public.users WHERE email = 'user9@example.com'"))
                before = Ledger(shop).balance(conn, buyer)
            bought = stripe.checkout(
                pool, shop, buyer, pack.name, key="demo-checkout",
                success_url=f"{origin}/done", cancel_url=f"{origin}/packs",
            )  # fmt: skip
            self.say(f"A pending purchase of {pack.credits} credits, then a Checkout Session at Stripe.")
            double.pay(bought.session)
            deliveries: Counter[str] = Counter()

            def deliver() -> None:
                for delivery in double.held():
                    body, signature = double.signed(delivery["event"], delivery["endpoint"])
                    for _ in range(2):
                        outcome = stripe.receive(pool, shop, body.encode(), signature).outcome
                        deliveries[f"{delivery['type']}: {outcome}"] += 1

            deliver()
            with connect(self.url) as conn:
                paid = Ledger(shop).balance(conn, buyer)
            self.say(f"The buyer pays, every webhook arrives twice: balance {before} → {paid}.")
            session = double.account.objects["checkout.session"][bought.session]
            double.refund(session["payment_intent"], amount=-(-session["amount_total"] // 3))
            deliver()
            with connect(self.url) as conn:
                after = Ledger(shop).balance(conn, buyer)
            self.say(f"A third of the money goes back from Stripe's dashboard: balance {paid} → {after}.")
        self.promises.add(
            "A webhook that arrives twice counts once",
            f"{sum(deliveries.values())} deliveries, balance {before} → {paid} → {after}",
            (paid - before, after - paid) == (pack.credits, -1),
        )

    def audit(self) -> None:
        self.chapter("The audit")
        with connect(self.url) as conn:
            report = audit.audit(conn, self.config)
        self.say(f"{report.users:,} users and {report.rows:,} rows checked in {report.seconds:.1f} s.")
        self.promises.add(
            "Every balance follows from the ledger",
            f"{sum(f.fault for f in report.findings)} faults found by the audit",
            report.clean,
        )
        self.console.print()
