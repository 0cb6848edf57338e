"""Money, static files and the template environment."""

import csv
import datetime as dt
import hashlib
import io
import re
from importlib import resources

import pytest

from tallystick.web import Texts
from tallystick.web.shared.numbers import money
from tallystick.web.shared.pages import StaticFiles
from tallystick.web.shared.spreadsheet import csv_line

pytestmark = pytest.mark.one_server  # it is about requests and answers

NBSP, MINUS = "\N{NO-BREAK SPACE}", "\N{MINUS SIGN}"


@pytest.mark.parametrize(
    ("amount", "currency", "shown"),
    [
        (14900, "usd", "$149"),
        (7950, "USD", "$79.50"),
        (7905, "eur", "€79.05"),
        (5, "gbp", "£0.05"),
        (0, "usd", "$0"),
        (-7900, "usd", f"{MINUS}$79"),
        (1234567, "jpy", "¥1,234,567"),
        (5, "bhd", f"BHD{NBSP}0.005"),
        (7950, "chf", f"CHF{NBSP}79.50"),
        (9007199254740993_00, "usd", "$9,007,199,254,740,993"),  # a float would say …992
    ],
)
def test_money(amount: int, currency: str, shown: str) -> None:
    assert money(amount, currency) == shown


@pytest.mark.parametrize(
    ("count", "shown"), [(1, "1 credit"), (0, "0 credits"), (2, "2 credits"), (-1, f"{MINUS}1 credit")]
)
def test_credits(count: int, shown: str) -> None:
    assert Texts().credits(count) == shown


@pytest.mark.parametrize("text", ["=1+1", "+1", "-1", "@SUM(A1)", "\t1", "\r1", "\n1"])
def test_no_text_is_a_formula(text: str) -> None:
    assert next(csv.reader(io.StringIO(csv_line([text]), newline=""))) == [f"'{text}"]


def test_no_part_of_a_text_is_a_formula_where_semicolons_divide() -> None:
    """There a spreadsheet also takes the quotes around the whole text for letters, and its line ends for its own."""
    (line,) = csv.reader(io.StringIO(csv_line(["a;=1+1", "b, c\n=2;-3", "\t@d", "e;f = g"]), newline=""))
    assert line == ["a;'=1+1", "b, c\n'=2;'-3", "'\t'@d", "e;f = g"]


def test_cells_are_what_they_are() -> None:
    at = dt.datetime(2026, 3, 1, 9, 30, tzinfo=dt.UTC)
    assert csv_line([None, -1, 2.5, at, at.date(), "a,b", 'say "x"']) == (
        ',-1,2.5,2026-03-01T09:30:00+00:00,2026-03-01,"a,b","say ""x"""\r\n'
    )


def test_vendored_files_are_what_they_were() -> None:
    static = resources.files("tallystick.web.buyer") / "static"
    sums = dict(re.findall(r"^    ([0-9a-f]{64})  (\S+)$", (static / "README.md").read_text("utf-8"), re.MULTILINE))
    assert list(sums.values()) == ["htmx.min.js"]
    for digest, name in sums.items():
        assert hashlib.sha256((static / name).read_bytes()).hexdigest() == digest


def test_static_files_and_nothing_else() -> None:
    files = StaticFiles("tallystick.web.buyer", "tallystick.web.shared")
    content, media_type = files.get("tallystick.css") or (b"", "")
    assert b"--ts-hazel" in content
    assert media_type == "text/css; charset=utf-8"
    assert len(files.version("tallystick.css") or "") == 12
    for name in ("README.md", "../pages.py", "..%2fpages.py", "/etc/passwd.css", "absent.css", "LICENSE-htmx"):
        assert files.get(name) is None
        assert files.version(name) is None
