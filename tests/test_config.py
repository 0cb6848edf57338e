"""Settings: where they come from, and that each mistake is named with its file, line and key."""

from __future__ import annotations

import datetime as dt
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tallystick import Config, HostMapping, Pack, UsersTable, WorkshopsTable
from tallystick.config import _ADDED_TO_USERS, _ADDED_TO_WORKSHOPS, _TEXTS, ConsoleAccess, to_toml, write_host
from tallystick.declared_tables import user_columns, workshop_columns
from tallystick.errors import ConfigError

pytestmark = pytest.mark.one_server


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(folder: Path, text: str, name: str = "tallystick.toml") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def test_without_a_file_the_names_are_the_usual_ones(folder):
    config = Config.load(environ={})
    assert config.host.users == UsersTable(schema="public", table="users", key="id", key_type="uuid")
    assert config.host.workshops == WorkshopsTable()
    assert config.database_url is None


def test_everything_can_be_said_in_the_file(folder):
    write(
        folder,
        """
        database_url = "postgres://app@db/shop"
        paywall = false
        grandfathered_before = 2026-01-31T00:00:00Z

        [host.users]
        schema = "app"
        table = "User"
        key = "clerk_user_id"
        key_type = "text"

        [host.workshops]
        table = "order"
        owner = "owner"

        [[packs]]
        name = "Single Flight"
        credits = 1
        amount = 7900
        """,
    )
    config = Config.load(environ={})
    assert config.database_url == "postgresql+psycopg://app@db/shop"
    assert config.host.users == UsersTable(schema="app", table="User", key="clerk_user_id", key_type="text")
    assert config.host.workshops == WorkshopsTable(table="order", owner="owner")
    assert config.packs == (Pack(name="Single Flight", credits=1, amount=7900, currency="usd"),)
    assert config.grandfathered_before == dt.datetime(2026, 1, 31, tzinfo=dt.UTC)
    assert not config.paywall


def test_a_host_without_workshops_says_false(folder):
    write(folder, "[host]\nworkshops = false\n")
    assert Config.load(environ={}).host.workshops is None


def test_pyproject_serves_too_and_a_folder_above(folder, monkeypatch):
    write(folder, "[tool.tallystick]\npaywall = false\n", "pyproject.toml")
    below = folder / "deep" / "down"
    below.mkdir(parents=True)
    monkeypatch.chdir(below)
    assert not Config.load(environ={}).paywall


def test_the_file_of_our_own_name_goes_before_pyproject(folder):
    write(folder, "[tool.tallystick]\npaywall = false\n", "pyproject.toml")
    write(folder, "paywall = true\n")
    assert Config.load(environ={}).paywall


@pytest.mark.parametrize(
    ("file", "environ", "expected"),
    [
        ("", {"DATABASE_URL": "postgres://a/b"}, "postgresql+psycopg://a/b"),
        ("database_url = 'postgresql://file/b'", {"DATABASE_URL": "postgres://a/b"}, "postgresql+psycopg://file/b"),
        (
            "database_url = 'postgresql://file/b'",
            {"TALLYSTICK_DATABASE_URL": "postgresql+psycopg://env/b"},
            "postgresql+psycopg://env/b",
        ),
        ("", {}, None),
    ],
)
def test_where_the_address_comes_from(folder, file, environ, expected):
    write(folder, file)
    assert Config.load(environ=environ).database_url == expected


@pytest.mark.parametrize(
    ("file", "environ", "expected"),
    [
        ("", {"DATABASE_URL": "postgres://e/a", "DATABASE_URL_UNPOOLED": "postgres://e/b"}, "e/b"),
        ("", {"DATABASE_URL_UNPOOLED": "postgres://e/b"}, "e/b"),
        ("", {"TALLYSTICK_DATABASE_URL": "postgres://t/a", "DATABASE_URL_UNPOOLED": "postgres://e/b"}, None),
        (
            "",
            {
                "TALLYSTICK_DATABASE_URL": "postgres://t/a",
                "TALLYSTICK_DATABASE_URL_UNPOOLED": "postgres://t/b",
                "DATABASE_URL_UNPOOLED": "postgres://e/b",
            },
            "t/b",
        ),
        ("database_url = 'postgres://f/a'", {"DATABASE_URL_UNPOOLED": "postgres://e/b"}, None),
        (
            "database_url = 'postgres://f/a'\ndatabase_url_unpooled = 'postgres://f/b'",
            {"DATABASE_URL": "postgres://e/a", "DATABASE_URL_UNPOOLED": "postgres://e/b"},
            "f/b",
        ),
        (
            "database_url_unpooled = 'postgres://f/b'",
            {"DATABASE_URL": "postgres://e/a", "DATABASE_URL_UNPOOLED": "postgres://e/b"},
            "e/b",
        ),
        ("database_url_unpooled = 'postgres://f/b'", {"DATABASE_URL": "postgres://e/a"}, None),
    ],
)
def test_the_unpooled_address_is_from_where_the_other_one_is(folder, file, environ, expected):
    write(folder, file)
    found = Config.load(environ=environ).database_url_unpooled
    assert found == (expected and f"postgresql+psycopg://{expected}")


