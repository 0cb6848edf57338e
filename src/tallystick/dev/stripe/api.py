"""Stripe's HTTP API over an account: routes, authentication, idempotency keys, lists, ``expand``, faults."""

from __future__ import annotations

import copy
import operator
import re
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import partial
from typing import Any, Final, Literal, NamedTuple

from tallystick.dev.stripe import catalogue, payments
from tallystick.dev.stripe.account import DAY_S, Object, StripeAccount
from tallystick.dev.stripe.deliveries import new_secret
from tallystick.dev.stripe.parameters import Params, check, is_expandable, parse_form, refused
from tallystick.errors import DevStripeError

EXPAND_DEPTH: Final = 4
PAGING: Final = frozenset({"ending_before", "limit", "starting_after"})
PAGE_DEFAULT, PAGE_LIMIT = 10, 100
IDEMPOTENCY_KEY_MAX: Final = 255


class Route(NamedTuple):
    """The answer to an operation: the handler gets the account, the parameters and the id in the path."""

    handler: Callable[[StripeAccount, Params, str], Object]
    params: frozenset[str]


def _create(make: Callable[[StripeAccount, Params], Object], params: str) -> Route:
    return Route(lambda account, given, _key: make(account, given), frozenset(params.split()))


def _act(kind: str, act: Callable[[StripeAccount, Object], Object]) -> Route:
    return Route(lambda account, _given, key: act(account, account.get(kind, key)), frozenset())


def _update(kind: str, params: str) -> Route:
    return Route(lambda account, given, key: account.update(kind, key, given), frozenset(params.split()))


def _read(kind: str) -> Route:
    return Route(lambda account, _given, key: account.get(kind, key), frozenset())


def _delete(kind: str) -> Route:
    return Route(lambda account, _given, key: account.delete(kind, key), frozenset())


def _list(kind: str, filters: str) -> Route:
    names = frozenset(filters.split())
    return Route(partial(_listing, kind, names - {"created"}), names | PAGING)


# Filters that are not the field of the same name.
_FILTERS: Final[dict[str, Callable[[Object, Any], bool]]] = {
    "delivery_success": lambda event, wanted: (event["pending_webhooks"] == 0) == wanted,
    "ids": lambda one, wanted: one["id"] in wanted,
    "lookup_keys": lambda price, wanted: price["lookup_key"] in wanted,
    "type": lambda one, wanted: fnmatchcase(one["type"], wanted),  # events take "charge.*"
    "types": lambda event, wanted: event["type"] in wanted,
}
_RANGES: Final = {"gt": operator.gt, "gte": operator.ge, "lt": operator.lt, "lte": operator.le}


def _listing(kind: str, filters: frozenset[str], account: StripeAccount, params: Params, _key: str) -> Object:
    created = params.get("created", {})
    if "customer" in filters & params.keys():
        account.get("customer", params["customer"], param="customer")
    if not isinstance(created, dict):
        created = {"gte": created, "lte": created}

    def wanted(one: Object) -> bool:
        if kind == "event" and account.forgotten(one):
            return False
        return all(_RANGES[name](one["created"], bound) for name, bound in created.items()) and all(
            _FILTERS[name](one, params[name]) if name in _FILTERS else one.get(name) == params[name]
            for name in filters & params.keys()
        )

    newest_first = [one for one in reversed(account.objects[kind].values()) if wanted(one)]
    return _page(newest_first, params)


def _read_customer(account: StripeAccount, _params: Params, key: str) -> Object:
    """Return a customer, or the stub of a deleted one."""
    if key in account.deleted:
        return {"id": key, "object": "customer", "deleted": True}
    return account.get("customer", key)


def _line_items(account: StripeAccount, params: Params, key: str) -> Object:
    account.get("checkout.session", key)
    return _page(account.line_items[key], params)


def _invoice_lines(account: StripeAccount, params: Params, key: str) -> Object:
    account.get("invoice", key)
    return _page([line for line in account.objects["line_item"].values() if line["invoice"] == key], params)


def _page(rows: list[Object], params: Params) -> Object:
    limit = params.get("limit", PAGE_DEFAULT)
    if not 1 <= limit <= PAGE_LIMIT:
        message = f"Invalid integer: limit is between 1 and {PAGE_LIMIT}"
        raise refused(message, "parameter_invalid_integer", "limit")
    ids = [one["id"] for one in rows]
    for cursor in ("starting_after", "ending_before"):
        if cursor in params and params[cursor] not in ids:
            raise refused(f"No such object: '{params[cursor]}'", "resource_missing", cursor)
    if "ending_before" in params:
        rows = rows[: ids.index(params["ending_before"])]
        data = rows[-limit:]
    else:
        rows = rows[ids.index(params["starting_after"]) + 1 :] if "starting_after" in params else rows
        data = rows[:limit]
    return {"object": "list", "data": data, "has_more": len(rows) > len(data)}


