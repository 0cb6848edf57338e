"""With 100,000 users: no page reads a big table from end to end, and people find their way in a real browser."""

from __future__ import annotations

import datetime as dt
import re
import socket
import threading
from pathlib import Path
from urllib.parse import urljoin

import axe_playwright_python
import pytest
import sqlalchemy as sa
import uvicorn
from playwright.sync_api import expect

from tallystick.web.console import LocalLink, Passwords, console, feed, hash_password
from tallystick.web.console.queries import Queries
from worlds import dispose_when_idle

AXE = Path(axe_playwright_python.__file__).with_name("axe.min.js")
PATIENCE_MS = 30_000
ALL = "100,000"
BIG = {"users", "credit_transactions", "events", "lots"}


# --- the database's side ---


def scans(node):
    """The sequential scans in a plan, with the table of each."""
    if node["Node Type"].endswith("Seq Scan"):
        yield node["Relation Name"]
    for child in node.get("Plans", ()):
        yield from scans(child)


@pytest.fixture
def plans(large_world):
    """``plans(read)``: the statements that ``read(queries)`` makes on the large database, each with its scans."""

    def explain(read):
        queries, made = Queries(large_world.config, large_world.engine), []

        def note(conn, cursor, statement, parameters, context, executemany):
            if statement.lstrip().startswith("SELECT") and "set_config" not in statement:
                made.append((statement, parameters))

        sa.event.listen(large_world.engine, "before_cursor_execute", note)
        try:
            read(queries)
        finally:
            sa.event.remove(large_world.engine, "before_cursor_execute", note)
        assert made
        with large_world.engine.connect() as conn:
            found = []
            for statement, parameters in made:
                plan = conn.exec_driver_sql(f"EXPLAIN (FORMAT JSON) {statement}", parameters).scalar_one()
                found.append((statement, set(scans(plan[0]["Plan"])) & BIG))
        return found

    return explain


def first_key(queries):
    return queries.users().page(limit=1).rows[0].key


@pytest.mark.parametrize(
    "read",
    [
        lambda queries: queries.sizes(),
        lambda queries: queries.users().page(),
        lambda queries: queries.users().page(after=str(first_key(queries))),
        lambda queries: queries.users().page(before="ff000000-0000-0000-0000-000000000000"),
        lambda queries: queries.tallies([row.key for row in queries.users().page().rows]),
        lambda queries: queries.users(search=str(first_key(queries))).page(),
        lambda queries: queries.users(search="person77777@example.com").page(),
        lambda queries: queries.users(search="cs_test_1 cus_1").page(),
        lambda queries: queries.user(first_key(queries)),
        lambda queries: queries.ledger(first_key(queries)).page(),
        lambda queries: queries.ledger(first_key(queries)).page(after="2"),
        lambda queries: queries.unfinished(first_key(queries)),
        lambda queries: queries.steps(first_key(queries)),
        lambda queries: queries.pending().page(),
        lambda queries: queries.waiting(),
        lambda queries: queries.holds(first_key(queries)).page(),
        lambda queries: queries.lots(first_key(queries)).page(),
        lambda queries: queries.expiring(first_key(queries)),
        lambda queries: queries.origins(first_key(queries)),
        feed.latest,
        lambda queries: feed.latest(queries, after="1-150000"),
        lambda queries: feed.of_user(queries, first_key(queries)),
        feed.endpoints,
        feed.dead_letters,
        feed.delivery_problems,
    ],
)
def test_pages_read_big_tables_through_indexes_only(plans, read):
    for statement, scanned in plans(read):
        if "ILIKE" not in statement.upper() and "lower(" not in statement:  # a part of an address
            assert not scanned, statement


def test_the_rows_of_a_day_are_found_by_an_index(plans):
    def read(queries):
        with queries.reading() as conn:
            conn.execute(queries._by_day([dt.datetime.now(dt.UTC).date()])).all()

    [(statement, scanned)] = plans(read)
    assert "GROUP BY" in statement
    assert not scanned


def test_large_sizes_are_estimates_that_are_near(large_world):
    users, rows = Queries(large_world.config, large_world.engine).sizes()
    assert (users.about, users.number) == ("about ", pytest.approx(100_000, rel=0.05))
    assert (rows.about, rows.number) == ("about ", pytest.approx(300_000, rel=0.05))


