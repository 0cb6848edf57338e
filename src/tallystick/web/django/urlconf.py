"""The pages as Django's URLs. Each view reads its request, calls the core, and sends the answer."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from functools import wraps
from typing import TYPE_CHECKING, Any

from asgiref.sync import sync_to_async
from django.core.handlers.asgi import ASGIRequest
from django.db import connections, transaction
from django.http import Http404, HttpRequest, HttpResponse, JsonResponse, StreamingHttpResponse
from django.urls import path
from django.views.decorators.csrf import csrf_exempt, csrf_protect
from django.views.decorators.http import require_http_methods

from tallystick.errors import Key, TallystickError
from tallystick.ledger import HISTORY_MAX, CreditTransaction
from tallystick.web.buyer.buyer_request import BuyerPage, Reply, redirect
from tallystick.web.buyer.core import CSV, csv_lines
from tallystick.web.buyer.paywall import UNLOCK_CREDITS
from tallystick.web.django.django_billing import NAMESPACE, DjangoBilling, DjangoRequest

if TYPE_CHECKING:
    from tallystick.web.buyer.sales import Sales

Shown = Callable[..., BuyerPage | Reply | HttpResponse]


def urls(billing: DjangoBilling) -> tuple[list[Any], str]:
    """The routes, for ``path("billing/", include(urls(billing)))``; they are named ``tallystick:history`` and so on.

    Raises:
        ConfigError: Stripe is configured, and neither ``engine`` nor ``config.database_url`` is set.
    """
    found = [*_reading(billing), *_welcome(billing)]
    if billing.config.host.workshops is not None:
        found += _unlocking(billing)
    if billing.sells:
        from tallystick.web.buyer.sales import Sales  # noqa: PLC0415 - an extra

        _ = billing.engine  # raises its ConfigError now and not for the first buyer
        found += _buying(billing, Sales(billing.config, billing.pages, billing.renderer))
    for each in found:
        # Each checks its visitor itself, or is for Stripe: Django's LoginRequiredMiddleware would redirect a delivery.
        each.callback.login_required = False
    return found, NAMESPACE


def _view(billing: DjangoBilling, methods: Mapping[str, Shown], *, asks_stripe: bool = False) -> Callable[..., Any]:
    """A view for the signed-in user, with a function for each method. Forms are protected even without a middleware.

    With ``asks_stripe`` it is outside Django's transactions, and leaves that of a ``TestCase`` as it is.
    """

    def shown(request: HttpRequest, **given: Any) -> Any:
        try:
            found = methods["GET" if request.method == "HEAD" else request.method](
                request, billing.signed_in(request), **given
            )
        except TallystickError as error:
            return billing.refusal(request, error, roll_back=not asks_stripe)
        return billing.response(request, found) if isinstance(found, BuyerPage | Reply) else found

    allowed = ["HEAD", *methods] if "GET" in methods else [*methods]
    made: Callable[..., Any] = require_http_methods(allowed)(csrf_protect(shown))
    return _outside_transactions(made) if asks_stripe else made


def _reading(billing: DjangoBilling) -> list[Any]:
    pages = billing.pages

    def static(request: HttpRequest, name: str) -> HttpResponse:
        found = pages.static(name, request.GET.get("v"))
        if found is None:
            raise Http404
        content, media_type, kept = found
        return billing.with_headers(HttpResponse(content, content_type=media_type), {"Cache-Control": kept})

    def badge(_: HttpRequest, user: Key) -> BuyerPage:
        return pages.badge(billing.connection, user)

    def pricing(request: HttpRequest, user: Key) -> BuyerPage:
        return pages.pricing(
            billing.connection, user, workshop=request.GET.get("workshop"), return_to=request.GET.get("return_to")
        )

    def history(request: HttpRequest, user: Key) -> BuyerPage:
        return pages.history(billing.connection, user, before=request.GET.get("before"))

    def history_csv(request: HttpRequest, user: Key) -> HttpResponse:
        def after(row: CreditTransaction | None) -> list[CreditTransaction]:
            return pages.rows(billing.connection, user, before=row)

        def lines(rows: list[CreditTransaction]) -> Iterator[str]:
            yield pages.csv_head()
            while rows:
                yield "".join(csv_lines(rows))
                rows = after(rows[-1]) if len(rows) == HISTORY_MAX else []

        first = after(None)  # before the response begins, so that an error can still be answered
        sent = lines(first)
        content = _asynchronous(sent) if isinstance(request, ASGIRequest) else sent
        return billing.with_headers(StreamingHttpResponse(content, content_type=CSV), pages.csv_headers())

    return [
        path("static/<str:name>", static, name="static"),
        path("badge", _view(billing, {"GET": badge}), name="badge"),
        path("pricing", _view(billing, {"GET": pricing}), name="pricing"),
        path("history", _view(billing, {"GET": history}), name="history"),
        path("history.csv", _view(billing, {"GET": history_csv}), name="history_csv"),
    ]


async def _asynchronous(lines: Iterator[str]) -> AsyncIterator[str]:
    """The lines, read in Django's thread for the database; under ASGI it would else read them all before the first."""
    following = sync_to_async(lambda: next(lines, None))
    while (line := await following()) is not None:
        yield line


