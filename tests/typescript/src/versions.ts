// What is said over each driver when client and functions are not of one version: node out/src/versions.js COMMAND

import assert from "node:assert/strict";
import { adapters } from "./adapters.ts";
import type { Address } from "./database.ts";
import { tallystick, TallystickOutOfDate } from "./tallystick.ts";

const [command = ""] = process.argv.slice(2);
for (const [driver, open] of Object.entries(adapters)) {
  const { query, close } = await open(JSON.parse(process.env["ADDRESS"] ?? "") as Address);
  await assert.rejects(
    tallystick(query).consume({ userId: crypto.randomUUID(), key: "unlock-1" }),
    (error: unknown) => error instanceof TallystickOutOfDate && error.message.includes(`Run: ${command}`),
    driver,
  );
  await close();
}