# --- the browser's side ---


class Served:
    """The console behind uvicorn on a free port, as ``tallystick serve`` runs it."""

    def __init__(self, world, *, passwords=None, **options):
        self.listening = socket.create_server(("127.0.0.1", 0))
        self.address = f"http://127.0.0.1:{self.listening.getsockname()[1]}"
        self.link = LocalLink()
        self.engine = sa.create_engine(world.url)
        sign_in = self.link if passwords is None else Passwords(passwords)
        app = console(world.config, engine=self.engine, sign_in=sign_in, address=self.address, **options)
        settings = uvicorn.Config(
            app,
            proxy_headers=False,
            access_log=False,
            log_level="critical",
            lifespan="off",
            timeout_graceful_shutdown=5,  # a browser may keep a connection open for ever
        )
        self.server = uvicorn.Server(settings)
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [self.listening]}, daemon=True)

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.server.should_exit = self.server.force_exit = True
        self.thread.join(timeout=20)
        self.listening.close()
        dispose_when_idle(self.engine)

    @property
    def sign_in(self):
        return f"{self.address}/enter?token={self.link.token}"


def is_fault(message):
    """Refused by the Content-Security-Policy, an uncaught error, …; a refusal's status is the test's own matter."""
    return message.type == "error" and not message.text.startswith("Failed to load resource")


@pytest.fixture
def visit(browser):
    """``visit(served, **how) -> Page``; whatever the page's console complains of fails the test."""
    contexts, complaints = [], []

    def open_page(at, **how):
        contexts.append(browser.new_context(**how))
        page = contexts[-1].new_page()
        page.set_default_timeout(PATIENCE_MS)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("console", lambda message: complaints.append(message.text) if is_fault(message) else None)
        page.goto(at.sign_in)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert not complaints


expect.set_options(timeout=PATIENCE_MS)


@pytest.fixture(scope="module")
def big(large_world):
    with Served(large_world) as running:
        yield running
    running.link._used = False


@pytest.fixture
def again(big):
    """The large database's console, with its link good for one more visit."""
    big.link._used = False
    return big


@pytest.mark.one_server  # it is about what a browser shows
def test_from_the_overview_to_a_person_in_two_steps(again, visit):
    page = visit(again)
    expect(page.get_by_role("heading", level=1)).to_contain_text(f"All {ALL} balances agree with their ledgers")
    chart = page.locator("[data-bars] canvas")
    expect(chart).to_be_visible()
    page.locator("[data-bars] .u-over").hover()
    expect(page.locator(".u-legend")).to_contain_text(re.compile(r"Sold.*\d"))

    page.get_by_text("As a table").click()
    expect(page.get_by_role("table").first.get_by_role("row")).to_have_count(31)

    page.get_by_role("link", name="Users").click()
    expect(page.get_by_role("searchbox")).to_be_focused()
    page.keyboard.type("person77777@example.com")
    page.keyboard.press("Enter")
    expect(page.get_by_role("heading", level=1)).to_have_text("person77777@example.com")
    expect(page.get_by_role("img", name="3 entries, balance 3, no gaps")).to_be_visible()
    expect(page.locator("[data-steps] canvas")).to_be_visible()


@pytest.mark.one_server  # it is about what a browser shows
def test_pages_of_users_older_and_newer(again, visit):
    page = visit(again)
    page.goto(f"{again.address}/users")
    expect(page.get_by_role("heading", level=1)).to_contain_text("about 100,")
    first = page.get_by_role("table").get_by_role("link").first.inner_text()
    page.get_by_role("link", name="Next").click()
    page.wait_for_url("**/users?after=*")
    assert page.get_by_role("table").get_by_role("link").first.inner_text() != first
    page.get_by_role("link", name="Previous").click()
    page.wait_for_url("**/users?before=*")
    assert page.get_by_role("table").get_by_role("link").first.inner_text() == first


@pytest.mark.one_server  # it is about what a browser shows
def test_a_check_of_all_balances_from_the_page(again, visit):
    page = visit(again)
    page.goto(f"{again.address}/audit")
    page.get_by_role("button").filter(has_text="Check").click()
    expect(page.get_by_role("heading", level=1)).to_contain_text(f"All {ALL} balances agree")
    expect(page.get_by_text("300,000 ledger rows")).to_be_visible()


