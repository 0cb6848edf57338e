"""Prepaid credits, billing state and onboarding state inside an app's own PostgreSQL, kept honest."""
