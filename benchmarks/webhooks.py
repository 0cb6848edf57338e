"""Webhook deliveries a second that ``stripe.receive`` takes, and the time that one waits.

    python benchmarks/webhooks.py [--deliveries 1000] [--workers 4] [--url postgresql://…]

Half of the deliveries are duplicates, in an order drawn from a fixed seed, and ``--workers`` threads share them, as a
web server's do. The floor is what no receiver can do without: verifying the same signatures, and one transaction with
one INSERT for each delivery, by the same threads. ``fsync`` is on. Without ``--url`` an embedded server is used and
thrown away.
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

import sqlalchemy as sa
import stripe as sdk

from tallystick import Config, Pack, migrate, stripe
from tallystick.audit import audit
from tallystick.declared_tables import Schema
from tallystick.dev.postgres import Server
from tallystick.dev.stripe import DevStripe

CREDITS, PRICE, ORIGIN = 3, 14900, "https://app.example.com"
HOST = """
CREATE TABLE users (id uuid PRIMARY KEY, email text);
CREATE TABLE workshops (id uuid PRIMARY KEY, user_id uuid REFERENCES users (id), title text, created_at timestamptz);
"""

Delivery = tuple[bytes, str]


@contextmanager
def database(url: str | None) -> Iterator[str]:
    if url is not None:
        yield url
        return
    with tempfile.TemporaryDirectory(prefix="tallystick-bench-") as folder:
        Path(folder).chmod(0o711)  # root's server runs as another user
        with Server(Path(folder) / "server") as server:
            yield server.create_database("bench")


def shop(dev: DevStripe, url: str) -> tuple[Config, str]:
    config = Config(
        database_url=url,
        stripe_secret_key=dev.secret_key,
        stripe_api_base=dev.url,
        checkout_origins=(ORIGIN,),
        packs=(Pack(name="Serial Entrepreneur", credits=CREDITS, amount=PRICE),),
    )
    made = stripe.setup(config, endpoint_url="http://127.0.0.1:1/webhook")
    pack = Pack(name="Serial Entrepreneur", credits=CREDITS, amount=PRICE, stripe_price_id=made.packs[0].price)
    assert made.endpoint is not None
    return (
        config.model_copy(update={"packs": (pack,), "stripe_webhook_secret": made.endpoint.secret}),
        made.endpoint.id,
    )


def paid(engine: sa.Engine, config: Config, dev: DevStripe, endpoint: str, count: int) -> list[Delivery]:
    """One delivery for each of ``count`` purchases, each of a user of its own."""
    users = Schema.of(config.host).users
    dev.hold()
    for _ in range(count):
        user = uuid4()
        with engine.begin() as conn:
            conn.execute(sa.insert(users).values(key=user))
        sale = stripe.checkout(
            engine, config, user, "Serial Entrepreneur", success_url=f"{ORIGIN}/done", cancel_url=ORIGIN
        )
        dev.pay(sale.session)
    events = [one["event"] for one in dev.held() if one["type"] == "checkout.session.completed"]
    return [(body.encode(), header) for body, header in (dev.signed(event, endpoint) for event in events)]


def measured(work: Callable[[Delivery], object], deliveries: list[Delivery], workers: int) -> list[float]:
    """Seconds in all, then of each delivery."""
    waits = []

    def one(delivery: Delivery) -> None:
        started = time.perf_counter()
        work(delivery)
        waits.append(time.perf_counter() - started)

    started = time.perf_counter()
    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(one, deliveries))
    return [time.perf_counter() - started, *waits]


def show(name: str, result: list[float]) -> None:
    total, *waits = result
    p50, p99 = statistics.median(waits) * 1000, statistics.quantiles(waits, n=100)[98] * 1000
    print(f"{name:10} {len(waits) / total:8.0f} deliveries/s   median {p50:6.2f} ms   p99 {p99:6.2f} ms")


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--deliveries", type=int, default=1000)
    arguments.add_argument("--workers", type=int, default=4)
    arguments.add_argument("--url")
    given = arguments.parse_args()
    with database(given.url) as url, DevStripe(retry_delays_s=()) as dev:
        engine = sa.create_engine(url, pool_size=given.workers)
        with engine.begin() as conn:
            conn.exec_driver_sql(HOST)
            conn.exec_driver_sql("CREATE TABLE floor (id bigint GENERATED ALWAYS AS IDENTITY, event text)")
        config, endpoint = shop(dev, url)
        migrate.apply(url, config)
        print(f"preparing {given.deliveries // 2} purchases …")
        once = paid(engine, config, dev, endpoint, given.deliveries // 2)
        deliveries = random.Random(1).sample(once * 2, len(once) * 2)
        secret = config.stripe_webhook_secret or ""
        floor = sa.text("INSERT INTO floor (event) VALUES (:event)")

        def least(delivery: Delivery) -> None:
            sdk.WebhookSignature.verify_header(delivery[0].decode(), delivery[1], secret, stripe.webhooks.AGE_MAX_S)
            with engine.begin() as conn:
                conn.execute(floor, {"event": delivery[1]})

        outcomes: list[str] = []

        def receive(delivery: Delivery) -> None:
            received = stripe.receive(engine, config, *delivery)
            assert received.status == 200, received
            outcomes.append(str(received.outcome))

        at_least = measured(least, deliveries, given.workers)
        took = measured(receive, deliveries, given.workers)
        show("floor", at_least)
        show("receive", took)
        print(f"ratio of the totals: {took[0] / at_least[0]:.1f}")
        assert outcomes.count("granted") == outcomes.count("duplicate") == len(once)
        with engine.begin() as conn:
            assert audit(conn, config).clean
        engine.dispose()


if __name__ == "__main__":
    main()
