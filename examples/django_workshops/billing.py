"""Tallystick in this app: one object, which the URLs, the views, the templates and the admin use."""

from __future__ import annotations

from django.conf import settings
from django.http import HttpRequest
from django.utils.html import format_html, format_html_join
from django.utils.safestring import SafeString

from tallystick.web.buyer.texts import Texts
from tallystick.web.django import DjangoBilling
from workshops.steps import FREE, STEPS


class Words(Texts):
    """Texts of this app's own."""

    pricing_lead = f"One credit unlocks all {len(STEPS)} steps of a workshop, for good."
    welcome = (
        f"Each workshop has {len(STEPS)} steps. The first {FREE} are free.",
        "One credit unlocks the rest of a workshop, for good.",
    )


def preview(_request: HttpRequest, _workshop: object) -> SafeString:
    """The text that is blurred behind the lock: filler, since a browser can show everything that it gets."""
    lines = ("Step by step from here", *("Every step ends with something you can show to somebody. " * 3,) * 4)
    return format_html('<div class="filler">{}</div>', format_html_join("", "<p>{}</p>", ((line,) for line in lines)))


billing = DjangoBilling(
    settings.TALLYSTICK, layout="billing.html", texts=Words(), contact="mailto:hello@example.com", preview=preview
)
in_templates = billing.context  # for settings, which name a context processor by a module's attribute
