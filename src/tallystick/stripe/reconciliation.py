"""Reconciliation: finds at Stripe the objects that no webhook delivered, and writes their effects.

It goes through eight lists in pages. Each object has the same effect as through a webhook, in a transaction of its
own, so a run may be stopped anywhere and may run beside webhooks or another run. Its position is stored after each
page.
"""

from __future__ import annotations

import datetime as dt
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any
from uuid import UUID

import sqlalchemy as sa

from tallystick.config import Config
from tallystick.database import refuse_hidden_rows, run, server_message, transaction
from tallystick.declared_tables import stripe_checkouts, stripe_events, stripe_reconciliations, stripe_reversals
from tallystick.errors import InvalidArgument, PurchaseNotPending, StripeRefused
from tallystick.ledger import CreditTransaction
from tallystick.progress import Progress, ignore_progress
from tallystick.stripe.checkout import session_of_purchase
from tallystick.stripe.client import Object, list_all
from tallystick.stripe.effects import HOSTS_REFUSALS, PAGE, Effect, Effects, failure_of, in_transaction
from tallystick.stripe.store import DISPUTE_RANK, MONEY_WITH_SHOP, FindingKind, Outcome, StripeFinding, store_of
from tallystick.stripe.top_ups import MODE as TOP_UP
from tallystick.stripe.top_ups import attempts_of, effect_of
from tallystick.stripe.webhooks import HANDLERS, effect_of_event, effect_of_failed

OVERLAP = dt.timedelta(days=3)
"""The time by which a run overlaps the last one: as long as Stripe retries its deliveries."""

SESSIONLESS_MAX = dt.timedelta(days=1)
"""The age at which a pending purchase without a session at Stripe fails: no session lives longer."""

RESUMED_WITHIN = dt.timedelta(days=1)
"""The age up to which an interrupted run is resumed; a new run covers all that an older one would have."""

EVENTS_KEPT = dt.timedelta(days=30)

_DISPUTE_IS_OVER = max(DISPUTE_RANK.values())
_CHANGES = {
    Outcome.GRANTED,
    Outcome.PENDING,
    Outcome.FAILED,
    Outcome.TAKEN_BACK,
    Outcome.GIVEN_BACK,
}


@dataclass(frozen=True, slots=True)
class ReconciliationProgress(Progress):
    """The number of objects examined of one kind; ``changed`` counts over all kinds."""

    changed: int = 0


@dataclass(frozen=True, slots=True)
class Reconciliation:
    """The result of a run. In a dry run ``changes`` are those that a run would make.

    ``changes`` are pairs of Stripe's id and the outcome; ``findings`` are all that a person has not dismissed.
    """

    since: dt.datetime | None
    dry_run: bool
    resumed: bool
    looked_at: Mapping[str, int]
    outcomes: Mapping[str, int]
    changes: tuple[tuple[str, Outcome], ...]
    findings: tuple[StripeFinding, ...]

    @property
    def changed(self) -> bool:
        """True if anything was changed, or in a dry run would be."""
        return bool(self.changes)


def reconcile(
    engine: sa.Engine,
    config: Config,
    *,
    since: dt.datetime | None = None,
    dry_run: bool = False,
    progress: Callable[[ReconciliationProgress], None] = ignore_progress,
) -> Reconciliation:
    """Complete paid purchases, fail expired ones, apply refunds and disputes, and record all else as findings.

    It examines every pending purchase, and Stripe's sessions, refunds, disputes and events created since ``since``:
    by default three days before the last finished run, or everything. Called with the same ``since`` within a day, it
    resumes an interrupted run. ``dry_run`` rolls each transaction back and reports it.

    Raises:
        InvalidArgument: ``since`` has no time zone.
        StripeNotConfigured, StripeRefused: Stripe refuses the key. A refusal of one object is a finding.
        StripeUnavailable, DatabaseError: run it again; it resumes.
        PermissionDenied: row level security hides rows from this role.
    """
    if since is not None and since.tzinfo is None:
        raise InvalidArgument.of("since", since, "pass a time with a time zone")
    return _Reconciling(Effects(engine, config), since, dry_run=dry_run, progress=progress).run()


def dismiss(
    engine: sa.Engine, config: Config, objects: str | Collection[str] | None = None, *, kind: FindingKind | None = None
) -> int:
    """Mark findings as dealt with: about ``objects``, of one ``kind``, or all.

    ``objects`` are Stripe's ids. Returns the number of findings; they stay in the table and are not reported again.

    Raises:
        InvalidArgument: one of ``objects`` is no id.
    """
    about = [objects] if isinstance(objects, str) else objects
    return in_transaction(engine, lambda conn: store_of(config).dismiss(conn, about, kind))


