"""Many processes do anything to a few users while they and their server are killed; then every word is checked.

    make hammer                                       a minute
    python tests/proof/hammer.py --processes 32 --seconds 3600

Each client writes down what it is about to ask, and then what it was told. Afterwards the database has to explain all
of it: what was acknowledged is there once and is what was asked for, what was not is there at most once, nothing was
refused without a reason, the audit finds nothing, and for each user there is one order of events, the ledger's own, in
which every answer was true at some moment between its question and its arrival (linearizability).
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
    Door,
    NoAnswer,
    Node,
    NodeProcess,
    Psql,
    Psycopg,
    SqlAlchemy,
    Wish,
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
PEOPLE = "people.json"  # beside the logs: more than a pipe takes at once, so whoever starts a client would wait for it


class Question(NamedTuple):
    """The calls of one request through a door: one database transaction of a level, or each its own."""

    door: str
    level: str
    calls: list[list[Wish]]


class Crew(NamedTuple):
    """A process of clients, as an app: its threads, and by which doors at which level each of them asks."""

    threads: int
    doors: Sequence[tuple[str, str]]


SINGLE = Crew(1, [("SQLAlchemy", AUTOCOMMIT)])
CREWS = (
    SINGLE,
    Crew(4, [("SQLAlchemy", level) for level in LEVELS]),
    Crew(4, [("Combiner", AUTOCOMMIT), ("Combiner", AUTOCOMMIT), ("SQLAlchemy", AUTOCOMMIT)]),
    Crew(2, [*3 * [("psycopg", AUTOCOMMIT)], *[("psycopg", level) for level in LEVELS]]),
    Crew(4, [*3 * [("pg", AUTOCOMMIT), ("neon-http", AUTOCOMMIT)], *itertools.product(("pg", "neon-http"), LEVELS)]),
    Crew(2, [*3 * [("psql", AUTOCOMMIT)], *[("psql", level) for level in LEVELS]]),
)
"""The first, seventh and so on of the processes is the first of these."""

IN_NODE = {"pg", "neon-http"}


# --- a client ---


class Client:
    """One random life, written to a file line by line: a kill loses nothing that was said before it."""

    def __init__(
        self,
        doors: Mapping[str, Door],
        crew: Crew,
        people: Mapping[str, Sequence[str]],
        logs: Path,
        name: str,
    ) -> None:
        self.doors, self.crew, self.people, self.name = doors, crew, people, name
        self.dice, self.numbers = random.Random(name), itertools.count(1)
        self.log = (logs / f"client-{name}.jsonl").open("a", buffering=1)
        self.questions, self.over = (logs / "questions").open("ab", buffering=0), logs / "over"
        self.purchases: list[tuple[str, str]] = []
        self.held: list[tuple[str, str, int]] = []
        self.old: list[Question] = []

    def live(self) -> None:
        while not self.over.exists():
            question = self.wanted()
            self.old = [*self.old[-20:], question]
            self.questions.write(b".")
            while not self.ask(question) and not self.over.exists():
                pass
            if self.dice.random() < 1 / 300:
                self.doors[question.door].close()  # and it connects anew
        for door in self.doors.values():
            door.close()

    def ask(self, question: Question) -> bool:
        """True if there was an answer; if not, the same calls may be made again with the same keys.

        Nobody is told of what a transaction did before its commit is.
        """
        door, level, calls = question
        self.write({"at": time.monotonic_ns(), "door": f"{door}, {level}", "ask": calls})
        try:
            answers = self.doors[door].ask(level, calls)
        except NoAnswer as reason:
            time.sleep(self.dice.random() * (0.3 if reason.connecting else 0.03))
            return False
        now = time.monotonic_ns()  # before anything else takes time: this is when we were told
        self.write({"at": now, "told": answers})
        bought = [(told[3], told[2]) for told in answers if told[0] == "row" and told[4] == "purchase"]
        self.purchases += bought
        self.held += [(told[3], told[2], -told[5]) for told in answers if told[0] == "row" and told[7] is None]
        return True

    def write(self, entry: dict[str, Any]) -> None:
        self.log.write(json.dumps(entry, default=str) + "\n")

    # --- what comes into its mind ---

    def wanted(self) -> Question:
        if self.old and self.dice.random() < 0.15:
            return self.dice.choice(self.old)
        door, level = self.dice.choice(self.crew.doors)
        alone = level == AUTOCOMMIT and door != "Combiner"
        return Question(
            door, level, [self.call(door, level) for _ in range(1 if alone else self.dice.choice((1, 2, 3)))]
        )

    def call(self, door: str, level: str) -> list[Wish]:  # noqa: PLR0911 - as above
        dice, user = self.dice, self.dice.choice(list(self.people))
        whats = {"spend": 12, "many": 3, "buy": 5, "refund": 3, "reinstate": 2, "grant": 1, "balance": 2}
        whats |= {"lend": 1, "hold": 4, "capture": 3, "release": 1}
        if door == "neon-http" and level != AUTOCOMMIT:
            del whats["buy"]  # two calls, of which the second needs what the first gives: no batch
        match "spend" if door == "Combiner" else dice.choices(list(whats), list(whats.values()))[0]:
            case "spend":
                return [self.spending(dice.choice((1, 1, 1, 2, 10)))]
            case "many":
                count = dice.choice((2, 6, 40 if level == AUTOCOMMIT else 10))
                return [self.spending(dice.choice((1, 2))) for _ in range(count)]
            case "buy":
                return [Wish("buy", user, dice.choice((self.key(), f"common pack {moment()}")), 20)]
            case "grant":
                return [Wish("grant", user, self.key(), dice.choice((1, 5)))]
            case "lend":
                until = dt.datetime.now(dt.UTC) + dt.timedelta(seconds=dice.choice((0.2, 2)))
                return [Wish("lend", next(iter(self.people)), self.key(), 5, until.isoformat(timespec="milliseconds"))]
            case "hold":
                return [Wish("hold", user, dice.choice((self.key(), f"common hold {moment()}")), 4)]
            case "capture" | "release" as what if self.held:
                whose, hold, held = dice.choice(self.held[-6:])
                part = 1 if int(hold[-1], 16) % 2 else held  # the same for all who ask
                return [Wish(what, whose, None, part if what == "capture" else 0, hold)]
            case "refund" | "reinstate" as what if self.purchases:
                whose, purchase = dice.choice(self.purchases[-6:])
                return [Wish(what, whose, self.key(), dice.choice((1, 1, 5, 20)), purchase)]
            case _:
                return [Wish("balance", user)]

    def spending(self, amount: int) -> Wish:
        """Some of them for a workshop, and some under a key, that others are after at the same moment."""
        user, workshops = self.dice.choice(list(self.people.items()))
        match self.dice.choices(["own key", "common key", "workshop"], [6, 1, 3])[0]:
            case "own key":
                return Wish("consume", user, self.key(), amount)
            case "common key":
                return Wish("consume", user, f"common {moment()}", 1)
            case _:
                workshop = workshops[(moment() + self.dice.randrange(3)) % len(workshops)]
                return Wish("consume", user, self.key(), 1, workshop)

    def key(self) -> str:
        return f"{self.name}-{next(self.numbers)}"


def moment() -> int:
    """The same for all who ask at about the same time."""
    return time.monotonic_ns() // 50_000_000


def client(url: str, crew: Crew, logs: Path, program: Path | None, env: Mapping[str, str], seed: int) -> None:
    os.setpgrp()  # what it starts is killed with it
    logging.getLogger("psycopg").disabled = True  # that connections die is what is tried here
    people = json.loads((logs / PEOPLE).read_text())
    pool, ledger, node = engine(url), Ledger(Config(database_url=url, host=HOST)), NodeProcess(program, env)

    def doors() -> dict[str, Door]:
        return {
            "SQLAlchemy": SqlAlchemy(ledger, pool),
            "Combiner": Combined(combiner),
            "psycopg": Psycopg(ledger, url),
            "pg": Node(node, "pg"),
            "neon-http": Node(node, "neon-http"),
            "psql": Psql(env),
        }

    with closing(node), Combiner(ledger, pool) as combiner, ThreadPoolExecutor(crew.threads) as crowd:
        lives = [Client(doors(), crew, people, logs, f"{seed}-{n}").live for n in range(crew.threads)]
        for life in [crowd.submit(life) for life in lives]:
            life.result()


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
    """The load, and its end: the earlier of ``seconds`` and ``questions``. The two ``…_every_s`` are averages."""

    processes: int
    seconds: float
    questions: float = math.inf
    server_kill_every_s: float
    client_kill_every_s: float
    seed: int
    crews: Sequence[Crew] = field(default=CREWS, repr=False)


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
            (Path(logs) / PEOPLE).write_text(json.dumps(settled_in(world, max(3, plan.processes // 4))))
            strike(plan, world.url, server, Path(logs), report)
            check(world, Path(logs), report)
    finally:
        shutil.rmtree(home)
    return report


def settled_in(world: World, count: int) -> dict[str, list[str]]:
    """So many users, with credits, and their workshops."""
    users, workshops = [world.user(credits=BEGINS_WITH) for _ in range(count)], world.schema.workshops
    assert workshops is not None
    theirs = {user: [world.key("uuid") for _ in range(WORKSHOPS)] for user in users}
    with world.engine.begin() as conn:
        for user, some in theirs.items():
            conn.execute(sa.insert(workshops), [{"key": one, "owner": user, "title": "A workshop"} for one in some])
    return {str(user): [str(one) for one in some] for user, some in theirs.items()}


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


def strike(plan: Plan, url: str, server: Server, logs: Path, report: Report) -> None:
    context, dice = multiprocessing.get_context("spawn"), random.Random(plan.seed)
    seeds = itertools.count(plan.seed * 10_000)
    in_node = any(door in IN_NODE for crew in plan.crews[: plan.processes] for door, _ in crew.doors)
    program = node_program(logs) if in_node else None
    path = f"{server.bin}{os.pathsep}{server.env['PATH']}"  # its own psql
    env = server.env | {"PATH": path, "PGDATABASE": str(sa.make_url(url).database)}

    def start(number: int) -> Any:
        crew = plan.crews[number % len(plan.crews)]
        process = context.Process(target=client, args=(url, crew, logs, program, env, next(seeds)), daemon=True)
        process.start()
        return process

    crowd = [start(number) for number in range(plan.processes)]
    while len(list(logs.glob("client-*-0.jsonl"))) < plan.processes:  # the clock starts once they all live
        time.sleep(0.02)
    until, questions = time.time() + plan.seconds, logs / "questions"
    next_server, next_client = (time.time() + s for s in (plan.server_kill_every_s, plan.client_kill_every_s))
    while time.time() < until and questions.stat().st_size < plan.questions:
        time.sleep(0.02)
        if time.time() > next_client:
            victim = dice.randrange(plan.processes)
            if crowd[victim].exitcode is not None:
                report.faults.append(f"a client ended with {crowd[victim].exitcode} by itself")
            with suppress(ProcessLookupError):  # it has not come that far
                os.killpg(crowd[victim].pid, signal.SIGKILL)
            crowd[victim].kill()
            crowd[victim].join()
            crowd[victim] = start(victim)
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
    patience = time.monotonic() + PATIENCE_S
    for process in crowd:
        process.join(max(0.0, patience - time.monotonic()))
        if process.exitcode != 0:  # None: it hangs
            report.faults.append(f"a client ended with {process.exitcode}")
            process.kill()
    report.asked = questions.stat().st_size


# --- the check ---


class Asked(NamedTuple):
    """The moment of a question, and the wishes of all its calls."""

    at: float
    wishes: list[Wish]
    door: str = AUTOCOMMIT


class Told(NamedTuple):
    """The moment of an answer, and for each wish its outcome in the form of ``said``."""

    at: float
    answers: list[list[Any]]


Talk = Iterable[tuple[Asked, Told | None]]


@dataclass(frozen=True)
class Conversations:
    """The logs of the clients; a question without an answer stands beside None."""

    folder: Path

    def __iter__(self) -> Iterator[tuple[Asked, Told | None]]:
        for log in sorted(self.folder.glob("client-*.jsonl")):
            question: Asked | None = None
            with log.open() as lines:
                for line in lines:
                    try:
                        entry = json.loads(line)
                    except json.JSONDecodeError:
                        continue  # the client was killed while it wrote
                    if "ask" in entry:
                        if question:
                            yield question, None
                        wishes = [Wish(*wish) for call in entry["ask"] for wish in call]
                        question = Asked(entry["at"], wishes, entry["door"])
                    elif question:
                        yield question, Told(entry["at"], entry["told"])
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
    talk = Conversations(logs)
    for question, answer in talk:
        report.kinds[question.door if answer else "not answered"] += 1
        for wish, told in zip(question.wishes, answer.answers if answer else (), strict=False):
            report.answered += 1
            report.kinds[wish.what if told[0] in ("row", "balance") else told[0]] += 1
    report.faults += contradictions(rows, talk)


def contradictions(rows: Iterable[Any], talk: Talk) -> list[str]:
    """The answers that the rows of the ledger cannot explain; ``talk`` is read twice."""
    books = Books(rows)
    for question, _ in talk:
        books.ask(question)
    for question, answer in talk:
        if answer is not None:
            books.tell(question, answer)
    for user, chain in books.chains.items():
        chain.sort(key=lambda row: row.sequence)
        # The clock alone changes what a borrower has, between two rows.
        claims = [claim for claim in books.claims[user] if claim.of is not None or user not in books.borrowers]
        books.faults += unexplained(chain, books.events, claims)
    return books.faults


@dataclass
class Event:
    """The moments at which a row was first asked for and first reported; in nanoseconds of one clock."""

    asked: float = math.inf
    told: float = math.inf


class Claim(NamedTuple):
    """That something of a user was ``value`` at some moment: the balance, or what refunds took ``of`` a purchase.

    Whoever was refused was so before the row that they asked for, should there be one: ``ahead_of`` is its number.
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
"""For each wish the type and the sign of the row that grants it."""


