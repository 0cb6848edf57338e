"""``docs/testing.md`` and pytest's fixtures: its examples are whole projects, whose tests pytest runs."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path
from uuid import uuid4

import psycopg
import pytest

import pages
from caller_connections import bare
from tallystick.dev.postgres import Server
from worlds import SHAPES, World

pytestmark = pytest.mark.one_server  # it is about the host's test runner

APPS = Path(__file__).parent / "apps"
SLOW_TO_IMPORT = [part for name in ("schemathesis", "hypothesispytest", "anyio") for part in ("-p", f"no:{name}")]
INI = "[pytest]\nfilterwarnings = error\n"
SCHEMA = f'''
import pytest

@pytest.fixture(scope="session")
def tallystick_schema():
    return """{SHAPES["uuid"].ddl}"""
'''


def run_pytest(folder: Path, *args: str, **environ: str) -> subprocess.CompletedProcess[str]:
    inherited = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("TALLYSTICK_TEST", "PYTEST", "DJANGO", "DATABASE_URL"))
    }
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *SLOW_TO_IMPORT, *args],
        cwd=folder,
        env={**inherited, "PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1", **environ},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def outcomes(done: subprocess.CompletedProcess[str]) -> dict[str, int]:
    """As pytest's last line tells them."""
    counted = re.findall(r"(\d+) (passed|failed|errors?|skipped|warnings?)", done.stdout.strip().rpartition("\n")[2])
    return {what: int(number) for number, what in counted}


def test_pytest_finds_the_fixtures():
    assert {entry.value for entry in entry_points(group="pytest11", name="tallystick")} == {"tallystick.pytest_plugin"}


def test_the_fastapi_example(tmp_path: Path, server: Server):
    shutil.copytree(APPS / "fastapi", tmp_path, dirs_exist_ok=True)
    done = run_pytest(
        pages.write(tmp_path, pages.files_of("testing.md", "FastAPI") | {"pytest.ini": INI}),
        "--tallystick-url",
        server.url(),
    )
    assert outcomes(done) == {"passed": 3}, done.stdout


COMMITS = """
from threading import Thread

from django.contrib.auth import get_user_model
from django.db import connection, transaction

from committing import committing_db
from shop.models import Workshop


def test_what_commits_is_seen_by_another_thread(committing_db):
    user = get_user_model().objects.create_user("ann")
    after = []
    with transaction.atomic():
        committing_db.workshop(committing_db.funded(credits=2, user=user.pk))
        transaction.on_commit(lambda: after.append(committing_db.balance(user.pk)))

    def look():
        after.append(Workshop.objects.count())
        connection.close()

    thread = Thread(target=look)
    thread.start()
    thread.join()
    assert after == [2, 1]


def test_the_tests_database_is_as_it_was(db):
    assert Workshop.objects.count() == 0


def test_each_test_begins_with_nothing(tallystick_db):
    assert get_user_model().objects.count() == 0
    tallystick_db.funded(credits=2)
    tallystick_db.clock.advance(days=3)
    tallystick_db.assert_balanced()


test_so_does_the_next = test_each_test_begins_with_nothing
"""


def test_the_django_example(tmp_path: Path, server: Server):
    shutil.copytree(APPS / "django", tmp_path, dirs_exist_ok=True)
    (view,) = (code for code in pages.blocks(pages.ROOT / "docs" / "django.md", "python") if "def unlock" in code)
    ini = INI + "DJANGO_SETTINGS_MODULE = settings\n"
    files = pages.files_of("testing.md", "Django") | {
        "shop/views.py": view,
        "pytest.ini": ini,
        "test_commits.py": COMMITS,
    }
    done = run_pytest(pages.write(tmp_path, files), "--tallystick-url", server.url())
    assert outcomes(done) == {"passed": 6}, done.stdout


