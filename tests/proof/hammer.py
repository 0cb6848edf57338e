"""Many processes do anything to a few users while they and their server are killed; then every word is checked.

    make hammer                                       a minute
    python tests/proof/hammer.py --processes 32 --seconds 3600

Each client writes down what it is about to ask, and then what it was told. Afterwards the database has to explain all
of it: what was acknowledged is there once, what was not is there at most once, the audit finds nothing, and for each
user there is one order of events, the ledger's own, in which every answer was true at some moment between its
question and its arrival (linearizability).
"""

from __future__ import annotations

import argparse
import bisect
import itertools
import json
import math
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import UUID

import sqlalchemy as sa

sys.path.insert(0, str(Path(__file__).parents[1]))

from tallystick import Config, Consume, CreditTransaction, Ledger, migrate
from tallystick.audit import audit
from tallystick.database import engine, translated
from tallystick.devdb import Server
from tallystick.errors import DatabaseError, InsufficientCredits, LedgerError
from worlds import SHAPES, World

HOST = SHAPES["uuid"].host
BEGINS_WITH = 200  # credits of each user


# --- a client ---


class Client:
    """One process's random life, written to a file line by line: a kill loses nothing that was said before it."""

    def __init__(self, url: str, people: dict[str, list[str]], log: Path, seed: int) -> None:
        # as an app has it: statements are compiled once, while connections come and go
        self.engine = engine(url, poolclass=sa.NullPool, isolation_level="AUTOCOMMIT")
        self.ledger = Ledger(Config(database_url=url, host=HOST))
        self.people = {UUID(user): [UUID(workshop) for workshop in theirs] for user, theirs in people.items()}
        self.dice, self.name = random.Random(seed), f"{seed}"
        self.log = log.open("a", buffering=1)
        self.purchases: list[tuple[UUID, UUID]] = []
        self.old: list[tuple[str, list[Any]]] = []

    def live(self, over: Path) -> None:
        number = 0
        while not over.exists():
            try:
                with translated(connecting=True):
                    conn = self.engine.connect()
                with conn:
                    for _ in range(self.dice.randrange(1, 600)):  # then it reconnects
                        if over.exists():
                            return
                        number += 1
                        self.act(conn, f"{self.name}-{number}")
            except DatabaseError:
                time.sleep(self.dice.random() * 0.1)  # what was under way is left open: nobody was told anything

    def act(self, conn: sa.Connection, key: str) -> None:
        dice, user = self.dice, self.dice.choice(list(self.people))
        match dice.choices(["spend", "unlock", "many", "buy", "refund", "balance", "again"], [8, 4, 3, 2, 2, 2, 3])[0]:
            case "spend":
                self.ask(conn, "consume", [user, None, dice.choice((1, 1, 1, 2, 10)), key])
            case "unlock":
                self.ask(conn, "consume", [user, dice.choice(self.people[user]), 1, key])
            case "many":
                count = dice.choice((2, 6, 40))
                items = [[dice.choice(list(self.people)), dice.choice((1, 2)), f"{key}-{n}"] for n in range(count)]
                self.ask(conn, "consume_many", items)
            case "buy":
                started = self.ledger.start_purchase(conn, user, credits=20, description="A pack", key=key)
                self.purchases.append((user, started.id))
                self.ask(conn, "complete", [user, started.id])
            case "refund" if self.purchases:
                self.ask(conn, "refund", [*dice.choice(self.purchases), dice.choice((1, 5, 20)), key])
            case "again" if self.old:
                self.ask(conn, *dice.choice(self.old))
            case _:
                self.ask(conn, "balance", [user])

    def ask(self, conn: sa.Connection, what: str, arguments: list[Any]) -> None:
        self.write({"at": time.monotonic_ns(), "ask": what, "with": arguments})
        try:
            answers: Any = self.call(conn, what, arguments)
        except LedgerError as refusal:
            answers = refusal
        now = time.monotonic_ns()  # before anything else takes time: this is when we were told
        told = answers if isinstance(answers, list) else [answers]
        self.write({"at": now, "told": [said(answer) for answer in told]})
        self.old = [*self.old[-20:], (what, arguments)]

    def call(self, conn: sa.Connection, what: str, arguments: list[Any]) -> Any:
        ledger = self.ledger
        match what, arguments:
            case "consume", [user, workshop, amount, key]:
                return ledger.consume(conn, user, workshop=workshop, amount=amount, key=key)
            case "consume_many", items:
                return ledger.consume_many(conn, [Consume(user, amount=amount, key=key) for user, amount, key in items])
            case "complete", [user, purchase]:
                return ledger.complete_purchase(conn, user, id=purchase)
            case "refund", [user, purchase, credits, key]:
                return ledger.refund(conn, user, purchase, credits=credits, key=key)
            case _, [user]:
                return ledger.balance(conn, user)

    def write(self, entry: dict[str, Any]) -> None:
        self.log.write(json.dumps(entry, default=str) + "\n")


