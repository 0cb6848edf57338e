"""Bringing a live database to this package's shape, and back, without its traffic noticing."""

from tallystick.migrate.blockers import Blocker
from tallystick.migrate.host import Host, HostColumn, HostTable, examine, propose
from tallystick.migrate.online import OnlineStep
from tallystick.migrate.plan import Plan, PlannedRevision, PlannedStatement, TableSize, plan, sql
from tallystick.migrate.revisions import Revision, revisions
from tallystick.migrate.run import GIVE_UP_AFTER_S, Progress, Receipt, Step, apply, undo
from tallystick.migrate.statements import STALL_BUDGET_MS
from tallystick.migrate.status import Applied, Drift, Status, status

__all__ = [
    "GIVE_UP_AFTER_S",
    "STALL_BUDGET_MS",
    "Applied",
    "Blocker",
    "Drift",
    "Host",
    "HostColumn",
    "HostTable",
    "OnlineStep",
    "Plan",
    "PlannedRevision",
    "PlannedStatement",
    "Progress",
    "Receipt",
    "Revision",
    "Status",
    "Step",
    "TableSize",
    "apply",
    "examine",
    "plan",
    "propose",
    "revisions",
    "sql",
    "status",
    "undo",
]
