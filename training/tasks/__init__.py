"""The tasks of Graves et al. (2014), generated as they are needed."""

from typing import Any

from training.tasks.base import Batch, Task
from training.tasks.copy import CopyTask

TASKS: dict[str, Any] = {"copy": CopyTask}


def make_task(name: str, **options: Any) -> Task:
    """The task of that name, with these of its fields set.

    Raises:
        ValueError: there is no such task, or an option is out of range.
    """
    if name not in TASKS:
        raise ValueError(f"task should be one of {', '.join(TASKS)}; received {name!r}")
    task: Task = TASKS[name](**options)
    return task


__all__ = ["TASKS", "Batch", "Task", "make_task"]
