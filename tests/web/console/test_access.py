"""Nothing is readable without a log-in, and nothing happens that its operator did not mean."""

from __future__ import annotations

import logging

import pytest

from tallystick.web.console import Passwords, TrustedProxy, access, hash_password
from tallystick.web.console.access import LocalLink, TooMany, cookie_name

pytestmark = pytest.mark.one_server  # it is about who gets in

COOKIE = cookie_name(8420)

PATHS = [
    "/", "/users", "/users?q=a", "/users.json", "/users.csv", "/user?key=x", "/user.json?key=x", "/user.csv?key=x",
    "/user/steps.json?key=x", "/pending", "/pending.json", "/pending.csv", "/audit", "/audit.json", "/audit.csv",
    "/audit/state.json", "/migrations", "/migrations.json", "/migrations.csv", "/days.json", "/days.csv",
    "/user/grant?key=x", "/user/refund?key=x", "/pending/state.json", "/nothing", "//", "/enter", "/enter?token=",
    "/logout", "/static/../users", "/static/%2e%2e/users",
]  # fmt: skip


@pytest.fixture(scope="module")
def world(empty_world):
    """One for all: nothing here changes it."""
    return empty_world


@pytest.fixture(scope="module")
def hashed():
    return hash_password("open sesame")


METHODS = ["GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS"]


@pytest.mark.parametrize("way_in", ["link", "password", "proxy"])
def test_without_a_log_in_there_is_nothing(world, open_console, way_in, hashed):
    user = world.user(credits=7)
    ways = {"link": LocalLink(), "password": Passwords({"anna": hashed}), "proxy": TrustedProxy(["10.0.0.5"])}
    sign_in = ways[way_in]
    visitor = open_console(world, sign_in=sign_in, allow_actions=True)
    for path in PATHS:
        for method in METHODS:
            asked = path.replace("key=x", f"key={user}")
            answer = visitor.request(method, asked, headers={"X-Forwarded-User": "anna"})
            assert answer.status_code in (303, 401, 403, 404), (method, asked)
            if answer.status_code == 303:
                assert answer.headers["location"] == "/login"
            assert str(user) not in answer.text
            assert "credits" not in answer.text
            assert COOKIE not in answer.headers.get("set-cookie", "")


def test_the_link_works_once(world, open_console):
    link = LocalLink()
    first = open_console(world, sign_in=link)
    assert first.get("/users").status_code == 401
    assert first.head("/enter", params={"token": link.token}).status_code == 401  # a preview does not use it up
    assert first.get("/enter", params={"token": link.token}).status_code == 303
    assert first.get("/users").status_code == 200

    first.cookies.clear()
    again = first.get("/enter", params={"token": link.token})
    assert again.status_code == 401
    assert "set-cookie" not in again.headers


def test_the_link_ages(world, open_console, monkeypatch):
    link = LocalLink()
    visitor = open_console(world, sign_in=link)
    now = access.time.monotonic()
    monkeypatch.setattr(access.time, "monotonic", lambda: now + access.LINK_S + 1)
    assert visitor.get("/enter", params={"token": link.token}).status_code == 401


def test_a_session_is_signed_and_ends(world, open_console):
    visitor = open_console(world)
    cookie = visitor.cookies[COOKIE]
    header = visitor.get("/").request.headers["cookie"]
    assert cookie in header

    payload, stamp, signature = cookie.split(".")
    for forged in (f"{payload}.{stamp}.{signature[::-1]}", f"{payload[:-2]}AA.{stamp}.{signature}", "x", "", payload):
        visitor.cookies.clear()
        visitor.cookies.set(COOKIE, forged)
        assert visitor.get("/users").status_code == 401, forged

    visitor.cookies.clear()
    visitor.cookies.set(COOKIE, cookie)
    assert visitor.get("/users").status_code == 200
    out = visitor.submit("/logout")
    assert out.status_code == 303
    assert "Max-Age=0" in out.headers["set-cookie"]
    visitor.cookies.clear()
    visitor.cookies.set(COOKIE, cookie)  # kept by somebody
    assert visitor.get("/users").status_code == 401


