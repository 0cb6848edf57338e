"""The buyer's side as a router of FastAPI's: the one thing that an app of it needs of us."""

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
    """Everything a buyer meets, as a router to include, and the dependencies for the host's own routes.

    Without Stripe's SDK (``pip install 'tallystick[web]'`` alone) it is a paywall that sells nothing: credits come
    from elsewhere, by ``ledger.grant``.

    Args:
        config: what is sold, and where the host keeps its users and workshops. Its ``checkout_origins`` are the
            app's own addresses as browsers see them: Stripe sends buyers back to one, and their pages may post here.
        engine: the host's engine, sync or async, for psycopg 3.
        current_user: the host's FastAPI dependency that gives the key of who is signed in, or None.
        texts: every word a buyer reads; subclass ``Texts`` to translate.
        templates: where to look for templates before ours, as ``jinja2.FileSystemLoader("templates")``; one that is
            called ``tallystick/layout.html`` there replaces ours.
        sign_in: where a browser without a session is sent; ``{return_to}`` in it becomes the page it asked for,
            quoted. Without it, such a browser gets a 401 page.
        home: where a buyer goes who came from nowhere.
        contact: an address (``mailto:…``) for those whom no pack fits; shown as the last of the packs.
        preview: gives the Markup that the paywall shows blurred. It must hold nothing that a credit buys.
        headers: to add to or change in the headers of our pages, such as a Content-Security-Policy for a layout
            of the host's own.
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
