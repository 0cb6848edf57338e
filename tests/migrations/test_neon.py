"""A rehearsal on a branch of Neon: the real client and a double of Neon's HTTP, in front of a real database."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa
from hosts import App
from neon_double import ENDPOINT, KEY, PROJECT, Neon

from tallystick.cli import main
from tallystick.config import to_toml
from tallystick.errors import ConfigError, NeonError
from tallystick.migrate import neon

ORIGINAL = sa.make_url(f"postgresql+psycopg://postgres:secret@{ENDPOINT}.us-east-2.aws.neon.tech/neondb")


@pytest.fixture
def double(app: App, fresh_database: Callable[..., str]) -> Iterator[Neon]:
    """Its branches are copies of the app's database on the test's server."""

    def copy(_: str) -> str:
        app.engine.dispose()
        return fresh_database(app.engine.url.database).replace("+psycopg", "", 1)

    def drop(address: str) -> None:
        app.server.drop_database(str(sa.make_url(address).database))

    with Neon(copy, drop, roles={"postgres"}, databases={"neondb"}) as running:
        yield running


@pytest.fixture
def rehearse(
    app: App, double: Neon, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """``rehearse("--json") -> (code, out, err)``: the command, as a person types it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DATABASE_URL_UNPOOLED", raising=False)
    monkeypatch.setenv("DATABASE_URL", ORIGINAL.render_as_string(hide_password=False))
    monkeypatch.setenv("NEON_API_KEY", KEY)
    monkeypatch.setenv("NEON_API_BASE", double.api)
    (tmp_path / "tallystick.toml").write_text(to_toml(app.config.host))

    def run(*arguments: str) -> tuple[int, str, str]:
        command = ["tallystick", "migrate", "rehearse", "--neon-branch", PROJECT, *arguments]
        monkeypatch.setattr(sys, "argv", command)
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capfd.readouterr()
        assert KEY not in out + err
        assert "secret" not in out + err
        return int(ended.value.code or 0), out, err

    return run


def branch(double: Neon, **options: object):
    settings = {"api_key": KEY, "api": double.api, "patience_s": 20} | options
    return neon.branch(PROJECT, ORIGINAL, **settings)


def test_the_whole_rehearsal(app: App, double: Neon, rehearse: Callable[..., tuple[int, str, str]]) -> None:
    before = app.shape()
    code, out, err = rehearse()
    assert (code, "Passed" in out) == (0, True), out + err
    assert "create_branch is running" in err
    assert double.branches == {}
    assert app.shape() == before
    made = [request for request in double.requests if request.startswith("POST")]
    assert len(made) == 1
    assert double.requests[-1].startswith("DELETE")


def test_what_stands_against_it_is_told(double: Neon, rehearse, tmp_path: Path) -> None:
    (tmp_path / "app.sql").write_text("SELECT u.* FROM users u UNION SELECT gen_random_uuid(), 'two columns'")
    code, out, _ = rehearse("--statements", "app.sql")
    assert (code, "after the migration" in out) == (1, True)
    assert double.branches == {}


def test_the_branch_is_of_the_branch_that_the_address_is_of(double: Neon) -> None:
    with branch(double) as made:
        [one] = double.branches.values()
        assert one["name"].startswith("tallystick-rehearsal-")
        assert made.drivername == "postgresql+psycopg"
    assert f"GET /api/v2/projects/{PROJECT}/endpoints/{ENDPOINT}" in double.requests


def test_an_address_of_another_project_is_refused(double: Neon) -> None:
    other = ORIGINAL.set(host="ep-another-one-123456-pooler.us-east-2.aws.neon.tech")
    with (
        pytest.raises(NeonError, match=r"404: endpoint not found.*is this database in it\?"),
        neon.branch(PROJECT, other, api_key=KEY, api=double.api),
    ):
        pass
    assert double.branches == {}