OTHER_COOKIES = ('prefs={"a":1}', "x[y]=1", "name with space=1", 't="unterminated', "a=ü", "alone", "=", "")


@pytest.mark.parametrize("other", OTHER_COOKIES)
def test_cookies_of_another_app_on_this_host_change_nothing(world, open_console, other):
    visitor = open_console(world)
    own = f"{COOKIE}={visitor.cookies[COOKIE]}"
    visitor.cookies.clear()
    for header in (f"{other}; {own}", f"{own}; {other}", f"{other};{own};{other}"):
        assert visitor.get("/users", headers={"cookie": header.encode()}).status_code == 200
    strange = f"{COOKIE}=ü.{COOKIE}.\\000; {other}"
    assert visitor.get("/users", headers={"cookie": strange.encode()}).status_code == 401


def test_behind_a_proxy_a_cookie_of_another_app_stops_no_action(world, open_console):
    visitor = open_console(world, sign_in=TrustedProxy(["127.0.0.1"]))
    visitor.headers["X-Forwarded-User"] = "anna"
    token = visitor.token()
    header = f'prefs={{"a":1}}; {COOKIE}={visitor.cookies[COOKIE]}'
    visitor.cookies.clear()
    assert visitor.post("/audit/run", data={"token": token}, headers={"cookie": header}).status_code == 303


def test_a_session_of_another_process_is_none(world, open_console):
    cookie = open_console(world).cookies[COOKIE]
    other = open_console(world)
    other.cookies.clear()
    other.cookies.set(COOKIE, cookie)
    assert other.get("/users").status_code == 401


@pytest.mark.parametrize("path", ["/login", "/enter?token=used"])
def test_who_is_logged_in_is_led_from_the_log_in_to_the_overview(world, open_console, path):
    answer = open_console(world).get(path)
    assert (answer.status_code, answer.headers["location"]) == (303, "/")


def test_two_consoles_on_one_machine_leave_each_other_signed_in(world, open_console):
    one, other = (open_console(world, address=f"http://127.0.0.1:{port}") for port in (8420, 8421))
    kept = {**one.cookies, **other.cookies}  # by name: a browser sends a host's cookies to all of its ports
    for visitor in (one, other):
        visitor.cookies.update(kept)
    assert [visitor.get("/users").status_code for visitor in (one, other)] == [200, 200]


def test_the_cookie_is_kept_from_scripts_and_other_sites(world, open_console, hashed):
    sign_in = Passwords({"anna": hashed})
    for address, secure in (("http://127.0.0.1:8420", False), ("https://console.example.com", True)):
        visitor = open_console(world, sign_in=sign_in, address=address)
        cookie = visitor.post("/login", data={"name": "anna", "password": "open sesame"}).headers["set-cookie"]
        assert "HttpOnly" in cookie
        assert "SameSite=Strict" in cookie
        assert ("Secure" in cookie) is secure
        assert ("strict-transport-security" in visitor.get("/").headers) is secure


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1", "127.0.0.1:1", "", "127.0.0.1:8420.evil.example"])
def test_another_hosts_name_is_refused(world, open_console, host):
    visitor = open_console(world)
    answer = visitor.get("/users", headers={"Host": host})  # as after DNS rebinding
    assert answer.status_code == 421


@pytest.mark.parametrize("host", ["127.0.0.1:8420", "localhost:8420", "[::1]:8420", "LOCALHOST:8420"])
def test_this_machine_has_several_names(world, open_console, host):
    assert open_console(world).get("/users", headers={"Host": host}).status_code == 200


# --- passwords ---


def test_a_password_lets_its_operator_in(world, open_console, hashed):
    visitor = open_console(world, sign_in=Passwords({"anna": hashed, "bo": hash_password("other")}))
    assert visitor.get("/users").headers["location"] == "/login"
    assert "Password" in visitor.get("/login").text
    for name, password in (
        ("anna", "other"),
        ("nobody", "open sesame"),
        ("", ""),
        ("anna", ""),
        ("ANNA", "open sesame"),
    ):
        answer = visitor.post("/login", data={"name": name, "password": password})
        assert answer.status_code == 401
        assert "set-cookie" not in answer.headers
    assert visitor.post("/login", data={"name": "anna", "password": "open sesame"}).status_code == 303
    assert "anna" in visitor.get("/").text


