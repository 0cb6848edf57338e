"""Rows as CSV that a spreadsheet opens without changing values."""

from __future__ import annotations

import csv
import datetime as dt
import io
import re
from collections.abc import Iterable

_FORMULA = re.compile(r"\A(?=[=+\-@\t\r\n])|(?<=[;\t\r\n])(?=[=+\-@])")
"""The places where a formula could begin; where a spreadsheet divides by semicolons, also within a text."""


def csv_line(cells: Iterable[object]) -> str:
    """One row, with its line end: numbers as they are, moments in ISO 8601, None as an empty cell, all else as text.

    What a spreadsheet would take for a formula gets a quote before it.
    """
    out = io.StringIO()
    csv.writer(out).writerow([_cell(cell) for cell in cells])
    return out.getvalue()


def _cell(value: object) -> str | int | float:
    match value:
        case None:
            return ""
        case int() | float():
            return value
        case dt.date():
            return value.isoformat()
    return _FORMULA.sub("'", str(value))
