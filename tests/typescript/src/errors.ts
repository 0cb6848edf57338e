// Errors that are none of the client's stay the driver's own, and refusals are thrown where that is asked for.

import assert from "node:assert/strict";
import pg from "pg";
import { adapters } from "./adapters.ts";
import type { Address } from "./database.ts";
import { orThrow, refusalOf, tallystick, TallystickRefusal } from "./tallystick.ts";

const address = JSON.parse(process.env["ADDRESS"] ?? "") as Address;
const { rich, poor } = JSON.parse(process.env["GIVEN"] ?? "") as { rich: string; poor: string };
const pool = new pg.Pool(address);
const ledger = tallystick((text, params) => pool.query(text, params));

assert.equal(orThrow(await ledger.balance({ userId: poor })).balance, 0);
const refused = await ledger.consume({ userId: poor, key: "unlock-1" });
assert.throws(
  () => orThrow(refused),
  (error: unknown) =>
    error instanceof TallystickRefusal &&
    error.outcome === "insufficient_credits" &&
    error.answer === refused &&
    error.message.startsWith("insufficient_credits: The call needs more credits") &&
    error.message.includes('"balance":0,"creditHeld":0,"required":1'),
);
const several = await ledger.consumeMany([
  { userId: rich, key: "a" },
  { userId: poor, key: "b" },
]);
assert.throws(() => orThrow(several), TallystickRefusal);

// the host's own trigger: raised, never answered
await pool.query(`
  CREATE FUNCTION swallow() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END';
  CREATE TRIGGER swallow BEFORE UPDATE ON users FOR EACH ROW EXECUTE FUNCTION swallow()`);
await assert.rejects(
  ledger.consume({ userId: rich, key: "c" }),
  (error: unknown) => error instanceof pg.DatabaseError && refusalOf(error) === "host_interfered",
);
await pool.query("DROP TRIGGER swallow ON users");

// what a trigger of the host lacks is not taken for a function of ours
await pool.query(`
  CREATE FUNCTION broken() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN PERFORM nothing_like_it(); RETURN NEW; END';
  CREATE TRIGGER broken BEFORE UPDATE ON users FOR EACH ROW EXECUTE FUNCTION broken()`);
await assert.rejects(
  ledger.consume({ userId: rich, key: "c" }),
  (error: unknown) => error instanceof pg.DatabaseError && error.code === "42883" && refusalOf(error) === undefined,
);
await pool.query("DROP TRIGGER broken ON users");

// where each driver has the SQLSTATE
interface Wrapped {
  code?: string;
  cause?: { code?: string };
  meta?: { driverAdapterError?: { cause?: { originalCode?: string } } };
}
for (const [driver, open] of Object.entries(adapters)) {
  const { query, close } = await open(address);
  await assert.rejects(
    async () => query("DO $$ BEGIN RAISE 'again' USING ERRCODE = '40001'; END $$", []),
    ({ code, cause, meta }: Wrapped) => {
      const ofPrisma = meta?.driverAdapterError?.cause?.originalCode;
      assert.equal(driver === "prisma" ? ofPrisma : driver.startsWith("drizzle") ? cause?.code : code, "40001", driver);
      return true;
    },
  );
  await close();
}

await assert.rejects(tallystick(async () => undefined).balance({ userId: rich }), /gave neither rows/);
await assert.rejects(
  tallystick(async () => [{ outcome: "completed" }]).balance({ userId: rich }),
  /pass rows on as they are/,
);
await pool.end();