def test_guessing_is_slowed_down(monkeypatch, hashed):
    sign_in = Passwords({"anna": hashed, "bo": hashed})
    clock = [1000.0]
    monkeypatch.setattr(access.time, "monotonic", lambda: clock[0])
    for _ in range(Passwords.PER_NAME):
        assert sign_in.check("anna", "guess") is None
    with pytest.raises(TooMany) as refusal:
        sign_in.check("anna", "open sesame")  # even the right one waits
    assert refusal.value.seconds == 60
    assert sign_in.check("bo", "open sesame") == "bo"
    clock[0] += 60.1
    assert sign_in.check("anna", "open sesame") == "anna"


def test_guessing_many_names_is_slowed_down(monkeypatch, hashed):
    sign_in = Passwords({"anna": hashed})
    monkeypatch.setattr(access, "_verify", lambda stored, password: False)  # thirty hashes take long; counting does not
    for number in range(Passwords.IN_ALL):
        assert sign_in.check(f"name {number}", "guess") is None
    with pytest.raises(TooMany):
        sign_in.check("anna", "open sesame")


def test_too_many_log_ins_are_told_when_to_come_back(world, open_console, hashed):
    visitor = open_console(world, sign_in=Passwords({"anna": hashed}))
    answers = [
        visitor.post("/login", data={"name": "anna", "password": "guess"}) for _ in range(Passwords.PER_NAME + 1)
    ]
    assert [answer.status_code for answer in answers] == [401] * Passwords.PER_NAME + [429]
    assert 0 < int(answers[-1].headers["retry-after"]) <= 60


def test_a_log_in_from_another_site_is_refused(world, open_console, hashed):
    visitor = open_console(world, sign_in=Passwords({"anna": hashed}))
    right = {"name": "anna", "password": "open sesame"}
    assert visitor.post("/login", data=right, headers={"Origin": "https://evil.example"}).status_code == 403
    assert visitor.post("/login", data=right, headers={"Sec-Fetch-Site": "cross-site"}).status_code == 403
    assert visitor.post("/login", data=right, headers={"Origin": "null"}).status_code == 403


def test_a_hash_hides_its_password_and_has_its_own_salt():
    one, other = hash_password("secret"), hash_password("secret")
    assert one != other
    assert "secret" not in one


@pytest.mark.parametrize("stored", ["", "plain", "scrypt::", "scrypt:a:b:c", "md5:AAAA:AAAA", "scrypt:!:!"])
def test_a_broken_hash_lets_nobody_in(stored):
    assert Passwords({"anna": stored}).check("anna", "") is None


# --- a reverse proxy ---


@pytest.mark.parametrize(
    ("peer", "trusted"),
    [
        ("10.0.0.5", True),
        ("::ffff:10.0.0.5", True),
        ("10.0.1.9", True),
        ("10.0.0.6", False),
        ("127.0.0.1", False),
        ("::1", False),
        ("testclient", False),
        ("", False),
    ],
)
def test_only_the_named_proxy_is_believed(world, open_console, peer, trusted):
    visitor = open_console(world, sign_in=TrustedProxy(["10.0.0.5", "10.0.1.0/24"]))
    visitor._transport.client = (peer, 50_000)
    headers = {"X-Forwarded-User": "anna", "X-Forwarded-For": "10.0.0.5", "Forwarded": "for=10.0.0.5"}
    answer = visitor.get("/users", headers=headers)
    assert answer.status_code == (200 if trusted else 403)
    assert ("anna" in answer.text) is trusted


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"X-Forwarded-User": ""},
        {"X-Forwarded-User": "  "},
        {"X-Forwarded-User": "a" * 101},
        {"X-Remote-User": "anna"},
        [("X-Forwarded-User", "mallory"), ("X-Forwarded-User", "anna")],
    ],
)
def test_a_proxy_that_names_nobody_lets_nobody_in(world, open_console, headers):
    visitor = open_console(world, sign_in=TrustedProxy(["127.0.0.1"]))
    assert visitor.get("/users", headers=headers).status_code == 401


