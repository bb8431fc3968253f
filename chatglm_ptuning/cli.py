"""One entry for every command: `chatglm-ptuning train|evaluate|...`, also `python -m chatglm_ptuning`."""

from __future__ import annotations

import difflib
import importlib
import sys
from collections.abc import Sequence

COMMANDS = {
    "train": ("chatglm_ptuning.training.run", "train a prefix on your data"),
    "distill": ("chatglm_ptuning.training.distillation.run", "turn a document into a prefix"),
    "search": ("chatglm_ptuning.experiments.search", "search prompt length and learning rate for a task"),
    "evaluate": ("chatglm_ptuning.evaluation.run", "score a prefix, or the plain base"),
    "lm_eval": ("chatglm_ptuning.evaluation.harness.command", "C-Eval, CMMLU and others through lm-evaluation-harness"),
    "compare": ("chatglm_ptuning.experiments.compare", "compare tuning methods on tasks, over seeds"),
    "data": ("chatglm_ptuning.data.command", "show a row as the model sees it, check data files"),
    "chat": ("chatglm_ptuning.serving.terminal", "chat with the base and its prefixes in a terminal"),
    "serve": ("chatglm_ptuning.serving.api.command", "serve a folder of prefixes over HTTP, as OpenAI's API"),
    "web_demo": ("chatglm_ptuning.serving.page.command", "chat with a folder of prefixes in a web page"),
    "export": ("chatglm_ptuning.exchange.export", "write a prefix or a base for PEFT, transformers, chatglm.cpp, ..."),
    "import": ("chatglm_ptuning.exchange.imports", "make a prefix of this kit of one of another program"),
    "estimate": ("chatglm_ptuning.estimation.run", "compute memory and time of a run, without weights"),
    "tradeoff": ("chatglm_ptuning.experiments.tradeoff", "draw score against forgetting, over runs of --preserve_base"),
    "tasks": ("chatglm_ptuning.data.tasks.command", "list the Chinese tasks, or show how one's files are read"),
}
"""Command -> (module with `main(argv)`, one line of help). A module is imported when its command is given."""


def usage() -> str:
    """The list of commands."""
    lines = [f"  {name:<10}{text}" for name, (_, text) in COMMANDS.items()]
    return "usage: chatglm-ptuning COMMAND [flags]\n\n" + "\n".join(lines) + "\n\nFlags: chatglm-ptuning COMMAND --help"


def main(argv: Sequence[str] | None = None) -> None:
    """Runs a command; an unknown one ends with exit code 2 and the nearest known name."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(usage())
        return
    command, *rest = arguments
    if command not in COMMANDS:
        near = difflib.get_close_matches(command, COMMANDS, n=1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        print(f"error: unknown command {command}{hint}\n\n{usage()}", file=sys.stderr)
        raise SystemExit(2)
    importlib.import_module(COMMANDS[command][0]).main(rest)