HOLDING = {"hold", "capture", "release"}
"""The wishes about a hold: a row that one of them makes, and another may complete."""


class Books:
    """The ledger's rows, when each was asked for and told of, and what else was said about their users."""

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

    def found(self, wish: Wish) -> Any:
        """The row that grants a wish: that of its key, or the one that had unlocked its workshop before."""
        own = self.by_name.get((wish.user, wish.key))
        return self.by_name.get((wish.user, wish.of)) if own is None and wish.what == "consume" else own

    def ask(self, question: Asked) -> None:
        for wish in question.wishes:
            if wish.what in HOLDING:
                self.ask_of_hold(wish, question.at)
                continue
            if wish.what == "lend":
                self.borrowers.add(wish.user)
            row = self.by_name.get((wish.user, wish.key))
            if row is not None:
                event = self.events[str(row.id)]
                event.asked = min(event.asked, question.at)
                kind, sign = WRITES[wish.what]
                of = row.workshop_id or row.refund_of
                wanted = None if wish.what == "lend" else wish.of
                if (row.type, row.amount, of and str(of)) != (kind, sign * wish.amount, wanted):
                    self.faults.append(f"{wish} was asked for, and written was {row}")

    def ask_of_hold(self, wish: Wish, at: float) -> None:
        if wish.what == "hold":
            row = self.holds.get((wish.user, wish.key))
            if row is not None and row.held != wish.amount:
                self.faults.append(f"{wish} was asked for, and written was {row}")
        elif wish.what == "capture":
            event = self.events[str(wish.of)]
            event.asked = min(event.asked, at)
            self.charges[str(wish.of)].add(wish.amount)

    def tell_of_hold(self, wish: Wish, told: list[Any], since: float, until: float) -> bool:
        """Take down that somebody was told of a hold's row; whether it is not what was asked for."""
        replayed, *now = told
        row = self.holds.get((wish.user, wish.key) if wish.what == "hold" else wish.of)
        if row is None or now[0] != str(row.id):
            return True
        if now[ROW.index("sequence")] is None:  # it waits, or is given up
            made_twice = not replayed and wish.what == "hold" and now[0] in self.made
            self.made |= {now[0]} if not replayed and wish.what == "hold" else set()
            return made_twice or wish.what == "capture" or now[ROW.index("amount")] != -row.held
        event = self.events[now[0]]
        event.told = min(event.told, until)
        captured_twice = False
        if not replayed and wish.what == "capture":
            event.asked = since
            captured_twice = f"{now[0]} captured" in self.made
            self.made.add(f"{now[0]} captured")
        return captured_twice or facts(row) != now or -row.amount not in self.charges[now[0]]

    def tell(self, question: Asked, answer: Told) -> None:
        since, wishes, _ = question
        until, answers = answer
        if len(wishes) != len(answers):
            self.faults.append(f"{len(wishes)} things were asked for and {len(answers)} answered: {wishes}")
        for wish, (kind, *told) in zip(wishes, answers, strict=False):
            row = self.found(wish)
            if kind == "row" and wish.what in HOLDING:
                fault = self.tell_of_hold(wish, told, since, until)
            elif kind == "row":
                fault = self.granted(wish, row, told[0], told[1:], since, until)
            elif kind == "balance":
                fault = wish.what != "balance"
                self.claims[wish.user].append(Claim(None, told[0], since, until))
            else:
                claim = self.refused(wish, kind, told[0])
                fault = claim is None and not self.closed(wish, kind, told[0])
                if claim is not None:
                    of, value = claim
                    ahead_of = math.inf if row is None else row.sequence
                    self.claims[wish.user].append(Claim(of, value, since, until, ahead_of))
            if fault:
                self.faults.append(f"{wish} was answered with {kind} {told}; the ledger has {row}")

    def granted(self, wish: Wish, row: Any, replayed: bool, told: list[Any], since: float, until: float) -> bool:
        """Take down that somebody was told of a row; whether it is not theirs."""
        if row is None or facts(row) != told:
            return True
        event = self.events[str(row.id)]
        event.told = min(event.told, until)
        if replayed:
            return False
        # It was made by this very call, so nobody's earlier attempt made it; and nobody else's call did.
        event.asked = since
        twice = str(row.id) in self.made
        self.made.add(str(row.id))
        return twice or row.idempotency_key != wish.key

    def refused(self, wish: Wish, kind: str, why: Mapping[str, Any]) -> tuple[str | None, int] | None:
        """The values about the user in a refusal; None if these clients cannot have caused it."""
        match wish.what, kind, why:
            case (
                "consume" | "hold" | "capture",
                "InsufficientCredits",
                {"user": wish.user, "balance": balance, "required": wish.amount},
            ):
                return (None, balance) if balance - why.get("held", 0) < wish.amount else None
            case "refund", "RefundExceedsPurchase", {"purchase": wish.of, "left": had, "asked": wish.amount}:
                return (wish.of, self.bought[wish.of] - had) if had < wish.amount else None
            case "reinstate", "ReinstatementExceedsRefunds", {"purchase": wish.of, "taken": had, "asked": wish.amount}:
                return (wish.of, had) if had < wish.amount else None
        return None

    def closed(self, wish: Wish, kind: str, why: Mapping[str, Any]) -> bool:
        """True if a refusal without a balance is right: the hold has ended, or the time of a loan has."""
        if wish.what == "lend":
            return kind == "InvalidArgument" and why["argument"] == "expires_at"
        row = self.holds.get(wish.of)
        if kind != "HoldClosed" or wish.what not in {"capture", "release"} or row is None:
            return False
        return (row.sequence is None) == (wish.what == "capture")  # given up, so never charged; or the other way


