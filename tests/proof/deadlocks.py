"""Everything that an app and the ledger do at three users at once, by 24 clients: the server counts its deadlocks.

    python tests/proof/deadlocks.py --seconds 600                                    on the embedded PostgreSQL
    python tests/proof/deadlocks.py --seconds 600 --bin /usr/lib/postgresql/15/bin   on another one

The clients are pgbench's, which draws one of ``MIX`` for each client again and again: one database transaction, or
calls in autocommit. Not among them are the two kinds that deadlock by PostgreSQL's own rules: transactions that spend
for several users in any order, and ``AFTER_SPENDING``.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import sqlalchemy as sa

sys.path.insert(0, str(Path(__file__).parents[1]))

from tallystick import HostMapping, UsersTable, WorkshopsTable, migrate
from tallystick.audit import audit
from tallystick.dev.postgres import Server
from tallystick.dev.throwaway import FAST
from worlds import World

HOST = HostMapping(
    users=UsersTable(key_type="bigint"), workshops=WorkshopsTable(key_type="bigint", title=None, created_at=None)
)
DDL = """
CREATE TABLE users (id bigint PRIMARY KEY, email text NOT NULL UNIQUE, name text);
CREATE TABLE workshops (id bigint PRIMARY KEY, user_id bigint NOT NULL REFERENCES users (id));
"""
CLIENTS = 24

DRAWN = """
\\set user random(1, 3)
\\set other random(1, 3)
\\set n random(1, 1000000000)
\\set workshop :user + 3 * random(0, 60)
"""
"""The first lines of each script. A workshop belongs to ``user``: its number is the user's and a multiple of 3."""

SPEND = "SELECT outcome FROM tallystick.consume(user_id => :user, key => '{} :client_id :n');\n"
REFER = "INSERT INTO workshops (id, user_id) VALUES (:workshop, :user) ON CONFLICT DO NOTHING;\n"
NAME = "UPDATE users SET name = 'name :n' WHERE id = :user;\n"
EMAIL = "UPDATE users SET email = 'email :client_id :n' WHERE id = :user;\n"


def transaction(*statements: str) -> str:
    """One database transaction."""
    return f"BEGIN;\n{''.join(statements)}COMMIT;\n"


MIX: Mapping[str, str] = {
    # the ledger alone
    "spend": SPEND.format("spend"),
    "unlock": """
        SELECT outcome FROM tallystick.consume(
          user_id => :user, key => 'unlock :client_id :n', workshop_id => :workshop);
        """,
    "list": """
        SELECT outcome FROM tallystick.consume_many(
          user_ids => ARRAY[:other, :user, 3, 2, 1, :user],
          keys => ARRAY['a :client_id :n', 'b :client_id :n', 'c :client_id :n', 'd :client_id :n', 'e :client_id :n',
            'f :client_id :n'],
          workshop_ids => ARRAY[NULL, NULL, NULL, NULL, NULL, :workshop]);
        """,
    "buy, refund, reinstate": """
        SELECT id AS purchase FROM tallystick.start_purchase(
          user_id => :user, amount => 20, description => 'A pack', key => 'pack :client_id :n') \\gset
        SELECT outcome FROM tallystick.attach_session(
          user_id => :user, purchase_id => ':purchase', stripe_session_id => 'cs :client_id :n');
        SELECT outcome FROM tallystick.complete_purchase(
          user_id => :user, stripe_session_id => 'cs :client_id :n');
        SELECT outcome FROM tallystick.refund(
          user_id => :user, purchase_id => ':purchase', key => 're :client_id :n', amount => 7);
        SELECT outcome FROM tallystick.reinstate(
          user_id => :user, purchase_id => ':purchase', key => 'back :client_id :n');
        """,
    "buy and spend in one transaction": transaction(
        """
        SELECT id AS purchase FROM tallystick.start_purchase(
          user_id => :user, amount => 20, description => 'A pack', key => 'one :client_id :n') \\gset
        SELECT outcome FROM tallystick.complete_purchase(user_id => :user, purchase_id => ':purchase');
        """,
        SPEND.format("bought"),
    ),
    "grant": """
        SELECT outcome FROM tallystick.grant(
          user_id => :user, amount => 2, key => 'grant :client_id :n', description => 'A gift');
        """,
    "ledger.lock, then spend": transaction(
        "SELECT outcome FROM tallystick.lock(user_id => :user);\n", SPEND.format("locked")
    ),
    "delete a workshop": "SELECT outcome FROM tallystick.delete_workshop(workshop_id => :workshop);\n",
    "restore a workshop": "SELECT outcome FROM tallystick.restore_workshop(workshop_id => :workshop);\n",
    # the app alone
    "refer to a user": REFER,
    "delete a workshop's row": "DELETE FROM workshops WHERE id = :workshop;\n",
    "change a unique column": EMAIL,
    # both in one transaction
    "refer, then spend twice": transaction(REFER, SPEND.format("first"), SPEND.format("second")),
    "change, then spend": transaction(NAME, SPEND.format("changed")),
    "spend, then change": transaction(SPEND.format("changing"), NAME),
    "FOR UPDATE, then spend": transaction(
        "SELECT FROM users WHERE id = :user FOR UPDATE;\n", SPEND.format("for update")
    ),
    "spend, then FOR NO KEY UPDATE": transaction(
        SPEND.format("no key"), "SELECT FROM users WHERE id = :user FOR NO KEY UPDATE;\n"
    ),
    "change a unique column, then spend": transaction(EMAIL, SPEND.format("renamed")),
}  # fmt: skip

