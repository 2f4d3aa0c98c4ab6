"""Trajectories to Monte-Carlo evidence to labels."""
