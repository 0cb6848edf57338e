// Every driver that the client is promised to work over: how its `query` is made, outside a transaction and inside.

import { neon, neonConfig } from "@neondatabase/serverless";
import { PrismaPg } from "@prisma/adapter-pg";
import { sql as drizzleSql } from "drizzle-orm";
import { drizzle as drizzleNeon } from "drizzle-orm/neon-http";
import { drizzle as drizzlePg } from "drizzle-orm/node-postgres";
import { drizzle as drizzlePostgres } from "drizzle-orm/postgres-js";
import pg from "pg";
import postgres from "postgres";
import { PrismaClient } from "../prisma/client.ts";
import type { Address } from "./database.ts";
import { neonDouble } from "./neon_double.ts";
import { template, type Query } from "./tallystick.ts";

export interface Adapter {
  query: Query;
  close(): Promise<void>;
}

/** Thrown to have a transaction rolled back. */
export class Enough extends Error {}

type Work = (query: Query) => Promise<void>;
type Opens = (address: Address) => Promise<Adapter>;

/** Runs the work in a transaction of the driver, which is rolled back if it throws. */
type Transacts = (address: Address, work: Work) => Promise<void>;

export const adapters: Record<string, Opens> = {
  async pg(address) {
    const pool = new pg.Pool(address);
    return { query: (text, params) => pool.query(text, params), close: () => pool.end() };
  },

  async "pg, rows as arrays"(address) {
    const pool = new pg.Pool(address);
    return { query: (text, values) => pool.query({ text, values, rowMode: "array" }), close: () => pool.end() };
  },

  async "pg, other settings"(address) {
    const options =
      "-c DateStyle=German,DMY -c IntervalStyle=sql_standard -c TimeZone=Asia/Kathmandu -c bytea_output=escape";
    const pool = new pg.Pool({ ...address, options });
    return { query: (text, params) => pool.query(text, params), close: () => pool.end() };
  },

  async postgres(address) {
    const sql = postgres(address);
    return { query: (text, params) => sql.unsafe(text, params), close: () => sql.end() };
  },

  async "postgres, names in camel case"(address) {
    const sql = postgres({ ...address, transform: postgres.camel });
    return { query: (text, params) => sql.unsafe(text, params), close: () => sql.end() };
  },

  async "postgres, its tag"(address) {
    const sql = postgres(address);
    return { query: (text, params) => template(sql, text, params), close: () => sql.end() };
  },

  async "drizzle over pg"(address) {
    const pool = new pg.Pool(address);
    const db = drizzlePg(pool);
    return { query: (text, params) => db.execute(template(drizzleSql, text, params)), close: () => pool.end() };
  },

  async "drizzle over postgres"(address) {
    const client = postgres(address);
    const db = drizzlePostgres(client);
    return { query: (text, params) => db.execute(template(drizzleSql, text, params)), close: () => client.end() };
  },

  async neon(address) {
    const { sql, close } = await openNeon(address);
    return { query: (text, params) => sql.query(text, params), close };
  },

  async "drizzle over neon"(address) {
    const { sql, close } = await openNeon(address);
    const db = drizzleNeon(sql);
    return { query: (text, params) => db.execute(template(drizzleSql, text, params)), close };
  },

  async prisma(address) {
    const prisma = new PrismaClient({ adapter: new PrismaPg(address) });
    return { query: (text, params) => prisma.$queryRawUnsafe(text, ...params), close: () => prisma.$disconnect() };
  },
};

export const transactions: Record<string, Transacts> = {
  async pg(address, work) {
    const pool = new pg.Pool(address);
    const client = await pool.connect();
    try {
      await client.query("BEGIN");
      await work((text, params) => client.query(text, params));
      await client.query("COMMIT");
    } catch (error) {
      await client.query("ROLLBACK");
      throw error;
    } finally {
      client.release();
      await pool.end();
    }
  },

  async postgres(address, work) {
    const sql = postgres(address);
    try {
      await sql.begin((tx) => work((text, params) => tx.unsafe(text, params)));
    } finally {
      await sql.end();
    }
  },

  async "drizzle over pg"(address, work) {
    const pool = new pg.Pool(address);
    try {
      await drizzlePg(pool).transaction((tx) => work((text, params) => tx.execute(template(drizzleSql, text, params))));
    } finally {
      await pool.end();
    }
  },

  async "drizzle over postgres"(address, work) {
    const sql = postgres(address);
    try {
      await drizzlePostgres(sql).transaction((tx) =>
        work((text, params) => tx.execute(template(drizzleSql, text, params))),
      );
    } finally {
      await sql.end();
    }
  },

  async prisma(address, work) {
    const prisma = new PrismaClient({ adapter: new PrismaPg(address) });
    try {
      await prisma.$transaction((tx) => work((text, params) => tx.$queryRawUnsafe(text, ...params)), {
        timeout: 60_000,
      });
    } finally {
      await prisma.$disconnect();
    }
  },
};

export async function openNeon(address: Address) {
  const double = await neonDouble(address);
  neonConfig.fetchEndpoint = double.endpoint;
  return {
    sql: neon(`postgresql://${address.user}:secret@neon.invalid/${address.database}`),
    close: () => double.close(),
  };
}
