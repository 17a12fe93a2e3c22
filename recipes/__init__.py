"""The recipes, as modules of an installed package: ``accelerate launch -m rsoups.recipes.ppo_reward``."""
