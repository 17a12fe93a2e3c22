"""Plots, charts and the report's page."""
