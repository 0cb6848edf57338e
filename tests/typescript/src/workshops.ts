// As table.ts, for hosts that have workshops.

import { isMoment, type Given, type Row } from "./table.ts";
import type { Tallystick } from "./tallystick.ts";

/** What the test made in the database beforehand. */
export interface GivenWorkshops<Key, WorkshopKey> extends Given<Key> {
  rich: Key;
  workshop: WorkshopKey;
  second: WorkshopKey;
  others: WorkshopKey;
  closed: WorkshopKey;
  marked: WorkshopKey;
  nowhere: WorkshopKey;
  /** The host says when a workshop was made. */
  dated: boolean;
}

export function workshopTable<Key, WorkshopKey>(ledger: Tallystick, given: GivenWorkshops<Key, WorkshopKey>): Row[] {
  const rich = given.rich as never;
  const id = (name: "workshop" | "second" | "others" | "closed" | "marked" | "nowhere") => given[name] as never;
  const future = new Date(Date.now() + 86_400_000);
  return [
    {
      does: "a locked workshop",
      call: () => ledger.access({ workshopId: id("workshop") }),
      answers: { outcome: "completed", workshopId: given.workshop, open: false, reason: "locked", deletedAt: null },
    },
    {
      does: "one without a paywall",
      call: () => ledger.access({ workshopId: id("workshop"), paywall: false }),
      answers: { open: true, reason: "paywall_off" },
    },
    {
      does: "one older than the paywall",
      call: () => ledger.access({ workshopId: id("workshop"), grandfatheredBefore: future }),
      answers: given.dated ? { open: true, reason: "grandfathered" } : { open: false, reason: "locked" },
    },
    {
      does: "it is unlocked",
      call: () => ledger.consume({ userId: rich, workshopId: id("workshop"), key: "unlock-1" }),
      answers: {
        outcome: "completed",
        workshopId: given.workshop,
        description: "Credit consumed for Workshop: Mobile App Discovery",
      },
    },
    {
      does: "from another tab",
      call: () => ledger.consume({ userId: rich, workshopId: id("workshop"), key: "unlock-2" }),
      answers: { outcome: "replayed", idempotencyKey: "unlock-1" },
    },
    {
      does: "an unlocked workshop",
      call: () => ledger.access({ workshopId: id("workshop") }),
      answers: { open: true, reason: "unlocked" },
    },
    {
      does: "somebody else's",
      call: () => ledger.consume({ userId: rich, workshopId: id("others"), key: "unlock-3" }),
      answers: { outcome: "workshop_not_owned" },
    },
    {
      does: "a deleted one",
      call: () => ledger.consume({ userId: rich, workshopId: id("closed"), key: "unlock-4" }),
      answers: { outcome: "workshop_deleted", deletedAt: (text: string) => isMoment(new Date(text)) },
    },
    {
      does: "one that was marked by hand",
      call: () => ledger.consume({ userId: rich, workshopId: id("marked"), key: "unlock-5" }),
      answers: { outcome: "workshop_unaccounted" },
    },
    {
      does: "one that is not there",
      call: () => ledger.consume({ userId: rich, workshopId: id("nowhere"), key: "unlock-6" }),
      answers: { outcome: "unknown_workshop" },
    },
    {
      does: "access to one that is not there",
      call: () => ledger.access({ workshopId: id("nowhere") }),
      answers: { outcome: "unknown_workshop" },
    },
    {
      does: "several",
      call: () =>
        ledger.consumeMany([
          { userId: rich, key: "all-1", workshopId: id("second") },
          { userId: rich, key: "all-2" },
          { userId: rich, key: "all-3", workshopId: id("others") },
        ]),
      answers: [
        { outcome: "completed", workshopId: given.second },
        { outcome: "completed", workshopId: null },
        { outcome: "workshop_not_owned" },
      ],
    },
    {
      does: "a workshop is deleted",
      call: () => ledger.deleteWorkshop({ workshopId: id("second") }),
      answers: { outcome: "completed", workshopId: given.second, deletedAt: isMoment },
    },
    {
      does: "access to it",
      call: () => ledger.access({ workshopId: id("second") }),
      answers: { open: false, reason: "deleted", deletedAt: isMoment },
    },
    {
      does: "it is back",
      call: () => ledger.restoreWorkshop({ workshopId: id("second") }),
      answers: { outcome: "completed", deletedAt: null },
    },
    {
      does: "and still unlocked",
      call: () => ledger.access({ workshopId: id("second") }),
      answers: { open: true, reason: "unlocked" },
    },
    {
      does: "no such workshop to delete",
      call: () => ledger.deleteWorkshop({ workshopId: id("nowhere") }),
      answers: { outcome: "unknown_workshop" },
    },
  ];
}
