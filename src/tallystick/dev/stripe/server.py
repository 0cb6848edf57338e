"""DevStripe: the double as one object, served over HTTP on this machine."""

from __future__ import annotations

import contextlib
import inspect
import json
import socket
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Final, Literal, Self
from urllib.parse import parse_qs, urlsplit

from tallystick.dev.stripe import invoices, page, payments
from tallystick.dev.stripe.account import DAY_S, Object, StripeAccount
from tallystick.dev.stripe.api import Api, Fault, LostAnswer
from tallystick.dev.stripe.deliveries import Webhooks, as_json
from tallystick.dev.stripe.parameters import refused
from tallystick.errors import DevStripeError

HOST: Final = "127.0.0.1"  # only: anybody who reaches the double can pay without money
# The methods that other processes may call, as POST /_control/<name> with a JSON object of arguments.
CONTROLS: Final = frozenset({
    "advance", "bill", "deliveries", "dispute", "drop", "fault", "forget_idempotency_keys", "held", "hold",
    "move_dispute", "pay", "refund", "release", "resend", "roll_secret", "settle", "settle_refund",
    "signed", "wait_delivered",
})  # fmt: skip


class DevStripe:
    """A small Stripe in test mode, at ``url``, until ``close`` or the end of a ``with`` block.

    Point the SDK at it: ``StripeClient(dev.secret_key, base_addresses={"api": dev.url})``. Amounts are in
    minor units; ids name objects of the account. Controls return copies of the objects they changed, and
    raise DevStripeError, with nothing changed, when Stripe could not get into that state.

    Args:
        port: 0 takes a free one.
        secret_key: any other key is answered with 401.
        api_version: what events carry unless their endpoint has a version of its own.
        retry_delays_s: how long after each failed delivery the next one follows.
        delivery_timeout_s: how long an endpoint may take to answer.
        senders: threads that deliver; with more than one, events overtake each other as they do at Stripe.
        check: called with every object in an answer or event; for tests.
    """

    def __init__(
        self,
        *,
        port: int = 0,
        secret_key: str = "sk_test_devstripe",  # noqa: S107 - opens nothing but this double
        api_version: str | None = None,
        retry_delays_s: Sequence[float] = (0.2, 0.4, 0.8),
        delivery_timeout_s: float = 10,
        senders: int = 2,
        check: Callable[[Object], None] | None = None,
    ) -> None:
        self.secret_key = secret_key
        self.account = StripeAccount(api_version)
        self._webhooks = Webhooks(
            self.account, retry_delays_s=retry_delays_s, timeout_s=delivery_timeout_s, senders=senders
        )
        self.account.on_event = self._webhooks.announce
        if check is not None:
            self.account.check = check
        self.api = Api(self.account, secret_key)
        self._server = _Server((HOST, port), self)
        self.url = self.account.url = f"http://{HOST}:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop serving and delivering. The account's objects are gone."""
        self._server.stop()
        self._thread.join()
        self._webhooks.close()

    # -- actions of customers and banks

    def pay(
        self,
        session: str,
        *,
        card: str = payments.GOOD_CARD,
        discount: int = 0,
        tax: int = 0,
        quantity: int | None = None,
    ) -> Object:
        """Pay an open session, as its hosted page does.

        ``card`` is one of Stripe's test cards, or ``"async"`` for a bank debit, whose outcome ``settle`` sets.
        ``discount`` (minor units) stands for a promotion code; the whole amount gives ``no_payment_required``. ``tax``
        (minor units) is computed by Stripe Tax, for a session with it; it is added unless the price includes it.
        ``quantity`` is the buyer's number, if it is adjustable.
        """
        with self.account.lock:
            found = self._get("checkout.session", session)
            paid = payments.pay_session(self.account, found, card=card, discount=discount, tax=tax, quantity=quantity)
            return {**paid}

    def settle(self, session: str, *, succeeded: bool) -> Object:
        """Set the outcome of a bank debit."""
        with self.account.lock:
            found = self._get("checkout.session", session)
            return {**payments.settle_session(self.account, found, succeeded=succeeded)}

    def refund(self, payment_intent: str, *, amount: int | None = None, pending: bool = False) -> Object:
        """Refund as from the dashboard, without metadata; None refunds all that is left."""
        with self.account.lock:
            params: dict[str, Any] = {"payment_intent": payment_intent}
            if amount is not None:
                params["amount"] = amount
            return {**payments.create_refund(self.account, params, pending=pending)}

    def settle_refund(self, refund: str, status: Literal["succeeded", "failed", "canceled"]) -> Object:
        """Set the outcome of a refund, which may fail even after it succeeded."""
        with self.account.lock:
            return {**payments.settle_refund(self.account, self._get("refund", refund), status)}

    def dispute(self, payment_intent: str, *, amount: int | None = None, inquiry: bool = False) -> Object:
        """Open a dispute of the whole payment or of a part, or only an inquiry, which moves no money."""
        with self.account.lock:
            charge = payments.charge_of(self.account, {"payment_intent": payment_intent})
            return {**payments.open_dispute(self.account, charge, amount=amount, inquiry=inquiry)}

    def move_dispute(self, dispute: str, status: str) -> Object:
        """Move a dispute to ``under_review``, ``won``, ``lost``, ``warning_closed`` or the like."""
        with self.account.lock:
            return {**payments.move_dispute(self.account, self._get("dispute", dispute), status)}

    def bill(self, customer: str, lines: Sequence[Mapping[str, Any]]) -> Object:
        """Make and pay an invoice of a subscription, as Stripe does at the beginning of each period.

        A line is ``{"price": …, "amount": …, "start": …, "end": …}``, with amounts in minor units and times in Unix
        seconds, and optionally ``quantity`` (1), ``item`` (the subscription item, one for each price), ``proration``
        (False) and ``discount`` (0), by which less than the ``amount`` is paid.
        """
        with self.account.lock:
            return {**invoices.bill(self.account, self._get("customer", customer), lines)}

    def advance(self, seconds: int) -> int:
        """Move the account's clock forward, expire what is due, and return its time."""
        with self.account.lock:
            self.account.clock_offset_s += seconds
            payments.expire_due(self.account)
            return self.account.now()

    # -- deliveries

    def hold(self) -> None:
        """Hold deliveries from now on."""
        self._webhooks.hold()

    def held(self) -> list[dict[str, Any]]:
        """Return the held deliveries, oldest first: event, type, endpoint, attempt."""
        return as_json(self._webhooks.held)

    def release(self, events: Sequence[str] | None = None) -> list[dict[str, Any]]:
        """Send held deliveries one by one, and return the result of each when all were answered.

        None sends all, and ends the hold. A list of event ids sends those, in its order and as often as it names them,
        to reorder and duplicate deliveries; the others stay held.
        """
        return as_json(self._webhooks.release(events))

    def drop(self, events: Sequence[str]) -> int:
        """Drop held deliveries; their events can still be listed. Return their number."""
        return self._webhooks.drop(events)

    def resend(self, event: str) -> int:
        """Deliver an event again; return the number of endpoints."""
        return self._webhooks.resend(event)

    def deliveries(self) -> list[dict[str, Any]]:
        """Return all attempts so far: event, type, endpoint, attempt, status or error."""
        with self.account.lock:
            return as_json(self._webhooks.log)

    def wait_delivered(self, timeout_s: float = 30) -> bool:
        """Wait until no delivery is queued, under way or due to be retried. False after ``timeout_s``."""
        return self._webhooks.wait(timeout_s)

    def signed(self, event: str, endpoint: str, *, at: int | None = None) -> tuple[str, str]:
        """Return the body and the ``Stripe-Signature`` header of a delivery; ``at`` is its Unix time."""
        with self.account.lock:
            found = self._get("webhook_endpoint", endpoint)
            body, signature = self._webhooks.signed(self._get("event", event), found, at=at)
            return body.decode(), signature

    def roll_secret(self, endpoint: str, *, keep_old_s: float = DAY_S) -> str:
        """Give an endpoint a new signing secret; the old one also signs for a while, by the real clock."""
        with self.account.lock:
            return self._webhooks.roll_secret(self._get("webhook_endpoint", endpoint), keep_old_s)

    # -- faults

    def fault(
        self,
        method: str,
        path: str,
        outcome: int | Literal["cut", "timeout"],
        *,
        when: Literal["before", "after"] = "before",
        times: int = 1,
        wait_s: float = 120,
    ) -> None:
        """Let the next ``times`` matching requests fail, before or after their effect.

        ``path`` is as in ``/v1/checkout/sessions`` and may contain ``*``. ``outcome`` is a status to answer with,
        ``"cut"`` (the connection ends without an answer) or ``"timeout"`` (it does so after ``wait_s``). As Stripe
        documents, a 500 after the effect is stored under the request's idempotency key and answered again; a 502, 503
        or a lost answer is not, since a proxy made it.
        """
        if when not in ("before", "after") or (isinstance(outcome, str) and outcome not in ("cut", "timeout")):
            raise refused(f"A fault is a status, cut or timeout, before or after; not {outcome!r}, {when!r}.")
        if outcome == 429 and when == "after":  # noqa: PLR2004 - HTTP's own number
            raise refused("Stripe limits the rate before a request has an effect: use when='before'.")
        with self.account.lock:
            self.api.faults.append(Fault(method, path, outcome, when, times, wait_s))

    def forget_idempotency_keys(self) -> int:
        """Drop all idempotency keys, as Stripe may do after a day; return their number."""
        return self.api.forget_idempotency_keys()

    def _get(self, kind: str, key: str) -> Object:
        payments.expire_due(self.account)
        return self.account.get(kind, key)


