"""The table of a comparison's finished runs: as JSON, CSV, Markdown, a picture, and on the terminal."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from chatglm_ptuning.command_line import flag_words
from chatglm_ptuning.experiments.plan import Cell, CheckedPlan
from chatglm_ptuning.experiments.run import Run
from chatglm_ptuning.figures import Bars, draw_bars
from chatglm_ptuning.files import write_json, write_text
from chatglm_ptuning.metrics.intervals import mean_and_deviation, mean_interval
from chatglm_ptuning.tables import Table, spread

MAJORITY = "majority class"
MEAN_OF_EXAMPLES = ("accuracy", "cmrc_f1")
"""Metrics that are the mean of the examples' scores, so that two methods can be compared example by example."""
_LEGEND = (
    "Score: mean ± standard deviation over n seeds, in percent. Difference: points between the means, and in brackets "
    "its 95 % interval, bootstrapped over the examples. Share: of all parameters. Time: training time, mean of the "
    "runs. Memory: largest peak of a run."
)
PREDICTIONS = "predict/predictions.jsonl"
"""The score of each example, in a run's folder."""

Runs = Mapping[tuple[str, str], Sequence[Run]]
"""(task, method) -> the runs of the cell."""


def runs_of(cell: Cell, seeds: Sequence[int], base: str, output: Path) -> list[Run]:
    """A run for each seed."""
    flags = {"model_name_or_path": base, **cell.flags, "do_predict": True}
    if cell.flags.get("tuning") != "none":
        flags["do_train"] = True
    return [
        Run(
            f"{cell.task} / {cell.method} / seed {seed}",
            seed,
            flag_words(flags | {"seed": seed}),
            output / cell.folder / f"seed-{seed}",
            f"predict_{cell.definition.metric}",
            (PREDICTIONS,),
        )
        for seed in seeds
    ]


@dataclass(frozen=True)
class Row:
    """One task by one method; scores in percent, differences in points.

    Attributes:
        scores: of each seed, in the order of `seeds`; empty if no run has finished.
        mean, deviation: of the scores; the deviation is that of a sample (n - 1), None for one seed.
        eval_mean, eval_deviation: the same of the metric on the evaluation split, if the runs evaluate.
        difference: of the mean to that of the reference method, with its deviation, over the seeds that both have.
        difference_low, difference_high: 95 % bootstrap interval of the difference over the examples, whose scores are
            averaged over the seeds that both have; for metrics in `MEAN_OF_EXAMPLES`.
        trainable_parameters: and `trainable_share` of all parameters (0 to 1).
        train_seconds: mean over the runs.
        peak_memory_bytes: largest of the runs.
        examples: number of scored examples.
        missing: number of runs without a score: failed, or not run yet.
    """

    task: str
    method: str
    tuning: str
    head: str
    split: str
    metric: str
    seeds: tuple[int, ...] = ()
    scores: tuple[float, ...] = ()
    mean: float | None = None
    deviation: float | None = None
    eval_mean: float | None = None
    eval_deviation: float | None = None
    difference: float | None = None
    difference_deviation: float | None = None
    difference_low: float | None = None
    difference_high: float | None = None
    trainable_parameters: int | None = None
    trainable_share: float | None = None
    train_seconds: float | None = None
    peak_memory_bytes: int | None = None
    examples: int | None = None
    missing: int = 0


def make_rows(checked: CheckedPlan, runs: Runs, reference: str | None) -> list[Row]:
    """The table of the finished runs: every task's methods in the plan's order, the majority class before them."""
    rows: list[Row] = []
    for cell in checked.cells:
        metric = cell.definition.metric
        if cell.task in checked.majority and cell.task not in {row.task for row in rows}:
            split, metrics = checked.majority[cell.task]
            rows.append(Row(cell.task, MAJORITY, "", "", split, metric, mean=metrics[metric], trainable_parameters=0))
        own = runs[cell.task, cell.method]
        finished = {run.seed: results for run in own if (results := run.results())}
        values = _statistics(finished, metric) | {"missing": len(own) - len(finished)}
        if cell.method != reference:
            values |= _difference(own, runs.get((cell.task, reference or ""), ()), metric)
        tuning = str(cell.flags.get("tuning", "ptuning_v2"))
        if tuning == "none":
            values |= {"trainable_parameters": 0, "trainable_share": 0.0}
        rows.append(Row(cell.task, cell.method, tuning, cell.head, cell.predict_split, metric, **values))
    return rows


def _statistics(finished: Mapping[int, Mapping[str, Any]], metric: str) -> dict[str, Any]:
    """The values of a row that follow from the results by seed."""
    if not finished:
        return {}

    def of_all(key: str) -> list[Any]:
        values = [found[key] for found in finished.values() if key in found]
        return values if len(values) == len(finished) else []

    first, scores = next(iter(finished.values())), of_all(f"predict_{metric}")
    mean, deviation = mean_and_deviation(scores)
    eval_mean, eval_deviation = mean_and_deviation(of_all(f"eval_{metric}"))
    return {
        "seeds": tuple(finished),
        "scores": tuple(scores),
        "mean": mean,
        "deviation": deviation,
        "eval_mean": eval_mean,
        "eval_deviation": eval_deviation,
        "trainable_parameters": first.get("train_trainable_parameters"),
        "trainable_share": first.get("train_trainable_share"),
        "train_seconds": mean_and_deviation(of_all("train_runtime"))[0],
        "peak_memory_bytes": max(of_all("train_peak_memory_bytes"), default=None),
        "examples": first.get("predict_samples"),
    }


