"""Training: configuration, loss, loop and checkpoints."""
