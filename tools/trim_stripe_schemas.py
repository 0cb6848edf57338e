"""Cut Stripe's OpenAPI document down to what the Stripe double answers with and is asked.

    pip download --no-deps --only-binary=:all: --python-version 3.14 seahaven-stripe-world==0.3.0
    unzip seahaven_stripe_world-0.3.0-*.whl seahaven_stripe_world/spec/spec3.json
    python tools/trim_stripe_schemas.py seahaven_stripe_world/spec/spec3.json

The document is Stripe's own (https://github.com/stripe/openapi, MIT). The result is the same, byte for
byte, for the same document: src/tallystick/dev/stripe/schemas.json.gz.
"""

from __future__ import annotations

import gzip
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tallystick.dev.stripe.api import ROUTES

TARGET = Path(__file__).parents[1] / "src/tallystick/dev/stripe/schemas.json.gz"
KINDS = {
    "balance_transaction", "charge", "checkout.session", "customer", "deleted_customer",
    "deleted_webhook_endpoint", "dispute", "dispute_evidence", "error", "event", "invoice", "item", "line_item",
    "payment_intent", "payment_method", "price", "product", "refund", "webhook_endpoint",
}  # fmt: skip
KEPT = {
    "$ref", "additionalProperties", "anyOf", "enum", "items", "maxLength", "properties", "required", "type",
}  # fmt: skip


def json_schema(node: dict[str, Any]) -> dict[str, Any]:
    """Turn an OpenAPI 3.0 schema into JSON Schema 2020-12, without prose."""
    if "x-expansionResources" in node:  # an id, or with `expand` the object
        targets = [one["$ref"].rsplit("/", 1)[-1] for one in node["x-expansionResources"]["oneOf"]]
        options: list[dict[str, Any]] = [{"type": "string"}]
        # Objects that the double never makes are left out, and with them most of the document.
        options += [{"$ref": f"#/$defs/{kind}"} for kind in targets if kind in KINDS]
        options += [{"type": "null"}] if node.get("nullable") else []
        return {"anyOf": options, "x-expandable": True}
    result: dict[str, Any] = {}
    for key in KEPT & node.keys():
        value = node[key]
        if key == "$ref":
            value = "#/$defs/" + value.rsplit("/", 1)[-1]
        elif key == "properties":
            value = {name: json_schema(schema) for name, schema in value.items()}
        elif key == "anyOf":
            value = [json_schema(schema) for schema in value]
        elif key in ("items", "additionalProperties") and isinstance(value, dict):
            value = json_schema(value)
        result[key] = value
    if not node.get("nullable"):
        return result
    if "type" not in result:
        return {"anyOf": [result, {"type": "null"}]}
    result["type"] = [result["type"], "null"]
    if "enum" in result:
        result["enum"] = [*result["enum"], None]
    return result


def references(node: object) -> Iterator[str]:
    """Yield the names of the definitions that a schema points to."""
    if isinstance(node, dict):
        if isinstance(node.get("$ref"), str):
            yield node["$ref"].rsplit("/", 1)[-1]
        for value in node.values():
            yield from references(value)
    elif isinstance(node, list):
        for value in node:
            yield from references(value)


def definitions(document: dict[str, Any]) -> dict[str, Any]:
    """Return the schemas of KINDS and of everything they refer to; no object takes other fields."""
    found: dict[str, Any] = {}
    waiting = sorted(KINDS)
    while waiting:
        kind = waiting.pop()
        if kind in found:
            continue
        schema = json_schema(document["components"]["schemas"][kind])
        if "properties" in schema:
            schema["additionalProperties"] = False
        found[kind] = schema
        waiting += references(schema)
    return found


def parameters(document: dict[str, Any], operation: str) -> dict[str, Any]:
    """Return one schema for what a request may carry, in its query (GET) or its form."""
    method, path = operation.split()
    described = document["paths"][path][method.lower()]
    if method == "POST":
        content = described["requestBody"]["content"]
        form = json_schema(content["application/x-www-form-urlencoded"]["schema"])
        # The SDK pins versions that are newer than the document: any is taken.
        form["properties"].get("api_version", {}).pop("enum", None)
        return form
    query = [one for one in described.get("parameters", []) if one["in"] == "query"]
    return {
        "type": "object",
        "properties": {one["name"]: json_schema(one["schema"]) for one in query},
        "required": [one["name"] for one in query if one.get("required")],
    }


def main(source: Path) -> None:
    """Write the trimmed document."""
    document = json.loads(source.read_bytes())
    trimmed = {
        "api_version": document["info"]["version"],
        "$defs": definitions(document),
        "requests": {one: parameters(document, one) for one in ROUTES if "/payment_pages/" not in one},
    }
    text = json.dumps(trimmed, separators=(",", ":"), sort_keys=True).encode()
    TARGET.write_bytes(gzip.compress(text, compresslevel=9, mtime=0))
    sys.stdout.write(f"{TARGET}: {len(text) // 1024} KiB, {TARGET.stat().st_size // 1024} KiB packed\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
