"""What makes a run: engines, sandbox, tools, tasks, chat format and the episode loop."""
