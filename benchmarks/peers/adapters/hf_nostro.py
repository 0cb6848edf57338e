"""hf-nostro: its `debit` with a key, on a pool of psycopg's, accounts named by the id it gave them (its cheapest way).

It does not refuse a debit for want of credits: it records a debt. So its `consume` is never False for that reason.
"""

from __future__ import annotations

from uuid import UUID

from nostro import Ledger
from nostro.migrate import migrate
from psycopg_pool import ConnectionPool

SCALE = 0  # whole credits


class Adapter:
    def __init__(self, url: str, connections: int) -> None:
        self.dsn = url.replace("+psycopg", "", 1)
        self.pool = ConnectionPool(self.dsn, min_size=connections, max_size=connections, open=True)
        self.ledger = Ledger(pool=self.pool, scale=SCALE)
        self.ids: dict[int, UUID] = {}

    def create(self) -> None:
        migrate(dsn=self.dsn, scale=SCALE)

    def open(self, account: int, credits: int) -> None:
        self.ids[account] = self.ledger.accounts.create("bench", str(account)).id
        given = self.ledger.amount(credits)
        self.ledger.credit(self.ids[account], given, category="opening", idempotency_key="opening")

    def known(self, account: int) -> UUID:
        """The id, as an app would store it beside its user; all are read once."""
        if not self.ids:
            found: dict[int, UUID] = {}
            page = self.ledger.accounts.list("bench", limit=100)
            while page.cursor:
                found |= {int(each.scope_ref): each.id for each in page}
                page = self.ledger.accounts.list("bench", limit=100, cursor=page.cursor)
            self.ids = found | {int(each.scope_ref): each.id for each in page}
        return self.ids[account]

    def consume(self, account: int, key: str) -> bool:
        amount = self.ledger.amount(1)
        return not self.ledger.debit(self.known(account), amount, category="usage", idempotency_key=key).replayed

    consume_again = consume

    def close(self) -> None:
        self.pool.close()
