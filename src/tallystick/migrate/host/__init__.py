"""The app's own database: its tables, its objects that depend on them, its roles and their privileges."""
