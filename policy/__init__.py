"""Scores to a better policy; synthesis and warm-up."""
