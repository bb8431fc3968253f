"""`chatglm-ptuning compare`: ways of tuning × tasks × seeds on one base, each run a process of its own, as a table."""

from __future__ import annotations

import dataclasses
import fcntl
import shlex
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from rich.console import Console
from rich.markup import escape
from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from chatglm_ptuning.command_line import fail, parse_arguments
from chatglm_ptuning.files import check_output_folder
from chatglm_ptuning.prefix.latest import runs_folder
from chatglm_ptuning.training.comparison.plan import DEFAULT_SEEDS, Plan, check_plan, read_plan, select
from chatglm_ptuning.training.comparison.report import make_rows, print_comparison, write_comparison
from chatglm_ptuning.training.comparison.runs import LOG_FILE, Failure, Run, run_all, runs_of
from chatglm_ptuning.training.failures import SIGTERM_EXIT_CODE

_INTERRUPTED_EXIT_CODE = 130


@dataclass
class CompareArguments:
    """What is compared, on what, and where it goes."""

    plan: str | None = field(
        default=None, metadata={"help": "YAML file with base, tasks, methods and their flags (docs/compare.md)"}
    )
    model_name_or_path: str | None = field(default=None, metadata={"help": "the base (default: the plan's)"})
    methods: list[str] | None = field(
        default=None, metadata={"help": "of the plan, these alone; without a plan: ways of tuning, as train --tuning"}
    )
    tasks: list[str] | None = field(
        default=None, metadata={"help": "of the plan, these alone; without a plan: names or files, as train --task"}
    )
    task_data: str | None = field(default=None, metadata={"help": "folder with the tasks' files, as train --task_data"})
    seeds: list[int] | None = field(
        default=None, metadata={"help": f"(default: the plan's, or {' '.join(map(str, DEFAULT_SEEDS))})"}
    )
    reference: str | None = field(
        default=None, metadata={"help": "method that all others are compared with (default: the plan's, or none)"}
    )
    output_dir: str | None = field(
        default=None, metadata={"help": "folder of the runs and the table (default: output/compare)"}
    )
    workers: int = field(default=1, metadata={"help": "runs at a time; with GPUs, each on one of them, in turn"})
    dry_run: bool = field(default=False, metadata={"help": "check the plan and print every run's command"})

    def __post_init__(self) -> None:
        if self.plan is None:
            for name in ("model_name_or_path", "methods", "tasks"):
                if not getattr(self, name):
                    raise ValueError(f"--{name} is needed, or a --plan")
        if self.workers < 1:
            raise ValueError(f"--workers must be at least 1, got {self.workers}")
        if self.seeds is not None and (not self.seeds or min(self.seeds) < 0 or len(set(self.seeds)) < len(self.seeds)):
            raise ValueError(f"--seeds must be different numbers from 0, got {self.seeds}")
        if self.output_dir is None:
            self.output_dir = str(runs_folder() / "compare")
        check_output_folder(self.output_dir)


def main(argv: Sequence[str]) -> None:
    """Entry of the command; exit code 1 for a wrong plan, or if a run failed.

    What stands behind `--` are flags of `chatglm-ptuning train` for every run.
    """
    argv = list(argv)
    place = argv.index("--") if "--" in argv else len(argv)
    (args,) = parse_arguments(
        "chatglm-ptuning compare",
        "Compare ways of tuning on tasks, over seeds. Flags behind -- are given to every training run.",
        (CompareArguments,),
        argv[:place],
    )
    try:
        with _sigterm_interrupts():
            failed = compare(args, _passed_on(argv[place + 1 :]))
    except (ValueError, OSError) as error:
        fail(str(error))
    except KeyboardInterrupt as stop:
        print("Interrupted; the same command goes on with the runs that are left.", file=sys.stderr)
        raise SystemExit(SIGTERM_EXIT_CODE if stop.args else _INTERRUPTED_EXIT_CODE) from stop
    if failed:
        raise SystemExit(1)


