"""Rows as CSV that a spreadsheet opens without changing values."""

from __future__ import annotations

import csv
import datetime as dt
import io
from collections.abc import Iterable

_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n")


def csv_line(cells: Iterable[object]) -> str:
    """One row, with its line end: numbers as they are, moments in ISO 8601, None as an empty cell, all else as text.

    A text that a spreadsheet would take for a formula gets a leading quote.
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
    text = str(value)
    return f"'{text}" if text.startswith(_FORMULA) else text
