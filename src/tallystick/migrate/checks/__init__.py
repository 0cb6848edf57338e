"""Checks that change nothing: the plan of a run, the state of a database, and a rehearsal on a copy."""
