"""Generate and score responses at many λ."""
