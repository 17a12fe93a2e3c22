"""Pareto fronts: pure functions of records."""
