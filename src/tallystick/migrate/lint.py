"""Other people's migrations, read by the same rules: what would stall, fail or deadlock on a live database.

Linters that look at one statement at a time miss what goes wrong between two. Here a migration is a sequence of
transactions, each holding its locks until it ends.
"""

from __future__ import annotations

import io
import re
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from alembic.operations import Operations
from alembic.runtime.migration import MigrationContext
from alembic.script import Script, ScriptDirectory

from tallystick.errors import ConfigError
from tallystick.migrate.rules import KNOWN_TYPES, Lock, Operation, normalise, operations, split, statements_of_block

SHORT_TIMEOUT_MS = 60_000
"""A build that waits for old snapshots easily takes longer than this."""


@dataclass(frozen=True)
class LintRule:
    """``code`` is stable and can be silenced with ``-- tallystick: allow CODE`` in the same statement."""

    code: str
    says: str
    remedy: str


RULES: Mapping[str, LintRule] = {
    rule.code: rule
    for rule in (
        LintRule(
            "lock-upgrade",
            "takes a stronger lock on a table than this transaction already holds: the deadlock that live traffic "
            "then meets is real, and LOCK TABLE in front does not prevent it without a timeout",
            "let the first statement that blocks writers on a table be the one with its strongest lock",
        ),
        LintRule(
            "foreign-key-first",
            "creates a foreign key before it alters the referenced table, which is a lock upgrade",
            "create the table without foreign keys, alter the host's tables, then add the foreign keys",
        ),
        LintRule(
            "rows-under-lock",
            "changes rows while a table is locked against everyone: all traffic waits for all rows",
            "change rows in batches, in transactions of their own, after the schema's",
        ),
        LintRule(
            "every-row",
            "changes every row in one transaction: who writes one of them waits for all",
            "change them in batches, with a WHERE and a transaction for each",
        ),
        LintRule(
            "scan-under-lock",
            "reads the whole table while writers wait",
            "see the note of the operation",
        ),
        LintRule("rewrite", "writes the whole table anew while everyone waits", "see the note of the operation"),
        LintRule(
            "index-not-concurrent",
            "builds, rebuilds or drops an index while writers wait",
            "see the note of the operation",
        ),
        LintRule(
            "concurrently-in-transaction",
            "cannot run inside a transaction",
            "put it into autocommit_block(), as the first thing of a revision of its own",
        ),
        LintRule(
            "concurrently-short-timeout",
            "runs under a lock_timeout or statement_timeout, which cuts it and leaves an INVALID index behind",
            "SET lock_timeout = 0; SET statement_timeout = 0; before it",
        ),
        LintRule(
            "shared-transaction",
            "shares one transaction with the revisions before it, so that every lock is held to the end of all",
            "set transaction_per_migration=True in context.configure()",
        ),
        LintRule(
            "no-lock-timeout",
            "waits without limit for a lock; whoever comes later queues behind it",
            "SET LOCAL lock_timeout before it, and run the whole transaction again when it fails",
        ),
        LintRule(
            "validate-in-transaction",
            "validates a constraint in the transaction that added it, so that the stronger lock is kept for the scan",
            "validate it in a later transaction",
        ),
        LintRule(
            "new-label-used",
            "uses an enum label in the transaction that adds it",
            "add the label in a revision of its own",
        ),
        LintRule(
            "not-null-without-default",
            "fails as soon as the table has a row",
            "give the column a default, or add it nullable and fill it first",
        ),
        LintRule(
            "if-not-exists-index",
            "reports success on the INVALID index that a killed build left",
            "drop an invalid index first, or look at pg_index.indisvalid afterwards",
        ),
        LintRule("rename", "breaks running code that uses the old name", "add the new name, move over, drop the old"),
        LintRule("drop", "breaks running code that still uses it", "release code that does without it first"),
        LintRule(
            "truncate",
            "empties it while everyone waits, and with CASCADE every table that refers to it",
            "if it may be emptied, allow it; else delete rows in batches",
        ),
        LintRule(
            "row-security",
            "changes which rows running code sees and may write",
            "try it as the app's own role first, then allow it",
        ),
        LintRule(
            "domain-constraint",
            "reads every table with a column of the domain while their writers wait",
            "see the note of the operation",
        ),
        LintRule(
            "unknown-type",
            "is of a type that is not known here; if it is a domain with constraints, the whole table is written anew",
            "look with \\dD in psql; if it is no such domain, allow it",
        ),
        LintRule(
            "unreadable",
            "cannot be judged: it is put together while it runs, or is not PL/pgSQL",
            "read it yourself, and allow it",
        ),
        LintRule("unknown", "is not known to the rules", "read what PostgreSQL says about its lock"),
    )
}


