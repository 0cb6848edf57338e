"""Development tools: an embedded PostgreSQL, seed data, a demonstration, and a test double of Stripe."""
