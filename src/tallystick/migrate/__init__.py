"""Bringing a live database to this package's shape, and back, without its traffic noticing."""

from tallystick.migrate.blockers import Blocker
from tallystick.migrate.door import downgrade_revision, upgrade_revision
from tallystick.migrate.host import Host, HostColumn, HostTable, examine, other_than_primary, propose
from tallystick.migrate.online import OnlineStep
from tallystick.migrate.plan import Finding, Plan, PlannedRevision, PlannedStatement, Replica, TableSize, plan, sql
from tallystick.migrate.rehearse import Lived, Rehearsal, Traced, refuse_same_database, rehearse, report
from tallystick.migrate.revisions import Revision, revisions
from tallystick.migrate.run import GIVE_UP_AFTER_S, Progress, Receipt, Step, apply, undo
from tallystick.migrate.snippets import TOOLS, snippet
from tallystick.migrate.statements import STALL_BUDGET_MS
from tallystick.migrate.status import Applied, Drift, Status, functions_sql, status
from tallystick.migrate.trackers import Entry, Tracker, concerns, trackers

__all__ = [
    "GIVE_UP_AFTER_S",
    "STALL_BUDGET_MS",
    "TOOLS",
    "Applied",
    "Blocker",
    "Drift",
    "Entry",
    "Finding",
    "Host",
    "HostColumn",
    "HostTable",
    "Lived",
    "OnlineStep",
    "Plan",
    "PlannedRevision",
    "PlannedStatement",
    "Progress",
    "Receipt",
    "Rehearsal",
    "Replica",
    "Revision",
    "Status",
    "Step",
    "TableSize",
    "Traced",
    "Tracker",
    "apply",
    "concerns",
    "downgrade_revision",
    "examine",
    "functions_sql",
    "other_than_primary",
    "plan",
    "propose",
    "refuse_same_database",
    "rehearse",
    "report",
    "revisions",
    "snippet",
    "sql",
    "status",
    "trackers",
    "undo",
    "upgrade_revision",
]
