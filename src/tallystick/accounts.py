"""The billing side of a user: onboarding, plan tier, Stripe customer, soft delete and restore.

As in the ledger, each operation is one call of a function on the caller's connection, and doing it twice changes
nothing more. Nothing here moves a balance.
"""

from __future__ import annotations

import datetime as dt
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tallystick.config import Config, HostMapping
from tallystick.errors import InvalidArgument, Key
from tallystick.ledger.connections import Call, Operation, Rows, document, moment, reader_of
from tallystick.ledger.operations import Standing, boolean
from tallystick.ledger.outcomes import DONE, Refusal, error_of
from tallystick.schema import Keys, mapping_of

if TYPE_CHECKING:
    import sqlalchemy as sa

PLAN_TIER_MAX = 32
STRIPE_ID_MAX = 255


@dataclass(frozen=True, slots=True)
class Account:
    """Tallystick's side of a user. Moments are in UTC.

    ``credit_held`` and ``credit_due_at`` are set by ``get``, or by an app that reads the row itself; the operations
    that change an account leave them at their defaults.
    """

    user: Key
    credit_balance: int
    onboarding_complete: bool
    stripe_customer_id: str | None
    plan_tier: str
    updated_at: dt.datetime | None
    deleted_at: dt.datetime | None
    credit_held: int = 0
    credit_due_at: dt.datetime | None = None

    @property
    def standing(self) -> Standing:
        """The credits, and those of them that holds have set aside."""
        return Standing(self.credit_balance, self.credit_held, self.credit_due_at)


class Accounts:
    """The operations for one host. Holds no connection and no state; share it freely.

    Made as a ``Ledger`` is.
    """

    def __init__(self, source: Config | HostMapping | sa.Engine | sa.Connection) -> None:
        if isinstance(source, Config):
            source = source.host
        self.keys = Keys(source if isinstance(source, HostMapping) else mapping_of(source))
        self._user = reader_of(self.keys.host.users.key_type)

    @Operation
    def get(self, user: Key) -> Call[Account]:
        """The account of ``user``. Raises UnknownUser."""
        return self._of_user("account", user)

    @Operation
    def complete_onboarding(self, user: Key) -> Call[Account]:
        """Mark the user's onboarding as complete. Raises UnknownUser."""
        return self._of_user("complete_onboarding", user)

    @Operation
    def reset_onboarding(self, user: Key) -> Call[Account]:
        """Mark the user's onboarding as not complete. Raises UnknownUser."""
        return self._of_user("reset_onboarding", user)

    @Operation
    def set_plan_tier(self, user: Key, plan_tier: str) -> Call[Account]:
        """Put the user on a plan, a name of 1 to 32 characters of the host's choosing.

        Raises:
            InvalidArgument, UnknownUser: nothing was written.
        """
        return self._of_user("set_plan_tier", user, plan_tier=_name("plan_tier", plan_tier, PLAN_TIER_MAX))

    @Operation
    def set_stripe_customer(self, user: Key, stripe_customer_id: str, *, replace: bool = False) -> Call[Account]:
        """Link the user to a Stripe customer; an existing link to another one stays unless ``replace``.

        Raises:
            InvalidArgument, UnknownUser: nothing was written.
            StripeCustomerConflict: the user has another customer, or the customer is another user's.
        """
        customer = _name("stripe_customer_id", stripe_customer_id, STRIPE_ID_MAX)
        return self._of_user(
            "set_stripe_customer", user, stripe_customer_id=customer, replace=boolean("replace", replace)
        )

    @Operation
    def set_low_balance(self, user: Key, threshold: int | None) -> Call[Account]:
        """Set the threshold of the user's event ``balance.low``, written when the balance falls below it.

        None is the default, which ``tallystick events enable`` sets, and 0 is never.

        Raises:
            InvalidArgument, UnknownUser: nothing was written.
        """
        most = self.keys.credits_max
        if threshold is not None and not (
            isinstance(threshold, int) and not isinstance(threshold, bool) and 0 <= threshold <= most
        ):
            raise InvalidArgument.of(
                "threshold", threshold, f"pass a whole number from 0 to {most}, or None for the default"
            )
        return self._of_user("set_low_balance", user, threshold=threshold)

    @Operation
    def delete_user(self, user: Key) -> Call[Account]:
        """Soft-delete a user: the row and its ledger stay, and nothing can be bought or spent. Keeps the first time.

        Raises:
            UnknownUser: nothing was written.
        """
        return self._of_user("delete_user", user)

    @Operation
    def restore_user(self, user: Key) -> Call[Account]:
        """Undo a soft delete; credits are as they were. Raises UnknownUser."""
        return self._of_user("restore_user", user)

    @Operation
    def erase(self, user: Key) -> Call[Account]:
        """Remove the ledger's personal data of a user, and soft-delete the user; credits and the audit stay the same.

        It removes the descriptions and metadata of the user's rows, the addresses in the requests of checkouts, the
        link to the Stripe customer, and the idempotency keys of purchases, consumptions and grants: an old key is then
        no replay, and a deleted user is refused in any case.

        Raises:
            UnknownUser: nothing was written.
        """
        return self._of_user("erase", user)

    @Operation
    def delete_workshop(self, workshop: Key) -> Call[None]:
        """Soft-delete a workshop; the row that unlocked it stays. Keeps the first time.

        Raises:
            InvalidArgument, UnknownWorkshop: nothing was written.
        """
        return self._of_workshop("delete_workshop", workshop)

    @Operation
    def restore_workshop(self, workshop: Key) -> Call[None]:
        """Undo a soft delete of a workshop.

        Raises:
            InvalidArgument, UnknownWorkshop: nothing was written.
        """
        return self._of_workshop("restore_workshop", workshop)

    def _of_user(self, function: str, user: Key, **more: Any) -> Call[Account]:
        arguments = {"user_id": self.keys.user_key(user), **more}

        def read(rows: Rows) -> Account:
            row = rows[0]
            if row[0] != DONE:
                raise error_of(row[0], Refusal(arguments, detail=document(row[8]) or {}))
            detail = document(row[8]) or {}
            due = detail.get("credit_due_at")
            return Account(
                self._user(row[1]),
                row[2],
                row[3],
                row[4],
                row[5],
                moment(row[6]),
                moment(row[7]),
                detail.get("credit_held", 0),
                None if due is None else moment(dt.datetime.fromisoformat(due)),
            )

        return Call(function, arguments, read)

    def _of_workshop(self, function: str, workshop: Key) -> Call[None]:
        arguments = {"workshop_id": self.keys.workshop_key(workshop)}

        def read(rows: Rows) -> None:
            if rows[0][0] != DONE:
                raise error_of(rows[0][0], Refusal(arguments))

        return Call(function, arguments, read)


def _name(argument: str, value: object, longest: int) -> str:
    if isinstance(value, str) and 0 < len(value) <= longest and value.isprintable():
        return value
    raise InvalidArgument.of(argument, value, f"pass a text of 1 to {longest} printable characters")