@dataclass(frozen=True)
class Lint:
    """One finding. ``where`` is a file with a line, or a revision with the number of its statement."""

    where: str
    code: str
    statement: str
    text: str

    def __str__(self) -> str:
        return f"{self.where}: {self.code}: {self.text}"


def lint(path: Path) -> tuple[Lint, ...]:
    """Read a ``.sql`` file, a folder of them, or an Alembic script folder (``env.py`` beside ``versions/``).

    Alembic revisions are run in offline mode: their code is executed, no database is. Those that ask the database
    for something cannot be read that way and say so.

    Raises:
        ConfigError: there is nothing to read there, or a revision cannot be run offline; the message names its file.
    """
    if path.is_file() and path.suffix == ".sql":
        return tuple(_lint_script(path.name, path.read_text(encoding="utf-8"), {}))
    if (path / "env.py").is_file():
        return tuple(_lint_alembic(path))
    scripts = sorted(path.rglob("*.sql")) if path.is_dir() else []
    if not scripts:
        raise ConfigError(
            f"{path} is neither a .sql file, nor a folder with some, nor an Alembic folder (with env.py in it)",
            path=str(path),
        )
    domains: dict[str, bool] = {}
    return tuple(
        finding
        for script in scripts
        for finding in _lint_script(str(script.relative_to(path)), script.read_text(encoding="utf-8"), domains)
    )


_BLOCK = re.compile(r"(\$\w*\$).*?\1", re.DOTALL)  # a BEGIN in there is PL/pgSQL's


def _lint_script(name: str, text: str, domains: dict[str, bool]) -> Iterator[Lint]:
    """``domains`` are those of the scripts before, and are added to."""
    # most tools wrap a whole file into a transaction unless it brings its own
    own = re.search(r"^\s*BEGIN\b", _BLOCK.sub("", text), re.IGNORECASE | re.MULTILINE)
    reader = _Reader(in_transaction=not own, domains=domains)
    for statement, line in split(text):
        yield from reader.read(f"{name}:{line}", statement)


def _lint_alembic(folder: Path) -> Iterator[Lint]:
    env = (folder / "env.py").read_text(encoding="utf-8")
    separate = bool(re.search(r"transaction_per_migration\s*=\s*True", env))
    # a timeout that env.py sets on the connection cannot be read from here; that it speaks of one is taken for it
    session = {"lock_timeout": 1} if "lock_timeout" in env else {}
    reader = _Reader(in_transaction=True, session=session)
    for number, script in enumerate(_revisions(folder)):
        if separate:
            reader = _Reader(in_transaction=True, session=reader.session, domains=reader.domains)
        elif number and reader.held:
            yield _finding("shared-transaction", f"{script.revision}", script.doc or "", None)
        for position, (statement, _) in enumerate(split(_offline(script)), 1):
            yield from reader.read(f"{script.revision}, statement {position}", statement)


def _revisions(folder: Path) -> list[Script]:
    try:
        found = list(ScriptDirectory(str(folder)).walk_revisions())
    except Exception as error:  # whatever a revision's module does when it is imported
        raise ConfigError(f"the revisions cannot be read: {_failed(folder, error)}", path=str(folder)) from error
    if not found:
        raise ConfigError(
            f"there are no revisions in {folder / 'versions'}. Where version_locations in alembic.ini names other "
            "folders, run: alembic upgrade head --sql > all.sql, then: tallystick migrate lint all.sql",
            path=str(folder),
        )
    return found[::-1]


def _offline(script: Script) -> str:
    output = io.StringIO()
    context = MigrationContext.configure(
        dialect_name="postgresql", opts={"as_sql": True, "output_buffer": output, "literal_binds": True}
    )
    try:
        with Operations.context(context):
            script.module.upgrade()
    except Exception as error:  # whatever its code does
        raise ConfigError(
            f"revision {script.revision} cannot be read offline: {_failed(Path(script.path), error)}. Where it asks "
            "the database for something, give its SQL to tallystick migrate lint as a .sql file",
            path=str(script.path),
        ) from error
    return output.getvalue()


def _failed(at: Path, error: Exception) -> str:
    """The file and line of the revision's code that failed, with the error and what it may lack."""
    frames = [
        (frame.filename, frame.lineno)
        for frame in traceback.extract_tb(error.__traceback__)
        if Path(frame.filename).is_relative_to(at)
    ]
    if isinstance(error, SyntaxError) and error.filename:
        frames.append((error.filename, error.lineno))
    file, line = frames[-1] if frames else (at, None)
    lacks = {
        ImportError: ". Set PYTHONPATH to the folder that has it",
        FileNotFoundError: ". Run it from the folder in which alembic is run",
        KeyError: ". Where it reads a variable of the environment, set that",
    }
    hint = next((hint for kind, hint in lacks.items() if isinstance(error, kind)), "")
    return f"{file}{f', line {line}' if line else ''}: {type(error).__name__}: {error}{hint}"