_Step = tuple[str, Callable[[], Effect | None]]
"""An object's id, which is also the position in its list, and a function that requests it and returns its effect."""

_EVERY_OBJECT = (401, 403)  # statuses that refuse the key, and so every object


class _Reconciling:
    def __init__(
        self,
        effects: Effects,
        since: dt.datetime | None,
        *,
        dry_run: bool,
        progress: Callable[[ReconciliationProgress], None],
    ) -> None:
        self.effects = effects
        self.given_since = since
        self.dry_run = dry_run
        self.progress = progress
        self.looked_at: Counter[str] = Counter()
        self.outcomes: Counter[str] = Counter()
        self.changes: list[tuple[str, Outcome]] = []
        self.dry_run_findings: list[StripeFinding] = []
        self.id: int | None = None

    def run(self) -> Reconciliation:
        since, stage, position = self._begin()
        stages: dict[str, Callable[[dt.datetime | None, str | None], Iterator[_Step]]] = {
            "pending": self._pending,
            "top_ups": self._declined_top_ups,
            "sessions": self._sessions,
            "refunds": lambda since, position: self._listed("refunds", since, position),
            "disputes": lambda since, position: self._listed("disputes", since, position),
            "open": self._open,
            "events": self._events,
            "failed": self._failed,
        }
        resumed = stage is not None
        names = list(stages)
        for name in names[names.index(stage) if stage else 0 :]:
            self._update(stage=name, position=position)
            try:
                self._walk(name, stages[name](since, position))
            except StripeRefused as refusal:
                if position is None or refusal.param != "starting_after":
                    raise
                self._walk(name, stages[name](since, None))  # the object at the position is gone
            position = None
            self._report_progress(name)
        self._finish()
        with transaction(self.effects.engine) as conn:
            findings = self.effects.store.findings(conn)
        known = {(one.kind, one.object_id) for one in findings}
        findings += [one for one in self.dry_run_findings if (one.kind, one.object_id) not in known]
        return Reconciliation(
            since=since,
            dry_run=self.dry_run,
            resumed=resumed,
            looked_at=dict(self.looked_at),
            outcomes=dict(self.outcomes),
            changes=tuple(self.changes),
            findings=tuple(findings),
        )

    def _walk(self, stage: str, steps: Iterator[_Step]) -> None:
        for number, (id, prepare) in enumerate(steps, 1):
            try:
                effect = prepare()
            except StripeRefused as refusal:
                if refusal.status in _EVERY_OBJECT:
                    raise
                effect = self._refused(id, refusal.message)
            if effect is not None:
                self._apply(stage, id, effect)
            self.looked_at[stage] += 1
            if number % PAGE == 0:
                self._update(position=id)
                self._report_progress(stage)

    def _refused(self, id: str, message: str) -> Effect:
        """Record as a finding that Stripe or the database refused one object; the others are examined nevertheless."""

        def effect(conn: sa.Connection) -> Outcome:
            self.effects.store.record_finding(conn, FindingKind.REFUSED, id, found=message)
            return Outcome.REFUSED

        return effect

    # --- the lists ---

    def _pending(self, _since: dt.datetime | None, position: str | None) -> Iterator[_Step]:
        """All pending purchases of this database, oldest first."""
        row, sold = self.effects.store.schema.credit_transactions.c, stripe_checkouts.c
        purchases = self.effects.store.schema.credit_transactions
        old = sa.func.now() - SESSIONLESS_MAX
        after = UUID(position) if position else UUID(int=0)
        while True:
            statement = (
                sa.select(
                    sold.request["customer"].astext,
                    sold.request["mode"].astext,
                    row.created_at < old,
                    *self.effects.store.schema.row,
                )
                .join_from(purchases, stripe_checkouts, sold.purchase_id == row.id, isouter=True)
                .where(row.status == "pending", row.held.is_(None), row.id > after)
                .order_by(row.id)
                .limit(PAGE)
            )
            page = self._read(statement)
            for customer, mode, is_old, *columns in page:
                purchase = CreditTransaction(*columns)
                effect_of = self._unpaid_top_up if mode == TOP_UP else self._pending_purchase
                yield str(purchase.id), partial(effect_of, purchase, customer, is_old=is_old)
                after = purchase.id
            if len(page) < PAGE:
                return

    def _pending_purchase(self, purchase: CreditTransaction, customer: str | None, *, is_old: bool) -> Effect | None:
        """The effect of a pending purchase's session at Stripe; a purchase fails only after this request."""
        store = self.effects.store
        known = purchase.stripe_session_id
        if known is not None:
            session = self.effects.session_now(known)
        elif customer is not None:
            session = session_of_purchase(self.effects, purchase, customer)
        else:
            return None  # not sold by checkout: left to the host
        if session is not None:
            return self.effects.session(session, failed=failure_of(session))

        def missing(conn: sa.Connection) -> Outcome:
            if known is not None:
                store.record_finding(
                    conn, FindingKind.SESSION_MISSING, known, purchase=purchase.id, found="not at Stripe"
                )
                return Outcome.UNKNOWN
            return self._give_up(conn, purchase, "Stripe has no session for it")

        return missing if is_old or known is not None else None

    def _declined_top_ups(self, _since: dt.datetime | None, _position: str | None) -> Iterator[_Step]:
        """Failed top-ups: a later attempt may have been paid, and its answer lost."""
        purchases, sold = self.effects.store.schema.credit_transactions, stripe_checkouts.c
        statement = (
            sa.select(sold.request["customer"].astext, *self.effects.store.schema.row)
            .join_from(stripe_checkouts, purchases, sold.purchase_id == purchases.c.id)
            .where(sold.request["mode"].astext == TOP_UP, purchases.c.status == "failed")
            .where(sold.created_at > sa.func.now() - EVENTS_KEPT)
        )
        for customer, *columns in self._read(statement):
            purchase = CreditTransaction(*columns)
            yield str(purchase.id), partial(self._unpaid_top_up, purchase, customer, is_old=False)

    def _unpaid_top_up(self, purchase: CreditTransaction, customer: str, *, is_old: bool) -> Effect | None:
        """The effect of a top-up whose answer was lost."""
        attempts = attempts_of(self.effects, purchase, customer)
        under_way = any(one["status"] == "processing" for one in attempts)
        given_up = partial(self._give_up, purchase=purchase, reason="Stripe has no payment for it")
        return effect_of(self.effects, purchase, attempts) or (given_up if is_old and not under_way else None)

    def _give_up(self, conn: sa.Connection, purchase: CreditTransaction, reason: str) -> Outcome:
        store = self.effects.store

        def fail() -> Outcome:
            now = store.purchase(conn, id=purchase.id) or purchase  # the user's key may have changed
            try:
                failed = store.ledger.fail_purchase(conn, now.user_id, purchase=now.id, reason=reason)
            except PurchaseNotPending:  # completed meanwhile
                return Outcome.UNCHANGED
            return Outcome.UNCHANGED if failed.replayed else Outcome.FAILED

        return self.effects.recording_refusal(conn, str(purchase.id), fail)

    def _sessions(self, since: dt.datetime | None, position: str | None) -> Iterator[_Step]:
        query: Any = {**_window(since, position), "status": "complete", "expand": ["data.payment_intent"]}
        for one in list_all(lambda: self.effects.client.v1.checkout.sessions.list(query)):
            session = one.to_dict()
            yield session["id"], partial(self.effects.session, session, failed=failure_of(session))

    def _listed(self, kind: str, since: dt.datetime | None, position: str | None) -> Iterator[_Step]:
        query: Any = _window(since, position)
        service: Any = getattr(self.effects.client.v1, kind)
        for one in list_all(lambda: service.list(query)):
            yield one.id, partial(self.effects.reversal, one.to_dict())

    def _open(self, _since: dt.datetime | None, position: str | None) -> Iterator[_Step]:
        """Refunds and disputes of any age that are not decided yet, or whose credits could not be computed."""
        row, ledger = stripe_reversals.c, self.effects.store.schema.credit_transactions.c
        over = sa.case((row.kind == "dispute", _DISPUTE_IS_OVER), else_=1)
        of_purchase = sa.exists().where(ledger.stripe_payment_intent_id == row.stripe_payment_intent_id)
        unsettled = sa.and_(row.applied == "none", row.status.not_in(MONEY_WITH_SHOP), of_purchase)
        statement = sa.select(row.id, row.kind).where(sa.or_(row.status_rank < over, unsettled))
        statement = statement.where(row.id > (position or "")).order_by(row.id)
        for id, kind in self._read(statement):
            yield id, partial(self._reversal_now, kind, id)

    def _reversal_now(self, kind: str, id: str) -> Effect | None:
        found = self.effects.retrieve({"object": kind, "id": id})
        return None if found is None else self.effects.reversal(found)

    def _events(self, since: dt.datetime | None, position: str | None) -> Iterator[_Step]:
        """Events that were never received. Stripe keeps them for thirty days; only paid invoices need them."""
        oldest = dt.datetime.now(dt.UTC) - EVENTS_KEPT
        query: Any = {**_window(max(since or oldest, oldest), position), "types": sorted(HANDLERS)}
        for event in list_all(lambda: self.effects.client.v1.events.list(query)):
            yield event.id, partial(self._missed_event, event.to_dict())

    def _missed_event(self, event: Object) -> Effect | None:
        seen = sa.select(stripe_events.c.id).where(stripe_events.c.id == event["id"])
        return None if self._read(seen) else effect_of_event(self.effects, event)

    def _failed(self, _since: dt.datetime | None, _position: str | None) -> Iterator[_Step]:
        """Failed deliveries."""
        for one in in_transaction(self.effects.engine, self.effects.store.failures):
            yield one.event_id, partial(effect_of_failed, self.effects, one)

    def _read(self, statement: sa.Select[Any]) -> Sequence[Any]:
        return in_transaction(self.effects.engine, lambda conn: run(conn, statement, {}).all())

    # --- one step, and the stored position ---

    def _apply(self, stage: str, id: str, effect: Effect) -> None:
        try:
            outcome = self._write(id, effect)
        except HOSTS_REFUSALS as error:
            outcome = self._write(id, self._refused(id, server_message(error)))
        if outcome is Outcome.FOREIGN and stage == "events":
            return  # counted with its session, refund or dispute
        self.outcomes[str(outcome)] += 1
        if outcome in _CHANGES:
            self.changes.append((id, outcome))

    def _write(self, id: str, effect: Effect) -> Outcome:
        if not self.dry_run:
            return in_transaction(self.effects.engine, effect)
        with transaction(self.effects.engine, keep=False) as conn:
            outcome = effect(conn)
            self.dry_run_findings += [one for one in self.effects.store.findings(conn) if one.object_id == id]
        return outcome

    def _begin(self) -> tuple[dt.datetime | None, str | None, str | None]:
        """Resume an interrupted run, or start one."""
        row = stripe_reconciliations.c

        schema = self.effects.store.schema
        tables = schema.users, schema.credit_transactions, stripe_checkouts, stripe_events, stripe_reversals

        def work(conn: sa.Connection) -> tuple[dt.datetime | None, str | None, str | None]:
            refuse_hidden_rows(conn, [(table.schema or "", table.name) for table in tables], "what differs from Stripe")
            interrupted = sa.and_(row.finished_at.is_(None), row.started_at > sa.func.now() - RESUMED_WITHIN)
            newest = sa.select(row.id, row.since, row.stage, row.position, interrupted.label("interrupted"))
            last = run(conn, newest.order_by(row.id.desc()).limit(1), {}).one_or_none()
            wanted = self.given_since
            if last is not None and last.interrupted and wanted in (None, last.since) and not self.dry_run:
                self.id = last.id
                return last.since, last.stage, last.position
            finished = sa.select(sa.func.max(row.started_at)).where(row.finished_at.is_not(None))
            before = run(conn, finished, {}).scalar_one()
            since = wanted or (before - OVERLAP if before else None)
            if not self.dry_run:
                new = sa.insert(stripe_reconciliations).values(since=since, stage="pending").returning(row.id)
                self.id = run(conn, new, {}).scalar_one()
            return since, None, None

        return in_transaction(self.effects.engine, work)

    def _report_progress(self, stage: str) -> None:
        self.progress(ReconciliationProgress(stage, self.looked_at[stage], changed=len(self.changes)))

    def _finish(self) -> None:
        report = {"looked_at": dict(self.looked_at), "outcomes": dict(self.outcomes)}
        self._update(finished_at=sa.func.now(), report=report, position=None)

    def _update(self, **values: Any) -> None:
        if self.id is not None:
            update = sa.update(stripe_reconciliations).where(stripe_reconciliations.c.id == self.id).values(**values)
            in_transaction(self.effects.engine, lambda conn: run(conn, update, {}))


def _window(since: dt.datetime | None, position: str | None) -> dict[str, Any]:
    window: dict[str, Any] = {"limit": PAGE}
    if since is not None:
        window["created"] = {"gte": int(since.timestamp())}
    if position is not None:
        window["starting_after"] = position
    return window
