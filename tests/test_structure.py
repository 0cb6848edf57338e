"""The house: one name for one thing, imports that are allowed, and docstrings that begin with the thing itself."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
import tomllib
from collections import defaultdict
from functools import cache
from pathlib import Path

import pytest
import typer
import yaml

import tallystick
from tallystick import Accounts, Ledger, cli
from tallystick.allowances import Allowances
from tallystick.ledger.connections import Operation

pytestmark = pytest.mark.one_server  # it is about the sources

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "tallystick"
MODULES = sorted(PACKAGE.rglob("*.py"))


@cache
def trees() -> dict[Path, ast.Module]:
    """The modules of the package as Python reads them; once, and not in each process that collects the tests."""
    return {module: ast.parse(module.read_text(encoding="utf-8")) for module in MODULES}


OPENINGS = ("What", "Who", "Whose", "Whom", "Whether", "Where", "How", "Which", "When")
"""A sentence that opens with one of these tells its subject last."""


def duplicates(names: dict[str, list[str]]) -> dict[str, list[str]]:
    return {name: where for name, where in names.items() if len(where) > 1}


def test_no_file_name_stands_for_two_things():
    names = defaultdict(list)
    for module in MODULES:
        if module.name not in {"__init__.py", "__main__.py"}:  # Python's own
            names[module.name].append(str(module.relative_to(PACKAGE)))
    assert duplicates(names) == {}


def test_no_class_name_stands_for_two_things():
    names = defaultdict(list)
    for module, tree in trees().items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                names[node.name].append(str(module.relative_to(PACKAGE)))
    assert duplicates(names) == {}


def docstrings(tree: ast.Module) -> list[str]:
    """Of the module, its classes and functions, and of its constants: a text that stands behind one."""
    found = []
    for node in ast.walk(tree):
        for statement in getattr(node, "body", []) if not isinstance(node, ast.Lambda | ast.IfExp) else []:
            match statement:
                case ast.Expr(value=ast.Constant(value=str(text))):
                    found.append(text)
    return found


@pytest.mark.parametrize("folder", ["src", "tests", "benchmarks", "tools", "examples"])
def test_a_docstring_begins_with_the_thing_itself(folder: str):
    opening = re.compile(rf"({'|'.join(OPENINGS)})\b")
    trees = [ast.parse(file.read_text(encoding="utf-8")) for file in (ROOT / folder).rglob("*.py")]
    assert len(trees) > 2
    assert [text.splitlines()[0] for tree in trees for text in docstrings(tree) if opening.match(text)] == []


def test_a_released_revision_imports_nothing_that_changes():
    """All but the standard library, psycopg's composition of SQL and earlier revisions is today's code."""
    allowed = {"__future__", "collections.abc", "typing", "psycopg.sql", "tallystick.migrate.versions"}
    for module in (PACKAGE / "migrate" / "versions").glob("*.py"):
        imported = {
            name
            for node in ast.walk(trees()[module])
            for name in (
                [node.module]
                if isinstance(node, ast.ImportFrom)
                else [alias.name for alias in node.names]
                if isinstance(node, ast.Import)
                else []
            )
        }
        assert imported <= allowed, module


def test_every_room_stands_in_the_order_of_imports():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    layers = settings["tool"]["importlinter"]["contracts"][0]["layers"]
    ordered = set(re.findall(r"tallystick\.(\w+)", " ".join(layers)))
    rooms = {path.stem if path.is_file() else path.name for path in PACKAGE.iterdir()}
    assert rooms - {"__init__", "__pycache__", "py", "__main__"} - ordered == set()


@pytest.mark.parametrize(
    ("statement", "without"),
    [
        ("import tallystick", {"sqlalchemy", "pydantic", "alembic", "psycopg", "typer"}),
        ("from tallystick import Ledger, Config, Accounts, verify", {"sqlalchemy", "psycopg", "alembic", "typer"}),
        ("import tallystick.cli", {"alembic", "fastapi", "stripe", "tallystick.migrate", "tallystick.dev"}),
        ("import tallystick.cli.ledger", {"alembic", "stripe", "tallystick.migrate", "tallystick.audit"}),
        ("import tallystick.cli.ledger", {"sqlalchemy", "fastapi", "rich"}),
        ("import tallystick.pytest_plugin", {"sqlalchemy", "pydantic", "alembic", "psycopg", "typer"}),
        ("import tallystick.testing", {"pytest", "typer", "fastapi", "stripe"}),
    ],
)
def test_an_import_brings_only_what_it_needs(statement: str, without: set[str]):
    script = f"{statement}; import sys; print(*sys.modules)"
    loaded = set(
        subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split()
    )
    assert loaded & without == set()


def module_of(command):
    while hasattr(command, "commands"):
        command = next(iter(command.commands.values()))
    return command.callback.__module__.removeprefix("tallystick.cli.")


def test_each_command_is_looked_for_in_its_own_module():
    """The command line imports that one alone."""
    found = defaultdict(set)
    for name, command in typer.main.get_command(cli.commands()).commands.items():
        found[module_of(command)].add(name)
    assert found == {module: set(names) for module, names in cli.MODULES.items()}


@pytest.mark.parametrize("name", sorted(name for names in cli.MODULES.values() for name in names))
def test_a_command_is_made_where_it_is_requested(name: str):
    """And of those that are imported by now, it alone."""
    assert list(typer.main.get_command(cli.commands(["--config", "x", name, "show"])).commands) == [name]


def test_all_commands_are_there_where_none_is_requested():
    """For the whole help, and to suggest one for a misspelt name beside a word that is another command's."""
    every = cli.commands()
    for words in ([], ["--help", "balance"], ["user", "restore", "2"], ["--database-url", "balance"]):
        assert cli.commands(words) is every


