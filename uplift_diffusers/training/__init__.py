"""Training: configurations, losses, the loop, checkpoints, cards."""
