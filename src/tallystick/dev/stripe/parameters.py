"""Stripe's own description of its API, trimmed (schemas.json.gz), and request parameters checked by it.

The file is made by tools/trim_stripe_schemas.py from Stripe's OpenAPI document; see LICENSE-stripe-openapi.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable, Mapping
from functools import cache
from importlib.resources import files
from typing import Any, Final
from urllib.parse import parse_qsl

from tallystick.errors import DevStripeError

STRING_MAX: Final = 5000  # characters of a string for which the document names no limit

Schema = dict[str, Any]
Params = dict[str, Any]


def refused(message: str, code: str | None = None, param: str | None = None, *, status: int = 400) -> DevStripeError:
    """Make the error that Stripe calls ``invalid_request_error``."""
    return DevStripeError(message, status=status, type="invalid_request_error", code=code, param=param)


@cache
def specification() -> dict[str, Any]:
    """Return ``api_version``, ``$defs`` (an object's schema by kind) and ``requests`` (by operation)."""
    packed = files(__package__).joinpath("schemas.json.gz").read_bytes()
    document: dict[str, Any] = json.loads(gzip.decompress(packed))
    return document


@cache
def _nullable(kind: str) -> tuple[str, ...]:
    properties: dict[str, Schema] = specification()["$defs"][kind]["properties"]
    return tuple(
        name
        for name, schema in properties.items()
        if "null" in schema.get("type", ()) or {"type": "null"} in schema.get("anyOf", ())
    )


def empty(kind: str) -> dict[str, Any]:
    """Return an object of this kind with every nullable field present and null, as Stripe sends it."""
    return dict.fromkeys(_nullable(kind))


def has_field(kind: str, name: str) -> bool:
    """True if Stripe's objects of this kind have a field of this name."""
    return name in specification()["$defs"][kind]["properties"]


def is_expandable(kind: str, name: str) -> bool:
    """True if the field has an id that ``expand`` replaces by the object."""
    schema: Schema = specification()["$defs"].get(kind, {}).get("properties", {}).get(name, {})
    return bool(schema.get("x-expandable"))


def parse_form(text: str) -> Params:
    """Read ``a[b][0]=c`` pairs into nested dicts; lists keep their indices as keys until ``check``."""
    form: Params = {}
    for name, value in parse_qsl(text, keep_blank_values=True):
        *parents, leaf = name.replace("]", "").split("[")
        target = form
        for part in parents:
            target = target.setdefault(part, {})
            if not isinstance(target, dict):
                raise refused(f"Invalid hash: {name}", param=name)
        target[leaf or str(len(target))] = value
    return form


def check(operation: str, form: Params, modelled: Iterable[str]) -> Params:
    """Return the form with Stripe's types, or raise Stripe's error for such parameters.

    Parameters of Stripe's that the double does not implement are refused too, with its own message: ignoring one could
    let a test pass that proves nothing.
    """
    schema = specification()["requests"][operation]
    params: Params = _value(schema, form, "")
    for name in params.keys() - set(modelled):
        raise refused(
            f"devstripe does not model the parameter {name!r} of {operation}, though Stripe has it. "
            "Leave it out, or test this against Stripe's own test mode.",
            "parameter_not_modelled",
            name,
        )
    return params


def _value(schema: Schema, value: Any, path: str) -> Any:
    if "anyOf" in schema:
        return _first_that_fits(schema["anyOf"], value, path)
    kind = schema.get("type")
    if kind == "object":
        return _object(schema, value, path)
    if kind == "array":
        if not isinstance(value, Mapping):
            raise refused("Invalid array", param=path)
        return [_value(schema["items"], item, f"{path}[{i}]") for i, item in enumerate(value.values())]
    if not isinstance(value, str):
        raise refused(f"Invalid {kind}: a hash was given.", param=path)
    return _scalar(schema, value, path)


def _first_that_fits(alternatives: list[Schema], value: Any, path: str) -> Any:
    error = None
    for alternative in alternatives:
        try:
            return _value(alternative, value, path)
        except DevStripeError as refusal:
            # the alternative of the value's own shape has the best error
            if error is None or (alternative.get("type") == "object") is isinstance(value, Mapping):
                error = refusal
    raise error or refused("Invalid value", param=path)


def _object(schema: Schema, value: Any, path: str) -> Params:
    if not isinstance(value, Mapping):
        raise refused("Invalid object", param=path)
    properties: dict[str, Schema] = schema.get("properties", {})
    others = schema.get("additionalProperties") or None
    checked = {}
    for name, item in value.items():
        inner = f"{path}[{name}]" if path else name
        known = properties.get(name, others)
        if known is None:
            raise refused(f"Received unknown parameter: {inner}", "parameter_unknown", inner)
        checked[name] = _value(known, item, inner)
    for name in schema.get("required", ()):
        if name not in checked:
            inner = f"{path}[{name}]" if path else name
            raise refused(f"Missing required param: {inner}.", "parameter_missing", inner)
    return checked


def _scalar(schema: Schema, value: str, path: str) -> str | int | float | bool:
    kind = schema.get("type")
    if kind in ("integer", "number"):
        try:
            return int(value) if kind == "integer" else float(value)
        except ValueError:
            raise refused(f"Invalid {kind}: {value}", f"parameter_invalid_{kind}", path) from None
    if kind == "boolean":
        if value not in ("true", "false"):
            raise refused(f"Invalid boolean: {value}", param=path)
        return value == "true"
    if "enum" in schema and value not in schema["enum"]:
        raise refused(f"Invalid {path}: must be one of {', '.join(schema['enum'])}", param=path)
    longest = schema.get("maxLength", STRING_MAX)
    if len(value) > longest:
        code = "url_invalid" if path.endswith("url") else None
        raise refused(f"Invalid string: must be at most {longest} characters", code, path)
    return value
