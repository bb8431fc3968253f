"""`chatglm-ptuning data show|check`: shows and checks data before a training run."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from chatglm_ptuning.command_line import fail, parse_arguments
from chatglm_ptuning.data.check import Checker
from chatglm_ptuning.data.encoding import Lengths, encode_examples
from chatglm_ptuning.data.report import PreparationReport, percentiles, too_long_for_base
from chatglm_ptuning.data.show import describe, draw_lengths, print_example, print_tokens
from chatglm_ptuning.data.sources.files import find_sources, iterate_rows
from chatglm_ptuning.data.sources.rows import BadRows, Row
from chatglm_ptuning.data.tasks.arguments import InstructionArguments
from chatglm_ptuning.data.tasks.heads.head import Head
from chatglm_ptuning.data.tasks.readers.conversations import ConversationReader
from chatglm_ptuning.data.tasks.source import SplitSource
from chatglm_ptuning.files import write_json
from chatglm_ptuning.model.arguments import TokenizerArguments

CHECK_FILE = "data_check.json"
HISTOGRAM_FILE = "lengths.png"
_HELP = """usage: chatglm-ptuning data COMMAND FILE... [flags]

  show   print a row as the model sees it, learned tokens in green
  check  report the content of files and its faults; exit code 1 if there are any

Flags: chatglm-ptuning data COMMAND --help"""


@dataclass
class _RowArguments(InstructionArguments, TokenizerArguments):
    """How rows are read and encoded, as in training."""

    files: list[str] = field(init=False)

    def head(self) -> Head:
        return self.setup_of_files(self.files).make_head(self.load_tokenizer())


@dataclass
class ShowArguments(_RowArguments):
    """Flags of `data show`."""

    row: int = field(default=1, metadata={"help": "number of the first row, from 1"})
    rows: int = field(default=1, metadata={"help": "number of rows to show"})
    tokens: bool = field(default=False, metadata={"help": "one token per line, with its id"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.row < 1 or self.rows < 1:
            raise ValueError(f"--row and --rows must be at least 1, got {self.row} and {self.rows}")


@dataclass
class CheckArguments(_RowArguments):
    """Flags of `data check`."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "folder of a base: count its tokens too, and see what would be truncated"}
    )
    output_dir: str | None = field(
        default=None, metadata={"help": f"folder for {CHECK_FILE} and, with a base, {HISTOGRAM_FILE}"}
    )
    preprocessing_num_workers: int = field(default=1, metadata={"help": "number of processes that count tokens"})


def show(args: ShowArguments) -> None:
    """Prints rows as the model sees them.

    Raises:
        ValueError: naming file and line, if a row cannot be understood, or there are fewer rows.
    """
    head = args.head()
    console = Console(highlight=False, soft_wrap=True)
    source_row = None
    for source_row in itertools.islice(iterate_rows(args.files), args.row - 1, args.row - 1 + args.rows):
        example = ConversationReader().example_of(source_row, args.columns())
        encoded = head.learn(example)
        formats = f"dataset format {example.dataset_format}, chat format {head.tokenizer.chat_format}"
        console.print(f"{example.where}: {formats}", markup=False)
        if example.unread:
            console.print(f"not read: {', '.join(example.unread)}", markup=False)
        if encoded.counted:
            console.print(describe(encoded.counted), markup=False)
        for number, row in enumerate(encoded.rows, start=1):
            ids, labels = row["input_ids"], row["labels"]
            learned = sum(label >= 0 for label in labels)
            which = f"example {number} of {len(encoded.rows)}: " if len(encoded.rows) > 1 else ""
            console.print(f"{which}{len(ids)} tokens, {learned} learned", markup=False)
            (print_tokens if args.tokens else print_example)(head.tokenizer, ids, labels, console)
    if source_row is None:
        count = sum(1 for _ in iterate_rows(args.files))
        raise ValueError(f"There is no row {args.row}: {', '.join(args.files)} has {count}.")


