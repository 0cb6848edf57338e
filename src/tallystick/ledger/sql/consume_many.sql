-- Makes many consumptions, one after the other: an item that is refused does not affect the others. Each answer's
-- ``item`` says which it belongs to. Users are locked in the order of their keys, then workshops in the order of
-- theirs, so that two of these, or one and single calls, never wait for each other in a circle.
CREATE OR REPLACE FUNCTION tallystick.consume_many(
  user_ids {user_key_type}[],
  keys text[],
  workshop_ids {workshop_key_type}[] DEFAULT NULL,
  amounts {credits}[] DEFAULT NULL,
  descriptions text[] DEFAULT NULL,
  metadata jsonb[] DEFAULT NULL
) RETURNS SETOF tallystick.answer
LANGUAGE plpgsql SECURITY DEFINER SET search_path = {search_path} AS $$
#variable_conflict use_column
DECLARE
  answer tallystick.answer;
  answers tallystick.answer[];
  single record;
  items integer := coalesce(cardinality(user_ids), 0);
  -- each once: a thousand items of one user would be a thousand comparisons for each row that is looked at
  users {user_key_type}[] := ARRAY(SELECT DISTINCT each.key FROM unnest(user_ids) AS each (key));
  rows_written bigint;
  unlocked {workshop_key_type}[];
  moved {user_key_type}[];
  balances {credits}[];
  sequences integer[];
  moment timestamptz;
