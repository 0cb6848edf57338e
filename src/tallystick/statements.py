"""The ledger's SQL, built once per mapping with SQLAlchemy's expression language, since names are configuration.

``tests/golden/statements.sql`` shows each one compiled; read that first. The shape of every balance change::

    kept    AS (SELECT … FROM users WHERE key = :p_user FOR KEY SHARE SKIP LOCKED)        -- see take_turn
    mine    AS (SELECT … FROM users WHERE key = :p_user FOR NO KEY UPDATE SKIP LOCKED)
    turn    AS (SELECT pg_advisory_xact_lock(…))                                 -- unless the row is mine already
    account AS (SELECT … FROM users WHERE key = :p_user FOR NO KEY UPDATE)       -- then the workshop, in this order
    written AS (INSERT INTO credit_transactions SELECT … FROM account WHERE … ON CONFLICT DO NOTHING RETURNING …)
    moved   AS (UPDATE users SET credit_balance, credit_sequence FROM written)   -- and the workshop's mark
    SELECT … FROM written

A row back means done. The lock is the weakest that puts balance changes in a row: the host may still insert what
refers to the user, and two transactions that each start and complete a purchase do not deadlock. Each table is bound
by the user's key as a parameter of its own, never through a subselect, and nothing volatile stands in an UPDATE: such
a statement can run on tables distributed by user. Parameters are called ``p_…``, since SQLAlchemy takes one that is
named like a column for a value to SET.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import StrEnum
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql as pg

from tallystick.schema import (
    INT32_MAX,
    INT32_MIN,
    CreditTransactionStatus,
    CreditTransactionType,
    Schema,
    migration_log,
)

Condition = sa.ColumnElement[bool]


class _List(sa.TypeDecorator[Sequence[Any]]):
    """A list of ids, numbers or texts, sent as PostgreSQL writes an array.

    The driver asks for each item how it is to be sent, which for a list of a thousand takes longer than all else that
    the client does; here all items are of one type, and the cast that SQLAlchemy renders says which.
    """

    impl = pg.ARRAY
    cache_ok = True

    def bind_processor(self, dialect: sa.Dialect) -> Any:  # noqa: ARG002  # its name is the supertype's
        """A function from a list, whose items may be None, to the text."""
        return _array


def _array(items: Sequence[object]) -> str:
    return "{" + ",".join(["NULL" if item is None else _quoted(str(item)) for item in items]) + "}"


def _quoted(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def statements(schema: Schema) -> dict[str, sa.Executable]:
    """Every statement of the ledger by name, for one mapping."""
    return _Statements(schema).all()


def _text(words: str) -> sa.ColumnElement[str]:
    """A constant in the SQL itself, so that it is neither sent nor bound on each call."""
    return sa.literal_column(f"'{words}'", sa.Text())


def _label(label: StrEnum) -> sa.ColumnElement[Any]:
    return sa.literal_column(f"'{label}'")


PURCHASE, CONSUMPTION, REFUND, GRANT = map(_label, CreditTransactionType)
PENDING, COMPLETED, FAILED = map(_label, CreditTransactionStatus)
ONE, ZERO, NULL, LOWEST, HIGHEST = (
    sa.literal_column(str(value), sa.Integer()) for value in (1, 0, "NULL", INT32_MIN, INT32_MAX)
)

SPENT = ("balance_after", "sequence", "description", "created_at", "completed_at")
"""What a consumption tells of its row; the rest the caller knows, and each column costs both sides."""


def _hash(user: sa.ColumnElement[Any]) -> sa.ColumnElement[int]:
    """Whose turn it is, as the number that PostgreSQL locks by."""
    return sa.func.hashtextextended(sa.cast(user, sa.Text), ZERO)


class _Statements:
    def __init__(self, schema: Schema) -> None:
        self.schema = schema
        self.users = schema.users
        self.workshops = schema.workshops
        self.ledger = schema.credit_transactions
        row = self.row = self.ledger.c

        def bind(name: str, kind: sa.types.TypeEngine[Any]) -> sa.BindParameter[Any]:
            return sa.bindparam(f"p_{name}", type_=kind)

        self.p_user, self.p_workshop = bind("user", self.users.c.key.type), bind("workshop", row.workshop_id.type)
        self.p_id, self.p_purchase = bind("id", sa.Uuid()), bind("purchase", sa.Uuid())
        self.p_amount, self.p_description, self.p_key = (
            bind(n, row[c].type)
            for n, c in (("amount", "amount"), ("description", "description"), ("key", "idempotency_key"))
        )
        self.p_session, self.p_intent, self.p_price = (bind(name, sa.Text()) for name in ("session", "intent", "price"))

        # Lists, for what is asked or done many times in one statement; a single question is a list of one.
        def lists(alias: str, **kinds: sa.types.TypeEngine[Any]) -> sa.TableValuedAlias:
            arrays = (bind(f"{name}s", _List(kind)) for name, kind in kinds.items())
            columns = (sa.column(name, kind) for name, kind in kinds.items())
            return sa.func.unnest(*arrays).table_valued(*columns, with_ordinality="n").render_derived(name=alias)

        self.p_users = bind("users", _List(self.p_user.type))
        self.p_workshops = bind("workshops", _List(self.p_workshop.type))
        key, workshop, text = self.p_user.type, self.p_workshop.type, sa.Text()
        self.asked = lists("asked", user=key, key=text, purchase=sa.Uuid(), session=text, workshop=workshop)
        self.item = lists(
            "item", id=sa.Uuid(), user=key, workshop=workshop, amount=sa.Integer(), key=text, description=text
        )

        self.turn = self.take_turn()
        # Read with the lock, so as of now, whatever this statement waited for.
        locked = (
            sa.select(self.users.c.key.label("key"), self.users.c.credit_balance, self.users.c.credit_sequence)
            .select_from(self.users.join(self.turn, sa.true()))
            .where(self.users.c.key == self.p_user)
            .with_for_update(of=self.users, key_share=True)
        )
        self.account = locked.cte("account")
        self.living = locked.where(self.users.c.deleted_at.is_(None)).cte("account")

        self.by_id = row.id == self.p_purchase
        self.by_session = row.stripe_session_id == self.p_session
        other = self.ledger.alias("other")
        self.session_is_free = ~sa.exists().where(other.c.stripe_session_id == self.p_session, other.c.id != row.id)

    def all(self) -> dict[str, sa.Executable]:
        found: dict[str, sa.Executable] = {
            "start_purchase": self.start_purchase(),
            "attach_session": self.attach_session(),
            "complete_by_id": self.complete(
                self.by_id,
                sa.func.coalesce(self.row.stripe_session_id, self.p_session).is_not_distinct_from(
                    sa.func.coalesce(self.p_session, self.row.stripe_session_id)
                ),
                self.session_is_free,
            ),
            "complete_by_session": self.complete(self.by_session),
            "fail_by_id": self.fail(self.by_id),
            "fail_by_session": self.fail(self.by_session),
            "consume": self.consume(),
            "consume_many": self.consume_many(),
            "refund": self.refund(),
            "grant": self.grant(),
            "reinstate": self.reinstate(),
            "lock": sa.select(self.account.c.credit_balance),
            "balance": sa.select(self.users.c.credit_balance).where(self.users.c.key == self.p_user),
            "balance_at": self.balance_at(),
            "history": self.history(),
            "facts": self.facts(),
        }
        if self.workshops is not None:
            found |= {
                "consume_for_workshop": self.consume_for_workshop(self.workshops),
                "access": self.access(self.workshops),
            }
        return found

    def take_turn(self) -> sa.CTE:
        """One row once this user's row can be locked; none where the statement has to run again.

        Everything that changes one user's rows happens under the lock of the user's row. Who has to wait for it waits
        in turn: PostgreSQL can deadlock two of these statements that queue for the row while a third transaction holds
        it by a foreign key, since the UPDATE at the end comes back to the version that its snapshot sees, whose queue
        the next one has joined. Who may have the row already takes no turn: a transaction that has changed or locked
        the user before it calls the ledger would wait for the turn of somebody who waits for that transaction. Without
        a turn the version must be the one that the snapshot sees.

        Whether it has the row is asked with SKIP LOCKED, which waits all the same where an update has been committed
        since the snapshot and the new version is locked, and holds the old version's queue meanwhile: the same
        deadlock. So only a transaction asks that has written or locked something, and it takes a KEY SHARE first, of
        both versions: who has a lock already is kept out of queues (heap_lock_tuple in PostgreSQL's heapam.c).
        """
        name = self.users.c.key.name
        versions = sa.table(self.users.name, sa.column("ctid"), sa.column(name), schema=self.users.schema)
        seen = versions.alias("seen")
        as_seen = versions.c.ctid == sa.select(seen.c.ctid).where(seen.c[name] == self.p_user).scalar_subquery()
        of_user = versions.c[name] == self.p_user
        began = sa.func.pg_current_xact_id_if_assigned().is_not(None)
        kept = (
            sa.select(versions.c[name])
            .where(of_user, began)
            .with_for_update(read=True, key_share=True, skip_locked=True)
            .cte("kept")
        )
        mine = (
            sa.select(as_seen.label("as_seen"))
            .where(of_user, sa.exists(sa.select(kept.c[name])))
            .with_for_update(key_share=True, skip_locked=True)
            .cte("mine")
        )
        had = sa.exists(sa.select(mine.c.as_seen))
        wait = sa.func.pg_advisory_xact_lock(_hash(self.p_user))
        return (
            sa.select(sa.case((had, sa.null()), else_=wait).label("taken"))
            .where(~sa.exists(sa.select(mine.c.as_seen).where(sa.not_(mine.c.as_seen))))
            .cte("turn")
        )

    def turns(self, after: sa.CTE) -> sa.CTE:
        """Each listed user's turn, taken in an order that all statements keep; one row, once all are taken.

        All of ``after`` is read before the first of them.
        """
        listed = sa.func.unnest(self.p_users).table_valued(sa.column("user", self.p_user.type)).render_derived("listed")
        read = sa.select(sa.func.count().label("rows")).select_from(after).subquery("read")
        users = (
            sa.select(_hash(listed.c.user).label("hash"))
            .select_from(listed.join(read, read.c.rows >= ZERO))
            .distinct()
            .order_by("hash")
            .subquery("users")
        )
        taken = sa.select(sa.func.pg_advisory_xact_lock(users.c.hash).label("taken")).cte("taken")
        return sa.select(sa.func.count().label("taken")).select_from(taken).cte("turn")

    def refunded(self, user: Any, purchase: Any) -> sa.ScalarSelect[Any]:
        """How many credits of a purchase went back already."""
        return (
            sa.select(sa.func.coalesce(sa.func.sum(-self.row.amount), ZERO))
            .where(self.row.user_id == user, self.row.refund_of == purchase)
            .scalar_subquery()
        )

    # --- the two halves of every balance change ---

    def insert(self, values: dict[str, Any], *conditions: Condition, of: sa.FromClause) -> sa.CTE:
        source = sa.select(*(value.label(name) for name, value in values.items())).select_from(of).where(*conditions)
        return (
            pg.insert(self.ledger)
            .from_select(list(values), source, include_defaults=False)
            .on_conflict_do_nothing()
            .returning(self.ledger)
            .cte("written")
        )

    def settle(self, written: sa.CTE, *more: sa.CTE, told: Sequence[str] = ()) -> sa.Select[Any]:
        """Bring the user's row to what was written, in the same statement, and tell it, or these columns of it."""
        users = self.users.c
        moved = (
            sa.update(self.users)
            .where(users.key == self.p_user, users.key == written.c.user_id)
            .values(credit_balance=written.c.balance_after, credit_sequence=written.c.sequence)
            .cte("moved")
        )
        return sa.select(*(written.c[name] for name in told or written.c.keys())).add_cte(moved, *more)

    # --- purchases ---

    def start_purchase(self) -> sa.Select[Any]:
        users = self.users.c
        return sa.select(
            self.insert(
                {
                    "id": self.p_id,
                    "user_id": users.key,
                    "type": PURCHASE,
                    "status": PENDING,
                    "amount": self.p_amount,
                    "description": self.p_description,
                    "stripe_price_id": self.p_price,
                    "idempotency_key": self.p_key,
                },
                users.key == self.p_user,
                users.deleted_at.is_(None),
                of=self.users,
            )
        )

    def attach_session(self) -> sa.Executable:
        row = self.row
        return (
            sa.update(self.ledger)
            .where(
                row.user_id == self.p_user,
                self.by_id,
                row.type == PURCHASE,
                sa.func.coalesce(row.stripe_session_id, self.p_session) == self.p_session,
                self.session_is_free,
                self.account.c.key == row.user_id,
                # something to store, or it is a replay
                sa.or_(
                    row.stripe_session_id.is_(None),
                    sa.and_(row.stripe_payment_intent_id.is_(None), self.p_intent.is_not(None)),
                ),
            )
            .values(
                stripe_session_id=self.p_session,
                stripe_payment_intent_id=sa.func.coalesce(row.stripe_payment_intent_id, self.p_intent),
            )
            .returning(self.ledger)
        )

    def complete(self, *found: Condition) -> sa.Select[Any]:
        # A second step, so that the clock is read after the lock was had, and never inside an UPDATE.
        stamped = sa.select(self.account, sa.func.clock_timestamp().label("now")).cte("stamped")
        row = self.row
        late = sa.case((row.status == FAILED, _text(" (paid after all)")), else_=_text(""))
        first_of = sa.func.coalesce
        written = (
            sa.update(self.ledger)
            .where(
                row.user_id == self.p_user,
                *found,
                row.type == PURCHASE,
                row.status != COMPLETED,
                stamped.c.credit_balance <= HIGHEST - row.amount,
            )
            .values(
                status=COMPLETED,
                balance_after=stamped.c.credit_balance + row.amount,
                sequence=stamped.c.credit_sequence + ONE,
                completed_at=stamped.c.now,
                description=row.description.concat(late),
                stripe_session_id=first_of(row.stripe_session_id, self.p_session),
                stripe_payment_intent_id=first_of(row.stripe_payment_intent_id, self.p_intent),
                amount_paid=first_of(row.amount_paid, sa.bindparam("p_paid", type_=row.amount_paid.type)),
                currency=first_of(row.currency, sa.bindparam("p_currency", type_=row.currency.type)),
            )
            .returning(self.ledger)
            .cte("written")
        )
        return self.settle(written)

    def fail(self, found: Condition) -> sa.Executable:
        row = self.row
        reason = _text(" (failed: ").concat(sa.bindparam("p_reason", type_=sa.Text())).concat(_text(")"))
        return (
            sa.update(self.ledger)
            .where(
                row.user_id == self.p_user,
                found,
                row.type == PURCHASE,
                row.status == PENDING,
                self.account.c.key == row.user_id,
            )
            .values(status=FAILED, description=row.description.concat(reason))
            .returning(self.ledger)
        )

    # --- spending and giving back ---

    def spend(self, description: Any, workshop: dict[str, Any], of: sa.FromClause) -> sa.CTE:
        account = self.living.c
        return self.insert(
            {
                "id": self.p_id,
                "user_id": account.key,
                "type": CONSUMPTION,
                "status": COMPLETED,
                "amount": -self.p_amount,
                "balance_after": account.credit_balance - self.p_amount,
                "sequence": account.credit_sequence + ONE,
                "description": sa.func.coalesce(self.p_description, description),
                **workshop,
                "idempotency_key": self.p_key,
                "completed_at": sa.func.clock_timestamp(),
            },
            account.credit_balance >= self.p_amount,
            of=of,
        )

    def consume(self) -> sa.Select[Any]:
        return self.settle(self.spend(_text("Credit consumed"), {}, self.living), told=SPENT)

    def claimable(self, workshops: sa.Table, account: sa.CTE) -> sa.Select[Any]:
        """Workshops that can be unlocked, of users who are locked by now."""
        names = workshops.c
        name = sa.cast(names.key, sa.Text)
        return (
            sa.select(
                names.key.label("key"),
                names.owner.label("owner"),
                (sa.func.coalesce(names.title, name) if "title" in names else name).label("name"),
            )
            .select_from(workshops.join(account, names.owner == account.c.key))
            .where(names.deleted_at.is_(None), names.credit_consumed_at.is_(None))
        )

    def consume_for_workshop(self, workshops: sa.Table) -> sa.Select[Any]:
        names = workshops.c
        claim = (
            self.claimable(workshops, self.living)
            .where(names.key == self.p_workshop, names.owner == self.p_user)
            .with_for_update(of=workshops, key_share=True)
            .cte("claim")
        )
        written = self.spend(
            _text("Credit consumed for Workshop: ").concat(claim.c.name),
            {"workshop_id": claim.c.key},
            self.living.join(claim, sa.true()),
        )
        marked = (
            sa.update(workshops)
            .where(names.key == self.p_workshop, names.owner == self.p_user, names.key == written.c.workshop_id)
            .values(credit_consumed_at=written.c.completed_at)
            .cte("marked")
        )
        return self.settle(written, marked, told=SPENT)

    def consume_many(self) -> sa.Select[Any]:
        """Of each user's items, in their order, those up to the first that the balance does not cover.

        Unlike all others this statement lets a key that was written since it began raise (23505): were the row left
        out, all that follow it would be wrong. Users are locked in the order of their keys, then workshops in the
        order of theirs, so that two of these, or one and single calls, never wait for each other in a circle.
        """
        users, workshops, item, prior = self.users.c, self.workshops, self.item, self.ledger.alias("prior")
        # Which keys are new is a matter of the statement's snapshot, so it is looked up before anybody has to wait.
        fresh = (
            sa.select(item)
            .where(~sa.exists().where(prior.c.user_id == item.c.user, prior.c.idempotency_key == item.c.key))
            .cte("fresh")
        )
        asked = fresh.c
        turn = self.turns(after=fresh)
        # A user whose row is behind the ledger spends nothing, or the number given twice would fail the whole list. It
        # is a value and no condition here, so that plans expect every user that is listed.
        ahead = self.ledger.alias("ahead")
        newest = (
            sa.select(sa.func.coalesce(sa.func.max(ahead.c.sequence), ZERO))
            .where(ahead.c.user_id == users.key, ahead.c.sequence.is_not(None))
            .scalar_subquery()
        )
        account = (
            sa.select(
                users.key.label("key"),
                users.credit_balance,
                users.credit_sequence,
                (newest <= users.credit_sequence).label("agrees"),
            )
            .select_from(self.users.join(turn, sa.true()))
            .where(users.key == sa.any_(self.p_users), users.deleted_at.is_(None))
            .order_by(users.key)
            .with_for_update(of=self.users, key_share=True)
            .cte("account")
        )
        # Read once, and when all users are locked: the count waits for the last of them.
        clock = (
            sa.select(sa.func.count().label("users"), sa.func.clock_timestamp().label("now"))
            .select_from(account)
            .cte("clock")
        )
        source: sa.FromClause = fresh.join(account, account.c.key == asked.user)
        name: sa.ColumnElement[str] = _text("Credit consumed")
        claimed: tuple[Condition, ...] = ()
        if workshops is not None:
            claim = (
                self.claimable(workshops, account)
                .where(workshops.c.key == sa.any_(self.p_workshops))
                .order_by(workshops.c.key)
                .with_for_update(of=workshops, key_share=True)
                .cte("claim")
            )
            source = source.outerjoin(claim, sa.and_(claim.c.key == asked.workshop, claim.c.owner == asked.user))
            claimed = (sa.or_(asked.workshop.is_(None), claim.c.key.is_not(None)),)
            name = name.concat(sa.func.coalesce(_text(" for Workshop: ").concat(claim.c.name), _text("")))
        taken = sa.func.sum(asked.amount).over(partition_by=asked.user, order_by=asked.n)
        place = sa.func.row_number().over(partition_by=asked.user, order_by=asked.n)
        spend = (
            sa.select(
                asked.n,
                asked.id,
                asked.user,
                asked.workshop,
                asked.amount,
                asked.key,
                sa.func.coalesce(asked.description, name).label("description"),
                (account.c.credit_balance - taken).label("balance"),
                (account.c.credit_sequence + place).label("sequence"),
                clock.c.now,
            )
            .select_from(source.join(clock, sa.true()))
            .where(
                account.c.agrees,
                *claimed,
            )
            .cte("spend")
        )
        covered = spend.c.balance >= ZERO
        values = {
            "id": spend.c.id,
            "user_id": spend.c.user,
            "type": CONSUMPTION,
            "status": COMPLETED,
            "amount": -spend.c.amount,
            "balance_after": spend.c.balance,
            "sequence": spend.c.sequence,
            "description": spend.c.description,
            "workshop_id": spend.c.workshop,
            "idempotency_key": spend.c.key,
            "completed_at": spend.c.now,
        }
        written = (
            pg.insert(self.ledger)
            .from_select(list(values), sa.select(*values.values()).where(covered), include_defaults=False)
            .cte("written")
        )
        last = (
            sa.select(
                spend.c.user,
                sa.func.min(spend.c.balance).label("balance"),
                sa.func.max(spend.c.sequence).label("sequence"),
            )
            .where(covered)
            .group_by(spend.c.user)
            .subquery("last")
        )
        moved = (
            sa.update(self.users)
            .where(users.key == last.c.user, users.key == sa.any_(self.p_users))  # the list, so that no plan reads all
            .values(credit_balance=last.c.balance, credit_sequence=last.c.sequence)
            .cte("moved")
        )
        done = sa.select(
            spend.c.n, spend.c.balance, spend.c.sequence, spend.c.description, sa.func.now(), spend.c.now
        ).where(covered)
        if workshops is None:
            return done.add_cte(written, moved)
        marked = (
            sa.update(workshops)
            .where(workshops.c.key == spend.c.workshop, covered)
            .values(credit_consumed_at=spend.c.now)
            .cte("marked")
        )
        return done.add_cte(written, moved, marked)

    def refund(self) -> sa.Select[Any]:
        """Take back from a purchase: at most what is left of it."""
        return self.move_back(REFUND, lambda bought, back: bought.c.amount - back.c.credits, "Refunded: ", sign=-1)

    def reinstate(self) -> sa.Select[Any]:
        """Give back to a purchase: at most what refunds took from it."""
        return self.move_back(GRANT, lambda _bought, back: back.c.credits, "Given back: ", sign=1)

    def move_back(
        self, kind: Any, limit: Callable[[sa.CTE, sa.CTE], sa.ColumnElement[int]], title: str, *, sign: int
    ) -> sa.Select[Any]:
        """A row that depends on the purchase's other rows: see the module ledger on the number read twice."""
        row, users, account = self.row, self.users.c, self.account
        seen = sa.select(users.credit_sequence.label("sequence")).where(users.key == self.p_user).cte("seen")
        bought = (
            sa.select(row.id, row.amount, row.description)
            .where(row.user_id == self.p_user, self.by_id, row.type == PURCHASE, row.status == COMPLETED)
            .cte("bought")
        )
        back = sa.select(self.refunded(self.p_user, self.p_purchase).label("credits")).cte("back")
        most = limit(bought, back)
        moved = sa.func.coalesce(self.p_amount, most, type_=sa.Integer())
        amount = moved if sign > 0 else -moved
        balance = account.c.credit_balance
        written = self.insert(
            {
                "id": self.p_id,
                "user_id": account.c.key,
                "type": kind,
                "status": COMPLETED,
                "amount": amount,
                "balance_after": balance + amount,
                "sequence": account.c.credit_sequence + ONE,
                "description": sa.func.coalesce(self.p_description, _text(title).concat(bought.c.description)),
                "refund_of": bought.c.id,
                "idempotency_key": self.p_key,
                "completed_at": sa.func.clock_timestamp(),
            },
            account.c.credit_sequence == seen.c.sequence,
            moved.between(ONE, most),
            balance <= HIGHEST - moved if sign > 0 else balance >= LOWEST + moved,
            of=account.join(seen, sa.true()).join(bought, sa.true()).join(back, sa.true()),
        )
        return self.settle(written)

    def grant(self) -> sa.Select[Any]:
        account = self.living.c
        written = self.insert(
            {
                "id": self.p_id,
                "user_id": account.key,
                "type": GRANT,
                "status": COMPLETED,
                "amount": self.p_amount,
                "balance_after": account.credit_balance + self.p_amount,
                "sequence": account.credit_sequence + ONE,
                "description": self.p_description,
                "idempotency_key": self.p_key,
                "completed_at": sa.func.clock_timestamp(),
            },
            account.credit_balance <= HIGHEST - self.p_amount,
            of=self.living,
        )
        return self.settle(written)

    # --- reading ---

    def balance_at(self) -> sa.Select[Any]:
        row, users = self.row, self.users.c
        then = (
            sa.select(row.balance_after)
            .where(row.user_id == self.p_user, row.completed_at <= sa.bindparam("p_when", type_=row.completed_at.type))
            .order_by(row.completed_at.desc(), row.sequence.desc())
            .limit(ONE)
            .scalar_subquery()
        )
        return sa.select(sa.func.coalesce(then, ZERO)).where(users.key == self.p_user)

    def history(self) -> sa.Select[Any]:
        """An index scan for each state, each cut off at the page's length, so that a page costs the same anywhere."""
        row = self.row
        p_limit = sa.bindparam("p_limit", type_=sa.Integer())
        # State by state: a pending purchase is found behind thousands of failed ones. As a list, not as constants, so
        # that no plan takes the index of all that is pending, whoever's it is.
        statuses = sa.bindparam("p_statuses", type_=pg.ARRAY(row.status.type))
        shown = sa.func.unnest(statuses).table_valued(sa.column("status", row.status.type)).render_derived("shown")
        of_status = (
            sa.select(self.ledger)
            .where(
                row.user_id == self.p_user,
                row.status == shown.c.status,
                row.sequence.is_(None),
                row.id < sa.bindparam("p_before_id", type_=sa.Uuid()),
            )
            .order_by(row.id.desc())
            .limit(p_limit)
            .lateral("of_status")
        )
        unfinished = sa.select(of_status).select_from(shown.join(of_status, sa.true()))
        completed = (
            sa.select(self.ledger)
            .where(row.user_id == self.p_user, row.sequence < sa.bindparam("p_before_sequence", type_=sa.Integer()))
            .order_by(row.sequence.desc())
            .limit(p_limit)
        )
        page = sa.union_all(unfinished, completed.subquery().select()).subquery("page")
        return sa.select(page).order_by(page.c.sequence.desc().nulls_first(), page.c.id.desc()).limit(p_limit)

    def access(self, workshops: sa.Table) -> sa.Select[Any]:
        names = workshops.c
        paywalled_since = (
            sa.select(sa.func.min(migration_log.c.applied_at))
            .where(migration_log.c.revision == _text("0001"))
            .scalar_subquery()
        )
        return sa.select(
            names.created_at if "created_at" in names else NULL,
            names.credit_consumed_at,
            names.deleted_at,
            paywalled_since,
        ).where(names.key == self.p_workshop)

    def facts(self) -> sa.Select[Any]:
        """All that can speak against a write, a row for each that is asked about; what it is not about is NULL."""
        users, ledger, workshops, asked = self.users, self.ledger, self.workshops, self.asked.c
        prior, purchase, last, holder = (ledger.alias(name) for name in ("prior", "purchase", "last", "holder"))
        of_session = sa.select(holder.c.id).where(holder.c.stripe_session_id == asked.session).scalar_subquery()
        unlocked = (
            sa.select(ledger)
            .where(
                ledger.c.user_id == asked.user,
                ledger.c.workshop_id == asked.workshop,
                ledger.c.type == CONSUMPTION,
            )
            .order_by(ledger.c.sequence.desc())
            .limit(ONE)
            .lateral("unlocked")
        )
        source: sa.FromClause = (
            self.asked.outerjoin(users, users.c.key == asked.user)
            .outerjoin(prior, sa.and_(prior.c.user_id == asked.user, prior.c.idempotency_key == asked.key))
            .outerjoin(
                purchase,
                sa.and_(
                    purchase.c.user_id == asked.user, purchase.c.id == sa.func.coalesce(asked.purchase, of_session)
                ),
            )
            .outerjoin(unlocked, sa.true())
        )
        workshop: tuple[Any, ...] = (NULL, NULL, NULL, NULL)
        if workshops is not None:
            source = source.outerjoin(workshops, workshops.c.key == asked.workshop)
            names = workshops.c
            workshop = (names.key, names.owner, names.deleted_at, names.credit_consumed_at)
        return (
            sa.select(
                users.c.key,
                users.c.credit_balance,
                users.c.credit_sequence,
                users.c.deleted_at,
                sa.select(sa.func.max(last.c.sequence))
                .where(last.c.user_id == asked.user, last.c.sequence.is_not(None))
                .scalar_subquery(),
                self.refunded(asked.user, asked.purchase),
                of_session,
                *workshop,
                *prior.c,
                *purchase.c,
                *unlocked.c,
            )
            .select_from(source)
            .order_by(asked.n)
        )