def check(args: CheckArguments) -> bool:
    """Checks all rows, prints the report, and writes it if there is an output folder.

    Returns:
        Whether the data can be trained on: every row is understood, and something is to be learned.

    Raises:
        ValueError: if there is no such tokenizer, or a limit is too small for its chat format.
    """
    bad_rows = BadRows(None)
    checker = Checker(bad_rows)
    unreadable: list[str] = []
    task = args.setup_of_files(args.files).task
    every = [_Readable(name, unreadable) for name in args.files]
    examples = checker.watch(ConversationReader().read(SplitSource(task, "rows", every, task.fields, None, bad_rows)))
    preparation, lengths = PreparationReport(), Lengths()
    if args.model_name_or_path is None:
        for _ in examples:
            pass
    else:
        learn, workers = args.head().learn, args.preprocessing_num_workers
        for _, encoded in encode_examples(learn, examples, preparation, bad_rows, num_workers=workers):
            lengths.add(encoded)
    errors = [*bad_rows.messages, *unreadable]
    if not checker.is_usable() and not unreadable:
        errors.append("There is no row from which anything can be learned.")
    warnings = checker.warnings()
    if lengths["example"]:
        preparation.set_lengths(lengths)
        too_long = too_long_for_base(lengths["example"], args.load_config().seq_length)
        warnings += [too_long] if too_long else []
    _print_check(args, checker, warnings, errors, preparation)
    if args.output_dir is not None:
        content = {"files": args.files, "fit": not errors, "errors": errors, "warnings": warnings, **checker.report()}
        _write_check(args, content, preparation, lengths)
    return not errors


@dataclass(frozen=True)
class _Readable:
    """The sources of a name. An error that ends the reading is noted, and the next name is read."""

    name: str
    unreadable: list[str]

    def rows(self, bad_rows: BadRows, *, json_in_text: bool) -> Iterator[Row]:
        try:
            for source in find_sources(self.name):
                yield from source.rows(bad_rows, json_in_text=json_in_text)
        except ValueError as error:
            self.unreadable.append(str(error))


def _print_check(
    args: CheckArguments,
    checker: Checker,
    warnings: Sequence[str],
    errors: Sequence[str],
    preparation: PreparationReport,
) -> None:
    print(", ".join(args.files))
    print(checker.summary())
    if preparation.lengths:
        print(f"in tokens of {args.model_name_or_path}:")
        print(preparation.summary())
    for warning in warnings:
        print(f"warning: {warning}")
    for place, error in enumerate(errors):
        print(f"error: {error if place == 0 else error.splitlines()[0]}")
    if checker.bad_rows.count > BadRows.KEPT:
        print(f"error: and {checker.bad_rows.count - BadRows.KEPT} more rows that cannot be understood")
    print("Not fit to train on; see the errors." if errors else f"Fit to train on{_without(checker)}.")


def _without(checker: Checker) -> str:
    left_out = ", ".join(f"{name!r} ({count} rows)" for name, count in checker.unread.items())
    return f", without the text of {left_out}" if left_out else ""


def _write_check(
    args: CheckArguments, content: dict[str, Any], preparation: PreparationReport, lengths: Lengths
) -> None:
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    if lengths["example"]:
        limits = {"source": args.max_source_length, "target": args.max_target_length}
        shares = (1, 5, 25, 50, 75, 90, 95, 99, 100)
        content["tokens"] = {
            "model_name_or_path": args.model_name_or_path,
            **{f"max_{name}_length": limit for name, limit in limits.items()},
            **preparation.as_dict(),
            "percentiles": {name: percentiles(values, shares) for name, values in lengths.items()},
        }
        draw_lengths(lengths, limits, folder / HISTOGRAM_FILE)
    write_json(folder / CHECK_FILE, content)
    print(f"{CHECK_FILE} is in {folder}{f', with {HISTOGRAM_FILE}' if lengths['example'] else ''}.")


def main(argv: Sequence[str]) -> None:
    """Entry of the command; errors that users can correct end it with a message and exit code 1."""
    command, *rest = argv or ["--help"]
    commands: dict[str, tuple[type, Callable[..., bool | None], str]] = {
        "show": (ShowArguments, show, "Print a row as the model sees it, learned tokens in green or in ⟦ ⟧."),
        "check": (CheckArguments, check, "Report the content of data files, and its faults."),
    }
    if command not in commands:
        asked = command in ("-h", "--help", "help")
        print(_HELP, file=sys.stdout if asked else sys.stderr)
        raise SystemExit(0 if asked else 2)
    arguments, run, description = commands[command]
    (args,) = parse_arguments(f"chatglm-ptuning data {command}", description, (arguments,), rest, positional="files")
    try:
        if run(args) is False:
            raise SystemExit(1)
    except (ValueError, OSError, ImportError) as error:
        fail(str(error))
