"""Which operation takes which lock, and whether it reads or rewrites the whole table: PostgreSQL 14 to 18, as a table.

``operations(sql)`` reads DDL as text, so it also serves other people's migrations. It knows statements by their
shape, not by parsing all of SQL: what no rule matches is reported as unknown, never as harmless.
"""

from __future__ import annotations

import re
from collections.abc import Container, Iterator
from dataclasses import dataclass
from enum import IntEnum
from typing import Literal


class Lock(IntEnum):
    """A table lock, weakest first."""

    NONE = 0
    ACCESS_SHARE = 1
    ROW_SHARE = 2
    ROW_EXCLUSIVE = 3
    SHARE_UPDATE_EXCLUSIVE = 4
    SHARE = 5
    SHARE_ROW_EXCLUSIVE = 6
    EXCLUSIVE = 7
    ACCESS_EXCLUSIVE = 8

    def __str__(self) -> str:
        return self.name.replace("_", " ")

    @property
    def blocks_writes(self) -> bool:
        """Whether INSERT, UPDATE and DELETE must wait for it."""
        return self >= Lock.SHARE

    @property
    def blocks_reads(self) -> bool:
        """Whether SELECT must wait for it."""
        return self == Lock.ACCESS_EXCLUSIVE


Broken = Literal["drop", "rename", "truncate", "row-security"]
"""How an operation can break code that is running, by the lint's code for it."""


@dataclass(frozen=True)
class Rule:
    """One row of the table: an operation, known by a pattern over its normalised text."""

    name: str
    pattern: str
    lock: Lock
    scans: bool = False
    rewrites: bool = False
    breaks: Broken | None = None
    note: str = ""


_N = r'(?P<table>(?:"(?:[^"]|"")*"|[\w$]+)(?: \. (?:"(?:[^"]|"")*"|[\w$]+))*)'
_ON = rf"(?:ONLY )?{_N}"
_LIST = rf"{_ON}(?P<more>.*)"  # of names: an operation for each
_IF = r"(?:IF (?:NOT )?EXISTS )?"
_AEL, _SRE, _SUE = Lock.ACCESS_EXCLUSIVE, Lock.SHARE_ROW_EXCLUSIVE, Lock.SHARE_UPDATE_EXCLUSIVE
_GONE_WITH_IT = "what depends on it goes too, and every table with a column among that is locked"
_OTHERS_RIGHTS = "release code that needs no such right, or GRANT what it needs first"
# A function that is not stable is run for every row, which rewrites the table. Unknown ones count as such.
_STABLE = (
    "NOW|TRANSACTION_TIMESTAMP|STATEMENT_TIMESTAMP|CURRENT_SETTING|TO_JSON|TO_JSONB|JSON_BUILD_OBJECT"
    "|JSONB_BUILD_OBJECT|MAKE_INTERVAL|LOWER|UPPER|COALESCE|DATE_TRUNC|TIMEZONE|ARRAY|VARCHAR|CHAR|NUMERIC|DECIMAL"
    "|BIT|TIMESTAMP|TIMESTAMPTZ|TIME|TIMETZ|INTERVAL|CHARACTER|VARYING|PRECISION|CHECK|KEY|REFERENCES|TO_TIMESTAMP"
)
_VOLATILE_DEFAULT = rf"DEFAULT (?:(?! NOT NULL| CHECK| REFERENCES| UNIQUE).)*?\b(?!(?:{_STABLE}) \()[A-Z_]\w* \("
_COLUMN = rf"ADD (?:COLUMN )?{_IF}(?!CONSTRAINT |CHECK |UNIQUE |PRIMARY |FOREIGN |EXCLUDE )"

