"""Tallystick's Combiner: the same calls from the same threads, gathered into one statement while one is in flight."""

from __future__ import annotations

from adapters import tallystick

from tallystick import InsufficientCredits
from tallystick.ledger.combiner import Combiner


class Adapter(tallystick.Adapter):
    def __init__(self, url: str, connections: int) -> None:
        super().__init__(url, connections)
        self.combiner = Combiner(self.ledger, self.engine)

    def consume(self, account: int, key: str) -> bool:
        try:
            return not self.combiner.consume(account, key=key).result().replayed
        except InsufficientCredits:
            return False

    consume_again = consume

    def close(self) -> None:
        self.combiner.close()
        super().close()
