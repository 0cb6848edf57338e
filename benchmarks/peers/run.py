"""Speed of a consumption, beside other ledgers, in one run on one server.

    python benchmarks/peers/run.py            seven minutes; tables and picture of benchmarks/README.md
    python benchmarks/peers/run.py --quick    a minute, to see that it runs
    python benchmarks/peers/run.py --only credit_ledger

Each candidate has a virtual environment of its own (made with pip below this one's folder, with the same SQLAlchemy
and psycopg as ours) and a database of its own on one server with fsync on. All are driven by the same code
(drive.py) through an adapter, in turns of a few seconds; the accounts are checked afterwards with plain SQL.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import venv
from collections import Counter
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psycopg

sys.path.insert(0, str(Path(__file__).parents[1]))  # what the benchmarks share
sys.path.insert(0, str(Path(__file__).parents[2] / "tests" / "proof"))
from picture import picture

import stage
from stage import Timing
from wire import Proxy

HERE = Path(__file__).parent
ACCOUNTS = 1_000
CREDITS = 1_000_000_000  # of each account; nobody runs out
LAST = 10  # credits that 16 threads fight for at the end, and times that they say the same
CROWD = 16


@dataclass(frozen=True)
class Candidate:
    """``accounts_sql`` selects account, balance, sum of its rows, number of consumptions; pip installs ``packages``."""

    name: str
    adapter: str
    accounts_sql: str
    packages: tuple[str, ...] = ()


_OURS = """
SELECT u.id, u.credit_balance, sum(t.amount), count(*) FILTER (WHERE t.amount < 0)
FROM users u JOIN credit_transactions t ON t.user_id = u.id GROUP BY u.id
"""
CANDIDATES = (
    Candidate("Tallystick", "tallystick", _OURS),
    Candidate("Tallystick, Combiner", "tallystick_combiner", _OURS),
    Candidate(
        "credit-ledger 0.3.0",
        "credit_ledger",
        """
        SELECT t.name::bigint, b.credits, sum(l.delta), count(*) FILTER (WHERE l.delta < 0)
        FROM tenants t JOIN credit_balance b ON b.tenant_id = t.id JOIN credit_ledger l ON l.tenant_id = t.id
        GROUP BY t.id, b.credits
        """,
        packages=("credit-ledger[postgres]==0.3.0",),
    ),
    Candidate(
        "gringotts-api 0.4.0",
        "gringotts_api",
        """
        SELECT u.username::bigint, u.credits, sum(t.amount), count(*) FILTER (WHERE t.amount < 0)
        FROM users u JOIN credit_transactions t ON t.user_id = u.id GROUP BY u.id
        """,
        packages=("gringotts-api==0.4.0", "httpx"),
    ),
    Candidate(
        "hf-nostro 0.2.0",
        "hf_nostro",
        """
        SELECT a.scope_ref::bigint, a.balance, sum(e.amount), count(*) FILTER (WHERE e.amount < 0)
        FROM nostro.account a JOIN nostro.entry e ON e.account_id = a.id GROUP BY a.id
        """,
        packages=("hf-nostro[postgres]==0.2.0",),
    ),
)
WORKLOADS = {  # name: accounts, connections
    "alone": (ACCOUNTS, 1),
    "spread": (ACCOUNTS, CROWD),
    "one account": (1, CROWD),
}


# --- one candidate ---


def python_of(candidate: Candidate) -> Path:
    """The interpreter of the candidate's virtual environment, made on the first run."""
    if not candidate.packages:
        return Path(sys.executable)
    home = Path(sys.prefix, "peers", candidate.adapter)
    python, ready = home / "bin" / "python", home / "ready"
    same = [f"{package}=={version(package.split('[')[0])}" for package in ("sqlalchemy", "psycopg[binary]")]
    wanted = "\n".join([*candidate.packages, *same])
    if not ready.exists() or ready.read_text() != wanted:
        print(f"installing {candidate.name}", file=sys.stderr, flush=True)
        venv.create(home, with_pip=True, clear=True)
        command = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *wanted.splitlines()]
        subprocess.run(command, check=True, timeout=600)
        ready.write_text(wanted)
    return python