ACTIONS = (
    # one action of ALTER TABLE; the first that matches
    Rule("add a generated column", _COLUMN + r".* GENERATED ALWAYS AS \( .*STORED", _AEL, rewrites=True),
    Rule(
        "add a column with a sequence",
        _COLUMN + r".*(?: (?:SMALL|BIG)?SERIAL\b|GENERATED .*AS IDENTITY)",
        _AEL,
        rewrites=True,
        note="add it nullable, fill it in batches, then attach the sequence",
    ),
    Rule(
        "add a column with a volatile default",
        _COLUMN + ".*" + _VOLATILE_DEFAULT,
        _AEL,
        rewrites=True,
        note="add the column without a default, set the default, then fill old rows in batches",
    ),
    Rule(
        "add a column with an inline UNIQUE or PRIMARY KEY",
        _COLUMN + r".* (?:UNIQUE|PRIMARY KEY)",
        _AEL,
        scans=True,
        note="add the column, then the unique index CONCURRENTLY, then the constraint USING INDEX",
    ),
    Rule(
        "add a column with an inline CHECK",
        _COLUMN + r".* CHECK \(",
        _AEL,
        scans=True,
        note="add the column, then the constraint NOT VALID, then VALIDATE it in a later transaction",
    ),
    Rule(
        "add a column with an inline REFERENCES",
        _COLUMN + r".* REFERENCES (?:[\w$\".]| \. )+",
        _AEL,
        note="every row is null, so nothing is checked, but the referenced table is locked against writes too",
    ),
    Rule(
        "add a NOT NULL column without a default",
        _COLUMN + r"(?!.*DEFAULT ).* NOT NULL",
        _AEL,
        scans=True,
        note="fails as soon as the table has a row: give it a default",
    ),
    Rule("add a column", _COLUMN, _AEL),
    Rule("drop a column", rf"DROP (?:COLUMN )?{_IF}(?!CONSTRAINT )", _AEL, breaks="drop"),
    Rule("change a constraint", r"ALTER CONSTRAINT", _AEL),
    Rule(
        "change a column's type",
        r"ALTER (?:COLUMN )?.* TYPE ",
        _AEL,
        rewrites=True,
        note="only lengthening a varchar or going to text is free; else add a new column and fill it in batches",
    ),
    Rule(
        "set NOT NULL",
        r"ALTER (?:COLUMN )?.* SET NOT NULL",
        _AEL,
        scans=True,
        note="add CHECK (column IS NOT NULL) NOT VALID, VALIDATE it later, then SET NOT NULL reads nothing",
    ),
    Rule("set statistics", r"ALTER (?:COLUMN )?.* SET (?:STATISTICS|\()", _SUE),
    Rule("change a generated column", r"ALTER (?:COLUMN )?.* SET EXPRESSION", _AEL, rewrites=True),
    Rule(
        "drop NOT NULL",
        r"ALTER (?:COLUMN )?.* DROP NOT NULL",
        _AEL,
        breaks="drop",
        note="release code that can read a null first",
    ),
    Rule("drop a default", r"ALTER (?:COLUMN )?.* DROP (?:DEFAULT|EXPRESSION|IDENTITY)", _AEL, breaks="drop"),
    Rule("change a column's default", r"ALTER (?:COLUMN )?.* (?:SET|ADD|RESTART)\b", _AEL),
    Rule("add a constraint from an index", r"ADD (?:CONSTRAINT .* )?UNIQUE USING INDEX", _AEL),
    Rule(
        "add a primary key from an index",
        r"ADD (?:CONSTRAINT .* )?PRIMARY KEY USING INDEX",
        _AEL,
        scans=True,
        note="where its columns are NOT NULL already it reads nothing: make them so first, then allow it",
    ),
    Rule(
        "add a unique or primary key constraint",
        r"ADD (?:CONSTRAINT .* )?(?:UNIQUE|PRIMARY KEY|EXCLUDE)",
        _AEL,
        scans=True,
        note="build the unique index CONCURRENTLY first, then ADD CONSTRAINT … USING INDEX",
    ),
    Rule("add a foreign key, not validated", r"ADD (?:CONSTRAINT .* )?FOREIGN KEY .* NOT VALID", _SRE),
    Rule(
        "add a foreign key",
        r"ADD (?:CONSTRAINT .* )?FOREIGN KEY",
        _SRE,
        scans=True,
        note="add it NOT VALID, then VALIDATE it in a later transaction",
    ),
    Rule("add a CHECK, not validated", r"ADD (?:CONSTRAINT .* )?CHECK .* NOT VALID", _AEL),
    Rule(
        "add a CHECK",
        r"ADD (?:CONSTRAINT .* )?CHECK",
        _AEL,
        scans=True,
        note="add it NOT VALID, then VALIDATE it in a later transaction",
    ),
    Rule("add a NOT NULL constraint", r"ADD (?:CONSTRAINT .* )?NOT NULL(?!.*NOT VALID)", _AEL, scans=True),
    Rule("validate a constraint", r"VALIDATE CONSTRAINT", _SUE, scans=True),
    Rule(
        "drop a constraint",
        r"DROP CONSTRAINT",
        _AEL,
        breaks="drop",
        note="release code that does without it first; a foreign key's other table is locked as well",
    ),
    Rule("attach a partition", r"ATTACH PARTITION", _SUE, scans=True),
    Rule("detach a partition concurrently", r"DETACH PARTITION .* CONCURRENTLY", _SUE, breaks="drop"),
    Rule(
        "detach a partition",
        r"DETACH PARTITION",
        _AEL,
        breaks="drop",
        note="release code that does without its rows first, and use CONCURRENTLY, outside of a transaction",
    ),
    Rule("enable a trigger", r"ENABLE (?:REPLICA |ALWAYS )?TRIGGER", _SRE),
    Rule("disable a trigger", r"DISABLE TRIGGER", _SRE, breaks="drop"),
    Rule("switch a rule", r"(?:ENABLE|DISABLE) (?:REPLICA |ALWAYS )?RULE", _AEL),
    Rule("switch row security", r"(?:ENABLE|DISABLE|FORCE|NO FORCE) ROW LEVEL SECURITY", _AEL, breaks="row-security"),
    Rule("set storage parameters", r"(?:RE)?SET \(|CLUSTER ON|SET WITHOUT CLUSTER", _SUE),
    Rule("rewrite the table", r"SET (?:LOGGED|UNLOGGED|TABLESPACE|ACCESS METHOD)", _AEL, rewrites=True),
    Rule("rename", r"RENAME", _AEL, breaks="rename"),
    Rule("move to another schema", r"SET SCHEMA", _AEL, breaks="rename"),
    Rule("change the owner", r"OWNER TO", _AEL, breaks="drop", note=_OTHERS_RIGHTS),
    Rule(
        "give up the replica identity",
        r"REPLICA IDENTITY NOTHING",
        _AEL,
        breaks="drop",
        note="UPDATE and DELETE fail as long as a publication has the table: take it out first",
    ),
    Rule("change the replica identity", r"REPLICA IDENTITY", _AEL),
    Rule("inherit", r"INHERIT", _AEL),
    Rule("inherit no more", r"NO INHERIT", _AEL, breaks="drop"),
    Rule("unknown", r"", _AEL, note="no rule knows this form of ALTER TABLE"),
)