BEGIN
  IF items <> coalesce(cardinality(keys), 0)
      OR items <> coalesce(cardinality(workshop_ids), items) OR items <> coalesce(cardinality(amounts), items)
      OR items <> coalesce(cardinality(descriptions), items) OR items <> coalesce(cardinality(metadata), items) THEN
    RAISE EXCEPTION 'consume_many: the lists are not of one length (% users)', items USING ERRCODE = 'TS101';
  END IF;
  -- The server reads a NULL in the text of a list as this text then, before the function is called.
  IF current_setting('array_nulls') = 'off'
      AND 'NULL' = ANY (user_ids::text[] || keys || workshop_ids::text[] || descriptions) THEN
    RAISE EXCEPTION 'consume_many: array_nulls is off, so NULL in a list is read as a text'
      USING ERRCODE = 'TS101', HINT = 'SET array_nulls = on';
  END IF;
  PERFORM FROM {users} AS u WHERE u.{user_key} = ANY (users) ORDER BY u.{user_key} FOR NO KEY UPDATE;
  {opened_many}
  IF workshop_ids IS NOT NULL THEN
    -- Found by their keys alone: an index on the owner would lead to all workshops of these users.
    PERFORM FROM {workshops} AS w
      WHERE w.{workshop_key} = ANY (ARRAY(
        SELECT own.key FROM (
          SELECT w.{workshop_key} AS key, w.{owner} AS owner FROM {workshops} AS w
          WHERE w.{workshop_key} = ANY (workshop_ids) OFFSET 0
        ) AS own WHERE own.owner = ANY (users)))
      ORDER BY w.{workshop_key} FOR NO KEY UPDATE;
  END IF;

  moment := clock_timestamp();

  -- Of each user's items, in their order, those before the first that is not plain: its key is new and is listed once,
  -- its workshop is locked and is listed once, and the balance covers it.
  WITH account AS MATERIALIZED (
    SELECT u.{user_key} AS key, {balance} AS balance, u.credit_sequence AS sequence
    FROM {users} AS u
    WHERE u.{user_key} = ANY (users) AND u.{user_deleted_at} IS NULL AND u.credit_due_at IS NULL
      -- not of a user whose row is behind the ledger: the number given twice would fail the whole list
      AND NOT EXISTS (SELECT FROM {ledger} AS t WHERE t.user_id = u.{user_key} AND t.sequence = u.credit_sequence + 1)
  ), asked AS (
    SELECT i.item, a.key AS user_id, a.balance, a.sequence, i.key, i.workshop_id, coalesce(i.amount, 1) AS amount,
      i.description, i.metadata, {title} AS name,
      coalesce(i.amount, 1) >= 1 AND char_length(i.key) BETWEEN 1 AND 255 AND NOT starts_with(i.key, 'tallystick:')
        AND coalesce(char_length(i.description) BETWEEN 1 AND 10000, true)
        AND coalesce(jsonb_typeof(i.metadata) = 'object', true)
        AND (i.workshop_id IS NULL
          OR w.credit_consumed_at IS NULL AND w.{workshop_deleted_at} IS NULL AND w.{owner} = a.key)
        AND row_number() OVER (PARTITION BY a.key, i.key ORDER BY i.item) = 1
        AND (i.workshop_id IS NULL OR row_number() OVER (PARTITION BY a.key, w.{workshop_key} ORDER BY i.item) = 1)
        AND prior.used IS NULL AS plain
    FROM unnest(user_ids, keys, workshop_ids, amounts, descriptions, metadata)
      WITH ORDINALITY AS i (user_id, key, workshop_id, amount, description, metadata, item)
    JOIN account AS a ON a.key = i.user_id
    LEFT JOIN {workshops} AS w ON w.{workshop_key} = i.workshop_id
    LEFT JOIN LATERAL (
      SELECT true AS used FROM {ledger} AS t WHERE t.user_id = a.key AND t.idempotency_key = i.key LIMIT 1
    ) AS prior ON true
  ), spend AS MATERIALIZED (
    SELECT tallystick.uuid7() AS id, s.* FROM (
      SELECT item, user_id, key, workshop_id, amount, metadata,
        coalesce(description, 'Credit consumed' || coalesce(' for Workshop: ' || name, '')) AS description,
        balance - sum(amount) OVER listed AS balance_after,
        (sequence + row_number() OVER listed)::integer AS sequence,
        bool_and(plain IS TRUE) OVER listed AS plain  -- NULL without a key, and of a workshop that nobody has
      FROM asked WINDOW listed AS (PARTITION BY user_id ORDER BY item ROWS UNBOUNDED PRECEDING)
    ) AS s WHERE s.plain AND s.balance_after >= 0
  ), written AS (
    INSERT INTO {ledger} (
        id, user_id, type, status, amount, balance_after, sequence, description,
        workshop_id, idempotency_key, metadata, completed_at)
      SELECT id, user_id, 'consumption', 'completed', - amount, balance_after::{credits}, sequence, description,
        workshop_id, key, metadata, moment
      FROM spend
      -- a purchase may be starting under one of the keys, without the user's lock
      ON CONFLICT DO NOTHING
      RETURNING id
  ), last AS (
    SELECT user_id, min(balance_after)::{credits} AS balance, max(sequence) AS sequence FROM spend GROUP BY user_id
  )
  SELECT
    (SELECT array_agg(ROW(
        'completed', id, user_id, 'consumption', 'completed', - amount, balance_after, sequence, description,
        workshop_id, NULL, NULL, NULL, NULL, NULL, NULL, key, metadata, now(), moment,
        balance_after, amount, NULL, NULL, item, 0, NULL)::tallystick.answer) FROM spend),
    (SELECT count(*) FROM written),
    (SELECT array_agg(workshop_id) FROM spend WHERE workshop_id IS NOT NULL),
    (SELECT array_agg(user_id) FROM last), (SELECT array_agg(balance) FROM last), (SELECT array_agg(sequence) FROM last)
  INTO answers, rows_written, unlocked, moved, balances, sequences;
  IF rows_written <> coalesce(cardinality(answers), 0) THEN
    RAISE EXCEPTION 'consume_many: one of the keys was being written by somebody else' USING ERRCODE = '40001';
  END IF;
  IF answers IS NOT NULL THEN
    PERFORM tallystick.settle_many(moved, balances, sequences);
    IF unlocked IS NOT NULL THEN
      PERFORM tallystick.mark_workshops(unlocked, moment);
    END IF;
  END IF;
  RETURN QUERY SELECT * FROM unnest(answers);

  -- The rest in their order, each by itself: a replay, a refusal, or a smaller amount that is covered after all.
  IF coalesce(cardinality(answers), 0) < items THEN
    -- no subscripts: a list may begin at another one than 1, or have more than one dimension
    FOR single IN
      SELECT i.* FROM unnest(user_ids, keys, workshop_ids, amounts, descriptions, metadata)
        WITH ORDINALITY AS i (user_id, key, workshop_id, amount, description, metadata, item)
      WHERE i.item NOT IN (SELECT done.item FROM unnest(answers) AS done) ORDER BY i.item
    LOOP
      answer := tallystick.consume(
        single.user_id, single.key, single.workshop_id, coalesce(single.amount, 1), single.description, single.metadata);
      answer.item := single.item;
      RETURN NEXT answer;
    END LOOP;
  END IF;
END $$
