"""Lists for programs and spreadsheets, and the console's files."""

from __future__ import annotations

import dataclasses
import datetime as dt
import json as json_module
import logging
import re
from collections.abc import Iterable, Iterator
from decimal import Decimal
from itertools import chain, islice
from typing import Any
from uuid import UUID

from starlette.responses import Response, StreamingResponse

from tallystick.web.shared.spreadsheet import csv_line

log = logging.getLogger("tallystick.console")

_ROWS_AT_ONCE = 500


def json(value: Any) -> Response:
    """``value``, dataclasses included, as JSON; times in ISO 8601, keys and ids as text."""
    return Response(_json(value), media_type="application/json")


def csv(name: str, rows: Iterable[Any], *, operator: str, columns: type | None = None) -> Response:
    """Dataclass instances as a CSV file, streamed. ``columns`` heads the file when there are no rows."""
    log.info("export=%r operator=%r", name, operator)
    found = iter(rows)
    # The first row is read here, so that a failing query gives an error page and not half a file.
    first = next(found, None)
    kind = type(first) if first is not None else columns
    header = [field.name for field in dataclasses.fields(kind)] if kind else []
    lines = _lines(header, chain([first], found) if first is not None else ())
    file = re.sub(r"[^A-Za-z0-9._-]+", "_", name)[:80]
    headers = {"Content-Disposition": f'attachment; filename="tallystick-{file}.csv"'}
    return StreamingResponse(lines, media_type="text/csv; charset=utf-8", headers=headers)


def _lines(header: list[str], rows: Iterable[Any]) -> Iterator[str]:
    yield csv_line(header)
    rest = iter(rows)
    while some := list(islice(rest, _ROWS_AT_ONCE)):
        yield "".join(csv_line(_cell(getattr(row, name)) for name in header) for row in some)


def _cell(value: Any) -> Any:
    return _json(value) if isinstance(value, list | dict) else value


def _json(value: Any) -> str:
    return json_module.dumps(value, default=_plain, ensure_ascii=False)


def _plain(value: Any) -> Any:
    """A value as one that JSON has: the types of columns, and dataclasses of them."""
    match value:
        case dt.date():
            return value.isoformat()
        case Decimal():
            return int(value)
        case UUID():
            return str(value)
        case _ if dataclasses.is_dataclass(value):
            return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    raise TypeError(f"no JSON for {type(value).__name__}")
