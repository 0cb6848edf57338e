"""Many processes send random calls for a few users while they and their server are killed; then all is checked.

    make hammer                                       a minute
    python tests/proof/hammer.py --processes 32 --seconds 3600

Each client logs each question before it sends it, and each answer. Afterwards the database must explain the logs:

1. An acknowledged write is there once, as it was asked for; any other is there at most once.
2. Nothing was refused without a reason, and the audit finds nothing.
3. For each user there is one order of events, the ledger's own, in which every answer was true at some moment between
   its question and its arrival (linearizability).
"""

from __future__ import annotations

import argparse
import bisect
import datetime as dt
import itertools
import json
import logging
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
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import sqlalchemy as sa

sys.path.insert(0, str(Path(__file__).parents[1]))

import node_packages
from clients import (
    AUTOCOMMIT,
    LEVELS,
    PATIENCE_S,
    ROW,
    Combined,
    Driver,
    NoAnswer,
    Node,
    NodeProcess,
    Psql,
    Psycopg,
    Request,
    SqlAlchemy,
    facts,
)
from tallystick import Config, Ledger, migrate
from tallystick.audit import audit
from tallystick.database import engine
from tallystick.dev.postgres import Server
from tallystick.ledger.combiner import Combiner
from tallystick.ledger.typescript import typescript
from worlds import SHAPES, World

HOST = SHAPES["uuid"].host
BEGINS_WITH = 200  # credits of each user
WORKSHOPS = 1_000  # of each user
USERS = "people.json"  # in a file, since it is larger than a pipe's buffer


class Question(NamedTuple):
    """Calls through a driver: one database transaction of an isolation level, or a transaction each."""

    driver: str
    level: str
    calls: list[list[Request]]


class App(NamedTuple):
    """A process of clients, as an app: the number of threads, and the drivers and levels that they use."""

    threads: int
    drivers: Sequence[tuple[str, str]]


SINGLE = App(1, [("SQLAlchemy", AUTOCOMMIT)])
APPS = (
    SINGLE,
    App(4, [("SQLAlchemy", level) for level in LEVELS]),
    App(4, [("Combiner", AUTOCOMMIT), ("Combiner", AUTOCOMMIT), ("SQLAlchemy", AUTOCOMMIT)]),
    App(2, [*3 * [("psycopg", AUTOCOMMIT)], *[("psycopg", level) for level in LEVELS]]),
    App(4, [*3 * [("pg", AUTOCOMMIT), ("neon-http", AUTOCOMMIT)], *itertools.product(("pg", "neon-http"), LEVELS)]),
    App(2, [*3 * [("psql", AUTOCOMMIT)], *[("psql", level) for level in LEVELS]]),
)
"""The first, seventh and so on of the processes is the first of these."""

IN_NODE = {"pg", "neon-http"}


# --- a client ---