@pytest.mark.parametrize("options", [[], ["--parallel=2"]], ids=["one", "parallel"])
def test_the_runner_of_django(tmp_path: Path, server: Server, options: list[str]):
    shutil.copytree(APPS / "django", tmp_path, dirs_exist_ok=True)
    (view,) = (code for code in pages.blocks(pages.ROOT / "docs" / "django.md", "python") if "def unlock" in code)
    at = psycopg.conninfo.conninfo_to_dict(bare(server.url()))
    where = {"USER": at["user"], "HOST": at["host"], "PORT": at["port"], "NAME": f"of_{uuid4().hex}"}
    settings = f"""
from settings import *
DATABASES["default"] |= {where}
TEST_RUNNER = "shop.runner.Runner"
"""
    # and a column of the ledger's that the models have, as with the snippet
    operation = "migrations.AddField('workshop', 'credit_consumed_at', models.DateTimeField(null=True))"
    migration = f"""
from django.db import migrations, models
class Migration(migrations.Migration):
    dependencies = [("shop", "0001_initial")]
    operations = [migrations.SeparateDatabaseAndState(state_operations=[{operation}])]
"""
    model = (tmp_path / "shop/models.py").read_text() + "    credit_consumed_at = models.DateTimeField(null=True)\n"
    files = pages.files_of("testing.md", "Django's test runner")
    files["shop/test_more.py"] = files["shop/tests.py"].replace("class Unlock", "class Again")  # a process for each
    added = {"shop/views.py": view, "for_tests.py": settings, "shop/models.py": model}
    pages.write(tmp_path, files | added | {"shop/migrations/0002_ledger.py": migration})
    done = subprocess.run(
        [sys.executable, "-m", "django", "test", *options, "shop.tests", "shop.test_more"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tmp_path), "DJANGO_SETTINGS_MODULE": "for_tests"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "Ran 2 tests" in done.stderr


def test_without_pytest(tmp_path: Path, world: World, server: Server):
    """And of a migrated database's dump, as the page writes it."""
    dump = server.command("pg_dump")
    for options in ("--schema-only", "--data-only --inserts --schema=tallystick"):
        with (tmp_path / "schema.sql").open("ab") as file:
            subprocess.run([*dump, *options.split(), bare(world.url)], env=server.env, stdout=file, check=True)
    pages.write(tmp_path, pages.files_of("testing.md", "Without pytest"))
    environ = os.environ | {"DATABASE_URL": bare(world.url)}
    done = subprocess.run([sys.executable, "alone.py"], cwd=tmp_path, env=environ, stderr=subprocess.PIPE, check=False)
    assert done.returncode == 0, done.stderr.decode()


def test_a_project_without_a_schema_is_told_how_to_write_one(tmp_path: Path, server: Server):
    test = "def test_it(tallystick_db): pass"
    done = run_pytest(pages.write(tmp_path, {"test_it.py": test}), "--tallystick-url", server.url())
    assert outcomes(done) == {"error": 1}
    assert "def tallystick_schema():" in done.stdout
    assert "Traceback" not in done.stdout


@pytest.mark.parametrize(
    ("address", "message"),
    [("", "TALLYSTICK_PG_BIN is"), ("mysql://db/app", "'mysql'"), ("postgresql:///app?host=/nowhere", "/nowhere")],
)
def test_a_server_that_cannot_be_had_is_told_with_the_ways_to_another(tmp_path: Path, address: str, message: str):
    files = {"conftest.py": SCHEMA, "test_it.py": "def test_it(tallystick_db): pass"}
    environ = {"TALLYSTICK_TEST_DATABASE_URL": address, "TALLYSTICK_PG_BIN": str(tmp_path)}
    done = run_pytest(pages.write(tmp_path, files), **environ)
    assert outcomes(done) == {"error": 1}
    assert message in done.stdout
    assert "pytest --tallystick-url ADDRESS" in done.stdout
    assert "Traceback" not in done.stdout


TESTS = """
def test_one(tallystick_db):
    assert tallystick_db.balance(tallystick_db.funded(credits=2)) == 2

def test_another(tallystick_db):
    print("ADDRESS", tallystick_db.url)
    assert tallystick_db.balance(tallystick_db.indebted(credits=2)) == -2
"""


def test_the_embedded_server_is_the_default_and_gone_afterwards(tmp_path: Path):
    done = run_pytest(pages.write(tmp_path, {"conftest.py": SCHEMA, "test_it.py": TESTS, "pytest.ini": INI}), "-s")
    assert outcomes(done) == {"passed": 2}, done.stdout
    at = psycopg.conninfo.conninfo_to_dict(re.search(r"ADDRESS (\S+)", done.stdout)[1])
    assert not Path(at["host"]).exists()


def test_processes_of_one_run_share_a_server(tmp_path: Path, server: Server):
    files = {"conftest.py": SCHEMA, "test_it.py": TESTS, "pytest.ini": INI}
    done = run_pytest(pages.write(tmp_path, files), "-n", "2", TALLYSTICK_TEST_DATABASE_URL=server.url(driver=""))
    assert outcomes(done) == {"passed": 2}, done.stdout
    with psycopg.connect(server.url(driver="")) as conn:
        left = conn.execute("SELECT datname FROM pg_database WHERE starts_with(datname, 'tallystick_test_')").fetchall()
    assert left == []


def test_a_fault_fails_the_test_with_the_audits_words(tmp_path: Path, server: Server):
    test = """
def test_it(tallystick_db):
    user = tallystick_db.funded(credits=5)
    tallystick_db.conn.exec_driver_sql("UPDATE users SET credit_balance = 6")
    tallystick_db.assert_balanced()
"""
    done = run_pytest(
        pages.write(tmp_path, {"conftest.py": SCHEMA, "test_it.py": test}), "--tallystick-url", server.url()
    )
    assert outcomes(done) == {"failed": 1}
    assert re.search(r"^E +likely cause ", done.stdout, re.MULTILINE)