STATEMENTS = (
    Rule(
        "build an index concurrently",
        rf"CREATE (?:UNIQUE )?INDEX CONCURRENTLY .*?\bON {_ON}",
        _SUE,
        scans=True,
        note="not inside a transaction, and without lock_timeout",
    ),
    Rule(
        "build an index",
        rf"CREATE (?:UNIQUE )?INDEX .*?\bON {_ON}",
        Lock.SHARE,
        scans=True,
        note="writes wait for the whole build: use CONCURRENTLY, outside of the transaction",
    ),
    Rule("drop an index concurrently", rf"DROP INDEX CONCURRENTLY {_IF}{_LIST}", _SUE),
    Rule(
        "drop an index",
        rf"DROP INDEX {_IF}{_LIST}",
        _AEL,
        note="everyone waits for the lock on its table: use CONCURRENTLY, outside of a transaction",
    ),
    Rule("rebuild concurrently", rf"REINDEX .*CONCURRENTLY {_N}", _SUE, scans=True),
    Rule("rebuild an index", rf"REINDEX (?:\( .* \) )?\w+ {_N}", _AEL, scans=True, note="use CONCURRENTLY"),
    Rule("create a table", rf"CREATE (?:UNLOGGED |TEMP(?:ORARY)? )?TABLE {_IF}{_N}", Lock.NONE),
    Rule("drop a table", rf"DROP (?:FOREIGN )?TABLE {_IF}{_LIST}", _AEL, breaks="drop"),
    Rule("drop a view or sequence", rf"DROP (?:(?:MATERIALIZED )?VIEW|SEQUENCE) {_IF}{_LIST}", _AEL, breaks="drop"),
    Rule("truncate", rf"TRUNCATE (?:TABLE )?{_LIST}", _AEL, breaks="truncate"),
    Rule("create a trigger", rf"CREATE (?:OR REPLACE )?(?:CONSTRAINT )?TRIGGER .*?\bON {_N}", _SRE),
    Rule("drop a trigger", rf"DROP TRIGGER {_IF}.*?\bON {_N}", _AEL, breaks="drop"),
    Rule("change a policy", rf"(?:CREATE|DROP|ALTER) POLICY .*?\bON {_N}", _AEL, breaks="row-security"),
    Rule("create a rule", rf"CREATE (?:OR REPLACE )?RULE .*?\bTO {_N}", _AEL),
    Rule("drop a rule", rf"DROP RULE {_IF}.*?\bON {_N}", _AEL, breaks="drop"),
    Rule("drop an object with CASCADE", r"DROP .* CASCADE", _AEL, breaks="drop", note=_GONE_WITH_IT),
    Rule("drop an object", r"DROP ", Lock.NONE, breaks="drop"),
    Rule("vacuum full", rf"(?:VACUUM \( .*FULL.* \)|VACUUM FULL|CLUSTER)(?: VERBOSE)? {_LIST}", _AEL, rewrites=True),
    Rule("vacuum or analyse", rf"(?:VACUUM|ANALYZE)(?: \( .* \))?(?: VERBOSE)? {_LIST}", _SUE, scans=True),
    Rule("refresh a view concurrently", rf"REFRESH MATERIALIZED VIEW CONCURRENTLY {_N}", Lock.EXCLUSIVE, scans=True),
    Rule("refresh a view", rf"REFRESH MATERIALIZED VIEW {_N}", _AEL, rewrites=True, note="use CONCURRENTLY"),
    Rule("lock", rf"LOCK (?:TABLE )?{_LIST}", _AEL),
    Rule("update rows", rf"UPDATE {_ON}", Lock.ROW_EXCLUSIVE, scans=True),
    Rule("delete rows", rf"DELETE FROM {_ON}", Lock.ROW_EXCLUSIVE, scans=True),  # noqa: S608  # a pattern
    Rule("merge rows", rf"MERGE INTO {_ON}", Lock.ROW_EXCLUSIVE, scans=True),
    Rule("insert rows", rf"INSERT INTO {_N}", Lock.ROW_EXCLUSIVE),
    Rule("comment", r"COMMENT ON ", Lock.NONE),
    Rule(
        "rename a relation",
        rf"ALTER (?:(?:MATERIALIZED )?VIEW|SEQUENCE) {_IF}{_N} (?:RENAME|SET SCHEMA)",
        _AEL,
        breaks="rename",
    ),
    Rule("rename an object", r"ALTER .* (?:RENAME|SET SCHEMA) ", Lock.NONE, breaks="rename"),
    Rule("add a domain's constraint, not validated", r"ALTER DOMAIN .* ADD .*CHECK .* NOT VALID", Lock.NONE),
    Rule(
        "change a domain's constraints",
        r"ALTER DOMAIN .* (?:ADD |VALIDATE |SET NOT NULL)",
        Lock.SHARE,
        scans=True,
        note="add it NOT VALID, which reads nothing, and leave it so; VALIDATE keeps writers out just as long. "
        "Where old rows must be checked, use a CHECK of the table",
    ),
    Rule(
        "new object", r"CREATE (?:OR REPLACE )?(?:TYPE|FUNCTION|PROCEDURE|SCHEMA|SEQUENCE|DOMAIN|EXTENSION)", Lock.NONE
    ),
    Rule("replace a view", rf"CREATE OR REPLACE (?:TEMP(?:ORARY)? |RECURSIVE )*VIEW {_N}", _AEL),
    Rule("new view", r"CREATE (?:TEMP(?:ORARY)? |RECURSIVE |MATERIALIZED )*VIEW", Lock.NONE),
    Rule("add an enum label", r"ALTER TYPE .* ADD VALUE", Lock.NONE, note="not usable before the commit"),
    Rule(
        "drop a part of an object",
        r"ALTER (?:TYPE|DOMAIN) .* DROP (?:ATTRIBUTE|CONSTRAINT|NOT NULL|DEFAULT)",
        Lock.NONE,
        breaks="drop",
    ),
    Rule(
        "change another object",
        r"ALTER (?:TYPE|FUNCTION|PROCEDURE|ROUTINE|SCHEMA|SEQUENCE|DOMAIN|(?:MATERIALIZED )?VIEW) (?!.*ALTER ATTR)",
        Lock.NONE,
    ),
    Rule("privileges", r"(?:GRANT|ALTER DEFAULT PRIVILEGES)", Lock.NONE),
    Rule(
        "revoke",
        rf"REVOKE .*?\bON (?:TABLE )?{_N}(?P<more>(?: , .*)?) FROM ",
        Lock.NONE,
        breaks="drop",
        note=_OTHERS_RIGHTS,
    ),
    Rule("revoke", r"REVOKE ", Lock.NONE, breaks="drop", note=_OTHERS_RIGHTS),
    Rule("transaction control", r"(?:BEGIN|START|COMMIT|END|ROLLBACK|SAVEPOINT|RELEASE|ABORT)\b", Lock.NONE),
    Rule("setting", r"(?:SET|RESET|SHOW)\b", Lock.NONE),
    Rule("query", r"(?:SELECT|VALUES|TABLE|EXPLAIN)\b", Lock.NONE),
    Rule("block of code", r"DO ", Lock.NONE, note="statements_of_block reads what is in it"),
)