def _create_endpoint(account: StripeAccount, params: Params) -> Object:
    params = {"description": None, "metadata": {}, **params}
    endpoint = account.new("webhook_endpoint", status="enabled", **params)
    secret = new_secret()
    account.secrets[endpoint["id"]] = [(secret, None)]
    return endpoint | {"secret": secret}  # shown this once


def _update_endpoint(account: StripeAccount, params: Params, key: str) -> Object:
    params = {**params}
    if "disabled" in params:
        params["status"] = "disabled" if params.pop("disabled") else "enabled"
    return account.update("webhook_endpoint", key, params)


def _close_dispute(account: StripeAccount, dispute: Object) -> Object:
    inquiry = dispute["status"].startswith("warning_")
    return payments.move_dispute(account, dispute, "warning_closed" if inquiry else "lost")


def _confirm_payment_page(account: StripeAccount, params: Params, key: str) -> Object:
    session = account.get("checkout.session", key)
    if params.get("expected_amount") != str(session["amount_total"]):
        raise refused(f"The amount is {session['amount_total']}.", param="expected_amount")
    method = account.get("payment_method", params.get("payment_method", ""), param="payment_method")
    return payments.pay_session(account, session, card=account.cards[method["id"]])


ROUTES: Final[dict[str, Route]] = {
    "POST /v1/customers": _create(catalogue.create_customer, "description email metadata name phone"),
    "GET /v1/customers": _list("customer", "created email"),
    "GET /v1/customers/{customer}": Route(_read_customer, frozenset()),
    "POST /v1/customers/{customer}": Route(
        catalogue.update_customer, frozenset({"description", "email", "metadata", "name", "phone"})
    ),
    "DELETE /v1/customers/{customer}": _delete("customer"),
    "POST /v1/products": _create(
        catalogue.create_product,
        "active description id images metadata name statement_descriptor unit_label url",
    ),
    "GET /v1/products": _list("product", "active created ids"),
    "GET /v1/products/{id}": _read("product"),
    "POST /v1/products/{id}": _update("product", "active default_price description metadata name"),
    "POST /v1/prices": _create(
        catalogue.create_price,
        "active currency lookup_key metadata nickname product product_data tax_behavior transfer_lookup_key "
        "unit_amount",
    ),
    "GET /v1/prices": _list("price", "active created currency lookup_keys product type"),
    "GET /v1/prices/{price}": _read("price"),
    "POST /v1/prices/{price}": _update("price", "active lookup_key metadata nickname tax_behavior"),
    "POST /v1/checkout/sessions": _create(
        payments.create_session,
        "allow_promotion_codes automatic_tax billing_address_collection cancel_url client_reference_id customer "
        "custom_text customer_creation customer_email customer_update expires_at invoice_creation line_items locale "
        "metadata mode payment_intent_data payment_method_types submit_type success_url tax_id_collection ui_mode",
    ),
    "GET /v1/checkout/sessions": _list("checkout.session", "created customer payment_intent status"),
    "GET /v1/checkout/sessions/{session}": _read("checkout.session"),
    "POST /v1/checkout/sessions/{session}": _update("checkout.session", "metadata"),
    "GET /v1/checkout/sessions/{session}/line_items": Route(_line_items, PAGING),
    "POST /v1/checkout/sessions/{session}/expire": _act("checkout.session", payments.expire_session),
    "POST /v1/payment_methods": _create(
        payments.create_payment_method, "billing_details card metadata sepa_debit type us_bank_account"
    ),
    "POST /v1/payment_intents": _create(
        payments.create_intent,
        "amount confirm currency customer description metadata off_session payment_method payment_method_types",
    ),
    "GET /v1/payment_intents": _list("payment_intent", "created customer"),
    "GET /v1/payment_intents/{intent}": _read("payment_intent"),
    "POST /v1/payment_intents/{intent}": _update("payment_intent", "description metadata"),
    "GET /v1/charges": _list("charge", "created customer payment_intent"),
    "GET /v1/charges/{charge}": _read("charge"),
    "GET /v1/balance_transactions": _list("balance_transaction", "created currency source type"),
    "GET /v1/balance_transactions/{id}": _read("balance_transaction"),
    "POST /v1/refunds": _create(payments.create_refund, "amount charge metadata payment_intent reason"),
    "GET /v1/refunds": _list("refund", "charge created payment_intent"),
    "GET /v1/refunds/{refund}": _read("refund"),
    "POST /v1/refunds/{refund}": _update("refund", "metadata"),
    "GET /v1/disputes": _list("dispute", "charge created payment_intent"),
    "GET /v1/disputes/{dispute}": _read("dispute"),
    "POST /v1/disputes/{dispute}": Route(
        lambda account, given, key: payments.answer_dispute(account, account.get("dispute", key), given),
        frozenset({"evidence", "metadata", "submit"}),
    ),
    "POST /v1/disputes/{dispute}/close": _act("dispute", _close_dispute),
    "GET /v1/invoices": _list("invoice", "created customer status"),
    "GET /v1/invoices/{invoice}": _read("invoice"),
    "GET /v1/invoices/{invoice}/lines": Route(_invoice_lines, PAGING),
    "GET /v1/events": _list("event", "created delivery_success type types"),
    "GET /v1/events/{id}": _read("event"),
    "POST /v1/webhook_endpoints": _create(_create_endpoint, "api_version description enabled_events metadata url"),
    "GET /v1/webhook_endpoints": _list("webhook_endpoint", ""),
    "GET /v1/webhook_endpoints/{webhook_endpoint}": _read("webhook_endpoint"),
    "POST /v1/webhook_endpoints/{webhook_endpoint}": Route(
        _update_endpoint, frozenset({"description", "disabled", "enabled_events", "metadata", "url"})
    ),
    "DELETE /v1/webhook_endpoints/{webhook_endpoint}": _delete("webhook_endpoint"),
    # undocumented: the official command line calls it to complete a session
    "GET /v1/payment_pages/{session}": _read("checkout.session"),
    "POST /v1/payment_pages/{session}/confirm": Route(_confirm_payment_page, frozenset()),
}
_PATTERNS: Final = [(re.compile(re.sub(r"\{\w+\}", "([^/]+)", operation)), operation) for operation in ROUTES]