@dataclass
class _Reader:
    """Follows the statements of one connection."""

    in_transaction: bool
    held: dict[str, Lock] = field(default_factory=dict)
    created: set[str] = field(default_factory=set)
    unvalidated: set[str] = field(default_factory=set)
    labels: set[str] = field(default_factory=set)
    referenced: set[str] = field(default_factory=set)
    session: dict[str, int] = field(default_factory=dict)
    local: dict[str, int] = field(default_factory=dict)
    domains: dict[str, bool] = field(default_factory=dict)  # and other types that were made: whether constrained

    def read(self, where: str, statement: str) -> Iterator[Lint]:
        allowed = set(re.findall(r"tallystick: allow ([\w-]+)", statement))
        for finding in self._read(where, statement):
            if finding.code not in allowed:
                yield finding

    def _read(self, where: str, statement: str) -> Iterator[Lint]:
        text, strings = normalise(statement)
        if self._control(text, strings):
            return
        if text.startswith("DO "):
            yield from self._read_block(where, statement)
            return
        found = operations(statement, domains={name for name, constrained in self.domains.items() if constrained})
        yield from (_finding(code, where, statement, None) for code in self._about(text, strings))
        for operation in found:
            for code in dict.fromkeys(self._judge(operation, text)):
                yield _finding(code, where, statement, operation)
            self._hold(operation)
        self._remember(text, strings)

    def _read_block(self, where: str, block: str) -> Iterator[Lint]:
        """What is in it, as a transaction of its own unless it is in one."""
        alone = not self.in_transaction
        self.in_transaction = True
        for statement, readable in statements_of_block(block):
            if not readable:
                yield _finding("unreadable", where, statement, None)
            elif re.match(r"(COMMIT|ROLLBACK)\b", statement, re.IGNORECASE):
                self._end()  # and the next begins at once
            else:
                yield from self._read(where, statement)
        if alone:
            self._end()
            self.in_transaction = False

    def _control(self, text: str, strings: tuple[str, ...]) -> bool:
        """Transaction control and timeouts; True where that is all the statement is."""
        if re.match(r"(BEGIN|START TRANSACTION)\b", text):
            if not self.in_transaction:  # in one it is a warning, and every lock is still held
                self._end()
            self.in_transaction = True
        elif re.match(r"(COMMIT|END|ROLLBACK|ABORT)\b(?! TO)", text):
            self._end()
            self.in_transaction = False
        elif setting := re.match(r"(?:SET|RESET) (LOCAL |SESSION )?(LOCK_TIMEOUT|STATEMENT_TIMEOUT)\b(.*)", text):
            value = strings[0].strip("'") if strings else re.sub(r"^ (=|TO) | ", "", setting[3])
            timeouts = self.local if setting[1] == "LOCAL " else self.session
            timeouts[setting[2].lower()] = _milliseconds(value)
        else:
            return False
        return True

    @property
    def timeouts(self) -> dict[str, int]:
        """In milliseconds, 0 for none."""
        return self.session | self.local

    def _end(self) -> None:
        self.local = {}
        self.held, self.unvalidated, self.labels, self.referenced = {}, set(), set(), set()

    def _about(self, text: str, strings: tuple[str, ...]) -> Iterator[str]:
        """What the statement as a whole does wrong."""
        concurrently = re.match(r"(CREATE|DROP|REINDEX|REFRESH|ALTER TABLE .* DETACH)\b.* CONCURRENTLY\b", text)
        builds = concurrently and not text.startswith(("DROP", "REFRESH"))
        if concurrently and self.in_transaction and not text.startswith("REFRESH"):
            yield "concurrently-in-transaction"
        if builds and any(0 < timeout < SHORT_TIMEOUT_MS for timeout in self.timeouts.values()):
            yield "concurrently-short-timeout"
        if builds and "IF NOT EXISTS" in text:
            yield "if-not-exists-index"
        if self.labels & set(strings) and "ADD VALUE" not in text:
            yield "new-label-used"
        constraint = re.search(r"VALIDATE CONSTRAINT (\S+)", text)
        if constraint and constraint[1] in self.unvalidated:
            yield "validate-in-transaction"

    def _judge(self, operation: Operation, text: str) -> Iterator[str]:
        if operation.name == "unknown":
            yield "unknown"
            return
        if operation.type is not None and operation.type not in KNOWN_TYPES and operation.type not in self.domains:
            yield "unknown-type"
        locks = ((operation.table, operation.lock), *operation.also)
        if not self.timeouts.get("lock_timeout") and any(self._waits(*pair) for pair in locks):
            yield "no-lock-timeout"
        for table, lock in locks:
            if self.in_transaction and table not in self.created and lock > self._held(table) >= Lock.SHARE:
                yield "foreign-key-first" if table in self.referenced else "lock-upgrade"
        if operation.table in self.created:
            return
        if operation.name in ("update rows", "delete rows", "merge rows", "insert rows"):
            locked = (lock for name, lock in self.held.items() if name not in self.created)
            if operation.name != "insert rows" and any(lock.blocks_writes for lock in locked):
                yield "rows-under-lock"
            elif operation.name in ("update rows", "delete rows") and " WHERE " not in text:
                yield "every-row"
            return
        yield from _about_the_operation(operation, self._held(operation.table), text)

    def _waits(self, table: str | None, lock: Lock) -> bool:
        """Whether traffic would queue behind the wait for this lock. What is not named may be any table."""
        return lock.blocks_writes and not self._held(table).blocks_writes and table not in self.created

    def _held(self, table: str | None) -> Lock:
        return self.held.get(table, Lock.NONE) if table else Lock.NONE

    def _hold(self, operation: Operation) -> None:
        if operation.name == "create a table" and operation.table:
            self.created.add(operation.table)
        if not self.in_transaction:
            return
        if operation.table is not None:
            self.held[operation.table] = max(self.held.get(operation.table, Lock.NONE), operation.lock)
        for table, lock in operation.also:
            if lock > self.held.get(table, Lock.NONE):
                self.held[table] = lock
                self.referenced.add(table)

    def _remember(self, text: str, strings: tuple[str, ...]) -> None:
        if "ADD VALUE" in text and self.in_transaction:
            self.labels |= set(strings[:1])
        if made := _TYPE_MADE.match(text):
            name = made["name"]
            plain = name[1:-1] if name.startswith('"') else name.lower()
            self.domains[plain] = made["kind"] == "DOMAIN" and bool(re.search(r" CHECK \(| NOT NULL", text))
        for constraint in re.finditer(r"ADD CONSTRAINT (\S+)", text):
            self.unvalidated.add(constraint[1])


