// CPU of a call through pg of Node, for cpu.py: node cpu.mjs CALLS USERS KEY-USED-BEFORE
//
// pg sends each statement anew, as its query(text, params) does; with a name it is prepared once for the connection.

import { createHash, randomUUID } from "node:crypto";
import { readFileSync } from "node:fs";
import pg from "pg";
import { tallystick, type Query } from "./tallystick.ts";

const [calls, users, used] = [Number(process.argv[2]), Number(process.argv[3]), process.argv[4]!];
const client = new pg.Client();
await client.connect();
const { rows } = await client.query<{ pid: number }>("SELECT pg_backend_pid() AS pid");
const pid = rows[0]!.pid;

/** In the ticks of Linux, a hundredth of a second each. */
function serverMs(): number {
  const fields = readFileSync(`/proc/${pid}/stat`, "utf8").split(") ").at(-1)!.split(" ");
  return (Number(fields[11]) + Number(fields[12])) * 10;
}

const queries: Record<string, Query> = {
  "pg of Node": (text, params) => client.query(text, params),
  "pg of Node, named": (text, values) =>
    client.query({ name: createHash("md5").update(text).digest("hex"), text, values }),
};

const results: Record<string, { server: number; client: number }> = {};
for (const [way, query] of Object.entries(queries)) {
  const ledger = tallystick(query);
  const user = () => String(1 + Math.floor(Math.random() * users));
  const kinds: Record<string, [outcome: string, call: () => Promise<{ outcome: string }>]> = {
    consume: ["completed", () => ledger.consume({ userId: user(), key: randomUUID() })],
    "consume refused": [
      "insufficient_credits",
      () => ledger.consume({ userId: user(), key: randomUUID(), amount: 2_000_000_000 }),
    ],
    "consume replayed": ["replayed", () => ledger.consume({ userId: "1", key: used })],
  };
  for (const [kind, [outcome, call]] of Object.entries(kinds)) {
    for (let n = 0; n < 20; n++) await call();
    const [server, own] = [serverMs(), process.cpuUsage()];
    for (let n = 0; n < calls; n++) {
      const answer = await call();
      if (answer.outcome !== outcome) throw new Error(`${kind} was answered with ${answer.outcome}`);
    }
    const { user: inUser, system } = process.cpuUsage(own);
    results[`${kind}, ${way}`] = { server: (serverMs() - server) / calls, client: (inUser + system) / 1000 / calls };
  }
}
await client.end();
console.log(JSON.stringify(results));
