"""The app's own migration tools: a bridge into its Alembic history, its tool's records, lines for its schema file."""
