-- Spends credits of a user, and unlocks a workshop with them if one is named. A workshop is charged once: a second
-- call gives the consumption that unlocked it, as a replay.
--
-- The statement that moves the balance stands in here and not in settle, which is a tenth of the whole. It sets off
-- the host's triggers, hence {host_path}: operators and functions are such that no other schema can shadow them.
--
-- Every statement reads by key, so one plan fits all values (force_generic_plan). Where many rows share a key, as
-- 'welcome', the server would take the plan of one call for cheaper, and make a new one in each call.
CREATE OR REPLACE FUNCTION tallystick.consume(
  user_id {user_key_type},
  key text,
  workshop_id {workshop_key_type} DEFAULT NULL,
  amount {credits} DEFAULT 1,
  description text DEFAULT NULL,
  metadata jsonb DEFAULT NULL
) RETURNS tallystick.answer
LANGUAGE plpgsql SECURITY DEFINER SET search_path = {host_path}
  SET plan_cache_mode = force_generic_plan AS $$
#variable_conflict use_column
DECLARE
  answer tallystick.answer;
  account record;
  workshop record;
  prior {ledger};
  claimable boolean := true;
  name text;
  kept_balance {credits};
  kept_sequence integer;
BEGIN
  IF amount IS NULL OR amount < 1 THEN
    RETURN tallystick.invalid_argument('amount', {amount_domain});
  ELSIF key IS NULL OR pg_catalog.char_length(key) NOT BETWEEN 1 AND 255 OR pg_catalog.starts_with(key, 'tallystick:') THEN
    RETURN tallystick.invalid_argument('key', {key_domain});
  ELSIF pg_catalog.char_length(description) NOT BETWEEN 1 AND 10000 THEN
    RETURN tallystick.invalid_argument('description', 'a text of 1 to 10000 characters');
  ELSIF pg_catalog.jsonb_typeof(metadata) <> 'object' THEN
    RETURN tallystick.invalid_argument('metadata', 'a JSON object');
  END IF;

  -- The first time without a lock: a replay and a refusal need none. The user's row is then moved only from where it was
  -- read, which locks it; where somebody was faster, all is read again under the lock.
  FOR attempt IN 1..2 LOOP
    IF attempt = 2 THEN
      PERFORM FROM {users} AS u WHERE u.{user_key} {is} consume.user_id FOR NO KEY UPDATE;
    END IF;
    SELECT u.{user_key} AS key, {balance} AS balance, u.credit_sequence AS sequence, u.credit_held AS held,
        u.credit_due_at AS due, u.{user_deleted_at} AS deleted_at,
        (SELECT t.id FROM {ledger} AS t WHERE t.user_id {is} u.{user_key} AND t.idempotency_key = consume.key) AS prior
      INTO account
      FROM {users} AS u WHERE u.{user_key} {is} consume.user_id;
    IF NOT FOUND THEN
      answer.outcome := 'unknown_user';
      RETURN answer;
    END IF;
    {opened}
    -- where something of the user waits for its time, the balance is only known under the lock, and what has expired
    -- is only written there
    CONTINUE WHEN attempt = 1 AND account.due IS NOT NULL
      AND (account.prior IS NULL OR account.due <= pg_catalog.clock_timestamp());
    {due}
    IF workshop_id IS NOT NULL THEN
      SELECT {title} INTO name FROM {workshops} AS w
        WHERE w.{workshop_key} {is} consume.workshop_id AND w.{owner} {is} account.key
          AND w.credit_consumed_at IS NULL AND w.{workshop_deleted_at} IS NULL;
      claimable := FOUND;
    END IF;
    EXIT WHEN account.prior IS NOT NULL OR account.deleted_at IS NOT NULL OR NOT claimable
      -- no difference that is below the type's range, in a large debt
      OR greatest(account.balance, account.held) - account.held < amount;

    -- Write: the balance, which locks the user; then the row; then the workshop's mark, locked before.
    UPDATE {users} AS u
      SET {balance_column} = account.balance - consume.amount, credit_sequence = account.sequence + 1
      WHERE u.{user_key} {is} account.key
        AND {balance} = account.balance AND u.credit_sequence = account.sequence AND u.credit_held = account.held
        AND u.{user_deleted_at} IS NULL
      RETURNING {balance}, u.credit_sequence INTO kept_balance, kept_sequence;
    IF FOUND THEN
      IF kept_balance <> account.balance - amount OR kept_sequence <> account.sequence + 1 THEN
        PERFORM tallystick.host_interfered({users_name});
      END IF;
      IF workshop_id IS NOT NULL THEN
        PERFORM FROM {workshops} AS w
          WHERE w.{workshop_key} {is} consume.workshop_id AND w.{owner} {is} account.key
            AND w.credit_consumed_at IS NULL AND w.{workshop_deleted_at} IS NULL
          FOR NO KEY UPDATE;
        claimable := FOUND;
      END IF;
      IF claimable THEN
        INSERT INTO {ledger} AS t (
            id, user_id, type, status, amount, balance_after, sequence, description,
            workshop_id, idempotency_key, metadata, completed_at)
          VALUES (
            tallystick.uuid7(), account.key, 'consumption', 'completed', - consume.amount,
            account.balance - consume.amount, account.sequence + 1,
            coalesce(consume.description, 'Credit consumed' || coalesce(' for Workshop: ' || name, '')),
            consume.workshop_id, consume.key, consume.metadata, clock_timestamp())
          ON CONFLICT DO NOTHING
          RETURNING 'completed', {row}, t.balance_after, consume.amount, NULL, NULL, NULL, account.held, NULL
            INTO answer;
        IF FOUND THEN
          IF account.due IS NOT NULL THEN
            PERFORM tallystick.take_from_lots(account.key, answer.id, consume.amount, due => account.due);
          END IF;
          IF workshop_id IS NOT NULL THEN
            PERFORM tallystick.mark_workshop(workshop_id, answer.completed_at);
          END IF;
          RETURN answer;
        END IF;
        -- The key is that of a purchase that was starting, or the sequence is taken: the user's row is behind the ledger.
      END IF;
      IF NOT tallystick.settle(
          account.key, account.balance - amount, account.sequence + 1, account.balance, account.sequence) THEN
        PERFORM tallystick.host_interfered({users_name});  -- its trigger called the ledger, and that stays behind
      END IF;
    ELSIF attempt = 2 THEN
      PERFORM tallystick.host_interfered({users_name});
    END IF;
  END LOOP;

  -- Nothing was written: say why.
  SELECT * INTO prior FROM {ledger} AS t WHERE t.user_id {is} account.key AND t.idempotency_key = consume.key;
  IF FOUND THEN
    IF workshop_id IS NOT NULL THEN
      -- equal keys may differ as texts (citext); and when the host deletes a workshop its row stays, without it
      workshop_id := CASE WHEN prior.workshop_id {is} consume.workshop_id THEN prior.workshop_id
        WHEN prior.workshop_id IS NOT NULL
          OR EXISTS (SELECT FROM {workshops} AS w WHERE w.{workshop_key} {is} consume.workshop_id)
        THEN consume.workshop_id END;
    END IF;
    RETURN tallystick.replay(
      prior,
      pg_catalog.jsonb_build_object('type', 'consumption', 'amount', - amount, 'held', NULL, 'workshop_id', workshop_id),
      account.balance);
  END IF;
  answer.balance := account.balance;
  answer.credit_held := account.held;
  answer.required := amount;
  IF account.deleted_at IS NOT NULL THEN
    answer.outcome := 'user_deleted';
    answer.detail := pg_catalog.jsonb_build_object('deleted_at', tallystick.utc(account.deleted_at));
    RETURN answer;
  END IF;
  IF NOT claimable THEN
    SELECT w.{owner} {is} account.key AS owned, w.{workshop_deleted_at} AS deleted_at INTO workshop
      FROM {workshops} AS w WHERE w.{workshop_key} {is} consume.workshop_id;
    IF NOT FOUND THEN
      answer.outcome := 'unknown_workshop';
    ELSIF workshop.owned IS NOT TRUE THEN
      answer.outcome := 'workshop_not_owned';
    ELSIF workshop.deleted_at IS NOT NULL THEN
      answer.outcome := 'workshop_deleted';
      answer.detail := pg_catalog.jsonb_build_object('deleted_at', tallystick.utc(workshop.deleted_at));
    ELSE
      -- paid for already: by this user, or by an owner before
      SELECT 'replayed', {row}, account.balance, NULL, NULL, NULL, NULL, NULL, NULL INTO answer FROM {ledger} AS t
        WHERE t.workshop_id {is} consume.workshop_id AND t.type {is} 'consumption' AND t.status {is} 'completed'
        ORDER BY t.user_id {is} account.key DESC, t.completed_at DESC LIMIT 1;
      IF NOT FOUND THEN
        answer.outcome := 'workshop_unaccounted';
        answer.balance := account.balance;
      END IF;
    END IF;
  ELSIF greatest(account.balance, account.held) - account.held < amount THEN
    answer.outcome := 'insufficient_credits';
  ELSE
    answer.outcome := 'ledger_inconsistent';
    answer.detail := pg_catalog.jsonb_build_object('sequence', account.sequence);
  END IF;
  RETURN answer;
END $$