DOMAIN_COLUMN = Rule(
    "add a column of a domain with constraints",
    "",  # known by its type, not by its shape
    _AEL,
    rewrites=True,
    note="even without a default, even if the constraints are NOT VALID: use the type behind it, and a CHECK NOT VALID",
)

_BUILT_IN = """
    bigint bigserial bit bool boolean box bytea char character cidr circle date daterange datemultirange decimal double
    float float4 float8 inet int int2 int2vector int4 int4multirange int4range int8 int8multirange int8range integer
    interval json jsonb jsonpath line lseg macaddr macaddr8 money name nchar national numeric nummultirange numrange
    oid path pg_lsn pg_snapshot point polygon real regclass regproc regtype serial serial2 serial4 serial8 smallint
    smallserial text time timestamp timestamptz timetz tsmultirange tsquery tsrange tstzmultirange tstzrange tsvector
    txid_snapshot uuid varbit varchar xid xid8 xml
"""
_OF_EXTENSIONS = "citext cube geography geometry halfvec hstore ltree raster seg sparsevec vector"
KNOWN_TYPES = frozenset((_BUILT_IN + _OF_EXTENSIONS).split())
"""Types that are no domains: PostgreSQL's own, and those of common extensions."""

_TYPE = re.compile(rf"{_COLUMN}(?:\"(?:[^\"]|\"\")*\"|[\w$]+) {_N}(?P<array>(?: \( [^)]* \))? (?:\[|ARRAY\b))?")
_LOCK_MODE = re.compile(r" IN ([A-Z ]+?) MODE")
_PARTITION_OF = re.compile(rf"PARTITION OF {_N}")
_REFERENCES = re.compile(rf"REFERENCES {_N}")
_ALTER_TABLE = re.compile(rf"ALTER TABLE {_IF}{_ON}(?: \*)? (?P<actions>.*)")
_EXPLAINED = re.compile(  # which runs it
    r"EXPLAIN (?:\( [^)]*\bANALYZE\b[^)]*\)|ANALYZE(?: VERBOSE)?|VERBOSE ANALYZE) (?P<statement>.*)"
)
_NAME = re.compile(_ON)
_ACTIONS = [(rule, re.compile(rule.pattern)) for rule in ACTIONS]
_STATEMENTS = [(rule, re.compile(rule.pattern)) for rule in STATEMENTS]


