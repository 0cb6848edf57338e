"""The console's pages. Each state of a list has an address, as a page, as JSON and as CSV."""

from __future__ import annotations

import datetime as dt
import importlib.util
import logging
import re
import secrets
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, TypedDict
from urllib.parse import quote, urlencode

import jinja2
import sqlalchemy as sa
from markupsafe import Markup
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, RedirectResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from tallystick import audit
from tallystick.config import Config
from tallystick.database import Standby, refuse_other_than, transaction, translated, with_known_settings
from tallystick.errors import (
    ConfigError,
    Conflict,
    DatabaseError,
    InvalidArgument,
    Key,
    LedgerError,
    SessionNotYours,
    StripeError,
    TallystickError,
    UnknownUser,
    shown,
)
from tallystick.progress import OnProgress
from tallystick.web.console import export, feed
from tallystick.web.console.access import SignIn
from tallystick.web.console.actions import Actions, Review, operator_of
from tallystick.web.console.background import Background
from tallystick.web.console.guard import Guard
from tallystick.web.console.queries import PAGE_ROWS, Figures, Page, Queries, as_uuid
from tallystick.web.shared import numbers
from tallystick.web.shared.pages import StaticFiles, environment
from tallystick.web.shared.tally import SMALL, tally
from tallystick.web.shared.wording import description_of

if TYPE_CHECKING:
    from tallystick import stripe

log = logging.getLogger("tallystick.console")

AUDIT_UNASKED_ROWS = 2_000_000
"""A ledger up to this size (by estimate) is audited when the overview is opened, which takes a few seconds."""

FIRST_FIGURES_S = 0.3
DELIVERED = {**dict.fromkeys(("granted", "failed", "taken_back", "given_back"), "ran"), "refused": "kept"}
"""The name of the sentence on a delivery that was run again, by its outcome; any other outcome changed nothing."""

REFUSED: Mapping[type, tuple[int, str]] = {
    UnknownUser: (404, "No such user"),
    InvalidArgument: (400, "That cannot be looked up"),
    SessionNotYours: (404, "Stripe has no such session for this user"),
    ConfigError: (409, "The console does not have this endpoint's secret"),
    StripeError: (502, "Stripe did not answer as it should"),
}
"""The status and title of the page about an error; the nearest class above it decides."""
UNANSWERED = 503, "The database did not answer as it should"

FIRST_ROWS = 10
"""The most holds, lots and events on the user's own page; each list also has a page of its own."""

SEARCH_MAX = 200
_TIMED_OUT = "57014"


def console(
    config: Config,
    *,
    engine: sa.Engine,
    sign_in: SignIn,
    address: str = "http://127.0.0.1:8420",
    allow_actions: bool = False,
    replica: sa.Engine | None = None,
) -> ASGIApp:
    """The console as an ASGI application, to be served by itself or mounted in another.

    ``address`` is its scheme and host in the operators' browsers: requests for another host are refused, and with https
    the session's cookie is sent over nothing else. Without ``allow_actions`` no page changes anything, and all reading
    is done in read-only transactions. ``replica`` is an engine of a hot standby, which is then read instead, and each
    page shows its age. If actions are allowed, the pages of one user, of pending purchases and of events are read from
    the primary, so that they show the actions.
    """
    return _Console(config, engine, sign_in, address, allow_actions=allow_actions, replica=replica).app