def test_the_environment_overrides_single_settings(folder):
    write(folder, "paywall = true")
    assert not Config.load(environ={"TALLYSTICK_PAYWALL": "false"}).paywall


@pytest.mark.parametrize("text", ["2026", "true", "2026-01-31", "shop", '"shop"'])
def test_a_text_in_the_environment_stays_one(folder, text):
    assert Config.load(environ={"TALLYSTICK_STRIPE_REALM": text}).stripe_realm == text.strip('"')


def test_every_setting_that_is_a_text_is_known_as_one():
    texts = {name for name, field in Config.model_fields.items() if "str" in repr(field.annotation)}
    assert texts - {"checkout_origins"} | {"refund_rounding"} == set(_TEXTS)


@pytest.mark.parametrize("name", ["DATABASE_URL", "TALLYSTICK_DATABASE_URL", "TALLYSTICK_PAYWALL"])
def test_an_empty_variable_is_not_set(folder, name):
    write(folder, "database_url = 'postgres://f/a'\npaywall = false")
    found = Config.load(environ={name: "", f"{name}_UNPOOLED": ""} if name.endswith("URL") else {name: ""})
    assert (found.database_url, found.paywall) == ("postgresql+psycopg://f/a", False)


def test_a_password_is_never_shown(folder):
    config = Config(database_url="postgresql://app:hunter2@db/shop")
    assert "hunter2" not in repr(config)
    with pytest.raises(ConfigError) as caught:
        Config.load(environ={"DATABASE_URL": "mysql://app:hunter2@db/shop"})
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    ("address", "says"),
    [
        ("postgresql://app:s3cret@db:54x2/shop", "the port is not a number"),
        ("postgresql://app:s3cret/shop", "the port is not a number"),
        ("postgresql://app:s3c@s3c:s3c@db/shop", "%40"),
        ("postgres://app:s3cret@db1:5432,db2:5432/shop", "postgresql://user@/database?host=host1:5432&host=host2:5432"),
    ],
)
def test_a_fault_of_an_address_is_named_without_its_password(folder, address, says):
    for environ in ({"DATABASE_URL": address}, {"TALLYSTICK_DATABASE_URL_UNPOOLED": address}):
        with pytest.raises(ConfigError) as caught:
            Config.load(environ=environ)
        assert says in str(caught.value)
        assert str(caught.value).startswith(f"{next(iter(environ))}: ")
        assert "s3c" not in str(caught.value)
    assert Config(database_url="postgres://app@/shop?host=db1:1&host=db2:2").database_url is not None


