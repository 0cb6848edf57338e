"""What the buyer's pages and the operator's console both use: numbers, drawings, templates, files and checks."""
