"""Checks for the extras of the web, with a clear error before an import fails."""

from __future__ import annotations

import importlib


def require_fastapi() -> None:
    """Raise ModuleNotFoundError with the extra's name; modules that Starlette imports only later are checked too."""
    _require("tallystick.web", "web", "python_multipart", "fastapi", "itsdangerous", "jinja2")


def require_django() -> None:
    """As ``require_fastapi``."""
    _require("tallystick.web.django", "django", "django", "jinja2")


def _require(who: str, extra: str, *modules: str) -> None:
    for module in modules:
        try:
            importlib.import_module(module)
        except ModuleNotFoundError as missing:
            raise ModuleNotFoundError(
                f"{who} needs {missing.name}. Run: pip install 'tallystick[{extra}]'", name=missing.name
            ) from missing