@pytest.mark.one_server  # it is about what a browser shows
def test_without_javascript_everything_is_there(again, visit):
    page = visit(again, java_script_enabled=False)
    expect(page.get_by_role("heading", level=1)).to_contain_text("balances agree")
    page.get_by_text("As a table").click()
    expect(page.get_by_role("table").first).to_be_visible()
    page.get_by_role("link", name="Users").click()
    page.get_by_role("searchbox").fill("person1@example.com")
    page.get_by_role("button", name="Search").click()
    expect(page.get_by_role("img", name="3 entries, balance 3, no gaps")).to_be_visible()
    page.get_by_role("link", name="All events of this user").click()
    expect(page.get_by_role("row").filter(has_text="purchase.completed")).to_have_count(1)
    page.get_by_role("link", name="Events").click()
    page.get_by_role("link", name="Older").click()
    expect(page.get_by_role("table").last.get_by_role("row")).to_have_count(51)
    page.get_by_role("link", name="Audit").click()
    page.get_by_role("button", name=re.compile("Check")).click()
    expect(page.get_by_role("heading", level=1)).to_contain_text("balances agree")
    page.get_by_role("button", name="Log out").click()
    expect(page.get_by_role("heading", level=1)).to_have_text("Not logged in")


@pytest.mark.one_server  # it is about what a browser shows
def test_on_a_phone_nothing_runs_off_the_side(again, visit, large_world):
    page = visit(again, viewport={"width": 360, "height": 740})
    with large_world.engine.connect() as conn:
        user = conn.scalar(sa.text("SELECT id FROM users LIMIT 1"))
    for path in ("/", "/users", f"/user?key={user}", "/pending", "/events", "/audit", "/migrations"):
        page.goto(again.address + path)
        assert page.evaluate("document.documentElement.scrollWidth") <= 360, path
        # whether or not the tabs have room beside each other, the one of this page is seen
        expect(page.get_by_role("navigation", name="Console").locator("[aria-current]")).to_be_in_viewport(ratio=0.95)


@pytest.mark.one_server  # it is about what a browser shows
@pytest.mark.parametrize("width", [320, 390])
def test_on_a_phone_a_row_is_a_block_and_no_table_scrolls(shop, visit, width):
    world, user = shop
    with Served(world, allow_actions=True) as running:
        page = visit(running, viewport={"width": width, "height": 800})
        for path in (f"/user?key={user}", "/users", "/pending", *lists_of(user)):
            page.goto(running.address + path)
            for table in page.get_by_role("region").filter(has=page.get_by_role("table")).all():
                wide, seen = table.evaluate("one => [one.scrollWidth, one.clientWidth]")
                assert wide <= seen, (path, table.get_attribute("aria-label"))
            heights = page.locator("tbody tr").evaluate_all("rows => rows.map(row => row.offsetHeight)")
            assert heights
            assert max(heights) < 260, (path, heights)
        page.goto(f"{running.address}/user?key={user}")
        grant, ledger = (page.locator(one).bounding_box()["y"] for one in ("text=Grant credits", "#ledger"))
        assert grant < 400 < ledger
        row = page.get_by_role("region", name="Ledger").get_by_role("row").filter(has_text="refund").first
        expect(row).to_be_visible()


def lists_of(user):
    """The pages of what a user has of each kind, and of events."""
    return ("/events", *(f"{path}?key={user}" for path in ("/user/holds", "/user/lots", "/events")))