def _difference(runs: Sequence[Run], others: Sequence[Run], metric: str) -> dict[str, Any]:
    """Over the seeds that both have finished, so that both means are of equally many runs."""
    of_seed = {run.seed: run for run in others if run.results()}
    pairs = [(run, of_seed[run.seed]) for run in runs if run.seed in of_seed and run.results()]
    difference, deviation = mean_and_deviation(
        run.results()[run.scored_by] - other.results()[other.scored_by] for run, other in pairs
    )
    found = {"difference": difference, "difference_deviation": deviation}
    if pairs and metric in MEAN_OF_EXAMPLES:
        left, right = ([_scores_of_examples(run) for run in side] for side in zip(*pairs, strict=True))
        if len({len(scores) for scores in left + right}) == 1:
            points = 100 * (np.mean(left, axis=0) - np.mean(right, axis=0))
            found["difference_low"], found["difference_high"] = mean_interval(points.tolist())
    return found


def _scores_of_examples(run: Run) -> list[float]:
    with (run.folder / PREDICTIONS).open(encoding="utf-8") as lines:
        return [json.loads(line)["score"] for line in lines]


def write_comparison(
    folder: Path,
    rows: Sequence[Row],
    *,
    base: str,
    reference: str | None,
    checked: CheckedPlan,
    failed: Sequence[Run] = (),
) -> list[Table]:
    """Writes `comparison.json`, `.csv`, `.md` and `.png` into the folder; returns a table for every task."""
    flags = {(cell.task, cell.method): dict(cell.flags) for cell in checked.cells}
    content = {
        "base": base,
        "reference": reference,
        "rows": [asdict(row) | {"flags": flags.get((row.task, row.method), {})} for row in rows],
        "left_out": [{"task": task, "method": method, "why": why} for (task, method), why in checked.left_out.items()],
        "failed": [
            {"run": run.name, "exit_code": ending.code, "log": ending.log} for run in failed if (ending := run.ending())
        ],
    }
    write_json(folder / "comparison.json", content)
    lines = io.StringIO(newline="")
    writer = csv.DictWriter(lines, [entry.name for entry in fields(Row)], lineterminator="\n")
    writer.writeheader()
    for row in rows:
        lists = {name: " ".join(map(str, getattr(row, name))) for name in ("seeds", "scores")}
        writer.writerow(asdict(row) | lists)
    write_text(folder / "comparison.csv", lines.getvalue())
    by_task = {task: [row for row in rows if row.task == task] for task in dict.fromkeys(row.task for row in rows)}
    headings = ["method", "score", "n", f"to {reference}", "trained", "share", "time", "memory"]
    tables = [Table(headings, list(map(_shown, of_task)), _title(of_task)) for of_task in by_task.values()]
    cells = {(row.method, row.task): spread(row.mean, row.deviation) for row in rows}
    methods = dict.fromkeys(row.method for row in rows)
    overview = Table(
        ["method", *by_task], [[name, *(cells.get((name, task), "") for task in by_task)] for name in methods]
    )
    parts = [f"# Comparison on {base}", *([overview.markdown()] if len(tables) > 1 else [])]
    parts += [*(table.markdown() for table in tables), _LEGEND]
    write_text(folder / "comparison.md", "\n\n".join(parts) + "\n")
    bars: dict[str, Bars] = {
        f"{task}\n{of_task[0].metric}": {
            row.method: (row.mean, row.deviation) for row in of_task if row.mean is not None
        }
        for task, of_task in by_task.items()
    }
    draw_bars(folder / "comparison.png", bars, "score (%)", dashed=MAJORITY)
    return tables


def _shown(row: Row) -> tuple[str, ...]:
    return (
        row.method,
        spread(row.mean, row.deviation),
        str(len(row.seeds)) if row.tuning else "",
        _signed(row.difference, row.difference_low, row.difference_high),
        "" if row.trainable_parameters is None else f"{row.trainable_parameters:,}",
        "" if row.trainable_share is None else f"{100 * row.trainable_share:.2f} %",
        "" if row.train_seconds is None else _duration(row.train_seconds),
        "" if row.peak_memory_bytes is None else f"{row.peak_memory_bytes / 2**30:.2f} GiB",
    )


def _signed(difference: float | None, low: float | None, high: float | None) -> str:
    if difference is None:
        return ""
    return f"{difference:+.2f}" + ("" if low is None else f" [{low:+.2f}, {high:+.2f}]")


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"


def _title(rows: Sequence[Row]) -> str:
    numbers = sorted({row.examples for row in rows if row.examples is not None})
    metrics = ", ".join(dict.fromkeys(f"{row.metric} on {row.split}" for row in rows))
    return f"{rows[0].task}: {metrics}" + (f", {'/'.join(map(str, numbers))} examples" if numbers else "")
