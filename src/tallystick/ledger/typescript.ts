/* eslint-disable */
// The client of Tallystick's functions in the database, written by: tallystick client typescript
// For revision __REVISION__; users are keyed by __USER_KEY__, __WORKSHOP_KEY__, credits are __CREDITS__.
// No rule is in here: it sends calls and reads answers. Run the command again after a migration; do not edit.

/** A value as it is sent: a text, so that no driver converts it by its own types. */
export type Parameter = string | null;

/**
 * Sends one statement, and gives its rows or an object that has them as `rows`. Any driver fits:
 *
 *     pg                        (text, params) => pool.query(text, params)
 *     postgres (postgres.js)    (text, params) => sql.unsafe(text, params)
 *     @neondatabase/serverless  (text, params) => sql.query(text, params)
 *     drizzle-orm, any driver   (text, params) => db.execute(template(sql, text, params))
 *     Prisma                    (text, params) => prisma.$queryRawUnsafe(text, ...params)
 *
 * Inside a transaction, pass what the driver gives for it in place of `pool`, `sql`, `db` or `prisma`.
 */
export type Query = (text: string, params: Parameter[]) => PromiseLike<unknown>;

/** A JSON value. */
export type Json = string | number | boolean | null | readonly Json[] | { readonly [name: string]: Json | undefined };

/** A length of time, such as "90 days". The number is whole. */
export type Duration = `${number} ${"second" | "minute" | "hour" | "day" | "week" | "month" | "year"}${"s" | ""}`;

//# types

/** The outcomes that mean done: by this call, or by an earlier one with the same key. */
export type Done = "completed" | "replayed";

/** The name of a refusal. */
export type RefusalName = keyof Refusals;

/** A refusal as a result: its name as `outcome`, and what it tells. */
export type Refused<Name extends RefusalName> = { [N in Name]: { outcome: N } & Refusals[N] }[Name];

/** A result, or a list of them, without refusals. */
export type Succeeded<Answer> = Answer extends readonly (infer Each)[]
  ? Succeeded<Each>[]
  : Extract<Answer, { outcome: Done }>;

/** One statement, for a batch that is sent as a whole. */
export interface Call<Answer> {
  /** The statement, with `$1` for the first of `params`. */
  readonly text: string;
  /** Throws a `TallystickRefusal` for an argument that cannot be sent. */
  readonly params: Parameter[];
  /** Reads what the driver gave for it. */
  read(result: unknown): Answer;
}

/** A call of a function that writes. */
export interface WritingCall<Answer> extends Call<Answer> {
  /** The same, but a refusal raises an error, so that a batch is rolled back. `refusalOf(error)` names it. */
  readonly strict: Call<Succeeded<Answer>>;
}

/** A refusal, thrown by `orThrow`. */
export class TallystickRefusal extends Error {
  readonly outcome: RefusalName;
  readonly answer: Refused<RefusalName>;

  constructor(answer: Refused<RefusalName>) {
    const { outcome, ...details } = answer;
    const values = JSON.stringify(details, (_, value: unknown) => (typeof value === "bigint" ? String(value) : value));
    super(`${outcome}: ${MEANINGS[outcome]} ${values}`);
    this.name = "TallystickRefusal";
    this.outcome = outcome;
    this.answer = answer;
  }
}

/** This client and the functions in the database are not of one version; the message says what to run. */
export class TallystickOutOfDate extends Error {
  constructor(message: string, cause?: unknown) {
    super(message);
    this.name = "TallystickOutOfDate";
    Object.defineProperty(this, "cause", { value: cause, configurable: true, writable: true });
  }
}

/** The result, or the results, without refusals: a refusal is thrown as a `TallystickRefusal`. */
export function orThrow<Answer extends { outcome: string } | readonly { outcome: string }[]>(
  answer: Answer,
): Succeeded<Answer> {
  for (const each of [answer].flat() as { outcome: string }[]) {
    if (!isDone(each.outcome)) throw new TallystickRefusal(each as Refused<RefusalName>);
  }
  return answer as unknown as Succeeded<Answer>;
}

/** The refusal for which a strict call raised `error`; "host_interfered" comes from plain calls too. */
export function refusalOf(error: unknown): RefusalName | "host_interfered" | undefined {
  return raised(error, (code) => SQLSTATES[code]) as RefusalName | "host_interfered" | undefined;
}

