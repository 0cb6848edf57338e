"""The operator's console: is everything right, and what happened to this person?"""

from tallystick.web.console.access import LocalLink, Passwords, SignIn, TrustedProxy, hash_password
from tallystick.web.console.routes import console

__all__ = ["LocalLink", "Passwords", "SignIn", "TrustedProxy", "console", "hash_password"]
