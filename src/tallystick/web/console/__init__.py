"""The operator's console: is everything right, and what happened to this person?"""

from tallystick.web.console.access import Door, LocalLink, Passwords, TrustedProxy, hash_password
from tallystick.web.console.routes import console

__all__ = ["Door", "LocalLink", "Passwords", "TrustedProxy", "console", "hash_password"]
