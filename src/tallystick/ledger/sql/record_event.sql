-- Writes the events of a row of the ledger, as a trigger on it while events are on. The row has the balances before and
-- after it, and the rows of a user come one after the other, so that exactly one row crosses a threshold.
CREATE OR REPLACE FUNCTION tallystick.record_event() RETURNS trigger
LANGUAGE plpgsql SET search_path = {search_path} AS $$
DECLARE
  word text := CASE
    WHEN NEW.status = 'completed' THEN 'completed'
    WHEN NEW.held IS NULL THEN CASE NEW.status WHEN 'failed' THEN 'failed' END
    WHEN NEW.status = 'pending' THEN 'held'
    WHEN NEW.capture_limit = 0 THEN 'released'
    ELSE 'expired' END;
  setting record;
  balance_before {credits};
BEGIN
  IF word IS NULL OR NEW.status = OLD.status THEN
    RETURN NULL;
  END IF;
  SELECT s.xid_offset + pg_current_xact_id()::text::bigint AS position, s.notifies,
      nullif(coalesce(
        (SELECT l.threshold FROM tallystick.low_balances AS l WHERE l.user_id = NEW.user_id), s.low_balance), 0)
        AS threshold
    INTO setting FROM tallystick.event_settings AS s;
  INSERT INTO tallystick.events (position, kind, transaction_id)
    VALUES (setting.position, NEW.type || '.' || word, NEW.id);
  IF word = 'completed' AND NEW.amount < 0 THEN
    balance_before := NEW.balance_after - NEW.amount;
    IF balance_before >= setting.threshold AND NEW.balance_after < setting.threshold THEN
      INSERT INTO tallystick.events (position, kind, transaction_id, threshold)
        VALUES (setting.position, 'balance.low', NEW.id, setting.threshold);
    END IF;
    IF balance_before >= 0 AND NEW.balance_after < 0 THEN
      INSERT INTO tallystick.events (position, kind, transaction_id)
        VALUES (setting.position, 'balance.debt', NEW.id);
    END IF;
  END IF;
  IF setting.notifies THEN
    PERFORM pg_notify('tallystick_events', '');
  END IF;
  RETURN NULL;
END $$