/** The statement through a driver's or a builder's tag, such as Drizzle's `sql`. */
export function template<Made>(
  tag: (strings: TemplateStringsArray, ...params: Parameter[]) => Made,
  text: string,
  params: readonly Parameter[],
): Made {
  const strings = text.split(/\$\d+/);
  return tag(Object.assign(strings, { raw: strings }), ...params);
}

/** The operations over `query`. Each is one statement; nothing here opens, commits or retries a transaction. */
export function tallystick(query: Query): Tallystick {
  return {
    //# operations
  };
}

/** The same operations as statements that are not sent, for a batch. */
export const calls = {
  //# calls
};

//# facts

type Argument = readonly [name: string, type: string, value: unknown];

function isDone(outcome: string): outcome is Done {
  return outcome === "completed" || outcome === "replayed";
}

class FunctionCall<Answer> implements WritingCall<Answer> {
  readonly #name: string;
  readonly #kind: keyof typeof COLUMNS;
  readonly #arguments: readonly Argument[];
  /** The function gives a set of rows. */
  readonly many: boolean;
  #params?: Parameter[];

  constructor(name: string, kind: keyof typeof COLUMNS, many: boolean, given: readonly Argument[]) {
    this.#name = name;
    this.#kind = kind;
    this.many = many;
    this.#arguments = given.filter(([, , value]) => value !== undefined);
  }