def said(answer: Any) -> list[Any]:
    if isinstance(answer, CreditTransaction):
        return ["row", str(answer.id), answer.sequence, answer.balance_after]
    if isinstance(answer, InsufficientCredits):
        return ["insufficient", str(answer.user), answer.balance, answer.required]
    return ["balance", answer] if isinstance(answer, int) else ["refused", type(answer).__name__]


def client(url: str, people: dict[str, list[str]], logs: Path, seed: int) -> None:
    Client(url, people, logs / f"client-{seed}.jsonl", seed).live(logs / "over")


# --- the hammer ---


@dataclass
class Report:
    """What was done and what was found; ``faults`` is empty, or each is a promise broken."""

    asked: int = 0
    answered: int = 0
    rows: int = 0
    server_kills: int = 0
    client_kills: int = 0
    kinds: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How hard. The two ``…_every_s`` are averages."""

    processes: int
    seconds: float
    server_kill_every_s: float
    client_kill_every_s: float
    seed: int


def hammer(plan: Plan, *, bin_dir: Path | None = None) -> Report:
    """Run it on a server of its own, on disk with fsync on."""
    home = Path(tempfile.mkdtemp(prefix="tallystick-test-hammer-"))
    settings = {"max_connections": str(2 * plan.processes + 20), "shared_buffers": "64MB", "max_wal_size": "1GB"}
    report = Report()
    try:
        with (
            Server(home, settings=settings, bin_dir=bin_dir) as server,
            tempfile.TemporaryDirectory() as logs,
        ):
            world = World(server.create_database("app"), HOST)
            with world.engine.begin() as conn:
                conn.exec_driver_sql(SHAPES["uuid"].ddl)
            migrate.apply(world.url, world.config)
            users = [world.user(credits=BEGINS_WITH) for _ in range(max(3, plan.processes // 4))]
            people = {str(user): [str(world.workshop(user)) for _ in range(30)] for user in users}
            strike(plan, world.url, people, server, Path(logs), report)
            check(world, Path(logs), report)
    finally:
        shutil.rmtree(home)
    return report


def strike(plan: Plan, url: str, people: dict[str, list[str]], server: Server, logs: Path, report: Report) -> None:
    context, dice = multiprocessing.get_context("spawn"), random.Random(plan.seed)
    seeds = itertools.count(plan.seed * 10_000)

    def start() -> Any:
        process = context.Process(target=client, args=(url, people, logs, next(seeds)))
        process.start()
        return process

    crowd = [start() for _ in range(plan.processes)]
    while len(list(logs.glob("client-*"))) < plan.processes:  # the clock starts once they all live
        time.sleep(0.02)
    until = time.time() + plan.seconds
    next_server, next_client = (time.time() + s for s in (plan.server_kill_every_s, plan.client_kill_every_s))
    while time.time() < until:
        time.sleep(0.02)
        if time.time() > next_client:
            victim = dice.randrange(plan.processes)
            crowd[victim].kill()
            crowd[victim].join()
            crowd[victim] = start()
            report.client_kills += 1
            next_client = time.time() + plan.client_kill_every_s * (0.5 + dice.random())
        if time.time() > next_server:
            pid = int((server.folder / "server" / "data" / "postmaster.pid").read_text().split()[0])
            os.kill(pid, dice.choice((signal.SIGKILL, signal.SIGQUIT)))
            while server.running:
                time.sleep(0.005)
            server.start()
            report.server_kills += 1
            next_server = time.time() + plan.server_kill_every_s * (0.5 + dice.random())
    (logs / "over").touch()
    for process in crowd:
        process.join(120)
        if process.exitcode:
            report.faults.append(f"a client ended with {process.exitcode}")


# --- the check ---


@dataclass
class Event:
    """When a row was first asked for, and when somebody was first told of it; in nanoseconds of one clock."""

    asked: float = math.inf
    told: float = math.inf


def conversations(folder: Path) -> Iterator[tuple[dict[str, Any], dict[str, Any] | None]]:
    for log in sorted(folder.glob("client-*.jsonl")):
        question: dict[str, Any] | None = None
        for line in log.read_text().splitlines():
            try:
                entry = json.loads(line)
            except json.JSONDecodeError:
                continue  # the client was killed while it wrote
            if "ask" in entry:
                if question:
                    yield question, None
                question = entry
            elif question:
                yield question, entry
                question = None
        if question:
            yield question, None


def names(question: dict[str, Any]) -> list[tuple[str, str]]:
    """For each answer, whose and which row it is about: by key, or by the purchase."""
    match question["ask"], question["with"]:
        case "consume", [user, _, _, key]:
            return [(user, key)]
        case "consume_many", items:
            return [(user, key) for user, _, key in items]
        case "complete", [user, purchase]:
            return [(user, purchase)]
        case "refund", [user, _, _, key]:
            return [(user, key)]
        case _, [user]:
            return [(user, "")]


def check(world: World, logs: Path, report: Report) -> None:
    row = world.schema.credit_transactions.c
    with world.autocommit.connect() as conn:
        report.faults += [str(finding) for finding in audit(conn, world.config).findings if finding.fault]
        rows = conn.execute(sa.select(world.schema.credit_transactions).where(row.status == "completed")).all()
    report.rows = len(rows)
    books = Books(rows, report)
    for question, answer in conversations(logs):
        books.asked(question)
        if answer is not None:
            for (user, _), told in zip(names(question), answer["told"], strict=True):
                books.told(user, told, question["at"], answer["at"])
    chains: dict[str, list[Any]] = defaultdict(list)
    for one in rows:
        chains[str(one.user_id)].append(one)
    for user, chain in chains.items():
        chain.sort(key=lambda one: one.sequence)
        report.faults += unexplained(chain, books.events, books.balances[user])


class Books:
    """The ledger's rows, and when each was asked for and told of."""

    def __init__(self, rows: Sequence[Any], report: Report) -> None:
        self.report = report
        self.by_id = {str(row.id): row for row in rows}
        self.by_name: dict[tuple[str, str], list[Any]] = defaultdict(list)
        for row in rows:
            for name in {row.idempotency_key, str(row.id) if row.type == "purchase" else None} - {None}:
                self.by_name[str(row.user_id), name].append(row)
        twice = (name for name, found in self.by_name.items() if len(found) > 1)
        report.faults += [f"{name} is there more than once" for name in twice]
        self.events: dict[str, Event] = defaultdict(Event)
        self.balances: dict[str, list[tuple[int, float, float]]] = defaultdict(list)  # told, asked at, told at

    def asked(self, question: dict[str, Any]) -> None:
        self.report.asked += 1
        self.report.kinds[question["ask"]] += 1
        for name in names(question):
            for row in self.by_name.get(name, ()):
                event = self.events[str(row.id)]
                event.asked = min(event.asked, question["at"])

    def told(self, user: str, answer: list[Any], since: float, until: float) -> None:
        self.report.answered += 1
        match answer:
            case ["row", id, sequence, balance]:
                found = self.by_id.get(id)
                if found is None or (found.sequence, found.balance_after) != (sequence, balance):
                    self.report.faults.append(f"told of row {id} ({sequence}, {balance}); the ledger has {found}")
                event = self.events[id]
                event.told = min(event.told, until)
                # a workshop's row may have been asked for under a key of somebody who was not answered
                event.asked = min(event.asked, since)
            case ["insufficient", _, balance, required]:
                if balance >= required:
                    self.report.faults.append(f"refused {required} credits with a balance of {balance}")
                self.balances[user].append((balance, since, until))
            case ["balance", balance]:
                self.balances[user].append((balance, since, until))
            case ["refused", kind]:
                self.report.kinds[kind] += 1


