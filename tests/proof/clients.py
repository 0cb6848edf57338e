"""The drivers of the hammer's clients: two of Python, the Combiner, two of Node, psql.

Each sends requests in its own language, and returns for each an answer: ``["row", replayed, …]`` with the facts of the
ledger's row, ``["balance", credits]``, or the name of a refusal and its fields. Without an answer it raises
``NoAnswer``, and the same requests may be sent again.
"""

from __future__ import annotations

import datetime as dt
import itertools
import json
import re
import subprocess
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import psycopg
import sqlalchemy as sa

from tallystick import Consume, CreditTransaction, Ledger
from tallystick.database import translated
from tallystick.errors import DatabaseError, DatabaseUnavailable, LedgerError
from tallystick.ledger.combiner import Combiner

PATIENCE_S = 120
HELD_FOR = dt.timedelta(seconds=2)  # short enough for some to expire; hammer.ts has the same
AUTOCOMMIT = "AUTOCOMMIT"
LEVELS = ("READ COMMITTED", "REPEATABLE READ", "SERIALIZABLE")


class Request(NamedTuple):
    """One request for one user.

    ``of`` is its workshop, purchase or hold, or the moment at which a loan expires.
    """

    what: str
    user: str
    key: str | None = None
    amount: int = 0
    of: str | None = None


Call = Sequence[Request]
"""One call of the ledger; with several requests, of ``consume_many``."""

Answer = list[Any]


class NoAnswer(Exception):
    """A conflict, a lost connection, or no server to connect to."""

    def __init__(self, reason: object, *, connecting: bool = False) -> None:
        super().__init__(str(reason))
        self.connecting = connecting


class Driver(Protocol):
    """A way to call the ledger."""

    def ask(self, level: str, calls: Sequence[Call]) -> list[Answer]:
        """The answers, one for each request, of calls in one database transaction, or in one each."""
        ...

    def close(self) -> None:
        """Close the connection; the next question opens another."""


# --- answers ---


ROW = ("id", "user_id", "type", "amount", "balance_after", "sequence", "idempotency_key", "workshop_id", "refund_of")


def facts(row: Any) -> list[Any]:
    """The values of a row, as they are written into a log."""
    values = (getattr(row, name) for name in ROW)
    return [value if value is None or type(value) is int else str(value) for value in values]


def answer_of(answer: Any) -> Answer:
    """The result or the refusal of Python's ledger."""
    if isinstance(answer, CreditTransaction):
        return ["row", answer.replayed, *facts(answer)]
    return ["balance", answer] if isinstance(answer, int) else [type(answer).__name__, answer.fields]


def read(request: Request, answer: Mapping[str, Any]) -> Answer:  # noqa: PLR0911 - one for each outcome
    """The answer of a function of the ledger, by the names of its columns."""
    match answer["outcome"]:
        case "completed" if request.what == "balance":
            return ["balance", answer["balance"]]
        case "completed" | "replayed" as outcome:
            return ["row", outcome == "replayed", *(answer[name] for name in ROW)]
        case "insufficient_credits":
            fields = {name: answer[name] for name in ("balance", "required")}
            fields |= {"user": request.user, "held": answer["credit_held"]}
            return ["InsufficientCredits", fields]
        case "refund_exceeds_purchase":
            fields = {"purchase": answer["id"], "left": answer["remaining"], "asked": answer["required"]}
            return ["RefundExceedsPurchase", fields]
        case "reinstatement_exceeds_refunds":
            fields = {"purchase": answer["id"], "taken": answer["remaining"], "asked": answer["required"]}
            return ["ReinstatementExceedsRefunds", fields]
        case "hold_closed":
            return ["HoldClosed", {"hold": answer["id"]}]
        case "invalid_argument" if request.what == "lend":
            return ["InvalidArgument", {"argument": "expires_at"}]
        case other:
            return [other, dict(answer)]


# --- Python ---


@contextmanager
def _answering() -> Iterator[None]:
    try:
        yield
    except DatabaseError as error:
        if error.retryable or error.outcome_unknown:
            raise NoAnswer(error, connecting=isinstance(error, DatabaseUnavailable)) from error
        raise


def _results(ledger: Ledger, conn: Any, call: Call) -> list[Any]:
    if len(call) > 1:
        items = [
            Consume(request.user, workshop=request.of, credits=request.amount, key=str(request.key)) for request in call
        ]
        return list(ledger.consume_many(conn, items))
    try:
        return [_perform(ledger, conn, *call[0])]
    except LedgerError as refusal:
        return [refusal]


