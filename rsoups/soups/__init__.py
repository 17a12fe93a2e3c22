"""Interpolate adapters and models, load, merge and compare them."""
