"""Training: configurations, losses, the training loop, checkpoints, model cards."""