def _perform(ledger: Ledger, conn: Any, what: str, user: str, key: Any, amount: int, of: Any) -> Any:  # noqa: PLR0911 - one for each request
    match what:
        case "consume":
            return ledger.consume(conn, user, workshop=of, credits=amount, key=key)
        case "buy":  # with the same key it is the same purchase, complete or not
            started = ledger.start_purchase(conn, user, credits=amount, description="A pack", key=key)
            return ledger.complete_purchase(conn, user, purchase=started.id)
        case "refund":
            return ledger.refund(conn, user, of, credits=amount, key=key)
        case "reinstate":
            return ledger.reinstate(conn, user, of, credits=amount, key=key)
        case "grant":
            return ledger.grant(conn, user, credits=amount, key=key, description="A gift")
        case "lend":
            until = dt.datetime.fromisoformat(of)
            return ledger.grant(conn, user, credits=amount, key=key, description="A loan", expires_at=until)
        case "hold":
            return ledger.hold(conn, user, credits=amount, key=key, expires_in=HELD_FOR)
        case "capture":
            return ledger.capture(conn, user, of, credits=amount)
        case "release":
            return ledger.release(conn, user, of)
        case _:
            return ledger.balance(conn, user)


class SqlAlchemy:
    """A connection from a pool for each question."""

    def __init__(self, ledger: Ledger, pool: sa.Engine) -> None:
        self.ledger, self.pool = ledger, pool

    def ask(self, level: str, calls: Sequence[Call]) -> list[Answer]:
        with _answering():
            with translated(connecting=True):
                conn = self.pool.connect()
            with conn, translated(), conn.execution_options(isolation_level=level).begin():
                answers = [answer for call in calls for answer in _results(self.ledger, conn, call)]
        return [answer_of(answer) for answer in answers]

    def close(self) -> None:
        self.pool.dispose()


class Psycopg:
    """A connection of its own."""

    def __init__(self, ledger: Ledger, url: str) -> None:
        self.ledger, self.url = ledger, url.replace("+psycopg", "", 1)
        self.conn: psycopg.Connection | None = None

    def ask(self, level: str, calls: Sequence[Call]) -> list[Answer]:
        try:
            with _answering():
                if self.conn is None:
                    with translated(connecting=True):
                        self.conn = psycopg.connect(self.url, autocommit=True)
                with translated():
                    answers = self._answers(self.conn, level, calls)
        except NoAnswer:
            self.close()
            raise
        return [answer_of(answer) for answer in answers]

    def _answers(self, conn: psycopg.Connection, level: str, calls: Sequence[Call]) -> list[Any]:
        if level == AUTOCOMMIT:
            return [answer for call in calls for answer in _results(self.ledger, conn, call)]
        conn.isolation_level = psycopg.IsolationLevel[level.replace(" ", "_")]
        with conn.transaction():
            return [answer for call in calls for answer in _results(self.ledger, conn, call)]

    def close(self) -> None:
        if self.conn is not None:
            self.conn.close()
        self.conn = None


class Combined:
    """Concurrent calls, which one Combiner sends together."""

    def __init__(self, combiner: Combiner) -> None:
        self.combiner = combiner

    def ask(self, level: str, calls: Sequence[Call]) -> list[Answer]:
        assert level == AUTOCOMMIT
        with _answering():
            return [answer_of(_result(future)) for future in [self._submit(request) for (request,) in calls]]

    def _submit(self, request: Request) -> Future[CreditTransaction]:
        return self.combiner.consume(request.user, workshop=request.of, credits=request.amount, key=str(request.key))

    def close(self) -> None:
        """Do nothing: it is shared, and reconnects by itself."""


def _result(future: Future[CreditTransaction]) -> CreditTransaction | LedgerError:
    try:
        return future.result(PATIENCE_S)
    except LedgerError as refusal:
        return refusal


# --- other languages ---


_CONNECTING = re.compile(r"ECONNREFUSED|ENOENT|\b57P0[123]\b|\b53300\b|the database system is")
_UNANSWERED = re.compile(r"\b(40001|40P01|08\w{3})\b|ECONNRESET|EPIPE|onnection terminated|not queryable|fetch failed")


def _no_answer(reason: str) -> Exception:
    """The error for one of another language: all but a conflict or a lost server are faults."""
    connecting = _CONNECTING.search(reason) is not None
    if connecting or _UNANSWERED.search(reason):
        return NoAnswer(reason, connecting=connecting)
    return RuntimeError(reason)


class NodeProcess:
    """A Node program, ``tests/typescript/src/hammer.ts``, to which several threads send their questions."""

    def __init__(self, program: Path | None, env: Mapping[str, str]) -> None:
        self.program, self.env = program, env
        self.numbers, self.lock = itertools.count(), threading.Lock()
        self.process: subprocess.Popen[str] | None = None
        self.asked: dict[int, Future[dict[str, Any]]] = {}

    def ask(self, question: Mapping[str, Any]) -> dict[str, Any]:
        number, future = next(self.numbers), Future[dict[str, Any]]()
        with self.lock:
            if self.process is None:
                self.process = subprocess.Popen(
                    ["node", str(self.program)], env=self.env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
                )
                threading.Thread(target=self._listen, args=(self.process.stdout,), daemon=True).start()
            self.asked[number] = future
            assert self.process.stdin is not None
            self.process.stdin.write(json.dumps({"n": number, **question}) + "\n")
            self.process.stdin.flush()
        return future.result(PATIENCE_S)

    def _listen(self, lines: Any) -> None:
        for line in lines:
            answer = json.loads(line)
            self.asked.pop(answer["n"]).set_result(answer)
        for future in list(self.asked.values()):
            future.set_exception(RuntimeError("the program of Node ended"))

    def close(self) -> None:
        if self.process is not None:
            assert self.process.stdin is not None
            self.process.stdin.close()
            self.process.wait(PATIENCE_S)