  get strict(): Call<Succeeded<Answer>> {
    return new FunctionCall(`${this.#name}_strict`, this.#kind, this.many, this.#arguments);
  }

  get text(): string {
    const passed = this.#arguments.map(([name, type], n) => `${name} => $${n + 1}::text::${type}`);
    return `SELECT ${SELECTED[this.#kind]} FROM tallystick.${this.#name}(${passed.join(", ")}) AS answer`;
  }

  get params(): Parameter[] {
    this.#params ??= this.#arguments.map(([name, type, value]) => encoded(name, type, value));
    return this.#params;
  }

  read(result: unknown): Answer {
    const rows = Array.isArray(result) ? (result as unknown[]) : (result as { rows?: unknown } | undefined)?.rows;
    if (!Array.isArray(rows)) throw new TypeError("query gave neither rows nor an object that has them as `rows`");
    const answers = rows.map((row: unknown) => {
      const values: unknown[] = Array.isArray(row) ? row : Object.values(row as object);
      return answered(COLUMNS[this.#kind], OF_REFUSALS[this.#kind] ?? [], values);
    });
    if (this.many) {
      return answers.sort((one, other) => one.place - other.place).map(({ answer }) => answer) as Answer;
    }
    return answers[0]?.answer as Answer;
  }
}

async function sent<Answer>(query: Query, call: Call<Answer>): Promise<Answer> {
  let params: Parameter[];
  try {
    params = call.params;
  } catch (error) {
    // the database's own refusal, as a result
    const refused = unsendable(error);
    return (call instanceof FunctionCall && call.many ? [refused] : refused) as Answer;
  }
  let result: unknown;
  try {
    result = await query(call.text, params);
  } catch (error) {
    const missing = raised(error, (code, message) =>
      ["42883", "42703", "3F000"].includes(code) && /\btallystick\b|\banswer\./.test(message) ? message : undefined,
    );
    if (missing === undefined) throw error;
    throw new TallystickOutOfDate(
      `${missing}: this client is for the functions of revision ${REVISION}. Run: tallystick migrate apply. ` +
        "If the database is newer, or its mapping is another, run: tallystick client typescript",
      error,
    );
  }
  return call.read(result);
}

/** Sends the items that can be sent. Each of the others is refused on its own, as the database refuses an item. */
async function sentEach<Item, Answer>(
  query: Query,
  call: (items: readonly Item[]) => Call<Answer[]>,
  items: readonly Item[],
): Promise<Answer[]> {
  const refusal = (some: Call<Answer[]>): Answer | undefined => {
    try {
      void some.params;
      return undefined;
    } catch (error) {
      return unsendable(error) as Answer;
    }
  };
  const all = call(items);
  if (refusal(all) === undefined) return sent(query, all);
  const refusals = items.map((item) => refusal(call([item])));
  const rest = items.filter((_, n) => refusals[n] === undefined);
  const answers = rest.length > 0 ? (await sent(query, call(rest))).values() : [].values();
  return refusals.map((refused) => refused ?? (answers.next().value as Answer));
}

/** The refusal of an argument that cannot be sent; any other error is thrown again. */
function unsendable(error: unknown): Refused<RefusalName> {
  if (!(error instanceof TallystickRefusal)) throw error;
  return error.answer;
}

/** Looks for a SQLSTATE: in the driver's own error, or inside what an ORM has made of it. */
function raised<Found>(error: unknown, look: (code: string, message: string) => Found | undefined): Found | undefined {
  const seen = new Set<unknown>();
  const left: unknown[] = [error];
  while (left.length > 0) {
    const each = left.pop();
    if (typeof each !== "object" || each === null || seen.has(each)) continue;
    seen.add(each);
    const { code, originalCode, message, originalMessage, cause, meta, driverAdapterError } = each as Record<
      string,
      unknown
    >;
    const found = look(String(originalCode ?? code), String(originalMessage ?? message));
    if (found !== undefined) return found;
    left.push(cause, meta, driverAdapterError);
  }
  return undefined;
}

const SELECTED: Readonly<Record<string, string>> = Object.fromEntries(
  Object.entries(COLUMNS).map(([kind, columns]) => [kind, Object.entries(columns).map(selected).join(", ")]),
);

function selected([name, type]: [string, string]): string {
  // in milliseconds since 1970, whatever the connection's DateStyle and TimeZone
  return type === "timestamptz"
    ? `floor(extract(epoch FROM answer.${name}) * 1000)::text AS ${name}`
    : `answer.${name}::text`;
}

function answered(
  columns: Readonly<Record<string, string>>,
  ofRefusals: readonly string[],
  values: readonly unknown[],
): { answer: object; place: number } {
  const names = Object.entries(columns);
  if (values.length !== names.length) {
    throw new TypeError(
      `query gave a row of ${values.length} values in place of ${names.length}: pass rows on as they are`,
    );
  }
  const row = Object.fromEntries(names.map(([name, type], n) => [camel(name), decoded(type, values[n])]));
  const { detail, item, required, remaining, ...rest } = row;
  const place = Number(item ?? 0);
  const outcome = String(row["outcome"]);
  if (isDone(outcome)) {
    // `remaining` belongs to refusals, except in a lot, whose columns have no `required`
    const left = remaining === undefined || "required" in columns ? {} : { remaining };
    const kept = Object.entries(rest).filter(([name]) => !ofRefusals.includes(name));
    return { answer: { ...Object.fromEntries(kept), ...left, outcome }, place };
  }
  if ((MEANINGS as Readonly<Record<string, string>>)[outcome] === undefined) {
    throw new TallystickOutOfDate(
      `this client does not know the answer ${JSON.stringify(outcome)}. Run: tallystick client typescript`,
    );
  }
  const fields = { ...rest, required, remaining, ...(detail as object | null) };
  const present = Object.entries(fields).filter(([, value]) => value !== null && value !== undefined);
  const spelt = present.map(([name, value]) => [camel(name), spelling(name, value)]);
  return { answer: { ...Object.fromEntries(spelt), outcome }, place };
}

/** The value of a refusal's field, with the names of options and columns in it as this client spells them. */
function spelling(field: string, value: unknown): unknown {
  if (field === "argument") return camel(String(value));
  if (field !== "differs") return value;
  return Object.fromEntries(Object.entries(value as object).map(([column, pair]) => [camel(column), pair]));
}

function camel(name: string): string {
  return name.replace(/_(\w)/g, (_, letter: string) => letter.toUpperCase());
}

function decoded(type: string, value: unknown): unknown {
  if (value === null || value === undefined) return null;
  const text = String(value);
  switch (type) {
    case "timestamptz":
      return new Date(Number(text));
    case "jsonb":
      return JSON.parse(text) as unknown;
    case "detail":
      return JSON.parse(text.replace(/"(?:[^"\\]|\\.)*"|-?\d[\d.]*/g, exact)) as unknown;
    case "boolean":
      return text === "true";
    case "number":
      return Number(text);
    case "bigint":
      return BigInt(text);
    default:
      return text;
  }
}

/** A whole number beyond 2^53, such as a key or credits, as a text: a number of JavaScript would be another. */
function exact(token: string): string {
  return /^-?\d+$/.test(token) && !Number.isSafeInteger(Number(token)) ? `"${token}"` : token;
}

/** A list whose items are all empty is left out. */
function listed(values: readonly unknown[]): readonly unknown[] | undefined {
  return values.some((value) => value !== null && value !== undefined) ? values : undefined;
}

const A_TEXT = "a text without NUL and without half of a surrogate pair";
const EXPECTED: Readonly<Record<string, string>> = {
  uuid: "a UUID",
  smallint: "a whole number from -32768 to 32767",
  integer: "a whole number from -2147483648 to 2147483647",
  bigint: "a whole number of 64 bits; beyond 2^53 a bigint",
  boolean: "true or false",
  timestamptz: "a valid Date, of the years 1 to 9999",
  interval: 'a whole number of seconds, minutes, hours, days, weeks, months or years, such as "90 days"',
  jsonb: "what JSON and PostgreSQL can hold, nested at most 100 deep",
};

function encoded(name: string, type: string, value: unknown): Parameter {
  if (value === null || value === undefined) return null;
  if (type.endsWith("[]")) {
    // an item is refused under the name that a single call has for it
    const items = (value as unknown[]).map((item) => encoded(name.replace(/s$/, ""), type.slice(0, -2), item));
    return `{${items.map((item) => (item === null ? "NULL" : `"${item.replace(/[\\"]/g, "\\$&")}"`)).join(",")}}`;
  }
  const text = written(type, value);
  if (text === undefined) {
    throw new TallystickRefusal({
      outcome: "invalid_argument",
      argument: camel(name),
      expected: EXPECTED[type] ?? A_TEXT,
    });
  }
  return text;
}