def test_behind_a_proxy_a_cookie_alone_opens_nothing(world, open_console):
    visitor = open_console(world, sign_in=TrustedProxy(["127.0.0.1"]))
    anna = {"X-Forwarded-User": "anna"}
    assert visitor.get("/users", headers=anna).status_code == 200
    assert visitor.cookies[COOKIE]
    assert visitor.get("/users").status_code == 401
    assert "anna" not in visitor.get("/users", headers={"X-Forwarded-User": "bo"}).text


def test_behind_a_proxy_forms_need_their_own_operators_token(world, open_console):
    visitor = open_console(world, sign_in=TrustedProxy(["127.0.0.1"]))
    visitor.headers["X-Forwarded-User"] = "anna"
    token = visitor.token()
    assert visitor.post("/audit/run", data={"token": token}).status_code == 303
    visitor.headers["X-Forwarded-User"] = "bo"
    assert visitor.post("/audit/run", data={"token": token}).status_code == 403


# --- forms ---


def test_a_form_needs_its_token(world, open_console):
    user = world.user(credits=1)
    visitor = open_console(world, allow_actions=True)
    other = open_console(world, allow_actions=True)
    grant = {"key": str(user), "credits": "5", "reason": "x", "once": "1"}
    for token in ({}, {"token": ""}, {"token": "0" * 64}, {"token": "é"}, {"token": other.token()}):
        assert visitor.post("/user/grant", data={**grant, **token}).status_code == 403
    with world.engine.connect() as conn:
        assert world.ledger.balance(conn, user) == 1


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "https://evil.example"},
        {"Origin": "null"},
        {"Origin": "https://127.0.0.1:8420"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
    ],
)
def test_a_form_from_another_site_is_refused_even_with_its_token(world, open_console, headers):
    visitor = open_console(world)
    assert visitor.post("/audit/run", data={"token": visitor.token()}, headers=headers).status_code == 403


def test_bodies_are_plain_forms_of_a_bounded_size(world, open_console):
    visitor = open_console(world)
    token = visitor.token()
    assert visitor.post("/audit/run", json={"token": token}).status_code == 415
    assert visitor.post("/audit/run", data={"token": token, "more": "x" * 70_000}).status_code == 413
    many = {f"f{number}": "" for number in range(60)}
    assert visitor.post("/audit/run", data={"token": token, **many}).status_code == 400
    raw = {"Content-Type": "application/x-www-form-urlencoded"}
    assert visitor.post("/audit/run", content=b"token=\xff\xfe", headers=raw).status_code in (400, 403)


def test_every_answer_carries_the_headers(world, open_console):
    visitor = open_console(world)
    for path in ("/", "/users.json", "/users.csv", "/nothing", "/static/console.css", "/user?key=zzz"):
        headers = visitor.get(path).headers
        policy = headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["referrer-policy"] == "same-origin"  # with no-referrer, browsers hide where a form comes from
        assert headers["x-frame-options"] == "DENY"
    assert visitor.get("/").headers["cache-control"] == "no-store"


def test_what_comes_in_cannot_add_a_header(world, open_console):
    visitor = open_console(world)
    for path in (
        "/users?q=a%0d%0aSet-Cookie:%20x=1",
        "/user.csv?key=%0d%0aSet-Cookie:%20x=1",
        "/pending?outcome=%0d%0aX:%201",
    ):
        answer = visitor.get(path)
        assert "set-cookie" not in answer.headers
        assert "x" not in answer.headers


def test_log_ins_and_refusals_are_logged(world, open_console, hashed, caplog):
    caplog.set_level(logging.INFO, "tallystick.console")
    visitor = open_console(world, sign_in=Passwords({"anna": hashed}))
    visitor.post("/login", data={"name": "mal\nlory", "password": "x"})
    visitor.post("/login", data={"name": "anna", "password": "open sesame"})
    text = "\n".join(record.getMessage() for record in caplog.records)
    assert r"log-in refused operator='mal\nlory' peer='127.0.0.1'" in text  # one line, whatever the name holds
    assert "log-in operator='anna' by=password" in text
    assert "open sesame" not in text
