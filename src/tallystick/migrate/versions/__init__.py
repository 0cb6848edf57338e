"""Revisions, each frozen in time. See ``tallystick.migrate.revisions`` for what one consists of."""