@dataclass(frozen=True)
class Operation:
    """What one statement, or one action of an ALTER TABLE, does to one table.

    ``table`` is as PostgreSQL stores the name, without quotes, or None for an operation on no table.
    ``also`` are the tables that it locks besides: (table, lock). ``type`` is that of a column that it adds, without
    its schema, and None for an array. ``breaks`` is how it can break running code.
    """

    name: str
    table: str | None
    lock: Lock
    scans: bool
    rewrites: bool
    note: str
    also: tuple[tuple[str, Lock], ...] = ()
    type: str | None = None
    breaks: Broken | None = None


_SCAN_BYTES_PER_MS = 400_000
_REWRITE_BYTES_PER_MS = 12_000
_DDL_MS = 1.5


def estimated_ms(operation: Operation, table_bytes: int) -> float:
    """About how long it holds its lock: measured on tables of 1,000,000 rows with two cores, good for comparison."""
    if operation.rewrites:
        return _DDL_MS + table_bytes / _REWRITE_BYTES_PER_MS
    if operation.scans:
        return _DDL_MS + table_bytes / _SCAN_BYTES_PER_MS
    return _DDL_MS if operation.lock > Lock.ROW_EXCLUSIVE else 0.0


def operations(statement: str, *, domains: Container[str] = ()) -> tuple[Operation, ...]:
    """What one statement does. An ALTER TABLE gives one operation for each of its actions.

    ``domains`` are names, without schema, of the domains known to have constraints.
    """
    text, _ = normalise(statement)
    if explained := _EXPLAINED.match(text):
        text = explained["statement"]
    if altered := _ALTER_TABLE.match(text):
        table = _unquoted(altered["table"])
        return tuple(_action(table, action, domains) for action in _split_commas(altered["actions"]))
    for rule, pattern in _STATEMENTS:
        if found := pattern.match(text):
            return tuple(_operations(rule, found, text))
    return (Operation("unknown", None, Lock.ACCESS_EXCLUSIVE, False, False, "no rule knows this statement"),)


