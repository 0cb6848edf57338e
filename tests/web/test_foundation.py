"""Money, static files and the template environment."""

import hashlib
import re
from importlib import resources
from pathlib import Path

import jinja2
import pytest

from tallystick.web.money import money
from tallystick.web.pages import environment, static_file, static_version
from tallystick.web.texts import Texts

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


def test_vendored_files_are_what_they_were() -> None:
    static = resources.files("tallystick.web") / "static"
    sums = dict(re.findall(r"^    ([0-9a-f]{64})  (\S+)$", (static / "README.md").read_text("utf-8"), re.MULTILINE))
    assert list(sums.values()) == ["htmx.min.js"]
    for digest, name in sums.items():
        assert hashlib.sha256((static / name).read_bytes()).hexdigest() == digest


def test_static_files_and_nothing_else() -> None:
    content, media_type = static_file("tallystick.css") or (b"", "")
    assert b"--ts-hazel" in content
    assert media_type == "text/css; charset=utf-8"
    assert len(static_version("tallystick.css")) == 12
    for name in ("README.md", "../pages.py", "..%2fpages.py", "/etc/passwd.css", "absent.css", "LICENSE-htmx"):
        assert static_file(name) is None


def test_a_host_replaces_a_template_and_can_extend_the_original(tmp_path: Path) -> None:
    (tmp_path / "tallystick").mkdir()
    (tmp_path / "tallystick" / "layout.html").write_text(
        '{% extends "original/tallystick/layout.html" %}{% block title %}{{ name }}{% endblock %}', "utf-8"
    )
    page = environment(jinja2.FileSystemLoader(tmp_path)).get_template("tallystick/layout.html")
    assert "<title>&lt;b&gt;</title>" in page.render(name="<b>", static=str)
    assert '<html lang="en">' in page.render(name="x", static=str)
