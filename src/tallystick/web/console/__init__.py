"""The operator's console: the state of the ledger, and the history of each user."""

from tallystick.web.extras import require_fastapi

require_fastapi()

from tallystick.web.console.access import LocalLink, Passwords, SignIn, TrustedProxy, hash_password  # noqa: E402
from tallystick.web.console.routes import console  # noqa: E402

__all__ = ["LocalLink", "Passwords", "SignIn", "TrustedProxy", "console", "hash_password"]
