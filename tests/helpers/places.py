"""Folders of the checkout."""

from pathlib import Path

HELPERS = Path(__file__).parent
ROOT = HELPERS.parent.parent
RECIPES = ROOT / "recipes"