def _operations(rule: Rule, found: re.Match[str], text: str) -> Iterator[Operation]:
    lock = rule.lock
    table = _unquoted(found["table"]) if "table" in found.re.groupindex else None
    also: tuple[tuple[str, Lock], ...] = ()
    if rule.name == "lock":
        mode = _LOCK_MODE.search(text)
        lock = Lock[mode[1].replace(" ", "_")] if mode else lock
    if rule.name == "create a table":
        also = tuple((_unquoted(ref["table"]), Lock.SHARE_ROW_EXCLUSIVE) for ref in _REFERENCES.finditer(text))
        also += tuple((_unquoted(ref["table"]), _AEL) for ref in _PARTITION_OF.finditer(text))
        also = tuple(pair for pair in dict.fromkeys(also) if pair[0] != table)
    names = [table]
    if "more" in found.re.groupindex:
        others = (_NAME.match(part) for part in _split_commas(found["more"])[1:])
        names += [_unquoted(other["table"]) for other in others if other]
    for name in names:
        yield Operation(rule.name, name, lock, rule.scans, rule.rewrites, rule.note, also, breaks=rule.breaks)


def _action(table: str, action: str, domains: Container[str]) -> Operation:
    rule = next(rule for rule, pattern in _ACTIONS if pattern.match(action))
    typed = _TYPE.match(action)
    column_type = _unquoted(typed["table"]).rpartition(".")[2] if typed and not typed["array"] else None
    if column_type is not None and column_type in domains:
        rule = DOMAIN_COLUMN
    also = tuple((_unquoted(ref["table"]), Lock.SHARE_ROW_EXCLUSIVE) for ref in _REFERENCES.finditer(action))
    return Operation(rule.name, table, rule.lock, rule.scans, rule.rewrites, rule.note, also, column_type, rule.breaks)


# --- reading SQL as far as this needs

_TOKEN = re.compile(
    r"""
    (?P<space>\s+ | --[^\n]* | \\(?:(?=;) | [a-z][^\n]*))  # psql's own commands too, and its \; for one message
  | (?P<comment>/\*)
  | (?P<dollar>\$(?:[A-Za-z_\x80-\uffff][\w\x80-\uffff]*)?\$)
  | (?P<escaped>[eE]'(?:[^'\\]|\\.|'')*')
  | (?P<string>(?:[bBxXnN]|[uU]&)?'(?:[^']|'')*')
  | (?P<quoted>(?:[uU]&)?"(?:[^"]|"")*")
  | (?P<word>[A-Za-z_\x80-\uffff][\w$\x80-\uffff]*)
  | (?P<number>\d[\w.]*)
  | (?P<end>;)
  | (?P<other>::|.)
    """,
    re.VERBOSE | re.DOTALL,
)


