"""Interpolate adapters and whole models; load, merge and share the soups."""
