"""Time of each page of the console with many users and rows, beside few.

    python benchmarks/console.py                              minutes and 6 GB of disk: 1,000,000 users, 10,000,000 rows
    python benchmarks/console.py --rows 100000                half a minute, to see that it runs
    python benchmarks/console.py --quick                      the least that shows the table

Two migrated apps on one server, filled as by ``growth.py``: a tenth of the rows belongs to one user, the others have
ten rows each. The pages are requested in turns, without a network: the time is that of the queries and of the HTML.
All rows are older than the 60 days of the overview, so its figures read every user's balance and no row: see
``overview.py`` for those. They come from a thread of the console; the overview is requested until it has them, and the
time of a page that has them is what counts.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Iterator

import sqlalchemy as sa
from starlette.testclient import TestClient

import growth
import stage
from tallystick import Ledger
from tallystick.ledger import close_all_days
from tallystick.web.console import LocalLink, console

ADDRESS = "http://127.0.0.1:8420"
FEW_ROWS = 10_000


class Console:
    """A console of one app, and an operator who has logged in."""

    def __init__(self, app: growth.Filled) -> None:
        self.app = app
        self.engine = sa.create_engine(app.url)
        link = LocalLink()
        served = console(growth.CONFIG, engine=self.engine, sign_in=link, address=ADDRESS)
        self.visitor = TestClient(served, base_url=ADDRESS, client=("127.0.0.1", 50_000), follow_redirects=False)
        self.visitor.get(f"/enter?token={link.token}")

    def ms(self, path: str) -> float:
        """Milliseconds of one page."""
        began = time.perf_counter()
        answer = self.visitor.get(path)
        taken = time.perf_counter() - began
        if answer.status_code not in (200, 303):  # a search for one user leads to its page
            raise SystemExit(f"{path}: {answer.status_code} {answer.text[:500]}")
        return taken * 1000

    def wait_for_figures(self) -> float:
        """Seconds from the first overview to one with figures."""
        began = time.perf_counter()
        while "Adding up" in self.visitor.get("/").text:
            time.sleep(0.05)
        return time.perf_counter() - began

    def paths(self) -> dict[str, str]:
        heavy, ordinary = growth.key(1), growth.key(self.app.users // 2)
        return {
            "the overview, with figures": "/",
            "users, newest first": "/users",
            "a search for a user's key": f"/users?q={ordinary}",
            "a search for a whole address": f"/users?q=user{self.app.users // 2}@example.com",
            "a user with 10 rows": f"/user?key={ordinary}",
            "the user with a tenth of all rows": f"/user?key={heavy}",
            "that user's thousandth page": f"/user?key={heavy}&before={self.app.thousandth_page}",
            "pending purchases": "/pending",
            "events": "/events",
            "migrations": "/migrations",
        }


def lines(few: Console, many: Console, rounds: int) -> Iterator[list[str]]:
    for name, path in few.paths().items():
        other = many.paths()[name]
        taken = [(few.ms(path), many.ms(other)) for _ in range(rounds + 1)][1:]  # the first warms
        small, large = (statistics.median(column) for column in zip(*taken, strict=True))
        yield [name, f"{small:.1f}", f"{large:.1f}", f"{large / small:.1f}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=10_000_000, help="ledger rows of the larger app")
    parser.add_argument("--rounds", type=int, default=9, help="requests of each page")
    parser.add_argument("--quick", action="store_true", help="the least that shows the table")
    given = parser.parse_args()
    few_rows, rows, rounds = (1_000, 2_000, 1) if given.quick else (FEW_ROWS, given.rows, given.rounds)
    with stage.server(settings=growth.SETTINGS) as server:
        apps = [growth.fill(server, name, count) for name, count in (("few", few_rows), ("many", rows))]
        few, many = map(Console, apps)
        for each in (few, many):
            close_all_days(each.engine, Ledger(growth.CONFIG))
        waited_few, waited = few.wait_for_figures(), many.wait_for_figures()
        print(
            f"Milliseconds of a page, medians of {rounds}; PostgreSQL {server.version}, Python "
            f"{platform.python_version()}. The first figures took {waited_few:.1f} and {waited:.1f} s."
        )
        head = ["", f"{apps[0].users + 1:,} users", f"{apps[1].users + 1:,} users, {rows:,} rows", "ratio"]
        print(stage.table(head, lines(few, many, rounds)))
        for each in (few, many):
            each.engine.dispose()


if __name__ == "__main__":
    main()