@pytest.mark.parametrize(
    ("text", "line", "key", "says"),
    [
        ("paywall = maybe", 1, None, "not valid TOML"),
        ("\n\npaywal = true", 3, "paywal", "did you mean paywall?"),
        ("[host.users]\ntabel = 'users'", 2, "host.users.tabel", "did you mean table?"),
        ("[host.users]\nkey_type = 'serial'", 2, "host.users.key_type", "'uuid'"),
        ("[host.users]\nkey = ''", 2, "host.users.key", "at least one character"),
        (f"[host.users]\ntable = '{'ü' * 32}'", 2, "host.users.table", "at most 63 bytes"),
        ("[[packs]]\nname = 'a'\ncredits = 1\n[[packs]]\nname = 'b'\ncredits = 0", 6, "packs.1.credits", "greater"),
        (
            "[[packs]]\nname = 'a'\ncredits = 1\n[[packs]]\nname = 'a'\ncredits = 1\ncurrency = 'eur'",
            None,
            "packs",
            "two packs are called 'a', one in usd and one in eur",
        ),
        ("[host.users]\ntable = 'workshops'", None, "host", "both name the table public.workshops"),
        ("[[packs]]\nname = 'a'\ncredits = 1.5", 3, "packs.0.credits", "integer"),
        ("[[packs]]\nname = 'a'\ncredits = 1\ncurrency = 'USD'", 4, "packs.0.currency", "pattern"),
        ("grandfathered_before = 2026-01-31T00:00:00", 1, "grandfathered_before", "time zone"),
        ("[console]\nadress = 'https://x'", 2, "console.adress", "did you mean address?"),
        (
            "[host.workshops]\ncheckout_origins = []",
            2,
            "host.workshops.checkout_origins",
            "Move checkout_origins above the first [table]",
        ),
        ("[console]\naddress = 'http://console.example.com'", 2, "console.address", "https://"),
        ("[console]\naddress = 'https://example.com/ops'", 2, "console.address", "scheme and host only"),
        ("[console]\naddress = 'https://example.com:99999'", 2, "console.address", "Port out of range"),
        ("[console]\naddress = 'https://anna:secret@example.com'", 2, "console.address", "write an origin"),
        ("[console]\nproxy_peers = ['proxy.example.com']", 2, "console.proxy_peers.0", "no IP address"),
        ("[console]\noperators = {anna = 'secret'}", 2, "console.operators.anna", "--hash-password"),
        ("[console]\nproxy_peers = ['::1']\noperators = {a = 'scrypt:a:b'}", 1, "console", "choose one"),
        ("database_url = 'localhost/app'", 1, "database_url", "begins with postgresql://"),
    ],
)
def test_a_mistake_is_named_with_its_line_and_key(folder, text, line, key, says):
    path = write(folder, text)
    with pytest.raises(ConfigError) as caught:
        Config.load(environ={})
    error = caught.value
    assert (error.path, error.line, error.key) == (str(path), line, key)
    assert says in str(error)
    assert str(path) in str(error)


def test_a_named_file_that_is_not_there_says_how_to_write_one(folder):
    with pytest.raises(ConfigError, match="tallystick init"):
        Config.load(folder / "nowhere.toml", environ={})


@pytest.mark.parametrize("name", ["tallystick.toml", "pyproject.toml"])
def test_a_file_that_cannot_be_read_is_no_reason_for_defaults(folder, name):
    """A container has a folder in place of a file that could not be mounted, or a link to nothing."""
    path = folder / name
    path.mkdir()
    with pytest.raises(ConfigError, match="Is a directory"):
        Config.load(environ={})
    path.rmdir()
    path.symlink_to("nowhere")
    with pytest.raises(ConfigError, match="tallystick init --output"):
        Config.load(environ={})


def test_a_mistake_in_the_environment_names_the_variable(folder):
    with pytest.raises(ConfigError, match=r"^TALLYSTICK_PAYWALL: 'perhaps' is neither true nor false$"):
        Config.load(environ={"TALLYSTICK_PAYWALL": "perhaps"})


@pytest.mark.parametrize(
    ("table", "roles"),
    [
        ("users", {"key": "id", "balance": "id"}),
        ("users", {"key": "credit_balance"}),
        ("users", {"email": "m", "balance": "m"}),
        ("users", {"balance": "n", "updated_at": "n"}),
        ("users", {"key": "deleted_at"}),
        ("users", {"key": "credit_sequence"}),
        ("users", {"balance": "credit_held"}),
        ("workshops", {"created_at": "deleted_at"}),
        ("workshops", {"created_at": "credit_consumed_at"}),
    ],
)
def test_a_column_that_the_ledger_writes_has_one_role(folder, table, roles):
    write(folder, f"[host.{table}]\n" + "".join(f'{role} = "{name}"\n' for role, name in roles.items()))
    with pytest.raises(ConfigError, match=rf"host\.{table}.* name.* the column .*(Name one for each|Name another)"):
        Config.load(environ={})


def test_the_columns_of_one_name_are_those_that_no_setting_names():
    users, workshops = HostMapping().users, HostMapping().workshops
    assert {c.name for c in user_columns()} - set(users.adoptable.values()) == set(_ADDED_TO_USERS)
    assert {c.name for c in workshop_columns()} - set(workshops.adoptable.values()) == set(_ADDED_TO_WORKSHOPS)


def test_columns_that_the_ledger_only_reads_may_have_two_roles(folder):
    write(folder, '[host.users]\nkey = "m"\nemail = "m"\n[host.workshops]\nkey = "k"\nowner = "k"\ntitle = "k"\n')
    assert Config.load(environ={}).host.users.email == "m"


names = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=15)