def unexplained(chain: list[Any], events: Mapping[str, Event], claims: list[Claim]) -> list[str]:
    """The answers that contradict the order of this user's rows in the ledger.

    State n is the one that row n made. The rows of a database transaction stand side by side, since it keeps the
    user's row for itself, and come to be at its commit, which lies between its question and its answer: all bounds
    here are those of commits. What it was told of its own rows before that commit, or of others as of its snapshot, is
    no exception. The first is a state that came, and perhaps went, with the commit; the second was read in between.
    """
    faults = []
    # the setting-up came before all questions, and nobody asks for an expiry
    unasked = [one.sequence == 1 or one.type == "expiry" for one in chain]
    asked = [0.0 if it else events[str(one.id)].asked for it, one in zip(unasked, chain, strict=True)]
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
    held = _held(chain)
    for claim in claims:
        first = bisect.bisect_left(ends, claim.since)  # the first state that may still have held when it was asked
        last = bisect.bisect_right(begins, claim.until) - 1  # the last one that may have held when it was told
        last = min(last, claim.ahead_of - 2)  # sequences count from 1: row n made state n - 1
        spans = held.get((claim.of, claim.value), [])
        n = bisect.bisect_left(spans, first, key=lambda span: span[1])
        if n == len(spans) or spans[n][0] > last:
            faults.append(f"{chain[0].user_id} was told of {claim}, which was so at no moment between")
    return faults


def _held(chain: list[Any]) -> dict[tuple[str | None, int], list[tuple[int, int]]]:
    """In which states, from the first to the last of them, a balance or what was taken of a purchase had a value."""
    spans: dict[tuple[str | None, int], list[tuple[int, int]]] = defaultdict(list)
    taken: dict[str, tuple[int, int]] = {}  # of each purchase, and since which state
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
        crews=[SINGLE] if asked.autocommit else CREWS,
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
