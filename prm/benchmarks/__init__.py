"""Public benchmarks of reward models: their metrics, their baselines, one command."""