def compare(args: CompareArguments, last: dict[str, Any]) -> bool:
    """Runs what has not finished yet, and writes the table of what has; returns whether a run failed.

    Args:
        last: flags of every run, over all others.

    Raises:
        ValueError: if the plan is wrong, or another comparison is at work in the folder.
    """
    plan = _plan(args, last)
    checked = check_plan(plan, *select(plan, *((args.tasks, args.methods) if args.plan else (None, None))))
    output = Path(args.output_dir)
    runs = runs_of(checked.cells, plan.seeds, plan.base, output)
    console = Console()
    for (task, method), why in checked.left_out.items():
        console.print(f"{escape(f'{task} / {method}')}: left out, {why}")
    if args.dry_run:
        for run in runs:
            print(f"{run.name}{' (finished)' if run.results() else ''}\n  {shlex.join(run.command)}")
        return False
    output.mkdir(parents=True, exist_ok=True)
    with _locked(output) as lock:
        failures: list[Failure] = []
        try:
            _run_with_progress(runs, args.workers, console, failures, lock)
        finally:
            rows = make_rows(checked, runs, plan.reference)
            write_comparison(output, rows, base=plan.base, reference=plan.reference, checked=checked, failures=failures)
    print_comparison(rows, plan.reference)
    print(f"The table is in {output}: comparison.md, .csv, .json, .png.")
    for failure in failures:
        console.print(f"failed: {escape(failure.run.name)}, see {escape(str(failure.run.folder / LOG_FILE))}")
    return bool(failures)


def _plan(args: CompareArguments, last: dict[str, Any]) -> Plan:
    """The plan of the file or of the flags; flags override the file."""
    if args.plan is not None:
        plan = read_plan(Path(args.plan))
    else:
        plan = Plan(
            base=args.model_name_or_path,
            seeds=DEFAULT_SEEDS,
            common={},
            tasks={task: {} for task in args.tasks},
            methods={method: {"tuning": method} for method in args.methods},
        )
    given = {"base": args.model_name_or_path, "reference": args.reference, "seeds": args.seeds and tuple(args.seeds)}
    changes = {name: value for name, value in given.items() if value is not None}
    if args.task_data is not None:
        last = {"task_data": args.task_data, **last}
    return dataclasses.replace(plan, **changes, last=last)


def _passed_on(words: Sequence[str]) -> dict[str, Any]:
    """Flags behind `--`, as a mapping; a flag without a value is true."""
    flags: dict[str, list[str]] = {}
    values: list[str] | None = None
    for word in words:
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            values = flags[name] = [value] if equals else []
        elif values is None:
            fail(f"behind -- are flags of chatglm-ptuning train; found {word}.")
        else:
            values.append(word)
    return {name: (found[0] if len(found) == 1 else found or True) for name, found in flags.items()}


@contextmanager
def _locked(output: Path) -> Iterator[int]:
    """Holds the folder's lock, and gives its descriptor: it is free when no process has that open any more.

    Raises:
        ValueError: if another process holds it.
    """
    path = output / ".lock"
    with path.open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(
                f"Another comparison is at work in {output}, or a run that a killed one has left behind; wait for it "
                f"(`fuser {path}` names the process), or name another folder."
            ) from error
        except OSError as error:
            raise ValueError(f"{output} is on storage that cannot be locked ({error}): name another folder.") from error
        yield file.fileno()


def _run_with_progress(runs: Sequence[Run], workers: int, console: Console, failures: list[Failure], lock: int) -> None:
    left = [run for run in runs if run.results() is None]
    if len(left) < len(runs):
        console.print(f"{len(runs) - len(left)} of {len(runs)} runs have finished already.")
    columns = (TextColumn("{task.description}"), MofNCompleteColumn(), TimeElapsedColumn())
    running: list[str] = []
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as progress:
        bar = progress.add_task("runs", total=len(runs), completed=len(runs) - len(left))

        def show() -> None:
            progress.update(bar, description=escape("runs: " + (", ".join(running) or "-")))

        def started(run: Run) -> None:
            running.append(run.name)
            show()

        def ended(run: Run, failure: Failure | None, seconds: float) -> None:
            running.remove(run.name)
            progress.advance(bar)
            show()
            if failure is None:
                metric = run.cell.definition.metric
                score = run.results()[f"predict_{metric}"]
                progress.console.print(
                    escape(f"{run.name}: {metric} {score:.2f} after {seconds:.0f} s"), soft_wrap=True
                )
                return
            failures.append(failure)
            progress.console.print(
                f"[red]{escape(run.name)}: exit code {failure.code}[/red]\n{escape(failure.log)}", soft_wrap=True
            )

        run_all(left, workers, started, ended, inherited=(lock,))


@contextmanager
def _sigterm_interrupts() -> Iterator[None]:
    """Makes SIGTERM end the block as Ctrl-C does, so that no run is left behind."""

    def interrupt(number: int, frame: Any) -> NoReturn:
        raise KeyboardInterrupt("SIGTERM")

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
