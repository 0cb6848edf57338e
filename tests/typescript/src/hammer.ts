// The hammer's client in Node (tests/proof/hammer.py): it reads a question a line, and writes an answer a line.
//
// A question is one or more calls for a driver: each by itself, or all in one transaction of an isolation level, which
// with Neon's driver is a batch. Several questions are answered at the same time.

import { createInterface } from "node:readline";
import { neon, neonConfig, type NeonQueryPromise } from "@neondatabase/serverless";
import pg from "pg";
import { neonDouble } from "./neon_double.ts";
import { tallystick, type Query, type Tallystick } from "./tallystick.ts";

type LedgerRequest = [what: string, user: string, key: string | null, amount: number, of: string | null];

interface Question {
  n: number;
  driver: "pg" | "neon-http";
  level: string;
  calls: LedgerRequest[][];
}

const { PGHOST = "", PGPORT = "", PGUSER = "", PGDATABASE = "" } = process.env;
const address = { host: PGHOST, port: Number(PGPORT), user: PGUSER, database: PGDATABASE };
const pool = new pg.Pool(address);
// a connection that dies between two statements emits an event; the next statement fails
pool.on("error", () => undefined);
pool.on("connect", (client) => client.on("error", () => undefined));
neonConfig.fetchEndpoint = (await neonDouble(address)).endpoint;
const sql = neon(`postgresql://${address.user}:secret@neon.invalid/${address.database}`);

async function answer({ driver, level, calls }: Question): Promise<unknown[]> {
  if (level === "AUTOCOMMIT") {
    const query: Query =
      driver === "pg" ? (text, params) => pool.query(text, params) : (text, params) => sql.query(text, params);
    return inTurn(query, calls);
  }
  return driver === "pg" ? transaction(level, calls) : batch(level, calls);
}

async function transaction(level: string, calls: LedgerRequest[][]): Promise<unknown[]> {
  const client = await pool.connect();
  try {
    await client.query(`BEGIN ISOLATION LEVEL ${level}`);
    const answers = await inTurn((text, params) => client.query(text, params), calls);
    await client.query("COMMIT");
    client.release();
    return answers;
  } catch (error) {
    client.release(true); // the transaction ends with its connection
    throw error;
  }
}

/** Collects the statements of all calls, and sends them as one batch. */
async function batch(level: string, calls: LedgerRequest[][]): Promise<unknown[]> {
  const statements: NeonQueryPromise<false, false>[] = [];
  const resolvers: ((rows: unknown) => void)[] = [];
  const query: Query = (text, params) => {
    statements.push(sql.query(text, params) as NeonQueryPromise<false, false>);
    return new Promise((resolve) => resolvers.push(resolve));
  };
  const answers = calls.map((call) => send(tallystick(query), call));
  const isolationLevel = { "READ COMMITTED": "ReadCommitted", "REPEATABLE READ": "RepeatableRead" }[level];
  const results = await sql.transaction(statements, {
    isolationLevel: (isolationLevel ?? "Serializable") as "ReadCommitted" | "RepeatableRead" | "Serializable",
  });
  results.forEach((rows, n) => resolvers[n]!(rows));
  return (await Promise.all(answers)).flat();
}

async function inTurn(query: Query, calls: LedgerRequest[][]): Promise<unknown[]> {
  const answers = [];
  for (const call of calls) answers.push(...(await send(tallystick(query), call)));
  return answers;
}

async function send(ledger: Tallystick, call: LedgerRequest[]): Promise<unknown[]> {
  if (call.length > 1) return ledger.consumeMany(call.map(spending));
  const [what, userId, name, amount, of] = call[0]!;
  const key = String(name);
  const purchaseId = String(of);
  switch (what) {
    case "consume":
      return [await ledger.consume(spending(call[0]!))];
    case "buy": {
      const started = await ledger.startPurchase({ userId, amount, description: "A pack", key });
      const known = started.outcome === "completed" || started.outcome === "replayed";
      return [known ? await ledger.completePurchase({ userId, purchaseId: started.id }) : started];
    }
    case "refund":
      return [await ledger.refund({ userId, purchaseId, key, amount })];
    case "reinstate":
      return [await ledger.reinstate({ userId, purchaseId, key, amount })];
    case "grant":
      return [await ledger.grant({ userId, amount, key, description: "A gift" })];
    case "lend":
      return [await ledger.grant({ userId, amount, key, description: "A loan", expiresAt: new Date(String(of)) })];
    case "hold":
      return [await ledger.hold({ userId, amount, key, expiresIn: "2 seconds" })];
    case "capture":
      return [await ledger.capture({ userId, holdId: String(of), amount })];
    case "release":
      return [await ledger.release({ userId, holdId: String(of) })];
    default:
      return [await ledger.balance({ userId })];
  }
}

function spending([, userId, key, amount, workshopId]: LedgerRequest) {
  return { userId, key: String(key), amount, ...(workshopId === null ? {} : { workshopId }) };
}

/** An error with its causes. */
function wholly(error: unknown): string {
  if (error instanceof AggregateError) return error.errors.map(wholly).join("; ");
  if (!(error instanceof Error)) return String(error);
  const { code } = error as { code?: string };
  return `${code ?? ""} ${error.message} ${error.cause === undefined ? "" : wholly(error.cause)}`;
}

const lines = createInterface({ input: process.stdin });
lines.on("line", (line) => {
  const question = JSON.parse(line) as Question;
  answer(question).then(
    (answers) => console.log(JSON.stringify({ n: question.n, answers })),
    (error: unknown) => console.log(JSON.stringify({ n: question.n, error: wholly(error) })),
  );
});
lines.on("close", () => process.exit());
