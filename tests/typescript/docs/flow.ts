// The page's flow, as one user lives it: node flow.mjs, with what it needs in the environment.

import assert from "node:assert/strict";
import { createServer } from "node:http";
import type { AddressInfo } from "node:net";
import { neonConfig } from "@neondatabase/serverless";
import { giveCredits } from "./app/admin/actions";
import { POST } from "./app/api/stripe/route";
import { buy } from "./app/credits/actions";
import { CreditsBadge } from "./app/credits/badge";
import { historyPage } from "./app/credits/history";
import { unlock } from "./app/workshops/actions";
import { isOpen } from "./app/workshops/paywall";
import { createWorkshop as createInTransaction } from "./lib/create_workshop";
import { createWorkshop as createOverHttp } from "./lib/create_workshop_over_http";
import { ledger } from "./lib/credits";
import { overDrizzle, overNeon, overPg, overPostgres } from "./lib/drivers";
import { signedIn } from "./lib/session";
import { stripe } from "./lib/stripe";
import { orThrow, TallystickRefusal } from "./lib/tallystick";
import type { Address } from "../src/database";
import { neonDouble } from "../src/neon_double";

const address = JSON.parse(process.env.ADDRESS!) as Address;
const { user, workshop, old, nobody } = JSON.parse(process.env.GIVEN!) as Record<string, string>;
const neon = await neonDouble(address);
neonConfig.fetchEndpoint = neon.endpoint;
signedIn.id = user!;

// the webhook route, as a framework serves it
const statuses: number[] = [];
const server = createServer(async (request, response) => {
  let body = "";
  for await (const piece of request) body += String(piece);
  const headers = new Headers(request.headers as Record<string, string>);
  const answer = await POST(new Request("http://app.test/api/stripe", { method: "POST", body, headers }));
  statuses.push(answer.status);
  response.writeHead(answer.status).end();
});
await new Promise<void>((listening) => server.listen(0, "127.0.0.1", listening));
const endpoint = await stripe.webhookEndpoints.create({
  url: `http://127.0.0.1:${(server.address() as AddressInfo).port}/api/stripe`,
  enabled_events: ["checkout.session.completed", "checkout.session.expired"],
});
process.env.STRIPE_WEBHOOK_SECRET = endpoint.secret!;
const product = await stripe.products.create({ name: "Serial Entrepreneur" });
const price = await stripe.prices.create({ product: product.id, unit_amount: 14_900, currency: "usd" });
process.env.STRIPE_PRICE_ID = price.id;

assert.deepEqual(await unlock(workshop!), { open: false, balance: 0, required: 1 });
assert.equal(await isOpen(workshop!), false);
assert.equal(await isOpen(old!), true);
assert.equal(await isOpen(nobody!), false);
assert.equal(await isOpen("no uuid"), false);

const url = await buy("form-1");
assert.equal(await buy("form-1"), url, "a second click is the same purchase and the same session");
const sessions = await stripe.checkout.sessions.list();
assert.equal(sessions.data.length, 1);
await control("pay", { session: sessions.data[0]!.id });
await delivered(1);
const [row] = orThrow(await ledger.history({ userId: user! }));
assert.deepEqual([row?.status, row?.amountPaid, row?.currency], ["completed", 14_900, "usd"]);
const [event] = (await stripe.events.list({ type: "checkout.session.completed" })).data;
await control("resend", { event: event!.id });
await delivered(2);
assert.equal(await badge(), "3 credits");

await buy("form-2");
const abandoned = (await stripe.checkout.sessions.list({ status: "open" })).data[0]!;
await stripe.checkout.sessions.expire(abandoned.id);
await delivered(3);
assert.deepEqual(statuses, [204, 204, 204]);
const [failed] = orThrow(await ledger.history({ userId: user!, includeFailed: true, rowLimit: 1 }));
assert.match(failed!.description, /\(failed: checkout\.session\.expired\)$/);
const forged = new Request("http://app.test/", {
  method: "POST",
  body: "{}",
  headers: { "stripe-signature": "t=1,v1=0" },
});
assert.equal((await POST(forged)).status, 400);

assert.deepEqual(await unlock(workshop!), { open: true, balance: 2 });
assert.deepEqual(await unlock(workshop!), { open: true, balance: 2 });
assert.equal(await isOpen(workshop!), true);
assert.deepEqual(await unlock(nobody!), { open: false, balance: null, required: null });
assert.deepEqual(await unlock("no uuid"), { open: false, balance: null, required: null });
assert.deepEqual(await unlock(undefined as never), { open: false, balance: null, required: null });
assert.equal(await badge(), "2 credits");

const [first, second, third, fourth] = Array.from({ length: 4 }, () => crypto.randomUUID());
await createInTransaction(user!, first!, "Pricing");
assert.equal(await createOverHttp(user!, second!, "Pricing"), 0);
await assert.rejects(createInTransaction(user!, third!, "Pricing"), TallystickRefusal);
assert.equal(await createOverHttp(user!, fourth!, "Pricing"), null);
for (const [made, there] of [
  [first, true],
  [second, true],
  [third, false],
  [fourth, false],
] as const) {
  assert.equal(await isOpen(made!), there);
}

assert.equal(await giveCredits("form-3", user!, 1, "Sorry"), 1);
assert.equal(await giveCredits("form-3", user!, 1, "Sorry"), 1);
assert.equal(await badge(), "1 credit");
for (let form = 1; form <= 21; form++) await buy(`many-${form}`); // pending: of these a page is asked by an id
const pages = [];
for (let before: string | undefined, more = true; more; more = before !== undefined) {
  const page = await historyPage(before);
  before = page.older;
  pages.push(page.rows);
}
assert.deepEqual(
  pages.map((rows) => rows.length),
  [20, 6],
);
assert.deepEqual(
  pages[1]?.map((row) => row.sequence),
  [null, 5, 4, 3, 2, 1],
);
for (const over of [overPg, overPostgres, overDrizzle, overNeon]) {
  assert.equal(orThrow(await over.balance({ userId: user! })).balance, 1);
}
process.exit(0); // the page's pools stay open, as in an app

async function badge(): Promise<string> {
  const element = await CreditsBadge();
  return String((element.props as { children: unknown }).children);
}

async function control(method: string, options: object): Promise<void> {
  const answer = await fetch(`${process.env.STRIPE_API_BASE}/_control/${method}`, {
    method: "POST",
    body: JSON.stringify(options),
  });
  assert(answer.ok, await answer.text());
}

async function delivered(count: number): Promise<void> {
  for (let tries = 0; statuses.length < count; tries++) {
    assert(tries < 200, `${statuses.length} deliveries of ${count}`);
    await new Promise((later) => setTimeout(later, 50));
  }
}
