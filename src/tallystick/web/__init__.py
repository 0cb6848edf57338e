"""Pages and JSON for a FastAPI or Django app: paywall, purchase, onboarding; and the operator's console.

For FastAPI::

    billing = tallystick.web.router(config, engine=engine, current_user=current_user)
    app.include_router(billing, prefix="/billing")
    app.add_exception_handler(TallystickError, billing.refusal)

    @app.get("/workshops/{workshop}/steps/10", dependencies=[Depends(billing.requires_open_workshop)])
    def last_step(workshop: UUID): ...

For Django, ``tallystick.web.django`` has the same.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from tallystick.web.extras import require_fastapi

if TYPE_CHECKING:  # a Django app has no FastAPI
    from tallystick.web.buyer.billing import Billing
    from tallystick.web.buyer.fragments import Fragments
    from tallystick.web.buyer.paywall import Workshop
    from tallystick.web.buyer.router import router
    from tallystick.web.buyer.texts import Texts

__all__ = ["Billing", "Fragments", "Texts", "Workshop", "router"]

_HOMES = {
    "Billing": "tallystick.web.buyer.billing",
    "Fragments": "tallystick.web.buyer.fragments",
    "Texts": "tallystick.web.buyer.texts",
    "Workshop": "tallystick.web.buyer.paywall",
    "router": "tallystick.web.buyer.router",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    require_fastapi()
    return getattr(importlib.import_module(_HOMES[name]), name)
