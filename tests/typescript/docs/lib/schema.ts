// The reader's own.

import { pgTable, text, uuid } from "drizzle-orm/pg-core";

export const workshops = pgTable("workshops", {
  id: uuid("id").primaryKey(),
  userId: uuid("user_id").notNull(),
  title: text("title"),
});
