"""Migrations of a live database to this package's schema, and back, without stalling its traffic."""

from tallystick.migrate.checks.plan import (
    Plan,
    PlannedRevision,
    PlannedStatement,
    PlanNote,
    Replica,
    TableSize,
    plan,
    sql,
)
from tallystick.migrate.checks.rehearsal import (
    LedgerCheck,
    Rehearsal,
    Traced,
    refuse_nothing_to_rehearse,
    refuse_same_database,
    rehearse,
)
from tallystick.migrate.checks.status import Applied, Drift, Status, functions_sql, status
from tallystick.migrate.host.blockers import Blocker
from tallystick.migrate.host.candidates import Candidate
from tallystick.migrate.host.own_credits import Difference, OwnCredits, OwnHistory
from tallystick.migrate.host.preflight import Host, examine
from tallystick.migrate.host.proposal import (
    BalancesApart,
    balances_apart,
    has_balances,
    in_place_of_ours,
    other_than_primary,
    people,
    propose,
)
from tallystick.migrate.host.tables import HostColumn, HostTable
from tallystick.migrate.host_tools.alembic_bridge import downgrade_revision, upgrade_revision
from tallystick.migrate.host_tools.snippets import TOOLS, snippet
from tallystick.migrate.host_tools.trackers import Entry, HostTool, Tracker, concerns, tools, trackers
from tallystick.migrate.revisions import Revision, revisions
from tallystick.migrate.runner.adopt import Adopted, adopt, cut_over, look_at_own_credits
from tallystick.migrate.runner.messages import STALL_BUDGET_MAX_MS, STALL_BUDGET_MS
from tallystick.migrate.runner.online import OnlineStep
from tallystick.migrate.runner.run import GIVE_UP_AFTER_S, MigrationProgress, Receipt, apply, undo, undo_command
from tallystick.migrate.runner.widen import Widened, widen_key

__all__ = [
    "GIVE_UP_AFTER_S",
    "STALL_BUDGET_MAX_MS",
    "STALL_BUDGET_MS",
    "TOOLS",
    "Adopted",
    "Applied",
    "BalancesApart",
    "Blocker",
    "Candidate",
    "Difference",
    "Drift",
    "Entry",
    "Host",
    "HostColumn",
    "HostTable",
    "HostTool",
    "LedgerCheck",
    "MigrationProgress",
    "OnlineStep",
    "OwnCredits",
    "OwnHistory",
    "Plan",
    "PlanNote",
    "PlannedRevision",
    "PlannedStatement",
    "Receipt",
    "Rehearsal",
    "Replica",
    "Revision",
    "Status",
    "TableSize",
    "Traced",
    "Tracker",
    "Widened",
    "adopt",
    "apply",
    "balances_apart",
    "concerns",
    "cut_over",
    "downgrade_revision",
    "examine",
    "functions_sql",
    "has_balances",
    "in_place_of_ours",
    "look_at_own_credits",
    "other_than_primary",
    "people",
    "plan",
    "propose",
    "refuse_nothing_to_rehearse",
    "refuse_same_database",
    "rehearse",
    "revisions",
    "snippet",
    "sql",
    "status",
    "tools",
    "trackers",
    "undo",
    "undo_command",
    "upgrade_revision",
    "widen_key",
]
