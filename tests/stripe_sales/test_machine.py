"""User, Stripe, network and clock, doing what they like: in the end the balance is what Stripe's money stands for."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, multiple, rule, run_state_machine_as_test

from stripe_sales.shop import CREDITS, PRICE, Shop
from tallystick import InsufficientCredits, stripe
from tallystick.audit import audit
from tallystick.dev.stripe import DevStripe
from tallystick.errors import DevStripeError
from worlds import World


class Machine(RuleBasedStateMachine):
    """One user of a shop. The model is Stripe's own account, read by other rules than the code's."""

    world: World

    def __init__(self) -> None:
        super().__init__()
        self.dev = DevStripe(retry_delays_s=(), senders=1)
        self.shop = Shop(self.world, self.dev)
        self.user = self.shop.world.user()
        self.spent = 0
        self.bought: list[stripe.Checkout] = []

    sessions = Bundle("sessions")
    payments = Bundle("payments")
    refunds = Bundle("refunds")
    disputes = Bundle("disputes")

    def try_at_stripe(self, act: Callable[[], Any]) -> Any:
        """What Stripe would not do does not happen."""
        try:
            return act()
        except DevStripeError:
            return None

    @rule(target=sessions)
    def check_out(self):
        self.bought.append(self.shop.checkout(self.user))
        return self.bought[-1]

    @rule(target=payments, bought=consumes(sessions), late=st.booleans(), discount=st.sampled_from([0, 0, 250]))
    def pay(self, bought, late, discount):
        card = "async" if late else "4242424242424242"
        paid = self.try_at_stripe(lambda: self.shop.dev.pay(bought.session, card=card, discount=discount))
        return bought if paid else multiple()

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
            stripe.confirm(self.shop.engine, self.shop.config, self.user, bought.session)

    @rule()
    def spend(self):
        with self.shop.engine.begin() as conn:
            try:
                self.shop.world.ledger.consume(conn, self.user, credits=7, key=f"spend {self.spent}")
            except InsufficientCredits:
                return
        self.spent += 7

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
        assert self.shop.balance(self.user) == sum(map(self.worth, self.bought)) - self.spent
        with self.shop.engine.begin() as conn:
            assert audit(conn, self.shop.config, user=self.user).clean

    def worth(self, bought: stripe.Checkout) -> int:
        """The credits that the money of one session stands for: the model."""
        session = self.shop.api.checkout.sessions.retrieve(bought.session)
        if session.payment_status == "unpaid":
            return 0
        about = {"payment_intent": session.payment_intent or "none", "limit": 100}
        refunds = self.shop.api.refunds.list(about).data if session.payment_intent else []
        disputes = self.shop.api.disputes.list(about).data if session.payment_intent else []
        gone = sum(one.amount for one in refunds if one.status in ("pending", "succeeded"))
        gone += sum(one.amount for one in disputes if one.status in ("needs_response", "under_review", "lost"))
        paid = session.amount_total
        return CREDITS - CREDITS * min(paid, gone) // paid if paid else CREDITS


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
