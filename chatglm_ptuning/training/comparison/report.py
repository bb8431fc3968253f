"""The table of a comparison, of its finished runs: as JSON, CSV, Markdown, a picture, and on the terminal."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from chatglm_ptuning.evaluation.figures import find_font, new_figure, save_figure
from chatglm_ptuning.files import write_atomically
from chatglm_ptuning.metrics.bootstrap import mean_interval
from chatglm_ptuning.metrics.spread import mean_and_deviation
from chatglm_ptuning.training.comparison.plan import CheckedPlan
from chatglm_ptuning.training.comparison.runs import Failure, Run

MAJORITY = "majority class"
MEAN_OF_EXAMPLES = ("accuracy", "cmrc_f1")
"""Metrics that are the mean of the examples' own scores, so that two methods can be compared example by example."""


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


def make_rows(checked: CheckedPlan, runs: Sequence[Run], reference: str | None) -> list[Row]:
    """The table, of what has finished: every task's methods in the plan's order, the majority class before them."""
    results = {(run.cell.task, run.cell.method, run.seed): (run, run.results()) for run in runs}
    rows: list[Row] = []
    for task in dict.fromkeys(cell.task for cell in checked.cells):
        cells = [cell for cell in checked.cells if cell.task == task]
        if task in checked.majority:
            split, metrics = checked.majority[task]
            metric = cells[0].definition.metric
            score = metrics[metric]
            rows.append(Row(task, MAJORITY, "", "", split, metric, mean=score, trainable_parameters=0))
        finished: dict[str, dict[int, tuple[Run, dict[str, Any]]]] = {}
        for cell in cells:
            of_cell = {key[2]: entry for key, entry in results.items() if key[:2] == (task, cell.method)}
            finished[cell.method] = {seed: entry for seed, entry in of_cell.items() if entry[1] is not None}
        for cell in cells:
            ended = finished[cell.method]
            row = {
                "task": task, "method": cell.method, "tuning": str(cell.flags.get("tuning", "ptuning_v2")),
                "head": cell.head, "split": cell.predict_split, "metric": cell.definition.metric,
                "missing": sum(run.cell is cell for run in runs) - len(ended),
            }  # fmt: skip
            if ended:
                row |= _statistics([entry for _, entry in ended.values()], cell.definition.metric)
                row |= {"seeds": tuple(ended)}
            if reference in finished and cell.method != reference:
                row |= _difference(ended, finished[reference], cell.definition.metric)
            if row["tuning"] == "none":
                row |= {"trainable_parameters": 0, "trainable_share": 0.0}
            rows.append(Row(**row))
    return rows


def _statistics(results: Sequence[Mapping[str, Any]], metric: str) -> dict[str, Any]:
    scores = tuple(entry[f"predict_{metric}"] for entry in results)
    watched = _of_all(results, f"eval_{metric}")
    mean, deviation = mean_and_deviation(scores)
    eval_mean, eval_deviation = mean_and_deviation(watched)
    train_seconds, _ = mean_and_deviation(_of_all(results, "train_runtime"))
    memory = _of_all(results, "train_peak_memory_bytes")
    return {
        "scores": scores,
        "mean": mean,
        "deviation": deviation,
        "eval_mean": eval_mean,
        "eval_deviation": eval_deviation,
        "trainable_parameters": results[0].get("train_trainable_parameters"),
        "trainable_share": results[0].get("train_trainable_share"),
        "train_seconds": train_seconds,
        "peak_memory_bytes": max(memory) if memory else None,
        "examples": results[0].get("predict_samples"),
    }


def _of_all(results: Sequence[Mapping[str, Any]], key: str) -> list[Any]:
    """The values of all results; nothing if one of them has none."""
    values = [entry[key] for entry in results if key in entry]
    return values if len(values) == len(results) else []


def _difference(
    ended: Mapping[int, tuple[Run, Mapping[str, Any]]], other: Mapping[int, tuple[Run, Mapping[str, Any]]], metric: str
) -> dict[str, Any]:
    """Of the seeds that both have, so that the two means are of equally many runs."""
    seeds = [seed for seed in ended if seed in other]
    if not seeds:
        return {}
    key = f"predict_{metric}"
    each = [ended[seed][1][key] - other[seed][1][key] for seed in seeds]
    difference, deviation = mean_and_deviation(each)
    found = {"difference": difference, "difference_deviation": deviation}
    if metric in MEAN_OF_EXAMPLES:
        left = [_scores_of_examples(ended[seed][0]) for seed in seeds]
        right = [_scores_of_examples(other[seed][0]) for seed in seeds]
        if len({len(scores) for scores in left + right}) == 1:
            points = 100 * (np.mean(left, axis=0) - np.mean(right, axis=0))
            found["difference_low"], found["difference_high"] = mean_interval(points.tolist())
    return found


def _scores_of_examples(run: Run) -> list[float]:
    with run.predictions.open(encoding="utf-8") as lines:
        return [json.loads(line)["score"] for line in lines]


