"""The tasks of Graves et al. (2014), generated as they are needed."""

from typing import Any

from training.tasks.associative_recall import AssociativeRecallTask
from training.tasks.base import Batch, Task, trimmed
from training.tasks.copy import CopyTask
from training.tasks.ngrams import NGramsTask
from training.tasks.priority_sort import PrioritySortTask
from training.tasks.repeat_copy import RepeatCopyTask

TASKS: dict[str, Any] = {
    "copy": CopyTask,
    "repeat-copy": RepeatCopyTask,
    "associative-recall": AssociativeRecallTask,
    "ngrams": NGramsTask,
    "priority-sort": PrioritySortTask,
}


def make_task(name: str, **options: Any) -> Task:
    """The task of that name, with these of its fields set.

    Raises:
        ValueError: there is no such task, or an option is out of range.
    """
    if name not in TASKS:
        raise ValueError(f"task should be one of {', '.join(TASKS)}; received {name!r}")
    task: Task = TASKS[name](**options)
    return task


__all__ = ["TASKS", "Batch", "Task", "make_task", "trimmed"]
