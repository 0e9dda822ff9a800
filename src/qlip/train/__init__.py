"""fit() and what it needs: losses, tasks, checkpoints, the log."""