class Client:
    """A client that sends random calls, and logs line by line, so that a kill loses nothing logged before."""

    def __init__(
        self,
        drivers: Mapping[str, Driver],
        app: App,
        users: Mapping[str, Sequence[str]],
        logs: Path,
        name: str,
    ) -> None:
        self.drivers, self.app, self.users, self.name = drivers, app, users, name
        self.rng, self.numbers = random.Random(name), itertools.count(1)
        self.log = (logs / f"client-{name}.jsonl").open("a", buffering=1)
        self.questions, self.over = (logs / "questions").open("ab", buffering=0), logs / "over"
        self.purchases: list[tuple[str, str]] = []
        self.held: list[tuple[str, str, int]] = []
        self.old: list[Question] = []

    def run(self) -> None:
        while not self.over.exists():
            question = self.next_question()
            self.old = [*self.old[-20:], question]
            self.questions.write(b".")
            while not self.ask(question) and not self.over.exists():
                pass
            if self.rng.random() < 1 / 300:
                self.drivers[question.driver].close()  # it connects again
        for driver in self.drivers.values():
            driver.close()

    def ask(self, question: Question) -> bool:
        """True if there was an answer; if not, the same calls may be made again with the same keys.

        The answers of a transaction are returned after its commit.
        """
        driver, level, calls = question
        self.write({"at": time.monotonic_ns(), "driver": f"{driver}, {level}", "calls": calls})
        try:
            answers = self.drivers[driver].ask(level, calls)
        except NoAnswer as reason:
            time.sleep(self.rng.random() * (0.3 if reason.connecting else 0.03))
            return False
        now = time.monotonic_ns()  # at once: the time of the answer
        self.write({"at": now, "answers": answers})
        bought = [(answer[3], answer[2]) for answer in answers if answer[0] == "row" and answer[4] == "purchase"]
        self.purchases += bought
        self.held += [
            (answer[3], answer[2], -answer[5]) for answer in answers if answer[0] == "row" and answer[7] is None
        ]
        return True

    def write(self, entry: dict[str, Any]) -> None:
        self.log.write(json.dumps(entry, default=str) + "\n")

    # --- random questions ---

    def next_question(self) -> Question:
        if self.old and self.rng.random() < 0.15:
            return self.rng.choice(self.old)
        driver, level = self.rng.choice(self.app.drivers)
        alone = level == AUTOCOMMIT and driver != "Combiner"
        return Question(
            driver, level, [self.call(driver, level) for _ in range(1 if alone else self.rng.choice((1, 2, 3)))]
        )

    def call(self, driver: str, level: str) -> list[Request]:  # noqa: PLR0911 - as above
        rng, user = self.rng, self.rng.choice(list(self.users))
        whats = {"spend": 12, "many": 3, "buy": 5, "refund": 3, "reinstate": 2, "grant": 1, "balance": 2}
        whats |= {"lend": 1, "hold": 4, "capture": 3, "release": 1}
        if driver == "neon-http" and level != AUTOCOMMIT:
            del whats["buy"]  # two calls, of which the second needs what the first gives: no batch
        match "spend" if driver == "Combiner" else rng.choices(list(whats), list(whats.values()))[0]:
            case "spend":
                return [self.spending(rng.choice((1, 1, 1, 2, 10)))]
            case "many":
                count = rng.choice((2, 6, 40 if level == AUTOCOMMIT else 10))
                return [self.spending(rng.choice((1, 2))) for _ in range(count)]
            case "buy":
                return [Request("buy", user, rng.choice((self.key(), f"common pack {moment()}")), 20)]
            case "grant":
                return [Request("grant", user, self.key(), rng.choice((1, 5)))]
            case "lend":
                until = dt.datetime.now(dt.UTC) + dt.timedelta(seconds=rng.choice((0.2, 2)))
                return [
                    Request("lend", next(iter(self.users)), self.key(), 5, until.isoformat(timespec="milliseconds"))
                ]
            case "hold":
                return [Request("hold", user, rng.choice((self.key(), f"common hold {moment()}")), 4)]
            case "capture" | "release" as what if self.held:
                whose, hold, held = rng.choice(self.held[-6:])
                part = 1 if int(hold[-1], 16) % 2 else held  # the same for all who ask
                return [Request(what, whose, None, part if what == "capture" else 0, hold)]
            case "refund" | "reinstate" as what if self.purchases:
                whose, purchase = rng.choice(self.purchases[-6:])
                return [Request(what, whose, self.key(), rng.choice((1, 1, 5, 20)), purchase)]
            case _:
                return [Request("balance", user)]

    def spending(self, amount: int) -> Request:
        """A consumption; some are for a workshop, or under a key, that other clients use at the same moment."""
        user, workshops = self.rng.choice(list(self.users.items()))
        match self.rng.choices(["own key", "common key", "workshop"], [6, 1, 3])[0]:
            case "own key":
                return Request("consume", user, self.key(), amount)
            case "common key":
                return Request("consume", user, f"common {moment()}", 1)
            case _:
                workshop = workshops[(moment() + self.rng.randrange(3)) % len(workshops)]
                return Request("consume", user, self.key(), 1, workshop)

    def key(self) -> str:
        return f"{self.name}-{next(self.numbers)}"


def moment() -> int:
    """A number that is the same for all clients at about the same time."""
    return time.monotonic_ns() // 50_000_000


