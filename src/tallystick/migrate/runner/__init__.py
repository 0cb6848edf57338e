"""The run of a migration: its messages, its connection, its wait for locks, and the steps after the commit."""
