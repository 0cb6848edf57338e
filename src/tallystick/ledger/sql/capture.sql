-- Charges a hold, once: all that it set aside, or less, or more up to its limit. It charges a hold that has expired
-- too, if the credits are there, and says so (``late`` in the answer's detail). With ``allow_debt`` a price above the
-- balance leaves a debt. A workshop that was unlocked meanwhile is not charged again: the hold is released, and the
-- answer is the consumption that unlocked it.
CREATE OR REPLACE FUNCTION tallystick.capture(
  user_id {user_key_type},
  hold_id uuid,
  amount {credits} DEFAULT NULL,
  allow_debt boolean DEFAULT false
) RETURNS tallystick.answer
LANGUAGE plpgsql SECURITY DEFINER SET search_path = {search_path} AS $$
#variable_conflict use_column
DECLARE
  answer tallystick.answer;
  account record;
  workshop record;
  hold {ledger};
  set_aside {credits};
  charged {credits};
BEGIN
  IF hold_id IS NULL THEN
    RETURN tallystick.invalid_argument('hold_id', 'the id of a hold');
  ELSIF amount < 1 THEN
    RETURN tallystick.invalid_argument('amount', {amount_domain} || ', or NULL for all that is held');
  END IF;
  SELECT u.{user_key} AS key, {balance} AS balance, u.credit_sequence AS sequence, u.credit_held AS held,
      u.credit_due_at AS due
    INTO account FROM {users} AS u WHERE u.{user_key} = capture.user_id FOR NO KEY UPDATE;
  IF NOT FOUND THEN
    answer.outcome := 'unknown_user';
    RETURN answer;
  END IF;
  {due}
  SELECT * INTO hold FROM {ledger} AS t WHERE t.id = hold_id;
  IF hold.user_id IS DISTINCT FROM account.key OR hold.held IS NULL THEN
    answer.outcome := 'unknown_hold';
    RETURN answer;
  END IF;
  charged := coalesce(amount, CASE hold.status WHEN 'completed' THEN - hold.amount ELSE hold.held END);
  IF hold.status = 'completed' THEN
    answer := tallystick.replay(hold, jsonb_build_object('amount', - charged), account.balance);
    answer.credit_held := account.held;
    RETURN answer;
  END IF;
  SELECT 'refused', {row}, account.balance, charged, NULL, NULL, NULL, account.held, t.expires_at
    INTO answer FROM {ledger} AS t WHERE t.id = hold_id;
  set_aside := CASE hold.status WHEN 'pending' THEN hold.held ELSE 0 END;
  IF hold.workshop_id IS NOT NULL THEN
    SELECT w.{owner} = account.key AS owned, w.{workshop_deleted_at} AS deleted_at, w.credit_consumed_at
      INTO workshop FROM {workshops} AS w WHERE w.{workshop_key} = hold.workshop_id FOR NO KEY UPDATE;
    -- before the hold's own state: a retry gets the same answer, after the first call has released the hold
    IF workshop.credit_consumed_at IS NOT NULL THEN
      SELECT 'replayed', {row}, account.balance, NULL, NULL, NULL, NULL, account.held - set_aside, NULL
        INTO answer FROM {ledger} AS t
        WHERE t.workshop_id = hold.workshop_id AND t.type = 'consumption' AND t.status = 'completed'
        ORDER BY t.user_id = account.key DESC, t.completed_at DESC LIMIT 1;
      IF NOT FOUND THEN
        answer.outcome := 'workshop_unaccounted';
        answer.workshop_id := hold.workshop_id;
      ELSIF hold.status = 'pending' THEN
        answer.balance := (tallystick.release(user_id, hold_id)).balance;
      END IF;
      RETURN answer;
    END IF;
  END IF;
  IF hold.capture_limit = 0 THEN
    answer.outcome := 'hold_closed';
    RETURN answer;
  ELSIF charged > coalesce(hold.capture_limit, hold.held) THEN
    answer.outcome := 'capture_exceeds_hold';
    answer.remaining := coalesce(hold.capture_limit, hold.held);
    RETURN answer;
  END IF;
  IF hold.workshop_id IS NOT NULL THEN
    IF workshop.owned IS NOT TRUE THEN
      answer.outcome := 'workshop_not_owned';
      RETURN answer;
    ELSIF workshop.deleted_at IS NOT NULL THEN
      answer.outcome := 'workshop_deleted';
      answer.detail := jsonb_build_object('deleted_at', tallystick.utc(workshop.deleted_at));
      RETURN answer;
    END IF;
  END IF;
  IF greatest(account.balance, account.held - set_aside) - (account.held - set_aside) < charged
      AND allow_debt IS NOT TRUE THEN
    answer.outcome := 'insufficient_credits';
    answer.credit_held := account.held - set_aside;  -- this hold's own credits are there for it
    RETURN answer;
  ELSIF account.balance < 0 AND account.balance < {credits_min} + charged THEN
    answer.outcome := 'balance_out_of_range';
    RETURN answer;
  ELSIF EXISTS (SELECT FROM {ledger} AS t WHERE t.user_id = account.key AND t.sequence = account.sequence + 1) THEN
    answer.outcome := 'ledger_inconsistent';
    answer.detail := jsonb_build_object('sequence', account.sequence);
    RETURN answer;
  END IF;

  UPDATE {ledger} AS t SET
      status = 'completed',
      amount = - charged,
      balance_after = account.balance - charged,
      sequence = account.sequence + 1,
      completed_at = clock_timestamp(),
      description = CASE t.status WHEN 'failed' THEN regexp_replace(t.description, ' \(expired\)$', '') || ' (captured late)'
        ELSE t.description END
    WHERE t.id = hold_id
    RETURNING 'completed', {row}, t.balance_after, charged, NULL,
      CASE hold.status WHEN 'failed' THEN jsonb_build_object('late', true) END, NULL, account.held - set_aside,
      t.expires_at INTO answer;
  IF answer.status IS DISTINCT FROM 'completed' THEN
    PERFORM tallystick.host_interfered({ledger_name});
  END IF;
  PERFORM tallystick.take_from_lots(account.key, hold_id, charged);
  PERFORM tallystick.settle_held(
    account.key, account.sequence, account.held, answer.balance_after, answer.sequence, answer.credit_held,
    CASE WHEN answer.credit_held = 0 THEN tallystick.next_due(account.key, 0) ELSE account.due END);
  answer.balance := coalesce(tallystick.settle_ended(account.key), answer.balance);
  IF answer.workshop_id IS NOT NULL THEN
    PERFORM tallystick.mark_workshop(answer.workshop_id, answer.completed_at);
  END IF;
  RETURN answer;
END $$
