"""`chatglm-ptuning compare`: a table of tuning methods × tasks × seeds on one base; every run is its own process."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from chatglm_ptuning.command_line import fail, parse_arguments
from chatglm_ptuning.experiments.comparison import make_rows, runs_of, write_comparison
from chatglm_ptuning.experiments.plan import DEFAULT_SEEDS, Plan, check_plan, read_plan
from chatglm_ptuning.experiments.run import LOG_FILE, Run
from chatglm_ptuning.experiments.runner import interruptible, run_all
from chatglm_ptuning.files import check_output_folder
from chatglm_ptuning.prefix.latest import runs_folder


@dataclass
class CompareArguments:
    """Flags of the command."""

    plan: str | None = field(
        default=None, metadata={"help": "YAML file with base, tasks, methods and their flags (docs/compare.md)"}
    )
    model_name_or_path: str | None = field(default=None, metadata={"help": "the base (default: the plan's)"})
    methods: list[str] | None = field(
        default=None, metadata={"help": "only these of the plan; without a plan: tuning methods, as train --tuning"}
    )
    tasks: list[str] | None = field(
        default=None, metadata={"help": "only these of the plan; without a plan: names or files, as train --task"}
    )
    task_data: str | None = field(default=None, metadata={"help": "folder of the tasks' files, as train --task_data"})
    seeds: list[int] | None = field(
        default=None,
        metadata={"help": f"seeds of every cell (default: the plan's, or {' '.join(map(str, DEFAULT_SEEDS))})"},
    )
    reference: str | None = field(
        default=None, metadata={"help": "the method that all others are compared with (default: the plan's, or none)"}
    )
    output_dir: str | None = field(
        default=None, metadata={"help": "folder of the runs and the table (default: output/compare)"}
    )
    workers: int = field(default=1, metadata={"help": "runs at a time; with GPUs, each run gets one of them"})
    dry_run: bool = field(default=False, metadata={"help": "check the plan and print every run's command"})

    def __post_init__(self) -> None:
        if self.plan is None:
            for name in ("model_name_or_path", "methods", "tasks"):
                if not getattr(self, name):
                    raise ValueError(f"--{name} is required without a --plan")
        if self.workers < 1:
            raise ValueError(f"--workers must be at least 1, got {self.workers}")
        if self.seeds is not None and (not self.seeds or min(self.seeds) < 0 or len(set(self.seeds)) < len(self.seeds)):
            raise ValueError(f"--seeds must be different numbers from 0, got {self.seeds}")
        if self.output_dir is None:
            self.output_dir = str(runs_folder() / "compare")
        check_output_folder(self.output_dir)


def main(argv: Sequence[str]) -> None:
    """Entry of the command; exit code 1 for a wrong plan, or if a run failed.

    Flags behind `--` are flags of `chatglm-ptuning train` for every run.
    """
    place = argv.index("--") if "--" in argv else len(argv)
    (args,) = parse_arguments(
        "chatglm-ptuning compare",
        "Compare tuning methods on tasks over several seeds. Flags behind -- are flags of train for every run.",
        (CompareArguments,),
        argv[:place],
    )
    try:
        with interruptible():
            failed = compare(args, _passed_on(argv[place + 1 :]))
    except (ValueError, OSError) as error:
        fail(str(error))
    if failed:
        raise SystemExit(1)


def compare(args: CompareArguments, last: dict[str, Any]) -> bool:
    """Runs what has not finished yet, and writes the table of what has; returns whether a run failed.

    Args:
        last: flags of every run, which override all others.

    Raises:
        ValueError: if the plan is wrong, or another comparison is at work in the folder.
    """
    plan = _plan(args, last)
    checked = check_plan(plan, *((args.tasks, args.methods) if args.plan else ()))
    output = Path(args.output_dir)
    of_cells = {(cell.task, cell.method): runs_of(cell, plan.seeds, plan.base, output) for cell in checked.cells}
    # Seed by seed, so that an interrupted comparison has all methods on the first seeds.
    runs = [run for of_seed in zip(*of_cells.values(), strict=True) for run in of_seed]
    for (task, method), why in checked.left_out.items():
        print(f"{task} / {method}: left out, {why}")
    if args.dry_run:
        for run in runs:
            print(f"{run.name}{' (finished)' if run.results() else ''}\n  {shlex.join(run.command)}")
        return False
    output.mkdir(parents=True, exist_ok=True)
    failed: list[Run] = []
    try:
        with FileLock(output / ".lock", blocking=False):
            for run in runs:
                if run.is_running():
                    raise Timeout(run.lock.lock_file)
                run.try_again()
            count = sum(bool(run.results()) for run in runs)
            if count:
                print(f"{count} of {len(runs)} runs have finished already.")
            try:
                run_all(
                    lambda: filter(Run.is_pending, runs),
                    workers=args.workers,
                    total=len(runs) - count,
                    ended=lambda run: failed.append(run) if run.ending() else None,
                )
            finally:
                rows = make_rows(checked, of_cells, plan.reference)
                tables = write_comparison(
                    output, rows, base=plan.base, reference=plan.reference, checked=checked, failed=failed
                )
    except Timeout as error:
        raise ValueError(
            f"Another comparison is at work in {output}, or a run that a killed comparison left behind. Wait for it "
            f"(`fuser {error.lock_file}` names the process), or give another --output_dir."
        ) from error
    for table in tables:
        table.show()
    print(f"The table is in {output}: comparison.md, .csv, .json, .png.")
    for run in failed:
        print(f"failed: {run.name}, see {run.folder / LOG_FILE}")
    return bool(failed)


def _plan(args: CompareArguments, last: dict[str, Any]) -> Plan:
    """The plan from the file or from flags; flags override the file."""
    if args.plan is not None:
        plan = read_plan(Path(args.plan))
    else:
        plan = Plan(args.model_name_or_path, dict.fromkeys(args.tasks), dict.fromkeys(args.methods))
    given = {"base": args.model_name_or_path, "reference": args.reference, "seeds": args.seeds and tuple(args.seeds)}
    changes = {name: value for name, value in given.items() if value is not None}
    if args.task_data is not None:
        last = {"task_data": args.task_data, **last}
    return dataclasses.replace(plan, **changes, last=last)


def _passed_on(words: Sequence[str]) -> dict[str, Any]:
    """Flags behind `--` with their values; a flag without a value is true."""
    flags: dict[str, list[str]] = {}
    values: list[str] | None = None
    for word in words:
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            values = flags[name] = [value] if equals else []
        elif values is None:
            fail(f"behind -- are flags of chatglm-ptuning train, found {word}.")
        else:
            values.append(word)
    return {name: (found[0] if len(found) == 1 else found or True) for name, found in flags.items()}