class Node:
    """A driver of Node: ``pg``, or ``neon-http`` before the double of Neon's endpoint."""

    def __init__(self, process: NodeProcess, driver: str) -> None:
        self.process, self.driver = process, driver

    def ask(self, level: str, calls: Sequence[Call]) -> list[Answer]:
        reply = self.process.ask({"driver": self.driver, "level": level, "calls": calls})
        if "error" in reply:
            raise _no_answer(reply["error"])
        requests = [request for call in calls for request in call]
        answers = [{_snake(name): value for name, value in answer.items()} for answer in reply["answers"]]
        return [read(request, answer) for request, answer in zip(requests, answers, strict=True)]

    def close(self) -> None:
        """Do nothing: its pool is shared."""


def _snake(name: str) -> str:
    return re.sub(r"[A-Z]", lambda found: f"_{found[0].lower()}", name)


class Psql:
    """A psql that gets its commands line by line; it ends with its connection."""

    def __init__(self, env: Mapping[str, str]) -> None:
        self.env = env
        self.process: subprocess.Popen[str] | None = None

    def ask(self, level: str, calls: Sequence[Call]) -> list[Answer]:
        script = "".join(_script(call) for call in calls)
        if level != AUTOCOMMIT:
            script = f"BEGIN ISOLATION LEVEL {level};\n{script}COMMIT;\n"
        answers = [json.loads(line) for line in self._lines(script)]
        requests = [request for call in calls for request in call]
        return [read(request, answer) for request, answer in zip(requests, answers, strict=True)]

    def _lines(self, script: str) -> list[str]:
        if self.process is None:
            command = ["psql", "-X", "-q", "-A", "-t", "-v", "VERBOSITY=sqlstate"]
            self.process = subprocess.Popen(
                command,
                env=self.env,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        with suppress(BrokenPipeError):  # it ended, and its output has the reason
            self.process.stdin.write(f"{script}\\echo .\n")
            self.process.stdin.flush()
        lines = []
        for line in self.process.stdout:
            if line == ".\n":
                break
            lines.append(line)
        else:
            self.close()
            raise NoAnswer("".join(lines), connecting=True)
        if wrong := [line for line in lines if not line.startswith("{")]:
            raise _no_answer("".join(wrong))
        return lines

    def close(self) -> None:
        if self.process is not None:
            assert self.process.stdin is not None
            assert self.process.stdout is not None
            with suppress(BrokenPipeError):  # it ended before reading all
                self.process.stdin.close()
            self.process.stdout.close()
            self.process.wait(PATIENCE_S)
        self.process = None


_ANSWER = "SELECT to_json(a) FROM tallystick.{} AS a{};\n"


def _script(call: Call) -> str:
    """One call as lines of psql; values are its variables."""
    what, user, key, amount, of = call[0]
    if len(call) > 1:
        columns = zip(*call, strict=True)
        _, users, keys, amounts, workshops = (_array(column) for column in columns)
        values = {"users": users, "keys": keys, "amounts": amounts, "workshops": workshops}
        arguments = "user_ids => :'users', keys => :'keys', amounts => :'amounts', workshop_ids => :'workshops'"
        ask = _ANSWER.format(f"consume_many({arguments})", " ORDER BY a.item")
    else:
        values = {"user": user, "key": key, "amount": amount, "of": of}
        written = "user_id => :'user', key => :'key', amount => :'amount'"
        unlocking, linked = f"{written}, workshop_id => :'of'", f"{written}, purchase_id => :'of'"
        match what:
            case "consume":
                ask = _ANSWER.format(f"consume({written if of is None else unlocking})", "")
            case "buy":
                ask = (
                    f"SELECT id AS purchase FROM tallystick.start_purchase({written}, description => 'A pack') \\gset\n"
                )
                ask += _ANSWER.format("complete_purchase(user_id => :'user', purchase_id => :'purchase')", "")
            case "grant":
                ask = _ANSWER.format(f"grant({written}, description => 'A gift')", "")
            case "lend":
                ask = _ANSWER.format(f"grant({written}, description => 'A loan', expires_at => :'of')", "")
            case "hold":
                ask = _ANSWER.format(f"hold({written}, expires_in => '{HELD_FOR.seconds} seconds')", "")
            case "capture":
                ask = _ANSWER.format("capture(user_id => :'user', hold_id => :'of', amount => :'amount')", "")
            case "release":
                ask = _ANSWER.format("release(user_id => :'user', hold_id => :'of')", "")
            case "balance":
                ask = _ANSWER.format("balance(user_id => :'user')", "")
            case _:
                ask = _ANSWER.format(f"{what}({linked})", "")
    return "".join(f"\\set {name} '{value}'\n" for name, value in values.items() if value is not None) + ask


def _array(values: Sequence[Any]) -> str:
    return "{" + ",".join("NULL" if value is None else f'"{value}"' for value in values) + "}"
