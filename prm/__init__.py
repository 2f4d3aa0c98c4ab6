"""Labels to a process reward model to per-action scores."""