def _tokens(text: str) -> Iterator[tuple[str, str, int]]:
    """(kind, text, offset), without white space and comments; a dollar-quoted body is one string."""
    at = 0
    while at < len(text):
        found = _TOKEN.match(text, at)
        assert found is not None  # noqa: S101  # `other` matches anything
        kind, token = str(found.lastgroup), found[0]
        end = found.end()
        if kind == "comment":
            end = _end_of_comment(text, at)
        elif kind == "dollar":
            close = text.find(token, end)
            end = len(text) if close < 0 else close + len(token)
            yield "string", text[at:end], at
        elif kind != "space":
            yield ("string" if kind == "escaped" else kind), token, at
        at = end


def _end_of_comment(text: str, at: int) -> int:
    depth = 0
    for mark in re.finditer(r"/\*|\*/", text[at:]):
        depth += 1 if mark[0] == "/*" else -1
        if depth == 0:
            return at + mark.end()
    return len(text)


def normalise(statement: str) -> tuple[str, tuple[str, ...]]:
    """One line with keywords in capitals and single spaces; strings are taken out (``'?'``) and given in order."""
    parts: list[str] = []
    strings: list[str] = []
    for kind, token, _ in _tokens(statement):
        if kind == "string":
            strings.append(token)
            parts.append("'?'")
        elif kind == "word":
            parts.append(token.upper())
        elif kind != "end":
            parts.append(token)
    return " ".join(parts), tuple(strings)


def split(script: str) -> Iterator[tuple[str, int]]:
    """The statements of a script, each with the line on which it begins (1-based)."""
    begin: int | None = None
    end = 0
    for kind, token, at in _tokens(script):
        if kind == "end":
            if begin is not None:
                yield script[begin:at].removesuffix("\\"), script.count("\n", 0, begin) + 1
            begin = None
            continue
        if begin is None:
            begin = at
        end = at + len(token)
    if begin is not None:
        yield script[begin:end], script.count("\n", 0, begin) + 1


# --- what a DO block runs

_THROUGH = {
    "IF": "THEN",
    "ELSIF": "THEN",
    "ELSEIF": "THEN",
    "CASE": "THEN",
    "WHEN": "THEN",
    "FOR": "LOOP",
    "FOREACH": "LOOP",
    "WHILE": "LOOP",
}
_NO_STATEMENT = frozenset(
    "ASSERT CLOSE CONTINUE EXIT FETCH GET MOVE NULL OPEN PERFORM RAISE RETURN".split()  # noqa: SIM905  # a list of words
)
_ASSIGNMENT = re.compile(r"[\w$\"]+(?: \. [\w$\"]+)*(?: \[ .*? \])? (?:: )?= ")
_PLACEHOLDER = re.compile(r"%(?:\d+\$)?([ILs%])")

_Token = tuple[str, str, int]


def statements_of_block(statement: str) -> Iterator[tuple[str, bool]]:
    """The SQL that a ``DO`` block may run, in the order in which it is written: (text, whether it can be read).

    Every branch counts, and a loop once. What is put together while it runs (``EXECUTE`` of anything but a string or
    a ``format`` of one), or is written in another language than PL/pgSQL, is given as it stands, as not readable.
    Of a ``format`` an identifier is taken for a table called ``%I``.
    """
    tokens = [token for token in _tokens(statement) if token[0] != "end"]
    words = [token.upper() for kind, token, _ in tokens]
    bodies = [token for kind, token, _ in tokens if kind == "string"]
    if len(bodies) != 1 or ("LANGUAGE" in words and "PLPGSQL" not in words):
        yield statement, False
        return
    body = _content(bodies[0])
    declaring = False
    for chunk in _chunks(body):
        first = chunk[0][1].upper()
        declaring = (declaring or first == "DECLARE") and first != "BEGIN"
        if not declaring:
            yield from _of_chunk(body, chunk)


