"""Soups as software: inspect, compare, verify, patch and revert them."""
