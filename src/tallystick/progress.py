"""The progress of a long run: what each ``progress`` argument is called with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Progress:
    """A run is ``done`` with so much of ``total`` of its present ``step``; ``total`` is None while nobody knows it."""

    step: str
    done: float = 0
    total: float | None = None


OnProgress = Callable[[Progress], None]


def unheard(_: Progress) -> None:
    """The ``progress`` of a run that nobody watches."""