class LostAnswer(Exception):
    """The connection is to end without an answer, after ``wait_s`` seconds."""

    def __init__(self, wait_s: float) -> None:
        super().__init__()
        self.wait_s = wait_s


@dataclass
class Fault:
    """A fault of the next ``times`` requests whose method and path match."""

    method: str
    path: str  # may hold * and ?
    outcome: int | Literal["cut", "timeout"]
    when: Literal["before", "after"]
    times: int
    wait_s: float

    def answer(self) -> Answer:
        """Return the faulty answer, or raise LostAnswer."""
        if isinstance(self.outcome, str):
            raise LostAnswer(self.wait_s if self.outcome == "timeout" else 0)
        limited = self.outcome == 429  # noqa: PLR2004 - HTTP's own number
        error = {
            "type": "invalid_request_error" if limited else "api_error",
            "message": f"devstripe was told to answer {self.outcome}.",
        } | ({"code": "rate_limit"} if limited else {})
        return Answer(self.outcome, {"error": error})


@dataclass
class Answer:
    """A status, a body, and additional headers."""

    status: int
    body: Object
    headers: dict[str, str] = field(default_factory=dict)


class _Remembered(NamedTuple):
    operation: str
    params: Params
    answer: Answer
    request_id: str
    created: int


class Api:
    """The API of an account, which answers one request at a time."""

    def __init__(self, account: StripeAccount, secret_key: str) -> None:
        self.account = account
        self.secret_key = secret_key
        self.faults: list[Fault] = []
        self.requests: list[tuple[str, str]] = []  # method and path of each, in order
        self._remembered: dict[str, _Remembered] = {}

    def answer(self, method: str, path: str, form: str, headers: Mapping[str, str]) -> Answer:
        """Answer one request; ``headers`` have lower-case names. Raises LostAnswer for such a fault."""
        request_id = "req_" + secrets.token_hex(7)
        with self.account.lock:
            self.requests.append((method, path))
            payments.expire_due(self.account)
            try:
                answer = self._answer(method, path, form, headers, request_id)
            except DevStripeError as error:
                answer = _error(error)
            finally:
                self.account.cause = {"id": None, "idempotency_key": None}
        answer.headers |= {
            "Request-Id": request_id,
            "Stripe-Version": headers.get("stripe-version") or self.account.api_version,
        }
        return answer

    def forget_idempotency_keys(self) -> int:
        """Drop all idempotency keys, as Stripe may do after a day; return their number."""
        with self.account.lock:
            count = len(self._remembered)
            self._remembered.clear()
            return count

    def _answer(self, method: str, path: str, form: str, headers: Mapping[str, str], request_id: str) -> Answer:
        if headers.get("authorization", "") != f"Bearer {self.secret_key}":
            given = headers.get("authorization", "").removeprefix("Bearer ")
            raise refused(f"Invalid API Key provided: {given[:7]}****", status=401)
        fault = self._fault(method, path)
        if fault and fault.when == "before":
            return fault.answer()
        operation, key = _match(method, path)
        raw = parse_form(form)
        idempotency_key = headers.get("idempotency-key") if method == "POST" else None
        if idempotency_key and len(idempotency_key) > IDEMPOTENCY_KEY_MAX:
            raise refused(f"Idempotency keys take {IDEMPOTENCY_KEY_MAX} characters.", param="Idempotency-Key")
        if idempotency_key:
            before = self._remembered.get(idempotency_key)
            if before and before.created > self.account.now() - DAY_S:
                return _replay(before, f"{method} {path}", raw, idempotency_key)
        params, expand = _checked(operation, raw)
        # From here on the request counts as executed, and Stripe stores any answer.
        self.account.cause = {"id": request_id, "idempotency_key": idempotency_key}
        answer = self._execute(operation, params, key, expand, path)
        if fault and fault.outcome == 500:  # noqa: PLR2004 - Stripe's own failure; other statuses come from proxies
            answer = fault.answer()
        if idempotency_key:
            answer.headers["Idempotency-Key"] = idempotency_key
            self._remembered[idempotency_key] = _Remembered(
                f"{method} {path}", raw, answer, request_id, self.account.now()
            )
        return fault.answer() if fault else answer

    def _execute(self, operation: str, params: Params, key: str, expand: list[str], path: str) -> Answer:
        try:
            made = ROUTES[operation].handler(self.account, params, key)
            if made["object"] == "list":
                made["url"] = path
            # a copy: the account changes its objects later, and expanding must not change them
            body = copy.deepcopy(made)
            for wish in expand:
                _expand(self.account, body, wish.split("."), wish)
        except DevStripeError as error:
            return _error(error)
        for one in body["data"] if body["object"] == "list" else [body]:
            self.account.check(one)
        return Answer(200, body)

    def _fault(self, method: str, path: str) -> Fault | None:
        for fault in self.faults:
            if fault.times and fault.method == method and fnmatchcase(path, fault.path):
                fault.times -= 1
                return fault
        return None


