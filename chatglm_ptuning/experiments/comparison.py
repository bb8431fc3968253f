"""The table of a comparison, of its finished runs: as JSON, CSV, Markdown, a picture, and on the terminal."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from chatglm_ptuning.command_line import flag_words
from chatglm_ptuning.experiments.plan import Cell, CheckedPlan
from chatglm_ptuning.experiments.report import Table, spread
from chatglm_ptuning.experiments.run import Run
from chatglm_ptuning.figures import Bars, draw_bars
from chatglm_ptuning.files import write_atomically, write_json, write_text
from chatglm_ptuning.metrics.intervals import mean_and_deviation, mean_interval

MAJORITY = "majority class"
MEAN_OF_EXAMPLES = ("accuracy", "cmrc_f1")
"""Metrics that are the mean of the examples' own scores, so that two methods can be compared example by example."""


_LEGEND = (
    "Score: mean ± standard deviation over n seeds, in percent. Difference: points between the means, and in brackets "
    "its 95 % interval, bootstrapped over the examples. Share: of all parameters. Time: of the training, mean of the "
    "runs. Memory: largest peak of a run."
)
PREDICTIONS = "predict/predictions.jsonl"
"""Of a run: each example's score."""


def runs_of(cell: Cell, seeds: Sequence[int], base: str, output: Path) -> list[Run]:
    """A run for each seed."""
    flags = {"model_name_or_path": base, **cell.flags, "do_predict": True}
    if cell.flags.get("tuning") != "none":
        flags["do_train"] = True
    scored_by = f"predict_{cell.definition.metric}"
    return [
        Run(
            f"{cell.task} / {cell.method} / seed {seed}",
            seed,
            flag_words(flags | {"seed": seed}),
            output / cell.folder / f"seed-{seed}",
            scored_by,
            (PREDICTIONS,),
        )
        for seed in seeds
    ]


