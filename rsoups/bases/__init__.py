"""Base models: their names, files and weights, and what fits on them."""
