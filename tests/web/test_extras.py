"""The extras that are missing: named, or done without."""

from __future__ import annotations

import subprocess
import sys

import pytest

from worlds import World

pytestmark = pytest.mark.one_server  # it is about what is imported

PAYWALL = """
from uuid import UUID
import sqlalchemy as sa
from fastapi import FastAPI
from fastapi.testclient import TestClient
from tallystick import Config, Ledger, Pack
from tallystick.web import router
from tallystick.web.console import LocalLink, console

url, user, workshop = sys.argv[1], UUID(sys.argv[2]), sys.argv[3]
engine = sa.create_engine(url)
config = Config(database_url=url, packs=(Pack(name="One", credits=1, amount=7900),))
app = FastAPI()
app.include_router(router(config, engine=engine, current_user=lambda: user, contact="mailto:us@example.com"))
client, html = TestClient(app), {"accept": "text/html"}

def get(path, status=200):
    answer = client.get(path, headers=html)
    assert answer.status_code == status, answer.text
    return answer.text

page = get(f"/workshops/{workshop}/unlock", 402)
assert "/pricing" in page
page = get("/pricing")
assert "mailto:us@example.com" in page
assert "<form" not in page
assert client.get("/api/packs").json() == []
refused = client.post(f"/api/workshops/{workshop}/unlock").json()
assert (refused["status"], refused["packs"], refused["checkout"]) == (402, [], None), refused
assert client.post("/checkout").status_code == client.post("/webhooks/stripe").status_code == 404
with engine.begin() as conn:
    Ledger(config).grant(conn, user, credits=1, key="paid elsewhere", description="Paid by invoice")
assert "This will use 1 credit" in get(f"/workshops/{workshop}/unlock")
assert client.post(f"/api/workshops/{workshop}/unlock").json()["balance"] == 0
assert "Paid by invoice" in get("/history")
assert "tallystick.stripe" not in sys.modules

asking = config.model_copy(update={"stripe_secret_key": "sk_test_x"})
link = LocalLink()
operator = TestClient(console(asking, engine=engine, sign_in=link, allow_actions=True), base_url="http://127.0.0.1:8420")
assert "Overview" in operator.get("/enter", params={"token": link.token}).text
"""


def python(script: str, *arguments: str, without: tuple[str, ...]) -> subprocess.CompletedProcess[str]:
    hidden = f"import sys; sys.modules.update(dict.fromkeys({without!r}))\n"
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", hidden + script, *arguments],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip


def test_a_paywall_needs_no_stripe(world: World) -> None:
    user = world.user()
    done = python(PAYWALL, world.url, str(user), str(world.workshop(user)), without=("stripe",))
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("wanted", ["from tallystick.web import router", "import tallystick.web.console"])
@pytest.mark.parametrize("missing", ["fastapi", "jinja2", "itsdangerous", "python_multipart"])
def test_the_web_names_its_extra(wanted: str, missing: str) -> None:
    message = python(wanted, without=(missing,)).stderr.strip().splitlines()[-1]
    assert message == f"ModuleNotFoundError: tallystick.web needs {missing}. Run: pip install 'tallystick[web]'"


@pytest.mark.parametrize("missing", ["django", "jinja2"])
def test_django_names_its_extra(missing: str) -> None:
    message = python("import tallystick.web.django", without=(missing,)).stderr.strip().splitlines()[-1]
    assert (
        message == f"ModuleNotFoundError: tallystick.web.django needs {missing}. Run: pip install 'tallystick[django]'"
    )


def test_django_needs_no_fastapi() -> None:
    done = python("import tallystick.web.django", without=("fastapi", "starlette", "anyio", "itsdangerous"))
    assert (done.returncode, done.stderr) == (0, "")


def test_selling_names_its_extra() -> None:
    message = python("import tallystick.stripe", without=("stripe",)).stderr.strip().splitlines()[-1]
    assert message == "ImportError: tallystick.stripe needs Stripe's SDK. Run: pip install 'tallystick[stripe]'"


def test_selling_on_an_async_engine_names_its_extra() -> None:
    script = """
from sqlalchemy.ext.asyncio import create_async_engine
from tallystick import Config
from tallystick.web import router
router(Config(), engine=create_async_engine("postgresql+psycopg://"), current_user=lambda: None)
"""
    message = python(script, without=("httpx",)).stderr.strip().splitlines()[-1]
    wanted = "selling on an async engine needs httpx. Run: pip install 'tallystick[stripe]'"
    assert message == f"ModuleNotFoundError: {wanted}"
    assert (
        python(
            script.replace("create_async_engine(", "__import__('sqlalchemy').create_engine("), without=("httpx",)
        ).returncode
        == 0
    )


def test_webhooks_of_events_name_their_extra(world: World) -> None:
    script = "from tallystick.cli import main; sys.argv = ['tallystick', 'events', 'deliver']; main()"
    done = python(script, without=("standardwebhooks",))
    assert (done.returncode, done.stderr) == (
        1,
        "webhooks need standardwebhooks. Run: pip install 'tallystick[events]'\n",
    )
