"""gringotts-api: its dependency `charge(1)`, called as FastAPI calls it, without an HTTP server around it.

It finds the user by the request's API key, so that is part of each consumption. It knows idempotency keys only for
HTTP requests (its middleware), so what is timed has none, and only `consume_again` goes through an app.
"""

from __future__ import annotations

import gringotts
import sqlalchemy as sa
from fastapi import Depends, FastAPI, Request
from fastapi.testclient import TestClient
from gringotts import auth, crud, db, migrations


class Adapter:
    def __init__(self, url: str, connections: int) -> None:
        self.engine = sa.create_engine(url, pool_size=connections, max_overflow=0)
        db.SessionLocal.configure(bind=self.engine)
        self.charge = gringotts.charge(1)
        self.app = FastAPI()
        gringotts.init_app(self.app, gringotts.GringottsConfig(idempotency_replay_validator=lambda _scope: True))
        self.app.post("/spend", dependencies=[Depends(self.charge)])(lambda: {"done": True})

    def create(self) -> None:
        db.Base.metadata.create_all(self.engine)
        migrations.run_pending(self.engine)

    def open(self, account: int, credits: int) -> None:
        with db.SessionLocal() as session:
            hashed = auth.get_api_key_hash(f"gk_{account}")
            crud.create_user(session, str(account), hashed, credits=credits)

    def consume(self, account: int, key: str) -> bool:  # noqa: ARG002 - see above
        headers = [(b"x-api-key", f"gk_{account}".encode())]
        request = Request({"type": "http", "method": "POST", "path": "/spend", "query_string": b"", "headers": headers})
        charged = self.charge(request)
        try:
            next(charged)
        except gringotts.PaymentRequiredError:
            return False
        next(charged, None)  # the endpoint has answered
        return True

    def consume_again(self, account: int, key: str) -> bool:
        answer = TestClient(self.app).post("/spend", headers={"x-api-key": f"gk_{account}", "idempotency-key": key})
        return answer.status_code == 200 and "idempotent-replayed" not in answer.headers

    def close(self) -> None:
        self.engine.dispose()
