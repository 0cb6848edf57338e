// The tables over one driver: node out/src/operations.js DRIVER, with the rest as JSON in the environment.

import assert from "node:assert/strict";
import { adapters, Enough, transactions } from "./adapters.ts";
import type { Address } from "./database.ts";
import { run, table } from "./table.ts";
import { tallystick } from "./tallystick.ts";
import { workshopTable, type GivenWorkshops } from "./workshops.ts";

const [driver = ""] = process.argv.slice(2);
const address = JSON.parse(process.env["ADDRESS"] ?? "") as Address;
const given = JSON.parse(process.env["GIVEN"] ?? "") as GivenWorkshops<string, string>;

const transact = transactions[driver];
if (transact) {
  // all of it in one transaction, which stays usable after each refusal, and leaves nothing when it is given up
  await assert.rejects(
    transact(address, async (query) => {
      const ledger = tallystick(query);
      await run([...table(ledger, given), ...workshopTable(ledger, given)]);
      throw new Enough();
    }),
    Enough,
  );
}

const { query, close } = await adapters[driver]!(address);
try {
  const ledger = tallystick(query);
  const { user } = given;
  await run([
    { does: "nothing is left", call: () => ledger.history({ userId: user, includeFailed: true }), answers: [] },
    {
      does: "a user's key that is no UUID",
      call: () => ledger.balance({ userId: "1 OR true" }),
      answers: { outcome: "invalid_argument", argument: "userId", expected: "a UUID" },
    },
    ...table(ledger, given),
    ...workshopTable(ledger, given),
  ]);
} finally {
  await close();
}
