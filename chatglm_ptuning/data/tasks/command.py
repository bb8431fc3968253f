"""`chatglm-ptuning tasks`: a table of the packaged tasks, or one task and how its files are read."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from chatglm_ptuning.command_line import fail
from chatglm_ptuning.data.tasks.examples import Example, has_gold
from chatglm_ptuning.data.tasks.heads import heads_of
from chatglm_ptuning.data.tasks.read import read_examples
from chatglm_ptuning.data.tasks.registry import load_task, task_names
from chatglm_ptuning.data.tasks.task import Task


def main(argv: Sequence[str]) -> None:
    """Entry of the command; errors that users can correct end it with a message and exit code 1."""
    parser = argparse.ArgumentParser("chatglm-ptuning tasks", description="The packaged Chinese tasks.")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    commands.add_parser("list", help="all tasks (the default)")
    show = commands.add_parser("show", help="one task; with a folder, how its files are read")
    show.add_argument("task", help="name of a task, or the YAML file of your own task")
    show.add_argument(
        "folder", nargs="?", help="folder with its files; or huggingface, modelscope, huggingface:OWNER/NAME"
    )
    show.add_argument("--split", action="append", help="show only this split (can be given several times)")
    show.add_argument("--subjects", nargs="+", help="of an examination, read only these subjects or categories")
    args = parser.parse_args(list(argv))
    try:
        if args.command == "show":
            show_task(args.task, args.folder, args.split, args.subjects)
        else:
            list_tasks()
    except (ValueError, OSError, ImportError) as error:
        fail(str(error))


def list_tasks() -> None:
    """Prints a table of all packaged tasks."""
    table = Table("task", "title", "head and metric", "pre_seq_len,\nlearning_rate", title="Tasks")
    for task in map(load_task, task_names()):
        name = task.name + "".join(f", {alias}" for alias in task.aliases)
        solved = f"{task.head.replace('_', ' ')}, {task.metric}"
        table.add_row(name, task.title, solved, f"{task.pre_seq_len}, {task.learning_rate:g}")
    Console().print(table)


def show_task(
    name: str, folder: str | None = None, splits: Sequence[str] | None = None, subjects: Sequence[str] | None = None
) -> None:
    """Prints a task; with a folder also the number of examples of each split, and the first example as a prompt.

    A split without files gets a row that says so, unless `splits` names it.

    Raises:
        ValueError: if there is no such task, or no split can be read, or not all that `splits` names.
    """
    task = load_task(name)
    _describe(task)
    if folder is None:
        return
    if Path(folder).is_file() and not splits and len(task.files) > 1:
        raise ValueError(f"{folder} is one file; name its split by --split: {', '.join(task.files)}.")
    read: dict[str, list[Example]] = {}
    missing = ""
    for split in splits or task.files:
        try:
            read[split] = read_examples(task, folder, split, subjects=subjects)
        except ValueError as error:
            # It is common to have only some splits of a benchmark; a file with errors is another matter.
            if splits or "has no file of" not in str(error):
                raise
            missing = missing or str(error)
    if not read:
        raise ValueError(missing)
    table = Table("split", "examples", "gold", title=f"{task.name} in {folder}")
    for split in splits or task.files:
        if split in read:
            table.add_row(split, str(len(read[split])), escape(_gold_counts(task, read[split])))
        else:
            names = " or ".join(" + ".join(parts) for parts in task.files[split])
            table.add_row(split, "not found", escape(f"looked for {names}"))
    console = Console()
    console.print(table)
    first = next(iter(read.values()))[0]
    console.print(f"\nThe first example ({first.where}):", markup=False)
    console.print(first.prompt(task), markup=False, style="cyan")
    answer = first.answer_text(task)
    console.print(f"answer: {answer if answer is not None else 'not in this split'}", markup=False, style="green")


def _describe(task: Task) -> None:
    lines = {
        "title": task.title,
        "source": task.source,
        "defined in": task.origin,
        "heads": ", ".join(heads_of(task)),
        "metric": task.metric,
        "defaults": f"pre_seq_len {task.pre_seq_len}, learning_rate {task.learning_rate:g} ({task.settings_from})",
        "files": ", ".join(task.files),
        "hubs": ", ".join(f"{hub}:{place.id}" for hub, place in task.hub.items()),
        "submission": task.submission.file_of("test") if task.submission else "",
        "labels": ", ".join(f"{key} {text}" if key != text else key for key, text in task.labels.items()),
        "subjects": f"{len(task.subjects)}" if task.subjects else "",
    }
    table = Table(title=task.name, show_header=False)
    for heading, text in lines.items():
        if text:
            table.add_row(heading, escape(text))
    Console().print(table)


def _gold_counts(task: Task, examples: Sequence[Example]) -> str:
    if not has_gold(examples):
        return "none"
    counts = Counter(name for example in examples for name in example.counted(task))
    if not counts:
        return "all"
    shown = [f"{name} {count}" for name, count in counts.most_common(12)]
    return ", ".join(shown) + (f", ... ({len(counts)} in all)" if len(counts) > 12 else "")