def client(url: str, app: App, logs: Path, program: Path | None, env: Mapping[str, str], seed: int) -> None:
    os.setpgrp()  # its child processes are killed with it
    logging.getLogger("psycopg").disabled = True  # connections die on purpose here
    users = json.loads((logs / USERS).read_text())
    pool, ledger, node = engine(url), Ledger(Config(database_url=url, host=HOST)), NodeProcess(program, env)

    def drivers() -> dict[str, Driver]:
        return {
            "SQLAlchemy": SqlAlchemy(ledger, pool),
            "Combiner": Combined(combiner),
            "psycopg": Psycopg(ledger, url),
            "pg": Node(node, "pg"),
            "neon-http": Node(node, "neon-http"),
            "psql": Psql(env),
        }

    with closing(node), Combiner(ledger, pool) as combiner, ThreadPoolExecutor(app.threads) as threads:
        runs = [Client(drivers(), app, users, logs, f"{seed}-{n}").run for n in range(app.threads)]
        for run in [threads.submit(run) for run in runs]:
            run.result()


# --- the hammer ---


@dataclass
class Report:
    """The counts and the faults of a run; each of ``faults`` is a broken promise."""

    asked: int = 0
    answered: int = 0
    rows: int = 0
    server_kills: int = 0
    client_kills: int = 0
    kinds: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The load, and its end: the earlier of ``seconds`` and ``questions``. The two ``…_every_s`` are averages.

    A busy machine takes long to start the server again: the end is later, until it was killed ``server_kills`` times.
    """

    processes: int
    seconds: float
    questions: float = math.inf
    server_kill_every_s: float
    server_kills: int = 0
    client_kill_every_s: float
    seed: int
    apps: Sequence[App] = field(default=APPS, repr=False)


def hammer(plan: Plan, *, bin_dir: Path | None = None) -> Report:
    """Run it on a server of its own, on disk with fsync on."""
    home = Path(tempfile.mkdtemp(prefix="tallystick-test-hammer-"))
    settings = {
        "max_connections": str(8 * plan.processes + 20),
        "shared_buffers": "64MB",
        "max_wal_size": "1GB",
        "deadlock_timeout": "50ms",  # transactions meet in any order
    }
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
            (Path(logs) / USERS).write_text(json.dumps(create_users(world, max(3, plan.processes // 4))))
            run_and_kill(plan, world.url, server, Path(logs), report)
            check(world, Path(logs), report)
    finally:
        shutil.rmtree(home)
    return report


def create_users(world: World, count: int) -> dict[str, list[str]]:
    """So many users, with credits, and their workshops."""
    users, workshops = [world.user(credits=BEGINS_WITH) for _ in range(count)], world.schema.workshops
    assert workshops is not None
    by_user = {user: [world.key("uuid") for _ in range(WORKSHOPS)] for user in users}
    with world.engine.begin() as conn:
        for user, some in by_user.items():
            conn.execute(sa.insert(workshops), [{"key": one, "owner": user, "title": "A workshop"} for one in some])
    return {str(user): [str(one) for one in some] for user, some in by_user.items()}


def node_program(folder: Path) -> Path:
    """The clients in Node, bundled with the client that ``tallystick client typescript`` writes."""
    sources = Path(__file__).parents[1] / "typescript"
    app = node_packages.project(sources, folder)
    for name in ("hammer.ts", "neon_double.ts", "database.ts"):
        shutil.copy(sources / "src" / name, folder)
    app.write("tallystick.ts", typescript(HOST))
    bundle = ["--bundle", "--platform=node", "--format=esm", "--packages=external", "--outfile=hammer.mjs"]
    app.run("esbuild", "hammer.ts", *bundle)
    return folder / "hammer.mjs"


def run_and_kill(plan: Plan, url: str, server: Server, logs: Path, report: Report) -> None:
    context, rng = multiprocessing.get_context("spawn"), random.Random(plan.seed)
    seeds = itertools.count(plan.seed * 10_000)
    in_node = any(driver in IN_NODE for app in plan.apps[: plan.processes] for driver, _ in app.drivers)
    program = node_program(logs) if in_node else None
    path = f"{server.bin}{os.pathsep}{server.env['PATH']}"  # its own psql
    env = server.env | {"PATH": path, "PGDATABASE": str(sa.make_url(url).database)}

    def start(number: int) -> Any:
        app = plan.apps[number % len(plan.apps)]
        process = context.Process(target=client, args=(url, app, logs, program, env, next(seeds)), daemon=True)
        process.start()
        return process

    running = [start(number) for number in range(plan.processes)]
    while len(list(logs.glob("client-*-0.jsonl"))) < plan.processes:  # the clock starts once all are running
        time.sleep(0.02)
    until, questions = time.time() + plan.seconds, logs / "questions"
    questions.touch()  # a client may be slow to its first question
    next_server, next_client = (time.time() + s for s in (plan.server_kill_every_s, plan.client_kill_every_s))
    while questions.stat().st_size < plan.questions and (
        time.time() < until or report.server_kills < plan.server_kills
    ):
        time.sleep(0.02)
        if time.time() > next_client:
            victim = rng.randrange(plan.processes)
            if running[victim].exitcode is not None:
                report.faults.append(f"a client ended with {running[victim].exitcode} by itself")
            with suppress(ProcessLookupError):  # it has not started yet
                os.killpg(running[victim].pid, signal.SIGKILL)
            running[victim].kill()
            running[victim].join()
            running[victim] = start(victim)
            report.client_kills += 1
            next_client = time.time() + plan.client_kill_every_s * (0.5 + rng.random())
        if time.time() > next_server:
            pid = int((server.folder / "server" / "data" / "postmaster.pid").read_text().split()[0])
            os.kill(pid, rng.choice((signal.SIGKILL, signal.SIGQUIT)))
            while server.running:
                time.sleep(0.005)
            server.start()
            report.server_kills += 1
            next_server = time.time() + plan.server_kill_every_s * (0.5 + rng.random())
    (logs / "over").touch()
    patience = time.monotonic() + PATIENCE_S
    for process in running:
        process.join(max(0.0, patience - time.monotonic()))
        if process.exitcode != 0:  # None: it hangs
            report.faults.append(f"a client ended with {process.exitcode}")
            process.kill()
    report.asked = questions.stat().st_size


# --- the check ---


class LoggedQuestion(NamedTuple):
    """The moment of a question, and the requests of all its calls."""

    at: float
    requests: list[Request]
    driver: str = AUTOCOMMIT


class LoggedAnswer(NamedTuple):
    """The moment of an answer, and for each request its outcome, as ``clients.answer_of``."""

    at: float
    answers: list[list[Any]]


Exchanges = Iterable[tuple[LoggedQuestion, LoggedAnswer | None]]


@dataclass(frozen=True)
class Logs:
    """The logs of the clients as pairs of question and answer, None for a missing answer."""

    folder: Path

    def __iter__(self) -> Iterator[tuple[LoggedQuestion, LoggedAnswer | None]]:
        for log in sorted(self.folder.glob("client-*.jsonl")):
            question: LoggedQuestion | None = None
            with log.open() as lines:
                for line in lines:
                    try:
                        entry = json.loads(line)
                    except json.JSONDecodeError:
                        continue  # the client was killed while it wrote
                    if "calls" in entry:
                        if question:
                            yield question, None
                        requests = [Request(*request) for call in entry["calls"] for request in call]
                        question = LoggedQuestion(entry["at"], requests, entry["driver"])
                    elif question:
                        yield question, LoggedAnswer(entry["at"], entry["answers"])
                        question = None
            if question:
                yield question, None


def check(world: World, logs: Path, report: Report) -> None:
    row = world.schema.credit_transactions.c
    with world.autocommit.connect() as conn:
        report.faults += [str(finding) for finding in audit(conn, world.config).findings if finding.fault]
        asked_for = sa.or_(row.status == "completed", row.held.is_not(None))
        rows = conn.execute(sa.select(*(row[name] for name in (*ROW, "held"))).where(asked_for)).all()
    report.rows = len(rows)
    exchanges = Logs(logs)
    for question, answer in exchanges:
        report.kinds[question.driver if answer else "not answered"] += 1
        for request, outcome in zip(question.requests, answer.answers if answer else (), strict=False):
            report.answered += 1
            report.kinds[request.what if outcome[0] in ("row", "balance") else outcome[0]] += 1
    report.faults += contradictions(rows, exchanges)


def contradictions(rows: Iterable[Any], exchanges: Exchanges) -> list[str]:
    """The answers that the rows of the ledger cannot explain; ``exchanges`` is read twice."""
    evidence = Evidence(rows)
    for question, _ in exchanges:
        evidence.record_question(question)
    for question, answer in exchanges:
        if answer is not None:
            evidence.record_answer(question, answer)
    for user, chain in evidence.chains.items():
        chain.sort(key=lambda row: row.sequence)
        # a borrower's balance also changes by time, between two rows
        claims = [claim for claim in evidence.claims[user] if claim.of is not None or user not in evidence.borrowers]
        evidence.faults += unexplained(chain, evidence.events, claims)
    return evidence.faults


@dataclass
class Event:
    """The moments at which a row was first asked for and first reported; in nanoseconds of one clock."""

    asked_at: float = math.inf
    answered_at: float = math.inf


class Claim(NamedTuple):
    """A value of a user at some moment: the balance, or the credits that refunds took ``of`` a purchase.

    A refusal came before the row that it asked for, if there is one: ``ahead_of`` is its number.
    """

    of: str | None
    value: int
    since: float
    until: float
    ahead_of: float = math.inf


WRITES = {
    "consume": ("consumption", -1), "buy": ("purchase", 1), "refund": ("refund", -1), "grant": ("grant", 1),
    "reinstate": ("grant", 1), "lend": ("grant", 1),
}  # fmt: skip
"""For each request the type and the sign of its row."""


HOLDING = {"hold", "capture", "release"}
"""The requests about a hold: one makes a row that another may complete."""


class Evidence:
    """The ledger's rows, the moments of their questions and answers, and all other answers about their users."""

    def __init__(self, rows: Iterable[Any]) -> None:
        self.faults: list[str] = []
        self.chains: dict[str, list[Any]] = defaultdict(list)
        self.by_name: dict[tuple[str, str], Any] = {}
        self.bought: dict[str, int] = {}
        self.events: dict[str, Event] = defaultdict(Event)
        self.claims: dict[str, list[Claim]] = defaultdict(list)
        self.made: set[str] = set()
        self.holds: dict[object, Any] = {}  # by id, and by user and key
        self.charges: dict[str, set[int]] = defaultdict(set)
        self.borrowers: set[str] = set()
        for row in rows:
            user = str(row.user_id)
            if row.held is not None:
                self.holds[str(row.id)] = self.holds[user, row.idempotency_key] = row
            if row.sequence is None:
                continue
            self.chains[user].append(row)
            if row.type == "purchase":
                self.bought[str(row.id)] = row.amount
            for name in {row.idempotency_key, row.workshop_id} - {None}:
                if self.by_name.setdefault((user, str(name)), row) is not row:
                    self.faults.append(f"{name} of {user} is there more than once")

    def found(self, request: Request) -> Any:
        """The row of a request: that of its key, or the one that had unlocked its workshop before."""
        own = self.by_name.get((request.user, request.key))
        return self.by_name.get((request.user, request.of)) if own is None and request.what == "consume" else own

    def record_question(self, question: LoggedQuestion) -> None:
        for request in question.requests:
            if request.what in HOLDING:
                self.record_hold_question(request, question.at)
                continue
            if request.what == "lend":
                self.borrowers.add(request.user)
            row = self.by_name.get((request.user, request.key))
            if row is not None:
                event = self.events[str(row.id)]
                event.asked_at = min(event.asked_at, question.at)
                kind, sign = WRITES[request.what]
                of = row.workshop_id or row.refund_of
                expected = None if request.what == "lend" else request.of
                if (row.type, row.amount, of and str(of)) != (kind, sign * request.amount, expected):
                    self.faults.append(f"{request} was asked for, and written was {row}")

    def record_hold_question(self, request: Request, at: float) -> None:
        if request.what == "hold":
            row = self.holds.get((request.user, request.key))
            if row is not None and row.held != request.amount:
                self.faults.append(f"{request} was asked for, and written was {row}")
        elif request.what == "capture":
            event = self.events[str(request.of)]
            event.asked_at = min(event.asked_at, at)
            self.charges[str(request.of)].add(request.amount)

    def record_hold_answer(self, request: Request, values: list[Any], since: float, until: float) -> bool:
        """Record an answer with a hold's row; True if it is wrong."""
        replayed, *now = values
        row = self.holds.get((request.user, request.key) if request.what == "hold" else request.of)
        if row is None or now[0] != str(row.id):
            return True
        if now[ROW.index("sequence")] is None:  # it is pending, or released
            made_twice = not replayed and request.what == "hold" and now[0] in self.made
            self.made |= {now[0]} if not replayed and request.what == "hold" else set()
            return made_twice or request.what == "capture" or now[ROW.index("amount")] != -row.held
        event = self.events[now[0]]
        event.answered_at = min(event.answered_at, until)
        captured_twice = False
        if not replayed and request.what == "capture":
            event.asked_at = since
            captured_twice = f"{now[0]} captured" in self.made
            self.made.add(f"{now[0]} captured")
        return captured_twice or facts(row) != now or -row.amount not in self.charges[now[0]]

    def record_answer(self, question: LoggedQuestion, answer: LoggedAnswer) -> None:
        since, requests, _ = question
        until, answers = answer
        if len(requests) != len(answers):
            self.faults.append(f"{len(requests)} things were asked for and {len(answers)} answered: {requests}")
        for request, (kind, *values) in zip(requests, answers, strict=False):
            row = self.found(request)
            if kind == "row" and request.what in HOLDING:
                fault = self.record_hold_answer(request, values, since, until)
            elif kind == "row":
                fault = self.granted(request, row, values[0], values[1:], since, until)
            elif kind == "balance":
                fault = request.what != "balance"
                self.claims[request.user].append(Claim(None, values[0], since, until))
            else:
                claim = self.refused(request, kind, values[0])
                fault = claim is None and not self.closed(request, kind, values[0])
                if claim is not None:
                    of, value = claim
                    ahead_of = math.inf if row is None else row.sequence
                    self.claims[request.user].append(Claim(of, value, since, until, ahead_of))
            if fault:
                self.faults.append(f"{request} was answered with {kind} {values}; the ledger has {row}")

    def granted(
        self, request: Request, row: Any, replayed: bool, values: list[Any], since: float, until: float
    ) -> bool:
        """Record an answer with a row; True if it is wrong."""
        if row is None or facts(row) != values:
            return True
        event = self.events[str(row.id)]
        event.answered_at = min(event.answered_at, until)
        if replayed:
            return False
        # this call made it, so no earlier attempt and no other call did
        event.asked_at = since
        twice = str(row.id) in self.made
        self.made.add(str(row.id))
        return twice or row.idempotency_key != request.key

    def refused(self, request: Request, kind: str, why: Mapping[str, Any]) -> tuple[str | None, int] | None:
        """The values about the user in a refusal; None if these clients cannot have caused it."""
        match request.what, kind, why:
            case (
                "consume" | "hold" | "capture",
                "InsufficientCredits",
                {"user": request.user, "balance": balance, "required": request.amount},
            ):
                return (None, balance) if balance - why.get("held", 0) < request.amount else None
            case "refund", "RefundExceedsPurchase", {"purchase": request.of, "left": had, "asked": request.amount}:
                return (request.of, self.bought[request.of] - had) if had < request.amount else None
            case "reinstate", "ReinstatementExceedsRefunds", {
                "purchase": request.of,
                "taken": had,
                "asked": request.amount,
            }:
                return (request.of, had) if had < request.amount else None
        return None

    def closed(self, request: Request, kind: str, why: Mapping[str, Any]) -> bool:
        """True if a refusal without a balance is right: the hold, or the time of a loan, has ended."""
        if request.what == "lend":
            return kind == "InvalidArgument" and why["argument"] == "expires_at"
        row = self.holds.get(request.of)
        if kind != "HoldClosed" or request.what not in {"capture", "release"} or row is None:
            return False
        return (row.sequence is None) == (
            request.what == "capture"
        )  # released, so never charged; or the other way round