@pytest.fixture
def shop(world, hook):
    """A person with some of everything, and events of which one is a dead letter and one waits."""
    user = world.user(credits=5)
    hook.add(world, "crm", kinds=["purchase.completed"])
    with world.engine.begin() as conn:
        world.ledger.consume(conn, user, workshop=world_workshop(conn, world, user), key="1")
        bought = world.buy(conn, user, 3)
        world.ledger.refund(conn, user, bought.id, credits=1, key="2")
        soon = dt.datetime.now(dt.UTC) + dt.timedelta(days=3)
        world.ledger.grant(conn, user, credits=2, key="3", description="Spring promotion", expires_at=soon)
        world.ledger.hold(conn, user, credits=1, key="4", description="Answer 18", capture_limit=3)
        world.ledger.release(conn, user, world.ledger.hold(conn, user, credits=1, key="5").id)
        pending = world.ledger.start_purchase(conn, user, credits=5, description="Purchased Five Flights")
        world.ledger.attach_session(conn, user, pending.id, stripe_session_id="cs_test_1")
        failed = world.ledger.start_purchase(conn, user, credits=5, description="Purchased Five Flights")
        world.ledger.fail_purchase(conn, user, purchase=failed.id, reason="expired")
        conn.execute(sa.text("ALTER TABLE credit_transactions DISABLE TRIGGER tallystick_append_only"))
        conn.execute(sa.text("DELETE FROM credit_transactions WHERE sequence = 2"))
        conn.execute(sa.text("ALTER TABLE credit_transactions ENABLE TRIGGER tallystick_append_only"))
    hook.deliver(world)
    hook.add(world, "mail", kinds=["consumption.held"], from_oldest=True)
    hook.deliver(world, attempts=2)  # the second is an hour away
    return world, user


def world_workshop(conn, world, user):
    workshop = world.key("uuid")
    conn.execute(sa.insert(world.schema.workshops).values(key=workshop, owner=user, title="Mobile App Discovery"))
    return workshop


@pytest.mark.one_server  # it is about what a browser shows
@pytest.mark.parametrize(
    "how", [{"color_scheme": "light"}, {"color_scheme": "dark", "viewport": {"width": 390, "height": 800}}]
)
def test_no_accessibility_violation(shop, visit, how):
    world, user = shop
    with Served(world, allow_actions=True) as running:
        page = visit(running, **how)
        for path in (
            "/", "/users", "/users?q=nobody-here", f"/user?key={user}", "/pending", "/audit", "/migrations",
            *lists_of(user),
            f"/user/grant?key={user}", f"/user/grant?key={user}&credits=x",
            f"/user/grant?key={user}&credits=2&reason=x",
        ):  # fmt: skip
            page.goto(running.address + path)
            if path == "/audit":
                expect(page.locator("progress")).to_have_count(0)
            page.evaluate(AXE.read_text(encoding="utf-8"))
            found = page.evaluate("axe.run({resultTypes: ['violations']}).then(done => done.violations)")
            assert [(one["id"], [n["html"] for n in one["nodes"]]) for one in found] == [], path


@pytest.mark.one_server  # it is about what a browser shows
def test_a_double_click_grants_once(shop, visit):
    world, user = shop
    with world.engine.connect() as conn:
        before = world.ledger.balance(conn, user)
    with world.engine.begin() as conn:  # the gap makes the ledger refuse; this one is whole
        whole = world.user(credits=1)
    with Served(world, allow_actions=True) as running:
        page = visit(running)
        page.goto(f"{running.address}/user?key={whole}")
        page.get_by_role("link", name="Grant credits").click()
        page.get_by_label("Credits").fill("3")
        page.get_by_label("Reason").fill("The demo failed")
        page.keyboard.press("Enter")
        expect(page.get_by_text("Balance: 1 → 4")).to_be_visible()
        page.get_by_role("button", name="Grant 3 credits").dblclick()
        expect(page.get_by_role("status")).to_contain_text("3 credits granted. Balance after: 4.")
        page.go_back()
        page.get_by_role("button", name="Grant 3 credits").click()
        expect(page.get_by_role("status")).to_contain_text("Balance after: 4.")
    with world.engine.connect() as conn:
        assert world.ledger.balance(conn, whole) == 4
        assert world.ledger.balance(conn, user) == before


