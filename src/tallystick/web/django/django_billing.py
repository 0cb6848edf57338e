"""The object that a Django app makes: the pages, and the checks before its own views.

All reading and spending uses Django's own connection, inside Django's transaction. Requests to Stripe have transactions
of their own, through an engine of SQLAlchemy's.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from functools import cached_property, lru_cache, wraps
from typing import Any, ClassVar

import jinja2
import sqlalchemy as sa
from asgiref.sync import iscoroutinefunction
from django.conf import settings
from django.contrib.auth import REDIRECT_FIELD_NAME
from django.db import connections, transaction
from django.http import HttpRequest, HttpResponse
from django.middleware.csrf import get_token
from django.shortcuts import resolve_url
from django.template.loader import render_to_string
from django.urls import URLResolver, get_resolver, get_urlconf, reverse
from django.utils.cache import patch_cache_control, patch_vary_headers
from django.utils.functional import SimpleLazyObject
from django.views import View as DjangoView
from markupsafe import Markup

from tallystick.config import Config
from tallystick.database import engine as engine_of
from tallystick.errors import ConfigError, Key, NotSignedIn, TallystickError, UnknownUser
from tallystick.ledger import Access
from tallystick.web.buyer.buyer_request import HTML, SERVER_FAULT, BuyerPage, Reply, quoted
from tallystick.web.buyer.core import Pages
from tallystick.web.buyer.fragments import Fragments
from tallystick.web.buyer.refusals import Refusals
from tallystick.web.buyer.rendering import Renderer
from tallystick.web.buyer.texts import Texts
from tallystick.web.shared.pages import buyer_headers

View = Callable[..., Any]
Preview = Callable[[HttpRequest, Key], Any]
"""The part of a workshop that the paywall shows blurred, marked safe. It must not contain what a credit buys."""

NAMESPACE = "tallystick"


class DjangoRequest:
    """A request of Django's, for the pages."""

    def __init__(self, request: HttpRequest) -> None:
        self.request = request
        self.method: str = request.method
        self.address: str = request.get_full_path()
        self.fragment: bool = request.headers.get("HX-Request") == "true"
        self.html: bool = HTML in request.headers.get("Accept", "")

    @property
    def origin(self) -> str:
        """Scheme and host. Django has compared the host with ``ALLOWED_HOSTS``."""
        return f"{self.request.scheme}://{self.request.get_host()}"

    def url(self, name: str, /, **path: str) -> str:
        """The path of one of our routes, under the app's prefix."""
        places = {each: f"__{each}__" for each in path}  # Django would leave some characters of the values unquoted
        address = str(reverse(f"{_namespace(get_resolver(get_urlconf())) or NAMESPACE}:{name}", kwargs=places))
        for each, value in quoted(path).items():
            address = address.replace(places[each], value)
        return address

    def form_token(self) -> Markup:
        """The field for Django's ``CsrfViewMiddleware``."""
        return Markup('<input type="hidden" name="csrfmiddlewaretoken" value="{}">').format(get_token(self.request))


