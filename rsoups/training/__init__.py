"""PPO on TRL's loop, one reward or several."""