def _welcome(billing: DjangoBilling) -> list[Any]:
    def welcome(request: HttpRequest, _: Key) -> BuyerPage:
        return billing.pages.welcome(return_to=request.GET.get("return_to"))

    def welcomed(request: HttpRequest, user: Key) -> Reply:
        back = request.POST.get("return_to")
        return billing.pages.welcomed(billing.connection, DjangoRequest(request), user, return_to=back)

    view = _view(billing, {"GET": welcome, "POST": welcomed})
    return [path("welcome", view, name="welcome"), path("welcome", view, name="welcomed")]


def _unlocking(billing: DjangoBilling) -> list[Any]:
    pages = billing.pages

    def confirm(request: HttpRequest, user: Key, workshop: str) -> BuyerPage:
        return pages.confirm(billing.connection, user, workshop, return_to=request.GET.get("return_to"))

    def unlock(request: HttpRequest, user: Key, workshop: str) -> BuyerPage | Reply:
        back = request.POST.get("return_to")
        return pages.unlock(billing.connection, DjangoRequest(request), user, workshop, return_to=back)

    def unlocked(request: HttpRequest, user: Key, workshop: str) -> BuyerPage:
        spent = UNLOCK_CREDITS if request.GET.get("spent") == str(UNLOCK_CREDITS) else 0
        back = request.GET.get("return_to")
        return pages.unlocked(billing.connection, user, workshop, spent=spent, return_to=back)

    asking = _view(billing, {"GET": confirm, "POST": unlock})
    # a path: Django decodes %2F, so that a key with a slash arrives as several segments
    return [
        path("workshops/<path:workshop>/unlock", asking, name="unlock"),
        path("workshops/<path:workshop>/unlock", asking, name="unlock_now"),
        path("workshops/<path:workshop>/unlocked", _view(billing, {"GET": unlocked}), name="unlocked"),
    ]


def _buying(billing: DjangoBilling, sales: Sales) -> list[Any]:
    from tallystick import stripe  # noqa: PLC0415 - an extra

    def checkout(request: HttpRequest, user: Key) -> Reply:
        sent = request.POST
        workshop, back = sent.get("workshop") or None, sent.get("return_to")
        if workshop is not None:
            billing.pages.paywall.workshop(billing.connection, user, workshop)  # it must be the user's
        buyer_request = DjangoRequest(request)
        started = sales.start(
            billing.engine, buyer_request, user, pack=sent.get("pack", ""), key=sent.get("key") or None, return_to=back,
            workshop=workshop,
        )  # fmt: skip
        return redirect(sales.address_after_start(buyer_request, started, return_to=back, workshop=workshop))

    def success(request: HttpRequest, user: Key) -> BuyerPage:
        query = request.GET
        outcome = sales.outcome(billing.engine, user, query.get("session_id", ""))
        return sales.finished(billing.connection, DjangoRequest(request), user, outcome, query.dict())

    def cancelled(request: HttpRequest, user: Key) -> BuyerPage:
        query = request.GET
        return sales.cancelled(
            billing.connection, user, workshop=query.get("workshop"), return_to=query.get("return_to")
        )

    @wraps(stripe.receive)
    def webhook(request: HttpRequest) -> HttpResponse:
        signature = request.headers.get("Stripe-Signature")
        answer = stripe.receive(billing.engine, billing.config, request.body, signature)
        return JsonResponse({"outcome": answer.outcome, "detail": answer.detail}, status=answer.status)

    delivered = _outside_transactions(csrf_exempt(require_http_methods(["POST"])(webhook)))
    return [
        path("checkout", _view(billing, {"POST": checkout}, asks_stripe=True), name="checkout"),
        path("success", _view(billing, {"GET": success}, asks_stripe=True), name="success"),
        path("cancelled", _view(billing, {"GET": cancelled}), name="cancelled"),
        path("webhooks/stripe", delivered, name="stripe_webhook"),
        path("webhooks/stripe/", delivered),  # without the slash too: a redirect would be a failed delivery
    ]


def _outside_transactions(view: Callable[..., Any]) -> Callable[..., Any]:
    """A view without ``ATOMIC_REQUESTS``: no transaction of Django's must be open during a request to Stripe."""
    for alias in connections:
        view = transaction.non_atomic_requests(using=alias)(view)
    return view
