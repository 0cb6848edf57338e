"""To develop against: a PostgreSQL of the app's own, seed data, a demonstration, and a double of Stripe."""