def test_every_public_name_is_there():
    assert {name: hasattr(tallystick, name) for name in tallystick.__all__} == dict.fromkeys(tallystick.__all__, True)
    assert set(tallystick.__all__) <= set(dir(tallystick))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        tallystick.nothing  # noqa: B018


# --- the tests and the workflows ---

ASSERTING = {
    "tests/stripe_sales/test_machine.py": "the state machine that it runs does",
    "tests/test_docs.py": "the blocks of a page do",
    "tests/test_mapping.py": "verify raises what is wrong",
    "tests/typescript/test_typescript_client.py": "the program of Node does",
    "tests/web/browser/test_buyer.py": "Playwright's expect does",
}
"""Files with a test that leaves it to something else to fail."""


def test_every_operation_has_its_types_checked():
    """On a connection of either kind, in ``typed_api.py``."""
    called: dict[bool, set[str]] = {False: set(), True: set()}
    for function in ast.parse((ROOT / "tests" / "typed_api.py").read_text(encoding="utf-8")).body:
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
            called[isinstance(function, ast.AsyncFunctionDef)] |= {
                node.func.attr
                for node in ast.walk(function)
                if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
            }
    operations = {
        name for kind in (Ledger, Accounts) for name, value in vars(kind).items() if isinstance(value, Operation)
    }
    assert len(operations) > 30
    assert [operations - names for names in called.values()] == [set(), set()]
    assert {name for name, value in vars(Allowances).items() if name[0] != "_" and callable(value)} <= called[False]


def test_each_licence_of_what_is_vendored_is_in_the_package_and_the_readme():
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["license-files"]
    packed = {file for pattern in patterns for file in ROOT.glob(pattern)}
    readme = (ROOT / "README.md").read_text(encoding="utf-8").lower()
    licences = {file for file in PACKAGE.rglob("*LICENSE*") if file.is_file()}
    assert len(licences) == 3
    assert packed == licences | {ROOT / "LICENSE"}
    for file in licences:
        assert file.name.removeprefix("LICENSE-").partition("-")[0].lower() in readme


def test_the_readme_of_a_release_links_to_the_files_of_its_tag():
    """An index shows the readme alone, where a relative link leads nowhere."""
    address = {"GITHUB_SERVER_URL": "https://git.example", "GITHUB_REPOSITORY": "owner/name"}
    command = [sys.executable, "-m", "hatchling", "metadata"]
    shown = subprocess.run(command, cwd=ROOT, env=os.environ | address, check=True, capture_output=True, text=True)
    package = json.loads(shown.stdout)
    assert package["urls"]["Issues"] == "https://git.example/owner/name/issues"
    links = re.findall(r"\]\((?!#)([^)]*)\)", package["readme"]["text"])
    tag = rf"https://git\.example/owner/name/(?:blob|raw)/v{re.escape(package['version'])}/([^#]+)(#.+)?"
    targets = [re.fullmatch(tag, link) for link in links]
    assert len(targets) > 20
    assert [target for target in targets if target is None or not (ROOT / target[1]).exists()] == []


def checks(function: ast.AST, helpers: set[str]) -> bool:
    """True where a function asserts, expects an error, or calls a function beside it that does."""
    return any(
        isinstance(node, ast.Assert)
        or (isinstance(node, ast.Attribute) and node.attr in ("raises", "fail", "warns"))
        or (isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", None)) in helpers)
        for node in ast.walk(function)
    )


def test_every_test_can_fail():
    silent = set()
    for file in sorted((ROOT / "tests").rglob("test_*.py")):
        functions = [
            node for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))) if isinstance(node, FUNCTIONS)
        ]
        helpers = {one.name for one in functions if checks(one, set())}
        if any(one.name.startswith("test_") and not checks(one, helpers) for one in functions):
            silent.add(str(file.relative_to(ROOT)))
    assert silent == set(ASSERTING)


FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


@pytest.mark.parametrize("name", ["ci.yml", "release.yml"])
def test_a_workflow_runs_what_is_there(name: str):
    """Every make target that it runs is one, and every job has a runner and steps that do something."""
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / name).read_text(encoding="utf-8"))
    targets = set(re.findall(r"^([\w-]+):(?!=)", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    assert {"name", True, "jobs"} <= workflow.keys()  # YAML reads the key `on` as true
    for job in workflow["jobs"].values():
        assert job["runs-on"]
        for step in job["steps"]:
            assert ("run" in step) != ("uses" in step), step
            assert set(re.findall(r"\bmake ([\w-]+)", step.get("run", ""))) <= targets, step
            assert re.fullmatch(r"[\w.-]+/[\w./-]+@[\w./-]+", step.get("uses", "a/b@v1")), step
