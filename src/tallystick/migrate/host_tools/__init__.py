"""The migration tools of the app: a bridge into its Alembic history, what its tool believes, lines for its schema."""