def _chunks(body: str) -> Iterator[list[_Token]]:
    chunk: list[_Token] = []
    for token in _tokens(body):
        if token[0] != "end":
            chunk.append(token)
        elif chunk:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def _of_chunk(body: str, chunk: list[_Token]) -> Iterator[tuple[str, bool]]:
    """The statement after all the ``IF … THEN``, ``LOOP`` and the like in front of it."""
    while chunk:
        word = chunk[0][1].upper()
        if word in ("BEGIN", "ELSE", "LOOP", "EXCEPTION"):
            chunk = chunk[1:]
        elif word == "<":  # <<label>>
            chunk = chunk[5:]
        elif word in _THROUGH:
            end = next((at for at, token in enumerate(chunk) if token[1].upper() == _THROUGH[word]), len(chunk))
            if word == "FOR":
                yield from _query_of_loop(body, chunk[:end])
            chunk = chunk[end + 1 :]
        else:
            break
    if not chunk or chunk[0][1].upper() == "END":
        return
    text = _text_of(body, chunk)
    if chunk[0][1].upper() == "EXECUTE":
        yield from _executed(chunk, text)
    elif chunk[0][1].upper() not in _NO_STATEMENT and not _ASSIGNMENT.match(normalise(text)[0]):
        yield text, True


def _query_of_loop(body: str, head: list[_Token]) -> Iterator[tuple[str, bool]]:
    """``FOR row IN UPDATE … RETURNING …`` runs a statement too."""
    at = next((at for at, token in enumerate(head) if token[1].upper() == "IN"), len(head))
    query = head[at + 1 :]
    if query and query[0][1].upper() == "EXECUTE":
        yield from _executed(query, _text_of(body, query))
    elif query and query[0][1].upper() in ("INSERT", "UPDATE", "DELETE", "MERGE", "WITH"):
        yield _text_of(body, query), True


def _executed(chunk: list[_Token], text: str) -> Iterator[tuple[str, bool]]:
    words = [token.upper() for _, token, _ in chunk]
    if words[1:3] == ["FORMAT", "("] and len(chunk) > 3 and chunk[3][0] == "string":  # noqa: PLR2004 - EXECUTE format ( '…'
        template = _content(chunk[3][1])
        after = words[4:5]
        if after in ([","], [")"]) and all(found[1] != "s" for found in _PLACEHOLDER.finditer(template)):
            filled = _PLACEHOLDER.sub(lambda found: {"I": '"%I"', "L": "'%L'", "%": "%"}[found[1]], template)
            yield from ((statement, True) for statement, _ in split(filled))
            return
    elif len(chunk) > 1 and chunk[1][0] == "string" and (len(chunk) == 2 or words[2] in ("INTO", "USING")):  # noqa: PLR2004
        yield from ((statement, True) for statement, _ in split(_content(chunk[1][1])))
        return
    yield text, False


def _text_of(body: str, chunk: list[_Token]) -> str:
    return body[chunk[0][2] : chunk[-1][2] + len(chunk[-1][1])]


def _content(literal: str) -> str:
    """What a string literal says, but for backslashes."""
    if literal.startswith("$"):
        mark = literal[: literal.index("$", 1) + 1]
        return literal.removeprefix(mark).removesuffix(mark)
    return literal[literal.index("'") + 1 : -1].replace("''", "'")


def _split_commas(text: str) -> list[str]:
    """At the commas outside of parentheses and brackets."""
    parts: list[list[str]] = [[]]
    depth = 0
    for word in text.split(" "):
        depth += (word in ("(", "[")) - (word in (")", "]"))
        if word == "," and depth == 0:
            parts.append([])
        else:
            parts[-1].append(word)
    return [" ".join(part) for part in parts]


def _unquoted(name: str) -> str:
    """``PUBLIC . "User"`` as ``public.User``."""
    parts = re.findall(r'"(?:[^"]|"")*"|[^\s."]+', name.removeprefix("ONLY "))
    return ".".join(part[1:-1].replace('""', '"') if part.startswith('"') else part.lower() for part in parts)
