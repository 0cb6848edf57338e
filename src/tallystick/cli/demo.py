"""The whole story on a throw-away database: adopt, migrate under traffic, seed, sell, spend, refund, audit."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tallystick import audit, migrate, seed
from tallystick.cli.migrations import show_plan
from tallystick.config import Config
from tallystick.database import connect, engine
from tallystick.demo import PACKS, Traffic, build_host_app, crowd
from tallystick.devdb import Server

SOME_TRAFFIC_S = 1.0

_ACKNOWLEDGED = """
SELECT type::text, count(*) FROM credit_transactions
WHERE idempotency_key LIKE 'demo-%%' AND status = 'completed' GROUP BY 1
"""


def run(console: Console, *, users: int = 200_000, workshops: int = 300_000, seconds: float = 3.0) -> bool:
    """Play the whole story on a database of its own, which is gone afterwards.

    Returns:
        Whether every promise held.

    Raises:
        DevServerError: there is no embedded PostgreSQL to play on.
    """
    began = time.perf_counter()
    kept = _Promises(console)
    with tempfile.TemporaryDirectory(prefix="tallystick-demo-") as folder:
        Path(folder).chmod(0o755)  # root's server runs as another account, which must get in
        with Server(Path(folder, "server")) as server:
            story = _Story(console, server, kept)
            story.adopt(users, workshops)
            story.migrate()
            story.sell(seconds)
            story.audit()
    console.print(kept.table(f"Tallystick's promises, in {time.perf_counter() - began:.0f} seconds"))
    return kept.all


class _Promises:
    """What was promised, what was seen, and whether that is the same."""

    def __init__(self, console: Console) -> None:
        self.console = console
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


class _Story:
    """One telling; each method is a chapter."""

    def __init__(self, console: Console, server: Server, kept: _Promises) -> None:
        self.console = console
        self.server = server
        self.kept = kept
        self.url = server.create_database("app")
        self.config = Config(database_url=self.url, packs=PACKS)
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
        self.chapter("An app that knows nothing of credits")
        build_host_app(self.url, users=users, workshops=workshops)
        with connect(self.url) as conn:
            self.config = self.config.model_copy(update={"host": migrate.propose(conn)})
        self.say(f"PostgreSQL {self.server.version} with {users:,} users and {workshops:,} workshops.")
        self.chapter("The plan")
        with connect(self.url) as conn:
            show_plan(self.console, migrate.plan(conn, self.config), brief=True)

    def migrate(self) -> None:
        self.chapter("The migration, while the old app goes on working")
        traffic = Traffic.of(self.url)
        with traffic.flowing():
            time.sleep(SOME_TRAFFIC_S)
            usual, began = traffic.median_ms(), time.perf_counter()
            receipt = migrate.apply(self.url, self.config)
            time.sleep(SOME_TRAFFIC_S)
        locked = sum(step.locked_ms for step in receipt.steps)
        worst, errors = traffic.worst_ms(since=began), sum(traffic.errors.values())
        self.say(
            f"Tables locked for {locked:.1f} ms. Live traffic went on before, meanwhile and after: "
            f"{len(traffic.latencies_ms):,} statements, median {usual:.1f} ms, worst since it began {worst:.0f} ms, "
            f"{errors} failed."
        )
        for error, times in traffic.errors.items():
            self.say(f"{times} times {error}")
        self.kept.add(
            "The migration is all or nothing, and live traffic does not feel it",
            f"tables locked for {locked:.1f} ms, worst stall {worst:.0f} ms, {errors} errors",
            errors == 0,
        )
        users = self.count(
            "SELECT count(*) FROM users WHERE credit_balance <> 0 OR onboarding_complete OR plan_tier <> 'free'"
        )
        workshops = self.count("SELECT count(credit_consumed_at) FROM workshops")
        with connect(self.url) as conn:
            status = migrate.status(conn, self.config)
        self.kept.add(
            "Every existing user has 0 credits and incomplete onboarding, every workshop is unconsumed",
            f"{users} users and {workshops} workshops differ; {len(status.drift)} differences from the schema",
            not users and not workshops and status.healthy,
        )

    def sell(self, seconds: float) -> None:
        pool = engine(self.url, pool_size=16)
        try:
            self.chapter("Seed data to develop against")
            # 200,000 users do not look like development, which is what this database is
            seeded = seed.seed(pool, self.config, force_production=True)
            self.say(f"{len(seeded.scenarios)} scenarios, from a funded user to one in debt.")
            self.chapter(f"16 threads buy, unlock, retry and overdraw for {seconds:.0f} seconds")
            done = crowd(pool, self.config, seconds=seconds)
        finally:
            pool.dispose()
        self.say(
            f"{done.bought:,} purchases, {done.unlocked:,} credits spent, {done.refunded:,} refunds, "
            f"{done.refused:,} refusals for want of credits, {done.replayed:,} repeated calls that changed nothing."
        )
        with connect(self.url) as conn:
            in_ledger = {type_: rows for type_, rows in conn.exec_driver_sql(_ACKNOWLEDGED)}  # noqa: C416 - rows are no pairs to mypy
        granted, spent = in_ledger.get("purchase", 0), in_ledger.get("consumption", 0)
        overdrawn = self.count(
            "SELECT count(*) FROM credit_transactions WHERE type = 'consumption' AND balance_after < 0"
        )
        self.kept.add(
            "Nothing is counted twice and nothing is lost",
            f"acknowledged {done.bought:,} purchases and {done.unlocked:,} credits spent; "
            f"in the ledger {granted:,} and {spent:,}",
            (done.bought, done.unlocked) == (granted, spent),
        )
        self.kept.add(
            "A credit that isn't there is never spent",
            f"{done.refused:,} times refused, {overdrawn} times overdrawn",
            overdrawn == 0 and done.refused > 0,
        )

    def audit(self) -> None:
        self.chapter("The audit")
        with connect(self.url, autocommit=True) as conn:
            report = audit.audit(conn, self.config)
        self.say(f"{report.users:,} users and {report.rows:,} rows checked in {report.seconds:.1f} s.")
        self.kept.add(
            "A balance never lies", f"{sum(f.fault for f in report.findings)} faults found by the audit", report.clean
        )
        self.console.print()