@pytest.mark.one_server  # it is about what a browser shows
def test_a_hold_is_on_the_page_until_it_ends(world, visit):
    user, ledger = world.user(credits=9), world.ledger
    with world.engine.begin() as conn:
        answer = ledger.hold(conn, user, credits=3, key="1", description="Answer 18", capture_limit=5)
        ledger.hold(conn, user, credits=2, key="2", description="Answer 19")
        ledger.hold(
            conn, user, credits=1, key="3", workshop=world_workshop(conn, world, user), expires_in=dt.timedelta(days=3)
        )
    with Served(world) as running:
        page = visit(running, viewport={"width": 390, "height": 800}, java_script_enabled=False)
        page.goto(f"{running.address}/user?key={user}")
        page.get_by_role("link", name="6 held").click()
        rows = page.get_by_role("region", name="Holds").locator("tbody tr")
        expect(rows).to_have_count(3)
        expect(rows.nth(0)).to_contain_text("Workshop: Mobile App Discovery")
        expect(rows.nth(2)).to_contain_text(re.compile(r"in 1\d min.*3.*5.*Answer 18", re.DOTALL))

        with world.engine.begin() as conn:
            ledger.capture(conn, user, answer.id, credits=4)
        page.reload()
        expect(rows).to_have_count(2)
        expect(page.locator(".balance")).to_contain_text("3 held, 2 can be spent")

        world.pass_time(days=1)
        page.reload()
        expect(rows).to_have_count(1)
        expect(page.get_by_role("region", name="Not completed")).to_contain_text("expired")
        with world.engine.begin() as conn:
            ledger.release(conn, user, ledger.hold(conn, user, credits=1, key="4").id)
        page.reload()
        expect(page.get_by_role("region", name="Not completed")).to_contain_text("released")


@pytest.mark.one_server  # it is about what a browser shows
def test_a_page_that_adds_up_is_not_exchanged_under_a_pressed_link(shop, visit):
    world, _ = shop
    loads = []

    def still_adding(route):
        loads.append(route.request.url)
        answer = route.fetch()
        route.fulfill(
            response=answer, body=answer.text().replace("</main>", "<progress data-reload></progress></main>")
        )

    with Served(world) as running:
        page = visit(running)
        page.route(f"{running.address}/", still_adding)
        page.goto(f"{running.address}/")
        page.keyboard.press("Tab")
        page.keyboard.press("Enter")
        expect(page).to_have_url(f"{running.address}/#main")  # "Skip to content"
        with page.expect_request(f"{running.address}/"):
            pass  # the page loads itself again
        page.wait_for_load_state()
        page.get_by_role("link", name="Users").hover()
        page.mouse.down()
        before = len(loads)
        page.wait_for_timeout(2_000)
        assert len(loads) == before
        page.mouse.up()
        page.wait_for_url("**/users")


@pytest.mark.one_server  # it is about what a browser shows
@pytest.mark.parametrize("how", [{}, {"java_script_enabled": False, "viewport": {"width": 390, "height": 800}}])
def test_a_dead_letter_is_sent_again_from_the_page(shop, hook, visit, how):
    world, _ = shop
    with Served(world, allow_actions=True) as running:
        page = visit(running, **how)
        # not by a click: the overview exchanges its figures for newer ones, and with them the link under the pointer
        page.goto(urljoin(page.url, page.get_by_role("link", name="dead letter").get_attribute("href")))
        letters = page.get_by_role("region", name="Dead letters").locator("tbody tr")
        first = letters.filter(has_text="purchase.completed").first
        expect(first).to_contain_text("it answered 500")
        number = letters.count()
        hook.status = 503
        first.get_by_role("button", name="Send event").click()
        expect(page.get_by_role("alert")).to_contain_text("not taken")
        expect(first).to_contain_text("it answered 503")
        hook.status = 200
        first.get_by_role("button", name="Send event").click()
        expect(page.get_by_role("status")).to_contain_text("Sent again, and taken")
        expect(letters).to_have_count(number - 1)


@pytest.mark.one_server  # it is about what a browser shows
def test_log_in_by_keyboard_and_out(world, visit):
    with Served(world, passwords={"anna": hash_password("open sesame")}) as running:
        page = visit(running)  # the link is no way in here
        expect(page.get_by_role("heading", level=1)).to_have_text("Log in")
        page.get_by_label("Name").focus()
        page.keyboard.type("anna")
        page.keyboard.press("Tab")
        page.keyboard.type("open sesame")
        page.keyboard.press("Enter")
        expect(
            page.get_by_text("Balances have not been checked").or_(page.get_by_text("balances agree"))
        ).to_be_visible()
        cookie = page.context.cookies()[0]
        assert cookie["httpOnly"]
        assert cookie["sameSite"] == "Strict"
        page.keyboard.press("Tab")
        expect(page.get_by_role("link", name="Skip to content")).to_be_focused()
        page.get_by_role("button", name="Log out").click()
        expect(page.get_by_role("heading", level=1)).to_have_text("Log in")
