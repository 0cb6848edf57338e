// Batches that cannot branch, rolled back as a whole by a strict call: node out/src/batches.js

import assert from "node:assert/strict";
import { PrismaPg } from "@prisma/adapter-pg";
import { sql as drizzleSql } from "drizzle-orm";
import { drizzle } from "drizzle-orm/neon-http";
import { pgTable, text, uuid } from "drizzle-orm/pg-core";
import pg from "pg";
import { PrismaClient } from "../prisma/client.ts";
import { openNeon } from "./adapters.ts";
import type { Address } from "./database.ts";
import { calls, refusalOf, tallystick, TallystickRefusal, template } from "./tallystick.ts";

const workshops = pgTable("workshops", {
  id: uuid("id").primaryKey(),
  userId: uuid("user_id").notNull(),
  title: text("title"),
});

const address = JSON.parse(process.env["ADDRESS"] ?? "") as Address;
const { rich, poor } = JSON.parse(process.env["GIVEN"] ?? "") as { rich: string; poor: string };
const pool = new pg.Pool(address);
const ledger = tallystick((statement, params) => pool.query(statement, params));

/** Makes a workshop and unlocks it, in one batch; gives the balance that is left. */
type Batch = (userId: string, workshopId: string) => Promise<number>;

async function holds(name: string, batch: Batch): Promise<void> {
  const before = await balanceOf(rich);
  const made = crypto.randomUUID();
  assert.equal(await batch(rich, made), before - 1, name);
  assert.equal((await ledger.access({ workshopId: made })).outcome, "completed", name);

  const refused = crypto.randomUUID();
  await assert.rejects(batch(poor, refused), (error) => refusalOf(error) === "insufficient_credits", name);
  assert.equal((await ledger.access({ workshopId: refused })).outcome, "unknown_workshop", `${name}: not rolled back`);
}

async function balanceOf(userId: string): Promise<number> {
  const answer = await ledger.balance({ userId });
  assert(answer.outcome === "completed");
  return answer.balance;
}

const neon = await openNeon(address);
await holds("Neon", async (userId, workshopId) => {
  const call = calls.consume({ userId, workshopId, key: workshopId }).strict;
  const [, rows] = await neon.sql.transaction([
    neon.sql`INSERT INTO workshops (id, user_id) VALUES (${workshopId}, ${userId})`,
    neon.sql.query(call.text, call.params),
  ]);
  return call.read(rows).balance;
});

const db = drizzle(neon.sql);
await holds("Drizzle over Neon", async (userId, workshopId) => {
  const call = calls.consume({ userId, workshopId, key: workshopId }).strict;
  const [, result] = await db.batch([
    db.insert(workshops).values({ id: workshopId, userId, title: "Pricing" }),
    db.execute(template(drizzleSql, call.text, call.params)),
  ]);
  return call.read(result).balance;
});
await neon.close();

const prisma = new PrismaClient({ adapter: new PrismaPg(address) });
await holds("Prisma", async (userId, workshopId) => {
  const call = calls.consumeMany([{ userId, workshopId, key: workshopId }]).strict;
  const [, rows] = await prisma.$transaction([
    prisma.$executeRaw`INSERT INTO workshops (id, user_id) VALUES (${workshopId}::uuid, ${userId}::uuid)`,
    prisma.$queryRawUnsafe(call.text, ...call.params),
  ]);
  return call.read(rows)[0]!.balance;
});
await prisma.$disconnect();

assert.throws(() => calls.balance({ userId: "no uuid" }).params, TallystickRefusal);
assert.throws(
  () => calls.consumeMany([{ userId: rich, key: "a" }, { userId: rich, key: "b", amount: 0.5 }]).params,
  (error: unknown) => error instanceof TallystickRefusal && error.message.includes('"argument":"amount"'),
);
await pool.end();
