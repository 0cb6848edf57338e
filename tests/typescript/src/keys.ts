// Keys and credits of 64 bits, by type: this compiles for a host with bigint keys alone.

import type { BalanceAnswer, BalanceOptions, UserKey, WorkshopKey } from "./tallystick.ts";

export const asked: BalanceOptions[] = [{ userId: "9007199254740993" }, { userId: 9007199254740993n }, { userId: 7 }];

export function sameUser(answer: BalanceAnswer, key: bigint): boolean {
  return answer.outcome === "completed" && answer.userId === String(key);
}

export const user: UserKey = "9007199254740993";
export const workshop: WorkshopKey = 3;
