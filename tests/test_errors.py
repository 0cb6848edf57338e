"""The exception tree: drawn as it is, with fields, and whole after a trip between processes."""

from __future__ import annotations

import inspect
import pickle
import re

import pytest

import tallystick
from tallystick import errors
from tallystick.accounts import Accounts
from tallystick.errors import InsufficientCredits, TallystickError
from tallystick.ledger import Ledger
from tallystick.ledger.connections import Operation
from tallystick.ledger.functions import declared
from tallystick.ledger.outcomes import DONE, REPLAYED
from tallystick.ledger.reference import outcomes_of

pytestmark = pytest.mark.one_server

TREE = [kind for _, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, TallystickError)]


def outcomes_of_operations() -> dict[str, tuple[str, set[str]]]:
    """Function → docstring of its operation, and its refusals."""
    functions = {function.name for function in declared()}
    return {
        name: (inspect.getdoc(operation) or "", set(outcomes_of(name)) - {DONE, REPLAYED})
        for owner in (Ledger, Accounts)
        for name, operation in vars(owner).items()
        if isinstance(operation, Operation) and name in functions
    }


def test_the_tree_in_the_docstring_is_the_tree_in_the_code():
    drawn = {}
    stack: list[str] = []
    for line in errors.__doc__.splitlines():
        if found := re.match(r"    ([│├└─ ]*)([A-Z]\w+)", line):
            depth = len(found[1]) // 4
            stack[depth:] = [found[2]]
            drawn[found[2]] = stack[depth - 1] if depth else None
    assert drawn == {kind.__name__: None if kind is TallystickError else kind.__mro__[1].__name__ for kind in TREE}


@pytest.mark.parametrize("kind", TREE, ids=lambda kind: kind.__name__)
def test_each_has_a_sentence_of_its_own(kind):
    assert kind.__doc__
    assert kind.__doc__ not in (parent.__doc__ for parent in kind.__mro__[1:])


def test_fields_are_attributes_and_survive_pickling():
    error = InsufficientCredits("user 7 has 1 credit", user=7, balance=1, required=2)
    again = pickle.loads(pickle.dumps(error))
    assert (type(again), str(again)) == (InsufficientCredits, "user 7 has 1 credit")
    assert (again.user, again.balance, again.required) == (7, 1, 2)


def test_a_field_that_was_left_out_is_none():
    error = errors.ConfigError("no plan has an allowance", key="allowances")
    assert (error.path, error.line, error.key) == (None, None, "allowances")
    assert errors.DatabaseUnavailable("closed").sqlstate is None
    assert errors.NotMigrated("no schema").revision is None


def test_a_bad_argument_is_a_value_error_too():
    assert issubclass(errors.InvalidArgument, ValueError)


@pytest.mark.parametrize("function", sorted(set(outcomes_of_operations()) - {"consume_many"}))
def test_an_operation_lists_its_refusals(function):
    """``consume_many`` returns refusals as values; ``LedgerInconsistent`` is a fault, which any of them may find."""
    doc, refused = outcomes_of_operations()[function]
    named = {"".join(word.capitalize() for word in outcome.split("_")) for outcome in refused}
    assert {name for name in named - {"LedgerInconsistent"} if not re.search(rf"\b{name}\b", doc)} == set()


def test_public_names_are_there_and_documented():
    assert sorted(tallystick.__all__) == tallystick.__all__
    for name in tallystick.__all__:
        assert inspect.getdoc(getattr(tallystick, name)), name
