-- The shared body of refund, reinstate, reverse and correct: a completed row, linked to another and limited by it.
--   refund     takes at most what is left of a purchase, and may leave a debt: the money is back with the customer
--   reinstate  gives back at most what refunds took from a purchase
--   reverse    gives back at most what is left of a consumption; all of it locks the workshop again
--   correct    takes at most what is left of a grant, and may leave a debt
-- A deleted user gets any of them: the money is real.
CREATE OR REPLACE FUNCTION tallystick.give_or_take(
  kind text,
  user_id {user_key_type},
  target_id uuid,
  key text,
  amount {credits},
  description text,
  metadata jsonb
) RETURNS tallystick.answer
LANGUAGE plpgsql AS $$
#variable_conflict use_column
DECLARE
  answer tallystick.answer;
  account record;
  prior {ledger};
  taking boolean := kind IN ('refund', 'correct');
  target_type text := CASE kind WHEN 'reverse' THEN 'consumption' WHEN 'correct' THEN 'grant' ELSE 'purchase' END;
  new_type text := CASE kind
    WHEN 'refund' THEN 'refund' WHEN 'reinstate' THEN 'grant' WHEN 'reverse' THEN 'reversal' ELSE 'correction' END;
  sign integer := CASE WHEN taking THEN -1 ELSE 1 END;
  target {ledger};
  taken {credits};
  most {credits};
  moved {credits};
BEGIN
  IF target_id IS NULL THEN
    RETURN tallystick.invalid_argument(target_type || '_id', 'the id of a ' || target_type);
  ELSIF key IS NULL OR char_length(key) NOT BETWEEN 1 AND 255 OR starts_with(key, 'tallystick:') THEN
    RETURN tallystick.invalid_argument('key', {key_domain});
  ELSIF amount < 1 THEN
    RETURN tallystick.invalid_argument('amount', {amount_domain} || ', or NULL for all');
  ELSIF char_length(description) NOT BETWEEN 1 AND 10000 THEN
    RETURN tallystick.invalid_argument('description', 'a text of 1 to 10000 characters');
  ELSIF jsonb_typeof(metadata) <> 'object' THEN
    RETURN tallystick.invalid_argument('metadata', 'a JSON object');
  END IF;

  SELECT u.{user_key} AS key, {balance} AS balance, u.credit_sequence AS sequence, u.credit_held AS held,
      u.credit_due_at AS due
    INTO account FROM {users} AS u WHERE u.{user_key} = give_or_take.user_id FOR NO KEY UPDATE;
  IF NOT FOUND THEN
    answer.outcome := 'unknown_user';
    RETURN answer;
  END IF;
  {opened}
  {due}
  SELECT * INTO prior FROM {ledger} AS t WHERE t.user_id = account.key AND t.idempotency_key = give_or_take.key;
  IF FOUND THEN
    RETURN tallystick.replay(
      prior,
      jsonb_build_object('type', new_type, 'refund_of', target_id)
        || CASE WHEN amount IS NULL THEN '{{}}' ELSE jsonb_build_object('amount', sign * amount) END,
      account.balance);
  END IF;
  answer.balance := account.balance;
  answer.credit_held := account.held;
  answer.required := amount;
  SELECT * INTO target FROM {ledger} AS t WHERE t.id = target_id;
  IF target.user_id IS DISTINCT FROM account.key OR target.type::text <> target_type
      OR kind = 'correct' AND target.refund_of IS NOT NULL OR kind = 'reverse' AND target.status <> 'completed' THEN
    answer.outcome := CASE target_type WHEN 'purchase' THEN 'unknown_purchase'
      WHEN 'consumption' THEN 'unknown_consumption' ELSE 'unknown_grant' END;
    RETURN answer;
  END IF;
  SELECT 'refused', {row}, account.balance, give_or_take.amount, NULL, NULL, NULL, account.held, NULL
    INTO answer FROM {ledger} AS t WHERE t.id = target_id;
  SELECT abs(coalesce(sum(t.amount), 0)) INTO taken FROM {ledger} AS t
    WHERE t.user_id = account.key AND t.refund_of = target_id AND t.type <> 'expiry';
  IF taking AND target.expires_at IS NOT NULL THEN
    taken := taken + tallystick.expired(target_id);
  END IF;
  most := CASE WHEN kind = 'reinstate' THEN taken ELSE abs(target.amount) - taken END;
  moved := coalesce(amount, most);
  answer.remaining := most;
  IF kind = 'refund' AND target.status <> 'completed' THEN
    answer.outcome := 'purchase_not_completed';
    RETURN answer;
  ELSIF moved < 1 OR moved > most THEN
    answer.outcome := CASE kind WHEN 'refund' THEN 'refund_exceeds_purchase'
      WHEN 'reinstate' THEN 'reinstatement_exceeds_refunds' WHEN 'reverse' THEN 'reversal_exceeds_consumption'
      ELSE 'correction_exceeds_grant' END;
    RETURN answer;
  ELSIF (CASE WHEN taking THEN account.balance < 0 AND account.balance < {credits_min} + moved
        ELSE account.balance > 0 AND account.balance > {credits_max} - moved END) THEN
    answer.outcome := 'balance_out_of_range';
    answer.required := moved;
    RETURN answer;
  END IF;

  INSERT INTO {ledger} AS t (
      id, user_id, type, status, amount, balance_after, sequence, description, workshop_id, refund_of, idempotency_key,
      metadata, completed_at)
    VALUES (
      tallystick.uuid7(), account.key, new_type::{type}, 'completed', sign * moved, account.balance + sign * moved,
      account.sequence + 1,
      coalesce(give_or_take.description, CASE kind WHEN 'refund' THEN 'Refunded: ' WHEN 'reinstate' THEN 'Given back: '
        WHEN 'reverse' THEN 'Reversed: ' ELSE 'Corrected: ' END || target.description),
      CASE WHEN kind = 'reverse' AND moved = most THEN target.workshop_id END,
      target_id, give_or_take.key, give_or_take.metadata, clock_timestamp())
    ON CONFLICT DO NOTHING
    RETURNING 'completed', {row}, t.balance_after, moved, most - moved, NULL, NULL, account.held, NULL INTO answer;
  IF NOT FOUND THEN
    -- as in grant
    SELECT * INTO prior FROM {ledger} AS t WHERE t.user_id = account.key AND t.idempotency_key = give_or_take.key;
    IF FOUND THEN
      RETURN tallystick.replay(prior, jsonb_build_object('type', new_type), account.balance);
    END IF;
    answer.outcome := 'ledger_inconsistent';
    answer.balance := account.balance;
    answer.detail := jsonb_build_object('sequence', account.sequence);
    RETURN answer;
  END IF;
  IF NOT tallystick.settle(
      account.key, account.balance, account.sequence, answer.balance_after, answer.sequence) THEN
    PERFORM tallystick.host_interfered({users_name});
  END IF;
  IF answer.workshop_id IS NOT NULL THEN
    PERFORM tallystick.unmark_workshop(answer.workshop_id);
  END IF;
  -- the lots that the credits came from, or had been
  IF taking AND account.due IS NOT NULL THEN
    PERFORM tallystick.take_back_from_lots(account.key, answer.id, target_id, moved, answer.balance_after);
  ELSIF NOT taking
      AND tallystick.give_to_lots(account.key, answer.id, target_id, moved, most, answer.balance_after) THEN
    answer.balance := (tallystick.settle_due(account.key)).balance;
  END IF;
  RETURN answer;
END $$