class _Console:
    def __init__(
        self,
        config: Config,
        engine: sa.Engine,
        sign_in: SignIn,
        address: str,
        *,
        allow_actions: bool,
        replica: sa.Engine | None,
    ) -> None:
        self.config = config
        refuse_other_than(engine, (sa.Engine,), "the console takes an Engine of SQLAlchemy")
        self.queries = Queries(config, replica or engine)
        self.live = Queries(config, engine) if allow_actions and replica else self.queries
        self.has_replica = replica is not None
        engine = with_known_settings(engine)
        self.actions = Actions(config, engine) if allow_actions else None
        self.files = StaticFiles("tallystick.web.console", "tallystick.web.shared")
        self.audit: Background[audit.AuditReport] = Background("audit", self._audit)
        self.figures: Background[Figures] = Background("figures", self._figures, keep_s=60)
        self.stripe: Background[stripe.Reconciliation] | None = None
        if allow_actions and config.stripe_secret_key and importlib.util.find_spec("stripe"):
            from tallystick import stripe  # noqa: PLC0415 - an extra

            self.stripe = Background("stripe", lambda _: stripe.reconcile(engine, config))
            self.confirm = partial(stripe.confirm, engine, config)
            self.redeliver = partial(stripe.redeliver, engine, config)
        self.engine = engine
        self.can_send = allow_actions and importlib.util.find_spec("standardwebhooks") is not None
        self.templates = environment(jinja2.PackageLoader("tallystick.web.console"))
        self.templates.filters.update(
            ago=ago,
            when=when,
            ahead=ahead,
            described=description_of,
            number=numbers.number,
            change=numbers.change,
            count=count,
            utc=utc,
            ms=milliseconds,
            made_by=operator_of,
            linked=linked,
            blocker=blocker,
        )
        self.templates.globals.update(
            tally=lambda rows, **how: Markup(tally(rows, **how)),  # noqa: S704 - the drawing escapes its only text
            small=SMALL,
            money=numbers.money,
            stripe=stripe_address,
            can_ask=self.stripe is not None,
            can_send=self.can_send,
            first_rows=FIRST_ROWS,
            page_rows=PAGE_ROWS,
            database=f"{engine.url.database} on {engine.url.host or 'this machine'}",
            host=config.host,
            actions=self.actions,
        )
        lists = {"/users": self.users, "/user": self.user, "/pending": self.pending, "/audit": self.audit_page}
        lists |= {"/user/holds": self.holds, "/user/lots": self.lots, "/events": self.events}
        lists |= {"/migrations": self.migrations, "/days": self.days}
        routes = [
            Route("/", self.overview),
            *(Route(path, partial(page, form="html")) for path, page in lists.items() if path != "/days"),
            *(
                Route(f"{path}.{form}", partial(page, form=form))
                for path, page in lists.items()
                for form in ("json", "csv")
            ),
            Route("/user/steps.json", self.steps),
            Route("/audit/run", self.run_audit, methods=["POST"]),
            Route("/audit/state.json", self.audit_state),
            Route("/pending/state.json", self.stripe_state),
            Route("/static/{name}", self.static),
        ]
        if self.actions:
            routes += [
                Route("/user/{action:str}", self.review, methods=["GET"]),
                Route("/user/{action:str}", self.act, methods=["POST"]),
            ]
        if self.stripe:
            routes.append(Route("/pending/ask", self.ask_stripe, methods=["POST"]))
        if self.can_send:
            routes.append(Route("/events/send", self.send_again, methods=["POST"]))
        pages = Starlette(
            routes=routes,
            exception_handlers={
                TallystickError: self.refused,
                HTTPException: self.no_page,
                Exception: self.broken,
            },
        )
        self.app = Guard(pages, sign_in=sign_in, address=address, show=self.show)

    # --- pages ---

    def overview(self, request: Request) -> Response:
        queries = self.reading(request)
        queries.require_all_rows()
        state = self.audit.state
        _, rows = queries.sizes()
        if state.at is None and not state.running and rows.number <= AUDIT_UNASKED_ROWS:
            self.audit.start()
            self.audit.wait(FIRST_FIGURES_S)
        figures = self.figures.fresh(wait_s=FIRST_FIGURES_S)
        receipts = queries.receipts()
        return self.show(
            request,
            "overview.html",
            audit=self.audit.state,
            figures=figures,
            size=rows,
            waiting=queries.waiting(),
            delivery_problems=feed.delivery_problems(queries),
            oldest=queries.pending().page(limit=5).rows,
            receipt=receipts[0] if receipts else None,
            refresh=figures.result is None or self.audit.state.running,
        )

    def days(self, request: Request, form: str) -> Response:
        state = self.figures.fresh(wait_s=30)
        if state.result is None:
            raise DatabaseError(state.error or "the figures are not ready yet; ask again in a moment")
        if form == "csv":
            return export.csv("days", state.result.days, operator=_operator(request))
        return export.json(
            {
                "as_of": state.at,
                "days": state.result.days,
                "money": state.result.money,
                "holdings": state.result.holdings,
            }
        )

    def users(self, request: Request, form: str) -> Response:
        queries = self.reading(request)
        search = request.query_params.get("q", "").strip()[:SEARCH_MAX]
        try:
            users = queries.users(search=search)
            if form == "csv":
                return export.csv("users", users.every(), operator=_operator(request))
            page = users.page(**_cursors(request))
        except Conflict as error:
            if error.sqlstate != _TIMED_OUT or form != "html":
                raise
            return self.show(
                request,
                "users.html",
                status=503,
                q=search,
                page=Page([], None, None),
                tallies={},
                size=None,
                too_slow=True,
            )
        if form == "json":
            return self._list(request, page, q=search)
        if search and len(page.rows) == 1 and page.before is None and page.after is None:
            return RedirectResponse(self.at(request, "/user", key=page.rows[0].key), 303)
        size = None if search else queries.sizes()[0]
        tallies = queries.tallies([row.key for row in page.rows])
        return self.show(request, "users.html", q=search, page=page, tallies=tallies, size=size, too_slow=False)

    def user(self, request: Request, form: str) -> Response:
        queries = self.reading(request)
        key = self._key(request)
        user = queries.user(key)
        if form == "csv":
            return export.csv(f"ledger-{key}", queries.every_row(key), operator=_operator(request))
        page = queries.ledger(key).page(**_cursors(request))
        newest = page.before is None
        unfinished = queries.unfinished(key) if newest else []
        holds = queries.holds(key).page() if user.credit_held else Page([], None, None)
        lots = queries.lots(key).page() if user.credit_due_at else Page([], None, None)
        if form == "json":
            values = {"user": user, "unfinished": unfinished, "holds": holds.rows, "lots": lots.rows}
            return self._list(request, page, key=key, **values)
        if newest:
            notches = [*page.rows, *holds.rows, *unfinished]
        else:
            notches = [*queries.ledger(key).page(limit=100).rows, *holds.rows, *queries.unfinished(key)]
        notches = [row for row in notches if row.state != "expired"]  # an expired hold whose row is still pending
        done = as_uuid(request.query_params.get("done", ""))
        events = feed.state(queries)
        shown = [row.id for row in (*page.rows, *holds.rows, *unfinished)]
        return self.show(
            request,
            "user.html",
            user=user,
            page=page,
            unfinished=unfinished,
            holds=holds,
            lots=lots,
            expiring=queries.expiring(key) if lots.rows else None,
            origins=queries.origins(key) if user.credit_sequence else None,
            events=events,
            user_events=feed.of_rows(queries, shown) if events else [],
            notches=notches,
            total=None if newest and page.after is None else user.credit_sequence,
            done=queries.transaction(key, done) if done else None,
        )

    def holds(self, request: Request, form: str) -> Response:
        queries = self.reading(request)
        key = self._key(request)
        user = queries.user(key)
        if form == "csv":
            return export.csv(f"holds-{key}", queries.holds(key).every(), operator=_operator(request))
        page = queries.holds(key).page(**_cursors(request))
        if form == "json":
            return self._list(request, page, key=key)
        return self.show(request, "holds.html", user=user, page=page)

    def lots(self, request: Request, form: str) -> Response:
        queries = self.reading(request)
        key = self._key(request)
        user = queries.user(key)
        if form == "csv":
            return export.csv(f"lots-{key}", queries.lots(key).every(), operator=_operator(request))
        page = queries.lots(key).page(**_cursors(request))
        if form == "json":
            return self._list(request, page, key=key)
        return self.show(request, "lots.html", user=user, page=page, expiring=queries.expiring(key))

    def events(self, request: Request, form: str) -> Response:
        """The events of all users, or with a ``key`` those of one user."""
        queries = self.reading(request)
        user = queries.user(self._key(request)) if "key" in request.query_params else None
        key = None if user is None else user.key
        if form == "csv":
            name = "events" if user is None else f"events-{key}"
            return export.csv(name, feed.every(queries, key), operator=_operator(request), columns=feed.EventRow)
        place = _cursors(request)
        page = feed.latest(queries, **place) if user is None else feed.of_user(queries, user.key, **place)
        if user is not None:
            if form == "json":
                return self._list(request, page, key=key)
            return self.show(request, "events_of_user.html", user=user, page=page, events=feed.state(queries))
        around: dict[str, Any] = {"endpoints": feed.endpoints(queries), "dead_letters": feed.dead_letters(queries)}
        if form == "json":
            return self._list(request, page, **around)
        outcome = request.query_params.get("outcome", "") if self.can_send else ""
        return self.show(request, "events.html", page=page, events=feed.state(queries), outcome=outcome, **around)

    def send_again(self, request: Request) -> Response:
        """Send the dead letter in the form to its endpoint again, and wait for the answer."""
        from tallystick.events import deliver  # noqa: PLC0415 - an extra

        form: Mapping[str, str] = request.state.form
        endpoint, event = form.get("endpoint", ""), form.get("event", "")
        if not (event.isascii() and event.isdigit() and len(event) < 19) or "\0" in endpoint:  # noqa: PLR2004 - a bigint
            raise HTTPException(404)
        try:
            with transaction(self.engine, isolation="AUTOCOMMIT") as conn:  # the endpoint may answer late
                [sent] = deliver.replay(conn, endpoint, [int(event)])
            outcome = "taken" if sent.error is None else "refused"
        except InvalidArgument:  # another operator has sent it, or removed the endpoint
            outcome = "gone"
        log.info(
            "action=send-again operator=%r endpoint=%r event=%s outcome=%s",
            _operator(request),
            endpoint,
            event,
            outcome,
        )
        return RedirectResponse(self.at(request, "/events", outcome=outcome), 303)

    def steps(self, request: Request) -> Response:
        queries = self.reading(request)
        key = self._key(request)
        steps = queries.steps(key)
        return export.json({"at": [int(at.timestamp()) for at, _ in steps], "balance": [after for _, after in steps]})

    def pending(self, request: Request, form: str) -> Response:
        queries = self.reading(request)
        if form == "csv":
            return export.csv("pending", queries.pending().every(), operator=_operator(request))
        page = queries.pending().page(**_cursors(request))
        if form == "json":
            return self._list(request, page)
        stripe_run = self.stripe.state if self.stripe else None
        return self.show(
            request,
            "pending.html",
            page=page,
            waiting=queries.waiting(),
            lost=queries.lost_deliveries(),
            refused=queries.refused_payments(),
            stripe_run=stripe_run,
            outcome=request.query_params.get("outcome", "") if self.stripe else "",
            refresh=stripe_run is not None and stripe_run.running,
        )

    def ask_stripe(self, request: Request) -> Response:
        """Confirm the purchase in the form, run its failed delivery again, or reconcile all."""
        assert self.stripe  # noqa: S101 - there is no route without it
        form: Mapping[str, str] = request.state.form
        event = form.get("event", "")
        if "\0" in event:
            raise HTTPException(404)
        if event:
            outcomes = self.redeliver([event])  # none, if another operator was faster
            log.info("action=redeliver operator=%r event=%r outcomes=%s", _operator(request), event, outcomes)
            outcome = DELIVERED.get(outcomes[0][1], "unchanged") if outcomes else ""
            return RedirectResponse(self.at(request, "/pending", outcome=outcome), 303)
        session = form.get("session", "")
        if session:
            user = self._parsed_key(form.get("key", ""))
            confirmation = self.confirm(user, session)
            log.info(
                "action=ask-stripe operator=%r session=%r outcome=%s", _operator(request), session, confirmation.outcome
            )
            refused = confirmation.outcome == "refused" and not confirmation.granted
            outcome = "refused" if refused else str(confirmation.purchase.status)
            return RedirectResponse(self.at(request, "/pending", outcome=outcome), 303)
        started = self.stripe.start()
        log.info("action=reconcile operator=%r started=%s", _operator(request), started)
        self.stripe.wait(FIRST_FIGURES_S)
        return RedirectResponse(self.at(request, "/pending"), 303)

    def stripe_state(self, _: Request) -> Response:
        return JSONResponse({"running": self.stripe is not None and self.stripe.state.running, "percent": None})

    def audit_page(self, request: Request, form: str) -> Response:
        state = self.audit.state
        findings = state.result.findings if state.result else ()
        if form == "csv":
            return export.csv("findings", findings, operator=_operator(request), columns=audit.Finding)
        if form == "json":
            return export.json({"at": state.at, "running": state.running, "error": state.error, "report": state.result})
        groups: dict[str, list[audit.Finding]] = {}
        for finding in findings:
            groups.setdefault(finding.check, []).append(finding)
        return self.show(
            request,
            "audit.html",
            state=state,
            groups=groups,
            checks=audit.CHECKS,
            refresh=state.running,
        )

    def run_audit(self, request: Request) -> Response:
        started = self.audit.start()
        log.info("action=audit operator=%r started=%s", _operator(request), started)
        self.audit.wait(FIRST_FIGURES_S)
        return RedirectResponse(self.at(request, "/audit"), 303)

    def audit_state(self, _: Request) -> Response:
        state = self.audit.state
        return JSONResponse({"running": state.running, "percent": state.percent, "done": state.done})

    def migrations(self, request: Request, form: str) -> Response:
        queries = self.reading(request)
        receipts = queries.receipts()
        if form == "csv":
            return export.csv("migrations", receipts, operator=_operator(request))
        if form == "json":
            return export.json({"rows": receipts})
        return self.show(request, "migrations.html", receipts=receipts)

    # --- actions: the review by GET, then the action by POST ---

    def review(self, request: Request) -> Response:
        review = self._review(request, request.query_params)
        return self.show(
            request, "action.html", status=422 if review.fault and review.filled_in else 200, review=review
        )

    def act(self, request: Request) -> Response:
        assert self.actions  # noqa: S101 - there is no route without them
        form: Mapping[str, str] = request.state.form
        review = self._review(request, form)
        once = form.get("once", "")
        if not (review.complete and once):
            return self.show(request, "action.html", status=422, review=review)
        try:
            row = self.actions.perform(review, operator=_operator(request), token=once)
        except LedgerError as error:
            refused = self.actions.refused(review, error)
            return self.show(request, "action.html", status=409, review=refused)
        return RedirectResponse(self.at(request, "/user", key=review.user.key, done=row.id), 303)

    def _review(self, request: Request, fields: Mapping[str, str]) -> Review:
        assert self.actions  # noqa: S101
        queries = self.reading(request)
        name = request.path_params["action"]
        if name not in self.actions.names:
            raise HTTPException(404)
        key = self._parsed_key(fields.get("key", ""))
        user = queries.user(key)
        purchase, refunded = None, 0
        if name == "refund":
            wanted = as_uuid(fields.get("purchase", ""))
            purchase = queries.transaction(key, wanted) if wanted else None
            if purchase is None:
                raise HTTPException(404)
            refunded = queries.refunded(key, purchase.id)
        return self.actions.review(name, user, fields, purchase=purchase, refunded=refunded)

    # --- shared by all pages ---

    def reading(self, request: Request) -> Queries:
        """The queries for a request; the age of a standby is stored with the request."""
        page = request.url.path.removeprefix(request.scope.get("root_path", "")).lstrip("/")
        queries = self.live if re.match(r"(user|pending|events)\b", page) else self.queries
        if self.has_replica:
            request.state.age = queries.age()
        return queries

    def show(self, request: Request, template: str, *, status: int = 200, **values: Any) -> Response:
        session = request.state.session
        page = self.templates.get_template(f"console/{template}").render(
            at=partial(self.at, request),
            session=session,
            token=request.state.token,
            # kept in the address of a review, so that the back button makes no second intent
            once=request.query_params.get("once") or secrets.token_urlsafe(16),
            here={name: request.query_params.get(name) for name in ("q", "key", "before", "after")},
            path=request.url.path.removeprefix(request.scope.get("root_path", "")) if session else "",
            age=_age(request),
            **{"refresh": False, **values},
        )
        return HTMLResponse(page, status)

    def at(self, request: Request, path: str, **query: object) -> str:
        """An address of this console, with its mount path."""
        parameters = {name: str(value) for name, value in query.items() if value is not None and value != ""}
        root = quote(str(request.scope.get("root_path", "")))
        return f"{root}{path}" + (f"?{urlencode(parameters)}" if parameters else "")

    def refused(self, request: Request, error: Exception) -> Response:
        assert isinstance(error, TallystickError)  # noqa: S101 - as registered
        status, title = next((REFUSED[kind] for kind in type(error).__mro__ if kind in REFUSED), UNANSWERED)
        if isinstance(error, Conflict) and error.sqlstate == _TIMED_OUT:
            title = "This took too long"
        if status >= 500:  # noqa: PLR2004 - not the request's fault
            log.warning("path=%r %s", request.url.path, error.message)
        if request.url.path.endswith((".json", ".csv")):
            return JSONResponse(
                {"title": title, "status": status, "detail": error.message},
                status,
                media_type="application/problem+json",
            )
        return self.show(request, "refused.html", status=status, title=title, text=error.message)

    def no_page(self, request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)  # noqa: S101 - as registered
        title = "Nothing here" if error.status_code == 404 else error.detail  # noqa: PLR2004
        return self.show(
            request, "refused.html", status=error.status_code, title=title, text="There is no page at this address."
        )

    def broken(self, request: Request, error: Exception) -> Response:
        reference = secrets.token_hex(4)
        log.error("path=%r reference=%s", request.url.path, reference, exc_info=error)
        return self.show(
            request,
            "refused.html",
            status=500,
            title="Something broke",
            text=f"Nothing was changed by this page. Search the console's log for {reference}.",
        )

    def _list(self, request: Request, page: Page[Any], **values: Any) -> Response:
        """A page of a list as JSON, with the addresses of the next pages on either side."""
        path = request.url.path.removeprefix(request.scope.get("root_path", ""))
        query = {name: value for name, value in values.items() if name in ("q", "key")}
        links = {
            name: None if cursor is None else self.at(request, path, **query, **{name: cursor})
            for name, cursor in (("before", page.before), ("after", page.after))
        }
        age = {"standby": standby} if (standby := _age(request)) else {}
        return export.json({**values, "rows": page.rows, **links, **age})

    def _key(self, request: Request) -> Key:
        return self._parsed_key(request.query_params.get("key", ""))

    def _parsed_key(self, text: str) -> Key:
        key = self.queries.key(text)
        if key is None:
            raise UnknownUser(f"no user {shown(text)}: user keys here are {self.config.host.users.key_type}", user=text)
        return key

    def static(self, request: Request) -> Response:
        """A file of ours. Its address has no version, so browsers revalidate it; the files are small."""
        found = self.files.get(request.path_params["name"])
        if found is None:
            raise HTTPException(404)
        return Response(found[0], media_type=found[1], headers={"Cache-Control": "no-cache"})

    def _figures(self, _progress: OnProgress) -> Figures:
        if self.actions:
            self.actions.close_days()
        return self.queries.figures(dt.datetime.now(dt.UTC))

    def _audit(self, progress: OnProgress) -> audit.AuditReport:
        with translated(connecting=True):
            conn = self.queries.engine.connect()
        with conn:  # without a transaction: each range of the audit has one of its own, which is read-only
            reader = conn.execution_options(isolation_level="READ COMMITTED")
            return audit.audit(reader, self.config, progress=progress)


