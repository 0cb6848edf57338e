"""Start the example: an embedded PostgreSQL, the Stripe double, the app. Nothing outside this folder is touched."""

from __future__ import annotations

import argparse
import dataclasses
import shutil
import signal
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

import sqlalchemy as sa
import uvicorn

from tallystick import Config, Pack, migrate, stripe
from tallystick.dev.postgres import Server
from tallystick.dev.stripe import DevStripe
from tallystick.web import router  # noqa: F401 - fails here, with its own message, where the extra is missing
from workshops.app import HERE, create_app

PACKS = (
    Pack(name="Single Flight", credits=1, amount=7900),
    Pack(name="Flight Crew", credits=3, amount=14900),
    Pack(name="Squadron", credits=10, amount=39900),
)


def prepare(database_url: str, origin: str, double: DevStripe) -> Config:
    """The app's tables, Tallystick's beside them, and the packs on sale at the double."""
    engine = sa.create_engine(database_url)
    with engine.begin() as conn:
        conn.exec_driver_sql((HERE / "schema.sql").read_text("utf-8"))
    engine.dispose()
    config = Config(
        database_url=database_url,
        packs=PACKS,
        checkout_origins=(origin,),
        stripe_secret_key=double.secret_key,
        stripe_api_base=double.url,
    )
    migrate.apply(database_url, config)
    made = stripe.setup(config, endpoint_url=f"{origin}/billing/webhooks/stripe")
    prices = {pack.pack: pack.price for pack in made.packs}
    return config.model_copy(
        update={
            "packs": tuple(dataclasses.replace(pack, stripe_price_id=prices[pack.name]) for pack in PACKS),
            "stripe_webhook_secret": made.endpoint.secret if made.endpoint else None,
        }
    )


def main() -> None:
    """Run until interrupted."""
    parser = argparse.ArgumentParser(prog="python -m workshops", description=__doc__)
    parser.add_argument("--port", type=int, default=8000)
    port = parser.parse_args().port
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())  # uvicorn hands it on, and the folder is still removed
    folder = Path(tempfile.mkdtemp(prefix="tallystick-example-"))
    folder.chmod(0o711)  # root's server runs as another account and has to reach it
    try:
        with suppress(KeyboardInterrupt), Server(folder) as server, DevStripe() as double:
            origin = f"http://127.0.0.1:{port}"
            config = prepare(server.create_database("workshops"), origin, double)
            engine = sa.create_engine(str(config.database_url))
            print(f"Workshops: {origin}   (the Stripe double: {double.url}; stop with Ctrl-C)")
            uvicorn.run(
                create_app(config, engine),
                host="127.0.0.1",
                port=port,
                log_level="warning",
                timeout_graceful_shutdown=5,
            )
            engine.dispose()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
