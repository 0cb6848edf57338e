// A double of Neon's HTTP endpoint in front of a real PostgreSQL, for the real driver of Neon.
//
// It is written after what the driver sends and reads: one statement or a batch as JSON, values as PostgreSQL's own
// texts, rows as arrays, an error of the database as a status 400 with the fields of the error. A batch is one
// transaction. It shows that a client works over such an endpoint. It says nothing of Neon's own proxy: its pool, its
// limits, its time-outs, how long it keeps a connection, or what it does when one dies.

import { createServer, type IncomingMessage, type ServerResponse } from "node:http";
import type { AddressInfo } from "node:net";
import pg from "pg";
import type { Address } from "./database.ts";

interface Statement {
  query: string;
  params?: unknown[];
}

export interface NeonDouble {
  /** For `neonConfig.fetchEndpoint`. */
  endpoint: string;
  close(): Promise<void>;
}

const ERROR_FIELDS = [
  "severity",
  "code",
  "detail",
  "hint",
  "position",
  "internalPosition",
  "internalQuery",
  "where",
  "schema",
  "table",
  "column",
  "dataType",
  "constraint",
  "file",
  "line",
  "routine",
] as const;

export async function neonDouble(address: Address): Promise<NeonDouble> {
  const pool = new pg.Pool({ ...address, max: 8 });
  // a connection that dies between two statements tells it as an event; the pool makes another
  pool.on("error", () => undefined);
  pool.on("connect", (client) => client.on("error", () => undefined));
  const server = createServer((request, response) => {
    answer(pool, request, response).catch((error: unknown) => {
      response.writeHead(500).end(String(error));
    });
  });
  await new Promise<void>((listening) => server.listen(0, "127.0.0.1", listening));
  return {
    endpoint: `http://127.0.0.1:${(server.address() as AddressInfo).port}/sql`,
    async close() {
      server.closeAllConnections();
      await new Promise((closed) => server.close(closed));
      await pool.end();
    },
  };
}

async function answer(pool: pg.Pool, request: IncomingMessage, response: ServerResponse): Promise<void> {
  for (const header of ["neon-connection-string", "neon-raw-text-output", "neon-array-mode"]) {
    if (!request.headers[header]) throw new Error(`no header ${header}`);
  }
  let text = "";
  for await (const piece of request) text += String(piece);
  const asked = JSON.parse(text) as Statement | { queries: Statement[] };
  const client = await pool.connect();
  try {
    const body =
      "queries" in asked ? { results: await batch(client, request, asked.queries) } : await one(client, asked);
    response.writeHead(200, { "content-type": "application/json" }).end(JSON.stringify(body));
  } catch (error) {
    if (!(error instanceof pg.DatabaseError)) throw error;
    const fields = Object.fromEntries(ERROR_FIELDS.map((name) => [name, error[name] ?? null]));
    response.writeHead(400, { "content-type": "application/json" });
    response.end(JSON.stringify({ message: error.message, ...fields }));
  } finally {
    client.release();
  }
}

async function batch(client: pg.PoolClient, request: IncomingMessage, statements: Statement[]): Promise<unknown[]> {
  const level = {
    ReadUncommitted: "READ UNCOMMITTED",
    ReadCommitted: "READ COMMITTED",
    RepeatableRead: "REPEATABLE READ",
    Serializable: "SERIALIZABLE",
  }[String(request.headers["neon-batch-isolation-level"] ?? "ReadCommitted")];
  await client.query(`BEGIN ISOLATION LEVEL ${level}`);
  try {
    const results = [];
    for (const statement of statements) results.push(await one(client, statement));
    await client.query("COMMIT");
    return results;
  } catch (error) {
    await client.query("ROLLBACK");
    throw error;
  }
}

async function one(client: pg.PoolClient, { query, params = [] }: Statement): Promise<unknown> {
  const result = await client.query<unknown[], unknown[]>({
    text: query,
    values: params,
    rowMode: "array",
    types: { getTypeParser: () => (text: unknown) => text },
  });
  const fields = result.fields.map(
    ({ name, dataTypeID, tableID, columnID, dataTypeSize, dataTypeModifier, format }) => ({
      name,
      dataTypeID,
      tableID,
      columnID,
      dataTypeSize,
      dataTypeModifier,
      format,
    }),
  );
  return { command: result.command, rowCount: result.rowCount, rows: result.rows, fields, rowAsArray: true };
}