AFTER_SPENDING = transaction(SPEND.format("before"), EMAIL)
"""It can deadlock beside "refer, then spend twice". The change of a unique column, or FOR UPDATE, waits for the
transaction that has referred to the user, which waits for the user's row that this one has changed by spending."""


@dataclass(frozen=True)
class RunResult:
    """The counts of the clients, and those of the server."""

    done: Mapping[str, int]
    failed: int
    deadlocks: int
    rows: Mapping[str, int]
    findings: tuple[str, ...]


def ready(url: str) -> World:
    """The app in an empty database, with three users who do not run out of credits."""
    world = World(url, HOST)
    with world.engine.begin() as conn:
        conn.exec_driver_sql(DDL)
        conn.exec_driver_sql("INSERT INTO users SELECT n, n || '@example.com' FROM generate_series(1, 3) AS n")
    migrate.apply(world.url, world.config)
    with world.engine.begin() as conn:
        for user in (1, 2, 3):
            world.ledger.grant(conn, user, credits=1_000_000_000, key="begin", description="To begin with")
    return world


def run(server: Server, world: World, mix: Mapping[str, str], *, seconds: int, tries: int = 1) -> RunResult:
    """Let pgbench run the mix; anything that goes wrong but a deadlock or a serialization failure is an error.

    What failed so is rolled back and run again until it was tried so often; 0 is without end.
    """
    with tempfile.TemporaryDirectory() as folder:
        files = []
        for number, text in enumerate(mix.values()):
            Path(folder, f"{number}.sql").write_text(DRAWN + text)
            files.append(f"--file={folder}/{number}.sql")
        ran = subprocess.run(
            server.command(
                "pgbench", "--no-vacuum", f"--client={CLIENTS}", "--jobs=2", f"--time={seconds}",
                f"--max-tries={tries}", *files, world.url.replace("+psycopg", "", 1),
            ),
            env=server.env,
            capture_output=True,
            text=True,
            check=False,
        )  # fmt: skip
    if ran.returncode != 0 or "aborted" in ran.stderr:
        raise AssertionError(ran.stderr[-4000:])
    done = [int(count) for count in re.findall(r"^ - (\d+) transactions", ran.stdout, re.MULTILINE)]
    failed = re.search(r"^number of failed transactions: (\d+)", ran.stdout, re.MULTILINE)
    assert failed is not None
    row = world.schema.credit_transactions.c
    with world.autocommit.connect() as conn:
        counted = sa.select(row.type, sa.func.count()).where(row.status == "completed").group_by(row.type)
        return RunResult(
            done=dict(zip(mix, done, strict=True)),
            failed=int(failed[1]),
            deadlocks=world.deadlocks(),
            rows={str(kind): count for kind, count in conn.execute(counted)},
            findings=tuple(str(finding) for finding in audit(conn, world.config).findings if finding.fault),
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=int, default=600)
    parser.add_argument("--bin", type=Path, help="the programs of the PostgreSQL to run it on")
    asked = parser.parse_args()
    home = Path(tempfile.mkdtemp(prefix="tallystick-test-deadlocks-"))
    try:
        with Server(home, settings=FAST, bin_dir=asked.bin) as server:
            report = run(server, ready(server.create_database("app")), MIX, seconds=asked.seconds)
            for name, count in report.done.items():
                print(f"{count:>10,}  {name}")
            print(
                f"{sum(report.done.values()):>10,}  transactions in {asked.seconds} s on PostgreSQL {server.version}, "
                f"{CLIENTS} clients: {report.deadlocks} deadlocks, {report.failed} failures\n"
                f"{sum(report.rows.values()):>10,}  rows in the ledger: {report.rows}",
                *report.findings,
                f"{len(report.findings)} findings of the audit",
                sep="\n",
            )
    finally:
        shutil.rmtree(home)
    sys.exit(bool(report.deadlocks or report.failed or report.findings))


if __name__ == "__main__":
    main()
