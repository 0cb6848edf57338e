"""Bringing a live database to this package's shape, and back, without its traffic noticing."""

from tallystick.migrate.blockers import Blocker
from tallystick.migrate.host import Host, HostColumn, HostTable, examine, propose
from tallystick.migrate.run import OnlineStep, Progress, Receipt, Step, apply, undo

__all__ = [
    "Blocker",
    "Host",
    "HostColumn",
    "HostTable",
    "OnlineStep",
    "Progress",
    "Receipt",
    "Step",
    "apply",
    "examine",
    "propose",
    "undo",
]