_TYPE_MADE = re.compile(r"CREATE (?P<kind>TYPE|DOMAIN) (?:\S+ \. )?(?P<name>\"(?:[^\"]|\"\")*\"|\S+)")


_DROPPED = re.compile(r"DROP CONSTRAINT (?:IF EXISTS )?(\S+)")
_ADDED = re.compile(r"ADD CONSTRAINT (\S+)")


def _about_the_operation(operation: Operation, held: Lock, text: str) -> Iterator[str]:
    strongest = max(operation.lock, held)
    if operation.name in ("build an index", "rebuild an index", "drop an index"):
        yield "index-not-concurrent"
    elif operation.rewrites:
        yield "rewrite"
    elif operation.name == "add a NOT NULL column without a default":
        yield "not-null-without-default"
    elif operation.name == "change a domain's constraints":
        yield "domain-constraint"
    elif operation.name == "validate a constraint":
        pass  # in a transaction of its own it blocks nobody, and in the one that added it there is a rule for it
    elif operation.scans and strongest.blocks_writes and "CONCURRENTLY" not in text:
        yield "scan-under-lock"
    added_anew = operation.name == "drop a constraint" and set(_DROPPED.findall(text)) <= set(_ADDED.findall(text))
    if operation.breaks and not added_anew:
        yield operation.breaks


def _finding(code: str, where: str, statement: str, operation: Operation | None) -> Lint:
    rule = RULES[code]
    shown = " ".join(statement.split())[:100]
    subject = f"{operation.name} on {operation.table}" if operation and operation.table else shown
    notes = operation is not None and (rule.remedy.startswith("see") or code == operation.breaks)
    remedy = operation.note if operation and operation.note and notes else rule.remedy
    return Lint(where, code, shown, f"{subject}: {rule.says}. {remedy[:1].upper()}{remedy[1:]}")


def _milliseconds(value: str) -> int:
    found = re.fullmatch(r"(\d+)\s*(us|ms|s|min|h|d)?", value.strip().lower())
    if not found:
        return 0
    unit = {"us": 0.001, None: 1, "ms": 1, "s": 1000, "min": 60_000, "h": 3_600_000, "d": 86_400_000}[found[2]]
    return int(int(found[1]) * unit)
