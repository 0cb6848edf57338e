"""``tallystick serve`` as people run it: a process, its output, its refusals."""

from __future__ import annotations

import re
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from http.cookiejar import CookieJar

import pytest

from tallystick.cli import main, serve
from tallystick.web.console import Passwords

COMMAND = [sys.executable, "-c", "from tallystick.cli import main; main()"]
PATIENCE_S = 60

pytestmark = pytest.mark.one_server  # it is about the command


@pytest.fixture
def refused(tmp_path, monkeypatch, capsys):
    """``refused(url, *options)``: what the command says when it does not serve."""

    def run(url, *options):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["tallystick", "--database-url", url, "serve", *options])
        with pytest.raises(SystemExit) as end:
            main()
        assert end.value.code == 1
        printed = capsys.readouterr()
        assert printed.out == ""
        return " ".join(printed.err.split())

    return run


def settings(tmp_path, *lines):
    (tmp_path / "tallystick.toml").write_text("\n".join(["[console]", *lines]), encoding="utf-8")


def test_it_prints_a_link_that_works_once(world, tmp_path):
    user = world.user(credits=3)
    running = subprocess.Popen(
        [*COMMAND, "--database-url", world.url, "serve", "--port", "0"],
        cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        link = re.search(r"http://127\.0\.0\.1:\d+/enter\?token=\S+", running.stdout.readline())[0]
        address = link.partition("/enter")[0]
        with pytest.raises(urllib.error.HTTPError, match="401"):
            urllib.request.urlopen(f"{address}/users", timeout=PATIENCE_S)
        browser = urllib.request.build_opener(urllib.request.HTTPCookieProcessor(CookieJar()))
        page = browser.open(link, timeout=PATIENCE_S).read()
        while b"Checking every" in page:
            page = browser.open(f"{address}/", timeout=PATIENCE_S).read()
        assert b"All 1 balances agree" in page
        assert str(user).encode() in browser.open(f"{address}/users", timeout=PATIENCE_S).read()
        with pytest.raises(urllib.error.HTTPError, match="401"):
            urllib.request.urlopen(link, timeout=PATIENCE_S)
    finally:
        running.terminate()
        _, log = running.communicate(timeout=PATIENCE_S)
    assert "log-in operator='local operator' by=link peer='127.0.0.1'" in log
    assert link.partition("token=")[2] not in log


def test_a_network_is_refused_until_somebody_is_named(world, tmp_path, refused):
    assert "no operator is named" in refused(world.url, "--host", "0.0.0.0")
    settings(tmp_path, 'proxy_peers = ["10.0.0.5"]')
    assert "needs the address at which people open the console" in refused(world.url, "--host", "0.0.0.0")
    settings(tmp_path, 'operators = { anna = "plain text" }')
    assert "tallystick serve --hash-password" in refused(world.url)
    settings(tmp_path, 'address = "http://console.example.com"')
    assert "https://" in refused(world.url)


def test_a_taken_port_and_an_old_database_are_said(world, fresh_database, refused):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert "--port" in refused(world.url, "--port", str(taken.getsockname()[1]))
    assert "tallystick migrate apply" in refused(fresh_database(), "--port", "0")


def test_a_hash_for_the_settings(tmp_path):
    done = subprocess.run(
        [*COMMAND, "serve", "--hash-password"],
        cwd=tmp_path, input="open sesame\nopen sesame\n", capture_output=True, text=True, timeout=PATIENCE_S,
        check=True,
    )  # fmt: skip
    stored = re.search(r"scrypt:\S+", done.stdout)[0]
    assert Passwords({"anna": stored}).check("anna", "open sesame") == "anna"
    assert "open sesame" not in done.stdout + done.stderr


def test_its_connections_do_not_hold_answers_back():
    """With TCP_NODELAY, which a connection has from the socket that it came in by."""
    with (
        serve._listen("127.0.0.1", 0) as listening,
        socket.create_connection(listening.getsockname()),
        listening.accept()[0] as accepted,
    ):
        assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
