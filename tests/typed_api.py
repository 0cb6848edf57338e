"""The public API as a type checker sees it: nothing here is run, mypy reads it in ``make check``.

``tests/test_structure.py`` looks that each operation is called on a connection of both kinds.
"""

import datetime as dt
from collections.abc import Awaitable
from concurrent.futures import Future
from typing import Any, assert_type
from uuid import UUID

import psycopg
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession
from sqlalchemy.orm import Session, scoped_session

from tallystick import (
    Access,
    AccessReason,
    Accounts,
    Combiner,
    Config,
    Consume,
    CreditTransaction,
    Event,
    HostMapping,
    InsufficientCredits,
    Ledger,
    Lot,
    Merged,
    Progress,
    Standing,
    errors,
    verify,
)
from tallystick.accounts import Account
from tallystick.allowances import Allowances, Paid, RefusedAllowance
from tallystick.audit import AuditReport, audit
from tallystick.errors import Key, LedgerError

Sync = sa.Connection | Session | scoped_session[Any] | psycopg.Connection[Any]
Async = AsyncConnection | AsyncSession | psycopg.AsyncConnection[Any]


def connections(
    ledger: Ledger,
    user: Key,
    connection: sa.Connection,
    session: Session,
    scoped: "scoped_session[Session]",
    bare: psycopg.Connection,
) -> None:
    assert_type(ledger.balance(connection, user), int)
    assert_type(ledger.balance(session, user), int)
    assert_type(ledger.balance(scoped, user), int)
    assert_type(ledger.balance(bare, user), int)


async def async_connections(
    ledger: Ledger, user: Key, connection: AsyncConnection, session: AsyncSession, bare: psycopg.AsyncConnection
) -> None:
    assert_type(ledger.balance(connection, user), Awaitable[int])
    assert_type(await ledger.balance(connection, user), int)
    assert_type(await ledger.balance(session, user), int)
    assert_type(await ledger.balance(bare, user), int)


def ledger_operations(ledger: Ledger, conn: Sync, user: Key, purchase: UUID, now: dt.datetime) -> None:
    assert_type(ledger.start_purchase(conn, user, credits=3, description="Three"), CreditTransaction)
    assert_type(ledger.attach_session(conn, user, purchase, stripe_session_id="cs_1"), CreditTransaction)
    assert_type(ledger.complete_purchase(conn, user, purchase=purchase), CreditTransaction)
    assert_type(ledger.fail_purchase(conn, user, purchase=purchase, reason="expired"), CreditTransaction)
    assert_type(ledger.consume(conn, user, key="k"), CreditTransaction)
    assert_type(ledger.consume_many(conn, [Consume(user, key="k")]), list[CreditTransaction | LedgerError])
    assert_type(ledger.refund(conn, user, purchase, key="k"), CreditTransaction)
    assert_type(ledger.reinstate(conn, user, purchase, key="k"), CreditTransaction)
    assert_type(ledger.grant(conn, user, credits=3, key="k", description="Welcome"), CreditTransaction)
    assert_type(ledger.reverse(conn, user, purchase, key="k"), CreditTransaction)
    assert_type(ledger.correct(conn, user, purchase, key="k"), CreditTransaction)
    assert_type(ledger.hold(conn, user, credits=3, key="k"), CreditTransaction)
    assert_type(ledger.capture(conn, user, purchase, credits=2), CreditTransaction)
    assert_type(ledger.release(conn, user, purchase), CreditTransaction)
    assert_type(ledger.sweep(conn), int)
    assert_type(ledger.merge(conn, user, into=user, key="k"), Merged)
    assert_type(ledger.standing(conn, user), Standing)
    assert_type(ledger.lots(conn, user), list[Lot])
    assert_type(ledger.balance(conn, user), int)
    assert_type(ledger.balance_at(conn, user, now), int)
    assert_type(ledger.history(conn, user, limit=10), list[CreditTransaction])
    assert_type(ledger.events(conn), list[Event])
    assert_type(ledger.access(conn, user), Access)
    assert_type(ledger.lock(conn, user), int)
    assert_type(ledger.close_days(conn), int)


async def async_ledger_operations(ledger: Ledger, conn: Async, user: Key, purchase: UUID, now: dt.datetime) -> None:
    assert_type(await ledger.start_purchase(conn, user, credits=3, description="Three"), CreditTransaction)
    assert_type(await ledger.attach_session(conn, user, purchase, stripe_session_id="cs_1"), CreditTransaction)
    assert_type(await ledger.complete_purchase(conn, user, purchase=purchase), CreditTransaction)
    assert_type(await ledger.fail_purchase(conn, user, purchase=purchase, reason="expired"), CreditTransaction)
    assert_type(await ledger.consume(conn, user, key="k"), CreditTransaction)
    assert_type(await ledger.consume_many(conn, [Consume(user, key="k")]), list[CreditTransaction | LedgerError])
    assert_type(await ledger.refund(conn, user, purchase, key="k"), CreditTransaction)
    assert_type(await ledger.reinstate(conn, user, purchase, key="k"), CreditTransaction)
    assert_type(await ledger.grant(conn, user, credits=3, key="k", description="Welcome"), CreditTransaction)
    assert_type(await ledger.reverse(conn, user, purchase, key="k"), CreditTransaction)
    assert_type(await ledger.correct(conn, user, purchase, key="k"), CreditTransaction)
    assert_type(await ledger.hold(conn, user, credits=3, key="k"), CreditTransaction)
    assert_type(await ledger.capture(conn, user, purchase, credits=2), CreditTransaction)
    assert_type(await ledger.release(conn, user, purchase), CreditTransaction)
    assert_type(await ledger.sweep(conn), int)
    assert_type(await ledger.merge(conn, user, into=user, key="k"), Merged)
    assert_type(await ledger.standing(conn, user), Standing)
    assert_type(await ledger.lots(conn, user), list[Lot])
    assert_type(await ledger.balance(conn, user), int)
    assert_type(await ledger.balance_at(conn, user, now), int)
    assert_type(await ledger.history(conn, user, limit=10), list[CreditTransaction])
    assert_type(await ledger.events(conn), list[Event])
    assert_type(await ledger.access(conn, user), Access)
    assert_type(await ledger.lock(conn, user), int)
    assert_type(await ledger.close_days(conn), int)