@pytest.mark.parametrize("stop", [KeyboardInterrupt, RuntimeError])
def test_it_is_deleted_however_it_ends(double: Neon, stop: type[BaseException]) -> None:
    def end() -> None:
        with branch(double):
            assert double.branches
            raise stop

    with pytest.raises(stop):
        end()
    assert double.branches == {}


def test_ctrl_c_while_it_is_made(double: Neon) -> None:
    def waiting(said: str) -> None:
        if "create_branch" in said:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), branch(double, waiting=waiting):
        pytest.fail("there is no branch yet")
    assert double.branches == {}


def test_a_locked_project_is_waited_for(double: Neon) -> None:
    said: list[str] = []
    double.locked = 2
    with branch(double, waiting=said.append):
        double.locked = 1
    assert double.branches == {}
    assert len([text for text in said if "423: project already has running operations" in text]) == 3


def test_but_not_for_ever(double: Neon) -> None:
    double.locked = 1000
    with pytest.raises(NeonError, match="423"), branch(double, patience_s=1):
        pass
    assert double.branches == {}


def test_a_branch_whose_answer_was_lost_is_found_by_its_name(double: Neon) -> None:
    double.lose_answer = True
    with pytest.raises(NeonError, match="did not answer"), branch(double):
        pass
    assert double.branches == {}
    assert len([request for request in double.requests if request.startswith("POST")]) == 1


def test_a_branch_that_failed_is_told_and_deleted(double: Neon) -> None:
    double.ends_as = "error"
    with pytest.raises(NeonError, match="create_branch is error"), branch(double):
        pass
    assert double.branches == {}


def test_a_branch_that_cannot_be_deleted_is_named(double: Neon) -> None:
    double.undeletable = True
    with (
        pytest.raises(NeonError, match=r"tallystick-rehearsal-\w+ could not be deleted .*422: branch has children"),
        branch(double),
    ):
        pass
    assert len(double.branches) == 1


def test_a_wrong_key(double: Neon) -> None:
    with pytest.raises(NeonError, match=r"401.*Set NEON_API_KEY") as caught, branch(double, api_key="napi_wrong"):
        pass
    assert "napi_wrong" not in str(caught.value)


def test_a_refusal_is_not_taken_for_a_branch_that_is_left(double: Neon) -> None:
    elsewhere = ORIGINAL.set(host="db.example.com")  # an address of one's own, which names no endpoint
    with (
        pytest.raises(NeonError, match=r"^Neon's API said 401"),
        neon.branch(PROJECT, elsewhere, api_key="napi_wrong", api=double.api),
    ):
        pass
    assert len(double.requests) == 1


@pytest.mark.parametrize(
    ("options", "said"),
    [({"api_key": ""}, "Set NEON_API_KEY"), ({"api": "http://neon.example/api/v2"}, "is not https")],
)
def test_what_is_not_even_sent(double: Neon, options: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError, match=said), branch(double, **options):
        pass
    assert double.requests == []


def test_the_wrong_role_is_told(double: Neon) -> None:
    double.roles = {"neondb_owner"}
    with pytest.raises(NeonError, match="role or database not found"), branch(double):
        pass
    assert double.branches == {}


def test_it_brings_its_own_data(rehearse) -> None:
    code, _, err = rehearse("--from", "a.backup")
    assert (code, "leave --from out" in err) == (2, True)


def test_a_redirect_does_not_get_the_key(double: Neon) -> None:
    import http.server
    import threading

    class Elsewhere(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(302)
            self.send_header("Location", double.api)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None: ...

    with http.server.HTTPServer(("127.0.0.1", 0), Elsewhere) as server:
        thread = threading.Thread(target=server.handle_request)
        thread.start()
        with (
            pytest.raises(NeonError, match="302"),
            branch(double, api=f"http://127.0.0.1:{server.server_port}/api/v2", patience_s=0),
        ):
            pass
        thread.join()
    assert double.keys == []
