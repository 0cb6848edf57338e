"""Take the pictures of the example app for the documentation: python tools/pictures.py (needs chromium)."""

from __future__ import annotations

import shutil
import sys
import tempfile
import threading
import time
from pathlib import Path

import sqlalchemy as sa
import uvicorn
from playwright.sync_api import Page, sync_playwright

from tallystick.dev.postgres import Server
from tallystick.dev.stripe import DevStripe

ROOT = Path(__file__).parents[1]
PICTURES = ROOT / "docs" / "pictures"

sys.path.insert(0, str(ROOT / "examples"))

from workshops.__main__ import prepare  # noqa: E402 - found only now
from workshops.app import create_app  # noqa: E402


def walk(page: Page, origin: str) -> None:
    """Through the app as a buyer goes, stopping for a picture."""

    def picture(name: str, height: int) -> None:
        page.mouse.move(1, 1)
        page.set_viewport_size({"width": 960, "height": height})
        page.screenshot(path=PICTURES / f"{name}.png")

    page.goto(f"{origin}/sign-in")
    page.fill("#email", "ada@example.com")
    page.get_by_role("button", name="Sign in").click()
    with page.expect_response("**/welcome"):
        page.get_by_role("button", name="Start").click()
    page.fill("#title", "Mobile App Discovery")
    page.get_by_role("button", name="Begin").click()
    page.wait_for_url("**/steps/1")
    seventh = page.url.replace("/steps/1", "/steps/7")
    page.goto(seventh)
    picture("paywall", 480)
    page.get_by_role("link", name="Buy credits").click()
    page.wait_for_load_state()
    picture("pricing", 640)
    page.get_by_role("button", name="Buy 3 credits for $149").click()
    page.get_by_role("button", name="Pay", exact=True).click()
    page.goto(seventh)
    page.get_by_role("link", name="Use 1 credit").click()
    page.get_by_role("dialog").wait_for()
    picture("confirm", 480)


def main() -> None:
    """Start the example, take the pictures, leave nothing behind."""
    chromium = shutil.which("chromium")
    if chromium is None:
        raise SystemExit("no chromium on PATH. Install it with: apt-get install chromium")
    PICTURES.mkdir(exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="tallystick-pictures-"))
    folder.chmod(0o711)  # root's server runs as another account and has to reach it
    listening = uvicorn.Config("", host="127.0.0.1", port=0).bind_socket()
    origin = f"http://127.0.0.1:{listening.getsockname()[1]}"
    try:
        with Server(folder) as server, DevStripe() as double:
            config = prepare(server.create_database("workshops"), origin, double)
            engine = sa.create_engine(str(config.database_url))
            app = uvicorn.Server(uvicorn.Config(create_app(config, engine), log_level="warning"))
            thread = threading.Thread(target=app.run, kwargs={"sockets": [listening]}, daemon=True)
            thread.start()
            while not app.started:
                time.sleep(0.05)
            with sync_playwright() as playwright:
                browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
                walk(browser.new_page(device_scale_factor=1.5), origin)
                browser.close()
            app.should_exit = True
            thread.join()
            engine.dispose()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
