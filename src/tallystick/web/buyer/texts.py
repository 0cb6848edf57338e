"""All texts for the buyer, in one place.

To translate, subclass ``Texts``, override the sentences and pass an instance as ``texts``. A sentence with a number or
a name is a method, since languages differ in grammar. None of it is HTML: templates escape all texts.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Mapping

from tallystick.config import Pack
from tallystick.errors import IdempotencyKeyReused, InsufficientCredits, TallystickError, WorkshopLocked
from tallystick.ledger import AccessReason, CreditTransaction, Lot, Standing
from tallystick.schema import CreditTransactionStatus, CreditTransactionType
from tallystick.web.shared import numbers
from tallystick.web.shared.client_keys import sent_key
from tallystick.web.shared.wording import description_of


class Texts:
    """English."""

    language = "en"

    # --- numbers ---

    def credits(self, count: int) -> str:
        """``count`` credits with the noun: "1 credit", "0 credits"."""
        return f"{self.number(count)} {'credit' if abs(count) == 1 else 'credits'}"

    def number(self, value: int) -> str:
        """A whole number, with a true minus sign."""
        return numbers.number(value)

    def change(self, value: int) -> str:
        """A whole number that always carries its sign."""
        return numbers.change(value)

    def money(self, amount: int, currency: str) -> str:
        """``amount`` minor units of ``currency``."""
        return numbers.money(amount, currency)

    months: tuple[str, ...] = (
        "January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November",
        "December",
    )  # fmt: skip

    def day(self, moment: dt.datetime) -> str:
        """A day, in a sentence; in UTC."""
        there = moment.astimezone(dt.UTC)
        return f"{there.day} {self.months[there.month - 1]} {there.year}"

    def date(self, moment: dt.datetime) -> str:
        """A day, for lists."""
        return f"{moment.day} {moment:%b %Y}"

    # --- badge ---

    def badge_label(self, balance: int) -> str:
        """The badge's text for a screen reader."""
        return f"Balance: {self.credits(balance)}. Show history"

    def debt(self, balance: int) -> str:
        """A balance below zero, in words."""
        return f"{self.credits(-balance)} owed"

    # --- pricing ---

    pricing_title = "Buy credits"
    pricing_lead = "One credit unlocks one workshop, for good."
    pricing_empty = "Nothing is on sale at the moment."
    price_at_checkout = "Price shown at checkout"
    contact_title = "More than that"
    contact_text = "Teams and larger packs are priced by talking to us."
    contact_button = "Contact us"

    def buy_button(self, pack: Pack) -> str:
        """The button of a pack."""
        if pack.amount is None:
            return f"Buy {self.credits(pack.credits)}"
        return f"Buy {self.credits(pack.credits)} for {self.money(pack.amount, pack.currency)}"

    def per_credit(self, pack: Pack) -> str:
        """The price of one credit of the pack, rounded up to a whole minor unit; empty for a pack of one credit."""
        if pack.amount is None or pack.credits == 1:
            return ""
        return f"{self.money(-(-pack.amount // pack.credits), pack.currency)} a credit"

    # --- confirm, unlocked ---

    confirm_title = "Unlock this workshop"
    cancel_button = "Not now"
    continue_button = "Continue"
    unlocked_title = "Unlocked"
    already_unlocked = "This workshop is unlocked already. Nothing was charged."

    def confirm(self, amount: int, balance: int) -> str:
        """The text before unlocking."""
        return f"This will use {self.credits(amount)}. You have {self.number(balance)}."

    def confirm_button(self, amount: int) -> str:
        """The button that unlocks."""
        return f"Use {self.credits(amount)}"

    def unlocked(self, amount: int, balance: int) -> str:
        """The text after unlocking."""
        return f"{self.credits(amount)} used. {self.number(balance)} left."

    # --- paywall ---

    def paywall_title(self, title: str | None) -> str:
        """The heading over the lock."""
        return f"{title} continues here" if title else "This workshop continues here"

    def paywall(self, required: int, balance: int) -> str:
        """The reason for the lock, and the way to open the workshop."""
        if balance < 0:
            return self.owed(balance)
        needed = "One" if required == 1 else self.number(required)
        return f"You have {self.credits(balance)}. {needed} {'unlocks' if required == 1 else 'unlock'} this workshop."

    def owed(self, balance: int) -> str:
        """A balance below zero, where credits are needed."""
        return f"You owe {self.credits(-balance)}. The next purchase pays that first."

    too_few_title = "Not enough credits"

    def too_few(self, required: int, balance: int) -> str:
        """The text where credits are missing for something else than a workshop."""
        if balance < 0:
            return self.owed(balance)
        return f"You have {self.credits(balance)}. This takes {self.number(required)}."

    paywall_buy = "Buy credits"

    # --- after Stripe ---

    success_title = "Payment received"
    waiting_title = "Your payment is on its way"
    waiting = "Your bank has not confirmed it yet. The credits arrive by themselves when it does, also if you leave."
    check_again = "Check again"
    failed_title = "The payment did not go through"
    failed = "Nothing was charged."
    refused_title = "Your credits are not there yet"
    try_again = "Choose a pack"
    cancelled_title = "Purchase cancelled"
    cancelled = "Nothing was charged."

    def success(self, credits: int, balance: int) -> str:
        """The purchase, and the new balance."""
        return f"{self.credits(credits)} added. You have {self.number(balance)}."

    def refused(self, session: str) -> str:
        """The text for a purchase that is paid and could not be granted; ``session`` is Stripe's id of it."""
        return f"Your payment arrived, but the credits could not be added. Tell us: reference {session}"

    def back(self, title: str | None) -> str:
        """The link to the page that the buyer came from."""
        return f"Back to {title}" if title else "Back"

    def use_and_back(self, amount: int, title: str | None) -> str:
        """The button that unlocks the workshop that the buyer came for."""
        return f"Use {self.credits(amount)} to unlock {title or 'the workshop'}"

    # --- history ---

    history_title = "Your credits"
    history_empty = "Every purchase and every use of a credit will be listed here."
    history_columns: tuple[str, ...] = ("Date", "What", "Credits", "Balance")
    history_older = "Older"
    history_newest = "Newest"
    download = "Download as CSV"
    csv_name = "credits"
    csv_columns: tuple[str, ...] = (
        "sequence", "created_at", "completed_at", "type", "status", "amount", "balance_after", "description",
        "amount_paid_minor_units", "currency", "id",
    )  # fmt: skip
    pending = "pending"
    set_aside = "set aside"
    not_used = "not used"
    kinds: Mapping[str, str] = {"reversal": "given back", "correction": "taken back", "expiry": "expired"}
    """The tags of rows that undo another row, by type."""

    def history_balance(self, balance: int) -> str:
        """The sentence over the list."""
        return f"You owe {self.credits(-balance)}." if balance < 0 else f"You have {self.credits(balance)}."

    def history_held(self, now: Standing) -> str:
        """The sentence about credits that holds have set aside; empty if there are none, or nothing can be spent."""
        if not now.held or now.balance < 0:
            return ""
        aside = f"{self.number(now.held)} of them {'is' if now.held == 1 else 'are'} set aside for work under way"
        return f"{aside}, {self.number(now.spendable)} can be spent."

    def history_expiring(self, soonest: Lot) -> str:
        """The sentence about the credits that expire next."""
        verb = "expires" if soonest.remaining == 1 else "expire"
        return f"{self.credits(soonest.remaining)} {verb} on {self.day(soonest.expires_at)}."

    def description(self, row: CreditTransaction) -> str:
        """The description of a row; for a purchase that is not paid without the word for bought.

        If the row has a ``tag``, the ledger's own word for its effect is left out.
        """
        return description_of(row.description, done=row.status is CreditTransactionStatus.COMPLETED, kind=row.type)

    def tag(self, row: CreditTransaction) -> str:
        """A word or two beside the description, for rows other than a paid purchase or a consumption."""
        if row.status is CreditTransactionStatus.COMPLETED:
            return self.kinds.get(row.type, "")
        if row.type is not CreditTransactionType.CONSUMPTION:
            return self.pending
        ended = row.expires_at is not None and row.expires_at <= dt.datetime.now(dt.UTC)
        return self.not_used if ended else self.set_aside

    def paid(self, row: CreditTransaction) -> str:
        """The price of a purchase; empty for a free one."""
        return "" if row.amount_paid is None else self.money(row.amount_paid, row.currency or "")

    # --- welcome ---

    welcome_title = "Welcome"
    welcome: tuple[str, ...] = (
        "Every workshop begins free of charge.",
        "One credit unlocks the rest of it, for good.",
    )
    welcome_button = "Start"

    # --- refusals ---

    problem_titles: Mapping[str, str] = {
        "not-signed-in": "Sign in first",
        "insufficient-credits": "Not enough credits",
        "workshop-locked": "This workshop is locked",
        "cross-site-request": "This request came from another site",
        "unknown-user": "No account",
        "user-deleted": "This account is closed",
        "unknown-workshop": "No such workshop",
        "unknown-purchase": "No such purchase",
        "unknown-pack": "No such pack",
        "workshop-deleted": "This workshop was deleted",
        "purchase-not-pending": "This purchase is decided already",
        "purchase-not-completed": "This purchase was not paid",
        "session-conflict": "This payment belongs to another purchase",
        "customer-conflict": "This payment account is another user's",
        "refund-exceeds-purchase": "More than is left of this purchase",
        "reinstatement-exceeds-refunds": "More than was taken back of this purchase",
        "balance-out-of-range": "Too many credits",
        "workshop-unaccounted": "This workshop is marked as unlocked, but no credit paid for it",
        "request-too-large": "Too large",
        "request-too-slow": "Too slow",
        "invalid-argument": "A value is not valid",
        "idempotency-key-reused": "This key was used for something else",
        "busy": "Busy",
        "outcome-unknown": "Not sure that it worked",
        "unavailable": "Not available",
        "payment-provider-unavailable": "The payment provider does not answer",
        "payment-provider-refused": "The payment provider refused this",
        "not-on-sale": "Not on sale at the moment",
        "server-error": "Something went wrong",
    }
    problems: Mapping[str, str] = {
        "not-signed-in": "Sign in and come back to this page.",
        "cross-site-request": "Open the page here and use its own button. Nothing was changed.",
        "unknown-user": "You are signed in, but there is no account for you here.",
        "user-deleted": "Nothing can be bought or used with it.",
        "unknown-workshop": "It does not exist, or it is not yours.",
        "unknown-purchase": "It does not exist, or it is not yours.",
        "unknown-pack": "It is no longer on sale. Choose another one.",
        "workshop-deleted": "It cannot be unlocked.",
        "purchase-not-pending": "It is paid, or it failed. Your history says which.",
        "purchase-not-completed": "There is nothing to give back.",
        "session-conflict": "Nothing was charged twice. Tell us which purchase you meant.",
        "customer-conflict": "Nothing was charged. Tell us, so that we can set it right.",
        "refund-exceeds-purchase": "Nothing was given back. Ask for less.",
        "reinstatement-exceeds-refunds": "Nothing was given. Ask for less.",
        "balance-out-of-range": "Your balance cannot hold that many. Nothing was changed.",
        "workshop-unaccounted": "No credit was used. Tell us, so that we can set it right.",
        "request-too-large": "Send less.",
        "request-too-slow": "It did not arrive whole, and nothing was changed. Send it again.",
        "busy": "Nothing was changed. Make the same request again.",
        "outcome-unknown": "Make the same request again: what was done is not done twice.",
        "unavailable": "Nothing was changed. Make the same request again in a moment.",
        "payment-provider-unavailable": "Try again in a moment. Nothing is charged twice.",
        "payment-provider-refused": "It did not take this. What you have paid for is not lost. We have been told.",
        "not-on-sale": "Nothing was charged. We have been told.",
    }
    problem_default = "Nothing was changed. Try again, or tell us what you wanted to do."
    back_home = "Back"

    def problem_title(self, name: str) -> str:
        """The title of a problem, by the name of its type."""
        return self.problem_titles.get(name, self.problem_titles["server-error"])

    def problem(self, error: TallystickError, name: str) -> str:
        """A sentence on ``error`` for the user."""
        match error:
            case InsufficientCredits():
                spendable = Standing(error.balance, error.held).spendable
                return self.too_few(error.required, spendable)
            case WorkshopLocked():
                return f"{self.credits(error.required)} unlocks it."
            case IdempotencyKeyReused():
                return self.key_reused(sent_key(error.key))
        return self.problems.get(name, self.problem_default)

    def key_reused(self, key: str | None) -> str:
        """A sentence on an idempotency key of another request; None for a key that the client did not send."""
        if key is None:
            return "It was used before, for another request. Nothing was changed."
        return (
            f"The key {key} was used before, for another request. Nothing was changed. Use a new key for a new request."
        )

    def reference(self, name: str) -> str:
        """The reference of a fault, for a user who asks for help."""
        return f"Reference: {name}"

    def access(self, reason: AccessReason) -> str:
        """The reason why a workshop is open or closed, in one or two words."""
        return {
            AccessReason.UNLOCKED: "Unlocked",
            AccessReason.GRANDFATHERED: "Included",
            AccessReason.PAYWALL_OFF: "Open",
            AccessReason.LOCKED: "Locked",
            AccessReason.DELETED: "Deleted",
        }[reason]
