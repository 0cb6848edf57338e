"""The progress of a long run, the argument of each ``progress`` callback."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Progress:
    """The progress of a run: ``done`` of ``total`` in its present ``step``; ``total`` is None while it is unknown."""

    step: str
    done: float = 0
    total: float | None = None


OnProgress = Callable[[Progress], None]


def ignore_progress(_: Progress) -> None:
    """Ignore the progress, as the default of ``progress`` arguments."""
