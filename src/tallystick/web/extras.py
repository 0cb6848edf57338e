"""The extras of the web, asked for by name before a module of theirs is missed."""

from __future__ import annotations

import importlib


def require_fastapi() -> None:
    """Raises ModuleNotFoundError with the extra's name; also what Starlette would need only later is looked for."""
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