@dataclass(frozen=True)
class Row:
    """One task by one method; scores in percent, differences in points.

    Attributes:
        scores: of each seed, by `seeds`; empty if no run has finished.
        mean, deviation: of the scores; the deviation is that of a sample (n - 1), None for one seed.
        eval_mean, eval_deviation: the same of the metric on the split that the runs were watched by, where they were.
        difference: of the mean to that of the reference method, with its deviation over the seeds that both have.
        difference_low, difference_high: 95 % bootstrap interval of the difference over the examples, whose scores are
            averaged over the seeds that both have; for metrics in `MEAN_OF_EXAMPLES`.
        trainable_parameters: and `trainable_share` of all parameters, theirs included (0 to 1).
        train_seconds: mean over the runs.
        peak_memory_bytes: largest of the runs.
        examples: that were scored.
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


Runs = Mapping[tuple[str, str], Sequence[Run]]
"""(task, method) -> the runs of the cell."""


def make_rows(checked: CheckedPlan, runs: Runs, reference: str | None) -> list[Row]:
    """The table, of what has finished: every task's methods in the plan's order, the majority class before them."""
    rows: list[Row] = []
    for cell in checked.cells:
        metric = cell.definition.metric
        if cell.task in checked.majority and cell.task not in {row.task for row in rows}:
            split, metrics = checked.majority[cell.task]
            rows.append(Row(cell.task, MAJORITY, "", "", split, metric, mean=metrics[metric], trainable_parameters=0))
        finished = _finished(runs[cell.task, cell.method])
        values = _statistics(finished, metric) | {"missing": len(runs[cell.task, cell.method]) - len(finished)}
        if cell.method != reference:
            values |= _difference(finished, _finished(runs.get((cell.task, reference or ""), ())), metric)
        tuning = str(cell.flags.get("tuning", "ptuning_v2"))
        if tuning == "none":
            values |= {"trainable_parameters": 0, "trainable_share": 0.0}
        rows.append(Row(cell.task, cell.method, tuning, cell.head, cell.predict_split, metric, **values))
    return rows


def _finished(runs: Sequence[Run]) -> dict[int, tuple[Run, dict[str, Any]]]:
    """Seed -> finished run and its results."""
    return {run.seed: (run, results) for run in runs if (results := run.results())}


def _statistics(finished: Mapping[int, tuple[Run, dict[str, Any]]], metric: str) -> dict[str, Any]:
    results = [found for _, found in finished.values()]
    if not results:
        return {}
    scores = tuple(found[f"predict_{metric}"] for found in results)
    mean, deviation = mean_and_deviation(scores)
    eval_mean, eval_deviation = mean_and_deviation(_of_all(results, f"eval_{metric}"))
    train_seconds, _ = mean_and_deviation(_of_all(results, "train_runtime"))
    return {
        "seeds": tuple(finished),
        "scores": scores,
        "mean": mean,
        "deviation": deviation,
        "eval_mean": eval_mean,
        "eval_deviation": eval_deviation,
        "trainable_parameters": results[0].get("train_trainable_parameters"),
        "trainable_share": results[0].get("train_trainable_share"),
        "train_seconds": train_seconds,
        "peak_memory_bytes": max(_of_all(results, "train_peak_memory_bytes"), default=None),
        "examples": results[0].get("predict_samples"),
    }


def _of_all(results: Sequence[Mapping[str, Any]], key: str) -> list[Any]:
    """The values of all results; nothing if one of them has none."""
    values = [found[key] for found in results if key in found]
    return values if len(values) == len(results) else []


def _difference(
    finished: Mapping[int, tuple[Run, dict[str, Any]]], others: Mapping[int, tuple[Run, dict[str, Any]]], metric: str
) -> dict[str, Any]:
    """Of the seeds that both have, so that the two means are of equally many runs."""
    pairs = [(finished[seed], others[seed]) for seed in finished if seed in others]
    key = f"predict_{metric}"
    difference, deviation = mean_and_deviation(results[key] - other[key] for (_, results), (_, other) in pairs)
    found = {"difference": difference, "difference_deviation": deviation}
    if pairs and metric in MEAN_OF_EXAMPLES:
        left, right = ([_scores_of_examples(run) for run, _ in side] for side in zip(*pairs, strict=True))
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
    with (
        write_atomically(folder / "comparison.csv") as temporary,
        temporary.open("w", encoding="utf-8", newline="") as file,
    ):
        writer = csv.DictWriter(file, [entry.name for entry in fields(Row)])
        writer.writeheader()
        for row in rows:
            lists = {name: " ".join(map(str, getattr(row, name))) for name in ("seeds", "scores")}
            writer.writerow(asdict(row) | lists)
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
    """A row of the table, as text."""
    return (
        row.method,
        spread(row.mean, row.deviation),
        str(len(row.seeds)) if row.tuning else "",
        "" if row.difference is None else _signed(row),
        "" if row.trainable_parameters is None else f"{row.trainable_parameters:,}",
        "" if row.trainable_share is None else f"{100 * row.trainable_share:.2f} %",
        "" if row.train_seconds is None else _duration(row.train_seconds),
        "" if row.peak_memory_bytes is None else f"{row.peak_memory_bytes / 2**30:.2f} GiB",
    )


def _signed(row: Row) -> str:
    if row.difference_low is None:
        return f"{row.difference:+.2f}"
    return f"{row.difference:+.2f} [{row.difference_low:+.2f}, {row.difference_high:+.2f}]"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"


def _title(rows: Sequence[Row]) -> str:
    """Of one task's table: what was scored, on what, how much of it."""
    first = rows[0]
    numbers = sorted({row.examples for row in rows if row.examples is not None})
    metrics = ", ".join(dict.fromkeys(f"{row.metric} on {row.split}" for row in rows))
    return f"{first.task}: {metrics}" + (f", {'/'.join(map(str, numbers))} examples" if numbers else "")
