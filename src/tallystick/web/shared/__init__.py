"""Shared by the buyer's pages and the operator's console: numbers, drawings, templates, files and checks."""