class _Server(ThreadingHTTPServer):
    request_queue_size = 128  # the default of 5 makes concurrent clients wait for whole seconds
    daemon_threads = True

    def __init__(self, address: tuple[str, int], dev: DevStripe) -> None:
        super().__init__(address, _Handler)
        self.dev = dev
        self.stopping = threading.Event()
        self._open: set[socket.socket] = set()

    def process_request(self, request: Any, client_address: Any) -> None:
        self._open.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self._open.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), ConnectionError):  # not for a client that disconnected
            super().handle_error(request, client_address)

    def stop(self) -> None:
        self.stopping.set()
        self.shutdown()
        self.server_close()
        for connection in list(self._open):  # idle clients keep their connections open
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1  # one packet for headers and body
    server: _Server

    def log_message(self, *_args: object) -> None:  # the base class writes each request to stderr
        pass

    def _serve(self) -> None:
        url = urlsplit(self.path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0)).decode()
        if url.path.startswith("/v1/"):
            self._api(url.path, body if self.command == "POST" else url.query)
        elif url.path.startswith("/c/pay/"):
            self._page(url.path.removeprefix("/c/pay/"), body)
        elif url.path.startswith("/_control/") and self.command == "POST":
            self._control(url.path.removeprefix("/_control/"), body)
        else:
            self._send(404, "devstripe has /v1/..., /c/pay/<session> and POST /_control/<name>.", "text/plain")

    do_GET = do_POST = do_DELETE = _serve  # noqa: N815 - as the base class names them

    def _api(self, path: str, form: str) -> None:
        dev = self.server.dev
        headers = {name.lower(): value for name, value in self.headers.items()}
        try:
            answer = dev.api.answer(self.command, path, form, headers)
        except LostAnswer as lost:
            self.server.stopping.wait(lost.wait_s)
            self.close_connection = True
            return
        self._send(answer.status, json.dumps(answer.body, indent=2), "application/json", answer.headers)

    def _page(self, key: str, body: str) -> None:
        account = self.server.dev.account
        with account.lock:
            try:
                payments.expire_due(account)
                session = account.get("checkout.session", key)
            except DevStripeError as error:
                self._send(error.status, error.message, "text/plain")
                return
            problem, target = "", None
            if self.command == "POST":
                try:
                    target = page.act(account, session, parse_qs(body).get("action", [""])[0])
                except DevStripeError as error:
                    problem = error.message
            content = page.render(account, session, problem)
        if target:
            self._send(303, "", "text/plain", {"Location": target})
        else:
            self._send(200, content, "text/html")

    def _control(self, name: str, body: str) -> None:
        try:
            if name not in CONTROLS:
                message = f"There is no control {name!r}; there are: {', '.join(sorted(CONTROLS))}."
                raise refused(message, status=404)
            control = getattr(self.server.dev, name)
            given = json.loads(body or "{}")
            if not isinstance(given, dict):
                raise refused(f"The arguments of {name} are a JSON object, not: {body}")
            try:
                inspect.signature(control).bind(**given)
            except TypeError as error:
                raise refused(f"{name}{inspect.signature(control)}: {error}") from None
            answer, status = control(**given), 200
        except json.JSONDecodeError as error:
            answer, status = {"error": f"The arguments are not JSON: {error}"}, 400
        except DevStripeError as error:
            answer, status = {"error": error.message}, error.status
        self._send(status, json.dumps(answer), "application/json")

    def _send(self, status: int, content: str, kind: str, headers: Mapping[str, str] | None = None) -> None:
        body = content.encode()
        self.send_response(status)
        self.send_header("Content-Type", f"{kind}; charset=utf-8" if kind.startswith("text/") else kind)
        self.send_header("Content-Length", str(len(body)))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)
