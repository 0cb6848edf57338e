"""The operator's console: is everything right, and what happened to this person?"""

from tallystick.web.console.access import LocalLink, Passwords, TrustedProxy, hash_password
from tallystick.web.console.app import console

__all__ = ["LocalLink", "Passwords", "TrustedProxy", "console", "hash_password"]
