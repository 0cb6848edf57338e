-- The purchase of a user by its id, by its Stripe session, or by its id with a session to attach to it. The answer's
-- outcome is NULL if it was found and the session is its own or free, else the refusal.
CREATE OR REPLACE FUNCTION tallystick.find_purchase(
  user_id {user_key_type}, purchase_id uuid, stripe_session_id text, balance {credits}
) RETURNS tallystick.answer
LANGUAGE plpgsql STABLE AS $$
#variable_conflict use_column
DECLARE
  answer tallystick.answer;
  holder uuid;
BEGIN
  -- By one column each, so that its index serves whatever the plan.
  IF purchase_id IS NOT NULL THEN
    SELECT NULL, {row}, find_purchase.balance, NULL, NULL, NULL, NULL, NULL, NULL INTO answer FROM {ledger} AS t
      WHERE t.id = find_purchase.purchase_id;
  ELSE
    SELECT NULL, {row}, find_purchase.balance, NULL, NULL, NULL, NULL, NULL, NULL INTO answer FROM {ledger} AS t
      WHERE t.stripe_session_id = find_purchase.stripe_session_id;
  END IF;
  IF answer.type IS DISTINCT FROM 'purchase' OR answer.user_id IS DISTINCT FROM user_id THEN
    answer := NULL;
    answer.outcome := 'unknown_purchase';
    answer.balance := balance;
    RETURN answer;
  END IF;
  IF stripe_session_id IS NOT NULL THEN
    IF answer.stripe_session_id <> stripe_session_id THEN
      answer.outcome := 'session_conflict';
    ELSIF answer.stripe_session_id IS NULL THEN
      SELECT t.id INTO holder FROM {ledger} AS t WHERE t.stripe_session_id = find_purchase.stripe_session_id;
      IF FOUND THEN
        answer.outcome := 'session_conflict';
        answer.detail := pg_catalog.jsonb_build_object('held_by', holder);
      END IF;
    END IF;
  END IF;
  RETURN answer;
END $$
