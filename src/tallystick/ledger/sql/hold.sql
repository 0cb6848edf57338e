-- Sets credits aside for work under way, and a workshop if one is named: a pending consumption, which capture charges
-- and release gives up. ``capture_limit`` is the most that may be captured, if the work may cost more. After
-- ``expires_in``, 15 minutes if NULL, the hold counts as released. The key of a hold that has ended sets nothing aside:
-- the answer is that hold's row, ``replayed``, whose ``status`` is no longer ``pending``.
CREATE OR REPLACE FUNCTION tallystick.hold(
  user_id {user_key_type},
  amount {credits},
  key text,
  expires_in interval DEFAULT NULL,
  workshop_id {workshop_key_type} DEFAULT NULL,
  capture_limit {credits} DEFAULT NULL,
  description text DEFAULT NULL,
  metadata jsonb DEFAULT NULL
) RETURNS tallystick.answer
LANGUAGE plpgsql SECURITY DEFINER SET search_path = {search_path}
  SET plan_cache_mode = force_generic_plan AS $$
#variable_conflict use_column
DECLARE
  answer tallystick.answer;
  account record;
  workshop record;
  prior {ledger};
  name text;
BEGIN
  IF amount IS NULL OR amount < 1 THEN
    RETURN tallystick.invalid_argument('amount', {amount_domain});
  ELSIF key IS NULL OR char_length(key) NOT BETWEEN 1 AND 255 OR starts_with(key, 'tallystick:') THEN
    RETURN tallystick.invalid_argument('key', {key_domain});
  ELSIF expires_in NOT BETWEEN interval '1 second' AND interval '366 days' THEN
    RETURN tallystick.invalid_argument('expires_in', 'an interval from 1 second to 366 days');
  ELSIF capture_limit < amount THEN
    RETURN tallystick.invalid_argument('capture_limit', 'as much as the amount or more, or NULL');
  ELSIF char_length(description) NOT BETWEEN 1 AND 10000 THEN
    RETURN tallystick.invalid_argument('description', 'a text of 1 to 10000 characters');
  ELSIF jsonb_typeof(metadata) <> 'object' THEN
    RETURN tallystick.invalid_argument('metadata', 'a JSON object');
  END IF;

  SELECT u.{user_key} AS key, {balance} AS balance, u.credit_sequence AS sequence, u.credit_held AS held,
      u.credit_due_at AS due, u.{user_deleted_at} AS deleted_at
    INTO account FROM {users} AS u WHERE u.{user_key} = hold.user_id FOR NO KEY UPDATE;
  IF NOT FOUND THEN
    answer.outcome := 'unknown_user';
    RETURN answer;
  END IF;
  {opened}
  {due}
  SELECT * INTO prior FROM {ledger} AS t WHERE t.user_id = account.key AND t.idempotency_key = hold.key;
  IF FOUND THEN
    answer := tallystick.replay(
      prior,
      jsonb_build_object('type', 'consumption', 'held', hold.amount, 'workshop_id',
        -- as in consume
        CASE WHEN prior.workshop_id = hold.workshop_id THEN prior.workshop_id
          WHEN prior.workshop_id IS NOT NULL
            OR EXISTS (SELECT FROM {workshops} AS w WHERE w.{workshop_key} = hold.workshop_id)
          THEN hold.workshop_id END),
      account.balance);
    answer.credit_held := account.held;
    RETURN answer;
  END IF;
  answer.balance := account.balance;
  answer.credit_held := account.held;
  answer.required := hold.amount;
  IF account.deleted_at IS NOT NULL THEN
    answer.outcome := 'user_deleted';
    answer.detail := jsonb_build_object('deleted_at', tallystick.utc(account.deleted_at));
    RETURN answer;
  END IF;
  IF workshop_id IS NOT NULL THEN
    SELECT w.{owner} = account.key AS owned, w.{workshop_deleted_at} AS deleted_at, w.credit_consumed_at, {title} AS title
      INTO workshop FROM {workshops} AS w WHERE w.{workshop_key} = hold.workshop_id;
    answer.outcome := CASE WHEN NOT FOUND THEN 'unknown_workshop'
      WHEN workshop.owned IS NOT TRUE THEN 'workshop_not_owned'
      WHEN workshop.deleted_at IS NOT NULL THEN 'workshop_deleted' END;
    IF answer.outcome = 'workshop_deleted' THEN
      answer.detail := jsonb_build_object('deleted_at', tallystick.utc(workshop.deleted_at));
    ELSIF answer.outcome IS NULL AND workshop.credit_consumed_at IS NOT NULL THEN
      -- paid for already
      SELECT 'replayed', {row}, account.balance, NULL, NULL, NULL, NULL, account.held, NULL
        INTO answer FROM {ledger} AS t
        WHERE t.workshop_id = hold.workshop_id AND t.type = 'consumption' AND t.status = 'completed'
        ORDER BY t.user_id = account.key DESC, t.completed_at DESC LIMIT 1;
      answer.outcome := coalesce(answer.outcome, 'workshop_unaccounted');
    END IF;
    IF answer.outcome IS NOT NULL THEN
      RETURN answer;
    END IF;
    name := workshop.title;
  END IF;
  IF greatest(account.balance, account.held) - account.held < hold.amount THEN
    answer.outcome := 'insufficient_credits';
    RETURN answer;
  END IF;

  INSERT INTO {ledger} AS t (
      id, user_id, type, status, amount, description, workshop_id, idempotency_key, metadata, held, capture_limit,
      expires_at)
    VALUES (
      tallystick.uuid7(), account.key, 'consumption', 'pending', - hold.amount,
      coalesce(hold.description, 'Credit consumed' || coalesce(' for Workshop: ' || name, '')),
      hold.workshop_id, hold.key, hold.metadata, hold.amount, hold.capture_limit,
      clock_timestamp() + coalesce(expires_in, interval '15 minutes'))
    ON CONFLICT DO NOTHING
    RETURNING 'completed', {row}, account.balance, hold.amount, NULL, NULL, NULL, account.held + hold.amount,
      t.expires_at INTO answer;
  IF NOT FOUND THEN
    -- a purchase was starting under the key, without the user's lock
    SELECT * INTO prior FROM {ledger} AS t WHERE t.user_id = account.key AND t.idempotency_key = hold.key;
    IF NOT FOUND THEN
      PERFORM tallystick.host_interfered({ledger_name});
    END IF;
    RETURN tallystick.replay(prior, jsonb_build_object('type', 'consumption'), account.balance);
  END IF;
  PERFORM tallystick.settle_held(
    account.key, account.sequence, account.held, account.balance, account.sequence, answer.credit_held, least(account.due, answer.expires_at));
  RETURN answer;
END $$
