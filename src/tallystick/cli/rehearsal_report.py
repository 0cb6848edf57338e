"""The report of a rehearsal, for a terminal or as an HTML page."""

from __future__ import annotations

import io
from collections.abc import Iterator

from rich.bar import Bar
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from tallystick.migrate import Rehearsal

_WIDTH = 140  # of the page, in characters
_MS, _STATEMENT, _HELD = 7, 64, 20  # of columns
_COLOURS = {"ACCESS EXCLUSIVE": "red", "SHARE UPDATE EXCLUSIVE": "yellow"}


def rehearsal_report(done: Rehearsal) -> RenderableType:
    """The statements that locked the app's tables, the use of the ledger, and the problems found."""
    return Group(_locks(done), *map(Text, _lines(done)), *(Text(problem, style="red") for problem in done.problems))


def rehearsal_page(done: Rehearsal) -> str:
    """The report as a self-contained HTML page."""
    console = Console(record=True, file=io.StringIO(), width=_WIDTH, highlight=False, emoji=False)
    console.print(rehearsal_report(done))
    return console.export_html()


def _locks(done: Rehearsal) -> Table:
    """A row for each lock, held from its statement to the end, with a bar over the time of the transaction."""
    end = max((one.started_ms + one.took_ms for one in done.statements if one.phase != "online"), default=0) or 1
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("ms", justify="right", min_width=_MS)
    table.add_column("statement", max_width=_STATEMENT)
    locked = [[f"{lock} on {name}" for name, lock in one.locks] for one in done.statements]
    table.add_column("lock", min_width=max((len(each) for locks in locked for each in locks), default=0))
    table.add_column(f"held, of {end:.0f} ms", min_width=_HELD)
    for one in done.statements:
        for number, (name, lock) in enumerate(one.locks):
            table.add_row(
                "" if number else f"{one.took_ms:.1f}",
                Text("" if number else " ".join(one.sql.split()), no_wrap=True, overflow="ellipsis"),
                Text(f"{lock} on {name}"),
                Bar(end, one.started_ms, end, color=_COLOURS.get(lock, "blue")) if one.phase != "online" else "",
            )
    return table


def _lines(done: Rehearsal) -> Iterator[str]:
    yield ", ".join(f"{table}: about {rows:,} rows" for table, rows in done.tables)
    yield f"Tables locked for {done.locked_ms:.1f} ms with single statements; apply sends them in one message."
    if done.lived:
        did = ", ".join(f"{one.what} {one.fault or f'{one.took_ms:.1f} ms'}" for one in done.lived)
        yield f"The ledger was used on the copy: {did}."
    else:
        yield "The ledger was not tried: the copy has no user that is not deleted."
    if done.passed:
        yield "Passed: locks as planned, schema as declared, nothing left after undo. Next: tallystick migrate apply"