@given(users=names, key=names, schema=names, title=st.none() | names)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_what_init_writes_reads_back_whatever_the_names(folder, users, key, schema, title):
    host = HostMapping(
        users=UsersTable(schema=schema, table=users, key=key, key_type="bigint"),
        workshops=WorkshopsTable(table=key, title=title) if title else None,
    )
    path = write(folder, to_toml(host))
    assert Config.load(path, environ={}).host == host


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("https://Console.Example.com:443/", "https://console.example.com"),
        ("http://127.0.0.1:80", "http://127.0.0.1"),
        ("https://example.com:8443", "https://example.com:8443"),
        ("http://[::1]:80", "http://[::1]"),
    ],
)
def test_the_consoles_address_is_as_browsers_send_it(written, meant):
    assert ConsoleAccess(address=written).address == meant


AROUND = {
    "nothing": "",
    "no last line end": "paywall = false",
    "the tables in two places": """\
paywall = false
[host]
workshops = false
# of the packs
[[packs]]
name = 'a'
credits = 1
[host.users]
key = 'x'

[console]
proxy_header = 'X'
""",
    "headers in texts and lists": """\
[[packs]]
credits = 1
name = '''
[host.users]
key = "not a key"
'''
[ host . "users" ] # ours
key = '''
x'''

[console]
proxy_peers = [
"::1",
]
# the end
""",
    "a byte order mark": "\ufeffpaywall = false\n[host.users]\nkey = 'x'\n",
    "the line ends of Windows": "paywall = false\r\n\r\n[host.users]\r\nkey = 'x'\r\n# end\r\n",
}


@pytest.mark.parametrize("case", AROUND)
@pytest.mark.parametrize("workshops", [None, WorkshopsTable(title=None)])
def test_all_but_the_tables_of_the_app_stays_byte_by_byte(folder, case, workshops):
    text = AROUND[case]
    path = folder / "tallystick.toml"
    path.write_bytes(text.encode())
    before = Config.load(path, environ={})
    host = HostMapping(users=UsersTable(key="k"), workshops=workshops, credits="bigint")
    write_host(path, host)
    written = path.read_bytes()
    assert Config.load(path, environ={}) == before.model_copy(update={"host": host})
    replaced = ("[host", '[ host . "users"', "key = 'x", "key = '''", "workshops = false", "x'''")
    kept = [line for line in text.splitlines() if line and not line.startswith(replaced)]
    left = iter(written.decode().splitlines())
    assert all(line in left for line in kept), written.decode()
    assert (b"\r\n" in written, b"\n" in written.replace(b"\r\n", b"")) == ("\r" in text, "\r" not in text)
    write_host(path, host)
    assert path.read_bytes() == written
    write_host(path, HostMapping())
    write_host(path, host)
    assert path.read_bytes() == written


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("tallystick.toml", "paywall = true\nhost.users.key = 'x'\n"),
        ("tallystick.toml", "host = {users = {key = 'x'}}\n"),
        ("pyproject.toml", "[tool]\ntallystick = {paywall = false}\n"),
    ],
)
def test_a_host_that_is_no_table_is_left_alone(folder, name, text):
    path = write(folder, text, name)
    with pytest.raises(ConfigError, match="or write it as a table, then run: tallystick init --force"):
        write_host(path, HostMapping(workshops=None))
    assert path.read_text(encoding="utf-8") == text


def test_a_new_pyproject_has_the_settings_in_our_table(folder):
    host = HostMapping(users=UsersTable(key="k"), workshops=None)
    write_host(folder / "pyproject.toml", host)
    assert Config.load(environ={}).host == host


def test_a_setting_that_stands_below_a_table_of_pyproject_is_told_its_place(folder):
    (folder / "pyproject.toml").write_text("[tool.tallystick.host.users]\npaywall = false\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"Move paywall directly below \[tool\.tallystick\]"):
        Config.load(environ={})


def test_a_file_that_is_mounted_by_itself_is_written_in_place(folder: Path) -> None:
    """As a container has it: no other file can take its place (EBUSY)."""
    file = folder / "tallystick.toml"
    file.write_text("# ours\n" * 200)
    write = "import sys, pathlib, tallystick.files as f; f.replace_file(pathlib.Path(sys.argv[1]), b'new')"
    # a namespace of its own, so that nothing stays mounted
    mounted = ["unshare", "--map-root-user", "--mount", "sh", "-c"]
    mount = 'mount --bind "$1" "$1"'
    if subprocess.run([*mounted, mount, "sh", str(file)], check=False).returncode:
        pytest.skip("nothing can be mounted here, not even in a namespace of its own: run the test as root")
    subprocess.run([*mounted, f'{mount} && exec "$2" -c "$3" "$1"', "sh", str(file), sys.executable, write], check=True)
    assert file.read_bytes() == b"new"
    assert [path.name for path in folder.iterdir()] == ["tallystick.toml"]
