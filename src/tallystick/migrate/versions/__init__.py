"""Revisions, each frozen in time. ``tallystick.migrate.revisions`` describes their contents."""
