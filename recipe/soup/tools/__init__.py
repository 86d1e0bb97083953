"""What the command `soup` does, and the callback that shows a run's result. No other room imports it."""