def write_comparison(
    folder: Path,
    rows: Sequence[Row],
    *,
    base: str,
    reference: str | None,
    checked: CheckedPlan,
    failures: Iterable[Failure] = (),
) -> None:
    """Writes `comparison.json`, `.csv`, `.md` and `.png` into the folder, each whole or not at all."""
    flags = {(cell.task, cell.method): dict(cell.flags) for cell in checked.cells}
    content = {
        "base": base,
        "reference": reference,
        "rows": [asdict(row) | {"flags": flags.get((row.task, row.method), {})} for row in rows],
        "left_out": [{"task": task, "method": method, "why": why} for (task, method), why in checked.left_out.items()],
        "failed": [{"run": failure.run.name, "exit_code": failure.code, "log": failure.log} for failure in failures],
    }
    with write_atomically(folder / "comparison.json") as temporary:
        temporary.write_text(json.dumps(content, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
    with (
        write_atomically(folder / "comparison.csv") as temporary,
        temporary.open("w", encoding="utf-8", newline="") as file,
    ):
        writer = csv.DictWriter(file, [entry.name for entry in fields(Row)])
        writer.writeheader()
        for row in rows:
            values = asdict(row)
            lists = {name: " ".join(map(str, values[name])) for name in ("seeds", "scores")}
            writer.writerow(values | lists)
    with write_atomically(folder / "comparison.md") as temporary:
        temporary.write_text(_markdown(rows, base, reference), encoding="utf-8")
    _draw(folder / "comparison.png", rows)


_HEADINGS = ("method", "score", "n", "difference", "trained", "share", "time", "memory")


def _shown(row: Row) -> tuple[str, ...]:
    """A row of the table, as text, under `_HEADINGS`."""
    return (
        row.method,
        _score(row.mean, row.deviation),
        str(len(row.seeds)) if row.tuning else "",
        "" if row.difference is None else _signed(row),
        "" if row.trainable_parameters is None else f"{row.trainable_parameters:,}",
        "" if row.trainable_share is None else f"{100 * row.trainable_share:.2f} %",
        "" if row.train_seconds is None else _duration(row.train_seconds),
        "" if row.peak_memory_bytes is None else f"{row.peak_memory_bytes / 2**30:.2f} GiB",
    )


def _score(mean: float | None, deviation: float | None) -> str:
    if mean is None:
        return "-"
    return f"{mean:.2f}" if deviation is None else f"{mean:.2f} ± {deviation:.2f}"


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


def _by_task(rows: Sequence[Row]) -> dict[str, list[Row]]:
    return {task: [row for row in rows if row.task == task] for task in dict.fromkeys(row.task for row in rows)}


def _headings(reference: str | None) -> list[str]:
    return [f"to {reference}" if heading == "difference" else heading for heading in _HEADINGS]


def _used(rows: Sequence[tuple[str, ...]]) -> list[int]:
    """The columns that hold anything."""
    return [place for place in range(len(_HEADINGS)) if any(row[place] for row in rows)]


def _markdown(rows: Sequence[Row], base: str, reference: str | None) -> str:
    lines = [f"# Comparison on {base}", ""]
    tasks = _by_task(rows)
    if len(tasks) > 1:
        methods = dict.fromkeys(row.method for row in rows)
        cells = {(row.task, row.method): _score(row.mean, row.deviation) for row in rows}
        lines += _markdown_table(
            ["method", *tasks], [[method, *(cells.get((task, method), "") for task in tasks)] for method in methods]
        )
    for of_task in tasks.values():
        shown = [_shown(row) for row in of_task]
        used = _used(shown)
        lines += [f"## {_title(of_task)}", ""]
        headings = _headings(reference)
        lines += _markdown_table([headings[place] for place in used], [[row[place] for place in used] for row in shown])
    lines.append(
        "Score: mean ± standard deviation over n seeds, in percent. Difference: points between the means, and in "
        "brackets its 95 % interval, bootstrapped over the examples. Share: of all parameters. Time: of the training, "
        "mean of the runs. Memory: largest peak of a run."
    )
    return "\n".join(lines) + "\n"


def _markdown_table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    return [line(headings), "|---|" + "---:|" * (len(headings) - 1), *map(line, rows), ""]


def print_comparison(rows: Sequence[Row], reference: str | None) -> None:
    """Prints a table for every task."""
    for of_task in _by_task(rows).values():
        shown = [_shown(row) for row in of_task]
        table = Table(title=_title(of_task), title_justify="left")
        used = _used(shown)
        for place in used:
            table.add_column(_headings(reference)[place], justify="right" if place else "left")
        for row in shown:
            table.add_row(*(row[place] for place in used))
        Console().print(table)


def _draw(path: Path, rows: Sequence[Row]) -> None:
    """Grouped bars: a group for every task, a bar for every method, its deviation as a line.

    Names that no font of this machine can show are numbered, in the order of the table.
    """
    tasks = _by_task(rows)
    methods = [method for method in dict.fromkeys(row.method for row in rows) if method != MAJORITY]
    font = find_font([*tasks, *methods])
    options: dict[str, Any] = {"fontproperties": font} if font else {}
    width = 0.8 / max(len(methods), 1)
    figure, axes = new_figure(max(6.0, 1.5 + len(tasks) * max(1.2, 0.4 * len(methods))), 4.5)
    for place, method in enumerate(methods):
        found = [(index, row) for index, of_task in enumerate(tasks.values()) for row in of_task
                 if row.method == method and row.mean is not None]  # fmt: skip
        axes.bar(
            [index + (place - (len(methods) - 1) / 2) * width for index, _ in found],
            [row.mean for _, row in found],
            width * 0.95,
            yerr=[np.nan if row.deviation is None else row.deviation for _, row in found],
            capsize=3,
            label=method if font or method.isascii() else f"method {place + 1}",
            color=f"C{place % 10}",
        )
    for index, of_task in enumerate(tasks.values()):
        for row in of_task:
            if row.method == MAJORITY:
                label = MAJORITY if index == 0 else None
                axes.hlines(row.mean, index - 0.45, index + 0.45, colors="black", linestyles="dashed", label=label)
    names = [
        (task if font or task.isascii() else f"task {index + 1}") + f"\n{of_task[0].metric}"
        for index, (task, of_task) in enumerate(tasks.items())
    ]
    axes.set_xticks(range(len(tasks)), names, **options)
    axes.set(ylabel="score (%)", ylim=(0, None))
    axes.grid(axis="y", alpha=0.3)
    axes.legend(prop=font, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    save_figure(figure, path)