def account_operations(accounts: Accounts, conn: Sync, user: Key) -> None:
    assert_type(accounts.get(conn, user), Account)
    assert_type(accounts.complete_onboarding(conn, user), Account)
    assert_type(accounts.reset_onboarding(conn, user), Account)
    assert_type(accounts.set_plan_tier(conn, user, "pro"), Account)
    assert_type(accounts.set_stripe_customer(conn, user, "cus_1"), Account)
    assert_type(accounts.set_low_balance(conn, user, None), Account)
    assert_type(accounts.delete_user(conn, user), Account)
    assert_type(accounts.restore_user(conn, user), Account)
    assert_type(accounts.erase(conn, user), Account)
    accounts.delete_workshop(conn, user)
    accounts.restore_workshop(conn, user)


async def async_account_operations(accounts: Accounts, conn: Async, user: Key) -> None:
    assert_type(await accounts.get(conn, user), Account)
    assert_type(await accounts.complete_onboarding(conn, user), Account)
    assert_type(await accounts.reset_onboarding(conn, user), Account)
    assert_type(await accounts.set_plan_tier(conn, user, "pro"), Account)
    assert_type(await accounts.set_stripe_customer(conn, user, "cus_1"), Account)
    assert_type(await accounts.set_low_balance(conn, user, None), Account)
    assert_type(await accounts.delete_user(conn, user), Account)
    assert_type(await accounts.restore_user(conn, user), Account)
    assert_type(await accounts.erase(conn, user), Account)
    await accounts.delete_workshop(conn, user)
    await accounts.restore_workshop(conn, user)


def allowance_operations(
    allowances: Allowances, engine: sa.Engine, conn: sa.Connection | Session, user: Key, paid: Paid
) -> None:
    assert_type(allowances.give(conn, user), CreditTransaction | None)
    assert_type(allowances.give_paid(conn, user, paid), CreditTransaction | None)

    def progress(now: Progress) -> None:
        assert_type((now.step, now.done, now.total), tuple[str, float, float | None])

    result = allowances.run(engine, progress=progress)
    assert_type((result.users, result.refused), tuple[int, tuple[RefusedAllowance, ...]])
    assert_type(audit(engine.connect(), allowances.config, progress=progress), AuditReport)


def refused_by_a_type_checker(ledger: Ledger, connection: sa.Connection, user: Key) -> None:
    """Each line is an error to mypy; a comment that silences nothing is one too (``warn_unused_ignores``)."""
    ledger.balance("postgresql://", user)  # type: ignore[call-overload]
    ledger.balance(connection)  # type: ignore[call-overload]
    ledger.consume(connection, user)  # type: ignore[call-overload]
    ledger.consume(connection, user, amount=1, key="k")  # type: ignore[call-overload]
    ledger.grant(connection, user, credits="3", key="k", description="d")  # type: ignore[call-overload]


def results(row: CreditTransaction, standing: Standing, access: Access, lot: Lot, event: Event) -> None:
    assert_type(row.id, UUID)
    assert_type(row.user_id, UUID | str | int)
    assert_type(row.amount, int)
    assert_type(row.balance_after, int | None)
    assert_type(row.balance, int | None)
    assert_type(row.replayed, bool)
    assert_type(row.created_at, dt.datetime)
    assert_type(row.cursor, str)
    assert_type(standing.available, int)
    assert_type(access.open, bool)
    assert_type(access.reason, AccessReason)
    assert_type(lot.remaining, int)
    assert_type(event.balance_after, int | None)


def caught(ledger: Ledger, conn: sa.Connection, user: Key) -> None:
    try:
        ledger.consume(conn, user, key="k")
    except InsufficientCredits as error:
        assert_type(error.user, UUID | str | int)
        assert_type(error.balance, int)
        assert_type(error.held, int)
        assert_type(error.available, int)
        assert_type(error.required, int)
    except errors.StripeUnavailable as error:
        assert_type(error.status, int | None)
    except errors.RefundExceedsPurchase as error:
        assert_type(error.purchase, UUID)
        assert_type(error.left, int)
        assert_type(error.asked, int)
    except errors.InvalidArgument as error:
        assert_type(error.argument, str)
        assert_type(error.value, object)
    except errors.TallystickError as error:
        assert_type(error.retryable, bool)
        assert_type(error.outcome_unknown, bool)


async def around_the_ledger(engine: sa.Engine, conn: sa.Connection, config: Config, host: HostMapping) -> None:
    assert_type(Ledger(engine), Ledger)
    assert_type(Ledger(conn), Ledger)
    assert_type(Ledger(config), Ledger)
    assert_type(Accounts(host), Accounts)
    assert_type(audit(conn, config), AuditReport)
    verify(conn)
    with Combiner(Ledger(conn), engine) as combiner:
        assert_type(combiner.consume(1, key="k"), Future[CreditTransaction])
        assert_type(await combiner.aconsume(1, key="k"), CreditTransaction)