def unexplained(chain: list[Any], events: Mapping[str, Event], claims: list[Claim]) -> list[str]:
    """The answers that contradict the order of this user's rows in the ledger.

    State n is the one that row n made. All bounds here are those of commits:

    1. A database transaction locks the user, so its rows are consecutive.
    2. They appear at its commit, which lies between its question and its answer.
    3. Its answers about its own rows, before the commit, are about states that begin with the commit.
    4. Its answers about others' rows, as of its snapshot, are about states between question and answer.
    """
    faults = []
    # the setup came before all questions, and expiries have none
    unasked = [one.sequence == 1 or one.type == "expiry" for one in chain]
    asked = [0.0 if it else events[str(one.id)].asked_at for it, one in zip(unasked, chain, strict=True)]
    answered = [0.0 if one.sequence == 1 else events[str(one.id)].answered_at for one in chain]
    latest = 0.0
    for one, question, answer in zip(chain, asked, answered, strict=True):
        if question == math.inf:
            faults.append(f"{one} is there without a question")
        # the answer with this row came after the questions of all earlier rows
        latest = max(latest, question)
        if answer < latest:
            faults.append(f"{one} was answered before the question of an earlier row")
    # State n lasts from some moment after asked[n] until some moment before answered[n + 1]: an answer with its balance
    # is right if that span overlaps the answer's own. Both bounds are made monotone, as the order itself is.
    begins = _running_max(asked)
    ends = _running_min_from_right([*answered[1:], math.inf])
    held = _held(chain)
    for claim in claims:
        first = bisect.bisect_left(ends, claim.since)  # the first state that may have lasted until the question
        last = bisect.bisect_right(begins, claim.until) - 1  # the last one that may have begun before the answer
        last = min(last, claim.ahead_of - 2)  # sequences count from 1: row n made state n - 1
        spans = held.get((claim.of, claim.value), [])
        n = bisect.bisect_left(spans, first, key=lambda span: span[1])
        if n == len(spans) or spans[n][0] > last:
            faults.append(f"{chain[0].user_id} got {claim}, which was true at no moment between")
    return faults


