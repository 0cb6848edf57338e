"""The app of ``examples/workshops`` once more, in Django: its users, sessions, templates, forms and admin."""
