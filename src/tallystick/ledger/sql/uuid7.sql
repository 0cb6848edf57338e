-- A UUID of version 7 (RFC 9562): 48 bits of milliseconds, 12 bits of a millisecond's parts, 62 random bits.
-- PostgreSQL has its own from 18 on.
CREATE OR REPLACE FUNCTION tallystick.uuid7() RETURNS uuid
LANGUAGE sql VOLATILE AS $$
  SELECT pg_catalog.encode(
    pg_catalog.int8send((moment.us / 1000 << 16) | 28672 | (moment.us % 1000 * 4096 / 1000))
      || pg_catalog.substring(pg_catalog.uuid_send(pg_catalog.gen_random_uuid()), 9),
    'hex')::pg_catalog.uuid
  FROM (SELECT (extract(epoch FROM pg_catalog.clock_timestamp()) * 1000000)::pg_catalog.int8 AS us) AS moment
$$