def _held(chain: list[Any]) -> dict[tuple[str | None, int], list[tuple[int, int]]]:
    """The spans of states in which a balance, or the credits taken of a purchase, had a value."""
    spans: dict[tuple[str | None, int], list[tuple[int, int]]] = defaultdict(list)
    taken: dict[str, tuple[int, int]] = {}  # by purchase: the credits, and the first state with them
    for n, row in enumerate(chain):
        spans[None, row.balance_after].append((n, n))
        if row.type == "purchase":
            taken[str(row.id)] = 0, n
        elif row.refund_of is not None and str(row.refund_of) in taken:
            purchase = str(row.refund_of)
            value, since = taken[purchase]
            spans[purchase, value].append((since, n - 1))
            taken[purchase] = value - row.amount, n
    for purchase, (value, since) in taken.items():
        spans[purchase, value].append((since, len(chain) - 1))
    return spans


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
    parser.add_argument("--seconds", type=float, help="60, or as long as it takes to ask --questions")
    parser.add_argument("--questions", type=int, metavar="N", help="end when so many were asked")
    parser.add_argument("--server-kill-every", type=float, default=3, metavar="S", help="on average")
    parser.add_argument("--client-kill-every", type=float, default=2, metavar="S", help="on average")
    parser.add_argument("--autocommit", action="store_true", help="calls and lists alone: many times as many")
    parser.add_argument("--seed", type=int, default=int(time.time()))
    asked = parser.parse_args()
    plan = Plan(
        processes=asked.processes,
        seconds=asked.seconds or (math.inf if asked.questions else 60),
        questions=asked.questions or math.inf,
        server_kill_every_s=asked.server_kill_every,
        client_kill_every_s=asked.client_kill_every,
        seed=asked.seed,
        apps=[SINGLE] if asked.autocommit else APPS,
    )
    report = hammer(plan)
    kinds = ", ".join(f"{kind} {count:,}" for kind, count in report.kinds.most_common())
    print(
        f"{plan}\n"
        f"{report.asked:,} questions, {report.answered:,} answers; {report.rows:,} rows in the ledger\n"
        f"server killed {report.server_kills} times, clients {report.client_kills} times\n{kinds}",
        *report.faults[:50],
        f"{len(report.faults)} faults",
        sep="\n",
    )
    sys.exit(bool(report.faults))


if __name__ == "__main__":
    main()
