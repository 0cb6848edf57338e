-- The one body of refund and reinstate: a completed row that is linked to a purchase and bounded by it. A refund takes
-- at most what is left of the purchase, and may leave a debt, since the money is back with the customer already; a
-- reinstatement gives back at most what refunds took. A deleted user gets either: the money is real.
CREATE OR REPLACE FUNCTION tallystick.give_or_take(
  taking boolean,
  user_id {user_key_type},
  purchase_id uuid,
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
  new_type text := CASE WHEN taking THEN 'refund' ELSE 'grant' END;
  sign integer := CASE WHEN taking THEN -1 ELSE 1 END;
  taken {credits};
  most {credits};
  moved {credits};
BEGIN
  IF purchase_id IS NULL THEN
    RETURN tallystick.invalid_argument('purchase_id', 'the id of a purchase');
  ELSIF key IS NULL OR char_length(key) NOT BETWEEN 1 AND 255 THEN
    RETURN tallystick.invalid_argument('key', 'a text of 1 to 255 characters');
  ELSIF amount < 1 THEN
    RETURN tallystick.invalid_argument('amount', {amount_domain} || ', or NULL for all');
  ELSIF char_length(description) NOT BETWEEN 1 AND 10000 THEN
    RETURN tallystick.invalid_argument('description', 'a text of 1 to 10000 characters');
  ELSIF jsonb_typeof(metadata) <> 'object' THEN
    RETURN tallystick.invalid_argument('metadata', 'a JSON object');
  END IF;

  SELECT u.{user_key} AS key, {balance} AS balance, u.credit_sequence AS sequence
    INTO account FROM {users} AS u WHERE u.{user_key} = give_or_take.user_id FOR NO KEY UPDATE;
  IF NOT FOUND THEN
    answer.outcome := 'unknown_user';
    RETURN answer;
  END IF;
  {opened}
  SELECT * INTO prior FROM {ledger} AS t WHERE t.user_id = account.key AND t.idempotency_key = give_or_take.key;
  IF FOUND THEN
    RETURN tallystick.replay(
      prior,
      jsonb_build_object('type', new_type, 'refund_of', purchase_id)
        || CASE WHEN amount IS NULL THEN '{{}}' ELSE jsonb_build_object('amount', sign * amount) END,
      account.balance);
  END IF;
  answer := tallystick.find_purchase(account.key, purchase_id, NULL, account.balance);
  answer.required := amount;
  IF answer.outcome IS NOT NULL THEN
    RETURN answer;
  END IF;
  SELECT coalesce(- sum(t.amount), 0) INTO taken FROM {ledger} AS t
    WHERE t.user_id = account.key AND t.refund_of = give_or_take.purchase_id;
  most := CASE WHEN taking THEN answer.amount - taken ELSE taken END;
  moved := coalesce(amount, most);
  answer.remaining := most;
  IF taking AND answer.status <> 'completed' THEN
    answer.outcome := 'purchase_not_completed';
    RETURN answer;
  ELSIF moved < 1 OR moved > most THEN
    answer.outcome := CASE WHEN taking THEN 'refund_exceeds_purchase' ELSE 'reinstatement_exceeds_refunds' END;
    RETURN answer;
  ELSIF (CASE WHEN taking THEN account.balance < 0 AND account.balance < {credits_min} + moved
        ELSE account.balance > 0 AND account.balance > {credits_max} - moved END) THEN
    answer.outcome := 'balance_out_of_range';
    answer.required := moved;
    RETURN answer;
  END IF;

  INSERT INTO {ledger} AS t (
      id, user_id, type, status, amount, balance_after, sequence, description, refund_of, idempotency_key, metadata,
      completed_at)
    VALUES (
      tallystick.uuid7(), account.key, new_type::{type}, 'completed', sign * moved, account.balance + sign * moved,
      account.sequence + 1,
      coalesce(give_or_take.description, CASE WHEN taking THEN 'Refunded: ' ELSE 'Given back: ' END || answer.description),
      answer.id, give_or_take.key, give_or_take.metadata, clock_timestamp())
    ON CONFLICT DO NOTHING
    RETURNING 'completed', {row}, t.balance_after, moved, most - moved, NULL, NULL INTO answer;
  IF NOT FOUND THEN
    answer.outcome := 'ledger_inconsistent';
    answer.balance := account.balance;
    answer.detail := jsonb_build_object('sequence', account.sequence);
    RETURN answer;
  END IF;
  IF NOT tallystick.settle(
      account.key, account.balance, account.sequence, answer.balance_after, answer.sequence) THEN
    PERFORM tallystick.host_interfered({users_name});
  END IF;
  RETURN answer;
END $$
