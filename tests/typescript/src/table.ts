// One table of operations and what each is to answer, for every driver. A row's call may use what earlier rows answered.

import assert from "node:assert/strict";
import type { Credits, Json, Tallystick } from "./tallystick.ts";

/** What the test made in the database beforehand. */
export interface Given<Key> {
  user: Key;
  /** Soft-deleted. */
  gone: Key;
  nobody: Key;
  /** Another user, with credits. */
  rich: Key;
  bigint: boolean;
}

export interface Row {
  does: string;
  call: () => Promise<unknown>;
  /** The parts of the answer that are looked at: values, or tests of one. */
  answers: unknown;
}

const NOBODYS_PURCHASE = "00000000-0000-7000-8000-000000000000";

const ODD = { path: "C:\\u0000dir", brackets: '[{"\\'.repeat(200) };

function nested(depth: number): { [name: string]: Json } {
  let value: { [name: string]: Json } = {};
  for (let n = 1; n < depth; n++) value = { a: value };
  return value;
}

function says(words: string): (text: unknown) => boolean {
  return (text) => String(text).includes(words);
}

export function isMoment(value: unknown): boolean {
  return value instanceof Date && Math.abs(value.getTime() - Date.now()) < 3_600_000;
}

function isSomething(value: unknown): boolean {
  return value instanceof Object;
}

export function isUuid(value: unknown): boolean {
  return typeof value === "string" && /^[0-9a-f-]{36}$/.test(value);
}

