"""The buyer's side as a FastAPI router: all that an app needs."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping

import jinja2
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncEngine

from tallystick.config import Config
from tallystick.web.buyer import json_api, views
from tallystick.web.buyer.billing import Billing, CurrentUser, Preview
from tallystick.web.buyer.texts import Texts


def router(
    config: Config,
    *,
    engine: sa.Engine | AsyncEngine,
    current_user: CurrentUser,
    texts: Texts | None = None,
    templates: jinja2.BaseLoader | None = None,
    sign_in: str | None = None,
    home: str = "/",
    contact: str | None = None,
    preview: Preview | None = None,
    headers: Mapping[str, str] | None = None,
) -> Billing:
    """A router with all of the buyer's routes, and dependencies for the host's own routes.

    Without Stripe's SDK (``pip install 'tallystick[web]'`` alone) it is a paywall that sells nothing: credits come
    from elsewhere, by ``ledger.grant``.

    Args:
        config: the packs, and the mapping of users and workshops. Its ``checkout_origins`` are the app's own addresses
            in browsers: Stripe sends buyers back to one, and their pages may post here.
        engine: the host's engine, sync or async, for psycopg 3.
        current_user: the host's FastAPI dependency that returns the key of the signed-in user, or None.
        texts: all texts for the buyer; subclass ``Texts`` to translate.
        templates: a loader of templates that replace ours, as ``jinja2.FileSystemLoader("templates")``, such as
            ``tallystick/layout.html``.
        sign_in: the address for a browser without a session; ``{return_to}`` in it becomes the requested page,
            quoted. Without it, such a browser gets a 401 page.
        home: the address for a buyer who has none to return to.
        contact: an address (``mailto:…``) for buyers whom no pack fits; shown as the last of the packs.
        preview: returns the Markup that the paywall shows blurred. It must not contain what a credit buys.
        headers: to add to or change in the headers of our pages, such as a Content-Security-Policy for the host's own
            layout.
    """
    sells = config.stripe_secret_key is not None or importlib.util.find_spec("stripe") is not None
    lifespan = None
    if sells:
        from tallystick.web.buyer import purchase  # noqa: PLC0415 - an extra

        lifespan = purchase.lifespan(engine)
    billing = Billing(
        config,
        sells=sells,
        engine=engine,
        current_user=current_user,
        texts=texts,
        templates=templates,
        sign_in=sign_in,
        home=home,
        contact=contact,
        preview=preview,
        headers=headers,
        lifespan=lifespan,
    )
    json_api.add_to(billing)
    views.add_to(billing)
    if sells:
        purchase.add_to(billing)
    return billing