class DjangoBilling:
    """The buyer's pages, and the checks before the app's own views.

    Attributes:
        ledger, accounts: the operations, which take Django's ``connection``.
    """

    def __init__(
        self,
        config: Config,
        *,
        user_key: Callable[[HttpRequest], Key | None] | None = None,
        using: str = "default",
        engine: sa.Engine | None = None,
        layout: str | None = None,
        texts: Texts | None = None,
        templates: jinja2.BaseLoader | None = None,
        home: str = "/",
        contact: str | None = None,
        preview: Preview | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        """Store the settings; neither Django's settings nor the database are read yet.

        Args:
            config: the packs, and the mapping of users and workshops.
            user_key: returns the key of the signed-in user, or None; by default ``key_of(request.user)``.
            using: the name of the database in ``DATABASES``.
            engine: for requests to Stripe; one for ``config.database_url`` unless given.
            layout: a Django template for our pages, with ``title``, ``head`` and ``main`` in its context.
            texts: all texts for the buyer; subclass ``Texts`` to translate.
            templates: a Jinja loader of templates that replace ours.
            home: the address for a buyer who has none to return to.
            contact: an address (``mailto:…``) for buyers whom no pack fits.
            preview: returns the part that the paywall shows blurred.
            headers: to add to or change in the headers of our pages.
        """
        sells = config.stripe_secret_key is not None or importlib.util.find_spec("stripe") is not None
        packs = config.packs if sells else ()
        self.config = config
        self.sells = sells
        self.renderer = Renderer(
            config,
            packs,
            texts or Texts(),
            templates=templates,
            home=home,
            contact=contact,
            frame=None if layout is None else self._framed(layout),
        )
        self.pages = Pages(config, self.renderer)
        self.ledger = self.pages.ledger
        self.accounts = self.pages.accounts
        self._refusals = Refusals(packs, self.renderer, sign_in=_sign_in, checkout=None)
        self._user_key = user_key or self._signed_in_key
        self._using = using
        self._engine = engine
        self._preview = preview
        self._headers = {**buyer_headers(config.stripe_api_base), **(headers or {})}

    @cached_property
    def engine(self) -> sa.Engine:
        """The engine for requests to Stripe. Raises ConfigError if neither it nor an address was given."""
        if self._engine is not None:
            return self._engine
        if self.config.database_url is None:
            raise ConfigError(
                "what asks Stripe runs on connections beside Django's, and the address of the database is not known. "
                "Set DATABASE_URL, or give DjangoBilling an engine=",
                key="database_url",
            )
        return engine_of(self.config.database_url, pool_size=2, pool_pre_ping=True)

    @property
    def connection(self) -> Any:
        """Django's connection of this thread."""
        return connections[self._using]

    def key_of(self, user: Any) -> Key:
        """The key of a user of Django's: the field of the mapping's key column, else the primary key."""
        column = self.config.host.users.key
        fields = (field.attname for field in user._meta.concrete_fields if field.column == column)  # noqa: SLF001 - documented
        key: Key = getattr(user, next(fields, "pk"))
        return key

    def _signed_in_key(self, request: HttpRequest) -> Key | None:
        return self.key_of(request.user) if request.user.is_authenticated else None

    # --- checks before the app's own views ---

    def requires_open_workshop(self, view: View) -> View:
        """A decorator for views with a ``workshop`` in their path: it must be open and the user's, else 402 or 404."""
        return self._guarded(view, lambda request, given: self.require_open(self.signed_in(request), given["workshop"]))

    def requires_credit(self, amount: int) -> Callable[[View], View]:
        """A decorator that requires ``amount`` credits. It does not spend.

        Spend in the view with ``billing.ledger.consume``, which checks again.
        """

        def check(request: HttpRequest, _: Mapping[str, Any]) -> None:
            self.pages.paywall.require_credits(self.connection, self.signed_in(request), amount)

        return lambda view: self._guarded(view, check)

    def signed_in(self, request: HttpRequest) -> Key:
        """The user's key. Raises NotSignedIn."""
        user = self._user_key(request)
        if user is None:
            raise NotSignedIn("nobody is signed in. Sign in, then make the request again")
        return user

    def require_open(self, user: Key, workshop: object) -> Access:
        """The access of a workshop that is open and the user's.

        Raises:
            WorkshopLocked, WorkshopDeleted, UnknownWorkshop, WorkshopNotOwned: it is not open to this user.
        """
        return self.pages.paywall.require_open(self.connection, user, workshop)

    def refusal(self, request: HttpRequest, error: TallystickError, *, roll_back: bool = True) -> HttpResponse:
        """The response to an error that a view of the app has caught.

        After a fault of the database or ours Django's transaction is rolled back, and the page comes without the app's
        layout, which may query the database. With ``roll_back=False`` it is not: the error is of a call that asks
        Stripe, which has transactions of its own.
        """
        found = self._refusals.answer(DjangoRequest(request), error)
        if roll_back and found.status >= SERVER_FAULT and self.connection.in_atomic_block:
            transaction.set_rollback(True, using=self._using)
        return self.response(request, found)

    def context(self, request: HttpRequest) -> dict[str, Any]:
        """A context processor: ``{{ billing.head }}``, ``{{ billing.badge }}`` and ``{{ billing.welcome }}``.

        A template that uses none of them causes no query.
        """
        return {"billing": SimpleLazyObject(lambda: self.fragments(request))}

    def fragments(self, request: HttpRequest) -> Fragments:
        """Parts of pages for the app's own templates, with one query for the signed-in user."""
        user = self._user_key(request)
        try:
            account = None if user is None else self.accounts.get(self.connection, user)
        except UnknownUser:  # signed in, but without a row in the mapped table of users
            account = None
        return Fragments(self.renderer, DjangoRequest(request), account)

    # --- answers ---

    def response(self, request: HttpRequest, found: BuyerPage | Reply) -> HttpResponse:
        """The page or answer of the core, as Django's response."""
        if isinstance(found, BuyerPage):
            preview = None
            if self._preview is not None and found.preview_of is not None:
                preview = self._preview(request, found.preview_of)
            found = self.renderer.answer(DjangoRequest(request), found, preview=preview)
        made = HttpResponse(found.body, status=found.status, content_type=f"{found.media_type}; charset=utf-8")
        return self.with_headers(made, found.headers)

    def with_headers(self, made: Any, own: Mapping[str, str]) -> Any:
        """A response with its own headers, and the others of ours."""
        for name, value in {**self._headers, **own}.items():
            made.headers[name] = value
        return made

    def _guarded(self, view: View, check: Callable[[HttpRequest, Mapping[str, Any]], object]) -> View:
        if iscoroutinefunction(view):
            raise _is_async(view.__qualname__)

        @wraps(view)
        def guarded(request: HttpRequest, *args: Any, **given: Any) -> Any:
            try:
                check(request, given)
            except TallystickError as error:
                return self.refusal(request, error)
            answer = view(request, *args, **given)
            patch_cache_control(answer, private=True)  # a shared cache must not give it to users without the credit
            patch_vary_headers(answer, ("Cookie",))
            return answer

        return guarded

    def _framed(self, layout: str) -> Callable[[DjangoRequest, str, Markup], str]:
        def framed(buyer_request: DjangoRequest, title: str, main: Markup) -> str:
            head = Markup(self.renderer.render(buyer_request, "head.html"))  # noqa: S704 - of our own template
            return str(render_to_string(layout, {"title": title, "head": head, "main": main}, buyer_request.request))

        return framed


class OpenWorkshopMixin:
    """A mixin for class-based views with a ``workshop`` in their path; ``billing`` is the app's, a class attribute."""

    billing: ClassVar[DjangoBilling]

    def __init_subclass__(cls, **given: Any) -> None:
        """Raise TypeError if the view comes first, which would be open to all, or is async."""
        super().__init_subclass__(**given)
        refuse_base_before_mixin(OpenWorkshopMixin, DjangoView, cls)
        if getattr(cls, "view_is_async", False):  # of the view beside it
            raise _is_async(cls.__qualname__)

    def dispatch(self, request: HttpRequest, *args: Any, **given: Any) -> Any:
        """As ``requires_open_workshop``."""
        dispatch: View = super().dispatch  # type: ignore[misc]  # of the view beside it
        return self.billing.requires_open_workshop(dispatch)(request, *args, **given)


def refuse_base_before_mixin(mixin: type, base: type, found: type) -> None:
    """Raise TypeError if ``base`` comes before ``mixin`` in ``found``, so that its methods hide the mixin's."""
    order = found.__mro__
    if base in order and order.index(base) < order.index(mixin):
        raise TypeError(
            f"{found.__qualname__} has {base.__name__} before {mixin.__name__}, which does nothing there. Write it "
            f"first: class {found.__name__}({mixin.__name__}, …)"
        )


def _is_async(name: str) -> TypeError:
    return TypeError(
        f"{name} is async, and Django's connection works in no event loop. Make the view a plain one, or call "
        "billing.require_open in sync_to_async"
    )


@lru_cache(maxsize=10)  # a project may have a urlconf for each of its hosts
def _namespace(resolver: URLResolver) -> str | None:
    """Our namespace, after those of the modules that include our routes, as ``shop:tallystick``; None without us."""
    if NAMESPACE in resolver.namespace_dict or NAMESPACE in resolver.app_dict:
        return NAMESPACE
    inner = ((name, _namespace(included)) for name, (_, included) in resolver.namespace_dict.items())
    return next((f"{name}:{found}" for name, found in inner if found), None)


def _sign_in(quoted: str) -> str:
    return f"{resolve_url(settings.LOGIN_URL)}?{REDIRECT_FIELD_NAME}={quoted}"
