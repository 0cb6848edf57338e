"""``docs/typescript.md``: its blocks compile, and its flow runs, beside doubles of Neon's endpoint and of Stripe."""

from __future__ import annotations

import datetime as dt
import shutil
from pathlib import Path
from uuid import uuid4

import pytest
from stripe import StripeClient

import pages
from delay import far_away
from node_environment import address, environment
from node_packages import Project
from tallystick.audit import audit
from tallystick.dev.stripe import DevStripe
from tallystick.ledger.typescript import typescript
from tallystick.stripe.store import store_of
from worlds import SHAPES, World

pytestmark = pytest.mark.one_server  # it is about the page's code

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def page(packages: Project) -> Project:
    """The files that the page shows, beside those that it says are the reader's own."""
    folder = packages.folder / "page"
    shutil.copytree(HERE / "docs", folder)
    shutil.copytree(packages.folder / "prisma", folder / "lib" / "prisma")
    (packages.folder / "src").mkdir(exist_ok=True)
    for name in ("database.ts", "neon_double.ts"):
        shutil.copy(HERE / "src" / name, packages.folder / "src")
    pages.write(folder, pages.files_of("typescript.md"))
    (folder / "lib" / "tallystick.ts").write_text(typescript(SHAPES["uuid"].host))
    packages.run("tsc", "--project", "page")
    bundle = ["--bundle", "--platform=node", "--format=esm", "--packages=external", "--outfile=page/flow.mjs"]
    packages.run("esbuild", "page/flow.ts", *bundle)
    return packages


def test_the_pages_flow(page: Project, world: World):
    user = world.user()
    before = dt.datetime(2026, 1, 1, tzinfo=dt.UTC)
    given = environment(
        world,
        user=user,
        workshop=world.workshop(user, created_at=dt.datetime(2026, 11, 2, tzinfo=dt.UTC)),
        old=world.workshop(user, created_at=before),
        nobody=uuid4(),
    )
    at = address(world)
    socket = Path(at["host"]) / f".s.PGSQL.{at['port']}"  # which not every driver reads from an address
    with DevStripe(senders=1) as dev, far_away(socket, one_way_s=0) as port:
        url = f"postgresql://{at['user']}:secret@127.0.0.1:{port}/{at['database']}"
        of_stripe = {"STRIPE_API_BASE": dev.url, "STRIPE_SECRET_KEY": dev.secret_key, "APP_URL": "http://app.test"}
        page.run("node", "page/flow.mjs", env={**given, **of_stripe, "DATABASE_URL": url})
        sessions = StripeClient(dev.secret_key, base_addresses={"api": dev.url}).v1.checkout.sessions.list().data
    assert sessions
    with world.engine.connect() as conn:
        for session in sessions:  # found also if the write of attachSession was lost
            assert store_of(world.config).claim(conn, session.to_dict() | {"id": "cs_lost"}).purchase is not None
        assert audit(conn, world.config).findings == ()