def unexplained(chain: list[Any], events: dict[str, Event], told_balances: list[tuple[int, float, float]]) -> list[str]:
    """What contradicts the order in which the ledger says that things happened to this user."""
    faults = []
    # the setting-up came before all questions
    asked = [0.0 if one.sequence == 1 else events[str(one.id)].asked for one in chain]
    told = [0.0 if one.sequence == 1 else events[str(one.id)].told for one in chain]
    latest = 0.0
    for one, question, answer in zip(chain, asked, told, strict=True):
        if question == math.inf:
            faults.append(f"{one} is there though nobody asked for it")
        # whoever was told of this row, was told after all earlier rows were asked for
        latest = max(latest, question)
        if answer < latest:
            faults.append(f"{one} was told of before a row that stands ahead of it was asked for")
    # State n holds from some moment after asked[n] until some moment before told[n + 1]: an answer of its balance is
    # right if that span meets the answer's own. Both bounds are made monotone, as the order itself is.
    begins = _running_max(asked)
    ends = _running_min_from_right([*told[1:], math.inf])
    places: dict[int, list[int]] = defaultdict(list)
    for n, one in enumerate(chain):
        places[one.balance_after].append(n)
    for balance, since, until in told_balances:
        first = bisect.bisect_left(ends, since)  # the first state that may still have held when it was asked
        last = bisect.bisect_right(begins, until) - 1  # the last one that may have held when it was told
        at = places.get(balance, [])
        n = bisect.bisect_left(at, first)
        if n == len(at) or at[n] > last:
            faults.append(f"{chain[0].user_id} was told of a balance of {balance}, which was at no moment between")
    return faults