def _error(error: DevStripeError) -> Answer:
    body = {"type": error.type, "message": error.message, "code": error.code, "param": error.param}
    return Answer(error.status, {"error": {name: value for name, value in body.items() if value is not None}})


def _match(method: str, path: str) -> tuple[str, str]:
    for pattern, operation in _PATTERNS:
        if found := pattern.fullmatch(f"{method} {path}"):
            return operation, found[1] if pattern.groups else ""
    message = f"Unrecognized request URL ({method}: {path}). devstripe models a part of Stripe's API."
    raise refused(message, status=404)


def _replay(before: _Remembered, operation: str, raw: Params, idempotency_key: str) -> Answer:
    if (before.operation, before.params) != (operation, raw):
        message = (
            "Keys for idempotent requests can only be used with the same parameters they were first used "
            f"with. Try using a key other than '{idempotency_key}' if you meant to execute a different "
            "request."
        )
        raise DevStripeError(message, status=400, type="idempotency_error")
    headers = {"Idempotent-Replayed": "true", "Original-Request": before.request_id}
    return Answer(before.answer.status, before.answer.body, before.answer.headers | headers)


def _checked(operation: str, raw: Params) -> tuple[Params, list[str]]:
    if "/payment_pages/" in operation:  # undocumented, so there is nothing to check against
        return raw, []
    params = check(operation, raw, ROUTES[operation].params | {"expand"})
    return params, params.pop("expand", [])


def _expand(account: StripeAccount, node: Any, parts: list[str], path: str) -> None:
    """Replace the ids at ``parts`` by their objects, in place."""
    if not parts:
        return
    if len(path.split(".")) > EXPAND_DEPTH:
        raise refused(f"You cannot expand more than {EXPAND_DEPTH} levels of a property: {path}")
    name, *rest = parts
    if node.get("object") == "list" and name == "data":
        for one in node["data"]:
            _expand(account, one, rest, path)
        return
    kind = node.get("object", "")
    if (kind, name) == ("checkout.session", "line_items"):
        url = f"/v1/checkout/sessions/{node['id']}/line_items"
        node[name] = copy.deepcopy(_page(account.line_items[node["id"]], {})) | {"url": url}
    elif is_expandable(kind, name):
        if isinstance(node[name], str):
            node[name] = _find(account, node[name])
    elif not isinstance(node.get(name), dict):
        raise refused(f"This property cannot be expanded ({path}).")
    if node[name] is not None:
        _expand(account, node[name], rest, path)


def _find(account: StripeAccount, key: str) -> Object | str:
    for objects in account.objects.values():
        if key in objects:
            return copy.deepcopy(objects[key])
    return key