def drive(candidate: Candidate, action: str, url: str, **options: Any) -> Any:
    """The answer of drive.py, run by the candidate's own Python."""
    command = [str(python_of(candidate)), str(HERE / "drive.py"), candidate.adapter, action, url, json.dumps(options)]
    clean = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "DATABASE_URL")}
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=300, env=clean)
    if done.returncode:
        raise SystemExit(f"{candidate.name}, {action}:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def round_trips(candidate: Candidate, url: str) -> float:
    """The number of times that one consumption waits for the server, counted on the wire."""
    proxy = Proxy(url)
    try:
        seen = []
        for count in (40, 140):  # the difference leaves out what is done once
            proxy.watch(None)
            drive(candidate, "times", proxy.url, count=count)
            seen.append(proxy.round_trips)
        return (seen[1] - seen[0]) / 100
    finally:
        proxy.close()


@dataclass(frozen=True)
class FinalState:
    """The final state of the database: the number of wrong accounts, and the result of the two races."""

    wrong: int
    overdraft: str
    once: str
    rows: int


def check(candidate: Candidate, url: str) -> FinalState:
    """Two races on new accounts, then every account's balance against its rows."""
    last, same = ACCOUNTS + 1, ACCOUNTS + 2
    granted = drive(candidate, "race", url, account=last, credits=LAST, threads=CROWD, tries=4, key=None)
    drive(candidate, "race", url, account=same, credits=LAST, threads=CROWD, tries=4, key="the same")
    with psycopg.connect(libpq(url)) as conn:
        accounts = {row[0]: row[1:] for row in conn.execute(candidate.accounts_sql)}
    balance, _, spent = accounts[last]
    refused = granted == spent == LAST and balance == 0
    return FinalState(
        wrong=sum(balance != total for balance, total, _ in accounts.values()),
        overdraft="refused" if refused else f"{spent} of {LAST} spent, balance {balance}",
        once="one row" if accounts[same][2] == 1 else f"{accounts[same][2]} rows",
        rows=sum(spent for _, _, spent in accounts.values()),
    )


def libpq(url: str) -> str:
    return url.replace("+psycopg", "", 1)


# --- all of them ---

Runs = dict[tuple[Candidate, str], list[tuple[Timing, dict[str, int]]]]


def measure_in_turns(candidates: list[Candidate], urls: dict[Candidate, str], *, turns: int, seconds: float) -> Runs:
    """Every candidate in every workload, in turns, each time another one first."""
    runs: Runs = {}
    for turn in range(turns):
        order = candidates[turn % len(candidates) :] + candidates[: turn % len(candidates)]
        for workload, (accounts, connections) in WORKLOADS.items():
            for each in order:
                if connections == 1 and each.adapter == "tallystick_combiner":
                    continue  # alone it has nobody to combine with
                options = {"accounts": accounts, "connections": connections, "seconds": seconds}
                found = drive(each, "spend", urls[each], **options)
                result = Timing.of(found["took"], seconds), found["errors"]
                runs.setdefault((each, workload), []).append(result)
                print(f"{turn} {workload} {each.name} {result[0].per_second:,.0f}/s", file=sys.stderr, flush=True)
    return runs


def medians(runs: list[tuple[Timing, dict[str, int]]]) -> Timing:
    """Each figure's median over the turns."""
    figures = ("median_ms", "p99_ms", "per_second")
    return Timing(**{name: statistics.median(getattr(run, name) for run, _ in runs) for name in figures})


def speeds(candidates: list[Candidate], runs: Runs) -> None:
    ours = candidates[0]
    for workload, (_, connections) in WORKLOADS.items():
        of = "1 connection" if connections == 1 else f"{connections} threads"
        print(f"| {workload}, {of} | a second | p50 ms | p99 ms | {ours.name} is | errors |")
        print("| --- | ---: | ---: | ---: | ---: | --- |")
        best = medians(runs[ours, workload]).per_second
        for each in candidates:
            if (each, workload) not in runs:
                continue
            timing, errors = medians(runs[each, workload]), Counter[str]()
            for _, some in runs[each, workload]:
                errors.update(some)
            shown = ", ".join(f"{count} {error}" for error, count in errors.items())
            print(
                f"| {each.name} | {timing.per_second:,.0f} | {timing.median_ms:.2f} | {timing.p99_ms:.2f} "
                f"| {best / timing.per_second:.1f} times | {shown or 'none'} |"
            )
        print()


def settings(url: str) -> str:
    with psycopg.connect(libpq(url)) as conn:
        names = ("fsync", "synchronous_commit", "full_page_writes")
        return ", ".join(
            f"{name} {conn.execute('SELECT current_setting(%s)', (name,)).fetchall()[0][0]}" for name in names
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one turn of a second each")
    parser.add_argument("--only", nargs="+", choices=[each.adapter for each in CANDIDATES[1:]], help="beside ours")
    parser.add_argument("--folder", type=Path, help="put the server's data here, on the disk to be measured")
    parser.add_argument("--picture", type=Path, help="write the SVG here")
    asked = parser.parse_args()
    seconds, turns = (1.0, 1) if asked.quick else (3.0, 5)
    others = [each for each in CANDIDATES[1:] if asked.only is None or each.adapter in asked.only]
    candidates = [CANDIDATES[0], *others]
    for candidate in candidates:
        python_of(candidate)

    with stage.server(asked.folder) as server:
        urls = {each: server.create_database(each.adapter) for each in candidates}
        trips = {}
        for each, url in urls.items():
            print(f"preparing {each.name}", file=sys.stderr, flush=True)
            drive(each, "setup", url, accounts=ACCOUNTS, credits=CREDITS)
            trips[each] = round_trips(each, url)
        runs = measure_in_turns(candidates, urls, turns=turns, seconds=seconds)
        final_states = {each: check(each, url) for each, url in urls.items()}
        about = f"PostgreSQL {server.version}, Python {platform.python_version()}, {settings(urls[candidates[0]])}"

    print(f"{about}; medians of {turns} turns of {seconds:g} s each\n")
    speeds(candidates, runs)
    print("| | round trips | 16 spend the last 10 credits | one key, 64 times | accounts wrong | consumptions |")
    print("| --- | ---: | --- | --- | ---: | ---: |")
    for each, found in final_states.items():
        wrong = f"{found.wrong} of {ACCOUNTS + 2:,}"
        print(f"| {each.name} | {trips[each]:.1f} | {found.overdraft} | {found.once} | {wrong} | {found.rows:,} |")
    if asked.picture:
        speed = {
            workload: [
                (each.name, medians(runs[each, workload]).per_second) for each in candidates if (each, workload) in runs
            ]
            for workload in WORKLOADS
        }
        asked.picture.write_text(picture(speed))


if __name__ == "__main__":
    main()
