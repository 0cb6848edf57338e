"""User, Stripe, network and clock, doing what they like: in the end the balance is what Stripe's money stands for."""

from __future__ import annotations

import math
import os
import uuid
from collections.abc import Callable
from typing import Any, get_args

import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, multiple, rule, run_state_machine_as_test

from stripe_sales.shop import CREDITS, PRICE, Shop
from tallystick import InsufficientCredits, stripe
from tallystick.audit import audit
from tallystick.config import CheckoutOptions, Rounding
from tallystick.dev.stripe import DevStripe
from tallystick.errors import DevStripeError, Key
from worlds import World

OPTIONS = [None, CheckoutOptions(promotion_codes=True), CheckoutOptions(quantity_max=3)]


class Machine(RuleBasedStateMachine):
    """One person who buys, with one account or several. The model is Stripe's own account, read by its own rules."""

    world: World

    def __init__(self) -> None:
        super().__init__()
        self.dev = DevStripe(retry_delays_s=(), senders=1)
        self.shop = Shop(self.world, self.dev)
        self.accounts = [self.shop.world.user()]  # of one person; the last one is in use
        self.buyers: dict[str, int] = {}  # by session, the place of its account
        self.merges = 0
        self.spent = 0
        self.bought: list[stripe.Checkout] = []
        self.rounding: dict[str, Rounding] = {}  # by session, as it was sold

    @property
    def user(self) -> Key:
        return self.accounts[-1]

    sessions = Bundle("sessions")
    payments = Bundle("payments")
    refunds = Bundle("refunds")
    disputes = Bundle("disputes")

    def try_at_stripe(self, act: Callable[[], Any]) -> Any:
        """The machine makes no step that Stripe would not make."""
        try:
            return act()
        except DevStripeError:
            return None

    @rule(target=sessions, rounding=st.sampled_from(get_args(Rounding)), options=st.sampled_from(OPTIONS))
    def check_out(self, rounding, options):
        self.shop.configure(refund_rounding=rounding)
        self.bought.append(self.shop.checkout(self.user, options=options))
        self.rounding[self.bought[-1].session] = rounding
        self.buyers[self.bought[-1].session] = len(self.accounts) - 1
        return self.bought[-1]

    @rule(
        target=payments,
        bought=consumes(sessions),
        late=st.booleans(),
        discount=st.sampled_from([0, 0, 250]),
        quantity=st.sampled_from([None, None, 1, 3]),
    )
    def pay(self, bought, late, discount, quantity):
        how = {"card": "async" if late else "4242424242424242", "discount": discount, "quantity": quantity}
        paid = self.try_at_stripe(lambda: self.shop.dev.pay(bought.session, **how))
        return bought if paid else multiple()

    @rule()
    def the_customer_goes(self):
        """An operator deletes it in the dashboard."""
        with self.shop.engine.begin() as conn:
            customer = self.shop.world.accounts.get(conn, self.user).stripe_customer_id
        objects = self.shop.dev.account.objects["customer"]
        if customer in objects:
            self.shop.api.customers.delete(customer)

    @rule(which=st.integers(0, 99), how=st.sampled_from(["nothing", "reference", "realm", "unknown purchase"]))
    def something_else_is_sold(self, which, how):
        """At the same Stripe account; its address may name a purchase of ours."""
        fields: dict[str, Any] = {}
        if how == "reference" and self.bought:
            fields["client_reference_id"] = str(self.bought[which % len(self.bought)].purchase.id)
        elif how in ("realm", "unknown purchase"):
            fields["metadata"] = {"tallystick_purchase": str(uuid.UUID(int=which))}
            fields["metadata"] |= {"tallystick_realm": "staging"} if how == "realm" else {}
        session = self.shop.api.checkout.sessions.retrieve(self.shop.foreign(**fields))
        if which % 2:
            self.shop.dev.refund(str(session.payment_intent), amount=20)

    @rule(bought=payments)
    def the_bank_charges_in_another_currency(self, bought):
        intent = self.shop.intent(bought) if self.is_paid(bought) else None
        charge = None if intent is None else self.shop.api.payment_intents.retrieve(intent).latest_charge
        if charge is not None and not any(self.reversals(intent)):
            there = self.shop.dev.account.objects["charge"][str(charge)]
            there.update(currency="eur", amount=there["amount"] * 92 // 100)

    @rule(refund=refunds, credits=st.sampled_from(["0", "5"]))
    def mark(self, refund, credits):
        if not self.shop.api.refunds.retrieve(refund).metadata:
            self.shop.api.refunds.update(refund, {"metadata": {"tallystick_credits": credits}})

    @rule(bought=payments, succeeded=st.booleans())
    def bank_decides(self, bought, succeeded):
        self.try_at_stripe(lambda: self.shop.dev.settle(bought.session, succeeded=succeeded))

    @rule(target=refunds, bought=payments, amount=st.integers(1, PRICE), pending=st.booleans())
    def refund(self, bought, amount, pending):
        intent = self.shop.intent(bought)
        made = self.try_at_stripe(lambda: self.shop.dev.refund(intent, amount=amount, pending=pending))
        return made["id"] if made else multiple()

    @rule(refund=refunds, status=st.sampled_from(["succeeded", "failed", "canceled"]))
    def refund_ends(self, refund, status):
        self.try_at_stripe(lambda: self.shop.dev.settle_refund(refund, status))

    @rule(target=disputes, bought=payments, amount=st.integers(1, PRICE), inquiry=st.booleans())
    def dispute(self, bought, amount, inquiry):
        intent = self.shop.intent(bought)
        made = self.try_at_stripe(lambda: self.shop.dev.dispute(intent, amount=amount, inquiry=inquiry))
        return made["id"] if made else multiple()

    @rule(dispute=disputes, status=st.sampled_from(["under_review", "needs_response", "won", "lost", "warning_closed"]))
    def dispute_goes_on(self, dispute, status):
        self.try_at_stripe(lambda: self.shop.dev.move_dispute(dispute, status))

    @rule(which=st.integers(0, 99))
    def deliver(self, which):
        if events := self.shop.events():
            assert self.shop.deliver(events[which % len(events)])[0].status == 200

    @rule(which=st.integers(0, 99))
    def lose(self, which):
        if events := self.shop.events():
            self.shop.dev.drop([events[which % len(events)]])

    @rule(which=st.integers(0, 99))
    def come_back(self, which):
        if self.bought:
            bought = self.bought[which % len(self.bought)]
            buyer = self.accounts[self.buyers[bought.session]]
            stripe.confirm(self.shop.engine, self.shop.config, buyer, bought.session)

    @rule()
    def spend(self):
        with self.shop.engine.begin() as conn:
            try:
                self.shop.world.ledger.consume(conn, self.user, credits=7, key=f"spend {self.spent}")
            except InsufficientCredits:
                return
        self.spent += 7

    @rule(which=st.integers(0, 99))
    def two_accounts_become_one(self, which):
        """The one in use goes into a new one, or what an old one has got since goes into the one in use."""
        old = self.accounts[which % len(self.accounts)]
        if old == self.user:
            self.accounts.append(self.shop.world.user())
        self.merges += 1
        with self.shop.engine.begin() as conn:
            self.shop.world.ledger.merge(conn, old, into=self.user, key=f"merge {self.merges}")

    @rule(which=st.integers(0, 99))
    def a_key_changes(self, which):
        place, users = which % len(self.accounts), self.shop.world.schema.users
        old, self.accounts[place] = self.accounts[place], uuid.uuid4()
        with self.shop.engine.begin() as conn:
            conn.execute(sa.update(users).where(users.c.key == old).values(key=self.accounts[place]))

    @rule(which=st.integers(0, 99))
    def an_account_is_erased(self, which):
        erased = self.accounts[which % len(self.accounts)]
        with self.shop.engine.begin() as conn:
            self.shop.world.accounts.erase(conn, erased)
        if erased == self.user:
            self.accounts.append(self.shop.world.user())

    @rule(days=st.sampled_from([0, 1, 4]))
    def time_passes(self, days):
        self.shop.dev.advance(days * 86_400)

    @rule()
    def reconcile(self):
        stripe.reconcile(self.shop.engine, self.shop.config)

    def teardown(self):
        try:
            self.require_balance()
        finally:
            self.dev.close()
            self.shop.engine.dispose()

    def require_balance(self):
        self.dev.advance(86_400)  # what is still open expires
        self.shop.deliver_all()
        stripe.reconcile(self.shop.engine, self.shop.config)
        assert not stripe.reconcile(self.shop.engine, self.shop.config).changed
        assert sum(map(self.shop.balance, self.accounts)) == sum(map(self.worth, self.bought)) - self.spent
        with self.shop.engine.begin() as conn:
            assert all(audit(conn, self.shop.config, user=each).clean for each in self.accounts)

    def is_paid(self, bought: stripe.Checkout) -> bool:
        session = self.shop.api.checkout.sessions.retrieve(bought.session)
        return session.payment_status == "paid" and session.payment_intent is not None

    def reversals(self, intent: str) -> tuple[list[Any], list[Any]]:
        about: Any = {"payment_intent": intent, "limit": 100}
        return self.shop.api.refunds.list(about).data, self.shop.api.disputes.list(about).data

    def worth(self, bought: stripe.Checkout) -> int:
        """The credits that the money of one session stands for: the model."""
        session = self.shop.api.checkout.sessions.retrieve(bought.session)
        if session.payment_status == "unpaid":
            return 0
        granted = CREDITS * session.amount_subtotal // PRICE
        if session.payment_intent is None:
            return granted
        intent = str(session.payment_intent)
        charge = self.shop.api.payment_intents.retrieve(intent, {"expand": ["latest_charge"]}).latest_charge
        refunds, disputes = self.reversals(intent)
        gone = [one for one in refunds if one.status in ("pending", "succeeded")]
        marked = [one for one in gone if one.metadata]
        rest = charge.amount - sum(one.amount for one in marked)
        kept = max(0, granted - sum(int(one.metadata["tallystick_credits"]) for one in marked))
        part = sum(one.amount for one in gone if one not in marked)
        part += sum(one.amount for one in disputes if one.status in ("needs_response", "under_review", "lost"))
        if part >= rest:
            return 0 if part else kept
        exact = kept * part / rest
        rounded = {"down": math.floor(exact), "nearest": math.floor(exact + 0.5), "up": math.ceil(exact)}
        return kept - rounded[self.rounding[bought.session]]


@pytest.mark.filterwarnings("ignore:.*:hypothesis.errors.HypothesisWarning")
def test_the_balance_is_what_the_money_stands_for(world: World):
    machine = type("MachineHere", (Machine,), {"world": world})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=int(os.environ.get("TALLYSTICK_TEST_EXAMPLES", "10")),
            stateful_step_count=20,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            phases=[Phase.explicit, Phase.generate, Phase.shrink],
            derandomize=True,
        ),
    )
