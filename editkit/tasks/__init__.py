"""Tasks: what `editkit.run` does. Each is a file that runs it (edit.py) and one that shows it (edit_page.py).

`register` adds one from outside; `editkit.runs.kinds` holds the registry.
"""

from editkit.runs.kinds import Task, get_task, names, register

__all__ = ["Task", "get_task", "names", "register"]
