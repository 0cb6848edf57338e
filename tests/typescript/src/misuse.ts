// What the types refuse: each line under @ts-expect-error must be an error of tsc.

import { calls, orThrow, refusalOf, tallystick, template, type ConsumeAnswer, type Query } from "./tallystick.ts";

export async function misuse(query: Query): Promise<void> {
  const ledger = tallystick(query);
  // @ts-expect-error a consumption needs a key
  await ledger.consume({ userId: "u" });
  // @ts-expect-error a user's key is a string here
  await ledger.balance({ userId: 7 });
  // @ts-expect-error no such option
  await ledger.consume({ userId: "u", key: "k", workshop: "w" });
  // @ts-expect-error a moment is a Date
  await ledger.balanceAt({ userId: "u", at: "2026-01-01" });
  // @ts-expect-error a length of time has a unit
  await ledger.hold({ userId: "u", amount: 1, key: "k", expiresIn: "300" });
  await ledger.hold({ userId: "u", amount: 1, key: "k", expiresIn: `${5 * 60} seconds` });
  // @ts-expect-error only what writes has a strict form
  void calls.balance({ userId: "u" }).strict;

  const answer = await ledger.consume({ userId: "u", key: "k", workshopId: undefined });
  // @ts-expect-error a refusal may have no balance
  void answer.balance;
  // @ts-expect-error no such outcome
  void (answer.outcome === "no_credits");
  // @ts-expect-error a balance has no outcome "replayed"
  void ((await ledger.balance({ userId: "u" })).outcome === "replayed");
  if (answer.outcome === "insufficient_credits") {
    const short: number = answer.required - answer.balance;
    void short;
  }
  const written = orThrow(answer);
  const left: number = written.balance;
  const rows = orThrow(await ledger.history({ userId: "u" }));
  const when: Date | undefined = rows[0]?.createdAt;
  const strict = calls.consume({ userId: "u", key: "k" }).strict.read([]).balance satisfies number;
  void [left, when, strict, refusalOf(undefined) === "host_interfered", template(String.raw, "", [])];
}

/** Every outcome has a branch: one that is added later is an error here. */
export function messageOf(answer: ConsumeAnswer): string {
  switch (answer.outcome) {
    case "completed":
    case "replayed":
      return `You have ${answer.balance} left.`;
    case "insufficient_credits":
      return `You have ${answer.balance} and need ${answer.required}.`;
    case "user_deleted":
    case "workshop_deleted":
      return `Deleted at ${answer.deletedAt}.`;
    case "invalid_argument":
      return `${answer.argument}: pass ${answer.expected}.`;
    case "idempotency_key_reused":
      return Object.keys(answer.differs).join();
    case "ledger_inconsistent":
      return String(answer.sequence);
    case "unknown_user":
    case "unknown_workshop":
    case "workshop_not_owned":
    case "workshop_unaccounted":
      return answer.outcome;
  }
}
