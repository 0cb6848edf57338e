"""Tallystick: one `consume` in autocommit, on a connection of SQLAlchemy's pool."""

from __future__ import annotations

import sqlalchemy as sa

from tallystick import Config, HostMapping, InsufficientCredits, Ledger, UsersTable, migrate

CONFIG = Config(host=HostMapping(users=UsersTable(key_type="bigint"), workshops=None))


class Adapter:
    def __init__(self, url: str, connections: int) -> None:
        self.url = url
        self.ledger = Ledger(CONFIG)
        self.engine = sa.create_engine(url, pool_size=connections, max_overflow=0, isolation_level="AUTOCOMMIT")

    def create(self) -> None:
        with self.engine.connect() as conn:
            conn.execute(sa.text("CREATE TABLE users (id bigint PRIMARY KEY, email text NOT NULL)"))
        migrate.apply(self.url, CONFIG)

    def open(self, account: int, credits: int) -> None:
        with self.engine.connect() as conn:
            user = {"id": account, "email": f"user{account}@example.com"}
            conn.execute(sa.text("INSERT INTO users (id, email) VALUES (:id, :email)"), user)
            self.ledger.grant(conn, account, credits=credits, key="opening", description="Opening balance")

    def consume(self, account: int, key: str) -> bool:
        with self.engine.connect() as conn:
            try:
                return not self.ledger.consume(conn, account, key=key).replayed
            except InsufficientCredits:
                return False

    consume_again = consume

    def close(self) -> None:
        self.engine.dispose()