/** The value as PostgreSQL reads it, or undefined where it is none of the type. */
function written(type: string, value: unknown): string | undefined {
  switch (type) {
    case "uuid":
      return typeof value === "string" && /^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$/i.test(value)
        ? value
        : undefined;
    case "smallint":
    case "integer":
    case "bigint": {
      const whole =
        typeof value === "bigint" ||
        Number.isSafeInteger(value) ||
        (typeof value === "string" && /^-?\d{1,19}$/.test(value));
      if (!whole) return undefined;
      const number = BigInt(value as bigint | number | string);
      const bits = { smallint: 16, integer: 32, bigint: 64 }[type];
      return BigInt.asIntN(bits, number) === number ? String(number) : undefined;
    }
    case "boolean":
      return typeof value === "boolean" ? String(value) : undefined;
    case "timestamptz":
      return value instanceof Date ? moment(value) : undefined;
    case "interval":
      // PostgreSQL takes a number without a unit for seconds
      return typeof value === "string" && /^\d{1,8} (second|minute|hour|day|week|month|year)s?$/.test(value)
        ? value
        : undefined;
    case "jsonb":
      return document(value);
    default:
      return typeof value === "string" && isStorable(value) ? value : undefined;
  }
}

function document(value: unknown): string | undefined {
  let storable = true;
  try {
    const text = JSON.stringify(value, (name, item: unknown) => {
      storable &&= isStorable(name) && !(typeof item === "string" && !isStorable(item));
      storable &&= typeof item !== "number" || Number.isFinite(item); // JSON would have null in its place
      return item;
    }) as string | undefined;
    return storable && text !== undefined && isShallow(text) ? text : undefined;
  } catch {
    return undefined; // it is circular, or holds a bigint
  }
}

/** The limit is that of all clients: what one of them has written, the others can read. */
function isShallow(text: string): boolean {
  let depth = 0;
  let quoted = false;
  for (let n = 0; n < text.length; n++) {
    const letter = text[n];
    if (quoted) {
      if (letter === "\\") n++;
      else if (letter === '"') quoted = false;
    } else if (letter === '"') {
      quoted = true;
    } else if (letter === "{" || letter === "[") {
      if (++depth > 100) return false;
    } else if (letter === "}" || letter === "]") {
      depth--;
    }
  }
  return true;
}

/** PostgreSQL reads no year with a sign, as `toISOString` writes those of more than four digits and below 0. */
function moment(value: Date): string | undefined {
  const text = Number.isNaN(value.getTime()) ? "" : value.toISOString();
  return /^(?!0000)\d{4}-/.test(text) ? text : undefined;
}

function isStorable(text: string): boolean {
  return !text.includes("\0") && !/\p{Surrogate}/u.test(text);
}
