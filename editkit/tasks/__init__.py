"""Tasks: what `editkit.run` does, one file a task."""