# --- words ---


def count(number: int, noun: str) -> str:
    """A number with its noun: "1 credit", "1,204 credits"."""
    return f"{numbers.number(number)} {noun if abs(number) == 1 else noun + 's'}"


def utc(moment: dt.datetime) -> str:
    """A moment with its full precision."""
    return moment.astimezone(dt.UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def ago(moment: dt.datetime | None) -> Markup:
    """The age of a moment, with the exact time as a tooltip and for machines."""
    if moment is None:
        return Markup("")
    seconds = (dt.datetime.now(dt.UTC) - moment).total_seconds()
    return _time(moment, _ago(seconds, moment))


def when(moment: dt.datetime | None) -> Markup:
    """As ``ago``, with the time below it, since a telephone has no tooltips."""
    if moment is None:
        return Markup("")
    return ago(moment) + _below(moment)


def ahead(moment: dt.datetime) -> Markup:
    """The time until a moment, with the moment itself below it."""
    seconds = (moment - dt.datetime.now(dt.UTC)).total_seconds()
    return _time(moment, _ahead(seconds)) + _below(moment)


def _time(moment: dt.datetime, text: str) -> Markup:
    exact = moment.astimezone(dt.UTC).isoformat()
    return Markup('<time datetime="{}" title="{}">{}</time>').format(exact, utc(moment), text)


def _below(moment: dt.datetime) -> Markup:
    return Markup('<span class="at">{:%Y-%m-%d %H:%M}</span>').format(moment.astimezone(dt.UTC))


def _ahead(seconds: float) -> str:
    for unit, length, up_to in (("s", 1, 60), ("min", 60, 3600), ("h", 3600, 2 * 86400)):
        if seconds < up_to:
            return f"in {int(max(seconds, 0) // length)} {unit}"
    return f"in {int(seconds // 86400):,} d"


def _ago(seconds: float, moment: dt.datetime) -> str:
    if seconds < -60:  # noqa: PLR2004 - a clock that runs ahead
        return utc(moment)
    for unit, length, up_to in (("s", 1, 60), ("min", 60, 3600), ("h", 3600, 86400), ("d", 86400, 30 * 86400)):
        if seconds < up_to:
            number = int(max(seconds, 0) // length)
            return "just now" if unit == "s" and number < 5 else f"{number} {unit} ago"  # noqa: PLR2004
    return moment.astimezone(dt.UTC).strftime("%Y-%m-%d")


def linked(kind: str) -> str:
    """The name of the row that a row of this type refers to."""
    undone = {"refund": "purchase", "grant": "purchase", "reversal": "consumption", "correction": "grant"}
    return undone.get(kind, "row")


def milliseconds(value: float | None) -> str:
    """A duration for people."""
    if value is None:
        return "not measured"
    return f"{value:.1f} ms" if value < 10 else f"{value:,.0f} ms" if value < 10_000 else f"{value / 1000:,.1f} s"  # noqa: PLR2004


def blocker(one: object) -> str:
    """The session that a migration waited for, in a line, from its fields in the receipt."""
    if not isinstance(one, Mapping):
        return str(one)
    return ", ".join(f"{name.replace('_', ' ')}: {value}" for name, value in one.items() if value not in (None, "", []))


def stripe_address(id: str) -> str:
    """The page of Stripe's dashboard for the object of this id, test or live."""
    return "https://dashboard.stripe.com/search?" + urlencode({"query": id})


class _Cursors(TypedDict):
    before: str | None
    after: str | None


def _cursors(request: Request) -> _Cursors:
    before, after = (request.query_params.get(name) or None for name in ("before", "after"))
    return {"before": before, "after": None if before else after}


def _age(request: Request) -> Standby | None:
    """The standby that was read for a request, with its age."""
    return getattr(request.state, "age", None)


def _operator(request: Request) -> str:
    return str(request.state.session.operator)


__all__ = ["console"]
