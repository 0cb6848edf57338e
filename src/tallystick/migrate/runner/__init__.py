"""The run of a migration: its messages, its connection, the wait for a quiet moment, and what follows the commit."""
