// The tables over pg for any shape of host: node out/SHAPE/shape.js, with the rest as JSON in the environment.

import pg from "pg";
import type { Address } from "./database.ts";
import { run, table, type Given, type Row } from "./table.ts";
import { tallystick, type Tallystick } from "./tallystick.ts";

const address = JSON.parse(process.env["ADDRESS"] ?? "") as Address;
const given = JSON.parse(process.env["GIVEN"] ?? "") as Given<unknown>;
const withWorkshops = "./workshops.js"; // not there for a host without workshops

const pool = new pg.Pool(address);
const ledger = tallystick((text, params) => pool.query(text, params));
const rows = table(ledger, given);
if ("workshop" in given) {
  const { workshopTable } = (await import(withWorkshops)) as {
    workshopTable(ledger: Tallystick, given: object): Row[];
  };
  rows.push(...workshopTable(ledger, given));
}
await run(rows);
await pool.end();
