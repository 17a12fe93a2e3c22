"""Reward cards, and the rewards behind them."""
