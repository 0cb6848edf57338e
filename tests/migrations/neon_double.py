"""A double of the part of Neon's API that a rehearsal uses: real HTTP, shapes and names as in Neon's specification.

It refuses what Neon refuses: an unknown key (401), an unknown project, branch or endpoint (404), a parameter or a
property that the specification does not have (400), and a change while other operations of the project run (423).
A branch's address is that of a real database, copied from the original when the branch is made.
"""

from __future__ import annotations

import itertools
import json
import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self
from urllib.parse import parse_qs, urlsplit

PROJECT, KEY = "aged-wildflower-123456", "napi_the_right_one"
MAIN, ENDPOINT = "br-young-forest-a5b6c7d8", "ep-cool-darkness-a5b6c7d8"

# what the specification allows
BODY = {"branch", "endpoints", "annotation_value"}
BRANCH = {"parent_id", "name", "parent_lsn", "parent_timestamp", "protected", "archived", "init_source"}
ENDPOINT_OPTIONS = {
    "type",
    "autoscaling_limit_min_cu",
    "autoscaling_limit_max_cu",
    "provisioner",
    "suspend_timeout_seconds",
}
QUERIES = {
    "connection_uri": {"branch_id", "endpoint_id", "database_name", "role_name", "pooled"},
    "branches": {"search", "sort_by", "cursor", "sort_order", "limit"},
}


@dataclass
class Refused(Exception):
    status: int
    message: str


@dataclass
class Neon:
    """``copy(parent_id) -> address`` and ``drop(address)`` are what stands behind a branch."""

    copy: Callable[[str], str]
    drop: Callable[[str], None]
    roles: set[str]
    databases: set[str]
    takes_s: float = 0.3  # each operation
    locked: int = 0  # how many further changes meet other operations of the project
    lose_answer: bool = False  # the branch is made, and the connection dies before the answer
    ends_as: str = "finished"
    undeletable: bool = False
    branches: dict[str, dict[str, Any]] = field(default_factory=dict)
    operations: dict[str, dict[str, Any]] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._numbers = itertools.count(1)
        self._ends: dict[str, float] = {}
        self._addresses: dict[str, str] = {}

    def __enter__(self) -> Self:
        double = self

        class Handler(BaseHTTPRequestHandler):
            def answer(self) -> None:
                length = int(self.headers.get("Content-Length", 0))
                body = json.loads(self.rfile.read(length)) if length else None
                try:
                    status, found = double.handle(self.command, self.path, self.headers.get("Authorization", ""), body)
                except Refused as refused:
                    status = refused.status
                    found = {"request_id": "42", "code": "", "message": refused.message}
                if status == 0:
                    self.close_connection = True
                    return
                text = json.dumps(found).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text)

            def do_GET(self) -> None:
                self.answer()

            def do_POST(self) -> None:
                self.answer()

            def do_DELETE(self) -> None:
                self.answer()

            def log_message(self, *_: Any) -> None: ...

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        for address in self._addresses.values():
            self.drop(address)

    @property
    def api(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}/api/v2"

    def handle(  # noqa: C901 - a table of routes
        self, method: str, target: str, key: str, body: Any
    ) -> tuple[int, dict[str, Any]]:
        self.requests.append(f"{method} {target}")
        self.keys.append(key)
        if key != f"Bearer {KEY}":
            raise Refused(401, "supplied credentials do not pass authentication")
        where = urlsplit(target)
        parts = where.path.removeprefix("/api/v2/projects/").split("/")
        if parts[0] != PROJECT:
            raise Refused(404, "project not found")
        query = {name: values[0] for name, values in parse_qs(where.query).items()}
        unknown = query.keys() - QUERIES.get(parts[1], set())
        if unknown:
            raise Refused(400, f"unknown parameter {unknown}")
        match (method, *parts[1:]):
            case ("GET", "endpoints", endpoint):
                if endpoint != ENDPOINT:
                    raise Refused(404, "endpoint not found")
                return 200, {"endpoint": {"id": ENDPOINT, "branch_id": MAIN, "type": "read_write"}}
            case ("POST", "branches"):
                return self.create(body)
            case ("GET", "branches"):
                found = [one for one in self.branches.values() if query.get("search", "") in one["name"]]
                return 200, {"branches": found}
            case ("DELETE", "branches", branch):
                return self.delete(branch)
            case ("GET", "operations", operation):
                return 200, {"operation": self.operation(operation)}
            case ("GET", "connection_uri"):
                return 200, {"uri": self.uri(query)}
        raise Refused(405, "method not allowed")

    def create(self, body: Any) -> tuple[int, dict[str, Any]]:
        unknown = (body.keys() - BODY) | (body["branch"].keys() - BRANCH)
        unknown |= {name for endpoint in body["endpoints"] for name in endpoint.keys() - ENDPOINT_OPTIONS}
        parent = body["branch"].get("parent_id", MAIN)
        if unknown or not all(endpoint["type"] in ("read_write", "read_only") for endpoint in body["endpoints"]):
            raise Refused(400, f"unknown property {unknown}")
        if parent != MAIN or not re.fullmatch("[a-z0-9-]{1,60}", parent):
            raise Refused(404, "branch not found")
        self.refuse_while_locked()
        number = next(self._numbers)
        branch = {"id": f"br-copy-{number}", "project_id": PROJECT, "parent_id": parent, "name": body["branch"]["name"]}
        self.branches[branch["id"]] = branch | {"current_state": "init", "pending_state": "ready"}
        self._addresses[branch["id"]] = self.copy(parent)
        operations = [
            {"id": f"op-{number}-{action}", "branch_id": branch["id"], "action": action, "status": status}
            for action, status in (("create_branch", "running"), ("start_compute", "scheduling"))
        ]
        self.operations |= {operation["id"]: operation for operation in operations}
        self._ends |= {operation["id"]: time.monotonic() + self.takes_s for operation in operations}
        if self.lose_answer:
            return 0, {}
        endpoint = {"id": f"ep-copy-{number}", "branch_id": branch["id"], "type": "read_write", "current_state": "init"}
        return 201, {
            "branch": self.branches[branch["id"]],
            "endpoints": [endpoint],
            "operations": [dict(operation) for operation in operations],
            "roles": [],
            "databases": [],
        }

    def operation(self, name: str) -> dict[str, Any]:
        operation = self.operations[name]
        operation["status"] = "running" if time.monotonic() < self._ends[name] else self.ends_as
        return dict(operation)

    def uri(self, query: dict[str, str]) -> str:
        if not {"database_name", "role_name"} <= query.keys():
            raise Refused(400, "database_name and role_name are required")
        if query["database_name"] not in self.databases or query["role_name"] not in self.roles:
            raise Refused(404, "role or database not found")
        if query["branch_id"] not in self.branches:
            raise Refused(404, "branch not found")
        return self._addresses[query["branch_id"]]

    def delete(self, branch: str) -> tuple[int, dict[str, Any]]:
        if branch not in self.branches:
            raise Refused(404, "branch not found")
        if self.undeletable:
            raise Refused(422, "branch has children")
        self.refuse_while_locked()
        self.drop(self._addresses.pop(branch))
        return 200, {"branch": self.branches.pop(branch), "operations": []}

    def refuse_while_locked(self) -> None:
        self.locked -= 1
        if self.locked >= 0 or any(self.operation(name)["status"] == "running" for name in self.operations):
            raise Refused(423, "project already has running operations, scheduling of new ones is prohibited")
