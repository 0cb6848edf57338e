"""Writes that the database itself refuses to every role: each constraint, each rule of the append-only trigger."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import psycopg
import pytest
import sqlalchemy as sa
from hosts import HOSTS, App

from tallystick import Config, HostMapping, migrate
from tallystick.dev.postgres import Server
from tallystick.schema import CHECKS

USER = "(SELECT id FROM users WHERE email = 'user 1')"
WORKSHOP = "(SELECT id FROM workshops WHERE title = 'of user 1')"

DEFAULTS = {
    "id": "gen_random_uuid()",
    "user_id": USER,
    "type": "'purchase'",
    "status": "'completed'",
    "amount": "3",
    "balance_after": "3",
    "sequence": "1",
    "description": "'row'",
    "completed_at": "now()",
}
PENDING = {"status": "'pending'", "balance_after": "NULL", "sequence": "NULL", "completed_at": "NULL"}
CONSUMPTION = {"type": "'consumption'", "amount": "-1", "balance_after": "2", "sequence": "2"}
PURCHASE_ID = "'00000000-0000-0000-0000-00000000000a'"


def insert(**values: str) -> str:
    row = {**DEFAULTS, **values}
    return f"INSERT INTO credit_transactions ({', '.join(row)}) SELECT {', '.join(row.values())}"


def with_rows(app: App) -> App:
    """A completed purchase of three credits, and a pending one."""
    app.run(
        insert(id=PURCHASE_ID, workshop_id=WORKSHOP, stripe_session_id="'cs_1'"),
        insert(description="'pending'", **PENDING),
    )
    return app


@pytest.fixture
def ledger(migrated: App) -> App:
    return with_rows(migrated)


@pytest.fixture(scope="module")
def unwritten(server: Server, _migrated: Callable[[str, HostMapping], str]) -> Iterator[App]:
    """The same, one for all tests whose writes are refused, which leave it as it was."""
    case = HOSTS["uuid"]
    url = server.create_database("unwritten", template=_migrated(case.ddl, case.mapping))
    yield with_rows(App(url, Config(database_url=url, host=case.mapping), server))
    server.drop_database("unwritten")


def refused(app: App, statement: str) -> psycopg.Error:
    with pytest.raises(sa.exc.DBAPIError) as caught:
        app.run(statement)
    assert isinstance(caught.value.orig, psycopg.Error)
    return caught.value.orig


FORBIDDEN_ROWS = [
    ("type", {"amount": "0"}),
    ("type", {"amount": "-3"}),
    ("type", {**CONSUMPTION, "amount": "1"}),
    ("type", {"type": "'refund'", "amount": "1", "refund_of": PURCHASE_ID}),
    ("status", {"balance_after": "NULL"}),
    ("status", {"sequence": "NULL"}),
    ("status", {"completed_at": "NULL"}),
    ("status", {**PENDING, "balance_after": "3"}),
    ("status", {**PENDING, "sequence": "5"}),
    ("status", {**PENDING, "completed_at": "now()"}),
    ("status", {**PENDING, "status": "'failed'", "completed_at": "now()"}),
    ("type", {**CONSUMPTION, **PENDING}),
    (
        "type",
        {**PENDING, "status": "'failed'", "type": "'refund'", "amount": "-1", "refund_of": PURCHASE_ID},
    ),
    ("status", {"sequence": "0"}),
    ("type", {**CONSUMPTION, "balance_after": "-1"}),
    ("type", {"type": "'refund'", "amount": "-1", "sequence": "2"}),
    ("type", {**CONSUMPTION, "refund_of": PURCHASE_ID}),
    ("paid", {"sequence": "2", "amount_paid": "100"}),
    ("paid", {"sequence": "2", "currency": "'usd'"}),
    ("paid", {"sequence": "2", "amount_paid": "-1", "currency": "'usd'"}),
    ("paid", {"sequence": "2", "amount_paid": "1", "currency": "'USD'"}),
    ("type", {"type": "'correction'", "amount": "-1", "sequence": "2"}),
    ("type", {"type": "'reversal'", "amount": "1", "sequence": "2"}),
    ("type", {**PENDING, "type": "'expiry'", "amount": "-1", "refund_of": PURCHASE_ID}),
    ("type", {"type": "'transfer'", "sequence": "2"}),
    ("type", {"type": "'transfer'", "amount": "0", "sequence": "2", "refund_of": PURCHASE_ID}),
    ("type", {**PENDING, "type": "'transfer'", "refund_of": PURCHASE_ID}),
    ("held", {"sequence": "2", "held": "3", "expires_at": "now()"}),
    ("held", {**CONSUMPTION, **PENDING, "held": "1"}),
    ("held", {**CONSUMPTION, **PENDING, "held": "0", "expires_at": "now()"}),
    ("held", {**CONSUMPTION, "capture_limit": "1"}),
    ("pkey", {"id": PURCHASE_ID, "sequence": "2"}),
    ("sequence", {}),  # the number is taken
    ("stripe_session", {"sequence": "2", "stripe_session_id": "'cs_1'"}),
    ("user_fk", {"user_id": "gen_random_uuid()", "sequence": "2"}),
    ("workshop_fk", {**CONSUMPTION, "workshop_id": "gen_random_uuid()"}),
    ("refund_fk", {"type": "'refund'", "amount": "-1", "sequence": "2", "refund_of": "gen_random_uuid()"}),
]


@pytest.mark.parametrize(("constraint", "values"), FORBIDDEN_ROWS)
def test_a_row_that_breaks_a_rule_is_refused(unwritten: App, constraint: str, values: dict[str, str]) -> None:
    assert refused(unwritten, insert(**values)).diag.constraint_name == f"credit_transactions_{constraint}"


def test_every_check_has_its_forbidden_row() -> None:
    assert {constraint for constraint, _ in FORBIDDEN_ROWS} >= set(CHECKS)


def test_a_key_serves_once_for_each_user(ledger: App) -> None:
    ledger.run(insert(**CONSUMPTION, idempotency_key="'k'"))
    other = "(SELECT id FROM users WHERE email = 'user 2')"
    ledger.run(insert(user_id=other, idempotency_key="'k'"))

    error = refused(ledger, insert(**{**CONSUMPTION, "sequence": "3"}, idempotency_key="'k'"))

    assert error.diag.constraint_name == "credit_transactions_idempotency_key"


def test_a_refund_may_leave_a_debt(ledger: App) -> None:
    ledger.run(insert(type="'refund'", amount="-3", balance_after="-1", sequence="2", refund_of=PURCHASE_ID))
    assert ledger.value("SELECT balance_after FROM credit_transactions WHERE type = 'refund'") == -1


def test_every_identity_of_a_stripe_customer_is_unique(ledger: App) -> None:
    ledger.run("UPDATE users SET stripe_customer_id = 'cus_1' WHERE email = 'user 1'")
    error = refused(ledger, "UPDATE users SET stripe_customer_id = 'cus_1' WHERE email = 'user 2'")
    assert error.diag.constraint_name == "tallystick_users_stripe_customer_id"


def test_a_user_with_history_stays(unwritten: App) -> None:
    assert refused(unwritten, "DELETE FROM users WHERE email = 'user 1'").sqlstate in ("23001", "23503")


DONE, WAITING = "description = 'row'", "description = 'pending'"
COMPLETE = "status = 'completed', balance_after = 6, sequence = 2, completed_at = now()"

FORBIDDEN_CHANGES = [
    (f"DELETE FROM credit_transactions WHERE {WAITING}", "delete is refused"),
    ("TRUNCATE credit_transactions", "truncate is refused"),
    ("TRUNCATE users CASCADE", "truncate is refused"),
    *(
        (f"UPDATE credit_transactions SET {change} WHERE {WAITING}", "what the row is about")
        for change in (
            "id = gen_random_uuid()",
            "user_id = (SELECT id FROM users WHERE email = 'user 2')",
            "type = 'consumption'",
            f"refund_of = {PURCHASE_ID}",
            "idempotency_key = 'k'",
            "created_at = created_at + interval '1 s'",
        )
    ),
    *(
        (f"UPDATE credit_transactions SET {change}", "a change of amount")
        for change in (
            f"amount = 4 WHERE {WAITING}",
            f"amount = 4, status = 'failed' WHERE {WAITING}",
            f"amount = 4 WHERE {DONE}",
        )
    ),
    (f"UPDATE credit_transactions SET workshop_id = NULL WHERE {DONE}", "workshop_id"),
    (f"UPDATE credit_transactions SET workshop_id = {WORKSHOP} WHERE {WAITING}", "workshop_id"),
    (f"UPDATE credit_transactions SET stripe_session_id = NULL WHERE {DONE}", "what Stripe said"),
    (f"UPDATE credit_transactions SET stripe_session_id = 'cs_2' WHERE {DONE}", "what Stripe said"),
    *(
        (f"UPDATE credit_transactions SET {change} WHERE {DONE}", "without a step of its status")
        for change in (
            "balance_after = 4",
            "sequence = 2",
            "completed_at = completed_at + interval '1 s'",
            "description = 'other'",
        )
    ),
    (f"UPDATE credit_transactions SET status = 'pending' WHERE {DONE}", "from completed to pending"),
    (f"UPDATE credit_transactions SET status = 'failed' WHERE {DONE}", "from completed to failed"),
]


@pytest.mark.parametrize(("statement", "reason"), FORBIDDEN_CHANGES)
def test_history_is_never_edited(unwritten: App, statement: str, reason: str) -> None:
    before = unwritten.rows("SELECT * FROM credit_transactions ORDER BY id")

    error = refused(unwritten, statement)

    assert error.sqlstate == "23001"
    assert reason in str(error.diag.message_primary)
    assert "further row" in str(error.diag.message_hint)
    assert unwritten.rows("SELECT * FROM credit_transactions ORDER BY id") == before


@pytest.mark.parametrize("column", ["stripe_session_id", "stripe_payment_intent_id", "stripe_price_id"])
def test_what_stripe_says_is_written_once(ledger: App, column: str) -> None:
    ledger.run(f"UPDATE credit_transactions SET {column} = 'x' WHERE {WAITING}")
    ledger.run(f"UPDATE credit_transactions SET {column} = 'x' WHERE {WAITING}")
    assert refused(ledger, f"UPDATE credit_transactions SET {column} = 'y' WHERE {WAITING}").sqlstate == "23001"


def test_what_was_paid_is_written_once(ledger: App) -> None:
    ledger.run(f"UPDATE credit_transactions SET amount_paid = 100, currency = 'usd' WHERE {DONE}")
    for change in ("amount_paid = 200", "currency = 'eur'", "amount_paid = NULL, currency = NULL"):
        assert refused(ledger, f"UPDATE credit_transactions SET {change} WHERE {DONE}").sqlstate == "23001"


def test_a_number_that_the_buyer_chose_is_written_when_it_is_paid(ledger: App) -> None:
    ledger.run(f"UPDATE credit_transactions SET amount = 4, {COMPLETE} WHERE {WAITING}")
    assert ledger.value(f"SELECT amount FROM credit_transactions WHERE {WAITING}") == 4


STATES = ("pending", "completed", "failed")
ALLOWED = {("pending", "completed"), ("pending", "failed"), ("failed", "completed")}
FIELDS = {
    "pending": "status = 'pending', balance_after = NULL, sequence = NULL, completed_at = NULL",
    "completed": COMPLETE,
    "failed": "status = 'failed', balance_after = NULL, sequence = NULL, completed_at = NULL",
}


@pytest.mark.parametrize("after", STATES)
@pytest.mark.parametrize("before", STATES)
def test_the_steps_of_a_purchase(ledger: App, before: str, after: str) -> None:
    if before != "pending":
        ledger.run(f"UPDATE credit_transactions SET {FIELDS[before]} WHERE {WAITING}")
    step = f"UPDATE credit_transactions SET {FIELDS[after]} WHERE {WAITING}"
    if (before, after) in ALLOWED:
        ledger.run(f"{step[: step.index(' WHERE')]}, description = 'by another name' WHERE {WAITING}")
        assert ledger.value("SELECT status FROM credit_transactions WHERE description = 'by another name'") == after
    elif before == after:
        ledger.run(f"UPDATE credit_transactions SET status = status WHERE {WAITING}")
    else:
        assert refused(ledger, step).sqlstate == "23001"


def test_a_deleted_workshop_leaves_its_history(ledger: App) -> None:
    ledger.run("DELETE FROM workshops WHERE title = 'of user 1'")
    assert ledger.rows("SELECT workshop_id, amount FROM credit_transactions WHERE description = 'row'") == [(None, 3)]


def test_the_rules_hold_in_a_schema_of_its_own(make_app: Callable[..., App]) -> None:
    case = HOSTS["quoted, reserved and in schemas"]
    app = make_app(case.ddl, case.mapping)
    migrate.apply(app.url, app.config)
    app.run(
        'INSERT INTO app."User" (id, "order") VALUES (\'00000000-0000-0000-0000-000000000001\', 1)',
        "INSERT INTO app.credit_transactions (id, user_id, type, status, amount, description) SELECT"
        " gen_random_uuid(), id, 'purchase', 'pending', 1, 'x' FROM app.\"User\"",
        "UPDATE app.credit_transactions SET status = 'failed'",
    )
    assert refused(app, "UPDATE app.credit_transactions SET status = 'pending'").sqlstate == "23001"