export function table<Key>(ledger: Tallystick, given: Given<Key>): Row[] {
  const n = (credits: number) => (given.bigint ? BigInt(credits) : credits) as unknown as Credits;
  // keys are typed by the host; this table is for all
  const user = given.user as never;
  const gone = given.gone as never;
  const nobody = given.nobody as never;
  const rich = given.rich as never;
  const session = `cs_${String(given.user)}`;
  let bought = "";
  let held = "";
  let paidAt = new Date(0);
  return [
    {
      does: "an empty balance",
      call: () => ledger.balance({ userId: user }),
      answers: { outcome: "completed", userId: user, balance: n(0) },
    },
    {
      does: "the balance of nobody",
      call: () => ledger.balance({ userId: nobody }),
      answers: { outcome: "unknown_user" },
    },
    {
      does: "nothing to spend",
      call: () => ledger.consume({ userId: user, key: "too soon" }),
      answers: { outcome: "insufficient_credits", balance: n(0), required: n(1), type: undefined },
    },
    {
      does: "a purchase begins",
      call: async () => {
        const answer = await ledger.startPurchase({
          userId: user,
          amount: 5,
          description: "Purchased “Ünï” \\ 'pack'",
          key: "order-1",
          stripePriceId: "price_1",
          metadata: { tags: ["a", null, 1.5, true], nested: { 'quote"': "\\" }, left: undefined },
        });
        if (answer.outcome === "completed") bought = answer.id;
        return answer;
      },
      answers: {
        outcome: "completed",
        id: isUuid,
        userId: user,
        type: "purchase",
        status: "pending",
        amount: n(5),
        balanceAfter: null,
        sequence: null,
        description: "Purchased “Ünï” \\ 'pack'",
        refundOf: null,
        stripeSessionId: null,
        stripePriceId: "price_1",
        idempotencyKey: "order-1",
        metadata: { tags: ["a", null, 1.5, true], nested: { 'quote"': "\\" } },
        createdAt: isMoment,
        completedAt: null,
        balance: n(0),
        required: undefined,
        detail: undefined,
      },
    },
    {
      does: "the same purchase again",
      call: () => ledger.startPurchase({ userId: user, amount: 5, description: "anything", key: "order-1" }),
      answers: { outcome: "replayed", id: () => true, description: "Purchased “Ünï” \\ 'pack'" },
    },
    {
      does: "its key for another amount",
      call: () => ledger.startPurchase({ userId: user, amount: 6, description: "anything", key: "order-1" }),
      answers: { outcome: "idempotency_key_reused", differs: { amount: [5, 6] } },
    },
    {
      does: "its session",
      call: () => ledger.attachSession({ userId: user, purchaseId: bought, stripeSessionId: session }),
      answers: { outcome: "completed", stripeSessionId: session, stripePaymentIntentId: null },
    },
    {
      does: "another session",
      call: () => ledger.attachSession({ userId: user, purchaseId: bought, stripeSessionId: `${session}_2` }),
      answers: { outcome: "session_conflict", id: isUuid, stripeSessionId: session },
    },
    {
      does: "a refund of what is not paid",
      call: () => ledger.refund({ userId: user, purchaseId: bought, key: "re_0" }),
      answers: { outcome: "purchase_not_completed", status: "pending" },
    },
    {
      does: "it is paid",
      call: async () => {
        const answer = await ledger.completePurchase({
          userId: user,
          stripeSessionId: session,
          amountPaid: 14_900,
          currency: "USD",
          stripePaymentIntentId: "pi_1",
        });
        if (answer.outcome === "completed" && answer.completedAt) paidAt = answer.completedAt;
        return answer;
      },
      answers: {
        outcome: "completed",
        status: "completed",
        amount: n(5),
        balanceAfter: n(5),
        sequence: 1,
        amountPaid: 14_900,
        currency: "usd",
        completedAt: isMoment,
        balance: n(5),
      },
    },
    {
      does: "it is told again",
      call: () => ledger.completePurchase({ userId: user, purchaseId: bought, amountPaid: 14_900n, currency: "usd" }),
      answers: { outcome: "replayed", balance: n(5) },
    },
    {
      does: "another payment of it, beyond the numbers of JavaScript",
      call: () =>
        ledger.completePurchase({
          userId: user,
          purchaseId: bought,
          amountPaid: 2n ** 53n + 1n,
          currency: "usd",
          stripePaymentIntentId: '\\"9007199254740993',
        }),
      answers: {
        outcome: "idempotency_key_reused",
        differs: {
          amountPaid: [14_900, "9007199254740993"],
          stripePaymentIntentId: ["pi_1", '\\"9007199254740993'],
        },
      },
    },
    {
      does: "it cannot fail",
      call: () => ledger.failPurchase({ userId: user, purchaseId: bought, reason: "expired" }),
      answers: { outcome: "purchase_not_pending", status: "completed" },
    },
    {
      does: "a purchase of nobody's",
      call: () => ledger.completePurchase({ userId: user, purchaseId: NOBODYS_PURCHASE }),
      answers: { outcome: "unknown_purchase" },
    },
    {
      does: "a credit is spent",
      call: () => ledger.consume({ userId: user, key: "job-1", metadata: { model: "small" } }),
      answers: {
        outcome: "completed",
        type: "consumption",
        amount: n(-1),
        balanceAfter: n(4),
        sequence: 2,
        description: "Credit consumed",
        metadata: { model: "small" },
        balance: n(4),
      },
    },
    {
      does: "once",
      call: () => ledger.consume({ userId: user, key: "job-1", amount: 1, description: null }),
      answers: { outcome: "replayed", sequence: 2, balance: n(4) },
    },
    {
      does: "its key for more",
      call: () => ledger.consume({ userId: user, key: "job-1", amount: 2 }),
      answers: { outcome: "idempotency_key_reused", differs: { amount: [-1, -2] } },
    },
    {
      does: "more than there is",
      call: () => ledger.consume({ userId: user, key: "job-2", amount: 9 }),
      answers: { outcome: "insufficient_credits", balance: n(4), required: n(9) },
    },
    {
      does: "an amount of none",
      call: () => ledger.consume({ userId: user, key: "job-3", amount: 0 }),
      answers: {
        outcome: "invalid_argument",
        argument: "amount",
        expected: (text: string) => text.startsWith("a whole number from 1 to "),
      },
    },
    {
      does: "an amount that no number of credits is",
      call: () => ledger.consume({ userId: user, key: "job-4", amount: 1.5 }),
      answers: { outcome: "invalid_argument", argument: "amount" },
    },
    {
      does: "a key that PostgreSQL cannot hold",
      call: () => ledger.consume({ userId: user, key: "job\0" }),
      answers: { outcome: "invalid_argument", argument: "key" },
    },
    {
      does: "metadata that PostgreSQL cannot hold",
      call: () => ledger.consume({ userId: user, key: "job-5", metadata: { half: "\ud83d" } }),
      answers: { outcome: "invalid_argument", argument: "metadata" },
    },
    {
      does: "metadata that is no object",
      call: () => ledger.consume({ userId: user, key: "job-6", metadata: ["list"] as never }),
      answers: { outcome: "invalid_argument", argument: "metadata", expected: "a JSON object" },
    },
    {
      does: "a key left out",
      call: () => ledger.consume({ userId: user } as never),
      answers: { outcome: "invalid_argument", argument: "key" },
    },
    {
      does: "a deleted user",
      call: () => ledger.consume({ userId: gone, key: "job-1" }),
      answers: { outcome: "user_deleted", deletedAt: (text: string) => isMoment(new Date(text)) },
    },
    {
      does: "many at once",
      call: () =>
        ledger.consumeMany([
          { userId: user, key: "many-1", description: 'It\'s {first}, "quoted" \\ and, comma' },
          { userId: nobody, key: "many-1" },
          { userId: user, key: "many-2", amount: 50 },
          { userId: user, key: "job-1" },
          { userId: user, key: "many-3", metadata: { n: 3, text: '{"}' } },
        ]),
      answers: [
        {
          outcome: "completed",
          balanceAfter: n(3),
          sequence: 3,
          description: 'It\'s {first}, "quoted" \\ and, comma',
          balance: n(3),
        },
        { outcome: "unknown_user" },
        { outcome: "insufficient_credits", required: n(50) },
        { outcome: "replayed", sequence: 2 },
        { outcome: "completed", balanceAfter: n(2), sequence: 4, metadata: { n: 3, text: '{"}' }, item: undefined },
      ],
    },
    { does: "none at all", call: () => ledger.consumeMany([]), answers: [] },
    {
      does: "many, some of which cannot be sent",
      call: () =>
        ledger.consumeMany([
          { userId: user, key: "many-4", amount: 0.5 },
          { userId: user, key: "job-1" },
          { userId: user, key: "many-5", metadata: { cost: NaN } },
          { userId: user, key: "many-6\0" },
          { userId: user, key: "many-2", amount: 50 },
        ]),
      answers: [
        { outcome: "invalid_argument", argument: "amount" },
        { outcome: "replayed", sequence: 2 },
        { outcome: "invalid_argument", argument: "metadata" },
        { outcome: "invalid_argument", argument: "key" },
        { outcome: "insufficient_credits", required: n(50) },
      ],
    },
    {
      does: "many, none of which can be sent",
      call: () => ledger.consumeMany([{ userId: user, key: "many-4", amount: 0.5 }]),
      answers: [{ outcome: "invalid_argument", argument: "amount" }],
    },
    {
      does: "metadata with a number that JSON does not have",
      call: () => ledger.consume({ userId: user, key: "job-7", metadata: { cost: { usd: [Infinity] } } }),
      answers: { outcome: "invalid_argument", argument: "metadata" },
    },
    {
      does: "a refund",
      call: () => ledger.refund({ userId: user, purchaseId: bought, key: "re_1", amount: 1 }),
      answers: { outcome: "completed", type: "refund", amount: n(-1), refundOf: isUuid, balanceAfter: n(1) },
    },
    {
      does: "a refund of more than it was",
      call: () => ledger.refund({ userId: user, purchaseId: bought, key: "re_2", amount: 5 }),
      answers: { outcome: "refund_exceeds_purchase", amount: n(5), required: n(5), remaining: n(4) },
    },
    {
      does: "a refund of the rest, into debt",
      call: () => ledger.refund({ userId: user, purchaseId: bought, key: "re_3", amount: null }),
      answers: { outcome: "completed", amount: n(-4), balance: n(-3) },
    },
    {
      does: "a refund of nothing",
      call: () => ledger.refund({ userId: user, purchaseId: bought, key: "re_4" }),
      answers: { outcome: "refund_exceeds_purchase", required: undefined, remaining: n(0) },
    },
    {
      does: "more given back than taken",
      call: () => ledger.reinstate({ userId: user, purchaseId: bought, key: "re_1 failed", amount: 6 }),
      answers: { outcome: "reinstatement_exceeds_refunds", remaining: n(5) },
    },
    {
      does: "given back",
      call: () => ledger.reinstate({ userId: user, purchaseId: bought, key: "re_1 failed", amount: 1 }),
      answers: { outcome: "completed", type: "grant", amount: n(1), balance: n(-2) },
    },
    {
      does: "a grant",
      call: () => ledger.grant({ userId: user, amount: 2, key: "welcome", description: "Welcome" }),
      answers: { outcome: "completed", type: "grant", amount: n(2), balance: n(0) },
    },
    {
      does: "a grant beyond all range",
      call: () =>
        ledger.grant({
          userId: user,
          amount: given.bigint ? ((2n ** 63n) as never) : 2 ** 31,
          key: "too much",
          description: "All",
        }),
      answers: { outcome: "invalid_argument", argument: "amount" },
    },
    {
      does: "credits that expire",
      call: () =>
        ledger.grant({
          userId: user,
          amount: 4,
          key: "spring",
          description: "Spring",
          expiresAt: new Date(Date.now() + 1_800_000),
        }),
      answers: { outcome: "completed", expiresAt: isMoment, balance: n(4), creditHeld: n(0) },
    },
    ...["+275760-09-13T00:00:00Z", "-000001-01-01T00:00:00Z", "0000-12-31T00:00:00Z", "no moment"].map((text) => ({
      does: `credits that expire at ${text}`,
      call: () =>
        ledger.grant({ userId: user, amount: 1, key: "far", description: "Far", expiresAt: new Date(text) }),
      answers: { outcome: "invalid_argument", argument: "expiresAt", expected: says("years 1 to 9999") },
    })),
    {
      does: "a balance long ago, and one in the last year that is read",
      call: () =>
        Promise.all(
          ["0001-01-01T00:00:00Z", "9999-12-31T00:00:00Z"].map((text) =>
            ledger.balanceAt({ userId: user, at: new Date(text) }),
          ),
        ),
      answers: [
        { outcome: "completed", balance: n(0) },
        { outcome: "completed", balance: n(4) },
      ],
    },
    ...[101, 100_000].map((depth) => ({
      does: `metadata that is nested ${depth} deep`,
      call: () => ledger.consume({ userId: user, key: "deep", metadata: nested(depth) }),
      answers: { outcome: "invalid_argument", argument: "metadata", expected: says("at most 100 deep") },
    })),
    {
      does: "metadata with a NUL",
      call: () => ledger.consume({ userId: user, key: "NUL", metadata: { path: ["\0"] } }),
      answers: { outcome: "invalid_argument", argument: "metadata" },
    },
    {
      does: "metadata of the most depth, with letters that look like a NUL and like brackets",
      call: () =>
        ledger.grant({ userId: nobody, amount: 1, key: "path", description: "Path", metadata: { ...nested(100), ...ODD } }),
      answers: { outcome: "unknown_user" },
    },
    {
      does: "the lots",
      call: () => ledger.lots({ userId: user }),
      answers: [{ outcome: "completed", description: "Spring", amount: n(4), remaining: n(4), expiresAt: isMoment }],
    },
    {
      does: "a hold",
      call: async () => {
        const answer = await ledger.hold({ userId: user, amount: 3, key: "work-1", expiresIn: "20 minutes" });
        if (answer.outcome === "completed") held = answer.id;
        return answer;
      },
      answers: {
        outcome: "completed",
        status: "pending",
        amount: n(-3),
        balance: n(4),
        creditHeld: n(3),
        expiresAt: isMoment,
      },
    },
    ...["300", "soon", "", "1.5 hours", "-1 days", "99999999 years"].map((length) => ({
      does: `a hold for ${JSON.stringify(length)}`,
      call: () => ledger.hold({ userId: user, amount: 1, key: "work-0", expiresIn: length as never }),
      answers: { outcome: "invalid_argument", argument: "expiresIn" },
    })),
    ...["90", "99999999 weeks", "0 days"].map((length) => ({
      does: `a purchase that lasts ${JSON.stringify(length)}`,
      call: () =>
        ledger.startPurchase({ userId: user, amount: 1, description: "Lasts", expiresAfter: length as never }),
      answers: { outcome: "invalid_argument", argument: "expiresAfter" },
    })),
    {
      does: "a hold that is not covered",
      call: () => ledger.hold({ userId: user, amount: 2, key: "work-2" }),
      answers: { outcome: "insufficient_credits", balance: n(4), creditHeld: n(3), required: n(2) },
    },
    {
      does: "an account with a hold that is merged",
      call: () => ledger.merge({ userId: user, intoUserId: rich, key: "merged" }),
      answers: { outcome: "holds_pending", creditHeld: n(3) },
    },
    {
      does: "an account that is merged under another call's key",
      call: () => ledger.merge({ userId: user, intoUserId: rich, key: "spring" }),
      answers: { outcome: "idempotency_key_reused", id: isUuid, differs: isSomething },
    },
    {
      does: "what can be spent",
      call: () => ledger.balance({ userId: user }),
      answers: { outcome: "completed", balance: n(4), creditHeld: n(3) },
    },
    {
      does: "more captured than held",
      call: () => ledger.capture({ userId: user, holdId: held, amount: 9 }),
      answers: { outcome: "capture_exceeds_hold", required: n(9), remaining: n(3) },
    },
    {
      does: "the hold captured",
      call: () => ledger.capture({ userId: user, holdId: held, amount: 2 }),
      answers: { outcome: "completed", amount: n(-2), balanceAfter: n(2), creditHeld: n(0) },
    },
    {
      does: "released afterwards",
      call: () => ledger.release({ userId: user, holdId: held }),
      answers: { outcome: "hold_closed", status: "completed" },
    },
    {
      does: "half of it reversed",
      call: () => ledger.reverse({ userId: user, consumptionId: held, key: "rev-1", amount: 1 }),
      answers: { outcome: "completed", type: "reversal", amount: n(1), balance: n(3) },
    },
    {
      does: "more reversed than was left",
      call: () => ledger.reverse({ userId: user, consumptionId: held, key: "rev-2", amount: 2 }),
      answers: { outcome: "reversal_exceeds_consumption", amount: n(-2), required: n(2), remaining: n(1) },
    },
    {
      does: "a mistaken grant",
      call: async () => {
        const given = await ledger.grant({ userId: user, amount: 7, key: "oops", description: "Oops" });
        assert(given.outcome === "completed");
        return ledger.correct({ userId: user, grantId: given.id, key: "oops back" });
      },
      answers: { outcome: "completed", type: "correction", amount: n(-7), balance: n(3), description: "Corrected: Oops" },
    },
    {
      does: "all spent",
      call: () => ledger.consume({ userId: user, amount: 3, key: "rest" }),
      answers: { outcome: "completed", balanceAfter: n(0) },
    },
    {
      does: "a purchase that fails",
      call: async () => {
        const begun = await ledger.startPurchase({ userId: user, amount: 1, description: "Purchased one" });
        assert(begun.outcome === "completed");
        return ledger.failPurchase({ userId: user, purchaseId: begun.id, reason: "expired" });
      },
      answers: {
        outcome: "completed",
        status: "failed",
        description: "Purchased one (failed: expired)",
        completedAt: null,
      },
    },
    {
      does: "a purchase left pending",
      call: () => ledger.startPurchase({ userId: user, amount: 1, description: "Purchased one" }),
      answers: { outcome: "completed", status: "pending" },
    },
    {
      does: "the newest rows",
      call: () => ledger.history({ userId: user, rowLimit: 3 }),
      answers: [
        { outcome: "completed", status: "pending", sequence: null },
        { sequence: 14, description: "Credit consumed", amount: n(-3) },
        { sequence: 13, type: "correction", balance: undefined },
      ],
    },
    {
      does: "older ones",
      call: () => ledger.history({ userId: user, before: "3" }),
      answers: [
        { sequence: 2, metadata: { model: "small" } },
        { sequence: 1, amountPaid: 14_900, createdAt: isMoment },
      ],
    },
    {
      does: "failed ones too",
      call: () => ledger.history({ userId: user, includeFailed: true, rowLimit: 2 }),
      answers: [{ status: "pending" }, { status: "failed" }],
    },
    {
      does: "the first event",
      call: () => ledger.events({ rowLimit: 1 }),
      answers: [
        {
          outcome: "completed",
          kind: (kind: unknown) => typeof kind === "string" && kind.endsWith(".completed"),
          eventId: (id: unknown) => typeof id === "number",
          createdAt: isMoment,
          transactionId: isUuid,
          threshold: null,
        },
      ],
    },
    {
      does: "events behind no cursor",
      call: () => ledger.events({ after: "yesterday" }),
      answers: [{ outcome: "invalid_argument", argument: "after" }],
    },
    {
      does: "a threshold of the user's own",
      call: () => ledger.setLowBalance({ userId: user, threshold: n(3) }),
      answers: { outcome: "completed", userId: user, planTier: "free" },
    },
    { does: "history of nobody", call: () => ledger.history({ userId: nobody }), answers: [] },
    {
      does: "history of too many rows",
      call: () => ledger.history({ userId: user, rowLimit: 1001 }),
      answers: [{ outcome: "invalid_argument", argument: "rowLimit" }],
    },
    {
      does: "the balance just after it was paid",
      call: () => ledger.balanceAt({ userId: user, at: new Date(paidAt.getTime() + 1) }),
      answers: { outcome: "completed", balance: (credits: unknown) => Number(credits) <= 5 },
    },
    {
      does: "the balance before all",
      call: () => ledger.balanceAt({ userId: user, at: new Date("2001-02-03T04:05:06.789Z") }),
      answers: { outcome: "completed", balance: n(0) },
    },
    {
      does: "the balance at no moment",
      call: () => ledger.balanceAt({ userId: user, at: new Date("nonsense") }),
      answers: { outcome: "invalid_argument", argument: "at" },
    },
    {
      does: "the user's lock",
      call: () => ledger.lock({ userId: user }),
      answers: { outcome: "completed", balance: n(0) },
    },
    {
      does: "the account",
      call: () => ledger.account({ userId: user }),
      answers: {
        outcome: "completed",
        userId: user,
        creditBalance: n(0),
        onboardingComplete: false,
        stripeCustomerId: null,
        planTier: "free",
        updatedAt: isMoment,
        deletedAt: null,
        detail: undefined,
      },
    },
    {
      does: "onboarding seen through",
      call: () => ledger.completeOnboarding({ userId: user }),
      answers: { outcome: "completed", onboardingComplete: true },
    },
    {
      does: "onboarding again",
      call: () => ledger.resetOnboarding({ userId: user }),
      answers: { outcome: "completed", onboardingComplete: false },
    },
    {
      does: "a plan",
      call: () => ledger.setPlanTier({ userId: user, planTier: "pro" }),
      answers: { outcome: "completed", planTier: "pro" },
    },
    {
      does: "a plan of no name",
      call: () => ledger.setPlanTier({ userId: user, planTier: "" }),
      answers: { outcome: "invalid_argument", argument: "planTier", expected: "a text of 1 to 32 characters" },
    },
    {
      does: "a Stripe customer",
      call: () => ledger.setStripeCustomer({ userId: user, stripeCustomerId: `cus_${String(user)}` }),
      answers: { outcome: "completed", stripeCustomerId: `cus_${String(user)}` },
    },
    {
      does: "another Stripe customer",
      call: () => ledger.setStripeCustomer({ userId: user, stripeCustomerId: "cus_other" }),
      answers: { outcome: "stripe_customer_conflict", has: `cus_${String(user)}` },
    },
    {
      does: "a Stripe customer of another user",
      call: () => ledger.setStripeCustomer({ userId: gone, stripeCustomerId: `cus_${String(user)}` }),
      answers: { outcome: "stripe_customer_conflict", ofAnotherUser: true },
    },
    {
      does: "the user is deleted",
      call: () => ledger.deleteUser({ userId: user }),
      answers: { outcome: "completed", deletedAt: isMoment },
    },
    {
      does: "the user is back",
      call: () => ledger.restoreUser({ userId: user }),
      answers: { outcome: "completed", deletedAt: null },
    },
    {
      does: "an account that is merged",
      call: async () => {
        const answer = await ledger.merge({ userId: user, intoUserId: rich, key: "merged" });
        assert.deepEqual(Object.keys(answer).sort(), ["amount", "balance", "outcome", "userId"]);
        return answer;
      },
      answers: { outcome: "completed", userId: rich },
    },
  ];
}

/** Calls each in turn, and says which answered otherwise. */
export async function run(rows: Row[]): Promise<void> {
  for (const { does, call, answers } of rows) {
    const answer = await call();
    try {
      matches(answer, answers);
    } catch (error) {
      throw new Error(`${does}: ${(error as Error).message}\nanswered ${shown(answer)}`);
    }
  }
}

function matches(found: unknown, wanted: unknown): void {
  if (typeof wanted === "function") {
    assert.ok((wanted as (value: unknown) => unknown)(found), `${shown(found)} is not as wanted`);
  } else if (Array.isArray(wanted)) {
    assert.ok(Array.isArray(found), "no list");
    assert.equal(found.length, wanted.length, "the number of answers");
    wanted.forEach((each, n) => matches(found[n], each));
  } else if (found instanceof Object && "outcome" in found) {
    for (const [name, value] of Object.entries(wanted as object))
      matches((found as Record<string, unknown>)[name], value);
  } else {
    assert.deepEqual(found, wanted);
  }
}

function shown(value: unknown): string {
  return JSON.stringify(value, (_, each: unknown) => (typeof each === "bigint" ? `${each}n` : each), 1);
}
