"""The buyer's side of the web for a Django app: paywalled views, pages, purchase, and the admin.

::

    billing = DjangoBilling(Config.load(), layout="billing.html")            # once, in a module of the app's

    urlpatterns = [path("billing/", include(urls(billing))), ...]

    @billing.requires_open_workshop
    def last_step(request, workshop): ...
"""

from tallystick.web.extras import require_django

require_django()

from tallystick.web.django.admin import LedgerAdmin  # noqa: E402
from tallystick.web.django.django_billing import DjangoBilling, OpenWorkshopMixin  # noqa: E402
from tallystick.web.django.urlconf import urls  # noqa: E402

__all__ = ["DjangoBilling", "LedgerAdmin", "OpenWorkshopMixin", "urls"]