def _running_max(values: list[float]) -> list[float]:
    found, highest = [], -math.inf
    for value in values:
        highest = max(highest, value)
        found.append(highest)
    return found


def _running_min_from_right(values: list[float]) -> list[float]:
    return [-value for value in reversed(_running_max([-value for value in reversed(values)]))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--server-kill-every", type=float, default=3, metavar="S", help="on average")
    parser.add_argument("--client-kill-every", type=float, default=2, metavar="S", help="on average")
    parser.add_argument("--seed", type=int, default=int(time.time()))
    asked = parser.parse_args()
    plan = Plan(
        processes=asked.processes,
        seconds=asked.seconds,
        server_kill_every_s=asked.server_kill_every,
        client_kill_every_s=asked.client_kill_every,
        seed=asked.seed,
    )
    report = hammer(plan)
    kinds = ", ".join(f"{kind} {count:,}" for kind, count in report.kinds.most_common())
    print(
        f"{plan}\n"
        f"{report.asked:,} questions asked, {report.answered:,} answers told; {report.rows:,} rows in the ledger\n"
        f"server killed {report.server_kills} times, clients {report.client_kills} times\n{kinds}",
        *report.faults[:50],
        f"{len(report.faults)} faults",
        sep="\n",
    )
    sys.exit(bool(report.faults))


if __name__ == "__main__":
    main()
