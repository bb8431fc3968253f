"""The registry of Chinese tasks: one declarative file per task, readers of the benchmarks' files, submissions."""

from chatglm_ptuning.data.tasks.read import read_examples
from chatglm_ptuning.data.tasks.registry import load_task, task_names
from chatglm_ptuning.data.tasks.task import Task

__all__ = ["Task", "load_task", "read_examples", "task_names"]
