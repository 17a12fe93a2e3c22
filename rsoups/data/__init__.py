"""Tasks, prompts and datasets."""
